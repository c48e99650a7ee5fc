"""The sources of an encoding: pictures or clips in a fixed order, read and cropped in threads."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skipdit.command_options import config_of
from skipdit.data.clips import ClipConfig, ClipFiles, find_clips
from skipdit.data.folders import as_captions
from skipdit.data.picture_files import adm_crop, open_picture, reason_of, to_rgb
from skipdit.data.pictures import DataConfig, PictureFiles, find_pictures, pad_captions
from skipdit.data.tables import label_names_of, read_cell, undecoded
from skipdit.data.videos import FrameChoice, UnreadableVideo, count_frames, frames_of
from skipdit.encoding.checks import check_captions, digest_of, files_in
from skipdit.encoding.config import EncodeConfig
from skipdit.encoding.tars import MAX_VIDEO_BYTES, class_text, find_tars, scan_tars
from skipdit.files.untrusted import as_type_or_none, printable, printable_path, read_bytes
from skipdit.interfaces import Fields

COUNTS = 2**12  # videos whose number of frames is cached: several clips of a video are read one after the other


@dataclass(frozen=True)
class Sample:
    """A picture or clip to encode."""

    name: str
    """what errors call it"""
    pixels: Tensor
    """uint8, (3 h w) of a picture or (f 3 h w) of a clip"""
    class_name: str
    captions: list[str] | None = None
    """None if the caption is the class name"""


Job = Callable[[], Sample]  # raises `ValueError` if the sample cannot be read


@dataclass(frozen=True)
class Source:
    """Samples in a fixed order."""

    jobs: Callable[[int], Iterator[tuple[int, Job]]]
    """yields the samples from a position on, each with the position after it"""
    num_jobs: int | None
    """number of samples; None for a stream"""
    class_names: Sequence[str] | None
    """classes in order; None sorts the classes of the samples"""
    digest: str
    """SHA-256 that identifies the samples, wherever they are, when an encoding is resumed"""


def open_source(config: EncodeConfig) -> Source:
    """Open the source of a config. `FileNotFoundError` / `ValueError` with a one-line message if that fails."""
    path = Path(config.source)
    if config.streaming:
        return stream_source(config)
    if tars := find_tars(path):
        return tar_source(tars, config)
    return picture_source(config) if config.num_frames is None else clip_source(config)


def jobs_of(
    num_items: int, read: Callable[[int, int], Sample], config: EncodeConfig
) -> Callable[[int], Iterator[tuple[int, Job]]]:
    """Return the `jobs` of a source whose items are numbered. read: takes the index of an item, and the number of the
    sample that is cut from it."""
    crops = max(1, config.num_crops)
    return lambda start: ((n + 1, partial(read, n // crops, n)) for n in range(start, num_items * crops))


def picture_source(config: EncodeConfig) -> Source:
    """Open pictures as `skipdit train` reads them, except that broken ones may be left out."""
    found = find_pictures(config_of(replace(config, label_column=_label_column(config)), DataConfig))
    if config.on_broken == "refuse":
        found.check()
    captions = found.captions
    captions = pad_captions([[found.label_names[label]] for label in found.labels] if captions is None else captions)
    _check_captions(found, captions, config)

    def read(index: int, _: int) -> Sample:
        name = found.label_names[found.labels[index]]
        pixels = cut(found.read(index), found.names(index), config)
        return Sample(found.names(index), pixels, name, list(captions[index]))

    num_items = len(found.labels)
    return Source(jobs_of(num_items, read, config), num_items, found.label_names, _digest_of(found, captions, config))


def clip_source(config: EncodeConfig) -> Source:
    """Open clips as `skipdit train` reads them, or `num_crops` clips per video."""
    assert config.num_frames is not None
    clips = find_clips(
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
    _check_captions(clips, clips.captions, config)
    count = lru_cache(COUNTS)(clips.count)

    def read(index: int, number: int) -> Sample:
        start = draw_start(lambda: count(index), clips.names(index), number, config)
        frames = clips.read(index, start)
        name = clips.label_names[clips.labels[index]]
        pixels = cut_frames(frames, clips.names(index), config)
        return Sample(clips.names(index), pixels, name, list(clips.captions[index]))

    num_items = len(clips.labels)
    num_jobs = num_items * max(1, config.num_crops)
    return Source(
        jobs_of(num_items, read, config), num_jobs, clips.label_names, _digest_of(clips, clips.captions, config)
    )


def tar_source(paths: Sequence[Path], config: EncodeConfig) -> Source:
    """Open webdataset tars: a sample is a picture or video with its texts in .cls, .txt or .json."""
    members = scan_tars(paths, clips=config.num_frames is not None)

    @lru_cache(COUNTS)
    def count(index: int) -> int:
        return count_frames(io.BytesIO(members[index].content()), members[index].name, config.fps)

    def read(index: int, number: int) -> Sample:
        member = members[index]
        class_name, captions = member.texts()
        pixels = cut_content(member.content(), member.name, lambda: count(index), number, config)
        return Sample(member.name, pixels, class_name, captions)

    digest = digest_of(config.source, paths, [member.identity for member in members])
    return Source(jobs_of(len(members), read, config), len(members) * max(1, config.num_crops), None, digest)


def stream_source(config: EncodeConfig) -> Source:
    """Open a `datasets` set, or parquet files, as a stream."""
    import datasets

    column = config.image_column if config.num_frames is None else config.clip_column
    columns = [name for name in (column, config.label_column, config.caption_column) if name is not None]
    source, path = printable_path(config.source), Path(config.source)
    try:
        if path.suffix.lower() == ".parquet":
            rows: Any = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            rows = datasets.load_dataset(config.source, split=config.split, streaming=True)
        features = rows.features or rows._resolve_features().features
    except Exception as error:  # any error of `datasets` or its file readers
        raise ValueError(f"{source} is not a `datasets` set that can be streamed here: {reason_of(error)}") from error
    for name in columns:
        if name not in features:
            raise ValueError(f"{source} has no column {name!r}, only {printable(', '.join(features))}")
    rows = undecoded(rows, column, features[column])
    names = None if config.label_column is None else label_names_of(features[config.label_column])
    rows = rows.select_columns(columns)
    num_crops = max(1, config.num_crops)

    def job_of(row: Fields, number: int) -> Job:
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

    return Source(jobs, None, names, digest_of(config.source, files_in(path), names))


def _read_row(
    row: Fields, column: str, names: list[str] | None, row_name: str, number: int, config: EncodeConfig
) -> Sample:
    content, file = read_cell(row[column])
    if not content and not (file and Path(file).is_file()):
        raise ValueError(f"cannot read {row_name}: the row has no bytes in {column}")
    class_name = "all" if config.label_column is None else _class_of(row[config.label_column], names, row_name)
    caption = config.caption_column
    captions = None if caption is None else as_captions([row[caption]], row_name, caption)[0]
    content = content or read_bytes(Path(str(file)), MAX_VIDEO_BYTES)
    count = partial(count_frames, io.BytesIO(content), row_name, config.fps)
    return Sample(row_name, cut_content(content, row_name, count, number, config), class_name, captions)


def _class_of(label: object, names: list[str] | None, row_name: str) -> str:
    if names is None:
        # a column of booleans has classes too, as in a table
        is_boolean = as_type_or_none(label, bool) is not None
        return str(label) if is_boolean else class_text(label, f"the class of {row_name}")
    number = as_type_or_none(label, int)
    if number is None or not 0 <= number < len(names):
        raise ValueError(f"the class of {row_name} must be 0 to {len(names) - 1}, got {printable(label, 60)}")
    return names[number]


def cut(picture: Image.Image, name: str, config: EncodeConfig) -> Tensor:
    """Return a picture cropped to (3 h w). `ValueError` names it if that fails."""
    try:
        cropped = (adm_crop if config.crop == "adm" else to_rgb)(picture, config.image_size)
    except ValueError as error:
        raise ValueError(f"cannot read the picture {name}: {reason_of(error)}") from error
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous()


def cut_frames(frames: Iterator[np.ndarray], name: str, config: EncodeConfig) -> Tensor:
    """Return the frames of a clip cropped to (f 3 h w)."""
    return torch.stack([cut(Image.fromarray(frame), name, config) for frame in frames])


def cut_content(content: bytes, name: str, count: Callable[[], int], number: int, config: EncodeConfig) -> Tensor:
    """Return the pixels of an encoded picture, or of clip `number` of the source from an encoded video. count: returns
    the number of frames in the video."""
    if config.num_frames is None:
        return cut(open_picture(content, name), name, config)
    start = draw_start(count, name, number, config)
    choice = FrameChoice(num_frames=config.num_frames, interval=config.frame_interval, fps=config.fps)
    return cut_frames(frames_of(io.BytesIO(content), name, choice, start), name, config)


def draw_start(count: Callable[[], int], name: str, number: int, config: EncodeConfig) -> int:
    """Return the index of the first frame of a clip: 0, or drawn from (seed, number) if `num_crops` is set."""
    if not config.num_crops:
        return 0
    assert config.num_frames is not None
    span = (config.num_frames - 1) * config.frame_interval + 1
    if (num_frames := count()) < span:
        raise UnreadableVideo(f"the video {name} is too short: it has {num_frames} frames, a clip spans {span}")
    return int(np.random.default_rng((config.seed, number)).integers(num_frames - span + 1))


def _label_column(config: EncodeConfig) -> str:
    if config.label_column is None:
        raise ValueError("label_column must be the name of a column, got None: only --streaming allows None")
    return config.label_column


def _digest_of(items: PictureFiles | ClipFiles, captions: Sequence[Sequence[str]], config: EncodeConfig) -> str:
    is_bundled = config.source in ("emoji", "emoji-clips")
    contents = [config.source if is_bundled else "", list(items.label_names), list(items.labels), *map(list, captions)]
    return digest_of(config.source, () if is_bundled else items.files, contents)


def _check_captions(items: PictureFiles | ClipFiles, captions: Sequence[Sequence[str]], config: EncodeConfig) -> None:
    """Raise `ValueError` before anything is encoded if a caption is too long, unless such items are left out."""
    if config.text and config.on_broken == "refuse":
        check_captions(captions, items.names)
