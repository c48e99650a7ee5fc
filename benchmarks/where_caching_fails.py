"""Measures where a cache stops paying: few steps, a stochastic solver, strong guidance.

    python benchmarks/where_caching_fails.py --out benchmarks

Each row is one setting of the bundled class-to-image model: the PSNR of a cache to the run in full, beside that of
an uncached run of fewer steps that costs as much. All start from the same noise. The stochastic solver draws noise in
each step; a cached run draws what the run in full draws, one of fewer steps cannot. `other draws` is what a run in
full gets that starts from the same noise and draws other noise on the way: nothing below it is alike.
Settings that the .json in `--out` already has are not measured again: interrupted, it goes on where it was.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from skipdit.environment import check_device, machine, versions
from skipdit.loading import Source, load_source
from skipdit.metrics.paired import psnr_db
from skipdit.report import table
from skipdit.runs import OwnCache, Runner

SOLVERS = {"deterministic": "dpmsolver++", "stochastic": "sde-dpmsolver++"}
MODEL = "emoji"


@dataclass(frozen=True)
class Row:
    """One setting."""

    cache: str
    solver: str
    guidance_scale: float
    num_steps: int
    full_steps: int
    """of the cached run"""
    compute_ratio: float
    psnr_db: float
    """of the cached run to the run in full"""
    fewer_steps: int
    """steps of an uncached run that costs as much"""
    fewer_psnr_db: float
    other_draws_db: float | None
    """of a run in full that draws other noise in its steps; `None` if the solver draws none"""

    def cells(self) -> dict[str, object]:
        """Return the row of the table."""
        is_shorter = self.fewer_steps != self.num_steps
        has_gain = is_shorter and self.other_draws_db is None
        return {
            "cache": self.cache,
            "solver": self.solver,
            "guidance": f"{self.guidance_scale:g}",
            "steps": self.num_steps,
            "full": self.full_steps,
            "compute": f"{self.compute_ratio:.2f}",
            "cached dB": "equal" if self.full_steps == self.num_steps else f"{self.psnr_db:.1f}",
            "fewer steps": self.fewer_steps,
            "dB": f"{self.fewer_psnr_db:.1f}" if is_shorter else "equal",
            "gain dB": f"{self.psnr_db - self.fewer_psnr_db:+.1f}" if has_gain else "",
            "other draws dB": "" if self.other_draws_db is None else f"{self.other_draws_db:.1f}",
        }


def mean_psnr(samples: Tensor, reference: Tensor) -> float:
    return min(psnr_db(samples, reference).mean().item(), 99.9)


def other_draws(run: Runner) -> Tensor:
    """Sample in full from the same start noise, with other noise in the solver's steps."""
    scheduler, generator = run.pipeline.scheduler, torch.Generator().manual_seed(12345)
    step = scheduler.step

    @wraps(step)  # the pipeline reads the signature
    def with_other_noise(*args: Any, **options: Any) -> Any:
        return step(*args, **options | {"generator": generator})

    scheduler.step = with_other_noise
    try:
        return run().samples
    finally:
        del scheduler.step


def measure(source: Source, options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """Yield a row per setting; `known` ones are not measured again."""
    done = {(row.cache, row.solver, row.guidance_scale, row.num_steps) for row in known}
    pipeline = source.sampler.pipeline
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler.config
    conditions, _ = source.choose({}, options.num_samples)
    for solver, scale, num_steps in product(SOLVERS, options.scales, options.steps):
        caches = options.caches if solver == "deterministic" else options.caches[:1]
        missing = [cache for cache in caches if (cache, solver, scale, num_steps) not in done]
        if not missing:
            continue
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(own, algorithm_type=SOLVERS[solver])
        run = Runner.of(
            source.sampler, conditions, num_inference_steps=num_steps, guidance_scale=scale, seed=options.seed
        )
        full = run().samples
        other = mean_psnr(other_draws(run), full) if solver == "stochastic" else None
        by_steps: dict[int, float] = {}
        for cache in missing:
            made = run(OwnCache.of(cache))
            fewer = max(round(num_steps / made.compute_ratio), 1)
            if fewer not in by_steps:
                by_steps[fewer] = mean_psnr(run(num_inference_steps=fewer).samples, full)
            row = Row(
                cache, solver, scale, num_steps, int(made.steps[0]), made.compute_ratio, mean_psnr(made.samples, full),
                fewer, by_steps[fewer], other,
            )  # fmt: skip
            print(row, flush=True)
            yield row


def to_markdown(rows: list[Row], options: argparse.Namespace, about: str) -> str:
    return "\n\n".join((
        "# Where caching does not pay",
        f"`python benchmarks/where_caching_fails.py --num-samples {options.num_samples}`: caches on the bundled "
        f"class-to-image model, {options.num_samples} pictures, seed {options.seed}, PSNR to the run in full of the "
        f"same number of steps, solver and guidance. Under a stochastic solver `auto:2` is `auto:2-k1`. {about}.",
        "*Fewer steps*: as many uncached steps as the cached run cost, rounded. *Other draws*: a run in full from the "
        "same start noise, with other noise in its steps, which shows what PSNR gives two pictures that only start "
        "alike. Fewer steps of a stochastic solver draw other noise too, so that no gain is told there.",
        table([row.cells() for row in rows]) + "\n",
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", nargs="+", default=["auto:2", "auto:2-k1"], help="their specs")
    parser.add_argument("--num-samples", type=int, default=8, help="pictures a run")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 12, 20, 50], help="of the runs")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0], help="of guidance")
    parser.add_argument("--seed", type=int, default=0, help="of the start noise")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the .json and .md")
    options = parser.parse_args()
    check_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "where_caching_fails.json"
    rows = [Row(**row) for row in json.loads(path.read_text("utf-8"))["rows"]] if path.exists() else []
    place = machine(torch.device(options.device))
    settings = {"num_samples": options.num_samples}
    about = f"{place['name']}, {place['threads']} threads, " + ", ".join(f"{n} {v}" for n, v in versions().items())

    def write() -> None:
        rows.sort(key=lambda row: (row.solver, row.guidance_scale, row.num_steps, row.cache))
        data = {"rows": [asdict(row) for row in rows], **settings, "machine": place, "versions": versions()}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(to_markdown(rows, options, about), encoding="utf-8")

    for row in measure(load_source(MODEL, device=options.device), options, rows):
        rows.append(row)
        write()
    write()


if __name__ == "__main__":
    main()
