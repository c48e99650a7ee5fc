"""What a cache is made of, without a model: schedules, predictors, specs."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipdit.cache.methods import METHODS, CacheMethod, parse_method
from skipdit.cache.predictor import (
    AdamsBashforthPredictor,
    Ahead,
    FittedPredictor,
    HermitePredictor,
    Predictor,
    TaylorPredictor,
)
from skipdit.cache.schedule import ExplicitSchedule, IntervalSchedule, resolve
from skipdit.cache.site import DeepFeatures, UnitRange
from skipdit.diffusion import Objective, make_scheduler

# steps, then for N = 2 ... 6 (full, cached): class-to-image, 28 blocks, 4 shallow, reset at 20 (reference section 2)
PUBLISHED_COUNTS = {
    250: [(128, 122), (87, 163), (67, 183), (54, 196), (46, 204)],
    50: [(26, 24), (18, 32), (14, 36), (11, 39), (10, 40)],
}
PUBLISHED_RATIOS = {250: [1.535, 1.872, 2.096, 2.273, 2.397], 50: [1.522, 1.842, 2.059, 2.258, 2.333]}


@pytest.mark.parametrize("num_steps", PUBLISHED_COUNTS)
@pytest.mark.parametrize("interval", range(2, 7))
def test_step_counts_equal_the_authors(num_steps: int, interval: int) -> None:
    scheduler = make_scheduler(Objective(learned_variance=True), "ddpm")
    scheduler.set_timesteps(num_steps)
    full = sum(resolve(parse_method(f"N{interval}-1000-20-k4").schedule, scheduler.timesteps.tolist()))
    assert (full, num_steps - full) == PUBLISHED_COUNTS[num_steps][interval - 2]
    ratio = 28 * num_steps / (28 * full + 8 * (num_steps - full))
    assert ratio == pytest.approx(PUBLISHED_RATIOS[num_steps][interval - 2], abs=6e-4)


@pytest.mark.parametrize(
    ("spec", "counts"),
    [
        # text-to-video, 50 DDIM steps 980 ... 0, N2 to N6 at 700-50 (reference section 2)
        ("N2-700-50", (33, 17)),
        ("N3-700-50", (28, 22)),
        ("N4-700-50", (25, 25)),
        ("N5-700-50", (24, 26)),
        ("N6-700-50", (22, 28)),
    ],
)
def test_windowed_step_counts_equal_the_authors(spec: str, counts: tuple[int, int]) -> None:
    full = sum(resolve(parse_method(spec).schedule, range(980, -1, -20)))
    assert (full, 50 - full) == counts


def test_the_step_at_the_reset_may_itself_reuse() -> None:
    # 20 steps, N2: the step at t = 0 is cached (reference section 2)
    scheduler = make_scheduler(Objective(learned_variance=True), "ddpm")
    scheduler.set_timesteps(20)
    assert resolve(IntervalSchedule(interval=2, stop_timestep=20), scheduler.timesteps.tolist())[-1] is False


@given(
    interval=st.integers(1, 8),
    num_steps=st.integers(1, 120),
    stop=st.integers(0, 400),
    width=st.integers(1, 700),
)
def test_interval_schedules_equal_a_count_written_by_hand(interval: int, num_steps: int, stop: int, width: int) -> None:
    schedule = IntervalSchedule(interval=interval, start_timestep=stop + width, stop_timestep=stop)
    timesteps = [999 - 999 * step // num_steps for step in range(num_steps)]
    count, stored, expected = 0, False, []
    for timestep in timesteps:
        expected.append(count % interval == 0 or not stored or timestep >= stop + width)
        count, stored = (0, False) if timestep <= stop else (count + 1, True)
    assert list(resolve(schedule, timesteps)) == expected
    assert expected[0]
    if interval == 1:
        assert all(expected)


@given(st.data())
def test_explicit_schedules_are_what_they_list(data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(2, 60))
    steps = sorted({0, *data.draw(st.lists(st.integers(0, num_steps - 1)))})
    schedule = ExplicitSchedule(full_steps=tuple(steps), num_inference_steps=num_steps)
    assert [i for i, full in enumerate(resolve(schedule, range(num_steps, 0, -1))) if full] == steps


@given(data=st.data())
def test_a_schedule_with_timesteps_keeps_its_share_of_full_steps_in_runs_of_other_lengths(data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(2, 50))
    gaps = data.draw(st.lists(st.integers(1, 40), min_size=num_steps, max_size=num_steps))
    timesteps = tuple(1000.0 - float(each) / sum(gaps) * 1000 for each in np.cumsum([0, *gaps[:-1]]))
    steps = sorted({0, *data.draw(st.lists(st.integers(0, num_steps - 1)))})
    schedule = ExplicitSchedule(full_steps=tuple(steps), num_inference_steps=num_steps, timesteps=timesteps)
    assert [i for i, full in enumerate(resolve(schedule, timesteps)) if full] == steps
    finer = np.interp(np.arange(0, num_steps, 0.5), np.arange(num_steps + 1), [*timesteps, 0.0]).tolist()
    assert abs(sum(resolve(schedule, finer)) - 2 * len(steps)) <= 2
    alone = [
        schedule.decisions(timesteps[: step + 1], whole=False)[-1] for step in range(num_steps)
    ]  # what comes is not known
    assert [step for step, decision in enumerate(alone) if decision is None] == steps


@pytest.mark.parametrize(("num_steps", "shift"), [(50, 2), (50, 5), (28, 3), (100, 3)])
def test_without_what_comes_a_schedule_keeps_its_number_of_full_steps(num_steps: int, shift: float) -> None:
    """Its share of them was found anew at each step, so that up to 45 of 100 were full."""
    full_steps = (0, 1, 2, 4, 7, 11, 16, 22, 28, 34, 40, 45, 48, 49)
    own = tuple(1000.0 - 20 * step for step in range(50))
    schedule = ExplicitSchedule(full_steps=full_steps, num_inference_steps=50, timesteps=own)
    even = 1 - np.arange(num_steps) / num_steps
    timesteps = (1000 * shift * even / (1 + (shift - 1) * even)).tolist()
    alone = [schedule.decisions(timesteps[: step + 1], whole=False)[-1] for step in range(num_steps)]
    assert 9 <= alone.count(None) <= 14


@pytest.mark.parametrize("off", [-1e-3, 1e-3, 1.0])
def test_timesteps_of_low_precision_are_its_own(off: float) -> None:
    full_steps = (0, 1, 2, 4, 7, 11, 16, 22, 28, 34, 40, 45, 48, 49)
    own = [1000.0 - 20 * step for step in range(50)]
    schedule = ExplicitSchedule(full_steps=full_steps, num_inference_steps=50, timesteps=tuple(own))
    full = resolve(schedule, [timestep + off for timestep in own])
    assert tuple(step for step, is_full in enumerate(full) if is_full) == full_steps


def test_in_a_run_of_twice_the_steps_full_ones_stay_spread() -> None:
    timesteps = tuple(1000.0 - 100 * step for step in range(10))
    schedule = ExplicitSchedule(full_steps=(0, 3, 6, 9), num_inference_steps=10, timesteps=timesteps)
    full = resolve(schedule, [1000.0 - 50 * step for step in range(20)])
    gaps = np.diff(np.flatnonzero(full))
    assert sum(full) == 8
    assert full[0]
    assert full[-1]
    assert set(gaps) <= {2, 3}


@pytest.mark.parametrize("full_steps", [(), (1, 2), (0, 2, 2), (0, 3, 2), (0, 9)])
def test_bad_explicit_schedules_are_refused(full_steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="full_steps"):
        ExplicitSchedule(full_steps=full_steps, num_inference_steps=9)


def test_a_schedule_for_other_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="made for 4 steps, got a run of 5"):
        resolve(ExplicitSchedule(full_steps=(0,), num_inference_steps=4), range(5))


# ----------------------------------------------------------------------------------------------------------------------
# How


@pytest.mark.parametrize("kind", [TaylorPredictor, HermitePredictor, AdamsBashforthPredictor])
@given(
    order=st.integers(0, 4),
    coefficients=st.lists(st.floats(-2, 2), min_size=2, max_size=2),
    full_steps=st.lists(st.integers(1, 6), min_size=5, max_size=7).map(lambda gaps: list(np.cumsum(gaps))),
    distance=st.integers(1, 5),
)
def test_every_predictor_follows_a_line_and_holds_at_order_0(
    kind: type[Predictor], order: int, coefficients: list[float], full_steps: list[int], distance: int
) -> None:
    """Whatever the distances of the full steps; a wrong sign of a term shows here."""
    predictor, stored = kind(order), ()
    value, slope = torch.tensor(coefficients, dtype=torch.float64)
    for before, step in pairwise([full_steps[0] - 1, *full_steps]):
        stored = predictor.update(stored, {"value": value + slope * step}, int(step - before))
    assert len(stored) == order + 1
    ahead = predictor.predict(stored, Ahead(distance, int(full_steps[-1] - full_steps[-2])))["value"]
    expected = value + slope * (full_steps[-1] + (distance if order else 0))
    torch.testing.assert_close(ahead, expected, atol=1e-9, rtol=0)


def test_adams_and_bashforth_follow_a_parabola() -> None:
    predictor, stored = AdamsBashforthPredictor(2), ()
    for step in (0, 3, 6):
        stored = predictor.update(stored, {"value": torch.tensor(float(step**2))}, 3)
    assert float(predictor.predict(stored, Ahead(2, 3))["value"]) == 64


def test_hermite_by_hand() -> None:
    stored = tuple({"value": torch.tensor(value)} for value in (5.0, 2.0, 4.0, 6.0))
    assert (
        float(HermitePredictor(3).predict(stored, Ahead(2))["value"]) == 5 + 2 * 2 + 4 * (4 - 1) / 2 + 6 * (8 - 6) / 6
    )


def test_fitted_factors_multiply_the_terms_of_taylor() -> None:
    stored = tuple({"value": torch.tensor(value)} for value in (5.0, 2.0, 4.0))
    ones = FittedPredictor(2, (900.0, 500.0), ((1.0, 1.0), (1.0, 1.0)))
    assert ones.predict(stored, Ahead(3, 1, 700.0)) == TaylorPredictor(2).predict(stored, Ahead(3))
    fitted = FittedPredictor(2, (900.0, 500.0), ((0.5, 2.0), (1.0, 0.0)))
    for timestep, (first, second) in {950: (0.5, 2), 900: (0.5, 2), 700: (0.75, 1), 500: (1, 0), 20: (1, 0)}.items():
        found = float(fitted.predict(stored, Ahead(3, 1, timestep))["value"])
        assert found == pytest.approx(5 + first * 2 * 3 + second * 4 * 9 / 2)
        found = float(replace(fitted, damping=0.9).predict(stored, Ahead(3, 1, timestep))["value"])
        assert found == pytest.approx(5 + 0.9 * (first * 2 * 3 + second * 4 * 9 / 2))


@pytest.mark.parametrize(
    ("timesteps", "factors", "message"),
    [
        ((500.0, 900.0), ((1.0,), (1.0,)), "timesteps must fall"),
        ((900.0,), (), "factors for each of 1 timesteps"),
        ((), (), "factors for each of 0 timesteps"),
        ((900.0,), ((1.0, 1.0),), "1 finite numbers per timestep"),
        ((900.0,), ((math.nan,),), "1 finite numbers per timestep"),
    ],
)
def test_bad_factors_are_refused(timesteps: tuple, factors: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FittedPredictor(1, timesteps, factors)


@pytest.mark.parametrize("damping", [0.0, -1.0, 1.1, math.nan])
def test_damping_only_damps(damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be above 0 and at most 1"):
        FittedPredictor(1, (900.0,), ((1.0,),), damping=damping)


def test_second_derivative_by_hand() -> None:
    stored = ()
    for value in (1.0, 4.0, 9.0):
        stored = TaylorPredictor(2).update(stored, {"value": torch.tensor(value)}, 1)
    assert [float(derivative["value"]) for derivative in stored] == [9.0, 5.0, 2.0]
    assert float(TaylorPredictor(2).predict(stored, Ahead(2))["value"]) == 9 + 5 * 2 + 2 * 4 / 2


def test_hold_returns_the_stored_tensor_itself() -> None:
    value = torch.randn(3)
    assert TaylorPredictor(0).predict(({"value": value},), Ahead(5))["value"] is value


# ----------------------------------------------------------------------------------------------------------------------
# Specs


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("N2", CacheMethod(schedule=IntervalSchedule(interval=2))),
        ("skip:N3", CacheMethod(schedule=IntervalSchedule(interval=3))),
        ("N2-700-50", CacheMethod(schedule=IntervalSchedule(interval=2, start_timestep=700, stop_timestep=50))),
        ("N2-900-49-k2", CacheMethod(schedule=IntervalSchedule(interval=2, start_timestep=900, stop_timestep=49),
                                     site=DeepFeatures(2))),
        ("skip-taylor:N4", CacheMethod(schedule=IntervalSchedule(interval=4), predictor=TaylorPredictor(1))),
        ("skip-taylor:N4-o2-k3", CacheMethod(schedule=IntervalSchedule(interval=4), site=DeepFeatures(3),
                                             predictor=TaylorPredictor(2))),
        ("delta:N2-k2", CacheMethod(schedule=IntervalSchedule(interval=2), site=UnitRange(2))),
        ("delta-taylor:N3-o2", CacheMethod(schedule=IntervalSchedule(interval=3), site=UnitRange(),
                                           predictor=TaylorPredictor(2))),
    ],
)  # fmt: skip
def test_specs_mean_what_they_say(spec: str, method: CacheMethod) -> None:
    assert parse_method(spec) == method
    assert parse_method(str(method)) == method


@pytest.mark.parametrize(
    "spec",
    ["", "2", "N", "N0", "n2", "N2-700", "N2-50-700", "N2-0-0", "N2-k", "N2-k0-", "N2-k1-k2", "N2-o1", "other:N2",
     "delta:N2-o1",
     "skip-taylor:N2-o9", "N2 ", "N-2", "N2-700-50-50"],
)  # fmt: skip
def test_bad_specs_are_refused_in_one_line(spec: str) -> None:
    with pytest.raises(ValueError, match=r".+") as error:
        parse_method(spec)
    assert "\n" not in str(error.value)


def test_every_method_names_its_paper() -> None:
    assert all("arXiv" in method.source or "Seer" in method.source for method in METHODS.values())


def test_a_schedule_file(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    with pytest.raises(FileNotFoundError, match=r"schedule\.json"):
        parse_method(path)
    path.write_text(json.dumps({"full_steps": [0, 1, 4], "num_inference_steps": 6, "num_shallow_units": 2, "order": 1}))
    method = parse_method(str(path))
    assert method.schedule == ExplicitSchedule(full_steps=(0, 1, 4), num_inference_steps=6)
    assert (method.site.num_shallow_units, method.predictor.order) == (2, 1)
    for text in ("{", "[]", "{}", '{"full_steps": 3, "num_inference_steps": 4}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"schedule\.json is not a schedule"):
            parse_method(path)
