r"""Matching pursuit of sinusoids.

The next component starts at the highest peak of the residual's spectrum; then all
components take Gauss-Newton steps together.

:class:`SinePursuit` does so for many observations at once, in a few steps, for a
network to read. What a component earns there, in nats, is

.. math::
    g_k = \tfrac{T}{2} \log \frac{\Vert r_{k-1} \Vert^2}{\Vert r_k \Vert^2}

and an observation is done when the next one would earn little.
:func:`matching_pursuit` takes the steps of one observation until they converge, and
gives the best fit for each number of components with its Fisher information.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .fit import Complexes, Floats, SineFit, SineLeastSquares, SineStatistics

__all__ = [
    "Pursued",
    "SinePursuit",
    "SinusoidFit",
    "SpectralDensity",
    "matching_pursuit",
    "residual_power",
]

_TWO_PI = 2 * math.pi
# Nats below which a component is not kept: noise alone earns about as much.
_LEAST_GAIN = 5.0
_NUM_STEPS = 2
# Share of the energy that counts as nothing left.
_NOTHING = 1e-30
# Resolution elements that a frequency may move in a step.
_FARTHEST = 0.5
# Points for each resolution element: of the search grid, and of finer ones.
_OVERSAMPLING, _FINE = 2, 8
# Steps of a fit until it converges, halvings of each, and the relative ridge that keeps
# coinciding frequencies solvable.
_MOST_STEPS, _HALVINGS, _RIDGE = 12, 4, 1e-10


class Pursued(NamedTuple):
    """Components that were found, in the order of their finding, ``(B, P)``.

    ``gain`` is what each earned in nats, that of the first one not kept included, zero
    beyond; ``residual`` is what is left of the data, ``(B, T)``.
    """

    found: Tensor
    phasor: Tensor
    frequency: Tensor
    gain: Tensor
    residual: Tensor


class SinePursuit:
    """Finds up to P sinusoids in a band.

    Data have a scale of about one, as those that a network reads; amplitudes too.

    The band is a circle if the data are complex and it is all of their spectrum. A
    component that earns less than ``least_gain`` nats is not kept.
    """

    def __init__(
        self,
        fit: SineFit,
        band: tuple[float, float],
        most: int,
        least_gain: float = _LEAST_GAIN,
        num_steps: int = _NUM_STEPS,
    ) -> None:
        self.fit, self.band, self.most = fit, band, most
        self.least_gain, self.num_steps = least_gain, num_steps
        first = fit.grids[0]
        self.width = 1 / first.duration
        self._circular = fit.analytic and math.isclose(band[1] - band[0], first.rate)
        num = math.ceil((band[1] - band[0]) / self.width * _OVERSAMPLING)
        self.grid = torch.linspace(*band, num + 1, dtype=torch.float64)
        turns = (first.times - fit.reference_time).unsqueeze(-1) * self.grid
        wave = torch.polar(torch.full_like(turns, 2 / len(turns)), -_TWO_PI * turns)
        matrix = torch.cat([wave.real, wave.imag], -1)
        if fit.analytic:
            matrix = 0.5 * torch.cat([matrix, torch.cat([-wave.imag, wave.real], -1)])
        self._matrix = matrix.float()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Pursued:
        """Find components in observations ``(B, T)``."""
        batch, num_data = x.shape
        data = x.double()
        phasor = torch.zeros(batch, self.most, dtype=torch.complex128, device=x.device)
        frequency = torch.full_like(phasor.real, 0.5 * sum(self.band))
        found, gain = torch.zeros_like(frequency, dtype=torch.bool), phasor.real.clone()
        residual = x.clone()
        energy = data.square().sum(-1)
        left = torch.arange(batch, device=x.device)
        for p in range(self.most):
            if not len(left):
                break
            peak, place = self._peak(residual[left])
            new = [
                torch.cat([phasor[left, :p], peak], -1),
                torch.cat([frequency[left, :p], place], -1),
            ]
            noise = energy[left] / num_data
            given = self.fit.given(data[left])
            for _ in range(self.num_steps):
                new = self._step(given, *new, noise)
            rest = x[left] - self._total(*new).to(x)
            smaller = rest.double().square().sum(-1)
            ratio = energy[left] / torch.maximum(smaller, _NOTHING * energy[left])
            earned = 0.5 * num_data * ratio.log().nan_to_num()
            gain[left, p] = earned.clamp(min=0.0)
            kept = earned > self.least_gain
            left = left[kept]
            phasor[left, : p + 1], frequency[left, : p + 1] = (n[kept] for n in new)
            found[left, p] = True
            residual[left], energy[left] = rest[kept], smaller[kept]
        return Pursued(found, phasor, frequency, gain, residual)

    def _peak(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Phasors and frequencies ``(n, 1)`` of the spectra's highest points."""
        matrix = self._matrix.to(residual)
        seen = residual[:, : len(matrix)] @ matrix
        real, imag = seen.double().chunk(2, -1)
        best = (real.square() + imag.square()).argmax(-1, keepdim=True)
        phasor = torch.complex(real.gather(-1, best), imag.gather(-1, best))
        return phasor, self.grid.to(residual.device)[best]

    def _step(
        self, given: SineLeastSquares, phasor: Tensor, frequency: Tensor, noise: Tensor
    ) -> list[Tensor]:
        """Solve for amplitudes and a change of frequencies, linearised."""
        gram, inner = _linearised(given, phasor, frequency)
        # Amplitudes about one and steps of part of an element, before the data.
        spread = torch.tensor([1.0, 1.0, _FARTHEST * self.width]).to(frequency)
        noise = torch.where(noise > 0, noise, 1.0)
        penalty = (noise.unsqueeze(-1) / spread.square()).repeat(1, phasor.shape[-1])
        solved = torch.linalg.solve(gram + torch.diag_embed(penalty), inner)
        real, imag, change = solved.unflatten(-1, (-1, 3)).unbind(-1)
        most = _FARTHEST * self.width
        moved = frequency + change.clamp(-most, most)
        low, high = self.band
        moved = low + (moved - low) % (high - low) if self._circular else moved
        return [torch.complex(real, imag), moved.clamp(low, high)]

    def _total(self, phasor: Tensor, frequency: Tensor) -> Tensor:
        phase = phasor.angle() - _TWO_PI * self.fit.reference_time * frequency
        components = torch.stack([phasor.abs(), phase, frequency], -1)
        return self.fit.signal.total(components, torch.ones_like(phase) > 0)


@dataclass(frozen=True)
class SinusoidFit:
    """Least-squares fit of K sinusoids, in ascending frequency ``(K,)``.

    Amplitudes are (a, b) about the reference time, shape ``(K, 2)``, energy the sum of
    squared residuals, information the Fisher information ``(K, K)`` of the frequencies
    times sigma squared, with the amplitudes profiled out.
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
    """Fit K = 0..``max_components`` sinusoids to x ``(T,)``.

    Frequencies lie in the band, at least ``separation`` apart; there are fewer fits
    where no place is left.
    """
    empty = np.empty(0)
    fits = [SinusoidFit(empty, np.empty((0, 2)), statistics.energy, np.empty((0, 0)))]
    width = 1 / statistics.grids[0].duration
    grid = np.linspace(*band, math.ceil((band[1] - band[0]) / width * _FINE) + 1)
    given = SineFit(statistics.grids).given(torch.from_numpy(x)[None])
    for _ in range(max_components):
        last = fits[-1]
        power = residual_power(statistics, last, grid)
        near = np.abs(grid[:, None] - last.frequency) < max(separation, 0.2 * width)
        power = np.where(near.any(-1), -1.0, power)
        if power.max() < 0:
            break
        frequency = np.append(last.frequency, grid[power.argmax()])
        best = _converged(given, frequency, band, separation)
        order = best.frequency.argsort()
        shift = statistics.reference_time - given.fit.reference_time
        z = best.phasor * np.exp(2j * math.pi * best.frequency * shift)
        fits.append(
            SinusoidFit(
                best.frequency[order],
                np.stack([z.real, -z.imag], -1)[order],
                best.energy,
                best.information[np.ix_(order, order)],
            )
        )
    return fits


def residual_power(
    statistics: SineStatistics, fit: SinusoidFit, frequency: Floats
) -> Floats:
    """Energy that one more sinusoid of each frequency would take from a residual."""
    cross = statistics.gram(frequency, fit.frequency)
    left = statistics.projections(frequency).ravel() - cross @ fit.amplitudes.ravel()
    return 2 * np.square(left.reshape(-1, 2)).sum(-1) / statistics.num_data


class SpectralDensity:
    """Density of one more frequency, high where a fit's residual has power.

    Piecewise constant on equal bins of the band, and a share uniform. ``sharpness`` is
    the power of the likelihood that makes the peaks; 1 is the posterior of one more
    component at that noise ``variance``.

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
        num = max(16, math.ceil((band[1] - band[0]) / width * _FINE))
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


class _Profile(NamedTuple):
    """The least squares about the best phasors at given frequencies."""

    frequency: Floats
    phasor: Complexes
    energy: float
    information: Floats
    step: Floats


def _converged(
    given: SineLeastSquares,
    start: Floats,
    band: tuple[float, float],
    separation: float,
) -> _Profile:
    """Gauss-Newton with step halving on frequencies, amplitudes profiled out."""
    width = 1 / given.fit.grids[0].duration
    best = _profiled(given, start)
    for _ in range(_MOST_STEPS):
        step = np.clip(best.step, -_FARTHEST * width, _FARTHEST * width)
        for _ in range(_HALVINGS):
            moved = _keep_apart(best.frequency + step, band, separation)
            trial = _profiled(given, moved)
            if trial.energy <= best.energy:
                break
            step = 0.5 * step
        else:
            break
        best = trial
        if np.abs(step).max() < 1e-7 * width:
            break
    return best


def _profiled(given: SineLeastSquares, frequency: Floats) -> _Profile:
    """Solve for the phasors, then linearise about them."""
    size = 3 * len(frequency)
    places = torch.from_numpy(frequency)[None]
    zero = torch.zeros_like(places, dtype=torch.complex128)
    which, linear = np.arange(size) % 3 == 2, np.arange(size) % 3 < 2
    gram, inner = (part[0].numpy() for part in _linearised(given, zero, places))
    here = np.ix_(linear, linear)
    amplitudes = _solve(gram[here], inner[linear])
    phasor = amplitudes[::2] + 1j * amplitudes[1::2]
    explained = amplitudes @ (2 * inner[linear] - gram[here] @ amplitudes)
    energy = float(given.data.square().sum()) - float(explained)
    around = _linearised(given, torch.from_numpy(phasor)[None], places)
    gram, inner = (part[0].numpy() for part in around)
    cross = gram[np.ix_(linear, which)]
    information = gram[np.ix_(which, which)] - cross.T @ _solve(gram[here], cross)
    slope = inner[which] - cross.T @ amplitudes
    step = _solve(information, slope)
    return _Profile(frequency, phasor, max(energy, 0.0), information, step)


def _linearised(
    given: SineLeastSquares, phasor: Tensor, frequency: Tensor
) -> tuple[Tensor, Tensor]:
    """Inner products ``(N, 3K, 3K)`` of derivatives, and with the data ``(N, 3K)``.

    Derivatives are by the real and the imaginary part of a phasor and its frequency.
    """
    one = torch.ones_like(phasor)
    alpha = torch.stack([one, 1j * one, 0 * one], -1)
    beta = torch.stack([0 * one, 0 * one, _TWO_PI * 1j * phasor], -1)
    owner = torch.arange(len(phasor), device=phasor.device)
    gram = given.fit.gram(frequency, alpha, beta)
    return gram, given.inner(owner, frequency, alpha, beta).flatten(-2)


def _solve(matrix: Floats, right: Floats) -> Floats:
    """Solve with a ridge, relative to the matrix."""
    scale = np.trace(matrix) / len(matrix) or 1.0
    ridge = _RIDGE * scale * np.eye(len(matrix))
    return np.asarray(np.linalg.solve(matrix + ridge, right), dtype=np.float64)


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
