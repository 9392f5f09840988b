r"""Sums of sinusoids, and over time, on regular time grids: fast and accurate.

A sample at time :math:`t = (i M + j)\,\Delta` splits into a coarse and a fine step, and

.. math::
    A \cos(\omega t + \phi) = \mathrm{Re}\, \left[ A e^{i(\omega i M \Delta + \phi)}
        \cdot e^{i \omega j \Delta} \right]

turns the T samples of K sinusoids into a product of an (T/M, 2K) and a (2K, M) matrix:
about :math:`2\sqrt{T}` sines a component instead of T. Angles are reduced to one turn
in float64 before the sine is taken, so the error stays near float32 rounding however
long the record is.

Inner products of sinusoids with each other follow from

.. math::
    M_p(f) = \sum_n \tau_n^p\, e^{2\pi i f \tau_n}, \qquad \tau_n = t_n - t_0,

which has a closed form in the Dirichlet kernel :math:`D(x) = \sin N x / \sin x` of
each record, x = pi f dt, and its derivatives.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...nn.spec import register

__all__ = [
    "Grid",
    "SineSignal",
    "dirichlet",
    "moments",
    "near_square_root",
    "unit_circle",
]

_TWO_PI = 2 * math.pi
# Up to x N = pi f T the power series, beyond it the closed forms: both to 1e-10.
_SERIES_LIMIT = 2.0
_SERIES_TERMS = 24


@dataclass(frozen=True)
class Grid:
    """A regular time grid that starts at 0 and leaves out its end.

    Attributes:
        duration: Length of the record in seconds.
        rate: Samples per second.

    Raises:
        ValueError: If either is not positive and finite, or there is no sample.
    """

    duration: float
    rate: float

    def __post_init__(self) -> None:
        for name in ("duration", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be positive and finite, got {getattr(self, name)}."
                )
        if not self.num_samples:
            raise ValueError(f"duration times rate must be at least 1, got {self}.")

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return round(self.duration * self.rate)

    @property
    def times(self) -> Tensor:
        """Sample times in seconds, float64, shape ``(num_samples,)``."""
        return torch.arange(self.num_samples, dtype=torch.float64) / self.rate

    @property
    def middle(self) -> float:
        """Middle of the first and the last sample time in seconds."""
        return 0.5 * (self.num_samples - 1) / self.rate


@register("signal")
@dataclass(frozen=True)
class SineSignal:
    """Signals A cos(2 pi f t + phi) of components (A, phi, f) on several grids.

    The grids' samples are concatenated in order.

    Attributes:
        grids: Time grids.
        analytic: Whether signals are A exp i(2 pi f t + phi); each grid then gives its
            real parts, then its imaginary ones.
    """

    grids: tuple[Grid, ...]
    analytic: bool = False

    kind: ClassVar[str] = "sinusoids"

    @property
    def spec(self) -> dict[str, Any]:
        """Description for :meth:`from_spec`."""
        grids = [[grid.duration, grid.rate] for grid in self.grids]
        return {"kind": self.kind, "grids": grids, "analytic": self.analytic}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "SineSignal":
        """Rebuild a signal from :attr:`spec`."""
        return cls(tuple(Grid(*grid) for grid in spec["grids"]), spec["analytic"])

    @property
    def num_samples(self) -> int:
        """Length T of a signal, the grids' samples together."""
        num = sum(grid.num_samples for grid in self.grids)
        return 2 * num if self.analytic else num

    def __call__(self, components: Tensor) -> Tensor:
        """Signals ``(..., T)`` of components (A, phi, f) ``(..., 3)``."""
        flat = components.reshape(-1, 1, 3)
        mask = torch.ones(flat.shape[:2], dtype=torch.bool, device=flat.device)
        total = self.total(flat, mask)
        return total.reshape(*components.shape[:-1], self.num_samples)

    def total(self, components: Tensor, mask: Tensor) -> Tensor:
        """Sum ``(B, T)`` of the active components ``(B, Kmax, 3)``, in their dtype."""
        amplitude, phase, frequency = components.unbind(-1)
        amplitude = torch.where(mask, amplitude, amplitude.new_zeros(()))
        turns = phase.double() / (2 * math.pi)
        parts = [turns, turns - 0.25] if self.analytic else [turns]
        streams = [
            _on_grid(grid, amplitude, part, frequency.double())
            for grid in self.grids
            for part in parts
        ]
        return torch.cat(streams, dim=-1)


def _on_grid(grid: Grid, amplitude: Tensor, turns: Tensor, frequency: Tensor) -> Tensor:
    num = grid.num_samples
    fine = near_square_root(num)
    coarse = -(-num // fine)
    step = (frequency / grid.rate).unsqueeze(-1)  # turns a sample, (B, K, 1)
    i = torch.arange(coarse, device=step.device, dtype=step.dtype) * fine
    j = torch.arange(fine, device=step.device, dtype=step.dtype)
    cos_i, sin_i = _cosine_and_sine(step * i + turns.unsqueeze(-1), amplitude.dtype)
    cos_j, sin_j = _cosine_and_sine(step * j, amplitude.dtype)
    amplitude = amplitude.unsqueeze(-1)
    left = torch.cat([amplitude * cos_i, -amplitude * sin_i], dim=1)  # (B, 2K, I)
    right = torch.cat([cos_j, sin_j], dim=1)  # (B, 2K, J)
    return torch.bmm(left.mT, right).flatten(1)[:, :num]


def near_square_root(num: int) -> int:
    """The largest divisor not above the root if it is near it, else the root."""
    root = max(1, math.isqrt(num))
    return next((d for d in range(root, root // 2, -1) if num % d == 0), root)


def _cosine_and_sine(turns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = ((turns - turns.round()) * (2 * math.pi)).to(dtype)
    return angle.cos(), angle.sin()


def moments(
    grids: Sequence[Grid], reference_time: float, frequency: Tensor, count: int = 3
) -> list[Tensor]:
    """The first ``count`` of the sums M_0, M_1 and M_2 at float64 frequencies."""
    total = [torch.zeros_like(frequency, dtype=torch.complex128)] * count
    for grid in grids:
        middle = grid.middle - reference_time
        centred = _centred(frequency, grid, count)
        turn = unit_circle(frequency * middle)
        for p in range(count):
            # (s + middle)^p, expanded
            shares = [
                math.comb(p, q) * middle ** (p - q) * centred[q] for q in range(p + 1)
            ]
            total[p] = total[p] + turn * torch.stack(shares).sum(0)
    return total


def dirichlet(x: Tensor, num: int) -> Tensor:
    """The kernel sin(N x) / sin(x), N at zero."""
    below = x.sin()
    level = below.abs() < 1e-13
    return torch.where(level, num, (num * x).sin() / torch.where(level, 1.0, below))


def unit_circle(turns: Tensor) -> Tensor:
    """Points exp(2 pi i turns) of the unit circle."""
    return torch.polar(torch.ones_like(turns), _TWO_PI * (turns - turns.round()))


def _centred(frequency: Tensor, grid: Grid, count: int) -> list[Tensor]:
    """Sums of s^p exp(2 pi i f s), p < count, over a grid whose middle is s = 0.

    M_0 = D, M_1 = D' / (2 pi i), M_2 = -D'' / (2 pi)^2.
    """
    num, dt = grid.num_samples, 1 / grid.rate
    # A sampling rate more changes the sign at most.
    turns = (frequency * dt).round()
    frequency = frequency - turns / dt
    sign = 1 - 2 * ((num - 1) * turns % 2)
    x = math.pi * frequency * dt
    if count == 1:
        return [(sign * dirichlet(x, num)).to(torch.complex128)]
    near = (x * num).abs() < _SERIES_LIMIT
    x = torch.where(near, torch.ones_like(x), x)
    sin, kernel = x.sin(), dirichlet(x, num)
    cotangent = x.cos() / sin
    slope = num * (num * x).cos() / sin - kernel * cotangent
    curve = kernel - num**2 * kernel - 2 * cotangent * slope
    values = [kernel.to(torch.complex128), -0.5j * dt * slope]
    values.append((-0.25 * dt**2 * curve).to(torch.complex128))
    if near.any():
        series = _series(_TWO_PI * frequency[near], grid)
        values = [
            v.masked_scatter(near, s) for v, s in zip(values, series, strict=True)
        ]
    return [sign * value for value in values[:count]]


def _series(angle: Tensor, grid: Grid) -> list[Tensor]:
    """As :func:`_centred`, as a power series in ``angle`` = 2 pi f."""
    base = (angle * grid.duration).unsqueeze(-1)  # near one
    factors = angle.new_tensor(_series_factors(grid))
    even = torch.ones(len(angle), (_SERIES_TERMS + 1) // 2).to(angle)
    even[:, 1:] = base.square()
    even = even.cumprod(-1)
    # Even terms are real, odd ones imaginary: i^m with its sign in the factors.
    odd = base * even[:, : _SERIES_TERMS // 2]
    real, imag = even @ factors[::2], odd @ factors[1::2]
    return list(torch.complex(real, imag).unbind(-1))


@lru_cache(maxsize=32)
def _series_factors(grid: Grid) -> tuple[tuple[float, ...], ...]:
    """Factors (terms, 3) of powers of 2 pi f times the record's length."""
    s = grid.times - grid.middle
    return tuple(
        tuple(
            # Odd moments vanish.
            (-1) ** (m // 2)
            * s.pow(m + p).sum().item()
            * ((m + p) % 2 == 0)
            / (math.factorial(m) * grid.duration**m)
            for p in range(3)
        )
        for m in range(_SERIES_TERMS)
    )
