"""What `claims.py` measures, what it finds, and the tables that are made of it."""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from skipdit.files.json_lines import read_lines
from skipdit.files.output import output_folder
from skipdit.report import Report, listed, table

RESULTS, ABOUT = "results.jsonl", "about.json"
TARGETS = (1.3, 1.5, 2.0, 2.5, 3.0, 4.0)  # of compute, for the best row of each model
STOCHASTIC = "stochastic"
KINDS = ("plain", "skip")


@dataclass(frozen=True)
class Setting:
    """How a set is sampled. scheduler: as `skipdit sample` names it, or stochastic."""

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
    def file(self) -> str:
        kept = (letter if letter.isalnum() or letter in ".-" else "_" for letter in str(self))
        return "".join(kept)


# ----------------------------------------------------------------------------------------------------------------------
# The experiments


@dataclass(frozen=True)
class Experiment:
    """What is asked. settings: of the number of steps and the guidance scale, in order of interest; the first is the
    uncached run."""

    question: str
    settings: Callable[[int, float], Iterator[Setting]]
    extractor: str = "lite0"


def in_order(specs: str, steps: int, guidance: float) -> Iterator[Setting]:
    """Yield the settings of specs, of which a number, as 2x, is that many times fewer steps."""
    for spec in specs.split():
        if spec.endswith("x"):
            yield Setting("none", max(1, round(steps / float(spec[:-1]))), guidance)
        else:
            yield Setting(spec, steps, guidance)


def of_images(steps: int, guidance: float) -> Iterator[Setting]:
    """Every family of caches, from 1.3x to 4x, and fewer steps."""
    specs = (
        "none N2 fora:N2 2x N3 fora:N3 auto:2 3x taylorseer:N3-o1 skip-taylor:N3-o1 1.5x auto:1.5 delta:N2 auto:2.5 "
        "N4 fora:N4 4x taylorseer:N4-o1 skip-taylor:N4-o1 delta:N3 faster-diffusion:N2 faster-diffusion:N3 "
        "skip-taylor:N2-o1 delta-taylor:N3-o1 1.3x 2.5x delta-dit:N2 pab:N4 N6 "
        "fbcache:0.1 fbcache:0.2 teacache:0.1 teacache:0.2 easycache:0.1"
    )
    yield from in_order(specs, steps, guidance)


def of_video(steps: int, guidance: float) -> Iterator[Setting]:
    """The paper's own settings for class-to-video, its rivals, and fewer steps."""
    specs = (
        "none N2-900-50 fora:N2 delta:N2-900-50 fora:N2-900-50 N3-900-50 fora:N3 2x 1.5x N4-900-50 delta:N2 auto:2 3x "
        "delta:N3 N5-900-50 N6-900-50 delta-dit:N2 pab:N2 pab:N4 2.5x 1.3x 4x"
    )
    yield from in_order(specs, steps, guidance)


def of_compatibility(steps: int, guidance: float) -> Iterator[Setting]:
    """The same caches on both models: those that need no long skips."""
    specs = "none fora:N2 fora:N3 faster-diffusion:N2 faster-diffusion:N3 fora:N4 faster-diffusion:N4 2x 3x 4x 1.5x"
    yield from in_order(specs, steps, guidance)


def of_limits(steps: int, guidance: float) -> Iterator[Setting]:
    """Few steps, a stochastic sampler, high guidance: each with and without caches."""
    caches = ("none", "N2", "fora:N2")
    yield from (Setting(cache, steps, guidance) for cache in caches)
    yield from (Setting(cache, 12, guidance) for cache in caches)
    yield from (Setting(cache, steps, guidance, STOCHASTIC) for cache in caches)
    for scale in (1.0, 4.0):
        yield from (Setting(cache, steps, scale) for cache in caches)
    for number in (8, 20, 4):
        yield from (Setting(cache, number, guidance) for cache in caches)
    yield from (Setting(cache, steps, 8.0) for cache in caches)
    yield from (Setting(cache, steps, guidance) for cache in ("N3", "fora:N3"))
    yield from (Setting(cache, steps, guidance, STOCHASTIC) for cache in ("N3", "fora:N3"))


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
# Results


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one setting of one model gave. figures: set metrics by name. fidelity: means over samples, by metric."""

    about: str
    """which entry of `about.json` it belongs to: extractor and number of samples"""
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
    num_broken: int = 0
    """samples that are not finite"""
    figures: Mapping[str, float]
    fidelity: Mapping[str, float | None]

    @property
    def key(self) -> tuple[str, str, int, Setting]:
        return self.about, self.model, self.pair, self.setting


def about_key(extractor: str, num_samples: int) -> str:
    return f"{extractor}-{num_samples}"


def read_results(out: Path) -> list[Result]:
    """Return what was measured; a line that a kill has cut is left out."""
    return [Result(**line | {"setting": Setting(**line["setting"])}) for line in read_lines(out / RESULTS)]


# ----------------------------------------------------------------------------------------------------------------------
# The report

COLUMNS = ("compute", "samples/s", "KD", "FD", "coverage", "recall", "PSNR dB", "SSIM", "LPIPS-like")


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation over pairs; the mean alone of one."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return ""
    return f"{fmean(known):.{digits}f}" + (f" ± {stdev(known):.{digits}f}" if len(known) > 1 else "")


def rows_of(results: Sequence[Result]) -> list[dict[str, object]]:
    """One row per model and setting, over pairs."""
    rows = []
    for kind, setting in dict.fromkeys((each.model, each.setting) for each in results):
        same = [each for each in results if (each.model, each.setting) == (kind, setting)]
        row: dict[str, object] = {"model": kind, "setting": str(setting), "pairs": len(same)}
        if any(each.refused for each in same):
            rows.append(row | dict.fromkeys(COLUMNS, "") | {"compute": "refused"})
            continue
        row["compute"] = spread([each.compute_ratio for each in same], 2) + "x"
        row["samples/s"] = spread([each.samples_per_second for each in same], 2)
        for title, name, digits in (("KD", "kd_full", 4), ("FD", "fd", 2), *((each, each, 3) for each in COLUMNS[4:6])):
            row[title] = spread([each.figures.get(name) for each in same], digits)
        row["PSNR dB"] = spread([each.fidelity.get("psnr") for each in same], 2)
        row["SSIM"] = spread([each.fidelity.get("ssim") for each in same], 4)
        row["LPIPS-like"] = spread([each.fidelity.get("perceptual") for each in same], 4)
        if broken := sum(each.num_broken for each in same):
            row["setting"] = f"{setting} ({broken} samples not finite)"
        rows.append(row)
    return rows


def lost(results: Sequence[Result], name: str = "kd_full") -> list[dict[str, object]]:
    """What each cache costs each model, pair by pair: the cached figure of a set metric less the uncached one, and the
    PSNR of both."""
    by_key = {(each.model, each.pair, each.setting): each for each in results if not each.refused}
    pairs = sorted({each.pair for each in results})
    rows = []
    for setting in dict.fromkeys(each.setting for each in results if each.setting.cache != "none"):
        wanted = {pair: [(kind, pair, one) for kind in KINDS for one in (setting, setting.baseline)] for pair in pairs}
        both = {pair: [by_key[key] for key in keys] for pair, keys in wanted.items() if by_key.keys() >= set(keys)}
        if not both:
            continue
        row: dict[str, object] = {"setting": str(setting)}
        plain, skip = ([quartet[place : place + 2] for quartet in both.values()] for place in (0, 2))
        if all(name in each.figures for quartet in both.values() for each in quartet):
            losses = [[cached.figures[name] - full.figures[name] for cached, full in found] for found in (plain, skip)]
            row |= {f"{kind} loses": spread(values, 4) for kind, values in zip(KINDS, losses, strict=True)}
            less = sum(of_skip < of_plain for of_plain, of_skip in zip(*losses, strict=True))
            row["long skips lose less in"] = f"{less} of {len(both)}"
        # of equal pictures there is no finite PSNR
        psnrs = [[cached.fidelity.get("psnr") or math.inf for cached, _ in found] for found in (plain, skip)]
        row |= {f"{kind} PSNR dB": spread(values, 2) for kind, values in zip(KINDS, psnrs, strict=True)}
        closer = sum(of_skip > of_plain for of_plain, of_skip in zip(*psnrs, strict=True))
        rows.append(row | {"long skips are closer in": f"{closer} of {len(both)}"})
    return rows


def best(results: Sequence[Result], name: str = "kd_full") -> list[dict[str, object]]:
    """The lowest figure of each model that saves at least so much, whatever the cache, or with fewer steps: of settings
    that save it in every pair, so that all columns are means over the same pairs."""
    pairs = {each.pair for each in results}
    rows = []
    for target in TARGETS:
        row: dict[str, object] = {"compute at least": f"{target:g}x"}
        for kind in KINDS:
            for what, is_cached in (("fewer steps", False), ("best cache", True)):
                chosen: dict[str, dict[int, float]] = {}
                for each in results:
                    fits = not each.refused and each.model == kind and (each.setting.cache != "none") == is_cached
                    if fits and (each.compute_ratio or 0) >= target - 0.02:
                        chosen.setdefault(str(each.setting), {})[each.pair] = each.figures[name]
                whole = {setting: list(values.values()) for setting, values in chosen.items() if values.keys() == pairs}
                found = min(whole, key=lambda setting, w=whole: fmean(w[setting]), default=None)
                shown = "" if found is None else f"{spread(whole[found], 4)} ({found.partition(',')[0]})"
                row[f"{kind}, {what}"] = shown
        rows.append(row)
    return rows


def about_reference(about: Mapping[str, Any]) -> dict[str, str]:
    """Say what sets are compared with, and by what; nothing where none were compared."""
    if not (reference := about["reference"]):
        return {"distances of sets": "none, as so few samples tell nothing of a set"}
    size = f"resized as {reference['resize']}"
    size += f", {reference['num_frames']} frames, repeated" if reference["num_frames"] else ""
    weights = reference["weights_sha256"][:12]
    return {
        "distances": f"{about['titles']['kd_full']} (unbiased, over the whole sets) and {about['titles']['fd']} (grows "
        f"as n falls), {size}, weights {weights}",
        "reference": f"{reference['reference']}, n = {reference['num']:,}, sha256 {reference['sha256'][:12]}",
        "real against real": ", ".join(f"{each} {value:.4f}" for each, value in reference["floors"].items()),
    }


def write_report(name: str, results: Sequence[Result], options: argparse.Namespace) -> None:
    """Write claims_{name}.md and .json. `SystemExit` where nothing was measured."""
    experiment = EXPERIMENTS[name]
    key, path = about_key(options.extractor or experiment.extractor, options.num_samples), options.out / ABOUT
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    wanted = list(dict.fromkeys(experiment.settings(options.steps, options.guidance)))
    found = {(each.model, each.pair, each.setting): each for each in results if each.about == key}
    pairs = sorted({pair for _, pair, _ in found})
    keys = [(kind, pair, setting) for setting in wanted for kind in KINDS for pair in pairs]
    chosen = [found[each] for each in keys if each in found]
    if not chosen or key not in told:
        raise SystemExit(f"claims.py: {options.out} holds no results of {name} as {key}, but of {', '.join(told)}")
    about = told[key]
    refused = dict.fromkeys(f"{each.model} {each.setting.cache}: {each.refused}" for each in chosen if each.refused)
    missing = dict.fromkeys(str(each[2]) for each in keys if each not in found)
    facts = {
        "models": f"{len(pairs)} pair(s) of seeds of their own, trained alike: "
        + ", ".join(f"{kind} {text}" for kind, text in about["models"].items())
        + (f"; {trained}" if (trained := options.trained or about["trained"]) else ""),
        "n": f"{options.num_samples:,} samples of each setting, fidelity over the first "
        f"{min(about['num_seeds'], options.num_samples)}; computed in {about['dtype']}",
        **about_reference(about),
        "compute": "FLOPs of the same model's uncached run over those of the row: of as many steps for a cache, of all "
        "for fewer steps",
        **({"spread": "± is the standard deviation over pairs"} if len(pairs) > 1 else {}),
        **({"refused": "; ".join(refused)} if refused else {}),
        "not measured": "; ".join(missing) or "nothing of what was planned",
    }
    parts = [experiment.question, listed(facts), table(rows_of(chosen))]
    if losses := lost(chosen):
        parts += ["## What each cache costs, and how close it stays", table(losses)]
    if name != "limits" and about["reference"]:
        parts += ["## The lowest KD for the FLOPs saved", table(best(chosen))]
    with output_folder(options.report, "bench") as out:
        report = Report(
            config={each: value for each, value in about.items() if each != "environment"},
            environment=about["environment"],
            data={"rows": [asdict(each) for each in chosen]},
            title=f"The paper's claims: {name}",
            parts=parts,
        )
        report.write(out, f"claims_{name}")
    print(f"written: {options.report / f'claims_{name}.md'}")
