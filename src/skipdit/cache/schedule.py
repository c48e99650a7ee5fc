"""WHEN a step runs in full and when it reuses. Pure logic on timesteps; no tensors here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """Decides from the count of steps since the last reset and the timestep (0 to 1000)."""

    def is_full(self, count: int, timestep: float) -> bool: ...

    def resets_after(self, timestep: float) -> bool: ...

    def check(self, num_inference_steps: int) -> None:
        """`ValueError` where the schedule was made for another number of steps."""
        ...


@dataclass(frozen=True, kw_only=True)
class IntervalSchedule:
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

    def is_full(self, count: int, timestep: float) -> bool:
        return count % self.interval == 0 or timestep >= self.start_timestep

    def resets_after(self, timestep: float) -> bool:
        return timestep <= self.stop_timestep

    def check(self, num_inference_steps: int) -> None:
        pass

    def __str__(self) -> str:
        window = f"-{self.start_timestep:g}-{self.stop_timestep:g}"
        return f"N{self.interval}" + ("" if window == "-1000-0" else window)


@dataclass(frozen=True, kw_only=True)
class ExplicitSchedule:
    """The listed steps (counted from 0, the first always among them) are full, all others reuse."""

    full_steps: tuple[int, ...]
    num_inference_steps: int

    def __post_init__(self) -> None:
        steps = self.full_steps
        if not steps or steps[0] != 0 or list(steps) != sorted(set(steps)) or steps[-1] >= self.num_inference_steps:
            raise ValueError(
                f"full_steps must rise from 0 and stay below num_inference_steps {self.num_inference_steps}, "
                f"got {list(steps)}"
            )

    def is_full(self, count: int, timestep: float) -> bool:
        if count >= self.num_inference_steps:
            raise ValueError(f"this schedule was made for {self.num_inference_steps} steps, got one more")
        return count in self.full_steps

    def resets_after(self, timestep: float) -> bool:
        return False

    def check(self, num_inference_steps: int) -> None:
        if num_inference_steps != self.num_inference_steps:
            raise ValueError(
                f"this schedule was made for {self.num_inference_steps} steps, got a run of {num_inference_steps}"
            )

    def __str__(self) -> str:
        return f"{len(self.full_steps)}of{self.num_inference_steps}"


@dataclass
class StepCounter:
    """Walks one trajectory: `peek` says what the coming step is, `advance` counts it once it has been run."""

    schedule: Schedule
    count: int = 0
    stored: bool = False

    def peek(self, timestep: float) -> bool:
        """Whether the step at `timestep` is full."""
        return not self.stored or self.schedule.is_full(self.count, timestep)

    def advance(self, timestep: float) -> None:
        self.count += 1
        self.stored = True
        if self.schedule.resets_after(timestep):
            self.count = 0
            self.stored = False


def resolve(schedule: Schedule, timesteps: Sequence[float]) -> tuple[bool, ...]:
    """For each of a run's timesteps, in sampling order, whether it is full.

    `ValueError` where the schedule was made for another number of steps.
    """
    schedule.check(len(timesteps))
    counter, full = StepCounter(schedule), []
    for timestep in timesteps:
        full.append(counter.peek(timestep))
        counter.advance(timestep)
    return tuple(full)
