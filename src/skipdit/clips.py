"""Short clips with a class label, from the bundled animated emoji, a folder of videos or a parquet file."""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from skipdit.data import (
    MAX_CACHED_BYTES,
    as_captions,
    emoji_captions,
    pad_captions,
    read_caption,
    read_columns,
    scan_classes,
    to_classes,
    to_rgb,
)
from skipdit.videos import VIDEO_SUFFIXES, UnreadableVideo, decode_video, read_video

LOGGER = logging.getLogger(__name__)
OnBroken = Literal["refuse", "skip"]


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """source: `"emoji-clips"` (bundled), a folder with one subfolder a class, or a `.parquet` file.
    image_size: side in pixels; other frames are resized on the shorter side and cropped in the centre.
    num_frames, frame_interval: the first `num_frames` of every `frame_interval`-th frame make the clip.
    clip_column, label_column: of a parquet file.
    caption_column: of a parquet file, a text or a list of texts; None takes the class name.
    num_pictures: single frames of other clips that come along with each clip, for joint image-video training.
    on_broken: an unreadable or too short clip is an error, or is left out with a warning.
    """

    source: str = "emoji-clips"
    image_size: int = 64
    num_frames: int = 16
    frame_interval: int = 1
    clip_column: str = "clip"
    label_column: str = "label"
    caption_column: str | None = None
    num_pictures: int = 0
    on_broken: OnBroken = "refuse"

    def __post_init__(self) -> None:
        for name in ("image_size", "num_frames", "frame_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_pictures < 0:
            raise ValueError(f"num_pictures must be at least 0, got {self.num_pictures}")
        if self.on_broken not in get_args(OnBroken):
            raise ValueError(f"on_broken must be one of {', '.join(get_args(OnBroken))}, got {self.on_broken!r}")


class LabelledClips(Dataset[tuple[Tensor, int | Tensor]]):
    """Clips (num_frames + num_pictures, 3, size, size) in [-1, 1] with their class; with pictures, an int64 tensor
    (1 + num_pictures,) of the clip's class and that of each picture. Which frames come along with a clip depends only
    on its index, so that a resumed run sees the same.

    Every clip is decoded once at the start, so that `ValueError` names a broken one before training; they are kept
    where they fit into 1 GiB, and decoded again at each use otherwise.

    read: the frames (num_frames, height, width, 3) of an index, or `UnreadableVideo`. captions: one or more a clip; the
    same number of each, as the last is repeated.
    """

    def __init__(
        self,
        read: Callable[[int], UInt8[np.ndarray, "num_frames height width 3"]],
        labels: Sequence[int],
        label_names: Sequence[str],
        captions: Sequence[Sequence[str]],
        config: ClipConfig,
    ) -> None:
        self.read, self.label_names, self.size = read, list(label_names), config.image_size
        self.num_frames, self.num_pictures = config.num_frames, config.num_pictures
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
            raise ValueError(f"there are no readable clips in {config.source}")
        self.labels = [labels[index] for index in self._kept]
        self.captions = pad_captions([captions[index] for index in self._kept])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "all_frames 3 size size"], int | Tensor]:
        index = range(len(self))[index]
        others = self._pictures_of(index) if self.num_pictures else []
        frames = [self._clip(index), *(self._clip(other)[frame : frame + 1] for other, frame in others)]
        labels = [self.labels[index], *(self.labels[other] for other, _ in others)]
        return torch.cat(frames).float() / 127.5 - 1, torch.tensor(labels) if self.num_pictures else labels[0]

    def _pictures_of(self, index: int) -> list[tuple[int, int]]:
        """(clip, frame) of each picture beside clip `index`: other clips, each once where there are enough."""
        generator = np.random.default_rng(index)
        num_others = max(1, len(self) - 1)
        steps = generator.choice(num_others, self.num_pictures, replace=num_others < self.num_pictures)
        frames = generator.integers(self.num_frames, size=self.num_pictures)
        return [((index + 1 + int(step)) % len(self), int(frame)) for step, frame in zip(steps, frames, strict=True)]

    def _clip(self, index: int) -> UInt8[Tensor, "num_frames 3 size size"]:
        return self._decode(self._kept[index]) if self._decoded is None else self._decoded[index]

    def _decode(self, index: int) -> UInt8[Tensor, "num_frames 3 size size"]:
        frames = np.stack([np.asarray(to_rgb(Image.fromarray(frame), self.size)) for frame in self.read(index)])
        return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))


def open_clips(config: ClipConfig) -> LabelledClips:
    """The data set that a config names. `FileNotFoundError` / `ValueError` with one line where it cannot be had."""
    path = Path(config.source)
    if config.caption_column is not None and (config.source == "emoji-clips" or path.is_dir()):
        raise ValueError(
            f"{config.source} has its own captions: caption_column must be None, got {config.caption_column!r}"
        )
    if config.source == "emoji-clips":
        return clips_of_emoji(config)
    if path.is_dir():
        return clips_from_folder(path, config)
    if path.suffix == ".parquet":
        return clips_from_parquet(path, config)
    raise ValueError(f"{config.source!r} is neither emoji-clips, a folder nor a .parquet file")


def clips_of_emoji(config: ClipConfig) -> LabelledClips:
    """The bundled animated emoji, a class a subgroup, captions as of the still emoji."""
    with as_file(files("skipdit") / "assets" / "emoji" / "fluent_emoji_clips_16x64.parquet") as path:
        encoded, groups, names, tags = read_columns(path, ["clip", "subgroup", "label", "tags"])
    return _from_encoded(
        encoded, config.source, *to_classes(groups, ""), list(map(emoji_captions, names, tags)), config
    )


def clips_from_folder(folder: Path, config: ClipConfig) -> LabelledClips:
    """One subfolder a class, in alphabetical order; videos directly in `folder` make one class of that name. The
    caption is the first line of `name.txt` beside the video `name.*`, or the class name.
    """
    paths, labels, label_names = scan_classes(folder, VIDEO_SUFFIXES, "videos")
    return LabelledClips(
        lambda index: read_video(paths[index], config.num_frames, config.frame_interval),
        labels,
        label_names,
        [[read_caption(path, label_names[label])] for path, label in zip(paths, labels, strict=True)],
        config,
    )


def clips_from_parquet(path: Path, config: ClipConfig) -> LabelledClips:
    """Encoded videos, plain bytes or `{bytes, path}`; labels of any type become classes in sorted order."""
    encoded, values = read_columns(path, [config.clip_column, config.label_column])
    labels, label_names = to_classes(values, f"{path} has rows without {config.label_column}")
    captions = [[label_names[label]] for label in labels]
    if config.caption_column is not None:
        captions = as_captions(read_columns(path, [config.caption_column])[0], path, config.caption_column)
    return _from_encoded(encoded, path, labels, label_names, captions, config)


def _from_encoded(
    encoded: Sequence[bytes],
    source: Path | str,
    labels: Sequence[int],
    label_names: Sequence[str],
    captions: Sequence[Sequence[str]],
    config: ClipConfig,
) -> LabelledClips:
    def read(index: int) -> np.ndarray:
        return decode_video(
            io.BytesIO(encoded[index]), f"{index} of {source}", config.num_frames, config.frame_interval
        )

    return LabelledClips(read, labels, label_names, captions, config)
