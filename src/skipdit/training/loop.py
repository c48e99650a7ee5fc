"""The training loop: one readable pass over accelerate, with exact resume.

Step s draws everything random (which pictures, flips, dropped labels, timesteps, noise) from (seed, s) alone, for the
whole batch, so a run that is resumed from a checkpoint goes on exactly as if it had never stopped, by any number of
processes.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from skipdit.checkpoints import load_model
from skipdit.environment import resolve_device
from skipdit.files.untrusted import printable
from skipdit.models.surgery import add_fill_token
from skipdit.spectral import cap_spectral_norm, spectral_penalty, weighted
from skipdit.tasks.training import TrainingTask, open_items
from skipdit.training import checkpointing
from skipdit.training.batches import (
    BATCH,
    KIND,
    BatchShare,
    batch_loss,
    find_step_kinds,
    prepare_batch,
    step_generator,
)
from skipdit.training.config import SpectralConfig, TrainConfig, learning_rate_at
from skipdit.training.devices import in_main, start_processes
from skipdit.training.learner import (
    POWERS,
    constrained_modules,
    freeze_all_but_long_skips,
    make_learner,
    unit_gradient_norms,
)
from skipdit.training.loader import Stored, items_of_step, load_batches
from skipdit.training.precision import autocast_dtype
from skipdit.training.reporter import Reporter, RunFolder, Told, check_tensorboard_installed, run_folder
from skipdit.training.routing import StepKind, shallow_path_of
from skipdit.training.sharding import clip_gradients, shard, whole
from skipdit.training.showing import draw_samples, release, with_weights, without_weights
from skipdit.training.stopping import Stopped, stoppable

LOGGER = logging.getLogger(__name__)

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
class Due:
    """What is written after a step."""

    line: bool
    snapshot: bool
    checkpoint: bool
    grid: bool

    @classmethod
    def after(cls, done: int, config: TrainConfig) -> "Due":
        """Return what is due after so many steps."""

        def is_due(every: int) -> bool:
            return every > 0 and (done % every == 0 or done == config.max_steps)

        snapshot, checkpoint = is_due(config.ema_snapshots_every), is_due(config.checkpoint_every)
        line = checkpoint or snapshot or done % config.log_every == 0
        return cls(line=line, snapshot=snapshot, checkpoint=checkpoint, grid=is_due(config.sample_every))


@dataclass(frozen=True)
class StepMade:
    """What a step made, on the device: the loss of this process, whether the run can go on after it, the gradient's
    norm, and that of each unit, none where they were not asked for."""

    loss: Tensor
    finite: Tensor
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
        self.device = accelerator.device
        self.autocast = autocast_dtype(config.precision, self.device)
        self.sharded = config.parallel == "fsdp" and accelerator.num_processes > 1
        self.task, self.data = task, checkpointing.fingerprint(task.items)
        model = task.model.train()
        if not self.sharded:  # else unit by unit
            model.to(self.device)
        if config.routing.mode == "fill":
            add_fill_token(model)
        if config.stage == "long-skips-only":
            freeze_all_but_long_skips(model)
        self.kinds = find_step_kinds(task, config, next(model.parameters()).device)
        self.flops = 0.0
        task.prepare(self.device)
        path = shallow_path_of(config.routing, model.long_skip_links.num_units)
        if path is not None:
            model.update_config(shallow_path=path.to_dict())
        self.constrained = constrained_modules(config.spectral, model) if config.spectral else None
        if config.spectral and self.constrained and config.spectral.form == "cap":
            cap_spectral_norm(self.constrained, config.spectral.maximum)
        if config.gradient_checkpointing:
            cast(Any, model).enable_gradient_checkpointing()
        self.shown = without_weights(model)
        if self.sharded:
            shard(model, self.device)
        self.learner = make_learner(config, model, self.device)

    def begin(self, *, allow_changes: bool) -> int:
        """Return the step to begin with: after the last checkpoint, or 0."""
        first_step = 0
        if self.resume:
            first_step, self.flops, notes = checkpointing.go_on(
                self.out, self.learner, self.config, self.data, allow_changes=allow_changes
            )
            for note in notes if self.accelerator.is_main_process else ():
                LOGGER.warning("%s", note)
        else:
            in_main(self.accelerator, lambda: checkpointing.set_aside(self.out))
        if self.config.compile:
            self.learner.model.compile()
        model = self.learner.model
        self.wrapped = model if self.sharded else self.accelerator.prepare_model(model)
        return first_step

    def steps(self, first_step: int) -> None:
        """Train up to max_steps, or until somebody stops it."""
        config, alone = self.config, self.accelerator.num_processes == 1
        # the first step after which it cannot go on: known to the device alone between the lines of the log
        spoiled = torch.full((), math.inf, device=self.device)
        with (
            stoppable() as stop,
            load_batches(self.task.data, config, self.accelerator, first_step) as batches,
            Reporter(self.folder, config, first_step, int(self.learner.counts()[0].item())) as report,
        ):
            for step in range(first_step, config.max_steps):
                done, rate = step + 1, learning_rate_at(config, step)
                due = Due.after(done, config)
                made = self.step(batches, step, rate, norms_of_units=due.line)
                spoiled = torch.minimum(spoiled, torch.where(made.finite, math.inf, float(done)))
                # alone at once; several processes agree on it when they exchange numbers
                stopped = stop.signal if alone else 0
                if due.line or due.grid or stopped:
                    told, stopped = self.agree(made, spoiled, stop.signal)
                    self.check_weights(due, stopped, done)
                    if due.line:
                        report(done, self.flops, rate, told)
                self.write(due, stopped, done, report)
                if stopped:
                    raise Stopped(stopped, self.how_to_go_on(stopped, done))

    # ------------------------------------------------------------------------------------------------------------------
    # A step; nothing here waits for the device

    def step(self, batches: Iterator[Stored], step: int, rate: float, *, norms_of_units: bool = False) -> StepMade:
        """Make one step: gradients, what limits them, what they change."""
        config, learner = self.config, self.learner
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        kind = self.kinds.at(step, config.max_steps, step_generator(config, KIND, step))
        loss = self.backward(batches, step, kind)
        self.flops += self.kinds.flops[kind] * config.batch_size
        if learner.loss_scale is not None:
            learner.loss_scale.unscale(learner.optimizer)
        if config.spectral is not None and config.spectral.form == "penalty":
            self.add_penalty(config.spectral)
        unit_norms = unit_gradient_norms(learner.model, self.device) if norms_of_units else loss.new_empty(0)
        limit = config.gradient_clip or torch.finfo(torch.float32).max
        norm = clip_gradients(learner.model.parameters(), limit, self.device)
        finite = loss.isfinite() & learner.can_go_on(norm)
        learner.update(norm, step + 1)
        return StepMade(loss, finite, norm, unit_norms)

    def backward(self, batches: Iterator[Stored], step: int, kind: StepKind) -> Tensor:
        """Fill the gradients of one step, in fp16 times the scale; return the loss of this process."""
        config, accelerator, scale = self.config, self.accelerator, self.learner.loss_scale
        kept_share = config.routing.share if kind == "routed" else None
        num_parts = config.num_accumulation_steps
        loss = torch.zeros((), device=self.device)
        for part in range(num_parts):
            pixels, labels = next(batches)
            share = BatchShare(
                rank=accelerator.process_index, num_processes=accelerator.num_processes, part=part, num_parts=num_parts
            )
            generator = step_generator(config, BATCH, step, self.device)
            batch = prepare_batch(pixels, labels, config, self.task, generator, self.device, kept_share, share)
            syncs = self.sharded or (part == num_parts - 1 and kind in self.kinds_with_all_weights)
            with nullcontext() if syncs else accelerator.no_sync(self.wrapped):
                with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                    plan = self.kinds.plans[kind]
                    part_loss = batch_loss(self.task, self.wrapped, config.objective, batch, plan) / num_parts
                loss += part_loss.detach()
                accelerator.backward(part_loss if scale is None else scale.scale(part_loss))
        if not self.sharded and kind not in self.kinds_with_all_weights:
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

    def add_penalty(self, spectral: SpectralConfig) -> None:
        """Add the gradients of a spectral penalty, which all processes compute alike."""
        constrained = self.constrained
        assert constrained is not None
        weights = [layer.get_parameter("weight") for layer in weighted(constrained)]
        penalty = spectral.penalty_weight * spectral_penalty(constrained, spectral.maximum, whole)
        for weight, gradient in zip(weights, torch.autograd.grad(penalty, weights), strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad + gradient

    # ------------------------------------------------------------------------------------------------------------------
    # What processes tell one another

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, stacked."""
        return cast(Tensor, self.accelerator.gather(tensor[None]))

    def agree(self, made: StepMade, spoiled: Tensor, signal: int) -> tuple[Told, int]:
        """Return what all processes know of a step, and the signal that any of them has got; `ValueError` where one of
        them has met numbers that are not finite."""
        norms = torch.cat([made.norm[None], made.unit_norms])
        if self.learner.loss_scale is not None:
            norms = norms.nan_to_num(0.0, 0.0)
        numbers = torch.cat(
            [
                torch.stack([made.loss, spoiled, torch.full_like(made.loss, signal)]),
                self.learner.counts(),
                norms,
            ]
        )
        gathered = self.gathered(numbers).tolist()
        losses, bad, signals = zip(*(each[:3] for each in gathered), strict=True)
        if min(bad) < math.inf:
            first = int(min(bad))
            what = f"the loss or its gradient at step {first}"
            raise ValueError(f"{self.not_finite(what)}; {self.learned_at(first)}")
        left_out, overflows, scale, norm, *unit_norms = gathered[0][3:]
        told = Told(sum(losses) / len(losses), norm, int(left_out), int(overflows), scale, unit_norms)
        return told, int(max(signals))

    def check_weights(self, due: Due, stopped: int, done: int) -> None:
        """Raise `ValueError` where something is going to be written of weights that are not finite in some process."""
        is_due = due.checkpoint or due.snapshot or due.grid or stopped
        if is_due and not self.gathered(self.learner.is_finite()).all():
            raise ValueError(self.not_finite(f"the weights after step {done}"))

    # ------------------------------------------------------------------------------------------------------------------
    # What is written, by the main process, of what all processes gather

    @property
    def files(self) -> RunFolder:
        """The folder of the run, which the main process alone has."""
        assert self.folder is not None
        return self.folder

    def write(self, due: Due, stopped: int, done: int, report: Reporter) -> None:
        """Write what is due after a step."""
        accelerator, learner, keeps = self.accelerator, self.learner, self.accelerator.is_main_process
        if due.snapshot:  # before the checkpoint, so that none is missing where a run goes on
            snapshot = learner.tensors(keeps=keeps, file=POWERS)[POWERS]
            in_main(accelerator, lambda: self.files.write_snapshot(done, snapshot))
        if due.checkpoint or stopped:
            tensors = learner.tensors(keeps=keeps)
            state = (self.flops, learner, tensors, self.config, self.data)
            in_main(accelerator, lambda: checkpointing.save_checkpoint(self.out, done, *state))
        if due.grid:
            averages = learner.tensors(keeps=keeps, file="ema")["ema"]
            in_main(
                accelerator, lambda: report.grid(done, draw_samples(self.averaged(averages), self.config, self.task))
            )

    def averaged(self, averages: dict[str, Tensor]) -> nn.Module:
        """Return the model of averaged weights."""
        return with_weights(self.shown, averages, self.device)

    def release(self) -> None:
        """Write the finished pipeline."""
        averages = self.learner.tensors(keeps=self.accelerator.is_main_process, file="ema")["ema"]

        def write() -> None:
            with self.files.pipeline() as draft:
                release(self.averaged(averages), self.config, self.task).save(draft, MAX_SHARD_SIZE)

        in_main(self.accelerator, write)

    def not_finite(self, what: str) -> str:
        """Say that training cannot go on, and how it can."""
        checkpoints, config = checkpointing.list_checkpoints(self.out), self.config
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
            f"{printable(checkpointing.checkpoint_path(self.out, done))}: {way}"
        )
