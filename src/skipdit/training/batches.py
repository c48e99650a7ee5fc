"""Prepare the input of a step: pictures or clips with conditions, noise and timesteps, each drawn from (seed, step)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from skipdit.data.pictures import Draws, as_floats
from skipdit.diffusion import Objective, device_tables, sample_timesteps, training_loss
from skipdit.models.forward_plan import PLAIN, ForwardPlan
from skipdit.models.routing import kept_tokens
from skipdit.tasks.training import TrainingTask
from skipdit.text import PromptStates
from skipdit.training.config import TrainConfig
from skipdit.training.routing import StepKind, StepKinds, draw_kept_tokens, make_plans

BATCH, KIND = 0, 4098  # purposes of a step's generators: everything its batch needs; its kind of step


def step_generator(config: TrainConfig, what: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the random generator of one step, on a device; it is the same in all processes. what: `BATCH` or `KIND`.

    Devices of one type draw the same numbers; a CPU draws other numbers than a GPU.
    """
    return torch.Generator(device).manual_seed((config.seed * 1_000_003 + step) * 4099 + what)


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """The items of a batch that a process gets at a time from `load_batches`: every `num_processes`-th item, in
    `num_parts` consecutive parts."""

    rank: int = 0
    num_processes: int = 1
    part: int = 0
    num_parts: int = 1

    def draws(self, generator: torch.Generator, num_items: int) -> Draws:
        """Return the draws of this share of `num_items` items. generator: a new one for the whole batch."""
        begin, end = (part * num_items * self.num_processes for part in (self.part, self.part + 1))
        rows = slice(self.rank + begin, end, self.num_processes)
        return Draws(generator, num_items * self.num_processes * self.num_parts, rows)


WHOLE_BATCH = BatchShare()


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass in training."""

    x_start: Tensor
    """(b c h w) or (b f c h w) in [-1, 1]"""
    noise: Tensor
    """standard normal, in the shape of `x_start`"""
    timesteps: Tensor
    """(b)"""
    conditions: Tensor | PromptStates
    """as the task draws them, some of them dropped"""
    kept: Tensor | None = None
    """(b k) or (1 k), indices of the tokens that deep units see; `None` if these see all tokens, or none"""


def prepare_batch(
    pixels: Tensor,
    labels: Tensor,
    config: TrainConfig,
    task: TrainingTask,
    generator: torch.Generator,
    device: torch.device,
    kept_share: float | None = None,
    share: BatchShare = WHOLE_BATCH,
) -> Batch:
    """Prepare stored pictures or clips for a step, and draw everything random on the generator's device.

    kept_share: share of the tokens that deep units see; `None` if they see all. share: which items of the batch these
    are.
    """
    draws = share.draws(generator, len(pixels))
    pixels, labels = as_floats(pixels.to(device, non_blocking=True)), labels.to(device, non_blocking=True)

    pixels = task.items.draw(pixels, config.flip, draws)
    conditions = task.draw_conditions(labels, config.label_dropout, draws)
    noise = draws.randn(*pixels.shape[1:]).to(device, non_blocking=True)
    timesteps = sample_timesteps(config.objective, draws.size, generator)[draws.rows].to(device, non_blocking=True)
    kept = None
    if kept_share is not None:
        num_draws, rows = (1, slice(None)) if task.model.shares_tokens else (draws.size, draws.rows)
        kept = draw_kept_tokens(num_draws, task.num_tokens, kept_share, generator)[rows]
        kept = kept.to(device, non_blocking=True)
    return Batch(x_start=pixels, noise=noise, timesteps=timesteps, conditions=conditions, kept=kept)


def batch_loss(
    task: TrainingTask, model: nn.Module, objective: Objective, batch: Batch, plan: ForwardPlan = PLAIN
) -> Tensor:
    """Return the mean loss of a batch under a plan that may route tokens."""
    stored = None if batch.kept is None else kept_tokens(batch.kept)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return task.predict(model, noisy, timesteps, batch.conditions, plan=plan, stored=stored)

    return training_loss(predict, objective, batch.x_start, batch.noise, batch.timesteps).loss.mean()


def find_step_kinds(task: TrainingTask, config: TrainConfig) -> StepKinds:
    """Return the kinds of steps in a run, with the FLOPs of one sample in each, counted on the device of the model."""
    device = next(task.model.parameters()).device
    task.prepare(device)
    device_tables(device)  # otherwise they would be made below, as tensors without memory
    plans = make_plans(config.routing, task.model)
    flops: dict[StepKind, int] = {kind: _sample_flops(task, config, kind, plans[kind], device) for kind in plans}
    return StepKinds(config.routing, plans, flops)


def _sample_flops(
    task: TrainingTask, config: TrainConfig, kind: StepKind, plan: ForwardPlan, device: torch.device
) -> int:
    """Return the FLOPs of one sample, forward and backward, counted on tensors without memory, so that nothing runs.

    Attention counts as two products forward and four backward, whichever kernel computes it. Recomputation by gradient
    checkpointing, and work that does not grow with the batch (spectral constraints), are not counted.
    """
    pixels, labels = default_collate([task.data[0]])
    share = config.routing.share if kind == "routed" else None
    batch = prepare_batch(pixels, labels, config, task, step_generator(config, BATCH, 0), device, share)
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # private to torch; a test compares the count with real steps
    with fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.autograd.grad(batch_loss(task, task.model, config.objective, batch, plan), parameters, allow_unused=True)
    return counter.get_total_flops()
