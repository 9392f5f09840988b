"""Invariants of the chirp transform."""

import math

import pytest
import torch

from sbi_slotflow.problems.sinusoids.tokens import ChirpTransform


@pytest.mark.parametrize(
    ("length", "rate", "start", "step", "num"),
    [
        (3_000, 10.0, 2.5, 1 / 3_000, 1_500),
        (81, 4.0, 0.3, 0.05, 7),
        (2, 1.0, 0, 0.1, 9),
    ],
)
def test_amplitudes_are_the_sums_that_define_them(
    length: int, rate: float, start: float, step: float, num: int
) -> None:
    torch.manual_seed(0)
    taper = torch.hann_window(length, dtype=torch.float64) + 0.1
    tapers = torch.stack([torch.ones_like(taper), taper])
    record = torch.randn(3, length)
    time = (torch.arange(length, dtype=torch.float64) - 0.5 * (length - 1)) / rate
    frequency = start + step * torch.arange(num, dtype=torch.float64)
    wave = torch.exp(-2j * math.pi * time.unsqueeze(-1) * frequency)
    weighted = record.double().unsqueeze(-2) * tapers
    expected = (weighted + 0j) @ wave * (2 / tapers.sum(-1, keepdim=True))
    found = ChirpTransform(tapers, rate, start, step, num)(record)
    assert found.shape == (3, 2, num)
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 3e-6


def test_the_transform_can_be_moved_to_float64() -> None:
    transform = ChirpTransform(torch.ones(1, 50).double(), 10.0, 1.0, 0.1, 5).double()
    assert transform(torch.ones(1, 50).double()).dtype == torch.complex128
