"""WHAT is reused: a site says which region of the units' work full steps store and reuse steps leave out."""

from dataclasses import dataclass
from typing import cast

from torch import nn

from skipdit.models.forward_plan import Branches, Region, Units
from skipdit.models.long_skip import BranchKind, LongSkipModel


class Site:
    """A choice of regions. Abstract."""

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        """Return what this model can reuse here: one region per variant of a reuse step, among which a schedule chooses
        by index. A full step stores all of them. `ValueError` where there is nothing, unless the site is optional."""
        raise NotImplementedError

    @property
    def shallow_units(self) -> tuple[int, ...]:
        """The numbers that a spec gives as -k."""
        return ()


@dataclass(frozen=True)
class DeepFeatures(Site):
    """The hidden states that enter the last units, behind the long skips (arXiv 2411.17616): at a reuse step the first
    and last `num_shallow_units` units run. others: more such numbers, among which a schedule may choose."""

    num_shallow_units: int = 1
    others: tuple[int, ...] = ()

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        if not isinstance(model, LongSkipModel):
            raise ValueError(
                f"{type(model).__name__} has no long skips that skipdit knows of, so a skip cache could have no "
                "effect: skipdit.declare_family tells where its units are, skipdit.add_long_skips gives it long skips"
            )
        links = model.long_skip_links
        for k in self.shallow_units:
            links.check_num_shallow_units(k)
        return tuple(Units(start=k, stop=links.num_units - k) for k in self.shallow_units)

    @property
    def shallow_units(self) -> tuple[int, ...]:
        return (self.num_shallow_units, *self.others)


@dataclass(frozen=True)
class UnitRange(Site):
    """Units between the first and last few, which still run: with `delta`, what they add to the hidden states (the
    offset of Delta-DiT, arXiv 2406.01125), otherwise what leaves them. Needs no long skips; a long skip into a unit
    that runs comes from the store where its source does not run.

    Twice `num_shallow_units` units run, half of them first and half last, or all `at` one end; `None` means half of all
    units (Faster Diffusion, arXiv 2312.09608).
    """

    num_shallow_units: int | None = 1
    at: str = "both"
    delta: bool = True

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        num_units = known_units(model)
        if self.num_shallow_units is None:
            num_first, num_last = (num_units // 2, 0) if self.at == "first" else (0, num_units - num_units // 2)
        else:
            allowed = (num_units - 1) // 2
            if not 1 <= self.num_shallow_units <= allowed:
                raise ValueError(
                    f"num_shallow_units must be between 1 and {allowed} for {num_units} units, "
                    f"got {self.num_shallow_units}"
                )
            k = self.num_shallow_units
            num_first, num_last = {"both": (k, k), "first": (2 * k, 0), "last": (0, 2 * k)}[self.at]
        return (Units(start=num_first, stop=num_units - num_last, delta=self.delta),)

    @property
    def shallow_units(self) -> tuple[int, ...]:
        return () if self.num_shallow_units is None else (self.num_shallow_units,)


@dataclass(frozen=True)
class Inner(Site):
    """`DeepFeatures` where the model has long skips, otherwise what the units in the middle add."""

    num_shallow_units: int = 1

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        known_units(model)
        linked = bool(cast(LongSkipModel, model).long_skip_links.sources)
        return (DeepFeatures if linked else UnitRange)(self.num_shallow_units).regions(model)

    @property
    def shallow_units(self) -> tuple[int, ...]:
        return (self.num_shallow_units,)


@dataclass(frozen=True)
class Stack(Site):
    """What all units after the first add (First-Block-Cache; TeaCache, arXiv 2411.19108): the first runs at every step,
    and adaptive schedules look at it."""

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        num_units = known_units(model)
        if num_units < 2:
            raise ValueError(f"there must be a unit after the first, got {num_units}")
        return (Units(start=1, stop=num_units, delta=True),)


@dataclass(frozen=True)
class BranchOutputs(Site):
    """Outputs of attention and MLP branches, before their gates, in all units (FORA, arXiv 2407.01425) or in the first
    and last `num_shallow_units`. optional: a model may have none of them."""

    kinds: tuple[BranchKind, ...]
    num_shallow_units: int | None = None
    optional: bool = False

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        num_units = known_units(model)
        units = range(num_units)
        if self.num_shallow_units is not None:
            units = [unit for unit in units if min(unit, num_units - 1 - unit) < self.num_shallow_units]
        found = {place.kind for place in cast(LongSkipModel, model).branches() if place.unit in units}
        kinds: tuple[BranchKind, ...] = tuple(kind for kind in self.kinds if kind in found)
        if not kinds and self.optional:
            return ()
        if not kinds:
            raise ValueError(
                f"{type(model).__name__} has no {' or '.join(self.kinds)} that skipdit knows of, only "
                f"{', '.join(sorted(found)) or 'no branches'}: nothing could be reused"
            )
        return (Branches(kinds=kinds, units=tuple(units)),)


@dataclass(frozen=True)
class Probe:
    """What an adaptive schedule looks at: what the first unit adds, or with `inputs` what enters its attention (after
    the modulation by the timestep)."""

    inputs: bool = False

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        if not self.inputs:
            return (Units(start=0, stop=1, delta=True, skips=False),)
        if not any(place.unit == 0 and place.kind == "attention" for place in cast(LongSkipModel, model).branches()):
            raise ValueError(
                f"{type(model).__name__} has no attention in its first unit that skipdit knows of, which is what this "
                "cache looks at: name it in the branches of skipdit.declare_family"
            )
        return (Branches(kinds=("attention",), units=(0,), inputs=True),)


def known_units(model: nn.Module) -> int:
    """Return the number of units of a model; `ValueError` where skipdit does not know them."""
    if not isinstance(model, LongSkipModel):
        raise ValueError(
            f"{type(model).__name__} has no units that skipdit knows of, so nothing could be reused: "
            "skipdit.declare_family tells where its units are"
        )
    return model.long_skip_links.num_units
