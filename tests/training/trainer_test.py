"""Appending simulations: any numbers, and which proposals are taken."""

import pickle
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sbi.inference import NPE_A
from sbi.utils import RestrictedPrior, get_density_thresholder
from torch import Tensor
from trained import SilentTracker

from sbi_slotflow import (
    AdditiveSimulator,
    SlotNPE,
    SlotPosterior,
    WhiteNoise,
    problems,
    slot_nn,
)
from sbi_slotflow.posterior.truncated import TruncatedPrior
from sbi_slotflow.seeding import generator_for

LINEAR = problems.linear_gaussian()
ONE_EPOCH: dict[str, Any] = {"max_num_epochs": 1, "training_batch_size": 100}


def simulations(num: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    theta = LINEAR.prior.sample((num,), generator_for(seed))
    return theta, LINEAR.simulator(theta, generator_for(seed, 1))


def trainer() -> SlotNPE:
    return SlotNPE(
        LINEAR.prior,
        slot_nn(LINEAR, hidden_features=8, flow_layers=1),
        tracker=SilentTracker(),
        show_progress_bars=False,
    )


@pytest.fixture(name="trained")
def _trained() -> tuple[SlotNPE, SlotPosterior]:
    """A trainer after one short round, and its posterior of one observation."""
    torch.manual_seed(0)
    inference, (theta, x) = trainer(), simulations()
    inference.append_simulations(theta, x).train(**ONE_EPOCH)
    return inference, inference.build_posterior().set_default_x(x[0])


@pytest.mark.parametrize("kind", ["float64", "numpy", "integers", "list"])
def test_simulations_may_be_any_numbers(kind: str) -> None:
    theta, x = simulations(50)
    whole = x.round()
    given = {
        "float64": (theta.double(), whole.double()),
        "numpy": (theta.numpy().astype("f8"), whole.numpy().astype(">f4")),
        "integers": (theta, whole.long()),
        "list": (theta.tolist(), whole.tolist()),
    }[kind]
    inference = trainer().append_simulations(*given)
    kept_theta, kept_x, _ = inference.get_simulations()
    assert torch.equal(kept_theta, theta)
    assert torch.equal(kept_x, whole)
    assert kept_theta.dtype == kept_x.dtype == torch.float32


def test_malformed_simulations_are_named() -> None:
    theta, x = simulations(50)
    with pytest.raises(ValueError, match=r"got \(50, 7\) and \(49, 6\)"):
        trainer().append_simulations(theta, x[1:])
    with pytest.raises(ValueError, match=r"got \(50, 7\) and \(50,\)"):
        trainer().append_simulations(theta, x[:, 0])
    with pytest.raises(TypeError, match="x must hold real numbers"):
        trainer().append_simulations(theta, np.array(["a"] * 50))


@pytest.mark.parametrize("own", [True, False], ids=["ours", "of sbi"])
def test_a_truncated_round_trains_by_the_first_rounds_loss(
    trained: tuple[SlotNPE, SlotPosterior], own: bool
) -> None:
    inference, posterior = trained
    if own:
        proposal = posterior.truncated_prior(quantile=0.05, num_draws=1_000)
    else:
        inside = get_density_thresholder(posterior, 0.05, 1_000)
        proposal = RestrictedPrior(LINEAR.prior, inside)
    theta = proposal.sample(torch.Size((200,)))
    x = LINEAR.simulator(theta, generator_for(5))
    before = posterior.posterior_estimator.state_dict()
    inference.append_simulations(theta, x, proposal=proposal)
    inference.train(force_first_round_loss=True, **ONE_EPOCH)
    again = inference.build_posterior()
    after = again.posterior_estimator.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    draws = again.sample((100,), x=x[0])
    assert torch.isfinite(again.log_prob(draws, x=x[0])).all()
    # both rounds are used: as many rows as were appended
    assert len(inference.get_simulations()[0]) == 600


@pytest.mark.parametrize("round_", [1, 2])
def test_other_proposals_are_refused_by_name(
    trained: tuple[SlotNPE, SlotPosterior], round_: int
) -> None:
    inference, posterior = trained
    inference = inference if round_ == 2 else trainer()
    other = LINEAR.prior.with_cardinality([1, 2, 3, 4])
    foreign = posterior.with_prior(other).truncated_prior(
        posterior.default_x, 0.05, num_draws=1_000
    )
    theta, x = simulations(50)
    for proposal, name in (
        (posterior, "SlotPosterior"),
        (other, "another VariableKPrior"),
        (foreign, "a truncated prior of another"),
        (torch.distributions.Normal(0.0, 1.0), "Normal"),
    ):
        with pytest.raises(
            NotImplementedError, match=rf"got {name}.*posterior\.truncated_prior\(x\)"
        ) as caught:
            inference.append_simulations(theta, x, proposal=proposal)  # type: ignore
        assert "\n" not in str(caught.value)
    assert inference.append_simulations(theta, x, proposal=LINEAR.prior) is inference


def test_npe_a_is_refused_by_name() -> None:
    theta, x = simulations(100)
    inference = NPE_A(
        LINEAR.prior,
        density_estimator=slot_nn(LINEAR),
        tracker=SilentTracker(),
        show_progress_bars=False,
    )
    with pytest.raises(NotImplementedError, match="NPE_A needs a mixture of Gaussians"):
        inference.append_simulations(theta, x).train(max_num_epochs=1)


def test_a_truncated_prior_is_pickled(trained: tuple[SlotNPE, SlotPosterior]) -> None:
    _, posterior = trained
    truncated = posterior.truncated_prior(quantile=0.05, num_draws=1_000)
    again = pickle.loads(pickle.dumps(truncated))
    assert isinstance(again, TruncatedPrior)
    rows = [one.sample((20,), generator_for(1)) for one in (truncated, again)]
    assert torch.equal(*rows)


@pytest.mark.slow
def test_a_truncated_round_brings_the_posterior_nearer_to_the_exact_one() -> None:
    """Mean divergence from the closed form at the observations.

    Signals are 25 times the noise, so that the region is about 1 % of the prior. Seen
    were, after one round of 1,000 and after a truncated one of 1,000 more: 0.74 and
    0.26 (six observations), 3.8 and 1.2 (two); another round from the prior gave 0.49
    and 1.0.
    """
    torch.manual_seed(0)
    base = problems.linear_gaussian(1)
    simulator = AdditiveSimulator(
        base.simulator.component_signal, WhiteNoise(0.02), base.layout
    )
    problem = replace(base, simulator=simulator, sigma=0.02)
    prior, exact = problem.prior, problem.exact_posterior()
    network = slot_nn(
        problem,
        hidden_features=32,
        flow_layers=2,
        flow_hidden_features=32,
        trunk_features=32,
    )
    theta = prior.sample((1_000,))
    inference = SlotNPE(
        prior, network, tracker=SilentTracker(), show_progress_bars=False
    ).append_simulations(theta, simulator(theta))
    observed = simulator(prior.with_cardinality([0, 1]).sample((2,)))
    options: dict[str, Any] = {
        "training_batch_size": 100,
        "stop_after_epochs": 15,
        "max_num_epochs": 100,
    }
    inference.train(**options)
    first = inference.build_posterior()

    def second_round(proposal: TruncatedPrior) -> SlotPosterior:
        torch.manual_seed(1)
        again = deepcopy(inference, {id(prior): prior})
        theta = proposal.sample((1_000,))
        again.append_simulations(theta, simulator(theta), proposal=proposal)
        again.train(force_first_round_loss=True, **options)
        return again.build_posterior()

    def divergence(posterior: SlotPosterior, x: Tensor) -> float:
        draws = exact.sample((4_000,), x=x, generator=generator_for(1))
        return float((exact.log_prob(draws, x) - posterior.log_prob(draws, x)).mean())

    before = sum(divergence(first, x) for x in observed)
    after = sum(divergence(second_round(first.truncated_prior(x)), x) for x in observed)
    assert after < 0.6 * before
