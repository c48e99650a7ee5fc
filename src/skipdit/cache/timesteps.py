"""Reads what identifies a call: its timestep, the levels of its scheduler, and the layout of its latents."""

from typing import Any, TypeGuard

import torch
from torch import Tensor

from skipdit.diffusion import noise_levels
from skipdit.interfaces import Latents, Scheduler

Layout = tuple[Any, torch.dtype, torch.device]  # shape, dtype and device of latents; of a list of them, all shapes
Timestep = Tensor | float


def levels_of(scheduler: Scheduler) -> list[float]:
    """Return the noise levels of a scheduler's list, which is read from the device."""
    return levels_and(scheduler, [])[0]


def levels_and(scheduler: Scheduler, scalars: list[Tensor]) -> tuple[list[float], list[float]]:
    """Return the noise levels of a scheduler's list, and scalars as numbers; waits for the device once."""
    config, table = scheduler.config, scheduler.timesteps
    num_train_timesteps, inverted = config.get("num_train_timesteps", 1000), config.get("invert_sigmas", False)
    others = [scalar.reshape(1).to(table.device, torch.float32) for scalar in scalars]
    numbers = (torch.cat([table, *others]) if others else table).tolist()
    return noise_levels(numbers[: len(table)], num_train_timesteps, inverted=inverted), numbers[len(table) :]


def layout_of(latents: Latents) -> Layout:
    """Return the shape, dtype and device of latents; for a list of them (Z-Image, one per sample), all shapes."""
    match latents:
        case Tensor():
            return latents.shape, latents.dtype, latents.device
    layouts = [layout_of(sample) for sample in latents]
    return tuple(shape for shape, *_ in layouts), layouts[0][1], layouts[0][2]


def is_entry(timestep: object) -> bool:
    """Return true if a timestep is a view of one entry of a longer list."""
    return is_single(timestep) and timestep.untyped_storage().nbytes() > timestep.element_size()


def is_single(timestep: object) -> TypeGuard[Tensor]:
    return isinstance(timestep, Tensor) and (timestep.numel() == 1 or max(timestep.stride()) == 0)


def is_near(level: float, other: float) -> bool:
    """Return true if two levels are equal up to rounding to bfloat16."""
    return abs(level - other) < 0.01 + 0.008 * abs(other)


def place_in(levels: list[float], level: float) -> int:
    """Return the place of a noise level in a run's list; 0 if none there is near."""
    nearest = min(range(len(levels)), key=lambda place: abs(levels[place] - level))
    return nearest if is_near(level, levels[nearest]) else 0
