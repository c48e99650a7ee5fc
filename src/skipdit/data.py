"""Pictures with a class label and captions, from the bundled emoji, a folder, a parquet file or any `datasets` name."""

import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler

PICTURE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, TypeError, Image.DecompressionBombError)
MAX_CACHED_BYTES = 2**30
MAX_DECODED_AT_ONCE = 10_000
MAX_CAPTION_TAGS = 3


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """source: `"emoji"` (bundled), a folder with one subfolder a class, a `.parquet` file, or a `datasets` name.
    image_size: side in pixels; other pictures are resized on the shorter side and cropped in the centre.
    image_column, label_column: of a parquet file or a `datasets` set. split: of a `datasets` set.
    caption_column: of a parquet file or a `datasets` set, a text or a list of texts; None takes the class name.
    """

    source: str = "emoji"
    image_size: int = 64
    image_column: str = "image"
    label_column: str = "label"
    caption_column: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")


def to_rgb(picture: Image.Image, size: int) -> Image.Image:
    """RGB on white, shorter side resized to `size`, centre crop."""
    if picture.mode != "RGB":
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if picture.size != (size, size):
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        picture = resized.crop((left, top, left + size, top + size))
    return picture


class LabelledPictures(Dataset[tuple[Tensor, int]]):
    """Pictures (3, size, size) in [-1, 1] with their class. Decoded pictures are kept where they fit into 1 GiB; up to
    10,000 are decoded at once, so that `ValueError` names a broken one before training starts.

    read: the picture of an index, opened. names: what an error calls a picture. captions: one or more a picture, by
    default its class name; the same number of each, as the last is repeated.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        names: Callable[[int], str],
        labels: Sequence[int],
        label_names: Sequence[str],
        size: int,
        captions: Sequence[Sequence[str]] | None = None,
    ) -> None:
        if not labels:
            raise ValueError("there are no pictures in this data set")
        self.read, self.names, self.size = read, names, size
        self.labels, self.label_names = list(labels), list(label_names)
        self.captions = pad_captions([[label_names[label]] for label in labels] if captions is None else captions)
        assert len(self.captions) == len(labels)
        self._decoded: dict[int, Tensor] | None = {} if len(labels) * 3 * size * size <= MAX_CACHED_BYTES else None
        if self._decoded is not None and len(labels) <= MAX_DECODED_AT_ONCE:
            self._decoded = {index: self._decode(index) for index in range(len(labels))}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 size size"], int]:
        if self._decoded is None:
            pixels = self._decode(index)
        else:
            if index not in self._decoded:
                self._decoded[index] = self._decode(index)
            pixels = self._decoded[index]
        return pixels.float() / 127.5 - 1, self.labels[index]

    def _decode(self, index: int) -> Tensor:
        try:
            picture = to_rgb(self.read(index), self.size)
        except UNREADABLE as error:
            raise ValueError(f"cannot read the picture {self.names(index)}: {error}") from error
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def pad_captions(captions: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """As many captions for each picture as the one with most has: the last is repeated."""
    most = max(map(len, captions))
    return [(*given, *[given[-1]] * (most - len(given))) for given in captions]


def open_pictures(config: DataConfig) -> LabelledPictures:
    """The data set that a config names. `FileNotFoundError` / `ValueError` with one line where it cannot be had."""
    path = Path(config.source)
    if config.caption_column is not None and (config.source == "emoji" or path.is_dir()):
        raise ValueError(
            f"{config.source} has its own captions: caption_column must be None, got {config.caption_column!r}"
        )
    if config.source == "emoji":
        return from_emoji(config.image_size)
    if path.is_dir():
        return from_folder(path, config.image_size)
    if path.suffix == ".parquet":
        return from_parquet(path, config.image_size, config.image_column, config.label_column, config.caption_column)
    return from_datasets(config)


def from_emoji(size: int) -> LabelledPictures:
    """The bundled emoji, a class a subgroup, with two captions: the name, and the name with tags."""
    with as_file(files("skipdit") / "assets" / "emoji" / "fluent_emoji_64.parquet") as path:
        names, tags = read_columns(path, ["label", "tags"])
        return from_parquet(path, size, "image", "subgroup", captions=list(map(emoji_captions, names, tags)))


def emoji_captions(name: str, tags: Sequence[str]) -> tuple[str, str]:
    """The name in lower case; the name followed by its first tags, of those that are no word of it."""
    name = name.lower()
    told = [tag.lower() for tag in tags if tag.lower() not in re.split(r"[\s“”:,()]+", name)]
    return name, ", ".join([name, *told[:MAX_CAPTION_TAGS]])


def scan_classes(folder: Path, suffixes: Collection[str], kind: str) -> tuple[list[Path], list[int], list[str]]:
    """The files with these suffixes, the class of each and the class names: one subfolder a class, in alphabetical
    order; files directly in `folder` make one class of that name. `ValueError` where a class is empty or a file has
    none.
    """
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    stray = [child for child in sorted(folder.iterdir()) if child.suffix.lower() in suffixes]
    if classes and stray:
        raise ValueError(f"{stray[0]} belongs to no class: put it into a subfolder")
    classes = classes or [folder]
    paths, labels = [], []
    for label, directory in enumerate(classes):
        found = [path for path in sorted(directory.rglob("*")) if path.suffix.lower() in suffixes]
        if not found:
            raise ValueError(f"no {kind} ({', '.join(sorted(suffixes))}) in {directory}")
        paths += found
        labels += [label] * len(found)
    return paths, labels, [child.name for child in classes]


def read_columns(path: Path, columns: Sequence[str]) -> list[list[Any]]:
    """The values of these columns of a parquet file, `{bytes, path}` structs as their bytes. `FileNotFoundError` /
    `ValueError` where there is no such file or column.
    """
    import pyarrow.parquet as parquet
    from pyarrow import ArrowInvalid

    if not path.is_file():
        raise FileNotFoundError(f"no parquet file at {path}")
    try:
        table = parquet.read_table(path)
    except ArrowInvalid as error:
        raise ValueError(f"cannot read {path} as parquet: {error}") from error
    for column in columns:
        if column not in table.column_names:
            raise ValueError(f"{path} has no column {column!r}, only {', '.join(table.column_names)}")
    return [
        [item["bytes"] if isinstance(item, dict) else item for item in table[column].to_pylist()] for column in columns
    ]


def to_classes(values: Sequence[Any], if_missing: str) -> tuple[list[int], list[str]]:
    """Labels of any type as classes in sorted order, with their names. `ValueError(if_missing)` where one is None."""
    if None in values:
        raise ValueError(if_missing)
    names = sorted(set(values))
    classes = {name: label for label, name in enumerate(names)}
    return [classes[value] for value in values], [str(name) for name in names]


def from_folder(folder: Path, size: int) -> LabelledPictures:
    """One subfolder a class, in alphabetical order; pictures directly in `folder` make one class of that name. The
    caption is the first line of `name.txt` beside the picture `name.*`, or the class name.

    Every header is read at once, so that a file that is no picture is named before training starts.
    """
    paths, labels, label_names = scan_classes(folder, PICTURE_SUFFIXES, "pictures")
    for path in paths:
        try:
            with Image.open(path) as picture:
                picture.verify()
        except UNREADABLE as error:
            raise ValueError(f"cannot read the picture {path}: {error}") from error
    return LabelledPictures(
        lambda index: Image.open(paths[index]),
        lambda index: str(paths[index]),
        labels,
        label_names,
        size,
        [[read_caption(path, label_names[label])] for path, label in zip(paths, labels, strict=True)],
    )


def read_caption(picture: Path, default: str) -> str:
    """The first line of the text file beside a picture, `default` where there is none."""
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return default
    try:
        with path.open(encoding="utf-8-sig") as file:
            caption = file.readline().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the caption {path}: {error}") from error
    if not caption:
        raise ValueError(f"cannot read the caption {path}: its first line is empty")
    return caption


def as_captions(values: Iterable[Any], source: Path | str, column: str) -> list[list[str]]:
    """Texts or lists of texts as lists. `ValueError` where a row has none, or something else."""
    captions = [value if isinstance(value, list) else [value] for value in values]
    for row, given in enumerate(captions):
        if not given or not all(isinstance(caption, str) and caption.strip() for caption in given):
            raise ValueError(f"{column} of {source} must be a text or a list of texts, got {given} in row {row}")
    return captions


def from_parquet(
    path: Path,
    size: int,
    image_column: str,
    label_column: str,
    caption_column: str | None = None,
    captions: Sequence[Sequence[str]] | None = None,
) -> LabelledPictures:
    """Encoded pictures, plain bytes or `{bytes, path}`; labels of any type become classes in sorted order. Captions
    are given, or those of a column, or the class names.
    """
    columns = [image_column, label_column, *([caption_column] if caption_column is not None else [])]
    encoded, values, *texts = read_columns(path, columns)
    labels, label_names = to_classes(values, f"{path} has rows without {label_column}")
    if caption_column is not None:
        captions = as_captions(texts[0], path, caption_column)
    return LabelledPictures(
        lambda index: Image.open(io.BytesIO(encoded[index])),
        lambda index: f"{index} of {path}",
        labels,
        label_names,
        size,
        captions,
    )


def from_datasets(config: DataConfig) -> LabelledPictures:
    """A data set of the `datasets` library, local or from the hub."""
    import datasets

    try:
        rows: Any = datasets.load_dataset(config.source, split=config.split)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise ValueError(
            f"{config.source!r} is neither emoji, a folder, a .parquet file nor a `datasets` set that loads here: "
            + str(error).splitlines()[0]
        ) from error
    caption = config.caption_column
    for column in (config.image_column, config.label_column, *([caption] if caption is not None else [])):
        if column not in rows.column_names:
            raise ValueError(f"{config.source} has no column {column!r}, only {', '.join(rows.column_names)}")
    feature = rows.features[config.label_column]
    values = rows[config.label_column]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else sorted(set(values))
    if None in values or (isinstance(feature, datasets.ClassLabel) and min(values, default=0) < 0):
        raise ValueError(f"{config.source} has rows without {config.label_column}")
    classes = (
        range(len(names))
        if isinstance(feature, datasets.ClassLabel)
        else {name: label for label, name in enumerate(names)}
    )
    return LabelledPictures(
        lambda index: rows[index][config.image_column],
        lambda index: f"{index} of {config.source}",
        [classes[value] for value in values],
        [str(name) for name in names],
        config.image_size,
        as_captions(rows[caption], config.source, caption) if caption is not None else None,
    )


class ShuffledForever(Sampler[int]):
    """An endless stream of indices, each epoch in a new order that depends only on (seed, epoch): so that a resumed
    run at `start` sees what an uninterrupted one would have seen. Process `rank` takes every `world_size`-th."""

    def __init__(self, length: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.seed, self.start, self.rank, self.world_size = length, seed, start, rank, world_size

    def __iter__(self) -> Iterator[int]:
        position, epoch, order = self.start + self.rank, -1, []
        while True:
            if position // self.length != epoch:
                epoch = position // self.length
                order = np.random.default_rng((self.seed, epoch)).permutation(self.length).tolist()
            yield order[position % self.length]
            position += self.world_size
