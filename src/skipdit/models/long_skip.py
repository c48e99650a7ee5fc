"""Long skip connections: which unit feeds which, how the two streams fuse, and what flows during one forward call.

An isotropic transformer has L units. Unit i of the first half hands its output to unit L-1-i, which fuses it with its
own input before it runs (arXiv 2411.17616; U-ViT, arXiv 2209.12152). Because the deepest units see fresh shallow
features through the skips, a *reuse* step may take the hidden states that enter unit L-k from an earlier step and run
only the k shallowest and the k deepest units.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import BaseOutput
from jaxtyping import Float
from torch import Tensor, nn

from skipdit.options import Fusion
from skipdit.verbs import carry_out

BranchKind = Literal["attention", "temporal_attention", "cross_attention", "mlp"]
Norm = Literal["layer_norm", "rms_norm"]
Init = Literal["default", "xavier", "zero"]


@dataclass(frozen=True, kw_only=True)
class LongSkipConfig:
    """Which units are linked, and how a link fuses."""

    num_pairs: int | None = None
    """how many pairs to link, the outermost first; None links all of them"""
    middle_pair: bool = True
    """link the two adjacent middle units of an even depth, where the skip is the hidden state itself (the released
    Skip-DiT does this; HunyuanDiT leaves it out); an odd depth has no such pair"""
    norm: Norm = "layer_norm"
    """norm over the 2D concatenated channels, computed in float32"""
    init: Init | None = None
    """of the projection 2D -> D: PyTorch's default (as released), Xavier, or zero; None is default for replace, zero
    for residual"""
    fusion: Fusion = "replace"
    """proj(norm([hidden, skip])) replaces the hidden states (arXiv 2411.17616), or is added to them (residual), so that
    with a zero projection a converted model starts exactly where it was"""
    fill_token: bool = False
    """learn one vector that stands, before the last units, for each token that the deep units did not see in training,
    beside its skip (SPRINT, arXiv 2510.21986)"""

    def __post_init__(self) -> None:
        if self.num_pairs is not None and self.num_pairs < 0:
            raise ValueError(f"num_pairs must be at least 0 or None for all, got {self.num_pairs}")
        for name, allowed in (("norm", Norm), ("fusion", Fusion)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        if self.init is not None and self.init not in get_args(Init):
            raise ValueError(f"init must be one of {', '.join(get_args(Init))} or None, got {self.init!r}")

    @property
    def resolved_init(self) -> Init:
        return self.init or ("default" if self.fusion == "replace" else "zero")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LongSkipConfig":
        return cls(**fields)


def pair_units(num_units: int, config: LongSkipConfig | None) -> dict[int, int]:
    """The source unit of every linked target unit: `{L-1-i: i}`, outermost pair first.

    Raises `ValueError` where more pairs are asked for than the depth has.
    """
    if config is None:
        return {}
    num_available = _num_available(num_units, config)
    num_pairs = num_available if config.num_pairs is None else config.num_pairs
    if num_pairs > num_available:
        raise ValueError(f"num_pairs must be at most {num_available} for {num_units} units, got {num_pairs}")
    return {num_units - 1 - source: source for source in range(num_pairs)}


def _num_available(num_units: int, config: LongSkipConfig) -> int:
    return max(num_units // 2 - (not config.middle_pair and num_units % 2 == 0), 0)


def pair_segments(sizes: Sequence[int], config: LongSkipConfig | None) -> dict[int, int]:
    """As `pair_units`, within each of several segments of units that follow one another; a short segment has as many
    pairs as it can."""
    if config is None:
        return {}
    pair_units(max(sizes), config)  # raises
    sources, start = {}, 0
    for size in sizes:
        most = _num_available(size, config)
        here = replace(config, num_pairs=most if config.num_pairs is None else min(config.num_pairs, most))
        sources |= {target + start: source + start for target, source in pair_units(size, here).items()}
        start += size
    return sources


class FP32RMSNorm(nn.RMSNorm):
    """RMSNorm computed in float32 and cast back to the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class LongSkip(nn.Module):
    """Fuses a target unit's hidden states with its skip: norm over 2D, projection 2D -> D.

    Keys: `norm.weight`, `norm.bias` (layer norm only), `proj.weight` (D, 2D), `proj.bias`. The first D input columns
    of the projection act on the hidden states, the last D on the skip.
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


@dataclass(frozen=True)
class LongSkipLinks:
    """The links of one model.

    num_units: L. sources: of each linked target unit its source. segment_starts: the first unit of every segment but
    the first. targets: of each source its target. ordered_sources: rising.
    """

    num_units: int
    sources: Mapping[int, int]
    segment_starts: tuple[int, ...] = ()
    targets: Mapping[int, int] = field(init=False, repr=False)
    ordered_sources: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ordered_sources", tuple(sorted(self.sources.values())))
        object.__setattr__(self, "targets", {source: target for target, source in self.sources.items()})

    @property
    def max_num_shallow_units(self) -> int:
        """The largest k for which a reuse step still leaves out a unit and every deep unit it runs has its skip."""
        return min(len(self.sources), (self.num_units - 1) // 2)

    def check_num_shallow_units(self, num_shallow_units: int) -> None:
        """`ValueError` where no reuse step with this k exists, with the allowed range."""
        if not self.sources:
            raise ValueError(
                "this model has no long skips, so there are no deep features to reuse behind them: "
                "build it with long_skip=LongSkipConfig(), call skipdit.add_long_skips(model), or reuse what units in "
                "the middle add, with delta:"
            )
        if not 1 <= num_shallow_units <= self.max_num_shallow_units:
            raise ValueError(
                f"num_shallow_units must be between 1 and {self.max_num_shallow_units} for {self.num_units} units with "
                f"{len(self.sources)} linked pairs, got {num_shallow_units}"
            )


@dataclass
class LongSkipOutput(BaseOutput):
    """sample (`Tensor`): the prediction."""

    sample: Tensor


class PlannedOutput(NamedTuple):
    """What a forward returns under a plan. output: what it returns without one. stored: what the plan asked for."""

    output: Any
    stored: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class BranchPlace:
    """Where a branch stands: attention, cross-attention or MLP; its unit; its name there, and its module."""

    kind: BranchKind
    unit: int
    name: str
    module: nn.Module


@dataclass
class OpenCall:
    """The forward call that a model is in: one object that it shares with its blocks and branches.

    state: a `ForwardState`. num_tokens: of a picture or frame, as the last unit's first block saw it. for_branches:
    whether only branches are open. writes: finds out what blocks write in place, `None` where none does.
    """

    state: Any = None
    num_tokens: int = 0
    for_branches: bool = False
    writes: Any = None


class LongSkipModel:
    """A model of units. Its forward takes `plan` and `stored` as in `skipdit.models.forward_plan`, and under a plan
    returns a `PlannedOutput`. The first block of each unit has `long_skip`, a `LongSkip` where the unit takes a skip.

    timestep_scale: what one unit of the `timestep` argument is on the scale from 0 to 1000. open_call: where its open
    branches find the call that they are in; `None` where they are not open. fill_token: (dim), `None` where
    `LongSkipConfig.fill_token` is off.
    """

    long_skip_links: LongSkipLinks
    fill_token: nn.Parameter | None
    timestep_scale: float = 1.0
    shares_tokens: bool = False
    open_call: "OpenCall | None" = None
    is_cache_enabled: bool = False

    def units(self) -> list[tuple[nn.Module, ...]]:
        """Return the blocks of each unit in the order they run; the first fuses the unit's skip."""
        raise NotImplementedError

    def unit_entries(self) -> list[nn.Module]:
        return [blocks[0] for blocks in self.units()]

    def segment_starts(self) -> tuple[int, ...]:
        """Return the first unit of every segment but the first."""
        return ()

    def branches(self) -> list[BranchPlace]:
        """Return every branch: attention (in the second block of a unit over time), cross-attention and MLP; several of
        a kind where streams have one each."""
        raise NotImplementedError

    def set_long_skips(self, hidden_size: int, config: LongSkipConfig | None) -> None:
        """Give the target units fresh `LongSkip`s and take them from all others; `None` leaves none. Also the fill
        token, which starts as zeros."""
        entries, starts = self.unit_entries(), self.segment_starts()
        sizes = [stop - start for start, stop in pairwise((0, *starts, len(entries)))]
        self.long_skip_links = LongSkipLinks(len(entries), pair_segments(sizes, config), starts)
        for unit, block in enumerate(entries):
            is_target = unit in self.long_skip_links.sources
            cast(Any, block).long_skip = LongSkip(hidden_size, cast(LongSkipConfig, config)) if is_target else None
        self.fill_token = nn.Parameter(torch.zeros(hidden_size)) if config is not None and config.fill_token else None

    # ------------------------------------------------------------------------------------------------------------------
    # The verbs of diffusers' CacheMixin

    def enable_cache(self, spec: Any) -> None:
        """As `skipdit.enable_cache(model, spec)`."""
        carry_out("enable_cache", self, spec)

    def disable_cache(self) -> None:
        """As `skipdit.disable_cache(model)`."""
        carry_out("disable_cache", self)

    def cache_context(self, name: str, **where: Any) -> AbstractContextManager[None]:
        """Where a pipeline calls a guidance branch; a cache that is on keeps it apart. where: the place in the loop,
        which pipelines of diffusers may tell."""
        theirs = getattr(super(), "cache_context", None)
        return nullcontext() if theirs is None else theirs(name, **where)
