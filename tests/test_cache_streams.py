"""Which call continues which stream of calls: schedulers, branches, repeated and rising timesteps."""

import copy
import dataclasses
import json
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from diffusers.hooks.hooks import CacheContext
from test_families_pipelines import CASES
from tiny import TINY_FAMILIES, counts, inputs, tiny_dit, tiny_pipeline
from torch import Tensor, nn

from skipdit.cache.conditions import Conditions
from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.cache.streams import cache_context
from skipdit.pipelines import ClassToImagePipeline

STEPS = (900, 750, 600, 450)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


def full_steps(model: Any, unit: nn.Module, run: Callable[[], object]) -> list[int]:
    """The calls of the model in which this module of a deep unit runs."""
    seen: list[int] = []
    ran: list[int] = []
    handles = [
        unit.register_forward_hook(lambda *_: seen.append(1)),
        model.register_forward_hook(lambda *_: ran.append(len(seen))),
    ]
    run()
    for handle in handles:
        handle.remove()
    return [step for step, (before, after) in enumerate(zip([0, *ran], ran, strict=False)) if after > before]


def sample(model: nn.Module, scheduler: Any, num_steps: int) -> Tensor:
    """A loop by hand."""
    latents, labels = inputs()
    scheduler.set_timesteps(num_steps)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(model(scaled, timestep, labels).sample[:, :4], timestep, latents).prev_sample
    return latents


# ----------------------------------------------------------------------------------------------------------------------
# Schedulers


@pytest.mark.parametrize("spec", ["N2", "auto", "explicit.json"])
@pytest.mark.parametrize("before", [None, 50, 20, 30])
def test_another_scheduler_beside_that_of_the_pipeline(spec: str, before: int | None, tmp_path: Path) -> None:
    """Some of its timesteps, or all, are in the pipeline's list too."""
    (tmp_path / "explicit.json").write_text(json.dumps({"full_steps": [0, 3, 7], "num_inference_steps": 20}))
    spec = str(tmp_path / spec) if spec.endswith("json") else spec
    torch.manual_seed(0)
    pipeline = tiny_pipeline()
    alone = copy.deepcopy(pipeline.transformer)
    enable_cache(alone, spec)
    other = DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = sample(alone, other, 20)
    if before is not None:
        pipeline([1, 2], num_inference_steps=before, output_type="latent")
    enable_cache(pipeline, spec)
    if before is not None and not spec.endswith("json"):
        pipeline([1, 2], num_inference_steps=before, output_type="latent")
    assert torch.equal(sample(pipeline.transformer, other, 20), expected)
    assert counts(pipeline) == counts(alone)
    assert counts(alone)[1] >= 10


def test_a_second_pipeline_over_the_same_transformer() -> None:
    pipeline = tiny_pipeline()
    second = ClassToImagePipeline(pipeline.transformer, DDIMScheduler.from_config(pipeline.scheduler.config))
    second.set_progress_bar_config(disable=True)
    enable_cache(pipeline, "N2")
    pipeline([1, 2], num_inference_steps=50, output_type="latent")
    for num_steps in (20, 25, 10, 50):
        ran = full_steps(
            pipeline.transformer,
            pipeline.transformer.blocks[2].attn,
            lambda num_steps=num_steps: second([1, 2], num_inference_steps=num_steps, output_type="latent"),
        )
        assert ran == list(range(0, num_steps, 2))


def test_a_run_continues_while_another_pipeline_has_a_new_list() -> None:
    """Copied timesteps tell of which of the two lists they are."""
    pipeline, (latents, labels) = tiny_pipeline(), inputs()
    model = pipeline.transformer
    second = ClassToImagePipeline(model, DDIMScheduler.from_config(pipeline.scheduler.config))
    enable_cache(pipeline, "N2")
    enable_cache(second, "N2")
    pipeline.scheduler.set_timesteps(10)
    for step, timestep in enumerate(pipeline.scheduler.timesteps):
        if step == 4:
            second.scheduler.set_timesteps(7)
        model(latents, timestep.clone(), labels)
    assert counts(model) == (5, 5)


def test_repeated_timesteps_are_steps_of_one_run(tmp_path: Path) -> None:
    """Heun's: 15 calls at 8 timesteps, the last two at 0, behind which an interval starts anew."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = HeunDiscreteScheduler(num_train_timesteps=1000)
    path = tmp_path / "heun.json"
    path.write_text(json.dumps({"full_steps": [0, 5, 10], "num_inference_steps": 15}))
    for spec, expected in {"N4": [0, 4, 8, 12, 14], str(path): [0, 5, 10]}.items():
        enable_cache(pipeline, spec)
        attention = pipeline.transformer.blocks[2].attn
        ran = full_steps(
            pipeline.transformer, attention, lambda: pipeline([1, 2], num_inference_steps=8, output_type="latent")
        )
        assert ran == expected
        assert counts(pipeline) == (len(expected), 15 - len(expected))


def test_timesteps_that_rise_are_a_run_like_others() -> None:
    pipeline = tiny_pipeline()
    model, scheduler = pipeline.transformer, DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler = scheduler
    plain = sample(model, scheduler, 10)
    enable_cache(pipeline, "N3")
    ran = full_steps(model, model.blocks[2].attn, lambda: sample(model, scheduler, 10))
    assert ran == [0, 1, 4, 7]  # after timestep 0, the first, an interval starts anew
    assert counts(pipeline) == (4, 6)
    enable_cache(pipeline, "N1")
    assert torch.equal(sample(model, scheduler, 10), plain)
    disable_cache(pipeline)
    enable_cache(model, "N3")
    for _ in range(3):  # a bare model knows it after two steps that have risen
        ran = full_steps(model, model.blocks[2].attn, lambda: sample(model, scheduler, 10))
        assert ran == [0, 1, 4, 7]


def test_runs_one_after_the_other_do_not_look_like_rising_timesteps() -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            sample(model, DDIMScheduler(), 8)


def test_a_schedule_for_falling_timesteps_refuses_rising_ones() -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    timesteps = tuple(float(1000 - 100 * step) for step in range(10))
    enable_cache(
        pipeline,
        CacheMethod(schedule=ExplicitSchedule(full_steps=(0, 4), num_inference_steps=10, timesteps=timesteps)),
    )
    with pytest.raises(ValueError, match="made for falling timesteps, got a run in which they rise"):
        sample(pipeline.transformer, pipeline.scheduler, 10)


# ----------------------------------------------------------------------------------------------------------------------
# Branches of one run


CONTEXTS: dict[str, Callable[[Any, str], AbstractContextManager[None]]] = {
    "model": lambda model, name: model.cache_context(name),
    "skipdit": lambda _, name: cache_context(name),
    "none": lambda *_: nullcontext(),
}


@pytest.mark.parametrize("context", ["model", "skipdit"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "DiT"])
def test_runs_that_take_turns_are_apart_under_both_verbs(name: str, lag: int, context: str) -> None:
    family = TINY_FAMILIES[name]
    model = family.build(6)
    enable_cache(model, "delta:N2")
    twin = copy.deepcopy(model)

    def call(each: nn.Module, seed: int, step: int) -> Tensor:
        return each(**family.arguments(STEPS[step], seed=seed + step), return_dict=False)[0]

    alone = {seed: [call(twin, seed, step) for step in range(len(STEPS))] for seed in (0, 50)}
    together: dict[int, list[Tensor]] = {0: [], 50: []}
    for tick in range(len(STEPS) + lag):
        for seed, behind in ((0, 0), (50, lag)):
            if 0 <= tick - behind < len(STEPS):
                with CONTEXTS[context](model, f"run {seed}"):
                    together[seed].append(call(model, seed, tick - behind))
    for seed in (0, 50):
        assert all(torch.equal(a, b) for a, b in zip(alone[seed], together[seed], strict=True))
    assert counts(model) == (4, 4)


@pytest.mark.parametrize("context", ["model", "skipdit"])
def test_a_branch_with_a_perturbed_layer_and_the_same_tensors_is_apart(context: str) -> None:
    """Perturbed-attention guidance: only the name tells the branches from each other."""
    family = TINY_FAMILIES["FluxTransformer2DModel"]
    model, perturbed = family.build(6), [False]
    model.transformer_blocks[2].ff.register_forward_hook(lambda _, __, out: out * 0 if perturbed[0] else out)

    def guided() -> list[tuple[Tensor, ...]]:
        pairs = []
        for step, timestep in enumerate(STEPS):
            arguments, pair = family.arguments(timestep, seed=step), []
            for number, branch in enumerate(("pred_cond", "pred_cond_skip")):
                perturbed[0] = bool(number)
                with CONTEXTS[context](model, branch):
                    pair.append(model(**arguments, return_dict=False)[0])
            pairs.append(tuple(pair))
        return pairs

    plain = guided()
    enable_cache(model, "delta:N2")
    check_full_steps(guided(), plain)
    assert counts(model) == (4, 4)


def check_full_steps(cached: list[tuple[Tensor, ...]], plain: list[tuple[Tensor, ...]]) -> None:
    """Under N2, of inputs that do not depend on the outputs: every second step is what it is without a cache, for each
    branch, and the others are not."""
    for step, (pair, expected) in enumerate(zip(cached, plain, strict=True)):
        assert not torch.equal(*pair)
        for one, other in zip(pair, expected, strict=True):
            assert torch.equal(one, other) == (step % 2 == 0)


@pytest.mark.parametrize("context", list(CONTEXTS))
def test_arguments_that_are_no_tensors_tell_branches_apart(context: str) -> None:
    """Skip-layer guidance of SD3."""
    family = TINY_FAMILIES["SD3Transformer2DModel"]
    model = family.build(6)

    def guided(context: str) -> list[tuple[Tensor, ...]]:
        pairs = []
        for step, timestep in enumerate(STEPS):
            arguments, pair = family.arguments(timestep, seed=step), []
            for options in ({}, {"skip_layers": [2]}):
                with CONTEXTS[context](model, str(options)):
                    pair.append(model(**arguments, **options, return_dict=False)[0])
            pairs.append(tuple(pair))
        return pairs

    plain = guided("none")
    enable_cache(model, "delta:N2")
    check_full_steps(guided(context), plain)
    assert counts(model) == (4, 4)


def test_a_default_given_by_name_is_no_other_branch() -> None:
    model, (latents, labels) = tiny_dit(), inputs()
    family = TINY_FAMILIES["LatteTransformer3DModel"]
    latte = family.build(6)
    enable_cache(latte, "delta:N2")
    latte(**family.arguments(900), return_dict=False)
    latte(**family.arguments(800), enable_temporal_attentions=True, return_dict=False)
    assert counts(latte) == (1, 1)
    enable_cache(model, "N2")
    model(latents, torch.tensor(900), labels)
    model(hidden_states=latents, timestep=torch.tensor(800), class_labels=labels)
    assert counts(model) == (1, 1)


def test_labels_filled_in_place_in_one_buffer_are_two_branches() -> None:
    latents, labels = inputs()
    buffer = torch.empty_like(labels)

    def guided() -> list[tuple[Tensor, ...]]:
        pairs = []
        for step, timestep in enumerate(STEPS):
            noisy, pair = latents + step, []
            for each in (labels, torch.full_like(labels, 10)):
                buffer.copy_(each)
                pair.append(model(noisy, torch.tensor(timestep), buffer).sample)
            pairs.append(tuple(pair))
        return pairs

    model = tiny_dit()
    plain = guided()
    enable_cache(model, "N2")
    for _ in range(2):
        check_full_steps(guided(), plain)
        assert counts(model) == (4, 4)


def test_a_pipeline_of_diffusers_ends_the_branches_that_it_names() -> None:
    """Flux with true guidance: `cond` and `uncond`, on the same text states."""
    pytest.importorskip("transformers")
    model = TINY_FAMILIES["FluxTransformer2DModel"].build(6)
    pipeline: Any = diffusers.FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    text, pooled, latents = (torch.randn(1, *each, generator=generator) for each in ((5, 12), (10,), (16, 4)))
    options = {"height": 64, "width": 64, "output_type": "latent", "return_dict": False, "latents": latents}
    options |= {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "true_cfg_scale": 3.0}
    options |= {"negative_prompt_embeds": text.clone(), "negative_pooled_prompt_embeds": pooled.clone()}
    enable_cache(pipeline, "delta:N2")
    for num_steps in (6, 10, 6):
        pipeline(num_inference_steps=num_steps, **options)
        assert counts(pipeline) == (num_steps, num_steps)
        assert cache_summary(pipeline).bytes_held == 0
    with cache_context("outer"):
        pipeline.transformer(**TINY_FAMILIES["FluxTransformer2DModel"].arguments(), return_dict=False)
    held = cache_summary(pipeline).bytes_held
    assert held > 0
    pipeline(num_inference_steps=6, **options)
    assert cache_summary(pipeline).bytes_held == held  # the run of another context goes on


def test_an_adaptive_cache_that_reuses_in_one_branch_is_no_error() -> None:
    """The batch halves near the end, as where guidance stops: the second layout has no time to reuse."""
    pipeline, (latents, labels) = tiny_pipeline(), inputs()
    enable_cache(pipeline, "fbcache:50")
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(10)
    for step, timestep in enumerate(scheduler.timesteps):
        if step < 9:
            twice = torch.cat([labels, torch.full_like(labels, 10)])
            out = pipeline.transformer(torch.cat([latents, latents]), timestep, twice).sample[:2]
        else:
            out = pipeline.transformer(latents, timestep, labels).sample
        latents = scheduler.step(out[:, :4], timestep, latents).prev_sample
    assert counts(pipeline) == (2, 8)
    enable_cache(pipeline, "fbcache:0.00000001")
    with pytest.warns(UserWarning, match="has not reused once in 10 steps: raise its threshold"):
        sample(pipeline.transformer, scheduler, 10)


@pytest.mark.parametrize("alternate", [False, True])
def test_two_sizes_in_lockstep(alternate: bool) -> None:
    (small, labels), (big, _) = inputs(), inputs(size=16)
    model = tiny_dit()
    enable_cache(model, "N2")
    for step, timestep in enumerate(STEPS):
        order = [small + step, big + step]
        for latents in order[::-1] if alternate and step % 2 else order:
            model(latents, torch.tensor(timestep), labels)
    assert counts(model) == (4, 4)


def test_what_is_new_at_every_step_is_no_condition() -> None:
    """A control signal or another timestep shows itself as such after two calls."""
    family = TINY_FAMILIES["PixArtTransformer2DModel"]
    model = family.build(6)
    enable_cache(model, "delta:N2")
    model(**family.arguments(1000), return_dict=False)
    one = cache_summary(model).bytes_held
    steps = range(950, 50, -50)

    def run() -> None:
        for step, timestep in enumerate(steps):
            arguments = family.arguments(timestep)
            arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"] * (1.1 + 0.01 * step)
            model(**arguments, return_dict=False)

    run()
    assert counts(model) == (1 + 1 + 8, 9)  # the first call, the first of the loop, and every second from there on
    assert cache_summary(model).bytes_held == one
    disable_cache(model)


# ----------------------------------------------------------------------------------------------------------------------
# Streams that pause


@pytest.mark.parametrize("form", ["batch", "names", "labels"])
@pytest.mark.parametrize("watched", [True, False])
def test_a_stream_that_paused_begins_again_in_full(form: str, watched: bool) -> None:
    """Guidance between two noise levels: in one batch, by name, or by labels alone, which are made anew."""
    pipeline, (latents, labels) = tiny_pipeline(), inputs()
    model, scheduler, null = pipeline.transformer, pipeline.scheduler, torch.full_like(labels, 10)
    enable_cache(pipeline if watched else model, "N3")
    scheduler.set_timesteps(16)
    decisions: dict[str, str] = {"cond": "", "uncond": "", "both": ""}

    def call(name: str, *given: Any) -> None:
        before = counts(model)
        with model.cache_context(name) if form == "names" else nullcontext():
            model(*given)
        decisions[name] += "F" if counts(model)[0] > before[0] else "r"

    for step, timestep in enumerate(scheduler.timesteps):
        inside = not 5 <= step < 9
        if form == "batch" and not inside:
            call("both", torch.cat([latents] * 2), timestep, torch.cat([labels, null]))
            continue
        if inside:
            call("uncond", latents, timestep, null.clone())
        call("cond", latents, timestep, labels.clone())
    assert decisions["uncond"] == "FrrFr" + "FrrFrrF"
    assert decisions["cond"] == ("FrrFr" + "FrrFrrF" if form == "batch" else "FrrFrrFrrFrrFrrF")
    assert decisions["both"] == ("FrrF" if form == "batch" else "")


# ----------------------------------------------------------------------------------------------------------------------
# Threads


def in_threads(*works: Callable[[], None]) -> None:
    with ThreadPoolExecutor(len(works)) as pool:
        for each in [pool.submit(work) for work in works]:
            each.result()


@pytest.mark.parametrize("kind", ["LattePipeline", "HunyuanDiTPipeline", "ours"])
def test_threads_that_share_a_model_sample_as_alone(kind: str) -> None:
    """Two pipelines over one transformer, each with a scheduler; of ours, one pipeline for both. HunyuanDiT's hands on
    copies of its timesteps."""
    pytest.importorskip("transformers")
    if kind == "ours":
        pipelines: list[Any] = [tiny_pipeline()] * 2
    else:
        case = CASES[kind]
        model = case.transformer()
        pipelines = [case.make(model) for _ in range(2)]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        enable_cache(pipeline, "N2")

    def run(number: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if kind == "ours":
            return pipelines[number]([seed], num_inference_steps=8, generator=generator, output_type="latent").images
        options = CASES[kind].options(1)
        options["latents"] = torch.randn(options["latents"].shape, generator=generator)
        return torch.as_tensor(pipelines[number](num_inference_steps=8, return_dict=False, **options)[0])

    alone = {seed: run(0, seed) for seed in range(6)}
    together: dict[int, Tensor] = {}

    def work(number: int) -> None:
        for seed in range(number, 6, 2):
            together[seed] = run(number, seed)

    in_threads(lambda: work(0), lambda: work(1))
    assert [seed for seed in alone if not torch.equal(alone[seed], together[seed])] == []
    assert cache_summary(pipelines[0]).bytes_held == 0


def test_runs_one_after_the_other_in_threads_that_end_do_not_leak() -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    expected = sample(model, DDIMScheduler(), 6)
    held, results = cache_summary(model).bytes_held, []

    def run() -> None:
        with torch.no_grad():
            results.append(sample(model, DDIMScheduler(), 6))

    for _ in range(4):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert all(torch.equal(each, expected) for each in results)
    assert cache_summary(model).bytes_held == 2 * held  # of this thread, and of the last one that has ended


def test_what_a_broken_run_holds_is_dropped_as_the_next_begins() -> None:
    """A pipeline of diffusers that is stopped in a callback tells nobody."""
    pytest.importorskip("transformers")
    case = CASES["PixArtAlphaPipeline"]
    pipeline = case.make(case.transformer())
    pipeline.set_progress_bar_config(disable=True)
    enable_cache(pipeline, "N2")

    def stop(step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    def held_at_first(step: int, *_: Any) -> None:
        if step == 0:
            held.append(cache_summary(pipeline).bytes_held)

    held: list[int] = []
    pipeline(num_inference_steps=6, callback=held_at_first, **case.options(1))
    with pytest.raises(KeyboardInterrupt):
        pipeline(num_inference_steps=6, callback=stop, **case.options(1))
    assert cache_summary(pipeline).bytes_held == held[0]
    pipeline(num_inference_steps=6, callback=held_at_first, **case.options(2))
    assert held[1] == 2 * held[0]  # of two pictures, nothing beside


# ----------------------------------------------------------------------------------------------------------------------
# What the rule leans on


def test_conditions_differ_by_content_whatever_their_values() -> None:
    def given(**arguments: Any) -> Conditions:
        return Conditions(arguments)

    base = torch.tensor([0.0, -torch.inf, torch.nan])
    same, other, longer = base.clone(), base.flip(0), torch.zeros(2)
    first = given(mask=base, flag=None, strength=0.5)
    for conditions, unequal in (
        (given(mask=same, flag=None, strength=0.7), set()),
        (given(mask=other, flag=None), {"mask"}),
        (given(mask=base, flag=2), {"flag"}),
        (given(mask=base), {"flag"}),
        (given(flag=None), {"mask"}),
        (given(mask=longer, flag=None), {"mask"}),
    ):
        first.sums.clear()
        first.add_checksums()
        assert conditions.compare([first], [torch.tensor(3)]) == [3]
        assert conditions.unequal(first) == unequal
    zeros, more = given(mask=torch.zeros(3)), given(mask=torch.zeros(4))
    zeros.add_checksums()
    more.compare([zeros], [])
    assert more.unequal(zeros) == {"mask"}


def test_private_ways_of_torch_and_diffusers() -> None:
    """A view of a scheduler's list shares its memory, a written tensor says so, a scheduler counts its steps."""
    tensor = torch.zeros(3)
    version = tensor._version
    tensor[1:].fill_(1)
    assert tensor._version > version
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    first = scheduler.timesteps
    entry = scheduler.timesteps[2].expand(5)
    assert entry.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    assert entry.storage_offset() - first.storage_offset() == 2
    assert (scheduler.step_index, scheduler.begin_index) == (None, None)
    for step in range(2):
        scheduler.step(tensor, first[step], tensor)
        assert scheduler.step_index == step + 1
    scheduler.set_timesteps(4)
    assert scheduler.timesteps is not first
    assert scheduler.step_index is None
    fields = {field.name for field in dataclasses.fields(CacheContext)}
    assert fields >= {"step_index", "num_inference_steps", "timestep"}
