"""SGLang: a cache for its diffusers backend, in the place of cache-dit (`sglang.multimodal_gen.plugins`).

    SKIPDIT_CACHE=auto:2 sglang serve --model-path MODEL --backend diffusers

The hook is on the method that would switch cache-dit on: after the pipeline has its device, offloading and attention
backend, and before its blocks are compiled. `--cache-dit-config` beside it is an error. Written against 0.5.23, and not
run in it, see `skipdit.engines`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from skipdit.engines import asked_for, enable

REGISTRY = "sglang.srt.plugins.hook_registry"
TARGET = "sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline.DiffusersPipeline._apply_cache_dit"


def register() -> None:
    """Hook the method that switches a cache on; called once by every process of the engine."""
    spec = asked_for()
    if spec is None:
        return
    hooks = import_module(REGISTRY)

    def with_cache(original: Callable[..., Any], self: Any, pipe: Any, server_args: Any) -> Any:
        pipe = original(self, pipe, server_args)
        enable(pipe, spec, other="--cache-dit-config" if server_args.cache_dit_config else None)
        return pipe

    hooks.HookRegistry.register(TARGET, with_cache, hooks.HookType.AROUND)
