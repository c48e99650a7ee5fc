"""The class-to-video pipeline: what it returns and refuses, guidance, autoencoders, saving, a cache under it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny import flops_of, tiny_dit, tiny_latte
from torch import Tensor

from skipdit.cache.enable import cache_summary, enable_cache
from skipdit.diffusion import Objective, make_scheduler
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline

VARIANCE = Objective(learned_variance=True)
FLOW = Objective(process="flow", prediction_type="sample")
PIXELS = {"in_channels": 3, "out_channels": 3}


def tiny_videos(scheduler: str = "ddim", objective: Objective = VARIANCE, **sizes: Any) -> ClassToVideoPipeline:
    pipeline = ClassToVideoPipeline(tiny_latte(**sizes), make_scheduler(objective, scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, down_block_types=(
        "DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5).eval()  # fmt: skip


def sample(pipeline: Any, *labels: int, steps: int = 3, seed: int = 0, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "output_type": "latent", "num_inference_steps": steps} | options
    return pipeline(list(labels) or None, **options).frames


# ----------------------------------------------------------------------------------------------------------------------
# What it returns


def test_every_output_type_holds_the_same_clips() -> None:
    pipeline = tiny_videos("euler", FLOW, **PIXELS)
    latents, tensor, array, pictures = (
        sample(pipeline, 1, 2, guidance_scale=30.0, output_type=output_type)
        for output_type in ("latent", "pt", "np", "pil")
    )
    assert latents.shape == tensor.shape == (2, 3, 3, 8, 8)
    assert latents.abs().max() > 1.01  # not clamped
    assert torch.equal(tensor, (latents / 2 + 0.5).clamp(0, 1))
    assert isinstance(array, np.ndarray)
    assert array.shape == (2, 3, 8, 8, 3)
    assert np.array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    assert [len(clip) for clip in pictures] == [3, 3]
    for clip, frames in zip(pictures, array, strict=True):
        for picture, frame in zip(clip, frames, strict=True):
            assert isinstance(picture, Image.Image)
            assert np.array_equal(np.asarray(picture), (frame * 255).round().astype(np.uint8))
    plain = pipeline([1, 2], guidance_scale=30.0, num_inference_steps=3, output_type="latent", return_dict=False,
                     generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert len(plain) == 1
    assert torch.equal(plain[0], latents)


def test_shorter_and_larger_clips() -> None:
    pipeline = tiny_videos()
    assert sample(pipeline, 1, num_frames=2, height=4, width=12).shape == (1, 2, 4, 4, 12)
    assert sample(pipeline, 1, 2, num_videos=2).shape == (2, 3, 4, 8, 8)
    noise = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(sample(pipeline, 1, latents=noise), sample(pipeline, 1, seed=5))


def test_a_model_without_classes_makes_as_many_clips_as_asked() -> None:
    pipeline = tiny_videos(num_classes=None)
    clips = sample(pipeline, num_videos=2)
    assert clips.shape == (2, 3, 4, 8, 8)
    assert not torch.equal(clips[0], clips[1])
    assert sample(pipeline).shape == (1, 3, 4, 8, 8)
    assert torch.equal(sample(pipeline, guidance_scale=9.0), sample(pipeline, guidance_scale=1.0))
    with pytest.raises(ValueError, match="takes no class_labels, but num_videos"):
        sample(pipeline, 1)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ((), {}, "this model takes class_labels"),
        ((10,), {}, "class labels must be between 0 and 9, got 10"),
        ((1, 2), {"num_videos": 3}, "num_videos must be the number of class labels, 2, got 3"),
        ((1,), {"num_frames": 4}, "a clip must have 1 to 3 frames, got 4"),
        ((1,), {"num_frames": 0}, "a clip must have 1 to 3 frames, got 0"),
        ((1,), {"height": 9}, r"divisible by patch_size 2, got \(9, 8\)"),
        ((1,), {"width": 0}, r"divisible by patch_size 2, got \(8, 0\)"),
        ((1,), {"guidance_channels": 5}, "guidance_channels must be between 1 and 4, got 5"),
        ((1,), {"guidance_channels": 0}, "guidance_channels must be between 1 and 4, got 0"),
        ((1,), {"latents": torch.zeros(1, 3, 8, 8, 4)}, r"latents must have shape \(1, 3, 4, 8, 8\)"),
    ],
)
def test_what_cannot_be_sampled_is_named(labels: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(tiny_videos(), *labels, **options)


def test_no_clips_at_all_and_no_null_class_are_named() -> None:
    with pytest.raises(ValueError, match="at least 1 clip to sample, got 0"):
        sample(tiny_videos(num_classes=None), num_videos=0)
    with pytest.raises(ValueError, match="at least 1 clip to sample, got 0"):
        tiny_videos()([])
    with pytest.raises(ValueError, match="no null class"):
        sample(tiny_videos(null_class=False), 1)
    assert sample(tiny_videos(null_class=False), 1, guidance_scale=1.0).isfinite().all()
    images = ClassToImagePipeline(tiny_dit(), make_scheduler(VARIANCE, "ddim"))
    with pytest.raises(ValueError, match="guidance_channels must be between 1 and 4, got 5"):
        images([1], guidance_channels=5)
    with pytest.raises(ValueError, match=r"divisible by patch_size 2, got \(0, 8\)"):
        images([1], height=0)


# ----------------------------------------------------------------------------------------------------------------------
# How it denoises


@pytest.mark.parametrize("guidance_channels", [None, 3])
def test_guidance_equals_a_loop_over_both_branches(guidance_channels: int | None) -> None:
    pipeline = tiny_videos()
    clips = sample(pipeline, 4, 7, guidance_scale=3.0, guidance_channels=guidance_channels)
    latents = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler: Any = make_scheduler(VARIANCE, "ddim")
    scheduler.set_timesteps(3)
    labels, guided = torch.tensor([4, 7]), guidance_channels or 4
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            said = pipeline.transformer(latents, timestep, labels).sample[:, :, :4]
            unsaid = pipeline.transformer(latents, timestep, torch.tensor([10, 10])).sample[:, :, :4]
            output = said.clone()
            output[:, :, :guided] = (unsaid + 3 * (said - unsaid))[:, :, :guided]
            frames = [scheduler.step(output[:, frame], timestep, latents[:, frame]).prev_sample for frame in range(3)]
            latents = torch.stack(frames, dim=1)
    torch.testing.assert_close(clips, latents, rtol=1e-5, atol=1e-5)
    unguided = sample(pipeline, 4, 7, guidance_scale=1.0)
    assert not torch.allclose(clips, unguided, atol=1e-2)
    assert torch.equal(unguided, sample(pipeline, 4, 7, guidance_scale=0.5))


def test_the_ancestral_sampler_takes_the_learned_variance_of_clips() -> None:
    pipeline = tiny_videos("ddpm")
    assert pipeline.scheduler.config.variance_type == "learned_range"
    clips = sample(pipeline, 4, guidance_scale=1.0)
    latents = torch.randn(1, 3, 4, 8, 8, generator=(generator := torch.Generator().manual_seed(0)))
    scheduler: Any = make_scheduler(VARIANCE, "ddpm")
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = pipeline.transformer(latents, timestep, torch.tensor([4])).sample
            latents = scheduler.step(output[0], timestep, latents[0], generator=generator).prev_sample[None]
    assert torch.equal(clips, latents)

    fixed = tiny_videos("ddpm", Objective())  # drops the variance
    fixed.register_modules(transformer=pipeline.transformer)
    assert not torch.allclose(sample(fixed, 4, guidance_scale=1.0), clips, atol=1e-3)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_a_clip_with_a_generator_of_its_own_is_the_same_in_any_batch(scheduler: str) -> None:
    pipeline = tiny_videos(scheduler)
    together = sample(pipeline, 4, 7, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)])
    alone = sample(pipeline, 7, generator=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[:1], alone, atol=1e-2)


def test_a_cache_counts_the_steps_of_clips() -> None:
    pipeline = tiny_videos(num_units=6)
    full = sample(pipeline, 4, 7, steps=7)
    enable_cache(pipeline, "N1")
    assert torch.equal(sample(pipeline, 4, 7, steps=7), full)
    enable_cache(pipeline, "N2")
    cached = sample(pipeline, 4, 7, steps=7)
    summary = cache_summary(pipeline)
    steps_flops = flops_of(lambda: sample(pipeline, 4, 7, steps=7))
    assert (summary.model, summary.num_units, summary.reused) == ("Latte", 6, ("output of units 1 to 4",))
    assert (summary.steps_full, summary.steps_reused) == (4, 3)
    full_flops = flops_of(lambda: sample(tiny_videos(num_units=6), 4, 7, steps=7))
    assert summary.compute_ratio == pytest.approx(full_flops / steps_flops)
    assert summary.peak_bytes_held == 2 * 2 * 3 * 16 * 16 * 4  # guidance, clips, frames, tokens, width, float32
    assert summary.bytes_held == 0
    assert torch.equal(sample(pipeline, 4, 7, steps=7), cached)
    assert 0 < (cached - full).abs().mean() < full.abs().mean()


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoder and files


def test_frames_decoded_one_clip_at_a_time_equal_all_at_once() -> None:
    pipeline, vae = tiny_videos(), tiny_vae()
    pipeline.register_modules(vae=vae)
    clips = sample(pipeline, 1, 2, output_type="pt")
    latents = sample(pipeline, 1, 2)
    with torch.no_grad():
        decoded: Tensor = vae.decode(latents.flatten(0, 1) / 0.5).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1).unflatten(0, (2, 3))
    assert clips.shape == (2, 3, 3, 16, 16)
    torch.testing.assert_close(clips, expected, rtol=0, atol=1e-5)
    assert ((clips > 0) & (clips < 1)).float().mean() > 0.5
    assert (clips[0, 0] - clips[0, 1]).abs().max() > 0.01


@pytest.mark.parametrize("with_vae", [False, True])
def test_a_saved_pipeline_samples_the_same_bits(with_vae: bool, tmp_path: Path) -> None:
    pipeline = ClassToVideoPipeline(
        tiny_latte(), make_scheduler(VARIANCE, "ddim"), tiny_vae() if with_vae else None, id2label={"1": "ant"}
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    loaded = ClassToVideoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == {"ant": 1}
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert (loaded.vae is not None) == with_vae
    first, second = pipeline.transformer.state_dict(), loaded.transformer.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    output_type = "np" if with_vae else "latent"
    clips = [sample(each, 1, output_type=output_type) for each in (pipeline, loaded)]
    assert np.array_equal(*clips)


def test_names_of_classes_are_found() -> None:
    pipeline = ClassToVideoPipeline(
        tiny_latte(), make_scheduler(VARIANCE, "ddim"), id2label={"0": "cat", "1": "ant", "2": "dog"}
    )
    assert list(pipeline.labels) == ["ant", "cat", "dog"]
    assert pipeline.get_label_ids(["dog", "cat"]) == [2, 0]
    with pytest.raises(ValueError, match="unknown label 'cta'; similar ones of 3 labels: cat"):
        pipeline.get_label_ids(["cta"])
