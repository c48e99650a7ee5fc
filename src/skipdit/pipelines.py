"""diffusers pipelines for class-to-image and class-to-video models, in pixels or with an autoencoder.

Text-to-image and text-to-video models are sampled by diffusers' own `HunyuanDiTPipeline` and `LattePipeline`.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from skipdit.cache.enable import last_stream
from skipdit.cache.state import Counts
from skipdit.cache.streams import Stream, cache_context
from skipdit.diffusion import guide
from skipdit.models.dit import DiT
from skipdit.models.forward_plan import ForwardPlan, Units
from skipdit.models.latte import Latte
from skipdit.models.shallow_path import Guidance, guidance_plan

_run_numbers = itertools.count()


class ShallowGuidance:
    """Make the unconditional predictions of one run, each beside the conditional one of its step.

    Where a cache let the conditional prediction reuse, it is stale, and a fresh one beside it would make their
    difference wrong, which guidance multiplies. There the difference is held that the last full step had, and nothing
    runs. (FasterCache, arXiv 2410.19355, holds that of full guidance, by frequencies.)

    plan: of the model's `ShallowPath`. held: under a cache, the stream of the conditional predictions, the number of
    its full steps so far, and the difference at the last of them.
    """

    def __init__(self, model: nn.Module, plan: ForwardPlan) -> None:
        assert plan.route is not None
        self.model, self.plan = model, plan
        self.left_out = Units(start=plan.route.start, stop=plan.route.stop)
        self.held: tuple[Stream, int, Tensor] | None = None

    def __call__(self, conditional: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the conditional prediction, which the model's last call made, and the unconditional one of the same
        shape. args, kwargs: what the model makes that of."""
        stream = last_stream(self.model)
        if stream is not None and self.held is not None and self.held[:2] == (stream, stream.counts.full):
            stream.counts += Counts(held=1)
            return conditional, conditional - self.held[2]
        conditional = conditional.clone()  # the next call of a CUDA graph would overwrite it
        unconditional = self.model(*args, **kwargs, plan=self.plan).output[0].to(conditional.dtype)
        if stream is not None:
            assert stream.costs is not None
            stream.counts += Counts(shallow=1, cost=stream.costs.of_step((self.left_out,)))
            self.held = stream, stream.counts.full, conditional - unconditional
        return conditional, unconditional


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a pipeline samples, whatever it samples."""

    guidance_scale: float
    """classifier-free guidance above 1; at 1 or below only the conditional prediction is made"""
    num_inference_steps: int
    """denoising steps"""
    generator: torch.Generator | list[torch.Generator] | None = None
    """of the noise; a list has one per sample"""
    guidance_channels: int | None = None
    """guide only so many first channels; by default all"""
    guidance: Guidance = "full"
    """what makes the unconditional prediction: `"full"`, all units; `"shallow"`, only the first and the last ones"""
    guidance_shallow_units: int | None = None
    """how many first, and as many last, units `"shallow"` runs; by default those that the model was trained with"""

    def generators_of_frames(self, num_frames: int) -> torch.Generator | list[torch.Generator] | None:
        """Return the generators of a batch whose frames are pictures of their own."""
        if not isinstance(self.generator, list):
            return self.generator
        return [generator for generator in self.generator for _ in range(num_frames)]


def unscale_latents(latents: Tensor, config: Any) -> Tensor:
    """Return latents (b c h w) as an autoencoder of this config makes them, of those that transformers learn."""
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if std is not None:
        latents = latents * latents.new_tensor(std).view(1, -1, 1, 1)
    latents = latents / config.scaling_factor
    if mean is not None:
        latents = latents + latents.new_tensor(mean).view(1, -1, 1, 1)
    return latents + (config.get("shift_factor") or 0.0)


def decode_latents(vae: Any, latents: Tensor, num_frames: int = 1) -> Tensor:
    """Return pictures (b c h w) in [-1, 1], NaN where they are broken, of latents that a transformer made; those
    themselves without an autoencoder. num_frames: of each clip, for an autoencoder that decodes whole clips."""
    if vae is None:
        return keep_broken(latents.float())
    frames: Any = {"num_frames": num_frames} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}
    decoded: Any = vae.decode(unscale_latents(latents.to(vae.dtype), vae.config), **frames)
    return keep_broken(decoded.sample.float())


class ClassPipeline(DiffusionPipeline):
    """Share what both pipelines have: names of classes, the denoising loop, decoding. Abstract."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    config: Any  # its keys are attributes too, which diffusers does not declare
    progress_bar: Callable[[Tensor], Iterable[Tensor]]  # its decorator hides the signature

    def __init__(
        self,
        transformer: DiT | Latte,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderKLTemporalDecoder | AutoencoderTiny | None = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def labels(self) -> dict[str, int]:
        """Return class names and their numbers, in alphabetical order."""
        return dict(sorted((name, int(label)) for label, name in (self.config.id2label or {}).items()))

    def get_label_ids(self, names: Sequence[str]) -> list[int]:
        """Return the class numbers of some names; `ValueError` with the nearest names for one that is unknown."""
        import difflib

        labels = self.labels
        for name in names:
            if name not in labels:
                near = difflib.get_close_matches(name, labels, n=5, cutoff=0.5) or list(labels)[:5]
                raise ValueError(f"unknown label {name!r}; of the {len(labels)} labels, near are: {', '.join(near)}")
        return [labels[name] for name in names]

    def _denoise(
        self,
        class_labels: Sequence[int] | None,
        shape: tuple[int, ...],
        options: SamplingOptions,
        latents: Tensor | None,
    ) -> Tensor:
        """Return latents of `shape`, (b c h w) or (b f c h w), as they end."""
        device = self._execution_device
        predict = self._predictor(class_labels, options)
        if latents is None:
            latents = randn_tensor(shape, generator=options.generator, device=device)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        noise_source: dict[str, Any] = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            noise_source["generator"] = options.generators_of_frames(math.prod(shape[1:-3]))
        with cache_context(f"run {next(_run_numbers)}"):
            try:
                self.scheduler.set_timesteps(options.num_inference_steps, device=device)
                sample = latents.to(device) * self.scheduler.init_noise_sigma
                for timestep in self.progress_bar(self.scheduler.timesteps):
                    output = predict(sample, timestep)
                    # schedulers know pictures (b c h w): each frame is one
                    pictures = sample.flatten(0, -4)
                    step = self.scheduler.step(output.flatten(0, -4), timestep, pictures, **noise_source)
                    sample = step.prev_sample.view(shape)
            finally:
                self.maybe_free_model_hooks()
        return sample

    def _predictor(
        self, class_labels: Sequence[int] | None, options: SamplingOptions
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what makes the guided prediction of a sample at a timestep, as the scheduler takes it.

        `ValueError` where the model cannot be guided so.
        """
        model, scale = self.transformer, options.guidance_scale
        self.guidance_scale = scale
        num_channels, guided_channels = model.config.in_channels, options.guidance_channels
        if guided_channels is not None and not 1 <= guided_channels <= num_channels:
            raise ValueError(f"guidance_channels must be between 1 and {num_channels}, got {guided_channels}")
        guided = scale > 1 and class_labels is not None
        plan = guidance_plan(model, options.guidance, options.guidance_shallow_units, scale)
        if plan is not None and not guided:
            raise ValueError("guidance 'shallow' needs a model that knows classes, by which it could guide")
        shallow = None if plan is None else ShallowGuidance(model, plan)
        labels = nothing = None
        if class_labels is not None:
            labels = self._label_tensor(class_labels).to(self._execution_device)
            if guided:
                nothing = torch.full_like(labels, model.null_class_label)
                labels = labels if shallow is not None else torch.cat([labels, nothing])
        learned_variance = self.scheduler.config.get("variance_type") in ("learned", "learned_range")

        def predict(sample: Tensor, timestep: Tensor) -> Tensor:
            inputs = torch.cat([sample, sample]) if guided and shallow is None else sample
            inputs = self.scheduler.scale_model_input(inputs, timestep).to(model.dtype)
            output = model(inputs, timestep, class_labels=labels).sample.float()
            if shallow is not None:
                output = torch.cat(shallow(output, inputs, timestep, class_labels=nothing))
            if guided:
                output = guide(output, scale, guided_channels or num_channels)
            return output if learned_variance else output.narrow(-3, 0, num_channels)

        return predict

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        native, patch_size = self.transformer.config.sample_size, self.transformer.config.patch_size
        size = (native if height is None else height, native if width is None else width)
        if min(size) < patch_size or any(side % patch_size for side in size):
            raise ValueError(f"height and width must be divisible by patch_size {patch_size}, got {size}")
        return size

    def _label_tensor(self, class_labels: Sequence[int]) -> Tensor:
        num_classes = self.transformer.config.num_classes
        for label in class_labels:
            if not 0 <= label < (num_classes or 0):
                raise ValueError(f"class labels must be between 0 and {(num_classes or 0) - 1}, got {label}")
        return torch.tensor(list(class_labels))

    def _decode(self, latents: Tensor) -> Tensor:
        """Return pictures (b c h w) in [-1, 1] of what the transformer made."""
        return decode_latents(self.vae, latents)


def keep_broken(pixels: Tensor) -> Tensor:
    """Return NaN for infinite pixels, which clamping to [0, 1] would make look like good ones."""
    return torch.where(pixels.isfinite(), pixels, torch.nan)


class ClassToImagePipeline(ClassPipeline):
    """Sample images of given classes.

    Args:
        transformer (`DiT`): scheduler (`SchedulerMixin`): its config says what the transformer predicts; see
            `skipdit.diffusion.make_scheduler`.
        vae (`AutoencoderKL`, `AutoencoderKLTemporalDecoder` or `AutoencoderTiny`, *optional*): `None` where the
            transformer works on pixels in [-1, 1].
        id2label (`dict[str, str]`, *optional*): the name of each class number, as JSON keeps it.
    """

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        *,
        guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
        guidance: Guidance = "full",
        guidance_shallow_units: int | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample one image per class label: an `ImagePipelineOutput`, without `return_dict` the tuple `(images,)`.

        Args:
            class_labels: class numbers, one per image.
            guidance_scale: classifier-free guidance above 1; at 1 or below only the conditional prediction is made.
            guidance_channels: guide only so many first channels; by default all but the learned variance. 3 is what the
                official DiT sampler does.
            guidance: what makes the unconditional prediction: `"full"`, all units; `"shallow"`, only the first and the
                last ones, as training with `routing.deep_drop` taught them, at little more than half of a step's cost.
            guidance_shallow_units: how many first, and as many last, units `"shallow"` runs; by default those that the
                transformer's config names, and a model that was not trained so is refused.
            latents (`Tensor` of shape `(batch, channels, height, width)`, *optional*): start noise.
            height, width: of the latents (pixels without a `vae`); by default the transformer's `sample_size`.
            output_type: `"pil"`, `"np"` (b h w c in [0, 1]), `"pt"` (b c h w in [0, 1]) or `"latent"` (as they end).
        """
        config = self.transformer.config
        shape = (len(class_labels), config.in_channels, *self._size(height, width))
        options = SamplingOptions(
            guidance_scale=guidance_scale,
            guidance_channels=guidance_channels,
            guidance=guidance,
            guidance_shallow_units=guidance_shallow_units,
            num_inference_steps=num_inference_steps,
            generator=generator,
        )
        images: Any = self._denoise(class_labels, shape, options, latents)
        if output_type != "latent":
            images = self.image_processor.postprocess(self._decode(images), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


@dataclass
class VideoPipelineOutput(BaseOutput):
    """Hold the clips that a pipeline made."""

    frames: Any
    """of each clip a list of PIL images, an array (b f h w c) or a tensor (b f c h w) in [0, 1], or latents"""


class ClassToVideoPipeline(ClassPipeline):
    """Sample clips, of given classes or without. An autoencoder decodes the frames of a clip one by one, but for one
    with a temporal decoder.

    Args: those of `ClassToImagePipeline`, with a `Latte` as its transformer.
    """

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | None = None,
        *,
        num_videos: int | None = None,
        num_frames: int | None = None,
        guidance_scale: float = 7.0,
        guidance_channels: int | None = None,
        guidance: Guidance = "full",
        guidance_shallow_units: int | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample one clip per class label: a `VideoPipelineOutput`, without `return_dict` the tuple `(frames,)`.

        Args:
            class_labels: class numbers, one per clip; `None` for an unconditional model, which makes `num_videos`.
            num_frames: of each clip; by default, and at most, as many as the transformer was trained on.
            guidance_scale, guidance_channels, guidance, guidance_shallow_units: as of `ClassToImagePipeline`.
            latents (`Tensor` of shape `(batch, frames, channels, height, width)`, *optional*): start noise.
            height, width: of the latents (pixels without a `vae`); by default the transformer's `sample_size`.
            output_type: `"pil"`, `"np"` (b f h w c in [0, 1]), `"pt"` (b f c h w in [0, 1]) or `"latent"`.
        """
        config = self.transformer.config
        if (class_labels is None) != (config.num_classes is None):
            wanted = "num_videos, and no class_labels" if config.num_classes is None else "class_labels"
            raise ValueError(f"this model needs {wanted}")
        if class_labels is not None and num_videos not in (None, len(class_labels)):
            raise ValueError(f"num_videos must be the number of class labels, {len(class_labels)}, got {num_videos}")
        batch = (1 if num_videos is None else num_videos) if class_labels is None else len(class_labels)
        if batch < 1:
            raise ValueError(f"there must be at least 1 clip to sample, got {batch}")
        frames = config.num_frames if num_frames is None else num_frames
        shape = (batch, frames, config.in_channels, *self._size(height, width))
        options = SamplingOptions(
            guidance_scale=guidance_scale,
            guidance_channels=guidance_channels,
            guidance=guidance,
            guidance_shallow_units=guidance_shallow_units,
            num_inference_steps=num_inference_steps,
            generator=generator,
        )
        videos: Any = self._denoise(class_labels, shape, options, latents)
        if output_type != "latent":
            clips = (decode_latents(self.vae, clip, len(clip)) for clip in videos)
            videos = [self.image_processor.postprocess(clip, output_type=output_type) for clip in clips]
            if output_type == "pt":
                videos = torch.stack(videos)
            elif output_type == "np":
                videos = np.stack(videos)
        return VideoPipelineOutput(frames=videos) if return_dict else (videos,)
