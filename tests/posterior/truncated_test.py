"""The truncated prior, against rejection from the prior and closed forms."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sbi_slotflow import (
    AdditiveSimulator,
    SlotPosterior,
    WhiteNoise,
    load_pretrained,
    problems,
    slot_nn,
)
from sbi_slotflow.posterior.truncated import FewCandidates, TruncatedPrior
from sbi_slotflow.seeding import generator_for

LINEAR = problems.linear_gaussian()
EXACT = LINEAR.exact_posterior()
# The same with a signal to noise ratio of ten: the posterior is a small part.
QUIET = replace(
    LINEAR,
    simulator=AdditiveSimulator(
        LINEAR.simulator.component_signal, WhiteNoise(0.1), LINEAR.prior.layout
    ),
    sigma=0.1,
)


def observation(problem: problems.Problem, k: int, seed: int) -> Tensor:
    """Data of one truth with K components, ``(1, T)``."""
    rows = problem.prior.sample((200,), generator_for(seed))
    row = rows[rows[:, 0] == k][:1]
    return problem.simulator(row, generator_for(seed, 1))


def moments(truncated: TruncatedPrior, rows: Tensor) -> list[Tensor]:
    """What draws of the truncated prior are compared by, each ``(S,)``, float64."""
    ratio = truncated.log_ratio(rows)
    return [*rows[:, :3].double().T, ratio, ratio.square()]


@pytest.mark.parametrize(
    ("problem", "quantile"), [(LINEAR, 0.02), (QUIET, 0.02)], ids=["broad", "narrow"]
)
def test_draws_are_those_of_the_prior_that_lie_in_the_region(
    problem: problems.Problem, quantile: float
) -> None:
    posterior = problem.exact_posterior()  # type: ignore[attr-defined]
    truncated = posterior.truncated_prior(observation(problem, 1, 3), quantile)
    # broad: drawn from the prior; narrow: from the posterior, and thinned
    assert (truncated.log_threshold > 0) == (problem is QUIET)
    rows = truncated.sample((4_000,), generator_for(1))
    assert truncated.contains(rows).all()
    assert torch.equal(rows, problem.layout.canonical(rows))
    prior = problem.prior.sample((1_000_000,), generator_for(2))
    known = prior[truncated.contains(prior)]
    assert len(known) > 500
    # K, the first component and log r agree in mean, and log r in square: five standard
    # errors each, false alarms below 1e-5. Log r tells draws of the posterior apart.
    for a, b in zip(moments(truncated, rows), moments(truncated, known), strict=True):
        error = (a.var() / len(a) + b.var() / len(b)).sqrt()
        assert (a.mean() - b.mean()).abs() <= 5 * error
    # ... and the prior's probability of the region: its estimate from 20,000 draws of
    # the posterior has at most 1 in 50 effective, about 5 % error
    share = len(known) / len(prior)
    assert abs(float(truncated.acceptance_rate) / share - 1) < 0.3


def test_the_region_holds_the_share_of_the_posterior_that_was_asked_for() -> None:
    x = observation(QUIET, 2, 5)
    posterior = QUIET.exact_posterior()
    truncated = posterior.truncated_prior(x, 0.05)
    rows = posterior.sample((20_000,), x, generator=generator_for(4))
    # 0.05 from 20,000 draws twice: a standard error of 0.0022
    assert abs(1 - truncated.contains(rows).double().mean() - 0.05) < 0.011


def test_the_threshold_does_not_depend_on_units() -> None:
    """Densities of sets of different size have other units; their ratio has none."""
    x = observation(LINEAR, 1, 3)
    truncated = EXACT.truncated_prior(x, 0.2)
    rows = LINEAR.prior.sample((5_000,), generator_for(5))
    ratio = (EXACT.log_prob(rows, x) - LINEAR.prior.log_prob(rows)).double()
    assert torch.equal(truncated.contains(rows), ratio >= truncated.log_threshold)
    # by density alone the smallest sets would be in or out for their units
    density = EXACT.log_prob(rows, x)
    inside = truncated.contains(rows)
    assert density[inside].min() < density[~inside].max()


def test_its_density_is_the_priors_over_that_of_the_region() -> None:
    truncated = EXACT.truncated_prior(observation(LINEAR, 1, 3), 0.2)
    rows = LINEAR.prior.sample((20_000,), generator_for(6))
    values = truncated.log_prob(rows)
    inside = truncated.contains(rows)
    assert torch.equal(torch.isfinite(values), inside)
    assert torch.equal(truncated.support.check(rows), inside)
    # its integral, from draws of the prior: E[p~ / p] = 1, each error about 1 %
    ratio = (values - LINEAR.prior.log_prob(rows)).exp()
    assert abs(float(ratio.mean()) - 1) < 0.1


def test_a_region_that_the_prior_never_hits_is_drawn_from() -> None:
    """Three sinusoids: the region is 1e-13 of the prior, or less."""
    problem = problems.sinusoids("tiny")
    x = observation(problem, 3, 9)
    truncated = load_pretrained("sinusoids-tiny").truncated_prior(
        x, 0.05, num_draws=2_000
    )
    assert truncated.acceptance_rate < 1e-8
    # what is kept of the posterior's draws has to do with the quantile alone
    kept = truncated.acceptance_rate * math.exp(truncated.log_threshold)
    assert kept > 0.05 / 5
    with warnings.catch_warnings():
        warnings.simplefilter("error", FewCandidates)
        rows = truncated.sample((50,), generator_for(1))
    assert truncated.contains(rows).all()
    assert len(rows.unique(dim=0)) == 50


def test_candidates_are_bounded_and_repeated_rows_are_announced() -> None:
    x = observation(QUIET, 3, 5)
    truncated = QUIET.exact_posterior().truncated_prior(x, max_candidates=500)
    with pytest.warns(FewCandidates, match=r"500 candidates gave \d+ effective draws"):
        rows = truncated.sample((300,), generator_for(1))
    assert rows.shape == (300, 7)
    assert truncated.contains(rows).all()
    assert 1 < len(rows.unique(dim=0)) < 300


def test_repeated_rows_have_the_same_distribution() -> None:
    x = observation(QUIET, 1, 3)
    posterior = QUIET.exact_posterior()
    few = posterior.truncated_prior(x, 0.02, max_candidates=10_000)
    with pytest.warns(FewCandidates) as caught:
        rows = few.sample((10_000,), generator_for(1))
    ess = float(str(caught[0].message).split(" gave ")[1].split()[0])
    assert ess > 1_000
    exact = posterior.truncated_prior(x, 0.02).sample((10_000,), generator_for(2))
    for a, b in zip(moments(few, rows), moments(few, exact), strict=True):
        error = (a.var() / ess + b.var() / len(b)).sqrt()
        assert (a.mean() - b.mean()).abs() <= 5 * error  # false alarms below 1e-5


def test_draws_repeat_themselves_and_have_any_shape() -> None:
    truncated = EXACT.truncated_prior(observation(LINEAR, 1, 3))
    first, again, other = (
        truncated.sample((2, 5), generator_for(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (2, 5, 7)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert truncated.sample().shape == (7,)
    assert truncated.sample(0).shape == (0, 7)


def test_rows_outside_the_prior_are_outside_the_region() -> None:
    truncated = EXACT.truncated_prior(observation(LINEAR, 1, 3))
    row = LINEAR.prior.sample((1,), generator_for(1))
    row[:, 0] = 2.5
    assert not truncated.contains(row).any()


def test_malformed_arguments_are_named() -> None:
    x = observation(LINEAR, 1, 3)
    with pytest.raises(ValueError, match=r"quantile must lie between 0 and 1, got 1"):
        EXACT.truncated_prior(x, 1)
    with pytest.raises(ValueError, match=r"num_draws must be at least 10000 for quant"):
        EXACT.truncated_prior(x, num_draws=5_000)
    with pytest.raises(ValueError, match="takes one observation, got a batch of 2"):
        EXACT.truncated_prior(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="max_candidates must be at least 1"):
        EXACT.truncated_prior(x, max_candidates=0)


def test_a_posterior_without_a_density_is_refused_by_name() -> None:
    tiny = problems.sinusoids("tiny")
    theta = tiny.prior.sample((20,), generator_for(1))
    x = tiny.simulator(theta, generator_for(2))
    network = slot_nn(tiny, chart="circle", slots="global", hidden_features=8)
    posterior = SlotPosterior(network(theta, x), tiny.prior)
    with pytest.raises(NotImplementedError, match="truncated_prior needs log_prob"):
        posterior.truncated_prior(x[0])
