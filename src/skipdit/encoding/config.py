"""Options of `skipdit latents`."""

from dataclasses import dataclass
from typing import Literal

from skipdit.options import MAX_SIDE, OnBroken, check_above, check_fields, check_range

Crop = Literal["adm", "center"]
StoredDType = Literal["float32", "float16"]

MAX_WORKERS = 256
# options that may change when an encoding is resumed, because every shard begins with a new batch
FREE_TO_CHANGE = {"batch_size", "num_workers", "on_broken"}


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Which pictures or clips to encode, and how."""

    source: str
    """a folder with one subfolder per class, a .parquet file or a folder of them, a .tar file of webdataset or a folder
    of them, the name of a datasets set, emoji or emoji-clips"""
    vae: str
    """folder of an AutoencoderKL, AutoencoderKLTemporalDecoder or AutoencoderTiny, or of a pipeline with one"""
    image_size: int = 256
    """side of the cropped pictures and frames, in pixels"""
    crop: Crop = "adm"
    """adm: halve, then resize the shorter side, and crop the center, as is usual for ImageNet; center: crop the center,
    then resize, as `skipdit train` does with pixels"""
    flip: bool = False
    """also encode everything mirrored, which training with --flip needs"""
    num_frames: int | None = None
    """frames per clip; None encodes pictures"""
    frame_interval: int = 1
    """take one frame in this many"""
    fps: float | None = None
    """resample to this many frames per second first, by the times of the frames; None takes each frame once"""
    num_crops: int = 0
    """clips per video, from random positions; 0 takes one clip of its first frames"""
    text: bool = False
    """also encode captions, which text-to-image and text-to-video need"""
    streaming: bool = False
    """read a datasets set or .parquet files as a stream: any size, in the given order"""
    split: str = "train"
    """split of a datasets set, or of .parquet files whose names show it"""
    image_column: str = "image"
    """column of encoded pictures in a table"""
    clip_column: str = "clip"
    """column of encoded videos in a table"""
    label_column: str | None = "label"
    """column of the classes in a table; for a stream, None makes everything one class"""
    caption_column: str | None = None
    """column of the captions in a table; None takes the class name"""
    on_broken: OnBroken = "refuse"
    """treat a sample that cannot be read as an error (refuse), or leave it out with a warning (skip)"""
    dtype: StoredDType = "float32"
    """data type of the stored latents and states"""
    shard_size: int = 1024
    """pictures or clips per shard, which is written whole or not at all"""
    batch_size: int = 16
    """pictures or frames encoded at a time"""
    num_workers: int = 4
    """threads that read and crop ahead"""
    seed: int = 0
    """seed of the random positions of num_crops"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, "image_size", most=MAX_SIDE)
        check_range(self, "num_frames", "frame_interval", "shard_size", "batch_size")
        check_range(self, "num_workers", least=0, most=MAX_WORKERS)
        check_above(self, "fps")
        if self.num_crops < 0 or (self.num_crops and self.num_frames is None):
            raise ValueError(f"num_crops must be at least 0, and 0 if num_frames is None, got {self.num_crops}")
