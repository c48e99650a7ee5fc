"""What went wrong with transformers of diffusers once: each as it was seen.

| fault | test |
| --- | --- |
| 1 figures without Flux's single-stream blocks | `test_flux_at_its_depths...`, `test_auto_aims...`, `test_families` |
| 2 a run that happens not to reuse raises | `test_a_run_that_never_reuses...`, `test_one_step_runs...` |
| 3 long skips under skip-layer guidance | `test_long_skips_and_skip_layer_guidance...` |
| 4 caches under it | `test_caches_and_skip_layer_guidance...`, `test_families_variants` |
| 5 hooks that are gone, offloading first | `test_hooks_that_are_gone...`, `test_offloading_first...`, `test_surgery` |
| 6 outputs that vanish | `test_every_output_survives`, `test_families` |
| 7 timesteps that rise | `test_families_variants` (Lumina2, Mochi), `test_cache_streams` |
| 8 a probe that is not seen | `test_teacache_...`, `test_cache_in_use` (Latte without attention over time) |
| 9 a module that runs twice per block | `test_chunks...`, `test_one_module...` |
| 10 half open after a failed enable | `test_a_failed_enable...` |
| 11 timesteps that are one number in bfloat16 | `test_cache_streams` |
| 12 silence where nothing is reused | `test_silence...`, `test_families` (second timesteps), `test_cache_streams` |
| 13 questions to the device | `test_families_pipelines`, `test_families_variants` |
| 14 messages, numbers as timesteps | `test_a_timestep...`, `test_a_pipeline_without...`, `test_what_is_refused...` |
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading
from families import TINY
from test_families_pipelines import CASES, sample
from tiny import TINY_FAMILIES, flops_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skipdit.cache.enable import cache_summary, cached, disable_cache, enable_cache
from skipdit.models.costs import flop_counter
from skipdit.models.families import FAMILIES, Family, Segment
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips

TIMESTEPS = (900, 800, 700, 600)


def run(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**arguments)[0].clone()


def steps_of(name: str, **given: Any) -> list[dict[str, Any]]:
    return [
        TINY_FAMILIES[name].arguments(timestep, seed=seed) | given for seed, timestep in enumerate(TIMESTEPS, start=7)
    ]


def test_flux_at_its_depths_saves_what_the_summary_says() -> None:
    """19 double-stream and 38 single-stream blocks, of which the first kind alone were units once."""
    tiny = TINY["FluxTransformer2DModel"]
    model = tiny.build(num_layers=19, num_single_layers=38).requires_grad_(False)
    with torch.no_grad(), flop_counter() as counter:
        model(**tiny.inputs(0, 50))
    full = counter.get_total_flops()
    with cached(model, "delta:N2") as cache, torch.no_grad(), flop_counter() as counter:
        for step in range(50):
            model(**tiny.inputs(step, 50))
    saved = 50 * full / counter.get_total_flops()
    assert saved >= 1.75
    assert cache.summary().compute_ratio == pytest.approx(saved, rel=0.02)
    assert cache.summary().num_units == 57


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_fused_attention_is_counted(name: str) -> None:
    """torch's own counter has no row for that of CPUs; written out it is two products, which it has."""
    model, given = TINY_FAMILIES[name].build(4), TINY_FAMILIES[name].arguments()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**given)
    assert flops_of(lambda: model(**given)) == counter.get_total_flops()


def test_auto_aims_at_what_is_counted() -> None:
    """On a run of 50 steps whose timesteps are spread evenly: at least what it is asked for, and little more."""
    tiny = TINY["FluxTransformer2DModel"]
    model = tiny.build(num_layers=3, num_single_layers=6).requires_grad_(False)
    with torch.no_grad(), flop_counter() as counter:
        model(**tiny.inputs(0, 50))
    full = counter.get_total_flops()
    for speedup, fresh in ((1.5, ""), (2.5, ""), (1.5, "-k1"), (2.5, "-k1")):
        enable_cache(model, f"auto:{speedup}{fresh}")
        with torch.no_grad(), flop_counter() as counter:
            for step in range(50):
                model(**tiny.inputs(step, 50))
        assert speedup <= 50 * full / counter.get_total_flops() <= 1.1 * speedup


# ----------------------------------------------------------------------------------------------------------------------
# Runs that do not reuse


def pipeline_of(name: str) -> Any:
    pipeline = CASES[name].make(CASES[name].transformer())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def one_warning(message: str) -> Iterator[None]:
    with pytest.warns(UserWarning, match=message) as caught:
        yield
    assert len(caught) == 1, [str(each.message) for each in caught]


@pytest.mark.parametrize("name", ["FluxPipeline", "PixArtAlphaPipeline"])
@pytest.mark.parametrize("spec", ["fbcache:0.00000001", "teacache:0.00000001", "adacache:0.00000001"])
def test_a_run_that_never_reuses_warns_and_its_result_is_kept(spec: str, name: str) -> None:
    """FluxPipeline calls two branches by name; it raised at the last step once, of \"23 steps\"."""
    pipeline, case = pipeline_of(name), CASES[name]
    plain = sample(pipeline, case, 1, 12)
    enable_cache(pipeline, spec)
    with one_warning(f"{spec} has not reused once in 12 steps: raise its threshold"):
        kept = sample(pipeline, case, 1, 12)
    assert torch.equal(kept, plain)


@pytest.mark.parametrize(
    "spec", ["N2", "delta:N2", "auto", "taylorseer:N2", "fbcache:0.1", "teacache:0.1", "adacache:0.3"]
)
def test_one_step_runs_need_nothing(spec: str) -> None:
    pipeline, case = pipeline_of("FluxPipeline"), CASES["FluxPipeline"]
    plain = sample(pipeline, case, 1, 1)
    enable_cache(pipeline, spec)
    for _ in range(2):
        assert torch.equal(sample(pipeline, case, 1, 1), plain)


def test_silence_of_a_transformer_outside_the_window_is_one_warning() -> None:
    """The first of Wan 2.2 is called down to a noise level of 600."""
    case = CASES["WanPipeline"]
    pipeline: Any = case.make(case.transformer())
    pipeline.register_modules(transformer_2=case.transformer())
    pipeline.register_to_config(boundary_ratio=0.6)
    pipeline.set_progress_bar_config(disable=True)
    enable_cache(pipeline, "N2-500-0")
    with one_warning("not reused once in 4 steps: this WanTransformer3DModel was called at timesteps 999 to 625 only"):
        sample(pipeline, case, 1, 8)
    assert cache_summary(pipeline.transformer).steps_reused == 0
    assert cache_summary(pipeline.transformer_2).steps_reused > 0
    enable_cache(pipeline, "N2-900-0")
    sample(pipeline, case, 1, 8)
    assert cache_summary(pipeline.transformer).steps_reused > 0


@pytest.mark.parametrize("spec", ["auto", "delta:N2-700-50"])
def test_silence_of_a_forgotten_scale_is_one_warning(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "QwenImageTransformer2DModel"
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], timestep_scale=1.0))
    model = TINY[name].build().requires_grad_(False)
    enable_cache(model, spec)
    for step in range(20):
        run(model, TINY[name].inputs(step, 20))
    with one_warning(
        "in 20 steps: timesteps are 1 to 0.05, not 1000 to 0: the timestep_scale of its Family does not fit"
    ):
        run(model, TINY[name].inputs(0, 20))
    monkeypatch.undo()
    fitting = TINY[name].build().requires_grad_(False)
    enable_cache(fitting, spec)
    for step in (*range(20), 0):
        run(fitting, TINY[name].inputs(step, 20))


def test_a_run_that_is_full_by_wish_says_nothing() -> None:
    """Interval 1 and a threshold of 0 are controls; a short run of auto has nothing to spare."""
    model, given = TINY_FAMILIES["PixArtTransformer2DModel"].build(6), steps_of("PixArtTransformer2DModel")
    for spec in ("delta:N1", "fbcache:0", "teacache:0", "adacache:0", "auto:1"):
        enable_cache(model, spec)
        for arguments in (*given, given[0]):
            run(model, arguments)
        model._reset_stateful_cache()


# ----------------------------------------------------------------------------------------------------------------------
# Hooks

HOOKED = (
    *("FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"),
    *("PixArtTransformer2DModel", "DiTTransformer2DModel"),
)


def use_cache_of_diffusers(model: Any) -> None:
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    model.disable_cache()


def offload(model: Any) -> Any:
    pipeline: Any = diffusers.DiTPipeline(model, None, DDIMScheduler())  # type: ignore[arg-type]
    pipeline.model_cpu_offload_seq = "transformer"
    pipeline.enable_model_cpu_offload(device="cpu")
    return pipeline


def offload_for_a_while(model: Any) -> None:
    offload(model).remove_all_hooks()


def offload_each_layer(model: Any) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_that_are_gone_leave_nothing(name: str) -> None:
    """Both leave a `forward` in the instances."""
    check_cached_as_a_plain_one(name, offload_for_a_while)
    if name in ("FluxTransformer2DModel", "WanTransformer3DModel"):  # of these the only ones with caches of diffusers
        check_cached_as_a_plain_one(name, use_cache_of_diffusers)


@pytest.mark.parametrize("name", HOOKED)
def test_offloading_first_works_or_says_what_to_do(name: str) -> None:
    """accelerate's hooks may be there first; those of diffusers are to be taken off for the moment."""
    check_cached_as_a_plain_one(name, offload)
    check_cached_as_a_plain_one(name, offload_each_layer)
    model, cpu = TINY_FAMILIES[name].build(6), torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    classes = [type(module) for module in model.modules()]
    for act in (lambda: enable_cache(model, "delta:N2"), lambda: add_long_skips(model)):
        with pytest.raises(ValueError, match=r"group offloading.*remove the hooks, call skipdit, then set them up"):
            act()
    assert [type(module) for module in model.modules()] == classes


def check_cached_as_a_plain_one(name: str, use: Callable[[Any], None]) -> None:
    model, plain, steps = TINY_FAMILIES[name].build(6), TINY_FAMILIES[name].build(6), steps_of(name)
    use(model)
    outputs = []
    for each in (model, plain):
        enable_cache(each, "delta:N2")
        outputs.append([run(each, arguments) for arguments in steps])
        assert cache_summary(each).steps_reused == 2
        disable_cache(each)
        outputs[-1].append(run(each, steps[1]))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Skip-layer guidance, probes, branches


@pytest.mark.parametrize("left_out", [[7, 8, 9], [0], [1], [10], [4, 7]])
def test_long_skips_and_skip_layer_guidance_go_together(left_out: list[int]) -> None:
    """SD3.5 leaves out units 7, 8 and 9 in a third call per step; a skip from one of them is what entered it."""
    name = "SD3Transformer2DModel"
    model = TINY_FAMILIES[name].build(12)
    steps = steps_of(name, skip_layers=left_out)
    expected = [run(model, arguments) for arguments in steps]
    add_long_skips(model, LongSkipConfig(fusion="residual"))
    assert all(torch.equal(run(model, given), out) for given, out in zip(steps, expected, strict=True))


@pytest.mark.parametrize("left_out", [[7, 8, 9], [0], [1], [2, 7], [10]])
@pytest.mark.parametrize("spec", ["delta:N2", "delta:N2-k3", "auto", "fbcache:100", "teacache:100", "fora:N2"])
def test_caches_and_skip_layer_guidance_go_together(spec: str, left_out: list[int]) -> None:
    name = "SD3Transformer2DModel"
    model = TINY_FAMILIES[name].build(12)
    plain, guided = steps_of(name), steps_of(name, skip_layers=left_out)
    expected = [run(model, guided[0]), run(model, plain[0])]
    enable_cache(model, spec)
    for step, (given, without) in enumerate(zip(guided, plain, strict=True)):
        outputs = [run(model, given), run(model, without)]
        assert all(output.isfinite().all() for output in outputs)
        if step == 0:
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert cache_summary(model).steps_full + cache_summary(model).steps_reused == 8


def test_teacache_stays_full_where_its_probe_is_not_run() -> None:
    model = TINY_FAMILIES["SD3Transformer2DModel"].build(6)
    enable_cache(model, "teacache:0.000001")
    for given in steps_of("SD3Transformer2DModel", skip_layers=[0]):
        run(model, given)
    assert cache_summary(model).steps_reused == 0


def test_teacache_is_refused_where_no_attention_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "PixArtTransformer2DModel"
    monkeypatch.setitem(FAMILIES, name, Family(segments=(Segment(branches={"mlp": ("ff",)}),)))
    model = TINY_FAMILIES[name].build(6)
    with pytest.raises(ValueError, match=r"no attention in its first unit .* name it in the branches of .*declare"):
        enable_cache(model, "teacache:0.1")
    assert type(model) is TINY_FAMILIES[name].model_class
    enable_cache(model, "fbcache:0.1")


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "PixArtTransformer2DModel"])
def test_chunks_of_a_feed_forward_are_reused_each_for_itself(name: str) -> None:
    """The output of the last chunk served all of them once."""
    family = TINY_FAMILIES[name]
    whole, chunked = family.build(4), family.build(4)
    for block in chunked.transformer_blocks:
        block.set_chunk_feed_forward(1, dim=1)
    for model in (whole, chunked):
        enable_cache(model, "fora:N2")
    for given in steps_of(name):
        torch.testing.assert_close(run(chunked, given), run(whole, given), atol=1e-5, rtol=1e-5)
    assert cache_summary(chunked).steps_reused == 2


@pytest.mark.parametrize("name", ["CogView4Transformer2DModel", "GlmImageTransformer2DModel"])
def test_one_module_for_text_and_pictures_is_two_branches(name: str) -> None:
    model = TINY[name].build()
    given = TINY[name].inputs(1, 4)
    expected = run(model, given)
    enable_cache(model, "fora:N2")
    assert torch.equal(run(model, given), expected)
    assert torch.equal(run(model, given), expected)
    assert cache_summary(model).steps_reused == 1


def test_a_failed_enable_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second try raised a TypeError of Python's once, also with a right declaration."""
    name = "ZImageTransformer2DModel"
    model = TINY[name].build()
    classes = [type(module) for module in model.modules()]
    right = FAMILIES[name]
    monkeypatch.setitem(FAMILIES, name, Family(segments=(Segment(lists=("layers",)),), latents="x", timestep="t"))
    with pytest.raises(ValueError, match="streams must be arguments of ZImageTransformerBlock"):
        enable_cache(model, "delta:N2")
    assert [type(module) for module in model.modules()] == classes
    monkeypatch.setitem(FAMILIES, name, right)
    enable_cache(model, "delta:N2")
    disable_cache(model)
    assert [type(module) for module in model.modules()] == classes


def test_every_output_survives() -> None:
    for name, count in (("LTX2VideoTransformer3DModel", 2), ("Kandinsky6Transformer3DModel", 2)):
        model = TINY[name].build()
        given = TINY[name].inputs(0, 4)
        with torch.no_grad():
            plain = model(**given)
            with cached(model, "delta:N2"):
                kept = model(**given)
        assert type(kept) is type(plain)
        assert len(list(TINY[name].outputs(kept))) == count


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500)])
def test_a_timestep_may_be_a_number(timestep: Any) -> None:
    model = TINY_FAMILIES["PixArtTransformer2DModel"].build(4)

    class TakesNumbers(type(model)):
        def forward(self, hidden_states: Tensor, timestep: Any, **given: Any) -> Any:
            return super().forward(hidden_states, timestep=torch.as_tensor([timestep] * 2), **given)

    model.__class__ = TakesNumbers
    given = TINY_FAMILIES["PixArtTransformer2DModel"].arguments() | {"timestep": timestep}
    enable_cache(model, "delta:N2")
    run(model, given)
    run(model, given)
    assert cache_summary(model).steps_reused == 1


@pytest.mark.parametrize("given", [{}, {"timestep": None}])
def test_a_call_without_a_timestep_is_told(given: dict[str, None]) -> None:
    """These classes have `None` as its default."""
    model = TINY_FAMILIES["PixArtTransformer2DModel"].build(4)
    enable_cache(model, "delta:N2")
    arguments = TINY_FAMILIES["PixArtTransformer2DModel"].arguments()
    del arguments["timestep"]
    with pytest.raises(TypeError, match="PixArtTransformer2DModel needs the argument 'timestep'"):
        model(**arguments, **given)


def test_a_pipeline_without_a_transformer_is_told() -> None:
    pipeline: Any = diffusers.WanPipeline(None, None, None, DDIMScheduler(), None)
    with pytest.raises(ValueError, match="has no transformer to cache, only scheduler"):
        enable_cache(pipeline, "delta:N2")


class NoFamily(nn.Module):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return hidden_states * timestep


@pytest.mark.parametrize("spec", ["N2", "delta:N2", "auto-k1", "fora:N2", "fbcache:0.1"])
def test_what_is_refused_names_the_way_out(spec: str) -> None:
    with pytest.raises(ValueError, match=r"NoFamily has no .*skipdit\.declare_family"):
        enable_cache(NoFamily(), spec)
    with pytest.raises(ValueError, match=r"no long skips.*skipdit\.add_long_skips\(model\), or .*delta:"):
        enable_cache(TINY_FAMILIES["FluxTransformer2DModel"].build(6), "N1")
