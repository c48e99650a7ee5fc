"""Checkpoints of the class-to-video Latte: official releases (Vchitect/Latte, Skip-DiT's class-to-video), our files.

The keys are those of DiT (`dit.OFFICIAL_KEYS`), with or without a class embedder, plus two fixed tables that our model
computes: loading checks them, saving writes them.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from skipdit.checkpoints import dit, keys
from skipdit.checkpoints.dit import OFFICIAL_KEYS, POSITION_KEY
from skipdit.checkpoints.keys import LoadHints, UnloadedModel
from skipdit.checkpoints.reading import StateDict
from skipdit.interfaces import Fields
from skipdit.models.dit import sincos
from skipdit.models.latte import Latte

FRAME_KEY = "temp_embed"
CLASS_KEY = ("y_embedder.embedding_table.weight", "class_embedder.weight")


def skip_targets(num_blocks: int, num_skips: int) -> list[int]:
    """Return the block that takes each official skip: the spatial block of a pair in the second half.

    With all pairs linked (Latte_skip), skip 0 is the innermost: `(i - 14) // 2` for block i of 28. With only the
    outermost pairs linked (Latte_skip_partial: 2 of 7), skip 0 is the outermost: `(28 - i) // 2 - 1` (Skip-DiT,
    class-to-video, models/latte_img.py). Both orders are those of depth 28, the only depth that the authors' classes
    pair correctly.
    """
    num_units = num_blocks // 2
    units = range(num_units - num_skips, num_units)
    return [2 * unit for unit in (units if num_skips == num_units // 2 else reversed(units))]


def is_format(state_dict: StateDict, hints: LoadHints) -> bool:
    """Return True if a file is a Latte. Our keys are those of DiT: a file with them is a Latte if it has no classes, if
    only blocks before the last take skips (its skips link pairs of blocks), or if the caller gives `num_frames`."""
    if FRAME_KEY in state_dict:
        return state_dict[FRAME_KEY].dim() == 3
    if "patch_embed.proj.weight" not in state_dict:
        return False
    targets = keys.indices([key for key in state_dict if ".long_skip." in key], "blocks")
    last = str(len(keys.indices(state_dict, "blocks")) - 1)
    return hints.num_frames is not None or CLASS_KEY[1] not in state_dict or bool(targets and last not in targets)


def read(state_dict: StateDict, hints: LoadHints) -> UnloadedModel:
    """Read a file with the official keys or with ours."""
    if FRAME_KEY not in state_dict:
        num_frames = hints.num_frames
        if num_frames is None:
            raise ValueError("num_frames must be given: only an official temp_embed or a folder's config.json has it")
        options = dit.options_of_file(_read_sizes(state_dict, {}, hints), hints)
        return keys.make_unloaded(lambda: Latte(**options, num_frames=num_frames), state_dict)
    tensors = from_official(state_dict)
    names = {ours: official for official, ours in _official_table(state_dict).items()}
    sizes = _read_sizes(tensors, names, hints)
    sample_size = math.isqrt(state_dict[POSITION_KEY].shape[1]) * sizes["patch_size"]
    options = dit.options_of_file(sizes, dataclasses.replace(hints, sample_size=sample_size, fusion="replace"))
    return keys.make_unloaded(lambda: Latte(**options, num_frames=state_dict[FRAME_KEY].shape[1]), tensors, names)


def read_folder(config: Fields, tensors: StateDict) -> UnloadedModel:
    """Read what `Latte.save_pretrained` wrote."""
    options = dit.own_options(config)
    keys.check_options(options, tensors)
    return keys.make_unloaded(lambda: Latte(**options), tensors)


def from_official(state_dict: StateDict) -> dict[str, Tensor]:
    """Return the same tensors under our keys, without `pos_embed` (1, tokens, dim) and `temp_embed` (1, frames, dim).

    `ValueError` names unknown or missing keys, a depth not divisible by 2, or by 4 with long skips, or a table that is
    not the fixed sine-cosine table.
    """
    table = _official_table(state_dict)
    keys.raise_on_other_keys({*table, POSITION_KEY, FRAME_KEY}, state_dict)
    hidden_size = state_dict["x_embedder.proj.bias"].numel()
    dit.raise_on_other_positions(state_dict[POSITION_KEY], hidden_size)
    frames, shape = state_dict[FRAME_KEY], tuple(state_dict[FRAME_KEY].shape)
    if len(shape) != 3 or 0 in shape or shape[::2] != (1, hidden_size):
        raise ValueError(f"{FRAME_KEY} must be (1, number of frames, {hidden_size}), got {shape}")
    positions = torch.arange(shape[1], dtype=torch.float64)
    keys.raise_on_other_table(FRAME_KEY, frames[0], sincos(hidden_size, positions).float())
    return {ours: state_dict[official] for official, ours in table.items()}


def to_official(model: Latte) -> dict[str, Tensor]:
    """Return the model's tensors, not copied, under the official keys, with `pos_embed` (1, tokens, dim) and
    `temp_embed` (1, frames, dim).

    Latte-XL/2 with 101 classes has 321 tensors with long skips, 293 without; one fewer without classes. `ValueError`
    names the option that the official format does not support.
    """
    config, num_pairs = model.config, len(model.long_skip_links.sources)
    num_blocks, has_classes = config["num_layers"], config["num_classes"] is not None
    needs = [need for need in dit.official_needs(config) if need[0] != "null_class" or has_classes]
    if num_pairs:
        needs += [("num_layers % 4 with long skips", num_blocks % 4, (0,)), *keys.skip_needs(config["long_skip"])]
    keys.require("the official format", needs)
    tensors = model.state_dict()
    table = keys.expand(_rows(has_classes), num_blocks, skip_targets(num_blocks, num_pairs))
    fixed = {POSITION_KEY: model.position_embedding.unsqueeze(0), FRAME_KEY: model.frame_embedding.unsqueeze(0)}
    return fixed | {official: tensors[ours] for official, ours in table.items()}


def _rows(has_classes: bool) -> list[tuple[str, str]]:
    return [row for row in OFFICIAL_KEYS if has_classes or row != CLASS_KEY]


def _official_table(official_keys: Collection[str]) -> dict[str, str]:
    num_blocks = keys.count_layers(official_keys, "blocks")
    num_skips = keys.count_layers(official_keys, *keys.SKIP_ROOTS)
    divisor = 4 if num_skips else 2
    if num_blocks % divisor or not num_blocks:
        kind = "an official Latte with long skips" if num_skips else "a Latte"
        raise ValueError(f"{kind} must have a number of blocks divisible by {divisor}, got {num_blocks}")
    targets = skip_targets(num_blocks, min(num_skips, num_blocks // 4))
    return keys.expand(_rows(CLASS_KEY[0] in official_keys), num_blocks, targets)


def _read_sizes(tensors: StateDict, names: Mapping[str, str], hints: LoadHints) -> Fields:
    sizes = dit.read_block_sizes(tensors, names)
    class_key, classes = CLASS_KEY[1], {"num_classes": None}
    if class_key in tensors:
        classes = keys.class_options(keys.shape_of(tensors, class_key, 2, names)[0], hints.num_classes)
    return sizes | classes | {"long_skip": keys.read_long_skip(tensors, "blocks", sizes["num_layers"] // 2)}
