"""Trains pairs of models for `claims.py` and `skip_or_schedule.py`: a plain one, and one with long skips.

    python benchmarks/train_pairs.py pictures clips --seeds 0 1 --device cuda --out runs/pairs

`pictures` are DiTs of 24 blocks on the bundled emoji, `clips` are Lattes of 32 blocks on the animated ones; two
outermost long skips make the difference. Tokens are routed past the deep units for the first half of the FLOPs. A
command that was stopped goes on from the last checkpoint. Each model is a run `KIND-DATA-SEED`, which can be sampled.

One model at a time: on an H100, six processes side by side made 35 steps per second in all, fewer than one process
alone at a batch of 32 (85).
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from skipdit import recipes
from skipdit.environment import check_device
from skipdit.models.pairing import LongSkipConfig
from skipdit.tasks.config import ModelConfig, VideoModelConfig
from skipdit.training.config import TokenRoutingConfig, TrainConfig

OUTERMOST = LongSkipConfig(num_pairs=2)  # they cost least in training (benchmarks/training_acceleration.md)
BASES = {
    "pictures": replace(
        recipes.emoji(),
        model=ModelConfig(num_layers=24, num_attention_heads=4, attention_head_dim=40, patch_size=8),
        max_steps=2713,
        batch_size=256,
    ),
    "clips": replace(
        recipes.emoji_clips(),
        model=VideoModelConfig(num_layers=32, num_attention_heads=4, attention_head_dim=32, patch_size=8),
        max_steps=1594,
        batch_size=32,
    ),
}
KINDS = {"skip": OUTERMOST, "plain": None}


def config_of(kind: str, data: str, seed: int, steps: int | None = None, batch_size: int | None = None) -> TrainConfig:
    """Return the settings of a run."""
    base = BASES[data]
    steps = steps or base.max_steps
    return replace(
        base,
        model=replace(base.model, long_skip=KINDS[kind]),
        routing=TokenRoutingConfig(mode="bypass", dense_end=0.5),
        max_steps=steps,
        batch_size=batch_size or base.batch_size,
        learning_rate=1e-3,
        warmup_steps=300,
        ema_decay=0.999,
        sample_every=steps,
        checkpoint_every=max(1, steps // 2),
        log_every=20,
        seed=seed,
    )


def is_trained(config: TrainConfig, folder: Path) -> bool:
    """Return whether a run is finished. `SystemExit` where it had other steps or another batch."""
    if not (folder / "pipeline").exists():
        return False
    made = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("max_steps", "batch_size"):
        if made[name] != (asked := getattr(config, name)):
            raise SystemExit(
                f"train_pairs.py: {folder} was trained with {name} {made[name]}, not {asked}: give another --out"
            )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", choices=BASES, help="what the models draw")
    parser.add_argument("--out", type=Path, default=Path("runs/pairs"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a pair for each")
    parser.add_argument("--steps", type=int, help="of each run, instead of 2,713 and 1,594")
    parser.add_argument("--batch-size", type=int, help="instead of 256 pictures and 32 clips")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    check_device(arguments.device)
    from skipdit.training import train

    for data in arguments.data:
        for seed in arguments.seeds:
            for kind in KINDS:
                folder = arguments.out / f"{kind}-{data}-{seed}"
                config = config_of(kind, data, seed, arguments.steps, arguments.batch_size)
                if not is_trained(config, folder):
                    print(folder)
                    train(config, folder, device=arguments.device)


if __name__ == "__main__":
    main()
