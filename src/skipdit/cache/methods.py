"""Every cache method is a choice of when x what x how; those with a name are rows of one table."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import msgspec

from skipdit.cache.gates import ProbeSchedule, RateSchedule
from skipdit.cache.predictor import TaylorPredictor
from skipdit.cache.schedule import AutoSchedule, ExplicitSchedule, IntervalSchedule, Schedule
from skipdit.cache.site import BranchOutputs, DeepFeatures, Inner, Probe, Site, Stack, UnitRange
from skipdit.models.long_skip import BranchKind
from skipdit.untrusted import printable, read_json


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """What a calibrated schedule was measured on. weights: their `skipdit.cache.fingerprint`."""

    model: str
    num_units: int
    weights: str
    scheduler: str
    guidance_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class CacheMethod:
    """When (`schedule`), what (`site`) and how (`predictor`).

    probe: what an adaptive schedule looks at before it decides. others: further choices, for other parts of the model
    at the same time. made_for: what the schedule was calibrated on. spec: how it was written.
    """

    schedule: Schedule
    site: Site = field(default_factory=DeepFeatures)
    predictor: TaylorPredictor = field(default_factory=TaylorPredictor)
    probe: Probe | None = None
    others: tuple["CacheMethod", ...] = ()
    made_for: MadeFor | None = field(default=None, compare=False)
    spec: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.schedule.is_adaptive and self.others:
            raise ValueError(
                "an adaptive schedule decides for the whole step, so it cannot be combined with another choice"
            )
        if (self.probe is not None) != isinstance(self.schedule, ProbeSchedule):
            raise ValueError(
                f"a ProbeSchedule and a probe go together, got {type(self.schedule).__name__} and probe {self.probe}"
            )

    @property
    def parts(self) -> "tuple[CacheMethod, ...]":
        return (self, *self.others)

    @property
    def may_stay_full(self) -> bool:
        return all(part.schedule.may_stay_full for part in self.parts)

    def __str__(self) -> str:
        if self.spec:
            return self.spec
        order = self.predictor.order
        name = next((name for name, row in METHODS.items() if row.is_like(self)), type(self.site).__name__)
        prefix, suffix = "" if name == "skip" else f"{name}:", f"-o{order}" if order else ""
        return f"{prefix}{self.schedule}{''.join(f'-k{k}' for k in self.site.shallow_units)}{suffix}"


# ----------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a spec says after the name. shallow_units: the numbers given as -k."""

    schedule: IntervalSchedule
    shallow_units: tuple[int, ...] = ()
    order: int = 0

    @property
    def k(self) -> int:
        return self.shallow_units[0] if self.shallow_units else 1

    def part(
        self, site: Site, *, stretch: int = 1, start: float | None = None, stop: float | None = None
    ) -> CacheMethod:
        """Return a choice with `stretch` times the interval, and another window where one is given."""
        schedule = IntervalSchedule(
            interval=self.schedule.interval * stretch,
            start_timestep=self.schedule.start_timestep if start is None else start,
            stop_timestep=self.schedule.stop_timestep if stop is None else stop,
        )
        return CacheMethod(schedule=schedule, site=site, predictor=TaylorPredictor(self.order))


@dataclass(frozen=True, kw_only=True)
class Published:
    """A named method.

    source: where it is from, and how this differs. order: its default Taylor order; with 0 it takes no -o. parts: its
    choices, for an interval; adaptive: its choice, for a threshold; `None` where it has no such spec. site: what a
    schedule.json of this name reuses. takes_k: whether it takes -k.
    """

    source: str
    order: int = 0
    parts: Callable[[Options], tuple[CacheMethod, ...]] | None = None
    adaptive: Callable[[float], CacheMethod] | None = None
    site: Callable[[tuple[int, ...]], Site] | None = None
    takes_k: bool = True

    def is_like(self, method: CacheMethod) -> bool:
        """Whether a method of one part has this row's site and kind of predictor."""
        if self.site is None or method.others or method.probe is not None:
            return False
        here = self.site(method.site.shallow_units)
        return here == method.site and (self.order > 0) == (method.predictor.order > 0)

    @property
    def form(self) -> str:
        if self.parts is None:
            return "{threshold}" if self.adaptive else "json"
        order = "[-o{Taylor order}]" if self.order else ""
        k = "[-k{shallow units}]" if self.takes_k else ""
        return f"N{{interval}}[-{{start}}-{{stop}}]{k}{order}"


EVERY: tuple[BranchKind, ...] = ("attention", "temporal_attention", "cross_attention", "mlp")
ATTENTION: tuple[BranchKind, ...] = ("attention", "temporal_attention")
AUTO_ORDER = 2
NEVER_AGAIN = 10**6  # an interval that no run outlasts
FIRST_ADDED, FIRST_INPUT = Probe(), Probe(inputs=True)


def _deep(ks: tuple[int, ...]) -> Site:
    return DeepFeatures(*ks[:1], others=ks[1:])


def _offset(ks: tuple[int, ...]) -> Site:
    return UnitRange(ks[0]) if ks else UnitRange()


def _branches(ks: tuple[int, ...]) -> Site:
    return BranchOutputs(EVERY)


def _one(site: Callable[[tuple[int, ...]], Site]) -> Callable[[Options], tuple[CacheMethod, ...]]:
    return lambda options: (options.part(site(options.shallow_units[:1])),)


def _skip_branch(options: Options) -> tuple[CacheMethod, ...]:
    shallow = BranchOutputs((*ATTENTION, "cross_attention"), options.k)
    every_second = replace(options.schedule, interval=2)
    return (
        options.part(DeepFeatures(options.k)),
        CacheMethod(schedule=every_second, site=shallow, predictor=TaylorPredictor(options.order)),
    )


def _delta_dit(options: Options) -> tuple[CacheMethod, ...]:
    middle = 500.0
    return (
        options.part(UnitRange(options.k, at="first"), stop=max(middle, options.schedule.stop_timestep)),
        options.part(UnitRange(options.k, at="last"), start=min(middle, options.schedule.start_timestep)),
    )


def _pab(options: Options) -> tuple[CacheMethod, ...]:
    return (
        options.part(BranchOutputs(("attention",))),
        options.part(BranchOutputs(("temporal_attention",), optional=True), stretch=2),
        options.part(BranchOutputs(("cross_attention",), optional=True), stretch=3),
    )


def _tgate(options: Options) -> tuple[CacheMethod, ...]:
    gate = options.schedule.stop_timestep
    if gate == 0:
        raise ValueError("tgate needs the timestep of its gate: tgate:N{interval}-{start}-{gate}, as tgate:N5-900-600")
    held = IntervalSchedule(interval=NEVER_AGAIN, start_timestep=gate)
    cross = CacheMethod(schedule=held, site=BranchOutputs(("cross_attention",)))
    return (cross, options.part(BranchOutputs(ATTENTION)))


METHODS: dict[str, Published] = {
    "skip": Published(source="Skip-Cache, arXiv 2411.17616", parts=_one(_deep), site=_deep),
    "skip-taylor": Published(
        source="Skip-Cache with TaylorSeer's prediction (arXiv 2503.06923)", order=1, parts=_one(_deep), site=_deep
    ),
    "skip-branch": Published(
        source="Skip-Cache (arXiv 2411.17616); in the shallow units attention runs at every second step",
        parts=_skip_branch,
    ),
    "delta": Published(
        source="Delta-DiT's offset (arXiv 2406.01125), of the units in the middle at all steps",
        parts=_one(_offset),
        site=_offset,
    ),
    "delta-taylor": Published(
        source="Delta-DiT's offset (arXiv 2406.01125) of the units in the middle, with TaylorSeer's prediction",
        order=1,
        parts=_one(_offset),
        site=_offset,
    ),
    "delta-dit": Published(
        source="Delta-DiT, arXiv 2406.01125: of the last units down to timestep 500, of the first ones below",
        parts=_delta_dit,
    ),
    "faster-diffusion": Published(
        source="Faster Diffusion, arXiv 2312.09608: the first half of the units is reused; no noise is injected",
        parts=lambda options: (options.part(UnitRange(None, at="last", delta=False)),),
        takes_k=False,
    ),
    "fora": Published(source="FORA, arXiv 2407.01425", parts=_one(_branches), site=_branches, takes_k=False),
    "taylorseer": Published(
        source="TaylorSeer, arXiv 2503.06923", order=1, parts=_one(_branches), site=_branches, takes_k=False
    ),
    "pab": Published(
        source="Pyramid Attention Broadcast, arXiv 2408.12588: attention every N, over time 2N, cross 3N; no MLPs",
        parts=_pab,
        takes_k=False,
    ),
    "tgate": Published(
        source="T-GATE, arXiv 2404.02747: cross-attention is held below the gate, attention every N above it; guidance "
        "is the pipeline's and goes on",
        parts=_tgate,
        takes_k=False,
    ),
    "smoothcache": Published(
        source="SmoothCache, arXiv 2411.10510: branches by kind, from a calibrated schedule (skipdit calibrate)"
    ),
    "fbcache": Published(
        source="First-Block-Cache, ParaAttention (github.com/chengzeyi/ParaAttention), after arXiv 2411.19108",
        adaptive=lambda threshold: CacheMethod(
            schedule=ProbeSchedule(threshold=threshold), site=Stack(), probe=FIRST_ADDED
        ),
        takes_k=False,
    ),
    "teacache": Published(
        source="TeaCache, arXiv 2411.19108, without a fitted polynomial; the first unit runs too",
        adaptive=lambda threshold: CacheMethod(
            schedule=ProbeSchedule(threshold=threshold, accumulate=True), site=Stack(), probe=FIRST_INPUT
        ),
        takes_k=False,
    ),
    "adacache": Published(
        source="AdaCache, arXiv 2411.02397, its codebook as a rate; no motion regularisation",
        adaptive=lambda threshold: CacheMethod(schedule=RateSchedule(threshold=threshold), site=BranchOutputs(EVERY)),
        takes_k=False,
    ),
}


# ----------------------------------------------------------------------------------------------------------------------
# Specs

SPEC = re.compile(
    r"(?:(?P<name>[a-z-]+):)?N(?P<interval>\d+)(?:-(?P<start>\d+)-(?P<stop>\d+))?(?P<options>(?:-[ko]\d+)*)", re.ASCII
)
THRESHOLD = re.compile(r"(?P<name>[a-z-]+):(?P<value>\d+(?:\.\d+)?|\.\d+)", re.ASCII)
AUTO = re.compile(r"auto(?::(?P<speedup>\d+(?:\.\d+)?))?(?:-k(?P<k>\d+))?(?:-o(?P<order>\d+))?", re.ASCII)
NUMBER = re.compile(r"\d+", re.ASCII)
MAX_DIGITS = 9  # of a number in a spec
SPEC_FORM = (
    "[{method}:]N{interval}[-{start}-{stop}][-k{shallow units}][-o{Taylor order}], for instance N2-700-50, "
    "{method}:{threshold}, or auto[:{speedup}]"
)


def parse_method(spec: "str | Path | CacheMethod") -> CacheMethod:
    """Return the method of a spec string or of a schedule's path (`.json`); a method is returned as it is.

    `ValueError` for a spec that is not of the form, names an unknown method, or could never reuse; `FileNotFoundError`
    for a schedule that does not exist.
    """
    if isinstance(spec, CacheMethod):
        return spec
    if not isinstance(spec, (str, Path)):
        raise TypeError(f"a cache is a spec, a schedule's path or a CacheMethod, got {type(spec).__name__}")
    if str(spec).endswith(".json"):
        return load_schedule(Path(spec))
    text = str(spec)
    if any(len(digits) > MAX_DIGITS for digits in NUMBER.findall(text)):
        raise ValueError(f"numbers in a cache spec have at most {MAX_DIGITS} digits, got {printable(text)!r}")
    if match := AUTO.fullmatch(text):
        return _auto(**match.groupdict())
    match = SPEC.fullmatch(text) or THRESHOLD.fullmatch(text)
    if match is None:
        raise ValueError(f"a cache spec is {SPEC_FORM}, or the path of a schedule.json; got {printable(text)!r}")
    name = match["name"] or "skip"
    if name not in METHODS:
        raise ValueError(f"cache method must be one of {', '.join((*METHODS, 'auto'))}, got {printable(name)!r}")
    row = METHODS[name]
    if match.re is THRESHOLD:
        if row.adaptive is None:
            raise ValueError(f"a spec of {name} is {name}:{row.form}, got {printable(text)!r}")
        method = row.adaptive(float(match["value"]))
    else:
        if row.parts is None:
            raise ValueError(f"a spec of {name} is {name}:{row.form}, got {printable(text)!r}")
        method = _together(row.parts(_options(row, match, text)))
    return method if row.site is not None else replace(method, spec=text)


def _options(row: Published, match: re.Match[str], text: str) -> Options:
    given = re.findall(r"-([ko])(\d+)", match["options"])
    values = {letter: int(value) for letter, value in given}
    if len(values) < len(given):
        raise ValueError(f"each of -k and -o may be given once, got {printable(text)!r}")
    if "o" in values and row.order == 0:
        with_order = ", ".join(f"{name}:" for name, other in METHODS.items() if other.order)
        raise ValueError(f"a Taylor order needs one of {with_order}, got {printable(text)!r}")
    if "k" in values and not row.takes_k:
        raise ValueError(f"{match['name']} has no shallow units, got {printable(text)!r}")
    window = (
        {} if match["start"] is None else {"start_timestep": int(match["start"]), "stop_timestep": int(match["stop"])}
    )
    return Options(
        schedule=IntervalSchedule(interval=int(match["interval"]), **window),
        shallow_units=(values["k"],) if "k" in values else (),
        order=values.get("o", row.order),
    )


def _auto(speedup: str | None, k: str | None, order: str | None) -> CacheMethod:
    schedule = AutoSchedule() if speedup is None else AutoSchedule(speedup=float(speedup))
    spec = f"auto:{schedule}" + (f"-k{k}" if k else "") + (f"-o{order}" if order else "")
    return CacheMethod(
        schedule=schedule, site=Inner(int(k or 1)), predictor=TaylorPredictor(int(order or AUTO_ORDER)), spec=spec
    )


def _together(parts: tuple[CacheMethod, ...]) -> CacheMethod:
    first, *others = parts
    return replace(first, others=tuple(others))


# ----------------------------------------------------------------------------------------------------------------------
# Schedules as files


MAX_SCHEDULE_STEPS = 1000  # of a run; `skipdit sample --steps` goes no further
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_SCHEDULE_STEPS)]
Steps = Annotated[list[Count], msgspec.Meta(max_length=MAX_SCHEDULE_STEPS)]
Variants = Annotated[list[Count | None], msgspec.Meta(max_length=MAX_SCHEDULE_STEPS)]
Timesteps = Annotated[list[float], msgspec.Meta(max_length=MAX_SCHEDULE_STEPS)]


class PartFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One of the `parts` of a schedule.json."""

    kinds: Annotated[list[BranchKind], msgspec.Meta(min_length=1, max_length=len(EVERY))]
    full_steps: Steps
    variants: Variants = []


class ScheduleFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A schedule.json. What `skipdit calibrate` adds about a schedule's origin has no effect."""

    num_inference_steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_SCHEDULE_STEPS)]
    full_steps: Steps | None = None
    method: str = "skip"
    num_shallow_units: Count | Steps = 1
    order: Count = 0
    timesteps: Timesteps = []
    variants: Variants = []
    parts: Annotated[list[PartFields], msgspec.Meta(min_length=1, max_length=len(EVERY))] | None = None
    made_for: MadeFor | None = None
    seeds: list[int] = []
    num_samples: int | None = None
    compute_ratio: float | None = None
    predicted_psnr_db: float | None = None
    measured_psnr_db: float | None = None
    versions: dict[str, str] = {}


def load_schedule(path: Path) -> CacheMethod:
    """Return an explicit schedule, written by hand or by `skipdit calibrate`.

    `{"full_steps": [0, 2], "num_inference_steps": 4}` and optionally `method` (a row of `METHODS`, by default skip),
    `num_shallow_units` (a number, or a list that `variants` indexes), `order`, `timesteps`, `variants` and `made_for`;
    or, in place of `full_steps` and `method`, `parts`: a list of `{"kinds": [...], "full_steps": [...]}`. Any other
    field is an error, and so is a number of another type.
    """
    try:
        fields = read_json(path, ScheduleFields, infinite=("predicted_psnr_db", "measured_psnr_db"))
        parts = tuple(_read_parts(fields))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no schedule at {printable(path)}") from error
    except ValueError as error:
        name = printable(path)
        raise ValueError(f"{name} is not a schedule: {printable(str(error).removeprefix(f'{name} '))}") from error
    spec = f"{printable(path.name)} ({parts[0].schedule} steps full)"
    return replace(_together(parts), made_for=fields.made_for, spec=spec)


def _read_parts(fields: ScheduleFields) -> Iterator[CacheMethod]:
    if fields.parts is not None:
        kinds = [kind for part in fields.parts for kind in part.kinds]
        if fields.full_steps is not None or fields.variants or len(set(kinds)) < len(kinds):
            raise ValueError("parts take the place of full_steps and variants, and name each kind once")
        for part in fields.parts:
            schedule = _explicit(fields, part.full_steps, part.variants)
            yield CacheMethod(
                schedule=schedule, site=BranchOutputs(tuple(part.kinds)), predictor=TaylorPredictor(fields.order)
            )
        return
    if fields.full_steps is None:
        raise ValueError("it needs full_steps, or parts")
    make = METHODS[fields.method].site if fields.method in METHODS else None
    if make is None:
        with_site = ", ".join(name for name, row in METHODS.items() if row.site is not None)
        raise ValueError(f"method must be one of {with_site}, got {printable(fields.method)!r}")
    given = fields.num_shallow_units
    yield CacheMethod(
        schedule=_explicit(fields, fields.full_steps, fields.variants),
        site=make(tuple(given) if isinstance(given, list) else (given,)),
        predictor=TaylorPredictor(fields.order),
    )


def _explicit(fields: ScheduleFields, full_steps: list[int], variants: list[int | None]) -> ExplicitSchedule:
    return ExplicitSchedule(
        full_steps=tuple(full_steps),
        num_inference_steps=fields.num_inference_steps,
        timesteps=tuple(fields.timesteps),
        variants=tuple(variants),
    )
