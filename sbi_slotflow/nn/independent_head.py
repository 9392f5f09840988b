r"""Components in cells that are independent given x and K, the paper's eq. 18.

.. math::
    q(\theta_1 \ldots \theta_K | x, K) = \mathrm{perm}\left[
        q_i(a(\theta_j))\, q(\theta_j | a(\theta_j), x, K) \right], \quad i, j \le K

Slot i has its own distribution q_i over cells (:class:`.cell_chain.CellMarginals`).

See Also:
    :class:`.autoregressive_head.AutoregressiveHead`, whose components know each other.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..sets.layout import ThetaParts
from ..sets.matching import hungarian, log_permanent
from .cell_chain import CellMarginals
from .cell_head import CellHead, trunk_network
from .cells import CellAxis
from .charts import Chart
from .encoders import Encoding, Observations
from .flows import RowContext
from .heads import SharedGivenX
from .local_density import LocalDensity, LocalGaussian
from .set_distribution import SetsGivenK
from .spec import Matching

__all__ = ["IndependentHead"]


class IndependentHead(CellHead):
    """Components in cells, independent given x and K.

    Args:
        chart: Chart of a component.
        axis: The location axis.
        token_features: Length of a token.
        max_cardinality: Largest cardinality Kmax.
        trunk_features: Width of a component's context.
        flow: Options of the flow.

    Raises:
        ValueError: If the chart is no density.
    """

    def __init__(
        self,
        chart: Chart,
        axis: CellAxis,
        token_features: int,
        max_cardinality: int,
        trunk_features: int = 128,
        flow: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(chart, axis)
        self.max_cardinality = max_cardinality
        features, self.own_features = self.local_chart.num_features, 0
        self.cells = CellMarginals(axis, token_features, max_cardinality)
        self.trunk = trunk_network(token_features + max_cardinality + 1, trunk_features)
        self.gaussian = LocalGaussian(
            features, trunk_features, self.local_chart.num_circular
        )
        self.local = LocalDensity(
            features, trunk_features, 0, **{**(flow or {}), "location_scale": False}
        )

    @property
    def keeps_separation(self) -> bool:
        """Components do not know of each other."""
        return False

    def given(
        self, encoding: Encoding, data: Observations, shared: SharedGivenX | None
    ) -> SetsGivenK:
        """Return the density given x; see :meth:`CellHead.given`."""
        return _IndependentSets(self, encoding, shared, "permanent")

    def in_training(
        self,
        encoding: Encoding,
        data: Observations,
        shared: SharedGivenX | None,
        matching: Matching,
    ) -> SetsGivenK:
        """Return what training maximises; see :meth:`CellHead.in_training`."""
        return _IndependentSets(self, encoding, shared, matching)


class _IndependentSets(SetsGivenK):
    """Independent components given B observations."""

    def __init__(
        self,
        head: IndependentHead,
        encoding: Encoding,
        shared: SharedGivenX | None,
        matching: Matching,
    ) -> None:
        assert encoding.tokens is not None
        self.head, self.shared, self.matching = head, shared, matching
        self.tokens, self.edges = encoding.tokens, head.edges(encoding)
        self.log_cells = head.cells(self.tokens)

    def log_terms(self, parts: ThetaParts, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate log densities; see :meth:`SetsGivenK.log_terms`."""
        head, (coordinates, log_det) = self.head, self.head.coordinates(parts)
        edges, mask, count = self.edges[owner], parts.mask, parts.cardinality
        cells = head.axis.cells(coordinates[..., 0], edges)
        row, column = mask.nonzero(as_tuple=True)
        here = cells[row, column]
        contexts = self.contexts(owner[row], count[row], here)
        centre = head.gaussian.centre(contexts.values)[contexts.which]
        w = head.local_chart.relative(coordinates[row, column], here, centre)
        mean, factor = head.gaussian(contexts)
        limits = head.limits(here, edges[row, here], edges[row, here + 1])
        local = head.local.log_prob(w, mean, factor, limits, contexts)
        each = local.new_zeros(mask.shape).masked_scatter(mask, local)
        # (N, slot, cell), then the cells of the components
        slots = self.log_cells[owner, count.clamp(min=1) - 1]
        index = cells.unsqueeze(-2).expand(-1, head.max_cardinality, -1)
        pairs = slots.gather(-1, index) + each.unsqueeze(-2)
        block = mask.unsqueeze(-1) & mask.unsqueeze(-2)
        value = self._matched(torch.where(block, pairs, 0.0), mask)
        log_shared = torch.zeros_like(value)
        if self.shared is not None:
            log_shared = self.shared.log_prob(parts.shared, owner, count)
        return value + log_det, log_shared

    def _matched(self, pairs: Tensor, mask: Tensor) -> Tensor:
        """Log densities ``(N,)`` of pairs ``(N, slot, component)``."""
        count = mask.sum(-1)
        if self.matching == "permanent":
            return log_permanent(pairs, count)
        matched = torch.arange(pairs.shape[-1], device=mask.device).expand_as(mask)
        if self.matching == "hungarian":
            matched = hungarian(pairs, count)
        chosen = pairs.gather(-1, matched.unsqueeze(-1)).squeeze(-1)
        return torch.where(mask, chosen, 0.0).sum(-1)

    @torch.no_grad()
    def sample(
        self, mask: Tensor, owner: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw sets; see :meth:`SetsGivenK.sample`."""
        head, edges = self.head, self.edges
        row, slot = mask.nonzero(as_tuple=True)
        count, here = mask.sum(-1), owner[row]
        shape = (*mask.shape, head.local_chart.num_features)
        coordinates = torch.zeros(shape, dtype=torch.float64, device=mask.device)
        if len(row):
            probs = self.log_cells.exp()[here, count[row] - 1, slot]
            cells = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
            contexts = self.contexts(here, count[row], cells)
            centre = head.gaussian.centre(contexts.values)[contexts.which]
            mean, factor = head.gaussian(contexts)
            limits = head.limits(cells, edges[here, cells], edges[here, cells + 1])
            w, _ = head.local.sample(mean, factor, limits, contexts, generator)
            coordinates[row, slot] = head.local_chart.absolute(w, cells, centre)
        components, shared = head.components(coordinates, mask), None
        if self.shared is not None:
            shared = self.shared.sample(owner, count, generator)
        return components, shared

    def contexts(self, owner: Tensor, count: Tensor, cells: Tensor) -> RowContext:
        """Contexts of M components, each distinct one once."""
        sizes, num = self.head.max_cardinality + 1, self.head.axis.num_cells
        code = (owner * sizes + count) * num + cells
        distinct, which = torch.unique(code, return_inverse=True)
        rest, cells = distinct // num, distinct % num
        tokens = self.tokens[rest // sizes, cells]
        hot = functional.one_hot(rest % sizes, sizes).to(tokens)
        return RowContext(self.head.trunk(torch.cat([tokens, hot], -1)), which)
