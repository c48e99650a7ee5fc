"""Which caches the benchmark compares: settings of ours and of others by name, and what any other cache must offer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from skipdit.cache.runtime import cache_summary, disable_cache, enable_cache
from skipdit.loading import Source
from skipdit.samplers import Sampler

NAME = re.compile(r"[a-z]+(?:-[a-z]+)*(?=[:-]|$)")  # of a spec; a bare N is the paper's cache


@dataclass(frozen=True)
class Method:
    """A line of the plot: the settings of a cache, fast ones last. ours: it needs long skips, and its prediction or its
    schedule is of this project."""

    ours: bool
    specs: tuple[str, ...] = ()


def intervals(form: str, *numbers: int) -> tuple[str, ...]:
    """Specs of one form, a number each."""
    return tuple(form.format(number) for number in numbers)


METHODS: dict[str, Method] = {
    "skip-taylor": Method(ours=True, specs=intervals("skip-taylor:N{}-o1", 2, 3, 4, 6)),
    "skip-taylor, window": Method(ours=True, specs=intervals("skip-taylor:N{}-800-100-o1", 3, 6, 8)),
    "auto": Method(ours=True, specs=("auto:1.3", "auto:1.8", "auto:2.5", "auto:3.5")),
    "calibrated": Method(ours=True),
    "skip": Method(ours=False, specs=intervals("N{}", 2, 3, 4)),
    "delta-dit": Method(ours=False, specs=intervals("delta-dit:N{}", 2, 3)),
    "delta": Method(ours=False, specs=intervals("delta:N{}", 2, 3)),
    "delta-taylor": Method(ours=False, specs=intervals("delta-taylor:N{}-o1", 2, 3, 4)),
    "fora": Method(ours=False, specs=intervals("fora:N{}", 2, 3)),
    "taylorseer": Method(ours=False, specs=intervals("taylorseer:N{}-o1", 2, 3, 4)),
    "pab": Method(ours=False, specs=intervals("pab:N{}", 2, 8)),
    "faster-diffusion": Method(ours=False, specs=intervals("faster-diffusion:N{}", 2, 8)),
    "tgate": Method(ours=False, specs=intervals("tgate:N{}-900-600", 2, 5)),
    "fbcache": Method(ours=False, specs=("fbcache:0.05", "fbcache:0.1", "fbcache:0.2")),
    "teacache": Method(ours=False, specs=("teacache:0.05", "teacache:0.1", "teacache:0.2")),
    "adacache": Method(ours=False, specs=("adacache:0.03", "adacache:0.05", "adacache:0.1")),
}


def method_of(spec: str) -> tuple[str, bool]:
    """The line of a spec and whether it is ours: by the table, else by its name."""
    name = next((name for name, method in METHODS.items() if spec in method.specs), None)
    if name is None:
        named = NAME.match(spec)
        name = "calibrated" if spec.endswith(".json") else named[0] if named else "skip"
    return name, name in METHODS and METHODS[name].ours


# ----------------------------------------------------------------------------------------------------------------------
# What a cache is here


@dataclass(frozen=True)
class Counts:
    """What a cache has done in its run. bytes_held: the most at a time, `None` where it does not tell."""

    steps_full: int
    steps_reused: int
    bytes_held: int | None = None


class Runnable(Protocol):
    """A cache at one setting; it is on in its own runs alone.

    sampler: samples the pipeline that it is made for, whose uncached run is what it is compared with; `None` for the
    model's own. `ValueError` from `enable` or from the run itself says that this model cannot have it.
    """

    @property
    def name(self) -> str: ...

    @property
    def setting(self) -> str: ...

    @property
    def ours(self) -> bool: ...

    @property
    def sampler(self) -> Sampler | None: ...

    def enable(self, pipeline: Any) -> None: ...

    def disable(self, pipeline: Any) -> None: ...

    def counts(self, pipeline: Any) -> Counts | None:
        """Of the current or the last run, before the cache is off; `None` where it does not count."""
        ...


@dataclass(frozen=True)
class SpecCache:
    """A cache of `skipdit.enable_cache`."""

    name: str
    setting: str
    ours: bool
    sampler: Sampler | None = None

    def enable(self, pipeline: Any) -> None:
        enable_cache(pipeline, self.setting)

    def disable(self, pipeline: Any) -> None:
        disable_cache(pipeline)

    def counts(self, pipeline: Any) -> Counts:
        summary = cache_summary(pipeline)
        return Counts(summary.steps_full, summary.steps_reused, summary.peak_bytes_held)


Rivals = Callable[[Source], Sequence[Runnable]]


def no_rivals(source: Source) -> Sequence[Runnable]:
    return ()
