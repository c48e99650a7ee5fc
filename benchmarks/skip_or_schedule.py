"""Tells what of a cache's quality is the schedule's and what is the long skips': one search, on pairs of models.

    python benchmarks/skip_or_schedule.py --skip runs/skip0 runs/skip1 --plain runs/plain0 runs/plain1 \\
        --device cuda --out runs/skip_or_schedule --report benchmarks

A pair is a model with long skips and a plain one that was trained alike: a run or the folder of a pipeline each. The
search of `skipdit calibrate` is made three times per pair: on the model with long skips, for the features behind its
skips (`skip-taylor`) and for the sum of what its middle units add (`delta-taylor`), which needs no skips; and on the
plain model for the latter. The rows are measured with noise that no search has seen: the schedules found, the same
cache at fixed intervals, and uncached runs of fewer steps that cost no less, also with a second-order solver. Distances
are to the same model's full run.

Small models leave a GPU waiting for their Python, so that `--num-processes` helps there: each measures one model at one
site at a time. The command goes on where it was stopped. `--report` writes the tables of all that `--out` holds, by
itself or after measuring. Without `--skip` and `--plain` nothing is measured.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev

from skipdit.cache.runtime import FewerStepsWarning
from skipdit.calibration.calibrate import Row as Measured
from skipdit.calibration.calibrate import at_compute, held_out, make_runner, warned_once
from skipdit.calibration.config import CalibrateConfig
from skipdit.calibration.find import check_finite, find_schedules
from skipdit.calibration.trials import measure
from skipdit.environment import check_device, describe_environment
from skipdit.files.json_lines import append_line, read_lines
from skipdit.files.output import output_folder
from skipdit.loading import Source, load_source
from skipdit.options import Device
from skipdit.report import Report, listed, table

RESULTS = "results.jsonl"
VARIANTS = (("skip", "skip"), ("skip", "delta"), ("plain", "delta"))  # model, site
INTERVALS = (2, 3, 4, 5)
SECOND_ORDER = "dpm"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the search and of what is measured."""

    speedups: tuple[float, ...]
    num_samples: int
    num_held_out: int
    steps: int
    guidance: float
    seed: int
    held_out_seed: int

    def config(self, site: str) -> CalibrateConfig:
        method = f"{site}-taylor"
        return CalibrateConfig(
            method=method,
            speedups=self.speedups,
            num_samples=self.num_samples,
            num_held_out=self.num_held_out,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            seed=self.seed,
            held_out_seed=self.held_out_seed,
            rivals=tuple(f"{method}:N{interval}" for interval in INTERVALS),
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one cache at one speedup gives beside what it must beat; dB of PSNR, `None` where there is nothing at this
    compute."""

    speedup: float
    """asked for"""
    steps_full: int
    compute_ratio: float
    searched_db: float | None
    interval_db: float | None
    """of fixed intervals, at equal compute"""
    fewer_steps: int
    fewer_db: float | None
    second_order_db: float | None
    """of so many steps of a second-order solver, to its own full run"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model at one site."""

    pair: int
    model: str
    site: str
    settings: Settings
    path: str
    num_units: int
    seconds: float
    environment: dict[str, str]
    """machine, versions and command"""
    rows: list[Row]

    @property
    def key(self) -> tuple[int, str, str]:
        return self.pair, self.model, self.site


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def row_of(speedup: float, rows: Sequence[Measured], second_order: dict[int, float | None]) -> Row | None:
    """Return the row of a schedule that was found for this speedup; `None` where none was."""
    found = next((row for row in rows if row.name == f"{speedup:g}x" and row.group.startswith("calibrated")), None)
    if found is None:
        return None
    fewer = [row for row in rows if row.group == "fewer steps" and row.compute_ratio <= found.compute_ratio]
    rival = max(fewer, key=lambda row: row.compute_ratio)
    return Row(
        speedup=speedup,
        steps_full=found.steps_full,
        compute_ratio=found.compute_ratio,
        searched_db=found.scores["psnr"].finite_mean,
        interval_db=at_compute([row for row in rows if row.group == "fixed interval"], found.compute_ratio),
        fewer_steps=rival.steps_full,
        fewer_db=rival.scores["psnr"].finite_mean,
        second_order_db=second_order.get(rival.steps_full),
    )


@warned_once(FewerStepsWarning)
def measure_variant(source: Source, site: str, settings: Settings) -> tuple[int, list[Row]]:
    """Search and measure; return the number of units too."""
    config = settings.config(site)
    run = make_runner(source, config)
    measured = measure(run, config.site, config.trials)
    check_finite(measured.reference)
    found = find_schedules(measured, config, run)
    run = make_runner(source, config, held_out=True)
    rows = held_out(found, config, run)
    counts = {math.ceil(settings.steps / row.compute_ratio) for row in rows if row.group.startswith("calibrated")}
    second_order: dict[int, float | None] = {}
    if source.sampler.pipeline.scheduler.config.get("solver_order") != 2:
        reference = run(scheduler=SECOND_ORDER).samples
        for count in counts:
            fewer = run(num_inference_steps=count, scheduler=SECOND_ORDER)
            second_order[count] = fewer.scores(reference)["psnr"].finite_mean
    made_rows = (row_of(speedup, rows, second_order) for speedup in settings.speedups)
    return measured.num_units, [row for row in made_rows if row is not None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model at one site, to be measured."""

    pair: int
    model: str
    site: str
    settings: Settings
    path: str
    device: Device

    def __call__(self) -> Result:
        started = time.perf_counter()
        num_units, rows = measure_variant(load_source(self.path, device=self.device), self.site, self.settings)
        return Result(
            pair=self.pair,
            model=self.model,
            site=self.site,
            settings=self.settings,
            path=self.path,
            num_units=num_units,
            seconds=time.perf_counter() - started,
            environment=describe_environment(self.device, self.settings.seed),
            rows=rows,
        )


def jobs_of(options: argparse.Namespace, settings: Settings, known: Sequence[Result]) -> list[Job]:
    """Return what is missing."""
    done = {each.key: each for each in known}
    jobs = []
    for pair, (skip, plain) in enumerate(zip(options.skip, options.plain, strict=True)):
        for model, site in VARIANTS:
            path = plain if model == "plain" else skip
            before = done.get((pair, model, site))
            if before is None:
                jobs.append(Job(pair=pair, model=model, site=site, settings=settings, path=path, device=options.device))
            elif (before.settings, before.path) != (settings, path):
                raise SystemExit(f"{options.out} holds results of other models or settings: give another --out")
    return jobs


def measured_by(jobs: Sequence[Job], num_processes: int) -> Iterator[Result]:
    """Yield the results, of several processes as they come; an error of one is raised when the others are done."""
    if num_processes == 1:
        yield from (job() for job in jobs)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each process
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        errors = []
        for future in as_completed([pool.submit(job) for job in jobs]):
            if (error := future.exception()) is not None:
                errors.append(error)
            else:
                yield future.result()
        for error in errors:
            raise error


def read_results(out: Path) -> list[Result]:
    """Return what was measured; a line that a kill has cut is left out."""
    found = []
    for content in read_lines(out / RESULTS):
        settings = Settings(**content["settings"] | {"speedups": tuple(content["settings"]["speedups"])})
        rows = [Row(**row) for row in content["rows"]]
        found.append(Result(**content | {"settings": settings, "rows": rows}))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The report


def decibel(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def cells(results: Sequence[Result]) -> list[dict[str, object]]:
    return [
        {
            "pair": each.pair,
            "asked": f"{row.speedup:g}x",
            "model": each.model,
            "site": each.site,
            "full steps": row.steps_full,
            "compute": f"{row.compute_ratio:.2f}",
            "searched dB": decibel(row.searched_db),
            "fixed intervals dB": decibel(row.interval_db),
            "fewer steps": row.fewer_steps,
            "dB": decibel(row.fewer_db),
            "second order dB": decibel(row.second_order_db),
        }
        for each in sorted(results, key=lambda each: (each.pair, VARIANTS.index((each.model, each.site))))
        for row in each.rows
    ]


def shares(results: Sequence[Result]) -> list[dict[str, object]]:
    """Return, per speedup, differences in dB: the mean over pairs and their standard deviation."""
    by_key = {each.key: {row.speedup: row for row in each.rows} for each in results}
    rows = []
    for speedup in dict.fromkeys(row.speedup for each in results for row in each.rows):
        found: dict[str, list[float | None]] = {}
        for pair in dict.fromkeys(each.pair for each in results):
            skip, delta, plain = (by_key.get((pair, *variant), {}).get(speedup) for variant in VARIANTS)
            values = {
                "site: skip over delta, same model": difference(searched(skip), searched(delta)),
                "training: delta with skips over delta without": difference(searched(delta), searched(plain)),
                "both: skip over delta on the plain model": difference(searched(skip), searched(plain)),
                "search over intervals, skip": gain(skip),
                "search over intervals, delta": gain(delta),
                "search over intervals, plain": gain(plain),
            }
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        rows.append({"asked": f"{speedup:g}x"} | {name: spread(values) for name, values in found.items()})
    return rows


def searched(row: Row | None) -> float | None:
    return row and row.searched_db


def gain(row: Row | None) -> float | None:
    return row and difference(row.searched_db, row.interval_db)


def spread(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation over pairs; the mean alone of one."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{fmean(known):+.1f}" + (f" ± {stdev(known):.1f}" if len(known) > 1 else "")


def write_report(results: Sequence[Result], options: argparse.Namespace) -> None:
    """Write skip_or_schedule.md and .json."""
    settings = results[0].settings
    facts = {
        "pairs": f"{1 + max(each.pair for each in results)}, each a model with long skips and a plain one trained "
        f"alike, of {', '.join(map(str, sorted({each.num_units for each in results})))} units",
        "runs": f"{settings.steps} steps, guidance {settings.guidance:g}; searched on {settings.num_samples} samples "
        f"of seed {settings.seed}, measured on {settings.num_held_out} of seed {settings.held_out_seed}",
        "dB": "mean PSNR to the same model's full run, of second order to its own full run",
        "fixed intervals": "the same cache with Taylor's expansion of order 1, at equal compute by interpolation",
        "fewer steps": "uncached, at least as many as cost the same",
    }
    parts = [listed(facts), table(cells(results)), "## What is whose, in dB", table(shares(results))]
    with output_folder(options.report, "bench") as out:
        report = Report(
            config=settings,
            environment=results[0].environment,
            data={"results": [asdict(each) | {"path": Path(each.path).name} for each in results]},
            title="What the schedule gives, and what the long skips give",
            parts=parts,
        )
        report.write(out, "skip_or_schedule")
    print((options.report / "skip_or_schedule.md").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", nargs="+", default=[], help="models with long skips, one per pair")
    parser.add_argument("--plain", nargs="+", default=[], help="plain models, in the same order")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 2.5, 3.0], help="by compute")
    parser.add_argument("--num-samples", type=int, default=4, help="on which schedules are searched")
    parser.add_argument("--num-held-out", type=int, default=16, help="on which they are measured")
    parser.add_argument("--steps", type=int, default=50, help="of the full run and of the cached ones")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of guidance; none at 1")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--held-out-seed", type=int, default=1000, help="of what is measured")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--num-processes", type=int, default=1, help="that measure side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/skip_or_schedule"), help="folder of the results")
    parser.add_argument("--report", type=Path, default=None, help="folder of the tables; none by default")
    options = parser.parse_args()
    if len(options.plain) != len(options.skip) or not (options.plain or options.report):
        parser.error("give as many --plain as --skip, or --report alone")
    check_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    results = read_results(options.out)
    if options.plain:
        fields = ("num_samples", "num_held_out", "steps", "guidance", "seed", "held_out_seed")
        settings = Settings(speedups=tuple(options.speedups), **{name: getattr(options, name) for name in fields})
        for result in measured_by(jobs_of(options, settings, results), options.num_processes):
            append_line(options.out / RESULTS, result)
            results.append(result)
            print(f"pair {result.pair}, {result.model} at {result.site}: {result.seconds:.0f} s", flush=True)
    if options.report is not None:
        if not results:
            parser.error(f"{options.out} holds no results")
        write_report(results, options)


if __name__ == "__main__":
    main()
