"""Results of the benchmark of caches, batch by batch, and the draft file of an unfinished benchmark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Literal, TypedDict

import torch
from torch import Tensor

from skipdit.benchmark.cache_methods import Runnable
from skipdit.benchmark.cache_report import OWN_PSNR, Group, Row
from skipdit.files.output import OutputFolder, to_json
from skipdit.files.untrusted import parse_json, printable, read_json
from skipdit.interfaces import Fields
from skipdit.metrics.paired import psnr_db
from skipdit.metrics.table import Metric, compare_pictures, join_values
from skipdit.runs import Counts, Sampled
from skipdit.tasks.task import Sampler

MAX_DRAFT_BYTES = 2**28


@dataclass(frozen=True)
class Plan:
    """A run to measure, which becomes a row."""

    method: str
    setting: str
    group: Group
    sampler: Sampler
    num_inference_steps: int
    scheduler: str | None = None
    """name of a scheduler; `None` for that of the pipeline"""
    cache: Runnable | None = None

    @property
    def baseline(self) -> tuple[int, str | None]:
        """Return the key of the uncached run with all steps that it is compared with."""
        return id(self.sampler), self.scheduler


@dataclass(frozen=True)
class Cost:
    """FLOPs of a run of one sample."""

    flops: int
    steps: tuple[float, float]
    """number of full steps and of reuse steps"""
    slopes: tuple[float, float]
    """FLOPs of one more full step, and of one more reuse step"""
    tells_reuse: bool
    """true if the run had both kinds of steps, so that their FLOPs are known separately"""

    def at(self, full: float, reused: float) -> float | None:
        """Return the FLOPs with other numbers of steps, as an adaptive cache may decide differently in another batch;
        `None` if they are unknown."""
        if reused != self.steps[1] and not self.tells_reuse:
            return None
        return self.flops + (full - self.steps[0]) * self.slopes[0] + (reused - self.steps[1]) * self.slopes[1]


Number = float | Literal["nan", "inf", "-inf"]  # JSON has no numbers for the last three


class TallyFields(TypedDict):
    """A tally in a draft."""

    values: list[dict[str, list[Number]]]
    """for each batch, by metric, one number per picture"""
    speedups: list[float]
    counts: list[Counts]
    refused: str | None


class DraftFields(TypedDict):
    """The fields of a draft."""

    of: Fields
    """machine and settings of the benchmark"""
    batches: int
    """number of complete batches"""
    tallies: list[TallyFields]


@dataclass
class Tally:
    """The results of a plan, batch by batch."""

    cost: Cost | None = None
    speedups: list[float] = field(default_factory=list)
    """seconds of the uncached run divided by those of this run"""
    counts: list[Counts] = field(default_factory=list)
    values: list[dict[str, Tensor]] = field(default_factory=list)
    """by metric, one number per picture"""
    refused: str | None = None
    """why the model refuses the cache"""

    def to_fields(self) -> Fields:
        """Return the tally as JSON, without the cost, which is counted again."""
        values = [
            {name: [x if math.isfinite(x) else str(x) for x in tensor.tolist()] for name, tensor in batch.items()}
            for batch in self.values
        ]
        return {"values": values, "speedups": self.speedups, "counts": self.counts, "refused": self.refused}

    @classmethod
    def from_fields(cls, fields: TallyFields) -> "Tally":
        values = [
            {name: torch.tensor([*map(float, numbers)]) for name, numbers in batch.items()}
            for batch in fields["values"]
        ]
        return cls(speedups=fields["speedups"], counts=fields["counts"], values=values, refused=fields["refused"])

    def add(self, sampled: Sampled, reference: Sampled, own: Sampled | None, metrics: Sequence[Metric]) -> None:
        """Add the run of a batch. own: the run with all steps of the same second-order sampler."""
        self.speedups.append(reference.seconds / sampled.seconds)
        self.values.append(compare_pictures(sampled.frames, reference.frames, metrics))
        if own is not None:
            self.values[-1][OWN_PSNR] = psnr_db(sampled.frames, own.frames)
        if sampled.counts is not None:
            self.counts.append(sampled.counts)

    def row(self, plan: Plan, own: Cost, reference: Cost) -> Row:
        """Return the row of the report. own: cost of an uncached run with the plan's sampler. reference: cost of the
        run that the plan is compared with."""
        num_steps = plan.num_inference_steps
        row = Row(method=plan.method, setting=plan.setting, group=plan.group, num_steps=num_steps, refused=self.refused)
        if self.refused is not None:
            return row
        steps: tuple[float, float] | None = (num_steps, 0.0)
        flops, held = own.at(num_steps, 0), None
        if plan.cache is not None:
            assert self.cost is not None, f"{plan.setting} was not counted"
            steps, flops = None, float(self.cost.flops)
        if self.counts:
            steps = (mean(c.steps_full for c in self.counts), mean(c.steps_reused for c in self.counts))
            flops = self.cost and self.cost.at(*steps)
            held = max((c.bytes_held for c in self.counts if c.bytes_held is not None), default=None)
        return replace(
            row,
            steps_full=steps and steps[0],
            steps_reused=steps and steps[1],
            bytes_held=held,
            speedups=tuple(self.speedups),
            flop_ratio=flops and reference.flops / flops,
            scores=join_values(self.values),
        )


@dataclass(frozen=True)
class Draft:
    """The file with the results of an unfinished benchmark, which is written after each batch."""

    out: OutputFolder
    name: str
    """name of the file"""
    of: Fields
    """machine and settings of the benchmark"""

    def load(self, num_baselines: int, num_plans: int) -> tuple[int, list[Tally], list[Tally]] | None:
        """Return the number of complete batches, and the tallies of baselines and plans; `None` if there is no draft.
        Raises `ValueError` if the draft belongs to another benchmark, or is damaged."""
        path = self.out.path / self.name
        if not path.exists():
            return None
        fields = read_json(path, DraftFields, max_bytes=MAX_DRAFT_BYTES)
        if fields["of"] != parse_json(to_json(self.of).encode(), Fields, self.name):
            raise ValueError(
                f"{printable(path)} is of a run with other settings or on another machine: remove it, or choose "
                "another --out"
            )
        tallies = [Tally.from_fields(tally) for tally in fields["tallies"]]
        if len(tallies) != num_baselines + num_plans or fields["batches"] < 0:
            raise ValueError(f"{printable(path)} is damaged: remove it")
        return fields["batches"], tallies[:num_baselines], tallies[num_baselines:]

    def save(self, batches: int, tallies: Sequence[Tally]) -> None:
        fields = {"of": self.of, "batches": batches, "tallies": [tally.to_fields() for tally in tallies]}
        self.out.write_text(self.name, to_json(fields))
