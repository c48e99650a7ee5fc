"""HOW stored values become those of the current step: held, or extrapolated.

Every predictor keeps the last full step's values and their backward differences, and adds up the latter with numbers of
its own: that is a linear combination of the last `order + 1` stored tensors. From order 1 on, all but the fitted one
give back a series that is linear in the step.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from skipdit.cache.error_table import ErrorTable, factors_at
from skipdit.options import MAX_ORDER as MAX_ORDER

Values = Mapping[str, Tensor]
Derivatives = tuple[Values, ...]


class Ahead(NamedTuple):
    """The position of a reuse step."""

    distance: float
    """Steps since the last full one; from a probe they may be a fraction."""
    spacing: int = 1
    """Steps between the last full one and the full one before."""
    timestep: float = 0.0
    """Noise level, from 1000 down to 0."""
    stride: float = 0.0
    """Noise levels from the step before to this one."""
    full: tuple[float, ...] = ()
    """Noise levels of the last full steps, the last one first."""


@dataclass(frozen=True)
class Predictor:
    """A linear extrapolation. Abstract.

    `stored[i]` holds the i-th derivatives with respect to the step, so memory is `order + 1` tensors per value. The
    order is lower until as many full steps have run."""

    order: int = 0
    """From 0 (hold the stored values) to 4."""
    damping = 1.0  # multiplies fitted factors

    def __post_init__(self) -> None:
        if not 0 <= self.order <= MAX_ORDER:
            raise ValueError(f"the Taylor order must be between 0 (hold) and {MAX_ORDER}, got {self.order}")

    def update(self, stored: Derivatives, values: Values, distance: int) -> Derivatives:
        """Return the derivatives at a new full step, `distance` steps after that of `stored` (empty at the first)."""
        derivatives = [values]
        for previous in stored[: self.order]:
            last = derivatives[-1]
            derivatives.append({key: (value - previous[key]) / distance for key, value in last.items()})
        return tuple(derivatives)

    @property
    def fitted_factors(self) -> Mapping[float, tuple[float, ...]]:
        """Return the fitted factors by timestep; empty if nothing was fitted."""
        return {}

    def coefficients(self, order: int, ahead: Ahead) -> list[float]:
        """Return the numbers by which the derivatives from the first to the `order`-th are multiplied."""
        raise NotImplementedError

    def predict(self, stored: Derivatives, ahead: Ahead) -> Values:
        """Return the values of the reuse step at `ahead`."""
        if len(stored) == 1:
            return stored[0]
        coefficients = self.coefficients(len(stored) - 1, ahead)
        predicted = {}
        for key, value in stored[0].items():
            for coefficient, derivative in zip(coefficients, stored[1:], strict=True):
                value = value.add(derivative[key], alpha=coefficient)
            predicted[key] = value
        return predicted


def expand(order: int, distance: float) -> list[float]:
    """Return the coefficients of the first `order` derivatives in a Taylor expansion."""
    return [distance**power / math.factorial(power) for power in range(1, order + 1)]


@dataclass(frozen=True)
class TaylorPredictor(Predictor):
    """Taylor expansion (TaylorSeer, arXiv 2503.06923)."""

    def coefficients(self, order: int, ahead: Ahead) -> list[float]:
        return expand(order, ahead.distance)


@dataclass(frozen=True)
class HermitePredictor(Predictor):
    """Hermite polynomials (of probability theory) in place of powers (after HiCache, arXiv 2508.16984)."""

    def coefficients(self, order: int, ahead: Ahead) -> list[float]:
        values = [1.0, float(ahead.distance)]
        for power in range(1, order):
            values.append(ahead.distance * values[power] - power * values[power - 1])
        return [value / math.factorial(power) for power, value in enumerate(values[: order + 1])][1:]


@dataclass(frozen=True)
class AdamsBashforthPredictor(Predictor):
    """The integral of rates, extrapolated as Adams and Bashforth do: exact for a polynomial of its order on evenly
    spaced full steps (after PrediT, arXiv 2602.18093)."""

    def coefficients(self, order: int, ahead: Ahead) -> list[float]:
        values = [float(ahead.distance)]
        for power in range(2, order + 1):
            values.append(values[-1] * (ahead.distance + (power - 1) * ahead.spacing) / power)
        return values


@dataclass(frozen=True)
class FittedPredictor(Predictor):
    """Taylor expansion whose terms have factors, fitted per step in a calibration (after L2P, arXiv 2604.26365)."""

    timesteps: tuple[float, ...] = ()
    """Noise levels of the factors, falling; between them factors are interpolated."""
    factors: tuple[tuple[float, ...], ...] = ()
    """At each of them, one per order; all 1 is Taylor's expansion."""
    damping: float = 1.0
    """Multiplies all factors. An error stays in the latents over reuse steps, where large factors feed it."""
    table: ErrorTable | None = field(default=None, compare=False)
    """Tells the factors at any timestep and after any full steps, in place of the listed ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.timesteps) != sorted(set(self.timesteps), reverse=True):
            raise ValueError(f"timesteps must fall, got {list(self.timesteps)}")
        if len(self.factors) != len(self.timesteps) or not self.factors:
            raise ValueError(f"there must be factors for each of {len(self.timesteps)} timesteps, got {self.factors}")
        if any(len(row) != self.order or not all(map(math.isfinite, row)) for row in self.factors):
            raise ValueError(f"factors must be {self.order} finite numbers per timestep, got {self.factors}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, got {self.damping:g}")

    @property
    def fitted_factors(self) -> Mapping[float, tuple[float, ...]]:
        return dict(zip(self.timesteps, self.factors, strict=True))

    def factors_at(self, timestep: float) -> tuple[float, ...]:
        """Return the factors of a timestep, interpolated linearly."""
        after = bisect_left(self.timesteps, -timestep, key=lambda level: -level)
        if after == 0 or after == len(self.timesteps):
            return self.factors[min(after, len(self.factors) - 1)]
        high, low = self.timesteps[after - 1], self.timesteps[after]
        share = (high - timestep) / (high - low)
        pairs = zip(self.factors[after - 1], self.factors[after], strict=True)
        return tuple(before + share * (then - before) for before, then in pairs)

    def coefficients(self, order: int, ahead: Ahead) -> list[float]:
        if self.table is not None and len(ahead.full) > 1:
            factors = factors_at(self.table, ahead.timestep, *ahead.full[: order + 1])
        else:
            factors = self.factors_at(ahead.timestep)
        pairs = zip(expand(order, ahead.distance), factors, strict=False)
        return [self.damping * coefficient * factor for coefficient, factor in pairs]
