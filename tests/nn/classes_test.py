"""Cells, coordinates and densities of components of several classes."""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.distributions import Independent, Uniform

from sbi_slotflow import MultiClassPrior, VariableKPrior
from sbi_slotflow.nn.cell_chain import CellChain, ChainGivenX, UniformCells
from sbi_slotflow.nn.cells import CellAxis, CellGrid
from sbi_slotflow.nn.charts import WhiteningChart, chart_from_spec
from sbi_slotflow.nn.class_cells import ClassAxis, axis_from_spec
from sbi_slotflow.nn.classes import ClassChart, ClassTransform


def member(high: list[float], weights: list[float], **options: Any) -> VariableKPrior:
    ends = torch.tensor(high)
    names = [f"p{i}" for i in range(len(high))]
    component = Independent(Uniform(torch.zeros_like(ends), ends), 1)
    return VariableKPrior(component, weights, component_names=names, **options)


# At most two of a, of an angle and an amplitude; at most one of b.
PRIOR = MultiClassPrior(
    {
        "a": member([4.0, 6.2831853, 3.0], [1, 1, 1], periods={"p1": 6.2831853}),
        "b": member([5.0, 2.0], [1, 3]),
    }
)
AXIS = ClassAxis.of([CellAxis(0, 4), CellAxis(0, 3)], PRIOR.log_counts)
CHART = ClassChart(
    PRIOR.layout, [WhiteningChart(p.component_marginals) for p in PRIOR.members]
)


def test_a_cell_says_its_class() -> None:
    cells = torch.arange(7)
    assert AXIS.offsets == (0, 4, 7)
    assert AXIS.class_of(cells).tolist() == [0, 0, 0, 0, 1, 1, 1]
    middles = [0.5, 1.5, 2.5, 3.5, 0.5, 1.5, 2.5]
    assert AXIS.middles(cells).squeeze(-1).tolist() == middles
    there, inside = AXIS.stepped(torch.tensor([3, 5]), torch.tensor([[0, 0], [0, 1]]))
    assert inside.tolist() == [[True, False], [True, True]]
    assert there[1].tolist() == [5, 6]
    assert AXIS.held(torch.tensor([[1, 1, 4]])).tolist() == [[1, 2, 1]]


def test_an_axis_survives_a_file() -> None:
    assert axis_from_spec(asdict(AXIS)) == AXIS
    assert chart_from_spec(CHART.spec).spec == CHART.spec


def test_locations_of_one_and_of_two_parameters_do_not_mix() -> None:
    with pytest.raises(ValueError, match="all have one location, or all two"):
        ClassAxis.of([CellAxis(0, 4), CellGrid(0, 4, across=1, rows=2)], torch.ones(2))


def axis_of(a: list[float], b: list[float], separation: float = 0.0) -> ClassAxis:
    prior = MultiClassPrior({"a": member([4.0], a), "b": member([5.0], b)})
    return ClassAxis.of([CellAxis(0, 4, separation), CellAxis(0, 3)], prior.log_counts)


@pytest.mark.parametrize(
    ("a", "b", "separation"),
    [
        ([1, 1, 1], [1, 3], 0.0),
        ([1, 0, 1], [0, 1, 1], 0.0),  # none or two of a, one or two of b
        ([0, 1, 0, 1], [1, 0, 1], 0.0),
        ([1, 1, 1, 1], [1, 1], 1.2),
        ([0, 0, 1], [0, 1, 1], 1.7),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["uniform", "chain"])
def test_sets_of_cells_are_those_that_the_prior_allows(
    a: list[float], b: list[float], separation: float, count: int, kind: str
) -> None:
    """All sets that are allowed sum to one; others are impossible."""
    axis, most = axis_of(a, b, separation), len(a) + len(b) - 2
    edges = torch.arange(8.0, dtype=torch.float64)[None]
    torch.manual_seed(0)
    chain = CellChain(axis, token_features=4, max_cardinality=max(most, count))
    given = (
        UniformCells(axis, edges)
        if kind == "uniform"
        else ChainGivenX(chain, torch.randn(1, 7, 4), edges)
    )
    cells = torch.cartesian_prod(*[torch.arange(7)] * count).reshape(-1, count)
    cells = cells[(cells.diff(dim=-1) >= 0).all(-1)]
    second = (cells >= 4).sum(-1)
    first = count - second
    allowed = (first < len(a)) & (second < len(b))
    weights = [torch.tensor(each) > 0 for each in (a, b)]
    allowed &= weights[0][first.clamp(max=len(a) - 1)]
    allowed &= weights[1][second.clamp(max=len(b) - 1)]
    for row, num in enumerate(first.tolist()):
        # As far left as each may stand, in units of cells.
        place = -math.inf
        for cell in cells[row, :num].tolist():
            place = max(cell, place + separation)
            allowed[row] &= place < cell + 1
    totals = {i + j for i, p in enumerate(a) for j, q in enumerate(b) if p and q}
    assert bool(allowed.any()) == (count in totals)
    if count not in totals:
        return
    width = max(most, count)
    padded = torch.nn.functional.pad(cells, (0, width - count))
    mask = (torch.arange(width) < count).expand_as(padded)
    owner = torch.zeros(len(cells)).long()
    with torch.no_grad():
        log_p = given.log_prob(owner, padded, mask).double()
        drawn = given.sample(owner[:1].expand(500), mask[:1].expand(500, -1))
    assert torch.equal(log_p.isfinite(), allowed)
    assert log_p.exp().sum() == pytest.approx(1.0, abs=1e-5)
    known = {tuple(row) for row in cells[allowed].tolist()}
    assert {tuple(row) for row in drawn[:, :count].tolist()} <= known


def test_coordinates_of_both_classes_have_one_length() -> None:
    transform = ClassTransform(CHART, AXIS)
    draws = PRIOR.component.sample((200,)).double()
    w, log_det = transform.coordinates(draws)
    assert w.shape == (200, transform.num_features)
    assert torch.allclose(transform.components(w), draws, atol=1e-9)
    label = draws[:, 0].long()
    # What a class does not have is zero.
    assert transform.columns == [[0, 1, 2], [0, 2]]
    assert not w[label == 1, 1].any()
    for c, one in enumerate(transform.members):
        own = PRIOR.layout.to_class(draws[label == c], c)
        found, slope = one.coordinates(own)
        assert torch.equal(w[label == c][:, transform.columns[c]], found)
        assert torch.equal(log_det[label == c], slope)
    position = transform.position(w)
    assert torch.equal(AXIS.class_of(position.long()), label)


def test_relative_coordinates_come_back() -> None:
    transform = ClassTransform(CHART, AXIS)
    w, _ = transform.coordinates(PRIOR.component.sample((100,)))
    cells = transform.position(w).long()
    centre = torch.full((100, 1), 0.3).double()
    relative = transform.relative(w, cells, centre)
    assert (relative[:, 0].abs() <= 0.5 + 1e-6).all()
    assert not relative[:, -1].any()
    assert torch.allclose(
        transform.components(transform.absolute(relative, cells, centre)),
        transform.components(w),
    )


def test_sets_of_cells_weigh_their_counts() -> None:
    """The prior of sets of two is p(K_a, K_b) K_a! K_b! / (p(2) 2!) and p(theta)."""
    transform = ClassTransform(CHART, AXIS)
    cells = torch.tensor([[0, 1], [0, 4]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    weight = transform.log_weight(cells, mask)
    constants = [one.log_constant for one in transform.members]
    # 1/3 1/4 of two a, 1/3 3/4 of one and one
    total = 1 / 12 + 3 / 12
    two = torch.tensor(1 / 12 / total * 2 / 2).log() + 2 * constants[0]
    mixed = torch.tensor(3 / 12 / total * 1 / 2).log() + sum(constants)
    assert torch.allclose(weight, torch.stack([two, mixed]).double(), atol=1e-6)
    assert transform.num_coordinates(cells, mask).tolist() == [6, 5]


def test_sets_of_cells_weigh_how_seldom_they_keep_apart() -> None:
    """Two places on a length of 4 are 1.2 apart with a chance of (1 - 1.2 / 4)^2."""
    charts = [
        WhiteningChart(m.component_marginals) for m in (member([4.0], [1, 1, 1]),)
    ]
    cells, mask = torch.tensor([[0, 2]]), torch.ones(1, 2, dtype=torch.bool)
    weights = []
    for separation in (0.0, 1.2):
        prior = MultiClassPrior({"a": member([4.0], [1, 1, 1])})
        axis = ClassAxis.of([CellAxis(0, 4, separation)], prior.log_counts)
        transform = ClassTransform(ClassChart(prior.layout, charts), axis)
        weights.append(float(transform.log_weight(cells, mask)))
    assert weights[0] - weights[1] == pytest.approx(2 * math.log(1 - 1.2 / 4))
