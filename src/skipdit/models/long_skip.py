"""Long skip connections: which unit feeds which, how the two streams fuse, and what flows during one forward call.

An isotropic transformer has L units. Unit i of the first half hands its output to unit L-1-i, which fuses it with its
own input before it runs (arXiv 2411.17616; U-ViT, arXiv 2209.12152). Because the deepest units see fresh shallow
features through the skips, a *reuse* step may take the hidden states that enter unit L-k from an earlier step and run
only the k shallowest and the k deepest units.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import BaseOutput
from jaxtyping import Float
from torch import Tensor, nn

Norm = Literal["layer_norm", "rms_norm"]
Init = Literal["default", "xavier", "zero"]
Fusion = Literal["replace", "residual"]


@dataclass(frozen=True, kw_only=True)
class LongSkipConfig:
    """Which units are linked, and how a link fuses.

    num_pairs (`int`, *optional*): link the m outermost pairs; `None` links all of them, 0 none.
    middle_pair (`bool`, defaults to `True`): link the two adjacent middle units of an even depth. There the skip *is*
        the hidden state (the released Skip-DiT does this; HunyuanDiT leaves it out). An odd depth has no such pair.
    norm (`str`, defaults to `"layer_norm"`): over the 2D concatenated channels, always computed in float32.
    init (`str`, *optional*): of the projection 2D -> D: PyTorch's default (as released), Xavier, or zero. `None` is the
        fusion's own: `"default"` for `"replace"`, `"zero"` for `"residual"`.
    fusion (`str`, defaults to `"replace"`): `proj(norm([hidden, skip]))` replaces the hidden states (the paper), or is
        added to them, so that with a zero projection a converted model starts exactly where it was.
    """

    num_pairs: int | None = None
    middle_pair: bool = True
    norm: Norm = "layer_norm"
    init: Init | None = None
    fusion: Fusion = "replace"

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
    num_available = num_units // 2
    if not config.middle_pair and num_units % 2 == 0:
        num_available -= 1
    num_available = max(num_available, 0)
    num_pairs = num_available if config.num_pairs is None else config.num_pairs
    if num_pairs > num_available:
        raise ValueError(f"num_pairs must be at most {num_available} for {num_units} units, got {num_pairs}")
    return {num_units - 1 - source: source for source in range(num_pairs)}


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
    """The links of one model: the number of its units L and `sources[target] = source`."""

    num_units: int
    sources: Mapping[int, int]

    @property
    def max_num_shallow_units(self) -> int:
        """The largest k for which a reuse step still leaves out a unit and every deep unit it runs has its skip."""
        return min(len(self.sources), (self.num_units - 1) // 2)

    def check_num_shallow_units(self, num_shallow_units: int, *, delta: bool = False) -> None:
        """`ValueError` where no reuse step with this k exists, with the allowed range.

        delta: what the deep units add is reused, not what they put out; that needs no long skips.
        """
        if delta and not self.sources:
            allowed = (self.num_units - 1) // 2
            if not 1 <= num_shallow_units <= allowed:
                raise ValueError(
                    f"num_shallow_units must be between 1 and {allowed} for {self.num_units} units, "
                    f"got {num_shallow_units}"
                )
            return
        if not self.sources:
            raise ValueError(
                "this model has no long skips, so there are no deep features to reuse behind them: "
                "build it with long_skip=LongSkipConfig(), or call skipdit.add_long_skips(model)"
            )
        if not 1 <= num_shallow_units <= self.max_num_shallow_units:
            raise ValueError(
                f"num_shallow_units must be between 1 and {self.max_num_shallow_units} for {self.num_units} units with "
                f"{len(self.sources)} linked pairs, got {num_shallow_units}"
            )


@dataclass
class LongSkipFlow:
    """What one forward call carries along its long skips. Made for the call, gone with it.

    A plain call gives `num_shallow_units=None`. A *full* step gives k and afterwards holds `deep_features`, the hidden
    states that entered unit L-k. A *reuse* step gives k and the deep features of an earlier step. With `delta` the deep
    features are what units k to L-k-1 added to the hidden states, and a reuse step adds that to its own.

    Skips are kept by unit index, so a gradient-checkpointed unit that runs twice finds the same skip twice.
    """

    links: LongSkipLinks
    num_shallow_units: int | None = None
    deep_features: Tensor | None = None
    delta: bool = False
    reuse: bool = field(init=False)
    shallow_output: Tensor | None = field(init=False, default=None)
    skips: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.reuse = self.deep_features is not None
        if self.num_shallow_units is not None:
            self.links.check_num_shallow_units(self.num_shallow_units, delta=self.delta)
        elif self.reuse:
            raise ValueError("deep_features need num_shallow_units: the k for which they were stored")

    def runs(self, unit: int) -> bool:
        """Whether this unit runs: on a reuse step only the k shallowest and the k deepest do."""
        if self.num_shallow_units is None or not self.reuse:
            return True
        return min(unit, self.links.num_units - 1 - unit) < self.num_shallow_units

    def enter(self, unit: int, hidden_states: Tensor) -> Tensor:
        """The hidden states with which `unit` starts, before its fusion; stored or reused on entry to unit L-k."""
        if self.num_shallow_units is None:
            return hidden_states
        if self.delta and unit == self.num_shallow_units:
            self.shallow_output = hidden_states
        if unit != self.links.num_units - self.num_shallow_units:
            return hidden_states
        if self.reuse:
            assert self.deep_features is not None
            return self.deep_features if self.shallow_output is None else self.shallow_output + self.deep_features
        self.deep_features = hidden_states if self.shallow_output is None else hidden_states - self.shallow_output
        return hidden_states

    def is_boundary(self, unit: int) -> bool:
        """Whether `enter` has something to store or to replace at this unit."""
        k = self.num_shallow_units
        return k is not None and (unit == self.links.num_units - k or (self.delta and unit == k))

    def leave(self, unit: int, hidden_states: Tensor) -> None:
        """Keeps the output of a source unit for its target."""
        if self.links.num_units - 1 - unit in self.links.sources:
            self.skips[unit] = hidden_states

    def skip(self, unit: int) -> Tensor | None:
        """The skip that `unit` takes, `None` where it has none."""
        source = self.links.sources.get(unit)
        if source is None:
            return None
        if source not in self.skips:
            raise ValueError(f"unit {unit} takes the skip of unit {source}, but unit {source + 1} was left out")
        return self.skips[source]


@dataclass
class LongSkipOutput(BaseOutput):
    """sample (`Tensor`): the prediction. deep_features (`Tensor` of shape `(batch, tokens, dim)`, *optional*): the
    hidden states that entered unit L-k, where k was given."""

    sample: Tensor
    deep_features: Tensor | None = None


class LongSkipModel:
    """Its forward takes `num_shallow_units`, `deep_features` and `delta` as in `LongSkipFlow`, and returns a
    `LongSkipOutput`. The first block of each unit has `long_skip`, a `LongSkip` where the unit takes a skip.

    timestep_scale: what one unit of the `timestep` argument is on the scale from 0 to 1000.
    """

    long_skip_links: LongSkipLinks
    timestep_scale: float = 1.0

    def units(self) -> list[tuple[nn.Module, ...]]:
        """The blocks of each unit in the order they run; the first fuses the unit's skip."""
        raise NotImplementedError

    def unit_entries(self) -> list[nn.Module]:
        return [blocks[0] for blocks in self.units()]

    def set_long_skips(self, hidden_size: int, config: LongSkipConfig | None) -> None:
        """Gives the target units fresh `LongSkip`s and takes them from all others; `None` leaves none."""
        entries = self.unit_entries()
        self.long_skip_links = LongSkipLinks(len(entries), pair_units(len(entries), config))
        for unit, block in enumerate(entries):
            is_target = unit in self.long_skip_links.sources
            cast(Any, block).long_skip = LongSkip(hidden_size, cast(LongSkipConfig, config)) if is_target else None
