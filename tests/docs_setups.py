"""What stands before the Python blocks of README and docs: `<!-- setup: NAME -->` in front of a block names a function
here. Pipelines of published models are the same classes of diffusers, at tiny size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from published import flux_dev, hunyuan_dit, latte_transformer, randomize, wan_t2v
from tiny import TINY_FAMILIES, tiny_pipeline
from torch import Tensor, nn

import skipdit

Names = dict[str, Any]
STEPS = 12  # of the runs of docs, which name as many as a real model takes


def small(pipeline: Any, **forced: Any) -> Any:
    """A pipeline whose call takes these options in place of those given, and at most `STEPS` steps."""
    kind = type(pipeline)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        steps = min(options.get("num_inference_steps", STEPS), STEPS)
        return kind.__call__(self, *args, **{**options, **forced, "num_inference_steps": steps})

    pipeline.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stand_in(patch: pytest.MonkeyPatch, kind: Any, pipeline: Any, **forced: Any) -> Names:
    """Let `from_pretrained` return this pipeline, wherever it is moved."""
    patch.setattr(kind, "from_pretrained", lambda *args, **options: small(pipeline, **forced))
    patch.setattr(DiffusionPipeline, "to", lambda self, *args, **options: self)
    return {}


def nothing(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    return {}


def class_to_image(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    return {"pipe": small(tiny_pipeline(num_classes=20))}


def schedule(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    path = folder / "out" / "schedules" / "1.8x.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"method": "skip-taylor", "full_steps": [0, 2, 4], "num_inference_steps": 6}))
    return class_to_image(patch, folder)


def flux(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    pipeline = diffusers.FluxPipeline.from_pretrained(flux_dev(made(folder)), dtype=torch.float32)
    return stand_in(patch, diffusers.FluxPipeline, pipeline, height=64, width=64)


def wan(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    pipeline = diffusers.WanPipeline.from_pretrained(wan_t2v(made(folder)), dtype=torch.float32)
    return stand_in(patch, diffusers.WanPipeline, pipeline, height=64, width=64, num_frames=5)


def hunyuan(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    pipeline = diffusers.HunyuanDiTPipeline.from_pretrained(hunyuan_dit(made(folder)), dtype=torch.float32)
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    return stand_in(patch, diffusers.HunyuanDiTPipeline, pipeline, **size)


def qwen(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    """Without text encoder and autoencoder, which would be large: the prompt's states are noise."""
    config: Any = {
        "num_layers": 6,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 16,
        "out_channels": 4,
    }
    config |= {"joint_attention_dim": 12, "axes_dims_rope": (4, 2, 2)}
    kind: Any = diffusers.QwenImagePipeline
    transformer = diffusers.QwenImageTransformer2DModel
    pipeline = kind(flow_scheduler(), None, None, None, randomize(transformer(**config)))
    patch.setattr(type(pipeline), "encode_prompt", lambda *args, **options: (torch.randn(1, 5, 12), None))
    return stand_in(patch, diffusers.QwenImagePipeline, pipeline, height=64, width=64, output_type="latent")


def sd3(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    """Without text encoders and autoencoder: the prompt's states are noise."""
    kind: Any = diffusers.StableDiffusion3Pipeline
    pipeline = kind(TINY_FAMILIES["SD3Transformer2DModel"].build(), flow_scheduler(), *[None] * 7)
    states = (torch.randn(1, 5, 12), torch.randn(1, 5, 12), torch.randn(1, 10), torch.randn(1, 10))
    patch.setattr(type(pipeline), "encode_prompt", lambda *args, **options: states)
    return stand_in(patch, diffusers.StableDiffusion3Pipeline, pipeline, height=64, width=64, output_type="latent")


def flow_scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def made(folder: Path) -> Path:
    (folder / "published").mkdir()
    return folder / "published"


def latte(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    return {"transformer": randomize(latte_transformer())}


def latte_with_skips(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    names = latte(patch, folder)
    skipdit.add_long_skips(names["transformer"], skipdit.LongSkipConfig(fusion="residual"))
    return names


def routing(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    arguments = TINY_FAMILIES["WanTransformer3DModel"].arguments(batch=2)
    return {
        "transformer": TINY_FAMILIES["WanTransformer3DModel"].build(),
        "batch_size": 2,
        "num_tokens": 32,
        "latents": arguments["hidden_states"],
        "timestep": arguments["timestep"],
        "text": arguments["encoder_hidden_states"],
    }


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.ff = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(hidden_states)
        return hidden_states + self.ff(hidden_states)


def declare(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    class MyTransformer(ModelMixin, ConfigMixin):
        """Of nobody: its blocks are in `layers`."""

        @register_to_config
        def __init__(self, dim: int = 16, num_layers: int = 6) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block(dim) for _ in range(num_layers))

        def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            for layer in self.layers:
                hidden_states = layer(hidden_states)
            return (hidden_states,)

    model = randomize(MyTransformer())
    return {
        "MyTransformer": MyTransformer, "model": model, "skipdit": skipdit, "latents": torch.randn(2, 4, 16),
        "timestep": torch.tensor([500.0, 500.0]),
    }  # fmt: skip


def declare_double(patch: pytest.MonkeyPatch, folder: Path) -> Names:
    class MyTransformer(ModelMixin, ConfigMixin):
        """Of nobody: it has blocks of two kinds."""

        @register_to_config
        def __init__(self, num_heads: int = 2, head_dim: int = 8) -> None:
            super().__init__()

    return {"MyTransformer": MyTransformer, "skipdit": skipdit}


SETUPS: dict[str, Callable[[pytest.MonkeyPatch, Path], Names]] = {
    "none": nothing,
    "train": nothing,
    "any": class_to_image,
    "dit": class_to_image,
    "schedule": schedule,
    "flux": flux,
    "wan": wan,
    "qwen": qwen,
    "sd3": sd3,
    "hunyuan": hunyuan,
    "latte": latte,
    "latte-with-skips": latte_with_skips,
    "routing": routing,
    "declare": declare,
    "declare-double": declare_double,
}
