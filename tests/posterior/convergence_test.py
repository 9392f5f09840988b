"""Diagnostics of chains see the faults that happened."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from two_classes import problem_of

from sbi_slotflow import problems
from sbi_slotflow.posterior.convergence import (
    Convergence,
    NotConverged,
    PilesUp,
    convergence_of,
)

TINY = problems.sinusoids("tiny")
LAYOUT = TINY.layout


def chains(num: int = 4, draws: int = 500, seed: int = 0) -> Tensor:
    """Independent draws of the prior, in chains."""
    generator = torch.Generator().manual_seed(seed)
    return TINY.prior.sample((num, draws), generator).double()


def with_one(frequency: Tensor, sigma: Tensor | float = 0.5) -> Tensor:
    """Rows of one sinusoid at frequencies (chains, draws)."""
    components = torch.zeros(*frequency.shape, 3, 3, dtype=torch.float64)
    components[..., 0, :] = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    components[..., 0, 2] = frequency
    shared = torch.as_tensor(sigma, dtype=torch.float64).expand(*frequency.shape, 1)
    return LAYOUT.pack(torch.ones(frequency.shape).long(), components, shared)


def complaint(found: Convergence) -> str:
    with pytest.warns(NotConverged) as caught:
        found.warn()
    return str(caught[0].message)


def test_independent_draws_have_converged() -> None:
    theta = chains()
    found = convergence_of(TINY.prior, theta, theta[..., 1])
    assert found.converged
    names = ["K", "log_likelihood", "sigma", *(f"frequency_{i}" for i in (1, 2, 3))]
    assert list(found.rhat) == list(found.ess) == names
    # of 2,000 independent draws; R-hat of 4 chains of 500 stays below 1.02
    assert found.worst_rhat < 1.02
    assert found.least_ess > 1_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.warn()


def test_frozen_chains_are_seen() -> None:
    # the faults of old: one value in 2,000 draws, while K agrees
    places = torch.tensor([1.0, 1.1, 1.2, 1.3], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    sigma = 0.4 + 0.01 * torch.randn(4, 500, 1, generator=generator).double()
    theta = with_one(places.unsqueeze(1).expand(4, 500), sigma)
    found = convergence_of(TINY.prior, theta)
    assert found.rhat["K"] == 1.0
    assert found.rhat["frequency_1"] == math.inf
    assert not found.converged
    assert "R-hat of frequency_1 is inf" in complaint(found)
    # all at one place, as chains that never left their start
    found = convergence_of(TINY.prior, with_one(torch.full((4, 500), 1.1), sigma))
    assert found.rhat["frequency_1"] == math.inf


@pytest.mark.parametrize("moved", ["frequency", "sigma", "log_likelihood"])
def test_a_chain_in_another_place_is_seen_though_cardinalities_agree(
    moved: str,
) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = 0.01 * torch.randn(4, 500, generator=generator, dtype=torch.float64)
    away = torch.tensor([0.0, 0.0, 0.0, 0.3]).unsqueeze(1)
    frequency = 1.0 + noise + (away if moved == "frequency" else 0.0)
    sigma = 0.4 + noise.flip(0) + (away if moved == "sigma" else 0.0)
    value = noise.flip(1) + (away if moved == "log_likelihood" else 0.0)
    theta = with_one(frequency, sigma.unsqueeze(-1))
    found = convergence_of(TINY.prior, theta, value)
    wrong = {name for name, rhat in found.rhat.items() if rhat > 1.05}
    assert wrong == {"frequency_1" if moved == "frequency" else moved}


def test_disagreement_about_the_cardinality_is_seen() -> None:
    theta = chains()
    none = TINY.prior.with_cardinality([1, 0, 0, 0])
    theta[2:] = none.sample((2, 500), torch.Generator().manual_seed(2))
    found = convergence_of(TINY.prior, theta)
    assert found.rhat["K"] > 1.3


def test_slow_chains_hold_few_effective_draws() -> None:
    generator = torch.Generator().manual_seed(3)
    steps = torch.randn(4, 500, generator=generator, dtype=torch.float64)
    walk = torch.zeros(4, dtype=torch.float64)
    values = []
    for step in steps.T:  # an autocorrelation time of 400 draws
        walk = 0.995 * walk + 0.1 * step
        values.append(walk)
    theta = with_one(1.2 + 0.05 * torch.stack(values, 1))
    found = convergence_of(TINY.prior, theta)
    assert found.ess["frequency_1"] < 100
    assert "effective draws" in complaint(found)


def test_particles_beside_their_copies_count_as_independent() -> None:
    theta = chains(4, 100).repeat_interleave(5, 1)
    ordered = convergence_of(TINY.prior, theta)
    shuffled = convergence_of(TINY.prior, theta, independent=True)
    assert ordered.ess["sigma"] < 0.5 * shuffled.ess["sigma"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"k": 3}, r"K = 3 \(100%\)"),
        ({"sigma": 0.1005}, r"sigma \(low\) \(100%\)"),
        ({"sigma": 0.9999}, r"sigma \(high\) \(100%\)"),
        ({"frequency": 1.999}, r"frequency \(high\) \(100%\)"),
    ],
)
def test_draws_on_a_bound_are_told(row: dict[str, Any], message: str) -> None:
    if "k" in row:
        only = TINY.prior.with_cardinality([0, 0, 0, 1])
        theta = only.sample((4, 100), torch.Generator().manual_seed(4)).double()
    else:
        place = torch.full((4, 100), row.get("frequency", 1.2), dtype=torch.float64)
        theta = with_one(place, row.get("sigma", 0.5))
    found = convergence_of(TINY.prior, theta)
    with pytest.warns(PilesUp, match=message):
        found.warn()


def test_a_circle_has_no_bounds() -> None:
    theta = with_one(torch.full((4, 100), 1.2, dtype=torch.float64))
    theta[..., 3] = 1e-3  # the phase
    found = convergence_of(TINY.prior, theta)
    assert not any(name.startswith("phase") for name in found.at_bounds)


def test_all_numbers_have_names() -> None:
    theta = chains(4, 100)
    found = convergence_of(TINY.prior, theta, acceptance={"walk": 0.4})
    numbers = found.statistics
    assert numbers["acceptance_walk"] == 0.4
    assert numbers["rhat_K"] == found.rhat["K"]
    assert numbers["ess_sigma"] == found.ess["sigma"]
    assert numbers["at_bound_K = 3"] == found.at_bounds["K = 3"]


def test_the_largest_cardinality_is_no_bound_if_the_prior_is_mostly_there() -> None:
    prior = TINY.prior.with_cardinality([0, 0, 1, 2])
    theta = prior.sample((4, 100), torch.Generator().manual_seed(5)).double()
    assert not any(n.startswith("K") for n in convergence_of(prior, theta).at_bounds)


def test_shares_of_k_that_no_move_has_changed_are_those_of_the_start() -> None:
    still = Convergence({"K": 1.0}, {"K": 500.0}, jumps=3)
    assert not still.converged
    with pytest.warns(NotConverged, match=r"K changed 3 times \(at least 100\). Begin"):
        still.warn("Begin elsewhere.")
    assert Convergence({"K": 1.0}, {"K": 500.0}, jumps=100).converged
    assert Convergence({"K": 1.0}, {"K": 500.0}).converged


def test_only_what_is_wrong_is_complained_of() -> None:
    bad = Convergence({"K": 1.3, "sigma": 1.0}, {"K": 170.0, "sigma": 900.0})
    with pytest.warns(NotConverged) as found:
        bad.warn()
    assert "effective draws" not in str(found[0].message)


def test_only_draws_that_count_are_compared() -> None:
    prior = TINY.prior
    theta = prior.sample((4, 200), torch.Generator().manual_seed(5)).double()
    counted = torch.rand(4, 200, generator=torch.Generator().manual_seed(1)) < 0.5
    fewest = int(counted.sum(-1).min())
    found = convergence_of(prior, theta, counted=counted)
    rows = zip(theta, counted, strict=True)
    same = torch.stack([row[each][:fewest] for row, each in rows])
    assert found.least_ess < 1.5 * convergence_of(prior, same).least_ess
    # What does not count may be anything.
    spoilt = torch.where(counted.unsqueeze(-1), theta, theta[0, 0])
    assert convergence_of(prior, spoilt, counted=counted) == found
    counted[2, 3:] = False
    none = convergence_of(prior, theta, counted=counted)
    assert not none.converged
    assert none.worst_rhat == math.inf


def test_bounds_of_a_class_are_those_of_all_together() -> None:
    problem = problem_of(0.5, [1, 1, 1], [1, 1, 1])
    full = problem.prior.with_cardinality([0, 0, 0, 0, 1])
    theta = full.sample((4, 100), torch.Generator().manual_seed(5)).double()
    assert not any(n.startswith("K") for n in convergence_of(full, theta).at_bounds)
    few = problem.prior.with_cardinality([9, 1, 0, 0, 0])
    theta = few.with_cardinality([0, 1, 0, 0, 0]).sample((4, 100)).double()
    found = convergence_of(few, theta).at_bounds
    assert found["K_bump = 1"] + found["K_wiggle = 1"] == pytest.approx(1.0)
