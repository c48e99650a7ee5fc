"""Read webdataset tars, in which files of one name form a sample. A scan reads only headers; nothing is unpacked."""

import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from skipdit.data.folders import as_captions, walk
from skipdit.data.picture_files import MAX_PICTURE_BYTES, PICTURE_SUFFIXES
from skipdit.data.video_files import VIDEO_SUFFIXES
from skipdit.files.untrusted import as_type_or_none, open_regular, parse_json, printable, printable_path
from skipdit.interfaces import Fields

LOGGER = logging.getLogger(__name__)
MAX_MEMBERS = 2**24  # in all tars together
MAX_HEADER_BYTES = 2**20  # per header; long names and pax records make it large
MAX_TEXT_BYTES = 2**20  # per class, caption or .json
MAX_VIDEO_BYTES = 2**30
CLASS_KEYS, CAPTION_KEYS = ("cls", "class", "label"), ("caption", "text", "txt")


@dataclass(frozen=True)
class Part:
    """A file in a tar."""

    path: Path
    """of the tar"""
    offset: int
    """position of the first byte in the tar"""
    size: int
    """number of bytes"""

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return its bytes; `ValueError` if there are more than `max_bytes` or the tar is cut off."""
        if self.size > max_bytes:
            raise ValueError(f"cannot read {name}: it is larger than the {max_bytes:,} bytes that are read")
        with open_regular(self.path) as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise ValueError(f"cannot read {name}: its tar is cut off")
        return content


@dataclass
class Member:
    """A sample: a picture or video with texts."""

    name: str
    """what errors call it"""
    media: Part | None = None
    """the picture or video"""
    is_video: bool = False
    others: dict[str, Part] = field(default_factory=dict)
    """text files by suffix, without the dot"""

    @property
    def identity(self) -> list[object]:
        """The name and the sizes of the parts, which identify a sample when an encoding is resumed."""
        assert self.media is not None
        sizes = {suffix: part.size for suffix, part in self.others.items()}
        return [Path(self.name).name, self.media.size, sizes]

    def content(self) -> bytes:
        """Return the bytes of the picture or video."""
        assert self.media is not None
        return self.media.read(self.name, MAX_VIDEO_BYTES if self.is_video else MAX_PICTURE_BYTES)

    def texts(self) -> tuple[str, list[str] | None]:
        """Return the class, by default `all`, and the captions, if any. `ValueError` if one has the wrong type."""
        texts = {suffix: self._text(suffix) for suffix in self.others if suffix != "json"}
        if "json" in self.others:
            content = self.others["json"].read(self.name, MAX_TEXT_BYTES)
            texts = parse_json(content, Fields, f"the json of {self.name}") | texts
        label = next((texts[key] for key in CLASS_KEYS if texts.get(key) is not None), "all")
        caption = next((texts[key] for key in CAPTION_KEYS if texts.get(key) is not None), None)
        captions = None if caption is None else as_captions([caption], self.name, "the caption")[0]
        class_name = class_text(label, f"the class of {self.name}").strip()
        if not class_name:
            raise ValueError(f"the class of {self.name} must be a number or a text, got {printable(label, 60)}")
        return class_name, captions

    def _text(self, suffix: str) -> str:
        content = self.others[suffix].read(self.name, MAX_TEXT_BYTES)
        try:
            return (content.decode("utf-8-sig").strip().splitlines() or [""])[0]
        except UnicodeDecodeError as error:
            raise ValueError(f"the {suffix} of {self.name} is not UTF-8: {error}") from error


def class_text(label: object, name: str) -> str:
    """Return a class, a number or a text, as text. `ValueError` if it is neither. name: what errors call it."""
    if as_type_or_none(label, int) is None and as_type_or_none(label, str) is None:
        raise ValueError(f"{name} must be a number or a text, got {printable(label, 60)}")
    return str(label)


def find_tars(path: Path) -> list[Path]:
    """Return a tar, or the tars in a folder without pictures, videos or tables; an empty list if `path` is neither."""
    if path.suffix.lower() == ".tar" and path.is_file():
        return [path]
    if not path.is_dir():
        if re.search(r"\.(tar\.\w+|tgz)$", path.name.lower()):
            raise ValueError(f"{printable_path(path)} is compressed: unpack it to a .tar first")
        return []
    tars = []
    for _, _, files in walk(path):
        suffixes = {file.suffix.lower() for file in files}
        if suffixes & (PICTURE_SUFFIXES | VIDEO_SUFFIXES | {".parquet", ".arrow"}):
            return []
        tars += [file for file in files if file.suffix.lower() == ".tar"]
    return sorted(tars)


def scan_tars(paths: Sequence[Path], *, clips: bool) -> list[Member]:
    """Return the samples of tars in order. `ValueError` names a tar that cannot be read, or a sample with two pictures
    or videos; one warning counts files of other kinds."""
    members: list[Member] = []
    left_out: Counter[str] = Counter()
    num_files = 0
    for path in paths:
        current: Member | None = None
        for name, part in _files(path, left_out):
            num_files += 1
            if num_files > MAX_MEMBERS:
                raise ValueError(f"the tars contain more than the {MAX_MEMBERS:,} files that are read")
            folder, _, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            key = f"{printable_path(path)}/{printable_path(f'{folder}/{stem}' if folder else stem)}"
            if not stem:  # a hidden file
                continue
            if current is None or current.name != key:
                current = Member(key)
                members.append(current)
            _take(current, suffix.lower(), part, left_out, clips=clips)
    samples = [member for member in members if member.media is not None]
    kind = "videos" if clips else "pictures"
    if left_out:
        counts = ", ".join(f"{count} {printable(suffix, 60)}" for suffix, count in left_out.most_common(5))
        LOGGER.warning("left out of the tars, because they are neither %s nor their texts: %s", kind, counts)
    if not samples:
        raise ValueError(f"no {kind} in {printable_path(paths[0])}" + (" and others" if paths[1:] else ""))
    return samples


def _take(member: Member, suffix: str, part: Part, left_out: Counter[str], *, clips: bool) -> None:
    if f".{suffix}" in (VIDEO_SUFFIXES if clips else PICTURE_SUFFIXES):
        if member.media is not None:
            raise ValueError(f"{member.name} has more than one picture or video")
        member.media, member.is_video = part, clips
    elif suffix in ("json", *CLASS_KEYS, *CAPTION_KEYS):
        member.others[suffix] = part
    else:
        left_out[f".{suffix}"] += 1


class _Headers:
    """A file object for reading the headers of a tar, none of them large."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.tell, self.seek = file, file.tell, file.seek

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"a header is larger than the {MAX_HEADER_BYTES:,} bytes that are read")
        return self._file.read(size)


def _files(path: Path, left_out: Counter[str]) -> Iterator[tuple[str, Part]]:
    """Yield the regular files of a tar; count links and devices as left out."""
    name = printable_path(path)
    try:
        with open_regular(path) as file, tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:") as archive:
            end = path.stat().st_size
            while (member := archive.next()) is not None:
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue] otherwise it keeps all of them
                if member.size < 0:  # would seek backward
                    raise ValueError(f"{printable(member.name, 60)} has a negative size")
                if not member.isreg() or member.issparse():
                    if not member.isdir():
                        left_out["links and the like"] += 1
                    continue
                if member.size < 0 or member.offset_data + member.size > end:
                    raise ValueError(f"it is cut off in {printable(member.name, 60)}")
                yield member.name, Part(path, member.offset_data, member.size)
            file.seek(archive.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile treats a damaged header as the end
                raise ValueError(f"the header at byte {archive.offset} is damaged")
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise ValueError(f"cannot read the tar {name}: {printable(error)}") from error
