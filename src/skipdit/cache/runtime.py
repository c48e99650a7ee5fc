"""Runs each call of a cached model as a full or a reuse step.

The decision is made outside whatever `model.compile()` compiled: a step runs one of two whole graphs.

State belongs to a run, never to the model: a `Trajectory` a context and a stream of calls, kept until the run ends.
"""

import dataclasses
import inspect
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipdit.cache.methods import CacheMethod
from skipdit.cache.predictor import Values
from skipdit.cache.ranks import agreed
from skipdit.cache.schedule import AdaptiveSchedule, Decision, ExplicitSchedule, resolve
from skipdit.cache.site import step_cost
from skipdit.cache.state import CacheSummary, Conditions, Counts, PartState, Place, Run, Trajectory
from skipdit.models.flow import Portion, Step, Units
from skipdit.models.long_skip import LongSkipModel, LongSkipOutput

_context: ContextVar[tuple[str, ...]] = ContextVar("skipdit_cache_context", default=())
_branch: ContextVar[tuple[str, ...]] = ContextVar("skipdit_cache_branch", default=())

# more calls than this at one timestep are not guidance branches but a loop that the cache misunderstands; nor is more
# of one run kept
MAX_STREAMS = 16
# so many runs of one step each, one after the other, are not runs but timesteps that rise
MAX_SINGLE_STEPS = 4
# of more contexts than this the least recently called are dropped
MAX_RUNS = 64
# of one forward torch.compile makes 8 graphs by default; here each kind of step has one for each kind of shapes
MAX_GRAPHS = 64


@contextmanager
def cache_context(name: str) -> Iterator[None]:
    """Calls inside belong to the run or guidance branch `name`, apart from all others. Contexts nest.

    Needed only where one model serves runs that take turns at different timesteps; a pipeline of ours enters one by
    itself, and guidance branches that are called one after the other at the same timestep are told apart without it.
    """
    with _entered(_context, name):
        yield


def branch_context(name: str) -> AbstractContextManager[None]:
    """Calls inside are a branch of the current run, apart from its others, and end with it."""
    return _entered(_branch, name)


@contextmanager
def _entered(names: ContextVar[tuple[str, ...]], name: str) -> Iterator[None]:
    token = names.set((*names.get(), name))
    try:
        yield
    finally:
        names.reset(token)


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
        # of the class: what a hook leaves on the instance may have the signature of an unbound function
        self.signature = inspect.signature(MethodType(type(model).forward, model))
        self.argument_names = tuple(self.signature.parameters)
        self.defaults = {
            name: parameter.default
            for name, parameter in self.signature.parameters.items()
            if name not in ("hidden_states", "timestep", "return_dict", "step", "stored")
        }
        self.pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
        self.steps: dict[tuple[Decision, ...], tuple[Step, float]] = {}
        self.probed = ProbedSteps.of(self.parts[0], model) if self.parts[0].probe else None
        self.reset()

    def reset(self) -> None:
        # by context, and by branch where the model's own `cache_context` names it
        self.runs: dict[tuple[tuple[str, ...], tuple[str, ...]], Run] = {}
        self.timesteps: dict[int, tuple[Tensor, list[float]]] = {}
        self.num_calls, self.num_single_steps = 0, 0
        self.ended_at, self.ended_counts = 0, Counts()
        self.peak_bytes_held = 0

    def __deepcopy__(self, memo: dict) -> "CacheRuntime":
        """A copied model caches in the same way and shares no state."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.pipelines = weakref.WeakSet(memo[id(each)] for each in self.pipelines if id(each) in memo)
        copy.reset()
        return copy

    # ------------------------------------------------------------------------------------------------------------------
    # One call

    def call(self, model: nn.Module, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if model.training:
            raise RuntimeError("a cache serves inference: call model.eval(), or skipdit.disable_cache(model) to train")
        return_dict = kwargs.pop("return_dict", True)
        arguments = dict(zip(self.argument_names, args, strict=False)) | kwargs
        if not arguments.keys() >= {"hidden_states", "timestep"}:
            self.signature.bind(*args, **kwargs)  # raises
        place = self._locate(arguments["timestep"])
        trajectory = self._trajectory(arguments, place)
        compiled = model._compiled_call_impl is not None

        def forward(step: Step, given: Values | None = None) -> tuple[Tensor, dict[str, Tensor]]:
            if not compiled:
                output = call(*args, **kwargs, step=step, stored=given)
                return output.sample, {key: value.detach() for key, value in (output.stored or {}).items()}
            replays = _may_replay(arguments["hidden_states"])
            if replays:
                torch.compiler.cudagraph_mark_step_begin()
            with nullcontext() if step in trajectory.compiled else _more_graphs():
                output = call(*args, **kwargs, step=step, stored=given)
            trajectory.compiled.add(step)
            stored = {key: value.detach() for key, value in (output.stored or {}).items()}
            if not replays:
                return output.sample, stored
            # buffers of their own: the graph overwrites its outputs on the next replay
            return output.sample.clone(), {key: value.clone() for key, value in stored.items()}

        sample = self.make_step(model, forward, trajectory, place.timestep)
        if place.coming is not None and len(place.coming) == 1:
            self._check_reused()
        return LongSkipOutput(sample=sample) if return_dict else (sample,)

    def make_step(
        self, model: nn.Module, forward: Callable[..., Any], trajectory: Trajectory, timestep: float
    ) -> Tensor:
        """Runs one step, in full or not, and counts it."""
        if self.probed is not None:
            return self._probed_step(self.probed, model, forward, trajectory, timestep)
        decisions = self._decisions(trajectory, timestep)
        step, cost = self._step_for(model, decisions)
        given = None
        if step.reuse:
            given = {}
            for part, state, decision in zip(self.parts, trajectory.states, decisions, strict=True):
                if decision is not None:
                    values = state.stored
                    if len(part.portions) > 1:
                        values = tuple(_of(each, (part.portions[decision],)) for each in values)
                    given |= part.method.predictor.predict(values, state.steps_since_full)
        sample, stored = forward(step, given)
        for part, state, decision in zip(self.parts, trajectory.states, decisions, strict=True):
            if decision is None:
                _keep(part, state, stored, timestep, model)
            self._count(state, timestep, full=decision is None)
        if step.store:
            self.peak_bytes_held = max(self.peak_bytes_held, self.bytes_held)
        trajectory.num_full += not step.reuse
        trajectory.num_reused += bool(step.reuse)
        trajectory.cost += cost
        return sample

    def _decisions(self, trajectory: Trajectory, timestep: float) -> tuple[Decision, ...]:
        """Of each part; one does not reuse where a later one leaves out some of its units."""
        if len(self.parts) == 1:
            return (trajectory.states[0].decide(timestep),)
        decisions: list[Decision] = []
        left_out: set[int] = set()
        for part, state in reversed(list(zip(self.parts, trajectory.states, strict=True))):
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
        trajectory: Trajectory,
        timestep: float,
    ) -> Tensor:
        """A step that reuses unless what it sees on the way has changed too much; then the units that it left out run,
        behind those that have run."""
        (part,), (state,) = self.parts, trajectory.states
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
        self.peak_bytes_held = max(self.peak_bytes_held, self.bytes_held)
        trajectory.num_full += full
        trajectory.num_reused += not full
        trajectory.cost += cost
        return sample

    @staticmethod
    def _count(state: PartState, timestep: float, *, full: bool) -> None:
        state.steps_since_full = 1 if full else state.steps_since_full + 1
        if not state.walker.stores(timestep):
            state.stored = ()
        state.walker.advance(timestep, full=full)

    def _locate(self, timestep: Tensor) -> Place:
        """The value of a call's timestep, and its place in the list of a watched scheduler.

        A pipeline hands on a view of its scheduler's `timesteps`: then the value is known without asking the device.
        """
        schedulers = [pipeline.scheduler for pipeline in self.pipelines] if self.pipelines else []
        for known in [scheduler.timesteps for scheduler in schedulers]:
            one_entry = timestep.numel() == 1 or max(timestep.stride()) == 0
            if one_entry and timestep.untyped_storage().data_ptr() == known.untyped_storage().data_ptr():
                index = timestep.storage_offset() - known.storage_offset()
                coming = self._values(known)[index:]
                return Place(coming[0], known, coming, index)
        values = timestep if timestep.numel() == 1 else timestep.unique()
        if values.numel() != 1:
            raise ValueError(
                f"a cached call needs one timestep for the whole batch, got {values.tolist()}: "
                "call skipdit.disable_cache(model), or split the batch"
            )
        value = values.item()
        # 0.7 in float32 is a timestep of 700, not of 699.99999
        value = value if self.timestep_scale == 1 else round(value * self.timestep_scale, 3)
        # some of diffusers hand on a copy of their timesteps, in the dtype of the latents; the latest list has it. A
        # scheduler that has not been set up lists every timestep that there is
        lists = [each.timesteps for each in schedulers if getattr(each, "num_inference_steps", None) is not None]
        if not lists:
            return Place(value)
        for known in lists:
            self._values(known)
        tolerance = 0.01 + (value * torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0)
        for known, entries in self.timesteps.values():
            if all(known is not each for each in lists):
                continue
            index = min(range(len(entries)), key=lambda each: abs(entries[each] - value), default=None)
            if index is not None and abs(entries[index] - value) < tolerance:
                return Place(entries[index], known, entries[index:])  # not rounded to the latents' dtype
        return Place(value)

    def _values(self, known: Tensor) -> list[float]:
        """A scheduler's timesteps as numbers, read once a run."""
        entry = self.timesteps.get(id(known))
        if entry is None:
            entry = known, known.tolist()
            self.timesteps = {id(known): entry} | dict(itertools.islice(self.timesteps.items(), 7))
        return entry[1]

    def _check_reuses(self, timesteps: list[float]) -> None:
        """`ValueError` where a run of these timesteps would never reuse."""
        if self.method.may_stay_full or self.method.schedule.is_adaptive:
            return
        if all(all(resolve(part.method.schedule, timesteps)) for part in self.parts):
            raise ValueError(f"cache {self.method} would never reuse in {len(timesteps)} steps")

    def _check_reused(self) -> None:
        """`ValueError` at the last step of a run in which an adaptive schedule has never reused."""
        counts = self.counts
        if self.method.schedule.is_adaptive and not self.method.may_stay_full and not counts.reused:
            raise ValueError(f"cache {self.method} has not reused once in {counts.full} steps: raise its threshold")

    def _trajectory(self, arguments: Mapping[str, Any], place: Place) -> Trajectory:
        """The trajectory that this call continues, or a new one.

        A new run starts where the scheduler has new timesteps or the timestep rises. Within it, calls with other labels
        or text states are another trajectory (a guidance branch), and so is a second call at the same timestep with
        other latents (a run in lockstep).
        """
        key = _context.get(), _branch.get()
        run = self.runs.pop(key, None)
        if run is None or not run.goes_on(place):
            if place.coming is not None:
                self._check_reuses(place.coming)
            self._watch_rising(run, place)
            self._drop_broken(key[0], place)
            run = Run(place)
        else:
            run.moves_to(place)
        self.runs[key] = run  # the last called stands last
        if len(self.runs) > MAX_RUNS:
            del self.runs[next(iter(self.runs))]
        self.num_calls += 1
        run.last_call = self.num_calls

        latents = arguments["hidden_states"]
        tensors, options = [], []
        for name, default in self.defaults.items():
            value = arguments.get(name, default)
            if isinstance(value, Tensor):
                tensors.append(value)
            elif _is_choice(value):
                options.append((name, value))
        conditions = Conditions(tensors, options)
        layout = (latents.shape, latents.dtype, latents.device)
        trajectory = run.find(latents, layout, conditions)
        if trajectory is None:
            if len(run.trajectories) == MAX_STREAMS:
                if run.dropped == Counts():
                    warnings.warn("labels, text states or options are new at each call: steps stay full", stacklevel=4)
                run.drop_oldest()
            states = [PartState(part.method.schedule.walk()) for part in self.parts]
            trajectory = Trajectory(states, layout, weakref.ref(latents), conditions)
            run.trajectories.append(trajectory)
        trajectory.latents, trajectory.conditions = weakref.ref(latents), conditions
        run.stepped.append(trajectory)
        if len(run.stepped) > MAX_STREAMS:
            raise RuntimeError(
                f"more than {MAX_STREAMS} different calls at timestep {place.timestep:g}: "
                "name the runs that take turns with skipdit.cache_context"
            )
        return trajectory

    def _drop_broken(self, path: tuple[str, ...], place: Place) -> None:
        """Branches of this context's run before, which has not come to its end: of other timesteps of a scheduler."""
        for key, run in list(self.runs.items()):
            lists = run.place.timesteps, place.timesteps
            if key[0] == path and lists[0] is not lists[1] and all(each is not None for each in lists):
                del self.runs[key]

    def _watch_rising(self, before: Run | None, place: Place) -> None:
        """Warns where every call begins a run, as in an inversion by hand."""
        rises = before is not None and before.place.timestep < place.timestep and place.position is None
        single = before is not None and before.counts.full + before.counts.reused <= len(before.stepped)
        self.num_single_steps = self.num_single_steps + 1 if rises and single else 0
        if self.num_single_steps == MAX_SINGLE_STEPS:
            warnings.warn(
                "timesteps rise from call to call, so each is taken for the first step of a run, in full: a run that "
                "adds noise (inversion) reuses only in a pipeline, or under its scheduler: "
                "skipdit.enable_cache(pipeline, ...)",
                stacklevel=5,
            )

    # ------------------------------------------------------------------------------------------------------------------
    # The end of a run, and what is said about it

    def end_runs(self) -> None:
        """Drops what the runs of the current context hold, all branches; their counts stay for the summary. Outside of
        any context these are the calls outside of any context."""
        path = _context.get()
        ended = [key for key in list(self.runs) if (key[0][: len(path)] == path if path else not key[0])]
        if ended:
            self.ended_at = self.num_calls
            self.ended_counts = sum((self.runs[key].counts for key in ended), Counts())
        for key in ended:
            del self.runs[key]
        self.timesteps.clear()

    @property
    def bytes_held(self) -> int:
        return sum(trajectory.bytes_held for run in list(self.runs.values()) for trajectory in run.trajectories)

    @property
    def counts(self) -> Counts:
        """Of the current runs, or of those that have ended last."""
        current = [run.counts for run in list(self.runs.values()) if run.last_call > self.ended_at]
        return sum(current, Counts()) if current else self.ended_counts

    def summary(self) -> CacheSummary:
        counts = self.counts
        return CacheSummary(
            method=str(self.method),
            model=self.model_name,
            num_units=self.num_units,
            reused=tuple(str(portion) for part in self.parts for portion in part.portions),
            steps_full=counts.full,
            steps_reused=counts.reused,
            compute_ratio=(counts.full + counts.reused) / counts.cost if counts.cost else 1.0,
            bytes_held=self.bytes_held,
            peak_bytes_held=self.peak_bytes_held,
        )


def _is_choice(value: Any) -> bool:
    """Whether an argument says what a model does, as SD3's `skip_layers`; a number with a fraction is a strength."""
    if isinstance(value, (list, tuple)):
        return all(_is_choice(each) for each in value)
    return value is None or isinstance(value, (bool, int, str))


def _may_replay(latents: Tensor) -> bool:
    """Whether what is compiled for these may have become a CUDA graph."""
    return latents.is_cuda


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
