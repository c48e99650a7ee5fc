"""What the stability report says and draws: a section a measurement, in plain words with this model's numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipdit.analysis.measure import AnalyzeConfig, Measured
from skipdit.plots import Heatmaps, Lines, Plot, Surfaces

Models = Mapping[str, Measured]


NUMBERED = ("error_growth", "long_skip_norms", "long_skip_spectra", "layer_norms", "gradient_norms")  # one per model
SHARED = (
    "similarity_last_unit",
    "similarity",
    "cached_similarity",
    "jacobian_model",
    "jacobian_units",
    "jacobian_bounds",
    "training_loss",
)


def figure_names(config: AnalyzeConfig, num_models: int) -> list[str]:
    """Return the names of all figures that a report on so many models can have."""
    surfaces = [f"surface_{moved}_{at}" for moved in ("weights", "inputs") for at in config.surface_timesteps]
    return [*SHARED, *surfaces, *(f"{name}_{index + 1}" for name in NUMBERED for index in range(num_models))]


@dataclass(frozen=True)
class Section:
    """heading; about: what is drawn and how it was measured; seen: what these models show; figures."""

    heading: str
    about: str
    seen: str
    figures: tuple[Plot, ...]


def holds(measured: Any, predicted: Any) -> bool:
    return bool((measured <= predicted * (1 + 1e-4) + 1e-7).all())


def listed(models: Models, say: Callable[[Measured], str]) -> str:
    return "; ".join(f"{name}: {say(measured)}" for name, measured in models.items()) + "."


def similarity_section(models: Models, config: AnalyzeConfig) -> Section:
    last = {name: (measured.timesteps[1:], measured.similarity[-1]) for name, measured in models.items()}
    first = next(iter(models.values()))
    depth = max(measured.num_units for measured in models.values())
    panels = {name: padded((1 - measured.similarity).clip(1e-6), depth) for name, measured in models.items()}
    return Section(
        "How much features change from step to step",
        "Each unit's output is compared with its own output one denoising step before: cosine similarity over the "
        "channels of a token, mean over tokens and pictures. A cache that holds a feature for a step is wrong by "
        "what is missing to 1.",
        listed(
            models,
            lambda m: (
                f"the last unit's similarity is {m.similarity[-1].mean():.4f} on average and "
                f"{m.similarity[-1].min():.4f} at worst (timestep {m.timesteps[1:][m.similarity[-1].argmin()]:.0f}); "
                f"over all units the mean is {m.similarity.mean():.4f}"
            ),
        ),
        (
            Lines(
                name="similarity_last_unit",
                title="Similarity of the last unit's output to the step before",
                x_label="timestep",
                y_label="cosine similarity",
                series=last,
                reverse_x=True,
            ),
            Heatmaps(
                name="similarity",
                title="Change of each unit's output since the step before",
                x_label="timestep",
                y_label="unit",
                color_label="1 - cosine similarity",
                x=first.timesteps[1:],
                y=np.arange(depth),
                panels=panels,
                reverse_x=True,
                log_color=True,
            ),
        ),
    )


def padded(rows: NDArray, depth: int) -> NDArray:
    """With rows of NaN up to the deeper model's depth."""
    return np.concatenate([rows, np.full((depth - len(rows), rows.shape[1]), np.nan)])


def caching_section(models: Models, config: AnalyzeConfig) -> Section | None:
    series = {
        f"{name}, {method}": (measured.timesteps, blank_zeros(1 - growth.feature_similarity.numpy(), 1e-6))
        for name, measured in models.items()
        for method, growth in measured.growth.items()
    }
    if not series:
        return None
    left_out = "".join(
        f" {name} cannot have {method}: {reason}."
        for name, m in models.items()
        for method, reason in m.left_out.items()
    )
    return Section(
        "Features under a cache",
        "The last unit's output in a cached run beside the full run from the same noise: what its cosine similarity "
        "lacks to 1. The lower, the less harm; the cached run goes its own way, so errors add up." + left_out,
        listed(
            models,
            lambda m: (
                ", ".join(
                    f"{method} stays above {growth.feature_similarity.min():.4f}" for method, growth in m.growth.items()
                )
                or "no cache"
            ),
        ),
        (
            Lines(
                name="cached_similarity",
                title="Difference of the last unit's output, cached against full",
                x_label="timestep",
                y_label="1 - cosine similarity",
                series=series,
                log_y=True,
                reverse_x=True,
            ),
        ),
    )


def growth_section(models: Models, config: AnalyzeConfig) -> Section | None:
    figures, said = [], []
    for index, (name, measured) in enumerate(models.items()):
        series = {}
        for method, growth in measured.growth.items():
            # the run's first steps are full: there is no error yet
            series[f"{method}: measured"] = (measured.timesteps, blank_zeros(growth.measured.numpy()))
            series[f"{method}: bound"] = (measured.timesteps, blank_zeros(growth.predicted.numpy()))
            held = "holds" if holds(growth.measured, growth.predicted) else "is exceeded"
            said.append(
                f"{name} with {method} ends at {growth.measured[-1]:.4f}, the bound {held} and ends at "
                f"{growth.predicted[-1]:.3g}, the geometric form at {growth.geometric[-1]:.3g}"
            )
        if series:
            figures.append(
                Lines(
                    name=f"error_growth_{index + 1}",
                    title=f"{name}: error along the run",
                    x_label="timestep",
                    y_label="error / norm of the latents",
                    series=series,
                    log_y=True,
                    reverse_x=True,
                    dashed=frozenset(label for label in series if label.endswith("bound")),
                )
            )
    if not figures:
        return None
    return Section(
        "How errors grow",
        "Measured: the distance of the cached run's latents to those of the full run, relative. Bound: each step "
        "multiplies the error so far by at most L, the norm of that step's Jacobian (measured along the full run, the "
        "larger of two neighbours in between), and adds what its own reuse changes (measured on the cached run). It "
        "is a bound for small errors; where it lies far above, errors of different steps point different ways.",
        "; ".join(said)
        + ". "
        + listed(
            models, lambda m: f"L is {np.median(m.step_norms):.3f} in the median and {m.step_norms.max():.3f} at most"
        ),
        tuple(figures),
    )


def blank_zeros(values: NDArray, least: float = 1e-12) -> NDArray:
    """With gaps where there is nothing to see on a logarithmic scale."""
    return np.where(values > least, values, np.nan)


def jacobian_section(models: Models, config: AnalyzeConfig) -> Section:
    depth = max(measured.num_units for measured in models.values())
    first = next(iter(models.values()))
    timesteps = np.array(list(first.jacobians))
    whole = {
        f"{name}: {part}": (
            np.array(list(measured.jacobians)),
            np.array([getattr(profile, part.replace(" ", "_")) for profile in measured.jacobians.values()]),
        )
        for name, measured in models.items()
        for part in ("model", "first half", "second half")
    }
    panels = {
        name: padded(np.array([profile.units for profile in measured.jacobians.values()]).T, depth)
        for name, measured in models.items()
    }
    middle = list(first.jacobians)[len(first.jacobians) // 2]
    units: dict[str, tuple[NDArray, NDArray]] = {}
    for name, measured in models.items():
        profile = measured.jacobians[min(measured.jacobians, key=lambda timestep: abs(timestep - middle))]
        numbers = np.arange(measured.num_units)
        units |= {f"{name}: measured": (numbers, np.array(profile.units))}
        units |= {f"{name}: bound": (numbers, np.array(profile.bounds))}
    violated = sum(
        norm > bound * (1 + 1e-3)
        for measured in models.values()
        for profile in measured.jacobians.values()
        for norm, bound in zip(profile.units, profile.bounds, strict=True)
    )
    worst = max(max(p.errors.values()) for m in models.values() for p in m.jacobians.values())
    return Section(
        "How strongly a change is stretched",
        "The largest singular value of the Jacobian, found by products with it alone: of the whole model (latents to "
        "prediction), of each half and of each unit (hidden states to hidden states, the skips held). Above 1 a small "
        "change may grow, below 1 it shrinks. With long skips the second half also gets what the first hands over, "
        "which its own number does not count. The closed-form bound of a unit is a product of spectral norms of its "
        f"weights and slopes at this point. Relative residual of the worst pair found: {worst:.1e}.",
        listed(
            models,
            lambda m: (
                f"the model's norm goes from {min(norms_of(m, 'model')):.3g} to {max(norms_of(m, 'model')):.3g}, "
                f"the first half's geometric mean is {geometric_mean(norms_of(m, 'first_half')):.3g}, "
                f"the second half's {geometric_mean(norms_of(m, 'second_half')):.3g}, "
                f"a unit's {geometric_mean([n for p in m.jacobians.values() for n in p.units]):.3g}"
            ),
        )
        + f" The closed-form bound is violated {violated} times.",
        (
            Lines(
                name="jacobian_model",
                title="Jacobian norm of the model and its halves",
                x_label="timestep",
                y_label="largest singular value",
                series=whole,
                log_y=True,
                reverse_x=True,
            ),
            Heatmaps(
                name="jacobian_units",
                title="Jacobian norm of each unit",
                x_label="timestep",
                y_label="unit",
                color_label="largest singular value",
                x=timesteps,
                y=np.arange(depth),
                panels=panels,
                reverse_x=True,
                log_color=True,
            ),
            Lines(
                name="jacobian_bounds",
                title=f"Jacobian norm of each unit and its closed-form bound, timestep {middle:.0f}",
                x_label="unit",
                y_label="largest singular value",
                series=units,
                log_y=True,
                dashed=frozenset(label for label in units if label.endswith("bound")),
            ),
        ),
    )


def norms_of(measured: Measured, part: str) -> list[float]:
    """The Jacobian norms of the model or a half at all timesteps."""
    return [getattr(profile, part) for profile in measured.jacobians.values()]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(max(value, 1e-300)) for value in values) / len(values))


def surface_section(models: Models, config: AnalyzeConfig) -> Section:
    figures = []
    for moved, radius in (("weights", config.weight_radius), ("inputs", config.input_radius)):
        for timestep in config.surface_timesteps:
            figures.append(
                Surfaces(
                    name=f"surface_{moved}_{timestep}",
                    title=f"{moved.capitalize()} moved along two random directions, timestep {timestep}",
                    x_label="first direction",
                    y_label="second direction",
                    z_label="cosine similarity",
                    x=radius * config.coefficients,
                    y=radius * config.coefficients,
                    panels={name: measured.surfaces[moved, timestep] for name, measured in models.items()},
                )
            )
    return Section(
        "What a random push does",
        "The last unit's output after a push, beside the same without one: cosine similarity, 1 at the centre. Weights "
        "are pushed along two random directions whose every row has the norm of the weight's row (filter-normalised; "
        "biases and norms stay), latents along two whose norm is that of the latents. The flatter, the more stable.",
        listed(
            models,
            lambda m: ", ".join(
                f"{moved} at {timestep}: lowest {grid.min():.4f}" for (moved, timestep), grid in m.surfaces.items()
            ),
        ),
        tuple(figures),
    )


def spectra_section(models: Models, config: AnalyzeConfig) -> Section:
    figures: list[Plot] = []
    for index, (name, measured) in enumerate(models.items()):
        if measured.long_skips:
            targets = np.array(list(measured.long_skips))
            figures.append(
                Lines(
                    name=f"long_skip_norms_{index + 1}",
                    title=f"{name}: spectral norm of each long skip's projection",
                    x_label="target unit",
                    y_label="spectral norm",
                    series={
                        label: (targets, np.array([getattr(s, part)[0].item() for s in measured.long_skips.values()]))
                        for label, part in (
                            ("whole", "whole"),
                            ("half on the hidden states", "hidden"),
                            ("half on the skip", "skip"),
                        )
                    },
                )
            )
            figures.append(
                Lines(
                    name=f"long_skip_spectra_{index + 1}",
                    title=f"{name}: singular values of the long skips' projections",
                    x_label="number, largest first",
                    y_label="singular value",
                    series={
                        f"into unit {target}": (np.arange(1, len(s.whole) + 1), s.whole.numpy())
                        for target, s in measured.long_skips.items()
                    },
                    log_y=True,
                )
            )
    for index, (name, measured) in enumerate(models.items()):
        figures.append(
            Lines(
                name=f"layer_norms_{index + 1}",
                title=f"{name}: spectral norm of the layers of each unit",
                x_label="unit",
                y_label="spectral norm",
                series={
                    layer: (np.arange(measured.num_units), norms.numpy())
                    for layer, norms in measured.layer_norms.items()
                },
            )
        )
    return Section(
        "Weights",
        "Spectral norms and singular values. A long skip's projection has two halves: one acts on the hidden states "
        "that came through the depth, one on the skip.",
        listed(
            models,
            lambda m: (
                "no long skips"
                if not m.long_skips
                else "long-skip projections have norms "
                f"{min(projection_norms(m, 'whole')):.2f} to {max(projection_norms(m, 'whole')):.2f}; the half on the "
                f"skip {np.mean(projection_norms(m, 'skip')):.2f} on average, that on the hidden states "
                f"{np.mean(projection_norms(m, 'hidden')):.2f}"
            ),
        ),
        tuple(figures),
    )


def projection_norms(measured: Measured, part: str) -> list[float]:
    """The spectral norm of each long skip's projection, or of one of its halves."""
    return [getattr(spectrum, part)[0].item() for spectrum in measured.long_skips.values()]


def training_section(models: Models, config: AnalyzeConfig) -> Section | None:
    logs = {name: measured.log for name, measured in models.items() if measured.log is not None}
    if not logs:
        return None
    figures: list[Plot] = [
        Lines(
            name="training_loss",
            title="Training loss",
            x_label="step",
            y_label="loss, mean over a tenth of the run",
            series={name: smoothed(log.steps.numpy(), log.loss.numpy()) for name, log in logs.items()},
            log_y=True,
        )
    ]
    for index, (name, log) in enumerate(logs.items()):
        if log.unit_gradient_norms.shape[1]:
            figures.append(
                Lines(
                    name=f"gradient_norms_{index + 1}",
                    title=f"{name}: gradient norm of each unit over training",
                    x_label="step",
                    y_label="gradient norm",
                    series={
                        f"unit {unit}": smoothed(log.steps.numpy(), log.unit_gradient_norms[:, unit].numpy())
                        for unit in range(log.unit_gradient_norms.shape[1])
                    },
                    log_y=True,
                )
            )
    return Section(
        "Training",
        "From the run's log: the loss of single batches, and the norm of each unit's gradient before clipping.",
        "; ".join(
            f"{name}: loss {log.last_loss:.4f} over the last tenth of {log.steps[-1].item()} steps"
            for name, log in logs.items()
        )
        + ".",
        tuple(figures),
    )


def smoothed(steps: NDArray, values: NDArray) -> tuple[NDArray, NDArray]:
    """A running mean over a tenth of the points."""
    window = max(len(values) // 10, 1)
    kernel = np.ones(window) / window
    return np.convolve(steps, kernel, mode="valid"), np.convolve(values, kernel, mode="valid")


SECTIONS: tuple[Callable[[Models, AnalyzeConfig], Section | None], ...] = (
    caching_section,
    similarity_section,
    growth_section,
    jacobian_section,
    surface_section,
    spectra_section,
    training_section,
)
