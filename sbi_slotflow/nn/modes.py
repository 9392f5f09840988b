"""The posterior's peaks above sets of anchors, by Gauss-Newton."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..sets.circular import wrapped
from ..sets.transforms import solve_lower
from .charts import Chart
from .gauss_newton import LeastSquares, SignalFit, fit_mode
from .local_transform import LocalTransform
from .unique_rows import unique_rows

__all__ = ["ModeFinder", "Modes"]

# Bounds the memory of fitting and of whitening.
_MAX_SETS = 512
# Deviations beyond which a component moves those after it no further: what is linear
# near a peak is not far from it.
_FAR = 4.0
# Cells that a component may leave its own by while it is fitted.
_MARGIN = 0.1
# Bound on what is remembered.
_MEMO_BYTES = 2**26


class Modes(NamedTuple):
    """Gaussian approximations of the posterior above S sets of anchors.

    Attributes:
        mode: Local coordinates, shape ``(S, K, D)``, angles zero.
        centre: Angles of the P circular ones, shape ``(S, K, P)``.
        factor: Lower triangular factors C of the covariance over all components, shape
            ``(S, K D, K D)``.
        features: What a network is told of each peak, shape ``(S, K, 3 D + 2)``: mode,
            deviations, their share that is left once the components before are known,
            the noise level, and how far from converged the fit is.
        noise: Log of the residuals' standard deviation, shape ``(S,)``.
        height: Log of likelihood times prior at the peak, but for a constant of each
            observation and K, shape ``(S,)``.
    """

    mode: Tensor
    centre: Tensor
    factor: Tensor
    features: Tensor
    noise: Tensor
    height: Tensor

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

        Args:
            which: The sets, shape ``(N,)``.
            k: The component.
            noise: Deviations of those before, in units of :meth:`block`, shape
                ``(N, k, D)``.
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
        """Means given those before, and deviations from them, of all components.

        Args:
            w: Local coordinates, shape ``(N, K, D)``.
            which: Set of each row, shape ``(N,)``.
            mask: Active components, shape ``(N, K)``.

        Returns:
            Both of shape ``(N, K, D)``, zero where inactive.
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

    def marginal(self, which: Tensor, k: Tensor) -> Tensor:
        """Factors ``(N, D, D)`` of component k of N sets, the others unknown."""
        width = self.mode.shape[-1]
        steps = torch.arange(width, device=which.device)
        rows = self.factor[which.unsqueeze(-1), k.unsqueeze(-1) * width + steps]
        return torch.linalg.cholesky(rows @ rows.mT)


class ModeFinder:
    """Finds peaks above anchors.

    Args:
        chart: Chart of a component, for its support.
        local_chart: Local coordinates.
        fit: The signal.
        num_steps: Gauss-Newton steps.
    """

    def __init__(
        self, chart: Chart, local_chart: LocalTransform, fit: SignalFit, num_steps: int
    ) -> None:
        self.chart, self.local_chart = chart, local_chart
        self.fit, self.num_steps = fit, num_steps
        self._memo = _Memo()

    @property
    def num_features(self) -> int:
        """Length of :attr:`Modes.features`."""
        return 3 * self.local_chart.num_features + 2

    @torch.no_grad()
    def __call__(
        self,
        data: Tensor,
        owner: Tensor,
        anchors: Tensor,
        starts: Tensor,
        ends: Tensor,
        mask: Tensor,
        remember: bool = False,
    ) -> Modes:
        """Fit S sets.

        Args:
            data: Observations, shape ``(B, T)``.
            owner: Observation of each set, shape ``(S,)``.
            anchors: Anchors in ascending order, shape ``(S, Kmax)``.
            starts: Where their cells start, same shape.
            ends: Where they end, same shape.
            mask: Active ones, shape ``(S, Kmax)``.
            remember: Whether sets of the last observations are not fitted again.
        """
        cells = owner, anchors, starts, ends, mask
        if not remember:
            return self._fit_all(data, *cells)
        count = mask.sum(-1, keepdim=True)
        keys = torch.cat([owner.unsqueeze(-1), count, anchors * mask], -1)
        index = self._memo.find(data, keys)
        new = (index < 0).nonzero().squeeze(-1)
        fitted = self._fit_all(data, *(part[new] for part in cells))
        known = self._memo.peaks
        if known is None:
            self._memo.add(data, keys, fitted)
            return fitted
        found = known.rows(index.clamp(min=0))
        for part, fresh in zip(found, fitted, strict=True):
            part[new] = fresh
        self._memo.add(data, keys[new], fitted)
        return found

    def _fit_all(
        self,
        data: Tensor,
        owner: Tensor,
        anchors: Tensor,
        starts: Tensor,
        ends: Tensor,
        mask: Tensor,
    ) -> Modes:
        fit = self.fit.given(data)
        num, size, width = *anchors.shape, self.local_chart.num_features
        zeros = torch.zeros(num, size, width, dtype=torch.float64, device=data.device)
        factor = torch.eye(size * width).to(zeros).repeat(num, 1, 1)
        features = zeros.new_zeros(num, size, self.num_features)
        centre = zeros.new_zeros(num, size, self.local_chart.num_circular)
        noise, height = zeros.new_zeros(2, num)
        peaks = Modes(zeros, centre, factor, features, noise, height)
        for start in range(0, num, _MAX_SETS):
            here = slice(start, start + _MAX_SETS)
            # Only as many components as the largest of these sets has.
            most = max(1, int(mask[here].sum(-1).max()))
            parts = (part[here, :most] for part in (anchors, starts, ends, mask))
            found = self._fit(fit, owner[here], *parts)
            peaks.mode[here, :most] = found.mode
            peaks.centre[here, :most] = found.centre
            peaks.factor[here, : most * width, : most * width] = found.factor
            peaks.features[here, :most] = found.features
            peaks.noise[here] = found.noise
            peaks.height[here] = found.height
        return peaks

    def _fit(
        self,
        fit: LeastSquares,
        owner: Tensor,
        anchors: Tensor,
        starts: Tensor,
        ends: Tensor,
        mask: Tensor,
    ) -> Modes:
        chart = self.local_chart
        start = self._start(fit, owner, anchors, starts, ends, mask)
        # Angles are counted from those of the start.
        start, centre = chart.without_angles(start)
        high = chart.farthest().to(start).expand_as(start).clone()
        low = -high
        low[..., 0] = starts - anchors - 0.5 - _MARGIN
        high[..., 0] = ends - anchors - 0.5 + _MARGIN
        peak = fit_mode(
            fit,
            lambda w, index: chart.components(
                chart.absolute(w, anchors[index], centre[index])
            ),
            owner,
            start,
            mask,
            self.num_steps,
            (low, high),
        )
        # Where a bound holds a coordinate, the parabola's peak lies beyond it.
        beyond = torch.linalg.solve(peak.precision, peak.pull)
        # The prior, near there, in place of the fit's penalty.
        log_prior, slope = chart.log_prior(peak.mode, centre)
        slope = (mask.unsqueeze(-1) * (slope + peak.mode)).flatten(1)
        shift = torch.linalg.solve(peak.precision, slope)
        mode = peak.mode + (beyond + shift).reshape(peak.mode.shape)
        # What is promised beyond bounds counts; what a fit still owes does not.
        height = (0.5 * peak.pull * beyond + slope * (beyond + 0.5 * shift)).sum(-1)
        height = height + torch.where(mask, log_prior, 0.0).sum(-1) - peak.decrement
        height = height - 0.5 * fit.data.shape[-1] * peak.variance.log()
        mode, moved = chart.without_angles(mode)
        centre = wrapped(centre + moved)
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(peak.precision))
        factor = torch.linalg.cholesky(covariance)
        deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt().reshape(mode.shape)
        left = factor.diagonal(dim1=-2, dim2=-1).reshape(mode.shape) / deviation
        noise = 0.5 * (peak.variance + 1e-12).log()
        whole = torch.stack([noise, peak.decrement.log1p()], -1)
        features = [
            mode.clamp(-2.0, 2.0),
            0.3 * deviation.log(),
            left.log().clamp(min=-5.0),
            whole.unsqueeze(1).expand(-1, mode.shape[1], -1),
        ]
        return Modes(mode, centre, factor, torch.cat(features, -1), noise, height)

    def _start(
        self,
        fit: LeastSquares,
        owner: Tensor,
        anchors: Tensor,
        starts: Tensor,
        ends: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Local coordinates to start from, angles absolute."""
        same = anchors.unsqueeze(-1) == anchors.unsqueeze(-2)
        same &= mask.unsqueeze(-1) & mask.unsqueeze(-2)
        # Components in one cell share it evenly.
        width = (ends - starts) / same.sum(-1).clamp(min=1)
        first = starts + same.tril(-1).sum(-1) * width
        axis = self.local_chart.axis
        low, high = (
            self.chart.marginals[axis.parameter].quantile(end / axis.num_anchors)
            for end in (first, first + width)
        )
        components = fit.start(owner, low, high, mask)
        components = torch.where(
            mask.unsqueeze(-1), components, self.chart.some_point(components)
        )
        components = self.chart.marginals.clamp(components)
        start, _ = self.local_chart.coordinates(components)
        start[..., 0] = start[..., 0] - anchors - 0.5
        return torch.where(mask.unsqueeze(-1), start, 0.0)


class _Memo:
    """Modes of sets that were fitted before, of one batch of observations."""

    def __init__(self) -> None:
        self.peaks: Modes | None = None
        self._data, self._keys = torch.zeros(0), torch.zeros(0, 0, dtype=torch.int64)

    def find(self, data: Tensor, keys: Tensor) -> Tensor:
        """Places ``(S,)`` of sets with keys ``(S, P)``; -1 for unknown ones."""
        same = data.shape == self._data.shape and data.device == self._data.device
        if not same or not torch.equal(data, self._data):
            self.peaks = None
        if self.peaks is None:
            return torch.full_like(keys[:, 0], -1)
        old = len(self._keys)
        _, which = unique_rows(*torch.cat([self._keys, keys]).unbind(-1))
        place = torch.full_like(which, -1)
        place[which[:old]] = torch.arange(old, device=keys.device)
        return place[which[old:]]

    def add(self, data: Tensor, keys: Tensor, peaks: Modes) -> None:
        """Remember more sets; where they are too many, these alone or none."""
        each = peaks.factor[:1].numel() * peaks.factor.element_size()
        most = _MEMO_BYTES // max(1, each)
        if self.peaks is None or len(self._keys) + len(keys) > most:
            self._data, self._keys, self.peaks = data.clone(), keys, peaks
        else:
            self._keys = torch.cat([self._keys, keys])
            pairs = zip(self.peaks, peaks, strict=True)
            self.peaks = Modes(*(torch.cat(pair) for pair in pairs))
        if len(self._keys) > most:
            self.peaks = None
