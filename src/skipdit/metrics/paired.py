"""Distances between pictures and their references, as pure functions of (b c h w) tensors in [0, 1]."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

Pictures = Float[Tensor, "batch channels height width"]
SSIM_WINDOW = 11  # pixels per side (Wang et al. 2004)


def psnr_db(pictures: Pictures, reference: Pictures) -> Float[Tensor, " batch"]:
    """Return the peak signal-to-noise ratio of each picture in dB; infinite if the two are equal."""
    return peak_signal_noise_ratio(pictures, reference, data_range=1.0, dim=(1, 2, 3), reduction="none")


def ssim(pictures: Pictures, reference: Pictures) -> Float[Tensor, " batch"]:
    """Return the structural similarity of each picture, over positions at which the Gaussian window (sigma 1.5) lies
    inside it (Wang et al. 2004). Raises `ValueError` if pictures are smaller than the window."""
    check_ssim_size(*pictures.shape[-2:])
    _, similarity = structural_similarity_index_measure(
        pictures, reference, data_range=1.0, reduction="none", return_full_image=True
    )
    return similarity[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))


def check_ssim_size(*sides: int) -> None:
    """Raise `ValueError` if a picture is too small for SSIM, before anything is sampled. sides: in pixels."""
    if min(sides) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW} pixels, got {' x '.join(map(str, sides))}")


@dataclass(frozen=True, kw_only=True)
class PairedScore:
    """Mean and standard deviation of a distance, over the pictures for which it is finite."""

    mean: float
    """infinite if the distance is PSNR and all pictures are equal; NaN if any picture is broken"""
    std: float
    num: int
    """number of all pictures"""
    num_equal: int = 0
    """number of pictures that are bit-equal, whose PSNR is infinite"""
    num_broken: int = 0
    """number of pictures with NaN or infinite pixels"""

    @classmethod
    def of(cls, values: Float[Tensor, " batch"]) -> "PairedScore":
        """Return the score of these values of PSNR, SSIM or another distance."""
        finite, num_equal = values[values.isfinite()].double(), int((values == math.inf).sum())
        num_broken = len(values) - len(finite) - num_equal
        if num_broken or not len(finite):
            mean, std = (math.nan, math.nan) if num_broken else (math.inf, 0.0)
        else:
            mean, std = finite.mean().item(), finite.std(correction=0).item()
        return cls(mean=mean, std=std, num=len(values), num_equal=num_equal, num_broken=num_broken)

    @property
    def finite_mean(self) -> float | None:
        return self.mean if math.isfinite(self.mean) else None

    @property
    def rank(self) -> float:
        """Return the value to compare scores by: one with broken pictures is below every other."""
        return -math.inf if self.num_broken else self.mean

    def text(self, digits: int = 2) -> str:
        """Return the score as tables show it."""
        if self.num_broken:
            return f"not finite ({self.num_broken} of {self.num})"
        if self.num_equal == self.num:
            return "equal"
        beside = f" ({self.num_equal} of {self.num} equal)" if self.num_equal else ""
        return f"{self.mean:.{digits}f} ± {self.std:.{digits}f}{beside}"
