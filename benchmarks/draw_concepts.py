"""Draws the pictures of docs/concepts.md: `python benchmarks/draw_concepts.py`."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from skipdit.cache.methods import parse_method
from skipdit.cache.schedule import resolve

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
RUNS, WAITS, SKIP, INK = "#3d6fb6", "#e4e7ec", "#d9822b", "#222831"
NUM_UNITS, NUM_SHALLOW = 8, 1


def box(axes: Any, x: float, y: float, text: str, *, runs: bool = True, width: float = 0.8) -> None:
    """Draw a unit; one that does not run is grey."""
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.2), width, 0.4, boxstyle="round,pad=0.04", fc=RUNS if runs else WAITS, ec="none"
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", color="white" if runs else "#9aa1ab", fontsize=10)


def arrow(axes: Any, start: tuple[float, float], stop: tuple[float, float], **style: Any) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.4, "shrinkA": 0, "shrinkB": 0} | style
    axes.annotate("", stop, start, arrowprops=style)


def plain(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=12, color=INK, loc="left", pad=10)
    axes.set_aspect("equal")
    axes.axis("off")


def draw_step(axes: Any, title: str, *, reuses: bool) -> None:
    """Draw the units of a model, the first half going down on the left, the second going up on the right."""
    half = NUM_UNITS // 2
    for unit in range(half):
        fresh = not reuses or unit < NUM_SHALLOW
        y, color = float(half - unit), SKIP if fresh else WAITS
        box(axes, 0, y, f"unit {unit}", runs=fresh)
        box(axes, 4, y, f"unit {NUM_UNITS - 1 - unit}", runs=fresh)
        arrow(axes, (0.5, y), (3.5, y), color=color, lw=2)
        if fresh and unit == 0:
            axes.text(2, y + 0.12, "long skip", color=SKIP, ha="center", fontsize=9)
        below = not reuses or unit + 1 < NUM_SHALLOW
        if unit + 1 < half:
            arrow(axes, (0, y - 0.28), (0, y - 0.74), color=INK if below else WAITS)
            if below:
                arrow(axes, (4, y - 0.74), (4, y - 0.28))
    if reuses:
        arrow(axes, (4, half - 0.85), (4, half - 0.28), color=SKIP, lw=2)
        axes.text(4.15, half - 0.72, "from the last full step", color=SKIP, va="center", fontsize=9)
    else:
        arrow(axes, (0.05, 0.72), (3.95, 0.72), connectionstyle="arc3,rad=0.25")
    arrow(axes, (0, half + 0.75), (0, half + 0.28))
    arrow(axes, (4, half + 0.28), (4, half + 0.75))
    axes.text(0, half + 0.9, "noisy latents", ha="center", fontsize=9, color=INK)
    axes.text(4, half + 0.9, "prediction", ha="center", fontsize=9, color=INK)
    axes.set_xlim(-0.8, 5.9)
    axes.set_ylim(0, half + 1.3)
    plain(axes, title)


def draw_long_skips() -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.9), layout="constrained")
    draw_step(axes[0], "A full step: every unit runs", reuses=False)
    draw_step(axes[1], f"A reuse step: {2 * NUM_SHALLOW} of {NUM_UNITS} units run", reuses=True)
    return figure


def full_steps(spec: str, *, shift: float = 1.0, num_steps: int = 50) -> list[bool]:
    """Return whether each step of a run of a flow model is full, as a cache of this spec decides."""
    shares = [1 - step / num_steps for step in range(num_steps)]
    timesteps = [1000 * shift * share / (1 + (shift - 1) * share) for share in shares]
    return resolve(parse_method(spec).rules[0].schedule, timesteps)


def draw_schedules() -> Any:
    even = ("N2", "N3", "N2-700-50", "skip-taylor:N4-800-100-o1", "auto:1.8", "auto:2.5")
    rows = [*((spec, 1.0) for spec in even), ("auto:1.8", 3.0), ("auto:2.5", 3.0)]
    figure, axes = plt.subplots(figsize=(11, 3.6), layout="constrained")
    for row, (spec, shift) in enumerate(rows):
        steps = full_steps(spec, shift=shift)
        for step, is_full in enumerate(steps):
            axes.add_patch(plt.Rectangle((step + 0.08, -row - 0.32), 0.84, 0.64, fc=RUNS if is_full else WAITS))
        name = spec if shift == 1 else f"{spec}, shift {shift:g}"
        axes.text(-0.6, -row, name, ha="right", va="center", fontsize=10, family="monospace", color=INK)
        axes.text(50.6, -row, f"{sum(steps)} full", va="center", fontsize=10, color=INK)
    axes.text(0, 0.75, "first step, all noise", fontsize=9, color=INK)
    axes.text(50, 0.75, "last step", fontsize=9, color=INK, ha="right")
    axes.set_xlim(-11.5, 54)
    axes.set_ylim(-len(rows) + 0.4, 1.1)
    plain(axes, "Which of 50 steps are full (blue) and which reuse (grey)")
    axes.set_aspect("auto")
    return figure


def draw_routing() -> Any:
    figure, axes = plt.subplots(figsize=(8, 3.9), layout="constrained")
    num_tokens, kept, last = 8, (1, 4), 7
    for unit in range(last + 1):
        sees_all = unit < 2 or unit > last - 2
        axes.text(unit * 1.5, -0.9, f"unit {unit}", ha="center", fontsize=10, color=INK)
        for token in range(num_tokens):
            runs = sees_all or token in kept
            axes.add_patch(plt.Circle((unit * 1.5, token * 0.62), 0.24, fc=RUNS if runs else WAITS))
    for token in range(num_tokens):
        bypassed = token not in kept
        for unit in range(last):
            if bypassed and 1 <= unit < last - 1:
                continue
            arrow(axes, (unit * 1.5 + 0.3, token * 0.62), (unit * 1.5 + 1.2, token * 0.62), lw=0.9)
        if bypassed:
            arrow(axes, (1.8, token * 0.62), (8.7, token * 0.62), color=SKIP, lw=1.2, linestyle="--")
    axes.text(5.25, num_tokens * 0.62 - 0.1, "most tokens bypass the deep units", ha="center", color=SKIP, fontsize=10)
    axes.set_xlim(-1, last * 1.5 + 1)
    axes.set_ylim(-1.3, num_tokens * 0.62 + 0.4)
    plain(axes, "Token routing in training: the deep units see a random quarter of the tokens")
    return figure


def main() -> None:
    drawings = {"long_skips": draw_long_skips, "schedules": draw_schedules, "token_routing": draw_routing}
    for name, draw in drawings.items():
        figure = draw()
        figure.savefig(PICTURES / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
