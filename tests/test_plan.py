"""The best schedule from measured errors, against all schedules."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipdit.cache.auto import AutoSchedule
from skipdit.cache.schedule import resolve
from skipdit.calibration.plan import PlannedSchedule, ReuseErrors, choose, plan

Variants = tuple[int | None, ...]


def random_errors(shape: tuple[int, int, int, int], seed: int, costs: tuple[float, ...], num_units: int) -> ReuseErrors:
    """NaN wherever a full step before step 0 would be needed, save at index 0 of the spacing behind step 0."""
    random = np.random.default_rng(seed)
    errors = random.lognormal(sigma=1.5, size=shape) * 1e-3
    for step, spacing, age in np.ndindex(shape[1:]):
        last = step - age - 1
        if last < 0 or (last - spacing - 1 < 0 and not (last == 0 and spacing == 0)):
            errors[:, step, spacing, age] = np.nan
    return ReuseErrors(errors=errors, sensitivity=random.uniform(size=shape[1]), reuse_costs=costs, num_units=num_units)


def all_schedules(num_steps: int, num_variants: int, max_age: int) -> Iterator[Variants]:
    if num_steps == 0:
        yield ()
    for age in range(min(max_age, num_steps - 1) + 1 if num_steps else 0):
        for rest in all_schedules(num_steps - age - 1, num_variants, max_age):
            for variant in range(num_variants if age else 1):
                yield (None, *[variant] * age, *rest)


def error_by_hand(errors: ReuseErrors, variants: Variants, coherence: float) -> float:
    total, seen = 0.0, []
    for step, variant in enumerate(variants):
        if variant is not None:
            continue
        behind = [s for s in range(step + 1, len(variants)) if None not in variants[step + 1 : s + 1]]
        spacing = min(step - seen[-1], errors.errors.shape[2]) if seen else 1
        amplitudes = [
            math.sqrt(errors.sensitivity[s] * errors.errors[variants[s], s, spacing - 1, s - step - 1]) for s in behind
        ]
        total += (1 - coherence) * sum(a * a for a in amplitudes) + coherence * sum(amplitudes) ** 2
        seen.append(step)
    return total


@settings(max_examples=40)
@given(
    num_steps=st.integers(1, 7),
    max_spacing=st.integers(1, 4),
    max_age=st.integers(1, 4),
    costs=st.sampled_from([(0.25, 0.5), (0.0, 0.75), (0.25, 1.0), (0.5, 0.5)]),
    coherence=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_the_front_is_that_of_all_schedules(
    num_steps: int, max_spacing: int, max_age: int, costs: tuple[float, float], coherence: float, seed: int
) -> None:
    errors = random_errors((2, num_steps, max_spacing, max_age), seed, costs, 4)
    front = plan(errors, coherence=coherence)
    everything = {
        variants: (
            np.mean([1 if v is None else costs[v] for v in variants]),
            error_by_hand(errors, variants, coherence),
        )
        for variants in all_schedules(num_steps, 2, max_age)
    }
    for planned in front:
        cost, error = everything[planned.variants]
        assert planned.cost == pytest.approx(cost, rel=1e-12)
        assert planned.predicted_error == pytest.approx(error, rel=1e-9)
    for budget in {cost for cost, _ in everything.values()}:
        best = min(error for cost, error in everything.values() if cost <= budget + 1e-9)
        planned = min(p.predicted_error for p in front if p.cost <= budget + 1e-9)
        assert planned == pytest.approx(best, rel=1e-9)


@given(seed=st.integers(0, 10_000), coherence=st.floats(0, 1))
@settings(max_examples=10)
def test_the_front_starts_uncached_and_is_strict(seed: int, coherence: float) -> None:
    errors = random_errors((2, 24, 3, 4), seed, (2 / 7, 3 / 7), 7)
    front = plan(errors, coherence=coherence)
    assert front[0] == PlannedSchedule(
        full_steps=tuple(range(24)), variants=(None,) * 24, cost=1.0, predicted_error=0.0
    )
    assert front[-1].cost == pytest.approx((5 + 19 * 2 / 7) / 24)
    for dearer, cheaper in pairwise(front):
        assert dearer.cost > cheaper.cost
        assert dearer.predicted_error < cheaper.predicted_error
    for planned in front:
        again = error_by_hand(errors, planned.variants, coherence)
        assert again == pytest.approx(planned.predicted_error, rel=1e-9)


def test_the_spacing_decides() -> None:
    """Of two reuse steps in five, 1 and 3 look best from errors at spacing 1, but step 3 follows a spacing of 2."""
    measured = np.full((1, 5, 2, 1), 10.0)
    measured[0, [1, 3, 4], 0, 0] = 1, 1, 2
    measured[0, [3, 4], 1, 0] = 8, 8
    errors = ReuseErrors(errors=measured, sensitivity=np.ones(5), reuse_costs=(0.5,), num_units=2)
    blind = ReuseErrors(errors=measured[:, :, :1], sensitivity=np.ones(5), reuse_costs=(0.5,), num_units=2)
    assert plan(blind)[2].full_steps == (0, 2, 4)
    assert error_by_hand(errors, (None, 0, None, 0, None), 1.0) == pytest.approx(9)
    assert plan(errors)[2].full_steps == (0, 2, 3)
    assert plan(errors)[2].predicted_error == pytest.approx(3)


@pytest.mark.parametrize(("coherence", "error"), [(0.0, 13.0), (0.5, 19.0), (1.0, 25.0)])
def test_the_first_segment_uses_the_first_spacing(coherence: float, error: float) -> None:
    measured = np.full((1, 3, 2, 2), np.nan)
    measured[0, 1, 0, 0] = 4
    measured[0, 2, 0] = 100, 3
    errors = ReuseErrors(errors=measured, sensitivity=np.array([1.0, 1.0, 3.0]), reuse_costs=(0.5,), num_units=2)
    cheapest = plan(errors, coherence=coherence)[-1]
    assert (cheapest.full_steps, cheapest.variants) == ((0,), (None, 0, 0))
    assert cheapest.predicted_error == pytest.approx(error)


@pytest.mark.parametrize(
    ("cost", "num_units", "counted"), [(4 / 28, 28, 4 / 28), (0.5, 7, 0.5), (0.3335, 28, 81 / 240)]
)
def test_costs_are_exact_or_rounded_up(cost: float, num_units: int, counted: float) -> None:
    front = plan(random_errors((1, 2, 1, 1), 0, (cost,), num_units))
    assert [planned.cost for planned in front] == pytest.approx([1, (1 + counted) / 2], rel=1e-12)


def test_reuse_without_error_replaces_the_uncached_run() -> None:
    errors = ReuseErrors(errors=np.ones((1, 2, 1, 1)), sensitivity=np.zeros(2), reuse_costs=(0.5,), num_units=2)
    (only,) = plan(errors)
    assert (only.variants, only.predicted_error) == ((None, 0), 0)


def test_choose_takes_the_best_that_fits() -> None:
    front = plan(random_errors((2, 12, 2, 3), 1, (0.25, 0.5), 4))
    for dearer, planned in pairwise(front):
        assert choose(front, speedup=planned.speedup) == planned
        assert choose(front, speedup=(dearer.speedup + planned.speedup) / 2) == planned
    assert choose(front, speedup=1) == front[0]


def test_choose_names_the_possible_speedups() -> None:
    front = plan(random_errors((1, 3, 1, 1), 1, (0.5,), 2))
    for speedup in (1.21, 0.9, math.nan):
        with pytest.raises(ValueError, match=r"between 1 and 1\.2, got"):
            choose(front, speedup=speedup)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"errors": np.ones((2, 3, 1))}, r"\(variants, steps, max_spacing, max_age\), got shape \(2, 3, 1\)"),
        ({"errors": np.ones((2, 3, 1, 0))}, "max_age"),
        ({"errors": np.full((2, 3, 1, 2), -1.0)}, "variant 0, step 1, spacing 1, age 1"),
        ({"errors": np.full((2, 3, 1, 2), np.nan)}, "got nan for variant 0"),
        ({"sensitivity": np.ones(4)}, r"sensitivity must be \(3,\)"),
        ({"sensitivity": np.array([1, np.inf, 1])}, "sensitivity must be finite"),
        ({"sensitivity": np.array([1.0, -1.0, 1.0])}, "sensitivity must be finite"),
        ({"reuse_costs": (0.5,)}, "2 numbers between 0 and 1"),
        ({"reuse_costs": (0.5, 1.1)}, r"got \(0.5, 1.1\)"),
        ({"num_units": 0}, "num_units must be at least 1"),
    ],
)
def test_bad_measurements_are_refused(changed: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "errors": np.ones((2, 3, 1, 2)), "sensitivity": np.ones(3), "reuse_costs": (0.25, 0.5), "num_units": 4
    }  # fmt: skip
    ReuseErrors(**good)
    with pytest.raises(ValueError, match=message):
        ReuseErrors(**{**good, **changed})


def test_a_coherence_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="coherence"):
        plan(random_errors((1, 4, 1, 2), 0, (0.5,), 2), coherence=-0.1)


# ----------------------------------------------------------------------------------------------------------------------
# The rule of `auto`


def auto_full_steps(speedup: float, reuse_cost: float, num_steps: int) -> list[int]:
    timesteps = [1000 * (1 - step / num_steps) for step in range(num_steps)]
    full = resolve(AutoSchedule(speedup=speedup).for_cost(reuse_cost), timesteps)
    return [step for step, is_full in enumerate(full) if is_full]


@pytest.mark.parametrize("reuse_cost", [0.0, 1 / 12, 0.25])
@pytest.mark.parametrize("speedup", [1.2, 1.5, 1.8, 2.0, 2.5, 3.0])
def test_auto_reaches_its_speedup_and_no_more(speedup: float, reuse_cost: float) -> None:
    num_full = len(auto_full_steps(speedup, reuse_cost, 50))

    def ratio(full: int) -> float:
        return 50 / (full + reuse_cost * (50 - full))

    assert ratio(num_full) >= speedup - 1e-9
    assert ratio(num_full + 3) < speedup  # steps come into a schedule a few at a time


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_steps", [20, 50, 100])
@pytest.mark.parametrize("speedup", [1.5, 2.0, 2.5])
def test_auto_reaches_its_speedup_on_unevenly_spaced_timesteps_too(
    speedup: float, num_steps: int, shift: float
) -> None:
    """It overshot by a step or more, as its densities were scaled to evenly spaced ones."""
    even = 1 - np.arange(num_steps) / num_steps
    timesteps = (1000 * shift * even / (1 + (shift - 1) * even)).tolist()
    full = sum(resolve(AutoSchedule(speedup=speedup).for_cost(0.1), timesteps))

    def ratio(full: int) -> float:
        return num_steps / (full + 0.1 * (num_steps - full))

    assert ratio(full) >= speedup - 1e-9
    assert ratio(full + max(num_steps // 12, 2)) < speedup  # steps come into a schedule a few at a time


@pytest.mark.parametrize("num_steps", [50, 100, 250])
def test_auto_is_dense_at_both_ends_at_any_number_of_steps(num_steps: int) -> None:
    full = auto_full_steps(1.8, 1 / 12, num_steps)
    gaps = np.diff(full)
    middle = gaps[len(gaps) // 2 :]
    assert full[:3] == [0, 1, 2]
    assert full[-1] == num_steps - 1
    assert gaps[0] == gaps[-1] == 1
    assert max(gaps) == max(middle) >= 3
    assert num_steps / (len(full) + (num_steps - len(full)) / 12) == pytest.approx(1.8, rel=0.15)


def test_auto_out_of_reach_and_a_run_without_reuse() -> None:
    with pytest.raises(ValueError, match=r"a speedup of 4 is out of reach: a reuse step costs 0.25 of a full one"):
        AutoSchedule(speedup=4).for_cost(0.25)
    assert auto_full_steps(1.0, 0.25, 50) == list(range(50))
