"""The report of the benchmark of caches: its rows, the methods compared at equal speedup, and the figure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, get_args

import numpy as np

from skipdit.files.output import OutputFolder
from skipdit.interfaces import Fields
from skipdit.metrics.table import METRICS, Scores, score_cells
from skipdit.plots import Tradeoffs, save_png
from skipdit.report import Report, record, table

Group = Literal["control", "fewer steps", "second order", "ours", "others", "others, calibrated", "kin"]
Axis = Literal["speedup", "flop_ratio"]
AXES: dict[Axis, str] = {"speedup": "wall-clock time", "flop_ratio": "FLOPs"}
OWN_PSNR = "own_psnr"
ONCE_MORE = "once more"  # setting of the control, the reference run repeated
AT_RATIO = 2.0
RATIOS = (1.3, 1.5, 1.8, AT_RATIO, 2.5, 3.0, 4.0)
TARGET_DB = 6.0  # gain of the best of ours over each rival
CALIBRATED = "the best other site under a calibrated schedule"  # the gain of schedules without long skips: no target
KIN_RULES = "the best rule of kin on our measurement"  # their choice of steps, on our parts: no target


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run, compared with the uncached run of the same seeds. If the model refused the cache, all results are
    `None`."""

    method: str
    setting: str
    group: Group
    num_steps: int
    """denoising steps"""
    steps_full: float | None = None
    """number of full steps, averaged over batches; `None` if the cache does not count them"""
    steps_reused: float | None = None
    """number of reuse steps, averaged over batches; `None` if the cache does not count them"""
    bytes_held: int | None = None
    """peak memory that the cache held, for a whole batch"""
    speedups: tuple[float, ...] = ()
    """seconds of the uncached run divided by those of this run, one per batch"""
    flop_ratio: float | None = None
    """FLOPs of the uncached run divided by those of this run"""
    scores: Scores = field(default_factory=dict)
    """distances by the name of the metric, for clips over all frames; own_psnr is the PSNR to the run with all steps of
    the same second-order sampler"""
    refused: str | None = None
    """why the model refuses the cache"""

    @property
    def speedup(self) -> float | None:
        """Return the median over batches."""
        return median(self.speedups) if self.speedups else None


# ----------------------------------------------------------------------------------------------------------------------
# At equal speedup

Point = tuple[float, float]  # a ratio and a PSNR


def points_of(rows: Sequence[Row], axis: Axis, *, own: bool = False) -> dict[str, list[Point]]:
    """Return the ratio and the PSNR of the measured settings of each method. own: use the PSNR to the second-order
    sampler's own run."""
    points: dict[str, list[Point]] = {}
    for row in rows:
        ratio, psnr = getattr(row, axis), row.scores.get(OWN_PSNR if own else "psnr")
        if ratio is not None and psnr is not None and psnr.finite_mean is not None:
            points.setdefault(row.method, []).append((ratio, psnr.mean))
    return points


def front(points: Sequence[Point]) -> list[Point]:
    """Return the settings that no other setting of the method beats in both ratio and PSNR, slow ones first."""
    best: list[Point] = []
    for ratio, psnr in sorted(points, reverse=True):
        if not best or psnr > best[-1][1]:
            best.append((ratio, psnr))
    return best[::-1]


def psnr_at(points: Sequence[Point], ratio: float) -> float | None:
    """Return the PSNR of a method at a ratio, linear in the logarithm of the ratio between its two neighboring
    settings; a setting that is worse than a faster one counts as that one. `None` if no setting is slower, or none
    faster."""
    ordered = sorted(points)
    if not ordered or not ordered[0][0] <= ratio <= ordered[-1][0]:
        return None
    best = np.maximum.accumulate([psnr for _, psnr in ordered][::-1])[::-1]
    return float(np.interp(math.log(ratio), [math.log(x) for x, _ in ordered], best))


def best_at(points: Mapping[str, Sequence[Point]], ratio: float) -> tuple[str, float] | None:
    """Return the method with the highest PSNR at a ratio, and that PSNR; `None` if no method covers the ratio."""
    pairs = [(method, psnr) for method in points if (psnr := psnr_at(points[method], ratio)) is not None]
    return max(pairs, key=lambda pair: pair[1], default=None)


@dataclass(frozen=True)
class Standing:
    """The best of our methods at equal speedup, and the best of each kind of rival: method and PSNR in dB, `None` if no
    method has settings on both sides."""

    axis: Axis
    ratio: float
    ours: tuple[str, float] | None
    rivals: dict[str, tuple[str, float] | None]

    @property
    def gains_db(self) -> dict[str, float]:
        """Return the gain of ours over each rival that was measured there."""
        if self.ours is None:
            return {}
        return {name: self.ours[1] - rival[1] for name, rival in self.rivals.items() if rival is not None}

    def sentence(self) -> str:
        point = f"At {self.ratio:g}x in {AXES[self.axis]}"
        if self.ours is None:
            return f"{point} none of ours has settings on both sides."
        gains = self.gains_db
        parts = [
            f"{gains[name]:+.2f} dB over {name} ({rival[0]}, {rival[1]:.2f} dB)"
            for name, rival in self.rivals.items()
            if rival is not None
        ]
        parts += [f"{name} has no settings on both sides" for name, rival in self.rivals.items() if rival is None]
        judged = {name: gain for name, gain in gains.items() if name not in (CALIBRATED, KIN_RULES)}
        missed = [name for name, gain in judged.items() if gain < TARGET_DB]
        reached = [name for name, gain in judged.items() if gain >= TARGET_DB]
        return (
            f"{point} the best of ours is {self.ours[0]}, {self.ours[1]:.2f} dB: {'; '.join(parts)}. Target "
            f"{TARGET_DB:+g} dB: reached over {', '.join(reached) or 'none'}; missed over "
            f"{', '.join(missed) or 'none'}."
        )


def standing(rows: Sequence[Row], axis: Axis, ratio: float = AT_RATIO) -> Standing:
    def best(group: Group, *, own: bool = False) -> tuple[str, float] | None:
        return best_at(points_of([row for row in rows if row.group == group], axis, own=own), ratio)

    rivals = {
        "the best other cache": best("others"),
        CALIBRATED: best("others, calibrated"),
        KIN_RULES: best("kin"),
        "fewer steps": best("fewer steps"),
        "fewer second-order steps": best("second order"),
        "fewer second-order steps beside their own run": best("second order", own=True),
    }
    return Standing(axis, ratio, best("ours"), rivals)


def standings_table(standings: Sequence[Standing]) -> str:
    """Return a table with a row per ratio: the best of ours, and the best of each kind of rival."""

    def cell(best: tuple[str, float] | None) -> str:
        return "-" if best is None else f"{best[1]:.1f} ({best[0]})"

    return table([
        {AXES[each.axis]: f"{each.ratio:g}x", "the best of ours": cell(each.ours)}
        | {name: cell(rival) for name, rival in each.rivals.items()}
        for each in standings
    ])  # fmt: skip


def verdict(rows: Sequence[Row]) -> Iterator[str]:
    """Yield sentences on the gains of our best method, and on the noise of speedups."""
    for axis in AXES:
        yield standing(rows, axis).sentence()
    noise = [speedup for row in rows if row.setting == ONCE_MORE for speedup in row.speedups]
    if noise:
        yield (
            f"The uncached run over itself in the same batch: median {median(noise):.3f}, {min(noise):.3f} to "
            f"{max(noise):.3f}; a difference in speedup within that is chance."
        )


# ----------------------------------------------------------------------------------------------------------------------
# Files


def write_cache_report(
    out: OutputFolder, name: str, *, environment: Mapping[str, str], settings: Fields, rows: Sequence[Row]
) -> None:
    """Write `{name}.md`, `.json` and `.png`. settings: fields of the config."""
    order, scale = get_args(Group), settings["guidance_scale"]
    guidance = "of the pipeline" if scale is None else f"{scale:g}"
    rows = sorted(rows, key=lambda row: order.index(row.group))
    save_png(draw(name, rows, settings), out)
    no_scores = dict.fromkeys((*(metric.name for metric in METRICS), OWN_PSNR))
    sentences = list(verdict(rows))
    standings = {axis: [standing(rows, axis, ratio) for ratio in RATIOS] for axis in AXES}
    refused = [f"- {row.method}, `{row.setting}`: {row.refused}" for row in rows if row.refused is not None]
    report = Report(
        environment=environment,
        config=settings,
        data={
            "rows": [no_scores | record(row, "speedup") for row in rows],
            "standings": [record(each, "gains_db") for at_axis in standings.values() for each in at_axis],
            "verdict": sentences,
        },
        parts=[
            f"Model {settings['model']}: {settings['num_seeds']} samples with seeds from {settings['seed']} on, "
            f"{settings['batch_size']} at a time, {settings['num_inference_steps']} steps, guidance {guidance}. Each "
            "row stands beside the uncached run of the same seeds in the same batch. Speedup: in wall-clock time, less "
            "the drift of the machine, the median of the batches, and the least and the largest. FLOPs: of the "
            "uncached run over those of this one. Held: by a cache at most, for a whole batch. PSNR, SSIM and the "
            "LPIPS-like distance (equal weights, EfficientNet-Lite0): mean and standard deviation over samples, of "
            "clips over frames. A second-order sampler ends elsewhere: its own PSNR is that to its own run with all "
            "steps. A bare N is the paper's cache.",
            table([cells(row) for row in rows if row.refused is None]),
            "Refused by this model:" if refused else "",
            "\n".join(refused),
            *sentences,
            "At equal speedup, PSNR in dB between the two nearest settings of a method; a dash where no method has "
            "settings on both sides:",
            *(standings_table(at_axis) for at_axis in standings.values()),
            "Settings that another of the same method beats in both are not drawn.",
            f"![PSNR over speedup]({name}.png)",
        ],
    )
    report.write(out, name)


def draw(name: str, rows: Sequence[Row], settings: Fields) -> Tradeoffs:
    series = {}
    for method, points in points_of([row for row in rows if row.group != "control"], "speedup").items():
        x, y = zip(*front(points), strict=True)
        series[method] = (np.array(x), np.array(y))
    groups = {row.method: row.group for row in rows}
    return Tradeoffs(
        name=name,
        title=f"{settings['model']}, {settings['num_inference_steps']} steps: what a speedup costs",
        x_label="speedup in wall-clock time",
        y_label="PSNR to the uncached run, dB",
        series=series,
        emphasized=frozenset(method for method in series if groups[method] == "ours"),
        dashed=frozenset(method for method in series if groups[method] in ("fewer steps", "second order")),
    )


def cells(row: Row) -> dict[str, object]:
    """Return the row of the table."""

    def steps(count: float | None) -> str:
        return "?" if count is None else f"{count:.4g}"

    own = row.scores.get(OWN_PSNR)
    return {
        "group": row.group,
        "method": row.method,
        "setting": row.setting,
        "evaluations, full + reused": f"{steps(row.steps_full)} + {steps(row.steps_reused)}",
        "speedup": "" if row.speedup is None else f"{row.speedup:.2f}",
        "min to max": f"{min(row.speedups):.2f} to {max(row.speedups):.2f}" if row.speedups else "",
        "FLOPs": "" if row.flop_ratio is None else f"{row.flop_ratio:.2f}",
        "MiB held": "" if row.bytes_held is None else f"{row.bytes_held / 2**20:.2f}",
        **score_cells(row.scores),
        "own PSNR dB": "" if own is None else own.text(),
    }
