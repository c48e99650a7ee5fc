"""The pairs of units that long skips link, in plain numbers; nothing heavy is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, Self

from skipdit.interfaces import Fields
from skipdit.options import Fusion, check_fields, check_range

Norm = Literal["layer_norm", "rms_norm"]
Init = Literal["default", "xavier", "zero"]


@dataclass(frozen=True, kw_only=True)
class ConfigEntry:
    """Options that a model keeps in its config, as a dict. Abstract."""

    def to_dict(self) -> Fields:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Fields) -> Self:
        return cls(**fields)

    @classmethod
    def of(cls, value: Self | Fields | None) -> Self | None:
        """Return the options that an argument of a model, or an entry of its config, stands for."""
        return cls.from_dict(value) if isinstance(value, dict) else value


@dataclass(frozen=True, kw_only=True)
class LongSkipConfig(ConfigEntry):
    """Which pairs of units are linked, and how a skip is fused."""

    num_pairs: int | None = None
    """number of pairs to link, outermost first; None links all of them"""
    middle_pair: bool = True
    """also link the two adjacent middle units of an even depth, where the skip is the hidden state itself (the released
    Skip-DiT does this, HunyuanDiT does not); an odd depth has no such pair"""
    norm: Norm = "layer_norm"
    """norm over the 2D concatenated channels, computed in float32"""
    init: Init | None = None
    """initialization of the projection 2D -> D: PyTorch's default (as released), Xavier, or zero; None means default
    for replace and zero for residual"""
    fusion: Fusion = "replace"
    """replace: proj(norm([hidden, skip])) replaces the hidden states (arXiv 2411.17616); residual: it is added to them,
    so that with a zero projection a converted model starts with unchanged outputs"""
    fill_token: bool = False
    """learn one vector that, before the last units, replaces each token that the deep units did not see in training;
    the token's skip stays (SPRINT, arXiv 2510.21986)"""

    def __post_init__(self) -> None:
        check_range(self, "num_pairs", least=0)
        check_fields(self)

    @property
    def resolved_init(self) -> Init:
        return self.init or ("default" if self.fusion == "replace" else "zero")


def pair_units(num_units: int, config: LongSkipConfig | None) -> dict[int, int]:
    """Return the source unit of every linked target unit: `{L-1-i: i}`, outermost pair first.

    Raises `ValueError` if `num_pairs` is too large for the depth.
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
    """Return the pairs of `pair_units` within each of several consecutive segments of these sizes. A segment that is
    too short for `num_pairs` gets as many as it can have."""
    if config is None:
        return {}
    pair_units(max(sizes), config)  # raises if even the largest segment is too short
    sources, start = {}, 0
    for size in sizes:
        limit = _num_available(size, config)
        segment_config = replace(config, num_pairs=limit if config.num_pairs is None else min(config.num_pairs, limit))
        sources |= {target + start: source + start for target, source in pair_units(size, segment_config).items()}
        start += size
    return sources


@dataclass(frozen=True)
class LongSkipLinks:
    """The links of one model."""

    num_units: int
    """L."""
    sources: Mapping[int, int]
    """The source of each linked target unit."""
    segment_starts: tuple[int, ...] = ()
    """The first unit of every segment but the first."""
    targets: Mapping[int, int] = field(init=False, repr=False)
    """The target of each source unit."""
    ordered_sources: tuple[int, ...] = field(init=False, repr=False)
    """All source units in ascending order."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ordered_sources", tuple(sorted(self.sources.values())))
        object.__setattr__(self, "targets", {source: target for target, source in self.sources.items()})

    @property
    def max_num_shallow_units(self) -> int:
        """Return the largest k for which a reuse step leaves out a unit and every deep unit that runs has its skip."""
        return min(len(self.sources), (self.num_units - 1) // 2)

    def check_num_shallow_units(self, num_shallow_units: int) -> None:
        """Raise `ValueError`, with the allowed range, if there is no reuse step with this k."""
        if not self.sources:
            raise ValueError(
                "this model has no long skips, so there are no deep features to reuse: "
                "build it with long_skip=LongSkipConfig(), call skipdit.add_long_skips(model), or reuse the sum added "
                "by the middle units with a delta: cache"
            )
        if not 1 <= num_shallow_units <= self.max_num_shallow_units:
            raise ValueError(
                f"num_shallow_units must be between 1 and {self.max_num_shallow_units} for {self.num_units} units with "
                f"{len(self.sources)} linked pairs, got {num_shallow_units}"
            )
