"""A conversion in two stages: what each stage trains, that it resumes, and the report that measures it. Tiny sizes."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import flops_of, listing
from torch import Tensor

import skipdit.training.loop
from skipdit import cli
from skipdit.benchmark import conversion
from skipdit.benchmark.conversion import (
    BEFORE,
    CONTROL,
    FIRST,
    PLAIN,
    RESIDUAL,
    SECOND,
    STAGE_ONE,
    STAGE_TWO,
    STARTS,
    TRAINED_ON,
    VANILLA,
    ConversionBenchConfig,
    ModelRow,
    RunRow,
    bench_conversion,
)
from skipdit.checkpoints import load_model
from skipdit.data.pictures import DataConfig, open_pictures
from skipdit.diffusion import Objective
from skipdit.files.output import OutputFolder
from skipdit.metrics.paired import PairedScore
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig
from skipdit.recipes import RECIPES
from skipdit.runs import OwnCache, Sampled
from skipdit.tasks.class_to_image import ModelConfig
from skipdit.tasks.text_to_image import TextToImageModelConfig
from skipdit.training import TrainConfig, list_checkpoints, train

CONFIG = ConversionBenchConfig(num_pictures=10, num_samples=4, num_shown=2, num_inference_steps=6, num_threads=1)
COLORS = {"blue": (20, 20, 240), "green": (20, 240, 20), "red": (240, 20, 20)}
Stages = dict[str, TrainConfig]


@dataclasses.dataclass(frozen=True)
class Bench:
    """One whole call of the benchmark."""

    stages: Stages
    runs: Path
    out: Path
    models: dict[str, ModelRow]
    rows: list[RunRow]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Three plain colours, 16x16 pixels, 16 tokens."""
    folder = tmp_path_factory.mktemp("conversion")
    for name, color in COLORS.items():
        (folder / "data" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (16, 16), color).save(folder / "data" / name / f"{index}.png")
    plain = TrainConfig(
        data=DataConfig(source=str(folder / "data"), image_size=16),
        model=ModelConfig(num_layers=4, num_attention_heads=2, attention_head_dim=16, patch_size=4, long_skip=None),
        objective=Objective(process="flow", prediction_type="sample", timestep_sampling="logit_normal"),
        max_steps=40,
        batch_size=12,
        learning_rate=4e-3,
        warmup_steps=5,
        ema_decay=0.9,
        precision="no",
        log_every=1,
        sample_every=0,
        checkpoint_every=20,
    )
    linked = dataclasses.replace(plain.model, long_skip=LongSkipConfig())
    first = dataclasses.replace(plain, model=linked, stage="long-skips-only", max_steps=20, learning_rate=1e-2)
    second = dataclasses.replace(first, stage="full", max_steps=10, learning_rate=2e-3)
    control = dataclasses.replace(second, model=plain.model)
    stages = {PLAIN: plain, STAGE_ONE: first, STAGE_TWO: second, CONTROL: control}
    models, rows = bench_conversion(
        replace(CONFIG, runs=folder / "runs"), stages, OutputFolder(folder / "out", "bench")
    )
    return Bench(stages, folder / "runs", folder / "out", {row.model: row for row in models}, rows)


def is_long_skip(key: str) -> bool:
    return ".long_skip." in key


def weights_of(run: Path) -> dict[str, Tensor]:
    """Of the last checkpoint, not averaged."""
    return load_file(list_checkpoints(run)[-1] / "model.safetensors")


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# The stages


@pytest.mark.parametrize("averaged", [False, True])
def test_stage_one_changes_the_long_skips_and_no_other_bit(bench: Bench, averaged: bool) -> None:
    # the stage starts from the averaged weights of the plain run
    plain = load_model(bench.runs / PLAIN / "pipeline").state_dict()
    run = bench.runs / STAGE_ONE
    trained = load_model(run / "pipeline").state_dict() if averaged else weights_of(run)
    before = conversion.build(
        bench.stages[STAGE_ONE], open_pictures(bench.stages[PLAIN].data), bench.runs / PLAIN / "pipeline", "cpu"
    ).model.state_dict()
    assert {key for key in trained if not is_long_skip(key)} == set(plain)
    assert all(torch.equal(value, trained[key]) for key, value in plain.items())
    assert not any(torch.equal(trained[key], before[key]) for key in trained if is_long_skip(key))
    after = load_model(bench.runs / STAGE_TWO / "pipeline").state_dict()
    assert not any(torch.equal(value, trained[key]) for key, value in after.items())


def test_the_optimizer_of_stage_one_holds_long_skips_only(bench: Bench) -> None:
    for run, expected in ((STAGE_ONE, is_long_skip), (STAGE_TWO, lambda key: True)):
        checkpoint = list_checkpoints(bench.runs / run)[-1]
        held = {key.rpartition(".")[0] for key in load_file(checkpoint / "optimizer.safetensors")}
        assert held == {key for key in load_file(checkpoint / "model.safetensors") if expected(key)}


def test_the_loss_falls_in_both_stages(bench: Bench) -> None:
    losses = {name: row.loss for name, row in bench.models.items()}
    assert losses[BEFORE] > 2 * losses[VANILLA]
    assert losses[FIRST] < 0.6 * losses[BEFORE]
    assert losses[SECOND] < losses[FIRST]
    logged = [entry["loss"] for entry in log(bench.runs / STAGE_ONE)]
    assert sum(logged[-5:]) < 0.7 * sum(logged[:5])


def interrupt_at(last: int) -> Callable[[TrainConfig, int], float]:
    def rate(config: TrainConfig, step: int) -> float:
        if step == last:
            raise KeyboardInterrupt
        return rate_at(config, step)

    rate_at = skipdit.training.loop.learning_rate_at
    return rate


@pytest.mark.parametrize("stage", [STAGE_ONE, STAGE_TWO])
def test_a_resumed_stage_equals_an_uninterrupted_one(
    bench: Bench, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = str(bench.runs / PLAIN / "pipeline")
    if stage == STAGE_TWO:
        start = str(bench.runs / STAGE_ONE / "pipeline")
    config = dataclasses.replace(bench.stages[stage], start_from=start, max_steps=6, checkpoint_every=3)
    whole = load_model(train(config, tmp_path / "whole", device="cpu")).state_dict()
    monkeypatch.setattr(skipdit.training.loop, "learning_rate_at", interrupt_at(5))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", device="cpu")
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["checkpoint-0000003"]
    resumed = load_model(train(config, tmp_path / "stopped", device="cpu")).state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    keys = ("step", "loss", "gradient_norm", "learning_rate")
    first, second = ([[entry[key] for key in keys] for entry in log(tmp_path / run)] for run in ("whole", "stopped"))
    assert first == second


def test_stage_one_without_long_skips_is_refused(bench: Bench, tmp_path: Path) -> None:
    first = bench.stages[STAGE_ONE]
    plain = dataclasses.replace(first, model=bench.stages[PLAIN].model)
    for config in (plain, dataclasses.replace(plain, start_from=str(bench.runs / PLAIN / "pipeline"))):
        with pytest.raises(ValueError, match=r"needs a model with long skips that skipdit added: set model\.long_skip"):
            train(config, tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="stage must be one of full, long-skips-only, got 'skips'"):
        dataclasses.replace(first, stage="skips")


def test_a_start_that_has_long_skips_keeps_them(bench: Bench, tmp_path: Path) -> None:
    start = bench.runs / STAGE_ONE / "pipeline"
    asked = dataclasses.replace(bench.stages[PLAIN].model, long_skip=LongSkipConfig(num_pairs=1, fusion="residual"))
    config = dataclasses.replace(bench.stages[STAGE_ONE], model=asked)
    model = conversion.build(config, open_pictures(config.data), start, "cpu").model
    kept = load_model(start)
    assert model.config["long_skip"] == kept.config["long_skip"]
    assert all(torch.equal(value, kept.state_dict()[key]) for key, value in model.state_dict().items())
    again = dataclasses.replace(config, start_from=str(start), max_steps=1)
    trained = load_model(train(again, tmp_path / "again", device="cpu"))
    assert trained.long_skip_links == kept.long_skip_links
    assert len(trained.long_skip_links.sources) == 2


def test_the_recipes_are_a_conversion_and_run_from_the_command_line(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = {name: RECIPES[name]() for name in STARTS}
    conversion.check_stages(recipes)
    for name, start in STARTS.items():
        assert recipes[name].start_from == (start and f"runs/{start}/pipeline")
    assert [name for name in STARTS if recipes[name].stage == "long-skips-only"] == [STAGE_ONE]
    assert recipes[CONTROL].max_steps == recipes[STAGE_ONE].max_steps + recipes[STAGE_TWO].max_steps

    sizes = {"sample_size": 32, "patch_size": 8, "in_channels": 3, "out_channels": 3, "num_classes": len(COLORS)}
    small = DiT(**sizes, num_layers=4, num_attention_heads=2, attention_head_dim=16)
    small.save_pretrained(tmp_path / "small")
    data = bench.stages[PLAIN].data.source
    options = [
        "--data.source",
        data,
        "--start-from",
        str(tmp_path / "small"),
        "--max-steps",
        "1",
        "--sample-every",
        "0",
    ]
    cli.main(["train", STAGE_ONE, *options, "--device", "cpu", "--out", str(tmp_path / "run")])
    assert f"trained: skipdit sample --model {tmp_path / 'run' / 'pipeline'}" in capsys.readouterr().out
    trained = load_model(tmp_path / "run" / "pipeline")
    assert len(trained.long_skip_links.sources) == 2
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in small.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------------
# The report


def test_the_files_agree(bench: Bench) -> None:
    assert listing(bench.out) == [
        "conversion.png", "conversion_cpu.json", "conversion_cpu.md",
    ]  # fmt: skip
    report = json.loads((bench.out / "conversion_cpu.json").read_text(encoding="utf-8"))
    assert [ModelRow(**entry) for entry in report["models"]] == list(bench.models.values())
    read = []
    for entry in report["rows"]:
        fields = dict(entry)
        scores = {name: PairedScore(**fields.pop(name)) for name in ("psnr", "ssim")}
        read.append(RunRow(**fields, scores=scores))
    assert read == bench.rows
    read = report["config"] | {"intervals": tuple(report["config"]["intervals"]), "runs": CONFIG.runs}
    assert ConversionBenchConfig(**read) == CONFIG
    assert [entry["run"] for entry in report["trainings"]] == list(STARTS)

    text = (bench.out / "conversion_cpu.md").read_text(encoding="utf-8")
    assert f"torch {torch.__version__}" in text
    for entry in report["trainings"]:
        assert f"| {entry['run']} | {entry['from']} | {entry['stage']} | {entry['steps']} | 12 |" in text
    for entry in report["models"]:
        loss, over = f"{entry['loss']:.4f}", f"{entry['over_vanilla']:+.4f} ± {entry['error']:.4f}"
        assert f"| {entry['model']} | {entry['long_skips']} | {entry['num_steps']} |" in text
        assert f"| {loss} | {over} |" in text
    for entry in report["rows"]:
        psnr = f"{entry['psnr']['mean']:.2f} ± {entry['psnr']['std']:.2f}"
        ssim = f"{entry['ssim']['mean']:.4f} ± {entry['ssim']['std']:.4f}"
        counts = f"{entry['steps_full']} / {entry['num_steps']} | {entry['compute_ratio']:.2f}"
        assert f"| {entry['model']} | {entry['run']} | {counts} | {psnr} | {ssim} |" in text
    assert len(report["verdict"]) == 2
    assert all(sentence in text for sentence in report["verdict"])
    with Image.open(bench.out / "conversion.png") as picture:
        assert picture.width > 2 * 16 * conversion.PICTURE_SCALE


def test_a_fresh_residual_skip_changes_no_bit_and_a_replacing_one_does(bench: Bench) -> None:
    residual, vanilla = bench.models[RESIDUAL], bench.models[VANILLA]
    assert (residual.loss, residual.over_vanilla, residual.error) == (vanilla.loss, 0.0, 0.0)
    assert bench.models[BEFORE].over_vanilla > 0
    assert [row.long_skips for row in bench.models.values()] == [
        "none", "2, replace", "2, residual", "2, replace", "2, replace", "none",
    ]  # fmt: skip
    assert [row.num_steps for row in bench.models.values()] == [40, 40, 40, 60, 70, 50]
    assert vanilla.flops == bench.models[TRAINED_ON].flops < residual.flops
    # a residual skip that adds zeros leaves the middle units alone, too
    by_run = {(row.model, row.run): row for row in bench.rows}
    same = dataclasses.replace(by_run[RESIDUAL, "delta:N2"], model=VANILLA)
    assert replace(same, compute_ratio=0) == replace(by_run[VANILLA, "delta:N2"], compute_ratio=0)


def test_the_loss_is_that_of_training(bench: Bench) -> None:
    """The weighted error of each picture, computed here from the prediction."""
    config = bench.stages[PLAIN]
    task = conversion.build(config, open_pictures(config.data), bench.runs / PLAIN / "pipeline", "cpu")
    batch = conversion.draw_batch(CONFIG, config, task)
    assert len(batch.x_start) == 10
    sigma = (batch.timesteps / 1000).view(-1, 1, 1, 1)
    with torch.no_grad():
        noisy = (1 - sigma) * batch.x_start + sigma * batch.noise
        predicted = task.model(noisy, batch.timesteps, class_labels=batch.conditions).sample
    errors = ((predicted - batch.x_start) / sigma.clamp(min=config.objective.min_sigma)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(conversion.losses_of(task, config, batch), errors)
    assert bench.models[VANILLA].loss == pytest.approx(errors.mean().item(), rel=1e-5)


def test_runs_of_one_interval_compute_alike(bench: Bench) -> None:
    folders = {name: bench.runs / name / "pipeline" for name in STARTS}
    tasks = conversion.build_models(bench.stages, open_pictures(bench.stages[PLAIN].data), folders, "cpu")
    for model in bench.models:
        run = conversion.runner_of(tasks[model], bench.stages[PLAIN], CONFIG)
        in_full = flops_of(lambda: run())  # noqa: B023
        runs = [row for row in bench.rows if row.model == model]
        linked = bench.models[model].long_skips != "none"
        expected = ["N2"] * linked + ["delta:N2", "fewer than N2"]
        expected += ["N3"] * linked + ["delta:N3", "fewer than N3"]
        assert [row.run for row in runs] == expected
        for caches, fewer in ((runs[: 1 + linked], runs[1 + linked]), (runs[2 + linked : -1], runs[-1])):
            assert len({row.steps_full for row in caches}) == 1
            for row in caches:
                cached = flops_of(lambda: run(OwnCache.of(row.run)))  # noqa: B023
                assert row.compute_ratio == pytest.approx(in_full / cached)
            (ratio,) = {row.compute_ratio for row in caches}
            assert fewer.num_steps == fewer.steps_full == math.ceil(6 / ratio)
            assert fewer.compute_ratio <= ratio
    assert all(row.scores["psnr"].finite_mean is not None and row.scores["ssim"].mean <= 1 for row in bench.rows)


def test_what_is_measured_before_is_what_stage_one_starts_with(bench: Bench, tmp_path: Path) -> None:
    start = bench.runs / PLAIN / "pipeline"
    still = dataclasses.replace(
        bench.stages[STAGE_ONE], start_from=str(start), max_steps=1, learning_rate=1e-30, weight_decay=0.0
    )
    started = load_model(train(still, tmp_path / "run", device="cpu")).state_dict()
    before = conversion.build(bench.stages[STAGE_ONE], open_pictures(still.data), start, "cpu").model.state_dict()
    for key, value in before.items():
        torch.testing.assert_close(started[key], value, rtol=0, atol=1e-29)


def test_finished_runs_are_not_trained_again(bench: Bench) -> None:
    files = [bench.runs / name / "log.jsonl" for name in STARTS]
    logs = [path.read_bytes() for path in files]
    pipelines = [load_model(bench.runs / name / "pipeline").state_dict() for name in STARTS]
    folders = conversion.train_runs(bench.stages, bench.runs, "cpu")
    assert [path.read_bytes() for path in files] == logs
    for name, old in zip(STARTS, pipelines, strict=True):
        new = load_model(folders[name]).state_dict()
        assert all(torch.equal(value, new[key]) for key, value in old.items())
    other = dataclasses.replace(bench.stages[PLAIN], learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"other settings \(learning_rate\)"):
        conversion.train_runs(bench.stages | {PLAIN: other}, bench.runs, "cpu")


@pytest.mark.parametrize(
    ("after", "cached", "loss", "chance"),
    [
        (0.5, 26.0, "25.0% above the 0.4000", "of that last, nothing is beyond the 5 dB"),
        (0.3, 34.5, "25.0% below the 0.4000", "of that last, N2 is beyond the 5 dB"),
    ],
)
def test_the_verdict_follows_the_numbers(after: float, cached: float, loss: str, chance: str) -> None:
    losses = {VANILLA: 0.42, BEFORE: 2.0, RESIDUAL: 0.42, FIRST: 0.6, SECOND: after, TRAINED_ON: 0.4}
    models = [ModelRow(name, "", 1, 1, 1, loss, 0.0, 0.0) for name, loss in losses.items()]
    psnr = {(SECOND, "N2"): cached, (SECOND, "delta:N2"): 25.0, (SECOND, "fewer than N2"): 30.0}
    psnr[TRAINED_ON, "delta:N2"] = 29.0
    rows = [RunRow(*key, 6, 3, 1.5, {"psnr": PairedScore(mean=value, std=1.0, num=2)}) for key, value in psnr.items()]
    config = dataclasses.replace(CONFIG, intervals=(2,))
    first, second = conversion.verdict(config, models, rows)
    assert "from 0.4200 to 2.0000" in first
    assert f"stage one brings it to 0.6000 and stage two to {after:.4f}, {loss}" in first
    assert f"lies {cached - 25:+.1f} dB (N2) from delta and {cached - 30:+.1f} dB (N2) from fewer steps" in second
    assert f"on the same model, and {cached - 29:+.1f} dB (N2) from delta on the control" in second
    assert chance in second


def test_equal_pictures_have_no_distance() -> None:
    pictures = torch.rand(2, 3, 16, 16)
    reference = Sampled(pictures, 1.0, 4)
    cells = RunRow.of("m", "N2", reference, reference, 1.5).cells()
    assert (cells["PSNR dB"], cells["SSIM"]) == ("equal", "1.0000 ± 0.0000")
    broken = pictures.clone()
    broken[0, 0, 0, 0] = math.nan
    cells = RunRow.of("m", "N2", Sampled(broken, 1.0, 4), reference, 1.5).cells()
    assert cells["PSNR dB"] == cells["SSIM"] == "not finite (1 of 2)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CONTROL: None}, "stages must be convert-plain, .*, got convert-plain, convert-stage-one, convert-stage-two$"),
        ({PLAIN: {"model": TextToImageModelConfig()}}, "convert-plain must train a class-to-image model, got a TextTo"),
        ({PLAIN: {"model": ModelConfig()}}, "in the two stages alone, got LongSkipConfig.* in convert-plain"),
        ({STAGE_TWO: {"model": ModelConfig(long_skip=None)}}, "in the two stages alone, got None in convert-stage-two"),
    ],
)
def test_stages_that_are_no_conversion_are_refused(change: dict, message: str, bench: Bench, tmp_path: Path) -> None:
    stages = dict(bench.stages)
    for name, options in change.items():
        if options is None:
            del stages[name]
        else:
            stages[name] = dataclasses.replace(stages[name], **options)
    with pytest.raises(ValueError, match=message):
        bench_conversion(replace(CONFIG, runs=tmp_path / "runs"), stages, OutputFolder(tmp_path / "out", "bench"))
    assert listing(tmp_path) == ["out"]


def test_more_pictures_than_there_are_is_refused(bench: Bench, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, num_pictures=13, runs=tmp_path / "runs")
    with pytest.raises(ValueError, match="num_pictures must be at most 12, got 13"):
        bench_conversion(config, bench.stages, OutputFolder(tmp_path / "out", "bench"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_pictures", 0), ("num_samples", 0), ("num_shown", 65), ("intervals", ()), ("intervals", (1,)),
     ("intervals", (2, 2)), ("intervals", (51,)), ("device", "tpu"), ("num_threads", 0)],
)  # fmt: skip
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as raised:
        ConversionBenchConfig(**{field: value})
    assert str(value) in str(raised.value)


def test_the_command_line_measures_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr("skipdit.benchmark.conversion.bench_conversion", lambda *arguments: calls.append(arguments))
    monkeypatch.chdir(tmp_path)
    cli.main(["bench", "conversion", "--intervals", "2", "--runs", "elsewhere", "--out", "out"])
    assert capsys.readouterr().out == "written: out\n"
    stages = {name: RECIPES[name]() for name in STARTS}
    ((*given, out),) = calls
    assert given == [ConversionBenchConfig(intervals=(2,), runs=Path("elsewhere")), stages]
    assert out.path == tmp_path / "out"
    with pytest.raises(SystemExit):
        cli.main(["bench", "conversion", "--num-shown", "65"])
    assert capsys.readouterr().err == "skipdit: error: num_shown must be at most num_samples, 64, got 65\n"
    with pytest.raises(SystemExit):
        cli.main(["bench", "conversions"])
    assert (
        "must be one of models, video, conversion, cache, compile, gpu, train, got 'conversions'; did you mean"
        in capsys.readouterr().err
    )
