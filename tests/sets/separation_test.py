import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from sbi_slotflow.sets.separation import (
    log_separation_constant,
    sample_separated,
    smallest_gap,
)

LOW, HIGH, GAP = -1.0, 2.0, 0.4


def rejected(rng: np.random.Generator, k: int, num: int) -> np.ndarray:
    """Independent uniform points, sorted, kept where all gaps are wide enough."""
    points = np.sort(rng.uniform(LOW, HIGH, size=(num, k)), axis=-1)
    return points[(np.diff(points, axis=-1) >= GAP).all(-1)]


@pytest.mark.parametrize("k", range(6))
def test_the_constant_is_the_probability_to_keep_the_distance(k: int) -> None:
    num = 400_000
    kept = len(rejected(np.random.default_rng(0), k, num))
    constant = log_separation_constant(torch.tensor(k), GAP, HIGH - LOW).exp().item()
    # exact binomial tail: false alarm in 1 of 10^6 seeds for each k
    assert stats.binomtest(kept, num, constant).pvalue > 1e-6


def test_the_constant_needs_two_points_to_matter_and_vanishes_where_none_fit() -> None:
    k = torch.tensor([0, 1, 2, 8, 9, 20])  # 7 gaps of 0.4 fit into 3, 8 do not
    log_z = log_separation_constant(k, GAP, HIGH - LOW)
    assert log_z.dtype == torch.float64
    assert log_z[:2].tolist() == [0.0, 0.0]
    assert torch.isfinite(log_z[2:4]).all()
    assert log_z[4:].tolist() == [-math.inf, -math.inf]


def test_draws_are_sorted_inside_the_window_and_keep_the_distance() -> None:
    k = torch.arange(9).repeat(1000)
    points = sample_separated(k, 8, (LOW, HIGH), GAP)
    assert points.shape == (len(k), 8)
    active = torch.arange(8) < k.unsqueeze(-1)
    assert ((points >= LOW) & (points <= HIGH))[active].all()
    gaps = points.diff(dim=-1)[active[:, 1:]]
    assert (gaps >= GAP - 1e-12).all()


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_draws_have_the_law_of_rejection_sampling(k: int) -> None:
    # rows of other cardinalities in the same call must not matter
    counts = torch.tensor([k, 0, 5]).repeat(20_000)
    points = sample_separated(counts, 5, (LOW, HIGH), GAP)[::3, :k].numpy()
    wanted = {1: 20_000, 2: 40_000, 3: 60_000, 5: 600_000}[k]
    reference = rejected(np.random.default_rng(1), k, wanted)
    assert len(reference) > 10_000
    statistics = [(points[:, i], reference[:, i]) for i in range(k)]
    statistics.append((points.sum(-1), reference.sum(-1)))
    if k > 1:
        gaps = np.diff(points).min(-1), np.diff(reference).min(-1)
        statistics.append(gaps)
    # false alarm in at most 7 of 10^6 seeds for each k
    results: list[Any] = [stats.ks_2samp(a, b) for a, b in statistics]
    assert min(result.pvalue for result in results) > 1e-6


# on a circle


def around(points: np.ndarray) -> np.ndarray:
    """Least gap of each row of sorted points, the one across the seam included."""
    last = points[:, :1] + (HIGH - LOW) - points[:, -1:]
    return np.concatenate([np.diff(points, axis=-1), last], -1).min(-1)


def rejected_around(rng: np.random.Generator, k: int, num: int) -> np.ndarray:
    points = np.sort(rng.uniform(LOW, HIGH, size=(num, k)), axis=-1)
    return points[around(points) >= GAP] if k > 1 else points


@pytest.mark.parametrize("k", range(1, 6))
def test_the_constant_of_a_circle_is_the_probability_to_keep_the_distance(
    k: int,
) -> None:
    num = 400_000
    kept = len(rejected_around(np.random.default_rng(0), k, num))
    constant = log_separation_constant(torch.tensor(k), GAP, HIGH - LOW, circular=True)
    # exact binomial tail: false alarm in 1 of 10^6 seeds for each k
    assert stats.binomtest(kept, num, constant.exp().item()).pvalue > 1e-6


def test_a_circle_holds_as_many_points_as_gaps() -> None:
    k = torch.tensor([0, 1, 2, 7, 8])  # 7 gaps of 0.4 fit around 3, 8 do not
    log_z = log_separation_constant(k, GAP, HIGH - LOW, circular=True)
    assert log_z[:2].tolist() == [0.0, 0.0]
    assert torch.isfinite(log_z[2:4]).all()
    assert log_z[4].item() == -math.inf


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_draws_on_a_circle_have_the_law_of_rejection_sampling(k: int) -> None:
    counts = torch.tensor([k, 0, 5]).repeat(20_000)
    points = sample_separated(counts, 5, (LOW, HIGH), GAP, circular=True)
    points = points[::3, :k].numpy()
    wanted = {1: 20_000, 2: 40_000, 3: 80_000, 5: 1_500_000}[k]
    reference = rejected_around(np.random.default_rng(1), k, wanted)
    assert len(reference) > 10_000
    statistics = [(points[:, i], reference[:, i]) for i in range(k)]
    if k > 1:
        statistics.append((around(points), around(reference)))
        assert around(points).min() >= GAP - 1e-12
    # false alarm in at most 6 of 10^6 seeds for each k
    results: list[Any] = [stats.ks_2samp(a, b) for a, b in statistics]
    assert min(result.pvalue for result in results) > 1e-6


def test_the_smallest_gap_around_a_circle_crosses_the_seam() -> None:
    values = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 0]]).bool()
    gap = smallest_gap(values, mask, period=1.0)
    torch.testing.assert_close(gap, torch.tensor([0.2, 0.4, math.inf]))


def test_the_smallest_gap_is_that_of_the_closest_active_pair() -> None:
    values = torch.randn(4, 50, 5)
    mask = torch.arange(5) < torch.arange(50).remainder(6).unsqueeze(-1)
    mask = mask.expand(4, 50, 5)
    found = smallest_gap(values, mask)
    assert found.shape == (4, 50)
    for i in range(4):
        for j in range(50):
            active = values[i, j][mask[i, j]].tolist()
            gaps = [abs(a - b) for a, b in combinations(active, 2)]
            assert found[i, j].item() == pytest.approx(min(gaps, default=math.inf))


def test_a_single_slot_has_no_gap() -> None:
    gap = smallest_gap(torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool))
    assert gap.tolist() == [math.inf] * 3
