"""The collapsed sampler of several classes: against the prior, and quadrature."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from two_classes import bump, problem_of, wiggle

from sbi_slotflow import AdditiveSimulator, WhiteNoise, rjmcmc
from sbi_slotflow.problems import Classes, Trace
from sbi_slotflow.problems.collapsed import Chains
from sbi_slotflow.problems.marginal_likelihood import Target


# The second has no draws with two components: chains pass through them.
@pytest.mark.parametrize("total", [None, [1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
def test_data_that_say_nothing_leave_the_prior(total: list[float] | None) -> None:
    # false alarm: 7 chi2 and KS tests on about 1,000 independent draws, each 1e-4
    problem = problem_of(1e4, [1, 2, 2], [2, 1])
    if total is not None:
        problem = Classes(problem.name, problem.members, cardinality=total)
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
        "wiggle": (stats.norm(1, 0.5), stats.uniform(), stats.uniform(10, 50)),
    }
    for name, each in laws.items():
        own = layout.of_class(name).unpack(layout.view(rows, name))
        active = own.components[own.mask].numpy()
        for column, law in zip(active.T, each, strict=True):
            assert stats.kstest(column, law.cdf).pvalue > 1e-4


def log_marginal(columns: Tensor, classes: list[int], x: Tensor, sigma: float):
    """Log p(x) of sets of columns (S, k, T) whose heights have their class's law."""
    mean = torch.tensor([0.5, 1.0]).double()[classes]
    deviation = torch.tensor([1.0, 0.5]).double()[classes]
    shift = x - (mean[:, None] * columns).sum(1)
    columns = deviation[:, None] * columns
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
    bumps = bump(torch.stack([places, torch.ones_like(places)], -1))
    wiggles = wiggle(torch.cartesian_prod(torch.ones(1).double(), places, rates))
    none = log_marginal(torch.zeros(1, 0, 64).double(), [], x, sigma)
    bump_alone = log_marginal(bumps[:, None], [0], x, sigma)
    wiggle_alone = log_marginal(wiggles[:, None], [1], x, sigma)
    both = [torch.stack([one.expand_as(wiggles), wiggles], 1) for one in bumps]
    together = torch.cat([log_marginal(pairs, [0, 1], x, sigma) for pairs in both])
    every = (none, wiggle_alone, bump_alone, together)
    return torch.stack([each.logsumexp(0) - math.log(len(each)) for each in every])


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


@pytest.mark.parametrize("label", [0, 1])
def test_steps_between_two_of_a_class_have_a_density(label: int) -> None:
    problem = problem_of(0.5, [1, 1, 1], [1, 1, 1])
    form, x = problem.linear_form(), torch.zeros(64, dtype=torch.float64)
    assert form is not None
    target = Target(problem.prior, form, WhiteNoise(0.5), x)
    chains = Chains(target, 1, 1, torch.Generator().manual_seed(1))
    centres = (torch.arange(300).double() + 0.5) / 300
    axes = [centres] * (1 + label)
    others = torch.cartesian_prod(*axes).reshape(-1, 1 + label)
    others = target.coordinates.of_class(others, label)
    middle = target.coordinates.of_class(
        torch.full((1, 1 + label), 0.5).double(), label
    )
    state = target.empty(len(others), torch.zeros(1, 0).double())
    state.mask[:, :2] = True
    state.u[:, 0], state.u[:, 1] = middle, others
    density = chains._log_pairs(state)[:, 0, 1].exp()
    # Some of the steps lead out of the cube.
    resolution = target.resolution[label][target.coordinates.free[label]]
    inside = [
        np.prod(2 * stats.norm.cdf(0.5 / (scale * resolution.numpy())) - 1)
        for scale in (0.1, 0.3, 1.0, 3.0)
    ]
    assert float(density.mean()) == pytest.approx(np.mean(inside), rel=1e-3)
    state.u[:, 1, 0] = (1 - label + 0.5) / 2
    assert torch.isneginf(chains._log_pairs(state)).all()


def test_numbers_that_nothing_needs_to_pass_are_left_out() -> None:
    """Two bumps in data of a prior with one component at most."""
    problem = problem_of(0.5, [1, 1, 1], [1, 1, 1])
    problem = Classes("one", problem.members, cardinality=[1, 1, 0, 0, 0])
    x = bump(torch.tensor([[0.2, 1.3], [0.7, 1.3]])).sum(0)
    x = x + 0.5 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = rjmcmc.collapsed(
            problem, x, num_chains=4, num_levels=2, num_draws=60, burn_in=200, seed=1
        )
    assert (draws.weights > 0).all()
    assert problem.prior.allows(draws.rows).all()


def test_what_is_not_linear_is_refused_by_its_name() -> None:
    problem = problem_of(0.5, [1, 1], [1, 1])
    member = problem.members["bump"]

    def square(components: Tensor) -> Tensor:
        return bump(components) * components[..., 1:]

    simulator = AdditiveSimulator(square, member.simulator.noise, member.layout)
    wrong = Trace("bump", member.prior, simulator, 32, linear=("height",))
    problem = Classes("wrong", {**problem.members, "bump": wrong})
    with pytest.raises(ValueError, match=r"must be linear in \['height'\]"):
        rjmcmc.collapsed(problem, torch.zeros(64))


def test_starts_may_be_those_of_chains() -> None:
    problem = problem_of(0.5, [1, 1], [1, 1])
    start = problem.prior.sample((2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = rjmcmc.collapsed(
            problem, torch.zeros(64), start=start, num_draws=2, burn_in=0, num_levels=1
        )
    assert draws.theta.shape == (8, 2, problem.layout.size)
    with pytest.raises(TypeError, match="has no Laplace proposal"):
        rjmcmc.fixed_k(problem, torch.zeros(64), 1)
