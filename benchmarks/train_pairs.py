"""Trains pairs of models for `claims.py` and `skip_or_schedule.py`, a plain one and one with long skips, side by side.

    python benchmarks/train_pairs.py pictures clips --seeds 0 1 --device cuda --out runs/pairs

`pictures` are DiTs of 24 blocks on the bundled emoji, `clips` are Lattes of 32 blocks on the animated ones; two
outermost long skips make the difference. Tokens are routed past the deep units for the first half of the FLOPs. Each
run is a process of its own; its output is in `NAME.log`, and a command that was stopped goes on from the last
checkpoints. With `--seconds`, runs that are late are stopped after that time, and their averaged weights are released
as they are.

On one H100, six or eight such processes make about 35 steps per second in all, whatever they train: small models wait
for the switch between processes. 2,700 steps of the pictures and 1,600 of the clips took 346 seconds beside two models
with prompts.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

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
        max_steps=2700,
        batch_size=256,
    ),
    "clips": replace(
        recipes.emoji_clips(),
        model=VideoModelConfig(num_layers=32, num_attention_heads=4, attention_head_dim=32, patch_size=8),
        max_steps=1600,
        batch_size=32,
    ),
}
KINDS = {"skip": OUTERMOST, "plain": None}
SAVING = 60  # seconds for a stopped run to save its weights, and for a process to release them
SHOWN_EVERY = 15  # seconds


def config_of(kind: str, data: str, seed: int, steps: int | None, batch_size: int | None) -> TrainConfig:
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


def work(arguments: argparse.Namespace, name: str) -> None:
    """Train one model in this process."""
    from skipdit.training import train
    from skipdit.training.stopping import Stopped

    kind, data, seed = name.split("-")
    config = config_of(kind, data, int(seed), arguments.steps, arguments.batch_size)
    try:
        train(config, arguments.out / name, device=arguments.device, allow_changes=True)
    except Stopped as stopped:
        print(stopped)


def start(arguments: argparse.Namespace, name: str, steps: int | None) -> subprocess.Popen[bytes]:
    """Start the process of a run."""
    command = [sys.executable, __file__, *arguments.data, "--out", str(arguments.out), "--run", name]
    command += ["--device", arguments.device]
    for option, value in (("--steps", steps), ("--batch-size", arguments.batch_size)):
        command += [option, str(value)] if value else []
    with (arguments.out / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def last_line(folder: Path) -> dict[str, Any] | None:
    """Return the last whole line of a run's log."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1]) if whole else None


def show(arguments: argparse.Namespace, names: list[str], seconds: float) -> None:
    """Print where the runs are."""
    lines = {name: last_line(arguments.out / name) for name in names}
    parts = [f"{name} {line['step']} loss {line['loss']:.4f}" for name, line in lines.items() if line]
    print(f"{seconds:5.0f} s  " + "; ".join(parts), flush=True)


def run_all(arguments: argparse.Namespace) -> None:
    """Train all models, and release what was stopped."""
    names = [f"{kind}-{data}-{seed}" for data in arguments.data for seed in arguments.seeds for kind in KINDS]
    arguments.out.mkdir(parents=True, exist_ok=True)
    begun = shown = time.monotonic()
    processes = {name: start(arguments, name, arguments.steps) for name in names}
    while any(process.poll() is None for process in processes.values()):
        time.sleep(0.2)
        if time.monotonic() - shown > SHOWN_EVERY:
            shown = time.monotonic()
            show(arguments, names, shown - begun)
        if arguments.seconds and time.monotonic() - begun > arguments.seconds:
            break
    late = [name for name, process in processes.items() if process.poll() is None]
    for name in late:
        processes[name].send_signal(signal.SIGTERM)  # saves a checkpoint
    for name in late:
        processes[name].wait(SAVING)
        steps = max((int(path.name[11:]) for path in (arguments.out / name).glob("checkpoint-*")), default=None)
        if steps is not None:
            processes[name] = start(arguments, name, steps)  # nothing is left to train: it releases
            processes[name].wait(SAVING)
    show(arguments, names, time.monotonic() - begun)
    if failed := [name for name in names if not (arguments.out / name / "pipeline").exists()]:
        sys.exit(f"failed: {', '.join(failed)}; see their .log files in {arguments.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", choices=BASES, help="what the models draw")
    parser.add_argument("--out", type=Path, default=Path("runs/pairs"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a pair for each")
    parser.add_argument("--steps", type=int, help="of each run, instead of 2,700 and 1,600")
    parser.add_argument("--batch-size", type=int, help="instead of 256 pictures and 32 clips")
    parser.add_argument("--seconds", type=float, help="stop after this time; no limit by default")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return work(arguments, arguments.run)
    check_device(arguments.device)
    return run_all(arguments)


if __name__ == "__main__":
    main()
