"""The published sizes of DiT and Latte; nothing heavy is imported."""

from collections.abc import Mapping

from skipdit.interfaces import Fields
from skipdit.options import choose

# name: (num_layers, hidden size, num_attention_heads), DiT paper, Table 1
PRESET_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
Presets = Mapping[str, tuple[int, int, int, int]]


def _with_patches(model: str) -> Presets:
    sizes = PRESET_SIZES.items()
    return {f"{model}-{size}/{patch}": (*shape, patch) for size, shape in sizes for patch in (2, 4, 8)}


PRESETS, LATTE_PRESETS = _with_patches("DiT"), _with_patches("Latte")


def preset_sizes(name: str, presets: Presets) -> Fields:
    """Return the constructor arguments of a published size. Raises `ValueError` if it is unknown."""
    num_layers, hidden_size, num_attention_heads, patch_size = presets[choose("preset", name, presets)]
    return {
        "patch_size": patch_size,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": hidden_size // num_attention_heads,
    }
