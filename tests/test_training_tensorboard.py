"""TensorBoard beside the log: the same numbers and grids."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training_runs import make_config, make_data, read_log

import skipdit.training.loop
from skipdit.training import TrainConfig, learning_rate_at, train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    config = make_config(make_data(tmp_path / "data"))
    return dataclasses.replace(config, tensorboard=True, log_every=2, sample_every=3)


def read_events(folder: Path) -> Any:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    read.Reload()
    return read


def scalars(events: Any, tag: str) -> dict[int, float]:
    return {each.step: float(each.tensor_proto.float_val[0]) for each in events.Tensors(tag)}


def test_events_have_the_numbers_of_the_log_and_the_grids(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")

    def rate(config: TrainConfig, step: int) -> float:
        if step == 5:
            raise KeyboardInterrupt
        return learning_rate_at(config, step)

    out = tmp_path / "run"
    monkeypatch.setattr(skipdit.training.loop, "learning_rate_at", rate)
    with pytest.raises(KeyboardInterrupt):
        train(config, out, device="cpu")
    monkeypatch.undo()
    train(config, out, device="cpu")  # from step 3: what was written of step 4 is written again
    events, log = read_events(out / "tensorboard"), read_log(out)
    assert [entry["step"] for entry in log] == [2, 3, 4, 6]
    for name in set(log[0]) - {"step", "unit_gradient_norms"}:
        assert scalars(events, name) == pytest.approx({entry["step"]: entry[name] for entry in log}), name
    for unit in range(4):
        expected = {entry["step"]: entry["unit_gradient_norms"][unit] for entry in log}
        assert scalars(events, f"unit_gradient_norms/{unit}") == pytest.approx(expected)
    grids = {each.step: each.encoded_image_string for each in events.Images("samples")}
    assert list(grids) == [3, 6]
    from io import BytesIO

    for step, encoded in grids.items():
        with Image.open(out / "samples" / f"step-{step:07d}.png") as grid, Image.open(BytesIO(encoded)) as shown:
            assert np.array_equal(np.asarray(grid.convert("RGB")), np.asarray(shown))


def test_a_run_may_go_on_without_it(config: TrainConfig, tmp_path: Path) -> None:
    plain = dataclasses.replace(config, tensorboard=False, sample_every=0)
    train(plain, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "tensorboard").exists()
    if importlib.util.find_spec("tensorboard") is not None:
        train(dataclasses.replace(plain, tensorboard=True, max_steps=8), tmp_path / "run", device="cpu")
        assert list(scalars(read_events(tmp_path / "run" / "tensorboard"), "loss")) == [8]


def test_where_it_is_not_installed_one_line_says_what_to_install(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(ValueError, match=r'^events .* need tensorboard: pip install "skipdit\[tensorboard\]"$'):
        train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
