"""The command line: finds the command, parses its options, prints what a person wants to read.

Each command is a function of its arguments; whatever is heavy is imported inside.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from skipdit import terminal
from skipdit.terminal import parse as _parse

if TYPE_CHECKING:
    from skipdit.compare import Comparison, SampleConfig


def sample(arguments: Sequence[str]) -> None:
    """Sample in full, cached, and with fewer steps at the same wall time; pictures, clips and a report go into --out.
    With --npz or --png: many samples of one setting, for evaluation.

    Exit status 1: they are there, but some samples are not finite, which the report counts.

    Example: skipdit sample --task text-to-image --prompt "a cat with a rocket" --out out/cats
    Example: torchrun --nproc-per-node 8 -m skipdit sample --num-samples 50000 --npz --cache none --out out/emoji-50k
    """
    from skipdit.compare import SampleConfig, sample_and_compare
    from skipdit.process_group import count_processes

    config = _parse("sample", sample.__doc__, arguments, SampleConfig)
    if config.makes_set:
        return _sample_set(config)
    if count_processes() > 1:
        raise ValueError("a comparison is made by one process; several make a set of samples: give --npz or --png")
    report = sample_and_compare(config)
    _print_report(report, config.out)
    if report.broken:
        _exit_on_broken(report.broken)


def _sample_set(config: "SampleConfig") -> None:
    from skipdit.sample_set import sample_set

    report = sample_set(config)
    if report is None:  # not the main process
        return
    print(f"{report.text()}\nthey and samples.json are in {terminal.one_line(str(config.out))}")
    if report.num_broken:
        _exit_on_broken({"set": f"{report.num_broken} of {report.num_samples}"})


def _exit_on_broken(broken: dict[str, str]) -> None:
    told = ", ".join(f"{name} {count}" for name, count in broken.items())
    print(f"skipdit: broken samples (NaN or infinite): {told}", file=sys.stderr)
    sys.exit(1)


def train(arguments: Sequence[str]) -> None:
    """Train by a named recipe, every setting of which can be changed; goes on from the last checkpoint in --out.

    Example: skipdit train emoji --max-steps 20 --out runs/try
    """
    import tyro

    from skipdit.recipes import RECIPES
    from skipdit.training import Stopped, TrainConfig
    from skipdit.training import train as run

    recipes = "\n".join(f"  {name}: {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items())
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: skipdit train RECIPE [OPTIONS]\n\n{train.__doc__}")
        print(f"Recipes (`skipdit train RECIPE --help` lists the options):\n{recipes}")
        return
    if not arguments or arguments[0] not in RECIPES:
        raise ValueError(
            f"the recipe must be one of {', '.join(RECIPES)}, got {arguments[0]!r}"
            if arguments
            else f"give a recipe:\n{recipes}"
        )
    name = arguments[0]

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """A training run and where it goes."""

        config: Annotated[TrainConfig, tyro.conf.arg(name="")]
        out: Path = Path("runs") / name
        """folder of the run"""
        resume: bool = True
        """go on from its last checkpoint; --no-resume begins anew, and the checkpoints there stay until a new one
        stands"""
        allow_changes: bool = False
        """go on with other settings than the checkpoint's where that can be: the rate, the clip, the precision, ..."""
        overwrite: bool = False
        """replace files in --out that skipdit did not write; each is told"""
        device: str = "auto"
        """cpu, cuda or auto"""
        dry_run: bool = False
        """only build the model, without memory, and count what its steps cost; needs no latents"""

    options = _parse(f"train {name}", train.__doc__, arguments[1:], Options, Options(config=RECIPES[name]()))
    if options.dry_run:
        from skipdit.training.dry_run import plan_run

        print(plan_run(options.config).text())
        return
    is_main = os.environ.get("RANK", "0") == "0"  # torchrun starts this once per process
    try:
        folder = run(
            options.config,
            options.out,
            resume=options.resume,
            device=options.device,
            overwrite=options.overwrite,
            allow_changes=options.allow_changes,
        )
    except Stopped as stopped:
        if is_main:
            print(f"skipdit: {stopped}", file=sys.stderr)
        sys.exit(stopped.status)
    if is_main:
        print(f"trained: skipdit sample --model {folder}")


def ema(arguments: Sequence[str]) -> None:
    """Write a run's pipeline with averaged weights of another length, out of its --ema-snapshots-every.

    Example: skipdit ema runs/emoji --length 0.15 --out runs/emoji-ema-0.15
    """
    from skipdit.averaging import AverageConfig, write_average

    config = _parse("ema", ema.__doc__, arguments, AverageConfig)
    made = write_average(config)
    print(f"average of length {made.length:g} at step {made.step}, out of {len(made.weights)} snapshots ", end="")
    print(f"(weights over time met but for {made.error:.1%}): skipdit sample --model {config.out}")


def latents(arguments: Sequence[str]) -> None:
    """Encode pictures, clips and captions once, for training by the recipes of latents; goes on where it was stopped.

    Example: skipdit latents --source path/to/imagenet/train --vae sd-vae-ft-ema --flip --out latents/imagenet-256
    """
    import tyro

    from skipdit.encoding.config import EncodeConfig
    from skipdit.encoding.encode import encode
    from skipdit.files import check_apart, output_folder

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What is encoded and where it goes."""

        config: Annotated[EncodeConfig, tyro.conf.arg(name="")]
        out: Path = Path("latents")
        """folder of the shards"""
        device: str = "auto"
        """cpu, cuda or auto"""
        overwrite: bool = False
        """replace files of these names that skipdit did not write; each is told"""

    options = _parse("latents", latents.__doc__, arguments, Options)
    check_apart(options.out, [path for path in map(Path, (options.config.source, options.config.vae)) if path.exists()])
    with output_folder(options.out, "latents", overwrite=options.overwrite) as out:
        info = encode(options.config, out, device=options.device)
    count = sum(shard["num_items"] for shard in info["shards"])
    shape, classes = " x ".join(map(str, info["shape"])), len(info["class_names"])
    print(f"encoded: {count:,} items of {shape} in {len(info['shards'])} shards, {classes} classes, in {options.out}")


def convert(arguments: Sequence[str]) -> None:
    """Convert a checkpoint between the official keys, our own folder and that of a transformer of diffusers.

    Example: skipdit convert DiT-XL-2-skip.pt --to skipdit --out DiT-XL-2-skip
    """
    import tyro

    from skipdit.checkpoints import load_model, save_official, to_diffusers
    from skipdit.files import atomic_folder, check_apart, check_replaceable
    from skipdit.loading import ObjectiveName, pipeline_of
    from skipdit.models.long_skip import Fusion

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """model: a .pt or .safetensors file, or a folder. to: official (.safetensors), skipdit or diffusers (folder;
        the same where the class of the model is diffusers'). out: what is written. prefer: which weights of a training
        checkpoint. num_attention_heads, sample_size, num_frames, num_classes, fusion: what a file of bare weights does
        not tell. objective: what its model predicts, as of `skipdit sample`; then a whole pipeline is written, to
        skipdit only. drop: roots of keys to leave out. variant: of a folder's weights, as fp16.
        """

        model: tyro.conf.Positional[Path]
        to: Literal["official", "skipdit", "diffusers"]
        out: Path
        prefer: Literal["ema", "model"] = "ema"
        num_attention_heads: int | None = None
        sample_size: int | None = None
        num_frames: int | None = None
        num_classes: int | None = None
        fusion: Fusion | None = None
        objective: ObjectiveName | None = None
        drop: tuple[str, ...] = ()
        variant: str | None = None
        overwrite: bool = False
        """Replace a file, or the config and the weights in a folder, also where skipdit did not write them."""

    options = _parse("convert", convert.__doc__, arguments, Options)
    if options.objective is not None and options.to != "skipdit":
        raise ValueError(f"objective is for --to skipdit, which has a place for it, got --to {options.to}")
    names = ("config.json", "model_index.json", "*/config.json", "*.safetensors", "*.safetensors.index.json")
    overwritten = (*names, "*/*.safetensors", "*/*.json") if options.overwrite else ()
    check_apart(options.out, (options.model, *options.model.glob("*"), *options.model.glob("*/*")))
    if options.to != "official":
        check_replaceable(options.out, "model", overwritten)
    elif os.path.lexists(options.out) and not options.overwrite:
        raise FileExistsError(f"{options.out} exists: give another --out, or --overwrite")
    model = load_model(
        options.model,
        prefer=options.prefer,
        num_attention_heads=options.num_attention_heads,
        sample_size=options.sample_size,
        num_frames=options.num_frames,
        num_classes=options.num_classes,
        fusion=options.fusion,
        drop=options.drop,
        variant=options.variant,
    )
    if options.to == "official":
        save_official(model, options.out)
    else:
        converted = model if options.to == "skipdit" else to_diffusers(model)
        with atomic_folder(options.out, "model", overwritten=overwritten) as draft:
            if options.objective is None:
                converted.save_pretrained(draft)
            else:
                pipeline_of(model, options.objective).save(draft, "10GB")
    print(f"written: {options.out}")


def bench(arguments: Sequence[str]) -> None:
    """Measure what caches, conversions and trainings cost and bring, beside a baseline of the same run.

    Example: skipdit bench models --presets DiT-S/2 --out benchmarks
    Example: skipdit bench cache --model emoji --out benchmarks
    """
    import tyro

    from skipdit.benches import BENCHES
    from skipdit.files import output_folder

    if arguments and arguments[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:<12}{(make.__doc__ or '').splitlines()[0]}" for name, make in BENCHES.items())
        print(f"usage: skipdit bench {{{','.join(BENCHES)}}} [OPTIONS]\n\n{bench.__doc__}\n{listing}")
        return
    if not arguments or arguments[0] not in BENCHES:
        *names, last = BENCHES
        told = arguments[0] if arguments else "none"
        raise ValueError(f"the benchmark must be {', '.join(names)} or {last}, got {told!r}")
    name, *rest = arguments
    config, run = BENCHES[name]()

    @dataclass(frozen=True, kw_only=True)
    class Output:
        out: Path = Path("benchmarks")
        """folder of the .md, .json and .png"""
        overwrite: bool = False
        """replace files there also where an earlier run did not write them, each of which is named"""

    field = ("config", Annotated[config, tyro.conf.arg(name="")])
    kind: Any = make_dataclass("Options", [field], bases=(Output,), frozen=True, kw_only=True)
    options = _parse(f"bench {name}", bench.__doc__, rest, kind, kind(config=config()))
    with output_folder(options.out, "bench", overwrite=options.overwrite) as out:
        run(options.config, out)
    print(f"written: {options.out}")


def calibrate(arguments: Sequence[str]) -> None:
    """Measure what reuse costs a model at every step, and write the best cache schedules, for `sample --cache FILE`.

    Example: skipdit calibrate emoji --speedups 1.8 2.5 --out out/schedules
    """
    import tyro

    from skipdit.calibration.calibrate import CalibrateConfig, claim
    from skipdit.calibration.calibrate import calibrate as run
    from skipdit.files import output_folder
    from skipdit.loading import ObjectiveName, load_source

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """model: a bundled model, a pipeline's folder or a checkpoint. vae, num_attention_heads, num_classes,
        objective, drop: as of `skipdit sample`. out: folder of the schedules and the report."""

        model: tyro.conf.Positional[str] = "emoji"
        config: Annotated[CalibrateConfig, tyro.conf.arg(name="")]
        scheduler: str | None = None
        vae: Path | None = None
        num_attention_heads: int | None = None
        num_classes: int | None = None
        objective: ObjectiveName | None = None
        drop: tuple[str, ...] = ()
        device: str = "auto"
        out: Path = Path("out/schedules")
        overwrite: bool = False
        """Replace files there also where an earlier run did not write them, each of which is named."""

    options = _parse("calibrate", calibrate.__doc__, arguments, Options, Options(config=CalibrateConfig()))
    with output_folder(options.out, "calibrate", overwrite=options.overwrite) as out:
        claim(out, options.config)
        source = load_source(
            options.model,
            device=options.device,
            scheduler=options.scheduler,
            vae=options.vae,
            num_attention_heads=options.num_attention_heads,
            num_classes=options.num_classes,
            objective=options.objective,
            drop=options.drop,
        )
        run(source, options.config, out)
    print((options.out / "report.md").read_text(encoding="utf-8"))
    print(f"written: {options.out}; use one: skipdit sample --model {options.model} --cache {options.out}/NAME.json")


def analyze(arguments: Sequence[str]) -> None:
    """Measure how stable a model is, alone or beside others: features, Jacobians, errors under caches, weights.

    Example: skipdit analyze runs/skip/pipeline --compare runs/plain/pipeline --out out/stability
    """
    import tyro

    from skipdit.analysis.measure import AnalyzeConfig
    from skipdit.analysis.report import analyze as run
    from skipdit.analysis.report import claim
    from skipdit.analysis.weights import TrainingLog, find_training_log
    from skipdit.files import output_folder
    from skipdit.loading import BUNDLED, load_source

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """model, compare: emoji, a pipeline's folder or a checkpoint. A folder of `skipdit train` brings its log.
        names: what the report calls them. out: folder of the report.
        """

        model: tyro.conf.Positional[str] = "emoji"
        compare: tuple[str, ...] = ()
        names: tuple[str, ...] = ()
        config: Annotated[AnalyzeConfig, tyro.conf.arg(name="")]
        device: str = "auto"
        out: Path = Path("out/stability")
        overwrite: bool = False
        """Replace files there also where an earlier run did not write them, each of which is named."""

    options = _parse("analyze", analyze.__doc__, arguments, Options, Options(config=AnalyzeConfig()))
    paths = [options.model, *options.compare]
    names = options.names or tuple(_model_name(path) for path in paths)
    if len(set(names)) != len(paths) or len(names) != len(paths):
        raise ValueError(f"names must be {len(paths)} different ones, got {', '.join(names)}: give --names")
    with output_folder(options.out, "analyze", overwrite=options.overwrite) as out:
        claim(out, options.config, len(paths))
        logs = {
            name: TrainingLog.read(log)
            for name, path in zip(names, paths, strict=True)
            if path not in BUNDLED and (log := find_training_log(path)) is not None
        }
        pipelines = {
            name: load_source(path, task="class-to-image", device=options.device, decodes=False).sampler.pipeline
            for name, path in zip(names, paths, strict=True)
        }
        run(pipelines, options.config, out, logs)
    print(f"written: {options.out / 'report.md'}, report.html, report.json, arrays.npz")


def _model_name(path: str) -> str:
    """What a report calls a model: its file's or folder's name, or that of the run it was trained in."""
    resolved = Path(path).resolve()
    if resolved.name == "pipeline":
        return resolved.parent.name
    return resolved.stem if resolved.is_file() else resolved.name


def info(arguments: Sequence[str]) -> None:
    """Show versions, bundled models, presets and cache methods; with a model, its sizes and long skips.

    Example: skipdit info DiT-XL-2-skip.pt
    """
    import tyro

    from skipdit.cache.methods import METHODS, SPEC_FORM
    from skipdit.environment import versions
    from skipdit.loading import BUNDLED, ObjectiveName, load_source
    from skipdit.models.dit import PRESETS
    from skipdit.models.families import FAMILIES
    from skipdit.models.latte import LATTE_PRESETS
    from skipdit.models.surgery import open_units

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """model: a bundled model, a pipeline's folder or a checkpoint. num_attention_heads, num_classes, objective,
        drop: as of `skipdit sample`."""

        model: tyro.conf.Positional[str | None] = None
        num_attention_heads: int | None = None
        num_classes: int | None = None
        objective: ObjectiveName | None = None
        drop: tuple[str, ...] = ()

    options = _parse("info", info.__doc__, arguments, Options)
    if options.model is None:
        print("versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()))
        print("bundled models: " + ", ".join(f"{name} ({model.task})" for name, model in BUNDLED.items()))
        print(f"presets: {', '.join((*PRESETS, *LATTE_PRESETS))}")
        print(f"families of diffusers: {', '.join(FAMILIES)}\ncache specs: {SPEC_FORM}")
        for name, method in METHODS.items():
            print(f"  {name}:{method.form}: {method.source}")
        return
    model = load_source(
        options.model,
        num_attention_heads=options.num_attention_heads,
        num_classes=options.num_classes,
        objective=options.objective,
        drop=options.drop,
        decodes=False,
    )
    transformer = model.sampler.pipeline.transformer
    open_units(transformer)
    config, links = transformer.config, transformer.long_skip_links
    width = config.num_attention_heads * config.attention_head_dim
    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"{type(transformer).__name__} ({model.sampler.task}): {links.num_units} units of width {width}, ", end="")
    print(f"{config.num_attention_heads} heads, patch {config.patch_size}, {num_parameters:,} parameters")
    frames = [config[name] for name in ("num_frames", "video_length") if name in config]
    sizes = (*frames, config.in_channels, config.sample_size, config.sample_size)
    classes = f", {config.num_classes} classes" if config.get("num_classes") else ""
    print(f"input: {' x '.join(map(str, sizes))}{classes}")
    pairs = ", ".join(f"{source} -> {target}" for target, source in links.sources.items())
    fusion = config["long_skip"]["fusion"] if config.get("long_skip") else "its own"
    print(f"long skips: {pairs or 'none'}" + (f" ({fusion})" if pairs else ""))
    if (path := config.get("shallow_path")) is not None:
        print(f"shallow guidance: with the first {path['num_shallow_units']} and as many last units")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "sample": sample,
    "train": train,
    "ema": ema,
    "latents": latents,
    "convert": convert,
    "analyze": analyze,
    "calibrate": calibrate,
    "bench": bench,
    "info": info,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A user's mistake ends in one line and exit status 2; SKIPDIT_TRACEBACK=1 shows its traceback.

    Ctrl-C ends in status 130, SIGTERM in 143, a stdout that nobody reads in 141.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with terminal.messages():
        try:
            try:
                _run(*arguments)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            sys.exit(terminal.drop_output())
        except KeyboardInterrupt as stopped:
            sys.exit(terminal.say_stopped(stopped))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            told = not isinstance(error, RuntimeError) or isinstance(error, RecursionError)
            if os.environ.get("SKIPDIT_TRACEBACK") or not (told or terminal.is_out_of_memory(error)):
                raise
            print(f"skipdit: error: {terminal.describe(error)}", file=sys.stderr)
            sys.exit(2)


def _run(command: str = "--help", *arguments: str) -> None:
    if command in ("-h", "--help"):
        listing = "\n".join(f"  {name:<10}{(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items())
        print(f"usage: skipdit COMMAND [OPTIONS]\n\nDiffusion transformers with long skips.\n\n{listing}\n")
        print("`skipdit COMMAND --help` shows its options.")
        return
    if command not in COMMANDS:
        raise ValueError(f"the command must be one of {', '.join(COMMANDS)}, got {command!r}")
    with contextlib.nullcontext() if command == "train" else terminal.terminable():
        COMMANDS[command](arguments)


def _print_report(report: "Comparison", out: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "run", "steps", "full", "reused", "seconds", "speedup", "compute", "PSNR dB", "SSIM", box=SIMPLE_HEAD, padding=0
    )
    for row in report.rows:
        psnr = "-" if row.psnr is None else row.psnr.text()
        ssim = "-" if row.ssim is None else f"{row.ssim:.4f}"
        counts = (str(row.steps), str(row.steps_full), str(row.steps_reused))
        table.add_row(
            row.name, *counts, f"{row.seconds:.2f}", f"{row.speedup:.2f}x", f"{row.compute_ratio:.2f}x", psnr, ssim
        )
    console = Console()
    console.print(table)
    peak, held = report.peak_memory_bytes / 2**20, max(row.bytes_held for row in report.rows) / 2**20
    console.print(f"peak memory {peak:.0f} MiB, held by the cache {held:.2f} MiB, seed {report.config['seed']}")
    for name, count in report.broken.items():
        console.print(f"broken samples: {count} of the run {name}")
    console.print(f"pictures and report.json are in {terminal.one_line(str(out))}", soft_wrap=True, markup=False)
