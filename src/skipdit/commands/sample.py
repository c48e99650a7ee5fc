"""`skipdit sample`: pictures or clips in full and cached, side by side, or a set of them for evaluation."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skipdit.command_options import parse
from skipdit.process_group import count_processes
from skipdit.sampling.config import SampleConfig
from skipdit.terminal import one_line

if TYPE_CHECKING:
    from skipdit.sampling.compare import Comparison


def sample(arguments: Sequence[str]) -> None:
    """Compare runs in full, cached, and with fewer steps in the same time; or make a set of samples for evaluation.

    The samples and a report go into --out. With --npz or --png, many samples of one setting are made instead.

    Exit status 1: the samples were written, but some of them are not finite; the report counts them.

    Example: skipdit sample --task text-to-image --prompt "a cat with a rocket" --out out/cats
    Example: torchrun --nproc-per-node 8 -m skipdit sample --num-samples 50000 --npz --cache none --out out/emoji-50k
    """
    config = parse("sample", sample.__doc__, arguments, SampleConfig)
    if config.makes_set:
        _sample_set(config)
        return
    if count_processes() > 1:
        raise ValueError("a comparison runs in one process; for several, make a set of samples with --npz or --png")
    from skipdit.sampling.compare import sample_and_compare

    report = sample_and_compare(config)
    _print_report(report, config.out)
    if report.broken:
        _exit_on_broken(report.broken)


def _sample_set(config: SampleConfig) -> None:
    from skipdit.sampling.sets import sample_set

    report = sample_set(config)
    if report is None:  # not the main process
        return
    print(f"{report.text()}\nthe samples and samples.json are in {one_line(str(config.out))}")
    if report.num_broken:
        _exit_on_broken({"set": f"{report.num_broken} of {report.num_samples}"})


def _exit_on_broken(broken: dict[str, str]) -> None:
    counts = ", ".join(f"{name} {count}" for name, count in broken.items())
    print(f"skipdit: broken samples (NaN or infinite): {counts}", file=sys.stderr)
    sys.exit(1)


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
    console.print(f"pictures and report.json are in {one_line(str(out))}", soft_wrap=True, markup=False)
