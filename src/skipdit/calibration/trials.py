"""Measures what reuse costs at every step, and finds the schedule that costs least.

One sampling pass in full tries, at each step, what every possible reuse would have given: by age (steps since the last
full one), spacing (steps between the last two full ones, which Taylor prediction depends on) and variant. How much an
error at a step shows in the end is measured by reusing at single steps. `plan` does the rest.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from skipdit.cache.compiled import Call
from skipdit.cache.enable import Cache, cached
from skipdit.cache.methods import EVERY, CacheMethod
from skipdit.cache.predictor import Derivatives, TaylorPredictor
from skipdit.cache.schedule import ExplicitSchedule, IntervalSchedule
from skipdit.cache.site import BranchOutputs, Site
from skipdit.cache.steppers import Part, Stepper, StepState, relative_change
from skipdit.calibration.plan import ReuseErrors
from skipdit.models.check import first_tensor
from skipdit.models.forward_plan import Branches, ForwardPlan, Region, Stored, Values
from skipdit.models.long_skip import BranchKind, LongSkipModel

Sample = Callable[[], Tensor]
Steps = TypeVar("Steps", bound=Stepper)


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What is tried at each step."""

    orders: tuple[int, ...] = (1, 2)
    """orders of the Taylor predictions"""
    max_age: int = 9
    """steps that a prediction may be old, at most"""
    max_spacing: int = 5
    """steps between the full ones that it is drawn from, at most"""
    num_probed: int = 12
    """steps whose effect on the final sample is measured, spread over the run and denser at both ends"""

    def __post_init__(self) -> None:
        for name in ("max_age", "max_spacing", "num_probed"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.orders or len(set(self.orders)) < len(self.orders):
            raise ValueError(f"orders must be one or more, each once, got {self.orders}")
        for order in self.orders:
            TaylorPredictor(order)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What calibration has seen of one site of one model."""

    site: Site
    errors: dict[int, np.ndarray]
    """of each Taylor order (variants, steps, spacings, ages), see `ReuseErrors`"""
    sensitivity: Float[np.ndarray, " steps"]
    """of each step"""
    reuse_costs: tuple[float, ...]
    """of each variant, in full steps"""
    num_units: int
    timesteps: tuple[float, ...]
    """of the run"""
    reference: Tensor
    """what the run samples in full, in [0, 1]"""

    def reuse_errors(self, order: int) -> ReuseErrors:
        return ReuseErrors(
            errors=self.errors[order],
            sensitivity=self.sensitivity,
            reuse_costs=self.reuse_costs,
            num_units=self.num_units,
        )

    def method(self, variants: tuple[int | None, ...], order: int) -> CacheMethod:
        """Return what `enable_cache` takes. variants: one per step, `None` where it is full."""
        schedule = ExplicitSchedule(
            full_steps=tuple(step for step, variant in enumerate(variants) if variant is None),
            num_inference_steps=len(self.timesteps),
            timesteps=self.timesteps,
            variants=variants,
        )
        return CacheMethod(schedule=schedule, site=self.site, predictor=TaylorPredictor(order))


class RecordingSteps:
    """Makes every step in full, tries every reuse, and keeps how far off each is."""

    def __init__(self, model: nn.Module, parts: list[Part], trials: Trials, advance: Callable[[], object]) -> None:
        self.parts, self.trials, self.advance = parts, trials, advance
        self.regions = parts[0].regions
        links = cast(LongSkipModel, model).long_skip_links
        self.full = ForwardPlan.of(links, store=self.regions)
        self.reuse = [ForwardPlan.of(links, reuse=(region,)) for region in self.regions]
        self.history: WeakKeyDictionary[StepState, deque[Stored]] = WeakKeyDictionary()
        # of each order: (variant, step, spacing, age) -> mean squared errors
        self.errors: dict[int, dict[tuple[int, int, int, int], list[float]]] = {order: {} for order in trials.orders}
        self.seen: list[float] = []

    def step(self, call: Call, stream: StepState) -> tuple[Any, tuple[Region, ...]]:
        output, stored = call(self.full)
        sample = first_tensor(output).float()
        history = self.history.setdefault(
            stream, deque(maxlen=self.trials.max_age + self.trials.max_spacing * max(*self.trials.orders, 1))
        )
        step = len(stream.levels) - 1
        if step == len(self.seen):
            self.seen.append(stream.levels[-1])
        for variant, region in enumerate(self.regions):
            for order in self.trials.orders:
                for spacing, age, derivatives in self._reuses(history, region, order, step):
                    given = {region.name: TaylorPredictor(order).predict(derivatives, age)}
                    reused = first_tensor(call(self.reuse[variant], given).output).float()
                    error = (reused - sample).square().mean().item()
                    self.errors[order].setdefault((variant, step, spacing, age), []).append(error)
        history.appendleft(stored)
        self.advance()
        return output, ()

    def _reuses(
        self, history: deque[Stored], region: Region, order: int, step: int
    ) -> Iterator[tuple[int, int, Derivatives]]:
        """Yield spacing, age and derivatives of every reuse that could be at this step."""

        def values(age: int) -> Values:
            return history[age - 1][region.name]

        for age in range(1, min(self.trials.max_age, step) + 1):
            first = step - age  # of the full steps that are then known
            if first == 0 or order == 0:
                for spacing in range(1, 2 if first == 0 else min(self.trials.max_spacing, first) + 1):
                    if spacing == 1:
                        yield spacing, age, (values(age),)
                continue
            for spacing in range(1, min(self.trials.max_spacing, first) + 1):
                derivatives: Derivatives = ()
                for back in range(min(order, first // spacing), -1, -1):
                    derivatives = TaylorPredictor(order).update(derivatives, values(age + back * spacing), spacing)
                yield spacing, age, derivatives

    def array(self, order: int) -> Float[np.ndarray, "variants steps spacings ages"]:
        trials, steps = self.trials, len(self.seen)
        found = np.full((len(self.regions), steps, trials.max_spacing, trials.max_age), np.nan)
        for (variant, step, spacing, age), errors in self.errors[order].items():
            found[variant, step, spacing - 1, age - 1] = float(np.mean(errors))
        if order == 0:  # the spacing does not matter
            found[:] = found[:, :, :1]
        return found


@contextmanager
def recorded(
    pipeline: DiffusionPipeline, site: Site, make: Callable[[nn.Module, list[Part]], Steps]
) -> Iterator[tuple[Cache, Steps]]:
    """Let the pipeline's transformer make its steps by what `make` returns inside the block; yield it with the
    cache."""
    method = CacheMethod(schedule=IntervalSchedule(interval=1), site=site)
    with cached(pipeline, method, make=make) as cache:
        yield cache, cast(Steps, cache.runtimes[0].stepper)


def probed_steps(num_steps: int, num_probed: int) -> list[int]:
    """Return steps 1 to the last, `num_probed` of them at most, denser at both ends."""
    places = (1 - np.cos(np.linspace(0, np.pi, num_probed))) / 2
    return sorted({1 + round(float(place) * (num_steps - 2)) for place in places})


def measure(
    pipeline: DiffusionPipeline,
    sample: Sample,
    site: Site,
    trials: Trials,
    *,
    advance: Callable[[], object] = lambda: None,
) -> Measured:
    """Measure what reuse at this site costs in this pipeline.

    sample: runs the pipeline once, on the same seeds each time, and gives pictures or frames in [0, 1]. advance: called
    once per step of each such run; there are 1 + `trials.num_probed` runs.

    `ValueError` where the model lacks the site, or a run has fewer than 3 steps.
    """
    with recorded(pipeline, site, lambda model, parts: RecordingSteps(model, parts, trials, advance)) as (
        cache,
        recorder,
    ):
        reference = sample()
        costs = tuple(cache.costs().of_step((region,)) for region in recorder.regions)
        num_units = len(cache.costs().units)
    num_steps = len(recorder.seen)
    if num_steps < 3:
        raise ValueError(f"calibration needs a run of at least 3 steps, got {num_steps}")
    timesteps = tuple(recorder.seen)
    errors = {order: recorder.array(order) for order in trials.orders}
    order = trials.orders[0]
    probed = probed_steps(num_steps, trials.num_probed)
    shown = []
    for step in probed:
        full = tuple(each for each in range(num_steps) if each != step)
        alone = ExplicitSchedule(full_steps=full, num_inference_steps=num_steps)
        with cached(pipeline, CacheMethod(schedule=alone, site=site, predictor=TaylorPredictor(order))) as cache:
            sampled = sample()
            assert cache.summary().steps_reused >= 1
        final = (sampled - reference).square().mean().item()
        shown.append(max(final, 1e-12) / max(errors[order][0, step, 0, 0], 1e-20))
        advance()
    sensitivity = np.exp(np.interp(np.arange(num_steps), probed, np.log(shown)))
    return Measured(
        site=site,
        errors=errors,
        sensitivity=sensitivity,
        reuse_costs=costs,
        num_units=num_units,
        timesteps=timesteps,
        reference=reference,
    )


# ----------------------------------------------------------------------------------------------------------------------
# SmoothCache: by kind of branch, from how its outputs change


@dataclass(frozen=True, kw_only=True)
class Changes:
    """How outputs of branches change."""

    relative: dict[BranchKind, np.ndarray]
    """of each kind (steps, ages): the L1 distance of a step's outputs from those `age` (from 1) steps before, over the
    norm of those; NaN before the first step"""
    shares: dict[BranchKind, float]
    """of each kind in a full step's work"""
    timesteps: tuple[float, ...]
    reference: Tensor
    """what the run samples in full, in [0, 1]"""

    def compute_ratio(self, method: CacheMethod) -> float:
        saved = sum(
            self.shares[cast(BranchOutputs, part.site).kinds[0]]
            * (len(self.timesteps) - len(cast(ExplicitSchedule, part.schedule).full_steps))
            for part in method.parts
        )
        return len(self.timesteps) / (len(self.timesteps) - saved)


class ChangeRecordingSteps:
    """Makes every step in full and keeps how far the branches' outputs are from those of earlier steps."""

    def __init__(self, model: nn.Module, parts: list[Part], max_age: int) -> None:
        self.parts = parts
        whole = cast(Branches, parts[0].regions[0])
        self.kinds: dict[BranchKind, Branches] = {kind: replace(whole, kinds=(kind,)) for kind in whole.kinds}
        self.full = ForwardPlan.of(cast(LongSkipModel, model).long_skip_links, store=tuple(self.kinds.values()))
        self.history: WeakKeyDictionary[StepState, deque[Stored]] = WeakKeyDictionary()
        self.max_age = max_age
        self.changes: dict[tuple[BranchKind, int, int], list[float]] = {}
        self.seen: list[float] = []

    def step(self, call: Call, stream: StepState) -> tuple[Any, tuple[Region, ...]]:
        output, stored = call(self.full)
        history = self.history.setdefault(stream, deque(maxlen=self.max_age))
        step = len(stream.levels) - 1
        if step == len(self.seen):
            self.seen.append(stream.levels[-1])
        for age, before in enumerate(history, start=1):
            for kind, region in self.kinds.items():
                change = relative_change({region.name: stored[region.name]}, before)
                self.changes.setdefault((kind, step, age), []).append(change)
        history.appendleft(stored)
        return output, ()


def smooth_errors(pipeline: DiffusionPipeline, sample: Sample, *, max_age: int) -> Changes:
    """Make one pass of SmoothCache's calibration (arXiv 2411.10510). sample: as in `measure`."""
    with recorded(pipeline, BranchOutputs(EVERY), lambda model, parts: ChangeRecordingSteps(model, parts, max_age)) as (
        cache,
        recorder,
    ):
        reference = sample()
        shares: dict[BranchKind, float] = {
            kind: 1 - cache.costs().of_step((region,)) for kind, region in recorder.kinds.items()
        }
    relative: dict[BranchKind, np.ndarray] = {
        kind: np.full((len(recorder.seen), max_age), np.nan) for kind in recorder.kinds
    }
    for (kind, step, age), changes in recorder.changes.items():
        relative[kind][step, age - 1] = float(np.mean(changes))
    return Changes(relative=relative, shares=shares, timesteps=tuple(recorder.seen), reference=reference)


def smooth_schedule(changes: Changes, threshold: float) -> CacheMethod:
    """Return the schedule by which a branch reuses as long as its outputs are nearer than `threshold` to those it
    holds."""
    parts = []
    for kind, relative in changes.relative.items():
        full = [0]
        for step in range(1, len(relative)):
            age = step - full[-1]
            if age > relative.shape[1] or not relative[step, age - 1] < threshold:
                full.append(step)
        schedule = ExplicitSchedule(
            full_steps=tuple(full), num_inference_steps=len(relative), timesteps=changes.timesteps
        )
        parts.append(CacheMethod(schedule=schedule, site=BranchOutputs((kind,))))
    return replace(parts[0], others=tuple(parts[1:]))
