"""The sizes of the models that `skipdit train` builds, one class per task; nothing heavy is imported.

`Task.build` makes a model from them.
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from skipdit.interfaces import Fields
from skipdit.models.pairing import LongSkipConfig
from skipdit.options import check_above, check_fields, check_range
from skipdit.tasks import TASKS

if TYPE_CHECKING:
    from torch import nn

    from skipdit.options.objective import Objective
    from skipdit.tasks.task import Task
    from skipdit.tasks.training import Items, TrainingTask

FRESH = {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "patch_size": 8}  # of a new model
NOT_OF_A_START = ("long_skip", "conditional")  # fields in which a model to start from may differ


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The sizes that the models of all tasks have. Abstract.

    `None` takes the size of the model to start from, or a default if there is none; any other value must equal the
    former.
    """

    num_layers: int | None = None
    """number of blocks (12 in a new model); for class-to-video two blocks are a pair of space and time, for
    text-to-video one is"""
    num_attention_heads: int | None = None
    """heads per block (6 in a new model)"""
    attention_head_dim: int | None = None
    """width of a head (64 in a new model)"""
    patch_size: int | None = None
    """side in pixels of the square that becomes a token (8 in a new model)"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, *FRESH)

    @property
    def task(self) -> "Task":
        """The task whose models these are."""
        return next(task for task in TASKS.values() if task.model_config is type(self))

    def sizes(self) -> Fields:
        """Return the sizes of a new model."""
        sizes = {name: getattr(self, name) for name in FRESH}
        return {name: default if sizes[name] is None else sizes[name] for name, default in FRESH.items()}

    def check_sizes(self, start: Fields) -> None:
        """Raise `ValueError` if a model to start from, with this config, has other sizes than these."""
        sizes = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in NOT_OF_A_START}
        wrong = [name for name, value in sizes.items() if value is not None and value != start.get(name)]
        if wrong:
            named = ", ".join(f"{name} {start.get(name)}, not {sizes[name]}" for name in wrong)
            raise ValueError(f"start_from has {named}: give model.{wrong[0]} that value or None")

    def build(self, items: "Items", objective: "Objective", start: "nn.Module | None" = None) -> "TrainingTask[Any]":
        """Call `Task.build` of this config's task."""
        return self.task.build(self, items, objective, start)


@dataclass(frozen=True, kw_only=True)
class LinkedConfig(TransformerConfig):
    """The sizes of a model to which skipdit adds long skips. Abstract."""

    long_skip: LongSkipConfig | None = field(default_factory=LongSkipConfig)
    """long skips to add if the model has none; None adds none"""


@dataclass(frozen=True, kw_only=True)
class LabelModelConfig(LinkedConfig):
    """The sizes of a model of skipdit, which knows classes. Abstract."""

    qk_norm: bool | None = None
    """normalize the queries and keys of each head, which keeps attention stable at high learning rates; None: not in a
    new model"""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(LabelModelConfig):
    """The sizes of a DiT; classes and pixels come from the data."""


@dataclass(frozen=True, kw_only=True)
class VideoModelConfig(LabelModelConfig):
    """The sizes of a Latte; classes, frames and pixels come from the data."""

    inflate: str | None = None
    """start from the spatial weights of this class-to-image model (`emoji` or the folder of a pipeline): from its
    outermost blocks, one per pair; the temporal blocks start as the identity, so at first each frame is a picture of
    its own"""
    conditional: bool = True
    """learn the classes; without, the model draws clips like any of the data"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inflate is not None and not self.conditional:
            raise ValueError("inflate needs a conditional model, because a class-to-image model knows classes")


@dataclass(frozen=True, kw_only=True)
class TextToImageModelConfig(TransformerConfig):
    """The sizes of a HunyuanDiT, which has long skips of its own: all pairs but the two middle blocks."""

    mlp_ratio: float | None = None
    """hidden size of the MLP over that of the block (4 in a new model)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above(self, "mlp_ratio")


@dataclass(frozen=True, kw_only=True)
class TextToVideoModelConfig(LinkedConfig):
    """The sizes of diffusers' LatteTransformer3DModel with long skips."""

    inflate: str | None = None
    """start from the weights of this class-to-image model, as for class-to-video; text and time have no effect at
    first"""


MODEL_CONFIGS = (ModelConfig, VideoModelConfig, TextToImageModelConfig, TextToVideoModelConfig)
