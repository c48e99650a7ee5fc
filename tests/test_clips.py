"""Clips from everywhere, broken ones named or left out."""

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

import skipdit.data.clips
from skipdit.data.clips import ClipConfig, open_clips
from skipdit.data.videos import UnreadableVideo, write_gif, write_mp4

RED, BLUE = (255, 0, 0), (0, 0, 255)


def fading(color: tuple[int, ...], num_frames: int = 8, height: int = 32, width: int = 48) -> np.ndarray:
    """From black to the colour."""
    steps = np.linspace(0, 1, num_frames)[:, None, None, None]
    return (np.broadcast_to(np.array(color), (num_frames, height, width, 3)) * steps).round().astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("cat", RED), ("ant", BLUE)):
        write_mp4(tmp_path / "set" / name / "0.mp4", fading(color), 8)
        write_gif(tmp_path / "set" / name / "1.gif", fading(color), 8)
    return tmp_path / "set"


def webp(frames: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    first, *others = map(Image.fromarray, frames)
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=100, lossless=True)
    return buffer.getvalue()


def test_the_bundled_animated_emoji() -> None:
    clips = open_clips(ClipConfig())
    assert (len(clips), len(clips.label_names)) == (726, 56)
    assert clips.label_names == sorted(clips.label_names)
    pixels, label = clips[2]
    assert pixels.shape == (16, 3, 64, 64)
    assert clips.captions[2][0] == "rainbow"
    assert label == clips.labels[2] == clips.label_names.index("sky-weather")
    assert pixels[:, :, 0, 0].min() > 0.9  # on white, but for the compression
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert (pixels[1:] - pixels[:-1]).abs().mean(dim=(1, 2, 3)).min() > 0.01  # it moves

    coarse = open_clips(ClipConfig(num_frames=8, frame_interval=2, num_pictures=8))
    joint, labels = coarse[2]
    assert joint.shape == (16, 3, 64, 64)
    assert torch.equal(joint[:8], pixels[::2])
    assert isinstance(labels, torch.Tensor)
    assert labels.dtype == torch.int64
    assert labels.shape == (9,)
    assert labels[0] == label


def test_each_picture_comes_from_another_clip_with_its_class(tmp_path: Path) -> None:
    """Frame f of clip c has the shade 40 c + 5 f, and clip c is the only one of its class."""
    rows = [
        webp(np.array([[[[40 * clip + 5 * frame] * 3] * 8] * 8 for frame in range(4)], np.uint8)) for clip in range(6)
    ]
    parquet.write_table(pa.table({"clip": rows, "label": list(range(6))}), tmp_path / "set.parquet")
    config = ClipConfig(source=str(tmp_path / "set.parquet"), image_size=8, num_frames=4, num_pictures=3)
    clips = open_clips(config)
    torch.manual_seed(1)
    seen = set()
    for index in range(6):
        pixels, labels = clips[index]
        assert isinstance(labels, torch.Tensor)
        shades = ((pixels[:, 0, 0, 0] + 1) * 127.5).round().long()
        assert shades[:4].tolist() == [40 * index + 5 * frame for frame in range(4)]
        assert (shades // 40).tolist()[4:] == labels[1:].tolist()
        assert len({index, *labels[1:].tolist()}) == 4
        seen.add(tuple((labels[1:] - index).remainder(6).tolist()))
        torch.manual_seed(index)
        assert torch.equal(open_clips(config)[index][0], pixels)
    assert len(seen) > 1
    assert torch.equal(clips[-1][0], clips[5][0])
    with pytest.raises(IndexError):
        clips[6]
    many = open_clips(ClipConfig(source=config.source, image_size=8, num_frames=2, num_pictures=9))
    assert many[0][0].shape == (11, 3, 8, 8)


def test_a_folder_has_one_class_a_subfolder(folder: Path) -> None:
    (folder / "cat" / "0.txt").write_text("a red cat\n")
    clips = open_clips(ClipConfig(source=str(folder), image_size=16, num_frames=4, frame_interval=2))
    assert clips.label_names == ["ant", "cat"]
    assert clips.labels == [0, 0, 1, 1]
    assert clips.captions == [("ant",), ("ant",), ("a red cat",), ("cat",)]
    for index, channel in ((0, 2), (1, 2), (2, 0), (3, 0)):
        pixels, label = clips[index]
        assert label == clips.labels[index]
        assert pixels.shape == (4, 3, 16, 16)
        wanted = torch.linspace(-1, 1, 8)[::2]
        torch.testing.assert_close(pixels[:, channel, 8, 8], wanted, atol=0.05, rtol=0)
        assert pixels[:, 1].max() < -0.9


@pytest.mark.parametrize("broken", ["bad.mp4", "bad.gif", "short.gif"])
def test_a_broken_video_is_named_or_left_out(folder: Path, broken: str, caplog: pytest.LogCaptureFixture) -> None:
    if broken == "short.gif":
        write_gif(folder / "cat" / broken, fading(RED, 7), 8)
    else:
        (folder / "cat" / broken).write_bytes(b"GIF89a not a video")
    config = ClipConfig(source=str(folder), image_size=16, num_frames=8)
    with pytest.raises(UnreadableVideo, match=broken):
        open_clips(config)
    with caplog.at_level(logging.WARNING):
        clips = open_clips(ClipConfig(source=str(folder), image_size=16, num_frames=8, on_broken="skip"))
    assert clips.labels == [0, 0, 1, 1]
    assert clips[3][0][-1, 0].min() > 0.9
    assert len(caplog.records) == 1
    assert broken in caplog.text
    assert "\n" not in caplog.records[0].getMessage()


def test_labels_stay_right_behind_a_clip_that_is_left_out(folder: Path) -> None:
    (folder / "ant" / "0.mp4").write_bytes(b"nothing")
    clips = open_clips(ClipConfig(source=str(folder), image_size=16, num_frames=8, num_pictures=1, on_broken="skip"))
    assert clips.labels == [0, 1, 1]
    assert [name for (name,) in clips.captions] == ["ant", "cat", "cat"]
    for index in range(3):
        pixels, labels = clips[index]
        assert isinstance(labels, torch.Tensor)
        assert (pixels[7, 0].mean() > pixels[7, 2].mean()) == (labels[0] == 1)


def test_a_class_that_has_lost_every_clip_is_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "bird").mkdir()
    (folder / "bird" / "0.mp4").write_bytes(b"nothing")
    config = ClipConfig(source=str(folder), image_size=16, num_frames=8, on_broken="skip")
    clips = open_clips(config)
    assert (clips.label_names, clips.labels) == (["ant", "cat"], [0, 0, 1, 1])
    assert "left out: 1 classes without a readable clip: bird" in caplog.text
    assert clips.names(2).endswith("cat/0.mp4")


def test_clips_of_any_frame_rate_move_alike(tmp_path: Path) -> None:
    for fps in (5, 10, 20):
        write_gif(tmp_path / f"{fps:02}.gif", fading(RED, 2 * fps), fps)
    by_index = open_clips(ClipConfig(source=str(tmp_path), image_size=8, num_frames=8))
    assert (by_index[0][0] - by_index[2][0]).abs().max() > 0.5
    by_time = open_clips(ClipConfig(source=str(tmp_path), image_size=8, num_frames=8, fps=5))
    for index in (1, 2):
        torch.testing.assert_close(by_time[index][0], by_time[0][0], atol=0.15, rtol=0)


def test_nothing_left_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="no readable clips in"):
        open_clips(ClipConfig(source=str(folder), image_size=16, num_frames=9, on_broken="skip"))


def test_clips_too_large_to_keep_are_decoded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "ant" / "00.mp4").write_bytes(b"nothing")
    config = ClipConfig(source=str(folder), image_size=16, num_frames=8, num_pictures=2, on_broken="skip")
    kept = open_clips(config)
    monkeypatch.setattr(skipdit.data.clips, "MAX_CACHED_BYTES", 0)
    decoded = open_clips(config)
    for (pixels, labels), (wanted, wanted_labels) in zip(decoded, kept, strict=True):
        assert torch.equal(pixels, wanted)
        assert torch.equal(torch.as_tensor(labels), torch.as_tensor(wanted_labels))
    assert len(decoded) == 4
    (folder / "ant" / "0.mp4").unlink()
    assert kept[0][0].shape == (10, 3, 16, 16)
    with pytest.raises(UnreadableVideo, match=r"0\.mp4"):
        decoded[0]


def test_a_parquet_file_of_any_encoding(tmp_path: Path, folder: Path) -> None:
    video = (folder / "cat" / "0.mp4").read_bytes()
    rows = {
        "film": [{"bytes": content, "path": None} for content in (video, webp(fading(BLUE)), b"nothing")],
        "kind": ["b", "a", "b"],
        "text": ["red", "blue", "none"],
    }
    path = tmp_path / "set.parquet"
    parquet.write_table(pa.table(rows), path)
    config = {"source": str(path), "image_size": 16, "num_frames": 8, "clip_column": "film", "label_column": "kind"}
    with pytest.raises(ValueError, match=r"cannot read the video 2 of .*set\.parquet"):
        open_clips(ClipConfig(**config))
    clips = open_clips(ClipConfig(**config, caption_column="text", on_broken="skip"))
    assert (clips.labels, clips.label_names, clips.captions) == ([1, 0], ["a", "b"], [("red",), ("blue",)])
    assert open_clips(ClipConfig(**config, on_broken="skip")).captions == [("b",), ("a",)]
    with pytest.raises(ValueError, match="no column 'clip', only film, kind, text"):
        open_clips(ClipConfig(source=str(path), label_column="kind"))


@pytest.mark.parametrize("on_broken", ["refuse", "skip"])
@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1, 2], "int64"),
        (["a.mp4", "b.mp4"], "string"),
        ([[b"a"], [b"b"]], "list<"),
        ([{"path": "a.mp4"}, {"path": "b.mp4"}], "struct<path: string>"),
        (pa.nulls(2), "null"),
    ],
)
def test_a_column_that_holds_no_clips_is_named(values: Any, found: str, on_broken: Any, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"clip": values, "label": ["a", "b"]}), tmp_path / "set.parquet")
    config = ClipConfig(source=str(tmp_path / "set.parquet"), num_frames=2, on_broken=on_broken)
    with pytest.raises(ValueError, match=rf"set\.parquet: clip must contain bytes or \{{bytes, path\}}, got {found}"):
        open_clips(config)


def test_sources_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        open_clips(ClipConfig(source=str(tmp_path / "none.parquet")))
    with pytest.raises(ValueError, match=r"'emoji' is neither emoji-clips, a folder nor a \.parquet file"):
        open_clips(ClipConfig(source="emoji"))
    with pytest.raises(ValueError, match="has its own captions"):
        open_clips(ClipConfig(caption_column="text"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no videos \(\.3gp, .*\) in"):
        open_clips(ClipConfig(source=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"frame_interval": -1}, "frame_interval must be at least 1, got -1"),
        ({"fps": 0.0}, "fps must be above 0, got 0.0"),
        ({"fps": float("nan")}, "fps must be finite, got nan"),
        ({"fps": float("inf")}, "fps must be finite, got inf"),
        ({"num_pictures": -1}, "num_pictures must be at least 0, got -1"),
        ({"on_broken": "ignore"}, "on_broken must be one of refuse, skip, got 'ignore'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipConfig(**values)
