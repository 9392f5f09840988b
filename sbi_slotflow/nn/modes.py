r"""Modes of the posterior above sets of cells, and Laplace approximations there.

Given the cells of all K components, the posterior of their local coordinates w is
approximated by a Gaussian at its mode,

.. math::
    p(w | a, x, K) \approx \mathcal{N}(w; m, \Sigma), \qquad
    \Sigma^{-1} = -\nabla^2 \log p(x | w)\big|_m + 1, \qquad \Sigma = C C^\top,

found by Gauss-Newton steps (:mod:`.gauss_newton`) for all components together. As C is
lower triangular, component k given those before it is again Gaussian, with a mean that
is linear in their deviations and the k-th diagonal block of C as its factor.

See Also:
    :mod:`.local`, which turns each conditional Gaussian into a density inside
    the cell.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..sets.circular import wrapped
from ..sets.transforms import solve_lower
from .cells import OccupiedCells
from .charts import Chart
from .gauss_newton import LeastSquares, SignalFit, fit_mode
from .local import LocalTransform

__all__ = ["ModeFinder", "Modes", "log_evidence"]

# Bounds the memory of fitting and of whitening.
_MAX_SETS = 512
# Deviations beyond which a component moves those after it no further: what is linear
# near a mode is not far from it.
_FAR = 4.0
# Cells that a component may leave its own by while it is fitted.
_MARGIN = 0.1


class Modes(NamedTuple):
    """Gaussian approximations of the posterior above S sets of cells."""

    mode: Tensor  # Local coordinates, (S, K, D), angles zero
    centre: Tensor  # Angles of the P circular ones, (S, K, P)
    factor: Tensor  # Lower triangular C of the covariance of all, (S, K D, K D)
    # Mode, log deviations and the log of their share that is left once the
    # components before are known, (S, K, 3 D)
    summary: Tensor
    decrement: Tensor  # Nats that another step promises, (S,)
    level: Tensor  # Log of the residuals' standard deviation, (S,)
    misfit: Tensor  # Minus the log likelihood there, up to such a constant, (S,)
    height: Tensor  # Log likelihood times prior there, up to a constant of x, K, (S,)

    def features(self, scale: Tensor) -> Tensor:
        """What a network is told of each mode, shape ``(S, K, 3 D + 2)``.

        Besides the summary, the residual level in a unit ``()`` of the data, and how
        far from converged the fit is.
        """
        level = self.level - scale.to(self.level).log()
        whole = torch.stack([level, self.decrement.log1p()], -1)
        whole = whole.unsqueeze(1).expand(-1, self.summary.shape[1], -1)
        return torch.cat([self.summary, whole], -1)

    def rows(self, index: Tensor) -> "Modes":
        """Some of the sets."""
        return Modes(*(part[index] for part in self))

    def block(self, which: Tensor, k: int | Tensor) -> Tensor:
        """Factors ``(N, D, D)`` of component k of N sets, given those before it."""
        width = self.mode.shape[-1]
        if isinstance(k, int):
            here = slice(k * width, (k + 1) * width)
            return self.factor[:, here, here][which]
        steps = torch.arange(width, device=which.device)
        index = (k * width).unsqueeze(-1) + steps
        index = index.expand(len(which), -1)
        return self.factor[
            which[:, None, None], index.unsqueeze(-1), index.unsqueeze(-2)
        ]

    def mean(self, which: Tensor, k: int, noise: Tensor) -> Tensor:
        """Means ``(N, D)`` of component k of N sets, given those before it.

        Their deviations ``(N, k, D)`` are in units of :meth:`block`.
        """
        mean = self.mode[which, k]
        if not k:
            return mean
        width = self.mode.shape[-1]
        mixing = self.factor[:, k * width : (k + 1) * width, : k * width]
        known = noise.flatten(1).clamp(-_FAR, _FAR)
        if len(mixing) == 1:  # no need of a matrix for each row
            return mean + known @ mixing[0].mT
        return mean + (mixing[which] @ known.unsqueeze(-1)).squeeze(-1)

    def whiten(self, w: Tensor, which: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Means given those before, and deviations from them, of components ``w``.

        All are of shape ``(N, K, D)``, zero where inactive.
        """
        means, noise = torch.zeros_like(w), torch.zeros_like(w)
        for k in range(int(mask.sum(-1).max()) if len(mask) else 0):
            # In parts, as each row brings a matrix of its own.
            for rows in mask[:, k].nonzero().squeeze(-1).split(_MAX_SETS):
                mean = self.mean(which[rows], k, noise[rows, :k])
                factor = self.block(which[rows], k)
                means[rows, k] = mean
                noise[rows, k] = solve_lower(factor, w[rows, k] - mean)
        return means, noise


class ModeFinder:
    """Finds modes above sets of cells."""

    def __init__(
        self, chart: Chart, local_chart: LocalTransform, fit: SignalFit, num_steps: int
    ) -> None:
        self.chart, self.local_chart = chart, local_chart
        self.fit, self.num_steps = fit, num_steps

    @property
    def num_features(self) -> int:
        """Length of :meth:`Modes.features`."""
        return 3 * self.local_chart.num_features + 2

    @torch.no_grad()
    def __call__(self, data: Tensor, sets: OccupiedCells) -> Modes:
        """Find the modes above S sets of cells, given data ``(B, T)``."""
        fit, (num, size) = self.fit.given(data), sets.cells.shape
        width = self.local_chart.num_features
        zeros = torch.zeros(num, size, width, dtype=torch.float64, device=data.device)
        factor = torch.eye(size * width).to(zeros).repeat(num, 1, 1)
        modes = Modes(
            zeros,
            zeros.new_zeros(num, size, self.local_chart.num_circular),
            factor,
            zeros.new_zeros(num, size, 3 * width),
            *zeros.new_zeros(4, num),
        )
        for start in range(0, num, _MAX_SETS):
            here = slice(start, start + _MAX_SETS)
            # Only as many components as the largest of these sets has.
            most = max(1, int(sets.mask[here].sum(-1).max()))
            found = self._fit(fit, sets.part(here, most))
            for whole, part in zip(modes, found, strict=True):
                whole[here, *(slice(length) for length in part.shape[1:])] = part
        return modes

    def _fit(self, fit: LeastSquares, sets: OccupiedCells) -> Modes:
        chart, (owner, cells, starts, ends, mask) = self.local_chart, sets
        # Angles are counted from those of the start.
        start, centre = chart.without_angles(self._start(fit, sets))
        high = chart.farthest(cells).to(start).clone()
        low = -high
        low[..., 0] = starts - cells - 0.5 - _MARGIN
        high[..., 0] = ends - cells - 0.5 + _MARGIN
        high[..., 1 : chart.num_places] = 0.5 + _MARGIN
        low[..., 1 : chart.num_places] = -0.5 - _MARGIN
        found = fit_mode(
            fit,
            lambda w, index: chart.components(
                chart.off_centre(chart.absolute(w, cells[index], centre[index]))
            ),
            owner,
            start,
            mask,
            self.num_steps,
            (low, high),
        )
        # Where a bound holds a coordinate, the parabola's maximum lies beyond it.
        beyond = torch.linalg.solve(found.precision, found.gradient)
        # The prior's slope there takes the place of the penalty on w.
        log_prior, slope = chart.log_prior(found.mode, centre, cells)
        slope = (mask.unsqueeze(-1) * (slope + found.mode)).flatten(1)
        shift = torch.linalg.solve(found.precision, slope)
        mode = found.mode + (beyond + shift).reshape(found.mode.shape)
        # The height of the parabola's maximum, beyond bounds too; but not what another
        # step would gain within the bounds, where the fit has not converged.
        height = (0.5 * found.gradient * beyond + slope * (beyond + 0.5 * shift)).sum(
            -1
        )
        height = height + torch.where(mask, log_prior, 0.0).sum(-1) - found.decrement
        height = height - found.misfit
        mode, moved = chart.without_angles(mode)
        centre = wrapped(centre + moved)
        factor = _covariance_factor(found.precision)
        deviation = factor.square().sum(-1).sqrt().reshape(mode.shape)
        left = factor.diagonal(dim1=-2, dim2=-1).reshape(mode.shape) / deviation
        summary = [mode.clamp(-2.0, 2.0), 0.3 * deviation.log(), left.log().clamp(-5.0)]
        return Modes(
            mode,
            centre,
            factor,
            torch.cat(summary, -1),
            found.decrement,
            0.5 * found.variance.log(),
            found.misfit,
            height,
        )

    def _start(self, fit: LeastSquares, sets: OccupiedCells) -> Tensor:
        """Local coordinates to start from, angles absolute."""
        owner, cells, starts, ends, mask = sets
        same = starts.unsqueeze(-1) == starts.unsqueeze(-2)
        same &= mask.unsqueeze(-1) & mask.unsqueeze(-2)
        # Components in one cell, or one part of it, share it evenly.
        width = (ends - starts) / same.sum(-1).clamp(min=1)
        first = starts + same.tril(-1).sum(-1) * width
        low, high = self.local_chart.interval(cells, first, first + width)
        if low.shape[-1] == 1:
            low, high = low.squeeze(-1), high.squeeze(-1)
        components = fit.start(owner, low, high, mask)
        point = self.chart.some_point(components)
        components = torch.where(mask.unsqueeze(-1), components, point)
        components = self.chart.marginals.clamp(components)
        start, _ = self.local_chart.coordinates(components)
        middles = self.local_chart.axis.middles(cells)
        start[..., : middles.shape[-1]] -= middles
        return torch.where(mask.unsqueeze(-1), start, 0.0)


def _covariance_factor(precision: Tensor) -> Tensor:
    """Lower triangular C with :math:`C C^T = P^{-1}`, shape ``(S, n, n)``."""
    # From the last coordinate to the first, P = U U^T has an upper triangular U.
    upper = torch.linalg.cholesky(precision.flip(-1, -2)).flip(-1, -2)
    identity = torch.eye(precision.shape[-1]).to(upper)
    return torch.linalg.solve_triangular(upper, identity, upper=True).mT


# Points that the mass of a Gaussian between ends is averaged over, and their seed.
_NUM_POINTS, _SEED = 16, 0
_TINY, _ALMOST_ONE = 1e-300, 1 - 1e-16


def log_evidence(modes: Modes, sets: OccupiedCells, chart: LocalTransform) -> Tensor:
    r"""Evidence of S sets of cells: the likelihood's integral over them, ``(S,)``.

    With h the height of the Laplace approximation above the cells,

    .. math::
        \log Z = h + \tfrac12 \log\det 2 \pi \Sigma
            + \log \int_{\text{cells}} \mathcal{N}(w; m, \Sigma)\, dw

    up to a constant of each observation and K. The last term is estimated by sequential
    importance sampling (Genz 1992): each coordinate is drawn from its truncated
    Gaussian given those before, and the masses of the truncations multiply. The points
    are the same for every set.
    """
    mask = sets.mask
    width, size = modes.mode.shape[-1], int(mask.sum(-1).max()) if len(mask) else 0
    upper, middle = chart.axis.upper(sets.ends, mask), sets.cells + 0.5
    num = len(mask), _NUM_POINTS
    engine = torch.quasirandom.SobolEngine(
        max(1, size * width), scramble=True, seed=_SEED
    )
    levels = engine.draw(_NUM_POINTS, dtype=torch.float64).to(modes.mode)
    noise = modes.mode.new_zeros(*num, size * width)
    log_mass = modes.mode.new_zeros(num)
    before = torch.full_like(log_mass, -torch.inf)
    ends = chart.ends(sets.cells)
    for k in range(size):
        active = mask[:, k, None]
        for d in range(width):
            j = k * width + d
            row = modes.factor[:, j]
            centre = modes.mode[:, k, d, None]
            if j:
                centre = centre + (noise[..., :j] @ row[:, :j, None]).squeeze(-1)
            low, high = (end[:, k, d, None].expand(num).to(noise) for end in ends)
            if not d:
                least = chart.axis.lower(sets.starts[:, k, None].expand(num), before)
                low, high = (
                    end - middle[:, k, None] for end in (least, upper[:, k, None])
                )
            scale = row[:, j, None]
            z, share = _truncated(
                (low - centre) / scale, (high - centre) / scale, levels[:, j]
            )
            noise[..., j] = torch.where(active, z, 0.0)
            log_mass = log_mass + torch.where(active, share, 0.0)
            if not d:
                place = middle[:, k, None] + centre + scale * z
                before = torch.where(active, place, before)
    scales = modes.factor.diagonal(dim1=-2, dim2=-1).log().unflatten(-1, (-1, width))
    volume = torch.where(mask.unsqueeze(-1), scales, 0.0).sum((-2, -1))
    mean_mass = log_mass.logsumexp(-1) - math.log(_NUM_POINTS)
    # Beside classes of other sizes, these are no constants.
    size = chart.num_coordinates(sets.cells, mask)
    weight = chart.log_weight(sets.cells, mask) + 0.5 * math.log(2 * math.pi) * size
    return modes.height + volume + mean_mass + weight


def _truncated(low: Tensor, high: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Quantiles of a standard normal variable between ends, and their log mass."""
    # In the lower tail, where masses keep their precision.
    flip = low > 0
    below, above = torch.where(flip, -high, low), torch.where(flip, -low, high)
    first = torch.special.ndtr(below)
    mass = (torch.special.ndtr(above) - first).clamp(min=_TINY)
    z = torch.special.ndtri((first + level * mass).clamp(_TINY, _ALMOST_ONE))
    z = torch.where(flip, -z, z)
    return torch.maximum(torch.minimum(z, high), low), mass.log()
