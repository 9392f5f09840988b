r"""Points on an interval or a circle that keep a least distance from each other.

K points drawn independently and uniformly from a window of width W, conditioned on all
gaps being at least d, have the sorted density

.. math::
    p(f_1 < \ldots < f_K) = \frac{K!}{W^K Z_K},
    \qquad Z_K = \left(1 - \frac{(K - 1)\,d}{W}\right)^K ,

because removing d from every gap maps them one to one onto K sorted uniform points in
a window of width W - (K - 1) d. The same map samples them exactly, without rejection.

On a circle of circumference W, where the last point is next to the first,

.. math:: Z_K = \left(1 - \frac{K d}{W}\right)^{K - 1}, \qquad K \ge 1,

and the gaps less d are uniform on a simplex, the first point on the circle.
"""

import math

import torch
from torch import Tensor

__all__ = ["log_separation_constant", "sample_separated", "smallest_gap"]


def log_separation_constant(
    cardinality: Tensor, separation: float, width: float, circular: bool = False
) -> Tensor:
    """Log Z_K in float64 for each K, in a window or on a circle; -inf if none fit."""
    k = cardinality.double()
    others = (k - 1.0).clamp(min=0.0)
    gaps, power = (torch.where(others > 0, k, 0.0), others) if circular else (others, k)
    free = 1.0 - gaps * separation / width
    return power * torch.log(free.clamp(min=0.0)).nan_to_num(neginf=-math.inf)


def sample_separated(
    cardinality: Tensor,
    max_cardinality: int,
    bounds: tuple[float, float],
    separation: float,
    circular: bool = False,
) -> Tensor:
    """Draw points with gaps of at least ``separation`` for numbers K of shape ``(B,)``.

    Float64, shape ``(B, Kmax)``, ascending in the first K columns; later columns are
    meaningless.
    """
    low, high = bounds
    index = torch.arange(max_cardinality, device=cardinality.device)
    active = index < cardinality.unsqueeze(-1)
    if circular:
        return _on_circle(active, bounds, separation)
    uniform = torch.rand_like(active, dtype=torch.float64).masked_fill(~active, 2.0)
    free = (high - low) - (cardinality - 1).clamp(min=0).double() * separation
    return low + uniform.sort(-1).values * free.unsqueeze(-1) + index * separation


def _on_circle(
    active: Tensor, bounds: tuple[float, float], separation: float
) -> Tensor:
    """As :func:`sample_separated`, on a circle."""
    low, width = bounds[0], bounds[1] - bounds[0]
    rest = torch.empty_like(active, dtype=torch.float64).exponential_() * active
    count = active.sum(-1, keepdim=True)
    free = (width - count * separation) * rest / rest.sum(-1, keepdim=True)
    gaps = torch.where(active, free + separation, 0.0)
    first = width * torch.rand_like(gaps[..., :1])
    # Beyond the last active point the sum of gaps would come back to the first.
    places = (first + gaps.cumsum(-1) - gaps) % width
    return low + places.masked_fill(~active, math.inf).sort(-1).values


def smallest_gap(values: Tensor, mask: Tensor, period: float | None = None) -> Tensor:
    """Least distance of two active values in rows ``(..., Kmax)``, inf if fewer.

    On a circle of circumference ``period``, if that is given.
    """
    values = torch.where(mask, values, values.new_full((), math.inf))
    values = values.sort(-1).values
    gaps = values.diff(dim=-1)
    if period is not None:
        first = torch.where(mask.sum(-1, keepdim=True) > 1, values[..., :1], math.inf)
        last = values.masked_fill(values.isinf(), -math.inf).amax(-1, keepdim=True)
        gaps = torch.cat([gaps, first + period - last], -1)
    gaps = gaps.nan_to_num(nan=math.inf, posinf=math.inf)
    none = values.new_full(values.shape[:-1], math.inf)
    return gaps.amin(-1) if gaps.shape[-1] else none
