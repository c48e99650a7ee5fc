"""From a path to tensors, without unpickling strangers' objects: files, folders of `save_pretrained`, their config."""

import argparse
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Preference = Literal["ema", "model"]
StateDict = Mapping[str, Tensor]

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin")


def read_state_dict(path: Path, prefer: Preference) -> StateDict:
    """The tensors of a file; of a training checkpoint that holds both `model` and `ema`, the preferred ones."""
    return _pick_weights(_read_tensors(path), prefer)


def read_folder_tensors(folder: Path) -> StateDict:
    """The tensors that `save_pretrained` wrote, whether in one file or several."""
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        shards = set(read_json(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map", {}).values())
        tensors = [_read_tensors(folder / Path(shard).name) for shard in sorted(shards)]
        return {key: tensor for shard in tensors for key, tensor in shard.items()}
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).exists():
            return _as_state_dict(_read_tensors(folder / name))
    raise ValueError(f"holds none of {SAFETENSORS_WEIGHTS_NAME}, {SAFE_WEIGHTS_INDEX_NAME}, {WEIGHTS_NAME}")


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"holds no {path.name}, which save_pretrained writes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(content).__name__}")
    return content


def list_first(keys: Iterable[str], num_shown: int = 3) -> str:
    shown = list(keys)
    return ", ".join(shown[:num_shown]) + (", ..." if len(shown) > num_shown else "")


def _read_tensors(path: Path) -> Any:
    if path.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    raise ValueError(f"the name must end in {', '.join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))}, got {path.name}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("truncated, or not written by torch.save of PyTorch 1.6 or newer")
        with torch.serialization.safe_globals([argparse.Namespace]):
            if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                raise ValueError(f"refused, because loading it would call {', '.join(sorted(unsafe))}")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile, struct, pickle and torch raise a dozen types on a damaged archive
        reason = str(error) if type(error) is ValueError else "damaged"
        raise ValueError(f"{path.name} is not a readable PyTorch checkpoint: {reason}") from error


def _pick_weights(checkpoint: Any, prefer: Preference) -> StateDict:
    """The checkpoint where it is a state dict, else the preferred one inside (DiT train.py: model, ema, opt, args)."""
    choices = set(get_args(Preference)) & set(checkpoint) if isinstance(checkpoint, Mapping) else set()
    if not choices:
        return _as_state_dict(checkpoint)
    return _as_state_dict(checkpoint[prefer if prefer in choices else choices.pop()])


def _as_state_dict(checkpoint: Any) -> StateDict:
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"must hold a state dict, got {type(checkpoint).__name__}")
    foreign = [
        str(key) for key, value in checkpoint.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if foreign or not checkpoint:
        raise ValueError(
            f"must hold tensors, or a state dict called model or ema, got {list_first(foreign) or 'nothing'}"
        )
    return checkpoint
