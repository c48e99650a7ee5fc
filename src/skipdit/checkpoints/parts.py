"""Read the other parts of a pipeline from untrusted folders: its index, scheduler and autoencoder."""

import copy
import inspect
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict, TypeVar, get_args

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderTiny, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.utils import CONFIG_NAME
from msgspec import Meta
from torch import Tensor

from skipdit.checkpoints.keys import assemble, check_options, make_unloaded
from skipdit.checkpoints.reading import StateDict, named, read_config, read_folder_tensors
from skipdit.files.untrusted import as_type, printable, read_json
from skipdit.interfaces import VAE, Fields, Scheduler

INDEX_NAME = "model_index.json"
MAX_TRAIN_TIMESTEPS = 10_000
TRIED_STEPS = 10
INFINITE_OPTIONS = ("lambda_min_clipped",)  # diffusers writes -Infinity for DPMSolverMultistepScheduler
# names of attention weights in autoencoders before diffusers 0.17 (as in sd-vae-ft-mse): names today
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MAX_LABELS = 100_000
Base = TypeVar("Base")
Autoencoder = AutoencoderKL | AutoencoderKLTemporalDecoder | AutoencoderTiny
AUTOENCODERS = {kind.__name__: kind for kind in get_args(Autoencoder)}


class PipelineIndex(TypedDict):
    """The checked fields of `model_index.json`. Its parts are pairs of a library and a class, or of nulls."""

    _class_name: str
    id2label: NotRequired[dict[str, str] | None]


class SchedulerConfig(TypedDict, total=False):
    """The checked fields of a scheduler's config."""

    num_train_timesteps: Annotated[int, Meta(ge=1, le=MAX_TRAIN_TIMESTEPS)]
    trained_betas: list[float] | None
    steps_offset: Literal[0, 1]
    solver_order: Literal[1, 2, 3]


class AutoencoderConfig(TypedDict):
    """The checked fields of an autoencoder's config: how it scales latents shows in no weight shape."""

    _class_name: str
    latent_channels: NotRequired[int]
    scaling_factor: NotRequired[float | None]
    shift_factor: NotRequired[float | None]
    latents_mean: NotRequired[list[float] | None]
    latents_std: NotRequired[list[float] | None]


def read_index(folder: Path) -> Fields:
    """Return a pipeline's model_index.json."""
    path = folder / INDEX_NAME
    index = read_json(path, Fields)
    as_type(index, PipelineIndex, printable(path))
    return index


def part_class(index: Fields, name: str, folder: Path) -> str | None:
    """Return the class name of a part, or None if the pipeline has no such part."""
    if index.get(name) in (None, [None, None]):
        return None
    return as_type(index[name], tuple[str, str], f"the {name} in {printable(folder / INDEX_NAME)}")[1]


def read_labels(index: Fields, num_classes: int | None, folder: Path) -> dict[str, str] | None:
    """Return the class names by class number, each below `num_classes`; None if there are none."""
    labels = index.get("id2label")
    if labels is None:
        return None
    path = printable(folder / INDEX_NAME)
    if len(labels) > MAX_LABELS or len(set(labels.values())) < len(labels):
        raise ValueError(f"the id2label of {path} has duplicate names, or more than {MAX_LABELS:,}")
    numbers = {str(number) for number in range(num_classes or 0)}
    for number in labels:
        if number not in numbers:
            raise ValueError(f"the id2label of {path} must number {num_classes} classes, got {printable(number)!r}")
    return labels


def find_class(name: str, suffix: str, base: type[Base]) -> type[Base] | None:
    """Return the class of diffusers with this name, if the name ends so and the class is a `base`."""
    found = getattr(diffusers, name, None) if name.endswith(suffix) else None
    return found if isinstance(found, type) and issubclass(found, base) else None


def read_scheduler(folder: Path, class_name: str) -> SchedulerMixin:
    """Return the scheduler of a pipeline's folder, after a few trial steps on a small tensor, which reveal most bad
    configs. `ValueError` names the file."""
    path = folder / "scheduler" / SCHEDULER_CONFIG_NAME
    scheduler_class = find_class(class_name, "Scheduler", SchedulerMixin)
    if scheduler_class is None:
        raise ValueError(f"{printable(folder / INDEX_NAME)}: {printable(class_name)!r} is not a diffusers scheduler")
    config = read_json(path, Fields, infinite=INFINITE_OPTIONS)
    checked = as_type(config, SchedulerConfig, printable(path))
    steps, betas = checked.get("num_train_timesteps", 1000), checked.get("trained_betas")
    if betas is not None and len(betas) != steps:
        raise ValueError(f"{printable(path)}: trained_betas must be {steps} numbers")
    known = inspect.signature(scheduler_class).parameters
    try:
        options = {name: value for name, value in config.items() if name in known or name.startswith("_")}
        make: Scheduler = scheduler_class  # some of these classes are typed without `ConfigMixin`
        scheduler = make.from_config(options)
        _try_out(copy.deepcopy(scheduler), min(TRIED_STEPS, steps))
    except Exception as error:  # untrusted options may raise any type
        raise ValueError(f"{printable(path)} makes no scheduler: {printable(str(error) or repr(error))}") from error
    return scheduler


@torch.no_grad()
def _try_out(scheduler: Scheduler, num_steps: int) -> None:
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    sample, output = torch.ones(1, 4, 2, 2), torch.full((1, 8 if learned else 4, 2, 2), 0.1)
    with torch.random.fork_rng(devices=[]):
        scheduler.set_timesteps(num_steps)
        if len(scheduler.timesteps) > 4 * num_steps:
            raise ValueError(f"{num_steps} steps become {len(scheduler.timesteps)}")
        for timestep in scheduler.timesteps:
            inputs = scheduler.scale_model_input(sample, timestep)
            if not 0 <= float(timestep) <= scheduler.config.num_train_timesteps or not inputs.isfinite().all():
                raise ValueError(f"timestep {float(timestep):g} is outside the training range")
            sample = scheduler.step(output, timestep, sample).prev_sample
    if not sample.isfinite().all():
        raise ValueError("it produces non-finite numbers")


def read_autoencoder(folder: Path, dtype: torch.dtype) -> Autoencoder:
    """Load the autoencoder in a folder, or in `vae` of a pipeline's folder: safetensors or pickled, whole or in shards,
    or the only variant. `ValueError` names the folder if it is foreign or broken."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no autoencoder folder at {printable(folder)}")
    if (folder / INDEX_NAME).exists():
        folder = folder / "vae"
    with named(folder):
        config = read_config(folder)
        checked = as_type(config, AutoencoderConfig, CONFIG_NAME)
        name = checked["_class_name"]
        if name not in AUTOENCODERS:
            raise ValueError(f"must contain one of {', '.join(AUTOENCODERS)}, got {printable(name)}")
        kind = AUTOENCODERS[name]
        options = {name: value for name, value in config.items() if not name.startswith("_")}
        check_options(options)
        if checked.get("scaling_factor") == 0:
            raise ValueError("scaling_factor must not be 0")
        for scale in (checked.get("latents_mean"), checked.get("latents_std")):
            if scale is not None and len(scale) != checked.get("latent_channels"):
                raise ValueError("latents_mean and latents_std must have one number per latent channel")
        tensors = _with_new_names(read_folder_tensors(folder))
        options = {name: options[name] for name in inspect.signature(kind).parameters if name in options}
        return assemble(make_unloaded(lambda: kind(**options), tensors), dtype)


def downsampling(vae: VAE) -> int:
    """Return the downsampling factor of an autoencoder: pixels per latent along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _with_new_names(tensors: StateDict) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if "attentions" in parts[:-2] and parts[-2] in ATTENTION_NAMES:
            key = ".".join((*parts[:-2], ATTENTION_NAMES[parts[-2]], parts[-1]))
            tensor = tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor  # was a 1x1 convolution
        renamed[key] = tensor
    return renamed
