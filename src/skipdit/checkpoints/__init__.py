"""Checkpoints in and out: official releases, diffusers' transformers, our own files and folders.

One module a family holds its key tables and both directions; this one finds out which family a path holds.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import diffusers
import torch
from diffusers.utils import CONFIG_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from skipdit.checkpoints import dit, hunyuan, latte, latte_t2v
from skipdit.checkpoints.dit import DIFFUSERS_KEYS, OFFICIAL_KEYS, from_diffusers
from skipdit.checkpoints.keys import (
    Told,
    Weights,
    assemble,
    check_options,
    find_num_classes,
    make_model,
    refuse_contradictions,
)
from skipdit.checkpoints.reading import (
    SAFETENSORS_SUFFIX,
    Preference,
    StateDict,
    list_first,
    read_config,
    read_folder_tensors,
    read_training,
)
from skipdit.checkpoints.runs import find_checkpoint, read_checkpoint, read_shallow_path
from skipdit.checkpoints.wrappings import strip_prefixes
from skipdit.files import atomic_file, clean_up
from skipdit.models.families import FAMILIES
from skipdit.models.long_skip import Fusion, LongSkipConfig
from skipdit.models.shallow_path import ShallowPath
from skipdit.models.surgery import LONG_SKIP_VARIANT, add_long_skips, num_units_of
from skipdit.untrusted import printable

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


@dataclass(frozen=True, kw_only=True)
class Format:
    """One family's official format. holds: whether a file is of this family. read: the model of such a file."""

    holds: Callable[[StateDict, Told], bool]
    read: Callable[[StateDict, Told], Weights]
    from_official: Callable[[StateDict], dict[str, Tensor]]
    to_official: Callable[[Any], dict[str, Tensor]]


# class of the model: its format. The first that holds a file reads it.
FORMATS = {
    "HunyuanDiT2DModel": Format(
        holds=hunyuan.holds,
        read=hunyuan.read,
        from_official=hunyuan.from_official,
        to_official=hunyuan.to_official,
    ),
    "LatteTransformer3DModel": Format(
        holds=latte_t2v.holds,
        read=latte_t2v.read,
        from_official=latte_t2v.from_official,
        to_official=latte_t2v.to_official,
    ),
    "Latte": Format(
        holds=latte.holds,
        read=latte.read,
        from_official=latte.from_official,
        to_official=latte.to_official,
    ),
    "DiT": Format(
        holds=lambda state_dict, told: True,
        read=dit.read,
        from_official=dit.from_official,
        to_official=dit.to_official,
    ),
}
# class in a folder's config.json: what reads it
OWN_FOLDERS = {
    "DiT": dit.read_folder,
    **dict.fromkeys(dit.DIFFUSERS_CLASSES, dit.read_diffusers),
    "Latte": latte.read_folder,
}
ALIASES = {"LatteT2V": "LatteTransformer3DModel"}  # the authors' class: the same options and keys
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
) -> Any:
    """The model in a file or folder, on the CPU, in eval mode: a `DiT` or `Latte` of ours, or a transformer of
    diffusers, plain or with long skips.

    A file (`.pt`, `.pth`, `.bin`, `.ckpt`, `.safetensors`, or another name where its head is one of these) holds a
    state dict, or a training checkpoint with `model` and `ema` or one of their other names, under our keys or the
    official ones, with or without the prefixes of torch.compile, DistributedDataParallel and FSDP: class-to-image
    (facebookresearch's `DiT-XL-2-256x256.pt`, the authors' `DiT-XL-2-skip.pt`), class-to-video (Latte), text-to-video
    (`Latte-skip.pt`, and diffusers' keys), text-to-image (Tencent's `pytorch_model_ema.pt`, and diffusers' keys). A
    folder is one of `save_pretrained`, or a pipeline with one: of ours, or of a class of diffusers whose units skipdit
    knows; or a run of `skipdit train`, or one of its checkpoints. diffusers' `DiTTransformer2DModel` becomes our `DiT`.

    What a file or config asks for is compared with what its weights hold before anything is made.

    A file tells the sizes, not every option: with our keys the last class is taken for the null class, and 0 for
    `downscale_freq_shift`. Where that is not so, load a folder, or build the model and call `load_state_dict`.

    Args:
        path: the file or folder. Pickled objects but tensors, plain containers and `argparse.Namespace` are refused.
        prefer: which weights of a training checkpoint that holds both; where it holds one, that one.
        num_attention_heads: needed for a file whose depth and width are not those of a published size.
        sample_size: needed for a file with our keys; `pos_embed` tells it of an official one.
        num_frames: needed for a file with our keys of a Latte, and makes it one; `temp_embed` tells it of an official
            one. Of text-to-video files this and `sample_size` are needed where the size is not the published one.
        num_classes: needed where the class table has as many rows as a usual data set has classes: as many where no
            row means "no class", one less where the last one does. The `args` of a training checkpoint tell it.
        fusion: needed for a file with our keys and long skips; the official ones are `"replace"`.
        drop: roots of keys that are left out, such as `"projectors"` of REPA, or what lies beside `model` in a
            checkpoint of Lightning. There must be some.
        variant: of the weights in a folder, such as `"fp16"`; by default the only one that there is.
        dtype: of the returned model.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the file is damaged or foreign; keys are unknown, missing or misshapen; an argument is missing, or
            contradicts the file. The message begins with the path.
    """
    source = Path(path)
    if prefer not in get_args(Preference):
        raise ValueError(f"prefer must be one of {', '.join(get_args(Preference))}, got {prefer!r}")
    if not source.exists():
        raise FileNotFoundError(f"no such file or folder: {printable(source)}")
    told = Told(
        num_attention_heads=num_attention_heads,
        sample_size=sample_size,
        num_frames=num_frames,
        num_classes=num_classes,
        fusion=fusion,
    )
    dropped = (drop,) if isinstance(drop, str) else tuple(drop)
    try:
        if source.is_dir():
            if dropped:
                raise ValueError(f"drop is for a file, got {', '.join(dropped)} for a folder")
            model = assemble(_read_folder(source, told, prefer, variant), dtype)
        else:
            if variant is not None:
                raise ValueError(f"variant is for a folder, got {variant!r} for a file")
            whole, args = read_training(source, prefer)
            # a name before all keys is seen as such when what lies beside the model is gone
            state_dict = strip_prefixes(_without(dropped, whole), prefer)
            known = told
            if told.num_classes is None:
                known = replace(told, num_classes=find_num_classes(args.get("num_classes"), state_dict))
            model = assemble(_find_format(state_dict, known).read(state_dict, known), dtype)
        refuse_contradictions(model, told)
    except ValueError as error:
        raise ValueError(_with_name(source, str(error))) from error
    return model


def load_with_long_skips(model_class: type[nn.Module], folder: Path, dtype: torch.dtype) -> Any:
    """What a `model_class` of diffusers, or one that was declared, saved with long skips. Errors as of `load_model`."""
    config = read_config(folder)
    if config.get("long_skip") is None:
        raise ValueError(
            f"{printable(folder)} holds a {model_class.__name__} without long skips: load it with "
            f"{model_class.__name__}.from_pretrained, then call skipdit.add_long_skips(model)"
        )
    try:
        tensors = read_folder_tensors(folder, LONG_SKIP_VARIANT)
        return assemble(_read_family(model_class, config, tensors, config["long_skip"]), dtype)
    except ValueError as error:
        raise ValueError(_with_name(folder, str(error))) from error


def _with_name(path: Path, message: str) -> str:
    """The message, which names the path once."""
    name, last = printable(path), f"{printable(path.name)} "
    if message.startswith(last):
        return f"{name} {message.removeprefix(last)}"
    return message if message.startswith(name) else f"{name}: {message}"


def from_official(state_dict: StateDict) -> dict[str, Tensor]:
    """The same numbers under the keys of our model or diffusers', without what these compute or do not use.

    Raises `ValueError` naming unknown and missing keys, and where a table of positions is not the fixed one. Each
    family's module says more.
    """
    return _find_format(state_dict, Told()).from_official(state_dict)


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under the official keys of its family; `ValueError` naming what these cannot hold."""
    name = next((base.__name__ for base in type(model).__mro__ if base.__name__ in FORMATS), None)
    if name is None:
        raise ValueError(f"official formats are those of {', '.join(FORMATS)}, got a {type(model).__name__}")
    return FORMATS[name].to_official(model)


def save_official(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes `to_official(model)` as a `.safetensors` file, in one step: what was at `path` stays whole until then."""
    target = Path(path)
    if target.suffix != SAFETENSORS_SUFFIX:
        raise ValueError(f"path must end in {SAFETENSORS_SUFFIX}, got {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {target.parent}")
    tensors = {key: tensor.contiguous() for key, tensor in to_official(model).items()}
    clean_up(target.parent)
    with atomic_file(target) as draft:
        save_file(tensors, draft, metadata={"format": "pt"})


def to_diffusers(model: Any) -> Any:
    """Our `DiT` as diffusers' (`checkpoints.dit.to_diffusers`), a transformer of diffusers as it is. `ValueError` for
    a `Latte`, of which diffusers has only the text-to-video model."""
    names = {base.__name__ for base in type(model).__mro__}
    if "DiT" in names:
        return dit.to_diffusers(model)
    if not names & set(FAMILIES):
        raise ValueError(f"diffusers has no class-to-video transformer, got a {type(model).__name__}")
    return model


def _find_format(state_dict: StateDict, told: Told) -> Format:
    return next(found for found in FORMATS.values() if found.holds(state_dict, told))


def _without(dropped: Sequence[str], state_dict: StateDict) -> StateDict:
    kept = {key: tensor for key, tensor in state_dict.items() if key.partition(".")[0] not in dropped}
    if dropped and len(kept) == len(state_dict):
        raise ValueError(f"holds no key of {', '.join(dropped)} to drop, but {list_first(state_dict)}")
    return kept


def _read_folder(folder: Path, told: Told, prefer: Preference, variant: str | None) -> Weights:
    if (checkpoint := find_checkpoint(folder)) is not None:
        if variant is not None:
            raise ValueError(f"variant is for a folder of save_pretrained, got {variant!r} for a run's checkpoint")
        state_dict, told = read_checkpoint(checkpoint, prefer, told)
        weights = _find_format(state_dict, told).read(state_dict, told)
        path = read_shallow_path(checkpoint, num_units_of(weights.model))
        if path is not None:
            cast(Any, weights.model).register_to_config(shallow_path=path.to_dict())
        return weights
    if (folder / "pipeline" / "model_index.json").exists():  # a finished run
        folder = folder / "pipeline"
    if (folder / "model_index.json").exists() or not (folder / CONFIG_NAME).exists():
        folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = read_config(folder)
    class_name = str(config.get("_class_name"))
    class_name = ALIASES.get(class_name, class_name)
    if class_name not in OWN_FOLDERS and class_name not in FAMILIES:
        allowed = ", ".join(dict.fromkeys((*OWN_FOLDERS, *FAMILIES)))
        raise ValueError(f"_class_name in {CONFIG_NAME} must be one of {allowed}, got {printable(class_name)!r}")
    long_skip = config.get("long_skip") if class_name in FAMILIES else None
    if long_skip is not None and variant not in (None, LONG_SKIP_VARIANT):
        raise ValueError(f"weights with long skips are of the variant {LONG_SKIP_VARIANT!r} only, got {variant!r}")
    is_own = class_name in OWN_FOLDERS and long_skip is None
    if not is_own and not hasattr(diffusers, class_name):
        raise ValueError(f"{class_name} is no class of diffusers: load it with its own from_pretrained")
    tensors = read_folder_tensors(folder, variant if long_skip is None else LONG_SKIP_VARIANT)
    if is_own:
        return OWN_FOLDERS[class_name](config, tensors)
    return _read_family(getattr(diffusers, class_name), config, tensors, long_skip)


def _read_family(
    model_class: type[nn.Module], config: Mapping[str, Any], tensors: StateDict, long_skip: Any
) -> Weights:
    """A transformer of diffusers, with the long skips of its config. Options that its class does not know (any more)
    are left out, as there."""
    options = {name: config[name] for name in inspect.signature(model_class).parameters if name in config}
    check_options(options, tensors)
    unused = UNUSED_KEYS.get(model_class.__name__)
    tensors = {key: tensor for key, tensor in tensors.items() if key != unused}

    def build() -> nn.Module:
        model: Any = model_class(**options)
        if long_skip is not None:
            add_long_skips(model, LongSkipConfig.from_dict(long_skip))
        if config.get("shallow_path") is not None:
            model.register_to_config(shallow_path=ShallowPath.from_dict(config["shallow_path"]).to_dict())
        return model

    return Weights(model=make_model(build, tensors), tensors=tensors)
