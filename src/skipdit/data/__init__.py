"""Data sets of pictures, clips and latents for training.

`DataConfig`, `open_pictures` and `from_datasets` are those of `skipdit.data.pictures`, imported on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipdit.data.pictures import DataConfig as DataConfig
    from skipdit.data.pictures import from_datasets as from_datasets
    from skipdit.data.pictures import open_pictures as open_pictures

__all__ = ["DataConfig", "from_datasets", "open_pictures"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from skipdit.data import pictures

    return getattr(pictures, name)
