r"""The components' density given x and K: slots, a chart and the flow they share.

.. math::
    q(\{\theta_1..\theta_K\} | x, K) = \mathrm{perm}\left[ q_i(\theta_j) \right], \qquad
    q_i(\theta) = q(u | c_i)\, |\det \partial u / \partial \theta|, \quad i, j \le K

Slot i's context c_i conditions the flow in the chart's coordinates u.
"""

import torch
from torch import Tensor, nn

from ..sets.layout import ThetaParts
from ..sets.matching import hungarian, log_permanent
from .charts import Chart
from .encoders import Encoding, Observations
from .flows import ConditionalFlow, RowContext
from .heads import SharedGivenX
from .set_distribution import SetsGivenK
from .slots import Slots
from .spec import Matching

__all__ = ["ComponentHead"]


class ComponentHead(nn.Module):
    """Density of a set of components.

    Args:
        chart: Chart of a component.
        slots: Maker of slot contexts.
        flow: Flow over the chart's coordinates.
    """

    def __init__(self, chart: Chart, slots: Slots, flow: ConditionalFlow) -> None:
        super().__init__()
        self.chart, self.slots, self.flow = chart, slots, flow

    @property
    def keeps_separation(self) -> bool:
        """Independent slots do not know of each other."""
        return False

    def given(
        self, encoding: Encoding, data: Observations, shared: SharedGivenX | None
    ) -> SetsGivenK:
        """Return q(Theta, s | x, K) of B observations.

        The density is exact up to K = 12, see :func:`log_permanent`.

        Args:
            encoding: Their embeddings.
            data: The observations themselves, which slots do not read.
            shared: The shared parameters' density; None if there are none.
        """
        return _SlotSets(self, encoding, shared, "permanent")

    def in_training(
        self,
        encoding: Encoding,
        data: Observations,
        shared: SharedGivenX | None,
        matching: Matching,
    ) -> SetsGivenK:
        """Return what training maximises; see :meth:`given`.

        Args:
            encoding: Embeddings of B observations.
            data: The observations themselves.
            shared: The shared parameters' density.
            matching: ``"permanent"`` is the density itself; ``"hungarian"`` and
                ``"ordered"`` take the log density of one assignment.
        """
        return _SlotSets(self, encoding, shared, matching)

    def coordinates(self, parts: ThetaParts) -> tuple[Tensor, Tensor]:
        """Coordinates ``(N, Kmax, F)`` and log-Jacobians ``(N, Kmax)``.

        The latter are 0 if inactive and -inf outside the support.
        """
        components, mask = parts.components, parts.mask
        # Padding may lie outside the support: put a point of it there instead.
        point = self.chart.some_point(components)
        inside = self.chart.contains(components)
        u, log_det = self.chart.forward(
            torch.where((mask & inside).unsqueeze(-1), components, point)
        )
        log_det = torch.where(inside, log_det, log_det.new_full((), -torch.inf))
        return u, torch.where(mask, log_det, log_det.new_zeros(()))


class _SlotSets(SetsGivenK):
    """Sets of slots given B observations."""

    def __init__(
        self,
        head: ComponentHead,
        encoding: Encoding,
        shared: SharedGivenX | None,
        matching: Matching,
    ) -> None:
        self.head, self.encoding = head, encoding
        self.shared, self.matching = shared, matching

    def log_terms(self, parts: ThetaParts, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate log densities; see :meth:`SetsGivenK.log_terms`."""
        u, log_det = self.head.coordinates(parts)
        contexts = self.contexts(parts.mask, owner)
        if self.matching == "permanent":
            pairs = self._pairwise_log_density(u, parts.mask, contexts)
            value = log_permanent(pairs, parts.cardinality) + log_det.sum(-1)
        else:
            matched = torch.arange(u.shape[-2], device=u.device).expand_as(parts.mask)
            if self.matching == "hungarian":
                with torch.no_grad():
                    pairs = self._pairwise_log_density(u, parts.mask, contexts)
                matched = hungarian(pairs, parts.cardinality)
            row, slot = parts.mask.nonzero(as_tuple=True)
            each = self.head.flow.log_prob(u[row, matched[row, slot]], contexts)
            value = log_det.sum(-1).index_add(0, row, each)
        log_shared = torch.zeros_like(value)
        if self.shared is not None:
            log_shared = self.shared.log_prob(parts.shared, owner, parts.cardinality)
        return value, log_shared

    @torch.no_grad()
    def sample(
        self, mask: Tensor, owner: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw sets; see :meth:`SetsGivenK.sample`."""
        contexts, shared = self.contexts(mask, owner), None
        drawn = self.head.chart.inverse(self.head.flow.sample(contexts, generator))
        components = drawn.new_zeros(*mask.shape, drawn.shape[-1])
        components[mask] = drawn
        if self.shared is not None:
            shared = self.shared.sample(owner, mask.sum(-1), generator)
        return components, shared

    def contexts(self, mask: Tensor, owner: Tensor) -> RowContext:
        """Contexts of the active slots, in the order of ``mask.nonzero()``."""
        row, slot = mask.nonzero(as_tuple=True)
        return self.head.slots(self.encoding, owner[row], mask.sum(-1)[row], slot)

    def _pairwise_log_density(
        self, u: Tensor, mask: Tensor, contexts: RowContext
    ) -> Tensor:
        """Log densities of all coordinates under all slots of their row.

        Returns:
            Shape ``(N, Kmax, Kmax)`` (slot, component), zero outside the K x K block.
        """
        block = mask.unsqueeze(-1) & mask.unsqueeze(-2)
        row, slot, component = block.nonzero(as_tuple=True)
        which = contexts.which.new_zeros(mask.shape).masked_scatter(
            mask, contexts.which
        )
        pairs = RowContext(contexts.values, which[row, slot])
        values = self.head.flow.log_prob(u[row, component], pairs)
        return values.new_zeros(block.shape).masked_scatter(block, values)
