"""Routes tokens past deep units: which units, and how tokens leave a stream and return to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

KEPT_TOKENS = "kept tokens"  # a key of `stored`


@dataclass(frozen=True, kw_only=True)
class TokenRoute:
    """The route of tokens past units `start` to `stop - 1`, which see only the kept tokens (see `kept_tokens`)."""

    start: int
    """The first unit that sees only the kept tokens."""
    stop: int
    """The unit before which the other tokens return."""
    fill: bool = False
    """Tokens return as the model's `fill_token` (arXiv 2510.21986), or else as they were before unit `start` (arXiv
    2501.04765)."""
    leaves_out: bool = False
    """Keep no token, and do not run the units."""

    def __post_init__(self) -> None:
        if not 0 < self.start < self.stop:
            raise ValueError(
                f"tokens must be routed past a range of units after unit 0, got {self.start} to {self.stop}"
            )

    def covers(self, unit: int) -> bool:
        return self.start <= unit < self.stop


def kept_tokens(kept: Tensor) -> Mapping[str, Mapping[str, Tensor]]:
    """Return the `stored` argument of a call whose plan routes tokens. kept: ascending indices of the tokens that deep
    units see, (batch, kept), or (1, kept) for all samples."""
    return {KEPT_TOKENS: {"kept": kept}}


def gather_tokens(
    stream: Float[Tensor, "rows tokens dim"], kept: Int[Tensor, "batch kept"]
) -> Float[Tensor, "rows kept dim"]:
    """Return the kept tokens. The indices of a sample apply to rows / batch rows, which are the frames of a clip."""
    return stream.gather(1, _index(stream, kept))


def scatter_tokens(
    stream: Float[Tensor, "rows kept dim"], over: Float[Tensor, "rows tokens dim"], kept: Int[Tensor, "batch kept"]
) -> Float[Tensor, "rows tokens dim"]:
    """Return `over` with its kept tokens replaced by `stream`."""
    return over.scatter(1, _index(stream, kept), stream.to(over.dtype))


def _index(stream: Tensor, kept: Tensor) -> Tensor:
    rows = kept.repeat_interleave(stream.shape[0] // kept.shape[0], dim=0)
    return rows.unsqueeze(-1).expand(-1, -1, stream.shape[-1])


@dataclass(eq=False)
class RoutedTokens:
    """The tokens of one forward call that routes some of them past deep units."""

    route: TokenRoute
    kept: Tensor | None
    """Indices of the kept tokens, (batch, kept)."""
    fill: Tensor | None
    """The value, (dim), as which the other tokens return; `None` for their old values."""
    passed: Tensor | None = None
    """All tokens as they were before some left, (rows, tokens, dim)."""
    texts_first: bool = False
    """True if text tokens were concatenated before the image tokens."""

    @classmethod
    def begin(cls, route: TokenRoute, stored: Mapping[str, Mapping[str, Tensor]] | None, fill: Tensor | None) -> Self:
        """Begin a call. Raises `ValueError` if `stored` lacks the kept tokens, or the model the fill token."""
        kept = (stored or {}).get(KEPT_TOKENS, {}).get("kept")
        if kept is None and not route.leaves_out:
            raise ValueError("a plan that routes tokens needs to know which to keep: pass stored=kept_tokens(kept)")
        if kept is not None and route.leaves_out:
            raise ValueError("a plan that leaves out deep units keeps no tokens: do not pass stored")
        if route.fill and fill is None:
            raise ValueError("this model has no fill token: build it with LongSkipConfig(fill_token=True)")
        return cls(route, kept, fill if route.fill else None)

    def shed(self, stream: Tensor) -> Tensor:
        """Return the kept tokens of a stream, or all of them if units are left out."""
        return stream if self.kept is None else gather_tokens(stream, self.kept)

    def leave(self, stream: Tensor, copy: Tensor) -> Tensor:
        """Return the kept tokens of a stream, and remember all of them. copy: the stream, safe from later writes."""
        if self.passed is None:  # else a gradient-checkpointed unit is running again
            self.passed = copy
        return self.shed(stream)

    def restore(self, stream: Tensor, fill: Tensor | None = None) -> Tensor:
        """Return all tokens, given a stream of the kept ones (if any) and any text tokens.

        fill: the value of the other tokens, (dim); by default their old values.
        """
        assert self.passed is not None
        others = self.passed if fill is None else fill.to(stream.dtype).expand_as(self.passed)
        num_images = others.shape[1] if self.kept is None else self.kept.shape[1]
        num_texts = stream.shape[1] - num_images
        if not num_texts:
            return others if self.kept is None else scatter_tokens(stream, others, self.kept)
        sizes = (num_texts, num_images) if self.texts_first else (num_images, num_texts)
        first, last = stream.split(sizes, dim=1)
        texts, images = (first, last) if self.texts_first else (last, first)
        images = others if self.kept is None else scatter_tokens(images, others, self.kept)
        return torch.cat([texts, images] if self.texts_first else [images, texts], dim=1)

    def keep(self, value: Any, by_token: "ByToken") -> Any:
        """Return the entries of a block's input that belong to the kept tokens."""
        assert self.passed is not None
        return value if self.kept is None else by_token.keep(value, self.kept, self.passed.shape[1])


@dataclass(frozen=True, kw_only=True)
class ByToken:
    """The layout of a per-token input of a block, a tensor or a tuple of tensors."""

    dim: int = 0
    """The dimension of the tokens; if its size is 1, the entry is for all of them."""
    text: Literal["before", "after"] | None = None
    """Position of the entries of text tokens, which are all kept; `None` if there are none."""
    index: int | None = None
    """The only element of a tuple that is per token; `None` for all."""
    ndim: int | None = None
    """The number of dimensions that a tensor must have to be per token; `None` for any."""
    of_rows: bool = False
    """True for an input of temporal blocks with (batch x tokens) rows; their other inputs are not per token."""

    def keep(self, value: Any, kept: Int[Tensor, "batch kept"], num_tokens: int) -> Any:
        """Return the entries of the kept tokens. Raises `ValueError` if samples that share entries keep different
        tokens."""
        if isinstance(value, tuple | list):
            return type(value)(
                self._keep_all(entry, kept, num_tokens) if self.index in (None, index) else entry
                for index, entry in enumerate(value)
            )
        return self._keep_all(value, kept, num_tokens)

    def _keep_all(self, value: Any, kept: Tensor, num_tokens: int) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._keep_all(entry, kept, num_tokens) for entry in value)
        if not isinstance(value, Tensor) or self.ndim not in (None, value.ndim):
            return value
        if self.of_rows:
            rows = value.unflatten(0, (-1, num_tokens))
            return _take(rows, kept.expand(len(rows), -1), 1).flatten(0, 1)
        dim = self.dim % value.ndim
        size = value.shape[dim]
        if size == 1 and num_tokens > 1:
            return value
        num_texts = size - num_tokens
        index = kept
        if self.text is not None and num_texts:
            texts = torch.arange(num_texts, device=kept.device).expand(len(kept), -1)
            index = torch.cat([texts, kept + num_texts] if self.text == "before" else [kept, texts + num_tokens], dim=1)
        elif num_texts:
            raise ValueError(f"a per-token input must have {num_tokens} entries, one per token, got {size}")
        if dim == 0 and len(kept) > 1:
            raise ValueError(
                "in this model the samples of a batch share their token positions: keep the same tokens in all of them "
                f"by indices of shape (1, kept), got {tuple(kept.shape)}"
            )
        return value.index_select(dim, index[0]) if len(kept) == 1 else _take(value, index, dim)


def _take(value: Tensor, index: Tensor, dim: int) -> Tensor:
    shape = [len(index)] + [1] * (value.ndim - 1)
    shape[dim] = index.shape[1]
    return value.take_along_dim(index.view(shape), dim=dim)
