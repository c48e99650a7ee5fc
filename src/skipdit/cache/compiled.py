"""One call of a model, made under one or several plans; what a CUDA graph returns is copied."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from skipdit.models.forward_plan import ForwardPlan, Stored
from skipdit.models.long_skip import PlannedOutput

MAX_GRAPHS = 64
"""By default `torch.compile` makes at most 8 graphs of one forward; here each plan has one per kind of shapes."""


@dataclass
class Call:
    """A forward call of a cached model.

    run: calls the model, and takes `plan` and `stored` in addition to its arguments. seen: the plans whose graphs have
    been called with these shapes.
    """

    model: nn.Module
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    device: torch.device
    seen: set[ForwardPlan]

    @property
    def is_compiled(self) -> bool:
        return self.model._compiled_call_impl is not None  # private to torch: `model.compile()` sets it

    def __call__(self, plan: ForwardPlan, stored: Stored | None = None) -> PlannedOutput:
        """Run the model under a plan. stored: what the plan reuses, by region."""
        replays, is_new = self.is_compiled and may_replay(self.device), self.is_compiled and plan not in self.seen
        if replays:
            torch.compiler.cudagraph_mark_step_begin()
        with more_graphs() if is_new else nullcontext():
            output, found = self.run(*self.args, **self.kwargs, plan=plan, stored=stored)
        if is_new:
            self.seen.add(plan)
        if torch.is_grad_enabled():
            found = _each(found, Tensor.detach)
        if replays:  # the graph overwrites its outputs at the next replay
            output, found = map_tensors(output, Tensor.clone), _each(found, Tensor.clone)
        return PlannedOutput(output, found)

    @property
    def has_graphs(self) -> bool:
        """Whether the model or any part of it is compiled, as after `model.compile_repeated_blocks()`."""
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
    """Whether what is compiled for this device may have become a CUDA graph."""
    return device.type == "cuda"


def _each(stored: Stored, change: Callable[[Tensor], Tensor]) -> dict[str, dict[str, Tensor]]:
    return {name: {key: change(value) for key, value in values.items()} for name, values in stored.items()}


def map_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a model's output with every tensor in it changed."""
    match output:
        case Tensor():
            return change(output)
        case BaseOutput():
            return type(output)(**{key: map_tensors(value, change) for key, value in output.items()})
        case list() | tuple():
            return type(output)(map_tensors(each, change) for each in output)
    return output


@contextmanager
def more_graphs() -> Iterator[None]:
    """Let torch compile as many graphs as there may be plans."""
    config: Any = torch._dynamo.config
    before = config.recompile_limit
    config.recompile_limit = max(before, MAX_GRAPHS)
    try:
        yield
    finally:
        config.recompile_limit = before
