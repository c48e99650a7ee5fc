"""A diffusers pipeline for class-to-image models, in pixels or behind an autoencoder."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from skipdit.cache.runtime import cache_context
from skipdit.diffusion import guide
from skipdit.models.dit import DiT

_run_numbers = itertools.count()


class ClassToImagePipeline(DiffusionPipeline):
    """Samples images of given classes.

    Args:
        transformer (`DiT`): scheduler (`SchedulerMixin`): its config says what the transformer predicts; see
            `skipdit.diffusion.make_scheduler`.
        vae (`AutoencoderKL`, *optional*): `None` where the transformer works on pixels in [-1, 1].
        id2label (`dict[str, str]`, *optional*): the name of each class number, as JSON keeps it.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    config: Any  # its keys are attributes too, which diffusers does not declare
    progress_bar: Callable[[Tensor], Iterable[Tensor]]  # its decorator hides the signature

    def __init__(
        self,
        transformer: DiT,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def labels(self) -> dict[str, int]:
        """Class names and their numbers, in alphabetical order."""
        return dict(sorted((name, int(label)) for label, name in (self.config.id2label or {}).items()))

    def get_label_ids(self, names: Sequence[str]) -> list[int]:
        """The class numbers of some names; `ValueError` with the nearest names where one is unknown."""
        import difflib

        labels = self.labels
        for name in names:
            if name not in labels:
                near = difflib.get_close_matches(name, labels, n=5, cutoff=0.5) or list(labels)[:5]
                raise ValueError(f"unknown label {name!r}; of the {len(labels)} labels, near are: {', '.join(near)}")
        return [labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        *,
        guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Samples one image a class label: an `ImagePipelineOutput`, without `return_dict` the tuple `(images,)`.

        Args:
            class_labels: class numbers, one an image.
            guidance_scale: classifier-free guidance above 1; at 1 or below only the conditional branch runs.
            guidance_channels: guide the first few channels only; by default all but the learned variance. 3 is what the
                official DiT sampler does.
            latents (`Tensor` of shape `(batch, channels, height, width)`, *optional*): start noise.
            height, width: of the latents (pixels without a `vae`); by default the transformer's `sample_size`.
            output_type: `"pil"`, `"np"` (b h w c in [0, 1]), `"pt"` (b c h w in [0, 1]) or `"latent"` (as they end).
        """
        model, device = self.transformer, self._execution_device
        labels = self._label_tensor(class_labels).to(device)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, model.null_class_label)])
        size = model.config.sample_size
        shape = (len(class_labels), model.config.in_channels, height or size, width or size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        noise_source = {"generator": generator} if takes_generator else {}
        learned_variance = self.scheduler.config.get("variance_type") in ("learned", "learned_range")

        with cache_context(f"run {next(_run_numbers)}"):
            try:
                self.scheduler.set_timesteps(num_inference_steps, device=device)
                sample = latents.to(device) * self.scheduler.init_noise_sigma
                for timestep in self.progress_bar(self.scheduler.timesteps):
                    inputs = torch.cat([sample, sample]) if guided else sample
                    inputs = self.scheduler.scale_model_input(inputs, timestep).to(model.dtype)
                    output = model(inputs, timestep, class_labels=labels).sample.float()
                    if guided:
                        output = guide(output, guidance_scale, guidance_channels or model.config.in_channels)
                    if not learned_variance:
                        output = output[:, : model.config.in_channels]
                    sample = self.scheduler.step(output, timestep, sample, **noise_source).prev_sample
            finally:
                self.maybe_free_model_hooks()

        images = self._decode(sample, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _label_tensor(self, class_labels: Sequence[int]) -> Tensor:
        num_classes = self.transformer.config.num_classes
        for label in class_labels:
            if not 0 <= label < num_classes:
                raise ValueError(f"class labels must be between 0 and {num_classes - 1}, got {label}")
        return torch.tensor(list(class_labels))

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        if self.vae is not None:
            latents = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return self.image_processor.postprocess(latents.float(), output_type=output_type)
