"""Switching a cache on: what is refused, what is left behind where it is, and what copies and new models become."""

import copy
import io
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from tiny import TINY_FAMILIES, counts, inputs, randomize, tiny_dit, tiny_pipeline
from torch import nn

from skipdit.cache.enable import CachedModel, cache_summary, cached, disable_cache, enable_cache, runtime_of
from skipdit.cache.fingerprint import fingerprint
from skipdit.cache.gates import ProbeSchedule, RateSchedule
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.schedule import ExplicitSchedule, IntervalSchedule, Schedule
from skipdit.cache.site import AllButFirst, BranchOutputs, DeepFeatures, UnitProbe, UnitRange
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips, long_skip_class

PIXART = "PixArtTransformer2DModel"
WINDOW = {"num_inference_steps": 6, "timesteps": [900, 750, 600, 450, 300, 150]}


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(("schedule", "probe"), [
    (ProbeSchedule(threshold=0.1), None),
    (RateSchedule(threshold=0.1), UnitProbe()),
    (IntervalSchedule(interval=2), UnitProbe()),
])  # fmt: skip
def test_a_probe_and_its_schedule_go_together(schedule: Schedule, probe: UnitProbe | None) -> None:
    with pytest.raises(ValueError, match="a ProbeSchedule and a probe go together"):
        CacheMethod(schedule=schedule, site=AllButFirst(), probe=probe)


@pytest.mark.parametrize("site", [
    BranchOutputs(("mlp",)),
    UnitRange(None, at="last", delta=False),
    DeepFeatures(1, others=(2,)),
])  # fmt: skip
def test_the_reused_region_comes_after_the_probe(site: Any) -> None:
    model = tiny_dit()
    with pytest.raises(ValueError, match="must reuse one range of units after them"):
        enable_cache(model, CacheMethod(schedule=ProbeSchedule(threshold=0.5), site=site, probe=UnitProbe()))
    assert not isinstance(model, CachedModel)


@pytest.mark.parametrize(("variants", "message"), [
    ([None, -1, None, 0], "Expected `int` >= 0"),
    ([None, 0.0, None, 1], "Expected `int"),
    ([None, True, None, 1], "Expected `int"),
    ([None, 5, None, 1], "must be below 2, the number of its num_shallow_units, got 5"),
])  # fmt: skip
def test_variants_written_by_hand_are_checked(variants: list[Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    fields = {"full_steps": [0, 2], "num_inference_steps": 4, "num_shallow_units": [1, 2], "variants": variants}
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        enable_cache(tiny_dit(), path)


@pytest.mark.parametrize(("num_units", "speedup", "most"), [(28, 13, "11.1"), (6, 3, "2.9")])
def test_auto_refuses_what_one_full_step_cannot_reach(num_units: int, speedup: float, most: str) -> None:
    with pytest.raises(ValueError, match=f"at most {most} is possible"):
        enable_cache(tiny_dit(num_units), f"auto:{speedup}-k1")
    enable_cache(tiny_dit(num_units), f"auto:{float(most) - 0.1:.1f}-k1")
    enable_cache(tiny_dit(num_units), f"auto:{speedup}")  # reuses the output of the whole model


def test_what_counting_puts_out_of_reach_is_said_once() -> None:
    """On a bare model each step is decided anew."""
    model, (latents, labels) = tiny_dit(8), inputs()
    enable_cache(model, "auto:3.7-k1")
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        warnings.simplefilter("always")
        for timestep in (900, 800, 700, 600):
            model(latents, torch.tensor(timestep), labels)
    assert [str(each.message).partition(":")[0] for each in warned] == ["a speedup of 3.7 is out of reach"]


# ----------------------------------------------------------------------------------------------------------------------
# What is left behind


def test_whatever_goes_wrong_a_model_of_diffusers_is_what_it_was(tmp_path: Path) -> None:
    model = TINY_FAMILIES[PIXART].build(6)
    kind = type(model)
    made_for = {"model": PIXART, "num_units": 6, "weights": "0" * 16, "scheduler": "DDIMScheduler"}
    (tmp_path / "other.json").write_text(
        json.dumps({"method": "delta", "full_steps": [0, 2, 4], "made_for": made_for} | WINDOW)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="other weights"):
            enable_cache(model, tmp_path / "other.json")
    assert type(model) is kind


def test_a_cache_that_needs_units_follows_one_that_does_not() -> None:
    """The model was cached already, so its units stayed closed: "no units that skipdit knows of"."""
    model = TINY_FAMILIES[PIXART].build(6)
    kind, given = type(model), TINY_FAMILIES[PIXART].arguments()

    def reused(spec: str | None = None) -> tuple[torch.Tensor, int]:
        if spec is not None:
            enable_cache(model, spec)
        with torch.no_grad():
            model(**given, return_dict=False)
            return model(**given, return_dict=False)[0], cache_summary(model).steps_reused

    alone, _ = reused("delta:N2")
    disable_cache(model)
    first, _ = reused("output:N2")
    with pytest.raises(ValueError, match="no long skips"):
        enable_cache(model, "N2")
    again, count = reused()  # the one before is still on, with its count of steps
    assert (again.equal(first), count) == (True, 2)
    follower, count = reused("delta:N2")
    assert (follower.equal(alone), count) == (True, 1)
    assert reused("output:N2")[0].equal(first)
    disable_cache(model)
    assert type(model) is kind


def calibrated_for(model: nn.Module, path: Path) -> Path:
    made_for = {"model": "DiT", "num_units": 6, "weights": fingerprint(model), "scheduler": "DDIMScheduler"}
    path.write_text(json.dumps({"full_steps": [0, 2, 4], "made_for": made_for} | WINDOW))
    return path


def test_a_calibrated_schedule_on_offloaded_weights(tmp_path: Path) -> None:
    model = tiny_dit()
    path = calibrated_for(model, tmp_path / "schedule.json")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="is on the meta device: take the fingerprint before offloading"):
        fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_cache(model, path)
    latents, labels = inputs()
    with torch.no_grad():
        for timestep in WINDOW["timesteps"]:
            model(latents, torch.tensor(timestep), labels)
    assert counts(model) == (3, 3)


def test_a_calibrated_schedule_on_the_weights_in_another_dtype(tmp_path: Path) -> None:
    model = tiny_dit()
    path = calibrated_for(model, tmp_path / "schedule.json")
    with pytest.warns(UserWarning, match=r"other weights, or these before a cast to torch\.bfloat16"):
        enable_cache(nn.Module.to(model, torch.bfloat16), path)


def test_both_transformers_of_a_pipeline_are_cached() -> None:
    pytest.importorskip("transformers")
    family = TINY_FAMILIES["WanTransformer3DModel"]
    first, second = family.build(4), family.build(4)
    pipeline: Any = diffusers.WanPipeline(None, None, None, DDIMScheduler(), first, second, boundary_ratio=0.9)
    enable_cache(pipeline, "delta:N2")
    assert isinstance(first, CachedModel)
    assert isinstance(second, CachedModel)
    with torch.no_grad():
        for model, timesteps in ((first, (950, 925, 910)), (second, (800, 600, 400, 200))):
            for timestep in timesteps:
                model(**family.arguments(timestep))
    assert counts(pipeline) == (2 + 2, 1 + 2)
    assert cache_summary(pipeline).compute_ratio > 1
    disable_cache(pipeline)
    assert type(first) is type(second) is family.model_class
    one: Any = diffusers.WanPipeline(None, None, None, DDIMScheduler(), family.build(4))
    enable_cache(one, "delta:N2")
    with pytest.raises(ValueError, match="this WanPipeline has no transformer to cache, only scheduler"):
        enable_cache(diffusers.WanPipeline(None, None, None, DDIMScheduler()), "delta:N2")  # pyright: ignore


# ----------------------------------------------------------------------------------------------------------------------
# Copies and new models of a cached model's class


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name:FutureWarning")  # EMAModel does
@pytest.mark.parametrize("name", ["DiT", "Latte", PIXART])
def test_new_models_of_its_class_have_no_cache(name: str, tmp_path: Path) -> None:
    family = TINY_FAMILIES[name]
    model = family.build(4)
    if not family.ours:
        add_long_skips(model, LongSkipConfig())
        randomize(model)
    arguments = family.arguments()
    with torch.no_grad():
        expected = model(**arguments, return_dict=False)[0]
    enable_cache(model, "delta:N2")
    kind = type(model)
    model.save_pretrained(tmp_path / "saved")
    EMAModel(model.parameters(), model_cls=kind, model_config=model.config).save_pretrained(tmp_path / "ema")
    ema = EMAModel.from_pretrained(tmp_path / "ema", kind)
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow_params, model.parameters(), strict=True))
    for fresh in (kind.from_config(model.config), kind.from_pretrained(tmp_path / "saved")):
        assert not isinstance(fresh, CachedModel)
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(fresh.eval()(**arguments, return_dict=False)[0], expected)
        enable_cache(fresh, "delta:N2")
        disable_cache(fresh)


def test_the_class_of_a_converted_model_makes_converted_models() -> None:
    model = TINY_FAMILIES[PIXART].build(4)
    add_long_skips(model, LongSkipConfig(num_pairs=1))
    fresh = type(model).from_config(model.config)
    assert fresh.long_skip_links == model.long_skip_links
    assert fresh.config["long_skip"] == model.config["long_skip"]
    plain = long_skip_class(diffusers.PixArtTransformer2DModel).from_config(TINY_FAMILIES[PIXART].build(4).config)
    assert type(plain) is diffusers.PixArtTransformer2DModel


def test_a_copied_pipeline_watches_its_own_scheduler() -> None:
    pipeline = tiny_pipeline()
    enable_cache(pipeline, parse_method("N3-100-50"))
    twin = copy.deepcopy(pipeline)
    assert set(twin.transformer._skipdit_cache.streams.pipelines) == {twin}
    assert set(pipeline.transformer._skipdit_cache.streams.pipelines) == {pipeline}
    for each in (pipeline, twin):
        with pytest.raises(ValueError, match="would never reuse in 4 steps"):
            each([1, 2], num_inference_steps=4, output_type="latent")


def test_variants_are_of_the_site() -> None:
    schedule = ExplicitSchedule(full_steps=(0,), num_inference_steps=3, variants=(None, 0, 1))
    assert schedule.num_variants == 2
    enable_cache(tiny_dit(), CacheMethod(schedule=schedule, site=DeepFeatures(1, others=(2,))))


# ----------------------------------------------------------------------------------------------------------------------
# Copies and files


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch": saved,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_copies_cache_in_the_same_way_and_share_no_state(name: str, way: str) -> None:
    family = TINY_FAMILIES[name]
    model = family.build(4)
    if not (family.ours or family.native):
        add_long_skips(model, LongSkipConfig())

    @torch.no_grad()
    def run(each: Any, num_steps: int = 4) -> list[torch.Tensor]:
        return [each(**family.arguments(900 - 100 * i, seed=i), return_dict=False)[0] for i in range(num_steps)]

    for spec in (None, "delta:N2", "fbcache:100"):
        if spec is not None:
            enable_cache(model, spec)
        expected = run(model)
        if spec is not None:
            model._reset_stateful_cache()
        run(model, 1)
        twin = COPIES[way](model)
        assert type(twin) is type(model)
        if spec is not None:
            assert cache_summary(model).bytes_held > 0
            assert cache_summary(twin).bytes_held == 0
        assert all(torch.equal(a, b) for a, b in zip(run(twin), expected, strict=True))
        disable_cache(twin)
        if spec is not None:
            assert cache_summary(model).bytes_held > 0


def test_a_saved_model_is_loaded_by_another_process(tmp_path: Path) -> None:
    model = TINY_FAMILIES["PixArtTransformer2DModel"].build(4)
    add_long_skips(model, LongSkipConfig())
    enable_cache(model, "N2")
    torch.save(model, tmp_path / "model.pt")
    code = f"import torch; model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); " + (
        "print(type(model).__name__, model.is_cache_enabled, len(model.long_skip_links.sources))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["PixArtTransformer2DModel", "True", "2"], result.stderr


def test_a_cache_that_was_on_is_on_again_after_another() -> None:
    pipeline = tiny_pipeline()
    enable_cache(pipeline, "N2")
    with cached(pipeline, "N3"):
        pipeline([1], num_inference_steps=6)
    pipeline([1], num_inference_steps=6)
    assert (cache_summary(pipeline).steps_full, cache_summary(pipeline).steps_reused) == (3, 3)
    with cached(pipeline.transformer, "N3"):  # the pipeline is still watched: its timesteps are known
        pass
    pipeline([1], num_inference_steps=6)
    assert pipeline in cached_pipelines(pipeline.transformer)
    disable_cache(pipeline)
    with cached(pipeline, "N3"):
        pass
    assert not pipeline.transformer.is_cache_enabled


def cached_pipelines(model: nn.Module) -> list[Any]:
    runtime = runtime_of(model)
    assert runtime is not None
    return list(runtime.streams.pipelines)
