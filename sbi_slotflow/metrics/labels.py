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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nn.matching import hungarian
from ..sets.circular import circular_mean, near
from ..sets.layout import ThetaLayout

__all__ = ["Frame", "ReferencePoints"]

# Draws below which components stay in canonical order.
_FEWEST_TO_MATCH = 50
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


class Frame:
    """Reads rows of k components as vectors, in a way that a posterior fixes.

    A vector holds the shared parameters, then the components, all in double precision.
    Circular parameters are cut opposite to the posterior's circular mean. Components
    are labelled by the posterior's :class:`ReferencePoints`, unless a parameter does
    not vary or there are fewer than 50 draws.

    Args:
        rows: Rows of the posterior, shape ``(M, E)``.
        layout: Layout of theta.
        k: Number of components in every row.
        periods: Periods of circular parameters by name; the layout's if None.
        match: Whether to label components; else they stand in canonical order.

    Attributes:
        names: Name of each entry of a vector, and the number of its component, from 1;
            0 for shared parameters.

    Raises:
        ValueError: If a period is of no parameter, or not positive.
    """

    def __init__(
        self,
        rows: Tensor,
        layout: ThetaLayout,
        k: int,
        periods: Mapping[str, float] | None = None,
        match: bool = True,
    ) -> None:
        periods = layout.periods if periods is None else periods
        known = (*layout.shared_names, *layout.component_names)
        if unknown := sorted(set(periods) - set(known)):
            raise ValueError(f"periods must name parameters of {known}, got {unknown}.")
        for name, period in periods.items():
            if not period > 0:
                raise ValueError(f"period must be positive, got {period} of {name}.")
        self._layout, self._k = layout, k
        numbers = [(n, i) for i in range(1, k + 1) for n in layout.component_names]
        self.names = (*((name, 0) for name in layout.shared_names), *numbers)
        self._periods = [periods.get(name, math.inf) for name, _ in self.names]
        vectors = self._vectors(rows)
        self._cut = circular_mean(vectors, self._periods)
        self._points: ReferencePoints | None = None
        components = self.components(vectors)
        varies = k > 0 and bool((components.std(0, correction=0) > 0).all())
        if match and varies and len(rows) >= _FEWEST_TO_MATCH:
            each = self._periods[layout.num_shared :][: components.shape[-1]]
            found = ReferencePoints.of(components, each, layout.order_by)
            if (found.scale > 0).all():
                self._points = found

    def ordered(self, rows: Tensor) -> Tensor:
        """Vectors ``(S, C)`` with components in canonical order."""
        return near(self._vectors(rows), self._cut, self._periods)

    def labelled(self, rows: Tensor) -> Tensor:
        """Vectors ``(S, C)`` with components in the order of the points."""
        vectors = self.ordered(rows)
        if self._points is None:
            return vectors
        shared = vectors[:, : self._layout.num_shared]
        components = self._points.label(self.components(vectors))
        return torch.cat([shared, components.flatten(1)], dim=-1)

    def components(self, vectors: Tensor) -> Tensor:
        """Components ``(S, K, D)`` of vectors."""
        components = vectors[:, self._layout.num_shared :]
        return components.reshape(len(vectors), self._k, -1 if self._k else 1)

    def _vectors(self, rows: Tensor) -> Tensor:
        parts = self._layout.unpack(self._layout.canonical(rows).double())
        components = parts.components[:, : self._k].flatten(1)
        return torch.cat([parts.shared, components], dim=-1)
