"""Runs a pipeline in full, cached, or with fewer steps: timed, and from the same noise each time."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.schedule import resolve
from skipdit.cache.timesteps import levels_of
from skipdit.diffusion import another_scheduler
from skipdit.interfaces import Fields, Pipeline, Scheduler
from skipdit.metrics.table import Scores, score_pictures
from skipdit.models.shallow_path import Guidance
from skipdit.tasks.task import Sampler

# ----------------------------------------------------------------------------------------------------------------------
# The cache of a run


@dataclass(frozen=True)
class Counts:
    """Counts of a cache's work in a run."""

    steps_full: float
    """number of full steps"""
    steps_reused: float
    """number of reuse steps"""
    compute_ratio: float | None = None
    """FLOPs of as many full steps divided by those of the run, of the whole model; `None` if the cache does not know"""
    bytes_held: int | None = None
    """peak memory that the cache held; `None` if the cache does not know"""


class RunCache(Protocol):
    """A cache that is enabled only during a run.

    If a model cannot use it, `enable` or the run itself raises `ValueError`.
    """

    def enable(self, pipeline: Pipeline) -> None: ...

    def disable(self, pipeline: Pipeline) -> None: ...

    def counts(self, pipeline: Pipeline) -> Counts | None:
        """Return its counts in the current or last run, before it is disabled; `None` if it does not count."""
        ...


@dataclass(frozen=True)
class OwnCache:
    """A cache of ours, enabled with `skipdit.enable_cache`."""

    method: CacheMethod

    @classmethod
    def of(cls, spec: str | Path | CacheMethod) -> "OwnCache":
        return cls(parse_method(spec))

    def enable(self, pipeline: Pipeline) -> None:
        enable_cache(pipeline, self.method)

    def disable(self, pipeline: Pipeline) -> None:
        disable_cache(pipeline)

    def counts(self, pipeline: Pipeline) -> Counts:
        return counts_of(pipeline)


def counts_of(pipeline: Pipeline) -> Counts:
    """Return the counts of the enabled skipdit cache in the current or last run."""
    summary = cache_summary(pipeline)
    return Counts(summary.steps_full, summary.steps_reused, summary.compute_ratio, summary.peak_bytes_held)


@contextmanager
def switched_on(pipeline: Pipeline, cache: RunCache | None) -> Iterator[None]:
    """Enable a cache inside the `with` block; `None` enables none."""
    if cache is None:
        yield
        return
    cache.enable(pipeline)
    try:
        yield
    finally:
        cache.disable(pipeline)


def check_method(pipeline: Pipeline, method: CacheMethod, num_inference_steps: int) -> None:
    """Raise `ValueError` if the model lacks what the method reuses, or if no step of such a run would reuse."""
    with switched_on(pipeline, OwnCache(method)):
        pass
    if any(rule.schedule.is_adaptive for rule in method.rules):
        return
    if pipeline.scheduler.config.get("use_dynamic_shifting"):
        return  # the timesteps depend on the size of the sample: the cache looks at the first of them
    pipeline.scheduler.set_timesteps(num_inference_steps)
    levels = levels_of(pipeline.scheduler)
    if all(all(resolve(rule.schedule, levels)) for rule in method.rules):
        raise ValueError(f"cache {method} would never reuse in {num_inference_steps} steps of this sampler")


# ----------------------------------------------------------------------------------------------------------------------
# A run


Conditioning = Sequence[int | str | None]  # class numbers or prompts, or `None` for a model without classes


@dataclass(frozen=True)
class Sampled:
    """The result of a run."""

    samples: Tensor
    """pictures (b c h w) or clips (b f c h w) in [0, 1], on the CPU"""
    seconds: float
    """wall-clock time"""
    num_inference_steps: int
    counts: Counts | None = None
    """counts of the cache, if there was one and it counts"""

    @property
    def steps(self) -> tuple[float, float]:
        """Return the number of full steps and of reuse steps."""
        counts = self.counts or Counts(self.num_inference_steps, 0)
        return counts.steps_full, counts.steps_reused

    @property
    def compute_ratio(self) -> float:
        """Return the FLOPs of as many full steps divided by those of the run, as the cache counts them; 1 without a
        cache."""
        return 1.0 if self.counts is None else self.counts.compute_ratio or 1.0

    @property
    def frames(self) -> Tensor:
        """Return all pictures and frames (n c h w)."""
        return self.samples.flatten(0, -4)

    def scores(self, reference: Tensor) -> Scores:
        """Return the distances of all pictures and frames to the same samples of another run."""
        return score_pictures(self.frames, reference.flatten(0, -4))

    @property
    def num_broken(self) -> int:
        """Return the number of samples that contain NaN or infinity (see `skipdit.pipelines.keep_broken`)."""
        return int((~self.samples.isfinite()).flatten(1).any(dim=1).sum())


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs one pipeline repeatedly with the same conditions.

    The initial noise does not depend on the number of steps; an ancestral scheduler draws from the same generator
    after it.
    """

    pipeline: Pipeline
    """a diffusers pipeline"""
    sample: Callable[..., Tensor]
    """makes samples from conditions; takes the options of `Sampler.sample`"""
    conditions: Conditioning
    """class numbers or prompts, one per sample"""
    num_inference_steps: int
    guidance_scale: float | None
    """`None` leaves it to a pipeline of diffusers"""
    seed: int | Sequence[int] = 0
    """seed of all noise, or one per sample"""
    options: Fields = field(default_factory=dict)
    """further options of `Sampler.sample` for every run"""
    advance: Callable[[], object] | None = None
    """called after each run"""

    @classmethod
    def of(cls, sampler: Sampler, conditions: Conditioning, **settings: Any) -> "Runner":
        """Return a runner that makes samples in [0, 1]. settings: further fields."""
        return cls(pipeline=sampler.pipeline, sample=sampler.sample, conditions=conditions, **settings)

    @classmethod
    def of_latents(cls, pipeline: Pipeline, conditions: Conditioning, **settings: Any) -> "Runner":
        """Return a runner that makes latents with a pipeline of ours. settings: further fields."""

        def sample(conditions: Conditioning, **options: Any) -> Tensor:
            return pipeline(list(conditions), output_type="latent", **options).images

        return cls(pipeline=pipeline, sample=sample, conditions=conditions, **settings)

    def __call__(
        self,
        cache: RunCache | None = None,
        *,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        scheduler: str | None = None,
        description: str = "",
        **options: Any,
    ) -> Sampled:
        """Run once.

        scheduler: name of a scheduler to use instead of the pipeline's. description: label of the progress bar.
        options: further options of `Sampler.sample`.
        """
        num_steps = num_inference_steps or self.num_inference_steps
        if description:
            self.pipeline.set_progress_bar_config(desc=f"{description:>10}")
        with scheduled(self.pipeline, scheduler), switched_on(self.pipeline, cache):
            _wait_for(self.pipeline)
            start = time.perf_counter()
            samples = self.sample(
                self.conditions,
                guidance_scale=self.guidance_scale,
                num_inference_steps=num_steps,
                generator=_generators(self.seed if seed is None else seed),
                **self.options,
                **options,
            ).cpu()
            seconds = max(time.perf_counter() - start, 1e-9)
            counts = None if cache is None else cache.counts(self.pipeline)
        if self.advance is not None:
            self.advance()
        return Sampled(samples, seconds, num_steps, counts)


def guidance_options(guidance: Guidance, num_shallow_units: int | None) -> Fields:
    """Return the options of `Sampler.sample` for this guidance; only shallow guidance uses the number of units."""
    return {"guidance": guidance, "guidance_shallow_units": None if guidance == "full" else num_shallow_units}


def _generators(seed: int | Sequence[int]) -> torch.Generator | list[torch.Generator]:
    match seed:
        case int():
            return torch.Generator().manual_seed(seed)
    return [torch.Generator().manual_seed(sample_seed) for sample_seed in seed]


def _wait_for(pipeline: Pipeline) -> None:
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)


@contextmanager
def scheduled(pipeline: Pipeline, scheduler: str | None) -> Iterator[None]:
    """Give a pipeline another scheduler for the same objective inside the `with` block, by name; `None` keeps its
    own. A pipeline of diffusers keeps its betas and its shift."""
    own = pipeline.scheduler
    if scheduler is not None:
        pipeline.scheduler = another_scheduler(own, scheduler)
    try:
        yield
    finally:
        pipeline.scheduler = own


@contextmanager
def before_steps(scheduler: Scheduler, observe: Callable[[Tensor, Tensor], object]) -> Iterator[None]:
    """Call `observe` with the model's output, after guidance, and the latents before each step of a scheduler inside
    the `with` block."""
    step = scheduler.step

    @wraps(step)  # pipelines read the signature
    def observed_step(output: Tensor, timestep: object, sample: Tensor, *args: object, **options: object) -> object:
        observe(output, sample)
        return step(output, timestep, sample, *args, **options)

    scheduler.step = observed_step
    try:
        yield
    finally:
        del scheduler.step
