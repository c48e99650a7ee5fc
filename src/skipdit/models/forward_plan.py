"""Plans of what one forward call runs, stores and reuses: data that is made outside the compiled graph.

A call that reuses leaves out a *region* of the units' work and takes its result from an earlier call that stored it:
whole units (the streams after them, or the difference that they make to the streams), or the outputs of branches inside
units. In training a call may *route* tokens, so that deep units see only some of them. A `ForwardPlan` lists the
actions at each unit as booleans and names; a `ForwardState` carries them out.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast, get_args

import torch
from torch import Tensor

from skipdit.interfaces import Fields
from skipdit.models.long_skip import BranchKind, LongSkipLinks, LongSkipModel, OpenCall, PlannedOutput
from skipdit.models.regions import Branches as Branches
from skipdit.models.regions import Region, Stored, Units, Values
from skipdit.models.routing import RoutedTokens, TokenRoute

# ----------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True, kw_only=True)
class End:
    """The end of a region of units."""

    name: str
    """Name of the region."""
    delta: bool
    """Stored values are added to the streams instead of replacing them."""


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """The actions at one unit.

    A caller may leave out units itself (skip-layer guidance), so each action is listed at all later units too, and is
    carried out once.
    """

    runs: bool = True
    begins: tuple[str, ...] = ()
    """Regions for which the streams before their first unit are kept here."""
    takes: tuple[End, ...] = ()
    """Reused regions that end before this unit."""
    stores: tuple[End, ...] = ()
    """Stored regions that end before this unit."""
    keeps_skip: tuple[str, ...] = ()
    """Stored regions that include the output of this unit, as the source of a skip."""
    stored_skip: str | None = None
    """The reused region that holds the output of this unit, which is left out."""
    reuses: Mapping[str, str] = field(default_factory=dict)
    """By kind of branch, the reused region that holds its output."""
    keeps: Mapping[str, str] = field(default_factory=dict)
    """By kind of branch, the stored region that takes its output."""
    probes: Mapping[str, str] = field(default_factory=dict)
    """By kind of branch, the stored region that takes its input."""
    asks: bool = False
    """The plan's question is asked before this unit."""
    is_idle: bool = False
    """The streams pass unchanged, without any action."""
    sheds: bool = False
    """Tokens leave the stream before this unit."""
    restores: bool = False
    """Tokens return before this unit."""
    sees_kept: bool = False
    """The unit sees only the kept tokens."""
    skip_sheds: bool = False
    """The skip into this unit loses tokens on its way."""
    skip_restores: bool = False
    """The skip into this unit gets tokens back on its way."""

    @property
    def is_boundary(self) -> bool:
        return bool(self.begins or self.takes or self.stores or self.asks or self.sheds or self.restores)


@dataclass(frozen=True, eq=False)
class Question:
    """A question asked during an eager forward: whether to follow another plan from there on."""

    ask: Callable[[Stored], bool]
    """Returns the answer, given the values stored so far."""
    plan: "ForwardPlan"
    """The other plan."""
    reused: Stored
    """The values that it reuses."""


@dataclass(frozen=True, eq=False)
class ForwardPlan:
    """The regions that one forward call stores, and those that it takes from an earlier call; see `of`.

    `torch.compile` would make a symbol of a number that changes between calls, so a forward reads only booleans and
    names from the plan, at constant indices.
    """

    store: tuple[Region, ...] = ()
    reuse: tuple[Region, ...] = ()
    route: TokenRoute | None = None
    units: tuple[UnitPlan, ...] = ()
    """The actions at each unit, and after the last; empty for the plain forward."""
    idle: frozenset[int] = frozenset()
    """Units that are passed over as if they did not exist."""
    untouched: frozenset[int] = frozenset()
    """Units that run as if there were no plan."""
    has_branches: bool = False
    """True if a branch is stored or reused."""
    question: Question | None = None

    @classmethod
    def of(
        cls,
        links: LongSkipLinks,
        *,
        store: Iterable[Region] = (),
        reuse: Iterable[Region] = (),
        asks_at: int | None = None,
        route: TokenRoute | None = None,
    ) -> "ForwardPlan":
        """Return the plan for a model with these links. asks_at: the unit before which a question may be asked. Raises
        `ValueError` if the model has too few units, or if tokens are routed while regions are stored or reused."""
        store, reuse = tuple(store), tuple(reuse)
        if route is not None and (store or reuse):
            raise ValueError("a forward call can either route tokens or store and reuse regions, not both")
        if route is not None and route.stop > links.num_units:
            raise ValueError(f"the model has only {links.num_units} units, got {route}")
        for region in (*store, *reuse):
            if region.bounds is not None and region.bounds[1] > links.num_units:
                raise ValueError(f"the model has only {links.num_units} units, got {region}")
        units = tuple(
            _routed_unit_plan(links, unit, route)
            if route is not None
            else _unit_plan(links, unit, store, reuse, unit == asks_at)
            for unit in range(links.num_units + 1)
        )
        has_branches = any(unit.reuses or unit.keeps or unit.probes for unit in units)
        idle = frozenset(number for number, unit in enumerate(units) if unit.is_idle)
        untouched = frozenset(
            number
            for number, (unit, after) in enumerate(pairwise(units))
            if unit.runs
            and not (unit.is_boundary or unit.sees_kept or (number > 0 and links.sources))
            and not (number == links.num_units - 1 and after.is_boundary)
        )
        return cls(store, reuse, route, units, idle, untouched, has_branches)


PLAIN = ForwardPlan()


def _unit_plan(
    links: LongSkipLinks, unit: int, store: tuple[Region, ...], reuse: tuple[Region, ...], asks: bool
) -> UnitPlan:
    target = links.targets.get(unit)

    def passes(region: Region) -> bool:
        """Return true if the region includes this unit's skip: it leaves out the unit but not the target."""
        return region.skips and target is not None and region.leaves_out(unit) and not region.leaves_out(target)

    def ends(ranges: list[Units]) -> tuple[End, ...]:
        return tuple(End(name=units.name, delta=units.delta) for units in ranges if units.stop <= unit)

    def by_kind(regions: tuple[Region, ...], *, inputs: bool = False) -> dict[str, str]:
        pairs = [(kind, region) for kind in get_args(BranchKind) for region in regions]
        return {kind: region.name for kind, region in pairs if region.has_branch(kind, unit, inputs=inputs)}

    runs = not any(region.leaves_out(unit) for region in reuse)
    stored_skip = next((region.name for region in reuse if passes(region)), None)
    stored, reused = (
        [cast(Units, region) for region in regions if region.bounds is not None] for regions in (store, reuse)
    )
    is_due = unit in links.segment_starts or any(
        unit == units.stop or (units.delta and unit == units.start) for units in stored + reused
    )
    return UnitPlan(
        runs=runs,
        begins=tuple(units.name for units in stored + reused if units.delta and units.leaves_out(unit)),
        takes=ends(reused),
        stores=ends(stored),
        keeps_skip=tuple(region.name for region in store if passes(region)),
        stored_skip=stored_skip,
        reuses=by_kind(reuse),
        keeps=by_kind(store),
        probes=by_kind(store, inputs=True),
        asks=asks,
        is_idle=not (runs or stored_skip or is_due or asks) and unit < links.num_units - 1,
    )


def _routed_unit_plan(links: LongSkipLinks, unit: int, route: TokenRoute) -> UnitPlan:
    covered, source = route.covers(unit), links.sources.get(unit)
    skip_covered = source is not None and route.covers(source)
    return UnitPlan(
        runs=not (covered and route.leaves_out),
        sheds=unit == route.start,
        restores=unit == route.stop,
        sees_kept=covered and not route.leaves_out,
        skip_sheds=source is not None and covered and not skip_covered,
        skip_restores=skip_covered and not covered,
    )


# ----------------------------------------------------------------------------------------------------------------------
# One call


@dataclass(eq=False)
class Writes:
    """Detects whether blocks later write to the tensors that a call keeps, in place or by refilling a buffer.

    A place is the input of a unit or of a branch. Its tensors are copied when they are kept and when they are reused,
    until two calls have shown that nothing writes to them.
    """

    always: bool = False
    """Always copy, without checks."""
    known: dict[str, bool] = field(default_factory=dict)
    """True for a place that is written to, false for one that is not."""
    previous: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    """Tensors of each place in the last call, and their versions."""
    now: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    """Tensors of each place in this call, and their versions."""

    def __getstate__(self) -> Fields:
        return {"always": self.always, "known": self.known, "previous": {}, "now": {}}

    def apart(self, place: str, tensor: Tensor, *, look: bool) -> Tensor:
        """Return a copy, or the tensor itself if this place is known not to be written to. look: check the tensor."""
        if self.known.get(place) is False:
            return tensor
        if look and not (self.always or torch.compiler.is_compiling() or tensor.is_inference()):
            self.now.setdefault(place, []).append((tensor.detach(), tensor._version))  # `_version` is private to torch
        return tensor.clone()

    def end_call(self) -> None:
        """Compare the versions of the tensors of this call and the last one, to learn which places are written to."""
        now, self.now = self.now, {}
        for place, tensors in now.items():
            if any(tensor._version != version for tensor, version in (*tensors, *self.previous.get(place, ()))):
                self.known[place] = True
            elif place in self.previous:
                self.known.setdefault(place, False)
            else:
                self.previous[place] = tensors
            if place in self.known:
                self.previous.pop(place, None)


@dataclass
class ForwardState:
    """The state of one forward call, except its streams."""

    links: LongSkipLinks
    # no defaults: up to torch 2.11 a default that is an object breaks the compiler's graph (a test pins it)
    plan: ForwardPlan
    reused: Stored | None
    """Values of each region that the plan reuses, stored by earlier calls."""
    stored: dict[str, dict[str, Tensor]] = field(init=False, default_factory=dict)
    """Values that this call stores."""
    skips: dict[int, Tensor] = field(init=False, default_factory=dict)
    """Outputs by source unit: a gradient-checkpointed unit that runs twice finds the same skip twice."""
    entered: dict[str, tuple[Any, ...]] = field(init=False, default_factory=dict)
    """By region, the streams before its first unit."""
    done: set[str] = field(init=False, default_factory=set)
    """Regions that have already been taken or stored."""
    num_branch_calls: dict[str, int] = field(init=False, default_factory=dict)
    num_arrived: int = field(init=False, default=0)
    """Number of source units whose output has been kept."""
    tokens: RoutedTokens | None = field(init=False, default=None)
    open_call: OpenCall | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.plan.reuse and self.reused is None:
            raise ValueError("a plan that reuses regions needs the values that an earlier call stored: pass stored=")
        if self.reused is not None and not self.plan.reuse and self.plan.route is None:
            raise ValueError("stored was passed, but the plan reuses nothing")

    @classmethod
    def begin(cls, model: LongSkipModel, plan: ForwardPlan, stored: Stored | None) -> "ForwardState":
        """Return the state of a new forward call, and hand it to the model's open branches."""
        state = cls(model.long_skip_links, plan, stored)
        if plan.route is not None:
            state.tokens = RoutedTokens.begin(plan.route, stored, model.fill_token)
        if model.open_call is not None:
            model.open_call.state, state.open_call = state, model.open_call
        return state

    def finish(self, output: Any) -> Any:
        """End the forward call. Return `output`, or with a plan a `PlannedOutput`."""
        if self.open_call is not None:
            self.open_call.state = None
            if self.open_call.writes is not None and not torch.compiler.is_compiling():
                self.open_call.writes.end_call()
        return PlannedOutput(output, self.stored) if self.plan.units else output

    def _at(self, unit: int) -> UnitPlan:
        return self.plan.units[unit] if self.plan.units else NOTHING

    def runs(self, unit: int) -> bool:
        return self._at(unit).runs

    def sees_kept(self, unit: int) -> bool:
        """Return true if a unit sees only the kept tokens."""
        return self._at(unit).sees_kept

    def is_boundary(self, unit: int) -> bool:
        """Return true if `enter` has values to store or to replace at this unit."""
        actions = self._at(unit)
        return actions.is_boundary and (
            actions.asks
            or actions.sheds
            or actions.restores
            or any(name not in self.entered for name in actions.begins)
            or any(end.name not in self.done for end in (*actions.takes, *actions.stores))
        )

    def enter(self, unit: int, *streams: Any, routed: int = 0) -> tuple[Any, ...]:
        """Return the streams that enter `unit`, before its skip is fused; if `unit` is the number of units, the streams
        after the last one. routed: index of the stream whose tokens may be routed."""
        if unit in self.plan.idle or not self.is_boundary(unit):
            return streams
        actions = self._at(unit)
        if self.tokens is not None and (actions.sheds or actions.restores):
            stream = streams[routed]
            if actions.sheds:
                stream = self.tokens.leave(stream, self._keep(str(unit), stream))
            else:
                stream = self.tokens.restore(stream, self.tokens.fill)
            streams = (*streams[:routed], stream, *streams[routed + 1 :])
        for end in actions.takes:
            if end.name not in self.done:
                self.done.add(end.name)
                streams = self._take(end, unit, streams)
        for name in actions.begins:
            if name not in self.entered:
                self.entered[name] = tuple(self._keep(str(unit), stream) for stream in streams)
        for end in actions.stores:
            if end.name not in self.done:
                self.done.add(end.name)
                self._store(end, unit, streams)
        question = self.plan.question
        if actions.asks and question is not None and question.ask(self.stored):
            self.plan, self.reused = question.plan, question.reused
        return streams

    def join(self, joins: tuple[int, ...], routed: int) -> None:
        """Concatenate the streams with these indices along their tokens in all streams kept so far, as the model does
        at the start of a segment. routed: index of the stream whose tokens may be routed."""
        if self.tokens is not None:
            self.tokens.texts_first = joins[0] != routed
        for name, streams in self.entered.items():
            if len(streams) > 1:
                parts = [streams[index] for index in joins]
                self.entered[name] = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1),)

    def _store(self, end: End, unit: int, streams: tuple[Any, ...]) -> None:
        values = self.stored.setdefault(end.name, {})
        before = self.entered.get(end.name, streams)
        for index, stream in enumerate(streams):
            if stream is not None:  # the text stream may end within the last unit (SD3)
                values[str(index)] = stream - before[index] if end.delta else self._keep(str(unit), stream)

    def _take(self, end: End, unit: int, streams: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.reused is not None
        values = self.reused.get(end.name, {})
        before = self.entered.get(end.name, streams)
        new_streams = []
        for index, stream in enumerate(streams):
            value = values.get(str(index))
            if value is not None:
                stream = before[index] + value if end.delta else self._lend(str(unit), value)
            new_streams.append(stream)
        return tuple(new_streams)

    def _keep(self, place: str, tensor: Any) -> Any:
        writes = None if self.open_call is None else self.open_call.writes
        return tensor if writes is None or tensor is None else writes.apart(place, tensor, look=True)

    def _lend(self, place: str, tensor: Tensor) -> Tensor:
        writes = None if self.open_call is None else self.open_call.writes
        return tensor if writes is None else writes.apart(place, tensor, look=False)

    # ------------------------------------------------------------------------------------------------------------------
    # Long skips

    def leave(self, unit: int, hidden_states: Tensor) -> Tensor:
        """Keep the output of a source unit for its target, and store it for later calls that leave out the unit but not
        the target. Return the output."""
        if unit in self.links.targets and unit not in self.skips:
            self.skips[unit] = hidden_states = self._keep(str(unit + 1), hidden_states)
            for name in self._at(unit).keeps_skip:
                self.stored.setdefault(name, {})[f"skip {unit}"] = hidden_states
        return hidden_states

    def arrive(self, unit: int, hidden_states: Tensor) -> None:
        """Keep these hidden states, which enter `unit`, as the output of every earlier source unit that has run. The
        output of a unit that the caller left out (skip-layer guidance), or past which all tokens are routed, is its
        input."""
        sources = self.links.ordered_sources
        while self.num_arrived < len(sources) and sources[self.num_arrived] < unit:
            if self.runs(sources[self.num_arrived]) or self.tokens is not None:
                self.leave(sources[self.num_arrived], hidden_states)
            self.num_arrived += 1

    def stored_skip(self, unit: int) -> Tensor | None:
        """Return the stored output of a unit that is left out while the target of its skip runs."""
        name = self._at(unit).stored_skip
        return None if name is None or self.reused is None else self.reused[name].get(f"skip {unit}")

    def skip(self, unit: int) -> Tensor | None:
        """Return the skip into `unit`, or `None` if it takes none. Raises `ValueError` if its source was left out and
        is not stored."""
        source = self.links.sources.get(unit)
        if source is None:
            return None
        actions = self._at(unit)
        skip = self.skips[source] if source in self.skips else self.stored_skip(source)
        if skip is None:
            raise ValueError(f"unit {unit} needs the skip of unit {source}, which was left out and is not stored")
        if self.tokens is not None and actions.skip_sheds:
            return self.tokens.shed(skip)
        if self.tokens is not None and actions.skip_restores:
            return self.tokens.restore(skip)
        return skip

    # ------------------------------------------------------------------------------------------------------------------
    # Branches

    def branch(self, kind: str, unit: int, place: str, entering: Any, run: Callable[[], Any]) -> Any:
        """Return the output of one branch, a tensor or a tuple: run the branch and store the output, or reuse it.

        place: name of the branch within its unit. entering: its first input. A module that runs more than once per unit
        (text and images through one MLP, chunks) counts as a new branch each time.
        """
        actions = self._at(unit)
        number = self.num_branch_calls.get(f"{unit} {place}", 0)
        self.num_branch_calls[f"{unit} {place}"] = number + 1
        name = f"{unit} {place} {number}"
        if kind in actions.reuses:
            assert self.reused is not None
            return _unpack(self.reused[actions.reuses[kind]], name, lambda tensor: self._lend(name, tensor))
        if kind in actions.probes:
            self.stored.setdefault(actions.probes[kind], {})[name] = self._keep(f"input of {name}", entering)
        output = run()
        if kind in actions.keeps:
            _pack(
                self.stored.setdefault(actions.keeps[kind], {}), name, output, lambda tensor: self._keep(name, tensor)
            )
        return output


NOTHING = UnitPlan()
MAX_OUTPUTS = 4  # per branch


def _pack(values: dict[str, Tensor], name: str, output: Any, keep: Callable[[Tensor], Tensor]) -> None:
    if isinstance(output, Tensor):
        values[name] = keep(output)
        return
    for index, tensor in enumerate(output):
        if tensor is not None:
            values[f"{name}.{index} of {len(output)}"] = keep(tensor)


def _unpack(values: Values, name: str, lend: Callable[[Tensor], Tensor]) -> Any:
    if name in values:
        return lend(values[name])
    for length in range(1, MAX_OUTPUTS + 1):
        outputs = [values.get(f"{name}.{index} of {length}") for index in range(length)]
        if any(output is not None for output in outputs):
            return tuple(None if output is None else lend(output) for output in outputs)
    raise ValueError(f"the output of branch {name} was not stored")


def kind_in(kind: BranchKind, block: int) -> BranchKind:
    """Return the kind of a branch in block `block` of a unit: the second block attends over time (Latte)."""
    return "temporal_attention" if kind == "attention" and block == 1 else kind
