"""Videos as people have them, and as an attacker makes them."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import av
import hostile_media as hostile
import numpy as np
import pytest
from PIL import Image
from tiny import read_video

from skipdit.data import video_files
from skipdit.data.video_files import VIDEO_SUFFIXES, demuxer_of
from skipdit.data.videos import UnreadableVideo, write_gif

FRAMES = hostile.moving(8)


def half_clear() -> list[np.ndarray]:
    """RGBA, the left half of which is clear."""
    alpha = np.zeros((24, 32, 1), np.uint8)
    alpha[:, 16:] = 255
    return [np.concatenate([frame, alpha], axis=-1) for frame in FRAMES]


def bars(clip: np.ndarray) -> list[int]:
    """How long the green bar is in each frame, in steps."""
    green = clip[:, -2].astype(int) @ np.array([-1, 2, -1]) > 200
    return [round((count - 1) / 4) for count in green.sum(axis=1)]


@pytest.mark.parametrize(
    ("codec", "pixels", "container"),
    [
        ("libvpx-vp9", "yuva420p", "webm"),
        ("libvpx", "yuva420p", "webm"),
        ("prores_ks", "yuva444p10le", "mov"),
        ("png", "rgba", "mov"),
        ("qtrle", "argb", "mov"),
        ("ffv1", "yuva420p", "matroska"),
    ],
)
def test_what_is_clear_becomes_white(codec: str, pixels: str, container: str) -> None:
    clip = read_video(hostile.video(codec, pixels, container, half_clear()), 8, name=codec)
    assert clip[:, :, :14].min() > 240
    assert np.abs(clip[:, 8:18, 18:].astype(int) - (0, 0, 220)).mean() < 8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_on_white_too(kind: str) -> None:
    options = {"disposal": 2} if kind == "GIF" else {}
    first, *others = map(Image.fromarray, half_clear())
    buffer = io.BytesIO()
    first.save(buffer, kind, save_all=True, append_images=others, duration=100, **options)
    clip = read_video(buffer.getvalue(), 3, name=kind)
    assert clip[:, :, :14].min() > 250


def test_a_default_image_is_no_frame() -> None:
    red, green, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue"))
    buffer = io.BytesIO()
    red.save(buffer, "PNG", save_all=True, append_images=[green, blue], default_image=True, duration=100)
    for fps in (None, 10):
        clip = read_video(buffer.getvalue(), 2, fps=fps, name="apng")
        assert clip[:, 0, 0].tolist() == [[0, 255, 0], [0, 0, 255]]


def cover_first() -> bytes:
    """A Matroska file whose first stream is a picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        streams = []
        for codec, pixels, frames in (("mjpeg", "yuvj420p", FRAMES[:1]), ("libx264", "yuv420p", FRAMES)):
            streams.append((container.add_stream(codec, rate=25), frames))
            streams[-1][0].height, streams[-1][0].width, streams[-1][0].pix_fmt = 24, 32, pixels
        for stream, frames in streams:
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return buffer.getvalue()


def test_a_cover_picture_is_not_the_video() -> None:
    assert bars(read_video(cover_first(), 4, name="film")) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [name for name, _ in hostile.valid_videos()])
def test_every_container_is_read_under_its_suffix(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(dict(hostile.valid_videos())[name])
    assert (tmp_path / name).suffix in VIDEO_SUFFIXES
    assert read_video(tmp_path / name, 4).shape == (4, 24, 32, 3)


def test_frames_are_taken_by_their_time() -> None:
    content = hostile.video("libx264", "yuv420p", "matroska", FRAMES, [0, 10, 20, 30, 40, 1000, 2000, 3000])
    assert bars(read_video(content, 4, name="vfr")) == [0, 1, 2, 3]
    assert bars(read_video(content, 3, fps=1, name="vfr")) == [4, 5, 6]
    assert bars(read_video(content, 3, 2, 1, fps=2, name="vfr")) == [4, 5, 6]
    with pytest.raises(UnreadableVideo, match=r"vfr is too short: frame 3 is needed \(9 frames, interval 1, start 0\)"):
        read_video(content, 9, fps=1, name="vfr")


@pytest.mark.parametrize("fps", [24, 25, 30])
@pytest.mark.parametrize("kind", ["GIF", "mp4", "matroska"])
def test_its_own_frame_rate_takes_each_frame_once(fps: int, kind: str, tmp_path: Path) -> None:
    """Though the times of GIF are rounded to 10 ms, those of Matroska to 1 ms."""
    if kind == "GIF":
        write_gif(tmp_path / "clip.gif", np.stack(FRAMES), fps)
        content = (tmp_path / "clip.gif").read_bytes()
    else:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=kind) as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.height, stream.width, stream.pix_fmt = 24, 32, "yuv420p"
            for frame in FRAMES:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        content = buffer.getvalue()
    wanted = read_video(content, 8, name=kind)
    assert np.array_equal(read_video(content, 8, fps=fps, name=kind), wanted)
    assert np.array_equal(read_video(content, 4, fps=fps / 2, name=kind), wanted[::2])
    assert np.array_equal(read_video(content, 16, fps=2 * fps, name=kind)[::2], wanted)


def test_equal_frames_of_a_gif_are_read_by_their_time(tmp_path: Path) -> None:
    write_gif(tmp_path / "clip.gif", np.stack([FRAMES[0]] * 3 + FRAMES[1:4]), 10)
    assert bars(read_video(tmp_path / "clip.gif", 6, fps=10)) == [0, 0, 0, 1, 2, 3]
    with pytest.raises(UnreadableVideo, match="too short"):
        read_video(tmp_path / "clip.gif", 6)


@pytest.mark.parametrize("content", [hostile.SDP, hostile.HLS, hostile.CONCAT, hostile.DASH, hostile.EPS])
def test_texts_that_name_other_places_are_no_videos(content: bytes) -> None:
    with pytest.raises(UnreadableVideo, match="cannot read the video film: it is not a GIF, PNG"):
        read_video(content, 1, name="film")


def test_no_socket_is_opened(tmp_path: Path) -> None:
    """FFmpeg's sockets are in its own code: what a process has open is looked at while it reads."""
    (tmp_path / "x.mp4").write_bytes(hostile.SDP)
    code = """
import os, sys, threading, time
from pathlib import Path
from skipdit.data.videos import FrameChoice, frames_of_file
def sockets():
    return [link for number in os.listdir("/proc/self/fd") if "socket" in (link := place(number))]
def place(number):
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""
seen = []
def look():
    while not done.is_set():
        seen.extend(sockets())
        time.sleep(0.01)
done = threading.Event()
watch = threading.Thread(target=look)
watch.start()
try:
    list(frames_of_file(Path(sys.argv[1]), FrameChoice(num_frames=1)))
except ValueError as error:
    print(error)
time.sleep(0.05)
done.set()
watch.join()
print(seen)
"""
    if not Path("/proc/self/fd").exists():
        pytest.skip("looks at what a process has open as Linux says it")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(tmp_path / "x.mp4")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n[]\n")
    assert "x.mp4: it is not a GIF" in result.stdout


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.mp4")
    with pytest.raises(UnreadableVideo, match=r"cannot read the video .*x\.mp4: .* is not a regular file"):
        read_video(tmp_path / "x.mp4", 1)


def test_large_frames_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = dict(hostile.valid_videos())
    monkeypatch.setattr(video_files, "MAX_FRAME_PIXELS", 24 * 32 - 1)
    monkeypatch.setattr(video_files, "MAX_ANIMATION_PIXELS", 24 * 32 - 1)
    for name in ("a.mp4", "a.mkv", "a.webm", "a.gif", "a.webp"):
        with pytest.raises(UnreadableVideo, match=f"cannot read the video {name}: "):
            read_video(contents[name], 1, name=name)


def test_a_gif_does_not_grow_without_end() -> None:
    """Its second frame reaches far beyond the size that its header says."""
    content = hostile.animation("GIF", [np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
    place = content.rindex(b"\x2c\x00\x00\x00\x00\x08\x00\x08\x00")
    grown = content[: place + 1] + struct.pack("<HHHH", 0, 0, 9000, 9000) + content[place + 9 :]
    with pytest.raises(
        UnreadableVideo, match="cannot read the video grown: it has 9000 x 9000 pixels, at most 8,388,608"
    ):
        read_video(grown, 2, name="grown")


def test_the_first_bytes_name_the_demuxer() -> None:
    expected = {"mp4": "mov", "mov": "mov", "mkv": "matroska", "webm": "matroska", "avi": "avi", "ts": "mpegts"}
    expected |= {"flv": "flv", "ogv": "ogg", "wmv": "asf"}
    contents = {name.removeprefix("a."): content for name, content in hostile.valid_videos()}
    assert {suffix: demuxer_of(contents[suffix][:512]) for suffix in expected} == expected
    assert demuxer_of(b"\0\0\0\0" + (b"G" + bytes(191)) * 3) == "mpegts"
    with pytest.raises(ValueError, match="it is not a GIF, PNG"):
        demuxer_of(b"G" + bytes(511))
