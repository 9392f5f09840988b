"""Ranks are uniform, and the test of their uniformity is exact."""

import numpy as np
import pytest
import torch
from arviz_stats.ecdf_utils import (
    get_pointwise_confidence_band,
    simulate_confidence_bands,
)
from scipy.stats import beta, norm

from sbi_slotflow.calibration import ecdf_band, pit, rank_p_value, uniformity_p_value
from sbi_slotflow.calibration.check import critical_level
from sbi_slotflow.seeding import generator_for


def test_rank_counts_the_draws_below():
    truth = torch.tensor([0.5, -1.0, 9.0])
    draws = torch.arange(4.0).unsqueeze(-1).expand(4, 3)  # 0, 1, 2, 3
    u = pit(truth, draws, generator_for(0))
    assert (np.floor(5 * u) == [1, 0, 4]).all()


def test_ranks_of_ties_fill_the_unit_interval():
    # All 20,000 values tie; 4 tests of the ECDF at 1e-6 each.
    u = pit(torch.zeros(20_000), torch.zeros(3, 20_000), generator_for(1))
    assert uniformity_p_value(u[:500]) > 1e-6
    assert abs(u.mean() - 0.5) < 5 / (12 * 20_000) ** 0.5


def test_draws_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"draws must have shape \(L, \*\(3,\)\)"):
        pit(torch.zeros(3), torch.zeros(5, 4), generator_for(0))


@pytest.mark.parametrize("u", [0.001, 0.3, 0.5, 0.9, 1.0])
def test_p_value_of_one_number_is_its_two_sided_tail(u):
    assert uniformity_p_value(np.array([u])) == pytest.approx(min(1, 2 * min(u, 1 - u)))


@pytest.mark.parametrize("num", [2, 7, 25])
def test_p_values_of_uniform_samples_are_uniform(num):
    # Shares of 2,000 samples; 5 standard errors: false alarms below 1e-5.
    rng = np.random.default_rng(num)
    found = np.array([uniformity_p_value(rng.random(num)) for _ in range(2_000)])
    for level in (0.01, 0.1, 0.5, 0.9):
        error = (level * (1 - level) / 2_000) ** 0.5
        assert abs((found <= level).mean() - level) < 5 * error


def test_rank_p_values_are_at_least_as_rare_as_they_say():
    # Shares of 2,000 samples; 5 standard errors: false alarms below 1e-5.
    rng = np.random.default_rng(0)
    found = np.array([rank_p_value(rng.random(25)) for _ in range(2_000)])
    for level in (0.01, 0.1):
        assert (found <= level).mean() < level + 5 * (level / 2_000) ** 0.5
        assert (found <= level).mean() > 0.4 * level


def test_ranks_a_little_too_central_are_found_by_their_variance():
    # Ranks of truths from a normal whose standard deviation is 0.85 of the draws'.
    u = norm.cdf(0.85 * norm.ppf((np.arange(1_000) + 0.5) / 1_000))
    assert rank_p_value(u) < 1e-4 < uniformity_p_value(u)


def test_band_is_the_one_that_arviz_simulates():
    num = 100
    points = np.arange(1, num) / num
    rng = np.random.default_rng(0)
    level = simulate_confidence_bands(num, 1, points, 0.95, 4_000, rng)
    low, high = get_pointwise_confidence_band(level, num, points)
    edges, lower, upper = ecdf_band(num, 0.05)
    here = np.searchsorted(edges, points, side="right") - 1
    # Theirs holds at the 99 points, ours everywhere: they differ by a count at most.
    assert np.abs(lower[here] - low).max() <= 1.01 / num
    assert np.abs(upper[here] - high).max() <= 1.01 / num


@pytest.mark.parametrize("rate", [0.2, 1e-4])
def test_a_sample_at_the_bands_edge_has_the_bands_rate(rate):
    num = 40
    half = 0.5 * critical_level(num, rate)
    u = (np.arange(num) + 0.5) / num
    u[5] = beta.ppf(half, 6, 35)  # the sixth smallest, as low as the band lets it be
    u[:5] = u[5] * np.arange(1, 6) / 6
    found = uniformity_p_value(u)
    assert found == pytest.approx(rate, rel=5e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [(np.zeros((2, 2)), r"shape \(n,\)"), (np.array([1.5]), r"lie in \[0, 1\]")],
)
def test_what_is_no_list_of_ranks_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        uniformity_p_value(values)
