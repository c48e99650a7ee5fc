"""Averages of any length after training: two power-function averages, kept as snapshots, from which others are
combined (arXiv 2312.02696, section 3)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from skipdit.files.untrusted import printable

LENGTHS = (0.05, 0.1)  # of the averages that are tracked: their standard deviation over the run's length
SHORTEST, LONGEST = 0.01, 0.28  # an average of 0.289 weighs all steps alike
FOLDER = "ema-snapshots"  # in that of a run


def exponent(length: float) -> float:
    """Return gamma of the power function t^gamma whose relative standard deviation is `length`
    (section 3.1: length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for gamma)."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def inner_product(step: float, gamma: float, other_step: float, other_gamma: float) -> float:
    """Return the integral of the product of two averages' weights over training.

    The weight of the average of `step` at time s up to it is (gamma + 1) s^gamma / step^(gamma + 1).
    """
    first = min(step, other_step)
    of_both = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1)
    logarithms = (gamma + other_gamma + 1) * math.log(first)
    logarithms -= (gamma + 1) * math.log(step) + (other_gamma + 1) * math.log(other_step)
    return of_both * math.exp(logarithms)


class PowerAverages:
    """Averages of weights, one per length, whose weights are power functions of the step. Nothing here waits for the
    device."""

    def __init__(self, parameters: Iterable[Tensor], lengths: Sequence[float] = LENGTHS) -> None:
        shadows = [parameter.detach() for parameter in parameters]
        self.averages = {length: [shadow.clone() for shadow in shadows] for length in lengths}
        self.exponents = {length: exponent(length) for length in lengths}

    @torch.no_grad()
    def step(self, parameters: Iterable[Tensor], done: int) -> None:
        """Take in the weights after the step of this number, of which the first is 1 (section 3.1)."""
        weights = [parameter.detach() for parameter in parameters]
        for length, averages in self.averages.items():
            decay = (1 - 1 / done) ** (self.exponents[length] + 1)
            torch._foreach_lerp_(averages, weights, 1 - decay)

    def take(self, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
        """Go on with the averages that are saved, those of a length as `{length}.{name}`."""
        names = list(names)
        for length, averages in self.averages.items():
            for name, average in zip(names, averages, strict=True):
                average.copy_(tensors[f"{length}.{name}"])


# ----------------------------------------------------------------------------------------------------------------------
# After training


@dataclass(frozen=True)
class Combination:
    """An average of `length` at `step`: of each snapshot, by step, the weight of each tracked length. error: what of
    its weights over time the combination misses, relative (L2)."""

    length: float
    step: int
    weights: dict[int, dict[float, float]]
    error: float


def combine(steps: Sequence[int], length: float, step: int | None = None) -> Combination:
    """Find the weights, which add up to 1, with which snapshots of these steps make the average of a length at a step,
    by default the last (least squares, section 3.2). `ValueError` where there is no such snapshot or no such length."""
    if not SHORTEST <= length <= LONGEST:
        raise ValueError(f"length must be between {SHORTEST} and {LONGEST}, got {length}")
    if step is not None and step not in steps:
        raise ValueError(
            f"step must be that of a snapshot, {', '.join(map(str, steps)) or 'of which none is'}, got {step}"
        )
    step = max(steps) if step is None else step
    known = [(each, tracked) for each in sorted(steps) if each <= step for tracked in LENGTHS]
    exponents = {tracked: exponent(tracked) for tracked in LENGTHS}
    gamma = exponent(length)
    products = np.array(
        [[inner_product(s, exponents[a], t, exponents[b]) for t, b in known] for s, a in known], dtype=np.float64
    )
    wanted = np.array([inner_product(s, exponents[a], step, gamma) for s, a in known], dtype=np.float64)
    found, ones = np.linalg.lstsq(products, np.stack([wanted, np.ones_like(wanted)], axis=1), rcond=None)[0].T
    found = found + ones * (1 - found.sum()) / ones.sum()  # they add up to 1, so that what does not move stays
    own = inner_product(step, gamma, step, gamma)
    missed = max(own - 2 * found @ wanted + found @ products @ found, 0.0)
    weights: dict[int, dict[float, float]] = {}
    for (each, tracked), weight in zip(known, found.tolist(), strict=True):
        weights.setdefault(each, {})[tracked] = weight
    return Combination(length, step, weights, math.sqrt(missed / own))


def snapshot_name(step: int) -> str:
    return f"{FOLDER}/step-{step:07d}.safetensors"


def list_snapshots(run: Path) -> list[int]:
    """Return the steps of a run's snapshots, rising."""
    steps = [path.name.removeprefix("step-").removesuffix(".safetensors") for path in (run / FOLDER).glob("step-*")]
    found = sorted(int(step) for step in steps if step.isascii() and step.isdigit() and len(step) <= 18)
    return [step for step in found if (run / snapshot_name(step)).is_file()]


@torch.no_grad()
def reconstruct(run: Path, model: nn.Module, length: float, step: int | None = None) -> Combination:
    """Give a run's model the average of this length at a step, by default the last snapshot's.

    `FileNotFoundError` where the run kept no snapshots; `ValueError` where one is broken or of another model.
    """
    steps = list_snapshots(run)
    if not steps:
        raise FileNotFoundError(f"{printable(run)} has no snapshots: train with --ema-snapshots-every")
    combination = combine(steps, length, step)
    sums = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in model.named_parameters()}
    for each, weights in combination.weights.items():
        path = run / snapshot_name(each)
        try:
            with safe_open(path, framework="pt") as snapshot:
                names = {f"{tracked}.{name}" for tracked in weights for name in sums}
                if wrong := sorted(names ^ set(snapshot.keys())):
                    raise ValueError(f"{printable(path)} is not of this model: {printable(wrong[0])}")
                for tracked, weight in weights.items():
                    for name, total in sums.items():
                        average = snapshot.get_tensor(f"{tracked}.{name}")
                        if average.shape != total.shape or not average.isfinite().all():
                            raise ValueError(f"{printable(path)} is not of this model: {printable(name)}")
                        total.add_(average.to(total), alpha=weight)
        except SafetensorError as error:
            raise ValueError(f"{printable(path)} cannot be read: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.copy_(sums[name])
    return combination
