"""Combine snapshots of two power-function averages into an average of any length after training (arXiv 2312.02696,
section 3)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from skipdit.files.untrusted import printable

LENGTHS = (0.05, 0.1)  # of the tracked averages: standard deviation relative to the steps so far
SHORTEST, LONGEST = 0.01, 0.28  # an average of length 0.289 weighs all steps equally
FOLDER = "ema-snapshots"  # in a run's folder


def exponent(length: float) -> float:
    """Return gamma of the power function t^gamma whose relative standard deviation is `length`
    (section 3.1: length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for gamma)."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def inner_product(step: float, gamma: float, other_step: float, other_gamma: float) -> float:
    """Return the integral, over training, of the product of the weights of two averages.

    The average at `step` weighs time s <= step with (gamma + 1) s^gamma / step^(gamma + 1).
    """
    first = min(step, other_step)
    factor = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1)
    logarithm = (gamma + other_gamma + 1) * math.log(first)
    logarithm -= (gamma + 1) * math.log(step) + (other_gamma + 1) * math.log(other_step)
    return factor * math.exp(logarithm)


class PowerAverages:
    """Running averages of a model's weights, one per length, which weigh steps by a power function. Nothing here waits
    for the device."""

    def __init__(self, parameters: Iterable[Tensor], lengths: Sequence[float] = LENGTHS) -> None:
        shadows = [parameter.detach() for parameter in parameters]
        self.averages = {length: [shadow.clone() for shadow in shadows] for length in lengths}
        self.exponents = {length: exponent(length) for length in lengths}

    @torch.no_grad()
    def step(self, parameters: Iterable[Tensor], done: int) -> None:
        """Update the averages with the weights after a step (section 3.1). done: number of the step; the first is 1."""
        weights = [parameter.detach() for parameter in parameters]
        for length, averages in self.averages.items():
            decay = (1 - 1 / done) ** (self.exponents[length] + 1)
            torch._foreach_lerp_(averages, weights, 1 - decay)

    def restore(self, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
        """Restore saved averages, whose keys are `{length}.{name}`."""
        names = list(names)
        for length, averages in self.averages.items():
            for name, average in zip(names, averages, strict=True):
                average.copy_(tensors[f"{length}.{name}"])


@dataclass(frozen=True)
class Combination:
    """The snapshots that make up an average, with their weights."""

    length: float
    """of the average"""
    step: int
    """at which the average is taken"""
    weights: dict[int, dict[float, float]]
    """weight of each snapshot, by its step and tracked length"""
    error: float
    """relative L2 error of the combined weights over time"""


def combine(steps: Sequence[int], length: float, step: int | None = None) -> Combination:
    """Return the weights, which sum to 1, with which snapshots of these steps make up the average of a length at a
    step, by default the last (least squares, section 3.2).

    `ValueError` if there is no such snapshot, or the length is out of range.
    """
    if not SHORTEST <= length <= LONGEST:
        raise ValueError(f"length must be between {SHORTEST} and {LONGEST}, got {length}")
    if step is not None and step not in steps:
        raise ValueError(
            f"step must be that of a snapshot, {', '.join(map(str, steps)) or 'of which there are none'}, got {step}"
        )
    step = max(steps) if step is None else step
    snapshots = [(taken, tracked) for taken in sorted(steps) if taken <= step for tracked in LENGTHS]
    exponents = {tracked: exponent(tracked) for tracked in LENGTHS}
    gamma = exponent(length)
    products = np.array(
        [[inner_product(s, exponents[a], t, exponents[b]) for t, b in snapshots] for s, a in snapshots],
        dtype=np.float64,
    )
    target = np.array([inner_product(s, exponents[a], step, gamma) for s, a in snapshots], dtype=np.float64)
    solution, ones = np.linalg.lstsq(products, np.stack([target, np.ones_like(target)], axis=1), rcond=None)[0].T
    solution += ones * (1 - solution.sum()) / ones.sum()  # sums to 1, so that a constant weight stays as it is
    norm = inner_product(step, gamma, step, gamma)
    residual = max(norm - 2 * solution @ target + solution @ products @ solution, 0.0)
    weights: dict[int, dict[float, float]] = {}
    for (taken, tracked), weight in zip(snapshots, solution.tolist(), strict=True):
        weights.setdefault(taken, {})[tracked] = weight
    return Combination(length, step, weights, math.sqrt(residual / norm))


def snapshot_name(step: int) -> str:
    return f"{FOLDER}/step-{step:07d}.safetensors"


def list_snapshots(run: Path) -> list[int]:
    """Return the steps of a run's snapshots in ascending order."""
    names = [path.name.removeprefix("step-").removesuffix(".safetensors") for path in (run / FOLDER).glob("step-*")]
    steps = sorted(int(name) for name in names if name.isascii() and name.isdigit() and len(name) <= 18)
    return [step for step in steps if (run / snapshot_name(step)).is_file()]


@torch.no_grad()
def reconstruct(run: Path, model: nn.Module, length: float, step: int | None = None) -> Combination:
    """Set the weights of a run's model to the average of this length at a step, by default that of the last snapshot.

    `FileNotFoundError` if the run has no snapshots; `ValueError` if one is broken or does not fit the model.
    """
    steps = list_snapshots(run)
    if not steps:
        raise FileNotFoundError(f"{printable(run)} has no snapshots: train with --ema-snapshots-every")
    combination = combine(steps, length, step)
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.named_parameters()}
    for taken, weights in combination.weights.items():
        path = run / snapshot_name(taken)
        try:
            with safe_open(path, framework="pt") as snapshot:
                names = {f"{tracked}.{name}" for tracked in weights for name in sums}
                if wrong := sorted(names ^ set(snapshot.keys())):
                    raise ValueError(f"{printable(path)} does not fit this model: {printable(wrong[0])}")
                for tracked, weight in weights.items():
                    for name, total in sums.items():
                        average = snapshot.get_tensor(f"{tracked}.{name}")
                        if average.shape != total.shape or not average.isfinite().all():
                            raise ValueError(f"{printable(path)} does not fit this model: {printable(name)}")
                        total.add_(average.to(total), alpha=weight)
        except SafetensorError as error:
            raise ValueError(f"{printable(path)} cannot be read: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.copy_(sums[name])
    return combination
