"""The benchmarks that `skipdit bench` runs: a new one is a function here, whose first line is its help."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from skipdit.benchmark.config import (
    BenchConfig,
    CacheBenchConfig,
    CompileBenchConfig,
    ConversionBenchConfig,
    GpuBenchConfig,
    ModelBenchConfig,
    TrainBenchConfig,
    VideoBenchConfig,
)

if TYPE_CHECKING:
    from skipdit.files.output import OutputFolder


def models(config: ModelBenchConfig, out: "OutputFolder") -> None:
    """Cost of full and reuse steps of class-to-image models, beside what their FLOPs allow."""
    from skipdit.benchmark.models import bench_models

    bench_models(config, out)


def video(config: VideoBenchConfig, out: "OutputFolder") -> None:
    """The same for video models with all, a few and no long skips."""
    from skipdit.benchmark.video import bench_videos

    bench_videos(config, out)


def conversion(config: ConversionBenchConfig, out: "OutputFolder") -> None:
    """What a trained model loses and gains when it is converted in two stages."""
    from skipdit.benchmark.conversion import STARTS, bench_conversion
    from skipdit.recipes import RECIPES

    bench_conversion(config, {stage: RECIPES[stage]() for stage in STARTS}, out)


def cache(config: CacheBenchConfig, out: "OutputFolder") -> None:
    """How caches change a model's pictures and how much they save, beside fewer steps and caches of other libraries."""
    from skipdit.benchmark.cache import bench_caches

    bench_caches(config, out)


def compile(config: CompileBenchConfig, out: "OutputFolder") -> None:
    """Graphs, breaks and speed of caches under torch.compile."""
    from skipdit.benchmark.compiling import bench_compile

    bench_compile(config, out)


def gpu(config: GpuBenchConfig, out: "OutputFolder") -> None:
    """How much of the saving that their FLOPs allow caches reach on a GPU."""
    from skipdit.benchmark.gpu import bench_gpu

    bench_gpu(config, out)


def train(config: TrainBenchConfig, out: "OutputFolder") -> None:
    """Pictures per second of the training loop, beside a plain one."""
    from skipdit.benchmark.training import bench_training
    from skipdit.recipes import RECIPES

    bench_training(config, RECIPES["emoji"](), out)


BENCHES: dict[str, tuple[type[BenchConfig], Callable[[Any, "OutputFolder"], None]]] = {
    "models": (ModelBenchConfig, models),
    "video": (VideoBenchConfig, video),
    "conversion": (ConversionBenchConfig, conversion),
    "cache": (CacheBenchConfig, cache),
    "compile": (CompileBenchConfig, compile),
    "gpu": (GpuBenchConfig, gpu),
    "train": (TrainBenchConfig, train),
}
