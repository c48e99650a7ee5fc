"""Videos."""

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from torch import Tensor

from families.table import Segment, Step, TinyTransformer

TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
VIDEO_FIRST = ("hidden_states", "encoder_hidden_states")
SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 6}
COG = SMALL | {"out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 12, "sample_width": 8, "sample_height": 8}
COG |= {"sample_frames": 5, "patch_size": 2, "max_text_seq_length": 5}
HUNYUAN = SMALL | {"out_channels": 4, "num_layers": 3, "num_single_layers": 6, "num_refiner_layers": 2}
HUNYUAN |= {"mlp_ratio": 2.0, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 12, "rope_axes_dim": (4, 2, 2)}
TRANSFORMER_BLOCKS = (Segment(blocks=("transformer_blocks",)),)
JOINT_BLOCKS = (Segment(blocks=("transformer_blocks",), streams=VIDEO_FIRST),)
HUNYUAN_BLOCKS = (
    Segment(blocks=("transformer_blocks",), streams=VIDEO_FIRST),
    Segment(blocks=("single_transformer_blocks",), streams=VIDEO_FIRST),
)
TOKEN_REFINER = ("context_embedder.token_refiner.refiner_blocks",)


def video(step: Step, channels: int = 4, frames: int = 2, scale: float = 1000.0) -> dict:
    return {
        "hidden_states": step.latents(step.batch, channels, frames, 8, 8),
        "timestep": step.timestep(scale),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
    }


def ragged_mask(step: Step) -> Tensor:
    return step.keep("mask", lambda: (torch.arange(5) < torch.tensor([[5], [3]])).long())


def hunyuan_video(step: Step) -> dict:
    return video(step) | {
        "encoder_attention_mask": ragged_mask(step),
        "pooled_projections": step.fixed("pooled", step.batch, 10),
        "guidance": step.keep("guidance", lambda: torch.full((step.batch,), 6000.0)),
    }


def framepack(step: Step) -> dict:
    def frames(name: str, first: int, last: int) -> Tensor:
        return step.keep(name, lambda: torch.arange(float(first), float(last)))

    return hunyuan_video(step) | {
        "image_embeds": step.fixed("image", step.batch, 3, 16),
        "indices_latents": frames("indices", 8, 10),
        "latents_clean": step.fixed("clean", step.batch, 4, 1, 8, 8),
        "indices_latents_clean": frames("clean_indices", 7, 8),
        "latents_history_2x": step.fixed("2x", step.batch, 4, 2, 8, 8),
        "indices_latents_history_2x": frames("2x_indices", 4, 6),
        "latents_history_4x": step.fixed("4x", step.batch, 4, 4, 8, 8),
        "indices_latents_history_4x": frames("4x_indices", 0, 4),
    }


def hunyuan_video15(step: Step) -> dict:
    return video(step) | {
        "hidden_states": step.latents(step.batch, 4, 2, 4, 4),
        "timestep_r": step.timestep(sigma=step.next_sigma),
        "encoder_attention_mask": ragged_mask(step),
        "encoder_hidden_states_2": step.fixed("text_2", step.batch, 3, 10),
        "encoder_attention_mask_2": step.ones("mask_2", step.batch, 3),
        "image_embeds": step.fixed("image", step.batch, 3, 16),
    }


def motif(step: Step) -> dict:
    return video(step) | {"encoder_attention_mask": ragged_mask(step)}


def cog_video(step: Step) -> dict:
    return video(step) | {"hidden_states": step.latents(step.batch, 2, 4, 8, 8)}


def consis_id(step: Step) -> dict:
    return cog_video(step) | {
        "id_vit_hidden": step.keep("faces", lambda: [step.fixed("face", step.batch, 2, 8)]),
        "id_cond": step.fixed("identity", step.batch, 8),
    }


def mochi(step: Step) -> dict:
    mask = step.keep("mask", lambda: torch.arange(5) < torch.tensor([[5], [3]]))
    return {
        "hidden_states": step.latents(step.batch, 4, 2, 8, 8),
        "timestep": step.timestep(rising=True),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 16),
        "encoder_attention_mask": mask,
    }


def allegro(step: Step) -> dict:
    def rotary() -> tuple:
        *freqs, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 4)), (4, 4), temporal_size=2)
        places = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long())
        return tuple(freqs), tuple(places.T.reshape(3, 1, -1).contiguous())

    return video(step) | {
        "image_rotary_emb": step.keep("rotary", rotary),
        "encoder_attention_mask": ragged_mask(step),
    }


def ltx(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 32, 4),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "timestep": step.timestep(),
        "encoder_attention_mask": ragged_mask(step),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def cosmos(step: Step) -> dict:
    return video(step, scale=1.0) | {"fps": 16}


def sana_video(step: Step) -> dict:
    return video(step) | {"encoder_attention_mask": step.ones("mask", step.batch, 5)}


def latte(step: Step) -> dict:
    return video(step, frames=3)


def latte_tokens(entered: Tensor, left: Tensor) -> Tensor:
    """From (batch frames) patches to (batch patches) frames."""
    frames = left.shape[1]
    by_frame = entered.reshape(-1, frames, *entered.shape[1:])
    return by_frame.transpose(1, 2).reshape(left.shape)


TABLE = {
    "HunyuanVideoTransformer3DModel": TinyTransformer(
        model_class=diffusers.HunyuanVideoTransformer3DModel,
        config=HUNYUAN | {"pooled_projection_dim": 10},
        segments=HUNYUAN_BLOCKS,
        arguments=hunyuan_video,
        others=TOKEN_REFINER,
    ),
    "HunyuanVideoFramepackTransformer3DModel": TinyTransformer(
        model_class=diffusers.HunyuanVideoFramepackTransformer3DModel,
        config=HUNYUAN
        | {"pooled_projection_dim": 10, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        segments=HUNYUAN_BLOCKS,
        arguments=framepack,
        others=TOKEN_REFINER,
    ),
    "HunyuanVideo15Transformer3DModel": TinyTransformer(
        model_class=diffusers.HunyuanVideo15Transformer3DModel,
        config={name: value for name, value in HUNYUAN.items() if name != "num_single_layers"}
        | {"num_layers": 6, "patch_size": 1, "text_embed_2_dim": 10, "image_embed_dim": 16, "target_size": 16}
        | {"use_meanflow": True},
        segments=JOINT_BLOCKS,
        arguments=hunyuan_video15,
        others=TOKEN_REFINER,
    ),
    "MotifVideoTransformer3DModel": TinyTransformer(
        model_class=diffusers.MotifVideoTransformer3DModel,
        config=SMALL
        | {"out_channels": 4, "num_layers": 3, "num_single_layers": 5, "mlp_ratio": 2.0, "patch_size": 2}
        | {"patch_size_t": 1, "text_embed_dim": 12, "rope_axes_dim": (4, 2, 2)},
        segments=HUNYUAN_BLOCKS,
        arguments=motif,
    ),
    "CogVideoXTransformer3DModel": TinyTransformer(
        model_class=diffusers.CogVideoXTransformer3DModel,
        config=COG | {"temporal_compression_ratio": 4},
        segments=JOINT_BLOCKS,
        arguments=cog_video,
    ),
    # a face's cross-attention is added behind units 0, 2 and 4
    "ConsisIDTransformer3DModel": TinyTransformer(
        model_class=diffusers.ConsisIDTransformer3DModel,
        config=COG
        | {"is_train_face": True, "cross_attn_interval": 2, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2}
        | {"LFE_id_dim": 8, "LFE_vit_dim": 8, "LFE_depth": 2, "LFE_dim_head": 8, "LFE_num_heads": 2}
        | {"LFE_num_id_token": 1, "LFE_num_querie": 2, "LFE_output_dim": 10, "LFE_ff_mult": 1, "LFE_num_scale": 1},
        segments=JOINT_BLOCKS,
        arguments=consis_id,
        others=("perceiver_cross_attention",),
    ),
    "EasyAnimateTransformer3DModel": TinyTransformer(
        model_class=diffusers.EasyAnimateTransformer3DModel,
        config=SMALL
        | {"attention_head_dim": 16, "out_channels": 4, "mmdit_layers": 4, "patch_size": 2, "time_embed_dim": 8}
        | {"text_embed_dim": 12},
        segments=JOINT_BLOCKS,
        arguments=video,
    ),
    "MochiTransformer3DModel": TinyTransformer(
        model_class=diffusers.MochiTransformer3DModel,
        config=SMALL | {"pooled_projection_dim": 8, "text_embed_dim": 16, "time_embed_dim": 4, "patch_size": 2},
        segments=JOINT_BLOCKS,
        arguments=mochi,
    ),
    "AllegroTransformer3DModel": TinyTransformer(
        model_class=diffusers.AllegroTransformer3DModel,
        config=SMALL
        | {"attention_head_dim": 12, "out_channels": 4, "cross_attention_dim": 24, "caption_channels": 12}
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 2},
        segments=TRANSFORMER_BLOCKS,
        arguments=allegro,
    ),
    "LTXVideoTransformer3DModel": TinyTransformer(
        model_class=diffusers.LTXVideoTransformer3DModel,
        config=SMALL | {"out_channels": 4, "cross_attention_dim": 16, "caption_channels": 12},
        segments=TRANSFORMER_BLOCKS,
        arguments=ltx,
    ),
    "LatteTransformer3DModel": TinyTransformer(
        model_class=diffusers.LatteTransformer3DModel,
        config=SMALL
        | {"out_channels": 8, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 16, "attention_bias": True}
        | {"activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single"}
        | {"norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 12, "video_length": 3},
        segments=(Segment(blocks=("transformer_blocks", "temporal_transformer_blocks"), align=latte_tokens),),
        arguments=latte,
    ),
    "CosmosTransformer3DModel": TinyTransformer(
        model_class=diffusers.CosmosTransformer3DModel,
        config=SMALL
        | {"attention_head_dim": 12, "out_channels": 4, "mlp_ratio": 2, "text_embed_dim": 12, "adaln_lora_dim": 4}
        | {"max_size": (4, 32, 32), "concat_padding_mask": False},  # the mask is resized with torchvision
        segments=TRANSFORMER_BLOCKS,
        arguments=cosmos,
    ),
    "SanaVideoTransformer3DModel": TinyTransformer(
        model_class=diffusers.SanaVideoTransformer3DModel,
        config=SMALL
        | {"attention_head_dim": 12, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12}
        | {"cross_attention_dim": 24, "caption_channels": 12, "sample_size": 8, "rope_max_seq_len": 32},
        segments=TRANSFORMER_BLOCKS,
        arguments=sana_video,
    ),
}
