"""The sufficient statistics against sums over the samples in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from sbi_slotflow.problems import Sinusoids, sinusoids
from sbi_slotflow.problems.sinusoids.fit import Floats, SineStatistics


class Case:
    """A problem, an observation, its statistics and its times about t_0."""

    def __init__(self, preset: Any, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.problem: Sinusoids = sinusoids(preset)
        prior = self.problem.prior
        theta = prior.sample((1,), generator)
        self.x = self.problem.simulator(theta, generator)[0]
        self.statistics = self.problem.statistics(self.x)
        grids = self.problem.grids
        self.times = torch.cat([grid.times for grid in grids]).numpy()
        self.centred = self.times - 0.5 * grids[0].duration
        self.band = prior.component_marginals[2].bounds
        self.rng = np.random.default_rng(seed)

    def frequencies(self, *shape: int) -> Floats:
        return self.rng.uniform(*self.band, shape)

    def linear(self, frequency: Floats) -> Floats:
        """Cosines and sines, shape ``(..., 2K, T)``."""
        angle = 2 * math.pi * frequency[..., None] * self.centred
        both = np.stack([np.cos(angle), np.sin(angle)], -2)
        return both.reshape(*frequency.shape[:-1], -1, len(self.times))


@pytest.fixture(params=["tiny", "paper"], name="case", scope="module")
def _case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def assert_close(value: Floats, expected: Floats) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-8 * scale)


def test_projections_are_the_sums_over_the_samples(case: Case) -> None:
    edges = np.array(case.band)
    frequency = np.concatenate([case.frequencies(50), edges])
    expected = case.linear(frequency) @ case.x.double().numpy()
    assert_close(case.statistics.projections(frequency), expected.reshape(-1, 2))


def test_moments_are_the_sums_over_the_samples(case: Case) -> None:
    frequency = np.concatenate([case.frequencies(50), np.array(case.band)])
    wave = np.exp(-2j * math.pi * frequency[:, None] * case.centred)
    data = case.x.double().numpy()
    zeroth, first = case.statistics.moments(frequency)
    # the slope of a cubic interpolation has one order less
    for found, power, precision in ((zeroth, 0, 1e-8), (first, 1, 1e-5)):
        expected = wave @ (case.centred**power * data)
        atol = precision * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_gram_is_the_sum_over_the_samples(case: Case) -> None:
    frequency = case.frequencies(4, 5)
    frequency[0, 1] = frequency[0, 0]  # equal, and nearly so
    frequency[1, 1] = frequency[1, 0] + 1e-9
    linear = case.linear(frequency)
    expected = linear @ np.swapaxes(linear, -1, -2)
    assert_close(case.statistics.gram(frequency, frequency), expected)


def test_cross_gram_is_the_sum_over_the_samples(case: Case) -> None:
    rows, columns = case.frequencies(3, 2), case.frequencies(3, 4)
    expected = case.linear(rows) @ np.swapaxes(case.linear(columns), -1, -2)
    value = case.statistics.gram(rows, columns)
    assert value.shape == (3, 4, 8)
    assert_close(value, expected)


@pytest.mark.parametrize("preset", ["tiny", "paper"])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
def test_log_likelihood_is_the_sum_over_the_samples(preset: Any, sigma: float) -> None:
    case = Case(preset)
    layout = case.problem.layout
    for k in (0, 1, layout.max_cardinality):
        amplitude, phase, frequency = (
            case.rng.uniform(low, high, k)
            for low, high in ((0.5, 1.5), (0.0, 2 * math.pi), case.band)
        )
        angle = 2 * math.pi * frequency[:, None] * case.times + phase[:, None]
        mean = (amplitude[:, None] * np.cos(angle)).sum(0)
        # near its peak the likelihood loses most digits to cancellation
        data = mean + sigma * case.rng.standard_normal(len(mean))
        statistics = SineStatistics.of(data, case.problem.grids, case.band)
        components = np.stack([amplitude, phase, frequency], -1)
        value = statistics.log_likelihood(components, np.asarray(sigma))
        expected = stats.norm.logpdf(data, mean, sigma).sum()
        assert float(value) == pytest.approx(expected, rel=1e-8)


def test_a_component_without_amplitude_is_not_there(case: Case) -> None:
    components = np.array([[0.8, 1.0, 0.0], [0.0, 0.0, 0.0]])
    components[:, 2] = case.frequencies(2)
    both, one = (
        case.statistics.log_likelihood(c, np.array(0.5))
        for c in (components, components[:1])
    )
    np.testing.assert_allclose(both, one, rtol=1e-13)


def test_amplitudes_and_components_are_inverses(case: Case) -> None:
    rng = case.rng
    shape = (7, 3)
    amplitude, phase = rng.uniform(0.5, 1.5, shape), rng.uniform(0, 2 * math.pi, shape)
    components = np.stack([amplitude, phase, case.frequencies(*shape)], -1)
    linear = case.statistics.linear_amplitudes(components)
    again = case.statistics.components(linear, components[..., 2])
    np.testing.assert_allclose(again, components, rtol=1e-10)
    assert (again[..., 1] >= 0).all()
    assert (again[..., 1] <= 2 * math.pi).all()
    np.testing.assert_allclose(
        case.statistics.linear_amplitudes(again), linear, atol=1e-10
    )


def test_amplitudes_give_the_signal(case: Case) -> None:
    components = np.array([[0.8, 1.0, 0.0], [1.2, 5.0, 0.0]])
    components[:, 2] = case.frequencies(2)
    a, phi, f = components.T[..., None]
    expected = (a * np.cos(2 * math.pi * f * case.times + phi)).sum(0)
    amplitudes = case.statistics.linear_amplitudes(components).ravel()
    np.testing.assert_allclose(
        amplitudes @ case.linear(components[:, 2]), expected, atol=1e-10
    )


def test_an_observation_of_the_wrong_length_is_rejected() -> None:
    case = Case("tiny")
    for bad in (np.zeros(299), np.zeros((1, 300))):
        with pytest.raises(ValueError, match=r"x must have shape \(300,\), got"):
            SineStatistics.of(bad, case.problem.grids, case.band)
