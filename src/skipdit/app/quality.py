"""The second tab: the results of `skipdit bench cache`, and schedules calibrated for a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

from skipdit.app.forms import check_form
from skipdit.app.jobs import Job
from skipdit.app.models import cancellable
from skipdit.benchmark.cache import report_name
from skipdit.benchmark.cache_report import Group, front
from skipdit.cache.methods import CacheMethod, load_schedule
from skipdit.calibration.calibrate import made_for_of, make_runner, to_fields
from skipdit.calibration.config import CalibrateConfig
from skipdit.calibration.find import check_finite, explicit, find_schedules
from skipdit.calibration.trials import Trials, measure
from skipdit.files.untrusted import read_json
from skipdit.loading import Source

MAX_STEPS, MAX_SAMPLES, MAX_SPEEDUP = 250, 8, 10
MAX_REPORT_BYTES = 2**26

# ----------------------------------------------------------------------------------------------------------------------
# What was measured


class ScoreFields(TypedDict, total=False):
    mean: float | None


class RowFields(TypedDict, total=False):
    method: str
    setting: str
    group: Group
    speedup: float | None
    psnr: ScoreFields | None
    psnr_db: ScoreFields | None


class ReportFields(TypedDict):
    """The fields read from a `cache_quality.json`."""

    rows: list[RowFields]


@dataclass(frozen=True)
class Point:
    """A setting of a method."""

    setting: str
    speedup: float
    psnr_db: float


@dataclass(frozen=True)
class Series:
    """The settings on the Pareto front of a method, slow ones first."""

    method: str
    group: Group
    points: list[Point]


@dataclass(frozen=True)
class Measurements:
    """The results of a benchmark of a model."""

    source: str
    """the file"""
    series: list[Series]


def find_measurements(model: str, folders: Sequence[Path]) -> Measurements | None:
    """Return the results of `skipdit bench cache` for a model from the first of these folders that has them. model: its
    name or path. `ValueError` if the file is broken."""
    name = f"{report_name(model)}.json"
    for folder in folders:
        if (folder / name).is_file():
            return Measurements(
                str(folder / name), _series(read_json(folder / name, ReportFields, max_bytes=MAX_REPORT_BYTES))
            )
    return None


def _series(report: ReportFields) -> list[Series]:
    found: dict[str, Series] = {}
    for row in report["rows"]:
        score = row.get("psnr") or row.get("psnr_db") or {}
        speedup, psnr, group = row.get("speedup"), score.get("mean"), row.get("group", "others")
        if speedup is None or psnr is None or group == "control":
            continue
        method = row.get("method", "")
        series = found.setdefault(method, Series(method, group, []))
        series.points.append(Point(row.get("setting", ""), speedup, psnr))
    return [_front(each) for each in found.values()]


def _front(series: Series) -> Series:
    kept = front([(point.speedup, point.psnr_db) for point in series.points])
    by_place = {(point.speedup, point.psnr_db): point for point in series.points}
    return replace(series, points=[by_place[place] for place in kept])


@dataclass(frozen=True, kw_only=True)
class ScheduleRequest:
    """The values of the form. `ValueError` if one is out of range."""

    speedup: float = 2.0
    num_inference_steps: int = 50
    num_samples: int = 2

    def __post_init__(self) -> None:
        check_form(
            self,
            speedup=("the target speedup", 1.05, MAX_SPEEDUP),
            num_inference_steps=("steps", 4, MAX_STEPS),
            num_samples=("samples", 1, MAX_SAMPLES),
        )


@dataclass(frozen=True)
class MadeSchedule:
    """A new schedule with its figures."""

    name: str
    method: CacheMethod
    is_full: tuple[bool, ...]
    compute_ratio: float
    predicted_psnr_db: float
    measured_psnr: str
    """on the samples of the calibration"""
    content: str
    """content of its schedule.json"""


def with_schedule(new: MadeSchedule, own: Mapping[str, CacheMethod]) -> dict[str, CacheMethod]:
    """Return the schedules of a page with a new one in front, which replaces an older one of the same name."""
    return {new.name: new.method} | {name: method for name, method in own.items() if name != new.name}


def calibrate(job: Job, source: Source, request: ScheduleRequest) -> MadeSchedule:
    """Find the best schedule of a model for a speedup, and report every step to the job. `ValueError` if the speedup is
    out of reach, or the model has no long skips."""
    config = CalibrateConfig(
        speedups=(request.speedup,),
        num_samples=request.num_samples,
        num_inference_steps=request.num_inference_steps,
        trials=Trials(num_probed=min(8, request.num_inference_steps - 1)),
        rivals=(),
    )
    config = source.complete(config)
    pipeline = source.sampler.pipeline
    made_for = made_for_of(pipeline, config)
    total = request.num_inference_steps + 1 + config.trials.num_probed
    with cancellable(pipeline, job):
        job.tell(doing="measuring what reuse does at each step", done=0, total=total)
        run = replace(make_runner(source, config), advance=job.advance)
        measurement = measure(run, config.site, config.trials, advance=job.advance)
        check_finite(measurement.reference)
        job.tell(doing="trying schedules", done=0, total=0)
        (found,) = find_schedules(measurement, config, replace(run, advance=None))
    content = json.dumps(to_fields(found, config, made_for), indent=1, allow_nan=False)
    schedule = explicit(found.method)
    name = f"made here: {request.speedup:g}x, {request.num_inference_steps} steps"
    return MadeSchedule(
        name=name,
        method=replace(_loaded(content), spec=name),
        is_full=tuple(step in schedule.full_steps for step in range(schedule.num_inference_steps)),
        compute_ratio=found.compute_ratio,
        predicted_psnr_db=found.predicted_psnr_db,
        measured_psnr=found.measured.text(1),
        content=content,
    )


def _loaded(content: str) -> CacheMethod:
    """Return the schedule as read from its file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "schedule.json"
        path.write_text(content, encoding="utf-8")
        return load_schedule(path)
