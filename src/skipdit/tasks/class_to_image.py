"""Class-to-image: our DiT on pictures with classes."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from diffusers.utils.logging import disable_progress_bar, enable_progress_bar
from torch import Tensor, nn

from skipdit.diffusion import Objective
from skipdit.models.dit import DiT
from skipdit.models.inflate import resize_grid
from skipdit.pipelines import ClassToImagePipeline, SamplingOptions
from skipdit.tasks.config import ModelConfig as ModelConfig
from skipdit.tasks.labels import LabelTask, LabelTraining
from skipdit.tasks.training import Items


@dataclass(frozen=True)
class ClassToImageTraining(LabelTraining):
    """A DiT that learns pictures."""

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Tensor, **plan: Any) -> Any:
        return model(noisy, timesteps, class_labels=conditions, **plan)


class ClassToImage(LabelTask):
    """Pictures of given classes."""

    name = "class-to-image"
    num_samples, batch_size, is_video = 16, 50, False
    pipeline_name, pipeline_class = "ClassToImagePipeline", ClassToImagePipeline
    model_class, model_config, training = DiT, ModelConfig, ClassToImageTraining

    def sample(self, pipeline: ClassToImagePipeline, conditions: Sequence[int], options: SamplingOptions) -> Tensor:
        return pipeline(conditions, output_type="pt", **vars(options)).images.float()

    def make(self, config: ModelConfig, items: Items, objective: Objective) -> DiT:
        return DiT(**self.arguments(config, items, objective))

    def fit(self, start: DiT, items: Items) -> None:
        resize_grid(start, sample_size=items.size)


TASK = ClassToImage()


def load_pictures_pipeline(name: str) -> ClassToImagePipeline:
    """Return the bundled pipeline (`emoji`), or the one in a folder."""
    asset = files("skipdit") / "assets" / "class_to_image"
    disable_progress_bar()
    try:
        with as_file(asset) if name == "emoji" else nullcontext(Path(name)) as folder:
            if not (folder / "model_index.json").is_file():
                raise FileNotFoundError(f"no pipeline at {name}: give emoji or the folder of a class-to-image pipeline")
            return ClassToImagePipeline.from_pretrained(folder)
    finally:
        enable_progress_bar()
