"""Wan and what is made from it: one stream of video tokens."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor

from families.table import Segment, Step, TinyTransformer

BLOCKS = (Segment(blocks=("blocks",)),)
WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 12}
WAN |= {"freq_dim": 16, "ffn_dim": 32, "num_layers": 6, "rope_max_seq_len": 32}


def wan(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 4, 2, 8, 8),
        "timestep": step.timestep(),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
    }


def wan_vace(step: Step) -> dict:
    return wan(step) | {
        "control_hidden_states": step.fixed("control", step.batch, 12, 2, 8, 8),
        "control_hidden_states_scale": step.ones("scale", 2),
    }


def wan_animate(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 12, 3, 4, 4),
        "timestep": step.timestep(),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "encoder_hidden_states_image": step.fixed("image", step.batch, 4, 16),
        "pose_hidden_states": step.fixed("pose", step.batch, 4, 2, 4, 4),
        "face_pixel_values": step.fixed("face", step.batch, 3, 5, 8, 8),
    }


def chrono_edit(step: Step) -> dict:
    return wan(step) | {"encoder_hidden_states_image": None}


def helios(step: Step) -> dict:
    def frames(name: str, first: int, last: int) -> Tensor:
        return step.keep(name, lambda: torch.arange(float(first), float(last)).expand(step.batch, last - first))

    return wan(step) | {
        "indices_hidden_states": frames("indices", 7, 9),
        "indices_latents_history_short": frames("short", 6, 7),
        "indices_latents_history_mid": frames("mid", 4, 6),
        "indices_latents_history_long": frames("long", 0, 4),
        "latents_history_short": step.fixed("history_short", step.batch, 4, 1, 8, 8),
        "latents_history_mid": step.fixed("history_mid", step.batch, 4, 2, 8, 8),
        "latents_history_long": step.fixed("history_long", step.batch, 4, 4, 8, 8),
    }


def any_flow(step: Step) -> dict:
    """Frames first, then channels; a timestep a frame, and where it goes to."""
    return {
        "hidden_states": step.latents(step.batch, 2, 4, 8, 8),
        "timestep": step.timestep()[:, None].repeat(1, 2),
        "r_timestep": step.timestep(sigma=step.next_sigma)[:, None].repeat(1, 2),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
    }


def any_flow_far(step: Step) -> dict:
    """The second chunk of frames, which attends to the kept keys and values of the first."""
    frames, tokens_per_frame, heads = 2, 16, (2, 12)

    def cache(name: str) -> dict[str, Tensor]:
        shape = (2, step.batch, heads[0], frames * tokens_per_frame, heads[1])
        return {"compressed_cache": step.fixed(f"far {name}", *shape), "full_cache": step.fixed(f"near {name}", *shape)}

    return any_flow(step) | {
        "chunk_partition": step.keep("chunks", lambda: [frames, frames]),
        "kv_cache": step.keep("cache", lambda: {i: cache(str(i)) for i in range(6)}),
        "kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": False},
    }


def first(result: Any) -> tuple[Tensor, ...]:
    """The sample; the cache of keys and values follows it."""
    return (result[0],)


def wan_animate_2(step: Step) -> dict:
    """The pass over the reference, which ignores its timestep and keeps keys and values; the pass that denoises takes
    them, but compiles its mask, which is too slow for a table."""

    def per_sample(make: Callable[[str], Tensor], name: str) -> list[Tensor]:
        return step.keep(name, lambda: [make(f"{name} {i}") for i in range(step.batch)])

    def grid(frames: int) -> Tensor:
        return torch.tensor([[frames, 2, 2]] * step.batch)

    return {
        "hidden_states": list(step.latents(step.batch, 4, 2, 4, 4).unbind(dim=0)),
        "timestep": step.timestep(),
        "encoder_hidden_states": per_sample(lambda name: step.fixed(name, 5, 12), "text"),
        "condition_latents": per_sample(lambda name: step.fixed(name, 8, 2, 4, 4), "condition"),
        "encoder_hidden_states_image": step.fixed("image", step.batch, 4, 1280),
        "kv_cache": WanAnimate2KVCache(6),
        "kv_cache_mode": "extract",
        "seq_len": 8,
        "offset_grid_sizes": step.keep("grid", lambda: grid(2)),
    }


TABLE = {
    "WanTransformer3DModel": TinyTransformer(
        model_class=diffusers.WanTransformer3DModel, config=WAN, segments=BLOCKS, arguments=wan
    ),
    # the second trunk runs first; what it puts out is added behind units 0 and 3
    "WanVACETransformer3DModel": TinyTransformer(
        model_class=diffusers.WanVACETransformer3DModel,
        config=WAN | {"vace_layers": [0, 3], "vace_in_channels": 12},
        segments=BLOCKS,
        arguments=wan_vace,
        others=("vace_blocks",),
    ),
    # the face adapters' outputs are added behind units 0 and 3
    "WanAnimateTransformer3DModel": TinyTransformer(
        model_class=diffusers.WanAnimateTransformer3DModel,
        config=WAN
        | {"in_channels": 12, "latent_channels": 4, "image_dim": 16, "motion_encoder_size": 8, "motion_style_dim": 8}
        | {"motion_encoder_channel_sizes": {"4": 8, "8": 8}, "motion_dim": 4, "motion_encoder_dim": 8}
        | {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 3},
        segments=BLOCKS,
        arguments=wan_animate,
        others=("face_adapter",),
    ),
    "WanAnimate2Transformer3DModel": TinyTransformer(
        model_class=diffusers.WanAnimate2Transformer3DModel,
        config={"text_len": 6, "in_dim": 12, "dim": 24, "ffn_dim": 32, "freq_dim": 16, "text_dim": 12, "out_dim": 4}
        | {"num_heads": 2, "num_layers": 6},
        segments=BLOCKS,
        arguments=wan_animate_2,
        batch=1,
    ),
    "ChronoEditTransformer3DModel": TinyTransformer(
        model_class=diffusers.ChronoEditTransformer3DModel, config=WAN, segments=BLOCKS, arguments=chrono_edit
    ),
    "SkyReelsV2Transformer3DModel": TinyTransformer(
        model_class=diffusers.SkyReelsV2Transformer3DModel, config=WAN, segments=BLOCKS, arguments=wan
    ),
    "HeliosTransformer3DModel": TinyTransformer(
        model_class=diffusers.HeliosTransformer3DModel,
        config={name: value for name, value in WAN.items() if name != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
        segments=BLOCKS,
        arguments=helios,
    ),
    "AnyFlowTransformer3DModel": TinyTransformer(
        model_class=diffusers.AnyFlowTransformer3DModel, config=WAN, segments=BLOCKS, arguments=any_flow
    ),
    "AnyFlowFARTransformer3DModel": TinyTransformer(
        model_class=diffusers.AnyFlowFARTransformer3DModel,
        config=WAN,
        segments=BLOCKS,
        arguments=any_flow_far,
        returned=first,
    ),
}
