import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor

from sbi_slotflow.problems import LinearGaussian, linear_gaussian

NORMAL: Any = stats.multivariate_normal  # scipy's own annotations are wrong


@pytest.fixture(params=[1, 2, 3], name="problem")
def _problem(request: pytest.FixtureRequest) -> LinearGaussian:
    return linear_gaussian(request.param)


def observations(problem: LinearGaussian, num: int = 3) -> Tensor:
    """Data of the prior, then zero data, then data far from everything."""
    x = problem.simulator(problem.prior.sample((num,)))
    return torch.cat([x, torch.zeros(1, 6), torch.linspace(-4, 9, 6)[None]])


def joint_gaussian(
    problem: LinearGaussian, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean and covariance of (theta_1..theta_k), the map to x, and that of x."""
    design = problem.design.double().numpy()
    mean = np.tile(problem.mean.double().numpy(), k)
    covariance = problem.tau**2 * np.eye(2 * k)
    to_x = np.tile(design, (1, k)) if k else np.zeros((6, 0))
    of_x = to_x @ covariance @ to_x.T + problem.sigma**2 * np.eye(6)
    return mean, covariance, to_x, of_x


def log_evidences(problem: LinearGaussian, x: Tensor) -> np.ndarray:
    """Evaluate log p(x | K) for K = 0..Kmax from dense covariances."""
    values = []
    for k in range(problem.layout.max_cardinality + 1):
        mean, _, to_x, of_x = joint_gaussian(problem, k)
        data = x.double().numpy()
        values.append(NORMAL.logpdf(data, to_x @ mean, of_x))
    return np.stack(values, -1)


def conditional(
    problem: LinearGaussian, k: int, x: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of labelled components given x and K = k, by inversion."""
    mean, covariance, to_x, of_x = joint_gaussian(problem, k)
    gain = covariance @ to_x.T @ np.linalg.inv(of_x)
    new_mean = mean + gain @ (x.double().numpy() - to_x @ mean)
    return new_mean, covariance - gain @ to_x @ covariance


def test_the_columns_of_the_design_are_orthonormal(problem: LinearGaussian) -> None:
    product = problem.design.double().mT @ problem.design.double()
    torch.testing.assert_close(product, torch.eye(2).double(), atol=1e-6, rtol=0)


def test_the_evidence_equals_that_of_dense_gaussians(problem: LinearGaussian) -> None:
    posterior, x = problem.exact_posterior(), observations(problem)
    expected = log_evidences(problem, x)
    found = posterior.log_evidence_by_cardinality(x)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, atol=1e-5)
    prior = problem.prior.cardinality_probs.double().numpy()
    joint = expected + np.log(prior)
    np.testing.assert_allclose(
        posterior.log_evidence(x), np.asarray(logsumexp(joint, axis=-1)), atol=1e-5
    )
    probs = np.exp(joint - logsumexp(joint, axis=-1, keepdims=True))
    np.testing.assert_allclose(posterior.cardinality(x).probs, probs, atol=1e-6)


def test_the_evidence_is_the_mean_likelihood_of_the_prior() -> None:
    problem = linear_gaussian()
    x = problem.simulator(problem.prior.sample())
    for k in range(4):
        weights = [float(j == k) for j in range(4)]
        theta = problem.prior.with_cardinality(weights).sample((50_000,))
        likelihood = problem.log_likelihood(theta, x).exp()
        expected = problem.exact_posterior().log_evidence_by_cardinality(x)[0, k].exp()
        error = likelihood.std() / math.sqrt(50_000) + 1e-6 * expected
        # 6 standard errors for each K: false alarm in less than 1 of 10^7 seeds
        assert abs(likelihood.mean() - expected) < 6 * error


def test_the_density_is_a_sum_over_labellings_of_the_dense_gaussian(
    problem: LinearGaussian,
) -> None:
    posterior, layout = problem.exact_posterior(), problem.layout
    for x in observations(problem):
        theta = torch.cat([posterior.sample((20,), x), problem.prior.sample((20,))])
        parts = layout.unpack(theta.double())
        log_k = log_evidences(problem, x)
        log_k = log_k - logsumexp(log_k)  # the prior of K is uniform
        expected = []
        for i, k in enumerate(parts.cardinality.tolist()):
            value = log_k[k]
            if k:
                labelled = [
                    parts.components[i, list(order)].flatten().numpy()
                    for order in permutations(range(k))
                ]
                mean, covariance = conditional(problem, k, x)
                value += logsumexp(NORMAL.logpdf(labelled, mean, covariance))
            expected.append(value)
        found = posterior.log_prob(theta, x)
        assert found.shape == (40,)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [1, 2])
def test_the_density_integrates_to_one_over_the_canonical_region(most: int) -> None:
    problem = linear_gaussian(most)
    posterior, layout = problem.exact_posterior(), problem.layout
    x = torch.tensor([0.2, 1.4, -0.3, 0.8, 1.1, 0.5])
    # the trapezium rule is as good as exact for a normal density wider than its step
    line = torch.linspace(-2.5, 2.5, 22)
    plane = torch.cartesian_prod(line + 1.0, line)
    step = (line[1] - line[0]).item()
    empty = layout.pack(torch.tensor([0]), torch.zeros(1, most, 2))
    shares = [posterior.log_prob(empty, x).exp().sum().item()]
    for k in range(1, most + 1):
        index = torch.arange(len(plane))
        grid = torch.cartesian_prod(*[index] * k).reshape(-1, k)
        components = torch.zeros(len(grid), most, 2)
        components[:, :k] = plane[grid]
        theta = layout.pack(torch.full((len(grid),), k), components)
        # all k! orders are on the grid, one of them is canonical
        total = posterior.log_prob(theta, x).exp().sum().item() / math.factorial(k)
        shares.append(total * step ** (2 * k))
    probs = posterior.cardinality(x).probs
    np.testing.assert_allclose(shares, probs, atol=1e-4)
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)


def test_the_density_is_the_same_for_every_labelling(problem: LinearGaussian) -> None:
    posterior = problem.exact_posterior()
    x = problem.simulator(problem.prior.sample())
    theta = posterior.sample((100,), x)
    torch.testing.assert_close(
        posterior.log_prob(problem.layout.relabel(theta), x),
        posterior.log_prob(theta, x),
    )


def test_bayes_rule_holds_for_every_set(problem: LinearGaussian) -> None:
    posterior = problem.exact_posterior()
    for x in observations(problem):
        theta = torch.cat([problem.prior.sample((200,)), posterior.sample((200,), x)])
        evidence = (
            problem.prior.log_prob(theta)
            + problem.log_likelihood(theta, x)
            - posterior.log_prob(theta, x)
        )
        expected = posterior.log_evidence(x).expand(400)
        torch.testing.assert_close(evidence, expected, rtol=1e-5, atol=1e-5)


def test_draws_are_canonical_and_inside_the_prior(problem: LinearGaussian) -> None:
    posterior = problem.exact_posterior()
    x = problem.simulator(problem.prior.sample())
    theta = posterior.sample((5000,), x)
    assert theta.dtype == torch.float32
    problem.layout.validate(theta)
    assert torch.equal(problem.layout.canonical(theta), theta)
    assert problem.prior.support.check(theta).all()


def test_every_cardinality_is_drawn_as_often_as_it_is_probable(
    problem: LinearGaussian,
) -> None:
    posterior = problem.exact_posterior()
    for x in problem.simulator(problem.prior.sample((4,))):
        theta = posterior.sample((20_000,), x)
        counts = torch.bincount(
            problem.layout.cardinality(theta),
            minlength=problem.layout.max_cardinality + 1,
        )
        expected = log_evidences(problem, x)
        expected = 20_000 * np.exp(expected - logsumexp(expected))
        common = expected > 5
        # false alarm in 1 of 10^6 seeds for each observation
        chi_square = (counts.numpy() - expected)[common] ** 2 / expected[common]
        assert stats.chi2.sf(chi_square.sum(), max(1, common.sum() - 1)) > 1e-6


@pytest.mark.parametrize("k", [1, 2, 3])
def test_draws_given_k_have_the_moments_of_the_dense_gaussian(k: int) -> None:
    problem, num = linear_gaussian(), 20_000
    x = problem.simulator(problem.prior.sample())
    theta = problem.exact_posterior().sample((num,), x, k=k)
    assert (problem.layout.cardinality(theta) == k).all()
    labelled = problem.layout.unpack(problem.layout.relabel(theta))
    draws = labelled.components[:, :k].double().flatten(1).numpy()
    mean, covariance = conditional(problem, k, x)
    scale = np.sqrt(np.diag(covariance))
    # 6 standard errors of at most 6 means and 21 covariances: 1 of 10^7 seeds
    assert (np.abs(draws.mean(0) - mean) < 6 * scale / math.sqrt(num)).all()
    error = np.sqrt(np.outer(scale**2, scale**2) + covariance**2) / math.sqrt(num)
    assert (np.abs(np.cov(draws.T) - covariance) < 6 * error).all()
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), (draws - mean).T)
    square = (whitened**2).sum(0)
    # false alarm in 1 of 10^6 seeds for each K
    assert stats.kstest(square, stats.chi2(2 * k).cdf).pvalue > 1e-6


def test_draws_average_inverse_densities_to_the_volume_of_a_box() -> None:
    """E_q[1{theta in box} / q(theta)] is the canonical volume of the box."""
    problem, num = linear_gaussian(2), 50_000
    posterior, layout = problem.exact_posterior(), problem.layout
    x = problem.simulator(problem.prior.sample())
    theta = posterior.sample((num,), x)
    k, _, components, mask = layout.unpack(theta)
    inverse = (-posterior.log_prob(theta, x)).exp()
    low, high = torch.tensor([0.8, -0.5]), torch.tensor([1.8, 0.5])
    inside = (((components > low) & (components < high)).all(-1) | ~mask).all(-1)
    for number, volume in [(0, 1.0), (1, 1.0), (2, 0.5)]:
        value = torch.where(inside & (k == number), inverse, 0.0)
        # 6 standard errors of three averages: false alarm in 1 of 10^8 seeds
        assert abs(value.mean() - volume) < 6 * value.std() / math.sqrt(num)


def test_a_batch_is_drawn_and_evaluated_like_its_rows(problem: LinearGaussian) -> None:
    posterior, x = problem.exact_posterior(), observations(problem)
    theta = posterior.sample_batched((7, 2), x)
    assert theta.shape == (7, 2, len(x), problem.layout.size)
    batched = posterior.log_prob_batched(theta[:, 0], x)
    assert batched.shape == (7, len(x))
    for b, row in enumerate(x):
        torch.testing.assert_close(
            batched[:, b], posterior.log_prob(theta[:, 0, b], row)
        )
    assert posterior.sample((7, 2), x[0]).shape == (7, 2, problem.layout.size)
    assert posterior.sample((), x[0]).shape == (problem.layout.size,)


def test_the_default_observation_is_used_where_none_is_given(
    problem: LinearGaussian,
) -> None:
    posterior = problem.exact_posterior()
    x = problem.simulator(problem.prior.sample())
    for call in (
        posterior.sample,
        posterior.log_evidence,
        posterior.cardinality,
        lambda: posterior.log_prob(problem.prior.sample((2,))),
    ):
        with pytest.raises(ValueError, match="no default x is set"):
            call()
    assert posterior.set_default_x(x) is posterior
    first = posterior.sample((9,), generator=torch.Generator().manual_seed(1))
    again = posterior.sample((9,), x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert torch.equal(posterior.log_prob(first), posterior.log_prob(first, x))
    torch.testing.assert_close(posterior.log_evidence(), posterior.log_evidence(x))
    probs = posterior.cardinality().probs
    torch.testing.assert_close(probs.flatten(), posterior.cardinality(x).probs)


def test_a_single_observation_has_one_categorical() -> None:
    problem = linear_gaussian()
    posterior, x = problem.exact_posterior(), observations(problem)
    assert posterior.cardinality(x).batch_shape == (len(x),)
    assert posterior.cardinality(x[0]).batch_shape == ()
    assert posterior.cardinality(x[:1]).batch_shape == (1,)
    assert posterior.set_default_x(x[0]).cardinality().batch_shape == ()


def test_a_generator_decides_the_draws_alone(problem: LinearGaussian) -> None:
    posterior = problem.exact_posterior()
    x = problem.simulator(problem.prior.sample())
    state = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    first = posterior.sample((50,), x, generator=generator)
    assert not torch.equal(posterior.sample((50,), x, generator=generator), first)
    again = posterior.sample((50,), x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sets_outside_the_prior_have_no_density() -> None:
    problem = linear_gaussian(2)
    posterior = problem.exact_posterior()
    x = problem.simulator(problem.prior.sample())
    padded = torch.tensor([1.0, 0.0, 0.0, 0.0, 1e-3])
    assert problem.prior.log_prob(padded) == -math.inf
    assert posterior.log_prob(padded, x) == -math.inf


def test_several_observations_are_refused_where_one_is_meant() -> None:
    problem = linear_gaussian()
    posterior, x = problem.exact_posterior(), torch.zeros(2, 6)
    with pytest.raises(ValueError, match="takes one observation, got a batch of 2"):
        posterior.sample((3,), x)
    with pytest.raises(ValueError, match="takes one observation, got a batch of 2"):
        posterior.log_prob(problem.prior.sample((3,)), x)


@pytest.mark.parametrize("k", [-1, 4])
def test_a_cardinality_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="k must be"):
        linear_gaussian().exact_posterior().sample((3,), torch.zeros(6), k=k)


@pytest.mark.parametrize("x", [torch.full((6,), math.nan), torch.zeros(5)])
def test_a_malformed_observation_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="x must"):
        linear_gaussian().exact_posterior().sample((3,), x)
