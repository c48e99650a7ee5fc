"""`skipdit ema`: a pipeline with averaged weights of another length than a run released."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from skipdit.command_options import parse


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Which average of which run."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    length: float
    """standard deviation of the average's weights over time, as a share of the steps so far: 0.01 to 0.28"""
    out: Path
    """folder of the pipeline"""
    step: int | None = None
    """of a snapshot, at which the average ends; by default the last"""


def ema(arguments: Sequence[str]) -> None:
    """Write a run's pipeline with averaged weights of another length, from its --ema-snapshots-every.

    Example: skipdit ema runs/emoji --length 0.15 --out runs/emoji-ema-0.15
    """
    options = parse("ema", ema.__doc__, arguments, AverageOptions)
    from skipdit.averaging import write_average

    average = write_average(options.run, options.length, options.out, options.step)
    print(
        f"average of length {average.length:g} at step {average.step}, from {len(average.weights)} snapshots ", end=""
    )
    print(f"(off from the weights over time by {average.error:.1%}): skipdit sample --model {options.out}")
