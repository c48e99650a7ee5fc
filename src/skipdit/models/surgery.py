"""Adds long skips to a transformer and removes them.

Our own models fuse skips in their forward. A transformer of diffusers gets them by a *class swap*: each of its blocks,
and the model itself, becomes an instance of a final subclass of (mixin, its class). Weight keys stay the same, a copy
of the model is independent, and `torch.compile` sees one plain forward. All models drive the same `ForwardState`, so a
cache treats them alike.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from skipdit.interfaces import Config, Transformer
from skipdit.models.branches import close_branches
from skipdit.models.class_swap import SwapMixin, hooked, refuse_hooked, swap, swapped_class
from skipdit.models.families import Family, Segment, find_family, get_family
from skipdit.models.forward_plan import PLAIN, ForwardPlan, ForwardState, Stored, Writes, kind_in
from skipdit.models.long_skip import (
    BranchInfo,
    LinkedBlock,
    LongSkipConfig,
    LongSkipModel,
    OpenCall,
    pair_segments,
)
from skipdit.models.unit_block import UnitBlock, UnitBlockInfo
from skipdit.verbs import carry_out

# weights with long skips are saved under another file name, so that the plain class of diffusers rejects the folder
# instead of dropping the skips with a warning
LONG_SKIP_VARIANT = "long_skip"


class RunsUnits(SwapMixin, LongSkipModel):
    """Mixin for a transformer's class that begins a `ForwardState` for each forward call."""

    open_call: OpenCall  # pyright: ignore[reportIncompatibleVariableOverride]
    _family: Family
    _below: Transformer  # the class of diffusers: up to torch 2.11, super() cannot be compiled after a graph break

    def forward(self, *args: object, plan: ForwardPlan = PLAIN, stored: Stored | None = None, **kwargs: object) -> Any:
        if self.open_call.state is not None:
            raise RuntimeError("this model is already in a forward call: give each thread its own copy.deepcopy of it")
        if plan.route is not None:
            self._family.check_route(type(self).__name__, self.long_skip_links.segment_starts, plan.route)
        state = ForwardState.begin(self, plan, stored)
        try:
            output = self._below.forward(self, *args, **kwargs)
        finally:
            self.open_call.state = None
        if not self.open_call.aside or not plan.units:
            return state.finish(output)
        _, self.open_call.stored = state.finish(output)
        return output

    @property
    def shares_tokens(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._family.shares_tokens

    def segment_sizes(self) -> list[int]:
        return [len(units) for units in _segments(self, self._family)]

    def units(self) -> list[tuple[LinkedBlock, ...]]:
        segments = _segments(self, self._family)
        return cast(list[tuple[LinkedBlock, ...]], [blocks for units in segments for blocks in units])

    def branches(self) -> list[BranchInfo]:
        segments = zip(self._family.segments, _segments(self, self._family), strict=True)
        units = [(segment, blocks) for segment, units in segments for blocks in units]
        return [
            BranchInfo(kind_in(kind, number), unit, f"{number}.{name}", children[name])
            for unit, (segment, blocks) in enumerate(units)
            for number, children in enumerate(dict(block.named_modules()) for block in blocks)
            for kind, names in segment.branches.items()
            for name in names
            if name in children
        ]

    def enable_cache(self, spec: object) -> None:
        """Call `skipdit.enable_cache(model, spec)`, or enable a cache of diffusers if `spec` is one of its configs."""
        enable = getattr(super(LongSkipModel, self), "enable_cache", None)
        if enable is None or not type(spec).__module__.startswith("diffusers."):
            super().enable_cache(spec)
        elif self.is_cache_enabled:
            raise ValueError("a cache is enabled on this model: call model.disable_cache() first")
        else:
            enable(spec)

    @property
    def is_cache_enabled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return true if a cache of diffusers is enabled; the class of our cache overrides this."""
        return bool(getattr(super(LongSkipModel, self), "is_cache_enabled", False))

    def disable_cache(self) -> None:
        """Call `skipdit.disable_cache(model)`, and also disable a cache of diffusers."""
        mixin: Transformer = super(LongSkipModel, self)
        if getattr(mixin, "is_cache_enabled", False):
            mixin.disable_cache()
        super().disable_cache()

    # diffusers calls this function with a block and its arguments; a block that runs again in the backward pass must
    # find the state of its own forward call, and by then several calls may be open
    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        checkpoint, open_call = self.__dict__["_gradient_checkpointing_func"], self.open_call

        def in_this_call(block: nn.Module, *args: object, **kwargs: object) -> Any:
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
        **options: object,
    ) -> None:
        """Save as diffusers does. If skipdit added long skips, the name of the weight file contains `long_skip`;
        `skipdit.load_model` and `long_skip_class(...).from_pretrained` read it."""
        if self.config.get("long_skip") is not None:
            if options.get("variant") is not None or not safe_serialization:
                raise ValueError("weights with long skips can be saved only as safetensors of the variant 'long_skip'")
            options["variant"] = LONG_SKIP_VARIANT
        plain: Transformer = super()
        plain.save_pretrained(
            save_directory, safe_serialization=safe_serialization, max_shard_size=max_shard_size, **options
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, subfolder: str = "", dtype: torch.dtype = torch.float32
    ) -> Transformer:
        """Load a model that `save_pretrained` wrote, on the CPU, in eval mode. Raises `ValueError` if the folder holds
        no long skips, or if keys are missing, unknown or misshapen."""
        return carry_out("load_with_long_skips", _plain_class(cls), Path(folder) / subfolder, dtype)

    @classmethod
    def from_config(cls, config: Config, return_unused_kwargs: bool = False, **options: object) -> Transformer:
        """Build as diffusers does, with long skips if the config has `long_skip`."""
        plain: Transformer = _plain_class(cls)
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
    """Calls a block with the state of a given forward call."""

    open_call: OpenCall
    state: ForwardState | None
    block: nn.Module

    def __call__(self, *args: object, **kwargs: object) -> Any:
        outer, self.open_call.state = self.open_call.state, self.state
        try:
            return self.block(*args, **kwargs)
        finally:
            self.open_call.state = outer


# ----------------------------------------------------------------------------------------------------------------------
# The swap


@lru_cache
def _block_class(base: type[nn.Module]) -> type[UnitBlock]:
    def forward(self: Transformer, *args: object, **kwargs: object) -> object:
        return UnitBlock.forward(self, *args, **kwargs)

    # context parallelism of diffusers splits arguments by their names
    forward.__signature__ = inspect.signature(base.forward)  # pyright: ignore[reportFunctionMemberAccess]
    return swapped_class(UnitBlock, base, forward=forward, _made_by=(_block_class, base))


def long_skip_class(base: type[nn.Module]) -> type[RunsUnits]:
    """Return the class that a transformer of this class has once it has long skips; its `from_pretrained` reads what
    such a model saved. Raises `ValueError` if skipdit does not know the units of `base`."""
    get_family(base)
    return _running_class(base)


@lru_cache
def _running_class(base: type[nn.Module]) -> type[RunsUnits]:
    signature = inspect.signature(base.forward)
    plan_parameters = [
        parameter
        for name, parameter in inspect.signature(RunsUnits.forward).parameters.items()
        if name in ("plan", "stored")
    ]
    *first, last = signature.parameters.values()
    positional = [*first, last] if last.kind is not inspect.Parameter.VAR_KEYWORD else first
    parameters = [*positional, *plan_parameters] if positional[-1] is last else [*positional, *plan_parameters, last]

    def forward(self: Transformer, *args: object, **kwargs: Any) -> object:
        return RunsUnits.forward(self, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return swapped_class(RunsUnits, base, forward=forward, _below=base, _made_by=(_running_class, base))


def _plain_class(model_class: type) -> type[nn.Module]:
    """Return the class of diffusers below the mixin, even if a cache's class is on top of it."""
    return next(base.__bases__[1] for base in model_class.__mro__ if base.__bases__[:1] == (RunsUnits,))


def _segments(model: nn.Module, family: Family) -> list[list[tuple[nn.Module, ...]]]:
    """Return the units of each segment."""
    segments = []
    for segment in family.segments:
        lists = [cast(Iterable[nn.Module], model.get_submodule(name)) for name in segment.lists]
        segments.append(list(zip(*lists, strict=True)))
    return segments


def segment_sizes_of(model: nn.Module) -> list[int]:
    """Return the number of units per segment of one of our models, or of a transformer of diffusers, open or not."""
    linked = LongSkipModel.find(model)
    if linked is not None:
        return linked.segment_sizes()
    return [len(units) for units in _segments(model, get_family(type(model)))]


def open_units(model: nn.Module) -> LongSkipModel:
    """Make a transformer of diffusers run its units under a `ForwardState`, and return it; its weights and output stay
    the same.

    Raises `ValueError` if its family is unknown or does not fit, its forward is hooked (set up offloading afterwards),
    or its blocks are compiled. The model is then unchanged.
    """
    linked = LongSkipModel.find(model)
    if linked is not None:
        return linked
    family, model_class = get_family(type(model)), long_skip_class(type(model))
    blocks = list(_block_infos(family, _segments(model, family)))
    refuse_hooked((model, *(block for block, _ in blocks)))
    if any(block._compiled_call_impl is not None for block, _ in blocks):
        raise ValueError(f"blocks of this {type(model).__name__} are compiled: call skipdit first, then compile them")
    writes = None if family.writes_in_place is False else Writes(always=family.writes_in_place is True)
    open_call = OpenCall(writes=writes)
    for block, info in blocks:
        swap(block, _block_class(type(block)))
        unit_block = cast(UnitBlock, block)
        unit_block._info, unit_block._open, unit_block.long_skip = info, open_call, None
    swap(model, model_class)
    open_model = cast(RunsUnits, model)
    open_model.open_call, open_model._family, open_model.timestep_scale = open_call, family, family.timestep_scale
    open_model.fill_token = None
    native = LongSkipConfig(middle_pair=False) if family.native_pairs else None
    open_model.set_links(pair_segments(open_model.segment_sizes(), native))
    return open_model


def _block_infos(
    family: Family, segments: list[list[tuple[nn.Module, ...]]]
) -> Iterator[tuple[nn.Module, UnitBlockInfo]]:
    """Yield each block with its position. Raises `ValueError` if the family does not fit."""
    num_units, unit = sum(map(len, segments)), 0
    for number, (segment, units) in enumerate(zip(family.segments, segments, strict=True)):
        joins = None
        if segment.joins:
            before = family.segments[number - 1]
            joins = tuple(map(before.streams.index, segment.joins)), before.streams.index(before.fused_stream)
        for blocks in units:
            for block in blocks:
                is_entry = block is blocks[0]
                inputs = (segment.by_token or {}).items()
                yield (
                    block,
                    UnitBlockInfo(
                        unit=unit,
                        is_entry=is_entry,
                        is_exit=unit == num_units - 1 and block is blocks[-1],
                        streams=segment.streams,
                        fused=segment.fused_stream,
                        positions=_positions(block, segment),
                        joins=joins if is_entry else None,
                        by_token={name: by_token for name, by_token in inputs if by_token.of_rows != is_entry},
                    ),
                )
            unit, joins = unit + 1, None


def _positions(block: nn.Module, segment: Segment) -> dict[str, int]:
    """Return the positions of a block's streams and per-token inputs among its arguments. Raises `ValueError` if it has
    no argument of such a name."""
    names, positions = list(inspect.signature(type(block).forward).parameters)[1:], {}
    for role, arguments in (("streams", segment.streams), ("by_token", segment.by_token or ())):
        for name in arguments:
            if name not in names:
                raise ValueError(
                    f"{role} must be arguments of {type(block).__name__}.forward ({', '.join(names)}), got {name!r}"
                )
            positions[name] = names.index(name)
    return positions


def close_units(model: nn.Module) -> None:
    """Undo `open_units`. Units that have since been hooked or given another class (`fully_shard`) stay open, which does
    not change outputs. Raises `ValueError` if the model has long skips that skipdit added."""
    swapped = RunsUnits.find(model)
    if swapped is None:
        return
    blocks = [cast(UnitBlock, block) for blocks in swapped.units() for block in blocks]
    if hooked((swapped, *blocks)) is not None:
        return
    if any(type(module).__bases__[0] not in (RunsUnits, UnitBlock) for module in (swapped, *blocks)):
        return
    if any(block.long_skip is not None for block in swapped.unit_entries()):
        raise ValueError("this model has long skips: call skipdit.remove_long_skips(model)")
    close_branches(swapped)
    for block in blocks:
        del block._info, block._open, block.long_skip
        compiled: Any = block._compiled_call_impl
        swap(block, type(block).__bases__[1])
        if compiled is not None:
            args, options = compiled.options
            block.compile(*args, **options)
    del swapped.open_call, swapped._family, swapped.timestep_scale, swapped.long_skip_links, swapped.fill_token
    swap(swapped, type(swapped).__bases__[1])


# ----------------------------------------------------------------------------------------------------------------------
# Long skips


def add_long_skips(model: nn.Module, config: LongSkipConfig | None = None) -> None:
    """Add fresh long skips to a model, in place, and keep its weights.

    With `fusion="residual"` (a zero projection added to the hidden states) the output stays bit-equal until the skips
    are trained. With the paper's `"replace"`, train the projections alone first (`skipdit train --stage
    long-skips-only`). The new weights have the dtype and device of the blocks; `model.config.long_skip` holds `config`.

    Raises `ValueError` if the model already has long skips, as every HunyuanDiT does, if its units are unknown, or if
    `config` links no pair or more than there are; the model is then unchanged.
    """
    _refuse_cached(model)
    config, family, plain = config or LongSkipConfig(), find_family(type(model)), cast(Transformer, model)
    if family is not None and family.native_pairs:
        raise ValueError(
            f"{type(model).__name__} has long skips of its own: call skipdit.enable_cache(model, ...) directly"
        )
    linked = LongSkipModel.find(model)
    if linked is not None:
        if linked.long_skip_links.sources:
            raise ValueError("this model already has long skips: call skipdit.remove_long_skips(model) first")
    elif family is not None and "long_skip" in plain.config:
        raise ValueError(f"the config of {type(model).__name__} has an entry 'long_skip' of its own")
    sizes = segment_sizes_of(model)
    if not pair_segments(sizes, config):
        raise ValueError(
            f"there must be at least one pair to link, got num_pairs {config.num_pairs} for segments of {sizes} units"
        )
    open_model = open_units(model)
    names = family.hidden_size if family else ("num_attention_heads", "attention_head_dim")
    open_model.set_long_skips(math.prod(open_model.config[name] for name in names), config)
    dtype: Any = open_model.dtype  # a block's first parameter may be one that stays in float32 (Wan)
    for block in open_model.unit_entries():
        if block.long_skip is not None:
            block.long_skip.to(next(block.parameters()).device, dtype).train(model.training)
    if open_model.fill_token is not None:
        open_model.fill_token.data = open_model.fill_token.data.to(next(model.parameters()).device, dtype)
    open_model.update_config(long_skip=config.to_dict())


def add_fill_token(model: nn.Module) -> None:
    """Add the fill token of `LongSkipConfig(fill_token=True)` to a model that lacks it.

    Raises `ValueError` if the model has no long skips that skipdit added.
    """
    linked = LongSkipModel.find(model)
    if linked is None or linked.config.get("long_skip") is None:
        raise ValueError(f"a fill token needs long skips that skipdit added: this {type(model).__name__} has none")
    if linked.fill_token is None:
        long_skip = next(block.long_skip for block in linked.unit_entries() if block.long_skip)
        linked.fill_token = nn.Parameter(torch.zeros_like(long_skip.proj.weight[:, 0]))
        linked.update_config(long_skip={**linked.config["long_skip"], "fill_token": True})


def remove_long_skips(model: nn.Module) -> None:
    """Remove a model's long skips, in place; a transformer of diffusers is then as it was before `add_long_skips`.
    Raises `ValueError` if it has no long skips that skipdit added."""
    linked = LongSkipModel.find(model)
    if linked is None or not linked.long_skip_links.sources:
        raise ValueError(f"this {type(model).__name__} has no long skips that skipdit added")
    _refuse_cached(model)
    swapped = RunsUnits.find(model)
    if swapped is None:
        linked.set_long_skips(0, None)
        linked.update_config(long_skip=None)
        return
    if swapped._family.native_pairs:
        raise ValueError(f"the long skips of {type(model).__name__} are part of it and cannot be removed")
    hooked_module = hooked((model, *(block for blocks in swapped.units() for block in blocks)))
    if hooked_module is not None:
        raise ValueError(f"the forward of this {type(hooked_module).__name__} is hooked: remove the hooks first")
    for block in swapped.unit_entries():
        block.long_skip = None
    swapped.fill_token = None
    config = FrozenDict({name: value for name, value in swapped.config.items() if name != "long_skip"})
    close_units(model)
    cast(Transformer, model)._internal_dict = config


def _refuse_cached(model: nn.Module) -> None:
    """Raise `ValueError` if a cache is enabled, whose class is on top of the one to swap."""
    if "_skipdit_cache" in vars(model):
        raise ValueError("a cache is enabled on this model: call skipdit.disable_cache(model) first")
