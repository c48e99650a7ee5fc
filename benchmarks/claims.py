"""Puts the paper's claims about caches to the test on pairs of trained models: one plain, one with long skips.

    python benchmarks/claims.py images compatibility limits --plain runs/plain0 runs/plain1 \\
        --skip runs/skip0 runs/skip1 --reference emoji --num-samples 5000 --out runs/claims --report benchmarks
    python benchmarks/claims.py video --plain runs/latte0 --skip runs/latte-skip0 \\
        --reference emoji-clips --num-samples 256 --out runs/claims --report benchmarks

A pair of pictures is trained, for example, by

    skipdit train stability --data.source cifar10_train.parquet --seed 0 --out runs/skip0
    skipdit train stability-plain --data.source cifar10_train.parquet --seed 0 --out runs/plain0

with a number of steps that is enough. Of several pairs, each comes from a seed of its own. Every setting samples the
same noise, drawn on the device. Told are distances between the sets and the data, fidelity to the uncached samples one
by one (of the first `--num-seeds`), FLOPs saved, and samples per second. A setting that a model refuses is a row with
the reason.

The settings come in order of interest, of several experiments in turn, those of a pair one after the other. The command
ends when `--max-seconds` are over, says what is left, and goes on where it stopped: a finished setting is not made
again, nor one that another experiment has measured. Processes with other `--pairs` may write into one `--out`.

`--report` writes the tables of all that `--out` holds, by itself, on any machine, or after measuring; of `--out` it
needs `results.jsonl` and `about.json`.
"""

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from claims_report import (
    ABOUT,
    EXPERIMENTS,
    KINDS,
    RESULTS,
    STOCHASTIC,
    Result,
    Setting,
    about_key,
    read_results,
    write_report,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from skipdit.diffusion import make_scheduler, objective_of
from skipdit.environment import describe_environment, resolve_device
from skipdit.evaluation.config import EvalConfig
from skipdit.evaluation.items import digest_items, join_digests, open_items
from skipdit.files.json_lines import append_line
from skipdit.interfaces import Pipeline
from skipdit.loading import Source, load_source
from skipdit.metrics.extractors import Extractor, open_extractor
from skipdit.metrics.i3d import LEAST_FRAMES
from skipdit.metrics.paired import PairedScore
from skipdit.metrics.perceptual import find_weights, load_feature_network, perceptual_distance
from skipdit.metrics.sets import DENSITY_NEIGHBOURS, Gaussian, frechet_distance, kernel_distance, neighbour_metrics
from skipdit.metrics.table import ALWAYS, compare_pictures
from skipdit.runs import OwnCache, check_method, counts_of, scheduled, switched_on
from skipdit.sampling.blocks import Conditions, seed_of
from skipdit.sampling.config import SampleConfig

PERCEPTUAL_PICTURES = 256  # at once
NO_EXTRACTOR = "none"
DTYPES = ("float32", "tf32", "bfloat16")


# ----------------------------------------------------------------------------------------------------------------------
# Sets and their features


@contextmanager
def sampled_by(pipeline: Pipeline, name: str | None) -> Iterator[None]:
    """Give a pipeline another scheduler inside the block. stochastic: DDPM's, or for a flow model the SDE version of
    its own DPM-Solver++ (arXiv 2211.01095, appendix)."""
    own: Any = pipeline.scheduler
    if name != STOCHASTIC:
        with scheduled(pipeline, name):
            yield
        return
    objective = objective_of(own)
    is_flow = objective.process == "flow"
    pipeline.scheduler = (
        type(own).from_config(own.config, algorithm_type="sde-dpmsolver++")
        if is_flow
        else make_scheduler(objective, "ddpm")
    )
    try:
        yield
    finally:
        pipeline.scheduler = own


@dataclass(frozen=True)
class Made:
    """A set. pixels: uint8 (n h w 3) or (n f h w 3), on the device."""

    pixels: Tensor
    num_broken: int
    seconds: float
    compute_ratio: float


@dataclass(frozen=True)
class Known:
    """The features of a set. mean, covariance and features on the device."""

    gaussian: Gaussian
    features: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Known":
        values = features.double()
        return cls(Gaussian(values.mean(dim=0), torch.cov(values.mT), len(values)), features)


def figures_of(samples: Known, reference: Known) -> dict[str, float]:
    """Return the set metrics that all rows have: those of `skipdit eval`, the kernel distance of whole sets."""
    near = neighbour_metrics(samples.features, reference.features)
    return {
        "fd": frechet_distance(samples.gaussian, reference.gaussian),
        "kd_full": kernel_distance(samples.features, reference.features),
        **asdict(near),
    }


TITLES = {"fd": ("FD", "FVD"), "kd_full": ("KD", "KVD")}


class Machine:
    """What all settings share: the device, the extractor, the features of the data."""

    def __init__(self, options: argparse.Namespace, extractor: str) -> None:
        self.options = options
        self.device = resolve_device(options.device)
        files = dict(each.split("=", 1) for each in options.weights)
        name, path = extractor, files.get(extractor)
        if options.dtype == "tf32":
            torch.set_float32_matmul_precision("high")
        self.extractor: Extractor | None = None
        if name != NO_EXTRACTOR:
            found = f"{name}={path}" if path else name
            self.extractor = open_extractor(found, size=options.size, device=self.device)
        self.perceptual: Any = None
        if path and name == "lite0":
            self.perceptual = cast(Any, self.extractor).network.trunk
        elif "lite0" in files:
            other = open_extractor(f"lite0={files['lite0']}", device=self.device)
            self.perceptual = cast(Any, other).network.trunk
        elif find_weights() is not None:
            self.perceptual = load_feature_network(self.device)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the features of pictures or clips. Clips that are too short for I3D show every frame as often as it
        takes."""
        assert self.extractor is not None
        size = self.options.extractor_batch_size or self.extractor.batch_size
        found = []
        for start in range(0, len(pixels), size):
            batch = pixels[start : start + size]
            if self.extractor.takes == "clips" and batch.shape[1] < LEAST_FRAMES:
                batch = batch.repeat_interleave(-(-LEAST_FRAMES // batch.shape[1]), dim=1)
            pooled = self.extractor(batch, self.device).pooled.to(self.device)
            found.append(pooled if len(pooled) == len(batch) else pooled.unflatten(0, (len(batch), -1)).mean(dim=1))
        return torch.cat(found)

    @torch.inference_mode()
    def fidelity(self, pixels: Tensor, full: Tensor) -> dict[str, float | None]:
        """Return PSNR, SSIM and the perceptual distance, means over pictures or frames."""
        both = [each.to(self.device).flatten(0, -4).movedim(-1, 1).float() / 255 for each in (pixels, full)]
        found = dict(compare_pictures(both[0], both[1], metrics=ALWAYS))
        if self.perceptual is not None:
            pairs = zip(*(each.split(PERCEPTUAL_PICTURES) for each in both), strict=True)
            found["perceptual"] = torch.cat([perceptual_distance(one, other, self.perceptual) for one, other in pairs])
        return {name: PairedScore.of(values.cpu()).finite_mean for name, values in found.items()}

    def read_reference(self, num_frames: int | None, stored: Path) -> tuple[Known, dict[str, Any]]:
        """Return the features of the data and what is known of them; kept in a file beside the results."""
        assert self.extractor is not None
        about = {
            "reference": self.options.reference,
            "num_frames": num_frames,
            "frame_interval": self.options.frame_interval if num_frames else None,
            **self.extractor.identity,
        }
        if stored.is_file():
            with safe_open(stored, framework="pt") as file:
                known = json.loads((file.metadata() or {})["about"])
                features = file.get_tensor("features")
            if {name: known.get(name) for name in about} == about:
                return Known.of(features.to(self.device)), known
        clips = {"num_frames": num_frames, "frame_interval": self.options.frame_interval} if num_frames else {}
        config = EvalConfig(reference=self.options.reference, image_size=self.options.image_size, **clips)
        items = open_items(self.options.reference, config)
        found, digests = [], []
        size = max(64, self.options.extractor_batch_size or 0)
        for start in range(0, items.num, size):
            batch = items.batch(range(start, min(start + size, items.num)))
            digests += digest_items(batch)
            found.append(self.features(torch.from_numpy(np.ascontiguousarray(batch))))
        features = torch.cat(found)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        halves = [Known.of(features[order[part].to(self.device)]) for part in (slice(0, None, 2), slice(1, None, 2))]
        known = about | {"num": items.num, "sha256": join_digests(digests), "floors": figures_of(*halves)}
        save_file({"features": features.cpu()}, stored, metadata={"about": json.dumps(known)})
        return Known.of(features), known


# ----------------------------------------------------------------------------------------------------------------------
# One setting


class Bench:
    """The settings of some experiments, all with one extractor, on all models."""

    def __init__(self, names: Sequence[str], options: argparse.Namespace) -> None:
        self.started = time.monotonic()
        self.names, self.options = names, options
        self.extractor = options.extractor or EXPERIMENTS[names[0]].extractor
        self.about = about_key(self.extractor, options.num_samples)
        self.paths: list[dict[str, str]] = [
            dict(zip(KINDS, both, strict=True)) for both in zip(options.plain, options.skip, strict=True)
        ]
        in_turn = zip_longest(*(EXPERIMENTS[name].settings(options.steps, options.guidance) for name in names))
        wanted = dict.fromkeys(each for settings in in_turn for each in settings if each is not None)
        self.settings = [each for each in wanted if not options.only or each.cache in options.only]
        self.settings = list(dict.fromkeys(each for one in self.settings for each in (one.baseline, one)))
        self.out: Path = options.out
        self.sources: dict[str, Source] = {}
        self.full: dict[tuple[str, Setting], Tensor] = {}
        self.machine = Machine(options, self.extractor)
        self.reference: Known | None = None

    @property
    def size(self) -> int:
        """The number of samples at once."""
        return min(self.options.batch_size, self.options.num_samples)

    def source(self, path: str) -> Source:
        """Return a model, opened once, after its first calls."""
        if path not in self.sources:
            dtype = "bfloat16" if self.options.dtype == "bfloat16" else "float32"
            source = load_source(path, device=str(self.machine.device), dtype=dtype)
            source.sampler.pipeline.set_progress_bar_config(disable=True)
            self.sources[path] = source
            if self.machine.device.type == "cuda":
                self.make(path, replace(self.settings[0], steps=2), self.size)
        return self.sources[path]

    def make(self, path: str, setting: Setting, num: int) -> Made:
        """Sample the first batches, up to `num` samples. Nothing is read from the device before all are made.
        `ValueError` where the model refuses the setting."""
        source = self.source(path)
        pipeline, method = source.sampler.pipeline, source.cache(setting.cache)
        config = SampleConfig(model=path, seed=self.options.seed)
        conditions = Conditions.of(source, config)
        batches, broken = [], []
        with sampled_by(pipeline, setting.scheduler):
            if method is not None:
                check_method(pipeline, method, setting.steps)
            with switched_on(pipeline, None if method is None else OwnCache(method)):
                wait_for(self.machine.device)
                started = time.perf_counter()
                for number, start in enumerate(range(0, num, self.size)):
                    indices = range(start, min(start + self.size, self.options.num_samples))
                    seed = seed_of(self.options.seed, number)
                    samples = source.sampler.sample(
                        [conditions.choices[conditions.choice_of(index)] for index in indices],
                        guidance_scale=setting.guidance,
                        num_inference_steps=setting.steps,
                        generator=torch.Generator(self.machine.device).manual_seed(seed),
                    )
                    broken.append((~samples.isfinite()).flatten(1).any(dim=1).sum())
                    levels = (samples.nan_to_num(0.0).movedim(-3, -1) * 255).round().clamp(0, 255)
                    batches.append(levels.to(torch.uint8))
                wait_for(self.machine.device)
                seconds = max(time.perf_counter() - started, 1e-9)
                ratio = 1.0 if method is None else counts_of(pipeline).compute_ratio or 1.0
        pixels = torch.cat(batches)
        return Made(pixels[:num], int(torch.stack(broken).sum()), seconds * num / len(pixels), ratio)

    def run(self) -> list[Result]:
        """Measure what is missing, in order, until the time is over; return all results."""
        results = read_results(self.out)
        done = {each.key for each in results}
        pairs = self.options.pairs or range(len(self.paths))
        groups = [(setting, pair) for setting in self.settings for pair in pairs]
        jobs = [
            [(kind, pair, each) for kind in KINDS if (self.about, kind, pair, each) not in done]
            for each, pair in groups
        ]
        jobs = [each for each in jobs if each]
        self.check_settings(self.asked())
        if not jobs:
            return results
        known: dict[str, Any] = {}
        if self.machine.extractor is not None:
            stored = self.out / f"{self.extractor}.safetensors"
            self.reference, known = self.machine.read_reference(self.num_frames(), stored)
        self.write_about(known)
        longest = 0.0
        for number, group in enumerate(jobs):
            before = time.monotonic()
            if self.options.max_seconds and before - self.started + longest > self.options.max_seconds:
                self.tell_left(jobs[number:])
                break
            for kind, pair, setting in group:
                print(f"{number + 1}/{len(jobs)} {kind} {pair}: {setting}", flush=True)
                result = self.measure(kind, pair, setting)
                append_line(self.out / RESULTS, result)
                results.append(result)
            longest = max(longest, time.monotonic() - before)
        return results

    def tell_left(self, jobs: Sequence[Sequence[tuple[str, int, Setting]]]) -> None:
        left = dict.fromkeys(str(setting) for group in jobs for _, _, setting in group)
        print(f"{self.options.max_seconds:g} seconds are over; left: {'; '.join(left)}. The same command goes on")

    def num_frames(self) -> int | None:
        """Return the number of frames of the clips that the models make."""
        config: Any = self.source(self.paths[0]["plain"]).sampler.pipeline.transformer.config
        return config.get("num_frames")

    def measure(self, kind: str, pair: int, setting: Setting) -> Result:
        number = self.options.num_samples
        about: dict[str, Any] = {"about": self.about, "model": kind, "pair": pair, "setting": setting}
        path = self.paths[pair][kind]
        try:
            made = self.make(path, setting, number)
        except ValueError as error:
            if setting.cache == "none" and setting.scheduler is None:
                raise
            reason = " ".join(str(error).split())
            return Result(**about, num_samples=number, refused=reason, figures={}, fidelity={})
        full = self.compared_with(setting)
        self.keep(kind, pair, setting, made.pixels)
        if full == setting:
            self.full[path, setting] = made.pixels[: self.options.num_seeds]
        return Result(
            **about,
            num_samples=number,
            compute_ratio=made.compute_ratio * full.steps / setting.steps,
            samples_per_second=number / made.seconds,
            num_broken=made.num_broken,
            figures=self.figures(made.pixels),
            fidelity={} if full == setting else self.fidelity(path, full, made.pixels),
        )

    def figures(self, pixels: Tensor) -> dict[str, float]:
        """Return the distances of a set to the data; nothing without an extractor."""
        if self.reference is None:
            return {}
        return figures_of(Known.of(self.machine.features(pixels)), self.reference)

    def compared_with(self, setting: Setting) -> Setting:
        """Return the uncached run of the same sampler and guidance: of a cache with as many steps, of fewer steps with
        all."""
        if setting.cache == "none" and setting.scheduler is None and setting.guidance == self.options.guidance:
            return replace(setting, steps=self.options.steps)
        return setting.baseline

    def fidelity(self, path: str, full: Setting, pixels: Tensor) -> dict[str, float | None]:
        """PSNR and the like to the uncached samples of the same noise; of fewer steps, to those with all steps."""
        number = min(self.options.num_seeds, self.options.num_samples)
        if (path, full) not in self.full:
            self.full[path, full] = self.make(path, full, number).pixels
        return self.machine.fidelity(pixels[:number], self.full[path, full])

    def keep(self, kind: str, pair: int, setting: Setting, pixels: Tensor) -> None:
        """Write the first samples of a set, if that is asked for."""
        if self.options.keep_samples:
            folder = self.out / "samples"
            folder.mkdir(exist_ok=True)
            kept = pixels[: self.options.keep_samples].cpu().numpy()
            np.savez_compressed(folder / f"{kind}{pair}-{setting.file}.npz", arr_0=kept)

    def asked(self) -> dict[str, Any]:
        """Return the settings that all rows of one entry of `about.json` share."""
        fixed = ("dtype", "device", "batch_size", "seed", "num_seeds", "size", "plain", "skip")
        return json.loads(json.dumps({name: getattr(self.options, name) for name in fixed}))

    def told(self) -> dict[str, Any]:
        """Return what `about.json` says of earlier calls."""
        path = self.out / ABOUT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def check_settings(self, asked: Mapping[str, Any]) -> None:
        """`SystemExit` where other settings made the rows that are there."""
        found = self.told().get(self.about, asked)
        if changed := [name for name, value in asked.items() if found.get(name) != value]:
            raise SystemExit(
                f"claims.py: {self.out} holds results of other settings ({', '.join(changed)}): give another --out"
            )

    def write_about(self, reference: Mapping[str, Any]) -> None:
        """Write what a report says of all rows. `SystemExit` where other settings made those that are there."""
        path, options, told = self.out / ABOUT, self.options, self.told()
        asked = self.asked() | {"reference": json.loads(json.dumps(dict(reference)))}
        self.check_settings(asked)
        found = told.get(self.about, asked)
        sizes = {kind: self.size_of(self.paths[0][kind]) for kind in KINDS}
        told[self.about] = asked | {
            "environment": describe_environment("cuda" if self.machine.device.type == "cuda" else "cpu", options.seed),
            "titles": self.titles(),
            "models": sizes,
            "trained": options.trained or found.get("trained", ""),
        }
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    def titles(self) -> dict[str, str]:
        """Return what the distances are called."""
        if (extractor := self.machine.extractor) is None:
            return {}
        is_standard = extractor.name == "I3D" and extractor.is_standard
        return {name: each if is_standard else f"{own}-{extractor.name}" for name, (own, each) in TITLES.items()}

    def size_of(self, path: str) -> str:
        """Describe a model in a few words."""
        model: Any = self.source(path).sampler.pipeline.transformer
        million = sum(each.numel() for each in model.parameters()) / 1e6
        return f"{model.config['num_layers']} blocks, {million:.2f}M parameters"


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS, help="several share what they have in common")
    parser.add_argument("--plain", nargs="+", default=[], help="plain models, one per pair: runs or pipelines")
    parser.add_argument("--skip", nargs="+", default=[], help="models with long skips, in the same order")
    parser.add_argument("--pairs", nargs="+", type=int, default=(), help="which to measure, from 0 on; by default all")
    parser.add_argument("--reference", default="emoji", help="the data, as skipdit eval takes it")
    parser.add_argument("--num-samples", type=int, default=5000, help="of each set")
    parser.add_argument("--num-seeds", type=int, default=64, help="samples whose fidelity is measured")
    parser.add_argument("--steps", type=int, default=50, help="of the uncached run and the cached ones")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of guidance; none at 1")
    parser.add_argument("--only", nargs="+", default=(), help="caches to measure, none for fewer steps; by default all")
    parser.add_argument("--max-seconds", type=float, default=0.0, help="stop before the setting that may exceed them")
    parser.add_argument(
        "--extractor",
        choices=("lite0", "i3d", NO_EXTRACTOR),
        default=None,
        help="features; by default i3d for clips; none: no distances of sets, fidelity alone",
    )
    parser.add_argument(
        "--weights", nargs="+", default=(), help="lite0=PATH, i3d=PATH: files in place of the packages'"
    )
    parser.add_argument("--size", type=int, default=None, help="side that the extractor is given; by default its own")
    parser.add_argument("--image-size", type=int, default=None, help="side of the reference's pictures, if not theirs")
    parser.add_argument("--frame-interval", type=int, default=2, help="of the reference's clips")
    parser.add_argument("--batch-size", type=int, default=50, help="samples at once")
    parser.add_argument("--extractor-batch-size", type=int, default=None, help="pictures or clips at once")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the models; tf32 has float32 weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--keep-samples", type=int, default=0, help="write this many of each set as .npz; none by default"
    )
    parser.add_argument("--trained", default="", help="how the models were trained, in words, for the report")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="folder of the results")
    parser.add_argument("--report", type=Path, default=None, help="folder of the tables; none by default")
    options = parser.parse_args(arguments)
    if len(options.plain) != len(options.skip) or not (options.plain or options.report):
        parser.error("give as many --plain as --skip, or --report alone")
    if wrong := [each for each in options.pairs if not 0 <= each < len(options.plain)]:
        parser.error(f"--pairs {wrong[0]}: --plain and --skip give {len(options.plain)} pairs, counted from 0 on")
    if options.num_samples <= DENSITY_NEIGHBOURS and options.extractor != NO_EXTRACTOR:
        parser.error(f"--num-samples must be above {DENSITY_NEIGHBOURS}: coverage looks at so many neighbors")
    if options.plain and len({options.extractor or EXPERIMENTS[name].extractor for name in options.experiments}) > 1:
        parser.error("pictures and clips are of other models: measure them one after the other")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    warnings.filterwarnings(
        "ignore", message="cache .* in a run of|cache .* has not reused"
    )  # that is what is measured
    options.out.mkdir(parents=True, exist_ok=True)
    results = Bench(options.experiments, options).run() if options.plain else read_results(options.out)
    for name in options.experiments if options.report is not None else ():
        write_report(name, results, options)


if __name__ == "__main__":
    main()
