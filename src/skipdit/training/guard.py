"""A guard on the gradient's norm: which steps are left out is decided on the device, and nobody waits for it."""

from typing import Any, TypedDict, cast

import torch
from torch import Tensor

WINDOW = 100  # norms


class GuardState(TypedDict):
    """norms: the last ones, oldest first. left_out: steps so far."""

    norms: list[float]
    left_out: int


class GradientGuard:
    """Leaves out each step whose gradient norm is above `factor` times the median of the last `WINDOW`.

    Norms of steps that were left out count for the median, so that it follows where gradients have grown for good.
    While fewer than half of the window is filled, no step is left out.
    """

    def __init__(self, factor: float, device: torch.device) -> None:
        self.factor = factor
        self.norms = torch.full((WINDOW,), torch.inf, device=device)
        self.left_out = torch.zeros((), device=device)

    def set(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Make the next call of a fused optimizer's `step` do nothing where a norm is too large, the moments and their
        count included. That is what torch's GradScaler does through the same attribute; a test pins it."""
        too_large = (norm > self.factor * self.norms.sort().values[WINDOW // 2]).float()
        self.norms = torch.cat([self.norms[1:], norm.float().reshape(1)])
        self.left_out += too_large
        cast(Any, optimizer).found_inf = too_large

    def state(self) -> GuardState:
        norms = self.norms[self.norms.isfinite()].tolist()
        return GuardState(norms=norms, left_out=int(self.left_out.item()))

    def take(self, state: GuardState) -> None:
        """Go on from a state."""
        norms = [torch.inf] * (WINDOW - len(state["norms"])) + state["norms"]
        self.norms = torch.tensor(norms, device=self.norms.device)
        self.left_out.fill_(state["left_out"])
