"""Draws of reversible-jump chains."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .draws import PosteriorDraws

__all__ = ["CollapsedDraws"]


@dataclass(frozen=True)
class CollapsedDraws(PosteriorDraws):
    """Draws of the collapsed sampler, one chain a seed.

    Attributes:
        acceptance: Share of each kind of move that was accepted.
    """

    acceptance: Mapping[str, float] = field(default_factory=dict)

    @property
    def statistics(self) -> dict[str, float]:
        """Effective sample size of the weights, and each move's acceptance."""
        moves = {f"acceptance_{move}": s for move, s in self.acceptance.items()}
        return {**super().statistics, "disagreement": self.disagreement, **moves}

    @property
    def cardinality_by_chain(self) -> Tensor:
        """Each chain's estimate of p(K | x), shape ``(chains, Kmax + 1)``."""
        k = self.layout.cardinality(self.theta)
        one_hot = torch.nn.functional.one_hot(k, self.layout.max_cardinality + 1)
        return one_hot.double().mean(1)

    @property
    def disagreement(self) -> float:
        """Mean total variation of p(K | x) between two chains, the sampler's floor."""
        probs = self.cardinality_by_chain
        first, second = torch.triu_indices(len(probs), len(probs), 1)
        distance = 0.5 * (probs[first] - probs[second]).abs().sum(-1)
        return float(distance.mean()) if len(distance) else math.nan
