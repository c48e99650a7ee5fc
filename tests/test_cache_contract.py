"""What every cache method promises on every transformer whose units skipdit knows: one table, one contract."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY_FAMILIES, equal, tiny_dit, tiny_pipeline
from torch import Tensor, nn

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.methods import METHODS, CacheMethod
from skipdit.cache.schedule import IntervalSchedule
from skipdit.cache.site import UnitRange
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips

TIMESTEPS = (950, 825, 700, 575, 450, 325, 200, 75)
SUMMARY = ("steps_full", "steps_reused")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method and what it does in the run of `TIMESTEPS`.

    full: the steps in which nothing is reused; of pab by what else there is to attend to, `None` where what the model
    shows decides. control: the same method where it never reuses; `None` where it has no such spec. absolute: values
    are reused as they were, so a reuse step with the same inputs is bit-equal. settles: the full steps before.
    """

    spec: str | dict[str, Any]
    control: str | dict[str, Any] | None
    full: tuple[int, ...] | dict[frozenset[str], tuple[int, ...]] | None
    absolute: bool = True
    settles: int = 1
    needs: str | None = None


def branches(**full_steps: list[int]) -> dict[str, Any]:
    """A schedule as SmoothCache has it."""
    parts = [{"kinds": [kind], "full_steps": steps} for kind, steps in full_steps.items()]
    return {"num_inference_steps": len(TIMESTEPS), "timesteps": list(TIMESTEPS), "parts": parts}


def all_units(*full_steps: int) -> dict[str, Any]:
    """A schedule as MagCache has it."""
    timed = {"num_inference_steps": len(TIMESTEPS), "timesteps": list(TIMESTEPS)}
    return timed | {"method": "magcache", "full_steps": list(full_steps)}


ALL = list(range(len(TIMESTEPS)))
TABLE: dict[str, Row] = {
    "skip": Row(spec="N2", control="N1", full=(0, 2, 4, 6), needs="long skips"),
    "skip-taylor": Row(spec="skip-taylor:N3", control="skip-taylor:N1", full=(0, 3, 6), needs="long skips"),
    "skip-hermite": Row(spec="skip-hermite:N3", control="skip-hermite:N1", full=(0, 3, 6), needs="long skips"),
    "skip-adams": Row(spec="skip-adams:N3", control="skip-adams:N1", full=(0, 3, 6), needs="long skips"),
    # the deep features every fourth step, attention in the shallow units every second, whatever the interval
    "skip-branch": Row(spec="skip-branch:N4", control=None, full=(0, 4), needs="long skips"),
    "delta": Row(spec="delta:N2", control="delta:N1", full=(0, 2, 4, 6), absolute=False),
    "delta-taylor": Row(
        spec="delta-taylor:N3-800-50-o2", control="delta-taylor:N1-o2", full=(0, 1, 3, 6), absolute=False
    ),
    "output": Row(spec="output:N2", control="output:N1", full=(0, 2, 4, 6)),
    "output-taylor": Row(spec="output-taylor:N3-o2", control="output-taylor:N1-o2", full=(0, 3, 6)),
    # at 450 the first units take over from the last ones, with what they added at 575
    "delta-dit": Row(spec="delta-dit:N3", control="delta-dit:N1", full=(0, 3, 6), absolute=False),
    "faster-diffusion": Row(spec="faster-diffusion:N2", control="faster-diffusion:N1", full=(0, 2, 4, 6)),
    "fora": Row(spec="fora:N2-900-0", control="fora:N1", full=(0, 2, 4, 6)),
    "taylorseer": Row(spec="taylorseer:N3-o2", control="taylorseer:N1-o2", full=(0, 3, 6)),
    # every second, fourth and sixth step
    "pab": Row(
        spec="pab:N2",
        control=None,
        full={
            frozenset(): (0, 2, 4, 6),
            frozenset({"temporal_attention"}): (0, 4),
            frozenset({"cross_attention"}): (0, 6),
            frozenset({"temporal_attention", "cross_attention"}): (0,),
        },
    ),
    "tgate": Row(spec="tgate:N2-900-400", control=None, full=(0, 2, 4), needs="cross_attention"),
    "smoothcache": Row(
        spec=branches(attention=[0, 3, 5], mlp=[0, 2, 5, 7]), control=branches(attention=ALL, mlp=ALL), full=(0, 5)
    ),
    "magcache": Row(spec=all_units(0, 3, 5), control=all_units(*range(len(TIMESTEPS))), full=(0, 3, 5), absolute=False),
    "fbcache": Row(spec="fbcache:0.5", control="fbcache:0", full=None, absolute=False),
    "teacache": Row(spec="teacache:0.2", control="teacache:0", full=None, absolute=False),
    "dicache": Row(spec="dicache:0.5", control="dicache:0", full=None, absolute=False),
    "seacache": Row(spec="seacache:0.5", control="seacache:0", full=None, absolute=False),
    # two full steps tell how the output answers to the input
    "easycache": Row(spec="easycache:0.5-w0", control="easycache:0-w0", full=None, settles=2),
    "adacache": Row(spec="adacache:0.5", control="adacache:0", full=None, settles=2),
    "auto": Row(spec="auto:2", control="auto:1", full=None, absolute=False),
    "auto-k": Row(spec="auto:1.3-k1", control="auto:1-k1", full=None, absolute=False),
}
VARIANTS = [
    (name, long_skips)
    for name, family in TINY_FAMILIES.items()
    for long_skips in ((False,) if family.native else (False, True))
]


# ----------------------------------------------------------------------------------------------------------------------
# Models and runs


@lru_cache
def build(name: str, long_skips: bool) -> Any:
    """Shared by the tests, which must leave it as it was: that is one of the things they test."""
    family = TINY_FAMILIES[name]
    model = family.build(4 if family.native else 3)  # that of diffusers takes no odd depth
    if long_skips:
        add_long_skips(model, LongSkipConfig())
        for key, parameter in model.named_parameters():
            if "long_skip" in key:
                nn.init.normal_(parameter, std=0.1)
    return model


def kinds_of(name: str) -> frozenset[str]:
    kinds = {"DiT": (), "DiTTransformer2DModel": (), "SD3Transformer2DModel": (), "FluxTransformer2DModel": ()}
    temporal, cross = "temporal_attention", "cross_attention"
    kinds |= {"Latte": (temporal,), "LatteTransformer3DModel": (temporal, cross)}
    return frozenset(kinds.get(name, (cross,)))


@torch.no_grad()
def call(model: nn.Module, name: str, latents: Tensor, timestep: float, unconditional: bool = False) -> Tensor:
    family = TINY_FAMILIES[name]
    arguments = family.arguments(timestep, batch=1) | {"hidden_states": latents}
    if unconditional:
        changed = next(iter(family.conditioning), "class_labels")
        arguments[changed] = arguments[changed] * 0 + 3
    return model(**arguments, return_dict=False)[0]


def following(latents: Tensor, out: Tensor) -> Tensor:
    """Latents that depend on the output; a learned variance lies behind in the channels."""
    for dim, size in enumerate(latents.shape):
        out = out.narrow(dim, 0, size)
    return latents + 0.1 * out.tanh()


@dataclass
class Loop:
    inputs: list[Tensor]
    outputs: list[Tensor]
    full: list[int]


def run(model: nn.Module, name: str, num_steps: int = len(TIMESTEPS)) -> Loop:
    """A loop whose input depends on the last output, and which of its steps were full."""
    latents = TINY_FAMILIES[name].arguments(batch=1)["hidden_states"]
    loop, counts = Loop([], [], []), (0, 0)
    for step, timestep in enumerate(TIMESTEPS[:num_steps]):
        loop.inputs.append(latents)
        loop.outputs.append(call(model, name, latents, timestep))
        latents = following(latents, loop.outputs[-1])
        if getattr(model, "is_cache_enabled", False):
            before, counts = counts, tuple(getattr(cache_summary(model), each) for each in SUMMARY)
            assert sum(counts) == step + 1
            loop.full += [step] * (counts[0] > before[0])
    return loop


@pytest.fixture(autouse=True)
def all_off() -> Iterator[None]:
    """A test that fails must not let others fail."""
    yield
    for variant in VARIANTS:
        disable_cache(build(*variant))


@lru_cache
def uncached(name: str, long_skips: bool) -> Loop:
    return run(build(name, long_skips), name)


def tensors_in(held: Any) -> Iterator[Tensor]:
    """Every tensor that can be reached from the states of a cache; found without its help."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for each in held.values():
            yield from tensors_in(each)
    elif isinstance(held, (list, tuple, set)):
        for each in held:
            yield from tensors_in(each)
    elif dataclasses.is_dataclass(held):
        yield from tensors_in(vars(held))


def bytes_reachable(model: Any) -> int:
    """Of the memory behind the tensors, each counted once, so that a view of something larger would be seen. (The
    conditioning is the caller's.)"""
    runs = model._skipdit_cache.streams.runs.values()
    states = [stream.states for run in runs for stream in run.streams]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_in(states)}
    return sum(storages.values())


def spec_of(spec: str | dict[str, Any], folder: Path) -> str:
    if isinstance(spec, str):
        return spec
    path = folder / "schedule.json"
    path.write_text(json.dumps(spec))
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# The contract


def test_the_table_is_complete() -> None:
    assert {*TABLE, "guidance"} == {*METHODS, "auto", "auto-k"}  # which has a contract of its own, at the end


@pytest.mark.parametrize(
    ("name", "long_skips"), VARIANTS, ids=[name + "-long_skips" * long_skips for name, long_skips in VARIANTS]
)
@pytest.mark.parametrize("method", TABLE)
def test_the_contract(method: str, name: str, long_skips: bool, tmp_path: Path) -> None:
    row, family, model = TABLE[method], TINY_FAMILIES[name], build(name, long_skips)
    spec = spec_of(row.spec, tmp_path)
    available = kinds_of(name) | ({"long skips"} if long_skips or family.native else set())
    what_it_was = type(model), list(model.state_dict()), set(vars(model))
    if row.needs is not None and row.needs not in available:
        with pytest.raises(ValueError, match=f"no {row.needs}"):
            enable_cache(model, spec)
        assert (type(model), list(model.state_dict()), set(vars(model))) == what_it_was
        return
    expected = uncached(name, long_skips)

    enable_cache(model, spec)
    loop = run(model, name)
    assert 0 < len(loop.full) < len(TIMESTEPS)
    if isinstance(row.full, tuple):
        assert tuple(loop.full) == row.full
    elif row.full is not None:
        assert tuple(loop.full) == row.full[kinds_of(name)]
    runtime = model._skipdit_cache
    if len(runtime.rules) == 1 and not runtime.method.schedule.is_adaptive:
        (costs,) = runtime.costs.values()
        # a bare model does not know the timesteps to come
        decisions = runtime.stepper.schedule_of(0, costs).decisions(TIMESTEPS, whole=False)
        assert loop.full == [step for step, decision in enumerate(decisions) if decision is None]
    summary = cache_summary(model)
    assert summary.compute_ratio > 1
    assert summary.bytes_held == bytes_reachable(model) > 0

    # two guidance branches in turn are two runs
    model._reset_stateful_cache()
    assert (cache_summary(model).bytes_held, bytes_reachable(model)) == (0, 0)
    steps = list(zip(loop.inputs, TIMESTEPS, strict=True))[:4]
    alone = [call(model, name, latents, timestep, unconditional=True) for latents, timestep in steps]
    model._reset_stateful_cache()
    for step, (latents, timestep) in enumerate(steps):
        assert torch.equal(call(model, name, latents, timestep, unconditional=True), alone[step])
        assert torch.equal(call(model, name, latents, timestep), loop.outputs[step])
    assert not torch.equal(alone[-1], loop.outputs[3])
    assert cache_summary(model).bytes_held == bytes_reachable(model)

    # the very same tensors again are the next step
    model._reset_stateful_cache()
    arguments = family.arguments(600, batch=1)
    with torch.no_grad():
        outputs = [model(**arguments, return_dict=False)[0] for _ in range(row.settles + 1)]
    assert tuple(getattr(cache_summary(model), each) for each in SUMMARY) == (row.settles, 1)
    if row.absolute:
        assert torch.equal(outputs[-1], outputs[0])
    else:
        torch.testing.assert_close(outputs[-1], outputs[0], atol=1e-5, rtol=1e-5)

    if row.control is not None:
        enable_cache(model, spec_of(row.control, tmp_path))
        control = run(model, name, 4)
        assert control.full == [0, 1, 2, 3]
        assert equal(control.outputs, expected.outputs[:4])

    disable_cache(model)
    assert (type(model), list(model.state_dict()), set(vars(model))) == what_it_was
    assert torch.equal(call(model, name, expected.inputs[0], TIMESTEPS[0]), expected.outputs[0])
    for step in loop.full[1:]:
        assert torch.equal(call(model, name, loop.inputs[step], TIMESTEPS[step]), loop.outputs[step])


# ----------------------------------------------------------------------------------------------------------------------
# What the table cannot say


@pytest.mark.parametrize("method", ["fbcache", "teacache", "adacache"])
def test_a_threshold_that_never_reuses_warns_at_the_last_step(method: str) -> None:
    """The picture is kept: whether a step reuses depends on it. A run of one step needs nothing."""
    pipeline = tiny_pipeline()
    plain = pipeline([1], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent")
    enable_cache(pipeline, f"{method}:.0000001")
    with pytest.warns(UserWarning, match=f"{method}:.0000001 has not reused once in 4 steps: raise its threshold"):
        kept = pipeline([1], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent")
    torch.testing.assert_close(kept.images, plain.images)
    for spec in (f"{method}:.0000001", "N2", "fora:N3"):
        enable_cache(pipeline, spec)
        pipeline([1], num_inference_steps=1, output_type="latent")
    enable_cache(pipeline, f"{method}:0")
    assert pipeline([1], num_inference_steps=4, output_type="latent").images.isfinite().all()


def test_what_cannot_be_reused_together_takes_turns() -> None:
    """Where two ranges of units overlap the later choice leaves out its units, the earlier one runs what is left."""
    model = tiny_dit(6)
    every_second = IntervalSchedule(interval=2)
    first = CacheMethod(schedule=every_second, site=UnitRange(1, at="first"))
    last = CacheMethod(schedule=every_second, site=UnitRange(1, at="last"))
    ran: list[int] = []
    for unit, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, unit=unit: ran.append(unit))
    enable_cache(model, dataclasses.replace(first, others=(last,)))
    for timestep in (900, 800):
        call(model, "DiT", torch.randn(1, 4, 8, 8), timestep)
    assert ran == [0, 1, 2, 3, 4, 5, 4, 5]


@pytest.mark.parametrize(
    ("name", "long_skips"), VARIANTS, ids=[name + "-long_skips" * long_skips for name, long_skips in VARIANTS]
)
def test_the_contract_of_one_guidance_branch_beside_another(name: str, long_skips: bool) -> None:
    """The branch that is called first always runs. The other is full at every second step, and in between as far from
    the first as it was then."""
    model = build(name, long_skips)
    latents = [TINY_FAMILIES[name].arguments(batch=1, seed=seed)["hidden_states"] for seed in range(4)]
    steps = list(zip(latents, TIMESTEPS[:4], strict=True))
    first = [call(model, name, *step) for step in steps]
    second = [call(model, name, *step, unconditional=True) for step in steps]
    before = type(model), set(vars(model))
    # of each step the one whose difference it has
    for spec, froms in (
        ("guidance:N1", (0, 1, 2, 3)),
        ("guidance:N2", (0, 0, 2, 2)),
        ("guidance:N4-800-0", (0, 1, 1, 1)),
    ):
        full = len(set(froms))
        enable_cache(model, spec)
        for number, (step, since) in enumerate(zip(steps, froms, strict=True)):
            assert torch.equal(call(model, name, *step), first[number])
            output = call(model, name, *step, unconditional=True)
            if since < number:
                expected = first[number] + (second[since] - first[since])
                torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
                assert not torch.equal(output, second[number])
            else:
                assert torch.equal(output, second[number])
        summary = cache_summary(model)
        assert (summary.steps_full, summary.steps_reused) == (4 + full, 4 - full)
        assert summary.compute_ratio == pytest.approx(8 / (4 + full))
        model._reset_stateful_cache()
        assert cache_summary(model).bytes_held == 0
        disable_cache(model)
        assert (type(model), set(vars(model))) == before


def test_guidance_may_begin_in_the_middle_of_a_run() -> None:
    """A step whose only call was not the second of two raised."""
    model = build("DiT", long_skips=True)
    latents = [TINY_FAMILIES["DiT"].arguments(batch=1, seed=seed)["hidden_states"] for seed in range(5)]
    steps = list(zip(latents, TIMESTEPS[:5], strict=True))
    first = [call(model, "DiT", *step) for step in steps]
    second = [call(model, "DiT", *step, unconditional=True) for step in steps]
    enable_cache(model, "guidance:N2")
    for _ in range(2):
        for number, step in enumerate(steps):
            assert torch.equal(call(model, "DiT", *step), first[number])
            if number >= 2:
                since = 2 if number == 3 else number
                expected = first[number] + (second[since] - first[since])
                torch.testing.assert_close(
                    call(model, "DiT", *step, unconditional=True), expected, atol=1e-5, rtol=1e-5
                )
        summary = cache_summary(model)
        assert (summary.steps_full, summary.steps_reused) == (7, 1)
        model._reset_stateful_cache()


def test_a_run_without_guidance_warns_at_its_end() -> None:
    model = build("DiT", long_skips=True)
    latents = TINY_FAMILIES["DiT"].arguments(batch=1, seed=0)["hidden_states"]
    expected = [call(model, "DiT", latents, timestep) for timestep in TIMESTEPS]
    enable_cache(model, "guidance:N2")
    assert all(map(torch.equal, [call(model, "DiT", latents, timestep) for timestep in TIMESTEPS], expected))
    with pytest.warns(
        UserWarning, match="not reused once in .* once per step: guidance is off, or both branches share"
    ):
        model._reset_stateful_cache()
