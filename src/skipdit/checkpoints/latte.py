"""The class-to-video Latte: official releases (Vchitect/Latte, Skip-DiT's class-to-video), our own files.

The keys are the DiT's (`dit.OFFICIAL_KEYS`), the class embedder where there is one, and two fixed tables that our model
computes: they are checked on the way in and written on the way out.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from skipdit.checkpoints.dit import (
    OFFICIAL_KEYS,
    POSITION_KEY,
    official_needs,
    options_of_file,
    own_options,
    read_block_sizes,
    refuse_position_embedding,
)
from skipdit.checkpoints.keys import (
    SKIP_ROOTS,
    Told,
    Weights,
    check_options,
    class_options,
    count_layers,
    expand,
    indices,
    make_model,
    read_long_skip,
    refuse_keys,
    refuse_other_table,
    require,
    shape_of,
    skip_needs,
)
from skipdit.checkpoints.reading import StateDict
from skipdit.models.dit import sincos
from skipdit.models.latte import Latte

FRAME_KEY = "temp_embed"
CLASS_KEY = ("y_embedder.embedding_table.weight", "class_embedder.weight")


def skip_targets(num_blocks: int, num_skips: int) -> list[int]:
    """The block that takes each official skip: the spatial block of a pair in the second half.

    Of all pairs (Latte_skip) skip 0 is the innermost, `(i - 14) // 2` for block i of 28. Of fewer, the outermost ones
    (Latte_skip_partial: 2 of 7), skip 0 is the outermost, `(28 - i) // 2 - 1` (Skip-DiT, class-to-video,
    models/latte_img.py). Both orders are those of depth 28, the only one that the authors' classes pair up right.
    """
    num_units = num_blocks // 2
    units = range(num_units - num_skips, num_units)
    return [2 * unit for unit in (units if num_skips == num_units // 2 else reversed(units))]


def holds(state_dict: StateDict, told: Told) -> bool:
    """Whether a file is a Latte. With our keys one without classes is, one whose skips spare the last block, as only
    those of pairs do, and one that is told to have frames: the DiT's keys are the same."""
    if FRAME_KEY in state_dict:
        return state_dict[FRAME_KEY].dim() == 3
    if "patch_embed.proj.weight" not in state_dict:
        return False
    targets = indices([key for key in state_dict if ".long_skip." in key], "blocks")
    last = str(len(indices(state_dict, "blocks")) - 1)
    return told.num_frames is not None or CLASS_KEY[1] not in state_dict or bool(targets and last not in targets)


def read(state_dict: StateDict, told: Told) -> Weights:
    """A file with the official keys, or with ours."""
    if FRAME_KEY not in state_dict:
        if told.num_frames is None:
            raise ValueError("num_frames must be given: only an official temp_embed or a folder's config.json tells it")
        return _make(options_of_file(_read_sizes(state_dict, {}, told), told), told.num_frames, state_dict, {})
    tensors = from_official(state_dict)
    names = {ours: official for official, ours in _official_table(state_dict).items()}
    sizes = _read_sizes(tensors, names, told)
    sample_size = math.isqrt(state_dict[POSITION_KEY].shape[1]) * sizes["patch_size"]
    told = dataclasses.replace(told, sample_size=sample_size, fusion="replace")
    return _make(options_of_file(sizes, told), state_dict[FRAME_KEY].shape[1], tensors, names)


def read_folder(config: Mapping[str, Any], tensors: StateDict) -> Weights:
    """What `Latte.save_pretrained` wrote."""
    options = own_options(config)
    check_options(options, tensors)
    return Weights(model=make_model(lambda: Latte(**options), tensors), tensors=tensors)


def from_official(state_dict: StateDict) -> dict[str, Tensor]:
    """The same tensors under our keys, without `pos_embed` (1, tokens, dim) and `temp_embed` (1, frames, dim).

    Raises `ValueError` naming unknown and missing keys; for a depth that is not made of pairs, with long skips of two
    pairs; and where one of the tables is not the fixed sine-cosine table.
    """
    table = _official_table(state_dict)
    refuse_keys({*table, POSITION_KEY, FRAME_KEY}, state_dict)
    hidden_size = state_dict["x_embedder.proj.bias"].numel()
    refuse_position_embedding(state_dict[POSITION_KEY], hidden_size)
    frames, shape = state_dict[FRAME_KEY], tuple(state_dict[FRAME_KEY].shape)
    if len(shape) != 3 or 0 in shape or shape[::2] != (1, hidden_size):
        raise ValueError(f"{FRAME_KEY} must be (1, number of frames, {hidden_size}), got {shape}")
    positions = torch.arange(shape[1], dtype=torch.float64)
    refuse_other_table(FRAME_KEY, frames[0], sincos(hidden_size, positions).float())
    return {ours: state_dict[official] for official, ours in table.items()}


def to_official(model: Latte) -> dict[str, Tensor]:
    """The model's own tensors (no copies) under the official keys, with `pos_embed` (1, tokens, dim) and `temp_embed`
    (1, frames, dim).

    Latte-XL/2 with 101 classes: 321 tensors with long skips, 293 without; one less without classes. Raises `ValueError`
    naming the option that the official format cannot hold.
    """
    config, num_pairs = model.config, len(model.long_skip_links.sources)
    num_blocks, has_classes = config["num_layers"], config["num_classes"] is not None
    needs = [need for need in official_needs(config) if need[0] != "null_class" or has_classes]
    if num_pairs:
        needs += [("num_layers % 4 with long skips", num_blocks % 4, (0,)), *skip_needs(config["long_skip"])]
    require("the official format", needs)
    tensors = model.state_dict()
    table = expand(_rows(has_classes), num_blocks, skip_targets(num_blocks, num_pairs))
    fixed = {POSITION_KEY: model.position_embedding.unsqueeze(0), FRAME_KEY: model.frame_embedding.unsqueeze(0)}
    return fixed | {official: tensors[ours] for official, ours in table.items()}


def _rows(has_classes: bool) -> list[tuple[str, str]]:
    return [row for row in OFFICIAL_KEYS if has_classes or row != CLASS_KEY]


def _official_table(keys: Collection[str]) -> dict[str, str]:
    num_blocks, num_skips = count_layers(keys, "blocks"), count_layers(keys, *SKIP_ROOTS)
    divisor = 4 if num_skips else 2
    if num_blocks % divisor or not num_blocks:
        kind = "an official Latte with long skips" if num_skips else "a Latte"
        raise ValueError(f"{kind} has a number of blocks divisible by {divisor}, got {num_blocks}")
    return expand(_rows(CLASS_KEY[0] in keys), num_blocks, skip_targets(num_blocks, min(num_skips, num_blocks // 4)))


def _read_sizes(tensors: StateDict, names: Mapping[str, str], told: Told) -> dict[str, Any]:
    sizes = read_block_sizes(tensors, names)
    class_key, classes = CLASS_KEY[1], {"num_classes": None}
    if class_key in tensors:
        classes = class_options(shape_of(tensors, class_key, 2, names)[0], told.num_classes)
    return sizes | classes | {"long_skip": read_long_skip(tensors, "blocks", sizes["num_layers"] // 2)}


def _make(options: Mapping[str, Any], num_frames: int, tensors: StateDict, names: Mapping[str, str]) -> Weights:
    model = make_model(lambda: Latte(**options, num_frames=num_frames), tensors, names)
    return Weights(model=model, tensors=tensors, names=names)
