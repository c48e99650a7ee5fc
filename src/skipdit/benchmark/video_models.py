"""Which video models are measured: with all, a few and no long skips, which share all other weights.

Class-to-video is our Latte, text-to-video diffusers' LatteTransformer3DModel, whose units are opened by class swap.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from diffusers import LatteTransformer3DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention as DiffusersAttention
from torch import nn

from skipdit.benchmark.measure import BenchConfig, DType, Kind, Subject, fill_zeros
from skipdit.environment import Device
from skipdit.models.dit import MLP, Attention
from skipdit.models.latte import LATTE_PRESETS, Latte
from skipdit.models.long_skip import LongSkipConfig, LongSkipLinks, pair_units
from skipdit.models.surgery import add_long_skips, open_units
from skipdit.options import check_choice, check_per_item, check_range

Task = Literal["class-to-video", "text-to-video"]
VideoKind = Kind | Literal["opened", "plain again"]

NUM_FRAMES: dict[Device, dict[str, int]] = {  # by the size in a preset's name
    "cpu": {"S": 16, "B": 8, "L": 4, "XL": 3},
    "cuda": {"S": 16, "B": 16, "L": 16, "XL": 16},
}
TEXT_MODEL, TEXT_HEAD_SIZE, TEXT_PATCH_SIZE = "LatteTransformer3DModel", 64, 2
CAPTION_CHANNELS, CAPTION_TOKENS = 4096, 120  # T5-XXL, as the released model has it
NUM_CLASSES = 101  # UCF-101
OUTPUT_CLASSES = (Attention, MLP, DiffusersAttention, FeedForward)


@dataclass(frozen=True)
class Size:
    """One model that is measured. A unit is a spatial and a temporal block."""

    task: Task
    name: str
    num_units: int
    num_frames: int
    patch_size: int
    is_swapped: bool = False
    """whether its units are opened by class swap, as those of a class of diffusers"""


@dataclass(frozen=True, kw_only=True)
class VideoBenchConfig(BenchConfig):
    """Which video models are measured, and how often."""

    tasks: tuple[Task, ...] = get_args(Task)
    """class-to-video: our Latte; text-to-video: diffusers' LatteTransformer3DModel"""
    presets: tuple[str, ...] = ("Latte-S/2", "Latte-XL/2")
    """published sizes of Latte"""
    num_frames: tuple[int, ...] = ()
    """one per preset; by default 16 for S, 8 for B, 4 for L, 3 for XL on a CPU, and 16 on a GPU"""
    text_num_heads: int = 6
    """of 64 channels each; the released text-to-video model is wider"""
    text_num_units: int = 28
    """of the text-to-video model; 28 as released"""
    text_num_frames: int = 4
    """of the text-to-video model"""
    sample_size: int = 32
    """side of the latents; 32 for videos of 256 pixels"""
    batch_size: int = 1
    """clips per call"""
    num_pairs: tuple[int | None, ...] = (None, 2)
    """how many of the outermost pairs are linked; None for all"""
    num_shallow_units: tuple[int, ...] = (1, 2)
    """units at each end that a reuse step runs"""
    dtype: DType = "float32"
    """of weights and inputs"""
    num_repetitions: int = 5
    """of each step, in turn"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("presets", self.presets, tuple(LATTE_PRESETS))
        check_per_item("num_frames", self.num_frames, len(self.presets))
        check_range(self, "text_num_heads", "text_num_units", "text_num_frames", "sample_size", "batch_size")
        check_range(self, "num_repetitions")
        if not self.num_shallow_units or len(set(self.num_shallow_units)) < len(self.num_shallow_units):
            raise ValueError(f"num_shallow_units must be one or more, each once, got {self.num_shallow_units}")
        for size in self.sizes():
            if self.sample_size % size.patch_size:
                raise ValueError(f"sample_size must be divisible by {size.patch_size}, got {self.sample_size}")
            links = [
                LongSkipLinks(size.num_units, pair_units(size.num_units, LongSkipConfig(num_pairs=num_pairs)))
                for num_pairs in self.num_pairs
            ]
            counts = {len(each.sources) for each in links}
            if not links or 0 in counts or len(counts) < len(links):
                raise ValueError(
                    f"num_pairs must be one or more numbers from 1 to {size.num_units // 2}, or None for all, "
                    f"each once, for the {size.num_units} units of {size.name}, got {self.num_pairs}"
                )
            for each in links:
                for k in self.num_shallow_units:
                    each.check_num_shallow_units(k)

    def sizes(self) -> list[Size]:
        """Return the models, in the order they are measured."""
        sizes = []
        defaults = [NUM_FRAMES[self.device][name.removeprefix("Latte-").partition("/")[0]] for name in self.presets]
        for name, num_frames in zip(self.presets, self.num_frames or defaults, strict=True):
            num_layers, *_, patch_size = LATTE_PRESETS[name]
            sizes.append(Size("class-to-video", name, num_layers // 2, num_frames, patch_size))
        num_units, num_frames = self.text_num_units, self.text_num_frames
        sizes.append(Size("text-to-video", TEXT_MODEL, num_units, num_frames, TEXT_PATCH_SIZE, is_swapped=True))
        return [size for size in sizes if size.task in self.tasks]


@dataclass(frozen=True)
class VideoStep:
    """What is timed: a forward of the plain model (twice where its units are opened too, for the noise), of the one
    with opened units and of the uncached long-skip model, or a step of the cached one."""

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
        model = LatteTransformer3DModel(  # as released (maxin-cn/Latte-1), but for the size
            num_attention_heads=config.text_num_heads,
            attention_head_dim=TEXT_HEAD_SIZE,
            in_channels=4,
            out_channels=8,
            num_layers=size.num_units,
            cross_attention_dim=config.text_num_heads * TEXT_HEAD_SIZE,
            attention_bias=True,
            sample_size=config.sample_size,
            patch_size=TEXT_PATCH_SIZE,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
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
    """Return a copy of the model with the very same weights, for the same inputs."""
    memo = {id(weight): weight for weight in subject.model.parameters()}
    return replace(subject, model=copy.deepcopy(subject.model, memo))


def make_subjects(config: VideoBenchConfig, size: Size) -> list[tuple[VideoStep, Subject]]:
    """Return the models of one size, and what their uncached forward is called."""
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
    """Return how many attentions and MLPs the blocks have; the output of each is a tensor like the hidden states."""
    return sum(isinstance(module, OUTPUT_CLASSES) for module in model.modules())


def feature_bytes(config: VideoBenchConfig, size: Size, model: Any) -> int:
    """Return the bytes of the hidden states between two units."""
    hidden_size = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    num_tokens = config.batch_size * size.num_frames * (config.sample_size // size.patch_size) ** 2
    return num_tokens * hidden_size * getattr(torch, config.dtype).itemsize
