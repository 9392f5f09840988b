"""Priors over sets of several classes."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import Distribution, Independent, Uniform

from sbi_slotflow import MultiClassPrior, VariableKPrior


def box(*widths: float) -> Distribution:
    high = torch.tensor(widths)
    return Independent(Uniform(torch.zeros_like(high), high), 1)


def line(**options: Any) -> VariableKPrior:
    names = ("amplitude", "frequency")
    return VariableKPrior(
        box(2.0, 4.0), [1, 1, 2], order_by=1, component_names=names, **options
    )


def burst() -> VariableKPrior:
    return VariableKPrior(box(5.0), [1, 3], component_names=("time",))


@pytest.fixture
def prior() -> MultiClassPrior:
    return MultiClassPrior(
        {"line": line(), "burst": burst()}, shared=box(0.5), shared_names=["sigma"]
    )


def test_densities_of_classes_multiply(prior: MultiClassPrior) -> None:
    theta = prior.sample((500,), torch.Generator().manual_seed(0))
    expected = torch.full((500,), math.log(2.0))
    for name, member in prior.classes.items():
        expected = expected + member.log_prob(prior.layout.view(theta, name))
    assert torch.allclose(prior.log_prob(theta), expected)
    mixed = prior.layout.relabel(theta, torch.Generator().manual_seed(1))
    assert torch.allclose(prior.log_prob(mixed), expected)
    assert prior.support.check(theta).all()


def test_it_integrates_to_one(prior: MultiClassPrior) -> None:
    """Each kind of row has the constant density p(K) / volume."""
    theta = prior.sample((4_000,), torch.Generator().manual_seed(0))
    kind, total = prior.layout.kind(theta), 0.0
    log_p = prior.log_prob(theta).double()
    for code in kind.unique():
        here = log_p[kind == code]
        assert here.max() - here.min() < 1e-5
        lines, bursts = prior.layout.counts(theta[kind == code][0]).tolist()
        volume = 0.5 * 8.0**lines / math.factorial(lines) * 5.0**bursts
        total += float(here[0].exp()) * volume
    assert total == pytest.approx(1.0, abs=1e-5)


def test_draws_have_the_counts_of_the_prior(prior: MultiClassPrior) -> None:
    """False alarms: below one in 10,000 (five standard deviations of each share)."""
    theta = prior.sample((20_000,), torch.Generator().manual_seed(0))
    counts = prior.layout.counts(theta)
    for c, weights in enumerate(([0.25, 0.25, 0.5], [0.25, 0.75])):
        for k, p in enumerate(weights):
            share = float((counts[:, c] == k).double().mean())
            assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / len(theta))
    assert torch.allclose(
        prior.cardinality_probs, torch.tensor([0.0625, 0.25, 0.3125, 0.375])
    )


def test_rows_outside_have_no_density(prior: MultiClassPrior) -> None:
    theta = prior.sample((1,), torch.Generator().manual_seed(0))[0]
    layout = prior.layout
    for name, value in (("sigma", 0.6), ("K_burst", 2.0), ("K_line", 0.5)):
        bad = theta.clone()
        bad[layout.names.index(name)] = value
        assert prior.log_prob(bad) == -math.inf
        assert not prior.support.check(bad)


def test_cardinalities_change_by_class_or_together(prior: MultiClassPrior) -> None:
    layout, generator = prior.layout, torch.Generator().manual_seed(0)
    one = prior.with_cardinality({"burst": [0, 1]})
    theta = one.sample((200,), generator)
    assert (layout.counts(theta)[:, 1] == 1).all()
    assert torch.isfinite(one.log_prob(theta)).all()
    assert one.log_prob(theta[0]) == pytest.approx(
        float(prior.log_prob(theta[0])) - math.log(0.75), abs=1e-5
    )
    two = prior.with_cardinality([0, 0, 1, 0])
    theta = two.sample((200,), generator)
    assert (layout.cardinality(theta) == 2).all()
    # What two components are, a line and a burst or two lines, stays as it was.
    assert torch.allclose(
        two.log_prob(theta), prior.log_prob(theta) - math.log(0.3125), atol=1e-5
    )
    both = two.with_cardinality({"line": [0, 1, 0]})
    theta = both.sample((50,), generator)
    assert (layout.counts(theta) == 1).all()
    assert both.log_prob(theta[0]) == pytest.approx(-math.log(0.5 * 8.0 * 5.0), 1e-5)
    with pytest.raises(ValueError, match="leave some numbers"):
        two.with_cardinality({"line": [1, 0, 0]})
    with pytest.raises(ValueError, match="one of the classes"):
        prior.with_cardinality({"star": [1, 1]})
    with pytest.raises(ValueError, match="4 weights"):
        prior.with_cardinality([1, 1])


def test_a_class_gets_numbers_that_it_did_not_have(prior: MultiClassPrior) -> None:
    two = prior.with_cardinality({"line": [0, 0, 1]})
    again = two.with_cardinality({"line": [1, 1, 2]})
    torch.testing.assert_close(again.log_joint, prior.log_joint)
    one = two.with_cardinality({"line": [1, 1, 0]})
    expected = torch.tensor([0.5, 0.5, 0.0]).double()
    torch.testing.assert_close(one.log_joint.exp().sum(1), expected)
    # What was said of all together stays said, also of numbers that come back.
    few = prior.with_cardinality([0, 1, 1, 0]).with_cardinality({"line": [0, 1, 0]})
    back = few.with_cardinality({"line": [1, 1, 2]})
    assert set(back.cardinality_probs.nonzero().flatten().tolist()) == {1, 2}


def test_probabilities_of_each_class_are_those_of_all_together(
    prior: MultiClassPrior,
) -> None:
    few = prior.with_cardinality([1, 1, 0, 0])
    theta = few.sample((20_000,), torch.Generator().manual_seed(0))
    assert few.allows(theta).all()
    for c, probs in enumerate(few.probs_by_class):
        counts = torch.bincount(prior.layout.counts(theta)[:, c], minlength=len(probs))
        # False alarm: five standard deviations, at most, of each of five shares.
        assert (counts / len(theta) - probs).abs().max() < 5 * 0.5 / 20_000**0.5
    more = prior.sample((500,), torch.Generator().manual_seed(3))
    together = prior.layout.counts(more).sum(-1)
    assert torch.equal(few.allows(more), together < 2)


def test_only_numbers_on_a_way_are_bridged(prior: MultiClassPrior) -> None:
    few = prior.with_cardinality([1, 1, 0, 0])
    assert few.bridged() is few
    # One up and another down is a step: nothing is missing.
    one = prior.with_cardinality([0, 1, 0, 0])
    assert one.bridged() is one
    gap = prior.with_cardinality([1, 0, 0, 1])
    possible, linked = (p.log_joint.isfinite() for p in (gap, gap.bridged()))
    assert possible.sum() == 2
    assert linked.sum() == 4  # two of the ways of three steps are as short
    theta = gap.bridged().sample((500,), torch.Generator().manual_seed(0))
    assert not gap.allows(theta).all()
    assert torch.isfinite(gap.bridged().log_prob(theta)).all()
    one = prior.with_cardinality({"line": [1, 0, 1], "burst": [1, 0]})
    assert (one.bridged().log_joint.isfinite().sum(1) > 0).all()


def test_separations_hold_within_their_class() -> None:
    prior = MultiClassPrior({"line": line(min_separation=1.0), "burst": burst()})
    theta = prior.sample((500,), torch.Generator().manual_seed(0))
    assert prior.separated(theta).all()
    assert torch.isfinite(prior.log_prob(theta)).all()
    row = torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0, 1.5, 0.0])
    assert not prior.separated(row)
    assert prior.log_prob(row) == -math.inf


def test_a_component_of_any_class_has_a_density(prior: MultiClassPrior) -> None:
    draws = prior.component.sample((4_000,))
    weights = prior.component.weights
    share = (draws[:, 0] == 0).double().mean()
    assert abs(share - weights[0]) < 5 * math.sqrt(0.25 / 4_000)
    log_p = prior.component.log_prob(draws)
    lines = draws[:, 0] == 0
    assert torch.allclose(log_p[lines], (weights[0] / 8.0).log())
    assert torch.allclose(log_p[~lines], (weights[1] / 5.0).log())


def test_marginals_are_whitened_by_class(prior: MultiClassPrior) -> None:
    draws = prior.component.sample((500,)).double()
    u, log_det = prior.component_marginals.forward(draws)
    assert torch.equal(u[:, 0], draws[:, 0])
    assert torch.allclose(prior.component_marginals.inverse(u), draws)
    # By hand: the slope of a quantile's normal score.
    normal = torch.distributions.Normal(0.0, 1.0)
    first = draws[draws[:, 0] == 1][0]
    slope = -normal.log_prob(normal.icdf(first[1] / 5.0)) - math.log(5.0)
    assert log_det[draws[:, 0] == 1][0] == pytest.approx(float(slope))


def test_what_is_no_class_is_refused(prior: MultiClassPrior) -> None:
    with pytest.raises(TypeError, match="VariableKPrior"):
        MultiClassPrior({"line": box(1.0)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="classes of its own"):
        MultiClassPrior({"both": prior})
    with pytest.raises(TypeError, match="map names to priors"):
        MultiClassPrior([line()])  # pyright: ignore[reportArgumentType]
