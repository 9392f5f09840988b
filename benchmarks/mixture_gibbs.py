r"""p(K | x) of Gaussian mixtures by Gibbs sampling of partitions, plain and exact.

Shares, means and deviations are integrated out, and K too: what is left is which points
belong together. With t blocks c of n_c points,

.. math::
    p(c_1 \ldots c_t | x) \propto
        V_t \prod_c \frac{\Gamma(\alpha + n_c)}{\Gamma(\alpha)} \, m(c), \qquad
    V_t = \sum_K v_{K t}, \quad
    v_{K t} = p(K)\, \frac{K!}{(K - t)!}\, \frac{\Gamma(K \alpha)}{\Gamma(K \alpha + n)}

(Miller & Harrison 2018). m(c) is the likelihood of the points of a block, integrated
over the uniform mean in closed form and over the logarithm of the deviation by a sum
over nodes. Given t, p(K | t, x) = v_Kt / V_t, which is averaged. Each point in turn is
given to a block or to one of its own; now and then a random block is cut in two, or two
are united. Nothing is shared with `refine` but the numbers of the prior.
"""

# ruff: noqa: NPY002  (in numba, the legacy functions have a state of their own)

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from arviz_stats.base.array import array_stats
from numba import njit
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor

from sbi_slotflow.problems import Points
from sbi_slotflow.sets.marginals import ClosedMarginal

_NODES = 96
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GibbsCardinality:
    """p(K | x) by Gibbs sampling.

    Attributes:
        by_chain: p(K | x) of each chain, shape ``(chains, Kmax + 1)``.
        rhat: Split R-hat of the number of blocks.
        ess: Effective number of draws of it, of all chains.
    """

    by_chain: Tensor
    rhat: float
    ess: float

    @property
    def probs(self) -> Tensor:
        """The estimate, the mean over chains."""
        return self.by_chain.mean(0)

    @property
    def spread(self) -> float:
        """Mean total variation of a chain from the estimate, over the root of C."""
        away = 0.5 * (self.by_chain - self.probs).abs().sum(-1)
        return float(away.mean()) / math.sqrt(len(away))


def gibbs_cardinality(
    problem: Points,
    x: Tensor,
    *,
    concentration: float = 1.0,
    num_sweeps: int = 4_000,
    burn_in: int = 500,
    num_chains: int = 4,
    seed: int = 0,
) -> GibbsCardinality:
    """Estimate p(K | x) of one set of points ``(n, 2)`` of ``gaussian_mixture``.

    Args:
        problem: The problem.
        x: Its data.
        concentration: alpha, as the problem was made with.
        num_sweeps: Sweeps over all points that are kept, of each chain.
        burn_in: Sweeps before.
        num_chains: Chains; they begin with all points in one to Kmax blocks.
        seed: Seed.
    """
    points = x[x[:, 1] > 0][:, 0].double().numpy()
    log_v = log_coefficients(problem, len(points), concentration)
    with np.errstate(divide="ignore"):
        log_vt: _Floats = np.logaddexp.reduce(log_v, axis=0)
    chains = []
    for chain in range(num_chains):
        blocks = _chain(
            points - points.mean(),
            nodes(problem, float(points.mean())),
            log_vt,
            concentration,
            problem.prior.max_cardinality,
            burn_in + num_sweeps,
            1 + chain * (problem.prior.max_cardinality - 1) // max(1, num_chains - 1),
            seed * 1_000 + chain,
        )
        chains.append(blocks[burn_in:])
    blocks: NDArray[Any] = np.stack(chains)
    given = np.exp(log_v - np.where(np.isfinite(log_vt), log_vt, 0.0))
    probs = torch.from_numpy(given.T[blocks].mean(1))
    values: Any = blocks.astype(np.float64)
    if values.min() == values.max():  # certain
        return GibbsCardinality(probs, 1.0, float(values.size))
    numbers: tuple[Any, Any] = array_stats.rhat, array_stats.ess
    rhat, ess = (float(number(values, chain_axis=0, draw_axis=1)) for number in numbers)
    return GibbsCardinality(probs, rhat, ess)


def log_coefficients(problem: Points, num: int, concentration: float) -> _Floats:
    """Log v_Kt of K and t = 0..Kmax, shape ``(Kmax + 1, Kmax + 1)``."""
    size = problem.prior.max_cardinality + 1
    log_p = problem.prior.log_cardinality_probs.double().numpy()
    k, t = np.arange(size)[:, None], np.arange(size)[None]
    safe = np.maximum(k, 1) * concentration
    log_v = log_p[:, None] + gammaln(k + 1) - gammaln(np.maximum(k - t, 0) + 1)
    log_v = log_v + gammaln(safe) - gammaln(safe + num)
    return np.where((t <= k) & (t >= 1) & (k >= 1), log_v, -np.inf)


def nodes(problem: Points, shift: float) -> _Floats:
    """Deviations at which m(c) is summed, and the ends of the mean, less a shift."""
    mean, deviation = (problem.prior.component_marginals[i] for i in (0, 1))
    known = isinstance(mean, ClosedMarginal) and isinstance(deviation, ClosedMarginal)
    if not (known and mean.is_uniform and deviation.is_log_uniform):
        raise ValueError("the mean must be uniform, the deviation log-uniform.")
    shares = (torch.arange(_NODES).double() + 0.5) / _NODES
    ends = np.array(mean.bounds) - shift
    return np.concatenate([ends, deviation.quantile(shares).numpy()])


@njit(cache=True)
def log_marginal(num: int, total: float, square: float, table: _Floats) -> float:
    """Log m of a block of points with these sums of them and of their squares."""
    low, high = table[0], table[1]
    mean = total / num
    inner = max(square - total * mean, 0.0)
    root, best = math.sqrt(num), -np.inf
    values = np.empty(len(table) - 2)
    for q in range(len(values)):
        s = table[q + 2]
        z_low, z_high = root * (mean - low) / s, root * (high - mean) / s
        inside = 0.5 * (math.erf(z_low / 1.4142135623730951))
        inside += 0.5 * (math.erf(z_high / 1.4142135623730951))
        value = -(num - 1) * (math.log(s) + 0.9189385332046727) - 0.5 * inner / (s * s)
        values[q] = value + math.log(max(inside, 1e-300))
        best = max(best, values[q])
    sum_ = 0.0
    for q in range(len(values)):
        if values[q] > best - 40.0:
            sum_ += math.exp(values[q] - best)
    scale = math.log(root * (high - low) * len(values))
    return best + math.log(sum_) - scale


@njit(cache=True)
def _chain(
    points: _Floats,
    table: _Floats,
    log_vt: _Floats,
    alpha: float,
    most: int,
    num_sweeps: int,
    begin: int,
    seed: int,
) -> NDArray[np.int64]:
    """Numbers of blocks after each sweep ``(num_sweeps,)``."""
    np.random.seed(seed)
    num = len(points)
    which = np.empty(num, np.int64)
    sizes, totals, squares = (
        np.zeros(most, np.int64),
        np.zeros(most),
        np.zeros(most),
    )
    logs, chances = np.zeros(most), np.empty(most)
    order = np.argsort(points)
    for rank in range(num):
        i = order[rank]
        which[i] = rank * min(begin, num) // num
        sizes[which[i]] += 1
        totals[which[i]] += points[i]
        squares[which[i]] += points[i] ** 2
    for c in range(most):
        if sizes[c] > 0:
            logs[c] = log_marginal(sizes[c], totals[c], squares[c], table)  # pyright: ignore
    found = np.empty(num_sweeps, np.int64)
    trial, side = np.empty(most), np.empty(num, np.bool_)
    for sweep in range(num_sweeps):
        for i in range(num):
            v, c = points[i], which[i]
            sizes[c] -= 1
            totals[c] -= v
            squares[c] -= v * v
            if sizes[c] > 0:
                logs[c] = log_marginal(sizes[c], totals[c], squares[c], table)  # pyright: ignore
            t, free, best = 0, -1, -np.inf
            for d in range(most):
                if sizes[d] > 0:
                    t += 1
                elif free < 0:
                    free = d
            for d in range(most):
                chances[d] = -np.inf
                if sizes[d] > 0:
                    n = sizes[d] + 1
                    trial[d] = log_marginal(n, totals[d] + v, squares[d] + v * v, table)
                    chances[d] = math.log(alpha + sizes[d]) + trial[d] - logs[d]
                    chances[d] += log_vt[t]
                elif d == free:
                    trial[d] = log_marginal(1, v, v * v, table)
                    chances[d] = math.log(alpha) + trial[d] + log_vt[t + 1]
                best = max(best, chances[d])
            total = 0.0
            for d in range(most):
                total += math.exp(chances[d] - best)
            u, c = np.random.random() * total, -1
            for d in range(most):
                if chances[d] == -np.inf:
                    continue
                c = d
                u -= math.exp(chances[d] - best)
                if u < 0:
                    break
            which[i] = c
            sizes[c] += 1
            totals[c] += v
            squares[c] += v * v
            logs[c] = trial[c]
        for _ in range(10):
            _cut_or_unite(
                points,
                table,
                log_vt,
                alpha,
                which,
                sizes,
                totals,
                squares,
                logs,
                side,
            )
        found[sweep] = (sizes > 0).sum()
    return found


@njit(cache=True)
def _cut_or_unite(
    points: _Floats,
    table: _Floats,
    log_vt: _Floats,
    alpha: float,
    which: NDArray[np.int64],
    sizes: NDArray[np.int64],
    totals: _Floats,
    squares: _Floats,
    logs: _Floats,
    side: NDArray[np.bool_],
) -> None:
    """Cut one block at a place between two points, or unite two that do not overlap.

    Of t blocks one is chosen, and one of its n - 1 gaps; of t + 1 blocks one of the
    pairs. A pair that overlaps cannot be united, as no cut leads back.
    """
    most, num, t = len(sizes), len(points), 0
    for d in range(most):
        t += sizes[d] > 0
    pick = np.random.randint(t)
    a = _nth(sizes, pick)
    if np.random.random() < 0.5:
        if t == most or sizes[a] < 2:
            return
        gap = np.random.randint(1, sizes[a])  # points below the cut
        values = np.sort(points[which == a])
        cut = 0.5 * (values[gap - 1] + values[gap])
        b = _nth(-(sizes - 1), 0)
        n_b, total, square = 0, 0.0, 0.0
        for i in range(num):
            side[i] = which[i] == a and points[i] > cut
            if side[i]:
                n_b += 1
                total += points[i]
                square += points[i] ** 2
        n_a = sizes[a] - n_b
        if n_a == 0 or n_b == 0:  # points that coincide
            return
        log_a = log_marginal(n_a, totals[a] - total, squares[a] - square, table)
        log_b = log_marginal(n_b, total, square, table)
        gain = log_a + log_b - logs[a] + log_vt[t + 1] - log_vt[t]
        gain += math.lgamma(alpha + n_a) + math.lgamma(alpha + n_b)
        gain -= math.lgamma(alpha + sizes[a]) + math.lgamma(alpha)
        # 1 / t and 1 / (n - 1) forward, 2 / (t (t + 1)) for the pair backward
        gain += math.log(t * (sizes[a] - 1)) - math.log(0.5 * t * (t + 1))
        if math.log(np.random.random()) < gain:
            for i in range(num):
                if side[i]:
                    which[i] = b
            sizes[b], totals[b], squares[b], logs[b] = n_b, total, square, log_b
            sizes[a], logs[a] = n_a, log_a
            totals[a] -= total
            squares[a] -= square
        return
    if t < 2:
        return
    other = np.random.randint(t - 1)
    b = _nth(sizes, other + (other >= pick))
    low_a, high_a = points[which == a].min(), points[which == a].max()
    low_b, high_b = points[which == b].min(), points[which == b].max()
    if not (high_a < low_b or high_b < low_a):
        return
    n = sizes[a] + sizes[b]
    total, square = totals[a] + totals[b], squares[a] + squares[b]
    log_both = log_marginal(n, total, square, table)
    gain = log_both - logs[a] - logs[b] + log_vt[t - 1] - log_vt[t]
    gain += math.lgamma(alpha + n) + math.lgamma(alpha)
    gain -= math.lgamma(alpha + sizes[a]) + math.lgamma(alpha + sizes[b])
    gain += math.log(0.5 * t * (t - 1)) - math.log((t - 1) * (n - 1))
    if math.log(np.random.random()) < gain:
        for i in range(num):
            if which[i] == b:
                which[i] = a
        sizes[a], totals[a], squares[a], logs[a] = n, total, square, log_both
        sizes[b], totals[b], squares[b] = 0, 0.0, 0.0


@njit(cache=True)
def _nth(sizes: NDArray[np.int64], n: int) -> int:
    """Index of the n-th positive entry."""
    for d in range(len(sizes)):
        if sizes[d] > 0:
            if n == 0:
                return d
            n -= 1
    return -1
