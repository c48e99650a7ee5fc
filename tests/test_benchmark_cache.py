"""The benchmark of caches on trained models' pipelines, at tiny size."""

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import listing, tiny_dit, tiny_latte
from torch import Tensor, nn

from skipdit.benchmark import cache as bench
from skipdit.benchmark.cache import CacheBenchConfig, Cost, Tally, bench_caches, report_name
from skipdit.benchmark.cache_methods import KIN, METHODS, SpecCache, method_of, schedules_in, spec_cache
from skipdit.benchmark.cache_report import (
    RATIOS,
    Row,
)
from skipdit.cache.enable import cache_summary
from skipdit.cache.methods import parse_method
from skipdit.calibration import config as calibration
from skipdit.diffusion import Objective, make_scheduler
from skipdit.files.output import OutputFolder
from skipdit.loading import Source, load_source
from skipdit.metrics.table import ALWAYS, METRICS
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline
from skipdit.runs import Counts, Sampled
from skipdit.tasks import TASKS
from skipdit.tasks.task import Sampler

FLOW = Objective(process="flow", prediction_type="sample")
SIZES = {"sample_size": 16, "patch_size": 4, "in_channels": 3, "out_channels": 3}
SMALL: dict[str, Any] = {
    "num_seeds": 3,
    "batch_size": 2,
    "num_inference_steps": 6,
    "guidance_scale": 2.0,
    "fewer_steps": (4, 2),
    "specs_of_shorter_runs": (),
    "num_threads": 1,
    "rivals": False,
}
SPECS = ("N2", "skip-taylor:N3-o1", "N2-k9")
Report = dict[str, Any]


class Network(nn.Module):
    """In the place of EfficientNet-Lite0."""

    def forward(self, pictures: Tensor) -> list[Tensor]:
        return [pictures, pictures[..., ::2, ::2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of an image model with ten classes and names for them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("runs") / "tiny-model" / "pipeline"
    names = {str(label): f"class {label}" for label in range(10)}
    ClassToImagePipeline(tiny_dit(**SIZES), make_scheduler(FLOW, "euler"), id2label=names).save_pretrained(path)
    return path


@pytest.fixture
def sampler(folder: Path) -> Sampler:
    return load_source(str(folder), device="cpu").sampler


def config(folder: Path, **options: Any) -> CacheBenchConfig:
    return CacheBenchConfig(**SMALL | {"model": str(folder), "specs": SPECS} | options)


def rows_of(config: CacheBenchConfig, rivals: Callable[[Source], Sequence[Any]] = lambda source: ()) -> list[Row]:
    source = load_source(config.model, device="cpu")
    plans = bench.make_plans(config, source, config.num_inference_steps or 50, rivals(source))
    return bench.measure(config, *plans, bench.make_batches(config, source))


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "METRICS", (*ALWAYS, dataclasses.replace(METRICS[-1], check=None)))
        patch.setattr("skipdit.metrics.table.load_feature_network", lambda device: Network())
        bench_caches(config(folder), OutputFolder(path, "bench"))
    return path


@pytest.fixture(scope="module")
def report(out: Path) -> Report:
    return json.loads((out / "cache_quality_tiny_model.json").read_text(encoding="utf-8"))


def find(report: Report, setting: str, group: str | None = None) -> dict[str, Any]:
    (row,) = (row for row in report["rows"] if row["setting"] == setting and group in (None, row["group"]))
    return row


# ----------------------------------------------------------------------------------------------------------------------
# The whole benchmark


def test_every_run_is_a_row(report: Report) -> None:
    assert [(row["group"], row["setting"]) for row in report["rows"]] == [
        ("control", "once more"),
        ("fewer steps", "4 steps"),
        ("fewer steps", "2 steps"),
        ("second order", "6 steps"),
        ("second order", "4 steps"),
        ("second order", "2 steps"),
        ("ours", "skip-taylor:N3-o1"),
        ("others", "N2"),
        ("others", "N2-k9"),
    ]
    measured = [row for row in report["rows"] if row["refused"] is None]
    assert all(len(row["speedups"]) == 2 and row["speedup"] > 0 for row in measured)
    assert all(row["perceptual"]["mean"] >= 0 and row["ssim"]["mean"] <= 1 + 1e-6 for row in measured)
    assert all((row["own_psnr"] is not None) == (row["group"] == "second order") for row in measured[4:])
    assert report["config"]["num_seeds"] == 3
    assert report["environment"]["seed"] == "0"


def test_the_control_is_equal_to_the_bit(report: Report) -> None:
    control = find(report, "once more")
    assert (control["psnr"]["mean"], control["psnr"]["num_equal"], control["psnr"]["num"]) == (None, 3, 3)
    assert control["ssim"]["mean"] == pytest.approx(1, abs=1e-6)
    assert control["perceptual"] == {"mean": 0, "std": 0, "num": 3, "num_equal": 0, "num_broken": 0}
    assert control["flop_ratio"] == 1
    assert find(report, "6 steps")["own_psnr"]["num_equal"] == 3


def test_what_a_cache_did_is_counted(report: Report) -> None:
    for setting, full in (("N2", 3), ("skip-taylor:N3-o1", 2)):
        row = find(report, setting)
        assert (row["steps_full"], row["steps_reused"]) == (full, 6 - full)
        assert row["bytes_held"] > 0
        units = 6 * 6 / (full * 6 + (6 - full) * 2)
        assert 1.1 < row["flop_ratio"] < units  # embedding and output are no part of a unit
        assert row["psnr"]["mean"] < 100
    assert find(report, "4 steps", "fewer steps")["flop_ratio"] == pytest.approx(6 / 4)
    assert find(report, "2 steps", "second order")["flop_ratio"] == pytest.approx(6 / 2)


def test_a_refused_cache_is_a_row_with_the_reason(report: Report, out: Path) -> None:
    row = find(report, "N2-k9")
    assert "num_shallow_units" in row["refused"]
    assert (row["psnr"], row["flop_ratio"], row["speedups"], row["speedup"]) == (None, None, [], None)
    text = (out / "cache_quality_tiny_model.md").read_text(encoding="utf-8")
    assert f"Refused by this model:\n\n- skip, `N2-k9`: {row['refused']}\n" in text


def test_files(report: Report, out: Path) -> None:
    stem = "cache_quality_tiny_model"
    assert listing(out) == [f"{stem}.json", f"{stem}.md", f"{stem}.png"]
    text = (out / f"{stem}.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(report["rows"]) - 1 + 2 * (2 + len(RATIOS))
    assert "| others | skip | N2 | 3 + 3 |" in text
    assert "| control | no cache | once more | 6 + 0 |" in text
    assert all(sentence in text for sentence in report["verdict"])
    assert len(report["verdict"]) == 3
    assert f"]({stem}.png)" in text
    with Image.open(out / f"{stem}.png") as picture:
        assert picture.width > 1000


def test_a_missing_package_is_named_before_anything_is_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipdit.metrics.perceptual.WEIGHTS_PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="the weights of EfficientNet-Lite0"):
        bench_caches(config(folder), OutputFolder(tmp_path, "bench"))
    assert not list(tmp_path.iterdir())


def test_clips_are_measured_by_frames(tmp_path: Path) -> None:
    pipeline = ClassToVideoPipeline(tiny_latte(**SIZES, num_classes=None), make_scheduler(FLOW, "euler"))
    pipeline.save_pretrained(tmp_path / "clips")
    rows = rows_of(config(tmp_path / "clips", specs=("N2",), perceptual=False, num_seeds=2, fewer_steps=(3,)))
    assert [row.setting for row in rows] == ["6 steps", "once more", "3 steps", "3 steps", "N2"]
    assert rows[1].scores["psnr"].text() == "equal"
    assert all(row.scores["psnr"].finite_mean and "perceptual" not in row.scores for row in rows[2:])


def test_fewer_steps_follow_the_number_of_steps(folder: Path) -> None:
    default = config(folder, fewer_steps=None)
    assert default.shorter_runs(50) == (38, 33, 25, 20, 15, 12)
    assert default.shorter_runs(4) == (3, 2, 1)
    assert config(folder, fewer_steps=(5, 2)).shorter_runs(6) == (5, 2)


def test_fewer_steps_are_fewer_than_the_default_of_the_model(folder: Path) -> None:
    """They can be checked once the model has said how many steps it takes."""
    unknown = config(folder, num_inference_steps=None, fewer_steps=(50,))
    with pytest.raises(ValueError, match=r"fewer_steps must be below num_inference_steps, 50, .*\(50,\)"):
        load_source(unknown.model, device="cpu").complete(unknown)


def test_a_cache_and_fewer_steps_together(folder: Path) -> None:
    rows = rows_of(config(folder, specs=("N2",), specs_of_shorter_runs=("N2", "calibrated:2x"), perceptual=False))
    whole, shorter, half, *refused = rows[-5:]
    assert [row.setting for row in (shorter, half)] == ["4 steps, N2", "3 steps, N2"]
    assert {(row.method, row.group) for row in (shorter, half)} == {("skip, fewer steps", "others")}
    assert [(row.steps_full, row.steps_reused) for row in (whole, shorter, half)] == [(3, 3), (2, 2), (2, 1)]
    assert shorter.flop_ratio == pytest.approx(1.5 * (whole.flop_ratio or 0), rel=1e-6)
    assert all(row.refused and row.method == "calibrated, fewer steps" for row in refused)


def test_a_second_order_sampler_has_no_other(folder: Path, sampler: Sampler) -> None:
    sampler.pipeline.scheduler = make_scheduler(FLOW, "dpm")
    baselines, plans = bench.make_plans(config(folder), Source(sampler), 6, ())
    assert {plan.group for plan in (*baselines, *plans)} == {"control", "fewer steps", "ours", "others"}


def test_a_schedule_for_other_steps_is_refused_and_a_missing_one_is_an_error(folder: Path, tmp_path: Path) -> None:
    schedule = tmp_path / "schedule.json"
    schedule.write_text(json.dumps({"full_steps": [0, 2], "num_inference_steps": 4}), encoding="utf-8")
    short = config(folder, specs=(str(schedule),), perceptual=False, num_seeds=1, fewer_steps=())
    refused = rows_of(short)[-1]
    assert (refused.method, refused.group) == ("calibrated", "ours")
    assert "4 steps" in str(refused.refused)
    fitting = rows_of(dataclasses.replace(short, num_inference_steps=4))[-1]
    assert (fitting.steps_full, fitting.steps_reused, fitting.refused) == (2, 2, None)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rows_of(dataclasses.replace(short, specs=("nowhere.json",)))


# ----------------------------------------------------------------------------------------------------------------------
# Caches of other libraries


@dataclass
class Rival:
    """Doubles what its own pipeline computes first; it counts nothing."""

    name: str
    setting: str
    sampler: Sampler | None
    ours: bool = False
    fails_at: str = ""
    is_on: bool = False

    def enable(self, pipeline: Any) -> None:
        if self.fails_at == "enable":
            raise ValueError("not for\nthis model")
        self.is_on = True
        if self.fails_at == "run":
            self.handle = pipeline.transformer.register_forward_pre_hook(self.fail)
        else:
            self.handle = pipeline.transformer.blocks[0].register_forward_hook(lambda *arguments: arguments[-1] * 2)

    def fail(self, *arguments: Any) -> None:
        raise ValueError("not for this model")

    def disable(self, pipeline: Any) -> None:
        self.handle.remove()
        self.is_on = False

    def counts(self, pipeline: Any) -> Counts | None:
        assert self.is_on
        return None


def test_rivals_are_held_against_their_own_pipeline(folder: Path) -> None:
    made: list[Rival] = []

    def rivals(source: Source) -> Sequence[Rival]:
        other = Sampler(source.sampler.task, copy.deepcopy(source.sampler.pipeline))
        with torch.no_grad():
            other.pipeline.transformer.blocks[2].attn.proj.weight.mul_(1.01)
        made.extend(
            [
                Rival("other", "at 1", other),
                Rival("other", "at 2", other, fails_at="enable"),
                Rival("plain", "at 3", None, fails_at="run"),
            ]
        )
        return made

    rows = rows_of(config(folder, specs=(), perceptual=False, fewer_steps=()), rivals)
    assert [(row.method, row.setting) for row in rows] == [
        ("second order", "6 steps"),
        ("no cache", "the pipeline of other"),
        ("no cache", "once more"),
        ("other", "at 1"),
        ("other", "at 2"),
        ("plain", "at 3"),
    ]
    own, once_more, first, second, third = rows[1:]
    assert own.scores["psnr"].finite_mean is not None  # its pipeline is another
    assert once_more.scores["psnr"].text() == "equal"
    assert first.scores["psnr"].finite_mean is not None
    assert (first.steps_full, first.steps_reused, first.bytes_held, first.flop_ratio) == (None, None, None, 1)
    assert second.refused == third.refused == "not for this model"
    assert not any(each.is_on for each in made)


def test_an_error_of_a_run_without_a_cache_is_an_error(folder: Path, sampler: Sampler) -> None:
    settings = config(folder, perceptual=False)
    baselines, plans = bench.make_plans(settings, Source(sampler), 6, ())
    batches = [bench.Batch([99], [0])]
    with pytest.raises(ValueError, match="class labels must be between 0 and 9"):
        bench.measure(settings, baselines, plans, batches)


def test_a_failed_run_leaves_the_pipeline_as_it_was(folder: Path, sampler: Sampler) -> None:
    pipeline = sampler.pipeline
    scheduler, model_class = pipeline.scheduler, type(pipeline.transformer)
    plan = bench.Plan("m", "N2", "others", sampler, 6, "dpm", SpecCache("m", "N2", False, Source(sampler)))
    with pytest.raises(ValueError, match="class labels"):
        bench.run(plan, config(folder), bench.Batch([99], [0]))
    with pytest.raises(ValueError, match="class labels"):
        bench.cost_of(dataclasses.replace(plan, scheduler=None), config(folder), bench.Batch([99], [0]))
    assert pipeline.scheduler is scheduler
    assert "step" not in vars(scheduler)
    assert type(pipeline.transformer) is model_class
    with pytest.raises(ValueError, match="no cache is enabled"):
        cache_summary(pipeline)


# ----------------------------------------------------------------------------------------------------------------------
# Its parts


def test_a_sample_depends_on_its_own_seed_alone(folder: Path, sampler: Sampler) -> None:
    plan = bench.Plan("", "", "control", sampler, 3)
    together = bench.run(plan, config(folder), bench.Batch([1, 2, 3], [5, 6, 7])).samples
    for index, (label, seed) in enumerate(zip([1, 2, 3], [5, 6, 7], strict=True)):
        alone = bench.run(plan, config(folder), bench.Batch([label], [seed])).samples
        torch.testing.assert_close(together[index], alone[0], rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_batches_take_labels_in_turn_and_a_seed_each(folder: Path, sampler: Sampler) -> None:
    def labels(source: Source, **options: Any) -> list[int]:
        return [label for batch in bench.make_batches(config(folder, **options), source) for label in batch.conditions]

    assert labels(Source(sampler), num_seeds=5) == [0, 2, 4, 6, 8]
    assert labels(Source(sampler), num_seeds=12) == [*range(10), 0, 1]
    assert labels(Source(sampler, ("class 4", "class 2")), num_seeds=3) == [4, 2, 4]
    assert labels(Source(sampler, ("class 4",)), num_seeds=2, labels=("class 7",)) == [7, 7]
    with pytest.raises(ValueError, match="unknown label 'clas'"):
        labels(Source(sampler), labels=("clas",))
    batches = bench.make_batches(config(folder, seed=3, num_seeds=5), Source(sampler))
    assert [batch.seeds for batch in batches] == [[3, 4], [5, 6], [7]]


def test_flops_of_other_decisions() -> None:
    cost = Cost(flops=520, steps=(4, 6), slopes=(100.0, 20.0), tells_reuse=True)
    assert cost.at(4, 6) == 520
    assert cost.at(7, 3) == pytest.approx(520 + 300 - 60)
    never = dataclasses.replace(cost, flops=1000, steps=(10, 0), tells_reuse=False)
    assert never.at(10, 0) == 1000
    assert never.at(6, 4) is None


def test_flops_are_those_of_the_kinds_of_step(folder: Path, sampler: Sampler) -> None:
    settings, batch = config(folder), bench.Batch([1, 2], [0, 1])

    def cost(spec: str) -> Cost:
        plan = bench.Plan("m", spec, "others", sampler, 6, cache=SpecCache("m", spec, False, Source(sampler)))
        return bench.cost_of(plan, settings, batch)

    uncached = bench.cost_of(bench.Plan("", "", "control", sampler, 6), settings, batch)
    assert uncached.at(3, 0) == pytest.approx(uncached.flops / 2)
    every_second, every_third = cost("N2"), cost("N3")
    assert (every_second.steps, every_third.steps) == ((3, 3), (2, 4))
    assert every_second.slopes[0] == pytest.approx(uncached.flops / 6)
    assert every_second.at(2, 4) == pytest.approx(every_third.flops)


def test_batches_of_an_adaptive_cache_are_averaged() -> None:
    tally = Tally(
        cost=Cost(100, (5, 5), (16.0, 4.0), True), counts=[Counts(6, 4, bytes_held=10), Counts(8, 2, bytes_held=30)]
    )
    pictures = torch.rand(2, 3, 16, 16)
    for _ in range(2):
        tally.add(Sampled(pictures, 1.0, 10), Sampled(pictures, 2.0, 10), None, ALWAYS)
    tally.values[0]["psnr"] = torch.tensor([40.0, math.inf])
    text = Sampler(TASKS["text-to-image"], None)
    plan = bench.Plan("m", "s", "others", text, 10, cache=SpecCache("m", "s", False, Source(text)))
    uncached = Cost(160, (10, 0), (16.0, 0.0), False)
    row = tally.row(plan, uncached, uncached)
    assert (row.steps_full, row.steps_reused, row.bytes_held, row.speedup) == (7, 3, 30, 2)
    assert row.flop_ratio == pytest.approx(160 / (100 + 2 * 16 - 2 * 4))
    assert row.scores["psnr"].text() == "40.00 ± 0.00 (3 of 4 equal)"
    tally.values[1]["psnr"] = torch.tensor([math.nan, 30.0])
    assert tally.row(plan, uncached, uncached).scores["psnr"].text() == "not finite (1 of 4)"


def test_the_drift_of_the_machine_is_taken_out(folder: Path, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached run looked up to 25% slower than it was, as the machine had slowed down since the uncached run."""
    settings, runs, original = config(folder, perceptual=False), itertools.count(), bench.run

    def slowing(plan: bench.Plan, settings: CacheBenchConfig, batch: bench.Batch) -> Sampled:
        return dataclasses.replace(
            original(plan, settings, batch), seconds=plan.num_inference_steps * (1 + 0.01 * next(runs))
        )

    monkeypatch.setattr(bench, "run", slowing)
    steps = [6, 5, 4, 3, 2, 1] * 4
    plans = [bench.Plan("fewer steps", f"{n} steps", "fewer steps", sampler, n) for n in steps]
    batch = bench.make_batches(settings, Source(sampler))[0]
    turns, base = [(plan, bench.Tally()) for plan in plans], bench.Plan("no cache", "", "control", sampler, 6)
    bench.run_batch(settings, batch, [(base, bench.Tally())], turns, (), lambda plan: None)
    for plan, tally in turns:
        assert tally.speedups == [pytest.approx(6 / plan.num_inference_steps, rel=0.05)]
    assert next(runs) == 1 + len(plans) + 3


def test_an_interrupted_benchmark_continues_after_the_last_complete_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    original = bench.run

    def stopping(plan: bench.Plan, settings: CacheBenchConfig, batch: bench.Batch) -> Sampled:
        runs.append(f"{plan.setting} {batch.seeds}")
        if len(runs) == stop_at:
            raise KeyboardInterrupt
        return original(plan, settings, batch)

    monkeypatch.setattr(bench, "run", stopping)
    settings = config(folder, perceptual=False)
    stop_at, whole = 0, tmp_path / "whole"
    bench_caches(settings, OutputFolder(whole, "bench"))
    every, stop_at, out = list(runs), len(runs) - 2, tmp_path / "out"
    runs.clear()
    with pytest.raises(KeyboardInterrupt):
        bench_caches(settings, OutputFolder(out, "bench"))
    assert listing(out) == ["cache_quality_tiny_model.draft.json"]
    with pytest.raises(ValueError, match=r"draft\.json is of a run with other settings or on another machine"):
        bench_caches(config(folder, perceptual=False, num_inference_steps=7), OutputFolder(out, "bench"))
    stop_at = 0
    runs.clear()
    bench_caches(settings, OutputFolder(out, "bench"))
    assert runs == every[len(every) // 2 :]  # the second of two batches
    assert listing(out) == listing(whole)
    pair = [json.loads((path / "cache_quality_tiny_model.json").read_text())["rows"] for path in (whole, out)]
    for one, other in zip(*pair, strict=True):
        assert len(one["speedups"]) == len(other["speedups"])
        for noisy in ("speedups", "speedup", "speedup_range"):
            one.pop(noisy, None), other.pop(noisy, None)
        assert one == other


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ("", "is not valid JSON"),
        ("[]", "is not as expected"),
        ('{"of": {}, "batches": 1}', "missing required field `tallies`"),
        ('{"of": {}, "batches": Infinity, "tallies": []}', "Infinity is not a JSON number"),
        ('{"of": {}, "batches": 1, "tallies": [{"values": [{"psnr": ["many"]}]}]}', "is not as expected"),
        ('{"of": {}, "batches": 1, "tallies": []}', "is of a run with other settings"),
        ('{"of": {"seed": 0}, "batches": 1, "tallies": []}', "is damaged: remove it"),
    ],
)
def test_a_draft_that_is_none_is_refused_in_one_line(text: str, reason: str, tmp_path: Path) -> None:
    out = OutputFolder(tmp_path, "bench")
    out.write_text("x.draft.json", text)
    with pytest.raises(ValueError, match=r"x\.draft\.json") as raised:
        bench.Draft(out, "x.draft.json", of={"seed": 0}).load(1, 2)
    assert reason in str(raised.value)


def test_a_draft_keeps_equal_and_broken_pictures_apart(tmp_path: Path) -> None:
    draft = bench.Draft(OutputFolder(tmp_path, "bench"), "x.draft.json", of={"seed": 0, "specs": ("N2",)})
    assert draft.load(1, 0) is None
    values = torch.tensor([math.inf, math.nan, 30.123456, -math.inf])
    draft.save(3, [Tally(values=[{"psnr": values}], speedups=[1.5], counts=[Counts(2, 1)])])
    json.loads((tmp_path / "x.draft.json").read_text(), parse_constant=pytest.fail)
    batches, (tally,), others = draft.load(1, 0)
    assert (batches, others, tally.speedups, tally.counts) == (3, [], [1.5], [Counts(2, 1)])
    torch.testing.assert_close(tally.values[0]["psnr"], values, rtol=0, atol=0, equal_nan=True)


def test_a_method_has_one_line() -> None:
    assert method_of("N2") == ("skip", False)
    assert method_of("N17-500-20") == ("skip", False)
    assert method_of("skip-taylor:N2-o1") == ("skip-taylor", True)
    assert method_of("skip-taylor:N4-800-100-o1") == ("skip-taylor, window", True)
    assert method_of("fbcache:0.7") == ("fbcache", False)
    assert method_of("unheard-of:N2") == ("unheard-of", False)
    assert method_of("auto") == method_of("auto:1.8") == method_of("auto-k2") == ("auto", True)
    specs = [spec for method in METHODS.values() for spec in method.specs]
    assert CacheBenchConfig().specs == tuple(specs)
    assert len(set(specs)) == len(specs)
    for spec in specs:
        if not spec.startswith("calibrated"):
            parse_method(spec)


def test_the_schedules_of_the_documented_command_are_read() -> None:
    """Two had a value that is refused since, so that the command failed."""
    for folder in sorted((Path(__file__).parents[1] / "benchmarks" / "schedules").iterdir()):
        paths = schedules_in(folder)
        assert paths
        assert all(method_of(path)[0] for path in paths)


def test_schedules_are_lines_by_what_they_reuse(tmp_path: Path) -> None:
    fields = {"full_steps": [0, 2], "num_inference_steps": 4}
    parts = {"parts": [{"kinds": ["mlp"], "full_steps": [0, 2]}], "num_inference_steps": 4}
    expected = {
        "skip/2x": (fields | {"order": 1}, ("calibrated", True)),
        "delta-taylor/2x": (fields | {"method": "delta-taylor", "order": 1}, ("delta-taylor, calibrated", False)),
        "smoothcache/2x": (parts, ("smoothcache", False)),
        "kin/dpcache-2x": (fields | {"method": "delta-taylor", "order": 1}, ("dpcache", False)),
        "kin-skip/l2p-2x": (fields | {"order": 1}, ("l2p, skip", False)),
    }
    assert KIN == calibration.KIN
    for name, (written, _) in expected.items():
        path = tmp_path / f"{name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps(written))
    for name in ("report.json", "skipdit.json"):  # what a calibration writes beside them
        (tmp_path / "skip" / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no schedules in .*nowhere: skipdit calibrate"):
        schedules_in(tmp_path / "nowhere")
    found = schedules_in(tmp_path)
    source: Any = None
    assert {spec_cache(path, source).setting: method_of(path) for path in found} == {
        name: line for name, (_, line) in expected.items()
    }


def test_report_names(tmp_path: Path) -> None:
    assert report_name("emoji") == "cache_quality"
    assert report_name("emoji-text-clips") == "cache_quality_emoji_text_clips"
    assert report_name(str(tmp_path / "some-run" / "pipeline")) == "cache_quality_some_run"


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_seeds", 0), ("batch_size", 0), ("num_inference_steps", 1), ("num_inference_steps", 1001),
     ("specs", ("N2", "N2")), ("fewer_steps", (1000,)), ("fewer_steps", (0,)), ("fewer_steps", (4, 4)),
     ("device", "tpu"), ("num_threads", 0)],
)  # fmt: skip
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as raised:
        CacheBenchConfig(**{field: value})
    assert str(value) in str(raised.value)
