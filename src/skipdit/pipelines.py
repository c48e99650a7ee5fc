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
from skipdit.cache.state import StepCounts
from skipdit.cache.streams import Stream, cache_context
from skipdit.diffusion import guide
from skipdit.interfaces import VAE, Config, Fields
from skipdit.models.dit import DiT
from skipdit.models.forward_plan import ForwardPlan, Units
from skipdit.models.latte import Latte
from skipdit.models.shallow_path import Guidance, guidance_plan

_run_numbers = itertools.count()


class ShallowGuidance:
    """Make the unconditional predictions of one run with the model's shallow path.

    At a reuse step of a cache the conditional prediction is stale. Its difference from a fresh unconditional prediction
    would be wrong, and guidance multiplies it. So such a step runs nothing, and takes the difference of the last full
    step. (FasterCache, arXiv 2410.19355, does so with full guidance, by frequencies.)

    plan: the plan of the model's `ShallowPath`. held: with a cache, the stream of the conditional predictions, the
    number of its full steps so far, and the difference at the last of them.
    """

    def __init__(self, model: nn.Module, plan: ForwardPlan) -> None:
        assert plan.route is not None
        self.model, self.plan = model, plan
        self.left_out = Units(start=plan.route.start, stop=plan.route.stop)
        self.held: tuple[Stream, int, Tensor] | None = None

    def __call__(self, conditional: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Return the conditional prediction, which comes from the model's last call, and the unconditional one of the
        same shape. args, kwargs: the model's arguments for the latter."""
        stream = last_stream(self.model)
        if stream is not None and self.held is not None and self.held[:2] == (stream, stream.counts.full):
            stream.counts += StepCounts(held=1)
            return conditional, conditional - self.held[2]
        conditional = conditional.clone()  # the next call of a CUDA graph would overwrite it
        unconditional = self.model(*args, **kwargs, plan=self.plan).output[0].to(conditional.dtype)
        if stream is not None:
            assert stream.costs is not None
            stream.counts += StepCounts(shallow=1, cost=stream.costs.of_step((self.left_out,)))
            self.held = stream, stream.counts.full, conditional - unconditional
        return conditional, unconditional


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling options that pipelines for pictures and for clips share."""

    guidance_scale: float | None
    """strength of classifier-free guidance; at 1 or below only the conditional prediction is made; `None` leaves it to
    a pipeline of diffusers"""
    num_inference_steps: int
    """denoising steps"""
    generator: torch.Generator | list[torch.Generator] | None = None
    """generator of the noise, or a list of one per sample"""
    guidance_channels: int | None = None
    """number of channels, from the first, that guidance changes; by default all"""
    guidance: Guidance = "full"
    """units that make the unconditional prediction: `"full"`, all of them; `"shallow"`, only the first and last ones"""
    guidance_shallow_units: int | None = None
    """number of units that `"shallow"` runs at each end; by default the number that the model was trained with"""

    def generators_of_frames(self, num_frames: int) -> torch.Generator | list[torch.Generator] | None:
        """Return the generators of a batch in which each frame is a picture of its own."""
        if not isinstance(self.generator, list):
            return self.generator
        return [generator for generator in self.generator for _ in range(num_frames)]


def unscale_latents(latents: Tensor, config: Config) -> Tensor:
    """Return the latents (b c h w) of an autoencoder with this config, given the scaled ones of a transformer."""
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if std is not None:
        latents = latents * latents.new_tensor(std).view(1, -1, 1, 1)
    latents = latents / config.scaling_factor
    if mean is not None:
        latents = latents + latents.new_tensor(mean).view(1, -1, 1, 1)
    return latents + (config.get("shift_factor") or 0.0)


def decode_latents(vae: VAE, latents: Tensor, num_frames: int = 1) -> Tensor:
    """Decode a transformer's latents to pictures (b c h w) in [-1, 1], with NaN for infinite pixels; without an
    autoencoder the latents are the pictures. num_frames: frames per clip, for an autoencoder that decodes whole clips.
    """
    if vae is None:
        return keep_broken(latents.float())
    frames: Fields = {"num_frames": num_frames} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}
    decoded: Any = vae.decode(unscale_latents(latents.to(vae.dtype), vae.config), **frames)
    return keep_broken(decoded.sample.float())


class ClassPipeline(DiffusionPipeline):
    """Base of both pipelines: class names, the denoising loop, decoding. Abstract."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    config: Config
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
        """Return the class numbers by name, in alphabetical order."""
        return dict(sorted((name, int(label)) for label, name in (self.config.id2label or {}).items()))

    def get_label_ids(self, names: Sequence[str]) -> list[int]:
        """Return the class numbers of these names. Raises `ValueError`, with the most similar names, if one is
        unknown."""
        import difflib

        labels = self.labels
        for name in names:
            if name not in labels:
                similar = difflib.get_close_matches(name, labels, n=5, cutoff=0.5) or list(labels)[:5]
                raise ValueError(f"unknown label {name!r}; similar ones of {len(labels)} labels: {', '.join(similar)}")
        return [labels[name] for name in names]

    def _denoise(
        self,
        class_labels: Sequence[int] | None,
        shape: tuple[int, ...],
        options: SamplingOptions,
        latents: Tensor | None,
    ) -> Tensor:
        """Denoise, and return the final latents, which have the given shape: (b c h w) or (b f c h w)."""
        device = self._execution_device
        predict = self._predictor(class_labels, options)
        if latents is None:
            latents = randn_tensor(shape, generator=options.generator, device=device)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        noise_source: Fields = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            noise_source["generator"] = options.generators_of_frames(math.prod(shape[1:-3]))
        with cache_context(f"run {next(_run_numbers)}"):
            try:
                self.scheduler.set_timesteps(options.num_inference_steps, device=device)
                sample = latents.to(device) * self.scheduler.init_noise_sigma
                for timestep in self.progress_bar(self.scheduler.timesteps):
                    output = predict(sample, timestep)
                    # schedulers take pictures (b c h w), so each frame is passed as one
                    pictures = sample.flatten(0, -4)
                    step = self.scheduler.step(output.flatten(0, -4), timestep, pictures, **noise_source)
                    sample = step.prev_sample.view(shape)
            finally:
                self.maybe_free_model_hooks()
        return sample

    def _predictor(
        self, class_labels: Sequence[int] | None, options: SamplingOptions
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that makes the guided prediction for a sample at a timestep, as the scheduler takes it.

        Raises `ValueError` if the model cannot be guided as the options say.
        """
        model, scale = self.transformer, options.guidance_scale
        assert scale is not None
        self.guidance_scale = scale
        num_channels, guided_channels = model.config.in_channels, options.guidance_channels
        if guided_channels is not None and not 1 <= guided_channels <= num_channels:
            raise ValueError(f"guidance_channels must be between 1 and {num_channels}, got {guided_channels}")
        guided = scale > 1 and class_labels is not None
        plan = guidance_plan(model, options.guidance, options.guidance_shallow_units, scale)
        if plan is not None and not guided:
            raise ValueError("guidance 'shallow' needs a class-conditional model")
        shallow = None if plan is None else ShallowGuidance(model, plan)
        labels = null_labels = None
        if class_labels is not None:
            labels = self._label_tensor(class_labels).to(self._execution_device)
            if guided:
                null_labels = torch.full_like(labels, model.null_class_label)
                labels = labels if shallow is not None else torch.cat([labels, null_labels])
        learned_variance = self.scheduler.config.get("variance_type") in ("learned", "learned_range")

        def predict(sample: Tensor, timestep: Tensor) -> Tensor:
            inputs = torch.cat([sample, sample]) if guided and shallow is None else sample
            inputs = self.scheduler.scale_model_input(inputs, timestep).to(model.dtype)
            output = model(inputs, timestep, class_labels=labels).sample.float()
            if shallow is not None:
                output = torch.cat(shallow(output, inputs, timestep, class_labels=null_labels))
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
        """Decode the transformer's latents to pictures (b c h w) in [-1, 1]."""
        return decode_latents(self.vae, latents)


def keep_broken(pixels: Tensor) -> Tensor:
    """Replace infinite pixels by NaN, as clamping them to [0, 1] would make them look valid."""
    return torch.where(pixels.isfinite(), pixels, torch.nan)


class ClassToImagePipeline(ClassPipeline):
    """Sample images of given classes.

    Args:
        transformer (`DiT`): the model.
        scheduler (`SchedulerMixin`): its config says what the transformer predicts; see
            `skipdit.diffusion.make_scheduler`.
        vae (`AutoencoderKL`, `AutoencoderKLTemporalDecoder` or `AutoencoderTiny`, *optional*): `None` if the
            transformer works on pixels in [-1, 1].
        id2label (`dict[str, str]`, *optional*): the name of each class number; the numbers are strings, as in JSON.
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
        """Sample one image per class label. Return an `ImagePipelineOutput`, or without `return_dict` a tuple
        `(images,)`. Raises `ValueError` on options that do not fit the model.

        Args:
            class_labels: class numbers, one per image.
            guidance_scale: strength of classifier-free guidance; at 1 or below only the conditional prediction is made.
            guidance_channels: number of channels, from the first, that guidance changes; by default all but the learned
                variance. The official DiT sampler uses 3.
            guidance: units that make the unconditional prediction: `"full"`, all of them; `"shallow"`, only the first
                and last ones, as trained with `routing.deep_drop`, which takes little more than half of a step's cost.
            guidance_shallow_units: number of units that `"shallow"` runs at each end; by default the number in the
                transformer's config, which a model that was not trained this way lacks (`ValueError`).
            latents (`Tensor` of shape `(batch, channels, height, width)`, *optional*): initial noise.
            height, width: size of the latents (of the pixels without a `vae`); by default the transformer's
                `sample_size`.
            output_type: `"pil"`, `"np"` (b h w c in [0, 1]), `"pt"` (b c h w in [0, 1]) or `"latent"` (the final
                latents).
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
    """The clips that a pipeline made."""

    frames: Any
    """a list of PIL images per clip, an array (b f h w c) or a tensor (b f c h w) in [0, 1], or latents"""


class ClassToVideoPipeline(ClassPipeline):
    """Sample clips, with or without given classes. The autoencoder decodes the frames of a clip one by one, unless it
    has a temporal decoder.

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
        """Sample one clip per class label. Return a `VideoPipelineOutput`, or without `return_dict` a tuple
        `(frames,)`. Raises `ValueError` on options that do not fit the model.

        Args:
            class_labels: class numbers, one per clip; `None` for an unconditional model, which makes `num_videos`.
            num_frames: frames per clip; by default, and at most, the number that the transformer was trained on.
            guidance_scale, guidance_channels, guidance, guidance_shallow_units: as in `ClassToImagePipeline`.
            latents (`Tensor` of shape `(batch, frames, channels, height, width)`, *optional*): initial noise.
            height, width: size of the latents (of the pixels without a `vae`); by default the transformer's
                `sample_size`.
            output_type: `"pil"`, `"np"` (b f h w c in [0, 1]), `"pt"` (b f c h w in [0, 1]) or `"latent"`.
        """
        config = self.transformer.config
        if (class_labels is None) != (config.num_classes is None):
            needs = "no class_labels, but num_videos" if config.num_classes is None else "class_labels"
            raise ValueError(f"this model takes {needs}")
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
