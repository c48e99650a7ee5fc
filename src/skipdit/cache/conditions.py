"""Compares the conditioning of calls, with as few reads from the device as possible."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


def read(scalars: list[Tensor]) -> list[float]:
    """Return scalar tensors as numbers on the host; waits for the device once."""
    if len(scalars) < 2:
        return [scalar.item() for scalar in scalars]
    device = scalars[-1].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack([scalar.to(device, dtype) for scalar in scalars]).tolist()


def _version(tensor: Tensor) -> int | None:
    """Return a tensor's counter of in-place writes; tensors of inference mode have none."""
    return None if tensor.is_inference() else tensor._version


CHUNK = 2**21  # entries of a tensor that are summed together: what they take for a moment is eight times as wide


def checksum(tensor: Tensor) -> Tensor:
    """Return a scalar that depends on every entry of a tensor; it stays on the device."""
    flat = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    flat = flat.reshape(-1)
    sums = [_weighted_sum(flat[start : start + CHUNK], start) for start in range(0, max(len(flat), 1), CHUNK)]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def _weighted_sum(entries: Tensor, start: int) -> Tensor:
    """Return the sum of entries, each with a weight that is told by its place; `start` is that of the first."""
    entries = entries.to(torch.float32 if entries.device.type == "mps" else torch.float64)
    places = torch.arange(start + 1, start + len(entries) + 1, dtype=entries.dtype, device=entries.device)
    weights = places.mul_(0.6180339887498949).frac_()
    return torch.nan_to_num(entries, nan=0.5, posinf=1e9, neginf=-1e9) @ (weights + 0.5)


def _is_choice(value: object) -> bool:
    """Return true if an argument selects what a model does, as SD3's `skip_layers`; a float is a strength instead."""
    match value:
        case list() | tuple():
            return all(map(_is_choice, value))
        case None | bool() | int() | str():
            return True
    return False


def _tensors(arguments: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among arguments, and in their lists, tuples and dicts, as Z-Image's text of each sample."""
    for name, value in arguments.items():
        match value:
            case Tensor():
                yield name, value
            case list() | tuple():
                yield from _tensors({f"{name}.{index}": entry for index, entry in enumerate(value)})
            case Mapping():
                yield from _tensors({f"{name}.{key}": entry for key, entry in value.items()})


class Conditions:
    """The arguments of one call that tell its stream from others: tensors, and choices such as `skip_layers`."""

    def __init__(self, arguments: Mapping[str, object]) -> None:
        self.choices = {name: value for name, value in arguments.items() if _is_choice(value)}
        self.tensors = dict(_tensors(arguments))
        self.versions = {name: _version(tensor) for name, tensor in self.tensors.items()}  # at the call
        self.sums: dict[str, Tensor | float] = {}  # checksums; numbers once they have been read

    def same(self, name: str, other: "Conditions") -> bool:
        """Return true if both have the same tensor object, which was not written in between."""
        return self.tensors.get(name) is other.tensors.get(name) and self.versions.get(name) == other.versions.get(name)

    def add_checksums(self, known: "Sequence[Conditions]" = ()) -> None:
        """Add the checksums of all tensors that have none yet. known: other calls, which may share tensors."""
        for name, tensor in self.tensors.items():
            if name not in self.sums:
                sums = (other.sums[name] for other in known if name in other.sums and self.same(name, other))
                value = None if self.versions[name] is None else next(sums, None)
                self.sums[name] = checksum(tensor) if value is None else value

    def compare(self, others: "Sequence[Conditions]", scalars: list[Tensor]) -> list[float]:
        """Return some scalars as numbers, and read the checksums of this and the other calls in the same wait."""
        if others:
            self.add_checksums(others)
        compared = (self, *others) if others else ()
        sums = [
            (call, name, value) for call in compared for name, value in call.sums.items() if isinstance(value, Tensor)
        ]
        numbers = read([*scalars, *(value for *_, value in sums)])
        for (call, name, _), number in zip(sums, numbers[len(scalars) :], strict=True):
            call.sums[name] = number
        return numbers[: len(scalars)]

    def differing(self, other: "Conditions") -> set[str]:
        """Return the names of choices that differ, and of tensors that are not the same object."""
        same = self.tensors.keys() == other.tensors.keys() and self.versions == other.versions
        if same and self.choices == other.choices:
            return {name for name, tensor in self.tensors.items() if tensor is not other.tensors[name]}
        tensors = self.tensors.keys() | other.tensors.keys()
        return self._chosen(other) | {name for name in tensors if not self.same(name, other)}

    def unequal(self, other: "Conditions") -> set[str]:
        """Return the names of choices and tensors that differ; the checksums of both must have been read."""
        shared = self.tensors.keys() & other.tensors.keys()
        return (
            self._chosen(other)
            | (self.tensors.keys() ^ other.tensors.keys())
            | {
                name
                for name in shared
                if self.tensors[name].shape != other.tensors[name].shape or self.sums[name] != other.sums[name]
            }
        )

    def _chosen(self, other: "Conditions") -> set[str]:
        names = self.choices.keys() | other.choices.keys()
        return {name for name in names if self.choices.get(name, names) != other.choices.get(name, names)}
