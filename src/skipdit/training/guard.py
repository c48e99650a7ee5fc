"""Guard the gradient norm: the device decides which steps to skip, and nothing waits for it."""

from typing import Annotated, TypedDict

import torch
from msgspec import Meta
from torch import Tensor

WINDOW = 100  # norms


def skip_if_any(optimizer: torch.optim.Optimizer, flags: list[Tensor]) -> None:
    """Make the next `step` of a fused optimizer change nothing, not even moments and their count, if a flag is 1.
    torch's GradScaler uses the same attribute for this; a test pins it."""
    if flags:
        vars(optimizer)["found_inf"] = torch.stack(flags).amax()


class GuardState(TypedDict):
    """The state of a `GradientGuard` in a checkpoint."""

    norms: Annotated[list[float], Meta(max_length=WINDOW)]
    """the latest, oldest first"""
    left_out: Annotated[int, Meta(ge=0)]
    """number of skipped steps so far"""


class GradientGuard:
    """Skip each step whose gradient norm exceeds `factor` times the median of the last `WINDOW`.

    The norms of skipped steps count for the median, so that it follows gradients that stay larger. No step is skipped
    until half of the window is filled.
    """

    def __init__(self, factor: float, device: torch.device) -> None:
        self.factor = factor
        self.norms = torch.full((WINDOW,), torch.inf, device=device)
        self.num_skipped = torch.zeros((), device=device)

    def update(self, norm: Tensor) -> Tensor:
        """Add the norm of a step to the window; return 1 if it is too large, else 0.

        A non-finite norm returns 0 and is not added: the loop reports it.
        """
        finite = norm.isfinite()
        too_large = (finite & (norm > self.factor * self.norms.sort().values[WINDOW // 2])).float()
        window = torch.cat([self.norms[1:], norm.float().reshape(1)])
        self.norms = torch.where(finite, window, self.norms)
        self.num_skipped += too_large
        return too_large

    def state(self) -> GuardState:
        norms = self.norms[self.norms.isfinite()].tolist()
        return GuardState(norms=norms, left_out=int(self.num_skipped.item()))

    def restore(self, state: GuardState) -> None:
        """Restore a state."""
        norms = [torch.inf] * (WINDOW - len(state["norms"])) + state["norms"]
        self.norms = torch.tensor(norms, device=self.norms.device)
        self.num_skipped.fill_(state["left_out"])
