"""Shallow guidance: the unconditional predictions of a run, made by the shallow path of its model."""

from typing import Any

from torch import Tensor, nn

from skipdit.cache.enable import last_stream
from skipdit.cache.state import Counts
from skipdit.cache.streams import Stream
from skipdit.models.forward_plan import ForwardPlan, Units


class ShallowGuidance:
    """Makes the unconditional predictions of one run, each beside the conditional one of its step.

    Where a cache let the conditional prediction reuse, it is stale, and a fresh one beside it would make their
    difference wrong, which guidance multiplies. There the difference is held that the last full step had, and nothing
    runs. (FasterCache, arXiv 2410.19355, holds that of full guidance, by frequencies.)

    plan: of the model's `ShallowPath`. held: under a cache, the stream of the conditional predictions, the number of
    its full steps so far, and the difference at the last of them.
    """

    def __init__(self, model: nn.Module, plan: ForwardPlan) -> None:
        assert plan.route is not None
        self.model, self.plan = model, plan
        self.left_out = Units(start=plan.route.start, stop=plan.route.stop)
        self.held: tuple[Stream, int, Tensor] | None = None

    def __call__(self, conditional: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the conditional prediction, which the model's last call made, and the unconditional one of the same
        shape. args, kwargs: what the model makes that of."""
        stream = last_stream(self.model)
        if stream is not None and self.held is not None and self.held[:2] == (stream, stream.counts.full):
            stream.counts += Counts(held=1)
            return conditional, conditional - self.held[2]
        conditional = conditional.clone()  # the next call of a CUDA graph would overwrite it
        unconditional = self.model(*args, **kwargs, plan=self.plan).output[0].to(conditional.dtype)
        if stream is not None:
            assert stream.costs is not None
            stream.counts += Counts(shallow=1, cost=stream.costs.of_step((self.left_out,)))
            self.held = stream, stream.counts.full, conditional - unconditional
        return conditional, unconditional
