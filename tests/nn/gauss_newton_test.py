"""Modes of the posterior above anchors: least squares of sinusoids, and their use."""

import math

import pytest
import torch
from torch import Tensor

from sbi_slotflow import problems
from sbi_slotflow.nn.cells import OccupiedCells
from sbi_slotflow.nn.gauss_newton import (
    FittedMode,
    NormalEquations,
    SignalFit,
    fit_mode,
)
from sbi_slotflow.nn.local import LocalTransform
from sbi_slotflow.nn.modes import ModeFinder
from sbi_slotflow.nn.spec import build, describe
from sbi_slotflow.problems.sinusoids.fit import SineFit
from sbi_slotflow.sets.transforms import solve_lower

tiny, paper = problems.sinusoids("tiny"), problems.sinusoids("paper")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def signal(fit: SineFit, flat: Tensor) -> Tensor:
    """Signal of the components in a vector of K D numbers."""
    times = torch.cat([grid.times for grid in fit.grids])
    amplitude, phase, frequency = flat.reshape(-1, 3, 1).unbind(1)
    return (amplitude * torch.cos(2 * math.pi * frequency * times + phase)).sum(0)


def derivatives(fit: SineFit, components: Tensor) -> Tensor:
    """Jacobian ``(T, K D)`` of the signal."""
    times = torch.cat([grid.times for grid in fit.grids])
    amplitude, phase, frequency = components.unsqueeze(-1).unbind(1)
    angle = 2 * math.pi * frequency * times + phase
    turned = -amplitude * angle.sin()
    columns = [angle.cos(), turned, 2 * math.pi * times * turned]
    return torch.stack(columns, 1).flatten(0, 1).T


SETS: dict[str, list[list[float]]] = {
    "one": [[0.7, 1.0, 1.2]],
    "no signal": [[0.0, 1.0, 1.2]],
    "apart": [[0.7, 1.0, 0.6], [1.3, 4.0, 1.9]],
    "near": [[0.7, 1.0, 1.2], [1.3, 4.0, 1.23]],
    "all but equal": [[0.7, 1.0, 1.2], [1.3, 4.0, 1.2 + 1e-7]],
    "equal": [[0.7, 1.0, 1.2], [1.3, 4.0, 1.2]],
    "three": [[0.7, 1.0, 1.2], [1.3, 4.0, 1.201], [0.6, 2.0, 1.8]],
}


@pytest.mark.parametrize("problem", [tiny, paper], ids=["tiny", "paper"])
@pytest.mark.parametrize("case", SETS)
def test_normal_equations_are_those_of_the_jacobian(
    case: str, problem: problems.Sinusoids
) -> None:
    fit = problem.build_fit()
    components = torch.tensor(SETS[case], dtype=torch.float64)
    data = torch.randn(2, problem.num_data, generator=seeded()).double()
    jacobian = derivatives(fit, components)
    residual = data[1] - signal(fit, components.flatten())
    # a component that is not there, and another set beside it
    rows = torch.zeros(2, 4, 3, dtype=torch.float64)
    rows[:, : len(components)] = components
    rows[:, -1] = torch.tensor([1.0, 2.0, 1.1])
    rows[0] += 0.1
    mask = (torch.arange(4) < len(components)).expand(2, -1)
    found = fit.given(data).normal_equations(torch.tensor([0, 1]), rows, mask)
    size = components.numel()
    torch.testing.assert_close(
        found.residual[1], residual.square().sum(), rtol=1e-9, atol=0
    )
    scale = jacobian.square().sum(0).sqrt()
    gradient = found.gradient[1, :size] - jacobian.T @ residual
    assert (gradient.abs() <= 1e-7 * scale).all()
    curvature = found.curvature[1, :size, :size] - jacobian.T @ jacobian
    assert (curvature.abs() <= 1e-8 * torch.outer(scale, scale)).all()
    assert (found.curvature[1, size:] == 0).all()
    assert (found.curvature[1, :, size:] == 0).all()
    assert (found.gradient[1, size:] == 0).all()


def test_start_finds_tones_without_noise() -> None:
    fit = tiny.build_fit()
    truth = torch.tensor([[0.7, 1.0, 0.83], [1.3, 4.0, 1.57]]).double()
    data = signal(fit, truth.flatten()).unsqueeze(0)
    middle = (truth[:, 2] * 20).floor() / 20
    owner, mask = torch.tensor([0]), torch.ones(1, 2, dtype=torch.bool)
    found = fit.given(data).start(owner, middle[None], middle[None] + 0.05, mask)[0]
    # within the width of a peak, the inverse of pi times 20 s, and the ridge's pull
    assert ((found[:, 2] - truth[:, 2]).abs() < 0.004).all()
    assert ((found[:, 0] / truth[:, 0] - 1).abs() < 0.1).all()
    phase = found[:, 1] - truth[:, 1] + 2 * math.pi * 10 * (found - truth)[:, 2]
    assert (((phase + math.pi) % (2 * math.pi) - math.pi).abs() < 0.1).all()


class Lines:
    """A signal that is linear in its components: intercepts and slopes."""

    variance: float | None = None
    counts: Tensor | None = None

    def __init__(self, data: Tensor | None = None) -> None:
        self.data = torch.empty(0) if data is None else data
        times = torch.linspace(-1, 1, 20, dtype=torch.float64)
        self.design = torch.stack([times**p for p in range(4)], -1)

    def given(self, data: Tensor) -> "Lines":
        return Lines(data)

    def start(self, owner: Tensor, low: Tensor, high: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros(len(owner), 2, 2, dtype=torch.float64)

    def normal_equations(
        self, owner: Tensor, components: Tensor, mask: Tensor
    ) -> NormalEquations:
        residual = self.data[owner] - components.flatten(1) @ self.design.T
        gram = self.design.T @ self.design
        return NormalEquations(
            residual.square().sum(-1),
            residual @ self.design,
            gram.expand(len(owner), -1, -1),
        )


def test_a_known_variance_takes_the_place_of_the_residuals() -> None:
    data = 0.5 * torch.randn(3, 20, generator=seeded()).double()
    fit = Lines(data)
    fit.variance = 0.7
    mask = torch.ones(3, 2, dtype=torch.bool)
    start = torch.zeros(3, 2, 2, dtype=torch.float64)
    high = torch.full((2,), 10.0, dtype=torch.float64)
    owner, bounds = torch.arange(3), (-high, high)
    peak = fit_mode(fit, lambda w, _: 0.5 * w, owner, start, mask, 10, bounds)
    design = 0.5 * fit.design
    precision = design.T @ design / 0.7 + torch.eye(4)
    expected = torch.linalg.solve(precision, design.T @ data.mT / 0.7).mT
    torch.testing.assert_close(peak.mode.flatten(1), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(peak.precision, precision.expand(3, -1, -1))
    residual = data - peak.mode.flatten(1) @ design.T
    misfit = residual.square().sum(-1) / 1.4
    torch.testing.assert_close(peak.misfit, misfit)
    torch.testing.assert_close(peak.variance, residual.square().mean(-1))


def test_fit_of_a_linear_signal_is_the_peak_of_its_posterior() -> None:
    fit = Lines()
    assert isinstance(fit, SignalFit)
    data = 0.5 * torch.randn(3, 20, generator=seeded()).double()
    mask = torch.ones(3, 2, dtype=torch.bool)
    start = torch.zeros(3, 2, 2, dtype=torch.float64)
    owner, high = torch.arange(3), torch.full((2,), 10.0, dtype=torch.float64)

    def fitted(high: Tensor) -> FittedMode:
        return fit_mode(
            fit.given(data), lambda w, _: 0.5 * w, owner, start, mask, 10, (-high, high)
        )

    peak = fitted(high)
    design = 0.5 * fit.design
    for i in range(3):
        w = peak.mode[i].flatten()
        residual = data[i] - design @ w
        variance = residual.square().mean()
        torch.testing.assert_close(peak.variance[i], variance)
        expected = design.T @ design / variance + torch.eye(4)
        torch.testing.assert_close(peak.precision[i], expected.double())
        # at the peak the likelihood's pull is the prior's
        pull = design.T @ residual / variance
        torch.testing.assert_close(pull, w, rtol=0, atol=1e-4)
        torch.testing.assert_close(peak.gradient[i], pull - w)
    assert (peak.decrement < 1e-6).all()
    # held at its bounds, it says which way it would go
    near = fitted(high / 1e3)
    assert (near.mode.abs() <= 0.01).all()
    held = near.mode.flatten(1).abs() == 0.01
    assert held.any(-1).all()
    assert (near.gradient * near.mode.flatten(1) >= 0)[held].all()
    assert (near.gradient[held].abs() > 1).any()
    assert (near.decrement < 1e-6).all()


class Hard:
    """One amplitude a and a cubic: from a distance a step gains little."""

    variance: float | None = None
    counts: Tensor | None = None

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def start(self, owner: Tensor, low: Tensor, high: Tensor, mask: Tensor) -> Tensor:
        return torch.full((len(owner), 1, 1), 3.0, dtype=torch.float64)

    def normal_equations(
        self, owner: Tensor, components: Tensor, mask: Tensor
    ) -> NormalEquations:
        a = components[:, 0]
        residual = self.data[owner] - a**3
        slope = (3 * a**2).expand_as(residual)
        return NormalEquations(
            residual.square().sum(-1),
            (slope * residual).sum(-1, keepdim=True),
            slope.square().sum(-1)[:, None, None],
        )


def test_fits_that_have_not_converged_get_more_steps() -> None:
    data = torch.tensor([[1.1, 0.9] * 10, [27.1, 26.9] * 10]).double()
    calls: list[int] = []

    def to_components(w: Tensor, index: Tensor) -> Tensor:
        calls.append(len(index))
        return w * 1.0

    start = Hard(data).start(torch.arange(2), data, data, data)
    found = fit_mode(
        Hard(data),
        to_components,
        torch.arange(2),
        start,
        torch.ones(2, 1, dtype=torch.bool),
        2,
        (torch.tensor(-5.0), torch.tensor(5.0)),
    )
    truth = torch.tensor([1.0, 3.0]).double()
    torch.testing.assert_close(found.mode.flatten(), truth, atol=0.02, rtol=0)
    assert (found.decrement < 0.05).all()
    # the second was there from the start, and is left alone
    assert calls[:3] == [2, 2, 2]
    assert set(calls[3:]) == {1}


def test_truths_are_standard_normal_about_the_peaks() -> None:
    num = 300
    prior = tiny.prior.with_cardinality([0, 1, 1, 0])
    theta = prior.sample((num,), seeded(1))
    theta[:, 1] = 0.1 + 0.2 * theta[:, 1]  # tones well above the noise
    data = tiny.simulator(theta, seeded(2))
    parts = tiny.layout.unpack(theta)
    chart, axis = tiny.build_chart(), tiny.location_axis()
    local = LocalTransform(chart, axis)
    inside = torch.where(
        parts.mask.unsqueeze(-1), parts.components, chart.some_point(parts.components)
    )
    coordinates, _ = local.coordinates(inside)
    anchors = torch.where(parts.mask, coordinates[..., 0].floor().long(), 0)
    starts = anchors.double()
    finder = ModeFinder(chart, local, tiny.build_fit(), num_steps=8)
    owner = torch.arange(len(starts))
    cells = OccupiedCells(owner, anchors, starts, starts + 1, parts.mask)
    peaks = finder(data, cells)
    features = peaks.features(torch.tensor(2.0))
    assert features.shape == (num, 3, finder.num_features)
    assert features.isfinite().all()
    level = peaks.level.unsqueeze(-1) - math.log(2)
    torch.testing.assert_close(features[..., -2], level.expand(-1, 3))
    w = local.relative(coordinates, anchors, peaks.centre)
    z = solve_lower(peaks.factor, (w - peaks.mode).flatten(1)).reshape(w.shape)
    z = z[parts.mask]
    # five standard errors for the mean and the variance of each of three coordinates:
    # false alarm in 1 of 3 * 10^5 seeds
    error = math.sqrt(1 / len(z))
    assert (z.mean(0).abs() < 5 * error).all()
    assert ((z.square().mean(0) - 1).abs() < 5 * math.sqrt(2) * error).all()
    # the first component's block of a set's factor is that of its covariance
    first = peaks.factor @ peaks.factor.mT
    which = torch.arange(num)
    block = peaks.block(which, 0)
    torch.testing.assert_close(block @ block.mT, first[:, :3, :3])


def tiny_finder() -> ModeFinder:
    chart, axis = tiny.build_chart(), tiny.location_axis()
    return ModeFinder(chart, LocalTransform(chart, axis), tiny.build_fit(), num_steps=2)


def random_sets(num: int, seed: int = 3) -> tuple[Tensor, OccupiedCells]:
    """Observations, and sets of cells."""
    data = tiny.simulator(tiny.prior.sample((30,), seeded(1)), seeded(2))
    count = torch.randint(0, 4, (num,), generator=seeded(seed))
    mask = torch.arange(3) < count.unsqueeze(-1)
    anchors = torch.randint(0, 30, (num, 3), generator=seeded(4)).sort(-1).values
    anchors = torch.where(mask, anchors, 0)
    edges = torch.tensor([-0.1, 0.9]) + 0.2 * torch.rand(num, 3, 1, generator=seeded(5))
    starts, ends = (anchors.unsqueeze(-1) + edges).double().unbind(-1)
    return data, OccupiedCells(torch.arange(num) % 30, anchors, starts, ends, mask)


def test_peaks_do_not_depend_on_the_other_sets() -> None:
    finder = tiny_finder()
    data, sets = random_sets(600)
    whole = finder(data, sets)
    # more sets than are fitted at once
    for i in (0, 300, 599):
        part = slice(i, i + 1)
        alone = finder(data, sets.part(part))
        here = sets.mask[i]
        for several, one in zip(whole, alone, strict=True):
            if several.ndim > 1 and several.shape[1] == len(here):  # by component
                several, one = several[:, here], one[:, here]
            torch.testing.assert_close(several[part], one, rtol=1e-6, atol=1e-6)


def test_fits_are_rebuilt_from_their_specs() -> None:
    fit = tiny.build_fit()
    assert isinstance(fit, SignalFit)
    described = describe("fit", fit)
    assert described is not None
    assert build("fit", described) == fit
    assert describe("fit", Lines()) is None
    with pytest.raises(ValueError, match=r"fit kind must be .*, got 'other'"):
        build("fit", {"kind": "other"})
