"""Pictures as people have them, and as an attacker makes them."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import hostile_media as hostile
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from skipdit.data import picture_files
from skipdit.data.clips import ClipConfig
from skipdit.data.picture_files import MAX_PIXELS, MAX_SIDE, TRANSPOSES, check_picture, on_white, open_picture, to_rgb
from skipdit.data.pictures import DataConfig, open_pictures

RAMP = np.tile(np.linspace(0, 1, 48), (32, 1))


def scene() -> Image.Image:
    return Image.fromarray(hostile.scene())


def levels(content: bytes) -> np.ndarray:
    return np.asarray(on_white(open_picture(content, "picture"))).astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = scene()
    if orientation in TRANSPOSES:
        undo = {6: 8, 8: 6}.get(orientation, orientation)
        turned = turned.transpose(TRANSPOSES[undo])
    read = levels(hostile.saved(turned, kind, exif=exif))
    assert read.shape == (24, 32, 3)
    assert np.abs(read - hostile.scene()).mean() < 8


def test_a_damaged_exif_block_leaves_the_picture_as_it_is() -> None:
    content = hostile.saved(scene(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert levels(content).shape == (24, 32, 3)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(np.int32), "TIFF"),
        ((RAMP * (2**31 - 1)).astype(np.int32), "TIFF"),
        ((RAMP * 255).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 65535).astype(np.float32), "TIFF"),
    ],
)
def test_deep_grey_is_scaled(values: np.ndarray, kind: str) -> None:
    read = levels(hostile.saved(Image.fromarray(values), kind))
    assert np.abs(read - 255 * RAMP[..., None]).max() <= 1
    assert (read[:, 0].max(), read[:, -1].min()) == (0, 255)


@given(st.integers(0, 65535))
def test_sixteen_bits_are_divided_by_257(value: int) -> None:
    assert on_white(Image.fromarray(np.full((1, 1), value, np.uint16))).getpixel((0, 0)) == (round(value / 257),) * 3


def test_sixteen_bits_in_the_order_of_macs_are_read() -> None:
    """As ImageJ writes them."""
    picture = Image.frombytes("I;16B", RAMP.shape[::-1], (RAMP * 65535).astype(">u2").tobytes())
    content = hostile.saved(picture, "TIFF")
    assert content[:2] == b"MM"
    assert np.abs(levels(content) - 255 * RAMP[..., None]).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1])
def test_values_that_are_no_grey_are_refused(value: float) -> None:
    pixels = np.zeros((4, 4), np.float32)
    pixels[2, 2] = value
    with pytest.raises(ValueError, match="below 0, too large or not finite"):
        on_white(Image.fromarray(pixels))


def transparent(mode: str) -> tuple[bytes, np.ndarray]:
    """A picture whose left half is clear, in a mode, and where it is clear."""
    clear = np.zeros((24, 32), bool)
    clear[:, :16] = True
    alpha = Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    two = Image.fromarray(np.where(clear[..., None], (220, 0, 0), (0, 0, 220)).astype(np.uint8))
    grey = Image.fromarray(np.where(clear, 30, 60).astype(np.uint8))
    if mode == "RGB":
        return hostile.saved(two, "PNG", transparency=(220, 0, 0)), clear
    if mode == "L":
        return hostile.saved(grey, "PNG", transparency=30), clear
    if mode == "P":
        return hostile.saved(two.quantize(2), "GIF", transparency=two.quantize(2).getpixel((0, 0))), clear
    if mode == "P of bytes":
        palette = two.quantize(2)
        opacity = bytes([255 * (index != palette.getpixel((0, 0))) for index in (0, 1)])
        return hostile.saved(palette, "PNG", transparency=opacity), clear
    if mode == "I;16":
        deep = Image.fromarray(np.where(clear, 30, 60).astype(np.uint16))
        return with_chunk(hostile.saved(deep, "PNG"), hostile.chunk(b"tRNS", b"\x00\x1e")), clear
    if mode == "LA":
        return hostile.saved(Image.merge("LA", [grey, alpha]), "PNG"), clear
    two.putalpha(alpha)
    return hostile.saved(two, mode, lossless=True), clear


def with_chunk(png: bytes, chunk: bytes) -> bytes:
    """The PNG with a chunk before its pixels."""
    place = png.index(b"IDAT") - 4
    return png[:place] + chunk + png[place:]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "P of bytes", "I;16", "LA", "PNG", "WEBP", "TIFF", "AVIF"])
def test_what_is_clear_becomes_white(mode: str) -> None:
    content, clear = transparent(mode)
    read = levels(content)
    assert (read[clear] > 250).all()
    assert (read[~clear].sum(axis=1) < 500).all()


@given(seed=st.integers(0, 10**6), height=st.integers(1, 9), width=st.integers(1, 9))
def test_strips_do_not_show(seed: int, height: int, width: int) -> None:
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8))
    whole = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    before, picture_files.STRIP_PIXELS = picture_files.STRIP_PIXELS, 10
    try:
        assert np.array_equal(on_white(picture), whole)
    finally:
        picture_files.STRIP_PIXELS = before


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGB"])
def test_opaque_modes_are_as_by_way_of_rgba(mode: str) -> None:
    picture = scene().convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (8, 8), (120, 30, 200))
    assert np.array_equal(on_white(picture), picture.convert("RGBA").convert("RGB"))


def test_no_program_is_started(tmp_path: Path) -> None:
    """Ghostscript stands in the PATH, and writes down that it ran."""
    script, ran = tmp_path / "bin" / "gs", tmp_path / "ran"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {ran}\n")
    script.chmod(0o755)
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("x.png", "x.gif"):
        (folder / name).write_bytes(hostile.EPS)
    code = """
import sys
from skipdit.data.clips import ClipConfig, open_clips
from skipdit.data.pictures import DataConfig, open_pictures
for opened, config in ((open_pictures, DataConfig), (open_clips, ClipConfig)):
    try:
        opened(config(source=sys.argv[1]))
    except ValueError as error:
        print(error)
"""
    environment = os.environ | {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", code, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("cannot read the") == 2
    assert not ran.exists()


@pytest.mark.parametrize("content", [hostile.EPS, hostile.PSD, b"", b"<html>404 not found</html>"])
def test_other_formats_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="cannot read the picture a cat: it is none of AVIF, BMP"):
        open_picture(content, "a cat")


def test_sizes_are_checked_before_anything_is_decoded() -> None:
    huge = hostile.png(13_300, 13_300, depth=1, color=0)
    for read in (open_picture, check_picture):
        with pytest.raises(ValueError, match=r"it has 13300 x 13300 pixels, at most 52,428,800 are read"):
            read(huge, "huge")


@pytest.mark.parametrize("height", [1_000_000, 10_000_000])
def test_a_thin_picture_is_not_made_larger_before_the_crop(height: int) -> None:
    """Resized on its shorter side, one of these would have 64 x 640,000,000 pixels."""
    assert to_rgb(open_picture(hostile.png(1, height, depth=1, color=0), "thin"), 64).size == (64, 64)


@pytest.mark.parametrize("config", [DataConfig, ClipConfig])
def test_a_side_beyond_every_picture_is_refused(config: type) -> None:
    assert config(image_size=MAX_SIDE).image_size ** 2 <= MAX_PIXELS
    with pytest.raises(ValueError, match="image_size must be at most 7240, got 100000"):
        config(image_size=100_000)


def test_a_large_jpeg_is_decoded_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    content = hostile.saved(scene().resize((320, 240)), "JPEG", quality=95)
    monkeypatch.setattr(picture_files, "MAX_PIXELS", 320 * 240 // 4)
    assert open_picture(content, "large").size == (160, 120)
    monkeypatch.setattr(picture_files, "MAX_PIXELS", 320 * 240 // 64)
    assert open_picture(content, "large").size == (40, 30)
    monkeypatch.setattr(picture_files, "MAX_PIXELS", 320 * 240 // 64 - 1)
    with pytest.raises(ValueError, match="cannot read the picture large: it has 40 x 30 pixels"):
        open_picture(content, "large")
    progressive = hostile.saved(scene().resize((320, 240)), "JPEG", progressive=True)
    with pytest.raises(ValueError, match="it has 320 x 240 pixels"):
        open_picture(progressive, "progressive")


def test_a_jpeg_above_the_limit_of_pillow_warns_nobody() -> None:
    assert 9500 * 9500 > Image.MAX_IMAGE_PIXELS > MAX_PIXELS
    content = hostile.saved(Image.new("L", (9500, 9500)), "JPEG")
    assert open_picture(content, "large").size == (4750, 4750)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    assert open_picture(hostile.many_scans(10), "some").size == (512, 512)
    with pytest.raises(ValueError, match="cannot read the picture many: it has 410 scans, at most 32 are read"):
        open_picture(hostile.many_scans(400), "many")


LONG = zlib.compress(b"x" * 2**21)
NOTES = {
    "zTXt": hostile.chunk(b"zTXt", b"workflow\0\0" + LONG),
    "iTXt": hostile.chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "tEXt": 5 * hostile.chunk(b"tEXt", b"prompt\0" + b"x" * 2**24),
    "iCCP": hostile.chunk(b"iCCP", b"profile\0\0" + LONG),
    "checksum": hostile.chunk(b"tEXt", b"prompt\0x")[:-1] + b"?",
}


@pytest.mark.parametrize("name", NOTES)
@pytest.mark.parametrize("place", ["IDAT", "IEND"])
def test_long_texts_and_profiles_of_a_png_do_no_harm(name: str, place: str, tmp_path: Path) -> None:
    """Pillow refuses a picture for one of more than 1 MiB, or 64 MiB of all, and for a wrong checksum of one."""
    plain = hostile.saved(scene(), "PNG")
    at = plain.index(place.encode()) - 4
    content = plain[:at] + NOTES[name] + plain[at:]
    assert np.array_equal(levels(content), hostile.scene())
    (tmp_path / "a.png").write_bytes(content)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.png", "a")), hostile.scene())
    check_picture(content, "picture")


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
EXIF = b"\nexif\n%8d\n%s\n" % (26, b"49492a00080000000100120103000100000003000000" + b"00000000")


@pytest.mark.parametrize("texts", [
    hostile.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    hostile.chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(EXIF)),
])  # fmt: skip
def test_texts_of_a_png_that_tell_its_orientation_are_read(texts: bytes) -> None:
    plain = hostile.saved(scene(), "PNG")
    at = plain.index(b"IDAT") - 4
    content = plain[:at] + NOTES["zTXt"] + texts + plain[at:]
    assert np.array_equal(levels(content), hostile.scene()[::-1, ::-1])


def test_a_png_of_many_chunks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_files, "MAX_PNG_CHUNKS", 100)
    assert open_picture(hostile.png(8, 8, extra=97 * hostile.chunk(b"teSt", b"")), "some").size == (8, 8)
    with pytest.raises(ValueError, match="cannot read the picture many: it has more than 100 chunks"):
        open_picture(hostile.png(8, 8, extra=98 * hostile.chunk(b"teSt", b"")), "many")


@pytest.mark.parametrize("kind", ["fifo", "device", "dead link"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"cannot read the picture .*a\.png"):
        open_pictures(DataConfig(source=str(tmp_path)))


def test_a_name_is_printed_without_its_escape_sequences(tmp_path: Path) -> None:
    (tmp_path / "\x1b[2J.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"/\\x1b\[2J\.png: it is none of") as raised:
        open_pictures(DataConfig(source=str(tmp_path)))
    assert str(raised.value).isprintable()


def test_the_square_in_the_centre_is_taken() -> None:
    wide = Image.new("RGB", (31, 10), (0, 0, 0))
    wide.paste((255, 0, 0), (10, 0, 20, 10))
    assert (np.asarray(to_rgb(wide, 10)) == (255, 0, 0)).all()
    assert (np.asarray(to_rgb(wide.transpose(Image.Transpose.TRANSPOSE), 10)) == (255, 0, 0)).all()
    assert to_rgb(scene(), 5).size == (5, 5)
