"""The names that options take, and checks that name a bad value in the same words; nothing heavy is imported."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, Literal

TaskName = Literal["class-to-image", "class-to-video", "text-to-image", "text-to-video"]
DTypeName = Literal["float32", "bfloat16", "float16"]
ObjectiveName = Literal["epsilon", "v_prediction", "flow", "sit", "repa"]
Guidance = Literal["full", "shallow"]
Fusion = Literal["replace", "residual"]

MAX_SEED = 2**63 - 1


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the allowed name nearest to this one, or nothing where none is near."""
    near = difflib.get_close_matches(name[:100].lower(), list(allowed), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_numbers(config: Any) -> None:
    """Raise `ValueError` where a field, or an entry of one, is NaN or infinite, or a seed is none of PyTorch's."""
    for field in fields(config):
        value = getattr(config, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise ValueError(f"{field.name} must be finite, got {each}")
        if field.name.endswith("seed") and not 0 <= getattr(config, field.name) <= MAX_SEED:
            raise ValueError(f"{field.name} must be between 0 and {MAX_SEED}, got {value}")


def check_positive(config: Any, *names: str) -> None:
    """Raise `ValueError` where one of these fields is below 1; `None` passes."""
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def check_choice(name: str, chosen: Sequence[Any], allowed: Sequence[Any]) -> None:
    """Raise `ValueError` unless each of what was chosen is allowed and there once."""
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(allowed):
        raise ValueError(f"{name} must be one or more of {', '.join(map(str, allowed))}, each once, got {chosen!r}")
