"""What is encoded: pictures or clips in a fixed order, each read and cut in a thread of its own."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skipdit.clips import ClipConfig, find_clips
from skipdit.data import DataConfig, open_pictures
from skipdit.encoding.config import EncodeConfig
from skipdit.encoding.tars import MAX_VIDEO_BYTES, Member, find_tars, scan_tars
from skipdit.folders import as_captions
from skipdit.picture_files import adm_crop, open_picture, reason_of, to_rgb
from skipdit.untrusted import printable, printable_path, read_bytes
from skipdit.videos import UnreadableVideo, count_frames, frames_of

COUNTS = 2**12  # videos whose number of frames is kept, as several clips of each are read one after the other


@dataclass(frozen=True)
class Sample:
    """pixels: uint8, (3 h w) of a picture or (f 3 h w) of a clip. captions: `None` where it is the class name."""

    pixels: Tensor
    class_name: str
    captions: list[str] | None = None


Job = Callable[[], Sample]  # `ValueError` where it cannot be read


@dataclass(frozen=True)
class Source:
    """Samples in a fixed order. jobs: those from a position on, each with the position after it.

    num_jobs: `None` of a stream. class_names: in their order; `None` sorts those that come. digest: of what is read, so
    that an encoding goes on with the same.
    """

    jobs: Callable[[int], Iterator[tuple[int, Job]]]
    num_jobs: int | None
    class_names: Sequence[str] | None
    digest: str


def open_source(config: EncodeConfig) -> Source:
    """Return what a config names. `FileNotFoundError` / `ValueError` with one line where it cannot be had."""
    path = Path(config.source)
    if config.streaming:
        return stream_source(config)
    if tars := find_tars(path):
        return tar_source(tars, config)
    return picture_source(config) if config.num_frames is None else clip_source(config)


def numbered(num_jobs: int, job_of: Callable[[int], Job]) -> Callable[[int], Iterator[tuple[int, Job]]]:
    """Return the `jobs` of a source whose samples have numbers."""

    def jobs(start: int) -> Iterator[tuple[int, Job]]:
        return ((number + 1, job_of(number)) for number in range(start, num_jobs))

    return jobs


def picture_source(config: EncodeConfig) -> Source:
    """Pictures as `skipdit train` reads them."""
    items = open_pictures(
        DataConfig(
            source=config.source,
            image_size=config.image_size,
            image_column=config.image_column,
            label_column=_label_column(config),
            caption_column=config.caption_column,
            split=config.split,
        )
    )

    def job_of(index: int) -> Job:
        name = items.label_names[items.labels[index]]
        return lambda: Sample(cut(items.read(index), items.names(index), config), name, list(items.captions[index]))

    return Source(numbered(len(items), job_of), len(items), items.label_names, _digest_of(items))


def clip_source(config: EncodeConfig) -> Source:
    """Clips as `skipdit train` reads them; with `num_crops` so many of each video."""
    assert config.num_frames is not None
    found = find_clips(
        ClipConfig(
            source=config.source,
            image_size=config.image_size,
            num_frames=config.num_frames,
            frame_interval=config.frame_interval,
            fps=config.fps,
            clip_column=config.clip_column,
            label_column=_label_column(config),
            caption_column=config.caption_column,
        )
    )
    num_crops = max(1, config.num_crops)
    count = lru_cache(COUNTS)(found.count)

    def job_of(number: int) -> Job:
        index = number // num_crops

        def job() -> Sample:
            start = draw_start(lambda: count(index), found.names(index), number, config)
            frames = found.read(index, start)
            name = found.label_names[found.labels[index]]
            return Sample(cut_frames(frames, found.names(index), config), name, list(found.captions[index]))

        return job

    num_jobs = len(found.labels) * num_crops
    return Source(numbered(num_jobs, job_of), num_jobs, found.label_names, _digest_of(found))


def tar_source(paths: Sequence[Path], config: EncodeConfig) -> Source:
    """Samples of webdataset: files of one name, a picture or video, a class in .cls, a caption in .txt or both in
    .json."""
    members = scan_tars(paths, clips=config.num_frames is not None)
    num_crops = max(1, config.num_crops)

    @lru_cache(COUNTS)
    def count(index: int) -> int:
        return count_frames(io.BytesIO(members[index].content()), members[index].name, config.fps)

    def job_of(number: int) -> Job:
        index = number // num_crops
        return lambda: _read_member(members[index], lambda: count(index), number, config)

    digest = hashlib.sha256(json.dumps([member.identity for member in members]).encode()).hexdigest()
    num_jobs = len(members) * num_crops
    return Source(numbered(num_jobs, job_of), num_jobs, None, digest)


def _read_member(member: Member, count: Callable[[], int], number: int, config: EncodeConfig) -> Sample:
    class_name, captions = member.texts()
    if config.num_frames is None:
        pixels = cut(open_picture(member.content(), member.name), member.name, config)
    else:
        pixels = cut_video(member.content(), member.name, count, number, config)
    return Sample(pixels, class_name, captions)


def stream_source(config: EncodeConfig) -> Source:
    """A set of `datasets`, or its files, as a stream."""
    import datasets

    column = config.image_column if config.num_frames is None else config.clip_column
    wanted = [each for each in (column, config.label_column, config.caption_column) if each is not None]
    source, path = printable_path(config.source), Path(config.source)
    try:
        if path.suffix.lower() == ".parquet":
            rows: Any = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            rows = datasets.load_dataset(config.source, split=config.split, streaming=True)
        features = rows.features or rows._resolve_features().features
    except Exception as error:  # of `datasets`, and of what reads its files
        raise ValueError(f"{source} is no `datasets` set that streams here: {reason_of(error)}") from error
    for each in wanted:
        if each not in features:
            raise ValueError(f"{source} has no column {each!r}, only {printable(', '.join(features))}")
    if isinstance(features[column], (datasets.Image, datasets.Video)):
        rows = rows.cast_column(column, type(features[column])(decode=False))
    feature = None if config.label_column is None else features[config.label_column]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    rows = rows.select_columns(wanted)
    num_crops = max(1, config.num_crops)

    def job_of(row: dict[str, Any], number: int) -> Job:
        return lambda: _read_row(row, column, names, f"{number // num_crops} of {source}", number, config)

    def jobs(start: int) -> Iterator[tuple[int, Job]]:
        following = iter(rows.skip(start // num_crops))
        numbers = range(start // num_crops * num_crops, 2**62, num_crops)
        for first in numbers:
            try:
                row = next(following, None)
            except Exception as error:
                raise ValueError(f"cannot read row {first // num_crops} of {source}: {reason_of(error)}") from error
            if row is None:
                return
            for number in range(max(first, start), first + num_crops):
                yield number + 1, job_of(row, number)

    return Source(jobs, None, names, "")


def _read_row(
    row: dict[str, Any], column: str, names: list[str] | None, what: str, number: int, config: EncodeConfig
) -> Sample:
    found = row[column]
    content = found["bytes"] if isinstance(found, dict) else found
    place = found.get("path") if isinstance(found, dict) else None
    if not content and not (place and Path(place).is_file()):
        raise ValueError(f"cannot read {what}: the row has no bytes in {column}")
    if not isinstance(content or b"", bytes):
        raise ValueError(f"cannot read {what}: {column} must hold bytes, got {printable(content, 60)}")
    class_name = "all" if config.label_column is None else _class_of(row[config.label_column], names, what)
    caption = config.caption_column
    captions = None if caption is None else as_captions([row[caption]], what, caption)[0]
    content = content or read_bytes(Path(str(place)), MAX_VIDEO_BYTES)
    if config.num_frames is None:
        return Sample(cut(open_picture(content, what), what, config), class_name, captions)
    pixels = cut_video(content, what, lambda: count_frames(io.BytesIO(content), what, config.fps), number, config)
    return Sample(pixels, class_name, captions)


def _class_of(label: Any, names: list[str] | None, what: str) -> str:
    if names is not None and isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    if names is not None or not isinstance(label, (int, str)):
        wanted = f"0 to {len(names) - 1}" if names else "a number or a text"
        raise ValueError(f"cannot read {what}: its class must be {wanted}, got {printable(label, 60)}")
    return str(label)


# ----------------------------------------------------------------------------------------------------------------------


def cut(picture: Image.Image, name: str, config: EncodeConfig) -> Tensor:
    """Return a picture as (3 h w); `ValueError` that names one which cannot be cut."""
    try:
        cut_out = (adm_crop if config.crop == "adm" else to_rgb)(picture, config.image_size)
    except ValueError as error:
        raise ValueError(f"cannot read the picture {name}: {reason_of(error)}") from error
    return torch.from_numpy(np.array(cut_out)).permute(2, 0, 1).contiguous()


def cut_frames(frames: Iterator[np.ndarray], name: str, config: EncodeConfig) -> Tensor:
    """Return a clip as (f 3 h w)."""
    return torch.stack([cut(Image.fromarray(frame), name, config) for frame in frames])


def cut_video(content: bytes, name: str, count: Callable[[], int], number: int, config: EncodeConfig) -> Tensor:
    """Return the clip that has this number among all, from an encoded video of so many frames."""
    assert config.num_frames is not None
    start = draw_start(count, name, number, config)
    frames = frames_of(io.BytesIO(content), name, config.num_frames, config.frame_interval, start, config.fps)
    return cut_frames(frames, name, config)


def draw_start(count: Callable[[], int], name: str, number: int, config: EncodeConfig) -> int:
    """Return the frame with which a clip begins: 0, or drawn from (seed, number) where crops are asked for."""
    if not config.num_crops:
        return 0
    assert config.num_frames is not None
    span = (config.num_frames - 1) * config.frame_interval + 1
    if (num_frames := count()) < span:
        raise UnreadableVideo(f"the video {name} is too short: it has {num_frames} frames, a clip spans {span}")
    return int(np.random.default_rng((config.seed, number)).integers(num_frames - span + 1))


def _label_column(config: EncodeConfig) -> str:
    if config.label_column is None:
        raise ValueError("label_column must be the name of a column, got None: that is for streaming alone")
    return config.label_column


def _digest_of(items: Any) -> str:
    content = [list(items.label_names), list(items.labels), [list(each) for each in items.captions]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
