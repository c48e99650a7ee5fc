"""Objectives against closed forms and the authors' numbers; schedulers against exact paths."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch
from diffusers import DDPMScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import norm

from skipdit.checkpoints import load_model
from skipdit.diffusion import (
    PREDICTIONS,
    SCHEDULERS,
    Objective,
    add_noise,
    ddpm_tables,
    discretized_gaussian_log_likelihood,
    guide,
    make_scheduler,
    objective_of,
    prediction_target,
    sample_timesteps,
    signal_and_noise_levels,
    training_loss,
)
from skipdit.pipelines import ClassToImagePipeline
from skipdit.runs import scheduled

OBJECTIVES = [
    Objective(process=process, prediction_type=prediction)
    for process, predictions in PREDICTIONS.items()
    for prediction in predictions
]


def x_start_from(
    objective: Objective, output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The clean picture that a prediction stands for, solved by hand from x_t = a x_0 + s noise."""
    signal, sigma = signal_and_noise_levels(objective, timesteps)
    return {
        "epsilon": lambda: (noisy - sigma * output) / signal,
        "v_prediction": lambda: signal * noisy - sigma * output,
        "sample": lambda: output,
        "flow_prediction": lambda: noisy - sigma * output,
    }[objective.prediction_type]()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.process}-{o.prediction_type}")
def test_a_perfect_prediction_has_no_loss_and_gives_back_the_picture(objective: Objective) -> None:
    x_start, noise = torch.rand(5, 3, 4, 4) * 2 - 1, torch.randn(5, 3, 4, 4)
    timesteps = torch.tensor([1, 200, 500, 900, 990])
    target = prediction_target(objective, x_start, noise, timesteps)
    loss = training_loss(lambda *_: target, objective, x_start, noise, timesteps)
    assert loss.loss.abs().max() < 1e-10
    noisy = add_noise(objective, x_start, noise, timesteps)
    torch.testing.assert_close(x_start_from(objective, target, noisy, timesteps), x_start, atol=2e-4, rtol=0)
    worse = training_loss(lambda *_: target + 0.1, objective, x_start, noise, timesteps)
    assert worse.mse.tolist() == pytest.approx([0.01] * 5, rel=1e-4)


def test_x_prediction_of_a_flow_is_weighted_in_velocity_space() -> None:
    objective = Objective(process="flow", prediction_type="sample", min_sigma=0.1)
    x_start, noise = torch.zeros(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    loss = training_loss(lambda *_: torch.ones(2, 1, 2, 2), objective, x_start, noise, torch.tensor([500.0, 20.0])).loss
    assert loss.tolist() == pytest.approx([1 / 0.5**2, 1 / 0.1**2])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.process}-{o.prediction_type}")
def test_min_snr_weighs_the_error_of_the_picture(objective: Objective) -> None:
    """Whatever is predicted: x_0 is solved from the prediction by hand, and its error weighs min(SNR, gamma)."""
    objective = dataclasses.replace(objective, min_snr_gamma=5.0)
    x_start, noise = torch.rand(6, 3, 4, 4) * 2 - 1, torch.randn(6, 3, 4, 4)
    timesteps = torch.tensor([20, 100, 300, 500, 800, 950])
    noisy = add_noise(objective, x_start, noise, timesteps)
    output = prediction_target(objective, x_start, noise, timesteps) + 0.3 * torch.randn(6, 3, 4, 4)
    signal, sigma = signal_and_noise_levels(objective, timesteps)
    snr = (signal / sigma).square().flatten()
    assert (snr < 5).any()
    assert (snr > 5).any()
    wrong = (x_start_from(objective, output, noisy, timesteps) - x_start).square().flatten(1).mean(dim=1)
    terms = training_loss(lambda *_: output, objective, x_start, noise, timesteps)
    torch.testing.assert_close(terms.loss, snr.clamp(max=5) * wrong, rtol=2e-4, atol=0)
    plain = training_loss(
        lambda *_: output, dataclasses.replace(objective, min_snr_gamma=None), x_start, noise, timesteps
    )
    assert torch.equal(terms.mse, plain.mse)
    if objective.prediction_type == "epsilon":  # as the paper has it: min(SNR, gamma) / SNR
        torch.testing.assert_close(terms.loss, terms.mse * snr.clamp(max=5) / snr)
    if objective.prediction_type == "v_prediction":
        torch.testing.assert_close(terms.loss, terms.mse * snr.clamp(max=5) / (snr + 1))


def test_min_snr_is_finite_at_both_ends_and_leaves_the_variational_bound() -> None:
    x_start, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for prediction in PREDICTIONS["flow"]:
        objective = Objective(process="flow", prediction_type=prediction, min_snr_gamma=5.0)
        ends = training_loss(lambda *_: torch.zeros(2, 3, 4, 4), objective, x_start, noise, torch.tensor([0.0, 1000.0]))
        assert ends.loss.isfinite().all()
    output, timesteps = torch.randn(2, 6, 4, 4), torch.tensor([5, 500])
    free, held = (
        training_loss(
            lambda *_: output, Objective(learned_variance=True, min_snr_gamma=gamma), x_start, noise, timesteps
        )
        for gamma in (None, 5.0)
    )
    assert free.variational_bound is not None
    assert held.variational_bound is not None
    assert torch.equal(free.variational_bound, held.variational_bound)
    assert held.loss[0] < free.loss[0]


def test_losses_equal_the_authors(shared: Path) -> None:
    cases = load_file(shared / "parity" / "dit_skip_cases.safetensors")
    model = load_model(shared / "parity" / "dit_skip.safetensors", num_attention_heads=2)
    with torch.no_grad():
        terms = training_loss(
            lambda noisy, timesteps: model(noisy, timesteps, cases["y"]).sample,
            Objective(learned_variance=True),
            cases["x"][1],
            cases["x"][2],
            cases["loss_t"],
        )
    for actual, name in ((terms.loss, "loss"), (terms.mse, "loss_mse"), (terms.variational_bound, "loss_vb")):
        torch.testing.assert_close(actual, cases[name], atol=1e-4, rtol=0)


def test_the_mean_does_not_learn_from_the_variational_bound() -> None:
    output = torch.zeros(2, 2, 4, 4, requires_grad=True)
    x_start, noise = torch.rand(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    terms = training_loss(lambda *_: output, Objective(learned_variance=True), x_start, noise, torch.tensor([0, 400]))
    assert terms.variational_bound is not None
    (gradient,) = torch.autograd.grad(terms.variational_bound.sum(), output)
    assert gradient[:, :1].abs().max() == 0
    assert gradient[:, 1:].abs().min(dim=-1).values.max() > 0


def test_discretized_likelihood_is_the_probability_of_a_pixel_value() -> None:
    values = torch.linspace(-1, 1, 256)
    mean, std = 0.1, 0.3
    actual = discretized_gaussian_log_likelihood(
        values.reshape(1, 1, 16, 16), torch.full((1, 1, 16, 16), mean), torch.full((1, 1, 16, 16), math.log(std))
    ).exp()
    assert actual.sum().item() == pytest.approx(1, abs=1e-4)
    exact = norm.cdf(values + 1 / 255, mean, std) - norm.cdf(values - 1 / 255, mean, std)
    exact[0], exact[-1] = norm.cdf(-1 + 1 / 255, mean, std), norm.sf(1 - 1 / 255, mean, std)
    assert abs(actual.flatten().numpy() - exact).max() < 3e-4  # the tanh form is an approximation


@pytest.mark.parametrize(("name", "objective"), [
    (name, objective) for objective in OBJECTIVES for name in SCHEDULERS[objective.process]
], ids=lambda value: value if isinstance(value, str) else f"{value.process}-{value.prediction_type}")  # fmt: skip
def test_every_scheduler_recovers_a_known_picture(name: str, objective: Objective) -> None:
    """A model that always knows the picture ends exactly there, whatever it predicts."""
    tolerance = 2e-3 if name == "dpm" and objective.process == "ddpm" else 1e-3
    picture = torch.rand(1, 3, 8, 8) * 2 - 1
    scheduler = make_scheduler(objective, name)
    scheduler.set_timesteps(12)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(picture.shape, generator=generator)
    for timestep in scheduler.timesteps:
        timesteps = timestep[None]
        signal, sigma = signal_and_noise_levels(objective, timesteps)
        if objective.process == "flow":  # the scheduler rounds its timesteps, not its sigmas
            sigma = scheduler.sigmas[(scheduler.timesteps == timestep).nonzero()[0, 0]]
            signal = 1 - sigma
        noise = (sample - signal * picture) / sigma
        output = prediction_target(objective, picture, noise, timesteps)
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
    torch.testing.assert_close(sample, picture, atol=tolerance, rtol=0)
    assert objective_of(scheduler) == objective


def test_the_authors_timesteps_and_posterior(shared: Path) -> None:
    cases = load_file(shared / "parity" / "dit_skip_cases.safetensors")
    model = load_model(shared / "parity" / "dit_skip.safetensors", num_attention_heads=2)
    scheduler = make_scheduler(Objective(learned_variance=True), "ddpm")
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.flip(0).tolist() == cases["timesteps_respaced_20"].tolist()
    timestep = scheduler.timesteps[-1 - 7]
    with torch.no_grad():
        output = model(cases["x"][0], timestep, cases["y"]).sample
    step = scheduler.step(output, timestep, cases["x"][0], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(step.pred_original_sample, cases["ddpm20_step7_pred_xstart"], atol=1e-4, rtol=0)
    noise = torch.randn(cases["x"][0].shape, generator=torch.Generator().manual_seed(3))
    expected = cases["ddpm20_step7_mean"] + (0.5 * cases["ddpm20_step7_log_variance"]).exp() * noise
    torch.testing.assert_close(step.prev_sample, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["skip", "cached_N2", "cached_N3"])
def test_ddim_with_guidance_equals_the_authors(case: str, shared: Path) -> None:
    """The final latents are as large as 386, where float32 resolves 3e-5: the reference itself differs from exact
    arithmetic (the same run in float64) by 2e-4. So the bound is 2e-6 of the largest latent."""
    from skipdit.cache.enable import enable_cache

    cases = load_file(shared / "parity" / "dit_skip_cases.safetensors")
    model = load_model(shared / "parity" / "dit_skip.safetensors", num_attention_heads=2)
    pipeline = ClassToImagePipeline(model, make_scheduler(Objective(learned_variance=True), "ddim"))
    pipeline.set_progress_bar_config(disable=True)
    if case != "skip":
        enable_cache(pipeline, f"{case.removeprefix('cached_')}-1000-20-k4")
    latents = pipeline(
        cases["y"][:3].tolist(),
        guidance_scale=4.0,
        guidance_channels=3,
        num_inference_steps=20,
        latents=cases["ddim20_z"],
        output_type="latent",
    ).images
    expected = cases[f"ddim20_cfg4_{case}"]
    torch.testing.assert_close(latents, expected, atol=2e-6 * expected.abs().max().item(), rtol=0)


@given(scale=st.floats(0, 10), num_channels=st.sampled_from([None, 1, 3]))
def test_guidance(scale: float, num_channels: int | None) -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 2, 2)
    guided = guide(torch.cat([conditional, unconditional]), scale, num_channels)
    count = num_channels or 4
    torch.testing.assert_close(guided[:, :count], (unconditional + scale * (conditional - unconditional))[:, :count])
    assert torch.equal(guided[:, count:], conditional[:, count:])


def test_training_timesteps_follow_their_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = sample_timesteps(Objective(), 20_000, generator)
    assert (uniform.min(), uniform.max()) == (0, 999)
    objective = Objective(
        process="flow", prediction_type="sample", timestep_sampling="logit_normal", logit_mean=0.8, logit_std=0.8
    )
    logits = torch.logit(sample_timesteps(objective, 20_000, generator) / 1000)
    assert logits.mean().item() == pytest.approx(0.8, abs=0.02)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)
    objective = Objective(timestep_sampling="log_normal", logit_mean=-0.6, logit_std=1.0)
    drawn = sample_timesteps(objective, 20_000, generator)
    signal, sigma = signal_and_noise_levels(objective, drawn, ndim=1)
    ratios = (sigma / signal).log()
    assert ratios.mean().item() == pytest.approx(-0.6, abs=0.03)
    assert ratios.std().item() == pytest.approx(1.0, abs=0.03)
    for timestep in (0, 3, 500, 999):  # the nearest timestep
        signal, sigma = signal_and_noise_levels(objective, torch.tensor([timestep]), ndim=1)
        exact = dataclasses.replace(objective, logit_mean=(sigma / signal).log().item() + 1e-4, logit_std=0.0)
        assert sample_timesteps(exact, 3, generator).tolist() == [timestep] * 3


def test_ddpm_tables_are_the_published_process() -> None:
    tables = ddpm_tables()
    assert tables.alphas_cumprod.dtype == torch.float64
    assert tables.alphas_cumprod[0].item() == pytest.approx(1 - 1e-4)
    assert tables.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize(("options", "message"), [
    ({"process": "ddpm", "prediction_type": "flow_prediction"}, "flow_prediction"),
    ({"process": "sde"}, "sde"),
    ({"timestep_sampling": "logit_normal"}, "needs process 'flow'"),
    ({"process": "flow", "prediction_type": "sample", "timestep_sampling": "log_normal"}, "needs process 'ddpm'"),
    ({"min_snr_gamma": 0.0}, "min_snr_gamma.*0.0"),
    ({"timestep_sampling": "log_normal", "logit_std": -1.0}, "logit_std.*-1"),
    ({"learned_variance": True, "prediction_type": "sample"}, "sample"),
    ({"process": "flow", "prediction_type": "sample", "timestep_sampling": "beta"}, "beta"),
])  # fmt: skip
def test_bad_objectives_are_named(options: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as a user has it
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_wrong_scheduler_or_channels_are_named() -> None:
    with pytest.raises(ValueError, match="one of euler, dpm, got 'ddim'"):
        make_scheduler(Objective(process="flow", prediction_type="sample"), "ddim")
    with pytest.raises(ValueError, match="must output 6 channels"):
        training_loss(lambda x, _: x, Objective(learned_variance=True), *torch.zeros(2, 1, 3, 4, 4), torch.tensor([3]))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_another_scheduler_of_a_model_of_ours_is_the_one_that_is_made(objective: Objective) -> None:
    for own in SCHEDULERS[objective.process]:
        pipeline: Any = SimpleNamespace(scheduler=make_scheduler(objective, own))
        with scheduled(pipeline, "dpm"):
            assert pipeline.scheduler.config == make_scheduler(objective, "dpm").config
        assert pipeline.scheduler.config == make_scheduler(objective, own).config


def test_another_scheduler_of_a_published_model_keeps_its_betas_and_its_shift() -> None:
    """HunyuanDiT's and Wan's: a run by another scheduler had those of our models."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.03}
    hunyuan = DDPMScheduler(**betas, prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    wan = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    pipeline: Any = SimpleNamespace(scheduler=hunyuan)
    with scheduled(pipeline, "dpm"):
        assert pipeline.scheduler is not hunyuan
        assert torch.equal(pipeline.scheduler.alphas_cumprod, hunyuan.alphas_cumprod)
    pipeline.scheduler = wan
    with scheduled(pipeline, "dpm"):
        assert pipeline.scheduler.config.flow_shift == 5
