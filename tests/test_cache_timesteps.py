"""Timesteps of every kind, and what a context tells of them."""

from typing import Any

import diffusers
import pytest
import torch
from device_waits import DeviceWaits
from diffusers import FlowMatchEulerDiscreteScheduler
from test_cache_streams import STEPS, full_steps
from tiny import TINY_FAMILIES, counts, inputs, tiny_dit, tiny_pipeline

from skipdit.cache.enable import enable_cache
from skipdit.cache.methods import parse_method
from skipdit.runs import check_method


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("watched", "num_steps", "shift"), [(True, 50, 7.0), (True, 200, 3.0), (False, 50, 7.0)])
def test_timesteps_that_are_one_number_in_half_precision_are_steps(watched: bool, num_steps: int, shift: float) -> None:
    pytest.importorskip("transformers")
    model = TINY_FAMILIES["FluxTransformer2DModel"].build(3).to(torch.bfloat16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline: Any = diffusers.FluxPipeline(scheduler, None, None, None, None, None, model)
    pipeline.set_progress_bar_config(disable=True)
    shapes = {"prompt_embeds": (1, 5, 12), "pooled_prompt_embeds": (1, 10), "latents": (1, 16, 4)}
    options = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    options |= {"height": 64, "width": 64, "output_type": "latent"}
    enable_cache(pipeline if watched else model, "delta:N2")
    ran = full_steps(
        model, model.transformer_blocks[1].attn, lambda: pipeline(num_inference_steps=num_steps, **options)
    )
    assert ran == list(range(0, num_steps, 2))
    rounded = scheduler.timesteps.to(torch.bfloat16)
    assert len(rounded.unique()) < num_steps


def test_the_noisiest_token_has_the_timestep_of_the_step() -> None:
    """As of Wan 2.2 and LTX from a picture: its tokens are at 0."""
    family = TINY_FAMILIES["WanTransformer3DModel"]
    model = family.build(6)
    enable_cache(model, "delta:N4-800-50")  # full above 800
    ran = []
    for timestep in (950, 850, 700, 500, 300):
        arguments = family.arguments(timestep)
        mask = torch.ones(2, 32).index_fill(1, torch.arange(16), 0)
        arguments["timestep"] = mask * timestep
        model(**arguments, return_dict=False)
        ran.append(counts(model))
    assert ran == [(1, 0), (2, 0), (2, 1), (2, 2), (3, 2)]


def test_a_scheduler_whose_timesteps_rise_as_noise_falls_has_its_window_at_the_noisy_end() -> None:
    """Mochi's and OmniGen's."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    model = pipeline.transformer
    enable_cache(pipeline, "N2-700-0")
    pipeline.scheduler.set_timesteps(10)
    assert pipeline.scheduler.timesteps[0] < pipeline.scheduler.timesteps[-1]
    latents, labels = inputs()

    def run() -> None:
        for timestep in pipeline.scheduler.timesteps:
            out = model(latents, timestep.expand(2) / 1000, labels).sample  # a copy, as 1 - t is in Lumina
            pipeline.scheduler.step(out[:, :4], timestep, latents)

    assert full_steps(model, model.blocks[2].attn, run) == [0, 1, 2, 4, 6, 8]


@pytest.mark.parametrize("inverted", [None, False, True], ids=["EDM", "falls", "rises"])
def test_timesteps_on_a_scale_of_their_own_have_the_same_window(inverted: bool | None) -> None:
    """Those of EDM (Cosmos, StableAudio) are functions of log sigma, half of them below 0: nothing was stored there.
    Others count to 1 (OmniGen, AceStep): `auto` stayed full."""
    pipeline, sigmas = tiny_pipeline(), [1 - step / 20 for step in range(20)]
    model, (latents, labels) = pipeline.transformer, inputs()
    pipeline.scheduler = (
        diffusers.EDMEulerScheduler()
        if inverted is None
        else FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, invert_sigmas=inverted)
    )
    pipeline.scheduler.set_timesteps(20) if inverted is None else pipeline.scheduler.set_timesteps(sigmas=sigmas)
    for spec, fewest in (("N2", 10), ("auto", 7), ("N2-700-200", 2)):
        enable_cache(pipeline, spec)
        for timestep in pipeline.scheduler.timesteps:
            model(latents, timestep, labels)
        (run,) = model._skipdit_cache.streams.runs.values()
        assert run.levels == sorted(run.levels, reverse=True)
        assert 1000 >= run.levels[0] > 900
        assert 100 > run.levels[-1] >= 0
        assert counts(pipeline)[1] >= fewest


@pytest.mark.parametrize("strengths", [(3.5,), (3.5, 1.0)])
def test_a_strength_that_is_made_anew_tells_calls_of_one_step_apart(strengths: tuple[float, ...]) -> None:
    """One alone is not read, as FluxControlNetPipeline makes it at each step; two are two streams."""
    family = TINY_FAMILIES["FluxTransformer2DModel"]
    model = family.build(6, guidance_embeds=True)
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    flux: Any = diffusers.FluxPipeline
    pipeline = flux(scheduler, None, None, None, None, None, model)
    arguments, asked = family.arguments(), []

    def sample(strengths: tuple[float, ...]) -> list[torch.Tensor]:
        scheduler.set_timesteps(8)
        outputs = []
        for step, timestep in enumerate(scheduler.timesteps):
            for strength in strengths:
                guidance = torch.full((2,), strength)
                given = {"hidden_states": arguments["hidden_states"] * (1 + step / 4), "timestep": timestep.expand(2)}
                with DeviceWaits() as mode:
                    outputs.append(model(**arguments | given | {"guidance": guidance}, return_dict=False)[0])
                asked.append(mode.counts.total())
        return outputs

    plain = sample(strengths)
    enable_cache(pipeline, "delta:N3")
    alone = [sample((strength,)) for strength in strengths]
    asked.clear()
    together = sample(strengths)
    assert counts(model) == (3 * len(strengths), 5 * len(strengths))
    for step, output in enumerate(together):
        assert torch.equal(output, alone[step % len(strengths)][step // len(strengths)]), step
        assert torch.equal(output, plain[step]) == (step // len(strengths) % 3 == 0)
    if len(strengths) == 1:
        assert asked == [1, *[0] * 7]  # the list of timesteps


def test_a_context_may_tell_nothing() -> None:
    model, (latents, labels) = tiny_dit(), inputs()
    enable_cache(model, "N2")
    for timestep in STEPS:
        with model.cache_context("cond", step_index=None, num_inference_steps=None, timestep=None):
            model(latents, torch.tensor(timestep), labels)
    assert counts(model) == (2, 2)


def test_what_a_context_tells_is_believed() -> None:
    """Of one step each, at one timestep: only their place tells that each is a run."""
    model, (latents, labels) = tiny_dit(), inputs()
    enable_cache(model, "N3")
    levels = []
    for step in (0, 1, 2, 0, 1, 2):
        with model.cache_context("cond", step_index=step, num_inference_steps=3, timestep=900.0 - step):
            model(latents, torch.tensor(0.5), labels)
        (run,) = model._skipdit_cache.streams.runs.values()
        levels.append(run.level)
    assert levels == [900, 899, 898] * 2
    assert counts(model) == (1, 2)


@pytest.mark.parametrize("copied", [False, True], ids=["views", "copies"])
@pytest.mark.parametrize("anew", [False, True], ids=["labels kept", "labels anew"])
@pytest.mark.parametrize("start", [0, 10])
def test_a_scheduler_that_counts_no_steps(start: int, anew: bool, copied: bool) -> None:
    """DDIM's: with labels made anew every call stayed at the first step, and a run that began later was at the wrong
    levels, if its timesteps were copies. Both guidance branches share a call, and then each has its own."""
    pipeline, (latents, labels) = tiny_pipeline(), inputs()
    model, scheduler, null = pipeline.transformer, pipeline.scheduler, torch.full_like(labels, 10)
    assert not hasattr(scheduler, "step_index")
    for branches in ([torch.cat([labels, null])], [labels, null]):
        enable_cache(pipeline, "N2-700-50")
        for _ in range(2):
            decisions, levels, full = "", [], 0
            scheduler.set_timesteps(20)
            for timestep in scheduler.timesteps[start:]:
                for each in branches:
                    given, size = each.clone() if anew else each, len(each)
                    entry = timestep.repeat(size) if copied else timestep.expand(size)
                    full = counts(model)[0] if levels or each is not branches[0] else 0
                    with DeviceWaits() as waits:
                        model(torch.cat([latents] * (size // len(labels))), entry, given)
                    if not anew:  # at most the list of timesteps, and for a second branch its labels
                        assert waits.counts["tolist"] + waits.counts["_local_scalar_dense"] <= (not levels)
                (run,) = model._skipdit_cache.streams.runs.values()
                levels.append(run.level)
                decisions += "F" if counts(model)[0] > full else "r"
            assert levels == scheduler.timesteps[start:].tolist()
            assert decisions == ("FrFrFrFrFF" if start else "FFFFFFFrFrFrFrFrFrFF")


@pytest.mark.parametrize("spec", ["N2", "N3-900-100", "N2-700-50"])
@pytest.mark.parametrize(
    "scheduler",
    [diffusers.EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler(invert_sigmas=True)],
    ids=["EDM", "rises"],
)
def test_a_cache_that_works_with_a_scheduler_is_not_refused(scheduler: Any, spec: str) -> None:
    """Cosmos' and Mochi's: by their raw timesteps nothing would be stored, or a schedule meet rising noise."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler
    check_method(pipeline, parse_method(spec), 20)
    with pytest.raises(ValueError, match="would never reuse in 20 steps"):
        check_method(pipeline, parse_method("N1"), 20)
