"""Slots, what they draw and what they see."""

import math

import pytest
import torch

from benchmarks.slots import match_slots, slot_stability
from sbi_slotflow import SlotPosterior, load_pretrained, problems, slot_nn
from sbi_slotflow.seeding import generator_for

TINY = problems.sinusoids("tiny")
KINDS = {
    "attention": {"slots": "attention"},
    "global": {"slots": "global"},
    "factorised": {"coupling": "factorised"},
    "joint": {},
}


def signals(k: int, num: int):
    weights = [float(i == k) for i in range(4)]
    theta = TINY.prior.with_cardinality(weights).sample((num,), generator_for(0, k))
    return theta, TINY.simulator(theta, generator_for(1, k))


def untrained(kind: str) -> SlotPosterior:
    torch.manual_seed(1)
    theta = TINY.prior.sample((64,), generator_for(2))
    estimator = slot_nn(TINY, **KINDS[kind])(theta, TINY.simulator(theta))
    return SlotPosterior(estimator, TINY.prior, TINY.simulator)


@pytest.mark.parametrize("kind", KINDS)
def test_matches_hold_each_true_component_once(kind):
    theta, x = signals(3, 8)
    posterior = untrained(kind)
    matches = match_slots(posterior, theta, x, generator_for(3))
    truth = TINY.layout.unpack(theta).components
    assert matches.components.shape == truth.shape
    frequency = matches.components[..., 2].sort(-1).values
    torch.testing.assert_close(frequency, truth[..., 2])
    assert matches.contexts.shape[:2] == (8, 3)
    assert torch.isfinite(matches.contexts).all()
    # The contexts of different slots differ.
    assert (matches.contexts.diff(dim=1).abs().amax(-1) > 1e-6).all()


def test_a_good_posterior_draws_the_same_components_from_the_same_slots():
    theta, x = signals(3, 1)
    shares = slot_stability(load_pretrained("sinusoids-tiny"), theta, x, 50)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3).double())
    torch.testing.assert_close(shares.sum(0), torch.ones(3).double())
    # Joint slots in cells stand in the order of frequency.
    assert (shares.diagonal() > 0.9).all()


def test_a_slot_is_matched_with_the_component_that_it_drew():
    theta, x = signals(3, 20)
    posterior = load_pretrained("sinusoids-tiny")
    matches = match_slots(posterior, theta, x, generator_for(3))
    # Joint slots in cells draw upwards: slot k has the k-th smallest frequency.
    rising = (matches.components[..., 2].diff(dim=1) > 0).all(-1)
    assert rising.double().mean() > 0.9
    assert matches.order.tolist() == [0, 1, 2]


def test_a_posterior_without_training_does_not():
    theta, x = signals(3, 1)
    torch.manual_seed(0)
    shares = slot_stability(untrained("attention"), theta, x, 200)
    assert shares.max() < 0.8
    torch.testing.assert_close(shares.sum(0), torch.ones(3).double())


def test_phases_are_matched_on_the_circle():
    from benchmarks.slots.matches import _matched

    posterior = load_pretrained("sinusoids-tiny")
    truth = torch.tensor([[[1.0, 0.05, 1.0], [1.0, math.pi, 1.0]]])
    drawn = torch.tensor([[[1.0, 3.3, 1.0], [1.0, math.tau - 0.05, 1.0]]])
    assert _matched(posterior, drawn, truth).tolist() == [[1, 0]]


def test_bad_input_is_named():
    posterior = load_pretrained("sinusoids-tiny")
    theta, x = signals(2, 3)
    mixed = torch.cat([theta, signals(1, 1)[0]])
    with pytest.raises(ValueError, match="theta must hold one cardinality"):
        match_slots(posterior, mixed, torch.cat([x, x[:1]]))
    with pytest.raises(ValueError, match="theta must hold one cardinality"):
        match_slots(posterior, *signals(0, 2))
    with pytest.raises(ValueError, match="theta and x must be batches of one size"):
        match_slots(posterior, theta[:2], x)
    with pytest.raises(ValueError, match="must be of one signal"):
        slot_stability(posterior, theta, x)
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        slot_stability(posterior, theta[0], x[0], 0)
