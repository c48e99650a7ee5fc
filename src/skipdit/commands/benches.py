"""The benchmarks that `skipdit bench` runs: a new one is a function here, whose first line is its help."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipdit.benchmark.measure import BenchConfig
    from skipdit.files.output import OutputFolder

Bench = tuple[type["BenchConfig"], Callable[..., Any]]  # its config, and what runs on it and an output folder


def models() -> Bench:
    """What full and reuse steps of class-to-image models cost, beside what their FLOPs allow."""
    from skipdit.benchmark.models import ModelBenchConfig, bench_models

    return ModelBenchConfig, bench_models


def video() -> Bench:
    """The same of video models with all, a few and no long skips."""
    from skipdit.benchmark.video import bench_videos
    from skipdit.benchmark.video_models import VideoBenchConfig

    return VideoBenchConfig, bench_videos


def conversion() -> Bench:
    """What a trained model loses and gains when it is converted in two stages."""
    from skipdit.benchmark.conversion import STARTS, ConversionBenchConfig, bench_conversion
    from skipdit.recipes import RECIPES

    def run(config: ConversionBenchConfig, out: "OutputFolder") -> None:
        bench_conversion(config, {stage: RECIPES[stage]() for stage in STARTS}, out)

    return ConversionBenchConfig, run


def cache() -> Bench:
    """What caches do to a model's pictures, and what they save, beside fewer steps and other libraries' caches."""
    from skipdit.benchmark.cache import CacheBenchConfig, bench_caches

    return CacheBenchConfig, bench_caches


def compile() -> Bench:
    """What torch.compile makes of caches."""
    from skipdit.benchmark.compiling import CompileBenchConfig, bench_compile

    return CompileBenchConfig, bench_compile


def gpu() -> Bench:
    """What caches save on a GPU, of what they could."""
    from skipdit.benchmark.gpu import GpuBenchConfig, bench_gpu

    return GpuBenchConfig, bench_gpu


def train() -> Bench:
    """How many pictures per second the training loop makes, beside a plain one."""
    from skipdit.benchmark.training import TrainBenchConfig, bench_training
    from skipdit.recipes import RECIPES

    def run(config: TrainBenchConfig, out: "OutputFolder") -> None:
        bench_training(config, RECIPES["emoji"](), out)

    return TrainBenchConfig, run


BENCHES: dict[str, Callable[[], Bench]] = {
    bench.__name__: bench for bench in (models, video, conversion, cache, compile, gpu, train)
}
