"""Switches a cache on and off: a model's class becomes a final subclass whose `__call__` is the cache's."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn

from skipdit.cache.fingerprint import check_made_for
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.runtime import CacheRuntime
from skipdit.cache.state import CacheSummary
from skipdit.cache.streams import branch_context
from skipdit.models.families import find_family
from skipdit.models.long_skip import LongSkipModel
from skipdit.models.surgery import Remade, close_units, open_units


class CachedModel(Remade, nn.Module):
    """Mixed in front of a model's class while its cache is on; `_cached_class` makes the final subclass."""

    _skipdit_cache: CacheRuntime
    is_cache_enabled = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._skipdit_cache.call(self, super().__call__, args, kwargs)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """diffusers' pipelines call this at the end of a run."""
        self._skipdit_cache.end_runs()

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Keeps the calls inside apart, as the branch `name` of the current run. where: the place in the loop
        (`step_index`, `num_inference_steps`, `timestep`), which is believed."""
        with branch_context(name, **where), cast(Any, super()).cache_context(name, **where):
            yield

    # what makes another model of this class makes it without the cache

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        return cast(Any, _plain_class(cls)).from_pretrained(*args, **options)

    @classmethod
    def from_config(cls, *args: Any, **options: Any) -> Any:
        return cast(Any, _plain_class(cls)).from_config(*args, **options)


@lru_cache
def _cached_class(model_class: type[nn.Module]) -> type[CachedModel]:
    """The cached subclass, of the same name, so that a saved config names the model."""
    namespace = {
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
        "_made_by": (_cached_class, model_class),
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
    pipelines: list[Any] = []
    if isinstance(model, CachedModel):
        pipelines, opened = list(model._skipdit_cache.streams.pipelines), model._skipdit_cache.opened
    if isinstance(model, LongSkipModel) and model.is_cache_enabled and not isinstance(model, CachedModel):
        raise ValueError("a cache of diffusers is enabled on this model: call model.disable_cache() first")
    if opened:
        open_units(model)
    try:
        runtime = CacheRuntime(model, method, opened=opened)
        if method.made_for is not None:
            scheduler = type(target.scheduler).__name__ if isinstance(target, DiffusionPipeline) else None
            check_made_for(method.made_for, model, scheduler)
    except BaseException:
        if opened and not isinstance(model, CachedModel):
            close_units(model)
        raise
    if isinstance(model, CachedModel):
        _uncache(model)
    for pipeline in (*pipelines, *([target] if isinstance(target, DiffusionPipeline) else [])):
        runtime.streams.watch(pipeline)
    cast(Any, model).__class__ = _cached_class(type(model))
    object.__setattr__(model, "_skipdit_cache", runtime)
    if isinstance(target, DiffusionPipeline) and target.components.get("transformer_2") is not None:
        warnings.warn(
            f"the transformer_2 of this {type(target).__name__} stays without a cache: "
            "skipdit.enable_cache(pipeline.transformer_2, ...)",
            stacklevel=2,
        )


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
