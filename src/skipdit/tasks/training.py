"""A task in training: how a batch reaches the model."""

import logging
from collections.abc import Callable
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
from skipdit.files.untrusted import printable_path
from skipdit.interfaces import VAE, Transformer
from skipdit.models.forward_plan import PLAIN, ForwardPlan, Stored
from skipdit.models.long_skip import LongSkipConfig, LongSkipModel
from skipdit.models.surgery import add_long_skips
from skipdit.tasks.config import LinkedConfig
from skipdit.tasks.task import Sampler, Task

LOGGER = logging.getLogger(__name__)

Items = LabelledPictures | LabelledClips | LabelledLatents | PlannedLatents
Conditions = TypeVar("Conditions")
OPENERS: dict[type, Callable[..., Items]] = {
    DataConfig: open_pictures,
    ClipConfig: open_clips,
    LatentConfig: open_latents,
}


def open_items(config: DataConfig | ClipConfig | LatentConfig) -> Items:
    """Open the pictures, clips or latents of a config."""
    if type(config) is not LatentConfig and is_latents(Path(config.source)):
        raise ValueError(f"{printable_path(config.source)} contains latents: give it to a recipe for latents")
    return OPENERS[type(config)](config)


@dataclass(frozen=True)
class StoredItems(Dataset[tuple[Tensor, int | Tensor]]):
    """Items as stored (pixels as uint8), each with its class or its index."""

    items: Items
    """pictures, clips or latents"""
    numbered: bool
    """whether items come with their index instead of their class"""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        stored, label = self.items.stored(index)
        return stored, index if self.numbered else label


@dataclass(frozen=True)
class TrainingTask(Generic[Conditions]):
    """A model in training, and how it is called with a batch. Abstract.

    `Conditions` is the type of a batch's conditions; some of them are dropped, which guidance needs.
    """

    task: Task
    model: LongSkipModel
    """a transformer with units"""
    items: Items
    """the data it learns from"""

    @property
    def data(self) -> StoredItems:
        """The stored items from which steps draw, each with the argument of `draw_conditions`."""
        return StoredItems(self.items, numbered=False)

    @property
    def vae(self) -> VAE:
        """The autoencoder of latents, on the device of the model; `None` for pixels."""
        vae: VAE = self.items.vae
        return None if vae is None else vae.to(next(self.model.parameters()).device)

    @property
    def num_tokens(self) -> int:
        """The number of tokens per picture or frame."""
        return (self.items.size // self.model.config.patch_size) ** 2

    def prepare(self, device: torch.device) -> None:
        """Compute what all steps need on a device in advance; otherwise the first step would."""

    def draw_conditions(self, labels: Tensor, dropout: float, draws: Draws) -> Conditions:
        """Return the conditions of a batch, each dropped with probability `dropout`.

        labels: (b) or (b n), the class or index of each item in `data`, on the device of the batch.
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
        """Return the prediction for noisy inputs (b c h w) or (b f c h w), in their shape. model: `self.model`, or a
        wrapper of it. plan, stored: arguments of its forward.
        """
        output = self.call(model, noisy, timesteps, conditions, plan=plan, stored=stored)
        return self.prediction(output.output.sample if plan.units else output.sample)

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, **plan: Any) -> Any:
        """Return the output of the model. plan: arguments passed on to its forward."""
        raise NotImplementedError

    def prediction(self, sample: Tensor) -> Tensor:
        """Return the part of a model's output that enters the loss."""
        return sample

    def showcase(self, count: int) -> tuple[list[Any], list[str]]:
        """Return conditions and captions to sample, spread over the data."""
        raise NotImplementedError

    def sampler(self, model: nn.Module, scheduler: SchedulerMixin) -> Sampler:
        """Return the sampler of a trained model."""
        names = {str(label): name for label, name in enumerate(self.items.label_names)}
        return self.task.sampler(model, scheduler, self.vae, names)


def draw_dropped(labels: Tensor, share: float, draws: Draws) -> Bool[Tensor, " batch"]:
    """Return, per item of a batch, whether its condition is dropped, on the device of `labels`."""
    return (draws.rand() < share).to(labels.device, non_blocking=True)


def add_missing_links(model: Transformer, config: LinkedConfig) -> None:
    """Add the long skips that a config asks for to a model that has none."""
    existing = model.config.get("long_skip")
    if existing and config.long_skip is not None and LongSkipConfig.from_dict(existing) != config.long_skip:
        LOGGER.warning("start_from has long skips already, which stay: model.long_skip has no effect")
    if config.long_skip is not None and not existing:
        add_long_skips(model, config.long_skip)


def refuse_other_grid(start: Transformer, **sizes: int | None) -> None:
    """Raise `ValueError` where a model of diffusers was made for other sizes than those of the data."""
    for name, size in sizes.items():
        if (own := start.config[name]) != size:
            raise ValueError(f"start_from has {name} {own}, the data {size}: a {type(start).__name__} is not resized")
