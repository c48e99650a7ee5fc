"""A cache under pipelines that do more than turn text into pictures: pictures and control signals as conditions,
timesteps per token or frame, two transformers, a third call for guidance, pipelines made of blocks."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers as diffusers_package
import pytest
import torch
from device_waits import DeviceWaits
from diffusers import DiffusionPipeline
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep
from diffusers.modular_pipelines.z_image.modular_blocks_z_image import ZImageCoreDenoiseStep
from families import EXPECTED_WARNINGS, TINY
from families.table import randomize
from test_families_pipelines import karras, noise
from torch import Tensor, nn

from skipdit.cache.enable import TRANSFORMERS, cache_summary, disable_cache, enable_cache
from skipdit.cache.schedule import IntervalSchedule

diffusers: Any = diffusers_package  # whose pipelines may lack parts

# diffusers at its own FluxControlNetModel
WARNINGS = (*EXPECTED_WARNINGS, "ignore:.FluxPosEmbed. is deprecated:FutureWarning")
pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A pipeline with tiny parts.

    make: the pipeline, and the options of its call. calls: of its transformers, in order, each by the letter of its
    stream. level: the noise level, from 0 to 1000, of a timestep argument. reads: whether a static cache cannot know
    without asking the device where a call stands. start: of a window in which each transformer reuses.
    """

    make: Callable[[], tuple[Any, dict[str, Any]]]
    calls: str
    level: Callable[[float], float] = lambda timestep: timestep
    reads: bool = False
    start: int = 700

    def expected(self, levels: list[float], schedule: IntervalSchedule) -> str:
        """What each call does, by the formula: `F` is full, `r` reuses."""
        of_stream: defaultdict[str, list[float]] = defaultdict(list)
        decisions = ""
        for stream, level in zip(self.calls, levels, strict=True):
            of_stream[stream].append(level)
            decisions += "F" if schedule.decisions(of_stream[stream])[-1] is None else "r"
        return decisions


def from_one(timestep: float) -> float:
    return round(1000 * timestep, 3)


def from_zero(timestep: float) -> float:
    return round(1000 * (1 - timestep), 3)


def rising(timestep: float) -> float:
    return 1000 - timestep


def from_logarithm(timestep: float) -> float:
    """EDM's c_noise, a quarter of the logarithm of sigma: the share of noise, sigma / (1 + sigma)."""
    return 1000 / (1 + math.exp(-4 * timestep))


@dataclass
class Seen:
    """The calls of a pipeline's transformers. levels: of each; decisions: whether units in the middle have run."""

    levels: list[float]
    decisions: str = ""


def middle_of(name: str, model: nn.Module) -> nn.Module:
    """A module in a unit that a reuse step leaves out."""
    return next(child for child in TINY[name].units(model)[2][0].children() if list(child.parameters()))


@contextmanager
def watched(pipeline: Any, level: Callable[[float], float]) -> Iterator[Seen]:
    seen, ran, handles = Seen([]), [False], []

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ran[0] = False
        seen.levels.append(level(float(kwargs["t" if "t" in kwargs else "timestep"].max())))

    def after(*_: Any) -> None:
        seen.decisions += "F" if ran[0] else "r"

    for model in transformers_of(pipeline):
        name = type(model).__name__
        handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(middle_of(name, model).register_forward_hook(lambda *_: ran.__setitem__(0, True)))
        handles.append(model.register_forward_hook(after))
    yield seen
    for handle in handles:
        handle.remove()


def transformers_of(pipeline: Any) -> list[nn.Module]:
    return [pipeline.components[name] for name in TRANSFORMERS if pipeline.components.get(name) is not None]


def sample(pipeline: Any, options: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)  # of encoders that sample without a generator
    output = pipeline(**options, generator=torch.Generator().manual_seed(0))
    return output if isinstance(output, Tensor) else torch.as_tensor(output[0])


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def image(size: int = 8) -> Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(5))


def no_encoders(*names: str) -> dict[str, None]:
    return {name + number: None for number in names for name in ("text_encoder", "tokenizer")}


def tiny(name: str, **config: Any) -> nn.Module:
    return TINY[name].build(**config).requires_grad_(False)


def random(model: Any) -> Any:
    torch.manual_seed(3)
    randomize(model)
    return model.eval()


@cache
def picture_vae(latent_channels: int) -> Any:
    torch.manual_seed(1)
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "shift_factor": 0.0}
    return diffusers.AutoencoderKL(latent_channels=latent_channels, **sizes).eval()


@cache
def wan_vae(vae_class: type = diffusers.AutoencoderKLWan) -> Any:
    torch.manual_seed(1)
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
    sizes |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    if vae_class is diffusers.AutoencoderKLWan:
        sizes |= {"scale_factor_spatial": 2, "scale_factor_temporal": 2}
    return vae_class(**sizes).eval()


@cache
def ltx_vae() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
        patch_size=1,
    ).eval()


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


RUN = {"num_inference_steps": 6, "output_type": "latent", "return_dict": False}
FROM_IMAGE: dict[str, Any] = {"strength": 0.75, "num_inference_steps": 8}  # 6 steps
TEXT = {"prompt_embeds": noise(1, 1, 5, 12)}
BOTH = TEXT | {"negative_prompt_embeds": noise(2, 1, 5, 12)}
POOLED = {"pooled_prompt_embeds": noise(3, 1, 10)}
BOTH_POOLED = BOTH | POOLED | {"negative_pooled_prompt_embeds": noise(4, 1, 10)}


def masks(kind: str, dtype: torch.dtype = torch.long) -> dict[str, Tensor]:
    return {prefix + kind: torch.ones(1, 5, dtype=dtype) for prefix in ("", "negative_")}


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def flux(pipeline_class: Any, *, in_channels: int = 4, **options: Any) -> tuple[Any, dict[str, Any]]:
    parts = {"controlnet": options.pop("controlnet")} if "controlnet" in options else {}
    pipeline = pipeline_class(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=picture_vae(1),
        transformer=tiny("FluxTransformer2DModel", in_channels=in_channels, out_channels=4),
        **no_encoders("", "_2"),
        **parts,
    )
    return pipeline, RUN | TEXT | POOLED | {"height": 8, "width": 8} | options


GUIDED_FLUX: dict[str, Any] = BOTH_POOLED | {"true_cfg_scale": 3.0}


def flux_controlnet() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "axes_dims_rope": (4, 2, 2)}
    sizes |= {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 12, "pooled_projection_dim": 10}
    return random(diffusers.FluxControlNetModel(guidance_embeds=True, **sizes))


def sd3(pipeline_class: Any, num_layers: int = 6, **options: Any) -> tuple[Any, dict[str, Any]]:
    parts = {"controlnet": options.pop("controlnet")} if "controlnet" in options else {}
    pipeline = pipeline_class(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=picture_vae(4),
        transformer=tiny("SD3Transformer2DModel", num_layers=num_layers),
        **no_encoders("", "_2", "_3"),
        **parts,
    )
    return pipeline, RUN | BOTH_POOLED | {"height": 8, "width": 8, "guidance_scale": 4.0} | options


def sd3_controlnet() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    sizes |= {"sample_size": 8, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    return random(diffusers.SD3ControlNetModel(patch_size=2, pos_embed_max_size=8, **sizes))


def qwen(pipeline_class: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    parts = {"controlnet": options.pop("controlnet")} if "controlnet" in options else {}
    pipeline = pipeline_class(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=wan_vae(diffusers.AutoencoderKLQwenImage),
        transformer=tiny("QwenImageTransformer2DModel"),
        **no_encoders(""),
        **parts,
    )
    options = {"true_cfg_scale": 3.0, "height": 16, "width": 16} | options
    return pipeline, RUN | BOTH | masks("prompt_embeds_mask") | options


def qwen_controlnet() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "out_channels": 4, "num_layers": 2}
    return random(
        diffusers.QwenImageControlNetModel(patch_size=2, joint_attention_dim=12, axes_dims_rope=(4, 2, 2), **sizes)
    )


def lumina2(**options: Any) -> tuple[Any, dict[str, Any]]:
    pipeline = diffusers.Lumina2Pipeline(
        transformer=tiny("Lumina2Transformer2DModel"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=picture_vae(4),
        **no_encoders(""),
    )
    options = masks("prompt_attention_mask", torch.bool) | {"height": 64, "width": 64} | options
    return pipeline, RUN | BOTH | options


def ideogram() -> tuple[Any, dict[str, Any]]:
    """Its text encoder is one of transformers; what it would return are features, places, segments and indicators."""

    def encoded(grid_h: int, grid_w: int, max_sequence_length: int, **_: Any) -> tuple[Tensor, ...]:
        num_tokens = max_sequence_length + grid_h * grid_w
        places, ones = torch.arange(num_tokens).expand(1, 3, num_tokens).mT, torch.ones(1, num_tokens, dtype=torch.long)
        return noise(1, 1, num_tokens, 12), places, ones, 2 * ones

    parts = {"transformer": tiny("Ideogram4Transformer2DModel")}
    parts |= {"unconditional_transformer": tiny("Ideogram4Transformer2DModel", seed=1)}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.Ideogram4Pipeline(scheduler=scheduler, vae=None, **no_encoders(""), **parts)
    pipeline.encode_prompt = encoded
    sizes = {"prompt": "", "height": 256, "width": 256, "max_sequence_length": 5}
    return pipeline, RUN | sizes | {"guidance_scale": 5.0, "guidance_schedule": None}


# ----------------------------------------------------------------------------------------------------------------------
# Videos

GUIDED_VIDEO = RUN | BOTH | {"guidance_scale": 3.0, "height": 16, "width": 16, "num_frames": 5}


def wan(pipeline_class: Any, *, in_channels: int = 4, two: bool = False, **given: Any) -> tuple[Any, dict[str, Any]]:
    """given: options of the call, and of the pipeline `expand_timesteps`."""
    parts = {"expand_timesteps": given.pop("expand_timesteps")} if "expand_timesteps" in given else {}
    if two:
        parts |= {"transformer_2": tiny("WanTransformer3DModel", seed=1, in_channels=in_channels)}
        parts |= {"boundary_ratio": 0.6}
    pipeline = pipeline_class(
        scheduler=unipc(),
        vae=wan_vae(),
        transformer=tiny("WanTransformer3DModel", in_channels=in_channels),
        **no_encoders(""),
        **parts,
    )
    return pipeline, GUIDED_VIDEO | given


def wan_vace() -> tuple[Any, dict[str, Any]]:
    pipeline = diffusers.WanVACEPipeline(
        scheduler=unipc(), vae=wan_vae(), transformer=tiny("WanVACETransformer3DModel"), **no_encoders("")
    )
    return pipeline, GUIDED_VIDEO


def sky_reels(**options: Any) -> tuple[Any, dict[str, Any]]:
    pipeline = diffusers.SkyReelsV2DiffusionForcingPipeline(
        scheduler=unipc(), vae=wan_vae(), transformer=tiny("SkyReelsV2Transformer3DModel"), **no_encoders("")
    )
    return pipeline, GUIDED_VIDEO | {"prompt": None, "causal_block_size": 1} | options


def ltx(pipeline_class: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    pipeline = pipeline_class(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=ltx_vae(),
        transformer=tiny("LTXVideoTransformer3DModel"),
        **no_encoders(""),
    )
    options = masks("prompt_attention_mask") | {"image": image(32), "height": 32, "width": 32} | options
    return pipeline, RUN | BOTH | {"num_frames": 3} | options


def mochi() -> tuple[Any, dict[str, Any]]:
    pipeline = diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None,
        transformer=tiny("MochiTransformer3DModel"),
        **no_encoders(""),
    )
    text = {"prompt_embeds": noise(1, 1, 5, 16), "negative_prompt_embeds": noise(2, 1, 5, 16)}
    options = masks("prompt_attention_mask", torch.bool) | {"height": 64, "width": 64, "num_frames": 7}
    return pipeline, RUN | text | options


def cosmos(pipeline_class: Any, scheduler: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    pipeline = pipeline_class(
        scheduler=scheduler,
        vae=None,
        transformer=tiny("CosmosTransformer3DModel"),
        safety_checker=wan_vae(),  # any model: it would be shown prompts and pixels, of which there are none
        **no_encoders(""),
    )
    return pipeline, RUN | BOTH | {"height": 64, "width": 64} | options


class OmniGen(DiffusionPipeline):
    """The loop of OmniGenPipeline, which needs torchvision for its prompts: a list from 0 to 1 that rises."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int, generator: torch.Generator) -> tuple[Tensor]:
        given = TINY["OmniGenTransformer2DModel"].inputs(0, num_inference_steps)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(sigmas=torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist())
        for time in self.scheduler.timesteps:
            out = self.transformer(**given | {"hidden_states": latents, "timestep": time.expand(2)}, return_dict=False)
            latents = self.scheduler.step(out[0], time, latents, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return (latents,)


# ----------------------------------------------------------------------------------------------------------------------
# Pipelines made of blocks


def modular(blocks: Any, options: dict[str, Any], **parts: Any) -> tuple[Any, dict[str, Any]]:
    pipeline = blocks().init_pipeline()
    pipeline.update_components(**{"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()} | parts)
    return pipeline, {"num_inference_steps": 6, "height": 64, "width": 64, "output": "latents"} | options


def modular_wan22() -> tuple[Any, dict[str, Any]]:
    sizes = {"in_channels": 16, "out_channels": 16}
    return modular(
        Wan22CoreDenoiseStep,
        BOTH | {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 8},
        scheduler=unipc(),
        transformer=tiny("WanTransformer3DModel", **sizes),
        transformer_2=tiny("WanTransformer3DModel", seed=1, **sizes),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
        guider_2=ClassifierFreeGuidance(guidance_scale=3.0),
    )


def modular_z_image() -> tuple[Any, dict[str, Any]]:
    """Text states are lists of tensors, and each guidance branch is a call."""
    return modular(
        ZImageCoreDenoiseStep,
        {"prompt_embeds": [noise(1, 6, 12)], "negative_prompt_embeds": [noise(2, 6, 12)]},
        transformer=tiny("ZImageTransformer2DModel"),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )


VARIANTS: dict[str, Variant] = {
    "Flux from a picture": Variant(
        make=lambda: flux(diffusers.FluxImg2ImgPipeline, image=image(), **FROM_IMAGE, **GUIDED_FLUX),
        calls="cu" * 6,
        level=from_one,
    ),
    "Flux inpaint": Variant(
        make=lambda: flux(
            diffusers.FluxInpaintPipeline, image=image(), mask_image=torch.ones(1, 1, 8, 8), **FROM_IMAGE
        ),
        calls="c" * 6,
        level=from_one,
    ),
    "Flux ControlNet": Variant(
        make=lambda: flux(
            diffusers.FluxControlNetPipeline,
            controlnet=flux_controlnet(),
            control_image=image(),
            control_guidance_end=0.7,
            **GUIDED_FLUX,
        ),
        calls="cu" * 6,
        level=from_one,
    ),
    "Flux Control": Variant(
        make=lambda: flux(diffusers.FluxControlPipeline, in_channels=8, control_image=image()),
        calls="c" * 6,
        level=from_one,
    ),
    "Flux Kontext": Variant(
        make=lambda: flux(diffusers.FluxKontextPipeline, image=image(), max_area=64, _auto_resize=False, **GUIDED_FLUX),
        calls="cu" * 6,
        level=from_one,
    ),
    "Flux Fill": Variant(
        make=lambda: flux(diffusers.FluxFillPipeline, in_channels=12, image=image(), mask_image=torch.ones(1, 1, 8, 8)),
        calls="c" * 6,
        level=from_one,
    ),
    "SD3 from a picture": Variant(
        make=lambda: sd3(diffusers.StableDiffusion3Img2ImgPipeline, image=image(), **FROM_IMAGE), calls="b" * 6
    ),
    "SD3 ControlNet": Variant(
        make=lambda: sd3(
            diffusers.StableDiffusion3ControlNetPipeline, controlnet=sd3_controlnet(), control_image=image()
        ),
        calls="b" * 6,
    ),
    "SD3 skip-layer guidance": Variant(  # at the third and the fourth step
        make=lambda: sd3(
            diffusers.StableDiffusion3Pipeline,
            num_layers=24,
            skip_guidance_layers=[7, 8, 9],
            skip_layer_guidance_start=0.2,
            skip_layer_guidance_stop=0.6,
        ),
        calls="bb" + "bs" * 2 + "bb",
    ),
    "QwenImage from a picture": Variant(
        make=lambda: qwen(diffusers.QwenImageImg2ImgPipeline, image=image(16), **FROM_IMAGE),
        calls="cu" * 6,
        level=from_one,
    ),
    "QwenImage ControlNet": Variant(
        make=lambda: qwen(diffusers.QwenImageControlNetPipeline, controlnet=qwen_controlnet(), control_image=image(16)),
        calls="cu" * 6,
        level=from_one,
    ),
    "Ideogram 4": Variant(make=ideogram, calls="cu" * 6, level=from_zero),  # a transformer for each branch
    "Lumina2": Variant(make=lambda: lumina2(), calls="cu" * 6, level=from_zero),
    "Lumina2 with guidance that ends": Variant(
        make=lambda: lumina2(cfg_trunc_ratio=0.5),
        calls="cu" * 3 + "ccc",
        level=from_zero,
    ),
    "Wan 2.2": Variant(  # the first transformer down to a noise level of 600
        make=lambda: wan(diffusers.WanPipeline, two=True, num_inference_steps=8), calls="cu" * 4 + "CU" * 4, start=900
    ),
    "Wan 2.2 from a picture": Variant(
        make=lambda: wan(
            diffusers.WanImageToVideoPipeline, two=True, in_channels=10, image=image(16), num_inference_steps=8
        ),
        calls="cu" * 4 + "CU" * 4,
        start=900,
    ),
    "Wan 2.2 TI2V": Variant(make=lambda: wan(diffusers.WanPipeline, expand_timesteps=True), calls="cu" * 6),
    "Wan 2.2 TI2V from a picture": Variant(
        make=lambda: wan(diffusers.WanImageToVideoPipeline, expand_timesteps=True, image=image(16)), calls="cu" * 6
    ),
    "Wan VACE": Variant(make=wan_vace, calls="cu" * 6),
    "SkyReels V2 diffusion forcing": Variant(make=lambda: sky_reels(ar_step=0), calls="cu" * 6, reads=True),
    "SkyReels V2, frames one after another": Variant(  # 5 latent frames, each 2 steps after the one before
        make=lambda: sky_reels(ar_step=2, num_frames=9, num_inference_steps=5), calls="cu" * 13, reads=True
    ),
    "LTX from a picture": Variant(make=lambda: ltx(diffusers.LTXImageToVideoPipeline), calls="b" * 6),
    "LTX from a condition": Variant(make=lambda: ltx(diffusers.LTXConditionPipeline, strength=0.9), calls="b" * 6),
    "Mochi": Variant(make=mochi, calls="b" * 6, level=rising),
    "OmniGen": Variant(
        make=lambda: (
            OmniGen(
                tiny("OmniGenTransformer2DModel"),
                diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
            ),
            {"num_inference_steps": 6},
        ),
        calls="b" * 6,
        level=from_zero,
    ),
    "Cosmos": Variant(
        make=lambda: cosmos(
            diffusers.CosmosTextToWorldPipeline,
            diffusers.EDMEulerScheduler(sigma_max=80.0, sigma_data=0.5),
            num_frames=9,
        ),
        calls="cu" * 6,
        level=from_logarithm,
    ),
    "Cosmos 2": Variant(
        make=lambda: cosmos(diffusers.Cosmos2TextToImagePipeline, karras(80.0)), calls="cu" * 6, level=from_one
    ),
    "Flux of blocks": Variant(
        make=lambda: modular(FluxCoreDenoiseStep, TEXT | POOLED, transformer=tiny("FluxTransformer2DModel")),
        calls="c" * 6,
        level=from_one,
    ),
    "QwenImage of blocks": Variant(
        make=lambda: modular(
            QwenImageCoreDenoiseStep,
            BOTH | masks("prompt_embeds_mask"),
            transformer=tiny("QwenImageTransformer2DModel"),
            guider=ClassifierFreeGuidance(guidance_scale=4.0),
        ),
        calls="cu" * 6,
        level=from_one,
    ),
    "Wan 2.2 of blocks": Variant(make=modular_wan22, calls="cu" * 2 + "CU" * 6, start=900),
    "Z-Image of blocks": Variant(make=modular_z_image, calls="cu" * 6, level=from_zero),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_pipeline(name: str) -> None:
    """Interval 1 changes nothing; interval 2 reuses by the formula in each stream, twice the same, and asks the device
    for nothing; then everything is as it was."""
    variant = VARIANTS[name]
    pipeline, options = variant.make()
    pipeline.set_progress_bar_config(disable=True)
    classes = [type(module) for model in transformers_of(pipeline) for module in model.modules()]
    with watched(pipeline, variant.level), DeviceWaits() as unasked:
        plain = sample(pipeline, options)
    assert plain.isfinite().all()

    enable_cache(pipeline, "delta:N1")
    assert torch.equal(sample(pipeline, options), plain)
    num_calls = len(variant.calls)
    assert cache_summary(pipeline).steps_reused == 0

    for interval, start, stop in ((2, 1000, 0), (3, variant.start, 100)):
        schedule = IntervalSchedule(interval=interval, start_timestep=start, stop_timestep=stop)
        enable_cache(pipeline, f"delta:N{interval}-{start}-{stop}")
        with watched(pipeline, variant.level) as seen, DeviceWaits() as asked:
            cached = sample(pipeline, options)
        assert seen.decisions == variant.expected(seen.levels, schedule), (interval, seen.levels)
        summary = cache_summary(pipeline)
        assert (summary.steps_full, summary.steps_reused) == (seen.decisions.count("F"), seen.decisions.count("r"))
        assert summary.steps_full + summary.steps_reused == num_calls
        assert not torch.equal(cached, plain)
        # the list of timesteps of a run that begins, in some pipelines for each branch
        most = num_calls if variant.reads else len(set(variant.calls))
        assert 1 <= asked.more_than(unasked).total() <= most
    assert torch.equal(sample(pipeline, options), cached)

    disable_cache(pipeline)
    assert [type(module) for model in transformers_of(pipeline) for module in model.modules()] == classes
    assert torch.equal(sample(pipeline, options), plain)
