"""A model in training with its averages and its optimizer, whole in each process or in shards."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from skipdit.models.long_skip import LongSkipModel
from skipdit.training.config import SpectralConfig, TrainConfig
from skipdit.training.guard import GradientGuard, skip_if_any
from skipdit.training.posthoc_ema import PowerAverages
from skipdit.training.precision import LossScale
from skipdit.training.sharding import as_shard, gather, gradient_norms, local, local_parameters, shard_like

FILES = ("model", "ema", "optimizer")
POWERS = "power_averages"  # one more file if the run takes snapshots
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW

Tensors = dict[str, dict[str, Tensor]]  # by file and name


@dataclass(frozen=True)
class Learner:
    """All that a step changes: the weights, their averages, the optimizer's moments, and the guard's window."""

    model: LongSkipModel
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    guard: GradientGuard | None = None
    powers: PowerAverages | None = None
    """the averages of which snapshots are taken"""
    loss_scale: LossScale | None = None
    """in fp16"""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the saved files, without suffix."""
        return FILES if self.powers is None else (*FILES, POWERS)

    def update(self, norm: Tensor, done: int) -> None:
        """Apply the gradients of a step. norm: of the gradients. done: number of the step; the first is 1."""
        checks = [check for check in (self.guard, self.loss_scale) if check is not None]
        skip_if_any(self.optimizer, [check.update(norm) for check in checks])
        self.optimizer.step()
        self.optimizer.zero_grad()
        weights = local_parameters(self.model)
        self.ema.step(weights)
        if self.powers is not None:
            self.powers.step(weights, done)

    def can_continue(self, norm: Tensor) -> Tensor:
        """Return whether a step's gradient is finite, or may be at a smaller loss scale. Call this before `update`."""
        finite = norm.isfinite()
        return finite if self.loss_scale is None else finite | (self.loss_scale.value > 1)

    def counts(self) -> Tensor:
        """Return (3,) on the device: the steps skipped by the guard, the steps that overflowed, and the loss scale."""
        zero = torch.zeros((), device=next(self.model.parameters()).device)
        num_skipped = zero if self.guard is None else self.guard.num_skipped
        scale = self.loss_scale
        return torch.stack([num_skipped, *((zero, zero + 1) if scale is None else (scale.overflows, scale.value))])

    def parts(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (file, name, value) of all that is saved; the value is the part that lies in this process."""
        parameters, trained = dict(self.model.named_parameters()), list(self.trained)
        for (name, parameter), average in zip(parameters.items(), self.ema.shadow_params, strict=True):
            yield "model", name, parameter.detach()
            yield "ema", name, as_shard(average, parameter)
        for index, moments in self.optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                yield "optimizer", f"{trained[index]}.{key}", value
        if self.powers is not None:
            for length, averages in self.powers.averages.items():
                for (name, parameter), average in zip(parameters.items(), averages, strict=True):
                    yield POWERS, f"{length}.{name}", as_shard(average, parameter)

    def tensors(self, *, keeps: bool, file: str | None = None) -> Tensors:
        """Return the whole tensors of all saved files, or of one, in the processes in which `keeps` is true; those of a
        sharded model are on the CPU. All processes must call this."""
        tensors: Tensors = {name: {} for name in self.files if file in (None, name)}
        for part_file, name, part in self.parts():
            if part_file in tensors and (tensor := gather(part, keeps=keeps)) is not None:
                tensors[part_file][name] = tensor
        return tensors

    def is_finite(self) -> Tensor:
        """Return, on the device, whether every number in this process is finite."""
        parts: Tensors = {name: {} for name in self.files}
        for file, name, part in self.parts():
            parts[file][name] = local(part)
        return all_finite(parts)

    def restore(self, tensors: Tensors, ema_step: int) -> None:
        """Restore whole tensors from `tensors`."""
        parameters = dict(self.model.named_parameters())

        def part(value: Tensor, name: str) -> Tensor:
            return local(shard_like(value, parameters[name]))

        with torch.no_grad():
            for name, parameter in parameters.items():
                local(parameter).copy_(part(tensors["model"][name], name))
        self.ema.shadow_params = [part(tensors["ema"][name], name) for name in parameters]
        self.ema.optimization_step = ema_step
        if self.powers is not None:
            names = {f"{length}.{name}": name for length in self.powers.averages for name in parameters}
            self.powers.restore(parameters, {key: part(tensors[POWERS][key], name) for key, name in names.items()})
        moments = tensors["optimizer"]
        entries = {
            index: {
                key: moments[f"{name}.{key}"] if key == "step" else shard_like(moments[f"{name}.{key}"], parameter)
                for key in MOMENTS
            }
            for index, (name, parameter) in enumerate(self.trained.items())
            if f"{name}.step" in moments
        }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": entries})


def all_finite(tensors: Tensors) -> Tensor:
    """Return, on the device of the model, whether no number is NaN or infinite."""
    flags = [tensor.isfinite().all() for group in tensors.values() for tensor in group.values()]
    device = next(iter(tensors["model"].values())).device
    return torch.stack([flag.to(device) for flag in flags]).all()


def make_learner(config: TrainConfig, model: LongSkipModel, device: torch.device) -> Learner:
    """Return a model with its averages and a fused optimizer, which update all weights in a few calls."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    weights = local_parameters(model)
    ema = EMAModel(weights, decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    guard = GradientGuard(config.gradient_guard, device) if config.gradient_guard else None
    powers = PowerAverages(weights) if config.ema_snapshots_every else None
    return Learner(model, ema, optimizer, guard, powers, LossScale(device) if config.precision == "fp16" else None)


def constrained_modules(config: SpectralConfig, model: LongSkipModel) -> nn.ModuleList:
    """Return the modules whose spectral norms are constrained; `ValueError` if they are long skips and skipdit added
    none to the model."""
    if config.on == "blocks":
        return nn.ModuleList(block for blocks in model.units() for block in blocks)
    long_skips = long_skips_of(model)
    if not long_skips:
        raise ValueError("a spectral constraint on long skips needs a model with long skips: or set on 'blocks'")
    return nn.ModuleList(long_skips)


def long_skips_of(model: LongSkipModel) -> list[nn.Module]:
    """Return the `LongSkip` of each target unit, innermost pair first."""
    return [block.get_submodule("long_skip") for block in model.unit_entries() if block.long_skip is not None]


def freeze_all_but_long_skips(model: LongSkipModel) -> None:
    """Freeze everything but the long skips; `ValueError` if the model has none of ours."""
    long_skips = long_skips_of(model)
    if not long_skips:
        raise ValueError(
            "the stage long-skips-only needs a model with long skips that skipdit added: set model.long_skip"
        )
    model.requires_grad_(False)
    for long_skip in long_skips:
        long_skip.requires_grad_(True)


def unit_gradient_norms(model: LongSkipModel, device: torch.device) -> Tensor:
    """Return (num_units,) on the device: the gradient norm of each unit, including its long skip; 0 if it has no
    gradient."""
    groups = ([parameter for block in blocks for parameter in block.parameters()] for blocks in model.units())
    return gradient_norms(groups, device)
