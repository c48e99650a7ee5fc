"""Distances between two pictures of the same thing, as pure functions of (b c h w) tensors in [0, 1]."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

Pictures = Float[Tensor, "batch channels height width"]
SSIM_WINDOW = 11  # pixels a side (Wang et al. 2004)


def psnr_db(pictures: Pictures, reference: Pictures) -> Float[Tensor, " batch"]:
    """Return the peak signal-to-noise ratio of each picture in dB; infinite where the two are equal."""
    return peak_signal_noise_ratio(pictures, reference, data_range=1.0, dim=(1, 2, 3), reduction="none")


def ssim(pictures: Pictures, reference: Pictures) -> Float[Tensor, " batch"]:
    """Return the structural similarity of each picture where the Gaussian window (sigma 1.5) lies inside (Wang et al.
    2004); `ValueError` on pictures smaller than the window."""
    check_ssim_size(*pictures.shape[-2:])
    _, similarity = structural_similarity_index_measure(
        pictures, reference, data_range=1.0, reduction="none", return_full_image=True
    )
    return similarity[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))


def check_ssim_size(*sides: int) -> None:
    """Raise `ValueError` where a picture is too small for SSIM: before anything is sampled."""
    if min(sides) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW} pixels, got {' x '.join(map(str, sides))}")


@dataclass(frozen=True, kw_only=True)
class PairedScore:
    """Mean and standard deviation of a distance over those of `num` pictures where it is finite."""

    mean: float
    """infinite if all pictures are equal and the distance is PSNR; NaN if any is broken"""
    std: float
    num: int
    num_equal: int = 0
    """pictures that are equal to the bit, whose PSNR is infinite"""
    num_broken: int = 0
    """pictures with NaN or infinite pixels"""

    @classmethod
    def of(cls, values: Float[Tensor, " batch"]) -> "PairedScore":
        """Of each picture's PSNR, SSIM or other distance."""
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
        """What to compare by: a score with broken pictures is below every other."""
        return -math.inf if self.num_broken else self.mean

    def text(self, digits: int = 2) -> str:
        """As every table shows it."""
        if self.num_broken:
            return f"not finite ({self.num_broken} of {self.num})"
        if self.num_equal == self.num:
            return "equal"
        beside = f" ({self.num_equal} of {self.num} equal)" if self.num_equal else ""
        return f"{self.mean:.{digits}f} ± {self.std:.{digits}f}{beside}"
