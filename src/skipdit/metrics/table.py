"""The metrics of all reports: a distance between two pictures is an entry of `METRICS`, a distance between two sets an
entry of `SET_METRICS`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from skipdit.metrics.paired import SSIM_WINDOW, PairedScore, Pictures, psnr_db, ssim
from skipdit.metrics.perceptual import check_metrics_installed, load_feature_network, perceptual_distance
from skipdit.metrics.sets import (
    DENSITY_NEIGHBOURS,
    Coverage,
    Gaussian,
    frechet_distance,
    kernel_distance,
    kernel_distances,
    neighbour_metrics,
)
from skipdit.metrics.statistics import Statistics


@dataclass(frozen=True)
class Metric:
    """A distance between a picture and its reference."""

    name: str
    """key in JSON"""
    title: str
    """column of a table"""
    function: Callable[[Pictures, Pictures], Tensor]
    """returns one number per picture, given pictures and their references (b c h w) in [0, 1]"""
    digits: int = 2
    """digits after the decimal point"""
    min_size: int = 1
    """smallest side of a picture in pixels"""
    check: Callable[[], object] | None = None
    """raises `ValueError` if an optional package is missing; `None` for a metric that needs none"""


def lpips_like(pictures: Pictures, reference: Pictures) -> Tensor:
    """Return the perceptual distance of each picture in the features of EfficientNet-Lite0."""
    return perceptual_distance(pictures, reference, load_feature_network(pictures.device))


METRICS = [
    Metric("psnr", "PSNR dB", psnr_db),
    Metric("ssim", "SSIM", ssim, digits=4, min_size=SSIM_WINDOW),
    Metric("perceptual", "LPIPS-like", lpips_like, digits=4, check=check_metrics_installed),
]
ALWAYS = tuple(metric for metric in METRICS if metric.check is None)

Values = Mapping[str, Tensor]
Scores = Mapping[str, PairedScore]


def compare_pictures(pictures: Pictures, reference: Pictures, metrics: Sequence[Metric] = ALWAYS) -> dict[str, Tensor]:
    """Return one number per picture (b c h w), by the name of each metric that is defined for pictures of this size."""
    size = min(pictures.shape[-2:])
    return {metric.name: metric.function(pictures, reference) for metric in metrics if size >= metric.min_size}


def score_pictures(pictures: Pictures, reference: Pictures) -> dict[str, PairedScore]:
    """Return the mean and the standard deviation over pictures (b c h w), by the name of each metric that needs no
    optional package."""
    return {name: PairedScore.of(values) for name, values in compare_pictures(pictures, reference).items()}


def join_values(batches: Sequence[Values]) -> dict[str, PairedScore]:
    """Return the scores over all pictures of several batches, each as returned by `compare_pictures`."""
    names = batches[0] if batches else ()
    return {name: PairedScore.of(torch.cat([batch[name] for batch in batches])) for name in names}


def score_cells(scores: Scores, metrics: Sequence[Metric] = METRICS) -> dict[str, object]:
    """Return the cells of a row, by title; a metric that was not measured has an empty cell."""
    return {
        metric.title: scores[metric.name].text(metric.digits) if metric.name in scores else "" for metric in metrics
    }


# ----------------------------------------------------------------------------------------------------------------------
# Distances between two sets


@dataclass(frozen=True)
class Figure:
    """The value of a metric of two sets."""

    value: float
    spread: float | None = None
    """standard deviation over subsets or parts, if there are any"""


@dataclass(frozen=True)
class SetMetric:
    """A distance between a set of samples and a reference set."""

    name: str
    """key in JSON"""
    title: str
    """name with an extractor for which papers have no name"""
    names: Mapping[str, str]
    """names used in papers, by extractor"""
    function: Callable[[Statistics, Statistics], Figure | None]
    """takes the samples and the reference; returns `None` if a set lacks the statistics that it needs"""
    better: str
    """lower or higher"""
    digits: int = 3
    """digits after the decimal point"""

    def called(self, extractor: str, *, is_standard: bool) -> str:
        """Return the name of the metric with this extractor."""
        return self.names[extractor] if is_standard and extractor in self.names else f"{self.title}-{extractor}"


def _frechet(gaussian_of: Callable[[Statistics], Gaussian | None]) -> Callable[[Statistics, Statistics], Figure | None]:
    """Return the Fréchet distance of these Gaussians, which both sets must have."""

    def metric(samples: Statistics, reference: Statistics) -> Figure | None:
        first, second = gaussian_of(samples), gaussian_of(reference)
        return None if first is None or second is None else Figure(frechet_distance(first, second))

    return metric


def _of_features(
    function: Callable[[Tensor, Tensor], Figure], min_items: int = 2
) -> Callable[[Statistics, Statistics], Figure | None]:
    """Return a metric of the features of items, which both sets must have kept at least `min_items` of."""

    def metric(samples: Statistics, reference: Statistics) -> Figure | None:
        first, second = samples.features, reference.features
        if first is None or second is None or min(len(first), len(second)) < min_items:
            return None
        return function(first, second)

    return metric


def _kernel(samples: Tensor, reference: Tensor) -> Figure:
    size = max(2, min(1000, min(len(samples), len(reference)) // 2))
    distances = kernel_distances(samples, reference, subset_size=size)
    return Figure(distances.mean().item(), distances.std(correction=0).item())


def _kernel_full(samples: Tensor, reference: Tensor) -> Figure:
    return Figure(kernel_distance(samples, reference))


def _score(samples: Statistics, reference: Statistics) -> Figure | None:
    if not samples.scores:
        return None
    scores = torch.tensor(samples.scores, dtype=torch.float64)
    return Figure(scores.mean().item(), scores.std(correction=0).item())


def _neighbours(name: str) -> Callable[[Statistics, Statistics], Figure | None]:
    """Return the metric that is this field of `Coverage`."""
    return _of_features(
        lambda samples, reference: Figure(getattr(_neighbours_of(samples, reference), name)), DENSITY_NEIGHBOURS + 1
    )


@lru_cache(maxsize=2)
def _neighbours_of(samples: Tensor, reference: Tensor) -> Coverage:
    """Search once for all four metrics, for the two sets and for the halves in turn; tensors are compared by
    identity."""
    return neighbour_metrics(samples, reference)


KID_FULL = {"Inception": "KID-full", "I3D": "KVD-full"}
SET_METRICS = (
    SetMetric("fd", "FD", {"Inception": "FID", "I3D": "FVD"}, _frechet(lambda each: each.pooled), "lower"),
    SetMetric("kd", "KD", {"Inception": "KID", "I3D": "KVD"}, _of_features(_kernel), "lower", digits=5),
    SetMetric("kd_full", "KD-full", KID_FULL, _of_features(_kernel_full), "lower", digits=5),
    SetMetric("sfd", "sFD", {"Inception": "sFID"}, _frechet(lambda each: each.spatial), "lower"),
    SetMetric("is", "IS", {"Inception": "IS"}, _score, "higher"),
    *(
        SetMetric(name, name.capitalize(), {"Inception": name.capitalize()}, _neighbours(name), "higher", digits=4)
        for name in ("precision", "recall", "density", "coverage")
    ),
)
