"""What a step is fed with: pictures or clips with labels, noise and timesteps, each drawn from (seed, rank, step)."""

from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode

from skipdit.data import ShuffledForever
from skipdit.diffusion import Objective, ddpm_tables, sample_timesteps, training_loss
from skipdit.models.forward_plan import PLAIN, ForwardPlan
from skipdit.models.long_skip import LongSkipModel
from skipdit.models.routing import kept_tokens
from skipdit.tasks import Trainee
from skipdit.training.config import TrainConfig
from skipdit.training.routing import StepKind, StepKinds, draw_kept_tokens, make_plans
from skipdit.training.stopping import ignore_signals

ALL_RANKS = 4098  # no process has it


def step_generator(config: TrainConfig, rank: int, step: int) -> torch.Generator:
    """Return the source of all that is random in one step of one process; of `ALL_RANKS`, of what processes share."""
    return torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 4099 + rank)


@dataclass(frozen=True)
class Batch:
    """x_start (b c h w) or (b f c h w) in [-1, 1], noise of its shape, timesteps (b), labels (b) or (b n): classes or
    captions, some of them null. kept (b k) or (1 k): the tokens that deep units see; `None` where they see all, or
    none."""

    x_start: Tensor
    noise: Tensor
    timesteps: Tensor
    labels: Tensor
    kept: Tensor | None = None


def prepare_batch(
    pixels: Tensor,
    labels: Tensor,
    config: TrainConfig,
    task: Trainee,
    generator: torch.Generator,
    device: torch.device,
    kept_share: float | None = None,
) -> Batch:
    """Draw what one step adds to its pictures or clips, on the CPU, so that every device sees the same numbers.

    kept_share: of the tokens that deep units see, where they do not see all.
    """
    size = len(pixels)
    pixels = task.items.draw(pixels, config.flip, generator)
    if task.num_variants > 1:
        labels = labels * task.num_variants + torch.randint(task.num_variants, (size,), generator=generator)
    dropped = torch.rand(size, generator=generator) < config.label_dropout
    batch = Batch(
        x_start=pixels,
        noise=torch.randn(pixels.shape, generator=generator),
        timesteps=sample_timesteps(config.objective, size, generator),
        labels=torch.where(dropped.view(-1, *[1] * (labels.ndim - 1)), task.null_label, labels),
        kept=None
        if kept_share is None
        else draw_kept_tokens(1 if task.shares_tokens else size, task.num_tokens, kept_share, generator),
    )
    tensors = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
    return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def batch_loss(
    task: Trainee, model: nn.Module, objective: Objective, batch: Batch, plan: ForwardPlan = PLAIN
) -> Tensor:
    """Return the mean loss of a batch under a plan that may route tokens."""
    stored = None if batch.kept is None else kept_tokens(batch.kept)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return task.predict(model, noisy, timesteps, batch.labels, plan=plan, stored=stored)

    return training_loss(predict, objective, batch.x_start, batch.noise, batch.timesteps).loss.mean()


def find_step_kinds(task: Trainee, config: TrainConfig, device: torch.device) -> StepKinds:
    """Return what the steps of a run do with their tokens, and count what one sample costs in each."""
    task.prepare()
    ddpm_tables()  # else made below, of tensors without memory, and kept
    plans = make_plans(config.routing, cast(LongSkipModel, task.model))
    flops: dict[StepKind, int] = {kind: _sample_flops(task, config, kind, plans[kind], device) for kind in plans}
    return StepKinds(config.routing, plans, flops)


def _sample_flops(task: Trainee, config: TrainConfig, kind: StepKind, plan: ForwardPlan, device: torch.device) -> int:
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


@contextmanager
def load_batches(
    data: Dataset, config: TrainConfig, accelerator: Accelerator, first_step: int
) -> Iterator[Iterator[Any]]:
    """Yield endless batches of one process, from where `first_step` begins; in the end no data worker is left.

    `ChildProcessError` where one died.
    """
    sampler = ShuffledForever(
        len(cast(Sized, data)),
        config.seed,
        first_step * config.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    size = config.batch_size // accelerator.num_processes // config.num_accumulation_steps
    loader = DataLoader(
        data, batch_size=size, sampler=sampler, num_workers=config.num_workers, worker_init_fn=ignore_signals
    )
    batches: Any = iter(loader)
    workers = batches._workers if config.num_workers else ()  # torch 2.10 to 2.13, as below; a test pins it
    try:
        yield batches
    except Exception as error:
        # PyTorch raises where the loop happens to be, or the pipe breaks, or somebody makes another error of either
        if not has_failed(workers):
            raise
        raise ChildProcessError(
            "a process that loads data died, perhaps for lack of memory: the same command goes on from the last "
            f"checkpoint, also with another --num-workers (it was {config.num_workers})"
        ) from error
    finally:
        if workers:
            batches._shutdown_workers()  # else they end with the last reference, which a traceback may hold


def has_failed(workers: Sequence[BaseProcess]) -> bool:
    """Whether a process has ended with an error. PyTorch's handler of SIGCHLD raises wherever Python is, also here."""
    for _ in range(len(workers) + 1):
        with suppress(RuntimeError):
            for worker in workers:
                worker.join(timeout=0.1)
            return any(worker.exitcode for worker in workers)
    return True
