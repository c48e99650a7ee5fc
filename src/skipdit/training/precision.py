"""The precision of products, and what fp16 needs beside it."""

from typing import Annotated, TypedDict

import torch
from msgspec import Meta
from torch import Tensor

from skipdit.environment import has_bf16
from skipdit.training.config import Precision


def computes_in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether products are computed in bf16: `"auto"` says yes where the device has instructions for it."""
    return has_bf16(device) if precision == "auto" else precision == "bf16"


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return what products are computed in; `None` where that is float32."""
    if precision == "fp16":
        return torch.float16
    return torch.bfloat16 if computes_in_bf16(precision, device) else None


class ScaleState(TypedDict):
    """good_steps: in a row, since the scale was changed. overflows: steps so far."""

    scale: Annotated[float, Meta(gt=0, lt=2.0**64)]
    good_steps: Annotated[int, Meta(ge=0, lt=2**31)]
    overflows: Annotated[int, Meta(ge=0)]


class LossScale:
    """What a loss is multiplied by in fp16, so that small gradients do not vanish (arXiv 1710.03740).

    A step whose gradient overflows changes no weight, and halves the scale; 2000 steps in a row that do not double it.
    Nothing here waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.scaler = torch.amp.GradScaler(device.type)
        self.one = torch.ones((), device=device)
        self.overflows = torch.zeros((), device=device)

    @property
    def value(self) -> Tensor:
        return self.scale(self.one)

    def scale(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients, which all processes have the same of or shards of, by the scale."""
        self.scaler.unscale_(optimizer)

    def update(self, norm: Tensor) -> Tensor:
        """Go to the next step's scale; return 1 where the gradient, of this norm, has overflowed, else 0."""
        overflowed = (~norm.isfinite()).float()
        self.overflows += overflowed
        self.scaler.update()
        return overflowed

    def state(self) -> ScaleState:
        state = self.scaler.state_dict()
        return ScaleState(
            scale=state["scale"], good_steps=state["_growth_tracker"], overflows=int(self.overflows.item())
        )

    def take(self, state: ScaleState) -> None:
        """Go on from a state."""
        own = {"scale": state["scale"], "_growth_tracker": state["good_steps"]}
        self.scaler.load_state_dict(self.scaler.state_dict() | own)
        self.overflows.fill_(state["overflows"])
