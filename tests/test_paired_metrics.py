"""Distances against scikit-image."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from skipdit.metrics.paired import PairedScore, check_ssim_size, psnr_db, ssim


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.rand(3, 3, 40, 48)
    noise = torch.tensor([0.01, 0.1, 0.3])[:, None, None, None]
    return first, (first + noise * torch.randn(first.shape)).clamp(0, 1)


def test_psnr_equals_skimage(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    first, second = pair
    expected = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1) for a, b in zip(first, second, strict=True)]
    assert psnr_db(first, second).tolist() == pytest.approx(expected, abs=1e-3)
    assert psnr_db(first, first).isinf().all()


def test_ssim_equals_skimage(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    first, second = pair
    inner = np.s_[5:-5, 5:-5]
    for index, value in enumerate(ssim(first, second).tolist()):
        _, whole = structural_similarity(
            first[index].double().numpy(), second[index].double().numpy(), data_range=1, channel_axis=0, full=True,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert value == pytest.approx(whole[:, *inner].mean(), abs=1e-4)
    assert ssim(first, first).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("values", "text", "mean", "rank"),
    [
        ([30.0, 40.0], "35.00 ± 5.00", 35.0, 35.0),
        ([math.inf, 30.0, 40.0], "35.00 ± 5.00 (1 of 3 equal)", 35.0, 35.0),
        ([math.inf, math.inf], "equal", None, math.inf),
        ([math.nan, 30.0], "not finite (1 of 2)", None, -math.inf),
        ([math.nan, math.inf], "not finite (1 of 2)", None, -math.inf),
        ([-math.inf, 30.0], "not finite (1 of 2)", None, -math.inf),
    ],
)
def test_one_rule_for_means(values: list[float], text: str, mean: float | None, rank: float) -> None:
    score = PairedScore.of(torch.tensor(values))
    assert (score.text(), score.finite_mean, score.rank, score.num) == (text, mean, rank, len(values))
    assert score.num_equal == values.count(math.inf)
    assert score.num_broken == sum(value != math.inf and not math.isfinite(value) for value in values)


def test_broken_pictures_are_no_equal_pictures(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    first, second = pair
    for value in (math.nan, math.inf):
        broken = first.clone()
        broken[1, 0, 0, 0] = value
        for pictures, reference in ((broken, second), (second, broken), (broken, broken)):
            assert PairedScore.of(psnr_db(pictures, reference)).num_broken == 1
            assert PairedScore.of(ssim(pictures, reference)).num_broken == 1
    second[0] = first[0]
    score = PairedScore.of(psnr_db(first, second))
    assert (score.num_equal, score.num_broken) == (1, 0)
    assert score.mean == pytest.approx(psnr_db(first, second)[1:].mean().item())


def test_pictures_too_small_for_ssim_are_refused() -> None:
    check_ssim_size(11, 16)
    with pytest.raises(ValueError, match="at least 11 pixels, got 10 x 16"):
        check_ssim_size(10, 16)
    with pytest.raises(ValueError, match="at least 11 pixels, got 8 x 8"):
        ssim(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
