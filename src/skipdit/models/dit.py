"""Class-to-image diffusion transformer (DiT, arXiv 2212.09748), with or without long skips (arXiv 2411.17616)."""

from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from skipdit.interfaces import Config, Fields
from skipdit.models.forward_plan import PLAIN, ForwardPlan, ForwardState, Stored, kind_in
from skipdit.models.long_skip import (
    BranchInfo,
    LinkedBlock,
    LongSkipConfig,
    LongSkipModel,
    LongSkipOutput,
    PlannedOutput,
)
from skipdit.models.modules import modules_of
from skipdit.models.presets import PRESETS as PRESETS
from skipdit.models.presets import preset_sizes
from skipdit.models.shallow_path import ShallowPath


class HeadNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) of the queries or keys of each head, with one scale for all heads."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, heads: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "batch heads tokens dim"]:
        return F.rms_norm(heads, self.weight.shape, self.weight.to(heads.dtype), self.eps)


class Attention(nn.Module):
    """Self-attention. qk_norm: normalize queries and keys to keep the logits small (arXiv 2302.05442, section 2; as
    in SD3, arXiv 2403.03206, section 5.3.2)."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = HeadNorm(hidden_size // num_heads) if qk_norm else None
        self.k_norm = HeadNorm(hidden_size // num_heads) if qk_norm else None
        self.proj = nn.Linear(hidden_size, hidden_size)

    def split(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (b h n d), before their norms."""
        qkv = rearrange(self.qkv(hidden_states), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return qkv[0], qkv[1], qkv[2]

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.split(hidden_states)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(attended, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(mlp_ratio * hidden_size))
        self.fc2 = nn.Linear(int(mlp_ratio * hidden_size), hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states), approximate="tanh"))


def repeat_rows(rows: Tensor, num_rows: int) -> Tensor:
    """Repeat each row equally often, to `num_rows` in total, as all frames of a clip share its conditioning."""
    return rows if rows.shape[0] == num_rows else rows.repeat_interleave(num_rows // rows.shape[0], dim=0)


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply the second half of adaptive layer norm: (b n d), scaled and shifted per sample by (b d)."""
    return hidden_states * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(LinkedBlock):
    """One unit: attention and MLP, each modulated and gated by the conditioning (adaLN-Zero, DiT paper, section 3.2).

    The model sets `long_skip` on the units that take a skip. Each row of the conditioning applies to batch / groups
    consecutive rows of the batch.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(hidden_size, mlp_ratio)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.long_skip = None

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        conditioning: Float[Tensor, "groups dim"],
        skip: Float[Tensor, "batch tokens dim"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        if self.long_skip is not None:
            hidden_states = self.long_skip(hidden_states, skip)
        modulation = repeat_rows(self.modulation(F.silu(conditioning)), hidden_states.shape[0])
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        attended = self.attn(modulate(self.norm1(hidden_states), shift_attn, scale_attn))
        hidden_states = hidden_states + gate_attn.unsqueeze(1) * attended
        transformed = self.mlp(modulate(self.norm2(hidden_states), shift_mlp, scale_mlp))
        return hidden_states + gate_mlp.unsqueeze(1) * transformed


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return rearrange(self.proj(latents), "b d h w -> b (h w) d")


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, out_features)

    def forward(self, hidden_states: Tensor, conditioning: Tensor) -> Tensor:
        modulation = repeat_rows(self.modulation(F.silu(conditioning)), hidden_states.shape[0])
        shift, scale = modulation.chunk(2, dim=-1)
        return self.proj(modulate(self.norm(hidden_states), shift, scale))


def sincos(dim: int, positions: Float[Tensor, " positions"]) -> Float[Tensor, "positions dim"]:
    """Return the sines, then the cosines, of positions at dim / 2 frequencies between 1 and 1 / 10000."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_position_embedding(hidden_size: int, height: int, width: int) -> Float[Tensor, "tokens dim"]:
    """Return the fixed 2D sine-cosine table (MAE, arXiv 2111.06377): half of the channels for the column, half for the
    row."""
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    return torch.cat([sincos(hidden_size // 2, columns), sincos(hidden_size // 2, rows)], dim=1).float()


def position_embedding_on(hidden_size: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return that table on a device."""
    return sincos_position_embedding(hidden_size, height, width).to(device)


@lru_cache(maxsize=8)
def known_position_embedding(hidden_size: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return that table on a device, which is computed once."""
    with torch.inference_mode(mode=False):  # training may take it too
        return position_embedding_on(hidden_size, height, width, device)


class PatchTransformer(ModelMixin, LongSkipModel, ConfigMixin):
    """Base of DiT and Latte: `DiTBlock`s on patches of pictures, one token per patch, and their conditioning."""

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["DiTBlock"]
    _gradient_checkpointing_func: Callable[..., Tensor]  # None until enable_gradient_checkpointing()
    config: Config
    blocks_per_unit: ClassVar[int] = 1
    position_embedding: Tensor
    patch_size: int

    def build(self) -> None:
        """Create the layers that the config describes. Raises `ValueError` if its sizes do not fit together."""
        config = self.config
        hidden_size = config.num_attention_heads * config.attention_head_dim
        if hidden_size % 4 or hidden_size < 4:
            raise ValueError(f"the hidden size (heads x head size) must be divisible by 4, got {hidden_size}")
        for name in ("patch_size", "num_frames", "num_classes"):
            if (size := config.get(name)) is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        sample_size, self.patch_size = config.sample_size, config.patch_size
        if sample_size % self.patch_size:
            raise ValueError(f"sample_size must be divisible by patch_size {self.patch_size}, got {sample_size}")
        long_skip, shallow_path = LongSkipConfig.of(config.long_skip), ShallowPath.of(config.shallow_path)
        self.register_to_config(
            out_channels=config.out_channels or config.in_channels,
            long_skip=None if long_skip is None else long_skip.to_dict(),
            shallow_path=None if shallow_path is None else shallow_path.to_dict(),
            _use_default_values=[],  # `from_config` would reset the entries in it, and add_long_skips changes one
        )
        self.gradient_checkpointing = False
        self._make_layers(hidden_size)
        init_adaln_zero(self)
        if self.class_embedder is not None:
            nn.init.normal_(self.class_embedder.weight, std=0.02)
        self.set_long_skips(hidden_size, long_skip)

    def _make_layers(self, hidden_size: int) -> None:
        config, grid_size = self.config, self.config.sample_size // self.patch_size
        spacing, num_classes, null_class = config.downscale_freq_shift, config.num_classes, config.null_class
        self.patch_embed = PatchEmbed(self.patch_size, config.in_channels, hidden_size)
        self.timestep_frequencies = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=spacing)
        self.timestep_embedder = TimestepEmbedding(256, hidden_size)
        self.class_embedder = None if num_classes is None else nn.Embedding(num_classes + null_class, hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, config.num_attention_heads, config.mlp_ratio, config.qk_norm)
            for _ in range(config.num_layers)
        )
        self.final_layer = FinalLayer(hidden_size, self.patch_size**2 * config.out_channels)
        self.register_buffer(
            "position_embedding", sincos_position_embedding(hidden_size, grid_size, grid_size), persistent=False
        )

    @property
    def dit_blocks(self) -> list[DiTBlock]:
        """Return the blocks with their type, which a `ModuleList` does not know."""
        return cast(list[DiTBlock], list(self.blocks))

    def units(self) -> list[tuple[LinkedBlock, ...]]:
        size, blocks = self.blocks_per_unit, self.dit_blocks
        return [tuple(blocks[start : start + size]) for start in range(0, len(blocks), size)]

    def branches(self) -> list[BranchInfo]:
        branches: list[BranchInfo] = []
        for index, block in enumerate(self.dit_blocks):
            unit, number = divmod(index, self.blocks_per_unit)
            branches += [
                BranchInfo(kind_in("attention", number), unit, f"{number}.attn", block.attn),
                BranchInfo("mlp", unit, f"{number}.mlp", block.mlp),
            ]
        return branches

    @property
    def null_class_label(self) -> int:
        """Return the label that means "no class". Raises `ValueError` if the model was built without one."""
        if self.config.num_classes is None or not self.config.null_class:
            raise ValueError("this model has no null class: classifier-free guidance needs num_classes and null_class")
        return self.config.num_classes

    def embed_patches(
        self, latents: Float[Tensor, "pictures channels height width"]
    ) -> tuple[Float[Tensor, "pictures tokens dim"], tuple[int, int]]:
        """Return one token per patch, with its position embedding added, and the number of patch rows and columns."""
        sizes = tuple(latents.shape[-2:])
        if any(size % self.patch_size for size in sizes):
            raise ValueError(f"height and width must be divisible by patch_size {self.patch_size}, got {sizes}")
        height, width = (size // self.patch_size for size in sizes)
        native, positions = self.config.sample_size // self.patch_size, self.position_embedding
        if (height, width) != (native, native):
            table_of = position_embedding_on if torch.compiler.is_compiling() else known_position_embedding
            positions = table_of(positions.shape[1], height, width, positions.device)
        return self.patch_embed(latents) + positions.to(latents.dtype), (height, width)

    def embed_timestep(self, timestep: Tensor, batch: int, dtype: torch.dtype) -> Float[Tensor, "batch dim"]:
        """Return the embedding of one timestep for the whole batch, or of one per sample."""
        return self.timestep_embedder(self.timestep_frequencies(timestep.reshape(-1).expand(batch)).to(dtype))

    def predict_patches(
        self, hidden_states: Tensor, conditioning: Tensor, grid: tuple[int, int]
    ) -> Float[Tensor, "pictures channels height width"]:
        """Return the output of the final layer, put back together from patches to pictures."""
        patches, p = self.final_layer(hidden_states, conditioning), self.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)


def run_block(model: PatchTransformer, block: nn.Module, *args: Tensor | None) -> Tensor:
    """Run a block, with gradient checkpointing if it is enabled."""
    if model.gradient_checkpointing and torch.is_grad_enabled():
        return model._gradient_checkpointing_func(block, *args)
    return block(*args)


def init_adaln_zero(model: PatchTransformer) -> None:
    """Initialize every block as the identity and the output as zero (DiT paper, section 3.2)."""
    for layer in modules_of(model, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.view(model.patch_embed.proj.out_channels, -1))
    nn.init.zeros_(model.patch_embed.get_parameter("proj.bias"))
    for embedding in (model.timestep_embedder.linear_1, model.timestep_embedder.linear_2):
        nn.init.normal_(embedding.weight, std=0.02)
    modulations = [block.modulation for block in model.dit_blocks]
    for layer in (*modulations, model.final_layer.modulation, model.final_layer.proj):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class DiT(PatchTransformer):
    """Class-to-image diffusion transformer.

    Args:
        sample_size (`int`): height and width of the latents (or pixels) it is trained on; other sizes work too.
        patch_size (`int`): side of the square patch that becomes one token.
        in_channels (`int`), out_channels (`int`, *optional*, defaults to `in_channels`): twice `in_channels` if the
            model also predicts a variance.
        num_layers (`int`): number of blocks; each is one unit.
        num_attention_heads (`int`), attention_head_dim (`int`): their product is the hidden size, which must be
            divisible by 4.
        mlp_ratio (`float`): ratio of the MLP's hidden size to that of the block.
        num_classes (`int`): number of classes. null_class (`bool`): adds class `num_classes`, which means "no class"
            and which guidance needs.
        downscale_freq_shift (`float`): 0 is the official spacing of the timestep's frequencies, 1 that of diffusers.
        time_scale (`float`), time_shift (`float`): the model embeds `time_scale * timestep + time_shift`. The
            official SiT embeds the share of data, 1 - timestep / 1000: -0.001 and 1.
        qk_norm (`bool`): RMSNorm of the queries and keys of each head.
        long_skip (`LongSkipConfig`, *optional*): `None` for the plain DiT.
        shallow_path (`ShallowPath`, *optional*): the first and last units, if they were trained to predict without the
            others; only guidance uses this.
    """

    class_embedder: nn.Embedding

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_class: bool = True,
        downscale_freq_shift: float = 0.0,
        time_scale: float = 1.0,
        time_shift: float = 0.0,
        qk_norm: bool = False,
        long_skip: LongSkipConfig | Fields | None = None,
        shallow_path: ShallowPath | Fields | None = None,
    ) -> None:
        super().__init__()
        self.time_scale, self.time_shift = time_scale, time_shift
        self.build()

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_classes: int = 1000,
        long_skip: LongSkipConfig | None = None,
    ) -> "DiT":
        """Build a published size, `"DiT-S/2"` to `"DiT-XL/8"`, with fresh weights. Raises `ValueError` on others."""
        return cls(
            **preset_sizes(name, PRESETS),
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_classes=num_classes,
            long_skip=long_skip,
        )

    def forward(
        self,
        hidden_states: Float[Tensor, "batch channels height width"],
        timestep: Float[Tensor, "*batch"] | Int[Tensor, "*batch"],
        class_labels: Int[Tensor, " batch"],
        *,
        plan: ForwardPlan = PLAIN,
        stored: Stored | None = None,
        return_dict: bool = True,
    ) -> LongSkipOutput | tuple[Tensor, ...] | PlannedOutput:
        """Predict from noisy latents `hidden_states` at `timestep` (0 to 1000; one for the batch, or one per sample).

        With a `plan`, returns a `PlannedOutput` with the values that the plan stores. The values that it reuses come
        from `stored`, which an earlier call returned. Each tensor has the shape (batch, tokens, dim).
        """
        hidden_states, grid = self.embed_patches(hidden_states)
        if (self.time_scale, self.time_shift) != (1, 0):
            timestep = self.time_scale * timestep.float() + self.time_shift
        embedded = self.embed_timestep(timestep, len(hidden_states), hidden_states.dtype)
        conditioning = embedded + self.class_embedder(class_labels)

        state = ForwardState.begin(self, plan, stored)
        for unit, block in enumerate(self.blocks):
            if unit in plan.idle:
                continue
            (hidden_states,) = state.enter(unit, hidden_states)
            if state.runs(unit):
                hidden_states = run_block(self, block, hidden_states, conditioning, state.skip(unit))
                state.leave(unit, hidden_states)
        (hidden_states,) = state.enter(len(self.blocks), hidden_states)

        sample = self.predict_patches(hidden_states, conditioning, grid)
        return state.finish(LongSkipOutput(sample=sample) if return_dict else (sample,))
