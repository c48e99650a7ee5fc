"""Long skip connections: the fusion of the two streams, and the interface of a model with skips. The pairs of units are
in `pairing`.

An isotropic transformer has L units. Unit i of the first half hands its output to unit L-1-i, which fuses it with its
own input before it runs (arXiv 2411.17616; U-ViT, arXiv 2209.12152). Because the last units see the fresh features of
the first ones through the skips, a *reuse* step may take the hidden states that enter unit L-k from an earlier step and
run only the first k and the last k units.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import BaseOutput
from jaxtyping import Float
from torch import Tensor, nn

from skipdit.interfaces import Config, Transformer
from skipdit.models.pairing import LongSkipConfig as LongSkipConfig
from skipdit.models.pairing import LongSkipLinks as LongSkipLinks
from skipdit.models.pairing import pair_segments
from skipdit.models.pairing import pair_units as pair_units
from skipdit.verbs import carry_out

if TYPE_CHECKING:
    from skipdit.models.forward_plan import ForwardState, Writes

BranchKind = Literal["attention", "temporal_attention", "cross_attention", "mlp"]


class FP32RMSNorm(nn.RMSNorm):
    """RMSNorm computed in float32 and cast back to the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class LongSkip(nn.Module):
    """Fuses a target unit's hidden states with its skip: norm over 2D channels, projection 2D -> D.

    Weight keys: `norm.weight`, `norm.bias` (layer norm only), `proj.weight` (D, 2D), `proj.bias`. The first D input
    columns of the projection act on the hidden states, the last D on the skip.
    """

    def __init__(self, hidden_size: int, config: LongSkipConfig) -> None:
        super().__init__()
        norm_class = FP32LayerNorm if config.norm == "layer_norm" else FP32RMSNorm
        self.residual = config.fusion == "residual"
        self.norm = norm_class(2 * hidden_size, eps=1e-6)
        self.proj = nn.Linear(2 * hidden_size, hidden_size)
        self.init = config.resolved_init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        self.proj.reset_parameters()
        if self.init == "xavier":
            nn.init.xavier_uniform_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)
        elif self.init == "zero":
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def forward(
        self, hidden_states: Float[Tensor, "*batch tokens dim"], skip: Float[Tensor, "*batch tokens dim"]
    ) -> Float[Tensor, "*batch tokens dim"]:
        fused = self.proj(self.norm(torch.cat([hidden_states, skip], dim=-1)))
        return hidden_states + fused if self.residual else fused


@dataclass
class LongSkipOutput(BaseOutput):
    """The output of a model with units."""

    sample: Tensor
    """The prediction."""


class PlannedOutput(NamedTuple):
    """The return value of a forward with a plan."""

    output: Any
    """The return value without a plan."""
    stored: dict[str, dict[str, Tensor]]
    """The values that the plan stores, by the name of their region."""


@dataclass(frozen=True)
class BranchInfo:
    """A branch of a unit: an attention, a cross-attention or an MLP."""

    kind: BranchKind
    unit: int
    name: str
    """Number of the block in its unit, a dot, and the branch's name in the block."""
    module: nn.Module


@dataclass
class OpenCall:
    """The current forward call of a model, in one object that it shares with its blocks and branches."""

    state: "ForwardState | None" = None
    """`None` outside a call."""
    num_tokens: int = 0
    """Tokens per image or frame, as the first block of the last unit saw them."""
    for_branches: bool = False
    """True if only branches are open."""
    writes: "Writes | None" = None
    """`None` if the blocks write nothing in place."""
    aside: bool = False
    """True if the forward returns its plain output under a plan too, as hooks on it want, and what it stores is left
    in `stored`."""
    stored: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class LinkedBlock(nn.Module):
    """A block that fuses its unit's skip if it is the first of the unit."""

    long_skip: LongSkip | None
    """`None` if the unit takes no skip."""


class LongSkipModel(nn.Module):
    """A model made of units. Its forward takes a `plan` and `stored` values (see `skipdit.models.forward_plan`), and
    with a plan returns a `PlannedOutput`."""

    config: Config
    long_skip_links: LongSkipLinks
    fill_token: nn.Parameter | None
    """(dim); `None` if `LongSkipConfig.fill_token` is off."""
    timestep_scale: float = 1.0
    """Factor from the `timestep` argument to the scale from 0 to 1000; negative if it increases as noise decreases."""
    shares_tokens: bool = False
    """True if the samples of a batch must keep the same tokens."""
    open_call: OpenCall | None = None
    """The current call, for blocks and branches; `None` if none are open."""
    is_cache_enabled: bool = False

    @classmethod
    def find(cls, model: nn.Module) -> Self | None:
        """Return the model if it is of this class, otherwise `None`: a `LongSkipModel` is one whose units are known."""
        return model if isinstance(model, cls) else None

    def units(self) -> list[tuple[LinkedBlock, ...]]:
        """Return the blocks of each unit in the order in which they run; the first one fuses the unit's skip."""
        raise NotImplementedError

    def unit_entries(self) -> list[LinkedBlock]:
        return [blocks[0] for blocks in self.units()]

    def segment_sizes(self) -> list[int]:
        """Return the number of units of each segment."""
        return [len(self.units())]

    def branches(self) -> list[BranchInfo]:
        """Return every branch: attention (temporal in the second block of a unit), cross-attention and MLP; several of
        a kind if each stream has its own."""
        raise NotImplementedError

    def set_long_skips(self, hidden_size: int, config: LongSkipConfig | None) -> None:
        """Give the target units fresh `LongSkip`s and remove those of all other units; `None` removes all. Also sets or
        removes the fill token, which starts at zero."""
        self.set_links(pair_segments(self.segment_sizes(), config))
        for unit, block in enumerate(self.unit_entries()):
            is_target = unit in self.long_skip_links.sources
            block.long_skip = LongSkip(hidden_size, config) if is_target and config is not None else None
        self.fill_token = nn.Parameter(torch.zeros(hidden_size)) if config is not None and config.fill_token else None

    def update_config(self, **options: object) -> None:
        """Set entries of the config that diffusers' ConfigMixin keeps."""
        model: Transformer = self
        model.register_to_config(**options)

    def set_links(self, sources: Mapping[int, int]) -> None:
        """Link units. sources: the source of each target unit."""
        *starts, num_units = accumulate(self.segment_sizes())
        self.long_skip_links = LongSkipLinks(num_units, sources, tuple(starts))

    def enable_cache(self, spec: object) -> None:
        """Call `skipdit.enable_cache(model, spec)`."""
        carry_out("enable_cache", self, spec)

    def disable_cache(self) -> None:
        """Call `skipdit.disable_cache(model)`."""
        carry_out("disable_cache", self)

    def cache_context(self, name: str, **position: object) -> AbstractContextManager[None]:
        """Keep the calls of a guidance stream apart in an enabled cache. position: the state of the loop, such as
        `step_index`, which diffusers' pipelines may pass."""
        context = getattr(super(), "cache_context", None)
        return nullcontext() if context is None else context(name, **position)
