"""Which distances to the run in full every report shows: a metric is one entry of `METRICS`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipdit.metrics.paired import SSIM_WINDOW, PairedScore, Pictures, psnr_db, ssim
from skipdit.metrics.perceptual import check_metrics_installed, load_feature_network, perceptual_distance


@dataclass(frozen=True)
class Metric:
    """A distance between two pictures of the same thing."""

    name: str
    """key in JSON"""
    title: str
    """column of a table"""
    function: Callable[[Pictures, Pictures], Tensor]
    """of pictures and their reference (b c h w) in [0, 1]; one number per picture"""
    digits: int = 2
    """after the point"""
    min_size: int = 1
    """smallest side of a picture in pixels"""
    check: Callable[[], object] | None = None
    """raises `ValueError` where an optional package is missing; `None` for a metric that needs none"""


def lpips_like(pictures: Pictures, reference: Pictures) -> Tensor:
    """Return the perceptual distance of each picture in the features of EfficientNet-Lite0."""
    return perceptual_distance(pictures, reference, load_feature_network())


METRICS = (
    Metric("psnr", "PSNR dB", psnr_db),
    Metric("ssim", "SSIM", ssim, digits=4, min_size=SSIM_WINDOW),
    Metric("perceptual", "LPIPS-like", lpips_like, digits=4, check=check_metrics_installed),
)
ALWAYS = tuple(metric for metric in METRICS if metric.check is None)

Values = Mapping[str, Tensor]
Scores = Mapping[str, PairedScore]


def compare_pictures(pictures: Pictures, reference: Pictures, metrics: Sequence[Metric] = ALWAYS) -> dict[str, Tensor]:
    """Return one number per picture (b c h w), by the name of each metric that pictures of this size have."""
    size = min(pictures.shape[-2:])
    return {each.name: each.function(pictures, reference) for each in metrics if size >= each.min_size}


def score_pictures(
    pictures: Pictures, reference: Pictures, metrics: Sequence[Metric] = ALWAYS
) -> dict[str, PairedScore]:
    """Return the mean and the standard deviation over pictures (b c h w), by the name of each metric."""
    return {name: PairedScore.of(each) for name, each in compare_pictures(pictures, reference, metrics).items()}


def join_values(batches: Sequence[Values]) -> dict[str, PairedScore]:
    """Return the scores of all pictures of several batches, each as `compare_pictures` returns it."""
    names = batches[0] if batches else ()
    return {name: PairedScore.of(torch.cat([each[name] for each in batches])) for name in names}


def score_cells(scores: Scores, metrics: Sequence[Metric] = METRICS) -> dict[str, object]:
    """Return the cells of a table's row, by title; those of a metric that was not measured are empty."""
    return {each.title: scores[each.name].text(each.digits) if each.name in scores else "" for each in metrics}
