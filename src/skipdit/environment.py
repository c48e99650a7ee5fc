"""The device, the machine, and the versions of the packages that compute."""

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
    """Return a device: `"auto"` is CUDA if there is a GPU; `ValueError` for a device that this machine lacks."""
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
    """Raise `ValueError` if a benchmark cannot run on this device."""
    if device not in get_args(Device):
        raise ValueError(f"device must be one of {', '.join(get_args(Device))}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs an NVIDIA GPU and a PyTorch that sees it, got none")


def has_bf16(device: torch.device) -> bool:
    """Return True if the device has instructions for products in bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: on the GPU if it runs there, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: torch.device) -> dict[str, str | int]:
    """Return the facts that a reader needs to judge times measured on this device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "system": platform.platform()}


def versions() -> dict[str, str]:
    """Return the versions of Python, skipdit, torch and diffusers, by name."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("skipdit", "torch", "diffusers")}


def describe_environment(device: Device, seed: int) -> dict[str, str]:
    """Return the command, machine, versions, date and seed of a benchmark."""
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
    """Make PyTorch use this many CPU threads inside the block; `None` leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
