"""Caches of diffusers and of cache-dit on our DiT, rebuilt as diffusers' with the same weights."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, TaylorSeerCacheConfig
from tiny import TINY_FAMILIES, tiny_dit, tiny_latte, tiny_pipeline
from torch import Tensor

from skipdit.benchmark import compiling
from skipdit.benchmark import config as benchmark_config
from skipdit.benchmark.checkout import find_rivals, load_rivals
from skipdit.diffusion import Objective, make_scheduler
from skipdit.loading import Source
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline
from skipdit.runs import Counts
from skipdit.tasks import TASKS
from skipdit.tasks.task import Sampler

if not find_rivals().is_dir():
    pytest.skip("needs a checkout with benchmarks/rivals", allow_module_level=True)
load_rivals()

from skipdit_rivals import COMPILED, RIVALS, VIDEO_RIVALS, rivals_of  # noqa: E402
from skipdit_rivals.model import as_diffusers  # noqa: E402
from skipdit_rivals.techniques import (  # noqa: E402
    CACHE_DIT,
    AttentionBroadcast,
    DualBlock,
    Faster,
    FirstBlock,
    Magnitude,
    TaylorSeer,
    Technique,
    VideoAttentionBroadcast,
)

NUM_STEPS = 20
FLOW = Objective(process="flow", prediction_type="sample")
HAS_CACHE_DIT = importlib.util.find_spec(CACHE_DIT) is not None
needs_cache_dit = pytest.mark.skipif(not HAS_CACHE_DIT, reason='needs cache-dit: pip install ".[rivals]"')
TECHNIQUES: dict[Technique, Any] = {
    AttentionBroadcast(skip_range=2): (),
    FirstBlock(threshold=0.6): (),
    TaylorSeer(interval=3): (),
    TaylorSeer(interval=3, whole=True): (),
    Magnitude(threshold=0.5): (),
    Faster(): (),
    DualBlock(threshold=0.6): needs_cache_dit,
    DualBlock(front=2, back=1, interval=3): needs_cache_dit,
    DualBlock(interval=3, order=1): needs_cache_dit,
}


@pytest.fixture(scope="module")
def ours() -> ClassToImagePipeline:
    torch.manual_seed(0)
    return tiny_pipeline()


@pytest.fixture(scope="module")
def pipeline(ours: ClassToImagePipeline) -> ClassToImagePipeline:
    return as_diffusers(ours)


def sample(pipeline: ClassToImagePipeline, num_steps: int = NUM_STEPS, guidance_scale: float = 2.0) -> Tensor:
    return pipeline(
        [1, 2, 3],
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ----------------------------------------------------------------------------------------------------------------------
# The same model


@pytest.mark.parametrize("long_skip", [None, LongSkipConfig(), LongSkipConfig(num_pairs=2, fusion="residual")])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_rebuilt_pipeline_samples_the_same(long_skip: LongSkipConfig | None, guidance_scale: float) -> None:
    model = tiny_dit(long_skip=long_skip, out_channels=4, downscale_freq_shift=0)
    pipeline = ClassToImagePipeline(model, make_scheduler(FLOW, "euler"))
    pipeline.set_progress_bar_config(disable=True)
    rebuilt = as_diffusers(pipeline)
    assert isinstance(rebuilt.transformer, diffusers.DiTTransformer2DModel)
    expected = sample(pipeline, guidance_scale=guidance_scale)
    assert relative(sample(rebuilt, guidance_scale=guidance_scale), expected) < 1e-5


def test_other_models_cannot_be_rebuilt() -> None:
    video: Any = ClassToVideoPipeline(tiny_latte(), make_scheduler(FLOW, "euler"))
    with pytest.raises(ValueError, match="rivals run on our class-to-image DiT, got Latte"):
        as_diffusers(video)


# ----------------------------------------------------------------------------------------------------------------------
# Every technique


@pytest.mark.parametrize("technique", [pytest.param(t, marks=marks, id=repr(t)) for t, marks in TECHNIQUES.items()])
def test_a_technique_reuses_restarts_with_each_run_and_leaves_nothing(
    technique: Technique, pipeline: ClassToImagePipeline
) -> None:
    run = pipeline.transformer.run
    uncached = sample(pipeline)
    assert (run.calls, run.computed) == (NUM_STEPS, NUM_STEPS)
    technique.enable(pipeline, NUM_STEPS)
    cached = sample(pipeline)
    assert run.calls == NUM_STEPS
    assert 0 < run.computed < NUM_STEPS
    assert torch.equal(sample(pipeline), cached)
    assert 0 < relative(cached, uncached) < 1.0
    with pytest.raises(ValueError, match="another cache is on"):
        AttentionBroadcast(skip_range=2).enable(pipeline, NUM_STEPS)
    technique.disable(pipeline)
    technique.disable(pipeline)
    assert torch.equal(sample(pipeline), uncached)


@dataclass(frozen=True, kw_only=True)
class DefaultTaylorSeer(Technique):
    """Its defaults look for names that this model does not have."""

    def config(self, pipeline: Any, num_inference_steps: int) -> Any:
        return TaylorSeerCacheConfig()


def test_a_technique_without_effect_is_refused(pipeline: ClassToImagePipeline) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="finds no layer of HookedDiT"):
            DefaultTaylorSeer().enable(pipeline, NUM_STEPS)


def test_magcache_refuses_runs_that_it_is_not_calibrated_for(pipeline: ClassToImagePipeline) -> None:
    technique = Magnitude(threshold=0.5)
    technique.enable(pipeline, NUM_STEPS)
    try:
        with pytest.raises(ValueError, match="calibrated for 20 steps, the run has 10"):
            sample(pipeline, num_steps=10)
    finally:
        technique.disable(pipeline)
    sample(pipeline, num_steps=10)


def test_fastercache_needs_guidance(pipeline: ClassToImagePipeline) -> None:
    technique = Faster()
    technique.enable(pipeline, NUM_STEPS)
    try:
        with pytest.raises(ValueError, match="guidance_scale above 1"):
            sample(pipeline, guidance_scale=1.0)
    finally:
        technique.disable(pipeline)


def test_dual_block_settings_that_would_miss_skips_are_refused(pipeline: ClassToImagePipeline) -> None:
    with pytest.raises(ValueError, match="back must be below front"):
        DualBlock(front=1, back=1, interval=3)
    with pytest.raises(ValueError, match="threshold or an interval"):
        DualBlock()


@needs_cache_dit
def test_dual_block_fronts_beyond_the_middle_are_refused(pipeline: ClassToImagePipeline) -> None:
    with pytest.raises(ValueError, match="front must be at most half of 6 blocks, got 4"):
        DualBlock(front=4, interval=3).enable(pipeline, NUM_STEPS)


def test_a_missing_package_is_a_reason_in_one_line(monkeypatch: pytest.MonkeyPatch, ours: ClassToImagePipeline) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = Source(Sampler(TASKS["class-to-image"], ours))
    rivals = [rival for rival in rivals_of(source, NUM_STEPS) if rival.name == "cache-dit"]
    assert len(rivals) == 1
    with pytest.raises(ValueError, match=r'cache_dit is not installed: pip install "\.\[rivals\]"'):
        rivals[0].enable(rivals[0].sampler.pipeline)


# ----------------------------------------------------------------------------------------------------------------------
# The table


def test_settings_differ_and_name_themselves(ours: ClassToImagePipeline) -> None:
    for table in (RIVALS, VIDEO_RIVALS):
        for rival in table.values():
            assert rival.settings
            assert len({str(setting) for setting in rival.settings}) == len(rival.settings)
    settings = [rival.setting for rival in rivals_of(Source(Sampler(TASKS["class-to-image"], ours)), NUM_STEPS)]
    assert len(set(settings)) == len(settings)
    assert tuple(COMPILED) == benchmark_config.RIVALS


def test_an_installation_without_rivals_leaves_them_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("skipdit.benchmark.checkout.__file__", str(tmp_path / "a" / "b" / "c" / "checkout.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "skipdit_rivals")
    assert load_rivals() is None
    assert 'they need a checkout (pip install -e ".[rivals]")' in caplog.text
    config = compiling.CompileBenchConfig(specs=("N2",), timed=("N2",), num_inference_steps=4)
    source = Source(Sampler(TASKS["class-to-image"], tiny_pipeline()))
    assert [subject.library for subject in compiling.make_subjects(config, source)] == ["skipdit", "skipdit"]


def test_the_benchmark_runs_a_rival(ours: ClassToImagePipeline) -> None:
    rival = rivals_of(Source(Sampler(TASKS["class-to-image"], ours)), NUM_STEPS)[0]
    assert (rival.setting, rival.ours) == ("diffusers-PAB:N2-950--1", False)
    pipeline = rival.sampler.pipeline
    rival.enable(pipeline)
    sample(pipeline)
    assert rival.counts(pipeline) == Counts(10, 10)
    rival.disable(pipeline)


def test_a_model_of_another_task_has_no_rivals() -> None:
    video = TASKS["class-to-video"].sampler(tiny_latte(), make_scheduler(FLOW, "euler"))
    assert rivals_of(Source(video), NUM_STEPS) == []


def test_attention_broadcast_runs_on_the_video_pipeline() -> None:
    family = TINY_FAMILIES["LatteTransformer3DModel"]
    transformer = family.build(4)
    add_long_skips(transformer, LongSkipConfig(init="xavier"))
    none: Any = None
    pipeline = diffusers.LattePipeline(none, none, none, transformer, DDIMScheduler())  # pyright: ignore
    pipeline.set_progress_bar_config(disable=True)

    def clip() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, 5, 12, generator=generator)
        return pipeline(
            prompt_embeds=states,
            negative_prompt=none,
            negative_prompt_embeds=torch.zeros_like(states),
            height=64,
            width=64,
            video_length=3,
            num_inference_steps=8,
            generator=generator,
            output_type="latent",
        ).frames

    uncached = clip()
    technique = VideoAttentionBroadcast(spatial=2, temporal=3, cross=6)
    technique.enable(pipeline, 8)
    cached = clip()
    assert not torch.equal(cached, uncached)
    assert torch.equal(clip(), cached)
    technique.disable(pipeline)
    assert torch.equal(clip(), uncached)
    caches = rivals_of(Source(Sampler(TASKS["text-to-video"], pipeline)), 8)
    assert [cache.counts(pipeline) for cache in caches] == [None, None]
