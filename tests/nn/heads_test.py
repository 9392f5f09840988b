"""The noise level's density given what a fit leaves."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import populations
import pytest
import torch
from populations import Quadrature
from sbi.utils import MultipleIndependent
from scipy import stats
from torch import Tensor
from trained import SilentTracker

from sbi_slotflow import SlotNPE, VariableKPrior, slot_nn
from sbi_slotflow.nn.background_head import BackgroundHead
from sbi_slotflow.nn.charts import WhiteningChart
from sbi_slotflow.nn.estimator import SlotDensityEstimator
from sbi_slotflow.nn.flows import RowContext
from sbi_slotflow.nn.heads import (
    NoiseHead,
    SetSummary,
    SharedGivenX,
    SharedHead,
)
from sbi_slotflow.problems import Problem
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.marginals import ClosedMarginal

NUM_DATA, LARGEST = 200, 3
EMBEDDING = torch.linspace(-1.0, 1.0, 12).reshape(2, 6)
# Residual levels inside the support, at its ends, and far off.
LEVELS = (0.5, 0.101, 0.995, 2.0, 0.02)


def noise_head(low: float = 0.1, shaken: float = 0.0) -> NoiseHead:
    chart = WhiteningChart((ClosedMarginal("uniform", low, 1.0),))
    head = NoiseHead(chart, NUM_DATA, EMBEDDING.shape[-1], LARGEST)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in head.parameters():
            parameter += shaken * torch.randn_like(parameter)
    return head.eval()


def rows(level: float, num: int, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Owners, cardinalities and log residual levels of rows that are alike."""
    one = torch.ones(num, dtype=torch.int64)
    return one, k * one, torch.full((num,), math.log(level), dtype=torch.float64)


def given(head: NoiseHead) -> SharedGivenX:
    return SharedGivenX(head, EMBEDDING, LARGEST + 1)


def log_density(head: NoiseHead, sigma: Tensor, level: float, k: int = 2) -> Tensor:
    owner, count, noise = rows(level, len(sigma), k)
    return given(head).log_prob(sigma.unsqueeze(-1), owner, count, noise)


@pytest.mark.parametrize("shaken", [0.0, 0.1])
@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_it_integrates_to_one_over_the_prior_support(
    level: float, shaken: float
) -> None:
    head = noise_head(shaken=shaken)
    sigma = torch.linspace(math.log(0.1), math.log(1.0), 200_001).double().exp()
    middle = (0.5 * (sigma[1:] + sigma[:-1])).float()
    mass = log_density(head, middle, level).double().exp() * sigma.diff()
    assert mass.sum() == pytest.approx(1.0, abs=2e-3)


@torch.no_grad()
def test_it_starts_as_the_residual_says() -> None:
    head = noise_head()
    sigma = torch.tensor([0.45, 0.5, 0.52])
    spread = 1 / math.sqrt(2 * NUM_DATA)
    log_sigma = sigma.log().numpy()
    expected = stats.norm.logpdf(log_sigma, math.log(0.5), spread) - log_sigma
    found = log_density(head, sigma, 0.5)
    torch.testing.assert_close(
        found.double(), torch.tensor(expected), atol=5e-3, rtol=0
    )


@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_draws_follow_it(level: float) -> None:
    head, num = noise_head(shaken=0.1), 5_000
    owner, count, noise = rows(level, num)
    generator = torch.Generator().manual_seed(0)
    draws = given(head).sample(owner, count, generator, noise)
    assert head.chart.contains(draws).all()
    sigma = torch.linspace(0.1, 1.0, 100_001)
    density = log_density(head, sigma, level).double().exp()
    below = torch.cumulative_trapezoid(density, sigma.double())
    grid, below = sigma[1:].numpy(), (below / below[-1]).numpy()
    # false alarm in 1 of 10^6 seeds, each level
    test = stats.kstest(
        draws.squeeze(-1).numpy(), lambda value: np.interp(value, grid, below)
    )
    assert test.pvalue > 1e-6


@torch.no_grad()
def test_it_depends_on_x_and_on_k() -> None:
    head = noise_head(shaken=0.1)
    sigma = torch.full((3,), 0.5)
    owner, count = torch.tensor([0, 1, 1]), torch.tensor([1, 1, 2])
    noise = torch.full((3,), math.log(0.5)).double()
    values = given(head).log_prob(sigma.unsqueeze(-1), owner, count, noise)
    assert values.unique().numel() == 3


@torch.no_grad()
def test_outside_the_support_it_is_zero() -> None:
    head = noise_head()
    assert (log_density(head, torch.tensor([0.05, 1.1]), 0.5) == -torch.inf).all()


@torch.no_grad()
def test_a_support_from_zero_is_no_trouble() -> None:
    head = noise_head(low=0.0)
    owner, count, noise = rows(1e-3, 1_000)
    generator = torch.Generator().manual_seed(0)
    draws = given(head).sample(owner, count, generator, noise).squeeze(-1)
    assert (draws > 0).all()
    assert draws.log().std() == pytest.approx(1 / math.sqrt(2 * NUM_DATA), rel=0.1)
    assert log_density(head, draws, 1e-3).isfinite().all()


def test_several_shared_parameters_are_refused() -> None:
    chart = WhiteningChart((ClosedMarginal("uniform", 0.1, 1.0),) * 2)
    with pytest.raises(ValueError, match="only shared parameter, got 2"):
        NoiseHead(chart, NUM_DATA, 6, LARGEST)


@pytest.mark.parametrize(
    "law",
    [
        torch.distributions.LogNormal(torch.zeros(1), 0.03 * torch.ones(1)),
        torch.distributions.Normal(3 * torch.ones(1), 0.2 * torch.ones(1)),
        torch.distributions.Uniform(-torch.ones(1), torch.ones(1)),
    ],
    ids=lambda law: type(law).__name__,
)
def test_a_background_that_data_do_not_know_has_its_prior(law: Any) -> None:
    # mean within five standard errors, deviation within 5 %: 1 of 10^5 seeds fails
    box = torch.distributions.Uniform(torch.zeros(1), torch.ones(1))
    shared = MultipleIndependent([law, box], validate_args=False)
    prior = VariableKPrior(box, [1.0, 1.0], shared=shared)
    head = BackgroundHead(WhiteningChart(prior.shared_marginals), [0, 1], None, None)
    num = 20_000
    context = RowContext(torch.zeros(1, 1), torch.zeros(num).long())
    zero = torch.zeros(num, 2).double()
    nothing = zero, torch.zeros(num, 2, 2).double()
    moments = (lambda shared: nothing), ()
    drawn = head.sample(context, torch.Generator().manual_seed(1), None, moments)
    exact = law.sample((100_000,)).squeeze(-1)
    error = 5 * float(exact.std()) * (1 / num + 1e-5) ** 0.5
    assert abs(float(drawn[:, 0].mean() - exact.mean())) < error
    assert float(drawn[:, 0].std() / exact.std()) == pytest.approx(1.0, abs=0.05)


def heights(num: int = 40) -> tuple[Tensor, Tensor]:
    """Components ``(N, 3, 1)`` and their numbers, the rest of the slots NaN."""
    generator = generator_for(0)
    count = torch.randint(0, LARGEST + 1, (num,), generator=generator)
    components = torch.randn(num, LARGEST, 1, generator=generator)
    there = torch.arange(LARGEST) < count.unsqueeze(-1)
    return torch.where(there.unsqueeze(-1), components, torch.nan), count


def population_head() -> SharedHead:
    chart = WhiteningChart((ClosedMarginal("normal", 0.0, 1.0),))
    shared = WhiteningChart((ClosedMarginal("normal", 0.0, 1.0),) * 2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        summary = SetSummary(chart, LARGEST)
        head = SharedHead(shared, EMBEDDING.shape[-1], LARGEST, summary)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.08 * torch.randn_like(parameter)
    return head.eval()


@torch.no_grad()
def test_a_summary_knows_no_order_and_no_empty_slot() -> None:
    components, count = heights()
    summary = population_head().summary
    assert summary is not None
    found = summary(components, count)
    assert torch.isfinite(found).all()
    place, num = torch.arange(LARGEST), count.unsqueeze(-1)
    turned = torch.where(place < num, num - 1 - place, place)
    again = summary(components.gather(1, turned.unsqueeze(-1)), count)
    assert torch.allclose(again, found, atol=1e-5)
    other = torch.where(components.isnan(), components, components + 1)
    changed = (summary(other, count) - found).abs().amax(-1) > 1e-4
    assert torch.equal(changed, count > 0)


@torch.no_grad()
def test_shared_parameters_of_a_population_follow_the_components() -> None:
    """Given two sets of one x, draws have the density of each; of 5 sigma."""
    head = SharedGivenX(population_head(), EMBEDDING, LARGEST + 1)
    axis = torch.linspace(-10.0, 10.0, 401)
    points = torch.cartesian_prod(axis, axis)
    means = []
    for value in (-1.0, 1.0):
        components = torch.full((20_000, LARGEST, 1), value)
        owner = torch.zeros(20_000, dtype=torch.int64)
        count = torch.full_like(owner, 2)
        draws = head.sample(owner, count, generator_for(2), components=components)
        given = owner, count, torch.zeros(20_000), components
        log_p = torch.cat(
            [
                head.log_prob(some, *(each[: len(some)] for each in given))
                for some in points.split(10_000)
            ]
        )
        weights = 0.05**2 * log_p.double().exp()
        assert weights.sum() == pytest.approx(1.0, abs=1e-3)
        mean = (weights.unsqueeze(-1) * points).sum(0)
        error = draws.double().std(0) / math.sqrt(len(draws))
        assert ((draws.double().mean(0) - mean).abs() < 5 * error + 1e-3).all()
        means.append(mean)
    assert (means[0] - means[1]).abs().max() > 0.03


def build(problem: Problem, sees: bool, theta: Tensor, x: Tensor):
    """A network whose shared head sees the components, or does not."""
    found = slot_nn(problem)(theta, x)
    if sees:
        return found
    other = SlotDensityEstimator(replace(found.spec, sees_components=False))
    other.standardize(x)
    return other


@pytest.mark.slow
def test_a_trained_head_is_near_the_exact_posterior() -> None:
    """In log q of the truth; without a look at components it is farther away.

    Of 2,000 sets, whose gains have a standard error of about 0.01.
    """
    problem = populations.problem()
    theta = problem.prior.sample((2_000,), generator_for(3))
    x = problem.simulator(theta, generator_for(4))
    exact = Quadrature(x).log_prob(theta.unsqueeze(0))[0]
    gaps = []
    for sees in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trainer = SlotNPE(
                problem.prior,
                partial(build, problem, sees),
                tracker=SilentTracker(),
                show_progress_bars=False,
            )
            trainer.train_online(problem.simulator, num_simulations=100_000)
        estimator = trainer.build_posterior().posterior_estimator
        with torch.no_grad():
            log_q = estimator.log_prob(theta.unsqueeze(0), x)[0]
        gaps.append(float((exact - log_q).mean()))
    assert gaps[0] < 0.15
    assert gaps[0] < gaps[1] - 0.1
