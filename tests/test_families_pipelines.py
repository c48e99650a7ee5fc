"""A cache under the pipelines of diffusers: runs in a row, of other sizes, with guidance in one call or in two, give
what a fresh process gives."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from device_waits import DeviceWaits
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from tiny import TINY_FAMILIES, tiny_pipeline
from torch import Tensor, nn

from skipdit.cache.enable import cache_summary, enable_cache
from skipdit.cache.state import CacheSummary
from skipdit.diffusion import noise_levels
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips

pytest.importorskip("transformers")  # which these pipelines import

SPEC = "N2"
# batch size and number of steps of a first run, which must not matter to a second one
FIRST, SECOND = (3, 5), (2, 6)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embeddings(batch: int, masks: bool = False, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Prompt embeddings, and negative ones, under the names that a pipeline gives them."""
    given = {}
    for number, (name, shape) in enumerate(shapes.items()):
        for prefix in ("", "negative_"):
            given[prefix + name] = noise(100 + number + 10 * len(prefix), batch, *shape)
            if masks:
                mask = (prefix + name).replace("embeds", "attention_mask")
                given[mask] = torch.ones(batch, shape[0])
    return given


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pipeline over a tiny transformer.

    make: the pipeline. options: of its call, for a batch size. channels: of the sample that the scheduler takes.
    """

    family: str
    make: Callable[[nn.Module], Any]
    options: Callable[[int], dict[str, Any]]
    config: dict[str, Any]
    channels: int = 4
    separate: bool = False

    def transformer(self) -> nn.Module:
        family = TINY_FAMILIES[self.family]
        model = family.build(**self.config)
        if not family.native:
            add_long_skips(model, LongSkipConfig())
            for key, parameter in model.named_parameters():
                if "long_skip" in key:
                    nn.init.normal_(parameter, std=0.1)
        return model


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4).eval()


CASES: dict[str, Case] = {
    "LattePipeline": Case(
        family="LatteTransformer3DModel",
        make=lambda model: diffusers.LattePipeline(None, None, None, model, DDIMScheduler()),
        options=lambda batch: {
            "height": 64, "width": 64, "video_length": 3, "guidance_scale": 3.0, "output_type": "latent",
            "negative_prompt": None, "clean_caption": False, "latents": noise(5, batch, 4, 3, 8, 8),
        } | embeddings(batch, prompt_embeds=(5, 12)),
        config={},
    ),
    "HunyuanDiTPipeline": Case(
        family="HunyuanDiT2DModel",
        make=lambda model: diffusers.HunyuanDiTPipeline(
            None, None, None, model, DDIMScheduler(), None, None, requires_safety_checker=False
        ),
        options=lambda batch: {
            "height": 64, "width": 64, "use_resolution_binning": False, "guidance_scale": 3.0,
            "original_size": (64, 64), "output_type": "latent", "latents": noise(5, batch, 4, 8, 8),
        } | embeddings(batch, masks=True, prompt_embeds=(4, 16), prompt_embeds_2=(6, 24)),
        config={},
    ),
    "DiTPipeline": Case(
        family="DiTTransformer2DModel",
        make=lambda model: diffusers.DiTPipeline(model, tiny_vae(), DDIMScheduler(clip_sample=False)),
        options=lambda batch: {
            "class_labels": list(range(batch)), "generator": torch.Generator().manual_seed(0), "output_type": "pt",
        },
        config={"num_embeds_ada_norm": 1000},  # which the pipeline takes for granted
    ),
    "PixArtAlphaPipeline": Case(
        family="PixArtTransformer2DModel",
        make=lambda model: diffusers.PixArtAlphaPipeline(None, None, None, model, DDIMScheduler()),
        options=lambda batch: {
            "height": 64, "width": 64, "use_resolution_binning": False, "guidance_scale": 3.0, "output_type": "latent",
            "negative_prompt": None, "latents": noise(5, batch, 4, 8, 8),
        } | embeddings(batch, masks=True, prompt_embeds=(5, 12)),
        config={},
    ),
    "FluxPipeline": Case(
        family="FluxTransformer2DModel",
        make=lambda model: diffusers.FluxPipeline(
            FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model
        ),
        options=lambda batch: {
            "height": 64, "width": 64, "true_cfg_scale": 3.0, "output_type": "latent",
            "latents": noise(5, batch, 16, 4),
        } | embeddings(batch, prompt_embeds=(5, 12), pooled_prompt_embeds=(10,)),
        config={},
        separate=True,
    ),
    "WanPipeline": Case(
        family="WanTransformer3DModel",
        make=lambda model: diffusers.WanPipeline(
            None, None, None, UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), model
        ),
        options=lambda batch: {
            "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 3.0, "output_type": "latent",
            "latents": noise(5, batch, 4, 2, 8, 8),
        } | embeddings(batch, prompt_embeds=(5, 12)),
        config={},
        separate=True,
    ),
}  # fmt: skip


def sample(pipeline: Any, case: Case, batch: int, num_steps: int) -> Tensor:
    out = pipeline(num_inference_steps=num_steps, return_dict=False, **case.options(batch))[0]
    return torch.as_tensor(out)


@torch.no_grad()
def sample_separately(model: nn.Module, case: Case, batch: int, num_steps: int) -> Tensor:
    """The other form of guidance than the pipeline's: two calls a step, or for Flux one of both halves."""
    family = TINY_FAMILIES[case.family]
    scheduler = FlowMatchEulerDiscreteScheduler() if case.family == "FluxTransformer2DModel" else DDIMScheduler()
    scheduler.set_timesteps(num_steps)
    latents = noise(6, batch, *family.latents)
    arguments = {key: value for key, value in family.arguments(batch=2 * batch).items() if key != "hidden_states"}
    ids = ("txt_ids", "img_ids", "image_rotary_emb")
    halves = [
        {key: value if key in ids else value[half] for key, value in arguments.items()}
        for half in (slice(batch), slice(batch, None))
    ]
    for time in scheduler.timesteps:
        given = {"timestep": time.expand(batch).float() / family.timestep_scale}
        if case.separate:
            both = arguments | {"timestep": given["timestep"].repeat(2)}
            out, null = model(torch.cat([latents] * 2), return_dict=False, **both)[0].chunk(2)
        else:
            out, null = (model(latents, return_dict=False, **(half | given))[0] for half in halves)
        guided = (null + 3 * (out - null))[:, :4] if latents.ndim > 3 else null + 3 * (out - null)
        latents = scheduler.step(guided, time, latents).prev_sample
    return latents


def both_forms(name: str, *settings: tuple[int, int]) -> tuple[dict[str, Tensor], list[CacheSummary]]:
    """What the last of some runs in a row gives, by the pipeline and by the other form of guidance, and what the cache
    did in each run."""
    case, summaries, last = CASES[name], [], {}
    pipeline = case.make(case.transformer())
    pipeline.set_progress_bar_config(disable=True)
    enable_cache(pipeline, SPEC)
    for setting in settings:
        last[f"{name}.pipeline"] = sample(pipeline, case, *setting)
        summaries.append(cache_summary(pipeline))
    model = case.transformer()
    enable_cache(model, SPEC)
    for setting in settings:
        last[f"{name}.loop"] = sample_separately(model, case, *setting)
        summaries.append(cache_summary(model))
    return last, summaries


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The second setting alone, of every pipeline, in another process."""
    path = tmp_path_factory.mktemp("fresh") / "fresh.safetensors"
    command = [sys.executable, __file__, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert result.returncode == 0, result.stderr
    return load_file(path)


@pytest.mark.parametrize("name", CASES)
def test_a_second_run_of_another_size_equals_a_fresh_process(name: str, fresh: dict[str, Tensor]) -> None:
    results, summaries = both_forms(name, FIRST, SECOND)
    assert len(results) == 2
    for key, result in results.items():
        assert result.isfinite().all()
        assert torch.equal(result, fresh[key]), key
    branches = [2, 2, 1, 1] if CASES[name].separate else [1, 1, 2, 2]
    for summary, (_, num_steps), calls in zip(summaries, (FIRST, SECOND) * 2, branches, strict=True):
        assert (summary.steps_full, summary.steps_reused) == (calls * ((num_steps + 1) // 2), calls * (num_steps // 2))
    assert [summary.bytes_held for summary in summaries[:2]] == [0, 0]


@pytest.mark.parametrize("name", CASES)
def test_interval_1_under_a_pipeline_is_bit_equal_and_reuse_is_not(name: str) -> None:
    case = CASES[name]
    pipeline = case.make(case.transformer())
    pipeline.set_progress_bar_config(disable=True)
    plain = sample(pipeline, case, *SECOND)
    enable_cache(pipeline, "N1")
    assert torch.equal(sample(pipeline, case, *SECOND), plain)
    enable_cache(pipeline, SPEC)
    assert not torch.equal(sample(pipeline, case, *SECOND), plain)


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_would_never_reuse_is_refused(name: str) -> None:
    case = CASES[name]
    pipeline = case.make(case.transformer())
    pipeline.set_progress_bar_config(disable=True)
    enable_cache(pipeline, "N3-100-50")  # of 4 steps the first three are above the window, the fourth is full
    with pytest.raises(ValueError, match="would never reuse in 4 steps"):
        sample(pipeline, case, 1, 4)
    enable_cache(pipeline, SPEC)
    sample(pipeline, case, 1, 4)
    assert cache_summary(pipeline).steps_reused > 0


def test_what_waits_is_counted() -> None:
    tensor = torch.arange(3.0)
    questions: list[Callable[[], Any]] = [
        tensor[0].item, tensor.tolist, tensor.numpy, tensor.nonzero, tensor.unique, lambda: float(tensor[1]),
        lambda: bool(tensor[1]), lambda: torch.equal(tensor, tensor), lambda: tensor[tensor > 1],
    ]  # fmt: skip
    for number, question in enumerate(questions):
        with DeviceWaits() as asked:
            question()
        assert asked.counts.total() >= 1, number
    with DeviceWaits() as asked:
        torch.where(tensor > 1, tensor, -tensor).sum().add_(tensor[:2].amax())
    assert asked.counts.total() == 0


SIZES = (2, 6)  # of a run whose questions are counted


def asks(name: str, spec: str | None) -> tuple[DeviceWaits, CacheSummary | None]:
    """A run of a pipeline, under a cache or none."""
    if name == "ours":
        pipeline: Any = tiny_pipeline()

        def run() -> Any:
            return pipeline([1, 2], num_inference_steps=SIZES[1], output_type="latent")
    else:
        case = CASES[name]
        pipeline = case.make(case.transformer())

        def run() -> Any:
            return sample(pipeline, case, *SIZES)

    pipeline.set_progress_bar_config(disable=True)
    if spec is not None:
        enable_cache(pipeline, spec)
    with DeviceWaits() as mode:
        run()
    return mode, None if spec is None else cache_summary(pipeline)


@pytest.mark.parametrize("name", [*CASES, "ours"])
def test_a_cache_asks_the_device_for_nothing(name: str) -> None:
    """Flux and HunyuanDiT hand on copies of their timesteps, Flux and Wan name their two guidance branches. A static
    cache reads the list of timesteps, once per run; a probe is one number more at each step that could reuse."""
    unasked, _ = asks(name, None)
    branches = 2 if name in CASES and CASES[name].separate else 1
    for spec in ("N2", "auto", "fora:N2"):
        asked, summary = asks(name, spec)
        assert asked.more_than(unasked) == {"tolist": branches}, spec
        assert summary is not None
        assert summary.steps_reused > 0
    for spec in ("fbcache:100", "teacache:0"):
        asked, summary = asks(name, spec)
        assert asked.more_than(unasked) == {"tolist": branches, "_local_scalar_dense": branches * (SIZES[1] - 1)}, spec
        assert summary is not None
        assert (summary.steps_reused > 0) == spec.endswith("100")
    # a process with betas tells once what share of its latents is noise
    for spec, more in (("dicache:100-e0", 0), ("dicache:0", 0), ("seacache:100-e0", 1), ("easycache:100-w0-e0", 0)):
        asked, summary = asks(name, spec)
        assert asked.more_than(unasked).total() <= branches * SIZES[1] + more, spec
        assert summary is not None
        assert (summary.steps_reused > 0) == (":100" in spec)


@pytest.mark.parametrize("name", CASES)
def test_one_guidance_branch_beside_another_where_they_have_calls_of_their_own(name: str) -> None:
    """Without one question more to the device; where both share a call it says so at the end of the run."""
    if not CASES[name].separate:
        with pytest.warns(UserWarning, match="called once per step: guidance is off, or both branches share"):
            asks(name, "guidance:N2")
        return
    unasked, _ = asks(name, None)
    asked, summary = asks(name, "guidance:N2")
    assert asked.more_than(unasked) == {"tolist": 2}
    assert summary is not None
    num_steps = SIZES[1]
    assert (summary.steps_full, summary.steps_reused) == (num_steps + (num_steps + 1) // 2, num_steps // 2)
    assert summary.bytes_held == 0


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_on_a_bare_model_a_step_waits_once(name: str) -> None:
    """For its timestep, and for the contents of conditioning that is made anew; where a probe is looked at, twice."""
    family, kept = TINY_FAMILIES[name], TINY_FAMILIES[name].arguments()
    model = family.build()

    def step(timestep: float, *, anew: bool = False) -> DeviceWaits:
        arguments = family.arguments(timestep) if anew else kept | {"timestep": family.arguments(timestep)["timestep"]}
        with torch.no_grad(), DeviceWaits() as mode:
            model(**arguments, return_dict=False)
        return mode

    plain = step(1000)
    for spec, waits in (("delta:N2", 1), ("fora:N2", 1), ("fbcache:100", 2)):
        enable_cache(model, spec)
        step(1000)
        for timestep, anew in ((900, False), (800, False), (700, True), (600, True)):
            assert step(timestep, anew=anew).more_than(plain).total() == waits
        assert cache_summary(model).steps_reused >= 2


def karras(sigma_max: float) -> Any:
    """As Cosmos 2 has it: its sigmas go far above 1."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=sigma_max, sigma_min=0.002, final_sigmas_type="sigma_min")
    return scheduler


@pytest.mark.parametrize("scheduler", [
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),  # Mochi
    diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),  # OmniGen
    diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),  # ACE-Step
    diffusers.FlowMatchHeunDiscreteScheduler(),
    diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    diffusers.DDIMScheduler(),
    diffusers.DDIMScheduler(num_train_timesteps=4000),
    diffusers.HeunDiscreteScheduler(),
    diffusers.MiniMaxH3Scheduler(shift=1.0),
    diffusers.EDMEulerScheduler(sigma_max=80.0),
    diffusers.EDMDPMSolverMultistepScheduler(sigma_max=80.0),
    karras(80.0),
])  # fmt: skip
def test_noise_levels_of_schedulers_fall_from_1000(scheduler: Any) -> None:
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - step / 20 for step in range(20)])
    else:
        scheduler.set_timesteps(20)
    levels = noise_levels(
        scheduler.timesteps.tolist(),
        scheduler.config.get("num_train_timesteps", 1000),
        inverted=scheduler.config.get("invert_sigmas", False),
    )
    assert levels == sorted(levels, reverse=True)
    assert 940 < levels[0] <= 1000
    assert 0 <= levels[-1] < 150


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    torch.set_num_threads(1)
    results = {}
    for case_name in CASES:
        results |= both_forms(case_name, SECOND)[0]
    save_file({key: value.contiguous() for key, value in results.items()}, parser.parse_args().path)
