"""Kandinsky 5 and 6, and SANA-WM."""

import diffusers
import torch
from torch import Tensor

from families.table import Segment, Step, TinyTransformer

VISUAL = "visual_transformer_blocks"
KANDINSKY = {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 24, "ff_dim": 32}
KANDINSKY |= {"num_visual_blocks": 6, "axes_dims": (4, 4, 4)}
TEXT = {"in_text_dim": 12, "in_text_dim2": 10, "num_text_blocks": 2}


def kandinsky5(step: Step) -> dict:
    """Channels last; the text's blocks take the timestep too."""
    return {
        "hidden_states": step.latents(step.batch, 2, 8, 8, 4),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "timestep": step.timestep().clone(),
        "pooled_projections": step.fixed("pooled", step.batch, 10),
        "visual_rope_pos": step.keep("places", lambda: [torch.arange(2), torch.arange(4), torch.arange(4)]),
        "text_rope_pos": step.keep("text_places", lambda: torch.arange(5)),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
    }


def kandinsky6(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 2, 8, 8, 9),  # noise, the picture to start from, its mask
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "pooled_projections": step.fixed("pooled", step.batch, 10),
        "timestep": step.timestep(),
        "audio_hidden_states": step.latents(step.batch, 6, 3, seed=8),
    }


def kandinsky6_sr(step: Step) -> dict:
    return {"hidden_states": step.latents(1, 1, 8, 8, 9), "timestep": step.timestep()}


def sana_wm(step: Step) -> dict:
    def cameras() -> Tensor:
        """Per frame a matrix from camera to world, two focal lengths and a center."""
        matrices = torch.eye(4).repeat(step.batch, 2, 1, 1)
        matrices[:, 1, :3, 3] = 0.1
        lenses = torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(step.batch, 2, 4)
        return torch.cat([matrices.flatten(2), lenses], dim=-1)

    clean_first_frame = torch.tensor([0.0, 1.0])
    return {
        "hidden_states": step.latents(step.batch, 4, 2, 4, 4),
        "timestep": (step.timestep()[:, None] * clean_first_frame)[:, None],
        "encoder_hidden_states": step.fixed("text", step.batch, 1, 5, 12),
        "encoder_attention_mask": step.ones("mask", step.batch, 1, 1, 5),
        "camera_conditions": step.keep("cameras", cameras),
        "chunk_plucker": step.fixed("rays", step.batch, 8, 2, 4, 4),
    }


def sana_wm_refiner(step: Step) -> dict:
    """A block of frames without the cache of keys and values of those before."""

    def rotary() -> tuple[Tensor, Tensor]:
        angles = torch.arange(16)[None, :, None] * torch.linspace(0.1, 1, 16)
        return angles.cos().expand(step.batch, -1, -1), angles.sin().expand(step.batch, -1, -1)

    return {
        "hidden_states": step.latents(step.batch, 16, 4),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "timestep": torch.full((step.batch, 16), 1000 * step.sigma),
        "video_rotary_emb": step.keep("rotary", rotary),
        "encoder_attention_mask": step.ones("mask", step.batch, 5),
    }


def output(result: object) -> tuple[Tensor, ...]:
    """Kandinsky 5 returns its sample bare where no dictionary is asked for."""
    return (result,) if isinstance(result, Tensor) else (result.sample,)  # type: ignore[attr-defined]


TABLE = {
    "Kandinsky5Transformer3DModel": TinyTransformer(
        model_class=diffusers.Kandinsky5Transformer3DModel,
        config=KANDINSKY | TEXT,
        segments=(Segment(blocks=(VISUAL,), streams=("visual_embed",)),),
        arguments=kandinsky5,
        returned=output,
        others=("text_transformer_blocks",),
    ),
    "Kandinsky6Transformer3DModel": TinyTransformer(
        model_class=diffusers.Kandinsky6Transformer3DModel,
        config=KANDINSKY
        | TEXT
        | {"in_audio_dim": 3, "out_audio_dim": 3, "model_dim_a": 12, "ff_dim_a": 16}
        | {"axes_dims_a": (4, 4, 4)},
        segments=(Segment(blocks=(VISUAL,), streams=("vis", "aud")),),
        arguments=kandinsky6,
        others=("video_text_transformer_blocks", "audio_text_transformer_blocks"),
    ),
    "Kandinsky6SRTransformer3DModel": TinyTransformer(
        model_class=diffusers.Kandinsky6SRTransformer3DModel,
        config=KANDINSKY | {"patch_size": (1, 1, 1)},
        segments=(Segment(blocks=(VISUAL,)),),
        arguments=kandinsky6_sr,
        batch=1,
    ),
    # every third block has another attention
    "SanaWMTransformer3DModel": TinyTransformer(
        model_class=diffusers.SanaWMTransformer3DModel,
        config={"in_channels": 4, "num_layers": 6, "hidden_size": 32, "num_attention_heads": 2, "linear_head_dim": 16}
        | {"softmax_every_n": 3, "caption_channels": 12, "chunk_plucker_channels": 8, "mlp_ratio": 2.0}
        | {"chunk_plucker_post_attn_blocks": 6},
        segments=(Segment(blocks=("blocks",), streams=("x",)),),
        arguments=sana_wm,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": TinyTransformer(
        model_class=diffusers.SanaWMLTX2RefinerTransformer3DModel,
        config={"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8}
        | {"cross_attention_dim": 16, "caption_channels": 12, "num_layers": 6, "audio_in_channels": 4}
        | {"audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4}
        | {"audio_cross_attention_dim": 8},
        segments=(Segment(blocks=("transformer_blocks",)),),
        arguments=sana_wm_refiner,
    ),
}
