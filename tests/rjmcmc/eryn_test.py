"""Eryn's sampler against known answers.

Walkers start as independent draws from the target, and many walkers make few steps:
whatever a move does wrong then shows in the walkers' distribution, and the walkers of
the last step are nearly independent. Each statistical test rejects at p < 1e-4, its
false-alarm rate.
"""

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch.distributions import Independent, Normal
from trained import linear_gaussian_posterior

from sbi_slotflow import (
    AdditiveSimulator,
    MultiClassPrior,
    SlotPosterior,
    WhiteNoise,
    problems,
    slot_nn,
)
from sbi_slotflow.posterior.component_proposals import PriorComponents
from sbi_slotflow.posterior.convergence import NotConverged
from sbi_slotflow.problems.base import Problem
from sbi_slotflow.problems.linear_gaussian import LinearGaussian
from sbi_slotflow.problems.sinusoids.polar import PolarChart
from sbi_slotflow.seeding import generator_for

pytest.importorskip("eryn")

from sbi_slotflow.rjmcmc.eryn_bridge import eryn_sampler
from sbi_slotflow.rjmcmc.eryn_moves import (
    ComponentStretchMove,
    SlotFlowMove,
    leaf_limits,
    require_eryn,
)

gaussian = problems.linear_gaussian()
exact = gaussian.exact_posterior()
tiny = problems.sinusoids("tiny")
WEIGHTS = [0.4, 0.3, 0.2, 0.1]


@dataclass(frozen=True)
class PriorOnly(Problem):
    """Sinusoids of which nothing was observed."""

    def log_likelihood(self, theta, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.zeros(theta.shape[:-1], dtype=torch.float64)

    def build_chart(self):
        return PolarChart(self.prior.component_marginals, frequency=2)


def prior_only(preset: Any = "tiny", weights=WEIGHTS) -> PriorOnly:
    problem = problems.sinusoids(preset)
    weights = weights + [0.0] * (problem.prior.max_cardinality + 1 - len(weights))
    prior = problem.prior.with_cardinality(weights)
    return PriorOnly("prior only", prior, problem.simulator)


def observation(problem, seed: int = 3) -> torch.Tensor:
    generator = generator_for(seed)
    return problem.simulator(problem.prior.sample((1,), generator), generator)[0]


def last_rows(draws) -> torch.Tensor:
    return draws.theta[:, -1]


def cardinality_p_value(problem, rows, probs) -> float:
    counts = problem.layout.cardinality(rows).bincount(minlength=len(probs)).numpy()
    assert not counts[probs == 0].any()
    counts, probs = counts[probs > 0], probs[probs > 0].astype(np.float64)
    return chisquare(counts, probs / probs.sum() * counts.sum()).pvalue


def test_the_prior_comes_back_without_data():
    # p(K) is neither flat nor free of K = 0, the separation's constant depends on K,
    # and a second branch of one leaf holds sigma.
    problem = prior_only()
    sampler = eryn_sampler(
        problem, observation(tiny), num_walkers=600, num_temperatures=2, seed=1
    )
    rows = last_rows(sampler.run(25))
    probs = problem.prior.cardinality_probs.numpy()
    assert cardinality_p_value(problem, rows, probs) > 1e-4
    assert problem.prior.support.check(rows).all()
    assert torch.equal(rows, problem.layout.canonical(rows))
    parts = problem.layout.unpack(rows)
    assert kstest(parts.shared[:, 0], "uniform", (0.1, 0.9)).pvalue > 1e-4
    # one component of each row: those of one row depend on each other
    reference = problem.prior.sample((20_000,), generator_for(9))
    for k in (1, 3):
        ours = rows[rows[:, 0] == k]
        theirs = reference[reference[:, 0] == k]
        for column in range(2, 2 + 3 * k):
            assert kstest(ours[:, column], theirs[:, column].numpy()).pvalue > 1e-4


def test_log_uniform_amplitudes_keep_their_prior():
    problem = prior_only("crowded")
    x = torch.zeros(problem.num_data)
    sampler = eryn_sampler(problem, x, num_walkers=600, num_temperatures=1, seed=2)
    rows = last_rows(sampler.run(20))
    ours = rows[rows[:, 0] > 0][:, 2].log()
    low, high = np.log(0.05), np.log(1.5)
    assert kstest(ours, "uniform", (low, high - low)).pvalue > 1e-4


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "tilted"])
def test_cardinality_posterior_is_exact(weights):
    # Without shared parameters K = 0 has no leaf at all, and Eryn its own prior there.
    problem = gaussian
    if weights:
        prior = gaussian.prior.with_cardinality(weights)
        problem = LinearGaussian(**{**gaussian.__dict__, "prior": prior})
    posterior, x = problem.exact_posterior(), observation(gaussian)
    sampler = eryn_sampler(
        problem,
        x,
        "slotflow",
        posterior=posterior,
        num_walkers=600,
        num_temperatures=2,
    )
    rows = last_rows(sampler.run(20))
    probs = posterior.cardinality(x).probs.numpy()
    assert cardinality_p_value(problem, rows, probs) > 1e-4
    reference = posterior.sample((20_000,), x, k=1)
    ours = rows[rows[:, 0] == 1]
    for column in (1, 2):
        assert kstest(ours[:, column], reference[:, column].numpy()).pvalue > 1e-4


@pytest.mark.parametrize("update_share", [0.0, 0.5])
def test_births_from_a_hand_made_density_keep_the_posterior(update_share):
    # A density that is neither the prior's nor the posterior's, another for each K.
    @dataclass(frozen=True)
    class HandMade:
        normal: Independent

        def sample_component(self, n, generator):
            noise = torch.randn(n, 2, generator=generator)
            return self.normal.mean + self.normal.stddev * noise

        def log_prob_component(self, components):
            return self.normal.log_prob(components)

    proposals = [
        HandMade(Independent(Normal(torch.tensor([1.5 - 0.3 * k, 0.1 * k]), 0.7), 1))
        for k in range(3)
    ]
    move = SlotFlowMove(
        proposals, *leaf_limits(gaussian.prior), update_share=update_share
    )
    x = observation(gaussian)
    sampler = eryn_sampler(
        gaussian,
        x,
        "slotflow",
        posterior=exact,
        moves=[move],
        num_walkers=600,
        num_temperatures=1,
    )
    rows = last_rows(sampler.run(25))
    probs = exact.cardinality(x).probs.numpy()
    assert cardinality_p_value(gaussian, rows, probs) > 1e-4
    reference = exact.sample((20_000,), x, k=1)
    ours = rows[rows[:, 0] == 1]
    for column in (1, 2):
        assert kstest(ours[:, column], reference[:, column].numpy()).pvalue > 1e-4


def test_the_target_is_the_set_density_less_the_labellings():
    problem = tiny
    x = observation(problem)
    sampler = eryn_sampler(problem, x, num_temperatures=2, num_walkers=30)
    state: Any = sampler._state
    # leaves out of use anywhere between those in use
    order = np.random.default_rng(0).permuted(
        np.broadcast_to(np.arange(3), (2, 30, 3)), axis=-1
    )
    coords = dict(state.branches_coords)
    inds = dict(state.branches_inds)
    coords["components"] = np.take_along_axis(
        coords["components"], order[..., None], axis=2
    )
    inds["components"] = np.take_along_axis(inds["components"], order, axis=2)
    coords["components"][~inds["components"]] = 7.0
    rows = problem.prior.sample((60,), generator_for(0)).reshape(2, 30, -1)
    k = problem.layout.cardinality(rows)
    log_prior = sampler.sampler.compute_log_prior(coords, inds)
    expected = problem.prior.log_prob(rows.double()) - torch.lgamma(k + 1.0)
    np.testing.assert_allclose(log_prior, expected, rtol=0, atol=1e-6)
    log_like, _ = sampler.sampler.compute_log_like(coords, inds, logp=log_prior)
    expected = problem.log_likelihood(rows, x)
    np.testing.assert_allclose(log_like, expected, rtol=1e-8, atol=1e-5)


def test_the_empty_model_has_its_likelihood():
    # Without leaves Eryn does not call the likelihood.
    x = observation(gaussian)
    sampler = eryn_sampler(gaussian, x, num_temperatures=1, num_walkers=30)
    state: Any = sampler._state
    coords, inds = state.branches_coords, state.branches_inds
    inds["components"][:] = False
    log_prior = sampler.sampler.compute_log_prior(coords, inds)
    assert np.all(log_prior == 0)
    log_like, _ = sampler.sampler.compute_log_like(coords, inds, logp=log_prior)
    expected = gaussian.log_likelihood(torch.zeros(gaussian.layout.size), x)
    np.testing.assert_allclose(log_like, expected.item())


def test_stretches_have_their_density():
    # 500 walkers of one component go towards one of the 500 that stand still
    move = ComponentStretchMove(a=3.0)
    before = np.random.default_rng(0).normal(size=(1, 1_000, 1, 3))
    inds = {"components": np.ones((1, 1_000, 1), dtype=bool)}
    random = np.random.RandomState(1)
    found, factors = move.get_proposal({"components": before}, random, inds)
    moved = np.isfinite(factors[0])
    assert moved.sum() == 500
    z = np.exp(factors[0, moved] / 2)
    old, new, still = (
        rows[0, chosen, 0]
        for rows, chosen in (
            (before, moved),
            (found["components"], moved),
            (before, ~moved),
        )
    )
    centre = (new - z[:, None] * old) / (1 - z[:, None])
    away = np.abs(centre[:, None] - still).max(-1).min(-1)
    assert (away < 1e-6).all()
    # g(z) is proportional to z^(-1/2) on [1/a, a]
    low, high = 3**-0.5, 3**0.5
    assert kstest((np.sqrt(z) - low) / (high - low), "uniform").pvalue > 1e-4


def test_phases_are_periodic_in_every_move():
    problem = tiny
    sampler = eryn_sampler(problem, observation(problem), num_walkers=6)
    for move in [*sampler.sampler.moves, *sampler.sampler.rj_moves]:
        assert move.periodic.inds_periodic["components"].tolist() == [1]
        assert len(move.periodic.inds_periodic["shared"]) == 0
        np.testing.assert_allclose(move.periodic.periods["components"], 2 * np.pi)


@pytest.mark.parametrize("start", ["prior", "truth", "slotflow"])
def test_a_seeded_run_repeats_and_leaves_no_trace(start):
    x = observation(gaussian)
    theta = torch.tensor([1.0, 1.5, 0.2, 0.0, 0.0, 0.0, 0.0])

    def run(seed: int) -> torch.Tensor:
        np.random.seed(seed + 5)  # noqa: NPY002
        before: Any = np.random.get_state()  # noqa: NPY002
        sampler = eryn_sampler(
            gaussian,
            x,
            start,
            theta=theta,
            posterior=exact,
            num_walkers=6,
            num_temperatures=3,
            seed=seed,
        )
        first = sampler.run(6, burn_in=3, thin=2)
        assert first.theta.shape == (6, 3, 7)
        rows = torch.cat([first.theta, sampler.run(2).theta], dim=1)
        after: Any = np.random.get_state()  # noqa: NPY002
        assert np.array_equal(before[1], after[1])
        assert before[2:] == after[2:]
        return rows

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def untrained() -> SlotPosterior:
    theta = gaussian.prior.sample((64,), generator_for(0))
    x = gaussian.simulator(theta, generator_for(1))
    posterior = SlotPosterior(slot_nn(gaussian)(theta, x), gaussian.prior)
    with torch.no_grad():  # slots that differ
        for p in posterior.posterior_estimator.component_head.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator_for(2)))
    return posterior


def test_slots_of_a_wrong_network_keep_the_posterior():
    posterior, x = untrained(), observation(gaussian)
    sampler = eryn_sampler(
        gaussian,
        x,
        "slotflow",
        posterior=exact,
        moves=[SlotFlowMove.from_posterior(posterior, x)],
        num_walkers=600,
        num_temperatures=1,
    )
    rows = last_rows(sampler.run(20))
    probs = exact.cardinality(x).probs.numpy()
    assert cardinality_p_value(gaussian, rows, probs) > 1e-4


@pytest.mark.slow
def test_trained_slots_keep_the_posterior():
    # The likelihood is weak, so that births from the prior are accepted as often as
    # from the slots: 0.40 both. 60,000 correlated draws put the total variation near
    # 0.003; 0.02 is far out.
    posterior, x = linear_gaussian_posterior(), observation(gaussian)
    sampler = eryn_sampler(
        gaussian,
        x,
        "slotflow",
        posterior=posterior,
        moves=[SlotFlowMove.from_posterior(posterior, x, update_share=0.0)],
        num_walkers=200,
        num_temperatures=1,
    )
    draws = sampler.run(300, burn_in=50)
    error = draws.cardinality().probs - exact.cardinality(x).probs
    assert 0.5 * error.abs().sum() < 0.02
    assert sampler.sampler.rj_moves[0].acceptance_fraction.mean() > 0.3


def test_bad_arguments_are_named():
    x = observation(gaussian)
    short: Any = {"num_walkers": 4, "num_temperatures": 1}
    with pytest.raises(TypeError, match="problem must be a Problem"):
        eryn_sampler(exact, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="x must be one observation of length 6"):
        eryn_sampler(gaussian, torch.zeros(2, 6))
    with pytest.raises(ValueError, match="x must be finite"):
        eryn_sampler(gaussian, torch.full((6,), torch.nan))
    with pytest.raises(ValueError, match="start must be"):
        eryn_sampler(gaussian, x, "somewhere")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="theta must be given"):
        eryn_sampler(gaussian, x, "truth")
    with pytest.raises(ValueError, match="posterior must be given"):
        eryn_sampler(gaussian, x, "slotflow")
    with pytest.raises(ValueError, match="num_walkers must be at least 2, got 1"):
        eryn_sampler(gaussian, x, num_walkers=1)
    outside = tiny.prior.sample((1,), generator_for(0))[0]
    outside[1] = 5.0
    with pytest.raises(ValueError, match="in the prior's support"):
        eryn_sampler(tiny, observation(tiny), "truth", theta=outside)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        eryn_sampler(gaussian, x, **short).run(0)
    gap = gaussian.prior.with_cardinality([0.5, 0.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"consecutive.*K = \[0, 2\]"):
        leaf_limits(gap)
    limits = leaf_limits(gaussian.prior)
    with pytest.raises(TypeError, match="sample_component"):
        SlotFlowMove(exact, *limits)  # pyright: ignore[reportArgumentType]
    proposal = PriorComponents(gaussian.prior.component)
    with pytest.raises(ValueError, match=r"K = 1\.\.3, got 2"):
        SlotFlowMove([proposal, proposal], *limits)
    with pytest.raises(ValueError, match="update_share must lie in"):
        SlotFlowMove(proposal, *limits, update_share=1.0)
    with pytest.raises(ValueError, match="entry for branch 'pulsars'"):
        SlotFlowMove(proposal, *limits, branch="pulsars")
    with pytest.raises(TypeError, match="posterior must be a Posterior"):
        SlotFlowMove.from_posterior(gaussian, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="prior_share must lie in"):
        SlotFlowMove.from_posterior(untrained(), x, prior_share=0.0)


def test_a_missing_eryn_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "eryn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "eryn", None)
    with pytest.raises(ImportError, match=r"pip install sbi-slotflow\[rjmcmc\]"):
        require_eryn()


# convergence, files


def test_walkers_that_still_drift_are_told():
    x = observation(tiny)
    sampler = eryn_sampler(tiny, x, num_walkers=6, num_temperatures=2)
    with pytest.warns(NotConverged, match="R-hat of"):
        draws = sampler.run(20)
    assert not draws.converged
    assert set(draws.acceptance) == {"in model", "between models"}
    assert all(0 <= share <= 1 for share in draws.acceptance.values())


@pytest.mark.filterwarnings("ignore::sbi_slotflow.posterior.convergence.NotConverged")
@pytest.mark.parametrize("problem", [tiny, gaussian], ids=["shared", "none shared"])
def test_a_file_keeps_the_steps_and_a_run_goes_on_from_it(problem, tmp_path):
    x, path = observation(problem), tmp_path / "chain.h5"
    options: dict[str, Any] = {"num_walkers": 6, "num_temperatures": 2}
    alone = eryn_sampler(problem, x, seed=1, **options).run(10)
    first = eryn_sampler(problem, x, seed=1, backend=path, **options)
    draws = first.run(10)
    assert torch.equal(draws.theta, alone.theta)
    again = eryn_sampler(problem, x, seed=1, backend=path, **options)
    assert torch.equal(again._cold_rows(), draws.theta[:, -1])
    after = again.run(5)
    assert after.theta.shape == (6, 5, problem.layout.size)
    # not the numbers of the first steps once more
    assert not torch.equal(after.theta, draws.theta[:, :5])
    kept = eryn_sampler(problem, x, backend=str(path), **options).sampler
    assert kept.iteration == 15
    assert kept.get_chain()["components"].shape[:3] == (15, 2, 6)


def two_classes(shared: bool) -> Problem:
    """Lines and bursts of which nothing was observed, one of them at most two."""
    made = problems.lines_and_bursts()
    names = made.prior.classes
    classes = {
        "line": names["line"].with_cardinality([0.1, 0.4, 0.2, 0.3]),
        "burst": names["burst"].with_cardinality([0.3, 0.5, 0.2]),
    }
    options: dict[str, Any] = {}
    if shared:
        options = {"shared": made.prior.shared, "shared_names": ("sigma",)}
    prior = MultiClassPrior(classes, **options)
    signals: Any = made.simulator.component_signal
    noise = WhiteNoise() if shared else WhiteNoise(1.0)
    simulator = AdditiveSimulator(
        dict(zip(("line", "burst"), signals.signals, strict=True)), noise, prior.layout
    )
    return NothingSeen("classes", prior, simulator)


class NothingSeen(Problem):
    """Components of several classes whose likelihood is flat."""

    def log_likelihood(self, theta, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.zeros(theta.shape[:-1], dtype=torch.float64)


@pytest.mark.parametrize("shared", [True, False])
def test_the_prior_of_classes_comes_back(shared: bool) -> None:
    problem: Any = two_classes(shared)
    x = torch.zeros(problem.num_data)
    sampler = eryn_sampler(problem, x, num_walkers=600, num_temperatures=1, seed=3)
    rows = last_rows(sampler.run(25))
    counts = problem.layout.counts(rows)
    seen = torch.zeros(4, 3).index_put(
        tuple(counts.long().unbind(-1)), torch.ones(len(rows)), accumulate=True
    )
    probs = problem.prior.log_joint.exp()
    expected = (probs / probs.sum() * len(rows)).flatten().numpy()
    assert chisquare(seen.flatten().numpy(), expected).pvalue > 1e-4
    assert problem.prior.support.check(rows).all()
    reference = problem.prior.sample((5_000,), generator_for(9))
    layout, names = problem.layout, problem.layout.class_names
    for name in names:
        ours, theirs = (layout.view(r, name) for r in (rows, reference))
        ours, theirs = ours[ours[:, 0] == 1], theirs[theirs[:, 0] == 1]
        for column in range(1, 1 + layout.of_class(name).num_component_params):
            assert kstest(ours[:, column], theirs[:, column].numpy()).pvalue > 1e-4


def test_leaves_of_classes_have_the_likelihood_of_their_row() -> None:
    problem = problems.lines_and_bursts()
    x = problem.simulator(problem.prior.sample((1,), generator_for(4)))[0]
    sampler = eryn_sampler(problem, x, num_walkers=8, num_temperatures=2, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # three steps have not converged
        rows = sampler.run(3).theta[:, -1]
    expected = problem.log_likelihood(rows.double(), x)
    found = torch.from_numpy(sampler.sampler.get_last_sample().log_like[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.1)


def test_births_of_a_class_come_from_a_posterior() -> None:
    problem = problems.lines_and_bursts()
    theta = problem.prior.sample((32,), generator_for(6))
    x = problem.simulator(theta, generator_for(7))
    posterior = SlotPosterior(slot_nn(problem)(theta, x), problem.prior)
    options: dict[str, Any] = {"num_samples": 200, "seed": 1}
    moves = [
        SlotFlowMove.from_posterior(posterior, x[0], branch=name, **options)
        for name in ("line", "burst")
    ]
    sampler = eryn_sampler(
        problem, x[0], moves=moves, num_walkers=8, num_temperatures=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two steps have not converged
        rows = sampler.run(2).theta
    assert problem.prior.support.check(rows).all()
    with pytest.raises(ValueError, match="branch must be one of"):
        SlotFlowMove.from_posterior(posterior, x[0], **options)


def test_changes_of_k_are_counted_from_where_draws_are_kept() -> None:
    problem, x = prior_only(), torch.zeros(tiny.num_data)
    sampler = eryn_sampler(problem, x, num_walkers=40, num_temperatures=1, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten steps have not converged
        first, second = sampler.run(10, burn_in=5), sampler.run(10)
    jumps = [draws.diagnostics.jumps or 0 for draws in (first, second)]
    # Nothing speaks against a birth but a least separation.
    assert all(100 < jump <= 400 for jump in jumps)
    shares = second.diagnostics.acceptance["between models"]
    assert shares * 20 * 40 == pytest.approx(sum(jumps))
