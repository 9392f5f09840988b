"""Sets of points as data: coordinates of each point, and whether it is there.

A set of up to n points in d dimensions is ``(n, d + 1)``: d coordinates and a 1 for
each point, rows of zeros for the rest, which is how sets of different size are padded.
A point with a coordinate that is NaN is missing too. The order of the rows says
nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import Numbers, as_count, as_floats

__all__ = ["filled_points", "packed_points"]


def filled_points(x: Numbers) -> Tensor:
    """Sets ``(..., n, d + 1)`` without NaN: points that are missing are zeros.

    Raises:
        ValueError: If a point that is there has a coordinate that is not finite, or its
            last entry is neither 0 nor 1.
    """
    x = as_floats(x, "x")
    if x.ndim < 2 or x.shape[-1] < 2:
        raise ValueError(
            "x must have shape (..., n, d + 1), coordinates of points and whether they "
            f"are there, got {tuple(x.shape)}."
        )
    there = x[..., -1]
    missing = x.isnan().any(-1) | (there == 0)
    bad = ~missing & ~((there == 1) & x.isfinite().all(-1))
    if bad.any():
        raise ValueError(
            "x must have 1 (0 for none) as the last entry of each point, and finite "
            f"coordinates; it has others in {int(bad.sum())} points."
        )
    return torch.where(missing.unsqueeze(-1), 0.0, x)


def packed_points(points: Sequence[Numbers], length: int | None = None) -> Tensor:
    """Pack sets of points of different size.

    Args:
        points: Of each set, its points ``(n_b, d)``, or ``(n_b,)`` on a line.
        length: Points n to pad to; those of the largest set if None.

    Returns:
        Sets of shape ``(B, n, d + 1)``, float64.

    Raises:
        ValueError: If there are no sets, or their shapes do not fit each other or n.

    Example:
        >>> packed_points([[0.5, 2.0, 1.0], [3.0]])[1].tolist()
        [[3.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    """
    sets = [as_floats(one, "points").double() for one in points]
    sets = [one.unsqueeze(-1) if one.ndim == 1 else one for one in sets]
    shapes = {one.shape[1:] for one in sets}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1:
        raise ValueError(
            "points must be sets of shape (n, d) with one d, got "
            f"{[tuple(one.shape) for one in sets]}."
        )
    most = max(len(one) for one in sets)
    size = max(1, most) if length is None else as_count(length, "length")
    if size < most:
        raise ValueError(f"length must be at least {most}, got {length}.")
    x = torch.zeros(len(sets), size, shape[0] + 1, dtype=torch.float64)
    for row, one in zip(x, sets, strict=True):
        row[: len(one), :-1], row[: len(one), -1] = one, 1.0
    return filled_points(x)
