"""Changes the class of a module and changes it back, even if offloading has hooked its forward.

All use of accelerate's private `_hf_hook` and `_old_forward` is here.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, cast

from torch import nn


def swapped_class(mixin: type, base: type, **namespace: Any) -> type:
    """Return a final subclass with the name of `base`, which a saved config then names."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names | namespace)


def swap(module: nn.Module, new_class: type) -> None:
    """Give a module another class; accelerate's hooks on it then run the forward of that class."""
    cast(Any, module).__class__ = new_class
    attributes = vars(module)
    if _is_own_method(module, attributes.get("forward")):  # left by a hook that was removed
        del attributes["forward"]
    if _is_own_method(module, attributes.get("_old_forward")):
        attributes["_old_forward"] = MethodType(new_class.forward, module)


def _is_own_method(module: nn.Module, value: object) -> bool:
    return getattr(value, "__self__", None) is module


def refuse_hooked(modules: Iterable[nn.Module]) -> None:
    """Raise `ValueError` if hooks that skipdit cannot keep have replaced the forward of a module."""
    hooked_module = hooked(modules)
    if hooked_module is not None:
        raise ValueError(
            f"diffusers has hooked the forward of this {type(hooked_module).__name__} (group offloading, layerwise "
            "casting, context parallelism or a cache): remove the hooks, call skipdit, then set them up again"
        )


def hooked(modules: Iterable[nn.Module]) -> nn.Module | None:
    """Return the first module whose forward was replaced by hooks other than accelerate's CPU offloading."""
    for module in modules:
        fields = vars(module)
        if "forward" in fields and "_hf_hook" not in fields and not _is_own_method(module, fields["forward"]):
            return module
    return None


class SwapMixin:
    """Mixin that lets instances of a swapped class, which no module exports, be pickled and copied: it stores how the
    class was made."""

    _made_by: tuple[Callable[[Any], type], type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, (_, *rest), *state = super().__reduce_ex__(max(protocol, 2))
        return _remake, (_recipe(type(self)), *rest), *state


def _recipe(cls: type) -> Any:
    """Return an importable class itself, or for a swapped class (function that makes it, recipe of its base)."""
    made_by = vars(cls).get("_made_by")
    return cls if made_by is None else (made_by[0], _recipe(made_by[1]))


def _class_of(recipe: Any) -> type:
    match recipe:
        case (make, base):
            return make(_class_of(base))
    return recipe


def _remake(recipe: Any, *rest: Any) -> Any:
    cls = _class_of(recipe)
    return cls.__new__(cls, *rest)
