"""How one step is made: by a schedule, or by a probe taken on the way. What a step leaves behind is in its stream."""

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from skipdit.cache.compiled import Call
from skipdit.cache.gates import AdaptiveSchedule, Gate
from skipdit.cache.methods import CacheMethod
from skipdit.cache.predictor import Derivatives, Values
from skipdit.cache.ranks import agreed
from skipdit.cache.schedule import Decision, ExplicitSchedule, Schedule
from skipdit.models.costs import Costs
from skipdit.models.forward_plan import ForwardPlan, Question, Region, Stored, Units
from skipdit.models.long_skip import LongSkipLinks, LongSkipModel

Derived = dict[str, Derivatives]  # by the name of a region
MAX_DECIDED = 1024  # runs whose decisions are remembered


@dataclass(frozen=True)
class Part:
    """One choice of a method on one model: the region of each variant, and what an adaptive schedule looks at."""

    method: CacheMethod
    regions: tuple[Region, ...]
    probe: tuple[Region, ...]

    @property
    def schedule(self) -> Schedule:
        return self.method.schedule


def parts_on(method: CacheMethod, model: nn.Module) -> list[Part]:
    """Return the choices of a method for which this model has a site; `ValueError` where there are none."""
    parts = []
    for each in method.parts:
        regions = each.site.regions(model)
        if regions:
            each.schedule.for_cost(Costs.at_best(model).of_step(regions[:1]))  # raises where it is out of reach
            probe = each.probe.regions(model) if each.probe is not None else ()
            num_variants = each.schedule.num_variants if isinstance(each.schedule, ExplicitSchedule) else 1
            if num_variants > len(regions):
                raise ValueError(
                    f"variants of a schedule must be below {len(regions)}, the number of its num_shallow_units, got "
                    f"{num_variants - 1}"
                )
            parts.append(Part(dataclasses.replace(each, others=()), regions, probe))
    if not parts:
        raise ValueError(f"{type(model).__name__} has nothing that {method} could reuse")
    return parts


@dataclass(eq=False)
class PartState:
    """What one choice of a method keeps in one stream.

    gate: of an adaptive schedule. stored: the derivatives of each region. steps_since_full: counted from the last full
    step. probe: what was seen at the last full step, or at the last step.
    """

    gate: Gate | None
    stored: Derived = field(default_factory=dict)
    steps_since_full: int = 0
    probe: Stored = field(default_factory=dict)

    @classmethod
    def of(cls, part: Part) -> "PartState":
        schedule = part.schedule
        return cls(schedule.gate() if isinstance(schedule, AdaptiveSchedule) else None)

    @property
    def tensors(self) -> list[Tensor]:
        derivatives = (values for each in self.stored.values() for values in each)
        return [tensor for values in (*derivatives, *self.probe.values()) for tensor in values.values()]

    def keep(self, part: Part, stored: Stored) -> None:
        """Keep what a full step stored of the part's regions."""
        found = {region.name: stored[region.name] for region in part.regions if stored.get(region.name)}
        predictor = part.method.predictor
        self.stored = {
            name: predictor.update(self.stored.get(name, ()), values, self.steps_since_full)
            for name, values in found.items()
        }

    def predict(self, part: Part, region: Region) -> Values:
        return part.method.predictor.predict(self.stored[region.name], self.steps_since_full)

    def count(self, part: Part, level: float, *, full: bool) -> None:
        self.steps_since_full = 1 if full else self.steps_since_full + 1
        if not part.schedule.stores(level):
            self.stored = {}
        if self.gate is not None:
            self.gate.advance(full=full)


class StepState(Protocol):
    """What a stepper sees of a stream.

    levels: noise levels of its steps so far, including this one. coming: those of the run from this step on, where they
    are known. costs: for its shapes, once they have been counted.
    """

    states: list[PartState]
    levels: list[float]
    coming: list[float]
    costs: Costs | None


class Stepper(Protocol):
    """Makes the steps of a cached model."""

    parts: list[Part]

    def step(self, call: Call, stream: StepState) -> tuple[Any, tuple[Region, ...]]:
        """Make the next step of a stream; return the model's output, and the regions that were reused."""
        ...


class ScheduledSteps:
    """Steps that are decided before they run: by a static schedule, or by what earlier steps stored."""

    def __init__(self, model: nn.Module, parts: list[Part]) -> None:
        self.parts = parts
        self.links = cast(LongSkipModel, model).long_skip_links
        self.plans: dict[tuple[Decision, ...], ForwardPlan] = {}
        self.schedules: dict[tuple[int, Costs | None], Schedule] = {}
        self.decided: dict[tuple[int, Costs | None, tuple[float, ...]], list[Decision]] = {}

    def step(self, call: Call, stream: StepState) -> tuple[Any, tuple[Region, ...]]:
        states = stream.states
        decisions = self.decisions(stream)
        plan = self.plan_of(decisions)
        given: Stored | None = None
        if plan.reuse:
            given = {}
            for part, state, decision in zip(self.parts, states, decisions, strict=True):
                if decision is not None:
                    region = part.regions[decision]
                    given[region.name] = state.predict(part, region)
        output, stored = call(plan, given)
        for part, state, decision in zip(self.parts, states, decisions, strict=True):
            if decision is None:
                if state.gate is not None and state.stored:
                    now = {name: stored[name] for name in state.stored}
                    before = {name: derivatives[0] for name, derivatives in state.stored.items()}
                    state.gate.observe(agreed(relative_change(now, before), call.model), state.steps_since_full)
                state.keep(part, stored)
            state.count(part, stream.levels[-1], full=decision is None)
        return output, plan.reuse

    def decisions(self, stream: StepState) -> tuple[Decision, ...]:
        """Return what each part does. A part does not reuse where it has nothing stored, or where a later part leaves
        out some of its units."""
        decisions: list[Decision] = []
        left_out: set[int] = set()
        for index in reversed(range(len(self.parts))):
            part, state = self.parts[index], stream.states[index]
            decision = self._decide(index, state, stream) if state.stored else None
            if decision is not None and len(self.parts) > 1 and part.regions[decision].bounds is not None:
                units = set(part.regions[decision].covered)
                decision = None if units & left_out else decision
                left_out |= units
            decisions.append(decision)
        return tuple(reversed(decisions))

    def _decide(self, index: int, state: PartState, stream: StepState) -> Decision:
        if state.gate is not None:
            return 0 if state.gate.opens() else None
        whole = (*stream.levels, *stream.coming[1:])
        key = index, stream.costs, whole
        decided = self.decided.get(key)
        if decided is None:
            if len(self.decided) > MAX_DECIDED:
                self.decided.clear()
            decided = self.decided[key] = self.schedule_of(index, stream.costs).decisions(whole)
        return decided[len(stream.levels) - 1]

    def schedule_of(self, index: int, costs: Costs | None) -> Schedule:
        """Return the schedule of a part; if it depends on costs, for those that were counted."""
        key, part = (index, costs), self.parts[index]
        if key not in self.schedules:
            self.schedules[key] = part.schedule
            try:
                if costs is not None:
                    self.schedules[key] = part.schedule.for_cost(costs.of_step(part.regions[:1]))
            except ValueError as error:
                warnings.warn(f"{error}: as much as possible is reused", stacklevel=2)
        return self.schedules[key]

    def plan_of(self, decisions: tuple[Decision, ...]) -> ForwardPlan:
        """Return the plan of a step: full parts store, others reuse, and a part some of whose units are left out for
        another stores nothing. Equal decisions give the same object, so that a compiled model sees few."""
        if decisions not in self.plans:
            pairs = list(zip(self.parts, decisions, strict=True))
            reuse = tuple(part.regions[decision] for part, decision in pairs if decision is not None)
            left_out = {unit for unit in range(self.links.num_units) if any(each.leaves_out(unit) for each in reuse)}
            fresh = [region for part, decision in pairs if decision is None for region in part.regions]
            store = tuple(region for region in fresh if not left_out & set(region.covered))
            self.plans[decisions] = ForwardPlan.of(self.links, store=store, reuse=reuse)
        return self.plans[decisions]


class ProbedSteps:
    """Steps that look at the first units, the head, before they decide about the others.

    A model that is not compiled decides within its forward: a step that does not reuse costs no more than the
    comparison. A compiled one runs the graph that reuses and, if that is refused, the graph of the units after the
    head.
    """

    def __init__(self, model: nn.Module, parts: list[Part]) -> None:
        self.parts = parts
        (part,) = parts
        region, *others = part.regions
        if others or not isinstance(region, Units) or region.start == 0:
            raise ValueError(
                "a probe is taken in the first units, before the decision, so what is reused must be units after them "
                f"(Stack, DeepFeatures of one number of units, UnitRange), got {', '.join(map(str, part.regions))}"
            )
        links: LongSkipLinks = cast(LongSkipModel, model).long_skip_links
        self.region, self.head = region, Units(start=0, stop=region.start)
        self.full = ForwardPlan.of(links, store=(*part.probe, region), asks_at=region.start)
        self.reuse_rest = ForwardPlan.of(links, reuse=(region,))
        self.reuse = ForwardPlan.of(links, store=(*part.probe, self.head), reuse=(region,))
        self.rest = ForwardPlan.of(links, store=(region,), reuse=(self.head,))

    def step(self, call: Call, stream: StepState) -> tuple[Any, tuple[Region, ...]]:
        (part,), (state,) = self.parts, stream.states
        schedule = cast(AdaptiveSchedule, part.schedule)
        gate = cast(Gate, state.gate)

        def accepts(stored: Stored) -> bool:
            seen = {region.name: stored[region.name] for region in part.probe if region.name in stored}
            return gate.accepts(agreed(relative_change(seen, state.probe), call.model))

        full = True
        if not state.stored:
            output, stored = call(self.full)
        elif call.is_compiled:
            output, stored = call(self.reuse, {self.region.name: state.predict(part, self.region)})
            full = not accepts(stored)
            if full:
                output, rest = call(self.rest, {self.head.name: stored[self.head.name]})
                stored = {**stored, **rest}
        else:
            answers: list[bool] = []

            def ask(stored: Stored) -> bool:
                answers.append(accepts(stored))
                return answers[-1]

            given = {self.region.name: state.predict(part, self.region)}
            question = Question(ask, self.reuse_rest, given)
            output, stored = call(dataclasses.replace(self.full, question=question))
            full = True not in answers
        if full:
            # where the block that the probe looks at is left out, nothing is stored
            state.keep(part, stored)
        if full or schedule.follows_each_step:
            state.probe = {region.name: stored[region.name] for region in part.probe if region.name in stored}
        state.count(part, stream.levels[-1], full=full)
        return output, () if full else (self.region,)


def make_stepper(model: nn.Module, parts: list[Part]) -> Stepper:
    return ProbedSteps(model, parts) if parts[0].probe else ScheduledSteps(model, parts)


def relative_change(stored: Stored, before: Stored) -> float:
    """Return the L1 distance between two sets of values over the L1 norm of the second: 0 where they are equal, NaN
    where there is nothing to compare. Waits for the device, once."""
    pairs = [(value, before[name][key]) for name, values in stored.items() for key, value in values.items()]
    if not pairs:
        return math.nan
    distance = torch.stack([(value - last).abs().float().sum() for value, last in pairs]).sum()
    norm = torch.stack([last.abs().float().sum() for _, last in pairs]).sum()
    return torch.where(distance == 0, distance, distance / norm).item()
