"""Spectral norms: of weights, capped or penalised, and of Jacobians.

A weight's norm is found by squaring its Gram matrix G again and again: k squarings are 2^k power iterations from every
start vector at once, and give a bound from below and one from above. No start vector is drawn and none is kept, so
every process and every call finds the same number.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

NUM_SQUARINGS = 12  # of a cap: 4096 power iterations


@dataclass(frozen=True)
class SpectralNorm:
    """The largest singular value lies between `lower` and `upper`, which differ by rounding and too few iterations."""

    lower: float
    upper: float

    @property
    def value(self) -> float:
        return (self.lower + self.upper) / 2


def as_matrix(weight: Tensor) -> Tensor:
    """A weight (out, ...) as (out, in), as the layer's product sees it; `ValueError` where it has one axis only."""
    if weight.ndim < 2:
        raise ValueError(f"a spectral norm needs a weight of two axes or more, got shape {tuple(weight.shape)}")
    return weight.flatten(1)


def gram_matrix(matrix: Tensor) -> Tensor:
    """The smaller of W W^T and W^T W: its largest eigenvalue is the squared spectral norm."""
    return matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix


def spectral_norm(weight: Tensor, *, tolerance: float = 1e-6, max_squarings: int = 40) -> SpectralNorm:
    """The spectral norm of a weight (out, ...), in float64, squared until both bounds agree to `tolerance`, relative.

    With G^p of trace 1, trace(G^p G) is at most the largest eigenvalue, and the 1/p-th power of the trace of the
    unscaled G^p at least: they differ by less than log(rank) / p. `ValueError` where an entry is not finite.
    """
    matrix = as_matrix(weight.detach()).double()
    if not matrix.isfinite().all():
        raise ValueError("a spectral norm needs finite entries")
    largest = matrix.abs().amax()
    if largest == 0:
        return SpectralNorm(0.0, 0.0)
    gram = gram_matrix(matrix / largest)
    log_trace = gram.trace().log()  # of G^p, divided by p
    power, exponent = gram / gram.trace(), 1
    lower, upper = (power * gram).sum().sqrt(), (log_trace / 2).exp()
    for _ in range(max_squarings):
        if upper - lower <= tolerance * lower:
            break
        power = power @ power
        exponent *= 2
        trace = power.trace()
        power, log_trace = power / trace, log_trace + trace.log() / exponent
        lower, upper = torch.maximum(lower, (power * gram).sum().sqrt()), (log_trace / 2).exp()
    return SpectralNorm((lower * largest).item(), (torch.maximum(upper, lower) * largest).item())


def differentiable_norm(weight: Tensor, num_squarings: int = NUM_SQUARINGS) -> Tensor:
    """The norm from below, a scalar in float32 whose gradient is that of the largest singular value.

    Too small by at most log(rank) / 2^(k + 1), relative: 0.09% at rank 1152 with k = 12. No step of it asks the device
    for a number, so it compiles whole.
    """
    with torch.autocast(weight.device.type, enabled=False):
        matrix = as_matrix(weight).float()
        with torch.no_grad():
            gram = gram_matrix(matrix / matrix.abs().amax().clamp(min=torch.finfo(torch.float32).tiny))
            power = gram / gram.trace().clamp(min=torch.finfo(torch.float32).tiny)
            for _ in range(num_squarings):
                power = power @ power
                power = power / power.trace().clamp(min=torch.finfo(torch.float32).tiny)
        left = matrix.shape[0] <= matrix.shape[1]
        squared = (power @ matrix * matrix).sum() if left else (matrix @ power * matrix).sum()
        return squared.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# Constraints


class SpectralCap(nn.Module):
    """Scales a weight down to a spectral norm of `maximum`; one that is at or below it passes bit-unchanged.

    The norm is taken from below, so the result exceeds the cap by at most its error: 0.1% in float32 for weights of
    rank up to 1152, and bf16's rounding (0.4%) on top for weights in bf16. The gradient is that of the scaled weight.
    """

    def __init__(self, maximum: float, num_squarings: int = NUM_SQUARINGS) -> None:
        super().__init__()
        if not 0 < maximum < float("inf"):
            raise ValueError(f"the cap on a spectral norm must be above 0 and finite, got {maximum}")
        self.maximum, self.num_squarings = maximum, num_squarings

    def forward(self, weight: Tensor) -> Tensor:
        norm = differentiable_norm(weight, self.num_squarings)
        factor = torch.where(norm > self.maximum, self.maximum / norm, torch.ones_like(norm))
        return (weight.float() * factor).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight that is kept when a capped one is assigned: itself."""
        return weight


def weighted(module: nn.Module) -> Iterator[nn.Module]:
    """The linear layers and convolutions in a module, itself included."""
    return (each for each in module.modules() if isinstance(each, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)))


def cap_spectral_norm(module: nn.Module, maximum: float) -> int:
    """From now on no linear layer or convolution in `module` has a spectral norm above `maximum`; returns how many.

    A parametrization: the optimizer moves `parametrizations.weight.original`, every use sees the capped weight. Cap
    before the optimizer, DDP, FSDP or compile takes the parameters; `fold_spectral_caps` before saving.

    `ValueError` where there is no such layer, one is capped already, or the maximum is not above 0.
    """
    layers = list(weighted(module))
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear layer or convolution to cap")
    if any(map(is_capped, layers)):
        raise ValueError("a weight here is capped already: fold_spectral_caps(module) first")
    cap = SpectralCap(maximum)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", cap)
    return len(layers)


def is_capped(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer, "weight") and any(
        isinstance(each, SpectralCap)
        for each in layer.parametrizations.weight  # pyright: ignore
    )


def fold_spectral_caps(module: nn.Module) -> int:
    """Makes every capped weight an ordinary one of the value that it had; outputs and keys are those of a model that
    never knew a cap. Returns how many were folded. `ValueError` where a layer has another parametrization as well."""
    capped = [each for each in weighted(module) if is_capped(each)]
    for layer in capped:
        if len(layer.parametrizations) > 1 or len(layer.parametrizations.weight) > 1:  # pyright: ignore
            raise ValueError("a layer with a spectral cap has other parametrizations too: remove those first")
        parameter = layer.get_parameter("parametrizations.weight.original")
        with torch.no_grad():
            parameter.copy_(layer.weight)  # pyright: ignore[reportArgumentType]
        # not remove_parametrizations: it takes the property from the class, which copies of the layer share
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        layer.weight = parameter
    return len(capped)


def spectral_penalty(
    module: nn.Module, maximum: float, whole: Callable[[Tensor], Tensor] = lambda weight: weight
) -> Tensor:
    """Sum over linear layers and convolutions of (norm - maximum)^2 where the norm is above: to be added to a loss.

    whole: makes a weight whole that is in shards.
    """
    norms = torch.stack([differentiable_norm(whole(layer.get_parameter("weight"))) for layer in weighted(module)])
    return (norms - maximum).clamp(min=0).square().sum()


# ----------------------------------------------------------------------------------------------------------------------
# Jacobians


@dataclass(frozen=True)
class JacobianNorms:
    """value (batch,): the norm from below. error (batch,): relative residual of the singular pair found: some singular
    value of the Jacobian is that near to `value`, and none was seen above it. num_iterations: made."""

    value: Tensor
    error: Tensor
    num_iterations: int


def jacobian_norms(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 60,
    seed: int = 0,
) -> JacobianNorms:
    """Largest singular value of the Jacobian of `function` at each of `inputs` (batch, ...).

    function: maps (batch, ...) to (batch, ...), each sample for itself. Power iteration that keeps its vectors (Lanczos
    on J^T J): an iteration is a Jacobian-vector and a vector-Jacobian product (`torch.func`), and the norm is the
    largest in the space of all vectors so far. It ends when every residual is below `tolerance`, or after
    `max_iterations`; a residual bounds the error from below only, for a direction that the random start hardly holds
    may still be found later. Attention is computed unfused: the fused one has no forward mode.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = _unit(torch.randn(inputs.shape, generator=generator, dtype=torch.float64).to(inputs))
    basis, diagonal, off_diagonal = vector.flatten(1)[:, None], [], []
    tiny = torch.finfo(inputs.dtype).tiny
    with sdpa_kernel(SDPBackend.MATH):
        outputs, pull_back = torch.func.vjp(function, inputs)[:2]
        if outputs.shape[0] != inputs.shape[0]:
            raise ValueError(f"function must keep the batch of {inputs.shape[0]}, got {outputs.shape[0]}")
        for iteration in range(1, max_iterations + 1):
            pushed = torch.func.jvp(function, (inputs,), (basis[:, -1].view_as(inputs),))[1]
            (pulled,) = pull_back(pushed.detach())
            pulled = pulled.detach().flatten(1)
            diagonal.append((pulled * basis[:, -1]).sum(dim=1))
            for _ in range(2):  # once leaves rounding behind
                pulled = pulled - torch.einsum("bkn,bk->bn", basis, torch.einsum("bkn,bn->bk", basis, pulled))
            off_diagonal.append(pulled.norm(dim=1))

            tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1))
            if iteration > 1:
                beside = torch.stack(off_diagonal[:-1], dim=1)
                tridiagonal = tridiagonal + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
            squared, vectors = torch.linalg.eigh(tridiagonal)
            largest = squared[:, -1].clamp(min=0)
            error = off_diagonal[-1] * vectors[:, -1, -1].abs() / (2 * largest).clamp(min=tiny)
            if iteration == max_iterations or (iteration > 2 and (error <= tolerance).all()):
                return JacobianNorms(largest.sqrt(), error, iteration)
            basis = torch.cat([basis, _unit(pulled)[:, None]], dim=1)
    raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")


def _unit(vectors: Tensor) -> Tensor:
    norms = vectors.flatten(1).norm(dim=1).clamp(min=torch.finfo(vectors.dtype).tiny)
    return vectors / norms.view(-1, *[1] * (vectors.ndim - 1))
