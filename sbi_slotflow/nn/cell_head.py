r"""Components that stand in cells of the location axis.

Which cell holds a component is random. The density of a set is a sum over cells with a
single term, as the cells divide the axis,

.. math::
    q(\theta_1 \ldots \theta_K | x, K) = q(a_1 \ldots a_K | x, K)\,
        q(\theta_1 \ldots \theta_K | a, x, K), \qquad a_k = a(\theta_k),

so both factors enter exactly. A component whose posterior spreads over the band, or has
two modes, is as natural as one known to a hundredth of a cell.

See Also:
    :class:`.autoregressive_head.AutoregressiveHead`, which draws components one after
    the other, :class:`.independent_head.IndependentHead`, where they are independent;
    :mod:`.cell_chain` and :mod:`.local_density`, the two factors.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..sets.layout import ThetaParts
from .cells import CellAxis
from .charts import Chart
from .encoders import Encoding, Observations
from .heads import SharedGivenX
from .local_density import LocalDensity
from .local_transform import LocalTransform
from .set_distribution import SetsGivenK
from .spec import Matching

__all__ = ["CellHead", "trunk_network"]


class CellHead(nn.Module, ABC):
    """Density of a set of components in cells.

    Args:
        chart: Chart of a component, which tells its marginals and which parameter is a
            phase.
        axis: The location axis.

    Attributes:
        own_features: Length of what a component is told of the one before.

    Raises:
        ValueError: If the chart is no density.
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

    @abstractmethod
    def given(
        self, encoding: Encoding, data: Observations, shared: SharedGivenX | None
    ) -> SetsGivenK:
        """Return q(Theta, s | x, K) of B observations.

        Args:
            encoding: Their embeddings.
            data: The observations themselves.
            shared: The shared parameters' density; None if there are none.
        """

    @abstractmethod
    def in_training(
        self,
        encoding: Encoding,
        data: Observations,
        shared: SharedGivenX | None,
        matching: Matching,
    ) -> SetsGivenK:
        """Return what training maximises; see :meth:`given`.

        Nothing is pruned, weighed or remembered, and gradients pass.

        Args:
            encoding: Embeddings of B observations.
            data: The observations themselves.
            shared: The shared parameters' density.
            matching: ``"permanent"`` is the density itself; ``"hungarian"`` and
                ``"ordered"`` take the log density of one assignment of components to
                slots. Where components are drawn in order, the three are the same.
        """

    def coordinates(self, parts: ThetaParts) -> tuple[Tensor, Tensor]:
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

    def components(self, coordinates: Tensor, mask: Tensor) -> Tensor:
        """Float32 components of coordinates with positions, zero where inactive."""
        components = self.local_chart.components(coordinates).float()
        components = self.chart.marginals.clamp(components)
        return torch.where(mask.unsqueeze(-1), components, 0.0)

    def limits(
        self, cells: Tensor, starts: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Least and largest coordinates ``(M, D)`` of positions from start to end."""
        low, high = (
            end.to(starts).repeat(len(starts), 1) for end in self.local_chart.ends()
        )
        low[:, 0], high[:, 0] = starts - cells - 0.5, ends - cells - 0.5
        return low, high

    def edges(self, encoding: Encoding) -> Tensor:
        """Edges of the cells, shape ``(B, L + 1)``."""
        if encoding.edges is not None:
            return encoding.edges
        edges = torch.arange(self.axis.num_cells + 1.0, dtype=torch.float64)
        return edges.to(encoding.context.device).expand(len(encoding.context), -1)


def trunk_network(in_features: int, features: int) -> nn.Sequential:
    """The network that makes a component's context."""
    return nn.Sequential(
        nn.Linear(in_features, features),
        nn.GELU(),
        nn.Linear(features, features),
        nn.GELU(),
    )
