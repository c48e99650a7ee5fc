"""What `skipdit sample` can be asked for: the bundled models, pipelines in folders, checkpoints."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast, get_args

import torch
from diffusers import HunyuanDiT2DModel
from torch import nn

from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.checkpoints import load_model
from skipdit.checkpoints.parts import part_class, read_autoencoder, read_index, read_labels, read_scheduler
from skipdit.checkpoints.runs import find_checkpoint, read_run_config
from skipdit.command_options import WeightsOptions
from skipdit.diffusion import SCHEDULERS, Objective, make_scheduler, objective_of
from skipdit.environment import resolve_device
from skipdit.models.dit import DiT
from skipdit.models.latte import Latte
from skipdit.options import DTypeName, ObjectiveName, TaskName
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline
from skipdit.samplers import (
    ClassToImageSampler,
    ClassToVideoSampler,
    Sampler,
    text_to_image_sampler,
    text_to_video_sampler,
)
from skipdit.text import WIDTH
from skipdit.untrusted import printable

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


@dataclass(frozen=True, kw_only=True)
class Convention:
    """What a bare file's model predicts, and how it is told the time: it embeds time_scale * timestep + time_shift.
    sign: of its prediction, over that of the objective."""

    objective: Objective
    time_scale: float = 1.0
    time_shift: float = 0.0
    sign: int = 1


FLOW = Objective(process="flow", prediction_type="flow_prediction")
CONVENTIONS: dict[str, Convention] = {
    "epsilon": Convention(objective=Objective()),
    "v_prediction": Convention(objective=Objective(prediction_type="v_prediction")),
    "flow": Convention(objective=FLOW),  # ours and diffusers': noise - data, at 1000 times the share of noise
    # SiT, transport/path.py: data - noise, at the share of data
    "sit": Convention(objective=FLOW, time_scale=-1e-3, time_shift=1.0, sign=-1),
    # REPA, loss.py: noise - data, at the share of noise
    "repa": Convention(objective=FLOW, time_scale=1e-3),
}


@dataclass(frozen=True, kw_only=True)
class BareOptions(WeightsOptions):
    """What a file of weights does not say; see `skipdit.load_model`."""

    def refuse(self, model: str) -> None:
        """`ValueError` naming what has no effect on a model that says all this itself."""
        for option in dataclasses.fields(self):
            if getattr(self, option.name) not in (None, ()):
                raise ValueError(f"{option.name} is for a file of weights, but {printable(model)} says it itself")


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
    num_classes: int | None = None,
    objective: ObjectiveName | None = None,
    drop: tuple[str, ...] = (),
    decodes: bool = True,
) -> Source:
    """A bundled model by name, or the folder of a pipeline, or one made around a checkpoint; on its device.

    task: by default that of the model; without a model, of which the bundled one is taken, class-to-image. scheduler:
    see `skipdit.diffusion.make_scheduler`; by default the model's own. vae: folder of an AutoencoderKL or of a pipeline
    with one, for models of latents. num_attention_heads, num_classes, objective, drop: see `BareOptions`. decodes:
    whether pictures are wanted, for which a model of latents needs an autoencoder.

    `FileNotFoundError` where there is no such model; `ValueError` where it is of another task, foreign or broken.
    """
    if task is not None and task not in get_args(TaskName):
        raise ValueError(f"task must be one of {', '.join(get_args(TaskName))}, got {task!r}")
    if model is None:
        model = next(name for name, bundled in BUNDLED.items() if bundled.task == (task or "class-to-image"))
    bare = BareOptions(
        num_attention_heads=num_attention_heads, num_classes=num_classes, objective=objective, drop=tuple(drop)
    )
    source = _open(model, DTYPES[dtype], bare)
    sampler = source.sampler
    if task is not None and sampler.task != task:
        raise ValueError(f"{model} is a {sampler.task} model, not {task}")
    pipeline = sampler.pipeline
    num_channels = pipeline.transformer.config.in_channels
    if vae is not None:
        if sampler.task.startswith("text"):
            raise ValueError(f"--vae is for class-conditional models, got {vae} for a {sampler.task} model")
        decoder = read_autoencoder(vae, DTYPES[dtype])
        if decoder.config["latent_channels"] != num_channels:
            latents = decoder.config["latent_channels"]
            raise ValueError(f"{vae} decodes latents of {latents} channels, {model} makes {num_channels}")
        pipeline.register_modules(vae=decoder)
    if decodes and pipeline.vae is None and num_channels != 3:
        raise ValueError(f"{model} works on latents of {num_channels} channels: give --vae FOLDER")
    if scheduler is not None:
        said = objective_of(pipeline.scheduler)
        is_epsilon = sampler.task.startswith("class") and said.prediction_type == "epsilon"
        learned = is_epsilon and learns_variance(pipeline.transformer)
        pipeline.scheduler = make_scheduler(dataclasses.replace(said, learned_variance=learned), scheduler)
    pipeline.to(resolve_device(device))
    return source


SCHEDULES = "schedules"  # folder in that of a pipeline
DEFAULT_SCHEDULE = "1.8x"
MAX_SCHEDULES = 100


def _open(model: str, dtype: torch.dtype, bare: BareOptions) -> Source:
    path = Path(model)
    if model in BUNDLED:
        bare.refuse(model)
        with as_file(files("skipdit") / "assets" / BUNDLED[model].folder) as folder:
            return Source(_from_folder(folder, dtype), BUNDLED[model].showcase, _read_schedules(folder))
    for folder in (path, path / "pipeline"):  # the second of a finished run
        if (folder / "model_index.json").is_file():
            bare.refuse(model)
            return Source(_from_folder(folder, dtype), (), _read_schedules(folder))
    if not path.exists():
        raise FileNotFoundError(
            f"no model at {printable(model)}: give {', '.join(BUNDLED)}, a pipeline's folder or a checkpoint"
        )
    if path.is_dir() and (checkpoint := find_checkpoint(path)) is not None:
        bare.refuse(model)
        return Source(_from_run(checkpoint, dtype))
    return Source(_from_file(path, dtype, bare))


def _from_file(path: Path, dtype: torch.dtype, bare: BareOptions) -> Sampler:
    """A checkpoint, or a folder of a transformer alone."""
    transformer: Any = load_model(
        path,
        num_attention_heads=bare.num_attention_heads,
        num_classes=bare.num_classes,
        drop=bare.drop,
        dtype=dtype,
    )
    name = bare.objective
    if name is None and isinstance(transformer, (DiT, Latte)) and learns_variance(transformer):
        name = "epsilon"
    if name is None or not isinstance(transformer, (DiT, Latte)):
        told = f": give objective, one of {', '.join(CONVENTIONS)}, or" if name is None else ": give"
        raise ValueError(f"{printable(path)} does not say what its model predicts{told} the folder of its pipeline")
    return pipeline_of(transformer, name)


def pipeline_of(transformer: Any, name: ObjectiveName) -> Sampler:
    """A pipeline around a model that predicts this; the model may change as `adopt` says."""
    convention = CONVENTIONS[name]
    adopt(transformer, convention)
    learned = name == "epsilon" and learns_variance(transformer)
    objective = dataclasses.replace(convention.objective, learned_variance=learned)
    return _make_sampler(transformer, make_scheduler(objective, SCHEDULERS[objective.process][0]))


@torch.no_grad()
def adopt(model: Any, convention: Convention) -> None:
    """Makes a model that was trained under a convention follow ours, in place; its numbers stay the same, up to their
    sign. `ValueError` for a Latte, whose releases know only one."""
    if convention.sign < 0:
        model.final_layer.proj.weight.neg_()
        model.final_layer.proj.bias.neg_()
    if (convention.time_scale, convention.time_shift) == (1, 0):
        return
    if not isinstance(model, DiT):
        raise ValueError(f"no {type(model).__name__} tells the time as SiT and REPA do: use objective flow")
    model.time_scale, model.time_shift = convention.time_scale, convention.time_shift
    model.register_to_config(time_scale=model.time_scale, time_shift=model.time_shift)


def _from_run(checkpoint: Path, dtype: torch.dtype) -> Sampler:
    """The averaged weights of a checkpoint of `skipdit train`, with the objective of its run."""
    fields = read_run_config(checkpoint).get("objective")
    try:
        said = Objective(**cast(Any, fields))
        scheduler = make_scheduler(said, SCHEDULERS[said.process][0])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{printable(checkpoint)} does not say its run's objective: {printable(error)}") from error
    return _make_sampler(load_model(checkpoint, dtype=dtype), scheduler)


def _make_sampler(transformer: Any, scheduler: Any) -> Sampler:
    if isinstance(transformer, DiT):
        return ClassToImageSampler(ClassToImagePipeline(transformer, scheduler))
    if isinstance(transformer, Latte):
        return ClassToVideoSampler(ClassToVideoPipeline(transformer, scheduler))
    if isinstance(transformer, HunyuanDiT2DModel):
        return text_to_image_sampler(transformer, scheduler)
    return text_to_video_sampler(transformer, scheduler)


def _read_schedules(folder: Path) -> dict[str, CacheMethod]:
    """By file name, the gentlest first."""
    paths = sorted((folder / SCHEDULES).glob("*.json"))
    if len(paths) > MAX_SCHEDULES:
        raise ValueError(f"{printable(folder / SCHEDULES)} holds more than the {MAX_SCHEDULES} schedules that are read")
    methods = {path.stem: parse_method(path) for path in paths}
    return dict(sorted(methods.items(), key=lambda item: -len(cast(Any, item[1].schedule).full_steps)))


def learns_variance(model: nn.Module) -> bool:
    """Whether half of the output is the variance, as in the official models: those predict epsilon on a ddpm
    process.
    """
    config: Any = model.config
    return config.out_channels == 2 * config.in_channels


def _from_folder(folder: Path, dtype: torch.dtype) -> Sampler:
    """A saved pipeline; `ValueError` naming the folder where something in it is missing, foreign or broken."""
    index = read_index(folder)
    name = index["_class_name"]
    if name not in _OPENERS:
        raise ValueError(f"{printable(folder)} is a {printable(name)}, not one of {', '.join(_OPENERS)}")
    try:
        return _OPENERS[name](folder, load_model(folder, dtype=dtype), dtype, index)
    except OSError as error:
        raise ValueError(f"{printable(folder)} is not a whole {name}: {printable(error)}") from error


def _scheduler(folder: Path, index: Mapping[str, Any]) -> Any:
    class_name = part_class(index, "scheduler", folder)
    if class_name is None:
        raise ValueError(f"{printable(folder)} is not a whole {index['_class_name']}: it has no scheduler")
    return read_scheduler(folder, class_name)


def _autoencoder(folder: Path, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    return None if part_class(index, "vae", folder) is None else read_autoencoder(folder / "vae", dtype)


def _open_class(
    make: Callable[..., Any], sampler: Callable[[Any], Sampler], model_class: type[nn.Module]
) -> Callable[..., Sampler]:
    def open_class(folder: Path, transformer: Any, dtype: torch.dtype, index: Any) -> Sampler:
        if not isinstance(transformer, model_class):
            raise ValueError(
                f"{printable(folder)} is not a whole {index['_class_name']}: its transformer is of another class"
            )
        labels = read_labels(index, cast(Any, transformer).config.num_classes, folder)
        vae = _autoencoder(folder, index, dtype)
        return sampler(make(transformer, _scheduler(folder, index), vae, labels))

    return open_class


def _open_text(make: Callable[[Any, Any, Any], Sampler], width_option: str) -> Callable[..., Sampler]:
    def open_text(folder: Path, transformer: Any, dtype: torch.dtype, index: Any) -> Sampler:
        has_encoder = part_class(index, "text_encoder", folder) is not None
        if has_encoder or transformer.config.get(width_option) != WIDTH:
            raise ValueError(
                f"{printable(folder)} has a text encoder of its own: load it with diffusers' {index['_class_name']}, "
                "then call skipdit.enable_cache(pipeline, 'N2')"
            )
        return make(transformer, _scheduler(folder, index), _autoencoder(folder, index, dtype))

    return open_text


_OPENERS: dict[str, Callable[..., Sampler]] = {
    "ClassToImagePipeline": _open_class(ClassToImagePipeline, ClassToImageSampler, DiT),
    "ClassToVideoPipeline": _open_class(ClassToVideoPipeline, ClassToVideoSampler, Latte),
    "HunyuanDiTPipeline": _open_text(text_to_image_sampler, "cross_attention_dim_t5"),
    "LattePipeline": _open_text(text_to_video_sampler, "caption_channels"),
}
