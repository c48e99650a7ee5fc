"""Finds the stream that a call continues.

A *stream* is a name (`cache_context`), a shape and a conditioning; every call of a stream is its next step. A *run* is
over when the pipeline ends it (`_reset_stateful_cache`), when a watched scheduler has a new list of timesteps, or when
the timestep turns back. The arguments of `cache_context(name, step_index=..., timestep=...)` take precedence.

Under a watched scheduler the position in its list identifies a step, and nothing is read from the device. For a bare
model the timestep is read once per call. The tensor objects identify the conditioning; only if they are created anew at
each step are their contents compared, as checksums that are read together with the timestep.
"""

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor

from skipdit.cache.conditions import Conditions, read
from skipdit.cache.state import StepCounts, bytes_of
from skipdit.cache.steppers import RuleState
from skipdit.cache.timesteps import Layout, Timestep, is_entry, is_near, is_single, layout_of, levels_and, place_in
from skipdit.diffusion import noise_shares
from skipdit.interfaces import Fields, Latents, ModelOutput, Pipeline, Scheduler
from skipdit.models.costs import Costs
from skipdit.models.forward_plan import ForwardPlan

# more streams than this in one run cannot be guidance: the cache misreads its calls
MAX_STREAMS = 16
# components of a pipeline; Wan 2.2 has two, for high and low noise, Ideogram 4 one for each branch of guidance
TRANSFORMERS = ("transformer", "transformer_2", "unconditional_transformer")
# tensors that say how strong something is, which FluxControlNetPipeline makes anew at each step. As long as none tells
# calls of one step apart, they are not compared
STRENGTHS = {"guidance"}
# beyond this many runs, the least recently called are dropped
MAX_RUNS = 64

_context: ContextVar[tuple[str, ...]] = ContextVar("skipdit_cache_context", default=())
_branch: ContextVar[tuple[str, ...]] = ContextVar("skipdit_cache_branch", default=())
_loop: ContextVar[Fields] = ContextVar("skipdit_cache_place", default={})  # noqa: B039

Order = Tensor | str | None
BY_STEP_INDEX = "step_index"  # the order of calls whose positions come from `cache_context`
Key = tuple[int, tuple[str, ...], tuple[str, ...]]  # thread, contexts, names from the model's own `cache_context`


@contextmanager
def cache_context(name: str) -> Iterator[None]:
    """Keep the calls inside, the run `name`, apart from all others. Contexts nest.

    Needed only if one thread alternates between steps of several runs; our own pipelines enter one by themselves, and
    guidance streams with different conditioning are recognized without it.
    """
    with _entered(_context, (*_context.get(), name)):
        yield


@contextmanager
def branch_context(name: str, **position: Any) -> Iterator[None]:
    """Keep the calls inside, one branch of guidance, apart from other branches of the current run; all end together.
    position: fields of diffusers' `CacheContext`, which give the position in the loop."""
    with _entered(_branch, (*_branch.get(), name)), _entered(_loop, position):
        yield


@contextmanager
def _entered(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@dataclass(eq=False)
class Stream:
    """The calls of one name, shape and conditioning: their stored values and their counts."""

    layout: Layout
    """Shape, dtype and device of the latents."""
    conditions: Conditions
    """The conditioning of the last call."""
    states: list[RuleState]
    """One per rule of the method."""
    places: tuple[float, float]
    """Places in the run of the last step, and of the one before it."""
    new: set[str] = field(default_factory=set)
    """The arguments in which its first call differed from the streams of the previous step."""
    passed: list[float] = field(default_factory=list)
    """Noise levels of the run's steps before the first of `levels`; empty if unknown."""
    levels: list[float] = field(default_factory=list)
    """Noise levels of its steps, including the current one, since `states` was last renewed."""
    coming: list[float] = field(default_factory=list)
    """Noise levels of the run from the current step on; empty if unknown."""
    costs: Costs | None = None
    """Costs for its layout, once they have been counted."""
    compiled: set[ForwardPlan] = field(default_factory=set)
    """The plans whose graphs have run."""
    forms: dict[bool, ModelOutput] = field(default_factory=dict)
    """By `return_dict`, the form of the model's output, for steps that do not call it."""
    output: list[Tensor] = field(default_factory=list)
    """Its last output, if other guidance branches of the step may need it."""
    last_call: int = 0
    counts: StepCounts = field(default_factory=StepCounts)

    def advance(self, conditions: Conditions, place: float) -> None:
        """Record a step at this place, whose conditions equal the previous ones, up to strengths."""
        before = self.conditions
        renewed = {name for name in STRENGTHS if not conditions.same(name, before)}
        known = {name: value for name, value in before.sums.items() if name not in renewed}
        conditions.sums = known | conditions.sums
        conditions.add_checksums()
        self.conditions = conditions
        if place != self.places[0]:
            self.places = (place, self.places[0])

    @property
    def bytes_held(self) -> int:
        return bytes_of([tensor for state in self.states for tensor in state.tensors] + self.output)


@dataclass(eq=False)
class PipelineRun:
    """The streams of one name."""

    order: Order
    """The order of its steps: the list of a watched scheduler, `BY_STEP_INDEX`, or `None` for the timestep itself."""
    levels: list[float] = field(default_factory=list)
    """Noise levels of the whole list, from 0 to 1000; empty if unknown."""
    start: float = 0.0
    """Place of the first call; of a part of a run, as of Wan's second transformer, that of the whole."""
    place: float = -math.inf
    """Place of the last call; it grows from step to step."""
    level: float = 0.0
    """Noise level of the last call."""
    rises: bool = False
    """True if the noise of a bare model's run rises."""
    risen: bool = False
    """True if the previous run had one step, at a lower timestep."""
    counted: bool = False
    """True if nothing but the number of its calls tells the place of a call."""
    streams: list[Stream] = field(default_factory=list)
    changing: set[str] = field(default_factory=set)
    """Arguments that are new at each call, and so are no conditioning."""
    dropped: StepCounts = field(default_factory=StepCounts)
    """Counts of streams that were dropped."""
    last_call: int = 0
    warned: bool = False

    @property
    def counts(self) -> StepCounts:
        return sum((stream.counts for stream in self.streams), self.dropped)

    @property
    def coming(self) -> list[float]:
        """Noise levels of the steps from this one on; empty if unknown."""
        return self.levels[int(self.place) :] if self.levels else []

    def follow_levels(self) -> None:
        """Order the steps by the timesteps of the calls from now on, instead of by a list."""
        for stream in self.streams:
            stream.places = (-stream.levels[-1], -stream.levels[-1])
        self.order, self.levels, self.place = None, [], max(stream.places[0] for stream in self.streams)

    def drop(self, stream: Stream) -> None:
        self.streams.remove(stream)
        self.dropped += stream.counts

    def make_room(self) -> None:
        """Drop the least recently called stream if there is no room for one more, with a warning the first time."""
        if len(self.streams) == MAX_STREAMS:
            if self.dropped == StepCounts():
                warnings.warn("labels, text states or options change at each call: no step can reuse", stacklevel=5)
            self.drop(self.streams[0])

    def find(self, fitting: list[Stream], conditions: Conditions, place: float) -> tuple[Stream | None, set[str]]:
        """Return the stream of equal conditions, or else the arguments that differ from the nearest stream of earlier
        steps. Arguments new at two steps in a row are ignored, unless they tell calls of one step apart."""
        unequal = {stream: conditions.unequal(stream.conditions) - self.changing for stream in fitting}
        equal = next((stream for stream in reversed(fitting) if not unequal[stream]), None)
        waiting = [stream for stream in reversed(fitting) if stream.places[0] < place]
        nearest = equal or min(waiting, key=lambda stream: len(unequal[stream]), default=None)
        if equal is not None or nearest is None:
            return equal, set()
        new = unequal[nearest]
        alike = [other for other in fitting if not other.conditions.unequal(nearest.conditions) - self.changing - new]
        if not new <= nearest.new or sum(other.places[0] == nearest.places[0] for other in alike) > 1:
            return None, new
        self.changing |= new
        for other in alike:
            if other is not nearest:
                self.drop(other)
        return nearest, new


class Streams:
    """All runs of one cached model.

    start: returns the states of a new stream. check: called with the noise levels of each run that begins, but for a
    part of a run whose other parts have begun. over: called with runs that are over. scale: noise level per unit of the
    timestep argument; negative if the timestep rises as noise falls. by_token: a flat timestep lists levels of tokens,
    not of samples.
    """

    def __init__(
        self,
        start: Callable[[], list[RuleState]],
        check: Callable[[list[float]], None],
        over: Callable[[list[PipelineRun]], None],
        scale: float,
        *,
        by_token: bool = False,
    ) -> None:
        self.start, self.check, self.over, self.scale, self.by_token = start, check, over, scale, by_token
        self.pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()
        # by watched scheduler, the list of the run that began last
        self.begun: weakref.WeakKeyDictionary[Scheduler, Tensor] = weakref.WeakKeyDictionary()
        # by watched scheduler of a ddpm process, the share of noise at each timestep of training
        self.shares: weakref.WeakKeyDictionary[Scheduler, list[float]] = weakref.WeakKeyDictionary()
        self.runs: dict[Key, PipelineRun] = {}
        self.num_calls, self.ended_at, self.ended_counts = 0, 0, StepCounts()

    def watch(self, pipeline: Pipeline) -> None:
        """Follow the scheduler of a pipeline: copied timesteps belong to the lists that it makes from now on."""
        self.pipelines.add(pipeline)
        self.begun |= self._lists()

    def next(self, timestep: Timestep, latents: Latents, conditions: Fields) -> tuple[PipelineRun, Stream]:
        """Return the run and the stream that a call continues; either may be new."""
        key = threading.get_ident(), _context.get(), _branch.get()
        current, layout, before = Conditions(conditions), layout_of(latents), self.runs.pop(key, None)
        run, place, stream, fitting = self._place(key, before, timestep, current, layout)
        if place < run.place or (run.levels and place >= len(run.levels)):
            place = place if place < run.place else 0
            run = PipelineRun(run.order, run.levels, level=run.level, counted=run.counted)
        if not run.streams:
            stream, fitting, run.place = None, [], place
            self.over([] if before is None else [before])
            self._begin(key, run, timestep)
            place = run.place
        run.place = place
        run.level = run.levels[int(place)] if run.levels else run.level

        new: set[str] = set()
        if stream is None and fitting:
            stream, new = run.find(fitting, current, place)
        if stream is None:
            current.add_checksums()
            run.make_room()
            stream = Stream(layout, current, self.start(), (place, place), new)
        else:
            run.streams.remove(stream)
            if self._others_stepped(key, run, stream.places[0], place):
                stream.states, stream.levels = self.start(), []
            stream.advance(current, place)
        if not stream.levels:
            stream.passed = run.levels[int(run.start) : int(place)]
        stream.levels.append(run.level)
        stream.coming = run.coming
        run.streams.append(stream)  # in the order of their last calls
        self._keep(key, run)
        return run, stream

    def _place(
        self, key: Key, before: PipelineRun | None, timestep: Timestep, conditions: Conditions, layout: Layout
    ) -> tuple[PipelineRun, float, Stream | None, list[Stream]]:
        """Return a call's run and its place there; its stream, if the same tensor objects identify it; and the streams
        of its layout. Reads the timestep and the checksums from the device together."""
        branches = [other for name, other in self.runs.items() if key[2] and name[2] and name[:2] == key[:2]]
        order, place = self._known_place(timestep, before, branches)
        run = before if before is not None and before.order is order else PipelineRun(order)
        fitting = [stream for stream in run.streams if stream.layout == layout]
        differing = {stream: conditions.differing(stream.conditions) - run.changing for stream in fitting}
        same = [stream for stream in fitting if not differing[stream]]
        alike = [stream for stream in fitting if differing[stream] <= STRENGTHS]
        if not same and place is not None and len(alike) == 1 and alike[0].places[0] < place:
            same = alike
        # a tensor of inference mode may have been written between two calls of one step
        unsure = None in conditions.versions.values() and (order is None or any(s.places[0] == place for s in same))
        stream = same[0] if len(same) == 1 and not unsure else None

        again = stream is not None and stream.places[0] == run.place
        if place is None and again and isinstance(timestep, Tensor) and timestep.ndim > 1:
            # each frame has its own scheduler, and that of the pipeline does not advance (diffusion forcing)
            order = run.follow_levels()

        levels = [] if _is_list(order) else self._levels(timestep)
        numbers = conditions.compare([other.conditions for other in fitting] if stream is None else [], levels)
        level = self._level(numbers) if levels else 0.0
        if order is None:
            run, place = _by_level(run, level)
        elif place is None:  # by count: a stream that has already made the run's current step makes the next one
            equal = [
                each for each in fitting if stream is None and not conditions.unequal(each.conditions) - run.changing
            ]
            again = again or any(each.places[0] == run.place for each in equal)
            place, run.counted = run.place + again if run.streams else 0, True
        run.level = level
        assert place is not None
        return run, place, stream, fitting

    def _keep(self, key: Key, run: PipelineRun) -> None:
        self.runs[key] = run
        if len(self.runs) > MAX_RUNS:
            del self.runs[next(iter(self.runs))]
        self.num_calls += 1
        run.last_call = run.streams[-1].last_call = self.num_calls

    # ------------------------------------------------------------------------------------------------------------------
    # Where a call stands

    def _lists(self) -> dict[Scheduler, Tensor]:
        """Return the timesteps of each watched scheduler on which `set_timesteps` has been called."""
        schedulers = {id(pipeline.scheduler): pipeline.scheduler for pipeline in list(self.pipelines)}.values()
        ready = (other for other in schedulers if getattr(other, "num_inference_steps", None) is not None)
        return {scheduler: scheduler.timesteps for scheduler in ready}

    def _tables(self, order: Order) -> Iterator[Tensor]:
        """Yield the list that orders a run, nearly always the right one, then those of the schedulers."""
        if _is_list(order):
            yield order
        yield from self._lists().values()

    def _known_place(
        self, timestep: Timestep, run: PipelineRun | None, branches: list[PipelineRun]
    ) -> tuple[Order, float | None]:
        """Return the order of the run's calls, and the place of this call if it is known without a read from the
        device; `None` if it must be counted or read. branches: the other named branches of the same run."""
        loop, order = _loop.get(), None if run is None else run.order
        for table in self._tables(order):
            for entry in (timestep, loop.get("timestep")):
                if is_single(entry) and entry.untyped_storage().data_ptr() == table.untyped_storage().data_ptr():
                    return table, int(entry.storage_offset() - table.storage_offset())  # a view, as pipelines pass them
        lists = self._lists()
        current = next((key for key, table in lists.items() if run is not None and table is run.order), None)
        fresh = [scheduler for scheduler, table in lists.items() if self.begun.get(scheduler) is not table]
        if current is not None and fresh and not self._continues(timestep, run, fresh):
            current = None
        if current is None and len(fresh) == 1 and not is_entry(timestep):
            current = fresh[0]
        if current is None and run is None and not is_entry(timestep):  # a branch that begins after others
            current = next(
                (key for key, table in lists.items() if any(table is branch.order for branch in branches)), None
            )
        index, count = loop.get("step_index"), loop.get("num_inference_steps")
        if current is None:
            return (None, None) if index is None else (BY_STEP_INDEX, index)
        table = lists[current]
        if index is not None and count is not None:
            index += len(table) - count  # image-to-image starts later in the list
        if index is None:
            index = getattr(current, "step_index", None)
        if index is None and (run is None or run.order is not table):
            begun = [int(branch.place) for branch in branches if branch.order is table]
            first = getattr(current, "begin_index", None) or (0 if hasattr(current, "step_index") else None)
            index = max(begun, default=first)
        return table, index if index is not None and 0 <= index < len(table) else None

    def _continues(self, timestep: Timestep, run: PipelineRun | None, fresh: list[Scheduler]) -> bool:
        """Return true if a copied timestep, which is read, continues its run rather than starting the new list of
        another scheduler."""
        assert run is not None
        level = self._level(read(self._levels(timestep)))
        coming, first = run.coming[:2], [levels_and(scheduler, [])[0][0] for scheduler in fresh]
        return any(is_near(level, other) for other in coming) and not any(is_near(level, other) for other in first)

    def _levels(self, timestep: Timestep) -> list[Tensor]:
        """Return the highest and the lowest timestep over samples, each that of its noisiest token, as scalars."""
        known = _loop.get().get("timestep")
        timestep = torch.as_tensor(timestep if known is None else known)
        if timestep.numel() == 1:
            return [timestep.reshape(())]
        tokens = timestep.reshape(1 if self.by_token else len(timestep), -1)
        noisiest = tokens.amax(dim=1) if self.scale > 0 else tokens.amin(dim=1)
        return [noisiest.amax(), noisiest.amin()]

    def _level(self, values: list[float]) -> float:
        if values[0] != values[-1]:
            raise ValueError(
                f"a cached call needs one timestep for the whole batch, got {values}: "
                "call skipdit.disable_cache(model), or split the batch"
            )
        scale = self.scale if _loop.get().get("timestep") is None else 1.0
        # 0.7 in float32 is a timestep of 700, not of 699.99999
        return values[0] if scale == 1 else round(values[0] * scale + (1000 if scale < 0 else 0), 3)

    def _begin(self, key: Key, run: PipelineRun, timestep: Timestep) -> None:
        """Read the list of a run, and if it counts its calls the timestep of the first. Drop runs that can no longer be
        continued: branches under another list, and runs of threads that ended."""
        for scheduler, table in self._lists().items():
            if table is run.order:
                self.begun[scheduler] = table
                run.levels, numbers = levels_and(scheduler, self._levels(timestep)[:1] if run.counted else [])
                if run.counted:
                    run.place = place_in(run.levels, self._level(numbers))
        alive = {thread.ident for thread in threading.enumerate()}
        for name, other in list(self.runs.items()):
            lists = _is_list(run.order) and _is_list(other.order) and other.order is not run.order
            if name[0] not in alive or (name[:2] == key[:2] and lists):
                del self.runs[name]
        others = self._other_parts(key, run)
        run.start = min([run.place, *(other.start for other in others)])
        if not others:
            self.check(run.coming)

    def _other_parts(self, key: Key, run: PipelineRun) -> list[PipelineRun]:
        """Return the other runs on a run's list: branches, and those of the other transformers of its pipelines."""
        models = (getattr(pipeline, name, None) for pipeline in list(self.pipelines) for name in TRANSFORMERS)
        caches = (getattr(model, "_skipdit_cache", None) for model in models)
        runs = [*self.runs.items(), *(each for cache in caches if cache for each in list(cache.streams.runs.items()))]
        return [other for name, other in runs if name[:2] == key[:2] and other.order is run.order is not None]

    def _others_stepped(self, key: Key, run: PipelineRun, last: float, place: float) -> bool:
        """Return true if other streams of the run made a step between these two places."""
        others = [other for name, other in self.runs.items() if name[:2] == key[:2] and other.order is run.order]
        places = (between for other in (run, *others) for stream in other.streams for between in stream.places)
        return any(last < between < place for between in places)

    def branches(self, run: PipelineRun, stream: Stream) -> list[Stream]:
        """Return the other guidance branches of a run: streams of the same layout, whose steps have the same order."""
        key = next(key for key, other in self.runs.items() if other is run)
        runs = [other for name, other in self.runs.items() if name[:2] == key[:2] and other.order is run.order]
        streams = [branch for other in runs for branch in other.streams]
        return [branch for branch in streams if branch is not stream and branch.layout == stream.layout]

    def noise_share(self, run: PipelineRun) -> float:
        """Return the share of noise, from 0 to 1, in the latents of a run's last call: of a process with betas by its
        scheduler, if that is watched, otherwise the noise level."""
        scheduler = next((scheduler for scheduler, table in self._lists().items() if table is run.order), None)
        if scheduler is not None and scheduler not in self.shares:
            self.shares[scheduler] = noise_shares(scheduler)
        shares = [] if scheduler is None else self.shares[scheduler]
        if not shares:
            return run.level / 1000
        return shares[min(max(round(run.level / 1000 * len(shares)), 0), len(shares) - 1)]

    # ------------------------------------------------------------------------------------------------------------------
    # The end of a run

    def end(self) -> None:
        """End this thread's runs in the current context and drop their stores."""
        runs = self.runs_in_context
        self.drop(runs)
        self.over(runs)

    @property
    def runs_in_context(self) -> list[PipelineRun]:
        """This thread's runs in the current context, all branches; outside of any context, those called outside."""
        thread, path = threading.get_ident(), _context.get()
        keys = [key for key in self.runs if key[0] == thread and (key[1][: len(path)] == path if path else not key[1])]
        return [self.runs[key] for key in keys]

    def drop(self, runs: list[PipelineRun]) -> None:
        """Drop these runs and their stores; their counts stay for the summary."""
        if runs:
            self.ended_at = self.num_calls
            self.ended_counts = sum((run.counts for run in runs), StepCounts())
        self.runs = {key: run for key, run in self.runs.items() if run not in runs}

    @property
    def bytes_held(self) -> int:
        return sum(stream.bytes_held for run in list(self.runs.values()) for stream in run.streams)

    @property
    def counts(self) -> StepCounts:
        """Counts of the current runs, or of those that ended last."""
        current = [run.counts for run in self.current_runs]
        return sum(current, StepCounts()) if current else self.ended_counts

    @property
    def current_runs(self) -> list[PipelineRun]:
        """Runs that were called since others ended."""
        return [run for run in list(self.runs.values()) if run.last_call > self.ended_at]


def _by_level(run: PipelineRun, level: float) -> tuple[PipelineRun, float]:
    """Return the run of a bare model at this noise level, and the place there. In a run noise falls; after two steps
    in which it rose, as in an inversion by hand, it rises."""
    place = level if run.rises else -level
    if not run.streams or place >= run.place:
        return run, place
    single = not run.rises and all(stream.counts.full + stream.counts.reused == 1 for stream in run.streams)
    if not (single and run.risen):
        return PipelineRun(None, risen=single), -level
    run.rises = True
    for stream in run.streams:
        stream.places = (run.level, run.level)
    return run, level


def _is_list(order: Order) -> TypeGuard[Tensor]:
    """Return true if calls are ordered by the list of a watched scheduler."""
    return isinstance(order, Tensor)
