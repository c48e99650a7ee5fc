"""What a diffusion transformer learns to predict; nothing heavy is imported."""

from dataclasses import dataclass
from typing import Literal

from skipdit.options import check_above, check_fields, check_range

NUM_TRAIN_TIMESTEPS = 1000

Process = Literal["ddpm", "flow"]
Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
TimestepSampling = Literal["uniform", "logit_normal", "log_normal"]

PREDICTIONS: dict[str, tuple[str, ...]] = {
    "ddpm": ("epsilon", "v_prediction", "sample"),
    "flow": ("flow_prediction", "sample"),
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Training objective: what the model predicts, for which process, and how noise levels are drawn and weighted."""

    process: Process = "ddpm"
    """forward process: ddpm with linear betas, or flow on straight lines from data to noise"""
    prediction_type: Prediction = "epsilon"
    """what the model predicts, in diffusers' words: sample is x-prediction, flow_prediction the velocity noise - x_0"""
    learned_variance: bool = False
    """the second half of the output channels interpolates the posterior variance (arXiv 2102.09672, eq. 15) and is
    trained with the variational bound; only for epsilon prediction"""
    timestep_sampling: TimestepSampling = "uniform"
    """how training draws timesteps: uniform; logit_normal in sigma (arXiv 2403.03206), only for flow; log_normal in the
    ratio of noise to signal (arXiv 2206.00364, table 1), only for ddpm, rounded to the nearest timestep"""
    logit_mean: float = 0.0
    """mean of the logarithm of the ratio of noise to signal, which for flow is the logit of sigma"""
    logit_std: float = 1.0
    """standard deviation of the same logarithm"""
    min_sigma: float = 0.05
    """x-prediction of a flow is trained in velocity space: (x - x_0) / max(sigma, min_sigma), arXiv 2511.13720"""
    min_snr_gamma: float | None = None
    """weight the error of x_0 by min(SNR, min_snr_gamma) (arXiv 2303.09556, eq. 8 and section 3.4), whatever the model
    predicts; 5 in that paper. SNR is (signal / sigma)^2, which for flow is ((1 - sigma) / sigma)^2. Replaces min_sigma;
    the variational bound keeps its weight"""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.prediction_type not in PREDICTIONS[self.process]:
            allowed = ", ".join(PREDICTIONS[self.process])
            raise ValueError(
                f"prediction_type of a {self.process} process must be one of {allowed}, got {self.prediction_type!r}"
            )
        if self.timestep_sampling == "logit_normal" and self.process != "flow":
            raise ValueError("timestep_sampling 'logit_normal' needs process 'flow'")
        if self.timestep_sampling == "log_normal" and self.process != "ddpm":
            raise ValueError("timestep_sampling 'log_normal' needs process 'ddpm': for a flow use 'logit_normal'")
        check_above(self, "min_snr_gamma", "min_sigma")
        check_range(self, "logit_std", least=0)
        if self.learned_variance and self.prediction_type != "epsilon":
            raise ValueError(f"learned_variance needs prediction_type 'epsilon', got {self.prediction_type!r}")
