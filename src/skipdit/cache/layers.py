"""Chooses the branches to reuse at each step, by the effect of each branch on the model's output.

After Learning-to-Cache (arXiv 2406.01733), which learns the choice by gradients, for alternating full and reuse steps.
Here a full run tries each branch alone, at each step that may reuse.

    errors = measure_layers(pipe, lambda: pipe("a cat", num_inference_steps=50))
    skipdit.enable_cache(pipe, errors.method(threshold=0.01))
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from skipdit.cache import changes
from skipdit.cache.compiled import Call
from skipdit.cache.enable import recorded
from skipdit.cache.methods import EVERY, CacheMethod
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.cache.site import BranchOutputs, Site, linked_model
from skipdit.cache.steppers import CacheRule, MeasuringStepper, StepState
from skipdit.cache.whole import tensors_in
from skipdit.interfaces import ModelOutput
from skipdit.models.forward_plan import Branches, ForwardPlan, Region, Stored
from skipdit.models.long_skip import BranchKind, LongSkipModel

Branch = tuple[BranchKind, int]  # its kind and its unit


@dataclass(frozen=True, kw_only=True)
class ChosenBranches(Branches):
    """Outputs of branches that are listed one by one. All such regions of a model share one store, which has the
    branches of every one of them."""

    chosen: frozenset[Branch]

    @property
    def name(self) -> str:
        return "chosen branches"

    def has_branch(self, kind: str, unit: int, *, inputs: bool = False) -> bool:
        return not inputs and (kind, unit) in self.chosen

    def __str__(self) -> str:
        return f"{len(self.chosen)} branches"

    @classmethod
    def of(cls, chosen: frozenset[Branch]) -> "ChosenBranches":
        kinds: tuple[BranchKind, ...] = tuple(kind for kind in EVERY if any(kind == other for other, _ in chosen))
        return cls(kinds=kinds, units=tuple(sorted({unit for _, unit in chosen})), chosen=chosen)


@dataclass(frozen=True)
class ChosenLayers(Site):
    """Branches that are listed one by one, once for each variant of a reuse step."""

    variants: tuple[frozenset[Branch], ...]

    def regions(self, model: nn.Module) -> tuple[Region, ...]:
        missing = sorted(frozenset[Branch]().union(*self.variants) - _branches_of(linked_model(model)))
        if missing:
            raise ValueError(f"{type(model).__name__} has no {missing[0][0]} in unit {missing[0][1]} to reuse")
        return tuple(ChosenBranches.of(chosen) for chosen in self.variants)


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """The effect of the reuse of each branch alone on the output of a model."""

    errors: tuple[Mapping[Branch, float], ...]
    """For each step, by branch, the relative L1 change of the output, the largest of all streams; empty for a step
    that is full."""
    timesteps: tuple[float, ...]
    """Noise levels of the steps, falling, from 1000 to 0."""

    def method(self, threshold: float) -> CacheMethod:
        """Return the method that reuses, at each step, the branches with an error below `threshold`. Raises
        `ValueError` if there are none at any step."""
        choices = [frozenset(branch for branch, error in step.items() if error < threshold) for step in self.errors]
        variants = tuple(dict.fromkeys(chosen for chosen in choices if chosen))
        if not variants:
            least = min((error for step in self.errors for error in step.values()), default=float("nan"))
            raise ValueError(f"no branch has an error below {threshold:g}: the least is {least:.3g}")
        schedule = ExplicitSchedule(
            full_steps=tuple(step for step, chosen in enumerate(choices) if not chosen),
            num_inference_steps=len(choices),
            timesteps=self.timesteps,
            variants=tuple(variants.index(chosen) if chosen else None for chosen in choices),
        )
        return CacheMethod(schedule=schedule, site=ChosenLayers(variants))


class BranchTrials(MeasuringStepper):
    """Runs every step in full and, at all but every `interval`-th, tries the reuse of each branch alone."""

    def __init__(self, model: nn.Module, rules: list[CacheRule], interval: int) -> None:
        branches = _branches_of(linked_model(model))
        region = ChosenBranches.of(branches)
        super().__init__(model, rules, (region,))
        self.interval, self.name = interval, region.name
        self.alone: dict[Branch, ForwardPlan] = {
            branch: ForwardPlan.of(self.links, reuse=(ChosenBranches.of(frozenset([branch])),))
            for branch in sorted(branches, key=lambda branch: (branch[1], branch[0]))
        }
        self.held: WeakKeyDictionary[StepState, Stored] = WeakKeyDictionary()
        # by noise level, for each stream the errors of all branches
        self.errors: dict[float, list[Tensor]] = {}

    def measure(self, call: Call, stream: StepState, output: ModelOutput, stored: Stored) -> ModelOutput:
        errors = self.errors.setdefault(stream.levels[-1], [])
        if (len(stream.levels) - 1) % self.interval == 0:
            self.held[stream] = {self.name: stored[self.name]}
            return output
        exact = {"output": _values(output)}
        outputs = (call(plan, self.held[stream]).output for plan in self.alone.values())
        errors.append(torch.stack([changes.relative_change({"output": _values(other)}, exact) for other in outputs]))
        return output


def _branches_of(model: LongSkipModel) -> frozenset[Branch]:
    return frozenset((info.kind, info.unit) for info in model.branches())


def _values(output: ModelOutput) -> dict[str, Tensor]:
    return {str(index): tensor for index, tensor in enumerate(tensors_in(output))}


def measure_layers(
    target: nn.Module | DiffusionPipeline, sample: Callable[[], object], *, interval: int = 2
) -> LayerErrors:
    """Measure the effect of the reuse of each branch alone on the output, in one run in which every `interval`-th step
    is full. Each of the other steps takes as many calls of the model as there are branches.

    target: a model, or a pipeline with one transformer. sample: makes one run of it, with falling timesteps. Raises
    `ValueError` if skipdit does not know the branches of the model, or if `sample` does not call it.
    """
    if interval < 2:
        raise ValueError(f"interval must be at least 2, else no step could reuse, got {interval}")
    with recorded(target, BranchOutputs(EVERY), lambda model, rules: BranchTrials(model, rules, interval)) as (
        _,
        steps,
    ):
        sample()
    if not steps.errors:
        raise ValueError(f"sample did not call the model of this {type(target).__name__}: nothing was measured")
    levels = sorted(steps.errors, reverse=True)
    largest = [torch.stack(errors).amax(dim=0).tolist() if (errors := steps.errors[level]) else [] for level in levels]
    return LayerErrors(
        errors=tuple(dict(zip(steps.alone, errors, strict=False)) for errors in largest), timesteps=tuple(levels)
    )
