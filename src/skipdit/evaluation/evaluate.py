"""`skipdit eval`: compares samples with a reference, as sets or one by one, and reports the metrics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from skipdit.data.arrays import has_array, read_statistics
from skipdit.environment import describe_environment, resolve_device
from skipdit.evaluation.config import EvalConfig
from skipdit.evaluation.items import Items, open_items
from skipdit.evaluation.measure import check_pairs, compare_items, measure_set, score_texts
from skipdit.files.output import OutputFolder
from skipdit.files.untrusted import printable
from skipdit.interfaces import Fields
from skipdit.metrics.extractors import Extractor, open_extractor
from skipdit.metrics.lpips import load_lpips
from skipdit.metrics.paired import PairedScore
from skipdit.metrics.sets import Gaussian
from skipdit.metrics.statistics import MAX_FEATURES, Statistics, load_statistics, save_statistics
from skipdit.metrics.table import ALWAYS, METRICS, SET_METRICS, SetMetric
from skipdit.metrics.texts import load_clip
from skipdit.process_group import ProcessGroup, own_device
from skipdit.report import Report, listed, table
from skipdit.terminal import counting

STORED = ".safetensors"
SHORT_NAMES = {"EffNetLite0": "lite0", "Inception": "inception", "I3D": "i3d"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The value of one metric of two sets."""

    name: str
    title: str
    """name of the metric with this extractor and resize rule"""
    value: float
    spread: float | None
    """standard deviation over subsets or parts"""
    floor: float | None
    """the same metric of two halves of the reference, or for a score that of the reference alone; `None` if only means
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
    """The results of `skipdit eval`."""

    rows: list[Row] = field(default_factory=list)
    """set metrics"""
    pairs: Mapping[str, PairedScore] = field(default_factory=dict)
    """metrics of items one by one, by name"""
    samples: Fields = field(default_factory=dict)
    """source, n and SHA-256"""
    reference: Fields = field(default_factory=dict)
    """source, n, SHA-256, and n of a half"""
    extractor: dict[str, str] = field(default_factory=dict)
    """name, SHA-256 of the weights, and resize rule"""

    def __getitem__(self, name: str) -> float:
        """Return the value of a set metric."""
        return next(row.value for row in self.rows if row.name == name)


def compare_statistics(
    samples: Statistics, reference: Statistics, extractor: Extractor, names: Sequence[str] = ()
) -> list[Row]:
    """Return the metrics with these names, by default all that are defined for the two sets. Raises `ValueError` if one
    of the names is not."""
    rows = []
    for metric in SET_METRICS:
        if names and metric.name not in names:
            continue
        figure = metric.function(samples, reference)
        if figure is not None and math.isfinite(figure.value):
            row = Row(
                name=metric.name,
                title=metric.called(extractor.name, is_standard=extractor.is_standard),
                value=figure.value,
                spread=figure.spread,
                floor=floor_of(metric, reference),
                better=metric.better,
                digits=metric.digits,
            )
            rows.append(row)
        elif names:
            raise ValueError(
                f"{metric.name} needs more items, or what {extractor.name} or the statistics lack: leave it out"
            )
    return rows


def floor_of(metric: SetMetric, reference: Statistics) -> float | None:
    """Return the metric of two halves of the reference, or for a score that of the reference alone; `None` if it is not
    known."""
    if metric.name in reference.floors:
        return reference.floors[metric.name]
    if reference.scores and (score := metric.function(replace(NOTHING, scores=reference.scores), NOTHING)):
        return score.value
    figure = metric.function(*reference.halves) if reference.halves else None
    return None if figure is None else figure.value


NOTHING = Statistics(num=0)


# ----------------------------------------------------------------------------------------------------------------------
# The command


class Evaluator:
    """One call of `skipdit eval`, in one process."""

    def __init__(self, config: EvalConfig, group: ProcessGroup) -> None:
        self.config, self.group = config, group
        self.device = own_device(resolve_device(config.device))

    def __call__(self, source: str, save_reference: Path | None = None) -> Evaluation:
        """Compare samples with the reference. save_reference: file to which the main process writes the statistics of
        the reference. Raises `ValueError` or `OSError`, with one line, before anything is measured."""
        config = self.config
        samples = None if is_stored(source) else open_items(source, config)
        if not config.needs_reference:
            return self.score(samples, Evaluation())
        if config.reference is None:
            raise ValueError("give --reference: what the samples are compared with")
        if config.paired:
            evaluation = self.compare_pairs(samples, open_items(config.reference, config))
        else:
            evaluation = self.compare_sets(source, samples, config.reference, save_reference)
        return self.score(samples, evaluation) if "clip" in config.metrics else evaluation

    def compare_sets(
        self, source: str, samples: Items | None, reference: str, save_reference: Path | None
    ) -> Evaluation:
        """Compare two sets as a whole."""
        stored = {name: load_statistics(Path(name)) for name in (source, reference) if is_stored(name)}
        has_items = reference not in stored and not is_statistics(reference)
        reference_items = open_items(reference, self.config) if has_items else None
        if samples and reference_items and samples.is_clips != reference_items.is_clips:
            raise ValueError("the samples and the reference must both be pictures or both be clips")
        extractor = self.extractor(samples or reference_items, next(iter(stored.values()), None))
        for statistics in stored.values():
            if dict(statistics.identity) != extractor.identity:
                needed, actual = (", ".join(pairs.values()) for pairs in (extractor.identity, statistics.identity))
                raise ValueError(f"the statistics of {printable(statistics.source)} are of {actual}, not of {needed}")
        first = stored[source] if samples is None else self.measure(samples, extractor, "samples")
        second = stored.get(reference, NOTHING)
        if reference_items is not None:
            second = self.measure(reference_items, extractor, "reference")
        if second is not None and Path(reference).suffix == ".npz":
            second = with_stored_moments(second, Path(reference), extractor)

        def compare() -> Evaluation:
            assert first is not None
            assert second is not None
            names = [name for name in self.config.metrics if name != "clip"]
            rows = compare_statistics(first, second, extractor, names)
            if save_reference is not None:
                floors = {metric.name: floor_of(metric, second) for metric in SET_METRICS}
                known = {name: floor for name, floor in floors.items() if floor is not None}
                save_statistics(save_reference, second, known)
            return Evaluation(
                rows=rows,
                samples=summary_of(first),
                reference=summary_of(second) | {"num_half": second.floor_num},
                extractor=extractor.identity,
            )

        return self.group.from_main(compare)

    def compare_pairs(self, samples: Items | None, reference: Items) -> Evaluation:
        """Compare two sets one item at a time."""
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
            with counting("pairs", num, shown=self.group.is_main) as advance:
                scores = compare_items(
                    samples, reference, metrics, self.group, self.device, num=num, batch_size=size, advance=advance
                )
        sources = [{"source": items.source, "num": items.num} for items in (samples, reference)]
        pairs = self.group.from_main(lambda: scores or {})
        return Evaluation(pairs=pairs, samples=sources[0], reference=sources[1])

    def score(self, samples: Items | None, evaluation: Evaluation) -> Evaluation:
        """Add the CLIP score of the samples and their texts."""
        if samples is None or self.config.clip is None:
            raise ValueError("the metric clip needs samples with texts, not statistics")
        encoders = load_clip(self.config.clip, self.device)
        num = min(self.config.num_samples or samples.num, samples.num)
        size = self.config.batch_size or (2 if samples.is_clips else 32)
        with counting("texts", num, shown=self.group.is_main) as advance:
            score = score_texts(samples, encoders, self.group, self.device, num=num, batch_size=size, advance=advance)
        pairs = self.group.from_main(lambda: {} if score is None else {f"CLIP score ({encoders.name})": score})
        source = evaluation.samples or {"source": samples.source}
        return replace(evaluation, pairs=dict(evaluation.pairs) | pairs, samples=source)

    def measure(self, items: Items, extractor: Extractor, label: str) -> Statistics | None:
        """Return the statistics of a set in the main process. label: of the progress bar."""
        num = min(self.config.num_samples or items.num, items.num)
        size, seed = self.config.batch_size, self.config.seed
        with counting(label, num, shown=self.group.is_main) as advance:
            return measure_set(
                items, extractor, self.group, self.device, num=num, batch_size=size, seed=seed, advance=advance
            )

    def extractor(self, items: Items | None, stored: Statistics | None) -> Extractor:
        """Open the extractor of the config; by default that of the stored statistics, or the usual one for the
        items."""
        name = self.config.extractor
        if name is None and stored is not None:
            name = SHORT_NAMES.get(stored.identity.get("extractor", ""))
        name = name or ("i3d" if items is not None and items.is_clips else "lite0")
        return open_extractor(name, rule=self.config.resize, size=self.config.size, device=self.device)


def is_stored(source: str) -> bool:
    """Return true for a file of statistics that --save-reference has written."""
    return Path(source).suffix == STORED


def is_statistics(source: str) -> bool:
    """Return true if a file holds means and covariances but no pictures, like those of pytorch-fid."""
    path = Path(source)
    return path.suffix == ".npz" and has_array(path, "mu") and not has_array(path, "arr_0")


def with_stored_moments(measured: Statistics, path: Path, extractor: Extractor) -> Statistics:
    """Return a reference with the means and covariances in its .npz file, if it has them: the references of ADM have
    those of the whole data set, of which `arr_0` is a part. They are valid only for Inception."""
    if extractor.name != "Inception" or not extractor.is_standard:
        if measured is NOTHING:
            raise ValueError(f"{printable(path)} has means and covariances of Inception alone: --extractor inception")
        return measured
    arrays = {name: torch.from_numpy(array) for name, array in read_statistics(path).items()}
    # the file does not say how many pictures were measured
    gaussians = {
        name: Gaussian(arrays[mean], arrays[covariance], 0)
        for name, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s"))
        if mean in arrays
    }
    return replace(measured, **gaussians, source=printable(path))


def summary_of(statistics: Statistics) -> Fields:
    """Return the summary of a set for the report."""
    return {
        "source": statistics.source,
        "num": statistics.num,
        "num_features_kept": 0 if statistics.features is None else len(statistics.features),
        "num_moments": 0 if statistics.pooled is None else statistics.pooled.num,
        "sha256": statistics.digest,
    }


# ----------------------------------------------------------------------------------------------------------------------
# The report


def write_report(evaluation: Evaluation, config: EvalConfig, out: OutputFolder) -> None:
    """Write `eval.json` and `eval.md`."""
    device = resolve_device(config.device)
    environment = describe_environment("cuda" if device.type == "cuda" else "cpu", config.seed)
    parts = []
    if evaluation.rows:
        parts += ["## The sets as wholes", table([row.cells() for row in evaluation.rows]), _explain(evaluation)]
    if evaluation.pairs:
        formats = {metric.name: (metric.title, metric.digits) for metric in METRICS} | {"lpips": ("LPIPS", 4)}
        cells = []
        for name, score in evaluation.pairs.items():
            title, digits = formats.get(name, (name, 2))
            cells.append({"metric": title, "mean ± sd": score.text(digits), "n": score.num})
        parts += ["## Item by item", table(cells)]
        if evaluation.reference:
            parts.append(f"Samples: {evaluation.samples['source']}. Reference: {evaluation.reference['source']}.")
    data = {
        "rows": [asdict(row) for row in evaluation.rows],
        "pairs": evaluation.pairs,
        "samples": evaluation.samples,
        "reference": evaluation.reference,
        "extractor": evaluation.extractor,
    }
    Report(config=config, environment=environment, data=data, title="Evaluation", parts=parts).write(out, "eval")


def _explain(evaluation: Evaluation) -> str:
    """Return a paragraph on the measured sets, and on the values with which the metrics may be compared."""
    samples, reference, network = evaluation.samples, evaluation.reference, evaluation.extractor
    extractor = f"{network['extractor']}, weights {network['weights_sha256'][:12] or 'given'}"
    kept = min(samples["num_features_kept"], reference["num_features_kept"])
    half = reference["num_half"]
    facts = {
        "samples": f"{samples['source']}, n = {samples['num']:,}, sha256 {samples['sha256'][:12]}",
        "reference": f"{reference['source']}, n = {reference['num']:,}, sha256 {reference['sha256'][:12]}"
        if reference["num"]
        else f"{reference['source']}, means and covariances alone",
        "real against real": f"two random halves of the reference, n = {half:,} each" if half else "not known",
        "extractor": f"{extractor}, resize rule {network['resize']}",
        "kernel distances and neighbors": f"of at most {MAX_FEATURES:,} items of each set, here {kept:,}",
    }
    if any(row.name == "is" for row in evaluation.rows):
        facts["IS"] = "of the samples alone, and under real against real of the whole reference alone"
    if not reference["num_moments"]:
        facts["Fréchet distances"] = (
            "to the means and covariances in the reference's file, which does not say of how many items"
        )
    return (
        f"{listed(facts)}\n\n"
        "Compare figures only with those of the same extractor, resize rule and n: Fréchet distances grow as n falls. "
        "A figure near that of real against real says that the sets cannot be told apart by this metric at this n."
    )
