"""Distances between two sets of pictures or clips, as pure functions of the features of a network: in float64, and in
blocks of rows, so that a set of 50,000 items needs no 50,000 x 50,000 matrix.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Features = Float[Tensor, "items features"]
Samples = Float[Tensor, "samples features"]
Reference = Float[Tensor, "references features"]
BLOCK_ROWS = 1024
KERNEL_DEGREE = 3  # Bińkowski et al. 2018, arXiv 1801.01401, section 4
SCORE_SPLITS = 10  # Salimans et al. 2016, arXiv 1606.03498
MANIFOLD_NEIGHBOURS = 3  # of precision and recall: Kynkäänniemi et al. 2019, arXiv 1904.06991, section 3
DENSITY_NEIGHBOURS = 5  # of density and coverage: Naeem et al. 2020, arXiv 2002.09797, section 4.2


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set's features."""

    mean: Float[Tensor, " features"]
    covariance: Float[Tensor, "features features"]
    """with n - 1 in the denominator, as in numpy.cov"""
    num: int
    """number of items measured"""


class Moments:
    """Running sums of features and of their products, in float64."""

    def __init__(self, num_features: int) -> None:
        self.num = 0
        self.total = torch.zeros(num_features, dtype=torch.float64)
        self.products = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features: Features) -> None:
        """Add a batch."""
        values = features.double()
        self.num += len(values)
        self.total += values.sum(dim=0)
        self.products.addmm_(values.mT, values)

    def joined(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together."""
        both = Moments(len(self.total))
        both.num, both.total = self.num + other.num, self.total + other.total
        both.products = self.products + other.products
        return both

    def gaussian(self) -> Gaussian:
        """Return the mean and the covariance. Raises `ValueError` if there are fewer than two items."""
        if self.num < 2:
            raise ValueError(f"a covariance needs at least 2 items, got {self.num}")
        mean = self.total / self.num
        return Gaussian(mean, (self.products - self.num * mean.outer(mean)) / (self.num - 1), self.num)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Fréchet distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    The trace of the root of the product of the covariances is computed from a symmetric matrix with the same
    eigenvalues, so no complex numbers appear and a singular covariance needs no offset. Raises `ValueError` if the two
    have different numbers of features.
    """
    if first.mean.shape != second.mean.shape:
        sizes = " and ".join(" x ".join(map(str, gaussian.mean.shape)) for gaussian in (first, second))
        raise ValueError(f"means and covariances are of different networks: they have {sizes} features")
    values, vectors = _eigenvectors(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    inner = root @ second.covariance @ root
    cross = _eigenvalues((inner + inner.mT) / 2).clamp(min=0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace()
    return max(0.0, (distance - 2 * cross).item())


def _eigenvectors(matrix: Float[Tensor, "size size"]) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues and eigenvectors of a symmetric matrix; on a CPU by numpy, as MKL's divide and conquer,
    which torch calls, fails if most features are constant."""
    values, vectors = (
        torch.linalg.eigh(matrix) if matrix.is_cuda else map(torch.from_numpy, np.linalg.eigh(matrix.numpy()))
    )
    return values, vectors


def _eigenvalues(matrix: Float[Tensor, "size size"]) -> Tensor:
    return torch.linalg.eigvalsh(matrix) if matrix.is_cuda else torch.from_numpy(np.linalg.eigvalsh(matrix.numpy()))


def kernel_distance(first: Samples, second: Reference) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy under the kernel (x·y / d + 1)³
    (arXiv 1801.01401, equation 4), which may be slightly below 0. Raises `ValueError` if a set has fewer than two
    items."""
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 items of each, got {len(first)} and {len(second)}")

    def total(one: Tensor, other: Tensor, *, is_same: bool) -> float:
        result = 0.0
        for start in range(0, len(one), BLOCK_ROWS):
            kernel = (one[start : start + BLOCK_ROWS] @ other.mT / one.shape[1] + 1) ** KERNEL_DEGREE
            result += (kernel.sum() - (kernel.diagonal(start).sum() if is_same else 0)).item()
        return result

    one, other = first.double(), second.double()
    within = [total(rows, rows, is_same=True) / (len(rows) * (len(rows) - 1)) for rows in (one, other)]
    return sum(within) - 2 * total(one, other, is_same=False) / (len(one) * len(other))


def kernel_distances(
    first: Samples, second: Reference, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Float[Tensor, " subsets"]:
    """Return the kernel distances of random subsets, drawn without replacement; papers report their mean and standard
    deviation as KID. Raises `ValueError` if a set is smaller than a subset."""
    if min(len(first), len(second)) < subset_size:
        raise ValueError(f"subsets of {subset_size} need as many items, got {len(first)} and {len(second)}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_subsets):
        subsets = (rows[torch.randperm(len(rows), generator=generator)[:subset_size]] for rows in (first, second))
        values.append(kernel_distance(*subsets))
    return torch.tensor(values, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# The inception score


class ScoreSums:
    """Running sums for the inception score of one part of a set."""

    def __init__(self, num_classes: int) -> None:
        self.num, self.log_total = 0, 0.0
        self.total = torch.zeros(num_classes, dtype=torch.float64)

    def add(self, logits: Float[Tensor, "items classes"]) -> None:
        """Add a batch."""
        log_probabilities = logits.double().log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        self.num += len(logits)
        self.total += probabilities.sum(dim=0)
        self.log_total += (probabilities * log_probabilities).sum().item()

    def score(self) -> float:
        """Return the exponential of the mean divergence between the class distribution of an item and that of all
        items (arXiv 1606.03498, section 4)."""
        marginal = self.total / self.num
        return torch.tensor(self.log_total / self.num - (marginal * marginal.log()).nansum().item()).exp().item()


# ----------------------------------------------------------------------------------------------------------------------
# Fidelity and diversity


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Metrics of the nearest neighbors of two sets."""

    precision: float
    """share of samples within the neighborhood of a reference item"""
    recall: float
    """share of reference items within the neighborhood of a sample"""
    density: float
    """mean number of neighborhoods of reference items that a sample lies in, divided by the number of neighbors; above
    1 if samples are crowded"""
    coverage: float
    """share of reference items with a sample in their neighborhood"""


def neighbour_metrics(samples: Samples, reference: Reference) -> Coverage:
    """Return precision and recall (k = 3; arXiv 1904.06991, equation 1), density and coverage (k = 5; arXiv
    2002.09797, equations 3 and 4). Raises `ValueError` if a set has fewer than six items."""
    min_items = DENSITY_NEIGHBOURS + 1
    if min(len(samples), len(reference)) < min_items:
        raise ValueError(f"neighbors need at least {min_items} items of each, got {len(samples)} and {len(reference)}")
    made, real = samples.double(), reference.double()
    made_radii, real_radii = _radii(made), _radii(real)
    is_precise, num_within = (made.new_zeros(len(made), dtype=dtype) for dtype in (torch.bool, torch.int64))
    is_recalled, nearest = [], []
    for start in range(0, len(real), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        distances = _squared_distances(real[rows], made)
        is_precise |= (distances <= real_radii[0][rows, None]).any(dim=0)
        num_within += (distances <= real_radii[1][rows, None]).sum(dim=0)
        is_recalled.append((distances <= made_radii[0]).any(dim=1))
        nearest.append(distances.amin(dim=1) <= real_radii[1][rows])
    return Coverage(
        precision=is_precise.double().mean().item(),
        recall=torch.cat(is_recalled).double().mean().item(),
        density=num_within.double().mean().item() / DENSITY_NEIGHBOURS,
        coverage=torch.cat(nearest).double().mean().item(),
    )


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    squares = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    return (squares - 2 * rows @ columns.mT).clamp_(min=0)


def _radii(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return each item's squared distance to its third and to its fifth nearest neighbor, not counting itself."""
    blocks = []
    for start in range(0, len(features), BLOCK_ROWS):
        distances = _squared_distances(features[start : start + BLOCK_ROWS], features)
        distances.diagonal(start).zero_()
        blocks.append(distances.topk(DENSITY_NEIGHBOURS + 1, dim=1, largest=False).values)
    nearest = torch.cat(blocks)
    return nearest[:, MANIFOLD_NEIGHBOURS], nearest[:, DENSITY_NEIGHBOURS]
