r"""Sums of complex exponentials over time grids, in closed form.

.. math::
    M_p(f) = \sum_n \tau_n^p\, e^{2\pi i f \tau_n}, \qquad \tau_n = t_n - t_0,

follow from the Dirichlet kernel :math:`D(x) = \sin N x / \sin x` of each record,
x = pi f dt, and its derivatives. They are the inner products of sinusoids with each
other. Arithmetic is float64.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .grid import Grid

__all__ = ["dirichlet", "moments", "unit_circle"]

_TWO_PI = 2 * math.pi
# Up to x N = pi f T the power series, beyond it the closed forms: both to 1e-10.
_SERIES_LIMIT = 2.0
_SERIES_TERMS = 24


def moments(
    grids: Sequence[Grid], reference_time: float, frequency: Tensor, count: int = 3
) -> list[Tensor]:
    """The first ``count`` of the sums M_0, M_1 and M_2.

    Args:
        grids: Time grids over which is summed.
        reference_time: Time t_0.
        frequency: Frequencies of any shape, float64.
        count: How many, at most three.

    Returns:
        Complex sums of that shape.
    """
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
