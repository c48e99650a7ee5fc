"""Shared code of the class-conditional tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from skipdit.checkpoints.parts import read_labels
from skipdit.data.pictures import Draws
from skipdit.diffusion import Objective
from skipdit.interfaces import VAE, Fields, Scheduler, Transformer
from skipdit.models.dit import PatchTransformer
from skipdit.pipelines import ClassPipeline
from skipdit.tasks.config import LabelModelConfig
from skipdit.tasks.task import Chosen, LabelNames, Sampler, Task, spread
from skipdit.tasks.training import Items, TrainingTask, add_missing_links, draw_dropped


class LabelTask(Task):
    """A class-conditional task, with a pipeline of skipdit. Abstract."""

    option = "labels"
    has_own_pipeline = True
    pipeline_class: ClassVar[type[ClassPipeline]]
    """the class named `pipeline_name`"""

    def choose_from(
        self, pipeline: ClassPipeline, values: Sequence[str], count: int | None, showcase: Sequence[str]
    ) -> Chosen:
        """Return class numbers, or `None` per sample for a model without classes. values: names or numbers of classes;
        `ValueError` if one is unknown."""
        num_classes = self.num_classes(pipeline)
        values = values if count is None else values or showcase
        count = count or len(values) or num_classes or 1
        if num_classes is None:
            if values:
                raise ValueError(f"this model has no classes, got label {values[0]!r}")
            return Chosen([None] * count, [f"clip {number + 1}" for number in range(count)])
        numbers = [label_number(pipeline, value) for value in values] or spread(min(count, num_classes), num_classes)
        conditions = list(islice(cycle(numbers), count))
        names = {number: name for name, number in pipeline.labels.items()}
        return Chosen(conditions, [names.get(number, str(number)) for number in conditions])

    def num_classes(self, pipeline: ClassPipeline) -> int | None:
        return pipeline.transformer.config.num_classes

    def sampler(
        self, transformer: Transformer, scheduler: Scheduler, vae: VAE = None, names: LabelNames = None
    ) -> Sampler:
        names = None if transformer.config.num_classes is None else names
        return Sampler(self, self.pipeline_class(transformer, scheduler, vae, names))

    def read_label_names(self, folder: Path, transformer: Transformer, index: Fields) -> LabelNames:
        return read_labels(index, transformer.config.num_classes, folder)

    def link(self, config: LabelModelConfig, model: nn.Module) -> None:
        add_missing_links(model, config)

    def check_start(self, start: Transformer, items: Items) -> None:
        super().check_start(start, items)
        num_classes, needed = start.config.num_classes, len(items.label_names)
        if num_classes is not None and num_classes < needed:
            raise ValueError(f"start_from knows {num_classes} classes, the data has {needed}")

    def arguments(self, config: LabelModelConfig, items: Items, objective: Objective) -> Fields:
        """Return the arguments of a new model for these data."""
        return {
            "sample_size": items.size,
            "in_channels": items.num_channels,
            "out_channels": items.num_channels * (2 if objective.learned_variance else 1),
            **config.sizes(),
            "num_classes": len(items.label_names),
            "qk_norm": bool(config.qk_norm),
            "long_skip": config.long_skip,
        }


def label_number(pipeline: ClassPipeline, label: str) -> int:
    """Return the number of a class, given its name or number. `ValueError` if there is no such class."""
    if label.isdecimal() and label not in pipeline.labels:
        num_classes = pipeline.transformer.config.num_classes
        if int(label) >= num_classes:
            raise ValueError(f"label numbers go from 0 to {num_classes - 1}, got {label}")
        return int(label)
    return pipeline.get_label_ids([label])[0]


@dataclass(frozen=True)
class LabelTraining(TrainingTask[Tensor]):
    """A class-conditional model in training. Conditions are class numbers (b), or (b n) if samples have several
    pictures; a dropped condition becomes the model's null class. Abstract."""

    model: PatchTransformer

    @property
    def knows_classes(self) -> bool:
        """Whether the model takes classes."""
        return self.model.config.num_classes is not None

    def draw_conditions(self, labels: Tensor, dropout: float, draws: Draws) -> Tensor:
        dropped = draw_dropped(labels, dropout, draws).view(-1, *[1] * (labels.ndim - 1))
        return torch.where(dropped, self.model.null_class_label, labels) if self.knows_classes else labels

    def showcase(self, count: int) -> tuple[list[Any], list[str]]:
        if not self.knows_classes:
            return [None] * count, [""] * count
        chosen = spread(count, len(self.items.label_names))
        return chosen, [self.items.label_names[label] for label in chosen]
