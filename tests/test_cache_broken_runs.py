"""A cache in runs that are partial, that break off, or that another run follows."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from test_cache_in_use import FLUX, LATTE, WAN, Stopped, build, run, stop_at
from tiny import TINY_FAMILIES, counts, tiny_pipeline
from torch import Tensor

from skipdit.cache.enable import cache_summary, enable_cache
from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.pipelines import ClassToImagePipeline


@torch.no_grad()
def partial_run(pipeline: ClassToImagePipeline, num_steps: int, first: int, seed: int = 0) -> Tensor:
    """As image-to-image does: from the middle of the timesteps on."""
    pipeline.scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    for timestep in pipeline.scheduler.timesteps[first:]:
        out = pipeline.transformer(latents, timestep, torch.tensor([1, 2])).sample
        latents = pipeline.scheduler.step(out[:, :4], timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("spec", ["N2", "skip-taylor:N3-900-20-o1", "fora:N2", "auto:1.5"])
def test_partial_runs_in_any_order_equal_fresh_ones(spec: str) -> None:
    settings = [(12, 0), (12, 6), (12, 5), (20, 13), (7, 0), (12, 6)]
    fresh = []
    for setting in settings:
        torch.manual_seed(0)
        pipeline = tiny_pipeline()
        enable_cache(pipeline, spec)
        fresh.append((partial_run(pipeline, *setting), *counts(pipeline)))
    torch.manual_seed(0)
    pipeline = tiny_pipeline()
    enable_cache(pipeline, spec)
    for setting, (expected, *numbers) in zip(settings, fresh, strict=True):
        stop_at(pipeline.transformer, 4)
        with pytest.raises(Stopped):  # the same labels, timesteps above those that come
            partial_run(pipeline, 12, 0, seed=4)
        assert torch.equal(partial_run(pipeline, *setting), expected), setting
        assert list(counts(pipeline)) == numbers


def test_a_partial_run_follows_a_schedule_by_its_timesteps() -> None:
    """A third of its steps is full, as in the run that it was made for, and the first one is."""
    schedule = ExplicitSchedule(
        full_steps=(0, 3, 6), num_inference_steps=9, timesteps=(800, 700, 600, 500, 400, 300, 200, 100, 0)
    )
    pipeline = tiny_pipeline()
    enable_cache(pipeline, CacheMethod(schedule=schedule))
    units: list[int] = []
    pipeline.transformer.blocks[2].register_forward_hook(lambda *_: units.append(1))
    ran = []
    pipeline.transformer.register_forward_hook(lambda *_: ran.append(len(units)))
    partial_run(pipeline, 20, 8)  # 550, 500, ... 0
    full = [after > before for before, after in zip([0, *ran], ran, strict=False)]
    assert [550 - 50 * step for step, is_full in enumerate(full) if is_full] == [550, 450, 300, 200]


@pytest.fixture
def flux_pipelines() -> tuple[Any, Any, dict[str, Any]]:
    """Text-to-image and image-to-image over one transformer, and the options of both. They hand on copies of their
    timesteps."""
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=1, norm_num_groups=4, shift_factor=0.0).eval()
    model = build(FLUX, 6)
    pipelines = [
        kind(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, model)
        for kind in (diffusers.FluxPipeline, diffusers.FluxImg2ImgPipeline)
    ]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    prompt_embeds, pooled = (torch.randn(1, *shape, generator=generator) for shape in ((5, 12), (10,)))
    options = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled, "height": 8, "width": 8}
    return *pipelines, options | {"output_type": "latent", "return_dict": False, "guidance_scale": 1.0}


def from_picture(pipeline: Any, options: dict[str, Any], strength: float, num_steps: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    dtype = options["prompt_embeds"].dtype
    picture = torch.rand(1, 3, 8, 8, generator=generator).to(dtype)
    return pipeline(
        image=picture, strength=strength, num_inference_steps=num_steps, generator=generator, **options
    )[0]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_steps", [20, 28])
def test_timesteps_that_the_pipeline_rounds_are_those_of_the_schedule(
    num_steps: int, dtype: torch.dtype, flux_pipelines: tuple[Any, Any, dict[str, Any]]
) -> None:
    pipeline, _, options = flux_pipelines
    pipeline.to(dtype)
    options = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in options.items()}
    options["latents"] = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
    options["num_inference_steps"] = num_steps
    pipeline(**options)
    full = tuple(range(0, num_steps, 3))
    timesteps = tuple(pipeline.scheduler.timesteps.tolist())
    schedule = ExplicitSchedule(full_steps=full, num_inference_steps=num_steps, timesteps=timesteps)
    enable_cache(pipeline, CacheMethod(schedule=schedule))
    units: list[int] = []
    pipeline.transformer.transformer_blocks[2].attn.register_forward_hook(lambda *_: units.append(1))
    ran = []
    pipeline.transformer.register_forward_hook(lambda *_: ran.append(len(units)))
    pipeline(**options)
    assert tuple(step for step, (a, b) in enumerate(zip([0, *ran], ran, strict=False)) if b > a) == full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_to_image_after_a_broken_run_of_the_same_prompt(
    dtype: torch.dtype, flux_pipelines: tuple[Any, Any, dict[str, Any]]
) -> None:
    from_text, to_image, options = flux_pipelines
    options = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in options.items()}
    to_image.to(dtype)
    enable_cache(to_image, "N2")
    strengths = (1.0, 0.5, 0.25, 0.75)
    expected = {}
    for strength in strengths:
        expected[strength] = from_picture(to_image, options, strength)
        num_steps = int(8 * strength)
        assert counts(to_image) == (num_steps // 2, num_steps // 2)
        assert cache_summary(to_image).bytes_held == 0
    enable_cache(from_text, "N2")
    for strength in strengths:
        stop_at(from_text.transformer, 3)
        with pytest.raises(Stopped):
            from_text(num_inference_steps=8, generator=torch.Generator().manual_seed(0), **options)
        assert cache_summary(from_text).bytes_held == 0  # a step that raised ends its run
        assert torch.equal(from_picture(to_image, options, strength), expected[strength])
        assert counts(to_image) == (4 * strength, 4 * strength)
        assert cache_summary(to_image).bytes_held == 0


def wan_pipeline() -> tuple[Any, dict[str, Any]]:
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
    pipeline = diffusers.WanPipeline(None, None, vae, scheduler, build(WAN, 6))
    generator = torch.Generator().manual_seed(2)
    embeds, negative, latents = (
        torch.randn(1, *shape, generator=generator) for shape in ((5, 12), (5, 12), (4, 2, 8, 8))
    )
    options = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "latents": latents, "num_frames": 5}
    return pipeline, options | {"height": 16, "width": 16, "output_type": "latent", "return_dict": False}


def latte_pipeline() -> tuple[Any, dict[str, Any]]:
    pipeline = diffusers.LattePipeline(None, None, None, build(LATTE, 6), DDIMScheduler())
    generator = torch.Generator().manual_seed(2)
    embeds, negative, latents = (
        torch.randn(1, *shape, generator=generator) for shape in ((5, 12), (5, 12), (4, 3, 8, 8))
    )
    options = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "latents": latents, "video_length": 3}
    options |= {"negative_prompt": None, "clean_caption": False, "guidance_scale": 3.0}
    return pipeline, options | {"height": 64, "width": 64, "output_type": "latent", "return_dict": False}


def test_a_pipeline_that_leaves_out_the_block_that_is_looked_at_samples_in_full() -> None:
    pytest.importorskip("transformers")
    pipeline, options = latte_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    options |= {"num_inference_steps": 6, "enable_temporal_attentions": False}
    units: list[int] = []
    pipeline.transformer.transformer_blocks[2].attn1.register_forward_hook(lambda *_: units.append(1))
    pipeline(**options)
    in_full = len(units)
    enable_cache(pipeline, "fbcache:0.3")
    with pytest.warns(UserWarning, match="has not reused once in 6 steps"):
        pipeline(**options)
    assert len(units) == 2 * in_full


@pytest.mark.parametrize("make", [wan_pipeline, latte_pipeline])
def test_a_run_that_raised_leaves_nothing_to_the_next(make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    """Wan tells its cache contexts where in the loop they are."""
    pytest.importorskip("transformers")
    pipeline, options = make()
    pipeline.set_progress_bar_config(disable=True)

    def sample(num_steps: int) -> Tensor:
        return torch.as_tensor(pipeline(num_inference_steps=num_steps, **options)[0])

    plain = sample(6)
    enable_cache(pipeline, "N1")
    assert torch.equal(sample(6), plain)
    enable_cache(pipeline, "N2")
    expected = sample(6)
    calls = sum(counts(pipeline)) // 6  # a step, by the form of guidance
    assert counts(pipeline) == (3 * calls, 3 * calls)
    assert not torch.equal(expected, plain)
    for number in (1, 4, 5):
        stop_at(pipeline.transformer, number)
        with pytest.raises(Stopped):
            sample(6)
        assert torch.equal(sample(6), expected)
        assert counts(pipeline) == (3 * calls, 3 * calls)
        assert cache_summary(pipeline).bytes_held == 0


@pytest.mark.parametrize("name", [FLUX, "Latte"])
def test_timesteps_of_samples_may_differ_in_their_place_but_not_in_value(name: str) -> None:
    model, family = build(name), TINY_FAMILIES[name]
    enable_cache(model, "N2")
    arguments = family.arguments(500)
    arguments["timestep"] = torch.tensor([500.0, 400.0]) / family.timestep_scale
    with pytest.raises(ValueError, match=r"one timestep for the whole batch, got \[.*disable_cache.*split the batch"):
        model(**arguments)
    assert counts(model) == (0, 0)
    run(model, name)
    assert counts(model) == (3, 3)
