"""The geometry that collapsed chains move by: slopes, resolution."""

import pytest
import torch

from sbi_slotflow.problems import sinusoids, spikes
from sbi_slotflow.problems.marginal_likelihood import Target
from sbi_slotflow.problems.simulator import WhiteNoise

PROBLEMS = {"sinusoids": sinusoids("tiny"), "spikes": spikes()}


def any_target(name: str) -> Target:
    problem = PROBLEMS[name]
    generator = torch.Generator().manual_seed(0)
    x = problem.simulator(problem.prior.sample((1,), generator), generator)[0]
    form, noise = problem.linear_form(), problem.simulator.noise
    assert form is not None
    assert isinstance(noise, WhiteNoise)
    return Target(problem.prior, form, noise, x.double())


@pytest.mark.parametrize("name", PROBLEMS)
def test_slopes_of_signals_are_autograds(name: str) -> None:
    target = any_target(name)
    generator = torch.Generator().manual_seed(1)
    u = 0.1 + 0.8 * torch.rand(
        5, target.num_nonlinear, generator=generator, dtype=torch.float64
    )
    num = len(target.working.means[0])
    amplitudes = 0.5 + torch.rand(5, num, generator=generator, dtype=torch.float64)
    found = target.derivatives(u, amplitudes)
    for i in range(len(u)):

        def signal(place: torch.Tensor, i: int = i) -> torch.Tensor:
            return amplitudes[i] @ target.signals(place)

        expected = torch.autograd.functional.jacobian(signal, u[i])
        assert isinstance(expected, torch.Tensor)
        error = (found[i] - expected.mT).norm() / expected.norm()
        assert error < 1e-5
