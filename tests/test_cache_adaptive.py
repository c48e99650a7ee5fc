"""Caches that decide by what they see, against the papers' rules as plain loops over the units."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from tiny import inputs, tiny_dit, tiny_pipeline
from torch import Tensor, nn

from skipdit.cache.enable import cache_summary, enable_cache
from skipdit.cache.gates import ProbeSchedule, RateSchedule
from skipdit.cache.steppers import relative_change_number
from skipdit.models.costs import flop_counter
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig

STEPS = list(range(950, -1, -50))
THRESHOLDS = {"fbcache": (0.6, 0.75, 0.9), "teacache": (0.2, 0.5, 0.8), "adacache": (0.3, 0.6, 1.2)}
every_case = pytest.mark.parametrize(
    ("method", "threshold"), [(name, value) for name, values in THRESHOLDS.items() for value in values]
)


# ----------------------------------------------------------------------------------------------------------------------
# The plain loops


def distance(values: list[Tensor], before: list[Tensor]) -> float:
    """The relative L1 distance of the papers: mean |x - y| / mean |y|."""
    both = [torch.cat([each.flatten() for each in values]) for values in (values, before)]
    return float((both[0] - both[1]).abs().mean() / both[1].abs().mean())


def fused(block: Any, hidden: Tensor, skip: Tensor | None) -> Tensor:
    if block.long_skip is None:
        return hidden
    both = torch.cat([hidden, skip], dim=-1)
    norm, proj = block.long_skip.norm, block.long_skip.proj
    return F.linear(F.layer_norm(both, both.shape[-1:], norm.weight, norm.bias, 1e-6), proj.weight, proj.bias)


@dataclass
class PlainLoop:
    """One guidance branch of one run, by hand. decisions: `F` for a full step, `R` for one that reuses."""

    model: DiT
    method: str
    threshold: float
    decisions: str = ""
    seen: list[Tensor] = field(default_factory=list)  # the probe
    added: Tensor | None = None  # by all units behind the first
    branches: list[Tensor] = field(default_factory=list)  # outputs of the last full step
    total: float = 0.0
    left: int = 0
    age: int = 0

    def step(self, latents: Tensor, timestep: float, labels: Tensor) -> Tensor:
        model = self.model
        hidden = model.patch_embed(latents) + model.position_embedding
        time = model.timestep_frequencies(torch.full((len(latents),), float(timestep)))
        conditioning = model.timestep_embedder(time) + model.class_embedder(labels)
        run = self.by_rate if self.method == "adacache" else self.by_probe
        patches = model.final_layer(run(hidden, conditioning), conditioning)
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=4, w=4, p=2, q=2)

    def by_probe(self, hidden: Tensor, conditioning: Tensor) -> Tensor:
        first, *behind = self.model.blocks
        after_first = first(hidden, conditioning)
        if self.method == "fbcache":
            probe = [after_first - hidden]
        else:
            shift, scale = first.modulation(F.silu(conditioning)).chunk(6, dim=-1)[:2]
            probe = [F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]]
        reuses = self.added is not None
        if reuses and self.method == "fbcache":  # the distance to the last full step
            reuses = distance(probe, self.seen) < self.threshold
        elif reuses:  # the sum of the changes from step to step since the last full one
            self.total += distance(probe, self.seen)
            reuses = self.total < self.threshold
        self.decisions += "R" if reuses else "F"
        if not reuses or self.method == "teacache":
            self.seen = probe
        if reuses:
            return after_first + self.added
        self.total = 0.0
        outputs = [after_first]
        for unit, block in enumerate(behind, start=1):
            skip = outputs[len(behind) - unit] if block.long_skip is not None else None
            outputs.append(block(outputs[-1], conditioning, skip))
        self.added = outputs[-1] - after_first
        return outputs[-1]

    def by_rate(self, hidden: Tensor, conditioning: Tensor) -> Tensor:
        held = iter(self.branches) if self.left > 0 else None
        self.decisions += "F" if held is None else "R"
        branches: list[Tensor] = []
        outputs: list[Tensor] = []
        for unit, block in enumerate(self.model.blocks):
            skip = outputs[len(self.model.blocks) - 1 - unit] if block.long_skip is not None else None
            hidden = fused(block, hidden, skip)
            parts = block.modulation(F.silu(conditioning))[:, None].chunk(6, dim=-1)
            for branch, (shift, scale, gate) in ((block.attn, parts[:3]), (block.mlp, parts[3:])):
                if held is None:
                    branches.append(branch(F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale) + shift))
                hidden = hidden + gate * (branches[-1] if held is None else next(held))
            outputs.append(hidden)
        if held is not None:
            self.left, self.age = self.left - 1, self.age + 1
            return hidden
        if self.branches:
            rate = distance(branches, self.branches) / self.age
            self.left = next(n for n in range(6) if n == 5 or (n + 1) * rate >= self.threshold)
        self.branches, self.age = branches, 1
        return hidden


@dataclass
class Cached:
    """The same of a model with a cache: which of its steps are full, by the summary."""

    model: DiT
    decisions: str = ""

    def step(self, latents: Tensor, timestep: float, labels: Tensor) -> Tensor:
        before = cache_summary(self.model) if self.decisions else None
        out = self.model(latents, torch.tensor(timestep), labels).sample
        after = cache_summary(self.model)
        assert after.steps_full + after.steps_reused == len(self.decisions) + 1
        self.decisions += "R" if before is not None and after.steps_reused > before.steps_reused else "F"
        return out


@torch.no_grad()
def run(step: Callable[[Tensor, float, Tensor], Tensor], seed: int = 0) -> list[Tensor]:
    """A loop in which every step's input depends on the last output; it changes fast, then slowly."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    labels = torch.randint(10, (2,), generator=generator)
    outputs = []
    for number, timestep in enumerate(STEPS):
        outputs.append(step(latents, timestep, labels))
        latents = latents + 0.6 / (number + 1) * outputs[-1][:, :4].tanh()
    return outputs


def cached(spec: str, long_skip: LongSkipConfig | None = None, like: nn.Module | None = None) -> DiT:
    model = tiny_dit(6, long_skip)
    if like is not None:
        model.load_state_dict(like.state_dict())
    enable_cache(model, spec)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The rules


@pytest.mark.parametrize("long_skip", [None, LongSkipConfig()])
@every_case
def test_decisions_and_outputs_are_those_of_the_rule(
    method: str, threshold: float, long_skip: LongSkipConfig | None
) -> None:
    model = tiny_dit(6, long_skip)
    plain = PlainLoop(model, method, threshold)
    expected = run(plain.step)
    loop = Cached(cached(f"{method}:{threshold}", long_skip, like=model))
    outputs = run(loop.step)
    assert set(plain.decisions) == {"F", "R"}
    assert loop.decisions == plain.decisions
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", THRESHOLDS)
def test_a_second_run_decides_as_the_first(method: str) -> None:
    model = cached(f"{method}:{THRESHOLDS[method][1]}")
    loops = [Cached(model), Cached(model)]
    first, second = (run(loop.step) for loop in loops)
    assert loops[0].decisions == loops[1].decisions
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def change_of(values: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    return relative_change_number({"region": values}, {"region": before})


def test_the_relative_change_is_of_all_values_together() -> None:
    before = {"a": torch.tensor([2.0, -2.0]), "b": torch.tensor([[1.0], [0.0], [-5.0]])}
    values = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[1.0], [-0.5], [-4.0]])}
    assert change_of(values, before) == pytest.approx(2.5 / 10)
    assert change_of(before, values) == pytest.approx(2.5 / 8.5)  # over the norm of what was before
    assert change_of(before, dict(before)) == 0
    zeros = {"a": torch.zeros(3)}
    assert change_of(zeros, dict(zeros)) == 0
    assert change_of({"a": torch.ones(3)}, zeros) == math.inf
    assert math.isnan(change_of({"a": torch.tensor([math.nan])}, {"a": torch.ones(1)}))
    # summed in float32: 4096 times 1 is no sum of bfloat16
    many = torch.ones(4096, dtype=torch.bfloat16)
    assert change_of({"a": many + many}, {"a": many}) == 1


def decided(walker: Any, changes: list[float]) -> str:
    return "".join("R" if walker.accepts(change) else "F" for change in changes)


def test_thresholds_are_of_the_distance_or_of_the_sum_of_changes() -> None:
    changes = [0.25, 0.25, 0.25, 0.25, 0.5, 0.0, 0.0]
    assert decided(ProbeSchedule(threshold=0.5).gate(), changes) == "RRRRFRR"
    # 0.5 and 0.5 are refused, for the threshold itself is; then the sum starts anew
    assert decided(ProbeSchedule(threshold=0.5, accumulate=True).gate(), changes) == "RFRFFRR"
    # a polynomial of the change: 2 c^2 + 0.25
    polynomial = ProbeSchedule(threshold=0.5, coefficients=(2.0, 0.0, 0.25))
    assert decided(polynomial.gate(), [0.25, 0.35, 0.36]) == "RRF"
    assert decided(ProbeSchedule(threshold=0.5).gate(), [math.nan, math.inf, 0.1]) == "FFR"


@pytest.mark.parametrize(
    ("change", "distance", "left"),
    [(0.2, 1, 4), (0.2, 2, 5), (0.5, 1, 1), (0.9, 3, 3), (1.0, 1, 0), (9.0, 1, 0), (0.0, 1, 5), (math.nan, 1, 0),
     (math.inf, 1, 0)],
)  # fmt: skip
def test_a_rate_allows_as_many_steps_as_fit(change: float, distance: int, left: int) -> None:
    gate = RateSchedule(threshold=1.0).gate()
    gate.observe(change, distance)
    decisions = []
    for _ in range(8):
        decisions.append(gate.opens())
        gate.advance(full=not decisions[-1])
    assert decisions == [True] * left + [False] * (8 - left)


# ----------------------------------------------------------------------------------------------------------------------
# What makes the methods differ


def timeless(long_skip: LongSkipConfig | None = None) -> DiT:
    """A model that does not look at the timestep, so that equal latents change nothing."""
    model = tiny_dit(6, long_skip)
    nn.init.zeros_(model.timestep_embedder.linear_2.weight)
    return model


@torch.no_grad()
def decisions_on(model: DiT, spec: str, stream: list[Tensor], label: int = 3) -> str:
    twin = cached(spec, like=model)
    loop = Cached(twin)
    for latents, timestep in zip(stream, STEPS, strict=False):
        loop.step(latents, timestep, torch.tensor([label] * len(latents)))
    return loop.decisions


@torch.no_grad()
def test_there_and_back_is_near_the_last_full_step_but_a_long_way() -> None:
    model = timeless()
    here, there = torch.randn(2, 1, 4, 8, 8)
    there = here + 0.2 * there
    seen: dict[str, list[Tensor]] = {"fbcache": [], "teacache": []}
    model.blocks[0].register_forward_hook(lambda _, given, out: seen["fbcache"].append(out - given[0]))
    model.blocks[0].attn.register_forward_pre_hook(lambda _, given: seen["teacache"].append(given[0]))
    for latents in (here, there):
        model(latents, torch.tensor(500), torch.tensor([3]))
    stream = [here, there] * 5
    for method, wanted in (("fbcache", "FRRRRRRRRR"), ("teacache", "FRFRFRFRFR")):
        forth, back = (distance([seen[method][i]], [seen[method][1 - i]]) for i in (1, 0))
        threshold = (forth + back) * 0.9
        assert threshold > max(forth, back)
        assert decisions_on(model, f"{method}:{threshold:.6f}", stream) == wanted


@pytest.mark.parametrize("method", THRESHOLDS)
def test_a_higher_threshold_reuses_no_less(method: str) -> None:
    """On one and the same stream of inputs that drifts one way."""
    model = timeless()
    start, way = torch.randn(2, 1, 4, 8, 8)
    stream = [start + 0.01 * number**1.5 * way for number in range(len(STEPS))]
    reused = [
        decisions_on(model, f"{method}:{threshold}", stream).count("R") for threshold in (0, 0.01, 0.05, 0.2, 0.5, 2)
    ]
    assert reused == sorted(reused)
    assert reused[0] == 0
    assert len(set(reused)) >= 4
    # equal inputs change nothing: as much as the method ever reuses
    assert decisions_on(model, f"{method}:0.001", [start] * len(STEPS)).count("F") == {"adacache": 5}.get(method, 1)


@pytest.mark.parametrize("method", THRESHOLDS)
@torch.no_grad()
def test_each_guidance_branch_decides_for_itself(method: str) -> None:
    """One branch stands still, the other moves; they are called in turn, by labels alone, at each timestep."""
    model = timeless()
    still, moving = torch.randn(1, 4, 8, 8), torch.randn(len(STEPS), 1, 4, 8, 8).unbind()
    spec = f"{method}:0.1"
    alone = decisions_on(model, spec, [still] * len(STEPS), label=3), decisions_on(model, spec, list(moving), label=4)
    assert alone[0].count("R") >= 10
    assert alone[1] == "F" * len(STEPS)
    twin = cached(spec, like=model)
    together, counts = ["", ""], (0, 0)
    for latents, timestep in zip(moving, STEPS, strict=True):
        for branch, given in enumerate((still, latents)):
            twin(given.clone(), torch.tensor(timestep), torch.tensor([3 + branch]))
            before, counts = counts, (cache_summary(twin).steps_full, cache_summary(twin).steps_reused)
            together[branch] += "F" if counts[0] > before[0] else "R"
    assert tuple(together) == alone
    assert sum(counts) == 2 * len(STEPS)


# ----------------------------------------------------------------------------------------------------------------------
# What it costs


def count_calls(model: DiT) -> list[int]:
    """How often each unit has run; filled as the model is called."""
    calls = [0] * len(model.blocks)

    def count(unit: int) -> Callable[..., None]:
        def add(*_: object) -> None:
            calls[unit] += 1

        return add

    for unit, block in enumerate(model.blocks):
        block.register_forward_hook(count(unit))
    return calls


@pytest.mark.parametrize("long_skip", [None, LongSkipConfig()])
@pytest.mark.parametrize("method", ["fbcache", "teacache"])
def test_no_unit_runs_twice_in_a_step_whose_reuse_is_refused(method: str, long_skip: LongSkipConfig | None) -> None:
    model = cached(f"{method}:{THRESHOLDS[method][1]}", long_skip)
    calls, loop = count_calls(model), Cached(model)
    with flop_counter() as counter:
        run(loop.step)
    full = loop.decisions.count("F")
    assert "F" in loop.decisions[1:]
    assert calls == [len(STEPS)] + [full] * 5
    summary = cache_summary(model)
    assert (summary.steps_full, summary.steps_reused) == (full, len(STEPS) - full)
    assert summary.compute_ratio == pytest.approx(len(STEPS) * full_flops(long_skip) / counter.get_total_flops())
    assert summary.reused == ("sum added by units 1 to 5",)


def full_flops(long_skip: LongSkipConfig | None) -> int:
    """Of one step of the model without a cache."""
    with flop_counter() as counter:
        one_step(tiny_dit(6, long_skip))
    return counter.get_total_flops()


def one_step(model: DiT) -> None:
    latents, labels = inputs()
    with torch.no_grad():
        model(latents, torch.tensor(500), labels)


def test_the_cost_of_reused_branches_is_what_stands_around_them() -> None:
    model = cached("adacache:0.6", LongSkipConfig())
    products: list[int] = []
    for block in model.blocks:
        for product in (block.attn.qkv, block.mlp.fc1):
            product.register_forward_hook(lambda *_: products.append(1))
    calls, loop = count_calls(model), Cached(model)
    with flop_counter() as counter:
        run(loop.step)
    full, reused = loop.decisions.count("F"), loop.decisions.count("R")
    assert calls == [len(STEPS)] * 6
    assert len(products) == 12 * full
    expected = (full + reused) * full_flops(LongSkipConfig()) / counter.get_total_flops()
    assert cache_summary(model).compute_ratio == pytest.approx(expected)


def test_what_a_probe_holds_is_counted() -> None:
    unit = 2 * 16 * 32 * 4  # batch, tokens, width, float32
    for method in ("fbcache", "teacache"):
        model = cached(f"{method}:0.75")
        run(Cached(model).step)
        assert cache_summary(model).bytes_held == 2 * unit
        model._reset_stateful_cache()
        assert cache_summary(model).bytes_held == 0
        assert cache_summary(model).peak_bytes_held == 2 * unit


@pytest.fixture
def counted_graphs() -> Iterator[list[Any]]:
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


@pytest.mark.parametrize(("method", "kinds"), [("fbcache", 3), ("teacache", 3), ("adacache", 2)])
def test_compiled_it_decides_between_whole_graphs(method: str, kinds: int, counted_graphs: list[Any]) -> None:
    """Full, reuse, and the units that a refused reuse has left out."""

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        counted_graphs.append(graph)
        return graph.forward

    model = cached(f"{method}:{THRESHOLDS[method][1]}", LongSkipConfig())
    eager = Cached(model)
    expected = run(eager.step)
    model.compile(fullgraph=True, backend=counting)
    compiled = Cached(model)
    outputs = run(compiled.step)
    assert compiled.decisions == eager.decisions
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert len(counted_graphs) == kinds


def test_under_a_pipeline_it_counts_one_decision_a_step_and_holds_nothing_at_the_end() -> None:
    pipeline = tiny_pipeline()
    enable_cache(pipeline, "fbcache:0.9")
    for num_steps in (12, 7):
        pipeline([1, 2], num_inference_steps=num_steps, output_type="latent")
        summary = cache_summary(pipeline)
        assert summary.steps_full + summary.steps_reused == num_steps
        assert summary.steps_reused > 0
        assert summary.bytes_held == 0
