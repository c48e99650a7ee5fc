"""One call of a model, run under one or several plans; outputs of CUDA graphs are copied."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipdit.cache.whole import form_of, map_tensors, restored, values_of
from skipdit.interfaces import Fields, Latents, ModelOutput
from skipdit.models.class_swap import hooked
from skipdit.models.forward_plan import ForwardPlan, Region, Stored
from skipdit.models.long_skip import LongSkipModel, PlannedOutput

MAX_GRAPHS = 64
"""By default `torch.compile` makes at most 8 graphs of one forward; here each plan has one per set of shapes."""


@dataclass
class Call:
    """A forward call of a cached model."""

    model: nn.Module
    run: Callable[..., ModelOutput]
    """Calls the model with `args` and `kwargs`, and takes `plan` and `stored` too."""
    args: tuple[object, ...]
    kwargs: Fields
    device: torch.device
    compiled_plans: set[ForwardPlan]
    """Plans whose graphs have run with these shapes."""
    latents: Latents
    """Its noisy latents."""
    noise: Callable[[], float]
    """Returns the share of noise in them, from 0 to 1."""
    forms: dict[bool, ModelOutput]
    """By `return_dict`, the form of the model's output, once it is known."""
    base: Latents | None
    """The values from which the reuse of the whole model starts: the latents, or the output of the guidance branch that
    was called first at this step; `None` if that branch is this call, or unknown."""
    return_dict: bool = True
    """The argument of that name."""

    def can_reuse(self, region: Region) -> bool:
        """Return true if the model can be left out: the form of its output is known, and what it is added to."""
        return not region.is_whole or (self.return_dict in self.forms and self.base is not None)

    @property
    def is_compiled(self) -> bool:
        return self.model._compiled_call_impl is not None  # private to torch: `model.compile()` sets it

    def __call__(self, plan: ForwardPlan, stored: Stored | None = None) -> PlannedOutput:
        """Run the model under a plan. stored: the values that the plan reuses, by region. A plan that stores or reuses
        the whole model has no other region."""
        for region in plan.reuse:
            if region.is_whole:
                assert stored is not None
                return PlannedOutput(restored(stored[region.name], self.base, self.forms[self.return_dict]), {})
        for region in plan.store:
            if region.is_whole:
                output = self.plain()
                self.forms[self.return_dict] = form_of(output)
                return PlannedOutput(output, {region.name: {} if self.base is None else values_of(output, self.base)})
        replays = self.is_compiled and may_replay(self.device)
        is_new = self.is_compiled and plan not in self.compiled_plans
        if replays:
            torch.compiler.cudagraph_mark_step_begin()
        with more_graphs() if is_new else nullcontext():
            output, values = self._planned(plan, stored)
        if is_new:
            self.compiled_plans.add(plan)
        if torch.is_grad_enabled():
            values = _map_stored(values, Tensor.detach)
        if replays:  # the graph overwrites its outputs at the next replay
            output, values = map_tensors(output, Tensor.clone), _map_stored(values, Tensor.clone)
        return PlannedOutput(output, values)

    def _planned(self, plan: ForwardPlan, stored: Stored | None) -> PlannedOutput:
        """Run the model under a plan. Hooks on a diffusers model, as for context parallelism, see its plain output."""
        linked = LongSkipModel.find(self.model)
        open_call = None if linked is None else linked.open_call
        if open_call is None or not hooked((self.model,)):
            return self.run(*self.args, **self.kwargs, plan=plan, stored=stored)
        open_call.aside = True
        try:
            output = self.run(*self.args, **self.kwargs, plan=plan, stored=stored)
            return output if isinstance(output, PlannedOutput) else PlannedOutput(output, open_call.stored)
        finally:
            open_call.aside, open_call.stored = False, {}

    def plain(self) -> ModelOutput:
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

    def eager(self) -> ModelOutput:
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


def more_graphs() -> AbstractContextManager[None]:
    """Let torch compile up to `MAX_GRAPHS` graphs of one forward inside the block."""
    config = torch._dynamo.config
    return config.patch(recompile_limit=max(config.recompile_limit, MAX_GRAPHS))
