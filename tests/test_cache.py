"""The cache: when, what, how; on a model, on our pipeline, on diffusers' pipeline, compiled."""

import copy
import gc
import json
import threading
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from safetensors.torch import load_file
from tiny import equal, flops_of, inputs, tiny_dit, tiny_pipeline

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.schedule import ExplicitSchedule, resolve
from skipdit.cache.streams import cache_context
from skipdit.checkpoints import load_model
from skipdit.diffusion import Objective, make_scheduler
from skipdit.models.long_skip import LongSkipConfig

# ----------------------------------------------------------------------------------------------------------------------
# On a model


def run(model: torch.nn.Module, timesteps: list[int], batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """A loop in which every step's input depends on the last output, so that errors would carry on."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    outputs = []
    with torch.no_grad():
        for timestep in timesteps:
            outputs.append(model(latents, torch.tensor(timestep), class_labels=labels).sample)
            latents = latents + 0.1 * outputs[-1][:, :4]
    return outputs


STEPS = list(range(950, -1, -50))


@pytest.mark.parametrize("interval", [2, 3])
def test_parity_with_the_authors_cache(interval: int, shared: Path) -> None:
    cases = load_file(shared / "parity" / "dit_skip_cases.safetensors")
    model = load_model(shared / "parity" / "dit_skip.safetensors", num_attention_heads=2)
    enable_cache(model, f"N{interval}-1000-20-k4")
    with torch.no_grad():
        for latents, timestep, expected in zip(cases["x"], cases["t"], cases[f"cached_N{interval}"], strict=True):
            actual = model(latents, timestep, cases["y"]).sample
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    summary = cache_summary(model)
    assert summary.steps_reused >= 5
    assert summary.steps_full + summary.steps_reused == 12


@pytest.mark.parametrize("spec", ["N1", "N1-700-50-k2", "skip-taylor:N1-o2", "delta:N1", "delta-taylor:N1-k2"])
@pytest.mark.parametrize("num_layers", [5, 6])
def test_interval_1_is_bit_equal_to_no_cache(spec: str, num_layers: int) -> None:
    model = tiny_dit(num_layers)
    expected = run(model, STEPS)
    enable_cache(model, spec)
    assert equal(run(model, STEPS), expected)
    assert cache_summary(model).steps_full == len(STEPS)
    disable_cache(model)
    assert equal(run(model, STEPS), expected)
    assert type(model).__call__ is torch.nn.Module.__call__


@pytest.mark.parametrize("spec", ["N2", "skip-taylor:N2-o1"])
def test_a_cached_call_right_after_a_full_call_is_bit_equal(spec: str) -> None:
    model = tiny_dit()
    latents, labels = inputs()
    timestep = torch.tensor(500)
    expected = model(latents, timestep, labels).sample
    enable_cache(model, spec)
    assert torch.equal(model(latents, timestep, labels).sample, expected)
    assert torch.equal(model(latents, timestep, labels).sample, expected)
    assert (cache_summary(model).steps_full, cache_summary(model).steps_reused) == (1, 1)


@pytest.mark.parametrize("spec", ["N2", "N3-700-50", "skip-taylor:N4-o2", "N2-k2", "delta:N3", "delta-taylor:N2-k2"])
def test_enable_run_disable_restores(spec: str) -> None:
    model = tiny_dit()
    expected, names = run(model, STEPS), list(model.state_dict())
    enable_cache(model, spec)
    cached = run(model, STEPS)
    assert not equal(cached, expected)
    assert torch.equal(cached[0], expected[0])
    full = sum(resolve(parse_method(spec).schedule, STEPS))
    summary = cache_summary(model)
    assert (summary.steps_full, summary.steps_reused) == (full, len(STEPS) - full)
    assert list(model.state_dict()) == names
    disable_cache(model)
    assert equal(run(model, STEPS), expected)


@pytest.mark.parametrize("long_skip", [None, LongSkipConfig(), LongSkipConfig(num_pairs=2)])
def test_a_delta_is_what_the_units_between_have_added(long_skip: LongSkipConfig | None) -> None:
    """On a reuse step the first and the last unit run, and the rest adds what it added before, long skips or not."""
    model = tiny_dit(6, long_skip)
    latents, labels = inputs()
    taken: list[torch.Tensor] = []
    left: list[torch.Tensor] = []
    model.blocks[5].register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    model.blocks[0].register_forward_hook(lambda *given: left.append(given[2]))
    expected = model(latents, torch.tensor(600), labels).sample
    enable_cache(model, "delta:N2")
    assert torch.equal(model(latents, torch.tensor(600), labels).sample, expected)
    reuse = flops_of(lambda: model(latents + 0.1, torch.tensor(580), labels))
    torch.testing.assert_close(taken[2], left[2] + (taken[1] - left[1]))
    assert not torch.equal(left[2], left[1])
    full = flops_of(lambda: tiny_dit(6, long_skip)(latents, torch.tensor(600), labels))
    assert cache_summary(model).compute_ratio == pytest.approx(2 * full / (full + reuse))


def test_a_delta_needs_units_to_leave_out() -> None:
    with pytest.raises(ValueError, match="between 1 and 2 for 6 units, got 3"):
        enable_cache(tiny_dit(6, None), "delta:N2-k3")
    with pytest.raises(ValueError, match="has no units that skipdit knows of"):
        enable_cache(torch.nn.Linear(2, 2), "delta:N2")


def test_what_is_reused_is_the_deep_features_and_the_shallow_blocks_are_fresh() -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    ran: list[int] = []
    for unit, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, unit=unit: ran.append(unit))
    run(model, [800, 700])
    assert ran == [0, 1, 2, 3, 4, 5, 0, 5]


def test_runs_in_a_row_do_not_touch_each_other() -> None:
    fresh = tiny_dit()
    enable_cache(fresh, "N2")
    model = copy.deepcopy(fresh)
    expected = run(fresh, STEPS, batch=3, seed=5)
    run(model, STEPS[:5])  # interrupted, another batch size
    run(model, [900, 500, 100], batch=3)
    assert equal(run(model, STEPS, batch=3, seed=5), expected)


def test_a_changed_batch_size_within_a_run_is_computed_in_full() -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    latents, labels = inputs(4)
    model(latents, torch.tensor(800), labels)
    uncached = copy.deepcopy(model)
    disable_cache(uncached)
    expected = uncached(latents[:2], torch.tensor(700), labels[:2]).sample
    assert torch.equal(model(latents[:2], torch.tensor(700), labels[:2]).sample, expected)


def interleave(model: torch.nn.Module, lags: tuple[int, int], named: bool) -> list[list[torch.Tensor]]:
    """Two loops over the same model that take turns, the second `lags` behind."""
    loops = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        loops.append([torch.randn(2, 4, 8, 8, generator=generator), torch.randint(10, (2,), generator=generator), []])
    for tick in range(len(STEPS) + max(lags)):
        for number, (loop, lag) in enumerate(zip(loops, lags, strict=True)):
            if 0 <= tick - lag < len(STEPS):
                context = cache_context(f"loop {number}") if named else cache_context("both")
                with context, torch.no_grad():
                    out = model(loop[0], torch.tensor(STEPS[tick - lag]), class_labels=loop[1]).sample
                loop[0] = loop[0] + 0.1 * out[:, :4]
                loop[2].append(out)
    return [loop[2] for loop in loops]


@pytest.mark.parametrize(("lags", "named"), [((0, 0), False), ((0, 0), True), ((0, 7), True)])
def test_interleaved_runs_equal_runs_alone(lags: tuple[int, int], named: bool) -> None:
    model = tiny_dit()
    enable_cache(model, "skip-taylor:N3-o1")
    alone = [run(model, STEPS, seed=seed) for seed in (1, 2)]
    together = interleave(model, lags, named)
    assert equal(together[0], alone[0])
    assert equal(together[1], alone[1])


@pytest.mark.parametrize("named", [False, True])
def test_separate_guidance_calls_equal_batched_ones(named: bool) -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    latents, labels = inputs()
    null = torch.full_like(labels, 10)
    together, apart = [], []
    with torch.no_grad():
        for timestep in STEPS:
            together.append(
                model(torch.cat([latents, latents]), torch.tensor(timestep), torch.cat([labels, null])).sample
            )
        for timestep in STEPS:
            halves = []
            for name, branch in (("cond", labels), ("uncond", null)):
                with cache_context(name if named else "pipeline"):
                    halves.append(model(latents.clone(), torch.tensor(timestep), branch).sample)
            apart.append(torch.cat(halves))
    for first, second in zip(together, apart, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert cache_summary(model).steps_reused == (10 + 20)


def test_threads_that_name_their_runs_do_not_mix() -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    alone = [run(model, STEPS, seed=seed) for seed in range(3)]
    results: dict[int, list[torch.Tensor]] = {}

    def work(seed: int) -> None:
        with cache_context(f"thread {seed}"):
            results[seed] = run(model, STEPS, seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(results[seed], alone[seed]) for seed in range(3))


def test_bytes_held_are_what_the_summary_says() -> None:
    model = tiny_dit()
    enable_cache(model, "skip-taylor:N2-o1")
    run(model, [900, 800, 700, 600], batch=3)
    gc.collect()
    feature = 3 * 16 * 32 * 4  # batch, tokens, width, float32
    assert cache_summary(model).bytes_held == 2 * feature
    model._reset_stateful_cache()
    assert cache_summary(model).bytes_held == 0
    assert cache_summary(model).peak_bytes_held == 2 * feature
    assert cache_summary(model).steps_full == 2  # of the run that has ended


def test_per_sample_timesteps_are_refused_with_a_reason() -> None:
    model = tiny_dit()
    latents, labels = inputs()
    enable_cache(model, "N2")
    with pytest.raises(ValueError, match="one timestep for the whole batch"):
        model(latents, torch.tensor([10, 20]), labels)


def test_training_with_a_cache_is_refused() -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    with pytest.raises(RuntimeError, match="inference"):
        model.train()(*inputs()[:1], torch.tensor(1), inputs()[1])


def test_a_cache_that_could_have_no_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="no long skips"):
        enable_cache(tiny_dit(long_skip=None), "N2")
    with pytest.raises(ValueError, match="between 1 and 2 for 6 units with 3 linked pairs, got 4"):
        enable_cache(tiny_dit(6), "N2-k4")
    with pytest.raises(ValueError, match="Linear has no long skips"):
        enable_cache(torch.nn.Linear(2, 2), "N2")
    with pytest.raises(TypeError, match="model or a pipeline"):
        enable_cache("model", "N2")  # pyright: ignore
    with pytest.raises(ValueError, match="no cache is enabled"):
        cache_summary(tiny_dit())
    pipeline = tiny_pipeline()
    enable_cache(pipeline, "N3-100-50")
    with pytest.raises(ValueError, match="would never reuse in 4 steps"):
        pipeline([1], num_inference_steps=4, output_type="latent")
    pipeline.scheduler = make_scheduler(Objective(learned_variance=True), "ddpm")
    with pytest.raises(ValueError, match="would never reuse in 4 steps"):
        pipeline([1], num_inference_steps=4, output_type="latent")
    scheduled = tiny_dit()
    enable_cache(scheduled, CacheMethod(schedule=ExplicitSchedule(full_steps=(0, 2), num_inference_steps=4)))
    with pytest.raises(ValueError, match="made for 4 steps, got 5"):
        run(scheduled, STEPS)


def test_a_saved_config_names_the_model_and_a_copy_caches_alone(tmp_path: Path) -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "DiT"
    twin = copy.deepcopy(model)
    expected = run(model, STEPS)
    assert equal(run(twin, STEPS), expected)
    disable_cache(twin)
    assert cache_summary(model).steps_reused == 10


def test_enabling_again_replaces() -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    enable_cache(model, "N5")
    run(model, STEPS)
    assert cache_summary(model).steps_full == 4
    assert type(model).__name__ == "DiT"
    disable_cache(model)
    disable_cache(model)
    assert type(model) is type(tiny_dit())


# ----------------------------------------------------------------------------------------------------------------------
# On pipelines


def latents_of(pipeline: object, seed: int = 0, num_steps: int = 10, **options: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipeline([1, 2], num_inference_steps=num_steps, generator=generator, output_type="latent", **options).images


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm"])
def test_on_our_pipeline_twice_in_a_row_equals_a_fresh_one(scheduler: str) -> None:
    pipeline = tiny_pipeline(scheduler)
    enable_cache(pipeline, "skip-taylor:N3-900-40-o1")
    first = latents_of(pipeline)
    summary = cache_summary(pipeline)
    assert summary.bytes_held == 0
    assert summary.steps_reused > 0
    assert pipeline([3], num_inference_steps=7, output_type="latent", guidance_scale=1.0).images.shape == (1, 4, 8, 8)
    assert cache_summary(pipeline).steps_full + cache_summary(pipeline).steps_reused == 7
    assert torch.equal(latents_of(pipeline), first)
    on_model = tiny_pipeline(scheduler)
    on_model.transformer.load_state_dict(pipeline.transformer.state_dict())
    enable_cache(on_model.transformer, "skip-taylor:N3-900-40-o1")
    assert torch.equal(latents_of(on_model), first)


def test_an_interrupted_pipeline_leaves_nothing() -> None:
    pipeline = tiny_pipeline()
    enable_cache(pipeline, "N2")
    expected = latents_of(pipeline)
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    handle = pipeline.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        latents_of(pipeline, seed=3)
    handle.remove()
    assert cache_summary(pipeline).bytes_held == 0
    assert torch.equal(latents_of(pipeline), expected)


def test_two_pipelines_over_one_model_take_turns() -> None:
    pipeline = tiny_pipeline()
    other = tiny_pipeline()
    other.transformer = pipeline.transformer
    enable_cache(pipeline, "N2")
    enable_cache(other, "N2")
    expected = [latents_of(pipeline, seed=1), latents_of(other, seed=2, num_steps=7)]
    inner = []

    def step_in(*_: object) -> None:
        if not inner:
            inner.append(None)
            inner[0] = latents_of(other, seed=2, num_steps=7)

    pipeline.transformer.blocks[2].register_forward_hook(step_in)
    assert torch.equal(latents_of(pipeline, seed=1), expected[0])
    assert torch.equal(inner[0], expected[1])


@pytest.fixture
def dit_pipeline() -> DiTPipeline:
    """diffusers' own pipeline, which knows only 1000 classes, over our model."""
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipeline = DiTPipeline(tiny_dit(num_classes=1000), vae.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_on_the_pipeline_of_diffusers(
    dit_pipeline: DiTPipeline, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "unique", None)  # no timestep is read back, of one picture neither

    def sample(labels: list[int], num_steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"guidance_scale": guidance_scale, "num_inference_steps": num_steps, "output_type": "np"}
        return torch.from_numpy(dit_pipeline(labels, generator=generator, **options).images)

    plain = sample([1, 999], 8)
    enable_cache(dit_pipeline, "N1")
    assert torch.equal(sample([1, 999], 8), plain)
    enable_cache(dit_pipeline, "N2")
    cached = sample([1, 999], 8)
    assert not torch.equal(cached, plain)
    assert (cache_summary(dit_pipeline).steps_full, cache_summary(dit_pipeline).steps_reused) == (4, 4)
    assert cache_summary(dit_pipeline).bytes_held == 0
    sample([5], 5)
    assert torch.equal(sample([1, 999], 8), cached)
    disable_cache(dit_pipeline)
    assert torch.equal(sample([1, 999], 8), plain)


def test_a_pipeline_asks_the_device_for_no_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline()
    enable_cache(pipeline, "N2")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the timestep was read back")

    monkeypatch.setattr(torch.Tensor, "unique", refuse)
    latents_of(pipeline)
    assert cache_summary(pipeline).steps_reused == 5


def test_a_replaced_scheduler_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline()
    enable_cache(pipeline, "N2")
    latents_of(pipeline)
    pipeline.scheduler = make_scheduler(Objective(learned_variance=True), "dpm")
    monkeypatch.setattr(torch.Tensor, "unique", None)
    latents_of(pipeline)
    assert cache_summary(pipeline).steps_reused == 5


def test_a_new_run_never_takes_the_features_of_another_picture() -> None:
    """An interrupted first step, then a run of other labels at the same timesteps."""
    model = tiny_dit()
    enable_cache(model, "N2")
    model(torch.randn(2, 4, 8, 8), torch.tensor(950), torch.tensor([1, 2]))
    fresh = tiny_dit()
    fresh.load_state_dict(model.state_dict())
    enable_cache(fresh, "N2")
    assert equal(run(model, STEPS, seed=9), run(fresh, STEPS, seed=9))


@pytest.mark.parametrize("recreated", [False, True])
def test_guidance_that_ends_early_keeps_to_its_branch(recreated: bool) -> None:
    """Unconditional then conditional, and from 400 on the conditional branch alone."""
    model = tiny_dit()
    enable_cache(model, "N3")
    latents, labels = inputs()
    null = torch.full_like(labels, 10)
    alone, together = [], []
    with torch.no_grad():
        for timestep in STEPS:
            with cache_context("alone"):
                alone.append(model(latents.clone(), torch.tensor(timestep), labels).sample)
        for timestep in STEPS:
            branches = [null, labels] if timestep > 400 else [labels]
            for branch in branches:
                out = model(latents.clone(), torch.tensor(timestep), branch.clone() if recreated else branch).sample
            together.append(out)
    assert equal(alone, together)


def test_contexts_that_are_never_ended_do_not_pile_up() -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    latents, labels = inputs()
    for number in range(100):
        with cache_context(f"request {number}"):
            model(latents, torch.tensor(500), labels)
    assert cache_summary(model).bytes_held == 64 * latents.shape[0] * 16 * 32 * 4


def test_a_failed_enable_leaves_the_cache_that_is_on() -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    with pytest.raises(ValueError, match="num_shallow_units"):
        enable_cache(model, "N2-k9")
    run(model, STEPS)
    assert cache_summary(model).steps_reused == 10


# ----------------------------------------------------------------------------------------------------------------------
# Compiled


@pytest.mark.parametrize("spec", ["N2", "skip-taylor:N3-o1-k2", "delta:N2"])
def test_compiled_there_are_two_whole_graphs_and_no_more(spec: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    pipeline = tiny_pipeline()
    enable_cache(pipeline, spec)
    eager = [latents_of(pipeline, num_steps=num_steps) for num_steps in (10, 23, 6)]
    pipeline.transformer.compile(fullgraph=True, backend=counting)
    for num_steps, expected in zip((10, 23, 6), eager, strict=True):
        assert torch.equal(latents_of(pipeline, num_steps=num_steps), expected)
        assert len(graphs) == 2
    summary = cache_summary(pipeline)
    assert summary.steps_reused > 0
    torch._dynamo.reset()


def test_a_compiled_wrapper_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"model\.compile\(fullgraph=True\)"):
        enable_cache(torch.compile(tiny_dit(), backend="eager"), "N2")
    pipeline = tiny_pipeline()
    enable_cache(pipeline, "N2")
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    for change in (disable_cache, cache_summary):
        with pytest.raises(ValueError, match=r"model\.compile\(fullgraph=True\)"):
            change(pipeline)


def test_the_counter_follows_partial_links() -> None:
    model = tiny_dit(8, LongSkipConfig(num_pairs=2))
    full = flops_of(lambda: run(model, STEPS))
    enable_cache(model, "N2-k2")
    cached = flops_of(lambda: run(model, STEPS))
    assert cache_summary(model).compute_ratio == pytest.approx(full / cached)
