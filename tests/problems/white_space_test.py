"""A background is fitted along with the components, whatever the noise."""

import math
from dataclasses import replace

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor

from sbi_slotflow import (
    AdditiveSimulator,
    GaussianNoise,
    PoissonNoise,
    SlotDensityEstimator,
    VariableKPrior,
    WhiteNoise,
    rjmcmc,
    slot_nn,
)
from sbi_slotflow.problems import Trace
from sbi_slotflow.problems.white_space import linear_background, white_space

NUM = 64
TIMES = torch.arange(NUM).double() / NUM


def bump(components: Tensor) -> Tensor:
    time, height = components.unsqueeze(-1).unbind(-2)
    return height * torch.exp(-0.5 * ((TIMES.to(components) - time) / 0.03) ** 2)


def line(shared: Tensor) -> Tensor:
    """An offset, a slope, and a bump that is known to be there."""
    times = TIMES.to(shared)
    known = 3 * torch.exp(-0.5 * ((times - 0.9) / 0.05) ** 2)
    return shared[..., 1:2] + shared[..., 2:3] * (times - 0.5) + known


def curved(shared: Tensor) -> Tensor:
    return torch.exp(-TIMES.to(shared) * shared[..., 1:2]) + shared[..., 2:3]


COVARIANCE = 0.04 * torch.exp(-(TIMES[:, None] - TIMES).abs() / 0.05)
NOISES = {
    "white": WhiteNoise(),
    "errors": GaussianNoise(errors=0.1 + 0.2 * TIMES, level=0),
    "covariance": GaussianNoise(
        covariance=COVARIANCE + 0.01 * torch.eye(NUM).double(), level=0
    ),
    "counts": PoissonNoise(),
}


def problem(noise: str = "errors", background=line, weights=(1.0, 1.0, 1.0)) -> Trace:
    counts = noise == "counts"
    low, high = (20.0, 60.0) if counts else (0.3, 2.0)
    base = torch.tensor([0.5, 10.0, -5.0] if counts else [0.5, -2.0, -2.0])
    top = torch.tensor([2.0, 40.0, 5.0] if counts else [2.0, 2.0, 2.0])
    prior = VariableKPrior(
        BoxUniform(torch.tensor([0.0, low]), torch.tensor([1.0, high])),
        list(weights),
        shared=BoxUniform(base, top),
        component_names=("time", "height"),
        shared_names=("level", "offset", "slope"),
    )
    simulator = AdditiveSimulator(
        bump, NOISES[noise], prior.layout, background=background
    )
    return Trace("bumps", prior, simulator, 32, linear=("height",))


def test_the_background_is_part_of_the_signal() -> None:
    mine = problem()
    theta = mine.prior.sample((20,), seeded(1))
    shared = mine.layout.unpack(theta).shared
    alone = mine.simulator.component_signals(theta).sum(-2)
    torch.testing.assert_close(mine.simulator.signal(theta), alone + line(shared))
    none = mine.layout.pack(torch.zeros(20).long(), torch.zeros(20, 2, 2), shared)
    torch.testing.assert_close(mine.simulator.signal(none), line(shared))
    x = mine.simulator(theta, seeded(2))
    residual = (x - mine.simulator.signal(theta)).double()
    expected = NOISES["errors"].log_prob(residual, shared)
    found = mine.log_likelihood(theta, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_columns_are_found() -> None:
    mine = problem()
    found = linear_background(mine.simulator, mine.prior)
    assert found is not None
    # All but the noise level; the data know the offset better than the slope.
    assert found.indices == (2, 1)
    torch.testing.assert_close(found.columns[0], TIMES - 0.5)
    torch.testing.assert_close(found.columns[1], torch.ones(NUM).double())
    exact = torch.tensor([4 / 3, 4 / 3]).double()
    torch.testing.assert_close(found.covariance.diagonal(), exact, rtol=0.1, atol=0.0)
    torch.testing.assert_close(found.constant, line(torch.zeros(3).double()))


def shape_of(noise: str) -> Tensor:
    """The noise's covariance at level one."""
    if noise == "errors":
        return (0.1 + 0.2 * TIMES).square().diag()
    if noise == "covariance":
        return COVARIANCE + 0.01 * torch.eye(NUM).double()
    return torch.eye(NUM).double()


def spread_of(mine: Trace) -> Tensor:
    """The background's prior covariance in the data."""
    found = linear_background(mine.simulator, mine.prior)
    assert found is not None
    return found.columns.mT @ found.covariance @ found.columns


@pytest.mark.parametrize("noise", ["white", "errors", "covariance"])
def test_noise_and_background_are_white_together(noise: str) -> None:
    mine, level = problem(noise), 0.515
    space = white_space(mine.simulator, mine.prior)
    assert space is not None
    assert space.level == pytest.approx(level)
    here = space.given(torch.zeros(NUM, NUM))
    matrix = here(torch.eye(NUM).double(), torch.arange(NUM))
    both = level**2 * shape_of(noise) + spread_of(mine)
    torch.testing.assert_close(
        matrix.mT @ both @ matrix, level**2 * torch.eye(NUM).double()
    )


def test_a_well_known_background_hides_no_component() -> None:
    # A source whose flux is known to 5 %, where components of its shape may be.
    mine = problem()
    shape = bump(torch.tensor([0.5, 1.0]).double())
    prior = VariableKPrior(
        mine.prior.component,
        [1, 1],
        shared=BoxUniform(torch.tensor([0.95]), torch.tensor([1.05])),
        component_names=("time", "height"),
        shared_names=("flux",),
    )
    simulator = AdditiveSimulator(
        bump,
        GaussianNoise(errors=0.2 * torch.ones(NUM)),
        prior.layout,
        background=lambda s: s[..., :1] * shape.to(s),
    )
    space = white_space(simulator, prior)
    assert space is not None
    seen = space.given(torch.stack([shape, 2 * shape])).data
    assert float(seen[0].norm()) < 0.01 * float(seen[1].norm())
    assert float(seen[1].norm()) > 0.8 * float((shape / 0.2).norm())


def test_a_known_level_of_white_noise_counts() -> None:
    mine = problem("white")
    known = AdditiveSimulator(bump, WhiteNoise(50.0), mine.layout, background=line)
    space = white_space(known, mine.prior)
    assert space is not None
    gram = space.given(torch.zeros(1, NUM)).moments(
        torch.zeros(1, NUM).double(), torch.zeros(1).long()
    )[1]
    last = space.indices.index(1)
    assert float(gram[0, last, last]) == pytest.approx(NUM / 50**2)


def test_the_background_of_counts_is_not_low() -> None:
    # weighted by the counts themselves it would be by one count in ten
    mine = problem("counts", background=lambda s: s[..., 1:2] + 0 * TIMES.to(s))
    space = white_space(mine.simulator, mine.prior)
    assert space is not None
    rate = torch.full((400, NUM), 4.0)
    x = rate + PoissonNoise().sample(rate, torch.zeros(400, 0), seeded(1))
    zero = torch.zeros(400, NUM).double()
    right, gram = space.given(x).moments(zero, torch.arange(400))
    at = space.indices.index(1)
    found = right[:, at] / gram[:, at, at]
    # five standard errors: 1 of 10^6 seeds fails
    assert abs(float(found.mean()) - 4.0) < 5 * 2 / (400 * NUM) ** 0.5
    deviation = gram[:, at, at].rsqrt()
    torch.testing.assert_close(
        deviation.mean(), torch.tensor((4 / NUM) ** 0.5).double(), rtol=0.02, atol=0.0
    )


@pytest.mark.parametrize("noise", ["white", "errors", "covariance"])
def test_equations_are_those_of_a_joint_fit(noise: str) -> None:
    mine = problem(noise)
    fit = mine.build_fit()
    assert fit is not None
    theta = mine.prior.with_cardinality([0, 0, 1]).sample((4,), seeded(3))
    x = mine.simulator(theta, seeded(4)).double()
    owner, mask = torch.arange(4), torch.ones(4, 2, dtype=torch.bool)
    components = mine.layout.unpack(theta.double()).components
    found = fit.given(x).normal_equations(owner, components, mask)
    # Generalised least squares of the data's covariance, background included.
    both = 0.515**2 * shape_of(noise) + spread_of(mine)
    metric = 0.515**2 * torch.linalg.inv(both)
    background = linear_background(mine.simulator, mine.prior)
    assert background is not None
    usual = background.constant + background.mean @ background.columns
    for i in range(4):
        left = x[i] - usual - bump(components[i]).sum(0)
        jacobian = torch.autograd.functional.jacobian(
            lambda c: bump(c.reshape(2, 2)).sum(0), components[i].reshape(-1)
        )
        tolerance = 1e-7 * float(found.curvature[i].abs().max())
        torch.testing.assert_close(found.residual[i], left @ metric @ left)
        torch.testing.assert_close(
            found.gradient[i], jacobian.mT @ metric @ left, rtol=1e-6, atol=tolerance
        )
        torch.testing.assert_close(
            found.curvature[i],
            jacobian.mT @ metric @ jacobian,
            rtol=1e-6,
            atol=tolerance,
        )


def test_the_background_given_the_components_is_exact() -> None:
    # No component and a known noise: the posterior is a normal one in closed form.
    mine = problem(weights=(1.0, 1e-6, 1e-6))
    noise = GaussianNoise(errors=0.1 + 0.2 * TIMES)
    simulator = AdditiveSimulator(bump, noise, mine.layout, background=line)
    known = replace(mine, simulator=simulator)
    theta = known.prior.sample((8,), seeded(1))
    x = known.simulator(theta, seeded(2))
    estimator = slot_nn(known)(theta, x).eval()
    given = estimator.given(x[:1])
    rows = given.sample((2_000,), k=0, generator=seeded(3)).squeeze(1)
    shared = known.layout.unpack(rows).shared.double()
    columns = torch.stack([torch.ones(NUM).double(), TIMES - 0.5], -1)
    weight = (0.1 + 0.2 * TIMES).pow(-2)
    precision = columns.mT @ (weight[:, None] * columns)
    left = x[0].double() - line(torch.zeros(3).double())
    mean = torch.linalg.solve(precision, columns.mT @ (weight * left))
    exact = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    # five standard errors of the mean and of the deviation: 1 of 10^6 seeds fails
    deviation = exact.covariance_matrix.diagonal().sqrt()
    error = deviation / math.sqrt(len(rows))
    assert ((shared[:, 1:].mean(0) - mean).abs() < 5 * error).all()
    assert ((shared[:, 1:].std(0) / deviation - 1).abs() < 0.08).all()
    assert given.log_prob(rows.unsqueeze(1)).isfinite().all()


@pytest.mark.parametrize(
    "background",
    [
        curved,
        lambda s: s[..., 1:2].clamp(min=-1.99) + 0 * TIMES.to(s),  # one draw in 400
        lambda s: 1e6 + s[..., 1:2] ** 2 * TIMES.to(s),  # beside what is constant
    ],
)
def test_what_is_not_linear_is_seen(background) -> None:
    mine = problem(background=background)
    with pytest.raises(TypeError, match="background must be linear"):
        linear_background(mine.simulator, mine.prior)


def test_the_noise_level_is_no_background() -> None:
    mine = problem(background=lambda s: s[..., :1] + 0 * TIMES.to(s))
    with pytest.raises(TypeError, match="'level', which the noise reads, is part of"):
        rjmcmc.collapsed(mine, torch.zeros(NUM))
    with pytest.warns(UserWarning, match="'level', which the noise reads, is part of"):
        assert mine.build_fit() is None


def test_noise_of_an_unknown_kind_is_not_fitted_beside_a_background() -> None:
    class Own:
        def sample(self, signal, shared, generator):
            return torch.zeros_like(signal)

        def log_prob(self, residual, shared):
            return -residual.square().sum(-1)

    mine = problem()
    for background, fitted in ((line, False), (None, True)):
        simulator = AdditiveSimulator(bump, Own(), mine.layout, background=background)
        with pytest.warns(UserWarning, match="Own"):
            fit = replace(mine, simulator=simulator).build_fit()
        assert (fit is not None) == fitted


def test_a_curved_background_is_not_fitted() -> None:
    mine = problem(background=curved)
    with pytest.warns(UserWarning, match="background must be linear"):
        assert mine.build_fit() is None
    with pytest.raises(TypeError, match="background must be linear"):
        rjmcmc.collapsed(mine, torch.zeros(NUM))


def test_a_background_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="samples of the component"):
        problem(background=lambda s: line(s)[..., :9])
    with pytest.raises(ValueError, match="background must map"):
        problem(background=lambda s: line(s).sum())
    with pytest.raises(TypeError, match="background must be a function"):
        problem(background=3)


def test_the_collapsed_sampler_integrates_the_background() -> None:
    """Against importance sampling from the prior; five standard errors.

    1 of 10^5 seeds fails.
    """
    mine = problem(weights=(1.0, 1.0))
    base = mine.layout.pack(
        torch.tensor([1]),
        torch.tensor([[[0.43, 0.3]]]),
        torch.tensor([[1.5, 0.4, -0.7]]),
    )
    x = mine.simulator(base, seeded(11))
    proposal = prior_near(mine, x, 400_000)
    weights = proposal[1].softmax(0)
    k = mine.layout.cardinality(proposal[0])
    share = float(weights[k == 1].sum())
    effective = float(1 / weights.square().sum())
    assert effective > 1_000
    found = rjmcmc.collapsed(mine, x, seed=2, num_draws=1_500, num_levels=3)
    theta = found.sample((10_000,), generator=seeded(5))
    seen = float((mine.layout.cardinality(theta) == 1).double().mean())
    assert 0.05 < share < 0.95
    assert abs(seen - share) < 5 * math.sqrt(0.25 / effective) + 0.03
    shared = mine.layout.unpack(theta).shared.double()
    mean = weights @ mine.layout.unpack(proposal[0]).shared.double()
    assert ((shared.mean(0) - mean).abs() < 0.2 * shared.std(0)).all()


def prior_near(mine: Trace, x: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Prior draws whose background is near what the data say, and log weights."""
    theta = mine.prior.sample((num,), seeded(7)).double()
    shared = mine.layout.unpack(theta).shared
    columns = torch.stack([torch.ones(NUM).double(), TIMES - 0.5], -1)
    weight = (0.1 + 0.2 * TIMES).pow(-2)
    precision = columns.mT @ (weight[:, None] * columns) / 9
    left = x[0].double() - line(torch.zeros(3).double())
    mean = torch.linalg.solve(9 * precision, columns.mT @ (weight * left))
    normal = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    torch.manual_seed(0)
    drawn = normal.sample((num,))
    inside = (drawn.abs() < 2).all(-1)
    shared = torch.cat([shared[:, :1], drawn], -1)
    parts = mine.layout.unpack(theta)
    theta = mine.layout.pack(parts.cardinality, parts.components, shared)
    log_weights = mine.log_likelihood(theta[inside], x[0])
    return theta[inside], log_weights - normal.log_prob(drawn[inside])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_file_knows_noise_and_background(tmp_path) -> None:
    mine = problem()
    theta = mine.prior.sample((64,), seeded(1))
    x = mine.simulator(theta, seeded(2))
    estimator = slot_nn(mine)(theta, x).eval()
    path = tmp_path / "bumps.safetensors"
    estimator.save(path)
    with pytest.raises(ValueError, match=r"fit=problem\.build_fit\(\)"):
        SlotDensityEstimator.load(path)
    loaded = SlotDensityEstimator.load(path, fit=mine.build_fit())
    rows = mine.prior.sample((4,), seeded(3))
    torch.testing.assert_close(
        loaded.log_prob(rows, x[:1]), estimator.log_prob(rows, x[:1])
    )
    others = [
        problem("white"),
        problem("covariance"),
        problem(background=lambda s: line(2 * s)),
    ]
    for other in others:
        with pytest.raises(ValueError, match="noise or background is another"):
            SlotDensityEstimator.load(path, fit=other.build_fit())


@pytest.mark.parametrize(
    "noise",
    [GaussianNoise(errors=0.3 * torch.ones(NUM)), WhiteNoise(0.3), PoissonNoise()],
    ids=lambda noise: type(noise).__name__,
)
def test_a_known_background_needs_no_parameters(noise) -> None:
    prior = VariableKPrior(
        BoxUniform(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 5.0])), [1, 1]
    )
    known = 5.0 + TIMES
    simulator = AdditiveSimulator(
        bump,
        noise,
        prior.layout,
        background=lambda s: known.to(s).expand(*s.shape[:-1], NUM),
    )
    mine = Trace("known", prior, simulator, 32)
    theta = prior.sample((32,), seeded(1))
    x = simulator(theta, seeded(2))
    estimator = slot_nn(mine)(theta, x).eval()
    space = estimator.white_space
    assert space is not None
    assert float(space.given(known[None]).data.abs().max()) < 1e-9
    rows = estimator.sample((5,), x[:2], generator=seeded(3))
    assert estimator.log_prob(rows, x[:2]).isfinite().all()


def test_spectra_are_told_apart() -> None:
    frequency = torch.fft.rfftfreq(NUM)
    marks = [
        white_space(
            AdditiveSimulator(
                bump, GaussianNoise(spectrum=1 / (frequency + f)), problem().layout
            ),
            problem().prior,
        )
        for f in (0.01, 0.02)
    ]
    assert marks[0] is not None
    assert marks[1] is not None
    assert marks[0].mark != marks[1].mark
