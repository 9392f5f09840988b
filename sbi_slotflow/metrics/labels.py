r"""Consistent labels for the components of many draws.

In canonical order the i-th component of one draw may be another tone's than the i-th of
the next, where their frequencies overlap. Labels that follow the tones come from
reference points (Stephens 2000): each draw's components are assigned to the points so
that independent normals around them are most likely,

.. math::
    \min_\pi \sum_{i,d} \frac{(\theta_{\pi(i),d} - m_{i,d})^2}{2 s_{i,d}^2}
    + \log s_{i,d},

then centres m and scales s are those of the labelled draws, until no label changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nn.matching import hungarian
from ..sets.circular import circular_mean, near

__all__ = ["ReferencePoints"]

_MAX_ROUNDS = 20


@dataclass(frozen=True)
class ReferencePoints:
    """Points that components are labelled by.

    Attributes:
        centre: Centres m, shape ``(K, D)``, ascending in the ordering parameter.
        scale: Scales s, shape ``(K, D)``.
        periods: D periods, infinite where a parameter is not circular.
    """

    centre: Tensor
    scale: Tensor
    periods: tuple[float, ...]

    @classmethod
    def of(
        cls, components: Tensor, periods: Sequence[float], order_by: int = 0
    ) -> "ReferencePoints":
        """Find the points of a posterior given K.

        The first points are the draw that lies closest to the means in canonical order:
        a single draw, unlike a mean, keeps the tones apart.

        Args:
            components: Components in canonical order, float64, shape ``(S, K, D)``,
                K >= 1. Every parameter must vary.
            periods: D periods, infinite where a parameter is not circular.
            order_by: Index of the parameter that orders the points.
        """
        _, k, size = components.shape
        mean = circular_mean(components, periods)
        offsets = near(components, mean, periods) - mean
        scale = offsets.square().mean((0, 1)).sqrt().expand(k, size)
        closest = (offsets / scale).square().sum((1, 2)).argmin()
        points = cls(components[closest], scale, tuple(periods))
        order = points.assign(components)
        for _ in range(_MAX_ROUNDS):
            labelled = points.label(components, order)
            centre = labelled.mean(0)
            scale = (labelled - centre).square().mean(0).sqrt()
            points = cls(centre, scale, points.periods)
            previous, order = order, points.assign(components)
            if torch.equal(order, previous):
                break
        rank = points.centre[:, order_by].argsort()
        return cls(points.centre[rank], points.scale[rank], points.periods)

    def assign(self, components: Tensor) -> Tensor:
        """Find the component of each point by the Hungarian method.

        Args:
            components: Components in any order, shape ``(S, K, D)``.

        Returns:
            Indices, shape ``(S, K)``.
        """
        centre, scale = self.centre.unsqueeze(1), self.scale.unsqueeze(1)
        pairs = near(components.unsqueeze(1), centre, self.periods)
        density = -0.5 * ((pairs - centre) / scale).square() - scale.log()
        counts = torch.full((len(components),), len(self.centre))
        return hungarian(density.sum(-1), counts)

    def label(self, components: Tensor, order: Tensor | None = None) -> Tensor:
        """Put components in the order of the points, circular values near them.

        Args:
            components: Components in any order, shape ``(S, K, D)``.
            order: Component of each point, shape ``(S, K)``; :meth:`assign` if None.

        Returns:
            Components, shape ``(S, K, D)``.
        """
        if order is None:
            order = self.assign(components)
        index = order.unsqueeze(-1).expand_as(components)
        return near(components.gather(1, index), self.centre, self.periods)
