r"""Components anchored at tokens: q(a | x, K) q(theta_1..theta_K | a, x, K).

Which cell of the location axis holds a component is random: the density is a
distribution over anchors (see :mod:`.cell_chain`) times a local one in each anchor's
cell (see :mod:`.local_density`). As the cells part the axis, both enter the density
exactly, and a component whose posterior spreads over the band, or over two peaks, is as
natural as one known to a hundredth of a cell.

:class:`~.autoregressive_head.AutoregressiveHead` draws components one after the other,
:class:`~.independent_head.IndependentHead` independently.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..sets.layout import ThetaParts
from .cells import CellAxis
from .charts import Chart
from .encoders import Encoding
from .local_density import LocalDensity
from .local_transform import LocalTransform
from .spec import Matching

__all__ = ["CellHead", "trunk_network"]


class CellHead(nn.Module, ABC):
    """Density of a set of anchored components.

    Args:
        chart: Chart of a component, which tells its marginals and which parameter is a
            phase.
        axis: The location axis.

    Attributes:
        own_features: Length of what a component is told of the one before.
    """

    local: LocalDensity
    own_features: int

    def __init__(self, chart: Chart, axis: CellAxis) -> None:
        super().__init__()
        if not chart.is_density:
            raise ValueError(
                f"anchored slots need a true chart, got the {chart.kind!r} chart."
            )
        self.chart, self.axis = chart, axis
        self.local_chart = LocalTransform(chart, axis)

    @property
    @abstractmethod
    def keeps_separation(self) -> bool:
        """Whether every draw keeps the least separation."""

    def log_prob(
        self, parts: ThetaParts, encoding: Encoding, owner: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate the log density of N sets; see :meth:`ComponentHead.log_prob`."""
        return self._evaluate(parts, encoding, owner, "permanent", inference=True)

    def matched_log_prob(
        self, parts: ThetaParts, encoding: Encoding, owner: Tensor, matching: Matching
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate what training maximises; see :meth:`ComponentHead.log_prob`."""
        return self._evaluate(parts, encoding, owner, matching, inference=False)

    def _evaluate(
        self,
        parts: ThetaParts,
        encoding: Encoding,
        owner: Tensor,
        matching: Matching,
        inference: bool,
    ) -> tuple[Tensor, Tensor | None]:
        coordinates, log_det = self._coordinates(parts)
        value, noise = self._log_prob(
            coordinates, parts.mask, encoding, owner, matching, inference
        )
        return value + log_det, noise

    def _coordinates(self, parts: ThetaParts) -> tuple[Tensor, Tensor]:
        """Coordinates ``(N, Kmax, D)`` in the order of location, log-Jacobians."""
        components, mask = parts.components, parts.mask
        key = components[..., self.axis.parameter]
        order = torch.where(mask, key, torch.inf).argsort(dim=-1, stable=True)
        components = components.gather(-2, order.unsqueeze(-1).expand_as(components))
        inside = self.chart.contains(components)
        point = self.chart.some_point(components)
        components = torch.where((mask & inside).unsqueeze(-1), components, point)
        coordinates, log_det = self.local_chart.coordinates(components)
        log_det = torch.where(inside, log_det, -torch.inf)
        return coordinates, torch.where(mask, log_det, 0.0).sum(-1).float()

    @torch.no_grad()
    def sample(
        self,
        mask: Tensor,
        encoding: Encoding,
        owner: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw the components of N sets; see :meth:`ComponentHead.sample`."""
        coordinates, noise = self._sample(mask, encoding, owner, generator)
        components = self.in_support(coordinates)
        return torch.where(mask.unsqueeze(-1), components, 0.0), noise

    def in_support(self, coordinates: Tensor) -> Tensor:
        """Float32 components of coordinates with positions."""
        components = self.local_chart.components(coordinates).float()
        return self.chart.marginals.clamp(components)

    @abstractmethod
    def _log_prob(
        self,
        coordinates: Tensor,
        mask: Tensor,
        encoding: Encoding,
        owner: Tensor,
        matching: Matching,
        inference: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Log densities ``(N,)`` of coordinates ``(N, Kmax, D)`` with positions."""

    @abstractmethod
    def _sample(
        self,
        mask: Tensor,
        encoding: Encoding,
        owner: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw coordinates ``(N, Kmax, D)`` with positions."""

    def limits(
        self, anchors: Tensor, starts: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Least and largest coordinates ``(M, D)`` of positions from start to end."""
        low, high = (
            end.to(starts).repeat(len(starts), 1) for end in self.local_chart.ends()
        )
        low[:, 0], high[:, 0] = starts - anchors - 0.5, ends - anchors - 0.5
        return low, high

    def edges(self, encoding: Encoding) -> Tensor:
        """Edges of the cells, shape ``(B, L + 1)``."""
        if encoding.edges is not None:
            return encoding.edges
        edges = torch.arange(self.axis.num_anchors + 1.0, dtype=torch.float64)
        return edges.to(encoding.context.device).expand(len(encoding.context), -1)


def trunk_network(in_features: int, features: int) -> nn.Sequential:
    """The network that makes a component's context."""
    return nn.Sequential(
        nn.Linear(in_features, features),
        nn.GELU(),
        nn.Linear(features, features),
        nn.GELU(),
    )
