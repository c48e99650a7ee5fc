"""Whatever a file holds: it is read, or refused in one line that names it; fast, in little memory, alone."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import hostile_media as hostile
import hostile_runs
import pytest

from skipdit.data.clips import ClipConfig, open_clips
from skipdit.data.pictures import DataConfig, open_pictures


def lay(reader: str, folder: Path, name: str, content: bytes) -> None:
    """Put a file where its reader finds it."""
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


READERS = {
    name: hostile_runs.Reader(
        cases=hostile.READERS[name], valid=hostile.VALID[name], lay=partial(lay, name), read=partial(read, name)
    )
    for name in hostile.READERS
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hostile_runs.Readers]:
    with hostile_runs.Readers("test_hostile_media", READERS, tmp_path_factory.mktemp("media")) as readers:
        yield readers


@pytest.mark.parametrize("reader", READERS)
def test_what_the_damaged_files_are_made_of_is_read(reader: str, tmp_path: Path) -> None:
    for name, content in hostile.VALID[reader]():
        (tmp_path / name).mkdir()
        lay(reader, tmp_path / name, name, content)
        read(reader, tmp_path / name)


@pytest.mark.timeout(0)
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux says it")
@pytest.mark.parametrize("reader", READERS)
def test_every_file_is_read_or_refused_in_one_line(reader: str, readers: hostile_runs.Readers) -> None:
    assert hostile_runs.run(readers, reader) == []
