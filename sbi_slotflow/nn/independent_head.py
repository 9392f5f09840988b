r"""Anchored components that are independent given x and K, the paper's eq. 18.

Slot i has its own distribution over anchors, a component knows nothing of the others,
and a set's density is the permanent over slots.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .cell_chain import CellMarginals
from .cell_head import CellHead, trunk_network
from .cells import CellAxis
from .charts import Chart
from .encoders import Encoding
from .flows import RowContext
from .local_density import LocalDensity, LocalGaussian
from .matching import hungarian, log_permanent
from .spec import Matching

__all__ = ["IndependentHead"]


class IndependentHead(CellHead):
    """Anchored components that are independent given x and K.

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
        self.pointer = CellMarginals(axis, token_features, max_cardinality)
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

    def _log_prob(
        self,
        coordinates: Tensor,
        mask: Tensor,
        encoding: Encoding,
        owner: Tensor,
        matching: Matching,
        inference: bool,
    ) -> tuple[Tensor, Tensor | None]:
        edges = self.edges(encoding)[owner]
        anchors = self.axis.anchors(coordinates[..., 0], edges)
        row, column = mask.nonzero(as_tuple=True)
        count = mask.sum(-1)
        here = anchors[row, column]
        contexts = self.contexts(encoding, owner[row], count[row], here)
        centre = self.gaussian.centre(contexts.values)[contexts.which]
        w = self.local_chart.relative(coordinates[row, column], here, centre)
        mean, factor = self.gaussian(contexts)
        limits = self.limits(here, edges[row, here], edges[row, here + 1])
        local = self.local.log_prob(w, mean, factor, limits, contexts)
        each = local.new_zeros(mask.shape).masked_scatter(mask, local)
        assert encoding.tokens is not None
        # (N, slot, anchor), then the anchors of the components
        slots = self.pointer(encoding.tokens)[owner, count.clamp(min=1) - 1]
        index = anchors.unsqueeze(-2).expand(-1, self.max_cardinality, -1)
        pairs = slots.gather(-1, index) + each.unsqueeze(-2)
        block = mask.unsqueeze(-1) & mask.unsqueeze(-2)
        pairs = torch.where(block, pairs, 0.0)
        if matching == "permanent":
            return log_permanent(pairs, count), None
        matched = torch.arange(pairs.shape[-1], device=mask.device).expand_as(mask)
        if matching == "hungarian":
            matched = hungarian(pairs, count)
        chosen = pairs.gather(-1, matched.unsqueeze(-1)).squeeze(-1)
        return torch.where(mask, chosen, 0.0).sum(-1), None

    def _sample(
        self,
        mask: Tensor,
        encoding: Encoding,
        owner: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor | None]:
        row, slot = mask.nonzero(as_tuple=True)
        count = mask.sum(-1)[row]
        shape = (*mask.shape, self.local_chart.num_features)
        coordinates = torch.zeros(shape, dtype=torch.float64, device=mask.device)
        if not len(row):
            return coordinates, None
        assert encoding.tokens is not None
        probs = self.pointer(encoding.tokens).exp()[owner[row], count - 1, slot]
        anchors = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
        contexts = self.contexts(encoding, owner[row], count, anchors)
        centre = self.gaussian.centre(contexts.values)[contexts.which]
        mean, factor = self.gaussian(contexts)
        edges = self.edges(encoding)
        limits = self.limits(
            anchors, edges[owner[row], anchors], edges[owner[row], anchors + 1]
        )
        w, _ = self.local.sample(mean, factor, limits, contexts, generator)
        coordinates[row, slot] = self.local_chart.absolute(w, anchors, centre)
        return coordinates, None

    def contexts(
        self, encoding: Encoding, owner: Tensor, count: Tensor, anchors: Tensor
    ) -> RowContext:
        """Contexts of M components, each distinct one once."""
        assert encoding.tokens is not None
        sizes, cells = self.max_cardinality + 1, self.axis.num_anchors
        code = (owner * sizes + count) * cells + anchors
        distinct, which = torch.unique(code, return_inverse=True)
        rest, anchors = distinct // cells, distinct % cells
        tokens = encoding.tokens[rest // sizes, anchors]
        hot = functional.one_hot(rest % sizes, sizes).to(tokens)
        return RowContext(self.trunk(torch.cat([tokens, hot], -1)), which)
