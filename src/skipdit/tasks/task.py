"""The interface of a task, and how its pipelines are sampled, saved and opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from skipdit.checkpoints.parts import downsampling, part_class, read_autoencoder, read_scheduler
from skipdit.diffusion import make_scheduler, objective_of
from skipdit.files.untrusted import printable
from skipdit.interfaces import VAE, Fields, Pipeline, Scheduler, Transformer
from skipdit.models.surgery import open_units
from skipdit.options.objective import Objective
from skipdit.pipelines import SamplingOptions

if TYPE_CHECKING:
    from skipdit.tasks.config import TransformerConfig
    from skipdit.tasks.training import Items, TrainingTask

LabelNames = dict[str, str] | None  # by class number, `None` for a task or data without


def learns_variance(model: Transformer) -> bool:
    """Return True if half of the output is the variance, as in the official models, which predict epsilon on a ddpm
    process."""
    return model.config.out_channels == 2 * model.config.in_channels


class Chosen(NamedTuple):
    """The conditions to sample (class numbers, `None` or prompts), and one caption for each."""

    conditions: list[Any]
    captions: list[str]


class RunDefaults(NamedTuple):
    """How a pipeline is run if nothing else is asked for."""

    num_inference_steps: int = 50
    guidance_scale: float | None = 2.0
    """`None` if the pipeline has no scale to set, but guides in a way of its own"""


def spread(count: int, total: int) -> list[int]:
    """Return `count` evenly spaced numbers from 0 to `total - 1`."""
    return [index * total // count for index in range(count)]


def choose_prompts(prompts: Sequence[str], count: int | None, what: str) -> Chosen:
    """Return prompts in turn, or all of them without a count. `ValueError` if there are none. what: needs them."""
    if not prompts:
        raise ValueError(f"a {what} needs --prompt, got none")
    chosen = list(prompts if count is None else islice(cycle(prompts), count))
    return Chosen(chosen, chosen)


class Task:
    """Everything specific to one task. Abstract; each module of a task in this folder defines one, `TASK`."""

    name: ClassVar[str]
    """as on the command line"""
    option: ClassVar[str]
    """the option of `skipdit sample` for its conditions"""
    num_samples: ClassVar[int]
    """default number of samples"""
    batch_size: ClassVar[int]
    """default batch size for a set of samples"""
    is_video: ClassVar[bool]
    """whether samples are clips"""
    pipeline_name: ClassVar[str]
    """class name of its pipelines, as in `model_index.json`"""
    model_class: ClassVar[type[nn.Module]]
    """class of its transformers"""
    model_config: ClassVar[type["TransformerConfig"]]
    """the sizes from which `skipdit train` builds one"""
    training: ClassVar[type["TrainingTask[Any]"]]
    """how a batch reaches one in training"""
    has_own_pipeline: ClassVar[bool]
    """whether its pipeline is one of skipdit's: these take any autoencoder, can guide only some channels, pass a
    learned variance to the scheduler, and need only a transformer and its objective"""

    def choose(
        self, pipeline: Pipeline, options: Mapping[str, Sequence[str]], count: int | None, showcase: Sequence[str] = ()
    ) -> Chosen:
        """Return the conditions of `count` samples: the requested ones in turn, or else those of `showcase`, or else
        some of all that the model knows. Without a count, return all requested ones, or all that it knows.

        options: the values of each option of `skipdit sample` for conditions. `ValueError` if another option than this
        task's has values, or there are more values than samples.
        """
        for option, values in options.items():
            if values and option != self.option:
                raise ValueError(f"a {self.name} model takes --{self.option}, not --{option}")
        values = options.get(self.option, ())
        if count is not None and len(values) > count:
            raise ValueError(f"num_samples must be at least the number of --{self.option}, {len(values)}, got {count}")
        return self.choose_from(pipeline, values, count, showcase)

    def choose_from(
        self, pipeline: Pipeline, values: Sequence[str], count: int | None, showcase: Sequence[str]
    ) -> Chosen:
        """Return the conditions for the values of this task's option; see `choose`."""
        raise NotImplementedError

    def count_of(self, num_conditions: int) -> int:
        """Return how many samples are made by default. num_conditions: values of its option."""
        return self.num_samples

    def fits(self, transformer: nn.Module) -> bool:
        """Return True if a transformer is one of this task's."""
        return isinstance(transformer, self.model_class)

    def replace_scheduler(self, pipeline: Pipeline, name: str) -> None:
        """Give a pipeline another scheduler for its objective. `ValueError` if there is none of that name."""
        objective = objective_of(pipeline.scheduler)
        is_epsilon = self.has_own_pipeline and objective.prediction_type == "epsilon"
        learned = is_epsilon and learns_variance(pipeline.transformer)
        pipeline.scheduler = make_scheduler(replace(objective, learned_variance=learned), name)

    def run_defaults(self, pipeline: Pipeline) -> RunDefaults:
        """Return the number of steps and the guidance scale of a run by default."""
        return RunDefaults()

    def num_classes(self, pipeline: Pipeline) -> int | None:
        """Return the number of classes that a model can be asked for; `None` if it knows none."""
        return None

    def check_installed(self) -> None:
        """Raise `ValueError`, with the command to install it, if an optional package that the task needs is missing."""

    def sample(self, pipeline: Pipeline, conditions: Sequence[Any], options: SamplingOptions) -> Tensor:
        """Return pictures (b c h w) or clips (b f c h w) in [0, 1], one per condition."""
        raise NotImplementedError

    def picture_size(self, pipeline: Pipeline) -> int:
        """Return the side, or the shorter side, of what a pipeline makes in pixels."""
        scale = 1 if pipeline.vae is None else downsampling(pipeline.vae)
        return pipeline.transformer.config.sample_size * scale

    def sampler(
        self, transformer: Transformer, scheduler: Scheduler, vae: VAE = None, names: LabelNames = None
    ) -> "Sampler":
        """Return the sampler of a pipeline around a transformer. names: of its classes."""
        raise NotImplementedError

    def open(self, folder: Path, transformer: Transformer, index: Fields, dtype: torch.dtype) -> "Sampler":
        """Return the sampler of the pipeline in a folder, around its transformer. index: its `model_index.json`.

        `ValueError` names the folder if something in it is missing, foreign or broken.
        """
        if not self.fits(transformer):
            raise ValueError(
                f"{printable(folder)} is not a complete {self.pipeline_name}: its transformer is of another class"
            )
        label_names = self.read_label_names(folder, transformer, index)
        vae = None if part_class(index, "vae", folder) is None else read_autoencoder(folder / "vae", dtype)
        scheduler_class = part_class(index, "scheduler", folder)
        if scheduler_class is None:
            raise ValueError(f"{printable(folder)} is not a complete {self.pipeline_name}: it has no scheduler")
        return self.sampler(transformer, read_scheduler(folder, scheduler_class), vae, label_names)

    def read_label_names(self, folder: Path, transformer: Transformer, index: Fields) -> LabelNames:
        """Return the class names of a pipeline. `ValueError` if this task does not support the pipeline."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    def build(
        self, config: "TransformerConfig", items: "Items", objective: Objective, start: Transformer | None = None
    ) -> "TrainingTask[Any]":
        """Return the task in training, with `start` or a new model, and with the long skips that the config asks for if
        the model has none. `ValueError` if the data or `start` do not belong to this task, or do not fit."""
        self.check_items(items)
        self.check_installed()
        if start is None:
            model = self.make(config, items, objective)
        else:
            self.check_start(start, items)
            config.check_sizes(start.config)
            model = start
            self.fit(model, items)
        open_model = open_units(model)
        self.link(config, open_model)
        return self.training(self, open_model, items)

    def make(self, config: Any, items: "Items", objective: Objective) -> nn.Module:
        """Return a new model for these data, of the sizes in `config`, which is a `model_config`."""
        raise NotImplementedError

    def fit(self, start: Transformer, items: "Items") -> None:
        """Resize a model to these data, in place. `ValueError` if it cannot be resized."""
        raise NotImplementedError

    def link(self, config: Any, model: nn.Module) -> None:
        """Add the long skips that the config asks for, if the model has none."""

    def check_items(self, items: "Items") -> None:
        """Raise `ValueError` if a task that learns pictures is given clips, or the other way round."""
        if (items.num_frames is None) == self.is_video:
            what, config = ("clips", "a ClipConfig") if self.is_video else ("pictures", "a DataConfig")
            raise ValueError(f"a {self.name} model trains on {what}: give it {config}, or latents of {what}")

    def check_start(self, start: Transformer, items: "Items") -> None:
        """Raise `ValueError` if the model to start from is of another class, or has other channels than the data."""
        num_channels = start.config.in_channels
        if not self.fits(start) or num_channels != items.num_channels:
            expected = f"a {self.model_class.__name__} of {items.num_channels} channels"
            raise ValueError(f"start_from must be {expected}, got a {type(start).__name__} of {num_channels}")


@dataclass(frozen=True)
class Sampler:
    """A pipeline, of diffusers or of skipdit, that is sampled by its task."""

    task: Task
    pipeline: Pipeline

    @property
    def picture_size(self) -> int:
        """Return the side of what it makes in pixels."""
        return self.task.picture_size(self.pipeline)

    def sample(self, conditions: Sequence[Any], **options: Any) -> Tensor:
        """Return pictures (b c h w) or clips (b f c h w) in [0, 1], one per condition: a class number, `None` for a
        model without classes, or a prompt. options: the fields of `SamplingOptions`."""
        return self.task.sample(self.pipeline, conditions, SamplingOptions(**options))

    def save(self, folder: Path, max_shard_size: str) -> None:
        """Write the parts that exist; diffusers' text pipelines themselves would complain about absent ones."""
        self.pipeline.save_config(folder)
        self.pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
        self.pipeline.scheduler.save_pretrained(folder / "scheduler")
        if self.pipeline.vae is not None:
            self.pipeline.vae.save_pretrained(folder / "vae")
