"""Counts the operations that would wait for a device, on a CPU."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class DeviceWaits:
    """Counts the operations inside the block that wait for a device, because the host needs a number. `tolist` and
    `numpy` are not operations on a CPU, so functions are counted too."""

    operations = (
        *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"),
        *("_unique2", "unique_dim", "unique_consecutive"),
    )
    functions = (Tensor.tolist, Tensor.numpy)

    def __init__(self) -> None:
        counts: Counter[str] = Counter()

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = func.name().partition("::")[2].partition(".")[0]
                by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
                    isinstance(index, Tensor) and index.dtype is torch.bool for index in args[1]
                )
                counts[name] += by_mask or name in DeviceWaits.operations
                return func(*args, **(kwargs or {}))

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func in DeviceWaits.functions:
                    counts[func.__name__] += 1
                return func(*args, **(kwargs or {}))

        self.counts, self.modes = counts, (Operations(), Functions())

    def __enter__(self) -> "DeviceWaits":
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def more_than(self, other: "DeviceWaits") -> Counter[str]:
        """Return the operations that were more frequent than in the other block."""
        return self.counts - other.counts
