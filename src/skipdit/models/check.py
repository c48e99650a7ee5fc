"""Checks that a declared family fits its class by running plain, storing and reusing steps."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from skipdit.interfaces import Fields
from skipdit.models.branches import close_branches, open_branches
from skipdit.models.families import Family, get_family
from skipdit.models.forward_plan import Branches, ForwardPlan, Region, Units
from skipdit.models.long_skip import BranchKind, LongSkipModel
from skipdit.models.surgery import close_units, open_units

TOLERANCE = 1e-3  # error of a reuse step on the same inputs, relative to the largest output


@dataclass(frozen=True, kw_only=True)
class FamilyCheck:
    """Result of `check_family` for a model that fits."""

    num_units: int
    """Number of units in all segments."""
    branches: tuple[str, ...]
    """Kinds of branches whose outputs can be reused."""
    writes_in_place: bool
    """True if blocks write to their input or to a buffer in place, so that stored values must be copies."""

    def __str__(self) -> str:
        kinds = ", ".join(self.branches) or "none"
        return f"{self.num_units} units; branches: {kinds}" + ("; writes in place" if self.writes_in_place else "")


def check_family(model: nn.Module, example_inputs: Fields) -> FamilyCheck:
    """Check that a transformer's family fits, by running plain, storing and reusing steps.

    example_inputs: the arguments that a pipeline passes to the model's forward, by name. The model is unchanged
    afterwards. Raises `ValueError` with one line on what does not fit.
    """
    name, family = type(model).__name__, get_family(type(model))
    if LongSkipModel.find(model) is not None:
        raise ValueError(f"this {name} is already open: pass a plain model, before add_long_skips and enable_cache")
    _check_arguments(name, family, example_inputs)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _check(model, name, dict(example_inputs))
    finally:
        model.train(was_training)


def _check_arguments(name: str, family: Family, inputs: Fields) -> None:
    for role in ("latents", "timestep"):
        if (argument := getattr(family, role)) not in inputs:
            raise ValueError(f"the family's {role} is {argument!r}, but the inputs of {name} are {', '.join(inputs)}")
    level = float(torch.as_tensor(inputs[family.timestep]).float().max())
    scaled = level * family.timestep_scale + (1000 if family.timestep_scale < 0 else 0)
    if not 1.5 < scaled <= 1001:
        raise ValueError(
            f"a {family.timestep} of {level:g} with timestep_scale {family.timestep_scale:g} is timestep {scaled:g} of "
            "1000: the scale is wrong, or the example is not from the middle of a run"
        )


def _check(model: nn.Module, name: str, inputs: Fields) -> FamilyCheck:
    expected = first_tensor(model(**inputs))
    try:
        open_model = open_units(model)
    except AttributeError as error:
        raise ValueError(f"{name} lacks the block lists of its family: {error}") from error
    try:
        num_units = open_model.long_skip_links.num_units
        with _counted(open_model) as counts:
            open_output = first_tensor(model(**inputs))
        if not torch.equal(open_output, expected):
            raise ValueError(f"opening its units changes the output of {name}: it is not a chain of these blocks")
        if irregular_units := [unit for unit, count in enumerate(counts) if count != 1]:
            unit = irregular_units[0]
            raise ValueError(f"unit {unit} of {name} runs {counts[unit]} times per forward, not once")
        if num_units < 3:
            raise ValueError(f"{name} has {num_units} units, but at least 3 are needed to leave one out")
        for stop, delta in ((num_units - 1, False), (num_units - 1, True), (num_units, True)):
            region = Units(start=1, stop=stop, delta=delta)
            _check_reuse(open_model, name, inputs, expected, region, "streams, their order or joins do not fit")
        model_kinds = {branch.kind for branch in open_model.branches()}
        kinds: tuple[BranchKind, ...] = tuple(kind for kind in get_args(BranchKind) if kind in model_kinds)
        open_branches(open_model)
        for kind in kinds:
            region = Branches(kinds=(kind,), units=tuple(range(num_units)))
            _check_reuse(open_model, name, inputs, expected, region, f"branches of kind {kind} do not fit")
        writes = open_model.open_call.writes if open_model.open_call else None
        return FamilyCheck(
            num_units=num_units,
            branches=kinds,
            writes_in_place=writes is not None and (writes.always or True in writes.known.values()),
        )
    finally:
        close_branches(open_model)
        close_units(model)


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a model's output, which is the prediction."""
    match output:
        case Tensor():
            return output
    return first_tensor(output[0])


def _check_reuse(model: LongSkipModel, name: str, inputs: Fields, expected: Tensor, region: Region, fault: str) -> None:
    """Raise `ValueError` if a step that reuses values stored for the same inputs has a different output."""
    links = model.long_skip_links
    try:
        output, stored = model(**inputs, plan=ForwardPlan.of(links, store=(region,)))
        reuse_output, _ = model(**inputs, plan=ForwardPlan.of(links, reuse=(region,)), stored=stored)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{name}: {fault}: {str(error).splitlines()[0]}") from error
    if not torch.equal(first_tensor(output), expected):
        raise ValueError(f"{name}: {fault}: a step that stores changes the output")
    distance = float((first_tensor(reuse_output) - expected).abs().max())
    if not distance <= TOLERANCE * float(expected.abs().max()):
        raise ValueError(f"{name}: {fault}: a step that reuses {region} on the same inputs is off by {distance:.2g}")


@contextmanager
def _counted(model: LongSkipModel) -> Iterator[list[int]]:
    """Count how often the first block of each unit runs inside the `with` block."""
    counts = [0] * len(model.unit_entries())

    def count(unit: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counts[unit] += 1

        return hook

    with ExitStack() as hooks:
        for unit, block in enumerate(model.unit_entries()):
            hooks.enter_context(block.register_forward_hook(count(unit)))
        yield counts
