"""What the benchmark of caches knows of its runs, batch by batch, and the file that keeps it of an unfinished one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from skipdit.benchmark.cache_methods import Counts, Runnable
from skipdit.benchmark.cache_report import Group, Row
from skipdit.files import OutputFolder, to_json
from skipdit.metrics.paired import PairedScore, psnr_db, ssim
from skipdit.metrics.perceptual import FeatureNetwork, perceptual_distance
from skipdit.tasks.task import Sampler
from skipdit.untrusted import parse_json, printable, read_json

MAX_DRAFT_BYTES = 2**28


@dataclass(frozen=True)
class Plan:
    """A row to be. scheduler: by name, `None` for that of the pipeline."""

    method: str
    setting: str
    group: Group
    sampler: Sampler
    num_steps: int
    scheduler: str | None = None
    cache: Runnable | None = None

    @property
    def baseline(self) -> tuple[int, str | None]:
        """The key of the run with all steps and without a cache that belongs to it."""
        return id(self.sampler), self.scheduler


@dataclass(frozen=True)
class Run:
    """Pictures or frames (n c h w) in [0, 1] on the CPU, the seconds they took, and what the cache did."""

    frames: Tensor
    seconds: float
    counts: Counts | None


@dataclass(frozen=True)
class Cost:
    """FLOPs of a run of one sample, the steps that it counted, and what one more of each kind adds: full, reuse.

    tells_reuse: whether the run had both kinds apart.
    """

    flops: int
    steps: tuple[int, int]
    slopes: tuple[float, float]
    tells_reuse: bool

    def at(self, full: float, reused: float) -> float | None:
        """FLOPs with other numbers of steps, as an adaptive cache decides otherwise in another batch; `None` where
        that cannot be told."""
        if reused != self.steps[1] and not self.tells_reuse:
            return None
        return self.flops + (full - self.steps[0]) * self.slopes[0] + (reused - self.steps[1]) * self.slopes[1]


TENSORS = ("psnr", "similarity", "distance", "own_psnr")
Number = float | Literal["nan", "inf", "-inf"]  # JSON has no words for the last three


class CountsFields(TypedDict):
    steps_full: int
    steps_reused: int
    bytes_held: int | None


class TallyFields(TypedDict):
    """A tally in a draft: of each batch, and of each of its pictures."""

    psnr: list[list[Number]]
    similarity: list[list[Number]]
    distance: list[list[Number]]
    own_psnr: list[list[Number]]
    speedups: list[float]
    counts: list[CountsFields]
    refused: str | None


class DraftFields(TypedDict):
    """of: the run that the draft belongs to. batches: how many are done."""

    of: dict[str, Any]
    batches: int
    tallies: list[TallyFields]


@dataclass
class Tally:
    """What is known of a plan, batch by batch. refused: why it cannot be."""

    cost: Cost | None = None
    speedups: list[float] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    psnr: list[Tensor] = field(default_factory=list)
    similarity: list[Tensor] = field(default_factory=list)
    distance: list[Tensor] = field(default_factory=list)
    own_psnr: list[Tensor] = field(default_factory=list)
    refused: str | None = None

    def to_fields(self) -> dict[str, Any]:
        """As JSON, without the cost, which is soon counted again."""
        tensors = {
            name: [[x if math.isfinite(x) else str(x) for x in part.tolist()] for part in getattr(self, name)]
            for name in TENSORS
        }
        return tensors | {"speedups": self.speedups, "counts": self.counts, "refused": self.refused}

    @classmethod
    def from_fields(cls, fields: TallyFields) -> "Tally":
        kept: dict[str, Any] = {name: [torch.tensor([*map(float, part)]) for part in fields[name]] for name in TENSORS}
        kept["counts"] = [Counts(**each) for each in fields["counts"]]
        return cls(speedups=fields["speedups"], refused=fields["refused"], **kept)

    def add(self, made: Run, reference: Run, own: Run | None, network: FeatureNetwork | None) -> None:
        """own: the run with all steps of the same second-order sampler."""
        self.speedups.append(reference.seconds / made.seconds)
        self.psnr.append(psnr_db(made.frames, reference.frames))
        self.similarity.append(ssim(made.frames, reference.frames))
        if network is not None:
            self.distance.append(perceptual_distance(made.frames, reference.frames, network))
        if own is not None:
            self.own_psnr.append(psnr_db(made.frames, own.frames))
        if made.counts is not None:
            self.counts.append(made.counts)

    def row(self, plan: Plan, own: Cost, reference: Cost) -> Row:
        """own, reference: what the plan's sampler costs uncached, and the one that it is compared with."""
        names = {"method": plan.method, "setting": plan.setting, "group": plan.group, "num_steps": plan.num_steps}
        if self.refused is not None:
            return Row(**names, refused=self.refused)
        steps, flops, held = (plan.num_steps, 0.0), own.at(plan.num_steps, 0), None
        if plan.cache is not None:
            assert self.cost is not None, f"{plan.setting} was not counted"
            steps, flops = None, float(self.cost.flops)
        if self.counts:
            steps = (mean(c.steps_full for c in self.counts), mean(c.steps_reused for c in self.counts))
            flops = self.cost and self.cost.at(*steps)
            held = max((c.bytes_held for c in self.counts if c.bytes_held is not None), default=None)
        return Row(
            **names,
            steps_full=steps and steps[0],
            steps_reused=steps and steps[1],
            bytes_held=held,
            speedups=tuple(self.speedups),
            flop_ratio=flops and reference.flops / flops,
            psnr=score(self.psnr),
            own_psnr=score(self.own_psnr),
            ssim=score(self.similarity),
            perceptual=score(self.distance),
        )


def score(parts: Sequence[Tensor]) -> PairedScore | None:
    return PairedScore.of(torch.cat(list(parts))) if parts else None


@dataclass(frozen=True)
class Draft:
    """What an unfinished benchmark has measured, in a file, a batch at a time. of: the run that it belongs to."""

    out: OutputFolder
    name: str
    of: Mapping[str, Any]

    def load(self, num_baselines: int, num_plans: int) -> tuple[int, list[Tally], list[Tally]] | None:
        """Return how many batches are done, and the tallies of baselines and plans; `None` at the start. `ValueError`
        where the file belongs to another run, or is damaged."""
        path = self.out.path / self.name
        if not path.exists():
            return None
        fields = read_json(path, DraftFields, max_bytes=MAX_DRAFT_BYTES)
        if fields["of"] != parse_json(to_json(self.of), dict[str, Any], self.name):
            raise ValueError(
                f"{printable(path)} is of a run with other settings or on another machine: remove it, or choose "
                "another --out"
            )
        tallies = [Tally.from_fields(each) for each in fields["tallies"]]
        if len(tallies) != num_baselines + num_plans or fields["batches"] < 0:
            raise ValueError(f"{printable(path)} is damaged: remove it")
        return fields["batches"], tallies[:num_baselines], tallies[num_baselines:]

    def save(self, batches: int, tallies: Sequence[Tally]) -> None:
        fields = {"of": self.of, "batches": batches, "tallies": [each.to_fields() for each in tallies]}
        self.out.write_text(self.name, to_json(fields))
