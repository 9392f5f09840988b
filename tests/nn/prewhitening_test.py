"""Components taken out of records in turn, against dense Gaussian processes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sbi_slotflow.nn.encoders import PeriodogramTokens
from sbi_slotflow.nn.prewhitening import NUM_NUMBERS, prewhitened
from sbi_slotflow.nn.spec import build

FREQUENCIES = torch.linspace(0.02, 0.45, 300, dtype=torch.float64)


def records(num: int = 3, seed: int = 0) -> Tensor:
    """A strong and a weak sinusoid in noise, at irregular times."""
    generator = torch.Generator().manual_seed(seed)
    time = 100 * (torch.rand(num, 50, generator=generator, dtype=torch.float64) - 0.5)
    error = 0.5 + torch.rand(num, 50, generator=generator, dtype=torch.float64)
    noise = torch.randn(num, 50, generator=generator, dtype=torch.float64)
    strong = 40 * (2 * math.pi * 0.2 * time + 1).cos()
    weak = 3 * (2 * math.pi * 0.1234 * time + 2).cos()
    return torch.stack([time, 5 + strong + weak + error * noise, error], -1)


def test_what_is_left_is_explained_as_by_a_gaussian_process() -> None:
    x = records()
    found = prewhitened(x, FREQUENCIES, 1)
    for b, (time, value, error) in enumerate(x.numpy().transpose(0, 2, 1)):
        size = math.sqrt(len(time)) / np.linalg.norm(1 / error)
        inverse = np.linalg.inv(np.diag(error**2) + 1e6 * size**2)

        def explained(
            frequency: float,
            inverse: np.ndarray,
            time: np.ndarray = time,
            value: np.ndarray = value,
        ) -> float:
            turn = 2 * np.pi * frequency * time
            waves = np.stack([np.cos(turn), np.sin(turn)])
            right = waves @ inverse @ value
            return float(right @ np.linalg.solve(waves @ inverse @ waves.T, right))

        frequency = float(found.frequencies[b, 0])
        assert frequency == pytest.approx(0.2, abs=1e-3)
        # Amplitudes, in units of a usual error, of the wave of harmonics.
        turn = 2 * np.pi * frequency * time
        waves = np.stack([np.cos(turn), np.sin(turn)])
        norm = np.einsum("wi,ij,wj", waves, inverse, waves) * size**2
        square = 2 * (explained(frequency, inverse) + 1) / norm * size**2
        lag = time[:, None] - time
        kernel = sum(
            0.25**h * square * np.cos(2 * np.pi * (h + 1) * frequency * lag)
            for h in range(4)
        )
        after = np.linalg.inv(np.linalg.inv(inverse) + kernel)
        for i in (0, 70, 150):
            one = float(FREQUENCIES[i])
            assert float(found.power[b, 0, i]) == pytest.approx(
                explained(one, inverse), rel=0.01
            )
            assert float(found.power[b, 1, i]) == pytest.approx(
                explained(one, after), rel=0.05, abs=0.05
            )


def test_a_weak_component_is_found_beside_a_strong_one() -> None:
    found = prewhitened(records(20), FREQUENCIES, 2)
    assert (found.frequencies[:, 0] - 0.2).abs().max() < 1e-3
    # Within the resolution, 1/100; by chance another peak is higher.
    near = (found.frequencies[:, 1] - 0.1234).abs() < 0.01
    assert near.double().mean() > 0.8
    best = found.power.amax(-1)
    assert (best[:, 0] > 10 * best[:, 1]).all()
    assert (best[:, 1] > best[:, 2]).all()


def test_harmonics_are_taken_out_with_their_component() -> None:
    x = records(5)
    turn = 2 * math.pi * 0.08 * x[..., 0]
    x[..., 1] = 30 * (turn.cos() + 0.5 * (2 * turn).sin() + 0.2 * (3 * turn).cos())
    found = prewhitened(x, FREQUENCIES, 1)
    # The frequency is that of one sinusoid, so that a little is left; of a component
    # without harmonics a fifth would be.
    most = found.power.amax(-1)
    assert (most[:, 0] > 1_000).all()
    assert (most[:, 1] < 0.1 * most[:, 0]).all()


@pytest.mark.parametrize("unit", [1e-21, 1e21])
def test_units_and_padding_change_nothing(unit: float) -> None:
    x = records()
    found = prewhitened(x, FREQUENCIES, 2)
    other = x * torch.tensor([1.0, unit, unit], dtype=torch.float64)
    padded = torch.cat([other, torch.zeros(3, 7, 3, dtype=torch.float64)], 1)
    for a, b in zip(found, prewhitened(padded, FREQUENCIES, 2), strict=True):
        torch.testing.assert_close(b, a, rtol=0.02, atol=0.02)


def test_no_samples_and_few_frequencies_have_numbers() -> None:
    for frequencies in (FREQUENCIES, FREQUENCIES[:2]):
        for x in (torch.zeros(2, 5, 3), records()[:, :1].float()):
            for part in prewhitened(x, frequencies, 2):
                assert part.isfinite().all()
    found = prewhitened(records(), FREQUENCIES, 0)
    assert found.frequencies.shape == (3, 0)
    assert found.numbers.shape == (3, 1, NUM_NUMBERS)


def test_tokens_hold_what_is_left_and_what_was_there() -> None:
    tokens = PeriodogramTokens(50, 100, FREQUENCIES.tolist(), num_removed=2)
    x = records().float()
    channels, level, _ = tokens(x)
    assert channels.shape == (3, 100, tokens.channels)
    assert level.shape == (3, tokens.num_levels)
    found = prewhitened(x, FREQUENCIES, 2)
    left = channels[..., 18:24].unflatten(-1, (3, 2)).movedim(-1, 1).flatten(2)
    torch.testing.assert_close(left.expm1(), found.power[:, 1:], rtol=1e-4, atol=1e-4)
    marks = channels[..., 24:]
    assert (marks.sum(1) == 1).all()
    at = FREQUENCIES[3 * marks.argmax(1) + 1]
    assert ((at - found.frequencies).abs() < 3 * 0.43 / 299).all()
    rebuilt = build("front end", tokens.spec)
    assert isinstance(rebuilt, PeriodogramTokens)
    assert torch.equal(rebuilt(x)[0], channels)
    # Files of networks without it know nothing of it.
    assert "num_removed" not in PeriodogramTokens(50, 100, [0.1] * 100).spec
