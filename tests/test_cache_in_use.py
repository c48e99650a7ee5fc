"""A cache beside the rest of the ecosystem: adapters, offloading, partial runs, broken runs, the verbs of diffusers."""

import copy
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_group_offloading
from tiny import TINY_FAMILIES, counts, equal, flops_of, randomize, tiny_dit, tiny_pipeline
from torch import Tensor, nn

from skipdit.cache.enable import CachedModel, cache_summary, disable_cache, enable_cache
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips, long_skip_class
from skipdit.pipelines import ClassToImagePipeline

STEPS = (900, 750, 600, 450, 300, 150)
FLUX, PIXART, WAN, LATTE = (
    "FluxTransformer2DModel",
    "PixArtTransformer2DModel",
    "WanTransformer3DModel",
    "LatteTransformer3DModel",
)
MODELS = ("DiT", "Latte", PIXART, FLUX)
# deep features; outputs of branches; a decision after a first unit that has been run
SPECS = ("N2", "fora:N2", "fbcache:0.9", "easycache:100-w0")
every_model = pytest.mark.parametrize("name", MODELS)
every_spec = pytest.mark.parametrize("spec", SPECS)


def build(name: str, num_units: int = 4) -> Any:
    """Random weights everywhere, with long skips."""
    model = TINY_FAMILIES[name].build(num_units)
    add_long_skips(model, LongSkipConfig())
    return randomize(model)


@torch.no_grad()
def run(model: nn.Module, name: str, seed: int = 0, steps: tuple[int, ...] = STEPS) -> list[Tensor]:
    """Inputs that drift slowly, so that adaptive caches reuse too."""
    family = TINY_FAMILIES[name]
    start, way = (family.arguments(seed=seed + each)["hidden_states"] for each in (0, 1))
    outputs = []
    for number, timestep in enumerate(steps):
        arguments = family.arguments(timestep) | {"hidden_states": start + 0.05 * number * way}
        outputs.append(model(**arguments, return_dict=False)[0])
    return outputs


class Stopped(Exception):
    pass


def stop_at(model: nn.Module, number: int) -> None:
    """The model raises at its call of this number, once."""
    calls = []

    def hook(*_: object) -> None:
        calls.append(1)
        if len(calls) == number:
            handle.remove()
            raise Stopped

    handle = model.register_forward_pre_hook(hook)


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def add_lora(model: nn.Module) -> None:
    """With random weights, into attention and long skips."""
    peft = pytest.importorskip("peft")
    targets = [".qkv", "to_q", "to_v", "long_skip.proj", "fc1"]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in names if name.endswith(tuple(targets))]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), model)
    torch.manual_seed(5)
    added = [parameter for key, parameter in model.named_parameters() if "lora_" in key]
    assert len(added) >= 2 * 4
    for parameter in added:
        nn.init.normal_(parameter, std=0.2)


@every_model
@every_spec
def test_adapters_may_come_before_the_cache_and_after_it(name: str, spec: str) -> None:
    before, after, plain = (build(name) for _ in range(3))
    add_lora(before)
    adapted = run(before, name)
    enable_cache(before, spec)
    enable_cache(after, spec)
    without = run(after, name)
    add_lora(after)
    outputs = run(before, name)
    assert torch.equal(outputs[0], adapted[0])
    assert not equal(outputs, adapted)
    assert counts(before)[1] > 0
    assert equal(run(after, name), outputs)
    assert counts(after) == counts(before)
    assert not torch.equal(outputs[0], without[0])
    disable_cache(before)
    assert equal(run(before, name), adapted)
    assert torch.equal(without[0], run(plain, name)[0])


def test_adapters_of_diffusers_are_switched_under_a_cache() -> None:
    peft = pytest.importorskip("peft")
    model = build(FLUX)
    enable_cache(model, "N2")
    plain = run(model, FLUX)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
    adapted = run(model, FLUX)
    assert not torch.equal(adapted[0], plain[0])
    model.disable_adapters()
    assert equal(run(model, FLUX), plain)
    model.enable_adapters()
    assert equal(run(model, FLUX), adapted)
    model.delete_adapters("style")
    assert equal(run(model, FLUX), plain)
    assert counts(model) == (3, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Offloading


def offload_each_layer(model: Any) -> None:
    """accelerate's: weights are on the meta device but while their layer runs."""
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def offload_groups(kind: str, **options: int) -> Callable[[Any], None]:
    """diffusers': weights are on the disk but while their group runs, so none can be used by mistake."""

    def offload(model: Any) -> None:
        cpu = torch.device("cpu")
        folder = tempfile.mkdtemp(dir=model.folder)
        apply_group_offloading(model, cpu, cpu, offload_type=kind, offload_to_disk_path=folder, **options)

    return offload


def cast_layers(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


HOOKS = {
    "layers": offload_each_layer,
    "leaves": offload_groups("leaf_level"),
    "blocks": offload_groups("block_level", num_blocks_per_group=1),
    "casting": cast_layers,
}


@pytest.mark.parametrize("cache_first", [True, False], ids=["cache_first", "hooks_first"])
@pytest.mark.parametrize("hooks", HOOKS)
@every_model
def test_offloaded_it_gives_what_it_gives_without_hooks(
    name: str, hooks: str, cache_first: bool, tmp_path: Path
) -> None:
    for spec in SPECS if cache_first else SPECS[:1]:
        model, plain, bare = build(name), build(name), build(name)
        model.folder = tmp_path
        enable_cache(plain, spec)
        if hooks == "casting":  # it rounds weights, each once
            HOOKS[hooks](plain)
            HOOKS[hooks](bare)
        uncached, expected = run(bare, name), run(plain, name)
        if cache_first:
            enable_cache(model, spec)
        HOOKS[hooks](model)
        if not cache_first:
            enable_cache(model, spec)
        assert equal(run(model, name), expected)
        assert counts(model) == counts(plain)
        assert counts(model)[1] > 0
        disable_cache(model)
        assert equal(run(model, name), uncached)


def test_groups_of_several_blocks_follow_a_converted_model(tmp_path: Path) -> None:
    """All its blocks are called at each step, and hand on where they are left out."""
    model, plain = build(PIXART, 6), build(PIXART, 6)
    model.folder = tmp_path
    for each in (model, plain):
        enable_cache(each, "N2")
    offload_groups("block_level", num_blocks_per_group=3)(model)
    assert equal(run(model, PIXART), run(plain, PIXART))
    assert counts(model) == (3, 3)


def test_a_pipelines_own_offloading() -> None:
    pipeline, offloaded = tiny_pipeline(), tiny_pipeline()
    offloaded.transformer.load_state_dict(pipeline.transformer.state_dict())

    def sample(each: ClassToImagePipeline, num_steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return each([1, 2], num_inference_steps=num_steps, generator=generator, output_type="latent").images

    enable_cache(pipeline, "N2")
    enable_cache(offloaded, "N2")
    offloaded.enable_model_cpu_offload(device="cpu")
    for num_steps in (6, 4, 6):  # the hooks are renewed at each run's end
        assert torch.equal(sample(offloaded, num_steps), sample(pipeline, num_steps))
        assert counts(offloaded) == (num_steps // 2, num_steps // 2)
        assert cache_summary(offloaded).bytes_held == 0


# ----------------------------------------------------------------------------------------------------------------------
# The verbs


@pytest.mark.parametrize("name", ["DiT", "Latte", PIXART, FLUX])
def test_a_model_has_the_verbs_of_diffusers(name: str) -> None:
    model = build(name)
    plain = run(model, name)
    assert model.is_cache_enabled is False
    model.enable_cache("N2")
    assert model.is_cache_enabled is True
    with model.cache_context("cond"):
        cached = run(model, name)
    assert not equal(cached, plain)
    assert counts(model) == (3, 3)
    with model.cache_context("cond", step_index=3, sigma=0.5):
        assert equal(run(model, name), cached)
    model.enable_cache("N3")
    run(model, name)
    assert counts(model) == (2, 4)
    model.disable_cache()
    assert model.is_cache_enabled is False
    assert equal(run(model, name), plain)
    with pytest.raises(ValueError, match="no cache is enabled"):
        cache_summary(model)


def test_contexts_of_our_models_keep_runs_apart() -> None:
    model = build("DiT")
    model.enable_cache("N2")
    expected = run(model, "DiT"), run(model, "DiT", seed=5)
    together: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, timestep in enumerate(STEPS):
        for seed, outputs in zip((0, 5), together, strict=True):
            start, way = (TINY_FAMILIES["DiT"].arguments(seed=seed + each)["hidden_states"] for each in (0, 1))
            arguments = TINY_FAMILIES["DiT"].arguments(timestep) | {"hidden_states": start + 0.05 * number * way}
            with model.cache_context(f"run {seed}"), torch.no_grad():
                outputs.append(model(**arguments).sample)
    assert equal(together[0], expected[0])
    assert equal(together[1], expected[1])


def test_a_config_of_diffusers_goes_to_its_own_cache() -> None:
    model = build(FLUX)
    plain = run(model, FLUX)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(config)
    assert model.is_cache_enabled
    assert not isinstance(model, CachedModel)
    theirs = run(model, FLUX)
    assert not equal(theirs, plain)
    for enable in (model.enable_cache, lambda spec: enable_cache(model, spec)):
        with pytest.raises(ValueError, match=r"a cache of diffusers is enabled .* model\.disable_cache\(\) first"):
            enable("N2")
    model.disable_cache()
    assert not model.is_cache_enabled
    assert equal(run(model, FLUX), plain)
    model.enable_cache("N2")
    with pytest.raises(ValueError, match=r"a cache is enabled on this model: call model\.disable_cache\(\) first"):
        model.enable_cache(config)
    run(model, FLUX)
    assert counts(model) == (3, 3)
    model.disable_cache()
    assert equal(run(model, FLUX), plain)


# ----------------------------------------------------------------------------------------------------------------------
# Summaries and copies


def test_a_summary_is_a_table_and_a_dict() -> None:
    model = build("DiT", 6)
    full = flops_of(lambda: run(model, "DiT"))
    enable_cache(model, "skip-taylor:N2-o1")
    ratio = full / flops_of(lambda: run(model, "DiT"))
    summary = cache_summary(model)
    fields = json.loads(json.dumps(summary.to_dict()))
    assert fields.pop("compute_ratio") == pytest.approx(ratio)
    feature = 2 * 16 * 16 * 4  # batch, tokens, width, float32; and its derivative
    assert fields == {
        "method": "skip-taylor:N2-k1-o1",
        "model": "DiT",
        "num_units": 6,
        "reused": ["output of units 1 to 4"],
        "steps_full": 3,
        "steps_reused": 3,
        "steps_shallow": 0,
        "steps_held": 0,
        "bytes_held": 2 * feature,
        "peak_bytes_held": 2 * feature,
    }
    assert summary.to_markdown().splitlines() == [
        "| cache | |",
        "| --- | --- |",
        "| method | skip-taylor:N2-k1-o1 |",
        "| model | DiT |",
        "| num units | 6 |",
        "| reused | output of units 1 to 4 |",
        "| steps full | 3 |",
        "| steps reused | 3 |",
        "| steps shallow | 0 |",
        "| steps held | 0 |",
        f"| compute ratio | {ratio:.3f} |",
        f"| bytes held | {2 * feature} |",
        f"| peak bytes held | {2 * feature} |",
    ]
    assert f"3 full, 3 reused, compute ratio {ratio:.3f}" in str(summary)


@every_model
@every_spec
def test_a_copy_in_the_middle_of_a_run_is_a_cache_of_its_own(name: str, spec: str) -> None:
    model = build(name)
    enable_cache(model, spec)
    expected = run(model, name)
    run(model, name, seed=3, steps=STEPS[:3])
    held, numbers = cache_summary(model).bytes_held, counts(model)
    twin = copy.deepcopy(model)
    assert (cache_summary(twin).bytes_held, *counts(twin)) == (0, 0, 0)
    assert equal(run(twin, name), expected)
    assert (cache_summary(model).bytes_held, *counts(model)) == (held, *numbers)
    disable_cache(twin)
    assert model.is_cache_enabled
    assert equal(run(model, name), expected)


@every_model
def test_a_cached_model_is_saved_as_the_model(name: str, tmp_path: Path) -> None:
    model, family = build(name), TINY_FAMILIES[name]
    plain = run(model, name)
    enable_cache(model, "N2")
    expected = run(model, name)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == family.model_class.__name__
    kind = family.model_class if family.ours else long_skip_class(family.model_class)
    loaded = kind.from_pretrained(tmp_path)
    assert not loaded.is_cache_enabled
    assert equal(run(loaded, name), plain)
    enable_cache(loaded, "N2")
    assert equal(run(loaded, name), expected)
    if family.ours:
        assert family.model_class.from_config(model.config).long_skip_links == model.long_skip_links


def test_a_pipeline_is_saved_and_loaded_under_a_cache(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    enable_cache(pipeline, "N2")

    def sample(each: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return each([1, 2], num_inference_steps=6, generator=generator, output_type="latent").images

    expected = sample(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = ClassToImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert not torch.equal(sample(loaded), expected)
    enable_cache(loaded, "N2")
    assert torch.equal(sample(loaded), expected)


@pytest.mark.parametrize(("spec", "made"), [("N2", (3, 2)), ("fora:N2", (3, 2)), ("fbcache:0.000001", (5, 0))])
def test_a_step_that_raises_leaves_no_state(spec: str, made: tuple[int, int]) -> None:
    """Neither what other branches of its run hold, nor what it has stored itself until then: memory may be why. Nor a
    warning that it has never reused, in place of the error."""
    model, family = build("DiT"), TINY_FAMILIES["DiT"]
    enable_cache(model, spec)

    def call(timestep: int) -> None:
        for name in ("cond", "uncond"):
            with model.cache_context(name), torch.no_grad():
                model(**family.arguments(timestep))

    call(900)
    call(800)
    assert cache_summary(model).bytes_held > 0
    stop_at(model.blocks[-1], 2)
    with pytest.raises(Stopped):
        call(700)
    assert cache_summary(model).bytes_held == 0
    assert counts(model) == made
    assert model.open_call is None or model.open_call.state is None


def test_costs_are_counted_apart_from_what_other_threads_run() -> None:
    """They were counted by hooks on all modules of the process, by name."""
    model, other = build("DiT"), build("DiT")
    enable_cache(model, "N2")
    run(model, "DiT")
    (expected,) = model._skipdit_cache.costs.values()
    enable_cache(model, "N2")

    def beside(*_: Any) -> None:
        thread = threading.Thread(target=run, args=(other, "DiT"))
        thread.start()
        thread.join()

    hook = model.blocks[1].register_forward_pre_hook(beside)
    run(model, "DiT")
    hook.remove()
    (costs,) = model._skipdit_cache.costs.values()
    assert costs.units == expected.units


@pytest.mark.parametrize("name", ["DiT", FLUX])
def test_threads_with_copies_of_their_own_do_not_mix(name: str) -> None:
    model = build(name)
    enable_cache(model, "N2")
    expected = [run(model, name, seed=seed) for seed in (0, 5)]
    copies = [copy.deepcopy(model) for _ in range(2)]
    results: dict[int, list[Tensor]] = {}
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(3):
            results[number] = run(copies[number], name, seed=5 * number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, each in enumerate(copies):
        assert equal(results[number], expected[number])
        assert counts(each) == (3, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Modes


@every_model
@every_spec
def test_inference_mode_gives_the_same_and_mixes_with_no_grad(name: str, spec: str) -> None:
    model = build(name)
    enable_cache(model, spec)
    expected = run(model, name)
    with torch.inference_mode():
        outputs = run(model, name, steps=STEPS[:3])
        assert all(out.is_inference() for out in outputs)
    assert equal(outputs, expected[:3])
    numbers = counts(model)
    with torch.no_grad():  # goes on with what was stored in inference mode
        rest = run(model, name)[3:]
    assert equal(rest, expected[3:])
    assert sum(numbers) == 3


@pytest.mark.parametrize("name", ["DiT", "Latte", PIXART])  # a norm of Flux warns under autocast
@every_spec
def test_autocast_reuses_what_it_computes(name: str, spec: str) -> None:
    model = build(name)
    exact = run(model, name)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model, name)
        enable_cache(model, spec.replace("N2", "N1").replace("0.9", "0").replace("100", "0"))
        assert equal(run(model, name), plain)
        enable_cache(model, spec)
        cached = run(model, name)
        assert counts(model)[1] > 0
        arguments = TINY_FAMILIES[name].arguments()
        with torch.no_grad():
            first, again = (model(**arguments, return_dict=False)[0] for _ in range(2))
    assert not equal(plain, exact)
    assert torch.equal(cached[0], plain[0])
    assert not equal(cached, plain)
    assert [out.dtype for out in cached] == [out.dtype for out in plain]
    # the very same inputs: held values are equal, what units add is so but for rounding
    if spec == "fbcache:0.9":
        assert (again - first).abs().max() <= 0.1 * first.abs().max()
    else:
        assert torch.equal(again, first)
    assert all(out.isfinite().all() for out in cached)


def test_a_model_without_long_skips_is_cached_in_half_precision_too() -> None:
    model = nn.Module.to(tiny_dit(4, None), torch.bfloat16)
    enable_cache(model, "delta:N2")
    latents = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        outputs = [model(latents, torch.tensor(timestep), torch.tensor([1, 2])).sample for timestep in STEPS]
    assert {out.dtype for out in outputs} == {torch.bfloat16}
    assert counts(model) == (3, 3)
    assert cache_summary(model).bytes_held == 2 * 16 * 32 * 2


@torch.no_grad()
def test_named_arguments_continue_a_run_in_any_order() -> None:
    model = randomize(TINY_FAMILIES["HunyuanDiT2DModel"].build(4))
    enable_cache(model, "N4")
    arguments = TINY_FAMILIES["HunyuanDiT2DModel"].arguments()
    for number, timestep in enumerate((900.0, 800.0, 700.0, 600.0)):
        step = arguments | TINY_FAMILIES["HunyuanDiT2DModel"].arguments(timestep)
        names = list(step) if number % 2 else list(reversed(step))
        model(**{name: step[name] for name in names}, return_dict=False)
    assert counts(model) == (1, 3)
