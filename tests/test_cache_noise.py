"""Where caching pays less, or not: few steps, solvers that draw noise, quantized activations."""

import inspect
import warnings
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from tiny import TINY_FAMILIES, tiny_pipeline
from torch import nn

from skipdit.cache.auto import MANY_STEPS, RULE, AutoSchedule, weights_of
from skipdit.cache.enable import cached, enable_cache
from skipdit.cache.noise import draws_noise
from skipdit.cache.predictor import Ahead
from skipdit.cache.runtime import FewerStepsWarning
from skipdit.calibration.calibrate import warned_once
from skipdit.pipelines import ClassToImagePipeline

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS: list[tuple[str, dict[str, Any], bool]] = [
    ("DDIMScheduler", {}, False),
    ("DDPMScheduler", {}, True),
    ("DEISMultistepScheduler", {}, False),
    ("DPMSolverMultistepScheduler", {}, False),
    ("DPMSolverMultistepScheduler", FLOW, False),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
    ("EulerDiscreteScheduler", {}, False),
    ("EulerAncestralDiscreteScheduler", {}, True),
    ("FlowMatchEulerDiscreteScheduler", {}, False),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, True),
    ("FlowMatchLCMScheduler", {}, True),
    ("HeunDiscreteScheduler", {}, False),
    ("KDPM2DiscreteScheduler", {}, False),
    ("KDPM2AncestralDiscreteScheduler", {}, True),
    ("LCMScheduler", {}, True),
    ("LMSDiscreteScheduler", {}, False),
    ("PNDMScheduler", {}, False),
    ("SASolverScheduler", {}, True),
    ("TCDScheduler", {}, True),
    ("UniPCMultistepScheduler", {}, False),
]


@pytest.mark.parametrize(("name", "config", "expected"), SCHEDULERS)
def test_a_scheduler_that_draws_noise_is_known(name: str, config: dict[str, Any], expected: bool) -> None:
    """Its steps differ from one generator to the next, and only then."""

    def run(seed: int) -> torch.Tensor:
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        takes = "generator" in inspect.signature(scheduler.step).parameters
        for timestep in scheduler.timesteps:
            given = {"generator": generator} if takes else {}
            sample = scheduler.step(sample.tanh(), timestep, sample, **given, return_dict=False)[0]
        assert draws_noise(scheduler) == expected
        return sample

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of schedulers about their own numbers
        assert torch.equal(run(1), run(2)) != expected


# ----------------------------------------------------------------------------------------------------------------------
# What a cache does about it


def latents_of(pipeline: ClassToImagePipeline, num_steps: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], num_inference_steps=num_steps, generator=generator, output_type="latent").images


def test_quantized_activations_are_extrapolated() -> None:
    """They were held, which cost 4 dB at 2x in int8 (`benchmarks/quantized_activations.py`)."""
    pipeline = tiny_pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age
        pipeline.transformer = torch.ao.quantization.quantize_dynamic(
            pipeline.transformer, {nn.Linear}, dtype=torch.qint8
        )
    enable_cache(pipeline, "skip-taylor:N3")  # warnings are errors
    extrapolated = latents_of(pipeline)
    enable_cache(pipeline, "skip-taylor:N3-o0")
    assert not torch.equal(latents_of(pipeline), extrapolated)


# ----------------------------------------------------------------------------------------------------------------------
# Solvers that draw noise, and few steps


def test_auto_does_not_extrapolate_over_noise_that_the_solver_draws() -> None:
    """And its first and last unit see that noise."""
    pipeline = tiny_pipeline("ddpm")
    with cached(pipeline, "auto:1.4-k1-o0"):
        expected = latents_of(pipeline)
    with pytest.warns(UserWarning, match="DDPMScheduler draws noise in each step"):
        enable_cache(pipeline, "auto:1.4")
    assert torch.equal(latents_of(pipeline), expected)
    enable_cache(pipeline, "skip-taylor:N3")  # what was asked for by name stays


@pytest.mark.parametrize("num_steps", range(4, MANY_STEPS))
def test_auto_reaches_its_speedup_in_a_run_of_few_steps(num_steps: int) -> None:
    """It had 1 full step of 4, as it rounded down, at densities that were meant for another number of steps."""
    timesteps = [1000 * (1 - step / num_steps) for step in range(num_steps)]
    schedule = AutoSchedule(speedup=2).for_cost(0.1)
    full = schedule.decisions(timesteps).count(None)
    assert abs(num_steps / (full + 0.1 * (num_steps - full)) - 2) <= 2 / num_steps + 0.3


def test_auto_holds_what_is_stored_where_steps_are_long_and_noisy() -> None:
    predictor = RULE.predictor(of_output=True)
    assert predictor.coefficients(1, Ahead(1, 1, 650.0, 80.0, (730.0, 810.0))) == [0.0]
    (after,) = predictor.coefficients(1, Ahead(1, 1, 550.0, 80.0, (630.0, 710.0)))
    (short,) = predictor.coefficients(1, Ahead(1, 1, 650.0, 20.0, (670.0, 690.0)))
    assert after > 0.5
    assert short > 0.5
    # with units fresh at the ends, at any timestep
    assert RULE.predictor(of_output=False).coefficients(1, Ahead(1, 1, 550.0, 80.0, (630.0, 710.0))) == [0.0]


def test_auto_extrapolates_over_timesteps() -> None:
    """Under a shifted schedule a step may be twice as long as the one before."""
    predictor = RULE.predictor(of_output=True)
    even = predictor.coefficients(1, Ahead(1, 1, 300.0, 20.0, (320.0, 340.0)))
    long = predictor.coefficients(1, Ahead(1, 1, 300.0, 40.0, (340.0, 360.0)))
    assert long == [pytest.approx(2 * even[0])]
    # a probe's distance, a timestep that comes again, or unknown ones: steps are counted
    assert predictor.coefficients(1, Ahead(1, 1, 300.0)) == even
    assert predictor.coefficients(1, Ahead(1, 1, 300.0, 0.0, (300.0, 300.0))) == even


def shifted(shift: float, num_steps: int) -> list[float]:
    shares = [1 - step / num_steps for step in range(num_steps)]
    return [1000 * shift * share / (1 + (shift - 1) * share) for share in shares]


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("num_steps", [28, 50])
def test_auto_spends_full_steps_where_a_shifted_schedule_is_coarse(shift: float, num_steps: int) -> None:
    """It counted steps alone, left most of the long ones at the end to reuse, and lost 10 dB to fewer steps."""
    timesteps = shifted(shift, num_steps)
    decisions = AutoSchedule(speedup=2).for_cost(0.0).decisions(timesteps)
    assert decisions.count(None) == num_steps // 2
    full = [*(timestep for timestep, each in zip(timesteps, decisions, strict=True) if each is None), 0.0]
    gaps = [before - timestep for before, timestep in pairwise(full)]
    longest = max(before - timestep for before, timestep in pairwise([*timesteps, 0.0]))
    assert max(gaps) < 3 * longest
    whole_numbers = [round(1000 * (1 - step / num_steps)) for step in range(num_steps)]
    assert AutoSchedule(speedup=2).decisions(whole_numbers) == AutoSchedule(speedup=2).decisions(shifted(1, num_steps))


def test_weights_of_steps() -> None:
    assert weights_of([900.0]) == [1.0]
    assert weights_of([900.0, 900.0, 900.0]) == [1.0, 1.0, 1.0]
    assert weights_of([900.0, 600.0, 600.0, 300.0, 300.0]) == [1.0] * 5  # Heun's
    assert weights_of([900.0, 600.0, 600.0, 500.0]) == pytest.approx([1.0, 1.5**1.5, 1.5**1.5, 0.5**1.5])
    assert weights_of([0.0, 500.0, 1000.0]) == [1.0, 1.0, 1.0]  # rising, as some schedulers count


@pytest.mark.parametrize("spec", ["auto:1.4", "N2"])
def test_a_run_with_too_few_steps_for_a_cache_warns(spec: str) -> None:
    pipeline = tiny_pipeline()

    def serve(num_steps: int) -> None:
        with cached(pipeline, spec):
            latents_of(pipeline, num_steps)
            latents_of(pipeline, num_steps)

    fault = r"in a run of 4 steps: .* and 3 steps without a cache are about"
    with pytest.warns(UserWarning, match=fault) as told:
        serve(4)
    assert len(told) == 1
    serve(12)


def test_so_is_one_of_more_steps_with_strong_guidance() -> None:
    pipeline = tiny_pipeline()

    def serve(guidance_scale: float, num_steps: int = 12) -> None:
        with cached(pipeline, "N2"):
            pipeline([1], num_inference_steps=num_steps, guidance_scale=guidance_scale, output_type="latent")

    serve(4.0)
    with pytest.warns(UserWarning, match="in a run of 12 steps at guidance 8: steps so far apart"):
        serve(8.0)
    serve(3.0, 8)
    with pytest.warns(UserWarning, match="in a run of 8 steps at guidance 4: steps so far apart"):
        serve(4.0, 8)


def test_a_scale_that_the_model_embeds_is_no_guidance_by_difference() -> None:
    """FLUX's and HunyuanVideo's: their pipelines tell it by the same name."""
    pytest.importorskip("transformers")
    model = TINY_FAMILIES["FluxTransformer2DModel"].build(3)
    kind: Any = diffusers.FluxPipeline  # parts may be absent, which it does not declare
    pipeline = kind(diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    pipeline.set_progress_bar_config(disable=True)
    shapes = {"prompt_embeds": (1, 5, 12), "pooled_prompt_embeds": (1, 10), "latents": (1, 16, 4)}
    options: dict[str, Any] = {name: torch.randn(shape) for name, shape in shapes.items()}
    with cached(pipeline, "delta:N2"):  # warnings are errors
        pipeline(num_inference_steps=12, guidance_scale=30.0, height=64, width=64, output_type="latent", **options)
    assert pipeline.guidance_scale == 30


def test_runs_of_one_measurement_warn_once() -> None:
    pipeline = tiny_pipeline()

    def measure() -> None:
        for spec in ("N2", "N2-k2", "skip-taylor:N2"):
            with cached(pipeline, spec):
                latents_of(pipeline, 4)

    with pytest.warns(FewerStepsWarning) as told:
        measure()
    assert len(told) == 3
    with pytest.warns(FewerStepsWarning) as told:
        warned_once(FewerStepsWarning)(measure)()
    assert len(told) == 1


def test_a_part_of_a_longer_run_is_not_taken_for_one_of_few_steps() -> None:
    whole = [1000 * (1 - step / 50) for step in range(50)]
    part = AutoSchedule(speedup=2).for_cost(0.1).decisions(whole[-12:])
    nominal = AutoSchedule(speedup=2).for_cost(0.1).decisions(whole[-12:], whole=False)
    assert part == nominal
