"""`skipdit bench`: what steps, caches, conversion, compilation and training cost and give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from skipdit.command_options import OutputOptions, choose, parse
from skipdit.files import output_folder


@dataclass(frozen=True, kw_only=True)
class BenchOutput(OutputOptions):
    """Where the tables go."""

    out: Path = Path("benchmarks")
    """folder of the .md, .json and .png"""


@dataclass(frozen=True, kw_only=True)
class ConversionOutput(BenchOutput):
    """Where the tables and the trainings go."""

    runs: Path = Path("runs")
    """folder of the four trainings (recipes convert-*), which go on where they are not finished"""


@dataclass(frozen=True, kw_only=True)
class CacheOutput(BenchOutput):
    """Where the tables go, and which caches are in them."""

    rivals: bool = True
    """run the caches of diffusers and cache-dit too, where they can"""


def bench(arguments: Sequence[str]) -> None:
    """Measure what steps, caches, conversion, compilation and training cost, each beside its baseline.

    models, video: full and reuse steps, as ratios to the full step and to what the FLOPs allow. conversion: what a
    trained model loses and gains when it is converted in two stages. cache: what caches save, and what they do to a
    model's pictures. compile: what torch.compile makes of them. gpu: what they save on a GPU, of what they could.
    train: pictures per second of the training loop, beside a plain one.

    Example: skipdit bench models --presets DiT-S/2 --out benchmarks
    Example: skipdit bench video --presets Latte-S/2 --out benchmarks
    Example: skipdit bench conversion --out benchmarks
    Example: skipdit bench cache --model emoji --out benchmarks
    Example: skipdit bench compile --out benchmarks
    Example: skipdit bench gpu --out benchmarks
    Example: skipdit bench train --workloads emoji --out benchmarks
    """
    from skipdit.benchmark import (
        CacheBenchConfig,
        CompileBenchConfig,
        ConversionBenchConfig,
        GpuBenchConfig,
        ModelBenchConfig,
        TrainBenchConfig,
        VideoBenchConfig,
        bench_caches,
        bench_compile,
        bench_conversion,
        bench_gpu,
        bench_models,
        bench_training,
        bench_videos,
    )
    from skipdit.benchmark.cache_methods import no_rivals
    from skipdit.benchmark.conversion import STARTS
    from skipdit.benchmark.rivals import load_rivals
    from skipdit.recipes import RECIPES

    benches: dict[str, tuple[Any, Callable[..., Any], type[BenchOutput]]] = {
        "models": (ModelBenchConfig(), bench_models, BenchOutput),
        "video": (VideoBenchConfig(), bench_videos, BenchOutput),
        "conversion": (ConversionBenchConfig(), bench_conversion, ConversionOutput),
        "cache": (CacheBenchConfig(), bench_caches, CacheOutput),
        "compile": (CompileBenchConfig(), bench_compile, BenchOutput),
        "gpu": (GpuBenchConfig(), bench_gpu, BenchOutput),
        "train": (TrainBenchConfig(), bench_training, BenchOutput),
    }
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: skipdit bench {{{','.join(benches)}}} [OPTIONS]\n\n{bench.__doc__}")
        return
    name, *rest = arguments or ("none",)
    choose("the benchmark", name, benches)
    config, run, output = benches[name]
    field = ("config", Annotated[type(config), tyro.conf.arg(name="")])
    kind: Any = make_dataclass("Options", [field], bases=(output,), frozen=True, kw_only=True)
    options = parse(f"bench {name}", bench.__doc__, rest, kind, kind(config=config))
    run = partial(run, options.config)
    if name == "conversion":
        run = partial(run, {stage: RECIPES[stage]() for stage in STARTS}, options.runs)
    elif name == "train":
        run = partial(run, RECIPES["emoji"]())
    elif name == "cache":
        steps = options.config.num_inference_steps
        rivals = partial(load_rivals().rivals_of, num_inference_steps=steps) if options.rivals else no_rivals
        run = partial(run, rivals=rivals)
    with output_folder(options.out, "bench", overwrite=options.overwrite) as out:
        run(out)
    print(f"written: {options.out}")
