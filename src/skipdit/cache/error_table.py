"""What reuse was measured to do to a model at each timestep, and the schedules that follow for other runs.

A calibrated schedule.json keeps this table, so that it serves runs of more or fewer steps than its own too: the
schedule is planned anew, at the same compute, when such a run begins.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Float

RIDGE = 1e-2  # of the mean square of the terms: draws factors to 1, those of Taylor's expansion
NODES = (
    1,
    2,
    3,
    4,
    5,
    6,
    8,
    10,
    13,
    17,
    21,
    26,
    32,
)  # steps back at which changes are kept; between them they are interpolated
TABLE_ORDERS = (1, 2)  # of the predictions whose factors a table tells well
COHERENCE = 0.5  # how the errors of the steps between two full ones add up: between power (0) and amplitude (1)
FINEST = 4  # times as many steps as the calibrated run, beyond which none are planned: rests would outgrow MAX_LOOKBACK
MAX_LOOKBACK = 48  # steps of a run, between a reuse step and a full one


def fit_factors(products: Float[np.ndarray, "*many terms terms"]) -> Float[np.ndarray, "*many terms_but_first"]:
    """Return the factors of the terms of an expansion, but the first, for which its error is least.

    products: inner products of the errors that each term makes; their sum is the error of Taylor's expansion.
    """
    inner = products[..., 1:, 1:]
    size = inner.shape[-1]
    scale = np.maximum(np.trace(inner, axis1=-2, axis2=-1) / size, 1e-30)
    towards = products[..., 1:, :].sum(axis=-1)
    return 1 - np.linalg.solve(inner + RIDGE * scale[..., None, None] * np.eye(size), towards[..., None])[..., 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorTable:
    """What the values of earlier steps in place of those of a step do to the final sample. Schedules are planned
    by predictions of order 1, and any order has factors.

    grams: of each step of the calibrated run, the inner products of the changes of the final sample that the values of
        `nodes` steps before make, of shape (steps, nodes, nodes); where that is before the first step, those of the
        first. Changes of several steps back add up as the values of a linear prediction do.
    """

    timesteps: tuple[float, ...]
    """Of the calibrated run, falling."""
    nodes: tuple[int, ...]
    """Rising from 1."""
    grams: Float[np.ndarray, "steps nodes nodes"]
    reuse_cost: float
    """Of a reuse step, in full steps."""

    def __post_init__(self) -> None:
        count = len(self.timesteps)
        if count < 3 or list(self.timesteps) != sorted(set(self.timesteps), reverse=True):
            raise ValueError(f"timesteps of an error table must be 3 or more falling numbers, got {self.timesteps}")
        if self.nodes[:1] != (1,) or list(self.nodes) != sorted(set(self.nodes)) or len(self.nodes) < 3:
            raise ValueError(f"nodes of an error table must be 3 or more, rising from 1, got {self.nodes}")
        if self.grams.shape != (count, len(self.nodes), len(self.nodes)) or not np.isfinite(self.grams).all():
            raise ValueError(
                f"grams of an error table must be finite, of {count} steps and {len(self.nodes)} nodes, got shape "
                f"{self.grams.shape}"
            )
        if not 0 <= self.reuse_cost < 1:
            raise ValueError(f"reuse_cost must be at least 0 and below 1, got {self.reuse_cost:g}")

    # ------------------------------------------------------------------------------------------------------------------
    # Errors of single reuse steps

    def place(self, timestep: float) -> float:
        """Return how many steps of the calibrated run are before a timestep, with fractions; 0 above its first, and
        below its last as if it went on by the ratio of its last two."""
        levels, after = self.timesteps, bisect_left(self.timesteps, -timestep, key=lambda level: -level)
        if after == 0:
            return 0.0
        if after == len(levels):
            last = len(levels) - 1
            if timestep <= 0 or levels[-1] <= 0:
                return float(last)
            return last + min(math.log(levels[-1] / timestep) / math.log(levels[-2] / levels[-1]), 1.0)
        return after - (timestep - levels[after]) / (levels[after - 1] - levels[after])

    def weights(self, back: Float[np.ndarray, " many"]) -> Float[np.ndarray, "many nodes"]:
        """Return the weights of the nodes in the change that values from so many steps back make: cubic between the
        four nearest, of which one is the step itself, where there is no change."""
        nodes = np.array((0, *self.nodes), dtype=float)
        back = np.clip(back, 0, nodes[-1])
        first = np.clip(np.searchsorted(nodes, back, side="right") - 2, 0, len(nodes) - 4)
        found = np.zeros((len(back), len(nodes)))
        for one in range(4):
            at = nodes[first + one]
            factor = np.ones(len(back))
            for other in range(4):
                if other != one:
                    factor *= (back - nodes[first + other]) / (at - nodes[first + other])
            found[np.arange(len(back)), first + one] = factor
        return found[:, 1:]

    def terms(
        self, place: float, full: Sequence[Float[np.ndarray, " many"]], row: int
    ) -> Float[np.ndarray, "many terms nodes"]:
        """Return the weights of the nodes of a step in the terms of Taylor's expansion at `place`, which are made as
        `skipdit.cache.predictor` makes them. full: places of the last full steps, the last one first; two that are
        equal have no change."""
        derivatives: list[Float[np.ndarray, "many nodes"]] = []
        for index in reversed(range(len(full))):
            previous, derivatives = derivatives, [self.weights(np.minimum(place - full[index], row))]
            if previous:
                spacing = (full[index] - full[index + 1])[:, None]
                inverse = np.where(spacing > 0, 1 / np.where(spacing > 0, spacing, 1), 0)
                for before in previous:
                    derivatives.append((derivatives[-1] - before) * inverse)
        distance = (place - full[0])[:, None]
        return np.stack([distance**n / math.factorial(n) * value for n, value in enumerate(derivatives)], axis=1)

    def products(self, place: float, *full: Float[np.ndarray, " many"]) -> Float[np.ndarray, "many terms terms"]:
        """Return the inner products of what the terms of a prediction do: the last values, and what their changes add.
        full: as of `terms`."""
        # the third step is the first with the values of two steps before it, whose directions differ
        measured = min(max(place, 2.0), len(self.grams) - 1.0)
        low = math.floor(measured)
        mixed, size = np.zeros((len(full[0]), len(full), len(full))), np.zeros(len(full[0]))
        for row, share in ((low, 1 - (measured - low)), (low + 1, measured - low)):
            if share > 0:
                terms = self.terms(place, full, row)
                found = terms @ self.grams[row] @ terms.swapaxes(1, 2)
                trace = np.maximum(np.trace(found, axis1=1, axis2=2), 1e-30)
                mixed += share * found / trace[:, None, None]
                size += share * np.log(trace)  # sensitivity rises manyfold from step to step at the end
        return mixed * (np.exp(size) * self.growth ** min(max(2.0 - place, 0.0), 1.0))[:, None, None]

    @cached_property
    def growth(self) -> float:
        """How much more than at the third step a change by the values of the step before does at the second."""
        second, third = self.grams[1][0, 0], self.grams[2][0, 0]
        return float(second / third) if second > 0 and third > 0 else 1.0

    # ------------------------------------------------------------------------------------------------------------------
    # Runs

    @cached_property
    def strides(self) -> Float[np.ndarray, " steps"]:
        return -np.gradient(np.array(self.timesteps))

    def reuse_errors(self, timesteps: Sequence[float]) -> Float[np.ndarray, "steps lookback lookback"]:
        """Return the error of the final sample by reuse at each step of a run, where the last full step is `age` and
        the one before it `age + spacing` steps back, at [step, age - 1, spacing - 1]; infinite where that is not known.
        Only the first step has none before it: its own spacing counts as 1."""
        places = np.array([self.place(timestep) for timestep in timesteps])
        strides = -np.gradient(np.array(timesteps)) / np.interp(places, np.arange(len(self.strides)), self.strides)
        strides[-1] = max(strides[-1], 1.0)  # however short the last step is, what the model says there stays
        size = min(MAX_LOOKBACK, len(timesteps) - 1)
        found = np.full((len(timesteps), size, size), np.inf)
        for step in range(1, len(timesteps)):
            ages, spacings = np.meshgrid(np.arange(1, size + 1), np.arange(1, size + 1), indexing="ij")
            last, before = step - ages, step - ages - spacings
            alone = (last == 0) & (spacings == 1)
            known = (last >= 0) & ((before >= 0) | alone)
            before = np.where(alone, last, before)
            known &= places[step] - places[np.where(known, before, 0)] <= self.nodes[-1] + 1e-6
            if known.any():
                error = self.errors_at(places[step], places[last[known]], places[before[known]])
                found[step][known] = error * strides[step] ** 2
        return found

    def errors_at(
        self, place: float, last: Float[np.ndarray, " many"], before: Float[np.ndarray, " many"]
    ) -> Float[np.ndarray, " many"]:
        """Return the errors of predictions, as in `products`."""
        products = self.products(place, *self.widened(place, last, before))
        factors = np.concatenate([np.ones((len(products), 1)), fit_factors(products)], axis=1)
        return np.maximum(np.einsum("ni,nij,nj->n", factors, products, factors), 0)

    def widened(self, place: float, *full: Float[np.ndarray, " many"]) -> tuple[Float[np.ndarray, " many"], ...]:
        """Return the places of full steps, moved away from `place` in proportion where the last two are nearer than a
        step of the calibrated run. What is nearer was not measured, and is taken for no better: features are not
        smooth."""
        last, before = full[:2]
        widest = np.maximum(np.maximum(place - last, last - before), 1e-9)
        most = place / np.maximum(place - full[-1], 1e-9)  # as far as there are steps
        scale = np.where(last > before, np.maximum(np.minimum(1 / widest, most), 1.0), 1.0)
        return tuple(place - scale * (place - one) for one in full)

    def plan(self, timesteps: Sequence[float], speedup: float) -> tuple[int, ...] | None:
        """Return the full steps of least error for a run of these timesteps, so many of them that it is as near as can
        be to `speedup` times as fast as without a cache; `None` where none are known."""
        count = len(timesteps)
        if not 2 <= count <= FINEST * len(self.timesteps):
            return None
        num_full = round((count / speedup - self.reuse_cost * count) / (1 - self.reuse_cost))
        if not 1 <= num_full < count:
            return None
        return _plan(self, tuple(timesteps), num_full)


@lru_cache(maxsize=1024)
def factors_at(table: ErrorTable, timestep: float, *full: float) -> tuple[float, ...]:
    """Return the factors of the terms at a timestep, but the first. full: timesteps of the last full steps, two or
    more, the last one first."""
    place = table.place(timestep)
    places = table.widened(place, *(np.array([table.place(one)]) for one in full))
    return tuple(fit_factors(table.products(place, *places))[0].tolist())


@lru_cache(maxsize=32)
def _plan(table: ErrorTable, timesteps: tuple[float, ...], num_full: int) -> tuple[int, ...] | None:
    """Return the full steps of least error, so many of them, by dynamic programming on the last two of them."""
    errors = table.reuse_errors(timesteps)
    count, size = errors.shape[:2]
    # rest[last, spacing - 1, length]: the error of so many reuse steps after a full one
    rest = np.full((count, size, size + 1), np.inf)
    for last in range(count):
        longest = min(size, count - 1 - last)
        ages = np.arange(longest)
        parts = errors[last + 1 + ages, ages].T  # spacing, age
        power, amplitude = parts.cumsum(axis=1), np.sqrt(parts).cumsum(axis=1) ** 2
        rest[last, :, 0] = 0
        rest[last, :, 1 : longest + 1] = (1 - COHERENCE) * power + COHERENCE * amplitude
    # least[last, spacing - 1]: the error up to the full step `last`, after so many full steps
    least = np.full((count, size), np.inf)
    least[0, 0] = 0
    came_from = []
    for _ in range(num_full - 1):
        following = np.full((count, size), np.inf)
        origin = np.zeros((count, size), dtype=int)
        for gap in range(1, size + 1):
            reached = least[:-gap] + rest[:-gap, :, gap - 1]
            origin[gap:, gap - 1] = reached.argmin(axis=1)
            following[gap:, gap - 1] = reached.min(axis=1)
        came_from.append(origin)
        least = following
    lengths = count - 1 - np.arange(count)
    ends = np.where((lengths <= size)[:, None], least + rest[np.arange(count), :, np.minimum(lengths, size)], np.inf)
    last, spacing = np.unravel_index(int(ends.argmin()), ends.shape)
    if not np.isfinite(ends[last, spacing]):
        return None
    found = [int(last)]
    for origin in reversed(came_from):
        last, spacing = last - spacing - 1, origin[last, spacing]
        found.append(int(last))
    return tuple(reversed(found))
