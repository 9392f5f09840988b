"""Local coordinates: any number of circular parameters, whose seams do not matter."""

import math

import pytest
import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import Exponential, Gamma, Normal, Uniform, VonMises

from sbi_slotflow import VariableKPrior, problems
from sbi_slotflow.nn.cells import CellAxis
from sbi_slotflow.nn.charts import DiscChart, WhiteningChart
from sbi_slotflow.nn.local import LocalGaussian, LocalTransform

TWO_PI = 2 * math.pi


def uniform(low: float, high: float) -> Uniform:
    return Uniform(torch.tensor([float(low)]), torch.tensor([float(high)]))


def prior(periods: dict[str, float]) -> VariableKPrior:
    component = MultipleIndependent(
        [
            Gamma(torch.tensor([2.0]), torch.tensor([1.0])),
            uniform(-1.0, 2.0),
            uniform(5.0, 9.0),
            VonMises(torch.tensor([3.0]), torch.tensor([2.0])),
            Normal(torch.tensor([1.0]), torch.tensor([2.0])),
            Exponential(torch.tensor([1.0])),
        ]
    )
    return VariableKPrior(
        component,
        [0.0, 1.0],
        order_by=1,
        component_names=["height", "place", "turn", "angle", "tilt", "wait"],
        periods=periods,
    )


CIRCULAR = {
    "none": {},
    "one": {"turn": 4.0},
    "two": {"turn": 4.0, "angle": TWO_PI},
    # half a circle has no seam, and the location keeps its own
    "part": {"turn": 8.0, "angle": TWO_PI, "place": 3.0},
}
COUNT = {"none": 0, "one": 1, "two": 2, "part": 1}


@pytest.fixture(params=CIRCULAR, name="case")
def _case(request: pytest.FixtureRequest) -> tuple[str, VariableKPrior, LocalTransform]:
    made = prior(CIRCULAR[request.param])
    chart = WhiteningChart(made.component_marginals)
    return request.param, made, LocalTransform(chart, CellAxis(1, 8))


def draws(made: VariableKPrior) -> Tensor:
    rows = made.sample((500,), generator=torch.Generator().manual_seed(0))
    return made.layout.unpack(rows).components[:, 0].double()


def test_the_periods_of_the_layout_decide_what_is_circular(case) -> None:
    name, _, local = case
    assert local.num_circular == COUNT[name]


def test_coordinates_invert_and_have_autograds_log_jacobian(case) -> None:
    _, made, local = case
    components = draws(made).requires_grad_()
    w, log_det = local.coordinates(components)
    torch.testing.assert_close(local.components(w), components)
    slopes = [
        torch.autograd.grad(column.sum(), components, retain_graph=True)[0]
        for column in w.unbind(-1)
    ]
    _, expected = torch.linalg.slogdet(torch.stack(slopes, -2))
    torch.testing.assert_close(log_det, expected)


def test_relative_coordinates_do_not_feel_a_seam(case) -> None:
    """Moving both a component and the centre around the circle changes nothing."""
    _, made, local = case
    components = draws(made)
    anchors = torch.full((len(components),), 3)
    w, _ = local.coordinates(components)
    num = local.num_circular
    centre = w[:, 1 : 1 + num] + 0.3
    found = local.relative(w, anchors, centre)
    torch.testing.assert_close(
        found[:, 1 : 1 + num], torch.full((len(w), num), -0.3).double()
    )
    turned = components.clone()
    for d, period in enumerate(made.component_marginals.periods):
        low, _ = made.component_marginals[d].bounds
        if math.isfinite(period) and d != 1:
            turned[:, d] = low + (components[:, d] - low + 0.4 * period) % period
    again, _ = local.coordinates(turned)
    moved = local.relative(again, anchors, centre + 0.4 * TWO_PI)
    torch.testing.assert_close(moved, found, rtol=1e-6, atol=1e-6)
    back = local.components(local.absolute(found, anchors, centre))
    torch.testing.assert_close(back, components, rtol=1e-6, atol=1e-6)


def test_the_log_prior_is_the_priors_but_for_a_constant(case) -> None:
    _, made, local = case
    components = draws(made)
    whole, log_det = local.coordinates(components)
    anchors = torch.full((len(whole),), 3)
    # on another turn of the circle
    centre = whole[:, 1 : 1 + local.num_circular] - 0.2 - TWO_PI
    w = local.relative(whole, anchors, centre)
    cells = torch.zeros(w.shape[:-1]).long()
    found, slope = local.log_prior(w, centre, cells)
    # from the marginals' own densities, those of the coordinates
    marginals = made.component_marginals
    columns = zip(marginals, components.unbind(-1), strict=True)
    expected = sum(m.log_density(column) for m, column in columns) - log_det
    central = torch.stack(
        [
            (column > m.core[0]) & (column < m.core[1])
            for m, column in zip(marginals, components.unbind(-1), strict=True)
        ],
        -1,
    ).all(-1)
    assert central.double().mean() > 0.97
    difference = (found - expected)[central]
    torch.testing.assert_close(difference, difference[:1].expand(len(difference)))
    step = 1e-6 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    ahead, _ = local.log_prior(w + step, centre, cells)
    behind, _ = local.log_prior(w - step, centre, cells)
    slopes, expected = (slope * step).sum(-1), (ahead - behind) / 2
    torch.testing.assert_close(slopes[central], expected[central], rtol=1e-3, atol=1e-9)


def test_the_log_prior_is_finite_wherever_a_fit_may_end(case) -> None:
    _, _, local = case
    far = local.farthest(torch.tensor(0))
    w = torch.stack([-far, -far / 1.1, torch.zeros_like(far), far / 1.1, far])
    centre = torch.zeros(len(w), local.num_circular).double()
    for part in local.log_prior(w, centre, torch.zeros(len(w)).long()):
        assert part.isfinite().all()


def test_ends_hold_all_of_the_prior(case) -> None:
    _, made, local = case
    whole, _ = local.coordinates(draws(made))
    low, high = local.ends(torch.tensor(0))
    inner = slice(1 + local.num_circular, None)
    assert (whole[:, inner] >= low[inner]).all()
    assert (whole[:, inner] <= high[inner]).all()
    assert (low[1 : 1 + local.num_circular] == -math.pi).all()


@pytest.mark.parametrize("num", [0, 1, 3])
def test_each_circular_coordinate_has_a_predicted_centre(num: int) -> None:
    torch.manual_seed(0)
    gaussian = LocalGaussian(5, 7, num)
    centre = gaussian.centre(torch.randn(4, 7))
    assert centre.shape == (4, num)
    assert (centre.abs() <= math.pi).all()
    # of directions of their own
    assert centre.flatten().unique().numel() == 4 * num


def test_an_angle_is_referred_to_the_time_of_its_chart() -> None:
    problem = problems.sinusoids("tiny")
    chart, axis = problem.build_chart(), problem.location_axis()
    components = problem.prior.component.sample((50,)).double()
    found, _ = LocalTransform(chart, axis).coordinates(components)
    (shear,) = chart.shears
    expected = components[:, shear.column] + shear.rate * components[:, shear.by]
    assert shear.rate != 0.0
    turns = (found[:, 1] - expected) / TWO_PI
    torch.testing.assert_close(turns, turns.round(), atol=1e-9, rtol=0.0)


def test_a_disc_beside_a_phase_that_turns_with_its_angle() -> None:
    """Coordinates invert, have autograd's log-Jacobian and the prior's density."""
    problem = problems.radial_velocity()
    chart = problem.build_chart()
    assert isinstance(chart, DiscChart)
    local = LocalTransform(chart, problem.location_axis())
    assert local.num_circular == 1
    components = problem.prior.component.sample((200,)).double().requires_grad_()
    whole, log_det = local.coordinates(components)
    torch.testing.assert_close(local.components(whole), components)
    slopes = [
        torch.autograd.grad(column.sum(), components, retain_graph=True)[0]
        for column in whole.unbind(-1)
    ]
    _, expected = torch.linalg.slogdet(torch.stack(slopes, -2))
    torch.testing.assert_close(log_det, expected)
    centre = torch.zeros(200, 1, dtype=torch.float64)
    anchors = local.position(whole).floor().long()
    w = local.relative(whole, anchors, centre)
    found, slope = local.log_prior(w, centre, anchors)
    columns = zip(problem.prior.component_marginals, components.unbind(-1), strict=True)
    prior = sum(m.log_density(column) for m, column in columns) - log_det
    torch.testing.assert_close(
        prior - found, torch.full_like(found, local.log_constant)
    )
    torch.testing.assert_close(slope[:, -2:], -w[:, -2:])


def test_signals_are_not_linearised_in_the_middle_of_a_disc() -> None:
    problem = problems.radial_velocity()
    local = LocalTransform(problem.build_chart(), problem.location_axis())
    w = torch.zeros(3, 5, dtype=torch.float64)
    w[:, 0] = 100.0
    w[1, 3:] = torch.tensor([3e-9, -4e-9])
    w[2, 3:] = torch.tensor([0.3, -0.4])
    w.requires_grad_()
    moved = local.off_centre(w)
    size = torch.hypot(moved[:, 3], moved[:, 4]).tolist()
    assert size == pytest.approx([0.01, 0.01, 0.5])
    torch.testing.assert_close(moved[2], w[2])
    times = torch.linspace(-100.0, 100.0, 60, dtype=torch.float64)
    signal = problem.simulator.component_signal(local.components(moved), times)
    (slope,) = torch.autograd.grad(signal.square().sum(), w)
    assert slope.isfinite().all()
    # Where nothing points anywhere, all directions are alike: slopes stay small.
    assert slope[:2].abs().max() < 100 * slope[2].abs().max()
