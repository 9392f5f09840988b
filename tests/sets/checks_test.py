import math
import warnings

import numpy as np
import pytest
import torch

from sbi_slotflow import SlotPosterior, problems, refine, slot_nn
from sbi_slotflow.calibration import TrainingReference, UnlikeTrainingWarning
from sbi_slotflow.posterior.refine import UnreliableWeights
from sbi_slotflow.sets.checks import (
    as_floats,
    as_observation,
    as_probabilities,
    as_row,
    as_rows,
    as_shape,
    as_weights,
)
from sbi_slotflow.sets.layout import ThetaLayout

LAYOUT = ThetaLayout(2, ("a",))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.tensor([1.0, 2.0]), torch.float32),
        (torch.tensor([1.0, 2.0]).double(), torch.float64),
        (torch.tensor([1.0, 2.0]).half(), torch.float32),
        (torch.tensor([1.0, 2.0]).bfloat16(), torch.float32),
        (torch.tensor([1, 2]), torch.float64),
        (np.array([1, 2], dtype=">u2"), torch.float64),
        (np.array([1.0, 2.0], dtype=">f8"), torch.float64),
        (np.array([1.0, 2.0], dtype="f2"), torch.float32),
        (np.array([1.0, 2.0], dtype=np.longdouble), torch.float64),
        (np.array([2.0, 1.0])[::-1], torch.float64),
        ([1, 2], torch.float64),
        ([torch.tensor(1.0), torch.tensor(2.0)], torch.float32),
    ],
)
def test_numbers_keep_their_values_in_single_or_double_precision(value, dtype):
    found = as_floats(value, "x")
    assert found.dtype == dtype
    assert found.tolist() == [1.0, 2.0]


def test_integers_keep_all_their_digits():
    assert as_floats([2**25 + 1], "x").tolist() == [2**25 + 1]


def test_gradients_pass_through():
    x = torch.ones(2, requires_grad=True)
    as_floats(x, "x").sum().backward()
    assert x.grad is not None


def test_arrays_are_not_shared_with_their_owner():
    array = np.zeros(2, dtype=np.float32)
    found = as_floats(array, "x")
    array[0] = 1.0
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [torch.tensor([2, 3]), np.array([2, 3]), [2, 3]])
def test_shapes_of_any_kind(shape):
    assert as_shape(shape) == torch.Size((2, 3))


def test_rows_of_broken_cardinality_warn_if_there_are_many():
    prior = problems.linear_gaussian().prior
    rows = prior.sample((30,))
    broken = rows.clone()
    broken[:, 0] += 0.3
    with pytest.warns(
        UserWarning, match="not one of 30 theta rows starts with a whole"
    ):
        assert not prior.support.check(broken).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.support.check(broken[:5])
        prior.support.check(torch.cat([broken, rows[:1]]))
        prior.support.check(rows.unsqueeze(1))


def test_rows_and_observations_of_either_shape_are_one_batch():
    row = torch.tensor([1.0, 0.5, 0.0])
    assert torch.equal(as_row(row, LAYOUT), row[None])
    assert torch.equal(as_row(row[None], LAYOUT), row[None])
    assert torch.equal(as_rows(row.expand(4, -1), LAYOUT), row.expand(4, -1))
    assert torch.equal(as_observation(row), row[None])
    assert torch.equal(as_observation(row[None], 3), row[None])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_weights_of_any_size_add_up_to_one(scale):
    found = as_weights(scale * torch.tensor([1.0, 0.0, 3.0]), 3)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.0, 0.75]).double())


def test_probabilities_are_those_of_a_categorical_to_the_last_digit():
    probs = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    found = as_probabilities(torch.distributions.Categorical(probs), "p")
    assert torch.equal(found, as_probabilities(probs, "p"))
    assert (found.sum(-1) - 1).abs().max() < 1e-15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: as_rows(torch.zeros(0, 3), LAYOUT),
            r"samples .* \(S, 3\) with S >= 1",
        ),
        (lambda: as_rows(torch.zeros(3), LAYOUT), r"S >= 1, got \(3,\)"),
        (lambda: as_row(torch.zeros(2, 3), LAYOUT, "one"), "one must be one row"),
        (lambda: as_observation(torch.zeros(2, 3)), r"one observation, .* \(2, 3\)"),
        (lambda: as_observation(torch.zeros(())), r"one observation, .* \(\)"),
        (lambda: as_observation(torch.zeros(3), 4), "one observation of length 4"),
        (lambda: as_observation(torch.tensor([1.0, math.nan])), "in 1 entries"),
        (lambda: as_probabilities([0.5, 0.4], "p"), r"p must be .* \[0\.5, 0\.4\]"),
        (lambda: as_probabilities([1.5, -0.5], "p"), "p must be probabilities"),
        (lambda: as_probabilities([math.nan, 1.0], "p"), "p must be probabilities"),
        (lambda: as_weights(torch.ones(2), 3), r"weights must have shape \(3,\)"),
        (lambda: as_weights(torch.zeros(2), 2, "w"), "w must be finite, not negative"),
        (lambda: as_weights(torch.tensor([1, -0.1]), 2), "not negative"),
        (lambda: as_weights(torch.tensor([1, math.inf]), 2), "must be finite"),
        (lambda: as_weights(torch.tensor([1, math.nan]), 2), "must be finite"),
    ],
)
def test_what_is_malformed_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


TINY = problems.sinusoids("tiny")


@pytest.fixture(scope="module", name="posterior")
def _posterior() -> SlotPosterior:
    theta = TINY.prior.sample((250,))
    x = TINY.simulator(theta)
    untrained = SlotPosterior(slot_nn(TINY)(theta, x), TINY.prior)
    reference = TrainingReference.fit(x, level=0.01)
    return untrained.set_training_reference(reference)


def test_unreliable_weights_are_warned_of_at_the_users_line(
    posterior: SlotPosterior,
) -> None:
    x = TINY.simulator(TINY.prior.sample((1,)))
    calls = (
        lambda: posterior.refine(TINY.log_likelihood, x, 20),
        lambda: refine(posterior, TINY.log_likelihood, x, 20),
    )
    for call in calls:
        with pytest.warns(UnreliableWeights) as seen:
            call()
        assert seen[0].filename == __file__


def test_data_unlike_training_are_warned_of_at_the_users_line(
    posterior: SlotPosterior,
) -> None:
    x = torch.full((TINY.num_data,), 100.0)
    calls = (
        lambda: posterior.sample((30,), x),
        lambda: posterior.catalogue(x, num_samples=30),
        lambda: posterior.to_datatree(30, x),
    )
    for call in calls:
        with pytest.warns(UnlikeTrainingWarning) as seen:
            call()
        assert seen[0].filename == __file__
