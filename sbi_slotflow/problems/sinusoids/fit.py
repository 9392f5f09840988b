r"""Least squares of sinusoids: residuals, gradients and Gauss-Newton curvature.

About a reference time t_0 a component, and each of its derivatives, has the form

.. math::
    \mathrm{Re}\,[(\alpha + \beta \tau)\, e^{2\pi i f \tau}], \qquad \tau = t - t_0,

so that all inner products, and with the data's energy the likelihood, follow from

.. math::
    M_p(f) = \sum_n \tau_n^p\, e^{2\pi i f \tau_n}, \qquad
    Z_p(f) = \sum_n x_n \tau_n^p\, e^{-2\pi i f \tau_n} .

M has a closed form (:mod:`.grid`). Z is evaluated on the time grid split in two, or, by
:class:`SineStatistics`, read from tables: no Jacobian of the length of the record is
ever built. Arithmetic is float64.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import zoom_fft
from torch import Tensor

from ...nn.gauss_newton import NormalEquations
from ...nn.spec import register
from ...sets.layout import ThetaLayout
from ..simulator import WhiteNoise
from .grid import Grid, SineSignal, dirichlet, moments, near_square_root, unit_circle

__all__ = ["Complexes", "Floats", "SineFit", "SineLeastSquares", "SineStatistics"]

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]

_TWO_PI = 2 * math.pi
_SEARCH_POINTS = 7
_SEARCH_ROUNDS = 3
# Frequencies of one observation above which it pays to tabulate its sums, and the
# resolution elements to which their band is rounded.
_MANY, _BAND_STEP = 1_000, 10
# Table points for each resolution element; the relative error of c is about
# (pi / n)^4 / 384, 4e-12: at sigma = 0.001 the likelihood is still good to 0.03 nats.
_OVERSAMPLING = 512


@dataclass(frozen=True)
class SineStatistics:
    r"""Sufficient statistics of one observation: its energy and tables of Z_0.

    A component is :math:`a \cos 2\pi f \tau + b \sin 2\pi f \tau`. Each record's share
    of Z_0, about the record's own middle, is tabulated once on a grid far finer than
    the resolution, with its derivative, and read by cubic Hermite interpolation. So a
    likelihood costs the same however long the record is.

    Attributes:
        grids: Time grids of the records.
        reference_time: Time t_0.
        energy: Sum of the squared data.
        starts: First frequency of each record's table.
        steps: Its step.
        values: Each record's Z_0 about its own middle, zero-padded to one length,
            shape ``(records, points)``.
        slopes: Derivatives of the values times the step, same shape.
    """

    grids: tuple[Grid, ...]
    reference_time: float
    energy: float
    starts: Floats
    steps: Floats
    values: Complexes
    slopes: Complexes

    @classmethod
    def of(
        cls, x: Floats, grids: tuple[Grid, ...], band: tuple[float, float]
    ) -> "SineStatistics":
        """Tabulate the statistics of an observation ``(T,)`` in a band of frequencies.

        Raises:
            ValueError: If x has the wrong length.
        """
        x = np.asarray(x, dtype=np.float64)
        lengths = [grid.num_samples for grid in grids]
        if x.shape != (sum(lengths),):
            raise ValueError(
                f"x must have shape ({sum(lengths)},), got {tuple(x.shape)}."
            )
        records = zip(np.split(x, np.cumsum(lengths)[:-1]), grids, strict=True)
        tables = [_table(record, grid, band) for record, grid in records]
        starts, steps, values, slopes = zip(*tables, strict=True)
        most = max(len(row) for row in values)
        values, slopes = (
            np.stack([np.pad(row, (0, most - len(row))) for row in rows])
            for rows in (values, slopes)
        )
        energy, ends = float(x @ x), (np.array(starts), np.array(steps))
        return cls(grids, 0.5 * grids[0].duration, energy, *ends, values, slopes)

    @property
    def num_data(self) -> int:
        """Number T of samples."""
        return sum(grid.num_samples for grid in self.grids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Samples of each record."""
        return np.array([grid.num_samples for grid in self.grids], dtype=np.int64)

    @property
    def intervals(self) -> Floats:
        """Time between samples of each record."""
        return np.array([1 / grid.rate for grid in self.grids])

    @property
    def offsets(self) -> Floats:
        """Middle of each record less the reference time."""
        return np.array([grid.middle for grid in self.grids]) - self.reference_time

    def projections(self, frequency: Floats) -> Floats:
        """Inner products ``(..., 2)`` of the data with cosines and sines."""
        total = self.moments(frequency)[0]
        return np.stack([total.real, -total.imag], axis=-1)

    def moments(self, frequency: Floats) -> tuple[Complexes, Complexes]:
        """The sums Z_0 and Z_1 at frequencies in the band."""
        zeroth = np.zeros(np.shape(frequency), dtype=np.complex128)
        first = np.zeros_like(zeroth)
        tables = zip(
            self.starts, self.steps, self.offsets, self.values, self.slopes, strict=True
        )
        for start, step, offset, values, slopes in tables:
            position = (np.asarray(frequency) - start) / step
            left = np.clip(position.astype(np.int64), 0, len(values) - 2)
            u = position - left
            v = 1 - u
            low, high, rise = values[left], values[left + 1], slopes[left]
            fall = slopes[left + 1]
            share = v * v * ((1 + 2 * u) * low + u * rise)
            share += u * u * ((1 + 2 * v) * high - v * fall)
            slope = 6 * u * v * (high - low) + v * (v - 2 * u) * rise
            slope += u * (u - 2 * v) * fall
            turn = np.exp(-2j * math.pi * offset * frequency)
            zeroth += share * turn
            # About the record's own middle the first moment is the slope of c.
            first += turn * (offset * share + slope * (0.5j / (math.pi * step)))
        return zeroth, first

    def gram(self, rows: Floats, columns: Floats) -> Floats:
        """Inner products ``(..., 2J, 2K)`` of cos 1, sin 1, cos 2, ... of frequencies.

        These are ``rows``, shape ``(..., J)``, and ``columns``, shape ``(..., K)``.
        """
        first, second = rows[..., :, None], columns[..., None, :]
        sums: list[Complexes] = [
            moments(self.grids, self.reference_time, _tensor(f), 1)[0].numpy()
            for f in (first - second, first + second)
        ]
        below, above = sums
        blocks = np.empty((*below.shape, 2, 2))
        blocks[..., 0, 0] = below.real + above.real
        blocks[..., 1, 1] = below.real - above.real
        blocks[..., 0, 1] = above.imag - below.imag
        blocks[..., 1, 0] = above.imag + below.imag
        shape = (*below.shape[:-2], 2 * rows.shape[-1], 2 * columns.shape[-1])
        return 0.5 * np.swapaxes(blocks, -3, -2).reshape(shape)

    def log_likelihood(self, components: Floats, sigma: Floats) -> Floats:
        """Evaluate log p(x | theta) of (A, phi, f) ``(..., K, 3)`` and sigma ``(...)``.

        A component that is not there has A = 0.
        """
        amplitudes = self.linear_amplitudes(components)
        frequency = components[..., 2]
        inner = (self.projections(frequency) * amplitudes).sum((-2, -1))
        residual = self.energy - 2 * inner + self._signal_energy(amplitudes, frequency)
        norm = self.num_data * (np.log(sigma) + 0.5 * math.log(2 * math.pi))
        return -norm - 0.5 * residual / sigma**2

    def log_likelihood_of(
        self, theta: Tensor, layout: ThetaLayout, noise: WhiteNoise
    ) -> Tensor:
        """Evaluate log p(x | theta) of rows ``(..., E)``; -inf where sigma is zero."""
        parts = layout.unpack(theta.double().cpu())
        most = int(parts.mask.sum(-1).max()) if parts.mask.numel() else 0
        components = torch.where(parts.mask.unsqueeze(-1), parts.components, 0.0)
        sigma = noise.scale(parts.shared)
        found = self.log_likelihood(components[..., :most, :].numpy(), sigma.numpy())
        values = torch.where(sigma > 0, torch.from_numpy(np.asarray(found)), -math.inf)
        return values.to(theta.device)

    def linear_amplitudes(self, components: Floats) -> Floats:
        """Map (A, phi, f) ``(..., 3)`` to the amplitudes (a, b) ``(..., 2)``."""
        amplitude, phase, frequency = np.moveaxis(components, -1, 0)
        angle = phase + 2 * math.pi * self.reference_time * frequency
        return np.stack([amplitude * np.cos(angle), -amplitude * np.sin(angle)], -1)

    def components(self, amplitudes: Floats, frequency: Floats) -> Floats:
        """Map (a, b) ``(..., 2)`` and f ``(...)`` to (A, phi, f) ``(..., 3)``."""
        a, b = np.moveaxis(amplitudes, -1, 0)
        angle = np.arctan2(-b, a) - 2 * math.pi * self.reference_time * frequency
        return np.stack([np.hypot(a, b), angle % (2 * math.pi), frequency], -1)

    def _signal_energy(self, amplitudes: Floats, frequency: Floats) -> Floats:
        """Sum of the squared signal of amplitudes ``(..., K, 2)``, shape ``(...)``.

        About a record's own middle cosines are orthogonal to sines, so that pairs of
        components need real kernels alone.
        """
        num = frequency.shape[-1]
        first, second = np.triu_indices(num)
        twice = np.where(first == second, 0.5, 1.0)  # pairs stand for (j, k) and (k, j)
        below = frequency[..., first] - frequency[..., second]
        above = frequency[..., first] + frequency[..., second]
        a, b = np.moveaxis(amplitudes, -1, 0)
        total = np.zeros(frequency.shape[:-1])
        records = zip(self.lengths, self.intervals, self.offsets, strict=True)
        for length, interval, offset in records:
            angle = 2 * math.pi * offset * frequency
            cos, sin = np.cos(angle), np.sin(angle)
            even, odd = a * cos + b * sin, b * cos - a * sin
            even = even[..., first] * even[..., second] * twice
            odd = odd[..., first] * odd[..., second] * twice
            total += ((even + odd) * _kernel(below, length, interval)).sum(-1)
            total += ((even - odd) * _kernel(above, length, interval)).sum(-1)
        return total


@register("fit")
@dataclass(frozen=True)
class SineFit:
    """Normal equations of K sinusoids (A, phi, f) in white noise.

    Complex exponentials lack the conjugate's share of each inner product.

    Attributes:
        grids: Time grids of the records.
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
        return {
            "kind": self.kind,
            "grids": [[grid.duration, grid.rate] for grid in self.grids],
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
        """Inner products ``(N, K C, K C)`` of C vectors a component with each other.

        Frequencies are ``(N, K)``, alpha and beta ``(N, K, C)``; beta is zero if None.
        """
        size, count = alpha[0].numel(), 1 if beta is None else 3
        first, second = frequency.unsqueeze(-1), frequency.unsqueeze(-2)
        total: Tensor | float = 0.0
        gaps = [first - second] if self.analytic else [first - second, first + second]
        sums = self.moments(torch.stack(gaps), count)
        for above, each in zip((False, True), zip(*sums, strict=True), strict=False):
            m = [m[..., :, None, :, None] for m in each]
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
    """Least squares of given observations ``(B, T)``.

    Sums of a single observation are tabulated once it pays, see
    :class:`SineStatistics`; the tables cover the frequencies that were asked for.
    """

    variance: float | None = None  # it is inferred with the components
    counts: Tensor | None = None

    def __init__(self, fit: SineFit, data: Tensor) -> None:
        self.fit, self.data = fit, data
        self._tables: tuple[tuple[float, float], SineStatistics] | None = None

    def start(self, owner: Tensor, low: Tensor, high: Tensor, mask: Tensor) -> Tensor:
        """Estimate components with frequencies in given intervals.

        Amplitudes by ridge regression, frequencies by a search of intervals, in turns.
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


def _kernel(frequency: Floats, length: int, interval: float) -> Floats:
    """The sum M_0 of one record about its own middle, which is real."""
    return dirichlet(_tensor(math.pi * interval * frequency), length).numpy()


def _tensor(values: Floats) -> Tensor:
    # torch's sines are several times faster than NumPy's
    return torch.from_numpy(np.asarray(values))


def _table(
    x: Floats, grid: Grid, band: tuple[float, float]
) -> tuple[float, float, Complexes, Complexes]:
    """Start and step of a table of one record's Z_0, its values and slopes."""
    step = grid.rate / (grid.num_samples * _OVERSAMPLING)
    first = max(0, math.floor(band[0] / step) - 1)
    last = math.ceil(band[1] / step) + 1
    times = grid.times.numpy() - grid.middle
    bins = np.arange(first, last + 1)
    turn = np.exp(2j * math.pi * bins * step * grid.middle)

    def transform(values: Floats) -> Complexes:
        ends = first * step / grid.rate, (last + 1) * step / grid.rate
        # Frequencies in units of the sampling rate.
        return np.asarray(zoom_fft(values, ends, len(bins), fs=1)) * turn

    return first * step, step, transform(x), -2j * math.pi * step * transform(x * times)
