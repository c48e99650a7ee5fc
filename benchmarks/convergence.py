"""Compares how fast models with long skips and plain ones learn, from the logs of trainings alike in all else.

    python benchmarks/convergence.py --pair emoji runs/plain0/log.jsonl runs/skip0/log.jsonl \\
        --pair emoji runs/plain1/log.jsonl runs/skip1/log.jsonl --report benchmarks

A pair has the name of what was learned, the log of the plain model, and that of the model with long skips. The loss is
the lowest so far of the log, smoothed over a fifteenth of it. At each quarter of the plain run: both losses, and how
many steps the other model needs for the plain one's over those that the plain one needed. The paper: 4.4 times fewer.
"""

import argparse
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev

from skipdit.analysis.weights import TrainingLog
from skipdit.environment import describe_environment
from skipdit.files.output import output_folder
from skipdit.report import Report, listed, table

QUARTERS = (0.25, 0.5, 0.75, 1.0)
WINDOWS = 15  # in a log
Curve = list[tuple[int, float]]


def smoothed(log: TrainingLog) -> Curve:
    """Return the steps of a log with the lowest mean loss around any so far."""
    losses, half = log.loss.tolist(), max(len(log.loss) // WINDOWS // 2, 1)
    means = [fmean(losses[max(0, place - half) : place + half + 1]) for place in range(len(losses))]
    return list(zip(log.steps.tolist(), accumulate(means, min), strict=True))


def compare(plain: Curve, skip: Curve) -> list[dict[str, float | int | None]]:
    """Return one row per quarter of the plain run. `ValueError` where the two were not logged at the same steps."""
    if [step for step, _ in plain] != [step for step, _ in skip]:
        raise ValueError("the two logs are not of the same steps")
    rows = []
    for quarter in QUARTERS:
        place = max(round(len(plain) * quarter) - 1, 0)
        step, loss = plain[place]
        needed = next(other for other, value in plain if value <= loss)
        reached = next((other for other, value in skip if value <= loss), None)
        ratio = None if reached is None else reached / needed
        rows.append({"step": step, "plain": loss, "skip": skip[place][1], "ratio": ratio})
    return rows


def cells_of(name: str, rows: Sequence[dict[str, float | int | None]]) -> dict[str, object]:
    """Return a row of the table, of the same quarter of all pairs."""

    def spread(values: Sequence[float], digits: int) -> str:
        return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

    known = [row["ratio"] for row in rows if row["ratio"] is not None]
    told = [f"{spread(known, 2)}x"] if known else []
    told += [f"not reached in {len(rows) - len(known)} of {len(rows)}"] if len(known) < len(rows) else []
    return {
        "learned": name,
        "pairs": len(rows),
        "step": rows[0]["step"],
        "loss, plain": spread([row["plain"] or 0.0 for row in rows], 4),
        "loss, long skips": spread([row["skip"] or 0.0 for row in rows], 4),
        "steps that long skips need over the plain model's": "; ".join(told),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=3, action="append", required=True, help="name, log of plain, log of long skips")
    parser.add_argument("--about", default="", help="how the models were trained, in words, for the report")
    parser.add_argument("--report", type=Path, default=Path("out/convergence"), help="folder of the table")
    options = parser.parse_args(arguments)
    found: dict[str, list[list[dict[str, float | int | None]]]] = {}
    for name, plain, skip in options.pair:
        try:
            rows = compare(*(smoothed(TrainingLog.read(Path(path))) for path in (plain, skip)))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        found.setdefault(name, []).append(rows)
    rows = [
        cells_of(name, [pair[quarter] for pair in pairs])
        for name, pairs in found.items()
        for quarter in range(len(QUARTERS))
    ]
    facts = {"trained": options.about} if options.about else {}
    facts["loss"] = "the training loss of the log, smoothed over a fifteenth of the run, the lowest so far"
    with output_folder(options.report, "bench") as out:
        environment = describe_environment("cpu", 0)
        del environment["gpu"], environment["seed"]  # of the report, not of the trainings
        title = "Convergence: with long skips and without"
        report = Report(
            config=vars(options) | {"report": ""},
            environment=environment,
            data={"pairs": found},
            title=title,
            parts=[listed(facts), table(rows)],
        )
        report.write(out, "convergence")
    print(f"written: {options.report / 'convergence.md'}")


if __name__ == "__main__":
    main()
