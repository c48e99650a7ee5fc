"""Perturbation surfaces: how much features change when weights or inputs move along two random directions (Li et al.,
arXiv 1712.09913).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from skipdit.analysis.record import record_outputs
from skipdit.analysis.trajectory import cosine_similarity
from skipdit.models.dit import DiT

Quantity = Literal["weights", "inputs"]


def filter_normalised(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random direction of which every row (the weights of one output) has the norm of the weight's row; zero
    for biases and norms, as in the paper."""
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    direction = torch.randn(weight.shape, generator=generator).to(weight)
    rows = direction.flatten(1).norm(dim=1).clamp(min=torch.finfo(weight.dtype).tiny)
    factor = weight.detach().flatten(1).norm(dim=1) / rows
    return direction * factor.view(-1, *[1] * (weight.ndim - 1))


def sample_normalised(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random direction (batch, ...) with the norm of each sample."""
    direction = torch.randn(inputs.shape, generator=generator).to(inputs)
    factor = inputs.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)
    return direction * factor.view(-1, *[1] * (inputs.ndim - 1))


@torch.no_grad()
def perturbation_surface(
    model: DiT,
    latents: Tensor,
    timestep: Tensor,
    class_labels: Tensor,
    coefficients: Sequence[float],
    *,
    quantity: Quantity,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> Tensor:
    """Return the cosine similarity (n, n) of the last unit's output to that without a perturbation, for each pair of
    coefficients of the two directions; rows belong to the second direction. The similarity is a mean over tokens and
    samples. The model's own weights are not touched. Calls `advance` after each row.
    """
    generator = torch.Generator().manual_seed(seed)
    last = f"blocks.{len(model.blocks) - 1}"
    weights = dict(model.named_parameters())
    weight_directions = [
        {name: filter_normalised(weight, generator) for name, weight in weights.items()} for _ in range(2)
    ]
    input_directions = [sample_normalised(latents, generator) for _ in range(2)]

    def features(alpha: float, beta: float) -> Tensor:
        with record_outputs(model, [last]) as recorded:
            if quantity == "weights":
                first, second = weight_directions
                new_weights = {
                    name: weight + alpha * first[name] + beta * second[name] for name, weight in weights.items()
                }
                torch.func.functional_call(model, new_weights, (latents, timestep, class_labels))
            else:
                first, second = input_directions
                model(latents + alpha * first + beta * second, timestep, class_labels)
        return recorded[last][0]

    reference = features(0.0, 0.0)
    surface = torch.empty(len(coefficients), len(coefficients))
    for row, beta in enumerate(coefficients):
        for column, alpha in enumerate(coefficients):
            surface[row, column] = cosine_similarity(features(alpha, beta), reference).mean()
        advance()
    return surface
