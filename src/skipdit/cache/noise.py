"""Detects noise that extrapolation amplifies: of layers that quantize activations, and of solvers that draw it.

Every library marks its quantized layers in its own way; none of them is imported here. Weight-only quantization adds no
noise.
"""

import warnings
from dataclasses import replace

from torch import nn

from skipdit.cache.methods import CacheMethod
from skipdit.cache.predictor import TaylorPredictor
from skipdit.interfaces import Scheduler

# classes that quantize their inputs: bitsandbytes (LLM.int8), nunchaku, and those of BFL (on GPUs that can)
LAYERS = frozenset({"Linear8bitLt", "SVDQW4A4Linear", "BFLFP8RLinear", "BFLNVFP4Linear"})
TORCH_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
# schedulers of diffusers that draw noise in their steps whatever their settings; eta is an argument of pipelines
STOCHASTIC = frozenset({
    "CMStochasticIterativeScheduler", "CogVideoXDPMScheduler", "CosineDPMSolverMultistepScheduler",
    "DDPMParallelScheduler", "DDPMScheduler", "DDPMWuerstchenScheduler", "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler", "FlowMatchLCMScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler",
    "LTXEulerAncestralRFScheduler", "SASolverScheduler", "SCMScheduler", "ScoreSdeVeScheduler", "TCDScheduler",
    "UnCLIPScheduler",
})  # fmt: skip


def layer_of_quantized_activations(model: nn.Module) -> str | None:
    """Return the name of a layer of this model that quantizes its activations; `None` if there is none."""
    return next((name for name, layer in model.named_modules() if _quantizes_activations(layer)), None)


def _quantizes_activations(layer: nn.Module) -> bool:
    kinds = type(layer).__mro__
    if any(kind.__name__ in LAYERS or kind.__module__.startswith(TORCH_MODULES) for kind in kinds):
        return True
    marks = vars(layer)
    weight = marks.get("_parameters", {}).get("weight")
    return any((
        getattr(weight, "act_quant_kwargs", None) is not None,  # torchao, version 2 of its configs
        any("ActivationQuantized" in kind.__name__ for kind in type(weight).__mro__),  # torchao, version 1
        marks.get("activation_qtype") is not None,  # quanto
        getattr(marks.get("_modules", {}).get("input_quantizer"), "is_enabled", False),  # modelopt
        getattr(marks.get("quantization_scheme"), "input_activations", None) is not None,  # compressed-tensors
        getattr(marks.get("sdnq_dequantizer"), "use_quantized_matmul", False),  # SDNQ
    ))  # fmt: skip


def draws_noise(scheduler: Scheduler | None) -> bool:
    """Return true if a scheduler of diffusers draws noise in its steps."""
    config = getattr(scheduler, "config", {})
    sde = str(config.get("algorithm_type", "")).startswith("sde")
    return type(scheduler).__name__ in STOCHASTIC or sde or bool(config.get("stochastic_sampling"))


def suited_to(method: CacheMethod, model: nn.Module, scheduler: Scheduler | None = None) -> CacheMethod:
    """Return the method, without its extrapolation if that would amplify noise, with a warning: any method if the model
    quantizes activations, `auto` if the scheduler (`None` if unknown) draws noise."""
    if not any(rule.predictor.order for rule in method.rules):
        return method
    layer, why = layer_of_quantized_activations(model), None
    if layer is not None:
        why = f"{layer} of this {type(model).__name__} quantizes activations, whose noise extrapolation amplifies"
    elif draws_noise(scheduler) and method.schedule.holds_if_noisy:
        why = (
            f"{type(scheduler).__name__} draws noise in each step, which extrapolation amplifies; a deterministic "
            "solver would cache far better"
        )
    if why is None:
        return method
    warnings.warn(f"{why}: cache {method} holds stored values instead (-o0 asks for that)", stacklevel=4)
    return replace(
        _without_extrapolation(method), others=tuple(map(_without_extrapolation, method.others)), spec=f"{method}, held"
    )


def _without_extrapolation(method: CacheMethod) -> CacheMethod:
    return replace(method, predictor=TaylorPredictor(0))
