"""Read untrusted video files: the only place where PyAV opens files, with its limits, and frames with their times.

The first bytes decide which demuxer PyAV uses: left to itself, FFmpeg accepts SDP or HLS text as a video, and opens
sockets and other files.
"""

import errno
import importlib
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from fractions import Fraction
from itertools import count
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from skipdit.data.picture_files import FORMATS, MAX_PICTURE_BYTES, check_size, on_white

ANIMATION_SUFFIXES = frozenset({".apng", ".gif", ".webp"})
VIDEO_SUFFIXES = (
    ANIMATION_SUFFIXES
    | {".3gp", ".asf", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".ogv", ".webm", ".wmv"}
    | {".m2ts", ".mpeg", ".mpg", ".mts", ".ts"}
)
SIGNATURES = (  # offset, bytes, demuxer
    (4, b"ftyp", "mov"),  # ISO/IEC 14496-12; QuickTime files begin with one of the next six
    *((4, atom, "mov") for atom in (b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")),
    (0, b"\x1aE\xdf\xa3", "matroska"),  # RFC 8794, also WebM
    (8, b"AVI", "avi"),
    (0, b"OggS", "ogg"),
    (0, b"FLV\x01", "flv"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (0, b"\x00\x00\x01\xba", "mpeg"),
    (0, b"\x00\x00\x01\xb3", "mpegvideo"),
)
TS_PACKETS = ((0, 188), (4, 192))  # ISO/IEC 13818-1 and .m2ts: offset of the first 0x47, distance to the next
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's native decoders ignore the alpha channel of WebM
MAX_FRAME_PIXELS = 2**25  # of a video; 8K is 7680 x 4320
MAX_ANIMATION_PIXELS = 2**23  # of an .apng, .gif or .webp, whose frames are drawn over one another
MIN_DURATION, USUAL_DURATION = 20, 100  # ms: browsers show frames shorter than the former for the latter


class TimedFrame(NamedTuple):
    """A frame of a video with its times."""

    begin: Fraction
    """time from which it is displayed, in seconds"""
    end: Fraction
    """time until which it is displayed, in seconds"""
    pixels: Callable[[], UInt8[np.ndarray, "height width 3"]]
    """decodes it"""


def timed_frames(stream: BinaryIO, *, by_index: bool) -> Generator[TimedFrame, None, None]:
    """Yield the frames of an open file, on white and rotated as the file says, whatever its name.

    by_index: frame i is displayed from i to i + 1. A broken file raises errors of any type.
    """
    head = stream.read(512)
    stream.seek(0)
    is_animation = head[:4] == b"GIF8" or head[:8] == b"\x89PNG\r\n\x1a\n" or head[:4] + head[8:12] == b"RIFFWEBP"
    frames = _animation(stream) if is_animation else _container(stream, demuxer_of(head))
    if by_index:
        yield from (frame._replace(begin=Fraction(i), end=Fraction(i + 1)) for i, frame in zip(count(), frames))
    else:
        yield from frames if is_animation else _until_the_next(frames)


def demuxer_of(head: bytes) -> str:
    """Return FFmpeg's demuxer for a file that begins with `head`. `ValueError` if its format is not supported."""
    for offset, signature, demuxer in SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return demuxer
    for first, distance in TS_PACKETS:
        if head[first::distance][:2] == b"GG":
            return "mpegts"
    raise ValueError("it is not a GIF, PNG, WebP, MP4, MOV, MKV, WebM, AVI, FLV, MPEG, Ogg or WMV")


def _animation(stream: BinaryIO) -> Iterator[TimedFrame]:
    if stream.seek(0, os.SEEK_END) > MAX_PICTURE_BYTES:
        raise ValueError(f"it is larger than the {MAX_PICTURE_BYTES:,} bytes that are read")
    stream.seek(0)
    with warnings.catch_warnings(action="ignore"):
        picture = Image.open(stream, formats=FORMATS)
    with picture:
        begin = Fraction(0)
        # the default image of an APNG, for viewers that do not animate, is not one of its frames
        for index in count(1 if picture.info.get("default_image") else 0):
            with warnings.catch_warnings(action="ignore"):
                try:
                    picture.seek(index)
                except EOFError:
                    return
                check_size(picture.size, MAX_ANIMATION_PIXELS)  # a frame of a GIF may enlarge the picture
                picture.load()
            duration = Fraction(picture.info.get("duration", 0))
            end = begin + Fraction(duration if duration >= MIN_DURATION else USUAL_DURATION, 1000)
            yield TimedFrame(begin, end, lambda: np.array(on_white(picture)))
            begin = end


class _Seekable:
    """A file whose failing seeks return an error code, as FFmpeg expects; PyAV would print a traceback."""

    def __init__(self, stream: BinaryIO) -> None:
        self.read, self.tell, self._seek = stream.read, stream.tell, stream.seek

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._seek(offset, whence)
        except (OSError, ValueError):
            return -errno.EINVAL


def _container(stream: BinaryIO, demuxer: str) -> Iterator[TimedFrame]:
    """Yield the frames of the video stream that FFmpeg considers best: a cover picture only if there is no other."""
    av: Any = importlib.import_module("av")
    options = {"protocol_whitelist": "none", "max_pixels": str(MAX_FRAME_PIXELS)}
    try:
        with av.open(_Seekable(stream), format=demuxer, options=options) as container:
            video = container.streams.best("video")
            if video is None:
                raise ValueError("it has no video stream")
            check_size((video.width, video.height), MAX_FRAME_PIXELS)
            video.codec_context.options = {"max_pixels": options["max_pixels"]}
            first = None
            for index, frame in zip(count(), _decode(av, container, video, options)):
                if frame.is_corrupt:
                    raise ValueError(f"frame {index} is corrupt")
                time = Fraction(frame.pts or 0) * (frame.time_base or 0)
                first = time if first is None else first
                end = time + Fraction(frame.duration or 0) * (frame.time_base or 0)
                yield TimedFrame(time - first, end - first, lambda frame=frame: _pixels(frame))
    except av.FFmpegError as error:
        raise ValueError(error.strerror or str(error)) from error


def _decode(av: Any, container: Any, video: Any, options: dict[str, str]) -> Iterable[Any]:
    decoder = ALPHA_DECODERS.get(video.codec_context.name)
    if video.metadata.get("alpha_mode") != "1" or decoder not in av.codecs_available:
        return container.decode(video)
    context = av.CodecContext.create(decoder, "r")
    context.options = {"max_pixels": options["max_pixels"]}
    packets = (packet if packet.size else None for packet in container.demux(video))
    return (frame for packet in packets for frame in context.decode(packet))


def _pixels(frame: Any) -> UInt8[np.ndarray, "height width 3"]:
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    if has_alpha:
        pixels = np.asarray(on_white(Image.fromarray(frame.to_ndarray(format="rgba"))))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(frame.rotation / 90))


def _until_the_next(frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
    """Yield frames that last until the next one begins: durations in files are often missing or wrong."""
    current = next(frames, None)
    while current is not None:
        following = next(frames, None)
        yield current if following is None else current._replace(end=following.begin)
        current = following
