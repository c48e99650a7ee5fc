"""Guidance under a cache where its branches are hard to see: in wrapped models, and in branches that begin late."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cache_streams import STEPS, check_full_steps
from tiny import TINY_FAMILIES, counts
from torch import Tensor, nn

from skipdit.cache.enable import enable_cache


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
