"""LPIPS (Zhang et al. 2018, arXiv 1801.03924, version 0.1) on AlexNet. The weights of its five linear layers come with
torchmetrics. Those of AlexNet are torchvision's and are read from a file of the user's: nothing is downloaded, and
torchvision is not needed.
"""

from pathlib import Path

import torch
import torchmetrics
from torch import Tensor, nn

from skipdit.files.untrusted import check_regular, printable
from skipdit.metrics.paired import Pictures
from skipdit.metrics.table import Metric
from skipdit.metrics.weights import errors_named

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
EPSILON = 1e-8  # as in torchmetrics; the official 1e-10 is outside the root
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the official ScalingLayer
AFTER = (1, 4, 7, 9, 11)  # ReLUs of AlexNet whose outputs are compared
MIN_SIZE = 35  # pixels; a smaller picture does not survive all poolings


class AlexNet(nn.Module):
    """The convolutions of torchvision's AlexNet; maps pictures in [-1, 1] to the outputs of five ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        hidden_states, outputs = (pictures - self.get_buffer("shift")) / self.get_buffer("scale"), []
        for index, layer in enumerate(self.features):
            hidden_states = layer(hidden_states)
            if index in AFTER:
                outputs.append(hidden_states)
        return outputs


class Lpips(nn.Module):
    """Maps two batches of pictures in [0, 1] to one distance per picture."""

    def __init__(self) -> None:
        super().__init__()
        self.network = AlexNet()
        widths = (64, 192, 384, 256, 256)
        self.layers = nn.ParameterList([nn.Parameter(torch.empty(1, width, 1, 1)) for width in widths])

    def forward(self, pictures: Pictures, reference: Pictures) -> Tensor:
        total = torch.zeros(len(pictures), device=pictures.device)
        pairs = zip(self.network(pictures * 2 - 1), self.network(reference * 2 - 1), strict=True)
        for weight, features in zip(self.layers, pairs, strict=True):
            first, second = (maps / (maps.square().sum(dim=1, keepdim=True) + EPSILON).sqrt() for maps in features)
            total += ((first - second).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return total


def load_lpips(path: Path | None, device: torch.device | None = None) -> Metric:
    """Return LPIPS as a metric. path: the weights of AlexNet, by default those in torch's download folder. Raises
    `ValueError` if there is no such file, or if it holds something else."""
    file = path or Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
    if path is None and not file.is_file():
        raise ValueError(f"the weights of AlexNet are not here: give --lpips PATH of torchvision's {ALEXNET_FILE}")
    check_regular(file)
    network = Lpips()
    layers = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    with errors_named(f"{printable(file)} does not hold the weights of torchvision's AlexNet"):
        weights = torch.load(file, map_location="cpu", weights_only=True)
        convolutions = {name: value for name, value in weights.items() if name.startswith("features.")}
        network.network.load_state_dict(convolutions)
        linear = torch.load(layers, map_location="cpu", weights_only=True)
        network.layers.load_state_dict({str(index): linear[f"lin{index}.model.1.weight"] for index in range(5)})
    network.to(device or "cpu").eval().requires_grad_(False)
    return Metric("lpips", "LPIPS", network, digits=4, min_size=MIN_SIZE)
