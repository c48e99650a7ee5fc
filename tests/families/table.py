"""What the table of tiny transformers is made of: a class, its blocks in run order, and the arguments of each step."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Unit = tuple[nn.Module, ...]  # the blocks of one unit, in the order in which they run


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Blocks that follow one another with the same streams of tokens.

    blocks: attributes of the model, each a `ModuleList`; unit i is the i-th block of each list, in this order.
    streams: the arguments of a block that hold tokens, in the order in which the block returns them.
    joins: the streams of the segment before, in the order in which the model concatenates them along dimension 1 to
        this segment's only stream. Empty: the streams go on as they are.
    align: brings what enters the first block of a unit to the layout of what leaves the last one, given the latter.
    """

    blocks: tuple[str, ...]
    streams: tuple[str, ...] = ("hidden_states",)
    joins: tuple[str, ...] = ()
    align: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Step:
    """Step `index` of a run in which the noise falls, for one prompt; what is fixed is the same object at each step."""

    index: int
    num_steps: int
    prompt: int
    batch: int
    kept: dict[tuple[int, str], Any] = field(repr=False)

    @property
    def sigma(self) -> float:
        """The noise level: 1 at the first step, above 0 at the last."""
        return 1 - self.index / self.num_steps

    @property
    def next_sigma(self) -> float:
        return 1 - (self.index + 1) / self.num_steps

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """An argument that the pipeline makes once."""
        key = (self.prompt, name)
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def fixed(self, name: str, *shape: int) -> Tensor:
        """Random conditioning."""
        seed = 1000 * self.prompt + sum(name.encode())
        return self.keep(name, lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))

    def ones(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.keep(name, lambda: torch.ones(*shape, dtype=dtype))

    def latents(self, *shape: int, seed: int = 7) -> Tensor:
        """A new tensor at each step, on the straight way from noise to a picture; of the prompt it knows nothing."""
        generator = torch.Generator().manual_seed(seed)
        noise, picture = torch.randn(2, *shape, generator=generator)
        return self.sigma * noise + (1 - self.sigma) * picture

    def timestep(self, scale: float = 1000.0, *, rising: bool = False, sigma: float | None = None) -> Tensor:
        """As pipelines expand it: a view of one number. rising: 1 - t, for schedules that count towards the picture."""
        level = self.sigma if sigma is None else sigma
        return torch.tensor(scale * (1 - level if rising else level)).expand(self.batch)


@dataclass(frozen=True, kw_only=True)
class TinyTransformer:
    """A class of diffusers with at least 6 units, a few tokens and little width.

    arguments: those of the forward at one step. returned: the tensors in what the forward returns. others: block lists
    that are no units (refiners, second trunks), as dotted attributes.
    """

    model_class: type[nn.Module]
    config: dict[str, Any]
    segments: tuple[Segment, ...]
    arguments: Callable[[Step], dict[str, Any]]
    returned: Callable[[Any], tuple[Tensor, ...]] | None = None
    batch: int = 2
    others: tuple[str, ...] = ()
    kept: dict[tuple[int, str], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def build(self, seed: int = 0, **config: Any) -> Any:
        """A model in eval mode with random weights everywhere, so that no gate is closed and all blocks matter."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of diffusers, at what its own classes import
            torch.manual_seed(seed)
            model = self.model_class(**(self.config | config))
            randomize(model)
        return model.eval()

    def inputs(self, step: int, num_steps: int, prompt: int = 0) -> dict[str, Any]:
        return self.arguments(Step(step, num_steps, prompt, self.batch, self.kept))

    def outputs(self, result: Any) -> tuple[Tensor, ...]:
        """All tensors of what the forward returned, with `return_dict` or without."""
        return tuple(tensors(result)) if self.returned is None else self.returned(result)

    def units(self, model: nn.Module) -> list[Unit]:
        """Of all segments, in run order."""
        return [unit for segment in self.segments for unit in units_of(model, segment)]

    def segment_of(self, model: nn.Module, unit: int) -> int:
        """Which segment a unit is part of."""
        for index, segment in enumerate(self.segments):
            count = len(units_of(model, segment))
            if unit < count:
                return index
            unit -= count
        raise IndexError(unit)


def units_of(model: nn.Module, segment: Segment) -> list[Unit]:
    lists = [model.get_submodule(name) for name in segment.blocks]
    return list(zip(*lists, strict=True))  # type: ignore[arg-type]


def tensors(result: Any) -> Iterator[Tensor]:
    """Of a tensor, of tuples, lists and dictionaries, in order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from tensors(value)
    elif isinstance(result, list | tuple):
        for value in result:
            yield from tensors(value)


def randomize(model: nn.Module) -> None:
    """Scales stay near 1; all else is normal noise that keeps the size of activations, also what starts at zero."""
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        with torch.no_grad():
            if parameter.ndim <= 1:
                if bool((parameter == 1).all()):
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                else:
                    parameter.normal_(std=0.2)
            else:
                parameter.normal_(std=min(0.5, math.prod(parameter.shape[1:]) ** -0.5))


def image_ids(height: int = 4, width: int = 4) -> Tensor:
    """Places of image tokens, as Flux counts them."""
    places = torch.arange(height * width)
    return torch.stack([torch.zeros(height * width), places // width, places % width], dim=1).float()
