"""vLLM-Omni: a cache for its diffusers backend, which has none of its own (`vllm_omni.general_plugins`).

    SKIPDIT_CACHE=auto:2 vllm-omni serve MODEL --omni --diffusion-load-format diffusers

Its caches hook the blocks of its own models, so that `DiffusersAdapterPipeline` refuses every `cache_backend`. The
cache is switched on once the adapter has loaded its pipeline; runs end by themselves, as diffusers' pipelines say so.
Its own models are other classes than those of diffusers: they keep its own caches. Written against 0.30.0, and not run
in it, see `skipdit.engines`.
"""

from functools import wraps
from importlib import import_module
from typing import Any

from skipdit.engines import asked_for, enable

MODULE = "vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter"
ADAPTER = "DiffusersAdapterPipeline"


def register() -> None:
    """Let the adapter switch on the cache that the environment asks for; called by every process of the engine, and
    harmless if called again."""
    spec = asked_for()
    if spec is None:
        return
    adapter: Any = getattr(import_module(MODULE), ADAPTER)
    load_weights: Any = adapter.load_weights
    if load_weights.__module__ == __name__:
        return

    @wraps(load_weights, assigned=("__name__", "__doc__"))
    def with_cache(self: Any, *args: Any, **options: Any) -> Any:
        result = load_weights(self, *args, **options)
        enable(self._pipeline, spec)
        return result

    adapter.load_weights = with_cache
