"""Predicts the error of a schedule in the final sample, fits its predictor, and improves it one step at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float

from skipdit.cache.error_table import TABLE_ORDERS, ErrorTable, fit_factors
from skipdit.cache.methods import CacheMethod
from skipdit.cache.predictor import Ahead, Derivatives, FittedPredictor, Predictor, TaylorPredictor
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.calibration.plan import ReuseErrors
from skipdit.calibration.trials import Measurement

MAX_TRIALS = 1500  # schedules that one search compares

Variants = tuple[int | None, ...]


@dataclass(frozen=True)
class ReuseStep:
    """The effect of one reuse step of a schedule."""

    change: Float[np.ndarray, " coordinates"]
    """change of the output, times the square root of the step's sensitivity"""
    factors: tuple[float, ...]
    """factors of the terms of Taylor's expansion"""


@dataclass(frozen=True, eq=False)
class Search:
    """The search for schedules of one order, on a measurement."""

    measurement: Measurement
    order: int
    coherence: float = 0.5
    """how the errors of steps add up in the final sample: from 0 (in power) to 1 (as vectors)"""
    fits: bool = True
    """give the terms of the expansion factors that are fitted per step; otherwise they are Taylor's"""
    reuse_steps: dict[tuple[int, int, tuple[int, ...]], ReuseStep | None] = field(default_factory=dict, init=False)
    """the reuse steps so far, by step, variant and last full steps"""

    @cached_property
    def predictor(self) -> Predictor:
        return TaylorPredictor(self.order)

    @property
    def lookback(self) -> int:
        return self.measurement.changes.shape[2]

    def terms(self, step: int, full: Sequence[int]) -> Float[np.ndarray, "terms lookback"]:
        """Return the weights of the values of earlier steps in each term of a prediction for `step`: the last values,
        then the terms of Taylor's expansion. full: the full steps before it, at most `order` + 1, in rising order."""
        stored: Derivatives = ()
        for index, full_step in enumerate(full):
            values = torch.zeros(self.lookback, dtype=torch.float64)
            values[step - full_step - 1] = 1
            stored = self.predictor.update(stored, {"": values}, full_step - full[index - 1] if index else 1)
        ahead = Ahead(step - full[-1], full[-1] - full[-2] if len(full) > 1 else 1)
        coefficients = (1.0, *self.predictor.coefficients(len(stored) - 1, ahead))
        return np.array([c * values[""].numpy() for c, values in zip(coefficients, stored, strict=True)])

    def reuse_step(self, step: int, variant: int, full: tuple[int, ...]) -> ReuseStep | None:
        """Return the effect of reuse at `step`; `None` if it looks back further than was measured."""
        full = full[-self.order - 1 :]
        key = step, variant, full
        if key not in self.reuse_steps:
            self.reuse_steps[key] = self._reuse_step(*key) if step - full[0] <= self.lookback else None
        return self.reuse_steps[key]

    def _reuse_step(self, step: int, variant: int, full: tuple[int, ...]) -> ReuseStep:
        parts = self.terms(step, full) @ self.measurement.changes[variant, step]
        factors = np.ones(len(parts) - 1)
        if self.fits and len(factors):
            factors = fit_factors((parts @ parts.T)[None])[0]
        change = (parts[0] + factors @ parts[1:]) * math.sqrt(self.measurement.sensitivity[step])
        return ReuseStep(change.astype(np.float32), tuple(float(factor) for factor in factors))

    def steps(self, variants: Variants) -> dict[int, ReuseStep] | None:
        """Return the reuse steps of a schedule by their number; `None` if one of them looks back too far."""
        steps, full = {}, ()
        for step, variant in enumerate(variants):
            if variant is None:
                full = (*full, step)
            elif (reuse := self.reuse_step(step, variant, full)) is None:
                return None
            else:
                steps[step] = reuse
        return steps

    def error(self, variants: Variants) -> float:
        """Return the predicted mean squared error of the final sample."""
        steps = self.steps(variants)
        if steps is None:
            return math.inf
        if not steps:
            return 0.0
        changes = np.stack([step.change for step in steps.values()])
        apart, together = float(np.square(changes).mean(axis=1).sum()), float(np.square(changes.sum(axis=0)).mean())
        return (1 - self.coherence) * apart + self.coherence * together

    def psnr_db(self, variants: Variants) -> float:
        """Return the predicted PSNR of the final sample, for a data range of 1."""
        error = self.error(variants)
        return -10 * math.log10(error) if error > 0 else math.inf

    def method(self, variants: Variants) -> CacheMethod:
        """Return the cache with this schedule."""
        table = self.measurement.table if self.fits and self.order in TABLE_ORDERS else None
        schedule = ExplicitSchedule(
            full_steps=tuple(step for step, variant in enumerate(variants) if variant is None),
            num_inference_steps=len(variants),
            timesteps=self.measurement.timesteps,
            variants=variants,
            table=table,
        )
        predictor = self.fitted(variants, table) if self.fits and self.order else self.predictor
        return CacheMethod(schedule=schedule, site=self.measurement.site, predictor=predictor)

    def fitted(self, variants: Variants, table: ErrorTable | None) -> Predictor:
        """Return the predictor with the fitted factors of each reuse step; terms for which too few values were stored
        have the factor 1."""
        rows = {
            self.measurement.timesteps[step]: (*reuse.factors, *(1.0,) * (self.order - len(reuse.factors)))
            for step, reuse in (self.steps(variants) or {}).items()
        }
        return FittedPredictor(self.order, tuple(rows), tuple(rows.values()), table=table)

    def cost(self, variants: Variants) -> float:
        """Return the cost of a schedule, in full steps per step."""
        costs = (1.0 if variant is None else self.measurement.reuse_costs[variant] for variant in variants)
        return sum(costs) / len(variants)

    def errors(self) -> ReuseErrors:
        """Return the errors of single reuse steps after evenly spaced full steps, for `plan`."""
        num_variants, num_steps, lookback, _ = self.measurement.changes.shape
        max_age, max_spacing = (lookback // 2, lookback // 2) if self.order else (lookback, 1)
        errors = np.full((num_variants, num_steps, max_spacing, max_age), np.nan)
        for variant, step, spacing, age in np.ndindex(*errors.shape):
            last = step - age - 1
            if last > spacing or (last >= 0 and spacing == 0):
                full = range(last, max(last - self.order * (spacing + 1), 0) - 1, -spacing - 1)[::-1]
                reuse = self.reuse_step(step, variant, tuple(other for other in full if step - other <= lookback))
                assert reuse is not None
                errors[variant, step, spacing, age] = (
                    np.square(reuse.change).mean() / self.measurement.sensitivity[step]
                )
        return ReuseErrors(
            errors=errors,
            sensitivity=self.measurement.sensitivity,
            reuse_costs=self.measurement.reuse_costs,
            num_units=self.measurement.num_units,
        )

    def improve(self, variants: Variants, speedup: float) -> Variants:
        """Return a schedule with a smaller predicted error that is at least `speedup` times as fast as an uncached run:
        full steps are added while that holds, then moved one at a time, to the nearest steps first."""
        best, least_error = variants, self.error(variants)
        while longer := [other for other in self._with_one_more(best) if self.cost(other) * speedup <= 1 + 1e-9]:
            best = min(longer, key=self.error)
            least_error = self.error(best)
        compared = {best}
        improved = True
        while improved and len(compared) < MAX_TRIALS:
            improved = False
            for other in self._neighbours(best):
                if other in compared or self.cost(other) * speedup > 1 + 1e-9:
                    continue
                compared.add(other)
                error = self.error(other)
                if error < 0.999 * least_error:
                    best, least_error, improved = other, error, True
                    break
        return best

    def _with_one_more(self, variants: Variants) -> Iterator[Variants]:
        """Yield the schedules with one more full step."""
        for step, variant in enumerate(variants):
            if variant is not None:
                yield (*variants[:step], None, *variants[step + 1 :])

    def _neighbours(self, variants: Variants) -> Iterator[Variants]:
        """Yield the schedules with one full step moved, or with another variant between two full steps."""
        full = [step for step, variant in enumerate(variants) if variant is None]
        free = [step for step, variant in enumerate(variants) if variant is not None]
        moves = sorted((abs(step - target), step, target) for step in full[1:] for target in free)
        for _, step, target in moves:
            changed = list(variants)
            changed[step], changed[target] = changed[target], None
            yield tuple(changed)
        for start, end in zip(full, [*full[1:], len(variants)], strict=True):
            for variant in range(len(self.measurement.reuse_costs)):
                changed = (*variants[: start + 1], *(variant,) * (end - start - 1), *variants[end:])
                if changed != variants:
                    yield changed
