r"""Slot contexts: what slot i of K sees of an observation.

:class:`GlobalSlots` are the paper's (eq. 13-14),

.. math::
    c_i = [g, e_i, e_K]

the pooled context g beside one-hot vectors of the slot and, unlike in the authors'
code, of K: the posterior of a component depends on how many there are. Everything that
a slot learns of its component has then passed through one vector. In
:class:`AttentionSlots` each slot, starting from c_i, also looks for its component among
the encoder's tokens, which are not pooled.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .encoders import Encoding
from .flows import RowContext

__all__ = ["AttentionSlots", "GlobalSlots", "Slots", "slots_from_spec"]


class GlobalSlots(nn.Module):
    """Slots that see the global context and their index.

    Args:
        context_features: Length of the global context.
        max_cardinality: Largest cardinality Kmax.
        trunk_features: Width of a trunk that mixes the parts of a context; None hands
            the concatenation on as it is.
        condition_on_cardinality: Whether a slot sees K.

    Attributes:
        num_features: Length of a slot context.
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
        self.trunk = (
            nn.Identity()
            if trunk_features is None
            else nn.Sequential(
                nn.Linear(raw, trunk_features),
                nn.GELU(),
                nn.Linear(trunk_features, trunk_features),
                nn.GELU(),
            )
        )

    def forward(
        self, encoding: Encoding, owner: Tensor, cardinality: Tensor, slot: Tensor
    ) -> RowContext:
        """Build the contexts of N rows, each distinct one once.

        Args:
            encoding: Embeddings of the observations.
            owner: Observation of each row, shape ``(N,)``.
            cardinality: K of each row, shape ``(N,)``.
            slot: Slot of each row, in 0..K-1, shape ``(N,)``.

        Returns:
            Contexts of the rows.
        """
        return self.with_owners(encoding, owner, cardinality, slot)[0]

    def with_owners(
        self, encoding: Encoding, owner: Tensor, cardinality: Tensor, slot: Tensor
    ) -> tuple[RowContext, Tensor]:
        """Return :meth:`forward` and the observation of each distinct context."""
        size = self.max_cardinality
        code = (owner * (size + 1) + cardinality) * size + slot
        distinct, index = torch.unique(code, return_inverse=True)
        rest, slots = distinct // size, distinct % size
        owners, cardinalities = rest // (size + 1), rest % (size + 1)
        context = encoding.context[owners]
        parts = [context, nn.functional.one_hot(slots, size).to(context)]
        if self.condition_on_cardinality:
            parts.append(nn.functional.one_hot(cardinalities, size + 1).to(context))
        return RowContext(self.trunk(torch.cat(parts, dim=-1)), index), owners


class AttentionSlots(nn.Module):
    r"""Slots that look for their component among the encoder's tokens.

    .. math::
        s^{0} = \mathrm{trunk}(c_i), \qquad
        s^{r} = s^{r-1} + \mathrm{MLP}_r\left([s^{r-1}, T^\top
            \mathrm{softmax}(T q_r(s^{r-1}))]\right)

    T holds the tokens, and q_r makes one query for each head. As queries and results
    live in the tokens' own space, nothing is computed for each token.

    Args:
        context_features: Length of the global context.
        token_features: Length of a token.
        max_cardinality: Largest cardinality Kmax.
        trunk_features: Width of a slot.
        condition_on_cardinality: Whether a slot sees K.
        num_rounds: Rounds of attention.
        num_heads: Attention heads.

    Attributes:
        num_features: Length of a slot context.
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
            nn.Sequential(
                nn.Linear(width + found, width), nn.GELU(), nn.Linear(width, width)
            )
            for _ in range(num_rounds)
        )

    def forward(
        self, encoding: Encoding, owner: Tensor, cardinality: Tensor, slot: Tensor
    ) -> RowContext:
        """Build the contexts of N rows; see :meth:`GlobalSlots.forward`."""
        start, owners = self.start.with_owners(encoding, owner, cardinality, slot)
        slots = start.values
        assert encoding.tokens is not None
        tokens = self.norm(encoding.tokens)[owners]
        for query, mixer in zip(self.queries, self.mixers, strict=True):
            heads = query(slots).unflatten(-1, (self.num_heads, -1))
            weights = (heads @ tokens.mT / math.sqrt(tokens.shape[-1])).softmax(-1)
            found = (weights @ tokens).flatten(1)
            slots = slots + mixer(torch.cat([slots, found], dim=-1))
        return RowContext(slots, start.which)


Slots = GlobalSlots | AttentionSlots


def slots_from_spec(
    spec: dict[str, Any], probe: Encoding, max_cardinality: int
) -> Slots:
    """Build slots from their spec.

    Args:
        spec: ``"kind"`` and the options of the class.
        probe: An encoding, for its sizes.
        max_cardinality: Largest cardinality Kmax.

    Raises:
        ValueError: If the kind is unknown, or the encoder lacks what it needs.
    """
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
