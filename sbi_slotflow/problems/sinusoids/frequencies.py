r"""Proposal densities of K sorted frequencies, given a pursuit's fits.

A mixture over how many of the components are weak. With m weak ones, K - m follow a
Student t around the fit of K - m components, and m are drawn from the spectrum g of
that fit's residual, wherever in the band they may be:

.. math::
    q(f) = \sum_m \frac{\alpha_m}{a_m} \sum_{|W| = m} t_\nu(f_{\setminus W})\;
        m! \prod_{k \in W} g(f_k)

cut to the band and to separated frequencies, a_m being the share that is not cut.
"""

import math
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from .pursuit import SinusoidFit, residual_power
from .statistics import Floats, SineStatistics

__all__ = ["FrequencyProposal", "SpectralDensity"]

_DEGREES = 8.0
_MOST_WEAK = 2
_NORM_DRAWS = 10_000
_OVERSAMPLING = 8
_LEAST_WEIGHT = 0.02
_LEAST_ACCEPTED = 1e-3


class SpectralDensity:
    """Density of one more frequency, high where a fit's residual has power.

    Piecewise constant on equal bins of the band, and a share uniform.

    Args:
        fit: The fit.
        statistics: Statistics of the observation.
        band: Lowest and highest frequency.
        variance: Noise variance.
        sharpness: Power of the likelihood that makes the peaks; 1 is the posterior of
            one more component.
        uniform_share: Share of the uniform density.

    Attributes:
        cumulative: Cumulative probability of the bins.
        log_density: Log density in each bin.
    """

    def __init__(
        self,
        fit: SinusoidFit,
        statistics: SineStatistics,
        band: tuple[float, float],
        variance: float,
        sharpness: float,
        uniform_share: float,
    ) -> None:
        self.band = band
        width = 1 / statistics.grids[0].duration
        num = max(16, math.ceil((band[1] - band[0]) / width * _OVERSAMPLING))
        middle = band[0] + (np.arange(num) + 0.5) * (band[1] - band[0]) / num
        gain = 0.5 * sharpness * residual_power(statistics, fit, middle) / variance
        peak = np.exp(gain - gain.max())
        probs = uniform_share / num + (1 - uniform_share) * peak / peak.sum()
        self.cumulative = np.cumsum(probs) / probs.sum()
        self.log_density = np.log(probs * num / (band[1] - band[0]))

    def sample(self, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
        """Draw frequencies."""
        num = len(self.cumulative)
        place = np.searchsorted(self.cumulative, rng.random(shape)).clip(max=num - 1)
        share = (place + rng.random(shape)) / num
        return self.band[0] + share * (self.band[1] - self.band[0])

    def log_prob(self, frequency: Floats) -> Floats:
        """Log density, -inf outside the band."""
        low, high = self.band
        share = (frequency - low) / (high - low)
        place = (share * len(self.log_density)).astype(np.int64)
        values = self.log_density[place.clip(0, len(self.log_density) - 1)]
        return np.where((frequency >= low) & (frequency <= high), values, -np.inf)


class FrequencyProposal:
    """The mixture, see the module.

    Args:
        fits: Fits of K, K - 1, ... components; how many decides how many may be weak.
        statistics: Statistics of the observation.
        band: Lowest and highest frequency.
        separation: Least gap of two frequencies.
        sigma: Noise level.
        seed: Seed of the draws that estimate the shares a_m.

    Raises:
        ValueError: If next to no draw keeps the separation within the band.
    """

    def __init__(
        self,
        fits: list[SinusoidFit],
        statistics: SineStatistics,
        band: tuple[float, float],
        separation: float,
        sigma: float,
        seed: int,
    ) -> None:
        self.num = len(fits[0].frequency)
        self.band, self.separation = band, separation
        self.layers = [
            _Layer(fit, weak, statistics, band, sigma)
            for weak, fit in enumerate(fits[: _MOST_WEAK + 1])
        ]
        rng = np.random.default_rng([seed, 2, self.num])
        shares = [
            self._allowed(layer.sample(_NORM_DRAWS, rng)).mean()
            for layer in self.layers
        ]
        self.log_accepted = np.log(np.maximum(shares, 0.5 / _NORM_DRAWS))
        # A layer whose draws are almost never allowed could not be drawn from.
        self._usable = np.array(shares) >= _LEAST_ACCEPTED
        if not self._usable.any():
            raise ValueError(
                f"{self.num} frequencies near the fit almost never keep the separation "
                f"{separation} within the band {band}."
            )
        self._set_shares(self._usable.astype(np.float64))

    def sample(self, size: int, rng: np.random.Generator) -> Floats:
        """Draw sorted frequencies, shape ``(size, K)``."""
        weights = np.exp(self.log_weights)
        which = rng.choice(len(self.layers), size=size, p=weights / weights.sum())
        frequency = np.empty((size, self.num))
        for i, layer in enumerate(self.layers):
            left = np.flatnonzero(which == i)
            while len(left):
                frequency[left] = layer.sample(len(left), rng)
                left = left[~self._allowed(frequency[left])]
        return frequency

    def log_prob(self, frequency: Floats) -> Floats:
        """Log density of sorted frequencies ``(N, K)``, shape ``(N,)``."""
        value = np.logaddexp.reduce(self._joint(frequency), axis=-1)
        return np.where(self._allowed(frequency), value, -np.inf)

    def adapt(self, frequency: Floats, log_weights: Floats) -> None:
        """Set the shares alpha to those that weighted draws ask for."""
        joint = self._joint(frequency)
        normal = joint - np.logaddexp.reduce(joint, axis=-1, keepdims=True)
        total = np.logaddexp.reduce(normal + log_weights[:, None], axis=0)
        shares = np.exp(total - np.logaddexp.reduce(total))
        self._set_shares(np.maximum(shares, _LEAST_WEIGHT) * self._usable)

    def _set_shares(self, shares: Floats) -> None:
        with np.errstate(divide="ignore"):
            self.log_weights = np.log(shares / shares.sum())

    def _joint(self, frequency: Floats) -> Floats:
        terms = [layer.log_prob(frequency) for layer in self.layers]
        return np.stack(terms, axis=-1) + self.log_weights - self.log_accepted

    def _allowed(self, frequency: Floats) -> NDArray[np.bool_]:
        low, high = self.band
        inside = ((frequency >= low) & (frequency <= high)).all(-1)
        gaps = np.diff(frequency, axis=-1)
        return np.asarray(inside & (gaps >= self.separation).all(-1))


class _Layer:
    """Sets of which ``weak`` components come from the residual's spectrum."""

    def __init__(
        self,
        fit: SinusoidFit,
        weak: int,
        statistics: SineStatistics,
        band: tuple[float, float],
        sigma: float,
    ) -> None:
        self.fit, self.weak = fit, weak
        num = len(fit.frequency)
        width = 1 / statistics.grids[0].duration
        # No wider than about a resolution element.
        least = np.eye(num) / (0.5 * width) ** 2
        covariance = np.linalg.inv(fit.information / sigma**2 + least)
        self.root = np.linalg.cholesky(covariance)
        self.spectrum = SpectralDensity(fit, statistics, band, sigma**2, 0.8, 0.1)

    def sample(self, size: int, rng: np.random.Generator) -> Floats:
        """Draw, sorted but for strong components that crossed (a negative gap)."""
        strong = rng.standard_normal((size, len(self.root))) @ self.root.T
        scale = np.sqrt(_DEGREES / rng.chisquare(_DEGREES, size))
        strong = self.fit.frequency + strong * scale[:, None]
        if not self.weak:
            return strong
        drawn = self.spectrum.sample((size, self.weak), rng)
        frequency = np.sort(np.concatenate([strong, drawn], axis=-1), axis=-1)
        crossed = (np.diff(strong, axis=-1) < 0).any(-1)
        frequency[crossed] = -1.0  # outside the band: not allowed
        return frequency

    def log_prob(self, frequency: Floats) -> Floats:
        if not self.weak:
            return self._log_t(frequency)
        num = frequency.shape[-1]
        log_g = self.spectrum.log_prob(frequency)
        terms = []
        for chosen in combinations(range(num), self.weak):
            strong = [k for k in range(num) if k not in chosen]
            terms.append(
                self._log_t(frequency[:, strong]) + log_g[:, list(chosen)].sum(-1)
            )
        return gammaln(self.weak + 1) + np.logaddexp.reduce(np.stack(terms), axis=0)

    def _log_t(self, frequency: Floats) -> Floats:
        dim = len(self.root)
        if not dim:
            return np.zeros(len(frequency))
        z = np.linalg.solve(self.root, (frequency - self.fit.frequency).T)
        norm = gammaln(0.5 * (_DEGREES + dim)) - gammaln(0.5 * _DEGREES)
        norm -= 0.5 * dim * math.log(_DEGREES * math.pi)
        norm -= np.log(np.diag(self.root)).sum()
        tail = 0.5 * (_DEGREES + dim)
        return norm - tail * np.log1p(np.square(z).sum(0) / _DEGREES)
