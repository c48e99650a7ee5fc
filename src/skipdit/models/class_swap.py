"""Gives a module another class and undoes it, also if offloading has hooks on its forward.

The private parts of accelerate (`_hf_hook`, `_old_forward`) and diffusers (`_diffusers_hook`) that this needs are here.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, cast

from torch import nn


def swapped_class(mixin: type, base: type, **namespace: Any) -> type:
    """Return a final subclass of the same name, so that a saved config names the model."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names | namespace)


def swap(module: nn.Module, new_class: type) -> None:
    """Give a module another class; hooks of accelerate on it then run the forward of that class."""
    cast(Any, module).__class__ = new_class
    attributes = vars(module)
    if _is_own_method(module, attributes.get("forward")):  # left by a hook that was removed
        del attributes["forward"]
    if _is_own_method(module, attributes.get("_old_forward")):
        attributes["_old_forward"] = MethodType(new_class.forward, module)


def _is_own_method(module: nn.Module, value: Any) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module


def refuse_hooked(modules: Iterable[nn.Module]) -> None:
    """Raise `ValueError` if hooks that skipdit cannot keep have replaced the forward of a module."""
    found = hooked(modules)
    if found is not None:
        raise ValueError(
            f"hooks of diffusers are on the forward of this {type(found).__name__} (group offloading, layerwise "
            "casting, context parallelism or a cache): remove them, call skipdit, then set them up again"
        )


def hooked(modules: Iterable[nn.Module]) -> nn.Module | None:
    """Return the first module whose forward was replaced by hooks other than accelerate's (CPU offloading)."""
    for module in modules:
        fields = vars(module)
        if "forward" in fields and "_hf_hook" not in fields and not _is_own_method(module, fields["forward"]):
            return module
    return None


class SwapMixin:
    """Mixin that pickles and copies instances of a swapped class, which no module names, by how the class is made."""

    _made_by: tuple[Callable[[Any], type], type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, (_, *rest), *state = super().__reduce_ex__(max(protocol, 2))
        return _remake, (_recipe(type(self)), *rest), *state


def _recipe(cls: type) -> Any:
    """Return a class that a module names, or (function, recipe of the class that it is applied to)."""
    made_by = vars(cls).get("_made_by")
    return cls if made_by is None else (made_by[0], _recipe(made_by[1]))


def _class_of(recipe: Any) -> type:
    return recipe[0](_class_of(recipe[1])) if isinstance(recipe, tuple) else recipe


def _remake(recipe: Any, *rest: Any) -> Any:
    cls = _class_of(recipe)
    return cls.__new__(cls, *rest)
