"""`skipdit ema`: a pipeline with averaged weights of another length than a run released."""

from collections.abc import Sequence

from skipdit.command_options import parse


def ema(arguments: Sequence[str]) -> None:
    """Write a run's pipeline with averaged weights of another length, from its --ema-snapshots-every.

    Example: skipdit ema runs/emoji --length 0.15 --out runs/emoji-ema-0.15
    """
    from skipdit.averaging import AverageConfig, write_average

    config = parse("ema", ema.__doc__, arguments, AverageConfig)
    average = write_average(config)
    print(
        f"average of length {average.length:g} at step {average.step}, from {len(average.weights)} snapshots ", end=""
    )
    print(f"(off from the weights over time by {average.error:.1%}): skipdit sample --model {config.out}")
