"""Folders as people have them: what counts, what is left out aloud, where captions stand."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import hostile_media as hostile
import pytest
import torch
from PIL import Image

from skipdit.data import folders
from skipdit.data.clips import ClipConfig, open_clips
from skipdit.data.pictures import DataConfig, LabelledPictures, open_pictures
from skipdit.data.videos import UnreadableVideo


def put(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        for index in range(2):
            put(tmp_path / "set" / name / f"{index}.png")
    return tmp_path / "set"


def opened(folder: Path) -> LabelledPictures:
    return open_pictures(DataConfig(source=str(folder), image_size=8))


def test_what_others_leave_behind_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat/._0.png", ".DS_Store", "cat/Thumbs.db", "cat/desktop.ini"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    for name in ("cat/.ipynb_checkpoints/0.png", "__MACOSX/cat/0.png", "cat/@eaDir/0.png/small.jpg", ".cache/0.png"):
        put(folder / name)
    (folder / "cat" / "old.png").mkdir()
    pictures = opened(folder)
    assert (pictures.label_names, pictures.labels) == (["cat", "dog"], [0, 0, 1, 1])
    assert caplog.text == ""


def test_the_class_of_the_working_directory_has_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (".", "../dog/../cat"):
        monkeypatch.chdir(folder / "cat")
        pictures = opened(Path(source))
        assert (pictures.label_names, pictures.captions) == (["cat"], [("cat",)] * 2)


def test_a_class_may_be_called_as_a_picture(folder: Path) -> None:
    put(folder / "v1.png" / "0.png")
    assert opened(folder).label_names == ["cat", "dog", "v1.png"]


def test_linked_folders_are_followed_once(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "far.png")
    (folder / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "again").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "bird").symlink_to(folder / "dog")
    pictures = opened(folder)
    assert pictures.label_names == ["bird", "cat", "dog"]
    assert pictures.labels.count(0) == pictures.labels.count(2) == 2
    names = [Path(pictures.names(index)).name for index, label in enumerate(pictures.labels) if label == 1]
    assert sorted(names) == ["0.png", "0.png", "1.png", "1.png", "far.png"]


def test_many_links_cost_no_time(tmp_path: Path) -> None:
    """Two links in each of 40 folders to the next make 2^40 paths."""
    for level in range(40):
        put(tmp_path / "set" / "a" / str(level) / "0.png")
    for level in range(39):
        for name in ("x", "y"):
            (tmp_path / "set" / "a" / str(level) / name).symlink_to(tmp_path / "set" / "a" / str(level + 1))
    assert len(opened(tmp_path / "set")) == 40


def test_other_suffixes_are_read_or_counted_in_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = (folder / "cat" / "0.png").read_bytes()
    for name in ("a.jfif", "b.AVIF", "c.ppm", "d.heic", "e.heic", "f", "g.mp4"):
        (folder / "cat" / name).write_bytes(content)
    (folder / "dog" / "nobody.txt").write_text("a cat that is not there")
    assert opened(folder).labels == [0] * 5 + [1] * 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert message.endswith("because such files are not read here: 2 .heic, 1 without a suffix, 1 .mp4, 1 .txt")


@pytest.mark.parametrize("name", ["0.txt", "0.TXT", "0.caption", "0.png.txt"])
def test_a_caption_stands_beside_its_picture(folder: Path, name: str) -> None:
    (folder / "cat" / name).write_bytes("\ufeffa black cat\r\nsecond line".encode())
    assert opened(folder).captions == [("a black cat",), ("cat",), ("dog",), ("dog",)]


def test_a_txt_goes_before_other_captions(folder: Path) -> None:
    for name in ("0.caption", "0.txt", "0.TXT"):
        (folder / "cat" / name).write_text(name)
    assert opened(folder).captions[0] == ("0.txt",)


def test_a_long_caption_is_read_no_further(folder: Path) -> None:
    with (folder / "cat" / "0.txt").open("wb") as file:
        file.truncate(3 * 2**30)  # sparse
    with pytest.raises(ValueError, match=r"cannot read the caption .*0\.txt: its first line has more than 65,536"):
        opened(folder)


@pytest.mark.parametrize("name", ["0.txt", "metadata.jsonl", "metadata.csv"])
def test_a_fifo_is_refused(folder: Path, name: str) -> None:
    os.mkfifo(folder / "cat" / name)
    with pytest.raises(ValueError, match=rf"{name} is not a regular file"):
        opened(folder)


JSON_LINES = '{"file_name": "0.png", "%s": "a red thing"}\n\n{"file_name": "./1.png", "%s": ["another", "two"]}\n'


@pytest.mark.parametrize("column", ["text", "caption"])
def test_captions_of_a_metadata_file(folder: Path, column: str) -> None:
    (folder / "cat" / "metadata.jsonl").write_text(JSON_LINES % (column, column))
    (folder / "dog" / "metadata.csv").write_text(f'file_name,{column}\r\n0.png,"a, b"\r\n1.png,c\r\n')
    captions = opened(folder).captions
    assert captions == [("a red thing",) * 2, ("another", "two"), ("a, b",) * 2, ("c",) * 2]


def test_metadata_of_the_whole_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it leaves out and what it names too much is said; a text beside a picture goes before it."""
    (folder / "metadata.csv").write_text("file_name,text\ncat/0.png,one\ncat/1.png,two\ndog/7.png,three\n")
    (folder / "cat" / "1.txt").write_text("beside")
    assert opened(folder).captions == [("one",), ("beside",), ("dog",), ("dog",)]
    assert "has no entry for 2 files that exist, and names 1 that do not" in caplog.text


def test_metadata_without_captions_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "metadata.csv").write_text("file_name,kind\ncat/0.png,one\n")
    assert opened(folder).captions[0] == ("cat",)
    assert "has no column text or caption" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", "[" * 10**5, "line 1 of .*metadata.jsonl is nested too deeply"),
        ("metadata.jsonl", '{"text": "a"}', "row 1 of .*metadata.jsonl has no file_name"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": 3}', "text of .*metadata.jsonl must be a text"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": " "}', "text of .*metadata.jsonl must be a text"),
        ("metadata.jsonl", "[1]", "line 1 of .*metadata.jsonl is not as expected"),
        ("metadata.csv", "file_name,text\n0.png\n", "text of .*metadata.csv must be a text"),
        ("metadata.csv", "file_name,text\n0.png," + "a" * 200_000, "cannot read .*metadata.csv: field larger"),
        ("metadata.csv", "file_name,text\n0.png," + "a" * 100_000, "text of .*metadata.csv has more than 65,536"),
    ],
)
def test_metadata_that_is_none_is_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / "cat" / name).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        opened(folder)
    assert "\n" not in str(raised.value)


def test_metadata_of_any_size_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cat" / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n")
    monkeypatch.setattr(folders, "MAX_METADATA_BYTES", 10)
    with pytest.raises(ValueError, match=r"metadata\.csv is larger than the 10 bytes"):
        opened(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Clips


def put_frames(folder: Path, num_frames: int = 12) -> None:
    for index in range(num_frames):
        put(folder / f"frame_{index}.png", f"rgb({20 * index}, 0, 0)")


def shades(pixels) -> list[int]:
    return [round(float((frame[0].mean() + 1) * 127.5) / 20) for frame in pixels]


def test_a_folder_of_frames_is_a_clip(tmp_path: Path) -> None:
    for name in ("run/a", "run/b", "jump/c"):
        put_frames(tmp_path / name)
    (tmp_path / "run" / "a.txt").write_text("a red run")
    (tmp_path / "jump" / "d.gif").write_bytes(hostile.animation("GIF", hostile.moving(6)))
    config = ClipConfig(source=str(tmp_path), num_frames=6, frame_interval=1, image_size=8)
    clips = open_clips(config)
    assert (clips.label_names, clips.labels) == (["jump", "run"], [0, 0, 1, 1])
    assert clips.captions == [("jump",), ("jump",), ("a red run",), ("run",)]
    assert shades(clips[0][0]) == [0, 1, 2, 3, 4, 5]
    twice = open_clips(ClipConfig(source=str(tmp_path / "run"), num_frames=6, frame_interval=2, image_size=8))
    assert (twice.label_names, twice.labels) == (["run"], [0, 0])
    assert shades(twice[1][0]) == [0, 2, 4, 6, 8, 10]


def test_folders_of_frames_have_no_times_which_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put_frames(tmp_path / "run" / "a")
    put_frames(tmp_path / "run" / "b")
    config = ClipConfig(source=str(tmp_path), num_frames=6, image_size=8)
    plain = open_clips(config)
    assert not caplog.records
    timed = open_clips(replace(config, fps=5.0))
    assert all(torch.equal(timed[index][0], plain[index][0]) for index in range(2))
    (record,) = caplog.records
    assert "fps has no effect on 2 clips" in record.getMessage()


def test_frames_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    put_frames(tmp_path / "run" / "a")
    config = ClipConfig(source=str(tmp_path), num_frames=13, image_size=8)
    with pytest.raises(UnreadableVideo, match=r"run/a is too short: frame 12 is needed \(13 frames"):
        open_clips(config)
    (tmp_path / "run" / "a" / "frame_2.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableVideo, match=r"cannot read the picture .*frame_2\.png"):
        open_clips(config)


def test_pictures_beside_videos_are_no_clips(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = hostile.animation("GIF", hostile.moving(4))
    for name in ("a", "b"):
        put(tmp_path / name / "poster.png")
        (tmp_path / name / "0.gif").write_bytes(content)
    clips = open_clips(ClipConfig(source=str(tmp_path), num_frames=4, image_size=8))
    assert clips.labels == [0, 1]
    assert "2 .png" in caplog.text
    put_frames(tmp_path / "c")
    with pytest.raises(ValueError, match="c belongs to no class"):
        open_clips(ClipConfig(source=str(tmp_path), num_frames=4, image_size=8))
