"""Records at irregular times: time, value and error of each sample.

A record is ``(T, 3)``. A sample whose value is NaN is missing, and so is one whose
error is 0, which is how records of different length are padded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import Numbers, as_count, as_floats

__all__ = ["filled", "packed"]


def filled(x: Numbers) -> Tensor:
    """Records ``(..., T, 3)`` without NaN: samples that are missing are zeros.

    Raises:
        ValueError: If a time or an error is not finite where there is a value, or an
            error is negative.
    """
    x = as_floats(x, "x")
    if x.ndim < 2 or x.shape[-1] != 3:
        raise ValueError(
            "x must have shape (..., T, 3), time, value and error, got "
            f"{tuple(x.shape)}."
        )
    time, value, error = x.unbind(-1)
    missing = value.isnan() | (error == 0)
    bad = ~missing & ~(time.isfinite() & value.isfinite() & error.isfinite())
    if bad.any() or (~missing & (error < 0)).any():
        raise ValueError(
            "x must have finite times and values, and finite errors that are not "
            "negative, where a value is not NaN; it has others in "
            f"{int((bad | (~missing & (error < 0))).sum())} samples."
        )
    return torch.where(missing.unsqueeze(-1), 0.0, x)


def packed(
    times: Sequence[Numbers],
    values: Sequence[Numbers],
    errors: Sequence[Numbers],
    length: int | None = None,
) -> Tensor:
    """Pack records of different length.

    Args:
        times: Times of each record.
        values: Values, NaN where missing.
        errors: Errors.
        length: Samples T to pad to; those of the longest if None.

    Returns:
        Records of shape ``(B, T, 3)``.

    Raises:
        ValueError: If lengths do not fit each other or T.

    Example:
        >>> packed([[0.0, 1.0, 2.0], [5.0]], [[1.0, 2.0, 1.5], [3.0]],
        ...        [[0.1, 0.1, 0.1], [0.2]]).shape
        torch.Size([2, 3, 3])
    """
    rows = [
        torch.stack([as_floats(part, "records").double() for part in parts], -1)
        for parts in zip(times, values, errors, strict=True)
    ]
    most = max((len(row) for row in rows), default=0)
    size = most if length is None else as_count(length, "length")
    if size < most:
        raise ValueError(f"length must be at least {most}, got {length}.")
    x = torch.zeros(len(rows), size, 3, dtype=torch.float64)
    for i, row in enumerate(rows):
        x[i, : len(row)] = row
    return filled(x)
