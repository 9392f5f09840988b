"""Samplers that see the likelihood: they need no training, and start anew each time."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from sbi_slotflow import rjmcmc
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.seeding import generator_for

from ..samplers_by_k import nested, tempered
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
        found = tempered(self.problem, x, k, self.num_live, seed)
        return found.log_evidence, found.rows, found.weights


class NestedByK(_ByK):
    """Nested sampling (dynesty) for each K."""

    def given_k(self, x: Tensor, k: int, seed: int) -> tuple[float, Tensor, Tensor]:
        """Shrink the prior given K onto the posterior."""
        return nested(self.problem, x, k, self.num_live, seed, dlogz=0.1)
