"""Gives a transformer long skips, and takes them again.

Our own models fuse skips in their forward. A transformer of diffusers gets them by *class swap*: each of its blocks,
and the model itself, becomes an instance of a final subclass made from (mixin, its class). The keys of the weights
stay, the copy of a model is a model of its own, and `torch.compile` sees one plain forward. All models drive the same
`ForwardState`, so a cache treats them alike.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import FrozenDict
from einops import rearrange
from torch import Tensor, nn

from skipdit.models.branches import close_branches
from skipdit.models.class_swap import Remade, hooked, refuse_hooked, swap, swapped_class
from skipdit.models.families import Family, Segment, find_family, get_family
from skipdit.models.forward_plan import PLAIN, ForwardPlan, ForwardState, Stored, Writes, kind_in
from skipdit.models.long_skip import (
    BranchPlace,
    LongSkip,
    LongSkipConfig,
    LongSkipLinks,
    LongSkipModel,
    OpenCall,
    pair_segments,
    pair_units,
)
from skipdit.models.routing import ByToken
from skipdit.verbs import carry_out

# weights with long skips go into files of another name, so that the plain class of diffusers refuses the folder instead
# of leaving them out with a warning
LONG_SKIP_VARIANT = "long_skip"


@dataclass(frozen=True)
class BlockPlace:
    """Where a block stands: its unit, whether it is the unit's first block or the model's last, and where its streams
    are among its arguments.

    over_time: the block sees one patch over time, (b n) f d, not (b f) n d. joins: of the first block of a segment
    whose streams are joined, the indices of those, and that of the one with the tokens that may be routed. by_token:
    which of its other inputs have an entry per token.
    """

    unit: int
    is_entry: bool
    is_exit: bool
    over_time: bool
    streams: tuple[str, ...]
    fused: str
    positions: dict[str, int]
    joins: tuple[tuple[int, ...], int] | None
    by_token: Mapping[str, ByToken]

    def hand_on(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the streams among the arguments, as a block returns them."""
        streams = [kwargs[name] if name in kwargs else args[self.positions[name]] for name in self.streams]
        return streams[0] if len(streams) == 1 else tuple(streams)


class UnitBlock(Remade, nn.Module):
    """Mixed in front of a block's class. On the way in it stores or reuses the streams and fuses the skip; on a reuse
    step a block of a unit that does not run hands its streams on."""

    _place: BlockPlace
    _open: OpenCall
    long_skip: LongSkip | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state, place = self._open.state, self._place
        if state is None or place.unit not in state.plan.idle or self._is_hooked():
            return self._call_impl(*args, **kwargs)
        return place.hand_on(args, kwargs)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile what the block's own class computes, and nothing of what a plan says: blocks of one class share their
        graphs, and so do all steps. Under a plan that looks into branches a block runs without its graph."""
        compiled: Any = torch.compile(super().forward, *args, **options)
        compiled.options = args, options
        self._compiled_call_impl = compiled

    def _is_hooked(self) -> bool:
        return bool(self._forward_pre_hooks or self._forward_hooks or "forward" in self.__dict__)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        place, state = self._place, self._open.state
        if state is None:
            raise RuntimeError(
                f"this {type(self).__name__} belongs to unit {place.unit} of a model and runs only inside its forward"
            )
        compiled = None if state.plan.has_branches else self._compiled_call_impl
        if place.unit in state.plan.untouched and place.joins is None:
            return (compiled or super().forward)(*args, **kwargs)
        call = list(args)

        def get(name: str) -> Tensor:
            return kwargs[name] if name in kwargs else call[place.positions[name]]

        def put(name: str, value: Tensor) -> None:
            if name in kwargs:
                kwargs[name] = value
            else:
                call[place.positions[name]] = value

        if place.is_entry:
            if place.joins:
                state.join(*place.joins)
            state.arrive(place.unit, get(place.fused))
            if state.is_boundary(place.unit):
                routed = place.streams.index(place.fused)
                streams = state.enter(place.unit, *(get(name) for name in place.streams), routed=routed)
                for name, stream in zip(place.streams, streams, strict=True):
                    put(name, stream)
            self._open.num_tokens = get(place.fused).shape[1]
        if state.runs(place.unit):
            if state.tokens is not None and state.sees_kept(place.unit):
                for name, by_token in place.by_token.items():
                    if name in kwargs or place.positions[name] < len(call):
                        put(name, state.tokens.keep(get(name), by_token))
            if self.long_skip is not None:
                put(place.fused, self.long_skip(get(place.fused), state.skip(place.unit)))
            output = (compiled or super().forward)(*call, **kwargs)
        else:
            if place.is_entry:
                # a model that hands skips on by itself takes what leaves this unit for one (HunyuanDiT)
                skip = state.given_skip(place.unit)
                if skip is not None:
                    put(place.fused, skip)
            output = place.hand_on(call, kwargs)
        if place.is_exit and state.is_boundary(place.unit + 1):
            return _exit(state, place, output, self._open.num_tokens)
        return output


def _exit(state: ForwardState, place: BlockPlace, output: Any, num_tokens: int) -> Any:
    """Return what leaves the last unit, stored or replaced."""
    if place.over_time:
        num_frames = output.shape[1]
        output = rearrange(output, "(b n) f d -> (b f) n d", n=num_tokens)
        (output,) = state.enter(place.unit + 1, output)
        return rearrange(output, "(b f) n d -> (b n) f d", f=num_frames)
    if len(place.streams) == 1:
        return state.enter(place.unit + 1, output)[0]
    return state.enter(place.unit + 1, *output)


class RunsUnits(Remade, LongSkipModel):
    """Mixed in front of a transformer's class: opens a `ForwardState` for each forward call."""

    open_call: OpenCall  # pyright: ignore[reportIncompatibleVariableOverride]
    _family: Family
    _below: Any  # the class of diffusers; named, as super() cannot be compiled after a graph break up to torch 2.11

    def forward(self, *args: Any, plan: ForwardPlan = PLAIN, stored: Stored | None = None, **kwargs: Any) -> Any:
        if self.open_call.state is not None:
            raise RuntimeError("this model is in a forward call already: give each thread a copy.deepcopy of it")
        if plan.route is not None:
            self._family.check_route(type(self).__name__, self.long_skip_links.segment_starts, plan.route)
        state = ForwardState.begin(self, plan, stored)
        try:
            output = self._below.forward(self, *args, **kwargs)
        finally:
            self.open_call.state = None
        return state.finish(output)

    @property
    def shares_tokens(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._family.shares_tokens

    def segment_starts(self) -> tuple[int, ...]:
        sizes = [len(units) for units in _segments(cast(nn.Module, self), self._family)]
        return tuple(accumulate(sizes))[:-1]

    def units(self) -> list[tuple[nn.Module, ...]]:
        return _units(cast(nn.Module, self), self._family)

    def branches(self) -> list[BranchPlace]:
        return _branches(cast(nn.Module, self), self._family)

    def enable_cache(self, spec: Any) -> None:
        """As `skipdit.enable_cache(model, spec)`; a config of diffusers goes to the model's own caches."""
        theirs = getattr(super(LongSkipModel, self), "enable_cache", None)
        if theirs is None or not type(spec).__module__.startswith("diffusers."):
            super().enable_cache(spec)
        elif self.is_cache_enabled:
            raise ValueError("a cache is enabled on this model: call model.disable_cache() first")
        else:
            theirs(spec)

    @property
    def is_cache_enabled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of diffusers is; the class of a cache of ours says so itself."""
        return bool(getattr(super(LongSkipModel, self), "is_cache_enabled", False))

    def disable_cache(self) -> None:
        """As `skipdit.disable_cache(model)`; a cache of diffusers goes too."""
        theirs = cast(Any, super(LongSkipModel, self))
        if getattr(theirs, "is_cache_enabled", False):
            theirs.disable_cache()
        super().disable_cache()

    # diffusers hands a block and its arguments to this function; a block that runs again in the backward pass must
    # find the state of its own forward call, of which several may be open by then
    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        checkpoint, open_call = self.__dict__["_gradient_checkpointing_func"], self.open_call

        def in_this_call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return checkpoint(_InCall(open_call, open_call.state, block), *args, **kwargs)

        return in_this_call

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, value: Callable[..., Any]) -> None:
        self.__dict__["_gradient_checkpointing_func"] = value

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        safe_serialization: bool = True,
        max_shard_size: int | str = "10GB",
        **options: Any,
    ) -> None:
        """As in diffusers; with long skips of ours the weights' file says `long_skip`, and `skipdit.load_model` or
        `long_skip_class(...).from_pretrained` reads it."""
        model = cast(Any, self)
        if model.config.get("long_skip") is not None:
            if options.get("variant") is not None or not safe_serialization:
                raise ValueError("weights with long skips are saved as safetensors of the variant 'long_skip' only")
            options["variant"] = LONG_SKIP_VARIANT
        cast(Any, super()).save_pretrained(
            save_directory, safe_serialization=safe_serialization, max_shard_size=max_shard_size, **options
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, subfolder: str = "", dtype: torch.dtype = torch.float32
    ) -> Any:
        """The model that `save_pretrained` wrote, on the CPU, in eval mode. `ValueError` where the folder holds no long
        skips, or keys are missing, unknown or misshapen."""
        return carry_out("load_with_long_skips", _plain_class(cls), Path(folder) / subfolder, dtype)

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **options: Any) -> Any:
        """As in diffusers; with long skips where the config has `long_skip`."""
        plain = cast(Any, _plain_class(cls))
        fields = dict(config if isinstance(config, Mapping) else plain.load_config(config))
        long_skip, shallow_path = fields.pop("long_skip", None), fields.pop("shallow_path", None)
        model, unused = plain.from_config(fields, return_unused_kwargs=True, **options)
        if shallow_path is not None:
            model.register_to_config(shallow_path=shallow_path)
        if long_skip is not None:
            add_long_skips(model, LongSkipConfig.from_dict(long_skip))
        return (model, unused) if return_unused_kwargs else model


@dataclass(frozen=True)
class _InCall:
    """Calls a block inside a given forward call."""

    open_call: OpenCall
    state: ForwardState | None
    block: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outer, self.open_call.state = self.open_call.state, self.state
        try:
            return self.block(*args, **kwargs)
        finally:
            self.open_call.state = outer


# ----------------------------------------------------------------------------------------------------------------------
# The swap


@lru_cache
def _block_class(base: type[nn.Module]) -> type[UnitBlock]:
    return swapped_class(UnitBlock, base, _made_by=(_block_class, base))


def long_skip_class(base: type[nn.Module]) -> Any:
    """The class that a transformer of this class becomes with long skips; its `from_pretrained` reads what such a model
    saved. `ValueError` where skipdit does not know the class's units."""
    get_family(base)
    return _running_class(base)


@lru_cache
def _running_class(base: type[nn.Module]) -> Any:
    signature = inspect.signature(base.forward)
    own = [
        parameter
        for name, parameter in inspect.signature(RunsUnits.forward).parameters.items()
        if name in ("plan", "stored")
    ]
    *theirs, last = signature.parameters.values()
    positional = [*theirs, last] if last.kind is not inspect.Parameter.VAR_KEYWORD else theirs
    parameters = [*positional, *own] if positional[-1] is last else [*positional, *own, last]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return RunsUnits.forward(self, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return swapped_class(RunsUnits, base, forward=forward, _below=base, _made_by=(_running_class, base))


def _plain_class(model_class: type) -> type[nn.Module]:
    """The class of diffusers below the mixin, also where a cache's class is on top of it."""
    return next(base.__bases__[1] for base in model_class.__mro__ if base.__bases__[:1] == (RunsUnits,))


def _segments(model: nn.Module, family: Family) -> list[list[tuple[nn.Module, ...]]]:
    """Return the units of each segment."""
    found = []
    for segment in family.segments:
        lists = [cast(Iterable[nn.Module], model.get_submodule(name)) for name in segment.lists]
        found.append(list(zip(*lists, strict=True)))
    return found


def _units(model: nn.Module, family: Family) -> list[tuple[nn.Module, ...]]:
    return [unit for units in _segments(model, family) for unit in units]


def num_units_of(model: nn.Module) -> int:
    """Return the number of units of one of our models, or of a transformer of diffusers, open or not."""
    if isinstance(model, LongSkipModel):
        return model.long_skip_links.num_units
    return len(_units(model, get_family(type(model))))


def _branches(model: nn.Module, family: Family) -> list[BranchPlace]:
    found, unit = [], 0
    for segment, units in zip(family.segments, _segments(model, family), strict=True):
        for blocks in units:
            for number, block in enumerate(blocks):
                children = dict(block.named_modules())
                found += [
                    BranchPlace(kind_in(kind, number), unit, f"{number}.{name}", children[name])
                    for kind, names in segment.branches.items()
                    for name in names
                    if name in children
                ]
            unit += 1
    return found


def _native_links(num_units: int) -> LongSkipLinks:
    return LongSkipLinks(num_units, pair_units(num_units, LongSkipConfig(middle_pair=False)))


def open_units(model: nn.Module) -> None:
    """Make a transformer of diffusers run its units under a `ForwardState`, with no new weights and the same output.

    `ValueError` where its family is unknown or does not fit, hooks are on its forward (offloading: set it up
    afterwards), or its blocks are compiled. The model is then what it was.
    """
    if isinstance(model, LongSkipModel):
        return
    family = get_family(type(model))
    segments = _segments(model, family)
    units = _units(model, family)
    refuse_hooked((model, *(block for blocks in units for block in blocks)))
    if any(block._compiled_call_impl is not None for blocks in units for block in blocks):
        raise ValueError(f"blocks of this {type(model).__name__} are compiled: call skipdit first, then compile them")
    writes = None if family.writes_in_place is False else Writes(always=family.writes_in_place is True)
    model_class, open_call, places = long_skip_class(type(model)), OpenCall(writes=writes), []
    for number, (segment, members) in enumerate(zip(family.segments, segments, strict=True)):
        joins = None
        if segment.joins:
            before = family.segments[number - 1]
            joins = tuple(map(before.streams.index, segment.joins)), before.streams.index(before.fused_stream)
        for position, blocks in enumerate(members):
            unit = len(places)
            places.append(
                [
                    BlockPlace(
                        unit=unit,
                        is_entry=block is blocks[0],
                        is_exit=unit == len(units) - 1 and block is blocks[-1],
                        over_time=block is not blocks[0],
                        streams=segment.streams,
                        fused=segment.fused_stream,
                        positions=_positions(block, segment),
                        joins=joins if position == 0 and block is blocks[0] else None,
                        by_token={
                            name: by_token
                            for name, by_token in (segment.by_token or {}).items()
                            if by_token.of_rows == (block is not blocks[0])
                        },
                    )
                    for block in blocks
                ]
            )
    for blocks, block_places in zip(units, places, strict=True):
        for block, place in zip(cast(tuple[Any, ...], blocks), block_places, strict=True):
            swap(block, _block_class(type(block)))
            block._place, block._open, block.long_skip = place, open_call, None
    opened = cast(Any, model)
    swap(opened, model_class)
    opened.open_call, opened._family, opened.timestep_scale = open_call, family, family.timestep_scale
    opened.fill_token = None
    starts = opened.segment_starts()
    opened.long_skip_links = _native_links(len(units)) if family.native_pairs else LongSkipLinks(len(units), {}, starts)


def _positions(block: nn.Module, segment: Segment) -> dict[str, int]:
    """Return where a block's forward takes its streams and what is by token. `ValueError` where it has no argument of
    such a name."""
    names, found = list(inspect.signature(type(block).forward).parameters)[1:], {}
    for what, wanted in (("streams", segment.streams), ("by_token", segment.by_token or ())):
        for name in wanted:
            if name not in names:
                raise ValueError(
                    f"{what} must be arguments of {type(block).__name__}.forward ({', '.join(names)}), got {name!r}"
                )
            found[name] = names.index(name)
    return found


def close_units(model: nn.Module) -> None:
    """Undo `open_units`; `ValueError` where the model has long skips of ours. Where hooks were set on the open units,
    or `fully_shard` has put its classes on top, they stay open, which changes no output."""
    if not isinstance(model, RunsUnits):
        return
    blocks = cast(list[Any], [block for blocks in model.units() for block in blocks])
    if hooked((model, *blocks)) is not None:
        return
    if any(type(module).__bases__[0] not in (RunsUnits, UnitBlock) for module in (model, *blocks)):
        return
    if any(block.long_skip is not None for block in model.unit_entries()):
        raise ValueError("this model has long skips: call skipdit.remove_long_skips(model)")
    close_branches(model)
    for block in blocks:
        del block._place, block._open, block.long_skip
        swap(block, type(block).__bases__[1])
        if block._compiled_call_impl is not None:
            args, options = block._compiled_call_impl.options
            block.compile(*args, **options)
    del model.open_call, model._family, model.timestep_scale, model.long_skip_links, model.fill_token
    swap(model, type(model).__bases__[1])


# ----------------------------------------------------------------------------------------------------------------------
# Long skips


def add_long_skips(model: nn.Module, config: LongSkipConfig | None = None) -> None:
    """Gives a model fresh long skips, in place, and keeps its weights.

    With `fusion="residual"` (a zero projection added to the hidden states) the output stays bit-equal until it is
    trained; with the paper's `"replace"` the projections must be trained first, alone (`skipdit train --stage
    long-skips-only`). The new weights have the dtype and device of the blocks, and are in `model.config.long_skip`.

    `ValueError` where the model has long skips already, as HunyuanDiT has by itself, its units are unknown, or `config`
    links no pair, or more than there are; the model is then what it was.
    """
    _refuse_cached(model)
    config = config or LongSkipConfig()
    family = find_family(type(model))
    if family is not None and family.native_pairs:
        raise ValueError(
            f"{type(model).__name__} has long skips of its own: call skipdit.enable_cache(model, ...) right away"
        )
    if not isinstance(model, LongSkipModel) and family is not None and "long_skip" in cast(Any, model).config:
        raise ValueError(f"the config of {type(model).__name__} has an entry 'long_skip' of its own")
    if isinstance(model, LongSkipModel) and model.long_skip_links.sources:
        raise ValueError("this model has long skips already: call skipdit.remove_long_skips(model) first")
    if isinstance(model, LongSkipModel):
        sizes = [model.long_skip_links.num_units]
    else:
        sizes = [len(units) for units in _segments(model, get_family(type(model)))]
    if not pair_segments(sizes, config):
        raise ValueError(
            f"there must be a pair to link, got num_pairs {config.num_pairs} for segments of {sizes} units"
        )
    hidden_size = 1
    for name in family.hidden_size if family else ("num_attention_heads", "attention_head_dim"):
        hidden_size *= cast(Any, model).config[name]
    open_units(model)
    linked = cast(Any, model)
    linked.set_long_skips(hidden_size, config)
    for block in linked.unit_entries():
        if block.long_skip is not None:
            # the model's dtype: a block's first parameter may be one that stays in float32 (Wan)
            block.long_skip.to(next(block.parameters()).device, linked.dtype).train(model.training)
    if linked.fill_token is not None:
        first = next(model.parameters())
        linked.fill_token.data = linked.fill_token.data.to(first.device, linked.dtype)
    linked.register_to_config(long_skip=config.to_dict())


def add_fill_token(model: nn.Module) -> None:
    """Give a model with long skips of ours a fill token, as `LongSkipConfig(fill_token=True)` does, where it has none.

    `ValueError` where it has no long skips of ours.
    """
    linked = cast(Any, model)
    if not isinstance(model, LongSkipModel) or linked.config.get("long_skip") is None:
        raise ValueError(f"a fill token needs long skips that skipdit added: this {type(model).__name__} has none")
    if model.fill_token is None:
        long_skip = next(block.long_skip for block in cast(list[Any], model.unit_entries()) if block.long_skip)
        model.fill_token = nn.Parameter(torch.zeros_like(long_skip.proj.weight[:, 0]))
        linked.register_to_config(long_skip={**linked.config["long_skip"], "fill_token": True})


def remove_long_skips(model: nn.Module) -> None:
    """The model without its long skips, in place; a transformer of diffusers is what it was before `add_long_skips`.
    `ValueError` where it has none of ours."""
    if not isinstance(model, LongSkipModel) or not model.long_skip_links.sources:
        raise ValueError(f"this {type(model).__name__} has no long skips that skipdit added")
    _refuse_cached(model)
    linked = cast(Any, model)
    if isinstance(model, RunsUnits):
        if model._family.native_pairs:
            raise ValueError(f"the long skips of {type(model).__name__} are its own")
        found = hooked((model, *(block for blocks in model.units() for block in blocks)))
        if found is not None:
            raise ValueError(f"hooks are on the forward of this {type(found).__name__}: remove them first")
        for block in cast(list[Any], model.unit_entries()):
            block.long_skip = None
        linked.fill_token = None
        close_units(model)
        linked._internal_dict = FrozenDict({k: v for k, v in linked.config.items() if k != "long_skip"})
    else:
        linked.set_long_skips(0, None)
        linked.register_to_config(long_skip=None)


def _refuse_cached(model: nn.Module) -> None:
    """The class of a cache stands on the class that would be swapped."""
    if "_skipdit_cache" in vars(model):
        raise ValueError("a cache is enabled on this model: call skipdit.disable_cache(model) first")
