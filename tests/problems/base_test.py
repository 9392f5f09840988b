"""A trace problem's cells are where its components are."""

from typing import Any

import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import Exponential, Independent

from sbi_slotflow import AdditiveSimulator, VariableKPrior, WhiteNoise, slot_nn
from sbi_slotflow.problems import Trace

START, END, NUM, CELLS = 2.0, 5.0, 120, 30


def bump(components: Tensor) -> Tensor:
    """A narrow bump of unit height at a place between 2 and 5."""
    time = torch.arange(NUM).to(components) / NUM * (END - START) + START
    place, width = components.unsqueeze(-1).unbind(-2)
    return torch.exp(-0.5 * ((time - place) / width) ** 2)


def make_problem(cells: int = CELLS, separation: float | None = None) -> Trace:
    prior = VariableKPrior(
        BoxUniform(torch.tensor([START, 0.02]), torch.tensor([END, 0.03])),
        [1.0, 1.0, 1.0],
        min_separation=separation,
    )
    simulator = AdditiveSimulator(bump, WhiteNoise(0.1), prior.layout)
    return Trace("bumps", prior, simulator, cells)


def test_the_cell_of_a_place_holds_its_samples() -> None:
    problem = make_problem()
    theta = problem.prior.with_cardinality([0, 1, 0]).sample((200,))
    components = problem.layout.unpack(theta).components
    x = bump(components[:, 0])
    estimator = slot_nn(problem)(theta, x)
    head: Any = estimator.component_head
    position = head.local_chart.coordinates(components)[0][..., 0]
    anchors = head.axis.cells(position, head.tokens_and_edges(estimator.encode(x))[1])[
        :, 0
    ]
    brightest = x.argmax(-1) * CELLS // NUM
    # The brightest sample may be the neighbour's first where a place is near an edge.
    assert ((anchors - brightest).abs() <= 1).all()
    assert (anchors == brightest).double().mean() > 0.8


def test_the_separation_is_in_cells() -> None:
    axis = make_problem(separation=0.2).location_axis()
    assert axis.separation == pytest.approx(0.2 / ((END - START) / CELLS))
    assert make_problem().location_axis().separation == 0.0


@pytest.mark.parametrize("refine_slots", [0, 1])
def test_slots_are_anchored_by_default(refine_slots: int) -> None:
    problem = make_problem()
    theta = problem.prior.sample((8,))
    x = problem.simulator(theta)
    estimator = slot_nn(problem, refine_slots=refine_slots)(theta, x)
    assert estimator.spec.slots["kind"] == "anchored"
    estimator.loss(theta, x).mean().backward()
    drawn = estimator.sample(torch.Size((5,)), x)
    assert torch.isfinite(estimator.log_prob(drawn, x)).all()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="cells must divide the 120 samples"):
        make_problem(cells=50)
    with pytest.raises(ValueError, match="cells must be at least 1"):
        make_problem(cells=0)
    prior = VariableKPrior(Independent(Exponential(torch.ones(2)), 1), [1.0, 1.0])
    simulator = AdditiveSimulator(bump, WhiteNoise(0.1), prior.layout)
    with pytest.raises(ValueError, match=r"uniform in .theta_1., which is a place"):
        Trace("bumps", prior, simulator, CELLS)


def test_a_signal_of_numpy_inside_torch_has_no_gauss_newton_steps() -> None:
    trace = make_problem()

    def by_numpy(components: Tensor) -> Tensor:
        return torch.from_numpy(trace.simulator.component_signal(components).numpy())

    simulator = AdditiveSimulator(by_numpy, trace.simulator.noise, trace.layout)
    assert Trace("numpy", trace.prior, simulator, trace.cells).build_fit() is None
    assert trace.build_fit() is not None


def test_a_trace_needs_signals_of_components() -> None:
    trace = make_problem()
    with pytest.raises(TypeError, match="simulator must be an AdditiveSimulator"):
        Trace("plain", trace.prior, lambda theta: theta, trace.cells)  # type: ignore
    with pytest.raises(TypeError, match="cells must be an integer"):
        Trace("cells", trace.prior, trace.simulator, "x")  # type: ignore
