"""`skipdit train`: a training run by a named recipe."""

import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from skipdit.command_options import config_of, parse
from skipdit.options import choose

if TYPE_CHECKING:
    from skipdit.training.config import TrainConfig

# the box in which the help lists an option; data, model, objective, routing and spectral have their own
GROUPS = {
    "run": ("out", "resume", "allow_changes", "overwrite", "dry_run", "device", "seed"),
    "length": ("max_steps", "batch_size", "num_accumulation_steps", "start_from", "stage"),
    "optimizer": (
        "learning_rate", "rate_schedule", "warmup_steps", "weight_decay", "adam_betas", "gradient_clip",
        "gradient_guard", "ema_decay", "ema_snapshots_every",
    ),
    "batches": ("label_dropout", "flip", "data_on_device", "num_workers"),
    "machine": ("precision", "parallel", "gradient_checkpointing", "compile"),
    "log": (
        "log_every", "tensorboard", "sample_every", "num_samples", "num_inference_steps", "sample_guidance_scale",
        "checkpoint_every", "num_checkpoints", "release_dtype",
    ),
}  # fmt: skip


def train(arguments: Sequence[str]) -> None:
    """Train a named recipe, in which every setting can be changed; continues from the last checkpoint in --out.

    The folder --out then holds the finished pipeline with the averaged weights (pipeline/), the settings (config.json),
    a log (log.jsonl), grids of samples and the last checkpoints.

    Exit status 130, 143 or 129: Ctrl-C, SIGTERM or SIGHUP ended the run early; the same command continues it.

    Example: skipdit train emoji --max-steps 20 --out runs/try
    Example: torchrun --nproc-per-node 8 -m skipdit train dit-xl --out runs/dit-xl
    """
    from skipdit.recipes import RECIPES
    from skipdit.training.config import TrainConfig

    recipes = "\n".join(f"  {name}: {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items())
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: skipdit train RECIPE [OPTIONS]\n\n{inspect.cleandoc(train.__doc__ or '')}\n")
        print(f"Recipes (`skipdit train RECIPE --help` lists the options):\n{recipes}")
        return
    if not arguments:
        raise ValueError(f"give a recipe, one of {', '.join(RECIPES)}; `skipdit train --help` explains them")
    name = choose("the recipe", arguments[0], RECIPES)

    @dataclass(frozen=True, kw_only=True)
    class Options(TrainConfig):
        """A training run and where it goes."""

        GROUPS: ClassVar = GROUPS
        out: Path = Path("runs") / name
        """folder of the run"""
        resume: bool = True
        """continue from the last checkpoint in the folder; --no-resume starts again, and the old ones stay in
        previous-run/ until a new one is due"""
        allow_changes: bool = False
        """continue with settings that differ from the checkpoint's, where possible (rate, clip, precision, ...)"""
        overwrite: bool = False
        """replace files in --out that skipdit did not write; a warning names each"""
        device: str = "auto"
        """cpu, cuda, or auto: a GPU if there is one"""
        dry_run: bool = False
        """only build the model, without memory, and print the cost of its steps; needs no latents"""

    options = parse(f"train {name}", train.__doc__, arguments[1:], Options, Options(**vars(RECIPES[name]())))
    config = config_of(options, TrainConfig)
    if options.dry_run:
        from skipdit.training.dry_run import plan_run

        print(plan_run(config).text())
        return
    ways = {name: getattr(options, name) for name in ("resume", "device", "overwrite", "allow_changes")}
    _train(config, options.out, **ways)


def _train(config: "TrainConfig", out: Path, **ways: Any) -> None:
    from skipdit.process_group import leave_group
    from skipdit.training.loop import train as run
    from skipdit.training.stopping import Stopped

    is_main = os.environ.get("RANK", "0") == "0"  # torchrun starts this once per process
    try:
        folder = run(config, out, **ways)
    except Stopped as stopped:
        if is_main:
            print(f"skipdit: {stopped}", file=sys.stderr)
        sys.exit(stopped.status)
    leave_group()
    if is_main:
        print(f"trained: skipdit sample --model {folder}")
