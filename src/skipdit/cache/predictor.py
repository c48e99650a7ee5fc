"""HOW stored values become those of the current step: held, or extrapolated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Values = Mapping[str, Tensor]
Derivatives = tuple[Values, ...]


@dataclass(frozen=True)
class TaylorPredictor:
    """Taylor expansion of order m in the step count, from differences of full steps (TaylorSeer, arXiv 2503.06923).

    `stored[i]` holds the i-th derivatives, so memory is m + 1 tensors per value. The order is lower until m + 1 full
    steps have run."""

    order: int = 0
    """m, from 0 (hold the stored values) to 4."""

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 4:
            raise ValueError(f"the Taylor order must be between 0 (hold) and 4, got {self.order}")

    def update(self, stored: Derivatives, values: Values, distance: int) -> Derivatives:
        """Return the derivatives at a new full step, `distance` steps after that of `stored` (empty at the first)."""
        derivatives = [values]
        for previous in stored[: self.order]:
            last = derivatives[-1]
            derivatives.append({key: (value - previous[key]) / distance for key, value in last.items()})
        return tuple(derivatives)

    def predict(self, stored: Derivatives, distance: int) -> Values:
        """Return the values `distance` steps after the last full one."""
        if len(stored) == 1:
            return stored[0]
        factors = [distance**order / math.factorial(order) for order in range(1, len(stored))]
        predicted = {}
        for key, value in stored[0].items():
            for factor, derivative in zip(factors, stored[1:], strict=True):
                value = value.add(derivative[key], alpha=factor)
            predicted[key] = value
        return predicted
