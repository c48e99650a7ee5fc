"""What a cache reports about a run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Counts:
    """Numbers of steps. shallow: calls beside them that ran a model's shallow path. cost: of all, in full steps."""

    full: int = 0
    reused: int = 0
    shallow: int = 0
    cost: float = 0.0

    @property
    def calls(self) -> int:
        return self.full + self.reused + self.shallow

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            full=self.full + other.full,
            reused=self.reused + other.reused,
            shallow=self.shallow + other.shallow,
            cost=self.cost + other.cost,
        )


@dataclass(frozen=True)
class CacheSummary:
    """What the cache did in the current run, or in the last one that ended.

    reused: what a reuse step takes from the store, one entry per variant. steps_shallow: unconditional predictions of
    shallow guidance, which are made beside the cache. compute_ratio: the work of as many full steps over the work done,
    in FLOPs of the whole model. bytes_held: now. peak_bytes_held: since the cache was enabled.
    """

    method: str
    model: str
    num_units: int
    reused: tuple[str, ...]
    steps_full: int
    steps_reused: int
    steps_shallow: int
    compute_ratio: float
    bytes_held: int
    peak_bytes_held: int

    def together_with(self, others: Sequence["CacheSummary"]) -> "CacheSummary":
        """Return the summary of several models that share a run, as if all steps were one model's."""
        everything = (self, *others)
        steps = [each.steps_full + each.steps_reused + each.steps_shallow for each in everything]
        cost = sum(count / each.compute_ratio for count, each in zip(steps, everything, strict=True))
        return replace(
            self,
            steps_full=sum(each.steps_full for each in everything),
            steps_reused=sum(each.steps_reused for each in everything),
            steps_shallow=sum(each.steps_shallow for each in everything),
            compute_ratio=sum(steps) / cost if cost else 1.0,
            bytes_held=sum(each.bytes_held for each in everything),
            peak_bytes_held=sum(each.peak_bytes_held for each in everything),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        """Return a table with one row per figure."""
        entries = self.to_dict() | {"reused": ", ".join(self.reused), "compute_ratio": f"{self.compute_ratio:.3f}"}
        rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in entries.items()]
        return "\n".join(("| cache | |", "| --- | --- |", *rows))

    def __str__(self) -> str:
        shallow = f", {self.steps_shallow} shallow" if self.steps_shallow else ""
        return (
            f"{self.method} on {self.model} ({self.num_units} units; reused: {', '.join(self.reused)}): "
            f"{self.steps_full} full, {self.steps_reused} reused{shallow}, compute ratio {self.compute_ratio:.3f}, "
            f"{self.peak_bytes_held / 2**20:.2f} MiB held at most"
        )
