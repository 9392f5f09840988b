"""Noise of other shapes: densities, draws and the way to white."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from sbi_slotflow import GaussianNoise, PoissonNoise, WhiteNoise

NUM = 9
ERRORS = torch.linspace(0.1, 0.5, NUM, dtype=torch.float64)
TIMES = torch.arange(NUM).double()
COVARIANCE = torch.exp(-(TIMES[:, None] - TIMES).abs() / 3) + 0.1 * torch.eye(NUM)


def circulant(spectrum: Tensor, num: int) -> Tensor:
    """The covariance of a spectrum, by its definition: eigenvalues of sines."""
    full = torch.cat([spectrum, spectrum[1 : (num + 1) // 2].flip(0)])
    row = torch.fft.ifft(full.to(torch.complex128)).real
    return torch.stack([row.roll(i) for i in range(num)])


def noises(level: int | None) -> dict[str, tuple[GaussianNoise, Tensor]]:
    odd = torch.linspace(2.0, 0.3, NUM // 2 + 1, dtype=torch.float64)
    return {
        "errors": (GaussianNoise(errors=ERRORS, level=level), ERRORS.square().diag()),
        "covariance": (GaussianNoise(covariance=COVARIANCE, level=level), COVARIANCE),
        "spectrum": (GaussianNoise(spectrum=odd, level=level), circulant(odd, NUM)),
    }


@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("name", ["errors", "covariance", "spectrum"])
def test_density_is_that_of_the_covariance(name: str, level: int | None) -> None:
    noise, covariance = noises(level)[name]
    residual = torch.randn(5, NUM, dtype=torch.float64, generator=seeded(1))
    shared = torch.tensor([[9.0, 0.5], [9.0, 1.0], [9.0, 2.0], [9.0, 3.0], [9.0, 0.1]])
    scales = shared[:, 1].double() if level else torch.ones(5).double()
    for row, s, value in zip(
        residual, scales, noise.log_prob(residual, shared), strict=True
    ):
        exact = torch.distributions.MultivariateNormal(
            torch.zeros(NUM).double(), s**2 * covariance
        )
        assert float(value) == pytest.approx(float(exact.log_prob(row)), rel=1e-9)
    white = noise.whiten(torch.eye(NUM).double(), shared.new_tensor([9.0, 2.0]))
    scale = 2.0 if level else 1.0
    torch.testing.assert_close(
        white.mT @ covariance @ white * scale**2, torch.eye(NUM).double()
    )


@pytest.mark.parametrize("num", [8, 9])
def test_a_flat_spectrum_is_white_noise(num: int) -> None:
    noise = GaussianNoise(spectrum=torch.full((num // 2 + 1,), 0.25))
    residual = torch.randn(4, num, dtype=torch.float64, generator=seeded(2))
    nothing = torch.zeros(4, 0)
    torch.testing.assert_close(
        noise.log_prob(residual, nothing), WhiteNoise(0.5).log_prob(residual, nothing)
    )
    torch.testing.assert_close(noise.whiten(residual, nothing), 2 * residual)


@pytest.mark.parametrize("name", ["errors", "covariance", "spectrum"])
def test_draws_have_the_covariance(name: str) -> None:
    # each of 81 entries within 5 standard errors: 1 of 20,000 seeds fails
    noise, covariance = noises(0)[name]
    num = 20_000
    signal, shared = torch.zeros(num, NUM), torch.full((num, 1), 2.0)
    draws = noise.sample(signal, shared, seeded(3)).double()
    assert draws.dtype == torch.float64
    found, expected = draws.mT @ draws / num, 4 * covariance
    size = expected.diagonal()
    error = (size[:, None] * size + expected.square()).sqrt() / math.sqrt(num)
    assert ((found - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("unit", [1e-21, 1e21])
def test_units_do_not_matter(unit: float) -> None:
    noise, same = GaussianNoise(errors=unit * ERRORS), GaussianNoise(errors=ERRORS)
    residual, nothing = torch.linspace(-1, 1, NUM).double(), torch.zeros(0)
    shift = NUM * math.log(unit)
    value = noise.log_prob(unit * residual, nothing) + shift
    torch.testing.assert_close(value, same.log_prob(residual, nothing))


def test_a_level_that_is_not_positive_has_no_density() -> None:
    noise = GaussianNoise(errors=ERRORS, level=0)
    values = noise.log_prob(torch.zeros(3, NUM), torch.tensor([[-1.0], [0.0], [1.0]]))
    assert values[:2].isneginf().all()
    assert values[2].isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"errors": ERRORS, "spectrum": ERRORS}, "exactly one"),
        ({"errors": -ERRORS}, "must be positive"),
        ({"errors": ERRORS * math.nan}, "must be finite"),
        ({"errors": ERRORS[None]}, "must have shape"),
        ({"covariance": COVARIANCE[:3]}, "square and symmetric"),
        ({"covariance": -COVARIANCE}, "positive definite"),
        ({"covariance": COVARIANCE.triu()}, "symmetric"),
        ({"errors": ERRORS, "level": -1}, "level"),
    ],
)
def test_what_is_no_noise_is_refused(arguments, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        GaussianNoise(**arguments)


def falling(shared: Tensor) -> Tensor:
    frequency = torch.fft.rfftfreq(NUM).clamp(min=1 / NUM)
    return frequency ** -shared[..., 2:3]


def jitter(shared: Tensor) -> Tensor:
    return torch.hypot(ERRORS, shared[..., 2:3])


@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("kind", ["errors", "spectrum"])
def test_a_shape_may_depend_on_shared_parameters(kind: str, level: int | None) -> None:
    function = {"errors": jitter, "spectrum": falling}[kind]
    noise = GaussianNoise(**{kind: function}, level=level, depends_on=2)  # pyright: ignore
    residual = torch.randn(3, NUM, dtype=torch.float64, generator=seeded(1))
    shared = torch.tensor([[9.0, 0.5, 0.3], [9.0, 1.0, 1.1], [9.0, 2.0, 0.0]]).double()
    values, white = noise.log_prob(residual, shared), noise.whiten(residual, shared)
    for i, row in enumerate(shared):
        fixed = GaussianNoise(**{kind: function(row)}, level=level)  # pyright: ignore
        torch.testing.assert_close(values[i], fixed.log_prob(residual[i], row))
        torch.testing.assert_close(white[i], fixed.whiten(residual[i], row))
    many = torch.zeros(20_000, NUM).double()
    drawn = noise.sample(many, shared[:1].expand(20_000, -1), seeded(2))
    expected = noise.root(shared[0], NUM).square() * noise.scale(shared[0]) ** 2
    # Each is a mean of 20,000 at least; 5 deviations, under one in 10^5 in all.
    error = noise.power(drawn).mean(0) / expected - 1
    assert error.abs().max() < 5 * math.sqrt(2 / 20_000)
    with pytest.raises(TypeError, match="no one space"):
        noise.unit_white(residual)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"errors": jitter}, "depends_on must say"),
        ({"errors": ERRORS, "depends_on": 1}, "depends_on is for"),
        ({"covariance": jitter, "depends_on": 1}, "covariance must be an array"),
        ({"errors": jitter, "depends_on": 1, "level": 1}, "not the level"),
        ({"errors": jitter, "depends_on": (2, 2)}, "each parameter once"),
        ({"errors": jitter, "depends_on": -1}, "depends_on"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(arguments, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        GaussianNoise(**arguments)


def test_what_a_function_returns_is_checked() -> None:
    rows, residual = torch.ones(4, 3), torch.zeros(4, NUM)
    for function, message in (
        (lambda s: -jitter(s), "must be positive"),
        (lambda s: jitter(s)[..., :3], "must have 9 entries"),
        (lambda s: jitter(s)[0], "must map shared parameters"),
        (lambda s: s[..., 0], r"shared\[..., i : i \+ 1\] keeps the last axis"),
        (lambda s: jitter(s) * math.inf, "finite"),
        (lambda s: jitter(s) * math.nan, "finite"),
    ):
        noise = GaussianNoise(errors=function, depends_on=2)
        with pytest.raises(ValueError, match=message):
            noise.log_prob(residual, rows)


def test_a_signal_of_another_length_is_refused() -> None:
    for noise, _ in noises(None).values():
        with pytest.raises(ValueError, match="entries for signals of 20"):
            noise.log_prob(torch.zeros(20), torch.zeros(0))


def test_counts_have_their_probability() -> None:
    signal = torch.tensor([[0.5, 3.0, 40.0, 0.0]]).double()
    counts = torch.tensor([[1.0, 2.0, 37.0, 0.0]]).double()
    noise, nothing = PoissonNoise(), torch.zeros(1, 0)
    value = noise.log_prob_about(counts - signal, signal, nothing)
    expected = stats.poisson.logpmf(counts.numpy(), signal.numpy()).sum()
    assert float(value) == pytest.approx(expected)
    for bad in (counts - 5, counts + torch.tensor([0, 0, 0, 1.0])):
        assert noise.log_prob_about(bad - signal, signal, nothing).isneginf()
    with pytest.raises(TypeError, match="depends on the signal"):
        noise.log_prob(counts, nothing)


def test_counts_are_drawn_about_the_signal() -> None:
    # mean and variance within five standard errors: 1 of 10^6 seeds fails
    num, rate = 40_000, 7.0
    signal = torch.full((num, 1), rate)
    counts = signal + PoissonNoise().sample(signal, torch.zeros(num, 0), seeded(5))
    assert torch.equal(counts, counts.round())
    assert abs(float(counts.mean()) - rate) < 5 * math.sqrt(rate / num)
    error = rate * math.sqrt((2 + 1 / rate) / num)
    assert abs(float(counts.var()) - rate) < 5 * error
    assert np.asarray(counts).min() >= 0


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
