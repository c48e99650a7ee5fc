"""What a cache keeps of a run: which call continues which stream of calls, and what each stream has stored."""

import weakref
from dataclasses import asdict, dataclass, field
from operator import is_
from typing import Any, NamedTuple

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
class Conditions:
    """What tells a guidance branch from another: labels and text states, and arguments that are no tensors (SD3's
    `skip_layers`).

    versions: at the call. They grow where a tensor is filled anew in place; those of inference mode do not count.
    """

    tensors: list[Tensor]
    options: list[Any]
    versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.versions = [0 if tensor.is_inference() else tensor._version for tensor in self.tensors]

    def are(self, other: "Conditions") -> bool:
        """Whether they are the very same tensors."""
        return self._fit(other) and all(map(is_, self.tensors, other.tensors))

    def equal(self, other: "Conditions") -> bool:
        return self._fit(other) and all(
            a.shape == b.shape and a.device == b.device and torch.equal(a, b)
            for a, b in zip(self.tensors, other.tensors, strict=True)
        )

    def _fit(self, other: "Conditions") -> bool:
        return self.options == other.options and len(self.tensors) == len(other.tensors)


@dataclass(frozen=True)
class Counts:
    """Of steps. cost: in full steps."""

    full: int = 0
    reused: int = 0
    cost: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.full + other.full, self.reused + other.reused, self.cost + other.cost)


@dataclass(eq=False)
class Trajectory:
    """One stream of calls: the states of the method's parts, and its counts.

    layout: shape, dtype and device of its latents. latents, conditions: of the last call. compiled: the steps
    whose graphs have been called with its shapes. cost: of its steps, in full steps.
    """

    states: list[PartState]
    layout: tuple
    latents: weakref.ref[Tensor]
    conditions: Conditions
    compiled: set[Step] = field(default_factory=set)
    num_full: int = 0
    num_reused: int = 0
    cost: float = 0.0

    @property
    def counts(self) -> Counts:
        return Counts(self.num_full, self.num_reused, self.cost)

    @property
    def bytes_held(self) -> int:
        """Of the memory behind what is stored: a view counts as all that it keeps, what is stored twice counts once."""
        storages = [tensor.untyped_storage() for state in self.states for tensor in state.tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Place(NamedTuple):
    """Where a call stands in its run. timesteps: the list of a watched scheduler that has its `timestep`. coming: that
    list from there on. position: its place in the list, where the call was handed a view of it."""

    timestep: float
    timesteps: Tensor | None = None
    coming: list[float] | None = None
    position: int | None = None

    def since(self, other: "Place") -> float:
        """How far it is behind `other` in their run, below 0 where it is before: in steps of their list, or by how much
        the timestep has fallen."""
        if self.position is not None and other.position is not None:
            return self.position - other.position
        return other.timestep - self.timestep


@dataclass
class Run:
    """The trajectories of one context, one a guidance branch, and which of them have made the step at `place`. dropped:
    the counts of those that it keeps no more."""

    place: Place
    trajectories: list[Trajectory] = field(default_factory=list)
    stepped: list[Trajectory] = field(default_factory=list)
    dropped: Counts = Counts()
    last_call: int = 0

    @property
    def counts(self) -> Counts:
        return sum((each.counts for each in self.trajectories), self.dropped)

    def goes_on(self, place: Place) -> bool:
        """Whether a call belongs to this run: it is of the same list of timesteps, and not behind the run. A value that
        a list happens to have, or has not, tells nothing."""
        known = self.place
        if place.timesteps is not known.timesteps:
            both_by_value = place.position is None and known.position is None
            if not both_by_value or (place.timesteps is not None and known.timesteps is not None):
                return False
        return place.since(known) >= 0

    def moves_to(self, place: Place) -> None:
        if place.since(self.place) > 0:
            self.stepped = []
        self.place = place if place.timesteps is self.place.timesteps else Place(place.timestep)

    @property
    def waiting(self) -> list[Trajectory]:
        """The trajectories that have not made the step at `place`."""
        return [trajectory for trajectory in self.trajectories if trajectory not in self.stepped]

    def find(self, latents: Tensor, layout: tuple, conditions: Conditions) -> Trajectory | None:
        """The trajectory that a call continues: the last one if it is given the very same tensors again, else one that
        has not made this step and has the same conditions; identical tensors before equal ones."""
        if self.stepped:
            last = self.stepped[-1]
            if (
                last.latents() is latents
                and last.layout == layout
                and last.conditions.are(conditions)
                and last.conditions.versions == conditions.versions
            ):
                return self.stepped.pop()
        waiting = [trajectory for trajectory in self.waiting if trajectory.layout == layout]
        for matches in (conditions.are, conditions.equal):
            for trajectory in waiting:
                if matches(trajectory.conditions):
                    return trajectory
        return None

    def drop_oldest(self) -> None:
        """Of the trajectories that have not made this step; its counts stay."""
        for trajectory in self.waiting[:1]:
            self.trajectories.remove(trajectory)
            self.dropped += trajectory.counts


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
