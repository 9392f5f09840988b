"""Samplers that start from the prior given K: tempering, and nested sampling."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical

from sbi_slotflow import rjmcmc
from sbi_slotflow.posterior import refine
from sbi_slotflow.posterior.base import Posterior
from sbi_slotflow.posterior.refine import RefinedPosterior
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.distribution import SetDistribution
from sbi_slotflow.sets.prior import VariableKPrior

from .common import given_k, one

__all__ = ["NestedDraws", "nested", "tempered"]


class NestedDraws(NamedTuple):
    """What nested sampling found given K.

    Attributes:
        log_evidence: Log p(x | K).
        rows: Canonical theta rows, shape ``(S, E)``.
        weights: Their weights, which sum to one, shape ``(S,)``.
    """

    log_evidence: float
    rows: Tensor
    weights: Tensor


def tempered(
    problem: Sinusoids, x: Tensor, k: int, num_particles: int, seed: int
) -> RefinedPosterior:
    """Temper the prior given K into the posterior of x ``(T,)``."""
    return one(
        refine(
            _Prior(given_k(problem, k).prior, x),
            rjmcmc.laplace_proposal(problem, x).log_likelihood,
            x,
            num_particles,
            method="smc",
            defensive=0.0,
            generator=generator_for(seed, k),
        )
    )


def nested(
    problem: Sinusoids, x: Tensor, k: int, num_live: int, seed: int, **options: Any
) -> NestedDraws:
    """Shrink the prior given K onto the posterior of x ``(T,)`` with dynesty.

    Args:
        problem: The problem.
        x: The observation.
        k: Number of components.
        num_live: Live points.
        seed: Seed.
        options: Of dynesty's ``run_nested``: when to stop.

    Raises:
        ImportError: If dynesty is missing.
    """
    try:
        dynesty: Any = import_module("dynesty")
    except ImportError as error:
        raise ImportError(
            "nested sampling needs dynesty: pip install dynesty"
        ) from error
    prior, layout = problem.prior, problem.layout
    statistics = rjmcmc.laplace_proposal(problem, x).statistics
    low, high = np.array([m.bounds for m in prior.component_marginals]).T
    bottom, top = prior.shared_marginals[0].bounds
    gap = prior.min_separation or 0.0

    def transform(u: np.ndarray) -> np.ndarray:
        parts = u[1:].reshape(k, 3)
        components = low + parts * (high - low)
        # The prior's own map: sorted uniform points, then the gaps.
        room = high[2] - low[2] - gap * max(k - 1, 0)
        components[:, 2] = low[2] + np.sort(parts[:, 2]) * room
        components[:, 2] += gap * np.arange(k)
        return np.append(bottom + u[0] * (top - bottom), components)

    def log_likelihood(v: np.ndarray) -> float:
        sigma = np.array(max(v[0], 1e-6))
        return float(statistics.log_likelihood(v[1:].reshape(k, 3), sigma))

    sampler: Any = dynesty.NestedSampler(
        log_likelihood,
        transform,
        1 + 3 * k,
        nlive=num_live,
        sample="rwalk" if k else "unif",
        rstate=np.random.default_rng([seed, k]),
    )
    sampler.run_nested(print_progress=False, **options)
    found = sampler.results
    num = len(found.samples)
    components = torch.zeros(num, layout.max_cardinality, 3).double()
    samples = torch.from_numpy(found.samples)
    components[:, :k] = samples[:, 1:].reshape(num, k, 3)
    rows = layout.pack(torch.full((num,), k), components, samples[:, :1])
    weights = torch.from_numpy(found.importance_weights())
    return NestedDraws(float(found.logz[-1]), layout.canonical(rows), weights)


class _Prior(Posterior):
    """The prior as a proposal, whatever x is."""

    def __init__(self, prior: VariableKPrior, x: Tensor) -> None:
        self.prior, self._event_shape = prior, x.shape

    @property
    def event_shape(self) -> torch.Size:
        return self._event_shape

    def given(self, x: Tensor) -> SetDistribution:
        return _PriorSets(self.prior, len(x))


class _PriorSets(SetDistribution):
    def __init__(self, prior: VariableKPrior, num_observations: int) -> None:
        self.prior, self.layout = prior, prior.layout
        self.num_observations = num_observations

    def cardinality(self) -> Categorical:
        logits = self.prior.log_cardinality_probs
        return Categorical(logits=logits.expand(self.num_observations, -1))

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        assert k is None
        return self.prior.sample((*sample_shape, self.num_observations), generator)

    def log_prob(self, theta: Tensor) -> Tensor:
        return self.prior.log_prob(theta)
