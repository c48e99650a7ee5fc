"""The fields of a schedule.json, and the schedule and the predictor that they describe."""

from dataclasses import dataclass
from typing import Annotated, Any, get_args

import msgspec
import numpy as np

from skipdit.cache.error_table import TABLE_ORDERS, ErrorTable
from skipdit.cache.predictor import FittedPredictor, Predictor
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.models.long_skip import BranchKind
from skipdit.options import MAX_ORDER

MAX_SCHEDULE_STEPS = 1000  # per run; `skipdit sample --num-inference-steps` has the same limit
NUM_KINDS = len(get_args(BranchKind))
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_SCHEDULE_STEPS)]
Steps = Annotated[list[Count], msgspec.Meta(max_length=MAX_SCHEDULE_STEPS)]
Variants = Annotated[list[Count | None], msgspec.Meta(max_length=MAX_SCHEDULE_STEPS)]
Row = Annotated[list[float], msgspec.Meta(min_length=1, max_length=MAX_ORDER)]
Factors = Annotated[list[Row | None], msgspec.Meta(max_length=MAX_SCHEDULE_STEPS)]
MAX_NODES = 64
Triangle = Annotated[list[float], msgspec.Meta(max_length=MAX_NODES * (MAX_NODES + 1) // 2)]
Timesteps = Annotated[list[float], msgspec.Meta(max_length=MAX_SCHEDULE_STEPS)]


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """The model and the settings that a schedule was calibrated on."""

    model: str
    """Name of its class."""
    num_units: int
    weights: str
    """Fingerprint of its weights, see `skipdit.cache.fingerprint`."""
    scheduler: str
    """Name of the scheduler's class."""
    guidance_scale: float | None = None


class PartFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One of the `parts` of a schedule.json."""

    kinds: Annotated[list[BranchKind], msgspec.Meta(min_length=1, max_length=NUM_KINDS)]
    full_steps: Steps
    variants: Variants = []


class ErrorFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An `ErrorTable`, but for its timesteps."""

    nodes: Annotated[
        list[Annotated[int, msgspec.Meta(ge=1, le=MAX_SCHEDULE_STEPS)]], msgspec.Meta(max_length=MAX_NODES)
    ]
    """Rising from 1."""
    grams: Annotated[list[Triangle], msgspec.Meta(max_length=MAX_SCHEDULE_STEPS)]
    """The lower triangle of each matrix, row by row."""
    reuse_cost: float
    """Cost of a reuse step, in full steps."""


class ScheduleFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A schedule.json. The fields in which `skipdit calibrate` records its origin have no effect."""

    num_inference_steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_SCHEDULE_STEPS)]
    full_steps: Steps | None = None
    method: str = "skip"
    num_shallow_units: Count | Steps = 1
    order: Count = 0
    timesteps: Timesteps = []
    variants: Variants = []
    factors: Factors = []
    damping: float = 1.0
    errors: ErrorFields | None = None
    parts: Annotated[list[PartFields], msgspec.Meta(min_length=1, max_length=NUM_KINDS)] | None = None
    made_for: MadeFor | None = None
    seeds: list[int] = []
    num_samples: int | None = None
    compute_ratio: float | None = None
    predicted_psnr_db: float | None = None
    measured_psnr_db: float | None = None
    versions: dict[str, str] = {}


def table_of(fields: ScheduleFields) -> ErrorTable | None:
    """Return the errors that a schedule.json lists; `None` if it has none."""
    if fields.errors is None:
        return None
    if fields.order not in TABLE_ORDERS or not fields.factors or any(fields.variants):
        raise ValueError("errors need an order of 1 or 2, factors and a single variant")
    nodes, rows = tuple(fields.errors.nodes), fields.errors.grams
    if any(len(row) != len(nodes) * (len(nodes) + 1) // 2 for row in rows):
        raise ValueError(f"each of grams must be the triangle of a matrix of {len(nodes)} rows")
    grams = np.zeros((len(rows), len(nodes), len(nodes)))
    lower = np.tril_indices(len(nodes))
    grams[:, lower[0], lower[1]] = grams[:, lower[1], lower[0]] = np.array(rows).reshape(len(rows), len(lower[0]))
    values, vectors = np.linalg.eigh(grams)  # numbers were rounded: no error is negative
    grams = (vectors * np.maximum(values, 0)[:, None, :]) @ vectors.swapaxes(1, 2)
    return ErrorTable(timesteps=tuple(fields.timesteps), nodes=nodes, grams=grams, reuse_cost=fields.errors.reuse_cost)


def fields_of(table: ErrorTable) -> dict[str, Any]:
    """Return what a schedule.json lists of errors, to 5 digits."""
    lower = np.tril_indices(len(table.nodes))
    grams = [[float(f"{value:.4e}") for value in row] for row in table.grams[:, lower[0], lower[1]]]
    return {"nodes": table.nodes, "reuse_cost": round(table.reuse_cost, 6), "grams": grams}


def predictor_of(fields: ScheduleFields, kind: type[Predictor], table: ErrorTable | None) -> Predictor:
    """Return the predictor that a schedule.json describes. kind: that of its method. table: of its errors."""
    if not fields.factors:
        if fields.damping != 1:
            raise ValueError("damping needs factors")
        return kind(fields.order)
    if len(fields.factors) != len(fields.timesteps):
        raise ValueError(f"factors must be one entry per timestep, got {len(fields.factors)}")
    rows = {at: tuple(row) for at, row in zip(fields.timesteps, fields.factors, strict=True) if row is not None}
    return FittedPredictor(fields.order, tuple(rows), tuple(rows.values()), damping=fields.damping, table=table)


def single_of(fields: ScheduleFields, kind: type[Predictor]) -> tuple[ExplicitSchedule, Predictor]:
    """Return the schedule and the predictor of a schedule.json without parts. kind: the predictor of its method."""
    if fields.full_steps is None:
        raise ValueError("it needs full_steps, or parts")
    table = table_of(fields)
    return explicit_of(fields, fields.full_steps, fields.variants, table), predictor_of(fields, kind, table)


def explicit_of(
    fields: ScheduleFields, full_steps: list[int], variants: list[int | None], table: ErrorTable | None = None
) -> ExplicitSchedule:
    """Return the schedule of these full steps and variants, of a schedule.json or one of its parts. table: of its
    errors."""
    return ExplicitSchedule(
        full_steps=tuple(full_steps),
        num_inference_steps=fields.num_inference_steps,
        timesteps=tuple(fields.timesteps),
        variants=tuple(variants),
        table=table,
    )
