"""The reference for Gaussian mixtures against integrals that need no sampler."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.mixture_evidence import exact_cardinality, log_evidence
from sbi_slotflow import problems
from sbi_slotflow.seeding import generator_for

SMALL = problems.gaussian_mixture(num_points=6, max_cardinality=2)


def some_points(problem: problems.Points, k: int, seed: int = 3) -> Tensor:
    chances = [0.0] * (problem.prior.max_cardinality + 1)
    chances[k] = 1.0
    rows = problem.prior.with_cardinality(chances).sample((1,), generator_for(seed))
    return problem.simulator(rows, generator_for(seed))[0]


def by_quadrature(problem: problems.Points, x: Tensor) -> float:
    """Log p(x | K = 1): the weight of a lone component is not seen."""
    mean, deviation = (
        marginal.quantile((torch.arange(2_000).double() + 0.5) / 2_000)
        for marginal in problem.prior.component_marginals[:2]
    )
    z = (x[:, 0].double() - mean[:, None, None]) / deviation[:, None]
    log_p = -0.5 * z.square() - deviation[:, None].log() - 0.5 * math.log(2 * math.pi)
    return float(log_p.sum(-1).logsumexp((0, 1)) - 2 * math.log(2_000))


def by_prior_draws(problem: problems.Points, x: Tensor, k: int) -> tuple[float, float]:
    """Log p(x | K) as the mean likelihood of draws from the prior, and its error."""
    chances = [0.0] * (problem.prior.max_cardinality + 1)
    chances[k] = 1.0
    rows = problem.prior.with_cardinality(chances).sample((400_000,), generator_for(1))
    values = problem.log_likelihood(rows, x)
    mean = values.logsumexp(0) - math.log(len(values))
    relative = (values - mean).exp()
    return float(mean), float(relative.std() / math.sqrt(len(relative)))


def test_evidence_of_one_component_is_that_of_quadrature() -> None:
    x = some_points(SMALL, 1)
    found = log_evidence(SMALL, x, 1, 500, 4, 6, 0)
    error = float(found.std()) / math.sqrt(6)
    # 6 repeats: |t| > 8 has a chance of 5e-4
    assert abs(float(found.mean()) - by_quadrature(SMALL, x)) < 8 * error + 1e-3
    assert error < 0.1


def test_probabilities_of_two_cardinalities_are_those_of_prior_draws() -> None:
    x = some_points(SMALL, 2)
    found = exact_cardinality(SMALL, x, num_particles=500, num_sweeps=4, repeats=6)
    (one, error_1), (two, error_2) = (by_prior_draws(SMALL, x, k) for k in (1, 2))
    expected = 1 / (1 + math.exp(one - two))
    slack = 0.25 * math.hypot(error_1, error_2)  # p (1 - p) is at most 1 / 4
    assert float(found.probs[2]) == pytest.approx(
        expected, abs=6 * (found.spread + slack)
    )
    assert 6 * (found.spread + slack) < 0.1
