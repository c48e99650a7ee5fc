"""Spectral norms of weights, which can be capped or penalized, and of Jacobians.

A weight's norm is computed by repeatedly squaring its Gram matrix G: k squarings equal 2^k power iterations from every
start vector at once, and give a lower and an upper bound. As no start vector is drawn or kept, every process and every
call gets the same number.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

NUM_SQUARINGS = 12  # for a cap: 4096 power iterations


@dataclass(frozen=True)
class SpectralNorm:
    """Bounds on the largest singular value; they differ because of rounding and a finite number of iterations."""

    lower: float
    """lower bound"""
    upper: float
    """upper bound"""

    @property
    def value(self) -> float:
        return (self.lower + self.upper) / 2


def as_matrix(weight: Tensor) -> Tensor:
    """Flatten a weight (out, ...) to (out, in), as the layer multiplies it. Raises `ValueError` if it has fewer than
    two axes."""
    if weight.ndim < 2:
        raise ValueError(f"a spectral norm needs a weight with at least two axes, got shape {tuple(weight.shape)}")
    return weight.flatten(1)


def gram_matrix(matrix: Tensor) -> Tensor:
    """Return the smaller of W W^T and W^T W, whose largest eigenvalue is the squared spectral norm."""
    return matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix


def spectral_norm(weight: Tensor, *, tolerance: float = 1e-6, max_squarings: int = 40) -> SpectralNorm:
    """Return the spectral norm of a weight (out, ...), computed in float64. Squares until both bounds agree to within
    the relative `tolerance`.

    With G^p scaled to trace 1, trace(G^p G) is a lower bound on the largest eigenvalue, and the p-th root of the trace
    of the unscaled G^p is an upper bound; they differ by less than log(rank) / p. Raises `ValueError` if an entry is
    not finite.
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
    """Return a lower bound on the spectral norm, a float32 scalar with the gradient of the largest singular value.

    Its relative error is at most log(rank) / 2^(k + 1): 0.09% at rank 1152 with k = 12. Nothing waits for the device,
    so the function compiles into one graph.
    """
    with torch.autocast(weight.device.type, enabled=False):
        matrix = as_matrix(weight).float()
        with torch.no_grad():
            gram = gram_matrix(matrix / matrix.abs().amax().clamp(min=torch.finfo(torch.float32).tiny))
            power = gram / gram.trace().clamp(min=torch.finfo(torch.float32).tiny)
            for _ in range(num_squarings):
                power = power @ power
                power = power / power.trace().clamp(min=torch.finfo(torch.float32).tiny)
        is_wide = matrix.shape[0] <= matrix.shape[1]
        squared = (power @ matrix * matrix).sum() if is_wide else (matrix @ power * matrix).sum()
        return squared.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


class SpectralCap(nn.Module):
    """Parametrization that scales a weight down to a spectral norm of `maximum`; one within the cap is bit-unchanged.

    The computed norm is a lower bound, so the result may exceed the cap by its error: at most 0.1% in float32 for
    weights of rank up to 1152, plus the rounding of bf16 (0.4%) for weights in bf16. The gradient is that of the scaled
    weight.
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
        """Return the weight to store when a capped one is assigned, which is the weight itself."""
        return weight


def weighted(module: nn.Module) -> Iterator[nn.Module]:
    """Return the linear layers and convolutions in a module, including itself."""
    return (layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)))


def cap_spectral_norm(module: nn.Module, maximum: float) -> int:
    """Cap the spectral norm of every linear layer and convolution in `module` at `maximum`. Return their number.

    The cap is a parametrization: the optimizer updates `parametrizations.weight.original`, and every use sees the
    capped weight. Cap before the parameters go to the optimizer, DDP, FSDP or compile, and call `fold_spectral_caps`
    before saving.

    Raises `ValueError` if there is no such layer, one is already capped, or the maximum is not above 0.
    """
    layers = list(weighted(module))
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear layer or convolution to cap")
    if any(map(is_capped, layers)):
        raise ValueError("a weight in this module is already capped: call fold_spectral_caps(module) first")
    cap = SpectralCap(maximum)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", cap)
    return len(layers)


def is_capped(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer, "weight") and any(
        isinstance(parametrization, SpectralCap)
        for parametrization in layer.parametrizations.weight  # pyright: ignore
    )


def fold_spectral_caps(module: nn.Module) -> int:
    """Turn every capped weight into an ordinary parameter with the capped value, so that outputs stay the same and keys
    are those of a model without caps. Return their number. Raises `ValueError` if a layer has other parametrizations.
    """
    capped = [layer for layer in weighted(module) if is_capped(layer)]
    for layer in capped:
        if len(layer.parametrizations) > 1 or len(layer.parametrizations.weight) > 1:  # pyright: ignore
            raise ValueError("a layer with a spectral cap also has other parametrizations: remove those first")
        parameter = layer.get_parameter("parametrizations.weight.original")
        with torch.no_grad():
            parameter.copy_(layer.weight)  # pyright: ignore[reportArgumentType]
        # remove_parametrizations would delete the property from the class, which copies of the layer share
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        layer.weight = parameter
    return len(capped)


def spectral_penalty(
    module: nn.Module, maximum: float, whole: Callable[[Tensor], Tensor] = lambda weight: weight
) -> Tensor:
    """Return a loss term: the sum of (norm - maximum)^2 over the linear layers and convolutions with a larger norm.

    whole: gathers a sharded weight.
    """
    norms = torch.stack([differentiable_norm(whole(layer.get_parameter("weight"))) for layer in weighted(module)])
    return (norms - maximum).clamp(min=0).square().sum()


@dataclass(frozen=True)
class JacobianNorms:
    """Largest singular values of the Jacobians of a batch."""

    value: Tensor
    """(batch,): lower bound on the norm"""
    error: Tensor
    """(batch,): relative residual of the singular pair; the Jacobian has a singular value this close to `value`"""
    num_iterations: int
    """iterations until convergence"""


def jacobian_norms(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 60,
    seed: int = 0,
) -> JacobianNorms:
    """Return the largest singular value of the Jacobian of `function` at each of `inputs` (batch, ...).

    function: maps (batch, ...) to (batch, ...), each sample independently. Raises `ValueError` if it changes the batch.

    The method is Lanczos on J^T J: an iteration is a Jacobian-vector and a vector-Jacobian product (`torch.func`), and
    the norm is the largest in the space of all vectors so far. It stops when every residual is at most `tolerance`, or
    after `max_iterations`. A residual bounds the error only from below: a direction that is weak in the random start
    may still emerge later. Attention runs unfused, as the fused kernels have no forward-mode derivative.
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
            for _ in range(2):  # one pass of Gram-Schmidt leaves rounding errors
                pulled = pulled - torch.einsum("bkn,bk->bn", basis, torch.einsum("bkn,bn->bk", basis, pulled))
            off_diagonal.append(pulled.norm(dim=1))

            tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1))
            if iteration > 1:
                sides = torch.stack(off_diagonal[:-1], dim=1)
                tridiagonal = tridiagonal + torch.diag_embed(sides, 1) + torch.diag_embed(sides, -1)
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
