"""WHAT is reused: a site selects the region of the units' work that full steps store and reuse steps leave out."""

from dataclasses import dataclass
from typing import cast

from torch import nn

from skipdit.models.forward_plan import Branches, Region, Units
from skipdit.models.long_skip import BranchKind, LongSkipModel


class Site:
    """A choice of regions. Abstract."""

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        """Return the regions of this model that can be reused: one per variant of a reuse step; a schedule selects by
        index. A full step stores all of them. Raises `ValueError` if there are none, unless the site is optional."""
        raise NotImplementedError

    @property
    def shallow_units(self) -> tuple[int, ...]:
        """The numbers that a spec writes as -k."""
        return ()


@dataclass(frozen=True)
class DeepFeatures(Site):
    """The hidden states that enter the last units, which the long skips feed (arXiv 2411.17616)."""

    num_shallow_units: int = 1
    """Number of first units, and of last units, that run at a reuse step."""
    others: tuple[int, ...] = ()
    """Further such numbers, one per variant that a schedule may select."""

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        if not isinstance(model, LongSkipModel):
            raise ValueError(
                f"{type(model).__name__} has no long skips that skipdit knows of, so a skip cache could have no "
                "effect: declare its units with skipdit.declare_family, or add long skips with skipdit.add_long_skips"
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
    """A range of units. Needs no long skips; the skip of a unit that is left out comes from the store."""

    num_shallow_units: int | None = 1
    """Half the number of units that run at a reuse step; `None` for half of all units (Faster Diffusion, arXiv
    2312.09608)."""
    at: str = "both"
    """The units that run: the first ones and the last ones (`both`), or all `first` or all `last`."""
    delta: bool = True
    """Reuse the sum that the units add to the hidden states (the offset of Delta-DiT, arXiv 2406.01125), rather than
    the hidden states after them."""

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
class MiddleUnits(Site):
    """`DeepFeatures` if the model has long skips, otherwise the `UnitRange` in the middle."""

    num_shallow_units: int = 1

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        known_units(model)
        linked = bool(cast(LongSkipModel, model).long_skip_links.sources)
        return (DeepFeatures if linked else UnitRange)(self.num_shallow_units).regions(model)

    @property
    def shallow_units(self) -> tuple[int, ...]:
        return (self.num_shallow_units,)


@dataclass(frozen=True)
class AllButFirst(Site):
    """The sum that all units after the first add (First-Block-Cache; TeaCache, arXiv 2411.19108): the first runs at
    every step, and adaptive schedules probe it."""

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        num_units = known_units(model)
        if num_units < 2:
            raise ValueError(f"the model must have at least 2 units, got {num_units}")
        return (Units(start=1, stop=num_units, delta=True),)


@dataclass(frozen=True)
class BranchOutputs(Site):
    """Outputs of attention and MLP branches, before their gates (FORA, arXiv 2407.01425)."""

    kinds: tuple[BranchKind, ...]
    num_shallow_units: int | None = None
    """Number of first units, and of last units, whose branches are reused; `None` for all units."""
    optional: bool = False
    """Allow models that have no such branch."""

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        num_units = known_units(model)
        units = range(num_units)
        if self.num_shallow_units is not None:
            units = [unit for unit in units if min(unit, num_units - 1 - unit) < self.num_shallow_units]
        found = {info.kind for info in cast(LongSkipModel, model).branches() if info.unit in units}
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
    """The values that an adaptive schedule compares: the sum that the first unit adds to the hidden states."""

    inputs: bool = False
    """Compare the input of its attention instead, after the modulation by the timestep."""

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        if not self.inputs:
            return (Units(start=0, stop=1, delta=True, skips=False),)
        if not any(info.unit == 0 and info.kind == "attention" for info in cast(LongSkipModel, model).branches()):
            raise ValueError(
                f"{type(model).__name__} has no attention in its first unit that skipdit knows of, which this cache "
                "probes: name it in the branches of skipdit.declare_family"
            )
        return (Branches(kinds=("attention",), units=(0,), inputs=True),)


def known_units(model: nn.Module) -> int:
    """Return the number of units of a model; raises `ValueError` if skipdit does not know them."""
    if not isinstance(model, LongSkipModel):
        raise ValueError(
            f"{type(model).__name__} has no units that skipdit knows of, so nothing could be reused: "
            "declare them with skipdit.declare_family"
        )
    return model.long_skip_links.num_units
