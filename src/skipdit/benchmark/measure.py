"""Shared parts of the benchmarks: their frame, the calls of a model, the costs of calls, and ratios of costs.

Weights are random. As machines drift, steps are timed in turn, and a ratio is the median of those within a repetition.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from skipdit.benchmark.config import BenchConfig
from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import IntervalSchedule
from skipdit.cache.site import DeepFeatures
from skipdit.environment import SYNCHRONIZE, check_device, describe_environment, threads
from skipdit.files.output import OutputFolder
from skipdit.models.costs import flop_counter
from skipdit.models.long_skip import LongSkipModel
from skipdit.options import Device

Kind = Literal["plain", "uncached", "full", "reuse"]
Call = Callable[[], Tensor]
Advance = Callable[..., object]  # of `skipdit.terminal.counting`
Ratios = dict[str, float]

ACHIEVED_TARGET = 0.95  # share of the speedup by FLOPs that a cached run should achieve
FULL_AND_REUSE = IntervalSchedule(interval=2)
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


@contextmanager
def benchmark(config: BenchConfig, out: OutputFolder, name: str, *more: str) -> Iterator[dict[str, str]]:
    """Yield the environment of a benchmark, and use its number of threads inside the block.

    name: of the report. more: further files. Raises, before anything is measured, `ValueError` if the device does not
    exist and `FileExistsError` if a file that skipdit did not write is in the way.
    """
    check_device(config.device)
    out.claim((f"{name}.json", f"{name}.md", *more))
    with threads(config.num_threads):
        yield describe_environment(config.device, config.seed)


# ----------------------------------------------------------------------------------------------------------------------
# Calls


@dataclass(frozen=True)
class Subject:
    """A model, plain or with long skips, and the arguments of its forward except the timestep."""

    model: nn.Module
    arguments: Mapping[str, Tensor]

    def call(self, timestep: float) -> Call:
        """Return a call of the forward at this timestep, with inputs that are made now."""
        hidden_states = self.arguments["hidden_states"]
        timesteps = torch.full(hidden_states.shape[:1], timestep, dtype=torch.float32, device=hidden_states.device)
        return lambda: self.model(timestep=timesteps, **self.arguments).sample

    def calls(self, shallow_units: Sequence[int]) -> Iterator[tuple[Kind, int | None, Call]]:
        """Yield the calls to time. Each must be made once before the next one is taken, as the cache is enabled only
        in between."""
        first, second, linked = self.call(999), self.call(979), LongSkipModel.find(self.model)
        if linked is None or not linked.long_skip_links.sources:
            yield "plain", None, first
            return
        for k in shallow_units:
            enable_cache(self.model, CacheMethod(schedule=FULL_AND_REUSE, site=DeepFeatures(k)))
            yield "full", k, first
            yield "reuse", k, second
            summary = cache_summary(self.model)
            assert (summary.steps_full, summary.steps_reused) == (1, 1), str(summary)
            disable_cache(self.model)
        yield "uncached", None, first  # last, as a slow first call of the model must not favor the cache


def fill_zeros(model: nn.Module) -> None:
    """Give random weights to layers that are initialized with zeros, whose cost may differ."""
    for weight in model.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.02)


def weight_bytes(*models: nn.Module) -> int:
    """Return the bytes of all weights of these models; a shared weight counts once."""
    weights = {id(weight): weight.nbytes for model in models for weight in model.parameters()}
    return sum(weights.values())


# ----------------------------------------------------------------------------------------------------------------------
# Costs of calls


def flops_of(call: Call) -> int:
    """Return the FLOPs of one call; a multiply-add counts as two."""
    with flop_counter() as counter:
        call()
    return counter.get_total_flops()


def time_call(call: Call, device: Device) -> tuple[float, int | None]:
    """Return the seconds of one call, and the peak memory of the process during it in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # resets VmHWM, proc(5)
    SYNCHRONIZE[device]()
    started = time.perf_counter()
    call()
    SYNCHRONIZE[device]()
    return time.perf_counter() - started, peak_bytes(device)


def peak_bytes(device: Device) -> int | None:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(STATUS.read_text().partition("VmHWM:")[2].split()[0]) if CLEAR_REFS.exists() else None


@dataclass(frozen=True)
class Timed:
    """The measurements of one call, one per round."""

    seconds: tuple[float, ...]
    peak_bytes: tuple[int | None, ...]
    """peak memory of the process; `None` if the system does not report it"""

    def peak(self, *, num_warmup: int = 0, others: int) -> int | None:
        """Return the peak memory after the warm-up, minus `others`."""
        peaks = [peak for peak in self.peak_bytes[num_warmup:] if peak is not None]
        return max(peaks) - others if peaks else None


def time_rounds(calls: Callable[[], Iterable[Call]], num_rounds: int, device: Device) -> list[Timed]:
    """Make all calls in turn in each round; return one entry per call."""
    rounds = [[time_call(call, device) for call in calls()] for _ in range(num_rounds)]
    return [Timed(*zip(*timed, strict=True)) for timed in zip(*rounds, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Ratios


class Measured(Protocol):
    """The FLOPs of a call, and its seconds in each repetition."""

    @property
    def flops(self) -> int: ...

    @property
    def seconds(self) -> tuple[float, ...]: ...


def median_ratio(first: Measured, second: Measured) -> float:
    """Return the seconds of the first divided by those of the second."""
    return median(a / b for a, b in zip(first.seconds, second.seconds, strict=True))


def run_speedup(full_steps: Sequence[bool], *, baseline: float, full: float, reuse: float) -> float:
    """Return the cost of a run in which every step costs `baseline`, divided by that of the cached run. Costs are in
    seconds or in FLOPs."""
    return len(full_steps) * baseline / sum(full if is_full else reuse for is_full in full_steps)


def step_ratios(full: Measured, reuse: Measured) -> Ratios:
    """Return `step_ratio`, the seconds of the full step divided by those of a reuse step, and `step_bound`, the same in
    FLOPs."""
    return {"step_ratio": median_ratio(full, reuse), "step_bound": full.flops / reuse.flops}


def run_ratios(
    full_steps: Sequence[bool], *, plain: Measured, uncached: Measured, full: Measured, reuse: Measured
) -> Ratios:
    """Return ratios of whole runs, computed from the times of steps: `run_speedup` and `over_plain`, the seconds of the
    uncached and of the plain model divided by those of the cached model; `run_bound`, the speedup by FLOPs; and
    `achieved`, the speedup divided by its bound."""
    rounds = list(zip(plain.seconds, uncached.seconds, full.seconds, reuse.seconds, strict=True))
    speedup = median(run_speedup(full_steps, baseline=u, full=f, reuse=r) for _, u, f, r in rounds)
    bound = run_speedup(full_steps, baseline=uncached.flops, full=full.flops, reuse=reuse.flops)
    return {
        "run_speedup": speedup,
        "run_bound": bound,
        "achieved": speedup / bound,
        "over_plain": median(run_speedup(full_steps, baseline=p, full=f, reuse=r) for p, _, f, r in rounds),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Cells of tables


def cost_record(row: Measured) -> dict[str, object]:
    """Return the cells of a step's time in milliseconds: median, minimum and maximum."""
    return {
        "ms": f"{1e3 * median(row.seconds):.1f}",
        "min to max": f"{1e3 * min(row.seconds):.1f} to {1e3 * max(row.seconds):.1f}",
    }


def flops_record(row: Measured) -> dict[str, object]:
    """Return the cells of a step's FLOPs, in total and per second."""
    return {"GFLOP": f"{row.flops / 1e9:.2f}", "GFLOP/s": f"{row.flops / 1e9 / median(row.seconds):.0f}"}


def mebibytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:.0f}"


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@contextmanager
def compiled(model: nn.Module, **options: Any) -> Iterator[None]:
    """Compile the model inside the block, in a fresh compiler. Forward hooks, which count steps, are removed meanwhile,
    and warnings about the compiler's limit are off, as the report has a column for it."""
    logger = logging.getLogger("torch._dynamo.convert_frame")
    level = logger.level
    logger.setLevel(logging.ERROR)
    hooks = {module: dict(module._forward_hooks) for module in model.modules() if module._forward_hooks}
    for module in hooks:
        module._forward_hooks.clear()
    torch._dynamo.reset()
    counters.clear()
    model.compile(**options)
    try:
        yield
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()
        logger.setLevel(level)
        for module, removed in hooks.items():
            module._forward_hooks.update(removed)
