"""Where caching pays less, or not: few steps, solvers that draw noise, layers that quantize activations."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from tiny import tiny_dit, tiny_pipeline
from torch import nn

from skipdit.cache.enable import cache_summary, cached, enable_cache
from skipdit.cache.noise import draws_noise, layer_of_quantized_activations
from skipdit.cache.schedule import MANY_STEPS, AutoSchedule
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
# Quantized activations


def by_torch(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def by_torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def weights_by_torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def by_quanto(model: nn.Module) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
    return model


def weights_by_quanto(model: nn.Module) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    return model


def quantized(quantize: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about their own age
        return quantize(tiny_dit())


@pytest.mark.parametrize("quantize", [by_torch, by_torchao, by_quanto])
def test_layers_that_quantize_activations_are_found(quantize: Callable[[nn.Module], nn.Module]) -> None:
    model = quantized(quantize)
    name = layer_of_quantized_activations(model)
    assert name is not None
    assert isinstance(model.get_submodule(name), nn.Module)


@pytest.mark.parametrize("quantize", [lambda model: model, weights_by_torchao, weights_by_quanto])
def test_other_layers_are_not(quantize: Callable[[nn.Module], nn.Module]) -> None:
    assert layer_of_quantized_activations(quantized(quantize)) is None


def latents_of(pipeline: ClassToImagePipeline, num_steps: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], num_inference_steps=num_steps, generator=generator, output_type="latent").images


@pytest.mark.parametrize(("spec", "held"), [("skip-taylor:N3", "skip-taylor:N3-o0"), ("auto:1.4", "auto:1.4-o0")])
def test_quantized_activations_are_not_extrapolated(spec: str, held: str) -> None:
    pipeline = tiny_pipeline()
    pipeline.transformer = quantized(by_torch)
    with cached(pipeline, held):
        expected = latents_of(pipeline)
    with pytest.warns(UserWarning, match="quantizes activations, .* holds stored values instead") as told:
        enable_cache(pipeline, spec)
    assert len(told) == 1
    assert torch.equal(latents_of(pipeline), expected)
    assert cache_summary(pipeline).method.endswith(", held")


# ----------------------------------------------------------------------------------------------------------------------
# Solvers that draw noise, and few steps


def test_auto_does_not_extrapolate_over_noise_that_the_solver_draws() -> None:
    pipeline = tiny_pipeline("ddpm")
    with cached(pipeline, "auto:1.4-o0"):
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


def test_auto_holds_what_is_stored_where_steps_are_far_apart() -> None:
    def run(spec: str, num_steps: int) -> torch.Tensor:
        with cached(pipeline, spec):
            return latents_of(pipeline, num_steps)

    pipeline = tiny_pipeline()
    assert torch.equal(run("auto:1.4", 12), run("auto:1.4-o0", 12))
    assert not torch.equal(run("auto:1.4", 30), run("auto:1.4-o0", 30))


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

    def serve(guidance_scale: float) -> None:
        with cached(pipeline, "N2"):
            pipeline([1], num_inference_steps=12, guidance_scale=guidance_scale, output_type="latent")

    serve(4.0)
    with pytest.warns(UserWarning, match="in a run of 12 steps at guidance 8: steps so far apart"):
        serve(8.0)


def test_a_part_of_a_longer_run_is_not_taken_for_one_of_few_steps() -> None:
    whole = [1000 * (1 - step / 50) for step in range(50)]
    part = AutoSchedule(speedup=2).for_cost(0.1).decisions(whole[-12:])
    nominal = AutoSchedule(speedup=2).for_cost(0.1).decisions(whole[-12:], whole=False)
    assert part == nominal
