"""Whatever a file holds: it is read, or refused in one line that names it; fast, in little memory, alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hostile_media as hostile
import pytest

from skipdit.clips import ClipConfig, open_clips
from skipdit.data import DataConfig, open_pictures
from skipdit.untrusted import printable

MAX_SECONDS, MAX_WAIT, MAX_MIB = 2, 10, 1024  # seconds of work, and with those of waiting on a busy machine
SHORT_RUN = 60  # files per reader


def lay(folder: Path, reader: str, name: str, content: bytes) -> None:
    """Put a file where its reader finds it."""
    folder.mkdir()
    (folder / name).write_bytes(content)
    if reader == "streams":
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        (folder / "dataset_info.json").write_text("{}")
    if reader == "texts":
        (folder / "0.png").write_bytes(hostile.png(8, 8))


def read(reader: str, folder: Path) -> object:
    """Open all that a reader finds there."""
    if reader == "videos":
        return open_clips(ClipConfig(source=str(folder), num_frames=4, image_size=16))
    column = "text" if reader == "tables" else None
    return open_pictures(DataConfig(source=str(folder), image_size=16, caption_column=column))


def memory(which: str, *, forget: bool = False) -> int:
    """What this process has (VmRSS), or the most that it had (VmHWM) since that was forgotten, in MiB; proc(5)."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) // 1024


def check(reader: str, folder: Path) -> str | None:
    """Read what is there. Return what is wrong with how that ended, None if nothing is."""
    before, start, start_work = memory("VmRSS", forget=True), time.monotonic(), time.process_time()
    try:
        read(reader, folder)
    except (ValueError, OSError) as error:
        message = str(error)
        if "\n" in message or not message.isprintable():
            return f"not one printable line: {message!r}"
        if printable(folder) not in message:
            return f"does not name the file: {message!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    seconds, work, grown = time.monotonic() - start, time.process_time() - start_work, memory("VmHWM") - before
    if seconds > MAX_WAIT or work > MAX_SECONDS or grown > MAX_MIB:
        return f"{seconds:.1f} s, {work:.1f} s of work, {grown} MiB"
    return None


@pytest.mark.parametrize("reader", hostile.VALID)
def test_what_the_damaged_files_are_made_of_is_read(reader: str, tmp_path: Path) -> None:
    for name, content in hostile.VALID[reader]():
        lay(tmp_path / name, reader, name, content)
        read(reader, tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux says it")
@pytest.mark.parametrize("reader", hostile.READERS)
def test_every_file_is_read_or_refused_in_one_line(reader: str, tmp_path: Path) -> None:
    """In a process of its own, that starts no program and opens no socket."""
    names = {}
    for number, (name, content) in enumerate(hostile.READERS[reader](0, SHORT_RUN)):
        lay(tmp_path / f"set_{number:04}", reader, name, content)
        names[f"set_{number:04}"] = ascii(name)
    code = """
import logging, sys
from pathlib import Path
from test_hostile_media import check
import datasets, pyarrow.parquet, av
def alone(event, arguments):
    if event in ("socket.connect", "socket.bind", "subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        print(event, arguments)
sys.addaudithook(alone)
logging.disable()
for folder in sorted(Path(sys.argv[2]).iterdir()):
    if (wrong := check(sys.argv[1], folder)) is not None:
        print(folder.name, wrong)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    command = [sys.executable, "-c", code, reader, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert [(names.get(line[:8]), line) for line in result.stdout.splitlines()] == []
