"""Read untrusted picture files: the only place where Pillow opens files, the limits, and conversion to RGB on white.

Pillow may only try the listed formats: others run programs (EPS starts Ghostscript) or are hardly maintained.
"""

import io
import math
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from skipdit.files.untrusted import open_regular, printable
from skipdit.options import MAX_PIXELS
from skipdit.options import MAX_SIDE as MAX_SIDE

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PICTURE_SUFFIXES = frozenset({".apng", ".avif", ".bmp", ".gif", ".png", ".tif", ".tiff", ".webp"}) | frozenset(
    {".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".pnm", ".ppm"}
)
MAX_PICTURE_BYTES = 2**28  # per file
MAX_AVIF_PIXELS = 2**25  # lower, because the decoder keeps several copies in memory
MAX_PNG_CHUNKS = 2**18
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
PNG_NOTES = (b"iCCP", b"iTXt", b"tEXt", b"zTXt")  # PNG 11.3.2.3 and 11.3.3: color profile and texts
PNG_ORIENTATIONS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts that may contain the orientation
MAX_SCANS = 32  # of a progressive JPEG, each over the whole picture; cameras and editors write about 10
STRIP_PIXELS = 2**20  # composited on white at a time
DEEP_MODES = ("I", "F")
FULL_SCALES = {"I;16": (65535,), "I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535, 2**31 - 1)}
TRANSPOSES = {  # EXIF 2.32, 4.6.4 A, Orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def reason_of(error: BaseException) -> str:
    """Return the first line of a decoder's error."""
    match error:
        case UnidentifiedImageError():
            return f"it is none of {', '.join(FORMATS)}"
        case MemoryError():
            return "it needs too much memory"
    return printable((str(error).splitlines() or [type(error).__name__])[0])


def open_picture(source: Path | bytes, name: str) -> Image.Image:
    """Return a decoded picture, rotated by its EXIF orientation. name: what errors call it.

    `ValueError` if it cannot be read, has none of `FORMATS`, or has more than `MAX_PIXELS`.
    """
    with _opened(source, name) as picture:
        picture.load()
        transpose = TRANSPOSES.get(_orientation(picture) or 0)
        return picture if transpose is None else picture.transpose(transpose)


def check_picture(source: Path | bytes, name: str) -> None:
    """Read only the header and the checksums. `ValueError` as for `open_picture`."""
    with _opened(source, name) as picture:
        picture.verify()


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raise `ValueError` if width times height is more than `max_pixels`."""
    if math.prod(size) > max_pixels:
        raise ValueError(f"it has {size[0]} x {size[1]} pixels, at most {max_pixels:,} are read")


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """Yield the picture in a file or in bytes; turn whatever Pillow raises into one `ValueError`."""
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            open_regular(source) if isinstance(source, Path) else io.BytesIO(source) as file,
        ):
            if file.seek(0, os.SEEK_END) > MAX_PICTURE_BYTES:
                raise ValueError(f"it is larger than the {MAX_PICTURE_BYTES:,} bytes that are read")
            with Image.open(_without_notes(file), formats=FORMATS) as picture:
                _shrink_jpeg(picture, file)
                check_size(picture.size, MAX_AVIF_PIXELS if picture.format == "AVIF" else MAX_PIXELS)
                yield picture
    except Exception as error:  # decoders raise any type on damaged files
        raise ValueError(f"cannot read the picture {name}: {reason_of(error)}") from error


def _without_notes(file: BinaryIO) -> BinaryIO:
    """Return the file, or a copy of a PNG without its texts and color profile: they are not used here, and Pillow
    rejects pictures in which one of them exceeds 1 MiB."""
    file.seek(0)
    edges = [0, *_notes_of(file)] if file.read(len(PNG_HEAD)) == PNG_HEAD else [0]
    file.seek(0)
    if len(edges) == 1:
        return file
    content = file.read()
    return io.BytesIO(b"".join(content[a:b] for a, b in zip(edges[::2], [*edges[1::2], None], strict=True)))


def _notes_of(file: BinaryIO) -> Iterator[int]:
    """Yield the start and the end, in bytes, of each text or color profile in a PNG."""
    start = len(PNG_HEAD)
    for _ in range(MAX_PNG_CHUNKS):
        file.seek(start)
        head = file.read(8 + max(map(len, PNG_ORIENTATIONS)))
        length, kind = struct.unpack_from(">I4s", head) if len(head) >= 8 else (0, b"IEND")
        if kind == b"IEND":
            return
        end = start + 12 + length
        if kind in PNG_NOTES and not head[8:].startswith(PNG_ORIENTATIONS):
            yield from (start, end)
        start = end
    raise ValueError(f"it has more than {MAX_PNG_CHUNKS:,} chunks")


def _shrink_jpeg(picture: Image.Image, file: BinaryIO) -> None:
    """Have a large JPEG decoded at a half, a quarter or an eighth of its size, unless it is progressive: that needs
    memory for all coefficients, and the time of a whole picture per scan. `ValueError` if there are too many scans."""
    if picture.format not in ("JPEG", "MPO"):
        return
    if picture.info.get("progressive"):
        position = file.tell()
        file.seek(0)
        num_scans = file.read().count(b"\xff\xda")  # T.81, table B.1: SOS
        file.seek(position)
        if num_scans > MAX_SCANS:
            raise ValueError(f"it has {num_scans} scans, at most {MAX_SCANS} are read")
        return
    width, height = picture.size
    if width * height > MAX_PIXELS:
        scale = next((scale for scale in (2, 4) if width * height <= scale**2 * MAX_PIXELS), 8)
        picture.draft(picture.mode, (max(1, width // scale), max(1, height // scale)))


def _orientation(picture: Image.Image) -> int | None:
    """Return the EXIF orientation of a decoded picture; None if there is none or the block is damaged."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None


def on_white(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB on white.

    16-bit gray is divided by 257. White is, in 32-bit gray, the first of 255, 65535 and 2^31 - 1 that no value exceeds,
    and in a float picture the first of 1 and these. `ValueError` if a value is outside that range.
    """
    if picture.mode.startswith(DEEP_MODES):
        picture = _eight_bits(picture)
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    canvas = Image.new("RGB", picture.size)
    height = max(1, STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, height):
        layer = picture.crop((0, top, picture.width, min(top + height, picture.height))).convert("RGBA")
        canvas.paste(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"), (0, top))
    return canvas


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Convert gray of more than 8 bits to L, or to LA if one of its values is transparent."""
    values = np.asarray(picture)
    lowest, highest = values.min(), values.max()  # NaN if any value is
    scales = [scale for scale in FULL_SCALES[picture.mode[:4]] if lowest >= 0 and highest <= scale]
    if not scales:
        raise ValueError(f"its values, from {lowest} to {highest}, are below 0, too large or not finite")
    levels = picture.convert("F").point(lambda value: value * (255 / scales[0]) + 0.5).convert("L")
    if (clear := picture.info.get("transparency")) is not None:
        levels.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return levels


def adm_crop(picture: Image.Image, size: int) -> Image.Image:
    """Crop the center of a picture as RGB on white, as ADM (arXiv 2105.05233) does with ImageNet: halve it by averaging
    2x2 pixels while the shorter side is at least twice `size`, resize that side to `size`, then crop.

    `ValueError` if the resized picture would be too large, because it is a long strip.
    """
    picture = on_white(picture)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    resized = round(picture.width * scale), round(picture.height * scale)
    check_size(resized, MAX_PIXELS)
    picture = picture.resize(resized, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def to_rgb(picture: Image.Image, size: int) -> Image.Image:
    """Crop the center square of a picture and resize it to `size`, as RGB on white."""
    width, height = picture.size
    side = min(width, height)
    if width != height:
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    picture = on_white(picture)
    return picture if side == size else picture.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
