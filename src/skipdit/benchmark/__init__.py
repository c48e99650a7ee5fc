"""What full and reuse steps cost, as rows beside a baseline of the same run."""

from skipdit.benchmark.models import ModelBenchConfig, bench_models
from skipdit.benchmark.video import bench_videos
from skipdit.benchmark.video_models import VideoBenchConfig

__all__ = ["ModelBenchConfig", "VideoBenchConfig", "bench_models", "bench_videos"]
