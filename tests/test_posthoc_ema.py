"""Averages of any length, made after training, against averages that were tracked."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.integrate import quad
from test_tasks import EVERY_TASK
from test_tasks import make_config as make_task_config
from test_tasks import make_data as make_task_data
from torch import Tensor, nn
from training_runs import assert_same_run, make_config, make_data, names

import skipdit.training.loop
from skipdit.cli import main
from skipdit.loading import load_source
from skipdit.training import SpectralConfig, TrainConfig, learning_rate_at, list_checkpoints, train
from skipdit.training.posthoc_ema import (
    FOLDER,
    LENGTHS,
    PowerAverages,
    combine,
    exponent,
    inner_product,
    list_snapshots,
    snapshot_name,
)


def profile(steps: int, gamma: float) -> np.ndarray:
    """The weight of each step in an average: the integral of (gamma + 1) t^gamma / steps^(gamma + 1) over the step."""
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    return np.diff(edges)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25, 0.28])
def test_an_average_has_the_length_that_was_asked_for(length: float) -> None:
    weights, times = profile(20_000, exponent(length)), (np.arange(20_000) + 0.5) / 20_000
    mean = (weights * times).sum()
    assert math.sqrt((weights * (times - mean) ** 2).sum()) == pytest.approx(length, rel=1e-4)


def test_inner_products_are_integrals() -> None:
    for step, gamma, other_step, other_gamma in ((500, 6.9, 800, 17.0), (800, 17.0, 300, 2.0), (400, 3.0, 400, 3.0)):

        def product(t: float, s: int = step, g: float = gamma, o: int = other_step, h: float = other_gamma) -> float:
            return (g + 1) * t**g / s ** (g + 1) * (h + 1) * t**h / o ** (h + 1)

        expected = quad(product, 0, min(step, other_step), epsabs=0, epsrel=1e-10)[0]
        assert inner_product(step, gamma, other_step, other_gamma) == pytest.approx(expected, rel=1e-8)


def walk(num_steps: int, every: int, lengths: tuple[float, ...]) -> tuple[Any, PowerAverages, list[Tensor]]:
    """Weights that move at random ever less; their snapshots, averages that are tracked, and all of them."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40, dtype=torch.float64))
    kept, direct = PowerAverages([weight]), PowerAverages([weight], lengths)
    snapshots, seen = {}, []
    for done in range(1, num_steps + 1):
        with torch.no_grad():
            weight.add_(torch.randn(40) * 0.05 / (1 + done / 100))
        seen.append(weight.detach().clone())
        for averages in (kept, direct):
            averages.step([weight], done)
        if done % every == 0:
            snapshots[done] = {length: averages[0].clone() for length, averages in kept.averages.items()}
    return snapshots, direct, seen


def test_tracked_averages_have_the_weights_of_the_formula() -> None:
    _, direct, seen = walk(300, 300, (0.03, 0.1, 0.25))
    for length, (average,) in direct.averages.items():
        expected = torch.from_numpy(profile(300, exponent(length))) @ torch.stack(seen)
        torch.testing.assert_close(average, expected, rtol=1e-9, atol=1e-9)


def test_combined_averages_equal_tracked_ones() -> None:
    lengths = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
    snapshots, direct, seen = walk(2000, 100, lengths)
    moves = torch.stack(seen).std(dim=0).norm()
    assert (snapshots[2000][0.1] - direct.averages[0.2][0]).norm() > 0.15 * moves  # lengths matter
    for length in lengths:
        found = combine(list(snapshots), length)
        average = sum(
            weight * snapshots[step][tracked]
            for step, weights in found.weights.items()
            for tracked, weight in weights.items()
        )
        off = ((average - direct.averages[length][0]).norm() / moves).item()
        assert off < (1e-9 if length in LENGTHS else 5e-3), (length, off)
        assert found.error < (1e-6 if length in LENGTHS else 0.03), (length, found.error)
        assert sum(sum(each.values()) for each in found.weights.values()) == pytest.approx(1, abs=1e-9)
    coarse = combine(list(snapshots)[4::5], 0.15)
    assert 0.05 < coarse.error < 0.15  # with a fifth of the snapshots it is said that they are too few
    earlier = combine(list(snapshots), 0.07, step=1000)
    assert max(earlier.weights) == earlier.step == 1000


def test_lengths_and_steps_that_are_not_there_are_named() -> None:
    for length in (0.0, 0.3, math.nan):
        with pytest.raises(ValueError, match=f"length must be between 0.01 and 0.28, got {length}"):
            combine([100], length)
    with pytest.raises(ValueError, match="step must be that of a snapshot, 100, 200, got 150"):
        combine([100, 200], 0.1, step=150)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    config = make_config(make_data(tmp_path / "data"), max_steps=24, checkpoint_every=1, num_checkpoints=24)
    return dataclasses.replace(config, ema_snapshots_every=2, log_every=100)


def interrupt_at(last: int) -> Callable[[TrainConfig, int], float]:
    def rate(config: TrainConfig, step: int) -> float:
        if step == last:
            raise KeyboardInterrupt
        return learning_rate_at(config, step)

    return rate


def test_the_command_gives_the_average_of_all_weights_there_were(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(config, run, device="cpu")
    assert list_snapshots(run) == list(range(2, 25, 2))
    seen = [load_file(path / "model.safetensors") for path in list_checkpoints(run)]
    assert len(seen) == 24
    for length, tolerance in ((0.1, 1e-5), (0.15, 5e-3)):
        out = tmp_path / f"out-{length}"
        main(["ema", str(run), "--length", str(length), "--out", str(out)])
        said = capsys.readouterr().out.splitlines()[-1]
        assert said.startswith(f"average of length {length} at step 24, from 12 snapshots (off from the weights over")
        found = load_source(str(out), device="cpu")
        assert found.sampler.pipeline.labels == {"blue": 0, "green": 1, "red": 2}
        weights = torch.from_numpy(profile(24, exponent(length))).float()
        for name, parameter in found.sampler.pipeline.transformer.named_parameters():
            history = torch.stack([each[name] for each in seen])
            expected = torch.einsum("s,s...->...", weights, history)
            assert (parameter - expected).norm() <= tolerance * (history[-1] - history[0]).norm() + 1e-6, name
    main(["sample", "--model", str(tmp_path / "out-0.1"), "--steps", "2", "--num-samples", "1", "--cache", "none",
          "--device", "cpu", "--out", str(tmp_path / "pictures")])  # fmt: skip
    assert (tmp_path / "pictures" / "full.png").is_file()


@pytest.mark.parametrize("task", EVERY_TASK)
def test_every_task_has_averages(task: str, tmp_path: Path) -> None:
    config = make_task_config(task, make_task_data(tmp_path / "data"), max_steps=4)
    run, out = tmp_path / "run", tmp_path / "out"
    train(dataclasses.replace(config, ema_snapshots_every=2), run, device="cpu")
    main(["ema", str(run), "--length", "0.05", "--out", str(out)])
    kept = load_file(run / snapshot_name(4))
    transformer = load_source(str(out), device="cpu", decodes=False).sampler.pipeline.transformer
    for name, parameter in transformer.named_parameters():
        torch.testing.assert_close(parameter, kept[f"0.05.{name}"], rtol=1e-5, atol=1e-6)


def test_a_resumed_run_has_the_same_snapshots(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, max_steps=12, checkpoint_every=3, ema_snapshots_every=2)
    train(config, tmp_path / "whole", device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(skipdit.training.loop, "learning_rate_at", interrupt_at(8))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped", device="cpu")
    train(config, tmp_path / "stopped", device="cpu")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert names(tmp_path / "whole" / FOLDER) == names(tmp_path / "stopped" / FOLDER)
    for step in list_snapshots(tmp_path / "whole"):
        one, other = (load_file(tmp_path / run / snapshot_name(step)) for run in ("whole", "stopped"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), step


def test_snapshots_of_a_run_that_begins_anew_go(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(dataclasses.replace(config, max_steps=6), run, device="cpu")
    (run / FOLDER / "step-0000099.safetensors").write_text("mine")
    train(dataclasses.replace(config, max_steps=3, seed=1), run, resume=False, device="cpu")
    assert names(run / FOLDER) == ["step-0000002.safetensors", "step-0000003.safetensors", "step-0000099.safetensors"]
    (run / FOLDER / "step-0000002.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match=f"contains {FOLDER}/step-0000002.safetensors"):
        train(dataclasses.replace(config, max_steps=3, seed=1), run, resume=False, device="cpu")


def test_what_cannot_be_averaged_is_refused_in_one_line(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(dataclasses.replace(config, max_steps=2, ema_snapshots_every=0), run, device="cpu")
    with pytest.raises(ValueError, match=r"other settings \(ema_snapshots_every\): give another --out"):
        train(dataclasses.replace(config, max_steps=3), run, device="cpu", allow_changes=True)

    def fails(*options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["ema", str(run), "--length", "0.1", "--out", str(tmp_path / "out"), *options])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "out").exists()
        return line

    assert "has no snapshots: train with --ema-snapshots-every" in fails()
    train(dataclasses.replace(config, max_steps=4), run, resume=False, device="cpu")
    assert "length must be between 0.01 and 0.28, got 0.5" in fails("--length", "0.5")
    assert "step must be that of a snapshot, 2, 4, got 3" in fails("--step", "3")
    path = run / snapshot_name(2)
    tensors, whole = load_file(path), path.read_bytes()
    name = "0.1.patch_embed.proj.bias"
    for damaged in (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {name: torch.zeros(3)},
        tensors | {name: tensors[name] * math.nan},
    ):
        save_file(damaged, path)
        assert "step-0000002.safetensors does not fit this model: " in fails()
    path.write_bytes(whole[:1000])
    assert "step-0000002.safetensors cannot be read: " in fails()
    with pytest.raises(ValueError, match="an average of capped weights is not capped"):
        dataclasses.replace(config, spectral=SpectralConfig())
    with pytest.raises(ValueError, match="ema_snapshots_every must be at least 0, got -1"):
        dataclasses.replace(config, ema_snapshots_every=-1)


def test_a_checkpoint_without_its_averages_is_passed_over(config: TrainConfig, tmp_path: Path) -> None:
    config, run = dataclasses.replace(config, max_steps=4, checkpoint_every=2), tmp_path / "run"
    train(config, run, device="cpu")
    (run / "checkpoint-0000004" / "power_averages.safetensors").unlink()
    train(dataclasses.replace(config, max_steps=6), run, device="cpu")
    train(dataclasses.replace(config, max_steps=6), tmp_path / "whole", device="cpu")
    assert json.loads((run / "checkpoint-0000006" / "state.json").read_text())["step"] == 6
    assert list_snapshots(run) == [2, 4, 6]
    assert_same_run(tmp_path / "whole", run)
