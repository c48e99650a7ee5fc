"""The cheapest schedule for an error, and the least error for a cost: dynamic programming on measured errors.

A segment is a full step and the reuse steps up to the next full one, all of one variant. What reuse at a step costs in
quality depends on its age (steps since the last full one) and on the spacing (steps between the last two full ones).
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
    """What reuse was measured to do to one run; a variant is one way to reuse.

    `errors[v, s, d - 1, a - 1]`, of shape (variants, steps, max_spacing, max_age), is the mean squared error of the
    model's output at step s by variant v where step s - a was the last full one and step s - a - d the full one before
    it. A larger spacing counts as max_spacing. In the segment of step 0, which has no full step before it, spacing
    index 0 is used. Every other entry for which a full step would lie before step 0 is never read and may be NaN.

    `sensitivity`, of shape (steps,), is the mean squared error of the final sample per unit of `errors` at a step.

    `reuse_costs` has, per variant, the cost of a reuse step as a share of a full step, between 0 and 1. A full step is
    `num_units` whole units; where a reuse step is not, costs are counted in 1/240 of a full step, rounded up.

    `ValueError` for shapes that do not fit each other, values out of range, or an entry that is read and not finite.
    """

    errors: NDArray[np.floating]
    sensitivity: NDArray[np.floating]
    reuse_costs: tuple[float, ...]
    num_units: int = GRID

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
        """Return `errors` times `sensitivity`, 0 where never read."""
        return np.where(self._is_read(), self.errors, 0).astype(np.float64) * self.sensitivity[:, None, None]

    def units(self) -> tuple[int, tuple[int, ...]]:
        """Return the cost of a full step and of each variant's reuse step, in whole units."""
        exact = np.asarray(self.reuse_costs, np.float64) * self.num_units
        if np.all(np.abs(exact - np.rint(exact)) <= 1e-6):
            return self.num_units, tuple(np.rint(exact).astype(int).tolist())
        return GRID, tuple(math.ceil(cost * GRID - 1e-6) for cost in self.reuse_costs)


@dataclass(frozen=True, kw_only=True)
class PlannedSchedule:
    """A schedule, and what it was planned to cost and to do."""

    full_steps: tuple[int, ...]
    variants: tuple[int | None, ...]
    """one per step, `None` where it is full"""
    cost: float
    """in full steps per step: 1.0 is uncached"""
    predicted_error: float

    @property
    def speedup(self) -> float:
        return 1 / self.cost

    @property
    def psnr_db(self) -> float:
        """Predicted, of the final sample to the uncached one, for a data range of 1."""
        return -10 * math.log10(self.predicted_error) if self.predicted_error > 0 else math.inf


def _check_coherence(coherence: float) -> None:
    if not 0 <= coherence <= 1:
        raise ValueError(f"coherence must be between 0 and 1, got {coherence}")


def predict_error(
    errors: ReuseErrors, full_steps: Sequence[int], variants: Sequence[int | None], coherence: float = 1.0
) -> float:
    """Return the error of the final sample: over segments, the sum of (1 - c) * sum(w e) + c * sum(sqrt(w e))**2.

    `ValueError` where `full_steps` and `variants` (one per step, None where full) contradict each other, or reuse what
    was not measured. A segment may mix variants.
    """
    _check_coherence(coherence)
    num_variants, num_steps, max_spacing, max_age = errors.errors.shape
    starts = [step for step, variant in enumerate(variants) if variant is None]
    if len(variants) != num_steps or starts[:1] != [0] or starts != list(full_steps):
        raise ValueError(
            f"variants must have {num_steps} entries, None at the full steps and at step 0; "
            f"got {list(variants)} for full steps {list(full_steps)}"
        )
    weighted = errors.weighted()
    total, spacing = 0.0, 1
    for start, end in zip(starts, [*starts[1:], num_steps], strict=True):
        if end - start > max_age + 1:
            raise ValueError(f"ages up to {max_age} were measured, got {end - start - 1} after step {start}")
        parts = []
        for step in range(start + 1, end):
            variant = variants[step]
            if variant is None or not 0 <= variant < num_variants:
                raise ValueError(f"a variant must be between 0 and {num_variants - 1}, got {variant} at step {step}")
            parts.append(float(weighted[variant, step, spacing - 1, step - start - 1]))
        total += (1 - coherence) * sum(parts) + coherence * sum(map(math.sqrt, parts)) ** 2
        spacing = min(end - start, max_spacing)
    return total


def _segment_errors(errors: ReuseErrors, coherence: float) -> NDArray[np.float64]:
    """Return the error of the segment of variant v from full step i on at spacing d with a reuse steps, at [v, i, d -
    1, a].

    Where it would run past the last step the entry means nothing.
    """
    weighted = errors.weighted()
    num_variants, num_steps, max_spacing, max_age = weighted.shape
    parts = np.zeros((num_variants, num_steps, max_spacing, max_age + 1))
    for age in range(1, min(max_age, num_steps - 1) + 1):
        parts[:, :-age, :, age] = weighted[:, age:, :, age - 1]
    return (1 - coherence) * parts.cumsum(-1) + coherence * np.sqrt(parts).cumsum(-1) ** 2


def plan(errors: ReuseErrors, *, coherence: float = 1.0, max_age: int | None = None) -> tuple[PlannedSchedule, ...]:
    """Return every schedule that no other one beats in both cost and predicted error, from the dearest to the cheapest.

    The first is the uncached one, of error 0, unless some reuse has error 0 too. Costs fall and errors rise strictly.
    `max_age` limits the reuse steps after a full one. `coherence` says how errors of a segment add: 1 in amplitude,
    0 in power. `ValueError` for a coherence or max_age out of range.
    """
    _check_coherence(coherence)
    num_variants, num_steps, max_spacing, measured_age = errors.errors.shape
    oldest = measured_age if max_age is None else max_age
    if not 1 <= oldest <= measured_age:
        raise ValueError(f"max_age must be between 1 and the measured {measured_age}, got {max_age}")
    segments = _segment_errors(errors, coherence)
    full_units, reuse_units = errors.units()
    dearest = full_units * num_steps
    unit = math.gcd(*(full_units - cost for cost in reuse_units)) or 1
    savings = [(full_units - cost) // unit for cost in reuse_units]

    # least[-1 - a][d - 1, saved]: the least error before the full step a + 1 back; came_from: the choice that gave it
    shape = (oldest + 1, num_variants, max_spacing)
    choice_index = np.arange(math.prod(shape), dtype=np.min_scalar_type(math.prod(shape))).reshape(shape)
    least: deque[NDArray[np.float64]] = deque(maxlen=oldest + 1)
    came_from: list[NDArray[np.unsignedinteger]] = []
    for end in range(num_steps + 1):
        widest = max(savings) * (end - math.ceil(end / (oldest + 1))) + 1
        here = np.full((max_spacing, widest), np.inf)
        choices = np.zeros(here.shape, choice_index.dtype)
        if end == 0:
            here[0, 0] = 0
        for age in range(min(oldest, end - 1) + 1):
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
            cost=(dearest - units * unit) / dearest,
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
    """Return the variant at each step, -1 where full, of each of the schedules that end in the given states; all at
    once."""
    num_steps = len(came_from) - 1
    at, spacing, saved = np.full(len(saved), num_steps), spacing.copy(), saved.copy()
    variants = np.full((len(saved), num_steps), -1, np.int16)
    for end in range(num_steps, 0, -1):
        here = np.flatnonzero(at == end)
        age, variant, spacing[here] = np.unravel_index(came_from[end][spacing[here], saved[here]], shape)
        for back in range(1, min(shape[0], end)):
            reused = age >= back
            variants[here[reused], end - back] = variant[reused]
        at[here] -= age + 1
        saved[here] -= age * np.asarray(savings)[variant]
    assert not at.any()
    assert not saved.any()
    return variants


def choose(
    front: Sequence[PlannedSchedule], *, speedup: float | None = None, psnr_db: float | None = None
) -> PlannedSchedule:
    """Return, of a front from `plan`, the one of least error that is at least `speedup` times as fast as uncached, or
    the cheapest one with a predicted PSNR of at least `psnr_db`.

    `ValueError` where not exactly one of the two is given, or where nothing on the front attains it.
    """
    if speedup is not None and psnr_db is None:
        fastest = max(schedule.speedup for schedule in front)
        fitting = [schedule for schedule in front if schedule.speedup >= speedup * (1 - 1e-9)]
        if not (speedup >= 1 and fitting):
            raise ValueError(f"speedup must be between 1 and {math.floor(fastest * 1e4) / 1e4}, got {speedup}")
        return min(fitting, key=lambda schedule: schedule.predicted_error)
    if psnr_db is not None and speedup is None:
        finest = max(schedule.psnr_db for schedule in front)
        fitting = [schedule for schedule in front if schedule.psnr_db >= psnr_db]
        if not fitting:
            raise ValueError(f"psnr_db must be at most {finest}, got {psnr_db}")
        return min(fitting, key=lambda schedule: schedule.cost)
    raise ValueError(f"give either speedup or psnr_db, got speedup {speedup} and psnr_db {psnr_db}")
