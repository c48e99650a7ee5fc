"""Predicts what a schedule does to the final sample, fits its predictions, and improves it step by step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float

from skipdit.cache.error_table import fit_factors
from skipdit.cache.methods import CacheMethod
from skipdit.cache.predictor import Ahead, Derivatives, Predictor, TaylorPredictor
from skipdit.calibration.plan import ReuseErrors
from skipdit.calibration.trials import Measured

MAX_TRIED = 1500  # schedules per search

Variants = tuple[int | None, ...]


@dataclass(frozen=True)
class ReuseStep:
    """What one reuse step of a schedule does to the output."""

    change: Float[np.ndarray, " coordinates"]
    """of the output, times the root of the step's sensitivity"""
    factors: tuple[float, ...]
    """of the terms of Taylor's expansion"""


@dataclass(frozen=True, eq=False)
class Search:
    """The search for schedules of one order on what was measured.

    coherence: how errors of steps add up in the final sample, between 0 (in power) and 1 (as the vectors that they
    are). fits: give the terms of the expansion factors that are fitted per step; otherwise they are Taylor's.
    """

    measured: Measured
    order: int
    coherence: float = 0.5
    fits: bool = True
    known: dict[tuple[int, int, tuple[int, ...]], ReuseStep | None] = field(default_factory=dict, init=False)

    @cached_property
    def predictor(self) -> Predictor:
        return TaylorPredictor(self.order)

    @property
    def lookback(self) -> int:
        return self.measured.changes.shape[2]

    def terms(self, step: int, full: Sequence[int]) -> Float[np.ndarray, "terms lookback"]:
        """Return the weights of earlier steps' values in each term of a prediction for `step`.

        full: the full steps before it, at most `order` + 1 of them and rising. The first term is the last values, the
        others are those of Taylor's expansion.
        """
        stored: Derivatives = ()
        for index, at in enumerate(full):
            values = torch.zeros(self.lookback, dtype=torch.float64)
            values[step - at - 1] = 1
            stored = self.predictor.update(stored, {"": values}, at - full[index - 1] if index else 1)
        ahead = Ahead(step - full[-1], full[-1] - full[-2] if len(full) > 1 else 1)
        coefficients = (1.0, *self.predictor.coefficients(len(stored) - 1, ahead))
        return np.array([c * values[""].numpy() for c, values in zip(coefficients, stored, strict=True)])

    def reuse_step(self, step: int, variant: int, full: tuple[int, ...]) -> ReuseStep | None:
        """Return what reuse at `step` does; `None` where it would look back further than was measured."""
        full = full[-self.order - 1 :]
        place = step, variant, full
        if place not in self.known:
            self.known[place] = self._reuse_step(*place) if step - full[0] <= self.lookback else None
        return self.known[place]

    def _reuse_step(self, step: int, variant: int, full: tuple[int, ...]) -> ReuseStep:
        parts = self.terms(step, full) @ self.measured.changes[variant, step]
        factors = np.ones(len(parts) - 1)
        if self.fits and len(factors):
            factors = fit_factors((parts @ parts.T)[None])[0]
        change = (parts[0] + factors @ parts[1:]) * math.sqrt(self.measured.sensitivity[step])
        return ReuseStep(change.astype(np.float32), tuple(float(factor) for factor in factors))

    def steps(self, variants: Variants) -> dict[int, ReuseStep] | None:
        """Return the reuse steps of a schedule by their number; `None` where one looks back too far."""
        found, full = {}, ()
        for step, variant in enumerate(variants):
            if variant is None:
                full = (*full, step)
            elif (reuse := self.reuse_step(step, variant, full)) is None:
                return None
            else:
                found[step] = reuse
        return found

    def error(self, variants: Variants) -> float:
        """Return the mean squared error of the final sample that a schedule is predicted to make."""
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
        """Return what `enable_cache` takes."""
        factors = {step: reuse.factors for step, reuse in (self.steps(variants) or {}).items()}
        predictor = self.measured.fitted(factors, self.order) if self.fits else self.predictor
        return self.measured.method(variants, predictor)

    def cost(self, variants: Variants) -> float:
        """Return the cost of a schedule, in full steps per step."""
        costs = (1.0 if variant is None else self.measured.reuse_costs[variant] for variant in variants)
        return sum(costs) / len(variants)

    def errors(self) -> ReuseErrors:
        """Return the errors of all single reuse steps after evenly spaced full ones, from which `plan` starts."""
        num_variants, num_steps, lookback, _ = self.measured.changes.shape
        max_age, max_spacing = (lookback // 2, lookback // 2) if self.order else (lookback, 1)
        found = np.full((num_variants, num_steps, max_spacing, max_age), np.nan)
        for variant, step, spacing, age in np.ndindex(*found.shape):
            last = step - age - 1
            if last > spacing or (last >= 0 and spacing == 0):
                full = range(last, max(last - self.order * (spacing + 1), 0) - 1, -spacing - 1)
                reuse = self.reuse_step(step, variant, tuple(each for each in full[::-1] if step - each <= lookback))
                assert reuse is not None
                found[variant, step, spacing, age] = np.square(reuse.change).mean() / self.measured.sensitivity[step]
        return ReuseErrors(
            errors=found,
            sensitivity=self.measured.sensitivity,
            reuse_costs=self.measured.reuse_costs,
            num_units=self.measured.num_units,
        )

    def improve(self, variants: Variants, speedup: float) -> Variants:
        """Return a schedule of less predicted error that is at least `speedup` times as fast as an uncached run: full
        steps are added as long as it is, then moved, one at a time and the nearest places first."""
        best, least = variants, self.error(variants)
        while True:
            added = [each for each in self._with_one_more(best) if self.cost(each) * speedup <= 1 + 1e-9]
            if not added:
                break
            best = min(added, key=self.error)
            least = self.error(best)
        tried = {best}
        improved = True
        while improved and len(tried) < MAX_TRIED:
            improved = False
            for other in self._neighbours(best):
                if other in tried or self.cost(other) * speedup > 1 + 1e-9:
                    continue
                tried.add(other)
                error = self.error(other)
                if error < 0.999 * least:
                    best, least, improved = other, error, True
                    break
        return best

    def _with_one_more(self, variants: Variants) -> Iterator[Variants]:
        for step, variant in enumerate(variants):
            if variant is not None:
                yield (*variants[:step], None, *variants[step + 1 :])

    def _neighbours(self, variants: Variants) -> Iterator[Variants]:
        """Yield schedules in which one full step is elsewhere, or one rest is of another variant."""
        full = [step for step, variant in enumerate(variants) if variant is None]
        free = [step for step, variant in enumerate(variants) if variant is not None]
        moves = sorted((abs(step - to), step, to) for step in full[1:] for to in free)
        for _, step, to in moves:
            changed = list(variants)
            changed[step], changed[to] = changed[to], None
            yield tuple(changed)
        for start, end in zip(full, [*full[1:], len(variants)], strict=True):
            for variant in range(len(self.measured.reuse_costs)):
                changed = (*variants[: start + 1], *(variant,) * (end - start - 1), *variants[end:])
                if changed != variants:
                    yield changed
