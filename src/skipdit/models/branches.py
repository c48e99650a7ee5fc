"""Opens the attentions and MLPs of a model, ours or diffusers', so that their outputs can be stored and reused.

By *class swap*: an open branch is an instance of a final subclass made from (mixin, its class). Weight keys stay the
same, a copy of the model is independent, and `torch.compile` sees one plain forward.
"""

from functools import lru_cache
from typing import Any, cast

from torch import nn

from skipdit.models.class_swap import SwapMixin, hooked, refuse_hooked, swap, swapped_class
from skipdit.models.long_skip import LongSkipModel, OpenCall


class UnitBranch(SwapMixin, nn.Module):
    """Mixin before the class of an attention or MLP of a block: its output can be stored and reused."""

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
    """Make the outputs of a model's branches ones that can be stored and reused; the model's output stays the same.

    Raises `ValueError` if hooks are on the forward of a branch (offloading: set it up afterwards).
    """
    branches = model.branches()
    refuse_hooked(branch.module for branch in branches if not isinstance(branch.module, UnitBranch))
    model.open_call = model.open_call or OpenCall(for_branches=True)
    for branch in branches:
        module = cast(Any, branch.module)
        if not isinstance(module, UnitBranch):
            swap(module, _branch_class(type(module)))
        module._branch, module._open = (branch.kind, branch.unit, branch.name), model.open_call


def close_branches(model: LongSkipModel) -> None:
    """Undo `open_branches`. A branch stays open, which changes no output, if hooks were set on it since, or another
    class is on top of it (`fully_shard`)."""
    still_open = False
    for branch in model.branches():
        module = cast(Any, branch.module)
        if type(module).__bases__[0] is UnitBranch and hooked([module]) is None:
            swap(module, type(module).__bases__[1])
            del module._branch, module._open
        still_open |= isinstance(module, UnitBranch)
    if model.open_call is not None and model.open_call.for_branches and not still_open:
        del model.open_call
