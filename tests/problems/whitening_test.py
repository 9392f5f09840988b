"""Noise of unknown shape in the exact sampler: maps, and posteriors by quadrature."""

import math
import warnings

import pytest
import torch
from sbi.utils import BoxUniform, MultipleIndependent
from torch import Tensor
from torch.distributions import Normal

from sbi_slotflow import (
    AdditiveSimulator,
    GaussianNoise,
    VariableKPrior,
    WhiteNoise,
    rjmcmc,
)
from sbi_slotflow.problems import Problem, Trace
from sbi_slotflow.problems.base import uniform
from sbi_slotflow.problems.whitening import Whitening

NUM = 48
TIMES = (torch.arange(NUM, dtype=torch.float64) + 0.5) / NUM
ERRORS = 0.1 + 0.2 * TIMES
FREQUENCY = torch.fft.rfftfreq(NUM, 1 / NUM).double().clamp(min=1)


def bump(components: Tensor) -> Tensor:
    time, height = components.unsqueeze(-1).unbind(-2)
    return height * torch.exp(-0.5 * ((TIMES.to(time) - time) / 0.04) ** 2)


def jitter(shared: Tensor) -> Tensor:
    return torch.hypot(ERRORS.to(shared), shared[..., -1:])


def falling(shared: Tensor) -> Tensor:
    return FREQUENCY.to(shared) ** -shared[..., -1:]


NOISES = {
    "jitter": GaussianNoise(errors=jitter, depends_on=0),
    "scaled jitter": GaussianNoise(errors=jitter, level=0, depends_on=1),
    "slope": GaussianNoise(spectrum=falling, level=0, depends_on=1),
}
BOUNDS = {
    "jitter": ((0.0,), (1.0,)),
    "scaled jitter": ((0.5, 0.0), (2.0, 1.0)),
    "slope": ((0.1, 0.0), (1.5, 2.0)),
}
TRUTHS = {"jitter": (0.3,), "scaled jitter": (1.2, 0.3), "slope": (0.5, 1.2)}


def problem_of(name: str) -> Trace:
    low, high = (torch.tensor(side) for side in BOUNDS[name])
    height = Normal(torch.tensor([0.5]), torch.tensor([0.5]))
    prior = VariableKPrior(
        MultipleIndependent([uniform(0, 1), height], validate_args=False),
        [1.0, 1.0],
        shared=BoxUniform(low, high),
        component_names=("time", "height"),
        shared_names=("level", "shape")[-len(low) :],
    )
    simulator = AdditiveSimulator(bump, NOISES[name], prior.layout)
    return Trace("bumps", prior, simulator, 24, linear=("height",))


def observed(problem: Problem, name: str, seed: int) -> Tensor:
    # Neither with nor without the bump is far better.
    theta = torch.tensor([[1.0, *TRUTHS[name], 0.4, 0.35]])
    return problem.simulator(theta, torch.Generator().manual_seed(seed))[0]


def by_quadrature(name: str, x: Tensor) -> tuple[float, Tensor, Tensor]:
    """p(K = 1 | x), and means and deviations of the shared parameters."""
    noise, num = NOISES[name], 60
    low, high = (torch.tensor(side).double() for side in BOUNDS[name])
    middles = (torch.arange(num).double() + 0.5) / num
    shared = torch.cartesian_prod(*[middles] * len(low)).reshape(-1, len(low))
    shared = low + (high - low) * shared
    places = (torch.arange(300).double() + 0.5) / 300
    basis = bump(torch.stack([places, torch.ones_like(places)], -1))
    none, some = [], []
    for row in shared:
        rows = row[None]
        none.append(noise.log_prob(x[None].double(), rows)[0])
        white, data = noise.whiten(basis, rows), noise.whiten(x[None].double(), rows)
        # The height is .5 + .5 h, h of N(0, 1).
        left, column = data - 0.5 * white, 0.5 * white
        power, inner = column.square().sum(-1), (column * left).sum(-1)
        gain = 0.5 * (data.square().sum(-1) - left.square().sum(-1))
        gain = gain + 0.5 * inner.square() / (1 + power) - 0.5 * (1 + power).log()
        some.append(none[-1] + gain.logsumexp(0) - math.log(len(gain)))
    log_p = torch.stack([torch.stack(none), torch.stack(some)])
    probs = (log_p - log_p.max()).exp()
    probs = probs / probs.sum()
    mean = probs.sum(0) @ shared
    variance = probs.sum(0) @ (shared - mean).square()
    return float(probs[1].sum()), mean, variance.sqrt()


@pytest.mark.parametrize("name", NOISES)
def test_noise_of_unknown_shape_has_the_posterior_of_quadrature(name: str) -> None:
    problem = problem_of(name)
    x = observed(problem, name, 2)
    expected, mean, deviation = by_quadrature(name, x)
    assert 0.05 < expected < 0.95
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # K may pile up at one
        draws = rjmcmc.collapsed(
            problem, x, num_chains=24, num_levels=2, num_draws=120, burn_in=600, seed=1
        )
    assert draws.converged
    assert draws.diagnostics is not None
    ess = draws.diagnostics.ess
    # five standard errors each: 6e-7 for each of five
    error = math.sqrt(expected * (1 - expected) / ess["K"])
    assert float(draws.cardinality().probs[1]) == pytest.approx(expected, abs=5 * error)
    shared = problem.layout.unpack(draws.rows).shared.double()
    for d, parameter in enumerate(problem.shared_names):
        error = float(deviation[d]) / math.sqrt(ess[parameter])
        found = shared[:, d]
        assert float(found.mean()) == pytest.approx(float(mean[d]), abs=5 * error)
        assert float(found.std()) == pytest.approx(float(deviation[d]), rel=0.15)


@pytest.mark.parametrize("name", NOISES)
def test_signals_are_white_by_each_row_and_back(name: str) -> None:
    problem = problem_of(name)
    x = observed(problem, name, 3)
    noise, prior = NOISES[name], problem.prior
    whitening = Whitening(noise, prior, x.double())
    shared = problem.layout.unpack(prior.sample((4,)).double()).shared
    signal = torch.randn(4, 2, NUM, generator=torch.Generator().manual_seed(1)).double()
    level = noise.scale(shared)[:, None, None]
    for i in range(4):
        expected = noise.whiten(signal[i], shared[i : i + 1]) * level[i]
        torch.testing.assert_close(whitening(signal, shared)[i], expected)
    flat = signal[:, 0]
    torch.testing.assert_close(
        whitening.coloured(whitening(flat, shared), shared), flat
    )
    usual = whitening.usual.expand(4, -1)
    torch.testing.assert_close(
        whitening.as_usual(whitening(flat, shared), shared), whitening(flat, usual)
    )
    # The density of noise is that of white noise less the determinant.
    white = whitening(flat, shared)
    value = WhiteNoise(None).log_prob(white, level[:, 0])
    value = value - whitening.log_det(shared, NUM)
    torch.testing.assert_close(value, noise.log_prob(flat, shared))
    assert (whitening.usual >= torch.tensor(BOUNDS[name][0])).all()
