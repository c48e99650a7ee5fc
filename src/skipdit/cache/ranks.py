"""Ranks that hold shards of one model, or of one sequence, must decide alike: a unit's weights, or its keys and values,
are gathered only if all ranks run it. Static schedules exchange nothing for that, adaptive ones one number per
decision.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def all_reduce_max(change: float, model: nn.Module) -> float:
    """Return the largest change over the ranks that shard this model's weights (FSDP2, tensor parallel) or its tokens
    (context parallelism of diffusers), so that all of them decide alike; the change itself if each rank holds all of
    them, as under DDP. NaN counts as infinite."""
    if not (dist.is_available() and dist.is_initialized()):
        return change
    for device_type, group in _shard_groups(model):
        largest = torch.tensor(math.inf if math.isnan(change) else change, dtype=torch.float64, device=device_type)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        change = largest.item()
    return change


def _shard_groups(model: nn.Module) -> "list[tuple[str, dist.ProcessGroup]]":
    """Return the groups of ranks over which weights or tokens are sharded, in the same order on all ranks."""
    from torch.distributed.tensor import DTensor

    groups = {}
    by_tokens: Any = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if by_tokens is not None:  # private to diffusers
        mesh = by_tokens._flattened_mesh
        groups[mesh.get_group().group_name] = mesh.device_type, mesh.get_group()
    for weight in model.parameters():
        if isinstance(weight, DTensor):
            mesh = weight.device_mesh
            for dim, placement in enumerate(weight.placements):
                if not placement.is_replicate():
                    group = mesh.get_group(dim)
                    groups[group.group_name] = mesh.device_type, group
    return list(groups.values())
