"""The device and the processes that a training runs on."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from skipdit.process_group import ProcessGroup

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_processes(target: torch.device) -> "Accelerator":
    """Join the process group on this device; `ValueError` where accelerate ends up on another, in fewer processes, or
    was told to shard by itself."""
    from accelerate import Accelerator

    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("1", "true"):
            raise ValueError(
                f"accelerate was configured to use {plugin}: launch without it; --parallel fsdp shards by torch's FSDP2"
            )

    accelerator = Accelerator(cpu=target.type == "cpu", mixed_precision="no", gradient_accumulation_steps=1)
    if accelerator.device.type != target.type or target.index not in (None, accelerator.device.index):
        raise ValueError(f"device {target} was asked for, but training would run on {accelerator.device}")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ValueError(f"{started} processes were started, but only {accelerator.num_processes} can work together")
    return accelerator


def in_main(accelerator: "Accelerator", act: Callable[[], object]) -> None:
    """Act in the main process while the others wait. What stops it stops them too, instead of leaving them waiting."""
    ProcessGroup(accelerator.process_index, accelerator.num_processes).from_main(act)
