r"""Points on an interval that keep a least distance from each other.

K points drawn independently and uniformly from a window of width W, conditioned on all
gaps being at least d, have the sorted density

.. math::
    p(f_1 < \ldots < f_K) = \frac{K!}{W^K Z_K},
    \qquad Z_K = \left(1 - \frac{(K - 1)\,d}{W}\right)^K ,

because removing d from every gap maps them one to one onto K sorted uniform points in
a window of width W - (K - 1) d. The same map samples them exactly, without rejection.
"""

import math

import torch
from torch import Tensor

__all__ = ["log_separation_constant", "sample_separated", "smallest_gap"]


def log_separation_constant(
    cardinality: Tensor, separation: float, width: float
) -> Tensor:
    """Log probability Z_K that K independent uniform points keep their distance.

    Args:
        cardinality: Numbers of points K, any shape.
        separation: Least gap d.
        width: Width W of the window.

    Returns:
        log Z_K, float64, of the shape of ``cardinality``; -inf where K points do not
        fit.
    """
    k = cardinality.double()
    free = 1.0 - (k - 1.0).clamp(min=0.0) * separation / width
    return k * torch.log(free.clamp(min=0.0)).nan_to_num(neginf=-math.inf)


def sample_separated(
    cardinality: Tensor,
    max_cardinality: int,
    bounds: tuple[float, float],
    separation: float,
) -> Tensor:
    """Draw sorted points with gaps of at least ``separation``.

    Args:
        cardinality: Number of points in each row, shape ``(B,)``.
        max_cardinality: Number of columns Kmax.
        bounds: The window.
        separation: Least gap d.

    Returns:
        Float64 points, shape ``(B, Kmax)``, ascending in the first K columns; later
        columns are meaningless.
    """
    low, high = bounds
    index = torch.arange(max_cardinality, device=cardinality.device)
    active = index < cardinality.unsqueeze(-1)
    uniform = torch.rand(
        active.shape, dtype=torch.float64, device=cardinality.device
    ).masked_fill(~active, 2.0)
    free = (high - low) - (cardinality - 1).clamp(min=0).double() * separation
    return low + uniform.sort(-1).values * free.unsqueeze(-1) + index * separation


def smallest_gap(values: Tensor, mask: Tensor) -> Tensor:
    """Least distance between two active values of each row, inf if fewer than two.

    Args:
        values: Shape ``(..., Kmax)``, in any order.
        mask: Active entries, same shape.

    Returns:
        Shape ``(...)``.
    """
    values = torch.where(mask, values, values.new_full((), math.inf))
    gaps = values.sort(-1).values.diff(dim=-1)
    gaps = gaps.nan_to_num(nan=math.inf, posinf=math.inf)
    return (
        gaps.amin(-1)
        if gaps.shape[-1]
        else values.new_full(values.shape[:-1], math.inf)
    )
