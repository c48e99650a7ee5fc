"""The benchmark of the training loop, at tiny size: its loops train the same, its files. No test looks at a time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_runs import make_config, make_data

from skipdit import cli
from skipdit.benchmark.training import (
    Row,
    TrainBenchConfig,
    bench_training,
    bench_workload,
    make_task,
    matmul_rate,
    our_loop,
    plain_loop,
    verdict,
)
from skipdit.benchmark.training import make_config as make_run
from skipdit.files.output import OutputFolder
from skipdit.training import TokenRoutingConfig, TrainConfig
from skipdit.training.devices import start_processes

SMALL = TrainBenchConfig(preset="DiT-S/8", batch_sizes=(4, 1), num_steps=3, num_warmup=2, num_rounds=2)


@pytest.fixture
def recipe(tmp_path: Path) -> TrainConfig:
    """Of six blocks, as routing leaves two at each end."""
    config = make_config(make_data(tmp_path / "data"))
    return replace(config, model=replace(config.model, num_layers=6))


def test_rows_and_files(recipe: TrainConfig, tmp_path: Path) -> None:
    rows = bench_training(SMALL, recipe, OutputFolder(tmp_path / "out", "bench"))
    assert [(row.workload, row.loop) for row in rows] == [
        (workload, loop) for workload in ("emoji", "latents") for loop in ("plain", "dense", "routed")
    ]
    plain, dense, routed = rows[:3]
    assert plain.losses == pytest.approx(dense.losses, rel=1e-4)  # the same model, data, noise and updates
    assert plain.losses[0] == plain.losses[1]  # each round starts anew
    assert routed.losses[0] != dense.losses[0]
    for workload in (rows[:3], rows[3:]):
        assert workload[0].flops == workload[1].flops > workload[2].flops
        assert all(len(row.seconds) == 2 for row in workload)
    report = json.loads((tmp_path / "out" / "training_cpu.json").read_text())
    assert [row["batch_size"] for row in report["rows"]] == [4, 4, 4, 1, 1, 1]
    text = (tmp_path / "out" / "training_cpu.md").read_text()
    assert text.count("| emoji |") == text.count("| latents |") == 3
    assert "target" not in text  # which is that of a GPU


@pytest.mark.parametrize("loop", [plain_loop, our_loop])
def test_flops_are_those_of_a_step(loop: Any, recipe: TrainConfig) -> None:
    run = replace(make_run(SMALL, "emoji", recipe), routing=TokenRoutingConfig())
    task = make_task(SMALL, "emoji", run)
    counter = FlopCounterMode(display=False)
    with loop(run, task, start_processes(torch.device("cpu"))) as step, sdpa_kernel(SDPBackend.MATH), counter:
        step(0)
    (row,) = bench_workload(replace(SMALL, loops=("dense",), num_rounds=1), "emoji", recipe, lambda **_: None)
    assert counter.get_total_flops() == 4 * row.flops


def test_what_a_gpu_reaches_of_its_target_is_said() -> None:
    config = replace(SMALL, device="cuda")
    rows = [
        Row("emoji", "plain", 512, 1e9, (0.01,)),
        Row("emoji", "dense", 512, 1e9, (0.1,)),
        Row("emoji", "routed", 512, 1e9, (0.03,)),
        Row("latents", "dense", 100, 2e12, (1.0,)),
    ]
    assert list(verdict(config, rows, 1e15)) == [
        "emoji: target 15000 pictures per second, reached: 1.71e+04 (routed).",
        "latents: target 0.4 of the bf16 rate, missed: 0.2 (dense).",
    ]
    assert matmul_rate("cpu", 1) > 0


def test_bad_settings_are_named() -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"workloads": ("faces",)}, "faces"),
        ({"loops": ("fast",)}, "fast"),
        ({"preset": "DiT-Z/2"}, "DiT-Z/2"),
        ({"batch_sizes": (1,)}, "2 numbers above 0"),
        ({"num_steps": 0}, "num_steps"),
    )
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            TrainBenchConfig(**options)


def test_the_command_writes_its_report(tmp_path: Path) -> None:
    cli.main(
        ["bench", "train", "--workloads", "latents", "--loops", "dense", "--preset", "DiT-S/8", "--batch-sizes", "1",
         "--num-steps", "1", "--num-warmup", "1", "--num-rounds", "1", "--out", str(tmp_path)]
    )  # fmt: skip
    assert (tmp_path / "training_cpu.md").is_file()
