"""A task in training: how a batch reaches the model."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from diffusers import SchedulerMixin
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.data import Dataset

from skipdit.data.clips import ClipConfig, LabelledClips, open_clips
from skipdit.data.latents import LabelledLatents, LatentConfig, PlannedLatents, is_latents, open_latents
from skipdit.data.pictures import DataConfig, Draws, LabelledPictures, open_pictures
from skipdit.diffusion import SCHEDULERS, Objective, make_scheduler
from skipdit.files.untrusted import printable_path
from skipdit.models.forward_plan import PLAIN, ForwardPlan, Stored
from skipdit.models.long_skip import LongSkipConfig, LongSkipModel, PlannedOutput
from skipdit.models.surgery import add_long_skips
from skipdit.tasks.config import LinkedConfig
from skipdit.tasks.task import Sampler, Task

LOGGER = logging.getLogger(__name__)

Items = LabelledPictures | LabelledClips | LabelledLatents | PlannedLatents
Conditions = TypeVar("Conditions")


def open_items(config: DataConfig | ClipConfig | LatentConfig) -> Items:
    """Return the pictures, clips or latents that a config names."""
    if isinstance(config, LatentConfig):
        return open_latents(config)
    if is_latents(Path(config.source)):
        raise ValueError(f"{printable_path(config.source)} holds latents: give it to a recipe of latents")
    return open_clips(config) if isinstance(config, ClipConfig) else open_pictures(config)


@dataclass(frozen=True)
class StoredItems(Dataset[tuple[Tensor, Any]]):
    """Items as they are stored, in bytes where they are pixels, each with its class or its number."""

    items: Items
    """pictures, clips or latents"""
    numbered: bool
    """whether an item comes with its number, not with its class"""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        stored, label = self.items.stored(index)
        return stored, index if self.numbered else label


# ----------------------------------------------------------------------------------------------------------------------
# A model and its data


@dataclass(frozen=True)
class TrainingTask(Generic[Conditions]):
    """A model in training, and how a batch reaches it. Abstract.

    `Conditions` are those of a batch, some of them left out, as guidance needs it.
    """

    task: Task
    """what the model learns"""
    model: LongSkipModel
    """a transformer with units"""
    items: Items
    """what it learns from"""

    @property
    def data(self) -> StoredItems:
        """Return what a step draws from: items as they are stored, and what `draw_conditions` takes of each."""
        return StoredItems(self.items, numbered=False)

    @property
    def vae(self) -> Any:
        """Return what decodes latents, on the device of the model; `None` for pixels."""
        vae: Any = self.items.vae
        return None if vae is None else vae.to(next(self.model.parameters()).device)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of a picture, or of each frame."""
        return (self.items.size // self.model.config.patch_size) ** 2

    def prepare(self, device: torch.device) -> None:
        """Compute on a device what all steps need there, which the first step would else compute."""

    def draw_conditions(self, given: Tensor, dropout: float, draws: Draws) -> Conditions:
        """Return what a batch is learned with, of which a share is left out as chance has it.

        given (b) or (b n): what `data` has of each item, on the device of the batch.
        """
        raise NotImplementedError

    def predict(
        self,
        model: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        *,
        plan: ForwardPlan = PLAIN,
        stored: Stored | None = None,
    ) -> Tensor:
        """Return the prediction for pixels (b c h w) or (b f c h w) by `model`, which is `self.model` or wraps it.

        plan, stored: of the model's forward.
        """
        output = self.call(model, noisy, timesteps, conditions, plan=plan, stored=stored)
        return self.prediction(output.output.sample if isinstance(output, PlannedOutput) else output.sample)

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, **plan: Any) -> Any:
        """Call the model; plan: handed on to its forward."""
        raise NotImplementedError

    def prediction(self, sample: Tensor) -> Tensor:
        """Return the part of a model's output that the loss looks at."""
        return sample

    def showcase(self, count: int) -> tuple[list[Any], list[str]]:
        """Return conditions and captions to sample, spread over the data."""
        raise NotImplementedError

    def sampler(self, model: nn.Module, scheduler: SchedulerMixin) -> Sampler:
        """Return what samples a trained model."""
        names = {str(label): name for label, name in enumerate(self.items.label_names)}
        return self.task.sampler(model, scheduler, self.vae, names)


def draw_dropped(given: Tensor, share: float, draws: Draws) -> Bool[Tensor, " batch"]:
    """Draw for each item of a batch whether its condition is left out, on the device of what is given."""
    return (draws.rand() < share).to(given.device, non_blocking=True)


def make_task_scheduler(objective: Objective) -> SchedulerMixin:
    """Return the first scheduler of the objective's process."""
    return make_scheduler(objective, SCHEDULERS[objective.process][0])


def add_missing_links(model: Any, config: LinkedConfig) -> None:
    """Add the long skips that a config asks for to a model that has none."""
    existing = model.config.get("long_skip")
    if existing and config.long_skip is not None and LongSkipConfig.from_dict(existing) != config.long_skip:
        LOGGER.warning("start_from has long skips already, which stay: model.long_skip has no effect")
    if config.long_skip is not None and not existing:
        add_long_skips(model, config.long_skip)


def refuse_other_grid(start: Any, **sizes: int | None) -> None:
    """Raise `ValueError` where a model of diffusers was made for other sizes than those of the data."""
    for name, size in sizes.items():
        if (own := start.config[name]) != size:
            raise ValueError(f"start_from has {name} {own}, the data {size}: a {type(start).__name__} is not resized")
