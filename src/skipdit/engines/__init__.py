"""Caches in engines that serve pipelines of diffusers: one module per engine, which it loads as a plugin.

The environment variable `SKIPDIT_CACHE` says which cache; without it a plugin does nothing. `vllm_omni` and `sglang`
are written against the interfaces of vllm-omni 0.30.0 and sglang 0.5.23. Neither engine has served a request with them:
both ask for a GPU, and those releases for other versions of diffusers and PyTorch (0.40.0; 0.37.0 and 2.14.1) than
skipdit does.
"""

import os

from skipdit.cache.enable import AnyPipeline, enable_cache
from skipdit.cache.methods import parse_method

VARIABLE = "SKIPDIT_CACHE"


def asked_for() -> str | None:
    """Return the spec of the cache that the environment asks for; `None` if it asks for none. `ValueError` if it is no
    spec, `FileNotFoundError` if it is the path of a schedule that does not exist."""
    spec = os.environ.get(VARIABLE, "").strip()
    if not spec or spec == "none":
        return None
    parse_method(spec)
    return spec


def enable(pipeline: AnyPipeline, spec: str, *, other: str | None = None) -> None:
    """Switch the cache on. other: a cache of the engine's own that is on too, by its option: `ValueError`, as a model
    can have only one."""
    if other is not None:
        raise ValueError(f"{VARIABLE}={spec} and {other} ask for two caches of one model: leave one of them out")
    enable_cache(pipeline, spec)
