"""Samples in full, with shallow guidance or cached, and with fewer steps at that run's wall time, and reports times and
distances.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

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
from skipdit.metrics.table import score_pictures
from skipdit.models.costs import count_flops
from skipdit.pictures import labelled_grid, to_pictures
from skipdit.report import record
from skipdit.runs import (
    OwnCache,
    Runner,
    Sampled,
    check_method,
    guidance_options,
)
from skipdit.sampling.config import SampleConfig
from skipdit.tasks.task import Chosen

NUM_COMPARED = 6  # pictures per row of comparison.png
CLIP_FPS, CLIP_SCALE = 8, 3  # of the written videos: frames per second, and pixels per side of a pixel
LARGE = 256  # pixels per side of clips that are written as they are


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run, beside the full one."""

    name: str
    """full, shallow_guidance, cached or fewer_steps"""
    steps: int
    """denoising steps"""
    steps_full: int
    """of them, those that ran every unit"""
    steps_reused: int
    """of them, those that took deep features from the cache"""
    seconds: float
    """wall time, without the first calls"""
    speedup: float
    """seconds of the full run over this one's"""
    compute_ratio: float
    """FLOPs of the transformer in the full run over those in this one"""
    scores: Mapping[str, PairedScore] = field(default_factory=dict)
    """distances to the pictures or frames of the full run, by the name of the metric; empty for the full run itself"""
    bytes_held: int = 0
    """the most that the cache held"""
    num_samples: int
    """pictures or clips"""
    num_broken: int
    """of them, those that are not finite"""

    @classmethod
    def of(cls, name: str, run: Sampled, full: Sampled, *, compute_ratio: float | None = None) -> "Row":
        """compute_ratio: where the run's cache does not tell it."""
        return cls(
            name=name,
            steps=run.num_inference_steps,
            steps_full=int(run.steps[0]),
            steps_reused=int(run.steps[1]),
            seconds=run.seconds,
            speedup=full.seconds / run.seconds,
            compute_ratio=compute_ratio or run.compute_ratio,
            scores={} if run is full else score_pictures(run.frames, full.frames),
            bytes_held=(run.counts and run.counts.bytes_held) or 0,
            num_samples=len(run.samples),
            num_broken=run.num_broken,
        )

    @property
    def psnr(self) -> PairedScore | None:
        """`None` for the full run."""
        return self.scores.get("psnr")

    @property
    def psnr_db(self) -> float | None:
        """The mean; `None` also where there is no finite one."""
        return None if self.psnr is None else self.psnr.finite_mean

    @property
    def ssim(self) -> float | None:
        """The mean; `None` for the full run."""
        return self.scores["ssim"].mean if "ssim" in self.scores else None


@dataclass(frozen=True)
class Comparison:
    """All runs of one call, and where they were made."""

    rows: tuple[Row, ...]
    config: Fields
    """fields of the `SampleConfig`, with the model's task"""
    labels: list[str]
    """captions, one per sample"""
    peak_memory_bytes: int
    """the most that the process has held, on its device"""
    machine: dict[str, str | int]
    """device, its name, threads, system"""
    versions: dict[str, str]
    """of Python and packages, by name"""

    @property
    def broken(self) -> dict[str, str]:
        """How many samples are not finite, of each run that has such."""
        return {row.name: f"{row.num_broken} of {row.num_samples}" for row in self.rows if row.num_broken}

    def to_dict(self) -> Fields:
        """Return the report as JSON has it: the figures of the cached run on top, then every row."""
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
    """Return what is sampled, class numbers or prompts, and captions, one of each per sample."""
    asked = {"labels": config.labels, "prompt": config.prompt}
    count = source.sampler.task.count_of(len(config.labels) + len(config.prompt))
    return source.choose(asked, config.num_samples or count)


def runner_of(source: Source, config: SampleConfig, conditions: Sequence[Any], **settings: Any) -> Runner:
    """Return what runs a config's model for these conditions. settings: further fields of `Runner`."""
    config = source.complete(config)
    return Runner.of(
        source.sampler,
        conditions,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        options={"guidance_channels": config.guidance_channels},
        **{"seed": config.seed, **settings},
    )


def cost_ratio(run: Runner, config: SampleConfig, **options: Any) -> float:
    """Return the FLOPs of a step with ordinary guidance over those of one with the config's. options: of the runs."""
    if config.guidance == "full":
        return 1.0
    step = partial(run, num_inference_steps=1, **options)
    shallow = guidance_options(config.guidance, config.guidance_shallow_units)
    own, full = (count_flops(run.pipeline.transformer, partial(step, **guidance)) for guidance in (shallow, {}))
    return full / own


def warm_up(run: Runner, cache: OwnCache | None, config: SampleConfig) -> float:
    """Make the first calls, which allocate and, where asked for, compile: that is no part of any time.

    Return the FLOPs of a step with ordinary guidance over those of one with the config's.
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
    """Write `full.png`, `shallow_guidance.png` where that is asked for, `cached.png`, `fewer_steps.png`,
    `comparison.png` and `report.json` into `config.out`; of clips the pictures show some frames, and beside each is an
    `.mp4` and a `.gif`. What an earlier run wrote there and this one does not make goes.

    `ValueError` on a label, prompt, scheduler or cache that does not exist, or a cache that would never reuse;
    `OSError` where `out` cannot be written, or holds such files of somebody else. All of it before anything is sampled.
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
    """The names of the runs that a config asks for."""
    asked = ("shallow_guidance",) * (config.guidance == "shallow") + ("cached",) * (config.cache != "none")
    return ("full", *asked, "fewer_steps") if asked else ("full",)


def run_all(
    source: Source, method: CacheMethod | None, config: SampleConfig, conditions: list[Any], captions: list[str]
) -> tuple[Comparison, dict[str, Sampled]]:
    """Sample in full, and with what the config asks for: shallow guidance, a cache, and then fewer steps in the time of
    the last."""
    run, cache = runner_of(source, config, conditions), method and OwnCache(method)
    steps = run.num_inference_steps
    guidance_ratio = warm_up(run, cache, config)
    guidance = guidance_options(config.guidance, config.guidance_shallow_units)
    full = run(description="full")
    rows, sampled = [Row.of("full", full, full)], {"full": full}
    for name in _runs_of(config)[1:]:
        if name == "shallow_guidance":
            made, ratio = run(description="shallow", **guidance), guidance_ratio
        elif name == "cached":
            made, ratio = run(cache, description="cached", **guidance), None
        else:
            at_equal_time = max(1, min(steps - 1, round(steps * rows[-1].seconds / full.seconds)))
            made = run(num_inference_steps=config.fewer_steps or at_equal_time, description="fewer")
            ratio = steps / made.num_inference_steps
        rows.append(Row.of(name, made, full, compute_ratio=ratio))
        sampled[name] = made
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    settings["task"] = source.sampler.task.name
    device = run.pipeline.device
    comparison = Comparison(tuple(rows), settings, captions, peak_memory_bytes(device), machine(device), versions())
    return comparison, sampled


def save_samples(out: OutputFolder, runs: Mapping[str, Tensor], captions: Sequence[str]) -> None:
    """Write a labelled grid per run and, of several runs, the first samples of each in `comparison.png`; of clips also
    the videos."""
    shown, names = captions[:NUM_COMPARED], [name.replace("_", " ") for name in runs]
    first = {name: samples[:NUM_COMPARED] for name, samples in zip(names, runs.values(), strict=True)}
    samples = next(iter(runs.values()))
    is_video, scale = samples.ndim == 5, 1 if samples.shape[-1] >= LARGE else CLIP_SCALE
    for name, samples in runs.items():
        grid = frame_grid(samples, captions) if is_video else labelled_grid(to_pictures(samples), captions)
        save_picture(out, name, grid)
        if is_video:
            save_clips(out, name, side_by_side({name.replace("_", " "): samples}, captions, scale=scale))
    if len(runs) > 1:
        headings = [f"{name}: {caption}" for name in names for caption in shown]
        if is_video:
            save_picture(out, "comparison", frame_grid(torch.cat(list(first.values())), headings))
            save_clips(out, "comparison", side_by_side(first, shown, scale=scale))
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
