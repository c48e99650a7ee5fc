"""`skipdit ema`: a pipeline with averaged weights of another length."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from skipdit.command_options import parse


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
    from skipdit.averaging import write_average

    average = write_average(options.run, options.length, options.out, options.step)
    print(
        f"average of length {average.length:g} at step {average.step}, from {len(average.weights)} snapshots ", end=""
    )
    print(f"(off from the weights over time by {average.error:.1%}): skipdit sample --model {options.out}")
