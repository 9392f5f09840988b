"""Components of a population: densities, draws, marginals, bounds, refusals."""

import copy
import math
from typing import Any

import populations
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor
from torch.distributions import (
    Beta,
    Distribution,
    Gamma,
    HalfNormal,
    Independent,
    LogNormal,
    MultivariateNormal,
    Normal,
    Pareto,
    TransformedDistribution,
    Uniform,
)

from sbi_slotflow import (
    AdditiveSimulator,
    SlotPosterior,
    WhiteNoise,
    problems,
    slot_nn,
)
from sbi_slotflow.rjmcmc import collapsed, fixed_k, laplace_proposal
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.marginals import Marginals, TabulatedMarginal
from sbi_slotflow.sets.multi_class import MultiClassPrior
from sbi_slotflow.sets.population import Population
from sbi_slotflow.sets.prior import VariableKPrior, check_covered

LOW, HIGH = torch.tensor([0.0, 0.2]), torch.tensor([2.0, 0.8])
SHARED = Independent(Uniform(LOW, HIGH), 1)
NAMES: dict[str, Any] = {
    "component_names": ("time", "flux"),
    "shared_names": ("mean", "width"),
}


def fluxes(shared: Tensor):
    mean, width = shared.unbind(-1)
    return [Uniform(0.0, 10.0), LogNormal(mean, width)]


def normal(shared: Tensor):
    return Independent(Normal(shared[:, :1].expand(-1, 2), shared[:, 1:]), 1)


def correlated(shared: Tensor):
    lower = torch.tensor([[1.0, 0.0], [0.8, 0.6]]).to(shared) * shared[:, 1:, None]
    return MultivariateNormal(shared[:, :1].expand(-1, 2), scale_tril=lower)


def floored(shared: Tensor):
    return [Uniform(0.0, 10.0), Uniform(shared[:, 0], 5.0)]


def without_cdf(shared: Tensor):
    return [Uniform(0.0, 10.0), Beta(1 + shared[:, 0], 1 + shared[:, 1])]


def gammas(shared: Tensor):
    return [Uniform(0.0, 10.0), Gamma(2 + shared[:, 0], shared[:, 1])]


POPULATIONS = {
    each.__name__: each
    for each in (fluxes, normal, correlated, floored, without_cdf, gammas)
}


def prior_of(name: str = "fluxes", **changes) -> VariableKPrior:
    component = POPULATIONS[name]
    options = {"shared": SHARED, **NAMES, **changes}
    return VariableKPrior(component, [1.0, 1.0, 1.0, 1.0], **options)


def by_hand(prior: VariableKPrior, name: str, rows: Tensor) -> Tensor:
    """Log density of rows, one component of one row after the other."""
    found = []
    for row in rows.double():
        parts = prior.layout.unpack(row)
        k = int(parts.cardinality)
        value = prior.log_cardinality_probs[k].double() + math.lgamma(k + 1)
        value = value - (HIGH - LOW).double().log().sum()
        law = POPULATIONS[name](parts.shared.unsqueeze(0))
        for component in parts.components[:k]:
            if isinstance(law, list):
                pairs = zip(law, component, strict=True)
                value = value + sum(each.log_prob(c).sum() for each, c in pairs)
            else:
                value = value + law.log_prob(component).sum()
        found.append(value)
    return torch.stack(found)


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_density_is_the_product_of_densities_given_shared(name: str) -> None:
    prior = prior_of(name)
    rows = prior.sample((40,), generator_for(0))
    found = prior.log_prob(rows.double())
    assert torch.allclose(found, by_hand(prior, name, rows), rtol=1e-6)
    assert prior.support.check(rows).all()


@pytest.mark.parametrize("name", POPULATIONS)
def test_relabelled_rows_have_the_same_density(name: str) -> None:
    prior = prior_of(name)
    rows = prior.sample((200,), generator_for(1))
    parts = prior.layout.shuffled(rows, generator_for(2))
    mixed = prior.layout.pack(parts.cardinality, parts.components, parts.shared)
    assert torch.allclose(prior.log_prob(mixed), prior.log_prob(rows), rtol=1e-5)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_density_integrates_to_the_probability_of_k(k: int) -> None:
    """By a rule of midpoints over heights, mean and width; p(K) to 1e-3."""
    prior = populations.problem().prior
    num = 60
    axis = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    low, high = populations.LOW.double(), populations.HIGH.double()
    # Heights by quantiles of a broad normal density, whose values are divided by.
    broad = Normal(torch.tensor(1.5).double(), torch.tensor(1.2).double())
    height = broad.icdf(axis)
    axes = [low[0] + (high[0] - low[0]) * axis, low[1] + (high[1] - low[1]) * axis]
    axes += [height] * k
    columns = [part.flatten() for part in torch.meshgrid(*axes, indexing="ij")]
    shared = torch.stack(columns[:2], -1)
    total = 0.0
    for start in range(0, len(shared), 2**19):
        stop = start + 2**19
        here = [column[start:stop] for column in columns]
        components = torch.zeros(len(here[0]), prior.max_cardinality, 1).double()
        for i, values in enumerate(here[2:]):
            components[:, i, 0] = values
        rows = prior.layout.pack(
            torch.full((len(components),), k), components, torch.stack(here[:2], -1)
        )
        log_p = prior.log_prob(rows)
        log_q = sum((broad.log_prob(values) for values in here[2:]), torch.zeros(1))
        total += float((log_p - log_q).exp().sum())
    # Every order of the components was counted, of which one is canonical.
    volume = float((high - low).prod()) / len(shared) / math.factorial(k)
    assert total * volume == pytest.approx(float(prior.cardinality_probs[k]), rel=1e-3)


def test_draws_have_the_density_given_shared() -> None:
    """Scores of fluxes given mean and width are normal: false alarms at 1e-4."""
    prior = prior_of()
    parts = prior.layout.unpack(prior.sample((20_000,), generator_for(3)))
    mean, width = (each.unsqueeze(-1) for each in parts.shared.unbind(-1))
    score = (parts.components[..., 1].log() - mean) / width
    assert kstest(score[parts.mask].numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_marginal_is_that_of_draws(name: str) -> None:
    """Fractions of first components are uniform: false alarms at 1e-4.

    Where there is no distribution function given s, quantiles are right to 5 %.
    """
    prior = prior_of(name)
    rows = prior.sample((20_000,), generator_for(4))
    parts = prior.layout.shuffled(rows, generator_for(5))
    first = parts.components[parts.cardinality > 0, 0].double()
    for marginal, column in zip(prior.component_marginals, first.T, strict=True):
        share = marginal.fraction(column)
        if name in ("correlated", "without_cdf"):
            assert (
                share.quantile(torch.tensor([0.16, 0.84]).double())
                - torch.tensor([0.16, 0.84])
            ).abs().max() < 0.05
        else:
            assert kstest(share.numpy(), "uniform").pvalue > 1e-4


def test_the_tabulated_marginal_is_the_integral_over_shared() -> None:
    """To 1 % of either tail, from a thousandth to 0.999, by a rule of midpoints."""
    marginal = prior_of().component_marginals[1]
    assert isinstance(marginal, TabulatedMarginal)
    axis = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    mean = 2.0 * axis.unsqueeze(-1)
    width = 0.2 + 0.6 * axis
    values = marginal.quantile(torch.logspace(-3, -0.0005, 9).double())
    for value in values:
        score = (value.log() - mean) / width
        share = torch.special.ndtr(score).mean()
        density = (Normal(0.0, 1.0).log_prob(score).exp() / width / value).mean()
        found = marginal.fraction(value)
        assert float(found) == pytest.approx(float(share), rel=1e-2)
        assert 1 - float(found) == pytest.approx(1 - float(share), rel=1e-2)
        assert float(marginal.log_density(value).exp()) == pytest.approx(
            float(density), rel=1e-2
        )


def test_a_tabulated_marginal_survives_a_file() -> None:
    marginals = prior_of().component_marginals
    again = Marginals.from_spec(marginals.spec)
    values = prior_of().component.sample((100,)).double()
    assert torch.equal(again.forward(values)[0], marginals.forward(values)[0])
    assert again == marginals


def test_the_marginal_of_a_component_has_the_density_of_its_draws() -> None:
    """Its density over one of the place times the tabulated one is about 1."""
    prior = prior_of()
    values = prior.component.sample(torch.Size((2_000,)))
    found = prior.component.log_prob(values)
    flux = prior.component_marginals[1].log_density(values[:, 1].double())
    assert (found.double() - flux + math.log(10)).abs().mean() < 0.02


@pytest.mark.parametrize("name", POPULATIONS)
def test_a_place_that_no_shared_parameter_moves_is_uniform(name: str) -> None:
    is_place = name not in ("normal", "correlated")
    assert prior_of(name).component_marginals[0].is_uniform == is_place


def test_bounds_may_follow_bounded_shared_parameters() -> None:
    prior = prior_of("floored")
    assert prior.population is not None
    assert prior.population.bounds_follow_shared
    assert prior.component_marginals[1].bounds == pytest.approx((0.0, 5.0))
    rows = prior.sample((5_000,), generator_for(6))
    assert torch.isfinite(prior.log_prob(rows)).all()
    assert prior.keeps_bounds(rows).all()
    low = rows.clone()
    low[:, 1] = 1.9
    low[:, 3:] *= 0.1
    low = low[rows[:, 0] > 0]
    assert not prior.keeps_bounds(low).any()
    assert not prior.support.check(low).any()


def test_draws_at_the_edge_stay_inside() -> None:
    """A range as wide as two roundings."""

    def narrow(shared: Tensor):
        return [Uniform(0.0, 1.0), Uniform(shared[:, 0] - 1e-6, shared[:, 0] + 1e-6)]

    prior = VariableKPrior(narrow, [0.0, 1.0], shared=Uniform(LOW[:1] + 1, HIGH[:1]))
    rows = prior.sample((2_000,), generator_for(7))
    assert torch.isfinite(prior.log_prob(rows)).all()


def test_bounds_must_not_follow_unbounded_shared_parameters() -> None:
    shared = Normal(torch.tensor([1.0]), torch.tensor([0.1]))
    with pytest.raises(ValueError, match="must then be bounded"):
        VariableKPrior(floored, [1.0, 1.0], shared=shared)


def test_impossible_shared_parameters_have_no_density() -> None:
    """Torch would refuse to make a normal distribution of a negative width."""
    prior = prior_of()
    rows = prior.sample((10,), generator_for(8))
    rows[:, 2] = -1.0
    assert torch.isneginf(prior.log_prob(rows)).all()


def test_gradients_are_finite_with_padding() -> None:
    rows = prior_of().sample((50,), generator_for(9)).double().requires_grad_()
    prior_of().log_prob(rows).sum().backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()


def test_other_cardinalities_keep_the_population() -> None:
    prior = prior_of()
    new = prior.with_cardinality([0.0, 0.0, 1.0, 0.0])
    rows = new.sample((100,), generator_for(10))
    gain = new.log_prob(rows) - prior.log_prob(rows)
    assert torch.allclose(gain, torch.tensor(math.log(4.0)), atol=1e-4)
    assert new.population is prior.population
    assert new.component_marginals == prior.component_marginals


def test_a_copy_has_the_same_density() -> None:
    prior = prior_of()
    rows = prior.sample((20,), generator_for(11))
    assert torch.equal(copy.deepcopy(prior).log_prob(rows), prior.log_prob(rows))
    assert prior.expand((2,)).sample((3,)).shape == (3, 2, prior.layout.size)
    assert torch.equal(prior.to("cpu").log_prob(rows), prior.log_prob(rows))


def test_a_least_separation_goes_with_a_place_of_its_own() -> None:
    prior = prior_of(min_separation=1.0)
    rows = prior.sample((500,), generator_for(12))
    assert prior.separated(rows).all()
    assert torch.isfinite(prior.log_prob(rows)).all()
    with pytest.raises(ValueError, match="min_separation needs a uniform"):
        prior_of("normal", min_separation=0.1)


def test_other_priors_are_compared_with_a_population() -> None:
    prior = prior_of("floored")

    def other(floor) -> VariableKPrior:
        def component(shared: Tensor):
            return [Uniform(0.0, 10.0), Uniform(floor(shared[:, 0]), 5.0)]

        return VariableKPrior(component, [1.0] * 4, shared=SHARED, **NAMES)

    check_covered(other(lambda floor: 0.5 * floor + 1.0), prior)
    with pytest.raises(ValueError, match="by bounds that follow shared parameters"):
        check_covered(other(lambda floor: 2.0 - floor), prior)


@pytest.mark.parametrize(
    ("component", "error", "match"),
    [
        (lambda s: s, TypeError, "must return"),
        (lambda s: [1.0], TypeError, "float in a list"),
        (lambda s: [], ValueError, "empty list"),
        (lambda s: [Normal(s[:, :1], 1.0)], ValueError, "batch shape"),
        (lambda s: Normal(s[:, 0], 1.0), ValueError, "event shape"),
        (lambda s: Independent(Normal(s, 1.0), 2), ValueError, "event shape"),
        (lambda s: [Normal(s @ torch.ones(3).to(s), 1.0)], ValueError, "it fails"),
        (lambda s: [Normal(0.0, s[:, 0] - 3.0)], ValueError, "with scale = -"),
        (
            lambda s: Independent(Normal(0.0, s[:, :1] - 3.0), 1),
            ValueError,
            "which must be GreaterThan",
        ),
        ("normal", TypeError, "component must be a torch Distribution"),
    ],
)
def test_what_is_no_population_is_refused(component, error, match) -> None:
    with pytest.raises(error, match=match):
        VariableKPrior(component, [1.0, 1.0], shared=SHARED)


def test_a_population_needs_shared_parameters() -> None:
    with pytest.raises(ValueError, match="shared must be their distribution"):
        VariableKPrior(fluxes, [1.0, 1.0])


def trace(name: str = "fluxes") -> problems.Trace:
    def pulse(components: Tensor) -> Tensor:
        place = torch.arange(20.0).to(components) / 2 + 0.25
        away = place - components[..., :1]
        return components[..., 1:] * torch.exp(-0.5 * away.square())

    prior = prior_of(name)
    simulator = AdditiveSimulator(pulse, WhiteNoise(0.5), prior.layout)
    return problems.Trace("pulses", prior, simulator, cells=10, linear=("flux",))


def test_a_place_that_shared_parameters_move_is_refused() -> None:
    with pytest.raises(ValueError, match="prior must be uniform in 'time'"):
        trace("normal")


def test_what_takes_components_as_independent_is_refused() -> None:
    problem = trace()
    x = problem.simulator(problem.prior.sample((1,)))
    for call in (
        lambda: collapsed(problem, x),
        lambda: problem.collapsed(x[0]),
        lambda: laplace_proposal(problem, x),
        lambda: fixed_k(problem, x, 1),
    ):
        with pytest.raises(TypeError, match="takes components as independent"):
            call()
    with pytest.raises(ValueError, match="one class alone may have a population"):
        problems.Classes("two", {"a": problem, "b": problem})
    with pytest.raises(ValueError, match="shared parameters"):
        MultiClassPrior({"a": problem.prior})


def test_a_population_is_used_again() -> None:
    population = Population(fluxes, SHARED)
    prior = VariableKPrior(population, [1.0, 1.0], shared=SHARED)
    assert prior.population is population


def test_draws_of_a_network_keep_bounds_that_follow_shared_parameters() -> None:
    """It knows none, so draws are kept that do, and densities divided by their share.

    The share is known by 10,000 draws and compared with 4,000: 0.05 is 5 sigma.
    """
    problem = trace("floored")
    theta = problem.prior.sample((16,), generator_for(13))
    x = problem.simulator(theta, generator_for(14))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small: dict[str, Any] = {"hidden_features": 16, "trunk_features": 16}
        estimator = slot_nn(problem, refine_slots=0, **small)(theta, x)
    posterior = SlotPosterior(estimator, problem.prior, problem.simulator)
    sets = posterior.given(x[:1])
    rows = sets.sample((2_000,), 2, generator_for(15))
    assert torch.isfinite(problem.prior.log_prob(rows)).all()
    log_kept = sets.log_acceptance([1, 2])[0]
    assert log_kept[0] == 0.0
    assert log_kept[2] < log_kept[1] < -0.01
    free = sets.slots.sample((4_000,), 2, generator_for(16))
    kept = problem.prior.keeps_bounds(free).double().mean()
    assert float(log_kept[2].exp()) == pytest.approx(float(kept), abs=0.05)
    gain = sets.log_prob(rows) - sets.slots.log_prob(rows)
    assert torch.allclose(gain, -log_kept[2], atol=1e-4)


@pytest.mark.parametrize("law", ["pareto", "half normal", "log-normal"])
def test_laws_that_begin_where_shared_parameters_say_have_their_marginal(law) -> None:
    """Below their support torch's own ``cdf`` is negative, or no number."""

    def component(shared: Tensor) -> list[Distribution]:
        start, width = shared.unbind(-1)
        shift: Any = [torch.distributions.AffineTransform(start, 1.0)]
        found = {
            "pareto": Pareto(1 + start, 1.5 + width),
            "half normal": TransformedDistribution(HalfNormal(width), shift),
            "log-normal": TransformedDistribution(LogNormal(0 * start, width), shift),
        }[law]
        return [Uniform(0.0, 1.0), found]

    low, high = torch.tensor([0.0, 0.1]), torch.tensor([1.5, 0.8])
    shared = Independent(Uniform(low, high), 1)
    prior = VariableKPrior(component, [0.0, 1.0], shared=shared)
    rows = prior.sample((2_000,), torch.Generator().manual_seed(1))
    values = prior.layout.unpack(rows).components[:, 0, 1].double()
    shares = prior.component_marginals[1].fraction(values)
    assert kstest(shares.numpy(), "uniform").pvalue > 1e-4  # its false-alarm rate
