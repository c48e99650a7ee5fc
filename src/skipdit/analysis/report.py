"""The stability report: figures, and a page that explains them in plain words."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from skipdit.analysis.config import AnalyzeConfig
from skipdit.analysis.measure import Measured, measure, num_parts, runner_of
from skipdit.analysis.sections import SECTIONS, Models, Section, figure_names, geometric_mean, holds, norms_of
from skipdit.analysis.weights import TrainingLog
from skipdit.files.output import OutputFolder
from skipdit.files.untrusted import printable
from skipdit.interfaces import Fields
from skipdit.pipelines import ClassToImagePipeline
from skipdit.plots import check_plots_installed, render_html, save_png
from skipdit.report import Report, table
from skipdit.terminal import progress_bar

FILES = ("report.md", "report.html", "report.json", "arrays.npz")


def claim(out: OutputFolder, config: AnalyzeConfig, num_models: int) -> None:
    """Raise, before a model is loaded, if a plotting library is missing (`ValueError`) or a file that skipdit did not
    write is in the way (`FileExistsError`)."""
    check_plots_installed()
    out.claim((*FILES, *(f"{name}.png" for name in figure_names(config, num_models))))


def check_weights(name: str, pipeline: ClassToImagePipeline) -> None:
    """Raise `ValueError` if a weight is not finite, as nothing can be measured on such a model."""
    for key, weight in pipeline.transformer.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"the weights of {printable(name)} are not finite: {printable(key)}")


def analyze(
    pipelines: Mapping[str, ClassToImagePipeline],
    config: AnalyzeConfig,
    out: OutputFolder,
    logs: Mapping[str, TrainingLog] | None = None,
) -> Models:
    """Measure one or more models and write `report.md`, `report.html`, `report.json`, `arrays.npz` and one PNG per
    figure into `out`. pipelines: by the names that the report uses. Figures of an earlier report are removed.

    Raises `ValueError` if a model lacks one of the labels, if its weights or samples are not finite, or if the plotting
    libraries are missing; `FileExistsError` if files that skipdit did not write are in the way.
    """
    claim(out, config, len(pipelines))
    for name, pipeline in pipelines.items():
        check_weights(name, pipeline)
        runner_of(config, pipeline)
    total = sum(num_parts(config, len(pipeline.transformer.blocks)) for pipeline in pipelines.values())
    with progress_bar() as progress:
        task = progress.add_task("", total=total)
        models = {}
        for name, pipeline in pipelines.items():
            progress.update(task, description=name)
            models[name] = measure(pipeline, config, (logs or {}).get(name), lambda: progress.advance(task))
        progress.update(task, completed=total, description="drawing")
        write_report(models, config, out)
    return models


def write_report(models: Models, config: AnalyzeConfig, out: OutputFolder) -> None:
    """Write all files of `analyze`, given its measurements."""
    sections = [section for make in SECTIONS if (section := make(models, config)) is not None]
    for section in sections:
        for figure in section.figures:
            save_png(figure, out)
    arrays = {
        f"{model}/{name}": array for model, measured in models.items() for name, array in measured.arrays().items()
    }
    with out.file("arrays.npz") as draft, draft.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    html_sections = [
        (section.heading, f"{section.about} {section.result}", figure)
        for section in sections
        for figure in section.figures
    ]
    out.write_text("report.html", render_html(f"Stability of {' and '.join(models)}", html_sections))
    report_of(models, config, sections).write(out, "report")
    out.remove_earlier()


def summarise(measured: Measured) -> Fields:
    """Return the numbers that the page states, for the JSON."""
    return {
        "num_parameters": measured.num_parameters,
        "num_units": measured.num_units,
        "num_long_skips": measured.num_pairs,
        "similarity_of_last_unit": {
            "mean": float(measured.similarity[-1].mean()),
            "least": float(measured.similarity[-1].min()),
        },
        "jacobian": {
            f"{timestep:g}": {
                "model": profile.model,
                "first_half": profile.first_half,
                "second_half": profile.second_half,
                "largest_unit": max(profile.units),
                "errors": profile.errors,
            }
            for timestep, profile in measured.jacobians.items()
        },
        "solver_step_norms": measured.step_norms.tolist(),
        "caches": {
            method: {
                "error_at_the_end": growth.measured[-1].item(),
                "compute_ratio": growth.compute_ratio,
                "predicted_at_the_end": growth.predicted[-1].item(),
                "least_feature_similarity": growth.feature_similarity.min().item(),
                "bound_held": holds(growth.measured, growth.predicted),
            }
            for method, growth in measured.growth.items()
        },
        "caches_left_out": dict(measured.left_out),
        "surface_least": {
            f"{quantity} {timestep}": float(grid.min()) for (quantity, timestep), grid in measured.surfaces.items()
        },
        "long_skip_norms": {
            str(target): {part: values[0].item() for part, values in vars(spectrum).items()}
            for target, spectrum in measured.long_skips.items()
        },
    }


def cells(name: str, measured: Measured, methods: Sequence[str]) -> dict[str, object]:
    """Return a model's row of the table, which sums up the sections."""
    norms = [geometric_mean(norms_of(measured, part)) for part in ("model", "first_half", "second_half")]
    units = geometric_mean([norm for profile in measured.jacobians.values() for norm in profile.units])
    lowest = min(grid.min() for (quantity, _), grid in measured.surfaces.items() if quantity == "weights")
    jacobians = ("Jacobian of model", "first half", "second half", "unit")
    return {
        "model": name,
        "units": measured.num_units,
        "long skips": measured.num_pairs or "none",
        "parameters": f"{measured.num_parameters / 1e6:.2f} M",
        "loss": "-" if measured.log is None else f"{measured.log.last_loss:.4f}",
        **{title: f"{norm:.3g}" for title, norm in zip(jacobians, (*norms, units), strict=True)},
        "weights perturbed": f"{lowest:.4f}",
        **{f"cached `{method}`": cached_cell(measured, method) for method in methods},
    }


def cached_cell(measured: Measured, method: str) -> str:
    """Return the error and compute ratio as `"40.1 dB (1.71x)"`, or a dash if the model cannot use the method."""
    growth = measured.growth.get(method)
    if growth is None:
        return "-"
    error = growth.measured[-1].item()
    if not math.isfinite(error):
        return "not finite"
    decibel = f"{-20 * math.log10(error):.1f} dB" if error > 0 else "equal"
    return f"{decibel} ({growth.compute_ratio:.2f}x)"


def report_of(models: Models, config: AnalyzeConfig, sections: Sequence[Section]) -> Report:
    methods = list(dict.fromkeys(method for measured in models.values() for method in measured.growth))
    parts = [
        table([cells(name, measured, methods) for name, measured in models.items()]),
        "Loss: mean over the last tenth of the training log. Jacobian norms: geometric mean over timesteps, and over "
        "all units of a model. Weights perturbed: lowest similarity of the last unit's output. Cached: "
        "signal-to-error ratio of the cached run's result against the full run's; in brackets, the speedup by FLOPs.",
        f"{len(config.labels) or config.num_pictures} pictures, {config.num_inference_steps} deterministic first-order "
        f"steps, guidance {config.guidance_scale:g}, seed {config.seed}. A *unit* is a block; unit 0 comes first. "
        "*Timesteps* decrease from 1000 (noise) to 0 (picture), so time runs to the right. The numbers are in "
        "`arrays.npz` and `report.json`; `report.html` has the same figures, interactive.",
    ]
    for section in sections:
        images = "\n\n".join(f"![{figure.title}]({figure.name}.png)" for figure in section.figures)
        parts += [f"## {section.heading}", section.about, f"**Result.** {section.result}", images]
    return Report(
        title=f"Stability of {' and '.join(models)}",
        config=config,
        data={"models": {name: summarise(measured) for name, measured in models.items()}},
        parts=parts,
    )
