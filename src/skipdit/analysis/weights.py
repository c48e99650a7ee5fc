"""Singular values of a model's projections, and losses and gradient norms from a training log."""

from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn

from skipdit.files.untrusted import parse_json, printable, read_bytes
from skipdit.models.dit import DiT

MAX_LOG_BYTES = 2**29
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "modulation")


@dataclass(frozen=True)
class LongSkipSpectrum:
    """Singular values of one long skip's projection, largest first."""

    whole: Tensor
    """of the whole projection"""
    hidden: Tensor
    """of the half that acts on the hidden states"""
    skip: Tensor
    """of the half that acts on the skip"""


def long_skip_spectra(model: DiT) -> dict[int, LongSkipSpectrum]:
    """Return the singular values of all long skips in float64, by target unit; empty for a plain model."""
    spectra = {}
    for target in sorted(model.long_skip_links.sources):
        weight = model.blocks[target].get_submodule("long_skip.proj").get_parameter("weight").detach().double().cpu()
        width = weight.shape[0]
        parts = (weight, weight[:, :width], weight[:, width:])
        spectra[target] = LongSkipSpectrum(*(torch.linalg.svdvals(part) for part in parts))
    return spectra


def layer_norms(model: DiT) -> dict[str, Tensor]:
    """Return the spectral norms (num_units,) of each kind of layer in float64."""

    def weight(block: nn.Module, name: str) -> Tensor:
        return block.get_submodule(name).get_parameter("weight").detach().double().cpu()

    return {
        name: torch.stack([torch.linalg.matrix_norm(weight(block, name), ord=2) for block in model.blocks])
        for name in LAYERS
    }


@dataclass(frozen=True)
class TrainingLog:
    """Values that a training run logged."""

    steps: Tensor
    """(n,)"""
    loss: Tensor
    """(n,)"""
    unit_gradient_norms: Tensor
    """(n, num_units); empty if the run did not log them"""

    @property
    def last_loss(self) -> float:
        """Return the mean loss over the last tenth of the log."""
        return self.loss[-max(len(self.loss) // 10, 1) :].mean().item()

    @classmethod
    def read(cls, path: Path) -> "TrainingLog":
        """Read a log that `skipdit train` has written or is still writing; a truncated last line is ignored.

        Raises `ValueError` if the file is something else, or holds no step.
        """
        try:
            *lines, last = read_bytes(path, MAX_LOG_BYTES).split(b"\n")
            steps = [parse_json(line, LoggedStep, f"line {number}") for number, line in enumerate(lines, start=1)]
            try:
                steps += [parse_json(last, LoggedStep, f"line {len(lines) + 1}")] if last.strip() else []
            except ValueError:
                if not steps:
                    raise
            if not steps:
                raise ValueError("it holds no step")
            return cls(
                torch.tensor([step["step"] for step in steps]),
                torch.tensor([step["loss"] for step in steps], dtype=torch.float64),
                torch.tensor([step.get("unit_gradient_norms", []) for step in steps], dtype=torch.float64),
            )
        except ValueError as error:
            raise ValueError(f"{printable(path)} is not a log of skipdit train ({error})") from error


class LoggedStep(TypedDict):
    step: int
    loss: float
    unit_gradient_norms: NotRequired[list[float]]


def find_training_log(model: str) -> Path | None:
    """Return the path of `log.jsonl`, given the folder of a run or of its pipeline; `None` if there is no such run."""
    folder = Path(model).resolve()
    folder = folder.parent if folder.name == "pipeline" else folder
    path = folder / "log.jsonl"
    return path if (folder / "pipeline").is_dir() and path.is_file() else None
