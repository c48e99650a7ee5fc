"""The report of `skipdit bench compile`: rows, tables and conclusions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from skipdit.interfaces import Fields
from skipdit.report import Report, listed, record, table

COMPILE = "compile"  # name of its files
OVERHEAD = "reuse step over its bare units"
TIMESTEP, CONDITIONING = "timestep embedding over a full step", "all conditioning over a full step"
OVERHEAD_TARGET = 1.03  # seconds of a reuse step divided by those of the units that it runs


@dataclass(frozen=True, kw_only=True)
class GraphRow:
    """The graphs of compiled runs with one cache."""

    library: str
    """library of the cache, or of the model"""
    setting: str
    steps: tuple[float, float] | None = None
    """number of full steps and of reuse steps in a run"""
    graphs: int = 0
    """number of graphs compiled in the first run"""
    breaks: int = 0
    """number of positions at which the compiler stops and Python continues"""
    recompiled: int = 0
    """number of graphs compiled in the second run"""
    limit_hit: bool = False
    """true if PyTorch refused to compile a function again"""
    equal: bool = False
    """true if the pictures are bit-equal to those without compilation"""
    fullgraph_error: str | None = None
    """why `fullgraph=True` fails; the other fields are then of a run without it"""
    refused: str | None = None
    """why the model refuses the cache"""

    def cells(self) -> dict[str, object]:
        """Return the row of a table."""
        ran = self.steps is not None
        return {
            "cache of": self.library,
            "setting": self.setting,
            "full + reuse steps": "refused" if self.steps is None else f"{self.steps[0]:g} + {self.steps[1]:g}",
            "graphs": self.graphs if ran else "",
            "new": self.recompiled if ran else "",
            "breaks": self.breaks if ran else "",
            "whole": ("no" if self.fullgraph_error else "yes") if ran else "",
            "gave up": "yes" if self.limit_hit else "",
        }


@dataclass(frozen=True)
class Timing:
    """Seconds of uncached and cached runs."""

    library: str
    setting: str
    mode: str
    """eager or compiled"""
    uncached: tuple[float, ...]
    cached: tuple[float, ...]
    first_seconds: float | None = None
    """seconds of the first compiled run, including compilation"""

    @property
    def speedup(self) -> float:
        return median(a / b for a, b in zip(self.uncached, self.cached, strict=True))

    def cells(self) -> dict[str, object]:
        """Return the row of a table."""
        return {
            "cache of": self.library,
            "setting": self.setting,
            "mode": self.mode,
            "uncached s": f"{median(self.uncached):.3f}",
            "cached s": f"{median(self.cached):.3f}",
            "speedup": f"{self.speedup:.2f}",
            "first run s": "" if self.first_seconds is None else f"{self.first_seconds:.1f}",
        }


@dataclass(frozen=True)
class StepRow:
    """Two calls that are timed in turn, the second as the base of the ratio."""

    what: str
    model: str
    mode: str
    """eager or compiled"""
    batch_size: int
    seconds: tuple[float, ...]
    """one per repetition"""
    base_seconds: tuple[float, ...]
    """seconds of the base, one per repetition"""

    @property
    def ratio(self) -> float:
        return median(a / b for a, b in zip(self.seconds, self.base_seconds, strict=True))

    def cells(self) -> dict[str, object]:
        """Return the row of a table."""
        added = 1e6 * median(a - b for a, b in zip(self.seconds, self.base_seconds, strict=True))
        return {
            "what": self.what,
            "model": self.model,
            "mode": self.mode,
            "batch": self.batch_size,
            "ms": f"{1e3 * median(self.seconds):.2f}",
            "over ms": f"{1e3 * median(self.base_seconds):.2f}",
            "ratio": f"{self.ratio:.3f}",
            "added µs": f"{added:.0f}" if self.what == OVERHEAD else "",
        }


COLUMNS = {
    "graphs": "compiled in the first run; the model without a cache has 1",
    "new": "compiled in a second run, of other pictures",
    "breaks": "positions at which the compiler stops and Python continues; few graphs beside breaks mean that most of "
    "the model runs uncompiled",
    "whole": "`fullgraph=True` works, which promises that there are none; where it does not, the numbers are of runs "
    "without it",
    "gave up": "a function needed more than 8 graphs, PyTorch's limit, and from then on runs uncompiled; with a cache "
    "of skipdit the limit is 64",
}
STEPS = {
    OVERHEAD: "the cached model on a step that reuses with k 1, beside the modules that this step runs, called one by "
    f"one without a cache; the target is at most {OVERHEAD_TARGET:g}",
    TIMESTEP: "the one part that depends on the timestep alone; the ratio is the most that computing it once for all "
    "steps, before a run, could save",
    CONDITIONING: "that, and what depends on timestep and class (their sum, and each block's modulation by it), which "
    "would have to be kept for every step, class and block",
}


def report_of(
    environment: Mapping[str, str],
    settings: Fields,
    graphs: Sequence[GraphRow],
    timings: Sequence[Timing],
    steps: Sequence[StepRow],
    no_compiler: str | None,
) -> Report:
    """Return the report. no_compiler: why compiled runs were not timed."""
    failed = {f"{row.library} {row.setting}": row.fullgraph_error for row in graphs if row.fullgraph_error}
    refused = {f"{row.library} {row.setting}": row.refused for row in graphs if row.refused}
    return Report(
        environment=environment,
        config=settings,
        data={
            "graphs": graphs,
            "runs": [record(row, "speedup") for row in timings],
            "steps": [record(row, "ratio") for row in steps],
        },
        parts=[
            "## Graphs",
            f"The model `{settings['model']}` makes {settings['batch_size']} pictures at a time in "
            f"{settings['num_inference_steps']} steps, compiled by `model.compile()`. Caches of other libraries run on "
            "the same weights in the blocks of diffusers.",
            listed(COLUMNS),
            table([row.cells() for row in graphs]),
            "Why `fullgraph=True` fails:" if failed else "",
            listed(failed),
            "What is refused here:" if refused else "",
            listed(refused),
            "## Seconds of a run" if timings else "",
            f"Medians of {settings['num_runs']} runs, as they are and compiled by Inductor (`model.compile()` without "
            "options). The speedup is over the uncached runs of the same model in the same mode, before and after. The "
            "first run includes the compilation, unless the disk has the result of an earlier one."
            if timings
            else "",
            table([row.cells() for row in timings]),
            "## Single steps",
            f"Medians of {settings['num_repetitions']}, in turn; the ratio is the median of the ratios in a round.",
            listed(STEPS),
            table([row.cells() for row in steps]),
            *verdict(graphs, steps),
            f"Nothing compiled was timed: {no_compiler}." if no_compiler else "",
        ],
    )


def verdict(graphs: Sequence[GraphRow], steps: Sequence[StepRow]) -> Iterator[str]:
    """Yield conclusions."""
    ran = [row for row in graphs if row.steps is not None]
    ours = [row for row in ran if row.library == "skipdit"]
    whole = [row for row in ours if not (row.fullgraph_error or row.breaks or row.recompiled)]
    counts = sorted(row.graphs for row in whole)
    span = f", in {counts[0]} to {counts[-1]} graphs, and never anew" if counts else ""
    yield f"Of skipdit {len(whole)} of {len(ours)} rows compile whole{span}."
    differ = ", ".join(row.setting for row in ran if not row.equal) or "none"
    yield f"Rows whose pictures differ from those without compilation: {differ}."
    for what in (TIMESTEP, CONDITIONING):
        shares = [f"{row.ratio:.1%} ({row.model} batch {row.batch_size})" for row in steps if row.what == what]
        if shares:
            yield f"Share of a full step, {what.removesuffix(' over a full step')}: {', '.join(shares)}."
    over = [
        f"{row.model} {row.mode} batch {row.batch_size} ({row.ratio:.3f})"
        for row in steps
        if row.what == OVERHEAD and row.ratio > OVERHEAD_TARGET
    ]
    yield f"Overhead of a reuse step, target at most {OVERHEAD_TARGET:g}: missed by {', '.join(over) or 'none'}."
