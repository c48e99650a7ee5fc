"""Samples in full, with shallow guidance or cached, and with fewer steps at that run's wall time, and reports times and
distances.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.schedule import resolve
from skipdit.cache.state import CacheSummary
from skipdit.environment import machine, peak_memory_bytes, versions
from skipdit.files import OutputFolder, output_folder, to_json
from skipdit.loading import DTypeName, ObjectiveName, Source, load_source
from skipdit.metrics.paired import PairedScore, check_ssim_size, psnr_db, ssim
from skipdit.models.costs import count_flops
from skipdit.models.shallow_path import Guidance
from skipdit.options import check_numbers
from skipdit.pictures import labelled_grid, to_pictures
from skipdit.tasks import TASKS, TaskName
from skipdit.tasks.task import Chosen, Sampler
from skipdit.videos import frame_grid, side_by_side, write_gif, write_mp4

NUM_COMPARED = 6  # pictures a row of comparison.png
MAX_FILES = 500_000  # PNG files of a set, in one folder, whose marker lists them
CLIP_FPS, CLIP_SCALE = 8, 3  # of the written videos: frames a second, and how often a pixel stands for itself


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What `skipdit sample` does.

    task: class-to-image, class-to-video, text-to-image or text-to-video; by default that of the model.
    model: `emoji`, `emoji-clips`, `emoji-text` or `emoji-text-clips` (bundled, one a task), the folder of a pipeline,
    or a checkpoint (official or own; latents need --vae). By default the bundled model of the task.
    labels: class names or numbers, repeated in turn; by default some that the bundled model draws well, else spread
    over all classes. prompt: texts, repeated in turn, for the text tasks. num_samples: pictures or clips.
    guidance_scale: classifier-free guidance, none at 1. guidance_channels: guide only the first few channels; the
    official DiT sampler guides 3 of its 4. guidance: full, or shallow: the first and the last units alone make the
    unconditional prediction, as a model can that was trained with routing.deep_drop; a run of its own shows it, and the
    cached one has it too. guidance_shallow_units: how many first, and as many last, units; by default as in training.
    steps: of the sampler. cache: auto, a spec such as N3 or skip-taylor:N3-o1, the path of a schedule.json, calibrated
    (or calibrated:2x: a schedule that came with the model), or none.
    fewer_steps: of the rival; by default as many as fit into the cached run's wall time.
    scheduler: euler or dpm for a flow model, ddim, dpm or ddpm for the others; by default the model's own.
    vae: folder of an AutoencoderKL, or of a pipeline with one, for models of latents. Of a file of weights, what it
    does not tell: num_attention_heads; num_classes; objective: epsilon, v_prediction, flow (noise - data), sit (SiT's)
    or repa (REPA's); drop: roots of keys to leave out, as projectors of REPA.
    compile: compile the model, one whole graph a kind of step. seed: the same seed gives the same pictures.
    npz, png: a set of num_samples for evaluation instead of a comparison, with this cache and guidance only, in one
    process or several (torchrun): samples.npz as ADM's evaluation reads it, a folder of PNG files, or both. Of all
    classes in turn where no labels are given. batch_size: of a set, by default 50 pictures or 4 clips.
    random_labels: of a set, draw each label or prompt from (seed, index) instead of taking them in turn.
    """

    task: TaskName | None = None
    model: str | None = None
    labels: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ()
    num_samples: int | None = None
    steps: int = 50
    guidance_scale: float = 2.0
    guidance_channels: int | None = None
    guidance: Guidance = "full"
    guidance_shallow_units: int | None = None
    fewer_steps: int | None = None
    cache: str = "auto"
    scheduler: str | None = None
    vae: Path | None = None
    num_attention_heads: int | None = None
    num_classes: int | None = None
    objective: ObjectiveName | None = None
    drop: tuple[str, ...] = ()
    dtype: DTypeName = "float32"
    device: str = "auto"
    compile: bool = False
    seed: int = 0
    npz: bool = False
    png: bool = False
    batch_size: int | None = None
    random_labels: bool = False
    out: Path = Path("out/sample")
    overwrite: bool = False
    """Replace files in --out also where an earlier run did not write them, each of which is named."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("num_samples", "steps", "fewer_steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.steps > 1000:
            raise ValueError(f"steps must be at most 1000, got {self.steps}")
        if self.fewer_steps is not None and self.cache == "none" and self.guidance == "full":
            raise ValueError(f"fewer_steps is for the rival of a cached run, got {self.fewer_steps} with cache none")
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
        for name, allowed in (
            ("dtype", get_args(DTypeName)),
            ("task", (*TASKS, None)),
            ("guidance", get_args(Guidance)),
        ):
            if getattr(self, name) not in allowed:
                names = ", ".join(value for value in allowed if value)
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}")

    @property
    def makes_set(self) -> bool:
        """Whether many samples of one setting are asked for, not a comparison."""
        return self.npz or self.png


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. `speedup` by wall time against the full run, `compute_ratio` by FLOPs of the transformer; PSNR and SSIM
    to the full run's pictures or frames: `None` for the full run itself. num_broken: of its num_samples pictures or
    clips those that are not finite."""

    name: str
    steps: int
    steps_full: int
    steps_reused: int
    seconds: float
    speedup: float
    compute_ratio: float
    psnr: PairedScore | None
    ssim: float | None
    bytes_held: int
    num_samples: int
    num_broken: int

    @property
    def psnr_db(self) -> float | None:
        """The mean; `None` also where there is no finite one."""
        return None if self.psnr is None else self.psnr.finite_mean

    @classmethod
    def of(
        cls,
        name: str,
        run: "Sampled",
        reference: "Sampled",
        *,
        steps: int,
        summary: CacheSummary | None = None,
        compute_ratio: float = 1.0,
    ) -> "Row":
        frames, reference_frames = run.frames, reference.frames
        return cls(
            name=name,
            steps=steps,
            steps_full=steps if summary is None else summary.steps_full,
            steps_reused=0 if summary is None else summary.steps_reused,
            seconds=run.seconds,
            speedup=reference.seconds / run.seconds,
            compute_ratio=compute_ratio if summary is None else summary.compute_ratio,
            psnr=None if run is reference else PairedScore.of(psnr_db(frames, reference_frames)),
            ssim=None if run is reference else ssim(frames, reference_frames).mean().item(),
            bytes_held=0 if summary is None else summary.peak_bytes_held,
            num_samples=len(run.samples),
            num_broken=run.num_broken,
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

    @property
    def broken(self) -> dict[str, str]:
        """How many samples are not finite, of each run that has such."""
        return {row.name: f"{row.num_broken} of {row.num_samples}" for row in self.rows if row.num_broken}

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the figures of the cached run on top, then every row."""
        rows = [asdict(row) | {"psnr_db": row.psnr_db} for row in self.rows]
        top = {"seconds_full": self.rows[0].seconds}
        for cached in (row for row in self.rows if row.name == "cached"):
            top |= {"seconds_cached": cached.seconds, "speedup": cached.speedup, "compute_ratio": cached.compute_ratio}
            top |= {"psnr_db": cached.psnr_db, "ssim": cached.ssim, "steps_full": cached.steps_full}
            top |= {"steps_reused": cached.steps_reused, "bytes_held": cached.bytes_held}
        return top | asdict(self) | {"rows": rows, "seed": self.config["seed"], "broken_samples": self.broken}


# ----------------------------------------------------------------------------------------------------------------------
# What a config names


def load(config: SampleConfig) -> Source:
    """The model that a config names; see `skipdit.loading.load_source`."""
    return load_source(
        config.model,
        task=config.task,
        device=config.device,
        dtype=config.dtype,
        scheduler=config.scheduler,
        vae=config.vae,
        num_attention_heads=config.num_attention_heads,
        num_classes=config.num_classes,
        objective=config.objective,
        drop=config.drop,
    )


def choose_wanted(source: Source, config: SampleConfig) -> Chosen:
    """Return what is sampled, and captions, one per sample."""
    task = source.sampler.task
    asked = {"labels": config.labels, "prompt": config.prompt}
    return task.choose(source.sampler.pipeline, asked, config.num_samples or task.num_samples, source.showcase)


# ----------------------------------------------------------------------------------------------------------------------
# The comparison


@dataclass(frozen=True)
class Sampled:
    """Pictures (b c h w) or clips (b f c h w) in [0, 1] on the CPU, and the seconds they took."""

    samples: Tensor
    seconds: float

    @property
    def frames(self) -> Tensor:
        """All pictures, one by one (n c h w)."""
        return self.samples.flatten(0, -4)

    @property
    def num_broken(self) -> int:
        """How many of the samples hold NaN (or infinity: see `skipdit.pipelines.keep_broken`)."""
        return int((~self.samples.isfinite()).flatten(1).any(dim=1).sum())


class TimedSampler:
    """Samples one pipeline from the same seed and wishes, again and again: the start noise is the same at any number of
    steps, and what an ancestral scheduler draws follows it."""

    def __init__(self, sampler: Sampler, config: SampleConfig, wanted: list[Any]) -> None:
        self.sampler, self.config, self.wanted = sampler, config, wanted
        self.pipeline = sampler.pipeline
        self.guidance_ratio = 1.0  # of FLOPs: of a step with ordinary guidance over one with the config's

    def __call__(self, description: str, num_steps: int, guidance: Guidance = "full") -> Sampled:
        self.pipeline.set_progress_bar_config(desc=f"{description:>10}")
        started = time.perf_counter()
        samples = self.sampler.sample(
            self.wanted,
            guidance_scale=self.config.guidance_scale,
            guidance_channels=self.config.guidance_channels,
            guidance=guidance,
            guidance_shallow_units=None if guidance == "full" else self.config.guidance_shallow_units,
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        return Sampled(samples.cpu(), max(time.perf_counter() - started, 1e-9))

    def cached(self, method: CacheMethod, description: str = "cached") -> tuple[Sampled, CacheSummary]:
        enable_cache(self.pipeline, method)
        try:
            return self(description, self.config.steps, self.config.guidance), cache_summary(self.pipeline)
        finally:
            disable_cache(self.pipeline)

    def warm_up(self, method: CacheMethod | None) -> None:
        """First calls allocate and, where asked for, compile: that is no part of any time. FLOPs are counted there."""
        guidance, model = self.config.guidance, self.pipeline.transformer
        if guidance != "full":
            flops = [count_flops(model, partial(self, "warm-up", 1, each)) for each in (guidance, "full")]
            self.guidance_ratio = flops[1] / flops[0]
        elif not self.config.compile:
            self("warm-up", 1)
        if not self.config.compile:
            return
        model.compile(fullgraph=True)
        for each in dict.fromkeys(("full", guidance)):
            self("compiling", 2, each)
        if method is not None:
            self.cached(method, "compiling")


def sample_and_compare(config: SampleConfig) -> Report:
    """Write `full.png`, `shallow_guidance.png` where that is asked for, `cached.png`, `fewer_steps.png`,
    `comparison.png` and `report.json` into `config.out`; of clips the pictures show some frames, and beside each is an
    `.mp4` and a `.gif`. What an earlier run wrote there and this one does not make goes.

    `ValueError` on a label, prompt, scheduler or cache that does not exist, or a cache that would never reuse;
    `OSError` where `out` cannot be written, or holds such files of somebody else. All of it before anything is sampled.
    """
    if config.makes_set:
        raise ValueError("a comparison is made without npz and png: call skipdit.sample_set.sample_set")
    if config.cache.partition(":")[0] not in ("none", "calibrated"):
        parse_method(config.cache)
    with output_folder(config.out, "sample", overwrite=config.overwrite) as out:
        names = _runs_of(config)
        names = names if len(names) == 1 else (*names, "comparison")
        out.claim(("report.json", *(f"{name}.png" for name in names)))
        source = load(config)
        method = source.cache(config.cache)
        wanted, captions = choose_wanted(source, config)
        if source.sampler.task.is_video:
            out.claim(f"{name}.{suffix}" for name in names for suffix in ("mp4", "gif"))
        if len(names) > 1:
            check_ssim_size(source.sampler.picture_size)
        if method is not None:
            check_method(source.sampler.pipeline, method, config.steps)
        report, sampled = run_all(source, method, config, wanted, captions)
        save_samples(out, {name: run.samples for name, run in sampled.items()}, captions)
        out.write_text("report.json", to_json(report.to_dict()))
        out.remove_earlier()
    return report


def _runs_of(config: SampleConfig) -> tuple[str, ...]:
    """The names of the runs that a config asks for."""
    asked = ("shallow_guidance",) * (config.guidance == "shallow") + ("cached",) * (config.cache != "none")
    return ("full", *asked, "fewer_steps") if asked else ("full",)


def run_all(
    source: Source, method: CacheMethod | None, config: SampleConfig, wanted: list[Any], captions: list[str]
) -> tuple[Report, dict[str, Sampled]]:
    """Sample in full, and with what the config asks for: shallow guidance, a cache, and then fewer steps in the time of
    the last."""
    pipeline, steps = source.sampler.pipeline, config.steps
    sampler = TimedSampler(source.sampler, config, wanted)
    sampler.warm_up(method)
    full = sampler("full", steps)
    rows, sampled = [Row.of("full", full, full, steps=steps)], {"full": full}
    for name in _runs_of(config)[1:]:
        ratio, summary, num_steps = 1.0, None, steps
        if name == "shallow_guidance":
            run, ratio = sampler("shallow", steps, config.guidance), sampler.guidance_ratio
        elif name == "cached":
            assert method is not None
            run, summary = sampler.cached(method)
        else:
            at_equal_time = max(1, min(steps - 1, round(steps * rows[-1].seconds / full.seconds)))
            num_steps = config.fewer_steps or at_equal_time
            run, ratio = sampler("fewer", num_steps), steps / num_steps
        rows.append(Row.of(name, run, full, steps=num_steps, summary=summary, compute_ratio=ratio))
        sampled[name] = run
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    settings["task"] = source.sampler.task.name
    report = Report(
        tuple(rows), settings, captions, peak_memory_bytes(pipeline.device), machine(pipeline.device), versions()
    )
    return report, sampled


def save_samples(out: OutputFolder, runs: Mapping[str, Tensor], captions: Sequence[str]) -> None:
    """Write a labelled grid per run and, of several runs, the first samples of each in `comparison.png`; of clips also
    the videos."""
    shown, names = captions[:NUM_COMPARED], [name.replace("_", " ") for name in runs]
    first = {name: samples[:NUM_COMPARED] for name, samples in zip(names, runs.values(), strict=True)}
    is_video = next(iter(runs.values())).ndim == 5
    for name, samples in runs.items():
        grid = frame_grid(samples, captions) if is_video else labelled_grid(to_pictures(samples), captions)
        save_picture(out, name, grid)
        if is_video:
            save_clips(out, name, side_by_side({name.replace("_", " "): samples}, captions, scale=CLIP_SCALE))
    if len(runs) > 1:
        headings = [f"{name}: {caption}" for name in names for caption in shown]
        if is_video:
            save_picture(out, "comparison", frame_grid(torch.cat(list(first.values())), headings))
            save_clips(out, "comparison", side_by_side(first, shown, scale=CLIP_SCALE))
        else:
            pictures = to_pictures(torch.cat(list(first.values())))
            save_picture(out, "comparison", labelled_grid(pictures, headings, num_columns=len(shown)))


def save_picture(out: OutputFolder, name: str, picture: Image.Image) -> None:
    with out.file(f"{name}.png") as draft:
        picture.save(draft)


def save_clips(out: OutputFolder, name: str, frames: np.ndarray) -> None:
    """Write an .mp4 and a .gif of frames (f h w 3), bytes."""
    for suffix, write in (("mp4", write_mp4), ("gif", write_gif)):
        with out.file(f"{name}.{suffix}") as draft:
            write(draft, frames, CLIP_FPS)


def check_method(pipeline: Any, method: CacheMethod, num_steps: int) -> None:
    """`ValueError` where this model has not what the method reuses, or no step of such a run would reuse."""
    enable_cache(pipeline, method)
    disable_cache(pipeline)
    if any(part.schedule.is_adaptive for part in method.parts):
        return
    pipeline.scheduler.set_timesteps(num_steps)
    timesteps = pipeline.scheduler.timesteps.tolist()
    if all(all(resolve(part.schedule, timesteps)) for part in method.parts):
        raise ValueError(f"cache {method} would never reuse in {num_steps} steps of this sampler")
