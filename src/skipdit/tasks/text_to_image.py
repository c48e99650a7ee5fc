"""Text-to-image: diffusers' HunyuanDiT on pictures with captions.

The pooled state of a caption takes the place of the CLIP tokens, and its token states that of the T5 tokens.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from diffusers import HunyuanDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn

from skipdit.diffusion import Objective
from skipdit.interfaces import VAE, Fields, Transformer
from skipdit.models.inflate import init_hunyuan
from skipdit.pipelines import decode_latents
from skipdit.tasks.config import TextToImageModelConfig as TextToImageModelConfig
from skipdit.tasks.prompts import LATENT_SCALE, PromptTask, PromptTraining
from skipdit.tasks.training import Items, refuse_other_grid
from skipdit.text import MAX_PROMPT_TOKENS, WIDTH, PromptStates


@dataclass(frozen=True)
class TextToImageTraining(PromptTraining):
    """A HunyuanDiT that learns pictures."""

    def prepare(self, device: torch.device) -> None:
        super().prepare(device)
        self.rotary_on(device)

    def rotary_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of the rotary embedding on a device; they are computed there once."""
        if device not in self._rotary_on:
            model: Transformer = self.model
            config = model.config
            grid = config.sample_size // config.patch_size
            base = 512 // LATENT_SCALE // config.patch_size  # as HunyuanDiTPipeline does for a square picture
            corners, size = ((0, 0), (base, base)), model.inner_dim // model.num_heads
            rotary = get_2d_rotary_pos_embed(size, corners, (grid, grid), device=device, output_type="pt")
            self._rotary_on[device] = cast(tuple[Tensor, Tensor], rotary)
        return self._rotary_on[device]

    @cached_property
    def _rotary_on(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: PromptStates, **plan: Any) -> Any:
        return model(
            noisy,
            timesteps.to(noisy.dtype),
            encoder_hidden_states=conditions.pooled[:, None],
            text_embedding_mask=torch.ones_like(conditions.mask[:, :1]),
            encoder_hidden_states_t5=conditions.tokens,
            text_embedding_mask_t5=conditions.mask,
            image_rotary_emb=self.rotary_on(noisy.device),
            **plan,
        )

    def prediction(self, sample: Tensor) -> Tensor:
        return sample.chunk(2, dim=1)[0]  # the pipeline drops the learned variance


class TextToImage(PromptTask):
    """Pictures from prompts."""

    name = "text-to-image"
    num_samples, batch_size, is_video = 16, 50, False
    pipeline_name = "HunyuanDiTPipeline"
    model_class, model_config, training = HunyuanDiT2DModel, TextToImageModelConfig, TextToImageTraining
    width_option = "cross_attention_dim_t5"
    absent_parts: ClassVar[Fields] = {
        **dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor")),
        "requires_safety_checker": False,
    }

    def arguments(self, model: Transformer, prompts: PromptStates, nothing: PromptStates) -> Fields:
        arguments: Fields = {"use_resolution_binning": False}
        for prefix, states in (("", prompts), ("negative_", nothing)):
            arguments[f"{prefix}prompt_embeds"] = states.pooled[:, None]
            arguments[f"{prefix}prompt_embeds_2"] = states.tokens
            arguments[f"{prefix}prompt_attention_mask"] = torch.ones_like(states.mask[:, :1])
            arguments[f"{prefix}prompt_attention_mask_2"] = states.mask
        return arguments

    def decode(self, vae: VAE, output: Any) -> Tensor:
        return decode_latents(vae, output.images)

    def make(self, config: TextToImageModelConfig, items: Items, objective: Objective) -> HunyuanDiT2DModel:
        sizes = config.sizes()
        model = HunyuanDiT2DModel(
            **sizes,
            in_channels=items.num_channels,
            sample_size=items.size,
            hidden_size=sizes["num_attention_heads"] * sizes["attention_head_dim"],
            mlp_ratio=4.0 if config.mlp_ratio is None else config.mlp_ratio,
            cross_attention_dim=WIDTH,
            cross_attention_dim_t5=WIDTH,
            pooled_projection_dim=WIDTH,
            text_len=1,
            text_len_t5=MAX_PROMPT_TOKENS,
            use_style_cond_and_image_meta_size=False,
        )
        init_hunyuan(model)
        return model

    def fit(self, start: HunyuanDiT2DModel, items: Items) -> None:
        refuse_other_grid(start, sample_size=items.size)


TASK = TextToImage()
