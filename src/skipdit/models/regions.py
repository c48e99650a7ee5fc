"""Regions: the parts of the units' work that a call stores, and that a later call takes instead of running them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from skipdit.models.long_skip import BranchKind

Values = Mapping[str, Tensor]  # of one region, by names that the region chooses
Stored = Mapping[str, Values]  # by the name of the region


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the units' work that a call stores or reuses: `Units` or `Branches`. Abstract."""

    is_whole = False
    """True if it is the work of the whole model, which then is not called at all."""

    @property
    def name(self) -> str:
        """A name that identifies it among all regions of a model."""
        raise NotImplementedError

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The first unit that is left out and the first after those; `None` if all units run."""
        return None

    @property
    def covered(self) -> tuple[int, ...]:
        """The units that must run to store it."""
        raise NotImplementedError

    def leaves_out(self, unit: int) -> bool:
        return self.bounds is not None and unit in range(*self.bounds)

    def has_branch(self, kind: str, unit: int, *, inputs: bool = False) -> bool:
        """Return true if the output of this branch, or its input, is part of it."""
        return False


@dataclass(frozen=True, kw_only=True)
class Units(Region):
    """The streams after unit `stop - 1`, each (batch, tokens, dim)."""

    start: int
    """The first unit that is left out."""
    stop: int
    """The first unit that runs again."""
    delta: bool = False
    """Store the difference from the input of unit `start` instead."""
    skips: bool = True
    """Store the skips from these units to others that still run; a probe, which is not reused, needs none."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"there must be at least one unit in the range, got {self.start} to {self.stop}")

    @property
    def name(self) -> str:
        return f"{self.start}:{self.stop}" + (" added" if self.delta else "") + ("" if self.skips else " probe")

    @property
    def bounds(self) -> tuple[int, int]:
        return self.start, self.stop

    @property
    def covered(self) -> tuple[int, ...]:
        return tuple(range(self.start, self.stop))

    def __str__(self) -> str:
        return f"what units {self.start} to {self.stop - 1} {'add' if self.delta else 'output'}"


@dataclass(frozen=True, kw_only=True)
class Branches(Region):
    """Outputs of the branches of some kinds in some units."""

    kinds: tuple[BranchKind, ...]
    units: tuple[int, ...]
    inputs: bool = False
    """Inputs instead of outputs: a probe, which can be stored but not reused."""

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(get_args(BranchKind)):
            raise ValueError(f"kinds must be among {', '.join(get_args(BranchKind))}, got {self.kinds}")

    @property
    def name(self) -> str:
        return f"{'inputs of ' if self.inputs else ''}{'+'.join(self.kinds)} {','.join(map(str, self.units))}"

    @property
    def covered(self) -> tuple[int, ...]:
        return self.units

    def __str__(self) -> str:
        return f"{' and '.join(self.kinds)} in {len(self.units)} units"

    def has_branch(self, kind: str, unit: int, *, inputs: bool = False) -> bool:
        return inputs == self.inputs and kind in self.kinds and unit in self.units
