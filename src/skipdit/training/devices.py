"""The device and the processes of a training run."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from skipdit.process_group import PATIENCE, ProcessGroup

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_processes(target: torch.device) -> "Accelerator":
    """Join the process group on this device; `ValueError` if accelerate would use another device or fewer processes, or
    is configured to shard the model itself."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("1", "true"):
            raise ValueError(
                f"accelerate was configured to use {plugin}: launch without it; --parallel fsdp shards by torch's FSDP2"
            )

    accelerator = Accelerator(
        cpu=target.type == "cpu",
        mixed_precision="no",
        gradient_accumulation_steps=1,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],  # the others wait while the main process writes
    )
    if accelerator.device.type != target.type or target.index not in (None, accelerator.device.index):
        raise ValueError(f"device {target} was requested, but training would run on {accelerator.device}")
    num_started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != num_started:
        raise ValueError(
            f"{num_started} processes were started, but only {accelerator.num_processes} can work together"
        )
    return accelerator


def in_main(accelerator: "Accelerator", act: Callable[[], object]) -> None:
    """Call `act` in the main process while the others wait. An error there is raised in all of them, so that none waits
    forever."""
    ProcessGroup(accelerator.process_index, accelerator.num_processes).from_main(act)


def same_in_all(accelerator: "Accelerator", make: Callable[[], str], problem: str) -> None:
    """Call `make` in every process. An error of one is raised in all, and so is `ValueError` with `problem` if their
    results differ."""
    group = ProcessGroup(accelerator.process_index, accelerator.num_processes)
    results = set(group.gather(make) or ())

    def check() -> None:
        if len(results) > 1:
            raise ValueError(problem)

    group.from_main(check)
