"""Every step undoes itself and has autograd's log-Jacobian."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Exponential, Gumbel

from sbi_slotflow.sets.marginals import (
    ClosedMarginal,
    ExponentialScore,
    NormalScore,
    Place,
    marginals_of,
)
from sbi_slotflow.sets.transforms import (
    Affine,
    Bend,
    Columns,
    Compose,
    Cut,
    Logarithm,
    Logit,
    LowerTriangular,
    Permutation,
    Polar,
    Shear,
    StraightTails,
    Table,
    Transform,
)

LAW = ClosedMarginal("log_uniform", 0.1, 2.0)
SKEW = marginals_of(Gumbel(torch.tensor([1.0]), torch.tensor([0.5])))[0]
POSITIVE = marginals_of(Exponential(torch.tensor([1.0])))[0]
FACTOR = torch.tensor([[2.0, 0, 0], [0.3, 0.5, 0], [-1.0, 0.2, 4.0]]).double()
LOCATION = torch.tensor([0.5, -1.0, 2.0]).double()


def line(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 61, dtype=torch.float64)


def ends(low: float, high: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(low).double(), torch.tensor(high).double()


# On numbers: each with numbers from its domain.
NUMBERS: dict[str, tuple[Transform, Tensor]] = {
    "identity": (Affine(), line(-3, 3)),
    "affine": (Affine(1.5, 0.2), line(-3, 3)),
    "logarithm": (Logarithm(0.5), line(0.51, 9)),
    "logarithm from above": (Logarithm(0.5, upper=True), line(-9, 0.49)),
    "logit": (Logit(-1.0, 3.0), line(-0.999, 2.999)),
    "logit in small units": (Logit(-1e-21, 3e-21), 1e-21 * line(-0.999, 2.999)),
    "normal score": (NormalScore(LAW), line(0.11, 1.99)),
    "normal score with tails": (SKEW.score, line(-1, 12)),
    "exponential score": (ExponentialScore(LAW), line(0.11, 1.99)),
    "place": (Place(LAW, 64.0), line(0.11, 1.99)),
    "straight tails": (
        StraightTails(NormalScore(SKEW), Affine(), (-1.0, 2.0)),
        line(-2, 9),
    ),
    "straight tails of a positive law": (POSITIVE.score, line(1e-9, 60)),
    "table": (
        Table([(-1.0, -2.0, 0.5), (0.0, -0.5, -1.0), (0.5, 3.0, 2.0)]),
        line(-3, 2),
    ),
    "bend": (Bend(2.5), line(-40, 40)),
    "cut": (Cut(*ends(-1.0, 2.0)), line(-0.99, 1.99)),
    "cut far below": (Cut(*ends(-21.0, -20.0)), line(-20.4, -20.001)),
    "cut far above": (Cut(*ends(9.0, 30.0)), line(9.001, 9.6)),
    "composed numbers": (
        Compose([Logit(0.0, 1.0), Bend(0.5), Affine(1.0, 3.0)]),
        line(0.01, 0.99),
    ),
}
# On vectors, three numbers each.
VECTORS: dict[str, Transform] = {
    "columns": Columns([Affine(0.0, 2.0), Bend(1.0), Affine()]),
    "lower triangular": LowerTriangular(LOCATION, FACTOR),
    "a factor each": LowerTriangular(
        LOCATION.expand(200, -1), FACTOR.repeat(200, 1, 1)
    ),
    "permutation": Permutation([2, 0, 1]),
    "shear": Shear(0, 2, 1.7),
    "turning shear": Shear(1, 2, 17.0, 2 * math.pi),
    "polar": Polar(0, 1),
    "polar, the other way round": Polar(2, 0),
    "composed": Compose(
        [
            Shear(1, 2, 2.0, 2 * math.pi),
            Columns([Logarithm(0.0), Affine(), Affine(0.3, 0.1)]),
            Permutation([1, 2, 0]),
            LowerTriangular(LOCATION, FACTOR),
        ]
    ),
}


@pytest.mark.parametrize(("step", "x"), NUMBERS.values(), ids=NUMBERS)
def test_a_step_on_numbers(step: Transform, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    y, log_det = step.forward(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == log_det.shape == x.shape
    assert (slope > 0).all()
    torch.testing.assert_close(log_det, slope.log(), rtol=1e-7, atol=1e-7)
    width = (x.amax() - x.amin()).detach()
    back = step.inverse(y)
    torch.testing.assert_close(back / width, x / width, rtol=1e-7, atol=1e-9)
    assert (y.diff() > 0).all()


@pytest.mark.parametrize("step", VECTORS.values(), ids=VECTORS)
def test_a_step_on_vectors(step: Transform) -> None:
    x = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)).double()
    x = (0.1 + 2.9 * x).requires_grad_()  # positive, and below half a turn
    y, log_det = step.forward(x)
    assert y.shape == x.shape
    assert log_det.shape == x.shape[:-1]
    slopes = [
        torch.autograd.grad(column.sum(), x, retain_graph=True)[0]
        for column in y.unbind(-1)
    ]
    _, expected = torch.linalg.slogdet(torch.stack(slopes, -2))
    torch.testing.assert_close(log_det, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(step.inverse(y), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("low", "high", "reach"),
    [(-12, 12, 10), (-2, 9, 6), (-9, 2, 6), (3, 9, 6), (-9, -3, 6)],
)
def test_cuts_keep_their_digits_in_both_tails(
    low: float, high: float, reach: float
) -> None:
    y = torch.linspace(-reach, reach, 300, dtype=torch.float64)
    cut = Cut(torch.full_like(y, low), torch.full_like(y, high))
    x = cut.inverse(y).requires_grad_()
    back, log_det = cut.forward(x)
    torch.testing.assert_close(back, y, rtol=0, atol=1e-3)
    (slope,) = torch.autograd.grad(back.sum(), x)
    torch.testing.assert_close(log_det, slope.log(), rtol=0, atol=2e-2)


def test_a_cut_normal_variable_is_normal() -> None:
    low, high = -0.5, 1.0
    shares = torch.linspace(0.01, 0.99, 99).double()
    ndtr = torch.special.ndtr
    bottom, top = (ndtr(torch.tensor(end).double()) for end in (low, high))
    x = torch.special.ndtri(bottom + shares * (top - bottom))
    y, _ = Cut(*ends(low, high)).forward(x)
    torch.testing.assert_close(ndtr(y), shares)


def test_a_turning_shear_stays_on_one_turn() -> None:
    x = torch.tensor([[1.5, 10.0], [1.5, -10.0]]).double()
    shear = Shear(0, 1, 0.25, 1.0, low=1.0)
    y, _ = shear.forward(x)
    torch.testing.assert_close(y, torch.tensor([[1.0, 10.0], [1.0, -10.0]]).double())
    torch.testing.assert_close(shear.inverse(y), x)


def test_a_bent_tail_grows_as_a_logarithm() -> None:
    y, _ = Bend(2.5).forward(torch.tensor([-2.5, 2.0, 2.5 + math.e - 1, 1e6 + 1.5]))
    expected = torch.tensor([-2.5, 2.0, 3.5, 2.5 + math.log(1e6)])
    torch.testing.assert_close(y, expected)


def test_polar_makes_a_normal_pair_of_an_exponential_and_an_angle() -> None:
    noise = torch.Generator().manual_seed(3)
    x = torch.rand(20_000, 2, generator=noise).double()
    x = torch.stack([-x[:, 0].log(), 2 * math.pi * x[:, 1]], -1)
    y, _ = Polar(0, 1).forward(x)
    # 6 standard errors of 20,000 pairs
    assert y.mean(0).abs().max() < 6 / math.sqrt(20_000)
    covariance = y.T.cov() - torch.eye(2)
    assert covariance.abs().max() < 6 * math.sqrt(2 / 20_000)


def test_steps_that_are_not_finite_at_their_ends_are_refused() -> None:
    with pytest.raises(ValueError, match="must be finite at their ends"):
        StraightTails(Affine(), Logarithm(0.0), (-1.0, 1.0))


def test_a_table_must_increase() -> None:
    with pytest.raises(ValueError, match="knots must increase"):
        Table([(0.0, 0.0, 0.0), (1.0, -1.0, 0.0)])


def test_a_table_goes_through_its_knots_with_their_slopes() -> None:
    knots = torch.tensor([(-1.0, -2.0, 0.5), (0.0, -0.5, -1.0), (0.5, 3.0, 2.0)])
    y, log_slope = Table(knots.tolist()).forward(knots[:, 0].double())
    assert torch.allclose(y, knots[:, 1].double())
    assert torch.allclose(log_slope, knots[:, 2].double())
