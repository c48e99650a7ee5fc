"""Opens the attention and MLP branches of a model, ours or diffusers', so that their outputs can be stored and reused.

This is a *class swap*: an open branch is an instance of a final subclass of (mixin, its class). Weight keys stay the
same, a copy of the model is independent, and `torch.compile` sees one plain forward.
"""

from functools import lru_cache
from typing import Any, cast

from torch import nn

from skipdit.models.class_swap import SwapMixin, hooked, refuse_hooked, swap, swapped_class
from skipdit.models.long_skip import LongSkipModel, OpenCall


class UnitBranch(SwapMixin, nn.Module):
    """Mixin for the class of an attention or MLP, whose output can then be stored and reused."""

    _branch: tuple[str, int, str]  # kind, unit, name
    _open: OpenCall

    def forward(self, *args: object, **kwargs: object) -> Any:
        state = self._open.state
        if state is None or not state.plan.has_branches:
            return super().forward(*args, **kwargs)
        run = super().forward
        first_input = args[0] if args else next(iter(kwargs.values()), None)
        return state.branch(*self._branch, first_input, lambda: run(*args, **kwargs))


@lru_cache
def _branch_class(base: type[nn.Module]) -> type[UnitBranch]:
    return swapped_class(UnitBranch, base, _made_by=(_branch_class, base))


def open_branches(model: LongSkipModel) -> None:
    """Open a model's branches, so that their outputs can be stored and reused; the model's output does not change.

    Raises `ValueError` if the forward of a branch is hooked: set up offloading afterwards.
    """
    branches = model.branches()
    modules = dict.fromkeys(branch.module for branch in branches)
    closed = [module for module in modules if not isinstance(module, UnitBranch)]
    refuse_hooked(closed)
    model.open_call = model.open_call or OpenCall(for_branches=True)
    for module in closed:
        swap(module, _branch_class(type(module)))
    for branch in branches:
        module = cast(UnitBranch, branch.module)
        module._branch, module._open = (branch.kind, branch.unit, branch.name), model.open_call


def close_branches(model: LongSkipModel) -> None:
    """Undo `open_branches`. A branch that has since been hooked or given another class (`fully_shard`) stays open,
    which does not change its output."""
    for branch in model.branches():
        module = branch.module
        if type(module).__bases__[0] is UnitBranch and hooked([module]) is None:
            swap(module, type(module).__bases__[1])
            del module._branch, module._open
    still_open = any(isinstance(branch.module, UnitBranch) for branch in model.branches())
    if model.open_call is not None and model.open_call.for_branches and not still_open:
        del model.open_call
