"""MagCache, SeaCache, EasyCache and DiCache, against their rules as plain loops, and beside diffusers where it has
them; and the limits that every adaptive cache takes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given
from hypothesis import strategies as st
from test_cache_adaptive import Cached, cached, change_of, distance, run
from tiny import TINY_FAMILIES, inputs, tiny_dit, tiny_pipeline
from torch import Tensor, nn

from skipdit.cache import changes
from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.gates import AdaptiveSchedule, ProbeSchedule, RateSchedule
from skipdit.cache.magnitudes import Magnitudes, MagnitudeSchedule, measure_magnitudes
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.schedule import IntervalSchedule
from skipdit.cache.site import AllButFirst, LatentsProbe, UnitProbe, WholeOutput
from skipdit.cache.spectrum import wiener_filter
from skipdit.diffusion import Objective, make_scheduler
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig

WAN = TINY_FAMILIES["WanTransformer3DModel"]
NUM_STEPS = 16


# ----------------------------------------------------------------------------------------------------------------------
# Limits of every adaptive cache


def decided(schedule: AdaptiveSchedule, changes: list[float], *, known_end: bool = True) -> str:
    """What a gate decides in a run, whose first step has nothing to reuse."""
    gate, found = schedule.gate(), ""
    for step, change in enumerate(changes):
        opens = gate.opens(len(changes) - step if known_end else None)
        reuses = bool(found) and opens and gate.accepts(change)
        gate.advance(full=not reuses)
        found += "R" if reuses else "F"
    return found


def test_limits_of_adaptive_caches() -> None:
    still = [0.0] * 10
    assert decided(ProbeSchedule(threshold=1), still) == "FRRRRRRRRR"
    assert decided(ProbeSchedule(threshold=1, num_first=4), still) == "FFFFRRRRRR"
    assert decided(ProbeSchedule(threshold=1, max_reused=3), still) == "FRRRFRRRFR"
    assert decided(ProbeSchedule(threshold=1, num_last=2), still) == "FRRRRRRRFF"
    assert decided(ProbeSchedule(threshold=1, num_last=2), still, known_end=False) == "FRRRRRRRRR"
    assert decided(ProbeSchedule(threshold=1, num_first=2, max_reused=1, num_last=1), still) == "FFRFRFRFRF"
    # a step that is full by a limit begins the sum anew
    assert decided(ProbeSchedule(threshold=1, accumulate=True, max_reused=2), [0.4] * 8) == "FRRFRRFR"


LIMITS = st.fixed_dictionaries(
    {"num_first": st.integers(0, 4), "max_reused": st.none() | st.integers(1, 4), "num_last": st.integers(0, 4)}
)


@given(LIMITS, st.floats(0.1, 2), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_no_gate_oversteps_a_limit(limits: dict[str, Any], threshold: float, changes: list[float]) -> None:
    found = decided(ProbeSchedule(threshold=threshold, accumulate=True, **limits), changes)
    assert "R" not in found[: max(limits["num_first"], 1)]
    assert "R" not in found[max(len(found) - limits["num_last"], 0) :]
    if limits["max_reused"] is not None:
        assert "R" * (limits["max_reused"] + 1) not in found
    for step, decision in enumerate(found):
        since = found.rfind("F", 0, step) + 1
        total = math.fsum(changes[since : step + 1])
        if decision == "R":
            assert total < threshold + 1e-9
        elif limits == {"num_first": 0, "max_reused": None, "num_last": 0} and step:
            assert total >= threshold - 1e-9


def test_limits_of_a_spec() -> None:
    assert parse_method("fbcache:0.1-w4-r3").schedule == ProbeSchedule(threshold=0.1, num_first=4, max_reused=3)
    assert parse_method("adacache:.5-r2-e1").schedule == RateSchedule(threshold=0.5, max_reused=2, num_last=1)
    assert parse_method("adacache:.5").schedule == RateSchedule(threshold=0.5, max_reused=5)
    sea = parse_method("seacache:0.2-o0-r1-e0")
    assert sea.schedule == ProbeSchedule(threshold=0.2, accumulate=True, max_reused=1)
    assert (sea.predictor.order, parse_method("seacache:0.2").predictor.order) == (0, 1)
    assert parse_method("dicache:0.4-k3").site == AllButFirst(3)
    for spec in ("fbcache:0.1-w4-r3", "easycache:0.05", "dicache:0.4-k2-w3-e0"):
        assert str(parse_method(spec)) == spec
    by_hand = CacheMethod(
        schedule=ProbeSchedule(threshold=0.25, num_first=4, max_reused=3, num_last=1),
        site=AllButFirst(),
        probe=UnitProbe(),
    )
    assert str(by_hand).endswith(":0.25-w4-r3-e1")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fbcache:0.1-r0", "max_reused must be at least 1, else no step could reuse, got 0"),
        ("fbcache:0.1-w1-w2", "may be given once each, got 'fbcache:0.1-w1-w2'"),
        ("fbcache:0.1-o1", "a Taylor order needs one of skip-taylor:, .*seacache:"),
        ("seacache:0.1-o2", "the order of seacache must be at most 1, got 'seacache:0.1-o2'"),
        ("teacache:0.1-k2", "teacache has no shallow units"),
        ("dicache:0.1-w-3", "a cache spec is"),
        ("magcache:0.1", "a spec of magcache is magcache:json"),
        ("auto:N2", "a spec of auto is auto:{speedup}, got 'auto:N2'"),
        ("atuo:2", "got 'atuo'; did you mean 'auto'"),
        ("N2-w3", "a cache spec is"),
    ],
)
def test_bad_limits_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(spec)


def test_the_probe_lies_before_what_is_reused() -> None:
    model = tiny_dit(6)
    for spec in ("dicache:0.1-k6", "dicache:0.1-k0"):
        with pytest.raises(ValueError, match="must be "):
            enable_cache(model, spec)
    method = CacheMethod(schedule=ProbeSchedule(threshold=0.1), site=AllButFirst(1), probe=UnitProbe(num_units=2))
    with pytest.raises(ValueError, match="a probe must be taken before unit 1, the first that is left out"):
        enable_cache(model, method)
    with pytest.raises(ValueError, match="a trail and a probe of units go together"):
        CacheMethod(schedule=ProbeSchedule(threshold=0.1), site=AllButFirst(), probe=LatentsProbe(), trail=UnitProbe())
    whole = CacheMethod(schedule=IntervalSchedule(interval=2), site=WholeOutput())
    with pytest.raises(ValueError, match="leaves nothing to other rules"):
        enable_cache(model, CacheMethod(schedule=whole.schedule, site=AllButFirst(), others=(whole,)))
    disable_cache(model)


def test_in_a_pipeline_the_last_step_is_known() -> None:
    """Steps are full that the limits name, whatever the values say."""
    pipeline, ran = tiny_pipeline(), []
    pipeline.transformer.register_forward_hook(lambda *_: ran.append(len(ran)))
    for spec, full in (
        ("easycache:100-w3-e2", 5),
        ("easycache:100", 6),
        ("seacache:100-r2", 4),
        ("dicache:100", 2),
        ("fbcache:100-w2-r4-e1", 4),
    ):
        enable_cache(pipeline, spec)
        pipeline([1], num_inference_steps=9, output_type="latent")
        summary = cache_summary(pipeline)
        assert (summary.steps_full, summary.steps_reused) == (full, 9 - full), spec


def test_a_run_that_its_limits_make_full_warns() -> None:
    pipeline = tiny_pipeline()
    enable_cache(pipeline, "easycache:100-w3-e1")
    with pytest.warns(UserWarning, match="has not reused once in 4 steps: its 3 first and 1 last steps are full"):
        pipeline([1], num_inference_steps=4, output_type="latent")


# ----------------------------------------------------------------------------------------------------------------------
# EasyCache


class Unknown(nn.Module):
    """A model of no family: it has no blocks, and more channels come out than go in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.num_calls = 0

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        self.num_calls += 1
        sample = self.conv(hidden_states + timestep / 1000 + class_labels.view(-1, 1, 1, 1)).tanh()
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def easycache_by_hand(
    model: Callable[[Tensor, float], Tensor], threshold: float, num_first: int, steps: list[float], start: Tensor
) -> tuple[str, list[Tensor]]:
    """The published rule on one guidance branch, without its full last step."""
    found, outputs, total, rate = "", [], 0.0, math.nan
    full: tuple[Tensor, Tensor] | None = None
    x = last = start
    for step, timestep in enumerate(steps):
        reuses = False
        if step >= num_first and full is not None and not math.isnan(rate):
            total += float(rate * (x - last).abs().mean() / full[1].abs().mean())
            reuses = total < threshold
        if reuses and full is not None:
            y = full[1].clone()
            y[:, :4] = x + (full[1][:, :4] - full[0])
        else:
            total, y = 0.0, model(x, timestep)
            if full is not None:
                rate = float((y - full[1]).abs().mean() / (x - full[0]).abs().mean())
            full = x, y
        found, last = found + ("R" if reuses else "F"), x
        outputs.append(y)
        x = x + 0.6 / (step + 1) * y[:, :4].tanh()
    return found, outputs


@pytest.mark.parametrize("num_first", [0, 5])
@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5])
@torch.no_grad()
def test_easycache_on_a_model_that_nobody_knows(threshold: float, num_first: int) -> None:
    model, labels = Unknown().eval(), torch.tensor([1, 2])
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    steps = torch.linspace(950, 50, NUM_STEPS).tolist()
    expected = easycache_by_hand(
        lambda x, timestep: model(x, torch.tensor(timestep), labels).sample, threshold, num_first, steps, start
    )
    enable_cache(model, f"easycache:{threshold}-w{num_first}")
    for return_dict in (True, False):
        model.num_calls, x = 0, start
        for step, timestep in enumerate(steps):
            output = model(x, torch.tensor(timestep), labels, return_dict=return_dict)
            assert type(output) is (Transformer2DModelOutput if return_dict else tuple)
            torch.testing.assert_close(output[0], expected[1][step], atol=1e-6, rtol=1e-5)
            x = x + 0.6 / (step + 1) * output[0][:, :4].tanh()
        assert model.num_calls == expected[0].count("F")
        summary = cache_summary(model)
        assert (summary.steps_full, summary.steps_reused) == (model.num_calls, NUM_STEPS - model.num_calls)
        assert summary.compute_ratio == pytest.approx(NUM_STEPS / model.num_calls)
    assert set(expected[0]) == {"F", "R"}
    start_of_it = (
        f"easycache:{threshold}-w{num_first} on Unknown (reused: the output of the whole model minus its input): "
    )
    assert str(cache_summary(model)).startswith(start_of_it)
    disable_cache(model)
    assert type(model) is Unknown


@torch.no_grad()
def test_a_form_that_is_not_known_yet_is_a_full_step() -> None:
    model, labels = Unknown().eval(), torch.tensor([1, 2])
    enable_cache(model, "easycache:100-w0")
    for timestep, return_dict in ((900, True), (800, True), (700, False), (600, False), (500, True)):
        model(torch.randn(2, 4, 8, 8), torch.tensor(timestep), labels, return_dict=return_dict)
    assert model.num_calls == 3


@torch.no_grad()
def test_what_a_caller_does_to_an_output_is_not_reused() -> None:
    """Neither the output of a full step nor that of a reuse step shares memory with the store."""
    model, labels = Unknown().eval(), torch.tensor([1, 2])
    enable_cache(model, "easycache:100-w0")
    x = torch.randn(2, 4, 8, 8)
    outputs = []
    for timestep in (900, 800, 700, 600):
        sample = model(x.clone(), torch.tensor(timestep), labels).sample
        outputs.append(sample.clone())
        sample.zero_()
    assert torch.equal(outputs[3], outputs[2])
    assert torch.equal(outputs[2], outputs[1])


def test_a_cache_of_the_whole_model_needs_no_units_but_others_do() -> None:
    model: Any = Unknown().eval()
    with pytest.raises(ValueError, match="Unknown has no units that skipdit knows of"):
        enable_cache(model, "seacache:0.1")
    enable_cache(model, CacheMethod(schedule=IntervalSchedule(interval=2), site=WholeOutput()))
    with torch.no_grad(), model.cache_context("cond"):  # which this class has not
        for timestep in (900, 800, 700, 600):
            model(torch.randn(2, 4, 8, 8), torch.tensor(timestep), torch.tensor([1, 2]))
    assert model.num_calls == 2


def test_estimates_by_hand() -> None:
    def of(*numbers: float) -> dict[str, dict[str, Tensor]]:
        return {"region": {"0": torch.tensor(numbers)}}

    # the output went by 3 while the probe went by 1.5, and has a norm of 6: 2 / 6 for each 1 of the probe
    rate = changes.rate_of_change(of(3.0, -3.0), of(1.0, -2.0), of(2.0, 1.0), of(1.0, 0.5))
    assert float(rate) == pytest.approx(1 / 3)
    assert float(changes.change_at_rate(of(2.0, 1.6), of(2.0, 1.0), rate)) == pytest.approx(0.2)
    assert float(changes.change_at_rate(of(1.0), of(1.0), torch.tensor(math.nan))) == 0
    assert math.isnan(float(changes.change_at_rate({}, {}, rate)))
    # 1 at the last full step; a quarter of the way beyond it; no more than half
    last, before = of(2.0, 4.0), of(0.0, 0.0)
    assert float(changes.pace_of(last, last, before)) == 1
    assert float(changes.pace_of(of(2.5, 5.0), last, before)) == 1.25
    assert float(changes.pace_of(of(20.0, 50.0), last, before)) == 1.5
    assert float(changes.pace_of(of(1.0, 1.0), last, before)) == 1
    assert float(changes.pace_of(of(9.0, 9.0), last, last)) == 1
    assert change_of({"0": torch.tensor([1.0, 3.0])}, {"0": torch.tensor([1.0, 2.0])}) == pytest.approx(1 / 3)


# ----------------------------------------------------------------------------------------------------------------------
# DiCache


class DiCacheByHand:
    """One guidance branch on the units of a DiT. The published code reuses what all units add, this what those behind
    the probe add; the decisions are the same."""

    def __init__(self, model: DiT, threshold: float, depth: int) -> None:
        self.model, self.threshold, self.depth = model, threshold, depth
        self.decisions, self.total = "", 0.0
        self.seen: Tensor | None = None
        self.added: list[Tensor] = []  # at the last two full steps, by the probed units and by the others
        self.residuals: list[Tensor] = []
        self.paces: list[float] = []

    def step(self, latents: Tensor, timestep: float, labels: Tensor) -> Tensor:
        model, L = self.model, len(self.model.blocks)
        entering = model.patch_embed(latents) + model.position_embedding
        time = model.timestep_frequencies(torch.full((len(latents),), float(timestep)))
        conditioning = model.timestep_embedder(time) + model.class_embedder(labels)
        outputs, hidden = [], entering
        for block in model.blocks[: self.depth]:
            hidden = block(hidden, conditioning)
            outputs.append(hidden)
        probe, reuses = hidden, False
        if self.seen is not None:
            self.total += distance([probe], [self.seen])
            reuses = self.total < self.threshold
        self.seen = probe
        self.decisions += "R" if reuses else "F"
        if reuses and len(self.residuals) == 2:
            whole = (self.added[1] - self.added[0]).abs().mean()
            pace = float(((probe - entering - self.added[0]).abs().mean() / whole).clip(1, 1.5))
            self.paces.append(pace)
            hidden = probe + self.residuals[0] + pace * (self.residuals[1] - self.residuals[0])
        elif reuses:
            hidden = probe + self.residuals[0]
        else:
            self.total = 0.0
            for unit, block in enumerate(model.blocks[self.depth :], start=self.depth):
                skip = outputs[L - 1 - unit] if block.long_skip is not None else None
                hidden = block(hidden, conditioning, skip)
                outputs.append(hidden)
            self.added = [*self.added, probe - entering][-2:]
            self.residuals = [*self.residuals, hidden - probe][-2:]
        patches = model.final_layer(hidden, conditioning)
        b = len(latents)
        return patches.view(b, 4, 4, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, 8, 8)


@pytest.mark.parametrize("long_skip", [None, LongSkipConfig()])
@pytest.mark.parametrize(("threshold", "depth"), [(0.1, 1), (0.3, 1), (0.3, 2)])
def test_dicache_decides_and_extrapolates_by_its_probe(
    threshold: float, depth: int, long_skip: LongSkipConfig | None
) -> None:
    model = tiny_dit(6, long_skip)
    plain = DiCacheByHand(model, threshold, depth)
    expected = run(plain.step)
    twin = cached(f"dicache:{threshold}-k{depth}", long_skip, like=model)
    loop = Cached(twin)
    outputs = run(loop.step)
    assert loop.decisions == plain.decisions
    assert any(1 < pace < 1.5 for pace in plain.paces)
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)
    twin.compile(fullgraph=True, backend="eager")
    compiled = Cached(twin)
    again = run(compiled.step)
    assert compiled.decisions == plain.decisions
    assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Beside diffusers: MagCache, SeaCache


@torch.no_grad()
def wan_run(model: Any, num_steps: int = NUM_STEPS, *, position: bool = False) -> tuple[str, list[Tensor]]:
    """A loop on one sample: which steps ran the last block's attention, and the outputs. position: tell
    `cache_context` where in the loop it is, as diffusers' SeaCache needs it."""
    given, ran, found, outputs = WAN.arguments(batch=1), [], "", []
    hook = model.blocks[-1].ffn.register_forward_hook(lambda *_: ran.append(1))
    for step in range(num_steps):
        sigma, before = 1 - step / num_steps, len(ran)
        given["timestep"] = torch.full((1,), 1000 * sigma)
        place = {"step_index": step, "sigma": sigma, "num_inference_steps": num_steps} if position else {}
        with model.cache_context("cond", **place):
            outputs.append(model(**given, return_dict=False)[0])
        found += "F" if len(ran) > before else "R"
        given["hidden_states"] = given["hidden_states"] - outputs[-1] / num_steps
    hook.remove()
    return found, outputs


def wan_pair() -> tuple[Any, Any]:
    model = WAN.build(4)
    model.proj_out.weight.data.mul_(0.3)
    twin = WAN.build(4)
    twin.load_state_dict(model.state_dict())
    return model, twin


@pytest.mark.parametrize(
    ("threshold", "order", "most"), [(0.1, 0, 2), (0.1, 1, 2), (0.3, 0, 2), (0.3, 1, 2), (0.3, 1, 4), (0.05, 0, 2)]
)
def test_seacache_decides_as_that_of_diffusers(threshold: float, order: int, most: int) -> None:
    model, twin = wan_pair()
    config = diffusers.SeaCacheConfig(
        threshold=threshold, residual_order=order, max_consecutive_cached=most, cache_end_steps=0
    )
    twin.enable_cache(config)
    enable_cache(model, f"seacache:{threshold}-o{order}-r{most}-e0")
    (ours, outputs), (theirs, expected) = wan_run(model), wan_run(twin, position=True)
    assert set(theirs) == {"F", "R"}
    assert ours == theirs
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


def test_the_filter_keeps_what_is_signal() -> None:
    """Without noise all frequencies stay; under noise the mean stays and the highest frequency goes; the mean gain
    is 1."""
    latents = torch.randn(2, 3, 6, 8)
    assert torch.allclose(wiener_filter(latents, (2, 3), 0.0, 2.0), latents, atol=1e-4)
    flat = torch.ones(1, 1, 8, 8)
    checks = torch.ones(8, 8)
    checks[::2, 1::2] = checks[1::2, ::2] = -1
    gains = [
        float(wiener_filter(each.view(1, 1, 8, 8), (2, 3), 0.5, 2.0).norm() / each.norm()) for each in (flat, checks)
    ]
    assert gains[0] > 1 > gains[1]
    impulse = F.pad(torch.ones(1, 1, 1, 1), (0, 7, 0, 7))  # all frequencies alike
    assert float(wiener_filter(impulse, (2, 3), 0.7, 3.0)[0, 0, 0, 0]) == pytest.approx(1, rel=1e-4)


def test_the_share_of_noise_is_that_of_the_process() -> None:
    pipeline = tiny_pipeline()
    enable_cache(pipeline, "seacache:0")
    streams, shares = pipeline.transformer._skipdit_cache.streams, []
    pipeline.transformer.register_forward_pre_hook(lambda *_: shares.append(streams.noise_share(run_of(streams))))

    def run_of(streams: Any) -> Any:
        return list(streams.runs.values())[-1]

    pipeline([1], num_inference_steps=4, output_type="latent")
    alphas = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps]
    first = float((1 - alphas[0]).sqrt() / (alphas[0].sqrt() + (1 - alphas[0]).sqrt()))
    assert shares[0] == pytest.approx(first)
    # of a flow it is the timestep
    scheduler: Any = make_scheduler(Objective(process="flow", prediction_type="flow_prediction"), "dpm")
    pipeline.scheduler = scheduler
    shares.clear()
    pipeline([1], num_inference_steps=4, output_type="latent")
    assert shares[0] == pytest.approx(float(scheduler.timesteps[0]) / 1000)


def magnitudes(ratios: list[float]) -> Magnitudes:
    count = len(ratios)
    return Magnitudes(ratios=tuple(ratios), timesteps=tuple(1000 * (1 - step / count) for step in range(count)))


@pytest.mark.parametrize(
    ("threshold", "most", "retention"),
    [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.02, 3, 0.2), (0.1, 1, 0.0), (0.5, 4, 0.35)],
)
def test_magcache_decides_as_that_of_diffusers(threshold: float, most: int, retention: float) -> None:
    """On the curve that was measured on FLUX.1-dev, with the settings of diffusers and of the paper's code first."""
    model, twin = wan_pair()
    ratios = FLUX_MAG_RATIOS.tolist()
    config = diffusers.MagCacheConfig(
        threshold=threshold,
        max_skip_steps=most,
        retention_ratio=retention,
        num_inference_steps=len(ratios),
        mag_ratios=ratios,
    )
    twin.enable_cache(config)
    schedule = MagnitudeSchedule(
        magnitudes=magnitudes(ratios), threshold=threshold, max_reused=most, retention=retention
    )
    enable_cache(model, schedule.method())
    (ours, outputs), (theirs, expected) = wan_run(model, len(ratios)), wan_run(twin, len(ratios))
    assert set(theirs) == {"F", "R"}
    assert ours == theirs
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


def test_magnitudes_are_measured_as_by_diffusers(capsys: pytest.CaptureFixture[str]) -> None:
    model, twin = wan_pair()
    twin.enable_cache(diffusers.MagCacheConfig(calibrate=True, num_inference_steps=NUM_STEPS))
    wan_run(twin)
    theirs = json.loads(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0,")))
    found = measure_magnitudes(model, lambda: wan_run(model))
    assert found.ratios == pytest.approx(tuple(theirs), rel=1e-5)
    assert found.timesteps == pytest.approx([1000 * (1 - step / NUM_STEPS) for step in range(NUM_STEPS)])
    assert not model.is_cache_enabled


def test_magcache_by_hand() -> None:
    # errors of 0.1, 0.19, 0.271 add up: two steps fit into 0.3
    falling = MagnitudeSchedule(magnitudes=magnitudes([1.0] + [0.9] * 9), threshold=0.3, max_reused=9, retention=0)
    steps = falling.magnitudes.timesteps
    assert [step for step, decision in enumerate(falling.decisions(steps)) if decision is None] == [0, 3, 6, 9]
    # the end of the run need not be known, and half of the steps pass two ratios each
    assert all(falling.decisions(steps[:count]) == falling.decisions(steps)[:count] for count in range(1, 10))
    assert falling.decisions(steps[::2]) == [None, 0, None, 0, None]
    flat: dict[str, Any] = {"magnitudes": magnitudes([1.0] * 10)}
    assert MagnitudeSchedule(**flat).decisions(steps) == [None, None, 0, 0, 0, None, 0, 0, 0, None]
    never = MagnitudeSchedule(**flat, threshold=0)
    assert never.decisions(steps) == [None] * 10
    assert never.may_stay_full
    bad: tuple[tuple[dict[str, Any], str], ...] = (
        ({"threshold": -1}, "the threshold must be at least 0"),
        ({"max_reused": 0}, "max_reused must be at least 1"),
        ({"retention": 1}, "retention must be at least 0 and below 1"),
    )
    for fields, message in bad:
        with pytest.raises(ValueError, match=message):
            MagnitudeSchedule(**flat, **fields)
    with pytest.raises(ValueError, match="ratios must be one or more positive numbers"):
        Magnitudes(ratios=(1.0, math.nan), timesteps=(2.0, 1.0))
    with pytest.raises(ValueError, match="timesteps must be 2 falling numbers"):
        Magnitudes(ratios=(1.0, 1.0), timesteps=(1.0, 2.0))


def test_a_measured_schedule_works_in_a_pipeline_and_as_a_file(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()

    def sample() -> Tensor:
        return pipeline([1], num_inference_steps=12, output_type="latent", generator=torch.manual_seed(0)).images

    found = measure_magnitudes(pipeline, sample)
    assert len(found.ratios) == 12
    schedule = MagnitudeSchedule(magnitudes=found, threshold=1)
    enable_cache(pipeline, schedule.method())
    expected = sample()
    summary = cache_summary(pipeline)
    assert summary.steps_reused > 0
    assert summary.method == "magcache:1-r3"
    path = tmp_path / "magcache.json"
    path.write_text(json.dumps(schedule.to_fields()))
    enable_cache(pipeline, path)
    assert torch.equal(sample(), expected)
    pipeline.scheduler = make_scheduler(Objective(learned_variance=True), "ddim")
    with pytest.raises(ValueError, match="sample did not call the model"):
        measure_magnitudes(pipeline, lambda: None)
    latents, labels = inputs()
    with pytest.raises(ValueError, match="falling timesteps, got a run in which they rise"):
        schedule.check([100, 200])
    with torch.no_grad():
        assert pipeline.transformer(latents, torch.tensor(500), labels).sample.isfinite().all()
