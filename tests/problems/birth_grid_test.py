"""Where components are born: a density, of one class and of several."""

import math
from collections.abc import Callable

import pytest
import torch
from two_classes import bump, problem_of

from sbi_slotflow import WhiteNoise
from sbi_slotflow.problems import Problem, sinusoids, spikes
from sbi_slotflow.problems.marginal_likelihood import Target


@pytest.mark.parametrize("make", [lambda: sinusoids("tiny"), spikes])
def test_births_have_a_density(make: Callable[[], Problem]) -> None:
    problem = make()
    form, noise = problem.linear_form(), problem.simulator.noise
    assert form is not None
    x = torch.randn(problem.num_data, generator=torch.Generator().manual_seed(0))
    target = Target(problem.prior, form, noise, x.double())
    grid = target.grid
    weights = grid.log_weights(target.x[None], torch.tensor([0.5]).double())
    assert float(weights.logsumexp(-1)) == pytest.approx(0.0, abs=1e-9)
    generator = torch.Generator().manual_seed(2)
    u = grid.draw(weights.expand(2_000, -1), generator)
    volume = math.log(float(grid.shapes.prod()))
    centres, shape = grid.centre(torch.arange(weights.shape[-1])), grid.shapes[0]
    # draws, and the outermost places of every cell
    places = [u, *((centres + end / shape).clamp(0, 1) for end in (-0.49, 0.49))]
    for at in places:
        away = ((centres - at[:, None]) * shape).abs().amax(-1)
        assert (away.amin(-1) <= 0.5).all()
        expected = weights[0, away.argmin(-1)] + volume
        found = grid.log_prob(weights.expand(len(at), -1), at)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_births_of_every_class_have_a_density() -> None:
    problem = problem_of(0.5, [1, 1, 1], [1, 1])
    form = problem.linear_form()
    assert form is not None
    x = bump(torch.tensor([0.3, 1.0], dtype=torch.float64))
    grid = Target(problem.prior, form, WhiteNoise(0.5), x).grid
    sigma = torch.tensor([0.5]).double()
    room = torch.tensor([[True, True]])
    weights = grid.log_weights(x[None], sigma, room)
    assert float(weights.logsumexp(-1)) == pytest.approx(0.0, abs=1e-9)
    u = grid.draw(weights.expand(20_000, -1), torch.Generator().manual_seed(1))
    log_q = grid.log_prob(weights.expand(len(u), -1), u)
    label = grid.coordinates.label(u)
    for c, num in enumerate((1, 2)):  # 1 / q integrates to the volume, where q is
        here = torch.where(label == c, (-log_q).exp(), 0.0)
        error = float(here.std() / math.sqrt(len(u)))
        assert float(here.mean()) == pytest.approx(1.0, abs=5 * error), num
    full = grid.log_weights(x[None], sigma, torch.tensor([[True, False]]))
    assert float(full.logsumexp(-1)) == pytest.approx(0.0, abs=1e-9)
    assert torch.isneginf(full[0, grid.label == 1]).all()
