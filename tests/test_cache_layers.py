"""A choice of branches for each step, against the reuse of each branch by plain hooks."""

import math
from typing import Any

import pytest
import torch
from test_cache_adaptive import distance
from tiny import inputs, tiny_dit, tiny_pipeline
from torch import Tensor

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.layers import measure_layers


def branch_errors(model: Any, latents: list[Tensor], labels: Tensor) -> list[dict[tuple[str, int], float]]:
    """Of the reuse of each branch alone at every second step, by plain hooks."""
    found: list[dict[tuple[str, int], float]] = []
    held: dict[tuple[str, int], Tensor] = {}
    modules = {(info.kind, info.unit): info.module for info in model.branches()}
    for step, each in enumerate(latents):
        timestep = torch.tensor(STEPS_OF_LAYERS[step])
        if step % 2 == 0:
            hooks = [
                module.register_forward_hook(lambda _, __, out, key=key: held.__setitem__(key, out))
                for key, module in modules.items()
            ]
            model(each, timestep, labels)
            found.append({})
        else:
            hooks = []
            exact, errors = model(each, timestep, labels).sample, {}
            for key, module in modules.items():
                hook = module.register_forward_hook(lambda *_, key=key: held[key])
                errors[key] = distance([model(each, timestep, labels).sample], [exact])
                hook.remove()
            found.append(errors)
        for hook in hooks:
            hook.remove()
    return found


STEPS_OF_LAYERS = (900, 800, 700, 600, 500, 400)


@torch.no_grad()
def test_layers_are_chosen_by_what_their_reuse_does() -> None:
    model: Any = tiny_dit(4)
    _, labels = inputs()
    start, way = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    latents = [start + 0.05 * step * way for step in range(len(STEPS_OF_LAYERS))]

    def sample() -> list[Tensor]:
        steps = zip(latents, STEPS_OF_LAYERS, strict=True)
        return [model(each, torch.tensor(timestep), labels).sample for each, timestep in steps]

    expected, plain = branch_errors(model, latents, labels), sample()
    errors = measure_layers(model, sample)
    assert [set(step) for step in errors.errors] == [set(step) for step in expected]
    assert len(errors.errors[1]) == 8
    for step, wanted in zip(errors.errors, expected, strict=True):
        assert step == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    numbers = sorted(error for step in errors.errors for error in step.values())
    threshold = numbers[len(numbers) // 2]
    method = errors.method(threshold)
    enable_cache(model, method)
    outputs = sample()
    summary = cache_summary(model)
    assert (summary.steps_full, summary.steps_reused) == (3, 3)
    assert 1 < summary.compute_ratio < 2
    for step in (0, 2, 4):
        assert torch.equal(outputs[step], plain[step])
    # a step reuses what was chosen for it, as hooks do, and leaves the others fresh
    modules = {(info.kind, info.unit): info.module for info in model.branches()}
    disable_cache(model)
    held: dict[Any, Tensor] = {}
    keep = [
        module.register_forward_hook(lambda _, __, out, key=key: held.__setitem__(key, out))
        for key, module in modules.items()
    ]
    model(latents[2], torch.tensor(STEPS_OF_LAYERS[2]), labels)
    for hook in keep:
        hook.remove()
    chosen = [key for key, error in errors.errors[3].items() if error < threshold]
    assert 0 < len(chosen) < len(modules)
    for key in chosen:
        modules[key].register_forward_hook(lambda *_, key=key: held[key])
    torch.testing.assert_close(
        model(latents[3], torch.tensor(STEPS_OF_LAYERS[3]), labels).sample, outputs[3], atol=1e-6, rtol=1e-5
    )


def test_a_choice_of_layers_that_cannot_be() -> None:
    pipeline = tiny_pipeline()
    errors = measure_layers(pipeline, lambda: pipeline([1], num_inference_steps=4, output_type="latent"), interval=3)
    assert [bool(step) for step in errors.errors] == [False, True, True, False]
    with pytest.raises(ValueError, match="no branch has an error below 0: the least is"):
        errors.method(0)
    enable_cache(pipeline, errors.method(math.inf))
    pipeline([1], num_inference_steps=4, output_type="latent")
    assert cache_summary(pipeline).steps_reused == 2
    small = tiny_pipeline(num_layers=2)
    with pytest.raises(ValueError, match="DiT has no attention in unit 2 to reuse"):
        enable_cache(small, errors.method(math.inf))
    with pytest.raises(ValueError, match="interval must be at least 2"):
        measure_layers(pipeline, lambda: None, interval=1)
    with pytest.raises(ValueError, match="sample did not call the model"):
        measure_layers(small, lambda: None)
