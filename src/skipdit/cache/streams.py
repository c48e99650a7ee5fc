"""Finds the stream that a call continues.

A *stream* is a name (`cache_context`), a shape and a conditioning; every call of a stream is its next step. A *run* is
over when the pipeline says so (`_reset_stateful_cache`), when a watched scheduler has a new list of timesteps, or when
the timestep turns back. What `cache_context(name, step_index=..., timestep=...)` says is believed.

Under a watched scheduler a step is known by its place in the list, and the device is asked for nothing. For a bare
model the timestep is read once per call. Conditioning is known by the tensors themselves; only where they are created
anew at each step are their contents compared, as checksums that are read together with the timestep.
"""

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from skipdit.cache.conditions import Conditions, read
from skipdit.cache.state import Counts
from skipdit.cache.steppers import PartState
from skipdit.diffusion import noise_levels
from skipdit.models.costs import Costs
from skipdit.models.forward_plan import ForwardPlan

# more streams than this in one run are not guidance: the cache misunderstands its calls
MAX_STREAMS = 16
# beyond this many runs, the least recently called are dropped
MAX_RUNS = 64

_context: ContextVar[tuple[str, ...]] = ContextVar("skipdit_cache_context", default=())
_branch: ContextVar[tuple[str, ...]] = ContextVar("skipdit_cache_branch", default=())
_told: ContextVar[Mapping[str, Any]] = ContextVar("skipdit_cache_place", default={})  # noqa: B039

TOLD = "told"  # the order of calls whose places come from `cache_context`
Key = tuple[int, tuple[str, ...], tuple[str, ...]]  # thread, contexts, names from the model's own `cache_context`


@contextmanager
def cache_context(name: str) -> Iterator[None]:
    """Keep the calls inside, the run `name`, apart from all others. Contexts nest.

    Needed only where one thread alternates between steps of several runs; our own pipelines enter one by themselves,
    and guidance branches that differ in their conditioning are told apart without it.
    """
    with _entered(_context, (*_context.get(), name)):
        yield


@contextmanager
def branch_context(name: str, **where: Any) -> Iterator[None]:
    """Keep the calls inside, a branch of the current run, apart from its other branches; all end together. where: the
    place in the loop, with the fields of diffusers' `CacheContext`."""
    with _entered(_branch, (*_branch.get(), name)), _entered(_told, where):
        yield


@contextmanager
def _entered(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


# ----------------------------------------------------------------------------------------------------------------------
# Streams and runs


@dataclass(eq=False)
class Stream:
    """The calls of one name, shape and conditioning: what they have stored, and their counts.

    places: of the last step, and of the one before it. new: the arguments in which it differed, when it began, from the
    streams of the previous step. levels: noise levels of its steps since `states` was last renewed. coming: noise
    levels of the run from this step on, where they are known. costs: see `Costs`. compiled: the plans whose graphs have
    been called.
    """

    layout: tuple
    conditions: Conditions
    states: list[PartState]
    places: tuple[float, float]
    new: set[str] = field(default_factory=set)
    levels: list[float] = field(default_factory=list)
    coming: list[float] = field(default_factory=list)
    costs: Costs | None = None
    compiled: set[ForwardPlan] = field(default_factory=set)
    counts: Counts = field(default_factory=Counts)

    def go_on(self, given: Conditions, place: float) -> None:
        """Record a step at this place, whose conditions equal the previous ones."""
        given.sums = self.conditions.sums | given.sums
        given.add_checksums()
        self.conditions = given
        if place != self.places[0]:
            self.places = (place, self.places[0])

    @property
    def bytes_held(self) -> int:
        """Size of the memory that is kept alive: a view counts as the whole tensor, and shared memory counts once."""
        storages = [tensor.untyped_storage() for state in self.states for tensor in state.tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(eq=False)
class Run:
    """The streams of one name.

    order: what orders the steps: the list of a watched scheduler, `TOLD`, or `None` for the timestep itself. place: of
    the last call; it grows from step to step. level: its noise level, from 0 to 1000. levels: of the whole list.
    rises: whether the timestep of a bare model grows. risen: whether the previous run had one step, at a lower
    timestep. changing: arguments that are new at each call. dropped: the counts of streams that are no longer kept.
    """

    order: Any
    levels: list[float] = field(default_factory=list)
    place: float = -math.inf
    level: float = 0.0
    rises: bool = False
    risen: bool = False
    streams: list[Stream] = field(default_factory=list)
    changing: set[str] = field(default_factory=set)
    dropped: Counts = field(default_factory=Counts)
    last_call: int = 0
    warned: bool = False

    @property
    def counts(self) -> Counts:
        return sum((each.counts for each in self.streams), self.dropped)

    @property
    def coming(self) -> list[float]:
        """The noise levels of the steps from this one on, where they are known."""
        return self.levels[int(self.place) :] if self.levels else []

    def follow_levels(self) -> None:
        """From now on, order the steps by the timesteps of the calls instead of by a list."""
        for stream in self.streams:
            stream.places = (-stream.levels[-1], -stream.levels[-1])
        self.order, self.levels, self.place = None, [], max(stream.places[0] for stream in self.streams)

    def drop(self, stream: Stream) -> None:
        self.streams.remove(stream)
        self.dropped += stream.counts

    def make_room(self) -> None:
        """Make room for one more stream: the least recently called one goes, with a warning the first time."""
        if len(self.streams) == MAX_STREAMS:
            if self.dropped == Counts():
                warnings.warn("labels, text states or options are new at each call: steps stay full", stacklevel=5)
            self.drop(self.streams[0])

    def find(self, fitting: list[Stream], given: Conditions, place: float) -> tuple[Stream | None, set[str]]:
        """Return the stream of an equal conditioning, or else what is new since the nearest stream of an earlier step.
        What is new at two steps in a row is no condition, unless it tells calls of one step apart."""
        unequal = {stream: given.unequal(stream.conditions) - self.changing for stream in fitting}
        equal = next((stream for stream in reversed(fitting) if not unequal[stream]), None)
        waiting = [stream for stream in reversed(fitting) if stream.places[0] < place]
        nearest = equal or min(waiting, key=lambda stream: len(unequal[stream]), default=None)
        if equal is not None or nearest is None:
            return equal, set()
        new = unequal[nearest]
        alike = [each for each in fitting if not each.conditions.unequal(nearest.conditions) - self.changing - new]
        if not new <= nearest.new or sum(each.places[0] == nearest.places[0] for each in alike) > 1:
            return None, new
        self.changing |= new
        for each in alike:
            if each is not nearest:
                self.drop(each)
        return nearest, new


# ----------------------------------------------------------------------------------------------------------------------
# All runs of a model


class Streams:
    """All runs of one cached model.

    start: makes the states of a new stream. check: is given the noise levels of each run that begins. over: is given
    runs that are over. scale: from the timestep argument to noise levels; below 0 where it rises as noise falls.
    """

    def __init__(
        self,
        start: Callable[[], list[PartState]],
        check: Callable[[list[float]], None],
        over: Callable[[list[Run]], None],
        scale: float,
        *,
        by_token: bool = False,
    ) -> None:
        self.start, self.check, self.over, self.scale, self.by_token = start, check, over, scale, by_token
        self.pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
        # for each watched scheduler, the list on which a run began last
        self.begun: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
        self.runs: dict[Key, Run] = {}
        self.num_calls, self.ended_at, self.ended_counts = 0, 0, Counts()

    def watch(self, pipeline: Any) -> None:
        """Follow the scheduler of a pipeline. Copied timesteps belong to lists that it makes from now on."""
        self.pipelines.add(pipeline)
        self.begun |= self._lists()

    def next(self, timestep: Any, latents: Any, conditions: Mapping[str, Any]) -> tuple[Run, Stream]:
        """Return the run and the stream that a call continues; either may be new."""
        key = threading.current_thread().ident or 0, _context.get(), _branch.get()
        given, layout, before = Conditions(conditions), layout_of(latents), self.runs.pop(key, None)
        run, place, stream, fitting = self._place(key, before, timestep, given, layout)
        if place < run.place or (run.levels and place >= len(run.levels)):
            run, place = Run(run.order, run.levels, level=run.level), place if place < run.place else 0
        if not run.streams:
            stream, fitting, run.place = None, [], place
            self.over([] if before is None else [before])
            self._begin(key, run)
        run.place = place
        run.level = run.levels[int(place)] if run.levels else run.level

        new: set[str] = set()
        if stream is None and fitting:
            stream, new = run.find(fitting, given, place)
        if stream is None:
            given.add_checksums()
            run.make_room()
            stream = Stream(layout, given, self.start(), (place, place), new)
        else:
            run.streams.remove(stream)
            if self._went_on(key, run, stream.places[0], place):
                stream.states, stream.levels = self.start(), []
            stream.go_on(given, place)
        stream.levels.append(run.level)
        stream.coming = run.coming
        run.streams.append(stream)  # the last called stands last
        self._keep(key, run)
        return run, stream

    def _place(
        self, key: Key, before: Run | None, timestep: Any, given: Conditions, layout: tuple
    ) -> tuple[Run, float, Stream | None, list[Stream]]:
        """Return a call's run and its place there; its stream, where the very same tensors identify it; and the streams
        of its shape. Whatever must be read is read at once."""
        branches = [each for name, each in self.runs.items() if key[2] and name[2] and name[:2] == key[:2]]
        order, place = self._known_place(timestep, before, branches)
        run = before if before is not None and before.order is order else Run(order)
        fitting = [each for each in run.streams if each.layout == layout]
        same = [each for each in fitting if not given.differing(each.conditions) - run.changing]
        # for a tensor of inference mode, nobody can tell whether it was written between two calls of one step
        unsure = None in given.versions.values() and (order is None or any(each.places[0] == place for each in same))
        stream = same[0] if len(same) == 1 and not unsure else None

        again = stream is not None and stream.places[0] == run.place
        if place is None and again and isinstance(timestep, Tensor) and timestep.ndim > 1:
            # each frame has a scheduler of its own, and that of the pipeline stands still (diffusion forcing)
            order = run.follow_levels()

        levels = [] if isinstance(order, Tensor) else self._levels(timestep)
        answers = given.compare([each.conditions for each in fitting] if stream is None else [], levels)
        level = self._level(answers) if levels else 0.0
        if order is None:
            run, place = _by_level(run, level)
        elif place is None:  # counted: a stream that has already made the run's current step makes the next one
            place = 0 if not run.streams else run.place + again
        run.level = level
        assert place is not None
        return run, place, stream, fitting

    def _keep(self, key: Key, run: Run) -> None:
        self.runs[key] = run
        if len(self.runs) > MAX_RUNS:
            del self.runs[next(iter(self.runs))]
        self.num_calls += 1
        run.last_call = self.num_calls

    # ------------------------------------------------------------------------------------------------------------------
    # Where a call stands

    def _lists(self) -> dict[Any, Tensor]:
        """Return the timesteps of each watched scheduler; one that has not been set up lists all that there are."""
        schedulers = {id(each.scheduler): each.scheduler for each in list(self.pipelines)}.values()
        return {each: each.timesteps for each in schedulers if getattr(each, "num_inference_steps", None) is not None}

    def _tables(self, order: Any) -> Iterator[Tensor]:
        """Yield the list that orders a run, then those of the schedulers: nearly always the first is the one."""
        if isinstance(order, Tensor):
            yield order
        yield from self._lists().values()

    def _known_place(self, timestep: Any, run: Run | None, branches: list[Run]) -> tuple[Any, float | None]:
        """Return what orders the run's calls, and this call's place as far as it is known without asking the device:
        `None` where it must be counted or read. branches: the other named branches of the same run."""
        told, order = _told.get(), None if run is None else run.order
        for table in self._tables(order):
            for entry in (timestep, told.get("timestep")):
                if _shares_memory(entry, table):
                    return table, int(cast(Tensor, entry).storage_offset() - table.storage_offset())
        lists = self._lists()
        current = next((each for each, table in lists.items() if run is not None and table is run.order), None)
        fresh = [each for each, table in lists.items() if self.begun.get(each) is not table]
        if current is not None and fresh and not self._goes_on(timestep, run, fresh):
            current = None
        if current is None and len(fresh) == 1 and not _is_entry(timestep):
            current = fresh[0]
        if current is None and run is None and not _is_entry(timestep):  # a branch that begins after others
            current = next((key for key, table in lists.items() if any(table is each.order for each in branches)), None)
        index, count = told.get("step_index"), told.get("num_inference_steps")
        if current is None:
            return (None, None) if index is None else (TOLD, index)
        table = lists[current]
        if index is not None and count is not None:
            index += len(table) - count  # of a run that starts later
        if index is None:
            index = getattr(current, "step_index", None)
        if index is None and (run is None or run.order is not table):
            begun = [int(each.place) for each in branches if each.order is table]
            index = max(begun, default=getattr(current, "begin_index", None) or 0)
        return table, index if index is not None and 0 <= index < len(table) else None

    def _goes_on(self, timestep: Any, run: Run | None, fresh: list[Any]) -> bool:
        """Whether a copied timestep continues its run, rather than starting another scheduler's new list. Reads it."""
        assert run is not None
        level = self._level(read(self._levels(timestep)))
        coming, first = run.coming[:2], [_levels_of(each)[0] for each in fresh]
        return any(_near(level, each) for each in coming) and not any(_near(level, each) for each in first)

    def _levels(self, timestep: Any) -> list[Tensor]:
        """Return what must be read of a timestep: the highest and lowest over samples, each of its noisiest token."""
        told = _told.get().get("timestep")
        timestep = torch.as_tensor(timestep if told is None else told)
        if timestep.numel() == 1:
            return [timestep.reshape(())]
        tokens = timestep.reshape(1 if self.by_token else len(timestep), -1)
        noisiest = tokens.amax(dim=1) if self.scale > 0 else tokens.amin(dim=1)
        return [noisiest.amax(), noisiest.amin()]

    def _level(self, read: list[float]) -> float:
        if read[0] != read[-1]:
            raise ValueError(
                f"a cached call needs one timestep for the whole batch, got {read}: "
                "call skipdit.disable_cache(model), or split the batch"
            )
        scale = self.scale if _told.get().get("timestep") is None else 1.0
        # 0.7 in float32 is a timestep of 700, not of 699.99999
        return read[0] if scale == 1 else round(read[0] * scale + (1000 if scale < 0 else 0), 3)

    def _begin(self, key: Key, run: Run) -> None:
        """Drop runs that can no longer be continued: branches under another list, and runs of threads that ended."""
        for scheduler, table in self._lists().items():
            if table is run.order:
                self.begun[scheduler] = table
                run.levels = _levels_of(scheduler)
        alive = {thread.ident for thread in threading.enumerate()}
        for name, other in list(self.runs.items()):
            lists = isinstance(run.order, Tensor) and isinstance(other.order, Tensor) and other.order is not run.order
            if name[0] not in alive or (name[:2] == key[:2] and lists):
                del self.runs[name]
        self.check(run.coming)

    def _went_on(self, key: Key, run: Run, last: float, place: float) -> bool:
        """Whether other streams of the run made a step between these two places."""
        others = [each for name, each in self.runs.items() if name[:2] == key[:2] and each.order is run.order]
        return any(
            last < each < place for other in (run, *others) for stream in other.streams for each in stream.places
        )

    # ------------------------------------------------------------------------------------------------------------------
    # The end of a run

    def end(self) -> None:
        """Drop what this thread's runs in the current context hold."""
        runs = self.own_runs
        self.drop(runs)
        self.over(runs)

    @property
    def own_runs(self) -> list[Run]:
        """This thread's runs in the current context, all branches. Outside of any context, these are the runs that were
        called outside of any."""
        thread, path = threading.get_ident(), _context.get()
        own = [key for key in self.runs if key[0] == thread and (key[1][: len(path)] == path if path else not key[1])]
        return [self.runs[key] for key in own]

    def drop(self, runs: list[Run]) -> None:
        """Drop what these runs hold; their counts stay for the summary."""
        if runs:
            self.ended_at = self.num_calls
            self.ended_counts = sum((run.counts for run in runs), Counts())
        self.runs = {key: run for key, run in self.runs.items() if run not in runs}

    @property
    def bytes_held(self) -> int:
        return sum(stream.bytes_held for run in list(self.runs.values()) for stream in run.streams)

    @property
    def counts(self) -> Counts:
        """The counts of the current runs, or of those that ended last."""
        current = [run.counts for run in self.current_runs]
        return sum(current, Counts()) if current else self.ended_counts

    @property
    def current_runs(self) -> list[Run]:
        """The runs that were called since others ended."""
        return [run for run in list(self.runs.values()) if run.last_call > self.ended_at]


def _by_level(run: Run, level: float) -> tuple[Run, float]:
    """Return the run of a bare model at this noise level, and the place there. A run falls; after two steps that rose,
    as in an inversion by hand, it rises."""
    place = level if run.rises else -level
    if not run.streams or place >= run.place:
        return run, place
    single = not run.rises and all(stream.counts.full + stream.counts.reused == 1 for stream in run.streams)
    if not (single and run.risen):
        return Run(None, risen=single), -level
    run.rises = True
    for stream in run.streams:
        stream.places = (run.level, run.level)
    return run, level


def _levels_of(scheduler: Any) -> list[float]:
    """Return the noise levels of a scheduler's list, which is read."""
    config = scheduler.config
    num_train_timesteps, inverted = config.get("num_train_timesteps", 1000), config.get("invert_sigmas", False)
    return noise_levels(scheduler.timesteps.tolist(), num_train_timesteps, inverted=inverted)


def layout_of(latents: Any) -> tuple[Any, torch.dtype, torch.device]:
    """Return the shape, dtype and device of latents; for a list of them (Z-Image, one per sample), all shapes."""
    if isinstance(latents, Tensor):
        return latents.shape, latents.dtype, latents.device
    layouts = [layout_of(each) for each in latents]
    return tuple(shape for shape, *_ in layouts), layouts[0][1], layouts[0][2]


def _is_entry(timestep: Any) -> bool:
    """Whether a timestep is a view of one entry of a longer list."""
    return _is_one(timestep) and timestep.untyped_storage().nbytes() > timestep.element_size()


def _shares_memory(timestep: Any, table: Tensor) -> bool:
    """Whether a timestep is a view of an entry of this list, as pipelines pass them."""
    return _is_one(timestep) and timestep.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()


def _is_one(timestep: Any) -> bool:
    return isinstance(timestep, Tensor) and (timestep.numel() == 1 or max(timestep.stride()) == 0)


def _near(level: float, other: float) -> bool:
    """Whether two levels are equal up to what rounding to bfloat16 does."""
    return abs(level - other) < 0.01 + 0.008 * abs(other)
