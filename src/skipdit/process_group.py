"""Processes that share a piece of work, as torchrun starts them: who they are, and what they tell one another."""

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
    """Return how many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a piece of work. rank: of this one. size: how many. group: torch's, of gloo; `None` for one."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, act: Callable[[], Result]) -> Result:
        """Return in every process what `act` returns in the main one. Its `OSError` or `ValueError` stops all."""
        if self.size == 1:
            return act()
        import torch.distributed as dist

        said: list[Any] = [None, None]
        failure: OSError | ValueError | None = None
        if self.is_main:
            try:
                said[0] = act()
            except (OSError, ValueError) as error:
                failure, said[1] = error, str(error)
        dist.broadcast_object_list(said, group=self.group, group_src=0)
        if failure is not None:
            raise failure
        if said[1] is not None:
            raise ValueError(f"the main process stopped: {said[1]}")
        return said[0]

    def wait_for_all(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait until every process is here, and do something again and again until then. `ValueError` where one has
        ended before."""
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
            raise ValueError("another process has ended too early: see what it said") from error


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Yield the processes that were started together, by torchrun or the like; this one alone where it was not.

    They speak over gloo, on any device: only a few numbers, for which no accelerator has to wait.
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
    """Return the device of this process: of several GPUs the one that its local rank names, unless one was named."""
    import torch

    if device.type != "cuda" or device.index is not None:
        return device
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ValueError(f"process {index} of this machine has no GPU, of which there are {torch.cuda.device_count()}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
