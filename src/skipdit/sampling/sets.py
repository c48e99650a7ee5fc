"""Makes many samples of one model with one setting, for evaluation; they do not depend on the number of processes.

Processes share only the folder of blocks, and a run that was interrupted continues with those that are missing. At the
end the main process joins them.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
from rich.progress import track
from torch import Tensor

from skipdit.cache.enable import enable_cache
from skipdit.data.arrays import write_npz
from skipdit.environment import machine, peak_memory_bytes, resolve_device
from skipdit.environment import versions as versions_here
from skipdit.files import output
from skipdit.files.output import OutputFolder
from skipdit.files.untrusted import printable, read_json
from skipdit.interfaces import Fields
from skipdit.loading import Source
from skipdit.pictures import to_frames
from skipdit.process_group import ProcessGroup, own_device, process_group
from skipdit.runs import Counts, check_method, counts_of, guidance_options
from skipdit.sampling.blocks import (
    BLOCKS,
    KIND,
    BlockInfo,
    Conditions,
    block_path,
    is_block,
    png_name,
    read_block,
    save_png,
    seed_of,
    settings_of,
)
from skipdit.sampling.compare import cost_ratio, load, runner_of
from skipdit.sampling.config import SampleConfig
from skipdit.terminal import progress_bar

LOGGER = logging.getLogger(__name__)

NPZ, PNG, INFO = "samples.npz", "samples", "samples.json"


class SetInfo(TypedDict):
    """The fields of `samples.json`."""

    settings: Fields
    """the settings of the set, which a run that continues must share"""
    prompts: list[str]
    report: Fields | None
    """`None` until all blocks are complete"""


@dataclass(frozen=True, kw_only=True)
class SetReport:
    """A set of samples, and the cost of making it."""

    num_samples: int
    num_broken: int
    """number of samples that are not finite"""
    shape: list[int]
    """shape of a sample: (h w 3) for a picture, (f h w 3) for a clip"""
    batch_size: int
    num_processes: int
    num_made: int
    """number of samples that the last call made; the others were there before"""
    seconds: float
    """wall-clock time of the last call, including compilation but not loading"""
    samples_per_second: float
    """samples per second of the last call, all processes together"""
    steps: int
    """denoising steps per sample"""
    steps_full: float
    """number of full steps, averaged over blocks"""
    steps_reused: float
    """number of reuse steps, averaged over blocks"""
    compute_ratio: float
    """FLOPs with ordinary guidance and no cache divided by those spent"""
    peak_memory_bytes: int
    """peak memory of the main process on its device"""
    machine: dict[str, str | int]
    """device, its name, threads, system"""
    versions: dict[str, str]
    """versions of Python and packages, by name"""

    def text(self) -> str:
        """Return a summary in one line."""
        size = " x ".join(map(str, self.shape))
        speed = f"{self.samples_per_second:.2f} per second by {self.num_processes} process(es)"
        return f"{self.num_samples:,} samples of {size}, {self.steps} steps, compute {self.compute_ratio:.2f}x; {speed}"


def sample_set(config: SampleConfig) -> SetReport | None:
    """Make `config.num_samples` samples and write `samples.npz`, the folder `samples`, or both, and `samples.json` into
    `config.out`. Runs in one process or, under torchrun, in several; the main process returns the report.

    `samples.npz` has the format of ADM's evaluation: `arr_0`, uint8 (n h w 3) or (n f h w 3), and `arr_1`, class
    numbers or indices of the prompts in `samples.json`; models without classes have no `arr_1`. `samples` holds a PNG
    per sample and `metadata.jsonl`. The same call continues an interrupted run, and returns the report of a complete
    one.

    Raises, before anything is sampled, `ValueError` as `sample_and_compare` does or if `out` holds a set with other
    settings, and `OSError` if `out` cannot be written, is in use, or has files in the way that skipdit did not write.
    """
    if not config.makes_set or config.num_samples is None:
        raise ValueError("a set of samples needs num_samples, and npz or png")
    with process_group() as group, ExitStack() as stack:
        device = own_device(resolve_device(config.device))
        folders: list[OutputFolder] = []
        folder = output.output_folder(config.out, KIND, overwrite=config.overwrite)
        group.from_main(lambda: folders.append(stack.enter_context(folder)))
        source = load(replace(config, device=str(device)))
        run = SetRun(config, source, group, folders[0] if folders else None)
        return run()


class SetRun:
    """One call of `sample_set` in one process. out: the folder, in the main process only."""

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
        """Return the indices of the samples of a block."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.num_samples))

    # ------------------------------------------------------------------------------------------------------------------
    # In the main process

    @property
    def files(self) -> OutputFolder:
        assert self.out is not None
        return self.out

    def begin(self) -> tuple[str, list[int] | None]:
        """Return the SHA-256 of the settings and the numbers of the missing blocks, `None` if the set is complete."""
        self.files.claim([INFO] + [NPZ] * self.config.npz)
        settings = settings_of(self.source, self.method, self.config, self.batch_size)
        info = self.read() if self.files.holds(INFO) else None
        if info is not None and self.has_begun(info) and (changed := _difference(info["settings"], settings)):
            names = ", ".join(changed)
            raise ValueError(f"{printable(self.folder)} holds samples of other settings ({names}): give another --out")
        digest = hashlib.sha256(output.to_json(settings).encode()).hexdigest()
        if info is not None and info["report"] is not None and self.has_results():
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
            LOGGER.warning("continues with %d of %d blocks complete", self.num_blocks - len(missing), len(paths))
        return digest, missing

    def has_begun(self, info: SetInfo) -> bool:
        """Return true if there is anything that a run with other settings would discard."""
        blocks = (self.folder / BLOCKS).glob("block-*")
        return info["report"] is not None or any(KIND in output.read_marker(path)["files"] for path in blocks)

    def has_results(self) -> bool:
        with suppress(OSError, ValueError):
            if self.config.png:
                output.check_whole(self.folder / PNG, KIND)
            return self.files.holds(NPZ) or not self.config.npz
        return False

    def read(self) -> SetInfo:
        return read_json(self.folder / INFO, SetInfo)

    def read_report(self) -> SetReport:
        LOGGER.warning("%s already holds these samples", printable(self.folder))
        return SetReport(**(self.read()["report"] or {}))

    def write(self, settings: Fields, report: SetReport | None) -> None:
        fields = None if report is None else asdict(report)
        info = SetInfo(settings=settings, prompts=list(self.conditions.prompts), report=fields)
        self.files.write_text(INFO, output.to_json(info))

    def finish(self, settings: str, num_made: int, seconds: float) -> SetReport:
        """Write the samples of all blocks, then the report; then remove the blocks."""
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
        """Collect the PNG files of all blocks in one folder, with their labels and captions."""
        with output.atomic_folder(self.folder / PNG, KIND, overwritten=self.overwritten) as draft:
            with (draft / "metadata.jsonl").open("w", encoding="utf-8") as lines:
                for index, label in enumerate(labels):
                    text = self.conditions.captions[self.conditions.choice_of(index)]
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
        """Make this process's share of the missing blocks, and wait for the other processes; return the seconds."""
        pipeline = self.source.sampler.pipeline
        pipeline.set_progress_bar_config(disable=True)
        ratio = cost_ratio(self.run, self.config)
        if self.config.compile:
            pipeline.transformer.compile(fullgraph=True)
        if self.method is not None:
            enable_cache(pipeline, self.method)
        self.group.wait_for_all()
        started = time.perf_counter()
        with self.progress(missing) as update, ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for number in missing[self.group.rank :: self.group.size]:
                writing = self.make_block(number, settings, ratio, writer)
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

    def make_block(self, number: int, settings: str, ratio: float, writer: ThreadPoolExecutor) -> "Future[None]":
        """Make a block and start to write it; the next one is made meanwhile.

        settings: SHA-256 of the settings of the set. ratio: FLOPs of a step with ordinary guidance divided by those of
        a step with the config's, for sets without a cache.
        """
        indices = range(number * self.batch_size, (number + 1) * self.batch_size)
        samples = self.samples_of(indices)[: self.num_samples - indices.start]
        broken = (~samples.isfinite()).flatten(1).any(dim=1).sum()
        counts = Counts(self.run.num_inference_steps, 0, ratio)
        if self.method is not None:
            counts = counts_of(self.run.pipeline)
        info = BlockInfo(
            settings=settings,
            num_broken=int(broken),
            steps_full=int(counts.steps_full),
            steps_reused=int(counts.steps_reused),
            compute_ratio=counts.compute_ratio or 1.0,
        )
        return writer.submit(self.write_block, number, to_frames(samples.nan_to_num(0.0)).numpy(), info)

    def samples_of(self, indices: Sequence[int]) -> Tensor:
        """Return the samples of these indices. They may lie beyond the last sample, so that all batches have the same
        size."""
        conditions = [self.conditions.choices[self.conditions.choice_of(index)] for index in indices]
        seeds = [seed_of(self.config.seed, index) for index in indices]
        options = guidance_options(self.config.guidance, self.config.guidance_shallow_units)
        return replace(self.run, conditions=conditions, seed=seeds)(**options).samples

    def write_block(self, number: int, pixels: np.ndarray, info: BlockInfo) -> None:
        with output.atomic_folder(block_path(self.folder, number), KIND, even_damaged=True) as draft:
            np.save(draft / "samples.npy", pixels)
            (draft / "block.json").write_text(output.to_json(info), encoding="utf-8")
            first = number * self.batch_size
            for index, sample in enumerate(pixels if self.config.png else (), start=first):
                save_png(draft / png_name(index), sample)

    @contextmanager
    def progress(self, missing: Sequence[int]) -> Iterator[Callable[[], None]]:
        """Show, in the main process, a progress bar of the blocks of all processes; yield a function that updates
        it."""
        waiting = {block_path(self.folder, number): len(self.indices(number)) for number in missing}
        done = self.num_samples - sum(waiting.values())
        with progress_bar(shown=self.group.is_main) as bar:
            task = bar.add_task("sampling", total=self.num_samples, completed=done)

            def update() -> None:
                nonlocal done
                if self.group.is_main:
                    for path in [path for path in waiting if path.is_dir()]:
                        done += waiting.pop(path)
                    bar.update(task, completed=done)

            try:
                yield update
            except KeyboardInterrupt as interrupt:
                update()
                if self.group.is_main:
                    interrupt.add_note(f"{done:,} samples are complete; the same command continues with them")
                raise


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; copy it if the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _difference(before: Fields, now: Fields) -> list[str]:
    return [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
