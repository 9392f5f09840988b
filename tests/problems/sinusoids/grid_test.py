import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sbi_slotflow.problems import sinusoids
from sbi_slotflow.problems.sinusoids.grid import Grid, SineSignal

PRESETS = ["tiny", "paper", "crowded"]
# lengths with and without a divisor near their root, primes, and tiny ones
LENGTHS = [1, 2, 3, 4, 12, 97, 101, 1000, 1009, 3000]


def directly(grids: tuple[Grid, ...], components: np.ndarray) -> np.ndarray:
    """Sum A cos(2 pi f t + phi) of components ``(K, 3)`` in float64."""
    starts = [np.arange(grid.num_samples) / grid.rate for grid in grids]
    times = np.concatenate(starts)
    amplitude, phase, frequency = components.astype(np.float64).T[..., None]
    return (amplitude * np.cos(2 * np.pi * frequency * times + phase)).sum(0)


def random_components(*batch: int) -> Tensor:
    low = torch.tensor([0.5, 0.0, 0.0])
    high = torch.tensor([1.5, 2 * math.pi, 5.0])
    return low + (high - low) * torch.rand(*batch, 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_signals_equal_their_float64_evaluation(preset: Any) -> None:
    problem = sinusoids(preset)
    theta = problem.prior.sample((40,))
    parts = problem.layout.unpack(theta)
    expected = [
        directly(problem.grids, components[:k].numpy())
        for components, k in zip(parts.components, parts.cardinality, strict=True)
    ]
    signal = problem.simulator.signal(theta)
    assert signal.dtype == torch.float32
    np.testing.assert_allclose(signal, expected, rtol=0, atol=1e-5)
    exact = problem.simulator.signal(theta.double())
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("preset", PRESETS)
def test_each_component_equals_its_float64_evaluation(preset: Any) -> None:
    problem = sinusoids(preset)
    components = problem.prior.component.sample(torch.Size((2 * 5,))).reshape(2, 5, 3)
    signals = SineSignal(problem.grids)(components)
    assert signals.shape == (2, 5, problem.num_data)
    expected = [
        directly(problem.grids, c.numpy()[None]) for c in components.flatten(0, 1)
    ]
    np.testing.assert_allclose(signals.flatten(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_grids_of_any_length_are_exact(length: int) -> None:
    grids = (Grid(length / 10, 10.0), Grid(3.0, 7.0))
    signal = SineSignal(grids)
    assert signal.num_samples == length + 21
    components = random_components(4, 3)
    total = signal.total(components, torch.ones(4, 3, dtype=torch.bool))
    expected = [directly(grids, row.numpy()) for row in components]
    np.testing.assert_allclose(total, expected, rtol=0, atol=1e-5)


def test_a_long_record_loses_no_accuracy() -> None:
    # a million samples and 40,000 turns: float32 phases would be off by 1e-2
    grids = (Grid(10_000.0, 100.0),)
    components = torch.tensor([[1.0, 0.3, 3.9871], [0.7, 5.0, 4.0]])
    signal = SineSignal(grids).total(components[None], torch.ones(1, 2).bool())
    expected = directly(grids, components.numpy())
    np.testing.assert_allclose(signal[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_masked_components_add_nothing(preset: Any) -> None:
    problem = sinusoids(preset)
    signal = SineSignal(problem.grids)
    components = random_components(20, 4)
    mask = torch.rand(20, 4) < 0.5
    total = signal.total(components, mask)
    expected = [
        directly(problem.grids, row[keep].numpy())
        for row, keep in zip(components, mask, strict=True)
    ]
    np.testing.assert_allclose(total, expected, rtol=0, atol=1e-5)
    changed = torch.where(mask.unsqueeze(-1), components, random_components(20, 4))
    torch.testing.assert_close(signal.total(changed, mask), total, rtol=0, atol=1e-6)
    assert (signal.total(components, torch.zeros_like(mask)) == 0).all()


def test_no_components_give_no_signals() -> None:
    signal = SineSignal((Grid(2.0, 10.0),))
    assert signal(torch.zeros(0, 3)).shape == (0, 20)
    assert signal(torch.zeros(2, 0, 3)).shape == (2, 0, 20)


def test_the_signal_has_the_gradient_of_a_sine() -> None:
    grid = Grid(2.0, 10.0)
    components = random_components(3).double().requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    weights = torch.randn(20, dtype=torch.float64)
    (found,) = torch.autograd.grad(
        SineSignal((grid,)).total(components[None], mask)[0] @ weights, components
    )
    amplitude, phase, frequency = components.detach().numpy().T[..., None]
    times = np.arange(20) / 10
    angle = 2 * np.pi * frequency * times + phase
    expected = np.stack(
        [
            np.cos(angle) @ weights.numpy(),
            (-amplitude * np.sin(angle)) @ weights.numpy(),
            (-amplitude * np.sin(angle) * 2 * np.pi * times) @ weights.numpy(),
        ],
        axis=-1,
    )
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_a_grid_starts_at_zero_and_leaves_out_its_end() -> None:
    grid = Grid(2.0, 5.0)
    assert grid.num_samples == 10
    assert grid.times.dtype == torch.float64
    np.testing.assert_allclose(grid.times, np.arange(10) * 0.2)
