import math

import pytest
import torch
from scipy import stats

from sbi_slotflow import WhiteNoise


@pytest.mark.parametrize(
    "noise", [WhiteNoise(0.7), WhiteNoise(), WhiteNoise(shared_index=1)]
)
def test_the_density_is_that_of_independent_normals(noise: WhiteNoise) -> None:
    shared = torch.rand(5, 2, dtype=torch.float64) + 0.2
    residual = torch.randn(5, 11, dtype=torch.float64)
    if noise.sigma is None:
        scale = shared[:, noise.shared_index]
    else:
        scale = torch.full((5,), noise.sigma, dtype=torch.float64)
    expected = stats.norm.logpdf(residual, scale=scale[:, None]).sum(-1)
    torch.testing.assert_close(
        noise.log_prob(residual, shared), torch.from_numpy(expected)
    )


@pytest.mark.parametrize("shared_index", [0, 1])
def test_the_standard_deviation_is_sigma(shared_index: int) -> None:
    shared = torch.tensor([[0.01, 0.5], [0.2, 3.0], [1.5, 1e-3]])
    noise = WhiteNoise(shared_index=shared_index)
    draws = noise.sample(torch.full((3, 100_000), 9.0), shared, None).double()
    for row, sigma in zip(draws, shared[:, shared_index].double(), strict=True):
        # false alarm in 1 of 10^6 seeds for each row
        assert stats.kstest((row / sigma).numpy(), "norm").pvalue > 1e-6
        # chi-square with 100,000 degrees of freedom, 5 standard deviations: 1 of 10^6
        chi_square = (row / sigma).square().sum().item()
        assert abs(chi_square - 100_000) < 5 * math.sqrt(2 * 100_000)


def test_no_noise_where_sigma_is_zero() -> None:
    assert (
        WhiteNoise(0.0).sample(torch.ones(2, 30), torch.ones(2, 0), None) == 0
    ).all()
