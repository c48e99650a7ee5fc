"""Class-to-video: our Latte on clips with or without classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from skipdit.diffusion import Objective
from skipdit.interfaces import Fields
from skipdit.models.inflate import inflate_latte, resize_grid
from skipdit.models.latte import Latte
from skipdit.pipelines import ClassToVideoPipeline, SamplingOptions
from skipdit.tasks.class_to_image import load_pictures_pipeline
from skipdit.tasks.config import VideoModelConfig as VideoModelConfig
from skipdit.tasks.labels import LabelTask, LabelTraining
from skipdit.tasks.training import Items


@dataclass(frozen=True)
class ClassToVideoTraining(LabelTraining):
    """A Latte that learns clips, and single pictures beside them (joint training, arXiv 2401.03048, 3.3). A sample with
    pictures has the class of the clip and that of each picture."""

    def call(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Tensor, **plan: Any) -> Any:
        arguments: Fields = {} if conditions.ndim == 1 else {"num_images": conditions.shape[1] - 1}
        if self.knows_classes and conditions.ndim == 1:
            arguments = {"class_labels": conditions}
        elif self.knows_classes:
            arguments |= {"class_labels": conditions[:, 0], "image_class_labels": conditions[:, 1:]}
        return model(noisy, timesteps, **arguments, **plan)


class ClassToVideo(LabelTask):
    """Clips of given classes, or of none."""

    name = "class-to-video"
    num_samples, batch_size, is_video = 4, 4, True
    pipeline_name, pipeline_class = "ClassToVideoPipeline", ClassToVideoPipeline
    model_class, model_config, training = Latte, VideoModelConfig, ClassToVideoTraining

    def sample(
        self, pipeline: ClassToVideoPipeline, conditions: Sequence[int | None], options: SamplingOptions
    ) -> Tensor:
        labels = [label for label in conditions if label is not None] or None  # None for each: the unconditional model
        return pipeline(labels, num_videos=len(conditions), output_type="pt", **vars(options)).frames.float()

    def make(self, config: VideoModelConfig, items: Items, objective: Objective) -> Latte:
        arguments = self.arguments(config, items, objective)
        if not config.conditional:
            arguments["num_classes"] = None
        model = Latte(num_frames=cast(int, items.num_frames), **arguments)
        if config.inflate is not None:
            pictures = load_pictures_pipeline(config.inflate)
            labels = pictures.labels
            rows = {row: labels[name] for row, name in enumerate(items.label_names) if name in labels}
            inflate_latte(model, pictures.transformer, rows)
        return model

    def fit(self, start: Latte, items: Items) -> None:
        resize_grid(start, sample_size=items.size, num_frames=cast(int, items.num_frames))


TASK = ClassToVideo()
