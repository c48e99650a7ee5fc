"""Diffusion transformers with long skip connections. The public names, imported when first used."""

import importlib
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from skipdit.moved import MovedModules
from skipdit.verbs import provide

if TYPE_CHECKING:
    from skipdit.cache.enable import cache_summary as cache_summary
    from skipdit.cache.enable import cached as cached
    from skipdit.cache.enable import disable_cache as disable_cache
    from skipdit.cache.enable import enable_cache as enable_cache
    from skipdit.cache.streams import cache_context as cache_context
    from skipdit.checkpoints import load_model as load_model
    from skipdit.models.check import check_family as check_family
    from skipdit.models.dit import DiT as DiT
    from skipdit.models.families import Family as Family
    from skipdit.models.families import Segment as Segment
    from skipdit.models.families import declare_family as declare_family
    from skipdit.models.latte import Latte as Latte
    from skipdit.models.pairing import LongSkipConfig as LongSkipConfig
    from skipdit.models.surgery import add_long_skips as add_long_skips
    from skipdit.models.surgery import long_skip_class as long_skip_class
    from skipdit.models.surgery import remove_long_skips as remove_long_skips
    from skipdit.pipelines import ClassToImagePipeline as ClassToImagePipeline

    __version__: str

# public name: the module that defines it; a test holds it equal to the imports above
_MODULES = {
    "ClassToImagePipeline": "skipdit.pipelines",
    "DiT": "skipdit.models.dit",
    "Family": "skipdit.models.families",
    "Latte": "skipdit.models.latte",
    "LongSkipConfig": "skipdit.models.pairing",
    "Segment": "skipdit.models.families",
    "add_long_skips": "skipdit.models.surgery",
    "cache_context": "skipdit.cache.streams",
    "cache_summary": "skipdit.cache.enable",
    "cached": "skipdit.cache.enable",
    "check_family": "skipdit.models.check",
    "declare_family": "skipdit.models.families",
    "disable_cache": "skipdit.cache.enable",
    "enable_cache": "skipdit.cache.enable",
    "load_model": "skipdit.checkpoints",
    "long_skip_class": "skipdit.models.surgery",
    "remove_long_skips": "skipdit.models.surgery",
}

# what models do through parts that stand above them, and where that is; imported when it is first done
_VERBS = {
    "disable_cache": "skipdit.cache.enable",
    "enable_cache": "skipdit.cache.enable",
    "load_with_long_skips": "skipdit.checkpoints",
}

__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def _carry_out(verb: str, *args: Any) -> Any:
    return getattr(importlib.import_module(_VERBS[verb]), verb)(*args)


provide({verb: partial(_carry_out, verb) for verb in _VERBS})
sys.meta_path.append(MovedModules())

if not TYPE_CHECKING:  # so that a type checker reports an unknown name

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            value: Any = version("skipdit")
        elif name in _MODULES:
            value = getattr(importlib.import_module(_MODULES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
