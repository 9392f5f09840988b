"""The stress set is what its description says, and its scores are what they say."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
import xarray as xr

from benchmarks.experiments import stress
from benchmarks.experiments.stress import (
    GRIDS,
    Scores,
    bootstrap_interval,
    calibration_error,
    count_interval,
    f1,
    f1_interval,
    gap_interval,
    num_found,
    scores_of,
    stress_prior,
    stress_problem,
    stress_signal,
)
from benchmarks.intervals import mean_interval, share_interval
from sbi_slotflow import problems
from sbi_slotflow.problems.sinusoids.problem import ResampledNoise
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.prior import check_covered


def test_the_records_hold_their_end_points() -> None:
    long, short = GRIDS
    assert (long.num_samples, short.num_samples) == (3_000, 5_120)
    expected = torch.linspace(0, 300, 3_000, dtype=torch.float64)
    torch.testing.assert_close(long.times.double(), expected, atol=1e-9, rtol=0)
    expected = torch.linspace(0, 10, 5_120, dtype=torch.float64)
    torch.testing.assert_close(short.times.double(), expected, atol=1e-9, rtol=0)


def test_signals_are_as_described() -> None:
    theta = torch.stack([stress_signal(0, i)[0] for i in range(60)])
    parts = stress_problem("interpolated").layout.unpack(theta)
    assert set(parts.cardinality.tolist()) == set(range(5, 11))
    sigma = parts.shared[:, 0]
    assert 1 <= sigma.min() < 1.2
    assert 1.8 < sigma.max() <= 2
    for row, mask in zip(parts.components, parts.mask, strict=True):
        amplitude, _, frequency = row[mask].T.double()
        assert frequency.diff().min() > 0.004 - 1e-6
        assert amplitude.min() >= 0.5
        assert amplitude.max() <= 1.5


def test_both_noises_are_as_loud_on_the_same_signal() -> None:
    theta, data = stress_signal(0, 3)
    again, repeated = stress_signal(0, 3)
    assert torch.equal(theta, again)
    signal = stress_problem("white").simulator.signal(theta)
    for noise, x in data.items():
        assert torch.equal(x, repeated[noise])
        # the error of a deviation of 8,120 numbers is 1 % or, correlated, 2 %
        deviation = float((x - signal).std())
        assert deviation == pytest.approx(math.sqrt(2 / 3) * float(theta[1]), rel=0.06)
    other, _ = stress_signal(1, 3)
    assert not torch.equal(theta, other)


def test_interpolated_noise_has_twice_the_power_in_the_band_of_the_short_record() -> (
    None
):
    noise, (long, short) = ResampledNoise(GRIDS), GRIDS
    zero = torch.zeros(60, long.num_samples + short.num_samples)
    x = noise.sample(zero, torch.ones(60, 1), generator_for(5)).double()
    for record, grid, ratio in (
        (x[:, : long.num_samples], long, 1.0),
        (x[:, long.num_samples :], short, 1.5 * math.sqrt(2)),
    ):
        frequency = torch.linspace(2.5, 3.0, 11).double()
        turns = grid.times.double()[:, None] * frequency
        waves = torch.polar(torch.ones_like(turns), math.tau * turns)
        power = (record.to(waves) @ waves).abs().square()
        white = grid.num_samples * record.square().mean()
        assert float(power.mean() / white) == pytest.approx(ratio, rel=0.15)


def test_the_prior_is_covered_by_that_of_the_weights() -> None:
    prior = stress_prior()
    check_covered(prior, problems.sinusoids("crowded").prior)
    assert prior.min_separation == 0.004
    assert prior.cardinality_probs[:5].sum() == 0
    assert prior.shared_marginals[0].bounds == pytest.approx((math.sqrt(2 / 3), 1.5))


def test_sources_are_found_one_to_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        listed, truth = rng.random(rng.integers(5)), rng.random(rng.integers(5))
        most = min(len(listed), len(truth))
        best = 0
        for num in range(most + 1):
            for some in combinations(listed, num):
                for others in permutations(truth, num):
                    gaps = np.abs(np.array(some) - np.array(others))
                    best = max(best, num if (gaps <= 0.2).all() else 0)
        assert num_found(listed, truth, 0.2) == best
    assert num_found([2.6, 2.604], [2.602]) == 1
    # the nearest of the first is the only one of the second
    assert num_found([2.600, 2.606], [2.601, 2.596]) == 2
    assert num_found([], [2.6]) == 0


def test_f1_is_pooled() -> None:
    # 3 of 4 listed are true, 3 of 5 true ones are listed
    precision, recall = 3 / 4, 3 / 5
    expected = 2 * precision * recall / (precision + recall)
    assert f1([2, 1], [2, 2], [3, 2]) == pytest.approx(expected)
    assert f1([5, 5], [5, 5], [5, 5]) == 1
    assert math.isnan(f1([0], [0], [0]))


def test_the_calibration_error_weighs_bins_by_their_signals() -> None:
    claimed = np.array([0.95, 0.95, 0.95, 0.95, 0.62, 0.62])
    right = np.array([1, 1, 1, 0, 0, 1])
    expected = (4 * 0.2 + 2 * 0.12) / 6
    assert calibration_error(claimed, right) == pytest.approx(expected)
    assert calibration_error(np.ones(3), np.ones(3)) == 0
    assert calibration_error(np.ones(4), np.zeros(4)) == 1


def test_the_bootstrap_is_as_wide_as_a_mean_is_uncertain() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(lambda i: float(values[i].mean()), 400)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert low < values.mean() < high


def test_intervals_say_how_often_what_never_happened_may() -> None:
    probs, k = np.eye(11)[[5] * 40], np.full(40, 5)
    scores = Scores(probs, k, np.full(40, 5.0), np.full(40, 5.0))
    low, high = f1_interval(scores)
    assert (low, high) == pytest.approx(share_interval(200, 200))
    assert low < 1
    # 2.5 % of Poisson counts of this mean are zero in all signals
    assert count_interval(np.zeros(40)) == pytest.approx((0, 3.689 / 40), rel=1e-3)
    assert count_interval([0, 1, 2, 1]) == mean_interval([0, 1, 2, 1])
    most = share_interval(0, 40)[1]
    assert gap_interval(np.zeros(40)) == (-most, most)
    assert gap_interval([0, -1, 0, 1, -1]) == mean_interval([0, -1, 0, 1, -1])


def test_scores_say_how_right_and_how_sure() -> None:
    probs = np.array([[0.1, 0.9, 0.0], [0.7, 0.3, 0.0], [0.5, 0.5 - 1e-6, 1e-6]])
    k = np.array([1, 1, 2])
    scores = Scores(probs, k, np.array([1.0, 2.0, 0.0]), np.array([1.0, 1.0, 0.0]))
    assert scores.right.tolist() == [True, False, False]
    assert scores.claimed.tolist() == [0.9, 0.7, 0.5]
    assert scores.false.tolist() == [0.0, 1.0, 0.0]
    # no probability counts for less than that of one draw in 10,000
    expected = [-math.log(0.9), -math.log(0.3), -math.log(1e-4)]
    np.testing.assert_allclose(scores.log_score, expected)


def _dataset() -> xr.Dataset:
    """Two signals, the second without an exact posterior."""
    shape = 2, len(stress.NOISES), len(stress.METHODS)
    probs = np.zeros((*shape, 11))
    probs[..., 5], probs[..., 6] = 0.8, 0.2
    listed, found = np.full(shape, 5.0), np.full(shape, 4.0)
    listed[1, :, -1] = np.nan
    dims = "signal", "noise", "posterior"
    return xr.Dataset(
        {
            "probs": ((*dims, "cardinality"), probs),
            "listed": (dims, listed),
            "found": (dims, found),
            "ess": (dims, np.full(shape, 500.0)),
            "k_hat": (dims, np.full(shape, 0.2)),
            "converged": (dims[:2], np.ones(shape[:2])),
            "k": ("signal", [5, 6]),
        },
        {"noise": list(stress.NOISES), "posterior": list(stress.METHODS)},
    )


def test_signals_without_an_exact_posterior_are_left_out_of_its_scores() -> None:
    dataset = _dataset()
    exact = scores_of(dataset, "white", "exact")
    weighted = scores_of(dataset, "white", "weighted")
    assert exact is not None
    assert weighted is not None
    assert exact.k.tolist() == [5]
    assert weighted.k.tolist() == [5, 6]
    claims = {claim.quantity: claim for claim in stress.claims(dataset)}
    right = claims["interpolated noise, weighted: K right, share"]
    assert right.ours == 0.5
    assert right.rivals == {"authors' network": 0.79}
    assert right.worse_than() == ["authors' network"]
    assert claims["white noise, exact: K right, share"].ours == 1
    sure = claims["white noise, weighted: wrong K claimed above 0.9, share"]
    assert sure.ours == 0
    gap = "white noise, weighted: share right less the exact posterior's"
    assert claims[gap].ours == 0
    assert claims[gap].met
