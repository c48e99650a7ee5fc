"""Distances between sets against independent implementations, written here or those of torchmetrics."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from skipdit.metrics import sets
from skipdit.metrics.inception import NetworkOutput
from skipdit.metrics.sets import (
    Gaussian,
    Moments,
    ScoreSums,
    frechet_distance,
    kernel_distance,
    kernel_distances,
    neighbour_metrics,
)
from skipdit.metrics.statistics import Collector
from skipdit.metrics.table import SET_METRICS

pytestmark = [
    pytest.mark.filterwarnings("ignore:Metric `.*` will save all extracted features"),
    pytest.mark.filterwarnings("ignore:std... degrees of freedom is <= 0"),
]
WIDTH = 12


class Flat(nn.Module):
    """Gives torchmetrics features that are already there, as pictures of one row."""

    num_features = WIDTH

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is summed over blocks is."""
    monkeypatch.setattr(sets, "BLOCK_ROWS", 7)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    mixing = torch.randn(WIDTH, WIDTH)
    return torch.randn(90, WIDTH) @ mixing, 0.7 * torch.randn(70, WIDTH) @ mixing + 0.5


def gaussian(features: Tensor) -> Gaussian:
    moments = Moments(features.shape[1])
    for batch in features.split(11):
        moments.add(batch)
    return moments.gaussian()


def frechet_by_scipy(first: Tensor, second: Tensor) -> float:
    """As github.com/bioinf-jku/TTUR computes it."""
    (one, other), means = [np.cov(each.double().numpy(), rowvar=False) for each in (first, second)], []
    means = [each.double().numpy().mean(axis=0) for each in (first, second)]
    root = scipy.linalg.sqrtm(one @ other)
    return float(np.sum((means[0] - means[1]) ** 2) + np.trace(one) + np.trace(other) - 2 * np.trace(root).real)


def test_moments_are_those_of_numpy(pair: tuple[Tensor, Tensor]) -> None:
    first, second = pair
    found = gaussian(first)
    assert found.mean.numpy() == pytest.approx(first.double().numpy().mean(axis=0), abs=1e-12)
    assert found.covariance.numpy() == pytest.approx(np.cov(first.double().numpy(), rowvar=False), abs=1e-10)
    whole = Moments(WIDTH), Moments(WIDTH)
    whole[0].add(first)
    whole[1].add(second)
    both = whole[0].joined(whole[1]).gaussian()
    assert both.covariance.numpy() == pytest.approx(np.cov(torch.cat(pair).double().numpy(), rowvar=False), abs=1e-10)
    with pytest.raises(ValueError, match="at least 2 items, got 0"):
        Moments(3).gaussian()


def test_frechet_distance_is_that_of_scipy_and_of_torchmetrics(pair: tuple[Tensor, Tensor]) -> None:
    found = frechet_distance(*map(gaussian, pair))
    assert found == pytest.approx(frechet_by_scipy(*pair), rel=1e-9)
    judge = FrechetInceptionDistance(feature=Flat(), normalize=False).set_dtype(torch.float64)
    for features, is_real in zip(pair, (True, False), strict=True):
        judge.update(features.double().view(-1, 1, 1, WIDTH), real=is_real)
    assert found == pytest.approx(judge.compute().item(), rel=1e-6)
    assert frechet_distance(gaussian(pair[0]), gaussian(pair[0])) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_items_than_features() -> None:
    """Singular covariances, where the root of the product is unstable."""
    first, second = torch.randn(2, 8, 40)
    values = frechet_distance(gaussian(first), gaussian(second)), frechet_distance(gaussian(second), gaussian(first))
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    offset = 1e-7 * np.eye(40)  # what other implementations add then
    covariances = [np.cov(each.double().numpy(), rowvar=False) + offset for each in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    means = (first.double().mean(0) - second.double().mean(0)).square().sum().item()
    expected = means + sum(np.trace(each) for each in covariances) - 2 * np.trace(root).real
    assert values[0] == pytest.approx(float(expected), rel=1e-3)


def test_frechet_distance_where_most_features_are_constant() -> None:
    """As those of a classifier on flat pictures are; torch.linalg.eigh gives up on such a matrix."""
    torch.manual_seed(2)
    features = torch.zeros(12, 1280)
    features[:, ::17] = torch.rand(12, 76) ** 8
    found = gaussian(features)
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-5)
    moved = Gaussian(found.mean + 0.5, found.covariance, 12)
    assert frechet_distance(found, moved) == pytest.approx(1280 / 4, rel=1e-7)


def kernel_by_loops(first: Tensor, second: Tensor) -> float:
    one, other = first.double().numpy(), second.double().numpy()

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / WIDTH + 1) ** 3)

    own = [
        np.mean([kernel(a, b) for i, a in enumerate(each) for j, b in enumerate(each) if i != j])
        for each in (one, other)
    ]
    return float(sum(own) - 2 * np.mean([kernel(a, b) for a in one for b in other]))


def test_kernel_distance_is_that_of_loops_and_of_torchmetrics(pair: tuple[Tensor, Tensor]) -> None:
    found = kernel_distance(*pair)
    assert found == pytest.approx(kernel_by_loops(*pair), rel=1e-9)
    judge = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=70).set_dtype(torch.float64)
    for features, is_real in zip((pair[0][:70], pair[1]), (True, False), strict=True):
        judge.update(features.double().view(-1, 1, 1, WIDTH), real=is_real)
    assert kernel_distance(pair[0][:70], pair[1]) == pytest.approx(judge.compute()[0].item(), rel=1e-6)
    with pytest.raises(ValueError, match="at least 2 items of each, got 1 and 70"):
        kernel_distance(pair[0][:1], pair[1])


def test_kernel_distance_is_unbiased() -> None:
    """The mean over draws from one distribution is near 0 whatever n is, which a Fréchet distance's is not."""
    kernel, frechet = [], []
    for seed in range(60):
        draws = torch.randn(2, 20, WIDTH, generator=torch.Generator().manual_seed(seed))
        kernel.append(kernel_distance(*draws))
        frechet.append(frechet_distance(*map(gaussian, draws)))
    assert abs(np.mean(kernel)) < 3 * np.std(kernel) / math.sqrt(60)
    assert np.mean(frechet) > 3 * np.std(frechet)


def test_subsets_are_of_the_sets_and_the_same_at_each_call(pair: tuple[Tensor, Tensor]) -> None:
    found = kernel_distances(*pair, num_subsets=40, subset_size=60)
    assert torch.equal(found, kernel_distances(*pair, num_subsets=40, subset_size=60))
    assert not torch.equal(found, kernel_distances(*pair, num_subsets=40, subset_size=60, seed=1))
    assert found.mean().item() == pytest.approx(kernel_distance(*pair), rel=0.1)
    whole = kernel_distances(pair[0][:70], pair[1], num_subsets=2, subset_size=70)
    assert whole.tolist() == pytest.approx([kernel_distance(pair[0][:70], pair[1])] * 2, rel=1e-9)
    with pytest.raises(ValueError, match="subsets of 71 need as many items, got 90 and 70"):
        kernel_distances(*pair, subset_size=71)


def test_inception_score_is_that_of_torchmetrics() -> None:
    logits = 3 * torch.randn(64, 10)
    sums = ScoreSums(10)
    for batch in logits.split(9):
        sums.add(batch)
    judge = InceptionScore(feature=_Logits(), splits=1)
    judge.update(logits.view(-1, 1, 1, 10))
    assert sums.score() == pytest.approx(judge.compute()[0].item(), rel=1e-5)
    certain = ScoreSums(4)
    certain.add(100 * torch.eye(4))
    assert certain.score() == pytest.approx(4)


class _Logits(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1)


def neighbours_by_loops(made: Tensor, real: Tensor) -> tuple[float, float, float, float]:
    """As github.com/clovaai/generative-evaluation-prdc computes it, one neighborhood size per pair of metrics."""
    one, other = made.double().numpy(), real.double().numpy()
    between = scipy.spatial.distance.cdist(other, one)
    own = {name: scipy.spatial.distance.cdist(each, each) for name, each in (("real", other), ("made", one))}
    reach = {(name, k): np.sort(each, axis=1)[:, k] for name, each in own.items() for k in (3, 5)}
    within = between < reach["real", 5][:, None]
    return (
        float((between < reach["real", 3][:, None]).any(axis=0).mean()),
        float((between < reach["made", 3][None]).any(axis=1).mean()),
        float(within.sum(axis=0).mean() / 5),
        float((between.min(axis=1) < reach["real", 5]).mean()),
    )


def test_neighbours_are_those_of_loops(pair: tuple[Tensor, Tensor]) -> None:
    found = neighbour_metrics(*pair)
    expected = neighbours_by_loops(*pair)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected, abs=1e-12)
    assert 0 < found.precision < 1 or 0 < found.recall < 1
    with pytest.raises(ValueError, match="at least 6 items of each, got 5 and 70"):
        neighbour_metrics(pair[0][:5], pair[1])


def test_dropped_modes_cost_recall_and_noise_costs_precision() -> None:
    centers = 8 * torch.randn(6, WIDTH)
    real, modes = torch.cat([centers + torch.randn(6, WIDTH) for _ in range(20)]), [6, 4, 2, 1]
    made = torch.cat([centers + torch.randn(6, WIDTH) for _ in range(20)]).view(20, 6, WIDTH)
    dropped = [neighbour_metrics(made[:, :number].flatten(0, 1), real) for number in modes]
    for name in ("recall", "coverage"):
        values = [getattr(each, name) for each in dropped]
        assert values == sorted(values, reverse=True)
        assert values[-1] < 0.5 * values[0]
    noisy = [neighbour_metrics(made.flatten(0, 1) + level * torch.randn(120, WIDTH), real) for level in (0, 2, 8)]
    for name in ("precision", "density"):
        values = [getattr(each, name) for each in noisy]
        assert values == sorted(values, reverse=True)
        assert values[-1] < 0.5 * values[0]


def collected(features: Tensor, size: int) -> Collector:
    collector, half = Collector(len(features)), len(features) // 2
    for number, part in enumerate((features[:half], features[half:])):
        for batch in part.split(size):
            collector.add(NetworkOutput(batch, batch[:, :3], batch), number)
    return collector


def test_statistics_grow_batch_by_batch(pair: tuple[Tensor, Tensor]) -> None:
    found = collected(pair[0], 7).statistics()
    assert (found.num, found.floor_num) == (90, 45)
    assert found.pooled is not None
    assert found.features is not None
    assert found.spatial is not None
    assert found.halves is not None
    assert found.pooled.covariance.numpy() == pytest.approx(gaussian(pair[0]).covariance.numpy(), abs=1e-10)
    assert torch.equal(found.features, pair[0])
    assert len(found.spatial.mean) == 3
    assert [half.num for half in found.halves] == [45, 45]
    assert torch.equal(torch.cat([each.features for each in found.halves if each.features is not None]), pair[0])
    parts = [ScoreSums(WIDTH) for _ in range(10)]
    for part, rows in zip(parts, pair[0].split(9), strict=True):
        part.add(rows)
    assert found.scores == pytest.approx([part.score() for part in parts])


def test_features_of_both_halves_are_kept(monkeypatch: pytest.MonkeyPatch, pair: tuple[Tensor, Tensor]) -> None:
    monkeypatch.setattr("skipdit.metrics.statistics.MAX_FEATURES", 20)
    found = collected(pair[0], 7).statistics()
    assert found.features is not None
    assert torch.equal(found.features, torch.cat([pair[0][:10], pair[0][45:55]]))
    assert found.pooled is not None
    assert found.pooled.num == 90


def test_broken_features_are_refused() -> None:
    with pytest.raises(ValueError, match="features are not finite"):
        collected(torch.full((8, 3), math.nan), 4)


def test_names_are_those_of_papers_only_for_their_network() -> None:
    names = {metric.name: metric for metric in SET_METRICS}
    assert names["fd"].called("Inception", is_standard=True) == "FID"
    assert names["fd"].called("Inception", is_standard=False) == "FD-Inception"
    assert names["fd"].called("EffNetLite0", is_standard=True) == "FD-EffNetLite0"
    assert names["fd"].called("I3D", is_standard=True) == "FVD"
    assert names["is"].called("I3D", is_standard=True) == "IS-I3D"
