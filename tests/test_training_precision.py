"""fp16: small gradients are scaled up, a step that overflows changes nothing and misleads nobody."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import assert_same_run, make_config, make_data, read_log, tensors_of

import skipdit.training.loop
from skipdit.training import TrainConfig, learning_rate_at, list_checkpoints, train
from skipdit.training.devices import start_processes
from skipdit.training.guard import GradientGuard
from skipdit.training.precision import LossScale, autocast_dtype

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """The first steps overflow, as a scale of 65536 is far too large here."""
    return make_config(make_data(tmp_path / "data"), precision="fp16", max_steps=8, gradient_guard=4.0)


def start_at(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Give torch's scaler other defaults."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, **options))


def test_a_run_in_fp16_resumes_exactly_with_its_scale(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_at(monkeypatch, growth_interval=4)  # so that the scale is doubled within the run, too
    train(config, tmp_path / "whole", device="cpu")
    log = read_log(tmp_path / "whole")
    scales = [2**16, *(entry["loss_scale"] for entry in log)]
    overflows = [0, *(entry["steps_overflowed"] for entry in log)]
    assert 0 < overflows[-1] < 4
    for i, entry in enumerate(log):
        overflowed = overflows[i + 1] - overflows[i]
        assert scales[i + 1] in ([scales[i] / 2] if overflowed else [scales[i], scales[i] * 2])
        assert (entry["gradient_norm"] == 0) == bool(overflowed)
        assert entry["steps_left_out"] == 0
    assert scales[-1] > min(scales)
    last = list_checkpoints(tmp_path / "whole")[-1]
    assert int(tensors_of(last)["optimizer.patch_embed.proj.bias.step"]) == config.max_steps - overflows[-1]
    state = json.loads((last / "state.json").read_text())
    assert len(state["guard"]["norms"]) == config.max_steps - overflows[-1]
    assert state["loss_scale"]["scale"] == scales[-1]

    def rate(config: TrainConfig, step: int) -> float:
        if step == 7:
            raise KeyboardInterrupt
        return learning_rate_at(config, step)

    with monkeypatch.context() as patch:
        patch.setattr(skipdit.training.loop, "learning_rate_at", rate)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped", device="cpu")
    train(config, tmp_path / "stopped", device="cpu")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    again = json.loads((tmp_path / "stopped" / last.name / "state.json").read_text())
    assert again["loss_scale"] == state["loss_scale"]
    assert [entry["loss_scale"] for entry in read_log(tmp_path / "stopped")] == scales[1:]


def test_fp16_learns_what_float32_learns(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a scale with which no step overflows, so that both make all of them."""
    start_at(monkeypatch, init_scale=2.0**8)
    losses = []
    for precision in ("fp16", "no"):
        train(dataclasses.replace(config, precision=precision), tmp_path / precision, device="cpu")
        losses.append([entry["loss"] for entry in read_log(tmp_path / precision)])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_a_gradient_that_stays_infinite_at_the_smallest_scale_ends_the_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 65536 the scale is 1 after 16 steps."""
    batch_loss = skipdit.training.loop.batch_loss

    def loss(task: Any, model: nn.Module, *rest: Any) -> Tensor:
        # its value is finite, its gradient is not
        return batch_loss(task, model, *rest) + (0 * next(model.parameters()).sum()).sqrt()

    monkeypatch.setattr(skipdit.training.loop, "batch_loss", loss)
    with pytest.raises(ValueError, match="the loss or its gradient at step 17 is no longer finite"):
        train(dataclasses.replace(config, max_steps=30, checkpoint_every=10), tmp_path / "run", device="cpu")
    assert {entry["gradient_norm"] for entry in read_log(tmp_path / "run")} == {0.0}


def test_a_loss_that_is_not_finite_ends_the_run_at_once(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, count = skipdit.training.loop.prepare_batch, iter(range(100))

    def spoil(pixels: Tensor, *rest: Any) -> object:
        return draw(pixels * torch.nan if next(count) == 4 else pixels, *rest)

    monkeypatch.setattr(skipdit.training.loop, "prepare_batch", spoil)
    with pytest.raises(ValueError, match="the loss or its gradient at step 5 is no longer finite"):
        train(config, tmp_path / "run", device="cpu")


def test_a_guard_does_not_take_in_what_is_not_finite() -> None:
    guard = GradientGuard(2.0, CPU)
    for norm in [1.0] * 60:
        guard.update(torch.tensor(norm))
    seen = guard.norms
    for norm in (torch.inf, torch.nan):
        assert guard.update(torch.tensor(norm)) == 0
        assert torch.equal(guard.norms, seen)
    assert guard.update(torch.tensor(3.0)) == 1
    assert guard.num_skipped == 1


def test_a_scale_of_others_is_not_taken(config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from test_training_checkpoints import sign_anew

    train(config, tmp_path / "run", device="cpu")
    path = list_checkpoints(tmp_path / "run")[-1] / "state.json"
    whole = json.loads(path.read_text())
    for name, value in (("scale", 0.0), ("scale", 1e30), ("good_steps", -1), ("overflows", -1)):
        path.write_text(json.dumps(whole | {"loss_scale": whole["loss_scale"] | {name: value}}))
        sign_anew(path.parent)
        train(config, tmp_path / "run", device="cpu")
        assert f"at `$.loss_scale.{name}`): the run resumes from" in caplog.messages[-1]


def test_the_state_of_a_scale_is_taken_whole() -> None:
    scale, other = LossScale(CPU), LossScale(CPU)
    scale.restore({"scale": 12.0, "good_steps": 7, "overflows": 3})
    assert scale.state() == {"scale": 12.0, "good_steps": 7, "overflows": 3}
    assert (scale.value.item(), other.value.item()) == (12.0, 2.0**16)


def test_products_are_computed_in_what_is_asked_for() -> None:
    assert autocast_dtype("fp16", CPU) == torch.float16
    assert autocast_dtype("bf16", CPU) == torch.bfloat16
    assert autocast_dtype("no", CPU) is None
    assert autocast_dtype("auto", CPU) in (None, torch.bfloat16)


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED"])
def test_sharding_by_accelerate_is_refused(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(ValueError, match=f"accelerate was configured to use {plugin}: .*--parallel fsdp"):
        start_processes(CPU)


def test_whole_graphs_and_shards_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="compile makes whole graphs, which parallel fsdp breaks"):
        TrainConfig(compile=True, parallel="fsdp")
    with pytest.raises(ValueError, match="parallel must be one of ddp, fsdp, got 'dp'"):
        TrainConfig(parallel="dp")  # pyright: ignore[reportArgumentType]
