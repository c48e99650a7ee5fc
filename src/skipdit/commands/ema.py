"""`skipdit ema`: a pipeline with averaged weights of another length."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from skipdit.command_options import parse
from skipdit.files.output import absolute, atomic_folder, check_apart, check_replaceable


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """The run, and the average to make."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    length: float
    """standard deviation, over time, of the weight that each step has in the average, as a share of all steps: 0.01 to
    0.28"""
    out: Path
    """folder of the pipeline"""
    step: int | None = None
    """step of the snapshot at which the average ends; by default the last one"""


def ema(arguments: Sequence[str]) -> None:
    """Write a pipeline with averaged weights of another length, from a run trained with --ema-snapshots-every.

    Example: skipdit ema runs/emoji --length 0.15 --out runs/emoji-ema-0.15
    """
    options = parse("ema", ema.__doc__, arguments, AverageOptions)
    from skipdit.loading import load_source
    from skipdit.training.loop import MAX_SHARD_SIZE
    from skipdit.training.posthoc_ema import reconstruct

    out = absolute(options.out)
    check_apart(out, [options.run])
    check_replaceable(out, "model")
    sampler = load_source(str(options.run), device="cpu", decodes=False).sampler
    average = reconstruct(options.run, sampler.pipeline.transformer, options.length, options.step)
    with atomic_folder(out, "model") as draft:
        sampler.save(draft, MAX_SHARD_SIZE)
    print(
        f"average of length {average.length:g} at step {average.step}, from {len(average.weights)} snapshots ", end=""
    )
    print(f"(off from the weights over time by {average.error:.1%}): skipdit sample --model {options.out}")
