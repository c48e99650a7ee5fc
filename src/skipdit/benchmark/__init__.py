"""What full and reuse steps cost, as rows beside a baseline of the same run; what a conversion does to a model."""

from skipdit.benchmark.cache import CacheBenchConfig, bench_caches
from skipdit.benchmark.compiling import CompileBenchConfig, bench_compile
from skipdit.benchmark.conversion import ConversionBenchConfig, bench_conversion
from skipdit.benchmark.gpu import GpuBenchConfig, bench_gpu
from skipdit.benchmark.models import ModelBenchConfig, bench_models
from skipdit.benchmark.training import TrainBenchConfig, bench_training
from skipdit.benchmark.video import bench_videos
from skipdit.benchmark.video_models import VideoBenchConfig

__all__ = [
    "CacheBenchConfig",
    "CompileBenchConfig",
    "ConversionBenchConfig",
    "GpuBenchConfig",
    "ModelBenchConfig",
    "TrainBenchConfig",
    "VideoBenchConfig",
    "bench_caches",
    "bench_compile",
    "bench_conversion",
    "bench_gpu",
    "bench_models",
    "bench_training",
    "bench_videos",
]
