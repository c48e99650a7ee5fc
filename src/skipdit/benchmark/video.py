"""`skipdit bench video`: costs of video models with all, a few and no long skips: steps, cached runs, and memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from skipdit.benchmark import measure
from skipdit.benchmark.config import Size, VideoBenchConfig, VideoTask
from skipdit.benchmark.measure import Advance, Call, Ratios, Subject
from skipdit.benchmark.video_models import (
    VideoStep,
    feature_bytes,
    make_subjects,
    num_outputs,
)
from skipdit.cache.enable import cache_summary
from skipdit.cache.methods import parse_method
from skipdit.cache.schedule import resolve
from skipdit.diffusion import Objective, make_scheduler
from skipdit.files.output import OutputFolder
from skipdit.interfaces import Scheduler
from skipdit.report import Report, judge, numbers, record, table
from skipdit.terminal import counting

# the authors' (arXiv 2411.17616), who sample both with 50 steps of DDIM
SCHEDULES: dict[VideoTask, tuple[str, ...]] = {
    "class-to-video": ("N2-900-50", "N3-900-50"),
    "text-to-video": ("N2-700-50", "N3-700-50"),
}
NUM_INFERENCE_STEPS = 50


@dataclass(frozen=True)
class VideoRow:
    """The cost of a step."""

    step: VideoStep
    num_frames: int
    batch_size: int
    flops: int
    """FLOPs of the batch; a multiply-add counts as two"""
    seconds: tuple[float, ...]
    """one per repetition"""
    bytes_held: int
    """memory that the cache holds for one context after a reuse step"""
    features_held: int
    """the same as a number of tensors of hidden states"""
    num_outputs: int
    """number of attentions and MLPs in the blocks"""
    output_bytes: int
    """memory that the outputs of all of them would take"""
    peak_bytes: int | None
    """peak memory of the process in a call, resident on a CPU or allocated on a GPU, minus the weights that only the
    other models of this size have; `None` if the system does not report it"""

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)


@torch.no_grad()
def bench_size(config: VideoBenchConfig, size: Size, advance: Advance) -> list[VideoRow]:
    """Return the rows of one model. Calls `advance(description=...)` before each call. FLOPs are counted in one call of
    everything, which is also the warm-up."""
    subjects = make_subjects(config, size)
    plain = subjects[0][1].model
    total_bytes = measure.weight_bytes(*(subject.model for _, subject in subjects))
    outputs, bytes_per_feature = num_outputs(plain), feature_bytes(config, size, plain)

    def calls() -> Iterator[tuple[VideoStep, Subject, Call]]:
        for uncached, subject in subjects:
            for kind, k, call in subject.calls(config.num_shallow_units):
                step = replace(uncached, kind=uncached.kind if k is None else kind, num_shallow_units=k)
                advance(description=str(step))
                yield step, subject, call

    counted = []
    for step, subject, call in calls():
        flops = measure.flops_of(call)
        held = cache_summary(subject.model).bytes_held if step.kind == "reuse" else 0
        counted.append((step, flops, held, total_bytes - measure.weight_bytes(subject.model)))
    timed = measure.time_rounds(lambda: (call for _, _, call in calls()), config.num_repetitions, config.device)
    rows = []
    for (step, flops, held, others), times in zip(counted, timed, strict=True):
        features, remainder = divmod(held, bytes_per_feature)
        assert remainder == 0, f"{held} bytes held, {bytes_per_feature} per tensor of hidden states"
        memory = (held, features, outputs, outputs * bytes_per_feature, times.peak(others=others))
        rows.append(VideoRow(step, size.num_frames, config.batch_size, flops, times.seconds, *memory))
    return rows


def full_steps(spec: str) -> tuple[bool, ...]:
    """Return true for each step of a DDIM run that is full under a schedule."""
    scheduler: Scheduler = make_scheduler(Objective(learned_variance=True), "ddim")
    scheduler.set_timesteps(NUM_INFERENCE_STEPS)
    return resolve(parse_method(spec).schedule, scheduler.timesteps.tolist())


@dataclass(frozen=True)
class CachedRun:
    """A run with a schedule, computed from full and reuse steps."""

    schedule: str
    num_full: int
    """number of full steps"""
    ratios: Ratios
    """see `run_ratios`"""


@dataclass(frozen=True)
class CachedStep:
    """A full step, its ratios to the reuse step and to the models without a cache, and its runs."""

    step: VideoStep
    ratios: Ratios
    runs: tuple[CachedRun, ...]


def cached_steps(task: VideoTask, rows: Mapping[VideoStep, VideoRow]) -> list[CachedStep]:
    """Return the full steps of one model. Their ratios are `step_ratios`, `overhead` (seconds of the full step divided
    by those of the uncached forward) and `skips_over_plain` (those of the uncached forward divided by the plain
    model's)."""
    schedules = {spec: full_steps(spec) for spec in SCHEDULES[task]}
    cached = []
    for full in (row for row in rows.values() if row.step.kind == "full"):
        reuse = rows[replace(full.step, kind="reuse")]
        uncached = rows[replace(full.step, kind="uncached", num_shallow_units=None)]
        plain = rows[VideoStep(full.step.model, 0, "plain")]
        timed = {"plain": plain, "uncached": uncached, "full": full, "reuse": reuse}
        runs = (CachedRun(spec, sum(steps), measure.run_ratios(steps, **timed)) for spec, steps in schedules.items())
        ratios = measure.step_ratios(full, reuse) | {
            "overhead": measure.median_ratio(full, uncached),
            "skips_over_plain": measure.median_ratio(uncached, plain),
        }
        cached.append(CachedStep(full.step, ratios, tuple(runs)))
    return cached


def swap_ratios(rows: Mapping[VideoStep, VideoRow]) -> dict[str, Ratios]:
    """Return, for each model with opened units, the seconds of its forward divided by the plain model's, and the same
    ratio of two measurements of the plain model."""
    ratios = {}
    for step, opened in rows.items():
        if step.kind == "opened":
            plain, again = rows[replace(step, kind="plain")], rows[replace(step, kind="plain again")]
            timed = {"opened": opened, "plain_again": again}
            ratios[step.model] = {name: measure.median_ratio(row, plain) for name, row in timed.items()}
    return ratios


def bench_videos(config: VideoBenchConfig, out: OutputFolder) -> list[VideoRow]:
    """Measure every model of the config, and write `video_{device}.json` and `.md` into `out`.

    Raises `ValueError`, before anything is measured, if the device does not exist.
    """
    name, rows, cached = f"video_{config.device}", {}, []
    with measure.benchmark(config, out, name) as environment:
        linked = len(config.num_pairs) * (1 + 2 * len(config.num_shallow_units))
        num_steps = sum(linked + (3 if size.is_swapped else 1) for size in config.sizes())
        with counting("", num_steps * (1 + config.num_repetitions)) as advance:
            for size in config.sizes():
                rows_of_size = {row.step: row for row in bench_size(config, size, advance)}
                rows |= rows_of_size
                cached += cached_steps(size.task, rows_of_size)
    report_of(config, environment, rows, cached).write(out, name)
    return list(rows.values())


# ----------------------------------------------------------------------------------------------------------------------
# The report


def report_of(
    config: VideoBenchConfig,
    environment: Mapping[str, str],
    rows: Mapping[VideoStep, VideoRow],
    cached: Sequence[CachedStep],
) -> Report:
    reuse = {full.step: rows[replace(full.step, kind="reuse")] for full in cached}
    return Report(
        environment=environment,
        config=config,
        data={
            "rows": [record(row, "median_seconds") for row in rows.values()],
            "ratios": cached,
            "class_swap": swap_ratios(rows),
        },
        parts=[
            table([row_record(row, rows[VideoStep(row.step.model, 0, "plain")]) for row in rows.values()]),
            "A full step beside its reuse step (step_ratio; step_bound is the same ratio in FLOPs), the uncached "
            "forward (overhead), and the uncached forward beside that of the plain model (skips_over_plain).",
            table([step_record(full, rows[full.step], reuse[full.step]) for full in cached]),
            f"A run has {NUM_INFERENCE_STEPS} steps of DDIM; its time is added up from the steps above. A bound is the "
            "same ratio in FLOPs.",
            table([run_record(full.step, run) for full in cached for run in full.runs]),
            "What the cache holds in a context after a reuse step, beside the outputs of all attentions and MLPs.",
            table([memory_record(row) for row in reuse.values()]),
            *verdict(cached, rows),
        ],
    )


def row_record(row: VideoRow, plain: VideoRow) -> dict[str, object]:
    return {
        "step": row.step,
        "batch": row.batch_size,
        "frames": row.num_frames,
        **measure.cost_record(row),
        "over plain": f"{measure.median_ratio(row, plain):.3f}",
        **measure.flops_record(row),
        "peak MiB": measure.mebibytes(row.peak_bytes),
    }


def step_record(cached: CachedStep, full: VideoRow, reuse: VideoRow) -> dict[str, object]:
    seconds = {"full s": full.median_seconds, "reuse s": reuse.median_seconds}
    return {"step": cached.step, **numbers(seconds | cached.ratios)}


def run_record(step: VideoStep, run: CachedRun) -> dict[str, object]:
    return {"step": step, "schedule": run.schedule, "full steps": run.num_full, **numbers(run.ratios)}


def memory_record(row: VideoRow) -> dict[str, object]:
    return {
        "step": row.step,
        "held MiB": f"{row.bytes_held / 2**20:.2f}",
        "tensors": row.features_held,
        "all outputs MiB": f"{row.output_bytes / 2**20:.2f}",
        "outputs": row.num_outputs,
        "outputs over held": f"{row.output_bytes / row.bytes_held:.1f}",
    }


def verdict(cached: Sequence[CachedStep], rows: Mapping[VideoStep, VideoRow]) -> Iterator[str]:
    """Yield sentences on the targets that are reached and missed, and on the cost of the class swap."""
    achieved = {f"{full.step} {run.schedule}": run.ratios["achieved"] for full in cached for run in full.runs}
    yield judge("Run speedup over its bound", achieved, measure.ACHIEVED_TARGET)
    overheads = [full.ratios["overhead"] for full in cached]
    yield f"A full step with the cache takes {min(overheads):.3f} to {max(overheads):.3f} times the uncached forward."
    for model, ratios in swap_ratios(rows).items():
        yield (
            f"{model} with its units opened takes {ratios['opened']:.3f} times the plain forward, which takes "
            f"{ratios['plain_again']:.3f} times itself when measured again."
        )
