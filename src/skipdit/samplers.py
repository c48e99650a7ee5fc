"""How a pipeline of each of the four tasks makes pictures or clips from what a person asks for.

Class-to-image and class-to-video have pipelines of ours. Text-to-image and text-to-video are sampled by diffusers' own,
in pixels, with the states of `skipdit.text` in the place of their text encoders.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers import HunyuanDiT2DModel, LatteTransformer3DModel, SchedulerMixin
from torch import Tensor, nn

from skipdit.guidance import ShallowGuidance
from skipdit.models.forward_plan import ForwardPlan
from skipdit.models.long_skip import LongSkipModel
from skipdit.models.shallow_path import Guidance, guidance_plan
from skipdit.models.surgery import close_units, open_units
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline, decode_latents
from skipdit.text import MAX_PROMPT_TOKENS, check_text_installed, load_encoder, quiet

if TYPE_CHECKING:
    from diffusers import HunyuanDiTPipeline, LattePipeline

# diffusers' text pipelines count sizes in pixels of an autoencoder that is eight times finer than its latents
LATENT_SCALE = 8


@dataclass(frozen=True)
class Sampler:
    """Makes pictures or clips from what a person asks for: class names or prompts. Abstract.

    pipeline: a diffusers pipeline.
    """

    task: ClassVar[str]
    pipeline: Any

    @property
    def picture_size(self) -> int:
        """Pixels a side of what it makes."""
        vae = self.pipeline.vae
        scale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        return self.pipeline.transformer.config.sample_size * scale

    def sample(
        self,
        wanted: Sequence[Any],
        *,
        guidance_scale: float,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator],
        guidance_channels: int | None = None,
        guidance: Guidance = "full",
        guidance_shallow_units: int | None = None,
    ) -> Tensor:
        """Pictures (b c h w) or clips (b f c h w) in [0, 1], one for each of `wanted`: class numbers or prompts.

        generator: one, or a list with one for each. guidance, guidance_shallow_units: as of `ClassToImagePipeline`.
        """
        raise NotImplementedError

    def save(self, folder: Path, max_shard_size: str) -> None:
        """Writes the parts that there are; of diffusers' text pipelines its own saving complains of those that are
        not."""
        self.pipeline.save_config(folder)
        self.pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
        self.pipeline.scheduler.save_pretrained(folder / "scheduler")
        if self.pipeline.vae is not None:
            self.pipeline.vae.save_pretrained(folder / "vae")


@dataclass(frozen=True)
class ClassToImageSampler(Sampler):
    task: ClassVar[str] = "class-to-image"
    pipeline: ClassToImagePipeline

    def sample(self, wanted: Sequence[int], **options: Any) -> Tensor:
        return self.pipeline(wanted, output_type="pt", **options).images.float()


@dataclass(frozen=True)
class ClassToVideoSampler(Sampler):
    task: ClassVar[str] = "class-to-video"
    pipeline: ClassToVideoPipeline

    def sample(self, wanted: Sequence[int] | Sequence[None], **options: Any) -> Tensor:
        labels = [label for label in wanted if label is not None] or None  # None for each: the unconditional model
        return self.pipeline(labels, num_videos=len(wanted), output_type="pt", **options).frames.float()


def _pixels(sample: Tensor) -> Tensor:
    return (sample / 2 + 0.5).clamp(0, 1)


def refuse_guidance_channels(guidance_channels: int | None) -> None:
    """Only our own pipelines guide some channels alone."""
    if guidance_channels is not None:
        raise ValueError(f"guidance_channels is for class-conditional models, got {guidance_channels}")


class SplitGuidance(nn.Module):
    """Stands in a pipeline of diffusers for its transformer, each batch of which is an unconditional and a conditional
    half: calls it for one and the other, and under a plan for the first. In all else it is the transformer."""

    def __init__(self, model: nn.Module, plan: ForwardPlan) -> None:
        super().__init__()
        self.model, self.shallow = model, ShallowGuidance(model, plan)
        self.known: dict[int | str, tuple[Any, tuple[Any, Any]]] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return what the transformer does with `return_dict=False`."""
        num_rows = (args[0] if args else kwargs["hidden_states"]).shape[0]
        given = {name: self._halves(name, value, num_rows) for name, value in (*enumerate(args), *kwargs.items())}
        first, second = ({name: halves[index] for name, halves in given.items()} for index in range(2))
        (conditional,) = _call(self.model, second)
        conditional, unconditional = _call(partial(self.shallow, conditional), first)
        return (torch.cat([unconditional, conditional]),)

    def _halves(self, name: int | str, value: Any, num_rows: int) -> tuple[Any, Any]:
        """Return what each call is given of an argument: of one that stays the same object at every step, the very same
        halves, by which a cache knows its stream."""
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != num_rows:
            return value, value
        if name not in self.known or self.known[name][0] is not value:
            first, second = value.chunk(2)
            # half of a batch of timesteps is copied, for a cache would take it for an entry of a scheduler's list; one
            # timestep that is expanded over the rows is such an entry
            owned = (first.clone(), second.clone()) if value.stride(0) else (first, second)
            self.known[name] = value, owned
        return self.known[name][1]


def _call(function: Callable[..., Any], given: dict[int | str, Any]) -> Any:
    args = [value for name, value in given.items() if isinstance(name, int)]
    return function(*args, **{name: value for name, value in given.items() if isinstance(name, str)})


@dataclass(frozen=True)
class TextSampler(Sampler):
    """What both text samplers share. Abstract."""

    @contextmanager
    def _guided_by(self, guidance: Guidance, num_shallow_units: int | None, guidance_scale: float) -> Iterator[Any]:
        """Yield the pipeline, or a copy that shares all of its parts and splits its guidance."""
        pipeline: Any = self.pipeline
        model, is_open = pipeline.transformer, isinstance(pipeline.transformer, LongSkipModel)
        is_opened_here = guidance != "full" and not is_open
        if is_opened_here:
            open_units(model)
        try:
            plan = guidance_plan(model, guidance, num_shallow_units, guidance_scale)
            if plan is not None:
                pipeline = copy.copy(pipeline)
                pipeline.register_modules(transformer=SplitGuidance(model, plan))
            yield pipeline
        finally:
            if is_opened_here:
                close_units(model)


@dataclass(frozen=True)
class TextToImageSampler(TextSampler):
    """The pooled sentence takes the place of HunyuanDiT's CLIP tokens, the token states that of its T5 tokens."""

    task: ClassVar[str] = "text-to-image"
    pipeline: "HunyuanDiTPipeline"

    def sample(
        self,
        wanted: Sequence[str],
        *,
        guidance_scale: float,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator],
        guidance_channels: int | None = None,
        guidance: Guidance = "full",
        guidance_shallow_units: int | None = None,
    ) -> Tensor:
        refuse_guidance_channels(guidance_channels)
        model: Any = self.pipeline.transformer
        states = load_encoder().encode([*wanted, ""], model.config.text_len_t5).to(model.device, model.dtype)
        prompts = states[torch.arange(len(wanted))]
        nothing = states[torch.full((len(wanted),), len(wanted))]
        size = model.config.sample_size * LATENT_SCALE
        with self._guided_by(guidance, guidance_shallow_units, guidance_scale) as pipeline:
            output = pipeline(
                prompt_embeds=prompts.pooled[:, None],
                prompt_embeds_2=prompts.tokens,
                prompt_attention_mask=torch.ones_like(prompts.mask[:, :1]),
                prompt_attention_mask_2=prompts.mask,
                negative_prompt_embeds=nothing.pooled[:, None],
                negative_prompt_embeds_2=nothing.tokens,
                negative_prompt_attention_mask=torch.ones_like(nothing.mask[:, :1]),
                negative_prompt_attention_mask_2=nothing.mask,
                height=size,
                width=size,
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                generator=generator,
                use_resolution_binning=False,
                output_type="latent",
            )
        return _pixels(decode_latents(pipeline.vae, output.images))


@dataclass(frozen=True)
class TextToVideoSampler(TextSampler):
    task: ClassVar[str] = "text-to-video"
    pipeline: "LattePipeline"

    def sample(
        self,
        wanted: Sequence[str],
        *,
        guidance_scale: float,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator],
        guidance_channels: int | None = None,
        guidance: Guidance = "full",
        guidance_shallow_units: int | None = None,
    ) -> Tensor:
        refuse_guidance_channels(guidance_channels)
        model: Any = self.pipeline.transformer
        states = load_encoder().encode([*wanted, ""], MAX_PROMPT_TOKENS).to(model.device, model.dtype)
        size = model.config.sample_size * LATENT_SCALE
        with self._guided_by(guidance, guidance_shallow_units, guidance_scale) as pipeline:
            output = pipeline(
                prompt_embeds=states.tokens[:-1],
                negative_prompt=None,
                negative_prompt_embeds=states.tokens[-1:].expand(len(wanted), -1, -1),
                video_length=model.config.video_length,
                height=size,
                width=size,
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                generator=generator,
                output_type="latent",
            )
        clips = output.frames.transpose(1, 2)
        return torch.stack([_pixels(decode_latents(pipeline.vae, clip, len(clip))) for clip in clips])


def text_to_image_sampler(
    transformer: HunyuanDiT2DModel, scheduler: SchedulerMixin, vae: Any = None
) -> TextToImageSampler:
    """diffusers' pipeline around a transformer that knows `skipdit.text`; `ValueError` without that extra."""
    check_text_installed()
    with quiet():
        from diffusers import HunyuanDiTPipeline
    pipeline = HunyuanDiTPipeline(
        vae=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        transformer=transformer,
        scheduler=cast(Any, scheduler),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.register_modules(vae=vae)  # not before: its scale would be counted in, see `LATENT_SCALE`
    return TextToImageSampler(pipeline)


def text_to_video_sampler(
    transformer: LatteTransformer3DModel, scheduler: SchedulerMixin, vae: Any = None
) -> TextToVideoSampler:
    """diffusers' pipeline around a transformer that knows `skipdit.text`; `ValueError` without that extra."""
    check_text_installed()
    with quiet():
        from diffusers import LattePipeline
    pipeline = LattePipeline(
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        vae=None,  # pyright: ignore[reportArgumentType]
        transformer=transformer,
        scheduler=cast(Any, scheduler),
    )
    pipeline.register_modules(vae=vae)  # as above
    return TextToVideoSampler(pipeline)
