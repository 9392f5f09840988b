"""The posterior under another prior, against closed forms and refinement under it."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import Independent, Normal, Uniform

from sbi_slotflow import VariableKPrior, problems
from sbi_slotflow.posterior.draws import RefinedPosterior, UnreliableWeights
from sbi_slotflow.posterior.refinable import ReweightedPosterior
from sbi_slotflow.rjmcmc import laplace_proposal
from sbi_slotflow.seeding import generator_for

LINEAR = problems.linear_gaussian()
EXACT = LINEAR.exact_posterior()
MEAN, TAU = torch.tensor([1.4, 0.1]), 0.4


def narrower() -> tuple[VariableKPrior, Any]:
    """Another prior of K and of the components, and its closed-form posterior."""
    prior = VariableKPrior(
        Independent(Normal(MEAN, torch.full((2,), TAU)), 1),
        [4, 2, 1, 1],
        component_names=("level", "slope"),
    )
    problem = replace(LINEAR, prior=prior, mean=MEAN, tau=TAU)
    return prior, problem.exact_posterior()


@pytest.fixture(name="x")
def _x() -> Tensor:
    generator = generator_for(7)
    return LINEAR.simulator(LINEAR.prior.sample((8,), generator), generator)


def assert_equal_probs(found: Tensor, expected: Tensor, ess: float) -> None:
    """Five standard errors of each of four numbers: false alarms below 3e-6."""
    error = (expected * (1 - expected) / ess).sqrt()
    assert ((found - expected).abs() <= 5 * error + 1e-6).all()


def test_draws_are_weighed_to_the_closed_form(x: Tensor) -> None:
    prior, exact = narrower()
    draws = EXACT.with_prior(prior, x[0], num_samples=20_000)
    assert isinstance(draws, RefinedPosterior)
    assert draws.pareto_k < 0.7
    assert draws.ess > 2_000
    expected = exact.cardinality(x[0]).probs.double()
    assert_equal_probs(draws.cardinality().probs.double(), expected, draws.ess)
    k = int(expected.argmax())
    rows = draws.sample((4_000,), k=k, generator=generator_for(1))[:, 1 : 1 + 2 * k]
    known = exact.sample((4_000,), x[0], k=k, generator=generator_for(2))
    known = known[:, 1 : 1 + 2 * k]
    # about 1,000 effective draws of both: five standard errors of the mean
    assert ((rows.mean(0) - known.mean(0)).abs() < 0.2 * known.std(0)).all()
    assert ((rows.std(0) / known.std(0) - 1).abs() < 0.15).all()


def test_a_posterior_for_any_observation(x: Tensor) -> None:
    prior, exact = narrower()
    posterior = EXACT.with_prior(prior)
    assert isinstance(posterior, ReweightedPosterior)
    assert posterior.prior is prior
    found = posterior.cardinality(x).probs.double()
    expected = exact.cardinality(x).probs.double()
    for one, other in zip(found, expected, strict=True):
        assert_equal_probs(one, other, ess=1_000)
    theta = exact.sample((200,), x[0], generator=generator_for(3))
    value, known = posterior.log_prob(theta, x[0]), exact.log_prob(theta, x[0])
    # both are q p / p' up to Z, which 10,000 draws tell to 2 %
    torch.testing.assert_close(value, known.double(), atol=0.1, rtol=1e-4)
    assert posterior.sample((5,), x[0]).shape == (5, LINEAR.layout.size)
    assert posterior.sample_batched((5,), x).shape == (5, 8, LINEAR.layout.size)


def test_another_cardinality_prior_is_bayes_rule(x: Tensor) -> None:
    weights = torch.tensor([1.0, 0.0, 5.0, 2.0])
    posterior = EXACT.with_prior(LINEAR.prior.with_cardinality(weights))
    expected = EXACT.cardinality(x).probs.double() * weights
    expected = expected / expected.sum(-1, keepdim=True)
    found = posterior.cardinality(x).probs.double()
    assert (found[:, 1] == 0).all()
    for one, other in zip(found, expected, strict=True):
        assert_equal_probs(one, other, ess=1_000)


def unlikely() -> tuple[Tensor, VariableKPrior, Any]:
    """Data with p(K = 3 | x) below 1 %, a prior of that K alone, its closed form."""
    x = LINEAR.design @ torch.tensor([0.0, 0.0])
    assert float(EXACT.cardinality(x).probs[3]) < 0.01
    prior = LINEAR.prior.with_cardinality([0, 0, 0, 1])
    return x, prior, replace(LINEAR, prior=prior).exact_posterior()


def test_a_cardinality_that_is_seldom_drawn_may_be_all_that_stays() -> None:
    x, prior, exact = unlikely()
    draws = EXACT.with_prior(prior, x)
    assert draws.ess > 9_000
    assert draws.pareto_k < 0.7
    theta = exact.sample((200,), x, generator=generator_for(3))
    value, known = EXACT.with_prior(prior).log_prob(theta, x), exact.log_prob(theta, x)
    torch.testing.assert_close(value, known.double(), atol=0.02, rtol=1e-4)


def test_refinement_under_it_has_as_many_draws() -> None:
    x, prior, exact = unlikely()
    refined = EXACT.refine(
        LINEAR.log_likelihood, x, 4_000, prior=prior, generator=generator_for(0)
    )
    assert isinstance(refined, RefinedPosterior)
    assert refined.ess > 3_000
    miss = refined.log_evidence - exact.log_evidence(x).item()
    assert abs(miss) <= 5 * refined.log_evidence_error + 0.01
    batch = torch.stack([x, x])
    both = EXACT.refine(
        LINEAR.log_likelihood, batch, 500, prior=prior, generator=generator_for(0)
    )
    assert isinstance(both, list)
    assert [one.x.shape for one in both] == [x.shape, x.shape]


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_refine_takes_another_prior(method: Any, x: Tensor) -> None:
    prior, exact = narrower()
    draws = EXACT.refine(
        LINEAR.log_likelihood,
        x[0],
        4_000,
        method=method,
        prior=prior,
        generator=generator_for(0),
    )
    assert isinstance(draws, RefinedPosterior)
    expected = exact.cardinality(x[0]).probs.double()
    # seven standard errors, see smc_test
    error = (expected * (1 - expected) / min(draws.ess, 2_000)).sqrt()
    found = draws.cardinality().probs.double()
    assert ((found - expected).abs() <= 7 * error).all()
    miss = draws.log_evidence - exact.log_evidence(x[0]).item()
    assert abs(miss) <= 7 * draws.log_evidence_error


def test_a_separation_can_be_asked_for_afterwards() -> None:
    tiny = problems.sinusoids("tiny", separation=0)
    apart = problems.sinusoids("tiny", separation=0.2).prior
    components = torch.tensor([[1.0, 1.0, 1.15], [0.9, 2.0, 1.3], [0.0, 0.0, 0.0]])
    theta = tiny.layout.pack(
        torch.tensor([2]), components.unsqueeze(0), torch.tensor([[0.6]])
    )
    x = tiny.simulator(theta, generator_for(4))[0]
    draws = laplace_proposal(tiny, x).with_prior(apart, x, num_samples=40_000)
    assert torch.isfinite(apart.log_prob(draws.sample((500,)))).all()
    before = tiny.prior.separated(draws.rows)
    assert before.all()


def test_a_prior_that_is_not_covered_is_refused(x: Tensor) -> None:
    tiny = problems.sinusoids("tiny")
    signal = tiny.simulator(tiny.prior.sample((1,), generator_for(1)))[0]
    posterior = laplace_proposal(tiny, signal)
    wide = problems.sinusoids("tiny", amplitude=(0.2, 1.5)).prior
    with pytest.raises(ValueError, match=r"amplitude from 0\.2.* \(training: 0\.5"):
        posterior.with_prior(wide)
    closer = problems.sinusoids("tiny", separation=0).prior
    with pytest.raises(ValueError, match="by their separation"):
        posterior.with_prior(closer, signal)
    noisier = problems.sinusoids("tiny", sigma=(0.1, 2.0)).prior
    with pytest.raises(ValueError, match=r"sigma from .* \(training: 0\.1 to 1"):
        posterior.refine(posterior.log_likelihood, signal, 100, prior=noisier)
    some = EXACT.prior.with_cardinality([1, 1, 0, 0])
    few = EXACT.with_prior(some)
    with pytest.raises(ValueError, match="training prior excludes"):
        replace(LINEAR, prior=some).exact_posterior().with_prior(LINEAR.prior)
    assert (few.cardinality(x[0]).probs[2:] == 0).all()
    with pytest.raises(ValueError, match="must have the layout"):
        EXACT.with_prior(tiny.prior)
    with pytest.raises(TypeError, match="must be a VariableKPrior"):
        EXACT.with_prior(BoxUniform(torch.zeros(2), torch.ones(2)))  # pyright: ignore
    with pytest.raises(ValueError, match="one observation"):
        EXACT.with_prior(some, x)


def test_weights_that_cannot_be_relied_on_are_told(x: Tensor) -> None:
    far = VariableKPrior(
        Independent(Normal(torch.tensor([6.0, 3.0]), torch.full((2,), 0.05)), 1),
        [0, 1, 1, 1],
        component_names=("level", "slope"),
    )
    with pytest.warns(UnreliableWeights, match="to the new prior"):
        EXACT.with_prior(far, x[0])


def test_draws_without_components_do_not_hide_the_tail_of_the_others() -> None:
    # p(K = 1 | x) is 0.69 under the new prior, which none of the draws comes near to,
    # while those with K = 0 all have the same weight
    far = VariableKPrior(
        Independent(Normal(torch.tensor([4.0, 0.0]), torch.full((2,), 0.05)), 1),
        [1, 1, 0, 0],
        component_names=("level", "slope"),
    )
    x = LINEAR.design @ torch.tensor([2.2, 0.0])
    with pytest.warns(UnreliableWeights, match="k-hat"):
        draws = EXACT.with_prior(far, x)
    assert draws.pareto_k > 0.7


def test_a_reweighted_posterior_is_refined_and_reweighted_again(x: Tensor) -> None:
    some = LINEAR.prior.with_cardinality([1, 2, 1, 0])
    fewer = LINEAR.prior.with_cardinality([1, 1, 0, 0])
    posterior = EXACT.with_prior(some)
    refined = posterior.refine(
        LINEAR.log_likelihood, x[0], 2_000, generator=generator_for(0)
    )
    assert isinstance(refined, RefinedPosterior)
    for found in (refined, posterior.with_prior(fewer)):
        assert (found.cardinality(x[0]).probs[3:] == 0).all()


@pytest.mark.parametrize(("half_width", "told"), [(0.02, True), (0.5, False)])
def test_a_cardinality_that_no_draw_shows_is_told(
    half_width: float, told: bool
) -> None:
    # of the narrow one hardly a draw of K > 0 stays, and yet it has most of the weight
    middle = torch.tensor([1.5, 0.0])
    prior = VariableKPrior(
        Independent(Uniform(middle - half_width, middle + half_width), 1),
        [1, 1, 1, 1],
        component_names=("level", "slope"),
    )
    x = LINEAR.design @ torch.tensor([0.8, 0.0])
    x = x + torch.randn(6, generator=generator_for(1))
    for draw in (
        lambda: EXACT.with_prior(prior, x),
        lambda: EXACT.with_prior(prior).cardinality(x),
        lambda: EXACT.refine(
            LINEAR.log_likelihood, x, 4_000, prior=prior, generator=generator_for(2)
        ),
    ):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            draw()
        assert any("k-hat = inf" in str(one.message) for one in found) == told
