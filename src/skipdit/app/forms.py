"""Checks of the numbers in a form."""

import math

from skipdit.files.untrusted import as_type_or_none


def check_form(form: object, **limits: tuple[str, float, float]) -> None:
    """Raise `ValueError` if a field of a form is no number, or out of range. limits: by field, what the page calls it,
    and the smallest and the largest value."""
    for field, (label, least, most) in limits.items():
        value = as_type_or_none(getattr(form, field), float)
        if value is None or not math.isfinite(value):
            raise ValueError(f"{label} must be a number from {least:g} to {most:g}")
        if not least <= value <= most:
            raise ValueError(f"{label} must be from {least:g} to {most:g}, got {value:g}")
