"""Figures that are declared once and drawn as PNG by matplotlib and as interactive HTML by plotly.

Both libraries are optional (`pip install "skipdit[plots]"`) and imported only when used.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from skipdit.files.output import OutputFolder
from skipdit.interfaces import Fields, Figure
from skipdit.options import check_installed

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
SEQUENTIAL = "viridis"
LEGEND_ROWS = 18  # the number that fits beside the axes
MARKERS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down"}  # plotly's names
GRAY = "#666666"


@dataclass(frozen=True, kw_only=True)
class PlotLabels:
    """Name, title and axis labels of a plot."""

    name: str
    """file name without suffix"""
    title: str
    """heading"""
    x_label: str
    """label of the x axis"""
    y_label: str
    """label of the y axis"""


@dataclass(frozen=True, kw_only=True)
class Curves(PlotLabels):
    """Curves on one pair of axes. Abstract."""

    series: Mapping[str, tuple[NDArray, NDArray]]
    """(x, y) by label; NaN leaves a gap"""
    dashed: frozenset[str] = frozenset()
    """labels of dashed curves"""
    emphasized: frozenset[str] = frozenset()
    """labels of thick curves"""
    log_y: bool = False
    """scale y logarithmically"""
    reverse_x: bool = False
    """let x decrease to the right"""
    width: ClassVar[float] = 1.6
    """width of a line that is not thick, in points"""

    def __post_init__(self) -> None:
        for label, (x, y) in self.series.items():
            if np.ndim(x) != 1 or np.shape(x) != np.shape(y):
                raise ValueError(f"x and y of {label!r} must have the same length, got {np.shape(x)} and {np.shape(y)}")

    def styles(self) -> dict[str, tuple[str, str | None]]:
        """Return the color of each label, and the marker of its points or `None`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Lines(Curves):
    """Curves of many points. A few curves get distinct hues, many get shades from first to last; a dashed one has the
    color of the solid one before it."""

    def styles(self) -> dict[str, tuple[str, str | None]]:
        solid = [label for label in self.series if label not in self.dashed]
        styles, color = {}, COLORS[0]
        for label in self.series:
            if label in solid:
                index = solid.index(label)
                color = COLORS[index] if len(solid) <= len(COLORS) else shade(index / (len(solid) - 1))
            styles[label] = color, None
        return styles


@dataclass(frozen=True, kw_only=True)
class Tradeoffs(Curves):
    """The cost of one quantity in terms of another, with a mark per measured setting. Baselines are dashed and gray;
    emphasized curves are the first to get a color."""

    width: ClassVar[float] = 1.2

    def styles(self) -> dict[str, tuple[str, str | None]]:
        markers = list(MARKERS)
        baselines = [label for label in self.series if label in self.dashed]
        plain = [label for label in self.series if label not in self.dashed | self.emphasized]
        others = [*(label for label in self.series if label in self.emphasized - self.dashed), *plain]
        return {
            label: (colors[index % len(colors)], markers[index % len(markers)])
            for labels, colors in ((baselines, (GRAY,)), (others, COLORS))
            for index, label in enumerate(labels)
        }


@dataclass(frozen=True, kw_only=True)
class Panels(PlotLabels):
    """Panels side by side on one scale."""

    x: NDArray
    """coordinates of the columns"""
    y: NDArray
    """coordinates of the rows"""
    panels: Mapping[str, NDArray]
    """matrices (len(y), len(x)) by label"""

    def __post_init__(self) -> None:
        if not self.panels:
            raise ValueError(f"a plot needs at least one panel, got {self.panels}")
        for label, panel in self.panels.items():
            if np.shape(panel) != (len(self.y), len(self.x)):
                shape = (len(self.y), len(self.x))
                raise ValueError(f"panel {label!r} must have shape {shape}, got {np.shape(panel)}")


@dataclass(frozen=True, kw_only=True)
class Heatmaps(Panels):
    """Heatmaps on one color scale."""

    color_label: str
    """label of the color scale"""
    reverse_x: bool = False
    """let x decrease to the right"""
    log_color: bool = False
    """color by logarithm; values without one are gaps, like NaN"""

    def values(self) -> dict[str, NDArray]:
        """Return the values that the colors show: the panels, or their log10."""
        if not self.log_color:
            return dict(self.panels)
        return {label: np.log10(np.where(panel > 0, panel, np.nan)) for label, panel in self.panels.items()}


@dataclass(frozen=True, kw_only=True)
class Surfaces(Panels):
    """Surfaces in three dimensions, all with the same range of z."""

    z_label: str
    """label of the z axis"""


Plot = Lines | Heatmaps | Surfaces | Tradeoffs


def value_range(panels: Mapping[str, NDArray]) -> tuple[float, float]:
    """Return the smallest and largest finite value of all panels, moved slightly apart if they are equal."""
    values = np.concatenate([np.ravel(panel)[np.isfinite(np.ravel(panel))] for panel in panels.values()])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return (low, high) if high - low > 1e-9 * max(abs(high), 1e-9) else (low - 1e-3, high + 1e-3)


def check_plots_installed(*libraries: str) -> None:
    """Raise `ValueError`, with the command to install it, if a plotting library is missing. Call this first."""
    check_installed("figures need", "plots", *(libraries or ("matplotlib", "plotly")))


def shade(fraction: float) -> str:
    """Return a color of the sequential scale without its pale end."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps[SEQUENTIAL](0.9 * fraction))


# ----------------------------------------------------------------------------------------------------------------------
# PNG


def save_png(plot: Plot, out: OutputFolder) -> None:
    """Draw a plot into `{name}.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(plot)
    FigureCanvasAgg(figure)
    with out.file(f"{plot.name}.png") as draft:
        figure.savefig(draft, dpi=150)


@singledispatch
def draw(plot: Plot) -> Figure:
    """Return the matplotlib figure."""
    raise TypeError(f"not a plot: {plot!r}")


@draw.register
def _(plot: Curves) -> Figure:
    from matplotlib.figure import Figure

    is_legend_outside = len(plot.series) > 4
    num_columns = max(1, -(-len(plot.series) // LEGEND_ROWS))
    figure_width = 6.3 + 1.6 * (num_columns + 1) if is_legend_outside else 7.5
    figure = Figure(figsize=(figure_width, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=plot.x_label, ylabel=plot.y_label, title=plot.title)
    for label, (color, marker) in plot.styles().items():
        width, size, layer = (2.8, 6.0, 3) if label in plot.emphasized else (plot.width, 4.5, 2)
        line: Fields = {"linestyle": "--" if label in plot.dashed else "-", "linewidth": width, "zorder": layer}
        axes.plot(*plot.series[label], label=label, color=color, marker=marker, markersize=size, **line)
    if plot.log_y:
        axes.set_yscale("log")
    if plot.reverse_x:
        axes.invert_xaxis()
    axes.grid(alpha=0.25)
    outside: Fields = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    position: Fields = outside if is_legend_outside else {"loc": "best"}
    axes.legend(fontsize=8, frameon=False, ncols=num_columns, **position)
    return figure


@draw.register
def _(plot: Heatmaps) -> Figure:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 5 * len(plot.panels), 4.2), layout="constrained")
    panels = figure.subplots(1, len(plot.panels), squeeze=False, sharey=True)[0]
    low, high = value_range(plot.values())
    norm = LogNorm(10**low, 10**high) if plot.log_color else Normalize(low, high)
    mesh: Any = None
    for axes, (label, panel) in zip(panels, plot.panels.items(), strict=True):
        mesh = axes.pcolormesh(plot.x, plot.y, panel, norm=norm, cmap=SEQUENTIAL, shading="nearest")
        axes.set(title=label, xlabel=plot.x_label)
        if plot.reverse_x:
            axes.invert_xaxis()
    panels[0].set_ylabel(plot.y_label)
    figure.colorbar(mesh, ax=list(panels), label=plot.color_label)
    figure.suptitle(plot.title)
    return figure


@draw.register
def _(plot: Surfaces) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(plot.panels), 5))
    x, y = np.meshgrid(plot.x, plot.y)
    low, high = value_range(plot.panels)
    for index, (label, panel) in enumerate(plot.panels.items()):
        axes: Any = figure.add_subplot(1, len(plot.panels), index + 1, projection="3d")
        axes.plot_surface(x, y, panel, cmap=SEQUENTIAL, vmin=low, vmax=high, linewidth=0.2, edgecolor="#00000030")
        axes.set(title=label, xlabel=plot.x_label, ylabel=plot.y_label, zlim=(low, high))
        axes.set_zlabel(plot.z_label, labelpad=9)
        axes.tick_params(labelsize=8)
        axes.locator_params(nbins=5)
    figure.suptitle(plot.title)
    figure.subplots_adjust(left=0.02, right=0.92, wspace=0.18, top=0.88)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# HTML

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def render_html(title: str, sections: Sequence[tuple[str, str, Plot]]) -> str:
    """Return an HTML page that needs no network. sections: (heading, text, plot); consecutive ones with the same
    heading share one heading and the first text."""
    parts, previous = [], None
    for heading, text, plot in sections:
        if heading != previous:
            parts.append(f"<h2>{html.escape(heading)}</h2>\n<p>{html.escape(text)}</p>")
        figure = interactive(plot)
        parts.append(figure.to_html(full_html=False, include_plotlyjs=previous is None))
        previous = heading
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


@singledispatch
def interactive(plot: Plot) -> Figure:
    """Return the plotly figure."""
    raise TypeError(f"not a plot: {plot!r}")


@interactive.register
def _(plot: Curves) -> Figure:
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for label, (color, marker) in plot.styles().items():
        x, y = plot.series[label]
        width = 4 if label in plot.emphasized else 2
        line = {"color": color, "dash": "dash" if label in plot.dashed else "solid", "width": width}
        symbol, mode = (
            None if marker is None else {"symbol": MARKERS[marker], "size": 8},
            "lines" + "+markers" * bool(marker),
        )
        figure.add_trace(graph_objects.Scatter(x=x, y=y, name=label, mode=mode, line=line, marker=symbol))
    figure.update_layout(title=plot.title, height=520, template="plotly_white")
    figure.update_xaxes(title=plot.x_label, autorange="reversed" if plot.reverse_x else True)
    figure.update_yaxes(title=plot.y_label, type="log" if plot.log_y else "linear", exponentformat="power")
    return figure


@interactive.register
def _(plot: Heatmaps) -> Figure:
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    values = plot.values()
    low, high = value_range(values)
    figure = make_subplots(1, len(values), subplot_titles=list(values), shared_yaxes=True)
    bar = {"title": f"log10 {plot.color_label}" if plot.log_color else plot.color_label}
    for column, panel in enumerate(values.values(), start=1):
        trace = graph_objects.Heatmap(
            x=plot.x, y=plot.y, z=panel, zmin=low, zmax=high, colorscale=SEQUENTIAL, colorbar=bar, showscale=column == 1
        )
        figure.add_trace(trace, row=1, col=column)
    figure.update_layout(title=plot.title, height=480, template="plotly_white")
    figure.update_xaxes(title=plot.x_label, autorange="reversed" if plot.reverse_x else True)
    figure.update_yaxes(title=plot.y_label, col=1)
    return figure


@interactive.register
def _(plot: Surfaces) -> Figure:
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    low, high = value_range(plot.panels)
    kinds = [[{"type": "surface"}] * len(plot.panels)]
    figure = make_subplots(1, len(plot.panels), specs=kinds, subplot_titles=list(plot.panels))
    for column, panel in enumerate(plot.panels.values(), start=1):
        trace = graph_objects.Surface(
            x=plot.x, y=plot.y, z=panel, cmin=low, cmax=high, colorscale=SEQUENTIAL, showscale=column == 1
        )
        figure.add_trace(trace, row=1, col=column)
    height = {"title": plot.z_label, "range": [low, high]}
    figure.update_scenes(xaxis={"title": plot.x_label}, yaxis={"title": plot.y_label}, zaxis=height)
    figure.update_layout(title=plot.title, height=600, template="plotly_white")
    return figure
