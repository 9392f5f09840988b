"""The collapsed sampler of any linear form: against the prior, quadrature, its kin."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sbi.utils import BoxUniform, MultipleIndependent
from scipy import stats
from torch import Tensor
from torch.distributions import Distribution, Normal, Uniform

from sbi_slotflow import AdditiveSimulator, VariableKPrior, WhiteNoise, rjmcmc
from sbi_slotflow.posterior.convergence import NotConverged
from sbi_slotflow.problems import Problem, Trace, sinusoids, spikes

TIMES = torch.arange(64, dtype=torch.float64) / 64


def bump(components: Tensor) -> Tensor:
    """A pulse of known width: components (time, height)."""
    time, height = components.unsqueeze(-1).unbind(-2)
    return height * torch.exp(-0.5 * ((TIMES.to(time) - time) / 0.03) ** 2)


def bumps(
    sigma: float | None,
    cardinality: list[float],
    height: tuple[float, float] | None = None,
    separation: float | None = None,
) -> Trace:
    """Bumps of normal height, or of uniform height; sigma uniform if None."""
    law = Normal(torch.tensor([0.5]), torch.tensor([1.0]))
    if height is not None:
        law = Uniform(torch.tensor([height[0]]), torch.tensor([height[1]]))
    parts = [Uniform(torch.tensor([0.0]), torch.tensor([1.0])), law]
    prior = VariableKPrior(
        MultipleIndependent(parts, validate_args=False),
        cardinality,
        shared=None if sigma else BoxUniform(torch.tensor([0.1]), torch.tensor([0.6])),
        min_separation=separation,
        component_names=("time", "height"),
        shared_names=() if sigma else ("sigma",),
    )
    simulator = AdditiveSimulator(bump, WhiteNoise(sigma), prior.layout)
    return Trace("bumps", prior, simulator, 32, linear=("height",))


def observe(problem: Problem, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    theta = problem.prior.sample((1,), generator)[0]
    return theta, problem.simulator(theta, generator)


@pytest.mark.parametrize("levels", [1, 3])
def test_data_that_say_nothing_leave_the_prior(levels: int) -> None:
    # false alarm: 5 chi2 and KS tests on about 1,000 independent draws, each 1e-4
    problem = bumps(1e4, [1, 2, 3, 2], height=(0.5, 2.0))
    _, x = observe(problem, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = rjmcmc.collapsed(
            problem, x, num_chains=100, num_levels=levels, num_draws=10, thin=40, seed=2
        )
    parts = problem.layout.unpack(draws.rows)
    counts = torch.bincount(parts.cardinality, minlength=4).numpy()
    expected = problem.prior.cardinality_probs.numpy() * len(draws.rows)
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    active = parts.components[parts.mask].numpy()
    assert stats.kstest(active[:, 0], "uniform").pvalue > 1e-4
    assert stats.kstest(active[:, 1], stats.uniform(0.5, 1.5).cdf).pvalue > 1e-4
    two = parts.components[parts.cardinality == 2][:, :2, 0]
    gap = (two[:, 1] - two[:, 0]).numpy()  # of two sorted uniform numbers
    assert stats.kstest(gap, stats.beta(1, 2).cdf).pvalue > 1e-4
    assert stats.kstest(two[:, 0].numpy(), stats.beta(1, 2).cdf).pvalue > 1e-4


def log_evidences(x: Tensor, sigma: float) -> tuple[float, float, float]:
    """Log p(x | K) for K = 0, 1, 2 with normal heights, by a grid of places."""
    places = (np.arange(400) + 0.5) / 400
    basis = bump(torch.stack([torch.from_numpy(places), torch.ones(400)], -1)).numpy()
    data = x.double().numpy() - 0.0
    num, mean = len(data), 0.5

    def log_marginal(columns: np.ndarray) -> np.ndarray:
        """Of many sets of columns (S, k, T), by the normal law of x itself."""
        shift = data - mean * columns.sum(1)
        size = columns.shape[1]
        gram = columns @ columns.transpose(0, 2, 1) / sigma**2
        inner = np.einsum("skt,st->sk", columns, shift) / sigma**2
        precision = gram + np.eye(size)
        value = -0.5 * num * math.log(2 * math.pi * sigma**2)
        value = value - 0.5 * (shift**2).sum(-1) / sigma**2
        solved = np.linalg.solve(precision, inner[..., None])[..., 0]
        value = value + 0.5 * (inner * solved).sum(-1)
        return value - 0.5 * np.linalg.slogdet(precision)[1]

    def mean_of(values: np.ndarray) -> float:
        return float(np.logaddexp.reduce(values) - math.log(len(values)))

    none = float(log_marginal(np.zeros((1, 1, num)))[0])
    one = mean_of(log_marginal(basis[:, None]))
    first, second = np.triu_indices(400, 1)
    pairs = np.concatenate(
        [
            log_marginal(np.stack([basis[first[i::20]], basis[second[i::20]]], 1))
            for i in range(20)
        ]
    )
    return none, one, mean_of(pairs)


@pytest.mark.parametrize("seed", [3, 4])
def test_cardinality_is_that_of_quadrature(seed: int) -> None:
    sigma = 0.5
    problem = bumps(sigma, [1, 1, 1])
    theta = torch.tensor([2.0, 0.4, 0.8, 0.45, 0.9])
    generator = torch.Generator().manual_seed(seed)
    x = problem.simulator(theta, generator)
    expected = torch.tensor(log_evidences(x, sigma), dtype=torch.float64).softmax(0)
    draws = rjmcmc.collapsed(problem, x, num_draws=400, thin=5, burn_in=300, seed=1)
    assert draws.converged
    found = draws.cardinality().probs.double()
    error = math.sqrt(0.25 / draws.diagnostics.ess["K"])
    # five standard errors: 3e-7 for each of two, plus the grid's own error
    torch.testing.assert_close(found, expected, atol=5 * error + 0.005, rtol=0)


def test_a_component_is_linear_in_what_the_trace_names() -> None:
    problem = spikes()
    form = problem.linear_form()
    assert form is not None
    assert form.num_amplitudes == 1
    components = torch.tensor([[0.3, 0.01, 1.5], [0.6, 0.02, 0.7]])
    basis = form.basis(form.nonlinear(components))
    assert basis.shape == (2, 1, 512)
    both = torch.einsum("sm,smt->st", form.amplitudes(components), basis)
    torch.testing.assert_close(both, problem.simulator.component_signal(components))
    again = form.components(form.nonlinear(components), form.amplitudes(components))
    assert torch.equal(again, components)


def test_a_sinusoid_is_linear_in_cosine_and_sine_of_its_phase() -> None:
    problem = sinusoids("tiny")
    form = problem.linear_form()
    components = torch.tensor([[0.8, 1.0, 0.7], [1.4, 5.0, 1.9]], dtype=torch.float64)
    basis = form.basis(form.nonlinear(components))
    both = torch.einsum("sm,smt->st", form.amplitudes(components), basis)
    torch.testing.assert_close(both, problem.simulator.component_signal(components))
    again = form.components(form.nonlinear(components), form.amplitudes(components))
    torch.testing.assert_close(again, components)

    def amplitudes(linear: Tensor) -> Tensor:
        return form.amplitudes(torch.cat([linear, components[0, 2:]]))

    jacobian = torch.autograd.functional.jacobian(amplitudes, components[0, :2])
    assert isinstance(jacobian, Tensor)
    torch.testing.assert_close(
        torch.linalg.slogdet(jacobian)[1], form.log_det(components)[0]
    )


def test_the_general_path_agrees_with_the_fast_kernel() -> None:
    problem = sinusoids("tiny")
    theta = torch.tensor([2.0, 0.9, 0.6, 1.0, 0.8, 0.7, 2.0, 1.3, 0.0, 0.0, 0.0])
    x = problem.simulator(theta.double(), torch.Generator().manual_seed(2))
    options: dict[str, Any] = {
        "num_levels": 3,
        "num_draws": 300,
        "burn_in": 500,
        "thin": 5,
    }
    general = rjmcmc.collapsed(problem, x, general=True, seed=1, **options)
    fast = rjmcmc.collapsed(problem, x, seed=1, num_draws=2_000)
    errors = [1 / math.sqrt(draws.diagnostics.ess["K"]) for draws in (general, fast)]
    distance = (general.cardinality().probs - fast.cardinality().probs).abs().max()
    assert distance < 2.5 * math.hypot(*errors)  # five of at most 0.5 / sqrt(ESS) each
    for column in (1, 2, 4):
        k = [int(draws.cardinality().probs.argmax()) for draws in (general, fast)]
        assert k[0] == k[1]
        one, other = (
            draws.rows[draws.rows[:, 0] == k[0], column] for draws in (general, fast)
        )
        spread = float(other.std())
        assert abs(float(one.mean() - other.mean())) < 0.25 * spread
        assert float(one.std()) == pytest.approx(spread, rel=0.25)


def test_chains_start_from_the_right_fit_and_repeat() -> None:
    problem = spikes()
    theta, x = observe(problem, 6)
    options: dict[str, Any] = {
        "num_chains": 4,
        "num_levels": 1,
        "num_draws": 3,
        "burn_in": 0,
    }
    runs = []
    for seed in (3, 3, 4):
        with pytest.warns(NotConverged, match="R-hat of"):
            runs.append(rjmcmc.collapsed(problem, x, seed=seed, **options))
    draws, again, other = runs
    assert torch.equal(draws.theta, again.theta)
    assert not torch.equal(draws.theta, other.theta)
    k = draws.theta[0, 0, 0]
    assert abs(int(k) - int(theta[0])) <= 1


@pytest.mark.parametrize("unit", [1e-21, 1e21])
def test_answers_do_not_depend_on_the_unit(unit: float) -> None:
    def answer(scale: float) -> Tensor:
        parts: list[Distribution] = [
            Uniform(torch.tensor([0.0]), torch.tensor([1.0])),
            Uniform(torch.tensor([0.5 * scale]), torch.tensor([2.0 * scale])),
        ]
        prior = VariableKPrior(
            MultipleIndependent(parts, validate_args=False),
            [1, 1, 1],
            component_names=("time", "height"),
        )
        noise = WhiteNoise(0.5 * scale)
        simulator = AdditiveSimulator(bump, noise, prior.layout)
        problem = Trace("bumps", prior, simulator, 32, linear=("height",))
        x = scale * observe(bumps(0.5, [1, 1, 1], (0.5, 2.0)), 9)[1].double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draws = rjmcmc.collapsed(problem, x, num_draws=50, burn_in=50, thin=2)
        return draws.cardinality().probs

    torch.testing.assert_close(answer(unit), answer(1.0), atol=0.02, rtol=0)


def test_what_is_not_linear_is_refused() -> None:
    problem = bumps(0.5, [1, 1])
    wrong = Trace("bumps", problem.prior, problem.simulator, 32, linear=("time",))
    with pytest.raises(ValueError, match=r"must be linear in \['time'\]"):
        rjmcmc.collapsed(wrong, torch.zeros(64))
    with pytest.raises(ValueError, match="linear must name some"):
        Trace("bumps", problem.prior, problem.simulator, 32, linear=("flux",))
    none = Trace("bumps", problem.prior, problem.simulator, 32)
    with pytest.raises(TypeError, match="has no collapsed sampler"):
        rjmcmc.collapsed(none, torch.zeros(64))
    for bad in (torch.zeros(63), torch.zeros(2, 64)):
        with pytest.raises(ValueError, match="x must have shape"):
            rjmcmc.collapsed(problem, bad)
    with pytest.raises(ValueError, match="num_levels"):
        rjmcmc.collapsed(problem, torch.zeros(64), num_levels=0)


# what the prior excludes


def test_cardinalities_on_both_sides_of_a_gap_are_reached() -> None:
    problem = bumps(10.0, [1, 0, 1])  # data of the noise alone say nothing of K
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    draws = rjmcmc.collapsed(problem, x, num_levels=1, seed=1)
    probs = draws.cardinality().probs
    assert probs[1] == 0
    # p(K = 2) is 0.5 but for 0.01; 1,000 effective draws: 5 standard errors
    assert probs[2].item() == pytest.approx(0.5, abs=0.1)
    assert (draws.sample((500,))[:, 0] != 1).all()


def test_draws_keep_a_separation_that_fits_break() -> None:
    apart = bumps(1.0, [0, 0, 0, 1], separation=0.45)
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = rjmcmc.collapsed(apart, x, num_levels=2, num_draws=50, burn_in=50)
    assert (draws.rows[:, 0] == 3).all()
    assert torch.isfinite(apart.prior.log_prob(draws.rows)).all()


def test_splits_around_a_circle_leave_the_prior() -> None:
    def around(components: Tensor) -> Tensor:
        place, height = components.unsqueeze(-1).unbind(-2)
        turn = 2 * math.pi * (TIMES.to(place) - place)
        return height * (1 + 0.1 * torch.cos(turn))

    parts: list[Distribution] = [
        Uniform(torch.tensor([0.0]), torch.tensor([1.0])),
        Normal(torch.tensor([0.0]), torch.tensor([1.0])),
    ]
    prior = VariableKPrior(
        MultipleIndependent(parts, validate_args=False),
        [1, 1, 1, 1],
        component_names=("place", "height"),
        periods={"place": 1.0},
    )
    simulator = AdditiveSimulator(around, WhiteNoise(1e4), prior.layout)
    problem = Trace("circle", prior, simulator, 32, linear=("height",))
    x = 1e4 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    draws = rjmcmc.collapsed(
        problem, x, num_chains=128, num_levels=1, num_draws=100, burn_in=100, seed=2
    )
    error = math.sqrt(0.25 * 0.75 / draws.diagnostics.ess["K"])
    # five standard errors of each of four: false alarms below 3e-6
    assert (draws.cardinality().probs - 0.25).abs().max() < 5 * error
    assert error < 0.006


def test_what_the_sampler_cannot_do_is_refused() -> None:
    problem = bumps(0.5, [1, 1])

    class Growing(AdditiveSimulator):
        def noise_log_prob(self, residual: Tensor, signal: Tensor, shared: Tensor):
            return super().noise_log_prob(residual / 2, signal, shared)

    growing = Growing(bump, WhiteNoise(0.5), problem.layout)
    own = Trace("own noise", problem.prior, growing, 32, linear=("height",))
    with pytest.raises(TypeError, match="needs WhiteNoise or GaussianNoise"):
        rjmcmc.collapsed(own, torch.zeros(64))
    prior = VariableKPrior(
        problem.prior.component,
        [1, 1],
        shared=BoxUniform(torch.zeros(2), torch.ones(2)),
        component_names=("time", "height"),
        shared_names=("sigma", "offset"),
    )
    simulator = AdditiveSimulator(bump, WhiteNoise(), prior.layout)
    two = Trace("two shared", prior, simulator, 32, linear=("height",))
    with pytest.raises(TypeError, match="takes as shared parameters those of the"):
        rjmcmc.collapsed(two, torch.zeros(64))
    for names in (("height", "height"), ("time", "height")):
        with pytest.raises(ValueError, match="each once"):
            Trace("twice", problem.prior, problem.simulator, 32, linear=names)
    with pytest.raises(TypeError, match="sequence of names"):
        Trace("bare", problem.prior, problem.simulator, 32, linear="height")  # pyright: ignore


def test_the_global_generator_is_left_alone() -> None:
    problem = bumps(0.5, [1, 1])
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rjmcmc.collapsed(problem, torch.zeros(64), num_draws=2, burn_in=0)
    problem.prior.with_cardinality([1, 2])
    assert torch.equal(before, torch.random.get_rng_state())
