"""Problems of several classes."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Uniform

from sbi_slotflow import (
    AdditiveSimulator,
    MultiClassPrior,
    SlotDensityEstimator,
    SlotPosterior,
    VariableKPrior,
    WhiteNoise,
    build_catalogue,
    calibration,
    plots,
    refine,
    slot_nn,
)
from sbi_slotflow.calibration.draws import draw
from sbi_slotflow.problems import Classes, Trace, lines_and_bursts

SMALL: dict[str, Any] = {
    "hidden_features": 16,
    "trunk_features": 16,
    "flow_hidden_features": 16,
    "flow_layers": 2,
    "weighed_sets": 64,
}
TIME = torch.arange(16.0) + 0.5
NOISE = WhiteNoise(1.0)


def step(c: Tensor) -> Tensor:
    """Steps of components (height, time)."""
    return c[..., :1] * torch.sigmoid((TIME.to(c) - c[..., 1:2]) / 0.5)


def pulse(c: Tensor) -> Tensor:
    """Pulses of height three and components (time,)."""
    return 3.0 * torch.exp(-0.5 * (TIME.to(c) - c[..., :1]).square())


def trace(name: str, signal: Any, *high: float, noise: Any = NOISE, **options: Any):
    ends = torch.tensor(high)
    prior = VariableKPrior(
        Independent(Uniform(torch.zeros_like(ends), ends), 1), [1, 1], **options
    )
    simulator = AdditiveSimulator(signal, noise, prior.layout)
    return Trace(name, prior, simulator, cells=8)


def small() -> Classes:
    members = {
        "step": trace("steps", step, 4.0, 16.0, order_by=1),
        "pulse": trace("pulses", pulse, 16.0),
    }
    return Classes("steps and pulses", members)


def estimator_of(problem: Classes, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    theta = problem.prior.sample((32,), torch.Generator().manual_seed(0))
    x = problem.simulator(theta, torch.Generator().manual_seed(1))
    return slot_nn(problem, **SMALL | options)(theta, x).eval(), x


def test_signals_of_classes_add_up() -> None:
    problem = small()
    theta = problem.prior.sample((20,), torch.Generator().manual_seed(0))
    layout = problem.layout
    lines, bursts = (layout.view(theta, name) for name in layout.class_names)
    expected = lines[:, :1] * step(lines[:, 1:]) + bursts[:, :1] * pulse(bursts[:, 1:])
    assert torch.allclose(problem.simulator.signal(theta), expected, atol=1e-5)
    x = problem.simulator(theta, torch.Generator().manual_seed(1))
    normal = torch.distributions.Normal(expected.double(), 1.0)
    found = problem.log_likelihood(theta, x)
    assert torch.allclose(found, normal.log_prob(x.double()).sum(-1), atol=1e-4)


def test_least_squares_know_all_classes() -> None:
    problem = lines_and_bursts()
    fit = problem.build_fit()
    assert fit is not None
    theta = problem.prior.sample((8,), torch.Generator().manual_seed(1))
    x = problem.simulator(theta, torch.Generator().manual_seed(2))
    parts = problem.layout.unpack(theta)
    found = fit.given(x).normal_equations(torch.arange(8), parts.components, parts.mask)
    components = parts.components.double().requires_grad_()
    signal = problem.simulator._total(parts._replace(components=components))
    power = (x.double() - signal).square().sum(-1)
    (slope,) = torch.autograd.grad(-0.5 * power.sum(), components)
    assert torch.allclose(found.residual, power.detach())
    assert torch.allclose(found.gradient, slope.flatten(1), atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [{}, {"flow_layers": 0, "flow_hidden_features": None, "trunk_features": "default"}],
    ids=["flow", "plain"],
)
@pytest.mark.parametrize("refine_slots", [3, 0])
def test_densities_integrate_to_one(options: dict[str, Any], refine_slots: int) -> None:
    if not refine_slots:
        options = {"refine_slots": 0, "weighed_sets": None, "flow_layers": 2}
    problem = small()
    estimator, x = estimator_of(problem, **options)
    layout, x = problem.layout, x[:1]
    width, place = 0, (torch.arange(160) + 0.5) / 10
    height = (torch.arange(80) + 0.5) / 20
    none = torch.zeros(1)
    total = 0.0
    for lines, bursts in product((0, 1), (0, 1)):
        grid = torch.cartesian_prod(
            torch.full((1,), float(lines)),
            torch.full((1,), float(bursts)),
            height if lines else none,
            place if lines else none,
            place[::4] if lines and bursts else place if bursts else none,
        )
        cell = (0.05 * 0.1 if lines else 1.0) * (0.1 if bursts else 1.0)
        cell *= 4 if lines and bursts else 1
        with torch.no_grad():
            parts = [estimator.log_prob(g[:, None], x) for g in grid.split(65_536)]
        log_q = torch.cat(parts).double()
        total += float(log_q.exp().sum()) * cell
        width = grid.shape[-1]
    assert layout.size == width
    assert total == pytest.approx(1.0, abs=0.02)


def test_labels_and_draws() -> None:
    problem = lines_and_bursts()
    estimator, x = estimator_of(problem)
    draws = estimator.sample((20,), x[:4], generator=torch.Generator().manual_seed(0))
    assert problem.prior.support.check(draws).all()
    assert torch.equal(problem.layout.canonical(draws), draws)
    with torch.no_grad():
        log_q = estimator.log_prob(draws, x[:4])
        mixed = problem.layout.relabel(draws, torch.Generator().manual_seed(1))
        again = estimator.log_prob(mixed, x[:4])
    assert torch.isfinite(log_q).all()
    assert torch.allclose(log_q, again, atol=1e-4)


@pytest.mark.parametrize("step_at", [6.2, 8.5])
@pytest.mark.parametrize("seed", range(2))
def test_evidence_tells_classes_apart(step_at: float, seed: int) -> None:
    """Of one component, a step or a pulse: the odds by brute force."""
    problem = small()
    estimator, _ = estimator_of(problem)
    row = torch.tensor([[1.0, 0.0, 3.0, step_at, 0.0]])
    x = problem.simulator(row, torch.Generator().manual_seed(seed))
    place = (torch.arange(800) + 0.5) / 50
    height = (torch.arange(400) + 0.5) / 100
    one, none = torch.ones(1), torch.zeros(1)
    log_z = []
    for grid, volume in (
        (torch.cartesian_prod(one, none, height, place, none), 0.01 * 0.02),
        (torch.cartesian_prod(none, one, none, none, place), 0.02),
    ):
        log_p = problem.prior.log_prob(grid) + problem.log_likelihood(grid, x[0])
        log_z.append(float(log_p.logsumexp(0)) + math.log(volume))
    parts = estimator.given(x)._sets.parts
    evidence, *_ = parts.evidence(0, 1)
    cells = parts._table.cells[0, : len(evidence), 0]
    label = estimator.component_head.axis.class_of(cells)
    found = [float(evidence[label == c].logsumexp(0)) for c in (0, 1)]
    # Laplace's approximation, which one count of 2 pi too many would put off by 0.9.
    assert found[1] - found[0] == pytest.approx(log_z[1] - log_z[0], abs=0.3)


def test_refined_posteriors_agree_with_brute_force() -> None:
    """Weights of an untrained network's draws, and populations of particles."""
    problem = small()
    estimator, _ = estimator_of(problem)
    posterior = SlotPosterior(estimator, problem.prior)
    row = torch.tensor([[1.0, 1.0, 2.0, 5.0, 11.0]])
    x = problem.simulator(row, torch.Generator().manual_seed(6))
    prior = problem.prior.sample((400_000,), torch.Generator().manual_seed(2))
    weights = problem.log_likelihood(prior, x[0])
    kinds = problem.layout.kind(prior)
    exact = torch.bincount(kinds, weights.softmax(0), minlength=4)
    log_z = float(weights.logsumexp(0)) - torch.tensor(400_000.0).log()
    for method in ("importance", "smc"):
        refined: Any = refine(
            posterior,
            problem.log_likelihood,
            x[0],
            num_samples=2_000,
            method=method,
            generator=torch.Generator().manual_seed(1),
        )
        found = torch.bincount(problem.layout.kind(refined.rows), refined.weights, 4)
        assert (found - exact).abs().max() < 0.05, method
        assert refined.log_evidence == pytest.approx(float(log_z), abs=0.2), method
        own = refined.cardinality(of="step").probs
        assert own[1] == pytest.approx(float(found[2:].sum()), abs=1e-6)
        one = refined.of_class("pulse")
        assert one.layout == problem.layout.of_class("pulse")
        assert one.cardinality().probs[1] == pytest.approx(
            float(refined.cardinality(of="pulse").probs[1])
        )


def spaced() -> Classes:
    """One or two pulses that keep apart, none or one step, of known heights."""
    high = torch.tensor([16.0])
    place = Independent(Uniform(torch.zeros(1), high), 1)
    priors = {
        "pulse": VariableKPrior(place, [0, 1, 1], min_separation=3.0),
        "step": VariableKPrior(place, [1, 1]),
    }
    signals = {"pulse": pulse, "step": lambda c: step(torch.cat([2 + 0 * c, c], -1))}
    members = {
        name: Trace(
            name,
            prior,
            AdditiveSimulator(signals[name], NOISE, prior.layout),
            cells=8,
        )
        for name, prior in priors.items()
    }
    return Classes("spaced", members)


def on_a_grid(problem: Classes, num: int) -> list[tuple[Tensor, float]]:
    """Rows of all kinds of :func:`spaced`, with the volume of each."""
    width = 16.0 / num
    place, none = (torch.arange(num) + 0.5) * width, torch.zeros(1)
    grids = []
    for pulses, steps in product((1, 2), (0, 1)):
        first = torch.combinations(place, 2) if pulses == 2 else place[:, None]
        second = place if steps else none
        i, j = torch.cartesian_prod(
            torch.arange(len(first)), torch.arange(len(second))
        ).unbind(-1)
        rows = torch.zeros(len(i), problem.layout.size)
        rows[:, 0], rows[:, 1] = pulses, steps
        rows[:, 2 : 2 + pulses], rows[:, 4] = first[i], second[j]
        grids.append((rows, width ** (pulses + steps)))
    return grids


def test_separations_in_a_class_are_kept_and_counted() -> None:
    problem = spaced()
    estimator, x = estimator_of(problem)
    draws = estimator.sample((400,), x[:1], generator=torch.Generator().manual_seed(0))
    assert problem.prior.separated(draws).all()
    kinds = problem.layout.kind(draws)[:, 0]
    for rows, volume in on_a_grid(problem, 96):
        with torch.no_grad():
            log_q = estimator.log_prob(rows[:, None], x[:1]).double()
        mass = float(log_q.exp().sum()) * volume
        share = float((kinds == problem.layout.kind(rows[0])).double().mean())
        # Four deviations of a share of 400 draws, and the grid's error.
        assert mass == pytest.approx(share, abs=0.12)
        apart = problem.prior.separated(rows)
        assert float(log_q.exp()[~apart].sum()) * volume < 1e-6


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_numbers_of_each_class_are_exact(method: Any) -> None:
    """Weights and particles against a sum over a grid, where nothing is certain."""
    problem = spaced()
    estimator, _ = estimator_of(problem)
    posterior = SlotPosterior(estimator, problem.prior)
    row = torch.tensor([[1.0, 1.0, 5.0, 0.0, 11.0]])
    noise = torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    x = 0.35 * problem.simulator.signal(row) + noise
    log_z, kinds = [], []
    for rows, volume in on_a_grid(problem, 128):
        log_p = problem.prior.log_prob(rows) + problem.log_likelihood(rows, x[0])
        log_z.append(float(log_p.logsumexp(0)) + math.log(volume))
        kinds.append(int(problem.layout.kind(rows[0])))
    exact = torch.tensor(log_z).softmax(0)
    assert exact.max() < 0.7
    refined: Any = refine(
        posterior,
        problem.log_likelihood,
        x[0],
        num_samples=6_000,
        method=method,
        generator=torch.Generator().manual_seed(0),
    )
    found = torch.bincount(problem.layout.kind(refined.rows), refined.weights, 6)
    # Particles that are taken out of one class alone are off by 0.06.
    assert (found[kinds] - exact).abs().max() < (0.03 if method == "smc" else 0.08)
    log_evidence = float(torch.tensor(log_z).logsumexp(0))
    # An untrained network's weights have tails.
    error = 0.1 + 4 * refined.log_evidence_error
    assert refined.log_evidence == pytest.approx(log_evidence, abs=error)


def test_a_component_that_a_class_has_no_room_for_is_never_tried() -> None:
    """The likelihood is asked of rows that the prior allows, and of no others."""
    problem = small()
    estimator, x = estimator_of(problem)
    posterior = SlotPosterior(estimator, problem.prior)

    def log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
        assert torch.isfinite(problem.prior.log_prob(theta)).all()
        # Nor of components that only padding could be.
        parts = problem.layout.unpack(theta)
        assert (parts.components[parts.mask][:, 1] > 0).all()
        return problem.log_likelihood(theta, x)

    for method in ("importance", "smc"):
        options: dict[str, Any] = {"method": method, "num_samples": 400}
        refine(posterior, log_likelihood, x[0], **options)


def test_an_estimator_survives_a_file(tmp_path: Path) -> None:
    problem = lines_and_bursts()
    estimator, x = estimator_of(problem)
    estimator.save(tmp_path / "network.safetensors")
    loaded = SlotDensityEstimator.load(tmp_path / "network.safetensors")
    draws = estimator.sample((5,), x[:2], generator=torch.Generator().manual_seed(0))
    again = loaded.sample((5,), x[:2], generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)


def test_a_tree_has_a_dimension_for_each_class() -> None:
    problem = small()
    estimator, x = estimator_of(problem)
    posterior = SlotPosterior(estimator, problem.prior)
    tree = posterior.to_datatree(50, x[0], problem=problem)
    data = tree["posterior"]
    assert data["step.theta_1"].dims == ("chain", "draw", "step.component")
    assert {"K_step", "K_pulse", "pulse.theta_1"} <= set(data.data_vars)
    active = tree["sample_stats"]["pulse.active"].sum("pulse.component")
    assert (active == data["K_pulse"]).all()


def test_a_catalogue_names_the_class_of_each_source() -> None:
    problem = small()
    layout = problem.layout
    # A step at 3 in nearly all draws, a pulse at 12 in half of them.
    rows = torch.tensor([[1.0, 1.0, 2.0, 3.0, 12.0]]).repeat(400, 1)
    noise = torch.randn(400, 3, generator=torch.Generator().manual_seed(1))
    rows[:, 2:] += 0.1 * noise
    rows[:200, [1, 4]] = 0.0
    rows[:20, [0, 2, 3]] = 0.0
    found = build_catalogue(rows, layout, true_theta=rows[-1])
    assert found["class"].values.tolist() == ["step", "pulse"]
    assert found["existence"].values == pytest.approx([0.95, 0.5], abs=0.01)
    assert float(found["step.theta_2"][0]) == pytest.approx(3.0, abs=0.1)
    assert float(found["pulse.theta_1"][1]) == pytest.approx(12.0, abs=0.1)
    assert float(found["true_pulse.theta_1"][1]) == pytest.approx(float(rows[-1, 4]))
    assert np.isnan(found["step.theta_2"][1])
    assert found.attrs["expected_cardinality"] == pytest.approx(1.45, abs=0.01)
    assert len(found.to_dataframe()) == 2


def test_a_corner_shows_one_class() -> None:
    problem = small()
    rows = problem.prior.sample((200,), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"layout\.view\(samples, 'step'\)"):
        plots.plot_corner(rows, problem.layout)
    own = problem.layout.view(rows, "step")
    assert plots.plot_corner(own, problem.layout.of_class("step"), k=1).axes


class _Exact:
    """The posterior of data that say nothing: the prior."""

    def __init__(self, prior: Any) -> None:
        self.prior = prior

    def sample_batched(
        self,
        sample_shape: Any,
        x: Tensor,
        k: int | None = None,
        generator: Any = None,
        **_: Any,
    ) -> Tensor:
        prior = self.prior
        if k is not None:
            weights = torch.zeros(prior.max_cardinality + 1)
            weights[k] = 1.0
            prior = prior.with_cardinality(weights)
        return prior.sample((*sample_shape, len(x)), generator)

    def cardinality(self, x: Tensor, of: str | None = None) -> Categorical:
        own = self.prior if of is None else self.prior.classes[of]
        return Categorical(probs=own.cardinality_probs.expand(len(x), -1))


def test_an_exact_posterior_passes_the_report() -> None:
    """False alarms: one in 20, at this seed none."""
    problem = small()
    posterior: Any = _Exact(problem.prior)
    silent = Classes("silent", problem.members)
    object.__setattr__(silent, "simulator", _Silent(problem))
    found = calibration.report(
        posterior, silent, n=200, num_draws=50, seed=1, show_progress=False
    )
    assert found.passed, str(found)
    assert {"components of step", "coverage of pulse", "cardinality of pulse"} <= set(
        found.checks
    )


def test_draws_given_k_have_the_numbers_of_the_truth() -> None:
    problem = small()
    silent = Classes("silent", problem.members)
    object.__setattr__(silent, "simulator", _Silent(problem))
    posterior: Any = _Exact(problem.prior)
    found = draw(posterior, silent, 40, num_draws=30, num_guides=5)
    assert found.complete is not None
    assert found.complete.double().mean() > 0.9
    kinds = problem.layout.kind(found.given_k)[:, found.complete]
    assert (kinds == problem.layout.kind(found.theta)[found.complete]).all()


class _Silent:
    """A simulator that gives noise, whatever the components."""

    def __init__(self, problem: Classes) -> None:
        self.num = problem.num_data

    def __call__(self, theta: Tensor, generator: Any = None) -> Tensor:
        return torch.randn(*theta.shape[:-1], self.num, generator=generator)


def test_a_class_that_is_overconfident_fails_the_report() -> None:
    """The truth of one class lies at the edge of what is drawn for it."""
    problem = small()
    narrow = VariableKPrior(
        Independent(Uniform(torch.tensor([6.0]), torch.tensor([10.0])), 1), [1, 1]
    )
    members = dict(problem.prior.classes) | {"pulse": narrow}
    posterior: Any = _Exact(MultiClassPrior(members))
    silent = Classes("silent", problem.members)
    object.__setattr__(silent, "simulator", _Silent(problem))
    found = calibration.report(
        posterior, silent, n=200, num_draws=50, seed=1, show_progress=False
    )
    failed = set(found.failures)
    assert "components of pulse" in failed
    assert "components of step" not in failed


def test_members_that_do_not_fit_are_refused() -> None:
    one = trace("steps", step, 4.0, 16.0, order_by=1)
    loud = trace("pulses", pulse, 16.0, noise=WhiteNoise(2.0))
    with pytest.raises(ValueError, match="the same noise"):
        Classes("both", {"step": one, "pulse": loud})
    with pytest.raises(TypeError, match="AdditiveSimulator"):
        Classes("both", {"step": one, "pulse": one.prior})  # pyright: ignore
    with pytest.raises(TypeError, match="map names to problems"):
        Classes("both", [one])  # pyright: ignore


def test_a_simulator_has_one_signal_for_each_class() -> None:
    layout = small().layout
    with pytest.raises(TypeError, match="map each class"):
        AdditiveSimulator(step, NOISE, layout)
    with pytest.raises(ValueError, match="one signal for each class"):
        AdditiveSimulator({"step": step}, NOISE, layout)
    with pytest.raises(TypeError, match="'pulse' must be a function"):
        AdditiveSimulator({"step": step, "pulse": 3.0}, NOISE, layout)  # pyright: ignore


@pytest.mark.parametrize("slots", ["attention", "global"])
def test_slots_without_cells_know_no_classes(slots: Any) -> None:
    with pytest.raises(ValueError, match="several classes need cells"):
        estimator_of(small(), slots=slots, weighed_sets=None)


def test_faults_know_no_classes() -> None:
    problem = small()
    estimator, _ = estimator_of(problem)
    with pytest.raises(TypeError, match="components of one class"):
        calibration.faults.narrowed(SlotPosterior(estimator, problem.prior))


def test_independent_slots_know_no_classes() -> None:
    with pytest.raises(ValueError, match="coupling='joint'"):
        estimator_of(small(), coupling="factorised", weighed_sets=None)


def test_a_bare_prior_of_classes_is_refused() -> None:
    problem = small()
    theta = problem.prior.sample((8,))
    with pytest.raises(ValueError, match=r"problems\.Classes"):
        slot_nn(problem.prior)(theta, problem.simulator(theta))
