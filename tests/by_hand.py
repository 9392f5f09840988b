"""Posteriors whose draws and densities a test writes down as functions of x."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Categorical

from sbi_slotflow.posterior.base import Posterior
from sbi_slotflow.sets.distribution import SetDistribution


class ByHand(Posterior):
    """A posterior of observations of six entries, made of functions of theta and x."""

    event_shape = torch.Size((6,))  # type: ignore[assignment]

    def given(self, x: Tensor) -> SetDistribution:
        return _Sets(self, x)

    @abstractmethod
    def q_of_k(self, x: Tensor) -> Categorical:
        """q(K | x), batch shape (B,)."""

    @abstractmethod
    def draw(
        self,
        shape: torch.Size,
        x: Tensor,
        k: int | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Rows (*shape, B, E)."""

    def density(self, theta: Tensor, x: Tensor) -> Tensor:
        """Log densities (S, B)."""
        raise NotImplementedError


class _Sets(SetDistribution):
    def __init__(self, posterior: ByHand, x: Tensor) -> None:
        self.posterior, self.x = posterior, x
        self.layout, self.num_observations = posterior.prior.layout, len(x)

    def cardinality(self) -> Categorical:
        return self.posterior.q_of_k(self.x)

    def sample(
        self, sample_shape: Sequence[int] = (), k=None, generator=None
    ) -> Tensor:
        return self.posterior.draw(torch.Size(sample_shape), self.x, k, generator)

    def log_prob(self, theta: Tensor) -> Tensor:
        return self.posterior.density(theta, self.x)
