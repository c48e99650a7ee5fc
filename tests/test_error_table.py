"""Errors per timestep: what they say of single steps, and the schedules planned from them, beside plain loops."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from skipdit.cache.enable import cache_summary, enable_cache
from skipdit.cache.error_table import COHERENCE, NODES, ErrorTable, factors_at, fit_factors
from skipdit.cache.methods import load_schedule
from skipdit.cache.predictor import Ahead, FittedPredictor, TaylorPredictor
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.cache.schedule_file import fields_of
from skipdit.pipelines import ClassToImagePipeline

TIMESTEPS = tuple(1000 * (1 - step / 25) for step in range(25))


def table_of(
    curve: Any, *, cost: float = 0.1, timesteps: tuple[float, ...] = TIMESTEPS, weight: Any = lambda step: 1.0
) -> ErrorTable:
    """The table of values that follow a curve over timesteps, (steps, dim), and change the sample by their weight."""
    values = np.stack([curve(timestep) for timestep in timesteps])
    grams = np.zeros((len(timesteps), len(NODES), len(NODES)))
    for step in range(len(timesteps)):
        changes = np.stack([values[max(step - node, 0)] - values[step] for node in NODES])
        grams[step] = changes @ changes.T * weight(step)
    return ErrorTable(timesteps=timesteps, nodes=NODES, grams=grams, reuse_cost=cost)


def waves(timestep: float) -> np.ndarray:
    """Fast at low noise."""
    return np.array([np.sin(timestep / 200), np.cos(timestep / 150), np.exp(-timestep / 100)])


@pytest.mark.parametrize("timesteps", [TIMESTEPS, tuple(1000 * (1 - step / 60) for step in range(60))])
def test_errors_are_those_of_fitted_linear_predictions(timesteps: tuple[float, ...]) -> None:
    """On the measured timesteps exactly, on others as near as the curve can be interpolated."""
    table = table_of(waves)
    errors = table.reuse_errors(timesteps)
    stride = (timesteps[0] - timesteps[1]) / (TIMESTEPS[0] - TIMESTEPS[1])
    found, expected, off = [], [], []
    for step, age, spacing in itertools.product(range(8, len(timesteps) - 1), (1, 2, 4), (1, 2, 4)):
        if step - age - spacing < 4:
            continue
        now, last, before = (waves(timesteps[at]) for at in (step, step - age, step - age - spacing))
        terms = np.stack([last - now, age / spacing * (last - before)])
        factor = fit_factors(terms @ terms.T)[0]
        expected.append(np.square(terms[0] + factor * terms[1]).sum() * stride**2)
        found.append(errors[step, age - 1, spacing - 1])
        levels = timesteps[step], timesteps[step - age], timesteps[step - age - spacing]
        off.append(abs(factors_at(table, *levels)[0] - factor))
    off.extend(np.abs(np.log(np.array(found) / np.array(expected))) / 4)
    assert np.median(off) < (1e-6 if timesteps is TIMESTEPS else 0.05)


@pytest.mark.parametrize("full", [(6, 8, 11), (5, 8, 9), (7, 8, 9), (9, 11), (2, 11)])
def test_factors_are_those_of_fitted_predictions_of_their_order(full: tuple[int, ...]) -> None:
    """After three full steps there are two. 7 steps back changes are interpolated, and factors nearly exact."""
    step, predictor, stored = 12, TaylorPredictor(2), ()
    values = [torch.tensor(waves(timestep)) for timestep in TIMESTEPS]
    for index, one in enumerate(full):
        stored = predictor.update(stored, {"": values[one]}, one - full[index - 1] if index else 1)
    coefficients = (1.0, *predictor.coefficients(len(full) - 1, Ahead(step - full[-1])))
    terms = torch.stack([c * kept[""] for c, kept in zip(coefficients, stored, strict=True)]).numpy()
    terms[0] -= values[step].numpy()
    levels = [TIMESTEPS[one] for one in reversed(full)]
    found = factors_at(table_of(waves), TIMESTEPS[step], *levels)
    assert len(found) == len(full) - 1
    np.testing.assert_allclose(found, fit_factors(terms @ terms.T), rtol=5e-3)


@pytest.mark.parametrize("num_full", [3, 5, 7])
@pytest.mark.parametrize("num_steps", [9, 11])
def test_a_plan_has_the_least_error_of_all_schedules(num_full: int, num_steps: int) -> None:
    table = table_of(waves)
    timesteps = [1000 * (1 - step / num_steps) for step in range(num_steps)]
    errors = table.reuse_errors(timesteps)

    def error(full: tuple[int, ...]) -> float:
        total, before = 0.0, None
        for last, following in zip(full, [*full[1:], num_steps], strict=True):
            spacing = 1 if before is None else last - before
            parts = [errors[step, step - last - 1, spacing - 1] for step in range(last + 1, following)]
            total += (1 - COHERENCE) * sum(parts) + COHERENCE * sum(np.sqrt(part) for part in parts) ** 2
            before = last
        return total

    speedup = num_steps / (num_full + table.reuse_cost * (num_steps - num_full))
    plan = table.plan(timesteps, speedup)
    assert plan is not None
    assert len(plan) == num_full
    every = itertools.combinations(range(1, num_steps), num_full - 1)
    assert error(plan) == pytest.approx(min(error((0, *rest)) for rest in every))


def test_where_there_is_no_plan() -> None:
    table = table_of(waves)
    assert table.plan([1000.0], 2.0) is None
    assert table.plan([1000.0, 500.0], 1.0) is None
    assert table.plan(list(TIMESTEPS), 10.5) is None  # a run of reuse steps alone costs more
    assert table.plan([1000 * (1 - step / 101) for step in range(101)], 2.0) is None  # too many steps


# ----------------------------------------------------------------------------------------------------------------------
# In a schedule.json


def schedule_fields(**changes: Any) -> dict[str, Any]:
    full = [0, 1, 2, 4, 8, 12, 16, 18, 20, 22, 23, 24]
    factors = [None if step in full else [0.5] for step in range(25)]
    return {
        "method": "skip-taylor", "order": 1, "num_inference_steps": 25, "timesteps": TIMESTEPS, "full_steps": full,
        "factors": factors, "errors": fields_of(table_of(waves)),
    } | changes  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "2x.json"
    path.write_text(json.dumps(schedule_fields(**changes)))
    return path


def full_steps_of(pipeline: ClassToImagePipeline, num_steps: int) -> int:
    generator = torch.Generator().manual_seed(0)
    pipeline([1, 2], num_inference_steps=num_steps, generator=generator, output_type="latent")
    return cache_summary(pipeline).steps_full


def test_its_own_run_has_the_listed_steps_and_others_are_planned(tmp_path: Path) -> None:
    method, table = load_schedule(write(tmp_path)), table_of(waves)
    schedule = method.schedule
    assert isinstance(schedule, ExplicitSchedule)
    listed = [None if step in schedule_fields()["full_steps"] else 0 for step in range(25)]
    assert schedule.decisions(TIMESTEPS) == listed
    timesteps = [1000 * (1 - step / 17) for step in range(17)]
    planned = table.plan(timesteps, 25 / (12 + 1.3))
    assert planned is not None
    assert [step for step, decision in enumerate(schedule.decisions(timesteps)) if decision is None] == list(planned)
    finer = [1000 * (1 - step / 50) for step in range(50)]
    planned = table.plan(finer, 25 / (12 + 1.3))
    assert [step for step, decision in enumerate(schedule.decisions(finer)) if decision is None] == list(planned or ())
    # a bare model, whose timesteps are not known
    assert schedule.decisions(finer, whole=False).count(None) == 12
    predictor = method.predictor
    assert isinstance(predictor, FittedPredictor)
    (expected,) = factors_at(table, 500.0, 550.0, 640.0)
    assert predictor.coefficients(1, Ahead(2, 3, 500.0, 45.0, (550.0, 640.0)))[0] == pytest.approx(
        2 * expected, rel=1e-3
    )
    assert predictor.coefficients(1, Ahead(2, 3, 500.0)) == [2 * 0.5]


def test_a_file_damps_factors_that_are_listed_and_those_of_its_errors(tmp_path: Path) -> None:
    plain = load_schedule(write(tmp_path)).predictor
    damped = load_schedule(write(tmp_path, damping=0.8)).predictor
    for ahead in (Ahead(2, 3, 500.0), Ahead(2, 3, 500.0, 45.0, (550.0, 640.0))):
        assert damped.coefficients(1, ahead) == [0.8 * plain.coefficients(1, ahead)[0]]


@pytest.mark.parametrize("speedup", [2.0, 2.5, 3.0])
def test_a_plan_for_finer_steps_is_near_that_of_a_run_that_was_measured(speedup: float) -> None:
    """A model that predicts the sample: what it says at the last step stays, at others it is diluted. The same share of
    full steps at each timestep, as it was before, loses up to 17 dB."""
    finer = tuple(1000 * (1 - step / 50) for step in range(50))

    def curve(timestep: float) -> np.ndarray:
        return np.array([*waves(timestep), np.exp(-timestep / 20), np.exp((timestep - 1000) / 20)])

    def weight(timesteps: tuple[float, ...]) -> Any:
        after = (*timesteps[1:], 0.0)
        return lambda step: (1 - after[step] / timesteps[step]) ** 2

    table, exact = (table_of(curve, timesteps=each, weight=weight(each)) for each in (TIMESTEPS, finer))
    errors = exact.reuse_errors(finer)

    def decibel(full: tuple[int, ...] | None) -> float:
        assert full is not None
        total = 0.0
        for last, following, before in zip(full, (*full[1:], 50), (-1, *full), strict=False):
            spacing = 1 if before < 0 else last - before
            parts = [errors[step, step - last - 1, spacing - 1] for step in range(last + 1, following)]
            total += (1 - COHERENCE) * sum(parts) + COHERENCE * sum(np.sqrt(part) for part in parts) ** 2
        return -10 * np.log10(total)

    best, found = exact.plan(finer, speedup), table.plan(finer, speedup)
    own = table.plan(TIMESTEPS, speedup)
    assert own is not None
    listed = ExplicitSchedule(full_steps=own, num_inference_steps=25, timesteps=TIMESTEPS)
    same_share = tuple(step for step, decision in enumerate(listed.decisions(finer)) if decision is None)
    assert decibel(found) > decibel(best) - 2
    assert decibel(found) > decibel(same_share) + 1


def test_a_pipeline_runs_what_was_planned(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    enable_cache(pipeline, write(tmp_path))
    for num_steps in (20, 50):
        full = full_steps_of(pipeline, num_steps)
        assert full / num_steps == pytest.approx(12 / 25, abs=1 / num_steps)


@pytest.mark.parametrize(("changes", "fault"), [
    ({"order": 0, "factors": []}, "errors need an order of 1 or 2"),
    ({"errors": None, "factors": [], "damping": 0.9}, "damping needs factors"),
    ({"damping": 2.0}, "at most 1"),
    ({"errors": fields_of(table_of(waves)) | {"nodes": [1, 2]}}, "triangle of a matrix of 2 rows"),
    ({"errors": fields_of(table_of(waves)) | {"nodes": [2, *NODES[1:]]}}, "rising from 1"),
    ({"errors": fields_of(table_of(waves)) | {"grams": fields_of(table_of(waves))["grams"][1:]}}, "of 25 steps"),
    ({"errors": fields_of(table_of(waves)) | {"reuse_cost": 1.0}}, "below 1"),
    ({"errors": fields_of(table_of(waves)) | {"more": 1}}, "more"),
])  # fmt: skip
def test_wrong_error_tables_are_refused(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        load_schedule(write(tmp_path, **changes))
