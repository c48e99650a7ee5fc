"""Checkpoints of the text-to-video Latte: the authors' `Latte-skip.pt` (Skip-DiT, text-to-video) and diffusers' class.

The authors' LatteT2V has the keys of diffusers' LatteTransformer3DModel, except for the long skips and one buffer.
"""

from collections.abc import Collection, Mapping

from diffusers import LatteTransformer3DModel
from torch import Tensor

from skipdit.checkpoints import keys
from skipdit.checkpoints.keys import LoadHints, Need, UnloadedModel
from skipdit.checkpoints.reading import StateDict
from skipdit.interfaces import Fields

# models/latte_t2v_skip.py: skip 0 is the innermost; all other keys are equal
SKIP_KEYS = (
    ("skip_norms.{skip}.*", "transformer_blocks.{target}.long_skip.norm.*"),
    ("skip_linears.{skip}.linear.*", "transformer_blocks.{target}.long_skip.proj.*"),
)
# (120 tokens, caption channels): replaces a dropped caption in PixArt. In Latte it is an unused buffer: loading ignores
# it, saving writes zeros.
UNUSED_KEY = "caption_projection.y_embedding"
UNUSED_ROWS = 120
# options that shapes do not show; the official format supports these values only
FIXED_OPTIONS: Fields = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
# by (pairs, width): options that files of the published size do not show
PUBLISHED_HEADS = {(28, 1152): 16}
PUBLISHED_SIZES = {(28, 1152): {"sample_size": 64, "video_length": 16}}


def is_format(state_dict: StateDict, hints: LoadHints) -> bool:
    return {"adaln_single", "temporal_transformer_blocks"} <= keys.roots(state_dict)


def read(state_dict: StateDict, hints: LoadHints) -> UnloadedModel:
    """Read a file with the official keys, with diffusers', or with those of a model after `add_long_skips`."""
    tensors = from_official(state_dict)
    names = {ours: official for official, ours in _skip_table(state_dict).items()}
    long_skip = keys.read_long_skip(tensors, "transformer_blocks", keys.count_layers(tensors, "transformer_blocks"))
    fusion = "replace" if names else hints.fusion
    options, long_skip = _options_of_file(tensors, names, hints), keys.with_fusion(long_skip, fusion)
    return keys.make_linked(LatteTransformer3DModel, options, tensors, long_skip, names=names)


def from_official(state_dict: StateDict) -> dict[str, Tensor]:
    """Return the same tensors under the keys of a LatteTransformer3DModel with long skips, without `y_embedding`. Only
    the keys of long skips change. `ValueError` for an odd number of pairs with long skips."""
    table = _skip_table(state_dict)
    return {table.get(key, key): tensor for key, tensor in state_dict.items() if key != UNUSED_KEY}


def to_official(model: LatteTransformer3DModel) -> dict[str, Tensor]:
    """Return the model's tensors, not copied, under the official keys, with zeros for `y_embedding` (120, caption
    channels).

    The published size has 1,024 tensors with long skips, 968 without. `ValueError` names the option that the official
    format does not support.
    """
    config: Fields = model.config
    tensors, num_units = model.state_dict(), config["num_layers"]
    targets = sorted(
        int(unit) for unit in keys.indices((key for key in tensors if ".long_skip." in key), "transformer_blocks")
    )
    needs: list[Need] = [(name, config[name], (value,)) for name, value in FIXED_OPTIONS.items()]
    if targets:
        needs += [
            ("num_layers % 2 with long skips", num_units % 2, (0,)),
            ("long_skip.num_pairs (with middle_pair)", len(targets), (num_units // 2,)),
            *keys.skip_needs(config["long_skip"]),
        ]
    keys.require("the official format", needs)
    names = {ours: official for official, ours in keys.expand(SKIP_KEYS, num_units, targets).items()}
    unused = tensors["caption_projection.linear_1.weight"].new_zeros(UNUSED_ROWS, config["caption_channels"])
    return {UNUSED_KEY: unused} | {names.get(key, key): tensor for key, tensor in tensors.items()}


def _skip_table(official_keys: Collection[str]) -> dict[str, str]:
    num_units = keys.count_layers(official_keys, "transformer_blocks")
    if not keys.roots(official_keys) & set(keys.SKIP_ROOTS):
        return {}
    if num_units % 2:
        raise ValueError(f"an official model with long skips has an even number of pairs, got {num_units}")
    return keys.expand(SKIP_KEYS, num_units, range(num_units // 2, num_units))


def _options_of_file(tensors: StateDict, names: Mapping[str, str], hints: LoadHints) -> Fields:
    hidden_size, in_channels, patch_size, _ = keys.shape_of(tensors, "pos_embed.proj.weight", 4, names)
    out_features, _ = keys.shape_of(tensors, "proj_out.weight", 2, names)
    _, caption_channels = keys.shape_of(tensors, "caption_projection.linear_1.weight", 2, names)
    _, cross_attention_dim = keys.shape_of(tensors, "transformer_blocks.0.attn2.to_k.weight", 2, names)
    num_layers = keys.count_layers(tensors, "transformer_blocks")
    heads = keys.split_heads(num_layers, hidden_size, hints.num_attention_heads, PUBLISHED_HEADS)
    published = PUBLISHED_SIZES.get((num_layers, hidden_size), {})
    sizes = {}
    for name, hint in (("sample_size", "sample_size"), ("video_length", "num_frames")):
        sizes[name] = published.get(name) if getattr(hints, hint) is None else getattr(hints, hint)
        if sizes[name] is None:
            raise ValueError(
                f"{hint} must be given: {num_layers} pairs of width {hidden_size} are not a published size, and only "
                "a folder's config.json has it"
            )
    return {
        **heads,
        **sizes,
        **FIXED_OPTIONS,
        "in_channels": in_channels,
        "out_channels": max(out_features // patch_size**2, 1),
        "patch_size": patch_size,
        "num_layers": num_layers,
        "cross_attention_dim": cross_attention_dim,
        "caption_channels": caption_channels,
    }
