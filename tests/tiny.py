"""Real classes at a size that runs in milliseconds."""

import torch

from skipdit.diffusion import Objective, make_scheduler
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig
from skipdit.pipelines import ClassToImagePipeline


def tiny_dit(num_layers: int = 6, long_skip: LongSkipConfig | None = LongSkipConfig(), **sizes: int) -> DiT:  # noqa: B008
    """Weights are random everywhere, also where adaLN-Zero starts at zero, so that every path matters."""
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_classes": 10} | sizes
    model = DiT(num_layers=num_layers, num_attention_heads=2, attention_head_dim=16, long_skip=long_skip, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tiny_pipeline(scheduler: str = "ddim", **options: object) -> ClassToImagePipeline:
    pipeline = ClassToImagePipeline(tiny_dit(**options), make_scheduler(Objective(learned_variance=True), scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def inputs(batch: int = 2, size: int = 8, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, channels, size, size, generator=generator), torch.randint(
        10, (batch,), generator=generator
    )
