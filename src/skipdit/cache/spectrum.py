"""The Wiener filter that keeps of noisy latents what of them is signal (SeaCache, arXiv 2602.18993)."""

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1e-16


def wiener_filter(latents: Tensor, dims: Sequence[int], noise: float, power: float) -> Tensor:
    """Return latents filtered along `dims`, in float32. Real signals are taken to have a power of f^-power at frequency
    f along each of them, and noise the same power at all frequencies; the mean of the gains is 1 (equation 7).

    noise: the share of noise in latents = (1 - noise) signal + noise * normal noise.
    """
    noise = min(max(noise, 1e-6), 1 - 1e-6)
    last = dims[-1]
    spectrum = torch.fft.rfftn(latents.float(), dim=tuple(dims))
    for dim in dims:
        size = latents.shape[dim]
        gains = _gains(size, noise, power, latents.device)
        gains = (gains / gains.mean())[: size // 2 + 1 if dim == last else size]
        spectrum = spectrum * gains.view([-1 if axis == dim else 1 for axis in range(latents.ndim)])
    return torch.fft.irfftn(spectrum, s=[latents.shape[dim] for dim in dims], dim=tuple(dims))


def _gains(size: int, noise: float, power: float, device: torch.device) -> Tensor:
    signal_power = 1 / (torch.fft.fftfreq(size, device=device).abs() ** power + SMALLEST)
    signal = 1 - noise
    return signal * signal_power / (signal**2 * signal_power + noise**2 + SMALLEST)
