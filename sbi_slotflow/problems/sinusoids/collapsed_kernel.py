r"""Compiled inner loop of :mod:`sbi_slotflow.problems.sinusoids.collapsed`.

The chain's state is the frequencies, their amplitudes (a, b) and sigma. With a working
prior N(0, s^2) of the amplitudes, M(f, sigma) is the marginal likelihood in closed form
and :math:`N(a | f, \sigma)` the exact conditional. A move proposes frequencies, draws J
sets of amplitudes from that conditional and so is accepted with the ratio of

.. math::
    W = p(f, K)\, M(f, \sigma)\, \frac{1}{J} \sum_j
        \prod_k \frac{p(a_{jk}, b_{jk})}{N(a_{jk}, b_{jk} | 0, s^2)}

times the proposal's own ratio; one of the J sets is then drawn by its quotient. The
mean is an unbiased estimate of the target of (f, sigma), which is all that it takes
(Andrieu and Roberts 2009).
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from .fit import Complexes, Floats

__all__ = ["Births", "Data", "Target", "run_chain"]

# Sets of amplitudes of an estimate of W.
_SETS = 4


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
def _marginal(data, target, beta, gram, right, num, sigma, root, mean):
    """Log M(f, sigma); fills the root of the precision and the conditional mean.

    beta is a power of the likelihood.
    """
    size = 2 * num
    precision = beta / (sigma * sigma)
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
    value = -beta * data.num_data * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
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
def _draw_sigma(rng, data, target, beta, gram, right, num, amplitudes, sigma):
    """Gibbs step of sigma; keeps it if no draw falls within the bounds."""
    energy = data.energy
    for i in range(2 * num):
        total = 0.0
        for j in range(2 * num):
            total += gram[i, j] * amplitudes[j]
        energy += amplitudes[i] * (total - 2 * right[i])
    energy = max(energy, data.num_data * (1e-12 * target.sigma[1]) ** 2)
    shape = 0.5 * (beta * data.num_data - 1)
    for _ in range(100):
        draw = math.sqrt(0.5 * beta * energy / rng.standard_gamma(shape))
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


class Place(NamedTuple):
    """Where a chain is, or wants to go; filled in place.

    Frequencies ``(Kmax + 1,)``, their Gram matrix, inner products with the data and
    amplitudes (two rows for each frequency), and K, sigma and log W in ``numbers``.
    """

    f: Floats
    gram: Floats
    right: Floats
    amplitudes: Floats
    numbers: Floats


class Scratch(NamedTuple):
    """Room to work in: root and mean of the amplitudes' conditional, noise, draws."""

    root: Floats
    mean: Floats
    noise: Floats
    sets: Floats


@njit(cache=True, nogil=True)
def _places(count, most):
    """Several places: one row each."""
    size = 2 * most + 2
    return Place(
        np.zeros((count, most + 1)),
        np.zeros((count, size, size)),
        np.zeros((count, size)),
        np.zeros((count, size)),
        np.zeros((count, 3)),
    )


@njit(cache=True, nogil=True)
def _at(places, i):
    return Place(
        places.f[i],
        places.gram[i],
        places.right[i],
        places.amplitudes[i],
        places.numbers[i],
    )


@njit(cache=True, nogil=True)
def _copy(here, there):
    """Copy a place; what lies beyond K is left."""
    num = int(here.numbers[0])
    there.f[:] = here.f
    for i in range(2 * num):
        there.right[i] = here.right[i]
        there.amplitudes[i] = here.amplitudes[i]
        for j in range(2 * num):
            there.gram[i, j] = here.gram[i, j]
    there.numbers[:] = here.numbers


@njit(cache=True, nogil=True)
def _redrawn(rng, data, target, beta, place, scratch, kept):
    """Draw a place's amplitudes from their conditional, and set its level.

    Of several sets one is drawn by its quotient, and the mean quotient counts. Where
    they are ``kept``, those of the place are the first.
    """
    num = int(place.numbers[0])
    level = target.log_prior[num]
    level += _marginal(
        data,
        target,
        beta,
        place.gram,
        place.right,
        num,
        place.numbers[1],
        scratch.root,
        scratch.mean,
    )
    total, chosen = -np.inf, 0
    for j in range(len(scratch.sets)):
        here = scratch.sets[j]
        if kept and j == 0:
            here[:] = place.amplitudes
        else:
            _draw_amplitudes(rng, scratch.root, scratch.mean, num, scratch.noise, here)
        quotient = _log_prior_quotient(target, here, num)
        if quotient == -np.inf:
            continue
        if quotient > total:
            total = quotient + math.log1p(math.exp(total - quotient))
        else:
            total += math.log1p(math.exp(quotient - total))
        # Each in turn takes the place of the last with its share of the sum.
        if rng.random() < math.exp(quotient - total):
            chosen = j
    place.amplitudes[:] = scratch.sets[chosen]
    place.numbers[2] = level + total - math.log(len(scratch.sets))


@njit(cache=True, nogil=True)
def _propose(rng, data, target, births, move, here, there):
    """Change ``there``, a copy of ``here``; -inf if there is nothing to propose.

    Returns the log of the reverse over the forward proposal density.
    """
    most = len(target.log_prior) - 1
    num, f = int(here.numbers[0]), here.f
    if move == 0 and num > 0:  # walk
        k = rng.integers(0, num)
        value = f[k] + _step_size(rng, target)
        _set_frequency(data, there.f, there.gram, there.right, k, num, value)
        return 0.0
    if move == 1 and num > 1:  # pair: two neighbours at once
        k = rng.integers(0, num)
        j = _neighbour(f, k, num)
        if j < 0:
            return -np.inf
        first, second = _step_size(rng, target), _step_size(rng, target)
        _set_frequency(data, there.f, there.gram, there.right, k, num, f[k] + first)
        _set_frequency(data, there.f, there.gram, there.right, j, num, f[j] + second)
        # The way back must find the same pair.
        same = _neighbour(there.f, k, num) == j or _neighbour(there.f, j, num) == k
        return 0.0 if same else -np.inf
    if move == 2 and num > 0:  # redraw
        k = rng.integers(0, num)
        value = _draw_birth(rng, target, births)
        _set_frequency(data, there.f, there.gram, there.right, k, num, value)
        before = births.log_density[_bin_of(target, births, f[k])]
        return before - births.log_density[_bin_of(target, births, value)]
    if move == 3 and num < most:  # birth
        value = _draw_birth(rng, target, births)
        there.numbers[0] = num + 1
        _set_frequency(data, there.f, there.gram, there.right, num, num + 1, value)
        return -math.log(num + 1) - births.log_density[_bin_of(target, births, value)]
    if move == 4 and num > 0:  # death
        k = rng.integers(0, num)
        there.numbers[0] = num - 1
        _remove(there.f, there.gram, there.right, k, num)
        return math.log(num) + births.log_density[_bin_of(target, births, f[k])]
    widest = target.separation + 2 * target.resolution
    if move == 5 and 0 < num < most:  # split
        k = rng.integers(0, num)
        gap = target.separation + 2 * target.resolution * rng.random()
        share = rng.random()
        low, high = f[k] - share * gap, f[k] + (1 - share) * gap
        for j in range(num):
            if j != k and low <= f[j] <= high:
                return -np.inf
        there.numbers[0] = num + 1
        _set_frequency(data, there.f, there.gram, there.right, k, num, low)
        _set_frequency(data, there.f, there.gram, there.right, num, num + 1, high)
        return math.log(2 * target.resolution * num / (num + 1))
    if move == 6 and num > 1:  # merge
        k = rng.integers(0, num)
        j = _neighbour(f, k, num)
        if j < 0 or f[j] - f[k] >= widest:
            return -np.inf
        value = f[k] + rng.random() * (f[j] - f[k])
        there.numbers[0] = num - 1
        _set_frequency(data, there.f, there.gram, there.right, k, num, value)
        _remove(there.f, there.gram, there.right, j, num)
        return -math.log(2 * target.resolution * (num - 1) / num)
    return -np.inf


@njit(cache=True, nogil=True)
def _refresh(rng, data, target, beta, here, scratch):
    """Draw sigma given the amplitudes, and set the level that they then have."""
    num = int(here.numbers[0])
    here.numbers[1] = _draw_sigma(
        rng,
        data,
        target,
        beta,
        here.gram,
        here.right,
        num,
        here.amplitudes,
        here.numbers[1],
    )
    _redrawn(rng, data, target, beta, here, scratch, True)


@njit(cache=True, nogil=True)
def _exchange(rng, data, target, betas, places, spare, scratch, cold):
    """Exchange the places of two neighbouring temperatures; tell whether."""
    before = places.numbers[cold, 2] + places.numbers[cold + 1, 2]
    for i in range(2):
        _copy(_at(places, cold + 1 - i), _at(spare, i))
        _redrawn(rng, data, target, betas[cold + i], _at(spare, i), scratch, False)
    after = spare.numbers[0, 2] + spare.numbers[1, 2]
    if not math.log(max(rng.random(), 1e-300)) < after - before:
        return False
    for i in range(2):
        _copy(_at(spare, i), _at(places, cold + i))
    return True


@njit(cache=True, nogil=True)
def run_chain(
    rng, data, target, births, betas, frequency, amplitudes, sigma, num_draws, thin
):
    """Run one chain from frequencies, amplitudes (a, b), flat, and sigma.

    ``betas`` are powers of the likelihood, the first of them 1: a place for each moves
    by itself, and after every move neighbours may exchange them. Draws are of the
    first.

    Returns:
        K ``(N,)``, frequencies ``(N, Kmax)``, amplitudes ``(N, 2 Kmax)``, sigma
        ``(N,)``, and for each move how often it was tried and accepted at the first
        power, exchanges last, ``(moves + 1, 2)``.
    """
    most, num = len(target.log_prior) - 1, len(frequency)
    places, spare = _places(len(betas), most), _places(2, most)
    size = 2 * most + 2
    root, sets = np.zeros((size, size)), np.zeros((_SETS, size))
    scratch = Scratch(root, np.zeros(size), np.zeros(size), sets)
    for i in range(len(betas)):
        here = _at(places, i)
        for k in range(num):
            _set_frequency(data, here.f, here.gram, here.right, k, k + 1, frequency[k])
        here.amplitudes[: 2 * num] = amplitudes
        here.numbers[0] = num
        here.numbers[1] = sigma
        _redrawn(rng, data, target, betas[i], here, scratch, True)

    out_k = np.zeros(num_draws, dtype=np.int64)
    out_f, out_a = np.zeros((num_draws, most)), np.zeros((num_draws, 2 * most))
    out_sigma = np.zeros(num_draws)
    last = len(target.edges)
    counts = np.zeros((last + 1, 2), dtype=np.int64)
    odd = 0
    for draw in range(num_draws):
        for _ in range(thin):
            for i in range(len(betas)):
                here = _at(places, i)
                there = _at(spare, 0)
                move = min(np.searchsorted(target.edges, rng.random()), last - 1)
                counts[move, 0] += i == 0
                _copy(here, there)
                if move == 7:
                    _refresh(rng, data, target, betas[i], here, scratch)
                    _copy(here, there)
                    log_ratio = 0.0
                else:
                    log_ratio = _propose(rng, data, target, births, move, here, there)
                num2 = int(there.numbers[0])
                if log_ratio == -np.inf or not _is_allowed(target, there.f, num2):
                    continue
                if target.log_prior[num2] == -np.inf:
                    continue
                _redrawn(rng, data, target, betas[i], there, scratch, False)
                gain = there.numbers[2] - here.numbers[2] + log_ratio
                if math.log(max(rng.random(), 1e-300)) < gain:
                    _copy(there, here)
                    counts[move, 1] += i == 0
            for cold in range(odd, len(betas) - 1, 2):
                found = _exchange(
                    rng, data, target, betas, places, spare, scratch, cold
                )
                counts[last, 0] += cold == 0
                counts[last, 1] += found and cold == 0
            odd = 1 - odd
        here = _at(places, 0)
        num = int(here.numbers[0])
        out_k[draw], out_sigma[draw] = num, here.numbers[1]
        out_f[draw, :num] = here.f[:num]
        out_a[draw, : 2 * num] = here.amplitudes[: 2 * num]
    return out_k, out_f, out_a, out_sigma, counts
