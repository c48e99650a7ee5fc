"""Measures the overhead of a reuse step in Python, beyond the modules that it runs.

    python benchmarks/reuse_overhead.py

A tiny model with many units, of which a reuse step runs only the first and the last, is timed in turn with a model that
has only these two units and no cache. The difference is the cost of finding the stream, of the decision and the plan,
and of the blocks that pass their input on.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

import skipdit
from skipdit.cache.enable import CachedModel

NUM_STEPS, NUM_RUNS, NUM_ROUNDS = 50, 8, 5
SIZES = {"num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "sample_size": 8}
PICTURES = {"hidden_states": torch.randn(2, 4, 8, 8), "class_labels": torch.tensor([1, 2])}
FLUX = {
    "hidden_states": torch.randn(2, 16, 4),
    "encoder_hidden_states": torch.randn(2, 4, 16),
    "pooled_projections": torch.randn(2, 16),
    "txt_ids": torch.zeros(4, 3),
    "img_ids": torch.zeros(16, 3),
}


@dataclass(eq=False)
class Pipeline:
    """The part of a pipeline that a cache uses."""

    scheduler: FlowMatchEulerDiscreteScheduler


def ours(num_units: int) -> nn.Module:
    return skipdit.DiT(**SIZES, num_layers=num_units, in_channels=4, num_classes=10, long_skip=skipdit.LongSkipConfig())


def diffusers_dit(num_units: int) -> nn.Module:
    return DiTTransformer2DModel(
        **SIZES, num_layers=num_units, in_channels=4, out_channels=4, num_embeds_ada_norm=10, norm_num_groups=1
    )


def flux(num_units: int) -> nn.Module:
    first = 1 if num_units == 2 else num_units // 3
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=first,
        num_single_layers=num_units - first,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


MODELS: dict[str, tuple[Callable[[int], nn.Module], int, str, dict[str, Tensor]]] = {
    "skipdit.DiT, with long skips": (ours, 28, "N1000", PICTURES),
    "skipdit.DiT": (ours, 28, "delta:N1000", PICTURES),
    "DiTTransformer2DModel": (diffusers_dit, 28, "delta:N1000", PICTURES),
    "FluxTransformer2DModel": (flux, 57, "delta:N1000", FLUX),
}


def fastest(model: nn.Module, inputs: dict[str, Tensor], timesteps: Tensor) -> float:
    """Return the microseconds of the fastest of many steps, except the first steps of a run, which may be full."""
    times = []
    for _ in range(NUM_RUNS):
        for step, timestep in enumerate(timesteps):
            begun = time.perf_counter()
            model(**inputs, timestep=timestep.expand(2))
            if step > 3:
                times.append(time.perf_counter() - begun)
        if isinstance(model, CachedModel):
            model._reset_stateful_cache()
    return 1e6 * min(times)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(NUM_STEPS)
    print("| model | units | two units, no cache | reuse step | more |\n| --- | --- | --- | --- | --- |")
    for name, (make, num_units, spec, inputs) in MODELS.items():
        deep, shallow = make(num_units).eval(), make(2).eval()
        skipdit.enable_cache(deep, spec)
        pipeline = Pipeline(scheduler)
        deep._skipdit_cache.streams.watch(pipeline)
        scheduler.set_timesteps(NUM_STEPS)
        plain = reused = float("inf")
        for _ in range(NUM_ROUNDS):  # in turn, as other programs may interfere
            plain = min(plain, fastest(shallow, inputs, scheduler.timesteps))
            reused = min(reused, fastest(deep, inputs, scheduler.timesteps))
        print(f"| {name} | {num_units} | {plain:.0f} us | {reused:.0f} us | {reused - plain:.0f} us |", flush=True)


if __name__ == "__main__":
    main()
