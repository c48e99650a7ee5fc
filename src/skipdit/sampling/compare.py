"""Compares samples of the full run with those of shallow guidance, of a cache, and of fewer steps in the same time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.data.videos import frame_grid, side_by_side, write_gif, write_mp4
from skipdit.environment import machine, peak_memory_bytes, versions
from skipdit.files.output import OutputFolder, output_folder, to_json
from skipdit.interfaces import Fields
from skipdit.loading import Source, load_source
from skipdit.metrics.paired import PairedScore, check_ssim_size
from skipdit.metrics.table import Scores
from skipdit.models.costs import count_flops
from skipdit.pictures import labelled_grid, to_pictures
from skipdit.report import record
from skipdit.runs import Conditioning, OwnCache, Runner, Sampled, check_method, guidance_options
from skipdit.sampling.config import SampleConfig
from skipdit.tasks.task import Chosen

NUM_COMPARED = 6  # pictures per row of comparison.png
CLIP_FPS, CLIP_SCALE = 8, 3  # frames per second of videos, and the factor by which they are enlarged
LARGE = 256  # videos of at least so many pixels per side are not enlarged


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run, compared with the full run."""

    name: str
    """full, shallow_guidance, cached or fewer_steps"""
    steps: int
    """denoising steps"""
    steps_full: int
    """number of full steps"""
    steps_reused: int
    """number of reuse steps"""
    seconds: float
    """wall-clock time, without the first calls"""
    speedup: float
    """seconds of the full run divided by those of this run"""
    compute_ratio: float
    """FLOPs of the transformer in the full run divided by those in this run"""
    scores: Scores = field(default_factory=dict)
    """distances to the pictures or frames of the full run, by the name of the metric; empty for the full run itself"""
    bytes_held: int = 0
    """peak memory that the cache held"""
    num_samples: int
    """pictures or clips"""
    num_broken: int
    """number of samples that are not finite"""

    @classmethod
    def of(cls, name: str, run: Sampled, full: Sampled, *, compute_ratio: float | None = None) -> "Row":
        """Return the row of a run. compute_ratio: if its cache does not count it."""
        return cls(
            name=name,
            steps=run.num_inference_steps,
            steps_full=int(run.steps[0]),
            steps_reused=int(run.steps[1]),
            seconds=run.seconds,
            speedup=full.seconds / run.seconds,
            compute_ratio=compute_ratio or run.compute_ratio,
            scores={} if run is full else run.scores(full.samples),
            bytes_held=(run.counts and run.counts.bytes_held) or 0,
            num_samples=len(run.samples),
            num_broken=run.num_broken,
        )

    @property
    def psnr(self) -> PairedScore | None:
        """Return the PSNR; `None` for the full run."""
        return self.scores.get("psnr")

    @property
    def psnr_db(self) -> float | None:
        """Return the mean PSNR; `None` for the full run, or if it is not finite."""
        return None if self.psnr is None else self.psnr.finite_mean

    @property
    def ssim(self) -> float | None:
        """Return the mean SSIM; `None` for the full run."""
        return self.scores["ssim"].mean if "ssim" in self.scores else None


@dataclass(frozen=True)
class Comparison:
    """The runs of one call, and the machine that made them."""

    rows: tuple[Row, ...]
    config: Fields
    """fields of the `SampleConfig`, with the model's task"""
    labels: list[str]
    """captions, one per sample"""
    peak_memory_bytes: int
    """peak memory of the process on its device"""
    machine: dict[str, str | int]
    """device, its name, threads, system"""
    versions: dict[str, str]
    """versions of Python and packages, by name"""

    @property
    def broken(self) -> dict[str, str]:
        """Return the number of samples that are not finite, for each run that has any."""
        return {row.name: f"{row.num_broken} of {row.num_samples}" for row in self.rows if row.num_broken}

    def to_dict(self) -> Fields:
        """Return the content of the JSON: the numbers of the cached run first, then every row."""
        rows = [record(row, "psnr", "psnr_db", "ssim") for row in self.rows]
        top = {"seconds_full": self.rows[0].seconds}
        for row in rows:
            if row["name"] == "cached":
                names = ("speedup", "compute_ratio", "psnr_db", "ssim", "steps_full", "steps_reused", "bytes_held")
                top |= {"seconds_cached": row["seconds"], **{name: row[name] for name in names}}
        return top | asdict(self) | {"rows": rows, "seed": self.config["seed"], "broken_samples": self.broken}


# ----------------------------------------------------------------------------------------------------------------------
# The comparison


def load(config: SampleConfig) -> Source:
    """Return the model that a config names; see `skipdit.loading.load_source`."""
    names = ("task", "device", "dtype", "scheduler", "vae")
    return load_source(
        config.model, weights=config, published=config, **{name: getattr(config, name) for name in names}
    )


def choose_samples(source: Source, config: SampleConfig) -> Chosen:
    """Return the class number or prompt, and the caption, of each sample."""
    count = source.sampler.task.count_of(len(config.labels) + len(config.prompt))
    return source.choose({"labels": config.labels, "prompt": config.prompt}, config.num_samples or count)


def runner_of(source: Source, config: SampleConfig, conditions: Conditioning, *, seed: int | None = None) -> Runner:
    """Return the runner of a config's model for these conditions. seed: by default that of the config."""
    config = source.complete(config)
    return Runner.of(
        source.sampler,
        conditions,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        options={"guidance_channels": config.guidance_channels},
        seed=config.seed if seed is None else seed,
    )


def cost_ratio(run: Runner, config: SampleConfig, description: str = "") -> float:
    """Return the FLOPs of a step with ordinary guidance divided by those of a step with the config's guidance.
    description: label of the progress bar."""
    if config.guidance == "full":
        return 1.0
    step = partial(run, num_inference_steps=1, description=description)
    shallow_step = partial(step, **guidance_options(config.guidance, config.guidance_shallow_units))
    shallow, full = (count_flops(run.pipeline.transformer, call) for call in (shallow_step, step))
    return full / shallow


def warm_up(run: Runner, cache: OwnCache | None, config: SampleConfig) -> float:
    """Make the first calls, which allocate memory and may compile, so that they are not part of any measured time.

    Return the FLOPs of a step with ordinary guidance divided by those of a step with the config's guidance.
    """
    guidance, ratio = guidance_options(config.guidance, config.guidance_shallow_units), 1.0
    if config.guidance != "full":
        ratio = cost_ratio(run, config, description="warm-up")
    elif not config.compile:
        run(num_inference_steps=1, description="warm-up")
    if config.compile:
        run.pipeline.transformer.compile(fullgraph=True)
        for options in ({}, guidance)[: 1 if config.guidance == "full" else 2]:
            run(num_inference_steps=2, description="compiling", **options)
        if cache is not None:
            run(cache, description="compiling", **guidance)
    return ratio


def sample_and_compare(config: SampleConfig) -> Comparison:
    """Write a picture per run (`full.png` and, if the config selects them, `shallow_guidance.png`, `cached.png` and
    `fewer_steps.png`), `comparison.png` and `report.json` into `config.out`. For clips, the pictures show some of the
    frames, and each has an `.mp4` and a `.gif` beside it. Other files of an earlier run are removed.

    Raises, before anything is sampled, `ValueError` if a label, prompt, scheduler or cache does not exist or the cache
    would never reuse, and `OSError` if `out` cannot be written or has files in the way that skipdit did not write.
    """
    if config.makes_set:
        raise ValueError("a comparison is made without npz and png: call skipdit.sampling.sets.sample_set")
    if config.cache.partition(":")[0] not in ("none", "calibrated"):
        parse_method(config.cache)
    with output_folder(config.out, "sample", overwrite=config.overwrite) as out:
        names = _runs_of(config)
        names = names if len(names) == 1 else (*names, "comparison")
        out.claim(("report.json", *(f"{name}.png" for name in names)))
        source = load(config)
        config = source.complete(config)
        method = source.cache(config.cache)
        conditions, captions = choose_samples(source, config)
        if source.sampler.task.is_video:
            out.claim(f"{name}.{suffix}" for name in names for suffix in ("mp4", "gif"))
        if len(names) > 1:
            check_ssim_size(source.sampler.picture_size)
        if method is not None:
            run = runner_of(source, config, conditions)
            check_method(run.pipeline, method, run.num_inference_steps)
        report, sampled = run_all(source, method, config, conditions, captions)
        save_samples(out, {name: run.samples for name, run in sampled.items()}, captions)
        out.write_text("report.json", to_json(report.to_dict()))
        out.remove_earlier()
    return report


def _runs_of(config: SampleConfig) -> tuple[str, ...]:
    """Return the names of the runs that a config selects."""
    runs = ("shallow_guidance",) * (config.guidance == "shallow") + ("cached",) * (config.cache != "none")
    return ("full", *runs, "fewer_steps") if runs else ("full",)


def run_all(
    source: Source, method: CacheMethod | None, config: SampleConfig, conditions: Conditioning, captions: list[str]
) -> tuple[Comparison, dict[str, Sampled]]:
    """Make all runs of a config: in full, with shallow guidance, cached, and with fewer steps in the time of the run
    before."""
    run, cache = runner_of(source, config, conditions), method and OwnCache(method)
    steps = run.num_inference_steps
    guidance_ratio = warm_up(run, cache, config)
    guidance = guidance_options(config.guidance, config.guidance_shallow_units)
    full = run(description="full")
    rows, sampled = [Row.of("full", full, full)], {"full": full}
    for name in _runs_of(config)[1:]:
        if name == "shallow_guidance":
            result, ratio = run(description="shallow", **guidance), guidance_ratio
        elif name == "cached":
            result, ratio = run(cache, description="cached", **guidance), None
        else:
            at_equal_time = max(1, min(steps - 1, round(steps * rows[-1].seconds / full.seconds)))
            result = run(num_inference_steps=config.fewer_steps or at_equal_time, description="fewer")
            ratio = steps / result.num_inference_steps
        rows.append(Row.of(name, result, full, compute_ratio=ratio))
        sampled[name] = result
    settings = asdict(config) | {"task": source.sampler.task.name}
    device = run.pipeline.device
    comparison = Comparison(tuple(rows), settings, captions, peak_memory_bytes(device), machine(device), versions())
    return comparison, sampled


def save_samples(out: OutputFolder, runs: Mapping[str, Tensor], captions: Sequence[str]) -> None:
    """Write a labelled grid per run and, if there are several runs, the first samples of each in `comparison.png`; for
    clips also videos."""
    first_captions, names = captions[:NUM_COMPARED], [name.replace("_", " ") for name in runs]
    first = {name: samples[:NUM_COMPARED] for name, samples in zip(names, runs.values(), strict=True)}
    samples = next(iter(runs.values()))
    is_video, scale = samples.ndim == 5, 1 if samples.shape[-1] >= LARGE else CLIP_SCALE
    for name, samples in runs.items():
        grid = frame_grid(samples, captions) if is_video else labelled_grid(to_pictures(samples), captions)
        save_picture(out, name, grid)
        if is_video:
            save_clips(out, name, side_by_side({name.replace("_", " "): samples}, captions, scale=scale))
    if len(runs) > 1:
        headings = [f"{name}: {caption}" for name in names for caption in first_captions]
        if is_video:
            save_picture(out, "comparison", frame_grid(torch.cat(list(first.values())), headings))
            save_clips(out, "comparison", side_by_side(first, first_captions, scale=scale))
        else:
            pictures = to_pictures(torch.cat(list(first.values())))
            save_picture(out, "comparison", labelled_grid(pictures, headings, num_columns=len(first_captions)))


def save_picture(out: OutputFolder, name: str, picture: Image.Image) -> None:
    with out.file(f"{name}.png") as draft:
        picture.save(draft)


def save_clips(out: OutputFolder, name: str, frames: np.ndarray) -> None:
    """Write an .mp4 and a .gif of frames (f h w 3) in bytes."""
    for suffix, write in (("mp4", write_mp4), ("gif", write_gif)):
        with out.file(f"{name}.{suffix}") as draft:
            write(draft, frames, CLIP_FPS)
