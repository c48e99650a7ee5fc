"""The training loop, with exact resume.

Step s draws everything random (which pictures, flips, dropped labels, timesteps, noise) from (seed, s) alone, for the
whole batch. So a run that resumes from a checkpoint, with any number of processes, continues exactly as if it had never
stopped.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import cast

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from skipdit.checkpoints import load_model
from skipdit.environment import resolve_device
from skipdit.files.untrusted import file_digest, printable
from skipdit.interfaces import Transformer
from skipdit.models.surgery import add_fill_token
from skipdit.options import check_installed
from skipdit.spectral import cap_spectral_norm, spectral_penalty, weighted
from skipdit.tasks.training import TrainingTask, open_items
from skipdit.training import checkpointing
from skipdit.training.batches import BATCH, KIND, BatchShare, batch_loss, find_step_kinds, prepare_batch, step_generator
from skipdit.training.config import SpectralConfig, TrainConfig, learning_rate_at
from skipdit.training.devices import in_main, same_in_all, start_processes
from skipdit.training.learner import (
    POWERS,
    constrained_modules,
    freeze_all_but_long_skips,
    make_learner,
    unit_gradient_norms,
)
from skipdit.training.loader import StoredBatch, items_of_step, load_batches
from skipdit.training.posthoc_ema import snapshot_name
from skipdit.training.precision import autocast_dtype
from skipdit.training.reporter import Reporter, RunFolder, StepSummary, run_folder
from skipdit.training.routing import StepKind, shallow_path_of
from skipdit.training.sharding import clip_gradients, shard, whole
from skipdit.training.showing import draw_samples, release, with_weights, without_weights
from skipdit.training.stopping import Stopped, stoppable

LOGGER = logging.getLogger(__name__)

MAX_SHARD_SIZE = "14MB"  # per file of weights
MAX_NAMED = 5  # items named in one message


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = True,
    device: str = "auto",
    overwrite: bool = False,
    allow_changes: bool = False,
) -> Path:
    """Train a model, and return the folder of the finished pipeline with the averaged weights, `out/pipeline`.

    The run also writes `config.json`, `log.jsonl`, `samples/step-*.png` and `checkpoint-*` in `out`, and with
    `config.tensorboard` events for TensorBoard in `tensorboard/`.

    Args:
        config: the run.
        out: folder of the run.
        resume: resume from the last complete checkpoint in `out`. Otherwise start anew; the earlier run is kept in
            `out/previous-run` until the first new checkpoint is due.
        device: `"cpu"`, `"cuda"` or `"auto"`.
        overwrite: allow overwriting files in `out` that skipdit did not write, with a warning for each.
        allow_changes: resume although the learning rate, or another setting that may change, differs.

    Raises:
        Stopped: Ctrl-C, SIGTERM or SIGHUP stopped the run, after a checkpoint.
        ValueError: the loss is no longer finite, or the config does not fit its data, model or checkpoint.
        OSError: a file that is not ours is in the way, another run writes into `out`, or writing failed.
    """
    if config.tensorboard:
        check_installed("events for TensorBoard need", "tensorboard", "tensorboard")
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
    """Return the task of a run, with its model and data, as it is before the first step."""
    items = open_items(config.data)
    torch.manual_seed(config.seed)
    start = None if config.start_from is None else load_model(config.start_from)
    return config.model.build(items, config.objective, start)


@dataclass(frozen=True)
class Due:
    """Which files to write after a step."""

    line: bool
    snapshot: bool
    checkpoint: bool
    grid: bool

    @classmethod
    def after(cls, done: int, config: TrainConfig) -> "Due":
        """Return what is due after `done` steps."""

        def is_due(every: int) -> bool:
            return every > 0 and (done % every == 0 or done == config.max_steps)

        snapshot, checkpoint = is_due(config.ema_snapshots_every), is_due(config.checkpoint_every)
        line = checkpoint or snapshot or done % config.log_every == 0
        return cls(line=line, snapshot=snapshot, checkpoint=checkpoint, grid=is_due(config.sample_every))


@dataclass(frozen=True)
class StepResult:
    """The results of a step in this process, on the device."""

    loss: Tensor
    """of this process"""
    finite: Tensor
    """whether the run can continue after this step"""
    norm: Tensor
    """of the whole gradient"""
    unit_norms: Tensor
    """gradient norms (num_units,); empty if not requested"""


class Run:
    """A run in one process: its model, its steps, and the files it writes. folder: in the main process only."""

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
        if not self.sharded:  # otherwise each unit is moved when it is sharded
            model.to(self.device)
        if config.routing.mode == "fill":
            add_fill_token(model)
        if config.stage == "long-skips-only":
            freeze_all_but_long_skips(model)
        self.kinds = find_step_kinds(task, config)
        self.flops = 0.0
        task.prepare(self.device)
        path = shallow_path_of(config.routing, model.long_skip_links.num_units)
        if path is not None:
            model.update_config(shallow_path=path.to_dict())
        self.constrained = constrained_modules(config.spectral, model) if config.spectral else None
        if config.spectral and self.constrained and config.spectral.form == "cap":
            cap_spectral_norm(self.constrained, config.spectral.maximum)
        if config.gradient_checkpointing:
            transformer: Transformer = model
            transformer.enable_gradient_checkpointing()
        self.shown = without_weights(model)
        if self.sharded:
            shard(model, self.device)
        self.learner = make_learner(config, model, self.device)

    def begin(self, *, allow_changes: bool) -> int:
        """Return the first step to run: that after the last checkpoint, or 0."""
        first_step = 0
        if self.resume:
            first_step, self.flops, notes = self.restore(allow_changes=allow_changes)
            for note in notes if self.accelerator.is_main_process else ():
                LOGGER.warning("%s", note)
        else:
            in_main(self.accelerator, self.folder.set_aside if self.folder is not None else bool)
        if self.config.compile:
            self.learner.model.compile()
        model = self.learner.model
        self.wrapped = model if self.sharded else self.accelerator.prepare_model(model)
        return first_step

    def restore(self, *, allow_changes: bool) -> tuple[int, float, list[str]]:
        """Resume in all processes from one checkpoint: see `checkpointing.resume`, whose errors are raised in all."""
        restored: list[tuple[int, float, list[str]]] = []

        def resume() -> str:
            found = checkpointing.resume(self.out, self.learner, self.config, self.data, allow_changes=allow_changes)
            restored.append(found)
            return file_digest(checkpointing.checkpoint_path(self.out, found[0]) / "state.json") if found[0] else ""

        problem = f"processes found other checkpoints in {printable(self.out)}: --out must be one shared folder"
        same_in_all(self.accelerator, resume, problem)
        return restored[0]

    def steps(self, first_step: int) -> None:
        """Train up to `max_steps`, or until a signal."""
        config, is_alone = self.config, self.accelerator.num_processes == 1
        # the first step with a non-finite loss or gradient; read from the device only for a line of the log or a file
        first_bad = torch.full((), math.inf, device=self.device)
        with (
            stoppable() as stop,
            load_batches(self.task.data, config, self.accelerator, first_step) as batches,
            Reporter(self.folder, config, first_step, int(self.learner.counts()[0].item())) as report,
        ):
            for step in range(first_step, config.max_steps):
                done, rate = step + 1, learning_rate_at(config, step)
                due = Due.after(done, config)
                result = self.step(batches, step, rate, norms_of_units=due.line)
                first_bad = torch.minimum(first_bad, torch.where(result.finite, math.inf, float(done)))
                # a single process stops at once; several agree on it when they next exchange numbers
                stopped = stop.signal if is_alone else 0
                if due.line or due.grid or stopped:
                    summary, stopped = self.agree(result, first_bad, stop.signal)
                    self.check_weights(due, stopped, done)
                    if due.line:
                        report(done, self.flops, rate, summary)
                self.write(due, stopped, done, report)
                if stopped:
                    raise Stopped(stopped, self.stop_message(stopped, done))

    # ------------------------------------------------------------------------------------------------------------------
    # A step; nothing here waits for the device

    def step(
        self, batches: Iterator[StoredBatch], step: int, rate: float, *, norms_of_units: bool = False
    ) -> StepResult:
        """Run one step: compute, limit and apply the gradients."""
        config, learner = self.config, self.learner
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        kind = self.kinds.at(step, config.max_steps, step_generator(config, KIND, step))
        loss = self.backward(batches, step, kind)
        self.flops += self.kinds.flops[kind] * config.batch_size
        if learner.loss_scale is not None:
            learner.loss_scale.scaler.unscale_(learner.optimizer)
        if config.spectral is not None and config.spectral.form == "penalty":
            self.add_penalty(config.spectral)
        unit_norms = unit_gradient_norms(learner.model, self.device) if norms_of_units else loss.new_empty(0)
        limit = config.gradient_clip or torch.finfo(torch.float32).max
        norm = clip_gradients(learner.model.parameters(), limit, self.device)
        finite = loss.isfinite() & learner.can_continue(norm)
        learner.update(norm, step + 1)
        return StepResult(loss, finite, norm, unit_norms)

    def backward(self, batches: Iterator[StoredBatch], step: int, kind: StepKind) -> Tensor:
        """Compute the gradients of one step, multiplied by the loss scale in fp16; return the loss of this process."""
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
        """The kinds of steps in which every weight gets a gradient, as DDP expects."""
        return ("routed",) if self.config.routing.mode == "fill" else ("dense", "routed")

    def average_gradients(self) -> None:
        """Average the gradients over processes. All processes have gradients of the same parameters, since a step is of
        one kind in all of them."""
        if self.accelerator.num_processes > 1:
            for parameter in self.learner.model.parameters():
                if parameter.grad is not None:
                    parameter.grad = cast(Tensor, self.accelerator.reduce(parameter.grad, "mean"))

    def add_penalty(self, spectral: SpectralConfig) -> None:
        """Add the gradients of the spectral penalty, which are equal in all processes."""
        constrained = self.constrained
        assert constrained is not None
        weights = [layer.get_parameter("weight") for layer in weighted(constrained)]
        penalty = spectral.penalty_weight * spectral_penalty(constrained, spectral.maximum, whole)
        for weight, gradient in zip(weights, torch.autograd.grad(penalty, weights), strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad + gradient

    # ------------------------------------------------------------------------------------------------------------------
    # Communication between processes

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, stacked along a new first axis."""
        return cast(Tensor, self.accelerator.gather(tensor[None]))

    def agree(self, result: StepResult, first_bad: Tensor, signal: int) -> tuple[StepSummary, int]:
        """Return the summary of a step over all processes, and a signal that any of them received; `ValueError` if any
        of them had a non-finite loss or gradient."""
        norms = torch.cat([result.norm[None], result.unit_norms])
        if self.learner.loss_scale is not None:
            norms = norms.nan_to_num(0.0, 0.0)
        numbers = torch.cat(
            [torch.stack([result.loss, first_bad, torch.full_like(result.loss, signal)]), self.learner.counts(), norms]
        )
        gathered = self.gathered(numbers).tolist()
        losses, bad_steps, signals = zip(*(row[:3] for row in gathered), strict=True)
        if min(bad_steps) < math.inf:
            first = int(min(bad_steps))
            what = f"the loss or its gradient at step {first}"
            raise ValueError(f"{self.not_finite(what)}; {self.learned_at(first)}")
        num_skipped, overflows, scale, norm, *unit_norms = gathered[0][3:]
        summary = StepSummary(sum(losses) / len(losses), norm, int(num_skipped), int(overflows), scale, unit_norms)
        return summary, int(max(signals))

    def check_weights(self, due: Due, stopped: int, done: int) -> None:
        """Raise `ValueError` if files are due and the weights are not finite in some process."""
        is_due = due.checkpoint or due.snapshot or due.grid or stopped
        if is_due and not self.gathered(self.learner.is_finite()).all():
            raise ValueError(self.not_finite(f"the weights after step {done}"))

    # ------------------------------------------------------------------------------------------------------------------
    # Files: the main process writes what all processes gather

    @property
    def files(self) -> RunFolder:
        """The folder of the run; only the main process has it."""
        assert self.folder is not None
        return self.folder

    def write(self, due: Due, stopped: int, done: int, report: Reporter) -> None:
        """Write the files that are due after a step."""
        accelerator, learner, keeps = self.accelerator, self.learner, self.accelerator.is_main_process
        if due.snapshot:  # before the checkpoint, so that no snapshot is missing when a run resumes from it
            snapshot = learner.tensors(keeps=keeps, file=POWERS)[POWERS]
            in_main(accelerator, lambda: self.write_snapshot(done, snapshot))
        if due.checkpoint or stopped:
            tensors = learner.tensors(keeps=keeps)
            state = (self.flops, learner, tensors, self.config, self.data)
            in_main(accelerator, lambda: checkpointing.save_checkpoint(self.out, done, *state, is_due=due.checkpoint))
        if due.grid:
            averages = learner.tensors(keeps=keeps, file="ema")["ema"]
            in_main(
                accelerator, lambda: report.grid(done, draw_samples(self.averaged(averages), self.config, self.task))
            )

    def write_snapshot(self, done: int, tensors: dict[str, Tensor]) -> None:
        with self.files.file(snapshot_name(done)) as draft:
            save_file(tensors, draft)

    def averaged(self, averages: dict[str, Tensor]) -> nn.Module:
        """Return the model with these averaged weights."""
        return with_weights(self.shown, averages, self.device)

    def release(self) -> None:
        """Write the finished pipeline."""
        averages = self.learner.tensors(keeps=self.accelerator.is_main_process, file="ema")["ema"]

        def write() -> None:
            with self.files.pipeline() as draft:
                release(self.averaged(averages), self.config, self.task).save(draft, MAX_SHARD_SIZE)

        in_main(self.accelerator, write)

    def not_finite(self, what: str) -> str:
        """Return a message that training has failed, with the remedies."""
        checkpoints, config = checkpointing.list_checkpoints(self.out), self.config
        remedy, alternative = "start again with", ""
        if checkpoints:
            remedy = f"resume from {printable(checkpoints[-1])} with --allow-changes and"
            alternative = "; if that checkpoint is too late, start again with --no-resume"
        return (
            f"{what} is no longer finite, and was not saved: {remedy} a lower --learning-rate (it was "
            f"{config.learning_rate:g}), another --gradient-clip (it was {config.gradient_clip:g}) or --precision no"
            f"{alternative}"
        )

    def learned_at(self, step: int) -> str:
        """Return a message that names the items in the batch of a step. step: the first is 1."""
        items = self.task.items
        indices = items_of_step(self.config, len(items), step - 1)
        names = ", ".join(f"{index} ({items.names(index)})" for index in indices[:MAX_NAMED])
        more = f" and {len(indices) - MAX_NAMED} more" if len(indices) > MAX_NAMED else ""
        return f"its batch had the items {names}{more}"

    def stop_message(self, number: int, done: int) -> str:
        """Return a message on where a run stopped, and how to resume it."""
        command = "the same command" if self.resume else "the same command without --no-resume"
        earlier = checkpointing.previous_note(self.out)
        return (
            f"stopped by {Signals(number).name} after step {done} of {self.config.max_steps}, which is saved in "
            f"{printable(checkpointing.checkpoint_path(self.out, done))}: {command} resumes it"
            + (f"; {earlier}" if earlier else "")
        )
