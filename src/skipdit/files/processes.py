"""Identify the processes that own drafts and locks on disk, and lock folders."""

import errno
import fcntl
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from skipdit.files.untrusted import printable

LOGGER = logging.getLogger(__name__)

LOCK = ".skipdit.lock"
HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 120.0  # after its last heartbeat, a lock of another host (whose processes are invisible) is stale


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process on a host."""

    host: str
    """name of the host"""
    pid: int
    """process number, which the system may reuse"""
    started: int
    """start time in clock ticks after boot; 0 if unknown"""

    def __str__(self) -> str:
        return f"{self.host}-{self.pid}-{self.started}"

    @classmethod
    def parse(cls, text: str) -> "Process | None":
        match = re.fullmatch(r"([\w-]+)-(\d{1,10})-(\d{1,20})", text)
        return match and cls(host=match[1], pid=int(match[2]), started=int(match[3]))

    def has_ended(self) -> bool:
        """Return True if this host no longer runs it; always False for a process on another host."""
        if self.host != this_process().host:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        started = started_at(self.pid)
        return bool(started and self.started) and started != self.started


def started_at(pid: int) -> int:
    """Return when a process started, in clock ticks after boot (proc(5), field 22); 0 if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


def this_process() -> Process:
    host = re.sub(r"[^\w-]", "_", platform.node())[:60] or "localhost"
    return Process(host=host, pid=os.getpid(), started=started_at(os.getpid()))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, so that only one run at a time writes into it; create the folder if needed.

    `BlockingIOError` names the run that already holds it. The lock of a process that has ended is taken over, with a
    warning; so is one of another host after `STALE_SECONDS` without a heartbeat.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    handle = _take(path)
    _held.add(handle)
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        if _is_current(handle, path):  # otherwise the folder was deleted, and another run may have created it again
            path.unlink(missing_ok=True)  # while the lock is still held: see `_take`
        _held.discard(handle)
        os.close(handle)


_held: set[int] = set()  # handles of the locks of this process


def _let_go() -> None:
    """Close the handles in a forked child: otherwise a data worker would hold the lock after its parent has died."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def _take(path: Path) -> int:
    """Return a handle that holds the lock. The kernel releases it when the process ends, however it ends."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _lock(handle, path)
            if _is_current(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(this_process()).encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the previous holder has just deleted the file


def _lock(handle: int, path: Path) -> None:
    holder = Process.parse(os.pread(handle, 200, 0).decode("utf-8", "replace"))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # the lock is held, or the file system has no locks: then rely on the file's contents
        is_here = holder is not None and holder != this_process() and holder.host == this_process().host
        if error.errno == errno.EWOULDBLOCK or (holder and is_here and not holder.has_ended()):
            raise BlockingIOError(f"{printable(path.parent)} is in use {_by(holder)}: give another --out") from error
    if holder is None or holder == this_process():
        return
    if not holder.has_ended() and holder.host != this_process().host:
        silent = time.time() - os.fstat(handle).st_mtime
        if silent < STALE_SECONDS:
            raise BlockingIOError(
                f"{printable(path.parent)} is in use {_by(holder)}: give another --out; if that run has ended, wait "
                f"{STALE_SECONDS - silent:.0f} s or delete {printable(path)}"
            )
    LOGGER.warning("taking over the lock of %s: the run %s has ended", printable(path.parent), _by(holder))


def _by(holder: Process | None) -> str:
    return f"by process {holder.pid} on {holder.host}" if holder else "by another process"


def _is_current(handle: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
