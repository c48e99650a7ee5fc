"""`skipdit calibrate`: measures a model, writes the best schedules, and what they give beside what they must beat."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from skipdit.cache.enable import cached
from skipdit.cache.fingerprint import fingerprint
from skipdit.cache.methods import EVERY, METHODS, CacheMethod, MadeFor, parse_method
from skipdit.cache.schedule import AutoSchedule, ExplicitSchedule, IntervalSchedule, resolve
from skipdit.cache.site import BranchOutputs, Site
from skipdit.calibration.plan import choose, plan
from skipdit.calibration.trials import Measured, Trials, measure, smooth_errors, smooth_schedule
from skipdit.compare import SampleConfig, choose_wanted
from skipdit.environment import versions
from skipdit.files import OutputFolder, to_json
from skipdit.loading import Source
from skipdit.metrics.paired import PairedScore, psnr_db
from skipdit.options import check_numbers
from skipdit.plots import Tradeoffs, check_plots_installed, save_png

COHERENCES = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What `skipdit calibrate` does.

    method: a row of the cache methods with one site (`skip-taylor`, `delta-taylor`, `taylorseer`, ...), or
    `smoothcache`. shallow_units: the numbers of fresh units at each end among which a schedule may choose. speedups: by
    compute; a schedule each. psnr_db: or the least predicted PSNR; a schedule each. labels, prompt: as of `skipdit
    sample`. num_samples: pictures or clips of the pass. seed: of the pass; held_out_seed: of what the report measures.
    trials: what is tried. refine: how many exchanges of single steps are tried on each schedule afterwards, each a
    cached run. rivals: fixed specs that the report shows beside.
    """

    method: str = "skip-taylor"
    shallow_units: tuple[int, ...] = (1,)
    speedups: tuple[float, ...] = (1.5, 1.8, 2.0, 2.5, 3.0)
    psnr_db: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ()
    num_samples: int = 8
    steps: int = 50
    guidance_scale: float = 2.0
    seed: int = 0
    held_out_seed: int = 1000
    trials: Trials = Trials()  # noqa: RUF009 (frozen)
    refine: int = 0
    rivals: tuple[str, ...] = (
        "skip-taylor:N2",
        "skip-taylor:N3",
        "skip-taylor:N4",
        "skip-taylor:N5",
        "skip-taylor:N4-800-100",
        "auto:1.5",
        "auto:1.8",
        "auto:2",
        "auto:2.5",
        "auto:3",
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        with_site = [name for name, row in METHODS.items() if row.site is not None]
        if self.method not in (*with_site, "smoothcache"):
            raise ValueError(f"method must be one of {', '.join((*with_site, 'smoothcache'))}, got {self.method!r}")
        if not self.speedups and not self.psnr_db:
            raise ValueError("give at least one of speedups and psnr_db")
        if any(not speedup > 1 for speedup in self.speedups):
            raise ValueError(f"speedups must be above 1, got {self.speedups}")
        for name in ("num_samples", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.refine < 0:
            raise ValueError(f"refine must be at least 0, got {self.refine}")
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
    """One run on the held-out seed. group: calibrated, fixed interval, auto, or fewer steps. compute_ratio: work of the
    full run over the work done. psnr: to the full run in dB, over pictures or frames."""

    group: str
    name: str
    steps_full: int
    compute_ratio: float
    psnr: PairedScore


@dataclass(frozen=True)
class Sampling:
    """Runs the pipeline of a source on one seed, again and again."""

    source: Source
    config: CalibrateConfig
    wanted: list[Any]
    advance: Callable[[], object]

    def __call__(self, seed: int | None = None, steps: int | None = None) -> Tensor:
        config = self.config
        samples = self.source.sampler.sample(
            self.wanted,
            guidance_scale=config.guidance_scale,
            num_inference_steps=config.steps if steps is None else steps,
            generator=torch.Generator().manual_seed(config.seed if seed is None else seed),
        )
        self.advance()
        return samples.cpu()

    def cached(self, method: CacheMethod, seed: int | None = None) -> tuple[Tensor, Any]:
        with cached(self.source.sampler.pipeline, method) as cache:
            return self(seed), cache.summary()


def score(samples: Tensor, reference: Tensor) -> PairedScore:
    return PairedScore.of(psnr_db(samples.flatten(0, -4), reference.flatten(0, -4)))


def check_finite(reference: Tensor) -> Tensor:
    """Return what a full run sampled; `ValueError` where nothing can be measured by it."""
    if not reference.isfinite().all():
        raise ValueError("the model samples NaN or infinite pixels without a cache: there is nothing to calibrate")
    return reference


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[], object]]:
    with Progress() as bar:
        yield partial(bar.advance, bar.add_task(description, total=total))


# ----------------------------------------------------------------------------------------------------------------------
# Schedules


@dataclass(frozen=True, kw_only=True)
class Found:
    """A schedule: what was asked for, what was predicted, and what the calibration seeds gave."""

    name: str
    method: CacheMethod
    compute_ratio: float
    predicted_psnr_db: float
    measured: PairedScore


def find_schedules(measured: Measured, config: CalibrateConfig, sampling: Sampling) -> list[Found]:
    """For each target the best of the planned schedules, of all Taylor orders and both ways in which errors may add up,
    and of the rule of `auto`, by what the calibration seeds give. None for a target out of reach; `ValueError` if all
    are."""
    fronts = {
        (order, coherence): plan(measured.reuse_errors(order), coherence=coherence)
        for order in config.trials.orders
        for coherence in COHERENCES
    }
    found, reason = [], "nothing can be reused so well"
    for name, target in config.targets.items():
        candidates: dict[tuple, Found] = {}
        for (order, _), front in fronts.items():
            try:
                planned = choose(front, **target)
            except ValueError as error:
                reason = str(error)
                continue
            method = measured.method(planned.full_steps, planned.variants, order)
            if planned.cost == 1 or (order, planned.variants) in candidates:
                continue
            candidates[order, planned.variants] = measured_on_seeds(name, method, planned.psnr_db, measured, sampling)
        for order in config.trials.orders if "speedup" in target else ():
            full = by_rule(measured, target["speedup"])
            variants = tuple(None if is_full else 0 for is_full in full)
            if full and (order, variants) not in candidates:
                method = measured.method(full_steps_of(full), variants, order)
                candidates[order, variants] = measured_on_seeds(name, method, math.nan, measured, sampling)
        whole = [each for each in candidates.values() if not each.measured.num_broken]
        if whole:
            best = max(whole, key=lambda each: each.measured.rank)
            found.append(refine(best, config.refine, measured, sampling, config.seed))
    if not found:
        raise ValueError(f"no target is within reach: {reason}")
    return found


def by_rule(measured: Measured, speedup: float) -> tuple[bool, ...]:
    """Which steps the rule of `auto` makes in full to save so much; none where it cannot."""
    cost = measured.reuse_costs[0]
    for asked in np.linspace(speedup, 1.2 * speedup, 21):
        try:
            full = resolve(AutoSchedule(speedup=float(asked)).for_cost(cost), measured.timesteps)
        except ValueError:
            break
        if len(full) >= speedup * (sum(full) + cost * (len(full) - sum(full))) and not all(full):
            return full
    return ()


def full_steps_of(full: Sequence[bool]) -> tuple[int, ...]:
    return tuple(step for step, is_full in enumerate(full) if is_full)


def measured_on_seeds(
    name: str, method: CacheMethod, predicted: float, measured: Measured, sampling: Sampling
) -> Found:
    samples, summary = sampling.cached(method)
    return Found(
        name=name,
        method=method,
        compute_ratio=summary.compute_ratio,
        predicted_psnr_db=predicted,
        measured=score(samples, measured.reference),
    )


def refine(found: Found, num_trials: int, measured: Measured, sampling: Sampling, seed: int) -> Found:
    """Moves one full step at a time to a place near by, and keeps what the calibration seeds like better."""
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
        changed = ExplicitSchedule(
            full_steps=steps,
            num_inference_steps=schedule.num_inference_steps,
            timesteps=schedule.timesteps,
            variants=tuple(variants),
        )
        method = CacheMethod(schedule=changed, site=found.method.site, predictor=found.method.predictor)
        other = measured_on_seeds(found.name, method, found.predicted_psnr_db, measured, sampling)
        found = max(found, other, key=lambda each: each.measured.rank)
    return found


def explicit(method: CacheMethod) -> ExplicitSchedule:
    return cast(ExplicitSchedule, method.schedule)


def rounded(psnr: float) -> float | None:
    """`None` where nothing was predicted, or all pictures are equal."""
    return round(psnr, 2) if math.isfinite(psnr) else None


def to_fields(found: Found, config: CalibrateConfig, made_for: MadeFor) -> dict[str, Any]:
    """As JSON: what `skipdit.cache.methods.load_schedule` reads, and where it is from."""
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
            {"kinds": cast(BranchOutputs, part.site).kinds, "full_steps": explicit(part).full_steps}
            for part in found.method.parts
        ]
        return {"method": "smoothcache", "parts": parts} | common
    return {
        "method": config.method,
        "num_shallow_units": list(config.shallow_units),
        "order": found.method.predictor.order,
        "full_steps": schedule.full_steps,
        "variants": schedule.variants,
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
    options = SampleConfig(labels=config.labels, prompt=config.prompt, num_samples=config.num_samples)
    wanted, _ = choose_wanted(source, options)
    pipeline = source.sampler.pipeline
    pipeline.set_progress_bar_config(disable=True)
    made_for = MadeFor(
        model=type(pipeline.transformer).__name__,
        num_units=num_units_of(pipeline, config.site),
        weights=fingerprint(pipeline.transformer),
        scheduler=type(pipeline.scheduler).__name__,
        guidance_scale=config.guidance_scale,
    )
    num_runs = 1 + config.trials.num_probed
    with progress("measuring", config.steps + num_runs * 2 if config.method != "smoothcache" else None) as advance:
        sampling = Sampling(source, config, wanted, advance)
        if config.method == "smoothcache":
            found = find_smooth(config, sampling)
        else:
            measured = measure(pipeline, sampling, config.site, config.trials, advance=advance)
            check_finite(measured.reference)
            found = find_schedules(measured, config, sampling)
    for each in found:
        fields = to_fields(each, config, made_for)
        lines = [f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in fields.items()]
        out.write_text(f"{each.name}.json", "{\n" + ",\n".join(lines) + "\n}\n")
    with progress("checking", len(found) + 2 * len(config.rivals) + 1) as advance:
        rows = held_out(found, Sampling(source, config, wanted, advance))
    write_report(rows, found, config, made_for, out)
    return rows


def num_units_of(pipeline: Any, site: Site) -> int:
    with cached(pipeline, CacheMethod(schedule=IntervalSchedule(interval=1), site=site)) as cache:
        return cache.summary().num_units


def find_smooth(config: CalibrateConfig, sampling: Sampling) -> list[Found]:
    """SmoothCache's rule for each target speedup: the threshold by bisection. None for a target out of reach;
    `ValueError` if all are."""
    pipeline = sampling.source.sampler.pipeline
    seen = smooth_errors(pipeline, sampling, max_age=config.trials.max_age)
    check_finite(seen.reference)
    found, most = [], 1.0
    for speedup in config.speedups:
        low, high = 0.0, 10.0
        for _ in range(30):
            threshold = (low + high) / 2
            reached = seen.compute_ratio(smooth_schedule(seen, threshold)) >= speedup
            low, high = (low, threshold) if reached else (threshold, high)
        method = smooth_schedule(seen, high)
        most = max(most, seen.compute_ratio(method))
        if seen.compute_ratio(method) < speedup:
            continue
        samples, summary = sampling.cached(method)
        measured = score(samples, seen.reference)
        if measured.num_broken:
            continue
        found.append(
            Found(
                name=f"{speedup:g}x",
                method=method,
                compute_ratio=summary.compute_ratio,
                predicted_psnr_db=math.nan,
                measured=measured,
            )
        )
    if not found:
        raise ValueError(f"no target is within reach: all branches reused give {most:.2f}x")
    return found


def held_out(found: Sequence[Found], sampling: Sampling) -> list[Row]:
    """What schedules and rivals give on a seed that no schedule has seen."""
    config, rows = sampling.config, []
    seed = config.held_out_seed
    reference = sampling(seed)

    def add(group: str, name: str, method: CacheMethod) -> None:
        samples, summary = sampling.cached(method, seed)
        counts = {"steps_full": summary.steps_full, "compute_ratio": summary.compute_ratio}
        rows.append(Row(group=group, name=name, psnr=score(samples, reference), **counts))

    for each in found:
        add(f"calibrated {config.method}", each.name, each.method)
    for spec in config.rivals:
        try:
            add("auto" if spec.startswith("auto") else "fixed interval", spec, parse_method(spec))
        except ValueError:  # this model has not the site
            continue
    for steps in sorted({max(1, math.ceil(config.steps / row.compute_ratio)) for row in rows}, reverse=True):
        psnr, counts = score(sampling(seed, steps), reference), {"compute_ratio": config.steps / steps}
        rows.append(Row(group="fewer steps", name=f"{steps} steps", steps_full=steps, psnr=psnr, **counts))
    return rows


def at_compute(rows: Sequence[Row], compute_ratio: float) -> float | None:
    """The PSNR of a group at this compute ratio, linear between its finite rows; `None` outside of them."""
    points = sorted((row.compute_ratio, row.psnr.mean) for row in rows if row.psnr.finite_mean is not None)
    if not points or not points[0][0] <= compute_ratio <= points[-1][0]:
        return None
    return float(np.interp(compute_ratio, [ratio for ratio, _ in points], [psnr for _, psnr in points]))


def by_compute(row: Row) -> float:
    return row.compute_ratio


def write_report(
    rows: Sequence[Row], found: Sequence[Found], config: CalibrateConfig, made_for: MadeFor, out: OutputFolder
) -> None:
    groups: Mapping[str, list[Row]] = {row.group: [] for row in rows}
    for row in rows:
        groups[row.group].append(row)
    lines = [
        f"`skipdit calibrate`, method {config.method}, {made_for.model} of {made_for.num_units} units, weights "
        f"{made_for.weights}, {made_for.scheduler}, {config.steps} steps, guidance {config.guidance_scale:g}, "
        f"{config.num_samples} samples; schedules found on seed {config.seed}, rows measured on seed "
        f"{config.held_out_seed}. PSNR to the full run. " + ", ".join(f"{k} {v}" for k, v in versions().items()),
        "",
        "| schedule | order | full steps | compute | predicted dB | on the calibration seed dB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each.name} | {each.method.predictor.order} | {each.method.schedule} | {each.compute_ratio:.2f} | "
        f"{'' if math.isnan(each.predicted_psnr_db) else f'{each.predicted_psnr_db:.1f}'} | "
        f"{each.measured.text(1)} |"
        for each in found
    ]
    if missed := [name for name in config.targets if name not in {each.name for each in found}]:
        lines += ["", f"Out of reach: {', '.join(missed)}."]
    lines += ["", "| group | run | full steps | compute | PSNR dB |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row.group} | {row.name} | {row.steps_full} | {row.compute_ratio:.2f} | {row.psnr.text(1)} |"
        for row in rows
    ]
    lines.append("")
    others = {group: members for group, members in groups.items() if not group.startswith("calibrated")}
    for each in (row for row in rows if row.group.startswith("calibrated")):
        gains = [
            f"{each.psnr.mean - there:+.1f} dB over {group}"
            for group, members in others.items()
            if each.psnr.finite_mean is not None and (there := at_compute(members, each.compute_ratio)) is not None
        ]
        lines.append(
            f"- {each.name}, compute {each.compute_ratio:.2f}: {'; '.join(gains) or 'no rival at this compute'}."
        )
    out.write_text("report.md", "\n".join(lines) + "\n")
    out.write_text("report.json", to_json({"rows": rows, "config": config, "made_for": made_for}))
    series = {
        group: (np.array([row.compute_ratio for row in finite]), np.array([row.psnr.mean for row in finite]))
        for group, members in groups.items()
        if (finite := sorted((row for row in members if row.psnr.finite_mean is not None), key=by_compute))
    }
    plot = Tradeoffs(
        name="pareto",
        title=f"{made_for.model}, {config.steps} steps, held-out seed",
        x_label="compute ratio",
        y_label="PSNR to the full run, dB",
        series=series,
        emphasized=frozenset(group for group in groups if group.startswith("calibrated")),
        dashed=frozenset({"fewer steps"}),
    )
    if series:
        save_png(plot, out)
