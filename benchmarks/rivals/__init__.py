"""Caches of other libraries in our harness: diffusers' hooks and cache-dit, at the settings that are compared.

`skipdit bench cache` and `skipdit bench compile` find them here when skipdit is installed from this checkout
(`pip install -e ".[rivals]"`). In Python:

rivals_of = skipdit.benchmark.checkout.load_rivals().rivals_of
source = load_source("emoji")
for rival in rivals_of(source, num_inference_steps=50):
    pipeline = rival.sampler.pipeline
    rival.enable(pipeline)
    images = rival.sampler.sample(...)
    counts = rival.counts(pipeline)
    rival.disable(pipeline)  # outputs are bit-equal to before
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipdit.pipelines import ClassToImagePipeline
from skipdit.runs import Counts
from skipdit.tasks.class_to_image import TASK
from skipdit.tasks.task import Sampler

from .model import HookedDiT, as_diffusers
from .techniques import (
    CACHE_DIT,
    AttentionBroadcast,
    DualBlock,
    Faster,
    FirstBlock,
    Magnitude,
    TaylorSeer,
    Technique,
    VideoAttentionBroadcast,
    install_hint,
)

if TYPE_CHECKING:
    from skipdit.loading import Source

ALL_BUT_THE_START = (-1, 950)


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A technique of another library. source: where it comes from. settings: fast ones last. package: that it needs
    beside diffusers."""

    name: str
    source: str
    settings: tuple[Technique, ...]
    package: str | None = None

    @property
    def unavailable(self) -> str | None:
        """Why it cannot run here, in one line."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return install_hint(self.package)
        return None

    def enable(self, pipeline: Any, setting: Technique, num_inference_steps: int) -> None:
        """For runs of so many steps of a pipeline of `as_diffusers`. `ValueError` with the reason where it cannot run
        or would have no effect."""
        if self.unavailable is not None:
            raise ValueError(self.unavailable)
        setting.enable(pipeline, num_inference_steps)

    def disable(self, pipeline: Any, setting: Technique) -> None:
        """Also where it is not on."""
        setting.disable(pipeline)


# On our class-to-image DiT, about 1.3x to 3x; the attentions that the first reuses have too small a share for that.
RIVALS: dict[str, Rival] = {
    "pab": Rival(
        name="diffusers PAB",
        source="Pyramid Attention Broadcast, arXiv 2408.12588",
        settings=(
            AttentionBroadcast(skip_range=2, timesteps=ALL_BUT_THE_START),
            AttentionBroadcast(skip_range=4, timesteps=ALL_BUT_THE_START),
        ),
    ),
    "fbcache": Rival(
        name="diffusers FirstBlockCache",
        source="First Block Cache of ParaAttention, after TeaCache, arXiv 2411.19108",
        settings=tuple(FirstBlock(threshold=threshold) for threshold in (0.07, 0.15, 0.25)),
    ),
    "taylorseer": Rival(
        name="diffusers TaylorSeer",
        source="TaylorSeer, arXiv 2503.06923",
        settings=(
            *(TaylorSeer(interval=interval) for interval in (2, 3)),
            *(TaylorSeer(interval=interval, whole=True) for interval in (2, 3)),
        ),
    ),
    "magcache": Rival(
        name="diffusers MagCache",
        source="MagCache, github.com/Zehong-Ma/MagCache",
        settings=(
            Magnitude(threshold=0.03),
            Magnitude(threshold=0.12, max_skip_steps=4),
            Magnitude(threshold=0.24, max_skip_steps=5, retention_ratio=0.1),
        ),
    ),
    "fastercache": Rival(
        name="diffusers FasterCache",
        source="FasterCache, arXiv 2410.19355",
        settings=(Faster(), Faster(null_range=10)),
    ),
    "cache-dit": Rival(
        name="cache-dit",
        source="cache-dit 1.5, DBCache",
        package=CACHE_DIT,
        settings=(
            DualBlock(threshold=0.25),
            DualBlock(front=4, back=3, threshold=0.2),
            *(DualBlock(interval=interval, order=1) for interval in (2, 3)),
            *(DualBlock(front=2, back=1, interval=interval, order=1) for interval in (2, 3)),
        ),
    ),
}
# On the text-to-video Latte in diffusers' pipeline. First-block and magnitude caches take the spatial and the temporal
# blocks for one list and fail on it; TaylorSeer needs a context around calls, which that pipeline does not make.
VIDEO_RIVALS: dict[str, Rival] = {
    "pab": Rival(
        name="diffusers PAB",
        source="Pyramid Attention Broadcast, arXiv 2408.12588",
        settings=(
            VideoAttentionBroadcast(spatial=2, temporal=3, cross=6),
            VideoAttentionBroadcast(spatial=2, temporal=4, cross=6, timesteps=ALL_BUT_THE_START),
        ),
    )
}
RIVALS_OF_TASKS = {"class-to-image": RIVALS, "text-to-video": VIDEO_RIVALS}


@dataclass(frozen=True)
class RivalCache:
    """A rival at one setting, as the benchmark runs it; for runs of num_inference_steps."""

    rival: Rival
    technique: Technique
    sampler: Sampler
    num_inference_steps: int
    ours: bool = False

    @property
    def name(self) -> str:
        return self.rival.name

    @property
    def setting(self) -> str:
        return f"{self.rival.name.replace(' ', '-')}:{self.technique}"

    def enable(self, pipeline: Any) -> None:
        self.rival.enable(pipeline, self.technique, self.num_inference_steps)

    def disable(self, pipeline: Any) -> None:
        self.rival.disable(pipeline, self.technique)

    def counts(self, pipeline: Any) -> Counts | None:
        """A step counts as full if the attention in the middle block has run. `None` for a video."""
        model = pipeline.transformer
        if not isinstance(model, HookedDiT):
            return None
        return Counts(model.run.computed, model.run.calls - model.run.computed)


def rivals_of(source: "Source", num_inference_steps: int) -> list[RivalCache]:
    """All rivals of a loaded model, for runs of so many steps; of one that cannot run here its first setting alone,
    whose `enable` says why. None of a model that they are not set up for."""
    sampler = source.sampler
    rivals = RIVALS_OF_TASKS.get(sampler.task.name, {})
    if sampler.task is TASK:
        sampler = Sampler(TASK, as_diffusers(sampler.pipeline))
    return [
        RivalCache(rival, technique, sampler, num_inference_steps)
        for rival in rivals.values()
        for technique in rival.settings[: 1 if rival.unavailable else None]
    ]


# Settings for `skipdit bench compile`, which reuse in as few steps as its own: rows of `RIVALS`.
COMPILED: dict[str, tuple[str, Technique]] = {
    f"{RIVALS[name].name.replace(' ', '-')}:{technique}": (name, technique)
    for name, technique in (
        ("pab", AttentionBroadcast(skip_range=2, timesteps=ALL_BUT_THE_START)),
        ("fbcache", FirstBlock(threshold=0.25)),
        ("magcache", Magnitude(threshold=0.06)),
        ("taylorseer", TaylorSeer(interval=3)),
        ("fastercache", Faster()),
        ("cache-dit", DualBlock(threshold=0.25)),
        ("cache-dit", DualBlock(interval=3)),
    )
}


def compiled_rivals(
    pipeline: ClassToImagePipeline, settings: Sequence[str], num_inference_steps: int
) -> tuple[Sampler, list[RivalCache]]:
    """Return the pipeline in diffusers' blocks, and the rivals at these settings of `COMPILED`."""
    sampler = Sampler(TASK, as_diffusers(pipeline))
    chosen = [COMPILED[setting] for setting in settings]
    return sampler, [RivalCache(RIVALS[name], technique, sampler, num_inference_steps) for name, technique in chosen]
