"""The benchmark of compilation, at tiny size: what it counts, its files. No test looks at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_dit, tiny_latte

from skipdit import cli
from skipdit.benchmark import compiling
from skipdit.benchmark.compiling import CompileBenchConfig, bench_compile, single_steps
from skipdit.benchmark.compiling.report import (
    CONDITIONING,
    OVERHEAD,
    TIMESTEP,
    GraphRow,
    StepRow,
    Timing,
    verdict,
)
from skipdit.diffusion import Objective, make_scheduler
from skipdit.files.output import OutputFolder
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline

FLOW = Objective(process="flow", prediction_type="sample")
SIZES = {"num_layers": 5, "out_channels": 4, "downscale_freq_shift": 0}
SMALL: dict[str, Any] = {
    "num_inference_steps": 6,
    "batch_size": 1,
    "step_batch_sizes": (2,),
    "num_runs": 2,
    "num_repetitions": 3,
}
PRESET = "DiT-S/8"
TAYLORSEER = "diffusers-TaylorSeer:N3-o1"


def save(folder: Path, model: Any, pipeline: Any = ClassToImagePipeline) -> Path:
    path = folder / "pipeline"
    pipeline(model, make_scheduler(FLOW, "euler")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("tiny"), tiny_dit(**SIZES))


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a compiler, so that nothing is compiled in earnest."""
    path = tmp_path_factory.mktemp("out")
    specs = ("N3", compiling.MIXED, "tgate:N2-900-600")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "check_compiler", refuse)
        config = CompileBenchConfig(
            model=str(folder),
            specs=specs,
            rivals=(TAYLORSEER,),
            timed=("N3", TAYLORSEER),
            step_presets=(PRESET,),
            **SMALL,
        )
        bench_compile(config, OutputFolder(path, "bench"))
    return path


def refuse(device: str) -> None:
    raise ValueError("no compiler here")


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "compile.json").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# The whole benchmark


def test_ours_compile_whole_and_others_are_measured_alike(report: dict[str, Any]) -> None:
    plain, skip, mixed, tgate, diffusers, taylorseer = report["graphs"]
    assert [row["setting"] for row in report["graphs"]] == [
        "no cache",
        "N3",
        compiling.MIXED,
        "tgate:N2-900-600",
        "no cache",
        "TaylorSeer:N3-o1",
    ]
    assert [row["graphs"] for row in (plain, skip, mixed, diffusers)] == [1, 2, 3, 1]
    assert [row["steps"] for row in (plain, skip, mixed, diffusers)] == [[6, 0], [2, 4], [2, 4], [6, 0]]
    for row in (plain, skip, mixed, diffusers):
        assert (row["breaks"], row["recompiled"], row["equal"], row["fullgraph_error"]) == (0, 0, True, None)
    assert taylorseer["breaks"] > 0
    assert "torch.compiler.disable" in taylorseer["fullgraph_error"]
    assert taylorseer["equal"]
    assert "no cross_attention" in tgate["refused"]


def test_times_and_steps_are_all_there(report: dict[str, Any], folder: Path) -> None:
    runs = [(row["setting"], row["mode"], len(row["cached"]), len(row["uncached"])) for row in report["runs"]]
    assert runs == [("N3", "eager", 2, 2), ("TaylorSeer:N3-o1", "eager", 2, 2)]
    steps = [(row["model"], row["what"], row["mode"], row["batch_size"]) for row in report["steps"]]
    wanted = (OVERHEAD, TIMESTEP, CONDITIONING)
    assert steps == [(model, what, "eager", 2) for model in (str(folder), PRESET) for what in wanted]
    assert all(len(row["seconds"]) == len(row["base_seconds"]) == 3 for row in report["steps"])


def test_the_page(out: Path) -> None:
    page = (out / "compile.md").read_text(encoding="utf-8")
    assert "| skipdit | N3 | 2 + 4 | 2 | 0 | 0 | yes |  |" in page
    assert "- skipdit tgate:N2-900-600: DiT has no cross_attention" in page
    assert "Of skipdit 3 of 3 rows compile whole, in 1 to 3 graphs, and never anew." in page
    assert "Nothing compiled was timed: no compiler here." in page


def test_the_bare_units_are_those_of_the_reuse_step() -> None:
    """The benchmark itself compares the outputs."""
    model = tiny_dit(**SIZES)
    row = single_steps.time_overhead("tiny", model, 2, 3, compile_it=False)
    assert (row.what, row.model, row.mode, len(row.seconds)) == (OVERHEAD, "tiny", "eager", 3)
    assert not getattr(model, "is_cache_enabled", False)


def test_reasons_are_short() -> None:
    limit = type("FailOnRecompileLimitHit", (RuntimeError,), {})("Hard failure due to fullgraph=True")
    assert compiling.in_few_words(limit) == "more graphs than PyTorch allows for one function"
    logger = RuntimeError("logging.Logger method not supported for non-export cases\n  Explanation: ...")
    assert compiling.in_few_words(logger) == "logging.Logger method in the graph"
    mock = (
        "Attempted to call function marked as skipped\n  the function `_patch_object` in file `/lib/unittest/mock.py`"
    )
    assert compiling.in_few_words(RuntimeError(mock)) == (
        "calls `_patch_object` of `mock`, which PyTorch does not compile"
    )
    assert compiling.in_few_words(RuntimeError()) == "RuntimeError"


def test_verdict_by_hand() -> None:
    rows = [
        GraphRow(library="skipdit", setting="a", steps=(3, 3), graphs=2, equal=True),
        GraphRow(library="skipdit", setting="b", steps=(3, 3), graphs=5, recompiled=1, equal=True),
        GraphRow(library="diffusers", setting="c", steps=(3, 3), graphs=9),
    ]
    steps = [
        StepRow(OVERHEAD, "a", "eager", 1, (1.1, 1.0), (1.0, 1.0)),
        StepRow(OVERHEAD, "a", "eager", 8, (1.0,), (1.0,)),
        StepRow(CONDITIONING, "a", "eager", 1, (0.05,), (1.0,)),
        StepRow(CONDITIONING, "b", "eager", 1, (0.01,), (1.0,)),
        StepRow(TIMESTEP, "a", "eager", 1, (0.02,), (1.0,)),
    ]
    whole, differ, timestep, conditioning, overhead = verdict(rows, steps)
    assert timestep == "Share of a full step, timestep embedding: 2.0% (a batch 1)."
    assert conditioning == "Share of a full step, all conditioning: 5.0% (a batch 1), 1.0% (b batch 1)."
    assert whole == "Of skipdit 1 of 2 rows compile whole, in 2 to 2 graphs, and never anew."
    assert differ == "Rows whose pictures differ from those without compilation: c."
    assert overhead == "Overhead of a reuse step, target at most 1.03: missed by a eager batch 1 (1.050)."
    assert Timing("skipdit", "a", "eager", (2.0, 4.0), (1.0, 1.0)).speedup == 3


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", 3),
        ("batch_size", 0),
        ("step_batch_sizes", ()),
        ("step_batch_sizes", (0,)),
        ("num_runs", 0),
        ("num_repetitions", 0),
        ("num_threads", 0),
        ("timed", ("N7",)),
        ("rivals", ("diffusers-Nothing:N2",)),
        ("step_presets", ("DiT-S/3",)),
    ],
)
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as raised:
        CompileBenchConfig(**{field: value})
    assert str(value[0] if field in ("timed", "rivals", "step_presets") else value) in str(raised.value)


def test_models_that_it_is_not_for_are_refused(tmp_path: Path) -> None:
    video = save(tmp_path / "video", tiny_latte(out_channels=4), ClassToVideoPipeline)
    plain = save(tmp_path / "plain", tiny_dit(long_skip=None, **SIZES))
    for path, reason in ((video, "got Latte"), (plain, "got one without")):
        with pytest.raises(ValueError, match=f"a class-to-image DiT with long skips, {reason}"):
            bench_compile(CompileBenchConfig(model=str(path)), OutputFolder(tmp_path / "out", "bench"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["cache", "compile"])
def test_the_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", name, "--help"])
    assert raised.value.code == 0
    assert f"skipdit bench {name}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", name, "--num-inference-steps", "1"])
    assert raised.value.code == 2
    assert "num_inference_steps must be" in capsys.readouterr().err
