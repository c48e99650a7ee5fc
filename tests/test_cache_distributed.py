"""A cache in several processes: two gloo ranks, each with data of its own, give what one process gives for that data.

Run as a script, with a rank, a folder and the name of a wrapper, this file is one of the ranks.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from tiny import TINY_FAMILIES, TinyFamily, randomize, tiny_dit
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

STEPS = list(range(950, -1, -75))
PIXART = "PixArtTransformer2DModel"
STATIC = {
    "DiT": ("N2", "skip-taylor:N3-900-50-o1", "delta:N2", "fora:N3", "skip-branch:N4"),
    PIXART: ("N2", "fora:N3"),
}
# with which two ranks, each by itself, take other steps in full
ADAPTIVE = {
    "DiT": ("fbcache:0.6", "teacache:0.6", "adacache:0.6"),
    PIXART: ("fbcache:0.1", "teacache:0.4", "adacache:0.2"),
}

WAN = "WanTransformer3DModel"
SPLIT = ("N2", "skip-taylor:N3-900-50-o1", "delta:N2", "fora:N3", "easycache:0.3")
SPLIT_ADAPTIVE = ("fbcache:0.03", "teacache:0.3", "seacache:0.3")


def build(name: str) -> Any:
    if name == "DiT":
        torch.manual_seed(0)
        return tiny_dit(5)
    model = TINY_FAMILIES[name].build(5)
    add_long_skips(model, LongSkipConfig())
    return randomize(model)


@dataclass
class Loop:
    """What one rank saw. full: the steps that were."""

    outputs: list[Tensor] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def run(call: nn.Module, cached: nn.Module, family: TinyFamily, rank: int) -> Loop:
    """A loop over data of this rank's own, which moves the more the higher the rank."""
    arguments = family.arguments(batch=1 + rank, seed=rank)
    latents = arguments.pop("hidden_states")
    loop, num_full = Loop(), 0
    for number, timestep in enumerate(STEPS):
        arguments["timestep"] = torch.full((1 + rank,), float(timestep))
        out = call(latents, **arguments, return_dict=False)[0]
        latents = latents + (0.2 + rank) / (number + 1) * out[:, : latents.shape[1]].tanh()
        loop.outputs.append(out)
        loop.summary = asdict(cache_summary(cached))
        loop.full += [number] * (loop.summary["steps_full"] > num_full)
        num_full = loop.summary["steps_full"]
    return loop


def alone(name: str, spec: str | CacheMethod, rank: int) -> Loop:
    model = build(name)
    enable_cache(model, spec)
    return run(model, model, TINY_FAMILIES[name], rank)


# ----------------------------------------------------------------------------------------------------------------------
# A rank


def shard(model: Any) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for blocks in model.units():
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())


def ranks_ddp(rank: int) -> Iterator[tuple[str, Any]]:
    """DistributedDataParallel sends its buffers in each forward, so the ranks must call it equally often."""
    model = build("DiT")
    wrapped = DistributedDataParallel(model)
    for spec in (*STATIC["DiT"], *ADAPTIVE["DiT"]):
        enable_cache(wrapped, spec)
        yield f"DiT {spec}", run(wrapped, wrapped, TINY_FAMILIES["DiT"], rank)
        assert cache_summary(wrapped) == cache_summary(model)
    disable_cache(wrapped)
    assert not model.is_cache_enabled


def ranks_fsdp(rank: int) -> Iterator[tuple[str, Any]]:
    """A cache before `fully_shard`, which puts its class on top, and after it."""
    for name in ("DiT", PIXART):
        family = TINY_FAMILIES[name]
        for early in (True, False):
            model = build(name)
            when = "early" if early else "late"
            if early:
                enable_cache(model, "N1")
            shard(model)
            for spec in (*STATIC[name], *ADAPTIVE[name]):
                enable_cache(model, spec)
                yield f"{name} {spec} {when}", run(model, model, family, rank)
            disable_cache(model)
            assert not model.is_cache_enabled
            disable_cache(model)
            with torch.no_grad():
                yield f"{name} plain {when}", model(**family.arguments(), return_dict=False)[0]


def ranks_fsdp_opened(rank: int) -> Iterator[tuple[str, Any]]:
    """Units that were opened for the cache alone stay open below the classes of `fully_shard`."""
    family = TINY_FAMILIES[PIXART]
    model = family.build(5)
    enable_cache(model, "delta:N2")
    shard(model)
    loop = run(model, model, family, rank)
    yield "loop", loop
    disable_cache(model)
    with torch.no_grad():
        yield "plain", model(**family.arguments(), return_dict=False)[0]
    enable_cache(model, "delta:N2")
    again = run(model, model, family, rank)
    assert all(torch.equal(a, b) for a, b in zip(loop.outputs, again.outputs, strict=True))


def ranks_context_parallel(rank: int) -> Iterator[tuple[str, Any]]:
    """Both ranks make the same run, each with half of the tokens; the cache is on before diffusers' hooks are."""
    torch.accelerator.device_count = lambda: 1  # a CPU, whose number diffusers asks for
    family, model = TINY_FAMILIES[WAN], build(WAN)
    enable_cache(model, "N1")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
    for spec in (*SPLIT, *SPLIT_ADAPTIVE):
        enable_cache(model, spec)
        yield spec, run(model, model, family, 0)
    arguments = {**family.arguments(), "return_dict": False}
    exchanged = []
    for spec in ("N1", "N2"):
        enable_cache(model, spec)
        for timestep in (900.0, 800.0):
            arguments["timestep"] = torch.full_like(arguments["timestep"], timestep)
            with torch.no_grad(), CommDebugMode() as watched:
                model(**arguments)
            exchanged.append(watched.get_total_counts())
    disable_cache(model)
    with torch.no_grad(), CommDebugMode() as watched:
        output = model(**arguments)[0]
    yield "exchanged", [watched.get_total_counts(), *exchanged]
    yield "plain", output


def shard_layers(name: str, model: Any) -> None:
    """Split the products of each unit over both ranks. Queries, keys and values of our models are one product, which is
    gathered; those of diffusers stay apart, half of the heads on each rank."""
    halves = {"DiT": ("mlp.fc1", "mlp.fc2"), PIXART: ("ff.net.0.proj", "ff.net.2")}
    plan: dict[str, Any] = dict(zip(halves[name], (ColwiseParallel(), RowwiseParallel()), strict=True))
    if name == "DiT":
        plan |= {"attn.qkv": ColwiseParallel(output_layouts=Replicate())}
        plan |= {"attn.proj": RowwiseParallel(input_layouts=Replicate())}
    else:
        for attention in ("attn1", "attn2"):
            plan |= {f"{attention}.to_{each}": ColwiseParallel() for each in "qkv"}
            plan |= {f"{attention}.to_out.0": RowwiseParallel()}
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for block in model.blocks if name == "DiT" else model.transformer_blocks:
        parallelize_module(block, mesh, plan)
        if name == PIXART:
            block.attn1.heads //= 2
            block.attn2.heads //= 2


def ranks_tensor_parallel(rank: int) -> Iterator[tuple[str, Any]]:
    """Both ranks make the same run, each with half of the products of each unit."""
    for name in ("DiT", PIXART):
        family, model = TINY_FAMILIES[name], build(name)
        shard_layers(name, model)
        for spec in (*STATIC[name], *ADAPTIVE[name]):
            enable_cache(model, spec)
            yield f"{name} {spec}", run(model, model, family, 0)
        exchanged = []
        for spec in ("none", "N1", "N2"):
            disable_cache(model) if spec == "none" else enable_cache(model, spec)
            exchanged.append(exchanges(model, family))
        yield f"{name} exchanged", exchanged


@torch.no_grad()
def exchanges(model: Any, family: TinyFamily) -> list[int]:
    """Count the exchanges between ranks in each of two steps."""
    arguments, counts = {**family.arguments(), "return_dict": False}, []
    for timestep in (900.0, 800.0):
        arguments["timestep"] = torch.full_like(arguments["timestep"], timestep)
        with CommDebugMode() as watched:
            model(**arguments)
        counts.append(watched.get_total_counts())
    return counts


RANKS = {
    "ddp": ranks_ddp,
    "fsdp": ranks_fsdp,
    "fsdp_opened": ranks_fsdp_opened,
    "context_parallel": ranks_context_parallel,
    "tensor_parallel": ranks_tensor_parallel,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    rank, folder = arguments.rank, arguments.folder
    torch.set_num_threads(1)
    # ranks that do not step alike wait for each other
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {}
    for kind, ranks in RANKS.items():
        for name, result in ranks(rank):
            results[f"{kind} {name}"] = asdict(result) if isinstance(result, Loop) else result
        dist.barrier()
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# The tests


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has seen."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parent,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], texts
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("spec", SPLIT)
def test_under_context_parallelism_a_cache_gives_what_one_process_gives(spec: str, ranks: list[dict[str, Any]]) -> None:
    expected = alone(WAN, spec, 0)
    assert 0 < len(expected.full) < len(STEPS)
    for rank in range(2):
        loop = ranks[rank][f"context_parallel {spec}"]
        assert loop["full"] == expected.full
        assert loop["summary"]["peak_bytes_held"] <= expected.summary["peak_bytes_held"]
        for out, wanted in zip(loop["outputs"], expected.outputs, strict=True):
            torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPLIT_ADAPTIVE)
def test_under_context_parallelism_ranks_decide_alike(spec: str, ranks: list[dict[str, Any]]) -> None:
    loops = [ranks[rank][f"context_parallel {spec}"] for rank in range(2)]
    full = loops[0]["full"]
    assert loops[1]["full"] == full
    assert 1 < len(full) < len(STEPS)
    method = parse_method(spec)
    listed = ExplicitSchedule(full_steps=tuple(full), num_inference_steps=len(STEPS))
    expected = alone(WAN, CacheMethod(schedule=listed, site=method.site, predictor=method.predictor), 0)
    for loop in loops:
        for out, wanted in zip(loop["outputs"], expected.outputs, strict=True):
            torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_a_cache_exchanges_no_more_than_its_model(ranks: list[dict[str, Any]]) -> None:
    for rank in range(2):
        without, *_, full, reuse = ranks[rank]["context_parallel exchanged"]
        assert reuse < full == without
        with torch.no_grad():
            arguments = TINY_FAMILIES[WAN].arguments()
            arguments["timestep"] = torch.full_like(arguments["timestep"], 800.0)
            plain = build(WAN)(**arguments, return_dict=False)[0]
        torch.testing.assert_close(ranks[rank]["context_parallel plain"], plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "spec"), [(name, spec) for name, specs in STATIC.items() for spec in specs])
def test_under_tensor_parallelism_a_cache_gives_what_one_process_gives(
    name: str, spec: str, ranks: list[dict[str, Any]]
) -> None:
    expected = alone(name, spec, 0)
    assert 0 < len(expected.full) < len(STEPS)
    for rank in range(2):
        loop = ranks[rank][f"tensor_parallel {name} {spec}"]
        assert loop["full"] == expected.full
        assert loop["summary"]["peak_bytes_held"] == expected.summary["peak_bytes_held"]
        for out, wanted in zip(loop["outputs"], expected.outputs, strict=True):
            torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "spec"), [(name, spec) for name, specs in ADAPTIVE.items() for spec in specs])
def test_under_tensor_parallelism_ranks_decide_alike(name: str, spec: str, ranks: list[dict[str, Any]]) -> None:
    expected = alone(name, spec, 0)
    for rank in range(2):
        assert ranks[rank][f"tensor_parallel {name} {spec}"]["full"] == expected.full


@pytest.mark.parametrize("name", STATIC)
def test_under_tensor_parallelism_a_reuse_step_exchanges_what_its_units_do(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in range(2):
        without, never, every_second = ranks[rank][f"tensor_parallel {name} exchanged"]
        assert without == never
        full, reuse = every_second
        assert full == without[0]
        assert reuse == full * 2 / 5  # the first and the last of 5 units


def check_alike(loop: dict[str, Any], expected: Loop) -> None:
    assert loop["full"] == expected.full
    ignored = {"model", "method"}
    counts = {name: value for name, value in loop["summary"].items() if name not in ignored}
    assert counts == {name: value for name, value in expected.summary.items() if name not in ignored}
    for out, wanted in zip(loop["outputs"], expected.outputs, strict=True):
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", [*STATIC["DiT"], *ADAPTIVE["DiT"]])
def test_under_ddp_each_rank_steps_as_it_would_alone(spec: str, ranks: list[dict[str, Any]]) -> None:
    for rank in range(2):
        expected = alone("DiT", spec, rank)
        assert 0 < len(expected.full) < len(STEPS)
        check_alike(ranks[rank][f"ddp DiT {spec}"], expected)
    if spec in ADAPTIVE["DiT"]:
        assert ranks[0][f"ddp DiT {spec}"]["full"] != ranks[1][f"ddp DiT {spec}"]["full"]


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize(("name", "spec"), [(name, spec) for name, specs in STATIC.items() for spec in specs])
def test_under_fsdp_a_static_schedule_gives_what_one_process_gives(
    name: str, spec: str, when: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in range(2):
        expected = alone(name, spec, rank)
        assert 0 < len(expected.full) < len(STEPS)
        check_alike(ranks[rank][f"fsdp {name} {spec} {when}"], expected)


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize(("name", "spec"), [(name, spec) for name, specs in ADAPTIVE.items() for spec in specs])
def test_under_fsdp_ranks_decide_alike(name: str, spec: str, when: str, ranks: list[dict[str, Any]]) -> None:
    """Each unit's weights are gathered from all ranks, so they run it together: where one has changed too much all do.
    The outputs are those of one process that takes its full steps from a list."""
    loops = [ranks[rank][f"fsdp {name} {spec} {when}"] for rank in range(2)]
    full = loops[0]["full"]
    assert loops[1]["full"] == full
    assert 1 < len(full) < len(STEPS)
    # left alone they would part, which is what makes this a test
    alone_full = [alone(name, spec, rank).full for rank in range(2)]
    assert alone_full[0] != alone_full[1]
    assert len(full) >= min(map(len, alone_full))
    schedule = ExplicitSchedule(full_steps=tuple(full), num_inference_steps=len(STEPS))
    listed = CacheMethod(schedule=schedule, site=parse_method(spec).site)
    for rank, loop in enumerate(loops):
        expected = alone(name, listed, rank)
        assert loop["full"] == expected.full
        assert loop["summary"]["compute_ratio"] == pytest.approx(expected.summary["compute_ratio"])
        for out, wanted in zip(loop["outputs"], expected.outputs, strict=True):
            torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_sharded_model_runs_on_after_its_cache_is_disabled(name: str, when: str, ranks: list[dict[str, Any]]) -> None:
    with torch.no_grad():
        expected = build(name)(**TINY_FAMILIES[name].arguments(), return_dict=False)[0]
    for rank in range(2):
        torch.testing.assert_close(ranks[rank][f"fsdp {name} plain {when}"], expected, atol=1e-5, rtol=1e-5)


def test_units_opened_before_sharding_stay_open(ranks: list[dict[str, Any]]) -> None:
    family = TINY_FAMILIES[PIXART]
    with torch.no_grad():
        plain = family.build(5)(**family.arguments(), return_dict=False)[0]
    for rank in range(2):
        model = family.build(5)
        enable_cache(model, "delta:N2")
        check_alike(ranks[rank]["fsdp_opened loop"], run(model, model, family, rank))
        torch.testing.assert_close(ranks[rank]["fsdp_opened plain"], plain, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    main()
