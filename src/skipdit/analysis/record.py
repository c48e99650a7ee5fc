"""Records named intermediates of a model through hooks that are removed when the `with` block ends."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

Recorded = dict[str, list[Any]]


@contextmanager
def record_outputs(
    model: nn.Module, names: Sequence[str], keep: Callable[[Tensor], Any] = Tensor.detach
) -> Iterator[Recorded]:
    """Append `keep(output)` to `recorded[name]` at each call of a submodule inside the `with` block; a submodule that a
    cache leaves out appends nothing. names: as in `model.named_modules()`.

    The model itself, its class and its weights stay as they are. Raises `ValueError` on a name that the model lacks.
    """
    yield from _recording(model, names, lambda _, output: keep(output), inputs=False)


@contextmanager
def record_inputs(
    model: nn.Module, names: Sequence[str], keep: Callable[[tuple], Any] = lambda inputs: inputs
) -> Iterator[Recorded]:
    """Record the tuple of positional arguments of each call, as `record_outputs` records outputs."""
    yield from _recording(model, names, lambda inputs, _: keep(inputs), inputs=True)


def _recording(
    model: nn.Module, names: Sequence[str], keep: Callable[[tuple, Any], Any], *, inputs: bool
) -> Iterator[Recorded]:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(f"{type(model).__name__} has no submodule {name!r}")
    recorded: Recorded = {name: [] for name in names}

    def hook(name: str, _: nn.Module, arguments: tuple, output: Any = None) -> None:
        recorded[name].append(keep(arguments, output))

    with ExitStack() as hooks:
        for name in names:
            register = modules[name].register_forward_pre_hook if inputs else modules[name].register_forward_hook
            hooks.enter_context(register(partial(hook, name)))
        yield recorded
