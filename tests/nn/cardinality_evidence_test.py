"""p(K | x) from the evidence of sets of cells, beside the exact one."""

import math
from typing import Any

import pytest
import torch

from sbi_slotflow import SlotPosterior, VariableKPrior, problems, rjmcmc, slot_nn
from sbi_slotflow.nn.cardinality_evidence import CardinalityEvidence

SMALL: dict[str, Any] = {"hidden_features": 16, "flow_layers": 0}


def untrained(problem: Any, **options: Any) -> SlotPosterior:
    """A posterior whose classifier knows nothing."""
    torch.manual_seed(0)
    theta = problem.prior.sample((64,), torch.Generator().manual_seed(0))
    x = problem.simulator(theta, torch.Generator().manual_seed(1))
    estimator = slot_nn(problem, **SMALL | options)(theta, x)
    return SlotPosterior(estimator, problem.prior)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_the_exact_one_where_laplace_is(seed: int) -> None:
    """Pulses of unknown noise level, from a network that was never trained."""
    problem = problems.spikes(num_samples=128, max_cardinality=2)
    posterior = untrained(problem)
    theta = problem.prior.sample((1,), torch.Generator().manual_seed(10 + seed))
    x = problem.simulator(theta, torch.Generator().manual_seed(seed))[0]
    found = posterior.with_evidence(0.98).cardinality(x).probs.double()
    exact = rjmcmc.collapsed(problem, x, num_draws=400, burn_in=1_000)
    assert exact.diagnostics is not None
    assert exact.diagnostics.converged
    truth = exact.cardinality().probs.double().flatten()
    # The classifier, which knows nothing, keeps two in a hundred.
    assert 0.5 * float((found - truth).abs().sum()) < 0.1
    network = posterior.cardinality(x).probs.double()
    assert 0.5 * float((network - truth).abs().sum()) > 0.15


def test_it_integrates_the_noise_level() -> None:
    """Against quadrature, for a residual of T - d chi-squared numbers."""
    posterior = untrained(problems.spikes(num_samples=128, max_cardinality=2))
    estimator = posterior.posterior_estimator
    evidence = estimator._evidence(torch.zeros(1, 128))
    assert isinstance(evidence, CardinalityEvidence)
    sigma = torch.linspace(0.1, 0.5, 20_001, dtype=torch.float64)
    differences = []
    for size, level in ((0, 0.3), (3, 0.29), (6, 0.11), (0, 0.101), (3, 0.6)):
        v, num = level**2, 128 - size
        log_f = -num * sigma.log() - 128 * v / (2 * sigma**2) + math.log(1 / 0.4)
        exact = log_f.logsumexp(0) + (sigma[1] - sigma[0]).log()
        # Beside what the evidence holds: v^(-T/2) and v^(d/2) of the volume.
        known = -0.5 * num * math.log(v)
        log_level = torch.tensor([math.log(level)], dtype=torch.float64)
        found = evidence._log_noise(log_level, torch.tensor(size), torch.tensor(128))[0]
        found = found + known
        differences.append(float(found - exact))
    # Up to one constant; three deviations beyond a bound the tail is roughly right.
    for difference in differences[1:4]:
        assert difference == pytest.approx(differences[0], abs=0.05)
    assert differences[4] == pytest.approx(differences[0], abs=2.0)


def test_another_prior_of_k_weighs_the_evidence() -> None:
    problem = problems.spikes(num_samples=128, max_cardinality=2)
    posterior = untrained(problem).with_evidence(0.98)
    theta = problem.prior.sample((1,), torch.Generator().manual_seed(3))
    x = problem.simulator(theta, torch.Generator().manual_seed(4))[0]
    before = posterior.cardinality(x).probs.double()
    after = posterior.with_cardinality_prior([1.0, 2.0, 4.0])
    assert after.by_evidence == 0.98
    expected = before * torch.tensor([1.0, 2.0, 4.0])
    found = after.cardinality(x).probs.double()
    # The classifier's share is weighed too, before it is added.
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.02)


def test_a_posterior_stays_as_it_was() -> None:
    problem = problems.spikes(num_samples=64, max_cardinality=1)
    posterior = untrained(problem)
    weighed = posterior.with_evidence()
    assert weighed.by_evidence == 0.9
    assert not posterior.by_evidence
    x = problem.simulator(problem.prior.sample((3,)))
    both = weighed.cardinality(x).probs
    for i in range(3):
        one = weighed.cardinality(x[i]).probs
        torch.testing.assert_close(one, both[i], rtol=1e-3, atol=1e-4)


def test_the_share_of_the_evidence_mixes_it_with_the_classifier() -> None:
    problem = problems.spikes(num_samples=64, max_cardinality=1)
    posterior = untrained(problem)
    x = problem.simulator(problem.prior.sample((1,)))[0]
    network = posterior.cardinality(x).probs
    whole = posterior.with_evidence(1.0).cardinality(x).probs
    half = posterior.with_evidence(0.5).cardinality(x).probs
    torch.testing.assert_close(half, 0.5 * (network + whole))
    none = posterior.with_evidence(0.0).cardinality(x).probs
    torch.testing.assert_close(none, network)
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]"):
        posterior.with_evidence(1.5)


def test_a_network_without_sets_of_cells_has_none() -> None:
    low, high = torch.zeros(1), torch.ones(1)
    prior = VariableKPrior(torch.distributions.Uniform(low, high), [1.0, 1.0])
    estimator = slot_nn(prior)(prior.sample((4,)), torch.randn(4, 5))
    with pytest.raises(TypeError, match="weighs no sets of cells"):
        SlotPosterior(estimator, prior).with_evidence()
    with pytest.raises(ValueError, match="by_evidence needs"):
        estimator.given(torch.randn(1, 5), by_evidence=1.0)
