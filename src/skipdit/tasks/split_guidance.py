"""Shallow guidance in pipelines of diffusers that make both predictions in one batch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipdit.interfaces import Pipeline
from skipdit.models.forward_plan import ForwardPlan
from skipdit.models.long_skip import LongSkipModel
from skipdit.models.shallow_path import Guidance, guidance_plan
from skipdit.models.surgery import close_units, open_units
from skipdit.pipelines import ShallowGuidance


class SplitGuidance(nn.Module):
    """A stand-in for the transformer of a diffusers pipeline whose batches have an unconditional and a conditional
    half: it calls the transformer once per half, under a plan for the unconditional one. All other attributes are those
    of the transformer."""

    def __init__(self, model: nn.Module, plan: ForwardPlan) -> None:
        super().__init__()
        self.model, self.shallow = model, ShallowGuidance(model, plan)
        self.known: dict[int | str, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the output of the transformer with `return_dict=False`."""
        num_rows = len(args[0] if args else kwargs["hidden_states"])
        positional = [self._halves(name, value, num_rows) for name, value in enumerate(args)]
        named = {name: self._halves(name, value, num_rows) for name, value in kwargs.items()}
        first, second = (
            ([halves[index] for halves in positional], {name: halves[index] for name, halves in named.items()})
            for index in range(2)
        )
        (conditional,) = self.model(*second[0], **second[1])
        conditional, unconditional = self.shallow(conditional, *first[0], **first[1])
        return (torch.cat([unconditional, conditional]),)

    def _halves(self, name: int | str, value: object, num_rows: int) -> tuple[object, object]:
        """Return the value of an argument for each of the two calls. While the argument is the same object, so are its
        halves, by which a cache recognizes its streams."""
        match value:
            case Tensor() if value.ndim and value.shape[0] == num_rows:
                if name not in self.known or self.known[name][0] is not value:
                    first, second = value.chunk(2)
                    # copied, because a cache would take half of a batch of timesteps for an entry in a scheduler's
                    # list; a single timestep expanded over the rows is one
                    halves = (first.clone(), second.clone()) if value.stride(0) else (first, second)
                    self.known[name] = value, halves
                return self.known[name][1]
        return value, value


@contextmanager
def split_guidance(
    pipeline: Pipeline, guidance: Guidance, num_shallow_units: int | None, guidance_scale: float
) -> Iterator[Pipeline]:
    """Yield a diffusers pipeline: itself for `"full"` guidance, otherwise a copy that shares all parts and makes its
    unconditional predictions with few units. `ValueError` if its transformer cannot."""
    model: nn.Module = pipeline.transformer
    is_opened_here = guidance != "full" and LongSkipModel.find(model) is None
    if is_opened_here:
        open_units(model)
    try:
        plan = guidance_plan(cast(LongSkipModel, model), guidance, num_shallow_units, guidance_scale)
        if plan is not None:
            pipeline = copy.copy(pipeline)
            pipeline.register_modules(transformer=SplitGuidance(model, plan))
        yield pipeline
    finally:
        if is_opened_here:
            close_units(model)
