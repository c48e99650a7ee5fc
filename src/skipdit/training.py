"""The training loop: one readable pass over accelerate, with exact resume.

Step s draws everything random (which pictures, flips, dropped labels, timesteps, noise) from (seed, rank, s) alone,
so a run that is resumed from a checkpoint goes on exactly as if it had never stopped.
"""

import copy
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from skipdit.data import DataConfig, LabelledPictures, ShuffledForever, open_pictures
from skipdit.diffusion import SCHEDULERS, Objective, make_scheduler, sample_timesteps, training_loss
from skipdit.files import atomic_file, atomic_folder
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig
from skipdit.pictures import labelled_grid
from skipdit.pipelines import ClassToImagePipeline

Precision = Literal["auto", "no", "bf16"]
RateSchedule = Literal["constant", "cosine"]
ReleaseDType = Literal["float32", "bfloat16"]

RELEASE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_SHARD_SIZE = "14MB"  # a file


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes of a DiT; classes and pixels come from the data."""

    num_layers: int = 12
    num_attention_heads: int = 6
    attention_head_dim: int = 64
    patch_size: int = 8
    long_skip: LongSkipConfig | None = field(default_factory=LongSkipConfig)

    def build(self, pictures: LabelledPictures, objective: Objective) -> DiT:
        return DiT(
            sample_size=pictures.size,
            patch_size=self.patch_size,
            in_channels=3,
            out_channels=6 if objective.learned_variance else 3,
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            attention_head_dim=self.attention_head_dim,
            num_classes=len(pictures.label_names),
            long_skip=self.long_skip,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run.

    batch_size: pictures a step over all processes. num_accumulation_steps: forward passes it is split into a process.
    rate_schedule, warmup_steps: linear from 0, then constant or a cosine down to a hundredth of learning_rate.
    gradient_clip: largest norm of the gradient, 0 for none. ema_decay: of the averaged weights that are sampled and
    released, with warm-up. label_dropout: share of labels replaced by the null class. flip: mirror half of the pictures.
    precision: auto is bf16 where the hardware computes in it. compile: compile the model. sample_every: steps between
    grids of num_samples pictures, 0 for none. checkpoint_every: steps between checkpoints, of which the last
    num_checkpoints stay. release_dtype: of the weights in the finished pipeline.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: Objective = field(default_factory=Objective)
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
    sample_guidance_scale: float = 2.5
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
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
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


def computes_in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether products are computed in bf16: `"auto"` says yes where the device has instructions for it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def step_generator(config: TrainConfig, rank: int, step: int) -> torch.Generator:
    """The source of all that is random in one step of one process."""
    return torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 4099 + rank)


@dataclass(frozen=True)
class Batch:
    """x_start (b c h w) in [-1, 1], noise of its shape, timesteps (b), class_labels (b), some the null class."""

    x_start: Tensor
    noise: Tensor
    timesteps: Tensor
    class_labels: Tensor


def prepare_batch(
    pictures: Tensor,
    labels: Tensor,
    config: TrainConfig,
    null_label: int,
    generator: torch.Generator,
    device: torch.device,
) -> Batch:
    """Draws what one step adds to its pictures, on the CPU, so that every device sees the same numbers."""
    size = len(pictures)
    if config.flip:
        flipped = torch.rand(size, generator=generator) < 0.5
        pictures = torch.where(flipped[:, None, None, None], pictures.flip(-1), pictures)
    dropped = torch.rand(size, generator=generator) < config.label_dropout
    batch = Batch(
        x_start=pictures,
        noise=torch.randn(pictures.shape, generator=generator),
        timesteps=sample_timesteps(config.objective, size, generator),
        class_labels=torch.where(dropped, null_label, labels),
    )
    return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(batch).items()})


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: safetensors and JSON only


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> None:
    """Writes `checkpoint-{step}` whole or not at all, then deletes all but the last few."""
    names = [name for name, _ in model.named_parameters()]
    moments = {
        f"{names[index]}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    with atomic_folder(folder / f"checkpoint-{step:07d}") as draft:
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


def load_checkpoint(path: Path, model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer) -> int:
    """Restores weights, averages and moments; returns the number of steps done. `ValueError` where sizes differ."""
    parameters = dict(model.named_parameters())
    weights, averages, moments = (load_file(path / f"{name}.safetensors") for name in ("model", "ema", "optimizer"))
    if {name: tensor.shape for name, tensor in weights.items()} != {name: p.shape for name, p in parameters.items()}:
        raise ValueError(f"{path} holds another model than this config builds: change --out, or pass --no-resume")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    ema.shadow_params = [averages[name].to(parameter.device) for name, parameter in parameters.items()]
    ema.optimization_step = state["ema_step"]
    by_index = {
        index: {key.removeprefix(f"{name}."): value for key, value in moments.items() if key.rpartition(".")[0] == name}
        for index, name in enumerate(parameters)
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {i: entry for i, entry in by_index.items() if entry}})
    return state["step"]


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def train(config: TrainConfig, out: Path, *, resume: bool = True, device: str | None = None) -> Path:
    """Trains, and returns the folder of the finished pipeline with the averaged weights, `out/pipeline`.

    Also in `out`: `config.json`, `log.jsonl`, `samples/step-*.png`, `checkpoint-*`. With `resume`, goes on from the
    last checkpoint there. device: `"cpu"` keeps a run off the GPU; by default accelerate chooses.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    accelerator = Accelerator(cpu=target.type == "cpu")
    bf16 = computes_in_bf16(config.precision, target)
    num_parts = accelerator.num_processes * config.num_accumulation_steps
    if config.batch_size % num_parts:
        raise ValueError(
            f"batch_size must be divisible by processes x accumulation steps = {num_parts}, got {config.batch_size}"
        )

    pictures = open_pictures(config.data)
    torch.manual_seed(config.seed)
    model = config.model.build(pictures, config.objective).to(accelerator.device).train()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    ema = EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    checkpoints = list_checkpoints(out) if resume else []
    first_step = load_checkpoint(checkpoints[-1], model, ema, optimizer) if checkpoints else 0
    if config.compile:
        model.compile()
    wrapped = accelerator.prepare_model(model)
    batches = iter(_loader(pictures, config, accelerator, first_step))

    with _Reporter(accelerator, config, out, first_step) as report:
        for step in range(first_step, config.max_steps):
            rate = learning_rate_at(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate

            generator = step_generator(config, accelerator.process_index, step)
            loss = torch.zeros((), device=accelerator.device)
            for part in range(config.num_accumulation_steps):
                part_pictures, labels = next(batches)
                batch = prepare_batch(
                    part_pictures, labels, config, model.null_class_label, generator, accelerator.device
                )
                last_part = part == config.num_accumulation_steps - 1
                with nullcontext() if last_part else accelerator.no_sync(wrapped):
                    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
                        part_loss = _loss(wrapped, config.objective, batch) / config.num_accumulation_steps
                    accelerator.backward(part_loss)
                loss += part_loss.detach()

            norm = cast(Tensor, accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip or math.inf))
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model.parameters())

            done, last = step + 1, step + 1 == config.max_steps
            if done % config.log_every == 0 or last:
                mean_loss = cast(Tensor, accelerator.reduce(loss, reduction="mean"))
                report(done, mean_loss.item(), float(norm), rate)
            if accelerator.is_main_process and (done % config.checkpoint_every == 0 or last):
                save_checkpoint(out, done, model, ema, optimizer, config)
            if accelerator.is_main_process and config.sample_every and (done % config.sample_every == 0 or last):
                with averaged(ema, model):
                    save_samples(
                        out / "samples" / f"step-{done:07d}.png", make_pipeline(model, config, pictures), config
                    )
            accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        with averaged(ema, model), atomic_folder(out / "pipeline") as draft:
            released = copy.deepcopy(model).to(RELEASE_DTYPES[config.release_dtype])
            make_pipeline(released, config, pictures).save_pretrained(draft, max_shard_size=MAX_SHARD_SIZE)
    accelerator.wait_for_everyone()
    return out / "pipeline"


def _loss(model: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return model(noisy, timesteps, class_labels=batch.class_labels).sample

    return training_loss(predict, objective, batch.x_start, batch.noise, batch.timesteps).loss.mean()


def _loader(pictures: LabelledPictures, config: TrainConfig, accelerator: Accelerator, first_step: int) -> DataLoader:
    """Endless batches of one process, from where `first_step` begins."""
    sampler = ShuffledForever(
        len(pictures), config.seed, first_step * config.batch_size, accelerator.process_index, accelerator.num_processes
    )
    size = config.batch_size // accelerator.num_processes // config.num_accumulation_steps
    return DataLoader(pictures, batch_size=size, sampler=sampler, num_workers=config.num_workers)


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


def make_pipeline(model: DiT, config: TrainConfig, pictures: LabelledPictures) -> ClassToImagePipeline:
    """The pipeline that samples what this config trains."""
    scheduler = make_scheduler(config.objective, SCHEDULERS[config.objective.process][0])
    pipeline = ClassToImagePipeline(
        model, scheduler, id2label={str(label): name for label, name in enumerate(pictures.label_names)}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_samples(path: Path, pipeline: ClassToImagePipeline, config: TrainConfig) -> None:
    """A labelled grid, of classes spread over the list, from the run's seed."""
    names = list(pipeline.labels)
    chosen = [names[index * len(names) // config.num_samples] for index in range(config.num_samples)]
    images = pipeline(
        pipeline.get_label_ids(chosen),
        guidance_scale=config.sample_guidance_scale,
        num_inference_steps=config.sample_steps,
        generator=torch.Generator().manual_seed(config.seed),
    ).images
    with atomic_file(path) as draft:
        labelled_grid(images, chosen).save(draft)


class _Reporter:
    """`config.json`, `log.jsonl` and the progress bar, in the main process only."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, out: Path, first_step: int) -> None:
        self.enabled, self.config, self.out, self.first_step = accelerator.is_main_process, config, out, first_step

    def __enter__(self) -> "_Reporter":
        if self.enabled:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.json").write_text(json.dumps(asdict(self.config), indent=1), encoding="utf-8")
            path = self.out / "log.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= self.first_step]
            self.log = path.open("w", encoding="utf-8")
            self.log.writelines(f"{line}\n" for line in kept)
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

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            self.progress.stop()
            self.log.close()

    def __call__(self, step: int, loss: float, gradient_norm: float, learning_rate: float) -> None:
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
                json.dumps(entry | {"learning_rate": learning_rate, "images_per_second": round(speed, 2)}) + "\n"
            )
            self.log.flush()
            self.progress.update(self.task, completed=step, description=f"loss {loss:.4f}")
