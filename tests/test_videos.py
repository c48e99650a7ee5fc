"""Videos written and read back, broken ones named, clips as pictures."""

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import read_video

from skipdit.data.videos import (
    UnreadableVideo,
    frame_grid,
    side_by_side,
    to_frames,
    write_gif,
    write_mp4,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def moving_disc(num_frames: int = 16, height: int = 64, width: int = 64) -> np.ndarray:
    """A disc that goes to the right over a smooth ground: every frame differs."""
    y, x = np.mgrid[:height, :width]
    disc = [(x - 3 * step) ** 2 + (y - height / 2) ** 2 < 150 for step in range(num_frames)]
    ground = np.stack([x * 2, y * 2, np.full_like(x, 90)], axis=-1)
    return np.stack([np.where(inside[..., None], 230, ground) for inside in disc]).astype(np.uint8)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(-10 * np.log10(((first.astype(float) - second) ** 2).mean().clip(1e-9) / 255**2))


def write_container(path: Path, frames: np.ndarray, codec: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(params=["mp4", "webm", "mkv", "mov", "avi", "gif", "webp"])
def video(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path, frames = tmp_path / f"disc.{request.param}", moving_disc()
    if request.param == "mp4":
        write_mp4(path, frames, 10)
    elif request.param == "gif":
        write_gif(path, frames, 10)
    elif request.param == "webp":
        first, *others = map(Image.fromarray, frames)
        first.save(path, save_all=True, append_images=others, duration=100, lossless=True)
    else:
        write_container(path, frames, {"webm": "libvpx-vp9", "avi": "mpeg4"}.get(request.param, "libx264"))
    return path


def test_every_format_is_read_from_the_wanted_frames(video: Path) -> None:
    frames = moving_disc()
    whole = read_video(video, 16)
    assert whole.dtype == np.uint8
    assert psnr(whole, frames) > 27
    some = read_video(video, 4, interval=3, start=2)
    assert np.array_equal(some, whole[[2, 5, 8, 11]])
    assert np.array_equal(read_video(video.read_bytes(), 16, name="disc"), whole)


def test_a_short_or_broken_video_is_named(video: Path) -> None:
    with pytest.raises(UnreadableVideo, match=rf"{video.name} is too short: frame 16 is needed \(17 frames"):
        read_video(video, 17)
    with pytest.raises(UnreadableVideo, match=r"frame 16 is needed \(3 frames, interval 8, start 0\)"):
        read_video(video, 3, interval=8)
    content = video.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"not a video " * 20):
        video.write_bytes(broken)
        with pytest.raises(UnreadableVideo, match=video.name) as raised:
            read_video(video, 16)
        assert "\n" not in str(raised.value)


def test_a_damaged_frame_is_not_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "disc.mkv"
    write_container(path, moving_disc(), "libx264")
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    content = path.read_bytes()
    middle = content.index(packets[1]) + len(packets[1]) // 2
    path.write_bytes(content[:middle] + np.random.default_rng(0).bytes(8) + content[middle + 8 :])
    with av.open(str(path)) as container:
        assert len(list(container.decode(video=0))) == 16  # FFmpeg itself conceals it
    with pytest.raises(UnreadableVideo, match=r"disc\.mkv: frame 1 is corrupt"):
        read_video(path, 16)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the video .*none\.mp4: .*No such file"):
        read_video(tmp_path / "none.mp4", 1)
    with pytest.raises(ValueError, match="start at least 0, got 0, 1 and 0"):
        read_video(b"", 0, name="none")


WRITES = """
import sys
import numpy as np
from skipdit.data.videos import write_gif, write_mp4
frames = np.load(sys.argv[1])
write_gif(sys.argv[2] + ".gif", frames, 8)
write_mp4(sys.argv[2] + ".mp4", frames, 8)
write_mp4(sys.argv[2] + "-mpeg4.mp4", frames, 8, encoders=["mpeg4"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc fills new memory as it is told")
def test_the_same_frames_are_the_same_bytes_whatever_was_in_memory(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 60, (8, 224, 424, 1), dtype=np.uint8)
    np.save(tmp_path / "frames.npy", moving_disc(8, 224, 424) // 2 + noise)
    names = [str(tmp_path / name) for name in ("first", "second")]
    for name, fill in zip(names, ("1", "170"), strict=True):
        command = [sys.executable, "-c", WRITES, str(tmp_path / "frames.npy"), name]
        subprocess.run(command, env=os.environ | {"MALLOC_PERTURB_": fill}, check=True, timeout=600)
    for suffix in (".gif", ".mp4", "-mpeg4.mp4"):
        first, second = (Path(name + suffix).read_bytes() for name in names)
        assert first == second, suffix


@pytest.mark.parametrize("encoders", [("libx264",), ("no_such_encoder", "mpeg4")])
def test_an_mp4_is_close_to_its_frames(tmp_path: Path, encoders: tuple[str, ...]) -> None:
    frames = moving_disc()
    write_mp4(tmp_path / "clip.mp4", torch.from_numpy(frames), 12.5, scale=4, encoders=encoders)
    read = read_video(tmp_path / "clip.mp4", 16)
    assert read.shape == (16, 256, 256, 3)
    assert psnr(read, frames.repeat(4, axis=1).repeat(4, axis=2)) > 36
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (float(stream.average_rate or 0), stream.frames, stream.pix_fmt) == (12.5, 16, "yuv420p")
    assert [child.name for child in tmp_path.iterdir()] == ["clip.mp4"]


def test_an_odd_side_repeats_its_end(tmp_path: Path) -> None:
    frames = moving_disc(4, 33, 47)
    write_mp4(tmp_path / "odd.mp4", frames, 29.97)
    read = read_video(tmp_path / "odd.mp4", 4)
    assert read.shape == (4, 34, 48, 3)
    assert psnr(read[:, :33, :47], frames) > 27
    assert np.abs(read[:, 33].astype(int) - read[:, 32]).mean() < 6


def test_a_video_is_turned_as_it_says(tmp_path: Path) -> None:
    path, frames = tmp_path / "phone.mp4", moving_disc(2, 64, 96)
    write_mp4(path, frames, 10)
    one = 1 << 16
    upright, turned = ([one, 0, 0, 0, one, 0], [0, one, 0, -one, 0, 0])  # ISO/IEC 14496-12, matrix of tkhd, 90 degrees
    content = path.read_bytes()
    header = content.index(b"tkhd")
    matrix = content.index(np.array(upright[:5], ">i4").tobytes(), header)
    path.write_bytes(content[:matrix] + np.array(turned[:5], ">i4").tobytes() + content[matrix + 20 :])
    read = read_video(path, 2)
    assert read.shape == (2, 96, 64, 3)
    assert psnr(read, np.rot90(frames, -1, axes=(1, 2))) > 27


def test_a_gif_loops_at_its_rate(tmp_path: Path) -> None:
    frames = moving_disc()
    write_gif(tmp_path / "clip.gif", torch.from_numpy(frames), 12, scale=2)
    durations = []
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.info["loop"] == 0
        for index in range(16):
            gif.seek(index)
            durations.append(gif.info["duration"])
        with pytest.raises(EOFError):
            gif.seek(16)
    assert set(durations) == {80, 90}
    assert sum(durations) == 1330  # 16 frames at 12 a second are 1333 ms
    assert psnr(read_video(tmp_path / "clip.gif", 16)[:, ::2, ::2], frames) > 30


def test_writers_refuse_what_makes_no_video(tmp_path: Path) -> None:
    frames = moving_disc(2)
    with pytest.raises(ValueError, match=r"must end in \.mp4, got .*clip\.avi"):
        write_mp4(tmp_path / "clip.avi", frames, 10)
    with pytest.raises(ValueError, match="got float32"):
        write_mp4(tmp_path / "clip.mp4", torch.zeros(2, 8, 8, 3), 10)
    with pytest.raises(ValueError, match=r"got uint8 \(0, 64, 64, 3\)"):
        write_gif(tmp_path / "clip.gif", frames[:0], 10)
    with pytest.raises(ValueError, match="fps must be above 0 and finite, got 0"):
        write_mp4(tmp_path / "clip.mp4", frames, 0)
    with pytest.raises(ValueError, match="at most 50, got 60"):
        write_gif(tmp_path / "clip.gif", frames, 60)
    with pytest.raises(ValueError, match="scale must be at least 1, got 0"):
        write_gif(tmp_path / "clip.gif", frames, 10, scale=0)
    with pytest.raises(ValueError, match="none of the encoders no_such_encoder"):
        write_mp4(tmp_path / "clip.mp4", frames, 10, encoders=["no_such_encoder"])
    assert list(tmp_path.iterdir()) == []


def test_gif_and_webp_do_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # as if it could not be imported
    write_gif(tmp_path / "clip.gif", moving_disc(2), 10)
    assert read_video(tmp_path / "clip.gif", 2).shape == (2, 64, 64, 3)


def one_color(color: tuple[int, int, int], num_frames: int) -> torch.Tensor:
    return (torch.tensor(color) / 255).view(1, 3, 1, 1).expand(num_frames, 3, 16, 12)


def test_bytes_of_pixels() -> None:
    clip = torch.tensor([-0.5, 0.0, 0.5, 2.0], dtype=torch.bfloat16).view(4, 1, 1, 1).expand(4, 3, 2, 5)
    frames = to_frames(clip)
    assert frames.shape == (4, 2, 5, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 0, 128, 255]


def test_a_grid_has_a_row_a_clip_in_the_order_of_time() -> None:
    colors = torch.zeros(2, 10, 3, 16, 12)
    colors[:, :, 0] = (torch.arange(10) / 9).view(10, 1, 1)
    colors[1, :, 1] = 1
    grid = np.asarray(frame_grid(colors, ["red", "and green"], 4, scale=2)).astype(int)
    tops = [int(np.argwhere((grid == color).all(axis=2))[0][0]) for color in ([255, 0, 0], [255, 255, 0])]
    assert tops[1] - tops[0] > 32  # the caption stands between them
    line = grid[tops[0] + 4]
    levels = [int(pixel[0]) for pixel in line if pixel[1] == 0]
    assert levels == [level for shown in (0, 3, 6, 9) for level in [round(255 * shown / 9)] * 24]
    assert (grid[tops[0] + 32 : tops[1]].sum(axis=2) < 300).any()
    assert frame_grid(colors, ["a", "b"], 99).width > frame_grid(colors, ["a", "b"], 4).width
    with pytest.raises(ValueError, match="got 2 and 1"):
        frame_grid(colors, ["one"])
    with pytest.raises(ValueError, match="num_frames_shown must be at least 1, got 0"):
        frame_grid(colors, ["a", "b"], 0)


def test_runs_play_side_by_side(tmp_path: Path) -> None:
    full = torch.stack([one_color(RED, 3), one_color(GREEN, 3)])
    fewer = torch.stack([one_color(BLUE, 3), one_color((255, 255, 0), 3)])
    fewer[0, 2] = one_color((0, 255, 255), 1)[0]
    frames = side_by_side({"full": full, "fewer steps": fewer}, ["a cat", "a dog"])
    assert frames.dtype == np.uint8

    def corner(frame: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int]:
        found = np.argwhere((frame == color).all(axis=2))
        assert len(found) == 32 * 24
        return int(found[0][0]), int(found[0][1])

    red, green, blue, yellow = (corner(frames[0], color) for color in (RED, GREEN, BLUE, (255, 255, 0)))
    assert red[0] == green[0] < blue[0] == yellow[0]
    assert red[1] == blue[1] < green[1] == yellow[1]
    gutter = frames[0][:, : red[1] - 4].sum(axis=2) < 300
    assert gutter[red[0] : red[0] + 32].any()  # each run has its name beside it
    assert gutter[blue[0] : blue[0] + 32].any()
    assert not gutter[red[0] + 32 : blue[0]].any()
    assert np.array_equal(frames[0], frames[1])
    assert corner(frames[2], (0, 255, 255)) == blue  # only its last frame is of another colour
    write_mp4(tmp_path / "runs.mp4", frames, 8)
    assert read_video(tmp_path / "runs.mp4", 3).shape[0] == 3
    with pytest.raises(ValueError, match="all of the same shape, got"):
        side_by_side({"full": full, "short": full[:, :2]}, ["a", "b"])
    with pytest.raises(ValueError, match="at least one run"):
        side_by_side({}, [])
    with pytest.raises(ValueError, match="got 1 and 2 clips"):
        side_by_side({"full": full}, ["a"])
