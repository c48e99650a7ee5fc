"""Class-to-video diffusion transformer (Latte, arXiv 2401.03048), with or without long skips (arXiv 2411.17616)."""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers' pipelines look for it here
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from skipdit.interfaces import Fields
from skipdit.models.dit import PatchTransformer, repeat_rows, run_block, sincos
from skipdit.models.forward_plan import PLAIN, ForwardPlan, ForwardState, Stored
from skipdit.models.long_skip import LongSkipConfig, LongSkipOutput, PlannedOutput
from skipdit.models.presets import LATTE_PRESETS as LATTE_PRESETS
from skipdit.models.presets import preset_sizes
from skipdit.models.shallow_path import ShallowPath


class Latte(PatchTransformer):
    """Class-to-video diffusion transformer: spatial blocks, which see one frame, alternate with temporal blocks, which
    see one patch over time. A unit is a (spatial, temporal) pair, and a long skip links two units.

    Args: those of `DiT`, except for the scale and the shift of the time, and
        num_frames (`int`): frames of the clips it is trained on; shorter ones work too.
        num_layers (`int`): number of blocks, even; two blocks are one unit.
        num_classes (`int`, *optional*): number of classes; `None` for the unconditional model.
    """

    blocks_per_unit = 2  # spatial, temporal
    frame_embedding: Tensor

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int = 32,
        num_frames: int = 16,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        null_class: bool = True,
        downscale_freq_shift: float = 0.0,
        qk_norm: bool = False,
        long_skip: LongSkipConfig | Fields | None = None,
        shallow_path: ShallowPath | Fields | None = None,
    ) -> None:
        super().__init__()
        if num_layers % 2 or num_layers < 2:
            raise ValueError(f"num_layers must be even (a spatial and a temporal block per unit), got {num_layers}")
        self.build()
        frames = torch.arange(num_frames, dtype=torch.float64)
        table = sincos(self.position_embedding.shape[1], frames).float()
        self.register_buffer("frame_embedding", table, persistent=False)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        sample_size: int = 32,
        num_frames: int = 16,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_classes: int | None = None,
        long_skip: LongSkipConfig | None = None,
    ) -> "Latte":
        """Build a published size, `"Latte-S/2"` to `"Latte-XL/8"`, with fresh weights. Raises `ValueError` on
        others."""
        return cls(
            **preset_sizes(name, LATTE_PRESETS),
            sample_size=sample_size,
            num_frames=num_frames,
            in_channels=in_channels,
            out_channels=out_channels,
            num_classes=num_classes,
            long_skip=long_skip,
        )

    def forward(
        self,
        hidden_states: Float[Tensor, "batch frames channels height width"],
        timestep: Float[Tensor, "*batch"] | Int[Tensor, "*batch"],
        class_labels: Int[Tensor, " batch"] | None = None,
        *,
        num_images: int = 0,
        image_class_labels: Int[Tensor, "batch num_images"] | None = None,
        plan: ForwardPlan = PLAIN,
        stored: Stored | None = None,
        return_dict: bool = True,
    ) -> LongSkipOutput | tuple[Tensor, ...] | PlannedOutput:
        """Predict from noisy latents `hidden_states` at `timestep` (0 to 1000; one for the batch, or one per sample).

        The last `num_images` frames are single images: they bypass the temporal blocks, and in a class-conditional
        model each has its own class, `image_class_labels` (joint training, Latte, section 3.3).

        With a `plan`, returns a `PlannedOutput` with the values that the plan stores. The values that it reuses come
        from `stored`, which an earlier call returned. Streams have the shape (batch x frames, tokens, dim).
        """
        batch, num_all_frames = hidden_states.shape[:2]
        num_frames, dtype = num_all_frames - num_images, hidden_states.dtype
        self._check_frames(num_frames, num_images, image_class_labels)
        hidden_states, grid = self.embed_patches(rearrange(hidden_states, "b f c h w -> (b f) c h w"))
        embedded = self.embed_timestep(timestep, batch, dtype)
        conditioning = frame_conditioning = self._add_class(embedded, class_labels)
        if num_images:
            image_labels = None if image_class_labels is None else image_class_labels.reshape(-1)
            image_conditioning = self._add_class(repeat_rows(embedded, batch * num_images), image_labels)
            videos = repeat_rows(conditioning, batch * num_frames).unflatten(0, (batch, num_frames))
            images = image_conditioning.unflatten(0, (batch, num_images))
            frame_conditioning = torch.cat([videos, images], dim=1).flatten(0, 1)

        state = ForwardState.begin(self, plan, stored)
        for unit, (spatial, temporal) in enumerate(self.units()):
            if unit in plan.idle:
                continue
            (hidden_states,) = state.enter(unit, hidden_states)
            if state.runs(unit):
                hidden_states = run_block(self, spatial, hidden_states, frame_conditioning, state.skip(unit))
                frames = rearrange(hidden_states, "(b f) n d -> b f n d", b=batch)
                videos = rearrange(frames[:, :num_frames], "b f n d -> (b n) f d")
                if unit == 0:
                    videos = videos + self.frame_embedding[:num_frames].to(dtype)
                videos = run_block(self, temporal, videos, conditioning)
                videos = rearrange(videos, "(b n) f d -> b f n d", b=batch)
                frames = torch.cat([videos, frames[:, num_frames:]], dim=1) if num_images else videos
                hidden_states = rearrange(frames, "b f n d -> (b f) n d")
                state.leave(unit, hidden_states)
        (hidden_states,) = state.enter(self.long_skip_links.num_units, hidden_states)

        pictures = self.predict_patches(hidden_states, frame_conditioning, grid)
        sample = pictures.unflatten(0, (batch, num_all_frames))
        return state.finish(LongSkipOutput(sample=sample) if return_dict else (sample,))

    def _check_frames(self, num_frames: int, num_images: int, image_class_labels: Tensor | None) -> None:
        if not 1 <= num_frames <= self.config.num_frames:
            raise ValueError(f"a clip must have 1 to {self.config.num_frames} frames, got {num_frames}")
        if num_images < 0:
            raise ValueError(f"num_images must be at least 0, got {num_images}")
        if image_class_labels is not None and not num_images:
            raise ValueError("class labels: image_class_labels were passed without num_images")

    def _add_class(self, conditioning: Tensor, class_labels: Tensor | None) -> Tensor:
        if (class_labels is None) != (self.class_embedder is None):
            rule = "none" if self.class_embedder is None else "one per clip and one per single image"
            raise ValueError(f"class labels: this model takes {rule}")
        if self.class_embedder is None or class_labels is None:
            return conditioning
        if len(class_labels) != len(conditioning):
            raise ValueError(f"class labels: there must be {len(conditioning)}, got {len(class_labels)}")
        return conditioning + self.class_embedder(class_labels)
