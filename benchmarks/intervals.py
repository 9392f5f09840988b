"""Means with their errors; 95 % intervals of shares, means and medians, by scipy."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

__all__ = ["mean_interval", "median_interval", "share_interval", "spread"]

Interval = tuple[float, float]


def spread(values: ArrayLike) -> dict[str, Any]:
    """Mean with its standard error, median and extremes."""
    array = np.asarray(values, dtype=float)
    several = len(array) > 1
    return {
        "mean": float(array.mean()),
        "error": array.std(ddof=1) / math.sqrt(len(array)) if several else None,
        "median": float(np.median(array)),
        "min": float(array.min()),
        "max": float(array.max()),
        "n": len(array),
    }


def share_interval(hits: int, num: int) -> Interval:
    """Wilson's interval of a share."""
    found = stats.binomtest(int(hits), int(num)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def mean_interval(values: ArrayLike) -> Interval | None:
    """Student's interval of a mean; None of fewer than two values."""
    array = _finite(values)
    if len(array) < 2:
        return None
    half = stats.t.ppf(0.975, len(array) - 1) * stats.sem(array)
    return float(array.mean() - half), float(array.mean() + half)


def median_interval(values: ArrayLike) -> Interval | None:
    """Interval of a median between order statistics; None of fewer than six values."""
    array = np.sort(_finite(values))
    num = len(array)
    low = int(stats.binom.ppf(0.025, num, 0.5))
    if num < 6 or low < 1:
        return None
    return float(array[low - 1]), float(array[num - low])


def _finite(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=float).ravel()
    return array[np.isfinite(array)]
