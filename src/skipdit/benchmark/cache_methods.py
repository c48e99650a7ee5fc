"""Which caches the benchmark compares: settings of ours and of others by name, and what any other cache must offer."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from skipdit.cache.enable import disable_cache
from skipdit.cache.methods import METHODS as PUBLISHED
from skipdit.cache.methods import parse_method
from skipdit.loading import Source
from skipdit.runs import Counts, OwnCache, RunCache, counts_of
from skipdit.tasks.task import Sampler

NAME = re.compile(r"[a-z]+(?:-[a-z]+)*(?=[:-]|$)")  # of a spec; a bare N is the paper's cache


@dataclass(frozen=True)
class Method:
    """A line of the plot."""

    ours: bool
    """it needs long skips, and its prediction or its schedule is of this project"""
    specs: tuple[str, ...] = ()
    """the settings of the cache, fast ones last"""


def intervals(form: str, *numbers: int) -> tuple[str, ...]:
    """Specs of one form, a number each."""
    return tuple(form.format(number) for number in numbers)


METHODS: dict[str, Method] = {
    "skip-taylor": Method(ours=True, specs=intervals("skip-taylor:N{}-o1", 2, 3, 4)),
    "skip-taylor, window": Method(ours=True, specs=intervals("skip-taylor:N{}-800-100-o1", 4, 8)),
    "skip-branch": Method(ours=True, specs=intervals("skip-branch:N{}", 2)),
    "auto": Method(ours=True, specs=("auto:1.5", "auto:2", "auto:2.5")),
    "calibrated": Method(ours=True, specs=("calibrated:1.5x", "calibrated:2x", "calibrated:2.5x", "calibrated:3x")),
    "skip": Method(ours=False, specs=intervals("N{}", 2, 3)),
    "delta-dit": Method(ours=False, specs=intervals("delta-dit:N{}", 2, 3)),
    "delta": Method(ours=False, specs=intervals("delta:N{}", 2, 3)),
    "delta-taylor": Method(ours=False, specs=intervals("delta-taylor:N{}-o1", 2, 3)),
    "fora": Method(ours=False, specs=intervals("fora:N{}", 2, 3)),
    "taylorseer": Method(ours=False, specs=intervals("taylorseer:N{}-o1", 2, 3, 4)),
    "pab": Method(ours=False, specs=intervals("pab:N{}", 8)),
    "faster-diffusion": Method(ours=False, specs=intervals("faster-diffusion:N{}", 2, 8)),
    "tgate": Method(ours=False, specs=intervals("tgate:N{}-900-600", 5)),
    "fbcache": Method(ours=False, specs=("fbcache:0.1", "fbcache:0.2")),
    "teacache": Method(ours=False, specs=("teacache:0.1", "teacache:0.2")),
    "dicache": Method(ours=False, specs=("dicache:0.1", "dicache:0.2")),
    "seacache": Method(ours=False, specs=("seacache:0.1", "seacache:0.2")),
    "easycache": Method(ours=False, specs=("easycache:0.05", "easycache:0.1")),
    "adacache": Method(ours=False, specs=("adacache:0.05", "adacache:0.1")),
}


def method_of(spec: str) -> tuple[str, bool]:
    """The line of a spec and whether it is ours: by the table, of a schedule by what it reuses, else by its name."""
    name = next((name for name, method in METHODS.items() if spec in method.specs), None)
    if name is None and spec.endswith(".json"):
        return _method_of_schedule(spec)
    if name is None:
        named = NAME.match(spec)
        name = named[0] if named else "skip"
    return name, name in METHODS and METHODS[name].ours


def _method_of_schedule(path: str) -> tuple[str, bool]:
    method = parse_method(path)
    name = next((name for name, row in PUBLISHED.items() if row.matches(method)), "smoothcache")
    ours = name.startswith("skip")
    return ("calibrated" if ours else name if name == "smoothcache" else f"{name}, calibrated"), ours


def schedules_in(folder: Path) -> tuple[str, ...]:
    """The paths of the schedules that `skipdit calibrate` has left in a folder and in those below."""
    return tuple(str(path) for path in sorted(folder.rglob("*.json")) if path.name != "report.json")


# ----------------------------------------------------------------------------------------------------------------------
# What a cache is here


class Runnable(RunCache, Protocol):
    """A cache at one setting, as a row of the table."""

    @property
    def name(self) -> str: ...

    @property
    def setting(self) -> str: ...

    @property
    def ours(self) -> bool: ...

    @property
    def sampler(self) -> Sampler | None:
        """Samples the pipeline that the cache is made for, whose uncached run is what it is compared with; `None` for
        the model's own."""
        ...


@dataclass(frozen=True)
class SpecCache:
    """A cache of `skipdit.enable_cache`."""

    name: str
    spec: str
    ours: bool
    source: Source
    """has the schedules that a `calibrated` setting means"""
    sampler: Sampler | None = None

    @property
    def setting(self) -> str:
        """The spec; of a schedule its name and that of its folder."""
        return "/".join(Path(self.spec).with_suffix("").parts[-2:]) if self.spec.endswith(".json") else self.spec

    def enable(self, pipeline: Any) -> None:
        method = self.source.cache(self.spec)
        assert method is not None, "no cache is a control, not a cache"
        OwnCache(method).enable(pipeline)

    def disable(self, pipeline: Any) -> None:
        disable_cache(pipeline)

    def counts(self, pipeline: Any) -> Counts:
        return counts_of(pipeline)


def spec_cache(spec: str, source: Source) -> SpecCache:
    name, ours = method_of(spec)
    return SpecCache(name, spec, ours, source)
