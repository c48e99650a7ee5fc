"""What every cache does to the output of a trained model, and what it saves, beside fewer steps of the same run.

A run is compared with the uncached run of the same seeds. Runs take turns within a batch and change places from batch
to batch, and a speedup is the median of the ratios within a batch: machines drift.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skipdit.benchmark.cache_methods import (
    METHODS,
    Rivals,
    Runnable,
    no_rivals,
    schedules_in,
    spec_cache,
)
from skipdit.benchmark.cache_report import ONCE_MORE, Group, Row, write_cache_report
from skipdit.benchmark.cache_tally import Cost, Draft, Plan, Run, Tally
from skipdit.benchmark.measure import claim_report, progress_bar
from skipdit.diffusion import make_scheduler, objective_of
from skipdit.environment import SYNCHRONIZE, Device, check_device, describe_environment, threads
from skipdit.files import OutputFolder
from skipdit.loading import Source, load_source
from skipdit.metrics.paired import check_ssim_size
from skipdit.metrics.perceptual import (
    check_metrics_installed,
    load_feature_network,
)
from skipdit.options import check_choice, check_numbers, check_positive
from skipdit.plots import check_plots_installed

SECOND_ORDER = "dpm"  # DPM-Solver++ of order 2, for every objective


@dataclass(frozen=True, kw_only=True)
class CacheBenchConfig:
    """What is measured of a trained model.

    model: `emoji`, `emoji-clips`, `emoji-text` or `emoji-text-clips`, or the folder of a pipeline. specs: of the
    caches, or paths of schedules; `calibrated:{name}` is one that came with the model. schedules: a folder of more, as
    `skipdit calibrate` writes it. wanted: class names or prompts, repeated in turn; by default the model's showcase,
    else spread over its classes. num_seeds: samples, each with a seed of its own, from `seed` on; sampled batch_size
    at a time. num_steps: of the uncached run and of the cached ones. fewer_steps: of the rivals without a cache.
    perceptual: also the LPIPS-like distance, which needs `pip install ".[metrics]"`. num_threads: of the CPU; by
    default PyTorch's choice.
    """

    model: str = "emoji"
    specs: tuple[str, ...] = tuple(spec for method in METHODS.values() for spec in method.specs)
    schedules: Path | None = None
    wanted: tuple[str, ...] = ()
    num_seeds: int = 64
    batch_size: int = 8
    num_steps: int = 50
    guidance_scale: float = 2.0
    fewer_steps: tuple[int, ...] = (33, 25, 20, 15)
    perceptual: bool = True
    device: Device = "cpu"
    num_threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        check_positive(self, "num_seeds", "batch_size", "num_threads")
        check_choice("device", (self.device,), get_args(Device))
        if not 2 <= self.num_steps <= 1000:
            raise ValueError(f"num_steps must be 2 to 1000, got {self.num_steps}")
        if len(set(self.specs)) < len(self.specs):
            raise ValueError(f"specs must be different ones, got {self.specs}")
        if len(set(self.fewer_steps)) < len(self.fewer_steps) or not all(
            1 <= steps < self.num_steps for steps in self.fewer_steps
        ):
            raise ValueError(
                f"fewer_steps must be below num_steps, {self.num_steps}, and each once, got {self.fewer_steps}"
            )


# ----------------------------------------------------------------------------------------------------------------------
# What takes part


def make_plans(config: CacheBenchConfig, source: Source, rivals: Sequence[Runnable]) -> tuple[list[Plan], list[Plan]]:
    """The uncached runs with all steps, that of the model's own sampler first, and everything that is compared."""
    own, steps = source.sampler, config.num_steps
    baselines = [Plan("no cache", "the reference", "control", own, steps)]
    plans = [Plan("no cache", ONCE_MORE, "control", own, steps)]
    plans += [Plan("fewer steps", f"{n} steps", "fewer steps", own, n) for n in config.fewer_steps]
    if own.pipeline.scheduler.config.get("solver_order") != 2:
        options: dict[str, Any] = {"method": "second order", "group": "second order", "scheduler": SECOND_ORDER}
        baselines.append(Plan(setting=f"{steps} steps", sampler=own, num_steps=steps, **options))
        plans += [Plan(setting=f"{n} steps", sampler=own, num_steps=n, **options) for n in config.fewer_steps]
    specs = (*config.specs, *(schedules_in(config.schedules) if config.schedules is not None else ()))
    caches: list[Runnable] = [spec_cache(spec, source) for spec in specs]
    for cache in (*caches, *rivals):
        sampler = cache.sampler or own
        if all(sampler is not each.sampler for each in baselines):
            baselines.append(Plan("no cache", f"the pipeline of {cache.name}", "control", sampler, steps))
        others: Group = "others, calibrated" if cache.name.endswith(", calibrated") else "others"
        group = "ours" if cache.ours else others
        plans.append(Plan(cache.name, cache.setting, group, sampler, steps, cache=cache))
    return baselines, plans


def choose_wanted(source: Source, wanted: Sequence[str], count: int) -> list[Any]:
    """Class numbers or prompts, one a sample; `None` where the model knows no classes."""
    sampler, values = source.sampler, wanted or source.showcase
    return sampler.task.choose_from(sampler.pipeline, values, count, ()).conditions


@dataclass(frozen=True)
class Batch:
    """What is wanted, and of each sample the seed of its noise."""

    wanted: list[Any]
    seeds: list[int]


def make_batches(config: CacheBenchConfig, source: Source) -> list[Batch]:
    wanted = choose_wanted(source, config.wanted, config.num_seeds)
    seeds = list(range(config.seed, config.seed + config.num_seeds))
    starts = range(0, config.num_seeds, config.batch_size)
    return [Batch(wanted[i : i + config.batch_size], seeds[i : i + config.batch_size]) for i in starts]


# ----------------------------------------------------------------------------------------------------------------------
# One run


@contextmanager
def made_ready(plan: Plan) -> Iterator[None]:
    """Inside, the plan's scheduler and cache are on."""
    pipeline = plan.sampler.pipeline
    scheduler = pipeline.scheduler
    if plan.scheduler is not None:
        pipeline.scheduler = make_scheduler(objective_of(scheduler), plan.scheduler)
    try:
        if plan.cache is not None:
            plan.cache.enable(pipeline)
        try:
            yield
        finally:
            if plan.cache is not None:
                plan.cache.disable(pipeline)
    finally:
        pipeline.scheduler = scheduler


def sample(plan: Plan, config: CacheBenchConfig, batch: Batch, num_steps: int | None = None) -> Tensor:
    generators: Any = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    return plan.sampler.sample(
        batch.wanted,
        guidance_scale=config.guidance_scale,
        num_inference_steps=num_steps or plan.num_steps,
        generator=generators,
    ).cpu()


def run(plan: Plan, config: CacheBenchConfig, batch: Batch) -> Run:
    with made_ready(plan):
        SYNCHRONIZE[config.device]()
        started = time.perf_counter()
        samples = sample(plan, config, batch)
        seconds = time.perf_counter() - started
        counts = None if plan.cache is None else plan.cache.counts(plan.sampler.pipeline)
    return Run(samples.flatten(0, -4), seconds, counts)


# ----------------------------------------------------------------------------------------------------------------------
# FLOPs


def count_flops(plan: Plan, config: CacheBenchConfig, batch: Batch) -> Cost:
    """Of a run of the first sample; a multiply-add counts two. In unfused attention, as the counter misses a CPU's
    fused one. Each step is counted by itself, where the scheduler makes it."""
    pipeline, marks = plan.sampler.pipeline, [(0, 0, 0)]

    def mark() -> None:
        counts = None if plan.cache is None else plan.cache.counts(pipeline)
        steps = (len(marks), 0) if counts is None else (counts.steps_full, counts.steps_reused)
        marks.append((counter.get_total_flops(), steps[0], steps[1]))

    with made_ready(plan), watched(pipeline.scheduler, mark), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            sample(plan, config, Batch(batch.wanted[:1], batch.seeds[:1]))
        flops = counter.get_total_flops()
    added = np.diff(np.array(marks, dtype=np.float64), axis=0)
    slopes, _, rank, _ = np.linalg.lstsq(added[:, 1:], added[:, 0], rcond=None)
    return Cost(flops, marks[-1][1:], (float(slopes[0]), float(slopes[1])), bool(rank == 2))


@contextmanager
def watched(scheduler: Any, mark: Callable[[], None]) -> Iterator[None]:
    """Inside, `mark` is called before each step of the scheduler."""
    step = scheduler.step

    @wraps(step)  # pipelines read the signature
    def marked(*args: Any, **kwargs: Any) -> Any:
        mark()
        return step(*args, **kwargs)

    scheduler.step = marked
    try:
        yield
    finally:
        del scheduler.step


# ----------------------------------------------------------------------------------------------------------------------
# All runs


def measure(
    config: CacheBenchConfig,
    baselines: Sequence[Plan],
    plans: Sequence[Plan],
    batches: Sequence[Batch],
    draft: Draft | None = None,
) -> list[Row]:
    """Runs every plan on every batch; a plan that the model refuses is a row that says why. draft: keeps what is
    measured after each batch, and is gone on from."""
    begun = draft and draft.load(len(baselines), len(plans))
    network = load_feature_network() if config.perceptual else None
    for plan in baselines:
        plan.sampler.pipeline.set_progress_bar_config(disable=True)
    costs: dict[int, Cost] = {}
    done, base_tallies, tallies = begun or (0, [Tally() for _ in baselines], [Tally() for _ in plans])
    cached = [(plan, tally) for plan, tally in zip(plans, tallies, strict=True) if plan.cache is not None]
    with progress_bar(len(cached) + (len(batches) - done) * (len(baselines) + len(plans))) as advance:
        for plan in baselines:
            if plan.scheduler is None:
                costs[id(plan.sampler)] = count_flops(plan, config, batches[0])
            sample(plan, config, batches[0], num_steps=1)  # first calls allocate: that is no part of any time
        for plan, tally in cached:
            advance(description=f"FLOPs of {plan.setting}")
            if tally.refused is not None:
                continue
            with refusals(plan, tally):
                tally.cost = count_flops(plan, config, batches[0])
        for index, batch in enumerate(batches[done:], start=done):
            references: dict[tuple[int, str | None], Run] = {}
            for plan, tally in zip(baselines, base_tallies, strict=True):
                advance(description=f"{index + 1}/{len(batches)} {plan.method}, {plan.setting}")
                made = references[plan.baseline] = run(plan, config, batch)
                tally.add(made, references[baselines[0].baseline], made if plan.scheduler else None, network)
            first = index * len(plans) // len(batches)
            for place in (*range(first, len(plans)), *range(first)):
                plan, tally = plans[place], tallies[place]
                advance(description=f"{index + 1}/{len(batches)} {plan.method}, {plan.setting}")
                if tally.refused is None:
                    with refusals(plan, tally):
                        made, own = run(plan, config, batch), references[plan.baseline] if plan.scheduler else None
                        tally.add(made, references[id(plan.sampler), None], own, network)
            if draft is not None:
                draft.save(index + 1, (*base_tallies, *tallies))
    main = costs[id(baselines[0].sampler)]
    rows = [t.row(plan, costs[id(plan.sampler)], main) for plan, t in zip(baselines, base_tallies, strict=True)]
    for plan, tally in zip(plans, tallies, strict=True):
        own_cost = costs[id(plan.sampler)]
        rows.append(tally.row(plan, own_cost, own_cost))
    return rows[1:]


@contextmanager
def refusals(plan: Plan, tally: Tally) -> Iterator[None]:
    """Inside, a `ValueError` of a plan with a cache is the reason why it cannot be."""
    try:
        yield
    except ValueError as error:
        if plan.cache is None:
            raise
        tally.refused = " ".join(str(error).split())


# ----------------------------------------------------------------------------------------------------------------------
# The report


def bench_caches(config: CacheBenchConfig, out: OutputFolder, rivals: Rivals = no_rivals) -> None:
    """Write `cache_quality.md`, `.json` and `.png` into `out`; of another model than `emoji` its name is added. A run
    that was interrupted goes on after the last whole batch, from `cache_quality.draft.json` there.

    rivals: makes caches of other libraries for the loaded model. `ValueError` where an optional package is missing, or
    the model or what is wanted of it is not to be had; a cache that the model refuses is a row with the reason.
    """
    check_device(config.device)
    check_plots_installed("matplotlib")
    if config.perceptual:
        check_metrics_installed()
    name = report_name(config.model)
    draft_name = f"{name}.draft.json"
    claim_report(out, name, f"{name}.png", draft_name)
    with threads(config.num_threads):
        environment = describe_environment(config.device, config.seed)
        source = load_source(config.model, device=config.device)
        check_ssim_size(source.sampler.picture_size)
        batches = make_batches(config, source)
        machine = {key: text for key, text in environment.items() if key not in ("command", "date")}
        draft = Draft(out, draft_name, of=machine | asdict(config))
        try:
            rows = measure(config, *make_plans(config, source, rivals(source)), batches, draft)
        except KeyboardInterrupt as stopped:
            stopped.add_note(f"the same command goes on after the last whole batch, from {draft_name}")
            raise
    write_cache_report(out, name, environment=environment, settings=asdict(config), rows=rows)
    out.remove(draft_name)


def report_name(model: str) -> str:
    if model == "emoji":
        return "cache_quality"
    path = Path(model)
    name = path.resolve().parent.name if path.name == "pipeline" else path.name
    return f"cache_quality_{name.replace('-', '_')}"
