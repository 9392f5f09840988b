"""The shape of noise is estimated beside components, and fitted once they are known."""

import math
from typing import Any

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor

from sbi_slotflow import (
    AdditiveSimulator,
    GaussianNoise,
    SlotDensityEstimator,
    SlotPosterior,
    VariableKPrior,
    rjmcmc,
    slot_nn,
)
from sbi_slotflow.problems import Grid, Sinusoids, Trace, sinusoids
from sbi_slotflow.problems.noise_shape import NoiseShape

NUM = 200
GRID = Grid(20.0, 10.0)
FREQUENCY = torch.fft.rfftfreq(NUM, 0.1).clamp(min=0.05)
TIMES = torch.arange(NUM).double() / NUM
ERRORS = 0.1 + 0.2 * TIMES


def falling(shared: Tensor) -> Tensor:
    return FREQUENCY.to(shared) ** -shared[..., 1:2]


def lines(unit: float = 1.0, **options) -> Sinusoids:
    shared = BoxUniform(torch.tensor([0.1 * unit, 0.0]), torch.tensor([unit, 2.0]))
    noise = GaussianNoise(spectrum=falling, level=0, depends_on=1)
    return sinusoids(
        "tiny",
        grids=GRID,
        amplitude=(0.5 * unit, 1.5 * unit),
        noise=noise,
        shared=shared,
        shared_names=("sigma", "slope"),
        **options,
    )


def bump(components: Tensor) -> Tensor:
    time, height = components.unsqueeze(-1).unbind(-2)
    return height * torch.exp(-0.5 * ((TIMES.to(components) - time) / 0.01) ** 2)


def pulses(level: bool = True, offset: bool = True) -> Trace:
    """Pulses, errors with a jitter (and a level), and an offset."""
    names = ["jitter", *["level"] * level, *["offset"] * offset]
    base = torch.tensor([0.01, *[0.5] * level, *[-2.0] * offset])
    top = torch.tensor([1.0, *[2.0] * level, *[2.0] * offset])
    prior = VariableKPrior(
        BoxUniform(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 5.0])),
        [1.0, 1.0, 1.0],
        shared=BoxUniform(base, top),
        component_names=("time", "height"),
        shared_names=names,
    )
    noise = GaussianNoise(
        errors=lambda s: torch.hypot(ERRORS.to(s), s[..., :1]),
        level=1 if level else None,
        depends_on=0,
    )
    background = (lambda s: s[..., -1:] + 0 * TIMES.to(s)) if offset else None
    simulator = AdditiveSimulator(bump, noise, prior.layout, background=background)
    return Trace("pulses", prior, simulator, 40)


def shape_of(problem: Sinusoids | Trace) -> NoiseShape:
    noise = problem.simulator.noise
    assert isinstance(noise, GaussianNoise)
    return NoiseShape(noise, problem.prior)


@pytest.mark.parametrize("problem", [lines(), pulses(level=False)])
def test_loud_components_hardly_move_the_estimate(problem: Sinusoids | Trace) -> None:
    shape = shape_of(problem)
    theta = problem.prior.sample((200,), seeded(1)).double()
    parts = problem.layout.unpack(theta)
    x = problem.simulator(theta, seeded(2))
    noise = x - problem.simulator.signal(theta)
    beneath = problem.simulator.background
    left = x if beneath is None else x - beneath(parts.shared)
    alone, beside = shape.estimate(noise), shape.estimate(left)
    values = parts.shared[:, shape.indices]
    known = (alone - values).square().mean().sqrt()
    # Components would change a mean square by a hundred times, a slope by one or two.
    assert (beside - alone).square().mean().sqrt() < 1.5 * known
    # The estimate itself is no worse than the prior's spread by far.
    assert known < 0.5 * values.std()


@pytest.mark.parametrize("problem", [lines(), pulses(level=False), pulses()])
def test_the_shape_is_that_of_the_likelihood(problem) -> None:
    """Its Gaussian, cut off at the prior's bounds, beside a grid of level and shape."""
    shape, fit = shape_of(problem), problem.build_fit()
    theta = problem.prior.sample((4,), seeded(3)).double()
    x = problem.simulator(theta, seeded(4))
    parts = problem.layout.unpack(theta)
    given = fit.given(x).noise_given(torch.arange(4), parts.components, parts.mask)
    noise = x - problem.simulator.signal(theta)
    z = torch.linspace(-1, 1, 201).double()[:, None]
    offsets = torch.linspace(-0.5, 0.5, 101).double()
    for i in range(4):
        shared = parts.shared[i].repeat(201, 101, 1)
        shared[..., shape.indices] = shape.values(z).unsqueeze(1)
        level = problem.simulator.noise.level
        if level is not None:
            # White by a shape of z = 0, wherever the residual was.
            middle = shape.values(torch.zeros(1, 1).double())
            white = shape.white(noise[i : i + 1], middle).expand(201, -1)
            alone = shape.given(white, middle.expand(201, -1))
            shared[..., level] = (alone.level(z)[:, None] + offsets).exp()
        logs = problem.simulator.noise.log_prob(noise[i].expand(201, 101, -1), shared)
        exact = logs.logsumexp(1).softmax(0)
        gap = (z[:, 0] - given.mean[i]) / given.factor[i, 0, 0]
        ours = (-0.5 * gap.square()).softmax(0)
        # Beside a level, a jitter's posterior is broad and skew: flows learn that.
        most = 0.35 if len(problem.layout.shared_names) == 3 else 0.15
        assert 0.5 * (exact - ours).abs().sum() < most


@pytest.mark.parametrize("problem", [lines(), pulses()], ids=["lines", "pulses"])
def test_the_density_of_level_and_shape_integrates_to_one(problem) -> None:
    """Importance weights: the mean of 1 / q over a box is its volume."""
    estimator = build(problem)
    theta = problem.prior.sample((1,), seeded(5))
    x = problem.simulator(theta, seeded(6))
    parts, num = problem.layout.unpack(theta), 20_000
    head = estimator.shared_given(estimator.encode(x), x)
    assert head is not None
    args = torch.zeros(num, dtype=torch.int64), parts.cardinality.expand(num)
    components = parts.components.expand(num, -1, -1)
    shared = head.sample(*args, seeded(8), None, components)
    value = head.log_prob(shared, *args, None, components).double()
    bounds = torch.tensor([m.bounds for m in problem.prior.shared_marginals])
    low = torch.maximum(shared.median(0).values - shared.std(0), bounds[:, 0])
    high = torch.minimum(shared.median(0).values + shared.std(0), bounds[:, 1])
    inside = ((shared >= low) & (shared <= high)).all(-1)
    ratio = torch.where(inside, (-value).exp(), 0.0)
    error = float(ratio.std()) / math.sqrt(num)
    # 5 deviations: under one in 10^6.
    volume = float((high - low).prod())
    assert float(ratio.mean()) == pytest.approx(volume, abs=5 * error)


def build(problem, **options) -> SlotDensityEstimator:
    torch.manual_seed(0)
    theta = problem.prior.sample((64,), seeded(9))
    x = problem.simulator(theta, seeded(10))
    return slot_nn(problem, **options)(theta, x)


@pytest.mark.parametrize("unit", [1e-21, 1e15])
def test_units_do_not_matter(unit: float) -> None:
    problem, same = lines(unit), lines()
    theta = same.prior.sample((8,), seeded(11))
    x = same.simulator(theta, seeded(12)).double()
    one, other = shape_of(same).estimate(x), shape_of(problem).estimate(unit * x)
    torch.testing.assert_close(one, other)


def test_a_network_survives_a_file_with_its_fit_and_with_no_other(tmp_path) -> None:
    problem = lines()
    estimator = build(problem)
    path = tmp_path / "network.safetensors"
    estimator.save(path)
    theta = problem.prior.sample((4,), seeded(13))
    x = problem.simulator(theta, seeded(14))
    again = SlotDensityEstimator.load(path, fit=problem.build_fit())
    torch.testing.assert_close(again.log_prob(theta, x), estimator.log_prob(theta, x))
    steep = GaussianNoise(spectrum=lambda s: falling(2 * s), level=0, depends_on=1)
    other = sinusoids(
        "tiny", grids=GRID, noise=steep, shared=problem.prior.shared, shared_names="ab"
    )
    with pytest.raises(ValueError, match="fit is not the one"):
        SlotDensityEstimator.load(path, fit=other.build_fit())


@pytest.mark.parametrize("problem", [lines(), pulses()], ids=["lines", "pulses"])
def test_draws_of_level_and_shape_follow_the_likelihood(problem) -> None:
    """Weights p(x | theta) / q of the noise's parameters alone are nearly even.

    Before any training: what level and shape are is read off the residual.
    """
    estimator = build(problem)
    theta = problem.prior.sample((1,), seeded(15))
    x = problem.simulator(theta, seeded(16))
    parts = problem.layout.unpack(theta)
    head = estimator.shared_given(estimator.encode(x), x)
    assert head is not None
    owner, k = torch.zeros(400, dtype=torch.int64), parts.cardinality.expand(400)
    components = parts.components.expand(400, -1, -1)
    shared = head.sample(owner, k, seeded(17), None, components)
    value = head.log_prob(shared, owner, k, None, components)
    rows = problem.layout.pack(k, components, shared)
    weights = (problem.log_likelihood(rows, x[0]) - value).double().softmax(0)
    assert float(1 / weights.square().sum()) > 300


def test_a_background_beneath_sinusoids_is_known_to_all() -> None:
    times = GRID.times
    shared = BoxUniform(torch.tensor([0.1, -9.0]), torch.tensor([1.0, 9.0]))
    problem = sinusoids(
        "tiny",
        grids=GRID,
        shared=shared,
        shared_names=("sigma", "trend"),
        background=lambda s: s[..., 1:2] * (times.to(s) / 20 - 0.5),
    )
    theta = problem.prior.sample((300,), seeded(18))
    x = problem.simulator(theta[:1], seeded(19))
    # Many rows, for which statistics of white noise alone would be tabulated.
    found = problem.log_likelihood(theta, x[0])
    torch.testing.assert_close(found, problem.simulator.log_likelihood(theta, x[0]))
    assert problem.build_fit().linear_shared == (1,)
    with pytest.raises(TypeError, match="no background"):
        problem.laplace_proposal(x[0])
    draws = rjmcmc.collapsed(
        problem, x[0], num_chains=2, num_levels=1, num_draws=50, burn_in=200, seed=1
    )
    trend = problem.layout.unpack(draws.sample((50,))).shared[:, 1]
    assert (trend.mean() - theta[0, 2]).abs() < 2.0


def test_the_exact_sampler_moves_the_shape() -> None:
    problem = lines()
    theta = problem.prior.sample((1,), seeded(20))
    x = problem.simulator(theta, seeded(21))
    draws = rjmcmc.collapsed(
        problem, x[0], num_chains=4, num_levels=1, num_draws=60, burn_in=300, seed=1
    )
    parts = problem.layout.unpack(draws.rows)
    assert (
        parts.cardinality == problem.layout.cardinality(theta)
    ).double().mean() > 0.5
    shared, truth = parts.shared, problem.layout.unpack(theta).shared[0]
    # False alarm: 6e-7 for each of two.
    assert ((shared.mean(0) - truth).abs() < 5 * shared.std(0)).all()
    assert (shared.std(0) > 0).all()


def test_a_parameter_that_there_is_not_is_refused() -> None:
    problem = lines()
    noise = GaussianNoise(spectrum=falling, depends_on=2)
    with pytest.raises(ValueError, match="depends_on must name some of the 2"):
        NoiseShape(noise, problem.prior)


def test_a_posterior_is_refined() -> None:
    problem = lines()
    posterior = SlotPosterior(build(problem), problem.prior)
    x = problem.simulator(problem.prior.sample((1,), seeded(22)), seeded(23))
    refined: Any = posterior.refine(
        problem.log_likelihood, x[0], num_samples=200, generator=seeded(24)
    )
    assert refined.sample((10,)).shape == (10, problem.layout.size)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bent(order: tuple[int, ...] = (1, 2)) -> tuple[Any, GaussianNoise, NoiseShape]:
    """Level, slope and knee of a spectrum."""
    prior = VariableKPrior(
        BoxUniform(torch.tensor([0.0]), torch.tensor([1.0])),
        [1.0, 1.0],
        shared=BoxUniform(torch.tensor([0.1, 0.0, 0.5]), torch.tensor([1.0, 2.0, 3.0])),
    )

    def spectrum(shared: Tensor) -> Tensor:
        slope, knee = shared[..., 1:2], shared[..., 2:3]
        return 1 + (knee / FREQUENCY.to(shared)) ** slope

    noise = GaussianNoise(spectrum=spectrum, level=0, depends_on=order)
    return prior, noise, NoiseShape(noise, prior)


def test_parameters_of_a_shape_may_be_named_in_any_order() -> None:
    assert bent((2, 1))[1].depends_on == bent((1, 2))[1].depends_on == (1, 2)


def test_two_parameters_end_where_the_data_are_most_likely() -> None:
    prior, noise, shape = bent()
    shared = prior.layout.unpack(prior.sample((200,), seeded(1)).double()).shared
    residual = noise.sample(torch.zeros(200, NUM).double(), shared, seeded(2))
    start = shape.estimate(residual)
    given = shape.given(shape.white(residual, start), start)

    def best(natural: Tensor) -> Tensor:
        return given._log_likelihood(natural.clamp(-1, 1))

    truth = best(shape.natural(shared[:, 1:]))
    # Of a maximum over two parameters, twice the gain has a mean of two.
    assert ((truth - best(given.mean)) > 3).double().mean() < 0.02
    assert (best(shape.natural(start)) - best(given.mean) < 0.5).all()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s: falling(s + 0 * s[..., :1]) * s[..., :1], "of 'sigma' too"),
        (lambda s: falling(s) * s.mean(), "on its own"),
    ],
)
def test_what_a_shape_reads_is_checked(function, message: str) -> None:
    noise = GaussianNoise(spectrum=function, depends_on=1)
    with pytest.raises(ValueError, match=message):
        NoiseShape(noise, lines().prior)


def test_a_level_that_there_is_not_is_refused() -> None:
    noise = GaussianNoise(spectrum=falling, level=7, depends_on=1)
    with pytest.raises(ValueError, match="level must be one of the 2"):
        NoiseShape(noise, lines().prior)


def test_a_shape_of_zero_has_no_density() -> None:
    noise = GaussianNoise(errors=lambda s: s[..., :1] * ERRORS.to(s), depends_on=0)
    rows = torch.tensor([[0.0], [1.0]]).double()
    values = noise.log_prob(torch.zeros(2, NUM).double(), rows)
    assert values[0].isneginf()
    assert values[1].isfinite()


def test_errors_that_may_vanish_can_be_trained(tmp_path) -> None:
    base = pulses(level=False, offset=False)
    prior = VariableKPrior(
        base.prior.component,
        [1.0, 1.0],
        shared=torch.distributions.Independent(
            torch.distributions.Exponential(torch.tensor([1.0])), 1
        ),
        component_names=("time", "height"),
    )
    noise = GaussianNoise(errors=lambda s: s[..., :1] * ERRORS.to(s), depends_on=0)
    simulator = AdditiveSimulator(bump, noise, prior.layout)
    estimator = build(Trace("pulses", prior, simulator, 40))
    theta = prior.sample((64,), seeded(30))
    loss = estimator.loss(theta, simulator(theta, seeded(31)))
    assert loss.isfinite().all()


@pytest.mark.parametrize("level", [0.02, 0.9])
def test_a_background_leaves_nothing_in_a_quiet_record(level: float) -> None:
    """Level and shape beside an offset and a trend of a prior as wide as 450 levels."""
    shared = BoxUniform(
        torch.tensor([0.01, 0.0, -9.0, -9.0]), torch.tensor([1.0, 2.0, 9.0, 9.0])
    )
    times = GRID.times / 20 - 0.5
    problem = sinusoids(
        "tiny",
        grids=GRID,
        noise=GaussianNoise(spectrum=falling, level=0, depends_on=1),
        shared=shared,
        shared_names=("sigma", "slope", "offset", "trend"),
        background=lambda s: s[..., 2:3] + s[..., 3:] * times.to(s),
    )
    rows = problem.prior.sample((200,), seeded(32)).double()
    rows[:, 0], rows[:, 1] = 0.0, level
    rows[:, 1 + problem.layout.num_shared :] = 0.0
    x = problem.simulator(rows, seeded(33))
    parts = problem.layout.unpack(rows)
    given = (
        problem.build_fit()
        .given(x)
        .noise_given(torch.arange(200), parts.components, parts.mask)
    )
    # Of 200 numbers; two that the background takes are 0.5 % of the level.
    error = given.level(given.mean) - math.log(level)
    assert abs(float(error.mean())) < 0.03
    assert float(error.std()) < 2 / math.sqrt(2 * NUM)


def test_starts_do_not_depend_on_how_many_are_sought_at_once(monkeypatch) -> None:
    problem = lines()
    theta = problem.prior.sample((20,), seeded(40))
    least = problem.build_fit().given(problem.simulator(theta, seeded(41)))
    owner = torch.arange(20).repeat(3)
    low = 0.5 + torch.rand(60, 3, generator=seeded(42)).double()
    mask = torch.rand(60, 3, generator=seeded(43)) > 0.3
    together = least.start(owner, low, low + 0.05, mask)
    monkeypatch.setattr("sbi_slotflow.problems.least_squares._MOST_NUMBERS", 2**17)
    apart = least.start(owner, low, low + 0.05, mask)
    torch.testing.assert_close(apart[mask], together[mask])
