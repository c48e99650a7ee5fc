"""MagCache (arXiv 2506.09045): a schedule from a curve of magnitudes, which one full run of a model measures.

pipe = ...
magnitudes = measure_magnitudes(pipe, lambda: pipe("a cat", num_inference_steps=50))
schedule = MagnitudeSchedule(magnitudes=magnitudes, threshold=0.06)
skipdit.enable_cache(pipe, schedule.method())
Path("magcache.json").write_text(json.dumps(schedule.to_fields()))  # for any later run
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from skipdit.cache.compiled import Call
from skipdit.cache.enable import recorded
from skipdit.cache.methods import METHODS, CacheMethod
from skipdit.cache.schedule import Decision, Schedule
from skipdit.cache.site import AllUnits
from skipdit.cache.steppers import CacheRule, MeasuringStepper, StepState
from skipdit.interfaces import Fields, ModelOutput
from skipdit.models.forward_plan import Stored, Values

NAME = next(name for name, row in METHODS.items() if row.site is not None and row.site(()) == AllUnits())


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """The change of magnitude, from step to step, of what all units of a model add."""

    ratios: tuple[float, ...]
    """For each step, the magnitude over that of the step before; 1 for the first."""
    timesteps: tuple[float, ...]
    """Noise levels of the steps, falling, from 1000 to 0."""

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < ratio < float("inf") for ratio in self.ratios):
            raise ValueError(f"ratios must be one or more positive numbers, got {list(self.ratios)}")
        falling = list(self.timesteps) == sorted(set(self.timesteps), reverse=True)
        if len(self.timesteps) != len(self.ratios) or not falling:
            raise ValueError(f"timesteps must be {len(self.ratios)} falling numbers, got {list(self.timesteps)}")


@dataclass(frozen=True, kw_only=True)
class MagnitudeSchedule(Schedule):
    """Reuse while the errors since the last full step add up to at most `threshold`: that of a step is the distance
    from 1 of the product of the ratios since then. A run of other steps than those measured takes at each step the
    ratios of the steps that it has passed since the one before."""

    magnitudes: Magnitudes
    threshold: float = 0.06
    """The sum of errors up to which a step reuses; 0 never reuses."""
    max_reused: int = 3
    """The largest number of reuse steps in a row (K in the paper)."""
    retention: float = 0.2
    """Share of the first steps that are full."""
    counts_own_steps = True

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"the threshold must be at least 0, got {self.threshold:g}")
        if self.max_reused < 1:
            raise ValueError(f"max_reused must be at least 1, else no step could reuse, got {self.max_reused}")
        if not 0 <= self.retention < 1:
            raise ValueError(f"retention must be at least 0 and below 1, got {self.retention:g}")

    @property
    def may_stay_full(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.threshold == 0

    def check(self, timesteps: Sequence[float]) -> None:
        if timesteps[-1] > timesteps[0]:
            raise ValueError("magnitudes were measured on falling timesteps, got a run in which they rise")

    def decisions(self, timesteps: Sequence[float], *, whole: bool = True) -> list[Decision]:
        curve, decisions = self.magnitudes, list[Decision]()
        num_retained = int(self.retention * len(curve.ratios) + 0.5)
        passed, product, error, num_reused = 0, 1.0, 0.0, 0
        for timestep in timesteps:
            before, passed = passed, sum(level >= timestep - 1e-3 for level in curve.timesteps)
            reuses = False
            if passed > num_retained:
                for ratio in curve.ratios[before:passed]:
                    product *= ratio
                error += abs(1 - product)
                reuses = bool(decisions) and 0 < self.threshold >= error and num_reused < self.max_reused
            decisions.append(0 if reuses else None)
            num_reused = num_reused + 1 if reuses else 0
            product, error = (product, error) if reuses else (1.0, 0.0)
        return decisions

    def method(self) -> CacheMethod:
        """Return the method that `skipdit.enable_cache` takes."""
        return CacheMethod(schedule=self, site=AllUnits())

    def to_fields(self) -> Fields:
        """Return the fields of a schedule.json with the same full steps, which other step counts map to theirs."""
        timesteps = self.magnitudes.timesteps
        full_steps = [step for step, decision in enumerate(self.decisions(timesteps)) if decision is None]
        return {
            "method": NAME,
            "full_steps": full_steps,
            "num_inference_steps": len(timesteps),
            "timesteps": list(timesteps),
        }

    def __str__(self) -> str:
        return f"{self.threshold:g}-r{self.max_reused}"


class MagnitudeSteps(MeasuringStepper):
    """Measures the magnitude of what the units add at each step."""

    def __init__(self, model: nn.Module, rules: list[CacheRule]) -> None:
        (self.region,) = rules[0].regions
        super().__init__(model, rules, rules[0].regions)
        self.before: WeakKeyDictionary[StepState, Values] = WeakKeyDictionary()
        # by noise level, the ratio of each stream
        self.ratios: dict[float, list[Tensor]] = {}

    def measure(self, call: Call, stream: StepState, output: ModelOutput, stored: Stored) -> ModelOutput:
        values = stored[self.region.name]
        ratio = magnitude_ratio(values, self.before.get(stream, values))
        self.ratios.setdefault(stream.levels[-1], []).append(ratio)
        self.before[stream] = values
        return output

    def magnitudes(self) -> Magnitudes:
        """Return the measured magnitudes, averaged over guidance streams."""
        ratios = {level: torch.stack(values).mean().item() for level, values in self.ratios.items()}
        levels = sorted(ratios, reverse=True)
        return Magnitudes(ratios=tuple(ratios[level] for level in levels), timesteps=tuple(levels))


def magnitude_ratio(values: Values, before: Values) -> Tensor:
    """Return the mean over tokens of the norm of what is added to one, over that norm at the step before."""
    ratios = [value.float().norm(dim=-1) / (before[key].float().norm(dim=-1) + 1e-8) for key, value in values.items()]
    return torch.cat([ratio.flatten() for ratio in ratios]).mean()


def measure_magnitudes(target: nn.Module | DiffusionPipeline, sample: Callable[[], object]) -> Magnitudes:
    """Measure the magnitudes of one full run: the mean over guidance streams.

    target: a model, or a pipeline with one transformer. sample: makes one run of it, with falling timesteps. Raises
    `ValueError` if skipdit does not know the units of the model, or if `sample` does not call it.
    """
    with recorded(target, AllUnits(), MagnitudeSteps) as (_, steps):
        sample()
    if not steps.ratios:
        raise ValueError(f"sample did not call the model of this {type(target).__name__}: nothing was measured")
    return steps.magnitudes()
