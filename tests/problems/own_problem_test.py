"""A user's own problem is short, and gets cells and Gauss-Newton steps by default."""

import textwrap
from typing import Any

import pytest
import torch

from sbi_slotflow import SlotDensityEstimator
from sbi_slotflow.nn.gauss_newton import LeastSquares
from sbi_slotflow.problems import Trace

MOST_LINES = 30

OWN = """
import torch
from sbi.utils import BoxUniform
from sbi_slotflow import AdditiveSimulator, VariableKPrior, WhiteNoise, slot_nn
from sbi_slotflow.problems import Trace

times = torch.arange(128) / 128

def dip(components):
    time, depth, width = components.unsqueeze(-1).unbind(-2)
    return -depth * torch.exp(-(((times.to(time) - time) / width) ** 2))

prior = VariableKPrior(
    BoxUniform(torch.tensor([0.0, 0.5, 0.02]), torch.tensor([1.0, 2.0, 0.05])),
    cardinality=[1, 1, 1],
    shared=BoxUniform(torch.tensor([0.1]), torch.tensor([0.5])),
    component_names=("time", "depth", "width"),
    shared_names=("sigma",),
)
simulator = AdditiveSimulator(dip, WhiteNoise(), prior.layout)
problem = Trace("dips", prior, simulator, cells=32)
build = slot_nn(problem, refine_slots=3)
"""


@pytest.fixture(scope="module", name="own")
def _own() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(textwrap.dedent(OWN), names)
    return names


def test_it_takes_at_most_thirty_lines() -> None:
    lines = [line for line in OWN.splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES


def test_its_network_has_cells_and_takes_gauss_newton_steps(
    own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem: Trace = own["problem"]
    theta = problem.prior.sample((16,))
    x = problem.simulator(theta)
    estimator: SlotDensityEstimator = own["build"](theta, x)
    assert estimator.spec.slots["axis"]["num_cells"] == 32
    asked: list[int] = []
    kind: Any = type(problem.build_fit().given(x))  # pyright: ignore
    equations = kind.normal_equations

    def counted(self: LeastSquares, owner: Any, components: Any, mask: Any) -> Any:
        asked.append(int(mask.sum()))
        return equations(self, owner, components, mask)

    monkeypatch.setattr(kind, "normal_equations", counted)
    loss = estimator.loss(theta, x)
    assert loss.isfinite().all()
    # the start and three steps at least, on all components that are there
    active = int(problem.layout.unpack(theta).mask.sum())
    assert asked.count(active) >= 4


def test_its_least_squares_find_a_lone_component(own: dict[str, Any]) -> None:
    problem: Trace = own["problem"]
    truth = torch.tensor([[[0.437, 1.2, 0.03]]], dtype=torch.float64)
    x = own["dip"](truth)[0]
    fit = problem.build_fit()
    assert fit is not None
    one = torch.ones(1, 1, dtype=torch.bool)
    given, owner = fit.given(x), torch.zeros(1, dtype=torch.int64)
    cell = torch.tensor([[13 / 32]]), torch.tensor([[14 / 32]])
    found = given.start(owner, *cell, one)
    for _ in range(10):
        equations = given.normal_equations(owner, found, one)
        step = torch.linalg.solve(equations.curvature, equations.gradient)
        found = found + 0.7 * step.unsqueeze(1)
    torch.testing.assert_close(found, truth, rtol=0.01, atol=0)


def test_a_signal_of_numpy_has_tokens_but_no_gauss_newton(own: dict[str, Any]) -> None:
    problem: Trace = own["problem"]
    prior, dip = problem.prior, own["dip"]

    def with_numpy(components: torch.Tensor) -> Any:
        return dip(components.double()).numpy()

    simulator = own["AdditiveSimulator"](with_numpy, own["WhiteNoise"](), prior.layout)
    numpy_problem = Trace("dips", prior, simulator, cells=32)
    assert numpy_problem.build_fit() is None
    assert numpy_problem.location_axis() == problem.location_axis()
    theta = prior.sample((5,))
    found = simulator.signal(theta)
    assert found.dtype == theta.dtype
    torch.testing.assert_close(found, problem.simulator.signal(theta))
    x = problem.simulator(theta)
    torch.testing.assert_close(
        simulator.log_likelihood(theta, x), problem.simulator.log_likelihood(theta, x)
    )


def test_a_signal_of_another_shape_is_refused(own: dict[str, Any]) -> None:
    layout = own["prior"].layout
    noise = own["WhiteNoise"]()
    theta = own["prior"].sample((5,))
    simulator = own["AdditiveSimulator"](lambda c: own["dip"](c).sum(0), noise, layout)
    with pytest.raises(ValueError, match="component_signal must map"):
        simulator(theta)
    with pytest.raises(TypeError, match="component_signal must be a function"):
        own["AdditiveSimulator"](3.0, noise, layout)
    with pytest.raises(TypeError, match="layout must be"):
        own["AdditiveSimulator"](own["dip"], noise, own["prior"])
