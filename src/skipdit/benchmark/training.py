"""`skipdit bench train`: pictures per second of the training loop, compared with a simple loop.

There are two workloads: the recipe of the bundled class-to-image model, and a DiT of the paper on random latents. The
loops of a round take turns, and each starts from scratch, so that only one model is in memory at a time.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from skipdit.benchmark.config import Loop, Workload
from skipdit.benchmark.config import TrainBenchConfig as TrainBenchConfig
from skipdit.benchmark.measure import Advance, benchmark, seconds_of
from skipdit.benchmark.models import check_compiler
from skipdit.data.pictures import Draws, LabelledItems, ShuffledForever
from skipdit.diffusion import Objective
from skipdit.environment import SYNCHRONIZE
from skipdit.files.output import OutputFolder
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig
from skipdit.options import Device
from skipdit.report import Report, record, table
from skipdit.tasks.class_to_image import TASK, ClassToImageTraining
from skipdit.tasks.training import TrainingTask
from skipdit.terminal import counting
from skipdit.training import TokenRoutingConfig, TrainConfig
from skipdit.training.batches import batch_loss, find_step_kinds, prepare_batch, step_generator
from skipdit.training.devices import start_processes
from skipdit.training.loader import load_batches
from skipdit.training.loop import Run, build_task

TARGETS = {"emoji": 15_000.0, "latents": 0.4}  # on an H100: pictures per second; share of the rate of bf16 products
MATRIX_SIZES: dict[Device, int] = {"cpu": 1024, "cuda": 8192}
NUM_LATENTS = 512


@dataclass(frozen=True)
class Row:
    """The speed of a loop on a workload."""

    workload: Workload
    loop: Loop
    batch_size: int
    flops: float
    """FLOPs per picture, forward and backward, averaged over kinds of steps"""
    seconds: tuple[float, ...] = ()
    """seconds per step, one per round"""
    losses: tuple[float, ...] = ()
    """loss of the last step of each round"""

    @property
    def pictures_per_second(self) -> float:
        return self.batch_size / median(self.seconds)

    @property
    def flops_per_second(self) -> float:
        return self.flops * self.pictures_per_second


@dataclass(frozen=True)
class RandomLatents(LabelledItems):
    """A data set of random latents (4, 32, 32), one per label, with 1000 classes."""

    latents: Tensor
    labels: Sequence[int]
    size: int = 32
    label_names: list[str] = field(default_factory=lambda: [str(label) for label in range(1000)])

    @property
    def captions(self) -> list[tuple[str, ...]]:
        return [(self.label_names[label],) for label in self.labels]

    def stored(self, index: int) -> tuple[Tensor, int]:
        return self.latents[index], self.labels[index]

    def draw(self, stored: Tensor, flip: bool, draws: Draws) -> Tensor:
        return stored


def make_config(config: TrainBenchConfig, workload: Workload, recipe: TrainConfig) -> TrainConfig:
    """Return the settings of a run on a workload, with routing that does not become dense at the end."""
    settings = {"batch_size": config.batch_size(workload), "seed": config.seed, "max_steps": 10**6, "compile": False}
    if workload == "latents":
        recipe = TrainConfig(objective=Objective(), learning_rate=1e-4)
    return replace(recipe, **settings, routing=TokenRoutingConfig(mode="bypass", dense_end=0.0))


def make_task(config: TrainBenchConfig, workload: Workload, run: TrainConfig) -> TrainingTask:
    if workload == "emoji":
        return build_task(run)
    torch.manual_seed(config.seed)
    latents, labels = torch.randn(NUM_LATENTS, 4, 32, 32), torch.randint(1000, (NUM_LATENTS,))
    with torch.device(config.device):
        model = DiT.from_preset(config.preset, out_channels=4, long_skip=LongSkipConfig())
    return ClassToImageTraining(TASK, model, RandomLatents(latents, labels.tolist()))  # pyright: ignore[reportArgumentType]


# ----------------------------------------------------------------------------------------------------------------------
# Loops


@contextmanager
def plain_loop(run: TrainConfig, task: TrainingTask, accelerator: Accelerator) -> Iterator[Callable[[int], float]]:
    """Yield a function that makes a step and returns its loss: eager and dense, in float32 or TF32, with data loaded in
    the same thread."""
    device, precision = accelerator.device, torch.get_float32_matmul_precision()
    model = task.model.to(device).train()
    task.prepare(device)
    rates = {"lr": run.learning_rate, "betas": run.adam_betas, "weight_decay": run.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **rates)
    ema = EMAModel(model.parameters(), decay=run.ema_decay)
    order = ShuffledForever(len(task.items), run.seed)
    batches = iter(DataLoader(task.data, batch_size=run.batch_size, sampler=order))

    def step(number: int) -> float:
        stored, labels = next(batches)
        batch = prepare_batch(stored, labels, run, task, step_generator(run, 0, number), device)
        loss = batch_loss(task, model, run.objective, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        return loss.item()

    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield step
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def our_loop(run: TrainConfig, task: TrainingTask, accelerator: Accelerator) -> Iterator[Callable[[int], Tensor]]:
    """Yield a function that makes a step as `skipdit train` does, and returns its loss without waiting for it."""
    with tempfile.TemporaryDirectory() as folder:
        training = Run(run, accelerator, task, None, Path(folder), resume=False)
        training.begin(allow_changes=False)
        with load_batches(task.data, run, accelerator, 0) as batches:
            yield lambda number: training.step(batches, number, run.learning_rate).loss


def time_loop(config: TrainBenchConfig, row: Row, recipe: TrainConfig) -> Row:
    """Return the row with the results of one more round."""
    run = make_config(config, row.workload, recipe)
    if not row.loop.startswith("routed"):
        run = replace(run, routing=TokenRoutingConfig())
    run = replace(run, compile=row.loop.endswith("compiled"))
    accelerator = start_processes(torch.device(config.device))
    task = make_task(config, row.workload, run)
    task.model.to(accelerator.device)
    kinds = find_step_kinds(task, run)
    loop = plain_loop if row.loop == "plain" else our_loop
    with loop(run, task, accelerator) as step:
        for number in range(config.num_warmup):
            step(number)
        synchronize, losses = SYNCHRONIZE[config.device], []
        synchronize()

        def timed() -> None:
            losses.extend(step(config.num_warmup + number) for number in range(config.num_steps))
            synchronize()

        seconds = seconds_of(timed) / config.num_steps
    return replace(
        row, flops=kinds.mean_flops, seconds=(*row.seconds, seconds), losses=(*row.losses, float(losses[-1]))
    )


def matmul_rate(device: Device, num_rounds: int) -> float:
    """Return the FLOPs per second of products of bf16 matrices, the best of several rounds, as the bound for a loop."""
    size = MATRIX_SIZES[device]
    first, second = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply(count: int) -> None:
        for _ in range(count):
            _ = first @ second
        SYNCHRONIZE[device]()

    multiply(3)
    return 2 * size**3 * 10 / min(seconds_of(partial(multiply, 10)) for _ in range(num_rounds))


# ----------------------------------------------------------------------------------------------------------------------
# The report


def bench_training(config: TrainBenchConfig, recipe: TrainConfig, out: OutputFolder) -> list[Row]:
    """Measure every loop on every workload, and write `training_{device}.json` and `.md` into `out`.

    recipe: of the workload emoji. Raises `ValueError` if the device or a compiler that the config needs is missing.
    """
    name = f"training_{config.device}"
    with benchmark(config, out, name) as environment:
        if any(loop.endswith("compiled") for loop in config.loops):
            check_compiler(config.device)
        rate = matmul_rate(config.device, config.num_rounds)
        with counting("", len(config.workloads) * len(config.loops) * config.num_rounds) as advance:
            rows = [row for workload in config.workloads for row in bench_workload(config, workload, recipe, advance)]
    baselines = {row.workload: row for row in rows if row.loop == "plain"}
    report = Report(
        environment=environment,
        config=config,
        data={"matmul_flops_per_second": rate, "rows": [record(row, "pictures_per_second") for row in rows]},
        parts=[
            table([row_record(row, baselines.get(row.workload), rate) for row in rows]),
            f"Products of bf16 matrices reach {rate / 1e12:.2f} TFLOP/s here. FLOPs are counted of forward and "
            "backward, without the optimizer; those of routed loops are fewer per picture.",
            *verdict(config, rows, rate),
        ],
    )
    report.write(out, name)
    return rows


def bench_workload(config: TrainBenchConfig, workload: Workload, recipe: TrainConfig, advance: Advance) -> list[Row]:
    rows = [Row(workload, loop, config.batch_size(workload), 0.0) for loop in config.loops]
    for _ in range(config.num_rounds):
        for index, row in enumerate(rows):
            advance(description=f"{workload} {row.loop}")
            rows[index] = time_loop(config, row, recipe)
    return rows


def row_record(row: Row, plain: Row | None, rate: float) -> dict[str, object]:
    speed = "" if plain is None else f"{row.pictures_per_second / plain.pictures_per_second:.2f}"
    return {
        "workload": row.workload,
        "loop": row.loop,
        "batch": row.batch_size,
        "pictures/s": f"{row.pictures_per_second:,.1f}",
        "over plain": speed,
        "ms per step (min to max)": f"{1e3 * min(row.seconds):.1f} to {1e3 * max(row.seconds):.1f}",
        "GFLOP per picture": f"{row.flops / 1e9:.2f}",
        "TFLOP/s": f"{row.flops_per_second / 1e12:.3f}",
        "of the bf16 rate": f"{100 * row.flops_per_second / rate:.1f}%",
        "last loss": f"{row.losses[-1]:.4f}",
    }


def verdict(config: TrainBenchConfig, rows: list[Row], rate: float) -> Iterator[str]:
    """Yield a sentence per workload on the best loop and the target, which is for an H100."""
    for workload in config.workloads:
        loops = [row for row in rows if row.workload == workload and row.loop != "plain"]
        if not loops or config.device != "cuda":
            continue
        values = {
            "emoji": {row.loop: row.pictures_per_second for row in loops},
            "latents": {row.loop: row.flops_per_second / rate for row in loops},
        }[workload]
        best = max(values, key=values.__getitem__)
        verdict = "reached" if values[best] >= TARGETS[workload] else "missed"
        unit = "pictures per second" if workload == "emoji" else "of the bf16 rate"
        yield f"{workload}: target {TARGETS[workload]:g} {unit}, {verdict}: {values[best]:.3g} ({best})."
