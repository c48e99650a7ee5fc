"""Finds the schedules of a calibration, and tries them on its seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import Tensor

from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import AutoSchedule, ExplicitSchedule, resolve
from skipdit.calibration.config import CalibrateConfig
from skipdit.calibration.plan import PlannedSchedule, choose, plan
from skipdit.calibration.search import Search, Variants
from skipdit.calibration.trials import Measured, smooth_errors, smooth_schedule
from skipdit.metrics.paired import PairedScore
from skipdit.metrics.table import Scores, score_pictures
from skipdit.runs import OwnCache, Runner

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


def find_by_kin(measured: Measured, config: CalibrateConfig, run: Runner) -> list[Found]:
    """Return what the rules of kin find for each target speedup, as far as it is within their reach."""
    found = []
    for name in config.kin:
        for speedup in config.speedups:
            try:
                search, variants = RULES[name](measured, speedup)
            except ValueError:
                continue
            found.append(tried_on_seed(f"{name}-{speedup:g}x", search, variants, run))
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


RULES = {"dpcache": dpcache, "l2p": l2p}


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
        if search.steps(tuple(variants)) is None:
            continue
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
