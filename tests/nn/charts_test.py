"""Charts: bijections whose log-Jacobians agree with autograd."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from sbi.utils import MultipleIndependent
from scipy import stats
from torch import Tensor
from torch.distributions import (
    Distribution,
    ExpTransform,
    Normal,
    TransformedDistribution,
    Uniform,
)

from sbi_slotflow import problems
from sbi_slotflow.nn.charts import (
    Chart,
    DiscChart,
    WhiteningChart,
    chart_from_spec,
)
from sbi_slotflow.nn.paper import CircleChart
from sbi_slotflow.problems.sinusoids.polar import PolarChart
from sbi_slotflow.sets.marginals import ClosedMarginal, marginals_of

TWO_PI = 2 * math.pi
PRESETS = ("tiny", "paper", "crowded")


@dataclass(frozen=True)
class Case:
    """A chart, the prior of its components and its phase's index."""

    chart: Chart
    component: Distribution
    phase: int | None = None

    def draw(self, num: int, seed: int = 0) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.component.sample(torch.Size((num,)))

    def distance(self, left: Tensor, right: Tensor) -> Tensor:
        """Largest distance in prior widths, the phase's on a circle."""
        gap = (left - right).double().abs()
        if self.phase is not None:
            turned = TWO_PI - gap[..., self.phase]
            gap[..., self.phase] = torch.minimum(gap[..., self.phase], turned)
        widths = [
            m.b
            if isinstance(m, ClosedMarginal) and str(m) == "normal"
            else m.bounds[1] - m.bounds[0]
            for m in self.chart.marginals
        ]
        return (gap / torch.tensor(widths, dtype=torch.float64)).max()


def uniform(low: float, high: float) -> Distribution:
    return Uniform(torch.tensor([low]), torch.tensor([high]))


def log_uniform(low: float, high: float) -> Distribution:
    base = Uniform(torch.tensor([math.log(low)]), torch.tensor([math.log(high)]))
    return TransformedDistribution(base, [ExpTransform()])


def normal(mean: float, scale: float) -> Distribution:
    return Normal(torch.tensor([mean]), torch.tensor([scale]))


def joint(*parts: Distribution) -> Distribution:
    return MultipleIndependent(list(parts), validate_args=False)


def sinusoid(preset: str) -> Distribution:
    return problems.sinusoids(preset).prior.component  # pyright: ignore[reportArgumentType]


def whitening(component: Distribution) -> Case:
    return Case(WhiteningChart(marginals_of(component)), component)


def polar(preset: str) -> Case:
    problem = problems.sinusoids(preset)  # pyright: ignore[reportArgumentType]
    return Case(problem.build_chart(), problem.prior.component, phase=1)


def polar_at_zero(preset: str) -> Case:
    component = sinusoid(preset)
    chart = PolarChart(marginals_of(component), frequency=2)
    return Case(chart, component, phase=1)


def polar_without_frequency(preset: str) -> Case:
    parts = cast(MultipleIndependent, sinusoid(preset)).dists[:2]
    component = joint(*parts)
    return Case(PolarChart(marginals_of(component)), component, phase=1)


def polar_in_another_order() -> Case:
    component = joint(
        uniform(0.0, TWO_PI), normal(3.0, 0.2), uniform(-1.0, 2.0), log_uniform(0.1, 4)
    )
    chart = PolarChart(
        marginals_of(component),
        amplitude=3,
        phase=0,
        frequency=1,
        reference_time=-2.5,
    )
    return Case(chart, component, phase=0)


def orbit(phase: int | None = 3) -> Case:
    component = joint(
        uniform(0.0, TWO_PI), log_uniform(1.0, 9.0), uniform(0.1, 0.6), *ORBIT_PHASE
    )
    chart = DiscChart(marginals_of(component), radius=2, angle=0, phase=phase)
    return Case(chart, component, phase=0)


def mixed() -> Case:
    return whitening(
        joint(uniform(-3.0, -1.0), log_uniform(1e-3, 10.0), normal(-5.0, 0.01))
    )


ORBIT_PHASE = (uniform(0.0, TWO_PI),)

CASES: dict[str, Callable[[], Case]] = {
    "disc": orbit,
    "disc-without-phase": lambda: orbit(None),
    "whitening-uniform": lambda: whitening(joint(uniform(2.5, 3.0), uniform(0.0, 1.0))),
    "whitening-log-uniform": lambda: whitening(log_uniform(0.05, 1.5)),
    "whitening-normal": lambda: whitening(joint(normal(1.5, 0.5), normal(0.0, 2.0))),
    "whitening-mixed": mixed,
    "polar-another-order": polar_in_another_order,
    **{f"whitening-{p}": lambda p=p: whitening(sinusoid(p)) for p in PRESETS},
    **{f"polar-{p}": lambda p=p: polar(p) for p in PRESETS},
    **{f"polar-at-zero-{p}": lambda p=p: polar_at_zero(p) for p in PRESETS},
    **{f"polar-plain-{p}": lambda p=p: polar_without_frequency(p) for p in PRESETS},
}


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def test_inverse_of_forward_is_identity(case: Case) -> None:
    components = case.draw(2_000).double()
    u, log_det = case.chart.forward(components)
    assert u.shape == (2_000, case.chart.num_features)
    assert log_det.shape == (2_000,)
    assert u.isfinite().all()
    assert log_det.isfinite().all()
    assert case.distance(case.chart.inverse(u), components) < 1e-9


def test_forward_of_inverse_is_identity(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(
        2_000, case.chart.num_features, generator=generator, dtype=torch.float64
    )
    back, _ = case.chart.forward(case.chart.inverse(u))
    torch.testing.assert_close(back, u, rtol=1e-6, atol=1e-6)


def test_float32_in_gives_float32_out_and_a_round_trip_to_its_rounding(
    case: Case,
) -> None:
    components = case.draw(2_000)
    u, log_det = case.chart.forward(components)
    back = case.chart.inverse(u)
    assert u.dtype == log_det.dtype == back.dtype == torch.float32
    # u's rounding times the slope of the map; the phase also takes the frequency's
    assert case.distance(back, components) < 1e-4


def test_leading_axes_are_kept(case: Case) -> None:
    components = case.draw(24).reshape(2, 3, 4, -1)
    u, log_det = case.chart.forward(components)
    assert u.shape[:-1] == log_det.shape == (2, 3, 4)
    assert case.chart.inverse(u).shape == components.shape


def test_log_jacobian_equals_autograd(case: Case) -> None:
    components = case.draw(25).double()
    _, log_det = case.chart.forward(components)
    for component, value in zip(components, log_det, strict=True):
        jacobian = cast(
            Tensor,
            torch.autograd.functional.jacobian(
                lambda c: case.chart.forward(c)[0], component
            ),
        )
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)


def test_prior_becomes_standard_normal(case: Case) -> None:
    u, log_det = case.chart.forward(case.draw(20_000).double())
    # Some 50 coordinates at 1e-6 each: a false alarm in 20,000 seeds, were it redrawn.
    for column in u.unbind(-1):
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-6
    # no correlation, of values or of squares; 5 standard errors
    for features in (u, u.square()):
        if u.shape[-1] > 1:
            off_diagonal = torch.corrcoef(features.mT).triu(1)
            assert off_diagonal.abs().max() < 5 / math.sqrt(len(u))
    # and so the prior's density is the normal's, carried back by the Jacobian
    components = case.draw(50)
    u, log_det = case.chart.forward(components.double())
    carried = Normal(0.0, 1.0).log_prob(u).sum(-1) + log_det
    expected = case.component.log_prob(components).reshape(50, -1).sum(-1)
    torch.testing.assert_close(carried.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [8.0, 40.0, 1e6])
def test_inverse_stays_inside_the_support_however_extreme_u_is(
    case: Case, size: float
) -> None:
    corners = itertools.product((-size, 0.0, size), repeat=case.chart.num_features)
    u = torch.tensor(list(corners))
    for dtype in (torch.float32, torch.float64):
        components = case.chart.inverse(u.to(dtype))
        assert components.isfinite().all()
        for column, marginal in zip(
            components.unbind(-1), case.chart.marginals, strict=True
        ):
            low, high = marginal.bounds
            assert (column >= low).all()
            assert (column < high).all()
    # the distribution's own opinion, infinite outside its support
    log_p = case.component.log_prob(case.chart.inverse(u))
    assert log_p.isfinite().all()


def test_forward_is_finite_on_the_bounds_of_the_support(case: Case) -> None:
    ends = [
        (m.a - 8 * m.b, m.a + 8 * m.b)
        if isinstance(m, ClosedMarginal) and str(m) == "normal"
        else m.bounds
        for m in case.chart.marginals
    ]
    components = torch.tensor(list(itertools.product(*ends)), dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        u, log_det = case.chart.forward(components.to(dtype))
        assert u.isfinite().all()
        assert log_det.isfinite().all()


def test_support_is_that_of_the_prior(case: Case) -> None:
    inside = case.draw(500)
    assert case.chart.contains(inside).all()
    for d, marginal in enumerate(case.chart.marginals):
        low, high = marginal.bounds
        for value in (low - 5e-4, high + 5e-4):
            if math.isinf(value):
                continue
            outside = inside.clone()
            outside[:, d] = value
            log_p = case.component.log_prob(outside).reshape(500, -1).sum(-1)
            assert log_p.isneginf().all()
            assert not case.chart.contains(outside).any()


def test_spec_survives_json(case: Case) -> None:
    rebuilt = chart_from_spec(json.loads(json.dumps(case.chart.spec)))
    assert type(rebuilt) is type(case.chart)
    assert rebuilt.spec == case.chart.spec
    components = case.draw(100)
    for left, right in zip(
        rebuilt.forward(components), case.chart.forward(components), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    u = torch.randn(100, case.chart.num_features)
    torch.testing.assert_close(
        rebuilt.inverse(u), case.chart.inverse(u), rtol=0, atol=0
    )


def test_true_charts_are_densities(case: Case) -> None:
    assert case.chart.is_density
    assert case.chart.num_features == len(case.chart.marginals)


@pytest.mark.parametrize("preset", PRESETS)
def test_polar_chart_has_no_seam_in_the_phase(preset: str) -> None:
    chart = polar(preset).chart
    component = case_middle(chart)
    ends = component.repeat(2, 1)
    ends[0, 1], ends[1, 1] = 0.0, TWO_PI - 1e-9
    u, _ = chart.forward(ends)
    torch.testing.assert_close(u[0], u[1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("preset", PRESETS)
def test_polar_phase_is_the_tones_at_the_reference_time(preset: str) -> None:
    chart = cast(PolarChart, polar(preset).chart)
    components = polar(preset).draw(200).double()
    u, _ = chart.forward(components)
    amplitude, phase, frequency = components.unbind(-1)
    tone = torch.polar(amplitude, TWO_PI * frequency * chart.reference_time + phase)
    point = torch.complex(u[:, 0], u[:, 1])
    torch.testing.assert_close(point / point.abs(), tone / tone.abs())
    # a larger amplitude lies further out
    order = point.abs().argsort()
    assert torch.equal(order, amplitude.argsort())


def case_middle(chart: Chart) -> Tensor:
    u = torch.full((1, chart.num_features), 0.3, dtype=torch.float64)
    return chart.inverse(u)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 3.0)])
def test_circle_chart_is_the_papers(preset: str, weights: tuple[float, float]) -> None:
    component = sinusoid(preset)
    chart = CircleChart(marginals_of(component), *weights)
    case = Case(chart, component, phase=1)
    components = case.draw(2_000)
    u, log_det = chart.forward(components)
    amplitude, phase, frequency = components.double().unbind(-1)
    low, high = chart.marginals[2].bounds
    expected = torch.stack(
        [
            amplitude,
            weights[0] * torch.cos(phase),
            weights[0] * torch.sin(phase),
            weights[1] * (frequency - (low + high) / 2),
        ],
        dim=-1,
    )
    torch.testing.assert_close(u.double(), expected, rtol=1e-5, atol=1e-5)
    assert not chart.is_density
    assert chart.num_features == 4
    assert (log_det == 0).all()
    assert case.distance(chart.inverse(u), components) < 1e-5
    # the radius of the phase's point is dropped
    scaled = u * torch.tensor([1.0, 0.1, 0.1, 1.0])
    assert case.distance(chart.inverse(scaled), components) < 1e-5
    rebuilt = chart_from_spec(json.loads(json.dumps(chart.spec)))
    torch.testing.assert_close(rebuilt.forward(components)[0], u, rtol=0, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_circle_chart_stays_inside_the_support(preset: str) -> None:
    component = sinusoid(preset)
    chart = CircleChart(marginals_of(component))
    corners = itertools.product((-40.0, 0.0, 40.0), repeat=4)
    components = chart.inverse(torch.tensor(list(corners)))
    assert component.log_prob(components).isfinite().all()


def test_polar_chart_refuses_a_phase_that_is_not_a_whole_turn() -> None:
    marginals = marginals_of(joint(uniform(0.5, 1.5), uniform(0.0, 3.0)))
    with pytest.raises(ValueError, match=r"angle must be uniform on \[0, 2 pi\)"):
        PolarChart(marginals)


def test_polar_chart_refuses_an_unbounded_amplitude() -> None:
    marginals = marginals_of(joint(normal(0.5, 1.5), uniform(0.0, TWO_PI)))
    with pytest.raises(ValueError, match="amplitude with a bounded prior"):
        PolarChart(marginals)


def test_a_disc_is_smooth_where_its_radius_is_at_its_bound() -> None:
    """There the angle means nothing, and only phase plus angle does."""
    chart = orbit().chart
    e = 0.1 + 1e-9
    angle = torch.linspace(0.0, 6.0, 7)
    rows = torch.stack(
        [angle, 0 * angle + 2.0, 0 * angle + e, (1.0 - angle) % TWO_PI], -1
    ).double()
    u, _ = chart.forward(rows)
    assert u.std(0).max() < 1e-3


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((normal(0.5, 1.5), uniform(0.0, TWO_PI)), "radius with a lower bound"),
        ((uniform(0.0, 1.0), uniform(0.0, 3.0)), r"uniform on \[0, 2 pi\)"),
    ],
    ids=["radius", "angle"],
)
def test_a_disc_refuses_what_is_none(
    parts: tuple[Distribution, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DiscChart(marginals_of(joint(*parts)), 0, 1)


def test_without_a_frequency_the_angle_in_the_plane_is_the_phase() -> None:
    case = polar_without_frequency("tiny")
    components = case.component.sample((50,))
    u, _ = case.chart.forward(components)
    turns = (torch.atan2(u[:, 1], u[:, 0]) - components[:, 1]) / TWO_PI
    torch.testing.assert_close(turns, turns.round(), atol=1e-5, rtol=0.0)


def test_circle_chart_refuses_another_number_of_parameters() -> None:
    marginals = marginals_of(joint(uniform(0.5, 1.5), uniform(0.0, TWO_PI)))
    with pytest.raises(ValueError, match="three parameters"):
        CircleChart(marginals)


def test_circle_chart_refuses_a_phase_that_is_not_a_whole_turn() -> None:
    with pytest.raises(ValueError, match=r"angle must be uniform on \[0, 2 pi\)"):
        CircleChart([ClosedMarginal("uniform", 0.0, 1.0)] * 3)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="chart kind must be one of"):
        chart_from_spec({"kind": "mercator", "marginals": []})
