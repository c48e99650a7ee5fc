"""What turns pictures or clips into features: a network, the rule by which its input is resized, and their names.

An extractor is one entry of `EXTRACTORS`; `Extractor` takes any network. A figure is called as its network is: FID only
where Inception and its own resize rule are used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from skipdit.files.untrusted import check_hash, file_digest, open_regular, printable
from skipdit.metrics import i3d, inception
from skipdit.metrics.inception import NetworkOutput
from skipdit.metrics.perceptual import (
    WEIGHTS_SHA256,
    EfficientNetLite0,
    SameConv,
    check_metrics_installed,
    norm,
)
from skipdit.options import choose

ResizeRule = Literal["tf1", "bilinear", "antialias", "bicubic", "none"]
Kind = Literal["pictures", "clips"]
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
MAX_WEIGHTS_BYTES = 2**30
LITE0_SPATIAL = 3  # of the layers of the perceptual distance: 112 channels at a sixteenth of the side
LITE0_SIZE = 224


@dataclass(frozen=True)
class Resize:
    """How a picture becomes as large as a network wants it."""

    rule: ResizeRule
    """tf1: bilinear without half a pixel's shift or smoothing, as TensorFlow 1; bilinear: with the shift; antialias and
    bicubic: smoothed where it shrinks; none: as it is"""
    size: int
    """side in pixels"""

    def __str__(self) -> str:
        return "none" if self.rule == "none" else f"{self.rule} {self.size}"

    def __call__(
        self, pictures: Float[Tensor, "items 3 old_height old_width"]
    ) -> Float[Tensor, "items 3 height width"]:
        """Return the pictures, resized to a square."""
        if self.rule == "none" or tuple(pictures.shape[-2:]) == (self.size, self.size):
            return pictures
        if self.rule == "tf1":
            return tf1_bilinear(pictures, self.size)
        mode = "bicubic" if self.rule == "bicubic" else "bilinear"
        sides = (self.size, self.size)
        resized = interpolate(pictures, sides, mode=mode, align_corners=False, antialias=self.rule != "bilinear")
        return resized.clamp(0, 1)


def tf1_bilinear(
    pictures: Float[Tensor, "items channels height width"], size: int
) -> Float[Tensor, "items channels size size"]:
    """Return pictures resized as `tf.image.resize_bilinear` of TensorFlow 1 does, which FID is defined with: place i
    of the result is place i · (old size / new size) of the picture."""
    for axis in (2, 3):
        length = pictures.shape[axis]
        places = torch.arange(size, dtype=pictures.dtype, device=pictures.device) * (length / size)
        lower = places.floor().long().clamp(max=length - 1)
        share = (places - lower).view(-1, *[1] * (3 - axis))
        before, after = (pictures.index_select(axis, each) for each in (lower, (lower + 1).clamp(max=length - 1)))
        pictures = before + (after - before) * share
    return pictures


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network that features come from. network: takes pictures (n 3 h w) or clips (n f 3 h w) in [0, 1]."""

    name: str
    """its name in reports: a figure is called after it"""
    network: Callable[[Tensor], NetworkOutput]
    resize: Resize
    takes: Kind = "pictures"
    """what its network takes; clips are measured frame by frame by one that takes pictures"""
    digest: str = ""
    """SHA-256 of the weights"""
    batch_size: int = 32
    """pictures or clips at once"""
    standard: Resize | None = None
    """the resize rule with which figures have the names that papers give them, where there are such names"""
    min_size: int = 1
    """smallest side of a picture that the network takes, in pixels"""

    @property
    def is_standard(self) -> bool:
        """Whether a figure may have the name that papers give it."""
        return self.resize == self.standard

    @property
    def identity(self) -> dict[str, str]:
        """What two figures must share to be compared."""
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
        found = self.network(resized)
        spatial, logits = (None if each is None else each.float().cpu() for each in (found.spatial, found.logits))
        return NetworkOutput(found.pooled.float().cpu(), spatial, logits)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


class Lite0(nn.Module):
    """EfficientNet-Lite0 to 1,280 pooled features, 7 channels of places, and 1,000 logits."""

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


@contextmanager
def _told_of(file: Path, what: str) -> Iterator[None]:
    """Refuse a file that is too large, and say of any failure to read it that it is not the weights of a network."""
    with open_regular(file) as opened:
        if (size := opened.seek(0, 2)) > MAX_WEIGHTS_BYTES:
            raise ValueError(f"{printable(file)} has {size:,} bytes, at most {MAX_WEIGHTS_BYTES:,} are read")
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch, zipfile and pickle raise of every kind
        reason = printable(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        raise ValueError(f"{printable(file)} is not the weights of {what}: {reason}") from error


def load_lite0(path: Path | None) -> Extractor:
    """Return EfficientNet-Lite0. path: its weights, named as in its package; by default those of the package.
    `ValueError` where they are not installed, or the file is not such weights."""
    file = path or check_metrics_installed()
    if path is None:
        check_hash(file, WEIGHTS_SHA256)
    own = ("_conv_head.", "_bn1.", "_fc.")
    network = Lite0()
    with _told_of(file, "EfficientNet-Lite0"):
        weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        named = {name if name.startswith(own) else f"trunk.{name}": each for name, each in weights.items()}
        network.load_state_dict(named)
    resize = Resize("antialias", LITE0_SIZE)
    frozen = network.eval().requires_grad_(False)
    for weight in frozen.parameters():
        weight.data = weight.data.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight.data
    digest = WEIGHTS_SHA256 if path is None else file_digest(path)
    return Extractor(name="EffNetLite0", network=frozen, resize=resize, digest=digest)


def load_i3d(path: Path | None) -> Extractor:
    """Return I3D. path: its weights as its package holds them; by default those of the package. `ValueError` where they
    are not installed, or the file is not such weights."""
    resize = Resize("bilinear", i3d.SIZE)
    network, digest = i3d.load_i3d(path), i3d.SHA256 if path is None else file_digest(path)
    return Extractor(
        name="I3D", network=network, resize=resize, takes="clips", digest=digest, batch_size=2, standard=resize
    )


def find_inception() -> Path | None:
    """Return the weights of Inception that torch-fidelity or pytorch-fid have downloaded, where they have."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next((folder / name for name in INCEPTION_FILES if (folder / name).is_file()), None)


def load_inception(path: Path | None) -> Extractor:
    """Return Inception in the variant of FID. path: its weights; by default those that torch-fidelity or pytorch-fid
    have downloaded. `ValueError` where there are none, or the file is not such weights; nothing in it is called."""
    file = path or find_inception()
    if file is None:
        raise ValueError(
            f"the weights of Inception are not here: give inception=PATH of {INCEPTION_FILES[0]}, which is at "
            "github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
        )
    network = inception.InceptionV3()
    with _told_of(file, "Inception for FID"):
        weights = torch.load(file, map_location="cpu", weights_only=True)
        counters = {name: each for name, each in network.state_dict().items() if name.endswith("num_batches_tracked")}
        network.load_state_dict(counters | dict(weights))
    resize = Resize("tf1", inception.SIZE)
    frozen = network.eval().requires_grad_(False)
    return Extractor(
        name="Inception",
        network=frozen,
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
    """Return an extractor: lite0, i3d or inception, or one of these with =PATH, of its weights. rule, size: its
    resize rule, by default its own. `ValueError` with what is missing."""
    kind, _, path = name.partition("=")
    extractor = EXTRACTORS[choose("the extractor", kind, EXTRACTORS)](Path(path) if path else None)
    resize = Resize(rule or extractor.resize.rule, size or extractor.resize.size)
    if isinstance(extractor.network, nn.Module) and device is not None:
        extractor.network.to(device)
    return replace(extractor, resize=resize)
