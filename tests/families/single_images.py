"""Images and image embeddings: one stream of tokens."""

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina

from families.table import Segment, Step, TinyTransformer

SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 6}
PATCHED = SMALL | {"out_channels": 8, "sample_size": 8, "patch_size": 2}
TRANSFORMER_BLOCKS = (Segment(blocks=("transformer_blocks",)),)
BLOCKS = (Segment(blocks=("blocks",)),)
LAYERS = (Segment(blocks=("layers",)),)
LAYERS_OF_X = (Segment(blocks=("layers",), streams=("x",)),)


def latents(step: Step, scale: float = 1000.0, *, rising: bool = False) -> dict:
    return {"hidden_states": step.latents(step.batch, 4, 8, 8), "timestep": step.timestep(scale, rising=rising)}


def latents_and_text(step: Step, scale: float = 1000.0, *, rising: bool = False) -> dict:
    return latents(step, scale, rising=rising) | {"encoder_hidden_states": step.fixed("text", step.batch, 5, 12)}


def dit(step: Step) -> dict:
    return latents(step) | {"class_labels": step.keep("labels", lambda: torch.tensor([3, 7]))}


def pixart(step: Step) -> dict:
    return latents_and_text(step) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def hunyuan_dit(step: Step) -> dict:
    def rotary() -> tuple:
        return get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt")

    return latents(step) | {
        "encoder_hidden_states": step.fixed("text", step.batch, 4, 16),
        "encoder_hidden_states_t5": step.fixed("t5", step.batch, 6, 24),
        "text_embedding_mask": step.ones("mask", step.batch, 4),
        "text_embedding_mask_t5": step.ones("mask_t5", step.batch, 6),
        "image_meta_size": step.keep("sizes", lambda: torch.full((step.batch, 6), 64.0)),
        "style": step.keep("style", lambda: torch.zeros(step.batch, dtype=torch.long)),
        "image_rotary_emb": step.keep("rotary", rotary),
    }


def sana(step: Step) -> dict:
    return latents_and_text(step) | {"encoder_attention_mask": step.ones("mask", step.batch, 5)}


def lumina2(step: Step) -> dict:
    mask = step.keep("mask", lambda: torch.arange(5) < torch.tensor([[5], [3]]))
    return latents_and_text(step, 1.0, rising=True) | {"encoder_attention_mask": mask}


def lumina_next(step: Step) -> dict:
    rotary = step.keep("rotary", lambda: get_2d_rotary_pos_embed_lumina(8, 8, 8))
    mask = step.ones("mask", step.batch, 5, dtype=torch.long)
    return latents_and_text(step, 1.0, rising=True) | {
        "encoder_mask": mask,
        "image_rotary_emb": rotary,
        "cross_attention_kwargs": {},
    }


def z_image(step: Step) -> dict:
    return {
        "x": list(step.latents(step.batch, 4, 8, 8).unsqueeze(2).unbind(dim=0)),
        "t": step.timestep(1.0, rising=True),
        "cap_feats": step.keep("text", lambda: [step.fixed("a", 6, 12), step.fixed("b", 9, 12)]),
    }


def bria_fibo2(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 4, 8, 8),
        "timestep": step.timestep(1.0),
        "encoder_hidden_states": step.fixed("text", step.batch, 3, 5, 12),  # for the gist and for each injection
        "encoder_attention_mask": step.ones("mask", step.batch, 5, dtype=torch.bool),
    }


def ernie(step: Step) -> dict:
    return latents(step) | {
        "text_bth": step.fixed("text", step.batch, 5, 12),
        "text_lens": step.keep("lengths", lambda: torch.tensor([5, 3])),
    }


def ideogram(step: Step) -> dict:
    image = torch.nn.functional.pad(step.latents(step.batch, 16, 4), (0, 0, 5, 0))

    def text() -> torch.Tensor:
        return torch.nn.functional.pad(step.fixed("words", step.batch, 5, 12), (0, 0, 0, 16))

    def places() -> torch.Tensor:
        grid = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(4), torch.arange(4)) + 65536
        return torch.cat([torch.arange(5)[:, None].expand(5, 3), grid]).expand(step.batch, 21, 3)

    def indicator() -> torch.Tensor:
        return torch.tensor([3] * 5 + [2] * 16).expand(step.batch, 21)

    return {
        "hidden_states": image,
        "timestep": step.timestep(1.0, rising=True),
        "encoder_hidden_states": step.keep("text", text),
        "position_ids": step.keep("places", places),
        "segment_ids": step.ones("segments", step.batch, 21, dtype=torch.long),
        "indicator": step.keep("indicator", indicator),
    }


def krea(step: Step) -> dict:
    def places() -> torch.Tensor:
        grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        return torch.cat([torch.zeros(5, 3), grid])

    return {
        "hidden_states": step.latents(step.batch, 16, 4),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 3, 12),  # of 3 layers of the text model
        "timestep": step.timestep(1.0),
        "position_ids": step.keep("places", places),
        "encoder_attention_mask": step.keep("mask", lambda: torch.arange(5) < torch.tensor([[5], [3]])),
    }


def nucleus(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 16, 16),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "encoder_hidden_states_mask": step.keep("mask", lambda: torch.arange(5) < torch.tensor([[5], [3]])),
        "timestep": step.timestep(1.0),
        "img_shapes": step.keep("img_shapes", lambda: [(1, 4, 4)] * step.batch),
    }


def omnigen(step: Step) -> dict:
    return latents(step, 1.0, rising=True) | {
        "input_ids": step.keep("ids", lambda: torch.arange(2 * 20).view(2, 20) % 50),
        "input_img_latents": step.keep("images", lambda: [step.fixed("image", 1, 4, 8, 8)]),
        "input_image_sizes": step.keep("sizes", lambda: {0: [[2, 18]]}),
        "attention_mask": step.ones("mask", step.batch, 37, 37),
        "position_ids": step.keep("places", lambda: torch.arange(37).expand(step.batch, 37)),
    }


def prx(step: Step) -> dict:
    mask = step.keep("mask", lambda: torch.arange(5) < torch.tensor([[5], [3]]))
    return latents_and_text(step, 1.0) | {"attention_mask": mask}


def qwen_image21(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 16, 4),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "encoder_hidden_states_mask": step.ones("mask", step.batch, 5, dtype=torch.bool),
        "timestep": step.timestep(1.0),
        "img_shapes": step.keep("img_shapes", lambda: [[(1, 4, 4)]] * step.batch),
        "img_mask": step.keep("img_mask", lambda: (torch.arange(9) >= 5).expand(step.batch, 9)),
    }


def prior(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 8),
        "timestep": step.timestep()[0],  # a number of no dimension
        "proj_embedding": step.fixed("projected", step.batch, 8),
        "encoder_hidden_states": step.fixed("text", step.batch, 7, 8),
        "attention_mask": step.ones("mask", step.batch, 7),
    }


LUMINA = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "num_layers": 6, "multiple_of": 8}
LUMINA |= {"num_attention_heads": 2, "num_kv_heads": 1}
REFINERS = ("noise_refiner", "context_refiner")

TABLE = {
    "DiTTransformer2DModel": TinyTransformer(
        model_class=diffusers.DiTTransformer2DModel,
        config=PATCHED | {"num_embeds_ada_norm": 10},
        segments=TRANSFORMER_BLOCKS,
        arguments=dit,
    ),
    "PixArtTransformer2DModel": TinyTransformer(
        model_class=diffusers.PixArtTransformer2DModel,
        config=PATCHED | {"cross_attention_dim": 16, "caption_channels": 12, "use_additional_conditions": False},
        segments=TRANSFORMER_BLOCKS,
        arguments=pixart,
    ),
    # its second half takes the outputs of the first half as skips
    "HunyuanDiT2DModel": TinyTransformer(
        model_class=diffusers.HunyuanDiT2DModel,
        config=SMALL
        | {"attention_head_dim": 16, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "cross_attention_dim": 16}
        | {"cross_attention_dim_t5": 24, "pooled_projection_dim": 24, "text_len": 4, "text_len_t5": 6},
        segments=BLOCKS,
        arguments=hunyuan_dit,
    ),
    "SanaTransformer2DModel": TinyTransformer(
        model_class=diffusers.SanaTransformer2DModel,
        config=SMALL
        | {"out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
        | {"caption_channels": 12, "sample_size": 8},
        segments=TRANSFORMER_BLOCKS,
        arguments=sana,
    ),
    "Lumina2Transformer2DModel": TinyTransformer(
        model_class=diffusers.Lumina2Transformer2DModel,
        config=LUMINA
        | {"num_refiner_layers": 2, "axes_dim_rope": (4, 2, 2), "axes_lens": (32, 32, 32), "cap_feat_dim": 12},
        segments=LAYERS,
        arguments=lumina2,
        others=REFINERS,
    ),
    "LuminaNextDiT2DModel": TinyTransformer(
        model_class=diffusers.LuminaNextDiT2DModel,
        config=LUMINA | {"learn_sigma": False, "cross_attention_dim": 12},
        segments=LAYERS,
        arguments=lumina_next,
    ),
    "ZImageTransformer2DModel": TinyTransformer(
        model_class=diffusers.ZImageTransformer2DModel,
        config={"in_channels": 4, "dim": 16, "n_layers": 6, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": 12, "axes_dims": [4, 2, 2], "axes_lens": [128, 32, 32]},
        segments=LAYERS_OF_X,
        arguments=z_image,
        others=REFINERS,
    ),
    "BriaFibo2Transformer2DModel": TinyTransformer(
        model_class=diffusers.BriaFibo2Transformer2DModel,
        config={"in_channels": 4, "dim": 24, "n_layers": 6, "n_refiner_layers": 2, "n_heads": 2, "cap_feat_dim": 12}
        | {"injection_layer_ids": (1, 4), "axes_dims": (4, 4, 4), "axes_lens": (128, 32, 32)}
        | {"min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 2, "gist_min_text_len": 4}
        | {"gist_max_text_len": 16},
        segments=LAYERS_OF_X,
        arguments=bria_fibo2,
        others=("noise_refiner", "perceiver.layers"),
    ),
    # tokens first, then the batch
    "ErnieImageTransformer2DModel": TinyTransformer(
        model_class=diffusers.ErnieImageTransformer2DModel,
        config={"hidden_size": 16, "num_attention_heads": 2, "num_layers": 6, "ffn_hidden_size": 32, "in_channels": 4}
        | {"out_channels": 4, "patch_size": 2, "text_in_dim": 12, "rope_axes_dim": (4, 2, 2)},
        segments=LAYERS_OF_X,
        arguments=ernie,
    ),
    "Ideogram4Transformer2DModel": TinyTransformer(
        model_class=diffusers.Ideogram4Transformer2DModel,
        config=SMALL
        | {"intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 12, "rope_theta": 10_000}
        | {"mrope_section": (2, 1, 1)},
        segments=LAYERS,
        arguments=ideogram,
    ),
    "Krea2Transformer2DModel": TinyTransformer(
        model_class=diffusers.Krea2Transformer2DModel,
        config=SMALL
        | {"num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 12}
        | {"num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 1}
        | {"text_intermediate_size": 16, "num_layerwise_text_blocks": 2, "num_refiner_text_blocks": 2}
        | {"axes_dims_rope": (4, 2, 2)},
        segments=TRANSFORMER_BLOCKS,
        arguments=krea,
        others=("text_fusion.layerwise_blocks", "text_fusion.refiner_blocks"),
    ),
    "NucleusMoEImageTransformer2DModel": TinyTransformer(
        model_class=diffusers.NucleusMoEImageTransformer2DModel,
        config=SMALL
        | {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 12, "axes_dims_rope": (4, 2, 2)}
        | {"num_experts": 4, "moe_intermediate_dim": 8, "capacity_factors": [2.0] * 6, "mlp_ratio": 12.0},
        segments=TRANSFORMER_BLOCKS,
        arguments=nucleus,
    ),
    "OmniGenTransformer2DModel": TinyTransformer(
        model_class=diffusers.OmniGenTransformer2DModel,
        config={"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32}
        | {"num_layers": 6, "pad_token_id": 0, "vocab_size": 50, "in_channels": 4, "time_step_dim": 4}
        | {"rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]}},
        segments=LAYERS,
        arguments=omnigen,
    ),
    "PRXTransformer2DModel": TinyTransformer(
        model_class=diffusers.PRXTransformer2DModel,
        config={"in_channels": 4, "patch_size": 2, "context_in_dim": 12, "hidden_size": 16, "mlp_ratio": 2.0}
        | {"num_heads": 2, "depth": 6, "axes_dim": [4, 4]},
        segments=BLOCKS,
        arguments=prx,
    ),
    "QwenImage21Transformer2DModel": TinyTransformer(
        model_class=diffusers.QwenImage21Transformer2DModel,
        config=SMALL | {"out_channels": 4, "context_in_dim": 12, "axes_dims_rope": (4, 2, 2)},
        segments=TRANSFORMER_BLOCKS,
        arguments=qwen_image21,
    ),
    "PriorTransformer": TinyTransformer(
        model_class=diffusers.PriorTransformer,
        config={"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "embedding_dim": 8}
        | {"num_embeddings": 7, "additional_embeddings": 4},
        segments=TRANSFORMER_BLOCKS,
        arguments=prior,
    ),
}
