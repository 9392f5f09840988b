"""Parts of shared cells: they divide a set, and hold the modes of blended pairs."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sbi_slotflow import load_pretrained, rjmcmc
from sbi_slotflow.nn import cell_sets
from sbi_slotflow.nn.cell_parts import divided, num_divisions, part_codes
from sbi_slotflow.nn.cells import CellAxis, OccupiedCells
from sbi_slotflow.problems import sinusoids

SIZE = 6


def sets_of(*rows: list[int]) -> OccupiedCells:
    """Sets of cells of width two, which start at twice their number."""
    cells, mask = torch.zeros(2, len(rows), SIZE).long()
    for s, row in enumerate(rows):
        cells[s, : len(row)], mask[s, : len(row)] = torch.tensor(row), 1
    starts = 2.0 * cells.double()
    owner = torch.zeros(len(rows)).long()
    return OccupiedCells(owner, cells, starts, starts + 2, mask.bool())


@pytest.mark.parametrize(
    ("cells", "num", "ways"),
    [
        ([1, 2, 4], 1, 1),
        ([1, 3, 3], 6, 21),
        ([0, 0, 3, 3], 3, 36),
        ([2, 2, 2, 5], 4, 20),
        ([2, 2, 2, 2, 2], 2, 6),
        ([2, 2, 2, 2, 2, 2], 1, 1),
    ],
)
def test_every_position_stands_in_one_part(cells: list[int], num: int, ways: int):
    sets, generator = sets_of(cells), torch.Generator().manual_seed(0)
    assert num_divisions(sets).tolist() == [num]
    parts = divided(sets, CellAxis(0, 8))
    assert len(parts.code) == len(parts.code.unique()) == ways
    size, count = 500, len(cells)
    inside = torch.rand(size, SIZE, generator=generator, dtype=torch.float64)
    position = sets.starts + 2 * inside
    position[:, :count] = position[:, :count].sort(-1).values
    here = OccupiedCells(*(part.expand(size, *part.shape[1:]) for part in sets))
    code = part_codes(here, position)
    there = (position.unsqueeze(1) >= parts.starts) & (
        position.unsqueeze(1) < parts.ends
    )
    there = there[..., :count].all(-1)
    assert (there.sum(-1) == 1).all()
    assert torch.equal(parts.code[there.long().argmax(-1)], code)


def test_parts_that_leave_no_room_are_left_out() -> None:
    near = divided(sets_of([3, 3]), CellAxis(0, 8))
    apart = divided(sets_of([3, 3]), CellAxis(0, 8, separation=1.0))
    assert len(near.code) == 21
    first, second = (apart.starts[:, k] for k in (0, 1))
    assert 0 < len(apart.code) < 21
    assert (apart.ends[:, 1] - first > 1).all()
    assert (second >= first).all()


def test_sets_are_numbered() -> None:
    parts = divided(sets_of([1, 1], [1, 2], [2, 2, 2]), CellAxis(0, 8))
    assert torch.bincount(parts.of).tolist() == [21, 1, 20]
    assert not len(divided(sets_of(), CellAxis(0, 8)).code)


@pytest.fixture(scope="module")
def blended() -> tuple[Tensor, Tensor]:
    """Two lines a tenth of a resolution element apart, and exact draws with K = 2."""
    problem = sinusoids("crowded")
    components = torch.zeros(1, 10, 3)
    components[0, :2] = torch.tensor([[0.9, 1.0, 2.7014], [0.7, 4.0, 2.7017]])
    theta = problem.layout.pack(torch.tensor([2]), components, torch.tensor([[0.3]]))
    x = problem.simulator(theta, torch.Generator().manual_seed(2))
    exact = rjmcmc.collapsed(problem, x, seed=1).sample((2_000,))
    return x, exact[problem.layout.cardinality(exact) == 2]


def test_parts_hold_what_one_mode_leaves_out(
    blended, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, exact = blended
    assert len(exact) > 500
    posterior = load_pretrained("sinusoids-crowded")
    parted = posterior.log_prob(exact, x)
    monkeypatch.setattr(cell_sets, "_MOST_DIVIDED", 0)
    single = load_pretrained("sinusoids-crowded").log_prob(exact, x)
    assert parted.isfinite().all()
    assert float((parted - single).mean()) > 1.0


def test_parts_are_drawn_as_often_as_they_weigh(blended) -> None:
    # five standard errors for each of 21 parts: 1 of 10^5 seeds fails
    x, exact = blended
    posterior = load_pretrained("sinusoids-crowded")
    network = posterior.posterior_estimator.given(x[None] if x.ndim == 1 else x)
    sets: Any = network._sets
    num = 20_000
    parts = sinusoids("crowded").layout.unpack(exact[:1])
    position = sets.head.coordinates(parts)[0][..., 0]
    owner = torch.zeros(num).long()
    cells = sets.head.axis.cells(position, sets.edges)
    cells = torch.where(parts.mask, cells, 0).expand(num, -1)
    there = OccupiedCells.among(sets.edges, owner, cells, parts.mask.expand(num, -1))
    drawn = sets.parts.sample_parts(there, seeded(3))
    whole = float((drawn < 0).double().mean())
    assert abs(whole - math.exp(sets.parts.log_shares[0])) < 0.02
    inside = drawn >= 0
    drawn, num = drawn[inside], int(inside.sum())
    there = OccupiedCells(*(part[inside] for part in there))
    within = sets.parts.within(there, drawn)
    middle = (within.starts + within.ends) / 2
    found, log_prob = sets.parts.parts_of(there, middle)
    assert torch.equal(found, drawn)
    share = torch.bincount(drawn).double() / num
    seen = drawn.unique()
    assert len(seen) > 3
    expected = sets.parts._parts.log_weight.exp()
    assert float(expected.sum()) == pytest.approx(1.0)
    for part in range(len(expected)):
        error = math.sqrt(float(expected[part]) / num) + 1e-4
        here = float(share[part]) if part < len(share) else 0.0
        assert abs(here - float(expected[part])) < 5 * error
    torch.testing.assert_close(log_prob, expected.log()[drawn])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
