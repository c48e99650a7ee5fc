"""Published pipelines of diffusers with their own text encoders: diffusers opens them, and they are sampled unchanged.

These tasks are not in `TASKS`, because skipdit neither builds nor trains such pipelines. All that they rely on is the
signature of the pipeline's call.
"""

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypedDict

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from skipdit.checkpoints import load_model
from skipdit.checkpoints.parts import INDEX_NAME, find_class
from skipdit.checkpoints.reading import read_config
from skipdit.command_options import PipelineOptions
from skipdit.diffusion import scheduler_like
from skipdit.files.untrusted import as_type, as_type_or_none, printable
from skipdit.interfaces import Fields, Pipeline, Transformer
from skipdit.options import check_installed, check_range
from skipdit.pipelines import SamplingOptions, keep_broken
from skipdit.tasks.task import Chosen, RunDefaults, Sampler, Task, choose_prompts, spread

LIBRARIES = ("diffusers", "transformers")  # allowed for parts, as are the modules of `diffusers.pipelines`
# arguments of pipelines that edit or follow an input
GIVEN = ("image", "images", "video", "control_image", "control_video")
FRAMES = ("num_frames", "video_length", "frames")  # what pipelines of clips call their number
# arguments for the guidance scale: the first whose default is a number is the one that guides
SCALES = ("guidance_scale", "true_cfg_scale", "distilled_guidance_scale")
GUIDERS = ("guider", "ocr_guider")  # parts of pipelines that guide, in place of an argument
ANY_SIZE = 2**16  # stands for the size of pictures if only the pipeline knows it


class Sizes(TypedDict, total=False):
    """The fields read from the config of a pipeline's transformer: sizes that a weight file may not show."""

    num_attention_heads: int
    sample_size: int
    video_length: int


class PublishedTask(Task):
    """A task of a diffusers pipeline, known from the signature of its call. Abstract."""

    num_samples = batch_size = 1  # one picture of a large model may fill a GPU
    is_video = False
    has_own_pipeline = False
    model_class = nn.Module

    def __init__(self, size: Mapping[str, int]) -> None:
        self.size = size

    def count_of(self, num_conditions: int) -> int:
        return max(self.num_samples, num_conditions)

    def picture_size(self, pipeline: Pipeline) -> int:
        return min((self.size[name] for name in ("height", "width") if name in self.size), default=ANY_SIZE)

    def sample(self, pipeline: Pipeline, conditions: Sequence[Any], options: SamplingOptions) -> Tensor:
        if options.guidance != "full":
            raise ValueError(f"guidance {options.guidance!r} is for models of skipdit train")
        if options.guidance_channels is not None:
            raise ValueError(f"guidance_channels is for models of skipdit, got {options.guidance_channels}")
        with guided(pipeline, options, len(conditions)) as guidance:
            output = pipeline(
                **{self.argument: list(conditions)},
                **guidance,
                **self.size,
                num_inference_steps=options.num_inference_steps,
                generator=options.generator,
                output_type="pt",
            )
        samples = output.frames if self.is_video else output.images
        if isinstance(samples, np.ndarray):  # (b h w c)
            samples = torch.from_numpy(samples).movedim(-1, 1)
        return keep_broken(samples.float())

    def replace_scheduler(self, pipeline: Pipeline, name: str) -> None:
        pipeline.scheduler = scheduler_like(pipeline.scheduler, name)

    @property
    def argument(self) -> str:
        """The argument of the pipeline's call for the conditions."""
        return "prompt"

    def run_defaults(self, pipeline: Pipeline) -> RunDefaults:
        """Return the defaults of the pipeline's call, and the scale of its guider if it has one."""
        parameters = _parameters(pipeline)
        scales = [guider.config.guidance_scale for guider in _guiders(pipeline).values()]
        scales += [parameters[name].default for name in _scale_arguments(parameters)]
        return RunDefaults(parameters["num_inference_steps"].default, scales[0] if scales else None)


class PublishedPictures(PublishedTask):
    """Pictures from prompts."""

    name, option = "text-to-image", "prompt"

    def choose_from(
        self, pipeline: Pipeline, values: Sequence[str], count: int | None, showcase: Sequence[str]
    ) -> Chosen:
        return choose_prompts(values, count, type(pipeline).__name__)


class PublishedClips(PublishedPictures):
    """Clips from prompts."""

    name, is_video = "text-to-video", True


class PublishedClasses(PublishedTask):
    """Pictures of classes whose names the pipeline knows."""

    name, option = "class-to-image", "labels"

    @property
    def argument(self) -> str:
        return "class_labels"

    def choose_from(
        self, pipeline: Pipeline, values: Sequence[str], count: int | None, showcase: Sequence[str]
    ) -> Chosen:
        """Return class numbers for names or numbers, by default spread over all classes. `ValueError` if a class is
        unknown."""
        num_classes = self.num_classes(pipeline)
        labels = [_find_class(value, pipeline.labels, num_classes) for value in values]
        labels = labels or spread(count or num_classes, num_classes)
        labels = labels if count is None else list(islice(cycle(labels), count))
        names = {number: name for name, number in pipeline.labels.items()}
        return Chosen(labels, [names.get(label, str(label)) for label in labels])

    def num_classes(self, pipeline: Any) -> int:
        return pipeline.transformer.config.num_embeds_ada_norm


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


def _parameters(pipeline: Pipeline) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipeline).__call__).parameters


def _scale_arguments(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [name for name in SCALES if name in parameters and parameters[name].default is not None]


def _guiders(pipeline: Pipeline) -> Fields:
    """Return the pipeline's guiders that have a guidance scale, by the name of the part."""
    parts = {name: pipeline.components.get(name) for name in GUIDERS}
    return {name: part for name, part in parts.items() if part is not None and "guidance_scale" in part.config}


@contextmanager
def guided(pipeline: Pipeline, options: SamplingOptions, count: int) -> Iterator[Fields]:
    """Give the pipeline's guiders the guidance scale inside the `with` block, or yield the arguments of its call for
    it. count: samples. `ValueError` if a scale is given and the pipeline has none.

    Qwen-Image guides only with a negative prompt. Ideogram 4 takes a scale per step instead, by default for the default
    number of steps; other runs take those of the same share of the run.
    """
    scale, parameters, guiders = options.guidance_scale, _parameters(pipeline), _guiders(pipeline)
    argument = next(iter(_scale_arguments(parameters)), None)
    arguments: Fields = {}
    if "guidance_schedule" in parameters:
        own, steps = parameters["guidance_schedule"].default, options.num_inference_steps
        arguments = {"guidance_scale": scale, "guidance_schedule": None}
        if scale is None:
            arguments = {"guidance_schedule": [own[step * len(own) // steps] for step in range(steps)]}
    elif scale is not None and not guiders:
        if argument is None:
            kind = type(pipeline).__name__
            raise ValueError(f"the guidance of a {kind} is its own: leave guidance_scale out, got {scale:g}")
        arguments = {argument: scale}
        if argument == "true_cfg_scale":
            arguments["negative_prompt"] = [" "] * count
    for name, guider in guiders.items():
        setattr(pipeline, name, guider if scale is None else guider.new(guidance_scale=scale))
    try:
        yield arguments
    finally:
        for name, guider in guiders.items():
            setattr(pipeline, name, guider)


# ----------------------------------------------------------------------------------------------------------------------
# Classes, and opening


def _find_class(value: str, labels: Mapping[str, int], num_classes: int) -> int:
    """Return the number of a class. labels: class numbers by name."""
    if value in labels:
        return labels[value]
    if not value.isdecimal():
        near = difflib.get_close_matches(value, labels, n=1)
        raise ValueError(f"no class is called {value}" + "".join(f"; did you mean {name}" for name in near))
    if int(value) >= num_classes:
        raise ValueError(f"label numbers go from 0 to {num_classes - 1}, got {value}")
    return int(value)


def open_published(folder: Path, index: Fields, dtype: torch.dtype, options: PipelineOptions) -> Sampler:
    """Return the sampler of the pipeline in a folder, which diffusers opens from local files only.

    index: its `model_index.json`. options: another transformer, and the size of samples.

    `ValueError` names the folder if it is not a pipeline of diffusers, needs more than a prompt or a class, makes
    sound, has no transformer, or is incomplete; and the option that is out of range.
    """
    check_range(options, "height", "width", "num_frames")
    kind = _pipeline_class(folder, index)
    parameters = inspect.signature(kind.__call__).parameters
    if "height" not in parameters and any("audio" in name or "waveform" in name for name in parameters):
        raise ValueError(f"{printable(folder)} is a {kind.__name__}, which makes neither pictures nor clips")
    task_class = _task_class(parameters)
    if task_class is None or _needs_more(parameters):
        raise ValueError(
            f"{printable(folder)} is a {kind.__name__}, which needs more than a prompt or a class: load it with "
            "diffusers, then call skipdit.enable_cache(pipeline, 'auto')"
        )
    size = _size(kind, parameters, options)
    replaced = {} if options.transformer is None else {"transformer": _load_instead(options.transformer, folder, dtype)}
    try:
        pipeline: Pipeline = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, **replaced)
    except Exception as error:  # untrusted configs may raise any type
        raise ValueError(f"{printable(folder)} is not a complete {kind.__name__}: {printable(str(error))}") from error
    if pipeline.components.get("transformer") is None:
        raise ValueError(f"{printable(folder)} is a {kind.__name__}, which has no transformer to cache")
    return Sampler(task_class(size), pipeline)


def _pipeline_class(folder: Path, index: Fields) -> type[DiffusionPipeline]:
    name = index["_class_name"]
    for part, value in index.items():
        if part.startswith("_") or as_type_or_none(value, list) is None or value == [None, None]:
            continue
        library, _ = as_type_or_none(value, tuple[str, object]) or ("", None)
        if library not in LIBRARIES and not (library and hasattr(diffusers.pipelines, library)):
            raise ValueError(f"the {printable(part)} in {printable(folder / INDEX_NAME)} is of an unknown library")
        if library == "transformers":  # otherwise such a class is a stand-in
            check_installed(f"the {printable(part)} of a {printable(name)} needs", "pipelines", "transformers")
    kind = find_class(name, "Pipeline", DiffusionPipeline)
    if kind is None:
        raise ValueError(
            f"{printable(folder)} is a {printable(name)}, which is a pipeline neither of skipdit nor of diffusers "
            f"{diffusers.__version__}"
        )
    return kind


def _load_instead(path: str, folder: Path, dtype: torch.dtype) -> Transformer:
    """Return the transformer in a checkpoint, with sizes from the config of the folder's transformer. `ValueError` if
    it is of another class."""
    config = read_config(folder / "transformer")
    sizes = as_type(config, Sizes, printable(folder / "transformer"))
    transformer = load_model(
        path,
        num_attention_heads=sizes.get("num_attention_heads"),
        sample_size=sizes.get("sample_size"),
        num_frames=sizes.get("video_length"),
        dtype=dtype,
    )
    name = config.get("_class_name")
    if name not in {kind.__name__ for kind in type(transformer).__mro__}:
        raise ValueError(
            f"{printable(path)} contains a {type(transformer).__name__}, but {printable(folder)} needs a "
            f"{printable(name)}"
        )
    return transformer


def _needs_more(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return true if a pipeline's call takes an input to edit or to follow, needs an argument that nobody gives, or
    takes no number of steps."""
    _, *own = parameters.values()
    needed = {each.name for each in own if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD}
    others = needed - {"prompt", "class_labels"}
    return bool(others) or "num_inference_steps" not in parameters or any(name in parameters for name in GIVEN)


def _task_class(parameters: Mapping[str, inspect.Parameter]) -> type[PublishedTask] | None:
    if "class_labels" in parameters:
        return PublishedClasses
    if "prompt" in parameters:
        return PublishedClips if set(FRAMES) & set(parameters) else PublishedPictures
    return None


def _size(
    kind: type[DiffusionPipeline], parameters: Mapping[str, inspect.Parameter], options: PipelineOptions
) -> dict[str, int]:
    """Return the size of samples under the argument names of the pipeline's call."""
    size: dict[str, int] = {}
    for name, value in (("height", options.height), ("width", options.width), ("num_frames", options.num_frames)):
        argument = next((other for other in FRAMES if other in parameters), name) if name == "num_frames" else name
        if value is None:
            continue
        if argument not in parameters:
            raise ValueError(f"a {kind.__name__} takes no {name}, got {value}")
        size[argument] = value
    if size and "use_resolution_binning" in parameters:
        return {**size, "use_resolution_binning": False}  # otherwise the pipeline takes the nearest size in a list
    return size
