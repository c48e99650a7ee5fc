"""Samples in full, cached, and with fewer steps at the cached run's wall time, and reports times and distances."""

import dataclasses
import json
import math
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.logging import disable_progress_bar, enable_progress_bar
from safetensors import SafetensorError
from torch import Tensor

from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.runtime import CacheSummary, cache_summary, disable_cache, enable_cache
from skipdit.cache.schedule import resolve
from skipdit.checkpoints import load_model
from skipdit.diffusion import Objective, make_scheduler, objective_of
from skipdit.files import atomic_file
from skipdit.metrics.paired import psnr_db, ssim
from skipdit.models.dit import DiT
from skipdit.pictures import labelled_grid
from skipdit.pipelines import ClassToImagePipeline
from skipdit.training import resolve_device


@dataclass(frozen=True, kw_only=True)
class Bundled:
    """A model that comes with the package: its folder among the assets, and classes that it draws well."""

    folder: str
    labels: tuple[str, ...]


BUNDLED = {
    "emoji": Bundled(
        folder="class_to_image",
        labels=(
            "face-smiling",
            "heart",
            "time",
            "cat-face",
            "person",
            "warning",
            "face-tongue",
            "keycap",
            "face-affection",
            "family",
            "zodiac",
            "face-concerned",
            "person-role",
            "av-symbol",
            "face-hand",
            "religion",
        ),
    )
}
NUM_COMPARED = 6  # pictures a row of comparison.png
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What `skipdit sample` does.

    model: `emoji` (bundled), the folder of a pipeline, or a checkpoint (official or own; latents need --vae).
    labels: class names or numbers, repeated in turn; by default some that the bundled model draws well, else spread
    over all classes. num_images: pictures.
    guidance_scale: classifier-free guidance, none at 1. guidance_channels: guide only the first few channels; the
    official DiT sampler guides 3 of its 4.
    steps: of the sampler. cache: a spec such as N3, skip-taylor:N3-o1, the path of a schedule.json, or none.
    fewer_steps: of the rival; by default as many as fit into the cached run's wall time.
    scheduler: euler or dpm for a flow model, ddim, dpm or ddpm for the others; by default the model's own.
    vae: folder of an AutoencoderKL for models of latents. num_attention_heads: where a checkpoint cannot tell.
    compile: compile the model, one whole graph a kind of step. seed: the same seed gives the same pictures.
    """

    model: str = "emoji"
    labels: tuple[str, ...] = ()
    num_images: int = 16
    steps: int = 50
    guidance_scale: float = 2.0
    guidance_channels: int | None = None
    fewer_steps: int | None = None
    cache: str = "skip-taylor:N4-800-100-o1"
    scheduler: str | None = None
    vae: Path | None = None
    num_attention_heads: int | None = None
    dtype: DType = "float32"
    device: str = "auto"
    compile: bool = False
    seed: int = 0
    out: Path = Path("out/sample")

    def __post_init__(self) -> None:
        for name in ("num_images", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps > 1000:
            raise ValueError(f"steps must be at most 1000, got {self.steps}")
        if self.dtype not in get_args(DType):
            raise ValueError(f"dtype must be one of {', '.join(get_args(DType))}, got {self.dtype!r}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. `speedup` by wall time against the full run, `compute_ratio` as the units run promise; distances to
    the full run's pictures, mean over them: `None` for the full run itself, and PSNR also where all are equal."""

    name: str
    steps: int
    steps_full: int
    steps_reused: int
    seconds: float
    speedup: float
    compute_ratio: float
    psnr_db: float | None
    ssim: float | None
    bytes_held: int

    @classmethod
    def of(
        cls,
        name: str,
        run: "Sampled",
        reference: "Sampled",
        *,
        steps: int,
        summary: CacheSummary | None = None,
        reference_steps: int | None = None,
    ) -> "Row":
        psnr = psnr_db(run.pictures, reference.pictures).mean().item()
        return cls(
            name=name,
            steps=steps,
            steps_full=steps if summary is None else summary.steps_full,
            steps_reused=0 if summary is None else summary.steps_reused,
            seconds=run.seconds,
            speedup=reference.seconds / run.seconds,
            compute_ratio=(reference_steps or steps) / steps if summary is None else summary.compute_ratio,
            psnr_db=psnr if math.isfinite(psnr) else None,
            ssim=None if run is reference else ssim(run.pictures, reference.pictures).mean().item(),
            bytes_held=0 if summary is None else summary.peak_bytes_held,
        )


@dataclass(frozen=True)
class Report:
    """All rows of one call, the machine, the versions and the config."""

    rows: tuple[Row, ...]
    config: dict[str, Any]
    labels: list[str]
    peak_memory_bytes: int
    machine: dict[str, str | int]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the figures of the cached run on top, then every row."""
        rows = [asdict(row) for row in self.rows]
        top = {"seconds_full": self.rows[0].seconds}
        if len(self.rows) > 1:
            cached = self.rows[1]
            top |= {"seconds_cached": cached.seconds, "speedup": cached.speedup, "compute_ratio": cached.compute_ratio}
            top |= {"psnr_db": cached.psnr_db, "ssim": cached.ssim, "steps_full": cached.steps_full}
            top |= {"steps_reused": cached.steps_reused, "bytes_held": cached.bytes_held}
        return top | asdict(self) | {"rows": rows, "seed": self.config["seed"]}


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline that a config names


def load_pipeline(config: SampleConfig, *, decodes: bool = True) -> ClassToImagePipeline:
    """The bundled pipeline, a pipeline's folder, or one made around a checkpoint; on its device, in its dtype.

    decodes: whether pictures are wanted, for which a model of latents needs an autoencoder.
    """
    device, dtype, path = resolve_device(config.device), DTYPES[config.dtype], Path(config.model)
    if config.model in BUNDLED:
        with as_file(files("skipdit") / "assets" / BUNDLED[config.model].folder) as folder:
            pipeline = _from_folder(folder, dtype)
    elif (path / "model_index.json").is_file():
        pipeline = _from_folder(path, dtype)
    elif path.exists():
        model = load_model(path, num_attention_heads=config.num_attention_heads, dtype=dtype)
        if not learns_variance(model):
            raise ValueError(f"{path} does not say what its model predicts: give the folder of its pipeline")
        pipeline = ClassToImagePipeline(model, make_scheduler(Objective(learned_variance=True), "ddim"))
    else:
        raise FileNotFoundError(
            f"no model at {config.model}: give {', '.join(BUNDLED)}, a pipeline's folder or a checkpoint"
        )
    if config.vae is not None:
        pipeline.register_modules(vae=AutoencoderKL.from_pretrained(config.vae, use_safetensors=True, dtype=dtype))
    if decodes and pipeline.vae is None and pipeline.transformer.config.in_channels != 3:
        raise ValueError(
            f"{config.model} works on latents of {pipeline.transformer.config.in_channels} channels: give --vae FOLDER"
        )
    if config.scheduler is not None:
        learned_variance = learns_variance(pipeline.transformer)
        objective = dataclasses.replace(objective_of(pipeline.scheduler), learned_variance=learned_variance)
        pipeline.scheduler = make_scheduler(objective, config.scheduler)
    return pipeline.to(device)


def learns_variance(model: DiT) -> bool:
    """Whether half of the output is the variance, as in the official models: those predict epsilon on a ddpm
    process.
    """
    return model.config.out_channels == 2 * model.config.in_channels


def _from_folder(folder: Path, dtype: torch.dtype) -> ClassToImagePipeline:
    """A saved pipeline; `ValueError` naming the folder where something in it is missing, foreign or broken.

    `load_model` reads the transformer, since diffusers only warns of missing and unknown weights.
    """
    transformer = load_model(folder, dtype=dtype)
    disable_progress_bar()
    try:
        return ClassToImagePipeline.from_pretrained(folder, transformer=transformer, use_safetensors=True, dtype=dtype)
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is not a class-to-image pipeline: {str(error).splitlines()[0]}") from error
    finally:
        enable_progress_bar()


def choose_labels(pipeline: ClassToImagePipeline, config: SampleConfig) -> tuple[list[int], list[str]]:
    """Class numbers and captions, one a picture. `ValueError` on an unknown label, or more labels than pictures."""
    numbers, num_classes = pipeline.labels, pipeline.transformer.config.num_classes
    names = {number: name for name, number in numbers.items()}
    wanted = config.labels or (BUNDLED[config.model].labels if config.model in BUNDLED else ())
    if len(config.labels) > config.num_images:
        raise ValueError(
            f"num_images must be at least the number of labels, {len(config.labels)}, got {config.num_images}"
        )
    if wanted:
        chosen = []
        for label in wanted:
            is_number = label.isdecimal() and label not in numbers
            if is_number and int(label) >= num_classes:
                raise ValueError(f"label numbers go from 0 to {num_classes - 1}, got {label}")
            chosen.append(int(label) if is_number else pipeline.get_label_ids([label])[0])
    else:
        count = min(config.num_images, num_classes)
        chosen = [index * num_classes // count for index in range(count)]
    labels = [chosen[index % len(chosen)] for index in range(config.num_images)]
    return labels, [names.get(label, str(label)) for label in labels]


# ----------------------------------------------------------------------------------------------------------------------
# The comparison


@dataclass(frozen=True)
class Sampled:
    """Pictures (b c h w) in [0, 1] on the CPU, and the seconds they took."""

    pictures: Tensor
    seconds: float


class Sampler:
    """Samples one pipeline from the same seed and labels, again and again: the start noise is the same at any number of
    steps, and what an ancestral scheduler draws follows it."""

    def __init__(self, pipeline: ClassToImagePipeline, config: SampleConfig, labels: list[int]) -> None:
        self.pipeline, self.config, self.labels = pipeline, config, labels

    def __call__(self, description: str, num_steps: int) -> Sampled:
        self.pipeline.set_progress_bar_config(desc=f"{description:>10}")
        started = time.perf_counter()
        images = self.pipeline(
            self.labels,
            guidance_scale=self.config.guidance_scale,
            guidance_channels=self.config.guidance_channels,
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(self.config.seed),
            output_type="pt",
        ).images
        return Sampled(images.float().cpu(), time.perf_counter() - started)

    def cached(self, method: CacheMethod, description: str = "cached") -> tuple[Sampled, CacheSummary]:
        enable_cache(self.pipeline, method)
        try:
            return self(description, self.config.steps), cache_summary(self.pipeline)
        finally:
            disable_cache(self.pipeline)

    def warm_up(self, method: CacheMethod | None) -> None:
        """First calls allocate and, where asked for, compile: that is no part of any time."""
        if not self.config.compile:
            self("warm-up", 1)
            return
        self.pipeline.transformer.compile(fullgraph=True)
        self("compiling", 2)
        if method is not None:
            self.cached(method, "compiling")


def sample_and_compare(config: SampleConfig) -> Report:
    """Writes `full.png`, `cached.png`, `fewer_steps.png`, `comparison.png` and `report.json` into `config.out`.

    `ValueError` on a label, scheduler or cache that is not to be had, or a cache that would never reuse; `OSError`
    where `out` cannot be written. All of it before anything is sampled.
    """
    method = None if config.cache == "none" else parse_method(config.cache)
    check_writable(config.out)
    pipeline = load_pipeline(config)
    labels, captions = choose_labels(pipeline, config)
    if method is not None:
        check_method(pipeline, method, config.steps)
    sampler = Sampler(pipeline, config, labels)
    sampler.warm_up(method)

    full = sampler("full", config.steps)
    rows, sampled = [Row.of("full", full, full, steps=config.steps)], {"full": full}
    if method is not None:
        cached, summary = sampler.cached(method)
        rows.append(Row.of("cached", cached, full, steps=config.steps, summary=summary))
        at_equal_time = max(1, min(config.steps - 1, round(config.steps * cached.seconds / full.seconds)))
        num_fewer = config.fewer_steps or at_equal_time
        fewer = sampler("fewer", num_fewer)
        rows.append(Row.of("fewer_steps", fewer, full, steps=num_fewer, reference_steps=config.steps))
        sampled |= {"cached": cached, "fewer_steps": fewer}

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    report = Report(
        tuple(rows), settings, captions, peak_memory_bytes(pipeline.device), machine(pipeline.device), versions()
    )
    save_pictures(config.out, sampled, captions)
    with atomic_file(config.out / "report.json") as draft:
        draft.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return report


def save_pictures(folder: Path, sampled: Mapping[str, Sampled], captions: Sequence[str]) -> None:
    """A labelled grid a run, and `comparison.png`: the first pictures of each run, one run a row. Grids of an earlier
    call that this one does not make go."""
    for name in ("full", "cached", "fewer_steps", "comparison"):
        (folder / f"{name}.png").unlink(missing_ok=True)
    rows = {
        name: VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(run.pictures))
        for name, run in sampled.items()
    }
    for name, pictures in rows.items():
        with atomic_file(folder / f"{name}.png") as draft:
            labelled_grid(pictures, captions).save(draft)
    if len(rows) > 1:
        shown = captions[:NUM_COMPARED]
        pictures = [picture for row in rows.values() for picture in row[:NUM_COMPARED]]
        names = [f"{name.replace('_', ' ')}: {caption}" for name in rows for caption in shown]
        with atomic_file(folder / "comparison.png") as draft:
            labelled_grid(pictures, names, num_columns=len(shown)).save(draft)


def check_writable(folder: Path) -> None:
    """Makes the folder; `OSError` where no file can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_method(pipeline: ClassToImagePipeline, method: CacheMethod, num_steps: int) -> None:
    """`ValueError` where this model has not what the method reuses, or no step of such a run would reuse."""
    method.site.check(pipeline.transformer)
    pipeline.scheduler.set_timesteps(num_steps)
    if all(resolve(method.schedule, pipeline.scheduler.timesteps.tolist())):
        raise ValueError(f"cache {method} would never reuse in {num_steps} steps of this sampler")


# ----------------------------------------------------------------------------------------------------------------------
# Where it ran


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held: on the GPU where it runs there, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: torch.device) -> dict[str, str | int]:
    """What a reader needs to judge the times."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "system": platform.platform()}


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("skipdit", "torch", "diffusers")}
