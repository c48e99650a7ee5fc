"""HOW a stored value becomes today's: held as it is, or extrapolated."""

import math
from dataclasses import dataclass

from torch import Tensor

Stored = tuple[Tensor, ...]


@dataclass(frozen=True)
class TaylorPredictor:
    """Taylor expansion of order m in the step count, from differences of full steps (TaylorSeer, arXiv 2503.06923).

    Order 0 holds the stored value. `stored[i]` is the i-th derivative, so m + 1 tensors are held; as long as fewer
    full steps were seen the order is lower.
    """

    order: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 4:
            raise ValueError(f"the Taylor order must be between 0 (hold) and 4, got {self.order}")

    def update(self, stored: Stored, value: Tensor, distance: int) -> Stored:
        """Derivatives at a new full step, `distance` steps after the one in `stored` (empty on the first)."""
        derivatives = [value]
        for previous in stored[: self.order]:
            derivatives.append((derivatives[-1] - previous) / distance)
        return tuple(derivatives)

    def predict(self, stored: Stored, distance: int) -> Tensor:
        """The value `distance` steps after the last full one."""
        value = stored[0]
        for order, derivative in enumerate(stored[1:], start=1):
            value = value + derivative * (distance**order / math.factorial(order))
        return value
