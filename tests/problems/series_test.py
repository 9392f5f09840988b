"""Records at irregular times, and planets in them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Uniform

from sbi_slotflow import SlotPosterior, VariableKPrior, rjmcmc, slot_nn
from sbi_slotflow.nn.encoders import PeriodogramTokens
from sbi_slotflow.problems import Series, SeriesSimulator, radial_velocity
from sbi_slotflow.problems.radial_velocity import (
    kepler,
    keplerian,
    observing_nights,
)
from sbi_slotflow.sets.records import filled, packed

SMALL: dict[str, Any] = {
    "hidden_features": 16,
    "trunk_features": 16,
    "flow_hidden_features": 16,
    "flow_layers": 2,
    "weighed_sets": 64,
}
PLAIN: dict[str, Any] = {
    "flow_layers": 0,
    "flow_hidden_features": None,
    "trunk_features": "default",
}


def sine(components: Tensor, times: Tensor) -> Tensor:
    """Sines of components (frequency, amplitude, phase)."""
    frequency, amplitude, phase = components.unsqueeze(-1).unbind(-2)
    return amplitude * torch.cos(2 * math.pi * frequency * times + phase)


def scattered(num: int, generator: torch.Generator, size: int = 40) -> Tensor:
    """Times in 0-10, some of them missing, and errors of 0.2 to 0.6."""
    draws = torch.rand(3, num, size, generator=generator, dtype=torch.float64)
    errors = torch.where(draws[2] < 0.2, 0.0, 0.2 + 0.4 * draws[1])
    return torch.stack([10 * draws[0], errors], -1)


def offset(shared: Tensor, times: Tensor) -> Tensor:
    return shared[..., :1] + 0.1 * shared[..., 1:2] * times


def sines(known: bool = False, unit: float = 1.0, **options: Any) -> Series:
    low, high = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([2.5, 2.0, 2 * math.pi])
    ends = torch.tensor([[-3.0, -3.0, 0.5], [3.0, 3.0, 1.5]])[:, : 2 if known else 3]
    prior = VariableKPrior(
        Independent(Uniform(low, high), 1),
        [1.0, 1.0, 1.0],
        shared=Independent(Uniform(ends[0], ends[1]), 1),
        component_names=("frequency", "amplitude", "phase"),
        shared_names=("offset", "slope", "level")[: 2 if known else 3],
        periods={"phase": 2 * math.pi},
    )
    simulator = SeriesSimulator(
        sine,
        lambda num, generator: scattered(num, generator) * torch.tensor([1.0, unit]),
        prior.layout,
        background=offset,
        level=None if known else 2,
    )
    given = {
        "periodic": "frequency",
        "cells": 20,
        "linear": ("amplitude", "phase"),
        "polar": True,
    }
    return Series("sines", prior, simulator, **given | options)


def estimator_of(problem: Series, **options: Any) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    theta = problem.prior.sample((32,), torch.Generator().manual_seed(0))
    x = problem.simulator(theta, torch.Generator().manual_seed(1))
    return slot_nn(problem, **SMALL | options)(theta, x).eval(), theta, x


def shuffled(x: Tensor) -> Tensor:
    """Records ``(B, T, 3)`` with their samples in another order."""
    return x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(2))]


def with_nan(x: Tensor) -> Tensor:
    """Records whose missing samples are NaN, with times and errors of their own."""
    missing = (x[..., 2] == 0).unsqueeze(-1)
    nan = torch.tensor([3.0, math.nan, 0.4]).to(x)
    return torch.where(missing, nan, x)


def test_missing_samples_are_zeros_once_filled() -> None:
    x = torch.tensor([[0.0, 1.0, 0.1], [1.0, math.nan, 0.1], [2.0, 5.0, 0.0]])
    expected = torch.tensor([[0.0, 1.0, 0.1], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(filled(x), expected)
    nothing = torch.tensor([[math.nan, math.nan, math.nan]])
    assert torch.equal(filled(nothing), torch.zeros(1, 3))


@pytest.mark.parametrize(
    "sample",
    [
        [math.nan, 1.0, 0.1],
        [0.0, math.inf, 0.1],
        [0.0, 1.0, -0.1],
        [0.0, 1.0, math.nan],
    ],
    ids=str,
)
def test_samples_that_mean_nothing_are_refused(sample: list[float]) -> None:
    with pytest.raises(ValueError, match="1 samples"):
        filled([[0.0, 1.0, 0.1], sample])


def test_records_of_different_length_are_padded() -> None:
    x = packed([[0.0, 1.0], [5.0]], [[1.0, math.nan], [3.0]], [[0.1, 0.1], [0.2]], 3)
    assert x.shape == (2, 3, 3)
    assert torch.equal(x[:, :, 2] > 0, torch.tensor([[1, 0, 0], [1, 0, 0]]).bool())
    with pytest.raises(ValueError, match="length must be at least 2"):
        packed([[0.0, 1.0]], [[1.0, 2.0]], [[0.1, 0.1]], 1)


@pytest.mark.parametrize("known", [False, True])
def test_the_likelihood_is_that_of_the_samples_that_are_there(known: bool) -> None:
    problem = sines(known)
    theta = problem.prior.sample((7,), torch.Generator().manual_seed(0))
    x = problem.simulator(theta, torch.Generator().manual_seed(1))
    found = problem.log_likelihood(theta, x)
    for row, record, value in zip(theta.double(), x.double(), found, strict=True):
        time, data, error = record[record[:, 2] > 0].unbind(-1)
        parts = problem.layout.unpack(row)
        mean = parts.shared[0] + 0.1 * parts.shared[1] * time
        for component in parts.components[: int(parts.cardinality)]:
            mean = mean + sine(component, time)
        spread = error if known else error * parts.shared[2]
        normal = torch.distributions.Normal(mean, spread)
        assert float(normal.log_prob(data).sum()) == pytest.approx(float(value))
    assert problem.log_likelihood(theta, x[:1]).shape == (7,)
    torch.testing.assert_close(problem.log_likelihood(theta, with_nan(x)), found)
    torch.testing.assert_close(problem.log_likelihood(theta, shuffled(x)), found)


def test_noise_has_the_errors_that_records_say() -> None:
    problem = sines()
    theta = problem.prior.sample((4_000,), torch.Generator().manual_seed(0))
    x = problem.simulator(theta, torch.Generator().manual_seed(1)).double()
    time, value, error = x.unbind(-1)
    there = error > 0
    level = problem.layout.unpack(theta.double()).shared[:, 2:]
    z = (value - problem.simulator.signal(theta.double(), time)) / (level * error)
    z = z[there]
    # 130,000 of them: five errors, false alarms below 1e-6.
    assert abs(float(z.mean())) < 5 / math.sqrt(len(z))
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / len(z))
    assert 0.1 < float((~there).double().mean()) < 0.3


def test_a_seeded_simulation_repeats_and_schedules_differ() -> None:
    problem = sines()
    theta = problem.prior.sample((3,), torch.Generator().manual_seed(0))
    first, second, other = (
        problem.simulator(theta, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first[..., 0], other[..., 0])
    assert not torch.equal(first[0, :, 0], first[1, :, 0])


def test_nothing_depends_on_the_order_of_samples_nor_on_what_stands_for_missing() -> (
    None
):
    problem = sines()
    estimator, theta, x = estimator_of(problem)
    posterior = SlotPosterior(estimator, problem.prior)
    value = posterior.log_prob_batched(theta[None, :4], x[:4])
    for other in (shuffled(x), with_nan(x), torch.cat([x, 0 * x], 1)[:, : x.shape[1]]):
        found = posterior.log_prob_batched(theta[None, :4], other[:4])
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-2)
    draws = posterior.sample((5,), x=with_nan(x)[0])
    assert draws.isfinite().all()


@pytest.mark.parametrize("known", [False, True])
def test_normal_equations_are_those_of_least_squares(known: bool) -> None:
    problem = sines(known)
    fit = problem.build_fit()
    assert fit is not None
    theta = problem.prior.sample((64,), torch.Generator().manual_seed(0)).double()
    theta = theta[problem.layout.cardinality(theta) == 2][:5]
    x = problem.simulator(theta, torch.Generator().manual_seed(1)).double()
    parts = problem.layout.unpack(theta)
    given = fit.given(x)
    found = given.normal_equations(
        torch.arange(len(theta)), parts.components, parts.mask
    )
    assert given.variance == (1.0 if known else None)
    for i, record in enumerate(x):
        time, _, error = record[record[:, 2] > 0].unbind(-1)
        assert int(given.counts[i]) == len(time)
        slopes = torch.autograd.functional.jacobian(
            lambda c, t=time: sum(sine(one, t) for one in c), parts.components[i]
        )
        slopes = (slopes.flatten(1) / error[:, None]).mT
        # Noise and background together: its prior has a variance of 3 (of 6^2 / 12).
        beneath = torch.stack([torch.ones_like(time), 0.1 * time]) / error
        # A usual level is one.
        joint = torch.eye(len(time)) + 3.0 * beneath.mT @ beneath
        expected = slopes @ torch.linalg.inv(joint.double()) @ slopes.mT
        scale = expected.diagonal().sqrt()
        error = (found.curvature[i] - expected) / (scale * scale[:, None])
        # The prior's moments are those of 2,000 draws.
        assert error.abs().max() < 0.02


def test_the_density_integrates_to_one() -> None:
    problem = sines(unit=12.0)  # errors that hide most of it
    estimator, _, x = estimator_of(problem)
    # Half of the rows from the prior, half from q: ratios to both are bounded.
    theta = problem.prior.sample((10_000,), torch.Generator().manual_seed(3))
    with torch.no_grad():
        sets = estimator.given(x[:1])
        draws = sets.sample((10_000,), generator=torch.Generator().manual_seed(4))
        theta = torch.cat([theta, draws[:, 0]])
        value = sets.log_prob(theta.unsqueeze(1))[:, 0].double()
    prior = problem.prior.log_prob(theta).double()
    ratio = (value - torch.logaddexp(value, prior) + math.log(2)).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.01
    # Four deviations: a false alarm in 16,000.
    assert abs(float(ratio.mean()) - 1) < 4 * error


def test_widths_and_the_exact_sampler() -> None:
    problem = sines(known=True)
    estimator, *_ = estimator_of(problem, **PLAIN)
    theta = torch.zeros(1, problem.layout.size)
    theta[0, :6] = torch.tensor([1.0, 0.4, -0.7, 1.2, 1.5, 2.0])
    x = problem.simulator(theta, torch.Generator().manual_seed(3))
    exact = rjmcmc.collapsed(problem, x[0], num_draws=300, burn_in=500)
    rows = exact.sample((4_000,), generator=torch.Generator().manual_seed(4))
    ones = rows[problem.layout.cardinality(rows) == 1]
    assert len(ones) > 500
    with torch.no_grad():
        draws = estimator.given(x).sample(
            (4_000,), k=1, generator=torch.Generator().manual_seed(5)
        )[:, 0]
    columns = slice(1, 6)
    first, second = ones[:, columns].double(), draws[:, columns].double()
    scale = first.std(0)
    assert ((first.mean(0) - second.mean(0)) / scale).abs().max() < 0.2
    assert (second.std(0) / scale - 1).abs().max() < 0.15


def test_the_spectrum_is_that_of_weighted_least_squares() -> None:
    frequencies = [0.7, 1.3]
    tokens = PeriodogramTokens(40, 2, frequencies)
    problem = sines()
    theta = problem.prior.sample((3,), torch.Generator().manual_seed(0))
    x = problem.simulator(theta, torch.Generator().manual_seed(1))
    channels, *_ = tokens(x)
    for i, record in enumerate(x.double()):
        time, value, error = record[record[:, 2] > 0].unbind(-1)
        for j, frequency in enumerate(frequencies):
            turn = 2 * math.pi * frequency * time
            columns = torch.stack([torch.ones_like(time), turn.cos(), turn.sin()], -1)
            left = []
            for design in (columns[:, :1], columns):
                white = design / error[:, None]
                found = torch.linalg.lstsq(white, (value / error)[:, None]).solution
                left.append(
                    float((value / error - (white @ found)[:, 0]).square().sum())
                )
            assert float(channels[i, j, 0].expm1()) == pytest.approx(
                left[0] - left[1], rel=1e-3
            )


@pytest.mark.parametrize("e", [0.0, 0.3, 0.9, 0.99])
def test_keplers_equation_is_solved(e: float) -> None:
    mean = torch.linspace(-math.pi, math.pi, 1_001, dtype=torch.float64)
    found = kepler(mean, torch.tensor(e, dtype=torch.float64))
    torch.testing.assert_close(found - e * found.sin(), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("e", [0.0, 0.3, 0.9])
def test_the_anomaly_has_the_derivatives_of_the_solution(e: float) -> None:
    mean = torch.linspace(-3.0, 3.0, 41, dtype=torch.float64).requires_grad_()
    ellipse = torch.full_like(mean, e).requires_grad_()
    found = kepler(mean, ellipse)
    slope = 1 - e * found.cos()
    by = torch.autograd.grad(found.sum(), (mean, ellipse), create_graph=True)
    torch.testing.assert_close(by[0], 1 / slope)
    torch.testing.assert_close(by[1], found.sin() / slope)
    (second,) = torch.autograd.grad(by[0].sum(), mean)
    torch.testing.assert_close(second, -e * found.sin() / slope**3)


def test_velocities_are_those_of_an_orbit() -> None:
    # Differentiate the orbit's place along the line of sight.
    period, size, e, omega, phase = 20.0, 3.0, 0.4, 1.1, 0.6
    times = torch.linspace(0.0, 60.0, 2_000, dtype=torch.float64)
    mean = 2 * math.pi * times / period + phase
    anomaly = mean.numpy().copy()
    for _ in range(200):
        anomaly = mean.numpy() + e * np.sin(anomaly)
    x, y = np.cos(anomaly) - e, math.sqrt(1 - e * e) * np.sin(anomaly)
    place = x * math.sin(omega) + y * math.cos(omega)
    speed = np.gradient(place, times.numpy(), edge_order=2)
    speed *= size * math.sqrt(1 - e * e) * period / (2 * math.pi)
    component = torch.tensor([[period, size, e, omega, phase]], dtype=torch.float64)
    found = keplerian(component, times[None])[0]
    assert np.abs(found.numpy() - speed)[1:-1].max() < 1e-3 * size


def test_planets_are_linear_in_two_amplitudes() -> None:
    problem = radial_velocity()
    form = problem.linear_form()
    assert form is not None
    theta = problem.prior.sample((50,), torch.Generator().manual_seed(0)).double()
    form.check(problem.layout.unpack(theta).components[theta[:, 0] > 0][:, 0])


def test_nights_are_within_the_span_and_half_of_the_year() -> None:
    schedule = observing_nights(50, 500.0, fewest=20)
    drawn = schedule(200, torch.Generator().manual_seed(0))
    there = drawn[..., 1] > 0
    assert int(there.sum(-1).min()) >= 20
    assert int(there.sum(-1).max()) == 50
    assert (drawn[..., 0].abs() <= 251).all()
    assert drawn[..., 0].amin() < -200 < 200 < drawn[..., 0].amax()


def without_background(**options: Any) -> SeriesSimulator:
    return SeriesSimulator(sine, scattered, sines().layout, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sines(periodic="place"), "periodic must be"),
        (lambda: sines(cells=0), "cells must be"),
        (
            lambda: sines(linear=("height",)),
            "linear must name an amplitude and a phase",
        ),
        (lambda: sines(linear=("height",), polar=False), "linear must name some"),
        (lambda: sines(disc=("amplitude",)), "disc must name"),
        (lambda: sines(disc=("amplitude", "height")), "disc must name"),
        (lambda: without_background(level=7), "level must be one of"),
        (
            lambda: SeriesSimulator(sine, 3, sines().layout),  # pyright: ignore
            "schedule must be a function",
        ),
        (
            lambda: SeriesSimulator(
                sine, lambda n, g: torch.zeros(n, 4), sines().layout
            ).drawn(2, torch.Generator()),
            "schedule must return times and errors",
        ),
    ],
)
def test_what_is_no_series_is_refused(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_background_that_is_not_linear_is_refused() -> None:
    problem = sines()
    simulator = SeriesSimulator(
        sine,
        scattered,
        problem.layout,
        background=lambda shared, times: shared[..., :1].square() + 0 * times,
        level=2,
    )
    with pytest.raises(TypeError, match="linear"):
        Series("sines", problem.prior, simulator, periodic="frequency")
