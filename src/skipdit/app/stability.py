"""The third tab: the stability report of a model, made here or by `skipdit analyze`."""

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from skipdit.analysis.config import AnalyzeConfig
from skipdit.analysis.measure import measure, num_parts, runner_of
from skipdit.analysis.report import check_weights, write_report
from skipdit.app.jobs import Job
from skipdit.app.models import cancellable
from skipdit.data.picture_files import open_picture
from skipdit.files.output import MARKER, output_folder
from skipdit.files.untrusted import read_bytes
from skipdit.loading import Source
from skipdit.plots import check_plots_installed

TASK = "class-to-image"  # of the models that can be measured
FIGURE = re.compile(r"^!\[([^\]\n]*)\]\(([\w-]+\.png)\)$", re.MULTILINE)
MAX_PAGE_BYTES, MAX_FIGURE_BYTES, MAX_FIGURES = 2**20, 2**24, 60

Effort = Literal["quick", "thorough"]
EFFORTS: dict[Effort, AnalyzeConfig] = {
    "quick": AnalyzeConfig(
        num_pictures=2,
        num_inference_steps=20,
        jacobian_timesteps=2,
        growth_timesteps=2,
        surface_size=3,
        surface_timesteps=(500,),
    ),
    "thorough": AnalyzeConfig(),
}


@dataclass(frozen=True)
class Figure:
    title: str
    webp: bytes


@dataclass(frozen=True)
class StabilityReport:
    """A page and its figures."""

    where: str
    """folder of the report; empty for one made here"""
    markdown: str
    """the text; each figure is a line `![title](name)`"""
    figures: dict[str, Figure]
    """by file name"""
    archive: bytes = b""
    """zip of all files of a report made here"""


def read_report(folder: Path, where: str = "") -> StabilityReport:
    """Read a report of `skipdit analyze`. `ValueError` or `OSError` if something is missing or broken."""
    markdown = read_bytes(folder / "report.md", MAX_PAGE_BYTES).decode("utf-8", "replace")
    figures = {}
    for title, name in FIGURE.findall(markdown)[:MAX_FIGURES]:
        picture = open_picture(read_bytes(folder / name, MAX_FIGURE_BYTES), name)
        stream = io.BytesIO()
        picture.convert("RGB").save(stream, "WEBP", quality=85)
        figures[name] = Figure(title, stream.getvalue())
    return StabilityReport(where, markdown, figures)


def find_report(folders: Sequence[Path]) -> StabilityReport | None:
    """Return the report in `stability` of the first of these folders that has one. `ValueError` if it is broken."""
    for folder in folders:
        path = folder / "stability"
        if (path / "report.md").is_file() and (path / "report.json").is_file():
            return read_report(path, str(path))
    return None


def make_report(job: Job, source: Source, name: str, effort: Effort) -> StabilityReport:
    """Measure the stability of a model, and report every part to the job. `ValueError` for a model of another task, or
    if the plotting libraries are missing."""
    check_plots_installed()
    if source.sampler.task.name != TASK:
        raise ValueError(f"stability is measured of {TASK} models, {name} is a {source.sampler.task.name} model")
    config, pipeline = EFFORTS[effort], source.sampler.pipeline
    check_weights(name, pipeline)
    runner_of(config, pipeline)
    job.tell(doing="measuring", done=0, total=num_parts(config, len(pipeline.transformer.blocks)))
    with cancellable(pipeline, job):
        measured = measure(pipeline, config, None, job.advance)
    job.tell(doing="drawing", done=0, total=0)
    with TemporaryDirectory() as folder, output_folder(Path(folder) / "report", "analyze") as out:
        write_report({name: measured}, config, out)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(out.path.iterdir()):
                if path.name != MARKER:
                    archive.write(path, path.name)
        report = read_report(out.path)
    return StabilityReport("", report.markdown, report.figures, stream.getvalue())
