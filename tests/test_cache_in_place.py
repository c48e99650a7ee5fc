"""Blocks that write their input in place, or a buffer of theirs, spoil nothing that is stored or handed on."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from tiny import TINY_FAMILIES
from torch import Tensor, nn

from skipdit.cache.enable import disable_cache, enable_cache
from skipdit.models.families import FAMILIES, Family, Segment, declare_family
from skipdit.models.forward_plan import Writes
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips

WAYS = ("nowhere", "input", "buffer", "branch")
SPECS = (None, "N3", "skip-taylor:N3", "delta:N3", "faster-diffusion:N3", "fora:N3", "fbcache:0.3", "teacache:0.5")
LISTED = [name for name in TINY_FAMILIES if name in FAMILIES]


class Block(nn.Module):
    """One and the same function, written in several ways."""

    def __init__(self, dim: int, way: str) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.way, self.buffer = way, torch.empty(2, 5, dim)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        update = self.ff(self.attn(self.norm(hidden_states) + temb))
        if self.way == "branch":
            update += hidden_states
            return update
        if self.way == "input":
            hidden_states += update
            return hidden_states
        if self.way == "buffer":
            return torch.add(hidden_states, update, out=self.buffer)
        return hidden_states + update


class InPlaceTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, way: str, dim: int = 16, num_layers: int = 8) -> None:
        super().__init__()
        self.emb, self.out = nn.Linear(1, dim), nn.Linear(dim, dim)
        self.layers = nn.ModuleList(Block(dim, way) for _ in range(num_layers))

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        temb = self.emb(timestep.float().reshape(1, 1) / 100)
        hidden_states = hidden_states * 1.0
        for layer in self.layers:
            hidden_states = layer(hidden_states, temb)
        return (self.out(hidden_states),)


@pytest.fixture(autouse=True)
def _declared() -> Iterator[None]:
    family = Family(
        segments=(Segment(lists=("layers",), branches={"attention": ("attn",), "mlp": ("ff",)}),), hidden_size=("dim",)
    )
    declare_family(InPlaceTransformer, family)
    yield
    del FAMILIES["InPlaceTransformer"]


def build(way: str, long_skips: bool) -> Any:
    torch.manual_seed(0)
    model = InPlaceTransformer(way).eval()
    if long_skips:
        add_long_skips(model, LongSkipConfig())
    return model


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    latents, outputs = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)), []
    for timestep in torch.linspace(900, 100, 9):
        outputs.append(model(latents, timestep, return_dict=False)[0].clone())
        latents = latents - 0.1 * outputs[-1]
    return torch.stack(outputs)


@pytest.mark.parametrize("long_skips", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_the_way_a_block_is_written_changes_nothing(spec: str | None, long_skips: bool) -> None:
    if not long_skips and spec in (None, "N3", "skip-taylor:N3"):
        pytest.skip("needs long skips")
    outputs = []
    for way in WAYS:
        model = build(way, long_skips)
        if spec is not None:
            enable_cache(model, spec)
        outputs += [run(model), run(model)]
    for each in outputs[1:]:
        torch.testing.assert_close(each, outputs[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_compiled_or_in_inference_mode_where_writes_cannot_be_seen(way: str) -> None:
    expected = build("nowhere", True)
    enable_cache(expected, "N3")
    with torch.inference_mode():
        model = build(way, True)
        enable_cache(model, "N3")
        torch.testing.assert_close(run(model), run(expected), atol=1e-5, rtol=0)
    torch._dynamo.reset()
    model = build(way, True)
    enable_cache(model, "N3")
    model.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model), run(expected), atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_values_that_are_never_written_are_stored_without_a_copy() -> None:
    """From the third full step on."""
    model = build("nowhere", True)
    enable_cache(model, "N2-k2")
    outputs: list[Tensor] = []
    model.layers[5].register_forward_hook(lambda *given: outputs.append(given[2]))
    run(model)
    assert set(model.open_call.writes.known.values()) == {False}
    ((run_,), held) = model._skipdit_cache.streams.runs.values(), outputs[-1]
    assert held.data_ptr() in {tensor.data_ptr() for tensor in run_.streams[0].states[0].tensors}


def test_a_declaration_may_say_it() -> None:
    for says in (True, False):
        declare_family(InPlaceTransformer, replace(FAMILIES["InPlaceTransformer"], writes_in_place=says))
        model, expected = build("input" if says else "nowhere", True), build("nowhere", True)
        for each in (model, expected):
            enable_cache(each, "N3")
        torch.testing.assert_close(run(model), run(expected), atol=1e-5, rtol=0)
        writes = model.open_call.writes
        assert (writes is None) if not says else (writes.known == {} and not writes.previous)


@pytest.mark.parametrize("name", LISTED)
def test_blocks_of_the_listed_classes_write_nowhere(name: str) -> None:
    family = TINY_FAMILIES[name]
    assert FAMILIES[name].writes_in_place is False
    model = family.build(4)
    if not family.native:
        add_long_skips(model, LongSkipConfig())
    for spec in ("N2", "fora:N2", "delta:N2", "teacache:0.1"):
        enable_cache(model, spec)
        writes = model.open_call.writes = Writes()
        with torch.no_grad():
            for step in range(5):
                model(**family.arguments(900 - 100 * step), return_dict=False)
        assert set(writes.known.values()) == {False}
        disable_cache(model)
