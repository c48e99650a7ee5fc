"""Read untrusted files: check sizes before anything is allocated, and JSON before it is used.

All functions raise `ValueError` or `OSError` with a one-line message that names the file.
"""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Collection
from io import BufferedReader
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

Content = TypeVar("Content")

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 64
MAX_INTEGER = 2**63 - 1  # largest int64
MAX_SHOWN = 200  # characters of untrusted text in a message


def printable(text: object, limit: int = MAX_SHOWN) -> str:
    """Return untrusted text for a message, cut to `limit` characters, with control characters escaped.

    Otherwise a terminal would obey escape sequences in a file name or a key.
    """
    whole = str(text)
    escaped = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in whole[:limit])
    return "".join(escaped) + ("…" if len(whole) > limit else "")


def printable_path(path: Path | str) -> str:
    """Return a path like `printable`, but cut at the beginning, so that the file name remains."""
    whole = str(path)
    return printable(whole) if len(whole) <= MAX_SHOWN else "…" + printable(whole[-MAX_SHOWN:])


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    `OSError` if it does not exist; `ValueError` for a FIFO (which would block forever), a device, a socket, a folder,
    or a name that is too long.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise ValueError(f"{printable(path)} is not a regular file") from error
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{printable(path)} is too long for a file name") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{printable(path)} is not a regular file")
    return os.fdopen(handle, "rb")


def check_regular(path: Path) -> None:
    """Raise the errors of `open_regular` for a file that a library will open by its path."""
    open_regular(path).close()


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the contents of a regular file; `ValueError` if it is larger than `max_bytes`."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{printable(path)} is larger than the {max_bytes:,} bytes that are read")
    return content


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hash(path: Path, sha256: str) -> None:
    """Raise `ValueError` unless a regular file has this SHA-256."""
    if (digest := file_digest(path)) != sha256:
        raise ValueError(
            f"{printable(path)} is not the file that skipdit was tested with: its SHA-256 is {digest}, not {sha256}; "
            "reinstall its package"
        )


def read_json(
    path: Path, kind: type[Content], *, max_bytes: int = MAX_JSON_BYTES, infinite: Collection[str] = ()
) -> Content:
    """Return the contents of a JSON file, checked against a type: a TypedDict, a dataclass, `Fields`, ...

    infinite: keys of objects whose values may be infinite. `OSError` if the file cannot be read. `ValueError` if it is
    too large, not JSON, of another type, nested deeper than 64, or has a duplicate key, a non-finite number or an
    integer beyond 64 bits.
    """
    return parse_json(read_bytes(path, max_bytes), kind, printable(path), infinite=infinite)


def parse_json(content: bytes, kind: type[Content], name: str, *, infinite: Collection[str] = ()) -> Content:
    """Return the contents of JSON text, with the checks of `read_json`. name: what errors call it."""

    def pairs_hook(pairs: list[tuple[str, object]]) -> dict[str, object]:
        return _check_infinite(_to_unique(pairs), infinite)

    try:
        value = json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=pairs_hook,
            parse_constant=_INFINITIES.__getitem__ if infinite else _raise_on_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply: at most {MAX_JSON_DEPTH} levels are read") from error
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{name} is not valid JSON: {printable(error)}") from error
    if _depth_exceeds(value, MAX_JSON_DEPTH):
        raise ValueError(f"{name} is nested too deeply: at most {MAX_JSON_DEPTH} levels are read")
    return as_type(value, kind, name)


def as_type(value: object, kind: type[Content], name: str) -> Content:
    """Return parsed JSON, checked against a type; keys that a TypedDict does not declare are dropped.

    name: what errors call it.
    """
    try:
        return msgspec.convert(value, type=kind, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name} is not as expected: {printable(error)}") from error


def as_type_or_none(value: object, kind: type[Content]) -> Content | None:
    """Return parsed data as `as_type` does, or `None` if it is of another type. A bool is not a number."""
    try:
        return msgspec.convert(value, type=kind, strict=True)
    except msgspec.ValidationError:
        return None


def _to_unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in unique if keys.count(key) > 1)!r} appears twice")
    return unique


_INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _check_infinite(fields: dict[str, object], allowed: Collection[str]) -> dict[str, object]:
    for key, value in fields.items() if allowed else ():
        for number in as_type_or_none(value, list) or [value]:
            if number in _INFINITIES.values() and (key not in allowed or number != number):
                raise ValueError(f"{key!r} must be finite, got {number}")
    return fields


def _raise_on_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text} is too large")
    return number


def _bounded(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) > MAX_INTEGER:
        raise ValueError(f"the number {text} is too large")
    return number


def _depth_exceeds(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        children: list[object] = []
        for parent in level:
            match parent:
                case dict():
                    children += parent.values()
                case list():
                    children += parent
        if not children:
            return False
        level = children
    return True
