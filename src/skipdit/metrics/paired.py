"""Distances between two pictures of the same thing, as pure functions of (b c h w) tensors in [0, 1]."""

from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

Pictures = Float[Tensor, "batch channels height width"]


def psnr_db(pictures: Pictures, reference: Pictures) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each picture in dB; infinite where the two are equal."""
    return peak_signal_noise_ratio(pictures, reference, data_range=1.0, dim=(1, 2, 3), reduction="none")


def ssim(pictures: Pictures, reference: Pictures) -> Float[Tensor, " batch"]:
    """Structural similarity of each picture where the Gaussian window of 11 pixels (sigma 1.5) lies inside (Wang et al.
    2004); `ValueError` on pictures smaller than the window."""
    if min(pictures.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11 pixels, got {tuple(pictures.shape)}")
    _, similarity = structural_similarity_index_measure(
        pictures, reference, data_range=1.0, reduction="none", return_full_image=True
    )
    return similarity[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
