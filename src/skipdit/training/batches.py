"""What a step is fed with: pictures or clips with labels, noise and timesteps, each drawn from (seed, step)."""

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

BATCH, KIND = 0, 4098  # what a step draws: all that its batch needs; which kind of step it is


def step_generator(config: TrainConfig, what: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the source, on a device, of what is random in one step, the same in all processes. what: `BATCH` or
    `KIND`. Devices of one kind draw the same numbers, a CPU others than a GPU."""
    return torch.Generator(device).manual_seed((config.seed * 1_000_003 + step) * 4099 + what)


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """The items of a batch that a process takes at a time, as `load_batches` hands them out: every `num_processes`-th,
    in `num_parts` parts one after the other."""

    rank: int = 0
    num_processes: int = 1
    part: int = 0
    num_parts: int = 1

    def draws(self, generator: torch.Generator, num_items: int) -> Draws:
        """Return what draws for this share, of so many items. generator: new, that of the whole batch."""
        begin, end = (part * num_items * self.num_processes for part in (self.part, self.part + 1))
        rows = slice(self.rank + begin, end, self.num_processes)
        return Draws(generator, num_items * self.num_processes * self.num_parts, rows)


WHOLE_BATCH = BatchShare()


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
    share: BatchShare = WHOLE_BATCH,
) -> Batch:
    """Draw what one step adds to its pictures or clips, as they are stored, on the generator's device.

    kept_share: of the tokens that deep units see, where they do not see all. share: which items of the batch these are.
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


def find_step_kinds(task: TrainingTask, config: TrainConfig, device: torch.device) -> StepKinds:
    """Return what the steps of a run do with their tokens, and count what one sample costs in each."""
    task.prepare(device)
    device_tables(device)  # else made below, of tensors without memory
    plans = make_plans(config.routing, task.model)
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
    batch = prepare_batch(pixels, labels, config, task, step_generator(config, BATCH, 0), device, share)
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # private to torch; a test holds the count to that of real steps
    with fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.autograd.grad(batch_loss(task, task.model, config.objective, batch, plan), trained, allow_unused=True)
    return counter.get_total_flops()
