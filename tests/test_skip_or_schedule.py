"""The command that tells what is the schedule's and what the long skips', on a tiny pair."""

import importlib.util
import json
import sys
from functools import partial
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
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "skip_or_schedule.py"
    spec = importlib.util.spec_from_file_location("skip_or_schedule", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["skip_or_schedule"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_searches_on_both_models_and_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, long_skip in (("plain", None), ("skip", LongSkipConfig())):
        torch.manual_seed(0)
        model = randomize(tiny_dit(6, out_channels=3, in_channels=3, sample_size=16, long_skip=long_skip))
        objective = Objective(process="flow", prediction_type="sample")
        ClassToImagePipeline(model, make_scheduler(objective, "euler")).save_pretrained(tmp_path / kind)
    command = ["skip_or_schedule.py", "--skip", str(tmp_path / "skip"), "--plain", str(tmp_path / "plain")]
    command += ["--steps", "6", "--num-samples", "1", "--num-held-out", "2", "--speedups", "1.3", "--out"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "out"), "--report", str(tmp_path / "report")])
    script.main()
    results = json.loads((tmp_path / "report" / "skip_or_schedule.json").read_text())["results"]
    assert [(each["model"], each["site"]) for each in results] == list(script.VARIANTS)
    for each in results:
        (row,) = each["rows"]
        assert row["compute_ratio"] >= 1.3
        assert row["searched_db"] > 0
        assert row["second_order_db"] > 0
        assert 6 / row["fewer_steps"] <= row["compute_ratio"]  # the rival costs no less
        assert row["fewer_steps"] - 1 < 6 / row["compute_ratio"]

    lines = (tmp_path / "out" / script.RESULTS).read_text().splitlines()
    (tmp_path / "out" / script.RESULTS).write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])  # as a kill does
    made: list[str] = []
    once = script.measure_variant
    monkeypatch.setattr(
        script, "measure_variant", lambda source, site, settings: made.append(site) or once(source, site, settings)
    )
    script.main()
    assert made == ["delta"]
    again = json.loads((tmp_path / "report" / "skip_or_schedule.json").read_text())["results"]
    assert [each["rows"] for each in again] == [each["rows"] for each in results]

    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "out"), "--guidance", "3"])
    with pytest.raises(SystemExit, match="of other models or settings"):
        script.main()


def test_differences_are_of_the_same_pair(script: ModuleType) -> None:
    settings = script.Settings(
        speedups=(2.0,), num_samples=1, num_held_out=1, steps=50, guidance=2.0, seed=0, held_out_seed=1
    )

    def result(pair: int, variant: tuple[str, str], searched: float, interval: float | None) -> object:
        row = script.Row(
            speedup=2.0, steps_full=22, compute_ratio=2.0, searched_db=searched, interval_db=interval,
            fewer_steps=25, fewer_db=20.0, second_order_db=None,
        )  # fmt: skip
        model, site = variant
        about = {"settings": settings, "path": "", "num_units": 6, "seconds": 1.0, "environment": {}}
        return script.Result(pair=pair, model=model, site=site, rows=[row], **about)

    values = {0: (50.0, 45.0, 40.0), 1: (60.0, 57.0, 58.0)}
    results = [
        result(pair, variant, searched, None if pair else searched - 5)
        for pair, own in values.items()
        for variant, searched in zip(script.VARIANTS, own, strict=True)
    ]
    (row,) = script.shares(results)
    assert row["site: skip over delta, same model"] == "+4.0 ± 1.4"  # 5 and 3
    assert row["training: delta with skips over delta without"] == "+2.0 ± 4.2"  # 5 and -1
    assert row["search over intervals, plain"] == "+5.0"  # of the first pair alone


def test_the_published_table_is_that_of_the_results(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    command = ["skip_or_schedule.py", "--out", str(folder / "skip_or_schedule"), "--report", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    for name in ("skip_or_schedule.md", "skip_or_schedule.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_an_error_of_one_process_keeps_what_the_others_measured(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the command sets where nobody has
    jobs = [partial(int, text) for text in ("no number", "3", "4")]
    results = script.measured_by(jobs, 2)
    assert {next(results), next(results)} == {3, 4}
    with pytest.raises(ValueError, match="no number"):
        next(results)
