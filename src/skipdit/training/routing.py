"""Token routing: in training, deep units see only a random share of the tokens, which makes steps cheaper.

The first and the last few units see all tokens. Tokens that the deep units do not see return after them unchanged
(TREAD, arXiv 2501.04765), or as one learned vector that joins a long skip (SPRINT, arXiv 2510.21986). The end of a run
is dense.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from skipdit.models.forward_plan import PLAIN, ForwardPlan
from skipdit.models.long_skip import LongSkipModel
from skipdit.models.routing import TokenRoute
from skipdit.models.shallow_path import ShallowPath, default_shallow_units
from skipdit.training.config import TokenRoutingConfig

StepKind = Literal["dense", "routed", "shallow"]


def shallow_path_of(config: TokenRoutingConfig, num_units: int) -> ShallowPath | None:
    """Return the path through the shallow units alone that a run teaches to a model of `num_units` units, if any."""
    if config.mode == "off" or not config.deep_drop:
        return None
    return ShallowPath(num_shallow_units=route_of(config, num_units).start, fill=config.mode == "fill")


def route_of(config: TokenRoutingConfig, num_units: int) -> TokenRoute:
    """Return the route of the tokens in a model of `num_units` units; `ValueError` if no unit is left between the
    shallow ones."""
    most = (num_units - 1) // 2
    if not most:
        raise ValueError(f"token routing needs at least 3 units, got {num_units}: set routing.mode off")
    k = default_shallow_units(num_units) if config.num_shallow_units is None else config.num_shallow_units
    if k > most:
        raise ValueError(f"routing.num_shallow_units must be at most {most} for {num_units} units, got {k}")
    return TokenRoute(start=k, stop=num_units - k, fill=config.mode == "fill")


def draw_kept_tokens(
    num_samples: int, num_tokens: int, share: float, generator: torch.Generator | None = None
) -> Tensor:
    """Return (num_samples, kept), on the generator's device: the ascending indices of the tokens kept in each sample,
    at least one."""
    num_kept = max(round(share * num_tokens), 1)
    device = "cpu" if generator is None else generator.device
    order = torch.rand(num_samples, num_tokens, generator=generator, device=device).argsort(dim=1)
    return order[:, :num_kept].sort(dim=1).values


@dataclass(frozen=True)
class StepKinds:
    """The kinds of steps of one run: dense ones; with routing also routed ones, and shallow ones without deep units."""

    config: TokenRoutingConfig
    plans: Mapping[StepKind, ForwardPlan]
    """forward plan of each kind"""
    flops: Mapping[StepKind, int]
    """of one sample, forward and backward, by kind"""

    @property
    def dense_share(self) -> float:
        """The share of steps in the dense end."""
        if self.config.mode == "off":
            return 1.0
        end, before, dense = self.config.dense_end, self._flops_before, self.flops["dense"]
        return end * before / (dense * (1 - end) + before * end)

    @property
    def mean_flops(self) -> float:
        """FLOPs of one sample, averaged over the steps of a run."""
        return (1 - self.dense_share) * self._flops_before + self.dense_share * self.flops["dense"]

    @property
    def _flops_before(self) -> float:
        """FLOPs of one sample, averaged over the steps before the dense end."""
        drop = self.config.deep_drop
        if self.config.mode == "off":
            return 0.0
        return (1 - drop) * self.flops["routed"] + (drop * self.flops["shallow"] if drop else 0.0)

    def first_dense_step(self, max_steps: int) -> int:
        """Return the first step of the dense end of a run."""
        return max_steps - round(max_steps * self.dense_share)

    def at(self, step: int, max_steps: int, generator: torch.Generator) -> StepKind:
        """Return the kind of a step. generator: of that step, the same in all processes."""
        if step >= self.first_dense_step(max_steps):
            return "dense"
        return "shallow" if torch.rand((), generator=generator) < self.config.deep_drop else "routed"


def make_plans(config: TokenRoutingConfig, model: LongSkipModel) -> dict[StepKind, ForwardPlan]:
    """Return the plan of each kind of step; `ValueError` if the model has too few units, or, in mode fill, no long skip
    around the deep units."""
    plans: dict[StepKind, ForwardPlan] = {"dense": PLAIN}
    if config.mode == "off":
        return plans
    links = model.long_skip_links
    route = route_of(config, links.num_units)
    if config.mode == "fill" and not any(
        source < route.start and target >= route.stop for target, source in links.sources.items()
    ):
        raise ValueError("routing.mode fill needs a long skip from the first units to the last: set model.long_skip")
    plans["routed"] = ForwardPlan.of(links, route=route)
    if config.deep_drop:
        plans["shallow"] = ForwardPlan.of(links, route=replace(route, leaves_out=True))
    return plans
