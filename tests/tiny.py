"""Real classes at a size that runs in milliseconds."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn

from skipdit.cache.enable import cache_summary
from skipdit.data.videos import FrameChoice, frames_of, frames_of_file
from skipdit.diffusion import Objective, make_scheduler
from skipdit.files.output import MARKER
from skipdit.models.costs import flop_counter
from skipdit.models.dit import DiT
from skipdit.models.latte import Latte
from skipdit.models.long_skip import LongSkipConfig
from skipdit.pipelines import ClassToImagePipeline


def listing(folder: Path) -> list[str]:
    """The names in a folder, but for the marker of what a command wrote."""
    return sorted(path.name for path in folder.iterdir() if path.name != MARKER)


def randomize(model: Any) -> Any:
    """Weights are random everywhere, also where adaLN-Zero starts at zero, so that every path matters."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tiny_dit(num_layers: int = 6, long_skip: LongSkipConfig | None = LongSkipConfig(), **sizes: int) -> DiT:  # noqa: B008
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_classes": 10} | sizes
    return randomize(
        DiT(num_layers=num_layers, num_attention_heads=2, attention_head_dim=16, long_skip=long_skip, **sizes)
    )


def tiny_latte(num_units: int = 4, long_skip: LongSkipConfig | None = LongSkipConfig(), **sizes: Any) -> Latte:  # noqa: B008
    sizes = {"sample_size": 8, "num_frames": 3, "in_channels": 4, "out_channels": 8, "num_classes": 10} | sizes
    heads = {"num_attention_heads": 2, "attention_head_dim": 8}
    return randomize(Latte(num_layers=2 * num_units, long_skip=long_skip, **heads, **sizes))


def tiny_pipeline(scheduler: str = "ddim", **options: object) -> ClassToImagePipeline:
    pipeline = ClassToImagePipeline(tiny_dit(**options), make_scheduler(Objective(learned_variance=True), scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def inputs(batch: int = 2, size: int = 8, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, channels, size, size, generator=generator), torch.randint(
        10, (batch,), generator=generator
    )


def read_video(
    video: Path | bytes, num_frames: int, interval: int = 1, start: int = 0, fps: float | None = None, name: str = ""
) -> np.ndarray:
    """The frames (f h w 3) of a file, or of its content under a name."""
    choice = FrameChoice(num_frames=num_frames, interval=interval, fps=fps)
    if isinstance(video, Path):
        return np.stack(list(frames_of_file(video, choice, start)))
    return np.stack(list(frames_of(io.BytesIO(video), name, choice, start)))


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def counts(target: Any) -> tuple[int, int]:
    """How many steps the cache of a model or pipeline has made in full, and how many it has reused in."""
    summary = cache_summary(target)
    return summary.steps_full, summary.steps_reused


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def flops_of(call: Callable[[], object]) -> int:
    """Floating-point operations of a call."""
    with torch.no_grad(), flop_counter() as counter:
        call()
    return counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------------------------
# Every transformer whose units skipdit knows


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """One class of transformers at tiny size.

    conditioning: arguments beside latents and timestep, by name the shape of one sample of normal noise.
    given: more arguments, for a batch size. timestep_scale: what 1 in the `timestep` argument is of 0 to 1000.
    """

    model_class: type[nn.Module]
    config: dict[str, Any]
    latents: tuple[int, ...] = (4, 8, 8)
    conditioning: dict[str, tuple[int, ...]] = field(default_factory=dict)
    given: Callable[[int], dict[str, Any]] = lambda batch: {}
    timestep_scale: float = 1.0
    num_layers: str = "num_layers"
    blocks_a_unit: int = 1

    @property
    def ours(self) -> bool:
        return self.model_class in (DiT, Latte)

    @property
    def native(self) -> bool:
        """Whether the class has long skips by itself."""
        return self.model_class is diffusers.HunyuanDiT2DModel

    def build(self, num_units: int = 6, seed: int = 0, **config: Any) -> Any:
        torch.manual_seed(seed)
        return randomize(self.model_class(num_layers=num_units * self.blocks_a_unit, **(self.config | config)))

    def arguments(self, timestep: float = 500.0, batch: int = 2, seed: int = 7) -> dict[str, Any]:
        """Of one call of the forward; latents by the seed, conditioning that is always the same."""
        latents = torch.randn(batch, *self.latents, generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(1)
        conditioning = {
            name: torch.randn(batch, *shape, generator=generator) for name, shape in self.conditioning.items()
        }
        time = torch.full((batch,), timestep / self.timestep_scale)
        return {"hidden_states": latents, "timestep": time} | conditioning | self.given(batch)


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments as a pipeline in half precision passes them."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def labels(batch: int) -> dict[str, Tensor]:
    return {"class_labels": torch.arange(batch) * 7 % 10}


def flux_ids(batch: int) -> dict[str, Tensor]:
    places = torch.arange(16)
    return {
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.stack([torch.zeros(16), places // 4, places % 4], dim=1),
    }


def hunyuan_arguments(batch: int) -> dict[str, Any]:
    return {
        "text_embedding_mask": torch.ones(batch, 4),
        "text_embedding_mask_t5": torch.ones(batch, 6),
        "image_meta_size": torch.full((batch, 6), 64.0),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
    }


SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4}
PATCHED = SMALL | {"out_channels": 8, "sample_size": 8, "patch_size": 2}

TINY_FAMILIES: dict[str, TinyFamily] = {
    "DiT": TinyFamily(model_class=DiT, config=PATCHED | {"num_classes": 10}, given=labels),
    "Latte": TinyFamily(
        model_class=Latte,
        config=PATCHED | {"num_classes": 10, "num_frames": 3},
        latents=(3, 4, 8, 8),
        given=labels,
        blocks_a_unit=2,
    ),
    "DiTTransformer2DModel": TinyFamily(
        model_class=diffusers.DiTTransformer2DModel, config=PATCHED | {"num_embeds_ada_norm": 10}, given=labels
    ),
    "LatteTransformer3DModel": TinyFamily(
        model_class=diffusers.LatteTransformer3DModel,
        config=PATCHED
        | {
            "cross_attention_dim": 16,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 12,
            "video_length": 3,
        },
        latents=(4, 3, 8, 8),
        conditioning={"encoder_hidden_states": (5, 12)},
    ),
    "PixArtTransformer2DModel": TinyFamily(
        model_class=diffusers.PixArtTransformer2DModel,
        config=PATCHED | {"cross_attention_dim": 16, "caption_channels": 12},
        conditioning={"encoder_hidden_states": (5, 12)},
    ),
    "SD3Transformer2DModel": TinyFamily(
        model_class=diffusers.SD3Transformer2DModel,
        config=PATCHED
        | {
            "out_channels": 4,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        },
        conditioning={"encoder_hidden_states": (5, 12), "pooled_projections": (10,)},
    ),
    "FluxTransformer2DModel": TinyFamily(
        model_class=diffusers.FluxTransformer2DModel,
        config=SMALL
        | {
            "num_single_layers": 1,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "axes_dims_rope": (4, 2, 2),
        },
        latents=(16, 4),
        conditioning={"encoder_hidden_states": (5, 12), "pooled_projections": (10,)},
        given=flux_ids,
        timestep_scale=1000.0,
    ),
    "WanTransformer3DModel": TinyFamily(
        model_class=diffusers.WanTransformer3DModel,
        config=SMALL | {"attention_head_dim": 12, "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 32},
        latents=(4, 2, 8, 8),
        conditioning={"encoder_hidden_states": (5, 12)},
    ),
    "HunyuanDiT2DModel": TinyFamily(
        model_class=diffusers.HunyuanDiT2DModel,
        config=SMALL
        | {
            "attention_head_dim": 16,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 24,
            "pooled_projection_dim": 24,
            "text_len": 4,
            "text_len_t5": 6,
        },
        conditioning={"encoder_hidden_states": (4, 16), "encoder_hidden_states_t5": (6, 24)},
        given=hunyuan_arguments,
    ),
}
