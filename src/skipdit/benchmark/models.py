"""`skipdit bench models`: seconds, FLOPs and memory of full and reuse steps of class-to-image models, compared with the
uncached and the plain model."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn

from skipdit.benchmark import measure
from skipdit.benchmark.config import DType, Mode
from skipdit.benchmark.config import ModelBenchConfig as ModelBenchConfig
from skipdit.benchmark.measure import Advance, Call, Kind, Ratios, Subject
from skipdit.cache.compiled import more_graphs
from skipdit.cache.schedule import IntervalSchedule, resolve
from skipdit.files.output import OutputFolder
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig
from skipdit.options import Device
from skipdit.report import Report, judge, numbers, record, table
from skipdit.terminal import counting

BFLOAT16_TARGETS = {"DiT-XL/2": 1.8}  # speed over float32
SCHEDULE = IntervalSchedule(interval=2, start_timestep=1000, stop_timestep=20)  # the authors', arXiv 2411.17616
FULL_STEPS = resolve(SCHEDULE, torch.linspace(999, 0, 50).round().tolist())
NO_COMPILER = re.compile(r"No working C\+\+ compiler found|Failed to find C compiler")  # Inductor's and Triton's words


@dataclass(frozen=True)
class Step:
    """A call that is timed: a forward of the plain model or of the uncached long-skip model, or a step of the cached
    one."""

    preset: str
    mode: Mode
    dtype: DType
    kind: Kind
    num_shallow_units: int | None = None

    def __str__(self) -> str:
        k = f" k={self.num_shallow_units}" if self.num_shallow_units else ""
        return f"{self.preset} {self.mode} {self.dtype} {self.kind}{k}"


@dataclass(frozen=True)
class Row:
    """The cost of a step."""

    step: Step
    batch_size: int
    flops: int
    """FLOPs of the batch; a multiply-add counts as two"""
    seconds: tuple[float, ...]
    """one per repetition"""
    first_seconds: float
    """seconds of the first call, including compilation"""
    peak_bytes: int | None
    """peak memory of the process in a call, resident on a CPU or allocated on a GPU, minus the weights of the preset's
    other models; `None` if the system does not report it"""

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)


def ratios_of(full: Row, rows: Mapping[Step, Row]) -> Ratios:
    """Return the ratios of a full step's model: `step_ratios`, `run_ratios`, and as `overhead` the seconds of the full
    step divided by those of the uncached forward."""
    plain, uncached = (rows[replace(full.step, kind=kind, num_shallow_units=None)] for kind in ("plain", "uncached"))
    reuse = rows[replace(full.step, kind="reuse")]
    run = measure.run_ratios(FULL_STEPS, plain=plain, uncached=uncached, full=full, reuse=reuse)
    return measure.step_ratios(full, reuse) | run | {"overhead": measure.median_ratio(full, uncached)}


def speed_over_float32(row: Row, rows: Mapping[Step, Row]) -> float | None:
    """Return the seconds of the same step in float32 divided by those of this step; `None` if it was not measured."""
    base = rows.get(replace(row.step, dtype="float32"))
    return None if base is None else measure.median_ratio(base, row)


def make_subject(config: ModelBenchConfig, preset: str, dtype: DType, long_skip: LongSkipConfig | None) -> Subject:
    """Return a model with random weights, and inputs for it."""
    torch.manual_seed(config.seed)
    model = DiT.from_preset(preset, long_skip=long_skip).eval()
    measure.fill_zeros(model)
    shape = (config.batch_size(preset), *(model.config[name] for name in ("in_channels", "sample_size", "sample_size")))
    class_labels = torch.randint(model.config["num_classes"], shape[:1]).to(config.device)
    hidden_states = torch.randn(shape).to(config.device, getattr(torch, dtype))
    nn.Module.to(model, config.device, hidden_states.dtype)  # diffusers' own warns at every cast
    return Subject(model, {"hidden_states": hidden_states, "class_labels": class_labels})


def check_compiler(device: Device) -> None:
    """Raise `ValueError` if PyTorch finds no compiler; other failures are raised as they are."""
    try:
        torch.compile(torch.neg, fullgraph=True)(torch.ones(8, device=device))
    except RuntimeError as error:
        missing = NO_COMPILER.search(str(error))
        if missing is None:
            raise
        remedy = "install one such as g++ or name it in CXX, or measure mode 'eager' alone"
        raise ValueError(f"mode 'compiled' needs a C++ compiler ({missing[0]}): {remedy}") from error


@torch.no_grad()
def bench_preset(config: ModelBenchConfig, preset: str, advance: Advance) -> list[Row]:
    """Return the rows of one preset in every mode and dtype. Calls `advance(description=...)` before each call."""
    skips = (None, LongSkipConfig())
    subjects: list[tuple[DType, Subject]] = [
        (dtype, make_subject(config, preset, dtype, skip)) for dtype in config.dtypes for skip in skips
    ]
    total_bytes = measure.weight_bytes(*(subject.model for _, subject in subjects))

    def calls(mode: Mode) -> Iterator[tuple[Step, Subject, Call]]:
        for dtype, subject in subjects:
            for kind, k, call in subject.calls(config.num_shallow_units):
                step = Step(preset, mode, dtype, kind, k)
                advance(description=str(step))
                yield step, subject, call

    counted = [
        (step, measure.flops_of(call), total_bytes - measure.weight_bytes(subject.model))
        for step, subject, call in calls("eager")
    ]
    size, num_warmup, rows = config.batch_size(preset), config.num_warmup, []
    for mode in sorted(config.modes, reverse=True):  # eager first, as compiled models stay compiled
        if mode == "compiled":
            torch.compiler.reset()
            for _, subject in subjects:
                subject.model.compile(fullgraph=True)
        num_rounds = num_warmup + config.num_repetitions
        with more_graphs():  # a graph for each step
            timed = measure.time_rounds(
                lambda mode=mode: (call for _, _, call in calls(mode)), num_rounds, config.device
            )
        for (step, flops, others), times in zip(counted, timed, strict=True):
            peak = times.peak(num_warmup=num_warmup, others=others)
            rows.append(Row(replace(step, mode=mode), size, flops, times.seconds[num_warmup:], times.seconds[0], peak))
    return rows


def bench_models(config: ModelBenchConfig, out: OutputFolder) -> list[Row]:
    """Measure every model of the config, and write `class_to_image_{device}.json` and `.md` into `out`.

    Raises `ValueError`, before anything is measured, if the device or a compiler that the config needs is missing.
    """
    name = f"class_to_image_{config.device}"
    with measure.benchmark(config, out, name) as environment:
        if "compiled" in config.modes:
            check_compiler(config.device)
        num_steps = len(config.dtypes) * (2 + 2 * len(config.num_shallow_units))
        num_rounds = 1 + len(config.modes) * (config.num_warmup + config.num_repetitions)
        with counting("", len(config.presets) * num_rounds * num_steps) as advance:
            rows = [row for preset in config.presets for row in bench_preset(config, preset, advance)]
    by_step = {row.step: row for row in rows}
    ratios = {row.step: ratios_of(row, by_step) for row in rows if row.step.kind == "full"}
    speeds = {row.step: speed_over_float32(row, by_step) for row in rows}
    report = Report(
        environment=environment,
        config=config,
        data={
            "rows": [record(row, "median_seconds") for row in rows],
            "ratios": [{"step": step, **values} for step, values in ratios.items()],
        },
        parts=[
            table([row_record(row, speeds[row.step]) for row in rows]),
            f"A run has {len(FULL_STEPS)} steps with {SCHEDULE}, {sum(FULL_STEPS)} of them full; its time is added up "
            "from the steps above. A bound is the same ratio in FLOPs.",
            table([{"step": step, **numbers(values)} for step, values in ratios.items()]),
            *verdict(speeds, ratios),
        ],
    )
    report.write(out, name)
    return rows


def row_record(row: Row, speed: float | None) -> dict[str, object]:
    return {
        "step": row.step,
        "batch": row.batch_size,
        **measure.cost_record(row),
        "over float32": "" if speed is None else f"{speed:.2f}",
        **measure.flops_record(row),
        "first call s": f"{row.first_seconds:.1f}",
        "peak MiB": measure.mebibytes(row.peak_bytes),
    }


def verdict(speeds: Mapping[Step, float | None], ratios: Mapping[Step, Ratios]) -> Iterator[str]:
    """Yield sentences on the targets that are reached and missed."""
    achieved = {step: values["achieved"] for step, values in ratios.items()}
    yield judge("Run speedup over its bound", achieved, measure.ACHIEVED_TARGET)
    for preset, target in BFLOAT16_TARGETS.items():
        of_preset = {step: x for step, x in speeds.items() if x and (step.preset, step.dtype) == (preset, "bfloat16")}
        yield judge(f"Speed of bfloat16 over float32 of {preset}", of_preset, target)
    overheads = [values["overhead"] for values in ratios.values()]
    yield f"A full step with the cache takes {min(overheads):.3f} to {max(overheads):.3f} times the uncached forward."
