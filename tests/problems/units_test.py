"""Data in another unit give the same answers in that unit.

Units are powers of two, near 1e-21 and 1e+21, so that nothing is rounded otherwise.
"""

import math
from typing import Any

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor

from sbi_slotflow import AdditiveSimulator, VariableKPrior, WhiteNoise, rjmcmc
from sbi_slotflow.problems import AdditiveFit, Sinusoids, sinusoids, spikes
from sbi_slotflow.seeding import generator_for

UNITS = [2.0**-70, 2.0**70]


def tiny_in(unit: float) -> Sinusoids:
    return sinusoids(
        "tiny", amplitude=(0.5 * unit, 1.5 * unit), sigma=(0.125 * unit, unit)
    )


def in_unit(problem: Sinusoids, theta: Tensor, unit: float) -> Tensor:
    """Rows with amplitudes and sigma in another unit."""
    parts = problem.layout.unpack(theta)
    scale = parts.components.new_tensor([unit, 1.0, 1.0])
    return problem.layout.pack(
        parts.cardinality, scale * parts.components, unit * parts.shared
    )


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def observation(k: int = 2) -> Tensor:
    problem = tiny_in(1.0)
    weights = [float(i == k) for i in range(4)]
    theta = problem.prior.with_cardinality(weights).sample((1,), generator_for(3))
    return problem.simulator(theta, generator_for(4))[0].double()


@pytest.mark.parametrize("unit", UNITS)
def test_likelihoods_differ_by_the_unit_alone(unit: float) -> None:
    one, other = tiny_in(1.0), tiny_in(unit)
    theta, x = one.prior.sample((150,), generator_for(1)).double(), observation()
    expected = one.log_likelihood(theta, x) - one.num_data * math.log(unit)
    found = other.log_likelihood(in_unit(one, theta, unit), unit * x)
    same(found, expected)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("unit", UNITS)
def test_the_laplace_proposal_is_the_same(unit: float, k: int) -> None:
    x = observation(k)
    one = rjmcmc.laplace_proposal(tiny_in(1.0), x)
    other = rjmcmc.laplace_proposal(tiny_in(unit), unit * x)
    same(other.cardinality().probs, one.cardinality().probs)
    rows = one.sample((20,), generator=generator_for(0))
    found = other.sample((20,), generator=generator_for(0))
    same(found, in_unit(tiny_in(1.0), rows, unit))


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("unit", UNITS)
def test_the_exact_sampler_is_the_same(unit: float, silent: bool) -> None:
    pytest.importorskip("numba")
    x = 0 * observation() if silent else observation()
    options: dict[str, Any] = {
        "seed": 1,
        "num_chains": 2,
        "num_draws": 50,
        "thin": 5,
        "burn_in": 100,
    }
    one = rjmcmc.collapsed(tiny_in(1.0), x, **options)
    other = rjmcmc.collapsed(tiny_in(unit), unit * x, **options)
    expected = in_unit(tiny_in(1.0), one.theta, unit)
    same(other.theta, expected)
    assert other.theta.isfinite().all()


@pytest.mark.parametrize("unit", UNITS)
def test_least_squares_start_alike(unit: float) -> None:
    pulses = spikes(num_samples=128)

    def fit(unit: float) -> AdditiveFit:
        component = BoxUniform(
            torch.tensor([0.0, 0.006, 0.5 * unit]), torch.tensor([1.0, 0.03, 2 * unit])
        )
        prior = VariableKPrior(component, [1.0, 1.0])
        simulator = AdditiveSimulator(
            pulses.simulator.component_signal, WhiteNoise(), prior.layout
        )
        return AdditiveFit(simulator.component_signal, prior.component_marginals)

    x = pulses.simulator(pulses.prior.sample((6,), generator_for(1)), generator_for(2))
    low = torch.arange(6).reshape(2, 3) / 8
    starts = [
        fit(u)
        .given(u * x)
        .start(torch.tensor([1, 4]), low, low + 0.1, torch.ones(2, 3, dtype=torch.bool))
        for u in (1.0, unit)
    ]
    scale = torch.tensor([1.0, 1.0, unit], dtype=torch.float64)
    same(starts[1], scale * starts[0])
