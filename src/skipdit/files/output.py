"""Write files and folders whole or not at all, and replace only those that a marker lists as ours.

The marker, a file `skipdit.json`, lists the files that each kind of run wrote into a folder, with their SHA-256. Files
that it does not list are not ours and are left alone.
"""

import errno
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
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

from skipdit.files.processes import Process, locked, this_process
from skipdit.files.replaced import is_any, is_replaced
from skipdit.files.untrusted import file_digest, printable, read_bytes, read_json

LOGGER = logging.getLogger(__name__)

MARKER = "skipdit.json"
GROWING = "appended to"  # in a marker, in place of the digest of a file that is still being written
DRAFT = ".skipdit-draft-"  # followed by the process, a dot and a token: see `_draft`
MAX_NAMED = 5  # files named in one message
SILENT_SECONDS = 24 * 3600.0  # a draft of another host is considered abandoned after this long without a change

_live_drafts: set[str] = set()


class Marker(TypedDict):
    """Contents of `skipdit.json`."""

    skipdit: str
    """version of skipdit that wrote it"""
    files: dict[str, dict[str, str]]
    """SHA-256 by relative path, by the kind of run that wrote the files"""


# ----------------------------------------------------------------------------------------------------------------------
# One file


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a draft path with the same suffix; the draft replaces `path` when the block ends without an error.

    It is synced to disk first, and gets the permissions that the umask implies.
    """
    path = absolute(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _draft(path.parent) as work:
        work.mkdir(mode=0o777)  # for what a library writes beside the draft: safetensors has a temporary file there
        draft = work / f"new{path.suffix}"
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = draft.stat().st_mode & 0o666
        yield draft
        draft.chmod(mode)  # safetensors replaces the draft by a file that only its owner can read
        _sync(draft)
        draft.replace(path)
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def to_json(value: object) -> str:
    """Return valid JSON: non-finite numbers become null, paths become strings, dataclasses become objects."""
    return json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Path():
            return str(value)
        case Mapping():
            return {str(key): _plain(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_plain(entry) for entry in value]
        case _ if is_dataclass(value) and not isinstance(value, type):
            return _plain(asdict(value))
    return value


# ----------------------------------------------------------------------------------------------------------------------
# A folder that is replaced as a whole


def check_replaceable(path: Path, kind: str, overwritten: Collection[str] = (), *, even_damaged: bool = False) -> None:
    """Raise `FileExistsError` unless `path` is free, an empty folder, or one that a run of this kind wrote and that has
    not changed since. A link, or a folder that contains the working directory, is an error too.

    overwritten: patterns of files that may be replaced whoever wrote them. even_damaged: accept changed files of ours.
    """
    path = absolute(path)
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        return
    name = printable(path)
    if path.is_symlink() or not path.is_dir():
        raise FileExistsError(f"{name} is not a folder that skipdit wrote: give a new name")
    if path in (Path.cwd(), *Path.cwd().parents):
        raise FileExistsError(f"{name} contains the working directory: give a new folder")
    if kind not in read_marker(path)["files"] and not overwritten:
        children = _list_names(child.name for child in path.iterdir())
        raise FileExistsError(
            f"{name} was not written by skipdit as a {kind} (it contains {children}): give a new folder"
        )
    check_marker(path)
    if not even_damaged:
        _check_unchanged(path, overwritten)


def _check_unchanged(path: Path, overwritten: Collection[str]) -> None:
    if changed := [name for name in _changed(path) if not is_any(name, overwritten)]:
        names = _list_names(changed)
        raise FileExistsError(
            f"{printable(path)} contains {names}, changed since skipdit wrote it: give a new folder, or --overwrite"
        )


def check_apart(target: Path, inputs: Iterable[Path]) -> None:
    """Raise `ValueError` if an input is `target` or lies inside it: replacing `target` would destroy the input."""
    target = target.resolve()
    for source in inputs:
        if target in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"{printable(target)} contains the input {printable(source)}: give another output")


@contextmanager
def atomic_folder(
    path: Path, kind: str, *, overwritten: Collection[str] = (), even_damaged: bool = False
) -> Iterator[Path]:
    """Yield a draft folder that replaces `path`, with a marker in it, when the block ends without an error.

    Files of the user in the previous folder are moved to the new one. If anything fails, the previous folder is
    restored; if the process is killed, the next run restores it (`clean_up`).

    kind: what the marker calls the folder. overwritten: patterns of files to replace, with a warning, whoever wrote
    them; those that the new folder does not replace stay (`is_replaced`). even_damaged and `FileExistsError`: see
    `check_replaceable`.
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
    """Move `path` to `work/old` and `work/new` to `path`, then the user's files from the former to the latter.

    If that fails, `_remove_draft` moves `work/old` back.
    """
    old, new, doomed = work / "old", work / "new", []
    if path.is_dir():
        strays = _strays(path)
        doomed = [name for name in strays if is_replaced(name, new)] + (_changed(path) if overwritten else [])
        doomed = [name for name in doomed if is_any(name, overwritten)]
        if conflicts := [name for name in strays if os.path.lexists(new / name) and name not in doomed]:
            raise FileExistsError(
                f"{printable(path)} contains files that skipdit did not write: {_list_names(conflicts)}"
            )
        if doomed:
            LOGGER.warning("overwritten in %s: %s", printable(path), ", ".join(printable(name, 60) for name in doomed))
        path.rename(old)
    new.rename(path)
    _sync(path.parent)
    for name in doomed:
        (old / name).unlink()
    _keep_strays(old, path)


def _changed(folder: Path) -> list[str]:
    """Return the files listed in a folder's marker that have changed since they were listed."""
    listed = {name: digest for names in read_marker(folder)["files"].values() for name, digest in names.items()}
    return [name for name, entry in listed.items() if (folder / name).is_file() and not _is_same(folder / name, entry)]


def _is_same(path: Path, entry: str) -> bool:
    """Return True if a file matches its entry in a marker."""
    return entry == GROWING or file_digest(path) in entry.split()


def _strays(folder: Path) -> list[str]:
    """Return the files and empty folders that a folder's marker does not list."""
    ours = {name for names in read_marker(folder)["files"].values() for name in names} | {MARKER}
    strays = []
    for child in sorted(folder.rglob("*")):
        name = child.relative_to(folder).as_posix()
        is_folder = child.is_dir() and not child.is_symlink()
        if name not in ours and (not is_folder or not any(child.iterdir())):
            strays.append(name)
    return strays


def _keep_strays(old: Path, path: Path) -> None:
    if not old.is_dir():
        return
    for name in _strays(old):
        if not os.path.lexists(path / name):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(path / name)
    _remove_empty((old, *(child for child in old.rglob("*") if child.is_dir() and not child.is_symlink())))


def remove_ours(folder: Path) -> None:
    """Delete the files listed in a folder's marker, and the folder itself unless it contains anything else."""
    names = [name for names in read_marker(folder)["files"].values() for name in names]
    _remove_files(folder, [*names, MARKER])
    if folder.is_dir():
        LOGGER.warning("%s was kept because it contains %s", printable(folder), _list_names(_strays(folder)))


def _remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and the folders that are empty afterwards."""
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
    """Return a folder's marker, or a marker without files if there is none of ours."""
    try:
        marker = read_json(folder / MARKER, Marker, max_bytes=2**26)
    except (OSError, ValueError):
        return Marker(skipdit="", files={})
    names = [name for names in marker["files"].values() for name in names]
    is_safe = all(Path(name).parts and not Path(name).is_absolute() and ".." not in Path(name).parts for name in names)
    return marker if is_safe else Marker(skipdit="", files={})


def check_marker(folder: Path) -> None:
    """Raise `FileExistsError` if a folder has a `skipdit.json` that is not ours."""
    if os.path.lexists(folder / MARKER) and not read_marker(folder)["skipdit"]:
        raise FileExistsError(f"{printable(folder / MARKER)} was not written by skipdit: give another folder")


def check_whole(folder: Path, kind: str) -> None:
    """Raise `ValueError` if a listed file is missing or has changed, or the marker lists no run of this kind."""
    listed = read_marker(folder)["files"].get(kind)
    if listed is None:
        raise ValueError(f"{printable(folder)} has no marker for a {kind}")
    for name, digest in listed.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise ValueError(f"{printable(folder / name)} is missing or has changed")


def write_marker(folder: Path, files: Mapping[str, Mapping[str, str]]) -> None:
    """Write a folder's marker. files: see `Marker`."""
    write_text(folder / MARKER, to_json({"skipdit": version("skipdit"), "files": files}))


# ----------------------------------------------------------------------------------------------------------------------
# A folder that a command writes files into


class OutputFolder:
    """A folder for the files of one kind of run.

    Only unchanged files that an earlier run of that kind wrote are replaced or removed; with `overwrite`, other files
    of the same names too, with a warning for each. `OSError` if the folder cannot be written, or has a `skipdit.json`
    that is not ours.
    """

    def __init__(self, path: Path, kind: str, *, overwrite: bool = False) -> None:
        self.path, self.kind, self.overwrite = absolute(path), kind, overwrite
        self.path.mkdir(parents=True, exist_ok=True)
        with _draft(self.path) as draft:
            draft.touch()
        check_marker(self.path)
        self._new: set[str] = set()
        for folder in {self.path, *((self.path / name).parent for name in self._listed())}:
            clean_up(folder)

    def claim(self, names: Iterable[str]) -> None:
        """Raise `FileExistsError` if one of these files exists and is not ours. Call this before any work is done."""
        foreign = [name for name in names if self._is_foreign(name)]
        if foreign and not self.overwrite:
            raise FileExistsError(
                f"{printable(self.path)} contains {_list_names(foreign)}, which an earlier {self.kind} did not write: "
                "give another --out, or --overwrite"
            )
        for name in foreign:
            LOGGER.warning("%s will be overwritten", printable(self.path / name))

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Yield a draft like `atomic_file`, and list the file in the marker. `FileExistsError` as for `claim`."""
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
        """List a file that something else wrote, as it is now."""
        self._list(name, file_digest(self.path / name))

    def grow(self, name: str) -> bool:
        """List a file that will be appended to: it stays ours as it grows. Return True if it was ours before."""
        was_ours = not self._is_foreign(name)
        self._new.add(name)
        self._write(self._listed() | {name: GROWING})
        return was_ours

    def remove_earlier(self) -> None:
        """Delete unchanged files of earlier runs of this kind that this run has not replaced."""
        for name in sorted(self._listed().keys() - self._new):
            if not self._is_foreign(name):
                _remove_files(self.path, [name])
        self._write({name: digest for name, digest in self._listed().items() if (self.path / name).is_file()})

    def remove(self, name: str) -> None:
        """Delete a file that a run of this kind wrote, unless it has changed since."""
        if not self._is_foreign(name):
            (self.path / name).unlink(missing_ok=True)
            self._new.discard(name)
            self._write({other: digest for other, digest in self._listed().items() if other != name})

    def kept(self) -> str:
        """Return a message that names the files written by this run."""
        return f"{printable(self.path)} keeps {_list_names(sorted(self._new))}" if self._new else "nothing was written"

    def holds(self, name: str) -> bool:
        """Return True if a file exists and is unchanged since a run of this kind wrote it."""
        return os.path.lexists(self.path / name) and not self._is_foreign(name)

    def _listed(self) -> dict[str, str]:
        return read_marker(self.path)["files"].get(self.kind, {})

    def _is_foreign(self, name: str) -> bool:
        path = self.path / name
        if not os.path.lexists(path):
            return False
        return not path.is_file() or not _is_same(path, self._listed().get(name, ""))

    def _list(self, name: str, digest: str) -> None:
        """List a draft before it replaces the previous file, and that file as well: a killed run leaves one of them."""
        path, listed = self.path / name, self._listed()
        previous = {file_digest(path)} if path.is_file() and not self._is_foreign(name) else set()
        self._new.add(name)
        self._write(listed | {name: " ".join(sorted({digest} | previous))})

    def _write(self, listed: Mapping[str, str]) -> None:
        write_marker(self.path, {**read_marker(self.path)["files"], self.kind: dict(listed)})


@contextmanager
def output_folder(path: Path, kind: str, *, overwrite: bool = False) -> Iterator[OutputFolder]:
    """Yield the `OutputFolder` of a command while holding its lock.

    If the run is interrupted, a note on the exception names the files written: see `skipdit.terminal.say_stopped`.
    """
    with locked(absolute(path)):
        out = OutputFolder(path, kind, overwrite=overwrite)
        try:
            yield out
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(out.kept())
            raise


# ----------------------------------------------------------------------------------------------------------------------
# Drafts


def clean_up(folder: Path) -> None:
    """Remove the drafts of processes that have ended, and restore any folder that they had moved aside."""
    if not folder.is_dir():
        return
    for draft in sorted(folder.glob(f"{DRAFT}*")):
        process = Process.parse(draft.name.removeprefix(DRAFT).partition(".")[0])
        if process is not None and draft.name not in _live_drafts and _is_over(draft, process):
            _remove_draft(draft)


def _is_over(draft: Path, process: Process) -> bool:
    """Return True if no process is working on a draft any more; on another host, after `SILENT_SECONDS` of silence."""
    if process.host == this_process().host:
        return process == this_process() or process.has_ended()
    try:
        newest = max(path.lstat().st_mtime for path in (draft, *draft.rglob("*")))
    except OSError:  # its process has just moved part of it
        return False
    return time.time() - newest > SILENT_SECONDS


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """Yield a unique draft path, and remove whatever is there at the end."""
    draft = folder / f"{DRAFT}{this_process()}.{secrets.token_hex(4)}"
    _live_drafts.add(draft.name)
    try:
        yield draft
    finally:
        _remove_draft(draft)
        _live_drafts.discard(draft.name)


def _remove_draft(draft: Path) -> None:
    """Remove a draft. A folder that it had moved aside is moved back, or only the user's files in it if a new folder is
    already there; whatever cannot be moved stays in the draft."""
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
                LOGGER.warning("%s has been restored: a failed run had moved it aside", printable(path))
        except (OSError, ValueError) as error:
            LOGGER.warning("%s was kept because it could not be moved back: %s", printable(old), error)
            return
        if old.is_dir() and _strays(old):
            LOGGER.warning("%s was kept because it contains files that skipdit did not write", printable(draft))
            return
    shutil.rmtree(draft, ignore_errors=True)


def absolute(path: Path) -> Path:
    """Return the absolute path without `..`."""
    return Path(os.path.abspath(path))


def _sync(path: Path) -> None:
    """Wait until a file, or a folder where the file system supports it, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # fsync(2), EINVAL: some network and FUSE file systems sync files only
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _list_names(names: Iterable[str]) -> str:
    texts = [printable(name, 60) for name in names]
    return ", ".join(texts[:MAX_NAMED]) + (f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else "")
