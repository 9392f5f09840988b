"""Samplers that see the likelihood: they need no training, and start anew each time."""

from importlib import import_module
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from sbi_slotflow import rjmcmc
from sbi_slotflow.prior import VariableKPrior
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.refinement import RefinedPosterior, refine
from sbi_slotflow.seeding import generator_for

from ..common import given_k
from .base import Answer, Rival, counted

__all__ = ["Eryn", "NestedByK", "SMCByK"]


class Eryn(Rival):
    """Eryn's reversible-jump MCMC with tempering.

    Args:
        start: Where walkers start.
        steps: Steps that are kept, after as many that are not.
    """

    samples_anew: ClassVar[bool] = True

    def __init__(self, start: Literal["prior", "truth"], steps: int) -> None:
        self.start: Literal["prior", "truth"] = start
        self.steps = steps

    def infer(
        self, x: Tensor, num: int, seed: int, truth: Tensor | None = None
    ) -> Answer:
        """Run the sampler."""
        given = truth if self.start == "truth" else None
        sampler = rjmcmc.eryn_sampler(
            self.problem, x, self.start, theta=given, seed=seed
        )
        draws = sampler.run(self.steps, burn_in=self.steps, thin=5)
        rows = draws.sample((num,), generator=generator_for(seed))
        return Answer(counted(self.problem.layout, rows), rows.float())


class _ByK(Rival):
    """A run for each K, whose evidences give p(K | x)."""

    samples_anew: ClassVar[bool] = True
    problem: Sinusoids

    def __init__(self, num_live: int) -> None:
        self.num_live = num_live

    def infer(
        self, x: Tensor, num: int, seed: int, truth: Tensor | None = None
    ) -> Answer:
        """Run for each K and mix the draws."""
        log_prior = self.problem.prior.log_cardinality_probs.double()
        found: dict[int, tuple[float, Tensor, Tensor]] = {}
        for k in log_prior.isfinite().nonzero().flatten().tolist():
            found[k] = self.given_k(x, k, seed)
        log_joint = torch.full_like(log_prior, -torch.inf)
        for k, (log_evidence, _, _) in found.items():
            log_joint[k] = log_prior[k] + log_evidence
        probs = log_joint.softmax(-1)
        generator = generator_for(seed, 1)
        counts = torch.multinomial(probs, num, replacement=True, generator=generator)
        rows = []
        for k, (_, draws, weights) in found.items():
            wanted = int((counts == k).sum())
            if wanted:
                index = torch.multinomial(
                    weights, wanted, replacement=True, generator=generator
                )
                rows.append(draws[index])
        return Answer(probs, torch.cat(rows).float())

    def given_k(self, x: Tensor, k: int, seed: int) -> tuple[float, Tensor, Tensor]:
        """Log evidence, draws ``(S, E)`` and their weights, given K."""
        raise NotImplementedError


class SMCByK(_ByK):
    """Sequential Monte Carlo from the prior, by tempering, for each K."""

    def given_k(self, x: Tensor, k: int, seed: int) -> tuple[float, Tensor, Tensor]:
        """Temper the prior given K into the posterior."""
        proposal = rjmcmc.laplace_proposal(self.problem, x)
        result = refine(
            _PriorProposal(given_k(self.problem, k).prior),
            proposal.log_likelihood,
            x,
            self.num_live,
            method="smc",
            defensive=0.0,
            generator=generator_for(seed, k),
        )
        assert isinstance(result, RefinedPosterior)
        rows = result.theta.reshape(-1, self.problem.layout.size)
        return float(result.log_evidence), rows, result.weights.flatten()


class NestedByK(_ByK):
    """Nested sampling (dynesty) for each K."""

    def given_k(self, x: Tensor, k: int, seed: int) -> tuple[float, Tensor, Tensor]:
        """Shrink the prior given K onto the posterior."""
        dynesty: Any = import_module("dynesty")
        problem, prior = self.problem, self.problem.prior
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
            nlive=self.num_live,
            sample="rwalk" if k else "unif",
            rstate=np.random.default_rng([seed, k]),
        )
        sampler.run_nested(print_progress=False, dlogz=0.1)
        found = sampler.results
        num = len(found.samples)
        components = torch.zeros(num, problem.layout.max_cardinality, 3).double()
        samples = torch.from_numpy(found.samples)
        components[:, :k] = samples[:, 1:].reshape(num, k, 3)
        rows = problem.layout.pack(torch.full((num,), k), components, samples[:, :1])
        weights = torch.from_numpy(found.importance_weights())
        return float(found.logz[-1]), problem.layout.canonical(rows), weights


class _PriorProposal:
    """The prior as a proposal."""

    def __init__(self, prior: VariableKPrior) -> None:
        self.prior = prior

    def sample_batched(
        self, sample_shape: torch.Size, x: Tensor, *, generator: torch.Generator | None
    ) -> Tensor:
        return self.prior.sample((*sample_shape, len(x)), generator)

    def log_prob_batched(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.prior.log_prob(theta)
