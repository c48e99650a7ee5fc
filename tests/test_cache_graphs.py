"""Under torch.compile every method runs a few whole graphs, decided outside of them, and never compiles anew."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY_FAMILIES, equal
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.methods import METHODS
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips

NUM_STEPS = 8


def timesteps(num_steps: int = NUM_STEPS) -> list[float]:
    return torch.linspace(950, 75, num_steps).tolist()


def schedule(**fields: Any) -> dict[str, Any]:
    """As calibration writes them: mapped by their timesteps to runs of any number of steps."""
    return {"num_inference_steps": NUM_STEPS, "timesteps": timesteps()} | fields


@dataclass(frozen=True, kw_only=True)
class Row:
    """graphs: one for each kind of step. other: the same method with other steps full, which makes the same kinds of
    steps. like: the row whose graphs it runs, for they differ in what is outside of them."""

    spec: str | dict[str, Any]
    other: str | dict[str, Any]
    graphs: int
    model: str = "DiT"
    num_units: int = 3
    like: str | None = None


def by_kind(attention: list[int], mlp: list[int]) -> dict[str, Any]:
    parts = {"attention": attention, "mlp": mlp}
    return schedule(parts=[{"kinds": [kind], "full_steps": steps} for kind, steps in parts.items()])


TABLE: dict[str, Row] = {
    "skip": Row(spec="N2", other="N3-900-100", graphs=2),
    "skip-taylor": Row(spec="skip-taylor:N2-o2", other="skip-taylor:N3-o1", graphs=2, like="skip"),
    "skip-hermite": Row(spec="skip-hermite:N2-o2", other="skip-hermite:N3-o1", graphs=2, like="skip"),
    "skip-adams": Row(spec="skip-adams:N2-o2", other="skip-adams:N3-o1", graphs=2, like="skip"),
    # deep features and shallow attention: both full, both reused, and each alone
    "skip-branch": Row(spec="skip-branch:N3", other="skip-branch:N5", graphs=4),
    "delta": Row(spec="delta:N2", other="delta:N3", graphs=2),
    "delta-taylor": Row(spec="delta-taylor:N2", other="delta-taylor:N3-o2", graphs=2, like="delta"),
    # a reuse step calls no graph
    "output": Row(spec="output:N2", other="output:N3", graphs=1),
    "output-taylor": Row(spec="output-taylor:N2", other="output-taylor:N3-o2", graphs=1, like="output"),
    # full, the first units alone, the last units alone
    "delta-dit": Row(spec="delta-dit:N2", other="delta-dit:N3", graphs=3, num_units=5),
    "faster-diffusion": Row(spec="faster-diffusion:N2", other="faster-diffusion:N3", graphs=2),
    "fora": Row(spec="fora:N2", other="fora:N3", graphs=2),
    "taylorseer": Row(spec="taylorseer:N3-o2", other="taylorseer:N2", graphs=2, like="fora"),
    # attention and cross-attention: both full, both reused, attention alone full
    "pab": Row(spec="pab:N2", other="pab:N3", graphs=3, model="PixArtTransformer2DModel"),
    # above the gate attention alone is reused, below it cross-attention alone, on the way both
    "tgate": Row(spec="tgate:N2-900-400", other="tgate:N3-900-400", graphs=4, model="PixArtTransformer2DModel"),
    "smoothcache": Row(spec=by_kind([0, 3, 5], [0, 2, 5]), other=by_kind([0, 4, 6], [0, 2, 6]), graphs=4),
    # full; the first units; the first units again, behind which the rest runs where they have changed too much
    "magcache": Row(
        spec=schedule(method="magcache", full_steps=[0, 3, 5]),
        other=schedule(method="magcache", full_steps=[0, 2]),
        graphs=2,
    ),
    "fbcache": Row(spec="fbcache:0.5", other="fbcache:0.45", graphs=3),
    "teacache": Row(spec="teacache:0.2", other="teacache:0.15", graphs=3),
    # and the end alone, behind what the probe has told
    "dicache": Row(spec="dicache:0.05", other="dicache:0.04", graphs=4),
    "seacache": Row(spec="seacache:0.5", other="seacache:0.4-o0", graphs=2),
    "easycache": Row(spec="easycache:0.5-w0", other="easycache:0.4-w0", graphs=1),
    "adacache": Row(spec="adacache:0.5", other="adacache:0.4", graphs=2),
    "auto": Row(spec="auto:1.3", other="auto:1.2", graphs=1, like="output"),
    "auto-k": Row(spec="auto:1.3-k1", other="auto:1.2-k1", graphs=2, like="skip"),
    "json": Row(spec=schedule(full_steps=[0, 3, 5]), other=schedule(full_steps=[0, 4], order=1), graphs=2, like="skip"),
    # full, and one for each number of shallow units
    "mixed json": Row(
        spec=schedule(full_steps=[0, 3], num_shallow_units=[1, 2], variants=[None, 0, 1, None, 1, 1, 0, 0]),
        other=schedule(full_steps=[0, 4, 6], num_shallow_units=[1, 2], variants=[None, 1, 1, 0, None, 0, None, 1]),
        graphs=3,
        num_units=5,
    ),
}


def build(row: Row) -> Any:
    model = TINY_FAMILIES[row.model].build(row.num_units)
    if row.model == "DiT":
        add_long_skips(model, LongSkipConfig())
        for key, parameter in model.named_parameters():
            if "long_skip" in key:
                nn.init.normal_(parameter, std=0.1)
    return model


def enable(model: nn.Module, spec: str | dict[str, Any], folder: Path) -> None:
    if not isinstance(spec, str):
        path = folder / "schedule.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        spec = str(path)
    enable_cache(model, spec)


@torch.no_grad()
def run(model: nn.Module, row: Row, num_steps: int = NUM_STEPS, batch: int = 2) -> list[Tensor]:
    """A loop whose input depends on the last output."""
    arguments, outputs = TINY_FAMILIES[row.model].arguments(batch=batch), []
    for timestep in timesteps(num_steps):
        arguments["timestep"] = torch.full((batch,), timestep)
        outputs.append(model(**arguments, return_dict=False)[0])
        arguments["hidden_states"] = arguments["hidden_states"] + 0.1 * outputs[-1][:, :4].tanh()
    return outputs


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


# ----------------------------------------------------------------------------------------------------------------------
# Blocks that are compiled each for itself


FLUX = "FluxTransformer2DModel"


@torch.no_grad()
def run_flux(model: nn.Module) -> list[Tensor]:
    return [model(**TINY_FAMILIES[FLUX].arguments(each), return_dict=False)[0] for each in (900.0, 800.0, 700.0, 600.0)]


@pytest.mark.parametrize("spec", ["delta:N2", "fbcache:0.9", "N2", "fora:N2"])
def test_compiled_blocks_share_one_graph_per_class(spec: str) -> None:
    """22 units made as many graphs, of which torch allows 8; and the first step, under a counter, compiled none."""
    model = TINY_FAMILIES[FLUX].build(12, num_single_layers=10)
    if spec == "N2":
        add_long_skips(model, LongSkipConfig(fusion="residual"))
    enable_cache(model, spec)
    expected, ratio = run_flux(model), cache_summary(model).compute_ratio
    assert ratio > 1
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    enable_cache(model, spec)  # counts its costs again
    assert equal(run_flux(model), expected)
    assert cache_summary(model).compute_ratio == ratio
    # two classes of blocks, one of which sees two layouts of memory; what looks into branches runs without graphs
    assert counter.frame_count in ((0,) if spec == "fora:N2" else (2, 3))
    disable_cache(model)
    assert torch.equal(run_flux(model)[0], expected[0])
    assert counter.frame_count > 0


def test_blocks_that_are_compiled_already_are_refused() -> None:
    model = TINY_FAMILIES[FLUX].build(3)
    classes = [type(module) for module in model.modules()]
    model.compile_repeated_blocks(backend="eager")
    with pytest.raises(ValueError, match="call skipdit first, then compile them"):
        enable_cache(model, "delta:N2")
    assert [type(module) for module in model.modules()] == classes


# ----------------------------------------------------------------------------------------------------------------------
# Graphs


def test_the_table_is_complete() -> None:
    others = {"guidance"}  # which runs the graph of the plain model
    assert {*TABLE} | others == {*METHODS, "auto", "auto-k", "json", "mixed json"}


@pytest.mark.parametrize("first", [name for name, row in TABLE.items() if row.like is None])
def test_whole_graphs_one_for_each_kind_of_step_and_never_anew(first: str, tmp_path: Path) -> None:
    """Neither in a second run, nor for another number of steps, nor with another schedule; and a prediction is outside
    of the graph, so what extrapolates runs the same graphs as what holds."""
    rows = {name: row for name, row in TABLE.items() if first in (name, row.like)}
    model, counter = build(TABLE[first]), CompileCounter()
    expected = {}
    for name, row in rows.items():
        enable(model, row.spec, tmp_path)
        expected[name] = run(model, row)
        summary = cache_summary(model)
        assert summary.steps_full > 1
        assert summary.steps_reused > 0
    assert len({outputs[-1].sum().item() for outputs in expected.values()}) == len(rows)

    model.compile(fullgraph=True, backend=counter)
    for name, row in rows.items():
        enable(model, row.spec, tmp_path)
        for _ in range(2):
            assert equal(run(model, row), expected[name])
            assert counter.frame_count == row.graphs
        run(model, row, num_steps=13)
        enable(model, row.other, tmp_path)
        run(model, row)
        assert counter.frame_count == row.graphs
    assert sum(counters["graph_break"].values()) == 0


def test_batch_sizes_seen_before_do_not_compile_anew(tmp_path: Path) -> None:
    """The second size makes graphs for any size, as of a model without a cache. A limit of PyTorch that would do for
    that does not stop the cache. Without the cache there is one graph more."""
    row, counter = TABLE["fora"], CompileCounter()
    model = build(row)
    expected = run(model, row, num_steps=4)
    enable(model, row.spec, tmp_path)
    model.compile(fullgraph=True, backend=counter)
    seen = []
    with torch._dynamo.config.patch(cache_size_limit=2):
        for batch in (2, 3, 3, 2, 5):
            run(model, row, num_steps=4, batch=batch)
            seen.append(counter.frame_count)
        assert torch._dynamo.config.cache_size_limit == 2
    assert seen == [2, 4, 4, 4, 4]
    disable_cache(model)
    assert equal(run(model, row, num_steps=4), expected)
    assert counter.frame_count == 5


# ----------------------------------------------------------------------------------------------------------------------
# CUDA graphs


class Replayed:
    """Compiles to functions whose outputs lie in the same memory at every call, as those of a CUDA graph do: a call of
    any of them spoils what all calls before have put out."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., list[Any]]:
        static: list[Any] = []

        def replay(*inputs: Any) -> list[Any]:
            outputs = graph(*[each.clone() if isinstance(each, Tensor) else each for each in inputs])
            for buffer in self.buffers:
                buffer.fill_(torch.nan)
            if not static:
                static.extend(output.clone() if isinstance(output, Tensor) else output for output in outputs)
                self.buffers += [each for each in static if isinstance(each, Tensor)]
            for buffer, output in zip(static, outputs, strict=True):
                if isinstance(buffer, Tensor):
                    buffer.copy_(output)
            return list(static)

        return replay


def test_replayed_outputs_are_spoilt_by_the_next_call() -> None:
    """So the test below would see a tensor that was kept as it came out of the graph."""
    row = TABLE["skip"]
    model = build(row)
    expected = run(model, row)
    model.compile(fullgraph=True, backend=Replayed())
    outputs = run(model, row)
    assert torch.equal(outputs[-1], expected[-1])
    assert torch.equal(outputs[0], outputs[-1])


@pytest.mark.parametrize("name", ["skip-taylor", "fbcache", "adacache", "dicache", "easycache"])
def test_a_cache_keeps_nothing_that_the_next_replay_overwrites(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipdit.cache.compiled.may_replay", lambda device: True)  # as on a GPU
    row = TABLE[name]
    model = build(row)
    enable(model, row.spec, tmp_path)
    expected = run(model, row)
    model.compile(fullgraph=True, backend=Replayed())
    for _ in range(2):
        assert equal(run(model, row), expected)
