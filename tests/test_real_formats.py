"""From published files to cached samples by the commands of docs/how-to/official-weights.md, on tiny files of the same
layouts."""

import argparse
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from families import TINY as FAMILIES
from published import (
    PIPELINES,
    hunyuan_transformer,
    latte_transformer,
    randomize,
    save,
    sd_vae,
    t5_encoder,
    t5_tokenizer,
    wan_t2v,
    write,
)
from safetensors.torch import load_file, save_file
from tiny import listing

import skipdit
from skipdit.checkpoints import to_official
from skipdit.checkpoints.parts import read_index
from skipdit.cli import main
from skipdit.command_options import PipelineOptions
from skipdit.loading import load_source
from skipdit.models.dit import DiT
from skipdit.models.latte import Latte
from skipdit.tasks.published import open_published

SMALL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "in_channels": 4}
SMALL |= {"out_channels": 8, "patch_size": 2}
TINY = ["--num-inference-steps", "6", "--device", "cpu", "--fewer-steps", "3"]
SIZE = ["--height", "64", "--width", "64"]


def dit(path: Path, long_skip: bool) -> None:
    links = skipdit.LongSkipConfig() if long_skip else None
    model = to_official(randomize(DiT(**SMALL, num_layers=8, num_classes=1000, long_skip=links)))
    content: Any = model
    if long_skip:  # a checkpoint of training: weights, their average, moments, and a namespace of arguments
        moments = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]}
        arguments = argparse.Namespace(model="DiT-skip", num_classes=1000, image_size=256, vae="ema")
        content = {"model": model, "ema": model, "opt": moments, "args": arguments}
    torch.save(content, path)


def latte(path: Path, num_classes: int | None) -> None:
    sizes = {**SMALL, "num_layers": 8, "num_frames": 16, "num_classes": num_classes}
    torch.save({"ema": to_official(randomize(Latte(**sizes, long_skip=skipdit.LongSkipConfig())))}, path)


def latte_text(path: Path) -> None:
    model: Any = latte_transformer()
    skipdit.add_long_skips(model, skipdit.LongSkipConfig())
    state_dict = to_official(randomize(model))
    torch.save({"model": state_dict, "ema": state_dict}, path)


def hunyuan(path: Path) -> None:
    state_dict = to_official(randomize(hunyuan_transformer()))
    torch.save({key: tensor.half() for key, tensor in state_dict.items()}, path)


FILES: dict[str, Callable[[Path], object]] = {
    **PIPELINES,
    "sd-vae-ft-ema": sd_vae,
    "DiT-XL-2-256x256.pt": lambda path: dit(path, long_skip=False),
    "DiT-XL-2-skip.pt": lambda path: dit(path, long_skip=True),
    "ucf101-skip.pt": lambda path: latte(path, 101),
    "ffs-skip.pt": lambda path: latte(path, None),
    "skylapse-skip.pt": lambda path: latte(path, None),
    "taichi-skip.pt": lambda path: latte(path, None),
    "Latte-skip.pt": latte_text,
    "pytorch_model_ema.pt": hunyuan,
}


def documented() -> list[str]:
    page = Path(__file__).parents[1] / "docs" / "how-to" / "official-weights.md"
    return re.findall(r"^skipdit sample .*$", page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], None]:
    """Makes a file or folder once, and a link to it in a test's folder."""
    store = tmp_path_factory.mktemp("published")

    def make(name: str, folder: Path) -> None:
        if not (store / name).exists():
            if not name.endswith(".pt"):
                (store / name).mkdir()
            FILES[name](store / name)
        (folder / name).symlink_to(store / name)

    return make


def run(arguments: list[str]) -> dict[str, Any]:
    main(arguments)
    return json.loads(Path("out", "report.json").read_text())


@pytest.mark.filterwarnings("ignore")  # of transformers and diffusers, about files as they were published
@pytest.mark.parametrize("command", documented())
def test_the_documented_command_samples_with_a_cache(
    command: str, made: Callable[[str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command)[1:]
    names = [word for word in words if word in FILES]
    assert names, command
    for name in names:
        made(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    model = words[words.index("--model") + 1]
    is_clip = "-skip.pt" in model and "DiT" not in model
    tiny = [*TINY, "--num-attention-heads", "2"] if model.endswith(".pt") else [*TINY]
    tiny += [] if model.startswith("DiT") or model.endswith(".pt") else SIZE
    tiny += ["--num-frames", "5"] if model.startswith("Wan") else []
    tiny += ["--num-samples", "1"] if is_clip and "--labels" not in words else []
    report = run([*words, *tiny, "--out", "out"])
    full, cached, fewer = report["rows"]
    assert full["steps_full"] == 6
    assert fewer["steps"] == 3
    assert cached["steps_reused"] > 0
    assert cached["compute_ratio"] > 1
    assert report["broken_samples"] == {}
    assert {"full.png", "cached.png", "comparison.png"} < set(listing(tmp_path / "out"))
    is_clip = is_clip or model.startswith(("Wan", "Latte"))
    assert (tmp_path / "out" / "cached.mp4").is_file() is is_clip


def test_every_release_has_a_documented_command() -> None:
    words = {word for command in documented() for word in shlex.split(command)}
    assert set(FILES) <= words


def test_a_schedule_of_the_authors_is_the_documented_one() -> None:
    """Their own settings, by release."""
    commands = {name: command for command in documented() for name in shlex.split(command) if name in FILES}
    for name in ("ucf101-skip.pt", "ffs-skip.pt", "skylapse-skip.pt", "taichi-skip.pt"):
        assert "--cache N2-900-49" in commands[name]
    for name in ("Latte-skip.pt", "pytorch_model_ema.pt"):
        assert "--cache N2-700-50" in commands[name]


@pytest.mark.filterwarnings("ignore")
def test_caches_are_measured_on_a_folder_of_diffusers(
    made: Callable[[str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dtype, size, steps and guidance that its users take."""
    made("FLUX.1-dev", tmp_path)
    monkeypatch.chdir(tmp_path)
    few = ["--num-seeds", "1", "--specs", "delta:N2", "--fewer-steps", "14", "--no-perceptual", "--no-rivals"]
    size = ["--height", "32", "--width", "32", "--dtype", "bfloat16"]
    main(["bench", "cache", "--model", "FLUX.1-dev", "--prompt", "a cat", *size, *few, "--out", "out"])
    report = json.loads(Path("out", "cache_quality_FLUX.1_dev.json").read_text())
    assert report["config"]["num_inference_steps"] == 28
    rows = {row["setting"]: row for row in report["rows"]}
    assert (rows["delta:N2"]["steps_full"], rows["delta:N2"]["steps_reused"]) == (14, 14)
    assert rows["14 steps"]["flop_ratio"] == pytest.approx(2, rel=0.05)
    assert "28 steps, guidance 3.5" in Path("out", "cache_quality_FLUX.1_dev.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_other_weights_of_tencent_and_the_weights_of_the_folder_sample_alike(
    made: Callable[[str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights in the folder and, under Tencent's names and in {"ema": ...}, in a file."""
    made("HunyuanDiT-v1.2-Diffusers", tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": to_official(randomize(hunyuan_transformer()))}, "model.pt")
    common = ["sample", "--model", "HunyuanDiT-v1.2-Diffusers", "--prompt", "a cat", *TINY, *SIZE, "--cache", "N2"]
    main([*common, "--out", "folder"])
    main([*common, "--transformer", "model.pt", "--out", "file"])
    assert Path("folder", "cached.png").read_bytes() == Path("file", "cached.png").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_of_diffusers_is_calibrated_and_gives_sets(
    made: Callable[[str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found for it, a set of its samples is made with, batch by batch."""
    pytest.importorskip("matplotlib")
    made("DiT-XL-2-256", tmp_path)
    monkeypatch.chdir(tmp_path)
    main(
        shlex.split(
            "calibrate DiT-XL-2-256 --labels 3 --method delta-taylor --speedups 1.3 --num-inference-steps 6 --rivals "
            "delta:N2 --num-samples 1 --num-held-out 1 --trials.num-probed 2 --trials.max-age 3 --device cpu --out cal"
        )
    )
    schedule = json.loads(Path("cal", "1.3x.json").read_text())
    assert schedule["made_for"]["model"] == "DiTTransformer2DModel"
    common = "sample --model DiT-XL-2-256 --steps 6 --device cpu --npz --cache cal/1.3x.json --num-samples 3 --out set"
    main(shlex.split(common))
    report = json.loads(Path("set", "samples.json").read_text())["report"]
    assert report["steps_full"] == len(schedule["full_steps"]) < 6
    with np.load(Path("set", "samples.npz")) as archive:
        assert archive["arr_0"].shape == (3, 64, 64, 3)
        assert archive["arr_1"].tolist() == [0, 1, 2]  # all classes in turn


@pytest.mark.filterwarnings("ignore")
def test_a_set_goes_on_with_the_weights_of_all_its_parts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Wan 2.2, whose second transformer makes the low noise levels: other weights of it, or of the text encoder,
    made the rest of a set."""
    wan_t2v(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    shutil.copytree("model/transformer", "model/transformer_2")
    index = json.loads(Path("model", "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.875}
    write(Path("model", "model_index.json"), index)
    command = [
        "sample", "--model", "model", "--prompt", "a cat", "--steps", "2", "--num-frames", "5", *SIZE, "--cache",
        "none", "--npz", "--num-samples", "1", "--device", "cpu", "--out", "set",
    ]  # fmt: skip
    main(command)
    for part in ("transformer_2", "text_encoder"):
        path = sorted(Path("model", part).glob("*.safetensors"))[0]
        whole, tensors = path.read_bytes(), load_file(path)
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name] + 1}, path, metadata={"format": "pt"})
        with pytest.raises(SystemExit):
            main(command)
        assert "set holds samples of other settings (model): give another --out" in capsys.readouterr().err
        path.write_bytes(whole)
    main(command)
    assert "already holds these samples" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_sampled_is_said_in_one_line(
    made: Callable[[str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("DiT-XL-2-256", "FLUX.1-dev", "DiT-XL-2-skip.pt"):
        made(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    index = json.loads(Path("FLUX.1-dev", "model_index.json").read_text())
    for name, changes in (
        ("unknown", {"_class_name": "Flux9Pipeline"}),
        ("foreign", {"tokenizer": ["os", "path"]}),
        ("edit", {"_class_name": "FluxKontextPipeline"}),
        ("control", {"_class_name": "FluxControlPipeline"}),
        ("transfer", {"_class_name": "Cosmos2_5_TransferPipeline"}),
        ("sound", {"_class_name": "StableAudioPipeline"}),
        ("half", {}),
    ):
        write(Path(name, "model_index.json"), index | changes)
    for arguments, message in (
        (["--model", "unknown"], "unknown is a Flux9Pipeline, which is a pipeline neither of skipdit nor of diffusers"),
        (["--model", "foreign"], "the tokenizer in foreign/model_index.json is of an unknown library"),
        (["--model", "edit"], "edit is a FluxKontextPipeline, which needs more than a prompt or a class"),
        (["--model", "control"], "control is a FluxControlPipeline, which needs more than a prompt or a class"),
        (["--model", "transfer"], "transfer is a Cosmos2_5_TransferPipeline, which needs more than a prompt"),
        (["--model", "sound"], "sound is a StableAudioPipeline, which makes neither pictures nor clips"),
        (["--model", "half"], "half is not a complete FluxPipeline: "),
        (["--model", "FLUX.1-dev"], "a FluxPipeline needs --prompt, got none"),
        (["--model", "FLUX.1-dev", "--labels", "3"], "a text-to-image model takes --prompt, not --labels"),
        (["--model", "FLUX.1-dev", "--prompt", "a", "--guidance", "shallow"], "guidance 'shallow' is for models"),
        (["--model", "FLUX.1-dev", "--prompt", "a", "--num-frames", "9"], "a FluxPipeline takes no num_frames, got 9"),
        (
            ["--model", "FLUX.1-dev", "--prompt", "a", "--num-classes", "9"],
            "num_classes is only for a file of bare weights",
        ),
        (["--model", "FLUX.1-dev", "--prompt", "a", "--task", "text-to-video"], "is a text-to-image model, not"),
        (["--model", "FLUX.1-dev", "--prompt", "a", "--height", "-16"], "height must be at least 1, got -16"),
        (["--model", "FLUX.1-dev", "--prompt", "a", "--width", "0"], "width must be at least 1, got 0"),
        (["--model", "DiT-XL-2-256", "--labels", "1000"], "label numbers go from 0 to 999, got 1000"),
        (
            ["--model", "DiT-XL-2-256", "--labels", "clss 7"],
            "no class is called clss 7; did you mean class 7",
        ),
        (["--model", "DiT-XL-2-256", "--transformer", "DiT-XL-2-skip.pt"], "contains a DiT, but DiT-XL-2-256 needs"),
        (
            ["--model", "DiT-XL-2-skip.pt", "--height", "64"],
            "height is for a pipeline of diffusers, which DiT-XL-2-skip",
        ),
        (["--model", "nowhere", "--height", "64"], "no model at nowhere: give "),
        (
            ["--model", "black-forest-labs/FLUX.1-dev"],
            "; nothing is downloaded: hf download black-forest-labs/FLUX.1-dev --local-dir FLUX.1-dev",
        ),
        (["--height", "64"], "height is for a pipeline of diffusers, which emoji is not"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(["sample", *arguments, "--cache", "none", "--steps", "2", "--device", "cpu", "--out", "out"])
        assert exit.value.code == 2
        *_, line = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("skipdit: error: ")
        assert message in line


@pytest.mark.filterwarnings("ignore")
def test_another_scheduler_keeps_the_betas_and_the_shift_of_the_pipelines_own(
    made: Callable[[str, Path], None], tmp_path: Path
) -> None:
    """They were those of the official DiT, and a flow had no shift."""
    for name in ("HunyuanDiT-v1.2-Diffusers", "Wan2.1-T2V-1.3B-Diffusers"):
        made(name, tmp_path)
    for name in ("ddim", "dpm", "ddpm"):
        scheduler = load_source(str(tmp_path / "HunyuanDiT-v1.2-Diffusers"), scheduler=name).sampler.pipeline.scheduler
        own: Any = diffusers.DDPMScheduler.from_pretrained(tmp_path / "HunyuanDiT-v1.2-Diffusers" / "scheduler")
        torch.testing.assert_close(scheduler.alphas_cumprod, own.alphas_cumprod)
        assert scheduler.config["prediction_type"] == "v_prediction"
    for name, order in (("euler", 1), ("dpm", 2)):
        scheduler = load_source(str(tmp_path / "Wan2.1-T2V-1.3B-Diffusers"), scheduler=name).sampler.pipeline.scheduler
        assert (scheduler.config["flow_shift"], scheduler.config["solver_order"]) == (3.0, order)


@pytest.mark.filterwarnings("ignore")
def test_frames_under_another_name_are_clips(tmp_path: Path) -> None:
    """SanaVideoPipeline calls their number `frames`: it was taken for a pipeline of pictures."""
    transformer = FAMILIES["SanaVideoTransformer3DModel"].build()
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    t5_tokenizer(tmp_path / "sana" / "tokenizer", fast=True)
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "text_encoder": t5_encoder(12),
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": transformer,
        "vae": vae,
    }
    folder = save(tmp_path / "sana", "SanaVideoPipeline", parts, torch.float32)
    options = PipelineOptions(height=64, width=64, num_frames=5)
    task: Any = open_published(folder, read_index(folder), torch.float32, options).task
    assert task.is_video
    assert task.size == {"height": 64, "width": 64, "frames": 5, "use_resolution_binning": False}


def test_a_missing_extra_is_named(
    made: Callable[[str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without transformers a stand-in of diffusers has the name of the class, which then was called unknown."""
    made("FLUX.1-dev", tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find(name, *rest)
    )
    monkeypatch.setattr(diffusers, "FluxPipeline", type("FluxPipeline", (), {}))
    with pytest.raises(ValueError, match=r'of a FluxPipeline needs transformers: pip install "skipdit\[pipelines\]"'):
        load_source(str(tmp_path / "FLUX.1-dev"))
