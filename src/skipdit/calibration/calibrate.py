"""`skipdit calibrate`: measures a model, writes the best schedules, and what they give beside what they must beat."""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
from rich.progress import Progress

from skipdit.cache.enable import cached
from skipdit.cache.fingerprint import fingerprint
from skipdit.cache.methods import CacheMethod, MadeFor, parse_method
from skipdit.cache.predictor import FittedPredictor
from skipdit.cache.runtime import FewerStepsWarning
from skipdit.cache.schedule import IntervalSchedule
from skipdit.cache.schedule_file import fields_of
from skipdit.cache.site import BranchOutputs
from skipdit.calibration.config import BY_THRESHOLD, KIN, CalibrateConfig
from skipdit.calibration.find import (
    Clock,
    Found,
    check_finite,
    explicit,
    find_by_kin,
    find_magnitudes,
    find_schedules,
    find_smooth,
    score,
)
from skipdit.calibration.trials import measure
from skipdit.environment import versions
from skipdit.files.output import OutputFolder
from skipdit.loading import Source
from skipdit.metrics.table import ALWAYS, Scores, score_cells
from skipdit.plots import Tradeoffs, check_plots_installed, save_png
from skipdit.report import Report, record, table
from skipdit.runs import OwnCache, Runner


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run on the held-out seed."""

    group: str
    """calibrated, rule of a kin, fixed interval, auto, or fewer steps"""
    name: str
    """of the schedule, or its spec"""
    steps_full: int
    compute_ratio: float
    """work of the full run over the work done"""
    scores: Scores
    """distances to the full run, over pictures or frames, by the name of the metric"""

    @property
    def point(self) -> tuple[float, float] | None:
        """Compute ratio and PSNR; `None` where that is not finite."""
        psnr = self.scores["psnr"].finite_mean
        return None if psnr is None else (self.compute_ratio, psnr)

    def cells(self) -> dict[str, object]:
        """Return the row of a table."""
        cells = {"group": self.group, "run": self.name, "full steps": self.steps_full}
        return cells | {"compute": f"{self.compute_ratio:.2f}"} | score_cells(self.scores, ALWAYS)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[], object]]:
    """Show a bar inside the block, and yield what moves it on by one."""
    with Progress() as bar:
        yield partial(bar.advance, bar.add_task(description, total=total))


@contextmanager
def told_once(kind: type[Warning]) -> Iterator[None]:
    """Show the first warning of a kind inside the block, and no other: of many runs alike each would warn."""
    with warnings.catch_warnings():
        show, told = warnings.showwarning, False

        def shown(message: Warning | str, category: type[Warning], *args: Any, **options: Any) -> None:
            nonlocal told
            if not (told and issubclass(category, kind)):
                show(message, category, *args, **options)
            told |= issubclass(category, kind)

        warnings.showwarning = shown
        yield


def factors_of(method: CacheMethod) -> list[list[float] | None]:
    """Return the fitted factors of each step, `None` for full ones; none where nothing was fitted."""
    predictor, schedule = method.predictor, explicit(method)
    if not isinstance(predictor, FittedPredictor):
        return []
    rows = dict(zip(predictor.timesteps, predictor.factors, strict=True))
    return [[round(factor, 4) for factor in rows[at]] if at in rows else None for at in schedule.timesteps]


def rounded(psnr: float) -> float | None:
    """Return `None` where nothing was predicted, or all pictures are equal."""
    return round(psnr, 2) if math.isfinite(psnr) else None


def to_fields(found: Found, config: CalibrateConfig, made_for: MadeFor) -> dict[str, Any]:
    """Return, as JSON, what `skipdit.cache.methods.load_schedule` reads, and where it is from."""
    schedule = explicit(found.method)
    common = {
        "num_inference_steps": schedule.num_inference_steps,
        "timesteps": schedule.timesteps,
        "made_for": asdict(made_for),
        "seeds": [config.seed],
        "num_samples": config.num_samples,
        "compute_ratio": round(found.compute_ratio, 4),
        "predicted_psnr_db": rounded(found.predicted_psnr_db),
        "measured_psnr_db": rounded(found.measured.mean),
        "versions": versions(),
    }
    if config.method == "smoothcache":
        parts = [
            {"kinds": cast(BranchOutputs, rule.site).kinds, "full_steps": explicit(rule).full_steps}
            for rule in found.method.rules
        ]
        return {"method": "smoothcache", "parts": parts} | common
    return {
        "method": config.method,
        "num_shallow_units": list(config.shallow_units),
        "order": found.method.predictor.order,
        "full_steps": schedule.full_steps,
        "variants": schedule.variants,
        "factors": factors_of(found.method),
        "errors": None if schedule.table is None else fields_of(schedule.table),
    } | common


# ----------------------------------------------------------------------------------------------------------------------
# The command


def claim(out: OutputFolder, config: CalibrateConfig) -> None:
    """Raise, before a model is loaded, where the plots' library is missing or a file of somebody else is in the way."""
    check_plots_installed("matplotlib")
    out.claim(("report.md", "report.json", "pareto.png", *(f"{target.name}.json" for target in config.targets)))


@told_once(FewerStepsWarning)
def calibrate(source: Source, config: CalibrateConfig, out: OutputFolder) -> list[Row]:
    """Write `{speedup}x.json` for each target, `report.md`, `report.json` and `pareto.png` into `out`.

    `ValueError` where the model lacks the site, all targets are out of reach, one of seconds needs no cache, a label or
    prompt is unknown, or what it samples is not finite.
    """
    claim(out, config)
    run, held_out_run = make_runner(source, config), make_runner(source, config, held_out=True)
    made_for = made_for_of(source.sampler.pipeline, config)
    own_rule, num_runs = config.method in BY_THRESHOLD, 1 + config.trials.num_probed
    clock = Clock.of(run, config.site) if config.needs_clock else None
    if clock is not None:
        clock.check(config.target_seconds)
    with progress("measuring", None if own_rule else config.num_inference_steps + num_runs) as advance:
        run = replace(run, advance=advance)
        if own_rule:
            found = find_smooth(config, run) if config.method == "smoothcache" else find_magnitudes(config, run)
        else:
            measured = measure(run, config.site, config.trials, advance=advance)
            check_finite(measured.reference)
            found = find_schedules(measured, config, run, clock) + find_by_kin(measured, config, run)
    for each in found:
        fields = to_fields(each, config, made_for)
        lines = [f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in fields.items()]
        out.write_text(f"{each.name}.json", "{\n" + ",\n".join(lines) + "\n}\n")
    with progress("checking", len(found) + 2 * len(config.rivals) + 1) as advance:
        rows = held_out(found, config, replace(held_out_run, advance=advance))
    report_of(rows, found, config, made_for).write(out, "report")
    if plot := draw(rows, config, made_for):
        save_png(plot, out)
    return rows


def make_runner(source: Source, config: CalibrateConfig, *, held_out: bool = False) -> Runner:
    """Return what runs the model on the calibration seed, or on the held-out one. `ValueError` on an unknown label or
    prompt."""
    num_samples = config.num_held_out if held_out else config.num_samples
    conditions, _ = source.choose({"labels": config.labels, "prompt": config.prompt}, num_samples)
    source.sampler.pipeline.set_progress_bar_config(disable=True)
    return Runner.of(
        source.sampler,
        conditions,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=config.held_out_seed if held_out else config.seed,
    )


def made_for_of(pipeline: Any, config: CalibrateConfig) -> MadeFor:
    """Return what a schedule must be used with. `ValueError` where the model lacks the site."""
    with cached(pipeline, CacheMethod(schedule=IntervalSchedule(interval=1), site=config.site)) as cache:
        num_units = cache.summary().num_units
    return MadeFor(
        model=type(pipeline.transformer).__name__,
        num_units=num_units,
        weights=fingerprint(pipeline.transformer),
        scheduler=type(pipeline.scheduler).__name__,
        guidance_scale=config.guidance_scale,
    )


def held_out(found: Sequence[Found], config: CalibrateConfig, run: Runner) -> list[Row]:
    """Return what schedules and rivals give on a seed that no schedule has seen."""
    rows, reference = [], run().samples

    def add(group: str, name: str, method: CacheMethod) -> None:
        made = run(OwnCache(method))
        counts = {"steps_full": int(made.steps[0]), "compute_ratio": made.compute_ratio}
        rows.append(Row(group=group, name=name, scores=score(made.samples, reference), **counts))

    for each in found:
        kin, _, name = each.name.partition("-")
        own = kin not in KIN
        add(f"calibrated {config.method}" if own else f"rule of {kin}", each.name if own else name, each.method)
    for spec in config.rivals:
        try:
            add("auto" if spec.startswith("auto") else "fixed interval", spec, parse_method(spec))
        except ValueError:  # this model lacks the site
            continue
    full = config.num_inference_steps
    for steps in sorted({max(1, math.ceil(full / row.compute_ratio)) for row in rows}, reverse=True):
        scores = score(run(num_inference_steps=steps).samples, reference)
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
    """Return the PSNR of a group at this compute ratio, linear between its finite rows; `None` outside of them."""
    points = points_of(rows)
    if not points or not points[0][0] <= compute_ratio <= points[-1][0]:
        return None
    return float(np.interp(compute_ratio, [ratio for ratio, _ in points], [psnr for _, psnr in points]))


def by_group(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {group: [row for row in rows if row.group == group] for group in dict.fromkeys(row.group for row in rows)}


def gains(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line per schedule: how far it is above each group of rivals at equal compute."""
    groups = by_group(rows)
    rivals: Mapping[str, list[Row]] = {name: own for name, own in groups.items() if not name.startswith("calibrated")}
    for row in (row for name, own in groups.items() if name not in rivals for row in own):
        parts = [
            f"{row.point[1] - there:+.1f} dB over {name}"
            for name, own in rivals.items()
            if row.point is not None and (there := at_compute(own, row.compute_ratio)) is not None
        ]
        yield f"- {row.name}, compute {row.compute_ratio:.2f}: {'; '.join(parts) or 'no rival at this compute'}."


def report_of(rows: Sequence[Row], found: Sequence[Found], config: CalibrateConfig, made_for: MadeFor) -> Report:
    missed = [name for name, *_ in config.targets if name not in {each.name for each in found}]
    return Report(
        config=config,
        data={"rows": [record(row) for row in rows], "made_for": made_for},
        parts=[
            f"`skipdit calibrate`, method {config.method}, {made_for.model} of {made_for.num_units} units, weights "
            f"{made_for.weights}, {made_for.scheduler}, {config.num_inference_steps} steps, guidance "
            f"{config.guidance_scale:g}; schedules found on {config.num_samples} samples of seed {config.seed}, rows "
            f"measured on {config.num_held_out} of seed {config.held_out_seed}. Distances to the full run. "
            + ", ".join(f"{name} {number}" for name, number in versions().items()),
            table([each.cells() for each in found]),
            f"Out of reach: {', '.join(missed)}." if missed else "",
            table([row.cells() for row in rows]),
            "\n".join(gains(rows)),
        ],
    )


def draw(rows: Sequence[Row], config: CalibrateConfig, made_for: MadeFor) -> Tradeoffs | None:
    """Return the figure of all groups; `None` where nothing is finite."""
    groups = by_group(rows)
    series = {
        name: (np.array([ratio for ratio, _ in points]), np.array([psnr for _, psnr in points]))
        for name, own in groups.items()
        if (points := points_of(own))
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
