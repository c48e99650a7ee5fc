"""What `skipdit ema` does: a pipeline with averaged weights of another length than a run released."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from skipdit.files.output import absolute, atomic_folder, check_apart, check_replaceable
from skipdit.loading import load_source
from skipdit.training.loop import MAX_SHARD_SIZE
from skipdit.training.posthoc_ema import Combination, reconstruct


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Which average of which run."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    length: float
    """standard deviation of the average's weights over time, as a share of the steps so far: 0.01 to 0.28"""
    out: Path
    """folder of the pipeline"""
    step: int | None = None
    """of a snapshot, at which the average ends; by default the last"""


def write_average(config: AverageConfig) -> Combination:
    """Write the pipeline, in float32. `OSError` or `ValueError` where the run has no such average."""
    out = absolute(config.out)
    check_apart(out, [config.run])
    check_replaceable(out, "model")
    sampler = load_source(str(config.run), device="cpu", decodes=False).sampler
    average = reconstruct(config.run, sampler.pipeline.transformer, config.length, config.step)
    with atomic_folder(out, "model") as draft:
        sampler.save(draft, MAX_SHARD_SIZE)
    return average
