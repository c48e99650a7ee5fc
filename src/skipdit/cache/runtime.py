"""The cache of one model: makes each of its calls a full or a reuse step.

What a step does is decided outside whatever `model.compile()` compiled, so that it runs one of a few whole graphs.
State belongs to a run, never to the model; the one rule for what a run is stands in `streams`.
"""

import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn

from skipdit.cache.compiled import Call, more_graphs
from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import resolve
from skipdit.cache.state import CacheSummary, Counts
from skipdit.cache.steppers import Part, PartState, Stepper, make_stepper, parts_on
from skipdit.cache.streams import Run, Stream, Streams
from skipdit.models.branches import open_branches
from skipdit.models.costs import Costs, count_costs
from skipdit.models.families import Family, find_family
from skipdit.models.forward_plan import Branches
from skipdit.models.long_skip import LongSkipModel


class CacheRuntime:
    """The cache of one model.

    opened: whether the model's units were opened for the cache alone. make: builds the stepper; by default, what the
    method says.
    """

    def __init__(
        self,
        model: nn.Module,
        method: CacheMethod,
        *,
        opened: bool = False,
        make: Callable[[nn.Module, list[Part]], Stepper] = make_stepper,
    ) -> None:
        linked = cast(LongSkipModel, model)
        self.method, self.opened = method, opened
        self.family = find_family(type(model)) or Family()
        self.model_name = type(model).__name__
        self.names, self.conditions = arguments_of(type(model), self.family)
        parts = parts_on(method, model)
        self.stepper = make(model, parts)
        if any(isinstance(region, Branches) for part in parts for region in (*part.regions, *part.probe)):
            open_branches(linked)
        self.num_units, self.timestep_scale = linked.long_skip_links.num_units, linked.timestep_scale
        self.reset()

    def reset(self) -> None:
        self.lock = threading.RLock()  # one step at a time: threads take turns
        by_token = self.family.timestep_by_token
        self.streams = Streams(
            self._start, self._check_reuses, self._warn_unless_reused, self.timestep_scale, by_token=by_token
        )
        self.costs: dict[tuple[Any, ...], Costs] = {}
        self.peak_bytes_held = 0

    @property
    def parts(self) -> list[Part]:
        return self.stepper.parts

    def _start(self) -> list[PartState]:
        return [PartState.of(part) for part in self.parts]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, or of a pickle: it caches in the same way and shares no state."""
        return {name: value for name, value in vars(self).items() if name not in ("lock", "streams", "costs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CacheRuntime":
        """Copy; together with its pipeline, the copy watches the copied pipeline's scheduler."""
        copy = object.__new__(type(self))
        copy.__setstate__(self.__getstate__())
        for pipeline in self.streams.pipelines:
            if id(pipeline) in memo:
                copy.streams.pipelines.add(memo[id(pipeline)])
        return copy

    # ------------------------------------------------------------------------------------------------------------------
    # One call

    def call(self, model: nn.Module, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Make one call of the model, through `run`, as the next step of its stream. A call that comes with a plan is
        the plain model's, and no step."""
        if model.training:
            raise RuntimeError("a cache serves inference: call model.eval(), or skipdit.disable_cache(model) to train")
        if "plan" in kwargs:
            with self.lock, more_graphs():
                return run(*args, **kwargs)
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        for name in (self.family.latents, self.family.timestep):
            if arguments.get(name) is None:
                raise TypeError(f"a cached call of {self.model_name} needs its argument {name!r}")
        given = {name: arguments.get(name, default) for name, default in self.conditions.items()}
        with self.lock:
            this_run, stream = self.streams.next(arguments[self.family.timestep], arguments[self.family.latents], given)
            call = Call(model, run, args, kwargs, stream.layout[2], stream.compiled)
            try:
                output = self._step(call, stream)
            except BaseException:
                self.streams.drop(self.streams.own_runs)  # the other branches of the run too
                open_call = cast(LongSkipModel, model).open_call
                if open_call is not None:
                    open_call.state = None
                raise
            if len(this_run.coming) == 1 and self.method.schedule.is_adaptive:
                self._warn_unless_reused(self.streams.current_runs)
        return output

    def _step(self, call: Call, stream: Stream) -> Any:
        made, stream.costs = None, self.costs.get(stream.layout)
        if stream.costs is None and not self.family.counted:
            stream.costs = Costs.by_weights(call.model)
        elif stream.costs is None and call.has_graphs:  # a counter sees nothing inside, and torch compiles nothing
            _, stream.costs = count_costs(call.model, call.eager)
        elif stream.costs is None:
            made, stream.costs = count_costs(call.model, lambda: self.stepper.step(call, stream))
        output, reused = made or self.stepper.step(call, stream)
        self.costs[stream.layout] = stream.costs
        stream.counts += Counts(int(not reused), int(bool(reused)), cost=stream.costs.of_step(reused))
        if not reused:
            self.peak_bytes_held = max(self.peak_bytes_held, self.streams.bytes_held)
        return output

    def _check_reuses(self, levels: list[float]) -> None:
        """Raise `ValueError` where a run of several steps at these noise levels would never reuse."""
        if self.method.may_stay_full or self.method.schedule.is_adaptive or len(levels) < 2:
            return
        if all(all(resolve(part.schedule, levels)) for part in self.parts):
            raise ValueError(f"cache {self.method} would never reuse in {len(levels)} steps")

    def _warn_unless_reused(self, runs: list[Run]) -> None:
        """Warn once, and name the cause, where runs of several steps that are over have never reused."""
        streams = [stream for run in runs for stream in run.streams]
        longest = max(streams, key=lambda each: each.counts.full, default=None)
        if longest is None or longest.counts.full < 2 or any(run.warned or run.counts.reused for run in runs):
            return
        cause = self._why_never(longest.levels)
        if cause is not None:
            for run in runs:
                run.warned = True
            warnings.warn(
                f"cache {self.method} has not reused once in {longest.counts.full} steps: {cause}", stacklevel=3
            )

    def _why_never(self, levels: list[float]) -> str | None:
        """Return why a run of these noise levels has never reused; `None` where that is no mistake."""
        schedules, most, least = [part.schedule for part in self.parts], max(levels), min(levels)
        if self.method.schedule.is_adaptive:
            return None if self.method.may_stay_full else "raise its threshold"
        if most <= 1.5 and any(set(each.decisions([1000 * level for level in levels])) != {None} for each in schedules):
            return f"timesteps are {most:g} to {least:g}, not 1000 to 0: timestep_scale of its Family does not fit"
        if self.method.may_stay_full:
            return None
        return (
            f"timesteps from {most:g} to {least:g}, all that this {self.model_name} was called at, are full by schedule"
        )

    # ------------------------------------------------------------------------------------------------------------------
    # The end of a run, and its summary

    def end_runs(self) -> None:
        """Drop what this thread's runs in the current context hold; their counts stay for the summary."""
        with self.lock:
            self.streams.end()

    def summary(self, others: Sequence["CacheRuntime"] = ()) -> CacheSummary:
        """Return what it did. others: those of more models that share its runs, as if all steps were one model's."""
        everything = (self, *others)
        counts = sum((each.streams.counts for each in everything), Counts())
        return CacheSummary(
            method=str(self.method),
            model=self.model_name,
            num_units=self.num_units,
            reused=tuple(str(region) for part in self.parts for region in part.regions),
            steps_full=counts.full,
            steps_reused=counts.reused,
            steps_shallow=counts.shallow,
            steps_held=counts.held,
            compute_ratio=counts.predictions / counts.cost if counts.cost else 1.0,
            bytes_held=sum(each.streams.bytes_held for each in everything),
            peak_bytes_held=sum(each.peak_bytes_held for each in everything),
        )


def arguments_of(model_class: type[nn.Module], family: Family) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the names of a forward's arguments, and the defaults of those that may tell one stream of calls from
    another. They are read from the class: what a hook leaves on an instance may have an unbound function's signature.
    """
    _, *parameters = inspect.signature(model_class.forward).parameters.values()
    others = {family.latents, family.timestep, *family.changing, "return_dict", "plan", "stored"}
    conditions = {each.name: each.default for each in parameters if each.name not in others}
    return tuple(each.name for each in parameters), conditions
