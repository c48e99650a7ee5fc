"""The fields of a schedule.json, and the schedule and the predictor that they describe."""

from dataclasses import dataclass
from typing import Annotated, get_args

import msgspec

from skipdit.cache.predictor import MAX_ORDER, FittedPredictor, Predictor
from skipdit.cache.schedule import ExplicitSchedule
from skipdit.models.long_skip import BranchKind

MAX_SCHEDULE_STEPS = 1000  # per run; `skipdit sample --num-inference-steps` has the same limit
NUM_KINDS = len(get_args(BranchKind))
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_SCHEDULE_STEPS)]
Steps = Annotated[list[Count], msgspec.Meta(max_length=MAX_SCHEDULE_STEPS)]
Variants = Annotated[list[Count | None], msgspec.Meta(max_length=MAX_SCHEDULE_STEPS)]
Row = Annotated[list[float], msgspec.Meta(min_length=1, max_length=MAX_ORDER)]
Factors = Annotated[list[Row | None], msgspec.Meta(max_length=MAX_SCHEDULE_STEPS)]
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
    parts: Annotated[list[PartFields], msgspec.Meta(min_length=1, max_length=NUM_KINDS)] | None = None
    made_for: MadeFor | None = None
    seeds: list[int] = []
    num_samples: int | None = None
    compute_ratio: float | None = None
    predicted_psnr_db: float | None = None
    measured_psnr_db: float | None = None
    versions: dict[str, str] = {}


def predictor_of(fields: ScheduleFields, kind: type[Predictor]) -> Predictor:
    """Return the predictor that a schedule.json describes. kind: that of its method."""
    if not fields.factors:
        return kind(fields.order)
    if len(fields.factors) != len(fields.timesteps):
        raise ValueError(f"factors must be one entry per timestep, got {len(fields.factors)}")
    rows = {at: tuple(row) for at, row in zip(fields.timesteps, fields.factors, strict=True) if row is not None}
    return FittedPredictor(fields.order, tuple(rows), tuple(rows.values()))


def explicit_of(fields: ScheduleFields, full_steps: list[int], variants: list[int | None]) -> ExplicitSchedule:
    """Return the schedule of these full steps and variants, of a schedule.json or one of its parts."""
    return ExplicitSchedule(
        full_steps=tuple(full_steps),
        num_inference_steps=fields.num_inference_steps,
        timesteps=tuple(fields.timesteps),
        variants=tuple(variants),
    )
