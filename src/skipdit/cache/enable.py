"""Switches a cache on and off: the model becomes an instance of a final subclass whose `__call__` is the cache's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from diffusers import DiffusionPipeline
from diffusers.modular_pipelines import ModularPipeline
from torch import nn

from skipdit.cache.fingerprint import check_made_for
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.noise import suited_to
from skipdit.cache.runtime import CacheRuntime
from skipdit.cache.schedule import IntervalSchedule
from skipdit.cache.site import Site
from skipdit.cache.state import CacheSummary
from skipdit.cache.steppers import CacheRule, Stepper, make_stepper
from skipdit.cache.streams import TRANSFORMERS, Stream, branch_context
from skipdit.interfaces import ModelOutput, Transformer
from skipdit.models.branches import close_branches
from skipdit.models.class_swap import SwapMixin, swap, swapped_class
from skipdit.models.costs import Costs
from skipdit.models.families import find_family
from skipdit.models.long_skip import LongSkipModel
from skipdit.models.surgery import close_units, open_units

AnyPipeline = DiffusionPipeline | ModularPipeline
Steps = TypeVar("Steps", bound=Stepper)


class CachedModel(SwapMixin, nn.Module):
    """Mixin before a model's class while its cache is on; `_cached_class` makes the final subclass."""

    _skipdit_cache: CacheRuntime
    is_cache_enabled = True

    def __call__(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self._skipdit_cache.call(self, super().__call__, args, kwargs)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """End the current runs; called by diffusers' pipelines at the end of a call."""
        self._skipdit_cache.end_runs()

    @contextmanager
    def cache_context(self, name: str, **position: Any) -> Iterator[None]:
        """Keep the calls inside apart, as the stream `name` of the current run. position: fields of the loop
        (`step_index`, `num_inference_steps`, `timestep`), which take precedence over the arguments of the calls."""
        context = getattr(super(), "cache_context", None)  # not every class of diffusers has it
        with branch_context(name, **position), nullcontext() if context is None else context(name, **position):
            yield

    # models created through this class have no cache

    @classmethod
    def from_pretrained(cls, *args: object, **options: object) -> Transformer:
        return _plain_class(cls).from_pretrained(*args, **options)

    @classmethod
    def from_config(cls, *args: object, **options: object) -> Transformer:
        return _plain_class(cls).from_config(*args, **options)


@lru_cache
def _cached_class(model_class: type[nn.Module]) -> type[CachedModel]:
    return swapped_class(CachedModel, model_class, _made_by=(_cached_class, model_class))


def models_of(target: nn.Module | AnyPipeline) -> list[nn.Module]:
    """Return the models that a cache of this target covers: the model itself, or all transformers of a pipeline."""
    if type(target).__module__.startswith("torch._dynamo"):
        raise ValueError(
            "torch.compile(model) would compile the cache's decision: call model.compile(fullgraph=True) instead"
        )
    match target:
        case DiffusionPipeline() | ModularPipeline():
            components = target.components
            transformers = [components[name] for name in TRANSFORMERS if components.get(name) is not None]
            if not transformers:
                present = ", ".join(name for name, value in components.items() if value is not None) or "nothing"
                raise ValueError(f"this {type(target).__name__} has no transformer to cache, only {present}")
            return [model for transformer in transformers for model in models_of(transformer)]
        case nn.parallel.DistributedDataParallel():
            return [target.module]
        case nn.Module():
            return [target]
    raise TypeError(f"a cache needs a model or a pipeline, got {type(target).__name__}")


def runtime_of(model: nn.Module) -> CacheRuntime | None:
    """Return the cache of a model; `None` if no cache is enabled on it."""
    return model._skipdit_cache if isinstance(model, CachedModel) else None


def _runtimes_of(target: nn.Module | AnyPipeline) -> list[CacheRuntime]:
    runtimes = []
    for model in models_of(target):
        runtime = runtime_of(model)
        if runtime is None:
            raise ValueError(
                f"no cache is enabled on this {type(model).__name__}: call skipdit.enable_cache(target, 'N2') first"
            )
        runtimes.append(runtime)
    return runtimes


def enable_cache(
    target: nn.Module | AnyPipeline,
    spec: str | Path | CacheMethod,
    *,
    make: Callable[[nn.Module, list[CacheRule]], Stepper] = make_stepper,
) -> None:
    """Make every later call of the model a full or a reuse step; replaces a cache that is already on.

    target: a pipeline, all of whose transformers are cached, with timesteps from its scheduler; or a model, whose
        timesteps are read from its calls: one of ours, or a transformer of diffusers whose units skipdit knows, with
        long skips of its own (HunyuanDiT), with those of `add_long_skips`, or with none (for `delta:`); for
        `auto`, `output:`, `output-taylor:` and `easycache:`, any model.
    spec: `"auto"`, `"N2-700-50"`, any other spec of `skipdit.cache.methods`, a `CacheMethod`, or the path of a
        schedule.json.
    make: builds the stepper, in place of the one that the spec needs; for measurements.

    Raises `ValueError` if the cache could have no effect: a model without long skips, more shallow units than it has
    pairs, an empty window; and, at the first step of a pipeline's run, if the schedule would never reuse in it. After
    an error the target is unchanged.
    """
    method, models = parse_method(spec), models_of(target)
    pipeline = target if isinstance(target, AnyPipeline) else None
    prepared: list[tuple[nn.Module, CacheRuntime]] = []
    try:
        for model in models:
            prepared.append((model, _prepare(model, method, pipeline, make)))
    except BaseException:
        for model, runtime in prepared:
            _undo(model, opened=runtime.opened)
        raise
    for model, runtime in prepared:
        previous = runtime_of(model)
        if previous is not None:
            for watched in previous.streams.pipelines:
                runtime.streams.watch(watched)
            _uncache(model)
        if pipeline is not None:
            runtime.streams.watch(pipeline)
        swap(model, _cached_class(type(model)))
        object.__setattr__(model, "_skipdit_cache", runtime)


def _prepare(
    model: nn.Module, method: CacheMethod, pipeline: AnyPipeline | None, make: Callable[..., Stepper]
) -> CacheRuntime:
    """Open the units and branches that a cache needs and return its runtime; after an error the model is unchanged."""
    previous, linked = runtime_of(model), LongSkipModel.find(model)
    scheduler = None if pipeline is None else pipeline.scheduler
    method = suited_to(method, model, scheduler)
    if previous is None and linked is not None and linked.is_cache_enabled:
        raise ValueError("a cache of diffusers is enabled on this model: call model.disable_cache() first")
    opens = method.needs_units and linked is None and find_family(type(model)) is not None
    opened = opens or (previous is not None and previous.opened)
    if opens:
        with _without_cache(model):
            open_units(model)
    try:
        if method.made_for is not None:
            check_made_for(method.made_for, model, None if scheduler is None else type(scheduler).__name__)
        return CacheRuntime(model, method, opened=opened, make=make)
    except BaseException:
        _undo(model, opened=opened)
        raise


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Give a model its class without a cache inside the block, if one is on."""
    is_cached = isinstance(model, CachedModel)
    if is_cached:
        swap(model, _plain_class(type(model)))
    try:
        yield
    finally:
        if is_cached:
            swap(model, _cached_class(type(model)))


def _undo(model: nn.Module, *, opened: bool) -> None:
    """Close what was opened for a cache that is not switched on; what an earlier one needs stays open."""
    previous = runtime_of(model)
    if previous is None or (opened and not previous.opened):
        with _without_cache(model):
            _close(model, opened=opened)


def _close(model: nn.Module, *, opened: bool) -> None:
    """Close the units and branches that were opened for a cache."""
    linked = LongSkipModel.find(model)
    if opened:
        close_units(model)
    elif linked is not None:
        close_branches(linked)


def disable_cache(target: nn.Module | AnyPipeline) -> None:
    """Restore the model and drop all stored values. Does nothing if no cache is enabled."""
    for model in models_of(target):
        runtime = runtime_of(model)
        if runtime is not None:
            _uncache(model)
            _close(model, opened=runtime.opened)


def _uncache(model: nn.Module) -> None:
    swap(model, _plain_class(type(model)))
    object.__delattr__(model, "_skipdit_cache")


@lru_cache
def _plain_class(model_class: type) -> Any:
    """Return the class without the cache's, also if `fully_shard` has put its own on top of it since."""
    first, *others = model_class.__bases__
    if first is CachedModel:
        return others[0]
    bases = (_plain_class(base) if issubclass(base, CachedModel) else base for base in model_class.__bases__)
    namespace = {name: value for name, value in vars(model_class).items() if name not in ("__dict__", "__weakref__")}
    return type(model_class.__name__, tuple(bases), namespace)


def cache_summary(target: nn.Module | AnyPipeline) -> CacheSummary:
    """Return the summary of the current run, or of the last one; for a pipeline of two transformers, of both together.
    Raises `ValueError` if no cache is enabled."""
    return Cache(_runtimes_of(target)).summary()


def last_stream(model: nn.Module) -> Stream | None:
    """Return the stream of this thread's last call of a model in the current context; `None` without a cache."""
    runtime = runtime_of(model)
    if runtime is None:
        return None
    with runtime.lock:
        run = max(runtime.streams.runs_in_context, key=lambda run: run.last_call, default=None)
    return None if run is None else run.streams[-1]


@dataclass(frozen=True)
class Cache:
    """A cache that `cached` switched on."""

    runtimes: list[CacheRuntime]
    """One per model of the target."""

    def summary(self) -> CacheSummary:
        """Return the summary of the current run, or of the last one; works after the cache is off, too."""
        first, *others = self.runtimes
        return first.summary(others)

    def costs(self) -> Costs:
        """Return the costs of the first model's units and branches, as counted in its last run."""
        return list(self.runtimes[0].costs.values())[-1]


@contextmanager
def cached(
    target: nn.Module | AnyPipeline,
    spec: str | Path | CacheMethod,
    *,
    make: Callable[[nn.Module, list[CacheRule]], Stepper] = make_stepper,
) -> Iterator[Cache]:
    """Switch a cache on inside the block, and off at its end; one that was on before is on again.

    Arguments are those of `enable_cache`.

    Example: `with skipdit.cached(pipe, "auto") as cache: pipe(...); print(cache.summary())`
    """
    runtimes = [(model, runtime) for model in models_of(target) if (runtime := runtime_of(model)) is not None]
    before = [(model, runtime.method, list(runtime.streams.pipelines)) for model, runtime in runtimes]
    enable_cache(target, spec, make=make)
    cache = Cache(_runtimes_of(target))
    try:
        yield cache
    finally:
        disable_cache(target)
        for runtime in cache.runtimes:
            runtime.close()
        for model, method, pipelines in before:
            enable_cache(model, method)
            for runtime in _runtimes_of(model):
                for pipeline in pipelines:
                    runtime.streams.watch(pipeline)


@contextmanager
def recorded(
    target: nn.Module | AnyPipeline, site: Site, make: Callable[[nn.Module, list[CacheRule]], Steps]
) -> Iterator[tuple[Cache, Steps]]:
    """Let the stepper that `make` returns run the steps of a model inside the block, for measurements; yield the cache
    and that stepper.

    target: as of `enable_cache`, with one transformer. Raises `ValueError` if it has several, or lacks the site.
    """
    if (num_models := len(models_of(target))) > 1:
        raise ValueError(f"this {type(target).__name__} has {num_models} transformers: measure each of them")
    steppers: list[Steps] = []

    def keep(model: nn.Module, rules: list[CacheRule]) -> Steps:
        steppers.append(make(model, rules))
        return steppers[-1]

    with cached(target, CacheMethod(schedule=IntervalSchedule(interval=1), site=site), make=keep) as cache:
        yield cache, steppers[0]
