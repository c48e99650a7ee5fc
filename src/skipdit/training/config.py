"""The settings of a training run."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Union, get_args

import tyro
from torch import nn

from skipdit.data.clips import ClipConfig
from skipdit.data.latents import LatentConfig
from skipdit.data.pictures import DataConfig
from skipdit.diffusion import Objective
from skipdit.models.long_skip import LongSkipModel
from skipdit.options import check_numbers, check_positive
from skipdit.tasks import TASKS
from skipdit.tasks.class_to_image import ModelConfig
from skipdit.tasks.training import TransformerConfig
from skipdit.training.routing import TokenRoutingConfig

Precision = Literal["auto", "no", "bf16", "fp16"]
Parallel = Literal["ddp", "fsdp"]
RateSchedule = Literal["constant", "cosine"]
Constraint = Literal["cap", "penalty"]
Constrained = Literal["long_skips", "blocks"]
ReleaseDType = Literal["float32", "bfloat16"]
OnDevice = Literal["auto", "yes", "no"]
Stage = Literal["full", "long-skips-only"]

if TYPE_CHECKING:
    AnyModelConfig = TransformerConfig
else:
    AnyModelConfig = Union[tuple(task.model_config for task in TASKS.values())]  # noqa: UP007

MAX_WORKERS = 256  # each is a process
MAX_SEED = 2**31 - 1  # so that (seed, step, rank) fits into the 64 bits of a generator's seed


@dataclass(frozen=True, kw_only=True)
class SpectralConfig:
    """A constraint on spectral norms."""

    maximum: float = 1.0
    """what they may be"""
    form: Constraint = "cap"
    """a cap that always holds, or a penalty of penalty_weight times the squared excess"""
    penalty_weight: float = 0.1
    """of the penalty in the loss"""
    on: Constrained = "long_skips"
    """the projections of the long skips, or all layers of all blocks"""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.maximum <= 0 or self.penalty_weight <= 0:
            raise ValueError(
                f"maximum and penalty_weight must be above 0, got {self.maximum} and {self.penalty_weight}"
            )
        for name, allowed in (("form", Constraint), ("on", Constrained)):
            _check_allowed(self, name, get_args(allowed))

    def modules(self, model: LongSkipModel) -> nn.ModuleList:
        """Return what is constrained; `ValueError` where the model has no long skips of ours."""
        if self.on == "blocks":
            return nn.ModuleList(block for blocks in model.units() for block in blocks)
        long_skips = long_skips_of(model)
        if not long_skips:
            raise ValueError("a spectral constraint on long skips needs a model with long skips: or set on 'blocks'")
        return nn.ModuleList(long_skips)


def long_skips_of(model: LongSkipModel) -> list[nn.Module]:
    """Return the `LongSkip` of each target unit, innermost pair first."""
    return [block.get_submodule("long_skip") for block in model.unit_entries() if block.long_skip is not None]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run."""

    data: tyro.conf.AvoidSubcommands[DataConfig | ClipConfig | LatentConfig] = field(default_factory=DataConfig)
    """what is learned"""
    model: tyro.conf.AvoidSubcommands[AnyModelConfig] = field(default_factory=ModelConfig)
    """what learns it"""
    objective: Objective = field(default_factory=Objective)
    """what the model predicts"""
    spectral: SpectralConfig | None = None
    """a constraint on spectral norms"""
    routing: TokenRoutingConfig = field(default_factory=TokenRoutingConfig)
    """tokens that pass by the deep units in training"""
    start_from: str | None = None
    """a model to go on from, a folder or a checkpoint; it gets the long skips that `model` asks for where it has none,
    and the size of the data where that is another"""
    stage: Stage = "full"
    """train everything, or the long skips alone, as the first stage of a conversion"""
    max_steps: int = 10_000
    """steps of the whole run"""
    batch_size: int = 32
    """pictures or clips per step, over all processes"""
    num_accumulation_steps: int = 1
    """forward passes that a process splits its part of a batch into"""
    learning_rate: float = 1e-4
    """the highest rate"""
    rate_schedule: RateSchedule = "cosine"
    """after the warm-up: constant, or a cosine down to a hundredth"""
    warmup_steps: int = 200
    """steps in which the rate rises linearly from 0"""
    weight_decay: float = 0.0
    """of AdamW"""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """of AdamW: how slowly its two moments forget"""
    gradient_clip: float = 1.0
    """largest norm of the gradient, 0 for any"""
    gradient_guard: float = 0.0
    """leave out each step whose gradient norm is above so many times the median of the last 100, 0 for none"""
    ema_decay: float = 0.9995
    """of the averaged weights, which are sampled and released; with a warm-up"""
    ema_snapshots_every: int = 0
    """steps between snapshots of two more averages, from which `skipdit ema` makes one of any length after training,
    0 for none"""
    label_dropout: float = 0.1
    """share of labels or captions that are left out, which guidance needs"""
    flip: bool = False
    """mirror half of all pictures"""
    precision: Precision = "auto"
    """auto is bf16 where the hardware computes in it; fp16 comes with a scale of the loss that adapts"""
    parallel: Parallel = "ddp"
    """of several processes, whether each holds the whole model (ddp), or its part of every weight, gradient, moment and
    average (fsdp: torch's FSDP2, a unit at a time)"""
    gradient_checkpointing: bool = False
    """compute blocks again in the backward pass instead of storing what they need"""
    compile: bool = False
    """compile the model"""
    data_on_device: OnDevice = "auto"
    """keep all data on the device; auto where it fits into a quarter of the free memory and num_workers is not given"""
    num_workers: int | None = None
    """processes that load other data ahead, 0 for none; by default on a GPU one per core, on a CPU none"""
    seed: int = 0
    """of all that is random"""
    log_every: int = 10
    """steps between lines of the log"""
    tensorboard: bool = False
    """write what the log says, and the grids, for TensorBoard, too"""
    sample_every: int = 500
    """steps between grids of samples, 0 for none"""
    num_samples: int = 16
    """pictures or clips in a grid"""
    sample_steps: int = 25
    """denoising steps of a grid"""
    sample_guidance_scale: float = 2.0
    """guidance of a grid, none at 1"""
    checkpoint_every: int = 500
    """steps between checkpoints"""
    num_checkpoints: int = 2
    """how many of the last checkpoints stay"""
    release_dtype: ReleaseDType = "float32"
    """of the weights in the finished pipeline"""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_positive(self, "max_steps", "batch_size", "num_accumulation_steps")
        check_positive(self, "log_every", "checkpoint_every", "num_checkpoints")
        for name, allowed in (
            ("precision", Precision),
            ("rate_schedule", RateSchedule),
            ("release_dtype", ReleaseDType),
            ("stage", Stage),
            ("data_on_device", OnDevice),
            ("parallel", Parallel),
        ):
            _check_allowed(self, name, get_args(allowed))
        if not 1 <= self.sample_steps <= 1000 or self.num_samples < 1:
            raise ValueError(
                f"a grid needs samples and 1 to 1000 steps, got {self.num_samples} and {self.sample_steps}"
            )
        for name in (
            "warmup_steps",
            "weight_decay",
            "gradient_clip",
            "sample_every",
            "num_workers",
            "ema_snapshots_every",
        ):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.ema_snapshots_every and self.spectral and self.spectral.form == "cap":
            raise ValueError(
                "ema_snapshots_every: an average of capped weights is not capped: set spectral.form to 'penalty'"
            )
        if self.compile and self.parallel == "fsdp":
            raise ValueError("compile makes whole graphs, which parallel fsdp breaks at each unit: set one of them")
        if self.gradient_guard and self.gradient_guard <= 1:
            raise ValueError(f"gradient_guard must be above 1, or 0 for none, got {self.gradient_guard}")
        if self.spectral and self.stage == "long-skips-only" and self.spectral.on == "blocks":
            raise ValueError("in the stage long-skips-only the blocks are frozen: set spectral.on to 'long_skips'")
        if (self.num_workers or 0) > MAX_WORKERS:
            raise ValueError(f"num_workers must be at most {MAX_WORKERS}, got {self.num_workers}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("label_dropout", "ema_decay", "adam_betas"):
            value = getattr(self, name)
            if not all(0 <= each < 1 for each in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if self.seed > MAX_SEED:
            raise ValueError(f"seed must be at most {MAX_SEED}, got {self.seed}")


def _check_allowed(config: SpectralConfig | TrainConfig, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Return the rate of a step: linear warm-up from 0, then constant or a cosine down to a hundredth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.rate_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
