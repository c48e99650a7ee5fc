"""WHAT is reused: a site selects the region of the units' work that full steps store and reuse steps leave out."""

from dataclasses import dataclass

from torch import Tensor, nn

from skipdit.cache.compiled import Call
from skipdit.cache.spectrum import wiener_filter
from skipdit.cache.whole import WholeModel, tensors_in
from skipdit.models.forward_plan import Branches, Region, Stored, Units
from skipdit.models.long_skip import BranchKind, LongSkipLinks, LongSkipModel


class Site:
    """A choice of regions. Abstract."""

    needs_units = True
    """False if it is a site of any model, of known units or not."""
    kinds: tuple[BranchKind, ...] = ()
    """Kinds of the branches whose outputs it takes; empty if it takes those of whole units."""
    beside_first = False
    """True if it takes one guidance branch beside the one that is called first at the same step."""

    fitted_order = 1
    """Order of the predictions that a calibration fits."""

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
        linked = LongSkipModel.find(model)
        if linked is None:
            raise ValueError(
                f"{type(model).__name__} has no long skips that skipdit knows of, so a skip cache could have no "
                "effect: declare its units with skipdit.declare_family, or add long skips with skipdit.add_long_skips"
            )
        links = linked.long_skip_links
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
        num_units = linked_model(model).long_skip_links.num_units
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
        site = DeepFeatures if linked_model(model).long_skip_links.sources else UnitRange
        return site(self.num_shallow_units).regions(model)

    @property
    def shallow_units(self) -> tuple[int, ...]:
        return (self.num_shallow_units,)


@dataclass(frozen=True)
class AllButFirst(Site):
    """The sum that all units after the first ones add (First-Block-Cache; TeaCache, arXiv 2411.19108): the first ones
    run at every step, and adaptive schedules probe them."""

    num_first: int = 1

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        num_units = linked_model(model).long_skip_links.num_units
        if num_units < 2:
            raise ValueError(f"the model must have at least 2 units, got {num_units}")
        if not 1 <= self.num_first < num_units:
            raise ValueError(
                f"the number of first units that run must be between 1 and {num_units - 1} for {num_units} units, "
                f"got {self.num_first}"
            )
        return (Units(start=self.num_first, stop=num_units, delta=True),)


@dataclass(frozen=True)
class AllUnits(Site):
    """The sum that all units add (MagCache, arXiv 2506.09045): a reuse step runs none of them."""

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        return (Units(start=0, stop=linked_model(model).long_skip_links.num_units, delta=True),)


@dataclass(frozen=True)
class WholeOutput(Site):
    """The output of the whole model minus its input (EasyCache, arXiv 2507.02860): a reuse step does not call the
    model, whose units need not be known."""

    needs_units = False
    fitted_order = 2

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        return (WholeModel(),)


@dataclass(frozen=True)
class GuidanceDifference(Site):
    """The output of a guidance branch minus that of the branch that is called first at the same step (FasterCache,
    arXiv 2410.19355). The first one always runs; units need not be known."""

    needs_units = False
    beside_first = True

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        return (WholeModel(beside_first=True),)


@dataclass(frozen=True)
class BranchOutputs(Site):
    """Outputs of attention and MLP branches, before their gates (FORA, arXiv 2407.01425)."""

    kinds: tuple[BranchKind, ...]
    num_shallow_units: int | None = None
    """Number of first units, and of last units, whose branches are reused; `None` for all units."""
    optional: bool = False
    """Allow models that have no such branch."""

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        linked = linked_model(model)
        num_units = linked.long_skip_links.num_units
        units = range(num_units)
        if self.num_shallow_units is not None:
            units = [unit for unit in units if min(unit, num_units - 1 - unit) < self.num_shallow_units]
        present = {info.kind for info in linked.branches() if info.unit in units}
        kinds: tuple[BranchKind, ...] = tuple(kind for kind in self.kinds if kind in present)
        if not kinds and self.optional:
            return ()
        if not kinds:
            raise ValueError(
                f"{type(model).__name__} has no {' or '.join(self.kinds)} that skipdit knows of, only "
                f"{', '.join(sorted(present)) or 'no branches'}: nothing could be reused"
            )
        return (Branches(kinds=kinds, units=tuple(units)),)


class Probe:
    """The values that an adaptive schedule compares. Abstract."""

    is_in_units = False
    """True if it takes values of the first units."""

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        """Return the regions whose values it compares, of a probe that is taken while the first units run."""
        return ()

    def values(self, call: Call) -> Stored:
        """Return the values that it compares, of a probe that is taken before the model runs."""
        return {}


@dataclass(frozen=True)
class UnitProbe(Probe):
    """Values of the first units: the sum that they add to the hidden states."""

    is_in_units = True

    inputs: bool = False
    """Compare the input of the first attention instead, after the modulation by the timestep."""
    num_units: int = 1
    """Number of these units."""
    after: bool = False
    """Compare the hidden states after them instead."""

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        if not self.inputs:
            return (Units(start=0, stop=self.num_units, delta=not self.after, skips=False),)
        if not any(info.unit == 0 and info.kind == "attention" for info in linked_model(model).branches()):
            raise ValueError(
                f"{type(model).__name__} has no attention in its first unit that skipdit knows of, which this cache "
                "probes: name it in the branches of skipdit.declare_family"
            )
        return (Branches(kinds=("attention",), units=(0,), inputs=True),)


@dataclass(frozen=True)
class LatentsProbe(Probe):
    """The noisy latents that the model is called with."""

    filtered: bool = False
    """Keep of them what is signal, by a Wiener filter over space and time; of packed tokens (Flux), over their
    sequence (SeaCache, arXiv 2602.18993)."""

    def values(self, call: Call) -> Stored:
        latents = [tensor.detach() for tensor in tensors_in(call.latents)]
        if self.filtered:
            is_list, noise = type(call.latents) in (list, tuple), call.noise()
            in_channels = getattr(getattr(call.model, "config", None), "in_channels", None)
            latents = [_filtered(tensor, noise, in_channels, is_sample=is_list) for tensor in latents]
        else:
            latents = [tensor.clone() for tensor in latents]
        return {"latents": {str(index): tensor for index, tensor in enumerate(latents)}}


def _filtered(latents: Tensor, noise: float, in_channels: int | None, *, is_sample: bool) -> Tensor:
    """Return latents filtered along all dimensions but batch and channels, which come first or, of tokens, last. A
    sample has no batch."""
    first = 0 if is_sample else 1
    fitting = [dim for dim in range(first, latents.ndim) if latents.shape[dim] == in_channels]
    usual = latents.ndim - 1 if latents.ndim == first + 2 else first
    channels = fitting[0] if len(fitting) == 1 else usual
    dims = [dim for dim in range(first, latents.ndim) if dim != channels]
    if not dims:
        raise ValueError(f"a filter over space needs latents with places, got the shape {tuple(latents.shape)}")
    # as in the authors' code, the exponent of the power spectra of pictures and of clips
    return wiener_filter(latents, dims, noise, 3.0 if len(dims) == 3 else 2.0)


def linked_model(model: nn.Module) -> LongSkipModel:
    """Return a model whose units skipdit knows; raises `ValueError` for any other."""
    linked = LongSkipModel.find(model)
    if linked is None:
        raise ValueError(
            f"{type(model).__name__} has no units that skipdit knows of, so nothing could be reused: "
            "declare them with skipdit.declare_family"
        )
    return linked


def links_of(model: nn.Module) -> LongSkipLinks:
    """Return the long skips of a model; those of no units if its units are not known."""
    linked = LongSkipModel.find(model)
    return LongSkipLinks(0, {}) if linked is None else linked.long_skip_links
