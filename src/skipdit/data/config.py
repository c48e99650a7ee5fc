"""Which pictures, clips or latents to train on; nothing heavy is imported."""

from dataclasses import dataclass

from skipdit.options import MAX_SIDE, OnBroken, check_above, check_fields, check_range


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures to train on, and at which size."""

    source: str = "emoji"
    """emoji (bundled), a folder with one subfolder per class, a .parquet file or a folder of them, a folder that
    `datasets` saved, or the name of a `datasets` set"""
    image_size: int = 64
    """side in pixels; other pictures are resized on the shorter side and cropped in the center"""
    image_column: str = "image"
    """column of the pictures in a parquet file or a `datasets` set"""
    label_column: str = "label"
    """column of the classes in a parquet file or a `datasets` set"""
    caption_column: str | None = None
    """column of the captions, each a text or a list of texts; None takes the class name"""
    split: str = "train"
    """split of a `datasets` set, or of parquet files whose names tell it"""

    def __post_init__(self) -> None:
        check_range(self, "image_size", most=MAX_SIDE)


@dataclass(frozen=True, kw_only=True)
class FrameChoice:
    """The frames to take from a video."""

    num_frames: int
    """how many"""
    interval: int = 1
    """take one frame in this many"""
    fps: float | None = None
    """first resample to this many frames per second, by the times of the frames; None takes each frame once, however
    long it is displayed"""

    def indices(self, start: int) -> range:
        """Return the indices of the frames from `start` on; `ValueError` if there are none."""
        if self.num_frames < 1 or self.interval < 1 or start < 0:
            raise ValueError(
                f"num_frames and frame_interval must be at least 1 and start at least 0, "
                f"got {self.num_frames}, {self.interval} and {start}"
            )
        return range(start, start + self.num_frames * self.interval, self.interval)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which clips to train on, and how frames are taken from them."""

    source: str = "emoji-clips"
    """emoji-clips (bundled), a folder with one subfolder per class, a .parquet file or a folder of them"""
    image_size: int = 64
    """side in pixels; other frames are resized on the shorter side and cropped in the center"""
    num_frames: int = 16
    """frames per clip"""
    frame_interval: int = 1
    """take one frame in this many"""
    fps: float | None = None
    """resample to this many frames per second first, by the times of the frames; None takes each frame once, so that
    clips of other frame rates move faster or slower. Folders of frames have no times: for them only the interval
    counts, with a warning"""
    clip_column: str = "clip"
    """column of the clips in a parquet file"""
    label_column: str = "label"
    """column of the classes in a parquet file"""
    caption_column: str | None = None
    """column of the captions in a parquet file, each a text or a list of texts; None takes the class name"""
    num_pictures: int = 0
    """single frames of other clips beside each clip, for joint image-video training"""
    on_broken: OnBroken = "refuse"
    """treat an unreadable or too short clip as an error (refuse), or leave it out with a warning (skip)"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, "image_size", most=MAX_SIDE)
        check_range(self, "num_frames", "frame_interval")
        check_range(self, "num_pictures", least=0)
        check_above(self, "fps")

    @property
    def frames(self) -> FrameChoice:
        """The frames of a clip."""
        return FrameChoice(num_frames=self.num_frames, interval=self.frame_interval, fps=self.fps)


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Which latents to train on, as `skipdit latents` wrote them."""

    source: str
    """folder of the latents"""
    num_channels: int | None = None
    """required channels of the latents; None accepts any"""
    sample_size: int | None = None
    """required side of the latents; None accepts any"""
    num_frames: int | None = None
    """required frames per clip; None accepts any"""
    num_classes: int | None = None
    """required number of classes; None accepts any"""
    num_pictures: int = 0
    """single frames of other clips beside each clip, for joint image-video training"""
    verify: bool = True
    """compare every file with its SHA-256 first"""

    def __post_init__(self) -> None:
        check_range(self, "num_channels", "sample_size", "num_frames", "num_classes")
        check_range(self, "num_pictures", least=0)
