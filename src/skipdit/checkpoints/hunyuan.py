"""Checkpoints of HunyuanDiT (arXiv 2405.08748): Tencent's `pytorch_model_ema.pt` <-> diffusers' HunyuanDiT2DModel.

Its long skips are part of the model: layer i of the first half feeds layer L-1-i; the two middle layers have none.
"""

from collections.abc import Collection

import torch
from diffusers import HunyuanDiT2DModel
from torch import Tensor

from skipdit.checkpoints import keys
from skipdit.checkpoints.keys import LoadHints, UnloadedModel
from skipdit.checkpoints.reading import StateDict
from skipdit.interfaces import Fields

# (Tencent's key, diffusers'), from Tencent/HunyuanDiT, hydit/modules/models.py, and diffusers,
# hunyuan_transformer_2d.py. Tencent's norm3 is before the cross-attention and norm2 before the MLP; diffusers numbers
# them in the order in which they run.
HUNYUAN_KEYS = (
    ("x_embedder.proj.*", "pos_embed.proj.*"),
    ("t_embedder.mlp.0.*", "time_extra_emb.timestep_embedder.linear_1.*"),
    ("t_embedder.mlp.2.*", "time_extra_emb.timestep_embedder.linear_2.*"),
    ("extra_embedder.0.*", "time_extra_emb.extra_embedder.linear_1.*"),
    ("extra_embedder.2.*", "time_extra_emb.extra_embedder.linear_2.*"),
    ("pooler.positional_embedding", "time_extra_emb.pooler.positional_embedding"),
    ("pooler.q_proj.*", "time_extra_emb.pooler.q_proj.*"),
    ("pooler.k_proj.*", "time_extra_emb.pooler.k_proj.*"),
    ("pooler.v_proj.*", "time_extra_emb.pooler.v_proj.*"),
    ("pooler.c_proj.*", "time_extra_emb.pooler.c_proj.*"),
    ("mlp_t5.0.*", "text_embedder.linear_1.*"),
    ("mlp_t5.2.*", "text_embedder.linear_2.*"),
    ("text_embedding_padding", "text_embedding_padding"),
    ("blocks.{unit}.norm1.*", "blocks.{unit}.norm1.norm.*"),
    ("blocks.{unit}.default_modulation.1.*", "blocks.{unit}.norm1.linear.*"),
    ("blocks.{unit}.attn1.Wqkv.*", "blocks.{unit}.attn1.to_qkv.*"),
    ("blocks.{unit}.attn1.q_norm.*", "blocks.{unit}.attn1.norm_q.*"),
    ("blocks.{unit}.attn1.k_norm.*", "blocks.{unit}.attn1.norm_k.*"),
    ("blocks.{unit}.attn1.out_proj.*", "blocks.{unit}.attn1.to_out.0.*"),
    ("blocks.{unit}.norm3.*", "blocks.{unit}.norm2.*"),
    ("blocks.{unit}.attn2.q_proj.*", "blocks.{unit}.attn2.to_q.*"),
    ("blocks.{unit}.attn2.kv_proj.*", "blocks.{unit}.attn2.to_kv.*"),
    ("blocks.{unit}.attn2.q_norm.*", "blocks.{unit}.attn2.norm_q.*"),
    ("blocks.{unit}.attn2.k_norm.*", "blocks.{unit}.attn2.norm_k.*"),
    ("blocks.{unit}.attn2.out_proj.*", "blocks.{unit}.attn2.to_out.0.*"),
    ("blocks.{unit}.norm2.*", "blocks.{unit}.norm3.*"),
    ("blocks.{unit}.mlp.fc1.*", "blocks.{unit}.ff.net.0.proj.*"),
    ("blocks.{unit}.mlp.fc2.*", "blocks.{unit}.ff.net.2.*"),
    ("blocks.{target}.skip_norm.*", "blocks.{target}.skip_norm.*"),
    ("blocks.{target}.skip_linear.*", "blocks.{target}.skip_linear.*"),
    ("final_layer.adaLN_modulation.1.*", "norm_out.linear.*"),
    ("final_layer.linear.*", "proj_out.*"),
)
STYLE_KEY = ("style_embedder.weight", "time_extra_emb.style_embedder.weight")  # up to version 1.1
# parts of each fused weight in diffusers, concatenated along the first axis
FUSED_PARTS = {"attn1.to_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn2.to_kv": ("attn2.to_k", "attn2.to_v")}
# Tencent's rows are (shift, scale), diffusers' (scale, shift)
SWAPPED_PREFIX = "norm_out.linear."
# sample size of the published models; it affects no result
SAMPLE_SIZE = 128


def is_format(state_dict: StateDict, hints: LoadHints) -> bool:
    return bool({"mlp_t5", "time_extra_emb"} & keys.roots(state_dict))


def read(state_dict: StateDict, hints: LoadHints) -> UnloadedModel:
    """Read a file with Tencent's or diffusers' keys, whose shapes show all sizes, including the head dimension."""
    if "time_extra_emb" in keys.roots(state_dict):
        state_dict = _official(state_dict)
    options = _options_of_file(state_dict, hints)
    with keys.config_errors(), torch.device("meta"):
        expected = to_official(HunyuanDiT2DModel(**options))
    keys.raise_on_other_tensors(expected, state_dict)
    tensors = from_official(state_dict)
    return keys.make_unloaded(lambda: HunyuanDiT2DModel(**options), tensors)


def from_official(state_dict: StateDict) -> dict[str, Tensor]:
    """Return the same weights under diffusers' keys. `ValueError` names unknown and missing keys."""
    table = _table(keys.count_layers(state_dict, "blocks"), state_dict)
    keys.raise_on_other_keys(table, state_dict)
    renamed = {key: state_dict[official] for official, key in table.items()}
    return keys.split(_swap_halves(renamed), FUSED_PARTS)


def to_official(model: HunyuanDiT2DModel) -> dict[str, Tensor]:
    """Return the same weights under Tencent's keys: 1,304 tensors for g/2 of version 1.2. `ValueError` for another
    activation function."""
    keys.require("the official format", [("activation_fn", model.config["activation_fn"], ("gelu-approximate",))])
    return _official(model.state_dict())


def _official(state_dict: StateDict) -> dict[str, Tensor]:
    tensors = keys.fuse(_swap_halves(state_dict), FUSED_PARTS)
    table = _table(keys.count_layers(tensors, "blocks"), tensors)
    keys.raise_on_other_keys(table.values(), tensors)
    return {official: tensors[key] for official, key in table.items()}


def _table(num_layers: int, present: Collection[str]) -> dict[str, str]:
    rows = (*HUNYUAN_KEYS, STYLE_KEY) if set(STYLE_KEY) & set(present) else HUNYUAN_KEYS
    return keys.expand(rows, num_layers, range(num_layers // 2 + 1, num_layers))


def _swap_halves(state_dict: StateDict) -> dict[str, Tensor]:
    swapped = dict(state_dict)
    for key in [key for key in swapped if key.startswith(SWAPPED_PREFIX)]:
        if not swapped[key].dim():
            keys.raise_on_problems(misshapen=[f"{key} () instead of at least 1 dimension"])
        swapped[key] = torch.cat(swapped[key].chunk(2)[::-1])
    return swapped


def _options_of_file(tensors: StateDict, hints: LoadHints) -> Fields:
    hidden_size, in_channels, patch_size, _ = keys.shape_of(tensors, "x_embedder.proj.weight", 4)
    (head_dim,) = keys.shape_of(tensors, "blocks.0.attn1.q_norm.weight", 1)
    mlp_size, _ = keys.shape_of(tensors, "blocks.0.mlp.fc1.weight", 2)
    text_length, text_channels = keys.shape_of(tensors, "text_embedding_padding", 2)
    pooled_length, t5_channels = keys.shape_of(tensors, "pooler.positional_embedding", 2)
    pooled_channels, _ = keys.shape_of(tensors, "pooler.c_proj.weight", 2)
    out_features, _ = keys.shape_of(tensors, "final_layer.linear.weight", 2)
    if hidden_size % head_dim:
        keys.raise_on_problems(
            misshapen=[f"blocks.0.attn1.q_norm.weight ({head_dim},) must divide the hidden size {hidden_size}"]
        )
    return {
        "num_attention_heads": hidden_size // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "sample_size": SAMPLE_SIZE if hints.sample_size is None else hints.sample_size,
        "hidden_size": hidden_size,
        "num_layers": keys.count_layers(tensors, "blocks"),
        "mlp_ratio": keys.mlp_ratio(mlp_size, hidden_size),
        "learn_sigma": out_features == 2 * in_channels * patch_size**2,
        "cross_attention_dim": text_channels,
        "cross_attention_dim_t5": t5_channels,
        "pooled_projection_dim": pooled_channels,
        "text_len": text_length - (pooled_length - 1),
        "text_len_t5": pooled_length - 1,
        "use_style_cond_and_image_meta_size": STYLE_KEY[0] in tensors,
    }
