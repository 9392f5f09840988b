r"""Invertible steps and their composition.

A step maps x to y, with :math:`\log |\mathrm{d}y / \mathrm{d}x|` beside it. Steps on
numbers act on tensors of any shape and give one log-derivative a number; steps on
vectors act on the last axis, and give one log-determinant a vector. A composition sums
them.

========================  ==========================================================
on numbers                :class:`Affine`, :class:`Logarithm`, :class:`Logit`,
                          :class:`StraightTails`, :class:`Table`, :class:`Bend`,
                          :class:`Cut`
on vectors                :class:`Columns`, :class:`LowerTriangular`,
                          :class:`Permutation`, :class:`Shear`, :class:`Polar`
both                      :class:`Compose`
========================  ==========================================================

Example:
    >>> step = Compose([Logarithm(0.0), Affine(0.0, 2.0)])
    >>> y, log_det = step.forward(torch.tensor([1.0, 4.0]))
    >>> y
    tensor([0.0000, 0.6931])
    >>> step.inverse(y)
    tensor([1., 4.])

See Also:
    :mod:`~sbi_slotflow.sets.marginals`, the map that a prior has, and the steps
    ``NormalScore``, ``ExponentialScore`` and ``Place`` by a distribution function.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Affine",
    "Bend",
    "Columns",
    "Compose",
    "Cut",
    "Logarithm",
    "Logit",
    "LowerTriangular",
    "Permutation",
    "Polar",
    "Shear",
    "StraightTails",
    "Table",
    "Transform",
    "log_normal",
    "solve_lower",
]

# Least share of a normal variable that a cut looks at, and least mass of its interval.
_LEAST_SHARE, _LEAST_MASS = 1e-30, 1e-300


class Transform(ABC):
    """An invertible map."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x to y of the same shape; beside it the log-Jacobians, see the module."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""


# Steps on numbers


@dataclass(frozen=True)
class Affine(Transform):
    """y = (x - location) / scale, with a positive scale; y = x by default."""

    location: float = 0.0
    scale: float = 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        y = (x - self.location) / self.scale
        return y, torch.full_like(y, -math.log(self.scale))

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        return self.location + self.scale * y


@dataclass(frozen=True)
class Logarithm(Transform):
    """y = log(x - bound), or y = -log(bound - x) below an upper bound."""

    bound: float
    upper: bool = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        y = (self.bound - x if self.upper else x - self.bound).log()
        return (-y if self.upper else y), -y

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        return self.bound - torch.exp(-y) if self.upper else self.bound + torch.exp(y)


@dataclass(frozen=True)
class Logit(Transform):
    """y = log((x - low) / (high - x))."""

    low: float
    high: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        below, above = (x - self.low).log(), (self.high - x).log()
        return below - above, math.log(self.high - self.low) - below - above

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x, from the nearer end."""
        width = self.high - self.low
        near = width * torch.sigmoid(-y.abs())
        return torch.where(y < 0, self.low + near, self.high - near)


class StraightTails(Transform):
    r"""An increasing step T with the tails of another, O, where T loses its digits.

    :math:`y = T(x)` between the ends y_1 and y_2 and
    :math:`y_i + s_i\,(O(x) - O(x_i))` beyond, with :math:`s_i` such that y has a
    continuous slope.
    """

    def __init__(
        self, inner: Transform, outer: Transform, ends: tuple[float, float]
    ) -> None:
        self.inner, self.outer = inner, outer
        x = inner.inverse(torch.tensor(ends, dtype=torch.float64))
        y, log_slope = inner.forward(x)
        w, other = outer.forward(x)
        log_slope = log_slope - other
        if not torch.stack([x, y, w, log_slope]).isfinite().all():
            raise ValueError(f"the steps must be finite at their ends {ends}.")
        self._x, self._y, self._w = x.tolist(), y.tolist(), w.tolist()
        self._log_slope, self._slope = log_slope.tolist(), log_slope.exp().tolist()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        y, log_det = self.inner.forward(x.clamp(*self._x))
        for i, beyond in enumerate((x < self._x[0], x > self._x[1])):
            w, log_slope = self.outer.forward(torch.where(beyond, x, self._x[i]))
            far = self._y[i] + self._slope[i] * (w - self._w[i])
            y = torch.where(beyond, far, y)
            log_det = torch.where(beyond, self._log_slope[i] + log_slope, log_det)
        return y, log_det

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        x = self.inner.inverse(y.clamp(*self._y))
        for i, beyond in enumerate((y < self._y[0], y > self._y[1])):
            w = self._w[i] + (y - self._y[i]) / self._slope[i]
            x = torch.where(beyond, self.outer.inverse(w), x)
        return x


class Table(Transform):
    r"""An increasing step through points with slopes, straight beyond the last ones.

    Between two points it is the quotient of two quadratics (Gregory and Delbourgo
    1982), which increases whatever the slopes are, and has an inverse in closed form.

    Args:
        knots: Rows ``(M, 3)`` of x, y and the log-slope there, x and y increasing.
    """

    def __init__(self, knots: Sequence[Sequence[float]]) -> None:
        table = torch.tensor(knots, dtype=torch.float64)
        self._x, self._y, log_slope = (part.contiguous() for part in table.unbind(-1))
        if not ((self._x.diff() > 0).all() and (self._y.diff() > 0).all()):
            raise ValueError("knots must increase in x and in y.")
        self._log_slope, self._slope = log_slope, log_slope.exp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        wide = x.double()
        x0, y0, width, height, left, right = self._between(wide, self._x)
        t = ((wide - x0) / width).clamp(0.0, 1.0)
        mean, both = height / width, t * (1 - t)
        below = mean + (left + right - 2 * mean) * both
        y = y0 + height * (mean * t.square() + left * both) / below
        slope = right * t.square() + 2 * mean * both + left * (1 - t).square()
        log_det = 2 * (mean.log() - below.log()) + slope.log()
        for end, out in ((0, wide < self._x[0]), (-1, wide > self._x[-1])):
            at, up, log_slope = (
                part[end].to(wide) for part in (self._x, self._y, self._log_slope)
            )
            y = torch.where(out, up + (wide - at) * log_slope.exp(), y)
            log_det = torch.where(out, log_slope, log_det)
        return y.to(x), log_det.to(x)

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        wide = y.double()
        x0, y0, width, height, left, right = self._between(wide, self._y)
        mean = height / width
        rise = (wide - y0).clamp(min=0.0).minimum(height)
        bent = rise * (left + right - 2 * mean)
        a = height * (mean - left) + bent
        b = height * left - bent
        c = -mean * rise
        root = (b.square() - 4 * a * c).clamp(min=0.0).sqrt()
        x = x0 + width * (2 * c / (-b - root)).clamp(0.0, 1.0)
        for end, out in ((0, wide < self._y[0]), (-1, wide > self._y[-1])):
            at, up, slope = (
                part[end].to(wide) for part in (self._x, self._y, self._slope)
            )
            x = torch.where(out, at + (wide - up) / slope, x)
        return x.to(y)

    def _between(self, value: Tensor, points: Tensor) -> tuple[Tensor, ...]:
        """Of each value's interval: x, y, width, height, slopes at both ends."""
        place = torch.searchsorted(
            points.to(value.device), value.detach().contiguous(), right=True
        )
        place = (place - 1).clamp(0, len(points) - 2)
        x, y, slope = (
            part.to(value.device) for part in (self._x, self._y, self._slope)
        )
        start = x[place], y[place]
        size = x[place + 1] - start[0], y[place + 1] - start[1]
        return (*start, *size, slope[place], slope[place + 1])


@dataclass(frozen=True)
class Bend(Transform):
    """y = x for abs(x) <= b, and y = sgn(x) (b + log(1 + abs(x) - b)) beyond."""

    start: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        beyond = (x.abs() - self.start).clamp(min=0.0)
        growth = beyond.log1p()
        bent = x.sign() * (self.start + growth)
        return torch.where(beyond > 0, bent, x), -growth

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        beyond = (y.abs() - self.start).clamp(min=0.0)
        return torch.where(beyond > 0, y.sign() * (self.start + beyond.expm1()), y)


class Cut(Transform):
    r"""A normal variable that is cut off at two ends, as a normal one.

    .. math::
        y = \Phi^{-1}\left(
            \frac{\Phi(x) - \Phi(\alpha)}{\Phi(\beta) - \Phi(\alpha)} \right)

    alpha (``low``) and beta (``high``) have shapes that broadcast with that of x.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high
        # Worked in the tail where the interval lies, so that shares keep their digits.
        flip = torch.where(low + high > 0, -1.0, 1.0).to(low)
        share = _ndtr(flip * high) - _ndtr(flip * low)
        self._mass = share.abs().clamp(min=_LEAST_MASS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        # Likewise on x's side of zero.
        flip = torch.where(x > 0, -1.0, 1.0).to(x)
        here, low, high = (_ndtr(flip * end) for end in (x, self.low, self.high))
        below, above = ((share - here).abs() / self._mass for share in (low, high))
        nearer = torch.minimum(below, above).clamp(_LEAST_SHARE, 0.5)
        y = torch.special.ndtri(nearer)
        y = torch.where(below < above, y, -y)
        return y, 0.5 * (y.square() - x.square()) - self._mass.log()

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        below = _ndtr(self.low) + self._mass * _ndtr(y)
        above = _ndtr(-self.high) + self._mass * _ndtr(-y)
        nearer = torch.special.ndtri(torch.minimum(below, above))
        x = torch.where(below < above, nearer, -nearer)
        return torch.minimum(torch.maximum(x, self.low), self.high)


# Steps on vectors


class Columns(Transform):
    """Each number of a vector by a step of its own."""

    def __init__(self, steps: Sequence[Transform]) -> None:
        self.steps = tuple(steps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        columns = zip(self.steps, x.unbind(-1), strict=True)
        pairs = [step.forward(column) for step, column in columns]
        y, log_det = (torch.stack(part, -1) for part in zip(*pairs, strict=True))
        return y, log_det.sum(-1)

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        columns = zip(self.steps, y.unbind(-1), strict=True)
        return torch.stack([step.inverse(column) for step, column in columns], -1)


class LowerTriangular(Transform):
    """y = C^-1 (x - m), with C lower triangular and its diagonal positive.

    m has the shape ``(D,)`` or ``(N, D)``, C ``(D, D)`` or ``(N, D, D)``.
    """

    def __init__(self, location: Tensor, factor: Tensor) -> None:
        self.location, self.factor = location, factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        y = solve_lower(self.factor.to(x), x - self.location.to(x))
        log_det = -self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return y, log_det.to(x).expand(x.shape[:-1])

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        return self.location.to(y) + (self.factor.to(y) @ y.unsqueeze(-1)).squeeze(-1)


class Permutation(Transform):
    """The numbers of a vector in another order: number d of y is x[order[d]]."""

    def __init__(self, order: Sequence[int]) -> None:
        self.order = list(order)
        self._back = [self.order.index(d) for d in range(len(self.order))]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        return x[..., self.order], torch.zeros_like(x[..., 0])

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        return y[..., self._back]


@dataclass(frozen=True)
class Shear(Transform):
    """y[column] = x[column] + rate * x[by], the other numbers as they are.

    If it is circular, with a finite ``period``, both lie in one turn from ``low`` on.
    """

    column: int
    by: int
    rate: float
    period: float = math.inf
    low: float = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        return self._moved(x, self.rate * x[..., self.by]), torch.zeros_like(x[..., 0])

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        return self._moved(y, -self.rate * y[..., self.by])

    def _moved(self, x: Tensor, shift: Tensor) -> Tensor:
        columns = list(x.unbind(-1))
        columns[self.column] = columns[self.column] + shift
        if math.isfinite(self.period):
            turned = (columns[self.column] - self.low) % self.period
            columns[self.column] = self.low + turned
        return torch.stack(columns, -1)


@dataclass(frozen=True)
class Polar(Transform):
    r"""A pair (h, psi) as the point :math:`\sqrt{2h}\,(\cos\psi, \sin\psi)`.

    It has unit Jacobian. If h is unit exponential and psi uniform on a whole turn, the
    point is standard normal (Box and Muller 1958). psi comes back in [-pi, pi].
    """

    half_square: int
    angle: int

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        columns = list(x.unbind(-1))
        r = (2 * columns[self.half_square]).sqrt()
        psi = columns[self.angle]
        columns[self.half_square], columns[self.angle] = r * psi.cos(), r * psi.sin()
        return torch.stack(columns, -1), torch.zeros_like(r)

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        columns = list(y.unbind(-1))
        a, b = columns[self.half_square], columns[self.angle]
        columns[self.half_square] = 0.5 * (a.square() + b.square())
        columns[self.angle] = torch.atan2(b, a)
        return torch.stack(columns, -1)


class Compose(Transform):
    """Steps one after the other, all on numbers or all on vectors."""

    def __init__(self, steps: Sequence[Transform]) -> None:
        self.steps = tuple(steps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        x, total = self.steps[0].forward(x)
        for step in self.steps[1:]:
            x, log_det = step.forward(x)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        for step in reversed(self.steps):
            y = step.inverse(y)
        return y


def solve_lower(factor: Tensor, values: Tensor) -> Tensor:
    """Solve C z = v for lower triangular C ``(..., D, D)``, v ``(..., D)``."""
    return torch.linalg.solve_triangular(
        factor, values.unsqueeze(-1), upper=False
    ).squeeze(-1)


def log_normal(u: Tensor) -> Tensor:
    """Log density of a standard normal variable."""
    return -0.5 * u.square() - 0.5 * math.log(2 * math.pi)


def _ndtr(z: Tensor) -> Tensor:
    """Share of a normal variable below z; torch's own is zero below -8.3."""
    return 0.5 * torch.special.erfc(-math.sqrt(0.5) * z)
