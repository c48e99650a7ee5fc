"""Blocks of a set of samples: batches of fixed indices, each in a folder that is complete or absent.

Sample i starts from its own noise, drawn from (seed, i), and is always computed in the same batch, so it does not
depend on the process that makes its block.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch import nn

from skipdit.cache.methods import CacheMethod
from skipdit.files.output import check_whole, to_json
from skipdit.files.untrusted import printable, read_json
from skipdit.interfaces import Fields
from skipdit.loading import Source
from skipdit.runs import Conditioning
from skipdit.sampling.compare import CLIP_FPS
from skipdit.sampling.config import SampleConfig

KIND = "samples"
BLOCKS = "blocks"
FIRST_PARTS = ("transformer", "vae")  # hashed first and without their names, as in earlier sets
SEED_STRIDE = 0x9E3779B1  # 2^32 over the golden ratio: the series of different seeds are far apart
# options that do not change the samples, or that are covered by the weights and the method
FREE_TO_CHANGE = ("out", "overwrite", "model", "vae", "device", "cache", "num_attention_heads", "drop")


class BlockInfo(TypedDict):
    """The fields of `block.json`."""

    settings: str
    """SHA-256 of the settings that the block was made with"""
    num_broken: int
    steps_full: int
    steps_reused: int
    compute_ratio: float


# ----------------------------------------------------------------------------------------------------------------------
# The settings of a set


def seed_of(seed: int, index: int) -> int:
    """Return the seed of all noise of one sample, which is drawn on the CPU and so is the same on every device.

    torch's CPU generator uses 32 bits of a seed: no two samples of a set share a seed, and sets whose seeds are equal
    modulo 2^32 are equal.
    """
    return (seed * SEED_STRIDE + index) % 2**32


@dataclass(frozen=True)
class Conditions:
    """The conditions of the samples of a set, taken in turn or at random."""

    choices: Conditioning
    captions: Sequence[str]
    """one per choice"""
    labels: Sequence[int | None]
    """one per choice: its class number, or the index of the prompt; `None` for a model without either"""
    prompts: Sequence[str]
    """the choices, if they are prompts; otherwise empty"""
    seed: int
    at_random: bool
    """draw the condition of each sample from (seed, index) instead of taking them in turn"""

    def choice_of(self, index: int) -> int:
        """Return the index of a sample's condition among the choices."""
        if not self.at_random:
            return index % len(self.choices)
        digest = hashlib.sha256(f"{self.seed} {index}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % len(self.choices)

    def label(self, index: int) -> int | None:
        """Return the label of a sample."""
        return self.labels[self.choice_of(index)]

    @classmethod
    def of(cls, source: Source, config: SampleConfig) -> "Conditions":
        """Return the labels or prompts of a config; by default all classes, or the prompts in a bundled model's
        showcase."""
        sampler = source.sampler
        options = {"labels": config.labels, "prompt": config.prompt}
        choices, captions = sampler.task.choose(sampler.pipeline, options, None, source.showcase)
        prompts = choices if sampler.task.option == "prompt" else []
        labels = range(len(prompts)) if prompts else choices
        return cls(choices, captions, labels, prompts, config.seed, config.random_labels)


def settings_of(source: Source, method: CacheMethod | None, config: SampleConfig, batch_size: int) -> Fields:
    """Return, as JSON, everything that two equal sets must share: options, weights, cache and kind of device."""
    pipeline = source.sampler.pipeline
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE}
    digest = hashlib.sha256()
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for part in sorted(models, key=lambda name: (name not in FIRST_PARTS, name)):
        if part not in FIRST_PARTS:
            digest.update(part.encode())
        for name, tensor in sorted(models[part].state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    settings |= {
        "batch_size": batch_size,
        "model": digest.hexdigest(),
        "scheduler": [type(pipeline.scheduler).__name__, scheduler],
        "cache": None if method is None else repr(replace(method, spec="", made_for=None)),
        "device": pipeline.device.type,
    }
    return json.loads(to_json(settings))


# ----------------------------------------------------------------------------------------------------------------------
# Blocks


def block_path(folder: Path, number: int) -> Path:
    return folder / BLOCKS / f"block-{number:07d}"


def read_block(path: Path, settings: str) -> BlockInfo:
    """Return the fields of a block. Raises `OSError` or `ValueError` if it is incomplete or has other settings."""
    check_whole(path, KIND)
    info = read_json(path / "block.json", BlockInfo)
    if info["settings"] != settings:
        raise ValueError(f"{printable(path)} belongs to another set")
    return info


def is_block(path: Path, settings: str) -> bool:
    try:
        read_block(path, settings)
    except (OSError, ValueError):
        return False
    return True


def png_name(index: int) -> str:
    return f"{index:07d}.png"


def save_png(path: Path, sample: np.ndarray) -> None:
    """Write a picture (h w 3), or a clip (f h w 3) as an animated PNG; both are lossless."""
    first, *others = [Image.fromarray(frame) for frame in (sample if sample.ndim == 4 else sample[None])]
    animation = {"save_all": True, "append_images": others, "duration": 1000 / CLIP_FPS, "loop": 0}
    first.save(path, **(animation if others else {}))
