"""The collapsed sampler leaves the posterior as it is, and finds it.

The first test is that of Gandy and Scott (2020): with theta from the prior and x given
theta, theta is a draw from p(theta | x), and stays one under every valid move.
"""

import math
import warnings
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy import stats
from sine_evidence import evidence_of_none, evidence_of_one, observe, theta_row
from torch import Tensor
from torch.distributions import (
    Distribution,
    ExpTransform,
    Independent,
    Normal,
    TransformedDistribution,
    Uniform,
)

pytest.importorskip("numba")

from sbi.utils import BoxUniform, MultipleIndependent

from sbi_slotflow import VariableKPrior, problems
from sbi_slotflow.posterior.convergence import NotConverged
from sbi_slotflow.problems import Sinusoids, sinusoids
from sbi_slotflow.problems.simulator import AdditiveSimulator, WhiteNoise
from sbi_slotflow.problems.sinusoids.collapsed import CollapsedSampler
from sbi_slotflow.problems.sinusoids.grid import Grid, SineSignal
from sbi_slotflow.rjmcmc import collapsed, fixed_k

tiny = sinusoids("tiny")
MOVES = ["walk", "pair", "redraw", "birth", "death", "split", "merge", "refresh"]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values)


def weak(
    cardinality: list[float],
    amplitude: tuple[float, float],
    sigma: tuple[float, float],
    *,
    log_amplitude: bool,
    separation: float | None,
) -> Sinusoids:
    """Short records and weak tones: births and deaths are accepted often."""
    low, high = amplitude
    size: Distribution = Uniform(tensor(low), tensor(high))
    if log_amplitude:
        size = TransformedDistribution(
            Uniform(tensor(low).log(), tensor(high).log()), [ExpTransform()]
        )
    phase = Uniform(tensor(0.0), tensor(2 * math.pi))
    frequency = Uniform(tensor(0.5), tensor(2.0))
    prior = VariableKPrior(
        MultipleIndependent([size, phase, frequency], validate_args=False),
        cardinality,
        shared=BoxUniform(tensor(sigma[0]), tensor(sigma[1])),
        min_separation=separation,
        order_by=2,
        component_names=("amplitude", "phase", "frequency"),
        shared_names=("sigma",),
    )
    grids = (Grid(6.0, 5.0), Grid(1.0, 12.0))
    simulator = AdditiveSimulator(SineSignal(grids), WhiteNoise(), prior.layout)
    return Sinusoids("weak", prior, simulator, grids)


# Uneven p(K), so that a wrong factor K! or a wrong Z_K shows.
CASES: dict[str, Sinusoids] = {
    "separated": weak(
        [0.1, 0.4, 0.3, 0.2], (0.2, 1.5), (0.5, 2.0),
        log_amplitude=False, separation=0.15,
    ),
    "crowded": weak(
        [0.2, 0.1, 0.3, 0.2, 0.2], (0.1, 1.5), (0.3, 1.5),
        log_amplitude=True, separation=None,
    ),
    "tiny": tiny,
}  # fmt: skip


def summaries(problem: Sinusoids, rows: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Numbers that tell rows apart, each of the rows that have it."""
    parts = problem.layout.unpack(rows.double())
    k = parts.cardinality.numpy()
    amplitude, _, frequency = parts.components.movedim(-1, 0).numpy()
    place = (np.random.default_rng(seed).random(len(k)) * k).astype(int)
    gaps = np.diff(frequency, axis=-1)
    gaps[~parts.mask[:, 1:].numpy()] = math.inf
    return {
        "K": k,
        "sigma": parts.shared[:, 0].numpy(),
        "lowest frequency": frequency[k > 0, 0],
        "power": np.square(amplitude[k > 0]).sum(-1),
        "amplitude": amplitude[np.arange(len(k)), place][k > 0],
        "smallest gap": gaps[k > 1].min(-1),
    }


def sampler_of(problem: Sinusoids, x: Tensor) -> CollapsedSampler:
    return CollapsedSampler(problem.prior, problem.statistics(x), x)


def run_from_the_prior(
    problem: Sinusoids, num: int, moves: int
) -> tuple[dict[str, float], np.ndarray]:
    """P values of the last rows against the prior, and counts of accepted moves."""
    generator = torch.Generator().manual_seed(0)
    theta = problem.prior.sample((num,), generator)
    x = problem.simulator(theta, generator)
    last, accepted = [], np.zeros(len(MOVES), dtype=int)
    for i in range(num):
        sampler = sampler_of(problem, x[i])
        rows, counts = sampler.run(theta[i], 1, moves, np.random.default_rng([1, i]))
        last.append(rows[-1])
        accepted += counts[: len(MOVES), 1]
    found = summaries(problem, torch.stack(last), 1)
    many = problem.prior.sample((100_000,), generator)
    known = summaries(problem, many, 2)
    counts = np.bincount(found.pop("K"), minlength=problem.prior.max_cardinality + 1)
    expected = problem.prior.cardinality_probs.double().numpy()
    expected *= num / expected.sum()
    p_values = {"K": float(stats.chisquare(counts, expected)[1])}
    for name, values in found.items():
        result = cast(Any, stats.ks_2samp(values, known[name]))
        p_values[name] = float(result.pvalue)
    return p_values, accepted


@pytest.mark.parametrize(
    ("case", "num", "moves"),
    [
        ("separated", 200, 60),
        ("crowded", 150, 60),
        ("tiny", 50, 60),
        pytest.param("separated", 3_000, 300, marks=pytest.mark.slow),
        pytest.param("crowded", 3_000, 300, marks=pytest.mark.slow),
        pytest.param("tiny", 1_000, 300, marks=pytest.mark.slow),
    ],
)
def test_draws_from_the_prior_stay_so(case: str, num: int, moves: int) -> None:
    p_values, accepted = run_from_the_prior(CASES[case], num, moves)
    # false alarm in 2 of 10^6 seeds for each of 36 numbers: 7 of 10^5 in all
    assert min(p_values.values()) > 2e-6, p_values
    if case == "tiny":
        return  # loud: nothing to be born or to die
    counts = dict(zip(MOVES, accepted.tolist(), strict=True))
    assert min(counts.values()) > num / 30, counts


# p(K | x)


def with_prior(cardinality: list[float], sigma: tuple[float, float]) -> Sinusoids:
    """``tiny`` with other cardinalities and noise."""
    prior = VariableKPrior(
        tiny.prior.component,
        cardinality,
        shared=BoxUniform(tensor(sigma[0]), tensor(sigma[1])),
        min_separation=tiny.prior.min_separation,
        order_by=2,
        component_names=tiny.component_names,
        shared_names=tiny.shared_names,
    )
    return replace(tiny, prior=prior)


@pytest.mark.parametrize("seed", [0, 1])
def test_none_against_one_as_a_grid_has_it(seed: int) -> None:
    problem = with_prior([0.5, 0.5, 0.0, 0.0], (0.5, 4.0))
    x = observe(tiny, [[0.7, 1.0, 1.2]], 2.2, seed)
    log_odds = evidence_of_one(problem, x.numpy()) - evidence_of_none(
        problem, x.numpy()
    )
    expected = 1 / (1 + math.exp(-log_odds))
    assert 0.02 < expected < 0.98  # or the test has no power
    draws = collapsed(problem, x, num_draws=6_000, seed=seed)
    probs = draws.cardinality().probs
    # standard errors are 0.001 and 0.003: false alarm in 1 of 10^9 seeds
    assert probs[1].item() == pytest.approx(expected, abs=0.03)
    assert probs[2:].sum() == 0


@pytest.mark.parametrize(
    ("thin", "tolerance"), [(20, 0.1), pytest.param(200, 0.03, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("seed", [2, 3])
def test_one_against_two_as_evidences_have_it(
    seed: int, thin: int, tolerance: float
) -> None:
    problem = with_prior([0.0, 0.5, 0.5, 0.0], (0.5, 4.0))
    x = observe(tiny, [[1.2, 1.0, 0.9], [0.6, 4.0, 1.5]], 1.6, seed)
    one, two = (fixed_k(problem, x, k, num_samples=20_000) for k in (1, 2))
    expected = 1 / (1 + math.exp(one.log_evidence - two.log_evidence))
    assert 0.02 < expected < 0.98
    draws = collapsed(problem, x, num_draws=6_000, thin=thin, seed=seed)
    # Standard errors are 0.018 for thin = 20 and 0.004 for 200, and 0.003 of the
    # evidences: false alarm in 1 of 10^7 seeds.
    assert draws.cardinality().probs[2].item() == pytest.approx(expected, abs=tolerance)


def test_draws_at_k_are_those_of_fixed_k() -> None:
    x = observe(tiny, [[0.9, 1.0, 0.9], [1.2, 4.0, 1.5]], 0.6, 3)
    draws = collapsed(tiny, x, num_draws=5_000)
    rows = draws.sample((20_000,), k=2)
    reference = fixed_k(tiny, x, 2)
    mean = (reference.weights[:, None] * reference.rows).sum(0)
    square = (reference.weights[:, None] * (reference.rows - mean).square()).sum(0)
    used = [1, *range(2, 8)]
    sd = square.sqrt()[used]
    # Over 4,000 effective draws a standard error is 0.016 and 0.011 sd. False alarm in
    # 1 of 10^8 seeds for each of 14 numbers.
    assert ((rows.mean(0) - mean)[used].abs() < 0.1 * sd).all()
    assert ((rows.std(0)[used] / sd - 1).abs() < 0.07).all()


# loud lines, and lines below the least separation


@pytest.mark.parametrize("ratio", [1e3, 1e4, 3.3e4, 3.3e5])
def test_widths_of_loud_lines_are_the_cramer_rao_bound(ratio: float) -> None:
    sigma, duration, rate = 1 / ratio, 10.0, 500.0
    problem = sinusoids(
        "tiny",
        grids=Grid(duration, rate),
        frequency=(20.0, 30.0),
        amplitude=(0.5, 1.5),
        sigma=(0.1 * sigma, 10 * sigma),
        separation=0,
    )
    x = observe(problem, [[1.0, 0.7, 24.123]], sigma, seed=1)
    draws = collapsed(problem, x, num_draws=2_000, seed=1)
    assert draws.converged
    assert (draws.theta[..., 0] == 1).all()
    frequency = draws.rows[:, 4]
    bound = math.sqrt(6 / (duration * rate)) * sigma / (math.pi * duration)
    # of 1,200 effective draws or more: 5 standard errors of 0.02, and the noise level
    # of this record, which is within 1 % of sigma
    assert float(frequency.std()) / bound == pytest.approx(1.0, abs=0.11)
    assert abs(float(frequency.mean()) - 24.123) < 4 * bound


def test_two_lines_closer_than_the_separation_take_two_at_the_separation() -> None:
    # One line cannot explain these two, two at the least separation nearly can: log
    # evidences by importance sampling are -285.7 and -280.5, p(2 | x) = 0.994.
    x = observe(tiny, [[1.0, 1.0, 1.2], [1.0, 2.0, 1.23]], 0.3, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draws = collapsed(tiny, x, num_draws=2_000, seed=1)
    told = any(issubclass(w.category, NotConverged) for w in caught)
    assert told == (not draws.converged)
    if draws.converged:
        one, two = (fixed_k(tiny, x, k).log_evidence for k in (1, 2))
        expected = 1 / (1 + math.exp(one - two))
        found = draws.cardinality().probs[2].item()
        assert found == pytest.approx(expected, abs=0.05)


def test_temperatures_leave_the_posterior_as_it_is() -> None:
    problem = with_prior([0.5, 0.5, 0.0, 0.0], (0.5, 4.0))
    x = observe(tiny, [[0.7, 1.0, 1.2]], 2.2, 1)
    log_odds = evidence_of_one(problem, x.numpy()) - evidence_of_none(
        problem, x.numpy()
    )
    draws = collapsed(problem, x, num_draws=3_000, num_levels=5, seed=2)
    expected = 1 / (1 + math.exp(-log_odds))
    # standard errors are 0.004: false alarm in 1 of 10^9 seeds
    assert draws.cardinality().probs[1].item() == pytest.approx(expected, abs=0.03)
    assert 0.2 < draws.acceptance["exchange"] < 1.0


def test_chains_that_do_not_converge_are_run_at_several_temperatures() -> None:
    x = observe(tiny, [[1.0, 1.0, 1.526], [1.0, 2.0, 1.6]], 0.28, seed=2)
    alone = collapsed(tiny, x, num_levels=1, seed=1, num_draws=100, burn_in=100)
    assert "exchange" not in alone.acceptance
    assert not alone.converged
    both = collapsed(tiny, x, seed=1, num_draws=100, burn_in=100)
    assert "exchange" in both.acceptance


# seeds, chains, starts


def test_seeds_agree_and_repeat() -> None:
    problem = with_prior([0.5, 0.5, 0.0, 0.0], (0.5, 4.0))
    x = observe(tiny, [[0.7, 1.0, 1.2]], 2.2, 1)
    first, again, other = (
        collapsed(problem, x, num_draws=4_000, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.theta, again.theta)
    assert dict(first.acceptance) == dict(again.acceptance)
    assert not torch.equal(first.theta, other.theta)
    # Over four chains each a standard error is 0.003: false alarm in 1 of 10^9 seeds.
    distance = first.cardinality().probs - other.cardinality().probs
    assert distance.abs().max() < 0.03
    assert first.disagreement < 0.05
    assert first.cardinality_by_chain.shape == (4, 4)
    torch.testing.assert_close(
        first.cardinality_by_chain.mean(0), first.cardinality().probs
    )
    assert not torch.equal(first.theta[0], first.theta[1])


def test_draws_have_shape_order_and_support() -> None:
    x = observe(tiny, [[0.9, 1.0, 0.9], [1.2, 4.0, 1.5]], 0.6, 3)
    draws = collapsed(tiny, x.float().unsqueeze(0), num_chains=2, num_draws=500)
    assert draws.theta.shape == (2, 500, tiny.layout.size)
    assert draws.theta.dtype == torch.float64
    assert list(draws.acceptance) == MOVES
    assert torch.equal(tiny.layout.canonical(draws.theta), draws.theta)
    assert torch.isfinite(tiny.prior.log_prob(draws.theta)).all()
    one = collapsed(tiny, x.float(), num_chains=1, num_draws=10, burn_in=0)
    assert math.isnan(one.disagreement)


def test_chains_start_with_numbers_that_are_not_ruled_out() -> None:
    def starts_of(sampler: CollapsedSampler) -> list[Tensor]:
        return [sampler.start(2 + shift) for shift in (0, -1, 1)]

    faint = sampler_of(tiny, observe(tiny, [[0.5, 1, 0.9], [1.2, 4, 1.5]], 1.0, 3))
    sizes = [int(tiny.layout.cardinality(start)) for start in starts_of(faint)]
    assert sizes[:2] == [2, 1]
    sampler = sampler_of(tiny, observe(tiny, [[0.9, 1, 0.9], [1.2, 4, 1.5]], 0.4, 3))
    assert sampler.best_size == 2
    starts = starts_of(sampler)
    assert int(tiny.layout.cardinality(starts[1])) == 2  # one is ruled out
    rows = torch.stack([*starts, sampler.start(9), sampler.start(-1)])
    assert torch.isfinite(tiny.prior.log_prob(rows)).all()
    x = observe(tiny, [[0.9, 1, 0.9], [1.2, 4, 1.5]], 0.4, 3)
    draws = collapsed(tiny, x, num_chains=3, num_draws=200, burn_in=20_000)
    # wherever they start, they come to the same number
    assert (draws.layout.cardinality(draws.theta[:, -1]) == 2).all()


def test_none_is_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(tiny.num_data, generator=generator)
    sampler = sampler_of(tiny, x)
    start = theta_row(tiny, [[0.6, 1.0, 1.2]], 0.5)[0]
    rows, _ = sampler.run(start, 500, 20, np.random.default_rng(0))
    k = tiny.layout.cardinality(rows)
    assert (k[-100:] == 0).float().mean() > 0.9
    # and left: p(K = 0 | x) is small if there is a tone
    loud = sampler_of(tiny, observe(tiny, [[1.0, 1.0, 1.2]], 0.5, 0))
    rows, _ = loud.run(loud.start(0), 500, 20, np.random.default_rng(0))
    assert tiny.layout.cardinality(rows)[-1] == 1


def test_cardinalities_that_the_prior_excludes_are_not_drawn() -> None:
    problem = with_prior([0.0, 0.0, 1.0, 0.0], (0.5, 4.0))
    x = observe(tiny, [[0.7, 1.0, 1.2]], 1.0, 0)
    draws = collapsed(problem, x, num_draws=200)
    assert (problem.layout.cardinality(draws.theta) == 2).all()


# what is refused


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_chains", 0), ("num_draws", 0), ("thin", 0), ("burn_in", -1)],
)
def test_bad_numbers_are_rejected(name: str, value: int) -> None:
    bad: Any = {name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        collapsed(tiny, torch.zeros(300), **bad)


def test_a_problem_or_observation_of_another_kind_is_rejected() -> None:
    bad: Any = problems.linear_gaussian()
    with pytest.raises(TypeError, match="has no collapsed sampler"):
        collapsed(bad, torch.zeros(300))
    with pytest.raises(TypeError, match="needs WhiteNoise or GaussianNoise"):
        collapsed(sinusoids("tiny", noise="resampled"), torch.zeros(300))
    with pytest.raises(ValueError, match=r"x must have shape \(300,\)"):
        collapsed(tiny, torch.zeros(299))
    with pytest.raises(ValueError, match="x must be finite"):
        collapsed(tiny, torch.full((300,), math.nan))


@pytest.mark.parametrize("which", ["amplitude", "frequency", "sigma"])
def test_a_prior_of_another_family_is_rejected(which: str) -> None:
    normal = Normal(tensor(1.0), tensor(0.1))
    parts: list[Distribution] = [
        Uniform(tensor(0.5), tensor(1.5)),
        Uniform(tensor(0.0), tensor(2 * math.pi)),
        Uniform(tensor(0.5), tensor(2.0)),
    ]
    shared: Distribution = BoxUniform(tensor(0.1), tensor(1.0))
    if which == "sigma":
        shared = Independent(normal, 1)
    else:
        parts[0 if which == "amplitude" else 2] = normal
    prior = VariableKPrior(
        MultipleIndependent(parts, validate_args=False),
        [1.0, 1.0, 1.0, 1.0],
        shared=shared,
        order_by=2,
    )
    problem = replace(tiny, prior=prior)
    message = "must have a uniform or log-uniform amplitude"
    if which == "frequency":
        message = "the prior's frequency must have bounds, got a normal"
    with pytest.raises(ValueError, match=message):
        collapsed(problem, torch.zeros(300))


def test_tones_that_the_prior_finds_too_faint_are_noise() -> None:
    # Two strong tones, and three that the data show but the prior excludes.
    problem = sinusoids(
        "crowded",
        grids=[Grid(300.0, 1.0)],
        cardinality=[1.0] * 6,
        amplitude=(1.0, 20.0),
        frequency=(0.01, 0.49),
        sigma=(0.01, 10.0),
    )
    time = problem.grids[0].times
    noise = np.random.default_rng(0).normal(0.0, 0.05, len(time))
    x = torch.from_numpy(noise)
    for amplitude, frequency in (
        (10.0, 0.05), (7.0, 0.08), (0.3, 0.2), (0.3, 0.3), (0.3, 0.4),
    ):  # fmt: skip
        x = x + amplitude * torch.cos(2 * math.pi * frequency * time + 1.0)
    draws = collapsed(problem, x.float(), num_draws=300, thin=5, burn_in=2_000)
    assert draws.cardinality().probs[2] > 0.99
    # what is left: three tones of power 0.3^2 / 2 and the noise
    sigma = math.sqrt(1.5 * 0.3**2 + 0.05**2)
    assert draws.rows[:, 1].mean() == pytest.approx(sigma, rel=0.15)


def test_the_least_step_is_a_third_of_the_cramer_rao_bound() -> None:
    # The prior's least noise is far below the record's.
    sigma, duration, rate = 1e-3, 10.0, 500.0
    problem = sinusoids(
        "tiny",
        grids=Grid(duration, rate),
        frequency=(20.0, 30.0),
        sigma=(1e-6, 1.0),
        separation=0,
    )
    x = observe(problem, [[1.0, 0.7, 24.123]], sigma, seed=1)
    sampler = CollapsedSampler(problem.prior, problem.statistics(x), x)
    bound = math.sqrt(6 / (duration * rate)) * sigma / (math.pi * duration)
    assert sampler._target.least_step == pytest.approx(bound / 3, rel=0.05)
