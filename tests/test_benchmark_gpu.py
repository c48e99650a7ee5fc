"""The benchmark of caches on a GPU, at tiny size on the CPU: rows, bounds, its time limit. No test looks at a time."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from skipdit import cli
from skipdit.benchmark.gpu import GpuBenchConfig, Runs, bench_gpu
from skipdit.benchmark.measure import flops_of
from skipdit.cache.enable import cached
from skipdit.files.output import OutputFolder

SMALL = GpuBenchConfig(
    preset="DiT-S/8",
    batch_sizes=(1, 2),
    modes=("eager",),
    specs=("N2", "fbcache:0.000001", "fora:N2"),
    num_inference_steps=4,
    num_rounds=2,
    dtype="float32",
    device="cpu",
)


def output(folder: Path) -> OutputFolder:
    return OutputFolder(folder, "bench")


def test_rows_and_files(tmp_path: Path) -> None:
    rows = bench_gpu(SMALL, output(tmp_path))
    assert [(row.batch_size, row.spec) for row in rows] == [(size, spec) for size in (1, 2) for spec in SMALL.specs]
    assert [(row.steps_full, row.steps_reused) for row in rows[:3]] == [(2, 2), (4, 0), (2, 2)]
    assert all(len(row.seconds_full) == len(row.seconds_cached) == 2 for row in rows)
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["spec"] for row in report["rows"]] == [row.spec for row in rows]
    assert report["left_out"] == []
    text = (tmp_path / "cpu.md").read_text()
    assert text.count("| eager |") == 6
    assert "target 0.9: " in text
    assert "Not begun" not in text


def test_the_bound_is_that_of_counted_flops(tmp_path: Path) -> None:
    (row,) = bench_gpu(replace(SMALL, batch_sizes=(1,), specs=("N2",)), output(tmp_path))
    runs = Runs(SMALL)
    inputs = runs.inputs(1)
    with torch.no_grad():
        full = flops_of(lambda: runs.seconds(inputs))
        with cached(runs.pipeline, "N2"):
            runs.seconds(inputs)
            reused = flops_of(lambda: runs.seconds(inputs))
    assert row.bound == pytest.approx(full / reused, rel=1e-3)


def test_what_takes_too_long_is_named(tmp_path: Path) -> None:
    seconds = count(step=100)  # a row takes a hundred
    rows = bench_gpu(replace(SMALL, max_seconds=150), output(tmp_path), clock=lambda: next(seconds))
    assert [row.spec for row in rows] == ["N2"]
    assert "Not begun within 150 seconds: fbcache:0.000001, batch 1, eager; " in (tmp_path / "cpu.md").read_text()
    assert len(json.loads((tmp_path / "cpu.json").read_text())["left_out"]) == 5


def test_compiled_runs_are_whole_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, compile = [], nn.Module.compile

    def traced(module: nn.Module, **options: Any) -> None:
        asked.append(options)
        compile(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", traced)
    config = replace(SMALL, batch_sizes=(1,), modes=("eager", "reduce-overhead"), specs=("N2",))
    rows = bench_gpu(config, output(tmp_path))
    assert [(row.mode, row.steps_reused) for row in rows] == [("eager", 2), ("reduce-overhead", 2)]
    assert asked == [{"fullgraph": True, "mode": "reduce-overhead"}]
    assert rows[0].bound == rows[1].bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": ()}, "batch_sizes must be one or more numbers above 0"),
        ({"max_seconds": 0.0}, "max_seconds must be above 0"),
        ({"modes": ("fast",)}, "modes must be one or more of eager, reduce-overhead, default"),
        ({"preset": "DiT-M/2"}, "preset must be"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--preset", "DiT-S/8", "--batch-sizes", "1", "--specs", "N2", "--modes", "eager"]
    sizes = ["--num-inference-steps", "4", "--num-rounds", "1", "--dtype", "float32"]
    cli.main(["bench", "gpu", *options, *sizes, "--out", str(tmp_path)])
    assert capsys.readouterr().out.endswith(f"written: {tmp_path}\n")
    assert (tmp_path / "cpu.md").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is there")
def test_without_a_gpu_the_error_names_the_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "gpu", "--out", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "device 'cuda' needs an NVIDIA GPU" in line


def test_a_cache_that_does_not_exist_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="interval must be at least 1"):
        bench_gpu(replace(SMALL, specs=("N0",)), output(tmp_path))
    assert not list(tmp_path.rglob("*.md"))
