"""Faults are what they say, and nothing else."""

import math

import pytest
import torch
from by_hand import ByHand
from torch.distributions import Categorical

from sbi_slotflow import problems
from sbi_slotflow.calibration import faults
from sbi_slotflow.seeding import generator_for

problem = problems.linear_gaussian()
exact = problem.exact_posterior()
layout = problem.layout
tiny = problems.sinusoids("tiny")
ALL = [
    faults.narrowed,
    faults.shifted,
    faults.oversharp,
    faults.unmixed,
    faults.independent,
]
# Moments below are of 4,000 draws; all tolerances are 5 standard errors or more, so
# that a false alarm has a probability below 1e-5.
NUM = 4_000


def observation():
    theta = problem.prior.with_cardinality([0, 0, 1, 0]).sample((1,), generator_for(0))
    return problem.simulator(theta, generator_for(1))


def components(posterior, k=2):
    rows = posterior.sample((NUM,), observation(), k=k, generator=generator_for(2))
    return layout.unpack(rows).components[:, :k].double()


@pytest.mark.parametrize("fault", ALL)
def test_draws_are_sets_of_the_support_in_canonical_order(fault):
    theta = problem.prior.sample((6,), generator_for(3))
    x = problem.simulator(theta, generator_for(4))
    rows = fault(exact).sample_batched((50,), x, generator=generator_for(5))
    assert rows.shape == (50, 6, layout.size)
    assert problem.prior.support.check(rows).all()
    assert torch.equal(rows, layout.canonical(rows))


@pytest.mark.parametrize("fault", ALL)
def test_draws_have_the_cardinality_that_is_claimed(fault):
    x = observation()
    posterior = fault(exact)
    k = layout.cardinality(posterior.sample((NUM,), x, generator=generator_for(6)))
    share = k.bincount(minlength=4) / NUM
    assert (share - posterior.cardinality(x).probs).abs().max() < 5 * 0.5 / NUM**0.5
    given = posterior.sample((20,), x, k=3, generator=generator_for(6))
    assert (layout.cardinality(given) == 3).all()


def test_each_observation_of_a_batch_gets_its_own_draws():
    x = problem.simulator(
        problem.prior.sample((4,), generator_for(3)), generator_for(4)
    )
    totals = []
    for number, posterior in enumerate((exact, faults.FaultyPosterior(exact))):
        generator = generator_for(8, number)
        rows = posterior.sample_batched((NUM,), x, generator=generator)
        totals.append(layout.unpack(rows).components.double().sum((-2, -1)))
    right, found = (total.mean(0) for total in totals)
    error = 5 * (totals[0].var(0) * 2 / NUM).sqrt()
    assert ((found - right).abs() < error).all()
    assert (right[:, None] - right).abs().max() > 5 * error.max()  # they differ


@pytest.mark.parametrize("factor", [0.8, 1.5])
def test_narrowed_scales_standard_deviations_and_keeps_means(factor):
    found = components(faults.narrowed(exact, factor), 1)
    right = components(exact, 1)
    torch.testing.assert_close(found.std(0), factor * right.std(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.mean(0), right.mean(0), rtol=0, atol=1e-4)


def test_shifted_moves_means_by_half_a_standard_deviation():
    found, right = components(faults.shifted(exact)), components(exact)
    moved = (found.mean(0) - right.mean(0)) / right.std(0)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.std(0), right.std(0), rtol=1e-3, atol=0)


def test_oversharp_squares_the_probabilities_of_k_alone():
    x = observation()
    squared = exact.cardinality(x).probs.square()
    found = faults.oversharp(exact).cardinality(x).probs
    torch.testing.assert_close(found, squared / squared.sum())
    assert torch.equal(components(faults.oversharp(exact)), components(exact))


def test_unmixed_labels_never_cross_the_midpoints_of_their_means():
    key = components(faults.unmixed(exact), 3)[..., 0]
    mean = components(exact, 3)[..., 0].mean(0)
    cuts = 0.5 * (mean[1:] + mean[:-1])
    assert (key[:, :-1] < cuts + 1e-3).all()
    assert (key[:, 1:] > cuts - 1e-3).all()


def test_independent_removes_correlations_and_keeps_marginals():
    found, right = components(faults.independent(exact)), components(exact)

    def correlation(values):
        return torch.corrcoef(values[..., 1].T)[0, 1].abs()

    assert correlation(right) > 0.12  # it is -0.2
    assert correlation(found) < 5 / NUM**0.5
    levels = torch.arange(1, 10).double() / 10
    torch.testing.assert_close(
        found[..., 1].quantile(levels, dim=0),
        right[..., 1].quantile(levels, dim=0),
        rtol=0,
        atol=0.06,
    )


def test_angles_are_narrowed_on_the_circle():
    class Phases(ByHand):
        prior = tiny.prior
        event_shape = torch.Size((tiny.num_data,))  # type: ignore[assignment]

        def q_of_k(self, x):
            return Categorical(torch.tensor([[0.0, 1.0, 0.0, 0.0]]))

        def draw(self, shape, x, k, generator):
            rows = tiny.prior.with_cardinality([0, 1, 0, 0]).sample((*shape, len(x)))
            parts = tiny.layout.unpack(rows)
            turn = 0.2 * torch.randn(parts.mask.shape, generator=generator)
            components = parts.components.clone()
            components[..., 1] = turn.remainder(2 * math.pi)  # around the seam
            return tiny.layout.pack(parts.cardinality, components, parts.shared)

    x = torch.zeros(1, tiny.num_data)
    found = faults.narrowed(Phases())
    rows = found.sample_batched((NUM,), x, k=1, generator=generator_for(7))
    phase = tiny.layout.unpack(rows).components[:, 0, 0, 1]
    offset = (phase + math.pi).remainder(2 * math.pi) - math.pi
    assert offset.std() == pytest.approx(0.16, rel=5 / (2 * NUM) ** 0.5)
    assert tiny.prior.support.check(rows).all()


def test_another_prior_of_k_keeps_the_fault():
    weights = [0.4, 0.3, 0.2, 0.1]
    x = observation()
    found = faults.oversharp(exact).with_cardinality_prior(weights).cardinality(x).probs
    right = exact.cardinality(x).probs * torch.tensor(weights).double()
    right = (right / right.sum()).square()
    torch.testing.assert_close(found, right / right.sum(), rtol=1e-5, atol=1e-7)


def test_impossible_faults_are_refused():
    with pytest.raises(ValueError, match="factor must be positive, got 0"):
        faults.narrowed(exact, 0)
    with pytest.raises(ValueError, match="power must be positive, got -1"):
        faults.oversharp(exact, -1)
