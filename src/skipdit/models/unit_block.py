"""A block of a transformer of diffusers whose units are open: it carries out a plan around its own forward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from skipdit.interfaces import Fields
from skipdit.models.class_swap import SwapMixin
from skipdit.models.forward_plan import ForwardState
from skipdit.models.long_skip import LinkedBlock, OpenCall
from skipdit.models.routing import ByToken


@dataclass(frozen=True)
class UnitBlockInfo:
    """The position of a block in its model, and of its streams among its arguments."""

    unit: int
    is_entry: bool
    """True for the first block of its unit; a second one sees each patch over time, (b n) f d, not (b f) n d."""
    is_exit: bool
    """True for the last block of the model."""
    streams: tuple[str, ...]
    """Arguments that hold the streams, in the order of the outputs."""
    fused: str
    """The stream into which long skips are fused."""
    positions: dict[str, int]
    """Positions of the arguments by name."""
    joins: tuple[tuple[int, ...], int] | None
    """For the first block of a segment before which streams are joined: their indices, and the index of the stream
    whose tokens may be routed."""
    by_token: Mapping[str, ByToken]
    """Other arguments that have an entry per token."""

    def input_streams(self, args: Sequence, kwargs: Fields) -> Any:
        """Return the streams among the arguments, in the form of the block's output."""
        streams = [kwargs[name] if name in kwargs else args[self.positions[name]] for name in self.streams]
        return streams[0] if len(streams) == 1 else tuple(streams)


class UnitBlock(SwapMixin, LinkedBlock):
    """Mixin for a block's class. Before the block runs, it stores or replaces the streams and fuses the skip; in a unit
    that does not run, the block returns its input streams."""

    _info: UnitBlockInfo
    _open: OpenCall

    def __call__(self, *args: object, **kwargs: object) -> Any:
        state, info = self._open.state, self._info
        if state is not None and info.unit in state.plan.idle and not self._is_hooked():
            return info.input_streams(args, kwargs)
        return self._call_impl(*args, **kwargs)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the forward of the block's own class, without the actions of a plan, so that all blocks of the class
        and all steps share its graphs. With a plan that stores or reuses branches, a block runs uncompiled."""
        compiled: Any = torch.compile(super().forward, *args, **options)
        compiled.options = args, options
        self._compiled_call_impl = compiled

    def _is_hooked(self) -> bool:
        return bool(self._forward_pre_hooks or self._forward_hooks or "forward" in self.__dict__)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        info, state = self._info, self._open.state
        if state is None:
            raise RuntimeError(
                f"this {type(self).__name__} belongs to unit {info.unit} of a model and runs only inside its forward"
            )
        compiled = None if state.plan.has_branches else self._compiled_call_impl
        if info.unit in state.plan.untouched and info.joins is None:
            return (compiled or super().forward)(*args, **kwargs)
        arguments = list(args)

        def get(name: str) -> Tensor:
            return kwargs[name] if name in kwargs else arguments[info.positions[name]]

        def put(name: str, value: Tensor) -> None:
            if name in kwargs:
                kwargs[name] = value
            else:
                arguments[info.positions[name]] = value

        if info.is_entry:
            if info.joins:
                state.join(*info.joins)
            state.arrive(info.unit, get(info.fused))
            if state.is_boundary(info.unit):
                routed = info.streams.index(info.fused)
                streams = state.enter(info.unit, *(get(name) for name in info.streams), routed=routed)
                for name, stream in zip(info.streams, streams, strict=True):
                    put(name, stream)
            self._open.num_tokens = get(info.fused).shape[1]
        if state.runs(info.unit):
            if state.tokens is not None and state.sees_kept(info.unit):
                for name, by_token in info.by_token.items():
                    if name in kwargs or info.positions[name] < len(arguments):
                        put(name, state.tokens.keep(get(name), by_token))
            if self.long_skip is not None:
                put(info.fused, self.long_skip(get(info.fused), state.skip(info.unit)))
            output = (compiled or super().forward)(*arguments, **kwargs)
        else:
            if info.is_entry:
                # HunyuanDiT passes skips on itself, and will take the output of this unit as one
                skip = state.stored_skip(info.unit)
                if skip is not None:
                    put(info.fused, skip)
            output = info.input_streams(arguments, kwargs)
        if info.is_exit and state.is_boundary(info.unit + 1):
            return _exit(state, info, output, self._open.num_tokens)
        return output


def _exit(state: ForwardState, info: UnitBlockInfo, output: Any, num_tokens: int) -> Any:
    """Store or replace the output of the last unit, and return it."""
    if not info.is_entry:
        num_frames = output.shape[1]
        output = rearrange(output, "(b n) f d -> (b f) n d", n=num_tokens)
        (output,) = state.enter(info.unit + 1, output)
        return rearrange(output, "(b f) n d -> (b n) f d", f=num_frames)
    if len(info.streams) == 1:
        return state.enter(info.unit + 1, output)[0]
    return state.enter(info.unit + 1, *output)
