"""`skipdit bench conversion`: converts a trained plain model in two stages, and compares its loss and its cached runs
with those of the same model trained for longer.

Stage one trains only the new long skips, stage two all weights (arXiv 2411.17616, as for text-to-video).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from skipdit.benchmark.config import ConversionBenchConfig as ConversionBenchConfig
from skipdit.benchmark.measure import Advance, benchmark, flops_of
from skipdit.checkpoints import load_model
from skipdit.diffusion import make_scheduler, training_loss
from skipdit.files.output import OutputFolder
from skipdit.interfaces import Transformer
from skipdit.metrics.paired import check_ssim_size
from skipdit.metrics.table import ALWAYS, Scores, score_cells
from skipdit.models.long_skip import LongSkipConfig
from skipdit.options import Device
from skipdit.pictures import labelled_grid, to_pictures
from skipdit.report import Report, record, table
from skipdit.runs import OwnCache, Runner, Sampled
from skipdit.tasks.class_to_image import ModelConfig
from skipdit.tasks.task import spread
from skipdit.tasks.training import Items, TrainingTask, open_items
from skipdit.terminal import counting
from skipdit.training import Batch, TrainConfig, prepare_batch, train

PLAIN, STAGE_ONE, STAGE_TWO, CONTROL = "convert-plain", "convert-stage-one", "convert-stage-two", "convert-control"
STARTS = {PLAIN: None, STAGE_ONE: PLAIN, STAGE_TWO: STAGE_ONE, CONTROL: PLAIN}  # the run that each run starts from
# the rows of the report; the second and the third are converted, but not trained yet
VANILLA, BEFORE, RESIDUAL, FIRST, SECOND, TRAINED_ON = (
    "vanilla",
    "before, replace",
    "before, residual",
    "stage one",
    "stage two",
    "control",
)
SHOWN = (VANILLA, BEFORE, FIRST, SECOND, TRAINED_ON)
PREFIXES = ("", "delta:")  # the paper's cache, which needs long skips, and one that needs none
FEWER = "fewer"
PICTURE = "conversion.png"
PICTURE_SCALE = 4
LOSS_BATCH_SIZE = 128
CHANCE_DB = 5.0  # difference of cached runs of two trainings that differ by rounding alone: benchmarks/stability_cpu.md


@dataclass(frozen=True)
class ModelRow:
    """A model and its loss."""

    model: str
    long_skips: str
    """their number and fusion"""
    num_steps: int
    """training steps in all stages"""
    num_parameters: int
    flops: int
    """FLOPs of a forward of one picture; a multiply-add counts as two"""
    loss: float
    """mean over pictures"""
    over_vanilla: float
    """mean difference from the loss of the vanilla model"""
    error: float
    """standard error of that difference, over pictures"""

    def cells(self) -> dict[str, object]:
        """Return the row of a table."""
        return {
            "model": self.model,
            "long skips": self.long_skips,
            "steps": self.num_steps,
            "parameters": f"{self.num_parameters:,}",
            "MFLOP": f"{self.flops / 1e6:.1f}",
            "loss": f"{self.loss:.4f}",
            "over vanilla": f"{self.over_vanilla:+.4f} ± {self.error:.4f}",
        }


@dataclass(frozen=True)
class RunRow:
    """A cached or shorter run, compared with the full run of the same model from the same noise."""

    model: str
    run: str
    """spec of the cache, or the cache that a run of fewer steps is compared with"""
    num_steps: int
    """denoising steps"""
    steps_full: int
    """number of full steps"""
    compute_ratio: float
    """FLOPs of the full run divided by those of this run"""
    scores: Scores
    """distances to the full run, by the name of the metric"""

    @classmethod
    def of(
        cls, model: str, name: str, sampled: Sampled, reference: Sampled, compute_ratio: float | None = None
    ) -> "RunRow":
        """Return the row of a run. compute_ratio: if its cache does not count it."""
        counts = sampled.num_inference_steps, int(sampled.steps[0]), compute_ratio or sampled.compute_ratio
        return cls(model, name, *counts, sampled.scores(reference.samples))

    def cells(self) -> dict[str, object]:
        """Return the row of a table."""
        counts = {"full / steps": f"{self.steps_full} / {self.num_steps}", "compute": f"{self.compute_ratio:.2f}"}
        return {"model": self.model, "run": self.run, **counts, **score_cells(self.scores, ALWAYS)}


# ----------------------------------------------------------------------------------------------------------------------
# The models


def train_runs(stages: Mapping[str, TrainConfig], runs: Path, device: Device) -> dict[str, Path]:
    """Return the pipelines of the four runs in the folder `runs`; train or finish those that are not complete. Raises
    `ValueError` if a run there has other settings."""
    folders: dict[str, Path] = {}
    for name, start in STARTS.items():
        config = stages[name] if start is None else replace(stages[name], start_from=str(folders[start]))
        folders[name] = train(config, runs / name, device=device)
    return folders


def build(config: TrainConfig, items: Items, folder: Path, device: Device) -> TrainingTask:
    """Return the model that a run of this config would start with, given the pipeline in `folder`; it is bit-equal."""
    torch.manual_seed(config.seed)
    task = config.model.build(items, config.objective, load_model(folder))
    task.model.to(device).eval()
    return task


def build_models(
    stages: Mapping[str, TrainConfig], items: Items, folders: Mapping[str, Path], device: Device
) -> dict[str, TrainingTask]:
    """Return all models of the report, by name."""
    first = stages[STAGE_ONE]
    model = cast(ModelConfig, first.model)
    residual = replace(model, long_skip=replace(model.long_skip or LongSkipConfig(), fusion="residual", init=None))
    origins = {
        VANILLA: (stages[PLAIN], PLAIN),
        BEFORE: (first, PLAIN),
        RESIDUAL: (replace(first, model=residual), PLAIN),
        FIRST: (first, STAGE_ONE),
        SECOND: (stages[STAGE_TWO], STAGE_TWO),
        TRAINED_ON: (stages[CONTROL], CONTROL),
    }
    return {name: build(config, items, folders[run], device) for name, (config, run) in origins.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def draw_batch(config: ConversionBenchConfig, trained: TrainConfig, task: TrainingTask) -> Batch:
    """Return pictures of the training data with noise, timesteps and labels, some of which are dropped, as a training
    step draws them."""
    generator = torch.Generator().manual_seed(config.seed)
    indices = torch.randperm(len(task.items), generator=generator)[: config.num_pictures].tolist()
    pixels, labels = zip(*(task.data[index] for index in indices), strict=True)
    device = torch.device(config.device)
    return prepare_batch(torch.stack(pixels), torch.tensor(labels), trained, task, generator, device)


@torch.no_grad()
def losses_of(task: TrainingTask, trained: TrainConfig, batch: Batch) -> Tensor:
    """Return the training loss (b,) of each picture of a batch, in float32."""
    losses = []
    tensors = batch.x_start, batch.noise, batch.timesteps, cast(Tensor, batch.conditions)
    parts = zip(*(tensor.split(LOSS_BATCH_SIZE) for tensor in tensors), strict=True)
    for x_start, noise, timesteps, labels in parts:

        def predict(noisy: Tensor, timesteps: Tensor, labels: Tensor = labels) -> Tensor:
            return task.predict(task.model, noisy, timesteps, labels)

        losses.append(training_loss(predict, trained.objective, x_start, noise, timesteps).loss)
    return torch.cat(losses)


@torch.no_grad()
def model_rows(
    models: Mapping[str, TrainingTask], stages: Mapping[str, TrainConfig], config: ConversionBenchConfig
) -> list[ModelRow]:
    """Return the loss of every model on the same pictures, noise and timesteps."""
    trained, vanilla = stages[PLAIN], models[VANILLA]
    batch = draw_batch(config, trained, vanilla)
    losses = {name: losses_of(task, trained, batch) for name, task in models.items()}
    assert torch.equal(losses[RESIDUAL], losses[VANILLA]), "a zero projection changed the model"
    steps_of = {name: stages[name].max_steps for name in STARTS}
    num_steps = dict.fromkeys(models, steps_of[PLAIN])
    num_steps[FIRST] += steps_of[STAGE_ONE]
    num_steps[SECOND] += steps_of[STAGE_ONE] + steps_of[STAGE_TWO]
    num_steps[TRAINED_ON] += steps_of[CONTROL]
    rows = []
    for name, task in models.items():
        model: Transformer = task.model
        one = [tensor[:1] for tensor in (batch.noise, batch.timesteps, cast(Tensor, batch.conditions))]
        difference = losses[name] - losses[VANILLA]
        row = ModelRow(
            model=name,
            long_skips=describe_long_skips(model),
            num_steps=num_steps[name],
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            flops=flops_of(lambda task=task, one=one: task.predict(task.model, *one)),
            loss=losses[name].mean().item(),
            over_vanilla=difference.mean().item(),
            error=difference.std().item() / math.sqrt(len(difference)),
        )
        rows.append(row)
    return rows


def describe_long_skips(model: Transformer) -> str:
    count = len(model.long_skip_links.sources)
    return f"{count}, {model.config['long_skip']['fusion']}" if count else "none"


# ----------------------------------------------------------------------------------------------------------------------
# Cached runs


def runner_of(task: TrainingTask, trained: TrainConfig, config: ConversionBenchConfig) -> Runner:
    """Return the runner of a model for classes spread over the data, with the config's noise."""
    sampler = task.sampler(task.model, make_scheduler(trained.objective))
    sampler.pipeline.set_progress_bar_config(disable=True)
    return Runner.of(
        sampler,
        task.showcase(config.num_samples)[0],
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
    )


def specs_of(task: TrainingTask, interval: int) -> list[str]:
    """Return the caches with this interval that the model can have; they run equally many units."""
    model: Transformer = task.model
    has_long_skips = bool(model.long_skip_links.sources)
    return [f"{method}N{interval}" for method in PREFIXES if method or has_long_skips]


def run_rows(
    name: str, task: TrainingTask, trained: TrainConfig, config: ConversionBenchConfig, advance: Advance
) -> tuple[list[RunRow], Tensor]:
    """Return the rows of one model, cached and, for each interval, with the fewest steps that cost no less; and the
    pictures of its full run. Calls `advance(description=...)` before each run."""
    rows, num_steps, run = [], config.num_inference_steps, runner_of(task, trained, config)
    advance(description=f"{name} full")
    reference = run()
    for interval in config.intervals:
        for spec in specs_of(task, interval):
            advance(description=f"{name} {spec}")
            rows.append(RunRow.of(name, spec, run(OwnCache.of(spec)), reference))
        fewer = math.ceil(num_steps / rows[-1].compute_ratio)
        advance(description=f"{name} {fewer} steps")
        shorter = run(num_inference_steps=fewer)
        rows.append(RunRow.of(name, f"{FEWER} than N{interval}", shorter, reference, num_steps / fewer))
    return rows, reference.samples


def all_run_rows(
    models: Mapping[str, TrainingTask], trained: TrainConfig, config: ConversionBenchConfig
) -> tuple[list[RunRow], dict[str, Tensor]]:
    """Return the rows of every model, and the pictures of its full run."""
    rows, full_runs = [], {}
    num_runs = sum(1 + sum(1 + len(specs_of(task, n)) for n in config.intervals) for task in models.values())
    with counting("", num_runs) as advance:
        for name, task in models.items():
            model_rows, full_runs[name] = run_rows(name, task, trained, config, advance)
            rows += model_rows
    return rows, full_runs


# ----------------------------------------------------------------------------------------------------------------------
# The report


def bench_conversion(
    config: ConversionBenchConfig, stages: Mapping[str, TrainConfig], out: OutputFolder
) -> tuple[list[ModelRow], list[RunRow]]:
    """Train or finish the four runs in `config.runs`, measure their models, and write `conversion_{device}.json`, `.md`
    and `conversion.png` into `out`.

    stages: the training of each of the four runs, by name. Raises `ValueError` if these are not class-to-image runs
    that add long skips in stage one, if the data has fewer pictures than the config needs, or if a run in `runs` has
    other settings.
    """
    check_stages(stages)
    name = f"conversion_{config.device}"
    with benchmark(config, out, name, PICTURE) as environment:
        items = open_items(stages[PLAIN].data)
        check_ssim_size(items.size)
        if config.num_pictures > len(items):
            raise ValueError(f"num_pictures must be at most {len(items)}, got {config.num_pictures}")
        models = build_models(stages, items, train_runs(stages, config.runs, config.device), config.device)
        losses = model_rows(models, stages, config)
        rows, full_runs = all_run_rows(models, stages[PLAIN], config)
    captions = models[VANILLA].showcase(config.num_samples)[1]
    with out.file(PICTURE) as draft:
        draw(full_runs, captions, config.num_shown).save(draft)
    report_of(config, environment, stages, losses, rows).write(out, name)
    return losses, rows


def check_stages(stages: Mapping[str, TrainConfig]) -> None:
    if set(stages) != set(STARTS):
        raise ValueError(f"stages must be {', '.join(STARTS)}, got {', '.join(stages)}")
    for name, config in stages.items():
        if not isinstance(config.model, ModelConfig):
            raise ValueError(f"{name} must train a class-to-image model, got a {type(config.model).__name__}")
        if (config.model.long_skip is not None) is not (name in (STAGE_ONE, STAGE_TWO)):
            raise ValueError(f"long skips must be in the two stages alone, got {config.model.long_skip} in {name}")


def draw(full_runs: Mapping[str, Tensor], captions: Sequence[str], num_shown: int) -> Image.Image:
    """Return a row of pictures per model, spread over the samples."""
    indices = spread(num_shown, len(captions))
    pictures = to_pictures(torch.cat([full_runs[name][indices] for name in SHOWN]))
    names = [f"{name.partition(',')[0]}: {captions[index]}" for name in SHOWN for index in indices]
    return labelled_grid(pictures, names, num_columns=num_shown, scale=PICTURE_SCALE)


def training_record(name: str, config: TrainConfig) -> dict[str, object]:
    """Return the settings of a training."""
    return {
        "run": name,
        "from": STARTS[name] or "nothing",
        "stage": config.stage,
        "steps": config.max_steps,
        "batch": config.batch_size,
        "rate": config.learning_rate,
        "seed": config.seed,
    }


def report_of(
    config: ConversionBenchConfig,
    environment: Mapping[str, str],
    stages: Mapping[str, TrainConfig],
    losses: Sequence[ModelRow],
    rows: Sequence[RunRow],
) -> Report:
    trainings = [training_record(run, stages[run]) for run in STARTS]
    sentences = list(verdict(config, losses, rows))
    return Report(
        environment=environment,
        config=config,
        data={
            "trainings": trainings,
            "models": losses,
            "rows": [record(row) for row in rows],
            "verdict": sentences,
        },
        parts=[
            table(trainings),
            f"Loss: the training loss of the averaged weights in float32, mean over the same {config.num_pictures} "
            "pictures of the training data, noise and timesteps. Over vanilla: the mean difference and its standard "
            "error over pictures.",
            table([row.cells() for row in losses]),
            f"Each run stands beside the full run of the same model, {config.num_inference_steps} steps from the same "
            f"noise, guidance {config.guidance_scale:g}: mean and standard deviation over {config.num_samples} "
            "pictures. A bare N is the paper's cache, which needs long skips; fewer than N is a run without a cache of "
            "so few steps that it computes no less. Compute: FLOPs of the full run over those of this one. Before "
            "stage one the replacing model makes noise, which says nothing of a cache.",
            table([row.cells() for row in rows]),
            *sentences,
            f"![Samples of the full runs]({PICTURE})",
        ],
    )


def verdict(config: ConversionBenchConfig, losses: Sequence[ModelRow], rows: Sequence[RunRow]) -> Iterator[str]:
    """Yield sentences on the loss after conversion, and on the paper's cache at equal compute."""
    loss = {row.model: row.loss for row in losses}
    excess = loss[SECOND] / loss[TRAINED_ON] - 1
    yield (
        f"The conversion raises the loss from {loss[VANILLA]:.4f} to {loss[BEFORE]:.4f} (with fusion 'residual' it "
        f"stays equal to the bit); stage one brings it to {loss[FIRST]:.4f} and stage two to {loss[SECOND]:.4f}, "
        f"{abs(excess):.1%} {'above' if excess > 0 else 'below'} the {loss[TRAINED_ON]:.4f} of the vanilla model that "
        "was trained on for as many steps."
    )
    psnr = {(row.model, row.run): row.scores["psnr"].mean for row in rows}
    delta, fewer, control = (
        {f"N{n}": psnr[SECOND, f"N{n}"] - psnr[model, f"{run}N{n}"] for n in config.intervals}
        for model, run in ((SECOND, PREFIXES[1]), (SECOND, f"{FEWER} than "), (TRAINED_ON, PREFIXES[1]))
    )
    beyond = [name for name, difference in control.items() if abs(difference) > CHANCE_DB]
    yield (
        f"At equal compute the paper's cache on the converted model lies {list_decibels(delta)} from delta and "
        f"{list_decibels(fewer)} from fewer steps on the same model, and {list_decibels(control)} from delta on "
        f"the control; of that last, {', '.join(beyond) or 'nothing'} is beyond the {CHANCE_DB:g} dB by which two "
        "trainings that differed by rounding alone lay apart (stability_cpu.md)."
    )


def list_decibels(differences: Mapping[str, float]) -> str:
    return ", ".join(
        (f"{difference:+.1f} dB" if math.isfinite(difference) else "no finite difference") + f" ({name})"
        for name, difference in differences.items()
    )
