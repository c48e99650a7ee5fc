"""Damaged and hostile pictures, videos, tables and texts: `hostile_*(seed, count)` gives (name, content) of as many
files, the named cases first, then valid files damaged in every way. The same seed gives the same files."""

import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image, PngImagePlugin

Files = list[tuple[str, bytes]]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
PSD = b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(12) + b"\x00\x00" + bytes(192)
SDP = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45678 RTP/AVP 26\n"
HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile '/etc/hostname'\n"
DASH = b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>\n'


def scene(height: int = 24, width: int = 32) -> np.ndarray:
    """RGB that has an upper and a left side."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 220
    pixels[:, width // 2 :, 2] = 220
    pixels[: height // 4] = 255
    return pixels


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    """A black PNG of any size, compressed as well as it can be."""
    row = bytes(1 + (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] + 7) // 8)
    at_once = max(1, 2**20 // len(row))
    packer = zlib.compressobj(9)
    parts = [packer.compress(row * min(at_once, height - top)) for top in range(0, height, at_once)]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    content = b"".join(parts) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def many_scans(times: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    content = saved(Image.new("RGB", (512, 512)), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * times + content[-2:]


def text_png(num_bytes: int) -> bytes:
    """A PNG with a compressed text that unpacks to so many bytes."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * num_bytes, zip=True)
    return saved(Image.fromarray(scene()), "PNG", pnginfo=info)


def video(codec: str, pixels: str, suffix: str, frames: Sequence[np.ndarray], times: Sequence[int] = ()) -> bytes:
    """The file of a video. times: of each frame in ms; by default 25 frames per second."""
    buffer = io.BytesIO()
    options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}
    with av.open(buffer, "w", format=suffix) as container:
        stream = container.add_stream(codec, rate=1000 if times else 25, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        for index, pixel in enumerate(frames):
            kind = "rgba" if pixel.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixel), format=kind)
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def animation(kind: str, frames: Sequence[np.ndarray], duration: int | list[int] = 100) -> bytes:
    """The file of an animated GIF, PNG or WebP."""
    first, *others = map(Image.fromarray, frames)
    return saved(first, kind, save_all=True, append_images=others, duration=duration, loop=0)


def moving(num_frames: int = 4) -> list[np.ndarray]:
    """The scene, with a bar below that grows."""
    frames = [scene() for _ in range(num_frames)]
    for index, frame in enumerate(frames):
        frame[-4:, : 4 * index + 1] = (0, 200, 0)
    return frames


def table(columns: dict, **options: object) -> bytes:
    """The file of a parquet table."""
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer, store_schema=False, dictionary_pagesize_limit=2**26, **options)
    return buffer.getvalue()


def stream(columns: dict, compression: str | None = None) -> bytes:
    """A stream of Arrow batches."""
    rows, buffer = pa.table(columns), io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(buffer, rows.schema, options=options) as writer:
        writer.write_table(rows)
    return buffer.getvalue()


def damage(content: bytes, generator: np.random.Generator) -> bytes:
    """The file with some bits, a number or a piece changed, cut or grown."""
    data = bytearray(content)
    place = int(generator.integers(len(data)))
    early = int(generator.integers(min(len(data), 200)))
    match int(generator.integers(8)):
        case 0:
            return bytes(data[:place])
        case 1:
            for index in generator.integers(len(data), size=int(generator.integers(1, 9))):
                data[index] ^= 1 << int(generator.integers(8))
        case 2:
            data[early : early + 4] = struct.pack("<I", int(generator.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1])))
        case 3:
            data[early : early + 4] = struct.pack(">I", int(generator.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1])))
        case 4:
            data[place:place] = generator.bytes(int(generator.integers(1, 64)))
        case 5:
            del data[place : place + int(generator.integers(1, 64))]
        case 6:
            data[-early - 4 :] = generator.bytes(early + 4)
        case _:
            data[place : place + 64] = data[early : early + 64]
    return bytes(data)


def _files(seed: int, count: int, named: Files, valid: Files) -> Files:
    generator = np.random.default_rng(seed)
    damaged = (
        (f"{number}_{name}", damage(content, generator))
        for number, (name, content) in zip(itertools.count(), itertools.cycle(valid))
    )
    return list(itertools.islice(itertools.chain(named, damaged), count))


def valid_pictures() -> Files:
    """A small picture of every format that is read."""
    picture = Image.fromarray(scene())
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        ("a.png", saved(picture, "PNG")),
        ("a.jpg", saved(picture, "JPEG", exif=exif)),
        ("progressive.jpg", saved(picture, "JPEG", progressive=True)),
        ("a.webp", saved(picture, "WEBP", exif=exif)),
        ("a.gif", saved(picture, "GIF")),
        ("a.tif", saved(picture, "TIFF")),
        ("deflated.tif", saved(picture, "TIFF", compression="tiff_deflate")),
        ("a.bmp", saved(picture, "BMP")),
        ("a.avif", saved(picture, "AVIF")),
        ("a.ppm", saved(picture, "PPM")),
        ("moving.png", animation("PNG", moving())),
        ("deep.png", saved(Image.fromarray(scene()[..., 0].astype(np.uint16) * 257), "PNG")),
    ]


def hostile_pictures(seed: int, count: int) -> Files:
    """Pictures, each to be put alone into a folder."""
    named = [
        ("eps.png", EPS),
        ("psd.png", PSD),
        ("thin.png", png(1, 1_000_000)),
        ("wide.png", png(1_000_000, 1)),
        ("large.png", png(13_300, 13_300, depth=1, color=0)),
        ("text.png", text_png(2**21)),
        ("scans.jpg", many_scans(400)),
        ("nan.tif", saved(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF")),
        ("infinite.tif", saved(Image.fromarray(np.full((8, 8), np.inf, np.float32)), "TIFF")),
        ("empty.png", b""),
        ("page.jpg", b"<html>404 not found</html>"),
        ("\x1b[2J\x1b]0;owned\x07.png", b"nothing"),
    ]
    return _files(seed, count, named, valid_pictures())


def valid_videos() -> Files:
    """A small video of every container that is read."""
    frames = moving()
    return [
        ("a.mp4", video("libx264", "yuv420p", "mp4", frames)),
        ("a.mov", video("png", "rgba", "mov", frames)),
        ("a.mkv", video("ffv1", "yuva420p", "matroska", frames)),
        ("a.webm", video("libvpx-vp9", "yuva420p", "webm", frames)),
        ("a.avi", video("mpeg4", "yuv420p", "avi", frames)),
        ("a.ts", video("mpeg2video", "yuv420p", "mpegts", frames)),
        ("a.flv", video("flv", "yuv420p", "flv", frames)),
        ("a.ogv", video("libvpx", "yuv420p", "ogg", frames)),
        ("a.wmv", video("wmv2", "yuv420p", "asf", frames)),
        ("a.gif", animation("GIF", frames)),
        ("a.webp", animation("WEBP", frames)),
        ("a.apng", animation("PNG", frames)),
    ]


def hostile_videos(seed: int, count: int) -> Files:
    """Videos, of which 4 frames are wanted."""
    gif = animation("GIF", moving())
    named = [
        ("sdp.mp4", SDP),
        ("hls.mp4", HLS),
        ("concat.mp4", CONCAT),
        ("dash.mp4", DASH),
        ("eps.gif", EPS),
        ("large.gif", gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:]),
        ("empty.mp4", b""),
        ("\x1b[2J.mp4", b"nothing"),
    ]
    return _files(seed, count, named, valid_videos())


def valid_tables() -> Files:
    """Small parquet files, compressed in every way."""
    content = saved(Image.fromarray(scene()), "PNG")
    columns = {
        "image": [{"bytes": content, "path": None}] * 3,
        "label": ["cat", "dog", "cat"],
        "text": [["a cat"], ["a dog", "no cat"], ["another"]],
    }
    kinds = ("none", "snappy", "gzip", "zstd", "brotli", "lz4")
    return [(f"{kind}.parquet", table(columns, compression=kind)) for kind in kinds]


def repeated(value: bytes, num_rows: int) -> pa.DictionaryArray:
    """One value in every row, stored once."""
    return pa.DictionaryArray.from_arrays(np.zeros(num_rows, np.int32), pa.array([value]))


def lying(content: bytes) -> bytes:
    """The parquet file, the footer of which says that its first column has 100 bytes when it is unpacked."""
    size = parquet.read_metadata(io.BytesIO(content)).row_group(0).column(0).total_uncompressed_size
    found, said = _varint(2 * size), bytearray(_varint(2 * 100))
    said = bytes([*(byte | 0x80 for byte in said), *[0x80] * (len(found) - len(said) - 1), 0])
    footer = content.rindex(found)
    return content[:footer] + said + content[footer + len(found) :]


def _varint(number: int) -> bytes:
    groups = [number >> shift & 0x7F for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def hostile_tables(seed: int, count: int) -> Files:
    """Parquet files with the columns image, label and text."""
    content = saved(Image.fromarray(scene()), "PNG")
    one = {"image": [content], "label": ["cat"], "text": ["a cat"]}
    many = {
        "image": repeated(content, 2000),
        "label": repeated(b"cat", 2000).cast(pa.dictionary(pa.int32(), pa.string())),
    }

    zeros = table(one | {"image": [bytes(2**27 + 2**24)]}, compression="zstd")

    def changed(**columns: object) -> bytes:
        return table(one | columns)

    named = [
        ("unused.parquet", table(many | {"text": many["label"], "other": repeated(bytes(2**20), 2000)})),
        ("repeated.parquet", table(many | {"image": repeated(bytes(2**20), 2000), "text": many["label"]})),
        ("rows.parquet", table({name: pa.nulls(2**22, pa.binary()) for name in ("image", "label", "text")})),
        ("zeros.parquet", zeros),
        ("lying.parquet", lying(zeros)),
        ("struct.parquet", changed(image=[{"path": "a.png"}])),
        ("path.parquet", changed(image=[{"bytes": None, "path": "a.png"}])),
        ("null.parquet", changed(image=pa.nulls(1, pa.binary()))),
        ("list.parquet", changed(label=[["cat"]])),
        ("map.parquet", changed(label=pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())))),
        ("nan.parquet", changed(label=[float("nan")])),
        ("nulls.parquet", changed(text=pa.array([[None] * 10_000_000]))),
        ("\x1b[2J.parquet", b"PAR1"),
    ]
    return _files(seed, count, named, valid_tables())


def valid_streams() -> Files:
    """A small Arrow stream."""
    content = saved(Image.fromarray(scene()), "PNG")
    return [("a.arrow", stream({"image": [{"bytes": content, "path": None}] * 3, "label": ["cat", "dog", "cat"]}))]


def hostile_streams(seed: int, count: int) -> Files:
    """Arrow streams with the columns image and label, for a folder that `datasets` saved."""
    columns = {"image": [b"x"] * 3, "label": ["cat", "dog", "cat"]}
    named = [("zeros.arrow", stream({"image": [bytes(2**29)], "label": ["cat"]}, "zstd")), ("empty.arrow", b"")]
    return _files(seed, count, named, [*valid_streams(), ("zstd.arrow", stream(columns, "zstd"))])


def valid_texts() -> Files:
    """A caption in every way that is read."""
    rows = b'{"file_name": "0.png", "text": "a cat"}\n'
    return [("0.txt", b"a cat\n"), ("metadata.jsonl", rows), ("metadata.csv", b"file_name,text\n0.png,a cat\n")]


def hostile_texts(seed: int, count: int) -> Files:
    """Captions of a picture `0.png`, or metadata of its folder."""
    named = [
        ("0.txt", b"a" * 10**8),
        ("0.txt", b"\xff\xfea\x00"),
        ("0.caption", b"\n\n"),
        ("metadata.jsonl", b"[" * 100_000),
        ("metadata.jsonl", b'{"file_name": ["0.png"], "text": "a cat"}'),
        ("metadata.jsonl", b'{"file_name": "0.png", "text": 1e400}'),
        ("metadata.csv", b"file_name,text\n0.png," + b"a" * 200_000),
        ("metadata.csv", b"file_name,text\n0.png\n"),
    ]
    files = _files(seed, count, named, valid_texts())
    return [(name.rpartition("_")[2], content) for name, content in files]


READERS: dict[str, Callable[[int, int], Files]] = {
    "pictures": hostile_pictures,
    "videos": hostile_videos,
    "tables": hostile_tables,
    "streams": hostile_streams,
    "texts": hostile_texts,
}


VALID: dict[str, Callable[[], Files]] = {
    "pictures": valid_pictures,
    "videos": valid_videos,
    "tables": valid_tables,
    "streams": valid_streams,
    "texts": valid_texts,
}


def each(seed: int, count: int) -> Iterator[tuple[str, str, bytes]]:
    """Yield (reader, name, content) of `count` files for every reader."""
    for reader, files in READERS.items():
        for name, content in files(seed, count):
            yield reader, name, content
