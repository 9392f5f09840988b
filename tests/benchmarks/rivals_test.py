"""Rivals' building blocks: densities, counts, subspaces, distances of lines."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.rivals.coordinates import Coordinates
from benchmarks.rivals.lines import chamfer, false_negatives
from benchmarks.rivals.masked import (
    _FixedNetwork,
    _SaturatedNetwork,
    autoregressive,
    draw,
    log_densities,
)
from benchmarks.rivals.subspace import Subspace
from sbi_slotflow import problems

tiny = problems.sinusoids("tiny")


class Nothing(torch.nn.Module):
    """Stands in for an embedding."""

    num_features = 4


def signals_of(num: int) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = tiny.prior.sample((num,))
        return theta, tiny.layout.cardinality(theta)


# coordinates


def test_vectors_become_the_rows_that_they_came_from() -> None:
    theta, _ = signals_of(50)
    coordinates = Coordinates(tiny)
    vectors, k, _ = coordinates.vectors(theta)
    assert (vectors[~coordinates.active(k)] == 0).all()
    torch.testing.assert_close(coordinates.rows(vectors, k), theta, atol=1e-4, rtol=0)


def test_the_prior_is_standard_normal_in_coordinates() -> None:
    # log K! + sum of normal log densities + log-Jacobian is the density of the set,
    # but for the separation's constant, which is left out of the prior here
    prior = problems.sinusoids("crowded").prior
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theta = prior.sample((40,))
    coordinates = Coordinates(problems.sinusoids("crowded"))
    for size in (0, 1, 3):
        rows = theta[prior.layout.cardinality(theta) == size][:3]
        if not len(rows):
            continue

        def normal(u: Tensor, k: Tensor) -> Tensor:
            each = -0.5 * (u.square() + math.log(2 * math.pi))
            return torch.where(coordinates.active(k), each, 0.0).sum(-1)

        value = coordinates.sum_over_labellings(rows, normal)
        expected = prior.log_prob(rows) - math.log(1 / 11)
        torch.testing.assert_close(value, expected.double(), atol=2e-3, rtol=1e-4)


def test_all_labellings_are_summed() -> None:
    theta, k = signals_of(60)
    rows = theta[k == 3][:2]
    coordinates = Coordinates(tiny)
    vectors, _, log_det = coordinates.vectors(rows)
    weights = torch.linspace(-1, 1, coordinates.size)
    value = coordinates.sum_over_labellings(rows, lambda u, k: u @ weights)
    u = vectors[:, 1:].reshape(-1, 3, 3)
    terms = [
        vectors[:, 0] * weights[0] + u[:, list(order)].flatten(1) @ weights[1:]
        for order in permutations(range(3))
    ]
    expected = torch.stack(terms).logsumexp(0) + log_det
    torch.testing.assert_close(value, expected.double(), rtol=1e-5, atol=1e-5)


# masked networks


def test_the_log_densities_are_those_of_the_jacobian() -> None:
    layers = autoregressive(3, 2)
    u, context = torch.randn(5, 3), torch.randn(5, 2)
    total = log_densities(layers, u, context).sum(-1)

    def to_normal(row: Tensor, c: Tensor) -> Tensor:
        for layer in layers:
            row = layer(c)(row)
        return row

    for i in range(5):
        z = to_normal(u[i], context[i])
        slope = torch.autograd.functional.jacobian(
            lambda row, i=i: to_normal(row, context[i]), u[i]
        )
        assert isinstance(slope, Tensor)
        base = -0.5 * (z.square() + math.log(2 * math.pi)).sum()
        expected = base + slope.det().abs().log()
        torch.testing.assert_close(total[i], expected, atol=1e-4, rtol=1e-4)
        # triangular: no feature knows of those after it
        assert (slope.triu(1) == 0).all()


def test_draws_invert_the_layers() -> None:
    layers = autoregressive(3, 2)
    context = torch.randn(4, 2)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        u = draw(layers, 3, context)
        torch.manual_seed(3)
        z = torch.randn(4, 3)
    for layer in layers:
        u = layer(context)(u)
    torch.testing.assert_close(u, z, atol=1e-3, rtol=1e-3)


def test_padding_does_not_count_in_a_saturated_flow() -> None:
    coordinates = Coordinates(tiny)
    network = _SaturatedNetwork(Nothing(), coordinates, tiny.num_data)  # pyright: ignore
    k = torch.tensor([0, 1, 2, 3])
    u, embedded = torch.randn(4, coordinates.size), torch.randn(4, 4)
    active = coordinates.active(k)
    changed = torch.where(active, u, torch.randn_like(u))
    with torch.no_grad():
        first, second = (network.given_k(embedded, v, k) for v in (u, changed))
        other = network.given_k(embedded, torch.where(active, u + 0.1, u), k)
    torch.testing.assert_close(first, second)
    assert ((first - other).abs() > 1e-4).all()


def test_fixed_capacity_counts_what_is_there() -> None:
    coordinates = Coordinates(tiny)
    network = _FixedNetwork(Nothing(), coordinates, tiny.num_data)  # pyright: ignore
    embedded = torch.randn(6, 4)
    with torch.no_grad():
        probs = network.log_k(embedded).exp()
        presence = network.to_presence(embedded).sigmoid()
    expected = torch.zeros(6, 4)
    for flags in product([0, 1], repeat=3):
        chance = torch.where(torch.tensor(flags) == 1, presence, 1 - presence).prod(-1)
        expected[:, sum(flags)] += chance
    torch.testing.assert_close(probs, expected)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        vectors, k = network.draw(embedded.repeat_interleave(4_000, 0))
    assert vectors.shape == (24_000, coordinates.size)
    share = torch.nn.functional.one_hot(k, 4).float().reshape(6, 4_000, 4).mean(1)
    # 24 binomial shares: 5 standard errors of the widest
    assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / 4_000)


# subspaces


def record_of(frequency: list[float], noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n = np.arange(50)
    lines = np.exp(
        2j * np.pi * (np.outer(frequency, n) + rng.random((len(frequency), 1)))
    )
    noises = rng.normal(size=50) + 1j * rng.normal(size=50)
    return lines.sum(0) + noise * noises


@pytest.mark.parametrize(
    "frequency", [[0.1], [-0.49, 0.2, 0.26], [-0.3, 0.0, 0.03, 0.4]]
)
def test_esprit_is_exact_without_noise(frequency: list[float]) -> None:
    found = Subspace(record_of(frequency, 0.0), 25).esprit(len(frequency))
    np.testing.assert_allclose(found, frequency, atol=1e-8)


@pytest.mark.parametrize("size", range(1, 7))
def test_criteria_count_lines_that_stand_out(size: int) -> None:
    frequency = np.linspace(-0.4, 0.45, size).tolist()
    subspace = Subspace(record_of(frequency, 0.02, seed=size), 25)
    assert subspace.mdl(10) == size
    assert subspace.sorte(10) == size
    assert subspace.aic(10) >= size


# distances


def test_distances_of_lines_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    truth, estimate = (torch.full((30, 5), math.nan).double() for _ in range(2))
    misses, totals = [], []
    for i in range(30):
        f = rng.random(rng.integers(1, 6)) - 0.5
        g = rng.random(rng.integers(1, 6)) - 0.5
        g[0] = (f[0] + 0.505) % 1 - 0.5  # near, perhaps across the seam
        truth[i, : len(f)], estimate[i, : len(g)] = map(torch.from_numpy, (f, g))
        gap = np.abs(f[:, None] - g)
        gap = np.minimum(gap, 1 - gap)
        misses.append(np.mean(gap.min(1) > 0.01))
        totals.append(gap.min(1).sum() + gap.min(0).sum())
    np.testing.assert_allclose(false_negatives(truth, estimate), misses)
    np.testing.assert_allclose(chamfer(truth, estimate), totals)


def test_an_empty_estimate_misses_everything() -> None:
    truth = torch.tensor([[0.1, 0.3, math.nan]])
    nothing = torch.full((1, 3), math.nan)
    assert false_negatives(truth, nothing).tolist() == [1.0]
    assert chamfer(truth, nothing).tolist() == [1.0]
