"""Files appear whole or not at all: written beside their place, then moved there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A draft path with the same suffix in the same folder; it replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(0o644)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


# a folder that holds none of these is not ours to replace
OUR_FILES = ("config.json", "model_index.json", "state.json")


def check_replaceable(path: Path) -> None:
    """`FileExistsError` where a folder of this name holds something that skipdit did not write, or one works inside
    it.
    """
    if not path.exists():
        return
    inside = path.resolve() in (Path.cwd(), *Path.cwd().parents)
    ours = path.is_dir() and (not any(path.iterdir()) or any((path / name).is_file() for name in OUR_FILES))
    if inside or not ours:
        raise FileExistsError(f"{path} holds other things and would be replaced: give a new folder")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A draft folder beside `path` that takes its place when the block ends without an error.

    `FileExistsError` as `check_replaceable` says.
    """
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    old = draft.with_name(f"{draft.name}-old")
    try:
        yield draft
        draft.chmod(0o755)
        if path.exists():
            path.rename(old)
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
