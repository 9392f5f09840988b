"""The geometry that collapsed chains move by: slopes, resolution, births."""

import math

import pytest
import torch

from sbi_slotflow.problems import sinusoids, spikes
from sbi_slotflow.problems.marginal_likelihood import Target
from sbi_slotflow.problems.simulator import WhiteNoise

PROBLEMS = {"sinusoids": sinusoids("tiny"), "spikes": spikes()}


@pytest.fixture(params=PROBLEMS, name="target", scope="module")
def _target(request: pytest.FixtureRequest) -> Target:
    problem = PROBLEMS[request.param]
    generator = torch.Generator().manual_seed(0)
    x = problem.simulator(problem.prior.sample((1,), generator), generator)[0]
    form, noise = problem.linear_form(), problem.simulator.noise
    assert form is not None
    assert isinstance(noise, WhiteNoise)
    return Target(problem.prior, form, noise, x.double())


def test_slopes_of_signals_are_autograds(target: Target) -> None:
    generator = torch.Generator().manual_seed(1)
    u = 0.1 + 0.8 * torch.rand(
        5, target.num_nonlinear, generator=generator, dtype=torch.float64
    )
    num = len(target.location)
    amplitudes = 0.5 + torch.rand(5, num, generator=generator, dtype=torch.float64)
    found = target.derivatives(u, amplitudes)
    for i in range(len(u)):

        def signal(place: torch.Tensor, i: int = i) -> torch.Tensor:
            return amplitudes[i] @ target.signals(place)

        expected = torch.autograd.functional.jacobian(signal, u[i])
        assert isinstance(expected, torch.Tensor)
        error = (found[i] - expected.mT).norm() / expected.norm()
        assert error < 1e-5


def test_births_have_a_density(target: Target) -> None:
    grid = target.grid
    weights = grid.log_weights(target.x[None], torch.tensor([0.5]).double())
    assert float(weights.logsumexp(-1)) == pytest.approx(0.0, abs=1e-9)
    generator = torch.Generator().manual_seed(2)
    u = grid.draw(weights.expand(2_000, -1), generator)
    volume = math.log(float(grid.shape.prod()))
    centres = grid.centre(torch.arange(weights.shape[-1]))
    # draws, and the outermost places of every cell
    places = [u, *((centres + end / grid.shape).clamp(0, 1) for end in (-0.49, 0.49))]
    for at in places:
        away = ((centres - at[:, None]) * grid.shape).abs().amax(-1)
        assert (away.amin(-1) <= 0.5).all()
        expected = weights[0, away.argmin(-1)] + volume
        found = grid.log_prob(weights.expand(len(at), -1), at)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
