"""Training: the config of a run (`config`), its steps (`loop`, `batches`, `routing`), the files it writes
(`checkpointing`, `reporter`), early stops (`stopping`), and its processes (`devices`).

The names below are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipdit.training.batches import Batch as Batch
    from skipdit.training.batches import prepare_batch as prepare_batch
    from skipdit.training.batches import step_generator as step_generator
    from skipdit.training.checkpointing import list_checkpoints as list_checkpoints
    from skipdit.training.config import SpectralConfig as SpectralConfig
    from skipdit.training.config import TokenRoutingConfig as TokenRoutingConfig
    from skipdit.training.config import TrainConfig as TrainConfig
    from skipdit.training.config import learning_rate_at as learning_rate_at
    from skipdit.training.loop import train as train
    from skipdit.training.precision import computes_in_bf16 as computes_in_bf16
    from skipdit.training.routing import draw_kept_tokens as draw_kept_tokens
    from skipdit.training.stopping import Stopped as Stopped

# public name: the module that defines it
_MODULES = {
    "Batch": "batches",
    "SpectralConfig": "config",
    "Stopped": "stopping",
    "TokenRoutingConfig": "config",
    "TrainConfig": "config",
    "computes_in_bf16": "precision",
    "draw_kept_tokens": "routing",
    "learning_rate_at": "config",
    "list_checkpoints": "checkpointing",
    "prepare_batch": "batches",
    "step_generator": "batches",
    "train": "loop",
}

__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # so that a type checker reports unknown names

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
