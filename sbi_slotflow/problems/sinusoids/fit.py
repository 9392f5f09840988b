r"""Least squares of sinusoids: residuals, gradients and Gauss-Newton curvature.

About a reference time t_0 a component, and each of its derivatives, has the form

.. math::
    \mathrm{Re}\,[(\alpha + \beta \tau)\, e^{2\pi i f \tau}], \qquad \tau = t - t_0,

so that all inner products follow from

.. math::
    M_p(f) = \sum_n \tau_n^p\, e^{2\pi i f \tau_n}, \qquad
    Z_p(f) = \sum_n x_n \tau_n^p\, e^{-2\pi i f \tau_n} .

M has a closed form, Z is evaluated on the time grid split in two (see
:mod:`.grid`): no Jacobian of the length of the record is ever built. Arithmetic is
float64.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...nn.gauss_newton import NormalEquations
from ...nn.registry import register
from .grid import Grid, SineSignal, near_square_root
from .statistics import SineStatistics

__all__ = ["SineFit"]

_TWO_PI = 2 * math.pi
# Up to x = pi f T the power series, beyond it the closed forms: both to 1e-10.
_SERIES_LIMIT = 2.0
_SERIES_TERMS = 24
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
        return 0.5 * (self.grids[0].num_samples - 1) / self.grids[0].rate

    def start(
        self, data: Tensor, owner: Tensor, low: Tensor, high: Tensor, mask: Tensor
    ) -> Tensor:
        """Estimate components with frequencies in given intervals.

        Amplitudes by ridge regression and frequencies by a search of each interval, in
        turns.

        Args:
            data: Observations, shape ``(B, T)``.
            owner: Observation of each set, shape ``(N,)``.
            low: Lower ends of the intervals, shape ``(N, K)``.
            high: Upper ends.
            mask: Active components, shape ``(N, K)``.

        Returns:
            Components (A, phi, f), shape ``(N, K, 3)``, float64.
        """
        low, high = low.double(), high.double()
        steps = torch.linspace(0.0, 1.0, _SEARCH_POINTS).to(low)
        grid = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps
        seen = self._projections(data, owner, grid.flatten(-2), 1)[0]
        seen = seen.reshape(grid.shape)
        frequency = 0.5 * (low + high)
        phasor = self._regress(data, owner, frequency, mask)
        own = torch.eye(frequency.shape[-1], dtype=torch.bool, device=low.device)
        for _ in range(_SEARCH_ROUNDS):
            # What the other components leave at each point of the grid.
            others = frequency[..., None, None, :]
            weight = phasor[..., None, None, :].masked_fill(own[:, None, :], 0.0)
            model = weight * self._moments(others - grid.unsqueeze(-1), 1)[0]
            if not self.analytic:
                above = self._moments(others + grid.unsqueeze(-1), 1)[0]
                model = 0.5 * (model + (weight * above).conj())
            power = (seen - model.sum(-1)).abs().square()
            frequency = _peak(grid, power)
            phasor = self._regress(data, owner, frequency, mask)
        phase = phasor.angle() - _TWO_PI * self.reference_time * frequency
        return torch.stack([phasor.abs(), phase % _TWO_PI, frequency], -1)

    def _regress(
        self, data: Tensor, owner: Tensor, frequency: Tensor, mask: Tensor
    ) -> Tensor:
        """Phasors ``(N, K)`` at given frequencies by ridge regression."""
        alpha = torch.tensor([1.0, 1.0j], dtype=torch.complex128)
        alpha = alpha.to(frequency.device) * mask.unsqueeze(-1)
        first, second = frequency.unsqueeze(-1), frequency.unsqueeze(-2)
        here, there = alpha[..., :, :, None, None], alpha[..., None, None, :, :]
        below = self._moments(first - second, 1)[0][..., :, None, :, None]
        gram = (here * there.conj() * below).real
        if not self.analytic:
            above = self._moments(first + second, 1)[0][..., :, None, :, None]
            gram = 0.5 * (gram + (here * there * above).real)
        gram = gram.flatten(-4, -3).flatten(-2)
        seen = self._projections(data, owner, frequency, 1)[0]
        inner = (alpha * seen.conj().unsqueeze(-1)).real.flatten(-2)
        penalty = self.ridge * torch.eye(gram.shape[-1]).to(gram)
        solved = torch.linalg.solve(gram + penalty, inner).unflatten(-1, (-1, 2))
        return torch.complex(solved[..., 0], solved[..., 1])

    def normal_equations(
        self, data: Tensor, owner: Tensor, components: Tensor, mask: Tensor
    ) -> NormalEquations:
        """Linearise the sum of the components about their present values.

        Args:
            data: Observations, shape ``(B, T)``.
            owner: Observation of each set, shape ``(N,)``.
            components: (A, phi, f), shape ``(N, K, 3)``.
            mask: Active components, shape ``(N, K)``.
        """
        amplitude, phase, frequency = components.double().unbind(-1)
        psi = phase + _TWO_PI * self.reference_time * frequency
        unit = torch.polar(mask.double(), psi)
        phasor = amplitude * unit
        turn = _TWO_PI * 1j * phasor
        alpha = torch.stack([unit, 1j * phasor, self.reference_time * turn], -1)
        beta = torch.stack([0 * unit, 0 * unit, turn], -1)
        gram = self.gram(alpha, beta, frequency)
        inner = self.inner(data, owner, alpha, beta, frequency)
        # The signal is the sum of A times its derivative with respect to A.
        weights = torch.zeros_like(inner)
        weights[..., 0] = amplitude * mask
        fitted = (gram @ weights.flatten(-2).unsqueeze(-1)).squeeze(-1)
        energy = data.double().square().sum(-1)[owner]
        explained = (weights * (2 * inner - fitted.unflatten(-1, (-1, 3)))).sum(
            (-2, -1)
        )
        return NormalEquations(
            residual=(energy - explained).clamp(min=0.0),
            gradient=inner.flatten(-2) - fitted,
            curvature=gram,
        )

    def gram(self, alpha: Tensor, beta: Tensor, frequency: Tensor) -> Tensor:
        """Inner products of C vectors a component: ``(N, K C, K C)``."""
        num, width = alpha.shape[-2], alpha.shape[-1]
        first, second = frequency.unsqueeze(-1), frequency.unsqueeze(-2)
        if self.analytic:
            parts = [(self._moments(first - second), alpha.conj(), beta.conj())]
        else:
            both = self._moments(torch.stack([first - second, first + second]))
            below, above = zip(*both, strict=True)
            parts = [(below, alpha.conj(), beta.conj()), (above, alpha, beta)]
        total = None
        for moments, other_alpha, other_beta in parts:
            m0, m1, m2 = (m[..., :, None, :, None] for m in moments)
            a, b = alpha[..., :, :, None, None], beta[..., :, :, None, None]
            c, d = other_alpha[..., None, None, :, :], other_beta[..., None, None, :, :]
            part = a * c * m0 + (a * d + b * c) * m1 + b * d * m2
            total = part if total is None else total + part
        assert total is not None
        gram = total.real.reshape(*alpha.shape[:-2], num * width, num * width)
        return gram if self.analytic else 0.5 * gram

    def inner(
        self,
        data: Tensor,
        owner: Tensor,
        alpha: Tensor,
        beta: Tensor,
        frequency: Tensor,
    ) -> Tensor:
        """Inner products of the data with C vectors a component: ``(N, K, C)``."""
        z0, z1 = self._projections(data, owner, frequency, 2)
        value = alpha * z0.conj().unsqueeze(-1) + beta * z1.conj().unsqueeze(-1)
        return value.real

    def _projections(
        self, data: Tensor, owner: Tensor, frequency: Tensor, count: int
    ) -> list[Tensor]:
        """The first ``count`` of the sums Z_0 and Z_1 at frequencies ``(N, K)``."""
        many = len(data) == 1 and frequency.numel() >= _MANY and not self.analytic
        if many and data.device.type == "cpu" and frequency.isfinite().all():
            found = self._statistics(data[0], frequency).moments(frequency.numpy())
            return [torch.from_numpy(sums) for sums in found[:count]]
        records = 2 if self.analytic else 1
        lengths = [records * grid.num_samples for grid in self.grids]
        totals = [torch.zeros_like(frequency, dtype=torch.complex128)] * count
        for grid, record in zip(self.grids, data.split(lengths, -1), strict=True):
            fine = near_square_root(grid.num_samples)
            coarse = -(-grid.num_samples // fine)
            padding = coarse * fine - grid.num_samples
            record = record.double().unflatten(-1, (records, grid.num_samples))
            record = torch.nn.functional.pad(record, (0, padding))
            times = torch.arange(coarse * fine).to(frequency) / grid.rate
            times = times - self.reference_time
            step = frequency.unsqueeze(-1) / grid.rate
            j = _unit_circle(-step * torch.arange(fine).to(frequency))
            i = _unit_circle(
                -step * fine * torch.arange(coarse).to(frequency)
                + (frequency * self.reference_time).unsqueeze(-1)
            )
            inner = torch.cat([j.real, j.imag], -2).mT  # (N, fine, 2K)
            for p in range(count):
                values = record * times if p else record
                blocks = values.unflatten(-1, (coarse, fine))[owner]
                # (N, records, coarse, K)
                real, imag = (blocks @ inner.unsqueeze(1)).chunk(2, -1)
                shares = (torch.complex(real, imag).mT * i.unsqueeze(1)).sum(-1)
                totals[p] = totals[p] + shares[:, 0]
                if self.analytic:
                    totals[p] = totals[p] + 1j * shares[:, 1]
        return totals

    def _statistics(self, x: Tensor, frequency: Tensor) -> SineStatistics:
        """Tables of an observation, in a band about the frequencies."""
        cells = _BAND_STEP / self.grids[0].duration
        low, high = float(frequency.min()) / cells, float(frequency.max()) / cells
        band = max(0.0, math.floor(low) * cells), (math.floor(high) + 1) * cells
        return _tabulated(
            x.double().numpy().tobytes(), self.grids, band, self.reference_time
        )

    def _moments(self, frequency: Tensor, count: int = 3) -> list[Tensor]:
        """The first ``count`` of the sums M_0, M_1 and M_2."""
        total = [torch.zeros_like(frequency, dtype=torch.complex128)] * count
        for grid in self.grids:
            middle = 0.5 * (grid.num_samples - 1) / grid.rate - self.reference_time
            centred = _centred_moments(frequency, grid, count)
            turn = _unit_circle(frequency * middle)
            for p in range(count):
                # (s + middle)^p, expanded
                shares = [
                    math.comb(p, q) * middle ** (p - q) * centred[q]
                    for q in range(p + 1)
                ]
                total[p] = total[p] + turn * torch.stack(shares).sum(0)
        return total


@lru_cache(maxsize=4)  # a fit asks for the same tables at every step
def _tabulated(
    data: bytes,
    grids: tuple[Grid, ...],
    band: tuple[float, float],
    reference_time: float,
) -> SineStatistics:
    statistics = SineStatistics.of(np.frombuffer(data), grids, band)
    return replace(statistics, reference_time=reference_time)


def _peak(grid: Tensor, power: Tensor) -> Tensor:
    """Where the power ``(N, K, G)`` is largest, between grid points by a parabola."""
    best = power.argmax(-1, keepdim=True).clamp(1, power.shape[-1] - 2)
    left, middle, right = (power.gather(-1, best + i).squeeze(-1) for i in (-1, 0, 1))
    bend = (2 * middle - left - right).clamp(min=1e-300)
    shift = (0.5 * (right - left) / bend).nan_to_num().clamp(-1.0, 1.0)
    step = grid[..., 1] - grid[..., 0]
    return grid.gather(-1, best).squeeze(-1) + shift * step


def _centred_moments(frequency: Tensor, grid: Grid, count: int) -> list[Tensor]:
    """Sums of s^p exp(2 pi i f s), p < count, over a grid whose middle is s = 0.

    The Dirichlet kernel D = sin(pi f N dt) / sin(pi f dt) and its derivatives: M_0 = D,
    M_1 = D' / (2 pi i), M_2 = -D'' / (2 pi)^2.
    """
    num, dt = grid.num_samples, 1 / grid.rate
    # A sampling rate more changes the sign at most.
    turns = (frequency * dt).round()
    frequency = frequency - turns / dt
    sign = 1 - 2 * ((num - 1) * turns % 2)
    x = math.pi * frequency * dt
    near = (x * num).abs() < _SERIES_LIMIT
    x = torch.where(near, torch.ones_like(x), x)
    sin, top = x.sin(), (num * x).sin()
    kernel = top / sin
    values = [kernel.to(torch.complex128)]
    if count > 1:
        cotangent = x.cos() / sin
        slope = num * (num * x).cos() / sin - kernel * cotangent
        values.append(-0.5j * dt * slope)
        curve = kernel - num**2 * kernel - 2 * cotangent * slope
        values.append((-0.25 * dt**2 * curve).to(torch.complex128))
    if near.any():
        series = _series(_TWO_PI * frequency[near], grid, count)
        values = [
            v.masked_scatter(near, s) for v, s in zip(values, series, strict=True)
        ]
    return [sign * value for value in values]


def _series(angle: Tensor, grid: Grid, count: int) -> list[Tensor]:
    """As :func:`_centred_moments`, as a power series in ``angle`` = 2 pi f."""
    base = (angle * grid.duration).unsqueeze(-1)  # near one
    factors = angle.new_tensor(_series_factors(grid, count))
    even = torch.ones(len(angle), (_SERIES_TERMS + 1) // 2).to(angle)
    even[:, 1:] = base.square()
    even = even.cumprod(-1)
    # Even terms are real, odd ones imaginary: i^m with its sign in the factors.
    odd = base * even[:, : _SERIES_TERMS // 2]
    real, imag = even @ factors[::2], odd @ factors[1::2]
    return list(torch.complex(real, imag).unbind(-1))


@lru_cache(maxsize=32)
def _series_factors(grid: Grid, count: int) -> tuple[tuple[float, ...], ...]:
    """Factors (terms, count) of powers of 2 pi f times the record's length."""
    num, dt = grid.num_samples, 1 / grid.rate
    s = (torch.arange(num, dtype=torch.float64) - 0.5 * (num - 1)) * dt
    return tuple(
        tuple(
            # Odd moments vanish.
            (-1) ** (m // 2)
            * s.pow(m + p).sum().item()
            * ((m + p) % 2 == 0)
            / (math.factorial(m) * grid.duration**m)
            for p in range(count)
        )
        for m in range(_SERIES_TERMS)
    )


def _unit_circle(turns: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(turns), _TWO_PI * turns)
