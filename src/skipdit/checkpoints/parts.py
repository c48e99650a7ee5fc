"""Read the other parts of a pipeline from untrusted folders: its index, scheduler and autoencoder."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderTiny, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from torch import Tensor

from skipdit.checkpoints.keys import assemble, check_options, make_unloaded
from skipdit.checkpoints.reading import StateDict, named, read_config, read_folder_tensors
from skipdit.files.untrusted import printable, read_json

INDEX_NAME = "model_index.json"
MAX_TRAIN_TIMESTEPS = 10_000
TRIED_STEPS = 10
INFINITE_OPTIONS = ("lambda_min_clipped",)  # diffusers writes that of DPMSolverMultistepScheduler as -Infinity
# attention weights of autoencoders: names before diffusers 0.17, as in sd-vae-ft-mse, and today
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MAX_LABELS = 100_000
Autoencoder = AutoencoderKL | AutoencoderKLTemporalDecoder | AutoencoderTiny
AUTOENCODERS: dict[str, Any] = {kind.__name__: kind for kind in get_args(Autoencoder)}


def read_index(folder: Path) -> dict[str, Any]:
    """Return a pipeline's model_index.json. Its parts are pairs of a library and a class, or of nulls."""
    path = folder / INDEX_NAME
    index = read_json(path, dict[str, Any])
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{printable(path)} is broken: it has no _class_name")
    return index


def part_class(index: Mapping[str, Any], name: str, folder: Path) -> str | None:
    """Return the class name of a part, or None if the pipeline has no such part."""
    entry = index.get(name)
    if entry is None or entry == [None, None]:
        return None
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
        raise ValueError(f"{printable(folder / INDEX_NAME)} has no library and class for its {name}")
    return entry[1]


def read_labels(index: Mapping[str, Any], num_classes: int | None, folder: Path) -> dict[str, str] | None:
    """Return the class names by number, each below `num_classes`; None if there are none."""
    labels = index.get("id2label")
    if labels is None:
        return None
    path = printable(folder / INDEX_NAME)
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels.values()):
        raise ValueError(f"the id2label of {path} must be names by number")
    if len(labels) > MAX_LABELS or len(set(labels.values())) < len(labels):
        raise ValueError(f"the id2label of {path} has a name twice, or more than {MAX_LABELS:,}")
    numbers = {str(number) for number in range(num_classes or 0)}
    for number in labels:
        if number not in numbers:
            raise ValueError(f"the id2label of {path} must number {num_classes} classes, got {printable(number)!r}")
    return labels


def read_scheduler(folder: Path, class_name: str) -> SchedulerMixin:
    """Return the scheduler of a pipeline's folder after a few trial steps on a small tensor, which show most of what
    can be wrong with a config. `ValueError` names the file."""
    path = folder / "scheduler" / SCHEDULER_CONFIG_NAME
    scheduler_class: Any = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, SchedulerMixin):
        raise ValueError(f"{printable(folder / INDEX_NAME)}: {printable(class_name)!r} is not a diffusers scheduler")
    config = read_json(path, dict[str, Any], infinite=INFINITE_OPTIONS)
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if not isinstance(steps, int) or not 1 <= steps <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(
            f"{printable(path)}: num_train_timesteps must be 1 to {MAX_TRAIN_TIMESTEPS:,}, got {printable(steps)}"
        )
    if betas is not None and (not isinstance(betas, list) or len(betas) != steps):
        raise ValueError(f"{printable(path)}: trained_betas must be {steps} numbers")
    if config.get("steps_offset", 0) not in (0, 1):
        raise ValueError(f"{printable(path)}: steps_offset must be 0 or 1, got {printable(config['steps_offset'])}")
    if not isinstance(order := config.get("solver_order", 1), int) or not 1 <= order <= 3:
        raise ValueError(f"{printable(path)}: solver_order must be 1 to 3, got {printable(order)}")
    known = inspect.signature(scheduler_class).parameters
    try:
        options = {name: value for name, value in config.items() if name in known or name.startswith("_")}
        scheduler = cast(Any, scheduler_class).from_config(options)
        _try_out(copy.deepcopy(scheduler), min(TRIED_STEPS, steps))
    except Exception as error:  # untrusted options may raise any type
        raise ValueError(f"{printable(path)} makes no scheduler: {printable(str(error) or repr(error))}") from error
    return scheduler


@torch.no_grad()
def _try_out(scheduler: Any, num_steps: int) -> None:
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    sample, output = torch.ones(1, 4, 2, 2), torch.full((1, 8 if learned else 4, 2, 2), 0.1)
    with torch.random.fork_rng(devices=[]):
        scheduler.set_timesteps(num_steps)
        if len(scheduler.timesteps) > 4 * num_steps:
            raise ValueError(f"{num_steps} steps turn into {len(scheduler.timesteps)}")
        for timestep in scheduler.timesteps:
            inputs = scheduler.scale_model_input(sample, timestep)
            if not 0 <= float(timestep) <= scheduler.config.num_train_timesteps or not inputs.isfinite().all():
                raise ValueError(f"timestep {float(timestep):g} is outside of those in training")
            sample = scheduler.step(output, timestep, sample).prev_sample
    if not sample.isfinite().all():
        raise ValueError("it produces numbers that are not finite")


def read_autoencoder(folder: Path, dtype: torch.dtype) -> Autoencoder:
    """Load the autoencoder in a folder, or in `vae` of a pipeline's folder: safetensors or pickled, whole or in shards,
    also if there is only a variant. `ValueError` names the folder if it is foreign or broken."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no autoencoder folder at {printable(folder)}")
    if (folder / INDEX_NAME).exists():
        folder = folder / "vae"
    with named(folder):
        config = read_config(folder)
        name = config.get("_class_name")
        if not isinstance(name, str) or name not in AUTOENCODERS:
            raise ValueError(f"must hold one of {', '.join(AUTOENCODERS)}, got {printable(name)}")
        kind = AUTOENCODERS[name]
        options = {name: value for name, value in config.items() if not name.startswith("_")}
        check_options(options)
        _check_latents(options)
        tensors = _with_new_names(read_folder_tensors(folder))
        options = {name: options[name] for name in inspect.signature(kind).parameters if name in options}
        return assemble(make_unloaded(lambda: kind(**options), tensors), dtype)


def downsampling(vae: Any) -> int:
    """Return how many pixels per side a latent of an autoencoder stands for."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _check_latents(options: dict[str, Any]) -> None:
    """Raise `ValueError` on options that scale latents, which no weight shape checks."""
    for name in ("scaling_factor", "shift_factor"):
        value = options.get(name)
        if value is not None and (not isinstance(value, (int, float)) or (name == "scaling_factor" and value == 0)):
            raise ValueError(f"{name} must be a number, got {printable(value)}")
    for name in ("latents_mean", "latents_std"):
        values = options.get(name)
        if values is None:
            continue
        is_numbers = isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
        if not is_numbers or len(values) != options.get("latent_channels"):
            raise ValueError(f"{name} must be one number per latent channel")


def _with_new_names(tensors: StateDict) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if "attentions" in parts[:-2] and parts[-2] in ATTENTION_NAMES:
            key = ".".join((*parts[:-2], ATTENTION_NAMES[parts[-2]], parts[-1]))
            tensor = tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor  # a convolution of one pixel
        renamed[key] = tensor
    return renamed
