"""Sections of the stability report, one per measurement: an explanation, the models' numbers in words, and figures."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipdit.analysis.config import AnalyzeConfig
from skipdit.analysis.jacobian import JacobianProfile
from skipdit.analysis.measure import Measured, coefficients_of
from skipdit.interfaces import Fields
from skipdit.plots import Heatmaps, Lines, Plot, Surfaces

Models = Mapping[str, Measured]
Series = Mapping[str, tuple[NDArray, NDArray]]

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
    """Return the names of all figures that a report on this number of models can have."""
    surfaces = [f"surface_{quantity}_{at}" for quantity in ("weights", "inputs") for at in config.surface_timesteps]
    return [*SHARED, *surfaces, *(f"{name}_{index + 1}" for name in NUMBERED for index in range(num_models))]


@dataclass(frozen=True)
class Section:
    """A measurement in the report."""

    heading: str
    about: str
    """what the figures show and how it was measured"""
    result: str
    """the results of these models"""
    figures: tuple[Plot, ...]


def holds(measured: Any, predicted: Any) -> bool:
    """Return true if no measured error exceeds its bound by more than rounding."""
    return bool((measured <= predicted * (1 + 1e-4) + 1e-7).all())


def listed(models: Models, say: Callable[[Measured], str]) -> str:
    """Return a sentence with the results of every model, in the words of `say`."""
    return "; ".join(f"{name}: {say(measured)}" for name, measured in models.items()) + "."


def numbered(models: Models) -> Iterator[tuple[int, str, Measured]]:
    """Yield the number of each model, from 1, its name and its results."""
    for index, (name, measured) in enumerate(models.items(), start=1):
        yield index, name, measured


def curves(name: str, title: str, x_label: str, y_label: str, series: Series, *, log_y: bool = True) -> Lines:
    """Return a plot of curves. Timesteps decrease to the right; curves of a bound are dashed."""
    dashed = frozenset(label for label in series if label.endswith("bound"))
    return Lines(
        name=name,
        title=title,
        x_label=x_label,
        y_label=y_label,
        series=series,
        log_y=log_y,
        reverse_x=x_label == "timestep",
        dashed=dashed,
    )


def unit_map(name: str, title: str, color_label: str, timesteps: NDArray, values: Mapping[str, NDArray]) -> Heatmaps:
    """Return a panel per model of its values (num_units, steps); shallower models have gaps at the end."""
    depth = max(map(len, values.values()))
    panels = {
        model: np.concatenate([rows, np.full((depth - len(rows), rows.shape[1]), np.nan)])
        for model, rows in values.items()
    }
    axes: Fields = {"x_label": "timestep", "y_label": "unit", "x": timesteps, "y": np.arange(depth)}
    colors: Fields = {"color_label": color_label, "panels": panels, "reverse_x": True, "log_color": True}
    return Heatmaps(name=name, title=title, **axes, **colors)


def blank_zeros(values: NDArray, least: float = 1e-12) -> NDArray:
    """Return the values with gaps where they are too small for a logarithmic scale."""
    return np.where(values > least, values, np.nan)


# ----------------------------------------------------------------------------------------------------------------------
# Features


def similarity_section(models: Models, config: AnalyzeConfig) -> Section:
    timesteps = next(iter(models.values())).timesteps[1:]
    last = {name: (measured.timesteps[1:], measured.similarity[-1]) for name, measured in models.items()}

    title = "Similarity of the last unit's output to the step before"

    def say(m: Measured) -> str:
        worst_timestep = m.timesteps[1:][m.similarity[-1].argmin()]
        return (
            f"the last unit's similarity is {m.similarity[-1].mean():.4f} on average and "
            f"{m.similarity[-1].min():.4f} at worst (timestep {worst_timestep:.0f}); over all units the mean is "
            f"{m.similarity.mean():.4f}"
        )

    return Section(
        "How much features change from step to step",
        "Each unit's output is compared with its own output one denoising step before: cosine similarity over the "
        "channels of a token, averaged over tokens and pictures. 1 minus the similarity is the error of a cache that "
        "holds a feature for one step.",
        listed(models, say),
        (
            curves("similarity_last_unit", title, "timestep", "cosine similarity", last, log_y=False),
            unit_map(
                "similarity",
                "Change of each unit's output since the step before",
                "1 - cosine similarity",
                timesteps,
                {name: (1 - m.similarity).clip(1e-6) for name, m in models.items()},
            ),
        ),
    )


def caching_section(models: Models, config: AnalyzeConfig) -> Section | None:
    series = {
        f"{name}, {method}": (measured.timesteps, blank_zeros(1 - growth.feature_similarity.numpy(), 1e-6))
        for name, measured in models.items()
        for method, growth in measured.growth.items()
    }
    if not series:
        return None
    left_out = [
        f" {name} cannot use {method}: {why}." for name, m in models.items() for method, why in m.left_out.items()
    ]

    def say(m: Measured) -> str:
        minima = (f"{method} stays above {growth.feature_similarity.min():.4f}" for method, growth in m.growth.items())
        return ", ".join(minima) or "no cache"

    title = "Difference of the last unit's output, cached against full"
    return Section(
        "Features with a cache",
        "The last unit's output in a cached run is compared with that in the full run from the same noise: 1 minus "
        "their cosine similarity. Lower is better. The two runs drift apart, so errors add up." + "".join(left_out),
        listed(models, say),
        (curves("cached_similarity", title, "timestep", "1 - cosine similarity", series),),
    )


def growth_section(models: Models, config: AnalyzeConfig) -> Section | None:
    figures, sentences = [], []
    for number, name, measured in numbered(models):
        series = {}
        for method, growth in measured.growth.items():
            # there is no error yet in the first steps, which are full
            series[f"{method}: measured"] = (measured.timesteps, blank_zeros(growth.measured.numpy()))
            series[f"{method}: bound"] = (measured.timesteps, blank_zeros(growth.predicted.numpy()))
            verdict = "holds" if holds(growth.measured, growth.predicted) else "is exceeded"
            sentences.append(
                f"{name} with {method} ends at {growth.measured[-1]:.4f}, the bound {verdict} and ends at "
                f"{growth.predicted[-1]:.3g}, the geometric form at {growth.geometric[-1]:.3g}"
            )
        if series:
            title = f"{name}: error along the run"
            figures.append(curves(f"error_growth_{number}", title, "timestep", "error / norm of the latents", series))
    if not figures:
        return None
    norms = listed(
        models, lambda m: f"the median of L is {np.median(m.step_norms):.3f}, its maximum {m.step_norms.max():.3f}"
    )
    return Section(
        "How errors grow",
        "Measured: the relative distance of the cached run's latents from those of the full run. Bound: each step "
        "multiplies the error so far by at most L, the norm of that step's Jacobian (measured at some steps of the "
        "full run; steps in between take the larger of the two neighbors), and adds the error of its own reuse "
        "(measured on the cached run). It is a bound for small errors; where it is far too high, the errors of "
        "different steps point in different directions.",
        f"{'; '.join(sentences)}. {norms}",
        tuple(figures),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Jacobians and surfaces


def jacobian_section(models: Models, config: AnalyzeConfig) -> Section:
    first = next(iter(models.values()))
    violated = sum(
        norm > bound * (1 + 1e-3)
        for profile in profiles_of(models)
        for norm, bound in zip(profile.units, profile.bounds, strict=True)
    )
    worst = max(max(profile.errors.values()) for profile in profiles_of(models))

    def say(m: Measured) -> str:
        whole = norms_of(m, "model")
        unit_norms = [norm for profile in m.jacobians.values() for norm in profile.units]
        halves = [geometric_mean(norms_of(m, part)) for part in ("first_half", "second_half")]
        return (
            f"the model's norm is between {min(whole):.3g} and {max(whole):.3g}; geometric means are {halves[0]:.3g} "
            f"for the first half, {halves[1]:.3g} for the second half and {geometric_mean(unit_norms):.3g} for a unit"
        )

    return Section(
        "How strongly a small change is amplified",
        "The largest singular value of the Jacobian, computed from Jacobian-vector products, of the whole model "
        "(latents to prediction), of each half and of each unit (hidden states to hidden states, with the skips held "
        "constant). Above 1 a small change may grow, below 1 it shrinks. With long skips, the second half also "
        "receives the skips of the first, which its own norm does not include. The closed-form bound of a unit is a "
        "product of spectral norms of its weights and slopes at this point. Largest relative residual of a singular "
        f"pair: {worst:.1e}.",
        f"{listed(models, say)} The closed-form bound is violated {violated} times.",
        jacobian_figures(models, list(first.jacobians)),
    )


def jacobian_figures(models: Models, timesteps: list[float]) -> tuple[Plot, ...]:
    """Return the figures of the Jacobian norms. timesteps: those of the first model."""
    whole = {
        f"{name}: {part}": (np.array(list(measured.jacobians)), np.array(norms_of(measured, part.replace(" ", "_"))))
        for name, measured in models.items()
        for part in ("model", "first half", "second half")
    }
    middle = timesteps[len(timesteps) // 2]
    units: dict[str, tuple[NDArray, NDArray]] = {}
    for name, measured in models.items():
        profile = measured.jacobians[min(measured.jacobians, key=lambda timestep: abs(timestep - middle))]
        numbers = np.arange(measured.num_units)
        units |= {f"{name}: measured": (numbers, np.array(profile.units))}
        units |= {f"{name}: bound": (numbers, np.array(profile.bounds))}
    value = "largest singular value"
    return (
        curves("jacobian_model", "Jacobian norm of the model and its halves", "timestep", value, whole),
        unit_map(
            "jacobian_units",
            "Jacobian norm of each unit",
            value,
            np.array(timesteps),
            {name: np.array([profile.units for profile in m.jacobians.values()]).T for name, m in models.items()},
        ),
        curves(
            "jacobian_bounds",
            f"Jacobian norm of each unit and its closed-form bound, timestep {middle:.0f}",
            "unit",
            value,
            units,
        ),
    )


def profiles_of(models: Models) -> Iterator[JacobianProfile]:
    for measured in models.values():
        yield from measured.jacobians.values()


def norms_of(measured: Measured, part: str) -> list[float]:
    """Return the Jacobian norms of the model or a half at all timesteps."""
    return [getattr(profile, part) for profile in measured.jacobians.values()]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(max(value, 1e-300)) for value in values) / len(values))


def surface_section(models: Models, config: AnalyzeConfig) -> Section:
    figures = [
        Surfaces(
            name=f"surface_{quantity}_{timestep}",
            title=f"{quantity.capitalize()} perturbed along two random directions, timestep {timestep}",
            x_label="first direction",
            y_label="second direction",
            z_label="cosine similarity",
            x=radius * coefficients_of(config),
            y=radius * coefficients_of(config),
            panels={name: measured.surfaces[quantity, timestep] for name, measured in models.items()},
        )
        for quantity, radius in (("weights", config.weight_radius), ("inputs", config.input_radius))
        for timestep in config.surface_timesteps
    ]

    def say(m: Measured) -> str:
        return ", ".join(f"{quantity} at {at}: lowest {grid.min():.4f}" for (quantity, at), grid in m.surfaces.items())

    return Section(
        "Random perturbations",
        "Cosine similarity of the last unit's output with and without a perturbation, 1 at the center. Weights move "
        "along two random directions in which every row has the norm of the weight's row (filter-normalized; biases "
        "and norms stay), latents along two that have the norm of the latents. A flatter surface means a more stable "
        "model.",
        listed(models, say),
        tuple(figures),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Weights and training


def spectra_section(models: Models, config: AnalyzeConfig) -> Section:
    figures: list[Plot] = []
    parts = {"whole": "whole", "half on the hidden states": "hidden", "half on the skip": "skip"}
    for number, name, measured in numbered(models):
        if not measured.long_skips:
            continue
        targets = np.array(list(measured.long_skips))
        norms = {label: (targets, np.array(projection_norms(measured, part))) for label, part in parts.items()}
        spectra = {
            f"into unit {target}": (np.arange(1, len(spectrum.whole) + 1), spectrum.whole.numpy())
            for target, spectrum in measured.long_skips.items()
        }
        title = f"{name}: spectral norm of each long skip's projection"
        figures.append(curves(f"long_skip_norms_{number}", title, "target unit", "spectral norm", norms, log_y=False))
        title = f"{name}: singular values of the long skips' projections"
        x_label = "index, largest first"
        figures.append(curves(f"long_skip_spectra_{number}", title, x_label, "singular value", spectra))
    for number, name, measured in numbered(models):
        layers = {layer: (np.arange(len(norms)), norms.numpy()) for layer, norms in measured.layer_norms.items()}
        title = f"{name}: spectral norm of the layers of each unit"
        figures.append(curves(f"layer_norms_{number}", title, "unit", "spectral norm", layers, log_y=False))

    def say(m: Measured) -> str:
        if not m.long_skips:
            return "no long skips"
        whole, skip, hidden = (projection_norms(m, part) for part in ("whole", "skip", "hidden"))
        return (
            f"long-skip projections have norms from {min(whole):.2f} to {max(whole):.2f}; on average, the half on the "
            f"skip has {np.mean(skip):.2f} and that on the hidden states {np.mean(hidden):.2f}"
        )

    return Section(
        "Weights",
        "Spectral norms and singular values. A long skip's projection has two halves: one acts on the hidden states "
        "from the unit before, one on the skip.",
        listed(models, say),
        tuple(figures),
    )


def projection_norms(measured: Measured, part: str) -> list[float]:
    """Return the spectral norm of each long skip's projection, or of one of its halves."""
    return [getattr(spectrum, part)[0].item() for spectrum in measured.long_skips.values()]


def training_section(models: Models, config: AnalyzeConfig) -> Section | None:
    logs = {name: measured.log for name, measured in models.items() if measured.log is not None}
    if not logs:
        return None
    losses = {name: smoothed(log.steps.numpy(), log.loss.numpy()) for name, log in logs.items()}
    y_label = "loss, mean over a tenth of the run"
    figures: list[Plot] = [curves("training_loss", "Training loss", "step", y_label, losses)]
    for number, (name, log) in enumerate(logs.items(), start=1):
        norms = log.unit_gradient_norms
        if not norms.shape[1]:
            continue
        units = {f"unit {unit}": smoothed(log.steps.numpy(), norm.numpy()) for unit, norm in enumerate(norms.T)}
        title = f"{name}: gradient norm of each unit over training"
        figures.append(curves(f"gradient_norms_{number}", title, "step", "gradient norm", units))
    sentences = (
        f"{name}: loss {log.last_loss:.4f} over the last tenth of {log.steps[-1].item()} steps"
        for name, log in logs.items()
    )
    return Section(
        "Training",
        "From the training log: a running mean of the loss, and of the norm of each unit's gradient before clipping.",
        "; ".join(sentences) + ".",
        tuple(figures),
    )


def smoothed(steps: NDArray, values: NDArray) -> tuple[NDArray, NDArray]:
    """Return a running mean over a tenth of the points."""
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
