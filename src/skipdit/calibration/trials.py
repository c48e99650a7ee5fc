"""Measures the effect of reuse on a run at every step.

One full run tries at each step how the values of each earlier step would change the output if they replaced its own.
The output is nearly linear in them, so the error of any prediction from stored steps is a sum of these changes (see
`search`). The effect of an error at one step on the final sample is measured in runs that reuse at a single step.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.cache.site import BranchOutputs, Site, linked_model
from skipdit.cache.steppers import CacheRule, MeasuringStepper, StepState, relative_change_number
from skipdit.calibration.config import Trials as Trials
from skipdit.interfaces import ModelOutput
from skipdit.models.check import first_tensor
from skipdit.models.forward_plan import Branches, ForwardPlan, Region, Stored, Values
from skipdit.models.long_skip import BranchKind
from skipdit.runs import Runner, before_steps

Sample = Callable[[], Tensor]
Trial = tuple[int, int]  # variant, and how many steps before the values were stored
NUM_COORDINATES = 4096  # coordinates of an output, drawn at random, at which changes are kept
LEAST_EXPLAINED = 0.9  # share of the guided output explained by the model's, below which guidance counts as unknown


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The measured effects of reuse at one site of one model."""

    site: Site
    changes: Float[np.ndarray, "variants steps lookback coordinates"]
    """at [v, s, back - 1], the change of the output after guidance if step s uses the values of step s - back; 0 if
    that is before the first step"""
    sensitivity: Float[np.ndarray, " steps"]
    """mean squared error of the final sample per mean squared error of the output of a step"""
    reuse_costs: tuple[float, ...]
    """cost of a reuse step of each variant, in full steps"""
    num_units: int
    timesteps: tuple[float, ...]
    """timesteps of the run"""
    reference: Tensor
    """samples of the full run, in [0, 1]"""

    @cached_property
    def table(self) -> ErrorTable | None:
        """Return the table by which schedules are planned for runs with other timesteps; `None` if there is
        more than one variant."""
        num_variants, num_steps, lookback, size = self.changes.shape
        if num_variants > 1 or num_steps < 3:
            return None
        nodes = tuple(node for node in NODES if node <= lookback)
        grams = np.zeros((num_steps, len(nodes), len(nodes)))
        for step in range(1, num_steps):
            changes = np.stack([self.changes[0, step, min(node, step) - 1] for node in nodes]).astype(np.float64)
            grams[step] = changes @ changes.T / size * self.sensitivity[step]
        return ErrorTable(timesteps=self.timesteps, nodes=nodes, grams=grams, reuse_cost=self.reuse_costs[0])


class SolverSteps:
    """Combines the trials of all calls of the model within one step of the solver."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Tensor, Mapping[Trial, Tensor]]] = []
        self.vectors: dict[tuple[int, Trial], list[np.ndarray]] = {}

    def add(self, step: int, output: Tensor, changes: Mapping[Trial, Tensor]) -> None:
        """Add a call. output: what the pipeline receives. changes: changes of the output, by trial."""
        self.calls.append((step, output, changes))

    def observe(self, guided: Tensor, latents: Tensor) -> None:
        """Keep the changes of the calls since the last step of the solver, which takes this guided output.

        If the guided output is a linear combination of the model's outputs, the weights are solved for and applied to
        the changes; otherwise the changes of all calls are concatenated.
        """
        calls, self.calls = self.calls, []
        if not calls or not calls[0][2]:
            return
        parts = [part for _, output, _ in calls for part in parts_of(output, guided)]
        weights = None
        if all(part.numel() == guided.numel() and part.isfinite().all() for part in parts):
            matrix, target = torch.stack(parts, dim=1).double().cpu(), guided.flatten().double().cpu()
            solution = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
            if (matrix @ solution - target).square().sum() <= (1 - LEAST_EXPLAINED) * target.square().sum():
                weights = solution.to(parts[0])
        step = max(step for step, _, _ in calls)  # a branch of guidance that began later has counted fewer steps
        size = guided.numel() if weights is not None else sum(part.numel() for part in parts)
        generator = torch.Generator().manual_seed(0)
        coordinates = torch.randperm(size, generator=generator)[:NUM_COORDINATES].to(guided.device)
        for trial in calls[0][2]:
            if not all(trial in changes for _, _, changes in calls):  # a branch of guidance began later
                continue
            changed = [part for _, _, changes in calls for part in parts_of(changes[trial], guided)]
            vector = torch.cat(changed) if weights is None else torch.stack(changed, dim=1) @ weights
            self.vectors.setdefault((step, trial), []).append(vector[coordinates].cpu().numpy())


def parts_of(output: Tensor, guided: Tensor) -> list[Tensor]:
    """Return the parts of an output that guidance combines, flat: of each branch, without learned variances."""
    if output.shape[0] % guided.shape[0] or output[0].numel() < guided[0].numel():
        return [output.flatten()]
    chunks = output.chunk(output.shape[0] // guided.shape[0])
    return [chunk.flatten(1)[:, : guided[0].numel()].flatten() for chunk in chunks]


class HistorySteps(MeasuringStepper):
    """Compares each step with the stored values of earlier ones. Abstract."""

    def __init__(self, model: nn.Module, rules: list[CacheRule], store: Sequence[Region], lookback: int) -> None:
        super().__init__(model, rules, store)
        self.lookback = lookback
        self.history: WeakKeyDictionary[StepState, deque[Stored]] = WeakKeyDictionary()
        self.levels: list[float] = []

    def measure(self, call: Call, stream: StepState, output: ModelOutput, stored: Stored) -> ModelOutput:
        history = self.history.setdefault(stream, deque(maxlen=self.lookback))
        step = len(stream.levels) - 1
        if step == len(self.levels):
            self.levels.append(stream.levels[-1])
        self.compare(call, step, output, stored, history)
        history.appendleft(stored)
        return output

    def compare(self, call: Call, step: int, output: ModelOutput, stored: Stored, history: Sequence[Stored]) -> None:
        """Compare a step with earlier ones. history: their stored values, the last step's first."""
        raise NotImplementedError


def prediction_of(output: ModelOutput) -> Tensor:
    """Return the prediction in a model's output in float32; of a model that returns a list of samples, as Z-Image does,
    all of them."""
    match output:
        case {"sample": list() as samples} | (list() as samples, *_) if samples:
            return torch.stack(samples).float()
    return first_tensor(output).float()


class ReuseTrials(HistorySteps):
    """Tries at each step the values of each earlier one, and keeps the changes of the output. Calls `advance` after
    each call of the model."""

    def __init__(self, model: nn.Module, rules: list[CacheRule], trials: Trials, advance: Callable[[], object]) -> None:
        self.regions = rules[0].regions
        super().__init__(model, rules, self.regions, trials.lookback)
        self.advance = advance
        self.reuse = [ForwardPlan.of(self.links, reuse=(region,)) for region in self.regions]
        self.solver_steps = SolverSteps()

    def compare(self, call: Call, step: int, output: ModelOutput, stored: Stored, history: Sequence[Stored]) -> None:
        sample = prediction_of(output)
        changes: dict[Trial, Tensor] = {}
        for variant, region in enumerate(self.regions):
            current = stored[region.name]
            # a quarter of the way, if rounding allows it: predictions are closer than the values they are made from
            share = 0.25 if all(value.dtype == torch.float32 for value in current.values()) else 1.0
            for back, before in enumerate(history, start=1):
                earlier = before[region.name]
                mixed = {region.name: {key: value.lerp(earlier[key], share) for key, value in current.items()}}
                tried = prediction_of(call(self.reuse[variant], mixed).output)
                changes[variant, back] = (tried - sample) / share
        self.solver_steps.add(step, sample, changes)
        self.advance()

    def array(self) -> Float[np.ndarray, "variants steps lookback coordinates"]:
        """Return the changes of the output, see `Measurement`."""
        vectors = {key: np.concatenate(parts) for key, parts in self.solver_steps.vectors.items()}
        size = max(len(vector) for vector in vectors.values())
        array = np.zeros((len(self.regions), len(self.levels), self.lookback, size), np.float32)
        for (step, (variant, back)), vector in vectors.items():
            array[variant, step, back - 1, : len(vector)] = vector
        return array


class SingleReuse(MeasuringStepper):
    """Reuses at one step the values that the step before stored; all other steps are full."""

    def __init__(self, model: nn.Module, rules: list[CacheRule], probed: int) -> None:
        super().__init__(model, rules, rules[0].regions[:1])
        self.probed, self.region = probed, rules[0].regions[0]
        self.reuse = ForwardPlan.of(self.links, reuse=(self.region,))
        self.before: WeakKeyDictionary[StepState, Values] = WeakKeyDictionary()
        self.solver_steps = SolverSteps()

    def measure(self, call: Call, stream: StepState, output: ModelOutput, stored: Stored) -> ModelOutput:
        if len(stream.levels) - 1 == self.probed:
            exact = prediction_of(output)
            output = call(self.reuse, {self.region.name: self.before[stream]}).output
            sample = prediction_of(output)
            self.solver_steps.add(self.probed, sample, {(0, 1): sample - exact})
        self.before[stream] = stored[self.region.name]
        return output

    @property
    def error(self) -> float:
        """Return the mean squared error of the output of the probed step."""
        vectors = self.solver_steps.vectors.values()
        return float(np.mean([np.square(part).mean() for parts in vectors for part in parts]))


def probed_steps(num_steps: int, num_probed: int) -> list[int]:
    """Return at most `num_probed` steps, from step 1 to the last one, denser at both ends."""
    positions = (1 - np.cos(np.linspace(0, np.pi, num_probed))) / 2
    return sorted({1 + round(float(position) * (num_steps - 2)) for position in positions})


def measure(run: Runner, site: Site, trials: Trials, *, advance: Callable[[], object] = lambda: None) -> Measurement:
    """Measure the effect of reuse at this site on the samples of a runner, in 1 + `trials.num_probed` runs.

    advance: called after each call of the model in the first run. Raises `ValueError` if the model lacks the site, or
    if a run has fewer than 3 steps.
    """
    pipeline, trials = run.pipeline, trials.of(site)

    def make_trials(model: nn.Module, rules: list[CacheRule]) -> ReuseTrials:
        return ReuseTrials(model, rules, trials, advance)

    with recorded(pipeline, site, make_trials) as (cache, recorder):
        with before_steps(pipeline.scheduler, recorder.solver_steps.observe):
            reference = run().samples
        costs = tuple(cache.costs().of_step((region,)) for region in recorder.regions)
        num_units = max(len(cache.costs().units), 1)
    num_steps = len(recorder.levels)
    if num_steps < 3:
        raise ValueError(f"calibration needs a run of at least 3 steps, got {num_steps}")
    probed, ratios = probed_steps(num_steps, trials.num_probed), []
    for step in probed:
        with (
            recorded(pipeline, site, lambda model, rules, step=step: SingleReuse(model, rules, step)) as (_, prober),
            before_steps(pipeline.scheduler, prober.solver_steps.observe),
        ):
            final_error = (run().samples - reference).square().mean().item()
        ratios.append(max(final_error, 1e-12) / max(prober.error, 1e-20))
    return Measurement(
        site=site,
        changes=recorder.array(),
        sensitivity=np.exp(np.interp(np.arange(num_steps), probed, np.log(ratios))),
        reuse_costs=costs,
        num_units=num_units,
        timesteps=tuple(recorder.levels),
        reference=reference,
    )


# ----------------------------------------------------------------------------------------------------------------------
# SmoothCache: a schedule per kind of branch, from the changes of its outputs


@dataclass(frozen=True, kw_only=True)
class BranchChanges:
    """The measured changes of the outputs of branches."""

    relative: dict[BranchKind, np.ndarray]
    """by kind, (steps, ages): the L1 distance of a step's outputs from those `age` (from 1) steps before, over the norm
    of those; NaN before the first step"""
    shares: dict[BranchKind, float]
    """by kind, the share in the cost of a full step"""
    timesteps: tuple[float, ...]
    reference: Tensor
    """samples of the full run, in [0, 1]"""

    def schedules(self, threshold: float) -> dict[BranchKind, ExplicitSchedule]:
        """Return SmoothCache's schedule of each kind, which reuses while the change since the last full step is below
        the threshold."""
        schedules: dict[BranchKind, ExplicitSchedule] = {}
        for kind, relative in self.relative.items():
            full = [0]
            for step in range(1, len(relative)):
                age = step - full[-1]
                if age > relative.shape[1] or not relative[step, age - 1] < threshold:
                    full.append(step)
            schedules[kind] = ExplicitSchedule(
                full_steps=tuple(full), num_inference_steps=len(relative), timesteps=self.timesteps
            )
        return schedules

    def compute_ratio(self, threshold: float) -> float:
        """Return the cost of the full run divided by that with these schedules."""
        num_steps = len(self.timesteps)
        schedules = self.schedules(threshold)
        saved = sum(self.shares[kind] * (num_steps - len(schedules[kind].full_steps)) for kind in self.relative)
        return num_steps / (num_steps - saved)

    def method(self, threshold: float) -> CacheMethod:
        """Return the cache with these schedules."""
        rules = [
            CacheMethod(schedule=schedule, site=BranchOutputs((kind,)))
            for kind, schedule in self.schedules(threshold).items()
        ]
        return replace(rules[0], others=tuple(rules[1:]))


class BranchHistory(HistorySteps):
    """Measures the distance of the outputs of branches from those of earlier steps."""

    def __init__(self, model: nn.Module, rules: list[CacheRule], kinds: Mapping[BranchKind, Branches], max_age: int):
        super().__init__(model, rules, tuple(kinds.values()), max_age)
        self.kinds = kinds
        self.changes: dict[tuple[BranchKind, int, int], list[float]] = {}

    def compare(self, call: Call, step: int, output: ModelOutput, stored: Stored, history: Sequence[Stored]) -> None:
        for age, before in enumerate(history, start=1):
            for kind, region in self.kinds.items():
                change = relative_change_number({region.name: stored[region.name]}, before)
                self.changes.setdefault((kind, step, age), []).append(change)


def measure_branches(pipeline: DiffusionPipeline, sample: Sample, *, max_age: int) -> BranchChanges:
    """Make the one pass of SmoothCache's calibration (arXiv 2411.10510). sample: samples once with the pipeline."""

    def make_history(model: nn.Module, rules: list[CacheRule]) -> BranchHistory:
        linked = linked_model(model)
        present, units = {info.kind for info in linked.branches()}, tuple(range(linked.long_skip_links.num_units))
        kinds: dict[BranchKind, Branches] = {
            kind: Branches(kinds=(kind,), units=units) for kind in EVERY if kind in present
        }
        return BranchHistory(model, rules, kinds, max_age)

    with recorded(pipeline, BranchOutputs(EVERY), make_history) as (cache, recorder):
        reference = sample()
        shares: dict[BranchKind, float] = {
            kind: 1 - cache.costs().of_step((region,)) for kind, region in recorder.kinds.items()
        }
    shape = len(recorder.levels), max_age
    relative: dict[BranchKind, np.ndarray] = {kind: np.full(shape, np.nan) for kind in recorder.kinds}
    for (kind, step, age), changes in recorder.changes.items():
        relative[kind][step, age - 1] = float(np.mean(changes))
    return BranchChanges(relative=relative, shares=shares, timesteps=tuple(recorder.levels), reference=reference)
