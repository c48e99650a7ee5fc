"""Counts the steps in which a plain model that was given long skips becomes as good as it was, and what caches cost it
then.

    python benchmarks/conversion_steps.py --seeds 0 1 --runs runs/conversion --report benchmarks

For each seed: the plain model (recipe `convert-plain`); stage one, in which fresh long skips alone are trained
(`convert-stage-one`); stage two, in which everything is trained, at a constant rate, in legs of `--every` steps until
the loss of the averaged weights is at most that of the plain model, or for `--most` steps. The loss is that of the same
pictures, noise and timesteps each time. Then cached runs of both, beside the full run of the same model. `--report`
writes the table of all that `--runs` holds, by itself or after measuring; of `--runs` it needs `results.jsonl`. What
was stopped goes on.
"""

import argparse
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from skipdit.benchmark.config import ConversionBenchConfig
from skipdit.benchmark.conversion import build, draw_batch, losses_of, runner_of
from skipdit.environment import describe_environment
from skipdit.files.json_lines import append_line, read_lines
from skipdit.files.output import output_folder
from skipdit.metrics.paired import PairedScore
from skipdit.recipes import convert_plain, convert_stage_one, convert_stage_two
from skipdit.report import Report, listed, table
from skipdit.runs import OwnCache, check_method
from skipdit.tasks.training import TrainingTask, open_items
from skipdit.training import TrainConfig, train

RESULTS = "results.jsonl"
CACHES = ("N2", "delta:N2", "fora:N2", "N3", "delta:N3", "fora:N3")
PLAIN, CONVERTED = "plain", "converted"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measurement. kind: loss or cache."""

    kind: Literal["loss", "cache"]
    seed: int
    model: str
    """plain, stage one or converted"""
    steps: int
    """of the conversion, both stages"""
    value: float
    """loss, or PSNR in dB to the full run of the same model"""
    cache: str = ""
    compute_ratio: float | None = None


class Conversion:
    """The trainings of one seed and what is measured of them. out: the file of all seeds."""

    def __init__(self, seed: int, options: argparse.Namespace) -> None:
        self.seed, self.options = seed, options
        self.folder: Path = options.runs / f"seed{seed}"
        self.bench = ConversionBenchConfig(device=options.device, num_samples=options.num_samples, num_shown=1)
        self.plain = self.sized(convert_plain())
        self.first = self.sized(convert_stage_one(), start_from=str(self.folder / "plain" / "pipeline"))
        self.second = self.sized(
            convert_stage_two(),
            start_from=str(self.folder / "stage-one" / "pipeline"),
            rate_schedule="constant",
            checkpoint_every=options.every,
        )
        self.items = open_items(self.plain.data)
        self.batch: Any = None

    def sized(self, config: TrainConfig, **changes: Any) -> TrainConfig:
        """Return a recipe for this seed, shortened by `--scale` for a trial."""
        steps = max(2, round(config.max_steps * self.options.scale))
        warmup = min(config.warmup_steps, steps // 2)
        return replace(config, seed=self.seed, max_steps=steps, warmup_steps=warmup, **changes)

    def loss(self, config: TrainConfig, pipeline: Path) -> float:
        """Return the mean loss of the averaged weights over the same pictures, noise and timesteps."""
        task = build(config, self.items, pipeline, self.options.device)
        if self.batch is None:
            self.batch = draw_batch(self.bench, self.plain, task)
        return losses_of(task, self.plain, self.batch).mean().item()

    def run(self) -> Iterator[Line]:
        """Train and measure; yield every figure when it is known."""
        device = self.options.device
        plain = train(self.plain, self.folder / "plain", device=device)
        target = self.loss(self.plain, plain)
        yield Line(kind="loss", seed=self.seed, model=PLAIN, steps=0, value=target)
        first = train(self.first, self.folder / "stage-one", device=device)
        spent, loss = self.first.max_steps, self.loss(self.first, first)
        yield Line(kind="loss", seed=self.seed, model="stage one", steps=spent, value=loss)
        steps, converted = 0, first
        while loss > target and steps < self.options.most:
            steps += self.options.every
            leg = replace(self.second, max_steps=steps)
            converted = train(leg, self.folder / "stage-two", device=device, allow_changes=True)
            loss = self.loss(self.second, converted)
            yield Line(kind="loss", seed=self.seed, model=CONVERTED, steps=spent + steps, value=loss)
        for name, config, pipeline in ((PLAIN, self.plain, plain), (CONVERTED, self.second, converted)):
            task = build(config, self.items, pipeline, device)
            yield from self.caches(name, task, 0 if name == PLAIN else spent + steps)

    def caches(self, name: str, task: TrainingTask, steps: int) -> Iterator[Line]:
        """Yield the cached runs that a model can have."""
        run = runner_of(task, self.plain, self.bench)
        reference = run()
        for spec in CACHES:
            cache = OwnCache.of(spec)
            with suppress(ValueError):
                check_method(run.pipeline, cache.method, run.num_inference_steps)
                made = run(cache)
                score: PairedScore = made.scores(reference.samples)["psnr"]
                about: dict[str, Any] = {"seed": self.seed, "model": name, "steps": steps, "cache": spec}
                yield Line(kind="cache", value=score.mean, compute_ratio=made.compute_ratio, **about)


def read_results(runs: Path) -> tuple[list[Line], dict[str, str]]:
    """Return what was measured, the last time each, and the environment."""
    found, environment = {}, {}
    for content in read_lines(runs / RESULTS):
        environment = content.pop("environment")
        line = Line(**content)
        found[line.kind, line.seed, line.model, line.steps, line.cache] = line
    return list(found.values()), environment


# ----------------------------------------------------------------------------------------------------------------------
# The report


def steps_needed(lines: Sequence[Line], seed: int) -> int | None:
    """Return the steps of both stages after which the loss was first that of the plain model; `None` if never."""
    losses = [each for each in lines if each.kind == "loss" and each.seed == seed]
    target = next(each.value for each in losses if each.model == PLAIN)
    reached = [each.steps for each in losses if each.model != PLAIN and each.value <= target]
    return min(reached, default=None)


def loss_rows(lines: Sequence[Line]) -> list[dict[str, object]]:
    """One row per number of steps, one column per seed."""
    losses = [each for each in lines if each.kind == "loss"]
    seeds = sorted({each.seed for each in losses})
    rows = []
    for model, steps in sorted({(each.model, each.steps) for each in losses}, key=lambda row: (row[1], row[0])):
        found = {each.seed: each.value for each in losses if (each.model, each.steps) == (model, steps)}
        cells = {f"loss, seed {seed}": f"{found[seed]:.4f}" if seed in found else "" for seed in seeds}
        rows.append({"model": model, "steps of the conversion": steps, **cells})
    return rows


def cache_rows(lines: Sequence[Line]) -> list[dict[str, object]]:
    """One row per cache, means over seeds; of a converted model its last measurement."""
    last: dict[tuple[str, int, str], Line] = {}
    for each in lines:
        key = each.model, each.seed, each.cache
        if each.kind == "cache" and (key not in last or last[key].steps <= each.steps):
            last[key] = each
    rows = []
    for spec in CACHES:
        row: dict[str, object] = {"cache": spec}
        for model in (PLAIN, CONVERTED):
            found = [each for (name, _, cache), each in last.items() if (name, cache) == (model, spec)]
            values, ratios = [each.value for each in found], [each.compute_ratio or 1.0 for each in found]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            row[f"{model}, compute"] = f"{fmean(ratios):.2f}x" if found else "-"
            row[f"{model}, PSNR dB"] = f"{fmean(values):.2f}{spread}" if found else "refused"
        rows.append(row)
    return rows


def write_report(options: argparse.Namespace) -> None:
    lines, environment = read_results(options.runs)
    if not lines:
        raise SystemExit(f"conversion_steps.py: {options.runs} holds no results")
    seeds = sorted({each.seed for each in lines})
    needed = {f"seed {seed}": steps_needed(lines, seed) for seed in seeds}
    plain, first = convert_plain(), convert_stage_one()
    facts = {
        name: "not reached" if steps is None else f"reached after {steps:,} steps" for name, steps in needed.items()
    }
    facts |= {
        "the plain model": f"{plain.max_steps:,} steps of {plain.batch_size} pictures, {plain.model.num_layers} "
        f"blocks; then stage one, {first.max_steps:,} steps of the long skips alone, and stage two, a constant rate of "
        f"{convert_stage_two().learning_rate:g}",
        "loss": "of the averaged weights, over the same 512 pictures of the training data, noise and timesteps",
        "caches": "50 steps, guidance 2, PSNR to the full run of the same model; ± is the spread over seeds",
    }
    parts = [listed(facts), table(loss_rows(lines)), table(cache_rows(lines))]
    with output_folder(options.report, "bench") as out:
        data = {"lines": [asdict(each) for each in lines], "steps_needed": needed}
        title = "Conversion: steps until the plain model's loss"
        report = Report(config={"seeds": seeds}, environment=environment, data=data, title=title, parts=parts)
        report.write(out, "conversion_steps")
    print(f"written: {options.report / 'conversion_steps.md'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="of the trainings; none: the report alone")
    parser.add_argument("--every", type=int, default=200, help="steps of a leg of stage two")
    parser.add_argument("--most", type=int, default=4000, help="steps of stage two at most")
    parser.add_argument("--num-samples", type=int, default=64, help="pictures of a cached run")
    parser.add_argument("--scale", type=float, default=1.0, help="shorten the plain model and stage one, for a trial")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/conversion"), help="folder of trainings and results")
    parser.add_argument("--report", type=Path, default=None, help="folder of the table; none by default")
    options = parser.parse_args(arguments)
    if not (options.seeds or options.report):
        parser.error("give --seeds, or --report alone")
    warnings.filterwarnings("ignore", message="cache .* in a run of")
    options.runs.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(options.device, 0)
    for seed in options.seeds:
        for line in Conversion(seed, options).run():
            append_line(options.runs / RESULTS, asdict(line) | {"environment": environment})
            print(f"seed {line.seed} {line.model} {line.cache or line.steps}: {line.value:.4f}", flush=True)
    if options.report is not None:
        write_report(options)


if __name__ == "__main__":
    main()
