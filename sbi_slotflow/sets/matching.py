r"""Ways to match K slots with K components, from their pairwise log densities.

With ``log_density[b, i, j]`` the log density of component j under slot i, a set's log
density under independent slots is the log of a permanent, the sum over all
assignments:

.. math::
    \log q(\{\theta_1..\theta_K\})
        = \log \sum_{\pi \in S_K} \prod_i q_i(\theta_{\pi(i)})

- :func:`log_permanent` evaluates it exactly,
- :func:`hungarian` finds its largest term (the paper, eq. 21),
- the ordered matching pairs slot i with the i-th component in canonical order; it
  is the diagonal and needs no function.

All work on batches of ragged K: only the upper left K x K block of a row counts.
"""

import itertools
import math
from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["EXACT_LIMIT", "NonFiniteDensityError", "hungarian", "log_permanent"]

EXACT_LIMIT = 12
"""Largest K whose permanent is evaluated exactly (K 2^(K-1) terms)."""

# Stands for log 0: finite, so that gradients through logsumexp stay finite.
_LOG_ZERO = -1e30
# Bounds the memory of the recursion.
_MAX_TERMS = 2**22


class NonFiniteDensityError(ValueError):
    """A pairwise log density is NaN or +inf: the network has diverged."""


def hungarian(log_density: Tensor, cardinality: Tensor) -> Tensor:
    """Assign to every slot the component that maximises the total log density.

    Args:
        log_density: Pairwise log densities, shape ``(B, Kmax, Kmax)`` (slot,
            component). Gradients are not followed.
        cardinality: Number K of slots and components in each row, shape ``(B,)``.

    Returns:
        Component of each slot, int64, shape ``(B, Kmax)``; slots from K on point at
        themselves.

    Raises:
        NonFiniteDensityError: If a density inside the K x K block is NaN or +inf.
    """
    size = log_density.shape[-1]
    values = log_density.detach().double().cpu().numpy()
    counts = cardinality.cpu().numpy()
    active = np.arange(size) < counts[:, None]
    block = active[:, :, None] & active[:, None, :]
    if np.isnan(values[block]).any() or np.isposinf(values[block]).any():
        raise NonFiniteDensityError(
            "log_density must not be NaN or +inf, cannot match slots."
        )
    values = np.where(np.isneginf(values), _LOG_ZERO, values)
    assignment = np.tile(np.arange(size), (len(values), 1))
    for row, k in enumerate(counts):
        if k > 1:
            _, columns = linear_sum_assignment(values[row, :k, :k], maximize=True)
            assignment[row, :k] = columns
    return torch.from_numpy(assignment).to(log_density.device)


def log_permanent(log_density: Tensor, cardinality: Tensor) -> Tensor:
    r"""Log of the permanent of the matrix of densities.

    The recursion runs over subsets S of components, adding one slot at a time,

    .. math::
        P(S) = \sum_{j \in S} q_{|S|}(\theta_j)\, P(S \setminus \{j\}),
        \qquad P(\emptyset) = 1,

    in log space. All terms are positive, so nothing cancels. It takes
    :math:`K 2^{K-1}` terms and is used up to K = 12 (:data:`EXACT_LIMIT`). For rows
    with a larger K the largest term is returned, a lower bound that is short by at
    most log K!.

    Args:
        log_density: Pairwise log densities, shape ``(B, Kmax, Kmax)``.
        cardinality: Number K of slots and components in each row, shape ``(B,)``.

    Returns:
        Log permanents, shape ``(B,)``; 0 for K = 0, -inf where no assignment has a
        positive density.

    Raises:
        NonFiniteDensityError: If a density inside the K x K block is NaN.
    """
    batch, size, _ = log_density.shape
    if batch == 0:
        return log_density.new_zeros(0)
    index = torch.arange(size, device=log_density.device)
    active = index < cardinality.unsqueeze(-1)
    block = active.unsqueeze(-1) & active.unsqueeze(-2)
    if torch.isnan(log_density).logical_and(block).any():
        raise NonFiniteDensityError(
            "log_density must not be NaN inside the K x K block."
        )
    # Outside the block an identity matrix, which leaves the permanent unchanged.
    identity = torch.where(index.unsqueeze(-1) == index, 0.0, _LOG_ZERO)
    padded = torch.where(
        block, log_density.clamp(min=_LOG_ZERO), identity.to(log_density)
    )
    exact = cardinality <= EXACT_LIMIT
    largest = int(torch.where(exact, cardinality, 0).max())
    # The widest layer of the recursion has about this many terms a row.
    width = max(1, math.comb(largest, largest // 2) * largest // 2)
    chunks = padded[:, :largest, :largest].split(max(1, _MAX_TERMS // width))
    result = torch.cat([_subset_recursion(chunk) for chunk in chunks])
    if not exact.all():
        slots = hungarian(log_density, cardinality).unsqueeze(-1)
        best = padded.gather(-1, slots).squeeze(-1).sum(-1)
        result = torch.where(exact, result, best)
    return torch.where(result > 0.5 * _LOG_ZERO, result, result.new_full((), -math.inf))


def _subset_recursion(log_density: Tensor) -> Tensor:
    """Log permanents of full K x K matrices ``(B, K, K)``."""
    size = log_density.shape[-1]
    table = log_density.new_zeros(len(log_density), 1)
    for slot in range(size):
        tables = _subsets(size, slot + 1)
        members, previous = (part.to(log_density.device) for part in tables)
        terms = log_density[:, slot, :][:, members] + table[:, previous]
        table = torch.logsumexp(terms, dim=-1)
    return table.squeeze(-1)


@lru_cache(maxsize=256)
def _subsets(size: int, count: int) -> tuple[Tensor, Tensor]:
    """Members ``(num_subsets, count)`` of all subsets of a size.

    Beside them, in the same shape, the position of the subset without that member among
    those of size ``count - 1``.
    """
    members = list(itertools.combinations(range(size), count))
    fewer = itertools.combinations(range(size), count - 1)
    place = {subset: position for position, subset in enumerate(fewer)}
    previous = [[place[s[:i] + s[i + 1 :]] for i in range(count)] for s in members]
    return torch.tensor(members), torch.tensor(previous)
