"""WHEN to reuse, decided while the model runs: a gate compares values of the step with those of earlier ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skipdit.cache.schedule import Decision, Schedule


class Gate:
    """Decides for one stream of calls whether its next step may reuse. Abstract.

    A change is a relative L1 distance, as in `skipdit.cache.steppers.relative_change`.
    """

    def opens(self) -> bool:
        """Return true if the next step may reuse; called before any of it has run."""
        return True

    def accepts(self, change: float) -> bool:
        """Return true if a step reuses, given the change of its probe."""
        return True

    def observe(self, change: float, distance: int) -> None:
        """Record, at a full step, that the stored values changed by `change` over `distance` steps."""

    def advance(self, *, full: bool) -> None:
        """Count a step that has run."""


class AdaptiveSchedule(Schedule):
    """A schedule that decides by how much values have changed. A threshold of 0 never reuses. Abstract."""

    is_adaptive = True
    follows_each_step = False
    """If true, changes are measured from the last step instead of the last full one."""
    threshold: float

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"the threshold must be at least 0, got {self.threshold:g}")

    @property
    def may_stay_full(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.threshold == 0

    def gate(self) -> Gate:
        """Return a new gate, for a new stream."""
        raise NotImplementedError

    def decisions(self, timesteps: Sequence[float]) -> list[Decision]:
        raise ValueError(f"{type(self).__name__} decides while the model runs")

    def __str__(self) -> str:
        return f"{self.threshold:g}"


@dataclass(frozen=True, kw_only=True)
class ProbeSchedule(AdaptiveSchedule):
    """Reuse while the probe, taken before the decision, differs by less than `threshold` from that of the last full
    step (First-Block-Cache), or, with `accumulate`, while its changes from step to step add up to less (TeaCache)."""

    threshold: float
    """Relative L1 change from which on a step is full."""
    accumulate: bool = False
    """Add up the changes from step to step."""
    coefficients: tuple[float, ...] = (1.0, 0.0)
    """Polynomial, highest power first, from a change of the probe to one of the output."""

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
    """Reuse after a full step for as long as the change stays below `threshold`, at the rate at which the stored values
    changed since the previous full step (AdaCache, arXiv 2411.02397, with this rule in place of its codebook)."""

    threshold: float
    """Relative L1 change that is allowed since the last full step."""
    max_reused: int = 5
    """The largest number of reuse steps in a row."""

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
