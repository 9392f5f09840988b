"""Spikes, and the least squares of any sum of components on which they are fitted."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from sbi_slotflow import SlotDensityEstimator, slot_nn
from sbi_slotflow.nn.cells import CellAxis, OccupiedCells
from sbi_slotflow.nn.charts import WhiteningChart
from sbi_slotflow.nn.gauss_newton import SignalFit
from sbi_slotflow.nn.local import LocalTransform
from sbi_slotflow.nn.modes import ModeFinder
from sbi_slotflow.nn.spec import build, describe
from sbi_slotflow.problems import AdditiveFit, Trace, sinusoids, spikes
from sbi_slotflow.problems import least_squares as additive_fit
from sbi_slotflow.sets.marginals import ClosedMarginal
from sbi_slotflow.sets.transforms import solve_lower

RANGES: dict[str, Any] = {
    "time": stats.uniform(0.0, 1.0),
    "width": stats.loguniform(0.006, 0.03),
    "amplitude": stats.uniform(0.5, 1.5),
    "sigma": stats.uniform(0.1, 0.4),
}
SMALL: dict[str, Any] = {
    "hidden_features": 16,
    "trunk_features": 16,
    "flow_hidden_features": 16,
    "flow_layers": 2,
}


@pytest.fixture(scope="module")
def problem() -> Trace:
    return spikes()


def least_squares(problem: Trace) -> AdditiveFit:
    fit = problem.build_fit()
    assert fit is not None
    return fit


def far_apart(problem: Trace, num: int) -> tuple[Tensor, Tensor]:
    """Signals of one to four strong pulses that do not overlap, and their rows."""
    layout = problem.layout
    count = torch.arange(num) % 4 + 1
    places = torch.linspace(0.2, 0.8, 4) + 0.05 * (torch.rand(num, 4) - 0.5)
    width = 0.008 + 0.012 * torch.rand(num, 4)
    amplitude = 1.0 + 0.9 * torch.rand(num, 4)
    components = torch.zeros(num, layout.max_cardinality, 3)
    components[:, :4] = torch.stack([places, width, amplitude], -1)
    sigma = 0.1 + 0.1 * torch.rand(num, 1)
    theta = layout.pack(count, components, sigma)
    return theta, problem.simulator(theta)


def peak_finder(problem: Trace, fit: SignalFit, num_steps: int) -> ModeFinder:
    chart = problem.build_chart()
    return ModeFinder(
        chart, LocalTransform(chart, problem.location_axis()), fit, num_steps
    )


# prior and likelihood


def test_parameters_have_the_law_of_the_table(problem: Trace) -> None:
    assert problem.component_names == ("time", "width", "amplitude")
    assert problem.shared_names == ("sigma",)
    assert problem.layout.order_by == 0
    assert problem.prior.min_separation is None
    torch.testing.assert_close(problem.prior.cardinality_probs, torch.full((7,), 1 / 7))
    weights = [float(k == 1) for k in range(7)]
    theta = problem.prior.with_cardinality(weights).sample((2_000,))
    parts = problem.layout.unpack(theta)
    columns = [*parts.components[:, 0].unbind(-1), parts.shared[:, 0]]
    for column, law in zip(columns, RANGES.values(), strict=True):
        # false alarm in 1 of 10^6 seeds for each parameter
        assert stats.kstest(column.double().numpy(), law.cdf).pvalue > 1e-6


def test_the_densities_equal_scipys(problem: Trace) -> None:
    theta = problem.prior.sample((30,))
    x = problem.simulator(theta)
    assert x.shape == (30, 512)
    times = np.arange(512) / 512
    parts = problem.layout.unpack(theta.double())
    assert set(parts.cardinality.tolist()) >= {0, 1, 6}
    for i in range(30):
        mean, k = np.zeros(512), int(parts.cardinality[i])
        sigma = parts.shared[i, 0].item()
        prior = RANGES["sigma"].logpdf(sigma) - math.log(7) + math.lgamma(k + 1)
        for place, width, amplitude in parts.components[i, :k].tolist():
            bell = stats.norm.pdf(times, place, width)
            mean += amplitude * bell / stats.norm.pdf(0.0, 0.0, width)
            prior += RANGES["width"].logpdf(width) + math.log(1 / 1.5)
        expected = stats.norm.logpdf(x[i].double().numpy(), mean, sigma).sum()
        value = problem.log_likelihood(theta[i], x[i]).item()
        assert value == pytest.approx(expected, rel=1e-9)
        assert problem.prior.log_prob(theta[i]).item() == pytest.approx(prior, abs=1e-4)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="of 64, got 500"):
        spikes(num_samples=500)
    with pytest.raises(ValueError, match="of 64, got 0"):
        spikes(num_samples=0)
    with pytest.raises(ValueError, match="max_cardinality must be at least 1, got 0"):
        spikes(max_cardinality=0)


# least squares


def test_normal_equations_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = spikes(num_samples=64)
    # three sets at once, as if memory were scarce
    monkeypatch.setattr(additive_fit, "_MOST_NUMBERS", 3 * 18 * 64)
    theta = problem.prior.sample((8,))
    theta[0, [0, *range(2, 20)]] = 0.0  # no pulse at all
    x = problem.simulator(theta)
    parts = problem.layout.unpack(theta)
    owner = torch.arange(8).flip(0)
    fit = least_squares(problem)
    found = fit.given(x).normal_equations(owner, parts.components, parts.mask)
    for i in range(8):
        active = parts.components[i][parts.mask[i]].double()

        def total(components: Tensor) -> Tensor:
            return problem.simulator.component_signal(components).sum(0)

        residual = x[owner[i]].double() - total(active)
        jacobian = torch.autograd.functional.jacobian(total, active)
        assert isinstance(jacobian, Tensor)
        jacobian = jacobian.flatten(1)
        size = jacobian.shape[-1]
        gradient = torch.zeros(18, dtype=torch.float64)
        curvature = torch.zeros(18, 18, dtype=torch.float64)
        gradient[:size] = jacobian.mT @ residual
        curvature[:size, :size] = jacobian.mT @ jacobian
        torch.testing.assert_close(found.residual[i], residual.square().sum())
        torch.testing.assert_close(found.gradient[i], gradient)
        torch.testing.assert_close(found.curvature[i], curvature)


def test_sinusoids_have_the_normal_equations_of_their_closed_forms() -> None:
    tiny = sinusoids("tiny")
    theta = tiny.prior.sample((6,))
    parts = tiny.layout.unpack(theta)
    signal, marginals = tiny.simulator.component_signal, tiny.prior.component_marginals
    fits: list[SignalFit] = [
        tiny.build_fit(),
        AdditiveFit(signal, marginals, location=2),
    ]
    x = tiny.simulator(theta)
    equations = [
        fit.given(x).normal_equations(torch.arange(6), parts.components, parts.mask)
        for fit in fits
    ]
    for expected, value in zip(*equations, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-6)


def test_the_start_explains_most_of_the_signal(problem: Trace) -> None:
    theta, x = far_apart(problem, 32)
    parts = problem.layout.unpack(theta)
    owner, fit = torch.arange(32), least_squares(problem)
    cells = (64 * parts.components[..., 0]).floor()
    low, high = cells / 64, (cells + 1) / 64
    start = fit.given(x).start(owner, low, high, parts.mask)
    assert start.dtype == torch.float64
    for d, marginal in enumerate(problem.prior.component_marginals):
        least, most = marginal.bounds
        assert ((start[..., d] > least) & (start[..., d] < most)).all()
    inside = (start[..., 0] >= low) & (start[..., 0] <= high)
    assert inside[parts.mask].all()
    signal = problem.simulator.signal(theta)
    nothing = fit.given(signal).normal_equations(owner, start, parts.mask & False)
    fitted = fit.given(signal).normal_equations(owner, start, parts.mask)
    assert (fitted.residual / nothing.residual).max() < 0.3
    assert (fitted.residual / nothing.residual).median() < 0.1


def test_overlapping_pulses_are_started_together(problem: Trace) -> None:
    # The first, on its own, takes some of the other's share; it gives it back.
    pair = torch.tensor([[[0.486, 0.015, 1.5], [0.502, 0.015, 1.5]]])
    x = problem.simulator.component_signal(pair).sum(1)
    ends = torch.tensor([[31.0, 32.0]]) / 64, torch.tensor([[32.0, 33.0]]) / 64
    mask, owner = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    fit = least_squares(problem)
    start = fit.given(x).start(owner, *ends, mask)
    residual = fit.given(x).normal_equations(owner, start, mask).residual
    assert residual.item() < 0.02 * x.square().sum().item()


def test_a_peak_is_a_calibrated_gaussian_about_the_truth(problem: Trace) -> None:
    theta, x = far_apart(problem, 64)
    parts = problem.layout.unpack(theta)
    mask, owner = parts.mask, torch.arange(64)
    finder = peak_finder(problem, least_squares(problem), num_steps=5)
    chart = finder.local_chart
    inside = torch.where(mask.unsqueeze(-1), parts.components, torch.tensor(0.01))
    coordinates, _ = chart.coordinates(inside)
    anchors = torch.where(mask, coordinates[..., 0].floor().long(), 0)
    starts = anchors.double()
    peaks = finder(x, OccupiedCells(owner, anchors, starts, starts + 1, mask))
    w = chart.relative(coordinates, anchors, peaks.centre)
    w = torch.where(mask.unsqueeze(-1), w, 0.0)
    z = solve_lower(peaks.factor, (w - peaks.mode).flatten(1)).reshape(w.shape)[mask]
    assert len(z) == 160
    # 160 chi-square variables each: 6 standard errors of their mean, 0.11
    assert ((z.square().mean(0) - 1).abs() < 0.67).all()
    # all 480: 5 standard errors; the little that is not Gaussian is within them
    assert abs(z.square().mean().item() - 1) < 5 * math.sqrt(2 / 480)
    assert z.abs().max() < 5
    # The log of the noise level: 12 of 512 are fitted.
    noise = parts.shared[:, 0].double().log()
    error = peaks.level - noise
    assert error.abs().max() < 6 / math.sqrt(2 * 500)


def test_a_location_that_is_no_parameter_is_refused(problem: Trace) -> None:
    marginals = problem.prior.component_marginals
    with pytest.raises(ValueError, match=r"location must be one of 0\.\.2, got 3"):
        AdditiveFit(problem.simulator.component_signal, marginals, location=3)


def test_unbounded_marginals_give_finite_starts() -> None:
    marginals = ClosedMarginal("uniform", 0.0, 1.0), ClosedMarginal("normal", 2.0, 0.5)
    times = torch.arange(64) / 64

    def bumps(components: Tensor) -> Tensor:
        place, height = components.unsqueeze(-1).unbind(-2)
        return height / (1 + (20 * (times.to(components) - place)).square())

    fit = AdditiveFit(bumps, marginals)
    x = bumps(torch.tensor([[0.3, 2.2]]))
    ends = torch.tensor([[0.25]]), torch.tensor([[0.35]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    start = fit.given(x).start(torch.zeros(1, dtype=torch.int64), *ends, mask)[0, 0]
    assert abs(start[0].item() - 0.3) < 0.03
    assert abs(start[1].item() - 2.2) < 0.5


def test_a_peak_is_found_far_in_the_tail_of_a_normal_parameter() -> None:
    marginals = ClosedMarginal("uniform", 0.0, 1.0), ClosedMarginal("normal", 2.0, 0.5)
    times = torch.arange(64, dtype=torch.float64) / 64

    def bumps(components: Tensor) -> Tensor:
        place, height = components.unsqueeze(-1).unbind(-2)
        return height * torch.exp(-0.5 * ((times.to(components) - place) / 0.05) ** 2)

    fit, chart = AdditiveFit(bumps, marginals), WhiteningChart(marginals)
    truth = torch.tensor([[0.45, 3.6]], dtype=torch.float64)  # 3.2 deviations up
    generator = torch.Generator().manual_seed(0)
    x = bumps(truth) + 0.01 * torch.randn(1, 64, generator=generator).double()
    finder = ModeFinder(chart, LocalTransform(chart, CellAxis(0, 8)), fit, 6)
    zero = torch.zeros(1, dtype=torch.int64)
    start = torch.tensor([[3.0]], dtype=torch.float64)
    mask, cells = torch.ones(1, 1, dtype=torch.bool), torch.full((1, 1), 3)
    peaks = finder(x, OccupiedCells(zero, cells, start, start + 1, mask))
    w = finder.local_chart.absolute(peaks.mode, cells, peaks.centre)
    found = finder.local_chart.components(w)[0, 0]
    # 5 deviations: 0.01 / sqrt(sum of squares), 0.005 for either
    assert (found - truth[0]).abs().max() < 0.025


# files


def test_the_fit_survives_json(problem: Trace) -> None:
    fit = least_squares(problem)
    assert build("fit", json.loads(json.dumps(fit.spec))) == fit
    kinds = r"\['additive', 'classes', 'sinusoids'\]"
    with pytest.raises(ValueError, match=rf"one of {kinds}, got 'x'"):
        build("fit", {"kind": "x"})


def test_a_signal_of_the_users_own_has_no_spec(problem: Trace) -> None:
    signal = problem.simulator.component_signal
    marginals = problem.prior.component_marginals
    assert describe("fit", AdditiveFit(signal, marginals)) is not None
    own = AdditiveFit(lambda components: signal(components), marginals)
    assert describe("fit", own) is None


# networks


@pytest.mark.parametrize("refine_slots", [0, 3])
def test_a_network_of_spikes_learns_draws_and_is_saved(
    problem: Trace, refine_slots: int, tmp_path: Path
) -> None:
    theta = problem.prior.sample((8,))
    x = problem.simulator(theta)
    sets = {"weighed_sets": 4} if refine_slots else {}
    build = slot_nn(problem, refine_slots=refine_slots, **sets, **SMALL)
    estimator = build(theta, x)
    assert estimator.spec.slots["kind"] == "anchored"
    loss = estimator.loss(theta, x)
    assert loss.shape == (8,)
    assert loss.isfinite().all()
    loss.mean().backward()
    gradients = [p.grad for p in estimator.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    estimator.eval()
    draws = estimator.sample((3,), x)
    assert problem.prior.support.check(draws).all()
    times = problem.layout.unpack(draws).components[..., 0]
    later = problem.layout.unpack(draws).mask[..., 1:]
    assert (times.diff(dim=-1)[later] >= 0).all()
    with torch.no_grad():
        density = estimator.log_prob(draws, x)
    assert density.isfinite().all()

    path = tmp_path / "spikes.safetensors"
    estimator.save(path)
    loaded = SlotDensityEstimator.load(path)
    with torch.no_grad():
        assert torch.equal(loaded.log_prob(draws, x), density)


def test_a_saved_network_with_a_signal_of_the_users_own_asks_for_it(
    problem: Trace, tmp_path: Path
) -> None:
    class OwnSpikes(Trace):
        def build_fit(self) -> Any:
            signal = self.simulator.component_signal
            return AdditiveFit(lambda c: signal(c), self.prior.component_marginals)

    own = OwnSpikes(problem.name, problem.prior, problem.simulator)
    theta = own.prior.sample((16,))
    x = own.simulator(theta)
    estimator = slot_nn(own, refine_slots=2, **SMALL)(theta, x).eval()
    path = tmp_path / "own.safetensors"
    estimator.save(path)
    with pytest.raises(ValueError, match="refine_slots needs a signal"):
        SlotDensityEstimator.load(path)
    loaded = SlotDensityEstimator.load(path, fit=own.build_fit())
    with torch.no_grad():
        assert torch.equal(loaded.loss(theta, x), estimator.loss(theta, x))
