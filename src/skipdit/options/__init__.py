"""Names that options take, and checks with uniform messages; nothing heavy is imported."""

import difflib
import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal, get_args, get_origin, get_type_hints

import tyro

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Device = Literal["cpu", "cuda"]
DTypeName = Literal["float32", "bfloat16", "float16"]
ObjectiveName = Literal["epsilon", "v_prediction", "flow", "sit", "repa"]
Guidance = Literal["full", "shallow"]
Fusion = Literal["replace", "residual"]
OnBroken = Literal["refuse", "skip"]
NumInferenceSteps = Annotated[int, tyro.conf.arg(aliases=("--steps",))]
NumInferenceStepsOrDefault = Annotated[int | None, tyro.conf.arg(aliases=("--steps",))]

MAX_SEED = 2**63 - 1
MAX_PIXELS = 50 * 2**20  # of a decoded picture
MAX_SIDE = math.isqrt(MAX_PIXELS)  # of resized pictures
MAX_ORDER = 4  # of the predictions of a cache


def choose(what: str, name: str, allowed: Iterable[str]) -> str:
    """Return a name if it is allowed; otherwise raise `ValueError` with the allowed names, and the nearest one."""
    if name in (names := list(allowed)):
        return name
    near = difflib.get_close_matches(name[:100].lower(), names, n=1)
    raise ValueError(
        f"{what} must be one of {', '.join(names)}, got {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    )


def check_installed(what: str, extra: str, *modules: str) -> None:
    """Raise `ValueError`, with the command to install them, if optional modules are missing. what: who needs them."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ValueError(f'{what} {" and ".join(missing)}: pip install "skipdit[{extra}]"')


def check_numbers(config: "DataclassInstance") -> None:
    """Raise `ValueError` if a field, or an entry of one, is NaN or infinite, or a seed is out of PyTorch's range."""
    for field in fields(config):
        value = getattr(config, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise ValueError(f"{field.name} must be finite, got {each}")
        if field.name.endswith("seed") and not 0 <= getattr(config, field.name) <= MAX_SEED:
            raise ValueError(f"{field.name} must be between 0 and {MAX_SEED}, got {value}")


@lru_cache
def _choices(kind: type) -> dict[str, tuple[tuple, bool]]:
    """Return, by field of a dataclass, the values that its type lists, and whether it is a tuple of them."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        is_tuple = get_origin(hint) is tuple
        listed = [each for each in (hint, *get_args(hint)) if get_origin(each) is Literal]
        if listed and (is_tuple or hint is listed[0] or type(None) in get_args(hint)):
            found[name] = get_args(listed[0]), is_tuple
    return found


def check_fields(config: "DataclassInstance") -> None:
    """Raise `ValueError` as `check_numbers` does, and on values that the `Literal` of a field does not list."""
    check_numbers(config)
    for name, (allowed, is_tuple) in _choices(type(config)).items():
        if is_tuple:
            check_choice(name, getattr(config, name), allowed)
        else:
            check_option(config, name, allowed)


def check_choice(name: str, chosen: Sequence, allowed: Sequence) -> None:
    """Raise `ValueError` unless all choices are allowed and different, and there is at least one."""
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(allowed):
        raise ValueError(f"{name} must be one or more of {', '.join(map(str, allowed))}, each once, got {chosen!r}")


def check_range(config: "DataclassInstance", *names: str, least: float = 1, most: float = math.inf) -> None:
    """Raise `ValueError` if one of these fields is below `least` or above `most`; `None` passes."""
    for name in names:
        if (value := getattr(config, name)) is not None and not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise ValueError(f"{name} must be {bound}, got {value}")


def check_above(config: "DataclassInstance", *names: str) -> None:
    """Raise `ValueError` if one of these fields is not above 0; `None` passes."""
    for name in names:
        if (value := getattr(config, name)) is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")


def check_option(config: "DataclassInstance", name: str, allowed: Sequence) -> None:
    """Raise `ValueError` unless this field is one of the allowed values; `None` passes."""
    value = getattr(config, name)
    if value is not None and value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def check_per_item(name: str, values: Sequence[int], count: int) -> None:
    """Raise `ValueError` unless there are as many numbers above 0 as items, or none."""
    if values and (len(values) != count or min(values) < 1):
        raise ValueError(f"{name} must be {count} numbers above 0 or none, got {values}")
