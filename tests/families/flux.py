"""Double-stream blocks, then single-stream blocks, as FLUX.1 has them."""

import diffusers
import torch

from families.table import Segment, Step, TinyTransformer, image_ids

TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
# the single-stream blocks take and give two streams, and join them inside
FLUX = (
    Segment(blocks=("transformer_blocks",), streams=TEXT_FIRST),
    Segment(blocks=("single_transformer_blocks",), streams=TEXT_FIRST),
)
# the model joins the streams between the lists
FLUX_JOINED = (
    Segment(blocks=("transformer_blocks",), streams=TEXT_FIRST),
    Segment(blocks=("single_transformer_blocks",), joins=TEXT_FIRST),
)
WIDTH = {"num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (4, 2, 2)}
DEPTH = {"num_layers": 3, "num_single_layers": 6}
SIZES = WIDTH | DEPTH | {"in_channels": 4, "joint_attention_dim": 12}


def flux_arguments(step: Step, scale: float = 1.0) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 16, 4),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "timestep": step.timestep(scale),
        "img_ids": step.keep("img_ids", image_ids),
        "txt_ids": step.keep("txt_ids", lambda: torch.zeros(5, 3)),
    }


def flux(step: Step) -> dict:
    guidance = step.keep("guidance", lambda: torch.full((step.batch,), 3.5))
    return flux_arguments(step) | {"pooled_projections": step.fixed("pooled", step.batch, 10), "guidance": guidance}


def flux2(step: Step) -> dict:
    places = step.keep("img_ids", lambda: torch.cartesian_prod(*(torch.arange(n) for n in (1, 4, 4, 1)))[None])
    text_places = step.keep("txt_ids", lambda: torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 5)))[None])
    guidance = step.keep("guidance", lambda: torch.full((step.batch,), 3.5))
    return flux_arguments(step) | {"img_ids": places, "txt_ids": text_places, "guidance": guidance}


def flux3(step: Step) -> dict:
    def places(*sizes: int) -> torch.Tensor:
        return torch.cartesian_prod(*(torch.arange(n) for n in sizes)).float()

    return {
        "hidden_states": step.latents(step.batch, 16, 4),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "timestep": step.timestep(1.0),
        "target_timestep": step.timestep(1.0, sigma=step.next_sigma),
        "img_ids": step.keep("img_ids", lambda: places(1, 4, 4, 1)),
        "txt_ids": step.keep("txt_ids", lambda: places(1, 1, 1, 5)),
        "image_cond_hidden_states": step.fixed("image", step.batch, 4, 4),
        "image_cond_ids": step.keep("image_cond_ids", lambda: places(1, 2, 2, 1) + 1),
    }


def chroma(step: Step) -> dict:
    return flux_arguments(step) | {"attention_mask": step.ones("mask", step.batch, 21)}


def bria(step: Step) -> dict:
    return flux_arguments(step, scale=1000.0)


def bria_fibo(step: Step) -> dict:
    layers = step.keep("layers", lambda: [step.fixed(f"layer {i}", step.batch, 5, 6) for i in range(9)])
    return flux_arguments(step, scale=1000.0) | {"text_encoder_layers": layers}


TABLE = {
    "FluxTransformer2DModel": TinyTransformer(
        model_class=diffusers.FluxTransformer2DModel,
        config=SIZES | {"pooled_projection_dim": 10, "guidance_embeds": True},
        segments=FLUX,
        arguments=flux,
    ),
    "Flux2Transformer2DModel": TinyTransformer(
        model_class=diffusers.Flux2Transformer2DModel,
        config=SIZES | {"axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 16},
        segments=FLUX_JOINED,
        arguments=flux2,
    ),
    "Flux3Transformer2DModel": TinyTransformer(
        model_class=diffusers.Flux3Transformer2DModel,
        config=SIZES
        | {"num_layers": 2, "axes_dims_rope": (2, 2, 2, 2), "cond_in_channels": 4, "timestep_channels": 16}
        | {"flow_map": True},
        segments=(Segment(blocks=("single_transformer_blocks",), streams=TEXT_FIRST),),
        arguments=flux3,
        others=("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond"),
    ),
    "ChromaTransformer2DModel": TinyTransformer(
        model_class=diffusers.ChromaTransformer2DModel,
        config=SIZES | {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1},
        segments=FLUX_JOINED,
        arguments=chroma,
    ),
    "LongCatImageTransformer2DModel": TinyTransformer(
        model_class=diffusers.LongCatImageTransformer2DModel,
        config=SIZES | {"pooled_projection_dim": 10},
        segments=FLUX,
        arguments=flux_arguments,
    ),
    "OvisImageTransformer2DModel": TinyTransformer(
        model_class=diffusers.OvisImageTransformer2DModel,
        config=SIZES | {"out_channels": 4},
        segments=FLUX,
        arguments=flux_arguments,
    ),
    "BriaTransformer2DModel": TinyTransformer(
        model_class=diffusers.BriaTransformer2DModel, config=SIZES, segments=FLUX, arguments=bria
    ),
    # the model joins before each single-stream block and splits behind it; both lists meet new text at each block
    "BriaFiboTransformer2DModel": TinyTransformer(
        model_class=diffusers.BriaFiboTransformer2DModel,
        config=SIZES | {"text_encoder_dim": 6},
        segments=FLUX_JOINED,
        arguments=bria_fibo,
    ),
}
