"""Distinct rows of a table, so that many equal rows are worked on once."""

import torch
from torch import Tensor

__all__ = ["unique_rows"]


def unique_rows(*columns: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Find the distinct rows of some columns.

    Column by column, which is faster than ``torch.unique(dim=0)``.

    Args:
        columns: The table, each of shape ``(N,)``.

    Returns:
        The distinct rows' columns, each of shape ``(n,)``, and which of them each row
        is, shape ``(N,)``.
    """
    which = torch.zeros_like(columns[0], dtype=torch.int64)
    for column in columns:
        if (column == column[:1]).all():
            continue
        values, index = torch.unique(column, return_inverse=True)
        _, which = torch.unique(which * len(values) + index, return_inverse=True)
    num = int(which.max()) + 1 if len(which) else 0
    # Any row of each kind stands for it.
    rows = torch.arange(len(which), device=which.device)
    sample = which.new_zeros(num).scatter(0, which, rows)
    return tuple(column[sample] for column in columns), which
