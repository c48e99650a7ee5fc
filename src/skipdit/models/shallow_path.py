"""The shallow path of a model: its first and last units, without those in between.

Training that leaves out the deep units in some of its steps (`routing.deep_drop`) teaches the shallow path to predict.
It can then make the unconditional prediction of guidance at a fraction of the cost (arXiv 2510.21986).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

from skipdit.files.untrusted import as_type_or_none
from skipdit.models.forward_plan import ForwardPlan
from skipdit.models.long_skip import LongSkipLinks, LongSkipModel
from skipdit.models.pairing import ConfigEntry
from skipdit.models.routing import TokenRoute
from skipdit.options import Guidance


@dataclass(frozen=True, kw_only=True)
class ShallowPath(ConfigEntry):
    """The units of the shallow path that a model was trained with, kept in its config as `shallow_path`."""

    num_shallow_units: int
    """Number of units that run at the start, and also at the end."""
    fill: bool = False
    """Feed the model's `fill_token` to the last units instead of the output of the first ones."""

    def __post_init__(self) -> None:
        number = self.num_shallow_units
        if as_type_or_none(number, int) is None or number < 1:
            raise ValueError(f"num_shallow_units must be a whole number of at least 1, got {number!r}")
        if as_type_or_none(self.fill, bool) is None:
            raise ValueError(f"fill must be true or false, got {self.fill!r}")

    def plan(self, links: LongSkipLinks) -> ForwardPlan:
        """Return the plan for a model with these links; always the same object, so that a compiled model has one graph
        for it. Raises `ValueError` if no unit would be left out."""
        number, maximum = self.num_shallow_units, (links.num_units - 1) // 2
        if number > maximum:
            raise ValueError(f"num_shallow_units must be at most {maximum} for {links.num_units} units, got {number}")
        route = TokenRoute(start=number, stop=links.num_units - number, fill=self.fill, leaves_out=True)
        return _plan(links.num_units, tuple(links.sources.items()), links.segment_starts, route)


def default_shallow_units(num_units: int) -> int:
    """Return the default number of shallow units in training, at each end of the model."""
    return min(2, (num_units - 1) // 2)


@lru_cache
def _plan(
    num_units: int, sources: tuple[tuple[int, int], ...], segment_starts: tuple[int, ...], route: TokenRoute
) -> ForwardPlan:
    return ForwardPlan.of(LongSkipLinks(num_units, dict(sources), segment_starts), route=route)


def guidance_plan(
    model: LongSkipModel, guidance: Guidance, num_shallow_units: int | None, guidance_scale: float
) -> ForwardPlan | None:
    """Return the plan for guidance's unconditional prediction: the shallow path for `"shallow"` guidance; `None`, which
    means all units, for `"full"` guidance.

    num_shallow_units: number of units at each end in the shallow path; by default the number it was trained with.
    Raises `ValueError` if the model was not trained with a shallow path and no number is given, or if `guidance_scale`
    is at most 1.
    """
    if guidance not in get_args(Guidance):
        raise ValueError(f"guidance must be one of {', '.join(get_args(Guidance))}, got {guidance!r}")
    if guidance == "full":
        if num_shallow_units is not None:
            raise ValueError(f"guidance_shallow_units is for guidance 'shallow', got {num_shallow_units} with 'full'")
        return None
    if guidance_scale <= 1:
        raise ValueError(f"guidance 'shallow' needs a guidance_scale above 1, got {guidance_scale:g}")
    trained = ShallowPath.of(model.config.get("shallow_path"))
    if num_shallow_units is None:
        if trained is None:
            raise ValueError(
                f"this {type(model).__name__} was not trained with its deep units left out (routing.deep_drop), so its "
                "first and last units cannot predict without them: use guidance 'full', or set guidance_shallow_units "
                "to the number of units to try"
            )
        return trained.plan(model.long_skip_links)
    fill = model.fill_token is not None if trained is None else trained.fill
    return ShallowPath(num_shallow_units=num_shallow_units, fill=fill).plan(model.long_skip_links)
