"""Opens the attentions and MLPs of a model, ours or diffusers', so that their outputs can be stored and reused.

By *class swap*: an open branch is an instance of a final subclass made from (mixin, its class). The keys of the weights
stay, a copy of the model is a model of its own, and `torch.compile` sees one plain forward.
"""

from functools import lru_cache
from typing import Any, cast

from torch import nn

from skipdit.models.class_swap import SwapMixin, hooked, refuse_hooked, swap, swapped_class
from skipdit.models.long_skip import LongSkipModel, OpenCall


class UnitBranch(SwapMixin, nn.Module):
    """Mixed in front of the class of an attention or MLP of a block: its output can be stored and reused."""

    _branch: tuple[str, int, str]  # kind, unit, name
    _open: OpenCall

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self._open.state
        if state is None or not state.plan.has_branches:
            return super().forward(*args, **kwargs)
        run = super().forward
        entering = args[0] if args else next(iter(kwargs.values()), None)
        return state.branch(*self._branch, entering, lambda: run(*args, **kwargs))


@lru_cache
def _branch_class(base: type[nn.Module]) -> type[UnitBranch]:
    return swapped_class(UnitBranch, base, _made_by=(_branch_class, base))


def open_branches(model: LongSkipModel) -> None:
    """Make the branches of a model ones that can be stored and reused; its output stays the same.

    `ValueError` where hooks are on the forward of one (offloading: set it up afterwards).
    """
    places = model.branches()
    refuse_hooked(place.module for place in places if not isinstance(place.module, UnitBranch))
    model.open_call = model.open_call or OpenCall(for_branches=True)
    for place in places:
        module = cast(Any, place.module)
        if not isinstance(module, UnitBranch):
            swap(module, _branch_class(type(module)))
        module._branch, module._open = (place.kind, place.unit, place.name), model.open_call


def close_branches(model: LongSkipModel) -> None:
    """Undo `open_branches`. Where hooks were set since, or another class stands on top (`fully_shard`), a branch stays
    open, which changes no output."""
    still_open = False
    for place in model.branches():
        module = cast(Any, place.module)
        if type(module).__bases__[0] is UnitBranch and hooked([module]) is None:
            swap(module, type(module).__bases__[1])
            del module._branch, module._open
        still_open |= isinstance(module, UnitBranch)
    if model.open_call is not None and model.open_call.for_branches and not still_open:
        del model.open_call
