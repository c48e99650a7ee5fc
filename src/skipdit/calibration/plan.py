"""Plans schedules by dynamic programming on measured errors: the least error for each cost.

A segment is a full step and the reuse steps up to the next full one, all of one variant. The error of a reuse step
depends on its age (steps since the last full one) and on the spacing (steps between the last two full ones).
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GRID = 240


@dataclass(frozen=True, kw_only=True, eq=False)
class ReuseErrors:
    """The measured errors of reuse in one run; a variant is one way to reuse.

    Raises `ValueError` if shapes do not match, if values are out of range, or if an entry that is read is not finite.
    """

    errors: NDArray[np.floating]
    """(variants, steps, max_spacing, max_age): at [v, s, d - 1, a - 1], the mean squared error of the model's output at
    step s with variant v, if the last full step was s - a and the full step before it s - a - d. A larger spacing
    counts as max_spacing. The segment of step 0, which has no full step before it, uses spacing index 0. Other entries
    for which a full step would lie before step 0 are never read and may be NaN."""
    sensitivity: NDArray[np.floating]
    """(steps,): mean squared error of the final sample per unit of `errors` at a step"""
    reuse_costs: tuple[float, ...]
    """cost of a reuse step of each variant as a share of a full step, between 0 and 1"""
    num_units: int = GRID
    """number of units in a full step; if a reuse step is not a whole number of units, costs are rounded up to multiples
    of 1/240 of a full step"""

    def __post_init__(self) -> None:
        if self.errors.ndim != 4 or 0 in self.errors.shape:
            raise ValueError(f"errors must be (variants, steps, max_spacing, max_age), got shape {self.errors.shape}")
        num_variants, num_steps = self.errors.shape[:2]
        if self.sensitivity.shape != (num_steps,):
            raise ValueError(f"sensitivity must be ({num_steps},) as errors, got shape {self.sensitivity.shape}")
        if not np.all(np.isfinite(self.sensitivity) & (self.sensitivity >= 0)):
            raise ValueError(f"sensitivity must be finite and at least 0, got {self.sensitivity.tolist()}")
        if len(self.reuse_costs) != num_variants or not all(0 <= cost <= 1 for cost in self.reuse_costs):
            raise ValueError(f"reuse_costs must be {num_variants} numbers between 0 and 1, got {self.reuse_costs}")
        if self.num_units < 1:
            raise ValueError(f"num_units must be at least 1, got {self.num_units}")
        bad = self._is_read() & ~(np.isfinite(self.errors) & (self.errors >= 0))
        if bad.any():
            variant, step, spacing, age = np.argwhere(bad)[0].tolist()
            raise ValueError(
                f"errors must be finite and at least 0, got {self.errors[variant, step, spacing, age]} "
                f"for variant {variant}, step {step}, spacing {spacing + 1}, age {age + 1}"
            )

    def _is_read(self) -> NDArray[np.bool_]:
        """Return the entries of `errors` that a schedule can reach, of shape (1, steps, max_spacing, max_age)."""
        _, steps, spacings, ages = np.ogrid[tuple(slice(length) for length in self.errors.shape)]
        last_full = steps - (ages + 1)
        return (last_full > spacings) | ((last_full >= 0) & (spacings == 0))

    def weighted(self) -> NDArray[np.float64]:
        """Return `errors` times `sensitivity`; 0 for entries that are never read."""
        return np.where(self._is_read(), self.errors, 0).astype(np.float64) * self.sensitivity[:, None, None]

    def units(self) -> tuple[int, tuple[int, ...]]:
        """Return the cost of a full step and of each variant's reuse step, in whole units."""
        exact = np.asarray(self.reuse_costs, np.float64) * self.num_units
        if np.all(np.abs(exact - np.rint(exact)) <= 1e-6):
            return self.num_units, tuple(np.rint(exact).astype(int).tolist())
        return GRID, tuple(math.ceil(cost * GRID - 1e-6) for cost in self.reuse_costs)


@dataclass(frozen=True, kw_only=True)
class PlannedSchedule:
    """A schedule with its predicted cost and error."""

    full_steps: tuple[int, ...]
    variants: tuple[int | None, ...]
    """the variant of each step, `None` for full steps"""
    cost: float
    """in full steps per step; 1.0 without a cache"""
    predicted_error: float

    @property
    def speedup(self) -> float:
        return 1 / self.cost


def _segment_errors(errors: ReuseErrors, coherence: float) -> NDArray[np.float64]:
    """Return, at [v, i, d - 1, a], the error of the segment that starts at full step i with spacing d and has a reuse
    steps of variant v. Entries for segments that would run past the last step have no meaning."""
    weighted = errors.weighted()
    num_variants, num_steps, max_spacing, max_age = weighted.shape
    parts = np.zeros((num_variants, num_steps, max_spacing, max_age + 1))
    for age in range(1, min(max_age, num_steps - 1) + 1):
        parts[:, :-age, :, age] = weighted[:, age:, :, age - 1]
    return (1 - coherence) * parts.cumsum(-1) + coherence * np.sqrt(parts).cumsum(-1) ** 2


def plan(errors: ReuseErrors, *, coherence: float = 1.0) -> tuple[PlannedSchedule, ...]:
    """Return every schedule that no other schedule beats in both cost and predicted error, the most expensive first.

    The first is the uncached run, with error 0, unless some reuse has error 0 too. Costs fall and errors rise strictly.
    coherence: how the errors within a segment add up, from 0 (in power) to 1 (in amplitude): the error of a segment is
    (1 - c) * sum(w e) + c * sum(sqrt(w e))**2. Raises `ValueError` if it is out of range.
    """
    if not 0 <= coherence <= 1:
        raise ValueError(f"coherence must be between 0 and 1, got {coherence}")
    num_variants, num_steps, max_spacing, max_age = errors.errors.shape
    segments = _segment_errors(errors, coherence)
    full_units, reuse_units = errors.units()
    uncached_cost = full_units * num_steps
    unit = math.gcd(*(full_units - cost for cost in reuse_units)) or 1
    savings = [(full_units - cost) // unit for cost in reuse_units]

    # least[-1 - a][d - 1, saved]: the least error before the full step a + 1 back; came_from: the choice that gave it
    shape = (max_age + 1, num_variants, max_spacing)
    choice_index = np.arange(math.prod(shape), dtype=np.min_scalar_type(math.prod(shape))).reshape(shape)
    least: deque[NDArray[np.float64]] = deque(maxlen=max_age + 1)
    came_from: list[NDArray[np.unsignedinteger]] = []
    for end in range(num_steps + 1):
        widest = max(savings) * (end - math.ceil(end / (max_age + 1))) + 1
        here = np.full((max_spacing, widest), np.inf)
        choices = np.zeros(here.shape, choice_index.dtype)
        if end == 0:
            here[0, 0] = 0
        for age in range(min(max_age, end - 1) + 1):
            before = least[-1 - age]
            row = min(age + 1, max_spacing) - 1
            for variant in range(num_variants if age else 1):
                span = slice(age * savings[variant], age * savings[variant] + before.shape[1])
                target, chosen = here[row, span], choices[row, span]
                for spacing in range(max_spacing):
                    candidate = before[spacing] + segments[variant, end - 1 - age, spacing, age]
                    better = candidate < target
                    np.copyto(target, candidate, where=better)
                    np.copyto(chosen, choice_index[age, variant, spacing], where=better)
        least.append(here)
        came_from.append(choices)

    final = least[-1].min(0)
    cheaper = np.minimum.accumulate(final[::-1])[::-1]
    saved = np.flatnonzero(final < np.append(cheaper[1:], np.inf))
    chosen_variants = _backtrack(came_from, shape, savings, least[-1].argmin(0)[saved], saved)
    return tuple(
        PlannedSchedule(
            full_steps=tuple(step for step, variant in enumerate(row) if variant < 0),
            variants=tuple(None if variant < 0 else variant for variant in row),
            cost=(uncached_cost - units * unit) / uncached_cost,
            predicted_error=float(final[units]),
        )
        for row, units in zip(map(np.ndarray.tolist, chosen_variants), saved.tolist(), strict=True)
    )


def _backtrack(
    came_from: list[NDArray[np.unsignedinteger]],
    shape: tuple[int, int, int],
    savings: list[int],
    spacing: NDArray[np.intp],
    saved: NDArray[np.intp],
) -> NDArray[np.int16]:
    """Return the variants (schedules, steps), -1 for full steps, of the schedules that end in these states."""
    num_steps = len(came_from) - 1
    position, spacing, saved = np.full(len(saved), num_steps), spacing.copy(), saved.copy()
    variants = np.full((len(saved), num_steps), -1, np.int16)
    for end in range(num_steps, 0, -1):
        here = np.flatnonzero(position == end)
        age, variant, spacing[here] = np.unravel_index(came_from[end][spacing[here], saved[here]], shape)
        for back in range(1, min(shape[0], end)):
            reused = age >= back
            variants[here[reused], end - back] = variant[reused]
        position[here] -= age + 1
        saved[here] -= age * np.asarray(savings)[variant]
    assert not position.any()
    assert not saved.any()
    return variants


def choose(front: Sequence[PlannedSchedule], *, speedup: float) -> PlannedSchedule:
    """Return, from a front of `plan`, the schedule with the least error of those at least `speedup` times as fast as
    the uncached run. Raises `ValueError` if there is none."""
    fast_enough = [schedule for schedule in front if schedule.speedup >= speedup * (1 - 1e-9)]
    if not (speedup >= 1 and fast_enough):
        fastest = max(schedule.speedup for schedule in front)
        raise ValueError(f"speedup must be between 1 and {math.floor(fastest * 1e4) / 1e4}, got {speedup}")
    return min(fast_enough, key=lambda schedule: schedule.predicted_error)
