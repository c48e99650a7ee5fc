"""Guidance in wrapped models; parts of a run that begin late: a branch, or the second of two transformers; memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from families import EXPECTED_WARNINGS
from test_cache_streams import STEPS, check_full_steps
from test_families_variants import sample, wan
from tiny import TINY_FAMILIES, counts, inputs, tiny_dit, tiny_pipeline
from torch import Tensor, nn

from skipdit.cache import conditions
from skipdit.cache.enable import cache_summary, cached, enable_cache, runtime_of

pytestmark = [pytest.mark.filterwarnings(warning) for warning in EXPECTED_WARNINGS]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


class Wrapped(nn.Module):
    """A model whose forward names no more than the cache needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Tensor, timestep: Tensor, **given: Any) -> Any:
        text = given.pop("text", None)
        match text:
            case tuple():
                given["encoder_hidden_states"], given["pooled_projections"] = text
            case dict():
                given |= text
        return self.model(hidden_states=hidden_states, timestep=timestep, **given)


def in_peft(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"])).eval()


FORMS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "kwargs": dict,
    "peft": dict,
    "tuple": lambda text: {"text": (text["encoder_hidden_states"], text["pooled_projections"])},
    "dict": lambda text: {"text": text},
}


@pytest.mark.parametrize("form", FORMS)
def test_guidance_is_seen_in_a_wrapped_model(form: str) -> None:
    """Text in arguments that the forward does not name, or in a tuple or a dict: both calls were one stream."""
    family = TINY_FAMILIES["FluxTransformer2DModel"]
    plain_model = family.build(6)
    model: Any = in_peft(plain_model) if form == "peft" else Wrapped(plain_model).eval()
    names = "encoder_hidden_states", "pooled_projections"
    texts = [{name: sign * family.arguments()[name] for name in names} for sign in (1, -1)]

    def guided() -> list[tuple[Tensor, ...]]:
        pairs = []
        for step, timestep in enumerate(STEPS):
            arguments = {key: value for key, value in family.arguments(timestep, seed=step).items() if key not in names}
            pairs.append(tuple(model(**arguments, **FORMS[form](text), return_dict=False)[0] for text in texts))
        return pairs

    plain = guided()
    enable_cache(model, "output:N2")
    check_full_steps(guided(), plain)
    assert counts(model) == (4, 4)


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a run


@pytest.mark.parametrize(
    ("spec", "decisions"), [("explicit", "FFr"), ("delta:N2-900-250", "FFF")], ids=["explicit", "window"]
)
def test_a_branch_that_begins_late_ends_no_run(spec: str, decisions: str, tmp_path: Path) -> None:
    """Its rest of the run was taken for a run, for which the schedule was not made, or in which none would reuse."""
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"method": "delta", "full_steps": [0, 4, 8], "num_inference_steps": 10}))
    pipeline, (latents, labels) = tiny_pipeline(), inputs()
    model, seen = pipeline.transformer, ""
    enable_cache(pipeline, str(path) if spec == "explicit" else spec)
    pipeline.scheduler.set_timesteps(10)
    for step, timestep in enumerate(pipeline.scheduler.timesteps):
        for name in ("cond", "uncond") if step >= 7 else ("cond",):
            before = counts(model)
            with model.cache_context(name):
                model(latents, timestep, labels)
            if name == "uncond":
                seen += "F" if counts(model)[0] > before[0] else "r"
        pipeline.scheduler.step(latents, timestep, latents)
    assert seen == decisions  # the first in full, others by their places in the run


def wan22(num_steps: int, shift: float, boundary: float) -> tuple[Any, dict[str, Any]]:
    pipeline, options = wan(diffusers.WanPipeline, two=True, num_inference_steps=num_steps)
    config = pipeline.scheduler.config
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(config, flow_shift=shift)
    pipeline.register_to_config(boundary_ratio=boundary)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, options


def counts_of_two(pipeline: Any) -> list[tuple[int, int]]:
    caches = [runtime_of(model) for model in (pipeline.transformer, pipeline.transformer_2)]
    return [(each.steps_full, each.steps_reused) for each in (cache.summary() for cache in caches if cache)]


@pytest.mark.parametrize(("shift", "least"), [(3.0, 2.0), (5.0, 1.9)])
def test_auto_reaches_its_speedup_over_both_transformers(shift: float, least: float) -> None:
    """Each planned for itself, the first one over the steps of the second too: 1.54x and 1.48x."""
    pipeline, options = wan22(40, shift, 0.875)
    enable_cache(pipeline, "auto:2")
    sample(pipeline, options)
    assert cache_summary(pipeline).compute_ratio >= least


def test_a_schedule_written_by_hand_serves_both_transformers(tmp_path: Path) -> None:
    """The second begins at the fifth of eight steps, in full, and goes on by the places in the whole run."""
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"method": "delta", "full_steps": [0, 3, 6], "num_inference_steps": 8}))
    pipeline, options = wan22(8, 1.0, 0.6)
    enable_cache(pipeline, str(path))
    sample(pipeline, options)
    assert counts_of_two(pipeline) == [(4, 4), (4, 4)]


def test_a_window_before_the_second_transformer_is_a_warning_at_its_end() -> None:
    pipeline, options = wan22(8, 3.0, 0.875)
    enable_cache(pipeline, "delta:N2-1000-900")
    with pytest.warns(UserWarning, match="all full by schedule"):
        sample(pipeline, options)
    assert counts_of_two(pipeline) == [(4, 2), (10, 0)]


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def test_a_cache_that_is_off_holds_nothing() -> None:
    """Of a bare model, whose run nobody ends."""
    model, (latents, labels) = tiny_dit(), inputs()
    with cached(model, "N2") as cache:
        for timestep in STEPS:
            model(latents, torch.tensor(timestep), labels)
        held = cache.summary()
    after = cache.summary()
    assert held.bytes_held > 0
    assert (after.bytes_held, after.peak_bytes_held) == (0, held.peak_bytes_held)
    assert (after.steps_full, after.steps_reused) == (2, 2)


def test_a_checksum_in_parts_sees_every_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    whole = conditions.checksum(tensor)
    monkeypatch.setattr(conditions, "CHUNK", 8)
    torch.testing.assert_close(conditions.checksum(tensor), whole)
    sums = {conditions.checksum(tensor).item()}
    for place in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[place] += 1
        sums.add(conditions.checksum(other).item())
    assert len(sums) == 1 + tensor.numel()
    assert conditions.checksum(torch.zeros(0)) == 0
