"""The likelihood of counts is that of Poisson, the background integrated out."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Poisson

from sbi_slotflow.problems.counts import CountLikelihood

NUM = 60
TIMES = torch.arange(NUM).double() / NUM
COLUMNS = torch.stack([torch.ones(NUM).double(), TIMES - 0.5])
CONSTANT = 0.5 + TIMES
MEAN = torch.tensor([6.0, 0.0]).double()
COVARIANCE = torch.tensor([[1.5, 0.3], [0.3, 4.0]]).double()


def bump(components: Tensor) -> Tensor:
    """A line ``(..., 60)`` at a place, with a height, of components ``(..., 2)``."""
    place, height = components.unsqueeze(-1).unbind(-2)
    return height * torch.exp(-0.5 * ((TIMES - place) / 0.05).square())


COMPONENTS = torch.tensor([[0.3, 8.0], [0.5, 3.0], [0.9, 20.0]]).double()


def slopes(components: Tensor) -> Tensor:
    """Derivatives ``(N, 2, 60)``."""
    each = [torch.autograd.functional.jacobian(bump, one).mT for one in components]
    return torch.stack(each)


def counted(level: float = 1.0) -> tuple[Tensor, CountLikelihood]:
    rate = level * (CONSTANT + MEAN @ COLUMNS + bump(COMPONENTS))
    x = torch.poisson(rate, torch.Generator().manual_seed(0))
    given = x, COLUMNS, level * CONSTANT, level * MEAN, level**2 * COVARIANCE
    return x, CountLikelihood(*given)


def test_equations_are_slopes_of_the_integrated_likelihood() -> None:
    x, likelihood = counted()
    # Far from the likeliest components, so that slopes are no zeros.
    about, owner = COMPONENTS + torch.tensor([0.02, -1.0]), torch.arange(3)
    found = likelihood.equations(bump(about), slopes(about), owner)

    def minus_half(components: Tensor, i: int) -> Tensor:
        """The likelihood and prior of the background, at its most."""
        beta = MEAN.clone().requires_grad_()
        solver = torch.optim.LBFGS([beta], max_iter=200, tolerance_grad=1e-12)
        inverse = torch.linalg.inv(COVARIANCE)

        def cost(beta: Tensor) -> Tensor:
            rate = CONSTANT + beta @ COLUMNS + bump(components)
            away = beta - MEAN
            return 0.5 * away @ inverse @ away - Poisson(rate).log_prob(x[i]).sum()

        def closure() -> Tensor:
            solver.zero_grad()
            value = cost(beta)
            value.backward()
            return value

        for _ in range(5):
            solver.step(closure)
        return -cost(beta).detach()

    for i in range(3):
        step = 1e-4 * torch.tensor([0.05, 5.0]).double()
        numeric = [
            (minus_half(about[i] + one, i) - minus_half(about[i] - one, i))
            / (2 * one.sum())
            for one in torch.diag(step)
        ]
        # The background is found to 1e-6 of its deviation in four rounds.
        size = float(found.gradient[i].abs().max())
        torch.testing.assert_close(
            found.gradient[i], torch.stack(numeric), rtol=1e-4, atol=1e-5 * size
        )


def test_curvature_is_the_information_beside_the_background() -> None:
    _, likelihood = counted()
    found = likelihood.equations(bump(COMPONENTS), slopes(COMPONENTS), torch.arange(3))
    inverse = torch.linalg.inv(COVARIANCE)
    for i in range(3):
        joint = torch.cat([slopes(COMPONENTS)[i], COLUMNS])
        rate = likelihood._scored(
            likelihood.x[i : i + 1], bump(COMPONENTS[i : i + 1]), torch.tensor([i])
        ).rate[0]
        information = (joint / rate) @ joint.mT
        information[2:, 2:] += inverse
        expected = torch.linalg.inv(torch.linalg.inv(information)[:2, :2])
        torch.testing.assert_close(found.curvature[i], expected)


def test_deviances_differ_as_integrals_over_the_background_do() -> None:
    # Laplace's method, of backgrounds that are known to a few per cent.
    x, likelihood = counted()
    grid = torch.linspace(-1, 1, 401).double()
    offset, slope = torch.meshgrid(6 + 4 * grid, 8 * grid, indexing="ij")
    beta = torch.stack([offset, slope], -1).reshape(-1, 2)
    prior = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).log_prob(beta)
    tried = torch.stack([COMPONENTS[0], COMPONENTS[0] + 0.5, 0 * COMPONENTS[0]])
    exact = []
    for one in tried:
        rate = CONSTANT + beta @ COLUMNS + bump(one)
        inside = (rate > 0).all(-1)
        log = Poisson(rate.clamp(min=1e-9)).log_prob(x[0]).sum(-1) + prior
        exact.append(torch.where(inside, log, -torch.inf).logsumexp(0))
    given = bump(tried), slopes(tried), torch.zeros(3, dtype=torch.int64)
    found = -0.5 * likelihood.equations(*given).residual
    differences = torch.stack(exact)
    torch.testing.assert_close(
        found - found[0], differences - differences[0], rtol=0.0, atol=0.05
    )  # nats


@pytest.mark.parametrize("x", [torch.zeros(1, NUM), torch.full((1, NUM), 1e6)])
def test_counts_of_any_size_have_equations(x: Tensor) -> None:
    likelihood = CountLikelihood(x, COLUMNS, CONSTANT, MEAN, COVARIANCE)
    here = COMPONENTS[:1]
    for part in likelihood.equations(bump(here), slopes(here), torch.tensor([0])):
        assert part.isfinite().all()


def test_no_background_is_needed() -> None:
    x = torch.poisson(bump(COMPONENTS), torch.Generator().manual_seed(1))
    nothing = torch.zeros(0, NUM), torch.zeros(NUM), torch.zeros(0), torch.zeros(0, 0)
    likelihood = CountLikelihood(x, *nothing)
    signal = 1.0 + bump(COMPONENTS)
    found = likelihood.equations(signal, slopes(COMPONENTS), torch.arange(3))
    log = Poisson(signal).log_prob(x).sum(-1) - Poisson(x.clamp(min=1e-30)).log_prob(
        x
    ).sum(-1)
    torch.testing.assert_close(-0.5 * found.residual, log.double(), rtol=1e-5, atol=0.0)
    score = ((x - signal) / signal).double().unsqueeze(-1)
    expected = (slopes(COMPONENTS) @ score).squeeze(-1)
    torch.testing.assert_close(found.gradient, expected)
