"""The report of what `torch.compile` makes of caches: rows, tables, and in words what holds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from skipdit.benchmark.measure import header, table, write_report
from skipdit.files import OutputFolder

COMPILE = "compile"  # what its files are called
OVERHEAD = "reuse step over its bare units"
TIMESTEP, CONDITIONING = "timestep embedding over a full step", "all conditioning over a full step"
OVERHEAD_TARGET = 1.03  # seconds of a reuse step over those of the units that it runs


@dataclass(frozen=True, kw_only=True)
class GraphRow:
    """What the compiler makes of the runs of one cache.

    fullgraph_error: why `fullgraph=True` fails; what follows is then of a run without it. graphs: compiled in the first
    run; recompiled: in the second. limit_hit: whether PyTorch gave up to compile one function anew. equal: whether the
    pictures are those of the run without compilation, to the bit. refused: why the model cannot have the cache.
    """

    library: str
    setting: str
    steps: tuple[int, int] | None = None
    graphs: int = 0
    breaks: int = 0
    recompiled: int = 0
    limit_hit: bool = False
    equal: bool = False
    fullgraph_error: str | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of every run: uncached and cached in turn. first_seconds: of the first compiled run, compilation and
    all."""

    library: str
    setting: str
    mode: str
    uncached: tuple[float, ...]
    cached: tuple[float, ...]
    first_seconds: float | None = None

    @property
    def speedup(self) -> float:
        return median(a / b for a, b in zip(self.uncached, self.cached, strict=True))


@dataclass(frozen=True)
class StepRow:
    """Two calls in turn, their seconds in every repetition: of what is looked at, and of what it is measured by."""

    what: str
    model: str
    mode: str
    batch_size: int
    seconds: tuple[float, ...]
    base_seconds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return median(a / b for a, b in zip(self.seconds, self.base_seconds, strict=True))


def write_compile_report(
    out: OutputFolder,
    environment: Mapping[str, str],
    settings: Mapping[str, Any],
    graphs: Sequence[GraphRow],
    timings: Sequence[Timing],
    steps: Sequence[StepRow],
    no_compiler: str | None,
) -> None:
    """no_compiler: why nothing compiled was timed."""
    report = {
        "environment": environment,
        "config": settings,
        "graphs": graphs,
        "runs": [asdict(row) | {"speedup": row.speedup} for row in timings],
        "steps": [asdict(row) | {"ratio": row.ratio} for row in steps],
    }
    markdown = render_markdown(environment, settings, graphs, timings, steps, no_compiler)
    write_report(out, COMPILE, report, markdown)


def render_markdown(
    environment: Mapping[str, str],
    settings: Mapping[str, Any],
    graphs: Sequence[GraphRow],
    timings: Sequence[Timing],
    steps: Sequence[StepRow],
    no_compiler: str | None,
) -> list[str]:
    parts = [
        *header(environment),
        "## Graphs",
        f"The model `{settings['model']}` makes {settings['batch_size']} pictures at a time in {settings['num_steps']} "
        "steps, compiled by `model.compile()`. Caches of other libraries run on the same weights in the blocks of "
        "diffusers.",
        "- graphs: compiled in the first run; the model without a cache has 1\n"
        "- new: compiled in a second run, of other pictures\n"
        "- breaks: places at which the compiler has to stop and Python goes on; few graphs beside breaks mean that "
        "most of the model runs uncompiled\n"
        "- whole: `fullgraph=True` works, which promises that there are none; where it does not, the numbers are of "
        "runs without it\n"
        "- gave up: a function needed more than 8 graphs, PyTorch's limit, and from then on runs uncompiled; with a "
        "cache of skipdit the limit is 64",
        table([graph_record(row) for row in graphs]),
    ]
    reasons = [f"- {row.library} {row.setting}: {row.fullgraph_error}" for row in graphs if row.fullgraph_error]
    if reasons:
        parts += ["Why `fullgraph=True` fails:", "\n".join(reasons)]
    refused = [f"- {row.library} {row.setting}: {row.refused}" for row in graphs if row.refused]
    if refused:
        parts += ["What is refused here:", "\n".join(refused)]
    if timings:
        parts += [
            "## Seconds of a run",
            f"Medians of {settings['num_runs']} runs, as they are and compiled by Inductor (`model.compile()` without "
            "options). The speedup is over the uncached runs of the same model in the same mode, before and after. The "
            "first run has the compilation in it, where the disk has nothing of an earlier one.",
            table([timing_record(row) for row in timings]),
        ]
    parts += [
        "## Single steps",
        f"Medians of {settings['num_repetitions']}, in turn; the ratio is the median of the ratios in a round.",
        f"- {OVERHEAD}: the cached model on a step that reuses with k 1, beside the modules that this step runs, "
        f"called one by one without a cache; the target is at most {OVERHEAD_TARGET:g}\n"
        f"- {TIMESTEP}: the one part that depends on the timestep alone; the ratio is the most that computing it once "
        "for all steps, before a run, could save\n"
        f"- {CONDITIONING}: that, and what depends on timestep and class (their sum, and each block's modulation by "
        "it), which would have to be kept for every step, class and block",
        table([step_record(row) for row in steps]),
        *verdict(graphs, steps),
    ]
    if no_compiler:
        parts.append(f"Nothing compiled was timed: {no_compiler}.")
    return parts


def graph_record(row: GraphRow) -> dict[str, object]:
    names: dict[str, object] = {"cache of": row.library, "setting": row.setting}
    if row.refused or row.steps is None:
        empty = dict.fromkeys(("graphs", "new", "breaks", "whole", "gave up"), "")
        return {**names, "full + reuse steps": "refused", **empty}
    return names | {
        "full + reuse steps": f"{row.steps[0]} + {row.steps[1]}",
        "graphs": row.graphs,
        "new": row.recompiled,
        "breaks": row.breaks,
        "whole": "no" if row.fullgraph_error else "yes",
        "gave up": "yes" if row.limit_hit else "",
    }


def timing_record(row: Timing) -> dict[str, object]:
    return {
        "cache of": row.library,
        "setting": row.setting,
        "mode": row.mode,
        "uncached s": f"{median(row.uncached):.3f}",
        "cached s": f"{median(row.cached):.3f}",
        "speedup": f"{row.speedup:.2f}",
        "first run s": "" if row.first_seconds is None else f"{row.first_seconds:.1f}",
    }


def step_record(row: StepRow) -> dict[str, object]:
    added = 1e6 * median(a - b for a, b in zip(row.seconds, row.base_seconds, strict=True))
    return {
        "what": row.what,
        "model": row.model,
        "mode": row.mode,
        "batch": row.batch_size,
        "ms": f"{1e3 * median(row.seconds):.2f}",
        "over ms": f"{1e3 * median(row.base_seconds):.2f}",
        "ratio": f"{row.ratio:.3f}",
        "added µs": f"{added:.0f}" if row.what == OVERHEAD else "",
    }


def verdict(graphs: Sequence[GraphRow], steps: Sequence[StepRow]) -> Iterator[str]:
    """In words, what holds."""
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
