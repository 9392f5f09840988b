r"""The components' density given x and K: slots, a chart and the flow they share.

.. math::
    q(\{\theta_1..\theta_K\} | x, K) = \mathrm{perm}\left[ q_i(\theta_j) \right], \qquad
    q_i(\theta) = q(u | c_i)\, |\det \partial u / \partial \theta|, \quad i, j \le K

Slot i's context c_i conditions the flow in the chart's coordinates u.
"""

import torch
from torch import Tensor, nn

from ..sets.layout import ThetaParts
from .charts import Chart
from .encoders import Encoding
from .flows import ConditionalFlow, RowContext
from .matching import hungarian, log_permanent
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

    def log_prob(
        self, parts: ThetaParts, encoding: Encoding, owner: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate the log density of N sets.

        Args:
            parts: The sets, taken apart.
            encoding: Embeddings of B observations.
            owner: Observation of each set, shape ``(N,)``.

        Returns:
            Log densities, shape ``(N,)``, with respect to Lebesgue measure on the
            canonical region; exact up to K = 12, see :func:`log_permanent`. And the
            log level of each set's residual, shape ``(N,)``, or None where no signal is
            fitted, as here.
        """
        u, log_det = self._coordinates(parts)
        contexts = self._contexts(parts.mask, encoding, owner)
        pairs = self._pairwise_log_density(u, parts.mask, contexts)
        return log_permanent(pairs, parts.cardinality) + log_det.sum(-1), None

    def matched_log_prob(
        self, parts: ThetaParts, encoding: Encoding, owner: Tensor, matching: Matching
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate what training maximises; see :meth:`log_prob`.

        Args:
            parts: The sets, in canonical order.
            encoding: Embeddings of B observations.
            owner: Observation of each set, shape ``(N,)``.
            matching: ``"permanent"`` is :meth:`log_prob`; ``"hungarian"`` and
                ``"ordered"`` take the log density of one assignment.

        Returns:
            As :meth:`log_prob`.
        """
        if matching == "permanent":
            return self.log_prob(parts, encoding, owner)
        u, log_det = self._coordinates(parts)
        contexts = self._contexts(parts.mask, encoding, owner)
        matched = torch.arange(u.shape[-2], device=u.device).expand_as(parts.mask)
        if matching == "hungarian":
            with torch.no_grad():
                pairs = self._pairwise_log_density(u, parts.mask, contexts)
            matched = hungarian(pairs, parts.cardinality)
        row, slot = parts.mask.nonzero(as_tuple=True)
        value = self.flow.log_prob(u[row, matched[row, slot]], contexts)
        return log_det.sum(-1).index_add(0, row, value), None

    @torch.no_grad()
    def sample(
        self,
        mask: Tensor,
        encoding: Encoding,
        owner: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw the components of N sets.

        Args:
            mask: Active components of each set, shape ``(N, Kmax)``.
            encoding: Embeddings of B observations.
            owner: Observation of each set, shape ``(N,)``.
            generator: Source of randomness.

        Returns:
            Components in slot order, shape ``(N, Kmax, D)``, zero where inactive, and
            the log level of each set's residual; see :meth:`log_prob`.
        """
        contexts = self._contexts(mask, encoding, owner)
        components = self.chart.inverse(self.flow.sample(contexts, generator))
        padded = components.new_zeros(*mask.shape, components.shape[-1])
        padded[mask] = components
        return padded, None

    def _contexts(self, mask: Tensor, encoding: Encoding, owner: Tensor) -> RowContext:
        """Contexts of the active slots, in the order of ``mask.nonzero()``."""
        row, slot = mask.nonzero(as_tuple=True)
        return self.slots(encoding, owner[row], mask.sum(-1)[row], slot)

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
        values = self.flow.log_prob(u[row, component], pairs)
        return values.new_zeros(block.shape).masked_scatter(block, values)

    def _coordinates(self, parts: ThetaParts) -> tuple[Tensor, Tensor]:
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
