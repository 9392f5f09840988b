"""Evidence and widths at one given K, against grids and the Cramer-Rao bound."""

import math

import numpy as np
import pytest
import torch
from sine_evidence import (
    evidence_of_none,
    evidence_of_one,
    evidence_of_two,
    observe,
)
from torch import Tensor

from sbi_slotflow import load_pretrained
from sbi_slotflow.posterior.convergence import NotConverged
from sbi_slotflow.posterior.refine import RefinedPosterior
from sbi_slotflow.problems import Problem, Sinusoids, sinusoids, spikes
from sbi_slotflow.rjmcmc import collapsed, fixed_k

tiny, paper = sinusoids("tiny"), sinusoids("paper")
BRIEF = {"num_draws": 1, "thin": 1, "burn_in": 0, "num_levels": 1}

pytestmark = pytest.mark.filterwarnings(
    "error::sbi_slotflow.posterior.refine.UnreliableWeights"
)


@pytest.mark.parametrize("sigma", [0.3, 0.6, 0.9])
def test_the_evidence_of_one_is_that_of_a_grid(sigma: float) -> None:
    x = observe(tiny, [[0.7, 1.0, 1.2]], sigma, seed=1)
    expected = evidence_of_one(tiny, x.numpy())
    result = fixed_k(tiny, x, 1)
    # its standard error is 0.0024 nats and the grid's 0.005
    assert result.log_evidence == pytest.approx(expected, abs=0.05)
    assert result.log_evidence_error < 0.005
    assert result.efficiency > 0.5


def test_the_evidence_of_none_is_that_of_a_grid() -> None:
    x = observe(tiny, [], 0.5, seed=1)
    result = fixed_k(tiny, x, 0)
    assert result.log_evidence == pytest.approx(
        evidence_of_none(tiny, x.numpy()), abs=0.01
    )
    assert (result.layout.cardinality(result.rows) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.2, 0.4])
def test_the_evidence_of_two_is_that_of_a_grid(sigma: float) -> None:
    truth = [[0.9, 1.0, 0.9], [1.2, 4.0, 1.5]]
    x = observe(tiny, truth, sigma, seed=2)
    expected = evidence_of_two(tiny, x.numpy(), np.array(truth), sigma)
    # standard error 0.0025 nats, the grid's about 0.01
    assert fixed_k(tiny, x, 2).log_evidence == pytest.approx(expected, abs=0.05)


def test_the_evidence_leaves_out_the_prior_of_k() -> None:
    x = observe(tiny, [[0.7, 1.0, 1.2]], 0.5, seed=1)
    weighted = Sinusoids(
        "weighted",
        tiny.prior.with_cardinality([0.9, 0.1, 0, 0]),
        tiny.simulator,
        tiny.grids,
    )
    first, second = (fixed_k(problem, x, 1) for problem in (tiny, weighted))
    assert first.log_evidence == pytest.approx(second.log_evidence, abs=1e-9)


def widths(result: RefinedPosterior, k: int) -> Tensor:
    """Relative sd of A, sd of phi and f of each component, shape ``(K, 3)``."""
    parts = result.layout.unpack(result.rows)
    components = parts.components[:, :k].clone()
    # phases about those of one draw, which are far from +-pi
    phase = components[..., 1] - components[result.weights.argmax(), :, 1]
    components[..., 1] = (phase + math.pi) % (2 * math.pi)
    weights = result.weights[:, None, None]
    mean = (weights * components).sum(0)
    sd = (weights * (components - mean).square()).sum(0).sqrt()
    return torch.stack([sd[:, 0] / mean[:, 0], sd[:, 1], sd[:, 2]], -1)


@pytest.mark.parametrize(
    ("k", "num_signals", "known", "tolerance"),
    [
        # Known are means over prior draws. Evenly spread amplitudes leave 1 % of spread
        # at K = 1. At K = 10 one component's width still varies by half its mean, as
        # neighbours do: 0.5 / sqrt(10 num_signals) is one standard error, and the
        # tolerance is 5 of them: false alarm in 2 of 10^6 seeds.
        (1, 8, (0.0126, 0.0151, 0.0227e-3), 0.07),
        (10, 2, (0.0168, 0.0260, 0.0285e-3), 0.5),
        pytest.param(10, 25, (0.0168, 0.0260, 0.0285e-3), 0.15, marks=pytest.mark.slow),
    ],
)
def test_widths_are_the_known_ones(
    k: int, num_signals: int, known: tuple[float, ...], tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(k)
    prior = paper.prior.with_cardinality([float(j == k) for j in range(11)])
    found, efficiency = [], []
    for i in range(num_signals):
        theta = prior.sample((1,), generator).double()
        components = paper.layout.unpack(theta).components[0, :k].clone()
        order = torch.randperm(k, generator=generator) + (i + 0.5) / num_signals
        components[:, 0] = 0.5 + order / k
        x = observe(paper, components.tolist(), 0.75, seed=i)
        result = fixed_k(paper, x, k, num_samples=4_000)
        efficiency.append(result.efficiency)
        found.append(widths(result, k))
    assert np.mean(efficiency) > 0.5
    # an amplitude beside a bound loses half the draws, or more
    assert min(efficiency) > 0.05
    mean = torch.cat(found).mean(0)
    assert mean.tolist() == pytest.approx(known, rel=tolerance)


def test_draws_have_k_components_and_repeat_with_the_seed() -> None:
    x = observe(tiny, [[0.7, 1.0, 0.8], [1.0, 1.0, 1.6]], 0.5, seed=1)
    first, again, other = (
        fixed_k(tiny, x, 2, num_samples=1000, seed=seed) for seed in (1, 1, 2)
    )
    assert (first.layout.cardinality(first.rows) == 2).all()
    assert torch.equal(first.theta, again.theta)
    assert first.log_evidence == again.log_evidence
    assert not torch.equal(first.theta, other.theta)
    # a standard error is 0.01
    assert first.log_evidence == pytest.approx(other.log_evidence, abs=0.1)
    row = fixed_k(tiny, x.unsqueeze(0), 2, num_samples=1000, seed=1)
    assert torch.equal(row.theta, first.theta)


@pytest.mark.parametrize("k", [-1, 11, 0])
def test_a_cardinality_that_the_prior_excludes_is_rejected(k: int) -> None:
    x = torch.zeros(paper.num_data)
    with pytest.raises(ValueError, match="k must be a cardinality that the prior"):
        fixed_k(paper, x, k)


@pytest.mark.parametrize("problem", [tiny, spikes()], ids=lambda problem: problem.name)
def test_chains_begin_where_they_are_told(problem: Problem) -> None:
    # as many components as there may be, at places that no fit would choose
    only = [0] * problem.prior.max_cardinality + [1]
    prior = problem.prior.with_cardinality(only)
    rows = prior.sample((5,), torch.Generator().manual_seed(1))
    x = problem.simulator(rows[0], torch.Generator().manual_seed(2))
    with pytest.warns(NotConverged):
        draws = collapsed(problem, x, start=rows, num_chains=7, **BRIEF)
    order = problem.layout.order_by
    begun, after = (
        problem.layout.unpack(part).components[..., order].double()
        for part in (rows[[0, 1, 2, 3, 4, 0, 1]], draws.theta[:, 0])
    )
    # one move changes two places at most
    here = (after.unsqueeze(-1) - begun.unsqueeze(-2)).abs() < 1e-6
    kept = here.any(-2).sum(-1) >= begun.shape[-1] - 2
    # of spikes, some rows give way as their amplitudes are drawn anew, by the data
    assert kept.sum() >= (7 if problem is tiny else 2), kept


def test_chains_that_begin_at_draws_of_a_network_end_at_the_posterior() -> None:
    x = observe(tiny, [[0.7, 1.0, 1.0], [1.0, 1.0, 1.3]], 0.9, seed=1)
    network = load_pretrained("sinusoids-tiny")
    before = torch.random.get_rng_state()
    runs = [collapsed(tiny, x, start=network, seed=s, num_chains=8) for s in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    draws, again, other = runs
    assert torch.equal(draws.theta, again.theta)
    expected = collapsed(tiny, x).cardinality().probs
    # standard errors are 0.004 or less
    for each in (draws, other):
        assert each.converged
        probs = each.cardinality().probs.tolist()
        assert probs == pytest.approx(expected.tolist(), abs=0.03)


def test_a_start_outside_the_support_is_refused() -> None:
    x = observe(tiny, [[0.7, 1.0, 1.0]], 0.5, seed=1)
    inside = tiny.prior.sample((2,), torch.Generator().manual_seed(1)).double()
    outside = inside.clone()
    outside[1, 1] = 1e3  # sigma
    with pytest.raises(ValueError, match=r"start must lie inside .* 1 of 2 rows"):
        collapsed(tiny, x, start=outside)
    with pytest.raises(ValueError, match="theta must"):
        collapsed(tiny, x, start=inside[:, :-1])
    with pytest.raises(ValueError, match="start must have at least one row"):
        collapsed(tiny, x, start=inside[:0])


def test_frozen_chains_have_not_converged() -> None:
    x = observe(tiny, [[0.9, 1.0, 1.0], [0.8, 2.0, 1.4]], 0.5, seed=1)
    # three strong components where there is nothing: no death leaves a likelier set
    far = tiny.layout.pack(
        torch.tensor(3),
        torch.tensor([[1.4, 0.0, 0.55], [1.4, 0.0, 0.8], [1.4, 0.0, 1.9]]),
        torch.tensor([0.5]),
    )
    for num_chains in (1, 4):
        with pytest.warns(NotConverged, match="inf"):
            draws = collapsed(tiny, x, start=far, num_chains=num_chains)
        assert draws.cardinality().probs[3] == 1.0
        assert not draws.converged


def test_chains_leave_starts_on_the_edge_of_the_support() -> None:
    problem = sinusoids("paper", sigma=(0.0, 1.5))
    places = torch.tensor([2.6, 2.6101, 2.7, 2.7101])
    truth = torch.stack([torch.ones(4), torch.ones(4), places], 1)
    x = observe(problem, truth.tolist(), 0.9, seed=2)
    components = torch.zeros(10, 3)
    # 2.61 - 2.60 falls short of the least separation by rounding
    components[:4] = truth
    components[:4, 2] = torch.tensor([2.6, 2.61, 2.7, 2.71])
    row = problem.layout.pack(torch.tensor(4), components, torch.tensor([0.0]))
    draws = collapsed(problem, x, start=row, num_draws=500, burn_in=5_000)
    assert draws.converged
    assert draws.cardinality().probs[4] > 0.99
    found = problem.layout.unpack(draws.rows).components[:, :4, 2].double()
    # of five deviations, 2e-5 each, and far from where they began
    assert ((found.mean(0) - places).abs() < 1e-4).all()
