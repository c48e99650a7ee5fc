"""Ranks that hold shards of one model must decide alike: a unit's weights are gathered only if all ranks run it."""

import math

import torch
import torch.distributed as dist
from torch import nn


def all_reduce_max(change: float, model: nn.Module) -> float:
    """Return the largest change over the ranks that shard this model's weights (FSDP2, tensor parallel), so that all of
    them decide alike; the change itself if each rank holds all weights, as under DDP. NaN counts as infinite."""
    if not (dist.is_available() and dist.is_initialized()):
        return change
    for device_type, group in _shard_groups(model):
        largest = torch.tensor(math.inf if math.isnan(change) else change, dtype=torch.float64, device=device_type)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        change = largest.item()
    return change


def _shard_groups(model: nn.Module) -> "list[tuple[str, dist.ProcessGroup]]":
    """Return the groups of ranks over which weights are sharded, in the same order on all ranks."""
    from torch.distributed.tensor import DTensor

    groups = {}
    for weight in model.parameters():
        if isinstance(weight, DTensor):
            mesh = weight.device_mesh
            for dim, placement in enumerate(weight.placements):
                if not placement.is_replicate():
                    group = mesh.get_group(dim)
                    groups[group.group_name] = mesh.device_type, group
    return list(groups.values())
