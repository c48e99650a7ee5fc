"""Groups of processes that share a piece of work, as started by torchrun, and their communication."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
PATIENCE = timedelta(days=7)  # one process may be far slower than another
POLL_SECONDS = 0.2


def count_processes() -> int:
    """Return the number of processes started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share a piece of work."""

    rank: int = 0
    """rank of this process"""
    size: int = 1
    """number of processes"""
    group: Any = None
    """torch's gloo group; None for a single process"""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, act: Callable[[], Result]) -> Result:
        """Call `act` in the main process, and return its result in all. Its `OSError` or `ValueError` is raised in all,
        in the others as `ValueError`."""
        if self.size == 1:
            return act()
        import torch.distributed as dist

        message: list = [None, None]  # the result, or an error's text
        failure: OSError | ValueError | None = None
        if self.is_main:
            try:
                message[0] = act()
            except (OSError, ValueError) as error:
                failure, message[1] = error, str(error)
        dist.broadcast_object_list(message, group=self.group, group_src=0)
        if failure is not None:
            raise failure
        if message[1] is not None:
            raise ValueError(f"the main process stopped: {message[1]}")
        return message[0]

    def gather(self, make: Callable[[], Result]) -> list[Result] | None:
        """Call `make` in every process and return all results, by rank, in the main one. The `OSError` or `ValueError`
        of one process stops all."""
        if self.size == 1:
            return [make()]
        import torch.distributed as dist

        message: list = [None, None]  # the result, or an error's text
        try:
            message[0] = make()
        except (OSError, ValueError) as error:
            message[1] = str(error)
        received: list | None = [None] * self.size if self.is_main else None
        dist.gather_object(message, received, group=self.group, group_dst=0)

        def unpack() -> None:
            if failure := next((text for _, text in received or () if text is not None), None):
                raise ValueError(failure)

        self.from_main(unpack)
        return None if received is None else [result for result, _ in received]

    def wait_for_all(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait for all processes, calling `meanwhile` several times per second. `ValueError` if one has ended early."""
        if self.size == 1:
            return
        import torch.distributed as dist

        try:
            work: Any = dist.barrier(group=self.group, async_op=True)
            while not work.is_completed():
                time.sleep(POLL_SECONDS)
                meanwhile()
            work.wait()
        except RuntimeError as error:
            raise ValueError("another process has ended early: see its messages") from error


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Yield the group of the processes started together, by torchrun or the like, or a group of this process alone.

    They communicate over gloo on any device, since they exchange only a few numbers, and no accelerator has to wait.
    """
    import torch.distributed as dist

    initialized = dist.is_available() and dist.is_initialized()
    if not initialized and count_processes() == 1:
        yield ProcessGroup()
        return
    if initialized:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
        group = dist.group.WORLD
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(cast(Any, group))


def own_device(device: "torch.device") -> "torch.device":
    """Return the device of this process: unless `device` has an index, the GPU with the local rank as index.
    `ValueError` if there is no such GPU."""
    import torch

    if device.type != "cuda" or device.index is not None:
        return device
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ValueError(f"process {index} of this machine has no GPU: there are {torch.cuda.device_count()}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def leave_group() -> None:
    """Leave the group of all processes, if there is one: its threads may abort a process that ends within it."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
