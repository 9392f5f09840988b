"""Simulated signals per second on one thread; the target for ``paper`` is 5,000.

Beside exact white noise stands the noise of the paper's training data: drawn once on a
fine grid, interpolated onto both records.
"""

import pytest
import torch

from sbi_slotflow import problems
from sbi_slotflow.seeding import generator_for

NUM_SIGNALS = 1_024


@pytest.mark.parametrize("noise", ["white", "resampled"])
@pytest.mark.parametrize("preset", ["tiny", "paper", "crowded"])
@pytest.mark.benchmark(group="1,024 signals")
def test_simulator(benchmark, preset, noise):
    problem = problems.sinusoids(preset, noise=noise)
    theta = problem.prior.sample((NUM_SIGNALS,), generator_for(0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    benchmark.pedantic(problem.simulator, (theta,), rounds=15, warmup_rounds=3)
    torch.set_num_threads(before)
    per_second = NUM_SIGNALS / benchmark.stats.stats.median
    benchmark.extra_info["signals_per_second"] = round(per_second)
