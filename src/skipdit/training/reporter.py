"""Write the files of a run other than checkpoints: `config.json`, `log.jsonl`, `samples/`, `pipeline/`, snapshots of
averages, and events for TensorBoard in `tensorboard/`."""

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, TypedDict

import numpy as np
from accelerate import Accelerator
from PIL.Image import Image

from skipdit.files import output
from skipdit.files.output import OutputFolder
from skipdit.files.processes import locked
from skipdit.files.untrusted import as_type_or_none, open_regular, printable
from skipdit.interfaces import Fields
from skipdit.terminal import progress_bar
from skipdit.training.checkpointing import (
    LOG,
    PREVIOUS,
    check_places,
    list_checkpoints,
    previous_runs,
    set_aside,
    written,
)
from skipdit.training.config import TrainConfig
from skipdit.training.devices import in_main
from skipdit.training.posthoc_ema import FOLDER as SNAPSHOTS
from skipdit.training.posthoc_ema import list_snapshots, snapshot_name

LOGGER = logging.getLogger(__name__)

CONFIG, SAMPLES, PIPELINE = "config.json", "samples", "pipeline"
BOARD = "tensorboard"
UNIT_NORMS = "unit_gradient_norms"
PIPELINE_FILES = ("model_index.json", "transformer/*", "scheduler/*")


class LogLine(TypedDict):
    """What every line of `log.jsonl` has."""

    step: int
    loss: float | None


class RunFolder:
    """The folder of one run. Files in the way raise an error, or with `overwrite` a warning, before any work starts."""

    def __init__(self, path: Path, config: TrainConfig, *, overwrite: bool) -> None:
        self.path, self.config = output.absolute(path), config
        self.overwritten = PIPELINE_FILES if overwrite else ()
        self.files = OutputFolder(self.path, "training", overwrite=overwrite)
        for name in (SAMPLES, SNAPSHOTS):
            output.clean_up(self.path / name)
        self.files.claim([CONFIG, LOG, *self._in_the_way()])
        check_places(self.path, config.max_steps)
        pipeline = self.path / PIPELINE
        output.check_replaceable(pipeline, PIPELINE, self.overwritten)
        if overwrite and pipeline.is_dir() and PIPELINE not in output.read_marker(pipeline)["files"]:
            LOGGER.warning("in %s, %s will be overwritten", printable(pipeline), ", ".join(PIPELINE_FILES))

    def _in_the_way(self) -> Iterator[str]:
        """Yield the existing grids and snapshots of steps at which this run will write some."""
        config, last = self.config, self.config.max_steps
        for folder, suffix, every in (
            (SAMPLES, ".png", config.sample_every),
            (SNAPSHOTS, ".safetensors", config.ema_snapshots_every),
        ):
            for path in sorted((self.path / folder).glob(f"step-*{suffix}")):
                match = re.fullmatch(r"step-([0-9]{7,18})", path.stem)
                if every and match and (step := int(match[1])) <= last and (step % every == 0 or step == last):
                    yield f"{folder}/{path.name}"

    def open_log(self, first_step: int) -> TextIO:
        """Open `log.jsonl` for appending, without the lines of steps after `first_step`, which will run again.

        A last line that was cut off by a kill is dropped too. Lines that are not ours are kept.
        """
        path, was_ours = self.path / LOG, self.files.grow(LOG)
        with output.atomic_file(path) as draft, draft.open("wb") as new:
            if path.exists() and was_ours:
                with open_regular(path) as old:
                    new.writelines(line for line in whole_lines(old) if not is_of_later_step(line, first_step))
        return path.open("a", encoding="utf-8")

    def set_aside(self) -> None:
        """Move an earlier run out of the way: its checkpoints, log and snapshots."""
        names = [LOG, *map(snapshot_name, list_snapshots(self.path))]
        set_aside(self.path, [name for name in names if self.files.holds(name)])

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Yield a draft of a file of the run."""
        with written(self.path / name), self.files.file(name) as draft:
            yield draft

    def drop_snapshots(self, first_step: int) -> None:
        """Delete our snapshots of steps that will run again."""
        for step in list_snapshots(self.path):
            if step > first_step:
                self.files.remove(snapshot_name(step))

    @contextmanager
    def pipeline(self) -> Iterator[Path]:
        """Yield a draft of the finished pipeline."""
        path = self.path / PIPELINE
        with written(path), output.atomic_folder(path, PIPELINE, overwritten=self.overwritten) as draft:
            yield draft


def refuse_inputs(out: Path, config: TrainConfig) -> None:
    """Raise `ValueError` if a run would replace one of its inputs, or write into its data."""
    source, inflated = config.data.source, getattr(config.model, "inflate", None)
    # the default source is the bundled data
    data = None if source == getattr(type(config.data), "source", None) or not Path(source).exists() else Path(source)
    names = (config.start_from, None if inflated == "emoji" else inflated)
    inputs = [Path(name) for name in names if name is not None and Path(name).exists()] + ([data] if data else [])
    if out.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"{printable(out)} is an input of this run: give another --out")
    if data is not None and data.resolve() in out.resolve().parents:
        raise ValueError(
            f"{printable(out)} lies in the data, {printable(data)}, and would be read as data: give another --out"
        )
    replaced = (PIPELINE, SAMPLES, SNAPSHOTS, PREVIOUS)
    for target in (*(out / name for name in replaced), *previous_runs(out), *list_checkpoints(out)):
        output.check_apart(target, inputs)


@contextmanager
def run_folder(
    accelerator: Accelerator, path: Path, config: TrainConfig, *, overwrite: bool
) -> Iterator[RunFolder | None]:
    """Lock the folder of a run, and yield it in the main process, `None` in the others. An `OSError`, if another run
    holds it or files that are not ours are in the way, is raised in all processes."""
    with ExitStack() as stack:
        folders: list[RunFolder] = []

        def open_folder() -> None:
            refuse_inputs(output.absolute(path), config)
            stack.enter_context(locked(output.absolute(path)))
            folders.append(RunFolder(path, config, overwrite=overwrite))

        in_main(accelerator, open_folder)
        yield folders[0] if folders else None


def whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a log, without a last line that was cut off."""
    for line in file:
        if line.endswith(b"\n"):
            yield line
        elif parse(line) is not None or line.strip(b"\0")[:1] not in (b"", b"{"):
            yield line + b"\n"


def parse(line: bytes) -> object:
    """Return the contents of a line of JSON; `None` if it is not valid."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def is_of_later_step(line: bytes, step: int) -> bool:
    """Return True if a line is one of ours and of a later step than this."""
    entry = as_type_or_none(parse(line), LogLine)
    return entry is not None and entry["step"] > step


class Board:
    """Events for TensorBoard: the numbers in the log, and the grids. Earlier events of steps after `first_step`, which
    will run again, are purged."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with written(folder):
            self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def line(self, entry: Fields) -> None:
        with written(self.folder):
            numbers = {name: value for name, value in entry.items() if name not in ("step", UNIT_NORMS)}
            numbers |= {f"{UNIT_NORMS}/{unit}": norm for unit, norm in enumerate(entry[UNIT_NORMS])}
            for tag, number in numbers.items():
                self.writer.add_scalar(tag, number, entry["step"], new_style=True)
            self.writer.flush()

    def grid(self, step: int, grid: Image) -> None:
        with written(self.folder):
            self.writer.add_image("samples", np.asarray(grid.convert("RGB")), step, dataformats="HWC")
            self.writer.flush()

    def close(self) -> None:
        self.writer.close()


@dataclass(frozen=True)
class StepSummary:
    """The numbers of a step over all processes. Norms are 0 in a step whose gradient overflowed in fp16."""

    loss: float
    gradient_norm: float
    num_skipped: int
    """steps skipped by the guard so far"""
    overflows: int
    """steps that overflowed in fp16 so far"""
    loss_scale: float
    unit_norms: list[float]
    """gradient norm per unit"""


class Reporter:
    """`config.json`, `log.jsonl`, the grids, TensorBoard's events and the progress bar, in the main process only."""

    def __init__(self, folder: RunFolder | None, config: TrainConfig, first_step: int, num_skipped: int = 0) -> None:
        self.folder, self.config, self.first_step = folder, config, first_step
        self.num_skipped = num_skipped  # as in the last line of the log
        self.board: Board | None = None

    def __enter__(self) -> "Reporter":
        if self.folder is not None:
            self.folder.files.write_text(CONFIG, output.to_json(self.config))
            self.log = self.folder.open_log(self.first_step)
            self.folder.drop_snapshots(self.first_step)
            if self.config.tensorboard:
                self.board = Board(self.folder.path / BOARD, self.first_step)
            self.progress = progress_bar()
            self.task = self.progress.add_task("training", total=self.config.max_steps, completed=self.first_step)
            self.progress.start()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.folder is not None:
            self.progress.stop()
            with suppress(OSError):  # the failure to write a line has been raised already
                self.log.close()
            if self.board is not None:
                with suppress(OSError):
                    self.board.close()

    def __call__(self, step: int, flops: float, learning_rate: float, summary: StepSummary) -> None:
        """Write one line of the log. flops: of all steps so far, over all processes."""
        if self.folder is None:
            return
        elapsed, images = time.perf_counter() - self.started, (step - self.first_step) * self.config.batch_size
        entry = {
            "step": step,
            "images": step * self.config.batch_size,
            "flops": flops,
            "loss": summary.loss,
            "gradient_norm": summary.gradient_norm,
            "learning_rate": learning_rate,
            "images_per_second": round(images / elapsed, 2) if elapsed > 0 else 0.0,
            UNIT_NORMS: [float(f"{norm:.4g}") for norm in summary.unit_norms],
        }
        if self.config.gradient_guard:
            entry["steps_left_out"] = summary.num_skipped
            if summary.num_skipped > self.num_skipped:
                LOGGER.warning(
                    "up to step %d, %d more step(s) skipped: the gradient norm was above %g times its median",
                    step,
                    summary.num_skipped - self.num_skipped,
                    self.config.gradient_guard,
                )
            self.num_skipped = summary.num_skipped
        if self.config.precision == "fp16":
            entry |= {"loss_scale": summary.loss_scale, "steps_overflowed": summary.overflows}
        with written(self.folder.path / LOG):
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()
        if self.board is not None:
            self.board.line(entry)
        self.progress.update(self.task, completed=step, description=f"loss {summary.loss:.4f}")

    def grid(self, step: int, grid: Image) -> None:
        """Write a grid of samples."""
        assert self.folder is not None
        with self.folder.file(f"{SAMPLES}/step-{step:07d}.png") as draft:
            grid.save(draft)
        if self.board is not None:
            self.board.grid(step, grid)
