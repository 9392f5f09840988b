"""What a scan measures, and that it sees what averages over a record hide."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import signal, stats

from sbi_slotflow.calibration.scan import Scan, tail
from sbi_slotflow.seeding import generator_for


def noise(num: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(num, size, generator=generator_for(seed))


@pytest.fixture(scope="module")
def scan() -> Scan:
    return Scan.fit(noise(2_000, 300, 0), [200, 100])


def test_the_numbers_are_those_of_scipy() -> None:
    size = 64
    scan = Scan.fit(noise(500, size, 0), [size])
    x = noise(1, size, 1)
    found = scan.numbers(x)[0].numpy()
    record = x[0].double().numpy()
    window = signal.get_window("hann", size)
    power = np.abs(np.fft.rfft(record * window)) ** 2
    # torch takes the lower of two medians.
    expected = np.log(power / np.sort(power)[(len(power) - 1) // 2])
    np.testing.assert_allclose(found[: size // 2 + 1], expected)
    left = np.fft.irfft(np.fft.rfft(record) * scan.gains.double().numpy(), n=size)
    left = left[size // 32 : -(size // 32)]
    kurtosis = np.mean(left**4) / np.mean(left**2) ** 2
    np.testing.assert_allclose(found[-11], math.log(kurtosis))
    lagged = np.mean(left[1:] * left[:-1]) / np.mean(left**2)
    power = math.log(np.mean(record**2))
    expected = [power, lagged, -power, -lagged]
    np.testing.assert_allclose(found[[-10, -9, -5, -4]], expected)


def test_a_tail_counts_from_one_in_ten_in_units_to_one_in_a_hundred() -> None:
    values = torch.linspace(0, 1, 1_001, dtype=torch.float64)
    torch.testing.assert_close(tail(values), torch.tensor([0.9, 0.09]).double())


def test_no_score_depends_on_the_unit(scan: Scan) -> None:
    x = noise(20, 300, 1)
    for unit in (2.0**-70, 2.0**70):
        other = Scan.fit(unit * noise(2_000, 300, 0), [200, 100])
        # Limits are kept in single precision.
        torch.testing.assert_close(
            other.scores(unit * x), scan.scores(x), rtol=1e-4, atol=1e-4
        )


def usual(scan: Scan) -> float:
    """A score that 5 in 1,000 of ordinary records exceed."""
    return float(scan.scores(noise(2_000, 300, 2)).quantile(0.995))


@pytest.mark.parametrize("frequency", [0.03, 0.11, 0.26, 0.4])  # a sample
def test_a_tone_is_seen_at_any_frequency(scan: Scan, frequency: float) -> None:
    tone = torch.cos(2 * math.pi * frequency * torch.arange(300.0))
    assert (scan.scores(noise(100, 300, 3) + tone) > usual(scan)).double().mean() > 0.9


def test_a_tone_is_seen_in_a_long_record() -> None:
    scan = Scan.fit(noise(300, 6_000, 0), [6_000])
    tone = 0.2 * torch.cos(0.7 * torch.arange(6_000.0))
    x = noise(40, 6_000, 1)
    assert scan.scores(x + tone).min() > scan.scores(x).max()


def test_a_louder_half_is_seen_in_a_long_record() -> None:
    scan = Scan.fit(noise(1_000, 4_000, 0), [4_000])
    x = noise(40, 4_000, 1)
    # Of the same power in all, and too little for the kurtosis.
    factors = torch.where(torch.arange(4_000) < 2_000, 1.3, 1.0)
    louder = x * factors / factors.square().mean().sqrt()
    assert scan.scores(louder).median() > scan.scores(x).max()


def test_what_the_training_data_hold_is_no_surprise() -> None:
    times = torch.arange(300.0)
    turns = torch.rand(3_000, 1, generator=generator_for(1))
    tones = 2 * torch.cos(0.7 * times + 2 * math.pi * turns)
    x = noise(3_000, 300, 0) + tones
    scan = Scan.fit(x[:2_000], [300])
    limit = scan.scores(x[2_000:]).quantile(0.995)
    other = noise(100, 300, 3) + 2 * torch.cos(1.7 * times)
    assert (scan.scores(other) > limit).all()
    # The filter takes away what the training data hold, and leaves the rest.
    gain = scan.gains
    at = round(0.7 / (2 * math.pi) * 300)
    assert gain[at] < 0.1 < 0.5 < gain[at + 20 :].min()


CHANGES = {
    "louder": lambda x: 1.5 * x,
    "quieter": lambda x: x / 1.5,
    "a louder stream": lambda x: torch.cat([x[:, :200], 3 * x[:, 200:]], -1),
    "a quieter stream": lambda x: torch.cat([x[:, :200], x[:, 200:] / 3], -1),
    "a louder stretch": lambda x: torch.where(torch.arange(300) < 50, 3 * x, x),
    "one sample": lambda x: x + 12 * (torch.arange(300) == 77),
    "an offset": lambda x: x + 1,
    "colour": lambda x: torch.cat([x[:, :1], x[:, 1:] + 0.8 * x[:, :-1]], -1),
    "heavy tails": lambda x: x.sign() * x.abs() ** 2.5,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(scan: Scan, change: str) -> None:
    x = CHANGES[change](noise(100, 300, 4))
    assert (scan.scores(x) > usual(scan)).double().mean() > 0.9


def test_short_streams_are_left_out() -> None:
    scan = Scan.fit(noise(500, 110, 0), [100, 10])
    x = noise(5, 110, 1)
    other = torch.cat([x[:, :100], 100 * x[:, 100:]], -1)
    torch.testing.assert_close(scan.scores(x), scan.scores(other))


def test_scores_of_fresh_records_are_those_of_others(scan: Scan) -> None:
    first, second = (scan.scores(noise(1_000, 300, seed)).numpy() for seed in (5, 6))
    found: Any = stats.ks_2samp(first, second)
    assert found.pvalue > 1e-4  # a false alarm in 10,000 runs
