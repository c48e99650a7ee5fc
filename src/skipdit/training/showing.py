"""Sample and release the averaged weights of a run: a whole copy of the model beside the one in training."""

import copy
from collections.abc import Mapping

import torch
from PIL.Image import Image
from torch import Tensor, nn

from skipdit.data.videos import frame_grid
from skipdit.diffusion import make_scheduler
from skipdit.pictures import labelled_grid, to_pictures
from skipdit.spectral import fold_spectral_caps
from skipdit.tasks.task import Sampler
from skipdit.tasks.training import TrainingTask
from skipdit.training.config import TrainConfig

RELEASE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def without_weights(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose parameters have no memory. Call this before a model is compiled or sharded."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty).eval()


def with_weights(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """Return a copy on a device whose parameters are these tensors, by name, not copied if they are already there."""
    replacements = {
        id(parameter): nn.Parameter(weights[name], requires_grad=False) for name, parameter in model.named_parameters()
    }
    return nn.Module.to(copy.deepcopy(model, replacements), device)


def release(model: nn.Module, config: TrainConfig, task: TrainingTask) -> Sampler:
    """Return the sampler of a finished model, with its spectral caps folded into the weights."""
    released = copy.deepcopy(model)
    fold_spectral_caps(released)
    # not model.to: ModelMixin.to warns about every cast
    nn.Module.to(released, RELEASE_DTYPES[config.release_dtype])
    return task.sampler(released, make_scheduler(config.objective))


def draw_samples(model: nn.Module, config: TrainConfig, task: TrainingTask) -> Image:
    """Return a labelled grid of samples, whose conditions are spread over the data, from the run's seed. Of clips, it
    shows some frames."""
    sampler: Sampler = task.sampler(model, make_scheduler(config.objective))
    sampler.pipeline.set_progress_bar_config(disable=True)
    conditions, captions = task.showcase(config.num_samples)
    samples = sampler.sample(
        conditions,
        guidance_scale=config.sample_guidance_scale,
        num_inference_steps=config.num_inference_steps,
        generator=torch.Generator().manual_seed(config.seed),
    ).cpu()
    return frame_grid(samples, captions) if samples.ndim == 5 else labelled_grid(to_pictures(samples), captions)
