"""The training loop: one readable pass over accelerate, with exact resume.

Step s draws everything random (which pictures, flips, dropped labels, timesteps, noise) from (seed, rank, s) alone,
so a run that is resumed from a checkpoint goes on exactly as if it had never stopped.
"""

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import tyro
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from skipdit.checkpoints import load_model
from skipdit.clips import ClipConfig
from skipdit.data import DataConfig, ShuffledForever
from skipdit.diffusion import Objective, sample_timesteps, training_loss
from skipdit.files import atomic_file, atomic_folder
from skipdit.models.long_skip import LongSkipModel
from skipdit.pictures import labelled_grid, to_pictures
from skipdit.samplers import Sampler
from skipdit.spectral import cap_spectral_norm, fold_spectral_caps, spectral_penalty
from skipdit.tasks import (
    ModelConfig,
    TextToImageModelConfig,
    TextToVideoModelConfig,
    Trainee,
    VideoModelConfig,
    make_task_scheduler,
    open_items,
)
from skipdit.videos import frame_grid

Precision = Literal["auto", "no", "bf16"]
RateSchedule = Literal["constant", "cosine"]
Constraint = Literal["cap", "penalty"]
Constrained = Literal["long_skips", "blocks"]
ReleaseDType = Literal["float32", "bfloat16"]
Stage = Literal["full", "long-skips-only"]
AnyModelConfig = ModelConfig | VideoModelConfig | TextToImageModelConfig | TextToVideoModelConfig

RELEASE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_SHARD_SIZE = "14MB"  # a file


@dataclass(frozen=True, kw_only=True)
class SpectralConfig:
    """A constraint on spectral norms. maximum: what they may be. form: a cap that always holds, or a penalty of
    `penalty_weight` times the squared excess. on: the projections of the long skips, or all layers of all blocks.
    """

    maximum: float = 1.0
    form: Constraint = "cap"
    penalty_weight: float = 0.1
    on: Constrained = "long_skips"

    def __post_init__(self) -> None:
        if not 0 < self.maximum < math.inf or self.penalty_weight <= 0:
            raise ValueError(
                f"maximum and penalty_weight must be above 0, got {self.maximum} and {self.penalty_weight}"
            )
        for name, allowed in (("form", Constraint), ("on", Constrained)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")

    def modules(self, model: LongSkipModel) -> nn.ModuleList:
        """What is constrained; `ValueError` where the model has no long skips of ours."""
        if self.on == "blocks":
            return nn.ModuleList(block for blocks in model.units() for block in blocks)
        long_skips = long_skips_of(model)
        if not long_skips:
            raise ValueError("a spectral constraint on long skips needs a model with long skips: or set on 'blocks'")
        return nn.ModuleList(long_skips)


def long_skips_of(model: LongSkipModel) -> list[nn.Module]:
    """The `LongSkip` of each target unit, innermost pair first."""
    return [block.get_submodule("long_skip") for block in model.unit_entries() if block.long_skip is not None]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run.

    start_from: a model to go on from, a folder or a checkpoint; it gets the long skips that `model` asks for where it
    has none. stage: train everything, or the long skips alone, as the first stage of a conversion. batch_size: pictures
    or clips a step over all processes. num_accumulation_steps: forward passes it is split into a process.
    rate_schedule, warmup_steps: linear from 0, then constant or a cosine down to a hundredth of learning_rate.
    gradient_clip: largest norm of the gradient, 0 for none. flip: mirror half of all pictures. ema_decay: of the
    averaged weights that are sampled and released, with warm-up. spectral: a constraint on spectral norms.
    label_dropout: share of labels made the null class. precision: auto is bf16 where the hardware computes in it.
    compile: compile the model. sample_every: steps between grids of num_samples pictures, 0 for none. checkpoint_every:
    steps between checkpoints, of which the last num_checkpoints stay. release_dtype: of the weights in the finished
    pipeline.
    """

    data: tyro.conf.AvoidSubcommands[DataConfig | ClipConfig] = field(default_factory=DataConfig)
    model: tyro.conf.AvoidSubcommands[AnyModelConfig] = field(default_factory=ModelConfig)
    objective: Objective = field(default_factory=Objective)
    spectral: SpectralConfig | None = None
    start_from: str | None = None
    stage: Stage = "full"
    max_steps: int = 10_000
    batch_size: int = 32
    num_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    rate_schedule: RateSchedule = "cosine"
    warmup_steps: int = 200
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    ema_decay: float = 0.9995
    label_dropout: float = 0.1
    flip: bool = False
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    num_workers: int = 0
    seed: int = 0
    log_every: int = 10
    sample_every: int = 500
    num_samples: int = 16
    sample_steps: int = 25
    sample_guidance_scale: float = 2.0
    checkpoint_every: int = 500
    num_checkpoints: int = 2
    release_dtype: ReleaseDType = "float32"

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "num_accumulation_steps",
            "log_every",
            "checkpoint_every",
            "num_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, allowed in (
            ("precision", Precision),
            ("rate_schedule", RateSchedule),
            ("release_dtype", ReleaseDType),
            ("stage", Stage),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        if not 1 <= self.sample_steps <= 1000 or self.num_samples < 1:
            raise ValueError(
                f"a grid needs samples and 1 to 1000 steps, got {self.num_samples} and {self.sample_steps}"
            )
        for name in ("warmup_steps", "weight_decay", "gradient_clip", "sample_every", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.spectral and self.stage == "long-skips-only" and self.spectral.on == "blocks":
            raise ValueError("in the stage long-skips-only the blocks are frozen: set spectral.on to 'long_skips'")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("label_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up from 0, then constant or a cosine down to a hundredth of the rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.rate_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def resolve_device(name: str) -> torch.device:
    """`"auto"` is CUDA where there is one; `ValueError` on a device this machine has not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return device


def computes_in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether products are computed in bf16: `"auto"` says yes where the device has instructions for it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def start_processes(target: torch.device) -> Accelerator:
    """The process group on this device; `ValueError` where accelerate ends up on another one or in fewer processes."""
    accelerator = Accelerator(cpu=target.type == "cpu", mixed_precision="no", gradient_accumulation_steps=1)
    if accelerator.device.type != target.type or target.index not in (None, accelerator.device.index):
        raise ValueError(f"device {target} was asked for, but training would run on {accelerator.device}")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ValueError(f"{started} processes were started, but only {accelerator.num_processes} can work together")
    return accelerator


def step_generator(config: TrainConfig, rank: int, step: int) -> torch.Generator:
    """The source of all that is random in one step of one process."""
    return torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 4099 + rank)


@dataclass(frozen=True)
class Batch:
    """x_start (b c h w) or (b f c h w) in [-1, 1], noise of its shape, timesteps (b), labels (b) or (b n): classes or
    captions, some of them null."""

    x_start: Tensor
    noise: Tensor
    timesteps: Tensor
    labels: Tensor


def prepare_batch(
    pixels: Tensor,
    labels: Tensor,
    config: TrainConfig,
    task: Trainee,
    generator: torch.Generator,
    device: torch.device,
) -> Batch:
    """Draws what one step adds to its pictures or clips, on the CPU, so that every device sees the same numbers."""
    size = len(pixels)
    if config.flip:
        flipped = torch.rand(size, generator=generator) < 0.5
        pixels = torch.where(flipped.view(-1, *[1] * (pixels.ndim - 1)), pixels.flip(-1), pixels)
    if task.num_variants > 1:
        labels = labels * task.num_variants + torch.randint(task.num_variants, (size,), generator=generator)
    dropped = torch.rand(size, generator=generator) < config.label_dropout
    batch = Batch(
        x_start=pixels,
        noise=torch.randn(pixels.shape, generator=generator),
        timesteps=sample_timesteps(config.objective, size, generator),
        labels=torch.where(dropped.view(-1, *[1] * (labels.ndim - 1)), task.null_label, labels),
    )
    return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(batch).items()})


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: safetensors and JSON only


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> None:
    """Writes `checkpoint-{step}` whole or not at all, then deletes all but the last few."""
    names = [name for name, _ in model.named_parameters()]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    moments = {
        f"{trained[index]}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    with atomic_folder(folder / f"checkpoint-{step:07d}", "checkpoint") as draft:
        save_file(
            {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()},
            draft / "model.safetensors",
        )
        save_file(dict(zip(names, ema.shadow_params, strict=True)), draft / "ema.safetensors")
        save_file(moments, draft / "optimizer.safetensors")
        (draft / "state.json").write_text(
            json.dumps({"step": step, "ema_step": ema.optimization_step, "config": asdict(config)}, indent=1)
        )
    for old in list_checkpoints(folder)[: -config.num_checkpoints]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*") if path.is_dir())


# what may change when a run goes on
FREE_TO_CHANGE = {"max_steps", "log_every", "sample_every", "num_samples", "sample_steps", "sample_guidance_scale"}
FREE_TO_CHANGE |= {"checkpoint_every", "num_checkpoints", "num_workers", "release_dtype"}


def load_checkpoint(
    path: Path, model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> int:
    """Restores weights, averages and moments; returns the number of steps done.

    `ValueError` where the checkpoint is damaged, belongs to another config, or has more steps than this one.
    """
    parameters = dict(model.named_parameters())
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        weights, averages, moments = (load_file(path / f"{name}.safetensors") for name in ("model", "ema", "optimizer"))
        settings = json.loads(json.dumps(asdict(config)))
        changed = [name for name, value in settings.items() if state["config"].get(name) != value]
        step, ema_step = int(state["step"]), int(state["ema_step"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: delete it, or give another --out ({error})") from error
    forbidden = [name for name in changed if name not in FREE_TO_CHANGE]
    if forbidden or step > config.max_steps:
        what = ", ".join(forbidden) or f"fewer than its {step} steps"
        raise ValueError(f"{path} cannot go on with other settings ({what}): give another --out, or --no-resume")
    for stored in (weights, averages):
        if {name: tensor.shape for name, tensor in stored.items()} != {name: p.shape for name, p in parameters.items()}:
            raise ValueError(f"{path} holds another model than this config builds: give another --out, or --no-resume")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    ema.shadow_params = [averages[name].to(parameter.device) for name, parameter in parameters.items()]
    ema.optimization_step = ema_step
    by_index = {
        index: {key.removeprefix(f"{name}."): value for key, value in moments.items() if key.rpartition(".")[0] == name}
        for index, name in enumerate(name for name, parameter in parameters.items() if parameter.requires_grad)
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {i: entry for i, entry in by_index.items() if entry}})
    return step


def continue_run(
    out: Path,
    resume: bool,
    accelerator: Accelerator,
    model: nn.Module,
    ema: EMAModel,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> int:
    """The step to begin with: after the last checkpoint in `out`, or 0. Without `resume` the checkpoints there go."""
    checkpoints = list_checkpoints(out)
    if checkpoints and resume:
        return load_checkpoint(checkpoints[-1], model, ema, optimizer, config)
    if accelerator.is_main_process:
        for old in checkpoints:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def train(config: TrainConfig, out: Path, *, resume: bool = True, device: str = "auto") -> Path:
    """Trains, and returns the folder of the finished pipeline with the averaged weights, `out/pipeline`.

    Also in `out`: `config.json`, `log.jsonl`, `samples/step-*.png`, `checkpoint-*`. With `resume`, goes on from the
    last checkpoint there. device: `"cpu"`, `"cuda"` or what there is.
    """
    accelerator = start_processes(resolve_device(device))
    bf16 = computes_in_bf16(config.precision, accelerator.device)
    num_parts = accelerator.num_processes * config.num_accumulation_steps
    if config.batch_size % num_parts:
        raise ValueError(
            f"batch_size must be divisible by processes x accumulation steps = {num_parts}, got {config.batch_size}"
        )

    items = open_items(config.data)
    torch.manual_seed(config.seed)
    start = None if config.start_from is None else load_model(config.start_from)
    task = config.model.build(items, config.objective, start)
    model = task.model.to(accelerator.device).train()
    units = cast(LongSkipModel, model)
    if config.stage == "long-skips-only":
        freeze_all_but_long_skips(model)
    constrained = config.spectral.modules(units) if config.spectral else None
    if config.spectral and constrained and config.spectral.form == "cap":
        cap_spectral_norm(constrained, config.spectral.maximum)
    if config.gradient_checkpointing:
        cast(Any, model).enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    ema = EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    first_step = continue_run(out, resume, accelerator, model, ema, optimizer, config)
    if config.compile:
        model.compile()
    wrapped = accelerator.prepare_model(model)
    batches = iter(_loader(task.data, config, accelerator, first_step))

    with _Reporter(accelerator, config, out, first_step) as report:
        for step in range(first_step, config.max_steps):
            rate = learning_rate_at(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate

            generator = step_generator(config, accelerator.process_index, step)
            loss = torch.zeros((), device=accelerator.device)
            for part in range(config.num_accumulation_steps):
                pixels, labels = next(batches)
                batch = prepare_batch(pixels, labels, config, task, generator, accelerator.device)
                last_part = part == config.num_accumulation_steps - 1
                with nullcontext() if last_part else accelerator.no_sync(wrapped):
                    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
                        part_loss = _loss(task, wrapped, config.objective, batch) / config.num_accumulation_steps
                    loss += part_loss.detach()
                    if config.spectral and constrained and config.spectral.form == "penalty":
                        penalty = config.spectral.penalty_weight * spectral_penalty(
                            constrained, config.spectral.maximum
                        )
                        part_loss = part_loss + penalty / config.num_accumulation_steps
                    accelerator.backward(part_loss)

            done, last = step + 1, step + 1 == config.max_steps
            logs = done % config.log_every == 0 or done % config.checkpoint_every == 0 or last
            unit_norms = unit_gradient_norms(units) if logs else []
            limit = config.gradient_clip or torch.finfo(torch.float32).max
            norm = cast(Tensor, accelerator.clip_grad_norm_(model.parameters(), limit))
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model.parameters())

            saves = done % config.checkpoint_every == 0 or last
            shows = config.sample_every > 0 and (done % config.sample_every == 0 or last)
            if logs:
                mean_loss = cast(Tensor, accelerator.reduce(loss, reduction="mean"))
                report(done, mean_loss.item(), float(norm), rate, unit_norms)
            if accelerator.is_main_process and saves:
                save_checkpoint(out, done, model, ema, optimizer, config)
            if accelerator.is_main_process and shows:
                with averaged(ema, model):
                    save_samples(out / "samples" / f"step-{done:07d}.png", task, config)
            if saves or shows:
                accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        with averaged(ema, model), atomic_folder(out / "pipeline", "pipeline") as draft:
            # not model.to: ModelMixin.to warns of every cast
            released = copy.deepcopy(model)
            fold_spectral_caps(released)
            nn.Module.to(released, RELEASE_DTYPES[config.release_dtype])
            sampler = task.sampler(released, make_task_scheduler(config.objective))
            sampler.save(draft, MAX_SHARD_SIZE)
    accelerator.wait_for_everyone()
    return out / "pipeline"


def freeze_all_but_long_skips(model: nn.Module) -> None:
    """Leaves only the long skips to train; `ValueError` where the model has none of ours."""
    long_skips = long_skips_of(cast(LongSkipModel, model))
    if not long_skips:
        raise ValueError(
            "the stage long-skips-only needs a model with long skips that skipdit added: set model.long_skip"
        )
    model.requires_grad_(False)
    for long_skip in long_skips:
        long_skip.requires_grad_(True)


def unit_gradient_norms(model: LongSkipModel) -> list[float]:
    """The norm of the gradient of each unit's parameters, those of its long skip included."""
    norms = []
    for blocks in model.units():
        parameters = [parameter for block in blocks for parameter in block.parameters()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients))
    return torch.stack(norms).tolist()


def _loss(task: Trainee, model: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return task.predict(model, noisy, timesteps, batch.labels)

    return training_loss(predict, objective, batch.x_start, batch.noise, batch.timesteps).loss.mean()


def _loader(data: Dataset, config: TrainConfig, accelerator: Accelerator, first_step: int) -> DataLoader:
    """Endless batches of one process, from where `first_step` begins."""
    sampler = ShuffledForever(
        len(cast(Sized, data)),
        config.seed,
        first_step * config.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    size = config.batch_size // accelerator.num_processes // config.num_accumulation_steps
    return DataLoader(data, batch_size=size, sampler=sampler, num_workers=config.num_workers)


@contextmanager
def averaged(ema: EMAModel, model: nn.Module) -> Iterator[None]:
    """Inside, the model has the averaged weights and is in eval mode."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        ema.restore(model.parameters())
        model.train()


def save_samples(path: Path, task: Trainee, config: TrainConfig) -> None:
    """A labelled grid, of things spread over the data, from the run's seed; of clips some frames each."""
    sampler: Sampler = task.sampler(task.model, make_task_scheduler(config.objective))
    sampler.pipeline.set_progress_bar_config(disable=True)
    wanted, captions = task.showcase(config.num_samples)
    samples = sampler.sample(
        wanted,
        guidance_scale=config.sample_guidance_scale,
        num_inference_steps=config.sample_steps,
        generator=torch.Generator().manual_seed(config.seed),
    ).cpu()
    grid = frame_grid(samples, captions) if samples.ndim == 5 else labelled_grid(to_pictures(samples), captions)
    with atomic_file(path) as draft:
        grid.save(draft)


class _Reporter:
    """`config.json`, `log.jsonl` and the progress bar, in the main process only."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, out: Path, first_step: int) -> None:
        self.enabled, self.config, self.out, self.first_step = accelerator.is_main_process, config, out, first_step

    def __enter__(self) -> "_Reporter":
        if self.enabled:
            self.out.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.out / "config.json") as draft:
                draft.write_text(json.dumps(asdict(self.config), indent=1), encoding="utf-8")
            path = self.out / "log.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            with atomic_file(path) as draft:
                draft.write_text("".join(f"{line}\n" for line in lines if self._is_before(line)), encoding="utf-8")
            self.log = path.open("a", encoding="utf-8")
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.progress = Progress(*columns)
            self.task = self.progress.add_task("training", total=self.config.max_steps, completed=self.first_step)
            self.progress.start()
        self.started = time.perf_counter()
        return self

    def _is_before(self, line: str) -> bool:
        """Whether a line tells of a step that was kept; the last line of a run that was killed may be cut off."""
        with suppress(json.JSONDecodeError):
            return json.loads(line)["step"] <= self.first_step
        return False

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            self.progress.stop()
            self.log.close()

    def __call__(
        self, step: int, loss: float, gradient_norm: float, learning_rate: float, unit_norms: list[float]
    ) -> None:
        """One line of the log; `RuntimeError` where the loss is no longer a number."""
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} at step {step}: lower learning_rate, or set precision 'no'")
        if self.enabled:
            speed = (step - self.first_step) * self.config.batch_size / (time.perf_counter() - self.started)
            entry = {
                "step": step,
                "images": step * self.config.batch_size,
                "loss": loss,
                "gradient_norm": gradient_norm,
            }
            self.log.write(
                json.dumps(
                    entry
                    | {"learning_rate": learning_rate, "images_per_second": round(speed, 2)}
                    | {"unit_gradient_norms": [float(f"{norm:.4g}") for norm in unit_norms]}
                )
                + "\n"
            )
            self.log.flush()
            self.progress.update(self.task, completed=step, description=f"loss {loss:.4f}")
