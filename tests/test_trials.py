"""The trials of a calibration, on models whose output is not one tensor."""

from typing import Any

import diffusers
import pytest
import torch
from families import TINY
from torch import Tensor

from skipdit.cache.site import WholeOutput
from skipdit.calibration.config import Trials
from skipdit.calibration.trials import measure
from skipdit.runs import Runner

NUM_SAMPLES = 3


def test_a_model_that_returns_a_list_is_measured_on_all_samples_after_guidance() -> None:
    """The first sample alone was measured, before guidance."""
    pytest.importorskip("transformers")
    model = TINY["ZImageTransformer2DModel"].build()
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4).eval()
    kind: Any = diffusers.ZImagePipeline  # parts may be absent, which it does not declare
    pipeline = kind(diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None, model)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [torch.randn(6, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(2 * NUM_SAMPLES)]

    def sample(conditions: object, *, num_inference_steps: int, generator: Any, guidance_scale: object) -> Tensor:
        latents = pipeline(
            prompt=None,
            prompt_embeds=[each.clone() for each in prompts[:NUM_SAMPLES]],
            negative_prompt_embeds=[each.clone() for each in prompts[NUM_SAMPLES:]],
            height=16,
            width=16,
            guidance_scale=3.0,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type="latent",
        ).images
        return (latents.float() / 10).sigmoid()

    run = Runner(
        pipeline=pipeline,
        sample=sample,
        conditions=[None] * NUM_SAMPLES,
        num_inference_steps=5,
        guidance_scale=None,
    )
    number = run().samples.numel()
    assert number % NUM_SAMPLES == 0
    measurement = measure(run, WholeOutput(), Trials(max_age=2, num_probed=2))
    assert measurement.changes.shape[-1] == number
    assert (measurement.changes[0, -1, 0] != 0).mean() > 0.9
