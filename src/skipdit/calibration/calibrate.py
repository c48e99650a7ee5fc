"""`skipdit calibrate`: measures a model, writes the best schedules, and compares them with rivals on another seed."""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from skipdit.cache.enable import cached
from skipdit.cache.fingerprint import fingerprint
from skipdit.cache.methods import CacheMethod, MadeFor, parse_method
from skipdit.cache.runtime import FewerStepsWarning
from skipdit.cache.schedule import IntervalSchedule
from skipdit.cache.schedule_file import fields_of
from skipdit.calibration.config import BY_THRESHOLD, KIN, CalibrateConfig
from skipdit.calibration.find import (
    Candidate,
    Clock,
    check_finite,
    explicit,
    find_by_kin,
    find_by_threshold,
    find_schedules,
)
from skipdit.calibration.trials import measure
from skipdit.environment import versions
from skipdit.files.output import OutputFolder
from skipdit.interfaces import Fields, Pipeline
from skipdit.loading import Source
from skipdit.metrics.table import ALWAYS, Scores, score_cells
from skipdit.plots import Tradeoffs, check_plots_installed, save_png
from skipdit.report import Report, record, table
from skipdit.runs import OwnCache, Runner
from skipdit.terminal import counting


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run on the held-out seed."""

    group: str
    """calibrated, rule of another method, fixed interval, auto, or fewer steps"""
    name: str
    """name of the schedule, or a spec"""
    steps_full: int
    """number of full steps"""
    compute_ratio: float
    """cost of the full run divided by that of this run"""
    scores: Scores
    """distances to the full run, over pictures or frames, by the name of the metric"""

    @property
    def point(self) -> tuple[float, float] | None:
        """Return the compute ratio and the PSNR; `None` if the PSNR is not finite."""
        psnr = self.scores["psnr"].finite_mean
        return None if psnr is None else (self.compute_ratio, psnr)

    def cells(self) -> dict[str, object]:
        """Return the row of a table."""
        cells = {"group": self.group, "run": self.name, "full steps": self.steps_full}
        return cells | {"compute": f"{self.compute_ratio:.2f}"} | score_cells(self.scores, ALWAYS)


@contextmanager
def warned_once(kind: type[Warning]) -> Iterator[None]:
    """Show only the first warning of a kind inside the block, as each of many similar runs would repeat it."""
    with warnings.catch_warnings():
        show, has_warned = warnings.showwarning, False

        def show_first(message: Warning | str, category: type[Warning], *args: Any, **options: Any) -> None:
            nonlocal has_warned
            if not (has_warned and issubclass(category, kind)):
                show(message, category, *args, **options)
            has_warned |= issubclass(category, kind)

        warnings.showwarning = show_first
        yield


def factors_of(method: CacheMethod) -> list[list[float] | None]:
    """Return the fitted factors of each step, `None` for full steps; empty if nothing was fitted."""
    rows = method.predictor.fitted_factors
    if not rows:
        return []
    return [[round(factor, 4) for factor in rows[at]] if at in rows else None for at in explicit(method).timesteps]


def rounded(psnr: float) -> float | None:
    """Return a PSNR with two digits; `None` if nothing was predicted, or if all pictures are equal."""
    return round(psnr, 2) if math.isfinite(psnr) else None


def to_fields(candidate: Candidate, config: CalibrateConfig, made_for: MadeFor) -> Fields:
    """Return the JSON that `skipdit.cache.methods.load_schedule` reads, with its origin."""
    schedule = explicit(candidate.method)
    common = {
        "num_inference_steps": schedule.num_inference_steps,
        "timesteps": schedule.timesteps,
        "made_for": asdict(made_for),
        "seeds": [config.seed],
        "num_samples": config.num_samples,
        "compute_ratio": round(candidate.compute_ratio, 4),
        "predicted_psnr_db": rounded(candidate.predicted_psnr_db),
        "measured_psnr_db": rounded(candidate.measured.mean),
        "versions": versions(),
    }
    if config.method == "smoothcache":
        parts = [{"kinds": rule.site.kinds, "full_steps": explicit(rule).full_steps} for rule in candidate.method.rules]
        return {"method": "smoothcache", "parts": parts} | common
    return {
        "method": config.method,
        "num_shallow_units": list(config.shallow_units),
        "order": candidate.method.predictor.order,
        "full_steps": schedule.full_steps,
        "variants": schedule.variants,
        "factors": factors_of(candidate.method),
        "damping": candidate.damping,
        "errors": None if schedule.table is None else fields_of(schedule.table),
    } | common


# ----------------------------------------------------------------------------------------------------------------------
# The command


def claim(out: OutputFolder, config: CalibrateConfig) -> None:
    """Raise, before a model is loaded, if the plotting library is missing (`ValueError`) or a file that skipdit did not
    write is in the way (`FileExistsError`)."""
    check_plots_installed("matplotlib")
    out.claim(("report.md", "report.json", "pareto.png", *(f"{target.name}.json" for target in config.targets)))


@warned_once(FewerStepsWarning)
def calibrate(source: Source, config: CalibrateConfig, out: OutputFolder) -> list[Row]:
    """Write a schedule (`{target}.json`) for each target, `report.md`, `report.json` and `pareto.png` into `out`;
    return the rows of the report.

    Raises `ValueError` if the model lacks the site or samples pixels that are not finite, if all targets are out of
    reach or a target of seconds needs no cache, or if a label or prompt is unknown.
    """
    claim(out, config)
    config = source.complete(config)
    run, held_out_run = make_runner(source, config), make_runner(source, config, held_out=True)
    made_for = made_for_of(source.sampler.pipeline, config)
    has_threshold, num_runs = config.method in BY_THRESHOLD, 1 + config.trials.num_probed
    clock = Clock.of(run, config.site) if config.needs_clock else None
    if clock is not None:
        clock.check(config.target_seconds)
    with counting("measuring", None if has_threshold else run.num_inference_steps + num_runs) as advance:
        run = replace(run, advance=advance)
        if has_threshold:
            candidates = find_by_threshold(config, run)
        else:
            measurement = measure(run, config.site, config.trials, advance=advance)
            check_finite(measurement.reference)
            candidates = find_schedules(measurement, config, run, clock) + find_by_kin(measurement, config, run)
    for candidate in candidates:
        fields = to_fields(candidate, config, made_for)
        lines = [f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in fields.items()]
        out.write_text(f"{candidate.name}.json", "{\n" + ",\n".join(lines) + "\n}\n")
    with counting("checking", len(candidates) + 2 * len(config.rivals) + 1) as advance:
        rows = held_out(candidates, config, replace(held_out_run, advance=advance))
    report_of(rows, candidates, config, made_for).write(out, "report")
    if plot := draw(rows, config, made_for):
        save_png(plot, out)
    return rows


def make_runner(source: Source, config: CalibrateConfig, *, held_out: bool = False) -> Runner:
    """Return the runner of the model on the calibration seed, or on the held-out seed. Raises `ValueError` if a label
    or prompt is unknown."""
    num_samples = config.num_held_out if held_out else config.num_samples
    conditions, _ = source.choose({"labels": config.labels, "prompt": config.prompt}, num_samples)
    source.sampler.pipeline.set_progress_bar_config(disable=True)
    config = source.complete(config)
    return Runner.of(
        source.sampler,
        conditions,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=config.held_out_seed if held_out else config.seed,
    )


def made_for_of(pipeline: Pipeline, config: CalibrateConfig) -> MadeFor:
    """Return the model and settings that the schedules are made for. Raises `ValueError` if the model lacks the
    site."""
    with cached(pipeline, CacheMethod(schedule=IntervalSchedule(interval=1), site=config.site)) as cache:
        num_units = cache.summary().num_units
    return MadeFor(
        model=type(pipeline.transformer).__name__,
        num_units=num_units,
        weights=fingerprint(pipeline.transformer),
        scheduler=type(pipeline.scheduler).__name__,
        guidance_scale=config.guidance_scale,
    )


def held_out(candidates: Sequence[Candidate], config: CalibrateConfig, run: Runner) -> list[Row]:
    """Return the rows of schedules and rivals on a seed that no schedule has seen."""
    rows, reference = [], run().samples

    def add(group: str, name: str, method: CacheMethod) -> None:
        sampled = run(OwnCache(method))
        counts = {"steps_full": int(sampled.steps[0]), "compute_ratio": sampled.compute_ratio}
        rows.append(Row(group=group, name=name, scores=sampled.scores(reference), **counts))

    for candidate in candidates:
        rule, _, target = candidate.name.partition("-")
        if rule in KIN:
            add(f"rule of {rule}", target, candidate.method)
        else:
            add(f"calibrated {config.method}", candidate.name, candidate.method)
    for spec in config.rivals:
        try:
            add("auto" if spec.startswith("auto") else "fixed interval", spec, parse_method(spec))
        except ValueError:  # this model lacks the site
            continue
    full = run.num_inference_steps
    for steps in sorted({max(1, math.ceil(full / row.compute_ratio)) for row in rows}, reverse=True):
        scores = run(num_inference_steps=steps).scores(reference)
        rows.append(
            Row(group="fewer steps", name=f"{steps} steps", steps_full=steps, compute_ratio=full / steps, scores=scores)
        )
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The report


def points_of(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return compute ratios and PSNRs of the rows that have a finite one, sorted."""
    return sorted(row.point for row in rows if row.point is not None)


def at_compute(rows: Sequence[Row], compute_ratio: float) -> float | None:
    """Return the PSNR of a group at this compute ratio, linear between its finite rows; `None` outside them."""
    points = points_of(rows)
    if not points or not points[0][0] <= compute_ratio <= points[-1][0]:
        return None
    return float(np.interp(compute_ratio, [ratio for ratio, _ in points], [psnr for _, psnr in points]))


def by_group(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {group: [row for row in rows if row.group == group] for group in dict.fromkeys(row.group for row in rows)}


def gains(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line per schedule with its gain over each group of rivals at equal compute."""
    groups = by_group(rows)
    rivals = {name: group for name, group in groups.items() if not name.startswith("calibrated")}
    for row in (row for name, group in groups.items() if name not in rivals for row in group):
        parts = [
            f"{row.point[1] - psnr:+.1f} dB over {name}"
            for name, group in rivals.items()
            if row.point is not None and (psnr := at_compute(group, row.compute_ratio)) is not None
        ]
        yield f"- {row.name}, compute {row.compute_ratio:.2f}: {'; '.join(parts) or 'no rival at this compute'}."


def report_of(
    rows: Sequence[Row], candidates: Sequence[Candidate], config: CalibrateConfig, made_for: MadeFor
) -> Report:
    guidance = "of its own" if config.guidance_scale is None else f"{config.guidance_scale:g}"
    units = f" of {made_for.num_units} units" if made_for.num_units else ""
    missed = [name for name, *_ in config.targets if name not in {candidate.name for candidate in candidates}]
    return Report(
        config=config,
        data={"rows": [record(row) for row in rows], "made_for": made_for},
        parts=[
            f"`skipdit calibrate`, method {config.method}, {made_for.model}{units}, "
            f"weights {made_for.weights}, {made_for.scheduler}, {config.num_inference_steps} steps, guidance "
            f"{guidance}; schedules found on {config.num_samples} samples of seed {config.seed}, rows "
            f"measured on {config.num_held_out} of seed {config.held_out_seed}. Distances to the full run. "
            + ", ".join(f"{name} {number}" for name, number in versions().items()),
            table([candidate.cells() for candidate in candidates]),
            f"Out of reach: {', '.join(missed)}." if missed else "",
            table([row.cells() for row in rows]),
            "\n".join(gains(rows)),
        ],
    )


def draw(rows: Sequence[Row], config: CalibrateConfig, made_for: MadeFor) -> Tradeoffs | None:
    """Return the figure of all groups; `None` if nothing is finite."""
    groups = by_group(rows)
    series = {
        name: (np.array([ratio for ratio, _ in points]), np.array([psnr for _, psnr in points]))
        for name, group in groups.items()
        if (points := points_of(group))
    }
    if not series:
        return None
    return Tradeoffs(
        name="pareto",
        title=f"{made_for.model}, {config.num_inference_steps} steps, held-out seed",
        x_label="compute ratio",
        y_label="PSNR to the full run, dB",
        series=series,
        emphasized=frozenset(name for name in groups if name.startswith("calibrated")),
        dashed=frozenset({"fewer steps"}),
    )
