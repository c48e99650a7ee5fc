"""The precision of matrix products, and the loss scale that fp16 needs."""

from typing import Annotated, TypedDict

import torch
from msgspec import Meta
from torch import Tensor

from skipdit.environment import has_bf16
from skipdit.training.config import Precision


def computes_in_bf16(precision: Precision, device: torch.device) -> bool:
    """Return True if products are computed in bf16; with `"auto"`, if the device has instructions for it."""
    return has_bf16(device) if precision == "auto" else precision == "bf16"


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the dtype in which products are computed; `None` for float32."""
    if precision == "fp16":
        return torch.float16
    return torch.bfloat16 if computes_in_bf16(precision, device) else None


class ScaleState(TypedDict):
    """The state of a `LossScale` in a checkpoint."""

    scale: Annotated[float, Meta(gt=0, lt=2.0**64)]
    good_steps: Annotated[int, Meta(ge=0, lt=2**31)]
    """consecutive steps without overflow since the scale last changed"""
    overflows: Annotated[int, Meta(ge=0)]
    """number of steps that overflowed so far"""


class LossScale:
    """The factor of the loss in fp16, which keeps small gradients from vanishing (arXiv 1710.03740).

    A step whose gradient overflows changes no weights and halves the scale; 2000 consecutive steps without overflow
    double it. Nothing here waits for the device.
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

    def update(self, norm: Tensor) -> Tensor:
        """Update the scale after a step; return 1 if its gradient norm shows an overflow, else 0."""
        overflowed = (~norm.isfinite()).float()
        self.overflows += overflowed
        self.scaler.update()
        return overflowed

    def state(self) -> ScaleState:
        state = self.scaler.state_dict()
        return ScaleState(
            scale=state["scale"], good_steps=state["_growth_tracker"], overflows=int(self.overflows.item())
        )

    def restore(self, state: ScaleState) -> None:
        """Restore a state."""
        scaler_state = {"scale": state["scale"], "_growth_tracker": state["good_steps"]}
        self.scaler.load_state_dict(self.scaler.state_dict() | scaler_state)
        self.overflows.fill_(state["overflows"])
