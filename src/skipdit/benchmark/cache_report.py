"""The rows of the benchmark of caches, what they say at equal speedup, and how they are written and drawn."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal, get_args

import numpy as np

from skipdit.benchmark.measure import header, table, write_report
from skipdit.files import OutputFolder
from skipdit.metrics.paired import PairedScore
from skipdit.plots import Tradeoffs, save_png

Group = Literal["control", "fewer steps", "second order", "ours", "others", "others, calibrated"]
Axis = Literal["speedup", "flop_ratio"]
AXES: dict[Axis, str] = {"speedup": "wall-clock time", "flop_ratio": "FLOPs"}
ONCE_MORE = "once more"  # setting of the control, the reference run again
AT_RATIO = 2.0
TARGET_DB = 6.0  # of the best of ours over each rival
CALIBRATED = "the best other site under a calibrated schedule"  # what the schedule gives without long skips: no target


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run beside the uncached run of the same seeds.

    steps_full, steps_reused: mean over the batches, `None` where the cache does not count. bytes_held: the most, by the
    cache, for a whole batch. speedups: seconds of the uncached run over this one's, a batch each. flop_ratio: the same
    in FLOPs. psnr: in dB; own_psnr: to the run with all steps of the same second-order sampler. Of clips over all
    frames. All is `None` where the model refused the cache, for the reason in `refused`.
    """

    method: str
    setting: str
    group: Group
    num_steps: int
    steps_full: float | None = None
    steps_reused: float | None = None
    bytes_held: int | None = None
    speedups: tuple[float, ...] = ()
    flop_ratio: float | None = None
    psnr: PairedScore | None = None
    own_psnr: PairedScore | None = None
    ssim: PairedScore | None = None
    perceptual: PairedScore | None = None
    refused: str | None = None

    @property
    def speedup(self) -> float | None:
        """The median over the batches."""
        return median(self.speedups) if self.speedups else None


# ----------------------------------------------------------------------------------------------------------------------
# At equal speedup

Point = tuple[float, float]  # a ratio and a PSNR


def points_of(rows: Sequence[Row], axis: Axis, *, own: bool = False) -> dict[str, list[Point]]:
    """Of each method the settings that were measured. own: PSNR to the second-order sampler's own run."""
    points: dict[str, list[Point]] = {}
    for row in rows:
        ratio, psnr = getattr(row, axis), row.own_psnr if own else row.psnr
        if ratio is not None and psnr is not None and psnr.finite_mean is not None:
            points.setdefault(row.method, []).append((ratio, psnr.mean))
    return points


def front(points: Sequence[Point]) -> list[Point]:
    """The settings that no other of the same method beats in both, slow ones first."""
    kept: list[Point] = []
    for ratio, psnr in sorted(points, reverse=True):
        if not kept or psnr > kept[-1][1]:
            kept.append((ratio, psnr))
    return kept[::-1]


def psnr_at(points: Sequence[Point], ratio: float) -> float | None:
    """PSNR of a method at a ratio: linear over the logarithm of the ratio between its two neighbouring settings, a
    setting that a faster one beats counting as that one. `None` where no setting is slower, or none faster."""
    ordered = sorted(points)
    if not ordered or not ordered[0][0] <= ratio <= ordered[-1][0]:
        return None
    best = np.maximum.accumulate([psnr for _, psnr in ordered][::-1])[::-1]
    return float(np.interp(math.log(ratio), [math.log(each) for each, _ in ordered], best))


def best_at(points: Mapping[str, Sequence[Point]], ratio: float) -> tuple[str, float] | None:
    """The method with the highest PSNR at a ratio."""
    found = [(method, psnr) for method in points if (psnr := psnr_at(points[method], ratio)) is not None]
    return max(found, key=lambda pair: pair[1], default=None)


@dataclass(frozen=True)
class Standing:
    """The best of ours at equal speedup, and of each kind of rival the best: method and PSNR in dB, `None` where no
    method has settings on both sides."""

    axis: Axis
    ratio: float
    ours: tuple[str, float] | None
    rivals: dict[str, tuple[str, float] | None]

    @property
    def gains_db(self) -> dict[str, float]:
        """Of ours over each rival that was measured there."""
        if self.ours is None:
            return {}
        return {name: self.ours[1] - rival[1] for name, rival in self.rivals.items() if rival is not None}

    def sentence(self) -> str:
        place = f"At {self.ratio:g}x in {AXES[self.axis]}"
        if self.ours is None:
            return f"{place} none of ours has settings on both sides."
        gains = self.gains_db
        parts = [
            f"{gains[name]:+.2f} dB over {name} ({rival[0]}, {rival[1]:.2f} dB)"
            for name, rival in self.rivals.items()
            if rival is not None
        ]
        parts += [f"{name} has no settings on both sides" for name, rival in self.rivals.items() if rival is None]
        missed = [name for name, gain in gains.items() if gain < TARGET_DB and name != CALIBRATED]
        reached = [name for name, gain in gains.items() if gain >= TARGET_DB and name != CALIBRATED]
        return (
            f"{place} the best of ours is {self.ours[0]}, {self.ours[1]:.2f} dB: {'; '.join(parts)}. Target "
            f"{TARGET_DB:+g} dB: reached over {', '.join(reached) or 'none'}; missed over "
            f"{', '.join(missed) or 'none'}."
        )


def standing(rows: Sequence[Row], axis: Axis, ratio: float = AT_RATIO) -> Standing:
    def best(group: Group, *, own: bool = False) -> tuple[str, float] | None:
        return best_at(points_of([row for row in rows if row.group == group], axis, own=own), ratio)

    rivals = {
        "the best other cache": best("others"),
        CALIBRATED: best("others, calibrated"),
        "fewer steps": best("fewer steps"),
        "fewer second-order steps": best("second order"),
        "fewer second-order steps beside their own run": best("second order", own=True),
    }
    return Standing(axis, ratio, best("ours"), rivals)


def verdict(rows: Sequence[Row]) -> Iterator[str]:
    """In words, what the best of ours is ahead of, and what a ratio of times is worth."""
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
    out: OutputFolder, name: str, *, environment: Mapping[str, str], settings: Mapping[str, Any], rows: Sequence[Row]
) -> None:
    """Write `{name}.md`, `.json` and `.png`; settings: of the config."""
    order = get_args(Group)
    rows = sorted(rows, key=lambda row: order.index(row.group))
    save_png(draw(name, rows, settings), out)
    report = {
        "environment": environment,
        "config": settings,
        "rows": [asdict(row) | {"speedup": row.speedup} for row in rows],
        "standings": [asdict(each) | {"gains_db": each.gains_db} for each in (standing(rows, axis) for axis in AXES)],
        "verdict": list(verdict(rows)),
    }
    write_report(out, name, report, render_markdown(name, environment, settings, rows))


def draw(name: str, rows: Sequence[Row], settings: Mapping[str, Any]) -> Tradeoffs:
    series = {}
    for method, points in points_of([row for row in rows if row.group != "control"], "speedup").items():
        x, y = zip(*front(points), strict=True)
        series[method] = (np.array(x), np.array(y))
    groups = {row.method: row.group for row in rows}
    return Tradeoffs(
        name=name,
        title=f"{settings['model']}, {settings['num_steps']} steps: what a speedup costs",
        x_label="speedup in wall-clock time",
        y_label="PSNR to the uncached run, dB",
        series=series,
        emphasized=frozenset(method for method in series if groups[method] == "ours"),
        dashed=frozenset(method for method in series if groups[method] in ("fewer steps", "second order")),
    )


def render_markdown(
    name: str, environment: Mapping[str, str], settings: Mapping[str, Any], rows: Sequence[Row]
) -> list[str]:
    """Command and machine, all rows, what was refused, and in words who is ahead at equal speedup."""
    measured, refused = [r for r in rows if r.refused is None], [r for r in rows if r.refused is not None]
    parts = [
        *header(environment),
        f"Model {settings['model']}: {settings['num_seeds']} samples with seeds from {settings['seed']} on, "
        f"{settings['batch_size']} at a time, {settings['num_steps']} steps, guidance {settings['guidance_scale']:g}. "
        "Each row beside the uncached run of the same seeds in the same batch. Speedup: in wall-clock time, the median "
        "of the batches, and the least and the largest. FLOPs: of the uncached run over those of this one. Held: by a "
        "cache at most, of a whole batch. PSNR, SSIM and the LPIPS-like distance (equal weights, EfficientNet-Lite0): "
        "mean and standard deviation over samples, of clips over frames. A second-order sampler ends elsewhere: its "
        "own PSNR is that to its own run with all steps. A bare N is the paper's cache.",
        table([record(row) for row in measured]),
    ]
    if refused:
        parts.append("Refused by this model:")
        parts.append("\n".join(f"- {row.method}, `{row.setting}`: {row.refused}" for row in refused))
    parts += [
        *verdict(rows),
        "Settings that another of the same method beats in both are not drawn.",
        f"![PSNR over speedup]({name}.png)",
    ]
    return parts


def record(row: Row) -> dict[str, object]:
    def steps(count: float | None) -> str:
        return "?" if count is None else f"{count:.4g}"

    return {
        "group": row.group,
        "method": row.method,
        "setting": row.setting,
        "full + reused": f"{steps(row.steps_full)} + {steps(row.steps_reused)}",
        "speedup": "" if row.speedup is None else f"{row.speedup:.2f}",
        "min to max": f"{min(row.speedups):.2f} to {max(row.speedups):.2f}" if row.speedups else "",
        "FLOPs": "" if row.flop_ratio is None else f"{row.flop_ratio:.2f}",
        "MiB held": "" if row.bytes_held is None else f"{row.bytes_held / 2**20:.2f}",
        "PSNR dB": "" if row.psnr is None else row.psnr.text(),
        "SSIM": "" if row.ssim is None else row.ssim.text(4),
        "LPIPS-like": "" if row.perceptual is None else row.perceptual.text(4),
        "own PSNR dB": "" if row.own_psnr is None else row.own_psnr.text(),
    }
