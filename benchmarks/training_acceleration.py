"""Trains one small model several ways for the same FLOPs, and tells the loss on pictures that none of them has seen.

    python benchmarks/training_acceleration.py --out runs/acceleration --dense-steps 300

Each arm is {plain, long skips} x {dense, tokens routed past the deep units}: 32x32 emoji in 64 tokens, 12 blocks of
width 128, 160 pictures held out, with noise and timesteps that are the same for all. The budget is that of so many
dense steps of the plain model; each run's rate falls over its own steps. Losses are those of the averaged weights, on
all tokens, at each tenth of the budget.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from skipdit.data import DataConfig, LabelledPictures, open_pictures
from skipdit.diffusion import training_loss
from skipdit.models.long_skip import LongSkipConfig
from skipdit.recipes import stability
from skipdit.tasks.training import TrainingTask
from skipdit.training import TrainConfig, list_checkpoints, train
from skipdit.training.batches import Batch, find_step_kinds
from skipdit.training.routing import RoutingMode, TokenRoutingConfig

NUM_HELD_OUT, NUM_DRAWS, NUM_POINTS = 160, 4, 10
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Arm:
    long_skip: LongSkipConfig | None
    mode: RoutingMode
    deep_drop: float = 0.05


ALL, RESIDUAL = LongSkipConfig(), LongSkipConfig(fusion="residual")
OUTER, OUTER_RESIDUAL = (replace(each, num_pairs=2) for each in (ALL, RESIDUAL))

ARMS = {
    "plain, dense": Arm(None, "off"),
    "plain, bypass": Arm(None, "bypass"),
    "plain, bypass, no deep drop": Arm(None, "bypass", 0.0),
    "long skips (residual), bypass": Arm(RESIDUAL, "bypass"),
    "two outermost long skips (replace), bypass": Arm(OUTER, "bypass"),
    "two outermost long skips (residual), bypass": Arm(OUTER_RESIDUAL, "bypass"),
    "long skips (replace), dense": Arm(ALL, "off"),
    "long skips (replace), bypass": Arm(ALL, "bypass"),
    "long skips (replace), fill": Arm(replace(ALL, fill_token=True), "fill"),
    "long skips (residual), dense": Arm(RESIDUAL, "off"),
}


def split_emoji(folder: Path) -> tuple[Path, Path]:
    """Write the pictures to learn and those that are held out, as parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("skipdit") / "assets" / "emoji" / "fluent_emoji_64.parquet") as path:
        table = pq.read_table(path, columns=["image", "subgroup"])
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0)).tolist()
    paths = folder / "train.parquet", folder / "held_out.parquet"
    for path, rows in zip(paths, (order[NUM_HELD_OUT:], order[:NUM_HELD_OUT]), strict=True):
        pq.write_table(table.take(sorted(rows)), path)
    return paths


def data_config(path: Path) -> DataConfig:
    return DataConfig(source=str(path), image_size=32, label_column="subgroup")


def make_config(arm: Arm, data: Path, seed: int) -> TrainConfig:
    config = stability()
    return replace(
        config,
        data=data_config(data),
        model=replace(config.model, long_skip=arm.long_skip),
        routing=TokenRoutingConfig(mode=arm.mode, deep_drop=arm.deep_drop),
        warmup_steps=40,
        ema_decay=0.99,
        precision="no",
        sample_every=0,
        seed=seed,
    )


def mean_flops(config: TrainConfig, items: LabelledPictures) -> float:
    """Of a step of a run, in the mean."""
    return find_step_kinds(config.model.build(items, config.objective), config, CPU).mean_flops * config.batch_size


def draw_held_out(held_out: LabelledPictures, label_names: list[str], config: TrainConfig) -> Batch:
    """Every picture of a class that was learned, several times, with fixed noise and timesteps spread evenly."""
    generator = torch.Generator().manual_seed(1)
    known = [index for index in range(len(held_out)) if held_out.label_names[held_out.labels[index]] in label_names]
    pixels = torch.stack([held_out[index][0] for index in known]).repeat(NUM_DRAWS, 1, 1, 1)
    labels = torch.tensor([label_names.index(held_out.label_names[held_out.labels[index]]) for index in known])
    levels = torch.special.ndtri((torch.randperm(len(pixels), generator=generator) + 0.5) / len(pixels))
    objective = config.objective
    return Batch(
        x_start=pixels,
        noise=torch.randn(pixels.shape, generator=generator),
        timesteps=1000 * torch.sigmoid(objective.logit_mean + objective.logit_std * levels),
        conditions=labels.repeat(NUM_DRAWS),
    )


@torch.no_grad()
def loss_of(task: TrainingTask, config: TrainConfig, weights: dict[str, Tensor], batch: Batch) -> float:
    task.model.load_state_dict(weights, strict=False)  # tables of positions are no weights
    task.model.eval()
    labels: Any = batch.conditions
    losses = [
        training_loss(lambda noisy, t, part=part: task.predict(task.model, noisy, t, part[3]), config.objective,
                      *part[:3]).loss
        for part in zip(*(each.split(64) for each in (batch.x_start, batch.noise, batch.timesteps, labels)),
                        strict=True)
    ]  # fmt: skip
    return torch.cat(losses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/acceleration"), help="folder of the runs and results")
    parser.add_argument("--dense-steps", type=int, default=300, help="of the plain model, whose FLOPs are the budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights, pictures and noise")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what is trained")
    options = parser.parse_args()
    train_path, held_out_path = split_emoji(options.out / "data")
    items, held_out = open_pictures(data_config(train_path)), open_pictures(data_config(held_out_path))
    config = make_config(ARMS["plain, dense"], train_path, 0)
    batch = draw_held_out(held_out, items.label_names, config)
    budget = mean_flops(config, items) * options.dense_steps
    results = options.out / "results.jsonl"
    for seed in options.seeds:
        for name in options.arms:
            config = make_config(ARMS[name], train_path, seed)
            steps = round(budget / mean_flops(config, items))
            every = -(-steps // NUM_POINTS)
            config = replace(
                config, max_steps=steps, checkpoint_every=every, num_checkpoints=NUM_POINTS, log_every=every
            )
            out = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            started, cpu = time.perf_counter(), time.process_time()
            train(config, out, device="cpu")
            seconds = time.perf_counter() - started, time.process_time() - cpu
            log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            task = config.model.build(items, config.objective)
            curve = [
                (entry["flops"] / budget, loss_of(task, config, load_file(path / "ema.safetensors"), batch))
                for path, entry in zip(list_checkpoints(out), log, strict=True)
            ]
            row = {"arm": name, "seed": seed, "steps": steps, "seconds": seconds[0], "cpu_seconds": seconds[1],
                   "curve": curve}  # fmt: skip
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            told = " ".join(f"{share:.2f}:{loss:.4f}" for share, loss in curve)
            print(
                f"{name}, seed {seed}: {steps} steps, {seconds[0]:.0f} s ({seconds[1]:.0f} of CPU): {told}", flush=True
            )


if __name__ == "__main__":
    main()
