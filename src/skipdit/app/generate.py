"""The first tab: the requested samples, in full and then cached, step by step."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from skipdit.app.forms import check_form
from skipdit.app.jobs import Job
from skipdit.benchmark.cache_methods import METHODS
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.calibration.find import explicit
from skipdit.diffusion import Objective, objective_of, signal_and_noise_levels
from skipdit.files.untrusted import printable
from skipdit.loading import Source
from skipdit.metrics.table import score_pictures
from skipdit.runs import OwnCache, Runner, Sampled, before_steps, check_method, counts_of
from skipdit.tasks.task import Sampler

BUDGETS = ("1.5x", "2x", "2.5x")
OTHER = "Other"
MAX_SAMPLES, MAX_STEPS, MAX_GUIDANCE = 16, 250, 30
MAX_SEED = 2**32 - 1  # exact in a browser, and valid for every kind of generator
MAX_PROMPT = 1000  # characters
SPEEDUP = re.compile(r"(\d{1,3}(?:\.\d{1,3})?)\s*x?")
MAX_SPEC = 100  # characters


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The values of the form. `ValueError` if one is out of range."""

    labels: tuple[str, ...] = ()
    """class names or numbers, in turn"""
    prompt: str = ""
    """texts, in turn, one per line"""
    num_samples: int = 4
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    """by default that of the model"""
    seed: int = 0
    cache: str = "2x"
    """a speedup, a spec, `calibrated:{name}`, or the name of a schedule made on this page"""

    def __post_init__(self) -> None:
        if any(len(prompt) > MAX_PROMPT for prompt in self.prompts):
            raise ValueError(f"a prompt has at most {MAX_PROMPT} characters")
        check_form(
            self,
            num_samples=("how many", 1, MAX_SAMPLES),
            num_inference_steps=("steps", 2, MAX_STEPS),
            seed=("seed", 0, MAX_SEED),
        )
        if self.guidance_scale is not None:
            check_form(self, guidance_scale=("guidance", 1, MAX_GUIDANCE))

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(line.strip() for line in self.prompt.splitlines() if line.strip())

    @property
    def conditions(self) -> dict[str, tuple[str, ...]]:
        """The labels and prompts, no more than there are samples, by the option of `skipdit sample`."""
        return {"labels": self.labels[: self.num_samples], "prompt": self.prompts[: self.num_samples]}


@dataclass(frozen=True)
class Side:
    """The steps of one run so far."""

    name: str
    num_steps: int
    is_full: tuple[bool, ...] = ()
    """whether each step so far was a full one"""
    samples: Tensor | None = None
    """pictures (b c h w) or clips (b f c h w) in [0, 1]; during the run a preview, if there is one"""
    seconds: float | None = None
    """duration; `None` during the run"""


@dataclass(frozen=True)
class Shown:
    """Both runs so far, and at the end the figures of the cache."""

    full: Side
    cached: Side
    captions: list[str]
    cache: str
    """name of the cache"""
    psnr: str = ""
    ssim: str = ""
    compute_ratio: float | None = None
    bytes_held: int | None = None

    @property
    def speedup(self) -> float | None:
        """Return the ratio of their durations, `None` until both are done."""
        if self.full.seconds is None or self.cached.seconds is None:
            return None
        return self.full.seconds / self.cached.seconds

    @property
    def is_whole(self) -> bool:
        return self.speedup is not None


def cache_names(source: Source, own: Iterable[str] = ()) -> list[str]:
    """Return the caches to choose from: schedules made on this page, those of the model, and those that
    `skipdit bench cache` compares."""
    calibrated = [f"calibrated:{name}" for name in source.schedules]
    specs = [spec for method in METHODS.values() for spec in method.specs if not spec.startswith("calibrated")]
    return [*own, *calibrated, *sorted(specs, key=lambda spec: not spec.startswith("auto"))]


def find_cache(
    source: Source, text: str, num_inference_steps: int, own: Mapping[str, CacheMethod]
) -> tuple[str, CacheMethod]:
    """Return the name and the method of the cache that a text stands for.

    A speedup is that of a schedule that came with the model for runs of so many steps, else of `auto`. `ValueError`
    where there is no such cache, or it would never reuse. Files are not read.
    """
    text = text.strip()
    if len(text) > MAX_SPEC:
        raise ValueError(f"the name of a cache has at most {MAX_SPEC} characters")
    pipeline = source.sampler.pipeline
    if match := SPEEDUP.fullmatch(text):
        speedup = float(match[1])
        if not speedup > 1:
            raise ValueError(f"a speedup must be above 1, got {printable(text)}")
        for name in (f"output-{speedup:g}x", f"{speedup:g}x"):  # the first is the better one, where there are both
            calibrated = source.schedules.get(name)
            # for runs of other lengths than it was calibrated on, `auto` is often better
            if calibrated is not None and explicit(calibrated).num_inference_steps == num_inference_steps:
                return f"calibrated:{name}", calibrated
        text = f"auto:{speedup:g}"
    method = own.get(text) or _parse(source, text)
    check_method(pipeline, method, num_inference_steps)
    return text, method


def _parse(source: Source, text: str) -> CacheMethod:
    if text in ("", "none"):
        raise ValueError("choose a cache: a speedup such as 2x, or a name such as auto, N2 or skip-taylor:N3-o1")
    if text.partition(":")[0] == "calibrated":
        method = source.cache(text)
        assert method is not None
        return method
    if text.endswith(".json") or "/" in text or "\\" in text:
        raise ValueError(f"a cache is a speedup or a name here, not a file, got {printable(text)!r}")
    return parse_method(text)


@dataclass
class Watch:
    """Reports the steps of one run to its job, and records which were full."""

    job: Job
    sampler: Sampler
    comparison: Shown
    side: str
    num_samples: int
    steps_full: float = 0
    is_full: list[bool] = field(default_factory=list)

    def see(self, output: Tensor, latents: Tensor) -> None:
        """Record a step, given the arguments of the scheduler's step."""
        if self.side == "cached":
            now = counts_of(self.sampler.pipeline).steps_full
            self.is_full.append(now > self.steps_full)
            self.steps_full = now
        else:
            self.is_full.append(True)
        run = replace(
            getattr(self.comparison, self.side),
            is_full=tuple(self.is_full),
            samples=begun(self.sampler, output, latents, len(self.is_full) - 1, self.num_samples),
        )
        self.job.tell(done=len(self.is_full), shown=replace(self.comparison, **{self.side: run}))

    def end(self, result: Sampled) -> Shown:
        run = replace(getattr(self.comparison, self.side), samples=result.samples, seconds=result.seconds)
        return replace(self.comparison, **{self.side: replace(run, is_full=tuple(self.is_full))})


def begun(sampler: Sampler, output: Tensor, latents: Tensor, step: int, num_samples: int) -> Tensor | None:
    """Return a preview at a step: the pictures (b c h w), or the first frames of clips, that the model predicts; `None`
    if the model works on latents, or the scheduler does not say what it predicts."""
    scheduler = sampler.pipeline.scheduler
    if sampler.pipeline.vae is not None or latents.ndim != 4 or latents.shape[1] != 3 or len(latents) % num_samples:
        return None
    try:
        objective = objective_of(scheduler)
    except ValueError:
        return None
    timestep = scheduler.timesteps[min(step, len(scheduler.timesteps) - 1)].reshape(1).to(latents.device)
    pixels = estimate(objective, output.detach()[:, :3], latents.detach(), timestep)
    return (pixels.unflatten(0, (num_samples, -1))[:, 0] / 2 + 0.5).clamp(0, 1)


def estimate(objective: Objective, output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
    """Return x_0, given the output of a model: the inverse of `skipdit.diffusion.prediction_target`."""
    signal, sigma = signal_and_noise_levels(objective, timesteps, latents.ndim)
    match objective.prediction_type:
        case "epsilon":
            return (latents - sigma * output) / signal.clamp(min=1e-3)
        case "v_prediction":
            return signal * latents - sigma * output
        case "flow_prediction":
            return latents - sigma * output
    return output


def generate(job: Job, source: Source, request: SampleRequest, own: Mapping[str, CacheMethod]) -> Shown:
    """Sample in full and cached, and report every step to the job. `ValueError` if a label or the cache is unknown."""
    request = source.complete(request)
    sampler, steps = source.sampler, request.num_inference_steps
    conditions, captions = source.choose(request.conditions, request.num_samples)
    name, method = find_cache(source, request.cache, steps, own)
    run = Runner.of(
        sampler, conditions, num_inference_steps=steps, guidance_scale=request.guidance_scale, seed=request.seed
    )
    shown = Shown(Side("full", steps), Side("cached", steps), captions, name)
    job.tell(doing="warming up", shown=shown)
    run(num_inference_steps=1)  # the first calls allocate memory, and are not timed
    for side, doing, cache in (("full", "sampling in full", None), ("cached", "sampling cached", OwnCache(method))):
        job.tell(doing=doing, done=0, total=steps)
        watch = Watch(job, sampler, shown, side, len(conditions))
        with before_steps(sampler.pipeline.scheduler, watch.see):
            result = run(cache)
        shown = watch.end(result)
        if cache is not None and result.counts is not None:
            shown = replace(shown, compute_ratio=result.compute_ratio, bytes_held=result.counts.bytes_held)
        job.tell(shown=shown)
    assert shown.full.samples is not None
    assert shown.cached.samples is not None
    scores = score_pictures(shown.cached.samples.flatten(0, -4), shown.full.samples.flatten(0, -4))
    ssim = scores["ssim"].text(4) if "ssim" in scores else ""
    return replace(shown, psnr=scores["psnr"].text(1), ssim=ssim)


def difference(shown: Shown, amplification: float) -> Tensor | None:
    """Return the absolute difference of both samples per channel, times `amplification`, clipped to [0, 1]; `None`
    until both are done. Broken pixels are white."""
    if not shown.is_whole or shown.full.samples is None or shown.cached.samples is None:
        return None
    return ((shown.cached.samples - shown.full.samples).abs() * amplification).nan_to_num(1.0).clamp(0, 1)
