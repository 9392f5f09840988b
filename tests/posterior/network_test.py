import math
import pickle
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torch import nn
from trained import linear_gaussian_posterior

from sbi_slotflow import SlotPosterior, problems, slot_nn
from sbi_slotflow.nn import ComponentHead
from sbi_slotflow.nn.flows import LocationScale
from sbi_slotflow.posterior.network import SeparatedSets
from sbi_slotflow.seeding import generator_for

SEPARATED = problems.sinusoids("tiny")


@pytest.fixture(scope="module")
def linear():
    return problems.linear_gaussian()


@pytest.fixture(scope="module")
def posterior():
    return linear_gaussian_posterior()


@pytest.fixture(scope="module")
def observation(linear):
    generator = generator_for(7)
    theta = linear.prior.sample((4,), generator)
    return linear.simulator(theta, generator)


def untrained(problem, **options: Any) -> SlotPosterior:
    torch.manual_seed(1)
    theta = problem.prior.sample((64,))
    estimator = slot_nn(problem, **options)(theta, problem.simulator(theta))
    return SlotPosterior(estimator, problem.prior, problem.simulator)


@pytest.fixture(scope="module")
def separated():
    """A posterior with a least separation, hardly trained, so that it matters."""
    return untrained(SEPARATED, slots="attention")


@pytest.fixture(scope="module")
def signal():
    generator = generator_for(3)
    return SEPARATED.simulator(SEPARATED.prior.sample((2,), generator), generator)


def test_shapes(posterior, observation):
    assert posterior.sample((5, 2), observation[0]).shape == (5, 2, 7)
    assert posterior.sample((), observation[0]).shape == (7,)
    assert posterior.sample((0,), observation[0]).shape == (0, 7)
    assert posterior.sample_batched((5,), observation).shape == (5, 4, 7)
    draws = posterior.sample_batched((5,), observation)
    assert posterior.log_prob_batched(draws, observation).shape == (5, 4)
    assert posterior.log_prob(draws[:, 0], observation[0]).shape == (5,)
    assert posterior.cardinality(observation).probs.shape == (4, 4)
    assert posterior.cardinality(observation[:1]).probs.shape == (1, 4)
    assert posterior.cardinality(observation[0]).probs.shape == (4,)


def test_draws_follow_the_cardinality_posterior(posterior, observation):
    draws = posterior.sample((20_000,), observation[0], generator=generator_for(0))
    counts = torch.bincount(draws[:, 0].long(), minlength=4) / len(draws)
    probs = posterior.cardinality(observation[0]).probs
    # 5 standard errors of each of 4 shares: false alarms below 1e-5.
    assert ((counts - probs).abs() <= 5 * (probs / len(draws)).sqrt() + 1e-4).all()


@pytest.mark.parametrize("k", [0, 1, 3])
def test_conditioning_on_a_cardinality(posterior, observation, k):
    assert (posterior.sample((50,), observation[0], k=k)[:, 0] == k).all()


def test_draws_and_density_agree(posterior, observation):
    # E_q[p / q] = 1 for the exact posterior p, whose support q covers.
    exact = problems.linear_gaussian().exact_posterior()
    x = observation[0]
    draws = posterior.sample((20_000,), x, generator=generator_for(1))
    ratio = (exact.log_prob(draws, x) - posterior.log_prob(draws, x)).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - 1) <= 5 * error  # false alarms below 1e-6
    assert error < 0.02


def test_same_density_for_every_relabelling(posterior, observation):
    draws = posterior.sample((50,), observation[0])
    relabelled = posterior.prior.layout.relabel(draws)
    torch.testing.assert_close(
        posterior.log_prob(draws, observation[0]),
        posterior.log_prob(relabelled, observation[0]),
    )


def test_new_cardinality_prior_reweights(posterior, observation):
    weights = torch.tensor([0.0, 0.2, 0.3, 0.5])
    new = posterior.with_cardinality_prior(weights).cardinality(observation).probs
    expected = posterior.cardinality(observation).probs * weights
    torch.testing.assert_close(new, expected / expected.sum(-1, keepdim=True))
    draws = posterior.with_cardinality_prior(weights).sample((200,), observation[0])
    assert (draws[:, 0] > 0).all()


def test_new_cardinality_prior_leaves_the_old_posterior(posterior, observation):
    before = posterior.cardinality(observation).probs
    posterior.with_cardinality_prior([1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(posterior.cardinality(observation).probs, before)


def test_map_has_the_most_probable_cardinality(posterior, observation):
    best = posterior.map(observation[0])
    assert best.shape == (1, 7)
    assert best[0, 0] == posterior.cardinality(observation[0]).probs.argmax()
    draws = posterior.sample((100,), observation[0], k=int(best[0, 0]))
    density = posterior.log_prob(torch.cat([best, draws]), observation[0])
    assert (density[0] >= density[1:]).float().mean() > 0.95


def test_seeded_draws_repeat(posterior, observation):
    first = posterior.sample((10,), observation[0], generator=generator_for(5))
    again = posterior.sample((10,), observation[0], generator=generator_for(5))
    assert torch.equal(first, again)


def test_chunked_draws_cover_all_rows(linear, posterior, observation):
    small = SlotPosterior(
        posterior.posterior_estimator, linear.prior, max_sampling_batch_size=10
    )
    draws = small.sample_batched((25,), observation, k=2)
    assert (draws[..., 0] == 2).all()
    assert len(draws[:, 0, 1].unique()) == 25


def test_default_x(posterior, observation):
    copy = pickle.loads(pickle.dumps(posterior)).set_default_x(observation[0])
    assert copy.sample((3,)).shape == (3, 7)
    torch.testing.assert_close(
        copy.cardinality().probs, posterior.cardinality(observation[0]).probs
    )


def test_reconstruction_is_the_simulators_signal(linear, posterior, observation):
    draws = posterior.sample((10,), observation[0])
    expected = linear.simulator.signal(draws)
    torch.testing.assert_close(posterior.reconstruct(draws), expected)
    bare = SlotPosterior(posterior.posterior_estimator, linear.prior)
    torch.testing.assert_close(bare.reconstruct(draws, linear.simulator), expected)
    with pytest.raises(ValueError, match="needs a simulator"):
        bare.reconstruct(draws)


def test_separated_draws_keep_their_distance_and_q_of_k(separated, signal):
    draws = separated.sample((4_000,), signal[0], generator=generator_for(2))
    assert separated.prior.support.check(draws).all()
    plain = separated.posterior_estimator.sample(
        (4_000,), signal[:1], generator=generator_for(2)
    )[:, 0]
    assert not separated.prior.support.check(plain).all()
    # K is drawn first and kept: redrawing components must not tilt it.
    assert torch.equal(draws[:, 0].sort().values, plain[:, 0].sort().values)


def test_separated_density_is_normalised(separated, signal):
    # Given K = 2, the mean of prior / q under q is 1. The acceptance is estimated from
    # 10,000 draws: 0.5 % error, beside the mean's own.
    draws = separated.sample((20_000,), signal[0], k=2, generator=generator_for(4))
    prior = separated.prior
    log_p = prior.log_prob(draws) - prior.log_cardinality_probs[2]
    log_k = separated.cardinality(signal[0]).logits[2]
    ratio = (log_p - (separated.log_prob(draws, signal[0]) - log_k)).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - 1) <= 5 * error + 0.02  # false alarms below 1e-6
    assert error < 0.05


def test_the_prior_stands_in_for_slots_that_collide(signal):
    collided = untrained(SEPARATED, slots="attention")
    head = collided.posterior_estimator.component_head
    assert isinstance(head, ComponentHead)
    first = head.flow.transform._transforms[0]
    assert isinstance(first, LocationScale)
    with torch.no_grad():  # all slots agree on a sharp frequency
        last = first.network[-1]
        assert isinstance(last, nn.Linear)
        last.bias[5] = -8.0
    draws = collided.sample((3_000,), signal[0], generator=generator_for(2))
    prior, k = collided.prior, draws[:, 0].long()
    assert prior.support.check(draws).all()
    plain = collided.posterior_estimator.sample(
        (3_000,), signal[:1], generator=generator_for(2)
    )[:, 0]
    assert torch.equal(draws[:, 0].sort().values, plain[:, 0].sort().values)
    two = draws[k == 2]
    log_p = prior.log_prob(two) - prior.log_cardinality_probs[2]
    log_q = (
        collided.log_prob(two, signal[0]) - collided.cardinality(signal[0]).logits[2]
    )
    torch.testing.assert_close(log_q, log_p, rtol=0, atol=1e-4)
    # given K = 2 the gap has the prior's distribution; false alarms below 1e-6
    gaps = two[:, 7] - two[:, 4]
    expected = prior.with_cardinality([0, 0, 1, 0]).sample((3_000,), generator_for(5))
    result: Any = ks_2samp(gaps, expected[:, 7] - expected[:, 4])
    assert result.pvalue > 1e-6
    # K = 1 is the slots' own: sharp
    assert draws[k == 1][:, 4].std() < 0.01


def test_density_is_zero_outside_the_support(separated, signal):
    draws = separated.sample((5,), signal[0], k=2)
    draws[:, 2 + 3 + 2] = draws[:, 2 + 2] + 0.01  # frequencies closer than 0.1 Hz
    assert (separated.log_prob(draws, signal[0]) == -torch.inf).all()


def test_pickle_keeps_the_posterior(posterior, observation):
    copy = pickle.loads(pickle.dumps(posterior))
    draws = posterior.sample((5,), observation[0])
    torch.testing.assert_close(
        copy.log_prob(draws, observation[0]), posterior.log_prob(draws, observation[0])
    )


def test_datatree_holds_draws_and_observation(posterior, observation, tmp_path):
    xarray = pytest.importorskip("xarray")
    tree = posterior.to_datatree(200, observation[0], generator=generator_for(0))
    tree.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    back = xarray.open_datatree(tmp_path / "posterior.nc", engine="h5netcdf")
    assert back["posterior"]["level"].shape == (1, 200, 3)
    k = torch.as_tensor(back["posterior"]["K"].values)
    active = torch.as_tensor(back["posterior"]["level"].notnull().values).sum(-1)
    assert torch.equal(active, k.long())
    assert back["observed_data"]["x"].shape == (6,)


def test_bad_input_is_named(linear, posterior, observation):
    x = observation[0]
    with pytest.raises(ValueError, match=r"x must have shape \(6,\) or \(batch, 6\)"):
        posterior.sample((1,), x[:5])
    with pytest.raises(ValueError, match="x must be finite"):
        posterior.sample((1,), torch.full((6,), torch.nan))
    with pytest.raises(ValueError, match=r"k must be an integer in 0\.\.3, got 4"):
        posterior.sample((1,), x, k=4)
    with pytest.raises(ValueError, match="takes one observation, got a batch of 4"):
        posterior.sample((1,), observation)
    with pytest.raises(ValueError, match=r"integer cardinality K in 0\.\.3"):
        posterior.log_prob(torch.tensor([[5.0, 0, 0, 0, 0, 0, 0]]), x)
    with pytest.raises(ValueError, match="must have 7 entries"):
        posterior.log_prob(torch.zeros(1, 6), x)
    with pytest.raises(ValueError, match="must hold 4 numbers for K"):
        posterior.with_cardinality_prior([1.0, 1.0])
    with pytest.raises(TypeError, match="must be a SlotDensityEstimator"):
        SlotPosterior(torch.nn.Linear(1, 1), linear.prior)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must share a layout"):
        SlotPosterior(posterior.posterior_estimator, problems.sinusoids("tiny").prior)


# Slots truncated to separated sets, against brute force on an untrained network.


@pytest.fixture(scope="module", name="sets")
@torch.no_grad()
def _sets(separated, signal):
    return SeparatedSets(
        separated.posterior_estimator.given(signal), SEPARATED.prior, 5_000
    )


def free_draws(sets, k: int, num: int) -> torch.Tensor:
    """Rows ``(num, B, E)`` of the slots alone."""
    return sets.slots.sample((num,), k, generator_for(21, k))


def gaps(rows: torch.Tensor, k: int) -> torch.Tensor:
    """Smallest gap between frequencies, by brute force."""
    frequency = SEPARATED.layout.unpack(rows).components[..., :k, 2]
    return frequency.sort(-1).values.diff(dim=-1).min(-1).values


@torch.no_grad()
def test_the_acceptance_is_the_share_of_separated_draws(sets):
    found = sets.log_acceptance(range(4))
    assert (found[:, :2] == 0).all()
    for k in (2, 3):
        kept = gaps(free_draws(sets, k, 20_000), k) >= 0.1
        share = kept.double().mean(0)
        error = (share * (1 - share) * (1 / 10_000 + 1 / 20_000)).sqrt()
        # 5 sigma of 4: false alarms below 3e-6
        assert ((found[:, k].exp() - share).abs() <= 5 * error + 1e-4).all()
        assert ((share > 0.01) & (share < 0.999)).all()


@torch.no_grad()
def test_the_acceptance_repeats_and_takes_some_cardinalities(sets):
    every = sets.log_acceptance(range(4))
    torch.testing.assert_close(sets.log_acceptance(range(4)), every)
    some = sets.log_acceptance([3])
    torch.testing.assert_close(some[:, 3], every[:, 3])
    assert (some[:, :3] == 0).all()
    assert math.isfinite(float(some.min()))


@torch.no_grad()
@pytest.mark.parametrize("k", [2, 3])
def test_redrawn_rows_follow_plain_rejection(separated, signal, k):
    # The first separated candidate counts, whatever the number drawn at once.
    sets = SeparatedSets(
        separated.posterior_estimator.given(signal[:1]), SEPARATED.prior, 5_000
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
def test_redrawing_keeps_each_observation_and_cardinality(separated, sets, signal):
    rows = sets.sample((5_000,), None, generator_for(6))
    assert SEPARATED.prior.support.check(rows).all()
    for b, probs in enumerate(separated.cardinality(signal).probs):
        counts = torch.bincount(rows[:, b, 0].long(), minlength=4)
        probs = probs.double() / probs.double().sum()
        result: Any = chisquare(counts, probs * 5_000)
        assert result.pvalue > 1e-5  # the false-alarm rate, twice
