"""`--compile` for all four tasks: whole graphs, a kind of step each, and grids without them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tasks import EVERY_TASK, make_config, make_data
from torch import nn
from torch._dynamo.testing import CompileCounter
from training_runs import read_log

from skipdit.training import TokenRoutingConfig, TrainConfig, list_checkpoints, train

ROUTING = TokenRoutingConfig(mode="bypass", share=0.5, num_shallow_units=1, deep_drop=0.4, dense_end=0.3)


def config_of(task: str, data: Path) -> TrainConfig:
    """Ten steps of all three kinds, and a grid."""
    settings: dict[str, Any] = {"max_steps": 10, "sample_every": 5, "routing": ROUTING, "seed": 1}
    return make_config(task, data, **settings)


@pytest.mark.parametrize("task", EVERY_TASK)
def test_each_kind_of_step_is_one_whole_graph(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and run eagerly, so that the losses are those of a run that is not compiled, to the bit."""
    config, counter, compile = config_of(task, make_data(tmp_path / "data")), CompileCounter(), nn.Module.compile

    def whole(module: nn.Module) -> None:
        torch._dynamo.reset()
        compile(module, backend=counter, fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", whole)
    train(dataclasses.replace(config, compile=True), tmp_path / "compiled", device="cpu")
    assert counter.frame_count == 3
    train(config, tmp_path / "eager", device="cpu")
    losses = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("compiled", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (tmp_path / "compiled" / "samples" / "step-0000010.png").is_file()
    assert len(list_checkpoints(tmp_path / "compiled")) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_compiled_run_learns_what_an_eager_one_learns(task: str, tmp_path: Path) -> None:
    """With the compiler of PyTorch that users have."""
    config = config_of(task, make_data(tmp_path / "data"))
    for name in ("eager", "compiled"):
        train(dataclasses.replace(config, compile=name == "compiled"), tmp_path / name, device="cpu")
    losses = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("compiled", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
