"""`skipdit eval`: what is compared, in which order, and what is written of it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from skipdit.data.arrays import has_array, read_statistics
from skipdit.environment import describe_environment, resolve_device
from skipdit.evaluation.config import EvalConfig
from skipdit.evaluation.items import Items, open_items
from skipdit.evaluation.measure import check_pairs, compare_items, measure_set, score_texts
from skipdit.files.output import OutputFolder
from skipdit.files.untrusted import printable
from skipdit.metrics.extractors import Extractor, open_extractor
from skipdit.metrics.lpips import load_lpips
from skipdit.metrics.paired import PairedScore
from skipdit.metrics.sets import Gaussian
from skipdit.metrics.statistics import MAX_FEATURES, Statistics, load_statistics, save_statistics
from skipdit.metrics.table import ALWAYS, METRICS, SET_METRICS, SetMetric
from skipdit.metrics.texts import load_clip
from skipdit.process_group import ProcessGroup, own_device
from skipdit.report import Report, listed, table
from skipdit.terminal import progress_bar

STORED = ".safetensors"
SHORT_NAMES = {"EffNetLite0": "lite0", "Inception": "inception", "I3D": "i3d"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of two sets."""

    name: str
    title: str
    """what it is called, with this extractor and resize rule"""
    value: float
    spread: float | None
    """standard deviation over subsets or parts"""
    floor: float | None
    """the same metric of two halves of the reference, or of the reference alone for a score; `None` where only means
    and covariances of it are known"""
    better: str
    digits: int

    def cells(self) -> dict[str, object]:
        """Return the row of a table."""
        spread = f" ± {self.spread:.{self.digits}f}" if self.spread is not None else ""
        floor = f"{self.floor:.{self.digits}f}" if self.floor is not None else "not known"
        return {
            "metric": self.title,
            "samples": f"{self.value:.{self.digits}f}{spread}",
            "real against real": floor,
            "better": self.better,
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found."""

    rows: list[Row] = field(default_factory=list)
    """set metrics"""
    pairs: Mapping[str, PairedScore] = field(default_factory=dict)
    """by metric, item by item"""
    samples: dict[str, Any] = field(default_factory=dict)
    """source, n and SHA-256"""
    reference: dict[str, Any] = field(default_factory=dict)
    """the same, and n of a half"""
    extractor: dict[str, str] = field(default_factory=dict)
    """name, SHA-256 of the weights, and resize rule"""

    def __getitem__(self, name: str) -> float:
        """Return a set metric by its name."""
        return next(row.value for row in self.rows if row.name == name)


def compare_statistics(
    samples: Statistics, reference: Statistics, extractor: Extractor, names: Sequence[str] = ()
) -> list[Row]:
    """Return the metrics that two sets have, by default all. `ValueError` where one that was asked for is missing."""
    rows = []
    for metric in SET_METRICS:
        if names and metric.name not in names:
            continue
        found = metric.function(samples, reference)
        if found is not None and math.isfinite(found.value):
            title = metric.called(extractor.name, is_standard=extractor.is_standard)
            floor, about = floor_of(metric, reference), {"better": metric.better, "digits": metric.digits}
            rows.append(
                Row(name=metric.name, title=title, value=found.value, spread=found.spread, floor=floor, **about)
            )
        elif names:
            raise ValueError(
                f"{metric.name} needs more items, or what {extractor.name} or the statistics lack: leave it out"
            )
    return rows


def floor_of(metric: SetMetric, reference: Statistics) -> float | None:
    """Return what a metric says of two halves of the reference, or of its own score."""
    if metric.name in reference.floors:
        return reference.floors[metric.name]
    if reference.scores and (alone := metric.function(replace(NOTHING, scores=reference.scores), NOTHING)):
        return alone.value
    found = metric.function(*reference.halves) if reference.halves else None
    return found.value if found is not None else None


NOTHING = Statistics(num=0)


# ----------------------------------------------------------------------------------------------------------------------
# The command


class Evaluator:
    """One call of `skipdit eval`, in one process."""

    def __init__(self, config: EvalConfig, group: ProcessGroup) -> None:
        self.config, self.group = config, group
        self.device = own_device(resolve_device(config.device))

    def __call__(self, source: str, save_reference: Path | None = None) -> Evaluation:
        """Compare samples with the reference. save_reference: where its statistics are written, by the main process.

        Everything is opened, and refused, before anything is measured. `ValueError`, `OSError` in one line.
        """
        config = self.config
        samples = None if is_stored(source) else open_items(source, config)
        if not config.needs_reference:
            return self.score(samples, Evaluation())
        if config.reference is None:
            raise ValueError("give --reference: what the samples are compared with")
        if config.paired:
            found = self.compare_pairs(samples, open_items(config.reference, config))
        else:
            found = self.compare_sets(source, samples, config.reference, save_reference)
        return self.score(samples, found) if "clip" in config.metrics else found

    def compare_sets(
        self, source: str, samples: Items | None, reference: str, save_reference: Path | None
    ) -> Evaluation:
        """Compare two sets as wholes."""
        stored = {each: load_statistics(Path(each)) for each in (source, reference) if is_stored(each)}
        known = is_statistics(reference)
        real = None if reference in stored or known else open_items(reference, self.config)
        kinds = {each.is_clips for each in (samples, real) if each is not None}
        if len(kinds) > 1:
            raise ValueError("the samples and the reference must both be pictures or both be clips")
        extractor = self.extractor(samples or real, next(iter(stored.values()), None))
        for each in stored.values():
            if dict(each.identity) != extractor.identity:
                asked, found = (", ".join(pairs.values()) for pairs in (extractor.identity, each.identity))
                raise ValueError(f"the statistics of {printable(each.source)} are of {found}, not of {asked}")
        made = stored[source] if samples is None else self.measure(samples, extractor, "samples")
        if known:
            right: Statistics | None = with_stored_moments(NOTHING, Path(reference), extractor)
        else:
            right = stored[reference] if real is None else self.measure(real, extractor, "reference")
            if right is not None and Path(reference).suffix == ".npz":
                right = with_stored_moments(right, Path(reference), extractor)

        def compare() -> Evaluation:
            assert made is not None
            assert right is not None
            names = [name for name in self.config.metrics if name != "clip"]
            rows = compare_statistics(made, right, extractor, names)
            if save_reference is not None:
                floors = {metric.name: floor_of(metric, right) for metric in SET_METRICS}
                save_statistics(
                    save_reference, right, {name: each for name, each in floors.items() if each is not None}
                )
            halves = {"num_half": right.floor_num}
            return Evaluation(
                rows=rows,
                samples=about(made),
                reference=about(right) | halves,
                extractor=extractor.identity,
            )

        return self.group.from_main(compare)

    def compare_pairs(self, samples: Items | None, reference: Items) -> Evaluation:
        """Compare two sets item by item."""
        if samples is None:
            raise ValueError("pairs need pictures or clips, not statistics")
        check_pairs(samples, reference)
        names = self.config.metrics or tuple(metric.name for metric in ALWAYS)
        metrics = [metric for metric in METRICS if metric.name in names]
        for metric in metrics:
            if metric.check is not None:
                metric.check()
        if "lpips" in names:
            metrics.append(load_lpips(self.config.lpips, self.device))
        scores = {}
        if metrics:
            size = self.config.batch_size or (1 if samples.is_clips else 32)
            num = min(self.config.num_samples or samples.num, samples.num)
            with self.shown("pairs", num) as advance:
                scores = compare_items(
                    samples, reference, metrics, self.group, self.device, num=num, batch_size=size, advance=advance
                )
        told = [{"source": each.source, "num": each.num} for each in (samples, reference)]
        return Evaluation(pairs=self.group.from_main(lambda: scores or {}), samples=told[0], reference=told[1])

    def score(self, samples: Items | None, found: Evaluation) -> Evaluation:
        """Add how well the samples fit their texts."""
        if samples is None or self.config.clip is None:
            raise ValueError("the metric clip needs samples with texts, not statistics")
        encoders = load_clip(self.config.clip, self.device)
        num = min(self.config.num_samples or samples.num, samples.num)
        size = self.config.batch_size or (2 if samples.is_clips else 32)
        with self.shown("texts", num) as advance:
            score = score_texts(samples, encoders, self.group, self.device, num=num, batch_size=size, advance=advance)
        pairs = self.group.from_main(lambda: {} if score is None else {f"CLIP score ({encoders.name})": score})
        return replace(found, pairs=dict(found.pairs) | pairs, samples=found.samples or {"source": samples.source})

    def measure(self, items: Items, extractor: Extractor, what: str) -> Statistics | None:
        num = min(self.config.num_samples or items.num, items.num)
        size, seed = self.config.batch_size, self.config.seed
        with self.shown(what, num) as advance:
            return measure_set(
                items, extractor, self.group, self.device, num=num, batch_size=size, seed=seed, advance=advance
            )

    def extractor(self, items: Items | None, stored: Statistics | None) -> Extractor:
        """Open what was asked for; by default what the statistics were measured with, or what fits the items."""
        name = self.config.extractor
        if name is None and stored is not None:
            name = SHORT_NAMES.get(stored.identity.get("extractor", ""))
        name = name or ("i3d" if items is not None and items.is_clips else "lite0")
        return open_extractor(name, rule=self.config.resize, size=self.config.size, device=self.device)

    @contextmanager
    def shown(self, what: str, total: int) -> Iterator[Callable[[int], object]]:
        with progress_bar(shown=self.group.is_main) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)


def is_stored(source: str) -> bool:
    return Path(source).suffix == STORED


def is_statistics(source: str) -> bool:
    """Return whether a file holds means and covariances but no pictures, as those of pytorch-fid."""
    path = Path(source)
    return path.suffix == ".npz" and has_array(path, "mu") and not has_array(path, "arr_0")


def with_stored_moments(measured: Statistics, path: Path, extractor: Extractor) -> Statistics:
    """Return a reference with the means and covariances that its .npz has, as the references of ADM do: of all pictures
    of the data, where `arr_0` is a part of them. They are Inception's, and no other extractor takes them."""
    if extractor.name != "Inception" or not extractor.is_standard:
        if measured is NOTHING:
            raise ValueError(f"{printable(path)} has means and covariances of Inception alone: --extractor inception")
        return measured
    found = {name: torch.from_numpy(array) for name, array in read_statistics(path).items()}
    # how many pictures they are of is not told
    gaussians = {
        name: Gaussian(found[mean], found[covariance], 0)
        for name, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s"))
        if mean in found
    }
    return replace(measured, **gaussians, source=printable(path))


def about(statistics: Statistics) -> dict[str, Any]:
    """Return what a report says of a set."""
    kept = 0 if statistics.features is None else len(statistics.features)
    return {
        "source": statistics.source,
        "num": statistics.num,
        "num_features_kept": kept,
        "num_moments": 0 if statistics.pooled is None else statistics.pooled.num,
        "sha256": statistics.digest,
    }


# ----------------------------------------------------------------------------------------------------------------------
# The report


def write_report(found: Evaluation, config: EvalConfig, out: OutputFolder) -> None:
    """Write `eval.json` and `eval.md`."""
    device = resolve_device(config.device)
    environment = describe_environment("cuda" if device.type == "cuda" else "cpu", config.seed)
    parts = []
    if found.rows:
        parts += ["## The sets as wholes", table([row.cells() for row in found.rows]), _explain(found)]
    if found.pairs:
        digits = {metric.name: (metric.title, metric.digits) for metric in METRICS} | {"lpips": ("LPIPS", 4)}
        shown = [(*digits.get(name, (name, 2)), score) for name, score in found.pairs.items()]
        cells = [{"metric": title, "mean ± sd": score.text(after), "n": score.num} for title, after, score in shown]
        parts += ["## Item by item", table(cells)]
        if found.reference:
            parts.append(f"Samples: {found.samples['source']}. Reference: {found.reference['source']}.")
    data = {
        "rows": [asdict(row) for row in found.rows],
        "pairs": found.pairs,
        "samples": found.samples,
        "reference": found.reference,
        "extractor": found.extractor,
    }
    Report(config=config, environment=environment, data=data, title="Evaluation", parts=parts).write(out, "eval")


def _explain(found: Evaluation) -> str:
    """Say what the figures were measured on, and what they may be compared with."""
    samples, reference = found.samples, found.reference
    extractor = f"{found.extractor['extractor']}, weights {found.extractor['weights_sha256'][:12] or 'given'}"
    kept = min(samples["num_features_kept"], reference["num_features_kept"])
    half = reference["num_half"]
    facts = {
        "samples": f"{samples['source']}, n = {samples['num']:,}, sha256 {samples['sha256'][:12]}",
        "reference": f"{reference['source']}, n = {reference['num']:,}, sha256 {reference['sha256'][:12]}"
        if reference["num"]
        else f"{reference['source']}, means and covariances alone",
        "real against real": f"two random halves of the reference, n = {half:,} each" if half else "not known",
        "extractor": f"{extractor}, resize rule {found.extractor['resize']}",
        "kernel distances and neighbors": f"of at most {MAX_FEATURES:,} items of each set, here {kept:,}",
    }
    if any(row.name == "is" for row in found.rows):
        facts["IS"] = "of the samples alone, and under real against real of the whole reference alone"
    if not reference["num_moments"]:
        facts["Fréchet distances"] = (
            "to the means and covariances in the reference's file, which does not say of how many items"
        )
    lines = [
        listed(facts),
        "Compare figures only with those of the same extractor, resize rule and n: Fréchet distances grow as n falls. "
        "A figure near that of real against real says that the sets cannot be told apart by this metric at this n.",
    ]
    return "\n\n".join(lines)
