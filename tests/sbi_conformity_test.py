"""sbi's own tools, unmodified, on our objects."""

import pickle
from typing import Any

import pytest
import torch
from sbi.diagnostics import check_sbc, check_tarp, run_sbc, run_tarp
from sbi.inference import (
    NPE,
    DirectPosterior,
    EnsemblePosterior,
    ImportanceSamplingPosterior,
    simulate_for_sbi,
)
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import (
    CausalCNNEmbedding,
    CNNEmbedding,
    FCEmbedding,
    PermutationInvariantEmbedding,
    TransformerEmbedding,
)
from sbi.utils.user_input_checks import (
    check_sbi_inputs,
    process_prior,
    process_simulator,
)
from trained import SilentTracker, linear_gaussian_posterior

from sbi_slotflow import SlotNPE, SlotPosterior, calibration, problems, slot_nn

linear = problems.linear_gaussian()
tiny = problems.sinusoids("tiny")


def simulations(problem, num=400):
    theta = problem.prior.sample((num,))
    return theta, problem.simulator(theta)


@pytest.fixture(scope="module")
def posterior():
    return linear_gaussian_posterior()


@pytest.fixture(scope="module")
def npe():
    torch.manual_seed(0)
    trainer = NPE(
        linear.prior,
        density_estimator=slot_nn(linear),
        tracker=SilentTracker(),
        show_progress_bars=False,
    )
    theta, x = simulations(linear)
    trainer.append_simulations(theta, x).train(max_num_epochs=2)
    return trainer


@pytest.mark.parametrize("problem", [linear, tiny], ids=lambda p: p.name)
def test_npe_trains_and_its_posterior_samples(problem):
    trainer = NPE(
        problem.prior,
        density_estimator=slot_nn(problem),
        tracker=SilentTracker(),
        show_progress_bars=False,
    )
    theta, x = simulations(problem)
    estimator = trainer.append_simulations(theta, x).train(max_num_epochs=1)
    posterior = trainer.build_posterior(estimator)
    assert type(posterior) is DirectPosterior
    draws = posterior.sample((50,), x=x[0], show_progress_bars=False)
    assert problem.prior.support.check(draws).all()
    batched = posterior.sample_batched((20,), x=x[:3], show_progress_bars=False)
    assert batched.shape == (20, 3, problem.layout.size)
    assert torch.isfinite(posterior.log_prob(draws, x=x[0])).all()
    assert torch.isfinite(posterior.log_prob_batched(batched, x=x[:3])).all()


def test_npe_resumes_training(npe):
    before = npe.epoch
    npe.train(resume_training=True, max_num_epochs=before + 1)
    assert npe.epoch > before


def test_npe_posterior_pickles(npe):
    posterior = pickle.loads(pickle.dumps(npe.build_posterior()))
    _, x = simulations(linear, 1)
    assert posterior.sample((5,), x=x, show_progress_bars=False).shape == (5, 7)


def test_the_report_says_what_to_build_of_an_estimator_that_sbi_trained(npe):
    with pytest.raises(TypeError, match=r"got DirectPosterior\. Build it by SlotNPE"):
        calibration.report(npe.build_posterior(), linear, 100)
    posterior = SlotPosterior(npe.build_posterior().posterior_estimator, linear.prior)
    report = calibration.report(posterior, linear, 100, num_draws=20)
    assert "sets" in report.checks


def test_slot_npe_fills_in_the_prior_and_trains_like_npe():
    trainer = SlotNPE(linear.prior, tracker=SilentTracker(), show_progress_bars=False)
    theta, x = simulations(linear)
    trainer.append_simulations(theta, x).train(max_num_epochs=1)
    posterior = trainer.build_posterior()
    assert isinstance(posterior, SlotPosterior)
    assert posterior.sample((5,), x=x[0]).shape == (5, 7)


TRANSFORMER: dict[str, Any] = {
    "feature_space_dim": 16,
    "final_emb_dimension": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}
# Embedding nets of sbi, made when asked for, and the event that each reads.
EMBEDDING_NETS = {
    "FCEmbedding": ((32,), lambda: FCEmbedding(32)),
    "CausalCNNEmbedding": (
        (32,),
        lambda: CausalCNNEmbedding((32,), pool_kernel_size=8),
    ),
    "CNNEmbedding": ((16, 16), lambda: CNNEmbedding((16, 16))),
    "CNNEmbedding, channels": (
        (2, 16, 16),
        lambda: CNNEmbedding((16, 16), in_channels=2),
    ),
    "PermutationInvariantEmbedding": (
        (12, 2),
        lambda: PermutationInvariantEmbedding(
            FCEmbedding(2, output_dim=8), trial_net_output_dim=8
        ),
    ),
    "TransformerEmbedding": ((32,), lambda: TransformerEmbedding(**TRANSFORMER)),
    "TransformerEmbedding, images": (
        (2, 16, 16),
        lambda: TransformerEmbedding(
            vit=True, image_size=16, patch_size=8, num_channels=2, **TRANSFORMER
        ),
    ),
}


@pytest.mark.parametrize("trainer_of", [NPE, SlotNPE])
@pytest.mark.parametrize("name", EMBEDDING_NETS)
def test_an_embedding_net_of_sbi_reads_its_event(name, trainer_of):
    event, make = EMBEDDING_NETS[name]

    def simulator(theta):  # a bare one: how many, in noise, of the event's shape
        noise = torch.randn(len(theta), *event)
        return theta[:, 0].reshape(-1, *[1] * len(event)) + noise

    trainer = trainer_of(
        linear.prior,
        density_estimator=slot_nn(linear.prior, encoder=make()),
        tracker=SilentTracker(),
        show_progress_bars=False,
    )
    theta = linear.prior.sample((200,))
    trainer.append_simulations(theta, simulator(theta)).train(max_num_epochs=1)
    x = simulator(theta[:3])
    posterior = trainer.build_posterior()
    draws = posterior.sample_batched((4,), x=x, show_progress_bars=False)
    assert draws.shape == (4, 3, 7)
    assert torch.isfinite(posterior.log_prob_batched(draws, x=x)).all()
    alone = posterior.log_prob(draws[:, 1], x=x[1])
    together = posterior.log_prob_batched(draws, x=x)[:, 1]
    assert torch.allclose(alone, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sample_with", ["mcmc", "vi", "rejection", "importance"])
def test_other_samplers_say_why_not(sample_with):
    trainer = SlotNPE(linear.prior, tracker=SilentTracker(), show_progress_bars=False)
    with pytest.raises(NotImplementedError, match="discrete entry and a dimension"):
        trainer.build_posterior(sample_with=sample_with)


def test_a_foreign_prior_is_refused():
    with pytest.raises(TypeError, match="prior must be a VariableKPrior, got Normal"):
        SlotNPE(torch.distributions.Normal(0.0, 1.0))  # type: ignore[arg-type]


def test_estimators_without_slots_are_refused_before_they_are_trained():
    with pytest.raises(TypeError, match=r"must build a SlotDensity.* got 'maf'"):
        SlotNPE(linear.prior, "maf")  # type: ignore[arg-type]
    trainer = SlotNPE(
        linear.prior,
        posterior_nn("mdn"),  # type: ignore[arg-type]
        tracker=SilentTracker(),
        show_progress_bars=False,
    )
    theta, x = simulations(linear, 100)
    with pytest.raises(TypeError, match="got one of MixtureDensityEstimator"):
        trainer.append_simulations(theta, x).train(max_num_epochs=1)
    with pytest.raises(TypeError, match="got one of MixtureDensityEstimator"):
        trainer.train_online(linear.simulator, num_simulations=128, num_validation=50)


def test_sbis_own_estimators_warn_that_they_draw_no_sets():
    trainer = NPE(
        linear.prior,
        density_estimator="mdn",
        tracker=SilentTracker(),
        show_progress_bars=False,
    )
    theta, x = simulations(linear, 200)
    trainer.append_simulations(theta, x).train(max_num_epochs=1)
    posterior = trainer.build_posterior()
    with (
        pytest.warns(UserWarning, match="use SlotNPE"),
        pytest.raises(RuntimeError, match="max_sampling_time"),
    ):
        posterior.sample((3,), x[0], max_sampling_time=0.2, show_progress_bars=False)


@pytest.mark.parametrize("kind", ["numpy", "double", "big-endian"])
def test_simulators_may_return_any_array_of_numbers(kind):
    def other(theta):
        x = linear.simulator(theta)
        if kind == "double":
            return x.double()
        return x.numpy().astype("f8" if kind == "numpy" else ">f4")

    weights = []
    for simulator in (linear.simulator, other):
        trainer = SlotNPE(
            linear.prior, tracker=SilentTracker(), show_progress_bars=False
        )
        trainer.train_online(simulator, num_simulations=256, num_validation=50)
        weights.append(trainer.build_posterior().posterior_estimator.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_simulators_of_the_wrong_shape_are_named():
    trainer = SlotNPE(linear.prior, tracker=SilentTracker(), show_progress_bars=False)
    with pytest.raises(
        ValueError, match=r"simulator's x must have shape \(50, \*event"
    ):
        trainer.train_online(
            lambda theta: linear.simulator(theta)[:-1],
            num_simulations=256,
            num_validation=50,
        )


@pytest.mark.parametrize("problem", [linear, tiny], ids=lambda p: p.name)
def test_prior_and_simulator_pass_sbis_checks(problem):
    prior, num_parameters, returns_numpy = process_prior(problem.prior)
    assert num_parameters == problem.layout.size
    simulator = process_simulator(problem.simulator, prior, returns_numpy)
    check_sbi_inputs(simulator, prior)
    theta, x = simulate_for_sbi(simulator, prior, 10, show_progress_bar=False)
    assert theta.shape == (10, problem.layout.size)
    assert x.shape == (10, problem.num_data)


def test_ensemble_mixes_posteriors(posterior, npe):
    other = SlotPosterior(npe.build_posterior().posterior_estimator, linear.prior)
    ensemble = EnsemblePosterior([posterior, other])
    _, x = simulations(linear, 1)
    ensemble.set_default_x(x)
    draws = ensemble.sample((40,))
    assert draws.shape == (40, 7)
    expected = torch.logaddexp(
        posterior.log_prob(draws, x), other.log_prob(draws, x)
    ) - torch.log(torch.tensor(2.0))
    torch.testing.assert_close(ensemble.log_prob(draws), expected)
    assert ensemble.sample_batched(torch.Size((10,)), x).shape == (10, 1, 7)


def test_importance_sampling_corrects_towards_the_exact_posterior(posterior):
    torch.manual_seed(5)
    _, x = simulations(linear, 1)

    def potential(theta, x_o):
        return linear.log_likelihood(theta, x_o) + linear.prior.log_prob(theta)

    sampler = ImportanceSamplingPosterior(
        potential,
        proposal=posterior.set_default_x(x),
        method="importance",
    ).set_default_x(x)
    draws, log_weights = sampler.sample((20_000,))
    weights = log_weights.double().exp()
    exact = linear.exact_posterior()
    # The mean weight estimates the evidence; 5 standard errors: false alarms < 1e-6.
    evidence = exact.log_evidence(x).exp()
    error = weights.std() / len(weights) ** 0.5
    assert (weights.mean() - evidence).abs() <= 5 * error
    share = torch.stack([weights[draws[:, 0] == k].sum() for k in range(4)])
    probs = exact.cardinality(x[0]).probs
    assert (share / share.sum() - probs).abs().max() < 0.03


def test_sbc_runs_on_set_reductions_and_ranks_are_uniform(posterior):
    torch.manual_seed(6)
    theta, x = simulations(linear, 300)
    functions = calibration.reduce_fns(linear.layout, band=(1.0, 2.0))
    ranks, draws = run_sbc(
        theta,
        x,
        posterior,
        num_posterior_samples=200,
        reduce_fns=[*functions],
        show_progress_bar=False,
    )
    assert ranks.shape == (300, len(functions))
    # Four tests at 1e-4 each: a false alarm in 2,500 runs for a perfect posterior.
    checks = check_sbc(ranks, theta, draws, num_posterior_samples=200)
    assert (checks["ks_pvals"] > 1e-4).all()


def test_sbc_ranks_of_the_exact_posterior_are_uniform():
    torch.manual_seed(7)
    theta, x = simulations(linear, 400)
    ranks, _ = run_sbc(
        theta,
        x,
        linear.exact_posterior(),  # type: ignore[arg-type]
        num_posterior_samples=199,
        reduce_fns=[*calibration.reduce_fns(linear.layout, band=(1.0, 2.0))],
        show_progress_bar=False,
    )
    # Mean rank 99.5, standard error 200 / sqrt(12 * 400); 4 tests at 5 sigma: 1e-6.
    assert ((ranks.mean(0) - 99.5).abs() < 5 * 200 / (12 * 400) ** 0.5).all()


def test_expected_coverage_runs(posterior):
    torch.manual_seed(8)
    theta, x = simulations(linear, 150)
    ranks, _ = run_sbc(
        theta,
        x,
        posterior,
        num_posterior_samples=100,
        reduce_fns=posterior.log_prob,
        show_progress_bar=False,
    )
    # Mean rank 50, 5 standard errors: false alarms below 1e-6.
    assert abs(ranks.mean() - 50) < 5 * 100 / (12 * 150) ** 0.5


def test_tarp_runs_with_the_set_distance(posterior):
    torch.manual_seed(9)
    theta, x = simulations(linear, 200)
    coverage, levels = run_tarp(
        theta,
        x,
        posterior,
        references=linear.prior.sample((200,)),
        num_posterior_samples=100,
        distance=calibration.set_distance(linear.layout, theta),
        z_score_theta=False,
        show_progress_bar=False,
    )
    area, p_value = check_tarp(coverage, levels)
    # The area's standard error is near 0.01 for 200 pairs.
    assert abs(area) < 0.06
    assert p_value > 1e-3
