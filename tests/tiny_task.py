"""A task of the tests' own, as CONTRIBUTING says that a new one is made: this file, and a row in the table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipdit.data.pictures import Draws
from skipdit.diffusion import Objective
from skipdit.models.dit import DiT
from skipdit.models.inflate import resize_grid
from skipdit.pipelines import ClassToImagePipeline, SamplingOptions
from skipdit.tasks.config import LinkedConfig
from skipdit.tasks.task import Chosen, LabelNames, Sampler, Task, spread
from skipdit.tasks.training import Items, TrainingTask, draw_dropped

WORDS = ("dull", "vivid")


class WordPipeline(ClassToImagePipeline):
    """Found by its name in a folder."""


@dataclass(frozen=True)
class WordTraining(TrainingTask[Tensor]):
    """Pictures of the first class are dull, all others vivid."""

    def draw_conditions(self, given: Tensor, dropout: float, draws: Draws) -> Tensor:
        return torch.where(draw_dropped(given, dropout, draws), len(WORDS), given.clamp(max=1))

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Tensor, **plan: Any) -> Any:
        return model(noisy, timesteps, class_labels=conditions, **plan)

    def showcase(self, count: int) -> tuple[list[Any], list[str]]:
        words = [WORDS[index] for index in spread(count, len(WORDS))]
        return words, words


@dataclass(frozen=True, kw_only=True)
class WordModelConfig(LinkedConfig):
    """Has no sizes of its own."""


class WordToImage(Task):
    name = "word-to-image"
    option = "prompt"
    num_samples, batch_size, is_video = 3, 2, False
    pipeline_name, has_own_pipeline = "WordPipeline", True
    model_class, model_config, training = DiT, WordModelConfig, WordTraining

    def choose_from(self, pipeline: Any, values: Sequence[str], count: int | None, showcase: Sequence[str]) -> Chosen:
        words = list(values or showcase or WORDS)
        words = words if count is None else list(islice(cycle(words), count))
        return Chosen(words, words)

    def sampler(self, transformer: Any, scheduler: Any, vae: Any = None, names: LabelNames = None) -> Sampler:
        return Sampler(self, WordPipeline(transformer, scheduler, vae))

    def sample(self, pipeline: WordPipeline, conditions: Sequence[str], options: SamplingOptions) -> Tensor:
        labels = [WORDS.index(word) for word in conditions]
        return pipeline(labels, output_type="pt", **vars(options)).images.float()

    def read_label_names(self, folder: Path, transformer: Any, index: Mapping[str, Any]) -> None:
        return None

    def make(self, config: WordModelConfig, items: Items, objective: Objective) -> DiT:
        sizes = {"sample_size": items.size, "in_channels": 3, "out_channels": 3, "num_classes": len(WORDS)}
        return DiT(**sizes, **config.sizes(), long_skip=config.long_skip)

    def fit(self, start: DiT, items: Items) -> None:
        resize_grid(start, sample_size=items.size)


TASK = WordToImage()
