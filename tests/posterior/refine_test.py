"""Refining to the posterior of a population, which quadrature gives."""

import math
from functools import partial

import populations
import pytest
import torch
from populations import Exact, Quadrature, WithoutPopulation
from torch import Tensor

from sbi_slotflow.nn.charts import WhiteningChart
from sbi_slotflow.posterior.component_proposals import pooled_components
from sbi_slotflow.posterior.draws import RefinedPosterior
from sbi_slotflow.posterior.importance import WithExtraComponent
from sbi_slotflow.posterior.moves import (
    EXCHANGES,
    DifferenceMove,
    ExchangeMove,
    Move,
    Population,
    metropolis,
)
from sbi_slotflow.posterior.refine import refine
from sbi_slotflow.seeding import generator_for

PROBLEM = populations.problem()
PRIOR, LAYOUT = PROBLEM.prior, PROBLEM.layout
X = PROBLEM.simulator(PRIOR.sample((4,), generator_for(0)), generator_for(1))
QUADRATURE = Quadrature(X)
# Standard errors by which an answer may be off.
SIGMAS = 5.0


def numbers(theta: Tensor) -> Tensor:
    """Whether K is 1 and 2, and the shared parameters, ``(..., 4)``."""
    k = LAYOUT.cardinality(theta)
    sizes = torch.stack([k == 1, k == 2], -1).double()
    return torch.cat([sizes, LAYOUT.unpack(theta).shared.double()], -1)


def wanted(index: int) -> Tensor:
    return torch.cat([QUADRATURE.probs[index, 1:], QUADRATURE.means[index]])


def misses(result: RefinedPosterior, index: int) -> Tensor:
    """Errors of p(K | x) and of the means, in standard errors of the draws."""
    draws = result.sample((20_000,), generator=generator_for(5))
    found = numbers(draws)
    error = found.std(0) / math.sqrt(min(result.ess, len(draws))) + 1e-3
    return (found.mean(0) - wanted(index)) / error


def test_quadrature_is_what_draws_of_the_prior_weigh() -> None:
    """Log p(x) by 200,000 draws: 5 sigma of 4, false alarms below 1e-5."""
    rows = PRIOR.sample((200_000,), generator_for(2))
    for index, x in enumerate(X):
        log_p = PROBLEM.log_likelihood(rows, x).double()
        found = float(log_p.logsumexp(0)) - math.log(len(rows))
        error = float((log_p - found).exp().std()) / math.sqrt(len(rows))
        assert abs(found - float(QUADRATURE.log_evidence[index])) < 5 * error + 1e-4
        weights = log_p.softmax(0).unsqueeze(-1)
        mean = (weights * numbers(rows)).sum(0)
        spread = (weights * (numbers(rows) - mean)).square().sum(0).sqrt()
        assert ((mean - wanted(index)).abs() < 5 * spread + 1e-4).all()


@pytest.mark.parametrize("index", range(len(X)))
def test_weights_lead_to_the_exact_posterior(index: int) -> None:
    """By 5 sigma of five numbers: false alarms below 1e-5."""
    result = refine(
        WithoutPopulation(PRIOR),
        PROBLEM.log_likelihood,
        X[index],
        40_000,
        generator=generator_for(3),
    )
    assert isinstance(result, RefinedPosterior)
    miss = result.log_evidence - float(QUADRATURE.log_evidence[index])
    assert abs(miss) < SIGMAS * result.log_evidence_error
    assert (misses(result, index).abs() < SIGMAS).all()


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(X)))
def test_moves_lead_to_the_exact_posterior(index: int) -> None:
    """Of 4 populations that share an error: 5 sigma, false alarms below 1e-3."""
    result = refine(
        WithoutPopulation(PRIOR),
        PROBLEM.log_likelihood,
        X[index],
        4_000,
        method="smc",
        generator=generator_for(4),
    )
    assert isinstance(result, RefinedPosterior)
    miss = result.log_evidence - float(QUADRATURE.log_evidence[index])
    assert abs(miss) < SIGMAS * result.log_evidence_error
    assert (misses(result, index).abs() < SIGMAS).all()


def test_without_the_population_the_answer_is_another() -> None:
    """So that the tests above could not pass by a prior of independent components."""
    posterior = WithoutPopulation(PRIOR)
    posterior.prior = posterior.alone
    result = refine(
        posterior, PROBLEM.log_likelihood, X[0], 40_000, generator=generator_for(3)
    )
    assert isinstance(result, RefinedPosterior)
    assert (misses(result, 0).abs() > SIGMAS).any()


def moves() -> dict[str, Move]:
    chart = WhiteningChart(PRIOR.component_marginals)
    shared = WhiteningChart(PRIOR.shared_marginals)
    proposal = partial(pooled_components, prior=PRIOR, chart=chart)
    found: list[Move] = [
        DifferenceMove(LAYOUT, chart, shared, moving)
        for moving in ("set", "component", "shared")
    ]
    found += [ExchangeMove(LAYOUT, name, proposal) for name in EXCHANGES]
    return {move.name: move for move in found}


@pytest.mark.parametrize("name", moves())
def test_each_move_leaves_the_exact_posterior_as_it_is(name: str) -> None:
    """20,000 independent rows, five times: 5 sigma of 5, false alarms below 1e-5."""
    index, generator = int(QUADRATURE.probs.min(-1).values.argmax()), generator_for(6)
    theta = Exact().given(X[index : index + 1]).sample((20_000,), generator=generator)

    def evaluate(rows: Tensor) -> Population:
        log_p = PRIOR.log_prob(rows).double()
        inside = torch.isfinite(log_p)
        log_p[inside] += PROBLEM.log_likelihood(rows[inside], X[index])
        return Population(rows, log_p, log_p)

    population = evaluate(theta[:, 0].double())
    for _ in range(5):
        population, rate = metropolis(
            population, moves()[name], 1.0, evaluate, generator
        )
        assert rate > 0.005
    rows = population.theta
    found = numbers(rows)
    # The product of heights and their mean tells whether they still belong together.
    both = LAYOUT.unpack(rows).components.sum(-2) * LAYOUT.unpack(rows).shared[:, :1]
    before = LAYOUT.unpack(theta[:, 0].double())
    start = before.components.sum(-2) * before.shared[:, :1]
    error = both.std() / math.sqrt(len(rows))
    assert (both.mean() - start.mean()).abs() < 2**0.5 * SIGMAS * error
    error = found.std(0) / math.sqrt(len(rows))
    assert ((found.mean(0) - wanted(index)).abs() <= SIGMAS * error + 2e-4).all()


def test_an_extra_component_comes_from_the_population_of_its_set() -> None:
    """Of draws of q', the mean of any density over q' is 1: false alarms below 1e-6."""
    sets = Exact().given(X[:1])
    proposal = WithExtraComponent(sets, PRIOR, 0.4, sets.log_prob)
    theta, counted = proposal.sample(40_000, generator_for(7))
    log_q = proposal.log_prob(theta)[:, 0]
    ratio = (sets.log_prob(theta)[:, 0] - log_q).exp() * counted[:, 0]
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert abs(float(ratio.mean()) - 1.0) < 5 * error
