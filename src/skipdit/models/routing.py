"""Tokens that are routed past deep units: which units, and how tokens leave a stream and come back."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

KEPT_TOKENS = "kept tokens"  # in what a call is given


@dataclass(frozen=True, kw_only=True)
class TokenRoute:
    """Units `start` to `stop - 1` see only the tokens that are kept; the others come back before unit `stop`.

    Which are kept the call is given in `stored`, as `kept_tokens(...)`. fill: the others come back as the model's
    `fill_token` (arXiv 2510.21986), else as they were before unit `start` (arXiv 2501.04765). leaves_out: no token is
    kept, and the units do not run.
    """

    start: int
    stop: int
    fill: bool = False
    leaves_out: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.start < self.stop:
            raise ValueError(f"tokens are routed past a range of units after unit 0, got {self.start} to {self.stop}")

    def covers(self, unit: int) -> bool:
        return self.start <= unit < self.stop


def kept_tokens(kept: Tensor) -> Mapping[str, Mapping[str, Tensor]]:
    """Return what a call is given whose plan routes tokens: the indices of those that deep units see, rising, (batch,
    kept); (1, kept) serves every sample."""
    return {KEPT_TOKENS: {"kept": kept}}


def gather_tokens(
    stream: Float[Tensor, "rows tokens dim"], kept: Int[Tensor, "batch kept"]
) -> Float[Tensor, "rows kept dim"]:
    """Return the kept tokens; each sample's serve rows / batch rows: the frames of a clip."""
    return stream.gather(1, _index(stream, kept))


def scatter_tokens(
    stream: Float[Tensor, "rows kept dim"], over: Float[Tensor, "rows tokens dim"], kept: Int[Tensor, "batch kept"]
) -> Float[Tensor, "rows tokens dim"]:
    """Return `over` with the kept tokens from `stream`."""
    return over.scatter(1, _index(stream, kept), stream.to(over.dtype))


def _index(stream: Tensor, kept: Tensor) -> Tensor:
    rows = kept.repeat_interleave(stream.shape[0] // kept.shape[0], dim=0)
    return rows.unsqueeze(-1).expand(-1, -1, stream.shape[-1])
