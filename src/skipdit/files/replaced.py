"""Which files of others a new folder replaces where that was asked for: those of its names, and its weights' old
shards."""

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

# `save_pretrained` of diffusers: one file, or shards with an index
WEIGHTS = re.compile(r"(.+?)(?:-[0-9]{5}-of-[0-9]{5}\.safetensors|\.safetensors(?:\.index\.json)?)")


def is_any(name: str, patterns: Iterable[str]) -> bool:
    """Return True if a path matches one of the patterns, folder by folder: `*` does not match a slash."""
    parts = name.split("/")
    return any(
        len(parts) == len(pattern.split("/")) and all(map(fnmatchcase, parts, pattern.split("/")))
        for pattern in patterns
    )


def is_replaced(name: str, new: Path) -> bool:
    """Return True if a new folder has a file of this name, or other files of the same weights, with which an old shard
    or index must not mix."""
    path = new / name
    if os.path.lexists(path):
        return True
    weights = WEIGHTS.fullmatch(path.name)
    if weights is None or not path.parent.is_dir():
        return False
    others = [WEIGHTS.fullmatch(child.name) for child in path.parent.iterdir()]
    return any(other is not None and other[1] == weights[1] for other in others)
