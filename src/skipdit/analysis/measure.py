"""All measurements of one model, as arrays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipdit.analysis.config import AnalyzeConfig
from skipdit.analysis.jacobian import JacobianProfile, jacobian_profile
from skipdit.analysis.surface import Quantity, perturbation_surface
from skipdit.analysis.trajectory import (
    NUM_PICTURES,
    ErrorGrowth,
    Trajectory,
    error_growth,
    sample_run,
    similarity_over_steps,
    step_jacobian_norms,
)
from skipdit.analysis.weights import LongSkipSpectrum, TrainingLog, layer_norms, long_skip_spectra
from skipdit.cache.methods import parse_method
from skipdit.cache.runtime import rules_on
from skipdit.diffusion import make_scheduler, objective_of
from skipdit.models.dit import DiT
from skipdit.pipelines import ClassToImagePipeline
from skipdit.runs import Runner
from skipdit.tasks.task import spread


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All results for one model. Timesteps decrease from 1000 to 0, as in sampling."""

    num_units: int
    num_parameters: int
    num_pairs: int
    """number of linked pairs of units"""
    timesteps: NDArray
    """(steps,)"""
    similarity: NDArray
    """(num_units, steps - 1): similarity of a unit's output to its output one step before, at `timesteps[1:]`"""
    similarity_of_steps: NDArray
    """(steps, steps): similarity of the last unit's outputs for all pairs of steps"""
    jacobians: Mapping[float, JacobianProfile]
    """by timestep"""
    step_norms: NDArray
    """(steps,): norms of the Jacobians of the solver's steps"""
    growth: Mapping[str, ErrorGrowth]
    """by method"""
    left_out: Mapping[str, str]
    """methods that the model cannot use, and why"""
    surfaces: Mapping[tuple[str, int], NDArray]
    """by perturbed quantity (weights or inputs) and timestep"""
    long_skips: Mapping[int, LongSkipSpectrum]
    """by target unit"""
    layer_norms: Mapping[str, Tensor]
    """(num_units,) by kind of layer"""
    log: TrainingLog | None = field(default=None)

    def arrays(self) -> dict[str, NDArray]:
        """Return all arrays under flat names, for an NPZ file."""
        arrays = {
            "timesteps": self.timesteps,
            "similarity": self.similarity,
            "similarity_of_steps": self.similarity_of_steps,
            "step_norms": self.step_norms,
            "jacobian_timesteps": np.array(list(self.jacobians)),
        }
        for name in ("units", "bounds", "first_half", "second_half", "model"):
            arrays[f"jacobian_{name}"] = np.array([getattr(profile, name) for profile in self.jacobians.values()])
        for method, growth in self.growth.items():
            arrays |= {f"growth/{method}/{name}": tensor.numpy() for name, tensor in growth.arrays().items()}
        arrays |= {f"surface/{quantity}/{timestep}": grid for (quantity, timestep), grid in self.surfaces.items()}
        for target, spectrum in self.long_skips.items():
            arrays |= {f"singular_values/{target}/{name}": tensor.numpy() for name, tensor in vars(spectrum).items()}
        arrays |= {f"layer_norms/{name}": tensor.numpy() for name, tensor in self.layer_norms.items()}
        if self.log is not None:
            arrays |= {f"training/{name}": tensor.numpy() for name, tensor in vars(self.log).items()}
        return arrays


def runner_of(config: AnalyzeConfig, pipeline: ClassToImagePipeline) -> Runner:
    """Return what makes a model's runs. Raises `ValueError` if the model lacks one of the labels."""
    num_classes = pipeline.transformer.config.num_classes
    for label in config.labels:
        if not 0 <= label < num_classes:
            raise ValueError(f"class labels must be between 0 and {num_classes - 1}, got {label}")
    return Runner.of_latents(
        pipeline,
        config.labels or tuple(spread(config.num_pictures, num_classes)),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale if pipeline.transformer.config.null_class else 1.0,
        seed=config.seed,
    )


def coefficients_of(config: AnalyzeConfig) -> NDArray:
    """Return the coefficients of a surface's directions, in units of the radius."""
    return np.linspace(-1, 1, config.surface_size)


def num_parts(config: AnalyzeConfig, num_units: int) -> int:
    """Return the largest number of times that `measure` calls `advance`."""
    jacobians = config.jacobian_timesteps * (num_units + 3) + config.growth_timesteps
    return 3 + jacobians + len(config.methods) + 2 * len(config.surface_timesteps) * config.surface_size


def measure(
    pipeline: ClassToImagePipeline,
    config: AnalyzeConfig,
    log: TrainingLog | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Measured:
    """Measure one model. Calls `advance` after each part.

    Sampling is deterministic and first-order (Euler or DDIM), whatever the pipeline's scheduler, so that a step is a
    function of the latents alone. The pipeline and its model are left unchanged. Raises `ValueError` if the model
    samples latents that are not finite.
    """
    model = pipeline.transformer
    first_order = ClassToImagePipeline(model, make_scheduler(objective_of(pipeline.scheduler)))
    first_order.set_progress_bar_config(disable=True)
    runner = runner_of(config, first_order)
    labels = torch.tensor(runner.conditions, device=model.device)

    timesteps, similarity, pairs = similarity_over_steps(runner)
    advance()
    full = sample_run(runner)
    if not full.latents.isfinite().all():
        raise ValueError("the model samples latents that are not finite: nothing can be measured along such a run")
    advance()
    jacobians = jacobians_along(model, full, labels, config.jacobian_timesteps, advance)
    num_timesteps = config.growth_timesteps
    step_norms = step_jacobian_norms(runner, full, num_timesteps=num_timesteps, advance=advance)
    growth, left_out = growth_by_method(runner, full, step_norms, config.methods, advance)
    return Measured(
        num_units=len(model.blocks),
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        num_pairs=len(model.long_skip_links.sources),
        timesteps=torch.cat([full.timesteps[:1], timesteps]).numpy(),
        similarity=similarity.numpy(),
        similarity_of_steps=pairs.numpy(),
        jacobians=jacobians,
        step_norms=step_norms.numpy(),
        growth=growth,
        left_out=left_out,
        surfaces=surfaces_of(model, full, labels, config, advance),
        long_skips=long_skip_spectra(model),
        layer_norms=layer_norms(model),
        log=log,
    )


def jacobians_along(
    model: DiT, full: Trajectory, labels: Tensor, num_timesteps: int, advance: Callable[[], object]
) -> dict[float, JacobianProfile]:
    """Return the Jacobian norms of units and halves on two pictures, at timesteps spread evenly over a run."""
    num_steps = len(full.timesteps)
    steps = torch.linspace(0, num_steps - 1, min(num_timesteps, num_steps)).round().long().unique()
    return {
        full.timesteps[step].item(): jacobian_profile(
            model, full.latents[step, :NUM_PICTURES], full.timesteps[step], labels[:NUM_PICTURES], advance=advance
        )
        for step in steps.tolist()
    }


def growth_by_method(
    runner: Runner,
    full: Trajectory,
    step_norms: Tensor,
    methods: Sequence[str],
    advance: Callable[[], object],
) -> tuple[dict[str, ErrorGrowth], dict[str, str]]:
    """Return the errors with each cache, and the reason for each cache that the model cannot use."""
    growth, left_out = {}, {}
    for spec in methods:
        method = parse_method(spec)
        try:
            rules_on(method, runner.pipeline.transformer)
        except ValueError as error:
            left_out[spec] = str(error)
        else:
            growth[spec] = error_growth(runner, full, step_norms, method)
        advance()
    return growth, left_out


def surfaces_of(
    model: DiT, full: Trajectory, labels: Tensor, config: AnalyzeConfig, advance: Callable[[], object]
) -> dict[tuple[str, int], NDArray]:
    """Return a perturbation surface for weights and for inputs at each timestep."""
    radii: dict[Quantity, float] = {"weights": config.weight_radius, "inputs": config.input_radius}
    surfaces: dict[tuple[str, int], NDArray] = {}
    for quantity, radius in radii.items():
        coefficients = (radius * coefficients_of(config)).tolist()
        for timestep in config.surface_timesteps:
            step = int((full.timesteps - timestep).abs().argmin())
            point = full.latents[step], full.timesteps[step], labels
            surface = perturbation_surface(
                model, *point, coefficients, quantity=quantity, seed=config.seed, advance=advance
            )
            surfaces[quantity, timestep] = surface.numpy()
    return surfaces
