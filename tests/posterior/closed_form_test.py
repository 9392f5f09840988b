"""The trained posterior against one that is known in closed form.

Targets: mean total variation of p(K | x) at most 0.03, and a classifier two-sample
test on each component's marginal of at most 0.55.
"""

import pytest
import torch
from sbi.utils.metrics import c2st
from trained import linear_gaussian_posterior

from sbi_slotflow import problems
from sbi_slotflow.seeding import generator_for

problem = problems.linear_gaussian()
exact = problem.exact_posterior()


@pytest.fixture(scope="module")
def posterior():
    return linear_gaussian_posterior()


def observations(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = generator_for(1234)
    theta = problem.prior.sample((num,), generator)
    return theta, problem.simulator(theta, generator)


def test_cardinality_posterior_agrees_with_the_closed_form(posterior):
    # The mean over 2,000 signals has a standard error near 0.0003: no false alarm.
    _, x = observations(2_000)
    distance = (posterior.cardinality(x).probs - exact.cardinality(x).probs).abs()
    assert 0.5 * distance.sum(-1).mean() <= 0.03


@pytest.mark.parametrize("k", [1, 2, 3])
def test_component_marginals_agree_with_the_closed_form(posterior, k):
    # c2st of two equal distributions with 2,000 draws each scatters by about 0.011, so
    # that a false alarm takes more than four deviations.
    _, x = observations(200)
    here = int(exact.cardinality(x).probs[:, k].argmax())
    generator = generator_for(k)
    layout = problem.layout
    ours = layout.unpack(posterior.sample((2_000,), x[here], k, generator))
    theirs = layout.unpack(exact.sample((2_000,), x[here], k, generator))
    for j in range(k):
        score = c2st(ours.components[:, j], theirs.components[:, j])
        assert score <= 0.55


def test_log_density_is_close_to_the_exact_one(posterior):
    # The mean excess is the Kullback-Leibler divergence, positive by nature; factorised
    # slots cannot express the components' correlation and lose about 0.03 nats.
    theta, x = observations(2_000)
    ours = posterior.log_prob_batched(theta, x)[0]
    theirs = exact.log_prob_batched(theta.unsqueeze(0), x)[0]
    excess = (theirs - ours).mean()
    assert -0.02 <= excess <= 0.12
