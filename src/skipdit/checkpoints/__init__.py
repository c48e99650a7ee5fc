"""Load and save checkpoints: official releases, diffusers' transformers, our own files and folders.

A file (`.pt`, `.pth`, `.bin`, `.ckpt`, `.safetensors`, or any name if its first bytes are those of such a file)
contains a state dict, or a training checkpoint with `model` and `ema` or their usual synonyms. Keys are ours or the
official ones, with or without the prefixes of torch.compile, DistributedDataParallel and FSDP: class-to-image
(facebookresearch's `DiT-XL-2-256x256.pt`, the authors' `DiT-XL-2-skip.pt`), class-to-video (Latte), text-to-video
(`Latte-skip.pt`, and diffusers' keys), text-to-image (Tencent's `pytorch_model_ema.pt`, and diffusers' keys).

A folder was written by `save_pretrained` of a model or pipeline, ours or of a diffusers class whose units skipdit
knows, or it is a run of `skipdit train` or one of its checkpoints. diffusers' `DiTTransformer2DModel` becomes our
`DiT`.

The sizes in a file or config are compared with those of its weights before memory is allocated. Each family has a
module with its key tables and both conversions; this module finds the family of a path.
"""

import inspect
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, get_args

import diffusers
import torch
from diffusers.utils import CONFIG_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from skipdit.checkpoints import dit, hunyuan, keys, latte, latte_t2v, reading
from skipdit.checkpoints.dit import DIFFUSERS_KEYS, OFFICIAL_KEYS, from_diffusers
from skipdit.checkpoints.keys import LoadHints, UnloadedModel
from skipdit.checkpoints.reading import Preference, StateDict
from skipdit.checkpoints.runs import find_checkpoint, read_checkpoint, read_shallow_path
from skipdit.checkpoints.wrappings import strip_prefixes
from skipdit.files.output import atomic_file, clean_up
from skipdit.files.untrusted import printable
from skipdit.interfaces import Fields, Transformer
from skipdit.models.families import FAMILIES
from skipdit.models.surgery import LONG_SKIP_VARIANT, segment_sizes_of
from skipdit.options import Fusion, choose

__all__ = [
    "DIFFUSERS_KEYS",
    "OFFICIAL_KEYS",
    "Preference",
    "from_diffusers",
    "from_official",
    "load_model",
    "save_official",
    "to_diffusers",
    "to_official",
]


class Format(Protocol):
    """The official format of one model family: a module with these functions."""

    def is_format(self, state_dict: StateDict, hints: LoadHints) -> bool:
        """Return True if a file belongs to this family."""
        ...

    def read(self, state_dict: StateDict, hints: LoadHints) -> UnloadedModel:
        """Return the model of a file, with its tensors under the model's keys."""
        ...

    def from_official(self, state_dict: StateDict) -> dict[str, Tensor]:
        """Return the tensors under the model's keys."""
        ...

    def to_official(self, model: Transformer) -> dict[str, Tensor]:
        """Return the tensors under the official keys."""
        ...


# the format of each model class; the first that recognizes a file reads it
FORMATS: dict[str, Format] = {
    "HunyuanDiT2DModel": hunyuan,
    "LatteTransformer3DModel": latte_t2v,
    "Latte": latte,
    "DiT": dit,
}
# reader by the class name in a folder's config.json
OWN_FOLDERS = {
    "DiT": dit.read_folder,
    **dict.fromkeys(dit.DIFFUSERS_CLASSES, dit.read_diffusers),
    "Latte": latte.read_folder,
}
ALIASES = {"LatteT2V": "LatteTransformer3DModel"}  # the authors' class, with the same options and keys
UNUSED_KEYS = {"LatteTransformer3DModel": latte_t2v.UNUSED_KEY}


def load_model(
    path: str | os.PathLike[str],
    *,
    prefer: Preference = "ema",
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
    num_frames: int | None = None,
    num_classes: int | None = None,
    fusion: Fusion | None = None,
    drop: str | Sequence[str] = (),
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """Load a model from a file or folder, on the CPU in eval mode: our `DiT` or `Latte`, or a diffusers transformer,
    plain or with long skips. `skipdit.checkpoints` lists the formats.

    A file shows the sizes but not every option: with our keys, the last class is assumed to be the null class, and
    `downscale_freq_shift` to be 0. If that is wrong, load a folder, or build the model and call `load_state_dict`.

    Args:
        path: the file or folder. Pickles may only contain tensors, plain containers and `argparse.Namespace`.
        prefer: which weights to load from a training checkpoint that has both.
        num_attention_heads: required for a file whose depth and width are not those of a published size.
        sample_size: required for a file with our keys; official files have it in `pos_embed`.
        num_frames: required for a Latte file with our keys, and marks it as one; official files have it in
            `temp_embed`. For text-to-video files of an unpublished size, this and `sample_size` are required.
        num_classes: required if the class table has as many rows as a common data set has classes: the same number if
            no row means "no class", one less if the last row does. The `args` of a training checkpoint have it.
        fusion: required for a file with our keys and long skips; official files use `"replace"`.
        drop: roots of keys to ignore, such as `"projectors"` of REPA, or what a Lightning checkpoint has beside the
            model. The file must have such keys.
        variant: variant of the weights in a folder, such as `"fp16"`; by default the only one in the folder.
        dtype: data type of the returned model.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the file is damaged or unknown; keys are unknown, missing or misshapen; an argument is missing, or
            contradicts the file. The message begins with the path.
    """
    source, dropped = Path(path), (drop,) if isinstance(drop, str) else tuple(drop)
    choose("prefer", prefer, get_args(Preference))
    if not source.exists():
        raise FileNotFoundError(f"no such file or folder: {printable(source)}")
    hints = LoadHints(
        num_attention_heads=num_attention_heads,
        sample_size=sample_size,
        num_frames=num_frames,
        num_classes=num_classes,
        fusion=fusion,
    )
    with reading.named(source):
        read = _read_folder if source.is_dir() else _read_file
        model = keys.assemble(read(source, hints, prefer, dropped, variant), dtype)
        keys.raise_on_contradictions(model, hints)
    return model


def load_with_long_skips(model_class: type[nn.Module], folder: Path, dtype: torch.dtype) -> Transformer:
    """Load a diffusers or declared `model_class` that was saved with long skips. Errors as for `load_model`."""
    config = reading.read_config(folder)
    if config.get("long_skip") is None:
        raise ValueError(
            f"{printable(folder)} contains a {model_class.__name__} without long skips: load it with "
            f"{model_class.__name__}.from_pretrained, then call skipdit.add_long_skips(model)"
        )
    with reading.named(folder):
        tensors = reading.read_folder_tensors(folder, LONG_SKIP_VARIANT)
        return keys.assemble(_read_family(model_class, config, tensors, config["long_skip"]), dtype)


def from_official(state_dict: StateDict) -> dict[str, Tensor]:
    """Return the same weights under the keys of our model or of diffusers', without tensors that the model computes
    itself or does not use.

    `ValueError` names unknown and missing keys, or a position table that is not the fixed one; see each family's
    module.
    """
    return _find_format(state_dict, LoadHints()).from_official(state_dict)


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights under the official keys of the family; `ValueError` names what it does not support."""
    name = next((base.__name__ for base in type(model).__mro__ if base.__name__ in FORMATS), None)
    if name is None:
        raise ValueError(f"only {', '.join(FORMATS)} have an official format, got a {type(model).__name__}")
    return FORMATS[name].to_official(model)


def save_official(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write `to_official(model)` to a `.safetensors` file, which replaces an existing file only once it is complete."""
    target = Path(path)
    if target.suffix != reading.SAFETENSORS_SUFFIX:
        raise ValueError(f"path must end in {reading.SAFETENSORS_SUFFIX}, got {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {target.parent}")
    tensors = {key: tensor.contiguous() for key, tensor in to_official(model).items()}
    clean_up(target.parent)
    with atomic_file(target) as draft:
        save_file(tensors, draft, metadata={"format": "pt"})


def to_diffusers(model: Transformer) -> Transformer:
    """Convert our `DiT` to diffusers' (`checkpoints.dit.to_diffusers`); return a diffusers transformer unchanged.
    `ValueError` for a `Latte`: diffusers has only the text-to-video model."""
    names = {base.__name__ for base in type(model).__mro__}
    if "DiT" in names:
        return dit.to_diffusers(model)
    if not names & set(FAMILIES):
        raise ValueError(f"diffusers has no class-to-video transformer, got a {type(model).__name__}")
    return model


def _find_format(state_dict: StateDict, hints: LoadHints) -> Format:
    return next(family for family in FORMATS.values() if family.is_format(state_dict, hints))


def _read_file(
    path: Path, hints: LoadHints, prefer: Preference, dropped: Sequence[str], variant: str | None
) -> UnloadedModel:
    if variant is not None:
        raise ValueError(f"variant applies to a folder, got {variant!r} for a file")
    whole, args = reading.read_training(path, prefer)
    kept = {key: tensor for key, tensor in whole.items() if key.partition(".")[0] not in dropped}
    if dropped and len(kept) == len(whole):
        raise ValueError(f"has no key of {', '.join(dropped)} to drop, but {reading.list_first(whole)}")
    state_dict = strip_prefixes(kept, prefer)  # only now do all keys begin with the name of a wrapper's attribute
    if hints.num_classes is None:
        hints = replace(hints, num_classes=keys.find_num_classes(args.get("num_classes"), state_dict))
    return _find_format(state_dict, hints).read(state_dict, hints)


def _read_folder(
    folder: Path, hints: LoadHints, prefer: Preference, dropped: Sequence[str], variant: str | None
) -> UnloadedModel:
    if dropped:
        raise ValueError(f"drop applies to a file, got {', '.join(dropped)} for a folder")
    if (checkpoint := find_checkpoint(folder, prefer)) is not None:
        if variant is not None:
            raise ValueError(f"variant applies to a save_pretrained folder, got {variant!r} for a run's checkpoint")
        state_dict, hints = read_checkpoint(checkpoint, prefer, hints)
        unloaded = _find_format(state_dict, hints).read(state_dict, hints)
        path = read_shallow_path(checkpoint, sum(segment_sizes_of(unloaded.model)))
        if path is not None:
            model: Transformer = unloaded.model
            model.register_to_config(shallow_path=path.to_dict())
        return unloaded
    if (folder / "pipeline" / "model_index.json").exists():  # of a finished run
        folder = folder / "pipeline"
    if (folder / "model_index.json").exists() or not (folder / CONFIG_NAME).exists():
        folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = reading.read_config(folder)
    class_name = str(config.get("_class_name"))
    class_name = ALIASES.get(class_name, class_name)
    if class_name not in OWN_FOLDERS and class_name not in FAMILIES:
        allowed = ", ".join(dict.fromkeys((*OWN_FOLDERS, *FAMILIES)))
        raise ValueError(f"_class_name in {CONFIG_NAME} must be one of {allowed}, got {printable(class_name)!r}")
    long_skip = config.get("long_skip") if class_name in FAMILIES else None
    if long_skip is not None and variant not in (None, LONG_SKIP_VARIANT):
        raise ValueError(f"weights with long skips have the variant {LONG_SKIP_VARIANT!r} only, got {variant!r}")
    is_ours = class_name in OWN_FOLDERS and long_skip is None
    if not is_ours and not hasattr(diffusers, class_name):
        raise ValueError(f"{class_name} is not a diffusers class: load it with its own from_pretrained")
    tensors = reading.read_folder_tensors(folder, variant if long_skip is None else LONG_SKIP_VARIANT)
    if is_ours:
        return OWN_FOLDERS[class_name](config, tensors)
    return _read_family(getattr(diffusers, class_name), config, tensors, long_skip)


def _read_family(
    model_class: type[nn.Module], config: Fields, tensors: StateDict, long_skip: Fields | None
) -> UnloadedModel:
    """Build a diffusers transformer with the long skips of its config. Like diffusers, ignore options that its class
    does not know, or no longer knows."""
    options = {name: config[name] for name in inspect.signature(model_class).parameters if name in config}
    keys.check_options(options, tensors)
    unused = UNUSED_KEYS.get(model_class.__name__)
    tensors = {key: tensor for key, tensor in tensors.items() if key != unused}
    return keys.make_linked(model_class, options, tensors, long_skip, shallow_path=config.get("shallow_path"))
