"""Cache methods: each is a choice of when x what x how, and the named ones are rows of one table."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from skipdit.cache.auto import RULE, AutoSchedule
from skipdit.cache.gates import ProbeSchedule, RateSchedule
from skipdit.cache.predictor import (
    AdamsBashforthPredictor,
    FittedPredictor,
    HermitePredictor,
    Predictor,
    TaylorPredictor,
)
from skipdit.cache.schedule import IntervalSchedule, Schedule
from skipdit.cache.schedule_file import MadeFor, ScheduleFields, explicit_of, single_of
from skipdit.cache.site import (
    AllButFirst,
    AllUnits,
    BranchOutputs,
    DeepFeatures,
    GuidanceDifference,
    LatentsProbe,
    MiddleUnits,
    Probe,
    Site,
    UnitProbe,
    UnitRange,
    WholeOutput,
)
from skipdit.files.untrusted import printable, read_json
from skipdit.models.long_skip import BranchKind
from skipdit.options import choose


@dataclass(frozen=True, kw_only=True)
class CacheMethod:
    """A rule (when, what and how), and perhaps more rules for other parts of the model at the same time."""

    schedule: Schedule
    """The steps that reuse."""
    site: Site = field(default_factory=DeepFeatures)
    """The values to reuse."""
    predictor: Predictor = field(default_factory=TaylorPredictor)
    """The prediction of the current values from stored ones."""
    probe: Probe | None = None
    """The values that an adaptive schedule compares before it decides."""
    trail: Probe | None = None
    """Values of the first units: how far they have moved since the last full steps tells how far to extrapolate
    (DiCache); by default the number of steps does."""
    others: tuple["CacheMethod", ...] = ()
    """Further rules."""
    made_for: MadeFor | None = field(default=None, compare=False)
    """The model that the schedule was calibrated on."""
    spec: str = field(default="", compare=False)
    """The spec it was parsed from."""

    def __post_init__(self) -> None:
        if self.schedule.is_adaptive and self.others:
            raise ValueError(
                "an adaptive schedule decides for the whole step, so it cannot be combined with another rule"
            )
        if (self.probe is not None) != self.schedule.has_probe:
            raise ValueError(
                f"a ProbeSchedule and a probe go together, got {type(self.schedule).__name__} and probe {self.probe}"
            )
        if self.trail and not (self.probe and self.probe.is_in_units and self.trail.is_in_units):
            raise ValueError(f"a trail and a probe of units go together, got probe {self.probe}, trail {self.trail}")

    @property
    def rules(self) -> "tuple[CacheMethod, ...]":
        return (self, *self.others)

    @property
    def needs_units(self) -> bool:
        """False if any model can have it, of known units or not."""
        return any(rule.site.needs_units for rule in self.rules)

    @property
    def may_stay_full(self) -> bool:
        return all(rule.schedule.may_stay_full for rule in self.rules)

    def __str__(self) -> str:
        if self.spec:
            return self.spec
        order = self.predictor.order
        name = next((name for name, row in METHODS.items() if row.matches(self)), type(self.site).__name__)
        prefix, suffix = "" if name == "skip" else f"{name}:", f"-o{order}" if order else ""
        return f"{prefix}{self.schedule}{''.join(f'-k{k}' for k in self.site.shallow_units)}{suffix}"


@dataclass(frozen=True, kw_only=True)
class ParsedSpec:
    """The options of a spec, without the method's name."""

    schedule: IntervalSchedule
    shallow_units: tuple[int, ...] = ()
    """The number after -k, if there is one."""
    order: int = 0
    """Order of the predictor."""
    predictor: type[Predictor] = TaylorPredictor

    @property
    def k(self) -> int:
        return self.shallow_units[0] if self.shallow_units else 1

    def rule(
        self, site: Site, *, stretch: int = 1, start: float | None = None, stop: float | None = None
    ) -> CacheMethod:
        """Return a rule with `stretch` times the interval; `start` and `stop`, if given, replace the window."""
        schedule = IntervalSchedule(
            interval=self.schedule.interval * stretch,
            start_timestep=self.schedule.start_timestep if start is None else start,
            stop_timestep=self.schedule.stop_timestep if stop is None else stop,
        )
        return CacheMethod(schedule=schedule, site=site, predictor=self.predictor(self.order))


@dataclass(frozen=True, kw_only=True)
class AdaptiveSpec:
    """The options of an adaptive spec, without the method's name."""

    threshold: float
    limits: Mapping[str, int] = field(default_factory=dict)
    """The fields of an `AdaptiveSchedule` that it sets."""
    k: int = 1
    """Number of units that are probed."""
    order: int = 0
    """The Taylor order."""

    def by_probe(self, **fields: Any) -> ProbeSchedule:
        """Return a schedule of these fields, which the limits of the spec replace."""
        return ProbeSchedule(threshold=self.threshold, **{**fields, **self.limits})


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """A named method, one row of the table."""

    source: str
    """The paper or repository it is from, and how this implementation differs."""
    order: int = 0
    """Its default Taylor order; with 0 it takes no -o."""
    predictor: type[Predictor] = TaylorPredictor
    max_order: int | None = None
    """The largest order that it takes; `None` for any."""
    rules: Callable[[ParsedSpec], tuple[CacheMethod, ...]] | None = None
    """Makes its rules from a spec with an interval; `None` if it has no such spec."""
    adaptive: Callable[[AdaptiveSpec], CacheMethod] | None = None
    """Makes its only rule from a spec with a threshold; `None` if it has no such spec."""
    site: Callable[[tuple[int, ...]], Site] | None = None
    """Makes the site of a schedule.json of this name from its shallow units."""
    takes_k: bool = True

    def matches(self, method: CacheMethod) -> bool:
        """Return true if a method of one rule has the site and the kind of predictor of this row."""
        if self.site is None or method.others or method.probe is not None:
            return False
        kinds = (self.predictor, FittedPredictor) if self.predictor is TaylorPredictor else (self.predictor,)
        predicts = (self.order > 0) == (method.predictor.order > 0) and type(method.predictor) in kinds
        return predicts and self.site(method.site.shallow_units) == method.site

    @property
    def form(self) -> str:
        order = "[-o{Taylor order}]" if self.order else ""
        if self.rules is None:
            k = "[-k{probed units}]" if self.takes_k else ""
            return f"{{threshold}}{LIMITS_FORM}{k}{order}" if self.adaptive else "json"
        k = "[-k{shallow units}]" if self.takes_k else ""
        return f"N{{interval}}[-{{start}}-{{stop}}]{k}{order}"


EVERY: tuple[BranchKind, ...] = ("attention", "temporal_attention", "cross_attention", "mlp")
ATTENTION: tuple[BranchKind, ...] = ("attention", "temporal_attention")
NEVER_AGAIN = 10**6  # an interval longer than any run
LIMITS = {"w": "num_first", "r": "max_reused", "e": "num_last"}  # by the letter in a spec
LIMITS_FORM = "[-w{first}][-r{most}][-e{last}]"


def _deep(ks: tuple[int, ...]) -> Site:
    return DeepFeatures(*ks[:1], others=ks[1:])


def _offset(ks: tuple[int, ...]) -> Site:
    return UnitRange(ks[0]) if ks else UnitRange()


def _output(ks: tuple[int, ...]) -> Site:
    return WholeOutput()


def _branches(ks: tuple[int, ...]) -> Site:
    return BranchOutputs(EVERY)


def _one(site: Callable[[tuple[int, ...]], Site]) -> Callable[[ParsedSpec], tuple[CacheMethod, ...]]:
    return lambda options: (options.rule(site(options.shallow_units[:1])),)


def _skip_branch(options: ParsedSpec) -> tuple[CacheMethod, ...]:
    shallow = BranchOutputs((*ATTENTION, "cross_attention"), options.k)
    every_second = replace(options.schedule, interval=2)
    return (
        options.rule(DeepFeatures(options.k)),
        CacheMethod(schedule=every_second, site=shallow, predictor=TaylorPredictor(options.order)),
    )


def _delta_dit(options: ParsedSpec) -> tuple[CacheMethod, ...]:
    middle = 500.0
    return (
        options.rule(UnitRange(options.k, at="first"), stop=max(middle, options.schedule.stop_timestep)),
        options.rule(UnitRange(options.k, at="last"), start=min(middle, options.schedule.start_timestep)),
    )


def _pab(options: ParsedSpec) -> tuple[CacheMethod, ...]:
    return (
        options.rule(BranchOutputs(("attention",))),
        options.rule(BranchOutputs(("temporal_attention",), optional=True), stretch=2),
        options.rule(BranchOutputs(("cross_attention",), optional=True), stretch=3),
    )


def _tgate(options: ParsedSpec) -> tuple[CacheMethod, ...]:
    gate = options.schedule.stop_timestep
    if gate == 0:
        raise ValueError("tgate needs the timestep of its gate: tgate:N{interval}-{start}-{gate}, as tgate:N5-900-600")
    held = IntervalSchedule(interval=NEVER_AGAIN, start_timestep=gate)
    cross = CacheMethod(schedule=held, site=BranchOutputs(("cross_attention",)))
    return (cross, options.rule(BranchOutputs(ATTENTION)))


def _dicache(spec: AdaptiveSpec) -> CacheMethod:
    return CacheMethod(
        schedule=spec.by_probe(accumulate=True, num_last=1),
        site=AllButFirst(spec.k),
        predictor=TaylorPredictor(1),
        probe=UnitProbe(num_units=spec.k, after=True),
        trail=UnitProbe(num_units=spec.k),
    )


def _static(
    site: Callable[[tuple[int, ...]], Site],
    source: str,
    *,
    order: int = 0,
    predictor: type[Predictor] = TaylorPredictor,
    takes_k: bool = True,
) -> MethodEntry:
    """Return the row of a method that reuses one site at an interval, or by a schedule.json."""
    return MethodEntry(source=source, order=order, predictor=predictor, rules=_one(site), site=site, takes_k=takes_k)


METHODS: dict[str, MethodEntry] = {
    "skip": _static(_deep, "Skip-Cache, arXiv 2411.17616"),
    "skip-taylor": _static(_deep, "Skip-Cache with TaylorSeer's prediction (arXiv 2503.06923)", order=1),
    "skip-hermite": _static(_deep, "after HiCache, arXiv 2508.16984", order=2, predictor=HermitePredictor),
    "skip-adams": _static(_deep, "after PrediT, arXiv 2602.18093", order=2, predictor=AdamsBashforthPredictor),
    "skip-branch": MethodEntry(
        source="Skip-Cache (arXiv 2411.17616); attention of the shallow units runs at every second step",
        rules=_skip_branch,
    ),
    "delta": _static(_offset, "Delta-DiT's offset (arXiv 2406.01125) of the units in the middle, at all steps"),
    "delta-taylor": _static(_offset, "Delta-DiT's offset with TaylorSeer's prediction (arXiv 2503.06923)", order=1),
    "output": _static(_output, "what EasyCache reuses (arXiv 2507.02860), at an interval", takes_k=False),
    "output-taylor": _static(
        _output, "what EasyCache reuses, with TaylorSeer's prediction (arXiv 2503.06923)", order=1, takes_k=False
    ),
    "delta-dit": MethodEntry(
        source="Delta-DiT, arXiv 2406.01125: offset of the last units down to timestep 500, of the first ones below",
        rules=_delta_dit,
    ),
    "faster-diffusion": MethodEntry(
        source="Faster Diffusion, arXiv 2312.09608: the first half of the units is reused; no noise is injected",
        rules=lambda options: (options.rule(UnitRange(None, at="last", delta=False)),),
        takes_k=False,
    ),
    "fora": _static(_branches, "FORA, arXiv 2407.01425", takes_k=False),
    "taylorseer": _static(_branches, "TaylorSeer, arXiv 2503.06923", order=1, takes_k=False),
    "pab": MethodEntry(
        source="Pyramid Attention Broadcast, arXiv 2408.12588: attention every N, over time 2N, cross 3N; no MLPs",
        rules=_pab,
        takes_k=False,
    ),
    "tgate": MethodEntry(
        source="T-GATE, arXiv 2404.02747: cross-attention is held below the gate, attention every N above it; "
        "the pipeline's guidance continues",
        rules=_tgate,
        takes_k=False,
    ),
    "smoothcache": MethodEntry(
        source="SmoothCache, arXiv 2411.10510: branches by kind, from a calibrated schedule (skipdit calibrate)"
    ),
    "guidance": MethodEntry(
        source="FasterCache, arXiv 2410.19355: the difference of guidance branches, as a whole, not by frequencies; no "
        "attention",
        rules=lambda options: (options.rule(GuidanceDifference()),),
        takes_k=False,
    ),
    "magcache": MethodEntry(
        source="MagCache, arXiv 2506.09045: all units, from a measured curve of magnitudes (skipdit.cache.magnitudes)",
        site=lambda ks: AllUnits(),
    ),
    "fbcache": MethodEntry(
        source="First-Block-Cache, ParaAttention (github.com/chengzeyi/ParaAttention), after arXiv 2411.19108",
        adaptive=lambda spec: CacheMethod(schedule=spec.by_probe(), site=AllButFirst(), probe=UnitProbe()),
        takes_k=False,
    ),
    "teacache": MethodEntry(
        source="TeaCache, arXiv 2411.19108, without a fitted polynomial; the first unit runs too",
        adaptive=lambda spec: CacheMethod(
            schedule=spec.by_probe(accumulate=True), site=AllButFirst(), probe=UnitProbe(inputs=True)
        ),
        takes_k=False,
    ),
    "dicache": MethodEntry(
        source="DiCache, arXiv 2508.17356: the probed units stay fresh at reuse steps; 1 full step last",
        adaptive=_dicache,
    ),
    "seacache": MethodEntry(
        source="SeaCache, arXiv 2602.18993, on the filtered latents, as diffusers has it: at most 2 reuse steps in a "
        "row, 1 full step last",
        order=1,
        max_order=1,
        adaptive=lambda spec: CacheMethod(
            schedule=spec.by_probe(accumulate=True, max_reused=2, num_last=1),
            site=AllUnits(),
            predictor=TaylorPredictor(spec.order),
            probe=LatentsProbe(filtered=True),
        ),
        takes_k=False,
    ),
    "easycache": MethodEntry(
        source="EasyCache, arXiv 2507.02860: 5 full steps first and 1 last, as in its code for HunyuanVideo; each "
        "guidance branch decides for itself",
        adaptive=lambda spec: CacheMethod(
            schedule=spec.by_probe(accumulate=True, at_rate=True, num_first=5, num_last=1),
            site=WholeOutput(),
            probe=LatentsProbe(),
        ),
        takes_k=False,
    ),
    "adacache": MethodEntry(
        source="AdaCache, arXiv 2411.02397, its codebook as a rate; no motion regularization",
        adaptive=lambda spec: CacheMethod(
            schedule=RateSchedule(threshold=spec.threshold, **dict(spec.limits)), site=BranchOutputs(EVERY)
        ),
        takes_k=False,
    ),
}


# ----------------------------------------------------------------------------------------------------------------------
# Specs

SPEC = re.compile(
    r"(?:(?P<name>[a-z-]+):)?N(?P<interval>\d+)(?:-(?P<start>\d+)-(?P<stop>\d+))?(?P<options>(?:-[ko]\d+)*)", re.ASCII
)
THRESHOLD = re.compile(r"(?P<name>[a-z-]+):(?P<value>\d+(?:\.\d+)?|\.\d+)(?P<options>(?:-[wreko]\d+)*)", re.ASCII)
AUTO = re.compile(r"auto(?::(?P<speedup>\d+(?:\.\d+)?))?(?:-k(?P<k>\d+))?(?:-o(?P<order>\d+))?", re.ASCII)
NUMBER = re.compile(r"\d+", re.ASCII)
MAX_DIGITS = 9  # of a number in a spec
SPEC_FORM = (
    "[{method}:]N{interval}[-{start}-{stop}][-k{shallow units}][-o{Taylor order}], for instance N2-700-50, "
    f"{{method}}:{{threshold}}{LIMITS_FORM}, or auto[:{{speedup}}]"
)


def parse_method(spec: "str | Path | CacheMethod") -> CacheMethod:
    """Return the method of a spec string or of the path of a schedule (`.json`); a `CacheMethod` is returned unchanged.

    Raises `ValueError` on a spec that is malformed, names an unknown method, or could never reuse; `FileNotFoundError`
    if the schedule does not exist.
    """
    match spec:
        case CacheMethod():
            return spec
        case str() | Path():
            text = str(spec)
        case _:
            raise TypeError(f"a cache is a spec, the path of a schedule or a CacheMethod, got {type(spec).__name__}")
    if text.endswith(".json"):
        return load_schedule(Path(text))
    if any(len(digits) > MAX_DIGITS for digits in NUMBER.findall(text)):
        raise ValueError(f"numbers in a cache spec have at most {MAX_DIGITS} digits, got {printable(text)!r}")
    if match := AUTO.fullmatch(text):
        return _auto(**match.groupdict())
    match = SPEC.fullmatch(text) or THRESHOLD.fullmatch(text)
    if match is None:
        raise ValueError(f"a cache spec is {SPEC_FORM}, or the path of a schedule.json; got {printable(text)!r}")
    if (name := choose("cache method", match["name"] or "skip", ("auto", *METHODS))) == "auto":
        raise ValueError(f"a spec of auto is auto:{{speedup}}, got {printable(text)!r}")
    row = METHODS[name]
    if match.re is THRESHOLD and row.adaptive is not None:
        method = row.adaptive(_adaptive_options(row, match, text))
    elif match.re is SPEC and row.rules is not None:
        method = _combine(row.rules(_options(row, match, text)))
    else:
        raise ValueError(f"a spec of {name} is {name}:{row.form}, got {printable(text)!r}")
    return method if row.site is not None else replace(method, spec=text)


def _values(row: MethodEntry, match: re.Match[str], text: str) -> dict[str, int]:
    """Return the numbers of a spec by their letters."""
    options = re.findall(r"-([a-z])(\d+)", match["options"])
    values = {letter: int(value) for letter, value in options}
    if len(values) < len(options):
        raise ValueError(f"-k, -o and other options may be given once each, got {printable(text)!r}")
    if "o" in values and row.order == 0:
        with_order = ", ".join(f"{name}:" for name, other in METHODS.items() if other.order)
        raise ValueError(f"a Taylor order needs one of {with_order}, got {printable(text)!r}")
    if "o" in values and row.max_order is not None and values["o"] > row.max_order:
        raise ValueError(f"the order of {match['name']} must be at most {row.max_order}, got {printable(text)!r}")
    if "k" in values and not row.takes_k:
        raise ValueError(f"{match['name']} has no shallow units, got {printable(text)!r}")
    return values


def _adaptive_options(row: MethodEntry, match: re.Match[str], text: str) -> AdaptiveSpec:
    values = _values(row, match, text)
    return AdaptiveSpec(
        threshold=float(match["value"]),
        limits={name: values[letter] for letter, name in LIMITS.items() if letter in values},
        k=values.get("k", 1),
        order=values.get("o", row.order),
    )


def _options(row: MethodEntry, match: re.Match[str], text: str) -> ParsedSpec:
    values = _values(row, match, text)
    window = {f"{name}_timestep": int(match[name]) for name in ("start", "stop") if match[name] is not None}
    return ParsedSpec(
        schedule=IntervalSchedule(interval=int(match["interval"]), **window),
        shallow_units=(values["k"],) if "k" in values else (),
        order=values.get("o", row.order),
        predictor=row.predictor,
    )


def _auto(speedup: str | None, k: str | None, order: str | None) -> CacheMethod:
    schedule = AutoSchedule() if speedup is None else AutoSchedule(speedup=float(speedup))
    spec = f"auto:{schedule}" + (f"-k{k}" if k else "") + (f"-o{order}" if order else "")
    predictor = TaylorPredictor(int(order)) if order else RULE.predictor(of_output=not k)
    site = MiddleUnits(int(k)) if k else WholeOutput()
    return CacheMethod(schedule=schedule, site=site, predictor=predictor, spec=spec)


def _combine(rules: tuple[CacheMethod, ...]) -> CacheMethod:
    first, *others = rules
    return replace(first, others=tuple(others))


def load_schedule(path: Path) -> CacheMethod:
    """Read an explicit schedule, written by hand or by `skipdit calibrate`.

    `{"full_steps": [0, 2], "num_inference_steps": 4}` and optionally `method` (a row of `METHODS`, by default skip),
    `num_shallow_units` (a number, or a list that `variants` indexes), `order`, `timesteps`, `variants`, `factors` (per
    step, of the prediction's terms) and `made_for`;
    or, in place of `full_steps` and `method`, `parts`: a list of `{"kinds": [...], "full_steps": [...]}`. Raises
    `ValueError` on any other field and on a number of the wrong type, `FileNotFoundError` if there is no such file.
    """
    try:
        fields = read_json(path, ScheduleFields, infinite=("predicted_psnr_db", "measured_psnr_db"))
        rules = tuple(_read_rules(fields))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no schedule at {printable(path)}") from error
    except ValueError as error:
        name = printable(path)
        raise ValueError(f"{name} is not a schedule: {printable(str(error).removeprefix(f'{name} '))}") from error
    spec = f"{printable(path.name)} ({rules[0].schedule} steps full)"
    return replace(_combine(rules), made_for=fields.made_for, spec=spec)


def _read_rules(fields: ScheduleFields) -> Iterator[CacheMethod]:
    if fields.parts is not None:
        kinds = [kind for part in fields.parts for kind in part.kinds]
        replaced = (fields.variants, fields.factors, fields.errors, fields.damping != 1, len(set(kinds)) < len(kinds))
        if fields.full_steps is not None or any(replaced):
            raise ValueError("parts replace full_steps, variants, factors, damping and errors, and name each kind once")
        for part in fields.parts:
            schedule = explicit_of(fields, part.full_steps, part.variants)
            yield CacheMethod(
                schedule=schedule, site=BranchOutputs(tuple(part.kinds)), predictor=TaylorPredictor(fields.order)
            )
        return
    row = METHODS.get(fields.method)
    if row is None or (make := row.site) is None or (fields.factors and row.predictor is not TaylorPredictor):
        with_site = ", ".join(name for name, row in METHODS.items() if row.site is not None)
        raise ValueError(f"method must be one of {with_site}, got {printable(fields.method)!r}")
    numbers = fields.num_shallow_units
    schedule, predictor = single_of(fields, row.predictor)
    site = make(tuple(numbers) if isinstance(numbers, list) else (numbers,))
    yield CacheMethod(schedule=schedule, site=site, predictor=predictor)
