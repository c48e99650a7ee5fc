"""What `skipdit latents` is asked for."""

from dataclasses import dataclass
from typing import Literal, get_args

from skipdit.latents import DTYPES
from skipdit.options import check_numbers, check_positive
from skipdit.picture_files import check_side

Crop = Literal["adm", "center"]
OnBroken = Literal["refuse", "skip"]
StoredDType = Literal["float32", "float16"]

MAX_WORKERS = 256
# what may be another when an encoding goes on; batches are cut anew in every shard
FREE_TO_CHANGE = {"batch_size", "num_workers"}


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Which pictures or clips become latents, and how they are cut."""

    source: str
    """a folder with one subfolder per class, a .parquet file or a folder of them, a .tar file of webdataset or a folder
    of them, the name of a datasets set, emoji or emoji-clips"""
    vae: str
    """folder of an AutoencoderKL, AutoencoderKLTemporalDecoder or AutoencoderTiny, or of a pipeline with one"""
    image_size: int = 256
    """side in pixels that pictures and frames are cut to"""
    crop: Crop = "adm"
    """adm: the shorter side is halved, then resized, and the centre cut out, as is usual for ImageNet; center: the
    centre is cut out, then resized, as `skipdit train` does with pixels"""
    flip: bool = False
    """encode everything mirrored, too, which training with --flip needs"""
    num_frames: int | None = None
    """of each clip; None encodes pictures"""
    frame_interval: int = 1
    """every so many frames one is taken"""
    fps: float | None = None
    """take frames at so many per second first, by the time at which they show"""
    num_crops: int = 0
    """of each video so many clips are taken, from where chance falls; 0 takes its first frames"""
    text: bool = False
    """encode captions, too, which text-to-image and text-to-video need"""
    streaming: bool = False
    """read a datasets set, or .parquet files, as a stream: whatever its size, in the order in which it comes"""
    split: str = "train"
    """of a datasets set, or of .parquet files whose names tell it"""
    image_column: str = "image"
    """of a table: encoded pictures"""
    clip_column: str = "clip"
    """of a table: encoded videos"""
    label_column: str | None = "label"
    """of a table; of a stream it may be None: all is one class"""
    caption_column: str | None = None
    """of a table; None takes the class name"""
    on_broken: OnBroken = "refuse"
    """what cannot be read is an error, or is left out with a warning"""
    dtype: StoredDType = "float32"
    """of what is stored"""
    shard_size: int = 1024
    """pictures or clips per shard, which is written whole or not at all"""
    batch_size: int = 16
    """pictures or frames that are encoded at once"""
    num_workers: int = 4
    """threads that read and cut ahead"""
    seed: int = 0
    """of the places of num_crops"""

    def __post_init__(self) -> None:
        check_side(self.image_size)
        check_numbers(self)
        check_positive(self, "num_frames", "frame_interval", "shard_size", "batch_size")
        for name, allowed in (("crop", get_args(Crop)), ("on_broken", get_args(OnBroken)), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if self.num_crops < 0 or (self.num_crops and self.num_frames is None):
            raise ValueError(f"num_crops must be at least 0, and 0 where num_frames is None, got {self.num_crops}")
        if not 0 <= self.num_workers <= MAX_WORKERS:
            raise ValueError(f"num_workers must be between 0 and {MAX_WORKERS}, got {self.num_workers}")
