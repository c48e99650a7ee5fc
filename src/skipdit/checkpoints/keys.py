"""Build a model from tensors: expand key tables, infer sizes from shapes, report problems, assemble.

A row of a table is (foreign key, our key). `{unit}` is the index of a block, `{skip}` that of a long skip, `{target}`
the block that takes that skip, and `*` stands for weight and bias. Tables are read in both directions.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, get_args

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from skipdit.checkpoints.reading import StateDict, list_first
from skipdit.files.untrusted import printable
from skipdit.interfaces import Fields, Transformer
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.shallow_path import ShallowPath
from skipdit.models.surgery import add_long_skips
from skipdit.options import Fusion

LOGGER = logging.getLogger(__name__)
Table = tuple[tuple[str, str], ...]
Need = tuple[str, object, Collection]
Model = TypeVar("Model", bound=nn.Module)
SKIP_ROOTS = ("skip_norms", "skip_linears")  # in Skip-DiT's models; the released ones have all pairs, innermost first
DROPPABLE = {"projectors"}  # of REPA (arXiv 2410.06940): heads that align features in training
TABLE_TOLERANCE = 1e-4
MAX_REASON = 1000  # characters of a constructor's error
MAX_LAYERS = 256  # also the longest list in a config
MAX_BUFFER_BYTES = 96 * 2**20  # of computed tables; those of 2048 x 2048 pixels at width 1152 take 72 MiB
COUNTED_LAYERS = {"num_layers", "num_single_layers"}  # options that count blocks whose weights have keys


@dataclass(frozen=True, kw_only=True)
class LoadHints:
    """Options from the caller that keys and shapes may not show (see `load_model`), None where not given."""

    num_attention_heads: int | None = None
    """attention heads per block"""
    sample_size: int | None = None
    """side of the latents"""
    num_frames: int | None = None
    """frames per clip"""
    num_classes: int | None = None
    """number of classes without the null class"""
    fusion: Fusion | None = None
    """how long skips join the hidden states"""


@dataclass(frozen=True, kw_only=True)
class UnloadedModel:
    """A model without memory for its parameters, and the tensors to load into it."""

    model: nn.Module
    """from `make_model`"""
    tensors: StateDict
    """weights under the model's keys"""
    names: Mapping[str, str] = field(default_factory=dict)
    """key in the file by the model's key, where they differ"""


@contextmanager
def config_errors() -> Iterator[None]:
    """Turn whatever a constructor raises into `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(printable(str(error) or repr(error), MAX_REASON)) from error
    except Exception as error:  # untrusted options may raise any type
        raise ValueError(f"the config makes no model: {printable(str(error) or repr(error), MAX_REASON)}") from error


def check_options(options: Mapping[str, object], keys: Collection[str] = ()) -> None:
    """Raise `ValueError` if a config has a list longer than `MAX_LAYERS`, or asks for more layers than that or than the
    weights with these keys have. All other sizes cost nothing until weights are allocated.
    """
    present = max((len(indices(keys, root)) for root in roots(keys)), default=MAX_LAYERS)
    for name, value in options.items():
        match value:
            case list() if len(value) > MAX_LAYERS:
                raise ValueError(f"{name} has {len(value):,} entries, at most {MAX_LAYERS} are read")
            case int() if "layers" in name and not 0 <= value <= MAX_LAYERS:
                raise ValueError(f"{name} must be 0 to {MAX_LAYERS}, got {value}")
            case int() if name in COUNTED_LAYERS and value > present:
                raise ValueError(f"{name} is {value}, but the weights have {present}")


def make_model(
    make: Callable[[], Model], tensors: StateDict | None = None, names: Mapping[str, str] | None = None
) -> Model:
    """Build a model whose buffers have memory and whose parameters do not. Errors as for `config_errors`.

    It is first built without any memory, to check that `tensors`, if given, are its weights, and that its buffers take
    at most `MAX_BUFFER_BYTES`.
    """
    with config_errors(), torch.device("meta"):
        outline = make()
    if tensors is not None:
        raise_on_other_tensors(outline.state_dict(), tensors, names)
    size = sum(buffer.numel() * buffer.element_size() for buffer in outline.buffers())
    if size > MAX_BUFFER_BYTES:
        raise ValueError(
            f"its position tables would take {size:,} bytes, at most {MAX_BUFFER_BYTES:,} are allowed: "
            "sample_size or the number of frames is too large"
        )
    with config_errors(), init_empty_weights(include_buffers=False):
        return make()


def make_unloaded(
    make: Callable[[], nn.Module], tensors: StateDict, names: Mapping[str, str] | None = None
) -> UnloadedModel:
    """Build the model of these tensors with `make_model`. names: see `UnloadedModel`."""
    return UnloadedModel(model=make_model(make, tensors, names), tensors=tensors, names=names or {})


def make_linked(
    model_class: type[nn.Module],
    options: Fields,
    tensors: StateDict,
    long_skip: Fields | None,
    *,
    shallow_path: Fields | None = None,
    names: Mapping[str, str] | None = None,
) -> UnloadedModel:
    """Build a transformer of diffusers with the long skips and the shallow path that its config names."""

    def build() -> nn.Module:
        model: Transformer = model_class(**options)
        if long_skip is not None:
            add_long_skips(model, LongSkipConfig.from_dict(long_skip))
        if shallow_path is not None:
            model.register_to_config(shallow_path=ShallowPath.from_dict(shallow_path).to_dict())
        return model

    return make_unloaded(build, tensors, names)


def assemble(unloaded: UnloadedModel, dtype: torch.dtype) -> Transformer:
    """Return the model in eval mode with a copy of the weights, so that a mapped file may change or disappear.

    As in diffusers, half precision keeps the modules that the class lists for it in float32.
    """
    model = unloaded.model
    raise_on_other_tensors(model.state_dict(), unloaded.tensors, unloaded.names)
    is_half = dtype.itemsize < torch.float32.itemsize
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if is_half else set()

    def dtype_of(name: str) -> torch.dtype:
        return dtype if kept.isdisjoint(name.split(".")) else torch.float32

    tensors = {key: tensor.detach().to(dtype_of(key), copy=True) for key, tensor in unloaded.tensors.items()}
    model.load_state_dict(tensors, assign=True)
    device = next(iter(tensors.values())).device
    for name, buffer in model.named_buffers():
        buffer.data = buffer.data.to(device, dtype_of(name) if buffer.is_floating_point() else None)
    return model.eval()


# --- keys -------------------------------------------------------------------------------------------------------------


def expand(table: Iterable[tuple[str, str]], num_units: int, targets: Sequence[int] = ()) -> dict[str, str]:
    """Return our key by foreign key, for a model of this depth whose skip j goes to block `targets[j]`."""
    keys: dict[str, str] = {}
    skips = [{"skip": skip, "target": target} for skip, target in enumerate(targets)]
    units = [{"unit": unit} for unit in range(num_units)]
    for foreign, ours in table:
        rows = skips if "{target}" in ours else units if "{unit}" in foreign else [{}]
        for row in rows:
            for parameter in ("weight", "bias"):
                keys[foreign.format(**row).replace("*", parameter)] = ours.format(**row).replace("*", parameter)
    return keys


def roots(keys: Iterable[str]) -> set[str]:
    return {key.split(".")[0] for key in keys}


def indices(keys: Iterable[str], *prefixes: str) -> set[str]:
    """Return the numbers, as text, that follow one of the prefixes and a dot."""
    parts = (key.split(".", 2) for key in keys)
    return {part[1] for part in parts if part[0] in prefixes and len(part) == 3 and part[1].isdecimal()}


def fuse(state_dict: StateDict, parts_of: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Concatenate the parts of each weight in `parts_of` along the first axis, under the name of the fused weight."""
    fused = dict(state_dict)
    for whole, parts in parts_of.items():
        for key in [key for key in state_dict if f".{parts[0]}." in key]:
            names = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            raise_on_problems(missing=[name for name in names if name not in fused])
            tensors = [fused.pop(name) for name in names]
            if len({tensor.shape[1:] for tensor in tensors}) > 1 or not all(tensor.dim() for tensor in tensors):
                raise_on_problems(misshapen=[f"{names[0]} {tuple(tensors[0].shape)} does not fit its siblings"])
            fused[key.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat(tensors)
    return fused


def split(state_dict: StateDict, parts_of: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Undo `fuse`; the parts are views."""
    divided = dict(state_dict)
    for whole, parts in parts_of.items():
        for key in [key for key in state_dict if f".{whole}." in key]:
            shape = tuple(state_dict[key].shape)
            if not shape or shape[0] % len(parts):
                raise_on_problems(misshapen=[f"{key} {shape} cannot be divided into {', '.join(parts)}"])
            for part, tensor in zip(parts, divided.pop(key).chunk(len(parts)), strict=True):
                divided[key.replace(f".{whole}.", f".{part}.")] = tensor
    return divided


# --- sizes ------------------------------------------------------------------------------------------------------------


def count_layers(keys: Collection[str], *prefixes: str) -> int:
    """Return how many layers the keys number; `ValueError` if there are too many, or the numbers from 0 have gaps."""
    numbers = indices(keys, *prefixes)
    if len(numbers) > MAX_LAYERS:
        raise ValueError(f"its keys have {len(numbers):,} layers, at most {MAX_LAYERS} are read")
    gaps = sorted({str(number) for number in range(len(numbers))} - numbers, key=int)
    if gaps:
        raise_on_problems(missing=[f"{prefixes[0]}.{number}.*" for number in gaps])
    return len(numbers)


def shape_of(tensors: StateDict, key: str, num_dimensions: int, names: Mapping[str, str] | None = None) -> torch.Size:
    """Return the shape of a tensor, which must exist and have this many dimensions, none of size 0."""
    name = (names or {}).get(key, key)
    if key not in tensors:
        raise_on_problems(missing=[name])
    size = tensors[key].shape
    if len(size) != num_dimensions or 0 in size:
        raise_on_problems(misshapen=[f"{name} {tuple(size)} instead of {num_dimensions} dimensions above 0"])
    return size


def mlp_ratio(mlp_size: int, hidden_size: int) -> float:
    """Return the ratio for which `int(ratio * hidden_size) == mlp_size`, even if the quotient is rounded down."""
    ratio = mlp_size / hidden_size
    return ratio if int(ratio * hidden_size) == mlp_size else math.nextafter(ratio, math.inf)


def split_heads(num_layers: int, hidden_size: int, hint: int | None, published: Mapping[tuple[int, int], int]) -> dict:
    """Return the two options of attention. hint: heads from the caller. published: heads by depth and width."""
    heads = published.get((num_layers, hidden_size)) if hint is None else hint
    if heads is None:
        raise ValueError(
            f"num_attention_heads must be given: {num_layers} blocks of width {hidden_size} are not a published size"
        )
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"num_attention_heads must divide the hidden size {hidden_size}, got {heads}")
    return {"num_attention_heads": heads, "attention_head_dim": hidden_size // heads}


# class counts of common data sets: a class table trained with class_dropout_prob=0 has as many rows
PLAIN_CLASS_COUNTS = (1, 10, 100, 101, 200, 365, 1000)
CLASS_TABLES = ("y_embedder.embedding_table.weight", "class_embedder.weight")  # official, ours


def find_num_classes(value: object, tensors: StateDict) -> int | None:
    """Return a value saved with the weights if it is a number of classes that fits their class table, else None."""
    tables = [tensors[name] for name in CLASS_TABLES if name in tensors]
    fitting = {len(table) - null for table in tables if table.ndim == 2 for null in (0, 1)}
    return value if type(value) is int and value > 0 and value in fitting else None


def class_options(num_rows: int, hint: int | None) -> Fields:
    """Return the two options of a class table. hint: classes from the caller. `ValueError` if it does not fit, or if
    only the caller can know whether the last row is the null class."""
    if hint is None and num_rows in PLAIN_CLASS_COUNTS:
        null = f", or {num_rows - 1} if its last row means no class" if num_rows > 1 else ""
        raise ValueError(
            f"num_classes must be given: the class table has {num_rows} row(s): give {num_rows} if each is a class "
            f"(trained with class_dropout_prob=0, so not for guidance){null}"
        )
    if hint is None and num_rows - 1 not in PLAIN_CLASS_COUNTS:
        LOGGER.warning(
            "the last of the %d rows of the class table is assumed to mean no class: if not, give num_classes=%d",
            *(num_rows, num_rows),
        )
    if hint not in (None, num_rows, num_rows - 1):
        raise ValueError(
            f"num_classes must be {num_rows}, or {num_rows - 1} and a null class, for a class table of {num_rows} "
            f"row(s), got {hint}"
        )
    return {"num_classes": num_rows - 1 if hint is None else hint, "null_class": hint != num_rows}


def read_long_skip(keys: Collection[str], root: str, num_units: int) -> Fields | None:
    """Return the fields of `LongSkipConfig` that our keys show, all but the fusion; None without long skips."""
    norms = [key for key in keys if ".long_skip.norm." in key]
    num_pairs = len(indices(norms, root))
    if num_pairs == 0:
        return None
    norm = "layer_norm" if any(key.endswith(".bias") for key in norms) else "rms_norm"
    fill = {"fill_token": True} if "fill_token" in keys else {}
    return {"num_pairs": num_pairs if num_pairs < num_units // 2 else None, "norm": norm, **fill}


def with_fusion(long_skip: Fields | None, fusion: Fusion | None) -> Fields | None:
    if long_skip is None:
        return None
    if fusion is None:
        allowed = " or ".join(get_args(Fusion))
        raise ValueError(f"fusion must be given ({allowed}): only an official file or a folder's config.json has it")
    return {**long_skip, "fusion": fusion}


# --- problems ---------------------------------------------------------------------------------------------------------


def require(holder: str, needs: Iterable[Need]) -> None:
    for name, value, allowed in needs:
        if value not in allowed:
            raise ValueError(
                f"{holder} needs {name} to be {' or '.join(map(repr, allowed))}, got {printable(repr(value))}"
            )


def skip_needs(long_skip: Fields) -> list[Need]:
    """Return the long skip options that official models support."""
    return [
        ("long_skip.fusion", long_skip["fusion"], ("replace",)),
        ("long_skip.norm", long_skip["norm"], ("layer_norm",)),
    ]


def raise_on_contradictions(model: Transformer, hints: LoadHints) -> None:
    """Raise `ValueError` if the model contradicts a hint."""
    config = model.config
    actual = {**config, "fusion": (config.get("long_skip") or {}).get("fusion")}
    if "video_length" in config:  # diffusers' name for num_frames
        actual["num_frames"] = config["video_length"]
    for name, value in vars(hints).items():
        if value is not None and name not in actual:
            raise ValueError(f"{name} is not an option of a {type(model).__name__}, got {value!r}")
        if value is not None and value != actual[name]:
            raise ValueError(f"{name} is {printable(repr(actual[name]))} in this checkpoint, got {value!r}")


def raise_on_other_keys(expected: Collection[str], actual: Collection[str]) -> None:
    missing, unknown = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    try:
        raise_on_problems(missing=missing, unknown=unknown)
    except ValueError as error:
        if (extra := roots(unknown) & DROPPABLE) and not missing:
            raise ValueError(f"{error}: only training uses them; give drop={min(extra)!r} to ignore them") from error
        raise


def raise_on_other_tensors(expected: StateDict, actual: StateDict, names: Mapping[str, str] | None = None) -> None:
    """Raise `ValueError` on missing, unknown, misshapen or integer tensors; it names their keys in the file."""
    names = names or {}
    raise_on_other_keys({names.get(key, key) for key in expected}, {names.get(key, key) for key in actual})
    misshapen, integer = [], []
    for key, tensor in actual.items():
        name, shape, expected_shape = names.get(key, key), tuple(tensor.shape), tuple(expected[key].shape)
        if shape != expected_shape:
            misshapen.append(f"{name} {shape} instead of {expected_shape}")
        if not tensor.is_floating_point():
            integer.append(f"{name} {tensor.dtype}")
    raise_on_problems(misshapen=misshapen, integer=integer)


def raise_on_problems(**problems: list[str]) -> None:
    texts = [f"{len(keys)} {problem} key(s): {list_first(keys)}" for problem, keys in problems.items() if keys]
    if texts:
        raise ValueError("; ".join(texts))


def raise_on_other_table(key: str, tensor: Tensor, table: Tensor) -> None:
    """Raise `ValueError` unless a tensor is this sine-cosine table, up to rounding."""
    if not tensor.is_floating_point():
        raise_on_problems(integer=[f"{key} {tensor.dtype}"])
    if tensor.shape != table.shape or not tensor.numel():
        raise_on_problems(misshapen=[f"{key} {tuple(tensor.shape)} instead of {tuple(table.shape)}, above 0"])
    tolerance = max(TABLE_TOLERANCE, torch.finfo(tensor.dtype).eps)
    difference = (tensor.float() - table.to(tensor.device)).abs().max().item()
    if not difference <= tolerance:
        raise ValueError(f"{key} must be the sine-cosine table within {tolerance}, but differs by {difference}")
