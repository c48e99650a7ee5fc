"""Identifies the model that a schedule was made for, and warns if it is used on another one."""

import hashlib
import warnings

import torch
from torch import Tensor, nn

from skipdit.cache.methods import MadeFor
from skipdit.cache.site import links_of

NUM_SAMPLED = 64  # entries per weight


def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that identify a model's weights.

    They hash the name, the shape and some evenly spaced entries of each weight, so they are quick to compute at any
    size. They are the same on every device and differ between dtypes. Raises `ValueError` if weights are on the meta
    device, as they are under offloading.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if weight.is_meta:
            raise ValueError(f"{name} is on the meta device: take the fingerprint before offloading")
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(_sampled(weight).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sampled(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    step = max(len(flat) // NUM_SAMPLED, 1)
    return flat[::step][:NUM_SAMPLED].to("cpu", torch.float32)


def check_made_for(made_for: MadeFor, model: nn.Module, scheduler: str | None) -> None:
    """Raise `ValueError` if a schedule was calibrated on another kind of model; warn if only the weights or the
    scheduler differ, as quality may then be lower. Offloaded weights are not compared."""
    name, num_units = type(model).__name__, links_of(model).num_units
    if name != made_for.model or 0 < num_units != made_for.num_units > 0:
        raise ValueError(
            f"this schedule was calibrated on a {made_for.model} of {made_for.num_units or 'unknown'} units, not on a "
            f"{name} of {num_units or 'unknown'}: run skipdit calibrate on this model"
        )
    changes = []
    weights = list(model.parameters())
    if not any(weight.is_meta for weight in weights) and fingerprint(model) != made_for.weights:
        dtype = weights[0].dtype
        changes.append(
            "other weights" if dtype == torch.float32 else f"other weights, or these before a cast to {dtype}"
        )
    if scheduler is not None and scheduler != made_for.scheduler:
        changes.append(f"{made_for.scheduler} instead of {scheduler}")
    if changes:
        warnings.warn(
            f"this schedule was calibrated with {' and '.join(changes)}: quality may be lower here", stacklevel=3
        )
