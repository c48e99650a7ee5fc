"""One call of a model, run under one or several plans; outputs of CUDA graphs are copied."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipdit.cache.whole import WholeModel, form_of, map_tensors, restored, values_of
from skipdit.models.class_swap import hooked
from skipdit.models.forward_plan import ForwardPlan, Region, Stored
from skipdit.models.long_skip import LongSkipModel, PlannedOutput

MAX_GRAPHS = 64
"""By default `torch.compile` makes at most 8 graphs of one forward; here each plan has one per set of shapes."""


@dataclass
class Call:
    """A forward call of a cached model."""

    model: nn.Module
    run: Callable[..., Any]
    """Calls the model with `args` and `kwargs`, and takes `plan` and `stored` too."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    device: torch.device
    compiled_plans: set[ForwardPlan]
    """Plans whose graphs have run with these shapes."""
    latents: Any
    """Its noisy latents, a tensor or a list of tensors."""
    noise: Callable[[], float]
    """Returns the share of noise in them, from 0 to 1."""
    forms: dict[Any, Any]
    """By `return_dict`, the form of the model's output, once it is known."""
    return_dict: Any = True
    """The argument of that name."""
    first_output: list[Tensor] | None = None
    """The output of the guidance branch that was called first at this step; `None` if that is this call, or unknown."""

    def can_reuse(self, region: Region) -> bool:
        """Return true if the model can be left out: the form of its output is known, and what it is added to."""
        if not isinstance(region, WholeModel):
            return True
        return self.return_dict in self.forms and self._input_of(region) is not None

    def _input_of(self, region: WholeModel) -> Any:
        return self.first_output if region.beside_first else self.latents

    @property
    def is_compiled(self) -> bool:
        return self.model._compiled_call_impl is not None  # private to torch: `model.compile()` sets it

    def __call__(self, plan: ForwardPlan, stored: Stored | None = None) -> PlannedOutput:
        """Run the model under a plan. stored: the values that the plan reuses, by region. A plan that stores or reuses
        the whole model has no other region."""
        for region in plan.reuse:
            if isinstance(region, WholeModel):
                assert stored is not None
                return PlannedOutput(
                    restored(stored[region.name], self._input_of(region), self.forms[self.return_dict]), {}
                )
        for region in plan.store:
            if isinstance(region, WholeModel):
                output, entering = self.plain(), self._input_of(region)
                self.forms[self.return_dict] = form_of(output)
                return PlannedOutput(output, {region.name: {} if entering is None else values_of(output, entering)})
        replays, is_new = (
            self.is_compiled and may_replay(self.device),
            self.is_compiled and plan not in self.compiled_plans,
        )
        if replays:
            torch.compiler.cudagraph_mark_step_begin()
        with more_graphs() if is_new else nullcontext():
            output, found = self._planned(plan, stored)
        if is_new:
            self.compiled_plans.add(plan)
        if torch.is_grad_enabled():
            found = _map_stored(found, Tensor.detach)
        if replays:  # the graph overwrites its outputs at the next replay
            output, found = map_tensors(output, Tensor.clone), _map_stored(found, Tensor.clone)
        return PlannedOutput(output, found)

    def _planned(self, plan: ForwardPlan, stored: Stored | None) -> PlannedOutput:
        """Run the model under a plan. Hooks on a diffusers model, as for context parallelism, see its plain output."""
        open_call = self.model.open_call if isinstance(self.model, LongSkipModel) else None
        if open_call is None or not hooked((self.model,)):
            return self.run(*self.args, **self.kwargs, plan=plan, stored=stored)
        open_call.aside = True
        try:
            output = self.run(*self.args, **self.kwargs, plan=plan, stored=stored)
            return output if isinstance(output, PlannedOutput) else PlannedOutput(output, open_call.stored)
        finally:
            open_call.aside, open_call.stored = False, {}

    def plain(self) -> Any:
        """Run the model in full, without a plan."""
        replays = self.is_compiled and may_replay(self.device)
        if replays:
            torch.compiler.cudagraph_mark_step_begin()
        output = self.run(*self.args, **self.kwargs)
        return map_tensors(output, Tensor.clone) if replays else output

    @property
    def has_graphs(self) -> bool:
        """True if the model or any module of it is compiled, as after `model.compile_repeated_blocks()`."""
        return any(module._compiled_call_impl is not None for module in self.model.modules())

    def eager(self) -> Any:
        """Run the model in full and without any graphs."""
        compiled = [module for module in self.model.modules() if module._compiled_call_impl is not None]
        graphs = {module: module._compiled_call_impl for module in compiled}
        try:
            for module in compiled:
                module._compiled_call_impl = None
            return self.run(*self.args, **self.kwargs)
        finally:
            for module, graph in graphs.items():
                module._compiled_call_impl = graph


def may_replay(device: torch.device) -> bool:
    """Return true if a function compiled for this device may run as a CUDA graph."""
    return device.type == "cuda"


def _map_stored(stored: Stored, change: Callable[[Tensor], Tensor]) -> dict[str, dict[str, Tensor]]:
    return {name: {key: change(value) for key, value in values.items()} for name, values in stored.items()}


@contextmanager
def more_graphs() -> Iterator[None]:
    """Let torch compile up to `MAX_GRAPHS` graphs of one forward inside the block."""
    config: Any = torch._dynamo.config
    before = config.recompile_limit
    config.recompile_limit = max(before, MAX_GRAPHS)
    try:
        yield
    finally:
        config.recompile_limit = before
