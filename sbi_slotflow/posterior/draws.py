"""Draws of sets that stand for a posterior: what samplers and refinement return.

Draws may carry importance weights, and MCMC's come in chains. Either way they are a
posterior of one observation, without a density.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..sets.distribution import SetDistribution
from ..sets.layout import ThetaLayout
from .base import PosteriorOfOne
from .resampling import systematic

__all__ = ["PosteriorDraws"]


@dataclass(frozen=True)
class PosteriorDraws(PosteriorOfOne):
    """Draws from one observation's posterior.

    Attributes:
        layout: Layout of theta.
        theta: Theta rows in canonical order, shape ``(chains, draws, E)``.
        x: The observation, shape ``(T,)``.
        log_weights: Log importance weights, shape ``(chains, draws)``, up to a
            constant; None where all draws count the same.

    Raises:
        ValueError: If a shape is wrong, there is no draw, or none has a positive
            weight.
    """

    layout: ThetaLayout
    theta: Tensor
    x: Tensor
    log_weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.theta.ndim != 3:
            raise ValueError(
                "theta must have shape (chains, draws, E), got "
                f"{tuple(self.theta.shape)}."
            )
        self.layout.validate(self.theta)
        if not self.theta.numel():
            raise ValueError(
                f"theta must hold at least one draw, got {tuple(self.theta.shape)}."
            )
        if self.log_weights is None:
            return
        if self.log_weights.shape != self.theta.shape[:-1]:
            raise ValueError(
                f"log_weights must have shape {tuple(self.theta.shape[:-1])}, got "
                f"{tuple(self.log_weights.shape)}."
            )
        largest = self.log_weights.max()
        if not torch.isfinite(largest):
            raise ValueError(
                "log_weights must have a finite largest entry, got "
                f"{largest.item()}: no draw has a positive weight."
            )

    @property
    def rows(self) -> Tensor:
        """All draws, chain after chain, shape ``(chains * draws, E)``."""
        return self.theta.flatten(0, 1)

    @property
    def weights(self) -> Tensor:
        """Weights of :attr:`rows`, float64, summing to one."""
        if self.log_weights is None:
            num = len(self.rows)
            return torch.full((num,), 1 / num, dtype=torch.float64)
        return self.log_weights.flatten().double().softmax(-1)

    @property
    def ess(self) -> float:
        r"""Kish's effective sample size of the weights, :math:`1 / \sum_i w_i^2`.

        It knows nothing of the autocorrelation of a chain.
        """
        return float(1 / self.weights.square().sum())

    @property
    def statistics(self) -> dict[str, float]:
        """Numbers that tell how good the draws are, by name."""
        return {"ess": self.ess}

    @property
    def has_density(self) -> bool:
        """Whether ``log_prob`` exists: not from draws alone."""
        return False

    @property
    def _layout(self) -> ThetaLayout:
        return self.layout

    @property
    def _statistics(self) -> dict[str, float]:
        return self.statistics

    def _distribution(self) -> "DrawnSets":
        return DrawnSets(self.layout, self.rows, self.weights)

    def _drawn(
        self,
        distribution: SetDistribution,
        num_samples: int | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor | None]:
        if num_samples is not None:
            return super()._drawn(distribution, num_samples, generator)
        if self.log_weights is None:
            return self.theta, None
        return self.theta, self.weights.reshape(self.log_weights.shape)


class DrawnSets(SetDistribution):
    """Distribution of weighted rows.

    Args:
        layout: Layout of theta.
        rows: Theta rows in canonical order, shape ``(S, E)``.
        weights: Weights that sum to one, float64, shape ``(S,)``.
    """

    num_observations = 1

    def __init__(self, layout: ThetaLayout, rows: Tensor, weights: Tensor) -> None:
        self.layout, self.rows, self.weights = layout, rows, weights

    def cardinality(self) -> Categorical:
        """Return the estimate of p(K | x), batch shape ``(1,)``."""
        k = self.layout.cardinality(self.rows)
        probs = torch.zeros(self.layout.max_cardinality + 1, dtype=torch.float64)
        return Categorical(logits=probs.index_add(0, k, self.weights).log()[None])

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw rows of equal weight, shape ``(*sample_shape, 1, E)``.

        Draws are resampled systematically: each appears as often as its weight says, up
        to one. From draws of equal weight it takes evenly spaced ones.

        Raises:
            ValueError: If no draw of positive weight has k components.
        """
        weights = self.weights
        if k is not None:
            weights = weights * (self.layout.cardinality(self.rows) == k)
            if not weights.sum() > 0:
                raise ValueError(f"no draw has k={k} components and a positive weight.")
        num = torch.Size(sample_shape).numel()
        index = systematic(weights, num, generator)
        index = index[torch.randperm(num, generator=generator)]
        return self.rows[index].reshape(*sample_shape, 1, self.layout.size)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Raise: draws have no density.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "log_prob does not exist for draws. Ask the posterior that they were drawn "
            "from, or a problem's prior and log_likelihood."
        )
