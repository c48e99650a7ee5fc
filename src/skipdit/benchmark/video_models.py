"""The video models of the benchmark: with all, a few and no long skips; they share all other weights.

Class-to-video is our Latte, text-to-video diffusers' LatteTransformer3DModel, whose units are opened by class swap.
"""

import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers import LatteTransformer3DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention as DiffusersAttention
from torch import nn

from skipdit.benchmark.config import TEXT_HEAD_SIZE, TEXT_PATCH_SIZE
from skipdit.benchmark.config import Size as Size
from skipdit.benchmark.config import VideoBenchConfig as VideoBenchConfig
from skipdit.benchmark.config import VideoTask as VideoTask
from skipdit.benchmark.measure import Kind, Subject, fill_zeros
from skipdit.checkpoints.latte_t2v import FIXED_OPTIONS
from skipdit.interfaces import Transformer
from skipdit.models.dit import MLP, Attention
from skipdit.models.latte import Latte
from skipdit.models.long_skip import LongSkipConfig, pair_units
from skipdit.models.modules import modules_of
from skipdit.models.surgery import add_long_skips, open_units

VideoKind = Kind | Literal["opened", "plain again"]

CAPTION_CHANNELS, CAPTION_TOKENS = 4096, 120  # of T5-XXL, as in the released model
NUM_CLASSES = 101  # UCF-101
OUTPUT_CLASSES = (Attention, MLP, DiffusersAttention, FeedForward)


@dataclass(frozen=True)
class VideoStep:
    """A call that is timed: a forward of the plain model (twice, to see the noise, if its units are opened too), of the
    model with opened units or of the uncached long-skip model, or a step of the cached model."""

    model: str
    num_pairs: int
    kind: VideoKind
    num_shallow_units: int | None = None

    def __str__(self) -> str:
        k = f" k={self.num_shallow_units}" if self.num_shallow_units else ""
        pairs = f" {self.num_pairs} pairs" if self.num_pairs else ""
        return f"{self.model}{pairs} {self.kind}{k}"


# ----------------------------------------------------------------------------------------------------------------------
# Models


def make_plain(config: VideoBenchConfig, size: Size) -> Subject:
    """Return the plain model of a size with random weights, and inputs for it."""
    torch.manual_seed(config.seed)
    sides = (config.sample_size, config.sample_size)
    if not size.is_swapped:
        model = Latte.from_preset(
            size.name, sample_size=config.sample_size, num_frames=size.num_frames, num_classes=NUM_CLASSES
        )
        latents = torch.randn(config.batch_size, size.num_frames, 4, *sides)
        conditioning = {"class_labels": torch.randint(NUM_CLASSES, (config.batch_size,))}
    else:
        model = LatteTransformer3DModel(  # as released (maxin-cn/Latte-1), except for the size
            **FIXED_OPTIONS,
            num_attention_heads=config.text_num_heads,
            attention_head_dim=TEXT_HEAD_SIZE,
            in_channels=4,
            out_channels=8,
            num_layers=size.num_units,
            cross_attention_dim=config.text_num_heads * TEXT_HEAD_SIZE,
            sample_size=config.sample_size,
            patch_size=TEXT_PATCH_SIZE,
            caption_channels=CAPTION_CHANNELS,
            video_length=size.num_frames,
        )
        latents = torch.randn(config.batch_size, 4, size.num_frames, *sides)
        conditioning = {"encoder_hidden_states": torch.randn(config.batch_size, CAPTION_TOKENS, CAPTION_CHANNELS)}
    fill_zeros(model)
    dtype = getattr(torch, config.dtype)
    nn.Module.to(model.eval(), config.device, dtype)  # diffusers' own warns at every cast
    arguments = {
        name: tensor.to(config.device, dtype if tensor.is_floating_point() else None)
        for name, tensor in ({"hidden_states": latents} | conditioning).items()
    }
    return Subject(model, arguments)


def shared_copy(subject: Subject) -> Subject:
    """Return a copy of the model that shares its weights, with the same inputs."""
    memo = {id(weight): weight for weight in subject.model.parameters()}
    return replace(subject, model=copy.deepcopy(subject.model, memo))


def make_subjects(config: VideoBenchConfig, size: Size) -> list[tuple[VideoStep, Subject]]:
    """Return the models of one size, each with its uncached forward."""
    plain = make_plain(config, size)
    subjects = [(VideoStep(size.name, 0, "plain"), plain)]
    if size.is_swapped:
        opened = shared_copy(plain)
        open_units(opened.model)
        subjects += [(VideoStep(size.name, 0, "opened"), opened), (VideoStep(size.name, 0, "plain again"), plain)]
    for num_pairs in config.num_pairs:
        linked, long_skip = shared_copy(plain), LongSkipConfig(num_pairs=num_pairs)
        add_long_skips(linked.model, long_skip)
        fill_zeros(linked.model)
        subjects.append((VideoStep(size.name, len(pair_units(size.num_units, long_skip)), "uncached"), linked))
    return subjects


def num_outputs(model: nn.Module) -> int:
    """Return the number of attentions and MLPs in the blocks; the output of each has the shape of the hidden states."""
    return sum(len(modules_of(model, kind)) for kind in OUTPUT_CLASSES)


def feature_bytes(config: VideoBenchConfig, size: Size, model: Transformer) -> int:
    """Return the bytes of the hidden states between two units."""
    hidden_size = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    num_tokens = config.batch_size * size.num_frames * (config.sample_size // size.patch_size) ** 2
    return num_tokens * hidden_size * getattr(torch, config.dtype).itemsize
