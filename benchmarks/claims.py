"""Puts the paper's claims about caches to the test on pairs of trained models: one plain, one with long skips.

    python benchmarks/claims.py images --plain runs/plain0 runs/plain1 --skip runs/skip0 runs/skip1 \\
        --reference cifar10_train.parquet --num-samples 5000 --out runs/claims --report benchmarks
    python benchmarks/claims.py video --plain runs/latte0 --skip runs/latte-skip0 \\
        --reference emoji-clips --num-samples 256 --out runs/claims --report benchmarks
    python benchmarks/claims.py compatibility ...
    python benchmarks/claims.py limits ...

A pair of pictures is trained, for example, by

    skipdit train stability --data.source cifar10_train.parquet --seed 0 --out runs/skip0
    skipdit train stability-plain --data.source cifar10_train.parquet --seed 0 --out runs/plain0

with a number of steps that is enough. Of several pairs, each comes from a seed of its own. Every setting samples the
same noise. Told are distances between the sets and the data (`skipdit eval`), fidelity to the uncached samples one by
one (of the first `--num-seeds`), FLOPs saved, and samples per second. A setting that a model refuses is a row with the
reason. The command goes on where it was stopped: a finished setting is not made again, and a set that was begun goes on
by blocks. `--report` writes the tables of all that `--out` holds, by itself or after measuring.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from skipdit.environment import describe_environment
from skipdit.evaluation.config import EvalConfig
from skipdit.evaluation.evaluate import Evaluation, Evaluator
from skipdit.files.output import output_folder, to_json
from skipdit.metrics.statistics import load_statistics
from skipdit.process_group import ProcessGroup
from skipdit.report import Report, listed, table
from skipdit.sampling.config import SampleConfig
from skipdit.sampling.sets import sample_set

RESULTS = "results.jsonl"
TARGETS = (1.3, 1.5, 2.0, 2.5, 3.0, 4.0)  # of compute, for the best row of each model


@dataclass(frozen=True)
class Setting:
    """How a set is sampled."""

    cache: str
    steps: int
    guidance: float
    scheduler: str | None = None

    @property
    def baseline(self) -> "Setting":
        """The uncached run that the samples are compared with one by one."""
        return replace(self, cache="none")

    def __str__(self) -> str:
        what = f"{self.steps} steps" if self.cache == "none" else f"{self.cache}, {self.steps} steps"
        return what + (f", {self.scheduler}" if self.scheduler else "") + f", guidance {self.guidance:g}"

    @property
    def folder(self) -> str:
        kept = (letter if letter.isalnum() or letter in ".-" else "_" for letter in str(self))
        return "".join(kept)


# ----------------------------------------------------------------------------------------------------------------------
# The experiments


@dataclass(frozen=True)
class Experiment:
    """What is asked. settings: of the number of steps and the guidance scale; the first is the uncached run."""

    question: str
    settings: Callable[[int, float], Iterator[Setting]]
    extractor: str = "lite0"


def fewer(steps: int, guidance: float) -> Iterator[Setting]:
    """The uncached run, and the rivals with fewer steps."""
    yield Setting("none", steps, guidance)
    for divisor in (1.3, 1.5, 2.0, 2.5, 3.0, 4.0):
        yield Setting("none", max(1, round(steps / divisor)), guidance)


def of_images(steps: int, guidance: float) -> Iterator[Setting]:
    """Every family of caches, from 1.3x to 4x."""
    yield from fewer(steps, guidance)
    for spec in (
        *("N2", "N3", "N4", "N6", "skip-taylor:N2-o1", "skip-taylor:N3-o1", "skip-taylor:N4-o1"),
        *("auto:1.5", "auto:2", "auto:2.5"),
        *("delta:N2", "delta:N3", "delta-taylor:N3-o1", "delta-dit:N2", "fora:N2", "fora:N3", "fora:N4"),
        *("taylorseer:N3-o1", "taylorseer:N4-o1", "faster-diffusion:N2", "faster-diffusion:N3", "pab:N4"),
        *("fbcache:0.1", "fbcache:0.2", "teacache:0.1", "teacache:0.2", "easycache:0.1"),
    ):
        yield Setting(spec, steps, guidance)


def of_video(steps: int, guidance: float) -> Iterator[Setting]:
    """The paper's own settings for class-to-video, and its rivals."""
    yield from fewer(steps, guidance)
    for interval in range(2, 7):
        yield Setting(f"N{interval}-900-50", steps, guidance)
    for spec in ("fora:N2", "fora:N3", "delta:N2", "delta:N3", "delta-dit:N2", "pab:N2", "pab:N4"):
        yield Setting(spec, steps, guidance)


def of_compatibility(steps: int, guidance: float) -> Iterator[Setting]:
    """The same caches on both models: those that need no long skips."""
    yield from fewer(steps, guidance)
    for spec in ("fora:N2", "fora:N3", "fora:N4", "faster-diffusion:N2", "faster-diffusion:N3", "faster-diffusion:N4"):
        yield Setting(spec, steps, guidance)


def of_limits(steps: int, guidance: float) -> Iterator[Setting]:
    """Few steps, a stochastic sampler, high guidance: each with and without a cache."""
    caches = ("none", "N2", "N3", "fora:N2", "fora:N3")
    for number in (steps, 20, 12, 8, 4):
        yield from (Setting(cache, number, guidance) for cache in caches)
    yield from (Setting(cache, steps, guidance, "ddpm") for cache in caches)
    for scale in (1.0, 4.0, 8.0):
        yield from (Setting(cache, steps, scale) for cache in caches)


EXPERIMENTS = {
    "images": Experiment(
        "Cached quality of pictures. The paper: of all models and caches, Skip-DiT with its own loses least.", of_images
    ),
    "video": Experiment(
        "Cached quality of clips. The paper: 1.56x to 2.4x, with little loss of FVD.", of_video, extractor="i3d"
    ),
    "compatibility": Experiment(
        "Other caches. The paper: under FORA and Faster Diffusion, Skip-DiT loses less than the plain model.",
        of_compatibility,
    ),
    "limits": Experiment("What caching cannot do: few steps, stochastic samplers, high guidance.", of_limits),
}


# ----------------------------------------------------------------------------------------------------------------------
# One setting


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one setting of one model gave. figures: set metrics by name. fidelity: means over samples, by metric."""

    experiment: str
    model: str
    """plain or skip"""
    pair: int
    """which pair, from 0 on"""
    setting: Setting
    num_samples: int
    refused: str | None = None
    compute_ratio: float | None = None
    """FLOPs of the uncached run that it is compared with over these"""
    samples_per_second: float | None = None
    figures: dict[str, float]
    floors: dict[str, float | None]
    titles: dict[str, str]
    fidelity: dict[str, float | None]

    @property
    def key(self) -> tuple[str, str, int, Setting, int]:
        return self.experiment, self.model, self.pair, self.setting, self.num_samples


class Bench:
    """The settings of one experiment on all models."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options, self.experiment = name, options, EXPERIMENTS[name]
        self.models = [
            (kind, pair, path)
            for pair, both in enumerate(zip(options.plain, options.skip, strict=True))
            for kind, path in zip(("plain", "skip"), both, strict=True)
        ]
        self.settings = list(dict.fromkeys(self.experiment.settings(options.steps, options.guidance)))
        self.settings = [each for each in self.settings if not options.only or each.cache in (*options.only, "none")]
        self.out: Path = options.out
        self.statistics = self.out / f"{self.experiment.extractor}-{options.size or 'full'}.safetensors"

    def run(self) -> list[Result]:
        """Measure what is missing; return all results of the experiment."""
        results = read_results(self.out)
        done = {each.key for each in results}
        jobs = [(*model, setting) for model in self.models for setting in self.settings]
        for number, (kind, pair, path, setting) in enumerate(jobs, start=1):
            if (self.name, kind, pair, setting, self.options.num_samples) in done:
                continue
            print(f"{number}/{len(jobs)} {kind} {pair}: {setting}", flush=True)
            result = self.measure(kind, pair, path, setting)
            append_line(self.out / RESULTS, json.dumps(json.loads(to_json(asdict(result)))))
            results.append(result)
        return results

    def measure(self, kind: str, pair: int, path: str, setting: Setting) -> Result:
        about: dict[str, Any] = {"experiment": self.name, "model": kind, "pair": pair, "setting": setting}
        nothing: dict[str, Any] = {"figures": {}, "floors": {}, "titles": {}, "fidelity": {}}
        about["num_samples"] = self.options.num_samples
        try:
            report = self.sample(kind, pair, path, setting)
        except ValueError as error:
            if setting.cache == "none" and setting.scheduler is None:
                raise
            return Result(**about, **nothing, refused=" ".join(str(error).split()))
        found = self.compare(self.folder(kind, pair, setting) / "samples.npz")
        return Result(
            **about,
            compute_ratio=report.compute_ratio * self.compared_with(setting).steps / setting.steps,
            samples_per_second=report.samples_per_second,
            figures={row.name: row.value for row in found.rows},
            floors={row.name: row.floor for row in found.rows},
            titles={row.name: row.title for row in found.rows},
            fidelity=self.fidelity(kind, pair, path, setting),
        )

    def folder(self, kind: str, pair: int, setting: Setting) -> Path:
        return self.out / "sets" / f"{kind}{pair}" / setting.folder

    def sample(self, kind: str, pair: int, path: str, setting: Setting) -> Any:
        """Make a set, or go on with it; its report."""
        return sample_set(
            SampleConfig(
                model=path,
                num_samples=self.options.num_samples,
                num_inference_steps=setting.steps,
                guidance_scale=setting.guidance,
                scheduler=setting.scheduler,
                cache=setting.cache,
                npz=True,
                batch_size=self.options.batch_size,
                seed=self.options.seed,
                device=self.options.device,
                out=self.folder(kind, pair, setting),
            )
        )

    def compare(self, samples: Path) -> Evaluation:
        """Compare a set with the data, whose statistics are kept."""
        is_there = self.statistics.is_file()
        if (
            is_there
            and (known := Path(load_statistics(self.statistics).source).name) != Path(self.options.reference).name
        ):
            raise SystemExit(f"claims.py: {self.out} holds results against {known}: give another --out")
        config = EvalConfig(
            reference=str(self.statistics if is_there else self.options.reference),
            extractor=self.experiment.extractor,
            size=self.options.size,
            image_size=self.options.image_size,
            device=self.options.device,
        )
        return Evaluator(config, ProcessGroup())(str(samples), None if is_there else self.statistics)

    def compared_with(self, setting: Setting) -> Setting:
        """Return the uncached run of the same sampler and guidance: of a cache with as many steps, of fewer steps with
        all."""
        if setting.cache == "none" and setting.scheduler is None:
            return replace(setting, steps=self.settings[0].steps)
        return setting.baseline

    def fidelity(self, kind: str, pair: int, path: str, setting: Setting) -> dict[str, float | None]:
        """PSNR and the like to the uncached samples of the same noise; of fewer steps, to those with all steps."""
        full = self.compared_with(setting)
        if full == setting:
            return {}
        self.sample(kind, pair, path, full)
        config = EvalConfig(
            reference=str(self.folder(kind, pair, full) / "samples.npz"),
            paired=True,
            metrics=("psnr", "ssim", "perceptual"),
            num_samples=min(self.options.num_seeds, self.options.num_samples),
            device=self.options.device,
        )
        found = Evaluator(config, ProcessGroup())(str(self.folder(kind, pair, setting) / "samples.npz"))
        return {name: score.finite_mean for name, score in found.pairs.items()}


def append_line(path: Path, line: str) -> None:
    """Add a line, below one that a kill has cut."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read() == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def read_results(out: Path) -> list[Result]:
    """Return what was measured; a line that a kill has cut is left out."""
    path = out / RESULTS
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.append(Result(**content | {"setting": Setting(**content["setting"])}))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The report


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation over pairs; the mean alone of one."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{fmean(known):.{digits}f}" + (f" ± {stdev(known):.{digits}f}" if len(known) > 1 else "")


def rows_of(results: Sequence[Result]) -> list[dict[str, object]]:
    """One row per model and setting, over pairs."""
    rows = []
    for kind, setting in dict.fromkeys((each.model, each.setting) for each in results):
        same = [each for each in results if (each.model, each.setting) == (kind, setting)]
        row: dict[str, object] = {"model": kind, "setting": str(setting), "pairs": len(same)}
        if (refused := next((each.refused for each in same if each.refused), None)) is not None:
            rows.append(row | dict.fromkeys(COLUMNS, "") | {"compute": f"refused: {refused}"})
            continue
        row["compute"] = spread([each.compute_ratio for each in same], 2) + "x"
        row["samples/s"] = spread([each.samples_per_second for each in same], 2)
        for name, digits in (("kd", 4), ("fd", 2), ("coverage", 3), ("recall", 3)):
            row[name.upper() if len(name) == 2 else name] = spread([each.figures.get(name) for each in same], digits)
        row["PSNR dB"] = spread([each.fidelity.get("psnr") for each in same], 2)
        row["SSIM"] = spread([each.fidelity.get("ssim") for each in same], 4)
        row["LPIPS-like"] = spread([each.fidelity.get("perceptual") for each in same], 4)
        rows.append(row)
    return rows


COLUMNS = ("compute", "samples/s", "KD", "FD", "coverage", "recall", "PSNR dB", "SSIM", "LPIPS-like")


def lost(results: Sequence[Result], name: str = "kd") -> list[dict[str, object]]:
    """What each cache costs each model in a set metric, pair by pair: the cached figure less the uncached one."""
    by_key = {(each.model, each.pair, each.setting): each for each in results if not each.refused}
    rows = []
    for setting in dict.fromkeys(each.setting for each in results if each.setting.cache != "none"):
        by_pair: dict[str, dict[int, float]] = {"plain": {}, "skip": {}}
        for (kind, pair, own), result in by_key.items():
            full = by_key.get((kind, pair, setting.baseline))
            if own == setting and full is not None:
                by_pair[kind][pair] = result.figures[name] - full.figures[name]
        both = sorted(by_pair["plain"].keys() & by_pair["skip"].keys())
        losses = {kind: [found[pair] for pair in both] for kind, found in by_pair.items()}
        if both:
            fewer_lost = sum(b < a for a, b in zip(losses["plain"], losses["skip"], strict=True))
            count = f"{fewer_lost} of {len(losses['plain'])}"
            cells = {f"{kind} loses": spread(values, 4) for kind, values in losses.items()}
            rows.append({"setting": str(setting), **cells, "long skips lose less in": count})
    return rows


def best(results: Sequence[Result], name: str = "kd") -> list[dict[str, object]]:
    """The lowest figure of each model that saves at least so much, whatever the cache, or with fewer steps."""
    rows = []
    for target in TARGETS:
        row: dict[str, object] = {"compute at least": f"{target:g}x"}
        for kind in ("plain", "skip"):
            for what, is_cached in (("fewer steps", False), ("best cache", True)):
                chosen: dict[str, list[float]] = {}
                for each in results:
                    fits = not each.refused and each.model == kind and (each.setting.cache != "none") == is_cached
                    if fits and (each.compute_ratio or 0) >= target - 0.02:
                        chosen.setdefault(str(each.setting), []).append(each.figures[name])
                found = min(chosen, key=lambda setting, c=chosen: fmean(c[setting]), default=None)
                shown = "" if found is None else f"{spread(chosen[found], 4)} ({found.partition(',')[0]})"
                row[f"{kind}, {what}"] = shown
        rows.append(row)
    return rows


def write_report(name: str, results: Sequence[Result], options: argparse.Namespace) -> None:
    """Write claims_{name}.md and .json."""
    chosen = [each for each in results if each.experiment == name and each.num_samples == options.num_samples]
    if not chosen:
        raise SystemExit(f"claims.py: {options.out} holds no results of {name} with {options.num_samples} samples")
    told = next(each for each in chosen if each.figures)
    floors = {each: value for each, value in told.floors.items() if value is not None}
    facts = {
        "models": f"{max(each.pair for each in chosen) + 1} pair(s), plain and with long skips, trained alike",
        "n": f"{options.num_samples:,} samples of each setting, fidelity over the first {options.num_seeds}",
        "distances": f"{told.titles['kd']}, {told.titles['fd']}; KD is unbiased, FD falls as n grows",
        "real against real": ", ".join(f"{each} {value:.4f}" for each, value in floors.items()),
        "compute": "FLOPs of the same model's uncached run over those of the row: of as many steps for a cache, of all "
        "for fewer steps",
        "spread": "± is the standard deviation over pairs",
    }
    parts = [EXPERIMENTS[name].question, listed(facts), table(rows_of(chosen))]
    if losses := lost(chosen):
        parts += ["## What each cache costs in KD", table(losses)]
    if name != "limits":
        parts += ["## The lowest KD for the FLOPs saved", table(best(chosen))]
    environment = describe_environment(options.device, options.seed)
    config = {key: value for key, value in vars(options).items() if key not in ("out", "report", "plain", "skip")}
    with output_folder(options.report, "bench") as out:
        report = Report(
            config=config,
            environment=environment,
            data={"rows": [asdict(each) for each in chosen]},
            title=f"The paper's claims: {name}",
            parts=parts,
        )
        report.write(out, f"claims_{name}")
    print(f"written: {options.report / f'claims_{name}.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--plain", nargs="+", default=[], help="plain models, one per pair: runs or pipelines")
    parser.add_argument("--skip", nargs="+", default=[], help="models with long skips, in the same order")
    parser.add_argument("--reference", default="emoji", help="the data, as skipdit eval takes it")
    parser.add_argument("--num-samples", type=int, default=5000, help="of each set")
    parser.add_argument("--num-seeds", type=int, default=64, help="samples whose fidelity is measured")
    parser.add_argument("--steps", type=int, default=50, help="of the uncached run and the cached ones")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of guidance; none at 1")
    parser.add_argument("--only", nargs="+", default=(), help="caches to measure; by default all of the experiment")
    parser.add_argument("--size", type=int, default=None, help="side that the extractor is given; by default its own")
    parser.add_argument("--image-size", type=int, default=None, help="side of the reference's pictures, if not theirs")
    parser.add_argument("--batch-size", type=int, default=None, help="samples at once")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="folder of sets and results")
    parser.add_argument("--report", type=Path, default=None, help="folder of the tables; none by default")
    options = parser.parse_args()
    if len(options.plain) != len(options.skip) or not (options.plain or options.report):
        parser.error("give as many --plain as --skip, or --report alone")
    options.out.mkdir(parents=True, exist_ok=True)
    results = Bench(options.experiment, options).run() if options.plain else read_results(options.out)
    if options.report is not None:
        write_report(options.experiment, results, options)


if __name__ == "__main__":
    main()
