"""The one way to run a pipeline: in full, cached, or with fewer steps, timed, from the same noise each time."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from skipdit.diffusion import make_scheduler, objective_of
from skipdit.models.shallow_path import Guidance
from skipdit.tasks.task import Sampler

Condition = int | str | None  # a class number, a prompt, or neither, of a model without classes

# ----------------------------------------------------------------------------------------------------------------------
# With which cache


@dataclass(frozen=True)
class Counts:
    """What a cache did in a run."""

    steps_full: float
    steps_reused: float
    compute_ratio: float | None = None
    """FLOPs of the whole model: of as many full steps over those of the run; `None` where the cache does not tell"""
    bytes_held: int | None = None
    """the most at a time; `None` where the cache does not tell"""


class RunCache(Protocol):
    """A cache that is on in its own runs alone.

    `ValueError` from `enable` or from the run itself says that this model cannot have it.
    """

    def enable(self, pipeline: Any) -> None: ...

    def disable(self, pipeline: Any) -> None: ...

    def counts(self, pipeline: Any) -> Counts | None:
        """Return what it did in the current or the last run, before it is off; `None` where it does not count."""
        ...


@dataclass(frozen=True)
class OwnCache:
    """A cache of `skipdit.enable_cache`."""

    method: CacheMethod

    @classmethod
    def of(cls, spec: str | Path | CacheMethod) -> "OwnCache":
        return cls(parse_method(spec))

    def enable(self, pipeline: Any) -> None:
        enable_cache(pipeline, self.method)

    def disable(self, pipeline: Any) -> None:
        disable_cache(pipeline)

    def counts(self, pipeline: Any) -> Counts:
        return counts_of(pipeline)


def counts_of(pipeline: Any) -> Counts:
    """Return what the cache of skipdit that is on did in the current or the last run."""
    summary = cache_summary(pipeline)
    return Counts(summary.steps_full, summary.steps_reused, summary.compute_ratio, summary.peak_bytes_held)


@contextmanager
def switched_on(pipeline: Any, cache: RunCache | None) -> Iterator[None]:
    """Keep a cache on inside the block."""
    if cache is None:
        yield
        return
    cache.enable(pipeline)
    try:
        yield
    finally:
        cache.disable(pipeline)


def check_method(pipeline: Any, method: CacheMethod, num_inference_steps: int) -> None:
    """Raise `ValueError` where this model lacks what the method reuses, or no step of such a run would reuse."""
    with switched_on(pipeline, OwnCache(method)):
        pass
    if any(rule.schedule.is_adaptive for rule in method.rules):
        return
    if pipeline.scheduler.config.get("use_dynamic_shifting"):
        return  # the timesteps depend on the size of the sample: the cache looks at the first of them
    pipeline.scheduler.set_timesteps(num_inference_steps)
    timesteps = pipeline.scheduler.timesteps.tolist()
    if all(all(resolve(rule.schedule, timesteps)) for rule in method.rules):
        raise ValueError(f"cache {method} would never reuse in {num_inference_steps} steps of this sampler")


# ----------------------------------------------------------------------------------------------------------------------
# A run


@dataclass(frozen=True)
class Sampled:
    """What a run made."""

    samples: Tensor
    """pictures (b c h w) or clips (b f c h w) in [0, 1], on the CPU"""
    seconds: float
    num_inference_steps: int
    counts: Counts | None = None
    """what the cache did, where one was on and counts"""

    @property
    def steps(self) -> tuple[float, float]:
        """How many steps were made in full, and how many reused."""
        counts = self.counts or Counts(self.num_inference_steps, 0)
        return counts.steps_full, counts.steps_reused

    @property
    def compute_ratio(self) -> float:
        """FLOPs of as many full steps over those of the run, by the cache; 1 where there was none."""
        return 1.0 if self.counts is None else self.counts.compute_ratio or 1.0

    @property
    def frames(self) -> Tensor:
        """All pictures, one by one (n c h w)."""
        return self.samples.flatten(0, -4)

    @property
    def num_broken(self) -> int:
        """How many of the samples hold NaN (or infinity: see `skipdit.pipelines.keep_broken`)."""
        return int((~self.samples.isfinite()).flatten(1).any(dim=1).sum())


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs one pipeline for the same conditions, again and again.

    The start noise is the same at any number of steps, and what an ancestral scheduler draws follows it.
    """

    pipeline: Any
    """a pipeline of diffusers"""
    sample: Callable[..., Tensor]
    """makes samples from conditions, and takes the options of `Sampler.sample`"""
    conditions: Sequence[Any]
    """class numbers or prompts, one per sample"""
    num_inference_steps: int
    guidance_scale: float
    seed: int | Sequence[int] = 0
    """of all noise, or one per sample"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """further ones of `Sampler.sample`, for every run"""
    advance: Callable[[], object] | None = None
    """called after each run"""

    @classmethod
    def of(cls, sampler: Sampler, conditions: Sequence[Any], **settings: Any) -> "Runner":
        """Return a runner of samples in [0, 1]; settings: fields."""
        return cls(pipeline=sampler.pipeline, sample=sampler.sample, conditions=conditions, **settings)

    @classmethod
    def of_latents(cls, pipeline: Any, conditions: Sequence[Any], **settings: Any) -> "Runner":
        """Return a runner of latents, of a pipeline of ours; settings: fields."""

        def sample(conditions: Sequence[Any], **options: Any) -> Tensor:
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

        scheduler: by name, in place of the pipeline's. description: of the pipeline's progress bar. options: further
        ones of `Sampler.sample`.
        """
        num_steps = num_inference_steps or self.num_inference_steps
        if description:
            self.pipeline.set_progress_bar_config(desc=f"{description:>10}")
        with scheduled(self.pipeline, scheduler), switched_on(self.pipeline, cache):
            _wait_for(self.pipeline)
            started = time.perf_counter()
            samples = self.sample(
                self.conditions,
                guidance_scale=self.guidance_scale,
                num_inference_steps=num_steps,
                generator=_generators(self.seed if seed is None else seed),
                **self.options,
                **options,
            ).cpu()
            seconds = max(time.perf_counter() - started, 1e-9)
            counts = None if cache is None else cache.counts(self.pipeline)
        if self.advance is not None:
            self.advance()
        return Sampled(samples, seconds, num_steps, counts)


def guidance_options(guidance: Guidance, num_shallow_units: int | None) -> dict[str, Any]:
    """Return the options of `Sampler.sample` for this guidance; the number of units is for shallow guidance alone."""
    return {"guidance": guidance, "guidance_shallow_units": None if guidance == "full" else num_shallow_units}


def _generators(seed: int | Sequence[int]) -> torch.Generator | list[torch.Generator]:
    if isinstance(seed, int):
        return torch.Generator().manual_seed(seed)
    return [torch.Generator().manual_seed(each) for each in seed]


def _wait_for(pipeline: Any) -> None:
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)


@contextmanager
def scheduled(pipeline: Any, scheduler: str | None) -> Iterator[None]:
    """Give a pipeline another scheduler for the same objective inside the block, by name; `None` leaves its own."""
    own = pipeline.scheduler
    if scheduler is not None:
        pipeline.scheduler = make_scheduler(objective_of(own), scheduler)
    try:
        yield
    finally:
        pipeline.scheduler = own


@contextmanager
def before_steps(scheduler: Any, see: Callable[[Tensor, Tensor], object]) -> Iterator[None]:
    """Give `see` the model's output, after guidance, and the latents before each step of a scheduler inside the
    block."""
    step = scheduler.step

    @wraps(step)  # pipelines read the signature
    def watched(output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        see(output, sample)
        return step(output, timestep, sample, *args, **options)

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step
