"""The two renderers of every kind of figure."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from tiny import listing

from skipdit.files.output import OutputFolder
from skipdit.plots import (
    COLORS,
    GRAY,
    Heatmaps,
    Lines,
    Plot,
    Surfaces,
    Tradeoffs,
    draw,
    interactive,
    render_html,
    save_png,
)

X, Y = np.linspace(-1, 1, 5), np.linspace(0, 3, 4)
GRID = np.outer(np.cos(Y), X)
HOLED = np.where(GRID > 0.9, np.nan, GRID)
LINES = Lines(
    name="lines",
    title="Lines <of> time",
    x_label="step",
    y_label="norm",
    series={f"unit {index}": (X, np.exp(X * index)) for index in range(9)} | {"bound": (X, np.full(5, np.nan))},
    log_y=True,
    reverse_x=True,
    dashed=frozenset({"bound"}),
)
PANELS = {"one": GRID, "two": 2 * HOLED}
HEATMAPS = Heatmaps(
    name="heatmaps", title="Maps", x_label="x", y_label="y", color_label="value", x=X, y=Y, panels=PANELS
)
SURFACES = Surfaces(name="surfaces", title="Hills", x_label="x", y_label="y", z_label="z", x=X, y=Y, panels=PANELS)
ALL = (LINES, HEATMAPS, SURFACES)


@pytest.mark.parametrize("plot", ALL, ids=lambda plot: plot.name)
def test_a_png_shows_its_data(plot: Plot, tmp_path: Path) -> None:
    path, out = tmp_path / f"{plot.name}.png", OutputFolder(tmp_path, "test")
    save_png(plot, out)
    with Image.open(path) as picture:
        assert picture.width > 700
        first = np.asarray(picture.convert("RGB"))
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 20
    if isinstance(plot, Lines):
        other = replace(plot, series={label: (x, y[::-1]) for label, (x, y) in plot.series.items()})
    else:
        other = replace(plot, panels={label: panel[::-1] for label, panel in plot.panels.items()})
    save_png(other, out)
    with Image.open(path) as picture:
        assert not np.array_equal(first, np.asarray(picture.convert("RGB")))
    assert listing(tmp_path) == [path.name]


def test_a_page_stands_alone() -> None:
    sections = [("Head", "1 < 2 & <b>", LINES), ("Head", "1 < 2 & <b>", HEATMAPS), ("Hills", "", SURFACES)]
    page = render_html("A & B", sections)
    assert "<title>A &amp; B</title>" in page
    assert page.count("<h2>Head</h2>") == page.count("1 &lt; 2 &amp; &lt;b&gt;") == 1
    assert page.count('class="plotly-graph-div"') == 3
    assert len(re.findall(r"plotly\.js v\d", page)) == 1
    assert not re.search(r"<script[^>]*src=", page)


def test_panels_share_one_scale() -> None:
    low, high = -2.0, np.nanmax(2 * HOLED)
    for figure in (interactive(HEATMAPS), interactive(SURFACES)):
        traces = figure.data
        scales = {(trace.zmin, trace.zmax) if hasattr(trace, "zmin") else (trace.cmin, trace.cmax) for trace in traces}
        ((found_low, found_high),) = scales
        assert found_low == pytest.approx(min(np.nanmin(GRID), np.nanmin(2 * HOLED)))
        assert found_high == pytest.approx(max(high, np.nanmax(GRID)))
        assert found_low >= low
    axes = draw(SURFACES).axes
    assert axes[0].get_zlim() == axes[1].get_zlim()


def test_equal_values_and_log_scales_draw(tmp_path: Path) -> None:
    flat = replace(HEATMAPS, panels={"flat": np.ones((4, 5))}, log_color=True, reverse_x=True)
    save_png(flat, OutputFolder(tmp_path, "test"))
    assert interactive(flat).data[0].zmin < 0 < interactive(flat).data[0].zmax


@pytest.mark.parametrize("panel", [GRID, -np.abs(GRID), np.full((4, 5), np.nan), np.full((4, 5), 1e-4)])
def test_values_without_a_logarithm_are_gaps(panel: np.ndarray, tmp_path: Path) -> None:
    plot = replace(HEATMAPS, panels={"a": panel}, log_color=True)
    save_png(plot, OutputFolder(tmp_path, "test"))
    (trace,) = interactive(plot).data
    assert np.array_equal(np.isnan(trace.z), ~(panel > 0))
    assert trace.zmin < trace.zmax


def test_a_long_legend_stays_on_the_page_beside_wide_axes() -> None:
    figure = draw(replace(LINES, series={f"unit {index}": (X, np.exp(X)) for index in range(28)}))
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    box = axes.get_legend().get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert 0 <= box.y0 < box.y1 <= figure.bbox.height
    assert axes.get_position().height > 0.6


def test_dashed_curves_take_the_colour_of_the_curve_before() -> None:
    series = dict.fromkeys(("a: measured", "a: bound", "b: measured", "b: bound"), (X, X))
    styles = replace(LINES, series=series, dashed=frozenset({"a: bound", "b: bound"})).styles()
    assert styles["a: bound"][0] == styles["a: measured"][0] != styles["b: measured"][0] == styles["b: bound"][0]


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"'a' .* got \(5,\) and \(4,\)"):
        replace(LINES, series={"a": (X, Y)})
    with pytest.raises(ValueError, match=r"'a' must have shape \(4, 5\), got \(5, 4\)"):
        replace(SURFACES, panels={"a": GRID.T})
    with pytest.raises(ValueError, match=r"at least one panel, got \{\}"):
        replace(HEATMAPS, panels={})


# ----------------------------------------------------------------------------------------------------------------------
# Tradeoffs


def tradeoffs(num_others: int = 1) -> Tradeoffs:
    x = np.array([1.0, 2.0, 3.0])
    series = {"steps": (x, 30 - x), "ours": (x, 40 - x)} | {
        f"other {index}": (x[: 1 + index % 3], 36 - index - x[: 1 + index % 3]) for index in range(num_others)
    }
    return Tradeoffs(
        name="tradeoffs",
        title="A <b> & c",
        x_label="speedup",
        y_label="PSNR",
        series=series,
        emphasized=frozenset({"ours"}),
        dashed=frozenset({"steps"}),
    )


def test_lines_can_be_told_apart() -> None:
    styles = tradeoffs(20).styles()
    assert len(set(styles.values())) == len(styles)
    assert styles["ours"][0] == COLORS[0]
    assert styles["steps"][0] == GRAY


def test_both_figures_show_every_setting(tmp_path: Path) -> None:
    plot = tradeoffs(2)
    save_png(plot, OutputFolder(tmp_path, "bench"))
    with Image.open(tmp_path / f"{plot.name}.png") as picture:
        assert picture.width > 1000
    figure = draw(plot)
    FigureCanvasAgg(figure)
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    page = {trace.name: trace for trace in interactive(plot).data}
    assert list(drawn) == list(page) == list(plot.series)
    for label, (x, y) in plot.series.items():
        assert np.array_equal(drawn[label].get_xdata(), x)
        assert np.array_equal(page[label].y, y)
        assert page[label].mode == "lines+markers"
        assert page[label].line.color == drawn[label].get_color()
    assert drawn["ours"].get_linewidth() > drawn["other 0"].get_linewidth()
    assert (drawn["steps"].get_linestyle(), drawn["ours"].get_linestyle()) == ("--", "-")
