"""Runs of a reader over hostile files, in a process that can start no program and open no socket.

A file is read or refused with `ValueError` or `OSError`, in one printable line that names it, within limits of time and
memory. Anything else is wrong. `SKIPDIT_HOSTILE=500` is the long run, with so many files a reader:

    SKIPDIT_HOSTILE=500 pytest -s tests/test_hostile_media.py tests/test_hostile_weights.py
"""

import contextlib
import ctypes
import errno
import importlib
import io
import itertools
import json
import logging
import os
import platform
import resource
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from skipdit.files.untrusted import printable

MAX_SECONDS, MAX_WAIT, MAX_END = 2, 10, 120  # of work; with waiting on a busy machine; then the process is ended
MAX_MIB = 1024
MAX_CHARACTERS = 5000  # of a message, which a command cuts at 2000
LONG = int(os.environ.get("SKIPDIT_HOSTILE", "0"))
EVENTS = ("socket.__new__", "subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork", "os.forkpty")
# by machine: the number of its architecture in linux/audit.h; socket, execve, execveat in its table of system calls
SYSTEM_CALLS = {"x86_64": (0xC000003E, (41, 59, 322)), "aarch64": (0xC00000B7, (198, 221, 281))}


@dataclass(frozen=True, kw_only=True)
class Reader:
    """cases: (name, content) of so many, from a seed. valid: what they are made of. lay: puts one into a folder. read:
    reads what lies there. short: how many in the short run. times: as many more in the long run. names: whether a
    refusal must name a path."""

    cases: Callable[[int, int], Iterable[tuple[str, Any]]]
    valid: Callable[[], Iterable[tuple[str, Any]]]
    lay: Callable[[Path, str, Any], None]
    read: Callable[[Path], Any]
    short: int = 60
    times: int = 1
    names: bool = True

    @property
    def count(self) -> int:
        return LONG * self.times or self.short


# --- the process that reads -------------------------------------------------------------------------------------------


def serve(module: str) -> None:
    """Answer, a line each, what became of (reader, folder) on stdin; "warm" before the readers, "" when sealed."""
    answers, sys.stdout = sys.stdout, io.StringIO()
    readers = importlib.import_module(module).READERS
    logging.disable()
    events: list[str] = []
    start = None
    for line in sys.stdin:
        command, reader, folder = json.loads(line)
        if command == "warm":
            readers[reader].read(Path(folder))
            answer = ("warm", "")
        elif command == "seal":
            _seal(events)
            start, answer = _memory("VmRSS"), ("sealed", "")
        else:
            answer = _verdict(readers[reader], Path(folder), events, start or 0)
        print(json.dumps(answer), file=answers, flush=True)


def _verdict(reader: Reader, folder: Path, events: list[str], start: int) -> tuple[str, str]:
    _memory("VmHWM", forget=True)
    began, began_work = time.monotonic(), time.process_time()
    verdict, message = "read", ""
    try:
        reader.read(folder)
    except (ValueError, OSError) as error:
        verdict, message = "refused", str(error)
        if not message.isprintable() or len(message) > MAX_CHARACTERS:
            return "wrong", f"not one printable line: {message[:MAX_CHARACTERS]!r}"
        if reader.names and printable(folder) not in message:
            return "wrong", f"does not name the file: {message!r}"
    except BaseException as error:
        return "wrong", f"{type(error).__name__}: {str(error)[:MAX_CHARACTERS]}"
    seconds, work = time.monotonic() - began, time.process_time() - began_work
    grown = _memory("VmHWM") - start
    if seconds > MAX_WAIT or work > MAX_SECONDS or grown > MAX_MIB:
        return "wrong", f"{seconds:.1f} s, {work:.1f} s of work, {grown} MiB"
    if events or sys.stdout.getvalue():  # type: ignore[attr-defined]
        return "wrong", f"{events} {sys.stdout.getvalue()!r}"  # type: ignore[attr-defined]
    return verdict, message


def _memory(which: str, *, forget: bool = False) -> int:
    """What this process has (VmRSS), or the most that it had (VmHWM) since that was forgotten, in MiB; proc(5)."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) // 1024


def _seal(events: list[str]) -> None:
    """From here on, programs and sockets are noted when Python asks for them, and end the process when C does."""

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS:
            events.append(f"{event} {arguments}")

    sys.addaudithook(note)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if platform.machine() in SYSTEM_CALLS:
        _forbid(*SYSTEM_CALLS[platform.machine()])


def _forbid(architecture: int, numbers: tuple[int, ...]) -> None:
    """End the process at these system calls: seccomp(2) with a filter as in linux/filter.h."""
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K
    kill, allow = 0x80000000, 0x7FFF0000  # SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ALLOW
    filters = [(load, 0, 0, 4), (equal, 0, len(numbers) + 1, architecture), (load, 0, 0, 0)]
    filters += [(equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    filters += [(give, 0, 0, allow), (give, 0, 0, kill)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in filters))
    program = ctypes.create_string_buffer(struct.pack("HP", len(filters), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    if prctl(38, 1, None, 0, 0) or prctl(22, 2, ctypes.addressof(program), 0, 0):  # no new privileges, filter
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.EACCES, errno.EPERM):  # no seccomp here: the hook must do
            raise OSError(number, os.strerror(number))


# --- the process that asks --------------------------------------------------------------------------------------------


class Readers:
    """The readers of a test module, in a process of their own."""

    def __init__(self, module: str, readers: dict[str, Reader], folder: Path) -> None:
        self.module, self.readers, self.folder = module, readers, folder
        self.numbers = itertools.count()
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def judge(self, reader: str, name: str, content: object) -> tuple[str, str]:
        """What became of it: "read", "refused" or "wrong", and the message."""
        if self.process is None:
            self._start()
        return self._ask("check", reader, name, content)

    def _start(self) -> None:
        paths = [str(Path(__file__).parent), *filter(None, sys.path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        code = f"import hostile_runs; hostile_runs.serve({self.module!r})"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with (self.folder / "stderr.txt").open("wb") as errors:
            self.process = subprocess.Popen([sys.executable, "-c", code], stderr=errors, env=environment, **pipes)
        for reader, found in self.readers.items():
            name, content = next(iter(found.valid()))
            assert self._ask("warm", reader, name, content)[0] == "warm", self._errors()
        assert self._ask("seal", "", "", None)[0] == "sealed", self._errors()

    def _ask(self, command: str, reader: str, name: str, content: object) -> tuple[str, str]:
        folder = self.folder / f"set_{next(self.numbers):05}"
        if reader:
            folder.mkdir()
            self.readers[reader].lay(folder, name, content)
        try:
            return self._answer(json.dumps([command, reader, str(folder)]))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _answer(self, line: str) -> tuple[str, str]:
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
        if not select.select([process.stdout], [], [], MAX_END)[0]:
            self._end()
            return "wrong", f"no end in {MAX_END} s"
        if not (answer := process.stdout.readline()):
            self._end()
            return "wrong", f"ended with {process.returncode} {self._errors()}"
        verdict, message = json.loads(answer)
        return verdict, message

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = None

    def _errors(self) -> str:
        return (self.folder / "stderr.txt").read_text(errors="replace")[-MAX_CHARACTERS:]


@dataclass
class Totals:
    read: int = 0
    refused: int = 0
    wrong: int = 0


ALL_TOTALS: dict[str, Totals] = {}


def run(readers: Readers, reader: str) -> list[str]:
    """Judge all files of a reader and count them; what is wrong with which."""
    found = readers.readers[reader]
    totals, wrong = ALL_TOTALS.setdefault(reader, Totals()), []
    for name, content in itertools.islice(found.cases(0, found.count), found.count):
        verdict, message = readers.judge(reader, name, content)
        setattr(totals, verdict, getattr(totals, verdict) + 1)
        if verdict == "wrong":
            wrong.append(f"{name!a}: {message}")
    return wrong


def table() -> list[str]:
    """The totals as rows."""
    rows = [(name, each.read + each.refused + each.wrong, each) for name, each in ALL_TOTALS.items()]
    sums = Totals(
        *(sum(getattr(each, field) for each in ALL_TOTALS.values()) for field in ("read", "refused", "wrong"))
    )
    rows.append(("all", sums.read + sums.refused + sums.wrong, sums))
    return [
        "| reader | files | read | refused | wrong |",
        "|---|---|---|---|---|",
        *(f"| {name} | {files:,} | {each.read:,} | {each.refused:,} | {each.wrong:,} |" for name, files, each in rows),
    ]
