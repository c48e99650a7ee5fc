"""Load batches: data that fits stays on the device, other data is loaded ahead by worker processes."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from skipdit.data.pictures import MAX_DECODED_AT_ONCE, ShuffledForever
from skipdit.tasks.training import StoredItems
from skipdit.training.config import TrainConfig
from skipdit.training.stopping import ignore_signals

FREE_SHARE = 0.25  # of a device's free memory that data may fill
CHUNK = 64  # items read at a time
MANY_WORKERS = 16

StoredBatch = tuple[Tensor, Tensor]  # stored items, and their classes or indices


@contextmanager
def load_batches(
    data: StoredItems, config: TrainConfig, accelerator: Accelerator, first_step: int
) -> Iterator[Iterator[StoredBatch]]:
    """Yield an endless iterator of this process's batches on its device, from `first_step` on. They do not depend on
    how they are loaded; at the end no worker is left.

    `ChildProcessError` if a worker died.
    """
    device, rank, num_processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    order = ShuffledForever(len(data), config.seed, first_step * config.batch_size, rank, num_processes)
    size = config.batch_size // num_processes // config.num_accumulation_steps
    num_workers = find_num_workers(config, device, num_processes)
    if stays_on_device(config, data, device, num_processes):
        # a data set this small was decoded when it was opened
        num_readers = num_workers if len(data) > MAX_DECODED_AT_ONCE else 0
        yield DeviceBatches(*read_all(data, device, num_readers, shows=accelerator.is_main_process), order, size)
    else:
        with reading(data, device, num_workers, batch_size=size, sampler=order) as batches:
            yield (move(batch, device) for batch in batches)


def items_of_step(config: TrainConfig, length: int, step: int) -> list[int]:
    """Return the indices of the items in the batch of a step, over all processes, as `load_batches` yields them.

    length: items in the data set. step: the first is 0.
    """
    order = ShuffledForever(length, config.seed, step * config.batch_size)
    return list(itertools.islice(order, config.batch_size))


def find_num_workers(config: TrainConfig, device: torch.device, num_processes: int) -> int:
    """Return how many processes load data ahead: as in the config; by default this process's share of the cores on a
    GPU, and none on a CPU, where they would take cores from training."""
    if config.num_workers is not None:
        return config.num_workers
    return 0 if device.type == "cpu" else max(1, min(MANY_WORKERS, (os.cpu_count() or 1) // num_processes - 1))


def stays_on_device(config: TrainConfig, data: StoredItems, device: torch.device, num_processes: int = 1) -> bool:
    """Return True if a run keeps its data on the device: as in the config; by default if it fits and `num_workers` is
    not set."""
    if config.data_on_device != "auto":
        return config.data_on_device == "yes"
    if config.num_workers:
        return False
    num_bytes = data[0][0].nbytes * len(data)
    num_copies = num_processes if device.type == "cpu" else 1
    return num_bytes * num_copies <= FREE_SHARE * free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU in bytes; for other devices, that of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


class DeviceBatches:
    """Endless batches (stored, labels) of data on a device. The order of each epoch is copied there at once."""

    def __init__(self, stored: Tensor, labels: Tensor, order: ShuffledForever, size: int) -> None:
        self.stored, self.labels, self.size = stored, labels, size
        self.epochs, self.rest = order.by_epoch(), torch.empty(0, dtype=torch.int64, device=stored.device)

    def __iter__(self) -> "DeviceBatches":
        return self

    def __next__(self) -> StoredBatch:
        device = self.stored.device
        while len(self.rest) < self.size:
            indices = torch.from_numpy(next(self.epochs).copy())
            if device.type == "cuda":
                indices = indices.pin_memory()  # otherwise the copy would block
            self.rest = torch.cat([self.rest, indices.to(device, non_blocking=True)])
        index, self.rest = self.rest[: self.size], self.rest[self.size :]
        return self.stored[index], self.labels[index]


def read_all(data: StoredItems, device: torch.device, num_workers: int, *, shows: bool) -> StoredBatch:
    """Return all of a data set on a device. shows: show a progress bar if it is large."""
    length = len(data)
    stored, labels = (
        torch.empty((length, *first.shape[1:]), dtype=first.dtype, device=device)
        for first in default_collate([data[0]])
    )
    with reading(data, device, num_workers, batch_size=CHUNK) as chunks:
        starts: Iterable[int] = range(0, length, CHUNK)
        if length > MAX_DECODED_AT_ONCE and shows:
            starts = track(starts, "reading data", transient=True)
        for start, chunk in zip(starts, chunks, strict=True):
            for whole, part in zip((stored, labels), chunk, strict=True):
                whole[start : start + len(part)].copy_(part, non_blocking=True)
    return stored, labels


def move(batch: Sequence[Tensor], device: torch.device) -> StoredBatch:
    stored, labels = batch
    return stored.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@contextmanager
def reading(
    data: StoredItems, device: torch.device, num_workers: int, **options: Any
) -> Iterator[Iterator[Sequence[Tensor]]]:
    """Yield the batches of a `DataLoader` with these options, in pinned memory for a GPU; at the end no worker is left.
    `ChildProcessError` if a worker died."""
    pinned = device.type == "cuda"
    loader = DataLoader(data, num_workers=num_workers, worker_init_fn=ignore_signals, pin_memory=pinned, **options)
    batches: Any = iter(loader)
    workers = batches._workers if num_workers else ()  # torch 2.10 to 2.13, as below; a test pins it
    try:
        yield batches
    except Exception as error:
        # PyTorch raises wherever the loop happens to be, or the pipe breaks, or either is turned into another error
        if not has_failed(workers):
            raise
        raise ChildProcessError(
            "a process that loads data died, perhaps for lack of memory: the same command resumes from the last "
            f"checkpoint, also with another --num-workers (it was {num_workers})"
        ) from error
    finally:
        if workers:
            batches._shutdown_workers()  # otherwise they end with the last reference, which a traceback may hold


def has_failed(workers: Sequence[BaseProcess]) -> bool:
    """Return True if a process has ended with an error. PyTorch's SIGCHLD handler may raise anywhere, also here."""
    for _ in range(len(workers) + 1):
        with suppress(RuntimeError):
            for worker in workers:
                worker.join(timeout=0.1)
            return any(worker.exitcode for worker in workers)
    return True
