"""Shard a model over processes unit by unit: FSDP2, torch's `fully_shard`.

These functions return whatever is not sharded unchanged, so that the training loop is the same with and without shards.
"""

from collections.abc import Iterable
from typing import TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from skipdit.models.long_skip import LongSkipModel


def shard(model: LongSkipModel, device: torch.device) -> None:
    """Leave each process its part of every parameter, on its device. A unit's parameters are whole while it runs."""
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for blocks in model.units():
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return this process's part of each parameter, with the `requires_grad` that `EMAModel` reads."""
    with torch.enable_grad():
        return [cast(nn.Parameter, local(parameter)) for parameter in model.parameters()]


def as_shard(part: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of a tensor as a DTensor that is sharded like the parameter."""
    if not is_sharded(parameter):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor on the device of the parameter, sharded like it."""
    whole = whole.to(parameter.device)
    if not is_sharded(parameter):
        return whole
    # every process has the whole tensor; without the copy, the part would keep all of it in memory
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, differentiably; all processes must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gather(tensor: Tensor, *, keeps: bool) -> Tensor | None:
    """Return the whole tensor if `keeps` is true, on the CPU if it was sharded; otherwise `None`. All processes must
    call this."""
    if not is_sharded(tensor):
        return tensor.contiguous() if keeps else None
    complete = tensor.full_tensor()
    return complete.cpu() if keeps else None


def gradient_norms(groups: Iterable[Iterable[nn.Parameter]], device: torch.device) -> Tensor:
    """Return (num_groups,) on the device: the gradient norm of each group of parameters; 0 if it has no gradient. If
    they are sharded, all processes must call this."""
    norms, sharded = [], False
    for parameters in groups:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sharded = sharded or any(map(is_sharded, gradients))
        # torch returns the norm of an empty list on the CPU
        parts = [local(gradient) for gradient in gradients]
        norms.append(nn.utils.get_total_norm(parts) if parts else torch.zeros((), device=device))
    if not sharded:
        return torch.stack(norms)
    squares = torch.stack(norms).square()
    dist.all_reduce(squares)
    return squares.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, device: torch.device) -> Tensor:
    """Scale gradients down to a norm of at most `limit`; return their norm before that."""
    parameters = list(parameters)
    norm = gradient_norms([parameters], device)[0]
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
