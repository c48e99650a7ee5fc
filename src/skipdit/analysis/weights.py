"""Singular values of a model's projections, and gradient norms read from a training log."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from skipdit.models.dit import DiT

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "modulation")


@dataclass(frozen=True)
class LongSkipSpectrum:
    """Singular values of one projection (largest first): of the whole, of the half that acts on the hidden states and
    of the half that acts on the skip."""

    whole: Tensor
    hidden: Tensor
    skip: Tensor


def long_skip_spectra(model: DiT) -> dict[int, LongSkipSpectrum]:
    """By target unit; empty for a plain model. In float64."""
    spectra = {}
    for target in sorted(model.long_skip_links.sources):
        weight = model.blocks[target].get_submodule("long_skip.proj").get_parameter("weight").detach().double().cpu()
        width = weight.shape[0]
        parts = (weight, weight[:, :width], weight[:, width:])
        spectra[target] = LongSkipSpectrum(*(torch.linalg.svdvals(part) for part in parts))
    return spectra


def layer_norms(model: DiT) -> dict[str, Tensor]:
    """The spectral norm (num_units,) of each kind of layer in each unit, in float64."""

    def weight(block: nn.Module, name: str) -> Tensor:
        return block.get_submodule(name).get_parameter("weight").detach().double().cpu()

    return {
        name: torch.stack([torch.linalg.matrix_norm(weight(block, name), ord=2) for block in model.blocks])
        for name in LAYERS
    }


@dataclass(frozen=True)
class TrainingLog:
    """steps (n,), loss (n,), unit_gradient_norms (n, num_units), empty where the run did not write them."""

    steps: Tensor
    loss: Tensor
    unit_gradient_norms: Tensor

    @property
    def last_loss(self) -> float:
        """Mean over the last tenth."""
        return self.loss[-max(len(self.loss) // 10, 1) :].mean().item()

    @classmethod
    def read(cls, path: Path) -> "TrainingLog":
        """`ValueError` where the file is not a log of `skipdit train`."""
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return cls(
                torch.tensor([line["step"] for line in lines]),
                torch.tensor([line["loss"] for line in lines], dtype=torch.float64),
                torch.tensor([line.get("unit_gradient_norms", []) for line in lines], dtype=torch.float64),
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a log of skipdit train ({error})") from error


def find_training_log(model: str) -> Path | None:
    """`log.jsonl` beside a run's `pipeline` folder."""
    path = Path(model).resolve().parent / "log.jsonl"
    return path if Path(model).name == "pipeline" and path.is_file() else None
