"""Tells the conditioning of one call from that of another, asking the device for as little as possible."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def read(questions: list[Tensor]) -> list[float]:
    """Return the numbers on the host, after a single wait for the device."""
    if len(questions) < 2:
        return [each.item() for each in questions]
    device = questions[-1].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack([each.to(device, dtype) for each in questions]).tolist()


def _version(tensor: Tensor) -> int | None:
    """Return a counter of writes in place; tensors of inference mode have none."""
    return None if tensor.is_inference() else tensor._version


def checksum(tensor: Tensor) -> Tensor:
    """Return a number that differs where contents do; it stays on the tensor's device and is not read."""
    flat = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    flat = flat.reshape(-1).to(torch.float32 if tensor.device.type == "mps" else torch.float64)
    weights = torch.arange(1, len(flat) + 1, dtype=flat.dtype, device=flat.device).mul_(0.6180339887498949).frac_()
    return torch.nan_to_num(flat, nan=0.5, posinf=1e9, neginf=-1e9) @ (weights + 0.5)


def _is_choice(value: Any) -> bool:
    """Whether an argument chooses what a model does, as SD3's `skip_layers` does; a float is a strength, no choice."""
    if isinstance(value, (list, tuple)):
        return all(_is_choice(each) for each in value)
    return value is None or isinstance(value, (bool, int, str))


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among arguments and in lists: Z-Image takes its text states as one tensor per sample."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list):
            yield from _tensors({f"{name}.{index}": each for index, each in enumerate(value)})


class Conditions:
    """The arguments of one call that tell its stream from others: tensors, and choices such as `skip_layers`.

    versions: of the tensors at the call. sums: their checksums, numbers once they have been read.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.choices = {name: value for name, value in arguments.items() if _is_choice(value)}
        self.tensors = dict(_tensors(arguments))
        self.versions = {name: _version(tensor) for name, tensor in self.tensors.items()}
        self.sums: dict[str, Tensor | float] = {}

    def same(self, name: str, other: "Conditions") -> bool:
        """Whether both have the very same tensor, and it was not written in between."""
        return self.tensors.get(name) is other.tensors.get(name) and self.versions.get(name) == other.versions.get(name)

    def add_checksums(self, known: "Sequence[Conditions]" = ()) -> None:
        """Add the checksums of all tensors that have none yet. known: other calls, which may share some of them."""
        for name, tensor in self.tensors.items():
            if name not in self.sums:
                sums = (each.sums[name] for each in known if name in each.sums and self.same(name, each))
                value = None if self.versions[name] is None else next(sums, None)
                self.sums[name] = checksum(tensor) if value is None else value

    def compare(self, others: "Sequence[Conditions]", questions: list[Tensor]) -> list[float]:
        """Return the answers to some questions, reading the checksums of this and the other calls in the same wait."""
        if others:
            self.add_checksums(others)
        compared = (self, *others) if others else ()
        sums = [
            (each, name, value) for each in compared for name, value in each.sums.items() if isinstance(value, Tensor)
        ]
        answers = read([*questions, *(value for *_, value in sums)])
        for (each, name, _), answer in zip(sums, answers[len(questions) :], strict=True):
            each.sums[name] = answer
        return answers[: len(questions)]

    def differing(self, other: "Conditions") -> set[str]:
        """Return the names of choices that differ, and of tensors that are not the very same."""
        tensors = self.tensors.keys() | other.tensors.keys()
        return self._chosen(other) | {name for name in tensors if not self.same(name, other)}

    def unequal(self, other: "Conditions") -> set[str]:
        """Return the names of choices and contents that differ; the checksums of both must have been read."""
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
