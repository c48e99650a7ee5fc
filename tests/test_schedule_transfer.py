"""The command that uses a schedule at other numbers of steps, on a tiny model."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import randomize, tiny_dit

from skipdit.diffusion import Objective, make_scheduler
from skipdit.models.long_skip import LongSkipConfig
from skipdit.pipelines import ClassToImagePipeline


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "schedule_transfer.py"
    spec = importlib.util.spec_from_file_location("schedule_transfer", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["schedule_transfer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_model(path: Path) -> str:
    torch.manual_seed(0)
    model = randomize(tiny_dit(4, out_channels=3, in_channels=3, sample_size=16, long_skip=LongSkipConfig()))
    objective = Objective(process="flow", prediction_type="sample")
    ClassToImagePipeline(model, make_scheduler(objective, "euler")).save_pretrained(path)
    return str(path)


def test_rows_are_measured_once_and_only_with_the_same_settings(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, report = save_model(tmp_path / "one" / "pipeline"), tmp_path / "out", tmp_path / "report"
    small = ["--from-steps", "8", "--steps", "6", "--num-samples", "1", "--num-held-out", "2", "--speedups", "1.3"]

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["schedule_transfer.py", *arguments, "--out", str(out)])
        script.main()

    run(model, *small, "--guidance", "1.5")
    (row,) = script.read_rows(out)
    assert (row.from_steps, row.steps, row.speedup) == (8, 6, 1.3)
    run(model, *small, "--guidance", "1.5")
    assert len(script.read_rows(out)) == 1
    # these were taken for the row that is there, or measured with the schedules that are
    other = save_model(tmp_path / "two" / "pipeline")
    for arguments in (
        (model, *small),
        (model, *small, "2.0", "--guidance", "1.5"),
        (other, *small, "--guidance", "1.5"),
    ):
        with pytest.raises(SystemExit, match="other models or settings: give another --out"):
            run(*arguments)
    run("--report", str(report))
    assert json.loads((report / "schedule_transfer.json").read_text())["config"]["guidance"] == 1.5
    assert "1.3x" in capsys.readouterr().out
