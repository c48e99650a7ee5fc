"""Files and folders appear whole or not at all, and are replaced only where a marker says that they are ours.

The marker, a file `skipdit.json`, says which kind of run wrote which files of a folder, and their SHA-256. What it does
not list belongs to somebody else and stays where it is.
"""

import errno
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from skipdit.processes import Process, locked, this_process
from skipdit.untrusted import open_regular, printable, read_bytes, read_json

LOGGER = logging.getLogger(__name__)

MARKER = "skipdit.json"
GROWING = "appended to"  # in a marker, instead of the digest of a file that is still written
DRAFT = ".skipdit-draft-"  # then the process, a dot and a token: see `_draft_name`
MAX_NAMED = 5  # files in a message
SILENT_SECONDS = 24 * 3600.0  # in which a draft of another host has not changed: nobody works on it any more

_live_drafts: set[str] = set()


class Marker(TypedDict):
    """skipdit: its version. files: by the kind of run that wrote them, relative paths and their SHA-256."""

    skipdit: str
    files: dict[str, dict[str, str]]


# ----------------------------------------------------------------------------------------------------------------------
# One file


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a draft path with the same suffix; it replaces `path` when the block ends without an error.

    The draft is on disk before it takes its place, and has the permissions that the umask asks for.
    """
    path = absolute(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _draft(path.parent, path.suffix) as draft:
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = draft.stat().st_mode & 0o666
        yield draft
        draft.chmod(mode)  # safetensors makes its own, private file
        _sync(draft)
        draft.replace(path)
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def to_json(value: Any) -> str:
    """Return valid JSON: numbers that are not finite become null, paths text, dataclasses objects."""
    return json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Path():
            return str(value)
        case Mapping():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case _ if is_dataclass(value) and not isinstance(value, type):
            return _plain(asdict(value))
    return value


# ----------------------------------------------------------------------------------------------------------------------
# A folder that is replaced as a whole


def check_replaceable(path: Path, kind: str, overwritten: Collection[str] = (), *, even_damaged: bool = False) -> None:
    """Raise `FileExistsError` unless there is nothing at `path`, an empty folder, or one that a run of this kind wrote
    and nobody has changed since.

    Also where it is a link, or somebody works inside it. overwritten: patterns of files that go, whoever wrote them.
    even_damaged: files of ours go also where they have changed.
    """
    path = absolute(path)
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        return
    where = printable(path)
    if path.is_symlink() or not path.is_dir():
        raise FileExistsError(f"{where} is not a folder that skipdit wrote: give a new name")
    if path in (Path.cwd(), *Path.cwd().parents):
        raise FileExistsError(f"{where} is the folder in which this runs: give a new one")
    if kind not in read_marker(path)["files"] and not overwritten:
        shown = _list_names(child.name for child in path.iterdir())
        raise FileExistsError(f"{where} was not written by skipdit as a {kind} (it holds {shown}): give a new folder")
    check_marker(path)
    if not even_damaged:
        _check_unchanged(path, overwritten)


def _check_unchanged(path: Path, overwritten: Collection[str]) -> None:
    if changed := [name for name in _changed(path) if not _is_any(name, overwritten)]:
        what = f"{_list_names(changed)}, changed since skipdit wrote it"
        raise FileExistsError(f"{printable(path)} holds {what}: give a new folder, or --overwrite")


def check_apart(target: Path, inputs: Iterable[Path]) -> None:
    """Raise `ValueError` where an input is `target` or lies inside it: replacing that would destroy it."""
    target = target.resolve()
    for given in inputs:
        if target in (given.resolve(), *given.resolve().parents):
            raise ValueError(f"{printable(target)} holds the input {printable(given)}: give another output")


@contextmanager
def atomic_folder(
    path: Path, kind: str, *, overwritten: Collection[str] = (), even_damaged: bool = False
) -> Iterator[Path]:
    """Yield a draft folder that takes the place of `path` when the block ends without an error, with a marker in it.

    What a user put into the folder of before stays in the new one. If anything fails on the way, the folder of before
    is in its place again; a process that was killed leaves that to the next one (`clean_up`).
    kind: what the marker calls the folder. overwritten: patterns of names of files that go, and are told, also where
    somebody else wrote them. `FileExistsError`, and even_damaged, as `check_replaceable` says.
    """
    path = absolute(path)
    clean_up(path.parent)
    check_replaceable(path, kind, overwritten, even_damaged=even_damaged)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _draft(path.parent) as work:
        work.mkdir(mode=0o777)
        new = work / "new"
        new.mkdir(mode=0o777)
        yield new
        mode = new.stat().st_mode & 0o777
        names = sorted(child.relative_to(new).as_posix() for child in new.rglob("*") if child.is_file())
        digests = {name: file_digest(new / name) for name in names if name != MARKER}
        write_marker(new, {kind: digests})
        for child in new.rglob("*"):
            child.chmod(mode if child.is_dir() else mode & 0o666)
            _sync(child)
        _sync(new)
        (work / "target").write_text(path.name, encoding="utf-8")
        _sync(work / "target")
        if path.is_dir() and not even_damaged:
            _check_unchanged(path, overwritten)
        _swap(path, work, overwritten)


def _swap(path: Path, work: Path, overwritten: Collection[str] = ()) -> None:
    """Move `path` to `work/old` and `work/new` to `path`; then what is a user's from the one to the other.

    Where that fails, `_remove_draft` puts `work/old` back.
    """
    old, new, going = work / "old", work / "new", []
    if path.is_dir():
        strays = _strays(path)
        going = [name for name in (*strays, *(_changed(path) if overwritten else ())) if _is_any(name, overwritten)]
        if taken := [name for name in strays if os.path.lexists(new / name) and name not in going]:
            raise FileExistsError(f"{printable(path)} holds files that skipdit did not write: {_list_names(taken)}")
        if going:
            LOGGER.warning("overwritten in %s: %s", printable(path), ", ".join(printable(name, 60) for name in going))
        path.rename(old)
    new.rename(path)
    _sync(path.parent)
    for name in going:
        (old / name).unlink()
    _keep_strays(old, path)


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches one of the patterns, folder by folder: `*` is no path."""
    parts = name.split("/")
    return any(
        len(parts) == len(pattern.split("/")) and all(map(fnmatchcase, parts, pattern.split("/")))
        for pattern in patterns
    )


def _changed(folder: Path) -> list[str]:
    """Return the files that the marker of a folder lists and somebody has changed."""
    listed = {name: digest for names in read_marker(folder)["files"].values() for name, digest in names.items()}
    return [name for name, digest in listed.items() if (folder / name).is_file() and not _is_as(folder / name, digest)]


def _is_as(path: Path, listed: str) -> bool:
    """Whether a file is as a marker lists it."""
    return listed == GROWING or file_digest(path) in listed.split()


def _strays(folder: Path) -> list[str]:
    """Return the paths in a folder that its marker does not list, those of folders only where they are empty."""
    ours = {name for names in read_marker(folder)["files"].values() for name in names} | {MARKER}
    found = []
    for child in sorted(folder.rglob("*")):
        name = child.relative_to(folder).as_posix()
        is_folder = child.is_dir() and not child.is_symlink()
        if name not in ours and (not is_folder or not any(child.iterdir())):
            found.append(name)
    return found


def _keep_strays(old: Path, path: Path) -> None:
    if not old.is_dir():
        return
    for name in _strays(old):
        if not os.path.lexists(path / name):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(path / name)
    _remove_empty((old, *(child for child in old.rglob("*") if child.is_dir() and not child.is_symlink())))


def remove_ours(folder: Path) -> None:
    """Delete what the marker of a folder lists; the folder itself too, unless something else is in it."""
    names = [name for names in read_marker(folder)["files"].values() for name in names]
    _remove_files(folder, [*names, MARKER])
    if folder.is_dir():
        LOGGER.warning("%s stays, because it holds %s", printable(folder), _list_names(_strays(folder)))


def _remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and the folders that are empty without them."""
    folders = {folder}
    for name in names:
        (folder / name).unlink(missing_ok=True)
        folders |= {folder / parent for parent in Path(name).parents}
    _remove_empty(folders)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in sorted(folders, reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


# ----------------------------------------------------------------------------------------------------------------------
# Markers


def read_marker(folder: Path) -> Marker:
    """Return what the marker of a folder says; no files where there is none, or it is not one of ours."""
    try:
        marker = read_json(folder / MARKER, Marker, max_bytes=2**26)
    except (OSError, ValueError):
        return Marker(skipdit="", files={})
    inside = all(_is_inside(name) for names in marker["files"].values() for name in names)
    return marker if inside else Marker(skipdit="", files={})


def check_marker(folder: Path) -> None:
    """Raise `FileExistsError` where a folder has something of others in the place of a marker."""
    if os.path.lexists(folder / MARKER) and not read_marker(folder)["skipdit"]:
        raise FileExistsError(f"{printable(folder / MARKER)} is no file that skipdit wrote: give another folder")


def check_whole(folder: Path, kind: str) -> None:
    """Raise `ValueError` where a listed file is missing or has changed, or the marker is of another kind."""
    listed = read_marker(folder)["files"].get(kind)
    if listed is None:
        raise ValueError(f"{printable(folder)} has no marker of a {kind}")
    for name, digest in listed.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise ValueError(f"{printable(folder / name)} is missing or has changed")


def write_marker(folder: Path, files: Mapping[str, Mapping[str, str]]) -> None:
    """Say in a folder which files of it are ours: by the kind of run that wrote them, their digests."""
    write_text(folder / MARKER, to_json({"skipdit": version("skipdit"), "files": files}))


def _is_inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and name not in ("", ".")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# A folder that a command writes named files into


class OutputFolder:
    """A folder for the files of one kind of run.

    It replaces and removes only what an earlier run of that kind wrote and nobody has changed since; with `overwrite`,
    also other files of those names, each of which is said.

    `OSError` where nothing can be written into it, or another `skipdit.json` is there.
    """

    def __init__(self, path: Path, kind: str, *, overwrite: bool = False) -> None:
        self.path, self.kind, self.overwrite = absolute(path), kind, overwrite
        self.path.mkdir(parents=True, exist_ok=True)
        with _draft(self.path) as draft:
            draft.touch()
        check_marker(self.path)
        self._made: set[str] = set()
        for folder in {self.path, *((self.path / name).parent for name in self._listed())}:
            clean_up(folder)

    def claim(self, names: Iterable[str]) -> None:
        """Raise `FileExistsError` where one of these files is in the way: to be called before any work is done."""
        in_the_way = [name for name in names if self._is_foreign(name)]
        if in_the_way and not self.overwrite:
            raise FileExistsError(
                f"{printable(self.path)} holds {_list_names(in_the_way)}, which an earlier {self.kind} did not write: "
                "give another --out, or --overwrite"
            )
        for name in in_the_way:
            LOGGER.warning("%s is going to be overwritten", printable(self.path / name))

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Yield a draft as `atomic_file` does, and list the file in the marker. `FileExistsError` as `claim`."""
        if self._is_foreign(name) and not self.overwrite:
            self.claim([name])
        with atomic_file(self.path / name) as draft:
            yield draft
            self._list(name, file_digest(draft))

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 file, whole or not at all."""
        with self.file(name) as draft:
            draft.write_text(text, encoding="utf-8")

    def adopt(self, name: str) -> None:
        """List a file that was written in another way, as it is now."""
        self._list(name, file_digest(self.path / name))

    def grow(self, name: str) -> bool:
        """List a file that is going to be appended to, and stays ours as it grows; return whether it was ours."""
        was_ours = not self._is_foreign(name)
        self._made.add(name)
        self._write(self._listed() | {name: GROWING})
        return was_ours

    def remove_earlier(self) -> None:
        """Delete what earlier runs of this kind wrote, nobody has changed, and this run has not made anew."""
        for name in sorted(self._listed().keys() - self._made):
            if not self._is_foreign(name):
                _remove_files(self.path, [name])
        self._write({name: digest for name, digest in self._listed().items() if (self.path / name).is_file()})

    def remove(self, name: str) -> None:
        """Delete a file that a run of this kind wrote, unless somebody has changed it."""
        if not self._is_foreign(name):
            (self.path / name).unlink(missing_ok=True)
            self._made.discard(name)
            self._write({each: digest for each, digest in self._listed().items() if each != name})

    def kept(self) -> str:
        """Say which files of this run are there."""
        return (
            f"{printable(self.path)} keeps {_list_names(sorted(self._made))}" if self._made else "nothing was written"
        )

    def holds(self, name: str) -> bool:
        """Return whether a file is there as a run of this kind wrote it."""
        return os.path.lexists(self.path / name) and not self._is_foreign(name)

    def _listed(self) -> dict[str, str]:
        return read_marker(self.path)["files"].get(self.kind, {})

    def _is_foreign(self, name: str) -> bool:
        path = self.path / name
        if not os.path.lexists(path):
            return False
        return not path.is_file() or not _is_as(path, self._listed().get(name, ""))

    def _list(self, name: str, digest: str) -> None:
        """Before a draft takes its place, beside the file of before: whichever a killed run leaves is listed."""
        path, listed = self.path / name, self._listed()
        before = {file_digest(path)} if path.is_file() and not self._is_foreign(name) else set()
        self._made.add(name)
        self._write(listed | {name: " ".join(sorted({digest} | before))})

    def _write(self, listed: Mapping[str, str]) -> None:
        write_marker(self.path, {**read_marker(self.path)["files"], self.kind: dict(listed)})


@contextmanager
def output_folder(path: Path, kind: str, *, overwrite: bool = False) -> Iterator[OutputFolder]:
    """Yield the `OutputFolder` of a command, which holds its lock.

    A run that is stopped has a note of what it has written: see `skipdit.terminal.say_stopped`.
    """
    with locked(absolute(path)):
        out = OutputFolder(path, kind, overwrite=overwrite)
        try:
            yield out
        except KeyboardInterrupt as stopped:
            stopped.add_note(out.kept())
            raise


# ----------------------------------------------------------------------------------------------------------------------
# Drafts


def clean_up(folder: Path) -> None:
    """Remove the drafts of processes that are gone, and put a folder back that one of them had moved aside."""
    if not folder.is_dir():
        return
    for draft in sorted(folder.glob(f"{DRAFT}*")):
        process = Process.parse(draft.name.removeprefix(DRAFT).partition(".")[0])
        if process is not None and draft.name not in _live_drafts and _is_over(draft, process):
            _remove_draft(draft)


def _is_over(draft: Path, process: Process) -> bool:
    """Whether nobody works on a draft; of another host's process, only a long silence tells."""
    if process.host == this_process().host:
        return process == this_process() or process.has_ended()
    try:
        newest = max(path.lstat().st_mtime for path in (draft, *draft.rglob("*")))
    except OSError:  # its process has just moved a part of it
        return False
    return time.time() - newest > SILENT_SECONDS


@contextmanager
def _draft(folder: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a path that no other draft has, and remove what is there in the end."""
    draft = folder / f"{DRAFT}{this_process()}.{secrets.token_hex(4)}{suffix}"
    _live_drafts.add(draft.name)
    try:
        yield draft
    finally:
        _remove_draft(draft)
        _live_drafts.discard(draft.name)


def _remove_draft(draft: Path) -> None:
    """Remove a draft. A folder that it has moved aside goes back, or what a user put into it to the one that took its
    place; what cannot be moved stays in the draft."""
    old, target = draft / "old", draft / "target"
    if not draft.is_dir():
        draft.unlink(missing_ok=True)
        return
    if old.is_dir():
        try:
            path = draft.parent / Path(read_bytes(target, 2**12).decode()).name
            if os.path.lexists(path):
                _keep_strays(old, path)
            else:
                old.rename(path)
                LOGGER.warning("%s is in its place again, from which a failed run had moved it", printable(path))
        except (OSError, ValueError) as error:
            LOGGER.warning("%s could not be moved back, and stays: %s", printable(old), error)
            return
        if old.is_dir() and _strays(old):
            LOGGER.warning("%s holds files that skipdit did not write, and stays", printable(draft))
            return
    shutil.rmtree(draft, ignore_errors=True)


def absolute(path: Path) -> Path:
    """Return the path without `..`, so that `a/../a` is `a`."""
    return Path(os.path.abspath(path))


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk; of a folder, where the file system can do that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # fsync(2), EINVAL: some network and FUSE file systems know it of files only
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _list_names(names: Iterable[str]) -> str:
    shown = [printable(name, 60) for name in names]
    return ", ".join(shown[:MAX_NAMED]) + (f" and {len(shown) - MAX_NAMED} more" if len(shown) > MAX_NAMED else "")
