"""`skipdit calibrate`: measures a model, writes the best schedules, and what they give beside what they must beat."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
from rich.progress import Progress
from torch import Tensor

from skipdit.cache.enable import cached
from skipdit.cache.fingerprint import fingerprint
from skipdit.cache.methods import EVERY, METHODS, CacheMethod, MadeFor, parse_method
from skipdit.cache.predictor import FittedPredictor
from skipdit.cache.schedule import AutoSchedule, ExplicitSchedule, IntervalSchedule, resolve
from skipdit.cache.site import BranchOutputs, Site
from skipdit.calibration.plan import PlannedSchedule, choose, plan
from skipdit.calibration.search import Search, Variants
from skipdit.calibration.trials import Measured, Trials, measure, smooth_errors, smooth_schedule
from skipdit.environment import versions
from skipdit.files.output import OutputFolder
from skipdit.loading import Source
from skipdit.metrics.paired import PairedScore
from skipdit.metrics.table import ALWAYS, Scores, score_cells, score_pictures
from skipdit.options import NumInferenceSteps, check_numbers, check_option, check_range
from skipdit.plots import Tradeoffs, check_plots_installed, save_png
from skipdit.report import Report, record, table
from skipdit.runs import OwnCache, Runner

COHERENCES = (0.5, 1.0)  # tried for a search, see there
WITH_SITE = tuple(name for name, row in METHODS.items() if row.site is not None)


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What `skipdit calibrate` does."""

    method: str = "skip-taylor"
    """a row of the cache methods with one site (skip-taylor, delta-taylor, taylorseer, ...), or smoothcache"""
    shallow_units: tuple[int, ...] = (1,)
    """numbers of fresh units at each end among which a schedule may choose"""
    speedups: tuple[float, ...] = (1.5, 1.8, 2.0, 2.5, 3.0)
    """by compute; a schedule is written for each"""
    psnr_db: tuple[float, ...] = ()
    """least predicted PSNR; a schedule is written for each"""
    labels: tuple[str, ...] = ()
    """class names or numbers, repeated in turn; by default as of skipdit sample"""
    prompt: tuple[str, ...] = ()
    """texts, repeated in turn, for the text tasks"""
    num_samples: int = 4
    """pictures or clips of each run"""
    num_held_out: int = 8
    """pictures or clips of each run of the report"""
    num_inference_steps: NumInferenceSteps = 50
    """denoising steps of a run, for which the schedules are made"""
    guidance_scale: float = 2.0
    """strength of classifier-free guidance; none at 1"""
    seed: int = 0
    """of the runs that schedules are found on"""
    held_out_seed: int = 1000
    """of what the report measures"""
    trials: Trials = Trials()  # noqa: RUF009 (frozen)
    """what is tried at each step"""
    fits: bool = True
    """give each reuse step's prediction factors that fit what was measured; otherwise they are Taylor's"""
    refine: int = 0
    """exchanges of single steps that are tried on each schedule afterwards, each a cached run"""
    rivals: tuple[str, ...] = (
        *(f"skip-taylor:{schedule}" for schedule in ("N2", "N3", "N4", "N5", "N4-800-100")),
        *(f"auto:{speedup}" for speedup in ("1.5", "1.8", "2", "2.5", "3")),
    )
    """fixed specs that the report shows beside"""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_option(self, "method", (*WITH_SITE, "smoothcache"))
        check_range(self, "num_samples", "num_held_out", "num_inference_steps")
        check_range(self, "refine", least=0)
        if not self.speedups and not self.psnr_db:
            raise ValueError("give at least one of speedups and psnr_db")
        if any(not speedup > 1 for speedup in self.speedups):
            raise ValueError(f"speedups must be above 1, got {self.speedups}")
        if self.seed == self.held_out_seed:
            raise ValueError(f"held_out_seed must differ from seed, got {self.seed} for both")
        known = self.site.shallow_units
        if self.shallow_units not in (known, type(self).shallow_units):
            raise ValueError(
                f"shallow_units of {self.method} must be "
                f"{'one number' if known else 'left out, as all units run'}, got {self.shallow_units}"
            )
        for spec in self.rivals:
            parse_method(spec)

    @property
    def site(self) -> Site:
        make = METHODS[self.method].site
        return BranchOutputs(EVERY) if make is None else make(self.shallow_units)

    @property
    def targets(self) -> dict[str, dict[str, float]]:
        """What `choose` is asked for, by the name of the schedule."""
        speedups = {f"{speedup:g}x": {"speedup": speedup} for speedup in self.speedups}
        return speedups | {f"{decibel:g}dB": {"psnr_db": decibel} for decibel in self.psnr_db}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run on the held-out seed."""

    group: str
    """calibrated, fixed interval, auto, or fewer steps"""
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


def frames_of(samples: Tensor) -> Tensor:
    return samples.flatten(0, -4)


def score(samples: Tensor, reference: Tensor) -> Scores:
    return score_pictures(frames_of(samples), frames_of(reference))


def check_finite(reference: Tensor) -> None:
    """Raise `ValueError` where nothing can be measured by what a full run sampled."""
    if not reference.isfinite().all():
        raise ValueError("the model samples NaN or infinite pixels without a cache: there is nothing to calibrate")


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[], object]]:
    """Show a bar inside the block, and yield what moves it on by one."""
    with Progress() as bar:
        yield partial(bar.advance, bar.add_task(description, total=total))


# ----------------------------------------------------------------------------------------------------------------------
# Schedules


@dataclass(frozen=True, kw_only=True)
class Found:
    """A schedule, and what was predicted and measured of it."""

    name: str
    """what was asked for, as the name of its file"""
    method: CacheMethod
    compute_ratio: float
    """work of the full run over the work done"""
    predicted_psnr_db: float
    """NaN where nothing was predicted"""
    measured: PairedScore
    """PSNR on the calibration seed"""

    @property
    def is_whole(self) -> bool:
        """True if no sample is NaN or infinite."""
        return not self.measured.num_broken

    @classmethod
    def on_seed(cls, name: str, method: CacheMethod, reference: Tensor, run: Runner, predicted: float) -> "Found":
        """Return what a schedule gives in a run on the calibration seed. reference: the samples of the full run."""
        made = run(OwnCache(method))
        return cls(
            name=name,
            method=method,
            compute_ratio=made.compute_ratio,
            predicted_psnr_db=predicted,
            measured=score(made.samples, reference)["psnr"],
        )

    def cells(self) -> dict[str, object]:
        """Return the row of a table."""
        return {
            "schedule": self.name,
            "order": self.method.predictor.order,
            "full steps": self.method.schedule,
            "compute": f"{self.compute_ratio:.2f}",
            "predicted dB": "" if math.isnan(self.predicted_psnr_db) else f"{self.predicted_psnr_db:.1f}",
            "on the calibration seed dB": self.measured.text(1),
        }


def find_schedules(measured: Measured, config: CalibrateConfig, run: Runner) -> list[Found]:
    """Return a schedule for each target: the best, by what the calibration seed gives, of those that the searches find
    for each order and both ways in which errors may add up.

    Of a target out of reach there is none; `ValueError` if all are.
    """
    searches = [
        Search(measured, order, coherence, fits=config.fits)
        for order in config.trials.orders
        for coherence in COHERENCES
    ]
    fronts = [plan(search.errors(), coherence=search.coherence) for search in searches]
    found, reason = [], "nothing can be reused so well"
    for name, target in config.targets.items():
        planned: dict[tuple[int, Variants], Search] = {}
        for search in searches:
            try:
                variants = search_for(search, fronts, **target)
            except ValueError as error:
                reason = str(error)
                continue
            if search.cost(variants) < 1:
                planned.setdefault((search.order, variants), search)
        candidates = [tried_on_seed(name, search, variants, run) for (_, variants), search in planned.items()]
        whole = [(each, search) for each, search in zip(candidates, planned.values(), strict=True) if each.is_whole]
        if whole:
            best, search = max(whole, key=lambda pair: pair[0].measured.rank)
            found.append(refine(best, search, config.refine, run, config.seed))
    if not found:
        raise ValueError(f"no target is within reach: {reason}")
    return found


def search_for(
    search: Search,
    fronts: Sequence[Sequence[PlannedSchedule]],
    *,
    speedup: float | None = None,
    psnr_db: float | None = None,
) -> Variants:
    """Return the best schedule of a search that is at least so fast, or the cheapest of at least this predicted PSNR.

    fronts: planned schedules to start from. `ValueError` where the target is out of reach.
    """
    if speedup is None:
        low, high = 1.0, max(schedule.speedup for front in fronts for schedule in front)
        best = search_for(search, fronts, speedup=low)
        for _ in range(8):
            middle = (low + high) / 2
            tried = search_for(search, fronts, speedup=middle)
            reached = search.psnr_db(tried) >= cast(float, psnr_db)
            low, high, best = (middle, high, tried) if reached else (low, middle, best)
        if search.cost(best) == 1:
            raise ValueError(f"no schedule is predicted to give {psnr_db} dB")
        return best
    full = by_rule(search.measured, speedup)
    starts = [tuple(None if is_full else 0 for is_full in full)] if full else []
    for front in fronts:
        try:
            starts.append(choose(front, speedup=speedup).variants)
        except ValueError:  # costs on a front are rounded up
            if not starts:
                raise
    return min((search.improve(start, speedup) for start in dict.fromkeys(starts)), key=search.error)


def tried_on_seed(name: str, search: Search, variants: Variants, run: Runner) -> Found:
    """Return what a schedule that was searched for gives in a run on the calibration seed."""
    reference = search.measured.reference
    return Found.on_seed(name, search.method(variants), reference, run, search.psnr_db(variants))


def by_rule(measured: Measured, speedup: float) -> tuple[bool, ...]:
    """Return which steps the rule of `auto` makes in full to save so much; none where it cannot."""
    cost = measured.reuse_costs[0]
    for asked in np.linspace(speedup, 1.2 * speedup, 21):
        try:
            full = resolve(AutoSchedule(speedup=float(asked)).for_cost(cost), measured.timesteps)
        except ValueError:
            break
        if len(full) >= speedup * (sum(full) + cost * (len(full) - sum(full))) and not all(full):
            return full
    return ()


def refine(found: Found, search: Search, num_trials: int, run: Runner, seed: int) -> Found:
    """Move one full step at a time to a place near by, and keep what the calibration seed likes better."""
    generator = np.random.default_rng(seed)
    tried = {explicit(found.method).full_steps}
    for _ in range(num_trials):
        schedule = explicit(found.method)
        movable = [step for step in schedule.full_steps if step > 0]
        if not movable:
            break
        moved = int(generator.choice(movable))
        offset = int(generator.choice([-2, -1, 1, 2]))
        steps = tuple(sorted({*schedule.full_steps} - {moved} | {moved + offset}))
        fits = 0 < moved + offset < schedule.num_inference_steps and len(steps) == len(schedule.full_steps)
        if not fits or steps in tried:
            continue
        tried.add(steps)
        variants = list(schedule.variants)
        variants[moved], variants[moved + offset] = variants[moved + offset], None
        other = tried_on_seed(found.name, search, tuple(variants), run)
        found = max(found, other, key=lambda each: each.measured.rank)
    return found


def find_smooth(config: CalibrateConfig, run: Runner) -> list[Found]:
    """Return SmoothCache's rule for each target speedup, its threshold by bisection.

    Of a target out of reach there is none; `ValueError` if all are.
    """
    seen = smooth_errors(run.pipeline, lambda: run().samples, max_age=config.trials.max_age)
    check_finite(seen.reference)
    found, most = [], 1.0
    for speedup in config.speedups:
        low, high = 0.0, 10.0
        for _ in range(30):
            threshold = (low + high) / 2
            is_reached = seen.compute_ratio(smooth_schedule(seen, threshold)) >= speedup
            low, high = (low, threshold) if is_reached else (threshold, high)
        method = smooth_schedule(seen, high)
        most = max(most, seen.compute_ratio(method))
        if seen.compute_ratio(method) >= speedup:
            found.append(Found.on_seed(f"{speedup:g}x", method, seen.reference, run, math.nan))
    found = [each for each in found if each.is_whole]
    if not found:
        raise ValueError(f"no target is within reach: all branches reused give {most:.2f}x")
    return found


def explicit(method: CacheMethod) -> ExplicitSchedule:
    return cast(ExplicitSchedule, method.schedule)


def rounded(psnr: float) -> float | None:
    """Return `None` where nothing was predicted, or all pictures are equal."""
    return round(psnr, 2) if math.isfinite(psnr) else None


def factors_of(method: CacheMethod) -> list[list[float] | None]:
    """Return the fitted factors of each step, `None` for full ones; none where nothing was fitted."""
    predictor, schedule = method.predictor, explicit(method)
    if not isinstance(predictor, FittedPredictor):
        return []
    rows = dict(zip(predictor.timesteps, predictor.factors, strict=True))
    return [[round(factor, 4) for factor in rows[at]] if at in rows else None for at in schedule.timesteps]


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
    } | common


# ----------------------------------------------------------------------------------------------------------------------
# The command


def claim(out: OutputFolder, config: CalibrateConfig) -> None:
    """Raise, before a model is loaded, where the plots' library is missing or a file of somebody else is in the way."""
    check_plots_installed("matplotlib")
    out.claim(("report.md", "report.json", "pareto.png", *(f"{name}.json" for name in config.targets)))


def calibrate(source: Source, config: CalibrateConfig, out: OutputFolder) -> list[Row]:
    """Write `{speedup}x.json` for each target, `report.md`, `report.json` and `pareto.png` into `out`.

    `ValueError` where the model lacks the site, a target is out of reach, a label or prompt is unknown, or what it
    samples is not finite.
    """
    claim(out, config)
    run, held_out_run = make_runner(source, config), make_runner(source, config, held_out=True)
    made_for = made_for_of(source.sampler.pipeline, config)
    smooth, num_runs = config.method == "smoothcache", 1 + config.trials.num_probed
    with progress("measuring", None if smooth else config.num_inference_steps + num_runs) as advance:
        run = replace(run, advance=advance)
        if smooth:
            found = find_smooth(config, run)
        else:
            measured = measure(run, config.site, config.trials, advance=advance)
            check_finite(measured.reference)
            found = find_schedules(measured, config, run)
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
        add(f"calibrated {config.method}", each.name, each.method)
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
    missed = [name for name in config.targets if name not in {each.name for each in found}]
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
