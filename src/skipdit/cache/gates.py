"""WHEN to reuse, decided while the model runs: a gate compares values of the step with those of earlier ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skipdit.cache.schedule import Decision, Schedule
from skipdit.options import check_range


@dataclass(frozen=True, kw_only=True)
class AdaptiveSchedule(Schedule):
    """A schedule that decides by how much values have changed. A threshold of 0 never reuses. Abstract."""

    is_adaptive = True
    observes = False
    """If true, the gate observes at each full step by how much the stored values have changed."""

    threshold: float
    """A step is full if the relative L1 change is at least this."""
    num_first: int = 0
    """Number of first steps that are full."""
    max_reused: int | None = None
    """The largest number of reuse steps in a row; `None` for any."""
    num_last: int = 0
    """Number of last steps that are full, if the end of the run is known, as in a pipeline."""

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"the threshold must be at least 0, got {self.threshold:g}")
        check_range(self, "num_first", "num_last", least=0)
        if self.max_reused is not None and self.max_reused < 1:
            raise ValueError(f"max_reused must be at least 1, else no step could reuse, got {self.max_reused}")

    @property
    def may_stay_full(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.threshold == 0

    def gate(self) -> "Gate":
        raise NotImplementedError

    def why_never(self, num_steps: int) -> str | None:
        if self.num_first + self.num_last >= num_steps:
            return f"its {self.num_first} first and {self.num_last} last steps are full"
        return None if self.may_stay_full else "raise its threshold"

    def decisions(self, timesteps: Sequence[float], *, whole: bool = True) -> list[Decision]:
        raise ValueError(f"{type(self).__name__} decides while the model runs")

    def __str__(self) -> str:
        limits = {"w": self.num_first, "r": self.max_reused, "e": self.num_last}
        return f"{self.threshold:g}" + "".join(f"-{letter}{limit}" for letter, limit in limits.items() if limit)


@dataclass
class Gate:
    """Decides for one stream of calls whether its next step may reuse. Abstract.

    A change is a relative L1 distance, as in `skipdit.cache.changes.relative_change`.
    """

    schedule: AdaptiveSchedule
    num_steps: int = 0
    """Number of steps that have run."""
    num_reused: int = 0
    """Number of reuse steps since the last full one."""

    def opens(self, num_coming: int | None = None) -> bool:
        """Return true if the next step may reuse; called before any of it has run. num_coming: number of steps from
        this one to the end of the run; `None` if unknown."""
        limits = self.schedule
        return (
            self.num_steps >= limits.num_first
            and (limits.max_reused is None or self.num_reused < limits.max_reused)
            and (num_coming is None or num_coming > limits.num_last)
        )

    def accepts(self, change: float) -> bool:
        """Return true if a step reuses, given the change of its probe."""
        return True

    def observe(self, change: float, distance: int) -> None:
        """Record, at a full step, that the stored values changed by `change` over `distance` steps."""

    def advance(self, *, full: bool) -> None:
        """Count a step that has run."""
        self.num_steps += 1
        self.num_reused = 0 if full else self.num_reused + 1


@dataclass(frozen=True, kw_only=True)
class ProbeSchedule(AdaptiveSchedule):
    """Reuse while the probe, taken before the decision, differs by less than `threshold` from that of the last full
    step (First-Block-Cache), or, with `accumulate`, while its changes from step to step add up to less (TeaCache)."""

    has_probe = True

    accumulate: bool = False
    """Add up the changes from step to step."""
    coefficients: tuple[float, ...] = (1.0, 0.0)
    """Polynomial, highest power first, from a change of the probe to one of the output."""
    at_rate: bool = False
    """Estimate the change of the stored values instead: that of the probe, times the rate at which they changed with
    it between the last two full steps (EasyCache, arXiv 2507.02860). Until two full steps have run, none reuses."""

    @property
    def follows_each_step(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.accumulate

    def gate(self) -> "ProbeGate":
        return ProbeGate(self)


@dataclass
class ProbeGate(Gate):
    schedule: ProbeSchedule  # pyright: ignore[reportIncompatibleVariableOverride]
    total: float = 0.0

    def accepts(self, change: float) -> bool:
        schedule = self.schedule
        change = sum(c * change**power for power, c in enumerate(reversed(schedule.coefficients)))
        self.total = self.total + change if schedule.accumulate else change
        if self.total < schedule.threshold:
            return True
        self.total = 0.0
        return False

    def advance(self, *, full: bool) -> None:
        super().advance(full=full)
        self.total = 0.0 if full else self.total


@dataclass(frozen=True, kw_only=True)
class RateSchedule(AdaptiveSchedule):
    """Reuse after a full step for as long as the change stays below `threshold`, at the rate at which the stored values
    changed since the previous full step (AdaCache, arXiv 2411.02397, with this rule in place of its codebook)."""

    observes = True
    max_reused: int = 5  # pyright: ignore[reportIncompatibleVariableOverride]

    def gate(self) -> "RateGate":
        return RateGate(self)


@dataclass
class RateGate(Gate):
    schedule: RateSchedule  # pyright: ignore[reportIncompatibleVariableOverride]
    left: int = 0

    def opens(self, num_coming: int | None = None) -> bool:
        return super().opens(num_coming) and self.left > 0

    def observe(self, change: float, distance: int) -> None:
        rate, schedule, self.left = change / distance, self.schedule, 0
        if schedule.threshold > 0 and not math.isnan(rate):
            fitting = schedule.threshold / rate if rate else math.inf
            self.left = max(math.ceil(min(fitting, schedule.max_reused + 1)) - 1, 0)

    def advance(self, *, full: bool) -> None:
        super().advance(full=full)
        if not full:
            self.left -= 1
