"""WHAT is reused. A site runs the model in full and hands out what it stores, or runs only what must be fresh."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from skipdit.models.long_skip import LongSkipModel

Call = Callable[..., Any]


@dataclass(frozen=True)
class DeepFeatures:
    """The hidden states that enter the deep units, behind the long skips (arXiv 2411.17616): on a reuse step the
    `num_shallow_units` first and last units run."""

    num_shallow_units: int = 1

    def check(self, model: nn.Module) -> None:
        """`ValueError` where this model has nothing to reuse here."""
        if not isinstance(model, LongSkipModel):
            raise ValueError(
                f"{type(model).__name__} has no long skips that skipdit knows of, so a skip cache could have no "
                "effect: skipdit.declare_family tells where its units are, skipdit.add_long_skips gives it long skips"
            )
        model.long_skip_links.check_num_shallow_units(self.num_shallow_units)

    def full(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The model's sample and what to store."""
        output = call(*args, **kwargs, num_shallow_units=self.num_shallow_units)
        return output.sample, output.deep_features

    def reuse(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any], stored: Tensor) -> Tensor:
        return call(*args, **kwargs, num_shallow_units=self.num_shallow_units, deep_features=stored).sample


@dataclass(frozen=True)
class BlockDelta:
    """What the units between the `num_shallow_units` first and last ones added to the hidden states (the offset of
    Delta-DiT, arXiv 2406.01125); needs no long skips, and keeps them fresh where there are any."""

    num_shallow_units: int = 1

    def check(self, model: nn.Module) -> None:
        """`ValueError` where this model has nothing to reuse here."""
        if not isinstance(model, LongSkipModel):
            raise ValueError(f"{type(model).__name__} has no units that skipdit knows of, so nothing could be reused")
        model.long_skip_links.check_num_shallow_units(self.num_shallow_units, delta=True)

    def full(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The model's sample and what to store."""
        output = call(*args, **kwargs, num_shallow_units=self.num_shallow_units, delta=True)
        return output.sample, output.deep_features

    def reuse(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any], stored: Tensor) -> Tensor:
        output = call(*args, **kwargs, num_shallow_units=self.num_shallow_units, deep_features=stored, delta=True)
        return output.sample
