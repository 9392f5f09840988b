"""Densities of components learnt from a population."""

import math

import pytest
import torch

from sbi_slotflow import problems
from sbi_slotflow.nn.charts import WhiteningChart
from sbi_slotflow.posterior.component_proposals import PooledComponents
from sbi_slotflow.seeding import generator_for

LINEAR, TINY = problems.linear_gaussian(), problems.sinusoids("tiny")
CHARTS = {
    "linear": (LINEAR, WhiteningChart(LINEAR.prior.component_marginals)),
    "sinusoids": (TINY, TINY.build_chart()),
}


@pytest.mark.parametrize("name", CHARTS)
@pytest.mark.parametrize("num", [0, 10, 2_000])
def test_the_density_is_that_of_the_draws(name, num):
    problem, chart = CHARTS[name]
    theta = problem.prior.sample((num,), generator_for(0))
    # narrow in the parameter that orders components
    parts = problem.layout.unpack(theta.double())
    order = problem.layout.order_by
    parts.components[..., order] = 1.0 + 0.02 * (parts.components[..., order] - 1.0)
    theta = problem.layout.pack(parts.cardinality, parts.components, parts.shared)
    pooled = PooledComponents(theta, problem.prior, 0.2, chart)
    drawn = pooled.sample_component(40_000, generator_for(1))
    broad = problem.prior.sample((40_000,), generator_for(2))
    assert chart.contains(drawn).all()
    # E_g[p / g] in any region is the prior's share of it
    mine = pooled.log_prob_component(drawn)
    assert mine.dtype == torch.float64
    prior = PooledComponents(theta[:0], problem.prior)
    ratio = (prior.log_prob_component(drawn) - mine).exp()
    parts = problem.layout.unpack(broad)
    apart = parts.components[parts.mask]
    for d in range(drawn.shape[-1]):
        for level in (0.25, 0.5, 0.75):
            edge = apart[:, d].quantile(level)
            term = torch.where(drawn[:, d] < edge, ratio, 0.0)
            share = (apart[:, d] < edge).double().mean()
            error = torch.hypot(term.std(), torch.tensor(0.5)) / math.sqrt(40_000)
            # 5 sigma of at most 9 (a least separation moves the prior's shares by
            # less than 0.02): false alarms below 6e-6
            assert abs(term.mean() - share) <= 5 * error + 0.02
            assert error < 0.02


def test_components_that_all_sets_agree_on_are_proposed_less():
    num = 3_000
    layout = TINY.layout
    theta = TINY.prior.with_cardinality([0, 0, 1, 0]).sample((num,), generator_for(0))
    parts = layout.unpack(theta.double())
    sharp = 0.6 + 1e-3 * torch.rand(num, generator=generator_for(1))
    broad = 1.0 + torch.rand(num, generator=generator_for(2))
    parts.components[:, :2, 2] = torch.stack([sharp, broad], -1)
    theta = layout.pack(parts.cardinality, parts.components, parts.shared)
    pooled = PooledComponents(theta, TINY.prior, 1e-4, TINY.build_chart())
    drawn = pooled.sample_component(10_000, generator_for(3))
    share = float((drawn[:, 2] > 0.7).double().mean())
    assert 0.7 < share < 0.98  # a half if all slices had the same weight
