"""The four tasks in training: which model a run builds, and how a batch reaches it.

Class-to-image and class-to-video are our DiT and Latte. Text-to-image and text-to-video are the classes of diffusers,
HunyuanDiT2DModel and LatteTransformer3DModel, conditioned on the sentence encoder of `skipdit.text`.
"""

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import HunyuanDiT2DModel, LatteTransformer3DModel, SchedulerMixin
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.utils.logging import disable_progress_bar, enable_progress_bar
from torch import Tensor, nn
from torch.utils.data import Dataset

from skipdit.clips import ClipConfig, LabelledClips, open_clips
from skipdit.data import DataConfig, LabelledPictures, open_pictures
from skipdit.diffusion import SCHEDULERS, Objective, make_scheduler
from skipdit.latents import LabelledLatents, LatentConfig, PlannedLatents, is_latents, open_latents
from skipdit.models.dit import DiT
from skipdit.models.forward_plan import PLAIN, ForwardPlan, Stored
from skipdit.models.inflate import inflate_latte, inflate_text_latte, init_hunyuan, init_latte_t2v, resize_grid
from skipdit.models.latte import Latte
from skipdit.models.long_skip import LongSkipConfig, LongSkipModel, PlannedOutput
from skipdit.models.surgery import add_long_skips, open_units
from skipdit.options import check_numbers, check_positive
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline
from skipdit.samplers import (
    LATENT_SCALE,
    ClassToImageSampler,
    ClassToVideoSampler,
    Sampler,
    TextToImageSampler,
    TextToVideoSampler,
    text_to_image_sampler,
    text_to_video_sampler,
)
from skipdit.text import MAX_PROMPT_TOKENS, WIDTH, PromptStates, check_text_installed, load_encoder
from skipdit.untrusted import printable_path

LOGGER = logging.getLogger(__name__)

Items = LabelledPictures | LabelledClips | LabelledLatents | PlannedLatents

FRESH = {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "patch_size": 8}  # of a new model


def open_items(config: DataConfig | ClipConfig | LatentConfig) -> Items:
    """The pictures, clips or latents that a config names."""
    if isinstance(config, LatentConfig):
        return open_latents(config)
    if is_latents(Path(config.source)):
        raise ValueError(f"{printable_path(config.source)} holds latents: give it to a recipe of latents")
    return open_clips(config) if isinstance(config, ClipConfig) else open_pictures(config)


def _check_pictures(items: Items, task: str) -> None:
    """Raise `ValueError` where a task that learns pictures is given clips."""
    if items.num_frames is not None:
        raise ValueError(f"a {task} model trains on pictures: give it a DataConfig, or latents of pictures")


def _num_frames(items: Items, task: str) -> int:
    """Return the frames of each clip; `ValueError` where a task that learns clips is given pictures."""
    if items.num_frames is None:
        raise ValueError(f"a {task} model trains on clips: give it a ClipConfig, or latents of clips")
    return items.num_frames


# ----------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class StoredItems(Dataset[tuple[Tensor, Any]]):
    """Items as they are stored, in bytes where they are pixels; with their class or, `numbered`, with their number."""

    items: Any
    numbered: bool

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        stored, label = self.items.stored(index)
        return stored, index if self.numbered else label


@dataclass(frozen=True)
class Trainee:
    """A model in training, and how a batch reaches it. Abstract.

    items: pictures or clips. data: what a step draws from, an item as it is stored and a number. num_variants: how many
    numbers, from the item's own number times this, stand for an item; a step draws one. null_label: the number that
    means "nothing said", which guidance needs.
    """

    model: nn.Module
    items: Any

    @property
    def data(self) -> Dataset[tuple[Tensor, Any]]:
        return StoredItems(self.items, numbered=False)

    @property
    def num_variants(self) -> int:
        return 1

    @property
    def null_label(self) -> int:
        raise NotImplementedError

    @property
    def vae(self) -> Any:
        """What decodes latents, beside the model; `None` for pixels."""
        vae: Any = self.items.vae
        return None if vae is None else vae.to(next(self.model.parameters()).device)

    @property
    def num_tokens(self) -> int:
        """Of a picture, or of each frame."""
        return (self.items.size // cast(Any, self.model).config.patch_size) ** 2

    def prepare(self, device: torch.device) -> None:
        """Compute what all steps need, which a first step would else compute, on the device where it stays."""

    @property
    def shares_tokens(self) -> bool:
        """Whether the samples of a batch must keep the same tokens."""
        return cast(LongSkipModel, self.model).shares_tokens

    def predict(
        self,
        model: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        labels: Tensor,
        *,
        plan: ForwardPlan = PLAIN,
        stored: Stored | None = None,
    ) -> Tensor:
        """The prediction for pixels (b c h w) or (b f c h w), by `model`, which is `self.model` or wraps it.

        plan, stored: of the model's forward.
        """
        output = self.call(model, noisy, timesteps, labels, plan=plan, stored=stored)
        return self.prediction(output.output.sample if isinstance(output, PlannedOutput) else output.sample)

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, labels: Tensor, **plan: Any) -> Any:
        """Call the model; plan: handed on to its forward."""
        raise NotImplementedError

    def prediction(self, sample: Tensor) -> Tensor:
        """What of a model's output the loss is computed of."""
        return sample

    def sampler(self, model: nn.Module, scheduler: SchedulerMixin) -> Sampler:
        """What samples the trained model."""
        raise NotImplementedError

    def showcase(self, count: int) -> tuple[list[Any], list[str]]:
        """What to ask for, spread over the classes, and captions."""
        chosen = _spread(len(self.items.label_names), count)
        return chosen, [self.items.label_names[label] for label in chosen]


def _spread(length: int, count: int) -> list[int]:
    return [index * length // count for index in range(count)]


def _label_names(items: Items) -> dict[str, str]:
    return {str(label): name for label, name in enumerate(items.label_names)}


def _with_long_skips(model: nn.Module, config: LongSkipConfig | None) -> nn.Module:
    own = cast(Any, model).config.get("long_skip")
    if own and config is not None and LongSkipConfig.from_dict(own) != config:
        LOGGER.warning("start_from has long skips of its own, which stay: model.long_skip has no effect")
    if config is not None and not own:
        add_long_skips(model, config)
    return model


def _refuse_other_grid(start: nn.Module, **sizes: int) -> None:
    """Raise `ValueError` where a model of diffusers was made for other sizes than those of the data."""
    for name, size in sizes.items():
        if (own := cast(Any, start).config[name]) != size:
            raise ValueError(f"start_from has {name} {own}, the data {size}: a {type(start).__name__} is not resized")


@dataclass(frozen=True)
class ClassToImage(Trainee):
    """A DiT on pictures with classes."""

    @property
    def null_label(self) -> int:
        return cast(DiT, self.model).null_class_label

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, labels: Tensor, **plan: Any) -> Any:
        return model(noisy, timesteps, class_labels=labels, **plan)

    def sampler(self, model: nn.Module, scheduler: SchedulerMixin) -> ClassToImageSampler:
        labels = _label_names(self.items)
        return ClassToImageSampler(ClassToImagePipeline(cast(DiT, model), scheduler, self.vae, labels))


@dataclass(frozen=True)
class ClassToVideo(Trainee):
    """A Latte on clips with classes, and on single pictures with theirs (joint training, arXiv 2401.03048, 3.3)."""

    @property
    def knows_classes(self) -> bool:
        return cast(Latte, self.model).config.num_classes is not None

    @property
    def null_label(self) -> int:
        return cast(Latte, self.model).null_class_label if self.knows_classes else 0

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, labels: Tensor, **plan: Any) -> Any:
        pictures: dict[str, Any] = {} if labels.ndim == 1 else {"num_images": labels.shape[1] - 1}
        if not self.knows_classes:
            return model(noisy, timesteps, **pictures, **plan)
        if labels.ndim == 1:
            return model(noisy, timesteps, class_labels=labels, **plan)
        pictures["image_class_labels"] = labels[:, 1:]
        return model(noisy, timesteps, class_labels=labels[:, 0], **pictures, **plan)

    def showcase(self, count: int) -> tuple[list[Any], list[str]]:
        return super().showcase(count) if self.knows_classes else ([None] * count, [""] * count)

    def sampler(self, model: nn.Module, scheduler: SchedulerMixin) -> ClassToVideoSampler:
        labels = _label_names(self.items) if self.knows_classes else None
        return ClassToVideoSampler(ClassToVideoPipeline(cast(Latte, model), scheduler, self.vae, labels))


@dataclass(frozen=True)
class Captioned(Trainee):
    """What both text tasks share: the states of every caption, stored or computed once; the last is that of the empty
    prompt. Abstract."""

    items: Items

    @property
    def data(self) -> StoredItems:
        return StoredItems(self.items, numbered=True)

    @property
    def num_variants(self) -> int:
        return len(self.items.captions[0])

    @property
    def null_label(self) -> int:
        return len(self.items) * self.num_variants

    def prepare(self, device: torch.device) -> None:
        self.states_on(device)

    def states_on(self, device: torch.device) -> PromptStates:
        """Return the states in float32 on a device, where they stay."""
        if device not in self._states_on:
            self._states_on[device] = self.states.to(device, torch.float32)
        return self._states_on[device]

    @cached_property
    def _states_on(self) -> dict[torch.device, PromptStates]:
        return {}

    @cached_property
    def states(self) -> PromptStates:
        if (stored := self.items.states) is not None:
            if stored.tokens.shape[1:] != (MAX_PROMPT_TOKENS, WIDTH):
                raise ValueError(f"states of captions must be {MAX_PROMPT_TOKENS} x {WIDTH}: encode them anew")
            return stored
        captions = [caption for variants in self.items.captions for caption in variants]
        encoder = load_encoder()
        try:
            return encoder.encode([*captions, ""], MAX_PROMPT_TOKENS)
        except ValueError as error:
            too_long = [i for i, length in enumerate(encoder.count_tokens(captions)) if length > MAX_PROMPT_TOKENS]
            if not too_long:
                raise
            first = self.items.names(too_long[0] // self.num_variants)
            what = f"{len(too_long)} of {len(captions)} captions are too long, the first is that of {first}"
            raise ValueError(f"{error}: {what}") from error

    def showcase(self, count: int) -> tuple[list[str], list[str]]:
        chosen = [self.items.captions[index][0] for index in _spread(len(self.items), count)]
        return chosen, chosen


@dataclass(frozen=True)
class TextToImage(Captioned):
    """A HunyuanDiT on pictures with captions."""

    def prepare(self, device: torch.device) -> None:
        super().prepare(device)
        self.rotary_on(device)

    def rotary_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of the rotary embedding on a device, where they stay."""
        if device not in self._rotary_on:
            own = cast(Any, self.model)
            grid = own.config.sample_size // own.config.patch_size
            base = 512 // LATENT_SCALE // own.config.patch_size  # as HunyuanDiTPipeline does for a square picture
            corners, size = ((0, 0), (base, base)), own.inner_dim // own.num_heads
            rotary = get_2d_rotary_pos_embed(size, corners, (grid, grid), device=device, output_type="pt")
            self._rotary_on[device] = cast(tuple[Tensor, Tensor], rotary)
        return self._rotary_on[device]

    @cached_property
    def _rotary_on(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, labels: Tensor, **plan: Any) -> Any:
        states = self.states_on(noisy.device)[labels]
        return model(
            noisy,
            timesteps.to(noisy.dtype),
            encoder_hidden_states=states.pooled[:, None],
            text_embedding_mask=torch.ones_like(states.mask[:, :1]),
            encoder_hidden_states_t5=states.tokens,
            text_embedding_mask_t5=states.mask,
            image_rotary_emb=self.rotary_on(noisy.device),
            **plan,
        )

    def prediction(self, sample: Tensor) -> Tensor:
        return sample.chunk(2, dim=1)[0]  # the pipeline drops the learned variance

    def sampler(self, model: nn.Module, scheduler: SchedulerMixin) -> TextToImageSampler:
        return text_to_image_sampler(cast(Any, model), scheduler, self.vae)


@dataclass(frozen=True)
class TextToVideo(Captioned):
    """diffusers' Latte on clips with captions."""

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, labels: Tensor, **plan: Any) -> Any:
        states = self.states_on(noisy.device)[labels]
        return model(noisy.transpose(1, 2), timestep=timesteps, encoder_hidden_states=states.tokens, **plan)

    def prediction(self, sample: Tensor) -> Tensor:
        return sample.transpose(1, 2).chunk(2, dim=2)[0]  # the pipeline drops the learned variance

    def sampler(self, model: nn.Module, scheduler: SchedulerMixin) -> TextToVideoSampler:
        return text_to_video_sampler(cast(Any, model), scheduler, self.vae)


# ----------------------------------------------------------------------------------------------------------------------
# What a run builds


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all four models have. Abstract: `build` gives a fresh model, or `start`, with the long skips that the config
    asks for where it has none.

    A size that is `None` is that of `start`, or a default where there is none; one that is given must be that of
    `start`.
    """

    num_layers: int | None = None
    """blocks (12 in a fresh model); for class-to-video two are a pair of space and time, for text-to-video one is"""
    num_attention_heads: int | None = None
    """of each block (6 in a fresh model)"""
    attention_head_dim: int | None = None
    """width of a head (64 in a fresh model)"""
    patch_size: int | None = None
    """side in pixels of the square that becomes a token (8 in a fresh model)"""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_positive(self, *FRESH)

    def fresh(self) -> dict[str, Any]:
        """Return the sizes of a fresh model."""
        return {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in FRESH.items()
        }

    def check_start(self, start: nn.Module, model_class: type[nn.Module], items: Items) -> None:
        """Raise `ValueError` where the model to go on from is of another class, of other channels than the data, of
        other sizes than are asked for, or knows too few classes."""
        config = cast(Any, start).config
        if not isinstance(start, model_class) or config.in_channels != items.num_channels:
            wanted = f"a {model_class.__name__} of {items.num_channels} channels"
            raise ValueError(f"start_from must be {wanted}, got a {type(start).__name__} of {config.in_channels}")
        if (config.get("num_classes") or math.inf) < len(items.label_names):
            raise ValueError(f"start_from knows {config.num_classes} classes, the data has {len(items.label_names)}")
        others = {name: config.get(name) for name in ("mlp_ratio", "qk_norm")}
        own = {**{name: config[name] for name in FRESH}, **others, "inflate": None}
        asked = {name: value for name in own if (value := getattr(self, name, None)) is not None}
        if wrong := [f"{name} {own[name]}, not {value}" for name, value in asked.items() if value != own[name]]:
            raise ValueError(f"start_from has {', '.join(wrong)}: give model.{wrong[0].split()[0]} that value or None")

    def build(self, items: Items, objective: Objective, start: nn.Module | None = None) -> Trainee:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Sizes):
    """The sizes of a DiT; classes and pixels come from the data."""

    long_skip: LongSkipConfig | None = field(default_factory=LongSkipConfig)
    qk_norm: bool | None = None
    """norms of the queries and keys of each head (none in a fresh model), which keep attention stable at high rates"""

    def build(self, items: Items, objective: Objective, start: nn.Module | None = None) -> Trainee:
        _check_pictures(items, "class-to-image")
        if start is not None:
            self.check_start(start, DiT, items)
            resize_grid(cast(DiT, start), sample_size=items.size)
        else:
            start = DiT(
                sample_size=items.size,
                in_channels=items.num_channels,
                out_channels=items.num_channels * (2 if objective.learned_variance else 1),
                **self.fresh(),
                num_classes=len(items.label_names),
                qk_norm=bool(self.qk_norm),
                long_skip=self.long_skip,
            )
        return ClassToImage(_with_long_skips(start, self.long_skip), items)


@dataclass(frozen=True, kw_only=True)
class VideoModelConfig(Sizes):
    """The sizes of a Latte; classes, frames and pixels come from the data."""

    long_skip: LongSkipConfig | None = field(default_factory=LongSkipConfig)
    qk_norm: bool | None = None
    """norms of the queries and keys of each head (none in a fresh model), which keep attention stable at high rates"""
    inflate: str | None = None
    """start from the spatial weights of this class-to-image model, `emoji` or the folder of a pipeline: of its
    outermost blocks as many as there are pairs; blocks over time start as the identity, so at first each frame is a
    picture of its own"""
    conditional: bool = True
    """know the classes; without, the model draws clips like any of the data"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inflate is not None and not self.conditional:
            raise ValueError("inflate needs a conditional model: a picture model knows classes")

    def build(self, items: Items, objective: Objective, start: nn.Module | None = None) -> Trainee:
        num_frames = _num_frames(items, "class-to-video")
        if start is not None:
            self.check_start(start, Latte, items)
            resize_grid(cast(Latte, start), sample_size=items.size, num_frames=num_frames)
        else:
            start = Latte(
                sample_size=items.size,
                num_frames=num_frames,
                in_channels=items.num_channels,
                out_channels=items.num_channels * (2 if objective.learned_variance else 1),
                **self.fresh(),
                num_classes=len(items.label_names) if self.conditional else None,
                qk_norm=bool(self.qk_norm),
                long_skip=self.long_skip,
            )
            if self.inflate is not None:
                pictures = load_pictures_pipeline(self.inflate)
                labels = pictures.labels
                rows = {row: labels[name] for row, name in enumerate(items.label_names) if name in labels}
                inflate_latte(start, pictures.transformer, rows)
        return ClassToVideo(_with_long_skips(start, self.long_skip), items)


@dataclass(frozen=True, kw_only=True)
class TextToImageModelConfig(Sizes):
    """The sizes of a HunyuanDiT, which has long skips of its own: all pairs but the two middle blocks."""

    mlp_ratio: float | None = None
    """hidden size of the MLP over that of the block (4 in a fresh model)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_ratio is not None and self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be above 0, got {self.mlp_ratio}")

    def build(self, items: Items, objective: Objective, start: nn.Module | None = None) -> Trainee:
        _check_pictures(items, "text-to-image")
        check_text_installed()
        if start is not None:
            self.check_start(start, HunyuanDiT2DModel, items)
            _refuse_other_grid(start, sample_size=items.size)
        else:
            sizes = self.fresh()
            start = HunyuanDiT2DModel(
                **sizes,
                in_channels=items.num_channels,
                sample_size=items.size,
                hidden_size=sizes["num_attention_heads"] * sizes["attention_head_dim"],
                mlp_ratio=4.0 if self.mlp_ratio is None else self.mlp_ratio,
                cross_attention_dim=WIDTH,
                cross_attention_dim_t5=WIDTH,
                pooled_projection_dim=WIDTH,
                text_len=1,
                text_len_t5=MAX_PROMPT_TOKENS,
                use_style_cond_and_image_meta_size=False,
            )
            init_hunyuan(start)
        open_units(start)
        return TextToImage(start, items)


@dataclass(frozen=True, kw_only=True)
class TextToVideoModelConfig(Sizes):
    """The sizes of diffusers' LatteTransformer3DModel with long skips."""

    long_skip: LongSkipConfig | None = field(default_factory=LongSkipConfig)
    inflate: str | None = None
    """start from the weights of this class-to-image model, as for class-to-video; text and time start unheard"""

    def build(self, items: Items, objective: Objective, start: nn.Module | None = None) -> Trainee:
        num_frames = _num_frames(items, "text-to-video")
        if items.num_pictures:
            raise ValueError(f"a text-to-video model trains without num_pictures, got {items.num_pictures}")
        check_text_installed()
        if start is not None:
            self.check_start(start, LatteTransformer3DModel, items)
            _refuse_other_grid(start, sample_size=items.size, video_length=num_frames)
        else:
            sizes = self.fresh()
            start = LatteTransformer3DModel(
                **sizes,
                in_channels=items.num_channels,
                out_channels=2 * items.num_channels,
                cross_attention_dim=sizes["num_attention_heads"] * sizes["attention_head_dim"],
                attention_bias=True,
                sample_size=items.size,
                activation_fn="gelu-approximate",
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                norm_eps=1e-6,
                caption_channels=WIDTH,
                video_length=num_frames,
            )
            init_latte_t2v(start)
            _with_long_skips(start, self.long_skip)
            if self.inflate is not None:
                inflate_text_latte(start, load_pictures_pipeline(self.inflate).transformer)
        open_units(start)
        return TextToVideo(_with_long_skips(start, self.long_skip), items)


def load_pictures_pipeline(name: str) -> ClassToImagePipeline:
    """The bundled class-to-image pipeline (`emoji`) or that of a folder."""
    asset = files("skipdit") / "assets" / "class_to_image"
    disable_progress_bar()
    try:
        with as_file(asset) if name == "emoji" else nullcontext(Path(name)) as folder:
            if not (folder / "model_index.json").is_file():
                raise FileNotFoundError(f"no pipeline at {name}: give emoji or the folder of a class-to-image pipeline")
            return ClassToImagePipeline.from_pretrained(folder)
    finally:
        enable_progress_bar()


def make_task_scheduler(objective: Objective) -> SchedulerMixin:
    """The first scheduler of the objective's process."""
    return make_scheduler(objective, SCHEDULERS[objective.process][0])
