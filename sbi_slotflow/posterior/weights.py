r"""Importance weights: their smoothed tail, and draws of equal weight made of them.

How heavy the tail of weights w is, k-hat says, the shape of the generalised Pareto
distribution of what exceeds a threshold (Vehtari et al. 2024). Weights of sets are
often a mixture: nearly equal for the usual K, spread below and a little above for a
rarer one. The threshold then stands at the edge of the equal ones, excesses spread
over orders of magnitude though no weight is large, and the shape comes out above one.
The same index is estimated by Hill (1975),

.. math::
    h_m = \frac{1}{m} \sum_{i=1}^{m} \log \frac{w_{(i)}}{w_{(m+1)}},
    \qquad \hat k = \min\left( \hat k_{GPD},\; \max_{m \ge 5} h_m \right)

of the largest weights, which such a mixture does not mislead; it is asked where the
first is above 0.7. Of a tail that is heavy
indeed the largest h is above the index, so that k-hat stays what it was.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SmoothedWeights", "pareto_smoothed", "systematic", "worst_pareto_k"]

# Fewer draws have no tail to speak of.
_MIN_DRAWS = 25
# A k-hat that is looked at twice.
_DOUBTFUL = 0.7
# Largest weights of which a Hill estimate is made, at least.
_FEWEST_LARGEST = 5
# Draws of one K that have a k-hat of their own: share and number, at least.
_RARE, _FEWEST_OF_K = 0.01, 100


class SmoothedWeights(NamedTuple):
    """Pareto-smoothed log weights ``(S,)`` and k-hat, the shape of their upper tail."""

    log_weights: Tensor
    pareto_k: float


def pareto_smoothed(log_weights: Tensor) -> SmoothedWeights:
    """Smooth the tail of log importance weights ``(S,)``; see the module.

    Weights stay as they are where no Pareto distribution describes their tail.
    Source: Vehtari, Simpson, Gelman, Yao, Gabry 2024.
    """
    finite = torch.isfinite(log_weights)
    values = log_weights[finite].double().cpu().numpy()
    if len(values) < _MIN_DRAWS:
        return SmoothedWeights(log_weights, math.nan)
    # The tail that the method fits; equal weights have none.
    tail = math.ceil(min(0.2 * len(values), 3 * math.sqrt(len(values))))
    if np.ptp(np.sort(values)[-tail:]) < 1e-4:
        return SmoothedWeights(log_weights, 0.0)
    result, shape = _fitted(values)
    if not np.isfinite(result).all():
        # Copies of one draw, or sets without components, have equal weights, and a tail
        # of them has no fit. What tells of the tail are the different ones.
        unique = np.unique(values)
        if len(unique) >= _MIN_DRAWS:
            shape = _fitted(unique)[1]
        else:
            alone = (values > values.max() - 1e-4).sum() == 1
            shape = math.inf if alone else 0.0
        return SmoothedWeights(log_weights, float(shape))
    if shape > _DOUBTFUL and (steepest := _steepest(values, tail)) < shape:
        return SmoothedWeights(log_weights, steepest)
    # What it returns sums to one; keep our scale.
    shift = np.logaddexp.reduce(values) - np.logaddexp.reduce(result)
    smoothed = log_weights.clone()
    smoothed[finite] = torch.from_numpy(np.asarray(result) + shift).to(smoothed)
    return SmoothedWeights(smoothed, float(shape))


def worst_pareto_k(
    log_weights: Tensor, k: Tensor, smoothed: SmoothedWeights, least_share: float = 0.0
) -> float:
    """Largest k-hat of all draws ``(S,)`` and of those of each cardinality ``(S,)``.

    Draws of one K may be too few to show in the tail of all, or hidden by others of
    equal weight, as those without components are. Left out are cardinalities of fewer
    than 100 draws or 1 %, and those with less than a share of the weight. NaN where
    too few draws have a positive weight for any.
    """
    shares = smoothed.log_weights.double().softmax(0)
    found = [smoothed.pareto_k]
    for one in k.unique():
        chosen = k == one
        part = log_weights[chosen]
        enough = len(part) >= max(_FEWEST_OF_K, _RARE * len(k))
        counts = float(shares[chosen].sum()) >= least_share
        if enough and counts and torch.isfinite(part).any():
            found.append(pareto_smoothed(part).pareto_k)
    return max((value for value in found if not math.isnan(value)), default=math.nan)


def _steepest(values: NDArray[np.float64], tail: int) -> float:
    """Largest Hill estimate from the tail of log weights ``(S,)``."""
    largest = np.sort(values)[::-1][: tail + 1]
    num = np.arange(1, len(largest))
    estimates = largest[:-1].cumsum() / num - largest[1:]
    return float(estimates[_FEWEST_LARGEST - 1 :].max(initial=-math.inf))


def _fitted(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Smoothed log weights and k-hat; NaN and infinite where the fit fails."""
    from arviz_stats.base.array import array_stats  # brings xarray

    failed = np.full(len(values), np.nan), math.inf
    try:
        # It takes log likelihoods of left-out data: weights are their inverse.
        with np.errstate(all="ignore"):
            result, shape = array_stats.psislw(-values)
    except ValueError:  # all values of the tail are the same
        return failed
    return (result, float(shape)) if np.isfinite(result).all() else failed


def systematic(
    weights: Tensor, num: int, generator: torch.Generator | None = None
) -> Tensor:
    """Choose draws of weights ``(S,)``: each as often as its weight says, up to one.

    Indices ``(num,)`` ascend; of equal weights they are evenly spaced.
    """
    start = torch.rand((), dtype=torch.float64, generator=generator)
    points = (torch.arange(num, dtype=torch.float64) + start) / max(1, num)
    edges = weights.double().cumsum(0)
    index = torch.searchsorted(edges, points * edges[-1], right=True)
    # Rounding may push the last point beyond the last edge.
    return index.clamp(max=int(weights.nonzero().max()))
