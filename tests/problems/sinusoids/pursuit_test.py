"""Matching pursuit of many observations at once."""

import math

import pytest
import torch

from sbi_slotflow import problems
from sbi_slotflow.problems.sinusoids.pursuit import Pursued, SinePursuit
from sbi_slotflow.seeding import generator_for

paper, crowded = problems.sinusoids("paper"), problems.sinusoids("crowded")


def pursuit(problem: problems.Sinusoids, most: int = 10) -> SinePursuit:
    band = problem.prior.component_marginals[2].bounds
    return SinePursuit(problem.build_fit(), band, most)


def signals(problem: problems.Sinusoids, rows: list[list[list[float]]], sigma: float):
    """Theta rows of given components (A, phi, f), and observations of them."""
    layout = problem.layout
    components = torch.zeros(len(rows), layout.max_cardinality, 3)
    for i, row in enumerate(rows):
        components[i, : len(row)] = torch.tensor(row).reshape(-1, 3)
    k = torch.tensor([len(row) for row in rows])
    theta = layout.pack(k, components, torch.full((len(rows), 1), sigma))
    return theta, problem.simulator(theta, generator_for(1))


ROWS = [
    [[1.0, 1.0, 2.6], [0.7, 4.0, 2.63], [1.3, 2.0, 2.91]],
    [],
    [[0.2, 3.0, 2.75]],
    [[1.0, 0.0, 2.7], [1.0, 1.5, 2.7 + 1.2 / 300]],
]


def test_it_finds_components_as_precisely_as_the_noise_allows() -> None:
    sigma = 0.5
    theta, x = signals(crowded, ROWS, sigma)
    pursued = pursuit(crowded)(x)
    truth = crowded.layout.unpack(theta)
    for i, row in enumerate(ROWS):
        strongest = pursued.phasor[i].abs().argsort(descending=True)[: len(row)]
        found = pursued.frequency[i, strongest].sort().values
        assert pursued.found[i, strongest].all()
        # Cramer-Rao bound of one tone in the long record
        amplitude = truth.components[i, : len(row), 0].double()
        bound = math.sqrt(6 / 3_000) * sigma / (math.pi * 300 * amplitude)
        gap = (found - truth.components[i, : len(row), 2].double()).abs()
        # 5 deviations, and twice as much for two within an element or so
        assert (gap < (10 if i == 3 else 5) * bound).all()


def test_noise_alone_holds_little() -> None:
    _, x = signals(crowded, [[]] * 100, 1.0)
    pursued = pursuit(crowded)(x)
    # A peak of 150 resolution elements earns log(150) + Gumbel nats or so.
    assert pursued.found.sum(-1).double().mean() < 3
    assert pursued.gain.max() < 25


def test_the_residual_is_what_the_components_leave() -> None:
    _, x = signals(crowded, ROWS, 0.5)
    search = pursuit(crowded)
    pursued = search(x)
    phase = (
        pursued.phasor.angle()
        - 2 * math.pi * search.fit.reference_time * pursued.frequency
    )
    components = torch.stack([pursued.phasor.abs(), phase, pursued.frequency], -1)
    model = search.signal.total(components, pursued.found)
    torch.testing.assert_close(x - model.float(), pursued.residual, atol=1e-4, rtol=0)
    # and what it earned is the drop in energy
    drop = (
        0.5
        * x.shape[-1]
        * (
            x.double().square().sum(-1) / pursued.residual.double().square().sum(-1)
        ).log()
    )
    earned = torch.where(pursued.found, pursued.gain, 0.0).sum(-1)
    torch.testing.assert_close(earned, drop, rtol=1e-4, atol=0.05)


def test_a_batch_gives_what_each_gives_alone() -> None:
    theta = crowded.prior.sample((6,), generator_for(2))
    x = crowded.simulator(theta, generator_for(3))
    search = pursuit(crowded)
    batch = search(x)
    for i in range(len(x)):
        alone = search(x[i : i + 1])
        assert torch.equal(alone.found[0], batch.found[i])
        torch.testing.assert_close(alone.frequency[0], batch.frequency[i])
        torch.testing.assert_close(alone.gain[0], batch.gain[i], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("most", [1, 2])
def test_it_stops_at_the_most_it_may_find(most: int) -> None:
    _, x = signals(paper, ROWS[:1], 0.1)
    pursued: Pursued = pursuit(paper, most)(x)
    assert pursued.found.shape == (1, most)
    assert pursued.found.all()


def test_silence_is_no_trouble() -> None:
    pursued = pursuit(paper)(torch.zeros(2, paper.num_data))
    assert all(part.isfinite().all() for part in pursued)
    assert not pursued.found.any()
