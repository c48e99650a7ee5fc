"""Measures a schedule that was calibrated at one number of steps in runs of others, beside one calibrated for each.

    python benchmarks/schedule_transfer.py emoji --steps 20 30 100 --out runs/schedule_transfer --report benchmarks

`skipdit calibrate` runs once for `--from-steps` and once for each of `--steps`, into folders of `--out`; a calibration
that is there is not made again, nor is a row; `settings.json` in `--out` keeps what all of them share. Rows are
measured with noise that no calibration has seen: PSNR to the full run of as many steps, and an uncached run of fewer
steps that costs no less. `--report` writes the table of all rows in `--out`, by itself or after measuring. Without a
model nothing is measured.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from skipdit.calibration.calibrate import calibrate, make_runner
from skipdit.calibration.config import CalibrateConfig
from skipdit.environment import check_device, describe_environment
from skipdit.files.json_lines import append_line, read_lines
from skipdit.files.output import output_folder, to_json, write_text
from skipdit.loading import Source, load_source
from skipdit.metrics.paired import psnr_db
from skipdit.report import Report, table
from skipdit.runs import OwnCache, Runner

RESULTS, SETTINGS = "results.jsonl", "settings.json"
SHARED = ("method", "speedups", "num_samples", "num_held_out", "guidance")  # of all rows in one folder
NAME = "schedule_transfer"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A schedule of another number of steps and one of its own, in the same run; `None` where none was found."""

    model: str
    from_steps: int
    steps: int
    speedup: float
    other_ratio: float
    """of compute, by the schedule of other steps"""
    other_db: float
    own_ratio: float | None
    own_db: float | None
    fewer_steps: int
    fewer_db: float


def config_of(options: argparse.Namespace, steps: int) -> CalibrateConfig:
    return CalibrateConfig(
        method=options.method,
        speedups=tuple(options.speedups),
        num_samples=options.num_samples,
        num_held_out=options.num_held_out,
        num_inference_steps=steps,
        guidance_scale=options.guidance,
        rivals=(),
    )


def schedules(source: Source, options: argparse.Namespace, steps: int) -> Path:
    """Return the folder of the schedules for so many steps, calibrated if they are not there."""
    folder = options.out / Path(options.model).name / str(steps)
    if not (folder / "report.json").exists():
        with output_folder(folder, "calibrate") as out:
            calibrate(source, config_of(options, steps), out)
    return folder


def settle(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `--out` keeps of all its rows, written if a model is to be measured. `SystemExit` where other
    settings, or another model of that name, made what is there."""
    path = options.out / SETTINGS
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if options.model is None:
        return kept
    asked, models = {name: getattr(options, name) for name in SHARED}, kept.get("models", {})
    name = Path(options.model).name
    is_known = bool(kept) or not any(options.out.iterdir())
    if not is_known or kept.get("config", asked) != asked or models.get(name, options.model) != options.model:
        raise SystemExit(f"{options.out} holds schedules of other models or settings: give another --out")
    environment = describe_environment(options.device, CalibrateConfig().held_out_seed)
    kept = {"config": asked, "models": models | {name: options.model}, "environment": environment}
    write_text(path, to_json(kept))
    return kept


def decibel(samples: Tensor, reference: Tensor) -> float:
    return min(psnr_db(samples.flatten(0, -4), reference.flatten(0, -4)).mean().item(), 99.9)


def measure(source: Source, options: argparse.Namespace, known: Sequence[Row]) -> Iterator[Row]:
    """Yield what is missing."""
    done = {(row.model, row.from_steps, row.steps, row.speedup) for row in known}
    for steps in options.steps:
        missing = [
            speedup for speedup in options.speedups if (options.model, options.from_steps, steps, speedup) not in done
        ]
        if not missing:
            continue
        others, own = schedules(source, options, options.from_steps), schedules(source, options, steps)
        run = make_runner(source, config_of(options, steps), held_out=True)
        reference = run().samples
        for speedup in missing:
            if (others / f"{speedup:g}x.json").exists():
                yield row_of(options, run, reference, speedup, (others, own))


def row_of(
    options: argparse.Namespace, run: Runner, reference: Tensor, speedup: float, folders: tuple[Path, Path]
) -> Row:
    other, own = (folder / f"{speedup:g}x.json" for folder in folders)
    by_other = run(OwnCache.of(other))
    by_own = run(OwnCache.of(own)) if own.exists() else None
    fewer = math.ceil(run.num_inference_steps / by_other.compute_ratio)
    return Row(
        model=options.model,
        from_steps=options.from_steps,
        steps=run.num_inference_steps,
        speedup=speedup,
        other_ratio=by_other.compute_ratio,
        other_db=decibel(by_other.samples, reference),
        own_ratio=by_own and by_own.compute_ratio,
        own_db=by_own and decibel(by_own.samples, reference),
        fewer_steps=fewer,
        fewer_db=decibel(run(num_inference_steps=fewer).samples, reference),
    )


def read_rows(out: Path) -> list[Row]:
    """Return what was measured; a line that a kill has cut is left out."""
    return [Row(**line) for line in read_lines(out / RESULTS)]


def cells(row: Row) -> dict[str, object]:
    return {
        "model": Path(row.model).name,
        "steps": row.steps,
        "asked": f"{row.speedup:g}x",
        f"compute, file of {row.from_steps} steps": f"{row.other_ratio:.2f}",
        "dB": f"{row.other_db:.1f}",
        "own compute": "" if row.own_ratio is None else f"{row.own_ratio:.2f}",
        "own dB": "" if row.own_db is None else f"{row.own_db:.1f}",
        "behind own dB": "" if row.own_db is None else f"{row.own_db - row.other_db:+.1f}",
        "fewer steps": row.fewer_steps,
        "fewer dB": f"{row.fewer_db:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a bundled model, or the folder of a run or a pipeline")
    parser.add_argument("--from-steps", type=int, default=50, help="of the calibration whose schedules are used")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 30, 100], help="of the runs")
    parser.add_argument("--method", default="skip-taylor", help="as of skipdit calibrate")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 2.5, 3.0], help="by compute")
    parser.add_argument("--num-samples", type=int, default=4, help="of a calibration")
    parser.add_argument("--num-held-out", type=int, default=8, help="on which rows are measured")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of guidance; none at 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/schedule_transfer"), help="schedules and results")
    parser.add_argument("--report", type=Path, default=None, help="folder of the table; none by default")
    options = parser.parse_args()
    if options.model is None and options.report is None:
        parser.error("give a model, or --report")
    check_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    kept, rows = settle(options), read_rows(options.out)
    if options.model is not None:
        for row in measure(load_source(options.model, device=options.device), options, rows):
            print(row, flush=True)
            append_line(options.out / RESULTS, row)
            rows.append(row)
    if options.report is not None:
        if not kept:
            parser.error(f"{options.out} holds no results")
        rows.sort(key=lambda row: (row.model, row.steps, row.speedup))
        with output_folder(options.report, "bench") as out:
            Report(
                title="Schedules in runs of other numbers of steps",
                config=kept["config"],
                environment=kept["environment"],
                data={"rows": [asdict(row) | {"model": Path(row.model).name} for row in rows]},
                parts=[table([cells(row) for row in rows])],
            ).write(out, NAME)
        print((options.report / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
