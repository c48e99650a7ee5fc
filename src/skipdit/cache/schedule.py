"""WHEN a step runs in full and when it reuses. Pure logic on timesteps; no tensors here.

A schedule is a frozen description; `walk` gives the small object that counts one run's steps.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

# None: the step is full; a number: it reuses, in this variant of the site (the first is 0)
Decision = int | None


@runtime_checkable
class Walker(Protocol):
    """Counts the steps of one run. `decide` says what the coming step is if something is stored, and may be asked
    again; `advance` counts it once it has been run."""

    def decide(self, timestep: float) -> Decision: ...

    def stores(self, timestep: float) -> bool:
        """Whether a full step at `timestep` is worth storing; where not, what is stored is dropped after the step."""
        ...

    def advance(self, timestep: float, *, full: bool) -> None: ...


@runtime_checkable
class Schedule(Protocol):
    """Timesteps are on the scale from 0 to 1000, falling."""

    def walk(self) -> Any: ...

    def check(self, timesteps: Sequence[float]) -> None:
        """`ValueError` where the schedule was not made for such a run."""
        ...

    def for_cost(self, reuse_cost: float) -> "Schedule":
        """The schedule where a reuse step costs this share of a full one."""
        ...

    @property
    def is_adaptive(self) -> bool:
        """Whether it decides by what it sees, so that nobody can tell before."""
        ...

    @property
    def may_stay_full(self) -> bool:
        """Whether a run without any reuse is no mistake."""
        ...


class StaticSchedule:
    """What schedules that decide by timesteps alone have in common. Abstract."""

    is_adaptive = False
    may_stay_full = False

    def check(self, timesteps: Sequence[float]) -> None:
        pass

    def for_cost(self, reuse_cost: float) -> Any:
        return self


@dataclass(frozen=True, kw_only=True)
class IntervalSchedule(StaticSchedule):
    """Every `interval`-th step is full, and so is every step at or above `start_timestep`. After a step at or below
    `stop_timestep` the count starts anew and nothing is stored (the authors' counting, arXiv 2411.17616).

    Interval 1 never reuses: it is the control that must be bit-equal to no cache.
    """

    interval: int
    start_timestep: float = 1000
    stop_timestep: float = 0

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")
        if not 0 <= self.stop_timestep < self.start_timestep:
            raise ValueError(
                f"the window must satisfy start > stop >= 0, else no step could reuse; "
                f"got start {self.start_timestep}, stop {self.stop_timestep}"
            )

    @property
    def may_stay_full(self) -> bool:
        return self.interval == 1

    def walk(self) -> "IntervalWalker":
        return IntervalWalker(self)

    def __str__(self) -> str:
        window = f"-{self.start_timestep:g}-{self.stop_timestep:g}"
        return f"N{self.interval}" + ("" if window == "-1000-0" else window)


@dataclass
class IntervalWalker:
    schedule: IntervalSchedule
    count: int = 0

    def decide(self, timestep: float) -> Decision:
        return None if self.count % self.schedule.interval == 0 or timestep >= self.schedule.start_timestep else 0

    def stores(self, timestep: float) -> bool:
        return timestep > self.schedule.stop_timestep

    def advance(self, timestep: float, *, full: bool) -> None:
        self.count = self.count + 1 if timestep > self.schedule.stop_timestep else 0


def check_variants(variants: tuple[Any, ...]) -> None:
    """`ValueError` unless each is a whole number from 0, or `None`."""
    if any(variant is not None and (type(variant) is not int or variant < 0) for variant in variants):
        raise ValueError(f"variants must be whole numbers from 0, got {variants}")


@dataclass(frozen=True, kw_only=True)
class ExplicitSchedule(StaticSchedule):
    """The listed steps (counted from 0, the first always among them) are full, all others reuse.

    timesteps: of the run that it was made for, in sampling order; then it maps to other runs: a step is full where a
    full timestep was passed since the step before. variants: of each step the variant in which it reuses, `None` for
    full ones; by default 0.
    """

    full_steps: tuple[int, ...]
    num_inference_steps: int
    timesteps: tuple[float, ...] = ()
    variants: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        steps, count = self.full_steps, self.num_inference_steps
        if not steps or steps[0] != 0 or list(steps) != sorted(set(steps)) or steps[-1] >= count:
            raise ValueError(
                f"full_steps must rise from 0 and stay below num_inference_steps {count}, got {list(steps)}"
            )
        falling = list(self.timesteps) == sorted(set(self.timesteps), reverse=True)
        if self.timesteps and (len(self.timesteps) != count or not falling):
            raise ValueError(f"timesteps must be {count} falling ones, got {list(self.timesteps)}")
        if self.variants and (
            len(self.variants) != count
            or any((variant is None) != (step in steps) for step, variant in enumerate(self.variants))
        ):
            raise ValueError(f"variants must be {count}, none for full steps and one for others, got {self.variants}")
        check_variants(self.variants)

    def walk(self) -> "ExplicitWalker":
        return ExplicitWalker(self)

    def check(self, timesteps: Sequence[float]) -> None:
        if not self.timesteps and len(timesteps) != self.num_inference_steps:
            raise ValueError(
                f"this schedule was made for {self.num_inference_steps} steps, got a run of {len(timesteps)}; "
                "one that lists its timesteps (skipdit calibrate) fits other runs too"
            )
        if self.timesteps and timesteps[-1] > timesteps[0]:
            raise ValueError("this schedule was made for timesteps that fall, got a run in which they rise")

    @property
    def num_variants(self) -> int:
        """How many variants its site must have."""
        return 1 + max((variant for variant in self.variants if variant is not None), default=0)

    def position(self, timestep: float) -> int:
        """The number of its steps before the first at or below `timestep`."""
        return bisect_left(self.timesteps, -timestep - 1e-3, key=lambda each: -each)

    def variant_at(self, step: int) -> int:
        """The variant of a reusing step; of a full one that of the next step that reuses, or else the last."""
        if not self.variants:
            return 0
        later = (*self.variants[min(step, self.num_inference_steps - 1) :], *reversed(self.variants))
        return next((variant for variant in later if variant is not None), 0)

    def __str__(self) -> str:
        return f"{len(self.full_steps)}of{self.num_inference_steps}"


@dataclass
class ExplicitWalker:
    schedule: ExplicitSchedule
    count: int = 0
    passed: int = 0  # full steps of the schedule at or above the last timestep

    def decide(self, timestep: float) -> Decision:
        schedule = self.schedule
        if not schedule.timesteps:
            if self.count >= schedule.num_inference_steps:
                raise ValueError(f"this schedule was made for {schedule.num_inference_steps} steps, got one more")
            return None if self.count in schedule.full_steps else schedule.variant_at(self.count)
        is_full = self.count == 0 or self._passed(timestep) > self.passed
        return None if is_full else schedule.variant_at(schedule.position(timestep))

    def _passed(self, timestep: float) -> int:
        timesteps = self.schedule.timesteps
        return 0 if not timesteps else sum(timesteps[step] >= timestep - 1e-3 for step in self.schedule.full_steps)

    def stores(self, timestep: float) -> bool:
        return True

    def advance(self, timestep: float, *, full: bool) -> None:
        self.count += 1
        self.passed = self._passed(timestep)


# By timestep, how dense full steps want to be: learned from the bundled class-to-image model alone, by
# `benchmarks/learn_auto.py`; `benchmarks/calibration.md` has it on models that it was not learned from.
AUTO_TIMESTEPS = (0.0, 25.0, 50.0, 100.0, 200.0, 300.0, 450.0, 600.0, 750.0, 850.0, 925.0, 1000.0)
AUTO_DENSITY = (6.94, 0.79, 2.67, 0.06, 0.39, 0.24, 0.39, 0.39, 0.89, 1.35, 2.21, 27.77)


NOMINAL_STEPS = 50  # of the run on which a speedup is aimed at


@dataclass(frozen=True, kw_only=True)
class AutoSchedule(StaticSchedule):
    """Full at the start and at the end, sparse in the middle, with distances that grow evenly: a step is full once the
    densities of the steps since the last full one add up to 1. As dense as to save compute by at least `speedup` on a
    run of 50 steps whose timesteps are spread evenly; by about as much on others."""

    speedup: float = 1.8
    reuse_cost: float = 0.0
    may_stay_full = True  # a short run, as of image-to-image, may have nothing to spare

    def __post_init__(self) -> None:
        if not self.speedup >= 1:
            raise ValueError(f"the speedup must be at least 1, got {self.speedup:g}")

    def for_cost(self, reuse_cost: float) -> "AutoSchedule":
        most = NOMINAL_STEPS / (1 + reuse_cost * (NOMINAL_STEPS - 1))  # one full step
        if self.speedup > most:
            raise ValueError(
                f"a speedup of {self.speedup:g} is out of reach: a reuse step costs {reuse_cost:.2f} of a full one, so "
                f"at most {most:.1f} is possible"
            )
        return replace(self, reuse_cost=reuse_cost)

    def walk(self) -> "AutoWalker":
        return AutoWalker(auto_scale(self.speedup, self.reuse_cost))

    def __str__(self) -> str:
        return f"{self.speedup:g}"


@lru_cache
def auto_scale(speedup: float, reuse_cost: float) -> float:
    """By what the densities are to be multiplied; the first step is full in any case."""
    wanted = (NOMINAL_STEPS / speedup - reuse_cost * NOMINAL_STEPS) / (1 - reuse_cost)
    timesteps = [1000 * (1 - step / NOMINAL_STEPS) for step in range(NOMINAL_STEPS)]
    densities = [density_at(timestep) for timestep in timesteps]
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        walker, full = AutoWalker(middle), 0
        for step, timestep in enumerate(timesteps):
            is_full = step == 0 or walker.due(densities[step])
            full += is_full
            walker.advance(timestep, full=is_full)
        low, high = (middle, high) if full <= max(wanted, 1) + 1e-9 else (low, middle)
    return low


def density_at(timestep: float) -> float:
    """`AUTO_DENSITY`, linear in between."""
    right = min(max(bisect_left(AUTO_TIMESTEPS, timestep), 1), len(AUTO_TIMESTEPS) - 1)
    low, high = AUTO_TIMESTEPS[right - 1], AUTO_TIMESTEPS[right]
    share = min(max((timestep - low) / (high - low), 0.0), 1.0)
    return AUTO_DENSITY[right - 1] * (1 - share) + AUTO_DENSITY[right] * share


@dataclass
class AutoWalker:
    scale: float
    account: float = 0.0  # of the steps since the last full one

    def decide(self, timestep: float) -> Decision:
        return None if self.due(density_at(timestep)) else 0

    def due(self, density: float) -> bool:
        return self.account + self.scale * density >= 1 - 1e-9

    def stores(self, timestep: float) -> bool:
        return True

    def advance(self, timestep: float, *, full: bool) -> None:
        self.account = 0.0 if full else self.account + self.scale * density_at(timestep)


# ----------------------------------------------------------------------------------------------------------------------
# Adaptive: what a step shows decides


class AdaptiveSchedule(StaticSchedule):
    """What schedules that decide by a relative L1 distance have in common. Abstract. A threshold of 0 never reuses."""

    is_adaptive = True
    follows_each_step = False  # whether a change is that since the last step, not since the last full one
    threshold: float

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"the threshold must be at least 0, got {self.threshold:g}")

    @property
    def may_stay_full(self) -> bool:
        return self.threshold == 0

    def __str__(self) -> str:
        return f"{self.threshold:g}"


@dataclass(frozen=True, kw_only=True)
class ProbeSchedule(AdaptiveSchedule):
    """A step reuses while a probe, seen before the decision, is nearer than `threshold`: to the last full step's
    (First-Block-Cache), or, with `accumulate`, while the sum of its changes from step to step is (TeaCache).

    coefficients: of a polynomial, highest power first, that turns a change of the probe into one of the output.
    """

    threshold: float
    accumulate: bool = False
    coefficients: tuple[float, ...] = (1.0, 0.0)

    @property
    def follows_each_step(self) -> bool:
        return self.accumulate

    def walk(self) -> "ProbeWalker":
        return ProbeWalker(self)


@dataclass
class ProbeWalker:
    schedule: ProbeSchedule
    total: float = 0.0

    def decide(self, timestep: float) -> Decision:
        return 0

    def accepts(self, change: float) -> bool:
        """Whether a step whose probe has changed so much reuses."""
        schedule = self.schedule
        change = sum(c * change**power for power, c in enumerate(reversed(schedule.coefficients)))
        self.total = self.total + change if schedule.accumulate else change
        if self.total < schedule.threshold:
            return True
        self.total = 0.0
        return False

    def stores(self, timestep: float) -> bool:
        return True

    def advance(self, timestep: float, *, full: bool) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class RateSchedule(AdaptiveSchedule):
    """After a full step as many steps reuse as fit below `threshold` at the rate at which the stored value has changed
    since the full step before (AdaCache, arXiv 2411.02397, whose codebook is read as this rule), at most
    `max_reused`."""

    threshold: float
    max_reused: int = 5

    def walk(self) -> "RateWalker":
        return RateWalker(self)


@dataclass
class RateWalker:
    schedule: RateSchedule
    left: int = 0

    def decide(self, timestep: float) -> Decision:
        return 0 if self.left > 0 else None

    def observe(self, change: float, distance: int) -> None:
        """The stored value has changed by `change` in `distance` steps."""
        rate, schedule, self.left = change / distance, self.schedule, 0
        if schedule.threshold > 0 and not math.isnan(rate):
            fitting = schedule.threshold / rate if rate else math.inf
            self.left = max(math.ceil(min(fitting, schedule.max_reused + 1)) - 1, 0)

    def stores(self, timestep: float) -> bool:
        return True

    def advance(self, timestep: float, *, full: bool) -> None:
        if not full:
            self.left -= 1


def resolve(schedule: Schedule, timesteps: Sequence[float]) -> tuple[bool, ...]:
    """For each of a run's timesteps, in sampling order, whether it is full.

    `ValueError` where the schedule was not made for such a run, or decides by what it sees.
    """
    if schedule.is_adaptive:
        raise ValueError(f"{type(schedule).__name__} decides while the model runs")
    schedule.check(timesteps)
    walker, stored, full = schedule.walk(), False, []
    for timestep in timesteps:
        is_full = not stored or walker.decide(timestep) is None
        full.append(is_full)
        stored = walker.stores(timestep)
        walker.advance(timestep, full=is_full)
    return tuple(full)
