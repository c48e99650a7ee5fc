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

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.predictor import Stored
from skipdit.cache.schedule import IntervalSchedule, StepCounter, resolve
from skipdit.models.families import find_family
from skipdit.models.long_skip import LongSkipModel, LongSkipOutput
from skipdit.models.surgery import close_units, open_units

_context: ContextVar[tuple[str, ...]] = ContextVar("skipdit_cache_context", default=())

# more calls than this at one timestep are not guidance branches but a loop that the cache misunderstands
MAX_STREAMS = 16
# of more contexts than this the least recently called are dropped
MAX_RUNS = 64


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


@dataclass(eq=False)
class Trajectory:
    """What one stream of calls has stored, and the count that decides its next step.

    latents: of the last call. conditioning: labels or text states, which tell a guidance branch from another.
    """

    counter: StepCounter
    latents: weakref.ref[Tensor]
    conditioning: tuple[Tensor, ...]
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
    """The trajectories of one context, one a guidance branch, and which of them have made the step at `timestep`."""

    origin: Tensor | None
    timestep: float
    trajectories: list[Trajectory] = field(default_factory=list)
    stepped: list[Trajectory] = field(default_factory=list)
    last_call: int = 0

    def find(self, latents: Tensor, conditioning: tuple[Tensor, ...]) -> Trajectory | None:
        """The trajectory that a call continues: the last one if it is given the very same tensors again, else one that
        has not made this step and has the same conditioning; identical tensors before equal ones."""
        if (
            self.stepped
            and self.stepped[-1].latents() is latents
            and _same(self.stepped[-1].conditioning, conditioning)
        ):
            return self.stepped.pop()
        waiting = [each for each in self.trajectories if not any(each is other for other in self.stepped)]
        for matches in (_same, _equal):
            for trajectory in waiting:
                if matches(trajectory.conditioning, conditioning):
                    return trajectory
        return None


def _same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and a.device == b.device and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


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
    """The cache of one model. opened: whether its units were opened for the cache alone."""

    def __init__(self, model: nn.Module, method: CacheMethod, *, opened: bool = False) -> None:
        method.site.check(model)
        self.method = method
        self.opened = opened
        self.model_name = type(model).__name__
        self.num_units = cast(LongSkipModel, model).long_skip_links.num_units
        self.timestep_scale = cast(LongSkipModel, model).timestep_scale
        self.signature = inspect.signature(model.forward)
        self.pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
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
        copy.pipelines = weakref.WeakSet()
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

    def _locate(self, timestep: Tensor) -> tuple[float, Tensor | None]:
        """The timestep's value, and the list of a watched scheduler that it is an entry of.

        A pipeline hands on a view of its scheduler's `timesteps`: then the value is known without asking the device.
        """
        for pipeline in list(self.pipelines):
            known = pipeline.scheduler.timesteps
            one_entry = timestep.numel() == 1 or max(timestep.stride()) == 0
            if one_entry and timestep.untyped_storage().data_ptr() == known.untyped_storage().data_ptr():
                return self._values(known)[timestep.storage_offset() - known.storage_offset()], known
        values = timestep.unique()
        if values.numel() != 1:
            raise ValueError(
                f"a cached call needs one timestep for the whole batch, got {values.tolist()}: "
                "call skipdit.disable_cache(model), or split the batch"
            )
        value = values.item()
        # 0.7 in float32 is a timestep of 700, not of 699.99999
        value = value if self.timestep_scale == 1 else round(value * self.timestep_scale, 3)
        for pipeline in list(self.pipelines):  # some of diffusers hand on a copy of their timesteps
            known = pipeline.scheduler.timesteps
            if id(known) not in self.timesteps and any(abs(entry - value) < 0.01 for entry in known.tolist()):
                self._values(known)
        return value, None

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

        A new run starts where the scheduler has new timesteps or the timestep rises. Within it, calls with other labels
        or text states are another trajectory (a guidance branch), and so is a second call at the same timestep with
        other latents (a run in lockstep).
        """
        path = _context.get()
        run = self.runs.pop(path, None)
        if run is None or run.origin is not origin or timestep > run.timestep:
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
            for name, value in arguments.items()
            if isinstance(value, Tensor) and name not in ("hidden_states", "timestep")
        )
        layout = (latents.shape, latents.dtype, latents.device)
        trajectory = run.find(latents, conditioning)
        if trajectory is None or trajectory.layout != layout:
            if trajectory is not None:
                run.trajectories.remove(trajectory)
            trajectory = Trajectory(StepCounter(self.method.schedule), weakref.ref(latents), conditioning, layout)
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
            self.ended_at, self.ended_counts = self.num_calls, _counts(self.runs[key] for key in ended)
        for key in ended:
            del self.runs[key]
        self.timesteps.clear()

    @property
    def bytes_held(self) -> int:
        return sum(trajectory.bytes_held for run in list(self.runs.values()) for trajectory in run.trajectories)

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
        timestep from its call: one of ours, or a transformer of diffusers whose units skipdit knows, with long skips
        of its own (HunyuanDiT), with those of `add_long_skips`, or with none (for `delta-dit:`).
    spec: `"N2-700-50"`, `"skip-taylor:N4-o1"`, a `CacheMethod`, or a schedule.json's path.

    Raises `ValueError` where the cache could have no effect: a model without long skips, more shallow units than it has
    pairs, a window that is empty; at the first step of a pipeline's run, a schedule that reuses in none of its steps.
    """
    method, model = parse_method(spec), _model_of(target)
    opened = not isinstance(model, LongSkipModel) and find_family(type(model)) is not None
    pipelines = weakref.WeakSet()
    if isinstance(model, CachedModel):
        pipelines, opened = model._skipdit_cache.pipelines, model._skipdit_cache.opened
    if opened:
        open_units(model)
    try:
        runtime = CacheRuntime(model, method, opened=opened)
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
    model.__class__ = type(model).__bases__[1]
    object.__delattr__(model, "_skipdit_cache")


def cache_summary(target: nn.Module | DiffusionPipeline) -> CacheSummary:
    """What the cache did in the current run, or in the last one; `ValueError` without a cache."""
    return _runtime_of(target).summary()
