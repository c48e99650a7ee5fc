"""`skipdit bench gpu`: the speedup of caches on a GPU, compared with that by FLOPs. The report grows row by row, small
batches first."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from diffusers import DDIMScheduler
from torch import nn

from skipdit.benchmark import measure
from skipdit.benchmark.config import GpuBenchConfig as GpuBenchConfig
from skipdit.benchmark.config import GpuMode
from skipdit.cache.enable import cached
from skipdit.cache.methods import parse_method
from skipdit.environment import SYNCHRONIZE
from skipdit.files.output import OutputFolder
from skipdit.interfaces import Fields
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig
from skipdit.pipelines import ClassToImagePipeline
from skipdit.report import Report, judge, record, table
from skipdit.terminal import counting

SMALL_BATCH, SMALL_BATCH_TARGET = 8, 0.90  # for batches below this size in eager mode


@dataclass(frozen=True)
class Row:
    """One cache in one mode at one batch size."""

    mode: GpuMode
    batch_size: int
    spec: str
    steps_full: int
    steps_reused: int
    bound: float
    """the speedup by FLOPs"""
    seconds_full: tuple[float, ...]
    """seconds of a step without the cache, one per round"""
    seconds_cached: tuple[float, ...]
    """seconds of a step with the cache, one per round"""

    @property
    def speedup(self) -> float:
        """Return the median over rounds."""
        return median(full / reused for full, reused in zip(self.seconds_full, self.seconds_cached, strict=True))

    @property
    def achieved(self) -> float:
        """Return the speedup as a share of its bound."""
        return self.speedup / self.bound

    @property
    def name(self) -> str:
        return _name(self.mode, self.batch_size, self.spec)

    def cells(self) -> dict[str, object]:
        return {
            "mode": self.mode,
            "batch": self.batch_size,
            "cache": self.spec,
            "full + reused": f"{self.steps_full} + {self.steps_reused}",
            "ms per step": f"{1e3 * median(self.seconds_full):.2f}",
            "cached": f"{1e3 * median(self.seconds_cached):.2f}",
            "speedup": f"{self.speedup:.3f}",
            "bound": f"{self.bound:.3f}",
            "achieved": f"{self.achieved:.3f}",
        }


def _name(mode: GpuMode, batch_size: int, spec: str) -> str:
    return f"{spec}, batch {batch_size}, {mode}"


class Runs:
    """Runs of one model, a call per step, with the timesteps of a scheduler, as a pipeline makes them."""

    def __init__(self, config: GpuBenchConfig) -> None:
        torch.manual_seed(config.seed)
        with torch.device(config.device):
            model = DiT.from_preset(config.preset, long_skip=LongSkipConfig())
        measure.fill_zeros(model)
        nn.Module.to(model, getattr(torch, config.dtype))  # not model.to, which warns of every cast
        self.config, self.model = config, model.eval()
        self.pipeline = ClassToImagePipeline(self.model, DDIMScheduler())
        self.pipeline.scheduler.set_timesteps(config.num_inference_steps, device=config.device)

    def seconds(self, inputs: Fields) -> float:
        """Return the seconds per step, averaged over a run."""
        synchronize, timesteps = SYNCHRONIZE[self.config.device], self.pipeline.scheduler.timesteps
        batch_size = len(inputs["class_labels"])

        def run() -> None:
            for timestep in timesteps:
                self.model(timestep=timestep.expand(batch_size), **inputs)
            synchronize()

        synchronize()
        return measure.seconds_of(run) / len(timesteps)

    def inputs(self, batch_size: int) -> Fields:
        sizes, config = self.model.config, self.config
        shape = (batch_size, sizes.in_channels, sizes.sample_size, sizes.sample_size)
        return {
            "hidden_states": torch.randn(shape, device=config.device, dtype=self.model.dtype),
            "class_labels": torch.arange(batch_size, device=config.device) % sizes.num_classes,
        }

    def measure(self, mode: GpuMode, batch_size: int, spec: str) -> Row:
        """Time runs with and without a cache in turn; the first run of each does not count."""
        inputs, full, reused = self.inputs(batch_size), [], []
        self.seconds(inputs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "cache .* has not reused once")
            with cached(self.pipeline, spec) as cache:
                self.seconds(inputs)  # counts FLOPs, and compiles
                summary = cache.summary()
            for _ in range(self.config.num_rounds):
                full.append(self.seconds(inputs))
                with cached(self.pipeline, spec):
                    self.seconds(inputs)
                    reused.append(self.seconds(inputs))
        steps = summary.steps_full, summary.steps_reused
        return Row(mode, batch_size, spec, *steps, summary.compute_ratio, tuple(full), tuple(reused))


@torch.no_grad()
def bench_gpu(config: GpuBenchConfig, out: OutputFolder, clock: Callable[[], float] = perf_counter) -> list[Row]:
    """Measure every cache, and write `{device}.json` and `.md` into `out` after each; they name the caches that
    `max_seconds` left no time for. clock: returns seconds.

    Raises `ValueError` if the device or a cache does not exist.
    """
    for spec in (*config.specs, *config.compiled_specs):
        parse_method(spec)
    rows, pending = [], config.rows()
    with measure.benchmark(config, out, config.device) as environment, counting("", len(pending)) as advance:
        start, runs = clock(), Runs(config)
        for mode in config.modes:
            with nullcontext() if mode == "eager" else measure.compiled(runs.model, fullgraph=True, mode=mode):
                while pending and pending[0][0] == mode and clock() - start < config.max_seconds:
                    advance(0, description=_name(*pending[0]))
                    rows.append(runs.measure(*pending.pop(0)))
                    report_of(config, environment, rows, pending).write(out, config.device)
                    advance()
    return rows


def report_of(
    config: GpuBenchConfig, environment: Mapping[str, str], rows: list[Row], pending: list[tuple[GpuMode, int, str]]
) -> Report:
    small = {row.name: row.achieved for row in rows if row.mode == "eager" and row.batch_size < SMALL_BATCH}
    others = {row.name: row.achieved for row in rows if row.name not in small}
    missing = f"Not begun within {config.max_seconds:g} seconds: {'; '.join(_name(*row) for row in pending)}."
    return Report(
        title=f"Caches of {config.preset} on a device: {config.device}",
        environment=environment,
        config=config,
        data={"rows": [record(row, "speedup", "achieved") for row in rows], "left_out": pending},
        parts=[
            f"Runs of {config.num_inference_steps} steps in {config.dtype}, a call of the model per step; medians of "
            f"{config.num_rounds} rounds, in which runs with and without the cache take turns. Bound: the speedup that "
            "FLOPs of the whole model allow. Achieved: the share of it.",
            table([row.cells() for row in rows]),
            judge("Achieved, small batches in eager mode", small, SMALL_BATCH_TARGET),
            judge("Achieved, all others", others, measure.ACHIEVED_TARGET),
            missing if pending else "",
        ],
    )
