"""Measures a set, or two sets item by item, in batches; the result is bit-equal for any number of processes.

A batch has the same items for any number of processes. The main process receives the results of all batches in order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from skipdit.evaluation.items import Items, digest_items, join_digests
from skipdit.metrics.extractors import Extractor
from skipdit.metrics.inception import NetworkOutput
from skipdit.metrics.paired import PairedScore
from skipdit.metrics.statistics import Collector, Statistics
from skipdit.metrics.table import Metric, compare_pictures, join_values
from skipdit.metrics.texts import TextPictureEncoders, clip_scores
from skipdit.process_group import ProcessGroup

Result = TypeVar("Result")
Advance = Callable[[int], object]  # called with the number of items that are done


@dataclass(frozen=True)
class Batch:
    """Items that are measured together."""

    indices: tuple[int, ...]
    half: int = 0
    """the half of the set that they belong to: 0 or 1"""


def split(indices: Sequence[int], size: int, half: int = 0) -> list[Batch]:
    """Return batches of at most `size` of these items, in order."""
    return [Batch(tuple(indices[start : start + size]), half) for start in range(0, len(indices), size)]


def make_batches(num: int, max_items: int | None, size: int, seed: int) -> list[Batch]:
    """Return batches of at most `max_items` random items: those of a first random half, then the others."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))[:max_items].tolist()
    middle = len(order) // 2
    return split(order[:middle], size, 0) + split(order[middle:], size, 1)


def measure_set(
    items: Items,
    extractor: Extractor,
    group: ProcessGroup,
    device: torch.device,
    *,
    num: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    advance: Advance = lambda count: None,
) -> Statistics | None:
    """Return the statistics of a set in the main process, `None` in others. num: measure at most this many items, drawn
    at random. Raises `ValueError` if an item cannot be read, if sizes differ, or if there are fewer than two items.
    """
    batches = make_batches(items.num, num, batch_size or extractor.batch_size, seed)
    count = sum(len(batch.indices) for batch in batches)
    if count < 2:
        raise ValueError(f"a set needs at least 2 items, got {count} of {items.source}")
    shape = items.read(batches[-1].indices[0]).shape

    def run(batch: Batch, pixels: np.ndarray) -> tuple[NetworkOutput, list[bytes]]:
        if pixels.shape[1:] != shape:
            sizes = (" x ".join(map(str, sides[:-1])) for sides in (shape, pixels.shape[1:]))
            raise ValueError(f"{items.source} has items of {' and of '.join(sizes)}: give --image-size")
        return extractor(torch.from_numpy(np.ascontiguousarray(pixels)), device), digest_items(pixels)

    frames = shape[0] if items.is_clips and extractor.takes == "pictures" else 1
    collector, digests = Collector(count * frames), list[bytes]()
    for batch, (features, batch_digests) in rounds(batches, items.batch, run, group):
        collector.add(features, batch.half)
        digests += batch_digests
        advance(len(batch.indices))
    if not group.is_main:
        return None
    digest = join_digests(digests)
    return collector.statistics(digest=digest, identity=extractor.identity, source=items.source)


def rounds(
    batches: Sequence[Batch],
    read: Callable[[Sequence[int]], np.ndarray],
    run: Callable[[Batch, np.ndarray], Result],
    group: ProcessGroup,
) -> Iterator[tuple[Batch, Result]]:
    """Yield every batch with its result, in order, in the main process, and nothing in others. Each process reads its
    next batch while it runs one."""
    mine = list(range(group.rank, len(batches), group.size))
    with ThreadPoolExecutor(1) as reader:
        pending = [reader.submit(read, batches[number].indices) for number in mine[:1]]
        for turn in range(-(-len(batches) // group.size)):

            def make(turn: int = turn) -> Result | None:
                if turn >= len(mine):
                    return None
                pixels = pending.pop().result()
                if turn + 1 < len(mine):
                    pending.append(reader.submit(read, batches[mine[turn + 1]].indices))
                return run(batches[mine[turn]], pixels)

            results = group.gather(make)
            for rank, result in enumerate(results or ()):
                if result is not None:
                    yield batches[turn * group.size + rank], result


# ----------------------------------------------------------------------------------------------------------------------
# Item by item


def as_pixels(items: np.ndarray, device: torch.device) -> Tensor:
    """Return pictures, or the frames of clips, as (n 3 h w) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(items)).to(device).flatten(0, -4).movedim(-1, 1).float() / 255


def compare_items(
    samples: Items,
    reference: Items,
    metrics: Sequence[Metric],
    group: ProcessGroup,
    device: torch.device,
    *,
    num: int | None = None,
    batch_size: int = 32,
    advance: Advance = lambda count: None,
) -> Mapping[str, PairedScore] | None:
    """Return the scores of pictures, or of the frames of clips, compared one by one with their references, in the main
    process, `None` in others. Raises `ValueError` if the two sets differ in number, names or sizes."""
    check_pairs(samples, reference)

    def read(indices: Sequence[int]) -> np.ndarray:
        first, second = samples.batch(indices), reference.batch(indices)
        if first.shape != second.shape:
            shapes = " and ".join(" x ".join(map(str, items.shape[1:-1])) for items in (first, second))
            raise ValueError(f"{samples.name(indices[0])} and its reference have different sizes: {shapes}")
        return np.stack([first, second])

    def run(batch: Batch, pixels: np.ndarray) -> dict[str, Tensor]:
        with torch.inference_mode():
            pictures, references = (as_pixels(items, device) for items in pixels)
            size = min(pictures.shape[-2:])
            if too_small := [metric.title for metric in metrics if size < metric.min_size]:
                raise ValueError(f"pictures of {size} pixels are too small for {', '.join(too_small)}: give --metrics")
            return {name: values.cpu() for name, values in compare_pictures(pictures, references, metrics).items()}

    results: list[dict[str, Tensor]] = []
    for batch, result in rounds(split(range(min(num or samples.num, samples.num)), batch_size), read, run, group):
        results.append(result)
        advance(len(batch.indices))
    return join_values(results) if group.is_main else None


def check_pairs(samples: Items, reference: Items) -> None:
    """Raise `ValueError` unless two sets have the same number of items, and the same names if both consist of files."""
    if samples.num != reference.num or samples.is_clips != reference.is_clips:
        kinds = [f"{items.num} {'clips' if items.is_clips else 'pictures'}" for items in (samples, reference)]
        raise ValueError(f"pairs need two sets alike, got {kinds[0]} and {kinds[1]}")
    if samples.has_names and reference.has_names:
        for index in range(samples.num):
            if samples.name(index) != reference.name(index):
                names = f"{samples.name(index)} of the samples and {reference.name(index)} of the reference"
                raise ValueError(f"pairs need files of the same names, got {names}")


def score_texts(
    items: Items,
    encoders: TextPictureEncoders,
    group: ProcessGroup,
    device: torch.device,
    *,
    num: int | None = None,
    batch_size: int = 32,
    advance: Advance = lambda count: None,
) -> PairedScore | None:
    """Return how well pictures, or clips as the mean over their frames, fit their texts, in the main process, `None` in
    others. Raises `ValueError` if the set has no texts."""
    if items.texts is None:
        raise ValueError(f"{items.source} has no texts: they are in samples.json or metadata.jsonl beside samples")
    texts = items.texts()

    def run(batch: Batch, pixels: np.ndarray) -> Tensor:
        frames = pixels.shape[1] if items.is_clips else 1
        repeated = [texts[index] for index in batch.indices for _ in range(frames)]
        return clip_scores(as_pixels(pixels, device), repeated, encoders).unflatten(0, (-1, frames)).mean(dim=1)

    results: list[Tensor] = []
    for batch, result in rounds(split(range(min(num or items.num, items.num)), batch_size), items.batch, run, group):
        results.append(result)
        advance(len(batch.indices))
    return PairedScore.of(torch.cat(results)) if group.is_main else None
