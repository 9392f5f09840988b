import json
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sbi.utils import BoxUniform, MultipleIndependent
from scipy import stats
from torch import Tensor
from torch.distributions import (
    AbsTransform,
    AffineTransform,
    Beta,
    Categorical,
    Cauchy,
    Chi2,
    ContinuousBernoulli,
    Dirichlet,
    Distribution,
    Exponential,
    ExpTransform,
    FisherSnedecor,
    Gamma,
    GeneralizedPareto,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    Independent,
    InverseGamma,
    Kumaraswamy,
    Laplace,
    LogisticNormal,
    LogNormal,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Pareto,
    Poisson,
    PowerTransform,
    RelaxedBernoulli,
    SigmoidTransform,
    StudentT,
    TanhTransform,
    TransformedDistribution,
    Uniform,
    VonMises,
    Weibull,
    constraints,
)

from sbi_slotflow import VariableKPrior, slot_nn
from sbi_slotflow.sets.laws import bounds_of
from sbi_slotflow.sets.marginals import (
    ClosedMarginal,
    Marginal,
    Marginals,
    marginal_from_spec,
    marginals_of,
)

MARGINALS: dict[str, tuple[Marginal, Any]] = {
    "uniform": (ClosedMarginal("uniform", -2.0, 3.0), stats.uniform(-2.0, 5.0)),
    "log-uniform": (
        ClosedMarginal("log_uniform", 0.05, 1.5),
        stats.loguniform(0.05, 1.5),
    ),
    "normal": (ClosedMarginal("normal", 1.5, 0.5), stats.norm(1.5, 0.5)),
    "half-normal": (ClosedMarginal("half_normal", 0.1, 0.7), stats.halfnorm(0.1, 0.7)),
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
    u, _ = marginal.score.forward(values)
    expected = torch.from_numpy(stats.norm.ppf(reference.cdf(values)))
    torch.testing.assert_close(u, expected)


def test_the_log_jacobian_equals_autograds(pair: tuple[Marginal, Any]) -> None:
    marginal, reference = pair
    values = values_of(reference).requires_grad_()
    u, log_jacobian = marginal.score.forward(values)
    (slope,) = torch.autograd.grad(u.sum(), values)
    torch.testing.assert_close(log_jacobian, slope.log())


def test_from_normal_inverts_to_normal(pair: tuple[Marginal, Any]) -> None:
    marginal, reference = pair
    values = values_of(reference)
    torch.testing.assert_close(
        marginal.score.inverse(marginal.score.forward(values)[0]), values
    )


@pytest.mark.parametrize("name", ["uniform", "log-uniform"])
def test_a_bounded_marginal_keeps_every_real_number_inside(name: str) -> None:
    marginal, _ = MARGINALS[name]
    low, high = marginal.bounds
    u = torch.tensor([-40.0, -8.0, 0.0, 8.0, 40.0], dtype=torch.float64)
    values = marginal.score.inverse(u)
    slack = 1e-12
    assert ((values >= low - slack) & (values <= high + slack)).all()
    ends = torch.tensor([low, high], dtype=torch.float64)
    for part in marginal.score.forward(ends):
        assert torch.isfinite(part).all()


def test_an_unknown_family_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"family must be one of .*got 'cauchy'"):
        marginal_from_spec({"family": "cauchy", "a": 0.0, "b": 1.0})


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
    assert [str(m) for m in found] == [family for family, _, _ in expected]
    assert [m.spec["a"] for m in found] == pytest.approx([a for _, a, _ in expected])
    assert [m.spec["b"] for m in found] == pytest.approx([b for _, _, b in expected])
    assert found.closed


def test_fitting_leaves_the_global_generator_alone() -> None:
    gamma = Gamma(torch.ones(1), torch.ones(1))
    state = torch.random.get_rng_state()
    first = marginals_of(gamma)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert list(marginals_of(gamma)) == list(first)


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
    inside = marginals.clamp(values)
    assert torch.isfinite(distribution.log_prob(inside)).all()
    near = torch.tensor([[low], [high], [low], [high], [high]])
    torch.testing.assert_close(inside, near, rtol=2e-5, atol=1e-30)


def test_values_inside_the_support_are_left_alone() -> None:
    for distribution, _ in DISTRIBUTIONS.values():
        values = distribution.sample(torch.Size((1000,))).reshape(1000, -1)
        torch.testing.assert_close(
            marginals_of(distribution).clamp(values),
            values,
            rtol=1e-6,
            atol=0.0,
        )


# Any family


def one(*values: float) -> Any:
    return tuple(torch.tensor([float(value)]) for value in values)


def moved(base: Distribution, *transforms: Any) -> Distribution:
    return TransformedDistribution(base, list(transforms))


TILT = math.log(0.7 / 0.3)
MIX = Categorical(torch.tensor([[0.3, 0.7]]))
# Each with scipy's, and whether torch has cdf and icdf.
FAMILIES: dict[str, tuple[Distribution, Any, bool]] = {
    "uniform": (Uniform(*one(-1, 2)), stats.uniform(-1, 3), True),
    "normal": (Normal(*one(1, 2)), stats.norm(1, 2), True),
    "half-normal": (HalfNormal(*one(2)), stats.halfnorm(0, 2), True),
    "log-normal": (
        LogNormal(*one(0.5, 0.7)),
        stats.lognorm(0.7, 0, math.exp(0.5)),
        True,
    ),
    "exponential": (Exponential(*one(3)), stats.expon(0, 1 / 3), True),
    "gamma": (Gamma(*one(2, 3)), stats.gamma(2, 0, 1 / 3), False),
    "beta": (Beta(*one(2, 3)), stats.beta(2, 3), False),
    "steep beta": (Beta(*one(0.5, 0.5)), stats.beta(0.5, 0.5), False),
    "weibull": (Weibull(*one(1.5, 2)), stats.weibull_min(2, 0, 1.5), True),
    "pareto": (Pareto(*one(1.5, 2)), stats.pareto(2, 0, 1.5), True),
    "cauchy": (Cauchy(*one(1, 2)), stats.cauchy(1, 2), True),
    "half-cauchy": (HalfCauchy(*one(2)), stats.halfcauchy(0, 2), True),
    "gumbel": (Gumbel(*one(1, 2)), stats.gumbel_r(1, 2), True),
    "laplace": (Laplace(*one(1, 2)), stats.laplace(1, 2), True),
    "student": (StudentT(*one(3, 1, 2)), stats.t(3, 1, 2), False),
    "chi-squared": (Chi2(*one(3)), stats.chi2(3), False),
    "fisher": (FisherSnedecor(*one(4, 5)), stats.f(4, 5), False),
    "inverse gamma": (InverseGamma(*one(3, 2)), stats.invgamma(3, 0, 2), False),
    "generalised pareto": (
        GeneralizedPareto(*one(1, 2, 0.3)),
        stats.genpareto(0.3, 1, 2),
        False,
    ),
    "generalised pareto that ends": (
        GeneralizedPareto(*one(1, 2, -0.3)),
        stats.genpareto(-0.3, 1, 2),
        False,
    ),
    "continuous bernoulli": (
        ContinuousBernoulli(*one(0.3)),
        stats.truncexpon(TILT, 0, 1 / TILT),
        True,
    ),
    "shifted exponential": (
        moved(Exponential(*one(1)), AffineTransform(2.0, 3.0)),
        stats.expon(2, 3),
        True,
    ),
    "power of a uniform": (
        moved(Uniform(*one(1, 2)), PowerTransform(torch.tensor(3.0))),
        None,
        True,
    ),
    "log10-uniform": (
        moved(Uniform(*one(-3, 2)), AffineTransform(0.0, math.log(10)), ExpTransform()),
        stats.loguniform(1e-3, 1e2),
        True,
    ),
    "exponential of an exponential": (
        moved(Exponential(*one(1)), ExpTransform()),
        stats.pareto(1),
        True,
    ),
    "mirrored exponential": (
        moved(Exponential(*one(1)), AffineTransform(2.0, -3.0)),
        None,
        True,
    ),
    "logit-normal": (moved(Normal(*one(1, 2)), SigmoidTransform()), None, True),
    "stretched tanh": (
        moved(Normal(*one(1, 2)), TanhTransform(), AffineTransform(1.0, 2.0)),
        None,
        True,
    ),
    "von mises": (VonMises(*one(1, 2)), None, False),
    "kumaraswamy": (Kumaraswamy(*one(2, 3)), None, True),
    "relaxed bernoulli": (
        RelaxedBernoulli(torch.tensor(0.7), torch.tensor([0.3])),
        None,
        False,
    ),
    "mixture of log-normals": (
        MixtureSameFamily(
            MIX, LogNormal(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.5]]))
        ),
        None,
        False,
    ),
    "mixture of shifted exponentials": (
        MixtureSameFamily(
            MIX,
            moved(
                Exponential(torch.ones(1, 2)),
                AffineTransform(torch.tensor([[0.0, 4.0]]), 1.0),
            ),
        ),
        None,
        False,
    ),
    "strain": (LogNormal(*one(-48, 1)), stats.lognorm(1, 0, math.exp(-48)), True),
    "far": (Gamma(*one(2, 1e-21)), stats.gamma(2, 0, 1e21), False),
}
COVARIANCE = torch.tensor([[2.0, 1.2], [1.2, 1.0]])
GAUSSIAN = MultivariateNormal(torch.tensor([1.0, 2.0]), COVARIANCE)
PARTS: list[Distribution] = [Gamma(*one(2, 1)), GAUSSIAN, Uniform(*one(1, 2))]
DEPENDENT: dict[str, Distribution] = {
    "gaussian": GAUSSIAN,
    "low rank": LowRankMultivariateNormal(
        torch.zeros(2), torch.tensor([[1.0], [2.0]]), torch.tensor([0.1, 0.1])
    ),
    "log-gaussian": moved(GAUSSIAN, ExpTransform()),
    "logit-gaussian": moved(GAUSSIAN, SigmoidTransform(), AffineTransform(1.0, 2.0)),
    "mixture of gammas": MixtureSameFamily(
        Categorical(torch.tensor([0.3, 0.7])),
        Independent(
            Gamma(
                torch.tensor([[2.0, 3.0], [4.0, 5.0]]),
                torch.tensor([[9.0, 1.0], [1.0, 9.0]]),
            ),
            1,
        ),
    ),
    "beside others": MultipleIndependent(PARTS),
}
ALL = {**{name: entry[0] for name, entry in FAMILIES.items()}, **DEPENDENT}


@pytest.fixture(params=ALL, name="prior")
def _prior(request: pytest.FixtureRequest) -> VariableKPrior:
    return VariableKPrior(ALL[request.param], [0.0, 1.0])


def rows(components: Tensor) -> Tensor:
    """Theta rows ``(n, 1 + D)`` of one component each."""
    return torch.cat([torch.ones_like(components[:, :1]), components], -1)


def drawn(prior: VariableKPrior, num: int = 4000) -> Tensor:
    draws = prior.sample((num,), generator=torch.Generator().manual_seed(0))
    return draws[:, 1:].double()


REFERENCES = {name: entry for name, entry in FAMILIES.items() if entry[1] is not None}


@pytest.mark.parametrize("name", REFERENCES)
def test_the_density_equals_scipys_inside_and_outside(name: str) -> None:
    distribution, reference, _ = REFERENCES[name]
    prior = VariableKPrior(distribution, [0.0, 1.0])
    low, high = reference.ppf([0.005, 0.995])
    width = high - low
    values = torch.linspace(low - width, high + width, 301).double()
    least, most = reference.support()
    # torch works in the precision of the values at the very ends
    clear = ((values - least).abs() > 1e-6 * width) & (
        (values - most).abs() > 1e-6 * width
    )
    values = values[clear]
    expected = torch.from_numpy(reference.logpdf(values))
    found = prior.log_prob(rows(values.unsqueeze(-1)))
    assert torch.equal(found.isneginf(), expected.isneginf())
    assert name in {"normal", "cauchy", "gumbel", "laplace", "student"} or (
        found.isneginf().any()
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert prior.component_marginals[0].bounds == pytest.approx((least, most))


def test_no_draw_through_the_map_leaves_the_support(prior: VariableKPrior) -> None:
    marginals = prior.component_marginals
    for scale in (1.0, 4.0, 30.0):
        u = scale * torch.randn(
            4000, len(marginals), generator=torch.Generator().manual_seed(1)
        )
        for dtype in (torch.float32, torch.float64):
            values = marginals.clamp(marginals.inverse(u.double()).to(dtype))
            assert marginals.contains(values).all()
            assert prior.log_prob(rows(values)).isfinite().all()
    ends = bounds_of(prior.component)
    for end in ends:
        past = torch.where(end.isfinite(), end, marginals.middle(end)).float()
        assert prior.log_prob(rows(marginals.clamp(past[None]))).isfinite().all()


def test_the_density_vanishes_beyond_every_bound(prior: VariableKPrior) -> None:
    low, high = bounds_of(prior.component)
    middle = drawn(prior)
    for d in range(len(low)):
        width = middle[:, d].quantile(0.9) - middle[:, d].quantile(0.1)
        for end in (low[d] - 1e-3 * width, high[d] + 1e-3 * width):
            if end.isfinite():
                outside = middle.clone()
                outside[:, d] = end
                assert prior.log_prob(rows(outside)).isneginf().all()
                assert not prior.support.check(rows(outside)).any()
    assert prior.log_prob(rows(middle)).isfinite().all()
    assert prior.support.check(rows(middle.float())).all()


def test_the_map_inverts_and_has_autograds_log_jacobian(prior: VariableKPrior) -> None:
    marginals = prior.component_marginals
    noise = torch.Generator().manual_seed(2)
    u = torch.randn(1000, len(marginals), generator=noise).double()
    u[500:] = (3 * u[500:]).clamp(-7, 7)  # into the tails
    values = marginals.inverse(u).requires_grad_()
    again, log_det = marginals.forward(values)
    near = (u.abs() < 4.5).all(-1)
    torch.testing.assert_close(again[near], u[near], rtol=1e-5, atol=1e-5)
    back, width = marginals.inverse(again), drawn(prior).std(0)
    assert ((back - values).abs() <= 1e-9 * (values.abs() + width)).all()
    slopes = [
        torch.autograd.grad(column.sum(), values, retain_graph=True)[0]
        for column in again.unbind(-1)
    ]
    _, expected = torch.linalg.slogdet(torch.stack(slopes, -2))
    torch.testing.assert_close(log_det, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", [name for name, entry in REFERENCES.items() if entry[2]]
)
def test_a_parameter_with_a_quantile_becomes_standard_normal(name: str) -> None:
    distribution, reference, _ = REFERENCES[name]
    (marginal,) = VariableKPrior(distribution, [0.0, 1.0]).component_marginals
    expected = torch.linspace(-4.5, 4.5, 91).double()
    values = np.where(
        expected < 0,
        reference.ppf(stats.norm.cdf(expected)),
        reference.isf(stats.norm.sf(expected)),
    )
    u, _ = marginal.score.forward(torch.from_numpy(values))
    torch.testing.assert_close(u, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        marginal.fraction(torch.from_numpy(values)),
        torch.from_numpy(reference.cdf(values)),
        rtol=1e-5,
        atol=1e-7,
    )


def test_u_is_about_standard_under_the_prior(prior: VariableKPrior) -> None:
    u, _ = prior.component_marginals.forward(drawn(prior))
    correlation = torch.corrcoef(u.T).reshape(u.shape[1], u.shape[1])
    # 4,000 draws against 10,000: 6 standard errors
    off = correlation - torch.eye(u.shape[1])
    assert off.abs().max() < 6 * math.sqrt(1 / 4000 + 1 / 10_000)
    spread = u.quantile(0.84, dim=0) - u.quantile(0.16, dim=0)
    assert ((spread > 1.0) & (spread < 3.5)).all()
    assert (u.median(0).values.abs() < 0.6).all()


def test_marginals_come_back_from_json(prior: VariableKPrior) -> None:
    marginals = prior.component_marginals
    again = Marginals.from_spec(json.loads(json.dumps(marginals.spec)))
    values = drawn(prior)
    for found, expected in zip(
        again.forward(values), marginals.forward(values), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    assert [m.bounds for m in again] == [m.bounds for m in marginals]
    far = 1e30 * (values.float() - 1.0)
    assert torch.equal(again.clamp(far), marginals.clamp(far))
    assert again.periods == marginals.periods


def test_specs_of_earlier_files_are_read() -> None:
    spec = {"family": "log_uniform", "a": 0.1, "b": 2.0, "exact": True}
    assert marginal_from_spec(spec) == ClosedMarginal("log_uniform", 0.1, 2.0)


def test_a_natural_coordinate_covers_most_of_the_prior(prior: VariableKPrior) -> None:
    values = drawn(prior)
    for d, marginal in enumerate(prior.component_marginals):
        middle, half, reach = marginal.natural_scale
        within = ((values[:, d] - middle) / half).abs() <= reach
        assert within.double().mean() > 0.995


def test_a_natural_coordinate_covers_four_deviations_from_a_single_bound() -> None:
    # 68 % of an exponential variable lie below 1.15 of its means
    width = 4 * -math.log(2 * stats.norm.sf(1))
    (above,) = marginals_of(Exponential(*one(0.5)))
    middle, half, _ = above.natural_scale
    assert middle == pytest.approx(width, rel=1e-5)  # from 0 to 4 x 1.15 x 2
    assert half == pytest.approx(width, rel=1e-5)
    mirrored = moved(Exponential(*one(1)), AffineTransform(2.0, -3.0))
    (below,) = marginals_of(mirrored)
    middle, half, _ = below.natural_scale
    assert middle == pytest.approx(2 - 1.5 * width, rel=1e-5)
    assert half == pytest.approx(1.5 * width, rel=1e-5)


class Truncated(Distribution):
    """A normal variable between -1 and 2, with cdf and icdf of its own."""

    arg_constraints: ClassVar[Any] = {}

    def __init__(self) -> None:
        super().__init__(torch.Size((1,)), validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.interval(-1.0, 2.0)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.icdf(torch.rand(*sample_shape, 1)).float()

    def log_prob(self, value: Tensor) -> Tensor:
        mass = Normal(0.0, 1.0).cdf(torch.tensor([-1.0, 2.0]).double()).diff()
        return Normal(0.0, 1.0).log_prob(value) - mass.log()

    def cdf(self, value: Tensor) -> Tensor:
        ends = torch.special.ndtr(torch.tensor([-1.0, 2.0]).double())
        return (torch.special.ndtr(value.double()) - ends[0]) / (ends[1] - ends[0])

    def icdf(self, value: Tensor) -> Tensor:
        ends = torch.special.ndtr(torch.tensor([-1.0, 2.0]).double())
        return torch.special.ndtri(ends[0] + value.double() * (ends[1] - ends[0]))


class WithoutQuantiles(Truncated):
    """The same without cdf and icdf that others may call."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().icdf(torch.rand(*sample_shape, 1)).float()

    def cdf(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def icdf(self, value: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("kind", [Truncated, WithoutQuantiles])
def test_a_distribution_of_the_users_own_is_mapped_inside_its_support(
    kind: type[Truncated],
) -> None:
    prior = VariableKPrior(kind(), [0.0, 1.0])
    marginals = prior.component_marginals
    assert marginals[0].bounds == (-1.0, 2.0)
    values = marginals.inverse(torch.linspace(-30, 30, 50).double().unsqueeze(-1))
    inside = rows(marginals.clamp(values.float()))
    assert prior.log_prob(inside).isfinite().all()
    outside = torch.tensor([[-1.1], [2.1]])
    assert prior.log_prob(rows(outside)).isneginf().all()


def test_a_quantile_of_the_users_own_gives_the_exact_map() -> None:
    prior = VariableKPrior(Truncated(), [0.0, 1.0])
    reference: Any = stats.truncnorm(-1.0, 2.0)
    values = torch.from_numpy(reference.ppf(np.linspace(1e-4, 1 - 1e-4, 101)))
    u, log_det = prior.component_marginals.forward(values.unsqueeze(-1))
    expected = stats.norm.ppf(reference.cdf(values))
    torch.testing.assert_close(u[:, 0], torch.from_numpy(expected))
    slope = reference.logpdf(values) - stats.norm.logpdf(expected)
    torch.testing.assert_close(log_det, torch.from_numpy(slope))
    again = Marginals.from_spec(prior.component_marginals.spec)
    torch.testing.assert_close(again.forward(values.unsqueeze(-1))[0], u)


def test_only_a_file_needs_a_distribution_that_it_can_describe(tmp_path: Any) -> None:
    prior = VariableKPrior(Truncated(), [0.0, 1.0])
    theta = prior.sample((50,))
    estimator = slot_nn(prior, hidden_features=8)(theta, theta[:, 1:])
    draws = estimator.sample((20,), theta[:2, 1:])
    assert prior.log_prob(draws).isfinite().all()
    with pytest.raises(ValueError, match="a file cannot describe Truncated"):
        estimator.save(tmp_path / "own.safetensors")


def test_a_fit_of_the_users_own_comes_back_from_json() -> None:
    marginals = VariableKPrior(WithoutQuantiles(), [0.0, 1.0]).component_marginals
    again = Marginals.from_spec(json.loads(json.dumps(marginals.spec)))
    assert again == marginals


@pytest.mark.parametrize("scale", [1e-21, 1e21])
def test_units_do_not_matter(scale: float) -> None:
    for distribution in (Gamma(*one(2, 3)), Cauchy(*one(1, 2)), LogNormal(*one(0, 1))):
        base = VariableKPrior(distribution, [0.0, 1.0])
        other = VariableKPrior(
            moved(distribution, AffineTransform(0.0, scale)), [0.0, 1.0]
        )
        values = drawn(base)
        u, log_det = base.component_marginals.forward(values)
        found = other.component_marginals.forward(scale * values)
        torch.testing.assert_close(found[0], u, rtol=1e-4, atol=1e-4)
        expected = log_det - math.log(scale)
        torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-4)
        assert other.stddev[1] > 0.0
        assert other.stddev.isfinite().all()


REFUSED = {
    "proportions": (Dirichlet(torch.ones(3)), "Dirichlet has the support"),
    "more proportions": (
        LogisticNormal(torch.zeros(2), torch.ones(2)),
        "LogisticNormal has the support",
    ),
    "whole numbers": (Poisson(torch.ones(1)), "Poisson has the discrete support"),
    "gaps": (
        MixtureSameFamily(
            MIX, Uniform(torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0, 5.0]]))
        ),
        "has gaps",
    ),
    "boxes": (
        MixtureSameFamily(
            Categorical(torch.ones(2)),
            Independent(
                Uniform(torch.zeros(2, 2), torch.tensor([[1.0, 1], [2, 2]])), 1
            ),
        ),
        "joins boxes of different bounds",
    ),
    "squared": (
        moved(Uniform(*one(-1, 1)), PowerTransform(2.0)),  # pyright: ignore
        r"PowerTransform takes .*0.*alone, and its base has other values.* Give",
    ),
    "powers of all numbers": (
        moved(Normal(*one(0, 1)), PowerTransform(torch.tensor(-1.0))),
        "PowerTransform takes",
    ),
    "folded": (moved(Normal(*one(0, 1)), AbsTransform()), "AbsTransform is not"),
    "a surface": (
        MultivariateNormal(
            torch.zeros(2),
            scale_tril=torch.tensor([[1.0, 0.0], [1.0, 1e-7]]),
        ),
        "lie on a surface",
    ),
}


@pytest.mark.parametrize(("distribution", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_mapped_is_refused_by_name(
    distribution: Distribution, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        VariableKPrior(distribution, [1.0, 1.0])


def test_a_circular_parameter_is_known_by_its_period() -> None:
    angle = Independent(Uniform(torch.zeros(2), torch.tensor([2 * math.pi, 1.0])), 1)
    periods = (2 * math.pi, 2 * math.pi)
    # the second covers a part of its circle, where no seam lies inside
    assert marginals_of(angle, periods).periods == (2 * math.pi, math.inf)
