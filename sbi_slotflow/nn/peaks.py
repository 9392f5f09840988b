"""The posterior's peaks above sets of anchors, by Gauss-Newton."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..marginals import clamp_to_support
from .charts import Chart
from .gauss_newton import SignalFit, fit_peak
from .local_chart import LocalChart, wrapped

__all__ = ["PeakFinder", "Peaks"]

# Bounds the memory of fitting and of whitening.
MAX_SETS = 512


class Peaks(NamedTuple):
    """Gaussian approximations of the posterior above S sets of anchors.

    Attributes:
        mode: Local coordinates, shape ``(S, K, D)``, phases zero.
        centre: Phases of the peaks, shape ``(S, K)``.
        factor: Lower triangular factors C of the covariance over all components, shape
            ``(S, K D, K D)``.
        features: What a network is told of each peak, shape ``(S, K, 3 D + 1)``: mode,
            deviations, their share that is left once the components before are known,
            and the noise level.
        noise: Log of the residuals' standard deviation, shape ``(S,)``.
    """

    mode: Tensor
    centre: Tensor
    factor: Tensor
    features: Tensor
    noise: Tensor

    def block(self, which: Tensor, k: int | Tensor) -> Tensor:
        """Factors ``(N, D, D)`` of component k of N sets, given those before it."""
        width = self.mode.shape[-1]
        steps = torch.arange(width, device=which.device)
        index = (torch.as_tensor(k, device=which.device) * width).unsqueeze(-1) + steps
        index = index.expand(len(which), -1)
        return self.factor[
            which[:, None, None], index.unsqueeze(-1), index.unsqueeze(-2)
        ]

    def marginal(self, which: Tensor, k: Tensor) -> Tensor:
        """Factors ``(N, D, D)`` of component k of N sets, the others unknown."""
        width = self.mode.shape[-1]
        steps = torch.arange(width, device=which.device)
        rows = self.factor[which.unsqueeze(-1), k.unsqueeze(-1) * width + steps]
        return torch.linalg.cholesky(rows @ rows.mT)


class PeakFinder:
    """Finds peaks above anchors.

    Args:
        chart: Chart of a component, for its support.
        local_chart: Local coordinates.
        fit: The signal.
        num_steps: Gauss-Newton steps.
    """

    def __init__(
        self, chart: Chart, local_chart: LocalChart, fit: SignalFit, num_steps: int
    ) -> None:
        self.chart, self.local_chart = chart, local_chart
        self.fit, self.num_steps = fit, num_steps

    @property
    def num_features(self) -> int:
        """Length of :attr:`Peaks.features`."""
        return 3 * self.local_chart.num_features + 1

    @torch.no_grad()
    def __call__(
        self,
        data: Tensor,
        owner: Tensor,
        anchors: Tensor,
        starts: Tensor,
        ends: Tensor,
        mask: Tensor,
    ) -> Peaks:
        """Fit S sets.

        Args:
            data: Observations, shape ``(B, T)``.
            owner: Observation of each set, shape ``(S,)``.
            anchors: Anchors in ascending order, shape ``(S, Kmax)``.
            starts: Where their cells start, same shape.
            ends: Where they end, same shape.
            mask: Active ones, shape ``(S, Kmax)``.
        """
        num, size, width = *anchors.shape, self.local_chart.num_features
        zeros = torch.zeros(num, size, width, dtype=torch.float64, device=data.device)
        factor = torch.eye(size * width).to(zeros).repeat(num, 1, 1)
        features = zeros.new_zeros(num, size, self.num_features)
        centre, noise = torch.zeros_like(zeros[..., 0]), zeros.new_zeros(num)
        peaks = Peaks(zeros, centre, factor, features, noise)
        for start in range(0, num, MAX_SETS):
            here = slice(start, start + MAX_SETS)
            # Only as many components as the largest of these sets has.
            most = max(1, int(mask[here].sum(-1).max()))
            parts = (part[here, :most] for part in (anchors, starts, ends, mask))
            found = self._fit(data, owner[here], *parts)
            peaks.mode[here, :most] = found.mode
            peaks.centre[here, :most] = found.centre
            peaks.factor[here, : most * width, : most * width] = found.factor
            peaks.features[here, :most] = found.features
            peaks.noise[here] = found.noise
        return peaks

    def _fit(
        self,
        data: Tensor,
        owner: Tensor,
        anchors: Tensor,
        starts: Tensor,
        ends: Tensor,
        mask: Tensor,
    ) -> Peaks:
        chart = self.local_chart
        start = self._start(data, owner, anchors, starts, ends, mask)
        # Phases are counted from those of the start.
        centre = torch.zeros_like(start[..., 0])
        limit = torch.full_like(start[0, 0], 1.1)
        limit[0] = 1.6  # a cell and what lies about it
        if chart.has_phase:
            centre = start[..., 1].clone()
            start[..., 1] = 0.0
            limit[1] = torch.pi
        peak = fit_peak(
            self.fit,
            lambda w: chart.components(chart.absolute(w, anchors, centre)),
            data,
            owner,
            start,
            mask,
            self.num_steps,
            limit,
        )
        mode = peak.mode
        if chart.has_phase:
            centre = wrapped(centre + mode[..., 1])
            mode[..., 1] = 0.0
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(peak.precision))
        factor = torch.linalg.cholesky(covariance)
        deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt().reshape(mode.shape)
        left = factor.diagonal(dim1=-2, dim2=-1).reshape(mode.shape) / deviation
        noise = 0.5 * (peak.variance + 1e-12).log()
        features = [
            mode.clamp(-2.0, 2.0),
            0.3 * deviation.log(),
            left.log().clamp(min=-5.0),
            noise[:, None, None].expand(*mode.shape[:2], 1),
        ]
        return Peaks(mode, centre, factor, torch.cat(features, -1), noise)

    def _start(
        self,
        data: Tensor,
        owner: Tensor,
        anchors: Tensor,
        starts: Tensor,
        ends: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Local coordinates to start from, phases absolute."""
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
        components = self.fit.start(data, owner, low, high, mask)
        components = torch.where(
            mask.unsqueeze(-1), components, self.chart.some_point(components)
        )
        components = clamp_to_support(components, self.chart.marginals)
        start, _ = self.local_chart.coordinates(components)
        start[..., 0] = start[..., 0] - anchors - 0.5
        return torch.where(mask.unsqueeze(-1), start, 0.0)
