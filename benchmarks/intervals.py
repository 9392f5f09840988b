"""95 % intervals of shares, means and medians, by scipy."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

__all__ = ["mean_interval", "median_interval", "share_interval"]

Interval = tuple[float, float]


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
