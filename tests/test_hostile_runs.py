"""What the runs over hostile files call wrong is found: readers that misbehave in one way each."""

import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_runs
import pytest


def refuse(message: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        raise ValueError(message.format(folder))

    return read


def open_socket(folder: Path) -> None:
    ctypes.CDLL(None).socket(2, 2, 0)  # past Python, as FFmpeg does


def start_program(folder: Path) -> None:
    subprocess.run(["true"], check=False)


def become_program(folder: Path) -> None:
    os.execv("/bin/true", ["true"])


def work(folder: Path) -> None:
    began = time.process_time()
    while time.process_time() - began < hostile_runs.MAX_SECONDS + 0.1:
        pass


def allocate(folder: Path) -> None:
    bytes(b"x" * (hostile_runs.MAX_MIB + 50) * 2**20)


def lay(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def well_at_first(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """The first reading of each reader is of a valid file, before the process is sealed."""
    return lambda folder: None if (folder / "valid").exists() else read(folder)


WAYS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "reads": (lambda folder: None, "read", ""),
    "refuses": (refuse("cannot read {}/file"), "refused", "cannot read"),
    "two lines": (refuse("{}\nagain"), "wrong", "not one printable line"),
    "escapes": (refuse("{}\x1b[2J"), "wrong", "not one printable line"),
    "names nothing": (refuse("it is broken"), "wrong", "does not name the file"),
    "long": (refuse("{}" + "k" * 10_000), "wrong", "not one printable line"),
    "other error": (lambda folder: {}["key"], "wrong", "KeyError"),
    "exits": (lambda folder: sys.exit(2), "wrong", "SystemExit"),
    "works": (work, "wrong", "s of work"),
    "allocates": (allocate, "wrong", "MiB"),
    "socket": (open_socket, "wrong", "ended with -31"),
    "other program": (become_program, "wrong", "ended with -31"),
    "prints": (lambda folder: print("code was run"), "wrong", "code was run"),
    "program": (start_program, "wrong", "subprocess.Popen"),
}
READERS = {
    name: hostile_runs.Reader(
        cases=lambda seed, count: [("file", b"")] * count,
        valid=lambda: [("valid", b"")],
        lay=lay,
        read=well_at_first(read),
    )
    for name, (read, _, _) in WAYS.items()
}


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[hostile_runs.Readers]:
    with hostile_runs.Readers("test_hostile_runs", READERS, tmp_path) as readers:
        yield readers


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in hostile_runs.SYSTEM_CALLS, reason="needs seccomp of Linux"
)
def test_each_way_is_found(readers: hostile_runs.Readers) -> None:
    for name, (_, verdict, message) in WAYS.items():
        found = readers.judge(name, "file", b"")
        assert found[0] == verdict, (name, found)
        assert message in found[1], (name, found)
