"""Draws of sets that stand for a posterior: what samplers and refinement return.

Draws may carry importance weights, and MCMC's come in chains. Either way they are a
posterior of one observation, without a density.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..sets.classes import ClassLayout
from ..sets.distribution import SetDistribution, counts_of_class
from ..sets.layout import ThetaLayout
from .base import PosteriorOfOne
from .convergence import Convergence
from .weights import systematic

__all__ = ["ChainDraws", "PosteriorDraws", "RefinedPosterior", "UnreliableWeights"]


# k-hat above which estimates from the weights are not to be trusted (Vehtari et al.
# 2024), and effective draws below which they are too few.
LARGEST_K_HAT = 0.7
FEWEST_EFFECTIVE = 100


class UnreliableWeights(UserWarning):
    """Importance weights with a tail too heavy, or too few effective draws."""


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
    theta: Tensor = field(repr=False)
    x: Tensor = field(repr=False)
    log_weights: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape = tuple(self.theta.shape)
        if len(shape) != 3:
            raise ValueError(f"theta must have shape (chains, draws, E), got {shape}.")
        self.layout.validate(self.theta)
        if not self.theta.numel():
            raise ValueError(f"theta must hold at least one draw, got {shape}.")
        if self.log_weights is None:
            return
        if self.log_weights.shape != shape[:-1]:
            raise ValueError(
                f"log_weights must have shape {shape[:-1]}, got "
                f"{tuple(self.log_weights.shape)}."
            )
        largest = self.log_weights.max().item()
        if not math.isfinite(largest):
            raise ValueError(
                f"log_weights must have a finite largest entry, got {largest}: no draw "
                "has a positive weight."
            )

    def __str__(self) -> str:
        """What the draws say of K, and how good they are."""
        chains, draws = self.theta.shape[:2]
        probs = ", ".join(f"{p:.3f}" for p in self.cardinality().probs.tolist())
        numbers = ", ".join(f"{n} {v:.4g}" for n, v in self.statistics.items())
        return (
            f"{type(self).__name__}: {draws} draws in each of {chains} chains\n"
            f"p(K | x) of K = 0, 1, ...: {probs}\n{numbers}"
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

    def of_class(self, name: str) -> "PosteriorDraws":
        """The same draws of one class's components alone.

        Raises:
            ValueError: If there is no such class.
        """
        if not isinstance(self.layout, ClassLayout):
            raise ValueError(f"these draws have no classes, got name={name!r}.")
        own, theta = self.layout.of_class(name), self.layout.view(self.theta, name)
        return PosteriorDraws(own, theta, self.x, self.log_weights)

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

    def _distribution(self) -> SetDistribution:
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


@dataclass(frozen=True)
class RefinedPosterior(PosteriorDraws):
    """Draws of the exact posterior of one observation.

    Attributes:
        log_evidence: Estimate of log p(x).
        log_evidence_error: Its standard error.
        pareto_k: k-hat of the weights; below 0.7 they can be believed.
        diagnostics: Numbers of the method: those of tempering steps and of sweeps of
            all moves, and the acceptance of each kind of move.
        convergence: How far independent populations of particles agree; None without.
    """

    log_evidence: float = math.nan
    log_evidence_error: float = math.nan
    pareto_k: float = math.nan
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    convergence: Convergence | None = None

    @property
    def converged(self) -> bool:
        """Whether independent populations agree; true of weighted draws."""
        return self.convergence is None or self.convergence.converged

    @property
    def statistics(self) -> dict[str, float]:
        """Effective sample size, k-hat, evidence, and the method's own numbers."""
        return {
            **super().statistics,
            "pareto_k": self.pareto_k,
            "log_evidence": self.log_evidence,
            "log_evidence_error": self.log_evidence_error,
            **self.diagnostics,
            **({} if self.convergence is None else self.convergence.statistics),
        }

    @property
    def efficiency(self) -> float:
        """Effective over actual number of draws."""
        return self.ess / len(self.rows)

    @property
    def is_reliable(self) -> bool:
        """Whether k-hat, the effective sample size and the populations pass."""
        enough = self.pareto_k <= LARGEST_K_HAT and self.ess >= FEWEST_EFFECTIVE
        return enough and self.converged and self.settled

    @property
    def settled(self) -> bool:
        """Whether all populations of particles have forgotten where they started."""
        return self.diagnostics.get("settled", 1.0) == 1.0


@dataclass(frozen=True)
class ChainDraws(PosteriorDraws):
    """Draws of a Markov chain Monte Carlo sampler, in chains.

    Attributes:
        diagnostics: Whether the chains have converged.
    """

    diagnostics: Convergence = field(default_factory=lambda: Convergence({}, {}))

    @property
    def converged(self) -> bool:
        """Whether the chains have converged; see :class:`Convergence`."""
        return self.diagnostics.converged

    @property
    def acceptance(self) -> Mapping[str, float]:
        """Share of each kind of move that was accepted."""
        return self.diagnostics.acceptance

    @property
    def statistics(self) -> dict[str, float]:
        """Effective sample size, disagreement, and all diagnostics."""
        numbers = self.diagnostics.statistics
        return {**super().statistics, "disagreement": self.disagreement, **numbers}

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


class DrawnSets(SetDistribution):
    """Distribution of rows ``(S, E)`` with weights ``(S,)`` that sum to one."""

    num_observations = 1

    def __init__(self, layout: ThetaLayout, rows: Tensor, weights: Tensor) -> None:
        self.layout, self.rows, self.weights = layout, rows, weights

    def cardinality(self) -> Categorical:
        """Return the estimate of p(K | x), batch shape ``(1,)``."""
        k = self.layout.cardinality(self.rows)
        probs = torch.bincount(k, self.weights, self.layout.max_cardinality + 1)
        return Categorical(logits=probs.log()[None])

    def class_cardinality(self, of: str) -> Categorical:
        """Return the estimate of p(K_c | x) of one class; see the base."""
        hot = counts_of_class(self.layout, self.rows, of)
        return Categorical(probs=(self.weights @ hot)[None])

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw rows of equal weight, resampled by :func:`.weights.systematic`."""
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
        """Raise NotImplementedError: draws have no density."""
        raise NotImplementedError(
            "log_prob does not exist for draws. Ask the posterior that they were drawn "
            "from, or a problem's prior and log_likelihood."
        )
