"""Importance weights: their smoothed tail, and draws of equal weight made of them."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SmoothedWeights", "pareto_smoothed", "systematic", "worst_pareto_k"]

# Fewer draws have no tail to speak of.
_MIN_DRAWS = 25
# Draws of one K that have a k-hat of their own: share and number, at least.
_RARE, _FEWEST_OF_K = 0.01, 100


class SmoothedWeights(NamedTuple):
    """Pareto-smoothed log weights ``(S,)`` and k-hat, the shape of their upper tail."""

    log_weights: Tensor
    pareto_k: float


def pareto_smoothed(log_weights: Tensor) -> SmoothedWeights:
    """Smooth the tail of log importance weights ``(S,)``.

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
