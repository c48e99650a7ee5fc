"""Blocks of a set of samples: batches of fixed indices, each in a folder that is there whole or not at all.

Sample i starts from noise of its own, drawn from (seed, i), and is computed beside the same others in a batch of the
same size, by the same kernels, whoever makes its block.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from skipdit.cache.methods import CacheMethod
from skipdit.files.output import atomic_folder, check_whole, to_json
from skipdit.files.untrusted import printable, read_json
from skipdit.interfaces import Fields
from skipdit.loading import Source
from skipdit.runs import Counts, Runner, counts_of, guidance_options
from skipdit.sampling.compare import CLIP_FPS
from skipdit.sampling.config import SampleConfig

KIND = "samples"
BLOCKS = "blocks"
FIRST_PARTS = ("transformer", "vae")  # which are hashed first, without their names, as in earlier sets
SEED_STRIDE = 0x9E3779B1  # 2^32 over the golden ratio: series of several seeds lie far apart
# or told by the weights and the method
FREE_TO_CHANGE = ("out", "overwrite", "model", "vae", "device", "cache", "num_attention_heads", "drop")


class BlockInfo(TypedDict):
    """`block.json`. settings: SHA-256 of those that the block was made with."""

    settings: str
    num_broken: int
    steps_full: int
    steps_reused: int
    compute_ratio: float


# ----------------------------------------------------------------------------------------------------------------------
# What a set is


def seed_of(seed: int, index: int) -> int:
    """Return the seed of all noise of one sample, which is drawn on the CPU: it is the same on every device.

    torch's CPU generator takes 32 bits of a seed: within a set no two samples share one, and sets of seeds that are
    equal modulo 2^32 are the same.
    """
    return (seed * SEED_STRIDE + index) % 2**32


@dataclass(frozen=True)
class Conditions:
    """What the samples of a set show: class numbers, prompts, or `None` of an unconditional model, in turn, or at
    random."""

    choices: Sequence[Any]
    captions: Sequence[str]
    seed: int
    at_random: bool
    """draw each from (seed, index) instead of taking them in turn"""

    def place(self, index: int) -> int:
        """Return the place of a sample's choice among the choices."""
        if not self.at_random:
            return index % len(self.choices)
        digest = hashlib.sha256(f"{self.seed} {index}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % len(self.choices)

    def label(self, index: int) -> int | None:
        """Return a class number, or which prompt."""
        choice = self.choices[place := self.place(index)]
        return place if isinstance(choice, str) else choice

    @classmethod
    def of(cls, source: Source, config: SampleConfig) -> "Conditions":
        """Without labels all classes, without prompts those that a bundled model draws well."""
        sampler, asked = source.sampler, {"labels": config.labels, "prompt": config.prompt}
        choices, captions = sampler.task.choose(sampler.pipeline, asked, None, source.showcase)
        return cls(choices, captions, config.seed, config.random_labels)


def settings_of(source: Source, method: CacheMethod | None, config: SampleConfig, batch_size: int) -> Fields:
    """Return, as JSON, what makes two sets the same: what was asked for, the weights, the cache, the kind of device."""
    pipeline = source.sampler.pipeline
    asked = {name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE}
    digest = hashlib.sha256()
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for part in sorted(models, key=lambda name: (name not in FIRST_PARTS, name)):
        if part not in FIRST_PARTS:
            digest.update(part.encode())
        for name, tensor in sorted(models[part].state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    asked |= {
        "batch_size": batch_size,
        "model": digest.hexdigest(),
        "scheduler": [type(pipeline.scheduler).__name__, scheduler],
        "cache": None if method is None else repr(replace(method, spec="", made_for=None)),
        "device": pipeline.device.type,
    }
    return json.loads(to_json(asked))


# ----------------------------------------------------------------------------------------------------------------------
# Blocks


def block_path(folder: Path, number: int) -> Path:
    return folder / BLOCKS / f"block-{number:07d}"


def read_block(path: Path, settings: str) -> BlockInfo:
    """Return what a block says of itself; `OSError` or `ValueError` where it is not whole, or of other settings."""
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


@dataclass(frozen=True, kw_only=True)
class BlockMaker:
    """Makes blocks in one process, of which one is written while the next is made."""

    run: Runner
    conditions: Conditions
    config: SampleConfig
    folder: Path
    settings: str
    """SHA-256 of what makes the set"""
    batch_size: int
    num_samples: int
    is_cached: bool
    """whether a cache is on"""
    ratio: float
    """FLOPs of a step with ordinary guidance over those of one with the config's, for sets without a cache"""

    def make(self, number: int, writer: ThreadPoolExecutor) -> "Future[None]":
        """Make a block and begin to write it."""
        indices = range(number * self.batch_size, (number + 1) * self.batch_size)
        samples = self.sample(indices)[: self.num_samples - indices.start]
        broken = (~samples.isfinite()).flatten(1).any(dim=1).sum()
        levels = (samples.nan_to_num(0.0).movedim(-3, -1) * 255).round().clamp(0, 255).to(torch.uint8)
        pixels, counts = levels.contiguous().numpy(), Counts(self.run.num_inference_steps, 0, self.ratio)
        if self.is_cached:
            counts = counts_of(self.run.pipeline)
        info = BlockInfo(
            settings=self.settings,
            num_broken=int(broken),
            steps_full=int(counts.steps_full),
            steps_reused=int(counts.steps_reused),
            compute_ratio=counts.compute_ratio or 1.0,
        )
        return writer.submit(self.write, number, pixels, info)

    def sample(self, indices: Sequence[int]) -> Tensor:
        """Return the samples of some indices, also beyond the last: a batch is always of the same size."""
        conditions = [self.conditions.choices[self.conditions.place(index)] for index in indices]
        seeds = [seed_of(self.config.seed, index) for index in indices]
        options = guidance_options(self.config.guidance, self.config.guidance_shallow_units)
        return replace(self.run, conditions=conditions, seed=seeds)(**options).samples

    def write(self, number: int, pixels: np.ndarray, info: BlockInfo) -> None:
        with atomic_folder(block_path(self.folder, number), KIND, even_damaged=True) as draft:
            np.save(draft / "samples.npy", pixels)
            (draft / "block.json").write_text(to_json(info), encoding="utf-8")
            for place, sample in enumerate(pixels if self.config.png else ()):
                save_png(draft / png_name(number * self.batch_size + place), sample)


def png_name(index: int) -> str:
    return f"{index:07d}.png"


def save_png(path: Path, sample: np.ndarray) -> None:
    """Write a picture (h w 3), or a clip (f h w 3) as an animated PNG: without loss either way."""
    first, *others = [Image.fromarray(frame) for frame in (sample if sample.ndim == 4 else sample[None])]
    animation = {"save_all": True, "append_images": others, "duration": 1000 / CLIP_FPS, "loop": 0}
    first.save(path, **(animation if others else {}))
