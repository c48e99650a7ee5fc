"""Measures `auto` under the shifted schedules of flow models, whose strides are short at first and long at the end.

    python benchmarks/shifted_schedules.py emoji emoji-text --out runs/shifted --report benchmarks

SD3 and Wan at 480p shift by 3, FLUX at 1024x1024 by 3.16, Wan at 720p by 5; the bundled models are trained and
calibrated at 1, which is no shift. Each row is one cache in one run: PSNR to the full run of the same schedule, and an
uncached run of fewer steps that costs no less. All start from the same noise. A row that `--out` has is not measured
again. `--report` writes the table of all rows in `--out`, by itself or after measuring.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from diffusers import DPMSolverMultistepScheduler
from schedule_transfer import decibel

from skipdit.environment import check_device, describe_environment
from skipdit.files.json_lines import append_line, read_lines
from skipdit.files.output import output_folder
from skipdit.loading import load_source
from skipdit.report import Report, listed, table
from skipdit.runs import OwnCache, Runner

RESULTS = "results.jsonl"
NAME = "shifted_schedules"
GUIDANCE = 2.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cache in one run."""

    model: str
    shift: float
    steps: int
    cache: str
    full_steps: int
    compute_ratio: float
    psnr_db: float
    fewer_steps: int
    fewer_psnr_db: float
    num_samples: int
    seed: int

    @property
    def key(self) -> tuple[object, ...]:
        return self.model, self.shift, self.steps, self.cache, self.num_samples, self.seed

    def cells(self) -> dict[str, object]:
        """Return the row of the table."""
        return {
            "model": self.model,
            "shift": f"{self.shift:g}",
            "steps": self.steps,
            "cache": self.cache,
            "full": self.full_steps,
            "compute": f"{self.compute_ratio:.2f}x",
            "dB": f"{self.psnr_db:.1f}",
            "fewer steps": self.fewer_steps,
            "fewer steps, dB": f"{self.fewer_psnr_db:.1f}",
            "gain dB": f"{self.psnr_db - self.fewer_psnr_db:+.1f}",
        }


def measure(model: str, options: argparse.Namespace, known: Sequence[Row]) -> Iterator[Row]:
    """Yield what is missing of a model."""
    done = {row.key for row in known}
    source = load_source(model, device=options.device)
    pipeline = source.sampler.pipeline
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler.config
    conditions, _ = source.choose({}, options.num_samples)
    for shift, steps in product(options.shifts, options.steps):
        common = {"num_samples": options.num_samples, "seed": options.seed}
        missing = [cache for cache in options.caches if (model, shift, steps, cache, *common.values()) not in done]
        if not missing:
            continue
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(own, flow_shift=shift)
        run = Runner.of(
            source.sampler, conditions, num_inference_steps=steps, guidance_scale=GUIDANCE, seed=options.seed
        )
        reference = run().samples
        fewer: dict[int, float] = {}
        for cache in missing:
            made = run(OwnCache.of(cache))
            number = math.ceil(steps / made.compute_ratio)
            if number not in fewer:
                fewer[number] = decibel(run(num_inference_steps=number).samples, reference)
            yield Row(
                model=model,
                shift=shift,
                steps=steps,
                cache=cache,
                full_steps=int(made.steps[0]),
                compute_ratio=made.compute_ratio,
                psnr_db=decibel(made.samples, reference),
                fewer_steps=number,
                fewer_psnr_db=fewer[number],
                **common,
            )


def write_report(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Write the table and the rows."""
    places = {name: place for place, name in enumerate(dict.fromkeys(row.model for row in rows))}
    rows = sorted(rows, key=lambda row: (places[row.model], row.shift, row.steps, row.cache))
    samples = {row.model: f"{row.num_samples} samples of seed {row.seed}" for row in rows}
    facts = samples | {"guidance": f"{GUIDANCE:g}", "solver": "DPM-Solver of order 1, of the bundled models"}
    with output_folder(options.report, "bench") as out:
        Report(
            title="`auto` under shifted schedules",
            config={"guidance": GUIDANCE},
            environment=describe_environment(options.device, options.seed),
            data={"rows": [asdict(row) for row in rows]},
            parts=[listed(facts), table([row.cells() for row in rows])],
        ).write(out, NAME)
    print((options.report / f"{NAME}.md").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="bundled models")
    parser.add_argument("--shifts", type=float, nargs="+", default=[1.0, 3.0, 5.0], help="1 is no shift")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50], help="of the runs")
    parser.add_argument("--caches", nargs="+", default=["auto:1.5", "auto:2", "auto:2.5", "N2"], help="their specs")
    parser.add_argument("--num-samples", type=int, default=8, help="per run")
    parser.add_argument("--seed", type=int, default=77, help="of the noise")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/shifted"), help="folder of the results")
    parser.add_argument("--report", type=Path, default=None, help="folder of the table; none by default")
    options = parser.parse_args()
    if not (options.models or options.report):
        parser.error("give a model, or --report")
    check_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [Row(**line) for line in read_lines(options.out / RESULTS)]
    for model in options.models:
        for row in measure(model, options, rows):
            print(row, flush=True)
            append_line(options.out / RESULTS, row)
            rows.append(row)
    if options.report is not None:
        if not rows:
            parser.error(f"{options.out} holds no results")
        write_report(rows, options)


if __name__ == "__main__":
    main()
