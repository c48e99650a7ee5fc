"""Checkpoints of the class-to-image DiT, in and out: official releases, diffusers' DiT, our own files and folders.

How a key of ours is called elsewhere is data (`OFFICIAL_KEYS`, `DIFFUSERS_KEYS`), read in both directions. What keys
and shapes tell is taken from them, what they cannot tell is asked for, and whatever is left over is an error.
"""

import argparse
import inspect
import json
import math
import os
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from diffusers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from skipdit.files import atomic_file
from skipdit.models.dit import PRESET_SIZES, DiT, DiTBlock, sincos_position_embedding
from skipdit.models.long_skip import Fusion

Preference = Literal["ema", "model"]
StateDict = Mapping[str, Tensor]

# (their key, our key). {unit} counts the blocks, {skip} the long skips from the innermost pair outwards, * is weight
# and bias (facebookresearch/DiT, models.py; Skip-DiT, class-to-image/models.py).
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
    ("skip_norms.{skip}.*", "blocks.{unit}.long_skip.norm.*"),
    ("skip_linears.{skip}.linear.*", "blocks.{unit}.long_skip.proj.*"),
    ("final_layer.adaLN_modulation.1.*", "final_layer.modulation.*"),
    ("final_layer.linear.*", "final_layer.proj.*"),
)
OFFICIAL_POSITION_KEY = "pos_embed"
POSITION_TOLERANCE = 1e-4

# diffusers' blocks each carry a copy of the embedders of timestep and class: many keys of theirs, one of ours. q, k and
# v are the three parts of our attn.qkv.
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
# (their option, ours)
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
# (their option, the values for which their model is also ours)
DIFFUSERS_LIMITS = (
    ("norm_type", ("ada_norm_zero",)),
    ("activation_fn", ("gelu-approximate",)),
    ("attention_bias", (True,)),
    ("norm_elementwise_affine", (False,)),
    ("upcast_attention", (False,)),
    ("dropout", (0.0,)),
    ("norm_eps", (1e-5, 1e-6)),
)
# Transformer2DModel is what diffusers called the class when facebook/DiT-XL-2-256 was released.
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
DIFFUSERS_SPACING = 1.0
SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin")


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """tensors: under our keys. options: the arguments of `DiT`. names: what the file calls a key, where not as we do.
    norm_eps: of the norm before the MLP, 1e-6 in the official models, 1e-5 by default in diffusers'."""

    tensors: StateDict
    options: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    norm_eps: float = 1e-6


def load_model(
    path: str | os.PathLike[str],
    *,
    prefer: Preference = "ema",
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
    fusion: Fusion | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiT:
    """The model in a file or folder, on the CPU, in eval mode.

    A file (`.pt`, `.pth`, `.bin`, `.safetensors`) holds a state dict, or a training checkpoint with `model` and `ema`,
    under our keys or the official ones (facebookresearch's `DiT-XL-2-256x256.pt`, the authors' `DiT-XL-2-skip.pt`). A
    folder is one of `DiT.save_pretrained` or of diffusers' `DiTTransformer2DModel`, or a pipeline with one of these.

    A file tells the sizes, not every option: with our keys the last class is taken for the null class, and 0 for
    `downscale_freq_shift`. Where that is not so, load a folder, or build the `DiT` and call `load_state_dict`.

    Args:
        path: the file or folder. Pickled objects but tensors, plain containers and `argparse.Namespace` are refused.
        prefer: which weights of a training checkpoint that holds both; where it holds one, that one.
        num_attention_heads: needed for a file whose depth and width are not those of a published size.
        sample_size: needed for a file with our keys; `pos_embed` tells it of an official one.
        fusion: needed for a file with our keys and long skips; the official ones are `"replace"`.
        dtype: of the returned model.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the file is damaged or foreign; keys are unknown, missing or misshapen; an argument is missing, or
            contradicts the file. The message begins with the path.
    """
    source = Path(path)
    if prefer not in get_args(Preference):
        raise ValueError(f"prefer must be one of {', '.join(get_args(Preference))}, got {prefer!r}")
    if not source.exists():
        raise FileNotFoundError(f"no such file or folder: {source}")
    given = {"num_attention_heads": num_attention_heads, "sample_size": sample_size, "fusion": fusion}
    try:
        weights = _read_folder(source) if source.is_dir() else _read_file(source, prefer, given)
        model = _assemble(weights, dtype)
        _refuse_contradictions(model, given)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return model


def from_official(state_dict: StateDict) -> dict[str, Tensor]:
    """The same tensors under our keys, without `pos_embed` of shape (1, tokens, dim), which our model computes.

    Raises `ValueError` naming unknown and missing keys; for an odd depth with long skips, which the official model
    cannot have; and where `pos_embed` is not the fixed sine-cosine table.
    """
    table = _official_table(state_dict)
    _refuse_keys({*table, OFFICIAL_POSITION_KEY}, state_dict)
    _refuse_position_embedding(state_dict[OFFICIAL_POSITION_KEY], state_dict["x_embedder.proj.bias"].numel())
    return {ours: state_dict[official] for official, ours in table.items()}


def to_official(model: DiT) -> dict[str, Tensor]:
    """The model's own tensors (no copies) under the official keys, with `pos_embed` of shape (1, tokens, dim).

    DiT-XL/2 at sample_size 32: 348 tensors with long skips, 292 without. Raises `ValueError` naming the option that the
    official format cannot hold.
    """
    config, num_pairs = model.config, len(model.long_skip_links.sources)
    needs = [
        ("null_class", config["null_class"], (True,)),
        ("downscale_freq_shift", config["downscale_freq_shift"], (0.0,)),
        ("out_channels", config["out_channels"], (config["in_channels"], 2 * config["in_channels"])),
    ]
    if num_pairs:
        needs += [
            ("num_layers % 2 with long skips", config["num_layers"] % 2, (0,)),
            ("long_skip.num_pairs (with middle_pair)", num_pairs, (config["num_layers"] // 2,)),
            ("long_skip.fusion", config["long_skip"]["fusion"], ("replace",)),
            ("long_skip.norm", config["long_skip"]["norm"], ("layer_norm",)),
        ]
    _require("the official format", needs)
    tensors = model.state_dict()
    table = _expand(OFFICIAL_KEYS, config["num_layers"], num_pairs)
    position_embedding = model.position_embedding.unsqueeze(0)
    return {OFFICIAL_POSITION_KEY: position_embedding} | {official: tensors[ours] for official, ours in table.items()}


def save_official(model: DiT, path: str | os.PathLike[str]) -> None:
    """Writes `to_official(model)` as a `.safetensors` file, in one step: what was at `path` stays whole until then."""
    target = Path(path)
    if target.suffix != SAFETENSORS_SUFFIX:
        raise ValueError(f"path must end in {SAFETENSORS_SUFFIX}, got {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {target.parent}")
    tensors = {key: tensor.contiguous() for key, tensor in to_official(model).items()}
    with atomic_file(target) as draft:
        save_file(tensors, draft, metadata={"format": "pt"})


def from_diffusers(model: DiTTransformer2DModel) -> DiT:
    """The same function as our DiT without long skips, in eval mode, with its own copy of the weights.

    A `norm_eps` of 1e-5 (diffusers' default) is set on the returned instance. Our config does not store it: a copy
    saved and loaded again uses the official 1e-6, a relative difference of 2e-6 in the output of random weights.

    Raises `ValueError` naming the option that our DiT does not have, or the block whose embedders are not block 0's.
    """
    spacings = {frequencies.downscale_freq_shift for frequencies in _timestep_frequencies(model)}
    if len(spacings) != 1:
        raise ValueError(f"the blocks must share one downscale_freq_shift, got {sorted(spacings)}")
    weights = _weights_of_diffusers(model.config, model.state_dict(), spacings.pop())
    _refuse_position_embedding(model.pos_embed.get_buffer("pos_embed"), model.inner_dim)
    return _assemble(weights, model.dtype)


def to_diffusers(model: DiT) -> DiTTransformer2DModel:
    """The same function as diffusers' DiT, in eval mode, with its own copy of the weights. Takes no long skips.

    diffusers' config cannot store `downscale_freq_shift`. Where it is not 1 (the official models have 0) it is set on
    the returned instance, which computes the same in this process. A copy saved and loaded again uses 1: with the
    random weights of the parity case `dit_skip`, less their long skips, the relative L2 difference of its output is
    0.002 at timestep 15, 0.06 at 450 and 0.15 at 750.

    Raises `ValueError` naming the option that diffusers' model does not have.
    """
    config = model.config
    needs = [
        ("long_skip (number of linked pairs)", len(model.long_skip_links.sources), (0,)),
        ("null_class", config["null_class"], (True,)),
        ("mlp_ratio", config["mlp_ratio"], (4.0,)),
    ]
    _require("diffusers' DiTTransformer2DModel", needs)
    options = {theirs: config[ours] for theirs, ours in DIFFUSERS_OPTIONS}
    with _shapes_only():
        converted = DiTTransformer2DModel(**options, norm_eps=_blocks(model)[0].norm2.eps)
    tensors = _split_qkv(model.state_dict())
    table = _expand(DIFFUSERS_KEYS, config["num_layers"])
    converted.load_state_dict({theirs: tensors[ours].clone() for theirs, ours in table.items()}, assign=True)
    converted.pos_embed.pos_embed = model.position_embedding.unsqueeze(0).clone()
    for frequencies in _timestep_frequencies(converted):
        frequencies.downscale_freq_shift = config["downscale_freq_shift"]
    return converted.eval()


def _weights_of_diffusers(config: Mapping[str, Any], state_dict: StateDict, spacing: float) -> _Weights:
    arguments = inspect.signature(DiTTransformer2DModel).parameters
    options = {name: config.get(name, argument.default) for name, argument in arguments.items()}
    _require("our DiT", [(name, options[name], allowed) for name, allowed in DIFFUSERS_LIMITS])
    with _shapes_only():
        _refuse_tensors(DiTTransformer2DModel(**options).state_dict(), state_dict)
    tensors: dict[str, Tensor] = {}
    for theirs, ours in _expand(DIFFUSERS_KEYS, options["num_layers"]).items():
        if not torch.equal(tensors.setdefault(ours, state_dict[theirs]), state_dict[theirs]):
            raise ValueError(f"all blocks must carry the same embedders, {theirs} is not that of block 0")
    our_options = {ours: options[theirs] for theirs, ours in DIFFUSERS_OPTIONS} | {"downscale_freq_shift": spacing}
    return _Weights(tensors=_fuse_qkv(tensors), options=our_options, norm_eps=options["norm_eps"])


def _timestep_frequencies(model: DiTTransformer2DModel) -> list[Timesteps]:
    """Every block has one."""
    return [module for module in model.modules() if isinstance(module, Timesteps)]


def _blocks(model: DiT) -> list[DiTBlock]:
    return [block for block in model.blocks if isinstance(block, DiTBlock)]


def _fuse_qkv(state_dict: StateDict) -> dict[str, Tensor]:
    fused = dict(state_dict)
    for key in [key for key in state_dict if ".attn.q." in key]:
        parts = [fused.pop(key.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        fused[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return fused


def _split_qkv(state_dict: StateDict) -> dict[str, Tensor]:
    split = dict(state_dict)
    for key in [key for key in state_dict if ".attn.qkv." in key]:
        for part, tensor in zip("qkv", split.pop(key).chunk(3), strict=True):
            split[key.replace(".attn.qkv.", f".attn.{part}.")] = tensor
    return split


def _expand(table: Iterable[tuple[str, str]], num_units: int, num_pairs: int = 0) -> dict[str, str]:
    """Every key of theirs and its key of ours, for a model of this depth."""
    keys: dict[str, str] = {}
    first_target = num_units - num_pairs
    for theirs, ours in table:
        for unit in range(first_target if "{skip}" in theirs else 0, num_units):
            for parameter in ("weight", "bias"):
                key = theirs.format(unit=unit, skip=unit - first_target).replace("*", parameter)
                keys[key] = ours.format(unit=unit).replace("*", parameter)
    return keys


def _official_table(keys: Collection[str]) -> dict[str, str]:
    num_units = len(_indices(keys, "blocks"))
    has_skips = bool(_roots(keys) & {"skip_norms", "skip_linears"})
    if has_skips and num_units % 2:
        raise ValueError(f"an official model with long skips has an even number of blocks, got {num_units}")
    return _expand(OFFICIAL_KEYS, num_units, num_units // 2 if has_skips else 0)


def _roots(keys: Iterable[str]) -> set[str]:
    return {key.split(".")[0] for key in keys}


def _indices(keys: Iterable[str], root: str) -> set[str]:
    """The numbers that follow `root.`."""
    parts = (key.split(".", 2) for key in keys)
    return {part[1] for part in parts if part[0] == root and len(part) == 3 and part[1].isdecimal()}


def _read_file(path: Path, prefer: Preference, given: Mapping[str, Any]) -> _Weights:
    state_dict = _pick_weights(_read_tensors(path), prefer)
    roots = _roots(state_dict)
    official_roots, our_roots = (_roots(keys) for keys in zip(*OFFICIAL_KEYS, strict=True))
    if roots & (official_roots - our_roots):
        tensors = from_official(state_dict)
        names = {ours: official for official, ours in _official_table(state_dict).items()}
        sizes = _read_sizes(tensors, names)
        grid_size = math.isqrt(state_dict[OFFICIAL_POSITION_KEY].shape[1])
        told = {"sample_size": grid_size * sizes["patch_size"], "fusion": "replace"}
        return _Weights(tensors=tensors, options=_options_of_file(sizes, {**given, **told}), names=names)
    if roots & (our_roots - official_roots):
        return _Weights(tensors=state_dict, options=_options_of_file(_read_sizes(state_dict, {}), given))
    raise ValueError(f"holds neither the official DiT's keys nor ours, but {_first(state_dict)}")


def _read_folder(folder: Path) -> _Weights:
    if (folder / "model_index.json").exists():
        folder = folder / "transformer"
    config = _read_json(folder / CONFIG_NAME)
    class_name = config.get("_class_name")
    if class_name in DIFFUSERS_CLASSES:
        return _weights_of_diffusers(config, _read_folder_tensors(folder), DIFFUSERS_SPACING)
    if class_name != DiT.__name__:
        allowed = ", ".join((DiT.__name__, *DIFFUSERS_CLASSES))
        raise ValueError(f"_class_name in {CONFIG_NAME} must be one of {allowed}, got {class_name!r}")
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    return _Weights(tensors=_read_folder_tensors(folder), options=options)


def _read_folder_tensors(folder: Path) -> StateDict:
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        shards = set(_read_json(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map", {}).values())
        tensors = [_read_tensors(folder / Path(shard).name) for shard in sorted(shards)]
        return {key: tensor for shard in tensors for key, tensor in shard.items()}
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).exists():
            return _as_state_dict(_read_tensors(folder / name))
    raise ValueError(f"holds none of {SAFETENSORS_WEIGHTS_NAME}, {SAFE_WEIGHTS_INDEX_NAME}, {WEIGHTS_NAME}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"holds no {path.name}, which save_pretrained writes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_tensors(path: Path) -> Any:
    if path.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    raise ValueError(f"the name must end in {', '.join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))}, got {path.name}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("truncated, or not written by torch.save of PyTorch 1.6 or newer")
        with torch.serialization.safe_globals([argparse.Namespace]):
            if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                raise ValueError(f"refused, because loading it would call {', '.join(sorted(unsafe))}")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile, struct, pickle and torch raise a dozen types on a damaged archive
        reason = str(error) if type(error) is ValueError else "damaged"
        raise ValueError(f"{path.name} is not a readable PyTorch checkpoint: {reason}") from error


def _pick_weights(checkpoint: Any, prefer: Preference) -> StateDict:
    """The checkpoint where it is a state dict, else the preferred one inside (DiT train.py: model, ema, opt, args)."""
    choices = set(get_args(Preference)) & set(checkpoint) if isinstance(checkpoint, Mapping) else set()
    if not choices:
        return _as_state_dict(checkpoint)
    return _as_state_dict(checkpoint[prefer if prefer in choices else choices.pop()])


def _as_state_dict(checkpoint: Any) -> StateDict:
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"must hold a state dict, got {type(checkpoint).__name__}")
    foreign = [
        str(key) for key, value in checkpoint.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if foreign or not checkpoint:
        raise ValueError(f"must hold tensors, or a state dict called model or ema, got {_first(foreign) or 'nothing'}")
    return checkpoint


def _read_sizes(tensors: StateDict, names: Mapping[str, str]) -> dict[str, Any]:
    """What keys and shapes tell of the arguments of `DiT`, with the hidden size, and `long_skip` without its fusion."""

    def shape(key: str, num_dimensions: int) -> torch.Size:
        if key not in tensors:
            _refuse(missing=[names.get(key, key)])
        size = tensors[key].shape
        if len(size) != num_dimensions or 0 in size:
            _refuse(misshapen=[f"{names.get(key, key)} {tuple(size)} instead of {num_dimensions} dimensions above 0"])
        return size

    hidden_size, in_channels, patch_size, _ = shape("patch_embed.proj.weight", 4)
    num_embeddings, _ = shape("class_embedder.weight", 2)
    mlp_size, _ = shape("blocks.0.mlp.fc1.weight", 2)
    out_features, _ = shape("final_layer.proj.weight", 2)
    num_layers = len(_indices(tensors, "blocks"))
    return {
        "hidden_size": hidden_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": max(out_features // patch_size**2, 1),
        "num_layers": num_layers,
        "mlp_ratio": _mlp_ratio(mlp_size, hidden_size),
        "num_classes": num_embeddings - 1,
        "long_skip": _read_long_skip(tensors, num_layers),
    }


def _mlp_ratio(mlp_size: int, hidden_size: int) -> float:
    """The ratio with `int(ratio * hidden_size) == mlp_size`, also where the product of the quotient rounds below it."""
    ratio = mlp_size / hidden_size
    return ratio if int(ratio * hidden_size) == mlp_size else math.nextafter(ratio, math.inf)


def _read_long_skip(keys: Collection[str], num_layers: int) -> dict[str, Any] | None:
    norms = [key for key in keys if ".long_skip.norm." in key]
    num_pairs = len(_indices(norms, "blocks"))
    if num_pairs == 0:
        return None
    norm = "layer_norm" if any(key.endswith(".bias") for key in norms) else "rms_norm"
    return {"num_pairs": num_pairs if num_pairs < num_layers // 2 else None, "norm": norm}


def _options_of_file(sizes: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `DiT` from the sizes and what is told beside them; `ValueError` where one is not."""
    options = dict(sizes)
    shape = (options["num_layers"], options.pop("hidden_size"))
    presets = {(num_layers, width): heads for num_layers, width, heads in PRESET_SIZES.values()}
    heads = presets.get(shape) if told["num_attention_heads"] is None else told["num_attention_heads"]
    if heads is None:
        raise ValueError(
            f"num_attention_heads must be given: {shape[0]} blocks of width {shape[1]} are no published size"
        )
    if heads < 1 or shape[1] % heads:
        raise ValueError(f"num_attention_heads must divide the hidden size {shape[1]}, got {heads}")
    if told["sample_size"] is None:
        raise ValueError("sample_size must be given: only an official pos_embed or a folder's config.json tells it")
    if options["long_skip"] is not None:
        if told["fusion"] is None:
            allowed = " or ".join(get_args(Fusion))
            raise ValueError(
                f"fusion must be given ({allowed}): only an official file or a folder's config.json tells it"
            )
        options["long_skip"] = options["long_skip"] | {"fusion": told["fusion"]}
    split = {"num_attention_heads": heads, "attention_head_dim": shape[1] // heads}
    return options | split | {"sample_size": told["sample_size"]}


def _assemble(weights: _Weights, dtype: torch.dtype) -> DiT:
    """The model with its own copy of the weights, so that a mapped file may change or go."""
    with _shapes_only():
        model = DiT(**weights.options)
    _refuse_tensors(model.state_dict(), weights.tensors, weights.names)
    tensors = {key: tensor.detach().to(dtype, copy=True) for key, tensor in weights.tensors.items()}
    model.load_state_dict(tensors, assign=True)
    grid_size = model.config["sample_size"] // model.config["patch_size"]
    position_embedding = sincos_position_embedding(model.position_embedding.shape[1], grid_size, grid_size)
    model.position_embedding = position_embedding.to(model.device, dtype)
    for block in _blocks(model):
        block.norm2.eps = weights.norm_eps
    return model.eval()


@contextmanager
def _shapes_only() -> Iterator[None]:
    """Models made here have no memory. `ValueError` where the constructor cannot use its options."""
    try:
        with torch.device("meta"):
            yield
    except (TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"the config makes no model: {error}") from error


def _require(holder: str, needs: Iterable[tuple[str, Any, Collection[Any]]]) -> None:
    for name, value, allowed in needs:
        if value not in allowed:
            raise ValueError(f"{holder} needs {name} to be {' or '.join(map(repr, allowed))}, got {value!r}")


def _refuse_contradictions(model: DiT, given: Mapping[str, Any]) -> None:
    actual = {**model.config, "fusion": (model.config["long_skip"] or {}).get("fusion")}
    for name, value in given.items():
        if value is not None and value != actual[name]:
            raise ValueError(f"{name} is {actual[name]!r} in this checkpoint, got {value!r}")


def _refuse_keys(expected: Collection[str], found: Collection[str]) -> None:
    _refuse(missing=sorted(set(expected) - set(found)), unknown=sorted(set(found) - set(expected)))


def _refuse_tensors(expected: StateDict, found: StateDict, names: Mapping[str, str] | None = None) -> None:
    _refuse_keys(expected, found)
    misshapen, integer = [], []
    for key, tensor in found.items():
        name, shape, wanted = (names or {}).get(key, key), tuple(tensor.shape), tuple(expected[key].shape)
        if shape != wanted:
            misshapen.append(f"{name} {shape} instead of {wanted}")
        if not tensor.is_floating_point():
            integer.append(f"{name} {tensor.dtype}")
    _refuse(misshapen=misshapen, integer=integer)


def _refuse(**problems: list[str]) -> None:
    found = [f"{len(keys)} {problem} key(s): {_first(keys)}" for problem, keys in problems.items() if keys]
    if found:
        raise ValueError("; ".join(found))


def _first(keys: Iterable[str], num_shown: int = 3) -> str:
    shown = list(keys)
    return ", ".join(shown[:num_shown]) + (", ..." if len(shown) > num_shown else "")


def _refuse_position_embedding(position_embedding: Tensor, hidden_size: int) -> None:
    """`ValueError` unless (1, tokens, dim) is the fixed table of a square grid, as far as its precision holds it."""
    if not position_embedding.is_floating_point():
        _refuse(integer=[f"{OFFICIAL_POSITION_KEY} {position_embedding.dtype}"])
    shape = tuple(position_embedding.shape)
    grid_size = math.isqrt(shape[1]) if len(shape) == 3 else 0
    if shape != (1, grid_size**2, hidden_size) or hidden_size % 4 or not grid_size:
        raise ValueError(f"{OFFICIAL_POSITION_KEY} must be (1, a square number, {hidden_size}), got {shape}")
    table = sincos_position_embedding(hidden_size, grid_size, grid_size).to(position_embedding.device)
    tolerance = max(POSITION_TOLERANCE, torch.finfo(position_embedding.dtype).eps)
    difference = (position_embedding[0].float() - table).abs().max().item()
    if not difference <= tolerance:
        raise ValueError(
            f"{OFFICIAL_POSITION_KEY} must be the sine-cosine table within {tolerance}, is {difference} off"
        )
