"""The loop: it learns, it resumes exactly, it leaves whole files."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from training_runs import make_config, make_data, read_log

import skipdit.training.loop
from skipdit.checkpoints import load_model
from skipdit.data.pictures import open_pictures
from skipdit.models.long_skip import LongSkipConfig
from skipdit.pipelines import ClassToImagePipeline
from skipdit.recipes import RECIPES
from skipdit.spectral import spectral_norm
from skipdit.tasks.class_to_image import ClassToImageTraining, ModelConfig
from skipdit.training import (
    SpectralConfig,
    TrainConfig,
    computes_in_bf16,
    learning_rate_at,
    list_checkpoints,
    prepare_batch,
    step_generator,
    train,
)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Three plain colours, 8x8 pixels, four tokens."""
    return make_config(make_data(tmp_path / "data"))


def interrupt_at(last: int) -> Callable[[TrainConfig, int], float]:
    def rate(config: TrainConfig, step: int) -> float:
        if step == last:
            raise KeyboardInterrupt
        return learning_rate_at(config, step)

    return rate


def test_a_resumed_run_equals_an_uninterrupted_one(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config, tmp_path / "whole", device="cpu")
    # the rate is a function of the step and of max_steps, so the first half stops by a signal, not by a shorter run
    stopped = tmp_path / "stopped"
    monkeypatch.setattr(skipdit.training.loop, "learning_rate_at", interrupt_at(5))
    with pytest.raises(KeyboardInterrupt):
        train(config, stopped, device="cpu")
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(stopped)] == ["checkpoint-0000003"]
    train(config, stopped, device="cpu")
    keys = ("step", "loss", "gradient_norm", "learning_rate")
    assert [[entry[key] for key in keys] for entry in read_log(stopped)] == [
        [entry[key] for key in keys] for entry in read_log(tmp_path / "whole")
    ]
    first, second = (
        ClassToImagePipeline.from_pretrained(out / "pipeline").transformer.state_dict()
        for out in (tmp_path / "whole", stopped)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("on", ["long_skips", "blocks"])
def test_a_spectral_cap_holds_in_the_pipeline_and_resumes(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: Literal["long_skips", "blocks"]
) -> None:
    config = dataclasses.replace(config, spectral=SpectralConfig(maximum=0.6, on=on), release_dtype="float32")
    folder = train(config, tmp_path / "whole", device="cpu")
    model = load_model(folder)
    assert [name for name in model.state_dict() if "parametrizations" in name] == []
    capped = [model.blocks[unit].long_skip.proj for unit in (2, 3)]
    if on == "blocks":
        capped += [block.mlp.fc1 for block in model.blocks]
    norms = [spectral_norm(layer.weight).value for layer in capped]
    assert 0.59 < max(norms) <= 0.6 * (1 + 1e-3)
    free = spectral_norm(model.blocks[0].attn.qkv.weight).value
    assert free <= 0.601 if on == "blocks" else free > 0.7

    monkeypatch.setattr(skipdit.training.loop, "learning_rate_at", interrupt_at(5))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", device="cpu")
    monkeypatch.undo()
    resumed = load_model(train(config, tmp_path / "stopped", device="cpu")).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="spectral"):
        train(dataclasses.replace(config, spectral=None), tmp_path / "stopped", device="cpu")


def test_a_spectral_penalty_lowers_what_it_is_put_on(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, max_steps=30)
    penalty = SpectralConfig(maximum=0.3, form="penalty", penalty_weight=10.0)
    norms = []
    for name, spectral in (("free", None), ("held", penalty)):
        model = load_model(train(dataclasses.replace(config, spectral=spectral), tmp_path / name, device="cpu"))
        norms.append(spectral_norm(model.blocks[3].long_skip.proj.weight).value)
    assert norms[1] < 0.9 * norms[0]


def test_spectral_settings_that_mean_nothing_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    plain = dataclasses.replace(config.model, long_skip=None)
    config = dataclasses.replace(config, model=plain, spectral=SpectralConfig())
    with pytest.raises(ValueError, match="needs a model with long skips"):
        train(config, tmp_path / "run", device="cpu")
    for options in ({"maximum": 0.0}, {"penalty_weight": -1.0}, {"form": "belt"}, {"on": "heads"}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            SpectralConfig(**options)


def test_the_log_holds_the_gradient_norm_of_every_unit(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "run", device="cpu")
    for entry in read_log(tmp_path / "run"):
        units = entry["unit_gradient_norms"]
        assert len(units) == 4
        assert math.hypot(*units) <= entry["gradient_norm"] * (1 + 1e-3)
    assert min(units) > 0  # at the first step the blocks are the identity and have no gradient


def test_it_learns_and_the_pipeline_samples_the_classes(config: TrainConfig, tmp_path: Path) -> None:
    # the colour is known from the noisy picture but at the highest noise: only there the label teaches
    objective = dataclasses.replace(config.objective, logit_mean=2.0)
    config = dataclasses.replace(
        config, objective=objective, max_steps=300, checkpoint_every=300, sample_every=300, ema_decay=0.98
    )
    folder = train(config, tmp_path / "run", device="cpu")
    losses = [entry["loss"] for entry in read_log(tmp_path / "run")]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    with Image.open(tmp_path / "run" / "samples" / "step-0000300.png") as grid:
        assert grid.size[0] > 24
    pipeline = ClassToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert list(pipeline.labels) == ["blue", "green", "red"]
    pictures = pipeline([2, 1, 0], num_inference_steps=10, guidance_scale=1.5, output_type="pt",
                        generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    assert pictures.mean(dim=(2, 3)).argmax(dim=1).tolist() == [0, 1, 2]  # red, green, blue channel


def test_two_parts_of_a_batch_give_nearly_the_gradient_of_the_whole(config: TrainConfig, tmp_path: Path) -> None:
    """Not the same noise, but the same pictures and as many: the curves stay close."""
    train(dataclasses.replace(config, max_steps=3), tmp_path / "whole", device="cpu")
    train(dataclasses.replace(config, max_steps=3, num_accumulation_steps=2), tmp_path / "parts", device="cpu")
    assert [e["images"] for e in read_log(tmp_path / "parts")] == [12, 24, 36]
    for whole, parts in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "parts"), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=0.6)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_its_docstring_says_how_to_run_it(name: str) -> None:
    recipe = RECIPES[name]
    assert isinstance(recipe(), TrainConfig)
    assert f"skipdit train {name}" in (recipe.__doc__ or "")


def test_twenty_steps_of_the_emoji_recipe(tmp_path: Path) -> None:
    """The losses of the first and the last step are pinned; float32 on one thread."""
    config = dataclasses.replace(
        RECIPES["emoji"](), max_steps=20, batch_size=4, precision="no", sample_every=0, log_every=1,
        model=ModelConfig(num_layers=6, num_attention_heads=2, attention_head_dim=16, patch_size=16),
    )  # fmt: skip
    train(config, tmp_path, device="cpu")
    losses = [entry["loss"] for entry in read_log(tmp_path)]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(1.8465955, rel=1e-3)
    assert losses[19] == pytest.approx(3.1667, rel=1e-2)


@pytest.mark.slow
def test_three_hundred_steps_of_the_emoji_recipe(tmp_path: Path) -> None:
    """The mean losses of each hundred are pinned, routed and, at the end, dense; float32 on one thread."""
    config = dataclasses.replace(
        RECIPES["emoji"](), max_steps=300, batch_size=4, precision="no", sample_every=0, log_every=1,
        model=ModelConfig(num_layers=6, num_attention_heads=2, attention_head_dim=16, patch_size=16),
    )  # fmt: skip
    train(config, tmp_path, device="cpu")
    losses = torch.tensor([entry["loss"] for entry in read_log(tmp_path)])
    assert losses.view(3, 100).mean(dim=1).tolist() == pytest.approx([1.36958, 0.65486, 0.42737], rel=1e-2)


def test_checkpoints_of_another_model_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "run", device="cpu")
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, long_skip=None))
    with pytest.raises(ValueError, match=r"other settings \(model\)"):
        train(other, tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match=r"other settings \(learning_rate, seed\)"):
        train(dataclasses.replace(config, learning_rate=1e-3, seed=4), tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="fewer than its 6 steps"):
        train(dataclasses.replace(config, max_steps=5), tmp_path / "run", device="cpu")


def test_without_resume_a_run_starts_over(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path, device="cpu")
    train(dataclasses.replace(config, max_steps=2, seed=1), tmp_path, resume=False, device="cpu")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-0000002"]
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]


def test_a_log_that_was_cut_off_does_not_stop_the_run(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path, device="cpu")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    train(dataclasses.replace(config, max_steps=8), tmp_path, device="cpu")
    assert [entry["step"] for entry in read_log(tmp_path)] == list(range(1, 9))


def test_only_the_last_checkpoints_stay_and_none_is_half_written(config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(config, checkpoint_every=1, num_checkpoints=2), tmp_path, device="cpu")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-0000005", "checkpoint-0000006"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_rate_warms_up_and_falls() -> None:
    config = TrainConfig(max_steps=1000, warmup_steps=100, learning_rate=1.0)
    rates = [learning_rate_at(config, step) for step in range(1000)]
    assert rates[0] == 0.01
    assert max(rates) == rates[100] == 1.0
    assert rates[549] == pytest.approx(0.505, abs=0.01)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))
    assert learning_rate_at(dataclasses.replace(config, rate_schedule="constant"), 900) == 1.0


def test_labels_are_dropped_as_often_as_asked(config: TrainConfig) -> None:
    items = open_pictures(config.data)
    task = config.model.build(items, config.objective)
    assert isinstance(task, ClassToImageTraining)
    assert (task.model.null_class_label, len(task.data)) == (3, len(items))
    assert torch.equal(task.data[0][0], items.stored(0)[0])
    config = TrainConfig(label_dropout=0.25, flip=True)
    pictures, labels = (
        torch.arange(4000.0).reshape(-1, 1, 1, 2).expand(-1, 3, -1, -1),
        torch.zeros(2000, dtype=torch.long),
    )
    batch = prepare_batch(pictures, labels, config, task, step_generator(config, 0, 5), torch.device("cpu"))
    assert (batch.conditions == 3).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert set(batch.conditions.tolist()) == {0, 3}
    flipped = batch.x_start[:, 0, 0, 0] > batch.x_start[:, 0, 0, 1]
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.04)
    again = prepare_batch(pictures, labels, config, task, step_generator(config, 0, 5), torch.device("cpu"))
    assert torch.equal(batch.noise, again.noise)
    other = prepare_batch(pictures, labels, config, task, step_generator(config, 1, 5), torch.device("cpu"))
    assert not torch.equal(batch.noise, other.noise)


def test_precision_follows_the_hardware() -> None:
    assert computes_in_bf16("auto", torch.device("cpu")) == torch.cpu._is_avx512_bf16_supported()
    assert computes_in_bf16("bf16", torch.device("cpu"))
    assert not computes_in_bf16("no", torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size.*0"), ({"precision": "int8"}, "int8"), ({"label_dropout": 1.0}, "label_dropout"),
     ({"gradient_clip": -1.0}, "gradient_clip.*-1"), ({"num_workers": 100_000}, "num_workers.*256.*100000"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"rate_schedule": "linear"}, "linear"), ({"max_steps": -1}, "max_steps.*-1")],
)  # fmt: skip
def test_bad_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_a_batch_that_cannot_be_split_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="divisible by processes x accumulation steps = 5, got 12"):
        train(dataclasses.replace(config, num_accumulation_steps=5), tmp_path, device="cpu")


def test_a_plain_model_and_gradient_checkpointing_train_too(config: TrainConfig, tmp_path: Path) -> None:
    plain = dataclasses.replace(config, max_steps=2, model=dataclasses.replace(config.model, long_skip=None))
    train(plain, tmp_path / "plain", device="cpu")
    residual = dataclasses.replace(config.model, long_skip=LongSkipConfig(fusion="residual"))
    train(dataclasses.replace(config, max_steps=2, model=residual), tmp_path / "stored", device="cpu")
    train(
        dataclasses.replace(config, max_steps=2, model=residual, gradient_checkpointing=True),
        tmp_path / "again",
        device="cpu",
    )
    assert [e["loss"] for e in read_log(tmp_path / "stored")] == [e["loss"] for e in read_log(tmp_path / "again")]
