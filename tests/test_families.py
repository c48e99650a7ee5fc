"""Every row of the table of families, cached beside a reference by plain hooks, with its FLOPs counted."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import EXPECTED_WARNINGS, TINY
from families.reference import UNCOUNTED, Reference, largest_difference
from families.table import tensors
from torch import Tensor, nn

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.models.check import check_family
from skipdit.models.costs import flop_counter
from skipdit.models.families import FAMILIES, Family, Segment
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips, remove_long_skips

pytestmark = [pytest.mark.filterwarnings(warning) for warning in EXPECTED_WARNINGS]

NUM_STEPS = 4
NAMES = [name for name in TINY if name in FAMILIES]


def run(name: str, model: nn.Module, step: int) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(tensor.clone() for tensor in TINY[name].outputs(model(**TINY[name].inputs(step, NUM_STEPS))))


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def test_every_class_has_a_row_or_a_reason() -> None:
    from families import OUT_OF_SCOPE as NOT_BUILT

    assert len(NAMES) >= 66
    # its blocks run several times per forward, and half of its work is outside them
    assert {*TINY, *NOT_BUILT} - set(NAMES) == {*NOT_BUILT, "RFD4ProteinaTransformer"}


@pytest.mark.parametrize("name", NAMES)
def test_a_cached_family(name: str) -> None:
    """First and full steps are bit-equal, reuse steps those of the reference, and nothing is left of the cache."""
    tiny = TINY[name]
    model, plain = tiny.build().requires_grad_(False), tiny.build().requires_grad_(False)
    classes, attributes = [type(module) for module in model.modules()], [set(vars(each)) for each in model.modules()]
    expected = [run(name, plain, step) for step in range(NUM_STEPS)]
    num_units = len(tiny.units(plain))
    reference = Reference(tiny, plain, 1, num_units - 1, "delta", at="entering")

    enable_cache(model, "delta:N2")
    counter = flop_counter()
    counted = name not in UNCOUNTED
    totals = []
    for step in range(NUM_STEPS):
        arguments = tiny.inputs(step, NUM_STEPS)
        if counted:
            with counter:
                actual = run(name, model, step)
            totals.append(counter.get_total_flops())
            counter = flop_counter()
        else:
            actual = run(name, model, step)
        if step % 2 == 0:
            assert same(actual, expected[step])
            reference.full(arguments)
        else:
            assert not same(actual, expected[step])
            assert largest_difference(actual, reference.reuse(arguments)) < 1e-4
    summary = cache_summary(model)
    assert (summary.steps_full, summary.steps_reused, summary.num_units) == (2, 2, num_units)
    if counted:
        assert summary.compute_ratio == pytest.approx(4 * totals[0] / sum(totals), rel=0.02)

    disable_cache(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert same(run(name, model, 1), expected[1])


# HunyuanDiT fuses skips by itself; the config of the other has an entry long_skip of another meaning
REFUSED = {"HunyuanDiT2DModel": "long skips of its own", "LongCatAudioDiTTransformer": "'long_skip' of its own"}


@pytest.mark.parametrize("name", REFUSED)
def test_families_without_long_skips_of_ours_say_why(name: str) -> None:
    model = TINY[name].build()
    with pytest.raises(ValueError, match=REFUSED[name]):
        add_long_skips(model)
    assert type(model) is TINY[name].model_class


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_long_skips_of_a_family(name: str) -> None:
    model = TINY[name].build()
    expected = [run(name, model, step) for step in range(2)]
    add_long_skips(model, LongSkipConfig(fusion="residual"))
    assert same([run(name, model, step) for step in range(2)], expected)
    for block in model.unit_entries():
        if block.long_skip is not None:
            nn.init.normal_(block.long_skip.proj.weight, std=0.1)
    linked = run(name, model, 0)
    assert not same(linked, expected[0])
    enable_cache(model, "N2")
    assert same(run(name, model, 0), linked)
    run(name, model, 1)
    assert cache_summary(model).steps_reused == 1
    disable_cache(model)
    for block in model.unit_entries():
        if block.long_skip is not None:
            nn.init.zeros_(block.long_skip.proj.weight)
    remove_long_skips(model)
    assert same([run(name, model, step) for step in range(2)], expected)


def test_a_family_that_fits_is_checked() -> None:
    for name in (
        "FluxTransformer2DModel",
        "Flux2Transformer2DModel",
        "CogView4Transformer2DModel",
        "ZImageTransformer2DModel",
    ):
        model = TINY[name].build()
        classes = [type(module) for module in model.modules()]
        found = check_family(model, TINY[name].inputs(1, NUM_STEPS))
        assert found.num_units == len(TINY[name].units(model))
        assert {"attention", "mlp"} <= set(found.branches)
        assert not found.writes_in_place
        assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(("family", "message"), [
    (Family(segments=(Segment(lists=("blocks",)),), timestep_scale=1000.0), "lacks the block lists of its family"),
    (Family(segments=(Segment(streams=("hidden_states", "text")),), timestep_scale=1000.0),
     "streams must be arguments"),
    (Family(segments=(Segment(streams=("hidden_states", "encoder_hidden_states")),), timestep_scale=1000.0),
     "streams, their order or joins do not fit"),
    (Family(segments=(Segment(streams=("encoder_hidden_states", "hidden_states")),)), "the scale is wrong"),
    (Family(timestep="t"), "the family's timestep is 't', but the inputs of"),
    (replace(FAMILIES["QwenImageTransformer2DModel"], latents="x"), "the family's latents is 'x'"),
])  # fmt: skip
def test_a_family_that_does_not_fit_is_told_in_one_line(
    family: Family, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "QwenImageTransformer2DModel"
    model = TINY[name].build()
    expected = run(name, model, 1)
    monkeypatch.setitem(FAMILIES, name, family)
    with pytest.raises(ValueError, match=message) as caught:
        check_family(model, TINY[name].inputs(1, NUM_STEPS))
    assert "\n" not in str(caught.value)
    assert type(model) is TINY[name].model_class
    assert same(run(name, model, 1), expected)


def test_names_of_arguments_are_those_of_the_class() -> None:
    for name in NAMES:
        family = FAMILIES[name]
        arguments = inspect.signature(TINY[name].model_class.forward).parameters
        for argument in (family.latents, family.timestep, *family.changing):
            assert argument in arguments, (name, argument)
