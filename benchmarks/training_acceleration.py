"""Trains one small model several ways for the same FLOPs, and compares the loss on pictures that none of them has seen.

    python benchmarks/training_acceleration.py --out runs/acceleration --cifar10 DATA --seeds 0 1 2
    python benchmarks/training_acceleration.py --out runs/acceleration --report benchmarks

Each arm is a model (plain, or with one form of long skips) x a way to train it (dense, or tokens routed past the deep
units): 32x32 pictures in 64 tokens, 12 blocks of width 128. The budget is the FLOPs of so many dense steps of the plain
model; the rate of each run falls over its own steps. Losses are those of the averaged weights on all tokens, with
noise and timesteps that are the same for every run. DATA is a folder with cifar10_train.parquet and
cifar10_test.parquet; without it only the bundled emoji are used. The command goes on where it was stopped: a run that
results.jsonl holds is not made again. `--cache` also measures the finished models under caches.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from skipdit.cache.enable import cached
from skipdit.data.pictures import DataConfig, LabelledPictures, open_pictures
from skipdit.diffusion import training_loss
from skipdit.environment import machine, versions
from skipdit.files.json_lines import append_line, read_lines
from skipdit.files.output import output_folder
from skipdit.loading import load_source
from skipdit.metrics.paired import PairedScore, psnr_db
from skipdit.models.long_skip import LongSkipConfig
from skipdit.plots import Lines, save_png
from skipdit.recipes import stability
from skipdit.report import table
from skipdit.tasks.training import TrainingTask
from skipdit.training import TrainConfig, list_checkpoints, train
from skipdit.training.batches import Batch, find_step_kinds
from skipdit.training.config import RoutingMode, TokenRoutingConfig

NUM_HELD_OUT, NUM_DRAWS, NUM_POINTS = 160, 4, 10
CPU = torch.device("cpu")
TRAINED, HELD_OUT = "cifar10_train.parquet", "cifar10_test.parquet"

# ------------------------------------------------------------------------------------------------------------ the arms

ALL, RESIDUAL = LongSkipConfig(), LongSkipConfig(fusion="residual")
MODELS = {
    "plain": None,
    "long skips (replace)": ALL,
    "long skips (residual)": RESIDUAL,
    "two outermost long skips (replace)": replace(ALL, num_pairs=2),
}
WAYS: dict[str, RoutingMode] = {"dense": "off", "bypass": "bypass", "fill": "fill"}


@dataclass(frozen=True)
class Arm:
    long_skip: LongSkipConfig | None
    mode: RoutingMode


def list_arms() -> dict[str, Arm]:
    """Every model in every way; a plain model has nothing that could bring back what fill hides."""
    arms = {}
    for model, long_skip in MODELS.items():
        for way, mode in WAYS.items():
            if mode == "fill" and long_skip is not None:
                arms[f"{model}, {way}"] = Arm(replace(long_skip, fill_token=True), mode)
            elif mode != "fill":
                arms[f"{model}, {way}"] = Arm(long_skip, mode)
    return arms


ARMS = list_arms()
BASELINE = "plain, dense"

# ------------------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True)
class Pictures:
    """One data set: what to learn, and what is held out."""

    name: str
    train: DataConfig
    held_out: DataConfig


def split_emoji(folder: Path) -> Pictures:
    """Write the emoji to learn and those that are held out as parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("skipdit") / "assets" / "emoji" / "fluent_emoji_64.parquet") as path:
        table = pq.read_table(path, columns=["image", "subgroup"])
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0)).tolist()
    paths = folder / "train.parquet", folder / "held_out.parquet"
    for path, rows in zip(paths, (order[NUM_HELD_OUT:], order[:NUM_HELD_OUT]), strict=True):
        pq.write_table(table.take(sorted(rows)), path)
    train, held_out = (DataConfig(source=str(path), image_size=32, label_column="subgroup") for path in paths)
    return Pictures("emoji", train, held_out)


def find_cifar10(folder: Path) -> Pictures:
    for name in (TRAINED, HELD_OUT):
        if not (folder / name).is_file():
            raise SystemExit(f"--cifar10: {folder} holds no {name}")
    train, held_out = (DataConfig(source=str(folder / name), image_size=32) for name in (TRAINED, HELD_OUT))
    return Pictures("cifar10", train, held_out)


def draw_held_out(held_out: LabelledPictures, label_names: Sequence[str], config: TrainConfig) -> Batch:
    """Held-out pictures of the classes that are learned, several times, with fixed noise and evenly spread timesteps.

    Of more than `NUM_HELD_OUT` pictures the first `NUM_HELD_OUT * NUM_DRAWS` are taken, once each.
    """
    generator = torch.Generator().manual_seed(1)
    known = [index for index in range(len(held_out)) if held_out.label_names[held_out.labels[index]] in label_names]
    draws = NUM_DRAWS if len(known) <= NUM_HELD_OUT else 1
    known = known[: NUM_HELD_OUT * NUM_DRAWS]
    pixels = torch.stack([held_out[index][0] for index in known]).repeat(draws, 1, 1, 1)
    labels = torch.tensor([label_names.index(held_out.label_names[held_out.labels[index]]) for index in known])
    levels = torch.special.ndtri((torch.randperm(len(pixels), generator=generator) + 0.5) / len(pixels))
    objective = config.objective
    return Batch(
        x_start=pixels,
        noise=torch.randn(pixels.shape, generator=generator),
        timesteps=1000 * torch.sigmoid(objective.logit_mean + objective.logit_std * levels),
        conditions=labels.repeat(draws),
    )


# ------------------------------------------------------------------------------------------------------------ one run


@dataclass(frozen=True)
class Run:
    """One training. curve: share of the budget in FLOPs and held-out loss, at each of its checkpoints."""

    data: str
    arm: str
    seed: int
    dense_steps: int
    steps: int
    seconds: float
    cpu_seconds: float
    curve: list[tuple[float, float]]

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.data, self.arm, self.seed, self.dense_steps

    @property
    def final_loss(self) -> float:
        return self.curve[-1][1]

    def loss_at(self, share: float) -> float:
        """The loss after a share of the budget, between checkpoints on a straight line."""
        shares, losses = np.array(self.curve).T
        return float(np.interp(share, shares, losses))

    def budget_to_reach(self, loss: float) -> float | None:
        """Share of the budget after which the loss is first this low, between checkpoints on a straight line."""
        for (before, above), (after, below) in zip(self.curve, self.curve[1:], strict=False):
            if above > loss >= below:
                return before + (after - before) * (above - loss) / (above - below)
        return None


def make_config(arm: Arm, data: DataConfig, seed: int) -> TrainConfig:
    config = stability()
    return replace(
        config,
        data=data,
        model=replace(config.model, long_skip=arm.long_skip),
        routing=TokenRoutingConfig(mode=arm.mode),
        warmup_steps=40,
        ema_decay=0.99,
        precision="no",
        sample_every=0,
        seed=seed,
    )


def mean_flops(config: TrainConfig, items: LabelledPictures) -> float:
    """FLOPs of a training step, in the mean over its kinds of step."""
    return find_step_kinds(config.model.build(items, config.objective), config).mean_flops * config.batch_size


@torch.no_grad()
def loss_of(task: TrainingTask, config: TrainConfig, weights: dict[str, Tensor], batch: Batch) -> float:
    task.model.load_state_dict(weights, strict=False)  # tables of positions are no weights
    task.model.eval()
    labels: Any = batch.conditions
    losses = [
        training_loss(lambda noisy, t, part=part: task.predict(task.model, noisy, t, part[3]), config.objective,
                      *part[:3]).loss
        for part in zip(*(tensor.split(64) for tensor in (batch.x_start, batch.noise, batch.timesteps, labels)),
                        strict=True)
    ]  # fmt: skip
    return torch.cat(losses).mean().item()


class Trials:
    """The runs of one data set."""

    def __init__(self, pictures: Pictures, out: Path, dense_steps: int) -> None:
        self.pictures, self.out, self.dense_steps = pictures, out, dense_steps
        self.items = open_pictures(pictures.train)
        baseline = make_config(ARMS[BASELINE], pictures.train, 0)
        self.batch = draw_held_out(open_pictures(pictures.held_out), self.items.label_names, baseline)
        self.budget = mean_flops(baseline, self.items) * dense_steps

    def folder(self, arm: str, seed: int) -> Path:
        return self.out / self.pictures.name / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"

    def run(self, arm: str, seed: int) -> Run:
        config = make_config(ARMS[arm], self.pictures.train, seed)
        steps = round(self.budget / mean_flops(config, self.items))
        every = -(-steps // NUM_POINTS)
        config = replace(config, max_steps=steps, checkpoint_every=every, num_checkpoints=NUM_POINTS, log_every=every)
        out = self.folder(arm, seed)
        started, cpu = time.perf_counter(), time.process_time()
        train(config, out, device="cpu", resume=False, overwrite=True)  # its seconds are those of a whole run
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        task = config.model.build(self.items, config.objective)
        checkpoints = list_checkpoints(out)
        curve = [
            (entry["flops"] / self.budget, loss_of(task, config, load_file(path / "ema.safetensors"), self.batch))
            for path, entry in zip(checkpoints, log, strict=True)
        ]
        for path in checkpoints[:-1]:
            shutil.rmtree(path)
        return Run(self.pictures.name, arm, seed, self.dense_steps, steps, seconds, cpu_seconds, curve)


def read_runs(path: Path) -> list[Run]:
    return [Run(**{**row, "curve": [tuple(point) for point in row["curve"]]}) for row in read_lines(path)]


# ------------------------------------------------------------------------------------------------- quality under caches

CACHES = ("delta:N2", "N2", "delta-taylor:N2-o1", "auto:1.8-k1")  # N2 needs a long skip
NUM_SAMPLES, NUM_STEPS, GUIDANCE_SCALE = 16, 50, 2.0


@dataclass(frozen=True)
class CachedQuality:
    """PSNR in dB of a finished model's pictures under a cache, to its own without one. cache: or fewer steps."""

    data: str
    arm: str
    seed: int
    loss: float
    cache: str
    compute_ratio: float
    psnr: float
    psnr_std: float


def measure_cached(run: Run, folder: Path) -> list[CachedQuality]:
    """Sample the model of a run in full, with as few steps as a cache costs, and under each cache."""
    pipeline = load_source(str(folder), task="class-to-image").sampler.pipeline
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.randint(len(pipeline.id2label), (NUM_SAMPLES,), generator=torch.Generator().manual_seed(2)).tolist()

    def sample(steps: int = NUM_STEPS) -> Tensor:
        settings = {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": steps, "output_type": "pt"}
        return pipeline(labels, generator=torch.Generator().manual_seed(3), **settings).images.float()

    full, rows = sample(), []

    def add(name: str, ratio: float, pictures: Tensor) -> None:
        score = PairedScore.of(psnr_db(pictures, full))
        rows.append(CachedQuality(run.data, run.arm, run.seed, run.final_loss, name, ratio, score.mean, score.std))

    fewer = round(NUM_STEPS / 1.8)
    add(f"{fewer} steps", NUM_STEPS / fewer, sample(fewer))
    for name in CACHES:
        if name == "N2" and pipeline.transformer.config.long_skip is None:
            continue
        with cached(pipeline, name) as cache:
            pictures = sample()
            add(name, cache.summary().compute_ratio, pictures)
    return rows


# ----------------------------------------------------------------------------------------------------------- the report


def spread(values: Sequence[float], form: str) -> str:
    """Mean and, of several, the standard deviation."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form)}"


def share_to_reach(runs: Sequence[Run], baselines: dict[int, Run]) -> tuple[str, str]:
    """How much of the FLOPs and of the CPU seconds of dense plain runs it takes to get as low as they end, seed by
    seed. Within a run seconds are taken to go with FLOPs."""
    shares = [(run, run.budget_to_reach(baselines[run.seed].final_loss)) for run in runs if run.seed in baselines]
    reached = [(run, share) for run, share in shares if share is not None]
    if not shares:
        return "-", "-"
    if len(reached) < len(shares):
        count = f"reached by {len(reached)} of {len(shares)}"
        return count, count
    seconds = [share * run.cpu_seconds / baselines[run.seed].cpu_seconds for run, share in reached]
    return spread([100 * share for _, share in reached], ".0f") + "%", spread([100 * s for s in seconds], ".0f") + "%"


def table_of(runs: Sequence[Run]) -> str:
    baselines = {run.seed: run for run in runs if run.arm == BASELINE}
    records = []
    for arm in ARMS:
        rows = [run for run in runs if run.arm == arm]
        if not rows:
            continue
        flops, seconds = ("100%", "100%") if arm == BASELINE else share_to_reach(rows, baselines)
        records.append({
            "model, way": arm,
            "seeds": len(rows),
            "steps": rows[0].steps,
            "loss at 30%": spread([run.loss_at(0.3) for run in rows], ".4f"),
            "at 50%": spread([run.loss_at(0.5) for run in rows], ".4f"),
            "at the end": spread([run.final_loss for run in rows], ".4f"),
            "FLOPs to dense plain's": flops,
            "seconds to it": seconds,
        })  # fmt: skip
    return table(records)


def cached_table_of(rows: Sequence[CachedQuality]) -> str:
    names = list(dict.fromkeys(row.cache for row in rows))

    def cell(rows: Sequence[CachedQuality]) -> str:
        if not rows:
            return "-"
        return f"{spread([row.psnr for row in rows], '.1f')} at {statistics.fmean(r.compute_ratio for r in rows):.2f}x"

    records = []
    for arm in ARMS:
        rows_of_arm = [row for row in rows if row.arm == arm]
        if not rows_of_arm:
            continue
        losses = list({row.seed: row.loss for row in rows_of_arm}.values())
        cells = {name: cell([row for row in rows_of_arm if row.cache == name]) for name in names}
        records.append({"model, way": arm, "seeds": len(losses), "loss": spread(losses, ".4f"), **cells})
    return table(records)


def curves_of(name: str, runs: Sequence[Run]) -> Lines:
    """Mean curves of the held-out loss against compute; routed ones solid, the dense one of a model dashed, in the
    color of its bypass."""
    series = {}
    for arm in (f"{model}, {way}" for model in MODELS for way in ("fill", "bypass", "dense")):
        rows = [run for run in runs if run.arm == arm]
        if rows:
            curves = np.mean([np.array(run.curve) for run in rows], axis=0)[1:]
            series[arm] = (100 * curves[:, 0], curves[:, 1])
    return Lines(
        name=f"training_acceleration_{name}",
        title=f"Held-out loss at equal compute: {name}",
        x_label="FLOPs, % of the budget",
        y_label="loss of the averaged weights",
        series=series,
        dashed=frozenset(arm for arm in series if arm.endswith("dense")),
    )


def write_report(runs: Sequence[Run], rows: Sequence[CachedQuality], folder: Path) -> None:
    """Write training_acceleration.md, .json and a picture per data set."""
    place = machine(CPU)
    about = ", ".join(f"{name} {number}" for name, number in versions().items())
    budget = sorted({run.dense_steps for run in runs})
    lines = [
        "# Training at equal compute",
        "",
        "`python benchmarks/training_acceleration.py --out runs/acceleration --cifar10 DATA --seeds 0 1 2 --cache`, "
        f"then the same with `--report benchmarks`. {place['name']}, one thread per run, float32; {about}.",
        "",
        f"The recipe `stability` (12 units of width 128, 64 tokens, batch 32, x-prediction) for the FLOPs of "
        f"{' or '.join(map(str, budget))} dense steps of the plain model. Routed: units 2 to 9 see a random quarter of "
        "the tokens, and none in 5% of the steps; the last fifth of the budget is dense. The loss is that of the "
        "averaged weights, on all tokens, on pictures that were not learned. Mean ± standard deviation over seeds. The "
        "last two columns: how much of the FLOPs and CPU seconds of the dense plain run it takes to reach its final "
        "loss, seed by seed.",
    ]
    with output_folder(folder, "report of training acceleration") as output:
        for name in dict.fromkeys(run.data for run in runs):
            of_data = [run for run in runs if run.data == name]
            figure = curves_of(name, of_data)
            save_png(figure, output)
            lines += ["", f"## {name}", "", table_of(of_data), "", f"![{figure.title}]({figure.name}.png)"]
            if of_cache := [row for row in rows if row.data == name]:
                lines += [
                    "",
                    f"Under a cache: PSNR in dB to the model's own {NUM_STEPS} steps, {NUM_SAMPLES} pictures, guidance "
                    f"{GUIDANCE_SCALE:g}, and FLOPs of the full run over those of the row.",
                    "",
                    cached_table_of(of_cache),
                ]
        found = {"runs": [asdict(run) for run in runs], "cached": [asdict(row) for row in rows], "machine": place,
                 "versions": versions()}  # fmt: skip
        output.write_text("training_acceleration.md", "\n".join(lines) + "\n")
        output.write_text("training_acceleration.json", json.dumps(found, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/acceleration"), help="folder of the runs and results")
    parser.add_argument("--cifar10", type=Path, help="folder of the CIFAR-10 parquet files")
    parser.add_argument("--dense-steps", type=int, default=300, help="of the plain model, whose FLOPs are the budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights, pictures and noise")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what is trained")
    parser.add_argument("--cache", action="store_true", help="also measure the finished models under caches")
    parser.add_argument("--report", type=Path, help="train nothing, write what was measured to this folder")
    options = parser.parse_args()
    results, cached_results = options.out / "results.jsonl", options.out / "cached.jsonl"
    cached_rows = [CachedQuality(**line) for line in read_lines(cached_results)]
    if options.report is not None:
        write_report(read_runs(results), cached_rows, options.report)
        return
    sets = [split_emoji(options.out / "data")] + ([find_cifar10(options.cifar10)] if options.cifar10 else [])
    trials = [Trials(pictures, options.out, options.dense_steps) for pictures in sets]
    for seed in options.seeds:
        for trial in trials:
            for arm in options.arms:
                key = trial.pictures.name, arm, seed, options.dense_steps
                run = next((run for run in read_runs(results) if run.key == key), None)
                if run is None:
                    run = trial.run(arm, seed)
                    append_line(results, run)
                    curve = " ".join(f"{share:.2f}:{loss:.4f}" for share, loss in run.curve)
                    print(f"{run.data}, {arm}, seed {seed}: {run.steps} steps, {run.cpu_seconds:.0f} s of CPU: {curve}",
                          flush=True)  # fmt: skip
                measured = {(row.data, row.arm, row.seed) for row in cached_rows}
                if options.cache and key[:3] not in measured:
                    for row in measure_cached(run, trial.folder(arm, seed)):
                        cached_rows.append(row)
                        append_line(cached_results, row)
                        print(row, flush=True)


if __name__ == "__main__":
    main()
