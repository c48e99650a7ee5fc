"""A task in training: which model a run builds, and how a batch reaches it."""

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

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
from skipdit.models.surgery import add_long_skips, open_units
from skipdit.options import check_fields, check_range
from skipdit.tasks import TASKS
from skipdit.tasks.task import Sampler, Task

LOGGER = logging.getLogger(__name__)

FRESH = {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "patch_size": 8}  # of a new model
NOT_OF_A_START = ("long_skip", "conditional")  # fields of a config that a model to go on from may differ in

Items = LabelledPictures | LabelledClips | LabelledLatents | PlannedLatents
Conditions = TypeVar("Conditions")


def open_items(config: DataConfig | ClipConfig | LatentConfig) -> Items:
    """Open the pictures, clips or latents of a config."""
    if isinstance(config, LatentConfig):
        return open_latents(config)
    if is_latents(Path(config.source)):
        raise ValueError(f"{printable_path(config.source)} contains latents: give it to a recipe for latents")
    return open_clips(config) if isinstance(config, ClipConfig) else open_pictures(config)


@dataclass(frozen=True)
class StoredItems(Dataset[tuple[Tensor, Any]]):
    """Items as stored (pixels as uint8), each with its class or its index."""

    items: Items
    """pictures, clips or latents"""
    numbered: bool
    """whether items come with their index instead of their class"""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        stored, label = self.items.stored(index)
        return stored, index if self.numbered else label


# ----------------------------------------------------------------------------------------------------------------------
# A model and its data


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
    def vae(self) -> Any:
        """The autoencoder of latents, on the device of the model; `None` for pixels."""
        vae: Any = self.items.vae
        return None if vae is None else vae.to(next(self.model.parameters()).device)

    @property
    def num_tokens(self) -> int:
        """The number of tokens per picture or frame."""
        return (self.items.size // self.model.config.patch_size) ** 2

    def prepare(self, device: torch.device) -> None:
        """Compute what all steps need on a device in advance; otherwise the first step would."""

    def draw_conditions(self, given: Tensor, dropout: float, draws: Draws) -> Conditions:
        """Return the conditions of a batch, each dropped with probability `dropout`.

        given: (b) or (b n), the class or index of each item in `data`, on the device of the batch.
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
        return self.prediction(output.output.sample if isinstance(output, PlannedOutput) else output.sample)

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


def draw_dropped(given: Tensor, share: float, draws: Draws) -> Bool[Tensor, " batch"]:
    """Return, per item of a batch, whether its condition is dropped, on the device of `given`."""
    return (draws.rand() < share).to(given.device, non_blocking=True)


def make_task_scheduler(objective: Objective) -> SchedulerMixin:
    """Return the first scheduler of the objective's process."""
    return make_scheduler(objective, SCHEDULERS[objective.process][0])


# ----------------------------------------------------------------------------------------------------------------------
# What a run builds


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The sizes that the models of all tasks have. Abstract.

    A size that is `None` is that of the model to go on from, or a default where there is none; one that is given must
    be that of the former.
    """

    training: ClassVar[type[TrainingTask[Any]]]
    """how a batch reaches the model"""
    num_layers: int | None = None
    """blocks (12 in a fresh model); for class-to-video two are a pair of space and time, for text-to-video one is"""
    num_attention_heads: int | None = None
    """of each block (6 in a fresh model)"""
    attention_head_dim: int | None = None
    """width of a head (64 in a fresh model)"""
    patch_size: int | None = None
    """side in pixels of the square that becomes a token (8 in a fresh model)"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, *FRESH)

    @property
    def task(self) -> Task:
        """Return the task whose models these are."""
        return next(task for task in TASKS.values() if task.model_config is type(self))

    def sizes(self) -> dict[str, Any]:
        """Return the sizes of a fresh model."""
        given = {name: getattr(self, name) for name in FRESH}
        return {name: default if given[name] is None else given[name] for name, default in FRESH.items()}

    def build(self, items: Items, objective: Objective, start: nn.Module | None = None) -> TrainingTask[Any]:
        """Return the task in training: of `start` or of a fresh model, with the long skips that the config asks for
        where it has none. `ValueError` where the data or `start` are not of this task, or do not fit."""
        self.check_items(items)
        self.task.check_installed()
        if start is None:
            model = self.make(items, objective)
        else:
            self.check_start(start, items)
            self.check_sizes(start)
            model = start
            self.fit(model, items)
        open_units(model)
        self.link(model)
        return self.training(self.task, cast(LongSkipModel, model), items)

    def make(self, items: Items, objective: Objective) -> nn.Module:
        """Return a fresh model for these data."""
        raise NotImplementedError

    def fit(self, start: Any, items: Items) -> None:
        """Resize a model to these data, in place. `ValueError` where it cannot be."""
        raise NotImplementedError

    def link(self, model: nn.Module) -> None:
        """Add the long skips that the config asks for, where the model has none."""

    def check_items(self, items: Items) -> None:
        """Raise `ValueError` where a task that learns pictures is given clips, or the other way round."""
        if (items.num_frames is None) == self.task.is_video:
            what, config = ("clips", "a ClipConfig") if self.task.is_video else ("pictures", "a DataConfig")
            raise ValueError(f"a {self.task.name} model trains on {what}: give it {config}, or latents of {what}")

    def check_start(self, start: Any, items: Items) -> None:
        """Raise `ValueError` where the model to go on from is of another class, or of other channels than the data."""
        config, model_class = start.config, self.task.model_class
        if not isinstance(start, model_class) or config.in_channels != items.num_channels:
            expected = f"a {model_class.__name__} of {items.num_channels} channels"
            raise ValueError(f"start_from must be {expected}, got a {type(start).__name__} of {config.in_channels}")

    def check_sizes(self, start: Any) -> None:
        """Raise `ValueError` where the model to go on from is of other sizes than are asked for."""
        config = start.config
        asked = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in NOT_OF_A_START}
        wrong = [name for name, value in asked.items() if value is not None and value != config.get(name)]
        if wrong:
            named = ", ".join(f"{name} {config.get(name)}, not {asked[name]}" for name in wrong)
            raise ValueError(f"start_from has {named}: give model.{wrong[0]} that value or None")


@dataclass(frozen=True, kw_only=True)
class LinkedConfig(TransformerConfig):
    """The sizes of a model that gets long skips. Abstract."""

    long_skip: LongSkipConfig | None = field(default_factory=LongSkipConfig)
    """of a model that has none yet, None for none"""

    def link(self, model: Any) -> None:
        own = model.config.get("long_skip")
        if own and self.long_skip is not None and LongSkipConfig.from_dict(own) != self.long_skip:
            LOGGER.warning("start_from has long skips of its own, which stay: model.long_skip has no effect")
        if self.long_skip is not None and not own:
            add_long_skips(model, self.long_skip)


def refuse_other_grid(start: Any, **sizes: int | None) -> None:
    """Raise `ValueError` where a model of diffusers was made for other sizes than those of the data."""
    for name, size in sizes.items():
        if (own := start.config[name]) != size:
            raise ValueError(f"start_from has {name} {own}, the data {size}: a {type(start).__name__} is not resized")
