"""From tensors to a model: key tables and what they expand to, sizes from shapes, what is refused, the assembly.

A row of a table is (key of theirs, key of ours). `{unit}` counts blocks, `{skip}` the long skips in their order,
`{target}` is the block that takes that skip, `*` is weight and bias. Tables are read in both directions.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from skipdit.checkpoints.reading import StateDict, list_first
from skipdit.models.long_skip import Fusion
from skipdit.untrusted import printable

LOGGER = logging.getLogger(__name__)
Table = tuple[tuple[str, str], ...]
Need = tuple[str, Any, Collection[Any]]
Model = TypeVar("Model", bound=nn.Module)
SKIP_ROOTS = ("skip_norms", "skip_linears")  # of Skip-DiT's models; the released ones hold all pairs, innermost first
DROPPABLE = {"projectors"}  # of REPA (arXiv 2410.06940): heads that align features in training
TABLE_TOLERANCE = 1e-4
MAX_REASON = 1000  # characters of what a constructor says
MAX_LAYERS = 256  # and entries of a list in a config
MAX_BUFFER_BYTES = 96 * 2**20  # of tables that are computed; 72 MiB are those of 2048 x 2048 pixels at width 1152
COUNTED_LAYERS = {"num_layers", "num_single_layers"}  # options that count blocks whose weights have keys


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the caller says of a file that keys and shapes may not tell; see `load_model`."""

    num_attention_heads: int | None = None
    sample_size: int | None = None
    num_frames: int | None = None
    num_classes: int | None = None
    fusion: Fusion | None = None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """model: made by `make_model`. tensors: under its keys. names: what the file calls a key, where not so."""

    model: nn.Module
    tensors: StateDict
    names: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def config_errors() -> Iterator[None]:
    """`ValueError` where a constructor cannot use its options."""
    try:
        yield
    except Exception as error:  # a stranger's options raise whatever type the first use of them does
        reason = printable(str(error) or repr(error), MAX_REASON)
        raise ValueError(reason if isinstance(error, ValueError) else f"the config makes no model: {reason}") from error


def check_options(options: Mapping[str, Any], keys: Collection[str] = ()) -> None:
    """`ValueError` where a config asks for more layers than may be, or than the weights with these keys hold.

    Also where a list is longer than a model has layers. All other sizes cost nothing until weights are made.
    """
    present = max((len(indices(keys, root)) for root in roots(keys)), default=MAX_LAYERS)
    for name, value in options.items():
        if isinstance(value, list) and len(value) > MAX_LAYERS:
            raise ValueError(f"{name} has {len(value):,} entries, at most {MAX_LAYERS} are read")
        if "layers" in name and isinstance(value, int) and not 0 <= value <= MAX_LAYERS:
            raise ValueError(f"{name} must be 0 to {MAX_LAYERS}, got {value}")
        if name in COUNTED_LAYERS and isinstance(value, int) and value > present:
            raise ValueError(f"{name} is {value}, but the weights hold {present}")


def make_model(
    make: Callable[[], Model], tensors: StateDict | None = None, names: Mapping[str, str] | None = None
) -> Model:
    """The model, whose parameters have no memory yet; buffers do. Errors as in `config_errors`.

    First it is made without any memory. With `tensors`, these must be its weights, and its buffers may not be larger
    than `MAX_BUFFER_BYTES`, before more is allocated.
    """
    with config_errors(), torch.device("meta"):
        outline = make()
    if tensors is not None:
        refuse_tensors(outline.state_dict(), tensors, names)
    size = sum(buffer.numel() * buffer.element_size() for buffer in outline.buffers())
    if size > MAX_BUFFER_BYTES:
        raise ValueError(
            f"its tables of positions would take {size:,} bytes, at most {MAX_BUFFER_BYTES:,} are made: "
            "sample_size or the number of frames is too large"
        )
    with config_errors(), init_empty_weights(include_buffers=False):
        return make()


def assemble(weights: Weights, dtype: torch.dtype) -> Any:
    """The model in eval mode with its own copy of the weights, so that a mapped file may change or go.

    As in diffusers, half precision leaves in float32 what the class says to keep there.
    """
    model = weights.model
    refuse_tensors(model.state_dict(), weights.tensors, weights.names)
    is_half = dtype.itemsize < torch.float32.itemsize
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if is_half else set()

    def dtype_of(name: str) -> torch.dtype:
        return dtype if kept.isdisjoint(name.split(".")) else torch.float32

    tensors = {key: tensor.detach().to(dtype_of(key), copy=True) for key, tensor in weights.tensors.items()}
    model.load_state_dict(tensors, assign=True)
    device = next(iter(tensors.values())).device
    for name, buffer in model.named_buffers():
        buffer.data = buffer.data.to(device, dtype_of(name) if buffer.is_floating_point() else None)
    return model.eval()


# --- keys -------------------------------------------------------------------------------------------------------------


def expand(table: Iterable[tuple[str, str]], num_units: int, targets: Sequence[int] = ()) -> dict[str, str]:
    """Every key of theirs and its key of ours, for a model of this depth, whose skip j goes to block `targets[j]`."""
    keys: dict[str, str] = {}
    skips = [{"skip": skip, "target": target} for skip, target in enumerate(targets)]
    units = [{"unit": unit} for unit in range(num_units)]
    for theirs, ours in table:
        rows = skips if "{target}" in ours else units if "{unit}" in theirs else [{}]
        for row in rows:
            for parameter in ("weight", "bias"):
                keys[theirs.format(**row).replace("*", parameter)] = ours.format(**row).replace("*", parameter)
    return keys


def roots(keys: Iterable[str]) -> set[str]:
    return {key.split(".")[0] for key in keys}


def indices(keys: Iterable[str], *prefixes: str) -> set[str]:
    """The numbers that follow one of the prefixes and a point."""
    parts = (key.split(".", 2) for key in keys)
    return {part[1] for part in parts if part[0] in prefixes and len(part) == 3 and part[1].isdecimal()}


def fuse(state_dict: StateDict, parts_of: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Tensors that `parts_of` calls parts of a whole, joined along the first axis under the name of the whole."""
    fused = dict(state_dict)
    for whole, parts in parts_of.items():
        for key in [key for key in state_dict if f".{parts[0]}." in key]:
            names = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            refuse(missing=[name for name in names if name not in fused])
            tensors = [fused.pop(name) for name in names]
            if len({tensor.shape[1:] for tensor in tensors}) > 1 or not all(tensor.dim() for tensor in tensors):
                refuse(misshapen=[f"{names[0]} {tuple(tensors[0].shape)} does not go with its siblings"])
            fused[key.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat(tensors)
    return fused


def split(state_dict: StateDict, parts_of: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """The reverse of `fuse`, as views."""
    divided = dict(state_dict)
    for whole, parts in parts_of.items():
        for key in [key for key in state_dict if f".{whole}." in key]:
            shape = tuple(state_dict[key].shape)
            if not shape or shape[0] % len(parts):
                refuse(misshapen=[f"{key} {shape} cannot be divided into {', '.join(parts)}"])
            for part, tensor in zip(parts, divided.pop(key).chunk(len(parts)), strict=True):
                divided[key.replace(f".{whole}.", f".{part}.")] = tensor
    return divided


# --- sizes ------------------------------------------------------------------------------------------------------------


def count_layers(keys: Collection[str], *prefixes: str) -> int:
    """How many layers keys number; `ValueError` where that is too many, or the numbers do not count from 0."""
    numbers = indices(keys, *prefixes)
    if len(numbers) > MAX_LAYERS:
        raise ValueError(f"its keys number {len(numbers):,} layers, at most {MAX_LAYERS} are read")
    gaps = sorted({str(number) for number in range(len(numbers))} - numbers, key=int)
    if gaps:
        refuse(missing=[f"{prefixes[0]}.{number}.*" for number in gaps])
    return len(numbers)


def shape_of(tensors: StateDict, key: str, num_dimensions: int, names: Mapping[str, str] | None = None) -> torch.Size:
    """The shape of a tensor, which must be there and have so many dimensions, none of size 0."""
    name = (names or {}).get(key, key)
    if key not in tensors:
        refuse(missing=[name])
    size = tensors[key].shape
    if len(size) != num_dimensions or 0 in size:
        refuse(misshapen=[f"{name} {tuple(size)} instead of {num_dimensions} dimensions above 0"])
    return size


def mlp_ratio(mlp_size: int, hidden_size: int) -> float:
    """The ratio with `int(ratio * hidden_size) == mlp_size`, also where the product of the quotient rounds below it."""
    ratio = mlp_size / hidden_size
    return ratio if int(ratio * hidden_size) == mlp_size else math.nextafter(ratio, math.inf)


def split_heads(num_layers: int, hidden_size: int, told: int | None, published: Mapping[tuple[int, int], int]) -> dict:
    """The two options of attention; `published` has the number of heads by depth and width."""
    heads = published.get((num_layers, hidden_size)) if told is None else told
    if heads is None:
        raise ValueError(
            f"num_attention_heads must be given: {num_layers} blocks of width {hidden_size} are no published size"
        )
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"num_attention_heads must divide the hidden size {hidden_size}, got {heads}")
    return {"num_attention_heads": heads, "attention_head_dim": hidden_size // heads}


# rows of a class table as it is where no class is dropped in training (class_dropout_prob=0): the number of classes of
# a usual data set
PLAIN_CLASS_COUNTS = (1, 10, 100, 101, 200, 365, 1000)
CLASS_TABLES = ("y_embedder.embedding_table.weight", "class_embedder.weight")  # official, ours


def find_num_classes(noted: Any, tensors: StateDict) -> int | None:
    """Return the number of classes that is noted beside weights, where it is one and fits their class table."""
    tables = [tensors[name] for name in CLASS_TABLES if name in tensors]
    fitting = {len(table) - null for table in tables if table.ndim == 2 for null in (0, 1)}
    return noted if type(noted) is int and noted > 0 and noted in fitting else None


def class_options(num_rows: int, told: int | None) -> dict[str, Any]:
    """The two options of a class table. `ValueError` where only a person can tell whether its last row is the null
    class, or what is told does not fit."""
    if told is None and num_rows in PLAIN_CLASS_COUNTS:
        null = f", or {num_rows - 1} where its last row means no class" if num_rows > 1 else ""
        raise ValueError(
            f"num_classes must be given: the class table has {num_rows} row(s): give {num_rows} where each is a class "
            f"(trained with class_dropout_prob=0, so not for guidance){null}"
        )
    if told is None and num_rows - 1 not in PLAIN_CLASS_COUNTS:
        LOGGER.warning(
            "the last of the %d rows of the class table is taken to mean no class: give num_classes=%d if it is one",
            *(num_rows, num_rows),
        )
    if told not in (None, num_rows, num_rows - 1):
        raise ValueError(
            f"num_classes must be {num_rows}, or {num_rows - 1} and a null class, for a class table of {num_rows} "
            f"row(s), got {told}"
        )
    return {"num_classes": num_rows - 1 if told is None else told, "null_class": told != num_rows}


def read_long_skip(keys: Collection[str], root: str, num_units: int) -> dict[str, Any] | None:
    """Fields of the `LongSkipConfig` that keys of ours tell, all but the fusion."""
    norms = [key for key in keys if ".long_skip.norm." in key]
    num_pairs = len(indices(norms, root))
    if num_pairs == 0:
        return None
    norm = "layer_norm" if any(key.endswith(".bias") for key in norms) else "rms_norm"
    fill = {"fill_token": True} if "fill_token" in keys else {}
    return {"num_pairs": num_pairs if num_pairs < num_units // 2 else None, "norm": norm, **fill}


def with_fusion(long_skip: Mapping[str, Any] | None, fusion: Fusion | None) -> dict[str, Any] | None:
    if long_skip is None:
        return None
    if fusion is None:
        allowed = " or ".join(get_args(Fusion))
        raise ValueError(f"fusion must be given ({allowed}): only an official file or a folder's config.json tells it")
    return {**long_skip, "fusion": fusion}


# --- what is refused --------------------------------------------------------------------------------------------------


def require(holder: str, needs: Iterable[Need]) -> None:
    for name, value, allowed in needs:
        if value not in allowed:
            raise ValueError(
                f"{holder} needs {name} to be {' or '.join(map(repr, allowed))}, got {printable(repr(value))}"
            )


def skip_needs(long_skip: Mapping[str, Any]) -> list[Need]:
    """What the fusion of every official model is."""
    return [
        ("long_skip.fusion", long_skip["fusion"], ("replace",)),
        ("long_skip.norm", long_skip["norm"], ("layer_norm",)),
    ]


def refuse_contradictions(model: Any, told: Told) -> None:
    """`ValueError` where the model is not what it was told to be."""
    config = model.config
    actual = {**config, "fusion": (config.get("long_skip") or {}).get("fusion")}
    if "video_length" in config:  # diffusers' name for num_frames
        actual["num_frames"] = config["video_length"]
    for name, value in vars(told).items():
        if value is not None and name not in actual:
            raise ValueError(f"{name} is no option of a {type(model).__name__}, got {value!r}")
        if value is not None and value != actual[name]:
            raise ValueError(f"{name} is {printable(repr(actual[name]))} in this checkpoint, got {value!r}")


def refuse_keys(expected: Collection[str], found: Collection[str]) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    try:
        refuse(missing=missing, unknown=unknown)
    except ValueError as error:
        if (extra := roots(unknown) & DROPPABLE) and not missing:
            raise ValueError(f"{error}: only training uses them; give drop={min(extra)!r} to leave them out") from error
        raise


def refuse_tensors(expected: StateDict, found: StateDict, names: Mapping[str, str] | None = None) -> None:
    """`ValueError` naming, as the file does, the keys that are missing, unknown, misshapen or integer."""
    names = names or {}
    refuse_keys({names.get(key, key) for key in expected}, {names.get(key, key) for key in found})
    misshapen, integer = [], []
    for key, tensor in found.items():
        name, shape, wanted = names.get(key, key), tuple(tensor.shape), tuple(expected[key].shape)
        if shape != wanted:
            misshapen.append(f"{name} {shape} instead of {wanted}")
        if not tensor.is_floating_point():
            integer.append(f"{name} {tensor.dtype}")
    refuse(misshapen=misshapen, integer=integer)


def refuse(**problems: list[str]) -> None:
    found = [f"{len(keys)} {problem} key(s): {list_first(keys)}" for problem, keys in problems.items() if keys]
    if found:
        raise ValueError("; ".join(found))


def refuse_other_table(key: str, found: Tensor, table: Tensor) -> None:
    """`ValueError` unless a tensor is this sine-cosine table, as far as its precision holds it."""
    if not found.is_floating_point():
        refuse(integer=[f"{key} {found.dtype}"])
    if found.shape != table.shape or not found.numel():
        refuse(misshapen=[f"{key} {tuple(found.shape)} instead of {tuple(table.shape)}, above 0"])
    tolerance = max(TABLE_TOLERANCE, torch.finfo(found.dtype).eps)
    difference = (found.float() - table.to(found.device)).abs().max().item()
    if not difference <= tolerance:
        raise ValueError(f"{key} must be the sine-cosine table within {tolerance}, is {difference} off")
