"""`skipdit calibrate`: the best cache schedules of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from skipdit.command_options import OutputOptions, PipelineOptions, WeightsOptions, parse
from skipdit.files.output import output_folder
from skipdit.options import DTypeName


def calibrate(arguments: Sequence[str]) -> None:
    """Measure how much reuse changes a model's output at every step, and write the best cache schedules.

    Use a schedule with `skipdit sample --cache FILE`, or in Python with `skipdit.enable_cache(pipeline, FILE)`.

    Example: skipdit calibrate emoji --speedups 1.8 2.5 --out out/schedules
    """
    from skipdit.calibration.config import CalibrateConfig

    @dataclass(frozen=True, kw_only=True)
    class Options(WeightsOptions, PipelineOptions, OutputOptions):
        """The model to calibrate, and where its schedules go."""

        model: tyro.conf.Positional[str] = "emoji"
        """a bundled model, the folder of a pipeline, of skipdit or of diffusers, or a checkpoint"""
        config: Annotated[CalibrateConfig, tyro.conf.arg(name="")]
        scheduler: str | None = None
        """euler or dpm for a flow model; ddim, dpm or ddpm for the others; by default the model's own"""
        vae: Path | None = None
        """folder of an AutoencoderKL, or of a pipeline with one, for a checkpoint of latents"""
        dtype: DTypeName = "float32"
        """of the weights and of the computation"""
        device: str = "auto"
        """cpu, cuda, or auto: a GPU if there is one"""
        out: Path = Path("out/schedules")
        """folder of the schedules and the report"""

    options = parse("calibrate", calibrate.__doc__, arguments, Options)
    from skipdit.calibration.calibrate import calibrate as run
    from skipdit.calibration.calibrate import claim
    from skipdit.loading import load_source

    with output_folder(options.out, "calibrate", overwrite=options.overwrite) as out:
        claim(out, options.config)
        ways = {name: getattr(options, name) for name in ("device", "dtype", "scheduler", "vae")}
        source = load_source(options.model, weights=options, published=options, **ways)
        run(source, options.config, out)
    print((options.out / "report.md").read_text(encoding="utf-8"))
    print(f"written: {options.out}; try one: skipdit sample --model {options.model} --cache {options.out}/NAME.json")
