"""What a cache keeps of one stream of calls, and what it says about a run."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from skipdit.cache.predictor import Derivatives, Values
from skipdit.cache.schedule import Decision


@dataclass(eq=False)
class PartState:
    """Of one choice (when, what, how) of a method in one stream: its count of steps and what it has stored.

    probe: what an adaptive schedule saw, at the last full step or at the last step.
    """

    walker: Any
    stored: Derivatives = ()
    steps_since_full: int = 0
    probe: Values = field(default_factory=dict)

    def decide(self, timestep: float) -> Decision:
        return self.walker.decide(timestep) if self.stored else None

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for values in (*self.stored, self.probe) for tensor in values.values()]


@dataclass(frozen=True)
class Counts:
    """Of steps. cost: in full steps."""

    full: int = 0
    reused: int = 0
    cost: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.full + other.full, self.reused + other.reused, self.cost + other.cost)


@dataclass(frozen=True)
class CacheSummary:
    """What the cache did in the current run, or in the last one that has ended.

    reused: what a reuse step takes from the store, one entry a variant. `compute_ratio`: the work of all steps in full
    over the work done, where each unit counts alike. `bytes_held`: now. `peak_bytes_held`: since enabled.
    """

    method: str
    model: str
    num_units: int
    reused: tuple[str, ...]
    steps_full: int
    steps_reused: int
    compute_ratio: float
    bytes_held: int
    peak_bytes_held: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        """A table, one row a figure."""
        entries = self.to_dict() | {"reused": ", ".join(self.reused), "compute_ratio": f"{self.compute_ratio:.3f}"}
        rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in entries.items()]
        return "\n".join(("| cache | |", "| --- | --- |", *rows))

    def __str__(self) -> str:
        return (
            f"{self.method} on {self.model} ({self.num_units} units; reused: {', '.join(self.reused)}): "
            f"{self.steps_full} full, {self.steps_reused} reused, compute ratio {self.compute_ratio:.3f}, "
            f"{self.peak_bytes_held / 2**20:.2f} MiB held at most"
        )
