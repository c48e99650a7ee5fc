"""WHEN a step runs in full and when it reuses, as a pure function of the timesteps seen; no tensors here.

Timesteps are falling noise levels on a scale from 0 to 1000. What decides from what a step shows is in `gates.py`.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

# None: the step is full; a number: it reuses, in this variant of the site (counted from 0)
Decision = int | None


class Schedule:
    """Decides whether a step is full. Abstract."""

    is_adaptive = False
    """Whether it decides from what a step shows, so that nothing is known in advance."""
    may_stay_full = False
    """Whether a run without any reuse is acceptable."""

    def decisions(self, timesteps: Sequence[float]) -> list[Decision]:
        """Return what each step of a run does, given its timesteps so far. `ValueError` where the schedule was not made
        for such a run, or is adaptive."""
        raise NotImplementedError

    def check(self, timesteps: Sequence[float]) -> None:
        """Raise `ValueError` where the schedule was not made for a run of these timesteps."""

    def stores(self, timestep: float) -> bool:
        """Whether what a step at `timestep` holds is kept after it."""
        return True

    def for_cost(self, reuse_cost: float) -> Any:
        """Return the schedule for when a reuse step costs this share of a full one."""
        return self


@dataclass(frozen=True, kw_only=True)
class IntervalSchedule(Schedule):
    """Every `interval`-th step is full, and so is every step at or above `start_timestep`. After a step at or below
    `stop_timestep` the count starts again and nothing stays stored (the authors' counting, arXiv 2411.17616).

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

    def decisions(self, timesteps: Sequence[float]) -> list[Decision]:
        found: list[Decision] = []
        count, holds = 0, False
        for timestep in timesteps:
            full = not holds or count % self.interval == 0 or timestep >= self.start_timestep
            found.append(None if full else 0)
            holds = self.stores(timestep)
            count = count + 1 if holds else 0
        return found

    def stores(self, timestep: float) -> bool:
        return timestep > self.stop_timestep

    def __str__(self) -> str:
        window = f"-{self.start_timestep:g}-{self.stop_timestep:g}"
        return f"N{self.interval}" + ("" if window == "-1000-0" else window)


def check_variants(variants: tuple[Any, ...]) -> None:
    """Raise `ValueError` unless each is `None` or a whole number of at least 0."""
    if any(variant is not None and (type(variant) is not int or variant < 0) for variant in variants):
        raise ValueError(f"variants must be whole numbers from 0, got {variants}")


@dataclass(frozen=True, kw_only=True)
class ExplicitSchedule(Schedule):
    """The listed steps (counted from 0, the first always among them) are full, all others reuse.

    timesteps: of the run that it was made for, in sampling order. With them it maps to other runs: a step is full where
    a full timestep was passed since the previous step. variants: the variant in which each step reuses, `None` for full
    ones; by default 0.
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

    def decisions(self, timesteps: Sequence[float]) -> list[Decision]:
        if not self.timesteps:
            if len(timesteps) > self.num_inference_steps:
                raise ValueError(f"this schedule was made for {self.num_inference_steps} steps, got one more")
            return [None if step in self.full_steps else self.variant_at(step) for step in range(len(timesteps))]
        found: list[Decision] = []
        passed = 0  # full steps of the schedule at or above the last timestep
        for timestep in timesteps:
            before, passed = passed, sum(self.timesteps[step] >= timestep - 1e-3 for step in self.full_steps)
            full = not found or passed > before
            found.append(None if full else self.variant_at(self.position(timestep)))
        return found

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
        """The number of variants that its site must have."""
        return 1 + max((variant for variant in self.variants if variant is not None), default=0)

    def position(self, timestep: float) -> int:
        """Return the number of its steps before the first at or below `timestep`."""
        return bisect_left(self.timesteps, -timestep - 1e-3, key=lambda each: -each)

    def variant_at(self, step: int) -> int:
        """Return the variant of a step that reuses; for a full one, of the next that reuses, or else of the last."""
        if not self.variants:
            return 0
        later = (*self.variants[min(step, self.num_inference_steps - 1) :], *reversed(self.variants))
        return next((variant for variant in later if variant is not None), 0)

    def __str__(self) -> str:
        return f"{len(self.full_steps)}of{self.num_inference_steps}"


# How dense full steps should be at each timestep: learned from the bundled class-to-image model alone, by
# `benchmarks/learn_auto.py`; `benchmarks/calibration.md` shows it on models that it was not learned from.
AUTO_TIMESTEPS = (0.0, 25.0, 50.0, 100.0, 200.0, 300.0, 450.0, 600.0, 750.0, 850.0, 925.0, 1000.0)
AUTO_DENSITY = (6.94, 0.79, 2.67, 0.06, 0.39, 0.24, 0.39, 0.39, 0.89, 1.35, 2.21, 27.77)


NOMINAL_STEPS = 50  # of the run for which a speedup is meant


@dataclass(frozen=True, kw_only=True)
class AutoSchedule(Schedule):
    """Full steps are dense at the start and at the end, and sparse in the middle: a step is full once the densities of
    the steps since the last full one add up to 1. The densities are scaled so that a run of 50 evenly spaced
    timesteps saves compute by at least `speedup`, and other runs by about as much."""

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

    def decisions(self, timesteps: Sequence[float]) -> list[Decision]:
        return _by_density(timesteps, auto_scale(self.speedup, self.reuse_cost))

    def __str__(self) -> str:
        return f"{self.speedup:g}"


@lru_cache
def auto_scale(speedup: float, reuse_cost: float) -> float:
    """Return the factor by which densities are multiplied; the first step is full in any case."""
    wanted = (NOMINAL_STEPS / speedup - reuse_cost * NOMINAL_STEPS) / (1 - reuse_cost)
    timesteps = [1000 * (1 - step / NOMINAL_STEPS) for step in range(NOMINAL_STEPS)]
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        full = _by_density(timesteps, middle).count(None)
        low, high = (middle, high) if full <= max(wanted, 1) + 1e-9 else (low, middle)
    return low


def _by_density(timesteps: Sequence[float], scale: float) -> list[Decision]:
    """Make a step full once the densities of the steps since the last full one add up to 1."""
    found: list[Decision] = []
    account = 0.0
    for timestep in timesteps:
        account += scale * density_at(timestep)
        full = not found or account >= 1 - 1e-9
        found.append(None if full else 0)
        account = 0.0 if full else account
    return found


@lru_cache(maxsize=4096)
def density_at(timestep: float) -> float:
    """Return `AUTO_DENSITY` at a timestep, linear in between."""
    right = min(max(bisect_left(AUTO_TIMESTEPS, timestep), 1), len(AUTO_TIMESTEPS) - 1)
    low, high = AUTO_TIMESTEPS[right - 1], AUTO_TIMESTEPS[right]
    share = min(max((timestep - low) / (high - low), 0.0), 1.0)
    return AUTO_DENSITY[right - 1] * (1 - share) + AUTO_DENSITY[right] * share


def resolve(schedule: Schedule, timesteps: Sequence[float]) -> tuple[bool, ...]:
    """Return for each of a run's timesteps, in sampling order, whether its step is full.

    `ValueError` where the schedule was not made for such a run, or is adaptive.
    """
    schedule.check(timesteps)
    return tuple(decision is None for decision in schedule.decisions(timesteps))
