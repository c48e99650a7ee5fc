"""How caches of diffusers and of cache-dit are set up on a `HookedDiT`, a setting each.

What a technique asks of its user (the current timestep, names of layers, a calibration) is done here as its
documentation says; a `ValueError` says where it would have no effect or cannot run.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import logging
import os
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    CacheMixin,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import nn

from .model import HookedDiT

CACHE_DIT = "cache_dit"


@dataclass(frozen=True, kw_only=True)
class Technique:
    """A cache at one setting, which `str` of it names. Abstract.

    A pipeline is a `ClassToImagePipeline` around a `HookedDiT` where nothing else is said.
    """

    def enable(self, pipeline: Any, num_inference_steps: int) -> None:
        """For runs of so many steps. `ValueError` where it cannot run or would have no effect."""
        model = pipeline.transformer
        if _hooks(model) or (isinstance(model, HookedDiT) and model.stand_in):
            raise ValueError("another cache is on: disable it first")
        CacheMixin.enable_cache(model, self.config(pipeline, num_inference_steps))
        if not _hooks(model):
            CacheMixin.disable_cache(model)
            raise ValueError(f"{self} finds no layer of {type(model).__name__} to act on")

    def disable(self, pipeline: Any) -> None:
        model = pipeline.transformer
        if _hooks(model):
            CacheMixin.disable_cache(model)

    def config(self, pipeline: Any, num_inference_steps: int) -> Any:
        """Of diffusers."""
        raise NotImplementedError


def _hooks(model: nn.Module) -> int:
    """How many modules have a hook of diffusers."""
    registries = (vars(module).get("_diffusers_hook") for module in model.modules())
    return sum(registry is not None and bool(registry.hooks) for registry in registries)


@dataclass(frozen=True, kw_only=True)
class AttentionBroadcast(Technique):
    """skip_range: attentions run every so many steps; timesteps: in this window."""

    skip_range: int
    timesteps: tuple[int, int] = (100, 800)

    def __str__(self) -> str:
        return f"N{self.skip_range}-{self.timesteps[1]}-{self.timesteps[0]}"

    def config(self, pipeline: Any, num_inference_steps: int) -> Any:
        run = pipeline.transformer.run
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.skip_range,
            spatial_attention_timestep_skip_range=self.timesteps,
            current_timestep_callback=lambda: run.timestep,
        )


@dataclass(frozen=True, kw_only=True)
class VideoAttentionBroadcast(Technique):
    """Of diffusers' `LattePipeline`. spatial, temporal, cross: attentions of each kind run every so many steps;
    timesteps: in this window."""

    spatial: int
    temporal: int
    cross: int
    timesteps: tuple[int, int] = (100, 800)

    def __str__(self) -> str:
        return f"N{self.spatial}.{self.temporal}.{self.cross}-{self.timesteps[1]}-{self.timesteps[0]}"

    def config(self, pipeline: Any, num_inference_steps: int) -> Any:
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.spatial,
            temporal_attention_block_skip_range=self.temporal,
            cross_attention_block_skip_range=self.cross,
            spatial_attention_timestep_skip_range=self.timesteps,
            temporal_attention_timestep_skip_range=self.timesteps,
            cross_attention_timestep_skip_range=self.timesteps,
            current_timestep_callback=lambda: pipeline.current_timestep,
        )


@dataclass(frozen=True, kw_only=True)
class FirstBlock(Technique):
    """threshold: of the relative change of what the first block adds."""

    threshold: float

    def __str__(self) -> str:
        return f"{self.threshold:g}"

    def config(self, pipeline: Any, num_inference_steps: int) -> Any:
        return FirstBlockCacheConfig(threshold=self.threshold)


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Technique):
    """interval: steps between full ones; warmup: full steps at the start. whole: the model's output is extrapolated,
    not that of every attention and MLP. Factors are kept in float32, as in the paper's code."""

    interval: int
    order: int = 1
    warmup: int = 3
    whole: bool = False

    def __str__(self) -> str:
        return f"{'output-' if self.whole else ''}N{self.interval}-o{self.order}"

    def config(self, pipeline: Any, num_inference_steps: int) -> Any:
        branches = [r"transformer_blocks\.\d+\.(attn1|ff)"]
        # its lite mode looks for `proj_out`, which this model does not have
        return TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=torch.float32,
            skip_predict_identifiers=[r"transformer_blocks\.\d+"] if self.whole else None,
            cache_identifiers=["proj_out_2"] if self.whole else branches,
        )


CALIBRATION_SEEDS = (1000, 1001, 1002)  # not those of a benchmark
CALIBRATION_CLASSES = 4
CALIBRATION_GUIDANCE = 2.0


@dataclass(frozen=True, kw_only=True)
class Magnitude(Technique):
    """threshold: of the error added up from ratios of magnitudes, which are calibrated first, once a model;
    max_skip_steps: in a row; retention_ratio: of the steps, full at the start."""

    threshold: float
    max_skip_steps: int = 3
    retention_ratio: float = 0.2

    def __str__(self) -> str:
        return f"{self.threshold:g}-K{self.max_skip_steps}"

    def enable(self, pipeline: Any, num_inference_steps: int) -> None:
        super().enable(pipeline, num_inference_steps)
        model = pipeline.transformer

        def check() -> None:
            steps = len(pipeline.scheduler.timesteps)
            if steps != num_inference_steps:
                raise ValueError(f"magcache was calibrated for {num_inference_steps} steps, the run has {steps}")

        model.starts = check

    def disable(self, pipeline: Any) -> None:
        super().disable(pipeline)
        pipeline.transformer.starts = None

    def config(self, pipeline: Any, num_inference_steps: int) -> Any:
        return MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.max_skip_steps,
            retention_ratio=self.retention_ratio,
            num_inference_steps=num_inference_steps,
            mag_ratios=list(calibrated_ratios(pipeline, num_inference_steps)),
        )


def calibrated_ratios(pipeline: Any, num_inference_steps: int) -> tuple[float, ...]:
    """The mean over some seeds of what MagCache's calibration prints, one a step; measured once a model and number of
    steps."""
    model: Any = pipeline.transformer
    known = vars(model).setdefault("calibrated", {})
    if num_inference_steps not in known:
        labels = list(range(min(CALIBRATION_CLASSES, model.config.num_classes)))
        printed = []
        CacheMixin.enable_cache(model, MagCacheConfig(calibrate=True, num_inference_steps=num_inference_steps))
        try:
            for seed in CALIBRATION_SEEDS:
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    pipeline(
                        labels,
                        num_inference_steps=num_inference_steps,
                        guidance_scale=CALIBRATION_GUIDANCE,
                        generator=torch.Generator().manual_seed(seed),
                        output_type="latent",
                    )
                line = next(line for line in output.getvalue().splitlines() if line.startswith("[1.0"))
                printed.append(ast.literal_eval(line))
        finally:
            CacheMixin.disable_cache(model)
        known[num_inference_steps] = tuple(sum(step) / len(step) for step in zip(*printed, strict=True))
    return known[num_inference_steps]


@dataclass(frozen=True, kw_only=True)
class Faster(Technique):
    """skip_range: attentions run every so many steps below timestep 681, and are extrapolated between;
    null_range: so often the null class runs below 641, 1 for always. Its other values are diffusers' own."""

    skip_range: int = 2
    null_range: int = 5

    def __str__(self) -> str:
        return f"N{self.skip_range}-null{self.null_range}"

    def enable(self, pipeline: Any, num_inference_steps: int) -> None:
        super().enable(pipeline, num_inference_steps)
        pipeline.transformer.null_class_first = True

    def disable(self, pipeline: Any) -> None:
        super().disable(pipeline)
        pipeline.transformer.null_class_first = False

    def config(self, pipeline: Any, num_inference_steps: int) -> Any:
        run = pipeline.transformer.run
        logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)  # "purely experimental"
        warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
        return FasterCacheConfig(
            spatial_attention_block_skip_range=self.skip_range,
            unconditional_batch_skip_range=self.null_range,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCHW",
            current_timestep_callback=lambda: run.timestep,
            # by default labels are not split, and the two halves no longer fit
            _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", "class_labels"],
        )


@dataclass(frozen=True, kw_only=True)
class DualBlock(Technique):
    """cache-dit. front, back: blocks that always run at each end. What the others add is held, or with an order
    extrapolated, while the relative change of what the front blocks add is below the threshold; with an interval
    instead, every so many steps. warmup: full steps at the start."""

    front: int = 1
    back: int = 0
    threshold: float | None = None
    interval: int | None = None
    order: int | None = None
    warmup: int = 4

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.interval is None):
            raise ValueError(f"give a threshold or an interval, got {self.threshold} and {self.interval}")
        if self.back >= self.front:  # a block's output becomes a skip when the next block starts
            raise ValueError(f"back must be below front, or skips are missing, got F{self.front}B{self.back}")

    def __str__(self) -> str:
        when = f"N{self.interval}" if self.threshold is None else f"{self.threshold:g}"
        return f"F{self.front}B{self.back}-{when}{'' if self.order is None else f'-o{self.order}'}"

    def enable(self, pipeline: Any, num_inference_steps: int) -> None:
        cache_dit = load_cache_dit()
        model = pipeline.transformer
        if _hooks(model) or model.stand_in:
            raise ValueError("another cache is on: disable it first")
        if self.front > len(model.transformer_blocks) // 2:
            raise ValueError(f"front must be at most half of {len(model.transformer_blocks)} blocks, got {self.front}")
        mask = None
        if self.interval is not None:
            mask = [int(i < self.warmup or (i - self.warmup) % self.interval == 0) for i in range(num_inference_steps)]
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=self.front,
            Bn_compute_blocks=self.back,
            residual_diff_threshold=self.threshold or 1.0,
            max_warmup_steps=self.warmup,
            num_inference_steps=num_inference_steps,
            steps_computation_mask=mask,
            steps_computation_policy="dynamic" if mask is None else "static",
            enable_separate_cfg=False,
        )
        adapter = cache_dit.BlockAdapter(
            transformer=model,
            blocks=model.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            check_forward_pattern=False,  # it reads the signature of a block's class, which `UnitBlock` hides
        )
        taylor = None if self.order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.order)
        model.stand_in = (model.transformer_blocks[0].norm1,)
        cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=taylor)
        model.starts = partial(cache_dit.refresh_context, model, cache_config=config, calibrator_config=taylor)

    def disable(self, pipeline: Any) -> None:
        model = pipeline.transformer
        if model.stand_in:
            load_cache_dit().disable_cache(model)
            vars(model).pop("forward", None)
            model.starts, model.stand_in = None, ()


def install_hint(package: str) -> str:
    return f'{package} is not installed: pip install ".[rivals]"'


def load_cache_dit() -> Any:
    """The package; `ValueError` where it is not installed."""
    if importlib.util.find_spec(CACHE_DIT) is None:
        raise ValueError(install_hint(CACHE_DIT))
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    return importlib.import_module(CACHE_DIT)
