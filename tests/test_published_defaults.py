"""Pipelines of diffusers run with the steps and the guidance of their own, unless something else is asked for."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance
from families import TINY
from published import dit_xl_2, flux_dev
from torch import Tensor

from skipdit.calibration.calibrate import make_runner
from skipdit.calibration.config import CalibrateConfig
from skipdit.cli import main
from skipdit.loading import BUNDLED, load_source
from skipdit.pipelines import SamplingOptions
from skipdit.sampling.compare import load, runner_of
from skipdit.sampling.config import SampleConfig
from skipdit.tasks.published import PublishedClasses, PublishedClips, PublishedPictures, guided
from skipdit.tasks.task import RunDefaults


def pipeline_classes() -> list[Any]:
    """Those whose parts include a transformer, and that are called with steps."""
    kinds: list[Any] = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")]
    kinds = [kind for kind in kinds if "transformer" in inspect.signature(kind.__init__).parameters]
    return [kind for kind in kinds if "num_inference_steps" in inspect.signature(kind.__call__).parameters]


def options(scale: float | None, steps: int = 4) -> SamplingOptions:
    return SamplingOptions(guidance_scale=scale, num_inference_steps=steps)


def bare(name: str, **parts: Any) -> Any:
    """A pipeline without parts, or with these."""
    kind: Any = getattr(diffusers, name)
    needed = inspect.signature(kind.__init__).parameters
    if name == "HunyuanVideo15Pipeline":  # cannot be made without
        vae: Any = diffusers.AutoencoderKLHunyuanVideo15
        parts["vae"] = vae(
            block_out_channels=(32, 32), latent_channels=4, layers_per_block=1, spatial_compression_ratio=2,
            temporal_compression_ratio=2,
        )  # fmt: skip
    return kind(**{part: parts.get(part) for part in needed if part != "self"})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FluxPipeline", RunDefaults(28, 3.5)),
        ("StableDiffusion3Pipeline", RunDefaults(28, 7.0)),
        ("SanaSprintPipeline", RunDefaults(2, 4.5)),
        ("QwenImagePipeline", RunDefaults(50, 4.0)),
        ("HunyuanImagePipeline", RunDefaults(50, 3.25)),
        ("Ideogram4Pipeline", RunDefaults(48, None)),
    ],
)
def test_defaults_are_those_of_the_call(name: str, expected: RunDefaults) -> None:
    assert PublishedPictures({}).run_defaults(bare(name)) == expected


def test_a_guider_has_its_own_scale() -> None:
    mixed: Any = AdaptiveProjectedMixGuidance(guidance_scale=3.0)
    free: Any = ClassifierFreeGuidance(guidance_scale=6.0)
    assert PublishedPictures({}).run_defaults(bare("HunyuanImagePipeline", guider=mixed)).guidance_scale == 3.0
    assert PublishedClips({}).run_defaults(bare("HunyuanVideo15Pipeline", guider=free)) == RunDefaults(50, 6.0)
    assert PublishedClips({}).run_defaults(bare("MotifVideoPipeline")) == RunDefaults(50, None)


def test_every_pipeline_that_is_called_with_steps_has_a_number_of_them() -> None:
    """But those of sound, which are refused."""
    kinds = pipeline_classes()
    assert len(kinds) > 60
    for kind in kinds:
        default = inspect.signature(kind.__call__).parameters["num_inference_steps"].default
        assert isinstance(default, int) or "Audio" in kind.__name__


def hunyuan_video_15() -> tuple[Any, dict[str, Any]]:
    """A pipeline that a guider guides, and the arguments of its call."""
    tiny = TINY["HunyuanVideo15Transformer3DModel"]
    transformer: Any = tiny.model_class(**tiny.config | {"in_channels": 9, "use_meanflow": False}).eval()
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
        "transformer": transformer,
    }
    pipeline = bare("HunyuanVideo15Pipeline", **parts)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    states = {"prompt_embeds": (1, 4, 12), "prompt_embeds_2": (1, 3, 10)}
    given: dict[str, Any] = {"height": 8, "width": 8, "num_frames": 5, "output_type": "latent"}
    for name, shape in states.items():
        mask = name.replace("embeds", "embeds_mask")
        for sign in ("", "negative_"):
            given[sign + name] = torch.randn(shape, generator=generator)
            given[sign + mask] = torch.ones(shape[:2], dtype=torch.int64)
    return pipeline, given


def test_a_scale_reaches_the_guider_for_one_run() -> None:
    pipeline, given = hunyuan_video_15()
    own = pipeline.guider

    def sample(scale: float | None) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        with guided(pipeline, options(scale), 1) as arguments:
            return pipeline(**given, **arguments, num_inference_steps=4, generator=generator).frames

    by_default, same, other = sample(None), sample(6.0), sample(2.0)
    assert torch.equal(by_default, same)
    assert not torch.equal(by_default, other)
    assert pipeline.guider is own
    pipeline.guider = own.new(guidance_scale=2.0)
    assert torch.equal(sample(None), other)


def test_a_scale_per_step_is_that_of_the_same_share_of_the_run() -> None:
    pipeline: Any = bare("Ideogram4Pipeline")
    schedules = {}
    for steps in (1, 16, 48, 96):
        with guided(pipeline, options(None, steps), 1) as arguments:
            pipeline.check_inputs(
                prompt="a cat", height=64, width=64, num_inference_steps=steps, guidance_scale=None, **arguments,
                callback_on_step_end_tensor_inputs=[],
            )  # fmt: skip
            schedules[steps] = arguments["guidance_schedule"]
    assert schedules == {1: [7.0], 16: [7.0] * 15 + [3.0], 48: [7.0] * 45 + [3.0] * 3, 96: [7.0] * 90 + [3.0] * 6}
    with guided(pipeline, options(5.0), 1) as arguments:
        assert arguments == {"guidance_scale": 5.0, "guidance_schedule": None}


def test_a_scale_that_would_do_nothing_is_refused() -> None:
    pipeline = bare("MotifVideoPipeline")  # all of its guiders but one have a scale
    with guided(pipeline, options(None), 1) as arguments:
        assert arguments == {}
    message = "the guidance of a MotifVideoPipeline is its own: leave guidance_scale out, got 3"
    with pytest.raises(ValueError, match=message), guided(pipeline, options(3.0), 1):
        raise AssertionError


@pytest.mark.parametrize("name", BUNDLED)
def test_our_own_models_run_as_before(name: str) -> None:
    source = load_source(name, device="cpu")
    for run in (runner_of(source, SampleConfig(), [0]), make_runner(source, CalibrateConfig(num_samples=1))):
        assert (run.num_inference_steps, run.guidance_scale) == (50, 2.0)


@pytest.mark.filterwarnings("ignore")  # of transformers and diffusers, about files as they were published
@pytest.mark.parametrize(
    ("make", "expected", "asked"), [(flux_dev, (28, 3.5), {"prompt": ("a cat",)}), (dit_xl_2, (50, 4.0), {})]
)
def test_a_model_of_diffusers_runs_with_its_defaults_or_with_what_is_asked_for(
    make: Callable[[Path], Path], expected: tuple[int, float], asked: dict[str, Any], tmp_path: Path
) -> None:
    config = SampleConfig(model=str(make(tmp_path / "model")), device="cpu")
    source = load(config)
    conditions = source.choose(asked, 1).conditions
    for run in (runner_of(source, config, conditions), make_runner(source, CalibrateConfig(num_samples=1, **asked))):
        assert (run.num_inference_steps, run.guidance_scale) == expected
    config = SampleConfig(model=config.model, num_inference_steps=3, guidance_scale=1.5)
    run = runner_of(source, config, conditions)
    assert (run.num_inference_steps, run.guidance_scale) == (3, 1.5)
    assert isinstance(source.sampler.task, PublishedClasses | PublishedPictures)


@pytest.mark.filterwarnings("ignore")
def test_the_report_and_a_set_have_the_numbers_that_a_pipeline_ran_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DiT's own guidance is 4; 2 was written over it."""
    dit_xl_2(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    common = ["sample", "--model", "model", "--labels", "3", "--steps", "2", "--cache", "none", "--device", "cpu"]
    main([*common, "--out", "by-default"])
    main([*common, "--guidance-scale", "4", "--out", "given"])
    main([*common, "--guidance-scale", "2", "--out", "other"])
    assert json.loads(Path("by-default", "report.json").read_text())["config"]["guidance_scale"] == 4.0
    pictures = {name: Path(name, "full.png").read_bytes() for name in ("by-default", "given", "other")}
    assert pictures["by-default"] == pictures["given"] != pictures["other"]
    main([*common, "--npz", "--num-samples", "1", "--out", "set"])
    told = json.loads(Path("set", "samples.json").read_text())
    assert (told["settings"]["guidance_scale"], told["report"]["steps"]) == (4.0, 2)
