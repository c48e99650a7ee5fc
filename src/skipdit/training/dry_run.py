"""Plan a run: its model and its cost, without its data and without memory for its model."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from skipdit.checkpoints import load_model
from skipdit.data.latents import LatentConfig, PlannedLatents
from skipdit.files.untrusted import printable_path
from skipdit.models.surgery import add_fill_token
from skipdit.tasks.config import FRESH
from skipdit.tasks.training import open_items
from skipdit.training.batches import find_step_kinds
from skipdit.training.config import TrainConfig
from skipdit.training.learner import freeze_all_but_long_skips
from skipdit.training.routing import StepKind


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The model and the cost of a run."""

    model: str
    num_parameters: int
    num_trained: int
    """number of trained parameters"""
    num_units: int
    num_long_skips: int
    num_tokens: int
    """per picture or frame"""
    batch_size: int
    max_steps: int
    flops: dict[StepKind, int]
    """of one sample, forward and backward, by kind of step"""
    run_flops: float
    """of all steps"""
    state_bytes: int
    """of weights, gradients, both moments and the average, in float32"""

    def text(self) -> str:
        """Return a summary in a few lines."""
        trained = "" if self.num_trained == self.num_parameters else f", of which {self.num_trained:,} are trained"
        steps = [f"{kind} {self.batch_size * flops / 1e12:.4g}" for kind, flops in self.flops.items()]
        return "\n".join(
            (
                f"{self.model}: {self.num_parameters:,} parameters{trained}, {self.num_units} units, "
                f"{self.num_long_skips} long skips, {self.num_tokens} tokens per picture or frame",
                f"one step of {self.batch_size}, forward and backward, in TFLOP: {', '.join(steps)}",
                f"{self.max_steps:,} steps: {self.run_flops / 1e18:.4g} EFLOP",
                f"weights, gradients, moments and average: {self.state_bytes / 2**30:.4g} GiB in float32",
            )
        )


def plan_run(config: TrainConfig) -> RunPlan:
    """Build a run's model without memory, and count the FLOPs of its steps.

    Latents are not opened: the config must have their sizes. Other data is opened. `ValueError` if a size is missing:
    of the latents, or of the model if `start_from` does not exist.
    """
    data = config.data
    items = PlannedLatents(data) if type(data) is LatentConfig else open_items(data)
    model_config = config.model
    if getattr(model_config, "inflate", None) is not None:
        model_config = replace(model_config, inflate=None)  # it changes weights, but no sizes
    start = None
    if config.start_from is not None:
        if Path(config.start_from).exists():
            start = load_model(config.start_from)
        elif missing := [name for name in FRESH if getattr(model_config, name) is None]:
            raise ValueError(
                f"the model to start from, {printable_path(config.start_from)}, is missing: a dry run needs it, or "
                f"model.{missing[0]}"
            )
    with torch.device("meta"):
        task = model_config.build(items, config.objective, start)
        if config.routing.mode == "fill":
            add_fill_token(task.model)
    if config.stage == "long-skips-only":
        freeze_all_but_long_skips(task.model)
    kinds = find_step_kinds(task, config)
    links = task.model.long_skip_links
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in task.model.parameters()]
    num_parameters, num_trained = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
    return RunPlan(
        model=type(task.model).__name__,
        num_parameters=num_parameters,
        num_trained=num_trained,
        num_units=links.num_units,
        num_long_skips=len(links.sources),
        num_tokens=task.num_tokens,
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        flops=dict(kinds.flops),
        run_flops=kinds.mean_flops * config.batch_size * config.max_steps,
        state_bytes=4 * (2 * num_parameters + 3 * num_trained),
    )
