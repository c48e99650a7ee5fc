"""Where this runs: the device that was asked for, the machine, and the versions of what computes here."""

import os
import platform
import re
import resource
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch

from skipdit.options import Device

SYNCHRONIZE: dict[Device, Callable[[], None]] = {"cpu": torch.cpu.synchronize, "cuda": torch.cuda.synchronize}
CPUINFO = Path("/proc/cpuinfo")  # Linux


def resolve_device(name: str) -> torch.device:
    """Return a device: `"auto"` is CUDA where there is one; `ValueError` on a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device {name!r} is not available here: {reason}") from error
    return device


def check_device(device: Device) -> None:
    """Raise `ValueError` where a benchmark cannot run on this device."""
    if device not in get_args(Device):
        raise ValueError(f"device must be one of {', '.join(get_args(Device))}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs an NVIDIA GPU and a PyTorch that sees it, got none")


def has_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for products in bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most this process has held: on the GPU where it runs there, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: torch.device) -> dict[str, str | int]:
    """Return what a reader needs to judge times that were measured on this device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "system": platform.platform()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what is computed, by name."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("skipdit", "torch", "diffusers")}


def describe_environment(device: Device, seed: int) -> dict[str, str]:
    """Return what a benchmark's numbers depend on beside its config: command, machine, versions, date, seed."""
    names = re.findall(r"^model name\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else []
    known = versions()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "cpu": f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "not used",
        "versions": ", ".join(f"{name} {known[name]}" for name in ("python", "torch", "diffusers", "skipdit")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": str(seed),
    }


@contextmanager
def threads(num_threads: int | None) -> Iterator[None]:
    """Let PyTorch compute with so many threads of the CPU inside the block; `None` leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
