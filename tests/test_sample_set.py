"""Sets of samples for evaluation: the same by any number of processes, whole or not at all, and read by numpy."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import listing, randomize, tiny_dit, tiny_latte
from training_runs import wait_for

import skipdit.sampling.sets
from skipdit.cli import main
from skipdit.diffusion import Objective, make_scheduler
from skipdit.files.processes import locked
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline
from skipdit.process_group import process_group
from skipdit.sampling.blocks import seed_of
from skipdit.sampling.compare import load, sample_and_compare
from skipdit.sampling.config import SampleConfig
from skipdit.sampling.sets import SetReport, sample_set, write_npz
from skipdit.text import find_weights

FLOW = Objective(process="flow", prediction_type="sample")
NAMES = {"0": "ant", "1": "bee", "2": "cat", "3": "dog"}
SIZES = {"sample_size": 16, "patch_size": 4, "in_channels": 3, "num_classes": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of 16x16 pixels and four named classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "pipeline"
    model = randomize(tiny_dit(8, out_channels=3, **SIZES))
    ClassToImagePipeline(model, make_scheduler(FLOW, "euler"), id2label=NAMES).save_pretrained(path)
    return path


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> SampleConfig:
    options: Any = {
        "num_samples": 50,
        "num_inference_steps": 6,
        "cache": "N2",
        "npz": True,
        "batch_size": 8,
        "device": "cpu",
    }
    return SampleConfig(model=str(folder), out=tmp_path / "one", **options)


def made(config: SampleConfig, **changes: Any) -> tuple[SetReport, dict[str, np.ndarray]]:
    """The report and the arrays of a set."""
    config = dataclasses.replace(config, **changes)
    report = sample_set(config)
    assert report is not None
    with np.load(config.out / "samples.npz") as arrays:
        return report, dict(arrays)


def find_port() -> int:
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


def test_fifty_by_two_processes_are_the_fifty_of_one(config: SampleConfig, tmp_path: Path) -> None:
    options = ["--model", str(config.model), "--num-samples", "50", "--steps", "6", "--cache", "N2", "--npz", "--png"]
    command = ["-m", "skipdit", "sample", *options, "--batch-size", "8", "--device", "cpu", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(find_port())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run(
        [sys.executable, *torchrun, *command, str(tmp_path / "two")], env=environment, capture_output=True, text=True
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("50 samples of 16 x 16 x 3, 6 steps") == 1

    report, arrays = made(config, png=True)
    assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((50, 16, 16, 3), np.uint8)
    assert arrays["arr_1"].tolist() == [index % 4 for index in range(50)]
    assert len(np.unique(arrays["arr_0"].reshape(50, -1), axis=0)) == 50
    names = listing(config.out)
    assert names == ["samples", "samples.json", "samples.npz"]
    assert listing(tmp_path / "two") == names
    assert (tmp_path / "two" / "samples.npz").read_bytes() == (config.out / "samples.npz").read_bytes()
    files = listing(config.out / "samples")
    assert files == [*(f"{index:07d}.png" for index in range(50)), "metadata.jsonl"]
    for name in files:
        assert (tmp_path / "two" / "samples" / name).read_bytes() == (config.out / "samples" / name).read_bytes()
    for index in (0, 49):
        with Image.open(config.out / "samples" / f"{index:07d}.png") as picture:
            assert np.array_equal(np.asarray(picture), arrays["arr_0"][index])
    lines = (config.out / "samples" / "metadata.jsonl").read_text().splitlines()
    assert json.loads(lines[49]) == {"file_name": "0000049.png", "label": 1, "text": "bee"}
    told = [json.loads((out / "samples.json").read_text()) for out in (config.out, tmp_path / "two")]
    assert told[0]["settings"] == told[1]["settings"]
    assert [each["report"]["num_processes"] for each in told] == [1, 2]
    assert told[0]["report"] == dataclasses.asdict(report)
    assert (report.num_made, report.num_broken, report.steps_full, report.steps_reused) == (50, 0, 3, 3)


def test_samples_are_those_of_the_pipeline(config: SampleConfig) -> None:
    report, arrays = made(config, num_samples=13)
    pipeline = load(config).sampler.pipeline
    pipeline.set_progress_bar_config(disable=True)
    skipdit.enable_cache(pipeline, "N2")
    noise = torch.cat(
        [
            torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed_of(0, index)))
            for index in range(8, 16)
        ]
    )
    options = {"guidance_scale": 2.0, "num_inference_steps": 6, "output_type": "np"}
    images = pipeline([index % 4 for index in range(8, 16)], latents=noise, **options).images
    assert np.array_equal(arrays["arr_0"][8:], (images[:5] * 255).round().astype(np.uint8))
    assert report.compute_ratio == skipdit.cache_summary(pipeline).compute_ratio > 1.3


def test_a_sample_does_not_depend_on_how_many_are_made(config: SampleConfig, tmp_path: Path) -> None:
    """To the bit in batches of one size; in others up to the rounding of their kernels."""
    _, all_of_them = made(config, num_samples=20)
    _, fewer = made(config, num_samples=11, out=tmp_path / "fewer")
    _, others = made(config, num_samples=20, batch_size=3, out=tmp_path / "others")
    _, seeded = made(config, num_samples=20, seed=1, out=tmp_path / "seeded")
    assert np.array_equal(all_of_them["arr_0"][:11], fewer["arr_0"])
    first, second, third = (each["arr_0"].astype(int) for each in (all_of_them, others, seeded))
    assert np.abs(first - second).max() <= 1
    assert np.abs(first - third).mean() > 5


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_noise_of_every_step_is_a_samples_own(scheduler: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize(tiny_dit(out_channels=6, **SIZES))
    schedule = make_scheduler(Objective(learned_variance=True), "ddpm")
    ClassToImagePipeline(model, schedule, id2label=NAMES).save_pretrained(tmp_path / "model")
    options: Any = {"num_inference_steps": 5, "cache": "none", "npz": True, "scheduler": scheduler, "device": "cpu"}
    config = SampleConfig(model=str(tmp_path / "model"), num_samples=7, out=tmp_path / "out", **options)
    whole, single = (made(config, batch_size=size, out=tmp_path / f"by{size}")[1]["arr_0"] for size in (4, 1))
    assert np.abs(whole.astype(int) - single.astype(int)).max() <= 2
    assert len(np.unique(whole.reshape(7, -1), axis=0)) == 7


def test_no_two_samples_share_a_seed() -> None:
    """torch's CPU generator takes 32 bits of it."""
    seeds = [seed_of(seed, index) for seed in (0, 1, 2, 77) for index in range(2000)]
    assert max(seeds) < 2**32
    assert len(set(seeds)) == len(seeds)


def test_labels_in_turn_or_at_random(config: SampleConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, cache="none", num_inference_steps=1)
    assert made(config, labels=("dog", "1"), num_samples=5)[1]["arr_1"].tolist() == [3, 1, 3, 1, 3]
    drawn = [
        made(config, random_labels=True, batch_size=size, num_samples=count, out=tmp_path / str(count))[1]["arr_1"]
        for size, count in ((8, 40), (5, 30))
    ]
    assert drawn[0][:30].tolist() == drawn[1].tolist()
    assert set(drawn[0].tolist()) == {0, 1, 2, 3}
    assert drawn[0].tolist() != [index % 4 for index in range(40)]
    other = made(config, random_labels=True, seed=1, num_samples=40, out=tmp_path / "seed")[1]["arr_1"]
    assert other.tolist() != drawn[0].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Stopped, and going on


def _sample_and_exit(config: SampleConfig, log: Path) -> None:
    """In a forked child."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        sample_set(config)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(2)
    os._exit(0)


def test_a_killed_run_continues_with_equal_samples(config: SampleConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, batch_size=2, num_inference_steps=12, png=True)
    blocks = tmp_path / "killed" / "blocks"
    killed = dataclasses.replace(config, out=tmp_path / "killed")
    for count in (2, 4):  # blocks that are to be there
        process = multiprocessing.get_context("fork").Process(target=_sample_and_exit, args=(killed, tmp_path / "log"))
        process.start()
        wait_for(lambda count=count: blocks.is_dir() and len(list(blocks.glob("block-*"))) >= count)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert not (tmp_path / "killed" / "samples.npz").exists()
    damaged = min(blocks.glob("block-*")) / "samples.npy"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    report, _ = made(killed)
    undisturbed, _ = made(config)
    assert undisturbed.num_made == 50
    assert 2 <= report.num_made <= 50 - 2 * 3
    assert (killed.out / "samples.npz").read_bytes() == (config.out / "samples.npz").read_bytes()
    assert listing(killed.out) == ["samples", "samples.json", "samples.npz"]
    assert listing(killed.out / "samples") == listing(config.out / "samples")


def test_an_interrupted_run_reports_the_complete_samples(config: SampleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    make_block = skipdit.sampling.sets.SetRun.make_block

    def stops(run: Any, number: int, *options: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return make_block(run, number, *options)

    monkeypatch.setattr(skipdit.sampling.sets.SetRun, "make_block", stops)
    with pytest.raises(KeyboardInterrupt) as stopped:
        sample_set(config)
    assert "16 samples are complete; the same command continues with them" in stopped.value.__notes__
    monkeypatch.undo()
    assert made(config)[0].num_made == 50 - 16


def test_what_is_done_is_not_done_again(config: SampleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = made(config, num_samples=9)
    before = (config.out / "samples.npz").stat()
    monkeypatch.setattr(skipdit.sampling.sets.SetRun, "make_block", None)
    again, _ = made(config, num_samples=9)
    assert again == report
    assert (config.out / "samples.npz").stat() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed"),
        ({"cache": "N3"}, "cache"),
        ({"num_samples": 10}, "num_samples"),
        ({"scheduler": "dpm"}, "scheduler"),
        ({"random_labels": True}, "random_labels"),
    ],
)
def test_a_set_of_other_settings_is_refused(config: SampleConfig, change: dict[str, Any], told: str) -> None:
    config = dataclasses.replace(config, num_samples=9)
    made(config)
    before = (config.out / "samples.npz").read_bytes()
    with pytest.raises(ValueError, match=rf"holds samples of other settings \({told}\): give another --out"):
        sample_set(dataclasses.replace(config, **change))
    assert (config.out / "samples.npz").read_bytes() == before


def test_other_weights_are_other_settings(config: SampleConfig, tmp_path: Path) -> None:
    made(config, num_samples=3)
    torch.manual_seed(1)
    model = randomize(tiny_dit(8, out_channels=3, **SIZES))
    ClassToImagePipeline(model, make_scheduler(FLOW, "euler"), id2label=NAMES).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other settings \(model\)"):
        made(config, num_samples=3, model=str(tmp_path / "other"))
    shutil.copytree(str(config.model), tmp_path / "moved")
    made(config, num_samples=3, model=str(tmp_path / "moved"))


def test_blocks_of_another_set_are_not_believed(
    config: SampleConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where `samples.json`, which would refuse them, was deleted."""
    monkeypatch.setattr(skipdit.sampling.sets.SetRun, "finish", lambda *_: None)
    for out, seed in (("one", 1), ("two", 0)):
        sample_set(dataclasses.replace(config, num_samples=16, seed=seed, out=tmp_path / out))
    shutil.move(tmp_path / "one" / "blocks" / "block-0000001", tmp_path / "one" / "kept")
    shutil.rmtree(tmp_path / "two" / "blocks" / "block-0000001")
    shutil.move(tmp_path / "one" / "kept", tmp_path / "two" / "blocks" / "block-0000001")
    monkeypatch.undo()
    report, arrays = made(config, num_samples=16, out=tmp_path / "two")
    assert report.num_made == 8
    assert np.array_equal(arrays["arr_0"], made(config, num_samples=16, out=tmp_path / "new")[1]["arr_0"])


def test_a_mistake_leaves_no_settings(config: SampleConfig) -> None:
    with pytest.raises(ValueError, match="guidance_channels must be between 1 and 3, got 4"):
        sample_set(dataclasses.replace(config, guidance_channels=4))
    made(config, num_samples=3)


# ----------------------------------------------------------------------------------------------------------------------
# Others


@pytest.mark.parametrize("name", ["samples.npz", "samples.json", "samples/mine.png", "blocks/block-0000001/mine.txt"])
def test_files_of_others_stay(config: SampleConfig, name: str) -> None:
    path = config.out / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=Path(name).name if "/" not in name else "was not written by skipdit"):
        sample_set(dataclasses.replace(config, png=True))
    assert path.read_text() == "precious"
    assert not (config.out / "blocks" / "block-0000000").exists()


def test_foreign_files_are_overwritten_only_on_request(config: SampleConfig) -> None:
    for name in ("samples.npz", "samples/0000001.png", "samples/holiday.png", "samples/mine.txt"):
        (config.out / name).parent.mkdir(parents=True, exist_ok=True)
        (config.out / name).write_text("mine")
    made(config, num_samples=3, png=True, overwrite=True)
    expected = [*(f"000000{index}.png" for index in range(3)), "holiday.png", "metadata.jsonl", "mine.txt"]
    assert listing(config.out / "samples") == expected
    with Image.open(config.out / "samples" / "0000001.png") as picture:
        assert picture.size == (16, 16)


def test_it_lies_beside_a_comparison(config: SampleConfig) -> None:
    alone = dataclasses.replace(config, npz=False, batch_size=None, num_samples=2)
    sample_and_compare(alone)
    made(config, num_samples=2)
    sample_and_compare(alone)
    assert {"report.json", "samples.npz", "samples.json"} <= set(listing(config.out))


def test_one_call_at_a_time(config: SampleConfig) -> None:
    with locked(config.out), pytest.raises(BlockingIOError, match="is in use"):
        sample_set(config)


def test_bad_options_end_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = ["--npz", "--num-samples", "3"]
    for options, message in (
        (["--npz"], "npz and png are for a set of samples: give num_samples"),
        ([*some, "--fewer-steps", "2"], "fewer_steps is for a comparison, not with npz or png, got 2"),
        ([*some, "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--batch-size", "3"], "batch_size is for a set of samples, got 3 without npz or png"),
        (["--random-labels"], "random_labels is for a set of samples, got True without npz or png"),
        (["--png", "--num-samples", "500001"], "png is for at most 500000 samples in one folder, got 500001: use npz"),
        ([*some, "--labels", "cta"], "unknown label 'cta'"),
        ([*some, "--prompt", "cat"], "a class-to-image model takes --labels, not --prompt"),
        ([*some, "--cache", "N1"], "would never reuse"),
        ([*some, "--device", "abacus"], "device 'abacus' is not available here"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["sample", "--model", str(folder), "--out", str(tmp_path / "out"), *options])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["sample", "--model", str(folder), "--out", str(tmp_path / "out")])
    assert "a comparison runs in one process" in capsys.readouterr().err
    assert not (tmp_path / "out" / "samples.json").exists()


def test_broken_samples_are_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = load(SampleConfig(model=str(folder), device="cpu")).sampler.pipeline
    with torch.no_grad():
        pipeline.transformer.class_embedder.weight[1] = torch.nan
    pipeline.save_pretrained(tmp_path / "model")
    options = ["--steps", "2", "--cache", "none", "--npz", "--num-samples", "6", "--device", "cpu"]
    with pytest.raises(SystemExit) as error:
        main(["sample", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options])
    assert error.value.code == 1
    assert "broken samples (NaN or infinite): set 2 of 6" in capsys.readouterr().err
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert [not picture.any() for picture in arrays["arr_0"]] == [index % 4 == 1 for index in range(6)]


def _wait_for_one_that_ends(rank: int, address: Path, told: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    with process_group() as group:
        value = group.from_main(lambda: rank + 5)
        if rank:
            os._exit(0)
        try:
            group.wait_for_all()
        except ValueError as error:
            told.put((value, str(error)))
            os._exit(0)


def test_a_process_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    running = [
        context.Process(target=_wait_for_one_that_ends, args=(rank, tmp_path / "address", told)) for rank in range(2)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    assert told.get() == (5, "another process has ended early: see its messages")


# ----------------------------------------------------------------------------------------------------------------------
# Other tasks and settings


def test_clips(tmp_path: Path) -> None:
    model = randomize(tiny_latte(6, out_channels=3, **SIZES))
    ClassToVideoPipeline(model, make_scheduler(FLOW, "euler"), id2label=NAMES).save_pretrained(tmp_path / "model")
    options: Any = {"num_inference_steps": 4, "cache": "N2", "npz": True, "png": True, "batch_size": 2, "device": "cpu"}
    config = SampleConfig(model=str(tmp_path / "model"), num_samples=3, out=tmp_path / "out", **options)
    report, arrays = made(config)
    assert arrays["arr_0"].shape == (3, 3, 16, 16, 3)
    assert report.shape == [3, 16, 16, 3]
    with Image.open(config.out / "samples" / "0000002.png") as clip:
        assert clip.n_frames == 3
        for frame in range(3):
            clip.seek(frame)
            assert np.array_equal(np.asarray(clip.convert("RGB")), arrays["arr_0"][2, frame])


def test_a_model_without_classes_has_no_labels(tmp_path: Path) -> None:
    model = randomize(tiny_latte(6, out_channels=3, **(SIZES | {"num_classes": None})))
    ClassToVideoPipeline(model, make_scheduler(FLOW, "euler")).save_pretrained(tmp_path / "model")
    options: Any = {"num_inference_steps": 2, "cache": "none", "npz": True, "device": "cpu", "guidance_scale": 1.0}
    _, arrays = made(SampleConfig(model=str(tmp_path / "model"), num_samples=2, out=tmp_path / "out", **options))
    assert list(arrays) == ["arr_0"]


@pytest.mark.skipif(
    find_weights() is None or find_spec("transformers") is None, reason='needs pip install "skipdit[text]"'
)
@pytest.mark.parametrize("name", ["emoji-text", "emoji-text-clips"])
def test_prompts(name: str, tmp_path: Path) -> None:
    options: Any = {"num_inference_steps": 2, "cache": "none", "npz": True, "batch_size": 2, "device": "cpu"}
    config = SampleConfig(model=name, prompt=("cat", "dog"), num_samples=3, out=tmp_path / "out", **options)
    _, arrays = made(config)
    assert arrays["arr_1"].tolist() == [0, 1, 0]
    assert json.loads((config.out / "samples.json").read_text())["prompts"] == ["cat", "dog"]
    _, alone = made(config, batch_size=1, out=tmp_path / "alone")
    assert np.abs(arrays["arr_0"].astype(int) - alone["arr_0"].astype(int)).max() <= 1


def test_shallow_guidance_and_its_compute(config: SampleConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, num_samples=4, cache="none")
    _, full = made(config)
    options: Any = {"guidance": "shallow", "guidance_shallow_units": 1, "out": tmp_path / "shallow"}
    report, shallow = made(config, **options)
    assert 1.3 < report.compute_ratio < 2
    assert not np.array_equal(full["arr_0"], shallow["arr_0"])
    cached, _ = made(config, **(options | {"cache": "N2", "out": tmp_path / "cached"}))
    assert cached.compute_ratio > report.compute_ratio


def test_the_npz_is_written_block_by_block(tmp_path: Path) -> None:
    def blocks() -> Iterator[np.ndarray]:
        for value in range(64):
            yield np.full((4, 256, 256, 3), value, dtype=np.uint8)

    tracemalloc.start()
    write_npz(tmp_path / "samples.npz", blocks(), (256, 256, 256, 3), range(256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 4 * 256 * 256 * 3  # of 64 blocks
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == list(range(256))
        assert arrays["arr_0"][:, 0, 0, 0].tolist() == [index // 4 for index in range(256)]
