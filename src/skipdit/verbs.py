"""What a model does through parts of skipdit that stand above it, which the package hands in when it is imported."""

from collections.abc import Callable, Mapping
from typing import Any

_VERBS: dict[str, Callable[..., Any]] = {}


def provide(verbs: Mapping[str, Callable[..., Any]]) -> None:
    """Say what carries out each verb."""
    _VERBS.update(verbs)


def carry_out(verb: str, *args: Any) -> Any:
    """Call what carries out a verb."""
    return _VERBS[verb](*args)
