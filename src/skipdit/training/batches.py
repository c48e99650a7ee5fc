"""What a step is fed with: pictures or clips with labels, noise and timesteps, each drawn from (seed, rank, step)."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from skipdit.data import as_floats
from skipdit.diffusion import Objective, device_tables, sample_timesteps, training_loss
from skipdit.models.forward_plan import PLAIN, ForwardPlan
from skipdit.models.long_skip import LongSkipModel
from skipdit.models.routing import kept_tokens
from skipdit.tasks.training import TrainingTask
from skipdit.text import PromptStates
from skipdit.training.config import TrainConfig
from skipdit.training.routing import StepKind, StepKinds, draw_kept_tokens, make_plans

ALL_RANKS = 4098  # no process has it


def step_generator(config: TrainConfig, rank: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the source, on a device, of all that is random in one step of one process; of `ALL_RANKS`, of what
    processes share. Devices of one kind draw the same numbers, a CPU others than a GPU."""
    return torch.Generator(device).manual_seed((config.seed * 1_000_003 + step) * 4099 + rank)


@dataclass(frozen=True)
class Batch:
    """x_start (b c h w) or (b f c h w) in [-1, 1], noise of its shape, timesteps (b), conditions: as the task draws
    them, some left out. kept (b k) or (1 k): the tokens that deep units see; `None` where they see all, or none."""

    x_start: Tensor
    noise: Tensor
    timesteps: Tensor
    conditions: Tensor | PromptStates
    kept: Tensor | None = None


def prepare_batch(
    pixels: Tensor,
    labels: Tensor,
    config: TrainConfig,
    task: TrainingTask,
    generator: torch.Generator,
    device: torch.device,
    kept_share: float | None = None,
) -> Batch:
    """Draw what one step adds to its pictures or clips, as they are stored, on the generator's device.

    kept_share: of the tokens that deep units see, where they do not see all.
    """
    at, size = generator.device, len(pixels)
    pixels, labels = as_floats(pixels.to(device, non_blocking=True)), labels.to(device, non_blocking=True)

    pixels = task.items.draw(pixels, config.flip, generator)
    conditions = task.draw_conditions(labels, config.label_dropout, generator)
    noise = torch.randn(pixels.shape, generator=generator, device=at).to(device, non_blocking=True)
    timesteps = sample_timesteps(config.objective, size, generator).to(device, non_blocking=True)
    kept = None
    if kept_share is not None:
        num_draws = 1 if task.model.shares_tokens else size
        kept = draw_kept_tokens(num_draws, task.num_tokens, kept_share, generator).to(device, non_blocking=True)
    return Batch(x_start=pixels, noise=noise, timesteps=timesteps, conditions=conditions, kept=kept)


def batch_loss(
    task: TrainingTask, model: nn.Module, objective: Objective, batch: Batch, plan: ForwardPlan = PLAIN
) -> Tensor:
    """Return the mean loss of a batch under a plan that may route tokens."""
    stored = None if batch.kept is None else kept_tokens(batch.kept)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return task.predict(model, noisy, timesteps, batch.conditions, plan=plan, stored=stored)

    return training_loss(predict, objective, batch.x_start, batch.noise, batch.timesteps).loss.mean()


def find_step_kinds(task: TrainingTask, config: TrainConfig, device: torch.device) -> StepKinds:
    """Return what the steps of a run do with their tokens, and count what one sample costs in each."""
    task.prepare(device)
    device_tables(device)  # else made below, of tensors without memory
    plans = make_plans(config.routing, cast(LongSkipModel, task.model))
    flops: dict[StepKind, int] = {kind: _sample_flops(task, config, kind, plans[kind], device) for kind in plans}
    return StepKinds(config.routing, plans, flops)


def _sample_flops(
    task: TrainingTask, config: TrainConfig, kind: StepKind, plan: ForwardPlan, device: torch.device
) -> int:
    """Forward and backward, on tensors that have shapes and no memory, so that nothing is computed.

    Attention counts as two products forward and four backward, whichever kernel computes it; what gradient
    checkpointing computes again and what does not grow with the batch (spectral constraints) do not count.
    """
    pixels, labels = default_collate([task.data[0]])
    share = config.routing.share if kind == "routed" else None
    batch = prepare_batch(pixels, labels, config, task, step_generator(config, ALL_RANKS, 0), device, share)
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # private to torch; a test holds the count to that of real steps
    with fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.autograd.grad(batch_loss(task, task.model, config.objective, batch, plan), trained, allow_unused=True)
    return counter.get_total_flops()
