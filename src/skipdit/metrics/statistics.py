"""Statistics of a set: moments, some features and scores, collected batch by batch and saved as safetensors."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from skipdit.files.untrusted import as_type, check_regular, parse_json, printable
from skipdit.interfaces import Fields
from skipdit.metrics.inception import NetworkOutput
from skipdit.metrics.sets import SCORE_SPLITS, Gaussian, Moments, ScoreSums

KIND = "skipdit statistics 1"  # marks the file
MAX_FEATURES = 10_000  # items of a set whose features are kept for distances between items
MAX_STORED_BYTES = 2**32


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The statistics of a set; `None` for those that were not measured."""

    num: int
    """number of items"""
    pooled: Gaussian | None = None
    spatial: Gaussian | None = None
    features: Tensor | None = None
    """(n d) float32, of at most `MAX_FEATURES` items"""
    scores: tuple[float, ...] = ()
    """inception scores of ten parts"""
    halves: tuple["Statistics", "Statistics"] | None = None
    """statistics of two random halves, which show how much two sets of real items differ"""
    floors: Mapping[str, float] = field(default_factory=dict)
    """metrics of the two halves, by name, if only those were saved"""
    floor_num: int | None = None
    """number of items in a half"""
    digest: str = ""
    """SHA-256 of the items, independent of their order and file format"""
    identity: Mapping[str, str] = field(default_factory=dict)
    """extractor, weights and resize rule"""
    source: str = ""
    """path or name of the set"""


class Collector:
    """Collects the statistics of a set of `num` items, batch by batch in order: first all of one half, then the
    other."""

    def __init__(self, num: int) -> None:
        self.num, self.seen = num, 0
        self.pooled: list[Moments] = []
        self.spatial: list[Moments] = []
        self.features: list[list[Tensor]] = [[], []]
        self.scores: list[ScoreSums] = []

    def add(self, batch: NetworkOutput, half: int) -> None:
        """Add a batch of one half."""
        if not self.pooled:
            self.pooled = [Moments(batch.pooled.shape[1]) for _ in range(2)]
            self.spatial = [Moments(batch.spatial.shape[1]) for _ in range(2)] if batch.spatial is not None else []
            if batch.logits is not None:
                parts = min(SCORE_SPLITS, self.num)
                self.scores = [ScoreSums(batch.logits.shape[1]) for _ in range(parts)]
        check_finite(batch.pooled)
        self.pooled[half].add(batch.pooled)
        if batch.spatial is not None:
            self.spatial[half].add(batch.spatial)
        missing = MAX_FEATURES // 2 - sum(map(len, self.features[half]))
        if missing > 0:
            self.features[half].append(batch.pooled[:missing])
        for index in range(len(batch.pooled) if batch.logits is not None else 0):
            part = (self.seen + index) * len(self.scores) // self.num
            assert batch.logits is not None
            self.scores[part].add(batch.logits[index : index + 1])
        self.seen += len(batch.pooled)

    def statistics(
        self, *, digest: str = "", identity: Mapping[str, str] | None = None, source: str = ""
    ) -> Statistics:
        """Return the statistics. digest, identity, source: further fields of them."""
        num_first = sum(map(len, self.features[0]))
        features = torch.cat([torch.empty(0, self.pooled[0].total.numel()), *self.features[0], *self.features[1]])
        self.features = [[], []]
        parts = (features[:num_first], features[num_first:])
        halves = [
            Statistics(
                num=self.pooled[half].num,
                pooled=_gaussian(self.pooled[half]),
                spatial=_gaussian(self.spatial[half]) if self.spatial else None,
                features=parts[half],
            )
            for half in range(2)
        ]
        return Statistics(
            num=self.seen,
            pooled=_gaussian(self.pooled[0].joined(self.pooled[1])),
            spatial=_gaussian(self.spatial[0].joined(self.spatial[1])) if self.spatial else None,
            features=features,
            scores=tuple(sums.score() for sums in self.scores),
            halves=(halves[0], halves[1]) if min(half.num for half in halves) > 1 else None,
            floor_num=halves[1].num,
            digest=digest,
            identity=identity or {},
            source=source,
        )


def check_finite(features: Tensor) -> None:
    """Raise `ValueError` if features are NaN or infinite, as a single one would spoil every metric."""
    if not features.isfinite().all():
        raise ValueError("the extractor's features are not finite")


def _gaussian(moments: Moments) -> Gaussian | None:
    return moments.gaussian() if moments.num > 1 else None


# ----------------------------------------------------------------------------------------------------------------------
# Files


class Stored(TypedDict):
    """The metadata of a file, see `Statistics`."""

    num: int
    floor_num: int | None
    digest: str
    source: str
    scores: list[float]
    floors: dict[str, float]
    identity: dict[str, str]
    spatial_num: int | None
    pooled_num: int


def save_statistics(path: Path, statistics: Statistics, floors: Mapping[str, float]) -> None:
    """Write the statistics of a set as safetensors: mean and covariance in float64, the kept features, and everything
    else as metadata."""
    assert statistics.pooled is not None
    tensors = {"pooled.mean": statistics.pooled.mean, "pooled.covariance": statistics.pooled.covariance}
    if statistics.spatial is not None:
        tensors |= {"spatial.mean": statistics.spatial.mean, "spatial.covariance": statistics.spatial.covariance}
    if statistics.features is not None:
        tensors["features"] = statistics.features
    metadata = Stored(
        num=statistics.num,
        floor_num=statistics.floor_num,
        digest=statistics.digest,
        source=statistics.source,
        scores=list(statistics.scores),
        floors={name: value for name, value in floors.items() if math.isfinite(value)},
        identity=dict(statistics.identity),
        spatial_num=statistics.spatial.num if statistics.spatial else None,
        pooled_num=statistics.pooled.num,
    )
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"kind": KIND, "about": json.dumps(metadata)})


def check_may_be_replaced(path: Path) -> None:
    """Raise `FileExistsError` if a path exists and does not hold statistics, which may be replaced."""
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                kind = (file.metadata() or {}).get("kind")
        except Exception:  # safetensors raises an error of its own
            kind = None
        if kind == KIND:
            return
    if os.path.lexists(path):
        raise FileExistsError(f"{printable(path)} exists and holds no statistics of a set: choose another name")


def load_statistics(path: Path) -> Statistics:
    """Return the statistics that `save_statistics` wrote. Raises `OSError` if the file cannot be read, and `ValueError`
    if it holds anything else."""
    name = printable(path)
    check_regular(path)
    if path.stat().st_size > MAX_STORED_BYTES:
        raise ValueError(f"{name} is larger than the {MAX_STORED_BYTES:,} bytes that are read")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # safetensors raises an error of its own
        raise ValueError(f"cannot read {name}: {printable(error)}") from error
    if metadata.get("kind") != KIND:
        raise ValueError(f"{name} holds no statistics of a set: they are written by --save-reference")
    about = as_type(parse_json(metadata.get("about", "").encode(), Fields, name), Stored, name)
    pooled = _stored_gaussian(tensors, "pooled", about["pooled_num"], name)
    if pooled is None:
        raise ValueError(f"{name} has no pooled features")
    features = tensors.get("features")
    if features is not None and (features.dtype != torch.float32 or features.shape[1:] != pooled.mean.shape):
        raise ValueError(f"the features of {name} are {features.dtype} {tuple(features.shape)}")
    return Statistics(
        num=about["num"],
        pooled=pooled,
        spatial=_stored_gaussian(tensors, "spatial", about["spatial_num"] or 0, name),
        features=features,
        scores=tuple(about["scores"]),
        floors=about["floors"],
        floor_num=about["floor_num"],
        digest=about["digest"],
        identity=about["identity"],
        source=about["source"],
    )


def _stored_gaussian(tensors: Mapping[str, Tensor], kind: str, num: int, name: str) -> Gaussian | None:
    mean, covariance = tensors.get(f"{kind}.mean"), tensors.get(f"{kind}.covariance")
    if mean is None or covariance is None:
        return None
    sizes = (mean.ndim, tuple(covariance.shape), {mean.dtype, covariance.dtype})
    if sizes != (1, (len(mean), len(mean)), {torch.float64}) or not (
        mean.isfinite().all() & covariance.isfinite().all()
    ):
        raise ValueError(f"mean and covariance of the {kind} features of {name} are no finite float64 of the same size")
    return Gaussian(mean, covariance, num)
