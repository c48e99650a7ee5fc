"""Finds the schedules of a calibration, and tries them on its seed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median
from typing import cast

import numpy as np
from torch import Tensor

from skipdit.cache.auto import AutoSchedule
from skipdit.cache.enable import recorded
from skipdit.cache.magnitudes import MagnitudeSchedule, MagnitudeSteps
from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import ExplicitSchedule, IntervalSchedule, resolve
from skipdit.cache.site import Site
from skipdit.calibration.config import CalibrateConfig
from skipdit.calibration.plan import PlannedSchedule, choose, plan
from skipdit.calibration.search import Search, Variants
from skipdit.calibration.trials import Measurement, measure_branches
from skipdit.metrics.paired import PairedScore
from skipdit.runs import OwnCache, Runner

HEAT_DB = 2.0  # of annealing at its start
NUM_BISECTIONS = 6  # of the speedup, between 1 and the largest, for a target of quality
COHERENCES = (0.5, 1.0)  # tried for a search, see there
DAMPINGS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of fitted factors
LEAST_GAIN_DB = 0.2  # by damping: what is less may be chance
MAX_THRESHOLD = 10.0  # for a rule with a threshold


def check_finite(reference: Tensor) -> None:
    """Raise `ValueError` if the samples of a full run are not finite, as nothing can be measured by them."""
    if not reference.isfinite().all():
        raise ValueError("the model samples NaN or infinite pixels without a cache: there is nothing to calibrate")


def explicit(method: CacheMethod) -> ExplicitSchedule:
    """Return the schedule of a cache that a calibration has made."""
    return cast(ExplicitSchedule, method.schedule)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule, with its predicted and its measured quality."""

    name: str
    """name of its target, and of its file"""
    method: CacheMethod
    compute_ratio: float
    """cost of the full run divided by that of the cached run"""
    predicted_psnr_db: float
    """NaN if nothing was predicted"""
    measured: PairedScore
    """PSNR on the calibration seed"""

    @property
    def is_finite(self) -> bool:
        """Return true if no sample has NaN or infinite pixels."""
        return not self.measured.num_broken

    @property
    def damping(self) -> float:
        """Return the number by which all fitted factors are multiplied; 1 if nothing was fitted."""
        return self.method.predictor.damping

    @classmethod
    def on_seed(
        cls, name: str, method: CacheMethod, reference: Tensor, run: Runner, predicted_psnr_db: float = math.nan
    ) -> "Candidate":
        """Try a schedule in a run on the calibration seed. reference: the samples of the full run."""
        sampled = run(OwnCache(method))
        return cls(
            name=name,
            method=method,
            compute_ratio=sampled.compute_ratio,
            predicted_psnr_db=predicted_psnr_db,
            measured=sampled.scores(reference)["psnr"],
        )

    def cells(self) -> dict[str, object]:
        """Return the row of a table."""
        return {
            "schedule": self.name,
            "order": self.method.predictor.order,
            "full steps": self.method.schedule,
            "damping": f"{self.damping:g}",
            "compute": f"{self.compute_ratio:.2f}",
            "predicted dB": "" if math.isnan(self.predicted_psnr_db) else f"{self.predicted_psnr_db:.1f}",
            "on the calibration seed dB": self.measured.text(1),
        }


@dataclass(frozen=True)
class Clock:
    """The time that runs take on this machine."""

    seconds: float
    """seconds of a full run"""
    seconds_per_step: float
    """seconds saved per full step that is saved"""
    num_steps: int

    @classmethod
    def of(cls, run: Runner, site: Site) -> "Clock":
        """Time three full runs and three runs in which every second step reuses, in turn; use the medians."""
        halved = OwnCache(CacheMethod(schedule=IntervalSchedule(interval=2), site=site))
        full, cached = zip(*((run(), run(halved)) for _ in range(3)), strict=True)
        full_seconds, cached_seconds = (median(sampled.seconds for sampled in runs) for runs in (full, cached))
        saved = run.num_inference_steps * (1 - 1 / cached[0].compute_ratio)
        if saved <= 0:
            raise ValueError(f"a run of {run.num_inference_steps} steps has no step to reuse, and so nothing to time")
        return cls(full_seconds, (full_seconds - cached_seconds) / saved, run.num_inference_steps)

    def check(self, targets: Sequence[float]) -> None:
        """Raise `ValueError` if a full run already takes no longer than one of these targets, in seconds."""
        for target in targets:
            if target >= self.seconds:
                raise ValueError(
                    f"a run in full takes {self.seconds:.3g} s here, so target_seconds {target:g} needs no cache"
                )

    def speedup(self, seconds: float) -> float:
        """Return the speedup by compute at which a run takes this many seconds. Raises `ValueError` if none does."""
        saving = max(self.seconds_per_step, 0.0)
        num_full = self.num_steps - (self.seconds - seconds) / saving if saving else 0.0
        if num_full <= 0:
            raise ValueError(
                f"{seconds:.3g} s are out of reach: a run in full takes {self.seconds:.3g} s, of which the cache can "
                f"save {saving:.3g} s per step"
            )
        return max(self.num_steps / num_full, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Our own search


@dataclass(frozen=True)
class Check:
    """Runs on a seed that the search does not see."""

    run: Runner

    @cached_property
    def reference(self) -> Tensor:
        """The samples of the full run."""
        return self.run().samples

    def psnr_db(self, method: CacheMethod) -> float:
        """Return the PSNR of a cached run in dB; less than any other if it is broken."""
        return self.run(OwnCache(method)).scores(self.reference)["psnr"].rank


def find_schedules(
    measurement: Measurement, config: CalibrateConfig, run: Runner, clock: Clock | None = None
) -> list[Candidate]:
    """Return a schedule for each target: the one that is best on the calibration seed, among those that the searches of
    each order and each coherence find.

    How much factors are damped is found on one more seed, and targets of quality are checked on it. clock: for targets
    of time. A target that is out of reach has no schedule. Raises `ValueError` if all are out of reach.
    """
    searches = [
        Search(measurement, order, coherence, fits=config.fits)
        for order in config.trials.of(config.site).orders
        for coherence in COHERENCES
    ]
    fronts = [plan(search.errors(), coherence=search.coherence) for search in searches]
    check = Check(replace(run, seed=config.estimate_seed))
    candidates: list[Candidate | None] = []
    reasons = ["nothing can be reused so well"]

    def at_speedup(name: str, speedup: float) -> Candidate | None:
        best = best_of(name, speedup, searches, fronts, run, reasons)
        if best is None:
            return None
        found = refine(*best, config.refine, run, config.seed)
        damped = damp(found.method, check)
        if damped is found.method:
            return found
        return replace(found, measured=run(OwnCache(damped)).scores(measurement.reference)["psnr"], method=damped)

    for name, speedup, seconds, decibel in config.targets:
        if decibel is not None:
            candidates.append(find_by_quality(name, decibel, at_speedup, fronts, check))
            continue
        try:
            if config.needs_clock and (seconds is not None or config.by_clock):
                assert clock is not None
                speedup = clock.speedup(clock.seconds / speedup if seconds is None else seconds)
            candidates.append(at_speedup(name, speedup))
        except ValueError as error:
            reasons.append(str(error))
    found = [candidate for candidate in candidates if candidate is not None]
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
) -> tuple[Candidate, Search] | None:
    """Return the schedule that is best on the calibration seed among those that the searches find, and its search. If
    no search reaches the speedup, return `None` and add the reasons to `reasons`."""
    planned: dict[tuple[int, Variants], Search] = {}
    for search in searches:
        try:
            variants = search_for(search, fronts, speedup)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if search.cost(variants) < 1:
            planned.setdefault((search.order, variants), search)
    pairs = [(candidate_of(name, search, variants, run), search) for (_, variants), search in planned.items()]
    finite = [(candidate, search) for candidate, search in pairs if candidate.is_finite]
    return max(finite, key=lambda pair: pair[0].measured.rank, default=None)


def find_by_quality(
    name: str,
    decibel: float,
    at_speedup: Callable[[str, float], Candidate | None],
    fronts: Sequence[Sequence[PlannedSchedule]],
    check: Check,
) -> Candidate | None:
    """Return, by bisection, the fastest schedule whose PSNR on the seed of `check` is at least `decibel`; `None` if
    there is none."""
    best = None
    low, high = 1.0, max(schedule.speedup for front in fronts for schedule in front)
    for _ in range(NUM_BISECTIONS):
        middle = (low * high) ** 0.5
        candidate = at_speedup(name, middle)
        reached = candidate is not None and check.psnr_db(candidate.method) >= decibel
        low, high, best = (middle, high, candidate) if reached else (low, middle, best)
    return best


def search_for(search: Search, fronts: Sequence[Sequence[PlannedSchedule]], speedup: float) -> Variants:
    """Return the best schedule of a search that is at least this fast. fronts: planned schedules to start from. Raises
    `ValueError` if the speedup is out of reach."""
    full = auto_full_steps(search.measurement, speedup)
    starts = [tuple(None if is_full else 0 for is_full in full)] if full else []
    for front in fronts:
        try:
            starts.append(choose(front, speedup=speedup).variants)
        except ValueError:  # costs on a front are rounded up
            if not starts:
                raise
    best = min((search.improve(start, speedup) for start in dict.fromkeys(starts)), key=search.error)
    if search.steps(best) is None:
        raise ValueError(f"{speedup:g}x needs more reuse steps in a row than were measured: raise trials.max_age")
    return best


def candidate_of(name: str, search: Search, variants: Variants, run: Runner) -> Candidate:
    """Try a schedule of a search in a run on the calibration seed."""
    return Candidate.on_seed(name, search.method(variants), search.measurement.reference, run, search.psnr_db(variants))


def auto_full_steps(measurement: Measurement, speedup: float) -> tuple[bool, ...]:
    """Return true for each step that is full under `auto` at this speedup; empty if it cannot reach it."""
    cost = measurement.reuse_costs[0]
    for auto_speedup in np.linspace(speedup, 1.2 * speedup, 21):
        try:
            full = resolve(AutoSchedule(speedup=float(auto_speedup)).for_cost(cost), measurement.timesteps)
        except ValueError:
            break
        if len(full) >= speedup * (sum(full) + cost * (len(full) - sum(full))) and not all(full):
            return full
    return ()


def refine(
    candidate: Candidate, search: Search, num_trials: int, run: Runner, seed: int, *, heat_db: float = 0.0
) -> Candidate:
    """Move one full step at a time by one or two steps; return the schedule that is best on the calibration seed.

    heat_db: a schedule that is worse by about this much may also be continued from, less and less over time (simulated
    annealing); with 0 only better schedules are.
    """
    generator = np.random.default_rng(seed)
    current, best, tried = candidate, candidate, {explicit(candidate.method).full_steps}
    for trial in range(num_trials):
        schedule = explicit(current.method)
        movable = [step for step in schedule.full_steps if step > 0]
        if not movable:
            break
        source = int(generator.choice(movable))
        target = source + int(generator.choice([-2, -1, 1, 2]))
        steps = tuple(sorted({*schedule.full_steps} - {source} | {target}))
        is_valid = 0 < target < schedule.num_inference_steps and len(steps) == len(schedule.full_steps)
        if not is_valid or steps in tried:
            continue
        tried.add(steps)
        variants = list(schedule.variants)
        variants[source], variants[target] = variants[target], None
        if search.steps(tuple(variants)) is None:
            continue
        other = candidate_of(candidate.name, search, tuple(variants), run)
        heat = heat_db * (1 - trial / num_trials) ** 2
        loss = current.measured.rank - other.measured.rank
        if loss < 0 or (heat > 0 and generator.random() < math.exp(-loss / heat)):
            current = other
        best = max(best, current, key=lambda candidate: candidate.measured.rank)
    return best


def damp(method: CacheMethod, check: Check) -> CacheMethod:
    """Damp the fitted factors by a little more at a time, as long as the schedule gets better on the seed of `check`;
    leave them as they are if little is gained."""
    predictor = method.predictor
    if not predictor.fitted_factors:
        return method
    best, most = method, check.psnr_db(method)
    least = most + LEAST_GAIN_DB
    for damping in DAMPINGS:
        damped = replace(method, predictor=replace(predictor, damping=damping))
        if (psnr := check.psnr_db(damped)) <= most:
            break
        best, most = damped, psnr
    return best if most >= least else method


# ----------------------------------------------------------------------------------------------------------------------
# Published rules, on the same measurement


def find_by_kin(measurement: Measurement, config: CalibrateConfig, run: Runner) -> list[Candidate]:
    """Return the schedules of other published rules for each target speedup by compute that they reach."""
    candidates = []
    for name in config.kin:
        for speedup in config.speedups:
            try:
                search, variants = RULES[name](measurement, speedup)
            except ValueError:
                continue
            candidate = candidate_of(f"{name}-{speedup:g}x", search, variants, run)
            if name == "budcache":
                candidate = refine(candidate, search, config.kin_trials, run, config.seed, heat_db=HEAT_DB)
            candidates.append(candidate)
    return [candidate for candidate in candidates if candidate.is_finite]


def dpcache(measurement: Measurement, speedup: float) -> tuple[Search, Variants]:
    """DPCache (arXiv 2602.22654): dynamic programming on costs that depend on the full step before; Taylor's expansion
    of order 1."""
    search = Search(measurement, 1, coherence=0.0, fits=False)
    return search, choose(plan(search.errors(), coherence=0.0), speedup=speedup).variants


def l2p(measurement: Measurement, speedup: float) -> tuple[Search, Variants]:
    """L2P (arXiv 2604.26365): a fixed interval, and weights of the last stored values that are fitted per step; here
    they are regularized toward Taylor's."""
    search = Search(measurement, 1)
    for interval in range(2, measurement.changes.shape[2] // 2 + 2):
        variants = tuple(None if step % interval == 0 else 0 for step in range(len(measurement.timesteps)))
        if search.cost(variants) * speedup <= 1:
            return search, variants
    raise ValueError(f"no interval that was measured gives {speedup:g}x")


def budcache(measurement: Measurement, speedup: float) -> tuple[Search, Variants]:
    """BudCache (arXiv 2606.13496): evenly spaced full steps, as many as the budget allows, as the start of simulated
    annealing that samples once per trial; Taylor's expansion of order 1. Its learned timesteps are left out."""
    search, count = Search(measurement, 1, fits=False), len(measurement.timesteps)
    cost = measurement.reuse_costs[0]
    num_full = math.floor((count / speedup - cost * count) / (1 - cost) + 1e-6)
    if num_full < 1:
        raise ValueError(f"{speedup:g}x is out of reach")
    full = {step * count // num_full for step in range(num_full)}
    variants = tuple(None if step in full else 0 for step in range(count))
    if search.steps(variants) is None:
        raise ValueError(f"{speedup:g}x needs more reuse steps in a row than were measured")
    return search, variants


RULES = {"dpcache": dpcache, "l2p": l2p, "budcache": budcache}


# ----------------------------------------------------------------------------------------------------------------------
# Rules with a threshold, on measurements of their own


@dataclass(frozen=True)
class ThresholdRule:
    """A rule whose schedules reuse more, the higher its threshold is."""

    method: Callable[[float], CacheMethod]
    """returns the cache with a threshold"""
    compute_ratio: Callable[[float], float]
    """returns the cost of the full run divided by that of the run with a threshold"""

    def threshold(self, speedup: float) -> float:
        """Return, by bisection, the lowest threshold that reaches a speedup; `MAX_THRESHOLD` if none does."""
        low, high = 0.0, MAX_THRESHOLD
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if self.compute_ratio(middle) >= speedup else (middle, high)
        return high


def find_by_threshold(config: CalibrateConfig, run: Runner) -> list[Candidate]:
    """Return the schedules of SmoothCache or MagCache for each target speedup: those of the first of its rules that
    reaches it. A target that is out of reach has no schedule. Raises `ValueError` if all are out of reach."""
    measure, reason = MEASURED_RULES[config.method]
    reference, rules = measure(config, run)
    check_finite(reference)
    candidates, largest = [], 1.0
    for speedup in config.speedups:
        for rule in rules:
            threshold = rule.threshold(speedup)
            ratio = rule.compute_ratio(threshold)
            largest = max(largest, ratio)
            if ratio >= speedup:
                candidates.append(Candidate.on_seed(f"{speedup:g}x", rule.method(threshold), reference, run))
                break
    candidates = [candidate for candidate in candidates if candidate.is_finite]
    if not candidates:
        raise ValueError(f"no target is within reach: {reason} {largest:.2f}x")
    return candidates


def smoothcache(config: CalibrateConfig, run: Runner) -> tuple[Tensor, list[ThresholdRule]]:
    """Return the samples of a full run, and SmoothCache's rule (arXiv 2411.10510) from the changes measured in it."""
    changes = measure_branches(run.pipeline, lambda: run().samples, max_age=config.trials.max_age)
    return changes.reference, [ThresholdRule(changes.method, changes.compute_ratio)]


def magcache(config: CalibrateConfig, run: Runner) -> tuple[Tensor, list[ThresholdRule]]:
    """Return the samples of a full run, and MagCache's rules (arXiv 2506.09045) from the magnitudes measured in it: one
    per limit of reuse steps in a row, the lowest first."""
    with recorded(run.pipeline, config.site, MagnitudeSteps) as (cache, steps):
        reference = run().samples
        cost = cache.costs().of_step((steps.region,))
    magnitudes = steps.magnitudes()
    timesteps = magnitudes.timesteps

    def schedule(threshold: float, max_reused: int) -> ExplicitSchedule:
        by_magnitude = MagnitudeSchedule(magnitudes=magnitudes, threshold=threshold, max_reused=max_reused)
        decisions = by_magnitude.decisions(timesteps)
        full_steps = tuple(step for step, decision in enumerate(decisions) if decision is None)
        return ExplicitSchedule(full_steps=full_steps, num_inference_steps=len(timesteps), timesteps=timesteps)

    def method(max_reused: int, threshold: float) -> CacheMethod:
        return CacheMethod(schedule=schedule(threshold, max_reused), site=config.site)

    def compute_ratio(max_reused: int, threshold: float) -> float:
        return len(timesteps) / schedule(threshold, max_reused).cost(cost)

    limits = range(1, config.trials.max_age + 1)
    return reference, [ThresholdRule(partial(method, limit), partial(compute_ratio, limit)) for limit in limits]


MEASURED_RULES = {
    "smoothcache": (smoothcache, "all branches reused give"),
    "magcache": (magcache, "its first steps are full, so that it gives at most"),
}
