"""Images: text and image tokens side by side."""

import diffusers
import torch

from families.table import Segment, Step, TinyTransformer

TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
IMAGE_FIRST = ("hidden_states", "encoder_hidden_states")
SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 6}
PATCHED = SMALL | {"out_channels": 4, "patch_size": 2}


def latents_and_text(step: Step, scale: float = 1000.0) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 4, 8, 8),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "timestep": step.timestep(scale),
    }


def sd3(step: Step) -> dict:
    return latents_and_text(step) | {"pooled_projections": step.fixed("pooled", step.batch, 10)}


def aura_flow(step: Step) -> dict:
    return latents_and_text(step, scale=1.0)


def qwen_image(step: Step) -> dict:
    def mask() -> torch.Tensor:
        return (torch.arange(5) < torch.tensor([[5], [3]])).long()

    return {
        "hidden_states": step.latents(step.batch, 16, 16),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "encoder_hidden_states_mask": step.keep("mask", mask),
        "timestep": step.timestep(1.0),
        "img_shapes": step.keep("img_shapes", lambda: [[(1, 4, 4)]] * step.batch),
    }


def hidream(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 4, 8, 8),
        "timesteps": step.timestep(),
        "encoder_hidden_states_t5": step.fixed("t5", step.batch, 4, 8),
        "encoder_hidden_states_llama3": step.fixed("llama", 8, step.batch, 4, 6),
        "pooled_embeds": step.fixed("pooled", step.batch, 8),
    }


def hunyuan_image(step: Step) -> dict:
    return latents_and_text(step) | {
        "timestep_r": step.timestep(sigma=step.next_sigma),
        "encoder_attention_mask": step.keep("mask", lambda: torch.arange(5) < torch.tensor([[5], [3]])),
        "encoder_hidden_states_2": step.fixed("text_2", step.batch, 3, 10),
        "encoder_attention_mask_2": step.keep("mask_2", lambda: torch.arange(3) < torch.tensor([[3], [2]])),
    }


def joy_image(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 2, 4, 1, 8, 8),  # the target and one image to edit
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "timestep": torch.tensor(1000 * step.sigma).repeat(step.batch),
    }


def joy_image_plus(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 20, 4, 1, 2, 2),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "encoder_hidden_states_mask": step.ones("mask", step.batch, 5),
        "timestep": torch.tensor(1000 * step.sigma).repeat(step.batch),
        "shape_list": step.keep("shape_list", lambda: [[(1, 4, 4), (1, 2, 2)]] * step.batch),
    }


def cog_view(step: Step) -> dict:
    def pair(name: str, size: float) -> torch.Tensor:
        return step.keep(name, lambda: torch.full((step.batch, 2), size))

    return latents_and_text(step) | {
        "original_size": pair("original_size", 64.0),
        "target_size": pair("target_size", 64.0),
        "crop_coords": pair("crop_coords", 0.0),
    }


def glm_image(step: Step) -> dict:
    return latents_and_text(step) | {
        "timestep": step.timestep() - 1,
        "prior_token_id": step.keep("prior", lambda: torch.arange(16).expand(step.batch, 16) * 3),
        "prior_token_drop": step.keep("drop", lambda: torch.zeros(step.batch, 16, dtype=torch.bool)),
        "target_size": step.keep("target_size", lambda: torch.full((step.batch, 2), 64.0)),
        "crop_coords": step.keep("crop_coords", lambda: torch.zeros(step.batch, 2)),
    }


COG_VIEW = PATCHED | {"text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4}
JOY = {"in_channels": 4, "hidden_size": 16, "num_attention_heads": 1, "text_dim": 12, "num_layers": 6}
JOY |= {"patch_size": [1, 2, 2], "rope_dim_list": [4, 6, 6]}

TABLE = {
    "SD3Transformer2DModel": TinyTransformer(
        model_class=diffusers.SD3Transformer2DModel,
        config=PATCHED
        | {"sample_size": 8, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
        | {"pos_embed_max_size": 8, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        segments=(Segment(blocks=("transformer_blocks",), streams=TEXT_FIRST),),
        arguments=sd3,
    ),
    "QwenImageTransformer2DModel": TinyTransformer(
        model_class=diffusers.QwenImageTransformer2DModel,
        config=SMALL
        | {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 12, "axes_dims_rope": (4, 2, 2)}
        | {"attention_head_dim": 8},
        segments=(Segment(blocks=("transformer_blocks",), streams=TEXT_FIRST),),
        arguments=qwen_image,
    ),
    "AuraFlowTransformer2DModel": TinyTransformer(
        model_class=diffusers.AuraFlowTransformer2DModel,
        config={"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8, "patch_size": 2}
        | {"num_mmdit_layers": 3, "num_single_dit_layers": 6, "caption_projection_dim": 16, "joint_attention_dim": 12}
        | {"out_channels": 4, "pos_embed_max_size": 16},
        segments=(
            Segment(blocks=("joint_transformer_blocks",), streams=TEXT_FIRST),
            Segment(blocks=("single_transformer_blocks",), joins=TEXT_FIRST),
        ),
        arguments=aura_flow,
    ),
    # each block meets tokens of one more text layer, which are cut off behind it
    "HiDreamImageTransformer2DModel": TinyTransformer(
        model_class=diffusers.HiDreamImageTransformer2DModel,
        config={"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "patch_size": 2}
        | {"num_layers": 3, "num_single_layers": 5, "caption_channels": [8, 6], "text_emb_dim": 8}
        | {"num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2)}
        | {"max_resolution": (8, 8), "llama_layers": tuple(range(8))},
        segments=(
            Segment(blocks=("double_stream_blocks",), streams=IMAGE_FIRST),
            Segment(blocks=("single_stream_blocks",), joins=IMAGE_FIRST),
        ),
        arguments=hidream,
    ),
    "HunyuanImageTransformer2DModel": TinyTransformer(
        model_class=diffusers.HunyuanImageTransformer2DModel,
        config=SMALL
        | {"num_layers": 3, "num_single_layers": 6, "num_refiner_layers": 2, "mlp_ratio": 2.0, "patch_size": (2, 2)}
        | {"out_channels": 4, "text_embed_dim": 12, "text_embed_2_dim": 10, "rope_axes_dim": (4, 4)}
        | {"use_meanflow": True},
        segments=(
            Segment(blocks=("transformer_blocks",), streams=IMAGE_FIRST),
            Segment(blocks=("single_transformer_blocks",), streams=IMAGE_FIRST),
        ),
        arguments=hunyuan_image,
        others=("context_embedder.token_refiner.refiner_blocks",),
    ),
    "JoyImageEditTransformer3DModel": TinyTransformer(
        model_class=diffusers.JoyImageEditTransformer3DModel,
        config=JOY,
        segments=(Segment(blocks=("double_blocks",), streams=IMAGE_FIRST),),
        arguments=joy_image,
    ),
    "JoyImageEditPlusTransformer3DModel": TinyTransformer(
        model_class=diffusers.JoyImageEditPlusTransformer3DModel,
        config=JOY,
        segments=(Segment(blocks=("double_blocks",), streams=IMAGE_FIRST),),
        arguments=joy_image_plus,
    ),
    "CogView3PlusTransformer2DModel": TinyTransformer(
        model_class=diffusers.CogView3PlusTransformer2DModel,
        config=COG_VIEW | {"pos_embed_max_size": 8, "sample_size": 8},
        segments=(Segment(blocks=("transformer_blocks",), streams=IMAGE_FIRST),),
        arguments=cog_view,
    ),
    "CogView4Transformer2DModel": TinyTransformer(
        model_class=diffusers.CogView4Transformer2DModel,
        config=COG_VIEW | {"rope_axes_dim": (8, 8), "sample_size": 8},
        segments=(Segment(blocks=("transformer_blocks",), streams=IMAGE_FIRST),),
        arguments=cog_view,
    ),
    "GlmImageTransformer2DModel": TinyTransformer(
        model_class=diffusers.GlmImageTransformer2DModel,
        config=COG_VIEW | {"prior_vq_quantizer_codebook_size": 64},
        segments=(Segment(blocks=("transformer_blocks",), streams=IMAGE_FIRST),),
        arguments=glm_image,
    ),
}
