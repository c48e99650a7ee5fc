"""Distances against scikit-image."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from skipdit.metrics.paired import psnr_db, ssim


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
