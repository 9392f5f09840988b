r"""Least squares of sinusoids: residuals, gradients and Gauss-Newton curvature.

About a reference time t_0 a component, and each of its derivatives, has the form

.. math::
    \mathrm{Re}\,[(\alpha + \beta \tau)\, e^{2\pi i f \tau}], \qquad \tau = t - t_0,

so that all inner products follow from

.. math::
    M_p(f) = \sum_n \tau_n^p\, e^{2\pi i f \tau_n}, \qquad
    Z_p(f) = \sum_n x_n \tau_n^p\, e^{-2\pi i f \tau_n} .

M has a closed form (:mod:`.grid`), Z is evaluated on the time grid split in two (see
:mod:`.grid`): no Jacobian of the length of the record is ever built. Arithmetic is
float64.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...nn.gauss_newton import NormalEquations
from ...nn.registry import register
from .grid import Grid, SineSignal, moments, near_square_root, unit_circle
from .statistics import SineStatistics

__all__ = ["SineFit", "SineLeastSquares"]

_TWO_PI = 2 * math.pi
_SEARCH_POINTS = 7
_SEARCH_ROUNDS = 3
# Frequencies of one observation above which it pays to tabulate its sums, and the
# resolution elements to which their band is rounded.
_MANY, _BAND_STEP = 1_000, 10


@register("fit")
@dataclass(frozen=True)
class SineFit:
    """Normal equations of K sinusoids (A, phi, f) in white noise.

    Complex exponentials lack the conjugate's share of each inner product.

    Attributes:
        grids: Time grids of the records, which the data concatenate.
        ridge: Penalty on linear amplitudes in :meth:`start`, in data points: it keeps
            two components of nearly one frequency finite.
        analytic: Whether the data are complex, see :class:`SineSignal`.
    """

    grids: tuple[Grid, ...]
    ridge: float = 10.0
    analytic: bool = False

    kind: ClassVar[str] = "sinusoids"

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which :meth:`from_spec` rebuilds the fit."""
        grids = [[grid.duration, grid.rate] for grid in self.grids]
        return {
            "kind": self.kind,
            "grids": grids,
            "ridge": self.ridge,
            "analytic": self.analytic,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "SineFit":
        """Rebuild a fit from :attr:`spec`."""
        grids = tuple(Grid(*grid) for grid in spec["grids"])
        # Fits of older files are of real data.
        return cls(grids, spec["ridge"], spec.get("analytic", False))

    @property
    def signal(self) -> SineSignal:
        """The signal that is fitted."""
        return SineSignal(self.grids, self.analytic)

    @property
    def reference_time(self) -> float:
        """Middle of the first record."""
        return self.grids[0].middle

    def given(self, data: Tensor) -> "SineLeastSquares":
        """The least squares of observations ``(B, T)``."""
        return SineLeastSquares(self, data)

    def gram(
        self, frequency: Tensor, alpha: Tensor, beta: Tensor | None = None
    ) -> Tensor:
        """Inner products of C vectors a component with each other.

        Args:
            frequency: Frequencies, shape ``(N, K)``.
            alpha: Amplitudes of the vectors, shape ``(N, K, C)``.
            beta: Their slopes; zero if None.

        Returns:
            Shape ``(N, K C, K C)``.
        """
        size, count = alpha[0].numel(), 1 if beta is None else 3
        first, second = frequency.unsqueeze(-1), frequency.unsqueeze(-2)
        total: Tensor | float = 0.0
        for above in (False,) if self.analytic else (False, True):
            gap = first + second if above else first - second
            m = [m[..., :, None, :, None] for m in self.moments(gap, count)]
            part = _pairs(alpha, alpha, above) * m[0]
            if beta is not None:
                mixed = _pairs(alpha, beta, above) + _pairs(beta, alpha, above)
                part = part + mixed * m[1] + _pairs(beta, beta, above) * m[2]
            total = total + part.real
        gram = torch.as_tensor(total).reshape(-1, size, size)
        return gram if self.analytic else 0.5 * gram

    def moments(self, frequency: Tensor, count: int = 3) -> list[Tensor]:
        """The first ``count`` of the sums M_0, M_1 and M_2; see :mod:`.grid`."""
        return moments(self.grids, self.reference_time, frequency, count)


class SineLeastSquares:
    """Least squares of given observations.

    Sums of a single observation are tabulated once it pays, see
    :class:`SineStatistics`; the tables cover the frequencies that were asked for.

    Args:
        fit: The signal.
        data: The observations, shape ``(B, T)``.
    """

    def __init__(self, fit: SineFit, data: Tensor) -> None:
        self.fit, self.data = fit, data
        self._tables: tuple[tuple[float, float], SineStatistics] | None = None

    def start(self, owner: Tensor, low: Tensor, high: Tensor, mask: Tensor) -> Tensor:
        """Estimate components with frequencies in given intervals.

        Amplitudes by ridge regression and frequencies by a search of each interval, in
        turns; see :class:`~sbi_slotflow.nn.gauss_newton.LeastSquares`.
        """
        low, high = low.double(), high.double()
        steps = torch.linspace(0.0, 1.0, _SEARCH_POINTS).to(low)
        grid = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps
        seen = self._projections(owner, grid.flatten(-2), 1)[0]
        seen = seen.reshape(grid.shape)
        frequency = 0.5 * (low + high)
        phasor = self._regress(owner, frequency, mask)
        own = torch.eye(frequency.shape[-1], dtype=torch.bool, device=low.device)
        for _ in range(_SEARCH_ROUNDS):
            # What the other components leave at each point of the grid.
            others = frequency[..., None, None, :]
            weight = phasor[..., None, None, :].masked_fill(own[:, None, :], 0.0)
            model = weight * self.fit.moments(others - grid.unsqueeze(-1), 1)[0]
            if not self.fit.analytic:
                above = self.fit.moments(others + grid.unsqueeze(-1), 1)[0]
                model = 0.5 * (model + (weight * above).conj())
            power = (seen - model.sum(-1)).abs().square()
            frequency = _peak(grid, power)
            phasor = self._regress(owner, frequency, mask)
        phase = phasor.angle() - _TWO_PI * self.fit.reference_time * frequency
        return torch.stack([phasor.abs(), phase % _TWO_PI, frequency], -1)

    def _regress(self, owner: Tensor, frequency: Tensor, mask: Tensor) -> Tensor:
        """Phasors ``(N, K)`` at given frequencies by ridge regression."""
        alpha = torch.tensor([1.0, 1.0j], dtype=torch.complex128)
        alpha = alpha.to(frequency.device) * mask.unsqueeze(-1)
        gram = self.fit.gram(frequency, alpha)
        inner = self.inner(owner, frequency, alpha).flatten(-2)
        penalty = self.fit.ridge * torch.eye(gram.shape[-1]).to(gram)
        solved = torch.linalg.solve(gram + penalty, inner).unflatten(-1, (-1, 2))
        return torch.complex(solved[..., 0], solved[..., 1])

    def normal_equations(
        self, owner: Tensor, components: Tensor, mask: Tensor
    ) -> NormalEquations:
        """Linearise the sum of the components about their present values."""
        amplitude, phase, frequency = components.double().unbind(-1)
        psi = phase + _TWO_PI * self.fit.reference_time * frequency
        unit = torch.polar(mask.double(), psi)
        phasor = amplitude * unit
        turn = _TWO_PI * 1j * phasor
        alpha = torch.stack([unit, 1j * phasor, self.fit.reference_time * turn], -1)
        beta = torch.stack([0 * unit, 0 * unit, turn], -1)
        gram = self.fit.gram(frequency, alpha, beta)
        inner = self.inner(owner, frequency, alpha, beta)
        # The signal is the sum of A times its derivative with respect to A.
        weights = torch.zeros_like(inner)
        weights[..., 0] = amplitude * mask
        fitted = (gram @ weights.flatten(-2).unsqueeze(-1)).squeeze(-1)
        energy = self.data.double().square().sum(-1)[owner]
        explained = (weights * (2 * inner - fitted.unflatten(-1, (-1, 3)))).sum(
            (-2, -1)
        )
        return NormalEquations(
            residual=(energy - explained).clamp(min=0.0),
            gradient=inner.flatten(-2) - fitted,
            curvature=gram,
        )

    def inner(
        self,
        owner: Tensor,
        frequency: Tensor,
        alpha: Tensor,
        beta: Tensor | None = None,
    ) -> Tensor:
        """Inner products ``(N, K, C)`` of the data with vectors as in :meth:`gram`."""
        vectors = [alpha] if beta is None else [alpha, beta]
        sums = self._projections(owner, frequency, len(vectors))
        pairs = zip(vectors, sums, strict=True)
        return torch.stack([(v * z.conj().unsqueeze(-1)).real for v, z in pairs]).sum(0)

    def _projections(
        self, owner: Tensor, frequency: Tensor, count: int
    ) -> list[Tensor]:
        """The first ``count`` of the sums Z_0 and Z_1 at frequencies ``(N, K)``."""
        data = self.data
        many = len(data) == 1 and frequency.numel() >= _MANY and not self.fit.analytic
        if many and data.device.type == "cpu" and frequency.isfinite().all():
            found = self._statistics(frequency).moments(frequency.numpy())
            return [torch.from_numpy(sums) for sums in found[:count]]
        records = 2 if self.fit.analytic else 1
        lengths = [records * grid.num_samples for grid in self.fit.grids]
        totals = [torch.zeros_like(frequency, dtype=torch.complex128)] * count
        for grid, record in zip(self.fit.grids, data.split(lengths, -1), strict=True):
            fine = near_square_root(grid.num_samples)
            coarse = -(-grid.num_samples // fine)
            padding = coarse * fine - grid.num_samples
            record = record.double().unflatten(-1, (records, grid.num_samples))
            record = torch.nn.functional.pad(record, (0, padding))
            times = torch.arange(coarse * fine).to(frequency) / grid.rate
            times = times - self.fit.reference_time
            step = frequency.unsqueeze(-1) / grid.rate
            j = unit_circle(-step * torch.arange(fine).to(frequency))
            i = unit_circle(
                -step * fine * torch.arange(coarse).to(frequency)
                + (frequency * self.fit.reference_time).unsqueeze(-1)
            )
            inner = torch.cat([j.real, j.imag], -2).mT  # (N, fine, 2K)
            for p in range(count):
                values = record * times if p else record
                blocks = values.unflatten(-1, (coarse, fine))[owner]
                # (N, records, coarse, K)
                real, imag = (blocks @ inner.unsqueeze(1)).chunk(2, -1)
                shares = (torch.complex(real, imag).mT * i.unsqueeze(1)).sum(-1)
                totals[p] = totals[p] + shares[:, 0]
                if self.fit.analytic:
                    totals[p] = totals[p] + 1j * shares[:, 1]
        return totals

    def _statistics(self, frequency: Tensor) -> SineStatistics:
        """Tables of the one observation, in a band about the frequencies."""
        grids = self.fit.grids
        cells = _BAND_STEP / grids[0].duration
        low, high = float(frequency.min()) / cells, float(frequency.max()) / cells
        band = max(0.0, math.floor(low) * cells), (math.floor(high) + 1) * cells
        known = self._tables
        if known is None or not known[0][0] <= band[0] < band[1] <= known[0][1]:
            if known is not None:
                band = min(band[0], known[0][0]), max(band[1], known[0][1])
            x = self.data[0].double().numpy()
            found = SineStatistics.of(x, grids, band)
            found = replace(found, reference_time=self.fit.reference_time)
            # Two threads may both make them; either's are right, and never changed.
            self._tables = known = band, found
        return known[1]


def _pairs(first: Tensor, second: Tensor, above: bool) -> Tensor:
    """Products ``(N, K, C, K, C)``, of conjugates unless frequencies add up."""
    second = second if above else second.conj()
    return first[..., :, :, None, None] * second[..., None, None, :, :]


def _peak(grid: Tensor, power: Tensor) -> Tensor:
    """Where the power ``(N, K, G)`` is largest, between grid points by a parabola."""
    best = power.argmax(-1, keepdim=True).clamp(1, power.shape[-1] - 2)
    left, middle, right = (power.gather(-1, best + i).squeeze(-1) for i in (-1, 0, 1))
    rise, bend = 0.5 * (right - left), 2 * middle - left - right
    # As far as the next point, where the parabola's own is farther or none.
    shift = torch.where(bend > rise.abs(), rise / bend, rise.sign())
    step = grid[..., 1] - grid[..., 0]
    return grid.gather(-1, best).squeeze(-1) + shift * step
