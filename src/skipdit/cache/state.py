"""The report of a cache on a run, and the memory of what it stores."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storages_of(tensor: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the memory of a tensor; of one that wraps others, as the sum over ranks of tensor parallelism, theirs."""
    if is_traceable_wrapper_subclass(tensor):  # private to torch
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages_of(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


def bytes_of(tensors: list[Tensor]) -> int:
    """Return the size of the memory that tensors keep alive: a view counts as its whole tensor, shared memory once."""
    storages = [storage for tensor in tensors for storage in storages_of(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class StepCounts(NamedTuple):
    """Numbers of steps, and of unconditional predictions made in other ways."""

    full: int = 0
    reused: int = 0
    shallow: int = 0
    """Unconditional predictions by the model's shallow path."""
    held: int = 0
    """Unconditional predictions that were not made: their difference from the conditional ones was held."""
    cost: float = 0.0
    """Cost of all of them, in full steps."""

    @property
    def predictions(self) -> int:
        return self.full + self.reused + self.shallow + self.held

    def __add__(self, other: "StepCounts") -> "StepCounts":  # pyright: ignore[reportIncompatibleMethodOverride]
        return StepCounts._make(map(add, self, other))


@dataclass(frozen=True)
class CacheSummary:
    """The work of the cache in the current run, or in the last one that ended."""

    method: str
    """The spec, or the schedule's file."""
    model: str
    """Name of its class."""
    num_units: int
    """0 if skipdit does not know them, or did not need to."""
    reused: tuple[str, ...]
    """The values that reuse steps take from the store, one entry per variant."""
    steps_full: int
    steps_reused: int
    steps_shallow: int
    """Unconditional predictions of shallow guidance, in addition to the steps."""
    steps_held: int
    """Unconditional predictions that were not made, as the conditional step reused."""
    compute_ratio: float
    """FLOPs of the whole model with every step in full, over the FLOPs of the run."""
    bytes_held: int
    """Memory of the store now."""
    peak_bytes_held: int
    """Largest memory of the store since the cache was enabled."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        """Return a table with one row per figure."""
        entries = self.to_dict() | {"reused": ", ".join(self.reused), "compute_ratio": f"{self.compute_ratio:.3f}"}
        rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in entries.items()]
        return "\n".join(("| cache | |", "| --- | --- |", *rows))

    def __str__(self) -> str:
        shallow = f", {self.steps_shallow} shallow, {self.steps_held} held" if self.steps_shallow else ""
        units = f"{self.num_units} units; " if self.num_units else ""
        return (
            f"{self.method} on {self.model} ({units}reused: {', '.join(self.reused)}): "
            f"{self.steps_full} full, {self.steps_reused} reused{shallow}, compute ratio {self.compute_ratio:.3f}, "
            f"{self.peak_bytes_held / 2**20:.2f} MiB held at most"
        )
