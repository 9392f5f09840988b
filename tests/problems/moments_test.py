"""Splits and merges by moments: what they keep, their Jacobian, their invariance."""

import math
from typing import Any

import pytest
import torch
from sbi.utils import MultipleIndependent
from scipy import stats
from torch import Tensor
from torch.distributions import Gamma, LogNormal, Normal

from sbi_slotflow import VariableKPrior
from sbi_slotflow.nn.charts import chart_from_spec
from sbi_slotflow.posterior.moves import Population, metropolis
from sbi_slotflow.problems.base import uniform
from sbi_slotflow.problems.moments import MomentChart, MomentSplit
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.marginals import marginals_of


def one(family: type, a: float, b: float) -> Any:
    return family(torch.tensor([a]), torch.tensor([b]))


# Laws of the parameters; indices of weight, places and scales.
CASES: dict[str, tuple[list[Any], int, list[int], list[int]]] = {
    "mixture": (
        [one(Normal, 0.0, 2.0), one(LogNormal, 0.0, 0.5), one(Gamma, 2.0, 1.0)],
        2,
        [0],
        [1],
    ),
    "plane": (
        [
            one(Gamma, 1.0, 1.0),
            uniform(-4.0, 4.0),
            one(Normal, 0.0, 2.0),
            one(LogNormal, 0.0, 0.5),
            one(LogNormal, 0.3, 0.5),
        ],
        0,
        [1, 2],
        [3, 4],
    ),
    "signals": (
        [uniform(0.0, 1.0), one(Gamma, 2.0, 1.0), one(LogNormal, 0.0, 0.3)],
        1,
        [0],
        [],
    ),
}


def case(name: str) -> tuple[VariableKPrior, MomentSplit]:
    laws, weight, places, scales = CASES[name]
    prior = VariableKPrior(
        MultipleIndependent(laws), [0.0, 1.0, 2.0, 1.0], order_by=places[0]
    )
    chart = MomentChart(prior.component_marginals, weight, places, scales)
    (move, *_) = chart.extra_moves(prior.layout)
    return prior, move


def components(name: str, num: int) -> Tensor:
    prior, _ = case(name)
    rows = prior.with_cardinality([0, 1, 0, 0]).sample((num,), generator_for(1))
    return prior.layout.unpack(rows.double()).components[:, 0]


@pytest.mark.parametrize("name", CASES)
def test_a_merge_undoes_a_split(name: str) -> None:
    _, move = case(name)
    whole = components(name, 300)
    first, second, value = move.divide(whole, generator_for(2))
    again, other = move.unite(first, second)
    torch.testing.assert_close(again, whole, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(other, value, rtol=1e-8, atol=1e-8)
    assert (first[:, move.layout.order_by] < second[:, move.layout.order_by]).all()


@pytest.mark.parametrize("name", CASES)
def test_moments_are_kept(name: str) -> None:
    _, move = case(name)
    _, weight, places, scales = CASES[name]
    whole = components(name, 300)
    first, second, _ = move.divide(whole, generator_for(3))
    shares = [part[:, weight] / whole[:, weight] for part in (first, second)]
    torch.testing.assert_close(shares[0] + shares[1], torch.ones_like(shares[0]))
    pairs = list(zip(shares, (first, second), strict=True))
    for i, place in enumerate(places):
        mean = sum(share * part[:, place] for share, part in pairs)
        torch.testing.assert_close(mean, whole[:, place])
        if scales:
            square = sum(
                share * (part[:, place].square() + part[:, scales[i]].square())
                for share, part in pairs
            )
            expected = whole[:, place].square() + whole[:, scales[i]].square()
            torch.testing.assert_close(square, expected)


def test_the_jacobian_is_that_of_automatic_differentiation() -> None:
    _, move = case("mixture")

    def parts(v: Tensor) -> Tensor:
        m, s, w, u, e, a = v.unbind()
        distance = e * s / (u * (1 - u)).sqrt()
        rest = (1 - e * e).sqrt() * s
        first = m - (1 - u) * distance, (a / u).sqrt() * rest, u * w
        second = m + u * distance, ((1 - a) / (1 - u)).sqrt() * rest, (1 - u) * w
        return torch.stack([*first, *second])

    for seed in range(5):
        v = torch.rand(6, dtype=torch.float64, generator=generator_for(seed))
        jacobian: Any = torch.autograd.functional.jacobian(parts, v)
        first, second = parts(v)[:3][None], parts(v)[3:][None]
        _, value = move.unite(first, second)
        log_q = stats.beta.logpdf(v[3].item(), 2, 2)
        log_q += stats.beta.logpdf(v[4].item(), 2, 2)
        expected = float(jacobian.det().abs().log()) - log_q
        assert float(value) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_without_data_the_prior_stays(name: str) -> None:
    # A Jacobian or a choice that is wrong changes K and the parameters. 4 or 6 tests of
    # each case at 1e-5: false alarms below 2e-4.
    prior, move = case(name)
    layout, num = prior.layout, 20_000

    def evaluate(theta: Tensor) -> Population:
        log_p = prior.log_prob(theta).double()
        return Population(theta, log_p, log_p)

    population = evaluate(prior.sample((num,), generator_for(4)).double())
    rates, generator = [], generator_for(5)
    for _ in range(12):
        population, rate = metropolis(population, move, 1.0, evaluate, generator)
        rates.append(rate)
    assert sum(rates) / len(rates) > 0.05
    counts = torch.bincount(layout.cardinality(population.theta), minlength=4)
    expected = prior.cardinality_probs.double() * num
    result: Any = stats.chisquare(counts[1:], expected[1:])
    assert result.pvalue > 1e-5
    parts = layout.unpack(population.theta)
    # One component a set, chosen by chance, so that all are independent.
    slot = (torch.rand(num, generator=generator) * parts.cardinality).long()
    found = parts.components[torch.arange(num), slot]
    fresh = prior.component.sample((num,)).double()
    for i in range(layout.num_component_params):
        result = stats.ks_2samp(found[:, i], fresh[:, i])
        assert result.pvalue > 1e-5
    assert torch.equal(layout.canonical(population.theta), population.theta)


def test_a_wrong_jacobian_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MomentSplit._log_jacobian

    def wrong(*args: Any) -> Tensor:
        return right(*args) + math.log(1.3)

    monkeypatch.setattr(MomentSplit, "_log_jacobian", staticmethod(wrong))
    with pytest.raises(AssertionError):
        test_without_data_the_prior_stays("mixture")


def test_what_cannot_be_split_or_merged_stays() -> None:
    prior, move = case("mixture")
    alone = prior.with_cardinality([0, 1, 0, 0]).sample((200,), generator_for(1))
    full = prior.with_cardinality([0, 0, 0, 1]).sample((200,), generator_for(1))
    for rows, sizes in ((alone, {1, 2}), (full, {2, 3})):
        new, log_ratio = move.propose(rows.double(), rows.double(), generator_for(2))
        k = prior.layout.cardinality(new)
        assert set(k.tolist()) == sizes
        still = k == rows[:, 0]
        assert torch.isneginf(log_ratio[still]).all()
        assert torch.isfinite(log_ratio[~still]).all()


def test_the_chart_comes_back_from_its_description() -> None:
    _, move = case("plane")
    again = chart_from_spec(move.chart.spec)
    assert isinstance(again, MomentChart)
    assert again.spec == move.chart.spec
    assert again.places == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, [0], []), "must be different parameters"),
        ((3, [0], []), "must be different parameters"),
        ((2, [], []), "one parameter at least"),
        ((2, [0], [1, 1]), "must be different parameters"),
        ((0, [2], [1]), "must be parameters that are positive"),
    ],
)
def test_wrong_indices_are_refused(options: Any, message: str) -> None:
    laws = CASES["mixture"][0]
    with pytest.raises(ValueError, match=message):
        MomentChart(marginals_of(MultipleIndependent(laws)), *options)


def test_splits_need_the_order_of_a_place() -> None:
    laws, weight, places, scales = CASES["mixture"]
    prior = VariableKPrior(MultipleIndependent(laws), [1.0, 1.0, 1.0], order_by=1)
    chart = MomentChart(prior.component_marginals, weight, places, scales)
    assert chart.extra_moves(prior.layout) == []
    with pytest.raises(ValueError, match="in the order of a place"):
        MomentSplit(prior.layout, chart)
