"""Adaptive caches and caches of branches on every row of the table of families."""

import pytest
import torch
from torch import Tensor, nn

from families import EXPECTED_WARNINGS, TINY
from families.reference import BranchReference, largest_difference
from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import IntervalSchedule
from skipdit.cache.site import AllUnits
from skipdit.models.families import FAMILIES

pytestmark = [pytest.mark.filterwarnings(warning) for warning in EXPECTED_WARNINGS]

NUM_STEPS = 4
NAMES = [name for name in TINY if name in FAMILIES]


def run(name: str, model: nn.Module, step: int) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(tensor.clone() for tensor in TINY[name].outputs(model(**TINY[name].inputs(step, NUM_STEPS))))


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_methods(name: str) -> None:
    """A threshold of 0 changes nothing and a high one reuses as soon as it can; branches are reused as a
    reference by plain hooks does it; nothing is left of any cache."""
    tiny = TINY[name]
    model, plain = tiny.build().requires_grad_(False), tiny.build().requires_grad_(False)
    classes = [type(module) for module in model.modules()]
    expected = [run(name, plain, step) for step in range(NUM_STEPS)]

    limits = {"fbcache": "", "teacache": "", "dicache": "", "seacache": "-r3-o0", "easycache": "-w0"}
    if name == "PriorTransformer":  # of embeddings: there is no space
        enable_cache(model, "seacache:0.1")
        with pytest.raises(ValueError, match="a filter over space needs latents with places"):
            run(name, model, 0)
        del limits["seacache"]
    for method, limit in limits.items():
        enable_cache(model, f"{method}:0{limit}")
        assert all(same(run(name, model, step), expected[step]) for step in range(NUM_STEPS))
        assert (cache_summary(model).steps_full, cache_summary(model).steps_reused) == (NUM_STEPS, 0)
        enable_cache(model, f"{method}:100000000{limit}")
        decisions = [same(run(name, model, step), expected[step]) for step in range(NUM_STEPS)]
        settles = 2 if method == "easycache" else 1  # two full steps tell how the output answers to the input
        assert decisions == [True] * settles + [False] * (NUM_STEPS - settles)
        assert (cache_summary(model).steps_full, cache_summary(model).steps_reused) == (settles, NUM_STEPS - settles)

    enable_cache(model, CacheMethod(schedule=IntervalSchedule(interval=2), site=AllUnits()))
    assert [same(run(name, model, step), expected[step]) for step in range(NUM_STEPS)] == [True, False, True, False]

    kinds = (segment.branches for segment in FAMILIES[name].segments)
    names = {name for kind in kinds for names in kind.values() for name in names}
    for method, order in (("fora", 0), ("taylorseer", 1)):
        enable_cache(model, f"{method}:N2")
        reference = BranchReference(tiny, plain, names, order)
        for step in range(NUM_STEPS):
            arguments, actual = tiny.inputs(step, NUM_STEPS), run(name, model, step)
            if step % 2 == 0:
                reference.full(arguments)
                assert same(actual, expected[step])
            else:
                assert not same(actual, expected[step])
                assert largest_difference(actual, reference.reuse(arguments)) < 1e-5
        assert (cache_summary(model).steps_full, cache_summary(model).steps_reused) == (2, 2)

    disable_cache(model)
    assert [type(module) for module in model.modules()] == classes
    assert same(run(name, model, 1), expected[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_timestep_is_on_the_scale_of_its_family(name: str) -> None:
    """From 1000 down, as noise falls; of GLM-Image one less."""
    family = FAMILIES[name]
    for step in range(NUM_STEPS):
        timestep = torch.as_tensor(TINY[name].inputs(step, NUM_STEPS)[family.timestep]).float()
        noisiest = float(timestep.min() if family.timestep_scale < 0 else timestep.max())
        level = noisiest * family.timestep_scale + (1000 if family.timestep_scale < 0 else 0)
        assert level == pytest.approx(1000 * (1 - step / NUM_STEPS), abs=1.01)
