"""The options of `skipdit sample`. Imports nothing heavy, so that `--help` is instant."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from skipdit.command_options import OutputOptions, PipelineOptions, WeightsOptions
from skipdit.options import DTypeName, Guidance, NumInferenceStepsOrDefault, check_range
from skipdit.tasks import TaskName

MAX_FILES = 500_000  # PNG files in the folder of a set, all of which are listed in its marker file


@dataclass(frozen=True, kw_only=True)
class SampleConfig(WeightsOptions, PipelineOptions, OutputOptions):
    """The samples, the model, the settings of the runs, and the output."""

    task: TaskName | None = None
    """kind of input and output; by default the task of the model"""
    model: str | None = None
    """emoji, emoji-clips, emoji-text or emoji-text-clips (bundled, one per task), the folder of a pipeline, of skipdit
    or of diffusers (FLUX, Wan, ...), or a checkpoint, official or our own (one of latents needs --vae); by default the
    bundled model of the task"""
    labels: tuple[str, ...] = ()
    """class names or numbers, repeated in turn; by default classes that the bundled model draws well, or else classes
    spread over all"""
    prompt: tuple[str, ...] = ()
    """texts, repeated in turn; for the text tasks"""
    num_samples: int | None = None
    """number of pictures or clips; by default 16 pictures or 4 clips, and 1 for a pipeline of diffusers"""
    num_inference_steps: NumInferenceStepsOrDefault = None
    """denoising steps of the full and of the cached run; by default 50, or the default of a pipeline of diffusers"""
    guidance_scale: float | None = None
    """scale of classifier-free guidance; 1 disables guidance; by default 2, or that of a pipeline of diffusers"""
    guidance_channels: int | None = None
    """number of channels, from the first, that are guided; the official DiT sampler guides 3 of 4"""
    guidance: Guidance = "full"
    """units that make the unconditional prediction: all (full), or only the first and the last ones (shallow), for a
    model trained with routing.deep_drop; shallow guidance gets a run of its own, and the cached run uses it too"""
    guidance_shallow_units: int | None = None
    """number of first units, and of last units, that make a shallow prediction; by default as in training"""
    scheduler: str | None = None
    """euler or dpm for a flow model; ddim, dpm or ddpm for the others; by default the model's own"""
    cache: str = "auto"
    """auto; auto:2 for another speedup; a spec such as N3 or skip-taylor:N3-o1; the path of a schedule.json; calibrated
    or calibrated:2x for a schedule that comes with the model; or none. `skipdit info` lists the methods"""
    fewer_steps: int | None = None
    """denoising steps of the uncached run that the cached run is compared with; by default as many as take the same
    time"""
    vae: Path | None = None
    """folder of an AutoencoderKL, or of a pipeline with one, for a checkpoint of latents"""
    dtype: DTypeName = "float32"
    """data type of the weights and of the computation"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""
    compile: bool = False
    """compile the model, one whole graph per kind of step; pays off on long runs"""
    seed: int = 0
    """the same seed gives the same samples on the same machine"""
    npz: bool = False
    """write num_samples samples of one setting to samples.npz, in the format of ADM's evaluation, instead of comparing
    runs; in one process, or in several under torchrun"""
    png: bool = False
    """write them as a folder of PNG files; may be combined with --npz"""
    batch_size: int | None = None
    """samples per batch in a set; by default 50 pictures or 4 clips"""
    random_labels: bool = False
    """draw each label or prompt of a set from (seed, index) instead of taking them in turn"""
    out: Path = Path("out/sample")
    """folder of the samples and the report"""

    GROUPS: ClassVar = {
        "samples": ("task", "labels", "prompt", "num_samples", "seed"),
        "model": ("model", "transformer", "vae", "num_attention_heads", "num_classes", "objective", "drop"),
        "size": ("height", "width", "num_frames"),
        "sampler": (
            "num_inference_steps", "guidance_scale", "guidance_channels", "guidance", "guidance_shallow_units",
            "scheduler",
        ),
        "cache": ("cache", "fewer_steps"),
        "set": ("npz", "png", "batch_size", "random_labels"),
        "machine": ("dtype", "device", "compile"),
        "output": ("out", "overwrite"),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_samples", "fewer_steps", "batch_size")
        check_range(self, "num_inference_steps", most=1000)
        if self.fewer_steps is not None and self.cache == "none" and self.guidance == "full":
            raise ValueError(f"fewer_steps needs a cached run to compare with, got {self.fewer_steps} with cache none")
        if self.guidance == "full" and self.guidance_shallow_units is not None:
            raise ValueError(f"guidance_shallow_units is for guidance 'shallow', got {self.guidance_shallow_units}")
        if self.makes_set and self.num_samples is None:
            raise ValueError("npz and png are for a set of samples: give num_samples")
        if self.makes_set and self.fewer_steps is not None:
            raise ValueError(f"fewer_steps is for a comparison, not with npz or png, got {self.fewer_steps}")
        if self.png and (self.num_samples or 0) > MAX_FILES:
            raise ValueError(f"png is for at most {MAX_FILES} samples in one folder, got {self.num_samples}: use npz")
        for name in ("batch_size", "random_labels"):
            if not self.makes_set and (value := getattr(self, name)):
                raise ValueError(f"{name} is for a set of samples, got {value} without npz or png")

    @property
    def makes_set(self) -> bool:
        """Return true if many samples of one setting are made instead of a comparison."""
        return self.npz or self.png
