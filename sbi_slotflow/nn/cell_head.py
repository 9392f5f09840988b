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
    the other, :class:`IndependentHead`, where they are independent;
    :mod:`.cell_chain` and :mod:`.local`, the two factors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..sets.layout import ThetaParts
from ..sets.matching import hungarian, log_permanent
from .cell_chain import CellMarginals
from .cells import CellAxis, unique_rows
from .charts import Chart
from .classes import ClassDensity, local_density, local_transform
from .encoders import Encoding, Observations, mlp
from .flows import RowContext
from .heads import SharedGivenX
from .local import LocalDensity, LocalGaussian
from .set_distribution import SetHead, SetsGivenK
from .spec import Matching

__all__ = ["CellHead", "IndependentHead"]


class CellHead(SetHead):
    """Density of a set of components in cells."""

    gaussian: LocalGaussian | None
    local: LocalDensity | ClassDensity

    def __init__(self, chart: Chart, axis: CellAxis, max_cardinality: int) -> None:
        super().__init__()
        if not chart.is_density:
            raise ValueError(
                f"anchored slots need a true chart, got the {chart.kind!r} chart."
            )
        self.chart, self.axis, self.max_cardinality = chart, axis, max_cardinality
        self.local_chart = local_transform(chart, axis)

    def _build_local(
        self, trunk_features: int, own_features: int, flow: dict[str, Any]
    ) -> None:
        """Make the density in a cell and, unless modes are fitted, its Gaussian."""
        sizes, self.gaussian = (self.local_chart.num_features, trunk_features), None
        if not flow.get("from_identity"):
            self.gaussian = LocalGaussian(*sizes, self.local_chart.num_circular)
        self.local = local_density(self.local_chart, trunk_features, own_features, flow)

    @property
    def predicted(self) -> LocalGaussian:
        """The Gaussian that contexts predict."""
        assert self.gaussian is not None
        return self.gaussian

    def coordinates(self, parts: ThetaParts) -> tuple[Tensor, Tensor]:
        """Coordinates ``(N, Kmax, D)`` in the order of location, log-Jacobians."""
        components, mask = parts.components, parts.mask
        inside = self.chart.contains(components)
        point = self.chart.some_point(components)
        components = torch.where((mask & inside).unsqueeze(-1), components, point)
        coordinates, log_det = self.local_chart.coordinates(components)
        key = torch.where(mask, self.local_chart.position(coordinates), torch.inf)
        order = key.argsort(dim=-1, stable=True)
        inside, log_det = inside.gather(-1, order), log_det.gather(-1, order)
        order = order.unsqueeze(-1).expand_as(coordinates)
        coordinates = coordinates.gather(-2, order)
        log_det = torch.where(inside, log_det, -torch.inf)
        return coordinates, torch.where(mask, log_det, 0.0).sum(-1).float()

    def components(self, coordinates: Tensor) -> Tensor:
        """Float32 components of coordinates with positions."""
        components = self.local_chart.components(coordinates).float()
        return self.chart.marginals.clamp(components)

    def limits(
        self, cells: Tensor, starts: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Least and largest coordinates ``(M, D)`` of positions from start to end."""
        low, high = (end.to(starts).clone() for end in self.local_chart.ends(cells))
        low[:, 0], high[:, 0] = starts - cells - 0.5, ends - cells - 0.5
        return low, high

    def tokens_and_edges(self, encoding: Encoding) -> tuple[Tensor, Tensor]:
        """Tokens ``(B, L, C)`` of the cells, and their edges ``(B, L + 1)``."""
        assert encoding.tokens is not None
        if encoding.edges is not None:
            return encoding.tokens, encoding.edges
        edges = torch.arange(self.axis.num_cells + 1.0, dtype=torch.float64)
        edges = edges.to(encoding.tokens.device).expand(len(encoding.tokens), -1)
        return encoding.tokens, edges


class IndependentHead(CellHead):
    r"""Components in cells that are independent given x and K, the paper's eq. 18.

    .. math::
        q(\theta_1 \ldots \theta_K | x, K) = \mathrm{perm}\left[
            q_i(a(\theta_j))\, q(\theta_j | a(\theta_j), x, K) \right], i, j \le K

    Slot i has its own distribution q_i over cells, :class:`.cell_chain.CellMarginals`.
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
        super().__init__(chart, axis, max_cardinality)
        self.cells = CellMarginals(axis, token_features, max_cardinality)
        widths = token_features + max_cardinality + 1, trunk_features, trunk_features
        self.trunk = mlp(*widths, activated=True)
        flow = {**(flow or {}), "location_scale": False}
        self._build_local(trunk_features, 0, flow)

    def in_training(
        self,
        encoding: Encoding,
        data: Observations,
        shared: SharedGivenX | None,
        matching: Matching,
    ) -> SetsGivenK:
        """Return what training maximises; see :meth:`SetHead.in_training`."""
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
        self.head, self.shared, self.matching = head, shared, matching
        self.tokens, self.edges = head.tokens_and_edges(encoding)
        self.log_cells = head.cells(self.tokens)

    def log_terms(self, parts: ThetaParts, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate log densities; see :meth:`SetsGivenK.log_terms`."""
        head, (coordinates, log_det) = self.head, self.head.coordinates(parts)
        mask, count = parts.mask, parts.cardinality
        position = head.local_chart.position(coordinates)
        cells = head.axis.cells(position, self.edges[owner])
        row, column = mask.nonzero(as_tuple=True)
        here = cells[row, column]
        centre, given = self.in_cells(owner[row], count[row], here)
        w = head.local_chart.relative(coordinates[row, column], here, centre)
        local = head.local.log_prob(w, *given, here)
        each = local.new_zeros(mask.shape).masked_scatter(mask, local)
        # (N, slot, cell), then the cells of the components
        slots = self.log_cells[owner, count.clamp(min=1) - 1]
        index = cells.unsqueeze(-2).expand(-1, head.max_cardinality, -1)
        pairs = slots.gather(-1, index) + each.unsqueeze(-2)
        block = mask.unsqueeze(-1) & mask.unsqueeze(-2)
        value = self._matched(torch.where(block, pairs, 0.0), mask)
        return value + log_det, self.log_shared(parts, owner, value, None)

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
        head = self.head
        row, slot = mask.nonzero(as_tuple=True)
        count, here = mask.sum(-1), owner[row]
        shape = (*mask.shape, head.local_chart.num_features)
        coordinates = torch.zeros(shape, dtype=torch.float64, device=mask.device)
        if len(row):
            probs = self.log_cells.exp()[here, count[row] - 1, slot]
            cells = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
            centre, given = self.in_cells(here, count[row], cells)
            w, _ = head.local.sample(*given, cells, generator)
            coordinates[row, slot] = head.local_chart.absolute(w, cells, centre)
        components = head.components(coordinates)
        return components, self.sample_shared(owner, mask, components, generator)

    def in_cells(
        self, owner: Tensor, count: Tensor, cells: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, tuple[Tensor, Tensor], RowContext]]:
        """Centres of M components' angles, and what their local densities depend on."""
        head, ends = self.head, (self.edges[owner, cells + i] for i in (0, 1))
        limits = head.limits(cells, *ends)
        (owner, count, cells), which = unique_rows(owner, count, cells)
        tokens = self.tokens[owner, cells]
        hot = functional.one_hot(count, head.max_cardinality + 1).to(tokens)
        contexts = RowContext(head.trunk(torch.cat([tokens, hot], -1)), which)
        centre = head.predicted.centre(contexts.values)[which]
        return centre, (*head.predicted(contexts), limits, contexts)
