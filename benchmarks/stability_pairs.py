"""Measures the stability of several trainings of each kind of model, and says what differs by more than chance.

    python benchmarks/stability_pairs.py --group plain runs/plain0 runs/plain1 runs/plain2 \\
        --group skip runs/skip0 runs/skip1 runs/skip2 --out runs/stability --report benchmarks

The models are class-to-image, for example `skipdit train stability --seed 0 --out runs/skip0` and `stability-plain`.
What is measured is that of `skipdit analyze`, one number per figure: similarity from step to step and under caches,
errors under caches, Jacobian norms, surfaces, norms of the long skips. A model that `--out` holds is not measured
again, and several calls may write into one folder at once. `--report` writes means and spreads over the models of each
group, and each group beside the first; of `--out` it needs `results.jsonl`.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from skipdit.analysis.config import AnalyzeConfig
from skipdit.analysis.measure import Measured, measure
from skipdit.analysis.sections import geometric_mean, holds, norms_of, projection_norms
from skipdit.analysis.weights import TrainingLog, find_training_log
from skipdit.environment import describe_environment, resolve_device
from skipdit.files.json_lines import append_line, read_lines
from skipdit.files.output import output_folder
from skipdit.loading import load_source
from skipdit.report import Report, listed, table

RESULTS = "results.jsonl"
METHODS = ("N2", "delta:N2", "N3", "delta:N3", "fora:N2", "skip-taylor:N4-800-100-o1")
MANY = 2.0  # standard errors, from which a difference is told


def figures_of(measured: Measured) -> dict[str, float]:
    """Return one number per figure of the report of `skipdit analyze`."""
    found: dict[str, float] = {} if measured.log is None else {"loss, last tenth": measured.log.last_loss}
    found |= {
        "step similarity, last unit, mean": float(measured.similarity[-1].mean()),
        "step similarity, last unit, lowest": float(measured.similarity[-1].min()),
        "step similarity, all units, mean": float(measured.similarity.mean()),
    }
    for method, growth in measured.growth.items():
        error = growth.measured[-1].item()
        found |= {
            f"{method}: lowest feature similarity": growth.feature_similarity.min().item(),
            f"{method}: dB at the end": -20 * math.log10(error) if error > 0 else math.inf,
            f"{method}: FLOPs saved": growth.compute_ratio,
            f"{method}: first-order bound held": float(holds(growth.measured, growth.predicted)),
        }
    for part in ("model", "first_half", "second_half"):
        found[f"Jacobian norm, {part.replace('_', ' ')}"] = geometric_mean(norms_of(measured, part))
    units = [norm for profile in measured.jacobians.values() for norm in profile.units]
    found["Jacobian norm, unit"] = geometric_mean(units)
    found["norm of a solver step, median"] = sorted(measured.step_norms.tolist())[len(measured.step_norms) // 2]
    for (moved, timestep), grid in measured.surfaces.items():
        found[f"{moved} perturbed at {timestep}, lowest similarity"] = float(grid.min())
    if measured.long_skips:
        norms = projection_norms(measured, "whole")
        found |= {"long skips, largest norm": max(norms), "long skips, mean norm": fmean(norms)}
    return found


def measure_missing(options: argparse.Namespace, config: AnalyzeConfig) -> None:
    """Measure every model that the results lack; each is a line when it is done."""
    options.out.mkdir(parents=True, exist_ok=True)
    done = {(each["group"], each["model"]) for each in read_lines(options.out / RESULTS)}
    device = resolve_device(options.device)
    for group, *paths in options.group:
        for path in paths:
            if (group, path) in done:
                continue
            print(f"{group}: {path}", flush=True)
            source = load_source(path, task="class-to-image", device=str(device), decodes=False)
            log = find_training_log(path)
            found = measure(source.sampler.pipeline, config, None if log is None else TrainingLog.read(log))
            line = {
                "group": group,
                "model": path,
                "parameters": found.num_parameters,
                "units": found.num_units,
                "figures": figures_of(found),
                "refused": dict(found.left_out),
                "config": asdict(config),
                "environment": describe_environment("cuda" if device.type == "cuda" else "cpu", config.seed),
            }
            append_line(options.out / RESULTS, line)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def shown(values: Sequence[float]) -> str:
    """Mean ± standard deviation, with four digits."""
    return f"{fmean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def difference(first: Sequence[float], other: Sequence[float]) -> str:
    """Return how far the means of two groups of trainings lie apart, in their standard errors; nothing of one model, or
    where there is no spread."""
    if min(len(first), len(other)) < 2:
        return ""
    error = math.sqrt(stdev(first) ** 2 / len(first) + stdev(other) ** 2 / len(other))
    return f"{(fmean(other) - fmean(first)) / error:+.1f}" if error and math.isfinite(error) else ""


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """One row per figure, one column per group, and each group's distance from the first."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for each in results:
        groups.setdefault(each["group"], []).append(each["figures"])
    names = list(dict.fromkeys(name for figures in groups.values() for each in figures for name in each))
    first, *others = groups
    rows = []
    for name in names:
        values = {group: [each[name] for each in figures if name in each] for group, figures in groups.items()}
        row: dict[str, object] = {"figure": name}
        row |= {group: shown(found) if found else "-" for group, found in values.items()}
        row |= {f"{group} from {first}, standard errors": difference(values[first], values[group]) for group in others}
        rows.append(row)
    return rows


def write_report(options: argparse.Namespace) -> None:
    """Write stability_pairs.md and .json. `SystemExit` where nothing, or not alike, was measured."""
    results = read_lines(options.out / RESULTS)
    if not results:
        raise SystemExit(f"stability_pairs.py: {options.out} holds no results")
    config = results[0]["config"]
    if any(each["config"] != config for each in results):
        raise SystemExit(f"stability_pairs.py: {options.out} holds results of several settings")
    groups = list(dict.fromkeys(each["group"] for each in results))
    counts = {group: [each for each in results if each["group"] == group] for group in groups}
    about = {
        group: f"{len(found)} trainings, {found[0]['units']} units, {found[0]['parameters'] / 1e6:.2f}M parameters"
        for group, found in counts.items()
    }
    refused = {f"{each['group']} refuses {name}": why for each in results for name, why in each["refused"].items()}
    facts = about | ({"trained": options.trained} if options.trained else {}) | refused
    explained = (
        "± is the standard deviation over trainings of several seeds. Standard errors: the difference of two means "
        f"over the standard error of that difference; of three trainings each, less than about {MANY:g} says nothing, "
        "and among so many figures a few exceed it by chance. dB at the end: signal over error of the cached run's "
        "result. Jacobian norms are geometric means over timesteps."
    )
    with output_folder(options.report, "bench") as out:
        report = Report(
            config=config,
            environment=results[-1]["environment"],
            data={"models": results},
            title="Stability of several trainings",
            parts=[listed(facts), explained, table(rows_of(results))],
        )
        report.write(out, "stability_pairs")
    print(f"written: {options.report / 'stability_pairs.md'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", nargs="+", action="append", default=[], help="a name, then the models of one kind")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="caches whose errors are measured")
    parser.add_argument("--num-pictures", type=int, default=8, help="pictures per run")
    parser.add_argument("--timesteps", type=int, default=4, help="at which Jacobians are measured")
    parser.add_argument("--surface-size", type=int, default=5, help="points per side of a surface; odd")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and the directions")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or auto")
    parser.add_argument("--trained", default="", help="how the models were trained, in words, for the report")
    parser.add_argument("--out", type=Path, default=Path("runs/stability"), help="folder of the results")
    parser.add_argument("--report", type=Path, default=None, help="folder of the table; none by default")
    options = parser.parse_args(arguments)
    if any(len(group) < 2 for group in options.group) or not (options.group or options.report):
        parser.error("give --group NAME MODEL..., or --report alone")
    config = AnalyzeConfig(
        num_pictures=options.num_pictures,
        methods=tuple(options.methods),
        jacobian_timesteps=options.timesteps,
        growth_timesteps=max(2, options.timesteps),
        surface_size=options.surface_size,
        seed=options.seed,
    )
    measure_missing(options, config)
    if options.report is not None:
        write_report(options)


if __name__ == "__main__":
    main()
