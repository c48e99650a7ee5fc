"""Extractors of features from pictures or clips: a network, the resize rule of its input, and their names.

An extractor is one entry of `EXTRACTORS`; `Extractor` takes any network. A metric is named after the network: only one
with Inception and its own resize rule is called FID.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from skipdit.files.untrusted import check_hash, file_digest
from skipdit.metrics import i3d, inception
from skipdit.metrics.inception import NetworkOutput
from skipdit.metrics.perceptual import (
    CLASSIFIER,
    WEIGHTS_SHA256,
    EfficientNetLite0,
    SameConv,
    check_metrics_installed,
    norm,
)
from skipdit.metrics.weights import reading_weights
from skipdit.options import choose

ResizeRule = Literal["tf1", "bilinear", "antialias", "bicubic", "none"]
Kind = Literal["pictures", "clips"]
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
LITE0_SPATIAL = 3  # of the layers of the perceptual distance: 112 channels at a sixteenth of the side
LITE0_SIZE = 224


@dataclass(frozen=True)
class Resize:
    """A rule that resizes pictures to the size that a network takes."""

    rule: ResizeRule
    """tf1: bilinear without a half-pixel shift or smoothing, as in TensorFlow 1; bilinear: with the shift; antialias
    and bicubic: smoothed when shrinking; none: unchanged"""
    size: int
    """side in pixels"""

    def __str__(self) -> str:
        return "none" if self.rule == "none" else f"{self.rule} {self.size}"

    def __call__(
        self, pictures: Float[Tensor, "items 3 old_height old_width"]
    ) -> Float[Tensor, "items 3 height width"]:
        """Return the pictures, resized to squares."""
        sides = (self.size, self.size)
        if self.rule == "none" or tuple(pictures.shape[-2:]) == sides:
            return pictures
        if self.rule == "tf1":
            return tf1_bilinear(pictures, self.size)
        mode = "bicubic" if self.rule == "bicubic" else "bilinear"
        resized = interpolate(pictures, sides, mode=mode, align_corners=False, antialias=self.rule != "bilinear")
        return resized.clamp(0, 1)


def tf1_bilinear(
    pictures: Float[Tensor, "items channels height width"], size: int
) -> Float[Tensor, "items channels size size"]:
    """Return pictures resized as by `tf.image.resize_bilinear` of TensorFlow 1, with which FID is defined: pixel i of
    the result is at i · (old size / new size) in the picture."""
    for axis in (2, 3):
        length = pictures.shape[axis]
        positions = torch.arange(size, dtype=pictures.dtype, device=pictures.device) * (length / size)
        lower = positions.floor().long().clamp(max=length - 1)
        share = (positions - lower).view(-1, *[1] * (3 - axis))
        before = pictures.index_select(axis, lower)
        after = pictures.index_select(axis, (lower + 1).clamp(max=length - 1))
        pictures = before + (after - before) * share
    return pictures


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network that computes features."""

    name: str
    """name in reports, after which metrics are named"""
    network: Callable[[Tensor], NetworkOutput]
    """takes pictures (n 3 h w) or clips (n f 3 h w) in [0, 1]"""
    resize: Resize
    takes: Kind = "pictures"
    """input of the network; one that takes pictures measures clips frame by frame"""
    digest: str = ""
    """SHA-256 of the weights"""
    batch_size: int = 32
    """pictures or clips per batch"""
    standard: Resize | None = None
    """the resize rule with which metrics have the names used in papers, if there are such names"""
    min_size: int = 1
    """smallest side in pixels of a picture that the network takes"""

    @property
    def is_standard(self) -> bool:
        """Return true if metrics may have the names used in papers."""
        return self.resize == self.standard

    @property
    def identity(self) -> dict[str, str]:
        """Return the properties that two values must share to be compared."""
        return {"extractor": self.name, "weights_sha256": self.digest, "resize": str(self.resize)}

    @torch.inference_mode()
    def __call__(self, items: UInt8[Tensor, "items *frames height width 3"], device: torch.device) -> NetworkOutput:
        """Return the features of a batch of pictures, or of clips (n f h w 3), on the CPU."""
        if self.takes == "clips" and items.ndim != 5:
            raise ValueError(f"{self.name} takes clips, got pictures: give another --extractor")
        pictures = items.to(device).flatten(0, -4).movedim(-1, 1).float() / 255
        resized = self.resize(pictures)
        if (side := min(resized.shape[-2:])) < self.min_size:
            raise ValueError(f"{self.name} needs pictures of at least {self.min_size} pixels a side, got {side}")
        if self.takes == "clips":
            resized = resized.unflatten(0, items.shape[:2])
        pooled, *others = self.network(resized)
        spatial, logits = (None if values is None else values.float().cpu() for values in others)
        return NetworkOutput(pooled.float().cpu(), spatial, logits)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


class Lite0(nn.Module):
    """EfficientNet-Lite0 with 1,280 pooled features, 7 channels of spatial features, and 1,000 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = EfficientNetLite0()
        self._conv_head, self._bn1 = SameConv(320, 1280, 1, bias=False), norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, pictures: Tensor) -> NetworkOutput:
        layers = self.trunk(pictures.contiguous(memory_format=torch.channels_last))  # several times as fast on a CPU
        head = self._bn1(self._conv_head(layers[-1])).clamp(0, 6)
        pooled = head.mean(dim=(2, 3))
        return NetworkOutput(pooled, layers[LITE0_SPATIAL][:, : inception.NUM_SPATIAL].flatten(1), self._fc(pooled))


def load_lite0(path: Path | None) -> Extractor:
    """Return EfficientNet-Lite0. path: its weights, named as in its package, by default those of the package. Raises
    `ValueError` if they are not installed, or if the file holds something else."""
    file = path or check_metrics_installed()
    if path is None:
        check_hash(file, WEIGHTS_SHA256)
    network = Lite0()
    with reading_weights(file, "EfficientNet-Lite0"):
        weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict(
            {name if name.startswith(CLASSIFIER) else f"trunk.{name}": value for name, value in weights.items()}
        )
    for weight in network.eval().requires_grad_(False).parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    resize = Resize("antialias", LITE0_SIZE)
    digest = WEIGHTS_SHA256 if path is None else file_digest(path)
    return Extractor(name="EffNetLite0", network=network, resize=resize, digest=digest)


def load_i3d(path: Path | None) -> Extractor:
    """Return I3D. path: its weights, in the format of its package, by default those of the package. Raises `ValueError`
    if they are not installed, or if the file holds something else."""
    resize = Resize("bilinear", i3d.SIZE)
    network, digest = i3d.load_i3d(path), i3d.SHA256 if path is None else file_digest(path)
    return Extractor(
        name="I3D", network=network, resize=resize, takes="clips", digest=digest, batch_size=2, standard=resize
    )


def find_inception() -> Path | None:
    """Return the weights of Inception that torch-fidelity or pytorch-fid have downloaded; `None` if they have not."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next((folder / name for name in INCEPTION_FILES if (folder / name).is_file()), None)


def load_inception(path: Path | None) -> Extractor:
    """Return Inception in the variant of FID. path: its weights, by default those that torch-fidelity or pytorch-fid
    have downloaded. Raises `ValueError` if there are none, or if the file holds something else; no code in it is
    run."""
    file = path or find_inception()
    if file is None:
        raise ValueError(
            f"the weights of Inception are not here: give inception=PATH of {INCEPTION_FILES[0]}, which is at "
            "github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
        )
    network = inception.InceptionV3()
    with reading_weights(file, "Inception for FID"):
        weights = torch.load(file, map_location="cpu", weights_only=True)
        state = network.state_dict()
        counters = {name: value for name, value in state.items() if name.endswith("num_batches_tracked")}
        network.load_state_dict(counters | dict(weights))
    resize = Resize("tf1", inception.SIZE)
    return Extractor(
        name="Inception",
        network=network.eval().requires_grad_(False),
        resize=resize,
        digest=file_digest(file),
        standard=resize,
        min_size=inception.MIN_SIZE,
    )


EXTRACTORS: dict[str, Callable[[Path | None], Extractor]] = {
    "lite0": load_lite0,
    "inception": load_inception,
    "i3d": load_i3d,
}


def open_extractor(
    name: str, *, rule: ResizeRule | None = None, size: int | None = None, device: torch.device | None = None
) -> Extractor:
    """Return an extractor: lite0, i3d or inception, or one of these with =PATH of its weights. rule, size: the resize
    rule, by default the extractor's own. Raises `ValueError` if the name is unknown or its weights are missing."""
    kind, _, path = name.partition("=")
    extractor = EXTRACTORS[choose("the extractor", kind, EXTRACTORS)](Path(path) if path else None)
    resize = Resize(rule or extractor.resize.rule, size or extractor.resize.size)
    if isinstance(extractor.network, nn.Module) and device is not None:
        extractor.network.to(device)
    return replace(extractor, resize=resize)
