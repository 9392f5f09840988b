"""The reference for Gaussian mixtures against sums and integrals without sampling."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from benchmarks.mixture_gibbs import (
    gibbs_cardinality,
    log_coefficients,
    log_marginal,
    nodes,
)
from sbi_slotflow import problems
from sbi_slotflow.seeding import generator_for

SMALL = problems.gaussian_mixture(
    num_points=6, max_cardinality=3, location=(0.0, 20.0), scale=(1.0, 8.0)
)


def some_points(k: int, seed: int = 3) -> Tensor:
    rows = with_k(k).sample((1,), generator_for(seed))
    return SMALL.simulator(rows, generator_for(seed))[0]


def with_k(k: int):
    return SMALL.prior.with_cardinality([float(i == k) for i in range(4)])


def partitions(num: int) -> list[list[int]]:
    """Blocks of num points, each partition once, by restricted growth."""
    found = [[0]]
    for _ in range(num - 1):
        found = [[*one, c] for one in found for c in range(max(one) + 2)]
    return found


def log_m(v: np.ndarray) -> float:
    table = nodes(SMALL, 0.0)
    return log_marginal(len(v), float(v.sum()), float((v**2).sum()), table)


def by_sum(x: Tensor, concentration: float) -> np.ndarray:
    """p(K | x) as a sum over all partitions of the points."""
    v = x[:, 0].double().numpy()
    log_v = log_coefficients(SMALL, len(v), concentration)
    total = np.full(4, -np.inf)
    for one in partitions(len(v)):
        blocks = [v[np.array(one) == c] for c in range(max(one) + 1)]
        if len(blocks) > 3:
            continue
        value = sum(
            log_m(b) + math.lgamma(concentration + len(b)) - math.lgamma(concentration)
            for b in blocks
        )
        total = np.logaddexp(total, log_v[:, len(blocks)] + value)
    return np.exp(total - np.logaddexp.reduce(total))


def test_the_likelihood_of_a_block_is_an_integral_over_its_normal_law() -> None:
    v = np.array([12.0, 12.5, 14.0, 11.0, 19.5])
    for points in (v[:4], v[:1], v):
        mean, deviation = (
            marginal.quantile((torch.arange(3_000).double() + 0.5) / 3_000)
            for marginal in map(SMALL.prior.component_marginals.__getitem__, (0, 1))
        )
        z = (torch.from_numpy(points) - mean[:, None, None]) / deviation[:, None]
        log_p = -0.5 * z.square() - deviation[:, None].log()
        log_p = log_p - 0.5 * math.log(2 * math.pi)
        expected = log_p.sum(-1).logsumexp((0, 1)) - 2 * math.log(3_000)
        assert log_m(points) == pytest.approx(float(expected), abs=2e-3)


def test_the_sum_over_partitions_is_the_mean_likelihood_of_the_prior() -> None:
    x = some_points(2)
    values, errors = [], []
    for k in (1, 2, 3):
        rows = with_k(k).sample((400_000,), generator_for(k))
        log_l = SMALL.log_likelihood(rows, x)
        values.append(float(log_l.exp().mean()))
        errors.append(float(log_l.exp().std()) / math.sqrt(len(rows)))
    expected = np.array(values) / sum(values)
    # 5 standard errors of three: false alarms below 2e-6
    slack = 5 * float(np.linalg.norm(errors)) / sum(values)
    assert slack < 0.1
    np.testing.assert_allclose(by_sum(x, 1.0)[1:], expected, atol=slack)


@pytest.mark.parametrize("concentration", [1.0, 3.0])
def test_chains_find_the_sum_over_partitions(concentration: float) -> None:
    for seed in (3, 4):
        x = some_points(3, seed)
        found = gibbs_cardinality(
            SMALL, x, concentration=concentration, num_sweeps=20_000
        )
        assert found.rhat < 1.01
        # some 1e4 effective draws: 0.02 is more than 4 standard errors
        expected = torch.from_numpy(by_sum(x, concentration))
        torch.testing.assert_close(found.probs, expected, atol=0.02, rtol=0)
