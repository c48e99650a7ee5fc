"""Tiny trainings for the tests of training: data, a config, what a run left, and runs in a process of their own."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from skipdit.data.pictures import DataConfig
from skipdit.diffusion import Objective
from skipdit.tasks.class_to_image import ModelConfig
from skipdit.training import TrainConfig, list_checkpoints, train
from skipdit.training.learner import FILES

COLORS = {"blue": (20, 20, 240), "green": (20, 240, 20), "red": (240, 20, 20)}


def make_data(folder: Path, size: int = 8) -> Path:
    """Three plain colours, four pictures of each."""
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (size, size), color).save(folder / name / f"{index}.png")
    return folder


def make_config(data: Path, **options: Any) -> TrainConfig:
    """Six steps of four blocks on 8x8 pixels in four tokens, a checkpoint every three."""
    settings: dict[str, Any] = {
        "data": DataConfig(source=str(data), image_size=8),
        "model": ModelConfig(num_layers=4, num_attention_heads=2, attention_head_dim=16, patch_size=4),
        "objective": Objective(process="flow", prediction_type="sample", timestep_sampling="logit_normal"),
        "max_steps": 6,
        "batch_size": 12,
        "learning_rate": 2e-3,
        "warmup_steps": 2,
        "precision": "no",
        "log_every": 1,
        "sample_every": 0,
        "checkpoint_every": 3,
        "num_samples": 3,
        "num_inference_steps": 4,
    }
    return TrainConfig(**(settings | options))


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def checkpoint_names(out: Path) -> list[str]:
    return [path.name for path in list_checkpoints(out)]


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Weights, averages and moments."""
    return {f"{file}.{name}": tensor for file in FILES
            for name, tensor in load_file(checkpoint / f"{file}.safetensors").items()}  # fmt: skip


def assert_same_run(first: Path, second: Path) -> None:
    """The last checkpoints are equal to the bit, and so are the logs but for the speed."""
    one, other = (tensors_of(list_checkpoints(out)[-1]) for out in (first, second))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    keys = ("step", "images", "loss", "gradient_norm", "learning_rate", "unit_gradient_norms")
    logs = [[[entry[key] for key in keys] for entry in read_log(out)] for out in (first, second)]
    assert logs[0] == logs[1]


def _train_and_exit(config: TrainConfig, out: Path, log: Path, act: Callable[[], None] | None) -> None:
    """In a forked child, whose own output goes into a file."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    from skipdit.training import Stopped

    if act is not None:
        act()
    try:
        train(config, out, device="cpu")
    except Stopped as stopped:
        print(stopped, flush=True)
        os._exit(stopped.status)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(2)
    os._exit(0)


def start_training(
    config: TrainConfig, out: Path, log: Path, act: Callable[[], None] | None = None
) -> multiprocessing.process.BaseProcess:
    """Fork a process that trains; it is warm, so that a kill meets no import. act: done in it first."""
    process = multiprocessing.get_context("fork").Process(target=_train_and_exit, args=(config, out, log, act))
    process.start()
    return process


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def send(process: multiprocessing.process.BaseProcess, number: int) -> int:
    """Send a signal and return the exit status."""
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode
