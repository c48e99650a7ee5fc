"""The training loop: one readable pass over accelerate, with exact resume.

Step s draws everything random (which pictures, flips, dropped labels, timesteps, noise) from (seed, rank, s) alone,
so a run that is resumed from a checkpoint goes on exactly as if it had never stopped.
"""

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL.Image import Image
from torch import Tensor, nn

from skipdit.checkpoints import load_model
from skipdit.environment import resolve_device
from skipdit.models.long_skip import LongSkipModel
from skipdit.models.surgery import add_fill_token
from skipdit.pictures import labelled_grid, to_pictures
from skipdit.spectral import cap_spectral_norm, fold_spectral_caps, spectral_penalty
from skipdit.tasks.training import TrainingTask, make_task_scheduler, open_items
from skipdit.training.batches import (
    ALL_RANKS,
    batch_loss,
    find_step_kinds,
    prepare_batch,
    step_generator,
)
from skipdit.training.checkpointing import (
    Learner,
    checkpoint_path,
    fingerprint,
    go_on,
    list_checkpoints,
    save_checkpoint,
    set_aside,
)
from skipdit.training.config import SpectralConfig, TrainConfig, learning_rate_at, long_skips_of
from skipdit.training.devices import computes_in_bf16, in_main, start_processes
from skipdit.training.guard import GradientGuard
from skipdit.training.loader import Stored, items_of_step, load_batches
from skipdit.training.posthoc_ema import PowerAverages
from skipdit.training.reporter import Reporter, RunFolder, check_tensorboard_installed, run_folder
from skipdit.training.routing import StepKind
from skipdit.training.stopping import Stopped, stoppable
from skipdit.untrusted import printable
from skipdit.videos import frame_grid

LOGGER = logging.getLogger(__name__)

RELEASE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_SHARD_SIZE = "14MB"  # per file
MAX_NAMED = 5  # items in a message


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = True,
    device: str = "auto",
    overwrite: bool = False,
    allow_changes: bool = False,
) -> Path:
    """Train, and return the folder of the finished pipeline with the averaged weights, `out/pipeline`.

    Also in `out`: `config.json`, `log.jsonl`, `samples/step-*.png`, `checkpoint-*`. With `resume`, goes on from the
    last checkpoint there that is whole; `allow_changes` says that the rate and other settings may be others than its.
    Without, the checkpoints there stay until a new one stands. device: `"cpu"`, `"cuda"` or `"auto"`. overwrite: files
    of others in `out` may go, each of which is told.

    With `config.tensorboard` also events for TensorBoard in `tensorboard/`.

    `Stopped` after a checkpoint where Ctrl-C, SIGTERM or SIGHUP asked for the end; `ValueError` where the loss is no
    longer finite; `OSError` where something of others is in the way, another run writes into `out`, or nothing can be
    written.
    """
    if config.tensorboard:
        check_tensorboard_installed()
    accelerator = start_processes(resolve_device(device))
    num_parts = accelerator.num_processes * config.num_accumulation_steps
    if config.batch_size % num_parts:
        raise ValueError(
            f"batch_size must be divisible by processes x accumulation steps = {num_parts}, got {config.batch_size}"
        )
    with run_folder(accelerator, out, config, overwrite=overwrite) as folder:
        run = Run(config, accelerator, build_task(config), folder, out, resume=resume)
        first_step = run.begin(allow_changes=allow_changes)
        run.steps(first_step)
        run.release()
    return out / "pipeline"


def build_task(config: TrainConfig) -> TrainingTask:
    """Return what a run trains, as it is before the first step."""
    items = open_items(config.data)
    torch.manual_seed(config.seed)
    start = None if config.start_from is None else load_model(config.start_from)
    return config.model.build(items, config.objective, start)


@dataclass(frozen=True)
class StepMade:
    """What a step made, on the device: the loss of this process, the gradient's norm, and that of each unit, none where
    they were not asked for."""

    loss: Tensor
    norm: Tensor
    unit_norms: Tensor


class Run:
    """A run in one process: its model, what a step does to it, what is written. folder: in the main process only."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        task: TrainingTask,
        folder: RunFolder | None,
        out: Path,
        *,
        resume: bool,
    ) -> None:
        self.config, self.accelerator, self.folder, self.out, self.resume = config, accelerator, folder, out, resume
        self.bf16 = computes_in_bf16(config.precision, accelerator.device)
        self.task, self.data = task, fingerprint(task.items)
        model = task.model.to(accelerator.device).train()
        self.units = cast(LongSkipModel, model)
        if config.routing.mode == "fill":
            add_fill_token(model)
        if config.stage == "long-skips-only":
            freeze_all_but_long_skips(model)
        self.kinds, self.flops = find_step_kinds(self.task, config, accelerator.device), 0.0
        path = config.routing.shallow_path(self.units.long_skip_links.num_units)
        if path is not None:
            cast(Any, model).register_to_config(shallow_path=path.to_dict())
        self.constrained = config.spectral.modules(self.units) if config.spectral else None
        if config.spectral and self.constrained and config.spectral.form == "cap":
            cap_spectral_norm(self.constrained, config.spectral.maximum)
        if config.gradient_checkpointing:
            cast(Any, model).enable_gradient_checkpointing()
        self.learner = make_learner(config, model, accelerator.device)

    def begin(self, *, allow_changes: bool) -> int:
        """Return the step to begin with: after the last checkpoint, or 0."""
        first_step = 0
        if self.resume:
            first_step, self.flops, notes = go_on(
                self.out, self.learner, self.config, self.data, allow_changes=allow_changes
            )
            for note in notes if self.accelerator.is_main_process else ():
                LOGGER.warning("%s", note)
        else:
            in_main(self.accelerator, lambda: set_aside(self.out))
        if self.config.compile:
            self.learner.model.compile()
        self.wrapped = self.accelerator.prepare_model(self.learner.model)
        return first_step

    def steps(self, first_step: int) -> None:
        """Train up to max_steps, or until somebody stops it."""
        config, accelerator = self.config, self.accelerator
        alone, guard = accelerator.num_processes == 1, self.learner.guard
        left_out = torch.zeros((), device=accelerator.device) if guard is None else guard.left_out
        # the first step whose loss or gradient is not finite: known to the device alone between the lines of the log
        spoiled = torch.full((), math.inf, device=accelerator.device)
        with (
            stoppable() as stop,
            load_batches(self.task.data, config, accelerator, first_step) as batches,
            Reporter(self.folder, config, first_step, int(left_out.item())) as report,
        ):
            for step in range(first_step, config.max_steps):
                done, rate = step + 1, learning_rate_at(config, step)
                saves = done % config.checkpoint_every == 0 or done == config.max_steps
                every = config.ema_snapshots_every
                keeps = every > 0 and (done % every == 0 or done == config.max_steps)
                logs = saves or keeps or done % config.log_every == 0
                shows = config.sample_every > 0 and (done % config.sample_every == 0 or done == config.max_steps)
                made = self.step(batches, step, rate, norms_of_units=logs)
                finite = made.loss.isfinite() & made.norm.isfinite()
                spoiled = torch.minimum(spoiled, torch.where(finite, math.inf, float(done)))

                # alone at once; several processes agree on it when they exchange numbers
                stopped = stop.signal if alone else 0
                if logs or shows or stopped:
                    signal = torch.full_like(made.loss, stop.signal)
                    all_steps = torch.stack([made.loss, made.norm, spoiled, signal, left_out])
                    numbers = torch.cat([all_steps, made.unit_norms])
                    gathered = cast(Tensor, accelerator.gather(numbers[None])).tolist()
                    losses, norms, bad, signals, counts = zip(*(each[:5] for each in gathered), strict=True)
                    stopped = int(max(signals))
                    if min(bad) < math.inf:
                        first = int(min(bad))
                        what = f"the loss or its gradient at step {first}"
                        raise ValueError(f"{self.not_finite(what)}; {self.learned_at(first)}")
                    if (saves or shows or keeps or stopped) and not self.learner.is_finite():
                        raise ValueError(self.not_finite(f"the weights after step {done}"))
                    if logs:
                        loss = sum(losses) / len(losses)
                        report(done, self.flops, loss, norms[0], rate, int(counts[0]), gathered[0][5:])
                if keeps:  # before the checkpoint, so that none is missing where a run goes on
                    in_main(accelerator, lambda done=done: self.keep(done))
                if saves or stopped:
                    in_main(accelerator, lambda done=done: self.save(done))
                if shows:
                    in_main(accelerator, lambda done=done: report.grid(done, self.draw()))
                if stopped:
                    raise Stopped(stopped, self.how_to_go_on(stopped, done))

    def step(self, batches: Iterator[Stored], step: int, rate: float, *, norms_of_units: bool = False) -> "StepMade":
        """Make one step; nothing here waits for the device."""
        config, learner = self.config, self.learner
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        kind = self.kinds.at(step, config.max_steps, step_generator(config, ALL_RANKS, step))
        loss = self.backward(batches, step, kind)
        self.flops += self.kinds.flops[kind] * config.batch_size
        unit_norms = unit_gradient_norms(self.units, loss.device) if norms_of_units else loss.new_empty(0)
        limit = config.gradient_clip or torch.finfo(torch.float32).max
        norm = cast(Tensor, self.accelerator.clip_grad_norm_(learner.model.parameters(), limit))
        if learner.guard is not None:
            learner.guard.set(learner.optimizer, norm)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        learner.ema.step(learner.model.parameters())
        if learner.powers is not None:
            learner.powers.step(learner.model.parameters(), step + 1)
        return StepMade(loss, norm, unit_norms)

    def backward(self, batches: Iterator[Stored], step: int, kind: StepKind) -> Tensor:
        """Fill the gradients of one step; return the loss of this process."""
        config, accelerator, plan = self.config, self.accelerator, self.kinds.plans[kind]
        generator = step_generator(config, accelerator.process_index, step, accelerator.device)
        kept_share = config.routing.share if kind == "routed" else None
        loss = torch.zeros((), device=accelerator.device)
        for part in range(config.num_accumulation_steps):
            pixels, labels = next(batches)
            batch = prepare_batch(pixels, labels, config, self.task, generator, accelerator.device, kept_share)
            syncs = part == config.num_accumulation_steps - 1 and kind in self.kinds_with_all_weights
            with nullcontext() if syncs else accelerator.no_sync(self.wrapped):
                with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=self.bf16):
                    part_loss = (
                        batch_loss(self.task, self.wrapped, config.objective, batch, plan)
                        / config.num_accumulation_steps
                    )
                loss += part_loss.detach()
                accelerator.backward(part_loss + self.penalty() if self.penalised else part_loss)
        if kind not in self.kinds_with_all_weights:
            self.average_gradients()
        return loss

    @property
    def kinds_with_all_weights(self) -> tuple[StepKind, ...]:
        """The kinds of steps in which every weight has a gradient, as DDP expects."""
        return ("routed",) if self.config.routing.mode == "fill" else ("dense", "routed")

    def average_gradients(self) -> None:
        """Average over processes what gradients there are: the same in all of them, for they all leave out the same."""
        if self.accelerator.num_processes > 1:
            for parameter in self.learner.model.parameters():
                if parameter.grad is not None:
                    parameter.grad = cast(Tensor, self.accelerator.reduce(parameter.grad, "mean"))

    @property
    def penalised(self) -> bool:
        return self.config.spectral is not None and self.config.spectral.form == "penalty"

    def penalty(self) -> Tensor:
        """The part of a spectral penalty that belongs to one part of a batch."""
        spectral = cast(SpectralConfig, self.config.spectral)
        excess = spectral_penalty(cast(nn.ModuleList, self.constrained), spectral.maximum)
        return spectral.penalty_weight * excess / self.config.num_accumulation_steps

    def save(self, done: int) -> None:
        save_checkpoint(self.out, done, self.flops, self.learner, self.config, self.data)

    def keep(self, done: int) -> None:
        """Write a snapshot of the averages."""
        assert self.folder is not None
        assert self.learner.powers is not None
        names = [name for name, _ in self.learner.model.named_parameters()]
        self.folder.write_snapshot(done, self.learner.powers.tensors(names))

    def draw(self) -> Image:
        """Return a grid of samples of the averaged weights."""
        with averaged(self.learner.ema, self.learner.model):
            return draw_samples(self.task, self.config)

    def release(self) -> None:
        """Write the finished pipeline."""
        in_main(self.accelerator, self._release)

    def _release(self) -> None:
        assert self.folder is not None
        with averaged(self.learner.ema, self.learner.model), self.folder.pipeline() as draft:
            # not model.to: ModelMixin.to warns of every cast
            released = copy.deepcopy(self.learner.model)
            fold_spectral_caps(released)
            nn.Module.to(released, RELEASE_DTYPES[self.config.release_dtype])
            self.task.sampler(released, make_task_scheduler(self.config.objective)).save(draft, MAX_SHARD_SIZE)

    def not_finite(self, what: str) -> str:
        """Say that training cannot go on, and how it can."""
        checkpoints, config = list_checkpoints(self.out), self.config
        way, instead = "start again with", ""
        if checkpoints:
            way = f"go on from {printable(checkpoints[-1])} with --allow-changes and"
            instead = "; if that is too late already, begin anew with --no-resume"
        return (
            f"{what} is no longer finite, and nothing of it was saved: {way} a lower --learning-rate (it was "
            f"{config.learning_rate:g}), another --gradient-clip (it was {config.gradient_clip:g}) or --precision no"
            f"{instead}"
        )

    def learned_at(self, step: int) -> str:
        """Say what the step of this number, of which the first is 1, learned."""
        items = self.task.items
        learned = items_of_step(self.config, len(items), step - 1)
        named = ", ".join(f"{index} ({items.names(index)})" for index in learned[:MAX_NAMED])
        more = f" and {len(learned) - MAX_NAMED} more" if len(learned) > MAX_NAMED else ""
        return f"its batch was of items {named}{more}"

    def how_to_go_on(self, number: int, done: int) -> str:
        """Say where a run stopped."""
        way = "the same command goes on" if self.resume else "the same command without --no-resume goes on"
        return (
            f"stopped by {Signals(number).name} after step {done} of {self.config.max_steps}, which is saved in "
            f"{printable(checkpoint_path(self.out, done))}: {way}"
        )


def make_learner(config: TrainConfig, model: nn.Module, device: torch.device) -> Learner:
    """Return a model with its average and an optimizer, which both change all weights in a few calls."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    ema = EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    guard = GradientGuard(config.gradient_guard, device) if config.gradient_guard else None
    powers = PowerAverages(model.parameters()) if config.ema_snapshots_every else None
    return Learner(model, ema, optimizer, guard, powers)


def freeze_all_but_long_skips(model: nn.Module) -> None:
    """Leave only the long skips to train; `ValueError` where the model has none of ours."""
    long_skips = long_skips_of(cast(LongSkipModel, model))
    if not long_skips:
        raise ValueError(
            "the stage long-skips-only needs a model with long skips that skipdit added: set model.long_skip"
        )
    model.requires_grad_(False)
    for long_skip in long_skips:
        long_skip.requires_grad_(True)


def unit_gradient_norms(model: LongSkipModel, device: torch.device) -> Tensor:
    """Return the norm of the gradient of each unit's parameters, those of its long skip included, on the device: 0
    where it has none."""
    norms = []
    for blocks in model.units():
        parameters = [parameter for block in blocks for parameter in block.parameters()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # torch's norm of no gradients is on the CPU
        norms.append(nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device))
    return torch.stack(norms)


@contextmanager
def averaged(ema: EMAModel, model: nn.Module) -> Iterator[None]:
    """Inside, the model has the averaged weights, is in eval mode and not compiled, as a grid has another size."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled
        ema.restore(model.parameters())
        model.train()


def draw_samples(task: TrainingTask, config: TrainConfig) -> Image:
    """Return a labelled grid, of things spread over the data, from the run's seed; of clips some frames each."""
    sampler = task.sampler(task.model, make_task_scheduler(config.objective))
    sampler.pipeline.set_progress_bar_config(disable=True)
    wanted, captions = task.showcase(config.num_samples)
    samples = sampler.sample(
        wanted,
        guidance_scale=config.sample_guidance_scale,
        num_inference_steps=config.sample_steps,
        generator=torch.Generator().manual_seed(config.seed),
    ).cpu()
    return frame_grid(samples, captions) if samples.ndim == 5 else labelled_grid(to_pictures(samples), captions)
