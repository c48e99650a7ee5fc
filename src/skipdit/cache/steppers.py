"""Runs one step: as a schedule decides, or as a probe decides on the way. The state of a stream is its argument."""

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
from skipdit.cache.predictor import Ahead, Derivatives, Values
from skipdit.cache.ranks import all_reduce_max
from skipdit.cache.schedule import Decision, ExplicitSchedule, Schedule
from skipdit.models.costs import Costs
from skipdit.models.forward_plan import ForwardPlan, Question, Region, Stored, Units
from skipdit.models.long_skip import LongSkipLinks, LongSkipModel

Derived = dict[str, Derivatives]  # by the name of a region
MAX_DECIDED = 1024  # the number of runs whose decisions are remembered


@dataclass(frozen=True)
class CacheRule:
    """One rule of a method on one model."""

    method: CacheMethod
    """Its schedule, site and predictor, without other rules."""
    regions: tuple[Region, ...]
    """The region of each variant."""
    probe: tuple[Region, ...]
    """The regions that an adaptive schedule compares; empty for a static one."""

    @property
    def schedule(self) -> Schedule:
        return self.method.schedule


def rules_on(method: CacheMethod, model: nn.Module) -> list[CacheRule]:
    """Return the rules of a method for which this model has a site; raises `ValueError` if there are none."""
    rules = []
    for rule in method.rules:
        regions = rule.site.regions(model)
        if regions:
            rule.schedule.for_cost(Costs.at_best(model).of_step(regions[:1]))  # raises if out of reach
            probe = rule.probe.regions(model) if rule.probe is not None else ()
            num_variants = rule.schedule.num_variants if isinstance(rule.schedule, ExplicitSchedule) else 1
            if num_variants > len(regions):
                raise ValueError(
                    f"variants of a schedule must be below {len(regions)}, the number of its num_shallow_units, got "
                    f"{num_variants - 1}"
                )
            rules.append(CacheRule(dataclasses.replace(rule, others=()), regions, probe))
    if not rules:
        raise ValueError(f"{type(model).__name__} has nothing that {method} could reuse")
    return rules


@dataclass(eq=False)
class RuleState:
    """The state of one rule in one stream."""

    gate: Gate | None
    """The gate of an adaptive schedule."""
    stored: Derived = field(default_factory=dict)
    """The derivatives of each region; empty if nothing is stored."""
    steps_since_full: int = 0
    """Distance of the next step from the last full one."""
    spacing: int = 1
    """Distance between the last two full steps."""
    probe: Stored = field(default_factory=dict)
    """The probe of the last full step, or of the last step, as the schedule says."""

    @classmethod
    def of(cls, rule: CacheRule) -> "RuleState":
        schedule = rule.schedule
        return cls(schedule.gate() if isinstance(schedule, AdaptiveSchedule) else None)

    @property
    def tensors(self) -> list[Tensor]:
        derivatives = (values for orders in self.stored.values() for values in orders)
        return [tensor for values in (*derivatives, *self.probe.values()) for tensor in values.values()]

    def keep(self, rule: CacheRule, stored: Stored) -> None:
        """Keep the values of the rule's regions that a full step stored."""
        fresh = {region.name: stored[region.name] for region in rule.regions if stored.get(region.name)}
        predictor = rule.method.predictor
        self.spacing = max(self.steps_since_full, 1)
        self.stored = {
            name: predictor.update(self.stored.get(name, ()), values, self.steps_since_full)
            for name, values in fresh.items()
        }

    def predict(self, rule: CacheRule, region: Region, level: float) -> Values:
        """Return the values of a region at the next step, which is at this noise level."""
        ahead = Ahead(self.steps_since_full, self.spacing, level)
        return rule.method.predictor.predict(self.stored[region.name], ahead)

    def count(self, rule: CacheRule, level: float, *, full: bool) -> None:
        self.steps_since_full = 1 if full else self.steps_since_full + 1
        if not rule.schedule.stores(level):
            self.stored = {}
        if self.gate is not None:
            self.gate.advance(full=full)


class StepState(Protocol):
    """The fields of a stream that a stepper needs, see `skipdit.cache.streams.Stream`."""

    states: list[RuleState]
    levels: list[float]
    coming: list[float]
    costs: Costs | None


class Stepper(Protocol):
    """Runs the steps of a cached model."""

    rules: list[CacheRule]

    def step(self, call: Call, stream: StepState) -> tuple[Any, tuple[Region, ...]]:
        """Run the next step of a stream; return the model's output, and the regions that were reused."""
        ...


class ScheduledSteps:
    """Steps that are decided before they run: by a static schedule, or from the values of earlier steps."""

    def __init__(self, model: nn.Module, rules: list[CacheRule]) -> None:
        self.rules = rules
        self.links = cast(LongSkipModel, model).long_skip_links
        self.plans: dict[tuple[Decision, ...], ForwardPlan] = {}
        self.schedules: dict[tuple[int, Costs | None], Schedule] = {}
        self.decided: dict[tuple[int, Costs | None, tuple[float, ...]], list[Decision]] = {}

    def step(self, call: Call, stream: StepState) -> tuple[Any, tuple[Region, ...]]:
        states = stream.states
        decisions = self.decisions(stream)
        plan = self.plan_of(decisions)
        reused: Stored | None = None
        if plan.reuse:
            reused = {}
            for rule, state, decision in zip(self.rules, states, decisions, strict=True):
                if decision is not None:
                    region = rule.regions[decision]
                    reused[region.name] = state.predict(rule, region, stream.levels[-1])
        output, stored = call(plan, reused)
        for rule, state, decision in zip(self.rules, states, decisions, strict=True):
            if decision is None:
                if state.gate is not None and state.stored:
                    now = {name: stored[name] for name in state.stored}
                    before = {name: derivatives[0] for name, derivatives in state.stored.items()}
                    state.gate.observe(all_reduce_max(relative_change(now, before), call.model), state.steps_since_full)
                state.keep(rule, stored)
            state.count(rule, stream.levels[-1], full=decision is None)
        return output, plan.reuse

    def decisions(self, stream: StepState) -> tuple[Decision, ...]:
        """Return the decision of each rule. A rule does not reuse if it has nothing stored, or if a later rule leaves
        out some of its units."""
        decisions: list[Decision] = []
        left_out: set[int] = set()
        for index in reversed(range(len(self.rules))):
            rule, state = self.rules[index], stream.states[index]
            decision = self._decide(index, state, stream) if state.stored else None
            if decision is not None and len(self.rules) > 1 and rule.regions[decision].bounds is not None:
                units = set(rule.regions[decision].covered)
                decision = None if units & left_out else decision
                left_out |= units
            decisions.append(decision)
        return tuple(reversed(decisions))

    def _decide(self, index: int, state: RuleState, stream: StepState) -> Decision:
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
        """Return the schedule of a rule; if it depends on costs, that for the counted ones."""
        key, rule = (index, costs), self.rules[index]
        if key not in self.schedules:
            self.schedules[key] = rule.schedule
            try:
                if costs is not None:
                    self.schedules[key] = rule.schedule.for_cost(costs.of_step(rule.regions[:1]))
            except ValueError as error:
                warnings.warn(f"{error}: the cache reuses as much as possible", stacklevel=2)
        return self.schedules[key]

    def plan_of(self, decisions: tuple[Decision, ...]) -> ForwardPlan:
        """Return the plan of a step: full rules store, others reuse, and a rule stores nothing if another leaves out
        some of its units. Equal decisions return the same object, so that a compiled model sees few."""
        if decisions not in self.plans:
            pairs = list(zip(self.rules, decisions, strict=True))
            reuse = tuple(rule.regions[decision] for rule, decision in pairs if decision is not None)
            left_out = {
                unit for unit in range(self.links.num_units) if any(region.leaves_out(unit) for region in reuse)
            }
            fresh = [region for rule, decision in pairs if decision is None for region in rule.regions]
            store = tuple(region for region in fresh if not left_out & set(region.covered))
            self.plans[decisions] = ForwardPlan.of(self.links, store=store, reuse=reuse)
        return self.plans[decisions]


class ProbedSteps:
    """Steps that run the first units, the head, before they decide about the others.

    An eager model decides within its forward: a full step costs one comparison more than without a cache. A compiled
    one runs the graph that reuses and, if the gate rejects it, the graph of the units after the head.
    """

    def __init__(self, model: nn.Module, rules: list[CacheRule]) -> None:
        self.rules = rules
        (rule,) = rules
        region, *others = rule.regions
        if others or not isinstance(region, Units) or region.start == 0:
            raise ValueError(
                "a probe is taken in the first units, so an adaptive cache must reuse one range of units after them "
                f"(AllButFirst, UnitRange, or DeepFeatures without others), got {', '.join(map(str, rule.regions))}"
            )
        links: LongSkipLinks = cast(LongSkipModel, model).long_skip_links
        self.region, self.head = region, Units(start=0, stop=region.start)
        self.full = ForwardPlan.of(links, store=(*rule.probe, region), asks_at=region.start)
        self.reuse_rest = ForwardPlan.of(links, reuse=(region,))
        self.reuse = ForwardPlan.of(links, store=(*rule.probe, self.head), reuse=(region,))
        self.rest = ForwardPlan.of(links, store=(region,), reuse=(self.head,))

    def step(self, call: Call, stream: StepState) -> tuple[Any, tuple[Region, ...]]:
        (rule,), (state,) = self.rules, stream.states
        schedule = cast(AdaptiveSchedule, rule.schedule)
        gate = cast(Gate, state.gate)

        def accepts(stored: Stored) -> bool:
            probe = {region.name: stored[region.name] for region in rule.probe if region.name in stored}
            return gate.accepts(all_reduce_max(relative_change(probe, state.probe), call.model))

        full = True
        if not state.stored:
            output, stored = call(self.full)
        elif call.is_compiled:
            output, stored = call(self.reuse, {self.region.name: state.predict(rule, self.region, stream.levels[-1])})
            full = not accepts(stored)
            if full:
                output, rest = call(self.rest, {self.head.name: stored[self.head.name]})
                stored = {**stored, **rest}
        else:
            answers: list[bool] = []

            def ask(stored: Stored) -> bool:
                answers.append(accepts(stored))
                return answers[-1]

            reused = {self.region.name: state.predict(rule, self.region, stream.levels[-1])}
            question = Question(ask, self.reuse_rest, reused)
            output, stored = call(dataclasses.replace(self.full, question=question))
            full = True not in answers
        if full:
            state.keep(rule, stored)  # nothing, if the caller left out the block of the probe
        if full or schedule.follows_each_step:
            state.probe = {region.name: stored[region.name] for region in rule.probe if region.name in stored}
        state.count(rule, stream.levels[-1], full=full)
        return output, () if full else (self.region,)


def make_stepper(model: nn.Module, rules: list[CacheRule]) -> Stepper:
    return ProbedSteps(model, rules) if rules[0].probe else ScheduledSteps(model, rules)


def relative_change(stored: Stored, before: Stored) -> float:
    """Return the L1 distance between two sets of values over the L1 norm of the second: 0 if they are equal, NaN if
    there is nothing to compare. Waits for the device once."""
    pairs = [(value, before[name][key]) for name, values in stored.items() for key, value in values.items()]
    if not pairs:
        return math.nan
    distance = torch.stack([(value - last).abs().float().sum() for value, last in pairs]).sum()
    norm = torch.stack([last.abs().float().sum() for _, last in pairs]).sum()
    return torch.where(distance == 0, distance, distance / norm).item()
