import math
import pickle
from collections.abc import Callable
from copy import deepcopy
from itertools import permutations, product
from typing import Any, cast

import numpy as np
import pytest
import torch
from sbi.utils import BoxUniform, MultipleIndependent, within_support
from sbi.utils.user_input_checks import (
    check_sbi_inputs,
    process_prior,
    process_simulator,
)
from scipy import stats
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Exponential,
    ExpTransform,
    Gamma,
    Geometric,
    Independent,
    LogNormal,
    Normal,
    Poisson,
    TransformedDistribution,
    Uniform,
)

from sbi_slotflow import VariableKPrior
from sbi_slotflow.problems import linear_gaussian, sinusoids
from sbi_slotflow.sets.prior import cardinality_weights


def box(*bounds: tuple[float, float]) -> BoxUniform:
    low, high = torch.tensor(bounds).unbind(-1)
    return BoxUniform(low, high)


def log_uniform(low: float, high: float) -> Distribution:
    bounds = torch.tensor([[low], [high]]).log()
    return TransformedDistribution(Uniform(bounds[0], bounds[1]), [ExpTransform()])


def one_parameter() -> VariableKPrior:
    return VariableKPrior(box((-1.0, 2.0)), [1.0, 2.0, 5.0])


def shared_and_normal() -> VariableKPrior:
    component = Independent(Normal(torch.tensor([0.5]), torch.tensor([0.7])), 1)
    return VariableKPrior(component, [1.0, 3.0, 4.0], shared=box((0.2, 1.7)))


def separated() -> VariableKPrior:
    return VariableKPrior(
        box((0.5, 2.5), (-1.0, 1.0)),
        [1.0, 2.0, 3.0],
        shared=box((0.0, 4.0)),
        min_separation=0.45,
        order_by=1,
    )


def three_separated() -> VariableKPrior:
    return VariableKPrior(
        box((0.5, 2.5), (-1.0, 1.0)),
        [1.0, 1.0, 2.0, 4.0],
        shared=box((0.0, 4.0)),
        min_separation=0.45,
        order_by=1,
    )


def mixed() -> VariableKPrior:
    component = MultipleIndependent(
        [log_uniform(0.05, 1.5), Normal(torch.zeros(1), torch.ones(1))]
    )
    return VariableKPrior(component, [2.0, 1.0, 1.0, 4.0], order_by=0)


# Each with the frozen scipy distributions of the shared and the component parameters.
PRIORS: dict[str, tuple[Callable[[], VariableKPrior], list[Any], list[Any]]] = {
    "one-parameter": (one_parameter, [], [stats.uniform(-1, 3)]),
    "shared-and-normal": (
        shared_and_normal,
        [stats.uniform(0.2, 1.5)],
        [stats.norm(0.5, 0.7)],
    ),
    "separated": (
        separated,
        [stats.uniform(0, 4)],
        [stats.uniform(0.5, 2.0), stats.uniform(-1, 2)],
    ),
    "three-separated": (
        three_separated,
        [stats.uniform(0, 4)],
        [stats.uniform(0.5, 2.0), stats.uniform(-1, 2)],
    ),
    "mixed": (mixed, [], [stats.loguniform(0.05, 1.5), stats.norm()]),
}

FACTORIES: dict[str, Callable[[], VariableKPrior]] = {
    **{name: entry[0] for name, entry in PRIORS.items()},
    "tiny": lambda: sinusoids("tiny").prior,
    "paper": lambda: sinusoids("paper").prior,
    "crowded": lambda: sinusoids("crowded").prior,
    "linear-gaussian": lambda: linear_gaussian().prior,
}


@pytest.fixture(params=FACTORIES, name="prior")
def _prior(request: pytest.FixtureRequest) -> VariableKPrior:
    return FACTORIES[request.param]()


def row(prior: VariableKPrior, shared: list[float], *components: list[float]) -> Tensor:
    """Build a theta row from lists."""
    layout = prior.layout
    table = torch.zeros(layout.max_cardinality, layout.num_component_params)
    for k, component in enumerate(components):
        table[k] = torch.tensor(component)
    return layout.pack(torch.tensor(len(components)), table, torch.tensor(shared))


# log_prob is the density of the set


def midpoints(*axes: tuple[float, float, int]) -> tuple[Tensor, float]:
    """Centres ``(N, D)`` of the cells of a grid, and the volume of a cell."""
    lines = [low + (high - low) * (torch.arange(n) + 0.5) / n for low, high, n in axes]
    volume = math.prod((high - low) / n for low, high, n in axes)
    return torch.cartesian_prod(*lines).reshape(-1, len(axes)), volume


def total_probability(
    prior: VariableKPrior,
    axes: list[tuple[float, float, int]],
    shared_axis: tuple[float, float, int] | None = None,
) -> float:
    """Integrate over the canonical region of K = 0, 1, 2 by the midpoint rule."""
    layout = prior.layout
    cells, volume = midpoints(*axes)
    shared_cells, shared_volume = torch.zeros(1, 0), 1.0
    if shared_axis is not None:
        shared_cells, shared_volume = midpoints(shared_axis)
    first, second = torch.cartesian_prod(*2 * [torch.arange(len(cells))]).unbind(-1)
    key = cells[:, layout.order_by]
    # half of a cell on the diagonal is canonical
    weight = (key[first] < key[second]).double() + 0.5 * (key[first] == key[second])
    keep = weight > 0
    first, second, weight = first[keep], second[keep], weight[keep]
    sets = [
        (0, torch.zeros(1, 2, len(axes)), torch.ones(1).double()),
        (1, torch.stack([cells, cells], 1), torch.ones(len(cells)).double() * volume),
        (2, torch.stack([cells[first], cells[second]], 1), weight * volume**2),
    ]
    total = 0.0
    for (k, components, weights), shared in product(sets, shared_cells):
        num = len(components)
        theta = layout.pack(torch.full((num,), k), components, shared.expand(num, -1))
        density = prior.log_prob(theta).double().exp()
        total += (weights * density).sum().item() * shared_volume
    return total


# The grids are wider than the support, whose edges lie on edges of cells; the
# separation of 0.45 is 40.5 cells.
QUADRATURES = {
    "one-parameter": (one_parameter, [(-2.0, 3.0, 500)], None),
    "shared-and-normal": (shared_and_normal, [(-4.5, 5.5, 400)], (0.0, 2.0, 20)),
    "separated": (
        separated,
        [(-1.5, 4.5, 3), (-1.5, 1.5, 270)],
        (-4.0, 8.0, 3),
    ),
}


@pytest.mark.parametrize("name", QUADRATURES)
def test_the_density_integrates_to_one_over_the_canonical_region(name: str) -> None:
    factory, axes, shared_axis = QUADRATURES[name]
    assert total_probability(factory(), axes, shared_axis) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", PRIORS)
def test_the_density_equals_the_formula_evaluated_by_scipy(name: str) -> None:
    factory, shared, component = PRIORS[name]
    prior = factory()
    layout, weights = prior.layout, prior.cardinality_probs.double().numpy()
    theta = prior.sample((300,))
    parts = layout.unpack(theta)
    expected = []
    for i, k in enumerate(parts.cardinality.tolist()):
        value = math.log(weights[k]) + math.log(math.factorial(k))
        for d, reference in enumerate(shared):
            value += reference.logpdf(parts.shared[i, d].item())
        for d, reference in enumerate(component):
            value += reference.logpdf(parts.components[i, :k, d].numpy()).sum()
        if prior.min_separation is not None and k > 1:
            low, high = component[layout.order_by].support()
            lost = (k - 1) * prior.min_separation / (high - low)
            value -= k * math.log(1 - lost)
        expected.append(value)
    assert {*parts.cardinality.tolist()} == {*np.nonzero(weights)[0].tolist()}
    torch.testing.assert_close(
        prior.log_prob(theta).double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["three-separated", "mixed"])
def test_the_density_is_the_same_for_every_labelling(name: str) -> None:
    prior = PRIORS[name][0]()
    layout = prior.layout
    theta = prior.sample((300,))
    theta = theta[layout.cardinality(theta) == 3]
    assert len(theta) > 50
    parts, expected = layout.unpack(theta), prior.log_prob(theta)
    for order in permutations(range(3)):
        other = layout.pack(
            parts.cardinality, parts.components[:, list(order)], parts.shared
        )
        assert prior.support.check(other).all()
        torch.testing.assert_close(prior.log_prob(other), expected)


OUTSIDE = {
    "half-cardinality": ("K", 1.5),
    "negative-cardinality": ("K", -1.0),
    "too-many": ("K", 4.0),
    "nan": ("shared_1", math.nan),
    "infinite": ("theta_1_1", math.inf),
    "component-below": ("theta_1_1", 0.4),
    "component-above": ("theta_1_1", 2.6),
    "order-by-outside": ("theta_2_2", 1.1),
    "shared-outside": ("shared_1", 4.1),
    "too-close": ("theta_2_2", -0.6),
    "padding": ("theta_1_3", 1e-3),
}


@pytest.mark.parametrize(("name", "value"), OUTSIDE.values(), ids=OUTSIDE)
def test_the_density_vanishes_outside_the_support(name: str, value: float) -> None:
    prior = three_separated()
    good = row(prior, [1.0], [1.0, -0.9], [2.0, 0.9])
    bad = good.clone()
    bad[prior.layout.names.index(name)] = value
    both = torch.stack([good, bad])
    assert torch.isfinite(prior.log_prob(good))
    assert prior.log_prob(both)[1] == -math.inf
    assert prior.support.check(both).tolist() == [True, False]
    assert within_support(prior, both).tolist() == [True, False]


def test_a_cardinality_without_weight_is_outside_the_support() -> None:
    # five components with this separation do not even fit: Z_K is zero
    prior = VariableKPrior(box((0.0, 1.0)), [0, 1, 0, 1, 0, 0], min_separation=0.3)
    points = [[0.0], [0.3], [0.6], [0.9], [0.95]]
    rows = torch.stack([row(prior, [], *points[:k]) for k in range(6)])
    inside = [False, True, False, True, False, False]
    assert prior.support.check(rows).tolist() == inside
    assert torch.isfinite(prior.log_prob(rows)).tolist() == inside
    assert not prior.log_prob(rows).isnan().any()
    drawn = prior.layout.cardinality(prior.sample((2000,)))
    assert drawn.unique().tolist() == [1, 3]


def test_an_empty_set_has_the_density_of_its_shared_parameters() -> None:
    prior = separated()
    expected = math.log(1 / 6) - math.log(4.0)
    assert prior.log_prob(row(prior, [1.0])).item() == pytest.approx(expected)


def test_rows_of_any_batch_shape_are_read(prior: VariableKPrior) -> None:
    theta = prior.sample((2, 3, 4))
    assert theta.shape == (2, 3, 4, prior.layout.size)
    log_p = prior.log_prob(theta)
    assert log_p.shape == (2, 3, 4)
    assert prior.support.check(theta).shape == (2, 3, 4)
    torch.testing.assert_close(prior.log_prob(theta[1, 2, 3]), log_p[1, 2, 3])
    assert prior.sample().shape == (prior.layout.size,)


def test_no_rows_give_no_densities(prior: VariableKPrior) -> None:
    theta = prior.sample((0,))
    assert theta.shape == (0, prior.layout.size)
    assert prior.log_prob(theta).shape == (0,)
    assert prior.support.check(theta).shape == (0,)


def test_rows_may_be_any_real_numbers(prior: VariableKPrior) -> None:
    theta = prior.sample((5,), torch.Generator().manual_seed(1))
    expected = prior.log_prob(theta.double())
    array: Any = theta.double().numpy()
    assert torch.equal(prior.log_prob(array), expected)
    assert torch.equal(prior.log_prob(array.astype(">f8").tolist()), expected)
    assert prior.support.check(array).all()
    whole = torch.zeros(2, prior.layout.size)
    for integers in (whole.long(), whole.long().numpy()):
        assert torch.equal(prior.log_prob(integers), prior.log_prob(whole.double()))
        assert torch.equal(prior.support.check(integers), prior.support.check(whole))
    for value in (whole.bool(), whole.numpy().astype(str)):
        with pytest.raises(TypeError, match="theta must hold real numbers"):
            prior.log_prob(value)


def test_a_row_of_the_wrong_length_is_rejected(prior: VariableKPrior) -> None:
    with pytest.raises(ValueError, match="entries on its last axis"):
        prior.log_prob(torch.zeros(2, prior.layout.size + 1))


# sample draws from that density


def test_samples_are_canonical_and_inside_the_support(prior: VariableKPrior) -> None:
    theta = prior.sample((20_000,))
    assert theta.dtype == torch.float32
    prior.layout.validate(theta)
    assert torch.equal(prior.layout.canonical(theta), theta)
    assert prior.support.check(theta).all()
    assert torch.isfinite(prior.log_prob(theta)).all()


def test_every_cardinality_comes_as_often_as_its_weight(prior: VariableKPrior) -> None:
    num = 20_000
    drawn = prior.layout.cardinality(prior.sample((num,)))
    counts = torch.bincount(drawn, minlength=prior.max_cardinality + 1).numpy()
    expected = prior.cardinality_probs.double().numpy() * num
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    # false alarm in 1 of 10^6 seeds for each prior
    assert stats.chisquare(counts, expected * num / expected.sum()).pvalue > 1e-6


@pytest.mark.parametrize("k", [1, 2, 3])
def test_separated_draws_have_the_law_of_rejection_sampling(k: int) -> None:
    prior = three_separated().with_cardinality([float(j == k) for j in range(4)])
    parts = prior.layout.unpack(prior.sample((20_000,)))
    drawn = parts.components[:, :k].double().numpy()
    rng = np.random.default_rng(0)
    free = rng.uniform([0.5, -1.0], [2.5, 1.0], size=(60_000, k, 2))
    order = free[..., 1].argsort(-1)
    free = np.take_along_axis(free, order[..., None], axis=1)
    kept = free[(np.diff(free[..., 1], axis=-1) >= 0.45).all(-1)]
    assert len(kept) > 9_000
    pairs = [(drawn[:, i, d], kept[:, i, d]) for i in range(k) for d in range(2)]
    pairs.append(((drawn[..., 0] * drawn[..., 1]).sum(-1), kept.prod(-1).sum(-1)))
    pairs.append((parts.shared[:, 0].numpy(), rng.uniform(0, 4, size=20_000)))
    # false alarm in at most 8 of 10^6 seeds for each K
    results: list[Any] = [stats.ks_2samp(a, b) for a, b in pairs]
    assert min(result.pvalue for result in results) > 1e-6


def test_without_separation_components_are_independent_draws() -> None:
    prior = mixed().with_cardinality([0, 0, 0, 1])
    theta = prior.layout.relabel(prior.sample((20_000,)))
    components = prior.layout.unpack(theta).components.double().numpy()
    references = [stats.loguniform(0.05, 1.5), stats.norm()]
    uniform = [references[d].cdf(components[..., d]) for d in range(2)]
    columns = np.stack(uniform, -1).reshape(20_000, 6)
    # false alarm in at most 6 of 10^6 seeds
    assert min(stats.kstest(c, "uniform").pvalue for c in columns.T) > 1e-6
    correlation = np.corrcoef(columns.T)[np.triu_indices(6, 1)]
    # 15 correlations beyond 5.5 standard errors: 6 of 10^7 seeds
    assert np.abs(correlation).max() < 5.5 / math.sqrt(20_000)


def test_mean_and_variance_are_those_of_canonical_rows(prior: VariableKPrior) -> None:
    num = 20_000
    theta = prior.sample((num,)).double()
    k = torch.arange(prior.max_cardinality + 1).float()
    mean_k = (prior.cardinality_probs * k).sum()
    assert prior.mean[0].item() == pytest.approx(mean_k.item())
    square = (prior.cardinality_probs * k.square()).sum() - mean_k.square()
    assert prior.variance[0].item() == pytest.approx(square.item(), abs=1e-5)
    # Both sides are averages over 20,000 rows, hence the factor 2; 6 standard errors
    # of at most 32 entries are a false alarm in less than 1 of 10^7 seeds.
    centred = theta - theta.mean(0)
    error = 6 * (2 * centred.square().mean(0) / num).sqrt() + 1e-6
    assert ((prior.mean - theta.mean(0)).abs() < error).all()
    spread = centred.square().var(0)
    error = 6 * (2 * spread / num).sqrt() + 1e-6
    assert ((prior.variance - theta.var(0)).abs() < error).all()
    assert (prior.stddev > 0).all()
    varies = prior.variance > 0
    stddev = prior.stddev[varies].double()
    torch.testing.assert_close(stddev.square(), prior.variance[varies])


def test_moments_and_construction_of_rows_are_reproducible() -> None:
    torch.manual_seed(1)
    first = separated().mean
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    prior = separated()
    torch.random.set_rng_state(state)
    assert torch.equal(prior.mean, first)
    assert torch.equal(torch.random.get_rng_state(), state)


# randomness


def test_a_generator_decides_the_draws_alone(prior: VariableKPrior) -> None:
    torch.manual_seed(1)
    first = prior.sample((50,), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    again = prior.sample((50,), generator=generator)
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(prior.sample((50,), generator=generator), first)


def test_without_a_generator_torchs_global_one_decides(prior: VariableKPrior) -> None:
    torch.manual_seed(1)
    first, second = prior.sample((50,)), prior.sample((50,))
    torch.manual_seed(1)
    assert torch.equal(prior.sample((50,)), first)
    assert not torch.equal(first, second)


# copies


def unpickled(prior: VariableKPrior) -> VariableKPrior:
    assert prior.mean is not None  # cached, and travels along
    return pickle.loads(pickle.dumps(prior))


COPIES: dict[str, Callable[[VariableKPrior], VariableKPrior]] = {
    "pickle": unpickled,
    "deepcopy": deepcopy,
    "to-cpu": lambda prior: prior.to("cpu"),
    "expand": lambda prior: prior.expand(()),
    "process-prior": lambda prior: cast(VariableKPrior, process_prior(prior)[0]),
    "same-cardinality": lambda prior: prior.with_cardinality(prior.cardinality_probs),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_copy_draws_and_evaluates_alike(
    copy: Callable[[VariableKPrior], VariableKPrior], prior: VariableKPrior
) -> None:
    theta = prior.sample((20,), generator=torch.Generator().manual_seed(1))
    log_p, mean = prior.log_prob(theta), prior.mean
    other = copy(prior)
    assert isinstance(other, VariableKPrior)
    assert other.layout == prior.layout
    assert other.min_separation == prior.min_separation
    assert other.event_shape == prior.event_shape
    drawn = other.sample((20,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, theta)
    torch.testing.assert_close(other.log_prob(theta), log_p)
    torch.testing.assert_close(other.mean, mean)
    assert other.support.check(theta).all()


def test_expand_makes_independent_copies(prior: VariableKPrior) -> None:
    wide = prior.expand((3,))
    assert wide.batch_shape == (3,)
    assert prior.batch_shape == ()
    theta = wide.sample((50,))
    assert theta.shape == (50, 3, prior.layout.size)
    assert wide.log_prob(theta).shape == (50, 3)
    # all empty sets are alike, at most a quarter of the rows on average
    assert len(theta.flatten(0, 1).unique(dim=0)) > 75
    torch.testing.assert_close(wide.log_prob(theta), prior.log_prob(theta))


def test_the_prior_does_not_share_state_with_its_parts() -> None:
    low, high = torch.zeros(1), torch.ones(1)
    prior = VariableKPrior(BoxUniform(low, high), [1.0, 1.0])
    before = prior.log_prob(row(prior, [], [0.5]))
    high.fill_(10.0)
    assert torch.equal(prior.log_prob(row(prior, [], [0.5])), before)


def test_with_cardinality_changes_only_the_cardinality() -> None:
    prior = three_separated()
    other = prior.with_cardinality([4.0, 0.0, 4.0, 2.0])
    theta = prior.sample((500,))
    k = prior.layout.cardinality(theta)
    ratio = torch.tensor([0.4, 0.0, 0.4, 0.2]) / torch.tensor([1, 1, 2, 4]) * 8
    torch.testing.assert_close(
        other.log_prob(theta), prior.log_prob(theta) + ratio[k].log()
    )
    assert prior.cardinality_probs.tolist() == [0.125, 0.125, 0.25, 0.5]
    assert other.layout == prior.layout
    for weights in ([1.0, 1.0, 1.0], [1.0] * 5):
        with pytest.raises(ValueError, match=r"cardinality must hold 4 weights"):
            prior.with_cardinality(weights)


def test_weights_and_a_categorical_mean_the_same() -> None:
    weights = [1.0, 2.0, 5.0]
    categorical = Categorical(logits=torch.tensor(weights).log())
    for cardinality in (weights, torch.tensor(weights), categorical):
        prior = VariableKPrior(box((0.0, 1.0)), cardinality)
        expected = torch.tensor([0.125, 0.25, 0.625])
        torch.testing.assert_close(prior.cardinality_probs, expected)


def test_weights_come_in_any_form() -> None:
    expected = torch.tensor([1.0, 2.0, 5.0]) / 8
    weights: Any
    for weights in (
        [1, 2, 5],
        (1.0, np.float32(2.0), 5),
        np.array([1, 2, 5]),
        np.array([5.0, 2.0, 1.0], dtype=">f4")[::-1],
        torch.tensor([1, 2, 5]),
        torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64),
    ):
        torch.testing.assert_close(cardinality_weights(weights), expected)


def test_a_distribution_of_whole_numbers_up_to_a_largest_gives_weights() -> None:
    found = cardinality_weights(Binomial(3, torch.tensor(0.25)))
    expected = torch.tensor([27.0, 27.0, 9.0, 1.0]) / 64
    torch.testing.assert_close(found, expected)
    found = cardinality_weights(Bernoulli(torch.tensor(0.25)))
    torch.testing.assert_close(found, torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize(
    "cardinality",
    [Poisson(2.0), Geometric(torch.tensor(0.3)), Normal(0.0, 1.0)],
    ids=lambda cardinality: type(cardinality).__name__,
)
def test_a_distribution_without_a_largest_number_is_refused(
    cardinality: Distribution,
) -> None:
    name = type(cardinality).__name__
    with pytest.raises(ValueError, match=f"got {name}, which has no largest K"):
        VariableKPrior(box((0.0, 1.0)), cardinality)


@pytest.mark.parametrize("cardinality", ["many", {0: 1.0}, [[1.0], [1.0, 2.0]]])
def test_what_are_no_weights_is_refused(cardinality: Any) -> None:
    with pytest.raises(TypeError, match="cardinality must be weights for K"):
        VariableKPrior(box((0.0, 1.0)), cardinality)


# double precision


@pytest.mark.parametrize("component", ["uniform", "log-normal", "gamma"])
def test_torchs_default_precision_may_be_double(component: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        low, high = torch.tensor([0.7, 0.3]), torch.tensor([1.3, 2.1])
        law = {
            "uniform": Uniform(low, high),
            "log-normal": LogNormal(low, high),
            "gamma": Gamma(low, high),
        }[component]
        prior = VariableKPrior(
            Independent(law, 1), [1, 1, 1], shared=BoxUniform(low, high)
        )
        theta = prior.sample((20_000,))
        assert theta.dtype == torch.float32
        assert prior.log_prob(theta).isfinite().all()
        assert prior.mean.dtype == prior.stddev.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# outside the support


def test_an_exponential_height_is_positive() -> None:
    component = MultipleIndependent(
        [
            Uniform(torch.zeros(1), torch.ones(1)),
            Exponential(torch.ones(1)),
        ]
    )
    prior = VariableKPrior(component, [1, 1])
    assert prior.log_prob(torch.tensor([1, 0.5, -0.5])).item() == -math.inf
    inside = prior.log_prob(torch.tensor([1, 0.5, 0.5])).item()
    assert inside == pytest.approx(math.log(0.5) - 0.5)


# sbi


@pytest.mark.parametrize("preset", ["tiny", "paper", "crowded"])
def test_sbi_accepts_prior_and_simulator(preset: Any) -> None:
    problem = sinusoids(preset)
    processed, num_params, returns_numpy = process_prior(problem.prior)
    assert processed is problem.prior
    assert num_params == problem.layout.size
    assert not returns_numpy
    simulator = process_simulator(problem.simulator, processed, returns_numpy)
    check_sbi_inputs(simulator, processed)
    theta = processed.sample(torch.Size((3,)))
    assert simulator(theta).shape == (3, problem.num_data)


# what is refused


@pytest.mark.parametrize(
    "weights",
    [[1.0, -0.5], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]],
    ids=["negative", "zero", "nan", "infinite"],
)
def test_bad_weights_are_rejected(weights: list[float]) -> None:
    message = "cardinality weights must be finite, non-negative and not all zero"
    with pytest.raises(ValueError, match=message):
        VariableKPrior(box((0.0, 1.0)), weights)
    with pytest.raises(ValueError, match=message):
        one_parameter().with_cardinality(weights)


@pytest.mark.parametrize("weights", [[1.0], [], [[1.0, 1.0]], 3, math.nan])
def test_weights_must_be_a_vector_of_two_or_more(weights: Any) -> None:
    with pytest.raises(ValueError, match=r"vector of weights for K = 0\.\.Kmax"):
        VariableKPrior(box((0.0, 1.0)), weights)


def test_only_torch_distributions_are_accepted() -> None:
    norm: Any = stats.norm()
    with pytest.raises(TypeError, match="component must be a torch Distribution"):
        VariableKPrior(norm, [1.0, 1.0])
    with pytest.raises(TypeError, match="shared must be a torch Distribution"):
        VariableKPrior(box((0.0, 1.0)), [1.0, 1.0], shared=norm)


def test_only_distributions_over_vectors_are_accepted() -> None:
    scalar = Normal(0.0, 1.0)
    matrix = Independent(Normal(torch.zeros(2, 2), torch.ones(2, 2)), 2)
    for bad in (scalar, matrix):
        with pytest.raises(ValueError, match="component must have a one-dimensional"):
            VariableKPrior(bad, [1.0, 1.0])
        with pytest.raises(ValueError, match="shared must have a one-dimensional"):
            VariableKPrior(box((0.0, 1.0)), [1.0, 1.0], shared=bad)


@pytest.mark.parametrize("order_by", [-1, 2])
def test_order_by_must_name_a_parameter(order_by: int) -> None:
    with pytest.raises(ValueError, match="order_by must index one of the 2"):
        VariableKPrior(box((0.0, 1.0), (0.0, 1.0)), [1.0, 1.0], order_by=order_by)
    with pytest.raises(ValueError, match="order_by must index one of the 2"):
        VariableKPrior(
            box((0.0, 1.0), (0.0, 1.0)),
            [1.0, 1.0],
            order_by=order_by,
            min_separation=0.1,
        )


@pytest.mark.parametrize(
    ("component", "family"),
    [
        (MultipleIndependent([log_uniform(0.1, 1.0), box((0.0, 1.0))]), "log_uniform"),
        (Independent(Normal(torch.zeros(1), torch.ones(1)), 1), "normal"),
        (Independent(Gamma(torch.ones(1), torch.ones(1)), 1), "Gamma"),
    ],
    ids=["log-uniform", "normal", "unknown"],
)
def test_separation_needs_a_uniform_order_parameter(
    component: Distribution, family: str
) -> None:
    with pytest.raises(ValueError, match=f"needs a uniform.*'theta_1'.*got {family}"):
        VariableKPrior(component, [1.0, 1.0, 1.0], min_separation=0.1)


@pytest.mark.parametrize("separation", [0.5, 0.7])
def test_an_impossible_separation_is_rejected(separation: float) -> None:
    with pytest.raises(ValueError, match=r"impossible: 3 components need .* 1 wide"):
        VariableKPrior(box((0.0, 1.0)), [1, 1, 1, 1], min_separation=separation)
    # a cardinality without weight needs no room
    prior = VariableKPrior(box((0.0, 1.0)), [1, 1, 0, 0], min_separation=separation)
    assert prior.support.check(prior.sample((100,))).all()
    with pytest.raises(ValueError, match="impossible: 3 components need"):
        prior.with_cardinality([1, 1, 1, 1])


def test_a_separation_around_a_circle_needs_the_whole_circle() -> None:
    circle: dict[str, Any] = {"component_names": ["angle"], "periods": {"angle": 1.0}}
    with pytest.raises(ValueError, match=r"period of 1, got a width of 0\.5"):
        VariableKPrior(box((0.0, 0.5)), [1, 1, 1], min_separation=0.1, **circle)
    with pytest.raises(ValueError, match=r"3 components need 1\.2 of the 1 wide"):
        VariableKPrior(box((0.0, 1.0)), [1, 1, 1, 1], min_separation=0.4, **circle)
    prior = VariableKPrior(box((0.0, 1.0)), [0, 0, 1], min_separation=0.4, **circle)
    across, apart = torch.tensor([[2.0, 0.1, 0.9], [2.0, 0.1, 0.55]])
    assert prior.log_prob(across).item() == -math.inf
    # 2! over the share 1 - 2 * 0.4 of pairs that keep the distance
    assert prior.log_prob(apart).item() == pytest.approx(math.log(2 / 0.2), abs=1e-5)


@pytest.mark.parametrize("separation", [-0.1, math.nan])
def test_a_separation_that_is_no_distance_is_rejected(separation: float) -> None:
    with pytest.raises(ValueError, match="min_separation must be positive"):
        VariableKPrior(box((0.0, 1.0)), [1.0, 1.0], min_separation=separation)


def test_a_wrong_number_of_names_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"theta has 1 parameter\(s\), got names"):
        VariableKPrior(box((0.0, 1.0)), [1.0, 1.0], component_names=["a", "b"])
    with pytest.raises(ValueError, match=r"shared has 1 parameter\(s\), got names"):
        VariableKPrior(
            box((0.0, 1.0)), [1.0, 1.0], shared=box((0.0, 1.0)), shared_names=[]
        )


@pytest.mark.parametrize("scale", [1e-23, 1e-21, 1.0, 1e20, 1e21])
def test_a_normal_prior_of_any_scale_has_its_density(scale: float) -> None:
    law = torch.distributions.Normal(torch.zeros(2), torch.full((2,), scale))
    prior = VariableKPrior(torch.distributions.Independent(law, 1), [0, 1])
    row = torch.tensor([1.0, 2 * scale, 0.0])
    expected = -math.log(2 * math.pi) - 2 * math.log(scale) - 2.0
    assert prior.log_prob(row).item() == pytest.approx(expected, rel=1e-4)


def test_the_order_may_be_named() -> None:
    law = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    component = torch.distributions.Independent(law, 1)
    names = ("height", "place")
    prior = VariableKPrior(component, [1, 1], order_by="place", component_names=names)
    assert prior.layout.order_by == 1
    with pytest.raises(ValueError, match=r"one of \('height', 'place'\), got 'width'"):
        VariableKPrior(component, [1, 1], order_by="width", component_names=names)
