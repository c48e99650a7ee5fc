"""The work of a whole model as one region: a reuse step does not call the model at all."""

from collections.abc import Callable
from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor

from skipdit.interfaces import Latents, ModelOutput
from skipdit.models.forward_plan import Region, Values

INPUT = "input"


@dataclass(frozen=True, kw_only=True)
class WholeModel(Region):
    """The output of the model minus its input. Stored as both, so that what has no counterpart in the input (a learned
    variance, a second output) is reused as it was."""

    is_whole = True
    beside_first: bool = False
    """Take the output minus that of the guidance branch that was called first at the same step."""

    @property
    def name(self) -> str:
        return "guidance" if self.beside_first else "whole model"

    @property
    def covered(self) -> tuple[int, ...]:
        return ()

    def leaves_out(self, unit: int) -> bool:
        return True

    def __str__(self) -> str:
        return f"the output of the whole model minus {'that of the first branch' if self.beside_first else 'its input'}"


def is_output(key: str) -> bool:
    """Return true for a key of stored values that is part of the model's output, not of its input."""
    return not key.startswith(INPUT)


def values_of(output: ModelOutput, latents: Latents) -> dict[str, Tensor]:
    """Return the values of the region: each tensor of the output, and the part of the latents that it overlaps."""
    values, inputs = {}, tensors_in(latents)
    for index, tensor in enumerate(tensors_in(output)):
        values[str(index)] = tensor.detach().clone()
        if index < len(inputs) and inputs[index].ndim == tensor.ndim:
            values[f"{INPUT} {index}"] = overlap(inputs[index], tensor).detach().clone()
    if not values:
        raise ValueError(f"a cache of the whole model needs tensors in its output, got {type(output).__name__}")
    return values


def restored(values: Values, latents: Latents, form: ModelOutput) -> ModelOutput:
    """Return the output of a reuse step, in the form of an earlier one: the stored output plus the change of the input
    since."""
    tensors, inputs = [], tensors_in(latents)
    for index in range(sum(map(is_output, values))):
        tensor = values[str(index)].clone()
        before = values.get(f"{INPUT} {index}")
        if before is not None:
            overlap(tensor, before).add_(overlap(inputs[index], before) - before)
        tensors.append(tensor)
    remaining = iter(tensors)
    return map_tensors(form, lambda _: next(remaining))


def form_of(output: ModelOutput) -> ModelOutput:
    """Return a model's output with empty tensors."""
    return map_tensors(output, lambda tensor: tensor.new_empty(0))


def overlap(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the view of the entries that both have, from the first in each dimension: an output may have more channels
    than the input (a variance), or fewer (conditioning among the input's)."""
    return tensor[tuple(slice(min(sizes)) for sizes in zip(tensor.shape, other.shape, strict=True))]


def tensors_in(output: ModelOutput | Latents) -> list[Tensor]:
    """Return the tensors of a model's output or input, in the order of `map_tensors`."""
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(output, keep)
    return tensors


def map_tensors(output: ModelOutput, change: Callable[[Tensor], Tensor]) -> ModelOutput:
    """Return a model's output with `change` applied to every tensor in it."""
    match output:
        case Tensor():
            return change(output)
        case BaseOutput():
            return type(output)(**{key: map_tensors(value, change) for key, value in output.items()})
        case list() | tuple():
            return type(output)(map_tensors(value, change) for value in output)
    return output
