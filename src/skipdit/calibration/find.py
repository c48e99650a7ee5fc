"""Finds the schedules of a calibration, and tries them on its seed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import cast

import numpy as np
from torch import Tensor

from skipdit.cache.enable import recorded
from skipdit.cache.magnitudes import MagnitudeSchedule, MeasuringSteps
from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import AutoSchedule, ExplicitSchedule, IntervalSchedule, resolve
from skipdit.cache.site import Site
from skipdit.calibration.config import CalibrateConfig
from skipdit.calibration.plan import PlannedSchedule, choose, plan
from skipdit.calibration.search import Search, Variants
from skipdit.calibration.trials import Measured, smooth_errors, smooth_schedule
from skipdit.metrics.paired import PairedScore
from skipdit.metrics.table import Scores, score_pictures
from skipdit.runs import OwnCache, Runner

HEAT_DB = 2.0  # of annealing at its start
NUM_BISECTIONS = 6  # of the speedup, between 1 and the largest, for a target of quality
COHERENCES = (0.5, 1.0)  # tried for a search, see there


def frames_of(samples: Tensor) -> Tensor:
    return samples.flatten(0, -4)


def score(samples: Tensor, reference: Tensor) -> Scores:
    return score_pictures(frames_of(samples), frames_of(reference))


def check_finite(reference: Tensor) -> None:
    """Raise `ValueError` where nothing can be measured by what a full run sampled."""
    if not reference.isfinite().all():
        raise ValueError("the model samples NaN or infinite pixels without a cache: there is nothing to calibrate")


def explicit(method: CacheMethod) -> ExplicitSchedule:
    return cast(ExplicitSchedule, method.schedule)


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


@dataclass(frozen=True)
class Clock:
    """What a run takes on this machine."""

    seconds: float
    """of a run in full"""
    seconds_per_step: float
    """that are saved with the work of one full step"""
    num_steps: int

    @classmethod
    def of(cls, run: Runner, site: Site) -> "Clock":
        """Measure it: the medians of three runs in full and of three of which every second step reuses, in turn."""
        halved = OwnCache(CacheMethod(schedule=IntervalSchedule(interval=2), site=site))
        full, cached = zip(*((run(), run(halved)) for _ in range(3)), strict=True)
        seconds, less = (median(made.seconds for made in runs) for runs in (full, cached))
        saved = run.num_inference_steps * (1 - 1 / cached[0].compute_ratio)
        if saved <= 0:
            raise ValueError(f"a run of {run.num_inference_steps} steps has no step to reuse, and so nothing to time")
        return cls(seconds, (seconds - less) / saved, run.num_inference_steps)

    def check(self, seconds: Sequence[float]) -> None:
        """Raise `ValueError` if a run in full takes no longer than one of these targets."""
        for most in seconds:
            if most >= self.seconds:
                raise ValueError(
                    f"a run in full takes {self.seconds:.3g} s here, so target_seconds {most:g} needs no cache"
                )

    def speedup(self, seconds: float) -> float:
        """Return by how much less compute a run takes so many seconds. `ValueError` where none does."""
        left = 0.0 if self.seconds_per_step <= 0 else self.num_steps - (self.seconds - seconds) / self.seconds_per_step
        if left <= 0:
            raise ValueError(
                f"{seconds:.3g} s are out of reach: a run in full takes {self.seconds:.3g} s, of which the cache can "
                f"save {max(self.seconds_per_step, 0):.3g} s per step"
            )
        return max(self.num_steps / left, 1.0)


def find_schedules(measured: Measured, config: CalibrateConfig, run: Runner, clock: Clock | None = None) -> list[Found]:
    """Return a schedule for each target: the best, by what the calibration seed gives, of those that the searches find
    for each order and both ways in which errors may add up.

    Targets of quality are checked on one more seed. clock: for targets of time. A target out of reach has no schedule.
    Raises `ValueError` if all are out of reach.
    """
    searches = [
        Search(measured, order, coherence, fits=config.fits)
        for order in config.trials.orders
        for coherence in COHERENCES
    ]
    fronts = [plan(search.errors(), coherence=search.coherence) for search in searches]
    found, reasons = [], ["nothing can be reused so well"]

    def at_speedup(name: str, speedup: float) -> Found | None:
        best = best_of(name, speedup, searches, fronts, run, reasons)
        return None if best is None else refine(*best, config.refine, run, config.seed)

    for name, speedup, seconds, decibel in config.targets:
        if decibel is not None:
            found.append(of_quality(name, decibel, at_speedup, fronts, replace(run, seed=config.estimate_seed)))
            continue
        try:
            if config.needs_clock and (seconds is not None or config.by_clock):
                assert clock is not None
                speedup = clock.speedup(clock.seconds / speedup if seconds is None else seconds)
            found.append(at_speedup(name, speedup))
        except ValueError as error:
            reasons.append(str(error))
    found = [each for each in found if each is not None]
    if not found:
        raise ValueError(f"no target is within reach: {reasons[-1]}")
    return found


def best_of(
    name: str,
    speedup: float,
    searches: Sequence[Search],
    fronts: Sequence[Sequence[PlannedSchedule]],
    run: Runner,
    reasons: list[str],
) -> tuple[Found, Search] | None:
    """Return what the calibration seed likes best of what the searches find, and its search; `None`, with the reasons
    added, where a speedup is out of reach of all."""
    planned: dict[tuple[int, Variants], Search] = {}
    for search in searches:
        try:
            variants = search_for(search, fronts, speedup)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if search.cost(variants) < 1:
            planned.setdefault((search.order, variants), search)
    candidates = [tried_on_seed(name, search, variants, run) for (_, variants), search in planned.items()]
    whole = [(each, search) for each, search in zip(candidates, planned.values(), strict=True) if each.is_whole]
    return max(whole, key=lambda pair: pair[0].measured.rank, default=None)


def of_quality(
    name: str,
    decibel: float,
    at_speedup: Callable[[str, float], Found | None],
    fronts: Sequence[Sequence[PlannedSchedule]],
    estimate: Runner,
) -> Found | None:
    """Return the fastest schedule, by bisection, whose PSNR on one more seed is at least so high; `None` where none
    is."""
    reference, best = estimate().samples, None
    low, high = 1.0, max(schedule.speedup for front in fronts for schedule in front)
    for _ in range(NUM_BISECTIONS):
        middle = (low * high) ** 0.5
        tried = at_speedup(name, middle)
        reached = (
            tried is not None and score(estimate(OwnCache(tried.method)).samples, reference)["psnr"].rank >= decibel
        )
        low, high, best = (middle, high, tried) if reached else (low, middle, best)
    return best


def find_by_kin(measured: Measured, config: CalibrateConfig, run: Runner) -> list[Found]:
    """Return what the rules of kin find for each target speedup by compute, as far as it is within their reach."""
    found = []
    for name in config.kin:
        for speedup in config.speedups:
            try:
                search, variants = RULES[name](measured, speedup)
            except ValueError:
                continue
            each = tried_on_seed(f"{name}-{speedup:g}x", search, variants, run)
            if name == "budcache":
                each = refine(each, search, config.kin_trials, run, config.seed, heat_db=HEAT_DB)
            found.append(each)
    return [each for each in found if each.is_whole]


def dpcache(measured: Measured, speedup: float) -> tuple[Search, Variants]:
    """DPCache (arXiv 2602.22654): dynamic programming on costs that depend on the full step before; Taylor's expansion
    of order 1."""
    search = Search(measured, 1, coherence=0.0, fits=False)
    return search, choose(plan(search.errors(), coherence=0.0), speedup=speedup).variants


def l2p(measured: Measured, speedup: float) -> tuple[Search, Variants]:
    """L2P (arXiv 2604.26365): a fixed interval, and weights of the last stored values that are fitted per step; here
    drawn to Taylor's."""
    search = Search(measured, 1)
    for interval in range(2, measured.changes.shape[2] // 2 + 2):
        variants = tuple(None if step % interval == 0 else 0 for step in range(len(measured.timesteps)))
        if search.cost(variants) * speedup <= 1:
            return search, variants
    raise ValueError(f"no interval that was measured gives {speedup:g}x")


def budcache(measured: Measured, speedup: float) -> tuple[Search, Variants]:
    """BudCache (arXiv 2606.13496): evenly spaced full steps, as many as the budget allows, from which simulated
    annealing goes on by sampling again for each trial; Taylor's expansion of order 1. Its learned timesteps are left
    out."""
    search, count = Search(measured, 1, fits=False), len(measured.timesteps)
    cost = measured.reuse_costs[0]
    num_full = math.floor((count / speedup - cost * count) / (1 - cost) + 1e-6)
    if num_full < 1:
        raise ValueError(f"{speedup:g}x is out of reach")
    full = {step * count // num_full for step in range(num_full)}
    variants = tuple(None if step in full else 0 for step in range(count))
    if search.steps(variants) is None:
        raise ValueError(f"{speedup:g}x needs rests that are longer than was measured")
    return search, variants


RULES = {"dpcache": dpcache, "l2p": l2p, "budcache": budcache}


def search_for(search: Search, fronts: Sequence[Sequence[PlannedSchedule]], speedup: float) -> Variants:
    """Return the best schedule of a search that is at least so fast.

    fronts: planned schedules to start from. `ValueError` where the target is out of reach.
    """
    full = by_rule(search.measured, speedup)
    starts = [tuple(None if is_full else 0 for is_full in full)] if full else []
    for front in fronts:
        try:
            starts.append(choose(front, speedup=speedup).variants)
        except ValueError:  # costs on a front are rounded up
            if not starts:
                raise
    best = min((search.improve(start, speedup) for start in dict.fromkeys(starts)), key=search.error)
    if search.steps(best) is None:
        raise ValueError(f"{speedup:g}x needs rests that are longer than was measured: raise trials.max_age")
    return best


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


def refine(found: Found, search: Search, num_trials: int, run: Runner, seed: int, *, heat_db: float = 0.0) -> Found:
    """Move one full step at a time to a place near by, and return what the calibration seed likes best.

    heat_db: at first, and ever less, a schedule that is worse by about so much is gone on from too (simulated
    annealing); at 0 none is.
    """
    generator = np.random.default_rng(seed)
    best, tried = found, {explicit(found.method).full_steps}
    for trial in range(num_trials):
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
        if search.steps(tuple(variants)) is None:
            continue
        other = tried_on_seed(found.name, search, tuple(variants), run)
        heat = heat_db * (1 - trial / num_trials) ** 2
        lost = found.measured.rank - other.measured.rank
        if lost < 0 or (heat > 0 and generator.random() < math.exp(-lost / heat)):
            found = other
        best = max(best, found, key=lambda each: each.measured.rank)
    return best


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


def find_magnitudes(config: CalibrateConfig, run: Runner) -> list[Found]:
    """Return MagCache's rule for each target speedup, from its curve of magnitudes: the threshold by bisection, with as
    few reuse steps in a row as will do.

    Of a target out of reach there is none; `ValueError` if all are.
    """
    with recorded(run.pipeline, config.site, MeasuringSteps) as (cache, steps):
        reference = run().samples
        cost = cache.costs().of_step((steps.region,))
    check_finite(reference)
    curve = steps.magnitudes()
    count, found, most = len(curve.timesteps), [], 1.0
    for speedup in config.speedups:
        for max_reused in range(1, config.trials.max_age + 1):
            low, high = 0.0, 10.0

            def full_steps(threshold: float, max_reused: int = max_reused) -> tuple[int, ...]:
                schedule = MagnitudeSchedule(magnitudes=curve, threshold=threshold, max_reused=max_reused)
                decisions = schedule.decisions(curve.timesteps)
                return tuple(step for step, decision in enumerate(decisions) if decision is None)

            def ratio(full: tuple[int, ...]) -> float:
                return count / (len(full) + cost * (count - len(full)))

            for _ in range(30):
                threshold = (low + high) / 2
                low, high = (low, threshold) if ratio(full_steps(threshold)) >= speedup else (threshold, high)
            full = full_steps(high)
            most = max(most, ratio(full))
            if ratio(full) >= speedup:
                schedule = ExplicitSchedule(full_steps=full, num_inference_steps=count, timesteps=curve.timesteps)
                method = CacheMethod(schedule=schedule, site=config.site)
                found.append(Found.on_seed(f"{speedup:g}x", method, reference, run, math.nan))
                break
    found = [each for each in found if each.is_whole]
    if not found:
        raise ValueError(f"no target is within reach: its first steps are full, so that it gives at most {most:.2f}x")
    return found
