"""`skipdit analyze`: the stability report of one model, or of several side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from skipdit.analysis.config import AnalyzeConfig
from skipdit.command_options import OutputOptions, config_of, parse
from skipdit.files.output import output_folder


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(AnalyzeConfig, OutputOptions):
    """The models to measure, and where the report goes."""

    model: tyro.conf.Positional[str] = "emoji"
    """emoji, the folder of a pipeline, or a checkpoint; the report includes the log of a training run"""
    compare: tuple[str, ...] = ()
    """further models to measure and to draw beside it"""
    names: tuple[str, ...] = ()
    """names of the models in the report; by default their file or folder names"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""
    out: Path = Path("out/stability")
    """folder of the report"""


def analyze(arguments: Sequence[str]) -> None:
    """Measure how stable a model is, alone or beside others: features, Jacobians, errors under caches, weights.

    Example: skipdit analyze runs/skip/pipeline --compare runs/plain/pipeline --out out/stability
    """
    options = parse("analyze", analyze.__doc__, arguments, AnalyzeOptions)
    from skipdit.analysis.report import analyze as run
    from skipdit.analysis.report import claim
    from skipdit.analysis.weights import TrainingLog, find_training_log
    from skipdit.loading import BUNDLED, load_source

    config = config_of(options, AnalyzeConfig)
    paths = [options.model, *options.compare]
    names = options.names or tuple(_model_name(path) for path in paths)
    if len(set(names)) != len(paths) or len(names) != len(paths):
        raise ValueError(f"each model needs its own name, got {', '.join(names)} for {len(paths)}: give --names")
    with output_folder(options.out, "analyze", overwrite=options.overwrite) as out:
        claim(out, config, len(paths))
        logs = {
            name: TrainingLog.read(log)
            for name, path in zip(names, paths, strict=True)
            if path not in BUNDLED and (log := find_training_log(path)) is not None
        }
        pipelines = {
            name: load_source(path, task="class-to-image", device=options.device, decodes=False).sampler.pipeline
            for name, path in zip(names, paths, strict=True)
        }
        run(pipelines, config, out, logs)
    print(f"written: {options.out / 'report.md'}, report.html, report.json, arrays.npz")


def _model_name(path: str) -> str:
    """Return a name for a model: that of its file or folder, or of the run it was trained in."""
    resolved = Path(path).resolve()
    if resolved.name == "pipeline":
        return resolved.parent.name
    return resolved.stem if resolved.is_file() else resolved.name
