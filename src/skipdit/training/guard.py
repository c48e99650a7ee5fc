"""A guard on the gradient's norm: which steps are left out is decided on the device, and nobody waits for it."""

from typing import Annotated, Any, TypedDict, cast

import torch
from msgspec import Meta
from torch import Tensor

WINDOW = 100  # norms


def leave_out(optimizer: torch.optim.Optimizer, flags: list[Tensor]) -> None:
    """Make the next call of a fused optimizer's `step` do nothing where one of the flags, if any, is 1, the moments and
    their count included. That is what torch's GradScaler does through the same attribute; a test pins it."""
    if flags:
        cast(Any, optimizer).found_inf = torch.stack(flags).amax()


class GuardState(TypedDict):
    """norms: the last ones, oldest first. left_out: steps so far."""

    norms: Annotated[list[float], Meta(max_length=WINDOW)]
    left_out: Annotated[int, Meta(ge=0)]


class GradientGuard:
    """Leaves out each step whose gradient norm is above `factor` times the median of the last `WINDOW`.

    Norms of steps that were left out count for the median, so that it follows where gradients have grown for good.
    While fewer than half of the window is filled, no step is left out.
    """

    def __init__(self, factor: float, device: torch.device) -> None:
        self.factor = factor
        self.norms = torch.full((WINDOW,), torch.inf, device=device)
        self.left_out = torch.zeros((), device=device)

    def update(self, norm: Tensor) -> Tensor:
        """Take in the norm of a step; return 1 where it is too large, else 0. One that is not finite is not taken in,
        and 0: that is for others to say."""
        finite = norm.isfinite()
        too_large = (finite & (norm > self.factor * self.norms.sort().values[WINDOW // 2])).float()
        taken = torch.cat([self.norms[1:], norm.float().reshape(1)])
        self.norms = torch.where(finite, taken, self.norms)
        self.left_out += too_large
        return too_large

    def state(self) -> GuardState:
        norms = self.norms[self.norms.isfinite()].tolist()
        return GuardState(norms=norms, left_out=int(self.left_out.item()))

    def take(self, state: GuardState) -> None:
        """Go on from a state."""
        norms = [torch.inf] * (WINDOW - len(state["norms"])) + state["norms"]
        self.norms = torch.tensor(norms, device=self.norms.device)
        self.left_out.fill_(state["left_out"])
