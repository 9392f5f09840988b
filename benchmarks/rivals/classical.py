"""Classical answers: least squares with BIC, and subspaces with MDL."""

import math
from typing import Literal

import torch
from torch import Tensor

from sbi_slotflow import rjmcmc
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.problems.sinusoids.pursuit import matching_pursuit
from sbi_slotflow.seeding import generator_for

from .base import Answer, Rival
from .subspace import Subspace

__all__ = ["PursuitLaplace", "SubspaceMDL"]


class PursuitLaplace(Rival):
    """Matching pursuit, Gauss-Newton, and a Laplace posterior for each K.

    Args:
        weights: ``"bic"``: weights exp(-BIC / 2), with 3 K + 1 parameters, and the
            prior of K; ``"evidence"``: the pilot estimates of the evidences.
    """

    problem: Sinusoids

    def __init__(self, weights: Literal["bic", "evidence"]) -> None:
        self.weights = weights

    def infer(
        self, x: Tensor, num: int, seed: int, truth: Tensor | None = None
    ) -> Answer:
        """Fit every K and draw from their Laplace approximations."""
        proposal = rjmcmc.laplace_proposal(self.problem, x, seed=seed)
        probs = proposal.cardinality().probs.double()
        if self.weights == "bic":
            probs = self._by_bic(x)
        generator = generator_for(seed)
        k = torch.multinomial(probs, num, replacement=True, generator=generator)
        rows = [
            proposal.sample((int((k == size).sum()),), k=size, generator=generator)
            for size in k.unique().tolist()
        ]
        return Answer(probs, torch.cat(rows))

    def _by_bic(self, x: Tensor) -> Tensor:
        prior = self.problem.prior
        fits = matching_pursuit(
            x.double().numpy(),
            self.problem.statistics(x),
            prior.component_marginals[2].bounds,
            prior.max_cardinality,
            prior.min_separation or 0.0,
        )
        num = x.shape[-1]
        log_p = prior.log_cardinality_probs.double()
        score = torch.full_like(log_p, -torch.inf)
        for k, fit in enumerate(fits):
            log_fit = -0.5 * num * math.log(fit.energy / num)
            score[k] = log_fit - 0.5 * (3 * k + 1) * math.log(num)
        return (score + log_p).softmax(-1)


class SubspaceMDL(Rival):
    """The number of sinusoids by MDL from the first record; it knows no posterior.

    A real sinusoid is two exponentials. Only lines in the band count; frequencies are
    those of ESPRIT.
    """

    problem: Sinusoids

    def infer(
        self, x: Tensor, num: int, seed: int, truth: Tensor | None = None
    ) -> Answer:
        """Estimate K."""
        k = len(self.frequencies(x))
        probs = torch.zeros(self.problem.layout.max_cardinality + 1).double()
        probs[min(k, len(probs) - 1)] = 1.0
        return Answer(probs, None)

    def frequencies(self, x: Tensor) -> Tensor:
        """Frequencies of the lines in the band, in hertz, ascending."""
        grid = self.problem.grids[0]
        low, high = self.problem.prior.component_marginals[2].bounds
        record = x[: grid.num_samples].double().numpy()
        # A window no longer than a few hundred samples keeps the eigenvalues cheap.
        subspace = Subspace(record, min(len(record) // 2, 200))
        order = 2 * math.ceil(subspace.mdl(2 * self.problem.layout.max_cardinality) / 2)
        found = torch.from_numpy(subspace.esprit(order)) * grid.rate
        return found[(found > low) & (found < high)]
