"""Reading what strangers wrote: sizes are checked before anything is allocated, and JSON before it is believed.

Everything here raises `ValueError` or `OSError` with one line that names the file.
"""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

import msgspec

Content = TypeVar("Content")

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 64
MAX_INTEGER = 2**63 - 1  # of an int64
MAX_SHOWN = 200  # characters of a stranger's text in a message


def printable(text: object, limit: int = MAX_SHOWN) -> str:
    """Return a stranger's text for a message: control characters escaped, cut to `limit` characters.

    A terminal would otherwise obey the escape sequences in a file's name or a key.
    """
    shown = str(text)
    cut = shown[:limit]
    escaped = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)
    return escaped + ("…" if len(shown) > limit else "")


def printable_path(path: Path | str, limit: int = MAX_SHOWN) -> str:
    """As `printable`, but a long path is cut at its beginning: the file's name stands at its end."""
    shown = str(path)
    return printable(shown, limit) if len(shown) <= limit else "…" + printable(shown[-limit:], limit)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    `OSError` where there is none; `ValueError` for a FIFO, a device, a socket or a folder: opening the first would wait
    for ever; also for a name that no file can have.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise ValueError(f"{printable(path)} is not a regular file") from error
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{printable(path)} is too long for the name of a file") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{printable(path)} is not a regular file")
    return os.fdopen(handle, "rb")


def check_regular(path: Path) -> None:
    """As `open_regular`, for what a library opens by its name."""
    open_regular(path).close()


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file; `ValueError` where it has more than `max_bytes`."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{printable(path)} is larger than the {max_bytes:,} bytes that are read")
    return content


def check_hash(path: Path, sha256: str) -> None:
    """`ValueError` where a regular file is not the one with this SHA-256."""
    with open_regular(path) as file:
        found = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"{printable(path)} is not the file that skipdit was tested with: its SHA-256 is {found}, not {sha256}; "
            "install its package again"
        )


def read_json(
    path: Path, kind: type[Content], *, max_bytes: int = MAX_JSON_BYTES, infinite: Collection[str] = ()
) -> Content:
    """Return a JSON file's content, checked against a type: a TypedDict, a dataclass, `dict[str, Any]`, ...

    `OSError` where the file cannot be read. `ValueError` where it is too large, no JSON, of another type, nested deeper
    than 64, or holds a key twice, a number that is not finite or an integer beyond 64 bits. infinite: keys of an object
    whose values may be infinite all the same.
    """
    return parse_json(read_bytes(path, max_bytes), kind, printable(path), infinite=infinite)


def parse_json(content: bytes | str, kind: type[Content], name: str, *, infinite: Collection[str] = ()) -> Content:
    """As `read_json`, of text. name: what an error calls it."""

    def pairs_hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _check_infinite(_no_key_twice(pairs), infinite)

    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(
            text,
            object_pairs_hook=pairs_hook,
            parse_constant=_INFINITIES.__getitem__ if infinite else _refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply: at most {MAX_JSON_DEPTH} levels are read") from error
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{name} is not valid JSON: {printable(error)}") from error
    if _depth_exceeds(value, MAX_JSON_DEPTH):
        raise ValueError(f"{name} is nested too deeply: at most {MAX_JSON_DEPTH} levels are read")
    try:
        return msgspec.convert(value, type=kind, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name} is not as expected: {printable(error)}") from error


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in found if keys.count(key) > 1)!r} appears twice")
    return found


_INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _check_infinite(fields: dict[str, Any], allowed: Collection[str]) -> dict[str, Any]:
    for key, value in fields.items() if allowed else ():
        values = value if isinstance(value, list) else [value]
        for each in values:
            if isinstance(each, float) and not math.isfinite(each) and (key not in allowed or math.isnan(each)):
                raise ValueError(f"{each} is not a number that {key!r} may be")
    return fields


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number that JSON knows")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text} is too large")
    return number


def _bounded(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) > MAX_INTEGER:
        raise ValueError(f"the number {text} is too large")
    return number


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return True
