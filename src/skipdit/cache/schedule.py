"""WHEN a step runs in full and when it reuses, as a pure function of the timesteps so far; no tensors here.

Timesteps are falling noise levels on a scale from 0 to 1000. Schedules that decide while the model runs are in `gates`.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from skipdit.cache.error_table import ErrorTable

if TYPE_CHECKING:
    from skipdit.cache.gates import Gate

# None: a full step; a number: a reuse step, of this variant of the site (counted from 0)
Decision = int | None


class Schedule:
    """Decides whether a step is full. Abstract."""

    is_adaptive = False
    """True if it decides while the model runs, so that no decision is known in advance."""
    may_stay_full = False
    """True if a run without any reuse is acceptable."""
    counts_own_steps = False
    """True if it counts the steps of each stream, not those of the whole run of which the stream makes a part."""
    num_variants = 1
    """Number of variants that its site must have."""
    holds_if_noisy = False
    """True if stored values are held, not extrapolated, where the scheduler draws noise."""
    has_probe = False
    """True if it compares a probe, which is taken while the first units run or before the model is called."""
    at_rate = False
    """True if it estimates the change of the stored values from that of the probe."""
    follows_each_step = False
    """True if it compares the probe with that of the last step instead of the last full one."""

    def gate(self) -> "Gate | None":
        """Return a gate for a new stream; `None` for a static schedule."""
        return None

    def decisions(self, timesteps: Sequence[float], *, whole: bool = True) -> list[Decision]:
        """Return the decision for each step of a run, given its timesteps; with `whole` false, those so far. Raises
        `ValueError` if the schedule was not made for such a run, or is adaptive."""
        raise NotImplementedError

    def check(self, timesteps: Sequence[float]) -> None:
        """Raise `ValueError` if the schedule was not made for a run of these timesteps."""

    def stores(self, timestep: float) -> bool:
        """Return true if stored values are kept after a step at `timestep`."""
        return True

    def why_never(self, num_steps: int) -> str | None:
        """Return why a run of an adaptive schedule has not reused once; `None` if that is intended."""
        return None

    def for_cost(self, reuse_cost: float) -> "Schedule":
        """Return the schedule for a reuse step that costs this share of a full one."""
        return self


@dataclass(frozen=True, kw_only=True)
class IntervalSchedule(Schedule):
    """Every `interval`-th step is full, counted as the authors do (arXiv 2411.17616)."""

    interval: int
    """Steps from one full step to the next; 1 never reuses: the control, bit-equal to no cache."""
    start_timestep: float = 1000
    """Every step at or above it is full."""
    stop_timestep: float = 0
    """After a step at or below it the count starts again and nothing stays stored."""
    counts_own_steps = True

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

    def decisions(self, timesteps: Sequence[float], *, whole: bool = True) -> list[Decision]:
        decisions: list[Decision] = []
        count, holds = 0, False
        for timestep in timesteps:
            full = not holds or count % self.interval == 0 or timestep >= self.start_timestep
            decisions.append(None if full else 0)
            holds = self.stores(timestep)
            count = count + 1 if holds else 0
        return decisions

    def stores(self, timestep: float) -> bool:
        return timestep > self.stop_timestep

    def __str__(self) -> str:
        window = f"-{self.start_timestep:g}-{self.stop_timestep:g}"
        return f"N{self.interval}" + ("" if window == "-1000-0" else window)


ROUNDED = 0.1  # of a step, by which a timestep of low precision may be off


@dataclass(frozen=True, kw_only=True)
class ExplicitSchedule(Schedule):
    """The listed steps are full, all others reuse."""

    full_steps: tuple[int, ...]
    """Counted from 0, rising; 0 is always among them."""
    num_inference_steps: int
    """Steps of the run that it was made for."""
    timesteps: tuple[float, ...] = ()
    """Timesteps of that run, in sampling order. With them the schedule applies to other runs too: at each timestep the
    same share of steps is full, so the saving is about the same; if the timesteps to come are unknown, as many steps as
    here are full."""
    variants: tuple[int | None, ...] = ()
    """The variant of each reuse step, `None` for full ones; by default 0."""
    table: ErrorTable | None = field(default=None, compare=False)
    """Measured errors, from which runs of other lengths get schedules of their own with the same compute ratio."""

    def __post_init__(self) -> None:
        steps, count = self.full_steps, self.num_inference_steps
        if not steps or steps[0] != 0 or list(steps) != sorted(set(steps)) or steps[-1] >= count:
            raise ValueError(
                f"full_steps must rise from 0 and stay below num_inference_steps {count}, got {list(steps)}"
            )
        falling = list(self.timesteps) == sorted(set(self.timesteps), reverse=True)
        if self.timesteps and (len(self.timesteps) != count or not falling):
            raise ValueError(f"timesteps must be {count} falling numbers, got {list(self.timesteps)}")
        if self.variants and (
            len(self.variants) != count
            or any((variant is None) != (step in steps) for step, variant in enumerate(self.variants))
        ):
            raise ValueError(
                f"variants must be {count}, None for full steps and a number for others, got {self.variants}"
            )
        if any(variant is not None and (type(variant) is not int or variant < 0) for variant in self.variants):
            raise ValueError(f"variants must be whole numbers of at least 0, got {self.variants}")

    def decisions(self, timesteps: Sequence[float], *, whole: bool = True) -> list[Decision]:
        if not self.timesteps:
            if len(timesteps) > self.num_inference_steps:
                raise ValueError(f"this schedule was made for {self.num_inference_steps} steps, got {len(timesteps)}")
            return [None if step in self.full_steps else self.variant_at(step) for step in range(len(timesteps))]
        places, last = [self.place(timestep) for timestep in timesteps], self.num_inference_steps - 1
        if whole and self.table is not None and places != list(range(self.num_inference_steps)):
            planned = self.table.plan(timesteps, self.num_inference_steps / self.cost(self.table.reuse_cost))
            if planned is not None:
                return [None if step in planned else 0 for step in range(len(timesteps))]
        passed = self.num_due(places) if whole else [math.floor(self.num_passed(place) + 1e-6) for place in places]
        full = [not index or passed[index] > passed[index - 1] for index in range(len(places))]
        return [
            None if is_full else self.variant_at(min(round(place), last))
            for is_full, place in zip(full, places, strict=True)
        ]

    def cost(self, reuse_cost: float) -> float:
        """Return the cost of its own run in full steps. reuse_cost: of a reuse step."""
        num_full = len(self.full_steps)
        return num_full + reuse_cost * (self.num_inference_steps - num_full)

    def num_due(self, places: list[float]) -> list[int]:
        """Return how many full steps after the first are due at each step of a run: as many as its length has by the
        share of full steps here, the last one at the last."""
        count, last = len(self.full_steps), self.num_inference_steps - 1
        if len(places) < 2 or count == 1 or places[-1] <= places[0]:
            return [math.floor(self.num_passed(place) + 1e-6) for place in places]
        if places[-1] + (places[-1] - places[-2]) > last + 1e-6:  # the run's last step is in place of the last one
            places = [place * last / places[-1] for place in places]
        num_full = round(count * (len(places) - 1) / (places[-1] - places[0]))
        share = max(num_full - 1, 1) / (count - 1)
        # in a run of another length the first ones come rather early
        early, per_step = (0.0, 0.0) if num_full == count else (0.5, 0.5 / (share * (count - 1)))
        counts = (share * self.num_passed(place) for place in places)
        return [math.floor(passed + early - per_step * passed + 1e-6) for passed in counts]

    def place(self, timestep: float) -> float:
        """Return how many of its own steps are before a timestep, with fractions between two; near one, that one."""
        after = bisect_left(self.timesteps, -timestep, key=lambda level: -level)
        if after == 0:
            return 0.0
        high, low = self.timesteps[after - 1], (*self.timesteps, 0.0)[after]
        place = after - (timestep - low) / (high - low) if high > low else float(after)
        return float(round(place)) if abs(place - round(place)) < ROUNDED else place

    def num_passed(self, place: float) -> float:
        """Return how many full steps are after the first and up to a place: one more from each to the next, bit by
        bit."""
        index = bisect_right(self.full_steps, place) - 1
        if index + 1 == len(self.full_steps):
            return float(index)
        before, after = self.full_steps[index : index + 2]
        return index + (place - before) / (after - before)

    def check(self, timesteps: Sequence[float]) -> None:
        if not self.timesteps and len(timesteps) != self.num_inference_steps:
            raise ValueError(
                f"this schedule was made for {self.num_inference_steps} steps, got a run of {len(timesteps)}; "
                "a schedule that lists its timesteps (skipdit calibrate) applies to other runs too"
            )
        if self.timesteps and timesteps[-1] > timesteps[0]:
            raise ValueError("this schedule was made for falling timesteps, got a run in which they rise")

    @property
    def num_variants(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 1 + max((variant for variant in self.variants if variant is not None), default=0)

    def variant_at(self, step: int) -> int:
        """Return the variant of a reuse step; for a full step, that of the next reuse step, or else of the last one."""
        if not self.variants:
            return 0
        later = (*self.variants[min(step, self.num_inference_steps - 1) :], *reversed(self.variants))
        return next((variant for variant in later if variant is not None), 0)

    def __str__(self) -> str:
        return f"{len(self.full_steps)}of{self.num_inference_steps}"


def resolve(schedule: Schedule, timesteps: Sequence[float]) -> tuple[bool, ...]:
    """Return true for each full step of a run, given its timesteps in sampling order. Raises `ValueError` if the
    schedule was not made for such a run, or is adaptive."""
    schedule.check(timesteps)
    return tuple(decision is None for decision in schedule.decisions(timesteps))
