"""Costs of units and branches as shares of the FLOPs of the whole model, including blocks that always run and all
layers outside the blocks.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from skipdit.models.forward_plan import Region
from skipdit.models.long_skip import LongSkipModel
from skipdit.models.modules import modules_of

Output = TypeVar("Output")
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs as shares of one full step."""

    units: tuple[float, ...]
    """Share of each unit."""
    branches: Mapping[tuple[str, int], float]
    """Share of the branches of each kind in each unit, included in the unit's share."""
    known: dict[tuple[Region, ...], float] = field(init=False, repr=False, default_factory=dict)
    """Results of `of_step` so far, by the regions reused."""

    def of_step(self, reuse: tuple[Region, ...]) -> float:
        """Return the cost of a step that reuses these regions, as a share of a full step."""
        if reuse not in self.known:
            self.known[reuse] = self._of_step(reuse)
        return self.known[reuse]

    def _of_step(self, reuse: tuple[Region, ...]) -> float:
        if any(region.is_whole for region in reuse):
            return 0.0
        saved = sum(cost for unit, cost in enumerate(self.units) if any(region.leaves_out(unit) for region in reuse))
        saved += sum(
            cost
            for (kind, unit), cost in self.branches.items()
            if any(region.has_branch(kind, unit) for region in reuse)
            and not any(region.leaves_out(unit) for region in reuse)
        )
        return max(1.0 - saved, 0.0)

    @classmethod
    def _from(cls, model: LongSkipModel, total: float, cost_of: Callable[[nn.Module], float]) -> "Costs":
        units = tuple(sum(map(cost_of, blocks)) / total for blocks in model.units())
        branches: dict[tuple[str, int], float] = {}
        for branch in model.branches():
            key = branch.kind, branch.unit
            branches[key] = branches.get(key, 0.0) + cost_of(branch.module) / total
        return cls(units, branches)

    @classmethod
    def at_best(cls, model: nn.Module) -> "Costs":
        """Estimate the costs before any step has run, as if all layers were in units of equal cost and FLOPs were
        proportional to the number of weights. For a model without known units the result has no units or branches.
        """

        def cost_of(module: nn.Module) -> float:
            return float(sum(weight.numel() for weight in module.parameters()))

        linked = LongSkipModel.find(model)
        if linked is None:
            return cls((), {})
        units = linked.units()
        branches: dict[tuple[str, int], float] = {}
        for branch in linked.branches():
            key, whole = (branch.kind, branch.unit), sum(map(cost_of, units[branch.unit])) or 1.0
            branches[key] = branches.get(key, 0.0) + cost_of(branch.module) / whole / len(units)
        return cls((1 / len(units),) * len(units), branches)

    @classmethod
    def by_weights(cls, model: LongSkipModel) -> "Costs":
        """Estimate the costs as proportional to the number of weights, for a step whose FLOPs cannot be counted."""
        tables = {id(table.weight) for table in modules_of(model, nn.Embedding)}

        def cost_of(module: nn.Module) -> float:
            return float(
                sum(weight.numel() for weight in module.parameters() if weight.ndim > 1 and id(weight) not in tables)
            )

        return cls._from(model, max(cost_of(model), 1.0), cost_of)


def flop_counter() -> FlopCounterMode:
    """Return a FLOP counter that also counts attention on a CPU, which torch's own does not."""
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    )


def count_flops(model: nn.Module, call: Callable[[], object]) -> int:
    """Return the FLOPs of a model's forwards during a call, such as one of its pipeline. Compiled graphs count as 0."""
    counter, flops = flop_counter(), 0

    def enter(*_: object) -> None:
        nonlocal flops
        flops -= counter.get_total_flops()

    def leave(*_: object) -> None:
        nonlocal flops
        flops += counter.get_total_flops()

    with model.register_forward_pre_hook(enter), model.register_forward_hook(leave), counter:
        call()
    return flops


def _attention_flops(query: Shape, key: Shape, value: Shape, *args: object, **kwargs: object) -> int:
    return sdpa_flop_count(query, key, value)


def count_costs(model: LongSkipModel, call: Callable[[], Output]) -> tuple[Output | None, Costs]:
    """Return the output of `call`, a full forward of a model, and the costs of its units and branches.

    Returns `None` and an estimate if torch cannot count: flex attention on a CPU, sharded weights. The counter
    is read by hooks on these modules, because its own module hooks are global and would see the work of other threads.
    """
    blocks = {block for blocks in model.units() for block in blocks}
    flops = dict.fromkeys((*blocks, *(branch.module for branch in model.branches())), 0)
    counter = flop_counter()

    def enter(module: nn.Module, *_: object) -> None:
        flops[module] -= counter.get_total_flops()

    def leave(module: nn.Module, *_: object) -> None:
        flops[module] += counter.get_total_flops()

    with ExitStack() as hooks:
        for module in flops:
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        try:
            with counter:
                result = call()
        except Exception:  # the caller runs an uncounted call again, and an error of the call itself is raised there
            return None, Costs.by_weights(model)
    total = counter.get_total_flops()
    if not total:
        return result, Costs.by_weights(model)
    return result, Costs._from(model, total, lambda module: flops[module])
