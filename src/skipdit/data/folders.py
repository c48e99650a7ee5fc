"""Find the files of a data set in a folder, with their classes and captions."""

import csv
import io
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from skipdit.data.picture_files import PICTURE_SUFFIXES
from skipdit.data.video_files import VIDEO_SUFFIXES
from skipdit.files.output import absolute
from skipdit.files.untrusted import as_type_or_none, open_regular, parse_json, printable, printable_path, read_bytes
from skipdit.interfaces import Fields

LOGGER = logging.getLogger(__name__)
FRAME_SUFFIXES = PICTURE_SUFFIXES - VIDEO_SUFFIXES
TEXT_SUFFIXES = frozenset({".caption", ".txt"})
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")  # as in `datasets`' imagefolder
CAPTION_COLUMNS = ("text", "caption")
IGNORED_FOLDERS = frozenset({"__MACOSX", "@eaDir"})  # copies and thumbnails written by macOS and Synology
IGNORED_FILES = frozenset({"desktop.ini", "thumbs.db"})
MAX_CAPTION_CHARACTERS = 2**16  # in the first line of a text file
MAX_METADATA_BYTES = 2**26


@dataclass(frozen=True)
class FolderScan:
    """The items that `scan_classes` finds."""

    items: list[Path]
    """files, or folders of frames"""
    labels: list[int]
    """class of each item"""
    label_names: list[str]
    """name of each class"""
    captions: list[list[str]]
    """one or more texts per item"""


@dataclass
class Contents:
    """The files in the folders of a data set."""

    items: list[Path] = field(default_factory=list)
    """files, or folders of frames"""
    texts: dict[Path, Path] = field(default_factory=dict)
    """text files beside items, by the path of the item without its suffix"""
    described: dict[Path, list[str]] = field(default_factory=dict)
    """captions in metadata files, by the path of the item"""
    left_out: Counter[str] = field(default_factory=Counter)
    """number of ignored files, by suffix"""


def visible(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and the files in a folder, sorted, without hidden ones."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(folder / entry.name)
            else:
                files.append(folder / entry.name)
    return (
        sorted(child for child in folders if child.name not in IGNORED_FOLDERS),
        sorted(child for child in files if child.name.lower() not in IGNORED_FILES),
    )


def walk(folder: Path) -> Iterator[tuple[Path, list[Path], list[Path]]]:
    """Yield a folder and all folders below it, each with its folders and files. Links to folders are followed; a folder
    with several paths is entered once."""
    pending, visited = deque([folder]), set()
    while pending:
        current = pending.popleft()
        if (target := os.path.realpath(current)) in visited:
            continue
        visited.add(target)
        folders, files = visible(current)
        for child in folders:
            if child.is_symlink():
                pending.append(child)
            else:
                pending.appendleft(child)
        yield current, folders, files


def scan_classes(folder: Path, suffixes: Collection[str], kind: str, *, frame_folders: bool = False) -> FolderScan:
    """Find the files with these suffixes: one subfolder per class, in alphabetical order; files directly in `folder`
    form one class of that name.

    frame_folders: treat a folder that has pictures, but neither videos nor folders, as one file. `ValueError` if a
    class is empty or a file has no class.
    """
    folders, files = visible(folder)
    stray = [path for path in files if path.suffix.lower() in suffixes]
    if frame_folders:
        stray += [child for child in folders if frames_in(child)]
    classes = [child for child in folders if child not in set(stray)]
    if classes and stray:
        raise ValueError(f"{printable_path(stray[0])} belongs to no class: move it into a subfolder")
    items, labels, captions = [], [], []
    root = Contents()
    if classes:
        sort_files(root, files, ())
    for label, directory in enumerate(classes or [folder]):
        contents = Contents(described=root.described, left_out=root.left_out)
        for current, subfolders, others in walk(directory):
            if frame_folders and current != folder and is_frames(subfolders, others):
                contents.items.append(current)
            else:
                sort_files(contents, others, suffixes)
        if not contents.items:
            raise ValueError(f"no {kind} ({', '.join(sorted(suffixes))}) in {printable_path(directory)}")
        contents.items.sort()
        items += contents.items
        labels += [label] * len(contents.items)
        captions += captions_of(contents, absolute(directory).name)
    report(folder, root, items)
    return FolderScan(items, labels, [absolute(child).name for child in classes or [folder]], captions)


def is_frames(folders: Sequence[Path], files: Sequence[Path]) -> bool:
    """Return True if a folder that contains these folders and files is a clip."""
    suffixes = {path.suffix.lower() for path in files}
    return not folders and not suffixes & VIDEO_SUFFIXES and bool(suffixes & FRAME_SUFFIXES)


def frames_in(folder: Path) -> list[Path]:
    """Return the pictures of a clip, ordered by the numbers in their names; an empty list if it is not a clip."""
    folders, files = visible(folder)
    frames = [path for path in files if path.suffix.lower() in FRAME_SUFFIXES] if is_frames(folders, files) else []
    return sorted(frames, key=_by_number)


def _by_number(path: Path) -> list[int | str]:
    parts = re.split(r"([0-9]+)", path.name)  # text at even indices, numbers at odd ones
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def sort_files(contents: Contents, files: Sequence[Path], suffixes: Collection[str]) -> None:
    """Add the files of a folder to the items, texts or metadata, or count them as left out."""
    for path in files:
        suffix = path.suffix.lower()
        if suffix in suffixes:
            contents.items.append(path)
        elif suffix in TEXT_SUFFIXES:
            beside = path.with_suffix("")
            if suffix == ".txt" or beside not in contents.texts:
                contents.texts[beside] = path
        elif path.name in METADATA_NAMES:
            contents.described.update(read_metadata(path))
        else:
            contents.left_out[suffix or "without a suffix"] += 1


def captions_of(contents: Contents, default: str) -> list[list[str]]:
    """Return the captions of each item: those of the text file beside it, of a metadata file, or `default`."""
    captions, used = [], set()
    for item in contents.items:
        text = contents.texts.get(item.with_suffix("")) or contents.texts.get(item)
        if text is not None:
            used.add(text)
            captions.append([read_caption(text)])
        else:
            captions.append(contents.described.get(item, [default]))
    contents.left_out.update(path.suffix.lower() for path in contents.texts.values() if path not in used)
    return captions


def report(folder: Path, contents: Contents, items: Sequence[Path]) -> None:
    """Warn about files that are left out, and about mismatches between metadata files and items."""
    if contents.left_out:
        counts = ", ".join(f"{count} {printable(suffix, 20)}" for suffix, count in contents.left_out.most_common(10))
        LOGGER.warning("left out of %s, because such files are not read here: %s", printable_path(folder), counts)
    if contents.described:
        missing, unknown = len(set(items) - set(contents.described)), len(set(contents.described) - set(items))
        if missing or unknown:
            LOGGER.warning(
                "the metadata of %s has no entry for %d files that exist, and names %d that do not",
                *(printable_path(folder), missing, unknown),
            )


def read_caption(path: Path) -> str:
    """Return the first line of a text file."""
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
            line = file.readline(MAX_CAPTION_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the caption {printable_path(path)}: {printable(error)}") from error
    if len(line) > MAX_CAPTION_CHARACTERS:
        problem = f"its first line has more than {MAX_CAPTION_CHARACTERS:,} characters"
        raise ValueError(f"cannot read the caption {printable_path(path)}: {problem}")
    if not (caption := line.strip()):
        raise ValueError(f"cannot read the caption {printable_path(path)}: its first line is empty")
    return caption


def read_metadata(path: Path) -> dict[Path, list[str]]:
    """Return the captions of a metadata file by path, from its columns `file_name` and `text` or `caption`.
    `ValueError` if a row has no such texts."""
    name = printable_path(path)
    content = read_bytes(path, MAX_METADATA_BYTES)
    captions: dict[Path, list[str]] = {}
    try:
        rows = list(_rows_of(content, path.suffix, name))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {name}: {printable(error)}") from error
    column = next((column for column in CAPTION_COLUMNS if rows and column in rows[0]), None)
    if column is None:
        LOGGER.warning("%s has no column %s: no captions are read from it", name, " or ".join(CAPTION_COLUMNS))
        return {}
    for number, (row, texts) in enumerate(
        zip(rows, as_captions((row.get(column) for row in rows), name, column), strict=True), start=1
    ):
        if (file_name := as_type_or_none(row.get("file_name"), str)) is None:
            raise ValueError(f"row {number} of {name} has no file_name")
        captions[path.parent / file_name] = texts
    return captions


def _rows_of(content: bytes, suffix: str, name: str) -> Iterator[Fields]:
    if suffix == ".csv":
        yield from csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    else:
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                yield parse_json(line, Fields, f"line {number} of {name}")


def as_captions(values: Iterable[object], source: str, column: str) -> list[list[str]]:
    """Return texts or lists of texts as lists. `ValueError` if a row has neither."""
    captions = []
    for row, value in enumerate(values):
        texts = as_type_or_none(value, list[str]) or as_type_or_none([value], list[str])
        if not texts or not all(map(str.strip, texts)):
            raise ValueError(
                f"{column} of {source} must be a text or a list of texts, got {printable(value)} in row {row}"
            )
        if max(map(len, texts)) > MAX_CAPTION_CHARACTERS:
            raise ValueError(f"{column} of {source} has more than {MAX_CAPTION_CHARACTERS:,} characters in row {row}")
        captions.append(texts)
    return captions
