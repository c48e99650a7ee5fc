"""Read tensors and configs from files and `save_pretrained` folders without unpickling untrusted objects."""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypedDict

from diffusers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from skipdit.checkpoints.archive import read_archive
from skipdit.checkpoints.wrappings import Preference, StateDict, list_first, pick_weights
from skipdit.files.untrusted import check_regular, open_regular, printable, read_json
from skipdit.interfaces import Fields

__all__ = ["Preference", "StateDict", "list_first"]

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHTS_INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
STEM, SUFFIXES = "diffusion_pytorch_model", ("safetensors", "bin")  # of diffusers' weight files
ZIP_HEAD = b"PK\3\4"
MAX_SHARDS = 1000


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Make the message of a `ValueError` begin with the path, once."""
    try:
        yield
    except ValueError as error:
        name, file_name, message = printable(path), f"{printable(path.name)} ", str(error)
        if message.startswith(file_name):
            message = f"{name} {message.removeprefix(file_name)}"
        raise ValueError(message if message.startswith(name) else f"{name}: {message}") from error


class ShardIndex(TypedDict):
    """The fields read from the index of sharded weights."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]
    """name of the file by key"""


def read_state_dict(path: Path, prefer: Preference) -> StateDict:
    """Return the tensors of a file; the preferred ones of a training checkpoint that has both `model` and `ema`."""
    return pick_weights(_read_tensors(path), prefer)


def read_training(path: Path, prefer: Preference) -> tuple[StateDict, Fields]:
    """Return the tensors like `read_state_dict`, and the `args` that facebookresearch's train.py saves."""
    content, options = _read_tensors(path), {}
    match content:
        case {"args": argparse.Namespace() as args}:
            options = vars(args)
        case {"args": Mapping() as args}:
            options = dict(args)
    return pick_weights(content, prefer), options


def read_folder_tensors(folder: Path, variant: str | None = None) -> StateDict:
    """Return the tensors that `save_pretrained` wrote, in one file or several, as safetensors or pickled.

    variant: the one given to `save_pretrained`; by default none, or the only one in the folder. `ValueError` if there
    are no weights, or more than one variant.
    """
    path = _find_weights(folder, variant)
    if path.suffix != ".json":
        return pick_weights(_read_tensors(path), "ema")
    names = sorted(set(read_json(path, ShardIndex)["weight_map"].values()))
    if len(names) > MAX_SHARDS:
        raise ValueError(f"{printable(path)} names {len(names):,} files, at most {MAX_SHARDS:,} are read")
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not name or Path(name).name != name:
            raise ValueError(f"{printable(path)} names {printable(name)!r}, which is not a file beside it")
        content = _read_tensors(folder / name)
        try:
            shard = pick_weights(content, "ema")
        except ValueError as error:
            raise ValueError(f"{printable(name)} {error}") from error
        if duplicates := [key for key in shard if key in tensors]:
            raise ValueError(f"{printable(name)} has {list_first(duplicates)}, which another of the files also has")
        tensors |= shard
    return tensors


def _find_weights(folder: Path, variant: str | None) -> Path:
    if variant is None:
        for names in ((SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
            present = [name for name in names if (folder / name).exists()]
            if len(present) > 1:
                raise ValueError(f"has weights twice, {' and '.join(present)}: remove the older")
            if present:
                return folder / present[0]
        variants = _variants(path.name for path in folder.iterdir())
        if len(variants) != 1:
            hint = f"; give variant, one of {list_first(sorted(variants))}" if variants else ""
            raise ValueError(f"has none of {SAFETENSORS_WEIGHTS_NAME}, {SAFE_WEIGHTS_INDEX_NAME}, {WEIGHTS_NAME}{hint}")
        (variant,) = variants
    names = [f"{STEM}.{variant}.{suffix}" for suffix in SUFFIXES]
    names += [f"{STEM}.{suffix}.index.{variant}.json" for suffix in SUFFIXES]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise FileNotFoundError(f"{printable(folder)} has neither {' nor '.join(map(printable, names[:3:2]))}")
    return path


def _variants(names: Iterable[str]) -> set[str]:
    """Return the variants in names such as `{stem}.{variant}.safetensors`, or in the names of their indices."""
    patterns = [
        re.compile(rf"{re.escape(STEM)}\.{middle}")
        for suffix in SUFFIXES
        for middle in (rf"(?!.*-of-)(.+)\.{suffix}", rf"{suffix}\.index\.(.+)\.json")
    ]
    return {match[1] for name in names for pattern in patterns if (match := pattern.fullmatch(name))}


def read_config(folder: Path) -> Fields:
    """Return the config.json that `save_pretrained` wrote."""
    if not (folder / CONFIG_NAME).exists():
        raise ValueError(f"has no {CONFIG_NAME}, which save_pretrained writes")
    return read_json(folder / CONFIG_NAME, Fields)


def _read_tensors(path: Path) -> object:
    """Read a file in the format that its first bytes show, or its suffix if they are cut off."""
    with open_regular(path) as file:
        head = file.read(9)
    suffix = path.suffix.lower()
    if suffix == SAFETENSORS_SUFFIX and head[:4] == ZIP_HEAD:
        raise ValueError(f"{printable(path.name)} is an archive of torch.save: rename it to end in .pt")
    if head[8:] == b"{" or suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    if head[:4] == ZIP_HEAD or suffix in PICKLE_SUFFIXES:
        return read_archive(path)
    allowed = ", ".join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))
    raise ValueError(f"the name must end in {allowed}, got {printable(path.name)}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    check_regular(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{printable(path.name)} is not a complete safetensors file: {printable(error)}") from error
