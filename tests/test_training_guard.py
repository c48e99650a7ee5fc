"""Steps that are left out because of their gradient, and items that are named where a loss is not finite."""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import assert_same_run, make_config, make_data, read_log, tensors_of

import skipdit.training.loop
from skipdit.tasks.training import open_items
from skipdit.training import TrainConfig, learning_rate_at, list_checkpoints, train
from skipdit.training.devices import start_processes
from skipdit.training.guard import WINDOW, GradientGuard, skip_if_any
from skipdit.training.loader import items_of_step, load_batches

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return dataclasses.replace(make_config(make_data(tmp_path / "data")), gradient_guard=5.0)


def make_optimizer(*weights: nn.Parameter) -> torch.optim.AdamW:
    return torch.optim.AdamW(weights, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def test_a_step_that_is_left_out_changes_nothing_and_the_next_is_as_if_it_had_not_been() -> None:
    norms = [1.0 + 0.1 * (i % 7) for i in range(WINDOW // 2 + 1)]
    gradients = [torch.randn(4) for _ in range(6)]
    runs = []
    for spiked in (False, True):
        weight = nn.Parameter(torch.ones(4))
        optimizer, guard = make_optimizer(weight), GradientGuard(3.0, CPU)
        for norm in norms:
            skip_if_any(optimizer, [guard.update(torch.tensor(norm))])
        seen = []
        for i, gradient in enumerate(gradients):
            if spiked and i in (0, 3):
                weight.grad = torch.full((4,), 1e6)
                skip_if_any(optimizer, [guard.update(torch.tensor(2e6))])
                optimizer.step()
                assert torch.equal(weight, seen[-1] if seen else torch.ones(4))
            weight.grad = gradient.clone()
            skip_if_any(optimizer, [guard.update(torch.tensor(1.0))])
            optimizer.step()
            seen.append(weight.detach().clone())
        runs.append((seen, optimizer.state_dict()["state"][0], guard.num_skipped.item()))
    assert all(torch.equal(*pair) for pair in zip(runs[0][0], runs[1][0], strict=True))
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(runs[0][1][key], runs[1][1][key]), key
    assert (runs[0][2], runs[1][2]) == (0, 2)


def test_the_limit_follows_the_median_of_the_window() -> None:
    torch.manual_seed(3)
    norms = (torch.rand(3 * WINDOW) * 4).tolist()
    guard = GradientGuard(1.7, CPU)
    expected = 0
    for i, norm in enumerate(norms):
        window = sorted(norms[max(0, i - WINDOW) : i] + [math.inf] * max(0, WINDOW - i))
        expected += norm > 1.7 * window[WINDOW // 2]
        guard.update(torch.tensor(norm))
        if i <= WINDOW // 2:
            assert guard.num_skipped == 0
    assert guard.num_skipped == expected > 10
    upper = sorted(norms[-WINDOW:])[WINDOW // 2]
    assert upper == pytest.approx(statistics.median_high(norms[-WINDOW:]))
    again = GradientGuard(1.7, CPU)
    again.restore(json.loads(json.dumps(guard.state())))
    assert torch.equal(again.norms, guard.norms)
    assert torch.equal(again.num_skipped, guard.num_skipped)


def spiky(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Make the loss of every so many steps a thousand times too large, by the step that draws it."""
    step_generator = skipdit.training.loop.step_generator
    batch_loss = skipdit.training.loop.batch_loss
    at = [0]

    def generator(config: TrainConfig, rank: int, step: int, *device: Any) -> torch.Generator:
        at[0] = step
        return step_generator(config, rank, step, *device)

    def loss(*arguments: Any) -> Tensor:
        return batch_loss(*arguments) * (1000 if at[0] % every == every - 1 else 1)

    monkeypatch.setattr(skipdit.training.loop, "step_generator", generator)
    monkeypatch.setattr(skipdit.training.loop, "batch_loss", loss)


def interrupt_at(last: int) -> Callable[[TrainConfig, int], float]:
    def rate(config: TrainConfig, step: int) -> float:
        if step == last:
            raise KeyboardInterrupt
        return learning_rate_at(config, step)

    return rate


def test_a_run_leaves_out_spikes_tells_it_and_resumes_exactly(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("skipdit.training.guard.WINDOW", 8)
    config = dataclasses.replace(config, max_steps=24, checkpoint_every=6, num_checkpoints=9)
    spiky(monkeypatch, 7)  # steps 7, 14, 21
    train(config, tmp_path / "whole", device="cpu")
    log = read_log(tmp_path / "whole")
    assert log[6]["gradient_norm"] > 50 * log[5]["gradient_norm"]
    assert [entry["steps_left_out"] for entry in log] == [0] * 6 + [1] * 7 + [2] * 7 + [3] * 4
    told = [message for message in caplog.messages if "skipped" in message]
    assert told[0] == "up to step 7, 1 more step(s) skipped: the gradient norm was above 5 times its median"
    assert len(told) == 3
    assert int(tensors_of(list_checkpoints(tmp_path / "whole")[-1])["optimizer.patch_embed.proj.bias.step"]) == 21

    with monkeypatch.context() as patch:
        patch.setattr(skipdit.training.loop, "learning_rate_at", interrupt_at(20))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped", device="cpu")
    caplog.clear()
    train(config, tmp_path / "stopped", device="cpu")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert [entry["steps_left_out"] for entry in read_log(tmp_path / "stopped")] == [
        entry["steps_left_out"] for entry in log
    ]
    assert [message for message in caplog.messages if "skipped" in message] == [told[2]]


def test_without_spikes_a_guard_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(config, gradient_guard=0.0), tmp_path / "free", device="cpu")
    train(config, tmp_path / "guarded", device="cpu")
    assert_same_run(tmp_path / "free", tmp_path / "guarded")
    assert "steps_left_out" not in read_log(tmp_path / "free")[0]
    longer = dataclasses.replace(config, max_steps=8, gradient_guard=0.0)
    with pytest.raises(ValueError, match=r"other settings \(gradient_guard\): give --allow-changes"):
        train(longer, tmp_path / "guarded", device="cpu")
    train(longer, tmp_path / "guarded", device="cpu", allow_changes=True)
    train(dataclasses.replace(longer, max_steps=9, gradient_guard=4.0), tmp_path / "guarded", device="cpu",
          allow_changes=True)  # fmt: skip


def test_factors_that_mean_nothing_are_refused(config: TrainConfig) -> None:
    for factor in (-1.0, 0.5, 1.0):
        with pytest.raises(ValueError, match=f"gradient_guard must be above 1, or 0 for none, got {factor}"):
            dataclasses.replace(config, gradient_guard=factor)


# ----------------------------------------------------------------------------------------------------------------------
# Which items a step learned


@pytest.mark.parametrize("batch_size", [5, 12, 30])
def test_the_items_of_a_step_are_those_of_its_batch(config: TrainConfig, batch_size: int) -> None:
    config = dataclasses.replace(config, batch_size=batch_size)
    items = open_items(config.data)
    numbered = [(torch.tensor([index]), index) for index in range(len(items))]
    with load_batches(numbered, config, start_processes(CPU), 0) as batches:  # pyright: ignore[reportArgumentType]
        for step, (_, indices) in enumerate(itertools.islice(batches, 7)):
            assert items_of_step(config, len(items), step) == indices.tolist()


def test_where_a_loss_is_not_finite_its_step_and_items_are_named(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, count = skipdit.training.loop.prepare_batch, iter(range(100))

    def spoil(pixels: Tensor, *rest: Any) -> object:
        return draw(pixels * math.nan if next(count) == 4 else pixels, *rest)

    monkeypatch.setattr(skipdit.training.loop, "prepare_batch", spoil)
    config = dataclasses.replace(config, batch_size=7, log_every=100, checkpoint_every=100)
    items = open_items(config.data)
    learned = items_of_step(config, len(items), 4)
    with pytest.raises(ValueError, match="at step 5 is no longer finite") as error:
        train(config, tmp_path / "run", device="cpu")
    named = ", ".join(f"{index} ({items.names(index)})" for index in learned[:5])
    assert str(error.value).endswith(f"; its batch had the items {named} and 2 more")
    assert f"{tmp_path / 'data'}" in items.names(0)
