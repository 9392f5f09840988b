"""Circular samples, such as phases."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["circular_mean", "near", "unwrap", "wrapped"]


def unwrap(values: Tensor, period: float, weights: Tensor | None = None) -> Tensor:
    r"""Shift circular values by whole periods to within half a period of their mean.

    The circular mean is the angle of :math:`\sum_i w_i e^{2\pi i v_i / P}`, taken in
    [0, P). Medians and quantiles of the shifted values are circular ones, as long as
    the values don't fill the circle.

    Raises:
        ValueError: If the period is not positive.
    """
    if not period > 0:
        raise ValueError(f"period must be positive, got {period}.")
    flat = None if weights is None else weights.double().reshape(-1, 1)
    mean = circular_mean(values.reshape(-1, 1), [period], flat).squeeze(-1)
    centred = (values - mean + period / 2).remainder(period) - period / 2
    return (centred + mean).to(values.dtype)


def circular_mean(
    values: Tensor,
    periods: Sequence[float] | Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Means over draws ``(S, ..., D)``, circular ones in [0, period), float64.

    D periods are infinite where a parameter is not circular. The weights' shape
    broadcasts with that of the values.
    """
    values = values.double()
    weight = torch.ones_like(values) if weights is None else weights.double()
    weight = weight.expand_as(values)
    total = weight.sum(0)
    period = torch.as_tensor(periods, dtype=values.dtype, device=values.device)
    circular = period.isfinite()
    turn = torch.where(circular, period, 1.0) / (2 * math.pi)
    angles = values / turn
    sine, cosine = (weight * angles.sin()).sum(0), (weight * angles.cos()).sum(0)
    angle = torch.atan2(sine, cosine).remainder(2 * math.pi) * turn
    return torch.where(circular, angle, (weight * values).sum(0) / total)


def near(values: Tensor, centre: Tensor, periods: Sequence[float] | Tensor) -> Tensor:
    """Shift circular values ``(..., C)`` to within half a period of a centre.

    C periods are infinite where a column is not circular.
    """
    period = torch.as_tensor(periods, dtype=values.dtype, device=values.device)
    turns = ((values - centre) / period).round()
    return values - turns * torch.where(period.isfinite(), period, 0.0)


def wrapped(angle: Tensor) -> Tensor:
    """An angle's representative in [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi
