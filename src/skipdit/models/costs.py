"""What the parts of one forward cost, in FLOPs of the whole model: blocks that always run and everything around the
blocks included.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from skipdit.models.forward_plan import Region
from skipdit.models.long_skip import LongSkipModel


@dataclass(frozen=True, eq=False)
class Costs:
    """Shares of one full step: of each unit, and within them of each branch by kind and unit."""

    units: tuple[float, ...]
    branches: Mapping[tuple[str, int], float]
    known: dict[tuple[Region, ...], float] = field(init=False, repr=False, default_factory=dict)

    def of_step(self, reuse: tuple[Region, ...]) -> float:
        """Return the share of a full step that a step costs which reuses these regions."""
        if reuse not in self.known:
            self.known[reuse] = self._of_step(reuse)
        return self.known[reuse]

    def _of_step(self, reuse: tuple[Region, ...]) -> float:
        saved = sum(cost for unit, cost in enumerate(self.units) if any(each.leaves_out(unit) for each in reuse))
        saved += sum(
            cost
            for (kind, unit), cost in self.branches.items()
            if any(each.has_branch(kind, unit) for each in reuse) and not any(each.leaves_out(unit) for each in reuse)
        )
        return max(1.0 - saved, 0.0)

    @classmethod
    def _from(cls, model: nn.Module, total: float, cost_of: Callable[[nn.Module], float]) -> "Costs":
        linked = cast(LongSkipModel, model)
        units = tuple(sum(map(cost_of, blocks)) / total for blocks in linked.units())
        branches: dict[tuple[str, int], float] = {}
        for place in linked.branches():
            key = place.kind, place.unit
            branches[key] = branches.get(key, 0.0) + cost_of(place.module) / total
        return cls(units, branches)

    @classmethod
    def at_best(cls, model: nn.Module) -> "Costs":
        """Estimate the costs before a step has run, as if there were nothing but units: a product's are as many as its
        weights, and units cost alike."""

        def cost_of(module: nn.Module) -> float:
            return float(sum(weight.numel() for weight in module.parameters()))

        linked = cast(LongSkipModel, model)
        units = linked.units()
        branches: dict[tuple[str, int], float] = {}
        for place in linked.branches():
            key, whole = (place.kind, place.unit), sum(map(cost_of, units[place.unit])) or 1.0
            branches[key] = branches.get(key, 0.0) + cost_of(place.module) / whole / len(units)
        return cls((1 / len(units),) * len(units), branches)

    @classmethod
    def by_weights(cls, model: nn.Module) -> "Costs":
        """Estimate the costs of a step whose FLOPs cannot be counted: a product's are as many as its weights."""
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

        def cost_of(module: nn.Module) -> float:
            return float(
                sum(weight.numel() for weight in module.parameters() if weight.ndim > 1 and id(weight) not in tables)
            )

        return cls._from(model, max(cost_of(model), 1.0), cost_of)


def flop_counter() -> FlopCounterMode:
    """Count FLOPs; torch's counter lacks the attention of CPUs."""
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    )


def count_flops(model: nn.Module, call: Callable[[], Any]) -> int:
    """Return the FLOPs of a model's forwards within a call, as of its pipeline. What is compiled counts as nothing."""
    counter, within = flop_counter(), 0

    def enter(*_: Any) -> None:
        nonlocal within
        within -= counter.get_total_flops()

    def leave(*_: Any) -> None:
        nonlocal within
        within += counter.get_total_flops()

    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
    try:
        with counter:
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return within


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def count_costs(model: nn.Module, call: Callable[[], Any]) -> tuple[Any, Costs]:
    """Return what a full forward `call` of a model returns, and what its parts cost.

    `None` and an estimate where torch cannot count: flex attention on a CPU, sharded weights. Hooks on these very
    modules tell what each costs: those of torch's counter are global, and see what other threads run.
    """
    linked = cast(LongSkipModel, model)
    blocks = {block for blocks in linked.units() for block in blocks}
    flops = dict.fromkeys((*blocks, *(place.module for place in linked.branches())), 0)
    counter = flop_counter()

    def enter(module: nn.Module, *_: Any) -> None:
        flops[module] -= counter.get_total_flops()

    def leave(module: nn.Module, *_: Any) -> None:
        flops[module] += counter.get_total_flops()

    hooks = [module.register_forward_pre_hook(enter) for module in flops]
    hooks += [module.register_forward_hook(leave) for module in flops]
    try:
        with counter:
            result = call()
    except Exception:  # whatever is wrong with the call itself comes again without a counter
        return None, Costs.by_weights(model)
    finally:
        for hook in hooks:
            hook.remove()
    total = counter.get_total_flops()
    if not total:
        return result, Costs.by_weights(model)
    return result, Costs._from(model, total, lambda module: flops[module])
