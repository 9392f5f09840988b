r"""Coordinates of a component relative to its cell.

.. math::
    w = \left( y - a - \tfrac12,\; \psi - \psi_0,\; v \ldots \right)

y is the position on the location axis (:mod:`.cells`) and a the cell; psi are the P
circular parameters as angles, each unwrapped about a centre :math:`\psi_0`, so that a
seam lies nowhere in particular; v are the other parameters in natural units
(``natural_scale`` of a :class:`~sbi_slotflow.sets.marginals.Marginal`). An angle that
turns with the location is sheared as the chart says. All are coordinates in which a
likelihood is nearly Gaussian: the prior's bounds are left to the density
(:mod:`.local_density`), which cuts Gaussians off there. Arithmetic is float64.
"""

import math

import torch
from torch import Tensor

from ..sets.circular import wrapped
from ..sets.marginals import Place
from ..sets.transforms import (
    Affine,
    Columns,
    Compose,
    Permutation,
    Shear,
    Transform,
)
from .cells import CellAxis
from .charts import Chart

__all__ = ["LocalTransform"]

_TWO_PI = 2 * math.pi
# Cells within which a fit looks for a component: its own, and what lies about it.
_FARTHEST_CELL = 1.6
# Stands for infinity, which has no gradient.
_OPEN = 1e6


class LocalTransform:
    """Local coordinates (offset, P angles, others) of components.

    A parameter is circular if the layout gives it a period that its prior covers. A
    circular location keeps its seam, at the ends of the axis.

    Args:
        chart: The problem's chart, which knows marginals and periods.
        axis: The location axis.

    Attributes:
        num_circular: Number P of circular parameters, which come after the offset.
    """

    def __init__(self, chart: Chart, axis: CellAxis) -> None:
        self.axis, self.marginals = axis, chart.marginals
        place, num = axis.parameter, len(chart.marginals)
        circular = [
            d
            for d, period in enumerate(chart.marginals.periods)
            if math.isfinite(period) and d != place
        ]
        self.num_circular = len(circular)
        order = [place, *circular]
        order += [d for d in range(num) if d not in order]
        self._parameters = order[1:]
        shears: list[Transform] = []
        for d in circular:
            period, (low, _) = chart.marginals.periods[d], self.marginals[d].bounds
            turning = [s for s in chart.shears if (s.column, s.by) == (d, place)]
            rate = turning[0].rate if turning else 0.0
            shears.append(Shear(d, place, rate, period, low))
        self._scales = [self._scale(d) for d in self._parameters]
        columns = [Affine(middle, half) for middle, half, _ in self._scales]
        position = Place(self.marginals[place], axis.num_cells)
        self._steps = Compose(
            [*shears, Permutation(order), Columns([position, *columns])]
        )

    @property
    def num_features(self) -> int:
        """Number D of coordinates."""
        return len(self.marginals)

    def coordinates(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to coordinates, the first a position, angles in [0, 2 pi).

        Args:
            components: Inside the support, shape ``(..., D)``.

        Returns:
            Coordinates ``(..., D)`` and log-Jacobians ``(...)``, float64.
        """
        return self._steps.forward(components.double())

    def components(self, coordinates: Tensor) -> Tensor:
        """Inverse of :meth:`coordinates`; values may leave the support."""
        return self._steps.inverse(coordinates)

    def absolute(self, w: Tensor, anchors: Tensor, centre: Tensor) -> Tensor:
        """Coordinates with positions and whole angles, of those relative to cells.

        Args:
            w: Coordinates relative to cells and centres, shape ``(..., D)``.
            anchors: Cells, shape ``(...)``.
            centre: Angles that angles are counted from, shape ``(..., P)``.
        """
        return self._shifted(w, anchors + 0.5, centre)

    def relative(self, w: Tensor, anchors: Tensor, centre: Tensor) -> Tensor:
        """Inverse of :meth:`absolute`; angles in [-pi, pi)."""
        w = self._shifted(w, -(anchors + 0.5), -centre)
        place, angles, others = self._parted(w)
        return torch.cat([place, wrapped(angles), others], -1)

    def without_angles(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates with angles of zero, and the angles ``(..., P)``."""
        place, angles, others = self._parted(w)
        return torch.cat([place, torch.zeros_like(angles), others], -1), angles

    def _parted(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num = self.num_circular
        place, angles, others = w.split([1, num, w.shape[-1] - 1 - num], -1)
        return place, angles, others

    def _shifted(self, w: Tensor, offset: Tensor, angle: Tensor) -> Tensor:
        place, angles, others = self._parted(w)
        return torch.cat([place + offset.unsqueeze(-1), angles + angle, others], -1)

    def log_prior(self, w: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Log prior densities ``(...)`` of local coordinates, and their gradients.

        But for a constant; positions and most angles are uniform. Values beyond a
        marginal's ``core`` count as at its end.

        Args:
            w: Coordinates, shape ``(..., D)``.
            centre: Angles that angles are counted from, shape ``(..., P)``.
        """
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            values = 0.0 * w[..., 0]  # has a gradient, whatever the marginals
            whole = self._shifted(w, torch.zeros_like(w[..., 0]), centre)
            for i, d in enumerate(self._parameters, 1):
                (middle, half, _), marginal = self._scales[i - 1], self.marginals[d]
                coordinate = whole[..., i]
                if i <= self.num_circular:
                    if marginal.is_uniform:
                        continue
                    coordinate = coordinate % _TWO_PI
                value = (middle + half * coordinate).clamp(*marginal.core)
                values = values + marginal.log_density(value)
            (slope,) = torch.autograd.grad(values.sum(), w)
        return values.detach(), slope

    def ends(self) -> tuple[Tensor, Tensor]:
        """Least and largest coordinates ``(D,)``, those of the offset left open."""
        pairs = [(-torch.inf, torch.inf)] + self.num_circular * [(-math.pi, math.pi)]
        for d in self._parameters[self.num_circular :]:
            finite = [math.isfinite(bound) for bound in self.marginals[d].bounds]
            pairs.append((-1.0 if finite[0] else -_OPEN, 1.0 if finite[1] else _OPEN))
        low, high = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
        return low, high

    def farthest(self) -> Tensor:
        """Largest absolute coordinates ``(D,)`` that a fit may end at."""
        most = [_FARTHEST_CELL, *(reach for *_, reach in self._scales)]
        return torch.tensor(most, dtype=torch.float64)

    def _scale(self, d: int) -> tuple[float, float, float]:
        """Shift, scale and largest coordinate: of an angle's turn, or natural ones."""
        marginal, period = self.marginals[d], self.marginals.periods[d]
        if math.isfinite(period):
            return marginal.bounds[0], period / _TWO_PI, math.pi
        return marginal.natural_scale
