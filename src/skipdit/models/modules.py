"""Modules of a kind within a model."""

from typing import TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def modules_of(model: nn.Module, kind: type[Kind]) -> list[Kind]:
    """Return the modules of a class in a model, including the model itself, in the order in which it lists them."""
    return [module for module in model.modules() if isinstance(module, kind)]
