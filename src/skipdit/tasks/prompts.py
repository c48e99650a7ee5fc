"""Shared code of the text-conditional tasks: pipelines of diffusers for pixels or latents, whose transformers take the
states of prompts from the sentence encoder of `skipdit.text`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from skipdit.data.pictures import Draws
from skipdit.files.untrusted import printable
from skipdit.interfaces import VAE, Fields, Pipeline, Scheduler, Transformer
from skipdit.pipelines import SamplingOptions
from skipdit.tasks.split_guidance import split_guidance
from skipdit.tasks.task import Chosen, LabelNames, Sampler, Task, choose_prompts, spread
from skipdit.tasks.training import StoredItems, TrainingTask, draw_dropped
from skipdit.text import MAX_PROMPT_TOKENS, WIDTH, PromptStates, check_text_installed, load_encoder, quiet

# diffusers' text pipelines take sizes in pixels, for an autoencoder that downsamples by eight
LATENT_SCALE = 8


class PromptTask(Task):
    """A text-conditional task. Abstract."""

    option = "prompt"
    has_own_pipeline = False
    absent_parts: ClassVar[Fields]
    """arguments of the pipeline's class in place of parts that it does without"""
    width_option: ClassVar[str]
    """name of the text encoder's width in the configs of its transformers"""

    def choose_from(
        self, pipeline: Pipeline, values: Sequence[str], count: int | None, showcase: Sequence[str]
    ) -> Chosen:
        return choose_prompts(values or showcase, count, f"{self.name} model")

    def check_installed(self) -> None:
        check_text_installed()

    def sampler(
        self, transformer: Transformer, scheduler: Scheduler, vae: VAE = None, names: LabelNames = None
    ) -> Sampler:
        self.check_installed()
        with quiet():
            pipeline_class = getattr(diffusers, self.pipeline_name)
        pipeline = pipeline_class(vae=None, transformer=transformer, scheduler=scheduler, **self.absent_parts)
        pipeline.register_modules(vae=vae)  # only now, so that its downsampling does not count: see `LATENT_SCALE`
        return Sampler(self, pipeline)

    def read_label_names(self, folder: Path, transformer: Transformer, index: Fields) -> None:
        """Refuse a pipeline whose transformer was trained with another text encoder."""
        if transformer.config.get(self.width_option) != WIDTH:
            raise ValueError(
                f"{printable(folder)} hears prompts through another text encoder than skipdit's, which its folder lacks"
            )

    def sample(self, pipeline: Pipeline, conditions: Sequence[str], options: SamplingOptions) -> Tensor:
        if options.guidance_channels is not None:
            raise ValueError(f"guidance_channels is for class-conditional models, got {options.guidance_channels}")
        assert options.guidance_scale is not None
        model, count = pipeline.transformer, len(conditions)
        length = model.config.get("text_len_t5", MAX_PROMPT_TOKENS)
        states = load_encoder().encode([*conditions, ""], length).to(model.device, model.dtype)
        prompts, nothing = states[torch.arange(count)], states[torch.full((count,), count)]
        size = model.config.sample_size * LATENT_SCALE
        guidance = options.guidance, options.guidance_shallow_units, options.guidance_scale
        with split_guidance(pipeline, *guidance) as guided:
            output = guided(
                **self.arguments(model, prompts, nothing),
                height=size,
                width=size,
                guidance_scale=options.guidance_scale,
                num_inference_steps=options.num_inference_steps,
                generator=options.generator,
                output_type="latent",
            )
        return (self.decode(pipeline.vae, output) / 2 + 0.5).clamp(0, 1)

    def arguments(self, model: Transformer, prompts: PromptStates, nothing: PromptStates) -> Fields:
        """Return the arguments of the pipeline's call for the states of prompts and, per prompt, of the empty prompt,
        with any that only this pipeline takes."""
        raise NotImplementedError

    def decode(self, vae: VAE, output: Any) -> Tensor:
        """Return pictures (b c h w) or clips (b f c h w) in [-1, 1] from the output of the pipeline."""
        raise NotImplementedError


@dataclass(frozen=True)
class CaptionStates:
    """The states of all captions of a data set, which may have several per item, and of the empty prompt."""

    states: PromptStates
    """of all captions, item by item, and then of the empty prompt"""
    num_variants: int
    """captions per item"""

    def select(
        self, items: Int[Tensor, " batch"], variants: Int[Tensor, " batch"], dropped: Bool[Tensor, " batch"]
    ) -> PromptStates:
        """Return the states of one caption per item, or of the empty prompt if it is dropped."""
        captions = items * self.num_variants + variants
        return self.states[torch.where(dropped, len(self.states) - 1, captions)]


@dataclass(frozen=True)
class PromptTraining(TrainingTask[PromptStates]):
    """A text-conditional model in training. Conditions are the states of one caption per sample; a dropped condition
    becomes the empty prompt. Abstract."""

    @property
    def data(self) -> StoredItems:
        return StoredItems(self.items, numbered=True)

    def prepare(self, device: torch.device) -> None:
        self.captions_on(device)

    def captions_on(self, device: torch.device) -> CaptionStates:
        """Return the states of all captions on a device; they are copied there once."""
        if device not in self._captions_on:
            states = self.captions.states.to(device, torch.float32)
            self._captions_on[device] = replace(self.captions, states=states)
        return self._captions_on[device]

    @cached_property
    def _captions_on(self) -> dict[torch.device, CaptionStates]:
        return {}

    @cached_property
    def captions(self) -> CaptionStates:
        """The states of all captions: those stored with the data, or else encoded once.

        `ValueError` if a caption is too long, or the stored states are of another encoder.
        """
        num_variants = len(self.items.captions[0])
        stored = self.items.states
        if stored is None:
            return CaptionStates(encode_captions(self.items.captions, self.items.names), num_variants)
        if stored.tokens.shape[1:] != (MAX_PROMPT_TOKENS, WIDTH):
            raise ValueError(f"states of captions must be {MAX_PROMPT_TOKENS} x {WIDTH}: encode them again")
        return CaptionStates(stored, num_variants)

    def draw_conditions(self, labels: Tensor, dropout: float, draws: Draws) -> PromptStates:
        captions, variants = self.captions_on(labels.device), torch.zeros_like(labels)
        if captions.num_variants > 1:
            variants = draws.randint(captions.num_variants).to(labels.device, non_blocking=True)
        return captions.select(labels, variants, draw_dropped(labels, dropout, draws))

    def showcase(self, count: int) -> tuple[list[str], list[str]]:
        captions = [self.items.captions[index][0] for index in spread(count, len(self.items))]
        return captions, captions


def encode_captions(captions: Sequence[Sequence[str]], names: Callable[[int], str]) -> PromptStates:
    """Return the states of all captions, item by item, and then of the empty prompt.

    names: returns what errors call an item. `ValueError` if a caption is too long.
    """
    encoder, all_captions = load_encoder(), [caption for variants in captions for caption in variants]
    try:
        return encoder.encode([*all_captions, ""], MAX_PROMPT_TOKENS)
    except ValueError as error:
        lengths = encoder.count_tokens(all_captions)
        too_long = [index for index, length in enumerate(lengths) if length > MAX_PROMPT_TOKENS]
        if not too_long:
            raise
        first = names(too_long[0] // len(captions[0]))
        raise ValueError(
            f"{error}: {len(too_long)} of {len(all_captions)} captions are too long, the first is that of {first}"
        ) from error
