"""Training by two processes, DDP and FSDP2 over gloo, learns what one process learns, from the start and from any
checkpoint.

Run as a script, with a rank, a port and a folder, this file is one of the two processes.
"""

import dataclasses
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_tasks
import torch
from PIL import Image
from safetensors.torch import load_file
from training_runs import make_config, make_data, names, read_log, tensors_of

import skipdit.training.guard
from skipdit.checkpoints import load_model
from skipdit.process_group import leave_group
from skipdit.training import SpectralConfig, TokenRoutingConfig, TrainConfig, list_checkpoints, train

NUM_STEPS, HALF = 20, 10
PARALLEL = ("ddp", "fsdp")
ROUTING = {
    "bypass": TokenRoutingConfig(mode="bypass", share=0.5, num_shallow_units=1, deep_drop=0.3),
    "fill": TokenRoutingConfig(mode="fill", share=0.5, num_shallow_units=1, deep_drop=0.3),
}
# all that a step can do: everything that it changes is compared
OPTIONS: dict[str, dict[str, Any]] = {
    "bypass": {
        "routing": ROUTING["bypass"], "spectral": SpectralConfig(maximum=0.1, form="penalty"), "gradient_guard": 1.2,
        "ema_snapshots_every": HALF, "sample_every": NUM_STEPS,
    },
    "fill": {"routing": ROUTING["fill"], "gradient_checkpointing": True, "spectral": SpectralConfig(maximum=0.6)},
    "fp16": {"precision": "fp16"},
}  # fmt: skip
GOES_ON = ("bypass", "fp16")
# what one process makes in two parts, two processes make in two halves and each in one
IN_PARTS = {"bypass": 2}
# in fp16, products of eight rows are rounded otherwise than those of four
TOLERANCES = {"fp16": 2e-3}


@dataclass(frozen=True)
class Job:
    """A run of two processes. error: how what it ends with begins, where it does not end well."""

    config: TrainConfig
    out: Path
    error: str | None = None


def config_of(data: Path, name: str, **options: Any) -> TrainConfig:
    """Twenty steps of eight pictures out of twelve, so that batches are of two epochs."""
    settings: dict[str, Any] = {"max_steps": NUM_STEPS, "batch_size": 8, "checkpoint_every": HALF, "flip": True}
    settings |= {"weight_decay": 0.1, "rate_schedule": "constant"}
    return make_config(data, **(settings | OPTIONS[name] | options))


def run_as_process(rank: str, port: str, folder: Path) -> None:
    """Make all jobs, in one process of the two."""
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    torch.set_num_threads(1)
    skipdit.training.guard.WINDOW = 8
    jobs: list[Job] = pickle.loads((folder / "jobs").read_bytes())
    for job in jobs:
        said = None
        try:
            train(job.config, job.out, device="cpu")
        except ValueError as error:
            said = str(error).removeprefix("the main process stopped: ")
        assert (said or "").startswith(job.error or ""), said
        assert (said is None) == (job.error is None), said
    leave_group()


def find_port() -> int:
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


def from_the_middle(run: Path, out: Path) -> Path:
    """A run with the checkpoint of another in its middle."""
    name = f"checkpoint-{HALF:07d}"
    shutil.copytree(run / name, out / name)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of runs: of one process, of two, and of two or one that go on where one or two were."""
    folder = tmp_path_factory.mktemp("runs")
    data, task_data = make_data(folder / "data"), test_tasks.make_data(folder / "task-data")
    alone = {name: config_of(data, name, num_accumulation_steps=IN_PARTS.get(name, 1)) for name in OPTIONS}
    alone["clips"] = test_tasks.make_config("class-to-video", task_data, routing=ROUTING["bypass"], max_steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipdit.training.guard.WINDOW", 8)
        for name, config in alone.items():
            train(config, folder / name, device="cpu")
        jobs = []
        for parallel in PARALLEL:
            halves = {
                name: dataclasses.replace(config, parallel=parallel, num_accumulation_steps=1)
                for name, config in alone.items()
            }
            jobs += [Job(config, folder / f"{name} {parallel}") for name, config in halves.items()]
            jobs += [
                Job(halves[name], from_the_middle(folder / name, folder / f"{name} one {parallel}")) for name in GOES_ON
            ]
        odd = "batch_size must be divisible by processes x accumulation steps = 2, got 7"
        jobs.append(Job(config_of(data, "fill", batch_size=7), folder / "odd", odd))
        wild = config_of(data, "fill", parallel="fsdp", learning_rate=1e38, warmup_steps=0, checkpoint_every=1)
        jobs.append(Job(wild, folder / "wild", "the weights after step 1"))
        (folder / "jobs").write_bytes(pickle.dumps(jobs))
        run_two(folder)
        for parallel in PARALLEL:
            for name in GOES_ON:
                out = from_the_middle(folder / f"{name} {parallel}", folder / f"{name} {parallel} one")
                train(alone[name], out, device="cpu")
        yield folder


def run_two(folder: Path, script: str = __file__) -> list[tuple[str, str]]:
    """Run a file as two processes; return what each has written. Its arguments are a rank, a port and the folder."""
    command, port = [sys.executable, "-W", "ignore", script], str(find_port())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, str(rank), port, str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parent,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], texts
    return texts


def assert_alike(first: Path, second: Path, tolerance: float, first_step: int = 0) -> None:
    """What the logs say of steps after `first_step`, and what is saved and released in the end."""
    log, other = ([entry for entry in read_log(run) if entry["step"] > first_step] for run in (first, second))
    assert len(log) == log[-1]["step"] - first_step > 0
    for ours, theirs in zip(log, other, strict=True):
        for key in ("step", "images", "flops", "steps_left_out", "loss_scale", "steps_overflowed"):
            assert ours.get(key) == theirs.get(key), key
        for key in ("loss", "gradient_norm"):
            assert theirs[key] == pytest.approx(ours[key], rel=tolerance)
        # told with four digits
        assert theirs["unit_gradient_norms"] == pytest.approx(ours["unit_gradient_norms"], rel=tolerance + 2e-4)
    checkpoints = [list_checkpoints(run)[-1] for run in (first, second)]
    assert names(checkpoints[0]) == names(checkpoints[1])
    one, two = map(tensors_of, checkpoints)
    assert one.keys() == two.keys()
    snapshots = [sorted((run / "ema-snapshots").glob("*"))[-1:] for run in (first, second)]
    for a, b in [(one, two), *((load_file(a), load_file(b)) for a, b in zip(*snapshots, strict=True))]:
        for name, tensor in a.items():
            torch.testing.assert_close(b[name], tensor, rtol=10 * tolerance, atol=10 * tolerance, msg=name)
    released = [load_model(run / "pipeline").state_dict() for run in (first, second)]
    for name, tensor in released[0].items():
        torch.testing.assert_close(released[1][name], tensor, rtol=10 * tolerance, atol=10 * tolerance)
    grids = [sorted((run / "samples").glob("*")) for run in (first, second)]
    for grid, same in zip(*grids, strict=True):
        with Image.open(grid) as a, Image.open(same) as b:
            assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("name", [*OPTIONS, "clips"])
def test_two_processes_learn_what_one_learns(name: str, parallel: str, runs: Path) -> None:
    assert_alike(runs / name, runs / f"{name} {parallel}", TOLERANCES.get(name, 1e-5))


@pytest.mark.parametrize("way", [*(f"one {each}" for each in PARALLEL), *(f"{each} one" for each in PARALLEL)])
@pytest.mark.parametrize("name", GOES_ON)
def test_a_run_goes_on_by_another_number_of_processes(name: str, way: str, runs: Path) -> None:
    assert_alike(runs / name, runs / f"{name} {way}", TOLERANCES.get(name, 1e-5), first_step=HALF)


def test_the_runs_meet_all_that_is_compared(runs: Path) -> None:
    """Steps of every kind, steps that are left out and that overflow, weights that are capped and penalised."""
    flops = np.diff([0.0, *(entry["flops"] for entry in read_log(runs / "fill"))])
    assert len(set(flops)) == 3
    assert 0 < read_log(runs / "bypass")[-1]["steps_left_out"] < HALF
    assert 0 < read_log(runs / "fp16")[-1]["steps_overflowed"] < HALF
    assert len(list((runs / "bypass" / "ema-snapshots").iterdir())) == 2
    assert not list_checkpoints(runs / "wild")
    assert not (runs / "odd").exists()


if __name__ == "__main__":
    run_as_process(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
