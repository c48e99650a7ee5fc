"""Switches a cache on and off, and runs each call of the model as a full or a reuse step.

`enable_cache` swaps the model's class for a final subclass whose `__call__` decides and then calls the model. The
decision is thus made outside whatever `model.compile()` compiled: a step runs one of two whole graphs.

State belongs to a run, never to the model: a `Trajectory` a context and a stream of calls, kept until the run ends.
"""

import dataclasses
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from skipdit.cache.fingerprint import check_made_for
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.predictor import Values
from skipdit.cache.ranks import agreed
from skipdit.cache.schedule import AdaptiveSchedule, Decision, resolve
from skipdit.cache.site import step_cost
from skipdit.cache.state import CacheSummary, Counts, PartState, Run, Trajectory
from skipdit.models.families import find_family
from skipdit.models.flow import Portion, Step, Units
from skipdit.models.long_skip import LongSkipModel, LongSkipOutput
from skipdit.models.surgery import close_units, open_units

_context: ContextVar[tuple[str, ...]] = ContextVar("skipdit_cache_context", default=())

# more calls than this at one timestep are not guidance branches but a loop that the cache misunderstands
MAX_STREAMS = 16
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
    token = _context.set((*_context.get(), name))
    try:
        yield
    finally:
        _context.reset(token)


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
        (portion,) = part.portions
        assert isinstance(portion, Units)
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
        self.pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
        self.steps: dict[tuple[Decision, ...], tuple[Step, float]] = {}
        self.probed = ProbedSteps.of(self.parts[0], model) if self.parts[0].probe else None
        self.reset()

    def reset(self) -> None:
        self.runs: dict[tuple[str, ...], Run] = {}
        self.timesteps: dict[int, tuple[Tensor, list[float]]] = {}
        self.num_calls = 0
        self.ended_at, self.ended_counts = 0, Counts()
        self.peak_bytes_held = 0

    def __deepcopy__(self, memo: dict) -> "CacheRuntime":
        """A copied model caches in the same way and shares no state."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.pipelines = weakref.WeakSet()
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
        timestep, origin, coming = self._locate(arguments["timestep"])
        trajectory = self._trajectory(arguments, timestep, origin, coming)
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

        sample = self.make_step(model, forward, trajectory, timestep)
        if coming is not None and len(coming) == 1:
            self._check_reused(trajectory)
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

    def _locate(self, timestep: Tensor) -> tuple[float, Tensor | None, list[float] | None]:
        """The timestep's value, the list of a watched scheduler that it is an entry of, and from it on the timesteps of
        a watched scheduler that has it.

        A pipeline hands on a view of its scheduler's `timesteps`: then the value is known without asking the device.
        """
        lists = [pipeline.scheduler.timesteps for pipeline in self.pipelines]
        for known in lists:
            one_entry = timestep.numel() == 1 or max(timestep.stride()) == 0
            if one_entry and timestep.untyped_storage().data_ptr() == known.untyped_storage().data_ptr():
                coming = self._values(known)[timestep.storage_offset() - known.storage_offset() :]
                return coming[0], known, coming
        values = timestep if timestep.numel() == 1 else timestep.unique()
        if values.numel() != 1:
            raise ValueError(
                f"a cached call needs one timestep for the whole batch, got {values.tolist()}: "
                "call skipdit.disable_cache(model), or split the batch"
            )
        value = values.item()
        # 0.7 in float32 is a timestep of 700, not of 699.99999
        value = value if self.timestep_scale == 1 else round(value * self.timestep_scale, 3)
        if not lists:
            return value, None, None
        # some of diffusers hand on a copy of their timesteps, in the dtype of the latents; the latest list has it
        for known in lists:
            self._values(known)
        tolerance = 0.01 + (value * torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0)
        for known, entries in self.timesteps.values():
            if all(known is not each for each in lists):
                continue
            index = min(range(len(entries)), key=lambda each: abs(entries[each] - value), default=None)
            if index is not None and abs(entries[index] - value) < tolerance:
                return entries[index], known, entries[index:]  # not rounded to the latents' dtype
        return value, None, None

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

    def _check_reused(self, trajectory: Trajectory) -> None:
        """`ValueError` at the last step of a run in which an adaptive schedule has never reused."""
        if self.method.schedule.is_adaptive and not self.method.may_stay_full and not trajectory.num_reused:
            raise ValueError(
                f"cache {self.method} has not reused once in {trajectory.num_full} steps: raise its threshold"
            )

    def _trajectory(
        self, arguments: Mapping[str, Any], timestep: float, origin: Tensor | None, coming: list[float] | None
    ) -> Trajectory:
        """The trajectory that this call continues, or a new one.

        A new run starts where the scheduler has new timesteps or the timestep rises. Within it, calls with other labels
        or text states are another trajectory (a guidance branch), and so is a second call at the same timestep with
        other latents (a run in lockstep).
        """
        path = _context.get()
        run = self.runs.pop(path, None)
        if run is None or run.origin is not origin or timestep > run.timestep:
            if coming is not None:
                self._check_reuses(coming)
            run = Run(origin=origin, timestep=timestep)
        self.runs[path] = run  # the last called stands last
        if len(self.runs) > MAX_RUNS:
            del self.runs[next(iter(self.runs))]
        self.num_calls += 1
        run.last_call = self.num_calls
        if timestep < run.timestep:
            run.timestep, run.stepped = timestep, []

        latents = arguments["hidden_states"]
        conditioning = tuple(
            value
            for name in self.argument_names
            if isinstance(value := arguments.get(name), Tensor) and name not in ("hidden_states", "timestep")
        )
        layout = (latents.shape, latents.dtype, latents.device)
        trajectory = run.find(latents, conditioning)
        if trajectory is None or trajectory.layout != layout:
            if trajectory is not None:
                run.trajectories.remove(trajectory)
            states = [PartState(part.method.schedule.walk()) for part in self.parts]
            trajectory = Trajectory(states, weakref.ref(latents), conditioning, layout)
            run.trajectories.append(trajectory)
        trajectory.latents, trajectory.conditioning = weakref.ref(latents), conditioning
        run.stepped.append(trajectory)
        if len(run.stepped) > MAX_STREAMS:
            raise RuntimeError(
                f"more than {MAX_STREAMS} different calls at timestep {timestep:g}: "
                "name the runs that take turns with skipdit.cache_context"
            )
        return trajectory

    # ------------------------------------------------------------------------------------------------------------------
    # The end of a run, and what is said about it

    def end_runs(self) -> None:
        """Drops what the runs of the current context hold; their counts stay for the summary. Outside of any context
        these are the calls outside of any context."""
        path = _context.get()
        ended = [key for key in self.runs if (key[: len(path)] == path if path else not key)]
        if ended:
            self.ended_at, self.ended_counts = self.num_calls, Counts.of(self.runs[key] for key in ended)
        for key in ended:
            del self.runs[key]
        self.timesteps.clear()

    @property
    def bytes_held(self) -> int:
        return sum(trajectory.bytes_held for run in list(self.runs.values()) for trajectory in run.trajectories)

    def summary(self) -> CacheSummary:
        current = [run for run in self.runs.values() if run.last_call > self.ended_at]
        counts = Counts.of(current) if current else self.ended_counts
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


# ----------------------------------------------------------------------------------------------------------------------
# On and off


class CachedModel(nn.Module):
    """Mixed in front of a model's class while its cache is on; `_cached_class` makes the final subclass."""

    _skipdit_cache: CacheRuntime
    is_cache_enabled = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._skipdit_cache.call(self, super().__call__, args, kwargs)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """diffusers' pipelines call this at the end of a run."""
        self._skipdit_cache.end_runs()


@lru_cache
def _cached_class(model_class: type[nn.Module]) -> type[CachedModel]:
    """The cached subclass, of the same name, so that a saved config names the model."""
    namespace = {
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
    }
    return type(model_class.__name__, (CachedModel, model_class), namespace)


def _model_of(target: nn.Module | DiffusionPipeline) -> nn.Module:
    if isinstance(target, DiffusionPipeline):
        if "transformer" not in target.components:
            raise ValueError(
                f"{type(target).__name__} has no transformer to cache, only {', '.join(target.components)}"
            )
        return _model_of(target.transformer)
    if isinstance(target, torch.nn.parallel.DistributedDataParallel):
        return target.module
    if type(target).__module__.startswith("torch._dynamo"):
        raise ValueError(
            "torch.compile(model) would compile the cache's decision: call model.compile(fullgraph=True) instead"
        )
    if not isinstance(target, nn.Module):
        raise TypeError(f"a cache needs a model or a pipeline, got {type(target).__name__}")
    return target


def _runtime_of(target: nn.Module | DiffusionPipeline) -> CacheRuntime:
    model = _model_of(target)
    if not isinstance(model, CachedModel):
        raise ValueError(
            f"no cache is enabled on this {type(model).__name__}: call skipdit.enable_cache(target, 'N2') first"
        )
    return model._skipdit_cache


def enable_cache(target: nn.Module | DiffusionPipeline, spec: str | Path | CacheMethod) -> None:
    """Makes every later call of the model a full or a reuse step; a cache that is on already is replaced.

    target: a pipeline, whose scheduler's timesteps are then known before a run starts, or a model, which reads each
        timestep from its call: one of ours, or a transformer of diffusers whose units skipdit knows, with long skips
        of its own (HunyuanDiT), with those of `add_long_skips`, or with none (for `delta:`).
    spec: `"auto"`, `"N2-700-50"`, any other of `skipdit.cache.methods`, a `CacheMethod`, or a schedule.json's path.

    Raises `ValueError` where the cache could have no effect: a model without long skips, more shallow units than it has
    pairs, a window that is empty; at the first step of a pipeline's run, a schedule that reuses in none of its steps.
    """
    method, model = parse_method(spec), _model_of(target)
    opened = not isinstance(model, LongSkipModel) and find_family(type(model)) is not None
    pipelines = weakref.WeakSet()
    if isinstance(model, CachedModel):
        pipelines, opened = model._skipdit_cache.pipelines, model._skipdit_cache.opened
    if isinstance(model, LongSkipModel) and model.is_cache_enabled and not isinstance(model, CachedModel):
        raise ValueError("a cache of diffusers is enabled on this model: call model.disable_cache() first")
    if opened:
        open_units(model)
    try:
        runtime = CacheRuntime(model, method, opened=opened)
        if method.made_for is not None:
            scheduler = type(target.scheduler).__name__ if isinstance(target, DiffusionPipeline) else None
            check_made_for(method.made_for, model, scheduler)
    except ValueError:
        if opened and not isinstance(model, CachedModel):
            close_units(model)
        raise
    if isinstance(model, CachedModel):
        _uncache(model)
    runtime.pipelines = pipelines
    cast(Any, model).__class__ = _cached_class(type(model))
    object.__setattr__(model, "_skipdit_cache", runtime)
    if isinstance(target, DiffusionPipeline):
        runtime.pipelines.add(target)


def disable_cache(target: nn.Module | DiffusionPipeline) -> None:
    """The model as it was; nothing stays stored. Without a cache this does nothing."""
    model = _model_of(target)
    if isinstance(model, CachedModel):
        opened = model._skipdit_cache.opened
        _uncache(model)
        if opened:
            close_units(model)


def _uncache(model: CachedModel) -> None:
    cast(Any, model).__class__ = _plain_class(type(model))
    object.__delattr__(model, "_skipdit_cache")


@lru_cache
def _plain_class(model_class: type) -> type:
    """The class without the cache's, also where `fully_shard` has put one on top of it since."""
    first, *others = model_class.__bases__
    if first is CachedModel:
        return others[0]
    bases = (_plain_class(base) if issubclass(base, CachedModel) else base for base in model_class.__bases__)
    namespace = {name: value for name, value in vars(model_class).items() if name not in ("__dict__", "__weakref__")}
    return type(model_class.__name__, tuple(bases), namespace)


def cache_summary(target: nn.Module | DiffusionPipeline) -> CacheSummary:
    """What the cache did in the current run, or in the last one; `ValueError` without a cache."""
    return _runtime_of(target).summary()
