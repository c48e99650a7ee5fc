"""Sets of pictures or clips to evaluate, read one by one: an .npz file, a folder, a .parquet file, or bundled data."""

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TypedDict

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from skipdit.data.arrays import map_npz
from skipdit.data.folders import FRAME_SUFFIXES, frames_in, is_frames, walk
from skipdit.data.picture_files import PICTURE_SUFFIXES, on_white, open_picture, reason_of, to_rgb
from skipdit.data.tables import find_tables, read_table
from skipdit.data.video_files import VIDEO_SUFFIXES
from skipdit.data.videos import FrameChoice, frames_of, frames_of_file, frames_of_folder
from skipdit.evaluation.config import EvalConfig, SetKind
from skipdit.files.untrusted import open_regular, parse_json, printable_path, read_bytes, read_json

BUNDLED = {"emoji": "fluent_emoji_64.parquet", "emoji-clips": "fluent_emoji_clips_16x64.parquet"}
COLUMNS = {"image": "pictures", "clip": "clips"}  # default columns of a .parquet file, and their content
MAX_METADATA_BYTES = 2**26
HEAD_BYTES = 4096  # of a PNG file, within which an animated one is marked
Item = UInt8[np.ndarray, "*frames height width 3"]


class SamplesFields(TypedDict):
    """The fields read from `samples.json`, which `skipdit sample --npz` writes."""

    prompts: list[str]


class MetadataLine(TypedDict, total=False):
    """The fields read from a line of `metadata.jsonl`."""

    file_name: str
    text: str | None


@dataclass(frozen=True)
class Items:
    """A set of pictures or clips."""

    source: str
    """path or name of the set"""
    num: int
    """number of items"""
    is_clips: bool
    read: Callable[[int], Item]
    """returns a picture (h w 3) or a clip (f h w 3) as bytes; raises `ValueError` with the name of a broken item"""
    name: Callable[[int], str]
    """returns the name of an item, for errors and pairs"""
    has_names: bool = False
    """true if items are files, so that two sets may be paired by their names"""
    texts: Callable[[], list[str]] | None = None
    """returns one text per item; `None` if there are no texts"""

    def batch(self, indices: Sequence[int]) -> UInt8[np.ndarray, "items *frames height width 3"]:
        """Return some items as one array. Raises `ValueError` if their sizes differ."""
        items = [self.read(index) for index in indices]
        for index, item in zip(indices, items, strict=True):
            if item.shape != items[0].shape:
                raise ValueError(
                    f"{self.name(indices[0])} is {_sizes(items[0])} and {self.name(index)} {_sizes(item)}: "
                    "give --image-size"
                )
        return np.stack(items)


def digest_items(batch: UInt8[np.ndarray, "items *frames height width 3"]) -> list[bytes]:
    """Return the SHA-256 of each item with its shape."""
    return [hashlib.sha256(repr(item.shape).encode() + np.ascontiguousarray(item).tobytes()).digest() for item in batch]


def join_digests(digests: Sequence[bytes]) -> str:
    """Return the SHA-256 of a set, that of the sorted digests of its items."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def open_items(source: str, config: EvalConfig) -> Items:
    """Open a set. Raises `OSError` or `ValueError` with one line that names the set if it cannot be read."""
    path = Path(source)
    if source in BUNDLED:
        with as_file(files("skipdit") / "assets" / "emoji" / BUNDLED[source]) as bundled:
            return _of_table([bundled], source, config)
    if path.suffix.lower() == ".npz":
        return _of_npz(path, config)
    tables = find_tables(path, "train") if path.is_dir() else [path] if path.suffix.lower() == ".parquet" else []
    if tables:
        return _of_table(tables, printable_path(path), config)
    if path.is_dir():
        return _of_folder(path, config)
    if not path.exists():
        raise FileNotFoundError(f"{printable_path(path)} does not exist: give an .npz, a folder, a .parquet, or emoji")
    raise ValueError(f"{printable_path(path)} is not a set: give an .npz, a folder, a .parquet, or emoji")


def _of_npz(path: Path, config: EvalConfig) -> Items:
    stored = map_npz(path)
    name = printable_path(path)

    def item_name(index: int) -> str:
        return f"{index} of {name}"

    def read(index: int) -> Item:
        item = np.array(stored[index])
        return _resized(item, config.image_size, item_name(index)) if config.image_size else item

    def texts() -> list[str]:
        return _texts_of_npz(path, len(stored))

    return Items(name, len(stored), stored.ndim == 5, read, item_name, texts=texts)


def _texts_of_npz(path: Path, num: int) -> list[str]:
    """Return the prompt of each sample of a set by `skipdit sample --npz`, whose `arr_1` holds the indices of
    prompts."""
    prompts = read_json(path.with_suffix(".json"), SamplesFields)["prompts"]
    with zipfile.ZipFile(path) as archive:
        if "arr_1.npy" not in archive.namelist():
            raise ValueError(f"{printable_path(path)} has no arr_1, which says which prompt each sample is of")
        with archive.open("arr_1.npy") as file:
            indices = np.lib.format.read_array(file, allow_pickle=False)
    if len(indices) != num or indices.dtype.kind != "i" or indices.min() < 0 or indices.max() >= len(prompts):
        raise ValueError(f"arr_1 of {printable_path(path)} does not say which of its prompts each sample is of")
    return [prompts[index] for index in indices]


def _of_table(paths: Sequence[Path], name: str, config: EvalConfig) -> Items:
    from pyarrow.parquet import read_schema

    column = config.column
    if column is None:
        names = read_schema(paths[0]).names if paths[0].suffix == ".parquet" else list(COLUMNS)
        column = next((name for name in COLUMNS if name in names), "image")
    table = read_table(paths, name, [column])
    is_clips = config.kind == "clips" or (config.kind == "auto" and COLUMNS.get(column) == "clips")

    def item_name(index: int) -> str:
        return f"{index} of {name}"

    def read(index: int) -> Item:
        content = table.encoded(column, index)
        if not is_clips:
            return _picture(open_picture(content, item_name(index)), config.image_size, item_name(index))
        return _clip(frames_of(io.BytesIO(content), item_name(index), _choice(config)), config, item_name(index))

    return Items(name, len(table), is_clips, read, item_name)


def _of_folder(folder: Path, config: EvalConfig) -> Items:
    kind, paths = _find(folder, config.kind)
    if not paths:
        raise ValueError(f"there are no pictures or clips in {printable_path(folder)}")

    def item_name(index: int) -> str:
        return printable_path(paths[index].relative_to(folder).with_suffix(""))

    def read(index: int) -> Item:
        path, name = paths[index], printable_path(paths[index])
        if kind == "pictures":
            return _picture(open_picture(path, name), config.image_size, name)
        choice = _choice(config)
        frames = frames_of_folder(frames_in(path), name, choice) if path.is_dir() else frames_of_file(path, choice)
        return _clip(frames, config, name)

    def texts() -> list[str]:
        return _texts_of_folder(folder, paths)

    return Items(printable_path(folder), len(paths), kind == "clips", read, item_name, has_names=True, texts=texts)


def _find(folder: Path, kind: SetKind) -> tuple[str, list[Path]]:
    """Return the kind of items in a folder, and their paths. A folder of pictures counts as a clip only if `kind` is
    clips, as it could also be a class of pictures."""
    pictures: list[Path] = []
    clips: list[Path] = []
    for current, subfolders, names in walk(folder):
        if current != folder and kind == "clips" and is_frames(subfolders, names):
            clips.append(current)
            continue
        pictures += [path for path in names if path.suffix.lower() in PICTURE_SUFFIXES]
        clips += [path for path in names if path.suffix.lower() in VIDEO_SUFFIXES - FRAME_SUFFIXES]
        if kind == "clips":
            clips += [path for path in names if path.suffix.lower() in VIDEO_SUFFIXES & FRAME_SUFFIXES]
    animated = [path for path in pictures if path.suffix.lower() == ".png"]
    if kind != "pictures" and animated and len(animated) == len(pictures) and _is_animated(min(animated)):
        return "clips", sorted(animated)
    if kind == "auto":
        videos = [path for path in clips if path.suffix.lower() not in PICTURE_SUFFIXES]
        kind = "clips" if videos and not set(pictures) - set(clips) else "pictures"
        clips = videos
    return kind, sorted(clips if kind == "clips" else pictures)


def _is_animated(path: Path) -> bool:
    """Return true if a PNG file is animated, as the clips of `skipdit sample --png` are (PNG, third edition,
    11.3.6.1)."""
    with open_regular(path) as file:
        return b"acTL" in file.read(HEAD_BYTES)


def _texts_of_folder(folder: Path, paths: Sequence[Path]) -> list[str]:
    """Return the text of each file, from `metadata.jsonl`."""
    path = folder / "metadata.jsonl"
    content = read_bytes(path, MAX_METADATA_BYTES).splitlines()
    lines = [parse_json(line, MetadataLine, printable_path(path)) for line in content if line.strip()]
    by_name = {line.get("file_name"): line.get("text") for line in lines}
    texts = [by_name.get(file.relative_to(folder).as_posix()) or "" for file in paths]
    if not all(texts):
        raise ValueError(f"{printable_path(path)} has no text for each of the {len(paths)} files beside it")
    return texts


def _choice(config: EvalConfig) -> FrameChoice:
    return FrameChoice(num_frames=config.num_frames, interval=config.frame_interval)


def _picture(picture: Image.Image, size: int | None, name: str) -> Item:
    try:
        return np.array(on_white(picture) if size is None else to_rgb(picture, size))
    except ValueError as error:
        raise ValueError(f"cannot read the picture {name}: {reason_of(error)}") from error


def _clip(frames: Iterable[np.ndarray], config: EvalConfig, name: str) -> Item:
    pictures = list(frames)
    if config.image_size is not None:
        return _resized(np.stack(pictures), config.image_size, name) if pictures else np.empty(0)
    if len({frame.shape for frame in pictures}) > 1:
        raise ValueError(f"the frames of {name} are of several sizes: give --image-size")
    return np.stack(pictures)


def _resized(item: Item, size: int, name: str) -> Item:
    if item.ndim == 4:
        return np.stack([_picture(Image.fromarray(frame), size, name) for frame in item])
    return _picture(Image.fromarray(item), size, name)


def _sizes(item: Item) -> str:
    return " x ".join(map(str, item.shape[:-1]))
