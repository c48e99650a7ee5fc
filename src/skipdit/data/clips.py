"""Read short clips with classes and captions from the bundled animated emoji, a folder of videos or a parquet file."""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from skipdit.data.config import ClipConfig as ClipConfig
from skipdit.data.folders import frames_in, scan_classes
from skipdit.data.picture_files import to_rgb
from skipdit.data.pictures import (
    MAX_CACHED_BYTES,
    LabelledItems,
    check_no_caption_column,
    emoji_captions,
    pad_captions,
    pictures_beside,
)
from skipdit.data.tables import Table, find_tables, read_table
from skipdit.data.video_files import VIDEO_SUFFIXES
from skipdit.data.videos import Frames, UnreadableVideo, count_frames, frames_of, frames_of_file, frames_of_folder
from skipdit.files.untrusted import open_regular, printable, printable_path

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipFiles:
    """Clips that are not decoded yet."""

    read: Callable[[int, int], Frames]
    """(index, start): yields the frames of clip `index` from frame `start` on, or raises `UnreadableVideo`"""
    count: Callable[[int], int]
    """returns the number of frames in the source of a clip"""
    labels: Sequence[int]
    """class of each clip"""
    label_names: Sequence[str]
    """name of each class"""
    captions: Sequence[Sequence[str]]
    """one or more texts per clip"""
    names: Callable[[int], str]
    """returns what errors call a clip"""
    files: Sequence[Path] = ()
    """files or folders on this machine that the clips are in"""


class LabelledClips(LabelledItems):
    """Clips (num_frames + num_pictures, 3, size, size) in [-1, 1] with their class; with pictures, an int64 tensor
    (1 + num_pictures,) of the classes of the clip and of each picture. The pictures of a clip depend only on its index,
    so that a resumed run sees the same ones.

    Every clip is decoded once at the start, so that `ValueError` names a broken one before training. Clips are cached
    if they fit into 1 GiB; otherwise they are decoded at each use. Classes without a readable clip are removed.
    """

    num_channels = 3
    vae = states = None  # see `LabelledLatents`

    def __init__(self, files: ClipFiles, config: ClipConfig) -> None:
        self._files, self.size = files, config.image_size
        self.num_frames, self.num_pictures = config.num_frames, config.num_pictures
        labels, label_names = files.labels, files.label_names
        num_bytes = len(labels) * config.num_frames * 3 * config.image_size**2
        self._decoded: list[Tensor] | None = [] if num_bytes <= MAX_CACHED_BYTES else None
        self._kept: list[int] = []
        for index in range(len(labels)):
            try:
                clip = self._decode(index)
            except UnreadableVideo as error:
                if config.on_broken == "refuse":
                    raise
                LOGGER.warning("left out: %s", error)
                continue
            self._kept.append(index)
            if self._decoded is not None:
                self._decoded.append(clip)
        if not self._kept:
            raise ValueError(f"there are no readable clips in {printable_path(config.source)}")
        kept_labels = [labels[index] for index in self._kept]
        removed = sorted(set(labels) - set(kept_labels))
        if removed:
            removed_names = printable(", ".join(label_names[label] for label in removed))
            LOGGER.warning("left out: %d classes without a readable clip: %s", len(removed), removed_names)
        classes = [label for label in range(len(label_names)) if label not in set(removed)]
        self.label_names = [label_names[label] for label in classes]
        self.labels = [classes.index(label) for label in kept_labels]
        self.names = [files.names(index) for index in self._kept].__getitem__
        self.captions = pad_captions([files.captions[index] for index in self._kept])

    def stored(self, index: int) -> tuple[UInt8[Tensor, "all_frames 3 size size"], int | Tensor]:
        index = range(len(self))[index]
        others = pictures_beside(index, len(self), self.num_frames, self.num_pictures) if self.num_pictures else []
        frames = [self._clip(index), *(self._clip(other)[frame : frame + 1] for other, frame in others)]
        labels = [self.labels[index], *(self.labels[other] for other, _ in others)]
        return torch.cat(frames), torch.tensor(labels) if self.num_pictures else labels[0]

    def _clip(self, index: int) -> UInt8[Tensor, "num_frames 3 size size"]:
        return self._decode(self._kept[index]) if self._decoded is None else self._decoded[index]

    def _decode(self, index: int) -> UInt8[Tensor, "num_frames 3 size size"]:
        frames = np.stack(
            [np.asarray(to_rgb(Image.fromarray(frame), self.size)) for frame in self._files.read(index, 0)]
        )
        return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))


def open_clips(config: ClipConfig) -> LabelledClips:
    """Open the data set of a config. `FileNotFoundError` / `ValueError` with a one-line message if that fails."""
    return LabelledClips(find_clips(config), config)


def find_clips(config: ClipConfig) -> ClipFiles:
    """Find the clips of a config without decoding them. Errors as for `open_clips`."""
    path = Path(config.source)
    if config.source == "emoji-clips":
        check_no_caption_column(config.source, config.caption_column)
        return clips_of_emoji(config)
    paths = find_tables(path, "train") if path.is_dir() else [path] if path.suffix.lower() == ".parquet" else []
    if paths:
        return clips_from_table(paths, config)
    if path.is_dir():
        check_no_caption_column(config.source, config.caption_column)
        return clips_from_folder(path, config)
    raise ValueError(f"{printable_path(path)!r} is neither emoji-clips, a folder nor a .parquet file")


def clips_of_emoji(config: ClipConfig) -> ClipFiles:
    """Return the bundled animated emoji, one class per subgroup, with captions like those of the still emoji."""
    with as_file(files("skipdit") / "assets" / "emoji" / "fluent_emoji_clips_16x64.parquet") as path:
        table = read_table([path], config.source, ["clip"], ["subgroup", "label", "tags"])
    captions = list(map(emoji_captions, table.values("label"), table.values("tags")))
    return _from_table(table, "clip", *table.classes("subgroup"), captions, config)


def clips_from_folder(folder: Path, config: ClipConfig) -> ClipFiles:
    """Read one subfolder per class, in alphabetical order; clips directly in `folder` form one class of that name. A
    folder of pictures is a clip. A clip's caption is the first line of the text file beside it, the caption in a
    metadata file, or the class name.
    """
    scan = scan_classes(folder, VIDEO_SUFFIXES, "videos", frame_folders=True)
    if config.fps is not None and (num_timeless := sum(path.is_dir() for path in scan.items)):
        LOGGER.warning(
            "fps has no effect on %d clips of %s that are folders of frames without times: only frame_interval counts",
            *(num_timeless, printable_path(folder)),
        )

    def name(index: int) -> str:
        return printable_path(scan.items[index])

    def read(index: int, start: int) -> Frames:
        path = scan.items[index]
        if path.is_dir():
            return frames_of_folder(frames_in(path), name(index), config.frames, start)
        return frames_of_file(path, config.frames, start)

    def count(index: int) -> int:
        path = scan.items[index]
        if path.is_dir():
            return len(frames_in(path))
        with open_regular(path) as stream:
            return count_frames(stream, name(index), config.fps)

    return ClipFiles(read, count, scan.labels, scan.label_names, scan.captions, name, scan.items)


def clips_from_table(paths: Sequence[Path], config: ClipConfig) -> ClipFiles:
    """Read encoded videos, plain bytes or `{bytes, path}`. Labels of any type become classes in sorted order, unless
    the schema names them."""
    caption = config.caption_column
    plain = [config.label_column, *([caption] if caption is not None else [])]
    table = read_table(paths, printable_path(config.source), [config.clip_column], plain)
    labels, label_names = table.classes(config.label_column)
    captions = [[label_names[label]] for label in labels] if caption is None else table.captions(caption)
    return replace(_from_table(table, config.clip_column, labels, label_names, captions, config), files=paths)


def _from_table(
    table: Table,
    column: str,
    labels: Sequence[int],
    label_names: Sequence[str],
    captions: Sequence[Sequence[str]],
    config: ClipConfig,
) -> ClipFiles:
    def name(index: int) -> str:
        return f"{index} of {table.name}"

    def content(index: int) -> io.BytesIO:
        try:
            return io.BytesIO(table.encoded(column, index))
        except ValueError as error:
            raise UnreadableVideo(f"cannot read the video {name(index)}: {error}") from error

    def read(index: int, start: int) -> Frames:
        return frames_of(content(index), name(index), config.frames, start)

    def count(index: int) -> int:
        return count_frames(content(index), name(index), config.fps)

    return ClipFiles(read, count, labels, label_names, captions, name)
