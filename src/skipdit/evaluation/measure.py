"""Measure a set, or two sets item by item: in batches, by one process or by several with the same result to the bit.

A batch is of the same items whatever the number of processes; the main process takes batches in order, and alone holds
what is gathered.
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
from skipdit.metrics.table import Metric, compare_pictures
from skipdit.metrics.texts import TextPictureEncoders, clip_scores
from skipdit.process_group import ProcessGroup

Result = TypeVar("Result")
Advance = Callable[[int], object]  # is told how many items are done


@dataclass(frozen=True)
class Batch:
    """Which items are measured at once, and of which half they are."""

    indices: tuple[int, ...]
    half: int = 0


def make_batches(num: int, most: int | None, size: int, seed: int) -> list[Batch]:
    """Return batches of at most `most` random items, half by half: the first half of a random order, then the rest."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))[:most].tolist()
    halves = (order[: len(order) // 2], order[len(order) // 2 :])
    return [
        Batch(tuple(half[start : start + size]), number)
        for number, half in enumerate(halves)
        for start in range(0, len(half), size)
    ]


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
    """Return the statistics of a set, in the main process. num: at most so many items, drawn at random.

    `ValueError` where an item cannot be read, sizes differ, or the set has fewer than two.
    """
    batches = make_batches(items.num, num, batch_size or extractor.batch_size, seed)
    count = sum(len(batch.indices) for batch in batches)
    if count < 2:
        raise ValueError(f"a set needs at least 2 items, got {count} of {items.source}")
    shape = items.read(batches[-1].indices[0]).shape

    def run(batch: Batch, pixels: np.ndarray) -> tuple[NetworkOutput, list[bytes]]:
        if pixels.shape[1:] != shape:
            sizes = (" x ".join(map(str, each[:-1])) for each in (shape, pixels.shape[1:]))
            raise ValueError(f"{items.source} has items of {' and of '.join(sizes)}: give --image-size")
        return extractor(torch.from_numpy(np.ascontiguousarray(pixels)), device), digest_items(pixels)

    frames = shape[0] if items.is_clips and extractor.takes == "pictures" else 1
    collector, digests = Collector(count * frames), list[bytes]()
    for batch, (features, found) in rounds(batches, items.batch, run, group):
        collector.add(features, batch.half)
        digests += found
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
    """Yield every batch with its result in the main process, in order; in the others nothing. Each process reads its
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

            found = group.gather(make)
            for rank, result in enumerate(found or ()):
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
    """Return the scores of pictures, or of the frames of clips, one by one with their references, in the main process.
    `ValueError` where the two sets differ in number, names or sizes."""
    check_pairs(samples, reference)
    indices = range(min(num or samples.num, samples.num))
    batches = [Batch(tuple(indices[start : start + batch_size])) for start in indices[::batch_size]]

    def read(chosen: Sequence[int]) -> np.ndarray:
        pair = [each.batch(chosen) for each in (samples, reference)]
        if pair[0].shape != pair[1].shape:
            shapes = " and ".join(" x ".join(map(str, each.shape[1:-1])) for each in pair)
            raise ValueError(f"{samples.name(chosen[0])} and its reference are of other sizes: {shapes}")
        return np.stack(pair)

    def run(batch: Batch, pixels: np.ndarray) -> dict[str, Tensor]:
        with torch.inference_mode():
            pictures = [as_pixels(each, device) for each in pixels]
            size = min(pictures[0].shape[-2:])
            if small := [each.title for each in metrics if size < each.min_size]:
                raise ValueError(f"pictures of {size} pixels are too small for {', '.join(small)}: give --metrics")
            return {name: each.cpu() for name, each in compare_pictures(*pictures, metrics=metrics).items()}

    values: list[dict[str, Tensor]] = []
    for batch, found in rounds(batches, read, run, group):
        values.append(found)
        advance(len(batch.indices))
    if not group.is_main:
        return None
    return {each.name: PairedScore.of(torch.cat([found[each.name] for found in values])) for each in metrics}


def check_pairs(samples: Items, reference: Items) -> None:
    """Raise `ValueError` unless two sets have the same number of items, and the same names where both are files."""
    if samples.num != reference.num or samples.is_clips != reference.is_clips:
        kinds = [f"{each.num} {'clips' if each.is_clips else 'pictures'}" for each in (samples, reference)]
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
    """Return how well pictures, or the frames of clips in the mean, fit their texts, in the main process. `ValueError`
    where the set has no texts."""
    if items.texts is None:
        raise ValueError(f"{items.source} has no texts: they are in samples.json or metadata.jsonl beside samples")
    texts = items.texts()
    indices = range(min(num or items.num, items.num))
    batches = [Batch(tuple(indices[start : start + batch_size])) for start in indices[::batch_size]]

    def run(batch: Batch, pixels: np.ndarray) -> Tensor:
        frames = pixels.shape[1] if items.is_clips else 1
        repeated = [texts[index] for index in batch.indices for _ in range(frames)]
        return clip_scores(as_pixels(pixels, device), repeated, encoders).unflatten(0, (-1, frames)).mean(dim=1)

    values: list[Tensor] = []
    for batch, found in rounds(batches, items.batch, run, group):
        values.append(found)
        advance(len(batch.indices))
    return PairedScore.of(torch.cat(values)) if group.is_main else None
