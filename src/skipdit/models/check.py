"""Tells whether a declared family fits its class: by plain steps, stored ones and ones that reuse."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from skipdit.models.branches import close_branches, open_branches
from skipdit.models.families import Family, get_family
from skipdit.models.forward_plan import Branches, ForwardPlan, Region, Units
from skipdit.models.long_skip import BranchKind, LongSkipModel
from skipdit.models.surgery import close_units, open_units

TOLERANCE = 1e-3  # of a reuse step on the same inputs, over the largest output


@dataclass(frozen=True, kw_only=True)
class FamilyCheck:
    """What `check_family` has found of a model that fits."""

    num_units: int
    """Units in all segments."""
    branches: tuple[str, ...]
    """Kinds of branches whose outputs can be reused."""
    writes_in_place: bool
    """Whether blocks write their input or a buffer in place, so that what is stored must be a copy."""

    def __str__(self) -> str:
        kinds = ", ".join(self.branches) or "none"
        return f"{self.num_units} units; branches: {kinds}" + ("; writes in place" if self.writes_in_place else "")


def check_family(model: nn.Module, example_inputs: Mapping[str, Any]) -> FamilyCheck:
    """Run plain, stored and reused steps of a transformer on these arguments, and say whether its family fits.

    example_inputs: what a pipeline passes to the model's forward, by name. The model is afterwards what it was.
    `ValueError` says in one line what does not fit.
    """
    name, family = type(model).__name__, get_family(type(model))
    if isinstance(model, LongSkipModel):
        raise ValueError(f"this {name} is open already: give a plain model, before add_long_skips and enable_cache")
    _check_arguments(name, family, example_inputs)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _check(model, name, dict(example_inputs))
    finally:
        model.train(was_training)


def _check_arguments(name: str, family: Family, given: Mapping[str, Any]) -> None:
    for role in ("latents", "timestep"):
        if (argument := getattr(family, role)) not in given:
            raise ValueError(f"{role} of the family is {argument!r}, which is none of {', '.join(given)} for {name}")
    level = float(torch.as_tensor(given[family.timestep]).float().max())
    scaled = level * family.timestep_scale + (1000 if family.timestep_scale < 0 else 0)
    if not 1.5 < scaled <= 1001:
        raise ValueError(
            f"a {family.timestep} of {level:g} at timestep_scale {family.timestep_scale:g} is {scaled:g} of 1000: "
            "the scale does not fit (or give an example from the middle of a run)"
        )


def _check(model: nn.Module, name: str, given: dict[str, Any]) -> FamilyCheck:
    expected = first_tensor(model(**given))
    try:
        open_units(model)
    except AttributeError as error:
        raise ValueError(f"lists of the family are none of {name}: {error}") from error
    linked = cast(LongSkipModel, model)
    try:
        num_units = linked.long_skip_links.num_units
        with _counted(linked) as counts:
            opened = first_tensor(model(**given))
        if not torch.equal(opened, expected):
            raise ValueError(f"{name} gives another output with its units open: it is not a chain of these blocks")
        if odd := [unit for unit, count in enumerate(counts) if count != 1]:
            raise ValueError(f"unit {odd[0]} of {name} runs {counts[odd[0]]} times per forward, not once")
        if num_units < 3:
            raise ValueError(f"{name} has {num_units} units: at least 3 are needed to leave one out")
        for stop, delta in ((num_units - 1, False), (num_units - 1, True), (num_units, True)):
            region = Units(start=1, stop=stop, delta=delta)
            _check_reuse(model, name, given, expected, region, "streams, their order or joins do not fit")
        found = {place.kind for place in linked.branches()}
        kinds: tuple[BranchKind, ...] = tuple(kind for kind in get_args(BranchKind) if kind in found)
        open_branches(linked)
        for kind in kinds:
            region = Branches(kinds=(kind,), units=tuple(range(num_units)))
            _check_reuse(model, name, given, expected, region, f"branches of kind {kind} do not fit")
        writes = linked.open_call.writes if linked.open_call else None
        return FamilyCheck(
            num_units=num_units,
            branches=kinds,
            writes_in_place=writes is not None and (writes.always or True in writes.known.values()),
        )
    finally:
        close_branches(linked)
        close_units(model)


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a model's output, the prediction."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _check_reuse(
    model: nn.Module, name: str, given: dict[str, Any], expected: Tensor, region: Region, what: str
) -> None:
    """Raise `ValueError` where a step that reuses what the same inputs have stored gives another output."""
    links = cast(LongSkipModel, model).long_skip_links
    try:
        output, stored = model(**given, plan=ForwardPlan.of(links, store=(region,)))
        reused, _ = model(**given, plan=ForwardPlan.of(links, reuse=(region,)), stored=stored)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{name}: {what}: {str(error).splitlines()[0]}") from error
    if not torch.equal(first_tensor(output), expected):
        raise ValueError(f"{name}: {what}: a step that stores gives another output")
    distance = float((first_tensor(reused) - expected).abs().max())
    if not distance <= TOLERANCE * float(expected.abs().max()):
        raise ValueError(f"{name}: {what}: a step that reuses {region} on the same inputs is off by {distance:.2g}")


@contextmanager
def _counted(model: LongSkipModel) -> Iterator[list[int]]:
    """Count how often the first block of each unit runs."""
    counts = [0] * len(model.unit_entries())

    def count(unit: int) -> Any:
        def hook(*_: Any) -> None:
            counts[unit] += 1

        return hook

    hooks = [block.register_forward_hook(count(unit)) for unit, block in enumerate(model.unit_entries())]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
