"""The table itself: every class runs, gives the same twice, and each of its blocks matters."""

import inspect

import diffusers
import pytest
import torch
from diffusers.models import transformers
from torch import Tensor, nn

from families import EXPECTED_WARNINGS, OUT_OF_SCOPE, TINY
from families.reference import UNCOUNTED, Reference, count_flops, counted_flops, largest_difference, unit_flops

pytestmark = [pytest.mark.filterwarnings(warning) for warning in EXPECTED_WARNINGS]


def run(name: str, model: nn.Module, step: int = 1) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return TINY[name].outputs(model(**TINY[name].inputs(step, 4)))


def differ(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_class_is_missing():
    exported = {
        name
        for name, value in vars(transformers).items()
        if inspect.isclass(value) and issubclass(value, diffusers.ModelMixin)
    }
    legacy = {"Transformer2DModel"}
    assert exported | legacy == TINY.keys() | OUT_OF_SCOPE.keys()
    assert not TINY.keys() & OUT_OF_SCOPE.keys()


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_transformer(name: str):
    tiny = TINY[name]
    model = tiny.build()
    units = tiny.units(model)
    assert len(units) >= 6
    assert len(set().union(*map(set, units))) == sum(map(len, units))

    outputs = run(name, model)
    assert all(output.isfinite().all() for output in outputs)
    assert not differ(outputs, run(name, model))
    assert not differ(outputs, run(name, tiny.build()))
    assert differ(outputs, run(name, model, step=2))
    with torch.no_grad():
        assert not differ(outputs, tiny.outputs(model(**tiny.inputs(1, 4), return_dict=False)))
    assert len(outputs) == len(set(map(id, outputs)))

    others = [block for path in tiny.others for block in model.get_submodule(path)]
    for block in [block for unit in units for block in unit] + others:
        weights = [parameter for parameter in block.parameters() if parameter.ndim > 1]
        with torch.no_grad():
            for weight in weights:
                weight.mul_(2)
            assert differ(outputs, run(name, model)), "a block does not matter"
            for weight in weights:
                weight.div_(2)


@pytest.mark.parametrize("name", TINY)
def test_conditioning_is_the_same_object_at_each_step(name: str):
    first, second = (TINY[name].inputs(step, 4) for step in (0, 1))
    assert first.keys() == second.keys()
    text = [key for key in first if key.startswith(("encoder_hidden_states", "input_ids", "cap_feats", "text_bth"))]
    assert all(first[key] is second[key] for key in text)
    other = TINY[name].inputs(0, 4, prompt=1)
    assert all(first[key] is not other[key] for key in text if first[key] is not None)


@pytest.mark.parametrize("name", TINY)
def test_the_reference(name: str):
    """Reusing at once what was just stored changes nothing; later it changes something, and costs what is left."""
    tiny = TINY[name]
    model = tiny.build()
    count = len(tiny.units(model))
    plain = run(name, model, step=0)
    later = run(name, model, step=1)
    for first, last, ats in (
        (0, count, ("leaving",)),
        (1, count - 1, ("leaving", "entering")),
        (2, count - 2, ("leaving",)),
    ):
        for at in ats:
            output = Reference(tiny, model, first, last, "output", at)
            assert not differ(plain, output.full(tiny.inputs(0, 4)))
            assert not differ(plain, output.reuse(tiny.inputs(0, 4)))
            delta = Reference(tiny, model, first, last, "delta", at)
            assert not differ(plain, delta.full(tiny.inputs(0, 4)))
            assert largest_difference(plain, delta.reuse(tiny.inputs(0, 4))) < 1e-4
        if (first, last) == (1, count - 1):
            assert differ(later, output.reuse(tiny.inputs(1, 4)))
            assert differ(later, delta.reuse(tiny.inputs(1, 4)))
            assert differ(output.reuse(tiny.inputs(1, 4)), delta.reuse(tiny.inputs(1, 4)))

    assert not differ(later, run(name, model, step=1))
    if name in UNCOUNTED:
        return
    flops = unit_flops(tiny, model, tiny.inputs(1, 4))
    assert len(flops) == count
    assert min(flops) > 0
    left = count_flops(model, lambda: output.reuse(tiny.inputs(1, 4)))
    assert left == counted_flops(model, tiny.inputs(1, 4)) - sum(flops[2:-2])
