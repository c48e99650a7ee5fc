"""`skipdit bench compile`: graphs, breaks and seconds of a model compiled by `torch.compile`, under our caches and
others.

Each cache is measured separately in a fresh compiler, and its compiled runs take turns with uncached ones.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from skipdit.benchmark.checkout import load_rivals
from skipdit.benchmark.compiling.report import COMPILE, GraphRow, Timing, report_of
from skipdit.benchmark.compiling.single_steps import time_steps
from skipdit.benchmark.config import BY_KIND, MIXED
from skipdit.benchmark.config import CompileBenchConfig as CompileBenchConfig
from skipdit.benchmark.measure import Advance, benchmark, compiled
from skipdit.benchmark.models import check_compiler
from skipdit.cache.compiled import more_graphs
from skipdit.cache.methods import CacheMethod, parse_method
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.cache.site import BranchOutputs, DeepFeatures
from skipdit.files.output import OutputFolder
from skipdit.interfaces import ModelOutput, Pipeline
from skipdit.loading import Source, load_source
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig
from skipdit.runs import OwnCache, RunCache, Runner, switched_on
from skipdit.terminal import counting

CLASS_TO_IMAGE = "the benchmark of compilation runs a class-to-image DiT with long skips"


# ----------------------------------------------------------------------------------------------------------------------
# Models and caches


def own_method(spec: str, num_steps: int) -> CacheMethod:
    """Return the method of a spec, or a schedule like those of a calibration: `MIXED` chooses between numbers of
    shallow units, `BY_KIND` between kinds of branches (SmoothCache)."""

    def every(interval: int, variants: tuple[int, ...] = (0,)) -> ExplicitSchedule:
        full = tuple(range(0, num_steps, interval))
        of_steps = (None if step in full else variants[step % len(variants)] for step in range(num_steps))
        return ExplicitSchedule(full_steps=full, num_inference_steps=num_steps, variants=tuple(of_steps))

    if spec == MIXED:
        return CacheMethod(schedule=every(4, (0, 1)), site=DeepFeatures(1, others=(2,)), spec=spec)
    if spec == BY_KIND:
        mlp = CacheMethod(schedule=every(3), site=BranchOutputs(("mlp",)))
        return CacheMethod(schedule=every(2), site=BranchOutputs(("attention",)), others=(mlp,), spec=spec)
    return parse_method(spec)


@dataclass(frozen=True)
class CompiledSubject:
    """A pipeline with a cache or without."""

    library: str
    """library of the cache, or of the model"""
    setting: str
    pipeline: Pipeline
    cache: RunCache | None = None
    timed_as: str = ""
    """name of the setting in the config"""


def make_subjects(config: CompileBenchConfig, source: Source) -> list[CompiledSubject]:
    """Return our model without a cache and with our caches, and the same model in diffusers' blocks without a cache and
    with others."""
    pipeline = source.sampler.pipeline
    subjects = [CompiledSubject("skipdit", "no cache", pipeline)]
    for spec in config.specs:
        cache = OwnCache(own_method(spec, config.num_inference_steps))
        subjects.append(CompiledSubject("skipdit", spec, pipeline, cache, spec))
    library = load_rivals() if config.rivals else None
    if library is None:
        return subjects
    others, rivals = library.compiled_rivals(pipeline, config.rivals, config.num_inference_steps)
    subjects.append(CompiledSubject("diffusers", "no cache", others.pipeline))
    for rival in rivals:
        library = "cache-dit" if rival.name == "cache-dit" else "diffusers"
        subjects.append(
            CompiledSubject(library, rival.setting[len(library) + 1 :], others.pipeline, rival, rival.setting)
        )
    return subjects


def runner_of(subject: CompiledSubject, config: CompileBenchConfig) -> Runner:
    num_classes = subject.pipeline.transformer.config.num_classes
    return Runner.of_latents(
        subject.pipeline,
        [index % num_classes for index in range(config.batch_size)],
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Graphs


class CountingBackend:
    """Counts graphs and compiles nothing."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., ModelOutput]:
        self.num_graphs += 1
        return graph.forward


def count_graphs(subject: CompiledSubject, config: CompileBenchConfig) -> GraphRow:
    """Count the graphs of a run; they do not depend on the backend that would compile them."""
    row = GraphRow(library=subject.library, setting=subject.setting)
    try:
        expected = runner_of(subject, config)(subject.cache)
    except ValueError as error:
        return replace(row, refused=" ".join(str(error).split()))
    row = replace(row, steps=expected.steps)
    try:
        return with_counts(row, subject, config, expected.samples, fullgraph=True)
    except Exception as failure:  # errors of the compiler have no common public class
        if not type(failure).__module__.startswith("torch._dynamo"):
            raise
        row = replace(row, fullgraph_error=in_few_words(failure))
    return with_counts(row, subject, config, expected.samples, fullgraph=False)


def with_counts(
    row: GraphRow, subject: CompiledSubject, config: CompileBenchConfig, expected: Tensor, *, fullgraph: bool
) -> GraphRow:
    backend, run = CountingBackend(), runner_of(subject, config)
    with (
        switched_on(subject.pipeline, subject.cache),
        compiled(subject.pipeline.transformer, fullgraph=fullgraph, backend=backend),
    ):
        equal = torch.equal(run().samples, expected)
        graphs, breaks = backend.num_graphs, sum(counters["graph_break"].values())
        run(seed=config.seed + 1)
        return replace(
            row,
            graphs=graphs,
            breaks=breaks,
            recompiled=backend.num_graphs - graphs,
            limit_hit=any("limit exceeded" in reason for reason in counters["unimplemented"]),
            equal=equal,
        )


def in_few_words(failure: BaseException) -> str:
    """Return why a model does not compile as one graph."""
    text = str(failure).strip()
    if type(failure).__name__ == "FailOnRecompileLimitHit":
        return "more graphs than PyTorch allows for one function"
    disabled = re.search(r"<function ([\w.]+) at \S+> since it was wrapped with|function `<function ([\w.]+) at", text)
    if "torch.compiler.disable" in text and disabled:
        return f"`{disabled[1] or disabled[2]}` is barred from compilation (`torch.compiler.disable`)"
    if "marked as skipped" in text and (skipped := re.search(r"the function `(\w+)` in file \S+?/(\w+)\.py", text)):
        return f"calls `{skipped[1]}` of `{skipped[2]}`, which PyTorch does not compile"
    first = text.splitlines()[0] if text else type(failure).__name__
    return first.removesuffix(" not supported for non-export cases") + " in the graph" * ("Logger" in first)


# ----------------------------------------------------------------------------------------------------------------------
# Seconds


def time_runs(subject: CompiledSubject, config: CompileBenchConfig, *, compile_it: bool) -> Timing:
    """Time all cached runs between two series of uncached ones, as enabling a cache of another library changes the
    model, which would then be compiled again."""
    run = runner_of(subject, config)

    def times(cache: RunCache | None) -> tuple[float, list[float]]:
        with switched_on(subject.pipeline, cache):
            first, *others = (run().seconds for _ in range(1 + config.num_runs))
        return first, others

    with ExitStack() as stack:
        if compile_it:
            stack.enter_context(more_graphs())
            stack.enter_context(compiled(subject.pipeline.transformer))
        _, before = times(None)
        first, cached = times(subject.cache)
        _, after = times(None)
    uncached = tuple((a + b) / 2 for a, b in zip(before, after, strict=True))
    mode, first_seconds = ("compiled", first) if compile_it else ("eager", None)
    return Timing(subject.library, subject.setting, mode, uncached, tuple(cached), first_seconds)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def bench_compile(config: CompileBenchConfig, out: OutputFolder) -> None:
    """Write `compile.md` and `compile.json` into `out`. Without a C++ compiler, compiled runs are not timed.

    Raises `ValueError` if the model is not a class-to-image DiT with long skips; a cache that it refuses gets a row
    with the reason.
    """
    with benchmark(config, out, COMPILE) as environment:
        source = load_source(config.model, device="cpu", decodes=False)
        model = source.sampler.pipeline.transformer
        if source.sampler.task.model_class is not DiT:
            raise ValueError(f"{CLASS_TO_IMAGE}, got {type(model).__name__}")
        if not model.long_skip_links.sources:
            raise ValueError(f"{CLASS_TO_IMAGE}, got one without")
        try:
            check_compiler("cpu")
            no_compiler = None
        except ValueError as error:
            no_compiler = str(error)
        subjects = make_subjects(config, source)
        timed = [subject for subject in subjects if subject.timed_as in config.timed]
        modes = (False,) if no_compiler else (False, True)
        with counting("", len(subjects) + len(timed) * len(modes) + 1 + len(config.step_presets)) as advance:
            graphs, timings = measure(config, subjects, timed, modes, advance)
            has_compiler = no_compiler is None
            advance(description="single steps")
            sizes, repetitions = config.step_batch_sizes, config.num_repetitions
            steps = time_steps(config.model, model, sizes, repetitions, has_compiler=has_compiler)
            for name in config.step_presets:
                advance(description=f"single steps of {name}")
                preset = DiT.from_preset(name, long_skip=LongSkipConfig()).eval()
                steps += time_steps(name, preset, sizes[:1], repetitions, has_compiler=has_compiler)
    report_of(environment, asdict(config), graphs, timings, steps, no_compiler).write(out, COMPILE)


def measure(
    config: CompileBenchConfig,
    subjects: Sequence[CompiledSubject],
    timed: Sequence[CompiledSubject],
    modes: Sequence[bool],
    advance: Advance,
) -> tuple[list[GraphRow], list[Timing]]:
    for subject in subjects:
        subject.pipeline.set_progress_bar_config(disable=True)
    graphs, timings = [], []
    for subject in subjects:
        advance(description=f"graphs of {subject.setting}")
        graphs.append(count_graphs(subject, config))
    refused = {(row.library, row.setting) for row in graphs if row.refused}
    for subject in timed:
        for compile_it in modes:
            advance(description=f"seconds of {subject.setting}")
            if (subject.library, subject.setting) not in refused:
                timings.append(time_runs(subject, config, compile_it=compile_it))
    return graphs, timings
