"""Slots truncated to separated sets, against brute force on an untrained network."""

import math
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, ks_2samp

from sbi_slotflow import SlotPosterior, problems, slot_nn
from sbi_slotflow.posterior.separated import SeparatedSets
from sbi_slotflow.seeding import generator_for

TINY = problems.sinusoids("tiny")


@pytest.fixture(scope="module", name="posterior")
def _posterior():
    torch.manual_seed(1)
    theta = TINY.prior.sample((64,))
    estimator = slot_nn(TINY, slots="attention")(theta, TINY.simulator(theta))
    return SlotPosterior(estimator, TINY.prior)


@pytest.fixture(scope="module", name="signals")
def _signals():
    generator = generator_for(3)
    return TINY.simulator(TINY.prior.sample((2,), generator), generator)


@pytest.fixture(scope="module", name="sets")
@torch.no_grad()
def _sets(posterior, signals):
    return SeparatedSets(
        posterior.posterior_estimator.given(signals), TINY.prior, 5_000
    )


def free_draws(sets, k: int, num: int) -> torch.Tensor:
    """Rows ``(num, B, E)`` of the slots alone."""
    return sets.slots.sample((num,), k, generator_for(21, k))


def gaps(rows: torch.Tensor, k: int) -> torch.Tensor:
    """Smallest gap between frequencies, by brute force."""
    frequency = TINY.layout.unpack(rows).components[..., :k, 2]
    return frequency.sort(-1).values.diff(dim=-1).min(-1).values


@torch.no_grad()
def test_the_acceptance_is_the_share_of_separated_draws(sets):
    found = sets.log_acceptance(num_draws=20_000)
    assert (found[:, :2] == 0).all()
    for k in (2, 3):
        kept = gaps(free_draws(sets, k, 20_000), k) >= 0.1
        share = kept.double().mean(0)
        error = (2 * share * (1 - share) / 20_000).sqrt()
        # 5 sigma of 4: false alarms below 3e-6
        assert ((found[:, k].exp() - share).abs() <= 5 * error + 1e-4).all()
        assert ((share > 0.01) & (share < 0.999)).all()


@torch.no_grad()
def test_the_acceptance_repeats_and_takes_some_cardinalities(sets):
    every = sets.log_acceptance(num_draws=1_000)
    torch.testing.assert_close(sets.log_acceptance(num_draws=1_000), every)
    some = sets.log_acceptance([3], num_draws=1_000)
    torch.testing.assert_close(some[:, 3], every[:, 3])
    assert (some[:, :3] == 0).all()
    assert math.isfinite(float(some.min()))


@torch.no_grad()
@pytest.mark.parametrize("k", [2, 3])
def test_redrawn_rows_follow_plain_rejection(posterior, signals, k):
    # The first separated candidate counts, whatever the number drawn at once.
    sets = SeparatedSets(
        posterior.posterior_estimator.given(signals[:1]), TINY.prior, 5_000
    )
    rows = sets.sample((10_000,), k, generator_for(5))[:, 0]
    free = free_draws(sets, k, 40_000)[:, 0]
    wanted = free[gaps(free, k) >= 0.1]
    assert (gaps(rows, k) >= 0.1 - 1e-6).all()
    assert len(wanted) > 2_000
    for column in [1, *range(2, 2 + 3 * k)]:
        result: Any = ks_2samp(rows[:, column], wanted[:, column])
        assert result.pvalue > 1e-6  # 10 columns: false alarms below 1e-5
    result = ks_2samp(gaps(rows, k), gaps(wanted, k))
    assert result.pvalue > 1e-6


@torch.no_grad()
def test_redrawing_keeps_each_observation_and_cardinality(posterior, sets, signals):
    rows = sets.sample((5_000,), None, generator_for(6))
    assert TINY.prior.support.check(rows).all()
    for b, probs in enumerate(posterior.cardinality(signals).probs):
        counts = torch.bincount(rows[:, b, 0].long(), minlength=4)
        probs = probs.double() / probs.double().sum()
        result: Any = chisquare(counts, probs * 5_000)
        assert result.pvalue > 1e-5  # the false-alarm rate, twice
