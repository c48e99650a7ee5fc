"""Switches a cache on and off, and runs each call of the model as a full or a reuse step.

`enable_cache` swaps the model's class for a final subclass whose `__call__` decides and then calls the model. The
decision is thus made outside whatever `model.compile()` compiled: a step runs one of two whole graphs.

State belongs to a run, never to the model: a `Trajectory` a context and a stream of calls, kept until the run ends.
"""

import inspect
import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.predictor import Stored
from skipdit.cache.schedule import IntervalSchedule, StepCounter, resolve
from skipdit.models.long_skip import LongSkipModel, LongSkipOutput

_context: ContextVar[tuple[str, ...]] = ContextVar("skipdit_cache_context", default=())

# more calls than this at one timestep are not guidance branches but a loop that the cache misunderstands
MAX_STREAMS = 16


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


@dataclass
class Trajectory:
    """What one stream of calls has stored, and the count that decides its next step."""

    counter: StepCounter
    inputs: tuple[weakref.ref, ...]
    layout: tuple
    stored: Stored = ()
    steps_since_full: int = 0
    num_full: int = 0
    num_reused: int = 0

    @property
    def bytes_held(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored)


@dataclass
class Run:
    """The trajectories of one context: one a guidance branch."""

    origin: Tensor | None
    timestep: float
    index: int = -1
    last_call: int = 0
    trajectories: list[Trajectory] = field(default_factory=list)


@dataclass(frozen=True)
class CacheSummary:
    """What the cache did in the current run, or in the last one that has ended.

    `compute_ratio`: units of all steps in full over units run. `bytes_held`: now. `peak_bytes_held`: since enabled.
    """

    method: str
    model: str
    num_units: int
    num_shallow_units: int
    steps_full: int
    steps_reused: int
    compute_ratio: float
    bytes_held: int
    peak_bytes_held: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.method} on {self.model} ({self.num_units} units, {2 * self.num_shallow_units} on a reuse step): "
            f"{self.steps_full} full, {self.steps_reused} reused, compute ratio {self.compute_ratio:.3f}, "
            f"{self.peak_bytes_held / 2**20:.2f} MiB held at most"
        )


class CacheRuntime:
    """The cache of one model."""

    def __init__(self, model: nn.Module, method: CacheMethod) -> None:
        method.site.check(model)
        self.method = method
        self.model_name = type(model).__name__
        self.num_units = cast(LongSkipModel, model).long_skip_links.num_units
        self.signature = inspect.signature(model.forward)
        self.schedulers: weakref.WeakSet[Any] = weakref.WeakSet()  # SchedulerMixin declares no timesteps
        self.reset()

    def reset(self) -> None:
        self.runs: dict[tuple[str, ...], Run] = {}
        self.timesteps: dict[int, tuple[Tensor, list[float]]] = {}
        self.num_calls = 0
        self.ended_at, self.ended_counts = 0, (0, 0)
        self.peak_bytes_held = 0

    def __deepcopy__(self, memo: dict) -> "CacheRuntime":
        """A copied model caches in the same way and shares no state."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.schedulers = weakref.WeakSet()
        copy.reset()
        return copy

    # ------------------------------------------------------------------------------------------------------------------
    # One call

    def call(self, model: nn.Module, call: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if model.training:
            raise RuntimeError("a cache serves inference: call model.eval(), or skipdit.disable_cache(model) to train")
        return_dict = kwargs.pop("return_dict", True)
        arguments = self.signature.bind(*args, **kwargs).arguments
        timestep, origin = self._locate(arguments["timestep"])
        trajectory = self._trajectory(arguments, timestep, origin)

        if trajectory.counter.peek(timestep):
            sample, value = self.method.site.full(call, args, kwargs)
            # a buffer of its own: a CUDA graph overwrites its outputs on the next replay
            value = value.detach().clone()
            trajectory.stored = self.method.predictor.update(trajectory.stored, value, trajectory.steps_since_full)
            trajectory.steps_since_full = 1
            trajectory.num_full += 1
        else:
            value = self.method.predictor.predict(trajectory.stored, trajectory.steps_since_full)
            sample = self.method.site.reuse(call, args, kwargs, value)
            trajectory.steps_since_full += 1
            trajectory.num_reused += 1

        self.peak_bytes_held = max(self.peak_bytes_held, self.bytes_held)
        trajectory.counter.advance(timestep)
        if not trajectory.counter.stored:
            trajectory.stored = ()
        return LongSkipOutput(sample=sample) if return_dict else (sample,)

    def _locate(self, timestep: Any) -> tuple[float, Tensor | None]:
        """The timestep's value, and the list of a watched scheduler that it is an entry of.

        A pipeline hands on a view of its scheduler's `timesteps`: then the value is known without asking the device.
        """
        if not isinstance(timestep, Tensor):
            return float(timestep), None
        for scheduler in self.schedulers:
            known = scheduler.timesteps
            if (
                timestep.untyped_storage().data_ptr() == known.untyped_storage().data_ptr()
                and max(timestep.stride(), default=0) == 0
            ):
                return self._values(known)[timestep.storage_offset() - known.storage_offset()], known
        values = timestep.unique()
        if values.numel() != 1:
            raise ValueError(
                f"a cached call needs one timestep for the whole batch, got {values.tolist()}: "
                "call skipdit.disable_cache(model), or split the batch"
            )
        return values.item(), None

    def _values(self, known: Tensor) -> list[float]:
        """A scheduler's timesteps as numbers, read once a run, where the schedule must reuse at least once."""
        entry = self.timesteps.get(id(known))
        if entry is None:
            values = known.tolist()
            self._check_reuses(values)
            self.timesteps = {id(known): (known, values)} | dict(itertools.islice(self.timesteps.items(), 7))
            return values
        return entry[1]

    def _check_reuses(self, timesteps: list[float]) -> None:
        control = isinstance(self.method.schedule, IntervalSchedule) and self.method.schedule.interval == 1
        if all(resolve(self.method.schedule, timesteps)) and not control:
            raise ValueError(f"cache {self.method} would never reuse in {len(timesteps)} steps")

    def _trajectory(self, arguments: dict[str, Any], timestep: float, origin: Tensor | None) -> Trajectory:
        """The trajectory that this call continues, or a new one.

        A new run starts where the scheduler has new timesteps or the timestep rises. A further call at the same
        timestep is another stream (a guidance branch, a run in lockstep), unless its tensors are the very same.
        """
        path = _context.get()
        run = self.runs.get(path)
        if run is None or run.origin is not origin or timestep > run.timestep:
            run = self.runs[path] = Run(origin=origin, timestep=timestep)
        self.num_calls += 1
        run.last_call = self.num_calls
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        if timestep < run.timestep:
            run.timestep, run.index = timestep, -1
        repeated = run.index >= 0 and all(
            reference() is tensor
            for reference, tensor in zip(run.trajectories[run.index].inputs, tensors, strict=False)
        )
        run.index += not repeated
        if run.index >= MAX_STREAMS:
            raise RuntimeError(
                f"more than {MAX_STREAMS} different calls at timestep {timestep:g}: "
                "name the runs that take turns with skipdit.cache_context"
            )

        hidden_states = arguments["hidden_states"]
        layout = (hidden_states.shape, hidden_states.dtype, hidden_states.device)
        inputs = tuple(weakref.ref(tensor) for tensor in tensors)
        if run.index == len(run.trajectories):
            run.trajectories.append(Trajectory(StepCounter(self.method.schedule), inputs, layout))
        trajectory = run.trajectories[run.index]
        if trajectory.layout != layout:
            trajectory = run.trajectories[run.index] = Trajectory(StepCounter(self.method.schedule), inputs, layout)
        trajectory.inputs = inputs
        return trajectory

    # ------------------------------------------------------------------------------------------------------------------
    # The end of a run, and what is said about it

    def end_runs(self) -> None:
        """Drops what the runs of the current context hold; the counts of the last run stay for the summary."""
        path = _context.get()
        ended = [key for key in self.runs if key[: len(path)] == path]
        if ended:
            self.ended_at, self.ended_counts = self.num_calls, _counts(self.runs[key] for key in ended)
        for key in ended:
            del self.runs[key]
        self.timesteps.clear()

    @property
    def bytes_held(self) -> int:
        return sum(trajectory.bytes_held for run in self.runs.values() for trajectory in run.trajectories)

    def summary(self) -> CacheSummary:
        current = [run for run in self.runs.values() if run.last_call > self.ended_at]
        full, reused = _counts(current) if current else self.ended_counts
        shallow = self.method.site.num_shallow_units
        cost = full + reused * 2 * shallow / self.num_units
        return CacheSummary(
            method=str(self.method),
            model=self.model_name,
            num_units=self.num_units,
            num_shallow_units=shallow,
            steps_full=full,
            steps_reused=reused,
            compute_ratio=(full + reused) / cost if cost else 1.0,
            bytes_held=self.bytes_held,
            peak_bytes_held=self.peak_bytes_held,
        )


def _counts(runs: Iterable[Run]) -> tuple[int, int]:
    """Full and reused steps of some runs."""
    trajectories = [trajectory for run in runs for trajectory in run.trajectories]
    return sum(t.num_full for t in trajectories), sum(t.num_reused for t in trajectories)


# ----------------------------------------------------------------------------------------------------------------------
# On and off


class CachedModel(nn.Module):
    """Mixed in front of a model's class while its cache is on; `_cached_class` makes the final subclass."""

    _skipdit_cache: CacheRuntime

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
        return target.transformer
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
        timestep from its call. spec: `"N2-700-50"`, `"skip-taylor:N4-o1"`, a `CacheMethod`, or a schedule.json's path.

    Raises `ValueError` where the cache could have no effect: a model without long skips, more shallow units than it has
    pairs, a window that is empty; at the first step of a pipeline's run, a schedule that reuses in none of its steps.
    """
    method, model = parse_method(spec), _model_of(target)
    if not isinstance(model, CachedModel) or model._skipdit_cache.method != method:
        disable_cache(model)
        runtime = CacheRuntime(model, method)
        model.__class__ = _cached_class(type(model))
        object.__setattr__(model, "_skipdit_cache", runtime)
    if isinstance(target, DiffusionPipeline):
        _runtime_of(target).schedulers.add(target.scheduler)


def disable_cache(target: nn.Module | DiffusionPipeline) -> None:
    """The model as it was; nothing stays stored. Without a cache this does nothing."""
    model = _model_of(target)
    if isinstance(model, CachedModel):
        model.__class__ = type(model).__bases__[1]
        object.__delattr__(model, "_skipdit_cache")


def cache_summary(target: nn.Module | DiffusionPipeline) -> CacheSummary:
    """What the cache did in the current run, or in the last one; `ValueError` without a cache."""
    return _runtime_of(target).summary()
