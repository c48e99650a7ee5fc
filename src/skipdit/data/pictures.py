"""Read pictures with classes and captions from the bundled emoji, a folder, parquet files or a `datasets` name."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from skipdit.data.config import DataConfig as DataConfig
from skipdit.data.folders import as_captions, scan_classes
from skipdit.data.picture_files import PICTURE_SUFFIXES, check_picture, open_picture, reason_of, to_rgb
from skipdit.data.tables import find_tables, label_names_of, read_cell, read_table, to_classes, undecoded
from skipdit.files.untrusted import printable, printable_path

MAX_CACHED_BYTES = 2**30
MAX_DECODED_AT_ONCE = 10_000
MAX_CAPTION_TAGS = 3
MAX_CAPTIONS = 2**24  # of a data set, after padding: see `pad_captions`


class LabelledItems(Dataset[tuple[Tensor, int | Tensor]]):
    """Pictures, clips or latents with their class. Abstract."""

    labels: Sequence[int]
    """class of each item"""
    content = ""
    """SHA-256 of the files of latents"""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        stored, label = self.stored(index)
        return as_floats(stored), label

    def stored(self, index: int) -> tuple[Tensor, int | Tensor]:
        """Return an item as it is stored (pixels as uint8), with its class or classes."""
        raise NotImplementedError

    def draw(self, stored: Tensor, flip: bool, draws: "Draws") -> Tensor:
        """Return a batch of stored items as a training step sees them."""
        return flip_half(stored, draws) if flip else stored


@dataclass(frozen=True)
class PictureFiles:
    """Pictures that are not decoded yet."""

    read: Callable[[int], Image.Image]
    """returns the picture of an index; `ValueError` names a broken one"""
    names: Callable[[int], str]
    """returns what errors call a picture"""
    labels: Sequence[int]
    """class of each picture"""
    label_names: Sequence[str]
    """name of each class"""
    captions: Sequence[Sequence[str]] | None = None
    """one or more texts per picture; None takes the class name"""
    files: Sequence[Path] = ()
    """files on this machine that the pictures are in"""
    check: Callable[[], object] = bool
    """raises `ValueError` if a file is not a picture, as far as that is seen without decoding"""


class LabelledPictures(LabelledItems):
    """Pictures (3, size, size) in [-1, 1] with their class. Decoded pictures are cached if they fit into 1 GiB; up to
    10,000 are decoded immediately, so that `ValueError` names a broken one before training starts.

    read: returns the picture of an index; `ValueError` names a broken one. names: returns what errors call a picture.
    captions: one or more per picture, by default its class name, padded by `pad_captions`.
    """

    num_channels, num_frames, num_pictures = 3, None, 0
    vae = states = None  # see `LabelledLatents`

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        names: Callable[[int], str],
        labels: Sequence[int],
        label_names: Sequence[str],
        size: int,
        captions: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.read, self.names, self.size = read, names, size
        self.labels, self.label_names = list(labels), list(label_names)
        self.captions = pad_captions([[label_names[label]] for label in labels] if captions is None else captions)
        assert len(self.captions) == len(labels)
        self._decoded: dict[int, Tensor] | None = {} if len(labels) * 3 * size * size <= MAX_CACHED_BYTES else None
        if self._decoded is not None and len(labels) <= MAX_DECODED_AT_ONCE:
            self._decoded = {index: self._decode(index) for index in range(len(labels))}

    def stored(self, index: int) -> tuple[UInt8[Tensor, "3 size size"], int]:
        if self._decoded is None:
            pixels = self._decode(index)
        else:
            if index not in self._decoded:
                self._decoded[index] = self._decode(index)
            pixels = self._decoded[index]
        return pixels, self.labels[index]

    def _decode(self, index: int) -> Tensor:
        picture = self.read(index)
        try:
            picture = to_rgb(picture, self.size)
        except ValueError as error:
            raise ValueError(f"cannot read the picture {self.names(index)}: {reason_of(error)}") from error
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Draws:
    """Random numbers for `rows` of a batch of `size`. They are drawn for the whole batch, on the generator's device, so
    that a row gets the same numbers however the batch is divided."""

    generator: torch.Generator
    size: int
    rows: slice = field(default_factory=lambda: slice(None))

    def rand(self, *shape: int) -> Tensor:
        """Return (rows, *shape), uniform in [0, 1)."""
        return torch.rand(self.size, *shape, generator=self.generator, device=self.generator.device)[self.rows]

    def randn(self, *shape: int) -> Tensor:
        """Return (rows, *shape), standard normal."""
        return torch.randn(self.size, *shape, generator=self.generator, device=self.generator.device)[self.rows]

    def randint(self, high: int) -> Tensor:
        """Return (rows,), integers below `high`."""
        return torch.randint(high, (self.size,), generator=self.generator, device=self.generator.device)[self.rows]


def flip_half(pixels: Float[Tensor, "batch *frames 3 height width"], draws: Draws) -> Tensor:
    """Mirror each picture or clip of a batch with probability 1/2."""
    flipped = draws.rand() < 0.5
    return torch.where(flipped.view(-1, *[1] * (pixels.ndim - 1)).to(pixels.device), pixels.flip(-1), pixels)


def pictures_beside(index: int, num_clips: int, num_frames: int, num_pictures: int) -> list[tuple[int, int]]:
    """Return (clip, frame) of each picture beside clip `index`: from other clips, each used once if there are enough.
    They depend only on the index, so that a resumed run sees the same ones."""
    generator = np.random.default_rng(index)
    num_others = max(1, num_clips - 1)
    steps = generator.choice(num_others, num_pictures, replace=num_others < num_pictures)
    frames = generator.integers(num_frames, size=num_pictures)
    return [((index + 1 + int(step)) % num_clips, int(frame)) for step, frame in zip(steps, frames, strict=True)]


def as_floats(stored: Tensor) -> Tensor:
    """Return stored values as a model sees them: uint8 as pixels in [-1, 1], others in float32."""
    return stored.float() / 127.5 - 1 if stored.dtype == torch.uint8 else stored.float()


def pad_captions(captions: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Repeat the last caption of each item until all items have the same number of captions. `ValueError` if that makes
    more than `MAX_CAPTIONS`."""
    num_variants = max(map(len, captions))
    if num_variants * len(captions) > MAX_CAPTIONS:
        raise ValueError(
            f"{num_variants} captions for each of {len(captions)} items are too many: at most {MAX_CAPTIONS:,}"
        )
    return [(*texts, *[texts[-1]] * (num_variants - len(texts))) for texts in captions]


def open_pictures(config: DataConfig) -> LabelledPictures:
    """Open the data set of a config. `FileNotFoundError` / `ValueError` with a one-line message if that fails."""
    return labelled(find_pictures(config), config.image_size)


def labelled(found: PictureFiles, size: int) -> LabelledPictures:
    """Return pictures that have been found, with their size in pixels."""
    found.check()
    return LabelledPictures(found.read, found.names, found.labels, found.label_names, size, found.captions)


def find_pictures(config: DataConfig) -> PictureFiles:
    """Find the pictures of a config without decoding or checking them. Errors as for `open_pictures`."""
    found = _find(config)
    if not found.labels:
        raise ValueError("there are no pictures in this data set")
    return found


def _find(config: DataConfig) -> PictureFiles:
    path = Path(config.source)
    if config.source == "emoji":
        check_no_caption_column(config.source, config.caption_column)
        return find_emoji()
    paths = find_tables(path, config.split) if path.is_dir() else [path] if path.suffix.lower() == ".parquet" else []
    if paths:
        return find_in_table(
            paths, printable_path(path), config.image_column, config.label_column, config.caption_column
        )
    if path.is_dir():
        check_no_caption_column(config.source, config.caption_column)
        return find_in_folder(path)
    if path.exists():  # do not ask the hub for the name of a file
        raise ValueError(f"{printable_path(path)} is neither a folder nor a .parquet file")
    return find_in_datasets(config)


def check_no_caption_column(source: str, caption_column: str | None) -> None:
    """Raise `ValueError` if a caption column is given for a source without columns."""
    if caption_column is not None:
        raise ValueError(
            f"{printable_path(source)} has its own captions: caption_column must be None, got {caption_column!r}"
        )


def find_emoji() -> PictureFiles:
    """Find the bundled emoji, one class per subgroup, with two captions: the name, and the name with tags."""
    with as_file(files("skipdit") / "assets" / "emoji" / "fluent_emoji_64.parquet") as path:
        texts = read_table([path], path.name, plain=["label", "tags"])
        captions = list(map(emoji_captions, texts.values("label"), texts.values("tags")))
        return find_in_table([path], path.name, "image", "subgroup", captions=captions)


def emoji_captions(name: str, tags: Sequence[str]) -> tuple[str, str]:
    """Return the name in lower case, and the name followed by the first tags that are not words of the name."""
    name = name.lower()
    new_tags = [tag.lower() for tag in tags if tag.lower() not in re.split(r"[\s“”:,()]+", name)]
    return name, ", ".join([name, *new_tags[:MAX_CAPTION_TAGS]])


def find_in_folder(folder: Path) -> PictureFiles:
    """Find one subfolder per class, in alphabetical order; pictures directly in `folder` form one class of that name.
    A picture's caption is the first line of the text file beside it, the caption in a metadata file, or the class name.

    A check reads every header, so that `ValueError` names a file that is not a picture before training starts.
    """
    scan = scan_classes(folder, PICTURE_SUFFIXES, "pictures")

    def check() -> None:
        for path in scan.items:
            check_picture(path, printable_path(path))

    def name(index: int) -> str:
        return printable_path(scan.items[index])

    def read(index: int) -> Image.Image:
        return open_picture(scan.items[index], name(index))

    return PictureFiles(read, name, scan.labels, scan.label_names, scan.captions, scan.items, check)


def find_in_table(
    paths: Sequence[Path],
    source: str,
    image_column: str,
    label_column: str,
    caption_column: str | None = None,
    captions: Sequence[Sequence[str]] | None = None,
) -> PictureFiles:
    """Find encoded pictures, plain bytes or `{bytes, path}`. Labels of any type become classes in sorted order, unless
    the schema names them. Captions are the given ones, those of a column, or the class names.
    """
    table = read_table(paths, source, [image_column], [label_column, *([caption_column] if caption_column else [])])
    labels, label_names = table.classes(label_column)
    if caption_column is not None:
        captions = table.captions(caption_column)

    def name(index: int) -> str:
        return f"{index} of {source}"

    def read(index: int) -> Image.Image:
        return open_picture(table.encoded(image_column, index), name(index))

    return PictureFiles(read, name, labels, label_names, captions, paths)


def from_datasets(config: DataConfig) -> LabelledPictures:
    """Open a data set of the `datasets` library, local or from the hub."""
    return labelled(find_in_datasets(config), config.image_size)


def find_in_datasets(config: DataConfig) -> PictureFiles:
    """Find the pictures in a data set of the `datasets` library, local or from the hub."""
    import datasets

    source = printable_path(config.source)
    try:
        rows: Any = datasets.load_dataset(config.source, split=config.split)
    except Exception as error:  # any error of `datasets` or its file readers
        raise ValueError(
            f"{source!r} is neither emoji, a folder, a .parquet file nor a `datasets` set that loads here: "
            + reason_of(error)
        ) from error
    image, label, caption = config.image_column, config.label_column, config.caption_column
    for column in (image, label, *([caption] if caption is not None else [])):
        if column not in rows.column_names:
            raise ValueError(f"{source} has no column {column!r}, only {printable(', '.join(rows.column_names))}")
    rows = undecoded(rows, image, rows.features[image])
    kind = rows.features[image]
    if kind not in (datasets.Image(decode=False), datasets.Value("binary"), datasets.Value("large_binary")):
        raise ValueError(f"{image} of {source} must contain pictures, got {printable(kind, 60)}")
    labels, label_names = to_classes(list(rows[label]), label, source, label_names_of(rows.features[label]))
    captions = as_captions(rows[caption], source, caption) if caption is not None else None
    rows = rows.select_columns([image])

    def name(index: int) -> str:
        return f"{index} of {source}"

    def read(index: int) -> Image.Image:
        content, file = read_cell(rows[index][image])
        if not content and not file:
            raise ValueError(f"cannot read the picture {name(index)}: the row has none")
        return open_picture(content or Path(str(file)), name(index))

    return PictureFiles(read, name, labels, label_names, captions)


class ShuffledForever(Sampler[int]):
    """An endless stream of indices. The order of an epoch depends only on (seed, epoch), so that a run resumed at
    `start` sees what an uninterrupted one would see. Process `rank` takes every `world_size`-th index."""

    def __init__(self, length: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.seed, self.start, self.rank, self.world_size = length, seed, start, rank, world_size

    def __iter__(self) -> Iterator[int]:
        for indices in self.by_epoch():
            yield from indices.tolist()

    def by_epoch(self) -> Iterator[Int[np.ndarray, " part"]]:
        """Yield the same indices as one array per epoch."""
        position = self.start + self.rank
        while True:
            epoch, offset = divmod(position, self.length)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            indices = order[offset :: self.world_size]
            yield indices
            position += len(indices) * self.world_size
