import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sbi.inference import simulate_for_sbi
from sbi.utils import BoxUniform
from sbi.utils.user_input_checks import process_prior, process_simulator
from scipy import stats
from torch import Tensor

from sbi_slotflow import (
    AdditiveSimulator,
    GaussianNoise,
    VariableKPrior,
    WhiteNoise,
)
from sbi_slotflow.problems import Problem, linear_gaussian, sinusoids
from sbi_slotflow.sets.layout import ThetaLayout

TIMES = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64)


def pulse(components: Tensor) -> Tensor:
    """Gaussian pulses of height A at time c, written without a fast sum."""
    height, centre = components.unsqueeze(-1).unbind(-2)
    times = TIMES.to(components)
    return height * torch.exp(-0.5 * ((times - centre) / 0.2) ** 2)


def pulses() -> Problem:
    low, high = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 1.0])
    prior = VariableKPrior(
        BoxUniform(low, high),
        [1.0, 1.0, 1.0, 1.0],
        shared=BoxUniform(torch.tensor([0.1]), torch.tensor([0.5])),
        order_by=1,
    )
    return Problem(
        "pulses", prior, AdditiveSimulator(pulse, WhiteNoise(), prior.layout)
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "pulses": pulses,
    "sinusoids": sinusoids,
    "linear-gaussian": linear_gaussian,
}


@pytest.fixture(params=PROBLEMS, name="problem")
def _problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]()


def directly(problem: Problem, theta: Tensor) -> np.ndarray:
    """Add the active components up one at a time, in float64."""
    simulator, layout = problem.simulator, problem.layout
    parts = layout.unpack(theta.double())
    total = np.zeros((len(theta), problem.num_data))
    for i, k in enumerate(parts.cardinality.tolist()):
        for component in parts.components[i, :k]:
            total[i] += simulator.component_signal(component).numpy()
    return total


def sigma_of(problem: Problem, theta: Tensor) -> np.ndarray:
    if not problem.layout.num_shared:
        return np.ones(len(theta))
    return problem.layout.unpack(theta.double()).shared[:, 0].numpy()


# signals


def test_the_signal_is_the_sum_of_the_active_components(problem: Problem) -> None:
    theta = problem.prior.sample((60,))
    signal = problem.simulator.signal(theta)
    assert signal.shape == (60, problem.num_data)
    assert signal.dtype == theta.dtype
    np.testing.assert_allclose(signal, directly(problem, theta), atol=1e-5)
    exact = problem.simulator.signal(theta.double())
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact, directly(problem, theta), atol=1e-12)


def test_component_signals_add_up_to_the_signal(problem: Problem) -> None:
    theta = problem.prior.sample((4, 15))
    each = problem.simulator.component_signals(theta)
    slots = problem.layout.max_cardinality
    assert each.shape == (4, 15, slots, problem.num_data)
    torch.testing.assert_close(
        each.sum(-2), problem.simulator.signal(theta), rtol=0, atol=1e-5
    )
    active = problem.layout.unpack(theta).mask
    assert (each[~active] == 0).all()
    assert each[active].abs().amax(-1).gt(0).all()


def test_a_component_that_is_exactly_zero_counts() -> None:
    problem = linear_gaussian()
    simulator = AdditiveSimulator(
        lambda components: components @ torch.eye(2) + 1.0,
        WhiteNoise(1.0),
        problem.layout,
    )
    theta = problem.layout.pack(torch.tensor([0, 2]), torch.zeros(2, 3, 2))
    assert simulator.signal(theta).tolist() == [[0.0, 0.0], [2.0, 2.0]]
    assert simulator.component_signals(theta)[1].tolist() == [
        [1.0, 1.0],
        [1.0, 1.0],
        [0.0, 0.0],
    ]


@pytest.mark.parametrize("preset", ["tiny", "paper", "crowded"])
def test_a_plain_callable_gives_the_fast_signals_total(preset: Any) -> None:
    problem = sinusoids(preset)
    fast = problem.simulator
    signal = fast.component_signal
    plain = AdditiveSimulator(lambda c: signal(c), fast.noise, problem.layout)
    theta = problem.prior.sample((30,))
    torch.testing.assert_close(
        plain.signal(theta), fast.signal(theta), rtol=0, atol=1e-5
    )


def test_the_order_of_the_components_does_not_matter(problem: Problem) -> None:
    theta = problem.prior.sample((60,))
    signal = problem.simulator.signal(problem.layout.relabel(theta))
    torch.testing.assert_close(
        signal, problem.simulator.signal(theta), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_the_chunk_size_does_not_change_results(
    chunk_size: int, problem: Problem
) -> None:
    whole = problem.simulator
    parts = AdditiveSimulator(
        whole.component_signal, whole.noise, problem.layout, chunk_size
    )
    theta = problem.prior.sample((60,))
    x = whole(theta)
    torch.testing.assert_close(
        parts.signal(theta), whole.signal(theta), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        parts.log_likelihood(theta, x), whole.log_likelihood(theta, x)
    )
    torch.testing.assert_close(
        parts.log_likelihood(theta, x[0]), whole.log_likelihood(theta, x[0])
    )


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_the_batch_shape_of_theta_is_kept(
    batch: tuple[int, ...], problem: Problem
) -> None:
    theta = problem.prior.sample(batch)
    assert problem.simulator(theta).shape == (*batch, problem.num_data)
    assert problem.simulator.signal(theta).shape == (*batch, problem.num_data)


def test_no_rows_give_no_data(problem: Problem) -> None:
    theta = problem.prior.sample((0,))
    num = problem.num_data
    assert problem.simulator(theta).shape == (0, num)
    assert problem.simulator.signal(theta).shape == (0, num)
    slots = problem.layout.max_cardinality
    assert problem.simulator.component_signals(theta).shape == (0, slots, num)
    assert problem.log_likelihood(theta, torch.zeros(num)).shape == (0,)


def test_empty_sets_have_no_signal(problem: Problem) -> None:
    prior = problem.prior.with_cardinality(
        [1.0, *[0.0] * problem.prior.max_cardinality]
    )
    theta = prior.sample((5,))
    signal = problem.simulator.signal(theta)
    assert signal.shape == (5, problem.num_data)
    assert (signal == 0).all()


# noise


def test_an_empty_set_gives_pure_noise(problem: Problem) -> None:
    prior = problem.prior.with_cardinality(
        [1.0, *[0.0] * problem.prior.max_cardinality]
    )
    theta = prior.sample((500,))
    noise = problem.simulator(theta).double().numpy()
    scaled = noise / sigma_of(problem, theta)[:, None]
    # false alarm in 1 of 10^6 seeds
    assert stats.kstest(scaled.ravel(), "norm").pvalue > 1e-6


def test_a_generator_decides_the_noise_alone(problem: Problem) -> None:
    theta = problem.prior.sample((200,))
    torch.manual_seed(1)
    first = problem.simulator(theta, torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    again = problem.simulator(theta, generator)
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(problem.simulator(theta, generator), first)


def test_without_a_generator_torchs_global_one_decides(problem: Problem) -> None:
    theta = problem.prior.sample((200,))
    torch.manual_seed(1)
    first, second = problem.simulator(theta), problem.simulator(theta)
    torch.manual_seed(1)
    assert torch.equal(problem.simulator(theta), first)
    assert not torch.equal(first, second)


# likelihood


def test_the_likelihood_equals_scipys(problem: Problem) -> None:
    theta = problem.prior.sample((40,))
    x = problem.simulator(theta)
    value = problem.log_likelihood(theta, x)
    assert value.dtype == torch.float64
    mean = directly(problem, theta)
    scale = sigma_of(problem, theta)[:, None]
    expected = stats.norm.logpdf(x.double().numpy(), mean, scale).sum(-1)
    np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_the_likelihood_does_not_depend_on_the_labelling(problem: Problem) -> None:
    theta = problem.prior.sample((40,))
    x = problem.simulator(theta)
    torch.testing.assert_close(
        problem.log_likelihood(problem.layout.relabel(theta), x),
        problem.log_likelihood(theta, x),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("rows", "data"),
    [((), ()), ((5,), ()), ((5,), (1,)), ((), (3,)), ((4, 1), (3,)), ((1, 3), (4, 1))],
)
def test_theta_and_x_broadcast(
    rows: tuple[int, ...], data: tuple[int, ...], problem: Problem
) -> None:
    theta = problem.prior.sample(rows)
    x = problem.simulator(problem.prior.sample(data))
    value = problem.log_likelihood(theta, x)
    shape = np.broadcast_shapes(rows, data)
    assert value.shape == shape
    full_theta = theta.expand(*shape, -1).reshape(-1, problem.layout.size)
    full_x = x.expand(*shape, -1).reshape(-1, problem.num_data)
    pairs = zip(full_theta, full_x, strict=True)
    one_by_one = torch.stack([problem.log_likelihood(t, y) for t, y in pairs])
    torch.testing.assert_close(value.flatten(), one_by_one)


def test_the_likelihood_vanishes_where_sigma_does() -> None:
    # sigma = 0 is inside the support of this preset, where a clamp can put it
    problem = sinusoids("paper")
    parts = problem.layout.unpack(problem.prior.sample((4,)))
    theta = problem.layout.pack(
        parts.cardinality, parts.components, torch.zeros_like(parts.shared)
    )
    assert problem.prior.support.check(theta).all()
    x = torch.ones(problem.num_data)
    assert problem.log_likelihood(theta, x).tolist() == [-math.inf] * 4


# what is refused


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_x_must_be_finite(bad: float, problem: Problem) -> None:
    x = torch.zeros(2, problem.num_data)
    x[1, -1] = bad
    with pytest.raises(ValueError, match="x must be finite, got NaN or Inf"):
        problem.log_likelihood(problem.prior.sample((2,)), x)


@pytest.mark.parametrize("offset", [-1, 1])
def test_x_must_have_the_length_of_the_signal(offset: int, problem: Problem) -> None:
    num = problem.num_data
    for shape in ((num + offset,), (2, num + offset)):
        with pytest.raises(ValueError, match=f"x must have {num} entries .*got"):
            problem.log_likelihood(problem.prior.sample((2,)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (1,), (2, 1)])
def test_x_of_one_number_is_not_stretched(
    shape: tuple[int, ...], problem: Problem
) -> None:
    with pytest.raises(ValueError, match="x must have"):
        problem.log_likelihood(problem.prior.sample((2,)), torch.zeros(shape))


def test_x_holds_numbers_of_any_kind(problem: Problem) -> None:
    theta = problem.prior.sample((2,))
    integers = torch.arange(problem.num_data) % 3
    expected = problem.log_likelihood(theta, integers.double())
    for x in (
        integers,
        integers.numpy(),
        integers.tolist(),
        integers.numpy().astype(">f8"),
        integers.flip(0).numpy()[::-1],
    ):
        torch.testing.assert_close(problem.log_likelihood(theta, x), expected)
    for bad in (integers > 0, 1j * integers, ["a"] * problem.num_data):
        with pytest.raises(TypeError, match="x must hold real numbers, got"):
            problem.log_likelihood(theta, bad)


def test_malformed_theta_is_rejected_everywhere(problem: Problem) -> None:
    simulator, x = problem.simulator, torch.zeros(problem.num_data)
    calls: list[Callable[[Tensor], Tensor]] = [
        simulator,
        simulator.signal,
        simulator.component_signals,
        lambda theta: simulator.log_likelihood(theta, x),
    ]
    theta = problem.prior.sample((2,))
    for call in calls:
        with pytest.raises(ValueError, match="theta must be finite"):
            call(theta * math.nan)
        with pytest.raises(ValueError, match="entries on its last axis"):
            call(theta[:, :-1])
        with pytest.raises(ValueError, match="integer cardinality"):
            call(torch.full_like(theta, 0.5))
        with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
            call(theta.long())


def test_the_chunk_size_must_be_positive(problem: Problem) -> None:
    simulator = problem.simulator
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        AdditiveSimulator(
            simulator.component_signal, simulator.noise, problem.layout, chunk_size=0
        )


# sbi


@pytest.mark.parametrize("num_workers", [1, 2])
def test_sbi_simulates_reproducibly(num_workers: int) -> None:
    problem = sinusoids("tiny")
    prior, _, returns_numpy = process_prior(problem.prior)
    simulator = process_simulator(problem.simulator, prior, returns_numpy)

    def simulate(seed: int) -> tuple[Tensor, Tensor]:
        return simulate_for_sbi(
            simulator,
            prior,
            num_simulations=12,
            num_workers=num_workers,
            simulation_batch_size=4,
            seed=seed,
            show_progress_bar=False,
        )

    theta, x = simulate(1)
    assert theta.dtype == x.dtype == torch.float32
    assert theta.shape == (12, problem.layout.size)
    assert x.shape == (12, problem.num_data)
    assert problem.prior.support.check(theta).all()
    again = simulate(1)
    assert torch.equal(again[0], theta)
    assert torch.equal(again[1], x)
    assert not torch.equal(simulate(2)[1], x)
    residual = x - problem.simulator.signal(theta)
    noise = residual / problem.layout.unpack(theta).shared
    # no two rows share their noise: 66 correlations of 300 samples, each beyond
    # 6 standard errors in 2 of 10^9 seeds
    correlation = torch.corrcoef(noise) - torch.eye(12)
    assert correlation.abs().max() < 6 / math.sqrt(problem.num_data)


# white noise


@pytest.mark.parametrize(
    "noise", [WhiteNoise(0.7), WhiteNoise(), WhiteNoise(shared_index=1)]
)
def test_the_density_is_that_of_independent_normals(noise: WhiteNoise) -> None:
    shared = torch.rand(5, 2, dtype=torch.float64) + 0.2
    residual = torch.randn(5, 11, dtype=torch.float64)
    if noise.sigma is None:
        scale = shared[:, noise.shared_index]
    else:
        scale = torch.full((5,), noise.sigma, dtype=torch.float64)
    expected = stats.norm.logpdf(residual, scale=scale[:, None]).sum(-1)
    torch.testing.assert_close(
        noise.log_prob(residual, shared), torch.from_numpy(expected)
    )


@pytest.mark.parametrize("shared_index", [0, 1])
def test_the_standard_deviation_is_sigma(shared_index: int) -> None:
    shared = torch.tensor([[0.01, 0.5], [0.2, 3.0], [1.5, 1e-3]])
    noise = WhiteNoise(shared_index=shared_index)
    draws = noise.sample(torch.full((3, 100_000), 9.0), shared, None).double()
    for row, sigma in zip(draws, shared[:, shared_index].double(), strict=True):
        # false alarm in 1 of 10^6 seeds for each row
        assert stats.kstest((row / sigma).numpy(), "norm").pvalue > 1e-6
        # chi-square with 100,000 degrees of freedom, 5 standard deviations: 1 of 10^6
        chi_square = (row / sigma).square().sum().item()
        assert abs(chi_square - 100_000) < 5 * math.sqrt(2 * 100_000)


def test_no_noise_where_sigma_is_zero() -> None:
    assert (
        WhiteNoise(0.0).sample(torch.ones(2, 30), torch.ones(2, 0), None) == 0
    ).all()


def test_noise_that_reads_parameters_that_there_are_not_is_refused() -> None:
    layout = ThetaLayout(1, ("time",), shared_names=("sigma",))
    for noise in (
        GaussianNoise(errors=torch.ones(4), level=1),
        GaussianNoise(errors=lambda s: s[..., 1:2] + torch.ones(4), depends_on=1),
    ):
        with pytest.raises(ValueError, match="noise reads shared parameter 1"):
            AdditiveSimulator(lambda c: c + torch.zeros(4), noise, layout)
