"""WHEN, by what a step shows: a gate looks at how something has changed, and lets a step reuse or not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skipdit.cache.schedule import Decision, Schedule


class Gate:
    """Of one stream of calls: says whether its next step may reuse. Abstract.

    A change is a relative L1 distance, as `skipdit.cache.steppers.relative_change` has it.
    """

    def opens(self) -> bool:
        """Whether the next step may reuse, before anything of it has run."""
        return True

    def accepts(self, change: float) -> bool:
        """Whether a step reuses whose probe has changed so much."""
        return True

    def observe(self, change: float, distance: int) -> None:
        """Learn that what is stored has changed by `change` over `distance` steps, at a full step."""

    def advance(self, *, full: bool) -> None:
        """Count a step that has been run."""


class AdaptiveSchedule(Schedule):
    """What schedules have in common that decide by a change. A threshold of 0 never reuses. Abstract."""

    is_adaptive = True
    follows_each_step = False
    """Whether a change is that since the last step, not since the last full one."""
    threshold: float

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"the threshold must be at least 0, got {self.threshold:g}")

    @property
    def may_stay_full(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.threshold == 0

    def gate(self) -> Gate:
        """Make the gate of a new stream."""
        raise NotImplementedError

    def decisions(self, timesteps: Sequence[float]) -> list[Decision]:
        raise ValueError(f"{type(self).__name__} decides while the model runs")

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
    def follows_each_step(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.accumulate

    def gate(self) -> "ProbeGate":
        return ProbeGate(self)


@dataclass
class ProbeGate(Gate):
    schedule: ProbeSchedule
    total: float = 0.0

    def accepts(self, change: float) -> bool:
        schedule = self.schedule
        change = sum(c * change**power for power, c in enumerate(reversed(schedule.coefficients)))
        self.total = self.total + change if schedule.accumulate else change
        if self.total < schedule.threshold:
            return True
        self.total = 0.0
        return False


@dataclass(frozen=True, kw_only=True)
class RateSchedule(AdaptiveSchedule):
    """After a full step as many steps reuse as fit below `threshold` at the rate at which the stored value has changed
    since the full step before (AdaCache, arXiv 2411.02397, whose codebook is read as this rule), at most
    `max_reused`."""

    threshold: float
    max_reused: int = 5

    def gate(self) -> "RateGate":
        return RateGate(self)


@dataclass
class RateGate(Gate):
    schedule: RateSchedule
    left: int = 0

    def opens(self) -> bool:
        return self.left > 0

    def observe(self, change: float, distance: int) -> None:
        rate, schedule, self.left = change / distance, self.schedule, 0
        if schedule.threshold > 0 and not math.isnan(rate):
            fitting = schedule.threshold / rate if rate else math.inf
            self.left = max(math.ceil(min(fitting, schedule.max_reused + 1)) - 1, 0)

    def advance(self, *, full: bool) -> None:
        if not full:
            self.left -= 1
