"""Measures changes of values, as numbers that stay on the device until they are read together."""

import torch
from torch import Tensor

from skipdit.models.forward_plan import Stored

Number = Tensor  # a scalar in float32


def l1_distance(stored: Stored, before: Stored) -> Number:
    """Return the sum of the absolute differences between two sets of values, NaN if there are none."""
    return _total([(value - last).abs() for value, last in _pairs(stored, before)])


def l1_norm(stored: Stored) -> Number:
    """Return the sum of the absolute values of a set, NaN if there are none."""
    return _total([value.abs() for values in stored.values() for value in values.values()])


def relative_change(stored: Stored, before: Stored) -> Number:
    """Return the L1 distance between two sets of values over the L1 norm of the second: 0 if they are equal, NaN if
    there is nothing to compare."""
    distance = l1_distance(stored, before)
    return torch.where(distance == 0, distance, distance / _total([last.abs() for _, last in _pairs(stored, before)]))


def change_at_rate(probe: Stored, before: Stored, rate: Number) -> Number:
    """Return the estimated relative change of stored values, given the probe of this step and of the last one. rate: as
    of `rate_of_change`; 0 if the probe has not changed, whatever the rate."""
    distance = l1_distance(probe, before)
    return torch.where(distance == 0, distance, distance * rate)


def rate_of_change(values: Stored, values_before: Stored, probe: Stored, probe_before: Stored) -> Number:
    """Return the L1 distance of values between two full steps over that of the probe, over the L1 norm of the values
    (EasyCache's k over the norm of the output, arXiv 2507.02860)."""
    return l1_distance(values, values_before) / l1_distance(probe, probe_before) / l1_norm(values)


MOST_PACE = 1.5  # as in DiCache's code


def pace_of(trail: Stored, last: Stored, before_last: Stored) -> Number:
    """Return how far a probe has moved since the full step before the last one, over how far it had moved at the last
    one; from 1 to 1.5 (gamma of DiCache, arXiv 2508.17356)."""
    whole = l1_distance(last, before_last)
    pace = (l1_distance(trail, before_last) / whole).clamp(1.0, MOST_PACE)
    return torch.where(whole == 0, torch.ones_like(pace), pace)


def _pairs(stored: Stored, before: Stored) -> list[tuple[Tensor, Tensor]]:
    return [(value, before[name][key]) for name, values in stored.items() for key, value in values.items()]


def _total(tensors: list[Tensor]) -> Number:
    return torch.stack([tensor.float().sum() for tensor in tensors]).sum() if tensors else torch.tensor(torch.nan)
