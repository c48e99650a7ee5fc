"""Training objectives of diffusion transformers, and the schedulers that sample with their predictions.

There are two processes: `"ddpm"` (1000 discrete steps, linear betas, as in DiT) and `"flow"` (straight paths from data
to noise, x_t = (1 - sigma) x_0 + sigma noise, with timestep = 1000 sigma). Except for the model call in
`training_loss`, everything here is a pure function of tensors.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from skipdit.interfaces import Fields, Scheduler
from skipdit.options import choose
from skipdit.options.objective import NUM_TRAIN_TIMESTEPS as NUM_TRAIN_TIMESTEPS
from skipdit.options.objective import PREDICTIONS as PREDICTIONS
from skipdit.options.objective import Objective as Objective

# pictures (batch channels height width) or clips (batch frames channels height width)
Images = Float[Tensor, "batch *frames channels height width"]
ModelOutput = Float[Tensor, "batch *frames out_channels height width"]
PerSample = Float[Tensor, " batch"]
Timesteps = Float[Tensor, " batch"] | Int[Tensor, " batch"]

# ----------------------------------------------------------------------------------------------------------------------
# Forward process


@dataclass(frozen=True)
class DDPMTables:
    """Per-timestep coefficients (1000,) of the linear-beta process in float64 (arXiv 2006.11239, eqs. 4, 6, 7)."""

    alphas_cumprod: Tensor
    """squared factor of x_0 in x_t"""
    posterior_mean_x0: Tensor
    """factor of x_0 in the posterior mean"""
    posterior_mean_xt: Tensor
    """factor of x_t in the posterior mean"""
    log_betas: Tensor
    """logarithm of beta, the upper limit of a learned variance"""
    posterior_log_variance: Tensor
    """logarithm of the posterior variance, the lower limit"""


@lru_cache(maxsize=1)
def ddpm_tables() -> DDPMTables:
    """Return the tables on the CPU."""
    betas = torch.linspace(1e-4, 0.02, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    posterior_variance[0] = posterior_variance[1]  # the first one is 0, which has no logarithm
    return DDPMTables(
        alphas_cumprod=alphas_cumprod,
        posterior_mean_x0=betas * previous.sqrt() / (1 - alphas_cumprod),
        posterior_mean_xt=(1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        log_betas=betas.log(),
        posterior_log_variance=posterior_variance.log(),
    )


@lru_cache
def device_tables(device: torch.device) -> DDPMTables:
    """Return the tables in float32 on a device. They stay there, as a copy per step would make the host wait."""
    return DDPMTables(**{name: table.float().to(device) for name, table in vars(ddpm_tables()).items()})


def _at(table: Tensor, timesteps: Timesteps, ndim: int) -> Float[Tensor, "batch *ones"]:
    """Return one entry per sample, shaped to broadcast over a tensor of `ndim` dimensions."""
    return _per_sample(table[timesteps.long()], ndim)


def _per_sample(values: Shaped[Tensor, " batch"], ndim: int) -> Shaped[Tensor, "batch *ones"]:
    return values.reshape(-1, *[1] * (ndim - 1))


def signal_and_noise_levels(
    objective: Objective, timesteps: Timesteps, ndim: int = 4
) -> tuple[Float[Tensor, "batch *ones"], Float[Tensor, "batch *ones"]]:
    """Return the factors of x_0 and of the noise in x_t, shaped to broadcast over its `ndim` dimensions."""
    if objective.process == "flow":
        sigma = _per_sample(timesteps.float() / NUM_TRAIN_TIMESTEPS, ndim)
        return 1 - sigma, sigma
    alphas_cumprod = _at(device_tables(timesteps.device).alphas_cumprod, timesteps, ndim)
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def add_noise(objective: Objective, x_start: Images, noise: Images, timesteps: Timesteps) -> Images:
    """Return x_t, the noisy input of the model."""
    signal, sigma = signal_and_noise_levels(objective, timesteps, x_start.ndim)
    return signal * x_start + sigma * noise


def prediction_target(objective: Objective, x_start: Images, noise: Images, timesteps: Timesteps) -> Images:
    """Return the output that the model should have for x_t."""
    signal, sigma = signal_and_noise_levels(objective, timesteps, x_start.ndim)
    if objective.prediction_type == "epsilon":
        return noise
    if objective.prediction_type == "v_prediction":
        return signal * noise - sigma * x_start
    if objective.prediction_type == "flow_prediction":
        return noise - x_start
    return x_start


@lru_cache
def log_noise_to_signal(device: torch.device) -> Tensor:
    """Return ln(sigma / signal) (1000,) at each timestep of the ddpm process, increasing. It stays on the device."""
    alphas_cumprod = ddpm_tables().alphas_cumprod
    return (0.5 * ((1 - alphas_cumprod) / alphas_cumprod).log()).float().to(device)


def sample_timesteps(objective: Objective, batch_size: int, generator: torch.Generator | None = None) -> Timesteps:
    """Draw training timesteps (batch,) on the generator's device: integers for ddpm, reals in (0, 1000) for flow."""
    device = torch.device("cpu") if generator is None else generator.device
    if objective.timestep_sampling == "log_normal":
        normal = torch.randn(batch_size, generator=generator, device=device)
        levels = log_noise_to_signal(device)
        return torch.bucketize(objective.logit_mean + objective.logit_std * normal, (levels[1:] + levels[:-1]) / 2)
    if objective.process == "ddpm":
        return torch.randint(NUM_TRAIN_TIMESTEPS, (batch_size,), generator=generator, device=device)
    if objective.timestep_sampling == "uniform":
        return NUM_TRAIN_TIMESTEPS * torch.rand(batch_size, generator=generator, device=device)
    normal = torch.randn(batch_size, generator=generator, device=device)
    return NUM_TRAIN_TIMESTEPS * torch.sigmoid(objective.logit_mean + objective.logit_std * normal)


# ----------------------------------------------------------------------------------------------------------------------
# Loss


@dataclass(frozen=True)
class LossTerms:
    """Per-sample terms (batch,) of a loss."""

    loss: Tensor
    """the term to minimize"""
    mse: Tensor
    """squared error in the space of the prediction"""
    variational_bound: Tensor | None = None
    """bits per dimension, if the variance is learned"""


def training_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    objective: Objective,
    x_start: Images,
    noise: Images,
    timesteps: Timesteps,
) -> LossTerms:
    """Return the loss of `predict(x_t, timesteps)` on one batch; `predict` is the model with its labels bound.

    Raises `ValueError` if the model's channels do not fit the objective.
    """
    noisy = add_noise(objective, x_start, noise, timesteps)
    prediction = predict(noisy, timesteps).float()
    channels = x_start.shape[-3]
    expected = 2 * channels if objective.learned_variance else channels
    if prediction.shape[-3] != expected:
        raise ValueError(
            f"with learned_variance={objective.learned_variance} the model must output {expected} channels "
            f"for inputs of {channels}, got {prediction.shape[-3]}"
        )
    error = prediction.narrow(-3, 0, channels) - prediction_target(objective, x_start, noise, timesteps)
    mse = error.square().flatten(1).mean(dim=1)
    weighted = mse * loss_weights(objective, timesteps)
    if objective.learned_variance:
        bound = variational_bound(prediction, x_start, noisy, timesteps)
        return LossTerms(loss=weighted + bound, mse=mse, variational_bound=bound)
    return LossTerms(loss=weighted, mse=mse)


def loss_weights(objective: Objective, timesteps: Timesteps) -> PerSample:
    """Return the weight of the prediction's squared error at each noise level."""
    signal, sigma = signal_and_noise_levels(objective, timesteps, ndim=1)
    prediction = objective.prediction_type
    if objective.min_snr_gamma is not None:
        snr = (signal / sigma).square()  # infinite at sigma 0
        if prediction == "epsilon":  # the error of x_0 is sigma / signal times the error of the noise
            return (objective.min_snr_gamma / snr).clamp(max=1)
        x_start_weight = snr.clamp(max=objective.min_snr_gamma)
        # the error of x_0 is sigma times the error of either velocity
        return x_start_weight if prediction == "sample" else sigma.square() * x_start_weight
    if objective.process == "flow" and prediction == "sample":
        return sigma.clamp(min=objective.min_sigma).square().reciprocal()
    return torch.ones_like(sigma)


def predicted_x_start(epsilon: Images, noisy: Images, timesteps: Timesteps) -> Images:
    """Return x_0 from an epsilon prediction (arXiv 2006.11239, eq. 15 solved for x_0)."""
    alphas_cumprod = _at(device_tables(timesteps.device).alphas_cumprod, timesteps, noisy.ndim)
    return (noisy - (1 - alphas_cumprod).sqrt() * epsilon) / alphas_cumprod.sqrt()


def posterior_mean(x_start: Images, noisy: Images, timesteps: Timesteps) -> Images:
    """Return the mean of q(x_{t-1} | x_t, x_0) (arXiv 2006.11239, eq. 7)."""
    tables = device_tables(timesteps.device)
    x_start_factor = _at(tables.posterior_mean_x0, timesteps, noisy.ndim)
    return x_start_factor * x_start + _at(tables.posterior_mean_xt, timesteps, noisy.ndim) * noisy


def learned_log_variance(variance_channels: Images, timesteps: Timesteps) -> Images:
    """Interpolate the log variance between the posterior's (at -1) and beta's (at +1) (arXiv 2102.09672, eq. 15)."""
    tables, ndim = device_tables(timesteps.device), variance_channels.ndim
    fraction = (variance_channels + 1) / 2
    lowest = _at(tables.posterior_log_variance, timesteps, ndim)
    return fraction * _at(tables.log_betas, timesteps, ndim) + (1 - fraction) * lowest


def variational_bound(prediction: ModelOutput, x_start: Images, noisy: Images, timesteps: Timesteps) -> PerSample:
    """Return one term of the bound in bits per dimension. The mean is detached, so that only the variance learns.

    The term is the KL divergence of the model's step from the posterior; at timestep 0 it is the likelihood of 8-bit
    pixels (arXiv 2102.09672, section 3.1).
    """
    epsilon, variance_channels = prediction.chunk(2, dim=-3)
    model_mean = posterior_mean(predicted_x_start(epsilon.detach(), noisy, timesteps), noisy, timesteps)
    model_log_variance = learned_log_variance(variance_channels, timesteps)
    true_mean = posterior_mean(x_start, noisy, timesteps)
    true_log_variance = _at(device_tables(timesteps.device).posterior_log_variance, timesteps, noisy.ndim)
    divergence = 0.5 * (
        model_log_variance
        - true_log_variance
        - 1
        + (true_log_variance - model_log_variance).exp()
        + (true_mean - model_mean).square() * (-model_log_variance).exp()
    )
    likelihood = discretized_gaussian_log_likelihood(x_start, model_mean, 0.5 * model_log_variance)
    bound = torch.where(_per_sample(timesteps == 0, noisy.ndim), -likelihood, divergence)
    return bound.flatten(1).mean(dim=1) / math.log(2)


def discretized_gaussian_log_likelihood(x: Images, mean: Images, log_std: Images) -> Images:
    """Return the log probability (nats) of 8-bit values scaled to [-1, 1] (arXiv 2006.11239, eq. 13), with the tanh
    approximation of the normal distribution function that DDPM and DiT use."""

    def distribution(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centered, inverse_std = x - mean, (-log_std).exp()
    upper = distribution(inverse_std * (centered + 1 / 255))
    lower = distribution(inverse_std * (centered - 1 / 255))
    inside = (upper - lower).clamp(min=1e-12).log()
    at_lowest = upper.clamp(min=1e-12).log()
    at_highest = (1 - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, at_lowest, torch.where(x > 0.999, at_highest, inside))


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def guide(
    output: Float[Tensor, "twice *frames channels height width"], guidance_scale: float, num_channels: int | None = None
) -> Images:
    """Apply classifier-free guidance (arXiv 2207.12598) to [conditional, unconditional] predictions (2b ... c h w);
    return (b ... c h w).

    num_channels: guide only the first `num_channels` channels and leave the others conditional; `None` guides all. The
        official DiT sampler guides the first three of its four latent channels.
    """
    conditional, unconditional = output.chunk(2)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    if num_channels is None:
        return guided
    unguided = conditional.narrow(-3, num_channels, conditional.shape[-3] - num_channels)
    return torch.cat([guided.narrow(-3, 0, num_channels), unguided], dim=-3)


SCHEDULERS: dict[str, tuple[str, ...]] = {"ddpm": ("ddim", "dpm", "ddpm"), "flow": ("euler", "dpm")}


def make_scheduler(objective: Objective, name: str | None = None) -> SchedulerMixin:
    """Return a diffusers scheduler that samples with this objective's predictions, by default the first one of its
    process in `SCHEDULERS`. Raises `ValueError` on an unknown name.

    ddpm: `"ddpm"` (ancestral, evenly spaced from 999 to 0, with the learned variance if there is one) and `"ddim"`
    (eta 0, integer stride), both on the official DiT's timesteps; `"dpm"` (DPM-Solver++ of order 2, arXiv 2211.01095).
    flow: `"euler"` and `"dpm"`, whose timesteps diffusers rounds down to integers. Euler's method on a straight path is
    DPM-Solver++ of order 1 in data space.
    """
    name = name or SCHEDULERS[objective.process][0]
    choose(f"scheduler of a {objective.process} model", name, SCHEDULERS[objective.process])
    betas = {
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
    }
    common = {**betas, "prediction_type": objective.prediction_type}
    if name == "ddpm":
        variance_type = "learned_range" if objective.learned_variance else "fixed_small"
        return DDPMScheduler(**common, variance_type=variance_type, timestep_spacing="linspace", clip_sample=False)
    if name == "ddim":
        return DDIMScheduler(**common, timestep_spacing="leading", clip_sample=False, set_alpha_to_one=True)
    return DPMSolverMultistepScheduler(
        **common,
        solver_order=1 if name == "euler" else 2,
        use_flow_sigmas=objective.process == "flow",
        final_sigmas_type="zero",
    )


def scheduler_like(own: ConfigMixin, name: str) -> SchedulerMixin:
    """Return the scheduler that `make_scheduler` makes of this name, with the betas, the shift and the spacing of
    timesteps of another scheduler of the same model. Raises `ValueError` on an unknown name, or if its config does not
    say what the model predicts."""
    scheduler: Scheduler = make_scheduler(objective_of(own), name)
    fixed = {"solver_order", "use_flow_sigmas", "final_sigmas_type", "prediction_type"}
    fixed |= set(own.config.get("_use_default_values", ()))
    known = inspect.signature(type(scheduler).__init__).parameters.keys() - fixed
    options = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return type(scheduler)(**options | {key: value for key, value in own.config.items() if key in known})


def another_scheduler(own: ConfigMixin, name: str) -> SchedulerMixin:
    """Return the scheduler of this name in place of another one of the same model: that of `make_scheduler` if it made
    the other one too, else `scheduler_like`. Raises `ValueError` as that does."""
    objective = objective_of(own)
    ours = [_settings(make_scheduler(objective, each)) for each in SCHEDULERS[objective.process]]
    return make_scheduler(objective, name) if _settings(own) in ours else scheduler_like(own, name)


def _settings(scheduler: Scheduler) -> Fields:
    """Return the entries of a scheduler's config and, as `class`, its class."""
    settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return settings | {"class": type(scheduler).__name__}


def objective_of(scheduler: ConfigMixin) -> Objective:
    """Return the objective that a scheduler samples for, from its config (`use_flow_sigmas`, `prediction_type`).

    Raises `ValueError` if the config does not say what the model predicts.
    """
    if "prediction_type" not in scheduler.config:
        raise ValueError(f"{type(scheduler).__name__} does not say what the model predicts, so it cannot be replaced")
    process = "flow" if scheduler.config.get("use_flow_sigmas", False) else "ddpm"
    learned = scheduler.config.get("variance_type") == "learned_range"
    return Objective(process=process, prediction_type=scheduler.config["prediction_type"], learned_variance=learned)


def noise_levels(timesteps: list[float], num_train_timesteps: int = 1000, *, inverted: bool = False) -> list[float]:
    """Return the noise levels, from 0 to 1000, of a scheduler's timesteps.

    inverted: timesteps increase as noise decreases (Mochi); for timesteps within [0, 1] this is told by their order
    (OmniGen, MiniMax-H3). If timesteps are sigmas above 1 (Cosmos 2) or their logarithms (c_noise of EDM, arXiv
    2206.00364, table 1), a level is the share of noise, sigma / (1 + sigma).
    """
    largest = max(timesteps)
    scale = 1 if largest <= 1 else num_train_timesteps
    if inverted or (scale == 1 and timesteps[-1] > timesteps[0]):
        shares = [1 - timestep / scale for timestep in timesteps]
    elif min(timesteps) < 0 and largest < 10:
        shares = [1 / (1 + math.exp(-4 * timestep)) for timestep in timesteps]
    elif largest > 1.001 * scale:
        shares = [timestep / (scale + timestep) for timestep in timesteps]
    elif scale == 1000:
        return timesteps
    else:
        shares = [timestep / scale for timestep in timesteps]
    return [round(1000 * share, 3) for share in shares]


def noise_shares(scheduler: Scheduler) -> list[float]:
    """Return the share of noise, b / (a + b), in latents a x_0 + b noise at each timestep that a scheduler's model was
    trained on; empty for a flow, whose timesteps are this share, and for a process without betas."""
    config = scheduler.config
    is_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if is_flow or config.get("beta_schedule") is None:
        return []
    pairs = ((math.sqrt(alpha), math.sqrt(1 - alpha)) for alpha in scheduler.alphas_cumprod.tolist())
    return [noise / (signal + noise) for signal, noise in pairs]
