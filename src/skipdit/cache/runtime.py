"""Runs each call of a cached model as a full or a reuse step.

The decision is made outside whatever `model.compile()` compiled: a step runs one of two whole graphs.

State belongs to a run, never to the model: `skipdit.cache.streams` has the one rule for what a run is.
"""

import dataclasses
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipdit.cache.methods import CacheMethod
from skipdit.cache.predictor import Values
from skipdit.cache.ranks import agreed
from skipdit.cache.schedule import AdaptiveSchedule, Decision, ExplicitSchedule, resolve
from skipdit.cache.site import step_cost
from skipdit.cache.state import CacheSummary, PartState
from skipdit.cache.streams import Run, Stream, Streams
from skipdit.models.flow import Portion, Step, Units
from skipdit.models.long_skip import LongSkipModel, LongSkipOutput

# of one forward torch.compile makes 8 graphs by default; here each kind of step has one for each kind of shapes
MAX_GRAPHS = 64


@dataclass(frozen=True)
class Part:
    """One choice of a method on one model: the portion of each variant, and what its adaptive schedule looks at."""

    method: CacheMethod
    portions: tuple[Portion, ...]
    probe: tuple[Portion, ...]


def parts_on(method: CacheMethod, model: nn.Module) -> list[Part]:
    """The choices of a method that this model has a site for; `ValueError` where it has none."""
    parts = []
    for each in method.parts:
        portions = each.site.portions(model)
        if portions:
            schedule = each.schedule.for_cost(step_cost(model, portions[:1]))
            probe = each.probe.portions(model) if each.probe is not None else ()
            num_variants = schedule.num_variants if isinstance(schedule, ExplicitSchedule) else 1
            if num_variants > len(portions):
                raise ValueError(
                    f"variants of a schedule must be below {len(portions)}, the number of its num_shallow_units, got "
                    f"{num_variants - 1}"
                )
            parts.append(Part(dataclasses.replace(each, schedule=schedule, others=()), portions, probe))
    if not parts:
        raise ValueError(f"{type(model).__name__} has nothing that {method} could reuse")
    return parts


@dataclass(frozen=True, kw_only=True)
class ProbedSteps:
    """How a part steps that looks at the first units before it decides. reuse: runs these, the `head`, and reuses the
    others; rest: takes the head's result from there and runs the others."""

    head: Units
    full: Step
    reuse: Step
    rest: Step
    reuse_cost: float

    @classmethod
    def of(cls, part: Part, model: nn.Module) -> "ProbedSteps":
        portion, *others = part.portions
        if others or not isinstance(portion, Units) or portion.start == 0:
            raise ValueError(
                "a probe is seen in the first units, before the decision, so what is reused must be units behind them "
                f"(Stack, DeepFeatures of one number of units, UnitRange), got {', '.join(map(str, part.portions))}"
            )
        head = Units(start=0, stop=portion.start)
        return cls(
            head=head,
            full=Step(store=(portion, *part.probe)),
            reuse=Step(store=(head, *part.probe), reuse=(portion,)),
            rest=Step(store=(portion,), reuse=(head,)),
            reuse_cost=step_cost(model, (portion,)),
        )


class CacheRuntime:
    """The cache of one model. opened: whether its units were opened for the cache alone."""

    def __init__(self, model: nn.Module, method: CacheMethod, *, opened: bool = False) -> None:
        self.method = method
        self.parts = parts_on(method, model)
        self.opened = opened
        self.model_name = type(model).__name__
        self.num_units = cast(LongSkipModel, model).long_skip_links.num_units
        self.timestep_scale = cast(LongSkipModel, model).timestep_scale
        self.steps: dict[tuple[Decision, ...], tuple[Step, float]] = {}
        self.probed = ProbedSteps.of(self.parts[0], model) if self.parts[0].probe else None
        self.reset()

    def reset(self) -> None:
        self.lock = threading.RLock()  # one step at a time: threads take turns
        self.streams = Streams(self._start, self._check_reuses, self.timestep_scale)
        self.peak_bytes_held = 0

    def _start(self) -> list[PartState]:
        return [PartState(part.method.schedule.walk()) for part in self.parts]

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or in a file: it caches in the same way and shares no state."""
        return {name: value for name, value in vars(self).items() if name not in ("lock", "streams")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CacheRuntime":
        """Copied with its pipeline, it watches the copied pipeline's scheduler."""
        copy = object.__new__(type(self))
        copy.__setstate__(self.__getstate__())
        for pipeline in self.streams.pipelines:
            if id(pipeline) in memo:
                copy.streams.pipelines.add(memo[id(pipeline)])
        return copy

    # ------------------------------------------------------------------------------------------------------------------
    # One call

    def call(self, model: nn.Module, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if model.training:
            raise RuntimeError("a cache serves inference: call model.eval(), or skipdit.disable_cache(model) to train")
        return_dict = kwargs.pop("return_dict", True)
        names, conditions = arguments_of(type(model))
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if not arguments.keys() >= {"hidden_states", "timestep"}:
            inspect.signature(type(model).forward).bind(model, *args, **kwargs)  # raises
        given = {name: arguments.get(name, default) for name, default in conditions.items()}
        with self.lock:
            run, stream = self.streams.next(arguments["timestep"], arguments["hidden_states"], given)
            try:
                sample = self._call(model, call, args, kwargs, stream, run.level)
            except BaseException:
                self.streams.drop([run])
                raise
            self._warn_unless_reused(run)
        return LongSkipOutput(sample=sample) if return_dict else (sample,)

    def _call(
        self,
        model: nn.Module,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        stream: Stream,
        level: float,
    ) -> Tensor:
        compiled = model._compiled_call_impl is not None

        def forward(step: Step, given: Values | None = None) -> tuple[Tensor, dict[str, Tensor]]:
            if not compiled:
                output = call(*args, **kwargs, step=step, stored=given)
                return output.sample, {key: value.detach() for key, value in (output.stored or {}).items()}
            replays = _may_replay(stream.layout[2])
            if replays:
                torch.compiler.cudagraph_mark_step_begin()
            with nullcontext() if step in stream.compiled else _more_graphs():
                output = call(*args, **kwargs, step=step, stored=given)
            stream.compiled.add(step)
            stored = {key: value.detach() for key, value in (output.stored or {}).items()}
            if not replays:
                return output.sample, stored
            # buffers of their own: the graph overwrites its outputs on the next replay
            return output.sample.clone(), {key: value.clone() for key, value in stored.items()}

        return self.make_step(model, forward, stream, level)

    def make_step(self, model: nn.Module, forward: Callable[..., Any], stream: Stream, timestep: float) -> Tensor:
        """Runs one step, in full or not, and counts it."""
        if self.probed is not None:
            return self._probed_step(self.probed, model, forward, stream, timestep)
        decisions = self._decisions(stream, timestep)
        step, cost = self._step_for(model, decisions)
        given = None
        if step.reuse:
            given = {}
            for part, state, decision in zip(self.parts, stream.states, decisions, strict=True):
                if decision is not None:
                    values = state.stored
                    if len(part.portions) > 1:
                        values = tuple(_of(each, (part.portions[decision],)) for each in values)
                    given |= part.method.predictor.predict(values, state.steps_since_full)
        sample, stored = forward(step, given)
        for part, state, decision in zip(self.parts, stream.states, decisions, strict=True):
            if decision is None:
                _keep(part, state, stored, timestep, model)
            self._count(state, timestep, full=decision is None)
        if step.store:
            self.peak_bytes_held = max(self.peak_bytes_held, self.streams.bytes_held)
        stream.num_full += not step.reuse
        stream.num_reused += bool(step.reuse)
        stream.cost += cost
        return sample

    def _decisions(self, stream: Stream, timestep: float) -> tuple[Decision, ...]:
        """Of each part; one does not reuse where a later one leaves out some of its units."""
        if len(self.parts) == 1:
            return (stream.states[0].decide(timestep),)
        decisions: list[Decision] = []
        left_out: set[int] = set()
        for part, state in reversed(list(zip(self.parts, stream.states, strict=True))):
            decision = state.decide(timestep)
            if decision is not None and part.portions[decision].bounds is not None:
                units = set(part.portions[decision].covered)
                decision = None if units & left_out else decision
                left_out |= units
            decisions.append(decision)
        return tuple(reversed(decisions))

    def _step_for(self, model: nn.Module, decisions: tuple[Decision, ...]) -> tuple[Step, float]:
        """What parts store that are full, and take that reuse; a part some of whose units are left out for another
        stores nothing. The same object for the same decisions, so that a compiled model sees few."""
        if decisions not in self.steps:
            pairs = list(zip(self.parts, decisions, strict=True))
            reuse = tuple(part.portions[decision] for part, decision in pairs if decision is not None)
            left_out = {unit for unit in range(self.num_units) if any(each.leaves_out(unit) for each in reuse)}
            fresh = [portion for part, decision in pairs if decision is None for portion in part.portions]
            store = tuple(portion for portion in fresh if not left_out & set(portion.covered))
            self.steps[decisions] = Step(store=store, reuse=reuse), step_cost(model, reuse)
        return self.steps[decisions]

    def _probed_step(
        self,
        steps: ProbedSteps,
        model: nn.Module,
        forward: Callable[..., Any],
        stream: Stream,
        timestep: float,
    ) -> Tensor:
        """A step that reuses unless what it sees on the way has changed too much; then the units that it left out run,
        behind those that have run."""
        (part,), (state,) = self.parts, stream.states
        full, cost = True, 1.0
        if not state.stored:
            sample, stored = forward(steps.full)
        else:
            given = part.method.predictor.predict(state.stored, state.steps_since_full)
            sample, stored = forward(steps.reuse, given)
            change = agreed(relative_change(_of(stored, part.probe), state.probe), model)
            full = not state.walker.accepts(change)
            if full:
                sample, behind = forward(steps.rest, _of(stored, (steps.head,)))
                stored |= behind
            else:
                cost = steps.reuse_cost
        if full:
            values = _of(stored, part.portions)
            # a unit without the block that is looked at stores nothing
            state.stored = part.method.predictor.update(state.stored, values, state.steps_since_full) if values else ()
        if full or cast(AdaptiveSchedule, part.method.schedule).follows_each_step:
            state.probe = _of(stored, part.probe)
        self._count(state, timestep, full=full)
        self.peak_bytes_held = max(self.peak_bytes_held, self.streams.bytes_held)
        stream.num_full += full
        stream.num_reused += not full
        stream.cost += cost
        return sample

    @staticmethod
    def _count(state: PartState, timestep: float, *, full: bool) -> None:
        state.steps_since_full = 1 if full else state.steps_since_full + 1
        if not state.walker.stores(timestep):
            state.stored = ()
        state.walker.advance(timestep, full=full)

    def _check_reuses(self, levels: list[float]) -> None:
        """`ValueError` where a run of several steps, of these noise levels, would never reuse."""
        if self.method.may_stay_full or self.method.schedule.is_adaptive or len(levels) < 2:
            return
        if all(all(resolve(part.method.schedule, levels)) for part in self.parts):
            raise ValueError(f"cache {self.method} would never reuse in {len(levels)} steps")

    def _warn_unless_reused(self, run: Run) -> None:
        """At the last step of a run whose adaptive schedule has never reused."""
        if len(run.coming) != 1 or not self.method.schedule.is_adaptive or self.method.may_stay_full:
            return
        steps = max(stream.counts.full for stream in run.streams)
        if not (run.warned or self.streams.counts.reused) and steps > 1:
            run.warned = True
            warnings.warn(
                f"cache {self.method} has not reused once in {steps} steps: raise its threshold", stacklevel=3
            )

    # ------------------------------------------------------------------------------------------------------------------
    # The end of a run, and what is said about it

    def end_runs(self) -> None:
        """Drops what this thread's runs in the current context hold; their counts stay for the summary."""
        with self.lock:
            self.streams.end()

    def summary(self) -> CacheSummary:
        counts = self.streams.counts
        return CacheSummary(
            method=str(self.method),
            model=self.model_name,
            num_units=self.num_units,
            reused=tuple(str(portion) for part in self.parts for portion in part.portions),
            steps_full=counts.full,
            steps_reused=counts.reused,
            compute_ratio=(counts.full + counts.reused) / counts.cost if counts.cost else 1.0,
            bytes_held=self.streams.bytes_held,
            peak_bytes_held=self.peak_bytes_held,
        )


@lru_cache
def arguments_of(model_class: type[nn.Module]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of a forward's arguments, and the defaults of those that may tell one stream of calls from another.
    Of the class: what a hook leaves on the instance may have the signature of an unbound function."""
    _, *parameters = inspect.signature(model_class.forward).parameters.values()
    others = ("hidden_states", "timestep", "return_dict", "step", "stored")
    conditions = {each.name: each.default for each in parameters if each.name not in others}
    return tuple(each.name for each in parameters), conditions


def _may_replay(device: torch.device) -> bool:
    """Whether what is compiled for this device may have become a CUDA graph."""
    return device.type == "cuda"


@contextmanager
def _more_graphs() -> Iterator[None]:
    config: Any = torch._dynamo.config
    before = config.cache_size_limit  # torch 2.6 has only this name
    config.cache_size_limit = max(before, MAX_GRAPHS)
    try:
        yield
    finally:
        config.cache_size_limit = before


def _of(values: Values, portions: tuple[Portion, ...]) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if any(portion.owns(key) for portion in portions)}


def _keep(part: Part, state: PartState, stored: Values, timestep: float, model: nn.Module) -> None:
    """What a full step of this part has stored becomes its own."""
    values = _of(stored, part.portions)
    if not values or not state.walker.stores(timestep):
        state.stored = ()
        return
    if state.stored and part.method.schedule.is_adaptive:
        change = agreed(relative_change(values, state.stored[0]), model)
        state.walker.observe(change, state.steps_since_full)
    state.stored = part.method.predictor.update(state.stored, values, state.steps_since_full)


def relative_change(values: Values, before: Values) -> float:
    """L1 distance of two sets of values over the L1 norm of the second, 0 where equal. Waits for the device."""
    distance = sum((values[key] - before[key]).abs().float().sum() for key in values)
    norm = sum(before[key].abs().float().sum() for key in values)
    return 0.0 if distance == 0 else float(distance / norm)
