"""Checks of what a person asks for, so that every config names a bad value in the same words."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

MAX_SEED = 2**63 - 1


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
