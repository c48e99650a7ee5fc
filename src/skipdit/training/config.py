"""The settings of a training run; nothing heavy is imported."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, Union

import tyro

from skipdit.data.config import ClipConfig, DataConfig, LatentConfig
from skipdit.options import check_above, check_fields, check_range
from skipdit.options.objective import Objective
from skipdit.tasks.config import MODEL_CONFIGS, ModelConfig, TransformerConfig

Precision = Literal["auto", "no", "bf16", "fp16"]
Parallel = Literal["ddp", "fsdp"]
RateSchedule = Literal["constant", "cosine"]
Constraint = Literal["cap", "penalty"]
Constrained = Literal["long_skips", "blocks"]
ReleaseDType = Literal["float32", "bfloat16"]
OnDevice = Literal["auto", "yes", "no"]
Stage = Literal["full", "long-skips-only"]
RoutingMode = Literal["off", "bypass", "fill"]
GridSteps = Annotated[int, tyro.conf.arg(aliases=("--sample-steps",))]

if TYPE_CHECKING:
    AnyModelConfig = TransformerConfig
else:
    AnyModelConfig = Union[MODEL_CONFIGS]  # noqa: UP007

MAX_WORKERS = 256  # processes
MAX_SEED = 2**31 - 1  # so that (seed, step, rank) fits into the 64 bits of a generator's seed


@dataclass(frozen=True, kw_only=True)
class SpectralConfig:
    """A constraint on spectral norms."""

    maximum: float = 1.0
    """the largest norm allowed"""
    form: Constraint = "cap"
    """cap: no norm ever exceeds the maximum; penalty: the loss grows with the squared excess"""
    penalty_weight: float = 0.1
    """weight of the squared excess in the loss"""
    on: Constrained = "long_skips"
    """what to constrain: the projections of the long skips, or all layers of all blocks"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_above(self, "maximum", "penalty_weight")


@dataclass(frozen=True, kw_only=True)
class TokenRoutingConfig:
    """The tokens that the deep units see in training."""

    mode: RoutingMode = "off"
    """how the tokens that the deep units do not see return: bypass, as they were before these units; fill, as a single
    learned vector, which needs long skips; off: all units see all tokens"""
    share: float = 0.25
    """share of the tokens that the deep units see, drawn for each sample and step"""
    num_shallow_units: int | None = None
    """number of first units, and of last units, that see all tokens; by default 2, or 1 in a model of fewer than 5"""
    deep_drop: float = 0.05
    """share of the steps, before the dense end, in which no token passes through the deep units"""
    dense_end: float = 0.2
    """share of the run's FLOPs, at its end, in which all units see all tokens"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, "num_shallow_units")
        check_range(self, "dense_end", least=0, most=1)
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
        if not 0 <= self.deep_drop < 1:
            raise ValueError(f"deep_drop must be in [0, 1), got {self.deep_drop}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run."""

    data: tyro.conf.AvoidSubcommands[DataConfig | ClipConfig | LatentConfig] = field(default_factory=DataConfig)
    """the pictures, clips or latents to learn from"""
    model: tyro.conf.AvoidSubcommands[AnyModelConfig] = field(default_factory=ModelConfig)
    """the sizes of the model"""
    objective: Objective = field(default_factory=Objective)
    """the prediction target of the model, and its weight in training"""
    spectral: SpectralConfig | None = None
    """a constraint on spectral norms"""
    routing: TokenRoutingConfig = field(default_factory=TokenRoutingConfig)
    """tokens that skip the deep units in training"""
    start_from: str | None = None
    """model to start from, a folder or a checkpoint; it gets the long skips of `model` if it has none, and is resized
    to the data if its size differs"""
    stage: Stage = "full"
    """train everything, or only the long skips, as the first stage of a conversion"""
    max_steps: int = 10_000
    """training steps of the whole run"""
    batch_size: int = 32
    """pictures or clips per step, over all processes"""
    num_accumulation_steps: int = 1
    """forward passes into which each process splits its share of a batch"""
    learning_rate: float = 1e-4
    """peak learning rate"""
    rate_schedule: RateSchedule = "cosine"
    """after the warm-up: constant, or a cosine down to a hundredth of the peak"""
    warmup_steps: int = 200
    """steps over which the rate rises linearly from 0"""
    weight_decay: float = 0.0
    """weight decay of AdamW"""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """decay rates of the two moments of AdamW"""
    gradient_clip: float = 1.0
    """clip the gradient to this norm; 0 disables clipping"""
    gradient_guard: float = 0.0
    """skip each step whose gradient norm exceeds this many times the median of the last 100; 0 disables the guard"""
    ema_decay: float = 0.9995
    """decay, after a warm-up, of the averaged weights, which are sampled and released"""
    ema_snapshots_every: int = 0
    """steps between snapshots of two more averages, from which `skipdit ema` makes an average of any length after the
    training; 0 takes none"""
    label_dropout: float = 0.1
    """share of labels or captions to drop, needed for guidance"""
    flip: bool = False
    """mirror each picture or clip with probability 1/2"""
    precision: Precision = "auto"
    """auto is bf16 if the hardware supports it; fp16 scales the loss and adapts the scale"""
    parallel: Parallel = "ddp"
    """how several processes share the model: each has all of it (ddp), or a shard of every weight, gradient, moment and
    average (fsdp: torch's FSDP2, unit by unit)"""
    gradient_checkpointing: bool = False
    """recompute blocks in the backward pass instead of storing their activations"""
    compile: bool = False
    """compile the model, one whole graph per kind of step"""
    data_on_device: OnDevice = "auto"
    """keep all data on the device; auto does if it fits into a quarter of the free memory and num_workers is not set"""
    num_workers: int | None = None
    """processes that load data ahead if it is not on the device; by default one per core on a GPU, none on a CPU"""
    seed: int = 0
    """seed of all random numbers"""
    log_every: int = 10
    """training steps between lines of the log"""
    tensorboard: bool = False
    """also write the log and the grids for TensorBoard"""
    sample_every: int = 500
    """training steps between grids of samples; 0 disables them"""
    num_samples: int = 16
    """pictures or clips per grid"""
    num_inference_steps: GridSteps = 25
    """denoising steps of the samples in a grid"""
    sample_guidance_scale: float = 2.0
    """guidance scale of the samples in a grid; 1 disables guidance"""
    checkpoint_every: int = 500
    """training steps between checkpoints"""
    num_checkpoints: int = 2
    """how many of the latest checkpoints to keep"""
    release_dtype: ReleaseDType = "float32"
    """dtype of the weights in the finished pipeline"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, "max_steps", "batch_size", "num_accumulation_steps")
        check_range(self, "log_every", "checkpoint_every", "num_checkpoints", "num_samples")
        check_range(self, "num_inference_steps", most=1000)
        check_range(self, "weight_decay", "gradient_clip", "warmup_steps", "sample_every", least=0)
        check_range(self, "ema_snapshots_every", least=0)
        check_above(self, "learning_rate")
        check_range(self, "num_workers", least=0, most=MAX_WORKERS)
        check_range(self, "seed", least=0, most=MAX_SEED)
        if self.ema_snapshots_every and self.spectral and self.spectral.form == "cap":
            raise ValueError(
                "an average of capped weights is not capped: with ema_snapshots_every, set spectral.form to 'penalty'"
            )
        if self.compile and self.parallel == "fsdp":
            raise ValueError(
                "compile makes whole graphs, which parallel fsdp breaks at each unit: set only one of them"
            )
        if self.gradient_guard and self.gradient_guard <= 1:
            raise ValueError(f"gradient_guard must be above 1, or 0 for none, got {self.gradient_guard}")
        if self.spectral and self.stage == "long-skips-only" and self.spectral.on == "blocks":
            raise ValueError("in the stage long-skips-only the blocks are frozen: set spectral.on to 'long_skips'")
        shares = {"label_dropout": (self.label_dropout,), "ema_decay": (self.ema_decay,), "adam_betas": self.adam_betas}
        for name, values in shares.items():
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: a linear warm-up from 0, then constant or a cosine down to a hundredth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.rate_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
