"""The caches that the benchmark compares: the names of their settings, and the interface of any other cache."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from skipdit.benchmark.config import METHODS as METHODS
from skipdit.cache.enable import disable_cache
from skipdit.cache.methods import METHODS as PUBLISHED
from skipdit.cache.methods import parse_method
from skipdit.files.output import MARKER
from skipdit.files.untrusted import printable
from skipdit.interfaces import Pipeline
from skipdit.loading import Source
from skipdit.runs import Counts, OwnCache, RunCache, counts_of
from skipdit.tasks.task import Sampler

NAME = re.compile(r"[a-z]+(?:-[a-z]+)*(?=[:-]|$)")  # of a spec; a bare N is the paper's cache

OURS = {"skip": "calibrated", "output": "calibrated output"}  # calibrated schedules by what they reuse
KIN = ("dpcache", "l2p", "budcache")  # of `skipdit calibrate --kin`, by whose rules it names its files


def method_of(spec: str) -> tuple[str, bool]:
    """Return the method of a spec, and true if it is ours: from the table, for a schedule from its site, and otherwise
    from the name in the spec."""
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
    site, rule = name.partition("-")[0], Path(path).stem.partition("-")[0]
    if rule in KIN:
        return (f"{rule}, {site}" if site in OURS else rule), False
    return OURS.get(site, name if name == "smoothcache" else f"{name}, calibrated"), site in OURS


def schedules_in(folder: Path) -> tuple[str, ...]:
    """Return the paths of the schedules that `skipdit calibrate` has written into a folder and its subfolders.
    `FileNotFoundError` if there is none."""
    found = tuple(str(path) for path in sorted(folder.rglob("*.json")) if path.name not in ("report.json", MARKER))
    if not found:
        raise FileNotFoundError(f"no schedules in {printable(folder)}: skipdit calibrate --out {printable(folder)}")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Caches as rows of the table


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
        """Return the sampler of the pipeline that the cache is made for, with whose uncached run it is compared; `None`
        for the model's own."""
        ...


@dataclass(frozen=True)
class SpecCache:
    """A cache of `skipdit.enable_cache`."""

    name: str
    spec: str
    ours: bool
    source: Source
    """provides the schedules of `calibrated` settings"""
    sampler: Sampler | None = None

    @property
    def setting(self) -> str:
        """Return the spec; for a schedule, its name and that of its folder."""
        return "/".join(Path(self.spec).with_suffix("").parts[-2:]) if self.spec.endswith(".json") else self.spec

    def enable(self, pipeline: Pipeline) -> None:
        method = self.source.cache(self.spec)
        assert method is not None, "no cache is a control, not a cache"
        OwnCache(method).enable(pipeline)

    def disable(self, pipeline: Pipeline) -> None:
        disable_cache(pipeline)

    def counts(self, pipeline: Pipeline) -> Counts:
        return counts_of(pipeline)


def spec_cache(spec: str, source: Source) -> SpecCache:
    name, ours = method_of(spec)
    return SpecCache(name, spec, ours, source)
