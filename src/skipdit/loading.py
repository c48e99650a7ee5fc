"""What `skipdit sample` can be asked for: the bundled models, pipelines in folders, checkpoints."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, cast, get_args

import diffusers
import torch
from diffusers import AutoencoderKL
from diffusers.utils.logging import disable_progress_bar, enable_progress_bar
from safetensors import SafetensorError
from torch import nn

from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.checkpoints import load_model
from skipdit.diffusion import Objective, make_scheduler, objective_of
from skipdit.models.dit import DiT
from skipdit.models.latte import Latte
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline
from skipdit.samplers import (
    ClassToImageSampler,
    ClassToVideoSampler,
    Sampler,
    text_to_image_sampler,
    text_to_video_sampler,
)
from skipdit.text import WIDTH
from skipdit.training import resolve_device

TaskName = Literal["class-to-image", "class-to-video", "text-to-image", "text-to-video"]
DTypeName = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Bundled:
    """A model that comes with the package: its folder among the assets, its task, and what it draws well."""

    folder: str
    task: TaskName
    showcase: tuple[str, ...]


BUNDLED = {
    "emoji": Bundled(
        folder="class_to_image",
        task="class-to-image",
        showcase=(
            "face-smiling",
            "heart",
            "time",
            "cat-face",
            "person",
            "warning",
            "face-tongue",
            "keycap",
            "face-affection",
            "family",
            "zodiac",
            "face-concerned",
            "person-role",
            "av-symbol",
            "face-hand",
            "religion",
        ),
    ),
    "emoji-clips": Bundled(
        folder="class_to_video",
        task="class-to-video",
        showcase=("time", "person", "family", "heart"),
    ),
    "emoji-text": Bundled(
        folder="text_to_image",
        task="text-to-image",
        showcase=(
            "grinning face",
            "red heart",
            "cat face",
            "a cat with a rocket",
            "crying face",
            "three o'clock",
            "sunflower",
            "police car",
            "blue circle",
            "clown face",
            "woman scientist",
            "pizza",
            "globe showing europe-africa",
            "dog face",
            "green apple",
            "warning",
        ),
    ),
    "emoji-text-clips": Bundled(
        folder="text_to_video",
        task="text-to-video",
        showcase=("grinning face", "person frowning", "family", "face with tears of joy"),
    ),
}


@dataclass(frozen=True)
class Source:
    """A model to sample with, what is wanted of it where nothing is asked for, and the calibrated schedules that came
    with it, by name."""

    sampler: Sampler
    showcase: tuple[str, ...] = ()
    schedules: Mapping[str, CacheMethod] = field(default_factory=dict)

    def cache(self, spec: str) -> CacheMethod | None:
        """As `parse_method`; `calibrated` or `calibrated:{name}` is a schedule that came with the model, `none` no
        cache. `ValueError` where there is no such schedule."""
        if spec == "none":
            return None
        kind, _, name = spec.partition(":")
        if kind != "calibrated":
            return parse_method(spec)
        if not self.schedules:
            raise ValueError("no calibrated schedules came with this model: run skipdit calibrate, or use --cache auto")
        name = name or (DEFAULT_SCHEDULE if DEFAULT_SCHEDULE in self.schedules else next(iter(self.schedules)))
        if name not in self.schedules:
            raise ValueError(f"the calibrated schedules of this model are {', '.join(self.schedules)}, got {name!r}")
        return self.schedules[name]


def load_source(
    model: str | None = None,
    *,
    task: TaskName | None = None,
    device: str = "auto",
    dtype: DTypeName = "float32",
    scheduler: str | None = None,
    vae: Path | None = None,
    num_attention_heads: int | None = None,
    decodes: bool = True,
) -> Source:
    """A bundled model by name, or the folder of a pipeline, or one made around a checkpoint; on its device.

    task: by default that of the model; without a model, of which the bundled one is taken, class-to-image. scheduler:
    see `skipdit.diffusion.make_scheduler`; by default the model's own. vae: folder of an AutoencoderKL, for models of
    latents. num_attention_heads: where a checkpoint cannot tell. decodes: whether pictures are wanted, for which a
    model of latents needs an autoencoder.

    `FileNotFoundError` where there is no such model; `ValueError` where it is of another task, foreign or broken.
    """
    if task is not None and task not in get_args(TaskName):
        raise ValueError(f"task must be one of {', '.join(get_args(TaskName))}, got {task!r}")
    if model is None:
        model = next(name for name, bundled in BUNDLED.items() if bundled.task == (task or "class-to-image"))
    source = _open(model, DTYPES[dtype], num_attention_heads)
    sampler = source.sampler
    if task is not None and sampler.task != task:
        raise ValueError(f"{model} is a {sampler.task} model, not {task}")
    pipeline = sampler.pipeline
    num_channels = pipeline.transformer.config.in_channels
    if vae is not None:
        if sampler.task.startswith("text"):
            raise ValueError(f"--vae is for class-conditional models, got {vae} for a {sampler.task} model")
        if not vae.is_dir():
            raise FileNotFoundError(f"no folder of an AutoencoderKL at {vae}")
        decoder = AutoencoderKL.from_pretrained(vae, use_safetensors=True, dtype=DTYPES[dtype])
        if decoder.config["latent_channels"] != num_channels:
            latents = decoder.config["latent_channels"]
            raise ValueError(f"{vae} decodes latents of {latents} channels, {model} makes {num_channels}")
        pipeline.register_modules(vae=decoder)
    if decodes and pipeline.vae is None and num_channels != 3:
        raise ValueError(f"{model} works on latents of {num_channels} channels: give --vae FOLDER")
    if scheduler is not None:
        learned = sampler.task.startswith("class") and learns_variance(pipeline.transformer)
        objective = dataclasses.replace(objective_of(pipeline.scheduler), learned_variance=learned)
        pipeline.scheduler = make_scheduler(objective, scheduler)
    pipeline.to(resolve_device(device))
    return source


SCHEDULES = "schedules"  # folder in that of a pipeline
DEFAULT_SCHEDULE = "1.8x"


def _open(model: str, dtype: torch.dtype, num_attention_heads: int | None) -> Source:
    path = Path(model)
    if model in BUNDLED:
        with as_file(files("skipdit") / "assets" / BUNDLED[model].folder) as folder:
            return Source(_from_folder(folder, dtype), BUNDLED[model].showcase, _read_schedules(folder))
    if (path / "model_index.json").is_file():
        return Source(_from_folder(path, dtype), (), _read_schedules(path))
    if not path.exists():
        raise FileNotFoundError(f"no model at {model}: give {', '.join(BUNDLED)}, a pipeline's folder or a checkpoint")
    transformer: Any = load_model(path, num_attention_heads=num_attention_heads, dtype=dtype)
    if not isinstance(transformer, (DiT, Latte)) or not learns_variance(transformer):
        raise ValueError(f"{path} does not say what its model predicts: give the folder of its pipeline")
    scheduler = make_scheduler(Objective(learned_variance=True), "ddim")
    if isinstance(transformer, Latte):
        return Source(ClassToVideoSampler(ClassToVideoPipeline(transformer, scheduler)))
    return Source(ClassToImageSampler(ClassToImagePipeline(transformer, scheduler)))


def _read_schedules(folder: Path) -> dict[str, CacheMethod]:
    """By file name, the gentlest first."""
    methods = {path.stem: parse_method(path) for path in (folder / SCHEDULES).glob("*.json")}
    return dict(sorted(methods.items(), key=lambda item: -len(cast(Any, item[1].schedule).full_steps)))


def learns_variance(model: nn.Module) -> bool:
    """Whether half of the output is the variance, as in the official models: those predict epsilon on a ddpm
    process.
    """
    config: Any = model.config
    return config.out_channels == 2 * config.in_channels


def _from_folder(folder: Path, dtype: torch.dtype) -> Sampler:
    """A saved pipeline; `ValueError` naming the folder where something in it is missing, foreign or broken.

    `load_model` reads the transformer, since diffusers only warns of missing and unknown weights.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'model_index.json'} is broken: {error!r}") from error
    if name not in _OPENERS:
        raise ValueError(f"{folder} is a {name}, not one of {', '.join(_OPENERS)}")
    transformer = load_model(folder, dtype=dtype)
    disable_progress_bar()
    try:
        return _OPENERS[name](folder, transformer, dtype, index)
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is not a whole {name}: {str(error).splitlines()[0]}") from error
    finally:
        enable_progress_bar()


def _open_class_to_image(folder: Path, transformer: Any, dtype: torch.dtype, index: Any) -> Sampler:
    return ClassToImageSampler(
        ClassToImagePipeline.from_pretrained(folder, transformer=transformer, use_safetensors=True, dtype=dtype)
    )


def _open_class_to_video(folder: Path, transformer: Any, dtype: torch.dtype, index: Any) -> Sampler:
    return ClassToVideoSampler(
        ClassToVideoPipeline.from_pretrained(folder, transformer=transformer, use_safetensors=True, dtype=dtype)
    )


def _open_text(make: Callable[[Any, Any], Sampler], width_option: str) -> Callable[..., Sampler]:
    def open_text(folder: Path, transformer: Any, dtype: torch.dtype, index: Any) -> Sampler:
        if index.get("text_encoder", [None])[0] is not None or transformer.config[width_option] != WIDTH:
            raise ValueError(
                f"{folder} has a text encoder of its own: load it with diffusers' {index['_class_name']}, then call "
                "skipdit.enable_cache(pipeline, 'N2')"
            )
        scheduler_class = getattr(diffusers, index["scheduler"][1])
        return make(transformer, scheduler_class.from_pretrained(folder, subfolder="scheduler"))

    return open_text


_OPENERS: dict[str, Callable[..., Sampler]] = {
    "ClassToImagePipeline": _open_class_to_image,
    "ClassToVideoPipeline": _open_class_to_video,
    "HunyuanDiTPipeline": _open_text(text_to_image_sampler, "cross_attention_dim_t5"),
    "LattePipeline": _open_text(text_to_video_sampler, "caption_channels"),
}
