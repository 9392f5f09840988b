"""The collapsed sampler of several classes: against the prior, and quadrature."""

import math
import warnings

import pytest
import torch
from scipy import stats
from torch import Tensor
from two_classes import bump, problem_of, wiggle

from sbi_slotflow import WhiteNoise, rjmcmc
from sbi_slotflow.problems.collapsed import Chains
from sbi_slotflow.problems.marginal_likelihood import Target


@pytest.mark.parametrize("total", [None, [1.0, 1.0, 0.0, 1.0]])
def test_data_that_say_nothing_leave_the_prior(total: list[float] | None) -> None:
    # false alarm: 7 chi2 and KS tests on about 1,000 independent draws, each 1e-4
    problem = problem_of(1e4, [1, 2, 2], [2, 1])
    if total is not None:  # no draws with two components: chains pass through them
        prior = problem.prior.with_cardinality(total)
        object.__setattr__(problem, "prior", prior)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = rjmcmc.collapsed(
            problem,
            torch.zeros(64),
            num_chains=100,
            num_levels=2,
            num_draws=10,
            thin=50,
            burn_in=500,
            seed=2,
        )
    layout, rows = problem.layout, draws.rows[draws.weights > 0]
    expected = problem.prior.log_joint.exp().flatten()
    possible = expected > 0
    counts = torch.bincount(layout.kind(rows), minlength=len(expected))
    assert (counts[~possible] == 0).all()
    counts = counts[possible].numpy()
    expected = expected[possible].double()
    expected = (expected / expected.sum() * len(rows)).numpy()
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    laws = {
        "bump": (stats.uniform(), stats.norm(0.5, 1)),
        "wiggle": (stats.norm(0.5, 1), stats.uniform(), stats.uniform(10, 50)),
    }
    for name, each in laws.items():
        own = layout.of_class(name).unpack(layout.view(rows, name))
        active = own.components[own.mask].numpy()
        for column, law in zip(active.T, each, strict=True):
            assert stats.kstest(column, law.cdf).pvalue > 1e-4


def log_marginal(columns: Tensor, x: Tensor, sigma: float) -> Tensor:
    """Log p(x) of sets of columns (S, k, T) with heights of N(.5, 1)."""
    shift = x - 0.5 * columns.sum(1)
    gram = columns @ columns.mT / sigma**2
    inner = torch.einsum("skt,st->sk", columns, shift) / sigma**2
    precision = gram + torch.eye(columns.shape[1]).to(gram)
    value = -0.5 * len(x) * math.log(2 * math.pi * sigma**2)
    value = value - 0.5 * shift.square().sum(-1) / sigma**2
    solved = torch.linalg.solve(precision, inner.unsqueeze(-1)).squeeze(-1)
    value = value + 0.5 * (inner * solved).sum(-1)
    return value - 0.5 * torch.linalg.slogdet(precision)[1]


def evidences(x: Tensor, sigma: float) -> Tensor:
    """Log p(x | K_bump, K_wiggle) of 0 or 1 each, by a grid of places and rates."""
    places = (torch.arange(128).double() + 0.5) / 128
    rates = 20 + 4 * (torch.arange(16).double() + 0.5) / 16
    ones = torch.ones_like(places)
    bumps = bump(torch.stack([places, ones], -1))
    grid = torch.cartesian_prod(torch.ones(1).double(), places, rates)
    wiggles = wiggle(grid)
    none = log_marginal(torch.zeros(1, 0, 64).double(), x, sigma)[0]
    mean = [
        log_marginal(columns, x, sigma).logsumexp(0) - math.log(len(columns))
        for columns in (bumps[:, None], wiggles[:, None])
    ]
    both = []
    for one in bumps:
        pairs = torch.stack([one.expand_as(wiggles), wiggles], 1)
        both.append(log_marginal(pairs, x, sigma))
    both = torch.cat(both)
    both = both.logsumexp(0) - math.log(len(both))
    return torch.stack([none, mean[1], mean[0], both])


@pytest.mark.parametrize("seed", [3, 4])
def test_numbers_of_each_class_are_those_of_quadrature(seed: int) -> None:
    sigma = 0.5
    problem = problem_of(sigma, [1, 1], [1, 1], rates=(20.0, 24.0))
    # Either alone does about as well as both: classes take turns.
    theta = torch.tensor([1.0, 1.0, 0.4, 0.7, 0.5, 0.42, 22.0])
    x = problem.simulator(theta, torch.Generator().manual_seed(seed))
    expected = evidences(x.double(), sigma).softmax(0)
    draws = rjmcmc.collapsed(problem, x, num_draws=400, thin=5, burn_in=300, seed=1)
    assert draws.converged
    assert draws.diagnostics is not None
    kind = problem.layout.kind(draws.rows)
    found = torch.bincount(kind, minlength=4).double() / len(kind)
    least = min(draws.diagnostics.ess[f"K_{name}"] for name in ("bump", "wiggle"))
    error = math.sqrt(0.25 / least)
    # five standard errors: 3e-7 for each of three, plus the grid's own error
    torch.testing.assert_close(found, expected, atol=5 * error + 0.005, rtol=0)


def test_a_class_that_is_linear_in_nothing_is_refused() -> None:
    problem = problem_of(0.5, [1, 1], [1, 1], linear=False)
    with pytest.raises(TypeError, match="has no collapsed sampler"):
        rjmcmc.collapsed(problem, torch.zeros(64))


def test_no_move_changes_what_a_class_has_not() -> None:
    problem = problem_of(0.5, [1, 1, 1], [1, 1, 1])
    form, x = problem.linear_form(), torch.zeros(64, dtype=torch.float64)
    assert form is not None
    target = Target(problem.prior, form, WhiteNoise(0.5), x)
    generator = torch.Generator().manual_seed(1)
    start = problem.prior.sample((200,), generator)
    chains = Chains(target, 200, 1, generator, start)
    found = 0
    for move in chains.moves.values():
        for _ in range(5):
            proposal = move()
            legal = torch.isfinite(proposal.log_ratio)
            u = proposal.u[legal][proposal.mask[legal]]
            label = chains.coordinates.label(u)
            rest = torch.where(chains.coordinates.free[label], u, 0.5)
            rest[:, 0] = (label + 0.5) / 2
            torch.testing.assert_close(u, rest, rtol=0, atol=0)
            found += len(u)
    assert found > 3_000
