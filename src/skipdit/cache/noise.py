"""Detects noise that extrapolation amplifies: of solvers that draw it.

Quantized activations bring noise too, but extrapolation still gains there: `benchmarks/quantized_activations.py`.
"""

import warnings
from dataclasses import replace

from torch import nn

from skipdit.cache.methods import CacheMethod
from skipdit.cache.predictor import TaylorPredictor
from skipdit.cache.site import MiddleUnits
from skipdit.interfaces import Scheduler
from skipdit.models.families import find_family
from skipdit.models.long_skip import LongSkipModel

# schedulers of diffusers that draw noise in their steps whatever their settings; eta is an argument of pipelines
STOCHASTIC = frozenset({
    "CMStochasticIterativeScheduler", "CogVideoXDPMScheduler", "CosineDPMSolverMultistepScheduler",
    "DDPMParallelScheduler", "DDPMScheduler", "DDPMWuerstchenScheduler", "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler", "FlowMatchLCMScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler",
    "LTXEulerAncestralRFScheduler", "SASolverScheduler", "SCMScheduler", "ScoreSdeVeScheduler", "TCDScheduler",
    "UnCLIPScheduler",
})  # fmt: skip


def draws_noise(scheduler: Scheduler | None) -> bool:
    """Return true if a scheduler of diffusers draws noise in its steps."""
    config = getattr(scheduler, "config", {})
    sde = str(config.get("algorithm_type", "")).startswith("sde")
    return type(scheduler).__name__ in STOCHASTIC or sde or bool(config.get("stochastic_sampling"))


def suited_to(method: CacheMethod, model: nn.Module, scheduler: Scheduler | None) -> CacheMethod:
    """Return the method; where the scheduler (`None` if unknown) draws noise, `auto` without its extrapolation, and if
    the model's units are known, with the first and the last of them fresh, as they see the noise. Warn of that."""
    if not (method.predictor.order and method.schedule.holds_if_noisy and draws_noise(scheduler)):
        return method
    warnings.warn(
        f"{type(scheduler).__name__} draws noise in each step, which extrapolation amplifies; a deterministic solver "
        f"would cache far better: cache {method} holds stored values instead (-o0 asks for that)",
        stacklevel=4,
    )
    knows_units = LongSkipModel.find(model) is not None or find_family(type(model)) is not None
    site = MiddleUnits() if knows_units and not method.site.needs_units else method.site
    return replace(method, site=site, predictor=TaylorPredictor(0), spec=f"{method}, held")
