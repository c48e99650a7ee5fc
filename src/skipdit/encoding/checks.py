"""What is checked about a source before it is encoded: that it is the same one, and that its captions fit."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from skipdit.data.folders import walk
from skipdit.files.untrusted import open_regular
from skipdit.text import MAX_PROMPT_TOKENS, check_prompt, load_encoder

COMPARED = 4096  # bytes at both ends of a file


def digest_of(source: str, files: Sequence[Path], contents: object) -> str:
    """Return a SHA-256 of some contents and of the names, sizes and both ends of the files that they are from, wherever
    these are. Without files, or if they are not of this machine, the name of the source stands for them."""
    root = Path(source)
    stamps: list[list[object]] = [[source]]
    if files and root.exists():
        stamps = [stamp for file in files for stamp in _stamps(file, root)]
    return hashlib.sha256(json.dumps([stamps, contents]).encode()).hexdigest()


def files_in(path: Path) -> list[Path]:
    """Return a file, or all files in a folder in a fixed order."""
    return sorted(file for _, _, files in walk(path) for file in files) if path.is_dir() else [path]


def _stamps(path: Path, root: Path) -> Iterator[list[object]]:
    for file in files_in(path):
        name = (file.relative_to(root) if root in file.parents else Path(file.name)).as_posix()
        try:
            with open_regular(file) as opened:
                size = opened.seek(0, os.SEEK_END)
                opened.seek(0)
                checksum = zlib.crc32(opened.read(COMPARED))
                opened.seek(max(size - COMPARED, 0))
                checksum = zlib.crc32(opened.read(COMPARED), checksum)
        except (OSError, ValueError):  # what reads it will say so
            yield [name]
        else:
            yield [name, size, checksum]


def check_captions(captions: Sequence[Sequence[str]], names: Callable[[int], str]) -> None:
    """Raise `ValueError` if a caption has too many tokens or is not a text. names: returns what errors call an item."""
    for index, variants in enumerate(captions):
        for caption in variants:
            try:
                check_prompt(caption)
            except ValueError as error:
                raise ValueError(f"{error}: it is a caption of {names(index)}") from error
    texts = list(dict.fromkeys(caption for variants in captions for caption in variants))
    lengths = dict(zip(texts, load_encoder().count_tokens(texts), strict=True))
    longest = [max(map(lengths.__getitem__, variants)) for variants in captions]
    too_long = [index for index, length in enumerate(longest) if length > MAX_PROMPT_TOKENS]
    if too_long:
        others = f"; {len(too_long) - 1} more items have too long ones" if too_long[1:] else ""
        raise ValueError(
            f"a caption of {names(too_long[0])} has {longest[too_long[0]]} tokens, at most {MAX_PROMPT_TOKENS} are "
            f"allowed{others}"
        )
