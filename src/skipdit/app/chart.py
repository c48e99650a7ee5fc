"""Quality over speedup as SVG: ours in color, fewer steps dashed, all others muted; colors are in `page.css`."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from skipdit.app.drawing import escape, table
from skipdit.app.quality import Measurements, Point, Series

BASELINES = ("fewer steps", "second order")
NUM_COLORS = 8


@dataclass(frozen=True)
class Frame:
    """The size of a drawing and its margins, in pixels, and the ranges of its axes."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 46
    right: int = 14
    top: int = 14
    bottom: int = 44

    def place(self, point: Point) -> tuple[float, float]:
        across = (math.log(point.speedup) - math.log(self.x[0])) / (math.log(self.x[1]) - math.log(self.x[0]))
        up = (point.psnr_db - self.y[0]) / (self.y[1] - self.y[0])
        return (
            round(self.left + across * (self.width - self.left - self.right), 1),
            round(self.height - self.bottom - up * (self.height - self.top - self.bottom), 1),
        )


def measurements(measured: Measurements | None, model: str, path: str) -> str:
    """Return the chart and the table of a benchmark, or without one the command that runs it. model: name on the page.
    path: name for the command."""
    series = [] if measured is None else [each for each in measured.series if each.points]
    if measured is None or not series:
        command = f"skipdit bench cache --model {shlex.quote(path)} --out out"
        return (
            f'<div class="sd-hint">Nothing has been measured of {escape(model)} yet. '
            f"<br><code>{escape(command)}</code><br>does it, in the folder in which this page was started.</div>"
        )
    styles = styles_of(series)
    rows = [
        (point.setting, f"{point.speedup:.2f}x", f"{point.psnr_db:.1f}") for each in series for point in each.points
    ]
    rows.sort(key=lambda row: -float(row[2]))
    return (
        f'<figure class="sd-chart">{svg(series, styles, 860, 400, "sd-wide")}'
        f"{svg(series, styles, 380, 320, 'sd-narrow')}"
        f"{legend(series, styles)}<figcaption>Higher is nearer to the uncached run; a speedup is in wall-clock time. "
        f"Read from <code>{escape(measured.source)}</code>.</figcaption></figure>"
        f'<details class="sd-more"><summary>All {len(rows)} measurements</summary>'
        f"{table(('setting', 'speedup', 'PSNR, dB'), rows)}</details>"
    )


def styles_of(series: Sequence[Series]) -> dict[str, str]:
    """Return the class of each method: a color for ours, dashes for baselines."""
    styles, count = {}, 0
    for each in series:
        if each.group == "ours":
            styles[each.method] = f"sd-color-{count % NUM_COLORS}"
            count += 1
        else:
            styles[each.method] = "sd-baseline" if each.group in BASELINES else "sd-muted"
    return styles


def legend(series: Sequence[Series], styles: dict[str, str]) -> str:
    shown = [each.method for each in series if styles[each.method].startswith("sd-color")]
    items = [f'<span><i class="{styles[method]}"></i>{escape(method)}</span>' for method in shown]
    if "sd-baseline" in styles.values():
        items.append('<span><i class="sd-baseline"></i>fewer steps, no cache</span>')
    if "sd-muted" in styles.values():
        items.append('<span><i class="sd-muted"></i>other caches</span>')
    return f'<p class="sd-legend">{"".join(items)}</p>'


def svg(series: Sequence[Series], styles: dict[str, str], width: int, height: int, name: str) -> str:
    points = [point for each in series for point in each.points]
    low, high = min(point.psnr_db for point in points), max(point.psnr_db for point in points)
    step = 5 if high - low > 8 else 2
    frame = Frame(
        width,
        height,
        (min(1.0, *(point.speedup for point in points)), max(1.2, *(point.speedup for point in points)) * 1.04),
        (math.floor(low / step) * step, math.floor(high / step + 1) * step),
    )
    order = ("sd-muted", "sd-baseline", "sd-color")
    ranked = sorted(
        series, key=lambda each: next(i for i, kind in enumerate(order) if styles[each.method].startswith(kind))
    )
    lines = "".join(line(each, styles[each.method], frame) for each in ranked)
    return (
        f'<svg class="{name}" viewBox="0 0 {width} {height}" role="img" aria-label="PSNR over speedup">'
        f"{axes(frame, step)}{lines}</svg>"
    )


def line(series: Series, style: str, frame: Frame) -> str:
    places = [frame.place(point) for point in series.points]
    path = " ".join(f"{x},{y}" for x, y in places)
    marks = "".join(
        f'<circle cx="{x}" cy="{y}" r="4"><title>{escape(point.setting)}: {point.speedup:.2f}x, '
        f"{point.psnr_db:.1f} dB</title></circle>"
        for (x, y), point in zip(places, series.points, strict=True)
    )
    return f'<g class="sd-series {style}"><polyline points="{path}"/>{marks}</g>'


def axes(frame: Frame, step: int) -> str:
    """Return the grid lines with their numbers, and the labels of the axes."""
    parts = []
    end, bottom = frame.width - frame.right, frame.height - frame.bottom
    for level in range(int(frame.y[0]), int(frame.y[1]) + 1, step):
        _, y = frame.place(Point("", 1.0, level))
        parts.append(f'<line x1="{frame.left}" x2="{end}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{frame.left - 8}" y="{y + 4}" text-anchor="end">{level}</text>')
    for speedup in (1, 1.5, 2, 2.5, 3, 4, 5, 7, 10):
        if frame.x[0] <= speedup <= frame.x[1]:
            x, _ = frame.place(Point("", speedup, frame.y[0]))
            parts.append(f'<line x1="{x}" x2="{x}" y1="{frame.top}" y2="{bottom}"/>')
            parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{speedup:g}x</text>')
    parts.append(f'<text x="{end}" y="{frame.height - 6}" text-anchor="end" class="sd-axis">speedup</text>')
    parts.append(f'<text x="{frame.left + 6}" y="{frame.top + 10}" class="sd-axis">PSNR, dB</text>')
    return f'<g class="sd-axes">{"".join(parts)}</g>'
