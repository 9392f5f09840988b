r"""Slot contexts: what slot i of K sees of an observation (eq. 13-14 of the paper).

.. math::
    c_i = [g, e_i, e_K]

is the global context g beside one-hot vectors of the slot and, unlike in the authors'
code, of K: the posterior of a component depends on how many there are. An optional
trunk mixes the three once per (observation, K, slot), however many samples are drawn.
"""

import torch
from torch import Tensor, nn

from .flows import RowContext

__all__ = ["IndexedSlots"]


class IndexedSlots(nn.Module):
    """Slots told apart by their index.

    Args:
        context_features: Length of the global context.
        max_cardinality: Largest cardinality Kmax.
        trunk_features: Width of the trunk; None hands the concatenation on as it is.
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
        self, context: Tensor, owner: Tensor, cardinality: Tensor, slot: Tensor
    ) -> RowContext:
        """Build the contexts of N rows, each distinct one once.

        Args:
            context: Global contexts of the observations, shape ``(B, C)``.
            owner: Observation of each row, shape ``(N,)``.
            cardinality: K of each row, shape ``(N,)``.
            slot: Slot of each row, in 0..K-1, shape ``(N,)``.

        Returns:
            Contexts of the rows.
        """
        size = self.max_cardinality
        code = (owner * (size + 1) + cardinality) * size + slot
        distinct, index = torch.unique(code, return_inverse=True)
        slots = nn.functional.one_hot(distinct % size, size)
        rest = distinct // size
        parts = [context[rest // (size + 1)], slots.to(context)]
        if self.condition_on_cardinality:
            cardinalities = nn.functional.one_hot(rest % (size + 1), size + 1)
            parts.append(cardinalities.to(context))
        return RowContext(self.trunk(torch.cat(parts, dim=-1)), index)
