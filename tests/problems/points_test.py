"""Sets of points as data: simulations, likelihoods, what a posterior makes of them."""

import math
import warnings
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import (
    Dirichlet,
    Gamma,
    Independent,
    MultivariateNormal,
    Normal,
    Uniform,
)

from sbi_slotflow import SlotNPE, SlotPosterior, VariableKPrior, slot_nn
from sbi_slotflow.nn.charts import WhiteningChart
from sbi_slotflow.posterior.draws import RefinedPosterior
from sbi_slotflow.problems import Mixture, Points, PointsSimulator, gaussian_mixture
from sbi_slotflow.problems.moments import MomentChart
from sbi_slotflow.seeding import generator_for

LINE = gaussian_mixture(num_points=20, fewest=4, max_cardinality=4)


def plane() -> Points:
    low = torch.tensor([-4.0, -4.0, 0.2, 0.2])
    high = torch.tensor([4.0, 4.0, 1.0, 2.0])
    prior = VariableKPrior(
        Independent(Uniform(low, high), 1),
        [1.0, 1.0, 1.0, 1.0],
        component_names=("x", "y", "width", "weight"),
    )
    prior = prior.with_cardinality([0.0, 1.0, 1.0, 1.0])

    def component(c: Tensor) -> MultivariateNormal:
        eye = torch.eye(2).to(c) * c[..., 2, None, None].square()
        return MultivariateNormal(c[..., :2], eye, validate_args=False)

    simulator = PointsSimulator(Mixture(component, weight=3), prior, 10)
    return Points("plane", prior, simulator, weight="weight", places=("x", "y"))


def untrained(problem: Points) -> SlotPosterior:
    torch.manual_seed(0)
    theta = problem.prior.sample((32,))
    net = slot_nn(problem)(theta, problem.simulator(theta))
    return SlotPosterior(net, problem.prior, problem.simulator)


@pytest.mark.parametrize("problem", [LINE, plane()], ids=lambda problem: problem.name)
def test_simulations_have_the_shape_that_is_said(problem: Points) -> None:
    theta = problem.prior.sample((2, 3), generator_for(0))
    x = problem.simulator(theta, generator_for(1))
    assert x.shape == (2, 3, *problem.event_shape)
    assert x.dtype == theta.dtype
    assert torch.equal(x, problem.simulator(theta, generator_for(1)))
    there = x[..., -1]
    assert set(there.unique().tolist()) <= {0.0, 1.0}
    assert (x[there == 0] == 0).all()
    assert (there.diff(dim=-1) <= 0).all()


def test_sizes_are_equally_likely() -> None:
    x = LINE.simulator(LINE.prior.sample((5_000,), generator_for(0)), generator_for(1))
    counts = torch.bincount(x[..., -1].sum(-1).long(), minlength=21)[4:]
    assert len(counts) == 17
    result: Any = stats.chisquare(counts)
    assert result.pvalue > 1e-5  # the false-alarm rate


def test_points_follow_the_law() -> None:
    theta = LINE.layout.pack(
        torch.tensor([2]),
        torch.tensor([[[10.0, 1.0, 3.0], [30.0, 2.0, 1.0], *2 * [[0.0, 0.0, 0.0]]]]),
    )
    x = LINE.simulator(theta.expand(2_000, -1), generator_for(1))
    points = x[x[..., -1] > 0][:, 0].double().numpy()

    def fraction(v: Any) -> Any:
        low, high = stats.norm.cdf(v, 10, 1), stats.norm.cdf(v, 30, 2)
        return 0.75 * low + 0.25 * high

    result: Any = stats.kstest(points, fraction)
    assert result.pvalue > 1e-5  # the false-alarm rate


def test_shares_of_gamma_weights_are_those_of_dirichlet() -> None:
    weights = LINE.layout.unpack(
        LINE.prior.with_cardinality([0, 0, 0, 1, 0]).sample((5_000,), generator_for(2))
    ).components[:, :3, 2]
    found = weights / weights.sum(-1, keepdim=True)
    torch.manual_seed(3)
    fresh = Dirichlet(torch.ones(3)).sample((5_000,))
    # 4 tests at 1e-5
    for a, b in ((found[:, 0], fresh[:, 0]), (found.amax(-1), fresh.amax(-1))):
        assert stats.ks_2samp(a, b).pvalue > 1e-5  # pyright: ignore
    total = weights.sum(-1)
    assert stats.kstest(total, stats.gamma(3).cdf).pvalue > 1e-5  # pyright: ignore
    # and the data do not see their sum
    assert abs(float(torch.corrcoef(torch.stack([total, found[:, 0]]))[0, 1])) < 0.08


@pytest.mark.parametrize("problem", [LINE, plane()], ids=lambda problem: problem.name)
def test_the_likelihood_is_a_product_over_points(problem: Points) -> None:
    theta = problem.prior.sample((30,), generator_for(3)).double()
    x = problem.simulator(theta, generator_for(4))
    found = problem.log_likelihood(theta, x)
    for row, one, value in zip(theta, x, found, strict=True):
        parts = problem.layout.unpack(row)
        c = parts.components[parts.mask].numpy()
        points = one[one[:, -1] > 0][:, :-1].numpy()
        weight = c[:, -1 if problem is not LINE else 2]
        total = 0.0
        for v in points:
            if problem is LINE:
                each = stats.norm.pdf(v[0], c[:, 0], c[:, 1])
            else:
                z = ((v - c[:, :2]) ** 2).sum(-1) / c[:, 2] ** 2
                each = [math.exp(-0.5 * s) for s in z] / (2 * math.pi * c[:, 2] ** 2)
            total += math.log(float((weight * each).sum() / weight.sum()))
        assert float(value) == pytest.approx(total, rel=1e-6, abs=1e-6)


def test_neither_order_nor_unit_of_weights_nor_padding_changes_the_likelihood() -> None:
    layout = LINE.layout
    theta = LINE.prior.sample((40,), generator_for(3)).double()
    x = LINE.simulator(theta, generator_for(4))
    expected = LINE.log_likelihood(theta, x)
    shuffled = layout.relabel(theta, generator_for(5))
    order = torch.randperm(20, generator=generator_for(6))
    longer = torch.cat([x, torch.full((40, 3, 2), math.nan)], 1)
    parts = layout.unpack(theta)
    scaled = parts.components * torch.tensor([1.0, 1.0, 7.0])
    heavier = layout.pack(parts.cardinality, scaled)
    for rows, data in (
        (shuffled, x),
        (theta, x[:, order]),
        (theta, longer),
        (heavier, x),
    ):
        torch.testing.assert_close(LINE.log_likelihood(rows, data), expected)
    pairs = LINE.log_likelihood(theta[:, None], x[None, :5])
    assert pairs.shape == (40, 5)
    torch.testing.assert_close(pairs.diagonal(), expected[:5])


def test_the_chart_offers_splits_where_names_are_given() -> None:
    assert isinstance(LINE.build_chart(), MomentChart)
    (move, *rest) = LINE.build_chart().extra_moves(LINE.layout)
    assert move.name == "split or merge by moments"
    assert len(rest) == 2
    bare = Points("bare", LINE.prior, LINE.simulator)
    assert type(bare.build_chart()) is WhiteningChart
    assert untrained(LINE).chart.kind == "moments"


def test_posteriors_take_sets_of_any_order_and_with_gaps() -> None:
    posterior = untrained(LINE)
    v = torch.tensor([12.0, 13.5, 20.0, 21.0, 19.5])
    x = LINE.pack(v)[0]
    assert x.shape == (20, 2)
    probs = posterior.cardinality(x).probs
    torch.testing.assert_close(
        posterior.cardinality(LINE.pack(v.flip(0))).probs[0], probs
    )
    gaps = x.clone()
    gaps[5:] = math.nan
    torch.testing.assert_close(posterior.cardinality(gaps).probs, probs)
    rows = posterior.sample((50,), gaps)
    assert LINE.prior.support.check(rows).all()
    assert posterior.log_prob(rows, gaps).isfinite().all()
    with pytest.raises(ValueError, match="must have 1"):
        posterior.cardinality(x + 0.5)


def test_units_do_not_matter() -> None:
    def made(unit: float) -> tuple[Points, Tensor]:
        ends = (5.0 * unit, 40.0 * unit), (0.2 * unit, 8.0 * unit)
        problem = gaussian_mixture(num_points=20, location=ends[0], scale=ends[1])
        rows = problem.prior.sample((3,), generator_for(1))
        return problem, problem.simulator(rows, generator_for(2))

    found = []
    for unit in (1.0, 1e-18, 1e18):
        problem, x = made(unit)
        found.append(untrained(problem).cardinality(x).probs)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-5)


def test_the_ordinary_work_flow_runs() -> None:
    theta = LINE.prior.sample((300,), generator_for(1))
    x = LINE.simulator(theta, generator_for(2))
    trainer = SlotNPE(LINE.prior, slot_nn(LINE), show_progress_bars=False)
    trainer.train_online(
        LINE.simulator, num_simulations=256, batch_size=64, num_validation=64
    )
    posterior = trainer.build_posterior()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is hardly trained
        refined = posterior.refine(LINE.log_likelihood, x[0], 200)
    assert isinstance(refined, RefinedPosterior)
    assert refined.sample((5,)).shape == (5, LINE.layout.size)
    assert "existence" in posterior.catalogue(x[0], num_samples=100)


def test_wrong_arguments_are_named() -> None:
    prior, simulator = LINE.prior, LINE.simulator
    law = Mixture(lambda c: Normal(c[..., 0], c[..., 1]), weight=2)
    with pytest.raises(TypeError, match="law must be a function"):
        PointsSimulator(3, prior, 5)  # pyright: ignore
    with pytest.raises(TypeError, match="prior must be a VariableKPrior"):
        PointsSimulator(law, Gamma(1.0, 1.0), 5)  # pyright: ignore
    with pytest.raises(ValueError, match="fewest must be at most"):
        PointsSimulator(law, prior, 5, fewest=6)
    with pytest.raises(TypeError, match="law must return a torch Distribution"):
        PointsSimulator(lambda parts: parts.mask, prior, 5)  # pyright: ignore
    with pytest.raises(ValueError, match="batch shape"):
        PointsSimulator(lambda parts: Normal(0.0, 1.0), prior, 5)
    with pytest.raises(TypeError, match="simulator must be a PointsSimulator"):
        Points("wrong", prior, lambda theta: theta)
    with pytest.raises(ValueError, match="go together"):
        Points("wrong", prior, simulator, weight="weight")
    with pytest.raises(ValueError, match="must name parameters"):
        Points("wrong", prior, simulator, weight="weight", places=("middle",))
    with pytest.raises(ValueError, match="2 entries for each point"):
        simulator.log_likelihood(prior.sample((3,)), torch.ones(3, 5, 3))
    with pytest.raises(ValueError, match="concentration must be positive"):
        gaussian_mixture(concentration=0.0)
    with pytest.raises(ValueError, match="scale must be an interval"):
        gaussian_mixture(scale=(-1.0, 2.0))
