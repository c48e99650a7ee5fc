"""What a cache keeps of a run: which call continues which stream of calls, and what each stream has stored."""

import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from skipdit.cache.predictor import Derivatives, Values
from skipdit.cache.schedule import Decision
from skipdit.models.flow import Step


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


@dataclass(eq=False)
class Trajectory:
    """One stream of calls: the states of the method's parts, and its counts.

    latents: of the last call. conditioning: labels or text states, which tell a guidance branch from another. compiled:
    the steps whose graphs have been called with its shapes. cost: of its steps, in full steps.
    """

    states: list[PartState]
    latents: weakref.ref[Tensor]
    conditioning: tuple[Tensor, ...]
    layout: tuple
    compiled: set[Step] = field(default_factory=set)
    num_full: int = 0
    num_reused: int = 0
    cost: float = 0.0

    @property
    def bytes_held(self) -> int:
        """Of the memory behind what is stored: a view counts as all that it keeps, what is stored twice counts once."""
        storages = [tensor.untyped_storage() for state in self.states for tensor in state.tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass
class Run:
    """The trajectories of one context, one a guidance branch, and which of them have made the step at `timestep`."""

    origin: Tensor | None
    timestep: float
    trajectories: list[Trajectory] = field(default_factory=list)
    stepped: list[Trajectory] = field(default_factory=list)
    last_call: int = 0

    def find(self, latents: Tensor, conditioning: tuple[Tensor, ...]) -> Trajectory | None:
        """The trajectory that a call continues: the last one if it is given the very same tensors again, else one that
        has not made this step and has the same conditioning; identical tensors before equal ones."""
        if (
            self.stepped
            and self.stepped[-1].latents() is latents
            and _same(self.stepped[-1].conditioning, conditioning)
        ):
            return self.stepped.pop()
        waiting = [each for each in self.trajectories if not any(each is other for other in self.stepped)]
        for matches in (_same, _equal):
            for trajectory in waiting:
                if matches(trajectory.conditioning, conditioning):
                    return trajectory
        return None


def _same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and a.device == b.device and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


@dataclass(frozen=True)
class Counts:
    """Of some runs together. cost: in full steps."""

    full: int = 0
    reused: int = 0
    cost: float = 0.0

    @classmethod
    def of(cls, runs: Iterable[Run]) -> "Counts":
        trajectories = [trajectory for run in runs for trajectory in run.trajectories]
        return cls(
            sum(t.num_full for t in trajectories),
            sum(t.num_reused for t in trajectories),
            sum(t.cost for t in trajectories),
        )


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
