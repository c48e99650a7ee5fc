"""What a cache reports about a run."""

from dataclasses import asdict, astuple, dataclass
from operator import add
from typing import Any


@dataclass(frozen=True)
class Counts:
    """Numbers of steps. shallow, held: unconditional predictions beside them, made by a model's shallow path or not at
    all. cost: of everything, in full steps."""

    full: int = 0
    reused: int = 0
    shallow: int = 0
    held: int = 0
    cost: float = 0.0

    @property
    def predictions(self) -> int:
        return self.full + self.reused + self.shallow + self.held

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class CacheSummary:
    """What the cache did in the current run, or in the last one that ended.

    reused: what a reuse step takes from the store, one entry per variant. steps_shallow: unconditional predictions of
    shallow guidance, beside the cache. steps_held: those that were not made, as the conditional one reused.
    compute_ratio: the work of as many full steps over the work done, in FLOPs of the whole model. bytes_held: now.
    peak_bytes_held: since the cache was enabled.
    """

    method: str
    model: str
    num_units: int
    reused: tuple[str, ...]
    steps_full: int
    steps_reused: int
    steps_shallow: int
    steps_held: int
    compute_ratio: float
    bytes_held: int
    peak_bytes_held: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        """Return a table with one row per figure."""
        entries = self.to_dict() | {"reused": ", ".join(self.reused), "compute_ratio": f"{self.compute_ratio:.3f}"}
        rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in entries.items()]
        return "\n".join(("| cache | |", "| --- | --- |", *rows))

    def __str__(self) -> str:
        shallow = f", {self.steps_shallow} shallow, {self.steps_held} held" if self.steps_shallow else ""
        return (
            f"{self.method} on {self.model} ({self.num_units} units; reused: {', '.join(self.reused)}): "
            f"{self.steps_full} full, {self.steps_reused} reused{shallow}, compute ratio {self.compute_ratio:.3f}, "
            f"{self.peak_bytes_held / 2**20:.2f} MiB held at most"
        )
