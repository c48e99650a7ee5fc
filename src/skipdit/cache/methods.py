"""Every cache method is a choice of when x what x how; the ones with a name are rows of one table."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from skipdit.cache.predictor import TaylorPredictor
from skipdit.cache.schedule import ExplicitSchedule, IntervalSchedule
from skipdit.cache.site import BlockDelta, DeepFeatures


@dataclass(frozen=True)
class Published:
    """A named method: what it reuses, with which Taylor order by default (0 has no other), and where it is from."""

    site: type[DeepFeatures] | type[BlockDelta]
    order: int
    source: str


METHODS: dict[str, Published] = {
    "skip": Published(DeepFeatures, 0, "Skip-Cache, arXiv 2411.17616"),
    "skip-taylor": Published(DeepFeatures, 1, "Skip-Cache with TaylorSeer's prediction (arXiv 2503.06923)"),
    "delta-dit": Published(BlockDelta, 0, "Delta-DiT, arXiv 2406.01125, on the middle units; works without long skips"),
    "delta-taylor": Published(BlockDelta, 1, "Delta-DiT's offset with TaylorSeer's prediction"),
}

SPEC = re.compile(
    r"(?:(?P<name>[a-z-]+):)?N(?P<interval>\d+)(?:-(?P<start>\d+)-(?P<stop>\d+))?(?P<options>(?:-[ko]\d+)*)"
)
SPEC_FORM = (
    f"[{':|'.join(METHODS)}:]"
    "N{interval}[-{start}-{stop}][-k{shallow units}][-o{Taylor order}], for instance N2-700-50"
)


@dataclass(frozen=True, kw_only=True)
class CacheMethod:
    """When (`schedule`), what (`site`) and how (`predictor`)."""

    schedule: IntervalSchedule | ExplicitSchedule
    site: DeepFeatures | BlockDelta = field(default_factory=DeepFeatures)
    predictor: TaylorPredictor = field(default_factory=TaylorPredictor)

    def __str__(self) -> str:
        order = self.predictor.order
        name = next(n for n, row in METHODS.items() if row.site is type(self.site) and (row.order > 0) == (order > 0))
        prefix, suffix = "" if name == "skip" else f"{name}:", f"-o{order}" if order else ""
        return f"{prefix}{self.schedule}-k{self.site.num_shallow_units}{suffix}"


def parse_method(spec: "str | Path | CacheMethod") -> CacheMethod:
    """A method from a spec string, the path of a schedule (`.json`), or itself.

    `ValueError` on a spec that is not of the form, names an unknown method, or could never reuse; `FileNotFoundError`
    on a schedule that is not there.
    """
    if isinstance(spec, CacheMethod):
        return spec
    if str(spec).endswith(".json"):
        return load_schedule(Path(spec))
    match = SPEC.fullmatch(str(spec))
    if match is None:
        raise ValueError(f"a cache spec is {SPEC_FORM}, or the path of a schedule.json; got {str(spec)!r}")
    name = match["name"] or "skip"
    if name not in METHODS:
        raise ValueError(f"cache method must be one of {', '.join(METHODS)}, got {name!r}")
    options = re.findall(r"-([ko])(\d+)", match["options"])
    values = {letter: int(value) for letter, value in options}
    if len(values) < len(options):
        raise ValueError(f"each of -k and -o may be given once, got {str(spec)!r}")
    published = METHODS[name]
    if "o" in values and published.order == 0:
        raise ValueError(f"a Taylor order needs skip-taylor: or delta-taylor:, got {str(spec)!r}")
    window = (
        {} if match["start"] is None else {"start_timestep": int(match["start"]), "stop_timestep": int(match["stop"])}
    )
    return CacheMethod(
        schedule=IntervalSchedule(interval=int(match["interval"]), **window),
        site=published.site(values.get("k", 1)),
        predictor=TaylorPredictor(values.get("o", published.order)),
    )


def load_schedule(path: Path) -> CacheMethod:
    """An explicit schedule: `{"full_steps": [0, 2], "num_inference_steps": 4, "num_shallow_units": 1, "order": 1}`."""
    if not path.is_file():
        raise FileNotFoundError(f"no schedule at {path}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return CacheMethod(
            schedule=ExplicitSchedule(
                full_steps=tuple(int(step) for step in fields["full_steps"]),
                num_inference_steps=int(fields["num_inference_steps"]),
            ),
            site=DeepFeatures(int(fields.get("num_shallow_units", 1))),
            predictor=TaylorPredictor(int(fields.get("order", 0))),
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a schedule: it needs full_steps and num_inference_steps ({error!r})"
        ) from error
