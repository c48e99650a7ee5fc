"""What went wrong with transformers of diffusers once: each as it was seen."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from families import TINY
from tiny import TINY_FAMILIES
from torch import Tensor, nn

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


def test_a_pipeline_without_a_transformer_is_told() -> None:
    pipeline: Any = diffusers.WanPipeline(None, None, None, DDIMScheduler(), None)
    with pytest.raises(ValueError, match="has no transformer to cache, only scheduler"):
        enable_cache(pipeline, "delta:N2")
