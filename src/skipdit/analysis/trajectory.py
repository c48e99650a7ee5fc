"""Features and errors along a denoising run: how features change between steps, and how a cache's errors grow."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from skipdit.analysis.jacobian import MAX_ITERATIONS, TOLERANCE
from skipdit.analysis.record import record_inputs, record_outputs
from skipdit.cache.methods import CacheMethod
from skipdit.diffusion import guide
from skipdit.models.dit import DiT
from skipdit.pipelines import ClassToImagePipeline
from skipdit.runs import OwnCache, Runner, before_steps
from skipdit.spectral import jacobian_norms

NUM_PICTURES = 2  # of those sampled, whose Jacobian norms are measured


@dataclass(frozen=True)
class Trajectory:
    """The intermediate results of a run."""

    timesteps: Tensor
    """(steps,)"""
    latents: Tensor
    """(steps + 1, batch, ...): before each step and at the end, in float32"""
    features: Tensor
    """(steps, batch, tokens, dim): the output of the last unit, or what a cache used in its place"""
    compute_ratio: float = 1.0
    """FLOPs of as many full steps divided by those of the run"""


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine similarity (...) over the channels of each token (... tokens dim), averaged over tokens, in
    float32."""
    return F.cosine_similarity(first.float(), second.float(), dim=-1).mean(dim=-1)


def sample_run(runner: Runner, method: CacheMethod | None = None) -> Trajectory:
    """Sample once, with or without a cache, and keep the intermediate results. runner: as `Runner.of_latents` makes."""
    pipeline, head = runner.pipeline, "final_layer"
    before: list[Tensor] = []
    features: list[Tensor] = []

    def observe(output: Tensor, sample: Tensor) -> None:
        before.append(sample)
        features.append(head_inputs[head][-1])  # within a step a cache may leave units out, or call the model twice

    with (
        record_inputs(pipeline.transformer, [head], lambda inputs: inputs[0].detach().float()) as head_inputs,
        before_steps(pipeline.scheduler, observe),
    ):
        result = runner(method and OwnCache(method))
    latents = torch.stack([*before, result.samples.to(before[0].device).float()])
    timesteps = pipeline.scheduler.timesteps.float().cpu()
    return Trajectory(timesteps, latents, torch.stack(features), result.compute_ratio)


def similarity_over_steps(runner: Runner) -> tuple[Tensor, Tensor, Tensor]:
    """Return the timesteps (steps - 1,), the cosine similarity (num_units, steps - 1) of each unit's output to its
    output one step before, and that of the last unit's outputs for all pairs of steps (steps, steps). Similarities are
    means over tokens and pictures.
    """
    pipeline = runner.pipeline
    names = [f"blocks.{unit}" for unit in range(len(pipeline.transformer.blocks))]
    previous: dict[str, Tensor] = {}
    rows: dict[str, list[float]] = {name: [] for name in names}
    ends: list[Tensor] = []

    def compare(name: str) -> Callable[[Tensor], None]:
        def keep(output: Tensor) -> None:
            if name in previous:
                rows[name].append(cosine_similarity(output, previous[name]).mean().item())
            previous[name] = output.detach()
            if name == names[-1]:
                ends.append(F.normalize(output.detach().float(), dim=-1).flatten(0, 1))

        return keep

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(record_outputs(pipeline.transformer, [name], compare(name)))
        runner()
    stacked = torch.stack(ends)
    pairs = torch.einsum("snd,tnd->st", stacked, stacked) / stacked.shape[1]
    return pipeline.scheduler.timesteps[1:].float().cpu(), torch.tensor([rows[name] for name in names]), pairs.cpu()


# ----------------------------------------------------------------------------------------------------------------------
# Error growth


@dataclass(frozen=True)
class LinearSteps:
    """The steps of a first-order solver, x' = a x + b F(x)."""

    a: list[float]
    """a of each step"""
    b: list[float]
    """b of each step"""

    @classmethod
    def of(cls, pipeline: ClassToImagePipeline, num_inference_steps: int) -> "LinearSteps":
        """Probe a scheduler with ones and zeros. Raises `ValueError` if a step depends on earlier ones or draws
        noise."""
        if getattr(pipeline.scheduler.config, "solver_order", 1) != 1 or "DDPM" in type(pipeline.scheduler).__name__:
            raise ValueError("error growth needs a deterministic first-order sampler: --scheduler euler or ddim")
        factors = []
        for output, sample in ((0.0, 1.0), (1.0, 0.0)):
            scheduler = copy.deepcopy(pipeline.scheduler)
            scheduler.set_timesteps(num_inference_steps)
            shape = (1, pipeline.transformer.config.in_channels, 1, 1)
            outputs, samples = torch.full(shape, output), torch.full(shape, sample)
            steps = [scheduler.step(outputs, timestep, samples).prev_sample for timestep in scheduler.timesteps]
            factors.append([step.flatten()[0].item() for step in steps])
        return cls(*factors)


@dataclass(frozen=True)
class ErrorGrowth:
    """Errors after each step (steps,): root mean squares over pictures, relative to the norm of the full run's
    latents."""

    measured: Tensor
    """distance of the cached run from the full run"""
    injected: Tensor
    """error added by the reuse in this step"""
    predicted: Tensor
    """e' = L e + injected, with L the measured norm of the step's Jacobian"""
    geometric: Tensor
    """(L^t - 1) / (L - 1) x the largest injected error, with the largest L: the form in the paper"""
    feature_similarity: Tensor
    """cosine similarity of the last unit's output to that in the full run"""
    compute_ratio: float
    """FLOPs of as many full steps divided by those of the cached run"""

    def arrays(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if name != "compute_ratio"}


def guided_prediction(runner: Runner, timestep: Tensor) -> Callable[[Tensor], Tensor]:
    """Return F of a step: the guided prediction, without a learned variance, as a function of the latents."""
    model: DiT = runner.pipeline.transformer
    channels, scale = model.config.in_channels, runner.guidance_scale
    assert scale is not None, "a pipeline of ours has no scale of its own"

    def function(latents: Tensor) -> Tensor:
        labels = torch.tensor(runner.conditions, device=latents.device)[: len(latents)]
        if scale <= 1:
            return model(latents, timestep, labels).sample[:, :channels]
        labels = torch.cat([labels, torch.full_like(labels, model.null_class_label)])
        output = model(torch.cat([latents, latents]), timestep, labels).sample[:, :channels]
        return guide(output, scale)

    return function


def step_jacobian_norms(
    runner: Runner,
    full: Trajectory,
    *,
    num_timesteps: int,
    advance: Callable[[], object] = lambda: None,
) -> Tensor:
    """Return the norm L (steps,) of the Jacobian of each solver step along the full run, the largest over
    two pictures. It is measured at `num_timesteps` evenly spread steps; a step between two of them gets the larger
    norm. Calls `advance` after each measurement."""
    num_steps = len(full.timesteps)
    solver = LinearSteps.of(runner.pipeline, num_steps)
    measured_steps = torch.linspace(0, num_steps - 1, min(num_timesteps, num_steps)).round().long().unique().tolist()
    measured_norms = {}
    for step in measured_steps:
        predict = guided_prediction(runner, full.timesteps[step])
        a, b = solver.a[step], solver.b[step]
        norms = jacobian_norms(
            lambda latents, a=a, b=b, predict=predict: a * latents + b * predict(latents),
            full.latents[step, :NUM_PICTURES],
            tolerance=TOLERANCE,
            max_iterations=MAX_ITERATIONS,
        )
        measured_norms[step] = norms.value.max().item()
        advance()
    step_norms = []
    for step in range(num_steps):
        before = max(measured_step for measured_step in measured_steps if measured_step <= step)
        after = min(measured_step for measured_step in measured_steps if measured_step >= step)
        step_norms.append(max(measured_norms[before], measured_norms[after]))
    return torch.tensor(step_norms, dtype=torch.float64)


@torch.no_grad()
def error_growth(runner: Runner, full: Trajectory, step_norms: Tensor, method: CacheMethod) -> ErrorGrowth:
    """Run with the cache, then run the full model on the latents of that run to see what each step adds."""
    cached = sample_run(runner, method)
    solver = LinearSteps.of(runner.pipeline, len(full.timesteps))

    def size(difference: Tensor) -> float:
        return difference.double().flatten(1).norm(dim=1).square().mean().sqrt().item()

    measured, injected, predicted = [], [], []
    bound = 0.0
    for step, timestep in enumerate(full.timesteps):
        predict = guided_prediction(runner, timestep)
        full_step = solver.a[step] * cached.latents[step] + solver.b[step] * predict(cached.latents[step])
        injected.append(size(cached.latents[step + 1] - full_step))
        measured.append(size(cached.latents[step + 1] - full.latents[step + 1]))
        bound = step_norms[step].item() * bound + injected[-1]
        predicted.append(bound)
    largest_norm, largest_error = step_norms.max().item(), max(injected)
    first = next((step for step, error in enumerate(injected) if error > 1e-6 * (1 + largest_error)), len(injected))
    geometric, total = [], 0.0
    for step in range(len(injected)):
        total = largest_norm * total + largest_error if step >= first else 0.0
        geometric.append(total)
    scale = torch.tensor([size(latents) for latents in full.latents[1:]], dtype=torch.float64)
    relative_errors = [
        torch.tensor(errors, dtype=torch.float64) / scale for errors in (measured, injected, predicted, geometric)
    ]
    similarity = cosine_similarity(full.features, cached.features).mean(dim=-1)
    return ErrorGrowth(*relative_errors, feature_similarity=similarity.cpu(), compute_ratio=cached.compute_ratio)
