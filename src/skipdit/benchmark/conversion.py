"""What converting a trained vanilla model in two stages costs in loss and brings in cached runs, beside training it on.

Stage one trains fresh long skips alone, stage two everything (arXiv 2411.17616, as for text-to-video).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from skipdit.benchmark.measure import Advance, claim_report, flops_of, header, progress_bar, table, write_report
from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.state import CacheSummary
from skipdit.checkpoints import load_model
from skipdit.diffusion import training_loss
from skipdit.environment import Device, check_device, describe_environment, threads
from skipdit.files import OutputFolder
from skipdit.metrics.paired import PairedScore, check_ssim_size, psnr_db, ssim
from skipdit.models.long_skip import LongSkipConfig
from skipdit.options import check_choice, check_numbers, check_positive
from skipdit.pictures import labelled_grid, to_pictures
from skipdit.tasks.class_to_image import ModelConfig
from skipdit.tasks.training import Items, TrainingTask, make_task_scheduler, open_items
from skipdit.training import Batch, TrainConfig, prepare_batch, train

PLAIN, STAGE_ONE, STAGE_TWO, CONTROL = "convert-plain", "convert-stage-one", "convert-stage-two", "convert-control"
STARTS = {PLAIN: None, STAGE_ONE: PLAIN, STAGE_TWO: STAGE_ONE, CONTROL: PLAIN}  # what a run goes on from
# the rows of the report; the second and the third are converted and not trained yet
VANILLA, BEFORE, RESIDUAL, FIRST, SECOND, TRAINED_ON = (
    "vanilla",
    "before, replace",
    "before, residual",
    "stage one",
    "stage two",
    "control",
)
SHOWN = (VANILLA, BEFORE, FIRST, SECOND, TRAINED_ON)
METHODS = ("", "delta:")  # the paper's cache, which needs long skips, and one that needs none
FEWER = "fewer"
PICTURE = "conversion.png"
PICTURE_SCALE = 4
LOSS_BATCH_SIZE = 128
CHANCE_DB = 5.0  # by which cached runs of two trainings differ whose rounding alone does: benchmarks/stability_cpu.md


@dataclass(frozen=True, kw_only=True)
class ConversionBenchConfig:
    """What is measured of the trained models.

    num_pictures: of the training data, for the loss, each with one noise and timestep. num_samples, num_steps,
    guidance_scale: of a run of the sampler, for the caches. intervals: of the caches. num_shown: pictures a row of
    conversion.png. num_threads: of the CPU; by default PyTorch's choice. seed: of all that is drawn here; the trainings
    have their own.
    """

    num_pictures: int = 512
    num_samples: int = 64
    num_shown: int = 6
    num_steps: int = 50
    guidance_scale: float = 2.0
    intervals: tuple[int, ...] = (2, 3)
    device: Device = "cpu"
    num_threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        check_positive(self, "num_pictures", "num_samples", "num_shown", "num_threads")
        check_choice("device", (self.device,), get_args(Device))
        check_choice("intervals", self.intervals, range(2, self.num_steps + 1))
        if self.num_shown > self.num_samples:
            raise ValueError(f"num_shown must be at most num_samples, {self.num_samples}, got {self.num_shown}")


@dataclass(frozen=True)
class ModelRow:
    """A model and its loss, mean over the pictures.

    long_skips: how many, with which fusion. num_steps: of training, since the data was first seen. flops: of a forward
    of one picture; a multiply-add counts two. over_vanilla: mean difference to the vanilla model's loss; error: its
    standard error, over pictures.
    """

    model: str
    long_skips: str
    num_steps: int
    num_parameters: int
    flops: int
    loss: float
    over_vanilla: float
    error: float


@dataclass(frozen=True)
class RunRow:
    """A cached or shorter run beside the full run of the same model from the same noise.

    compute_ratio: as the units run promise. psnr: in dB.
    """

    model: str
    run: str
    num_steps: int
    steps_full: int
    compute_ratio: float
    psnr: PairedScore
    ssim: PairedScore


# ----------------------------------------------------------------------------------------------------------------------
# The models


def train_runs(stages: Mapping[str, TrainConfig], runs: Path, device: Device) -> dict[str, Path]:
    """The pipelines of the four runs, trained in `runs` as far as they are not there yet.

    `ValueError` where a run there was made with other settings.
    """
    folders: dict[str, Path] = {}
    for name, start in STARTS.items():
        config = stages[name] if start is None else replace(stages[name], start_from=str(folders[start]))
        folders[name] = train(config, runs / name, device=device)
    return folders


def build(config: TrainConfig, items: Items, folder: Path, device: Device) -> TrainingTask:
    """The model that a run of this config would start with from the pipeline in `folder`, to the bit."""
    torch.manual_seed(config.seed)
    task = config.model.build(items, config.objective, load_model(folder))
    task.model.to(device).eval()
    return task


def build_models(
    stages: Mapping[str, TrainConfig], items: Items, folders: Mapping[str, Path], device: Device
) -> dict[str, TrainingTask]:
    """All models of the report, by their names there."""
    first = stages[STAGE_ONE]
    model = cast(ModelConfig, first.model)
    residual = replace(model, long_skip=replace(model.long_skip or LongSkipConfig(), fusion="residual", init=None))
    made = {
        VANILLA: (stages[PLAIN], PLAIN),
        BEFORE: (first, PLAIN),
        RESIDUAL: (replace(first, model=residual), PLAIN),
        FIRST: (first, STAGE_ONE),
        SECOND: (stages[STAGE_TWO], STAGE_TWO),
        TRAINED_ON: (stages[CONTROL], CONTROL),
    }
    return {name: build(config, items, folders[run], device) for name, (config, run) in made.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def draw_batch(config: ConversionBenchConfig, trained: TrainConfig, task: TrainingTask) -> Batch:
    """Pictures of the training data with labels, some of them dropped, noise and timesteps, as a step draws them."""
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(task.items), generator=generator)[: config.num_pictures].tolist()
    pixels, labels = zip(*(task.data[index] for index in chosen), strict=True)
    device = torch.device(config.device)
    return prepare_batch(torch.stack(pixels), torch.tensor(labels), trained, task, generator, device)


@torch.no_grad()
def losses_of(task: TrainingTask, trained: TrainConfig, batch: Batch) -> Tensor:
    """The training loss of each picture of a batch (b), in float32."""
    losses = []
    tensors = batch.x_start, batch.noise, batch.timesteps, cast(Tensor, batch.conditions)
    for x_start, noise, timesteps, labels in zip(*(each.split(LOSS_BATCH_SIZE) for each in tensors), strict=True):

        def predict(noisy: Tensor, timesteps: Tensor, labels: Tensor = labels) -> Tensor:
            return task.predict(task.model, noisy, timesteps, labels)

        losses.append(training_loss(predict, trained.objective, x_start, noise, timesteps).loss)
    return torch.cat(losses)


@torch.no_grad()
def model_rows(
    models: Mapping[str, TrainingTask], stages: Mapping[str, TrainConfig], config: ConversionBenchConfig
) -> list[ModelRow]:
    """The loss of every model on the very same pictures, noise and timesteps."""
    trained, vanilla = stages[PLAIN], models[VANILLA]
    batch = draw_batch(config, trained, vanilla)
    losses = {name: losses_of(task, trained, batch) for name, task in models.items()}
    assert torch.equal(losses[RESIDUAL], losses[VANILLA]), "a zero projection changed the model"
    own = {name: stages[name].max_steps for name in STARTS}
    num_steps = dict.fromkeys(models, own[PLAIN])
    num_steps[FIRST] += own[STAGE_ONE]
    num_steps[SECOND] += own[STAGE_ONE] + own[STAGE_TWO]
    num_steps[TRAINED_ON] += own[CONTROL]
    rows = []
    for name, task in models.items():
        model: Any = task.model
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


def describe_long_skips(model: Any) -> str:
    count = len(model.long_skip_links.sources)
    return f"{count}, {model.config['long_skip']['fusion']}" if count else "none"


# ----------------------------------------------------------------------------------------------------------------------
# Cached runs


def sample(task: TrainingTask, trained: TrainConfig, config: ConversionBenchConfig, num_steps: int) -> Tensor:
    """Pictures (b c h w) in [0, 1], of classes spread over the data, from the config's noise."""
    sampler = task.sampler(task.model, make_task_scheduler(trained.objective))
    sampler.pipeline.set_progress_bar_config(disable=True)
    return sampler.sample(
        task.showcase(config.num_samples)[0],
        guidance_scale=config.guidance_scale,
        num_inference_steps=num_steps,
        generator=torch.Generator().manual_seed(config.seed),
    ).cpu()


def sample_cached(
    task: TrainingTask, trained: TrainConfig, config: ConversionBenchConfig, spec: str
) -> tuple[Tensor, CacheSummary]:
    """The same pictures with a cache, and what it did."""
    enable_cache(task.model, spec)
    try:
        return sample(task, trained, config, config.num_steps), cache_summary(task.model)
    finally:
        disable_cache(task.model)


def compare(model: str, run: str, pictures: Tensor, reference: Tensor, **counts: Any) -> RunRow:
    """A row of a run's pictures beside those of the full run. counts: how it was made."""
    scores = {"psnr": psnr_db(pictures, reference), "ssim": ssim(pictures, reference)}
    return RunRow(model=model, run=run, **{name: PairedScore.of(each) for name, each in scores.items()}, **counts)


def specs_of(task: TrainingTask, interval: int) -> list[str]:
    """The caches of one interval that this model can have; they run equally many units."""
    has_long_skips = bool(cast(Any, task.model).long_skip_links.sources)
    return [f"{method}N{interval}" for method in METHODS if method or has_long_skips]


def run_rows(
    name: str, task: TrainingTask, trained: TrainConfig, config: ConversionBenchConfig, advance: Advance
) -> tuple[list[RunRow], Tensor]:
    """The cached runs of one model, and of each interval the run of so many fewer steps that it computes no less; the
    pictures of the full run. `advance(description=...)` is told of each run."""
    rows, num_steps = [], config.num_steps
    advance(description=f"{name} full")
    reference = sample(task, trained, config, num_steps)
    for interval in config.intervals:
        for spec in specs_of(task, interval):
            advance(description=f"{name} {spec}")
            pictures, summary = sample_cached(task, trained, config, spec)
            counts = {"steps_full": summary.steps_full, "compute_ratio": summary.compute_ratio}
            rows.append(compare(name, spec, pictures, reference, num_steps=num_steps, **counts))
        fewer = math.ceil(num_steps / rows[-1].compute_ratio)
        advance(description=f"{name} {fewer} steps")
        pictures = sample(task, trained, config, fewer)
        counts = {"steps_full": fewer, "compute_ratio": num_steps / fewer}
        rows.append(compare(name, f"{FEWER} than N{interval}", pictures, reference, num_steps=fewer, **counts))
    return rows, reference


def all_run_rows(
    models: Mapping[str, TrainingTask], trained: TrainConfig, config: ConversionBenchConfig
) -> tuple[list[RunRow], dict[str, Tensor]]:
    """The rows of every model, and the pictures of its full run."""
    rows, full_runs = [], {}
    num_runs = sum(1 + sum(1 + len(specs_of(task, n)) for n in config.intervals) for task in models.values())
    with progress_bar(num_runs) as advance:
        for name, task in models.items():
            own, full_runs[name] = run_rows(name, task, trained, config, advance)
            rows += own
    return rows, full_runs


# ----------------------------------------------------------------------------------------------------------------------
# The report


def bench_conversion(
    config: ConversionBenchConfig, stages: Mapping[str, TrainConfig], runs: Path, out: OutputFolder
) -> tuple[list[ModelRow], list[RunRow]]:
    """Train what is missing of the four runs in `runs`, measure their models, and write `conversion_{device}.json`,
    `.md` and `conversion.png` into `out`.

    stages: how each of the four runs is trained, by name. `ValueError` where they are not class-to-image runs that add
    long skips in stage one, the data has fewer pictures than are asked for, or a run in `runs` has other settings.
    """
    check_device(config.device)
    check_stages(stages)
    name = f"conversion_{config.device}"
    claim_report(out, name, PICTURE)
    items = open_items(stages[PLAIN].data)
    check_ssim_size(items.size)
    if config.num_pictures > len(items):
        raise ValueError(f"num_pictures must be at most {len(items)}, got {config.num_pictures}")
    with threads(config.num_threads):
        environment = describe_environment(config.device, config.seed)
        models = build_models(stages, items, train_runs(stages, runs, config.device), config.device)
        losses = model_rows(models, stages, config)
        rows, full_runs = all_run_rows(models, stages[PLAIN], config)
    captions = models[VANILLA].showcase(config.num_samples)[1]
    with out.file(PICTURE) as draft:
        draw(full_runs, captions, config.num_shown).save(draft)
    report = {
        "environment": environment,
        "config": config,
        "trainings": [training_record(run, stages[run]) for run in STARTS],
        "models": losses,
        "rows": rows,
        "verdict": list(verdict(config, losses, rows)),
    }
    write_report(out, name, report, render_markdown(environment, config, stages, losses, rows))
    return losses, rows


def check_stages(stages: Mapping[str, TrainConfig]) -> None:
    if set(stages) != set(STARTS):
        raise ValueError(f"stages must be {', '.join(STARTS)}, got {', '.join(stages)}")
    for name, config in stages.items():
        if not isinstance(config.model, ModelConfig):
            raise ValueError(f"{name} must train a class-to-image model, got a {type(config.model).__name__}")
        if (config.model.long_skip is not None) is not (name in (STAGE_ONE, STAGE_TWO)):
            raise ValueError(f"long skips must be in the two stages alone, got {config.model.long_skip} in {name}")


def draw(full_runs: Mapping[str, Tensor], captions: Sequence[str], num_shown: int) -> Any:
    """A row of pictures a model, spread over what was sampled."""
    chosen = [index * len(captions) // num_shown for index in range(num_shown)]
    pictures = to_pictures(torch.cat([full_runs[name][chosen] for name in SHOWN]))
    names = [f"{name.partition(',')[0]}: {captions[index]}" for name in SHOWN for index in chosen]
    return labelled_grid(pictures, names, num_columns=num_shown, scale=PICTURE_SCALE)


def training_record(name: str, config: TrainConfig) -> dict[str, object]:
    """How a run was trained."""
    return {
        "run": name,
        "from": STARTS[name] or "nothing",
        "stage": config.stage,
        "steps": config.max_steps,
        "batch": config.batch_size,
        "rate": config.learning_rate,
        "seed": config.seed,
    }


def render_markdown(
    environment: Mapping[str, str],
    config: ConversionBenchConfig,
    stages: Mapping[str, TrainConfig],
    losses: Sequence[ModelRow],
    rows: Sequence[RunRow],
) -> list[str]:
    """Command and machine, the trainings, losses, cached runs, and in words what the conversion brings."""
    return [
        *header(environment),
        table([training_record(name, stages[name]) for name in STARTS]),
        f"Loss: the training loss of the averaged weights in float32, mean over the same {config.num_pictures} "
        "pictures of the training data, noise and timesteps. Over vanilla: the mean difference and its standard error "
        "over pictures.",
        table([model_record(row) for row in losses]),
        f"Each run beside the full run of the same model, {config.num_steps} steps from the same noise, guidance "
        f"{config.guidance_scale:g}: mean and standard deviation over {config.num_samples} pictures. A bare N is the "
        "paper's cache, which needs long skips; fewer than N is a run without a cache of so few steps that it computes "
        "no less. Compute: the units of the full run over those of this one. Before stage one the replacing model "
        "makes noise, which says nothing of a cache.",
        table([run_record(row) for row in rows]),
        *verdict(config, losses, rows),
        f"![Samples of the full runs]({PICTURE})",
    ]


def model_record(row: ModelRow) -> dict[str, object]:
    return {
        "model": row.model,
        "long skips": row.long_skips,
        "steps": row.num_steps,
        "parameters": f"{row.num_parameters:,}",
        "MFLOP": f"{row.flops / 1e6:.1f}",
        "loss": f"{row.loss:.4f}",
        "over vanilla": f"{row.over_vanilla:+.4f} ± {row.error:.4f}",
    }


def run_record(row: RunRow) -> dict[str, object]:
    return {
        "model": row.model,
        "run": row.run,
        "full / steps": f"{row.steps_full} / {row.num_steps}",
        "compute": f"{row.compute_ratio:.2f}",
        "PSNR dB": row.psnr.text(),
        "SSIM": row.ssim.text(4),
    }


def verdict(config: ConversionBenchConfig, losses: Sequence[ModelRow], rows: Sequence[RunRow]) -> Iterator[str]:
    """In words, what the conversion does to the loss, and what the paper's cache brings at equal compute."""
    loss = {row.model: row.loss for row in losses}
    beside = loss[SECOND] / loss[TRAINED_ON] - 1
    yield (
        f"The conversion raises the loss from {loss[VANILLA]:.4f} to {loss[BEFORE]:.4f} (with fusion 'residual' it "
        f"stays equal to the bit); stage one brings it to {loss[FIRST]:.4f} and stage two to {loss[SECOND]:.4f}, "
        f"{abs(beside):.1%} {'above' if beside > 0 else 'below'} the {loss[TRAINED_ON]:.4f} of the vanilla model that "
        "was trained on for as many steps."
    )
    psnr = {(row.model, row.run): row.psnr.mean for row in rows}
    delta, fewer, control = (
        {f"N{n}": psnr[SECOND, f"N{n}"] - psnr[model, f"{run}N{n}"] for n in config.intervals}
        for model, run in ((SECOND, METHODS[1]), (SECOND, f"{FEWER} than "), (TRAINED_ON, METHODS[1]))
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
