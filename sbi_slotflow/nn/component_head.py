r"""The components' density given x and K: slots, a chart and the flow they share.

.. math::
    q(\{\theta_1..\theta_K\} | x, K) = \mathrm{perm}\left[ q_i(\theta_j) \right], \qquad
    q_i(\theta) = q(u | c_i)\, |\det \partial u / \partial \theta|, \quad i, j \le K

Slot i's context c_i conditions the flow in the chart's coordinates u.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sets.layout import ThetaParts
from ..sets.matching import hungarian, log_permanent
from .cells import unique_rows
from .charts import Chart
from .encoders import Encoding, Observations, mlp
from .flows import ConditionalFlow, RowContext
from .heads import SharedGivenX
from .set_distribution import SetHead, SetsGivenK
from .spec import Matching

__all__ = ["AttentionSlots", "ComponentHead", "GlobalSlots", "Slots", "slots_from_spec"]


class GlobalSlots(nn.Module):
    r"""Slots that see the global context and their index (the paper's eq. 13-14).

    .. math::
        c_i = [g, e_i, e_K]

    the pooled context g beside one-hot vectors of the slot and, unlike in the authors'
    code, of K: the posterior of a component depends on how many there are. A trunk
    mixes the parts unless ``trunk_features`` is None.
    """

    def __init__(
        self,
        context_features: int,
        max_cardinality: int,
        trunk_features: int | None = 128,
        condition_on_cardinality: bool = True,
    ) -> None:
        super().__init__()
        self.max_cardinality = max_cardinality
        self.condition_on_cardinality = condition_on_cardinality
        raw = context_features + max_cardinality
        if condition_on_cardinality:
            raw += max_cardinality + 1
        self.num_features = raw if trunk_features is None else trunk_features
        self.trunk: nn.Module = nn.Identity()
        if trunk_features is not None:
            self.trunk = mlp(raw, trunk_features, trunk_features, activated=True)

    def forward(
        self, encoding: Encoding, owner: Tensor, cardinality: Tensor, slot: Tensor
    ) -> RowContext:
        """Contexts of N rows ``(N,)`` of slots in 0..K-1, each distinct one once."""
        distinct, which = unique_rows(owner, cardinality, slot)
        return RowContext(self.contexts(encoding, *distinct), which)

    def contexts(
        self, encoding: Encoding, owner: Tensor, cardinality: Tensor, slot: Tensor
    ) -> Tensor:
        """A context ``(N, C)`` for every row."""
        context, size = encoding.context[owner], self.max_cardinality
        parts = [context, nn.functional.one_hot(slot, size).to(context)]
        if self.condition_on_cardinality:
            parts.append(nn.functional.one_hot(cardinality, size + 1).to(context))
        return self.trunk(torch.cat(parts, dim=-1))


class AttentionSlots(nn.Module):
    r"""Slots that look for their component among the encoder's tokens.

    .. math::
        s^{0} = \mathrm{trunk}(c_i), \qquad
        s^{r} = s^{r-1} + \mathrm{MLP}_r\left([s^{r-1}, T^\top
            \mathrm{softmax}(T q_r(s^{r-1}))]\right)

    T holds the tokens, and q_r makes one query for each head. As queries and results
    live in the tokens' own space, nothing is computed for each token.
    """

    def __init__(
        self,
        context_features: int,
        token_features: int,
        max_cardinality: int,
        trunk_features: int = 128,
        condition_on_cardinality: bool = True,
        num_rounds: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        width = self.num_features = trunk_features
        self.num_heads = num_heads
        self.start = GlobalSlots(
            context_features, max_cardinality, width, condition_on_cardinality
        )
        self.norm = nn.LayerNorm(token_features)
        found = num_heads * token_features
        self.queries = nn.ModuleList(nn.Linear(width, found) for _ in range(num_rounds))
        self.mixers = nn.ModuleList(
            mlp(width + found, width, width) for _ in range(num_rounds)
        )

    def forward(
        self, encoding: Encoding, owner: Tensor, cardinality: Tensor, slot: Tensor
    ) -> RowContext:
        """Contexts of N rows; see :meth:`GlobalSlots.forward`."""
        assert encoding.tokens is not None
        distinct, which = unique_rows(owner, cardinality, slot)
        slots = self.start.contexts(encoding, *distinct)
        tokens = self.norm(encoding.tokens)[distinct[0]]
        for query, mixer in zip(self.queries, self.mixers, strict=True):
            heads = query(slots).unflatten(-1, (self.num_heads, -1))
            weights = (heads @ tokens.mT / math.sqrt(tokens.shape[-1])).softmax(-1)
            found = (weights @ tokens).flatten(1)
            slots = slots + mixer(torch.cat([slots, found], dim=-1))
        return RowContext(slots, which)


Slots = GlobalSlots | AttentionSlots


def slots_from_spec(
    spec: dict[str, Any], probe: Encoding, max_cardinality: int
) -> Slots:
    """Build slots from their spec."""
    options = dict(spec)
    kind = options.pop("kind", None)
    context_features = probe.context.shape[-1]
    if kind == "global":
        return GlobalSlots(context_features, max_cardinality, **options)
    if kind != "attention":
        raise ValueError(f"slots must be 'global' or 'attention', got {kind!r}.")
    if probe.tokens is None:
        raise ValueError(
            "slots='attention' need an encoder that returns an Encoding with tokens; "
            "use slots='global' with this one."
        )
    return AttentionSlots(
        context_features, probe.tokens.shape[-1], max_cardinality, **options
    )


class ComponentHead(SetHead):
    """Slots that share a flow over a chart's coordinates."""

    def __init__(self, chart: Chart, slots: Slots, flow: ConditionalFlow) -> None:
        super().__init__()
        self.chart, self.slots, self.flow = chart, slots, flow

    def in_training(
        self,
        encoding: Encoding,
        data: Observations,
        shared: SharedGivenX | None,
        matching: Matching,
    ) -> SetsGivenK:
        """Return what training maximises; see :meth:`SetHead.in_training`."""
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


@dataclass(eq=False)
class _SlotSets(SetsGivenK):
    """Sets of slots given B observations."""

    head: ComponentHead
    encoding: Encoding
    shared: SharedGivenX | None
    matching: Matching

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
        return value, self.log_shared(parts, owner, value, None)

    @torch.no_grad()
    def sample(
        self, mask: Tensor, owner: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw sets; see :meth:`SetsGivenK.sample`."""
        contexts = self.contexts(mask, owner)
        drawn = self.head.chart.inverse(self.head.flow.sample(contexts, generator))
        components = drawn.new_zeros(*mask.shape, drawn.shape[-1])
        components[mask] = drawn
        return components, self.sample_shared(owner, mask, components, generator)

    def contexts(self, mask: Tensor, owner: Tensor) -> RowContext:
        """Contexts of the active slots, in the order of ``mask.nonzero()``."""
        row, slot = mask.nonzero(as_tuple=True)
        return self.head.slots(self.encoding, owner[row], mask.sum(-1)[row], slot)

    def _pairwise_log_density(
        self, u: Tensor, mask: Tensor, contexts: RowContext
    ) -> Tensor:
        """Log densities of all coordinates under all slots of their row."""
        block = mask.unsqueeze(-1) & mask.unsqueeze(-2)
        row, slot, component = block.nonzero(as_tuple=True)
        which = contexts.which.new_zeros(mask.shape).masked_scatter(
            mask, contexts.which
        )
        pairs = RowContext(contexts.values, which[row, slot])
        values = self.head.flow.log_prob(u[row, component], pairs)
        return values.new_zeros(block.shape).masked_scatter(block, values)
