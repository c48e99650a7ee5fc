"""Which metrics every report shows: a distance between two pictures is one entry of `METRICS`, one between two sets one
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
    frechet_distance,
    kernel_distance,
    kernel_distances,
    neighbour_metrics,
)
from skipdit.metrics.statistics import Statistics


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
    return perceptual_distance(pictures, reference, load_feature_network(pictures.device))


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


# ----------------------------------------------------------------------------------------------------------------------
# Distances between two sets


@dataclass(frozen=True)
class Figure:
    """What a metric says of two sets."""

    value: float
    spread: float | None = None
    """standard deviation over subsets or parts, where there are some"""


@dataclass(frozen=True)
class SetMetric:
    """A distance between a set of samples and a reference set."""

    name: str
    """key in JSON"""
    title: str
    """what it is called, of an extractor whose figures have no name of their own"""
    names: Mapping[str, str]
    """what papers call it, by extractor"""
    function: Callable[[Statistics, Statistics], Figure | None]
    """of the samples and the reference; `None` where a set lacks what it needs"""
    better: str
    """lower or higher"""
    digits: int = 3
    """after the point"""

    def called(self, extractor: str, *, is_standard: bool) -> str:
        """Return the metric's name for figures of this extractor."""
        return self.names[extractor] if is_standard and extractor in self.names else f"{self.title}-{extractor}"


def _frechet(samples: Statistics, reference: Statistics) -> Figure | None:
    if samples.pooled is None or reference.pooled is None:
        return None
    return Figure(frechet_distance(samples.pooled, reference.pooled))


def _spatial(samples: Statistics, reference: Statistics) -> Figure | None:
    if samples.spatial is None or reference.spatial is None:
        return None
    return Figure(frechet_distance(samples.spatial, reference.spatial))


def _have_features(samples: Statistics, reference: Statistics, least: int) -> bool:
    kept = [0 if each.features is None else len(each.features) for each in (samples, reference)]
    return min(kept) >= least


def _kernel(samples: Statistics, reference: Statistics) -> Figure | None:
    if not _have_features(samples, reference, 2):
        return None
    assert samples.features is not None
    assert reference.features is not None
    size = max(2, min(1000, min(len(samples.features), len(reference.features)) // 2))
    distances = kernel_distances(samples.features, reference.features, subset_size=size)
    return Figure(distances.mean().item(), distances.std(correction=0).item())


def _kernel_full(samples: Statistics, reference: Statistics) -> Figure | None:
    if not _have_features(samples, reference, 2):
        return None
    assert samples.features is not None
    assert reference.features is not None
    return Figure(kernel_distance(samples.features, reference.features))


def _score(samples: Statistics, reference: Statistics) -> Figure | None:
    if not samples.scores:
        return None
    scores = torch.tensor(samples.scores, dtype=torch.float64)
    return Figure(scores.mean().item(), scores.std(correction=0).item())


def _neighbours(name: str) -> Callable[[Statistics, Statistics], Figure | None]:
    def figure(samples: Statistics, reference: Statistics) -> Figure | None:
        if not _have_features(samples, reference, DENSITY_NEIGHBOURS + 1):
            return None
        assert samples.features is not None
        assert reference.features is not None
        return Figure(getattr(_neighbours_of(samples.features, reference.features), name))

    return figure


@lru_cache(maxsize=2)
def _neighbours_of(samples: Tensor, reference: Tensor) -> Coverage:
    """One search for all four, of the two sets and of the halves in turn; tensors are told apart by identity."""
    return neighbour_metrics(samples, reference)


SET_METRICS = (
    SetMetric("fd", "FD", {"Inception": "FID", "I3D": "FVD"}, _frechet, "lower"),
    SetMetric("kd", "KD", {"Inception": "KID", "I3D": "KVD"}, _kernel, "lower", digits=5),
    SetMetric("kd_full", "KD-full", {"Inception": "KID-full", "I3D": "KVD-full"}, _kernel_full, "lower", digits=5),
    SetMetric("sfd", "sFD", {"Inception": "sFID"}, _spatial, "lower"),
    SetMetric("is", "IS", {"Inception": "IS"}, _score, "higher"),
    *(
        SetMetric(name, name.capitalize(), {"Inception": name.capitalize()}, _neighbours(name), "higher", digits=4)
        for name in ("precision", "recall", "density", "coverage")
    ),
)
