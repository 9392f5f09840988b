r"""Coordinates of a component relative to its anchor.

.. math::
    w = \left( y - a - \tfrac12,\; \psi - \psi_0,\; v \ldots \right)

y is the position on the location axis (:mod:`.cells`) and a the anchor;
:math:`\psi = \phi + 2\pi f t_0` a phase, if there is one, referred to a time in the
middle of the record and unwrapped about a centre :math:`\psi_0`; v the other
parameters, scaled so that a bounded prior covers [-1, 1] (a half-normal one does with
four standard deviations) and a normal one has unit width. All are natural coordinates,
in which a likelihood is nearly Gaussian: the prior's bounds are left to the density
(:mod:`.local_density`), which cuts Gaussians off there. Arithmetic is float64.
"""

import math

import torch
from torch import Tensor

from .cells import CellAxis
from .charts import Chart

__all__ = ["LocalTransform", "wrapped"]

_TWO_PI = 2 * math.pi
# Fraction of a normal prior outside which positions are not followed; a bounded one is
# continued, so that a fit may end beyond the bound.
_INSIDE = 1e-9
# Standard deviations within which a fit looks for a normal parameter, and those that
# a half-normal one's coordinates in [-1, 1] cover.
_FARTHEST, _REACH = 6.0, 4.0
# Stands for infinity, which has no gradient.
_OPEN = 1e6


class LocalTransform:
    """Local coordinates (offset, phase if any, others) of components.

    Args:
        chart: The problem's chart; a :class:`PolarChart` tells which parameter is a
            phase.
        axis: The location axis.

    Attributes:
        has_phase: Whether the second coordinate is a phase.
    """

    def __init__(self, chart: Chart, axis: CellAxis) -> None:
        self.axis, self.marginals = axis, chart.marginals
        self._location = chart.marginals[axis.parameter]
        phase, self._reference_time = chart.phase, 0.0
        if chart.frequency == axis.parameter:
            self._reference_time = chart.reference_time
        self.has_phase = phase is not None
        first = [axis.parameter] if phase is None else [axis.parameter, phase]
        self._others = [d for d in range(len(self.marginals)) if d not in first]
        order = first + self._others
        self._back = [order.index(d) for d in range(len(order))]
        self._phase = phase

    @property
    def num_features(self) -> int:
        """Number D of coordinates."""
        return len(self.marginals)

    def coordinates(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to coordinates, the first a position, phases in [0, 2 pi).

        Args:
            components: Inside the support, shape ``(..., D)``.

        Returns:
            Coordinates ``(..., D)`` and log-Jacobians ``(...)``, float64.
        """
        values = components.double().unbind(-1)
        location = values[self.axis.parameter]
        cells = self.axis.num_cells
        columns = [cells * self._location.fraction(location)]
        log_det = self._location.log_density(location) + math.log(cells)
        if self._phase is not None:
            turn = _TWO_PI * self._reference_time * location
            columns.append((values[self._phase] + turn) % _TWO_PI)
        for d in self._others:
            middle, half = self._scale(d)
            columns.append((values[d] - middle) / half)
            log_det = log_det - math.log(half)
        return torch.stack(columns, -1), log_det

    def components(self, coordinates: Tensor) -> Tensor:
        """Inverse of :meth:`coordinates`; values may leave the support."""
        fraction = coordinates[..., 0] / self.axis.num_cells
        if self._location.family == "normal":
            fraction = fraction.clamp(_INSIDE, 1 - _INSIDE)
        location = self._location.quantile(fraction)
        columns, taken = [location], 1
        if self._phase is not None:
            turn = _TWO_PI * self._reference_time * location
            columns.append((coordinates[..., 1] - turn) % _TWO_PI)
            taken = 2
        for i, d in enumerate(self._others):
            middle, half = self._scale(d)
            columns.append(middle + half * coordinates[..., taken + i])
        return torch.stack([columns[i] for i in self._back], -1)

    def absolute(self, w: Tensor, anchors: Tensor, centre: Tensor) -> Tensor:
        """Coordinates with positions and whole phases, of those relative to anchors.

        Args:
            w: Coordinates relative to anchors and centres, shape ``(..., D)``.
            anchors: Anchors, shape ``(...)``.
            centre: Phases that phases are counted from, shape ``(...)``.
        """
        return self._shifted(w, anchors + 0.5, centre)

    def relative(self, w: Tensor, anchors: Tensor, centre: Tensor) -> Tensor:
        """Inverse of :meth:`absolute`; phases in [-pi, pi)."""
        w = self._shifted(w, -(anchors + 0.5), -centre)
        if self.has_phase:
            columns = list(w.unbind(-1))
            columns[1] = wrapped(columns[1])
            w = torch.stack(columns, -1)
        return w

    def _shifted(self, w: Tensor, offset: Tensor, phase: Tensor) -> Tensor:
        columns = list(w.unbind(-1))
        columns[0] = columns[0] + offset
        if self.has_phase:
            columns[1] = columns[1] + phase
        return torch.stack(columns, -1)

    def log_prior(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Log prior densities ``(...)`` of local coordinates, and their gradients.

        But for a constant; positions and phases are uniform. Values beyond a
        parameter's support count as at its end.
        """
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            values = 0.0 * w[..., 0]  # has a gradient, whatever the marginals
            first = w.shape[-1] - len(self._others)
            for i, d in enumerate(self._others):
                (middle, half), marginal = self._scale(d), self.marginals[d]
                value = (middle + half * w[..., first + i]).clamp(*marginal.bounds)
                values = values + marginal.log_density(value)
            (slope,) = torch.autograd.grad(values.sum(), w)
        return values.detach(), slope

    def ends(self) -> tuple[Tensor, Tensor]:
        """Least and largest coordinates ``(D,)``, those of the offset left open."""
        first = [torch.inf] + ([math.pi] if self.has_phase else [])
        pairs = [(-end, end) for end in first]
        for d in self._others:
            finite = [math.isfinite(bound) for bound in self.marginals[d].bounds]
            pairs.append((-1.0 if finite[0] else -_OPEN, 1.0 if finite[1] else _OPEN))
        low, high = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
        return low, high

    def farthest(self) -> Tensor:
        """Largest absolute coordinates ``(D,)`` that a fit may end at."""
        # a cell and what lies about it; half a turn; a little beyond a bound
        most = [1.6] + ([math.pi] if self.has_phase else [])
        families = [self.marginals[d].family for d in self._others]
        most += [_FARTHEST if family == "normal" else 1.1 for family in families]
        return torch.tensor(most, dtype=torch.float64)

    def _scale(self, d: int) -> tuple[float, float]:
        """Middle and half width of a parameter."""
        marginal = self.marginals[d]
        if marginal.family == "normal":
            return marginal.a, marginal.b
        low, high = marginal.bounds
        if marginal.family == "half_normal":
            high = low + _REACH * marginal.b
        return 0.5 * (low + high), 0.5 * (high - low)


def wrapped(angle: Tensor) -> Tensor:
    """An angle's representative in [-pi, pi)."""
    return (angle + math.pi) % _TWO_PI - math.pi
