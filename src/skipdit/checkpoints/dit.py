"""Checkpoints of the class-to-image DiT: official releases (facebookresearch/DiT, Skip-DiT), diffusers' DiT, our files.

Tables give the foreign names of our keys (`OFFICIAL_KEYS`, `DIFFUSERS_KEYS`) and are read in both directions. Options
are inferred from keys and shapes; those that cannot be inferred must be given, and any key left over is an error.
"""

import dataclasses
import inspect
import math
from collections.abc import Collection, Mapping

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from torch import Tensor

from skipdit.checkpoints import keys
from skipdit.checkpoints.keys import LoadHints, Need, UnloadedModel
from skipdit.checkpoints.reading import StateDict, list_first
from skipdit.interfaces import Fields
from skipdit.models.dit import DiT, DiTBlock, sincos_position_embedding
from skipdit.models.modules import modules_of
from skipdit.models.presets import PRESET_SIZES

# facebookresearch/DiT, models.py; Skip-DiT, class-to-image/models.py: skip 0 is the innermost
OFFICIAL_KEYS = (
    ("x_embedder.proj.*", "patch_embed.proj.*"),
    ("t_embedder.mlp.0.*", "timestep_embedder.linear_1.*"),
    ("t_embedder.mlp.2.*", "timestep_embedder.linear_2.*"),
    ("y_embedder.embedding_table.weight", "class_embedder.weight"),
    ("blocks.{unit}.attn.qkv.*", "blocks.{unit}.attn.qkv.*"),
    ("blocks.{unit}.attn.proj.*", "blocks.{unit}.attn.proj.*"),
    ("blocks.{unit}.mlp.fc1.*", "blocks.{unit}.mlp.fc1.*"),
    ("blocks.{unit}.mlp.fc2.*", "blocks.{unit}.mlp.fc2.*"),
    ("blocks.{unit}.adaLN_modulation.1.*", "blocks.{unit}.modulation.*"),
    ("skip_norms.{skip}.*", "blocks.{target}.long_skip.norm.*"),
    ("skip_linears.{skip}.linear.*", "blocks.{target}.long_skip.proj.*"),
    ("final_layer.adaLN_modulation.1.*", "final_layer.modulation.*"),
    ("final_layer.linear.*", "final_layer.proj.*"),
)
POSITION_KEY = "pos_embed"

# each block of diffusers has its own copy of the timestep and class embedders, so many of its keys map to one of ours.
# q, k and v are the three parts of our attn.qkv.
DIFFUSERS_KEYS = (
    ("pos_embed.proj.*", "patch_embed.proj.*"),
    ("transformer_blocks.{unit}.norm1.emb.timestep_embedder.linear_1.*", "timestep_embedder.linear_1.*"),
    ("transformer_blocks.{unit}.norm1.emb.timestep_embedder.linear_2.*", "timestep_embedder.linear_2.*"),
    ("transformer_blocks.{unit}.norm1.emb.class_embedder.embedding_table.weight", "class_embedder.weight"),
    ("transformer_blocks.{unit}.norm1.linear.*", "blocks.{unit}.modulation.*"),
    ("transformer_blocks.{unit}.attn1.to_q.*", "blocks.{unit}.attn.q.*"),
    ("transformer_blocks.{unit}.attn1.to_k.*", "blocks.{unit}.attn.k.*"),
    ("transformer_blocks.{unit}.attn1.to_v.*", "blocks.{unit}.attn.v.*"),
    ("transformer_blocks.{unit}.attn1.to_out.0.*", "blocks.{unit}.attn.proj.*"),
    ("transformer_blocks.{unit}.ff.net.0.proj.*", "blocks.{unit}.mlp.fc1.*"),
    ("transformer_blocks.{unit}.ff.net.2.*", "blocks.{unit}.mlp.fc2.*"),
    ("proj_out_1.*", "final_layer.modulation.*"),
    ("proj_out_2.*", "final_layer.proj.*"),
)
QKV_PARTS = {"attn.qkv": ("attn.q", "attn.k", "attn.v")}
# (diffusers' option, ours)
DIFFUSERS_OPTIONS = (
    ("num_attention_heads", "num_attention_heads"),
    ("attention_head_dim", "attention_head_dim"),
    ("in_channels", "in_channels"),
    ("out_channels", "out_channels"),
    ("num_layers", "num_layers"),
    ("sample_size", "sample_size"),
    ("patch_size", "patch_size"),
    ("num_embeds_ada_norm", "num_classes"),
)
# (diffusers' option, the values that our DiT supports)
DIFFUSERS_LIMITS = (
    ("norm_type", ("ada_norm_zero",)),
    ("activation_fn", ("gelu-approximate",)),
    ("attention_bias", (True,)),
    ("norm_elementwise_affine", (False,)),
    ("upcast_attention", (False,)),
    ("dropout", (0.0,)),
    ("norm_eps", (1e-5, 1e-6)),
)
# diffusers called the class Transformer2DModel when facebook/DiT-XL-2-256 was released
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
DIFFUSERS_SPACING = 1.0
PUBLISHED_HEADS = {(num_layers, width): heads for num_layers, width, heads in PRESET_SIZES.values()}


def is_format(state_dict: StateDict, hints: LoadHints) -> bool:
    """Return True: this format is tried last, and its `read` reports foreign keys."""
    return True


def read(state_dict: StateDict, hints: LoadHints) -> UnloadedModel:
    """Read a file with the official keys or with ours."""
    official_roots, our_roots = (keys.roots(column) for column in zip(*OFFICIAL_KEYS, strict=True))
    file_roots = keys.roots(state_dict)
    if file_roots & (official_roots - our_roots):
        tensors = from_official(state_dict)
        names = {ours: official for official, ours in _official_table(state_dict).items()}
        sizes = _read_sizes(tensors, names, hints)
        grid_size = math.isqrt(state_dict[POSITION_KEY].shape[1])
        hints = dataclasses.replace(hints, sample_size=grid_size * sizes["patch_size"], fusion="replace")
        return _make(options_of_file(sizes, hints), tensors, names=names)
    if file_roots & (our_roots - official_roots):
        return _make(options_of_file(_read_sizes(state_dict, {}, hints), hints), state_dict)
    extra = ""
    if len(file_roots) > 1:
        extra = f"; drop can remove what is not the model, among {list_first(sorted(file_roots), 9)}"
    raise ValueError(
        f"has neither the official DiT's keys nor ours, but {list_first(state_dict)} (a file may also contain Latte, "
        f"LatteT2V or HunyuanDiT; for other models give the folder{extra})"
    )


def read_folder(config: Fields, tensors: StateDict) -> UnloadedModel:
    """Read what `DiT.save_pretrained` wrote."""
    return _make(own_options(config), tensors)


def from_official(state_dict: StateDict) -> dict[str, Tensor]:
    """Return the same tensors under our keys, without `pos_embed` (1, tokens, dim), which our model computes.

    `ValueError` names unknown or missing keys, an odd depth with long skips, which the official model cannot have, or a
    `pos_embed` that is not the fixed sine-cosine table.
    """
    table = _official_table(state_dict)
    keys.raise_on_other_keys({*table, POSITION_KEY}, state_dict)
    raise_on_other_positions(state_dict[POSITION_KEY], state_dict["x_embedder.proj.bias"].numel())
    return {ours: state_dict[official] for official, ours in table.items()}


def to_official(model: DiT) -> dict[str, Tensor]:
    """Return the model's tensors, not copied, under the official keys, with `pos_embed` (1, tokens, dim).

    DiT-XL/2 at sample_size 32 has 348 tensors with long skips, 292 without. `ValueError` names the option that the
    official format does not support.
    """
    config, num_pairs = model.config, len(model.long_skip_links.sources)
    needs = official_needs(config)
    if num_pairs:
        needs += [
            ("num_layers % 2 with long skips", config["num_layers"] % 2, (0,)),
            ("long_skip.num_pairs (with middle_pair)", num_pairs, (config["num_layers"] // 2,)),
            *keys.skip_needs(config["long_skip"]),
        ]
    keys.require("the official format", needs)
    tensors, num_layers = model.state_dict(), config["num_layers"]
    table = keys.expand(OFFICIAL_KEYS, num_layers, range(num_layers - num_pairs, num_layers))
    position_embedding = model.position_embedding.unsqueeze(0)
    return {POSITION_KEY: position_embedding} | {official: tensors[ours] for official, ours in table.items()}


def from_diffusers(model: DiTTransformer2DModel) -> DiT:
    """Convert to our DiT without long skips, which computes the same function, in eval mode with a copy of the weights.

    A `norm_eps` of 1e-5 (diffusers' default) is set on the returned instance. Our config does not store it: a copy that
    is saved and loaded again uses the official 1e-6, a relative difference of 2e-6 in the output with random weights.

    `ValueError` names an option that our DiT does not have, or the block whose embedders differ from those of block 0.
    """
    spacings = {frequencies.downscale_freq_shift for frequencies in modules_of(model, Timesteps)}
    if len(spacings) != 1:
        raise ValueError(f"the blocks must share one downscale_freq_shift, got {sorted(spacings)}")
    unloaded = read_diffusers(model.config, model.state_dict(), spacings.pop())
    raise_on_other_positions(model.pos_embed.get_buffer("pos_embed"), model.inner_dim)
    return keys.assemble(unloaded, model.dtype)


def to_diffusers(model: DiT) -> DiTTransformer2DModel:
    """Convert our DiT without long skips to diffusers', which computes the same function, in eval mode with a copy of
    the weights.

    diffusers' config cannot store `downscale_freq_shift`. If it is not 1 (it is 0 in the official models), it is set on
    the returned instance, which then computes the same. A copy that is saved and loaded again uses 1: with the random
    weights of the parity case `dit_skip`, without its long skips, the relative L2 difference of the output is 0.002 at
    timestep 15, 0.06 at 450 and 0.15 at 750.

    `ValueError` names an option that diffusers' model does not have.
    """
    config = model.config
    needs = [
        ("long_skip (number of linked pairs)", len(model.long_skip_links.sources), (0,)),
        ("null_class", config["null_class"], (True,)),
        ("mlp_ratio", config["mlp_ratio"], (4.0,)),
        ("time_scale", config["time_scale"], (1.0,)),
        ("qk_norm", config["qk_norm"], (False,)),
    ]
    keys.require("diffusers' DiTTransformer2DModel", needs)
    options = {name: config[ours] for name, ours in DIFFUSERS_OPTIONS}
    norm_eps = modules_of(model, DiTBlock)[0].norm2.eps
    converted = keys.make_model(lambda: DiTTransformer2DModel(**options, norm_eps=norm_eps))
    tensors = keys.split(model.state_dict(), QKV_PARTS)
    table = keys.expand(DIFFUSERS_KEYS, config["num_layers"])
    converted.load_state_dict({key: tensors[ours].clone() for key, ours in table.items()}, assign=True)
    converted.pos_embed.get_buffer("pos_embed").data = model.position_embedding.unsqueeze(0).clone()
    for frequencies in modules_of(converted, Timesteps):
        frequencies.downscale_freq_shift = config["downscale_freq_shift"]
    return converted.eval()


def read_diffusers(config: Fields, state_dict: StateDict, spacing: float = DIFFUSERS_SPACING) -> UnloadedModel:
    """Read diffusers' DiT as ours. spacing: its `downscale_freq_shift`."""
    arguments = inspect.signature(DiTTransformer2DModel).parameters
    options = {name: config.get(name, argument.default) for name, argument in arguments.items()}
    keys.require("our DiT", [(name, options[name], allowed) for name, allowed in DIFFUSERS_LIMITS])
    keys.check_options(options, state_dict)
    with keys.config_errors(), torch.device("meta"):
        expected = DiTTransformer2DModel(**options).state_dict()
    keys.raise_on_other_tensors(expected, state_dict)
    tensors: dict[str, Tensor] = {}
    for key, ours in keys.expand(DIFFUSERS_KEYS, options["num_layers"]).items():
        if not torch.equal(tensors.setdefault(ours, state_dict[key]), state_dict[key]):
            raise ValueError(f"all blocks must have the same embedders, but {key} differs from that of block 0")
    our_options = {ours: options[name] for name, ours in DIFFUSERS_OPTIONS} | {"downscale_freq_shift": spacing}
    return _make(our_options, keys.fuse(tensors, QKV_PARTS), norm_eps=options["norm_eps"])


# --- shared with Latte, which has the same blocks ---------------------------------------------------------------------


# options that diffusers' EMAModel.save_pretrained adds to the model's config
EMA_OPTIONS = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}


def own_options(config: Fields) -> Fields:
    """Return the model's arguments from the config that `save_pretrained` wrote."""
    return {name: value for name, value in config.items() if not name.startswith("_") and name not in EMA_OPTIONS}


def official_needs(config: Fields) -> list[Need]:
    """Return the option values that the official format supports, except those of long skips."""
    return [
        ("null_class", config["null_class"], (True,)),
        ("downscale_freq_shift", config["downscale_freq_shift"], (0.0,)),
        ("time_scale", config.get("time_scale", 1.0), (1.0,)),
        ("qk_norm", config["qk_norm"], (False,)),
        ("out_channels", config["out_channels"], (config["in_channels"], 2 * config["in_channels"])),
    ]


def read_block_sizes(tensors: StateDict, names: Mapping[str, str]) -> Fields:
    """Return the hidden size, and the arguments of DiT and Latte that can be read from keys and shapes."""
    hidden_size, in_channels, patch_size, _ = keys.shape_of(tensors, "patch_embed.proj.weight", 4, names)
    mlp_size, _ = keys.shape_of(tensors, "blocks.0.mlp.fc1.weight", 2, names)
    out_features, _ = keys.shape_of(tensors, "final_layer.proj.weight", 2, names)
    return {
        "hidden_size": hidden_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": max(out_features // patch_size**2, 1),
        "num_layers": keys.count_layers(tensors, "blocks"),
        "mlp_ratio": keys.mlp_ratio(mlp_size, hidden_size),
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
    }


def options_of_file(sizes: Fields, hints: LoadHints) -> Fields:
    """Return the model's arguments from sizes and hints; `ValueError` if one is in neither."""
    options = dict(sizes)
    hidden_size = options.pop("hidden_size")
    heads = keys.split_heads(options["num_layers"], hidden_size, hints.num_attention_heads, PUBLISHED_HEADS)
    if hints.sample_size is None:
        raise ValueError("sample_size must be given: only an official pos_embed or a folder's config.json has it")
    long_skip = keys.with_fusion(options["long_skip"], hints.fusion)
    return options | heads | {"sample_size": hints.sample_size, "long_skip": long_skip}


def raise_on_other_positions(position_embedding: Tensor, hidden_size: int) -> None:
    """Raise `ValueError` unless (1, tokens, dim) is the fixed table of a square grid, up to rounding."""
    shape = tuple(position_embedding.shape)
    grid_size = math.isqrt(shape[1]) if len(shape) == 3 else 0
    if shape != (1, grid_size**2, hidden_size) or hidden_size % 4 or not grid_size:
        raise ValueError(f"{POSITION_KEY} must be (1, a square number, {hidden_size}), got {shape}")
    keys.raise_on_other_table(
        POSITION_KEY, position_embedding[0], sincos_position_embedding(hidden_size, grid_size, grid_size)
    )


def _make(
    options: Fields, tensors: StateDict, *, names: Mapping[str, str] | None = None, norm_eps: float = 1e-6
) -> UnloadedModel:
    """Build the model. norm_eps: epsilon of the norm before the MLP, 1e-6 in official models, 1e-5 by diffusers'
    default."""
    keys.check_options(options, tensors)
    unloaded = keys.make_unloaded(lambda: DiT(**options), tensors, names)
    for block in modules_of(unloaded.model, DiTBlock):
        block.norm2.eps = norm_eps
    return unloaded


def _read_sizes(tensors: StateDict, names: Mapping[str, str], hints: LoadHints) -> Fields:
    sizes = read_block_sizes(tensors, names)
    num_rows, _ = keys.shape_of(tensors, "class_embedder.weight", 2, names)
    long_skip = keys.read_long_skip(tensors, "blocks", sizes["num_layers"])
    return sizes | keys.class_options(num_rows, hints.num_classes) | {"long_skip": long_skip}


def _official_table(official_keys: Collection[str]) -> dict[str, str]:
    num_units = keys.count_layers(official_keys, "blocks")
    has_skips = bool(keys.roots(official_keys) & set(keys.SKIP_ROOTS))
    if has_skips and num_units % 2:
        raise ValueError(f"an official model with long skips has an even number of blocks, got {num_units}")
    return keys.expand(OFFICIAL_KEYS, num_units, range(num_units // 2, num_units) if has_skips else ())
