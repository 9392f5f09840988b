r"""Matching pursuit with Gauss-Newton: the best fit for each number of sinusoids.

The fit of K + 1 components starts from that of K and the highest peak of its residual's
spectrum; then all frequencies and amplitudes are refined together.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from .statistics import Floats, SineStatistics

__all__ = ["SinusoidFit", "matching_pursuit", "residual_power"]

# Points of the search grid for each resolution element.
_OVERSAMPLING = 8
_ITERATIONS = 12
# Relative ridge that keeps coinciding frequencies solvable.
_RIDGE = 1e-10


@dataclass(frozen=True)
class SinusoidFit:
    """Least-squares fit of K sinusoids.

    Attributes:
        frequency: Ascending, shape ``(K,)``.
        amplitudes: Amplitudes (a, b) about the reference time, shape ``(K, 2)``.
        energy: Sum of squared residuals.
        information: Fisher information of the frequencies times sigma squared, the
            amplitudes profiled out, shape ``(K, K)``.
    """

    frequency: Floats
    amplitudes: Floats
    energy: float
    information: Floats


def matching_pursuit(
    x: Floats,
    statistics: SineStatistics,
    band: tuple[float, float],
    max_components: int,
    separation: float = 0.0,
) -> list[SinusoidFit]:
    """Fit 0 to ``max_components`` sinusoids.

    Args:
        x: The observation, shape ``(T,)``.
        statistics: Its statistics.
        band: Lowest and highest frequency.
        max_components: Largest K.
        separation: Least gap of two frequencies.

    Returns:
        A fit for each K = 0..max_components; fewer where no place is left.
    """
    empty = np.empty(0)
    fits = [SinusoidFit(empty, np.empty((0, 2)), statistics.energy, np.empty((0, 0)))]
    grid = _search_grid(statistics, band)
    times = np.concatenate([np.asarray(g.times) for g in statistics.grids])
    times -= statistics.reference_time
    width = 1 / statistics.grids[0].duration
    for _ in range(max_components):
        last = fits[-1]
        power = residual_power(statistics, last, grid)
        near = np.abs(grid[:, None] - last.frequency) < max(separation, 0.2 * width)
        power = np.where(near.any(-1), -1.0, power)
        if power.max() < 0:
            break
        start = np.append(last.frequency, grid[power.argmax()])
        fits.append(_refine(x, times, start, band, width, separation))
    return fits


def residual_power(
    statistics: SineStatistics, fit: SinusoidFit, frequency: Floats
) -> Floats:
    """Energy that one more sinusoid would take from a fit's residual, about.

    Args:
        statistics: Statistics of the observation.
        fit: The fit.
        frequency: Where to evaluate it, shape ``(J,)``.

    Returns:
        Shape ``(J,)``.
    """
    cross = statistics.cross_gram(frequency, fit.frequency)
    left = statistics.projections(frequency).ravel() - cross @ fit.amplitudes.ravel()
    return 2 * np.square(left.reshape(-1, 2)).sum(-1) / statistics.num_data


def _search_grid(statistics: SineStatistics, band: tuple[float, float]) -> Floats:
    width = 1 / statistics.grids[0].duration
    num = math.ceil((band[1] - band[0]) / width * _OVERSAMPLING) + 1
    return np.linspace(*band, num)


def _refine(
    x: Floats,
    times: Floats,
    start: Floats,
    band: tuple[float, float],
    width: float,
    separation: float,
) -> SinusoidFit:
    """Gauss-Newton with step halving on frequencies, amplitudes profiled out."""
    frequency = start
    best = _Linearised(x, times, frequency)
    for _ in range(_ITERATIONS):
        step = np.clip(best.step, -0.5 * width, 0.5 * width)
        for _ in range(4):
            moved = _keep_apart(frequency + step, band, separation)
            trial = _Linearised(x, times, moved)
            if trial.energy <= best.energy:
                break
            step = 0.5 * step
        else:
            break
        frequency, best = trial.frequency, trial
        if np.abs(step).max() < 1e-7 * width:
            break
    order = frequency.argsort()
    return SinusoidFit(
        frequency[order],
        best.amplitudes[order],
        best.energy,
        best.information[np.ix_(order, order)],
    )


def _keep_apart(
    frequency: Floats, band: tuple[float, float], separation: float
) -> Floats:
    """Push frequencies into the band and, by equal parts, away from each other."""
    order = frequency.argsort()
    # Less these shifts the frequencies only have to ascend; rounding may take a little.
    shifts = (1 + 1e-9) * separation * np.arange(len(frequency))
    rest = frequency[order] - shifts
    above = np.maximum.accumulate(rest)
    below = np.minimum.accumulate(rest[::-1])[::-1]
    low, high = band
    rest = np.clip(0.5 * (above + below), low, max(low, high - shifts[-1]))
    moved = np.empty_like(frequency)
    moved[order] = rest + shifts
    return moved


class _Linearised:
    """The model linearised about its best amplitudes at given frequencies."""

    def __init__(self, x: Floats, times: Floats, frequency: Floats) -> None:
        self.frequency = frequency
        num = len(frequency)
        angle = 2 * math.pi * frequency[:, None] * times
        linear = np.empty((2 * num, len(times)))
        linear[::2], linear[1::2] = np.cos(angle), np.sin(angle)
        gram = linear @ linear.T
        amplitudes = _solve(gram, linear @ x)
        self.amplitudes = amplitudes.reshape(num, 2)
        residual = x - amplitudes @ linear
        self.energy = float(residual @ residual)
        a, b = self.amplitudes[:, :1], self.amplitudes[:, 1:]
        slope = 2 * math.pi * times * (b * linear[::2] - a * linear[1::2])
        cross = linear @ slope.T
        self.information = slope @ slope.T - cross.T @ _solve(gram, cross)
        self.step = _solve(self.information, slope @ residual)


def _solve(matrix: Floats, right: Floats) -> Floats:
    ridge = _RIDGE * np.trace(matrix) / len(matrix) + 1e-300
    factor = cho_factor(matrix + ridge * np.eye(len(matrix)), lower=True)
    return cho_solve(factor, right)
