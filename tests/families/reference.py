"""What a reuse step must give, by plain hooks on a plain model: an oracle that knows nothing of skipdit.

A full step runs everything and keeps what the units `first` to `last - 1` put out. A reuse step leaves these units out:
each gives what it gave at the full step, so that whatever the model's forward does between its blocks finds tensors of
the right kind, and the last of them decides what goes on:

- mode "output": what it put out at the full step;
- mode "delta": the streams that enter `first` today, plus what the units changed about them at the full step.

Where the model adds something behind a unit (ControlNet residuals, hints, adapters), `at` tells what is stored:
"leaving": the output of unit `last - 1` itself, so that today's addition comes on top; "entering": what enters unit
`last`, the addition of the full step included. Without such additions both are the same.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from families.table import TinyTransformer, tensors

Streams = tuple[Tensor | None, ...]

# what they attend with cannot run under torch's counter of operations on a CPU
UNCOUNTED = ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel")


def arguments_of(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    return inspect.signature(type(block).forward).bind(block, *args, **kwargs)


def clone(value: Any) -> Any:
    """Of tensors in tuples, lists and dictionaries: what a block put out may be written to behind it."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(clone(each) for each in value)
    return value


class Reference:
    """Full and reuse steps of `model` that leave out the units `first` to `last - 1` of all segments."""

    def __init__(
        self,
        tiny: TinyTransformer,
        model: nn.Module,
        first: int,
        last: int,
        mode: Literal["output", "delta"] = "output",
        at: Literal["leaving", "entering"] = "leaving",
    ) -> None:
        self.tiny, self.model, self.first, self.last, self.mode = tiny, model, first, last, mode
        self.units = tiny.units(model)
        assert 0 <= first < last <= len(self.units)
        self.entering = at == "entering" and last < len(self.units)
        self.outputs: dict[nn.Module, Any] = {}  # by block, as it returned them at the full step
        self.entered: dict[int, Streams] = {}  # by unit, at the full step
        self.entered_today: Streams = ()

    def full(self, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """A step that runs all and stores."""
        with self._recording(self.entered, self.first, self.last), self._keeping_outputs():
            return self._run(kwargs)

    def reuse(self, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """A step that leaves the units out."""
        assert self.outputs, "a full step comes first"
        with self._leaving_out(), self._replacing():
            return self._run(kwargs)

    def _run(self, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.tiny.outputs(self.model(**kwargs))

    def _names(self, unit: int) -> tuple[str, ...]:
        return self.tiny.segments[self.tiny.segment_of(self.model, unit)].streams

    def _streams(self, unit: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        given = arguments_of(self.units[unit][0], args, kwargs).arguments
        return tuple(given[name] for name in self._names(unit))

    @contextmanager
    def _recording(self, entered: dict[int, Streams], *units: int) -> Iterator[None]:
        def record(unit: int) -> Callable[..., None]:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                entered[unit] = clone(self._streams(unit, args, kwargs))

            return hook

        hooks = [
            self.units[unit][0].register_forward_pre_hook(record(unit), with_kwargs=True)
            for unit in units
            if unit < len(self.units)
        ]
        yield
        for hook in hooks:
            hook.remove()

    @contextmanager
    def _keeping_outputs(self) -> Iterator[None]:
        def keep(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.outputs[block] = clone(output)

        blocks = [block for unit in self.units[self.first : self.last] for block in unit]
        hooks = [block.register_forward_hook(keep) for block in blocks]
        yield
        for hook in hooks:
            hook.remove()

    @contextmanager
    def _leaving_out(self) -> Iterator[None]:
        """The blocks' work is not done; their calls, and all between them, are."""
        first_block, last_block = self.units[self.first][0], self.units[self.last - 1][-1]

        def stand_in(block: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if block is first_block:
                    self.entered_today = clone(self._streams(self.first, args, kwargs))
                if block is last_block and self.mode == "delta" and not self.entering:
                    return self._with_delta(clone(self.outputs[block]))
                return clone(self.outputs[block])

            return forward

        blocks = [block for unit in self.units[self.first : self.last] for block in unit]
        for block in blocks:
            block.forward = stand_in(block)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    @contextmanager
    def _replacing(self) -> Iterator[None]:
        """At the entry of unit `last`, where that is what was stored."""

        def replace(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            streams = clone(self.entered[self.last])
            if self.mode == "delta":
                streams = self._changed(self.last, streams)
            bound = arguments_of(block, args, kwargs)
            bound.arguments.update(zip(self._names(self.last), streams, strict=True))
            return bound.args[1:], bound.kwargs

        hooks = []
        if self.entering:
            hooks.append(self.units[self.last][0].register_forward_pre_hook(replace, with_kwargs=True))
        yield
        for hook in hooks:
            hook.remove()

    def _with_delta(self, output: Any) -> Any:
        """What the last unit that is left out puts out: today's streams with the change of the full step."""
        if isinstance(output, Tensor):
            return self._changed(self.last - 1, (output,))[0]
        return self._changed(self.last - 1, tuple(output))

    def _changed(self, unit: int, stored: Streams) -> Streams:
        """Streams in the form that `unit` has; `stored` are those of the full step."""
        before = self._carry(self.entered[self.first], unit, stored)
        today = self._carry(self.entered_today, unit, stored)
        return tuple(
            None if late is None else now + (late - early)
            for now, late, early in zip(today, stored, before, strict=True)
        )

    def _carry(self, streams: Streams, unit: int, like: Streams) -> Streams:
        """What entered unit `first`, in the form that streams have at `unit`: joined where the model joins them."""
        here = self.tiny.segment_of(self.model, self.first)
        there = self.tiny.segment_of(self.model, unit)
        for index in range(here + 1, there + 1):
            named = dict(zip(self.tiny.segments[index - 1].streams, streams, strict=True))
            segment = self.tiny.segments[index]
            if segment.joins:
                streams = (torch.cat([named[name] for name in segment.joins], dim=1),)
            else:
                streams = tuple(named[name] for name in segment.streams)
        align = self.tiny.segments[there].align
        if align is not None and not self.entering:
            streams = tuple(align(stream, late) for stream, late in zip(streams, like, strict=True))
        return streams


@contextmanager
def _counting(model: nn.Module) -> Iterator[FlopCounterMode]:
    """The counter follows modules by their gradients, which views of parameters (BRIA FIBO 2) lack here."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counter = FlopCounterMode(display=False)
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad(), counter:
            yield counter
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def count_flops(model: nn.Module, run: Callable[[], Any]) -> int:
    """Floating-point operations of what `run` does with `model`. Not for flex attention: see `UNCOUNTED`."""
    with _counting(model) as counter:
        run()
    return counter.get_total_flops()


def counted_flops(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """Of one whole forward."""
    return count_flops(model, lambda: model(**kwargs))


def unit_flops(tiny: TinyTransformer, model: nn.Module, kwargs: dict[str, Any]) -> list[int]:
    """Of each unit, in one forward; what lies between the blocks of a unit is not counted."""
    counts = []
    hooks = []
    with _counting(model) as counter:

        def start(block: nn.Module, args: tuple[Any, ...]) -> None:
            counts[-1] -= counter.get_total_flops()

        def end(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            counts[-1] += counter.get_total_flops()

        for unit in tiny.units(model):
            hooks.append(unit[0].register_forward_pre_hook(lambda block, args: counts.append(0)))
            for block in unit:
                hooks += [block.register_forward_pre_hook(start), block.register_forward_hook(end)]
        model(**kwargs)
    for hook in hooks:
        hook.remove()
    return counts


def largest_difference(first: Any, second: Any) -> float:
    """Between the tensors of two outputs."""
    pairs = zip(tensors(first), tensors(second), strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


class BranchReference:
    """Full and reuse steps that take the outputs of branches, by name modules of the units' blocks, from full
    steps: as they were, or with `order` 1 along the line through the last two."""

    def __init__(self, tiny: TinyTransformer, model: nn.Module, names: Iterable[str], order: int = 0) -> None:
        self.tiny, self.model, self.order = tiny, model, order
        blocks = [block for unit in tiny.units(model) for block in unit]
        self.branches = [child for block in blocks for name, child in block.named_modules() if name in names]
        # by module, of each of its calls in one forward
        self.last: dict[nn.Module, list[Any]] = {}
        self.before: dict[nn.Module, list[Any]] = {}
        self.distance, self.age = 0, 0

    def full(self, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        self.before, self.last = self.last, {branch: [] for branch in self.branches}
        self.distance, self.age = self.age + 1, 0

        def keep(branch: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.last[branch].append(clone(output))

        return self._run(keep, kwargs)

    def reuse(self, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        self.age += 1
        numbers: Counter[nn.Module] = Counter()

        def replace(branch: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            number, numbers[branch] = numbers[branch], numbers[branch] + 1
            value = self.last[branch][number]
            if self.order and self.before:
                return self._along(value, self.before[branch][number])
            return clone(value)

        return self._run(replace, kwargs)

    def _along(self, value: Any, before: Any) -> Any:
        if isinstance(value, Tensor):
            return value + (value - before) / self.distance * self.age
        return type(value)(None if a is None else self._along(a, b) for a, b in zip(value, before, strict=True))

    def _run(self, hook: Callable[..., Any], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        handles = [branch.register_forward_hook(hook) for branch in self.branches]
        with torch.no_grad():
            outputs = self.tiny.outputs(self.model(**kwargs))
        for handle in handles:
            handle.remove()
        return outputs
