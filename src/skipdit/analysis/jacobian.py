"""Jacobian norms of units, halves and whole models, which say how strongly a small change of the input is stretched,
and a closed-form bound for units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from skipdit.analysis.record import record_inputs
from skipdit.models.dit import DiT, DiTBlock, HeadNorm, modulate
from skipdit.spectral import JacobianNorms, jacobian_norms

TOLERANCE, MAX_ITERATIONS = 1e-2, 30  # of every Jacobian norm
GELU_SLOPE = 1.13  # the largest derivative of GELU, 1.1290 in its tanh form


class UnitInput(NamedTuple):
    """The input of a block in one call."""

    hidden_states: Tensor
    """(batch tokens dim)"""
    conditioning: Tensor
    """(batch dim)"""
    skip: Tensor | None


@torch.no_grad()
def unit_inputs(model: DiT, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> list[UnitInput]:
    """Call the model and return the inputs of its blocks."""
    names = [f"blocks.{unit}" for unit in range(len(model.blocks))]
    with record_inputs(model, names) as recorded:
        model(latents, timestep, class_labels)
    return [UnitInput(*recorded[name][0]) for name in names]


def unit_function(model: DiT, inputs: Sequence[UnitInput], unit: int) -> Callable[[Tensor], Tensor]:
    """Return unit `unit` as a function of its hidden states, with its skip and conditioning held constant."""
    _, conditioning, skip = inputs[unit]
    block = model.blocks[unit]
    return lambda hidden_states: block(hidden_states, conditioning, skip)


def half_function(model: DiT, inputs: Sequence[UnitInput], *, second: bool) -> Callable[[Tensor], Tensor]:
    """Return the first or the second half as a function of the hidden states that enter it.

    The second half's skips come from the first half and are held constant, except the middle unit's skip, which is the
    half's input itself.
    """
    middle = len(model.blocks) // 2
    units = range(middle, len(model.blocks)) if second else range(middle)
    sources = model.long_skip_links.sources

    def function(hidden_states: Tensor) -> Tensor:
        half_input = hidden_states
        for unit in units:
            _, conditioning, skip = inputs[unit]
            is_middle_pair = unit == middle and sources.get(unit) == middle - 1
            hidden_states = model.blocks[unit](hidden_states, conditioning, half_input if is_middle_pair else skip)
        return hidden_states

    return function


def model_function(model: DiT, timestep: Tensor, class_labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the whole model's prediction, without a learned variance, as a function of its latents."""
    channels = model.config.in_channels
    return lambda latents: model(latents, timestep, class_labels).sample[:, :channels]


@dataclass(frozen=True)
class JacobianProfile:
    """Jacobian norms at one timestep, each the mean over samples."""

    units: list[float]
    """(num_units,)"""
    bounds: list[float]
    """(num_units,): closed-form bounds on `units`"""
    first_half: float
    second_half: float
    model: float
    errors: dict[str, float]
    """the largest relative residual of each norm"""


def jacobian_profile(
    model: DiT,
    latents: Tensor,
    timestep: Tensor,
    class_labels: Tensor,
    *,
    advance: Callable[[], object] = lambda: None,
) -> JacobianProfile:
    """Return all Jacobian norms of a model at latents (batch channels height width) and one timestep. Calls `advance`
    after each."""
    inputs = unit_inputs(model, latents, timestep, class_labels)
    middle = len(model.blocks) // 2

    def measure(function: Callable[[Tensor], Tensor], point: Tensor) -> JacobianNorms:
        norms = jacobian_norms(function, point, tolerance=TOLERANCE, max_iterations=MAX_ITERATIONS)
        advance()
        return norms

    units = [
        measure(unit_function(model, inputs, unit), inputs[unit].hidden_states) for unit in range(len(model.blocks))
    ]
    first = measure(half_function(model, inputs, second=False), inputs[0].hidden_states)
    second = measure(half_function(model, inputs, second=True), inputs[middle].hidden_states)
    whole = measure(model_function(model, timestep, class_labels), latents)
    return JacobianProfile(
        units=[norms.value.mean().item() for norms in units],
        bounds=[unit_bound(block, *given).mean().item() for block, given in zip(model.dit_blocks, inputs, strict=True)],
        first_half=first.value.mean().item(),
        second_half=second.value.mean().item(),
        model=whole.value.mean().item(),
        errors={
            "units": max(norms.error.max().item() for norms in units),
            "first_half": first.error.max().item(),
            "second_half": second.error.max().item(),
            "model": whole.error.max().item(),
        },
    )


# ----------------------------------------------------------------------------------------------------------------------
# The closed form


@torch.no_grad()
def unit_bound(block: DiTBlock, hidden_states: Tensor, conditioning: Tensor, skip: Tensor | None = None) -> Tensor:
    """Return an upper bound (batch,) on the Jacobian norm of a block with respect to its hidden states (batch tokens
    dim).

    The bound is fusion x (1 + gate x attention x modulation x norm) x (1 + gate x MLP x modulation x norm), where each
    factor is a spectral norm of weights or the largest slope at this point. It is local, as no bound on attention holds
    everywhere.
    """
    batch = hidden_states.shape[0]
    fusion = torch.ones(batch, device=hidden_states.device, dtype=hidden_states.dtype)
    if block.long_skip is not None:
        assert skip is not None
        pair = torch.cat([hidden_states, skip], dim=-1)
        weight = block.long_skip.proj.weight * block.long_skip.norm.weight
        fusion = _norm_slope(pair, 1e-6) * torch.linalg.matrix_norm(weight.float(), ord=2)
        fusion = fusion + 1 if block.long_skip.residual else fusion
        hidden_states = block.long_skip(hidden_states, skip)

    shift_attn, scale_attn, gate_attn, _, scale_mlp, gate_mlp = block.modulation(F.silu(conditioning)).chunk(6, dim=-1)
    modulated = modulate(block.norm1(hidden_states), shift_attn, scale_attn)
    attention = (
        _largest(gate_attn)
        * attention_bound(block, modulated)
        * _largest(1 + scale_attn)
        * _norm_slope(hidden_states, block.norm1.eps)
    )
    hidden_states = hidden_states + gate_attn.unsqueeze(1) * block.attn(modulated)
    mlp = (
        _largest(gate_mlp)
        * GELU_SLOPE
        * torch.linalg.matrix_norm(block.mlp.fc1.weight, ord=2)
        * torch.linalg.matrix_norm(block.mlp.fc2.weight, ord=2)
        * _largest(1 + scale_mlp)
        * _norm_slope(hidden_states, block.norm2.eps)
    )
    return fusion * (1 + attention) * (1 + mlp)


def attention_bound(block: DiTBlock, tokens: Tensor) -> Tensor:
    """Return an upper bound (batch,) on the Jacobian norm of softmax attention at these tokens (batch tokens dim).

    The output of a head is P V. Through V it changes by at most |P| |W_v|. Through P, whose rows have the Jacobian
    diag(p) - p p^T, it changes by at most the largest |V^T (diag(p) - p p^T)| of a row times (|K| |W_q| + |Q| |W_k|) /
    sqrt(head size). If queries and keys are normalized, |W_q| and |W_k| are multiplied by the slopes of those norms.
    """
    heads = block.attn.num_heads
    query, key, value = block.attn.split(tokens)
    slope_query, slope_key = 1.0, 1.0
    if block.attn.q_norm is not None and block.attn.k_norm is not None:
        slope_query, slope_key = _rms_slope(block.attn.q_norm, query), _rms_slope(block.attn.k_norm, key)
        query, key = block.attn.q_norm(query), block.attn.k_norm(key)
    scale = query.shape[-1] ** -0.5
    weights = torch.softmax(query @ key.mT * scale, dim=-1)
    mean = weights @ value  # b h n d
    # rows of V^T (diag(p) - p p^T) are p_j (v_j - mean_i); its Frobenius norm bounds its spectral norm from above
    spread = (
        weights.square() @ value.square().sum(dim=-1, keepdim=True)
        - 2 * ((weights.square() @ value) * mean).sum(dim=-1, keepdim=True)
        + weights.square().sum(dim=-1, keepdim=True) * mean.square().sum(dim=-1, keepdim=True)
    )
    slope = spread.clamp(min=0).sqrt().amax(dim=(-2, -1))  # b h
    norm_query, norm_key, norm_value = rearrange(
        torch.linalg.matrix_norm(
            rearrange(block.attn.qkv.weight, "(three h d) i -> three h d i", three=3, h=heads), ord=2
        ),
        "three h -> three 1 h",
    )
    through_value = torch.linalg.matrix_norm(weights, ord=2) * norm_value
    through_weights = (
        slope
        * scale
        * (
            torch.linalg.matrix_norm(key, ord=2) * norm_query * slope_query
            + torch.linalg.matrix_norm(query, ord=2) * norm_key * slope_key
        )
    )
    per_head = through_value + through_weights
    return per_head.square().sum(dim=1).sqrt() * torch.linalg.matrix_norm(block.attn.proj.weight, ord=2)


def _largest(values: Tensor) -> Tensor:
    """Return the spectral norm (batch,) of the diagonal matrices of `values` (batch, dim)."""
    return values.abs().amax(dim=1)


def _norm_slope(hidden_states: Tensor, eps: float) -> Tensor:
    """Return the largest slope (batch,) of layer norm over all tokens, 1 / sqrt(variance + eps), which also bounds that
    of RMS norm."""
    return (hidden_states.var(dim=-1, correction=0) + eps).rsqrt().amax(dim=-1)


def _rms_slope(norm: HeadNorm, heads: Tensor) -> Tensor:
    """Return a bound (batch heads), max |scale| / rms, on the slope of RMS norm over the tokens of each head."""
    return norm.weight.abs().max() * (heads.square().mean(dim=-1) + norm.eps).rsqrt().amax(dim=-1)
