"""Many samples of one model with one setting, for evaluation: the same whatever the number of processes.

Processes share nothing but the folder of blocks, and what was stopped goes on with those that are missing. In the end
the main process makes one file of them.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
from rich.progress import track
from torch import nn

from skipdit.cache.enable import enable_cache
from skipdit.data.arrays import write_npz
from skipdit.environment import machine, peak_memory_bytes, resolve_device
from skipdit.environment import versions as versions_here
from skipdit.files import output
from skipdit.files.output import OutputFolder
from skipdit.files.untrusted import printable, read_json
from skipdit.interfaces import Fields
from skipdit.loading import Source
from skipdit.process_group import ProcessGroup, own_device, process_group
from skipdit.runs import check_method
from skipdit.sampling.blocks import (
    BLOCKS,
    KIND,
    BlockMaker,
    Conditions,
    block_path,
    is_block,
    png_name,
    read_block,
    seed_of,
    settings_of,
)
from skipdit.sampling.compare import cost_ratio, load, runner_of
from skipdit.sampling.config import SampleConfig
from skipdit.terminal import progress_bar

LOGGER = logging.getLogger(__name__)

NPZ, PNG, TOLD = "samples.npz", "samples", "samples.json"


class Told(TypedDict):
    """`samples.json`. settings: what a set must be, to go on with its blocks. report: `None` before all are there."""

    settings: Fields
    prompts: list[str]
    report: Fields | None


@dataclass(frozen=True, kw_only=True)
class SetReport:
    """What a set is and what it took."""

    num_samples: int
    num_broken: int
    """of them, those that are not finite"""
    shape: list[int]
    """of a sample: (h w 3), or (f h w 3) of a clip"""
    batch_size: int
    num_processes: int
    num_made: int
    """by the last call, which may have found some"""
    seconds: float
    """of the last call, all its processes together, without loading, with compiling"""
    samples_per_second: float
    """the same"""
    steps: int
    """denoising steps of a sample"""
    steps_full: float
    """of them, those that ran every unit; the mean over blocks"""
    steps_reused: float
    """of them, those that took deep features from the cache; the mean over blocks"""
    compute_ratio: float
    """FLOPs with ordinary guidance and no cache over those spent"""
    peak_memory_bytes: int
    """the most that the main process has held, on its device"""
    machine: dict[str, str | int]
    """device, its name, threads, system"""
    versions: dict[str, str]
    """of Python and packages, by name"""

    def text(self) -> str:
        """Say it in one line."""
        size = " x ".join(map(str, self.shape))
        speed = f"{self.samples_per_second:.2f} per second by {self.num_processes} process(es)"
        return f"{self.num_samples:,} samples of {size}, {self.steps} steps, compute {self.compute_ratio:.2f}x; {speed}"


def sample_set(config: SampleConfig) -> SetReport | None:
    """Make `config.num_samples` samples and write `samples.npz`, the folder `samples`, or both, and `samples.json`,
    into `config.out`. In one process or, started by torchrun, in several, of which the main one returns the report.

    `samples.npz` is as ADM's evaluation reads it: `arr_0`, uint8 (n h w 3) or (n f h w 3), and `arr_1`, class numbers,
    or which of the prompts in `samples.json`; none for a model without classes. `samples` holds a PNG per sample and
    `metadata.jsonl`. The same call goes on where one was stopped, and returns the report of one that is done.

    `ValueError` on what `sample_and_compare` refuses, and where `out` holds a set of other settings; `OSError` where
    `out` cannot be written, is in use, or holds such files of somebody else. All of it before anything is sampled.
    """
    if not config.makes_set or config.num_samples is None:
        raise ValueError("a set of samples needs num_samples, and npz or png")
    with process_group() as group, ExitStack() as held:
        device = own_device(resolve_device(config.device))
        folders: list[OutputFolder] = []
        folder = output.output_folder(config.out, KIND, overwrite=config.overwrite)
        group.from_main(lambda: folders.append(held.enter_context(folder)))
        source = load(replace(config, device=str(device)))
        run = SetRun(config, source, group, folders[0] if folders else None)
        return run()


class SetRun:
    """One call of `sample_set` in one process. out: in the main process only."""

    def __init__(self, config: SampleConfig, source: Source, group: ProcessGroup, out: OutputFolder | None) -> None:
        config = source.complete(config)
        self.config, self.source, self.group, self.out = config, source, group, out
        self.num_samples = config.num_samples or 0
        self.batch_size = min(config.batch_size or source.sampler.task.batch_size, self.num_samples)
        self.num_blocks = -(-self.num_samples // self.batch_size)
        self.method = source.cache(config.cache)
        self.conditions = Conditions.of(source, config)
        self.run = runner_of(source, config, self.conditions.choices[:1], seed=seed_of(config.seed, 0))
        if self.method is not None:
            check_method(self.run.pipeline, self.method, self.run.num_inference_steps)
        self.folder = config.out.absolute() if out is None else out.path
        self.overwritten = ("*.png", "metadata.jsonl") if config.overwrite else ()

    def __call__(self) -> SetReport | None:
        settings, missing = self.group.from_main(self.begin)
        if missing is None:
            return self.read_report() if self.group.is_main else None
        seconds = self.make(settings, missing)
        if self.out is None:
            return None
        num_made = sum(len(self.indices(number)) for number in missing)
        return self.finish(settings, num_made, seconds)

    def indices(self, number: int) -> range:
        """Return the samples of a block."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.num_samples))

    # ------------------------------------------------------------------------------------------------------------------
    # In the main process

    @property
    def files(self) -> OutputFolder:
        assert self.out is not None
        return self.out

    def begin(self) -> tuple[str, list[int] | None]:
        """Return the SHA-256 of the settings and which blocks are missing, `None` where the set is done."""
        wanted = [TOLD] + [NPZ] * self.config.npz
        self.files.claim(wanted)
        settings = settings_of(self.source, self.method, self.config, self.batch_size)
        told = self.read() if self.files.holds(TOLD) else None
        if told is not None and self.has_begun(told) and (changed := _difference(told["settings"], settings)):
            what = ", ".join(changed)
            raise ValueError(f"{printable(self.folder)} holds samples of other settings ({what}): give another --out")
        digest = hashlib.sha256(output.to_json(settings).encode()).hexdigest()
        if told is not None and told["report"] is not None and self.has_results():
            self.remove_blocks()
            return digest, None
        if self.config.png:
            output.check_replaceable(self.folder / PNG, KIND, self.overwritten)
        paths = [block_path(self.folder, number) for number in range(self.num_blocks)]
        missing = [number for number, path in enumerate(paths) if not is_block(path, digest)]
        for number in missing:
            output.check_replaceable(paths[number], KIND, even_damaged=True)
        self.write(settings, None)
        if len(missing) < self.num_blocks:
            LOGGER.warning("goes on with %d of %d blocks that are there", self.num_blocks - len(missing), len(paths))
        return digest, missing

    def has_begun(self, told: Told) -> bool:
        """Return whether anything is there that other settings would throw away."""
        blocks = (self.folder / BLOCKS).glob("block-*")
        return told["report"] is not None or any(KIND in output.read_marker(path)["files"] for path in blocks)

    def has_results(self) -> bool:
        with suppress(OSError, ValueError):
            if self.config.png:
                output.check_whole(self.folder / PNG, KIND)
            return self.files.holds(NPZ) or not self.config.npz
        return False

    def read(self) -> Told:
        return read_json(self.folder / TOLD, Told)

    def read_report(self) -> SetReport:
        LOGGER.warning("%s holds these samples already", printable(self.folder))
        return SetReport(**(self.read()["report"] or {}))

    def write(self, settings: Fields, report: SetReport | None) -> None:
        prompts = list(self.conditions.choices) if isinstance(self.conditions.choices[0], str) else []
        told = Told(settings=settings, prompts=prompts, report=None if report is None else asdict(report))
        self.files.write_text(TOLD, output.to_json(told))

    def finish(self, settings: str, num_made: int, seconds: float) -> SetReport:
        """Write the results of all blocks, then the report; then the blocks go."""
        paths = [block_path(self.folder, number) for number in range(self.num_blocks)]
        infos = [read_block(path, settings) for path in paths]
        shape = np.load(paths[0] / "samples.npy", mmap_mode="r").shape[1:]
        labels = [self.conditions.label(index) for index in range(self.num_samples)]
        if self.config.npz:
            with self.files.file(NPZ) as draft:
                blocks = (np.load(path / "samples.npy") for path in track(paths, "writing"))
                write_npz(draft, blocks, (self.num_samples, *shape), labels)
        if self.config.png:
            self.write_files(paths, labels)
        device = self.source.sampler.pipeline.device
        report = SetReport(
            num_samples=self.num_samples,
            num_broken=sum(info["num_broken"] for info in infos),
            shape=list(shape),
            batch_size=self.batch_size,
            num_processes=self.group.size,
            num_made=num_made,
            seconds=seconds,
            samples_per_second=num_made / seconds,
            steps=self.run.num_inference_steps,
            steps_full=sum(info["steps_full"] for info in infos) / len(infos),
            steps_reused=sum(info["steps_reused"] for info in infos) / len(infos),
            compute_ratio=len(infos) / sum(1 / info["compute_ratio"] for info in infos),
            peak_memory_bytes=peak_memory_bytes(device),
            machine=machine(device),
            versions=versions_here(),
        )
        self.write(self.read()["settings"], report)
        self.remove_blocks()
        return report

    def write_files(self, paths: Sequence[Path], labels: Sequence[int | None]) -> None:
        """Gather the PNG files of all blocks in one folder, beside what they show."""
        with output.atomic_folder(self.folder / PNG, KIND, overwritten=self.overwritten) as draft:
            with (draft / "metadata.jsonl").open("w", encoding="utf-8") as lines:
                for index, label in enumerate(labels):
                    text = self.conditions.captions[self.conditions.place(index)]
                    line = {"file_name": png_name(index), "label": label, "text": text}
                    lines.write(json.dumps(line) + "\n")
            for number, path in enumerate(paths):
                for index in self.indices(number):
                    _link(path / png_name(index), draft / png_name(index))

    def remove_blocks(self) -> None:
        folder = self.folder / BLOCKS
        for path in sorted(folder.glob("block-*")):
            if KIND in output.read_marker(path)["files"]:
                output.remove_ours(path)
        with suppress(OSError):  # it is not there, or not empty
            folder.rmdir()

    # ------------------------------------------------------------------------------------------------------------------
    # In every process

    def make(self, settings: str, missing: list[int]) -> float:
        """Make this process's share of the missing blocks, and wait for the others; return the seconds it took."""
        pipeline = self.source.sampler.pipeline
        pipeline.set_progress_bar_config(disable=True)
        ratio = cost_ratio(self.run, self.config)
        if self.config.compile:
            cast(nn.Module, pipeline.transformer).compile(fullgraph=True)
        if self.method is not None:
            enable_cache(pipeline, self.method)
        maker = BlockMaker(
            run=self.run,
            conditions=self.conditions,
            config=self.config,
            folder=self.folder,
            settings=settings,
            batch_size=self.batch_size,
            num_samples=self.num_samples,
            is_cached=self.method is not None,
            ratio=ratio,
        )
        self.group.wait_for_all()
        started = time.perf_counter()
        with self.progress(missing) as update, ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for number in missing[self.group.rank :: self.group.size]:
                writing = maker.make(number, writer)
                if written is not None:
                    written.result()
                written = writing
                update()
            if written is not None:
                written.result()
            update()
            self.group.wait_for_all(update)
            update()
        return max(time.perf_counter() - started, 1e-9)

    def progress(self, missing: Sequence[int]) -> "_Shown":
        done = self.num_samples - sum(len(self.indices(number)) for number in missing)
        waiting = {block_path(self.folder, number): len(self.indices(number)) for number in missing}
        return _Shown(self.num_samples, done, waiting, shown=self.group.is_main)


class _Shown:
    """A progress bar of all processes' blocks, in the main one. waiting: samples of each block that is not there."""

    def __init__(self, total: int, done: int, waiting: dict[Path, int], *, shown: bool) -> None:
        self.done, self.waiting, self.shown = done, waiting, shown
        self.bar = progress_bar(shown=shown)
        self.task = self.bar.add_task("sampling", total=total, completed=done)

    def __enter__(self) -> Callable[[], None]:
        self.bar.start()
        return self.update

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.bar.stop()
        if self.shown and isinstance(error, KeyboardInterrupt):
            self.update()
            error.add_note(f"{self.done:,} samples are there; the same command goes on with them")

    def update(self) -> None:
        if self.shown:
            for path in [path for path in self.waiting if path.is_dir()]:
                self.done += self.waiting.pop(path)
            self.bar.update(self.task, completed=self.done)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system cannot do that."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _difference(before: Fields, now: Fields) -> list[str]:
    return [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
