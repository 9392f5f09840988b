r"""Compiled inner loop of the collapsed sampler; see :mod:`.collapsed`.

The chain's state is the frequencies, their amplitudes (a, b) and sigma. With a working
prior N(0, s^2) of the amplitudes, M(f, sigma) is the marginal likelihood in closed form
and :math:`N(a | f, \sigma)` the exact conditional. A move proposes frequencies, draws
the amplitudes from that conditional and so is accepted with the ratio of

.. math::
    W = p(f, K)\, M(f, \sigma) \prod_k \frac{p(a_k, b_k)}{N(a_k, b_k | 0, s^2)}

times the proposal's own ratio: the true prior of the amplitudes comes in by its
quotient to the working one.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from .fit import Complexes, Floats

__all__ = ["Births", "Data", "Target", "run_chain"]


class Data(NamedTuple):
    """Sufficient statistics, as the kernel reads them."""

    energy: float
    num_data: float
    starts: Floats
    steps: Floats
    offsets: Floats
    lengths: Floats
    intervals: Floats
    values: Complexes
    slopes: Complexes


class Target(NamedTuple):
    """Prior and moves.

    ``log_prior`` holds, for each K, log p(K) + log K! - K log(band) less the log
    separation constant; ``log_amplitude`` tells a log-uniform amplitude from a uniform
    one.
    """

    log_prior: Floats
    band: tuple[float, float]
    separation: float
    amplitude: tuple[float, float]
    log_amplitude: bool
    sigma: tuple[float, float]
    working_variance: float
    resolution: float
    least_step: float
    edges: Floats  # of the moves' probabilities


class Births(NamedTuple):
    """Piecewise constant density of new frequencies on equal bins of the band."""

    cumulative: Floats
    log_density: Floats


@njit(cache=True, nogil=True)
def _project(data, f):
    """Inner products of the data with cos and sin at frequency f."""
    real, imag = 0.0, 0.0
    for s in range(len(data.starts)):
        position = (f - data.starts[s]) / data.steps[s]
        left = min(max(int(position), 0), data.values.shape[1] - 2)
        u = position - left
        v = 1.0 - u
        share = v * v * ((1 + 2 * u) * data.values[s, left] + u * data.slopes[s, left])
        after = data.values[s, left + 1], data.slopes[s, left + 1]
        share += u * u * ((1 + 2 * v) * after[0] - v * after[1])
        angle = -2 * math.pi * data.offsets[s] * f
        turned = share * complex(math.cos(angle), math.sin(angle))
        real += turned.real
        imag += turned.imag
    return real, -imag


@njit(cache=True, nogil=True)
def _sum(data, f):
    """The sum s(f) over all samples."""
    real, imag = 0.0, 0.0
    for s in range(len(data.starts)):
        below = math.sin(math.pi * f * data.intervals[s])
        if abs(below) < 1e-13:
            kernel = data.lengths[s]
        else:
            kernel = math.sin(math.pi * f * data.intervals[s] * data.lengths[s]) / below
        angle = 2 * math.pi * data.offsets[s] * f
        real += kernel * math.cos(angle)
        imag += kernel * math.sin(angle)
    return real, imag


@njit(cache=True, nogil=True)
def _set_frequency(data, f, gram, right, k, num, value):
    """Put a value in place k of num frequencies and update Gram matrix and data."""
    f[k] = value
    right[2 * k], right[2 * k + 1] = _project(data, value)
    for j in range(num):
        below_re, below_im = _sum(data, value - f[j])
        above_re, above_im = _sum(data, value + f[j])
        cc = 0.5 * (below_re + above_re)
        ss = 0.5 * (below_re - above_re)
        cs = 0.5 * (above_im - below_im)
        sc = 0.5 * (above_im + below_im)
        gram[2 * k, 2 * j] = gram[2 * j, 2 * k] = cc
        gram[2 * k + 1, 2 * j + 1] = gram[2 * j + 1, 2 * k + 1] = ss
        gram[2 * k, 2 * j + 1] = gram[2 * j + 1, 2 * k] = cs
        gram[2 * k + 1, 2 * j] = gram[2 * j, 2 * k + 1] = sc


@njit(cache=True, nogil=True)
def _remove(f, gram, right, k, num):
    """Move the last of num frequencies into place k."""
    last = num - 1
    if k != last:
        f[k] = f[last]
        here, there = slice(2 * k, 2 * k + 2), slice(2 * last, 2 * last + 2)
        right[here] = right[there]
        gram[here, : 2 * num] = gram[there, : 2 * num]
        gram[: 2 * num, here] = gram[: 2 * num, there]


@njit(cache=True, nogil=True)
def _marginal(data, target, gram, right, num, sigma, root, mean):
    """Log M(f, sigma); fills the root of the precision and the conditional mean."""
    size = 2 * num
    precision = 1.0 / (sigma * sigma)
    for i in range(size):
        for j in range(i + 1):
            total = gram[i, j] * precision
            if i == j:
                total += 1.0 / target.working_variance
            for m in range(j):
                total -= root[i, m] * root[j, m]
            if i == j:
                least = 1e-15 * (gram[i, i] * precision + 1.0 / target.working_variance)
                root[i, i] = math.sqrt(max(total, least))
            else:
                root[i, j] = total / root[j, j]
    value = -data.num_data * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
    value -= 0.5 * data.energy * precision
    value -= 0.5 * size * math.log(target.working_variance)
    for i in range(size):
        total = right[i] * precision
        for m in range(i):
            total -= root[i, m] * mean[m]
        mean[i] = total / root[i, i]
        value += 0.5 * mean[i] * mean[i] - math.log(root[i, i])
    _back_substitute(root, mean, size)
    return value


@njit(cache=True, nogil=True)
def _back_substitute(root, vector, size):
    """Solve root^T y = vector in place."""
    for i in range(size - 1, -1, -1):
        total = vector[i]
        for m in range(i + 1, size):
            total -= root[m, i] * vector[m]
        vector[i] = total / root[i, i]


@njit(cache=True, nogil=True)
def _draw_amplitudes(rng, root, mean, num, noise, amplitudes):
    size = 2 * num
    for i in range(size):
        noise[i] = rng.standard_normal()
    _back_substitute(root, noise, size)
    for i in range(size):
        amplitudes[i] = mean[i] + noise[i]


@njit(cache=True, nogil=True)
def _log_prior_quotient(target, amplitudes, num):
    """Log of true over working prior of all amplitudes, -inf outside the bounds."""
    low, high = target.amplitude
    total = 0.0
    for k in range(num):
        a, b = amplitudes[2 * k], amplitudes[2 * k + 1]
        square = a * a + b * b
        radius = math.sqrt(square)
        if radius < low or radius > high:
            return -np.inf
        if target.log_amplitude:
            density = -math.log(radius * math.log(high / low))
        else:
            density = -math.log(high - low)
        total += density - math.log(radius) + math.log(target.working_variance)
        total += 0.5 * square / target.working_variance
    return total


@njit(cache=True, nogil=True)
def _is_allowed(target, f, num):
    """Whether num frequencies lie in the band and keep the separation."""
    for i in range(num):
        if f[i] < target.band[0] or f[i] > target.band[1]:
            return False
        if target.separation > 0.0:
            for j in range(i):
                if abs(f[i] - f[j]) < target.separation:
                    return False
    return True


@njit(cache=True, nogil=True)
def _draw_sigma(rng, data, target, gram, right, num, amplitudes, sigma):
    """Gibbs step of sigma; keeps it if no draw falls within the bounds."""
    energy = data.energy
    for i in range(2 * num):
        total = 0.0
        for j in range(2 * num):
            total += gram[i, j] * amplitudes[j]
        energy += amplitudes[i] * (total - 2 * right[i])
    energy = max(energy, data.num_data * (1e-12 * target.sigma[1]) ** 2)
    shape = 0.5 * (data.num_data - 1)
    for _ in range(100):
        draw = math.sqrt(0.5 * energy / rng.standard_gamma(shape))
        if target.sigma[0] <= draw <= target.sigma[1]:
            return draw
    return sigma


@njit(cache=True, nogil=True)
def _neighbour(f, k, num):
    """Position of the next higher frequency, -1 if there is none."""
    best = -1
    for j in range(num):
        if f[j] > f[k] and (best < 0 or f[j] < f[best]):
            best = j
    return best


@njit(cache=True, nogil=True)
def _bin_of(target, births, f):
    num = len(births.log_density)
    share = (f - target.band[0]) / (target.band[1] - target.band[0])
    return min(max(int(share * num), 0), num - 1)


@njit(cache=True, nogil=True)
def _draw_birth(rng, target, births):
    num = len(births.log_density)
    place = min(np.searchsorted(births.cumulative, rng.random()), num - 1)
    width = (target.band[1] - target.band[0]) / num
    return target.band[0] + (place + rng.random()) * width


@njit(cache=True, nogil=True)
def _step_size(rng, target):
    """A step of a scale from the least to thrice the resolution, log-uniform."""
    most = 3.0 * target.resolution
    scale = most * (target.least_step / most) ** rng.random()
    return scale * rng.standard_normal()


@njit(cache=True, nogil=True)
def run_chain(rng, data, target, births, frequency, amplitudes, sigma, num_draws, thin):
    """Run one chain from frequencies, amplitudes (a, b), flat, and sigma.

    Returns:
        K ``(N,)``, frequencies ``(N, Kmax)``, amplitudes ``(N, 2 Kmax)``, sigma
        ``(N,)``, and for each move how often it was tried and accepted ``(moves, 2)``.
    """
    most = len(target.log_prior) - 1
    num = len(frequency)
    # State and, in the second place, the proposal.
    f, f2 = np.zeros(most + 1), np.zeros(most + 1)
    gram = np.zeros((2 * most + 2, 2 * most + 2))
    gram2 = np.zeros_like(gram)
    right, right2 = np.zeros(2 * most + 2), np.zeros(2 * most + 2)
    amps, amps2 = np.zeros(2 * most + 2), np.zeros(2 * most + 2)
    root, mean, noise = np.zeros_like(gram), np.zeros_like(right), np.zeros_like(right)
    for k in range(num):
        _set_frequency(data, f, gram, right, k, k + 1, frequency[k])
    amps[: 2 * num] = amplitudes
    level = target.log_prior[num] + _log_prior_quotient(target, amps, num)
    level += _marginal(data, target, gram, right, num, sigma, root, mean)

    out_k = np.zeros(num_draws, dtype=np.int64)
    out_f, out_a = np.zeros((num_draws, most)), np.zeros((num_draws, 2 * most))
    out_sigma = np.zeros(num_draws)
    counts = np.zeros((len(target.edges), 2), dtype=np.int64)
    for draw in range(num_draws):
        for _ in range(thin):
            move = min(
                np.searchsorted(target.edges, rng.random()), len(target.edges) - 1
            )
            counts[move, 0] += 1
            num2, log_ratio, legal = num, 0.0, False
            f2[:] = f
            for i in range(2 * num):
                right2[i] = right[i]
                for j in range(2 * num):
                    gram2[i, j] = gram[i, j]
            if move == 0 and num > 0:  # walk
                k = rng.integers(0, num)
                value = f[k] + _step_size(rng, target)
                legal = True
                _set_frequency(data, f2, gram2, right2, k, num, value)
            elif move == 1 and num > 1:  # pair: two neighbours at once
                k = rng.integers(0, num)
                j = _neighbour(f, k, num)
                if j >= 0:
                    first, second = _step_size(rng, target), _step_size(rng, target)
                    _set_frequency(data, f2, gram2, right2, k, num, f[k] + first)
                    _set_frequency(data, f2, gram2, right2, j, num, f[j] + second)
                    # The way back must find the same pair.
                    legal = _neighbour(f2, k, num) == j or _neighbour(f2, j, num) == k
            elif move == 2 and num > 0:  # redraw
                k = rng.integers(0, num)
                value = _draw_birth(rng, target, births)
                legal = True
                log_ratio = (
                    births.log_density[_bin_of(target, births, f[k])]
                    - births.log_density[_bin_of(target, births, value)]
                )
                _set_frequency(data, f2, gram2, right2, k, num, value)
            elif move == 3 and num < most:  # birth
                value = _draw_birth(rng, target, births)
                num2, legal = num + 1, True
                density = births.log_density[_bin_of(target, births, value)]
                log_ratio = -math.log(num2) - density
                _set_frequency(data, f2, gram2, right2, num, num2, value)
            elif move == 4 and num > 0:  # death
                k = rng.integers(0, num)
                num2, legal = num - 1, True
                density = births.log_density[_bin_of(target, births, f[k])]
                log_ratio = math.log(num) + density
                _remove(f2, gram2, right2, k, num)
            elif move == 5 and 0 < num < most:  # split
                k = rng.integers(0, num)
                gap = target.separation + 2 * target.resolution * rng.random()
                share = rng.random()
                low, high = f[k] - share * gap, f[k] + (1 - share) * gap
                legal = True
                for j in range(num):
                    if j != k and low <= f[j] <= high:
                        legal = False
                if legal:
                    num2 = num + 1
                    log_ratio = math.log(2 * target.resolution * num / num2)
                    _set_frequency(data, f2, gram2, right2, k, num, low)
                    _set_frequency(data, f2, gram2, right2, num, num2, high)
            elif move == 6 and num > 1:  # merge
                k = rng.integers(0, num)
                j = _neighbour(f, k, num)
                gap = f[j] - f[k] if j >= 0 else 0.0
                if j >= 0 and gap < target.separation + 2 * target.resolution:
                    num2, legal = num - 1, True
                    log_ratio = -math.log(2 * target.resolution * num2 / num)
                    value = f[k] + rng.random() * gap
                    _set_frequency(data, f2, gram2, right2, k, num, value)
                    _remove(f2, gram2, right2, j, num)
            elif move == 7:  # refresh
                sigma = _draw_sigma(rng, data, target, gram, right, num, amps, sigma)
                level = target.log_prior[num]
                level += _log_prior_quotient(target, amps, num)
                level += _marginal(data, target, gram, right, num, sigma, root, mean)
                legal = True
            if not legal or not _is_allowed(target, f2, num2):
                continue
            if target.log_prior[num2] == -np.inf:
                continue
            level2 = target.log_prior[num2]
            level2 += _marginal(data, target, gram2, right2, num2, sigma, root, mean)
            # The quotient of a typical draw is near that of the mean: no need to draw
            # amplitudes for moves that are hopeless by hundreds of nats.
            if level2 + log_ratio - level < -200.0 - 20.0 * num2:
                continue
            _draw_amplitudes(rng, root, mean, num2, noise, amps2)
            level2 += _log_prior_quotient(target, amps2, num2)
            if math.log(max(rng.random(), 1e-300)) < level2 - level + log_ratio:
                f, f2 = f2, f
                gram, gram2 = gram2, gram
                right, right2 = right2, right
                amps, amps2 = amps2, amps
                num, level = num2, level2
                counts[move, 1] += 1
        out_k[draw] = num
        out_sigma[draw] = sigma
        out_f[draw, :num] = f[:num]
        out_a[draw, : 2 * num] = amps[: 2 * num]
    return out_k, out_f, out_a, out_sigma, counts
