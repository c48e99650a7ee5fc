"""The main job: full, cached and fewer steps, in one report; and the command line around it."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import tiny_dit

import skipdit
import skipdit.pipelines
from skipdit.cli import COMMANDS, main
from skipdit.compare import SampleConfig, load, sample_and_compare
from skipdit.diffusion import Objective, make_scheduler
from skipdit.models.dit import DiT
from skipdit.pipelines import ClassToImagePipeline

FLOW = Objective(process="flow", prediction_type="sample")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of 16x16 pixels and four named classes."""
    torch.manual_seed(0)
    model = tiny_dit(8, sample_size=16, patch_size=4, in_channels=3, out_channels=3, num_classes=4)
    names = {"0": "ant", "1": "bee", "2": "cat", "3": "dog"}
    path = tmp_path_factory.mktemp("model") / "pipeline"
    ClassToImagePipeline(model, make_scheduler(FLOW, "euler"), id2label=names).save_pretrained(path)
    return path


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> SampleConfig:
    return SampleConfig(model=str(folder), num_samples=5, steps=12, cache="N3-900-0", out=tmp_path / "out")


def test_the_report_holds_what_was_measured(config: SampleConfig) -> None:
    report = sample_and_compare(config)
    full, cached, fewer = report.rows
    assert (full.steps_full, full.steps_reused, full.speedup, full.psnr_db) == (12, 0, 1.0, None)
    assert cached.steps_full + cached.steps_reused == 12
    assert cached.steps_reused > 4
    units = 12 * 8 / (cached.steps_full * 8 + cached.steps_reused * 2)
    assert cached.compute_ratio == pytest.approx(units)
    assert cached.bytes_held == 2 * 5 * 16 * 32 * 4  # guidance doubles the batch; tokens, width, float32
    assert fewer.steps == max(1, min(11, round(12 * cached.seconds / full.seconds)))
    for row in (cached, fewer):
        assert row.speedup == pytest.approx(full.seconds / row.seconds)
        assert row.psnr_db is not None
        assert row.psnr_db > 5
        assert row.ssim is not None
        assert row.ssim < 1
    assert report.labels == ["ant", "bee", "cat", "dog", "ant"]
    written = json.loads((config.out / "report.json").read_text())
    assert written["speedup"] == cached.speedup
    assert written["compute_ratio"] == cached.compute_ratio
    assert written["psnr_db"] == cached.psnr_db
    assert [row["name"] for row in written["rows"]] == ["full", "cached", "fewer_steps"]
    assert written["seed"] == 0
    assert written["versions"]["torch"] == torch.__version__
    assert written["peak_memory_bytes"] > 2**20
    names = sorted(path.name for path in config.out.iterdir())
    assert names == ["cached.png", "comparison.png", "fewer_steps.png", "full.png", "report.json"]
    sizes = set()
    for name in ("cached.png", "fewer_steps.png", "full.png"):
        with Image.open(config.out / name) as grid:
            sizes.add(grid.size)
    assert len(sizes) == 1


def test_distances_are_those_of_the_pictures(config: SampleConfig) -> None:
    from skimage.metrics import peak_signal_noise_ratio

    report = sample_and_compare(config)
    pipeline = load(config).sampler.pipeline
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"latents": noise, "guidance_scale": config.guidance_scale, "output_type": "np"}
    full = pipeline([0, 1, 2, 3, 0], num_inference_steps=12, **options).images
    fewer = pipeline([0, 1, 2, 3, 0], num_inference_steps=report.rows[2].steps, **options).images
    expected = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(full, fewer, strict=True)]
    assert report.rows[2].psnr_db == pytest.approx(sum(expected) / 5, abs=1e-2)


def test_the_same_seed_gives_the_same_bytes(config: SampleConfig, tmp_path: Path) -> None:
    sample_and_compare(config)
    sample_and_compare(dataclasses.replace(config, out=tmp_path / "again"))
    sample_and_compare(dataclasses.replace(config, out=tmp_path / "other", seed=1))
    for name in ("full.png", "cached.png"):
        first = (config.out / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == first
        assert (tmp_path / "other" / name).read_bytes() != first


def test_without_a_cache_there_is_one_row(config: SampleConfig) -> None:
    report = sample_and_compare(dataclasses.replace(config, cache="none", scheduler="dpm"))
    assert [row.name for row in report.rows] == ["full"]
    assert sorted(path.name for path in config.out.iterdir()) == ["full.png", "report.json"]


def test_grids_of_an_earlier_call_go(config: SampleConfig) -> None:
    sample_and_compare(dataclasses.replace(config, steps=4, cache="N2"))
    sample_and_compare(dataclasses.replace(config, steps=4, cache="none"))
    assert sorted(path.name for path in config.out.iterdir()) == ["full.png", "report.json"]


def test_ancestral_noise_is_not_the_start_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers.schedulers.scheduling_ddpm as ddpm

    model = tiny_dit(sample_size=16, patch_size=4, in_channels=3, out_channels=6)
    ClassToImagePipeline(model, make_scheduler(Objective(learned_variance=True), "ddpm")).save_pretrained(
        tmp_path / "m"
    )
    drawn: list[torch.Tensor] = []
    for module in (ddpm, skipdit.pipelines):
        draw = module.randn_tensor

        def record(*args: object, draw: Callable = draw, **options: object) -> torch.Tensor:
            drawn.append(draw(*args, **options))
            return drawn[-1]

        monkeypatch.setattr(module, "randn_tensor", record)
    sample_and_compare(
        SampleConfig(model=str(tmp_path / "m"), num_samples=1, steps=4, cache="none", out=tmp_path / "out")
    )
    assert len(drawn) > 4
    assert len({tuple(noise.flatten()[:4].tolist()) for noise in drawn[-4:]}) == 4


def test_labels_by_name_and_number(config: SampleConfig) -> None:
    report = sample_and_compare(dataclasses.replace(config, labels=("dog", "1"), num_samples=3, cache="none", steps=1))
    assert report.labels == ["dog", "bee", "dog"]


def test_bfloat16(config: SampleConfig) -> None:
    report = sample_and_compare(dataclasses.replace(config, dtype="bfloat16", steps=4))
    assert report.rows[1].bytes_held == 2 * 5 * 16 * 32 * 2


def test_the_bundled_model(tmp_path: Path) -> None:
    """It is small, it loads offline, its showcase labels exist, and its cache is far closer than fewer steps."""
    from skipdit.loading import BUNDLED

    folder = Path(skipdit.__file__).parent / "assets" / BUNDLED["emoji"].folder
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) < 30e6
    assert max(sizes) < 15e6
    report = sample_and_compare(SampleConfig(num_samples=2, steps=25, fewer_steps=13, out=tmp_path))
    assert report.labels == list(BUNDLED["emoji"].labels[:2])
    _, cached, fewer = report.rows
    assert cached.psnr_db is not None
    assert fewer.psnr_db is not None
    assert cached.compute_ratio > 1.5
    assert cached.psnr_db > fewer.psnr_db + 5
    pipeline = load(SampleConfig()).sampler.pipeline
    assert len(pipeline.get_label_ids(BUNDLED["emoji"].labels)) == 16
    assert pipeline.transformer.config.num_layers == 24


def test_a_bare_checkpoint_of_latents_needs_a_vae(config: SampleConfig, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    tiny_dit().save_pretrained(tmp_path / "model")
    tiny_dit(out_channels=4).save_pretrained(tmp_path / "unsaid")
    config = dataclasses.replace(config, model=str(tmp_path / "unsaid"), cache="none", steps=2, num_samples=2)
    with pytest.raises(ValueError, match="does not say what its model predicts"):
        sample_and_compare(config)
    config = dataclasses.replace(config, model=str(tmp_path / "model"), scheduler="ddpm")
    with pytest.raises(ValueError, match="latents of 4 channels: give --vae"):
        sample_and_compare(config)
    AutoencoderKL(block_out_channels=(32, 32), latent_channels=4).save_pretrained(tmp_path / "vae")
    report = sample_and_compare(dataclasses.replace(config, vae=tmp_path / "vae"))
    assert report.labels == ["0", "5"]


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipdit: error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    assert f"Example: skipdit {command}" in capsys.readouterr().out.replace("\n", " ")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "cta"], "unknown label 'cta'; of the 4 labels, near are: cat"),
        (["--labels", "4"], "label numbers go from 0 to 3, got 4"),
        (["--labels", "ant", "bee", "cat"], "num_samples must be at least the number of labels, 3, got 2"),
        (["--cache", "N1"], "would never reuse"),
        (["--cache", "N3-100-50", "--steps", "2"], "would never reuse in 2 steps"),
        (["--cache", "N2", "--steps", "1"], "would never reuse in 1 steps"),
        (["--cache", "X2"], "a cache spec is"),
        (["--cache", "fora:N3"], "cache method must be one of skip, skip-taylor, delta-dit, delta-taylor, got 'fora'"),
        (["--cache", "N2-k5"], "num_shallow_units must be between 1 and 3 for 8 units with 4 linked pairs, got 5"),
        (["--cache", "missing.json"], "no schedule at missing.json"),
        (["--scheduler", "heun"], "scheduler of a flow model must be one of euler, dpm, got 'heun'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--num-samples", "0"], "num_samples must be at least 1, got 0"),
        (["--device", "abacus"], "device 'abacus' is not to be had here"),
        (["--out", "/dev/null/out"], "/dev/null/out"),
    ],
)
def test_bad_input_ends_in_one_line(
    options: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = fails(capsys, "sample", "--model", str(folder), "--out", str(out), "--num-samples", "2", *options)
    assert message in line
    assert not out.exists() or not list(out.iterdir())


def test_unknown_words_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the command must be one of sample" in fails(capsys, "smaple")
    assert "the recipe must be one of emoji, stability, stability-plain, got 'emojis'" in fails(
        capsys, "train", "emojis"
    )
    assert "no model at nowhere" in fails(capsys, "sample", "--model", "nowhere")
    assert "the benchmark must be models" in fails(capsys, "bench", "all")
    assert "got ('DiT-M/2',)" in fails(capsys, "bench", "models", "--presets", "DiT-M/2", "--out", str(tmp_path))
    assert "/dev/null/x" in fails(capsys, "bench", "models", "--out", "/dev/null/x")
    assert "device 'abacus'" in fails(capsys, "train", "emoji", "--device", "abacus", "--out", str(tmp_path))
    assert "--steps" in fails(capsys, "sample", "--steps", "many")
    assert "Unrecognized options: --stepz" in fails(capsys, "sample", "--stepz", "3")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "text", "missing"])
def test_broken_models_end_in_one_line(
    damage: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.torch import save_file

    copy = tmp_path / "pipeline"
    shutil.copytree(folder, copy)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "foreign":
        save_file({"conv.weight": torch.zeros(3)}, weights)
    elif damage == "text":
        (copy / "transformer" / "config.json").write_text("not json")
    else:
        shutil.rmtree(copy / "transformer")
    line = fails(capsys, "sample", "--model", str(copy), "--out", str(tmp_path / "out"))
    assert "pipeline" in line


def test_an_unreadable_picture_ends_training_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"nothing")
    line = fails(capsys, "train", "emoji", "--data.source", str(tmp_path / "set"), "--out", str(tmp_path / "run"),
                 "--no-resume", "--no-compile")  # fmt: skip
    assert "cannot read the picture" in line
    assert "a.png" in line


def test_training_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    main(["train", "emoji", "--max-steps", "2", "--batch-size", "2", "--model.num-layers", "2",
          "--model.attention-head-dim", "8", "--sample-every", "0", "--device", "cpu", "--out", str(out)])  # fmt: skip
    assert f"skipdit sample --model {out}" in capsys.readouterr().out.replace("\n", "")
    main(["info", str(out / "pipeline")])
    assert "long skips: 0 -> 1 (replace)" in capsys.readouterr().out


def test_converting_replaces_no_folder_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_dit().save_pretrained(tmp_path / "ours")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for target in (tmp_path / "mine", Path.cwd()):
        line = fails(capsys, "convert", str(tmp_path / "ours"), "--to", "skipdit", "--out", str(target))
        assert "give a new folder" in line
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_convert_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_dit()
    model.save_pretrained(tmp_path / "ours")
    official, back = tmp_path / "official.safetensors", tmp_path / "back"
    main(["convert", str(tmp_path / "ours"), "--to", "official", "--out", str(official)])
    main(["convert", str(official), "--to", "skipdit", "--num-attention-heads", "2", "--out", str(back)])
    loaded = DiT.from_pretrained(back)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    line = fails(capsys, "convert", str(back), "--to", "diffusers", "--out", str(tmp_path / "diffusers"))
    assert "long_skip" in line
    official.write_bytes(official.read_bytes()[:200])
    assert "official.safetensors" in fails(
        capsys, "convert", str(official), "--to", "skipdit", "--out", str(back / "x")
    )
    assert not (back / "x").exists()


def test_the_command_is_light_until_it_has_work() -> None:
    code = "import sys; from skipdit.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
