"""The options of the benchmarks, one class per benchmark. Imports nothing heavy, so that `--help` is instant."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from skipdit.command_options import PipelineOptions
from skipdit.models.pairing import LongSkipConfig, LongSkipLinks, pair_units
from skipdit.models.presets import LATTE_PRESETS, PRESETS
from skipdit.options import (
    Device,
    DTypeName,
    NumInferenceSteps,
    NumInferenceStepsOrDefault,
    check_above,
    check_choice,
    check_fields,
    check_option,
    check_per_item,
    check_range,
)

DType = Literal["float32", "bfloat16"]
Mode = Literal["eager", "compiled"]
GpuMode = Literal["eager", "reduce-overhead", "default"]
VideoTask = Literal["class-to-video", "text-to-video"]
Workload = Literal["emoji", "latents"]
Loop = Literal["plain", "dense", "routed", "dense compiled", "routed compiled"]

MODEL_BATCH_SIZES: dict[Device, dict[str, int]] = {  # by the size in a preset's name
    "cpu": {"S": 8, "B": 4, "L": 2, "XL": 2},
    "cuda": {"S": 128, "B": 64, "L": 32, "XL": 32},
}
NUM_FRAMES: dict[Device, dict[str, int]] = {  # by the size in a preset's name
    "cpu": {"S": 16, "B": 8, "L": 4, "XL": 3},
    "cuda": {"S": 16, "B": 16, "L": 16, "XL": 16},
}
TEXT_MODEL, TEXT_HEAD_SIZE, TEXT_PATCH_SIZE = "LatteTransformer3DModel", 64, 2
TRAIN_BATCH_SIZES: dict[Device, dict[Workload, int]] = {
    "cpu": {"emoji": 32, "latents": 1},
    "cuda": {"emoji": 512, "latents": 96},
}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The options of every benchmark. Abstract."""

    device: Device = "cpu"
    """cpu or cuda"""
    num_threads: int | None = None
    """threads of the CPU; by default PyTorch's choice"""
    seed: int = 0
    """seed of weights, inputs and noise"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, "num_threads")


@dataclass(frozen=True, kw_only=True)
class ModelBenchConfig(BenchConfig):
    """The models to measure, and how often."""

    presets: tuple[str, ...] = ("DiT-S/2", "DiT-XL/2")
    """published sizes; each is measured without and with long skips"""
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    """of weights and inputs"""
    modes: tuple[Mode, ...] = ("eager", "compiled")
    """eager, or compiled whole by `torch.compile`"""
    num_shallow_units: tuple[int, ...] = (1, 4)
    """numbers of units that a reuse step runs at each end"""
    batch_sizes: tuple[int, ...] = ()
    """one per preset; by default 8 for S, 4 for B, 2 for L and XL on a CPU, and 128, 64, 32, 32 on a GPU"""
    num_repetitions: int = 5
    """how often each step is timed, in turn"""
    num_warmup: int = 1
    """repetitions before those that count"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("presets", self.presets, tuple(PRESETS))
        num_layers = min(PRESETS[preset][0] for preset in self.presets)
        check_choice("num_shallow_units", self.num_shallow_units, range(1, (num_layers + 1) // 2))
        check_per_item("batch_sizes", self.batch_sizes, len(self.presets))
        check_range(self, "num_repetitions", "num_warmup")

    def batch_size(self, preset: str) -> int:
        default = MODEL_BATCH_SIZES[self.device][preset.removeprefix("DiT-").partition("/")[0]]
        return self.batch_sizes[self.presets.index(preset)] if self.batch_sizes else default


@dataclass(frozen=True)
class Size:
    """A model to measure. A unit is a spatial and a temporal block."""

    task: VideoTask
    name: str
    num_units: int
    num_frames: int
    patch_size: int
    is_swapped: bool = False
    """True if its units are opened by class swap, as those of a class of diffusers"""


@dataclass(frozen=True, kw_only=True)
class VideoBenchConfig(BenchConfig):
    """The video models to measure, and how often."""

    tasks: tuple[VideoTask, ...] = get_args(VideoTask)
    """class-to-video: our Latte; text-to-video: diffusers' LatteTransformer3DModel"""
    presets: tuple[str, ...] = ("Latte-S/2", "Latte-XL/2")
    """published sizes of Latte"""
    num_frames: tuple[int, ...] = ()
    """one per preset; by default 16 for S, 8 for B, 4 for L, 3 for XL on a CPU, and 16 on a GPU"""
    text_num_heads: int = 6
    """attention heads of the text-to-video model, of 64 channels each; the released one is wider"""
    text_num_units: int = 28
    """units of the text-to-video model; the released one has 28"""
    text_num_frames: int = 4
    """frames of the text-to-video model"""
    sample_size: int = 32
    """side of the latents; 32 for videos of 256 pixels"""
    batch_size: int = 1
    """clips per call"""
    num_pairs: tuple[int | None, ...] = (None, 2)
    """numbers of outermost pairs to link; None links all"""
    num_shallow_units: tuple[int, ...] = (1, 2)
    """numbers of units that a reuse step runs at each end"""
    dtype: DType = "float32"
    """of weights and inputs"""
    num_repetitions: int = 5
    """how often each step is timed, in turn"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("presets", self.presets, tuple(LATTE_PRESETS))
        check_per_item("num_frames", self.num_frames, len(self.presets))
        check_range(self, "text_num_heads", "text_num_units", "text_num_frames", "sample_size", "batch_size")
        check_range(self, "num_repetitions")
        if not self.num_shallow_units or len(set(self.num_shallow_units)) < len(self.num_shallow_units):
            raise ValueError(f"num_shallow_units must be one or more, each once, got {self.num_shallow_units}")
        for size in self.sizes():
            if self.sample_size % size.patch_size:
                raise ValueError(f"sample_size must be divisible by {size.patch_size}, got {self.sample_size}")
            links = [
                LongSkipLinks(size.num_units, pair_units(size.num_units, LongSkipConfig(num_pairs=num_pairs)))
                for num_pairs in self.num_pairs
            ]
            counts = {len(link.sources) for link in links}
            if not links or 0 in counts or len(counts) < len(links):
                raise ValueError(
                    f"num_pairs must be one or more numbers from 1 to {size.num_units // 2}, or None for all, "
                    f"each once, for the {size.num_units} units of {size.name}, got {self.num_pairs}"
                )
            for link in links:
                for k in self.num_shallow_units:
                    link.check_num_shallow_units(k)

    def sizes(self) -> list[Size]:
        """Return the models, in the order of measurement."""
        sizes = []
        defaults = [NUM_FRAMES[self.device][name.removeprefix("Latte-").partition("/")[0]] for name in self.presets]
        for name, num_frames in zip(self.presets, self.num_frames or defaults, strict=True):
            num_layers, *_, patch_size = LATTE_PRESETS[name]
            sizes.append(Size("class-to-video", name, num_layers // 2, num_frames, patch_size))
        num_units, num_frames = self.text_num_units, self.text_num_frames
        sizes.append(Size("text-to-video", TEXT_MODEL, num_units, num_frames, TEXT_PATCH_SIZE, is_swapped=True))
        return [size for size in sizes if size.task in self.tasks]


@dataclass(frozen=True, kw_only=True)
class ConversionBenchConfig(BenchConfig):
    """The measurements of the trained models. Their trainings have their own seeds."""

    num_pictures: int = 512
    """pictures of the training data for the loss, each with one draw of noise and timestep"""
    num_samples: int = 64
    """pictures of a run of the sampler, for the caches"""
    num_shown: int = 6
    """pictures per row of conversion.png"""
    num_inference_steps: NumInferenceSteps = 50
    """denoising steps of a run"""
    guidance_scale: float = 2.0
    """scale of classifier-free guidance; 1 disables guidance"""
    intervals: tuple[int, ...] = (2, 3)
    """intervals of the caches"""
    runs: Path = Path("runs")
    """folder of the four trainings (recipes convert-*); those that are not finished continue"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_pictures", "num_samples", "num_shown")
        check_choice("intervals", self.intervals, range(2, self.num_inference_steps + 1))
        if self.num_shown > self.num_samples:
            raise ValueError(f"num_shown must be at most num_samples, {self.num_samples}, got {self.num_shown}")


@dataclass(frozen=True, kw_only=True)
class TrainBenchConfig(BenchConfig):
    """The loops to measure, and how often."""

    workloads: tuple[Workload, ...] = ("emoji", "latents")
    """emoji: the recipe of the bundled class-to-image model; latents: a DiT with long skips on random latents"""
    loops: tuple[Loop, ...] = ("plain", "dense", "routed")
    """plain: in float32 (TF32 on a GPU), with random numbers drawn on the CPU and the loss read at each step; dense,
    routed: the loop of skipdit, without and with token routing, eager or compiled"""
    preset: str = "DiT-XL/2"
    """published size of the model on latents, with 256 tokens"""
    batch_sizes: tuple[int, ...] = ()
    """one per workload; by default 32 and 1 on a CPU, 512 and 96 on a GPU"""
    num_steps: int = 20
    """number of steps that are timed together"""
    num_warmup: int = 5
    """steps before them"""
    num_rounds: int = 3
    """how often each loop starts"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option(self, "preset", tuple(PRESETS))
        check_range(self, "num_steps", "num_warmup", "num_rounds")
        check_per_item("batch_sizes", self.batch_sizes, len(self.workloads))

    def batch_size(self, workload: Workload) -> int:
        default = TRAIN_BATCH_SIZES[self.device][workload]
        return self.batch_sizes[self.workloads.index(workload)] if self.batch_sizes else default


@dataclass(frozen=True, kw_only=True)
class GpuBenchConfig(BenchConfig):
    """The caches to measure, and for how long."""

    preset: str = "DiT-XL/2"
    """published size of the class-to-image model, with long skips and random weights"""
    batch_sizes: tuple[int, ...] = (2, 32)
    """samples per call, from small to large"""
    modes: tuple[GpuMode, ...] = ("eager", "reduce-overhead")
    """eager, or compiled whole by `torch.compile` in this mode"""
    specs: tuple[str, ...] = ("N2", "N3", "N2-k4", "fbcache:0.1", "fbcache:0.000001", "fora:N2")
    """caches in eager mode; fbcache:0.000001 hardly ever reuses, which shows the cost of the decision"""
    compiled_specs: tuple[str, ...] = ("N2",)
    """caches in compiled modes, in which each new kind of step takes up to a minute"""
    num_inference_steps: NumInferenceSteps = 20
    """denoising steps of a run"""
    num_rounds: int = 5
    """how often each run is timed, in turn with the run without a cache"""
    max_seconds: float = 270.0
    """start no new measurement after this time"""
    dtype: DType = "bfloat16"
    """data type of the weights and the latents"""
    device: Device = "cuda"
    """cpu or cuda"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option(self, "preset", tuple(PRESETS))
        check_range(self, "num_inference_steps", "num_rounds")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be one or more numbers above 0, got {self.batch_sizes}")
        check_above(self, "max_seconds")

    def rows(self) -> list[tuple[GpuMode, int, str]]:
        """Return the mode, the batch size and the spec of each row, in order."""
        return [
            (mode, size, spec)
            for mode in self.modes
            for size in self.batch_sizes
            for spec in (self.specs if mode == "eager" else self.compiled_specs)
        ]


# ----------------------------------------------------------------------------------------------------------------------
# Caches


@dataclass(frozen=True)
class Method:
    """A line of the plot."""

    ours: bool
    """True if its schedule comes from this project, or its use of long skips does"""
    specs: tuple[str, ...] = ()
    """settings of the cache, fast ones last"""


def intervals(form: str, *numbers: float) -> tuple[str, ...]:
    """Return specs of one form, one per number."""
    return tuple(form.format(number) for number in numbers)


METHODS: dict[str, Method] = {
    "skip-taylor": Method(ours=True, specs=intervals("skip-taylor:N{}-o1", 2, 3, 4)),
    "skip-taylor, window": Method(ours=True, specs=intervals("skip-taylor:N{}-800-100-o1", 4, 8)),
    "skip-branch": Method(ours=True, specs=intervals("skip-branch:N{}", 2)),
    "auto": Method(ours=True, specs=intervals("auto:{}", 1.3, 1.5, 1.8, 2, 2.5, 3)),
    "calibrated": Method(ours=True, specs=intervals("calibrated:{}x", 1.3, 1.5, 1.8, 2, 2.5, 3, 4)),
    "calibrated output": Method(ours=True, specs=intervals("calibrated:output-{}x", 1.5, 2, 2.5, 3, 4, 5)),
    "skip": Method(ours=False, specs=intervals("N{}", 2, 3)),
    "delta-dit": Method(ours=False, specs=intervals("delta-dit:N{}", 2, 3)),
    "delta": Method(ours=False, specs=intervals("delta:N{}", 2, 3)),
    "delta-taylor": Method(ours=False, specs=intervals("delta-taylor:N{}-o1", 2, 3)),
    "output-taylor": Method(ours=False, specs=intervals("output-taylor:N{}-o1", 2, 3)),
    "fora": Method(ours=False, specs=intervals("fora:N{}", 2, 3)),
    "taylorseer": Method(ours=False, specs=intervals("taylorseer:N{}-o1", 2, 3, 4)),
    "pab": Method(ours=False, specs=intervals("pab:N{}", 8)),
    "faster-diffusion": Method(ours=False, specs=intervals("faster-diffusion:N{}", 2, 8)),
    "tgate": Method(ours=False, specs=intervals("tgate:N{}-900-600", 5)),
    "fbcache": Method(ours=False, specs=("fbcache:0.1", "fbcache:0.2")),
    "teacache": Method(ours=False, specs=("teacache:0.05", "teacache:0.1", "teacache:0.2")),
    "dicache": Method(ours=False, specs=("dicache:0.03", "dicache:0.05", "dicache:0.1", "dicache:0.2")),
    "seacache": Method(ours=False, specs=("seacache:0.05", "seacache:0.1", "seacache:0.2")),
    "easycache": Method(ours=False, specs=("easycache:0.02", "easycache:0.05", "easycache:0.1")),
    "adacache": Method(ours=False, specs=("adacache:0.05", "adacache:0.1")),
}


SAVINGS = (1.3, 1.5, 2, 2.5, 3.3, 4)  # of the runs with fewer steps


@dataclass(frozen=True, kw_only=True)
class CacheBenchConfig(PipelineOptions, BenchConfig):
    """The model, the caches, and the runs to measure."""

    model: str = "emoji"
    """a bundled model (emoji, emoji-clips, emoji-text, emoji-text-clips), or the folder of a pipeline, of skipdit or of
    diffusers"""
    dtype: DTypeName = "float32"
    """of the weights and of the computation"""
    specs: tuple[str, ...] = tuple(spec for method in METHODS.values() for spec in method.specs)
    """caches, or paths of schedules; calibrated:2x is a schedule that comes with the model"""
    schedules: Path | None = None
    """a folder of more schedules, as written by skipdit calibrate"""
    labels: tuple[str, ...] = ()
    """class names or numbers, repeated in turn; by default classes that the bundled model draws well, or
    else classes spread over all"""
    prompt: tuple[str, ...] = ()
    """texts, repeated in turn; for the text tasks; by default those that the bundled model draws well"""
    num_seeds: int = 64
    """samples, each with a seed of its own, from --seed on"""
    batch_size: int = 8
    """samples per batch"""
    num_inference_steps: NumInferenceStepsOrDefault = None
    """denoising steps of the uncached run and of the cached ones; by default 50, or as many as a pipeline of diffusers
    takes"""
    guidance_scale: float | None = None
    """scale of classifier-free guidance; 1 disables guidance; by default 2, or that of a pipeline of diffusers"""
    fewer_steps: tuple[int, ...] | None = None
    """denoising steps of the runs without a cache to compare with; by default those that save 1.3 to 4 times"""
    specs_of_shorter_runs: tuple[str, ...] = ("auto:1.5", "auto:2", "calibrated:1.5x", "calibrated:2x")
    """caches that also run with two thirds and with half of the steps"""
    perceptual: bool = True
    """also measure the LPIPS-like distance, which needs the extra skipdit[metrics]"""
    rivals: bool = True
    """also run caches of diffusers and cache-dit, where possible; only in a checkout of the repository"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_seeds", "batch_size")
        check_range(self, "num_inference_steps", least=2, most=1000)
        if len(set(self.specs)) < len(self.specs):
            raise ValueError(f"specs must differ from one another, got {self.specs}")
        steps, fewer = self.num_inference_steps, self.fewer_steps or ()
        if len(set(fewer)) < len(fewer) or not all(1 <= n < (steps or 1000) for n in fewer):
            most = "num_inference_steps" if steps is None else f"num_inference_steps, {steps}"
            raise ValueError(f"fewer_steps must be below {most}, and each once, got {fewer}")

    def shorter_runs(self, num_inference_steps: int) -> tuple[int, ...]:
        """Return the numbers of steps of the runs without a cache to compare with."""
        if self.fewer_steps is not None:
            return self.fewer_steps
        return tuple(sorted({max(1, round(num_inference_steps / saving)) for saving in SAVINGS}, reverse=True))


MIXED, BY_KIND = "schedule of k1 and k2", "schedule by kind"
SPECS = (
    "N3",
    "skip-taylor:N3-o1",
    MIXED,
    "auto:1.8",
    "skip-branch:N3",
    "delta:N3",
    "delta-taylor:N3-o1",
    "delta-dit:N3",
    "faster-diffusion:N2",
    "fora:N3",
    "taylorseer:N3-o1",
    "pab:N2",
    "tgate:N2-900-600",
    BY_KIND,
    "fbcache:0.3",
    "teacache:0.1",
    "dicache:0.05",
    "seacache:0.1",
    "easycache:0.05",
    "adacache:0.05",
)
# of other libraries, in the table of benchmarks/rivals
RIVALS = (
    "diffusers-PAB:N2-950--1",
    "diffusers-FirstBlockCache:0.25",
    "diffusers-MagCache:0.06-K3",
    "diffusers-TaylorSeer:N3-o1",
    "diffusers-FasterCache:N2-null5",
    "cache-dit:F1B0-0.25",
    "cache-dit:F1B0-N3",
)
TIMED = (
    "N3",
    "skip-taylor:N3-o1",
    "fora:N3",
    "fbcache:0.3",
    "diffusers-FirstBlockCache:0.25",
    "diffusers-TaylorSeer:N3-o1",
    "cache-dit:F1B0-N3",
)


@dataclass(frozen=True, kw_only=True)
class CompileBenchConfig(BenchConfig):
    """The caches to compile, on a CPU."""

    model: str = "emoji"
    """emoji, or the folder of a class-to-image pipeline with long skips"""
    specs: tuple[str, ...] = SPECS
    """caches of skipdit"""
    rivals: tuple[str, ...] = RIVALS
    """caches of other libraries"""
    timed: tuple[str, ...] = TIMED
    """those of both to time as well, compiled by Inductor"""
    num_inference_steps: NumInferenceSteps = 20
    """denoising steps of a run"""
    batch_size: int = 2
    """pictures per run, with guidance"""
    step_batch_sizes: tuple[int, ...] = (1, 8)
    """batch sizes of the single steps to time, without guidance"""
    step_presets: tuple[str, ...] = ("DiT-XL/2",)
    """published sizes, with random weights, whose single steps are timed too, at the first of these batch sizes"""
    num_runs: int = 5
    """how often each run is timed"""
    num_repetitions: int = 50
    """how often a single step is timed"""
    guidance_scale: float = 2.0
    """scale of classifier-free guidance; 1 disables guidance"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "batch_size", "num_runs", "num_repetitions")
        check_range(self, "num_inference_steps", least=4, most=1000)
        check_option(self, "device", ("cpu",))
        if not self.step_batch_sizes or min(self.step_batch_sizes) < 1:
            raise ValueError(f"step_batch_sizes must be one or more numbers above 0, got {self.step_batch_sizes}")
        for name, allowed in (
            ("rivals", RIVALS),
            ("timed", (*self.specs, *self.rivals)),
            ("step_presets", tuple(PRESETS)),
        ):
            if unknown := sorted(set(getattr(self, name)) - set(allowed)):
                raise ValueError(f"{name} must be of {', '.join(allowed)}, got {', '.join(unknown)}")
