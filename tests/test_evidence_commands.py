"""The commands behind docs/evidence.md that train and measure several seeds, at tiny size."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import randomize, tiny_dit

from skipdit.diffusion import Objective, make_scheduler
from skipdit.models.long_skip import LongSkipConfig
from skipdit.pipelines import ClassToImagePipeline

SIZES: dict[str, Any] = {"sample_size": 16, "patch_size": 4, "in_channels": 3, "num_classes": 4}


def script(name: str) -> ModuleType:
    """A script of benchmarks/, which is not in the package."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------------------------
# Stability of several trainings


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder, found = tmp_path_factory.mktemp("groups"), {}
    for kind, long_skip in (("plain", None), ("skip", LongSkipConfig())):
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = randomize(tiny_dit(4, out_channels=3, long_skip=long_skip, **SIZES))
            objective = Objective(process="flow", prediction_type="sample")
            path = folder / f"{kind}{seed}"
            ClassToImagePipeline(model, make_scheduler(objective, "euler")).save_pretrained(path)
            found.setdefault(kind, []).append(str(path))
    return found


def test_trainings_of_several_seeds_are_measured_once_and_told_with_their_spread(
    groups: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stability = script("stability_pairs")
    out, report = tmp_path / "results", tmp_path / "report"
    small = "--num-pictures 2 --timesteps 1 --surface-size 3 --methods N2 delta:N2"
    ways = [*small.split(), "--out", str(out)]
    stability.main(["--group", "plain", *groups["plain"], "--group", "skip", groups["skip"][0], *ways])
    stability.main(["--group", "skip", *groups["skip"], *ways, "--report", str(report)])
    assert capsys.readouterr().out.count("skip0") == 1  # not measured again
    page = (report / "stability_pairs.md").read_text()
    rows = {
        cells[1].strip(): [each.strip() for each in cells[2:5]]
        for cells in (line.split("|") for line in page.splitlines() if line.startswith("| "))
    }
    models = [json.loads(line)["figures"] for line in (out / stability.RESULTS).read_text().splitlines()]
    norms = [each["Jacobian norm, model"] for each in models]
    plain, skip = norms[:2], norms[2:]
    assert rows["Jacobian norm, model"][:2] == [stability.shown(plain), stability.shown(skip)]
    assert " ± " in rows["Jacobian norm, model"][0]
    assert rows["N2: dB at the end"][0] == "-"  # which needs long skips
    assert "plain refuses N2: " in page
    assert "long skips, largest norm" in rows


def test_differences_are_told_in_standard_errors() -> None:
    difference = script("stability_pairs").difference
    assert difference([1.0, 3.0], [5.0, 7.0]) == "+2.8"  # 4 over the root of 2 / 2 + 2 / 2
    assert difference([5.0, 7.0], [1.0, 3.0]) == "-2.8"
    assert difference([1.0], [2.0, 3.0]) == ""
    assert difference([1.0, 1.0], [2.0, 2.0]) == ""


# ----------------------------------------------------------------------------------------------------------------------
# Conversion


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with recipes of four small units, whose loss is what a test says."""
    module = script("conversion_steps")
    plain = module.convert_plain()
    model = replace(plain.model, num_layers=4, num_attention_heads=2, attention_head_dim=8)
    small = replace(plain, model=model, batch_size=4)
    monkeypatch.setattr(module, "convert_plain", lambda: small)
    return module


def test_a_conversion_goes_on_until_the_plain_models_loss(
    conversion: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([1.0, 1.6, 1.4, 1.2, 0.9])
    seen = []

    def loss(self: Any, config: Any, pipeline: Path) -> float:
        log = (pipeline.parent / "log.jsonl").read_text().splitlines()
        seen.append((pipeline.parent.name, json.loads(log[-1])["step"]))
        return next(told)

    monkeypatch.setattr(conversion.Conversion, "loss", loss)
    runs, report = tmp_path / "runs", tmp_path / "report"
    monkeypatch.setattr(conversion, "CACHES", ("N2", "fora:N2"))
    arguments = f"--seeds 0 --every 2 --most 20 --scale 0.002 --num-samples 1 --runs {runs} --report {report}"
    conversion.main(arguments.split())
    assert seen == [("plain", 3), ("stage-one", 2), ("stage-two", 2), ("stage-two", 4), ("stage-two", 6)]
    page = (report / "conversion_steps.md").read_text()
    assert "seed 0: reached after 8 steps" in page  # two of stage one, six of stage two
    rows = {
        cells[1].strip(): cells for cells in (line.split("|") for line in page.splitlines() if line.startswith("| "))
    }
    assert "refused" in rows["N2"][3]
    assert float(rows["N2"][5]) > 0
    lines, _ = conversion.read_results(runs)
    assert conversion.steps_needed([each for each in lines if each.value != 0.9], 0) is None


# ----------------------------------------------------------------------------------------------------------------------
# Convergence


def write_log(path: Path, losses: list[float]) -> str:
    path.write_text("".join(json.dumps({"step": 10 * (n + 1), "loss": loss}) + "\n" for n, loss in enumerate(losses)))
    return str(path)


def test_steps_are_counted_until_the_other_models_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convergence = script("convergence")
    plain = write_log(tmp_path / "plain.jsonl", [1000 / (n + 1) for n in range(100)])
    slower = write_log(tmp_path / "slower.jsonl", [1000 / (1 + n / 1.5) for n in range(100)])  # by half as much again
    convergence.main(["--pair", "waves", plain, slower, "--report", str(tmp_path / "report")])
    page = (tmp_path / "report" / "convergence.md").read_text()
    rows = [line.split("|")[-2].strip() for line in page.splitlines() if line.startswith("| waves")]
    assert [float(row[:-1]) for row in rows[:2]] == pytest.approx([1.5, 1.5], rel=0.03)
    assert rows[2:] == ["not reached in 1 of 1"] * 2
    shorter = write_log(tmp_path / "shorter.jsonl", [1.0] * 50)
    with pytest.raises(SystemExit):
        convergence.main(["--pair", "waves", plain, shorter, "--report", str(tmp_path / "report")])
    assert "the two logs are not of the same steps" in capsys.readouterr().err
