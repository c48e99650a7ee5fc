"""Runs one step: as a schedule decides, or as a probe decides on the way. The state of a stream is its argument."""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from skipdit.cache import changes
from skipdit.cache.compiled import Call
from skipdit.cache.conditions import read
from skipdit.cache.gates import Gate
from skipdit.cache.methods import CacheMethod
from skipdit.cache.predictor import Ahead, Derivatives, Values
from skipdit.cache.ranks import all_reduce_max
from skipdit.cache.schedule import Decision, Schedule
from skipdit.cache.site import linked_model, links_of
from skipdit.cache.whole import is_output
from skipdit.interfaces import ModelOutput
from skipdit.models.costs import Costs
from skipdit.models.forward_plan import ForwardPlan, Question, Region, Stored, Units

Derived = dict[str, Derivatives]  # by the name of a region
StepResult = tuple[ModelOutput, tuple[Region, ...]]  # the model's output, and the regions that were reused
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
    trail: tuple[Region, ...] = ()
    """The regions of the method's `trail`; empty if the number of steps tells how far to extrapolate."""

    @property
    def schedule(self) -> Schedule:
        return self.method.schedule

    def seen(self, call: Call, stored: Stored) -> Stored:
        """Return the values of the probe. stored: what the call has stored so far."""
        values = {region.name: stored[region.name] for region in self.probe if region.name in stored}
        probe = self.method.probe
        return values if probe is None else {**values, **probe.values(call)}

    def passed(self, stored: Stored) -> Stored:
        """Return the values of the trail."""
        return {region.name: stored[region.name] for region in self.trail if region.name in stored}


def rules_on(method: CacheMethod, model: nn.Module) -> list[CacheRule]:
    """Return the rules of a method for which this model has a site; raises `ValueError` if there are none."""
    rules = []
    for rule in method.rules:
        regions = rule.site.regions(model)
        if regions:
            rule.schedule.for_cost(Costs.at_best(model).of_step(regions[:1]))  # raises if out of reach
            probe = rule.probe.regions(model) if rule.probe is not None else ()
            trail = rule.trail.regions(model) if rule.trail is not None else ()
            if rule.schedule.num_variants > len(regions):
                raise ValueError(
                    f"variants of a schedule must be below {len(regions)}, the number of its num_shallow_units, got "
                    f"{rule.schedule.num_variants - 1}"
                )
            rules.append(CacheRule(dataclasses.replace(rule, others=()), regions, probe, trail))
    if len(rules) > 1 and any(region.is_whole for rule in rules for region in rule.regions):
        raise ValueError("a rule for the whole model leaves nothing to other rules")
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
    probe: Stored = field(default_factory=dict)
    """The probe of the last full step, or of the last step, as the schedule says."""
    marks: tuple[Stored, ...] = ()
    """Values of the last full steps, the last one first, from which changes are estimated: the probe for a rate, or the
    trail."""
    rate: Tensor | None = None
    """The rate at which the stored values have changed with the probe, between the last two full steps."""
    spacing: int = 1
    """Distance between the last two full steps."""
    full_levels: tuple[float, ...] = ()
    """Noise levels of the last full steps, the last one first."""

    @classmethod
    def of(cls, rule: CacheRule) -> "RuleState":
        return cls(rule.schedule.gate())

    @property
    def tensors(self) -> list[Tensor]:
        derivatives = (values for orders in self.stored.values() for values in orders)
        seen = (values for stored in (self.probe, *self.marks) for values in stored.values())
        rate = [] if self.rate is None else [self.rate]
        return [*rate, *(tensor for values in (*derivatives, *seen) for tensor in values.values())]

    def may_reuse(self, rule: CacheRule, stream: "StepState") -> bool:
        """Return true if the next step may reuse, as far as is known before any of it has run."""
        ready = self.gate is None or self.gate.opens(len(stream.coming) or None)
        return ready and bool(self.stored) and not (rule.schedule.at_rate and self.rate is None)

    def accepts(self, rule: CacheRule, call: Call, probe: Stored, trail: Stored) -> tuple[bool, float | None]:
        """Return whether a step reuses, given its probe, and how far to extrapolate, `None` for the number of steps.
        Waits for the device once."""
        assert self.gate is not None
        if rule.schedule.at_rate:
            assert self.rate is not None
            change = changes.change_at_rate(probe, self.probe, self.rate)
        else:
            change = changes.relative_change(probe, self.probe)
        if len(self.marks) == 2:
            number, pace = read([change, changes.pace_of(trail, *self.marks)])
            distance = (pace - 1) * self.spacing
        else:
            (number,), distance = read([change]), 0.0 if rule.trail else None
        return self.gate.accepts(all_reduce_max(number, call.model)), distance

    def keep(self, rule: CacheRule, stored: Stored, probe: Stored) -> None:
        """Keep the values of the rule's regions that a full step stored, and what estimates need of it."""
        fresh = {region.name: stored[region.name] for region in rule.regions if stored.get(region.name)}
        predictor = rule.method.predictor
        if rule.schedule.at_rate and self.stored and self.marks:
            before = {name: derivatives[0] for name, derivatives in self.stored.items()}
            self.rate = changes.rate_of_change(_outputs(fresh), _outputs(before), probe, self.marks[0])
        if rule.schedule.at_rate:
            self.marks = (probe,)
        elif rule.trail:
            self.marks = (rule.passed(stored), *self.marks)[:2]
        self.stored = {
            name: predictor.update(self.stored.get(name, ()), values, self.steps_since_full)
            for name, values in fresh.items()
        }
        self.spacing = max(self.steps_since_full, 1)

    def predict(
        self, rule: CacheRule, region: Region, levels: Sequence[float], distance: float | None = None
    ) -> Values:
        """Return the values of a region at the next step, whose noise level is the last of `levels`. distance: how
        far to extrapolate, in steps from the last full one; by default to this step."""
        distance = self.steps_since_full if distance is None else distance
        stride = levels[-2] - levels[-1] if len(levels) > 1 else 0.0
        ahead = Ahead(distance, self.spacing, levels[-1], stride, self.full_levels)
        return rule.method.predictor.predict(self.stored[region.name], ahead)

    def look(self, rule: CacheRule, probe: Stored, *, full: bool) -> None:
        """Keep the probe of a step that has run for comparisons."""
        if full or rule.schedule.follows_each_step:
            self.probe = probe

    def count(self, rule: CacheRule, level: float, *, full: bool) -> None:
        self.steps_since_full = 1 if full else self.steps_since_full + 1
        if full:
            self.full_levels = (level, *self.full_levels)[: rule.method.predictor.order + 1]
        if not rule.schedule.stores(level):
            self.stored, self.full_levels = {}, ()
        if self.gate is not None:
            self.gate.advance(full=full)


def _outputs(stored: Stored) -> Stored:
    return {name: {key: value for key, value in values.items() if is_output(key)} for name, values in stored.items()}


class StepState(Protocol):
    """The fields of a stream that a stepper needs, see `skipdit.cache.streams.Stream`."""

    states: list[RuleState]
    passed: list[float]
    levels: list[float]
    coming: list[float]
    costs: Costs | None


class Stepper(Protocol):
    """Runs the steps of a cached model."""

    rules: list[CacheRule]

    def step(self, call: Call, stream: StepState) -> StepResult:
        """Run the next step of a stream; return the model's output, and the regions that were reused."""
        ...


class ScheduledSteps:
    """Steps that are decided before they run: by a static schedule, or from the values of earlier steps."""

    def __init__(self, model: nn.Module, rules: list[CacheRule]) -> None:
        self.rules = rules
        self.links = links_of(model)
        self.plans: dict[tuple[Decision, ...], ForwardPlan] = {}
        self.schedules: dict[tuple[int, Costs | None], Schedule] = {}
        self.decided: dict[tuple[int, Costs | None, tuple[float, ...], bool], list[Decision]] = {}

    def step(self, call: Call, stream: StepState) -> StepResult:
        states = stream.states
        probes = [rule.seen(call, {}) for rule in self.rules]
        decisions = self.decisions(call, stream, probes)
        plan = self.plan_of(decisions)
        reused: Stored | None = None
        if plan.reuse:
            reused = {}
            for rule, state, decision in zip(self.rules, states, decisions, strict=True):
                if decision is not None:
                    region = rule.regions[decision]
                    reused[region.name] = state.predict(rule, region, stream.levels)
        output, stored = call(plan, reused)
        for rule, state, probe, decision in zip(self.rules, states, probes, decisions, strict=True):
            full = decision is None
            if full:
                if state.gate is not None and state.gate.schedule.observes and state.stored:
                    now = {name: stored[name] for name in state.stored}
                    before = {name: derivatives[0] for name, derivatives in state.stored.items()}
                    change = all_reduce_max(relative_change_number(now, before), call.model)
                    state.gate.observe(change, state.steps_since_full)
                state.keep(rule, stored, probe)
            if state.gate is not None:
                state.look(rule, probe, full=full)
            state.count(rule, stream.levels[-1], full=full)
        return output, plan.reuse

    def decisions(self, call: Call, stream: StepState, probes: list[Stored]) -> tuple[Decision, ...]:
        """Return the decision of each rule. A rule does not reuse if it has nothing stored, or if a later rule leaves
        out some of its units."""
        decisions: list[Decision] = []
        left_out: set[int] = set()
        for index in reversed(range(len(self.rules))):
            rule, state = self.rules[index], stream.states[index]
            decision = self._decide(index, call, stream, probes[index]) if state.may_reuse(rule, stream) else None
            if decision is not None and len(self.rules) > 1 and rule.regions[decision].bounds is not None:
                units = set(rule.regions[decision].covered)
                decision = None if units & left_out else decision
                left_out |= units
            decisions.append(decision)
        return tuple(reversed(decisions))

    def _decide(self, index: int, call: Call, stream: StepState, probe: Stored) -> Decision:
        rule, state = self.rules[index], stream.states[index]
        if not all(map(call.can_reuse, rule.regions)):
            return None
        if state.gate is not None:
            return 0 if not probe or state.accepts(rule, call, probe, {})[0] else None
        passed = [] if rule.schedule.counts_own_steps else stream.passed
        whole = (*passed, *stream.levels, *stream.coming[1:])
        key = index, stream.costs, whole, bool(stream.coming)
        decided = self.decided.get(key)
        if decided is None:
            if len(self.decided) > MAX_DECIDED:
                self.decided.clear()
            decided = self.decided[key] = self.schedule_of(index, stream.costs).decisions(
                whole, whole=bool(stream.coming)
            )
        return decided[len(passed) + len(stream.levels) - 1]

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
        seen = [*rule.probe, *rule.trail]
        if any(unit >= region.start for probe in seen for unit in probe.covered):
            raise ValueError(
                f"a probe must be taken before unit {region.start}, the first that is left out, got "
                f"{', '.join(map(str, seen))}"
            )
        links = linked_model(model).long_skip_links
        self.region, self.head = region, Units(start=0, stop=region.start)
        self.full = ForwardPlan.of(links, store=(*seen, region), asks_at=region.start)
        self.reuse_rest = ForwardPlan.of(links, reuse=(region,))
        self.reuse = ForwardPlan.of(links, store=(*seen, self.head), reuse=(region,))
        self.rest = ForwardPlan.of(links, store=(region,), reuse=(self.head,))
        self.end = ForwardPlan.of(links, reuse=(self.head, region))

    def step(self, call: Call, stream: StepState) -> StepResult:
        (rule,), (state,) = self.rules, stream.states
        full = True
        if not state.may_reuse(rule, stream):
            output, stored = call(self.full)
        elif call.is_compiled:
            full, output, stored = self._compiled(call, rule, state, stream.levels)
        else:
            answers: list[bool] = []
            reused: dict[str, Values] = {}

            def ask(stored: Stored) -> bool:
                accepted, distance = state.accepts(rule, call, rule.seen(call, stored), rule.passed(stored))
                if accepted:
                    reused[self.region.name] = state.predict(rule, self.region, stream.levels, distance)
                answers.append(accepted)
                return accepted

            question = Question(ask, self.reuse_rest, reused)
            output, stored = call(dataclasses.replace(self.full, question=question))
            full = True not in answers
        probe = rule.seen(call, stored)
        if full:
            state.keep(rule, stored, probe)  # nothing, if the caller left out the block of the probe
        state.look(rule, probe, full=full)
        state.count(rule, stream.levels[-1], full=full)
        return output, () if full else (self.region,)

    def _compiled(
        self, call: Call, rule: CacheRule, state: RuleState, levels: Sequence[float]
    ) -> tuple[bool, ModelOutput, Stored]:
        """Run a step of a compiled model, whose noise level is the last of `levels`; return whether it is full, its
        output, and what it stores."""
        held = state.predict(rule, self.region, levels, 0.0 if rule.trail else None)
        output, stored = call(self.reuse, {self.region.name: held})
        accepted, distance = state.accepts(rule, call, rule.seen(call, stored), rule.passed(stored))
        head = {self.head.name: stored[self.head.name]}
        if not accepted:
            output, rest = call(self.rest, head)
            return True, output, {**stored, **rest}
        if rule.trail and distance:  # how far to extrapolate is known only now
            predicted = state.predict(rule, self.region, levels, distance)
            output, _ = call(self.end, {**head, self.region.name: predicted})
        return False, output, stored


class MeasuringStepper:
    """Runs every step in full and stores the values of some regions, for measurements. Abstract."""

    def __init__(self, model: nn.Module, rules: list[CacheRule], store: Iterable[Region]) -> None:
        self.rules, self.links = rules, links_of(model)
        self.full = ForwardPlan.of(self.links, store=store)

    def step(self, call: Call, stream: StepState) -> StepResult:
        output, stored = call(self.full)
        return self.measure(call, stream, output, stored), ()

    def measure(self, call: Call, stream: StepState, output: ModelOutput, stored: Stored) -> ModelOutput:
        """Measure the last of `stream.levels`, which has run; return the output to use for it."""
        raise NotImplementedError


def make_stepper(model: nn.Module, rules: list[CacheRule]) -> Stepper:
    return ProbedSteps(model, rules) if rules[0].probe else ScheduledSteps(model, rules)


def relative_change_number(stored: Stored, before: Stored) -> float:
    """Return `changes.relative_change` as a number; waits for the device once."""
    return changes.relative_change(stored, before).item()
