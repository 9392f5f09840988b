import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from sbi_slotflow import GaussianNoise, slot_nn
from sbi_slotflow.problems import Grid, Sinusoids, sinusoids
from sbi_slotflow.problems.sinusoids.problem import ResampledNoise

# K, amplitude, frequency, separation, sigma, samples of the two records
TABLE: dict[str, tuple[Any, ...]] = {
    "tiny": (range(4), (0.5, 1.5), (0.5, 2.0), 0.1, (0.1, 1.0), (200, 100)),
    "paper": (range(1, 11), (0.5, 1.5), (2.5, 3.0), 0.01, (0, 1.5), (3000, 5120)),
    "crowded": (range(11), (0.05, 1.5), (2.5, 3.0), None, (0.3, 1.5), (3000, 5120)),
}
RATES = {"tiny": (10, 50), "paper": (10, 512), "crowded": (10, 512)}


@pytest.fixture(params=TABLE, name="preset")
def _preset(request: pytest.FixtureRequest) -> Any:
    return request.param


def with_sigma(problem: Sinusoids, sigma: Tensor, k: int | None = None) -> Tensor:
    """Draw rows of the prior and give them these noise levels."""
    prior = problem.prior
    if k is not None:
        prior = prior.with_cardinality(
            [k == j for j in range(1 + prior.max_cardinality)]
        )
    parts = prior.layout.unpack(prior.sample((len(sigma),)))
    return prior.layout.pack(parts.cardinality, parts.components, sigma.unsqueeze(-1))


def standardised(problem: Sinusoids, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Noise of the long and the short record, divided by sigma, float64."""
    theta = with_sigma(problem, sigma)
    residual = problem.simulator(theta).double() - problem.simulator.signal(
        theta.double()
    )
    noise = residual / sigma.double().unsqueeze(-1)
    long, short = noise.split([grid.num_samples for grid in problem.grids], dim=-1)
    return long, short


def test_the_preset_is_the_one_of_the_table(preset: Any) -> None:
    cardinalities, amplitude, frequency, separation, sigma, lengths = TABLE[preset]
    problem = sinusoids(preset)
    prior, layout = problem.prior, problem.layout
    weights = [float(k in cardinalities) for k in range(cardinalities[-1] + 1)]
    expected = torch.tensor(weights) / sum(weights)
    torch.testing.assert_close(prior.cardinality_probs, expected)
    assert prior.min_separation == separation
    assert layout.order_by == 2
    assert problem.component_names == ("amplitude", "phase", "frequency")
    assert problem.shared_names == ("sigma",)
    assert layout.names[:5] == ["K", "sigma", "amplitude_1", "phase_1", "frequency_1"]
    assert [grid.num_samples for grid in problem.grids] == [*lengths]
    assert [grid.rate for grid in problem.grids] == [*RATES[preset]]
    assert problem.num_data == sum(lengths)
    x = problem.simulator(prior.sample((2,)))
    assert x.shape == (2, sum(lengths))
    assert x.dtype == torch.float32

    theta = prior.sample((20_000,))
    parts = layout.unpack(theta)
    active = parts.components[parts.mask].double()
    columns = [parts.shared[:, 0].double(), *active.unbind(-1)]
    ranges = [sigma, amplitude, (0.0, 2 * math.pi), frequency]
    for column, (low, high) in zip(columns, ranges, strict=True):
        # 20,000 draws or more miss 1 % of the range at an end in 1 of 10^9 seeds at
        # most (the logarithm of the amplitude's range is 3.4 wide in "crowded")
        width = high - low
        assert low - 1e-6 <= column.min() < low + 0.01 * width
        assert high - 0.01 * width < column.max() <= high + 1e-6


def test_parameters_have_the_law_of_the_table(preset: Any) -> None:
    _, amplitude, frequency, _, sigma, _ = TABLE[preset]
    problem = sinusoids(preset)
    # components of K = 1 are independent draws, whatever the separation
    weights = [float(k == 1) for k in range(problem.layout.max_cardinality + 1)]
    theta = problem.prior.with_cardinality(weights).sample((20_000,))
    parts = problem.layout.unpack(theta)
    first = parts.components[:, 0].double().numpy()
    family = stats.loguniform if preset == "crowded" else uniform_between
    pairs = [
        (parts.shared[:, 0].double().numpy(), uniform_between(*sigma)),
        (first[:, 0], family(*amplitude)),
        (first[:, 1], uniform_between(0.0, 2 * math.pi)),
        (first[:, 2], uniform_between(*frequency)),
    ]
    # false alarm in 4 of 10^6 seeds for each preset
    assert min(stats.kstest(a, b.cdf).pvalue for a, b in pairs) > 1e-6


def uniform_between(low: float, high: float) -> Any:
    return stats.uniform(low, high - low)


def test_the_noise_has_standard_deviation_sigma_on_both_records(preset: Any) -> None:
    problem = sinusoids(preset)
    sigma = torch.tensor([0.05, 0.3, 0.8, 1.5]).repeat_interleave(25)
    for stream in standardised(problem, sigma):
        for part in stream.reshape(4, -1).numpy():
            # exact two-sided chi-square bound, false alarm in 1 of 10^6 seeds for each
            # of the 24 noise levels, records and presets; it is 0.7 % wide in "paper"
            chi_square = stats.chi2(part.size)
            assert chi_square.ppf(5e-7) < np.square(part).sum() < chi_square.isf(5e-7)


def test_the_noise_is_normal_and_white(preset: Any) -> None:
    problem = sinusoids(preset)
    for stream in standardised(problem, torch.full((40,), 0.7)):
        # false alarm in 1 of 10^6 seeds for each of the 6 records
        assert stats.kstest(stream.flatten().numpy(), "norm").pvalue > 1e-6
        for lag in (1, 2, 5):
            products = stream[:, lag:] * stream[:, :-lag]
            # 18 correlations, each beyond 6 standard errors in 2 of 10^9 seeds
            assert abs(products.mean().item()) < 6 / math.sqrt(products.numel())


def cross_correlation(problem: Sinusoids) -> tuple[float, int]:
    """Correlation of the two records' noise at the times nearest to each other."""
    long, short = standardised(problem, torch.full((100,), 0.7))
    first, second = problem.grids
    times = first.times[first.times < second.duration]
    nearest = (times * second.rate).round().long()
    pairs = long[:, : len(times)], short[:, nearest]
    pair = torch.stack([p.flatten() for p in pairs])
    return torch.corrcoef(pair)[0, 1].item(), pair.shape[1]


def test_the_two_records_have_independent_noise(preset: Any) -> None:
    correlation, num = cross_correlation(sinusoids(preset))
    # 6 standard errors: false alarm in 2 of 10^9 seeds for each preset
    assert abs(correlation) < 6 / math.sqrt(num)


def test_the_likelihood_equals_scipys_on_both_records(preset: Any) -> None:
    problem = sinusoids(preset)
    theta = with_sigma(problem, torch.tensor([0.01, 0.3, 0.9, 1.5]))
    x = problem.simulator(theta)
    parts = problem.layout.unpack(theta.double())
    times = torch.cat([grid.times for grid in problem.grids]).numpy()
    for i in range(4):
        mean = np.zeros(problem.num_data)
        for a, phi, f in parts.components[i, : parts.cardinality[i]].tolist():
            mean += a * np.cos(2 * np.pi * f * times + phi)
        sigma = parts.shared[i, 0].item()
        expected = stats.norm.logpdf(x[i].double().numpy(), mean, sigma).sum()
        value = problem.log_likelihood(theta[i], x[i])
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(expected, rel=1e-9)


def test_the_true_parameters_are_more_likely_than_wrong_ones(preset: Any) -> None:
    problem = sinusoids(preset)
    theta = with_sigma(problem, torch.full((20,), 0.3), k=1)
    x = problem.simulator(theta)
    joint = problem.log_likelihood(theta.unsqueeze(1), x)
    # a wrong row explains x as well only if its one sinusoid is nearly the same
    assert (joint.argmax(0) == torch.arange(20)).float().mean() > 0.9


@pytest.mark.parametrize("name", ["tiny", "paper", "crowded"])
def test_likelihoods_of_many_rows_are_those_of_each(name: Any) -> None:
    # from statistics of the observation, and from the signal itself
    problem = sinusoids(name)
    theta = problem.prior.sample((300,))
    theta = torch.cat([theta, problem.layout.relabel(theta)])
    x = problem.simulator(theta[:3])
    expected = problem.simulator.log_likelihood(theta.unsqueeze(1), x)
    error = (problem.log_likelihood(theta.unsqueeze(1).expand(-1, 3, -1), x)) - expected
    assert (error.abs() < 1e-6 * expected.abs()).all()
    for i, one in enumerate(x):
        for data in (one, one.unsqueeze(0)):
            found = problem.log_likelihood(theta, data)
            assert (found - expected[:, i]).abs().max() < 1e-6 * expected.abs().max()
        # few rows, of a likelihood that is bound to the observation
        bound = problem.log_likelihood.given(one)(theta[:3])
        torch.testing.assert_close(bound, expected[:3, i], rtol=1e-6, atol=0)
    batch = problem.log_likelihood.given(x)(theta[:4].unsqueeze(1).expand(-1, 3, -1))
    torch.testing.assert_close(batch, expected[:4], rtol=1e-6, atol=0)
    # one row for all of as many observations as a row has entries
    many = problem.simulator(theta[: problem.layout.size])
    wide = problem.log_likelihood.given(many)(theta[:4].unsqueeze(1))
    direct = problem.simulator.log_likelihood(theta[:4].unsqueeze(1), many)
    torch.testing.assert_close(wide, direct, rtol=1e-6, atol=0)
    empty = theta[:200].clone()
    empty[:, 0], empty[:, 2:] = 0.0, 0.0
    if problem.prior.cardinality_probs[0] > 0:
        found = problem.log_likelihood(empty, x[0])
        direct = problem.simulator.log_likelihood(empty, x[0])
        torch.testing.assert_close(found, direct)


@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_the_phase_repeats_after_a_turn(preset: Any) -> None:
    problem = sinusoids(preset)
    assert problem.layout.periods == {"phase": 2 * math.pi}
    components = torch.tensor([0.8, 1.0, 0.9], dtype=torch.float64).expand(2, 1, -1)
    turn = torch.zeros_like(components, memory_format=torch.contiguous_format)
    turn[1, 0, 1] = 2 * math.pi
    first, second = problem.simulator.component_signal(components + turn)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_the_reference_time_is_the_middle_of_the_long_record(preset: Any) -> None:
    # There the phase says nothing about the frequency.
    problem = sinusoids(preset)
    grid = problem.grids[0]
    middle = float(grid.times.mean())
    assert problem.reference_time == pytest.approx(middle, abs=0.51 / grid.rate)


# resampled noise


@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_resampled_noise_is_smaller_than_sigma(preset: Any) -> None:
    problem = sinusoids(preset, noise="resampled")
    streams = standardised(problem, torch.full((100,), 0.7))
    for stream in streams:  # sqrt(2 / 3) = 0.816 where no sample meets the fine grid
        assert 0.75 < stream.std().item() < 0.88
    whole = torch.cat(streams, dim=-1)
    # at every sample an interpolation of two normals: between sqrt(1/2) and 1, less or
    # more 6 standard errors of 100 rows
    each = whole.square().mean(0).sqrt()
    assert each.min() > math.sqrt(0.5) - 0.3
    assert each.max() < 1 + 0.43


def test_resampled_noise_is_shared_by_the_two_records() -> None:
    correlation, _ = cross_correlation(sinusoids("paper", noise="resampled"))
    assert correlation > 0.5


def test_resampled_noise_exists_for_a_record_of_one_sample() -> None:
    noise = ResampledNoise((Grid(1.0, 1.0),))
    drawn = noise.sample(torch.zeros(5, 1), torch.full((5, 1), 2.0), None)
    assert drawn.shape == (5, 1)
    assert (drawn != 0).all()


def test_resampled_noise_has_no_likelihood() -> None:
    problem = sinusoids("tiny", noise="resampled")
    theta = problem.prior.sample((2,))
    x = problem.simulator(theta)
    assert x.shape == (2, 300)
    with pytest.raises(
        NotImplementedError, match='noise="resampled" has no likelihood'
    ):
        problem.log_likelihood(theta, x)


def test_resampled_noise_takes_its_randomness_from_the_generator() -> None:
    problem = sinusoids("tiny", noise="resampled")
    theta = problem.prior.sample((20,))
    state = torch.random.get_rng_state()
    first = problem.simulator(theta, torch.Generator().manual_seed(1))
    again = problem.simulator(theta, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)


# what is refused


def test_an_unknown_preset_or_noise_is_rejected() -> None:
    bad: Any = "large"
    with pytest.raises(ValueError, match=r"preset must be one of \['crowded', 'paper'"):
        sinusoids(bad)
    with pytest.raises(ValueError, match=r"noise must be one of \['resampled', 'white"):
        sinusoids("tiny", noise=bad)


def test_one_spectrum_is_not_that_of_several_records() -> None:
    noise = GaussianNoise(spectrum=torch.ones(151))
    with pytest.raises(ValueError, match="several records, got 2"):
        sinusoids("tiny", noise=noise)
    problem = sinusoids("tiny", noise=noise, grids=Grid(30.0, 10.0))
    assert problem.num_data == 300


def test_a_problem_of_ones_own_changes_what_it_names() -> None:
    problem = sinusoids(
        "crowded",
        grids=[Grid(60.0, 1.0)],
        cardinality=[0.0, 1.0, 3.0],
        amplitude=(0.2, 12.0),
        frequency=(0.02, 0.48),
        sigma=(0.05, 2.0),
        separation=0.01,
    )
    prior = problem.prior
    assert problem.num_data == 60
    assert prior.cardinality_probs.tolist() == [0.0, 0.25, 0.75]
    amplitude, _, frequency = prior.component_marginals
    assert amplitude.bounds == pytest.approx((0.2, 12.0))
    assert amplitude.is_log_uniform  # the preset's
    assert frequency.bounds == pytest.approx((0.02, 0.48))
    assert prior.shared_marginals[0].bounds == pytest.approx((0.05, 2.0))
    assert prior.min_separation == 0.01
    assert problem.name == "sinusoids"
    theta = prior.sample((4,))
    parts = problem.layout.unpack(theta.double())
    times = torch.arange(60, dtype=torch.float64)
    amplitude, phase, frequency = parts.components.unsqueeze(-1).unbind(-2)
    waves = amplitude * torch.cos(2 * math.pi * frequency * times + phase)
    waves = torch.where(parts.mask.unsqueeze(-1), waves, 0.0)
    torch.testing.assert_close(problem.simulator.signal(theta.double()), waves.sum(1))


def test_a_known_noise_level_is_no_parameter() -> None:
    problem, free = sinusoids("tiny", sigma=0.5), sinusoids("tiny")
    assert problem.shared_names == ()
    assert problem.noise_level is None
    theta = problem.prior.sample((150,))
    noise = problem.simulator(theta) - problem.simulator.signal(theta)
    # five standard errors: a false alarm in 1 of 10^6 seeds
    assert noise.std() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(2 * noise.numel()))
    level = torch.full((150, 1), 0.5)
    with_level = torch.cat([theta[:, :1], level, theta[:, 1:]], -1)
    x = problem.simulator(theta[0])
    expected = free.simulator.log_likelihood(with_level, x)
    found = problem.log_likelihood
    for values in (found(theta, x), found.given(x)(theta), found(theta[:9], x)):
        known = expected[: len(values)]
        torch.testing.assert_close(values, known, rtol=1e-6, atol=0)
    estimator = slot_nn(problem)(theta, problem.simulator(theta))
    drawn = estimator.sample(torch.Size((2,)), problem.simulator(theta[:5]))
    assert problem.prior.support.check(drawn).all()


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_ranges_and_grids_come_in_any_container(kind: Any) -> None:
    grid = Grid(60.0, 1.0)
    found = sinusoids(
        "tiny",
        amplitude=kind([0.2, 12.0]),
        frequency=kind([0.02, 0.48]),
        sigma=kind([0.05, 2.0]),
        separation=0.0,
        grids=grid,
    )
    expected = sinusoids(
        "tiny",
        amplitude=(0.2, 12.0),
        frequency=(0.02, 0.48),
        sigma=(0.05, 2.0),
        separation=0.0,
        grids=[grid],
    )
    assert found.grids == expected.grids == (grid,)
    pairs = zip(
        found.prior.component_marginals, expected.prior.component_marginals, strict=True
    )
    for one, other in pairs:
        assert one.bounds == pytest.approx(other.bounds)
    assert found.prior.shared_marginals[0].bounds == pytest.approx((0.05, 2.0))


@pytest.mark.parametrize("slots", ["anchored", "attention"])
@pytest.mark.parametrize("num", [1, 3])
def test_networks_read_any_number_of_records(num: int, slots: Any) -> None:
    grids = [Grid(40.0, 4.0), Grid(10.0, 8.0), Grid(5.0, 16.0)][:num]
    problem = sinusoids("tiny", grids=grids)
    theta = problem.prior.sample((6,))
    x = problem.simulator(theta)
    estimator = slot_nn(problem, slots=slots)(theta, x)
    estimator.loss(theta, x).mean().backward()
    drawn = estimator.sample(torch.Size((3,)), x)
    assert torch.isfinite(estimator.log_prob(drawn, x)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amplitude": (0.0, 1.0)}, "amplitude must be .* and least > 0"),
        ({"frequency": (3.0, 2.0)}, "frequency must be"),
        ({"frequency": (0.01, 5.5)}, "frequency must end at or below 5"),
        ({"sigma": (-1.0, 1.0)}, "sigma must be"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"sigma": math.nan}, "sigma must be positive"),
        ({"sigma": 0.5, "noise": "resampled"}, "sigma must be a range if noise"),
        ({"amplitude": (1.0, math.nan)}, "amplitude must be"),
        ({"separation": -0.1}, "separation"),
        ({"grids": []}, "grids must hold at least one"),
        ({"grids": [Grid(1.0, 10.0), Grid(2.0, 10.0)]}, "the longest first"),
    ],
)
def test_changes_that_make_no_problem_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sinusoids("crowded", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amplitude": 1.0}, "amplitude must be \\(least, largest\\), got 1.0"),
        ({"frequency": (1.0, 2.0, 3.0)}, "frequency must be"),
        ({"sigma": "low"}, "sigma must be a number or"),
        ({"grids": [(1.0, 10.0)]}, "grids must be a Grid or several, got tuple"),
        ({"sigmas": 1.0}, "sigmas"),
    ],
)
def test_arguments_of_another_kind_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        sinusoids("tiny", **changes)


def test_a_grid_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="rate must be positive"):
        Grid(1.0, 0.0)
    with pytest.raises(ValueError, match="duration must be positive"):
        Grid(math.inf, 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        Grid(0.1, 1.0)
