"""What models cost: seconds, FLOPs and memory of full and reuse steps, beside the uncached and the plain model.

Weights are random. Steps are timed in turn, and a ratio is the median of those within a repetition: machines drift.
"""

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skipdit.cache.methods import CacheMethod
from skipdit.cache.runtime import cache_summary, disable_cache, enable_cache
from skipdit.cache.schedule import IntervalSchedule, resolve
from skipdit.cache.site import DeepFeatures
from skipdit.files import atomic_file
from skipdit.models.dit import PRESETS, DiT
from skipdit.models.long_skip import LongSkipConfig

DType = Literal["float32", "bfloat16"]
Mode = Literal["eager", "compiled"]
Device = Literal["cpu", "cuda"]
Kind = Literal["plain", "uncached", "full", "reuse"]
Call = Callable[[], Tensor]
Ratios = dict[str, float]

ACHIEVED_TARGET = 0.95  # of the speedup that the FLOPs of a cached run allow
BFLOAT16_TARGETS = {"DiT-XL/2": 1.8}  # speed over float32
BATCH_SIZES: dict[Device, dict[str, int]] = {  # by the size in a preset's name
    "cpu": {"S": 8, "B": 4, "L": 2, "XL": 2},
    "cuda": {"S": 128, "B": 64, "L": 32, "XL": 32},
}
SCHEDULE = IntervalSchedule(interval=2, start_timestep=1000, stop_timestep=20)  # the authors', arXiv 2411.17616
FULL_STEPS = resolve(SCHEDULE, torch.linspace(999, 0, 50).round().tolist())
SYNCHRONIZE: dict[Device, Callable[[], None]] = {"cpu": torch.cpu.synchronize, "cuda": torch.cuda.synchronize}
CPUINFO, STATUS, CLEAR_REFS = (Path("/proc", name) for name in ("cpuinfo", "self/status", "self/clear_refs"))  # Linux
NO_COMPILER = re.compile(r"No working C\+\+ compiler found|Failed to find C compiler")  # Inductor's and Triton's words


def check_choice(name: str, chosen: Sequence, allowed: Sequence) -> None:
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(allowed):
        raise ValueError(f"{name} must be one or more of {', '.join(map(str, allowed))}, each once, got {chosen!r}")


@dataclass(frozen=True, kw_only=True)
class ModelBenchConfig:
    """Which models are measured, and how often.

    presets: each is measured as the plain model and with long skips. num_shallow_units: the values of k.
    batch_sizes: one a preset; by default 8 for S, 4 for B, 2 for L and XL on a CPU, and 128, 64, 32, 32 on a GPU.
    num_threads: of the CPU; by default PyTorch's choice. num_warmup: repetitions before those that count, at least 1.
    """

    presets: tuple[str, ...] = ("DiT-S/2", "DiT-XL/2")
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    modes: tuple[Mode, ...] = ("eager", "compiled")
    num_shallow_units: tuple[int, ...] = (1, 4)
    batch_sizes: tuple[int, ...] = ()
    device: Device = "cpu"
    num_threads: int | None = None
    num_repetitions: int = 5
    num_warmup: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("presets", self.presets, tuple(PRESETS))
        check_choice("dtypes", self.dtypes, get_args(DType))
        check_choice("modes", self.modes, get_args(Mode))
        check_choice("device", (self.device,), get_args(Device))
        num_layers = min(PRESETS[preset][0] for preset in self.presets)
        check_choice("num_shallow_units", self.num_shallow_units, range(1, (num_layers + 1) // 2))
        if self.batch_sizes and (len(self.batch_sizes) != len(self.presets) or min(self.batch_sizes) < 1):
            raise ValueError(f"batch_sizes must be {len(self.presets)} numbers above 0 or none, got {self.batch_sizes}")
        for name in ("num_threads", "num_repetitions", "num_warmup"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def batch_size(self, preset: str) -> int:
        default = BATCH_SIZES[self.device][preset.removeprefix("DiT-").partition("/")[0]]
        return self.batch_sizes[self.presets.index(preset)] if self.batch_sizes else default


@dataclass(frozen=True)
class Step:
    """What is timed: a forward of the plain model or of the uncached long-skip model, or a step of the cached one."""

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
    """What a step costs.

    flops: of the batch; a multiply-add counts two. seconds: of every repetition. first_seconds: with the compilation.
    peak_bytes: the most that the process held in a call, resident on a CPU, allocated on a GPU, less the weights of the
    preset's other models; `None` where the system does not tell.
    """

    step: Step
    batch_size: int
    flops: int
    seconds: tuple[float, ...]
    first_seconds: float
    peak_bytes: int | None


def run_speedup(*, baseline: float, full: float, reuse: float) -> float:
    """Cost of a run whose every step costs `baseline` over that of the cached run; in seconds or in FLOPs."""
    return len(FULL_STEPS) * baseline / sum(full if is_full else reuse for is_full in FULL_STEPS)


def ratios_of(full: Row, rows: Mapping[Step, Row]) -> Ratios:
    """The cached model of a full step beside its uncached and its plain self. A bound is the same ratio in FLOPs.

    step_ratio: seconds of the full step over a reuse step. run_speedup, over_plain: seconds of a whole run, added up
    from steps, of the uncached and of the plain model over the cached one. achieved: the speedup over its bound.
    overhead: seconds of the full step over the uncached forward.
    """
    plain, uncached = (rows[replace(full.step, kind=kind, num_shallow_units=None)] for kind in ("plain", "uncached"))
    reuse = rows[replace(full.step, kind="reuse")]
    rounds = list(zip(plain.seconds, uncached.seconds, full.seconds, reuse.seconds, strict=True))
    speedup = median(run_speedup(baseline=u, full=f, reuse=r) for _, u, f, r in rounds)
    bound = run_speedup(baseline=uncached.flops, full=full.flops, reuse=reuse.flops)
    return {
        "step_ratio": median(f / r for _, _, f, r in rounds),
        "step_bound": full.flops / reuse.flops,
        "run_speedup": speedup,
        "run_bound": bound,
        "achieved": speedup / bound,
        "over_plain": median(run_speedup(baseline=p, full=f, reuse=r) for p, _, f, r in rounds),
        "overhead": median(f / u for _, u, f, _ in rounds),
    }


def speed_over_float32(row: Row, rows: Mapping[Step, Row]) -> float | None:
    """Seconds of the same step in float32 over this one's; `None` where that was not measured."""
    base = rows.get(replace(row.step, dtype="float32"))
    return None if base is None else median(f / s for f, s in zip(base.seconds, row.seconds, strict=True))


@dataclass(frozen=True)
class Subject:
    """A model, plain or with long skips, and its inputs."""

    dtype: DType
    model: DiT
    hidden_states: Tensor
    class_labels: Tensor

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.model.parameters())

    def call(self, timestep: float) -> Call:
        """One forward, whose inputs are made now."""
        timesteps = torch.full_like(self.class_labels, timestep, dtype=torch.float32)
        return lambda: self.model(self.hidden_states, timesteps, class_labels=self.class_labels).sample

    def calls(self, shallow_units: Sequence[int]) -> Iterator[tuple[Kind, int | None, Call]]:
        """What is timed, in turn. Make each call once, before the next is asked for: the cache is on meanwhile."""
        first, second = self.call(999), self.call(979)
        if not self.model.long_skip_links.sources:
            yield "plain", None, first
            return
        for k in shallow_units:
            enable_cache(self.model, CacheMethod(schedule=SCHEDULE, site=DeepFeatures(k)))
            yield "full", k, first
            yield "reuse", k, second
            summary = cache_summary(self.model)
            assert (summary.steps_full, summary.steps_reused) == (1, 1), str(summary)
            disable_cache(self.model)
        yield "uncached", None, first  # last: if a model's first call is slow, that shall not flatter the cache


def make_subject(config: ModelBenchConfig, preset: str, dtype: DType, long_skip: LongSkipConfig | None) -> Subject:
    """Random weights and inputs. Layers that start as zero are filled too, else the cost of zeros would be measured."""
    torch.manual_seed(config.seed)
    model = DiT.from_preset(preset, long_skip=long_skip).eval()
    for weight in model.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    shape = (config.batch_size(preset), *(model.config[name] for name in ("in_channels", "sample_size", "sample_size")))
    class_labels = torch.randint(model.config["num_classes"], shape[:1]).to(config.device)
    hidden_states = torch.randn(shape).to(config.device, getattr(torch, dtype))
    nn.Module.to(model, config.device, hidden_states.dtype)  # diffusers' own warns at every cast
    return Subject(dtype, model, hidden_states, class_labels)


def flops_of(call: Call) -> int:
    """FLOPs of one call; a multiply-add counts two. In unfused attention, as the counter misses a CPU's fused one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def time_call(call: Call, device: Device) -> tuple[float, int | None]:
    """Seconds of one call, and the most bytes that the process held during it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # resets VmHWM, proc(5)
    SYNCHRONIZE[device]()
    started = time.perf_counter()
    call()
    SYNCHRONIZE[device]()
    return time.perf_counter() - started, peak_bytes(device)


def peak_bytes(device: Device) -> int | None:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(STATUS.read_text().partition("VmHWM:")[2].split()[0]) if CLEAR_REFS.exists() else None


def check_compiler(device: Device) -> None:
    """`ValueError` where PyTorch finds no compiler to compile with; other failures pass."""
    try:
        torch.compile(torch.neg, fullgraph=True)(torch.ones(8, device=device))
    except RuntimeError as error:
        missing = NO_COMPILER.search(str(error))
        if missing is None:
            raise
        remedy = "install one such as g++ or name it in CXX, or measure mode 'eager' alone"
        raise ValueError(f"mode 'compiled' needs a C++ compiler ({missing[0]}): {remedy}") from error


@torch.no_grad()
def bench_preset(config: ModelBenchConfig, preset: str, advance: Callable[..., object]) -> list[Row]:
    """The rows of one preset, in every mode and dtype; `advance(description=...)` is told of each call."""
    skips = (None, LongSkipConfig())
    subjects = [make_subject(config, preset, dtype, skip) for dtype in config.dtypes for skip in skips]
    total_bytes = sum(subject.weight_bytes for subject in subjects)

    def calls(mode: Mode) -> Iterator[tuple[Step, Subject, Call]]:
        for subject in subjects:
            for kind, k, call in subject.calls(config.num_shallow_units):
                step = Step(preset, mode, subject.dtype, kind, k)
                advance(description=str(step))
                yield step, subject, call

    counted = [(step, flops_of(call), total_bytes - subject.weight_bytes) for step, subject, call in calls("eager")]
    size, num_warmup, rows = config.batch_size(preset), config.num_warmup, []
    for mode in sorted(config.modes, reverse=True):  # eager first, for what is compiled stays so
        if mode == "compiled":
            torch.compiler.reset()
            for subject in subjects:
                subject.model.compile(fullgraph=True)
        num_rounds = num_warmup + config.num_repetitions
        with torch._dynamo.config.patch(cache_size_limit=64):  # a graph for each step; torch 2.6 has only this name
            rounds = [[time_call(call, config.device) for _, _, call in calls(mode)] for _ in range(num_rounds)]
        for (step, flops, others), timed in zip(counted, zip(*rounds, strict=True), strict=True):
            seconds, peaks = zip(*timed, strict=True)
            peak = None if None in peaks else max(peaks[num_warmup:]) - others
            rows.append(Row(replace(step, mode=mode), size, flops, seconds[num_warmup:], seconds[0], peak))
    return rows


def bench_models(config: ModelBenchConfig, out: Path) -> list[Row]:
    """Measures every model of the config, and writes `class_to_image_{device}.json` and `.md` into `out`.

    `ValueError` where the device or the compiler that the config asks for is missing, before anything is measured.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs an NVIDIA GPU and a PyTorch that sees it, got none")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(config.num_threads or num_threads)
    try:
        if "compiled" in config.modes:
            check_compiler(config.device)
        environment = describe_environment(config)
        num_steps = len(config.dtypes) * (2 + 2 * len(config.num_shallow_units))
        num_rounds = 1 + len(config.modes) * (config.num_warmup + config.num_repetitions)
        with Progress() as progress:
            task = progress.add_task("", total=len(config.presets) * num_rounds * num_steps)
            advance = partial(progress.update, task, advance=1)
            rows = [row for preset in config.presets for row in bench_preset(config, preset, advance)]
    finally:
        torch.set_num_threads(num_threads)

    by_step = {row.step: row for row in rows}
    ratios = {row.step: ratios_of(row, by_step) for row in rows if row.step.kind == "full"}
    name = f"class_to_image_{config.device}"
    with atomic_file(out / f"{name}.json") as draft:
        draft.write_text(render_json(environment, config, by_step, ratios), encoding="utf-8")
    with atomic_file(out / f"{name}.md") as draft:
        draft.write_text(render_markdown(environment, by_step, ratios), encoding="utf-8")
    return rows


def describe_environment(config: ModelBenchConfig) -> dict[str, str]:
    """What the numbers depend on beside the config."""
    names = re.findall(r"^model name\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else []
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "skipdit"))
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "cpu": f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if config.device == "cuda" else "not used",
        "versions": f"python {platform.python_version()}, {packages}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": str(config.seed),
    }


def render_json(
    environment: Mapping[str, str], config: ModelBenchConfig, rows: Mapping[Step, Row], ratios: Mapping[Step, Ratios]
) -> str:
    report = {
        "environment": environment,
        "config": asdict(config),
        "rows": [asdict(row) | {"median_seconds": median(row.seconds)} for row in rows.values()],
        "ratios": [{"step": asdict(step), **values} for step, values in ratios.items()],
    }
    return json.dumps(report, indent=1) + "\n"


def render_markdown(environment: Mapping[str, str], rows: Mapping[Step, Row], ratios: Mapping[Step, Ratios]) -> str:
    """Command and machine, what steps cost, the ratios, and in words what reaches its target."""
    speeds = {step: speed_over_float32(row, rows) for step, row in rows.items()}
    parts = [
        f"`{environment['command']}`",
        "\n".join(f"- {name}: {text}" for name, text in environment.items() if name != "command"),
        table([row_record(row, speeds[step]) for step, row in rows.items()]),
        f"A run has {len(FULL_STEPS)} steps with {SCHEDULE}, {sum(FULL_STEPS)} of them full; its time is added up from "
        "the steps above. A bound is the same ratio in FLOPs.",
        table([{"step": step} | {name: f"{x:.3f}" for name, x in values.items()} for step, values in ratios.items()]),
        *verdict(speeds, ratios),
    ]
    return "\n\n".join(parts) + "\n"


def row_record(row: Row, speed: float | None) -> dict[str, object]:
    seconds = median(row.seconds)
    return {
        "step": row.step,
        "batch": row.batch_size,
        "ms": f"{1e3 * seconds:.1f}",
        "min to max": f"{1e3 * min(row.seconds):.1f} to {1e3 * max(row.seconds):.1f}",
        "over float32": "" if speed is None else f"{speed:.2f}",
        "GFLOP": f"{row.flops / 1e9:.2f}",
        "GFLOP/s": f"{row.flops / 1e9 / seconds:.0f}",
        "first call s": f"{row.first_seconds:.1f}",
        "peak MiB": "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
    }


def table(records: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table of records with the same keys."""
    lines = [list(records[0]), ["---"] * len(records[0]), *(map(str, record.values()) for record in records)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def verdict(speeds: Mapping[Step, float | None], ratios: Mapping[Step, Ratios]) -> Iterator[str]:
    """In words, what reaches its target and what does not."""
    achieved = {step: values["achieved"] for step, values in ratios.items()}
    yield judge("Run speedup over its bound", achieved, ACHIEVED_TARGET)
    for preset, target in BFLOAT16_TARGETS.items():
        own = {step: x for step, x in speeds.items() if x and (step.preset, step.dtype) == (preset, "bfloat16")}
        yield judge(f"Speed of bfloat16 over float32 of {preset}", own, target)
    overheads = [values["overhead"] for values in ratios.values()]
    yield f"A full step with the cache takes {min(overheads):.3f} to {max(overheads):.3f} times the uncached forward."


def judge(what: str, values: Mapping[Step, float], target: float) -> str:
    """A sentence that names what reaches the target and what does not."""
    if not values:
        return f"{what}: not measured."
    reached, missed = (
        ", ".join(f"{step} ({value:.3f})" for step, value in values.items() if (value >= target) is wanted)
        for wanted in (True, False)
    )
    return f"{what}, target {target:g}: reached by {reached or 'none'}; missed by {missed or 'none'}."
