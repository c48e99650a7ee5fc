"""What people type into the fields of a form."""

import math


def whole(told: str, value: object, least: int, most: int) -> int:
    """Return a whole number. `ValueError` where it is none, or out of range. told: what the field is called."""
    found = number(told, value, least, most)
    if found != int(found):
        raise ValueError(f"{told} must be a whole number, got {found:g}")
    return int(found)


def number(told: str, value: object, least: float, most: float) -> float:
    """Return a number. `ValueError` where it is none, or out of range. told: what the field is called."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{told} must be a number from {least:g} to {most:g}")
    if not least <= value <= most:
        raise ValueError(f"{told} must be from {least:g} to {most:g}, got {value:g}")
    return value
