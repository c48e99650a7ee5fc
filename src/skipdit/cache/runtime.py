"""The cache of one model: makes each of its calls a full or a reuse step.

Steps are decided outside the graphs of `model.compile()`, so that a step runs one of a few whole graphs. State belongs
to a run, never to the model; `streams` defines what a run is.
"""

import inspect
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from skipdit.cache.compiled import Call, more_graphs
from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import resolve
from skipdit.cache.state import CacheSummary, StepCounts
from skipdit.cache.steppers import CacheRule, RuleState, Stepper, make_stepper, rules_on
from skipdit.cache.streams import PipelineRun, Stream, Streams
from skipdit.cache.timesteps import Layout
from skipdit.cache.whole import tensors_in
from skipdit.interfaces import Fields, ModelOutput
from skipdit.models.branches import open_branches
from skipdit.models.costs import Costs, count_costs
from skipdit.models.families import Family, find_family
from skipdit.models.long_skip import LongSkipModel

LONG_RUN = 20  # runs of at least so many steps warn if too few of them are full
# timesteps between two steps that have little in common, from a scale of guidance on: benchmarks/where_caching_fails.md
FAR_APART = {6: 75, 4: 100, 0: 150}
EMBEDDED = "guidance"  # argument of distilled models for a scale that multiplies no difference of predictions
MOST_PER_FULL = 2.5  # a run's cost, in full steps, over the number of its full steps: `benchmarks/calibration.md`


class FewerStepsWarning(UserWarning):
    """Fewer steps without a cache would be about as good."""


class CacheRuntime:
    """The cache of one model.

    opened: true if the model's units were opened for the cache alone. make: builds the stepper; by default, the one
    that the method needs.
    """

    def __init__(
        self,
        model: nn.Module,
        method: CacheMethod,
        *,
        opened: bool = False,
        make: Callable[[nn.Module, list[CacheRule]], Stepper] = make_stepper,
    ) -> None:
        self.method, self.opened = method, opened
        self.family = find_family(type(model)) or Family()
        self.model_name = type(model).__name__
        family = self.family
        self.others = {family.latents, family.timestep, *family.changing, "return_dict", "plan", "stored"}
        self.names, self.conditions = arguments_of(type(model), self.others)
        rules = rules_on(method, model)
        self.stepper = make(model, rules)
        linked = LongSkipModel.find(model)
        in_branches = any(region.is_in_branches for rule in rules for region in (*rule.regions, *rule.probe))
        if linked is not None and in_branches:
            open_branches(linked)
        self.by_guidance = any(rule.method.site.beside_first for rule in rules)
        self.num_units = 0 if linked is None else linked.long_skip_links.num_units
        self.timestep_scale = (self.family if linked is None else linked).timestep_scale
        self.reset()

    def reset(self) -> None:
        self.lock = threading.RLock()  # one step at a time: threads take turns
        by_token = self.family.timestep_by_token
        self.streams = Streams(self._start, self._check_reuses, self._review, self.timestep_scale, by_token=by_token)
        self.costs: dict[Layout, Costs] = {}
        self.peak_bytes_held, self.has_advised, self.has_branches = 0, False, False

    @property
    def rules(self) -> list[CacheRule]:
        return self.stepper.rules

    def _start(self) -> list[RuleState]:
        return [RuleState.of(rule) for rule in self.rules]

    def __getstate__(self) -> Fields:
        """Return the state of a copy or a pickle, which caches in the same way and shares no runs."""
        return {name: value for name, value in vars(self).items() if name not in ("lock", "streams", "costs")}

    def __setstate__(self, state: Fields) -> None:
        vars(self).update(state)
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CacheRuntime":
        """Copy; a copy made together with its pipeline watches the copied scheduler."""
        copy = object.__new__(type(self))
        copy.__setstate__(self.__getstate__())
        for pipeline in self.streams.pipelines:
            if id(pipeline) in memo:
                copy.streams.pipelines.add(memo[id(pipeline)])
        return copy

    def call(self, model: nn.Module, run: Callable[..., ModelOutput], args: tuple, kwargs: Fields) -> ModelOutput:
        """Call the model, through `run`, as the next step of its stream. A call that has a plan is passed to the plain
        model and is no step."""
        if model.training:
            raise RuntimeError("a cache serves inference: call model.eval(), or skipdit.disable_cache(model) to train")
        if "plan" in kwargs:
            with self.lock, more_graphs():
                return run(*args, **kwargs)
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        for name in (self.family.latents, self.family.timestep):
            if arguments.get(name) is None:
                raise TypeError(f"a cached call of {self.model_name} needs the argument {name!r}")
        conditions = self.conditions | {name: value for name, value in arguments.items() if name not in self.others}
        with self.lock:
            timestep, latents = arguments[self.family.timestep], arguments[self.family.latents]
            current, stream = self.streams.next(timestep, latents, conditions)
            call = Call(
                model,
                run,
                args,
                kwargs,
                stream.layout[2],
                stream.compiled,
                latents,
                lambda: self.streams.noise_share(current),
                stream.forms,
                self._first_output(current, stream) if self.by_guidance else latents,
                bool(arguments.get("return_dict", True)),
            )
            try:
                output = self._step(call, stream)
                if self.by_guidance and call.base is None:
                    stream.output = [tensor.detach().clone() for tensor in tensors_in(output)]
            except BaseException:
                self.streams.drop(self.streams.runs_in_context)  # the other branches of the run too
                linked = LongSkipModel.find(model)
                if linked is not None and linked.open_call is not None:
                    linked.open_call.state = None
                raise
            if self.method.schedule.is_adaptive and len(current.coming) == 1:
                self._review(self.streams.current_runs)
        return output

    def _first_output(self, run: PipelineRun, stream: Stream) -> list[Tensor] | None:
        """Return the output of the guidance branch that was called first at this step; `None` if that is this stream,
        which then runs in full."""
        branches, stream.output = self.streams.branches(run, stream), []
        called = [branch for branch in branches if branch.places[0] == stream.places[0] and branch.output]
        self.has_branches |= bool(called)
        return min(called, key=lambda branch: branch.last_call).output if called else None

    def _step(self, call: Call, stream: Stream) -> ModelOutput:
        result, stream.costs = None, stream.costs or self.costs.get(stream.layout)
        if stream.costs is None:
            linked = LongSkipModel.find(call.model)
            if linked is None:
                stream.costs = Costs.at_best(call.model)
            elif not self.family.counted:
                stream.costs = Costs.by_weights(linked)
            elif call.has_graphs:  # a counter sees nothing in graphs, and under one torch does not compile
                _, stream.costs = count_costs(linked, call.eager)
            else:
                result, stream.costs = count_costs(linked, lambda: self.stepper.step(call, stream))
            self.costs[stream.layout] = stream.costs
        output, reused = result or self.stepper.step(call, stream)
        stream.counts += StepCounts(int(not reused), int(bool(reused)), cost=stream.costs.of_step(reused))
        if not reused:
            self.peak_bytes_held = max(self.peak_bytes_held, self.streams.bytes_held)
        return output

    def _check_reuses(self, levels: list[float]) -> None:
        """Raise `ValueError` if a run of several steps at these noise levels would never reuse."""
        if self.method.may_stay_full or self.method.schedule.is_adaptive or len(levels) < 2:
            return
        if all(all(resolve(rule.schedule, levels)) for rule in self.rules):
            raise ValueError(f"cache {self.method} would never reuse in {len(levels)} steps")

    def _review(self, runs: list[PipelineRun]) -> None:
        """Warn once, and name the cause, if runs of several steps that are over have never reused, or in nearly all."""
        streams = [stream for run in runs for stream in run.streams]
        longest = max(streams, key=lambda stream: stream.counts.full, default=None)
        if longest is None or any(run.warned for run in runs):
            return
        counts, reused = longest.counts, any(run.counts.reused for run in runs)
        fault, kind = self._what_is_better(longest) if reused else None, FewerStepsWarning
        if not reused and counts.full > 1 and (cause := self._why_never(longest.levels)) is not None:
            fault, kind = f"cache {self.method} has not reused once in {counts.full} steps: {cause}", UserWarning
        if fault is not None:
            for run in runs:
                run.warned = True
            warnings.warn(fault, kind, stacklevel=3)

    def _what_is_better(self, stream: Stream) -> str | None:
        """Return what would have been better at the cost of a stream's run, if fewer steps would."""
        counts, levels = stream.counts, stream.levels
        num_steps = counts.full + counts.reused
        too_few = num_steps >= LONG_RUN and counts.cost >= MOST_PER_FULL * counts.full
        scale = max((getattr(pipeline, "guidance_scale", 0) or 0 for pipeline in self.streams.pipelines), default=0)
        scale = 0 if EMBEDDED in stream.conditions.tensors else scale
        stride = abs(levels[0] - levels[-1]) / max(len(levels) - 1, 1)
        far_apart = stride >= next(distance for least, distance in FAR_APART.items() if max(scale, 0) >= least)
        if self.has_advised or not (too_few or far_apart):
            return None
        self.has_advised = True
        if far_apart:
            guided = f" at guidance {scale:g}" if stride < FAR_APART[0] else ""
            return (
                f"cache {self.method} in a run of {num_steps} steps{guided}: steps so far apart have little in common, "
                f"and {math.ceil(counts.cost)} steps without a cache are about as good"
            )
        share = (counts.cost - counts.full) / counts.reused
        return (
            f"cache {self.method} made {counts.full} of {num_steps} steps in full, and the run cost as much "
            f"as {counts.cost:.0f}, as a reuse step of this {self.model_name} costs {share:.0%} of a full one: "
            f"{counts.cost:.0f} steps without a cache are likely better; or ask for a smaller speedup"
        )

    def _why_never(self, levels: list[float]) -> str | None:
        """Return why a run of these noise levels has never reused; `None` if that is intended."""
        if self.by_guidance:
            alone = "it was called once per step: guidance is off, or both branches share a call"
            return None if self.has_branches or self.method.may_stay_full else alone
        schedules, most, least = [rule.schedule for rule in self.rules], max(levels), min(levels)
        if self.method.schedule.is_adaptive:
            return self.method.schedule.why_never(len(levels))
        if most <= 1.5 and any({*when.decisions([1000 * level for level in levels])} != {None} for when in schedules):
            return f"timesteps are {most:g} to {least:g}, not 1000 to 0: the timestep_scale of its Family does not fit"
        if self.method.may_stay_full:
            return None
        return f"this {self.model_name} was called at timesteps {most:g} to {least:g} only, all full by schedule"

    # ------------------------------------------------------------------------------------------------------------------
    # The end of a run, and its summary

    def end_runs(self) -> None:
        """End this thread's runs in the current context: drop their stores, keep their counts for the summary."""
        with self.lock:
            self.streams.end()

    def close(self) -> None:
        """Drop all runs and their stores; the counts of the current ones stay for the summary."""
        with self.lock:
            self.streams.drop(self.streams.current_runs)
            self.streams.runs.clear()

    def summary(self, others: Sequence["CacheRuntime"] = ()) -> CacheSummary:
        """Return the summary. others: caches of other models of the same pipeline, whose steps are added."""
        caches = (self, *others)
        counts = sum((cache.streams.counts for cache in caches), StepCounts())
        return CacheSummary(
            method=str(self.method),
            model=self.model_name,
            num_units=self.num_units,
            reused=tuple(str(region) for rule in self.rules for region in rule.regions),
            steps_full=counts.full,
            steps_reused=counts.reused,
            steps_shallow=counts.shallow,
            steps_held=counts.held,
            compute_ratio=counts.predictions / counts.cost if counts.cost else 1.0,
            bytes_held=sum(cache.streams.bytes_held for cache in caches),
            peak_bytes_held=sum(cache.peak_bytes_held for cache in caches),
        )


def arguments_of(model_class: type[nn.Module], others: set[str]) -> tuple[tuple[str, ...], Fields]:
    """Return the names of a forward's arguments, and the defaults of those that may tell streams apart: of all but
    `others`. They are read from the class: a hook may leave a forward with another signature on the instance."""
    _, *parameters = inspect.signature(model_class.forward).parameters.values()
    conditions = {parameter.name: parameter.default for parameter in parameters if parameter.name not in others}
    return tuple(parameter.name for parameter in parameters), conditions
