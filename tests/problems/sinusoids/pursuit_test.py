"""Matching pursuit against the truth and its Cramer-Rao bound."""

import math

import numpy as np
import pytest
import torch

from sbi_slotflow import problems
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.problems.sinusoids.fit import Floats, SineStatistics
from sbi_slotflow.problems.sinusoids.pursuit import (
    Pursued,
    SinePursuit,
    SinusoidFit,
    matching_pursuit,
    residual_power,
)
from sbi_slotflow.seeding import generator_for

paper, crowded = problems.sinusoids("paper"), problems.sinusoids("crowded")
tiny = problems.sinusoids("tiny")


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
    model = search.fit.signal.total(components, pursued.found)
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


# fits of one observation, for each number of components


def signal(problem: Sinusoids, components: Floats) -> Floats:
    times = torch.cat([grid.times for grid in problem.grids]).numpy()
    amplitude, phase, frequency = components.T[..., None]
    return (amplitude * np.cos(2 * math.pi * frequency * times + phase)).sum(0)


def pursue(
    problem: Sinusoids, x: Floats, most: int, separation: float | None = None
) -> tuple[list[SinusoidFit], SineStatistics]:
    band = problem.prior.component_marginals[2].bounds
    statistics = SineStatistics.of(x, problem.grids, band)
    if separation is None:
        separation = problem.prior.min_separation or 0.0
    return matching_pursuit(x, statistics, band, most, separation), statistics


def draw(problem: Sinusoids, seed: int) -> tuple[Floats, float, Floats]:
    """Components, sigma and an observation."""
    generator = torch.Generator().manual_seed(seed)
    theta = problem.prior.sample((1,), generator).double()
    parts = problem.layout.unpack(theta)
    components = parts.components[0, : int(parts.cardinality)].numpy()
    sigma = max(parts.shared.item(), 0.02)
    noise = np.random.default_rng(seed).standard_normal(problem.num_data)
    return components, sigma, signal(problem, components) + sigma * noise


@pytest.mark.parametrize("seed", range(8))
def test_the_fit_at_the_true_number_is_as_good_as_the_bound(seed: int) -> None:
    components, sigma, x = draw(paper, seed)
    num = len(components)
    fits, _ = pursue(paper, x, num)
    fit = fits[num]
    bound = sigma * np.sqrt(np.diag(np.linalg.inv(fit.information)))
    # beyond 6 standard deviations 2 in 10^9: false alarm in 3 of 10^7 for all signals
    assert (np.abs(fit.frequency - components[:, 2]) < 6 * bound).all()
    # chi-square of N - 3 K: 6 of its standard deviations
    freedom = paper.num_data - 3 * num
    assert abs(fit.energy / sigma**2 / freedom - 1) < 6 * math.sqrt(2 / freedom)


@pytest.mark.parametrize("preset", [tiny, paper], ids=["tiny", "paper"])
def test_residual_energy_falls_with_each_component(preset: Sinusoids) -> None:
    _, _, x = draw(preset, 3)
    most = preset.prior.max_cardinality
    fits, statistics = pursue(preset, x, most)
    assert [len(fit.frequency) for fit in fits] == [*range(most + 1)]
    energy = [fit.energy for fit in fits]
    assert energy[0] == statistics.energy
    assert (np.diff(energy) < 0).all()
    for fit in fits:
        assert (np.diff(fit.frequency) > 0).all()
        components = statistics.components(fit.amplitudes, fit.frequency)
        residual = x - signal(preset, components)
        assert fit.energy == pytest.approx(residual @ residual, rel=1e-9)


def test_two_close_tones_are_told_apart() -> None:
    # 1.2 resolution elements
    truth = np.array([[1.0, 0.3, 2.7], [0.8, 2.0, 2.704]])
    noise = np.random.default_rng(0).standard_normal(paper.num_data)
    fits, _ = pursue(paper, signal(paper, truth) + 0.1 * noise, 2, separation=0.0)
    bound = 0.1 * np.sqrt(np.diag(np.linalg.inv(fits[2].information)))
    # false alarm in 4 of 10^9 seeds
    assert (np.abs(fits[2].frequency - truth[:, 2]) < 6 * bound).all()
    assert (bound < 1e-4).all()


@pytest.mark.parametrize("gap", [0.002, 0.006])
def test_the_separation_is_kept(gap: float) -> None:
    """Even where the data are made of tones closer than that."""
    truth = np.array(
        [[1.0, 0.3, 2.7], [0.8, 2.0, 2.7 + gap], [1.2, 1.0, 2.9], [1.0, 4, 2.9 + gap]]
    )
    noise = np.random.default_rng(0).standard_normal(paper.num_data)
    x = signal(paper, truth) + 0.05 * noise
    fits, _ = pursue(paper, x, 10)
    for fit in fits[2:]:
        assert np.diff(fit.frequency).min() >= 0.01 - 1e-12
        assert fit.frequency.min() >= 2.5
        assert fit.frequency.max() <= 3.0


def test_pursuit_ends_where_no_place_is_left() -> None:
    _, _, x = draw(tiny, 1)
    fits, _ = pursue(tiny, x, 9, separation=0.5)
    assert 2 <= len(fits) - 1 <= 4


def test_tones_at_the_edges_stay_in_the_band() -> None:
    truth = np.array([[1.0, 0.3, 2.5], [0.8, 2.0, 3.0]])
    noise = np.random.default_rng(0).standard_normal(paper.num_data)
    fits, _ = pursue(paper, signal(paper, truth) + 0.3 * noise, 2)
    # a sd is 1e-5
    np.testing.assert_allclose(fits[2].frequency, [2.5, 3.0], atol=1e-4)
    assert fits[2].frequency[0] >= 2.5
    assert fits[2].frequency[1] <= 3.0


def test_information_is_the_hessian_of_the_profiled_energy() -> None:
    truth = np.array([[1.0, 0.3, 0.9], [0.7, 2.0, 1.1], [1.3, 5.0, 1.6]])
    # without noise the expected information is the observed one
    fits, _ = pursue(tiny, signal(tiny, truth), 3)
    fit = fits[3]
    np.testing.assert_allclose(fit.frequency, truth[:, 2], atol=1e-7)
    times = torch.cat([grid.times for grid in tiny.grids]).numpy()

    def half_energy(frequency: Floats) -> float:
        angle = 2 * math.pi * np.outer(times - 10.0, frequency)
        linear = np.concatenate([np.cos(angle), np.sin(angle)], -1)
        residual = signal(tiny, truth)
        residual = residual - linear @ np.linalg.lstsq(linear, residual)[0]
        return 0.5 * float(residual @ residual)

    step = 2e-4
    steps = step * np.eye(3)
    hessian = np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            corners = [
                a * b * half_energy(truth[:, 2] + a * steps[i] + b * steps[j])
                for a in (1, -1)
                for b in (1, -1)
            ]
            hessian[i, j] = sum(corners) / (4 * step**2)
    scale = np.abs(hessian).max()
    np.testing.assert_allclose(fit.information, hessian, atol=1e-3 * scale, rtol=0)


def test_residual_power_is_the_energy_that_one_more_takes() -> None:
    truth = np.array([[1.0, 0.3, 2.6], [0.6, 2.0, 2.9]])
    fits, statistics = pursue(paper, signal(paper, truth), 2)
    power = residual_power(statistics, fits[1], np.array([2.75, 2.9]))
    gain = fits[1].energy - fits[2].energy
    # approximate: cos and sin are nearly orthogonal over a hundred periods
    assert power[1] == pytest.approx(gain, rel=0.01)
    assert power[0] < 0.1 * gain  # side lobes of the short record
