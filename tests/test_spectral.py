"""Spectral norms against SVD, caps through training, Jacobian norms against dense Jacobians."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import inputs, tiny_dit
from torch import Tensor, nn

from skipdit.spectral import (
    SpectralCap,
    cap_spectral_norm,
    differentiable_norm,
    fold_spectral_caps,
    is_capped,
    jacobian_norms,
    spectral_norm,
    spectral_penalty,
)

TOLERANCE = 1e-3  # what a cap states for float32


def norm_of(weight: Tensor) -> float:
    return torch.linalg.svdvals(weight.detach().double().flatten(1))[0].item()


# ----------------------------------------------------------------------------------------------------------------------
# Norms


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    rank=st.integers(1, 24),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e3, 1e18]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_the_norm_is_that_of_the_svd(
    rows: int, columns: int, rank: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, min(rank, rows), generator=generator)
    weight = (scale * left @ torch.randn(min(rank, rows), columns, generator=generator)).to(dtype)
    true, found = norm_of(weight), spectral_norm(weight)
    assert found.value == pytest.approx(true, rel=1e-5)
    assert found.lower <= true * (1 + 1e-9)
    assert found.upper >= true * (1 - 1e-9)
    if scale == 1:
        assert differentiable_norm(weight).item() == pytest.approx(true, rel=TOLERANCE)


@given(gap=st.sampled_from([0.0, 1e-12, 1e-8, 1e-6, 1e-4, 1e-2]), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_nearly_equal_singular_values_do_not_mislead(gap: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    values = torch.cat([torch.tensor([1 + gap, 1.0]), torch.rand(14, generator=generator)]).double()
    weight = left * values @ right
    assert spectral_norm(weight).value == pytest.approx(1 + gap, rel=1e-5)
    assert differentiable_norm(weight.float()).item() == pytest.approx(1 + gap, rel=TOLERANCE)


def test_convolutions_zeros_and_what_has_no_norm() -> None:
    weight = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert spectral_norm(weight).value == pytest.approx(norm_of(weight), rel=1e-5)
    assert spectral_norm(torch.zeros(3, 4)).value == 0
    with pytest.raises(ValueError, match="two axes"):
        spectral_norm(torch.ones(3))
    with pytest.raises(ValueError, match="finite"):
        spectral_norm(torch.tensor([[float("nan"), 1.0]]))


def test_the_gradient_is_that_of_the_largest_singular_value() -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(3)).requires_grad_()
    (found,) = torch.autograd.grad(differentiable_norm(weight), weight)
    (true,) = torch.autograd.grad(torch.linalg.svdvals(weight)[0], weight)
    torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Caps


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 6))


def weights(module: nn.Module) -> list[Tensor]:
    return [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_holds_through_noisy_steps(rate: float, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    assert cap_spectral_norm(model, 0.7) == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(1)
    limit = 0.7 * (1 + TOLERANCE if dtype == torch.float32 else 1 + TOLERANCE + 2**-8)
    highest = 0.0
    for _ in range(200):
        model(torch.randn(4, 8, generator=generator).to(dtype)).square().mean().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad += torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
        optimizer.zero_grad()
        highest = max(highest, *(norm_of(weight) for weight in weights(model)))
    assert 0.69 < highest <= limit


def test_a_weight_below_the_cap_is_bit_unchanged_and_none_is_raised() -> None:
    model = network()
    before = [weight.detach().clone() for weight in weights(model)]
    largest = max(map(norm_of, before))
    cap_spectral_norm(model, largest * (1 + 1e-5))
    assert all(torch.equal(weight, old) for weight, old in zip(weights(model), before, strict=True))
    fold_spectral_caps(model)
    cap_spectral_norm(model, min(map(norm_of, before)) * 1.01)
    norms = [(norm_of(weight), norm_of(old)) for weight, old in zip(weights(model), before, strict=True)]
    assert all(new <= old * (1 + 1e-6) for new, old in norms)
    assert any(new < old for new, old in norms)
    assert torch.equal(SpectralCap(1.0)(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_folding_changes_keys_back_and_nothing_else() -> None:
    model, batch = network(), torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    keys = list(model.state_dict())
    cap_spectral_norm(model, 0.5)
    capped = copy.deepcopy(model)
    expected = model(batch)
    assert fold_spectral_caps(model) == 2
    assert torch.equal(model(batch), expected)
    assert sorted(model.state_dict()) == sorted(keys)
    assert all(is_capped(layer) for layer in capped if isinstance(layer, nn.Linear))
    assert torch.equal(capped(batch), expected)
    assert fold_spectral_caps(model) == 0


def test_what_cannot_be_capped_is_refused() -> None:
    model = network()
    cap_spectral_norm(model, 1.0)
    with pytest.raises(ValueError, match="already capped"):
        cap_spectral_norm(model, 1.0)
    with pytest.raises(ValueError, match="no linear layer"):
        cap_spectral_norm(nn.GELU(), 1.0)
    for maximum in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            cap_spectral_norm(network(), maximum)


def test_a_capped_model_compiles_whole_and_once() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    model, batch = network(), torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    cap_spectral_norm(model, 0.5)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(3):
        assert torch.equal(compiled(batch), model(batch))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    assert len(graphs) == 1


def test_a_penalty_pulls_down_what_is_above_and_leaves_the_rest() -> None:
    model = network()
    largest = max(norm_of(weight) for weight in weights(model))
    free = spectral_penalty(model, 2 * largest)
    free.backward()
    assert free.item() == 0
    assert all(not weight.grad.any() for weight in weights(model) if weight.grad is not None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        spectral_penalty(model, 0.5).backward()
        optimizer.step()
    assert largest > 0.9
    assert max(norm_of(weight) for weight in weights(model)) == pytest.approx(0.5, abs=0.02)


PARALLEL = """
import sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from skipdit.spectral import cap_spectral_norm, spectral_norm
kind, rank, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 6))
cap_spectral_norm(model, 0.5)
batches = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(5))
wrapped = model
if kind != "alone":
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    batches = batches[:, rank::2]
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
for batch in batches:
    wrapped(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
found = []
for name, tensor in model.state_dict().items():
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    found.append(tensor.flatten())
probe = wrapped(torch.eye(8))
print(" ".join(f"{value:.7f}" for value in torch.cat([*found, probe.detach().flatten()]).tolist()))
if kind != "alone":
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_caps_work_in_several_processes(kind: str, tmp_path: Path) -> None:
    """Two gloo processes end where one ends on the whole batch."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def start(name: str, rank: int) -> subprocess.Popen:
        command = [sys.executable, "-c", PARALLEL, name, str(rank), str(tmp_path / "store")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    running = [start("alone", 0), start(kind, 0), start(kind, 1)]
    texts = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], texts
    alone, first, second = (torch.tensor([float(word) for word in text.split()]) for text, _ in texts)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Jacobians


def dense_norms(function, point: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(function, point)
    norms = [
        torch.linalg.svdvals(jacobian[i, ..., i, *[slice(None)] * (point.ndim - 1)].reshape(-1, point[0].numel()))
        for i in range(len(point))
    ]
    return torch.stack([values[0] for values in norms])


def test_jacobian_norms_of_a_network() -> None:
    model = network().double()
    point = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = jacobian_norms(model, point, tolerance=1e-4)
    torch.testing.assert_close(found.value, dense_norms(model, point), rtol=1e-3, atol=0)
    assert (found.error <= 1e-4).all()
    assert torch.equal(found.value, jacobian_norms(model, point, tolerance=1e-4).value)


@pytest.mark.parametrize("gap", [1e-6, 1e-3, 1e-1])
def test_jacobian_norms_with_close_singular_values(gap: float) -> None:
    values = torch.cat([torch.tensor([1 + gap, 1.0]), torch.linspace(0.1, 0.99, 30)]).double()
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    found = jacobian_norms(lambda x: x @ (rotation * values), torch.ones(2, 32, dtype=torch.float64), tolerance=1e-3)
    assert (found.value <= (1 + gap) * (1 + 1e-9)).all()
    torch.testing.assert_close(found.value, torch.full((2,), 1 + gap, dtype=torch.float64), rtol=1e-3, atol=0)


def test_jacobian_norms_of_a_transformer() -> None:
    model = nn.Module.to(tiny_dit(num_layers=4), torch.float64)
    latents, labels = inputs()
    timestep = torch.tensor(400.0)

    def function(x: Tensor) -> Tensor:
        return model(x, timestep, labels).sample

    found = jacobian_norms(function, latents.double(), tolerance=1e-4)
    torch.testing.assert_close(found.value, dense_norms(function, latents.double()), rtol=1e-3, atol=0)


def test_what_is_no_function_of_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="keep the batch of 2"):
        jacobian_norms(lambda x: x.sum(dim=0, keepdim=True), torch.ones(2, 3))
    with pytest.raises(ValueError, match="max_iterations"):
        jacobian_norms(lambda x: x, torch.ones(2, 3), max_iterations=0)
