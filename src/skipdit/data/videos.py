"""Read clips from video, GIF and WebP files, write them as MP4 and GIF, and draw them in grids and side by side."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from fractions import Fraction
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from skipdit.data.config import FrameChoice as FrameChoice
from skipdit.data.picture_files import on_white, open_picture, reason_of
from skipdit.data.video_files import timed_frames
from skipdit.files.output import atomic_file
from skipdit.files.untrusted import open_regular, printable_path
from skipdit.pictures import MARGIN, labelled_grid, load_font
from skipdit.pictures import to_frames as to_frames

ENCODERS = ("libx264", "mpeg4")
MAX_GIF_FPS = 50
BT601 = (6, 1)  # MatrixCoefficients of ITU-T H.273, and AVCOL_RANGE_MPEG for the limited range
LABEL_SIZE = 14
MAX_COUNTED_FRAMES = 2**16  # per video, if clips begin at random frames


class UnreadableVideo(ValueError):
    """A video that is broken or too short; the message names it."""


Frames = Iterator[UInt8[np.ndarray, "height width 3"]]


def frames_of_file(path: Path, choice: FrameChoice, start: int = 0) -> Frames:
    """Yield frames of a file (.mp4 .webm .mkv .mov .avi .gif .webp ...) from frame `start` on. Its first bytes
    determine the format. `UnreadableVideo` (a `ValueError`) if it is broken or too short."""
    try:
        stream = open_regular(path)
    except (OSError, ValueError) as error:
        raise UnreadableVideo(f"cannot read the video {printable_path(path)}: {reason_of(error)}") from error
    with stream:
        yield from frames_of(stream, printable_path(path), choice, start)


def frames_of(stream: BinaryIO, name: str, choice: FrameChoice, start: int = 0) -> Frames:
    """Yield frames of an open file like `frames_of_file`. name: what errors call it."""
    indices, fps = choice.indices(start), choice.fps
    # a quarter of a frame late, because many files round their times to 1 or 10 ms
    times = [Fraction(index) if fps is None else (index + Fraction(1, 4)) / Fraction(fps) for index in indices]
    position = 0
    try:
        with closing(timed_frames(stream, by_index=fps is None)) as frames:
            for frame in frames:
                while position < len(times) and times[position] < frame.end:
                    yield frame.pixels()
                    position += 1
                if position == len(times):
                    return
    except Exception as error:  # decoders raise any type on damaged files
        raise UnreadableVideo(f"cannot read the video {name}: {reason_of(error)}") from error
    raise _too_short(name, indices, position)


def count_frames(stream: BinaryIO, name: str, fps: float | None = None) -> int:
    """Return how many frames `frames_of` could take at most, by decoding all of them. `UnreadableVideo` if one is
    broken, or there are more than `MAX_COUNTED_FRAMES`."""
    number, end = 0, Fraction(0)
    try:
        with closing(timed_frames(stream, by_index=fps is None)) as frames:
            for number, frame in enumerate(frames, start=1):
                end = max(end, frame.end)
                if number > MAX_COUNTED_FRAMES:
                    raise ValueError(f"it has more than {MAX_COUNTED_FRAMES:,} frames: cut it into clips")
    except Exception as error:  # decoders raise any type on damaged files
        raise UnreadableVideo(f"cannot read the video {name}: {reason_of(error)}") from error
    return number if fps is None else max(0, ceil(end * Fraction(fps) - Fraction(1, 4)))


def frames_of_folder(paths: Sequence[Path], name: str, choice: FrameChoice, start: int = 0) -> Frames:
    """Yield pictures of a clip like `frames_of_file`; they have no times. `UnreadableVideo` if one is broken or
    missing."""
    indices = choice.indices(start)
    for position, index in enumerate(indices):
        if index >= len(paths):
            raise _too_short(name, indices, position)
        try:
            picture = on_white(open_picture(paths[index], printable_path(paths[index])))
        except ValueError as error:
            raise UnreadableVideo(str(error)) from error
        yield np.asarray(picture)


def _too_short(name: str, indices: range, position: int) -> UnreadableVideo:
    return UnreadableVideo(
        f"the video {name} is too short: frame {indices[position]} is needed "
        f"({len(indices)} frames, interval {indices.step}, start {indices.start})"
    )


def write_mp4(
    path: Path | str,
    frames: UInt8[Tensor | np.ndarray, "frames height width 3"],
    fps: float,
    scale: int = 1,
    encoders: Sequence[str] = ENCODERS,
) -> None:
    """Write an .mp4 (yuv420p), enlarged `scale` times; the last row or column of an odd side is repeated.

    encoders: names in FFmpeg; the first that PyAV has is used. `ValueError` if frames, fps or scale are invalid, or
    PyAV has none of the encoders.
    """
    path, pixels = _checked(path, ".mp4", frames, fps, scale)
    av: Any = importlib.import_module("av")  # its stubs cannot tell that add_stream returns a video stream
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    encoder = next((name for name in encoders if name in av.codecs_available), None)
    if encoder is None:
        raise ValueError(f"this PyAV has none of the encoders {', '.join(encoders)}")
    # https://trac.ffmpeg.org/wiki/Encode/H.264 and /MPEG-4: quality by -crf and -qscale
    # x264's macroblock tree reads uninitialized memory: with it the same frames may give different files
    x264 = {"crf": "16", "x264-params": "mbtree=0"}
    quality = x264 if encoder == "libx264" else {"flags": "+qscale", "global_quality": str(2 * 118)}
    with atomic_file(path) as draft, av.open(str(draft), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001), options=quality)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = BT601
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_gif(
    path: Path | str, frames: UInt8[Tensor | np.ndarray, "frames height width 3"], fps: float, scale: int = 1
) -> None:
    """Write a .gif that loops forever, enlarged `scale` times, with 256 colors per frame. Its unit of time is 10 ms:
    durations of frames vary by that much, so that the clip keeps `fps`, at most 50. Equal neighbors become one longer
    frame."""
    path, pixels = _checked(path, ".gif", frames, fps, scale)
    if fps > MAX_GIF_FPS:
        raise ValueError(f"fps of a GIF must be at most {MAX_GIF_FPS}, got {fps}")
    ends = [round(100 * index / fps) * 10 for index in range(len(pixels) + 1)]
    pictures = [Image.fromarray(frame) for frame in pixels]
    with atomic_file(path) as draft:
        durations = [end - begin for begin, end in pairwise(ends)]
        pictures[0].save(draft, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def _checked(
    path: Path | str, suffix: str, frames: Tensor | np.ndarray, fps: float, scale: int
) -> tuple[Path, UInt8[np.ndarray, "frames height width 3"]]:
    """Return the path and the enlarged frames; `ValueError` if an argument is invalid."""
    path, pixels = Path(path), torch.as_tensor(frames).cpu().numpy()
    if path.suffix.lower() != suffix:
        raise ValueError(f"the file name must end in {suffix}, got {path}")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.size == 0:
        raise ValueError(f"frames must be uint8 (frames, height, width, 3), got {pixels.dtype} {pixels.shape}")
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps must be above 0 and finite, got {fps}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    return path, pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def frame_grid(
    clips: Float[Tensor, "clips frames 3 height width"],
    captions: Sequence[str],
    num_frames_shown: int = 8,
    *,
    scale: int = 2,
) -> Image.Image:
    """Draw one row per clip (pixels in [0, 1]), evenly spaced frames from left to right, with its caption below."""
    if num_frames_shown < 1:
        raise ValueError(f"num_frames_shown must be at least 1, got {num_frames_shown}")
    indices = np.linspace(0, clips.shape[1] - 1, min(num_frames_shown, clips.shape[1])).round().astype(int)
    strips = np.pad(to_frames(clips[:, indices]).numpy(), ((0, 0),) * 3 + ((0, 1), (0, 0)), constant_values=255)
    rows = [Image.fromarray(np.concatenate(list(strip), axis=1)[:, :-1]) for strip in strips]
    return labelled_grid(rows, captions, num_columns=1, scale=scale)


def side_by_side(
    rows: Mapping[str, Float[Tensor, "clips frames 3 height width"]], captions: Sequence[str], *, scale: int = 2
) -> UInt8[np.ndarray, "frames height_of_all width_of_all 3"]:
    """Draw the frames of a video that plays all runs at once: one labeled row per run, one captioned column per clip
    (pixels in [0, 1]). `ValueError` if the runs differ in shape."""
    shapes = {name: tuple(clips.shape) for name, clips in rows.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"side by side needs at least one run, all of the same shape, got {shapes}")
    num_clips, num_frames, _, height, _ = next(iter(shapes.values()))
    if len(captions) != num_clips:
        raise ValueError(f"side by side needs one caption per clip, got {len(captions)} and {num_clips} clips")
    pixels = np.stack([to_frames(clips).numpy() for clips in rows.values()])
    font = load_font(LABEL_SIZE)
    gutter = MARGIN + round(max(map(font.getlength, rows)))
    frames = []
    for index in range(num_frames):
        cells = [Image.fromarray(clip[index]) for run in pixels for clip in run]
        grid = labelled_grid(cells, list(captions) * len(rows), num_columns=num_clips, scale=scale)
        whole = Image.new("RGB", (gutter + grid.width, grid.height), "white")
        whole.paste(grid, (gutter, 0))
        draw = ImageDraw.Draw(whole)
        for row, name in enumerate(rows):
            top = MARGIN + row * (grid.height - MARGIN) // len(rows)
            draw.text((gutter, top + height * scale / 2), name, fill="black", font=font, anchor="rm")
        frames.append(np.asarray(whole))
    return np.stack(frames)
