"""Regions: parts of the units' work that one call stores and a later call reuses instead of running them."""

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
    """True if the region is the whole model, which is then not called at all."""
    skips = False
    """True if the region includes the skips from its units to units that still run."""
    is_in_branches = False
    """True if the region consists of inputs or outputs of branches."""

    @property
    def name(self) -> str:
        """Return a name that identifies the region among all regions of a model."""
        raise NotImplementedError

    @property
    def bounds(self) -> tuple[int, int] | None:
        """Return the first unit that is left out and the first that runs again; `None` if all units run."""
        return None

    @property
    def covered(self) -> tuple[int, ...]:
        """Return the units that must run to store the region."""
        raise NotImplementedError

    def leaves_out(self, unit: int) -> bool:
        return self.bounds is not None and unit in range(*self.bounds)

    def has_branch(self, kind: str, unit: int, *, inputs: bool = False) -> bool:
        """Return true if the output of this branch (or with `inputs` its input) is part of the region."""
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
    """Also store the skips from these units to units that still run; a probe, which is not reused, needs none."""

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
        return f"{'sum added by' if self.delta else 'output of'} units {self.start} to {self.stop - 1}"


@dataclass(frozen=True, kw_only=True)
class Branches(Region):
    """The outputs of all branches of these kinds in these units."""

    is_in_branches = True
    kinds: tuple[BranchKind, ...]
    units: tuple[int, ...]
    inputs: bool = False
    """Inputs instead of outputs: a probe, which can be stored but not reused."""

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(get_args(BranchKind)):
            raise ValueError(f"kinds must be some of {', '.join(get_args(BranchKind))}, got {self.kinds}")

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
