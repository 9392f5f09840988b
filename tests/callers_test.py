"""Warnings point to the user's line, however deep in the package they are made."""

import pytest
import torch

from sbi_slotflow import SlotPosterior, refine, slot_nn
from sbi_slotflow.calibration import TrainingReference, UnlikeTrainingWarning
from sbi_slotflow.posterior.refine import UnreliableWeights
from sbi_slotflow.problems import sinusoids

TINY = sinusoids("tiny")


@pytest.fixture(scope="module", name="posterior")
def _posterior() -> SlotPosterior:
    theta = TINY.prior.sample((250,))
    x = TINY.simulator(theta)
    untrained = SlotPosterior(slot_nn(TINY)(theta, x), TINY.prior)
    reference = TrainingReference.fit(x, level=0.01)
    return untrained.set_training_reference(reference)


def test_unreliable_weights(posterior: SlotPosterior) -> None:
    x = TINY.simulator(TINY.prior.sample((1,)))
    calls = (
        lambda: posterior.refine(TINY.log_likelihood, x, 20),
        lambda: refine(posterior, TINY.log_likelihood, x, 20),
    )
    for call in calls:
        with pytest.warns(UnreliableWeights) as seen:
            call()
        assert seen[0].filename == __file__


def test_unlike_training(posterior: SlotPosterior) -> None:
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
