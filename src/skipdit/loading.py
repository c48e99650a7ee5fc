"""Open models to sample: the bundled ones, pipelines in folders, checkpoints."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.checkpoints import load_model
from skipdit.checkpoints.parts import part_class, read_autoencoder, read_index
from skipdit.checkpoints.runs import find_checkpoint, read_run_config
from skipdit.command_options import PipelineOptions, WeightsOptions
from skipdit.diffusion import Objective, make_scheduler
from skipdit.environment import resolve_device
from skipdit.files.untrusted import printable
from skipdit.interfaces import Config, Scheduler, Transformer
from skipdit.options import DTypeName, ObjectiveName, choose
from skipdit.tasks import TASKS, TaskName
from skipdit.tasks.published import open_published
from skipdit.tasks.task import Chosen, RunDefaults, Sampler, Task, learns_variance

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class Bundled:
    """A model that comes with the package."""

    folder: str
    """in the assets"""
    task: TaskName
    showcase: tuple[str, ...]
    """labels or prompts that it draws well"""


def _split(names: str) -> tuple[str, ...]:
    return tuple(names.split(", "))


BUNDLED = {
    "emoji": Bundled(
        folder="class_to_image",
        task="class-to-image",
        showcase=_split(
            "face-smiling, heart, time, cat-face, person, warning, face-tongue, keycap, face-affection, family, "
            "zodiac, face-concerned, person-role, av-symbol, face-hand, religion"
        ),
    ),
    "emoji-clips": Bundled(
        folder="class_to_video", task="class-to-video", showcase=("time", "person", "family", "heart")
    ),
    "emoji-text": Bundled(
        folder="text_to_image",
        task="text-to-image",
        showcase=_split(
            "grinning face, red heart, cat face, a cat with a rocket, crying face, three o'clock, sunflower, "
            "police car, blue circle, clown face, woman scientist, pizza, globe showing europe-africa, "
            "dog face, green apple, warning"
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
    """What the model of a bare weight file predicts. It embeds the time `time_scale * timestep + time_shift`."""

    objective: Objective
    """what it predicts, up to the sign"""
    time_scale: float = 1.0
    """factor of the timestep"""
    time_shift: float = 0.0
    """added after scaling"""
    sign: int = 1
    """sign of its prediction relative to the objective"""


FLOW = Objective(process="flow", prediction_type="flow_prediction")
CONVENTIONS: dict[str, Convention] = {
    "epsilon": Convention(objective=Objective()),
    "v_prediction": Convention(objective=Objective(prediction_type="v_prediction")),
    "flow": Convention(objective=FLOW),  # ours and diffusers': noise - data; the time is 1000 times the noise's share
    # SiT, transport/path.py: data - noise; the time is the data's share
    "sit": Convention(objective=FLOW, time_scale=-1e-3, time_shift=1.0, sign=-1),
    # REPA, loss.py: noise - data; the time is the noise's share
    "repa": Convention(objective=FLOW, time_scale=1e-3),
}


HUB = re.compile(r"[\w-]+/[\w.-]+", re.ASCII)  # what may be a repository on the Hugging Face Hub
SCHEDULES = "schedules"  # folder in a pipeline's folder
DEFAULT_SCHEDULES = "output-2x", "1.8x"  # the first of them that a model has
MAX_SCHEDULES = 100


@dataclass(frozen=True)
class Source:
    """A model to sample, with its showcase and its calibrated schedules."""

    sampler: Sampler
    """its pipeline"""
    showcase: tuple[str, ...] = ()
    """labels or prompts to sample by default"""
    schedules: Mapping[str, CacheMethod] = field(default_factory=dict)
    """calibrated schedules by name"""

    def cache(self, spec: str) -> CacheMethod | None:
        """Return the cache method of a spec, as `parse_method` does; a schedule of the model for `calibrated` or
        `calibrated:{name}`; None for `none`. `ValueError` if there is no such schedule."""
        if spec == "none":
            return None
        kind, _, name = spec.partition(":")
        if kind != "calibrated":
            return parse_method(spec)
        if not self.schedules:
            raise ValueError("this model came without calibrated schedules: run skipdit calibrate, or use --cache auto")
        name = name or next(name for name in (*DEFAULT_SCHEDULES, *self.schedules) if name in self.schedules)
        if name not in self.schedules:
            raise ValueError(f"the calibrated schedules of this model are {', '.join(self.schedules)}, got {name!r}")
        return self.schedules[name]

    def complete(self, config: Settings) -> Settings:
        """Return a config with the model's own number of steps and guidance scale where it leaves them out."""
        missing = {name: value for name, value in self.run_defaults._asdict().items() if getattr(config, name) is None}
        return dataclasses.replace(cast(Any, config), **missing)

    @property
    def run_defaults(self) -> RunDefaults:
        """The number of steps and the guidance scale of a run of the model by default."""
        return self.sampler.task.run_defaults(self.sampler.pipeline)

    def choose(self, options: Mapping[str, Sequence[str]], count: int) -> Chosen:
        """Return the conditions of `count` samples; see `Task.choose`."""
        return self.sampler.task.choose(self.sampler.pipeline, options, count, self.showcase)


def load_source(
    model: str | None = None,
    *,
    task: TaskName | None = None,
    device: str = "auto",
    dtype: DTypeName = "float32",
    scheduler: str | None = None,
    vae: Path | None = None,
    weights: WeightsOptions = WeightsOptions(),  # noqa: B008
    published: PipelineOptions = PipelineOptions(),  # noqa: B008
    decodes: bool = True,
) -> Source:
    """Return a bundled model by name, or the folder of a pipeline, of skipdit or of diffusers, or one made around a
    checkpoint; on its device.

    task: by default that of the model; without a model, the first bundled one of the task is taken. scheduler: see
    `skipdit.diffusion.make_scheduler`; by default the model's own. vae: folder of an AutoencoderKL or of a pipeline
    with one, for models of latents. weights: options that a weight file does not contain; `ValueError` if given for
    another model. published: how a pipeline of diffusers is opened and called; `ValueError` if given for another model.
    decodes: False if samples are not decoded, so that a model of latents needs no autoencoder.

    `FileNotFoundError` if the model does not exist; `ValueError` if it is of another task, foreign or broken.
    """
    if task is not None:
        choose("task", task, TASKS)
    model = model or bundled_model(task)
    expected = BUNDLED[model].task if model in BUNDLED else task
    if expected is not None and not _is_published(Path(model)):
        TASKS[expected].check_installed()
    source = _open(model, getattr(torch, dtype), weights, published)
    sampler = source.sampler
    if task is not None and sampler.task.name != task:
        raise ValueError(f"{model} is a {sampler.task.name} model, not {task}")
    if vae is not None:
        give_autoencoder(sampler, model, vae, getattr(torch, dtype))
    pipeline = sampler.pipeline
    if (
        decodes
        and pipeline.components.get("vae") is None
        and (channels := pipeline.transformer.config.in_channels) != 3
    ):
        raise ValueError(f"{model} works on latents of {channels} channels: give --vae FOLDER")
    if scheduler is not None:
        sampler.task.replace_scheduler(pipeline, scheduler)
    pipeline.to(resolve_device(device))
    return source


def bundled_model(task: TaskName | None) -> str:
    """Return the first bundled model, or the first of a task. `ValueError` if there is none."""
    for name, bundled in BUNDLED.items():
        if task in (None, bundled.task):
            return name
    raise ValueError(f"there is no bundled {task} model: give a model")


def give_autoencoder(sampler: Sampler, model: str, vae: Path, dtype: torch.dtype) -> None:
    """Give a pipeline the autoencoder in a folder. `ValueError` if it takes none, or needs one of other latents."""
    if not sampler.task.has_own_pipeline:
        raise ValueError(f"--vae is for class-conditional models, got {vae} for a {sampler.task.name} model")
    decoder = read_autoencoder(vae, dtype)
    latents, num_channels = decoder.config["latent_channels"], sampler.pipeline.transformer.config.in_channels
    if latents != num_channels:
        raise ValueError(f"{vae} decodes latents of {latents} channels, but {model} makes {num_channels}")
    sampler.pipeline.register_modules(vae=decoder)


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def _open(model: str, dtype: torch.dtype, bare: WeightsOptions, published: PipelineOptions) -> Source:
    path = Path(model)
    if model in BUNDLED or (path.exists() and not _is_published(path)):
        published.refuse_for(model)
    elif path.exists():
        bare.refuse(model)
        return Source(open_published(path, read_index(path), dtype, published), (), _read_schedules(path))
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
            + (f"; nothing is downloaded: hf download {model} --local-dir {path.name}" if HUB.fullmatch(model) else "")
        )
    if path.is_dir() and (checkpoint := find_checkpoint(path)) is not None:
        bare.refuse(model)
        return Source(_from_run(checkpoint, dtype))
    return Source(_from_file(path, dtype, bare))


def _is_published(folder: Path) -> bool:
    """Return True if a folder holds a pipeline of diffusers that encodes prompts, or knows classes, by itself."""
    if not (folder / "model_index.json").is_file():
        return False
    index = read_index(folder)
    of_ours = {task.pipeline_name for task in TASKS.values()}
    return part_class(index, "text_encoder", folder) is not None or index["_class_name"] not in of_ours


def _from_folder(folder: Path, dtype: torch.dtype) -> Sampler:
    """Open a saved pipeline. `ValueError` names the folder if something in it is missing, foreign or broken."""
    index = read_index(folder)
    name, tasks = index["_class_name"], {task.pipeline_name: task for task in TASKS.values()}
    if name not in tasks:
        raise ValueError(f"{printable(folder)} is a {printable(name)}, not one of {', '.join(tasks)}")
    try:
        return tasks[name].open(folder, load_model(folder, dtype=dtype), index, dtype)
    except OSError as error:
        raise ValueError(f"{printable(folder)} is not a complete {name}: {printable(error)}") from error


def _from_file(path: Path, dtype: torch.dtype, bare: WeightsOptions) -> Sampler:
    """Open a checkpoint, or a folder that contains only a transformer."""
    transformer: Transformer = load_model(
        path, num_attention_heads=bare.num_attention_heads, num_classes=bare.num_classes, drop=bare.drop, dtype=dtype
    )
    name, task = bare.objective, _task_of(transformer)
    is_own = task is not None and task.has_own_pipeline
    if name is None and is_own and learns_variance(transformer):
        name = "epsilon"
    if name is None or not is_own:
        way = f": give objective, one of {', '.join(CONVENTIONS)}, or" if name is None else ": give"
        raise ValueError(f"{printable(path)} does not say what its model predicts{way} the folder of its pipeline")
    return pipeline_of(transformer, name)


def _from_run(checkpoint: Path, dtype: torch.dtype) -> Sampler:
    """Open the averaged weights of a checkpoint of `skipdit train`, with the objective of its run."""
    fields: Config = read_run_config(checkpoint).get("objective")
    try:
        objective = Objective(**fields)
        scheduler = make_scheduler(objective)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{printable(checkpoint)} does not say its run's objective: {printable(error)}") from error
    return _sampler_of(load_model(checkpoint, dtype=dtype), scheduler)


def _task_of(transformer: Transformer) -> Task | None:
    return next((task for task in TASKS.values() if task.fits(transformer)), None)


def _sampler_of(transformer: Transformer, scheduler: Scheduler) -> Sampler:
    task = _task_of(transformer)
    if task is None:
        raise ValueError(f"no task has a {type(transformer).__name__}: {', '.join(TASKS)}")
    return task.sampler(transformer, scheduler)


def _read_schedules(folder: Path) -> dict[str, CacheMethod]:
    """Return calibrated schedules by file name, the one with the most full steps first."""
    paths = sorted((folder / SCHEDULES).glob("*.json"))
    if len(paths) > MAX_SCHEDULES:
        raise ValueError(f"{printable(folder / SCHEDULES)} has more than the {MAX_SCHEDULES} schedules that are read")
    methods = {path.stem: parse_method(path) for path in paths}
    return dict(sorted(methods.items(), key=lambda item: -len(cast(ExplicitSchedule, item[1].schedule).full_steps)))


# ----------------------------------------------------------------------------------------------------------------------
# Conventions


def pipeline_of(transformer: Transformer, name: ObjectiveName) -> Sampler:
    """Return a pipeline around a model with this convention, which `adopt` converts to ours in place."""
    convention = CONVENTIONS[name]
    adopt(transformer, convention)
    learned = name == "epsilon" and learns_variance(transformer)
    objective = dataclasses.replace(convention.objective, learned_variance=learned)
    return _sampler_of(transformer, make_scheduler(objective))


@torch.no_grad()
def adopt(model: Transformer, convention: Convention) -> None:
    """Convert a model from the convention it was trained with to ours, in place. Its outputs stay the same, up to their
    sign. `ValueError` for a Latte, whose releases have only one convention of time."""
    if convention.sign < 0:
        model.final_layer.proj.weight.neg_()
        model.final_layer.proj.bias.neg_()
    if (convention.time_scale, convention.time_shift) == (1, 0):
        return
    if "time_scale" not in model.config:
        raise ValueError(f"no {type(model).__name__} embeds the timestep like SiT and REPA: use objective flow")
    model.time_scale, model.time_shift = convention.time_scale, convention.time_shift
    model.register_to_config(time_scale=model.time_scale, time_shift=model.time_shift)
