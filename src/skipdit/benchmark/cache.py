"""`skipdit bench cache`: the quality and the cost of every cache on a trained model, compared with fewer steps.

Each run is compared with the uncached run of the same seeds. As machines drift, runs take turns within a batch, in an
order that rotates from batch to batch, the uncached run is timed anew every few runs, and a speedup is the median over
batches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from skipdit.benchmark.cache_methods import KIN, Runnable, schedules_in, spec_cache
from skipdit.benchmark.cache_report import ONCE_MORE, Group, Row, write_cache_report
from skipdit.benchmark.cache_tally import Cost, Draft, Plan, Tally
from skipdit.benchmark.checkout import load_rivals
from skipdit.benchmark.config import CacheBenchConfig as CacheBenchConfig
from skipdit.benchmark.measure import Advance, benchmark
from skipdit.files.output import OutputFolder
from skipdit.loading import Source, load_source
from skipdit.metrics.paired import check_ssim_size
from skipdit.metrics.table import ALWAYS, METRICS, Metric
from skipdit.models.costs import flop_counter
from skipdit.plots import check_plots_installed
from skipdit.runs import Conditioning, Runner, Sampled, before_steps, scheduled, switched_on
from skipdit.terminal import counting

RUNS_BETWEEN = 8  # two timings of the uncached run
SECOND_ORDER = "dpm"  # DPM-Solver++ of order 2, for every objective


# ----------------------------------------------------------------------------------------------------------------------
# The plans


def make_plans(
    config: CacheBenchConfig, source: Source, steps: int, rivals: Sequence[Runnable]
) -> tuple[list[Plan], list[Plan]]:
    """Return the uncached runs with all steps, that of the model's own sampler first, and the runs to compare."""
    main, shorter_runs = source.sampler, config.shorter_runs(steps)
    baselines = [Plan("no cache", "the reference", "control", main, steps)]
    plans = [Plan("no cache", ONCE_MORE, "control", main, steps)]
    plans += [Plan("fewer steps", f"{n} steps", "fewer steps", main, n) for n in shorter_runs]
    scheduler = main.pipeline.scheduler.config
    if "prediction_type" in scheduler and scheduler.get("solver_order") != 2:  # else none can take its place
        second_order = [
            Plan("second order", f"{n} steps", "second order", main, n, SECOND_ORDER) for n in (steps, *shorter_runs)
        ]
        baselines.append(second_order[0])
        plans += second_order[1:]
    specs = (*config.specs, *(schedules_in(config.schedules) if config.schedules is not None else ()))
    caches: list[Runnable] = [spec_cache(spec, source) for spec in specs]
    for cache in (*caches, *rivals):
        sampler = cache.sampler or main
        if all(sampler is not plan.sampler for plan in baselines):
            baselines.append(Plan("no cache", f"the pipeline of {cache.name}", "control", sampler, steps))
        plans.append(Plan(cache.name, cache.setting, group_of(cache), sampler, steps, cache=cache))
    for spec in config.specs_of_shorter_runs:
        cache = spec_cache(spec, source)
        for n in sorted({round(steps / 1.5), round(steps / 2)} - {0, steps}, reverse=True):
            name, setting = f"{cache.name}, fewer steps", f"{n} steps, {cache.setting}"
            plans.append(Plan(name, setting, group_of(cache), main, n, cache=cache))
    return baselines, plans


def group_of(cache: Runnable) -> Group:
    if cache.ours:
        return "ours"
    if cache.name.endswith(", calibrated"):
        return "others, calibrated"
    return "kin" if cache.name.partition(",")[0] in KIN else "others"


@dataclass(frozen=True)
class Batch:
    """Some of the samples."""

    conditions: Conditioning
    """class numbers or prompts, one per sample"""
    seeds: list[int]
    """seeds of the noise, one per sample"""


def make_batches(config: CacheBenchConfig, source: Source) -> list[Batch]:
    size, count = config.batch_size, config.num_seeds
    conditions, _ = source.choose({"labels": config.labels, "prompt": config.prompt}, count)
    seeds = list(range(config.seed, config.seed + count))
    return [Batch(conditions[i : i + size], seeds[i : i + size]) for i in range(0, count, size)]


# ----------------------------------------------------------------------------------------------------------------------
# One run


def runner_of(plan: Plan, config: CacheBenchConfig, batch: Batch) -> Runner:
    return Runner.of(
        plan.sampler,
        batch.conditions,
        num_inference_steps=plan.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=batch.seeds,
    )


def run(plan: Plan, config: CacheBenchConfig, batch: Batch) -> Sampled:
    return runner_of(plan, config, batch)(plan.cache, scheduler=plan.scheduler)


def cost_of(plan: Plan, config: CacheBenchConfig, batch: Batch) -> Cost:
    """Return the FLOPs of a run of the first sample; a multiply-add counts as two. Each step is counted separately,
    when the scheduler makes it."""
    pipeline, marks = plan.sampler.pipeline, [(0, 0.0, 0.0)]
    once = runner_of(plan, config, Batch(batch.conditions[:1], batch.seeds[:1]))

    def mark(output: Tensor, latents: Tensor) -> None:
        counts = None if plan.cache is None else plan.cache.counts(pipeline)
        steps = (len(marks), 0) if counts is None else (counts.steps_full, counts.steps_reused)
        marks.append((counter.get_total_flops(), steps[0], steps[1]))

    with (
        scheduled(pipeline, plan.scheduler),
        switched_on(pipeline, plan.cache),
        before_steps(pipeline.scheduler, mark),
        flop_counter() as counter,
    ):
        once()
    added = np.diff(np.array(marks, dtype=np.float64), axis=0)
    slopes, _, rank, _ = np.linalg.lstsq(added[:, 1:], added[:, 0], rcond=None)
    return Cost(counter.get_total_flops(), marks[-1][1:], (float(slopes[0]), float(slopes[1])), bool(rank == 2))


# ----------------------------------------------------------------------------------------------------------------------
# All runs


def measure(
    config: CacheBenchConfig,
    baselines: Sequence[Plan],
    plans: list[Plan],
    batches: Sequence[Batch],
    draft: Draft | None = None,
) -> list[Row]:
    """Run every plan on every batch; a cache that the model refuses gets a row with the reason. draft: stores the
    results after each batch, for a run that continues."""
    begun = draft and draft.load(len(baselines), len(plans))
    metrics = METRICS if config.perceptual else ALWAYS
    for plan in baselines:
        plan.sampler.pipeline.set_progress_bar_config(disable=True)
    costs: dict[int, Cost] = {}
    done, base_tallies, tallies = begun or (0, [Tally() for _ in baselines], [Tally() for _ in plans])
    cached = [(plan, tally) for plan, tally in zip(plans, tallies, strict=True) if plan.cache is not None]
    num_timings = -(-len(plans) // RUNS_BETWEEN)
    num_runs = (len(batches) - done) * (len(baselines) + len(plans) + num_timings)
    with counting("", len(cached) + num_runs) as advance:
        for plan in baselines:
            if plan.scheduler is None:
                costs[id(plan.sampler)] = cost_of(plan, config, batches[0])
            runner_of(plan, config, batches[0])(num_inference_steps=1)  # first calls allocate memory
        for plan, tally in cached:
            advance(description=f"FLOPs of {plan.setting}")
            if tally.refused is not None:
                continue
            with refusals(plan, tally):
                tally.cost = cost_of(plan, config, batches[0])
        for index, batch in enumerate(batches[done:], start=done):
            first, label = index * len(plans) // len(batches), f"{index + 1}/{len(batches)}"
            turns = [*zip(plans[first:] + plans[:first], tallies[first:] + tallies[:first], strict=True)]
            pairs = [*zip(baselines, base_tallies, strict=True)]
            run_batch(config, batch, pairs, turns, metrics, partial(show, advance, label))
            if draft is not None:
                draft.save(index + 1, (*base_tallies, *tallies))
    main = costs[id(baselines[0].sampler)]
    rows = [t.row(plan, costs[id(plan.sampler)], main) for plan, t in zip(baselines, base_tallies, strict=True)]
    for plan, tally in zip(plans, tallies, strict=True):
        own_cost = costs[id(plan.sampler)]
        rows.append(tally.row(plan, own_cost, own_cost))
    return rows[1:]


def show(advance: Advance, label: str, plan: Plan) -> None:
    advance(description=f"{label} {plan.method}, {plan.setting}")


def run_batch(
    config: CacheBenchConfig,
    batch: Batch,
    baselines: Sequence[tuple[Plan, Tally]],
    turns: Sequence[tuple[Plan, Tally]],
    metrics: Sequence[Metric],
    advance: Callable[[Plan], object],
) -> None:
    """Run the uncached runs, then all others in turn, and add the results to their tallies.

    The first uncached run is timed again after every `RUNS_BETWEEN` others; how much slower the machine has become is
    taken out of their speedups.
    """
    references: dict[tuple[int, str | None], Sampled] = {}
    main = baselines[0][0]
    for plan, tally in baselines:
        advance(plan)
        sampled = references[plan.baseline] = run(plan, config, batch)
        tally.add(sampled, references[main.baseline], sampled if plan.scheduler else None, metrics)
    slowdown, seconds = 1.0, references[main.baseline].seconds
    for start in range(0, len(turns), RUNS_BETWEEN):
        timed: list[Tally] = []
        for plan, tally in turns[start : start + RUNS_BETWEEN]:
            advance(plan)
            if tally.refused is None:
                with refusals(plan, tally):
                    sampled = run(plan, config, batch)
                    own = references[plan.baseline] if plan.scheduler else None
                    tally.add(sampled, references[id(plan.sampler), None], own, metrics)
                    timed.append(tally)
        advance(main)
        before, slowdown = slowdown, run(main, config, batch).seconds / seconds
        for tally in timed:
            tally.speedups[-1] *= (before + slowdown) / 2


@contextmanager
def refusals(plan: Plan, tally: Tally) -> Iterator[None]:
    """Keep a `ValueError` of a plan with a cache as the reason why the model refuses it."""
    try:
        yield
    except ValueError as error:
        if plan.cache is None:
            raise
        tally.refused = " ".join(str(error).split())


# ----------------------------------------------------------------------------------------------------------------------
# The report


def bench_caches(config: CacheBenchConfig, out: OutputFolder) -> None:
    """Write `cache_quality.md`, `.json` and `.png` into `out`; for models other than `emoji`, their name is appended.
    An interrupted run continues after the last complete batch, from `cache_quality.draft.json` there.

    Raises `ValueError` if an optional package is missing, or if the model, a label or a prompt does not exist; a cache
    that the model refuses gets a row with the reason.
    """
    library = load_rivals() if config.rivals else None
    check_plots_installed("matplotlib")
    for metric in METRICS if config.perceptual else ():
        if metric.check is not None:
            metric.check()
    name = report_name(config.model)
    draft_name = f"{name}.draft.json"
    with benchmark(config, out, name, f"{name}.png", draft_name) as environment:
        source = load_source(config.model, device=config.device, dtype=config.dtype, published=config)
        config = source.complete(config)
        steps = config.num_inference_steps
        assert steps is not None, "every model has a default"
        check_ssim_size(source.sampler.picture_size)
        batches = make_batches(config, source)
        machine = {key: text for key, text in environment.items() if key not in ("command", "date")}
        draft = Draft(out, draft_name, of=machine | asdict(config))
        try:
            rivals = [] if library is None else library.rivals_of(source, steps)
            rows = measure(config, *make_plans(config, source, steps, rivals), batches, draft)
        except KeyboardInterrupt as stopped:
            stopped.add_note(f"the same command continues after the last complete batch, from {draft_name}")
            raise
    write_cache_report(out, name, environment=environment, settings=asdict(config), rows=rows)
    out.remove(draft_name)


def report_name(model: str) -> str:
    if model == "emoji":
        return "cache_quality"
    path = Path(model)
    name = path.resolve().parent.name if path.name == "pipeline" else path.name
    return f"cache_quality_{name.replace('-', '_')}"
