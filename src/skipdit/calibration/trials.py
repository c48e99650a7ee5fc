"""Measures what reuse does to a run at every step.

One pass in full tries at each step what the values of each earlier step would do to the output in place of its own. The
output is nearly linear in them, so the error of any prediction from stored steps is a sum of these changes (`search`).
How much an error at a step shows in the end is measured by reusing at single steps.
"""

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from skipdit.cache.compiled import Call
from skipdit.cache.enable import recorded
from skipdit.cache.error_table import NODES, ErrorTable
from skipdit.cache.methods import EVERY, CacheMethod
from skipdit.cache.predictor import FittedPredictor, Predictor, TaylorPredictor
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.cache.site import BranchOutputs, Site
from skipdit.cache.steppers import CacheRule, StepState, relative_change
from skipdit.calibration.config import Trials as Trials
from skipdit.models.check import first_tensor
from skipdit.models.forward_plan import Branches, ForwardPlan, Region, Stored, Values
from skipdit.models.long_skip import BranchKind, LongSkipModel
from skipdit.runs import Runner, before_steps

Sample = Callable[[], Tensor]
NUM_COORDINATES = 4096  # of an output, drawn at random, at which changes are kept
LEAST_EXPLAINED = 0.9  # of the guided output by those of the model, below which guidance is taken for unknown


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What calibration has seen of one site of one model."""

    site: Site
    changes: Float[np.ndarray, "variants steps lookback coordinates"]
    """of the output, after guidance, at [v, s, back - 1], where step s has the values of step s - back; 0 where that is
    before the first"""
    sensitivity: Float[np.ndarray, " steps"]
    """mean squared error of the final sample per that of the output of a step"""
    reuse_costs: tuple[float, ...]
    """of each variant, in full steps"""
    num_units: int
    timesteps: tuple[float, ...]
    """of the run"""
    reference: Tensor
    """what the run samples in full, in [0, 1]"""

    @cached_property
    def table(self) -> ErrorTable | None:
        """What schedules of order 1 are planned by for runs of other timesteps; `None` where there is more than one
        variant."""
        num_variants, num_steps, lookback, size = self.changes.shape
        if num_variants > 1 or num_steps < 3:
            return None
        nodes = tuple(node for node in NODES if node <= lookback)
        grams = np.zeros((num_steps, len(nodes), len(nodes)))
        for step in range(1, num_steps):
            changes = np.stack([self.changes[0, step, min(node, step) - 1] for node in nodes]).astype(np.float64)
            grams[step] = changes @ changes.T / size * self.sensitivity[step]
        return ErrorTable(timesteps=self.timesteps, nodes=nodes, grams=grams, reuse_cost=self.reuse_costs[0])

    def method(self, variants: tuple[int | None, ...], predictor: Predictor) -> CacheMethod:
        """Return what `enable_cache` takes. variants: one per step, `None` where it is full."""
        table = self.table if isinstance(predictor, FittedPredictor) and predictor.order == 1 else None
        schedule = ExplicitSchedule(
            full_steps=tuple(step for step, variant in enumerate(variants) if variant is None),
            num_inference_steps=len(self.timesteps),
            timesteps=self.timesteps,
            variants=variants,
            table=table,
        )
        return CacheMethod(schedule=schedule, site=self.site, predictor=predictor)

    def fitted(self, factors: Mapping[int, tuple[float, ...]], order: int) -> Predictor:
        """Return a predictor of factors per reuse step; where fewer values were stored, further ones are 1."""
        if order == 0:
            return TaylorPredictor(0)
        rows = {self.timesteps[step]: (*row, *(1.0,) * (order - len(row))) for step, row in sorted(factors.items())}
        table = self.table if order == 1 else None
        return FittedPredictor(order, tuple(rows), tuple(rows.values()), table=table)


class SolverSteps:
    """Brings together what was tried in all calls of the model for one step of the solver."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Tensor, Mapping[Hashable, Tensor]]] = []
        self.found: dict[tuple[int, Hashable], list[np.ndarray]] = {}

    def add(self, step: int, output: Tensor, changes: Mapping[Hashable, Tensor]) -> None:
        """Add a call. output: what the pipeline gets from it. changes: of the output, by what was tried."""
        self.calls.append((step, output, changes))

    def see(self, guided: Tensor, latents: Tensor) -> None:
        """Keep the changes of the calls that the solver's step, with this guided output, was made from.

        Guidance is a sum of the model's outputs, whose weights are found from them; where it is more than that, their
        changes stand side by side.
        """
        calls, self.calls = self.calls, []
        if not calls or not calls[0][2]:
            return
        parts = [part for _, output, _ in calls for part in parts_of(output, guided)]
        weights = None
        if all(part.numel() == guided.numel() and part.isfinite().all() for part in parts):
            matrix, target = torch.stack(parts, dim=1).double().cpu(), guided.flatten().double().cpu()
            solved = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
            if (matrix @ solved - target).square().sum() <= (1 - LEAST_EXPLAINED) * target.square().sum():
                weights = solved.to(parts[0])
        step = max(step for step, _, _ in calls)  # a branch that began later counts fewer
        size = guided.numel() if weights is not None else sum(part.numel() for part in parts)
        places = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:NUM_COORDINATES].to(guided.device)
        for name in calls[0][2]:
            if not all(name in changes for _, _, changes in calls):  # a branch of guidance that began later
                continue
            changed = [part for _, _, changes in calls for part in parts_of(changes[name], guided)]
            vector = torch.cat(changed) if weights is None else torch.stack(changed, dim=1) @ weights
            self.found.setdefault((step, name), []).append(vector[places].cpu().numpy())


def parts_of(output: Tensor, guided: Tensor) -> list[Tensor]:
    """Return the parts of an output that guidance combines, flat: of each branch, without learned variances."""
    if output.shape[0] % guided.shape[0] or output[0].numel() < guided[0].numel():
        return [output.flatten()]
    chunks = output.chunk(output.shape[0] // guided.shape[0])
    return [chunk.flatten(1)[:, : guided[0].numel()].flatten() for chunk in chunks]


class RecordingSteps:
    """Makes every step in full, tries the values of each earlier one, and keeps how the output changes."""

    def __init__(self, model: nn.Module, rules: list[CacheRule], trials: Trials, advance: Callable[[], object]) -> None:
        self.rules, self.trials, self.advance = rules, trials, advance
        self.regions = rules[0].regions
        links = cast(LongSkipModel, model).long_skip_links
        self.full = ForwardPlan.of(links, store=self.regions)
        self.reuse = [ForwardPlan.of(links, reuse=(region,)) for region in self.regions]
        self.history: WeakKeyDictionary[StepState, deque[Stored]] = WeakKeyDictionary()
        self.solver_steps = SolverSteps()
        self.seen: list[float] = []

    def step(self, call: Call, stream: StepState) -> tuple[Any, tuple[Region, ...]]:
        output, stored = call(self.full)
        sample = first_tensor(output).float()
        history = self.history.setdefault(stream, deque(maxlen=self.trials.lookback))
        step = len(stream.levels) - 1
        if step == len(self.seen):
            self.seen.append(stream.levels[-1])
        changes: dict[Hashable, Tensor] = {}
        for variant, region in enumerate(self.regions):
            now = stored[region.name]
            # part of the way, where rounding allows it: predictions are nearer than the values they are made from
            way = 0.25 if all(value.dtype == torch.float32 for value in now.values()) else 1.0
            for back, before in enumerate(history, start=1):
                earlier = before[region.name]
                given = {region.name: {key: value.lerp(earlier[key], way) for key, value in now.items()}}
                changes[variant, back] = (first_tensor(call(self.reuse[variant], given).output).float() - sample) / way
        self.solver_steps.add(step, sample, changes)
        history.appendleft(stored)
        self.advance()
        return output, ()

    def array(self) -> Float[np.ndarray, "variants steps lookback coordinates"]:
        vectors = {place: np.concatenate(parts) for place, parts in self.solver_steps.found.items()}
        size = max(len(vector) for vector in vectors.values())
        shape = len(self.regions), len(self.seen), self.trials.lookback, size
        found = np.zeros(shape, np.float32)
        for (step, name), vector in vectors.items():
            variant, back = cast(tuple[int, int], name)
            found[variant, step, back - 1, : len(vector)] = vector
        return found


class ProbingSteps:
    """Makes every step in full but one, which reuses what the step before stored."""

    def __init__(self, model: nn.Module, rules: list[CacheRule], probed: int) -> None:
        self.rules, self.probed = rules, probed
        self.region = rules[0].regions[0]
        links = cast(LongSkipModel, model).long_skip_links
        self.full, self.reuse = ForwardPlan.of(links, store=(self.region,)), ForwardPlan.of(links, reuse=(self.region,))
        self.before: WeakKeyDictionary[StepState, Values] = WeakKeyDictionary()
        self.solver_steps = SolverSteps()

    def step(self, call: Call, stream: StepState) -> tuple[Any, tuple[Region, ...]]:
        output, stored = call(self.full)
        if len(stream.levels) - 1 == self.probed:
            reused = call(self.reuse, {self.region.name: self.before[stream]}).output
            sample = first_tensor(reused).float()
            self.solver_steps.add(self.probed, sample, {"": sample - first_tensor(output).float()})
            output = reused
        self.before[stream] = stored[self.region.name]
        return output, ()

    @property
    def error(self) -> float:
        """The mean squared error of the output of the probed step."""
        return float(np.mean([np.square(part).mean() for parts in self.solver_steps.found.values() for part in parts]))


def probed_steps(num_steps: int, num_probed: int) -> list[int]:
    """Return steps 1 to the last, `num_probed` of them at most, denser at both ends."""
    places = (1 - np.cos(np.linspace(0, np.pi, num_probed))) / 2
    return sorted({1 + round(float(place) * (num_steps - 2)) for place in places})


def measure(run: Runner, site: Site, trials: Trials, *, advance: Callable[[], object] = lambda: None) -> Measured:
    """Measure what reuse at this site does to what a runner samples, in 1 + `trials.num_probed` runs.

    advance: called once per call of the model in the first of them.

    `ValueError` where the model lacks the site, or a run has fewer than 3 steps.
    """
    pipeline = run.pipeline
    with recorded(pipeline, site, lambda model, rules: RecordingSteps(model, rules, trials, advance)) as (
        cache,
        recorder,
    ):
        with before_steps(pipeline.scheduler, recorder.solver_steps.see):
            reference = run().samples
        costs = tuple(cache.costs().of_step((region,)) for region in recorder.regions)
        num_units = len(cache.costs().units)
    num_steps = len(recorder.seen)
    if num_steps < 3:
        raise ValueError(f"calibration needs a run of at least 3 steps, got {num_steps}")
    probed, shown = probed_steps(num_steps, trials.num_probed), []
    for step in probed:
        with (
            recorded(pipeline, site, lambda model, rules, step=step: ProbingSteps(model, rules, step)) as (_, prober),
            before_steps(pipeline.scheduler, prober.solver_steps.see),
        ):
            final = (run().samples - reference).square().mean().item()
        shown.append(max(final, 1e-12) / max(prober.error, 1e-20))
    return Measured(
        site=site,
        changes=recorder.array(),
        sensitivity=np.exp(np.interp(np.arange(num_steps), probed, np.log(shown))),
        reuse_costs=costs,
        num_units=num_units,
        timesteps=tuple(recorder.seen),
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
            self.shares[cast(BranchOutputs, rule.site).kinds[0]]
            * (len(self.timesteps) - len(cast(ExplicitSchedule, rule.schedule).full_steps))
            for rule in method.rules
        )
        return len(self.timesteps) / (len(self.timesteps) - saved)


class ChangeRecordingSteps:
    """Makes every step in full and keeps how far the branches' outputs are from those of earlier steps."""

    def __init__(self, model: nn.Module, rules: list[CacheRule], max_age: int) -> None:
        self.rules = rules
        whole = cast(Branches, rules[0].regions[0])
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
    with recorded(pipeline, BranchOutputs(EVERY), lambda model, rules: ChangeRecordingSteps(model, rules, max_age)) as (
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
