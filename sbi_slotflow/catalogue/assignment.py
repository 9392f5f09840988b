r"""Which component of a draw belongs to which source, for many draws at once.

With :math:`g_{ij}` the gain of assigning component j to source i, the best partial
matching of each draw is

.. math::
    \max_M \sum_{(i, j) \in M} g_{ij}

over sets M of pairs in which no source and no component appears twice. Pairs with a
negative gain are left out of it. Where the sources that the components prefer differ,
they are the best matching, and nothing has to be solved: that is most draws.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["best_matching"]


def best_matching(gains: Tensor) -> Tensor:
    """Match components with sources.

    Args:
        gains: Gains, -inf where there is no component, shape ``(S, N, K)`` (draw,
            source, component).

    Returns:
        Component of each source, -1 for none, int64, shape ``(S, N)``.
    """
    num, num_sources = gains.shape[:2]
    owner = torch.full((num, num_sources), -1)
    if not gains.numel():
        return owner
    value, preferred = gains.max(1)
    wanted = value > 0
    votes = torch.zeros(num, num_sources, dtype=torch.int64)
    votes.scatter_add_(1, preferred, wanted.long())
    simple = (votes <= 1).all(1)
    draw, component = (wanted & simple.unsqueeze(-1)).nonzero(as_tuple=True)
    owner[draw, preferred[draw, component]] = component
    contested = (~simple).nonzero().squeeze(-1)
    positive = gains[contested].clamp(min=0.0).numpy()
    solved = np.full(positive.shape[:2], -1)
    for chosen, matrix in zip(solved, positive, strict=True):
        rows, columns = linear_sum_assignment(matrix, maximize=True)
        chosen[rows] = np.where(matrix[rows, columns] > 0, columns, -1)
    owner[contested] = torch.from_numpy(solved)
    return owner
