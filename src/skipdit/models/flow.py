"""What flows through one forward call beside the hidden states: the long skips, and what a step stores or takes back.

A step that reuses leaves out a *portion* of the units' work and takes its result from an earlier step that stored it:
whole units, as the hidden states that leave them or as what they add, or outputs of branches inside the units.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from skipdit.models.long_skip import BranchKind, LongSkipLinks

Stored = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Portion:
    """A part of the units' work that a step stores or reuses; of `Units` or `Branches`. Abstract.

    What a forward call asks of it must not read a number: numbers that change from call to call `torch.compile` takes
    for symbols, and then fails or compiles anew; strings and booleans it knows.
    """

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The first unit that is left out and the first behind; `None` where all units run."""
        return None

    @property
    def adds(self) -> bool:
        """Whether what is stored is added to the hidden states of today."""
        return False

    @property
    def covered(self) -> tuple[int, ...]:
        """The units that must run to store it."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """What the keys of its stored tensors begin with, where there are `bounds`."""
        raise NotImplementedError

    def leaves_out(self, unit: int) -> bool:
        return False

    def hands_on(self, unit: int, target: int) -> bool:
        """Whether the skip from `unit` to `target` is part of it: where it leaves out the first, not the second."""
        return False

    def has_branch(self, kind: str, unit: int) -> bool:
        return False

    def has_input(self, kind: str, unit: int) -> bool:
        return False

    def owns(self, key: str) -> bool:
        """Whether a stored tensor belongs to it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Units(Portion):
    """Units `start` to `stop` - 1: the hidden states that leave them, or with `delta` what they added, and, `skips`,
    the skips that they hand to units that still run (a probe, which is not reused, needs none)."""

    start: int
    stop: int
    delta: bool = False
    skips: bool = True
    span: str = field(init=False, repr=False, compare=False)  # read inside of a graph

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"units must be a range of at least one, got {self.start} to {self.stop}")
        object.__setattr__(self, "span", f"{self.start}:{self.stop}")

    @property
    def bounds(self) -> tuple[int, int]:
        start, stop = self.span.split(":")
        return int(start), int(stop)

    @property
    def adds(self) -> bool:
        return self.delta

    @property
    def covered(self) -> tuple[int, ...]:
        return tuple(range(self.start, self.stop))

    def __str__(self) -> str:
        return f"what units {self.start} to {self.stop - 1} {'add' if self.delta else 'put out'}"

    @property
    def key(self) -> str:
        return f"{'added by' if self.delta else 'behind'} {self.span} "

    def leaves_out(self, unit: int) -> bool:
        start, stop = self.bounds
        return start <= unit < stop

    def hands_on(self, unit: int, target: int) -> bool:
        return self.skips and self.leaves_out(unit) and not self.leaves_out(target)

    def owns(self, key: str) -> bool:
        return key.startswith(self.key)


@dataclass(frozen=True, kw_only=True)
class Branches(Portion):
    """Outputs of the branches of some `kinds` in some `units`; or, with `inputs`, what enters them (a probe: that can
    be stored, not reused)."""

    kinds: tuple[BranchKind, ...]
    units: tuple[int, ...]
    inputs: bool = False
    names: tuple[str, ...] = field(init=False, repr=False, compare=False)  # of the units, read inside of a graph

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(get_args(BranchKind)):
            raise ValueError(f"kinds must be of {', '.join(get_args(BranchKind))}, got {self.kinds}")
        object.__setattr__(self, "names", tuple(str(unit) for unit in self.units))

    @property
    def covered(self) -> tuple[int, ...]:
        return self.units

    def __str__(self) -> str:
        return f"{' and '.join(self.kinds)} in {len(self.units)} units"

    def has_branch(self, kind: str, unit: int) -> bool:
        return not self.inputs and kind in self.kinds and str(unit) in self.names

    def has_input(self, kind: str, unit: int) -> bool:
        return self.inputs and kind in self.kinds and str(unit) in self.names

    def owns(self, key: str) -> bool:
        name, _, place = key.partition(" ")
        prefix = "input_of_" if self.inputs else ""
        if name.removeprefix(prefix) not in self.kinds or not name.startswith(prefix):
            return False
        return place.split(".")[0] in self.names


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward call stores, and what it takes from an earlier one.

    left_out: the units that it does not run. boundaries: those before which it stores or takes something. Both by name,
    as a `Portion` asks for.
    """

    store: tuple[Portion, ...] = ()
    reuse: tuple[Portion, ...] = ()
    left_out: frozenset[str] = field(init=False, repr=False, compare=False)
    boundaries: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        reused = [portion.bounds for portion in self.reuse if portion.bounds is not None]
        stored = [portion.bounds for portion in self.store if portion.bounds is not None]
        left_out = frozenset(str(unit) for bounds in reused for unit in range(*bounds))
        object.__setattr__(self, "left_out", left_out)
        boundaries = frozenset(str(unit) for bounds in (*reused, *stored) for unit in bounds)
        object.__setattr__(self, "boundaries", boundaries)


PLAIN = Step()


def kind_in(kind: BranchKind, block: int) -> BranchKind:
    """The second block of a unit attends over time (Latte)."""
    return "temporal_attention" if kind == "attention" and block == 1 else kind


@dataclass(eq=False)
class Writes:
    """Finds out what blocks write later of what a call keeps: in place, or into a buffer that they fill again.

    known: by place, an entry to a unit or a branch, whether they do. Until a place has been seen at two calls, and
    where it is written, what is kept and what is handed on from a store is a copy. always: no need to look.
    seen: tensors of a place and their versions, at the last call and in this one.
    """

    always: bool = False
    known: dict[str, bool] = field(default_factory=dict)
    seen: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    now: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {"always": self.always, "known": self.known, "seen": {}, "now": {}}

    def apart(self, place: str, tensor: Tensor, *, look: bool) -> Tensor:
        """A copy, or the tensor itself where it is known that nobody writes it."""
        if self.known.get(place) is False:
            return tensor
        if look and not (self.always or torch.compiler.is_compiling() or tensor.is_inference()):
            self.now.setdefault(place, []).append((tensor.detach(), tensor._version))
        return tensor.clone()

    def end_call(self) -> None:
        now, self.now = self.now, {}
        for place, tensors in now.items():
            if any(tensor._version != version for tensor, version in (*tensors, *self.seen.get(place, ()))):
                self.known[place] = True
            elif place in self.seen:
                self.known.setdefault(place, False)
            else:
                self.seen[place] = tensors
            if place in self.known:
                self.seen.pop(place, None)


@dataclass
class LongSkipFlow:
    """What one forward call carries along its long skips. Made for the call, gone with it.

    given: what earlier calls stored, at least all that `step.reuse` owns. writes: what is known of blocks that write in
    place; `None`: that none does. stored: what this call stores.

    Skips are kept by unit index, so a gradient-checkpointed unit that runs twice finds the same skip twice.
    """

    links: LongSkipLinks
    step: Step = PLAIN
    given: Stored | None = None
    writes: Writes | None = None
    stored: dict[str, Tensor] = field(init=False, default_factory=dict)
    skips: dict[int, Tensor] = field(init=False, default_factory=dict)
    entered: dict[int, tuple[Any, ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.step.reuse and self.given is None:
            raise ValueError("a step that reuses needs what an earlier step stored: give stored=")
        if self.given is not None and not self.step.reuse:
            raise ValueError("what an earlier step stored was given, but the step says not what of it to reuse")
        for portion in (*self.step.store, *self.step.reuse):
            if portion.bounds is not None and portion.bounds[1] > self.links.num_units:
                raise ValueError(f"there are {self.links.num_units} units, got {portion}")

    @property
    def has_branches(self) -> bool:
        return any(portion.bounds is None for portion in (*self.step.store, *self.step.reuse))

    def _keep(self, place: str, tensor: Any) -> Any:
        return tensor if self.writes is None or tensor is None else self.writes.apart(place, tensor, look=True)

    def _lend(self, place: str, tensor: Tensor) -> Tensor:
        return tensor if self.writes is None else self.writes.apart(place, tensor, look=False)

    def runs(self, unit: int) -> bool:
        return str(unit) not in self.step.left_out

    def is_boundary(self, unit: int) -> bool:
        """Whether `enter` has something to store or to replace at this unit."""
        return str(unit) in self.step.boundaries

    def enter(self, unit: int, *streams: Any) -> tuple[Any, ...]:
        """The streams with which `unit` starts, before its fusion; with the number of units: those that leave the last
        one."""
        if not self.is_boundary(unit):
            return streams
        for portion in self.step.reuse:
            if portion.bounds is not None and portion.bounds[1] == unit:
                streams = self._take(portion, streams)
        for portion in (*self.step.store, *self.step.reuse):
            if portion.adds and portion.bounds is not None and portion.bounds[0] == unit:
                self.entered[unit] = tuple(self._keep(str(unit), stream) for stream in streams)
        for portion in self.step.store:
            if portion.bounds is not None and portion.bounds[1] == unit:
                before = self.entered[portion.bounds[0]] if portion.adds else ()
                for index, stream in enumerate(streams):
                    if stream is not None:  # the text stream may end within the last unit (SD3)
                        kept = stream - before[index] if portion.adds else self._keep(str(unit), stream)
                        self.stored[f"{portion.key}{index}"] = kept
        return streams

    def _take(self, portion: Portion, streams: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.given is not None
        assert portion.bounds is not None
        taken = []
        for index, stream in enumerate(streams):
            value = self.given.get(f"{portion.key}{index}")
            if value is None:
                taken.append(stream)
            else:
                entered = self.entered[portion.bounds[0]][index] if portion.adds else None
                taken.append(self._lend(str(portion.bounds[1]), value) if entered is None else entered + value)
        return tuple(taken)

    def leave(self, unit: int, hidden_states: Tensor) -> None:
        """Keeps the output of a source unit for its target, in this call and, where the unit may be left out while its
        target runs, for later ones."""
        target = self.links.num_units - 1 - unit
        if target not in self.links.sources:
            return
        hidden_states = self._keep(str(unit + 1), hidden_states)
        self.skips[unit] = hidden_states
        for portion in self.step.store:
            if portion.hands_on(unit, target):
                self.stored[f"{portion.key}skip {unit}"] = hidden_states

    def given_skip(self, unit: int) -> Tensor | None:
        """The output of a unit that is left out while the target of its skip runs."""
        for portion in self.step.reuse:
            if portion.hands_on(unit, self.links.num_units - 1 - unit):
                return None if self.given is None else self.given.get(f"{portion.key}skip {unit}")
        return None

    def skip(self, unit: int) -> Tensor | None:
        """The skip that `unit` takes, `None` where it has none."""
        source = self.links.sources.get(unit)
        if source is None:
            return None
        skip = self.skips[source] if source in self.skips else self.given_skip(source)
        if skip is None:
            raise ValueError(f"unit {unit} takes the skip of unit {source}, which was left out and is not stored")
        return skip

    def branch(self, kind: str, unit: int, place: str, make_input: Callable[[], Any], run: Callable[[Any], Any]) -> Any:
        """The output of one branch, a tensor or a tuple of them; stored, or reused without running it. place: names the
        branch within its unit."""
        key = f"{kind} {unit}.{place}"
        if any(portion.has_branch(kind, unit) for portion in self.step.reuse):
            assert self.given is not None
            if key in self.given:
                return self._lend(key, self.given[key])
            outputs = []
            while f"{key}.{len(outputs)}" in self.given:
                outputs.append(self._lend(key, self.given[f"{key}.{len(outputs)}"]))
            if not outputs:
                raise ValueError(f"the output of {kind} in unit {unit} was not stored")
            return tuple(outputs)
        entering = make_input()
        if any(portion.has_input(kind, unit) for portion in self.step.store):
            self.stored[f"input_of_{key}"] = self._keep(f"input_of_{key}", entering)
        output = run(entering)
        if any(portion.has_branch(kind, unit) for portion in self.step.store):
            if isinstance(output, Tensor):
                self.stored[key] = self._keep(key, output)
            else:
                for index, each in enumerate(output):
                    self.stored[f"{key}.{index}"] = self._keep(key, each)
        return output


@dataclass(frozen=True)
class BlockFlow:
    """The flow as one block of a unit sees it."""

    flow: LongSkipFlow
    unit: int
    block: int

    def branch(self, kind: BranchKind, make_input: Callable[[], Tensor], run: Callable[[Tensor], Tensor]) -> Tensor:
        return self.flow.branch(kind_in(kind, self.block), self.unit, str(self.block), make_input, run)
