"""Text-to-video: diffusers' Latte on clips with captions."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn

from skipdit.checkpoints.latte_t2v import FIXED_OPTIONS
from skipdit.diffusion import Objective
from skipdit.interfaces import VAE, Fields, Transformer
from skipdit.models.inflate import inflate_text_latte, init_latte_t2v
from skipdit.pipelines import decode_latents
from skipdit.tasks.class_to_image import load_pictures_pipeline
from skipdit.tasks.config import TextToVideoModelConfig as TextToVideoModelConfig
from skipdit.tasks.prompts import PromptTask, PromptTraining
from skipdit.tasks.training import Items, add_missing_links, refuse_other_grid
from skipdit.text import WIDTH, PromptStates


@dataclass(frozen=True)
class TextToVideoTraining(PromptTraining):
    """A LatteTransformer3DModel that learns clips."""

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: PromptStates, **plan: Any) -> Any:
        return model(noisy.transpose(1, 2), timestep=timesteps, encoder_hidden_states=conditions.tokens, **plan)

    def prediction(self, sample: Tensor) -> Tensor:
        return sample.transpose(1, 2).chunk(2, dim=2)[0]  # the pipeline drops the learned variance


class TextToVideo(PromptTask):
    """Clips of prompts."""

    name = "text-to-video"
    num_samples, batch_size, is_video = 4, 4, True
    pipeline_name = "LattePipeline"
    model_class, model_config, training = LatteTransformer3DModel, TextToVideoModelConfig, TextToVideoTraining
    width_option = "caption_channels"
    absent_parts: ClassVar[Fields] = {"text_encoder": None, "tokenizer": None}

    def arguments(self, model: Transformer, prompts: PromptStates, nothing: PromptStates) -> Fields:
        arguments = {"prompt_embeds": prompts.tokens, "negative_prompt": None, "negative_prompt_embeds": nothing.tokens}
        return arguments | {"video_length": model.config.video_length}

    def decode(self, vae: VAE, output: Any) -> Tensor:
        clips = output.frames.transpose(1, 2)
        return torch.stack([decode_latents(vae, clip, len(clip)) for clip in clips])

    def check_items(self, items: Items) -> None:
        super().check_items(items)
        if items.num_pictures:
            raise ValueError(f"a {self.name} model trains without num_pictures, got {items.num_pictures}")

    def make(self, config: TextToVideoModelConfig, items: Items, objective: Objective) -> LatteTransformer3DModel:
        sizes = config.sizes()
        model = LatteTransformer3DModel(
            **sizes,
            **FIXED_OPTIONS,
            in_channels=items.num_channels,
            out_channels=2 * items.num_channels,
            cross_attention_dim=sizes["num_attention_heads"] * sizes["attention_head_dim"],
            sample_size=items.size,
            caption_channels=WIDTH,
            video_length=cast(int, items.num_frames),
        )
        init_latte_t2v(model)
        self.link(config, model)
        if config.inflate is not None:
            inflate_text_latte(model, load_pictures_pipeline(config.inflate).transformer)
        return model

    def link(self, config: TextToVideoModelConfig, model: nn.Module) -> None:
        add_missing_links(model, config)

    def fit(self, start: LatteTransformer3DModel, items: Items) -> None:
        refuse_other_grid(start, sample_size=items.size, video_length=items.num_frames)


TASK = TextToVideo()
