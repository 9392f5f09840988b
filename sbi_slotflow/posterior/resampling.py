"""Resampling of weighted draws."""

import torch
from torch import Tensor

__all__ = ["systematic"]


def systematic(
    weights: Tensor, num: int, generator: torch.Generator | None = None
) -> Tensor:
    """Choose draws systematically: each as often as its weight says, up to one.

    Args:
        weights: Weights, not all zero, shape ``(S,)``.
        num: Number of draws to choose.
        generator: Source of randomness.

    Returns:
        Indices in ascending order, shape ``(num,)``.
    """
    start = torch.rand((), dtype=torch.float64, generator=generator)
    points = (torch.arange(num, dtype=torch.float64) + start) / max(1, num)
    edges = weights.double().cumsum(0)
    index = torch.searchsorted(edges, points * edges[-1], right=True)
    # Rounding may push the last point beyond the last edge.
    return index.clamp(max=int(weights.nonzero().max()))
