"""The rule of `auto`: which steps are full, and how the others are predicted, learned from the bundled models.

`benchmarks/learn_auto.py` learns it; `benchmarks/calibration.md` shows how near it comes to what a calibration finds.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from skipdit.cache.predictor import Ahead, FittedPredictor
from skipdit.cache.schedule import Decision, Schedule

MANY, FEW = 0.6, 0.2  # shares of full steps at which `dense` and `sparse` apply; between them they are mixed
NOMINAL_STEPS = 50  # steps of the run that a speedup refers to if the timesteps of a run are unknown
NOMINAL_RUN = tuple(1000 * (1 - step / NOMINAL_STEPS) for step in range(NOMINAL_STEPS))
MANY_STEPS = 20  # a run of at least so many reaches its speedup; a shorter one comes close
COARSE = 55.0  # a run with a larger mean stride of timesteps has few steps, and is no part of a longer run
NOISY = 600.0  # above it, strides beyond COARSE are too long to extrapolate the model's output over
POWER = 1.5  # of the stride of timesteps, by which densities grow: shifted schedules end in long strides
ROUNDING = 2.0  # strides that differ by less are taken for even, as whole timesteps round them
TIMESTEPS = (0.0, 25.0, 50.0, 100.0, 200.0, 300.0, 450.0, 600.0, 750.0, 850.0, 925.0, 1000.0)


@dataclass(frozen=True)
class AutoPredictor(FittedPredictor):
    """Extrapolates over timesteps, in place of steps, as the strides of a shifted schedule differ by a factor of 10."""

    noisy: float = 0.0
    """Timestep above which strides beyond `COARSE` are too long to extrapolate over: the stored values are held."""

    def coefficients(self, order: int, ahead: Ahead) -> list[float]:
        if ahead.stride > COARSE and ahead.timestep > self.noisy:
            return [0.0] * order
        last, before = ahead.full[:2] if len(ahead.full) > 1 else (0.0, 0.0)
        if before > last:
            ahead = ahead._replace(distance=(last - ahead.timestep) / (before - last) * ahead.spacing)
        return super().coefficients(order, ahead)


@dataclass(frozen=True)
class AutoRule:
    """What was learned: numbers at each of `TIMESTEPS`."""

    dense: tuple[float, ...]
    """densities of full steps, up to a factor, where many steps are full"""
    sparse: tuple[float, ...]
    """those where few are"""
    factors: tuple[tuple[float, ...], ...]
    """of the first, the second, ... term of the prediction"""

    def predictor(self, *, of_output: bool) -> AutoPredictor:
        """Return the predictor of the model's output, or of what the middle units add, where units at the ends are
        fresh."""
        rows = tuple(zip(*self.factors, strict=True))
        return AutoPredictor(len(self.factors), TIMESTEPS[::-1], rows[::-1], noisy=NOISY if of_output else 0.0)


# learned with the first and the last unit fresh: the rule learned at the output was worse (benchmarks/calibration.md)
RULE = AutoRule(
    dense=(3.16, 0.44, 100.0, 0.53, 0.15, 0.22, 0.08, 0.28, 0.17, 1.9, 3.04, 8.29),
    sparse=(11.27, 0.44, 0.99, 0.12, 0.35, 0.07, 0.68, 0.12, 0.53, 0.39, 1.03, 100.0),
    factors=((1.54, 0.1, 0.31, 0.87, 1.31, 0.75, 1.03, 0.71, 0.65, 0.47, 0.58, 1.38),),
)


@dataclass(frozen=True, kw_only=True)
class AutoSchedule(Schedule):
    """Full steps are dense at the start, at the end, and where steps are long; they are sparse in the middle. A step is
    full once the densities of the steps since the last full one add up to 1."""

    speedup: float = 1.8
    """Cost of the uncached run divided by that of the cached run. If the timesteps are known, the densities are scaled
    so that a run of at least 20 steps reaches this, and a shorter one comes as close as possible; other runs reach
    about this."""
    reuse_cost: float = 0.0
    """Cost of a reuse step, as a share of a full one."""
    may_stay_full = True  # a short run, as in image-to-image, may have no step to spare
    holds_if_noisy = True

    def __post_init__(self) -> None:
        if not self.speedup >= 1:
            raise ValueError(f"the speedup must be at least 1, got {self.speedup:g}")

    def for_cost(self, reuse_cost: float) -> "AutoSchedule":
        most = NOMINAL_STEPS / (1 + reuse_cost * (NOMINAL_STEPS - 1))  # with a single full step
        if self.speedup > most:
            raise ValueError(
                f"a speedup of {self.speedup:g} is out of reach: a reuse step costs {reuse_cost:.2f} of a full one, so "
                f"at most {most:.1f} is possible"
            )
        return replace(self, reuse_cost=reuse_cost)

    def decisions(self, timesteps: Sequence[float], *, whole: bool = True) -> list[Decision]:
        if self.reuse_cost >= 1:
            return [None] * len(timesteps)
        is_known = whole and (len(timesteps) >= MANY_STEPS or is_coarse(timesteps))
        solved_for = tuple(timesteps) if is_known else NOMINAL_RUN
        weights = weights_of(timesteps) if whole else [1.0] * len(timesteps)
        return _by_density(timesteps, weights, densities(RULE, self.speedup, self.reuse_cost, solved_for))

    def __str__(self) -> str:
        return f"{self.speedup:g}"


def is_coarse(timesteps: Sequence[float]) -> bool:
    """Return true for a run of a few steps that are far apart."""
    return len(timesteps) > 1 and timesteps[0] - timesteps[-1] > COARSE * (len(timesteps) - 1)


@lru_cache
def densities(rule: AutoRule, speedup: float, reuse_cost: float, timesteps: tuple[float, ...]) -> tuple[float, ...]:
    """Return the densities at `TIMESTEPS` with which a run of these timesteps reaches this speedup."""
    target = max((len(timesteps) / speedup - reuse_cost * len(timesteps)) / (1 - reuse_cost), 1)
    if len(timesteps) < MANY_STEPS:
        target = max(round(target), 1)
    sparse = min(max((MANY - target / len(timesteps)) / (MANY - FEW), 0.0), 1.0)
    shape = [many ** (1 - sparse) * few**sparse for many, few in zip(rule.dense, rule.sparse, strict=True)]
    weights = weights_of(timesteps)
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        full = _by_density(timesteps, weights, tuple(middle * density for density in shape)).count(None)
        low, high = (middle, high) if full <= target + 1e-9 else (low, middle)
    return tuple(low * density for density in shape)


def weights_of(timesteps: Sequence[float]) -> list[float]:
    """Return the weight of each step, which is 1 for a step of mean length. A repeated timestep, as Heun's method has
    them, has the weight of its first call."""
    num_strides = sum(before != timestep for before, timestep in pairwise(timesteps))
    mean = (timesteps[0] - timesteps[-1]) / max(num_strides, 1)
    weights = [1.0]
    for before, timestep in pairwise(timesteps):
        stride = before - timestep
        if stride == 0:
            weights.append(weights[-1])
        elif abs(stride - mean) < ROUNDING or mean <= 0:
            weights.append(1.0)
        else:
            weights.append(max(stride / mean, 0.0) ** POWER)
    return weights


def _by_density(timesteps: Sequence[float], weights: Sequence[float], densities: tuple[float, ...]) -> list[Decision]:
    """Return the decisions: a step is full once the weighted densities of the steps since the last full one add up to
    1."""
    decisions: list[Decision] = []
    account = 0.0
    for timestep, weight in zip(timesteps, weights, strict=True):
        account += _interpolate(timestep, densities) * weight
        full = not decisions or account >= 1 - 1e-9
        decisions.append(None if full else 0)
        account = 0.0 if full else account
    return decisions


def _interpolate(timestep: float, densities: tuple[float, ...]) -> float:
    """Return the density at a timestep, linear between `TIMESTEPS`."""
    right = min(max(bisect_left(TIMESTEPS, timestep), 1), len(TIMESTEPS) - 1)
    low, high = TIMESTEPS[right - 1], TIMESTEPS[right]
    share = min(max((timestep - low) / (high - low), 0.0), 1.0)
    return densities[right - 1] * (1 - share) + densities[right] * share
