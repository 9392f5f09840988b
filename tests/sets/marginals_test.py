from typing import Any

import numpy as np
import pytest
import torch
from sbi.utils import BoxUniform, MultipleIndependent
from scipy import stats
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Distribution,
    ExpTransform,
    Gamma,
    HalfNormal,
    Independent,
    LogNormal,
    Normal,
    TransformedDistribution,
    Uniform,
)

from sbi_slotflow.sets.marginals import Marginal, clamp_to_support, marginals_of

MARGINALS: dict[str, tuple[Marginal, Any]] = {
    "uniform": (Marginal("uniform", -2.0, 3.0), stats.uniform(-2.0, 5.0)),
    "log-uniform": (Marginal("log_uniform", 0.05, 1.5), stats.loguniform(0.05, 1.5)),
    "normal": (Marginal("normal", 1.5, 0.5), stats.norm(1.5, 0.5)),
    "half-normal": (Marginal("half_normal", 0.1, 0.7), stats.halfnorm(0.1, 0.7)),
}


@pytest.fixture(params=MARGINALS, name="pair")
def _pair(request: pytest.FixtureRequest) -> tuple[Marginal, Any]:
    return MARGINALS[request.param]


def log_uniform(low: float, high: float) -> Distribution:
    bounds = torch.tensor([[low], [high]]).log()
    return TransformedDistribution(
        Uniform(bounds[0], bounds[1], validate_args=False),
        [ExpTransform()],
        validate_args=False,
    )


def values_of(reference: Any) -> Tensor:
    """Values between the 0.1 % and the 99.9 % quantile."""
    return torch.from_numpy(reference.ppf(np.linspace(1e-3, 1 - 1e-3, 101)))


def test_fraction_quantile_and_density_equal_scipys(pair: tuple[Marginal, Any]) -> None:
    marginal, reference = pair
    values = values_of(reference)
    fraction = torch.linspace(1e-3, 1 - 1e-3, 101, dtype=torch.float64)
    torch.testing.assert_close(marginal.fraction(values), fraction)
    torch.testing.assert_close(marginal.quantile(fraction), values)
    torch.testing.assert_close(
        marginal.log_density(values), torch.from_numpy(reference.logpdf(values))
    )
    assert marginal.bounds == pytest.approx(reference.support())


def test_a_parameter_becomes_standard_normal(pair: tuple[Marginal, Any]) -> None:
    marginal, reference = pair
    values = values_of(reference)
    u, _ = marginal.to_normal(values)
    expected = torch.from_numpy(stats.norm.ppf(reference.cdf(values)))
    torch.testing.assert_close(u, expected)


def test_the_log_jacobian_equals_autograds(pair: tuple[Marginal, Any]) -> None:
    marginal, reference = pair
    values = values_of(reference).requires_grad_()
    u, log_jacobian = marginal.to_normal(values)
    (slope,) = torch.autograd.grad(u.sum(), values)
    torch.testing.assert_close(log_jacobian, slope.log())


def test_from_normal_inverts_to_normal(pair: tuple[Marginal, Any]) -> None:
    marginal, reference = pair
    values = values_of(reference)
    torch.testing.assert_close(
        marginal.from_normal(marginal.to_normal(values)[0]), values
    )


@pytest.mark.parametrize("name", ["uniform", "log-uniform"])
def test_a_bounded_marginal_keeps_every_real_number_inside(name: str) -> None:
    marginal, _ = MARGINALS[name]
    low, high = marginal.bounds
    u = torch.tensor([-40.0, -8.0, 0.0, 8.0, 40.0], dtype=torch.float64)
    values = marginal.from_normal(u)
    slack = 1e-12
    assert ((values >= low - slack) & (values <= high + slack)).all()
    ends = torch.tensor([low, high], dtype=torch.float64)
    for part in marginal.to_normal(ends):
        assert torch.isfinite(part).all()


def test_an_unknown_family_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"family must be one of .*got 'cauchy'"):
        Marginal("cauchy", 0.0, 1.0)


LOW, HIGH = torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 5.0])
UNIFORMS = [("uniform", -1.0, 1.0), ("uniform", 2.0, 5.0)]
DISTRIBUTIONS = {
    "BoxUniform": (BoxUniform(LOW, HIGH), UNIFORMS),
    "Uniform": (Uniform(LOW, HIGH), UNIFORMS),
    "Independent": (Independent(Uniform(LOW, HIGH), 1), UNIFORMS),
    "Normal": (
        Independent(Normal(LOW, HIGH + 1), 1),
        [("normal", -1.0, 2.0), ("normal", 2.0, 6.0)],
    ),
    "log-uniform": (log_uniform(0.05, 1.5), [("log_uniform", 0.05, 1.5)]),
    "half-normal": (
        Independent(HalfNormal(torch.tensor([0.5, 2.0])), 1),
        [("half_normal", 0.0, 0.5), ("half_normal", 0.0, 2.0)],
    ),
    "shifted half-normal": (
        TransformedDistribution(HalfNormal(HIGH), [AffineTransform(0.1, 1.0)]),
        [("half_normal", 0.1, 1.0), ("half_normal", 0.1, 5.0)],
    ),
    "MultipleIndependent": (
        MultipleIndependent(
            [
                log_uniform(0.05, 1.5),
                BoxUniform(LOW, HIGH),
                Normal(torch.zeros(1), torch.ones(1)),
            ]
        ),
        [("log_uniform", 0.05, 1.5), *UNIFORMS, ("normal", 0.0, 1.0)],
    ),
}


@pytest.mark.parametrize(
    ("distribution", "expected"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS
)
def test_known_distributions_are_recognised(
    distribution: Distribution, expected: list[tuple[str, float, float]]
) -> None:
    found = marginals_of(distribution)
    assert [m.family for m in found] == [family for family, _, _ in expected]
    assert [m.a for m in found] == pytest.approx([a for _, a, _ in expected])
    assert [m.b for m in found] == pytest.approx([b for _, _, b in expected])
    assert all(m.exact for m in found)


def test_an_unknown_distribution_gets_a_fitted_normal() -> None:
    gamma = Gamma(torch.tensor([4.0]), torch.tensor([2.0]))
    pair = MultipleIndependent([gamma, LogNormal(torch.zeros(1), torch.ones(1))])
    found = marginals_of(pair)
    assert [m.exact for m in found] == [False, False]
    # mean 2 and standard deviation 1 from 10,000 draws of a fixed seed: 5 standard
    # errors are 0.05 and (kurtosis 4.5) 0.05
    assert found[0].a == pytest.approx(2.0, abs=0.05)
    assert found[0].b == pytest.approx(1.0, abs=0.05)


def test_fitting_leaves_the_global_generator_alone() -> None:
    gamma = Gamma(torch.ones(1), torch.ones(1))
    state = torch.random.get_rng_state()
    first = marginals_of(gamma)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert marginals_of(gamma) == first


BOUNDED = {
    "uniform": Uniform(torch.tensor([0.5]), torch.tensor([2.0]), validate_args=False),
    "uniform-below-zero": Uniform(-torch.ones(1), torch.zeros(1), validate_args=False),
    "amplitude": log_uniform(0.05, 1.5),
    "wide": log_uniform(1e-6, 1e6),
    "strain": log_uniform(1e-23, 1e-21),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_values_on_or_past_a_bound_are_pulled_into_the_support(name: str) -> None:
    distribution = BOUNDED[name]
    marginals = marginals_of(distribution)
    low, high = marginals[0].bounds
    width = high - low
    values = torch.tensor([[low], [high], [low - width], [high + width], [1e30]])
    inside = clamp_to_support(values, marginals)
    assert torch.isfinite(distribution.log_prob(inside)).all()
    near = torch.tensor([[low], [high], [low], [high], [high]])
    torch.testing.assert_close(inside, near, rtol=2e-5, atol=1e-30)


def test_values_inside_the_support_are_left_alone() -> None:
    for distribution, _ in DISTRIBUTIONS.values():
        values = distribution.sample(torch.Size((1000,))).reshape(1000, -1)
        torch.testing.assert_close(
            clamp_to_support(values, marginals_of(distribution)),
            values,
            rtol=1e-6,
            atol=0.0,
        )
